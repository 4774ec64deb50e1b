"""Files in D4RL layout."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from data_fixtures import CUT_EPISODES, CUTS, flat_data, full_data, write_d4rl
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_fast.data import load, normalized_score
from gac_fast.data.d4rl import _add_time_limit, load_d4rl
from gac_fast.errors import DataError


@pytest.mark.parametrize("name", sorted(CUT_EPISODES))
def test_cut_files_load(name: str) -> None:
    path = CUTS / f"{name}-cut.hdf5"
    trajectories = load(path)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(trajectories.observations, file["observations"][:])
        np.testing.assert_array_equal(trajectories.actions, file["actions"][:])
        rewards, done = file["rewards"][:], file["terminals"][:] | file["timeouts"][:]
    assert len(trajectories) == CUT_EPISODES[name]
    np.testing.assert_array_equal(trajectories.cu_seqlens[1:] - 1, np.flatnonzero(done))
    for i, (start, stop) in enumerate(zip(trajectories.cu_seqlens[:-1], trajectories.cu_seqlens[1:], strict=True)):
        assert trajectories.returns[i] == sum(rewards[start:stop].tolist())
    assert trajectories.complete.all()
    assert trajectories.env_id == ("Hopper-v5" if name.startswith("hopper") else "HalfCheetah-v5")


@pytest.mark.parametrize(
    ("name", "episodes", "steps", "mean", "std", "best", "score"),
    [
        ("hopper-medium", 588, 300_018, 1613, 331, 2828, 50.2),
        ("hopper-medium-replay", 1320, 179_971, 340, 326, 2176, 11.1),
        ("halfcheetah-medium", 300, 300_000, 4979, 73, 5175, 42.4),
        ("halfcheetah-medium-replay", 210, 210_000, 2905, 1764, 4964, 25.7),
    ],
)
def test_full_files_match_their_published_table(
    name: str, episodes: int, steps: int, mean: float, std: float, best: float, score: float
) -> None:
    trajectories = load(full_data() / f"{name}.hdf5")
    assert (len(trajectories), trajectories.num_steps) == (episodes, steps)
    assert trajectories.complete.all()
    stats = trajectories.statistics()
    assert (round(stats.return_mean), round(stats.return_std)) == (mean, std)
    assert round(trajectories.returns.max()) == best
    assert trajectories.env_id is not None
    assert round(normalized_score(trajectories.env_id, stats.return_mean), 1) == score


def test_d4rls_own_v2_layout(tmp_path: Path) -> None:
    """next_observations and groups are ignored, the name tells the environment, other types are converted."""
    data = flat_data([3, 4], obs_dim=11, act_dim=3)
    extra = {
        "next_observations": np.zeros((7, 11)),
        "infos/qpos": np.zeros((7, 5)),
        "metadata/algorithm": "SAC",
        "metadata/policy/fc0/weight": np.zeros((2, 2)),
    }
    wide = {
        **data,
        "observations": data["observations"].astype(np.float64),
        "terminals": data["terminals"].astype(np.uint8),
    }
    trajectories = load(write_d4rl(tmp_path / "hopper_medium-v2.hdf5", {**wide, **extra}))
    assert trajectories.env_id == "Hopper-v4"
    np.testing.assert_array_equal(trajectories.lengths, [3, 4])
    np.testing.assert_array_equal(trajectories.observations, data["observations"])


def test_an_unfinished_last_episode_is_kept_as_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = flat_data([3, 4, 5])
    data["terminals"][-1] = False
    with caplog.at_level(logging.WARNING):
        trajectories = load(write_d4rl(tmp_path / "a.hdf5", data))
    np.testing.assert_array_equal(trajectories.lengths, [3, 4, 5])
    np.testing.assert_array_equal(trajectories.complete, [True, True, False])
    assert "1 of 3 episodes were cut" in caplog.text


def test_nothing_is_said_when_nothing_was_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(write_d4rl(tmp_path / "a.hdf5", flat_data([3, 4])))
    assert not caplog.text


def test_without_timeouts_a_horizon_cuts(tmp_path: Path) -> None:
    data = flat_data([2, 7])
    del data["timeouts"]
    path = write_d4rl(tmp_path / "a.hdf5", data)
    np.testing.assert_array_equal(load(path).lengths, [2, 7])
    trajectories = load(path, horizon=3)
    np.testing.assert_array_equal(trajectories.lengths, [2, 3, 3, 1])
    # The last one ends in the file's terminal.
    assert trajectories.complete.all()


@given(
    flags=st.lists(st.sampled_from("......t"), min_size=1, max_size=40),
    horizon=st.integers(1, 9),
    block=st.integers(1, 12),
)
@settings(max_examples=200, deadline=None)
def test_time_limit_by_blocks_equals_a_plain_loop(flags: list[str], horizon: int, block: int) -> None:
    terminals = np.array([flag == "t" for flag in flags])
    expected, age = [], 0
    for terminal in terminals:
        age += 1
        expected.append(age == horizon)
        if terminal or age == horizon:
            age = 0
    got: list[bool] = []
    carried = 0
    for start in range(0, len(flags), block):
        part = terminals[start : start + block]
        limited, carried = _add_time_limit(part, np.zeros(len(part), np.bool_), horizon, carried)
        got += limited.tolist()
    assert got == expected


# Maze2D v1


def maze2d_run(n_steps: int, seed: int = 0) -> dict[str, Any]:
    """One long run as D4RL stores it: rewards of the observation in the same row, timeouts at goal switches."""
    rng = np.random.default_rng(seed)
    data = flat_data([n_steps], obs_dim=4, act_dim=2)
    data["terminals"][:] = False
    at_goal = rng.random(n_steps) < 0.3
    data["rewards"] = at_goal.astype(np.float32)
    data["timeouts"] = rng.random(n_steps) < 0.02
    data["infos/goal"] = rng.normal(size=(n_steps, 2)).astype(np.float32)
    return data


def test_maze2d_is_cut_at_the_horizon_and_its_rewards_moved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = maze2d_run(2 * 300 + 51)
    with caplog.at_level(logging.WARNING):
        trajectories = load(write_d4rl(tmp_path / "maze2d-umaze-sparse-v1.hdf5", data))
    assert trajectories.env_id == "maze2d-umaze-v1"
    # 651 rows hold 650 rewarded steps: the reward of step t is that of the observation after it.
    np.testing.assert_array_equal(trajectories.lengths, [300, 300, 50])
    np.testing.assert_array_equal(trajectories.complete, [True, True, False])
    np.testing.assert_array_equal(trajectories.observations, data["observations"][:-1])
    at_goal = data["rewards"]
    expected = [at_goal[1:301].sum(), at_goal[301:601].sum(), at_goal[601:].sum()]
    np.testing.assert_array_equal(trajectories.returns, expected)
    assert expected != [at_goal[:300].sum(), at_goal[300:600].sum(), at_goal[600:650].sum()], "a shift must show"
    assert "1 of 3 episodes were cut" in caplog.text


def test_rewards_of_steps_are_kept_where_asked_for_and_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same rules as the returns: each the first return to go of its episode, Maze2D's moved up by one."""
    monkeypatch.setattr("gac_fast.data.d4rl.BLOCK_ROWS", 7)
    maze = maze2d_run(651)
    for path, rewards in (
        (write_d4rl(tmp_path / "maze2d-umaze-sparse-v1.hdf5", maze), maze["rewards"][1:]),
        (CUTS / "hopper-medium-replay-cut.hdf5", None),
    ):
        assert load(path).rewards is None
        kept = load(path, keep_rewards=True)
        assert kept.rewards is not None
        if rewards is not None:
            np.testing.assert_array_equal(kept.rewards, rewards)
        to_go = kept.returns_to_go()
        np.testing.assert_allclose(to_go[kept.cu_seqlens[:-1]], kept.returns, rtol=1e-12)
        np.testing.assert_array_equal(to_go[kept.cu_seqlens[1:] - 1], kept.rewards[kept.cu_seqlens[1:] - 1])
        picked = kept.subset([1, 0])
        np.testing.assert_array_equal(picked.returns_to_go()[: picked.lengths[0]], to_go[slice(*kept.cu_seqlens[1:3])])
        joined = kept.concatenate([kept, picked])
        np.testing.assert_array_equal(joined.returns_to_go()[-len(picked.returns_to_go()) :], picked.returns_to_go())
        assert kept.concatenate([kept, load(path)]).rewards is None


