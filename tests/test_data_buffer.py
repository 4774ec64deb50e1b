"""The buffer of online episodes against plain lists: order, slots, eviction that spares the best, saving."""

from __future__ import annotations

import numpy as np
import pytest
from core_fixtures import make_trajectories
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_fast.data.buffer import EpisodeBuffer
from gac_fast.data.trajectories import Trajectories
from gac_fast.errors import DataError


def episodes(returns: list[float], seed: int, complete: list[bool] | None = None) -> Trajectories:
    """Episodes of 1 to 5 steps with the given returns."""
    lengths = np.random.default_rng(seed).integers(1, 6, len(returns)).tolist()
    made = make_trajectories(lengths, complete=complete, seed=seed)
    return Trajectories(**{**vars(made), "returns": np.array(returns, np.float64)})


class Lists:
    """The same with one entry per episode."""

    def __init__(self, offline: Trajectories | None, capacity: int, keep_best: int) -> None:
        self.offline = [] if offline is None else list(offline)
        self.online: list = []  # (number, episode, slot)
        self.capacity, self.keep_best, self.n = capacity, keep_best, 0

    def add(self, new: Trajectories) -> None:
        self.online += [(self.n + i, episode) for i, episode in enumerate(new)]
        self.n += len(new)
        ranked = sorted(self.online, key=lambda e: -e[1].episode_return if e[1].complete else np.inf)
        spared = {number for number, _ in ranked[: self.keep_best]}
        while len(self.online) > self.capacity:
            oldest = next(i for i, (number, _) in enumerate(self.online) if number not in spared)
            self.online.pop(oldest)

    def check(self, buffer: EpisodeBuffer) -> None:
        assert buffer.born.tolist() == [number for number, _ in self.online]
        expected = self.offline + [episode for _, episode in self.online]
        held = buffer.trajectories
        assert len(held) == len(expected)
        for mine, its in zip(held, expected, strict=True):
            np.testing.assert_array_equal(mine.observations, its.observations)
            np.testing.assert_array_equal(mine.actions, its.actions)
            assert (mine.episode_return, mine.complete) == (its.episode_return, its.complete)


@settings(max_examples=60, deadline=None)
@given(
    with_offline=st.booleans(),
    capacity=st.integers(2, 9),
    keep_best=st.integers(0, 4),
    rounds=st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=6
    ),
)
def test_it_holds_what_plain_lists_hold(with_offline, capacity, keep_best, rounds):
    keep_best = min(keep_best, capacity - 1)
    offline = episodes([3.0, 1.0], 99) if with_offline else None
    buffer, lists = EpisodeBuffer(offline, capacity, keep_best), Lists(offline, capacity, keep_best)
    slot_of: dict[int, int] = {}
    for i, entries in enumerate(rounds):
        new = episodes([float(y) for y, _ in entries], i, [whole for _, whole in entries])
        numbers = range(buffer.n_added, buffer.n_added + len(new))
        slots = buffer.add(new)
        lists.add(new)
        lists.check(buffer)
        # An episode keeps its slot for as long as it is here, and no two share one.
        slot_of |= {n: int(s) for n, s in zip(numbers, slots, strict=True)}
        assert [slot_of[n] for n in buffer.born] == buffer.slots.tolist()
        assert len(set(buffer.slots)) == buffer.n_online <= capacity
        assert all((slot_of[n] == -1) == (n not in set(buffer.born.tolist())) for n in numbers)

    state = {name: array.copy() for name, array in buffer.state().items()}
    other = EpisodeBuffer(offline, capacity, keep_best)
    other.add(episodes([7.0, 8.0], 55))
    other.load(state, buffer.trajectories)
    lists.check(other)
    assert (other.slots.tolist(), other.n_added) == (buffer.slots.tolist(), buffer.n_added)
    # And goes on alike.
    new = episodes([4.0, 2.0, 9.0], 77)
    assert buffer.add(new).tolist() == other.add(new).tolist()
    lists.add(new)
    lists.check(buffer)
    lists.check(other)


