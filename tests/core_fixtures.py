"""Tiny models, batches and data sets for the tests of the method, and (by name) environments."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from model_fixtures import ACT_DIM, OBS_DIM, make_batch, make_model, model_config, random_seeds, single

from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.model.normalization import Normalization

if TYPE_CHECKING:
    from gac_fast.policy import Policy
    from gac_fast.train.trainer import Trainer

__all__ = [
    "ACT_DIM",
    "OBS_DIM",
    "goal_trajectories",
    "interrupted_at",
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
    # Its checkpoints need safetensors.
    from gac_fast.policy import Policy

    config = config or Config(model=model_config())
    usable = torch.ones(n, dtype=torch.bool)
    usable[[3, n - 1]] = False
    generator = torch.Generator().manual_seed(seed)
    return Policy(
        make_model(config.model, seed=seed), make_normalization(), config, env_id,
        random_seeds(n, config.model, seed=seed), torch.arange(n, dtype=torch.float64),
        torch.randn(n, OBS_DIM, generator=generator), usable,
    )  # fmt: skip


@contextlib.contextmanager
def interrupted_at(trainer: type[Trainer], step: int) -> Iterator[None]:
    """Ctrl-C before the update after ``step``, which is still made."""
    run_update = trainer.run_update

    def interrupted(self: Trainer) -> Any:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return run_update(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "run_update", interrupted)
        yield


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


def __getattr__(name: str) -> Any:
    """Environments need gymnasium, which a bare GPU machine does without: imported when asked for."""
    if name in ("CountingEnv", "SeededEnv", "counting_vector", "seeded_vector"):
        import env_fixtures

        return getattr(env_fixtures, name)
    raise AttributeError(name)
