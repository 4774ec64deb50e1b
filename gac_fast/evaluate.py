"""The one evaluation, for the trainer, the command line and users."""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gac_fast.act import Actor
from gac_fast.errors import EnvError
from gac_fast.plan import Plans
from gac_fast.policy import Policy
from gac_fast.rollout import Rollout, rollout

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

__all__ = ["EvalResult", "evaluate"]

MAX_ENVS = 256


@dataclass(frozen=True)
class EvalResult:
    """Whole episodes of one policy in one environment."""

    env_id: str
    returns: np.ndarray
    """float64 [n], in environment units."""
    lengths: np.ndarray
    """int64 [n], steps."""
    predicted: np.ndarray
    """[n], return that the return model expected of the episode's plan."""
    predicted_std: np.ndarray
    """[n]"""
    rollout: Rollout
    seed: int
    seconds: float
    versions: dict[str, str]
    normalized_mean: float | None
    """D4RL-normalised mean score; None where the environment has no reference scores."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the return over episodes."""
        return float(self.returns.std())

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.std / len(self.returns) ** 0.5

    def summary(self) -> dict[str, Any]:
        """JSON-ready numbers."""
        return {
            "env_id": self.env_id,
            "episodes": len(self.returns),
            "return_mean": self.mean,
            "return_std": self.std,
            "return_standard_error": self.standard_error,
            "return_median": float(np.median(self.returns)),
            "length_mean": float(self.lengths.mean()),
            "predicted_mean": float(self.predicted.mean()),
            "predicted_std": float(self.predicted_std.mean()),
            "normalized_mean": self.normalized_mean,
            "seed": self.seed,
            "seconds": self.seconds,
            "steps_per_second": float(self.lengths.sum() / max(self.seconds, 1e-9)),
            "versions": self.versions,
        }


def evaluate(
    policy: Policy,
    env: str | VectorEnv[Any, Any, Any],
    episodes: int = 100,
    seed: int = 0,
    plans: Plans | None = None,
    keep: int = 0,
    progress: bool = False,
) -> EvalResult:
    """Run whole episodes and compare what they return with what was predicted.

    Args:
        policy: as loaded.
        env: environment id (made as a vector of up to 256 and closed again), or a vector environment of the caller's.
        episodes: number of episodes, one plan each.
        seed: of the environments and of planning.
        plans: plan i acts in episode i (they repeat if there are fewer); None plans with ``policy.exploit``, for each
            episode's own start where the return model takes the first state.
        keep: episodes whose observations and actions are kept in ``result.rollout``.
        progress: show a bar.

    Raises:
        EnvError: the environment is unknown, or its spaces are not those the policy was trained on.
    """
    from gac_fast import envs

    if episodes < 1:
        raise EnvError(f"episodes: expected at least 1, got {episodes}")
    own = isinstance(env, str)
    vector = envs.make_vector(env, num_envs=min(episodes, MAX_ENVS))
    try:
        env_id = env if isinstance(env, str) else _env_id(vector)
        _check_fit(policy, vector, env_id)
        predicted, predicted_std = np.zeros(episodes), np.zeros(episodes)

        def make_actor(obs: np.ndarray, first: int) -> Actor:
            n = len(obs)
            if plans is None:
                chosen = policy.exploit(n, obs, seed=seed)
            else:
                chosen = plans[torch.arange(first, first + n, device=plans.z0.device) % len(plans)]
            rows = slice(first, min(first + n, episodes))
            wanted = rows.stop - rows.start
            predicted[rows] = chosen.return_mean[:wanted].cpu().numpy()
            predicted_std[rows] = chosen.return_std[:wanted].cpu().numpy()
            return policy.actor(chosen)

        started = time.perf_counter()
        bar = _bar(episodes) if progress else None
        done_before = 0

        def on_step(done: int, steps: int) -> None:
            nonlocal done_before
            if bar is not None:
                bar.update(done - done_before)
                bar.set_postfix_str(f"{steps / max(time.perf_counter() - started, 1e-9):,.0f} steps/s", refresh=False)
            done_before = done

        result = rollout(vector, make_actor, episodes, seed, keep, on_step)
        if bar is not None:
            bar.close()
        seconds = time.perf_counter() - started
    finally:
        if own:
            vector.close()
    return EvalResult(
        env_id, result.returns, result.lengths, predicted, predicted_std, result, seed, seconds, _versions(),
        _normalized(env_id, result.returns),
    )  # fmt: skip


def _env_id(vector: VectorEnv[Any, Any, Any]) -> str:
    spec = getattr(vector, "spec", None)
    return spec.id if spec is not None else type(vector).__name__


def _check_fit(policy: Policy, vector: VectorEnv[Any, Any, Any], env_id: str) -> None:
    obs_shape, act_shape = vector.single_observation_space.shape, vector.single_action_space.shape
    expected = ((policy.model.obs_dim,), (policy.model.act_dim,))
    if (obs_shape, act_shape) != expected:
        trained_on = policy.env_id or "unnamed data"
        raise EnvError(
            f"{env_id}: the policy was trained on {trained_on} with observations {list(expected[0])} and actions "
            f"{list(expected[1])}, got an environment with {list(obs_shape or ())} and {list(act_shape or ())}"
        )
    named = env_id != type(vector).__name__
    if named and policy.env_id is not None and _task(env_id) != _task(policy.env_id):
        warnings.warn(
            f"the policy was trained on {policy.env_id} and acts in {env_id}, whose spaces have the same shapes",
            stacklevel=3,
        )


def _task(env_id: str) -> str:
    """An environment id without namespace and version."""
    return re.sub(r"-v\d+$", "", env_id.rpartition("/")[2]).lower()


def _normalized(env_id: str, returns: np.ndarray) -> float | None:
    from gac_fast.data import scores
    from gac_fast.errors import DataError

    try:
        return float(np.mean(scores.normalized_score(env_id, returns)))
    except DataError:
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in ("gymnasium", "gymnasium-robotics", "mujoco", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _bar(episodes: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=episodes, desc="evaluate", unit="episode", mininterval=1.0)
