"""One step of acting by another library's Decision Transformer, timed on demand: ``benchmarks/bench_acting.py`` asks.

python -m benchmarks.peers.acting hf --history 1000 --envs 1 --threads 1

Reads lines from standard input. ``time`` takes one step and answers with its seconds, ``peak`` with the MiB that a step
takes beyond what the process held. The sizes are those of the preset ``gym``, three layers of width 128 with four
heads; the weights are untrained, which is no matter for speed. Neither library keeps keys and values between steps:
the history of a step is encoded anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np

OBS_DIM, ACT_DIM = 11, 3  # hopper
DIM, LAYERS, HEADS = 128, 3, 4


def hf(history: int, n: int) -> Callable[[], np.ndarray]:
    """transformers' DecisionTransformerModel, whose caller keeps the history."""
    import torch
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    torch.manual_seed(0)
    model = DecisionTransformerModel(
        DecisionTransformerConfig(
            state_dim=OBS_DIM, act_dim=ACT_DIM, hidden_size=DIM, n_layer=LAYERS, n_head=HEADS, n_inner=4 * DIM,
            max_ep_len=max(1000, history) + 1, n_positions=3 * history + 3, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    states, actions = torch.randn(n, history, OBS_DIM), torch.zeros(n, history, ACT_DIM)
    returns, timesteps = torch.ones(n, history, 1), torch.arange(history).repeat(n, 1)
    mask = torch.ones(n, history, dtype=torch.long)

    def step() -> np.ndarray:
        with torch.inference_mode():
            out = model(
                states=states, actions=actions, returns_to_go=returns, timesteps=timesteps, attention_mask=mask,
                return_dict=True,
            )  # fmt: skip
        return out.action_preds[:, -1].numpy()

    return step


def d3rlpy(history: int, n: int) -> Callable[[], np.ndarray]:
    """d3rlpy's DecisionTransformer behind its own stateful wrapper, which acts for one environment."""
    if n != 1:
        raise ValueError(f"--envs: expected 1, for which alone its wrapper acts, got {n}")
    from d3rlpy.algos import DecisionTransformerConfig
    from d3rlpy.models.encoders import VectorEncoderFactory

    learner = DecisionTransformerConfig(
        context_size=history, max_timestep=max(1000, history) + 1, num_heads=HEADS, num_layers=LAYERS,
        encoder_factory=VectorEncoderFactory([DIM]),
    ).create(device="cpu:0")  # fmt: skip
    learner.create_impl((OBS_DIM,), ACT_DIM)
    actor = learner.as_stateful_wrapper(target_return=1.0)
    rng = np.random.default_rng(0)
    obs = rng.standard_normal(OBS_DIM).astype(np.float32)
    for _ in range(history):
        # As long as predict() is not asked, it is the wrapper's lists that a step adds to.
        actor._observations.append(obs)
        actor._rewards.append(0.0)
        actor._returns_to_go.append(1.0)
        actor._timesteps.append(min(actor._timestep, history))
        actor._actions[-1] = np.zeros(ACT_DIM, np.float32)
        actor._actions.append(actor._get_pad_action())
    return lambda: actor.predict(obs, 0.0)[None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("library", choices=("hf", "d3rlpy"))
    parser.add_argument("--history", type=int, required=True, help="steps that a step sees, its own included")
    parser.add_argument("--envs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    o = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    try:
        import torch

        torch.set_num_threads(o.threads)
        step = {"hf": hf, "d3rlpy": d3rlpy}[o.library](o.history, o.envs)
        found = step()
        if found.shape != (o.envs, ACT_DIM) or not np.isfinite(found).all():
            raise ValueError(f"expected finite actions of shape {(o.envs, ACT_DIM)}, got {found}")
    except Exception as error:
        print(f"failed: {type(error).__name__}: {error}".split("\n", 1)[0], file=answers, flush=True)
        return 1
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        if line.strip() == "peak":
            from benchmarks.harness import peak_mib

            value = peak_mib(step)
        else:
            start = time.perf_counter()
            step()
            value = time.perf_counter() - start
        print("" if value is None else value, file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