@pytest.mark.parametrize(
    ("file", "attributes", "options", "lengths"),
    [
        ("run.hdf5", {"env_id": "maze2d-medium-v1"}, {}, [600, 50]),
        ("run.hdf5", {}, {"env_id": "maze2d-medium-dense-v1"}, [600, 50]),
        ("run.hdf5", {}, {"horizon": 400}, [400, 250]),
        ("maze2d-large-sparse-v1.hdf5", {}, {}, [650]),
        ("umaze-of-mine.hdf5", {}, {"layout": "maze2d"}, [300, 300, 50]),
    ],
)
def test_maze2d_is_recognised(
    tmp_path: Path, file: str, attributes: dict[str, str], options: dict[str, Any], lengths: list[int]
) -> None:
    path = write_d4rl(tmp_path / file, maze2d_run(651), **attributes)
    np.testing.assert_array_equal(load(path, **options).lengths, lengths)


def test_maze2d_of_an_unknown_maze_needs_a_horizon(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected horizon=300"):
        load(write_d4rl(tmp_path / "run.hdf5", maze2d_run(651)))


def test_maze2d_rules_can_be_switched_off_and_leave_antmaze_alone(tmp_path: Path) -> None:
    data = maze2d_run(651)
    episodes = int(data["timeouts"].sum()) + (not data["timeouts"][-1])
    assert len(load(write_d4rl(tmp_path / "run.hdf5", data), layout="episodes")) == episodes
    data["observations"] = np.zeros((651, 29), np.float32)
    data["actions"] = np.zeros((651, 8), np.float32)
    assert len(load(write_d4rl(tmp_path / "ant.hdf5", data))) == episodes


# Bad files


def _path(tmp_path: Path, **changes: Any) -> Path:
    data: dict[str, Any] = {**flat_data([3, 4]), **changes}
    return write_d4rl(tmp_path / "bad.hdf5", {name: value for name, value in data.items() if value is not None})


def _poked(name: str, index: Any, value: float) -> np.ndarray:
    array = flat_data([3, 4])[name].astype(np.float64)
    array[index] = value
    return array


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"bad\.hdf5: expected a dataset '{name}', the file holds "):
        load(_path(tmp_path, **{name: None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros(7)}, r"observations: expected shape \[N, dim\], got \(7,\)"),
        ({"actions": np.zeros((7, 0))}, r"actions: expected shape \[N, dim\], got \(7, 0\)"),
        ({"actions": np.zeros((6, 2))}, "actions: expected 7 rows as in observations, got 6"),
        ({"rewards": np.zeros((7, 1))}, r"rewards: expected shape \[N\], got \(7, 1\)"),
        ({"terminals": np.zeros(8)}, "terminals: expected 7 rows as in observations, got 8"),
        ({"timeouts": np.zeros(3)}, "timeouts: expected 7 rows as in observations, got 3"),
        (
            {"observations": None, "observations/position": np.zeros((7, 2))},
            "observations: expected a dataset, got a group",
        ),
        ({"observations": np.array([b"text"] * 7)[:, None]}, r"observations: expected numbers, got \|S4"),
        ({"terminals": np.full(7, 2)}, "terminals: expected booleans or zeros and ones"),
        ({"observations": _poked("observations", (5, 2), np.nan)}, r"observations: .* got nan at index \[5, 2\]"),
        ({"observations": _poked("observations", (1, 0), 1e300)}, r"observations: .* got inf at index \[1, 0\]"),
        ({"rewards": _poked("rewards", 6, -np.inf)}, r"rewards: .* got -inf at index \[6\]"),
        ({"actions": _poked("actions", (2, 1), np.nan)}, r"actions: .* got nan at index \[2, 1\]"),
        (
            {"actions": _poked("actions", (3, 0), -1.25)},
            r"actions: expected values from -1 to 1, got -1\.25 at index \[3, 0\]",
        ),
        (
            {name: value[:0] for name, value in flat_data([1]).items()},
            "observations: expected at least one step, the file is empty",
        ),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = _path(tmp_path, **changes)
    with pytest.raises(DataError, match=rf"bad\.hdf5: {message}"):
        load(path)


def test_bad_values_are_named_in_later_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gac_fast.data.arrays.BLOCK_ROWS", 2)
    monkeypatch.setattr("gac_fast.data.d4rl.BLOCK_ROWS", 2)
    for name, index in (("observations", (5, 2)), ("actions", (5, 1)), ("rewards", (5,))):
        with pytest.raises(DataError, match=rf"{name}: .* nan at index \[{', '.join(map(str, index))}\]"):
            load(_path(tmp_path, **{name: _poked(name, index, np.nan)}))


def test_other_action_bounds_can_be_given(tmp_path: Path) -> None:
    path = _path(tmp_path, actions=_poked("actions", (3, 0), -1.25))
    trajectories = load(path, action_bounds=(-2, 2))
    assert trajectories.actions[3, 0] == -1.25
    np.testing.assert_array_equal(trajectories.action_low, [-2, -2])


def test_not_an_hdf5_file(tmp_path: Path) -> None:
    path = tmp_path / "text.hdf5"
    path.write_text("observations, actions\n")
    with pytest.raises(DataError, match=r"text\.hdf5: expected an intact HDF5 file.*signature not found"):
        load(path)
    with pytest.raises(DataError, match=r"none\.hdf5: expected an HDF5 file, found no such file"):
        load(tmp_path / "none.hdf5")
    with pytest.raises(DataError, match="found a folder"):
        load(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "short.hdf5"
    whole = (CUTS / "hopper-medium-cut.hdf5").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"short\.hdf5: expected an intact HDF5 file.*truncated"):
        load(path)


def test_a_damaged_block(tmp_path: Path) -> None:
    path = tmp_path / "flipped.hdf5"
    shutil.copy(CUTS / "hopper-medium-cut.hdf5", path)
    with h5py.File(path) as file:
        block = file["observations"].id.get_chunk_info(0)
    damaged = bytearray(path.read_bytes())
    start = block.byte_offset + 16
    damaged[start : start + 32] = bytes(255 - byte for byte in damaged[start : start + 32])
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"flipped\.hdf5: expected an intact HDF5 file, but it cannot be read"):
        load(path)


