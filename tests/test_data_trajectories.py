"""Packed episode storage."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_fast.data import Trajectories
from gac_fast.errors import DataError


def make(lengths: list[int], seed: int = 0, **changes: Any) -> Trajectories:
    rng = np.random.default_rng(seed)
    n_steps = sum(lengths)
    fields = {
        "observations": rng.normal(size=(n_steps, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n_steps, 2)).astype(np.float32),
        "cu_seqlens": np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(lengths, np.int64))]),
        "returns": rng.normal(size=len(lengths)),
        "complete": np.ones(len(lengths), np.bool_),
        "action_low": np.full(2, -1, np.float32),
        "action_high": np.full(2, 1, np.float32),
    }
    return Trajectories(**{**fields, **changes})


def test_episodes_are_views_of_their_rows() -> None:
    data = make([2, 3, 1])
    assert (len(data), data.num_steps, data.obs_dim, data.act_dim) == (3, 6, 3, 2)
    np.testing.assert_array_equal(data.lengths, [2, 3, 1])
    episode = data.episode(1)
    assert np.shares_memory(episode.observations, data.observations)
    np.testing.assert_array_equal(episode.observations, data.observations[2:5])
    np.testing.assert_array_equal(episode.actions, data.actions[2:5])
    assert episode.episode_return == data.returns[1]
    np.testing.assert_array_equal(data.episode(-1).actions, data.actions[5:])
    assert [len(e.actions) for e in data] == [2, 3, 1]
    with pytest.raises(IndexError, match="episode 3 of 3"):
        data.episode(3)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8), picks=st.data())
@settings(max_examples=50, deadline=None)
def test_subset_holds_the_episodes_asked_for(lengths: list[int], picks: st.DataObject) -> None:
    data = make(lengths)
    indices = picks.draw(st.lists(st.integers(-len(lengths), len(lengths) - 1), min_size=1, max_size=10))
    subset = data.subset(indices)
    assert len(subset) == len(indices)
    for position, index in enumerate(indices):
        ours, theirs = subset.episode(position), data.episode(index)
        np.testing.assert_array_equal(ours.observations, theirs.observations)
        np.testing.assert_array_equal(ours.actions, theirs.actions)
        assert ours.episode_return == theirs.episode_return


def test_subset_by_mask_copies() -> None:
    data = make([2, 3, 1], complete=np.array([True, False, True]))
    kept = data.subset(data.complete)
    np.testing.assert_array_equal(kept.lengths, [2, 1])
    assert kept.complete.all()
    assert not np.shares_memory(kept.observations, data.observations)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "at least one episode"),
        ([3], "episode numbers below 3, got 3"),
        ([0.5], "list of episode numbers"),
        (np.array([True, False]), r"boolean mask of shape \(3,\), got \(2,\)"),
    ],
)
def test_subset_refuses(indices: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make([2, 3, 1]).subset(indices)


def test_split_is_a_partition_and_follows_the_seed() -> None:
    data = make([1] * 20)
    train, held_out = data.split(0.25, seed=1)
    assert (len(train), len(held_out)) == (15, 5)
    np.testing.assert_array_equal(np.sort(np.concatenate([train.returns, held_out.returns])), np.sort(data.returns))
    np.testing.assert_array_equal(data.split(0.25, seed=1)[1].returns, held_out.returns)
    assert not np.array_equal(data.split(0.25, seed=2)[1].returns, held_out.returns)
    assert [len(part) for part in make([1, 1]).split(0.01, seed=0)] == [1, 1]
    with pytest.raises(DataError, match=r"between 0 and 1, got 1\.0"):
        data.split(1.0, seed=0)
    with pytest.raises(DataError, match="at least two episodes"):
        make([3]).split(0.5, seed=0)


def test_statistics_in_float64_of_complete_episodes() -> None:
    # A large offset with a small spread: float32 sums would lose the spread.
    rng = np.random.default_rng(0)
    observations = (1e4 + rng.normal(size=(200_000, 3))).astype(np.float32)
    complete = np.array([True, True, False])
    data = make([100_000, 60_000, 40_000], observations=observations, complete=complete)
    stats = data.statistics()
    np.testing.assert_allclose(stats.obs_mean, observations.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.obs_std, observations.astype(np.float64).std(0), rtol=1e-9)
    assert stats.return_mean == pytest.approx(data.returns[:2].mean())
    assert stats.return_std == pytest.approx(data.returns[:2].std())


def test_statistics_need_a_complete_episode() -> None:
    with pytest.raises(DataError, match="all 2 were cut"):
        make([1, 1], complete=np.zeros(2, np.bool_)).statistics()


def test_concatenate() -> None:
    first, second = make([2, 3], seed=0), make([4], seed=1)
    both = Trajectories.concatenate([first, second])
    np.testing.assert_array_equal(both.lengths, [2, 3, 4])
    np.testing.assert_array_equal(both.episode(2).observations, second.observations)
    np.testing.assert_array_equal(both.returns, [*first.returns, *second.returns])
    with pytest.raises(DataError, match="equal action bounds"):
        Trajectories.concatenate([first, dataclasses.replace(second, action_high=np.full(2, 2, np.float32))])
    with pytest.raises(DataError, match=r"\(3, 2\) in every part, part 1 has \(5, 2\)"):
        Trajectories.concatenate(
            [first, dataclasses.replace(second, observations=np.zeros((second.num_steps, 5), np.float32))]
        )
    with pytest.raises(DataError, match="at least one"):
        Trajectories.concatenate([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((6, 3))}, "observations: expected a 2-dimensional float32 array, got .* float64"),
        ({"observations": np.zeros((5, 3), np.float32)}, r"observations: expected shape \(6, 3\).* got \(5, 3\)"),
        ({"actions": [[0.0, 0.0]] * 6}, "actions: expected a 2-dimensional float32 array, got list"),
        ({"cu_seqlens": np.array([0, 2, 5, 7])}, "cu_seqlens: expected to run from 0 to 6, got 0 to 7"),
        ({"cu_seqlens": np.array([0, 2, 2, 6])}, "at least one step in every episode, episode 1 has 0"),
        ({"cu_seqlens": np.array([0, 6])}, r"cu_seqlens: expected shape \(4,\)"),
        ({"returns": np.zeros((3, 1))}, "returns: expected a 1-dimensional float64 array"),
        ({"complete": np.ones(2, np.bool_)}, r"complete: expected shape \(3,\).* got \(2,\)"),
        (
            {"rewards": np.zeros((6, 1), np.float32)},
            r"rewards: expected a float32 array of shape \(6,\), got .*\(6, 1\)",
        ),
        ({"action_low": np.zeros(3, np.float32)}, r"action_low: expected shape \(2,\).* got \(3,\)"),
    ],
)
def test_construction_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make([2, 3, 1], **changes)


def test_repr_tells_what_was_cut() -> None:
    text = repr(make([2, 3], complete=np.array([True, False]), env_id="Hopper-v5"))
    assert "2 episodes, 5 steps" in text
    assert "1 cut" in text
    assert "Hopper-v5" in text


def test_segments_have_the_returns_from_their_first_step() -> None:
    rewards = np.arange(13, dtype=np.float32) + 1
    data = make([7, 1, 5], rewards=rewards, complete=np.array([True, True, False]))
    parts, episode = data.segments(3)
    # 7 steps make 2 parts of 3 and 4, 5 steps round(5 / 3) = 2 of 2 and 3.
    assert parts.cu_seqlens.tolist() == [0, 3, 7, 8, 10, 13]
    assert episode.tolist() == [0, 0, 1, 2, 2]
    assert parts.returns.tolist() == [rewards[:7].sum(), rewards[3:7].sum(), 8, rewards[8:].sum(), rewards[10:].sum()]
    assert parts.complete.tolist() == [True, True, True, False, False]
    assert np.shares_memory(parts.observations, data.observations)
    # All of an episode's reward at its end: every part has all of it.
    late = make([7], rewards=np.array([0, 0, 0, 0, 0, 0, 5], np.float32))
    assert late.segments(3)[0].returns.tolist() == [5, 5]
    with pytest.raises(DataError, match="at least 1 step, got 0"):
        data.segments(0)
    with pytest.raises(DataError, match="keep_rewards=True"):
        make([7]).segments(3)
