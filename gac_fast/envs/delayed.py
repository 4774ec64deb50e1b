"""Rewards that come only when the episode is over."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

__all__ = ["DelayedReward"]


class DelayedReward(VectorWrapper):
    """Pays 0 until an episode ends and then the sum of its rewards: float64, in step order.

    An episode's return is that of the bare environment bit for bit, whatever the autoreset mode, which stays the
    environment's own.

    Args:
        env: the vector environment.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self._sums = np.zeros(env.num_envs)
        self._ended = np.zeros(env.num_envs, np.bool_)
        self._next_step = env.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start new episodes in all rows, or in those of ``options["reset_mask"]``."""
        mask = None if options is None else options.get("reset_mask")
        rows = slice(None) if mask is None else mask
        result = self.env.reset(seed=seed, options=options)
        self._sums[rows] = 0.0
        self._ended[rows] = False
        return result

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """As the environment's, with rewards [num_envs] that are 0 but where an episode ends."""
        observations, rewards, terminations, truncations, info = self.env.step(actions)
        # The step after an episode's last only resets, where that is the mode; its reward belongs to no episode.
        resets = self._ended if self._next_step else np.zeros_like(self._ended)
        self._sums[self._ended] = 0.0
        np.add(self._sums, np.asarray(rewards, np.float64), out=self._sums, where=~resets)
        self._ended = np.asarray(terminations, np.bool_) | np.asarray(truncations, np.bool_)
        return observations, np.where(self._ended, self._sums, 0.0), terminations, truncations, info
