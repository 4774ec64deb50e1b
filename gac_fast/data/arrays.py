"""Episodes from plain arrays, and the value checks that every loader shares."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gac_fast.data.trajectories import Trajectories
from gac_fast.errors import DataError

__all__ = [
    "BLOCK_ROWS",
    "Bounds",
    "EpisodeSplit",
    "check_actions",
    "check_finite",
    "check_flags",
    "from_arrays",
    "from_episodes",
    "resolve_bounds",
    "sum_in_order",
    "warn_of_cuts",
]

_log = logging.getLogger(__name__)

# Rows per block in checks and conversions: bounds the extra memory to a few MB.
BLOCK_ROWS = 65_536

# Actions this far outside their bounds are rounding and get clipped; a fraction of the bounds' range.
_BOUND_TOLERANCE = 1e-5

Bounds = tuple[npt.ArrayLike, npt.ArrayLike]


def from_arrays(
    observations: npt.ArrayLike,
    actions: npt.ArrayLike,
    rewards: npt.ArrayLike,
    terminals: npt.ArrayLike,
    timeouts: npt.ArrayLike | None = None,
    *,
    action_bounds: Bounds | None = None,
    env_id: str | None = None,
    keep_rewards: bool = False,
) -> Trajectories:
    """Cut flat transitions in time order into episodes and check every value.

    An episode ends at a terminal or a timeout. Marked as cut (``complete`` False), with a warning that counts them, are
    steps after the last of these, and every episode that timed out earlier than the longest that did: a time limit is
    the same for all, so recording stopped there, and the return is too small. Where limits truly differ, set
    ``complete`` with :func:`from_episodes`.

    Args:
        observations: [N, obs_dim], before each action.
        actions: [N, act_dim], environment units.
        rewards: [N], of each step.
        terminals: [N], true where the environment ended the episode.
        timeouts: [N], true where a time limit did.
        action_bounds: (low, high), scalars or [act_dim]; default those of ``env_id``, or else -1 and 1.
        env_id: gymnasium id of the environment, where known.
        keep_rewards: keep the reward of every step too, which nothing but a return to go needs.

    Raises:
        DataError: a field has the wrong shape, a value that is not finite, or an action outside the bounds.
    """
    where = "from_arrays"
    packed_observations = _as_float32(observations, f"{where}: observations", ndim=2)
    packed_actions = _as_float32(actions, f"{where}: actions", ndim=2)
    n_steps = len(packed_observations)
    if n_steps == 0:
        raise DataError(f"{where}: observations: expected at least one step, got none")
    flat = {"rewards": np.asarray(rewards), "terminals": np.asarray(terminals)}
    if timeouts is not None:
        flat["timeouts"] = np.asarray(timeouts)
    for name, value in (("actions", packed_actions), *flat.items()):
        shape = (n_steps, *packed_actions.shape[1:]) if name == "actions" else (n_steps,)
        if value.shape != shape:
            raise DataError(f"{where}: {name}: expected shape {shape} to fit observations, got {value.shape}")

    low, high = resolve_bounds(action_bounds, env_id, packed_actions.shape[1], where)
    check_finite(packed_observations, f"{where}: observations")
    check_actions(packed_actions, low, high, f"{where}: actions")
    check_finite(flat["rewards"], f"{where}: rewards")

    split = EpisodeSplit()
    split.add(
        flat["rewards"],
        check_flags(flat["terminals"], f"{where}: terminals"),
        check_flags(flat["timeouts"], f"{where}: timeouts") if timeouts is not None else None,
    )
    cu_seqlens, returns, complete = split.finish()
    warn_of_cuts(complete, where)
    kept = flat["rewards"].astype(np.float32) if keep_rewards else None
    return Trajectories(packed_observations, packed_actions, cu_seqlens, returns, complete, low, high, env_id, kept)


def from_episodes(
    episodes: Sequence[Mapping[str, Any]],
    *,
    action_bounds: Bounds | None = None,
    env_id: str | None = None,
    keep_rewards: bool = False,
) -> Trajectories:
    """Pack a list of episodes and check every value.

    Args:
        episodes: dictionaries of

            - ``observations``: [H, obs_dim], or [H + 1, obs_dim] with the one after the last step, which is dropped;
            - ``actions``: [H, act_dim], environment units;
            - ``rewards`` [H], or ``episode_return``, a number, where step rewards do not exist;
            - ``complete`` (optional, default True): False where the episode was cut, so that its return is too small.
        action_bounds: (low, high), scalars or [act_dim]; default those of ``env_id``, or else -1 and 1.
        env_id: gymnasium id of the environment, where known.
        keep_rewards: keep the reward of every step too, which every episode must then have.

    Raises:
        DataError: an episode is empty, lacks a field, or has wrong shapes or values.
    """
    where = "from_episodes"
    if not len(episodes):
        raise DataError(f"{where}: expected at least one episode, got none")
    lengths = np.zeros(len(episodes), np.int64)
    dims: tuple[int, int] | None = None
    for i, episode in enumerate(episodes):
        for name in ("observations", "actions"):
            if name not in episode:
                raise DataError(f"{where}: episode {i} has no {name!r}, only {_names(episode)}")
        if ("rewards" in episode) == ("episode_return" in episode):
            raise DataError(
                f"{where}: episode {i}: expected either 'rewards' or 'episode_return', got {_names(episode)}"
            )
        obs_shape, act_shape = np.shape(episode["observations"]), np.shape(episode["actions"])
        if len(act_shape) != 2 or len(obs_shape) != 2:
            raise DataError(
                f"{where}: episode {i}: expected observations [H, obs_dim] and actions [H, act_dim], "
                f"got shapes {obs_shape} and {act_shape}"
            )
        lengths[i] = act_shape[0]
        if lengths[i] == 0:
            raise DataError(f"{where}: episode {i} is empty: expected at least one step")
        if obs_shape[0] not in (lengths[i], lengths[i] + 1):
            raise DataError(
                f"{where}: episode {i}: observations: expected {lengths[i]} or {lengths[i] + 1} rows for "
                f"{lengths[i]} actions, got {obs_shape[0]}"
            )
        dims = dims or (obs_shape[1], act_shape[1])
        if (obs_shape[1], act_shape[1]) != dims:
            raise DataError(
                f"{where}: episode {i}: expected (obs_dim, act_dim) = {dims} as in episode 0, "
                f"got {(obs_shape[1], act_shape[1])}"
            )
        if keep_rewards and "rewards" not in episode:
            raise DataError(f"{where}: episode {i}: expected 'rewards', which are to be kept, got {_names(episode)}")
        if "rewards" in episode and np.shape(episode["rewards"]) != (lengths[i],):
            raise DataError(
                f"{where}: episode {i}: rewards: expected shape ({lengths[i]},), got {np.shape(episode['rewards'])}"
            )
    assert dims is not None

    cu_seqlens = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    low, high = resolve_bounds(action_bounds, env_id, dims[1], where)
    observations = np.empty((cu_seqlens[-1], dims[0]), np.float32)
    actions = np.empty((cu_seqlens[-1], dims[1]), np.float32)
    returns = np.empty(len(episodes))
    rewards = np.empty(cu_seqlens[-1], np.float32) if keep_rewards else None
    for i, episode in enumerate(episodes):
        rows = slice(cu_seqlens[i], cu_seqlens[i + 1])
        observations[rows] = episode["observations"][: lengths[i]]
        actions[rows] = episode["actions"]
        check_finite(observations[rows], f"{where}: episode {i}: observations")
        check_actions(actions[rows], low, high, f"{where}: episode {i}: actions")
        if "rewards" in episode:
            check_finite(np.asarray(episode["rewards"]), f"{where}: episode {i}: rewards")
            returns[i] = sum_in_order(np.asarray(episode["rewards"]))
            if rewards is not None:
                rewards[rows] = episode["rewards"]
        else:
            returns[i] = float(episode["episode_return"])
            if not np.isfinite(returns[i]):
                raise DataError(f"{where}: episode {i}: episode_return: expected a finite number, got {returns[i]}")
    complete = np.array([bool(episode.get("complete", True)) for episode in episodes])
    return Trajectories(observations, actions, cu_seqlens, returns, complete, low, high, env_id, rewards)


class EpisodeSplit:
    """Cuts a stream of steps into episodes, block by block, keeping only ends and returns."""

    def __init__(self) -> None:
        self._steps = 0
        self._open_return = 0.0
        self._ends: list[npt.NDArray[np.int64]] = []
        self._timed_out: list[npt.NDArray[np.bool_]] = []
        self._returns: list[npt.NDArray[np.float64]] = []

    def add(
        self,
        rewards: npt.NDArray[Any],
        terminals: npt.NDArray[np.bool_],
        timeouts: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """The next steps: rewards, terminals and timeouts, each [n]."""
        done = terminals if timeouts is None else terminals | timeouts
        ends = np.flatnonzero(done)
        # Episode number of each step within the block; bincount adds in step order, in float64.
        number = np.concatenate([[0], np.cumsum(done[:-1])]) if len(done) else np.zeros(0, np.int64)
        sums = np.zeros(len(ends) + 1)
        sums[0] = self._open_return
        np.add.at(sums, number, rewards.astype(np.float64))
        self._returns.append(sums[:-1])
        self._open_return = float(sums[-1])
        self._ends.append(self._steps + ends + 1)
        self._timed_out.append(~terminals[ends])
        self._steps += len(done)

    def finish(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """``cu_seqlens`` [B + 1], ``returns`` [B] and ``complete`` [B] of all steps added."""
        ends = np.concatenate(self._ends)
        returns = np.concatenate(self._returns)
        timed_out = np.concatenate(self._timed_out)
        lengths = np.diff(ends, prepend=0)
        complete = np.ones(len(ends), np.bool_)
        if timed_out.any():
            # A time limit is the same for all, so a timeout short of the longest is where recording stopped.
            complete = ~(timed_out & (lengths < lengths[timed_out].max()))
        if not len(ends) or ends[-1] != self._steps:
            ends = np.append(ends, self._steps)
            returns = np.append(returns, self._open_return)
            complete = np.append(complete, False)
        return np.concatenate([np.zeros(1, np.int64), ends]), returns, complete


def warn_of_cuts(
    complete: npt.NDArray[np.bool_], what: str, why: str = "neither terminated nor timed out at the time limit"
) -> None:
    """Log how many of the episodes [B] were cut, if any."""
    cut = len(complete) - int(complete.sum())
    if cut:
        _log.warning(
            "%s: %d of %d episodes were cut (%s): their returns are too small and are left out of the return model",
            what,
            cut,
            len(complete),
            why,
        )


def check_finite(values: npt.NDArray[Any], what: str, first_row: int = 0) -> None:
    """Raise ``DataError`` naming the first value [n, ...] that is not finite; ``first_row`` offsets the row named."""
    if not np.issubdtype(values.dtype, np.number):
        raise DataError(f"{what}: expected numbers, got {values.dtype}")
    for start in range(0, len(values), BLOCK_ROWS):
        block = values[start : start + BLOCK_ROWS]
        finite = np.isfinite(block)
        if not finite.all():
            index = [int(i) for i in np.argwhere(~finite)[0]]
            value = block[tuple(index)]
            index[0] += start + first_row
            raise DataError(f"{what}: expected finite numbers, got {value} at index {index}")


def check_actions(
    actions: npt.NDArray[np.float32],
    low: npt.NDArray[np.float32],
    high: npt.NDArray[np.float32],
    what: str,
) -> None:
    """Raise ``DataError`` naming the first action [N, act_dim] that is not finite or out of bounds.

    Overshoot by rounding is clipped in place.
    """
    check_finite(actions, what)
    slack = _BOUND_TOLERANCE * (high - low)
    for start in range(0, len(actions), BLOCK_ROWS):
        block = actions[start : start + BLOCK_ROWS]
        outside = (block < low - slack) | (block > high + slack)
        if outside.any():
            row, column = (int(i) for i in np.argwhere(outside)[0])
            raise DataError(
                f"{what}: expected values from {low[column]:g} to {high[column]:g}, got {block[row, column]:g} at "
                f"index [{row + start}, {column}] (action_bounds=(low, high) sets other bounds)"
            )
        np.clip(block, low, high, out=block)


def check_flags(values: npt.NDArray[Any], what: str) -> npt.NDArray[np.bool_]:
    """Flags [n] as booleans; numbers must be 0 or 1."""
    if values.dtype == np.bool_:
        return values
    if not np.issubdtype(values.dtype, np.number) or not np.isin(values, (0, 1)).all():
        raise DataError(f"{what}: expected booleans or zeros and ones, got other values of type {values.dtype}")
    return values.astype(np.bool_)


def resolve_bounds(
    bounds: Bounds | None, env_id: str | None, act_dim: int, what: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Action bounds [act_dim] as given, or else those of the environment, or else -1 and 1."""
    low: Any
    high: Any
    low, high = bounds if bounds is not None else _environment_bounds(env_id)
    try:
        low = np.broadcast_to(np.asarray(low, np.float32), (act_dim,)).copy()
        high = np.broadcast_to(np.asarray(high, np.float32), (act_dim,)).copy()
    except ValueError:
        raise DataError(
            f"{what}: action bounds: expected {act_dim} values or one, got shapes {np.shape(low)} and {np.shape(high)}"
        ) from None
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise DataError(f"{what}: action bounds: expected finite low < high, got low {low} and high {high}")
    return low, high


