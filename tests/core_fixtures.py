"""Tiny models, batches, data sets and environments for the tests of the method."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from model_fixtures import ACT_DIM, OBS_DIM, make_batch, make_model, model_config, random_seeds, single

from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.model.normalization import Normalization
from gac_fast.policy import Policy

__all__ = [
    "ACT_DIM",
    "OBS_DIM",
    "CountingEnv",
    "counting_vector",
    "goal_trajectories",
    "make_batch",
    "make_model",
    "make_normalization",
    "make_policy",
    "make_trajectories",
    "model_config",
    "random_seeds",
    "single",
]


def make_normalization(
    obs_dim: int = OBS_DIM, act_dim: int = ACT_DIM, dtype: torch.dtype = torch.float32
) -> Normalization:
    """Units in which no map is the identity."""
    return Normalization(
        torch.linspace(-1, 1, obs_dim, dtype=dtype), torch.linspace(0.5, 2, obs_dim, dtype=dtype),
        torch.linspace(0.25, 0.5, act_dim, dtype=dtype), torch.linspace(1.5, 3, act_dim, dtype=dtype),
        torch.tensor(40.0, dtype=dtype), torch.tensor(10.0, dtype=dtype),
    )  # fmt: skip


def make_policy(config: Config | None = None, *, n: int = 12, env_id: str | None = "Toy-v0", seed: int = 0) -> Policy:
    """An untrained policy over n trajectories of returns 0, 1, ..., n - 1, of which 3 and n - 1 are not usable."""
    config = config or Config(model=model_config())
    usable = torch.ones(n, dtype=torch.bool)
    usable[[3, n - 1]] = False
    generator = torch.Generator().manual_seed(seed)
    return Policy(
        make_model(config.model, seed=seed), make_normalization(), config, env_id,
        random_seeds(n, config.model, seed=seed), torch.arange(n, dtype=torch.float64),
        torch.randn(n, OBS_DIM, generator=generator), usable,
    )  # fmt: skip


def make_trajectories(
    lengths: Sequence[int],
    *,
    obs_dim: int = OBS_DIM,
    act_dim: int = ACT_DIM,
    seed: int = 0,
    complete: Sequence[bool] | None = None,
    env_id: str | None = "Toy-v0",
) -> Trajectories:
    """Random episodes with actions in [-2, 2]."""
    rng = np.random.default_rng(seed)
    n, b = int(sum(lengths)), len(lengths)
    return Trajectories(
        observations=rng.normal(size=(n, obs_dim)).astype(np.float32),
        actions=rng.uniform(-2, 2, size=(n, act_dim)).astype(np.float32),
        cu_seqlens=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        returns=rng.normal(5, 3, size=b),
        complete=np.ones(b, np.bool_) if complete is None else np.array(complete, np.bool_),
        action_low=np.full(act_dim, -2, np.float32),
        action_high=np.full(act_dim, 2, np.float32),
        env_id=env_id,
    )


def goal_trajectories(b: int, length: int, seed: int = 0) -> Trajectories:
    """Episodes that each follow a hidden goal g: a = 0.8 g + noise whatever the state; the return is 10 + 5 g_0."""
    rng = np.random.default_rng(seed)
    goal = rng.uniform(-1, 1, size=(b, ACT_DIM))
    n = b * length
    return Trajectories(
        observations=rng.normal(size=(n, OBS_DIM)).astype(np.float32),
        actions=np.clip(0.8 * goal.repeat(length, 0) + 0.05 * rng.normal(size=(n, ACT_DIM)), -1, 1).astype(np.float32),
        cu_seqlens=np.arange(b + 1, dtype=np.int64) * length,
        returns=10 + 5 * goal[:, 0],
        complete=np.ones(b, np.bool_),
        action_low=np.full(ACT_DIM, -1, np.float32),
        action_high=np.full(ACT_DIM, 1, np.float32),
    )


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
