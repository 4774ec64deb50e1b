"""Environments of a few steps for the tests of the method."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from model_fixtures import OBS_DIM


class CountingEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Episode k of environment ``index`` lasts ``lengths[k % len]`` steps; step t rewards ``100 index + k + t / 10``.

    The observation is (index, episode, step). Where index + episode is even the end is a termination, else a
    truncation. ``faults``
    maps (episode, step) to what goes wrong after that step: "crash", "nan_observation" or "nan_reward"; step 0 is the
    reset.
    """

    def __init__(self, index: int, lengths: Sequence[int], faults: dict[tuple[int, int], str] | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
        # Those of make_normalization.
        self.action_space = gymnasium.spaces.Box(
            np.array([-1.25, -2.5], np.float32), np.array([1.75, 3.5], np.float32), dtype=np.float32
        )
        self.index, self.lengths, self.faults = index, lengths, faults or {}
        self.episode, self.t = -1, 0
        self.actions: list[np.ndarray] = []

    def _observation(self) -> np.ndarray:
        fault = self.faults.get((self.episode, self.t))
        if fault == "crash":
            raise RuntimeError("the arm fell off")
        return np.array([self.index, np.nan if fault == "nan_observation" else self.episode, self.t], np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(np.array(action))
        self.t += 1
        ended = self.t >= self.lengths[self.episode % len(self.lengths)]
        reward = 100 * self.index + self.episode + self.t / 10
        if self.faults.get((self.episode, self.t)) == "nan_reward":
            reward = float("nan")
        even = (self.index + self.episode) % 2 == 0
        return self._observation(), reward, ended and even, ended and not even, {}


class SeededEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point pushed about, for episodes of 3 to 6 steps; all of an episode follows from the seed of its reset."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
        self.action_space = gymnasium.spaces.Box(
            np.array([-1.25, -2.5], np.float32), np.array([1.75, 3.5], np.float32), dtype=np.float32
        )
        self.state, self.t, self.length = np.zeros(OBS_DIM), 0, 3

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.t = self.np_random.normal(size=OBS_DIM), 0
        self.length = int(self.np_random.integers(3, 7))
        return self.state.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.state = 0.9 * self.state + 0.3 * np.resize(action, OBS_DIM)
        reward = 1.0 - float(np.abs(self.state).sum()) / 3
        return self.state.astype(np.float32), reward, False, self.t >= self.length, {}


def seeded_vector(n: int, mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> SyncVectorEnv:
    """A vector of :class:`SeededEnv`."""
    return SyncVectorEnv([SeededEnv] * n, autoreset_mode=mode)


def counting_vector(
    lengths: Sequence[Sequence[int]],
    mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    faults: dict[int, dict[tuple[int, int], str]] | None = None,
) -> SyncVectorEnv:
    """A vector of :class:`CountingEnv`; ``faults`` by environment."""
    makers = [
        functools.partial(CountingEnv, i, episode_lengths, (faults or {}).get(i))
        for i, episode_lengths in enumerate(lengths)
    ]
    return SyncVectorEnv(makers, autoreset_mode=mode)
