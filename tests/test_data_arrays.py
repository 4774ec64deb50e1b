"""Episodes from plain arrays, and how flat transitions are cut into episodes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from data_fixtures import flat_data
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_fast.data import from_arrays, from_episodes
from gac_fast.data.arrays import EpisodeSplit
from gac_fast.errors import DataError


def test_from_arrays_cuts_at_terminals_and_timeouts() -> None:
    data = flat_data([3, 4, 2])
    # The second episode ends by a timeout, and two more steps have no end at all.
    data["terminals"][6] = False
    data["timeouts"][6] = True
    data["terminals"][8] = False
    trajectories = from_arrays(**data, env_id="Hopper-v5", keep_rewards=True)
    np.testing.assert_array_equal(trajectories.rewards, data["rewards"])
    np.testing.assert_array_equal(trajectories.cu_seqlens, [0, 3, 7, 9])
    np.testing.assert_array_equal(trajectories.complete, [True, True, False])
    np.testing.assert_array_equal(trajectories.observations, data["observations"])
    expected = [float(np.cumsum(data["rewards"][a:b], dtype=np.float64)[-1]) for a, b in ((0, 3), (3, 7), (7, 9))]
    assert trajectories.returns.tolist() == expected
    np.testing.assert_array_equal(trajectories.action_high, [1, 1])


def test_from_arrays_says_how_many_episodes_were_cut(caplog: pytest.LogCaptureFixture) -> None:
    data = flat_data([3, 4, 2])
    with caplog.at_level(logging.WARNING):
        from_arrays(**data)
    assert not caplog.text
    # Timeouts after 3 and 2 steps, where another came after 4.
    data["terminals"][:], data["timeouts"][[2, 6, 8]] = False, True
    with caplog.at_level(logging.WARNING):
        trajectories = from_arrays(**data)
    assert trajectories.complete.tolist() == [False, True, False]
    assert "from_arrays: 2 of 3 episodes were cut" in caplog.text


def test_returns_are_added_in_step_order_in_float64() -> None:
    # Pairwise or float32 summation gives another last digit for these.
    data = flat_data([5000, 3000])
    data["rewards"] = np.random.default_rng(1).normal(size=8000) * 10.0 ** np.arange(8000) ** 0.1
    trajectories = from_arrays(**data)
    for i, rows in enumerate((slice(0, 5000), slice(5000, 8000))):
        total = 0.0
        for reward in data["rewards"][rows].tolist():
            total += reward
        assert trajectories.returns[i] == total


@given(
    flags=st.lists(st.sampled_from("....ttox"), min_size=1, max_size=60),
    blocks=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_split_by_blocks_equals_a_plain_loop(flags: list[str], blocks: list[int]) -> None:
    """'t' terminal, 'o' timeout, 'x' both."""
    terminals = np.array([flag in "tx" for flag in flags])
    timeouts = np.array([flag in "ox" for flag in flags])
    rewards = np.random.default_rng(len(flags)).normal(size=len(flags)).astype(np.float32)

    ends, returns, timed_out = [0], [], []
    total = 0.0
    for t, flag in enumerate(flags):
        total += float(rewards[t])
        if flag in "tox":
            ends.append(t + 1)
            returns.append(total)
            timed_out.append(flag == "o")
            total = 0.0
    lengths = np.diff(ends)
    limit = max((length for length, out in zip(lengths, timed_out, strict=True) if out), default=0)
    complete = [not (out and length < limit) for length, out in zip(lengths, timed_out, strict=True)]
    if ends[-1] != len(flags):
        ends.append(len(flags))
        returns.append(total)
        complete.append(False)

    split = EpisodeSplit()
    start = 0
    while start < len(flags):
        stop = start + blocks[start % len(blocks)]
        split.add(rewards[start:stop], terminals[start:stop], timeouts[start:stop])
        start = stop
    cu_seqlens, split_returns, split_complete = split.finish()
    assert cu_seqlens.tolist() == ends
    assert split_returns.tolist() == returns
    assert split_complete.tolist() == complete


def test_timeouts_short_of_the_time_limit_are_cuts() -> None:
    data = flat_data([5, 2, 5, 3])
    data["timeouts"] = data["terminals"].copy()
    data["terminals"][:] = False
    data["terminals"][-1] = True
    np.testing.assert_array_equal(from_arrays(**data).complete, [True, False, True, True])


def test_the_callers_arrays_stay_as_they_are() -> None:
    data = flat_data([4])
    data["actions"][0, 0] = 1 + 1e-6
    trajectories = from_arrays(**data)
    assert trajectories.actions[0, 0] == 1
    assert data["actions"][0, 0] > 1


def _with(name: str, value: Any) -> dict[str, Any]:
    data: dict[str, Any] = flat_data([3, 4])
    if callable(value):
        value(data[name])
    else:
        data[name] = value
    return data


def _set(index: Any, value: float) -> Any:
    return lambda array: array.__setitem__(index, value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            _with("observations", _set((5, 1), np.nan)),
            r"observations: expected finite numbers, got nan at index \[5, 1\]",
        ),
        (_with("rewards", _set(2, np.inf)), r"rewards: expected finite numbers, got inf at index \[2\]"),
        (_with("actions", _set((6, 0), -np.inf)), r"actions: expected finite numbers, got -inf at index \[6, 0\]"),
        (_with("actions", _set((4, 1), 1.5)), r"actions: expected values from -1 to 1, got 1\.5 at index \[4, 1\]"),
        (_with("actions", np.zeros((6, 2))), r"actions: expected shape \(7, 2\) to fit observations, got \(6, 2\)"),
        (_with("rewards", np.zeros((7, 1))), r"rewards: expected shape \(7,\) .* got \(7, 1\)"),
        (_with("terminals", np.full(7, 0.5)), "terminals: expected booleans or zeros and ones"),
        (_with("observations", np.zeros(7)), r"observations: expected 2 dimensions .* got shape \(7,\)"),
        (_with("observations", [["a"] * 3] * 7), "observations: expected an array of numbers"),
        ({name: value[:0] for name, value in flat_data([1]).items()}, "at least one step, got none"),
    ],
)
def test_from_arrays_refuses(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_arrays(**data)


def test_action_bounds_are_the_environments_or_given() -> None:
    data = flat_data([4])
    data["actions"] *= 3
    np.testing.assert_array_equal(from_arrays(**data, action_bounds=(-3, 3)).action_low, [-3, -3])
    data = flat_data([4], obs_dim=4, act_dim=1)
    data["actions"] *= 3
    assert from_arrays(**data, env_id="InvertedPendulum-v5").action_high.tolist() == [3]
    with pytest.raises(DataError, match=r"expected 1 values or one, got shapes \(2,\) and \(\)"):
        from_arrays(**data, action_bounds=([-1, -1], 1))
    with pytest.raises(DataError, match="finite low < high"):
        from_arrays(**data, action_bounds=(1, -1))


def _episode(length: int, **changes: Any) -> dict[str, Any]:
    data = flat_data([length])
    return {"observations": data["observations"], "actions": data["actions"], "rewards": data["rewards"], **changes}


def test_from_episodes_with_rewards_or_only_returns() -> None:
    first = _episode(3)
    without_rewards = {**_episode(2), "episode_return": 7.5, "complete": False}
    del without_rewards["rewards"]
    with_final = _episode(4)
    with_final["observations"] = np.concatenate([with_final["observations"], np.zeros((1, 3))])
    trajectories = from_episodes([first, without_rewards, with_final], env_id="Hopper-v5")
    np.testing.assert_array_equal(trajectories.lengths, [3, 2, 4])
    assert trajectories.returns[1] == 7.5
    np.testing.assert_array_equal(trajectories.complete, [True, False, True])
    np.testing.assert_array_equal(trajectories.episode(2).observations, _episode(4)["observations"])
    with pytest.raises(DataError, match=r"episode 1: expected 'rewards', which are to be kept, got .*'episode_return'"):
        from_episodes([first, without_rewards], keep_rewards=True)


def _without(name: str) -> dict[str, Any]:
    episode = _episode(2)
    del episode[name]
    return episode


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (_without("actions"), "episode 1 has no 'actions', only 'observations', 'rewards'"),
        (_without("rewards"), "episode 1: expected either 'rewards' or 'episode_return'"),
        (_episode(2, actions=np.zeros((0, 2)), observations=np.zeros((0, 3)), rewards=[]), "episode 1 is empty"),
        (_episode(2, observations=np.zeros((4, 3))), "episode 1: observations: expected 2 or 3 rows .* got 4"),
        (_episode(2, observations=np.zeros((2, 5))), r"expected \(obs_dim, act_dim\) = \(3, 2\) .* got \(5, 2\)"),
        (_episode(2, rewards=[0.0]), r"episode 1: rewards: expected shape \(2,\), got \(1,\)"),
        (_episode(2, actions=[[0, 0], [0, np.nan]]), r"episode 1: actions: .* nan at index \[1, 1\]"),
        (_episode(2, actions=[[0, 0], [0, 2]]), r"episode 1: actions: .* got 2 at index \[1, 1\]"),
        ({**_without("rewards"), "episode_return": np.nan}, "episode 1: episode_return: expected a finite number"),
    ],
)
def test_from_episodes_refuses(episode: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_episodes([_episode(3), episode])


def test_from_episodes_refuses_nothing_at_all() -> None:
    with pytest.raises(DataError, match="at least one episode, got none"):
        from_episodes([])
