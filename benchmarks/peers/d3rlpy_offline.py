"""TD3+BC and IQL of d3rlpy on a file in D4RL layout.

python -m benchmarks.peers.d3rlpy_offline td3bc --data hopper-medium.hdf5

Settings are d3rlpy's defaults, which are the papers' (batches of 256, rates of 3e-4, alpha 2.5; expectile 0.7, inverse
temperature 3), with the papers' data: TD3+BC reads standardised observations, IQL rewards scaled so that the returns of
the file span 1,000.
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


class Policy:
    """Greedy actions."""

    def __init__(self, algo: Any, steps: Steps) -> None:
        self._algo, self._steps = algo, steps

    def begin(self, n: int) -> None:
        pass

    def act(self, rows: np.ndarray, obs: np.ndarray) -> np.ndarray:
        return self._steps.to_environment(self._algo.predict(self._steps.normalise(obs)))

    def rewarded(self, rows: np.ndarray, rewards: np.ndarray) -> None:
        pass


class Offline:
    """One of d3rlpy's algorithms on its replay buffer."""

    def __init__(self, algorithm: str, steps: Steps, batch_size: int, seed: int, device: str) -> None:
        import d3rlpy

        d3rlpy.seed(seed)
        rewards = steps.rewards
        if algorithm == "iql":
            span = float(np.ptp(steps.data.returns[steps.data.complete]))
            rewards = rewards * np.float32(1000 / max(span, 1e-6))
        self._dataset = d3rlpy.dataset.MDPDataset(
            steps.observations, steps.actions, rewards[:, None], steps.terminals.astype(np.float32),
            steps.timeouts.astype(np.float32), action_space=d3rlpy.ActionSpace.CONTINUOUS,
        )  # fmt: skip
        config = d3rlpy.algos.TD3PlusBCConfig if algorithm == "td3bc" else d3rlpy.algos.IQLConfig
        self._algo = config(batch_size=batch_size).create(device=device)
        self._algo.build_with_dataset(self._dataset)
        self._batch_size, self._steps, self._device = batch_size, steps, device

    def update(self) -> dict[str, float]:
        loss = self._algo.update(self._dataset.sample_transition_batch(self._batch_size))
        return {name: float(loss[name]) for name in ("critic_loss", "actor_loss") if name in loss}

    def agents(self) -> list[tuple[str, float | None, Agent]]:
        return [("exploit", None, Policy(self._algo, self._steps))]

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp.d3")
        self._algo.save(str(temporary))
        os.replace(temporary, path.with_suffix(".d3"))

    def load(self, path: Path, seed: int) -> None:
        # Weights and optimisers; the file keeps no generator.
        import d3rlpy

        d3rlpy.seed(seed)
        self._algo = d3rlpy.load_learnable(str(path.with_suffix(".d3")), device=self._device)


def make(o: argparse.Namespace) -> tuple[Steps, Callable[[], Learner]]:
    steps = read_steps(o.data, standardise=o.algorithm == "td3bc", whole_only=False)
    return steps, lambda: Offline(o.algorithm, steps, o.batch_size, o.seed, o.device)


def cli(arguments: list[str] | None = None) -> int:
    p = parser("Train TD3+BC or IQL of d3rlpy, and evaluate it as gac-fast eval does.", 500_000, 256)
    p.add_argument("algorithm", choices=("td3bc", "iql"))
    o = p.parse_args(arguments)
    try:
        import d3rlpy  # noqa: F401
    except ImportError as error:
        print(f"this needs d3rlpy, in an environment of its own: make peers ({error})", file=sys.stderr)
        return 2
    return main(f"d3rlpy-{o.algorithm}", ["d3rlpy"], o, make)


if __name__ == "__main__":
    sys.exit(cli())
