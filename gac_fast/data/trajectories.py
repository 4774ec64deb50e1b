"""Packed storage of whole episodes: no padding, rewards of steps only where asked for, float32 on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gac_fast.errors import DataError

__all__ = ["Episode", "Trajectories", "TrajectoryStatistics"]

# Rows per block where a float64 copy is needed: bounds the extra memory to a few MB.
_BLOCK_ROWS = 65_536


class Episode(NamedTuple):
    """One episode of H steps, as views into the packed arrays."""

    observations: npt.NDArray[np.float32]
    """[H, obs_dim]"""
    actions: npt.NDArray[np.float32]
    """[H, act_dim], environment units"""
    episode_return: float
    """Undiscounted sum of rewards"""
    complete: bool
    """False where the data cut the episode, so that its return is too small"""


class TrajectoryStatistics(NamedTuple):
    """Moments of a data set; standard deviations are raw (0 for a constant dimension) and of the population."""

    obs_mean: npt.NDArray[np.float64]
    """[obs_dim], over all steps"""
    obs_std: npt.NDArray[np.float64]
    """[obs_dim]"""
    return_mean: float
    """Over the complete episodes"""
    return_std: float


@dataclass(frozen=True, eq=False)
class Trajectories:
    """B episodes with N steps in all, packed end to end.

    Step t of episode i is row ``cu_seqlens[i] + t``. Shapes and types are checked on construction; values
    (finite, inside the action bounds) are checked by the loaders and by ``gac_fast.data.from_arrays``.

    Raises:
        DataError: a field has the wrong shape or type, or an episode is empty.
    """

    observations: npt.NDArray[np.float32]
    """[N, obs_dim]"""
    actions: npt.NDArray[np.float32]
    """[N, act_dim], environment units"""
    cu_seqlens: npt.NDArray[np.int64]
    """[B + 1], first row of each episode and N at the end, in time steps"""
    returns: npt.NDArray[np.float64]
    """[B], float64 sum of rewards in step order"""
    complete: npt.NDArray[np.bool_]
    """[B], False where the data cut the episode: its return is too small, so it is left out of p(y given z)"""
    action_low: npt.NDArray[np.float32]
    """[act_dim]"""
    action_high: npt.NDArray[np.float32]
    """[act_dim]"""
    env_id: str | None = None
    """Environment the episodes come from, where known"""
    rewards: npt.NDArray[np.float32] | None = None
    """[N], of each step, where the loader was told to keep them: the method itself needs returns alone"""

    def __post_init__(self) -> None:
        n_episodes = len(self.returns) if np.ndim(self.returns) == 1 else -1
        for name, ndim, dtype in (
            ("observations", 2, np.float32),
            ("actions", 2, np.float32),
            ("cu_seqlens", 1, np.int64),
            ("returns", 1, np.float64),
            ("complete", 1, np.bool_),
            ("action_low", 1, np.float32),
            ("action_high", 1, np.float32),
        ):
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) or value.ndim != ndim or value.dtype != dtype:
                raise DataError(
                    f"Trajectories.{name}: expected a {ndim}-dimensional {np.dtype(dtype).name} array, "
                    f"got {_describe(value)}"
                )
        n_steps, act_dim = self.actions.shape
        for name, expected in (
            ("observations", (n_steps, self.observations.shape[1])),
            ("cu_seqlens", (n_episodes + 1,)),
            ("complete", (n_episodes,)),
            ("action_low", (act_dim,)),
            ("action_high", (act_dim,)),
        ):
            if getattr(self, name).shape != expected:
                raise DataError(
                    f"Trajectories.{name}: expected shape {expected} to fit {n_episodes} episodes with "
                    f"{n_steps} steps of {act_dim} action dimensions, got {getattr(self, name).shape}"
                )
        rewards: Any = self.rewards
        if rewards is not None and (
            not isinstance(rewards, np.ndarray) or rewards.shape != (n_steps,) or rewards.dtype != np.float32
        ):
            raise DataError(
                f"Trajectories.rewards: expected a float32 array of shape ({n_steps},), got {_describe(rewards)}"
            )
        if n_episodes < 1:
            raise DataError("Trajectories: expected at least one episode, got none")
        if self.cu_seqlens[0] != 0 or self.cu_seqlens[-1] != n_steps:
            raise DataError(
                f"Trajectories.cu_seqlens: expected to run from 0 to {n_steps}, "
                f"got {self.cu_seqlens[0]} to {self.cu_seqlens[-1]}"
            )
        empty = np.flatnonzero(np.diff(self.cu_seqlens) < 1)
        if len(empty):
            raise DataError(
                f"Trajectories.cu_seqlens: expected at least one step in every episode, episode {empty[0]} has "
                f"{self.cu_seqlens[empty[0] + 1] - self.cu_seqlens[empty[0]]}"
            )

    def __len__(self) -> int:
        """Number of episodes B."""
        return len(self.returns)

    def __iter__(self) -> Iterator[Episode]:
        return (self.episode(i) for i in range(len(self)))

    def __repr__(self) -> str:
        cut = len(self) - int(self.complete.sum())
        return (
            f"Trajectories({len(self):,} episodes, {self.num_steps:,} steps, obs_dim={self.obs_dim}, "
            f"act_dim={self.act_dim}, return {self.returns.mean():.1f} +- {self.returns.std():.1f}"
            f"{f', {cut:,} cut' if cut else ''}{f', {self.env_id}' if self.env_id else ''})"
        )

    @property
    def num_steps(self) -> int:
        """Number of time steps N over all episodes."""
        return len(self.actions)

    @property
    def obs_dim(self) -> int:
        return int(self.observations.shape[1])

    @property
    def act_dim(self) -> int:
        return int(self.actions.shape[1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[B], time steps of each episode."""
        return np.diff(self.cu_seqlens)

    @property
    def nbytes(self) -> int:
        """Bytes held by all arrays."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def episode(self, i: int) -> Episode:
        """Episode i (negative counts from the end), as views."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)}")
        i %= len(self)
        rows = slice(int(self.cu_seqlens[i]), int(self.cu_seqlens[i + 1]))
        return Episode(self.observations[rows], self.actions[rows], float(self.returns[i]), bool(self.complete[i]))

    def returns_to_go(self) -> npt.NDArray[np.float64]:
        """[N], the sum of rewards from each step to the end of its episode, that step's included.

        Raises:
            DataError: the rewards of steps were not kept.
        """
        if self.rewards is None:
            raise DataError(
                "returns to go: expected the reward of every step, these episodes hold their returns alone: "
                "load them with keep_rewards=True"
            )
        # Added from the end of each episode, where they have to be 0: a difference of sums would lose digits.
        out = np.empty(self.num_steps, np.float64)
        for start, stop in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True):
            np.cumsum(self.rewards[start:stop][::-1], dtype=np.float64, out=out[start:stop][::-1])
        return out

    def segments(self, length: int) -> tuple[Trajectories, npt.NDArray[np.int64]]:
        """Parts of the episodes, each with the return from its first step to the end of its episode.

        An episode of H steps is cut into max(1, round(H / length)) parts whose lengths differ by at most one step.
        Where the rewards come only at the end, every part has the episode's return.

        Args:
            length: of a part, in time steps.

        Returns:
            the parts, in order, whose arrays of steps are those of the episodes, not copies; and the episode of each
            part, int64 [parts].

        Raises:
            DataError: the length is below 1, or the rewards of steps were not kept.
        """
        if length < 1:
            raise DataError(f"segments: expected a length of at least 1 step, got {length}")
        to_go = self.returns_to_go()
        counts = np.maximum(1, np.rint(self.lengths / length).astype(np.int64))
        episode = np.repeat(np.arange(len(self)), counts)
        number = np.arange(len(episode)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = self.cu_seqlens[episode] + self.lengths[episode] * number // counts[episode]
        cu_seqlens = np.append(first, self.num_steps)
        parts = dataclasses.replace(self, cu_seqlens=cu_seqlens, returns=to_go[first], complete=self.complete[episode])
        return parts, episode

    def subset(self, indices: npt.ArrayLike) -> Trajectories:
        """The episodes ``indices`` (integers, or a boolean mask [B]) in that order, copied."""
        index = np.asarray(indices)
        if index.dtype == np.bool_:
            if index.shape != (len(self),):
                raise DataError(f"subset: expected a boolean mask of shape ({len(self)},), got {index.shape}")
            index = np.flatnonzero(index)
        if index.ndim != 1 or not (index.size == 0 or np.issubdtype(index.dtype, np.integer)):
            raise DataError(f"subset: expected a list of episode numbers, got {_describe(index)}")
        if index.size == 0:
            raise DataError("subset: expected at least one episode, got none")
        bad = index[(index < -len(self)) | (index >= len(self))]
        if len(bad):
            raise DataError(f"subset: expected episode numbers below {len(self)}, got {bad[0]}")
        index = index.astype(np.int64) % len(self)

        cu_seqlens = np.zeros(len(index) + 1, np.int64)
        np.cumsum(self.lengths[index], out=cu_seqlens[1:])
        observations = np.empty((cu_seqlens[-1], self.obs_dim), np.float32)
        actions = np.empty((cu_seqlens[-1], self.act_dim), np.float32)
        rewards = None if self.rewards is None else np.empty(cu_seqlens[-1], np.float32)
        for source, start, stop in zip(index, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
            rows = slice(self.cu_seqlens[source], self.cu_seqlens[source + 1])
            observations[start:stop] = self.observations[rows]
            actions[start:stop] = self.actions[rows]
            if rewards is not None and self.rewards is not None:
                rewards[start:stop] = self.rewards[rows]
        return Trajectories(
            observations=observations,
            actions=actions,
            cu_seqlens=cu_seqlens,
            returns=self.returns[index],
            complete=self.complete[index],
            action_low=self.action_low.copy(),
            action_high=self.action_high.copy(),
            env_id=self.env_id,
            rewards=rewards,
        )

    def split(self, fraction: float, seed: int) -> tuple[Trajectories, Trajectories]:
        """Split at random into (train, held_out), each in the original order.

        Args:
            fraction: share of episodes held out; both parts get at least one episode.
            seed: the same seed gives the same split.
        """
        if not 0.0 < fraction < 1.0:
            raise DataError(f"split: expected a held-out fraction between 0 and 1, got {fraction}")
        if len(self) < 2:
            raise DataError("split: expected at least two episodes, got 1")
        n_held_out = min(max(round(fraction * len(self)), 1), len(self) - 1)
        held_out = np.zeros(len(self), np.bool_)
        held_out[np.random.default_rng(seed).permutation(len(self))[:n_held_out]] = True
        return self.subset(~held_out), self.subset(held_out)

    def statistics(self) -> TrajectoryStatistics:
        """Means and standard deviations, accumulated in float64.

        Raises:
            DataError: no episode is complete, so there is no return to take the moments of.
        """
        if not self.complete.any():
            raise DataError(f"statistics: expected at least one complete episode, all {len(self)} were cut by the data")
        total = np.zeros(self.obs_dim)
        for block in self._observation_blocks():
            total += block.sum(axis=0)
        mean = total / self.num_steps
        squares = np.zeros(self.obs_dim)
        for block in self._observation_blocks():
            block -= mean
            squares += np.square(block, out=block).sum(axis=0)
        returns = self.returns[self.complete]
        return TrajectoryStatistics(
            obs_mean=mean,
            obs_std=np.sqrt(squares / self.num_steps),
            return_mean=float(returns.mean()),
            return_std=float(returns.std()),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Trajectories]) -> Trajectories:
        """All episodes of ``parts`` in order; the parts must agree in dimensions and action bounds.

        Rewards of steps are kept where all parts have them.
        """
        if not parts:
            raise DataError("concatenate: expected at least one Trajectories, got none")
        first = parts[0]
        for number, part in enumerate(parts[1:], start=1):
            if (part.obs_dim, part.act_dim) != (first.obs_dim, first.act_dim):
                raise DataError(
                    f"concatenate: expected (obs_dim, act_dim) = {(first.obs_dim, first.act_dim)} in every part, "
                    f"part {number} has {(part.obs_dim, part.act_dim)}"
                )
            if not (
                np.array_equal(part.action_low, first.action_low)
                and np.array_equal(part.action_high, first.action_high)
            ):
                raise DataError(f"concatenate: expected equal action bounds in every part, part {number} differs")
        lengths = np.concatenate([part.lengths for part in parts])
        rewards = [part.rewards for part in parts if part.rewards is not None]
        return cls(
            observations=np.concatenate([part.observations for part in parts]),
            actions=np.concatenate([part.actions for part in parts]),
            cu_seqlens=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            returns=np.concatenate([part.returns for part in parts]),
            complete=np.concatenate([part.complete for part in parts]),
            action_low=first.action_low.copy(),
            action_high=first.action_high.copy(),
            env_id=first.env_id,
            rewards=np.concatenate(rewards) if len(rewards) == len(parts) else None,
        )

    def _observation_blocks(self) -> Iterator[npt.NDArray[np.float64]]:
        for start in range(0, self.num_steps, _BLOCK_ROWS):
            yield self.observations[start : start + _BLOCK_ROWS].astype(np.float64)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} of {value.dtype}"
    return type(value).__name__