def test_options_are_checked(tmp_path: Path) -> None:
    path = _path(tmp_path)
    with pytest.raises(DataError, match="layout: expected 'auto', 'episodes' or 'maze2d', got 'maze3d'"):
        load(path, layout="maze3d")
    with pytest.raises(DataError, match="horizon: expected at least 1, got 0"):
        load(path, horizon=0)
    with pytest.raises(DataError, match=r"options of a D4RL file \(layout, .*\), got observation_key"):
        load(path, observation_key="observation")
    trajectories = load_d4rl(path)
    assert load(trajectories) is trajectories
    with pytest.raises(DataError, match="expected a file, a Minari dataset id or Trajectories, got 3"):
        load(3)  # type: ignore[arg-type]


MEMORY_PROBE = """
import sys
from gac_fast.data.d4rl import load_d4rl
import h5py

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

load_d4rl(sys.argv[2])
before = status("VmRSS")
held = load_d4rl(sys.argv[1])
print((status("VmHWM") - before) / (held.observations.nbytes + held.actions.nbytes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_memory_stays_within_a_fifth_of_the_data(tmp_path: Path, dtype: type) -> None:
    """Peak resident memory of loading, over the float32 size of observations and actions."""
    n_steps = 600_000
    rng = np.random.default_rng(0)
    path = tmp_path / "large.hdf5"
    with h5py.File(path, "w") as file:
        for name, dim in (("observations", 17), ("actions", 6)):
            file.create_dataset(name, data=rng.uniform(-1, 1, (n_steps, dim)).astype(dtype), compression="lzf")
        file.create_dataset("rewards", data=rng.random(n_steps).astype(dtype), chunks=True)
        ends = np.arange(1, n_steps + 1) % 1000 == 0
        file.create_dataset("terminals", data=np.zeros(n_steps, np.bool_), chunks=True)
        file.create_dataset("timeouts", data=ends, chunks=True)
    # A first, small load brings in what is imported or allocated only once.
    command = [sys.executable, "-c", MEMORY_PROBE, str(path), str(CUTS / "hopper-medium-cut.hdf5")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    ratio = float(result.stdout)
    assert 0.9 < ratio <= 1.2