def test_the_best_outlive_younger_ones():
    buffer = EpisodeBuffer(None, 3, 1)
    buffer.add(episodes([9.0, 1.0, 2.0], 0))
    buffer.add(episodes([3.0, 4.0], 1))
    assert buffer.trajectories.returns.tolist() == [9.0, 3.0, 4.0]
    assert buffer.born.tolist() == [0, 3, 4]


def test_a_cut_episode_is_never_among_the_best():
    buffer = EpisodeBuffer(None, 2, 1)
    buffer.add(episodes([9.0, 1.0], 0, [False, True]))
    buffer.add(episodes([0.5], 1))
    assert buffer.trajectories.returns.tolist() == [1.0, 0.5]


def test_offline_episodes_are_not_copied_until_something_comes():
    offline = episodes([1.0, 2.0], 0)
    buffer = EpisodeBuffer(offline, 4, 1)
    assert buffer.trajectories is offline
    assert buffer.state().keys() == {"slots", "born", "n_added", "worth", "opens", "episode_returns"}


def test_what_does_not_fit_changes_nothing():
    offline = episodes([1.0, 2.0], 0)
    buffer = EpisodeBuffer(offline, 4, 1)
    wider = make_trajectories([2], obs_dim=offline.obs_dim + 1)
    with pytest.raises(DataError, match=r"episodes: expected observations \[3\].*got \[4\]"):
        buffer.add(wider)
    bounds = Trajectories(**{**vars(episodes([1.0], 1)), "action_low": offline.action_low - 1})
    with pytest.raises(DataError, match="episodes: expected action_low"):
        buffer.add(bounds)
    assert buffer.trajectories is offline
    with pytest.raises(DataError, match=r"^keep_best: expected 0 to 3, below capacity = 4, got 4$"):
        EpisodeBuffer(None, 4, 4)
    with pytest.raises(DataError, match="the buffer is empty"):
        EpisodeBuffer(None, 4, 1).trajectories  # noqa: B018


def test_saved_arrays_that_do_not_fit_are_named():
    buffer = EpisodeBuffer(None, 4, 1)
    buffer.add(episodes([1.0, 2.0], 0))
    state, like = buffer.state(), buffer.trajectories
    with pytest.raises(DataError, match=r"slots: expected distinct ones in \[0, 4\), got \[0, 4\]"):
        EpisodeBuffer(None, 4, 1).load({**state, "slots": np.array([0, 4])}, like)
    with pytest.raises(DataError, match="born, returns, worth, opens and episode_returns: expected 2 entries"):
        EpisodeBuffer(None, 4, 1).load({**state, "born": np.array([0])}, like)


def test_the_best_may_be_told_by_something_else_than_returns():
    buffer = EpisodeBuffer(None, 4, 1)
    whole = np.array([9.0, 9.0, 9.0])
    buffer.add(episodes([9.0, 1.0, 5.0], 1), np.array([0.0, 2.0, 1.0]), np.array([True, False, False]), whole)
    assert buffer.best().tolist() == [1]
    # What it is worth may change while it is here.
    slots = buffer.add(episodes([6.0, 3.0], 2), np.array([0.0, 0.0, 7.0, 6.0, 5.0]), np.array([False, True]))
    assert (slots >= 0).all()
    assert buffer.born.tolist() == [1, 2, 3, 4]
    assert buffer.best().tolist() == [1]
    assert buffer.opens.tolist() == [False, False, False, True]
    assert buffer.episode_returns.tolist() == [9, 9, 6, 3]
    other = EpisodeBuffer(None, 4, 1)
    other.load(buffer.state(), buffer.trajectories)
    assert (other.best().tolist(), other.opens.tolist()) == ([1], [False, False, False, True])
    assert other.episode_returns.tolist() == [9, 9, 6, 3]
    # A checkpoint from before segments: by return, all of them episodes.
    other.load(
        {k: v for k, v in buffer.state().items() if k not in ("worth", "opens", "episode_returns")}, buffer.trajectories
    )
    assert (other.best().tolist(), other.opens.all()) == ([2], True)
    assert other.episode_returns.tolist() == buffer.trajectories.returns.tolist()
    other.load({k: v for k, v in buffer.state().items() if k != "episode_returns"}, buffer.trajectories)
    assert np.isnan(other.episode_returns).all()
