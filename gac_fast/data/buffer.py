"""Online episodes behind the offline ones in one packed storage, with eviction by age that spares the best."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gac_fast.data.trajectories import Trajectories
from gac_fast.errors import DataError

__all__ = ["EpisodeBuffer"]


class HasBounds(Protocol):
    """Such as :class:`Trajectories`."""

    @property
    def action_low(self) -> npt.NDArray[np.float32]: ...

    @property
    def action_high(self) -> npt.NDArray[np.float32]: ...

    @property
    def env_id(self) -> str | None: ...


class EpisodeBuffer:
    """Episodes that come and go, packed behind a fixed data set.

    The arrays have room to spare: appending copies the new episodes alone, dropping moves online ones alone. Every
    online episode has a slot for as long as it is kept, so that what others keep of it can stay where it is.

    Args:
        offline: fixed episodes, copied once; None for none.
        capacity: online episodes kept; beyond it the oldest are dropped.
        keep_best: online episodes of the greatest worth, which are never dropped.

    Attributes:
        slots: int64 [b], slot in [0, capacity) of each online episode, in the order of storage, oldest first.
        born: int64 [b], number of each, counted over all that ever were added.
        worth: float64 [b], by which the best are told: their returns, unless others were given.
        opens: bool [b], trajectories that an episode begins with: all, unless they are segments.
        episode_returns: float64 [b], of the whole episode that each is a part of, or what was given for it; NaN where
            it is not known.
        n_added: online episodes ever added.

    Raises:
        DataError: ``capacity`` leaves no room beside the best.
    """

    def __init__(self, offline: Trajectories | None, capacity: int, keep_best: int) -> None:
        if not 0 <= keep_best < capacity:
            raise DataError(f"keep_best: expected 0 to {capacity - 1}, below capacity = {capacity}, got {keep_best}")
        self.capacity = capacity
        self.keep_best = keep_best
        self.n_offline = 0 if offline is None else len(offline)
        self.slots = np.zeros(0, np.int64)
        self.born = np.zeros(0, np.int64)
        self.worth = np.zeros(0)
        self.opens = np.zeros(0, np.bool_)
        self.episode_returns = np.zeros(0)
        self.n_added = 0
        self._data = offline
        # [rows, dim]; `_data` views their first rows once something was added.
        self._observations = self._actions = np.zeros((0, 0), np.float32)

    @property
    def n_online(self) -> int:
        """Online episodes kept."""
        return len(self.slots)

    @property
    def trajectories(self) -> Trajectories:
        """Offline episodes, then online ones, oldest first; views, valid until the next :meth:`add`.

        Raises:
            DataError: there are none.
        """
        if self._data is None:
            raise DataError("episodes: expected at least one, the buffer is empty")
        return self._data

    def add(
        self,
        episodes: Trajectories,
        worth: npt.NDArray[np.float64] | None = None,
        opens: npt.NDArray[np.bool_] | None = None,
        episode_returns: npt.NDArray[np.float64] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Append episodes, and drop the oldest that are too many.

        Args:
            worth: [b + n], of the online episodes that are here and of the new ones; those that were cut have none
                whatever it says. None: their returns.
            opens: bool [n], of the new ones; None: all.
            episode_returns: float64 [n], of the episodes that the new ones are parts of; None: their own returns.

        Returns:
            slots int64 [n] of the new episodes, -1 for those that were dropped at once (only if more come than the
            capacity leaves room for).

        Raises:
            DataError: other dimensions or action bounds than those of the episodes here; nothing is changed then.
        """
        if self._data is not None:
            self._check(episodes)
        n = len(episodes)
        born = np.concatenate((self.born, self.n_added + np.arange(n)))
        if worth is None:
            worth = np.concatenate((self.worth, episodes.returns))
        known = np.concatenate((self._complete(), episodes.complete))
        worth = np.where(known, worth, -np.inf)
        opens = np.ones(n, np.bool_) if opens is None else opens
        whole = episodes.returns if episode_returns is None else episode_returns
        kept = self._kept(worth)
        stays, comes = kept[: self.n_online], kept[self.n_online :]
        self._drop(~stays)
        free = np.setdiff1d(np.arange(self.capacity), self.slots)
        slots = np.full(n, -1, np.int64)
        slots[comes] = free[: int(comes.sum())]
        if comes.any():
            self._append(episodes if comes.all() else episodes.subset(comes))
        self.slots = np.concatenate((self.slots, slots[comes]))
        self.born, self.worth = born[kept], worth[kept]
        self.opens = np.concatenate((self.opens[stays], opens[comes]))
        self.episode_returns = np.concatenate((self.episode_returns[stays], whole[comes]))
        self.n_added += n
        return slots

    def _complete(self) -> npt.NDArray[np.bool_]:
        return np.zeros(0, np.bool_) if self._data is None else self._data.complete[self.n_offline :]

    def _kept(self, worth: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which of the online episodes, oldest first, stay."""
        kept = np.ones(len(worth), np.bool_)
        too_many = len(worth) - self.capacity
        if too_many > 0:
            best = self._best_of(worth)
            may_go = np.setdiff1d(np.arange(len(worth)), best)
            kept[may_go[:too_many]] = False
        return kept

    def _best_of(self, worth: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return np.argsort(-worth, kind="stable")[: self.keep_best]

    def best(self) -> npt.NDArray[np.int64]:
        """The online episodes that would not be dropped now, as positions among those kept, best first."""
        return self._best_of(self.worth)

    def _check(self, episodes: Trajectories) -> None:
        mine = self.trajectories
        if (episodes.obs_dim, episodes.act_dim) != (mine.obs_dim, mine.act_dim):
            raise DataError(
                f"episodes: expected observations [{mine.obs_dim}] and actions [{mine.act_dim}], "
                f"got [{episodes.obs_dim}] and [{episodes.act_dim}]"
            )
        for name in ("action_low", "action_high"):
            if not np.array_equal(getattr(episodes, name), getattr(mine, name)):
                raise DataError(
                    f"episodes: expected {name} {getattr(mine, name).tolist()}, got {getattr(episodes, name).tolist()}"
                )

    def _drop(self, gone: npt.NDArray[np.bool_]) -> None:
        """Online episodes ``gone`` [b], the others moved up."""
        if not gone.any():
            return
        data = self.trajectories
        stays = np.concatenate((np.ones(self.n_offline, np.bool_), ~gone))
        lengths = data.lengths
        # Before the first that goes nothing moves.
        first = int(np.flatnonzero(~stays)[0])
        end = int(data.cu_seqlens[first])
        rows = np.repeat(stays[first:], lengths[first:])
        n = int(rows.sum())
        for array in (self._observations, self._actions):
            array[end : end + n] = array[end : data.num_steps][rows]
        self.slots = self.slots[~gone]
        self._view(lengths[stays], data.returns[stays], data.complete[stays], data)

    def _append(self, episodes: Trajectories) -> None:
        data = self._data
        n_before = 0 if data is None else data.num_steps
        n = n_before + episodes.num_steps
        if n > len(self._observations):
            n_offline = 0 if data is None else int(data.cu_seqlens[self.n_offline])
            room = n_offline + 3 * (n - n_offline) // 2
            self._observations = _grown(None if data is None else data.observations, room, episodes.obs_dim)
            self._actions = _grown(None if data is None else data.actions, room, episodes.act_dim)
        self._observations[n_before:n] = episodes.observations
        self._actions[n_before:n] = episodes.actions
        parts = [episodes] if data is None else [data, episodes]
        self._view(
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.returns for part in parts]),
            np.concatenate([part.complete for part in parts]),
            parts[0],
        )

    def _view(
        self,
        lengths: npt.NDArray[np.int64],
        returns: npt.NDArray[np.float64],
        complete: npt.NDArray[np.bool_],
        like: HasBounds,
    ) -> None:
        if len(returns) == 0:
            self._data = None
            return
        cu_seqlens = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        n = int(cu_seqlens[-1])
        self._data = Trajectories(
            self._observations[:n], self._actions[:n], cu_seqlens, returns, complete,
            like.action_low, like.action_high, like.env_id,
        )  # fmt: skip

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays of the online episodes, for :meth:`load`; views."""
        data = self._data
        arrays = {
            "slots": self.slots, "born": self.born, "n_added": np.array(self.n_added, np.int64),
            "worth": self.worth, "opens": self.opens, "episode_returns": self.episode_returns,
        }  # fmt: skip
        if data is None or self.n_online == 0:
            return arrays
        begin = int(data.cu_seqlens[self.n_offline])
        return arrays | {
            "observations": data.observations[begin:],
            "actions": data.actions[begin:],
            "cu_seqlens": data.cu_seqlens[self.n_offline :] - begin,
            "returns": data.returns[self.n_offline :],
            "complete": data.complete[self.n_offline :],
        }

    def load(self, arrays: dict[str, npt.NDArray[Any]], like: HasBounds) -> None:
        """Take over what :meth:`state` gave, in place of the online episodes here.

        Args:
            like: action bounds and environment of the episodes.

        Raises:
            DataError: arrays that do not fit each other or this buffer.
        """
        slots = arrays["slots"]
        if len(slots) and (slots.min() < 0 or slots.max() >= self.capacity or len(np.unique(slots)) < len(slots)):
            raise DataError(f"slots: expected distinct ones in [0, {self.capacity}), got {slots.tolist()}")
        # Before segments there were none of these.
        returns = arrays.get("returns", np.zeros(0))
        worth = arrays.get("worth", np.where(arrays.get("complete", np.zeros(0, np.bool_)), returns, -np.inf))
        opens = arrays.get("opens", np.ones(len(slots), np.bool_))
        # Segments do not tell of the episode whose others may have gone.
        whole = arrays.get("episode_returns", returns if opens.all() else np.full(len(slots), np.nan))
        if any(len(x) != len(slots) for x in (arrays["born"], returns, worth, opens, whole)):
            raise DataError(
                f"born, returns, worth, opens and episode_returns: expected {len(slots)} entries, one per slot"
            )
        if self.n_online:
            self._drop(np.ones(self.n_online, np.bool_))
        if len(slots):
            a = arrays
            self._append(
                Trajectories(
                    a["observations"], a["actions"], a["cu_seqlens"], a["returns"], a["complete"],
                    like.action_low, like.action_high, like.env_id,
                )
            )  # fmt: skip
        self.slots, self.born = slots.copy(), arrays["born"].copy()
        self.worth, self.opens, self.episode_returns = worth.copy(), opens.copy(), whole.copy()
        self.n_added = int(arrays["n_added"])


def _grown(old: npt.NDArray[np.float32] | None, rows: int, dim: int) -> npt.NDArray[np.float32]:
    new = np.empty((rows, dim), np.float32)
    if old is not None:
        new[: len(old)] = old
    return new
