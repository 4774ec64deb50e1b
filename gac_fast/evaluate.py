"""The one evaluation, for the trainer, the command line and users."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gac_fast.act import Actor
from gac_fast.errors import EnvError
from gac_fast.intervals import bootstrap, interquartile_mean, standard_error, t_interval
from gac_fast.plan import Plans, predict
from gac_fast.policy import Policy
from gac_fast.rollout import Rollout, rollout

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

__all__ = ["EvalResult", "check_fit", "check_task", "evaluate", "pooled", "same_task"]

MAX_ENVS = 256

# Of action bounds, relative and absolute: they went through float32 sums.
BOUND_TOLERANCE = 1e-5


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
        """Of the mean; NaN for one episode, of which nothing can be said."""
        return standard_error(self.returns)

    def summary(self) -> dict[str, Any]:
        """JSON-ready numbers."""
        return {
            "env_id": self.env_id,
            "episodes": len(self.returns),
            "return_mean": self.mean,
            "return_std": self.std,
            "return_standard_error": self.standard_error,
            "return_median": float(np.median(self.returns)),
            "return_iqm": float(interquartile_mean(self.returns)),
            "return_iqm_interval": list(bootstrap([self.returns], interquartile_mean)),
            "length_mean": float(self.lengths.mean()),
            "predicted_mean": float(self.predicted.mean()),
            "predicted_std": float(self.predicted_std.mean()),
            **_honesty([self]),
            "normalized_mean": self.normalized_mean,
            "seed": self.seed,
            "seconds": self.seconds,
            "steps_per_second": float(self.lengths.sum() / max(self.seconds, 1e-9)),
            "versions": self.versions,
        }


def pooled(results: Sequence[EvalResult]) -> dict[str, Any]:
    """JSON-ready numbers of several runs of one method, evaluated alike.

    ``return_standard_error`` and ``return_mean_interval`` (Student's t, 95%) are over the means of the runs: they cover
    other seeds of training. ``return_iqm_interval`` is the stratified bootstrap of Agarwal et al., the runs its strata:
    it covers other episodes of these very runs. ``return_iqm_interval_over_runs`` draws the runs anew too, and is too
    narrow for few. Keys that begin with ``normalized`` give the same as scores, None without reference scores.

    Args:
        results: at least two, of equal numbers of episodes in one environment.

    Raises:
        ValueError: they are not.
    """
    if len(results) < 2 or len({(one.env_id, len(one.returns)) for one in results}) > 1:
        got = [(one.env_id, len(one.returns)) for one in results]
        raise ValueError(f"results: expected at least two, of one environment and number of episodes, got {got}")
    returns = [one.returns for one in results]
    means = np.array([one.mean for one in results])
    every = np.concatenate(returns)
    mean_interval = t_interval(means)
    assert mean_interval is not None
    numbers: dict[str, Any] = {
        "mean": float(means.mean()),
        "mean_interval": list(mean_interval),
        "median": float(np.median(every)),
        "iqm": float(interquartile_mean(every)),
        "iqm_interval": list(bootstrap(returns, interquartile_mean)),
        "iqm_interval_over_runs": list(bootstrap(returns, interquartile_mean, resample_runs=True)),
    }
    env_id = results[0].env_id
    scored = {name: _normalized(env_id, np.asarray(value)) for name, value in numbers.items()}
    return {
        "env_id": env_id,
        "runs": len(results),
        "episodes": len(every),
        **{f"return_{name}": value for name, value in numbers.items()},
        "return_standard_error": standard_error(means),
        **{f"normalized_{name}": value for name, value in scored.items()},
        "predicted_mean": float(np.mean([one.predicted.mean() for one in results])),
        **_honesty(results),
        "steps_per_second": float(sum(x.lengths.sum() for x in results) / max(sum(x.seconds for x in results), 1e-9)),
    }


def _honesty(results: Sequence[EvalResult]) -> dict[str, float | None]:
    """How predictions compare with what was achieved: mean and rms of predicted minus achieved return, and the share of
    episodes within one predicted standard deviation (0.68 if calibrated); None without a predicted spread."""
    gap = np.concatenate([one.predicted - one.returns for one in results])
    std = np.concatenate([one.predicted_std for one in results])
    return {
        "prediction_bias": float(gap.mean()),
        "prediction_rmse": float(np.sqrt(np.square(gap).mean())),
        "prediction_coverage": float((np.abs(gap) <= std).mean()) if (std > 0).any() else None,
    }


def evaluate(
    policy: Policy,
    env: str | VectorEnv[Any, Any, Any] | Sequence[VectorEnv[Any, Any, Any]],
    episodes: int = 100,
    seed: int = 0,
    plans: Plans | None = None,
    keep: int = 0,
    progress: bool = False,
) -> EvalResult:
    """Run whole episodes and compare what they return with what was predicted.

    Args:
        policy: as loaded.
        env: environment id (up to 256 at a time, closed again at the end), or a vector environment of the caller's, or
            halves of one.
        episodes: number of episodes, one plan each.
        seed: of the environments and of planning.
        plans: plan i acts in episode i (they repeat if there are fewer); None plans with ``policy.exploit``, for each
            episode's own start where the return model takes the first state. There the return of given plans is
            predicted anew, for the starts at hand.
        keep: episodes whose observations and actions are kept in ``result.rollout``.
        progress: show a bar.

    Raises:
        EnvError: the environment is unknown, its spaces are not those the policy was trained on, or it was named and
            is another task than that of the data. (A vector environment may be any task with the same spaces.)
    """
    from gac_fast import envs

    if episodes < 1:
        raise EnvError(f"episodes: expected at least 1, got {episodes}")
    own = isinstance(env, str)
    if isinstance(env, str):
        vectors = envs.make_parts(env, num_envs=min(episodes, MAX_ENVS))
    else:
        vectors = [envs.make_vector(one) for one in (env if isinstance(env, Sequence) else [env])]
        if not vectors:
            raise EnvError("env: expected an environment id or at least one vector environment, got none")
    try:
        env_id = env if isinstance(env, str) else _env_id(vectors[0])
        for vector in vectors:
            _check_spaces(policy, vector, env_id)
        if own:
            check_task(policy.env_id, env_id)
        predicted, predicted_std = np.zeros(episodes), np.zeros(episodes)

        def make_actor(obs: np.ndarray, first: int) -> Actor:
            n = len(obs)
            if plans is None:
                chosen = policy.exploit(n, obs, seed=seed)
            else:
                chosen = plans[torch.arange(first, first + n, device=plans.z0.device) % len(plans)]
                if policy.model.returns.uses_first_state:
                    chosen = _predict_for(policy, chosen, obs)
            rows = slice(first, min(first + n, episodes))
            wanted = rows.stop - rows.start
            predicted[rows] = chosen.return_mean[:wanted].cpu().numpy() + policy.start_values(obs[:wanted])
            predicted_std[rows] = chosen.return_std[:wanted].cpu().numpy()
            return policy.exploiting(chosen, seed) if plans is None else policy.actor(chosen)

        started = time.perf_counter()
        bar = _bar(episodes) if progress else None
        done_before = 0

        def on_step(done: int, steps: int) -> None:
            nonlocal done_before
            if bar is not None:
                bar.update(done - done_before)
                bar.set_postfix_str(f"{steps / max(time.perf_counter() - started, 1e-9):,.0f} steps/s", refresh=False)
            done_before = done

        try:
            result = rollout(vectors, make_actor, episodes, seed, keep, on_step)
        finally:
            if bar is not None:
                bar.close()
        seconds = time.perf_counter() - started
    finally:
        if own:
            for vector in vectors:
                envs.close_vector(vector)
    return EvalResult(
        env_id, result.returns, result.lengths, predicted, predicted_std, result, seed, seconds, _versions(),
        _normalized(env_id, result.returns.mean()),
    )  # fmt: skip


def check_fit(policy: Policy, env: str) -> None:
    """Refuse an environment that :func:`evaluate` would refuse, without running it.

    Raises:
        EnvError: unknown, of other spaces, or of another task.
    """
    from gac_fast import envs

    vector = envs.make_vector(env, num_envs=1)
    try:
        _check_spaces(policy, vector, env)
        check_task(policy.env_id, env)
    finally:
        vector.close()


def _env_id(vector: VectorEnv[Any, Any, Any]) -> str:
    spec = getattr(vector, "spec", None)
    return spec.id if spec is not None else type(vector).__name__


def _predict_for(policy: Policy, plans: Plans, obs: np.ndarray) -> Plans:
    """The same plans with the return predicted from the starts ``obs`` [P, obs_dim] in environment units."""
    starts = policy.normalization.observations(torch.as_tensor(obs, device=policy.device))[:, None]
    return predict(policy.model, policy.normalization, plans.z0.to(policy.device), starts)


def _check_spaces(policy: Policy, vector: VectorEnv[Any, Any, Any], env_id: str) -> None:
    trained_on = policy.env_id or "unnamed data"
    space = vector.single_action_space
    obs_shape, act_shape = vector.single_observation_space.shape, space.shape
    expected = ((policy.obs_dim,), (policy.model.act_dim,))
    if (obs_shape, act_shape) != expected:
        raise EnvError(
            f"{env_id}: the policy was trained on {trained_on} with observations {list(expected[0])} and actions "
            f"{list(expected[1])}, got an environment with {list(obs_shape or ())} and {list(act_shape or ())}"
        )
    units = policy.normalization
    bounds = {"low": units.action_mid - units.action_half, "high": units.action_mid + units.action_half}
    for name, bound in bounds.items():
        mine, its = bound.cpu().numpy(), np.asarray(getattr(space, name), np.float32)
        # An environment without bounds takes every action.
        if not np.allclose(mine, np.where(np.isfinite(its), its, mine), rtol=BOUND_TOLERANCE, atol=BOUND_TOLERANCE):
            raise EnvError(
                f"{env_id}: the policy was trained on {trained_on} with actions whose {name} is {mine.tolist()}, "
                f"got an environment where it is {its.tolist()}"
            )


def check_task(trained_on: str | None, env_id: str, what: str = "the policy was trained on") -> None:
    """Refuse another task with spaces of the same shapes. Data may bear any name: only ids that gymnasium knows count.

    Args:
        trained_on: environment of the data, if it is known.
        what: the data are, as the message is to say.

    Raises:
        EnvError: another task.
    """
    from gac_fast import envs

    if trained_on is None:
        return
    # Without "module:", which gymnasium would import: the name comes from a file.
    name = trained_on.rpartition(":")[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = envs.resolve_env_id(name)
    except EnvError:
        return
    if not same_task(envs.resolve_env_id(env_id), known):
        raise EnvError(
            f"{env_id}: {what} {trained_on}, another task with spaces of the same shapes; "
            "pass a vector environment to run it there all the same"
        )


def same_task(env_id: str, other: str) -> bool:
    """Whether two environment ids name one task, whatever the namespace and version."""
    return _task(env_id) == _task(other)


def _task(env_id: str) -> str:
    """An environment id without namespace and version; mazes have one name in every collection."""
    name = re.sub(r"-v\d+$", "", re.split("[:/]", env_id)[-1]).lower().replace("_", "-")
    return re.sub("^maze2d-", "pointmaze-", name)


def _normalized(env_id: str, returns: np.ndarray) -> Any:
    """Scores of returns, a number or a list as their shape asks; None where there are no reference scores."""
    from gac_fast.data import scores
    from gac_fast.errors import DataError

    try:
        # Without an engine in front, or the module that registers it.
        return np.asarray(scores.normalized_score(env_id.rpartition(":")[2], returns)).tolist()
    except DataError:
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in ("gac-fast", "gymnasium", "gymnasium-robotics", "mujoco", "numpy", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _bar(episodes: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=episodes, desc="evaluate", unit="episode", mininterval=1.0)
