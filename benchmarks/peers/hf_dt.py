"""The DecisionTransformerModel of Hugging Face transformers on a file in D4RL layout.

python -m benchmarks.peers.hf_dt --data hopper-medium.hdf5 --target 2800 1400

The library has the model alone; the rest follows Chen et al. (arXiv 2106.01345): three layers of width 128 with one
head, windows of 20 steps drawn by length, returns to go divided by 1,000, standardised states, AdamW with rate and
decay 1e-4 after a linear warm-up, gradients clipped at 0.25, the mean squared error of the actions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.common import Agent, Learner, Steps, main, parser, read_steps
from gac_fast.errors import ConfigError

RETURN_SCALE = 1000.0


class Windows:
    """Windows of K steps, padded at their left.

    Args:
        steps: of whole episodes.
        k: steps of a window.
        seed: of the draws.
    """

    def __init__(self, steps: Steps, k: int, seed: int) -> None:
        self._steps, self._k = steps, k
        self._lengths = steps.data.lengths
        # An episode by its length, then a step of it: a step of the data.
        self._episode = np.repeat(np.arange(len(self._lengths)), self._lengths)
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Of the draws from here on."""
        self._rng = np.random.default_rng(seed)

    def draw(self, n: int) -> dict[str, np.ndarray]:
        """n windows, each from its first step on, as K steps or as many as its episode has left."""
        k, s = self._k, self._steps
        first = self._rng.integers(s.data.num_steps, size=n)
        episode = self._episode[first]
        start, end = s.data.cu_seqlens[episode], s.data.cu_seqlens[episode + 1]
        length = np.minimum(end - first, k)
        # Column j holds step first + j - (k - length).
        column = first[:, None] + np.arange(k) - (k - length)[:, None]
        real = column >= first[:, None]
        column = np.where(real, column, first[:, None])
        shown = real[..., None]
        return {
            "states": np.where(shown, s.observations[column], 0).astype(np.float32),
            "actions": np.where(shown, s.actions[column], 0).astype(np.float32),
            "returns_to_go": np.where(shown, s.returns_to_go[column][..., None] / RETURN_SCALE, 0).astype(np.float32),
            "timesteps": np.where(real, column - start[:, None], 0).astype(np.int64),
            "attention_mask": real.astype(np.int64),
        }


class Returns:
    """Acts by the last K steps, encoded anew at each: the model keeps no cache."""

    def __init__(self, model: Any, steps: Steps, k: int, target: float, device: str) -> None:
        self._model, self._steps, self._k, self._target, self._device = model, steps, k, target, device

    def begin(self, n: int) -> None:
        d = self._steps.data
        self._t = 0
        self._states = np.zeros((n, self._k, d.obs_dim), np.float32)
        self._actions = np.zeros((n, self._k, d.act_dim), np.float32)
        self._to_go = np.zeros((n, self._k, 1), np.float32)
        self._now = np.full(n, self._target)

    def act(self, rows: np.ndarray, obs: np.ndarray) -> np.ndarray:
        import torch

        for history in (self._states, self._actions, self._to_go):
            history[:, :-1] = history[:, 1:]
        self._states[rows, -1] = self._steps.normalise(obs)
        self._actions[rows, -1] = 0.0
        self._to_go[rows, -1, 0] = self._now[rows] / RETURN_SCALE
        n = min(self._t + 1, self._k)
        times = np.tile(np.arange(self._t + 1 - n, self._t + 1), (len(rows), 1))
        self._model.eval()
        with torch.inference_mode():
            out = self._model(
                states=torch.from_numpy(self._states[rows, -n:]).to(self._device),
                actions=torch.from_numpy(self._actions[rows, -n:]).to(self._device),
                returns_to_go=torch.from_numpy(self._to_go[rows, -n:]).to(self._device),
                timesteps=torch.from_numpy(times).to(self._device),
                attention_mask=torch.ones(times.shape, dtype=torch.long, device=self._device),
                return_dict=True,
            )
        self._t += 1
        self._actions[rows, -1] = action = out.action_preds[:, -1].float().cpu().numpy()
        return self._steps.to_environment(action)

    def rewarded(self, rows: np.ndarray, rewards: np.ndarray) -> None:
        self._now[rows] -= rewards


class DecisionTransformer:
    """Model, optimiser and data."""

    def __init__(self, steps: Steps, o: argparse.Namespace) -> None:
        import torch
        from transformers import DecisionTransformerConfig, DecisionTransformerModel

        d = steps.data
        longest = int(d.lengths.max())
        self._model = DecisionTransformerModel(
            DecisionTransformerConfig(
                state_dim=d.obs_dim, act_dim=d.act_dim, max_ep_len=max(1000, longest), hidden_size=128, n_layer=3,
                n_head=1, n_inner=512, activation_function="relu", n_positions=1024, resid_pdrop=0.1, attn_pdrop=0.1,
                bos_token_id=None, eos_token_id=None,
            )
        ).to(o.device)  # fmt: skip
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, weight_decay=1e-4)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min((step + 1) / max(1, o.warmup), 1)
        )
        self._windows = Windows(steps, o.window, o.seed)
        self._steps, self._o = steps, o
        # One that was not named is what the method does by itself.
        best = float(d.returns.max())
        self._targets = {f"target {target:g}": target for target in o.target} if o.target else {"exploit": best}

    def update(self) -> dict[str, float]:
        import torch

        device = self._o.device
        batch = {name: torch.from_numpy(x).to(device) for name, x in self._windows.draw(self._o.batch_size).items()}
        self._model.train()
        out = self._model(**batch, return_dict=True)
        real = batch["attention_mask"].bool()
        loss = (out.action_preds[real] - batch["actions"][real]).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 0.25)
        self._optimizer.step()
        self._schedule.step()
        return {"action_error": loss.detach()}

    def agents(self) -> list[tuple[str, float | None, Agent]]:
        return [
            (kind, target, Returns(self._model, self._steps, self._o.window, target, self._o.device))
            for kind, target in self._targets.items()
        ]

    def save(self, path: Path) -> None:
        import torch

        state = {
            "model": self._model.state_dict(), "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }  # fmt: skip
        temporary = path.with_suffix(".tmp.pt")
        torch.save(state, temporary)
        os.replace(temporary, path.with_suffix(".pt"))

    def load(self, path: Path, seed: int) -> None:
        import torch

        state = torch.load(path.with_suffix(".pt"), map_location=self._o.device, weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._windows.seed(seed)


def make(o: argparse.Namespace) -> tuple[Steps, Callable[[], Learner]]:
    if o.window < 1 or o.warmup < 0:
        raise ConfigError(f"--window and --warmup: expected at least 1 and 0, got {o.window} and {o.warmup}")
    steps = read_steps(o.data, standardise=True, whole_only=True)
    return steps, lambda: DecisionTransformer(steps, o)


def cli(arguments: list[str] | None = None) -> int:
    p = parser("Train transformers' DecisionTransformerModel, and evaluate it as gac-fast eval does.", 100_000, 64)
    p.add_argument("--target", type=float, nargs="+", help="returns asked for (default: the greatest of the data)")
    p.add_argument("--window", type=int, default=20, help="steps of a window")
    p.add_argument("--warmup", type=int, default=10_000, help="updates of linear warm-up")
    o = p.parse_args(arguments)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"this needs transformers, in an environment of its own: make peers ({error})", file=sys.stderr)
        return 2
    return main("hf-dt", ["transformers"], o, make)


if __name__ == "__main__":
    sys.exit(cli())
