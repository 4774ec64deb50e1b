"""Whole episodes out of a vector environment and an actor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gac_fast.errors import DataError, EnvError

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from gac_fast.data import Trajectories

__all__ = ["Acts", "MakeActor", "Rollout", "rollout"]

# Rows are seeded with consecutive numbers from the round's own; all of them stay below this, which any generator takes.
SEED_LIMIT = 2**31


class Acts(Protocol):
    """Whatever chooses the actions of a round: a :class:`gac_fast.act.Actor`, or anything else with this method."""

    def act(self, obs: np.ndarray, /) -> np.ndarray:
        """Observations float32 [num_envs, obs_dim] -> actions [num_envs, act_dim], both in environment units."""
        ...


MakeActor = Callable[[np.ndarray, int], Acts]
"""(first observations [num_envs, obs_dim] in environment units, number of the round's first episode) -> actor."""


@dataclass
class Rollout:
    """n finished episodes, in the order of round and environment."""

    returns: np.ndarray
    """float64 [n], sums of rewards in step order."""
    lengths: np.ndarray
    """int64 [n], steps."""
    terminated: np.ndarray
    """bool [n], ended by the environment and not by its time limit."""
    first_observations: np.ndarray
    """float32 [n, obs_dim]."""
    observations: list[np.ndarray] = field(default_factory=list)
    """Per episode float32 [H, obs_dim]; empty where not kept."""
    actions: list[np.ndarray] = field(default_factory=list)
    """Per episode float32 [H, act_dim]; empty where not kept."""

    def trajectories(self, env: VectorEnv[Any, Any, Any], env_id: str | None = None) -> Trajectories:
        """The kept episodes as packed storage, and they alone.

        Raises:
            DataError: no episode was kept.
        """
        from gac_fast.data import Trajectories

        n = len(self.observations)
        if n == 0:
            raise DataError(f"trajectories: expected at least 1 kept episode, got 0 of {len(self.returns)}: set keep")
        space = env.single_action_space
        return Trajectories(
            observations=np.concatenate(self.observations),
            actions=np.concatenate(self.actions),
            cu_seqlens=np.concatenate(([0], np.cumsum(self.lengths[:n]))).astype(np.int64),
            returns=self.returns[:n],
            complete=np.ones(n, np.bool_),
            action_low=np.asarray(space.low, np.float32),  # type: ignore[attr-defined]
            action_high=np.asarray(space.high, np.float32),  # type: ignore[attr-defined]
            env_id=env_id,
        )


def rollout(
    env: VectorEnv[Any, Any, Any],
    make_actor: MakeActor,
    episodes: int,
    seed: int | None = None,
    keep: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Run ``episodes`` whole episodes in rounds of one episode per environment.

    A round ends when its last episode does; what an environment that finished earlier does meanwhile is discarded, so
    that short episodes are not over-represented. Any autoreset mode will do.

    Args:
        env: any ``gymnasium.vector.VectorEnv`` with flat float observations and a Box action space.
        make_actor: called at the start of every round.
        seed: round r resets with ``seed + r * num_envs``, to which vector environments add the row: no start is seeded
            twice. Seeds stay below 2^31 and begin again at 0 there.
        keep: episodes, from the first, whose observations and actions are kept.
        on_step: called with (episodes finished, time steps made) after every step of the vector.

    Raises:
        EnvError: an observation or reward is not finite, or the environment raised.
    """
    from gymnasium.vector import AutoresetMode

    if episodes < 1:
        raise EnvError(f"episodes: expected at least 1, got {episodes}")
    n = env.num_envs
    disabled = env.metadata.get("autoreset_mode") == AutoresetMode.DISABLED
    returns, lengths = np.zeros(0), np.zeros(0, np.int64)
    terminated, firsts = np.zeros(0, np.bool_), []
    kept_obs: list[np.ndarray] = []
    kept_actions: list[np.ndarray] = []
    steps_made, round_index = 0, 0
    while len(returns) < episodes:
        start = len(returns)
        wanted = min(n, episodes - start)
        running = np.arange(n) < wanted
        try:
            obs, _ = env.reset(seed=None if seed is None else _round_seed(seed, round_index, n))
        except Exception as error:
            raise EnvError(f"the environment failed at its reset, {start} episodes done: {error}") from error
        obs = _observations(obs, running)
        actor = make_actor(obs, start)
        firsts.append(obs[:wanted].copy())
        total, length = np.zeros(n), np.zeros(n, np.int64)
        ended_by_env = np.zeros(n, np.bool_)
        n_keep = max(0, min(wanted, keep - start))
        history: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        while running.any():
            action = np.asarray(actor.act(obs))
            if n_keep:
                history.append((obs[:n_keep].copy(), action[:n_keep].copy(), running[:n_keep].copy()))
            try:
                obs, reward, termination, truncation, _ = env.step(action)
            except Exception as error:
                finished = start + int((~running[:wanted]).sum())
                raise EnvError(
                    f"the environment failed at step {length.max()}, {finished} episodes done: {error}"
                ) from error
            obs = _observations(obs, running)
            bad = running & ~np.isfinite(reward)
            if bad.any():
                raise EnvError(f"environment {np.flatnonzero(bad)[0]} returned a non-finite reward")
            total[running] += np.asarray(reward, np.float64)[running]
            length[running] += 1
            steps_made += int(running.sum())
            done = np.asarray(termination | truncation, np.bool_)
            ended_by_env |= running & np.asarray(termination, np.bool_)
            running &= ~done
            if disabled and done.any() and running.any():
                obs, _ = env.reset(options={"reset_mask": done})
                obs = _observations(obs, running)
            if on_step is not None:
                on_step(start + int((~running[:wanted]).sum()), steps_made)
        for i in range(n_keep):
            alive = [row for row in history if row[2][i]]
            kept_obs.append(np.stack([row[0][i] for row in alive]))
            kept_actions.append(np.stack([row[1][i] for row in alive]).astype(np.float32))
        returns = np.concatenate((returns, total[:wanted]))
        lengths = np.concatenate((lengths, length[:wanted]))
        terminated = np.concatenate((terminated, ended_by_env[:wanted]))
        round_index += 1
    return Rollout(returns, lengths, terminated, np.concatenate(firsts), kept_obs, kept_actions)


def _round_seed(seed: int, round_index: int, num_envs: int) -> int:
    return int(seed + round_index * num_envs) % (SEED_LIMIT - num_envs)


def _observations(obs: np.ndarray, running: np.ndarray) -> np.ndarray:
    """float32 [n, obs_dim]; those of environments that are no longer ``running`` are discarded and may be anything."""
    x = np.asarray(obs, np.float32)
    finite = np.isfinite(x)
    lost = np.flatnonzero(running & ~finite.all(axis=1))
    if len(lost):
        raise EnvError(f"environment {lost[0]} returned a non-finite observation")
    return x if finite.all() else np.where(finite, x, np.float32(0))