def sum_in_order(rewards: npt.NDArray[Any]) -> float:
    """Float64 sum [H] from first to last (``np.sum`` adds pairwise)."""
    return float(np.cumsum(rewards, dtype=np.float64)[-1])


def _environment_bounds(env_id: str | None) -> Bounds:
    # The robots and mazes of D4RL and of this package; asking gymnasium for them would start a simulator.
    unit = ("hopper", "halfcheetah", "walker2d", "ant-", "antmaze", "maze2d", "pointmaze", "gac_fast/pointmaze")
    if env_id is None or env_id.lower().startswith(unit):
        return -1.0, 1.0
    try:
        import gymnasium

        env = gymnasium.make(env_id)
    # A data set of an environment that is not installed, or not gymnasium's, is still a data set.
    except Exception:
        return -1.0, 1.0
    space = env.action_space
    env.close()
    return (space.low, space.high) if isinstance(space, gymnasium.spaces.Box) else (-1.0, 1.0)


def _as_float32(values: npt.ArrayLike, what: str, ndim: int) -> npt.NDArray[np.float32]:
    try:
        # A copy, as clipping works in place and the caller's arrays are the caller's.
        array = np.array(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: expected an array of numbers: {error}") from None
    if array.ndim != ndim or 0 in array.shape[1:]:
        raise DataError(f"{what}: expected {ndim} dimensions with at least one column, got shape {array.shape}")
    return array


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in mapping)
