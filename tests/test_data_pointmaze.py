"""PointMaze controller data, and how it is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest

from gac_fast.data import load
from gac_fast.data import pointmaze as data_pointmaze
from gac_fast.data.pointmaze import generate_pointmaze, make_pointmaze_dataset, save_pointmaze_minari
from gac_fast.envs import maze_spec
from gac_fast.envs.pointmaze import PointMazeVectorEnv
from gac_fast.errors import DataError, EnvError

# Minari advises to fill in author, description and so on.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Minari root of its own for every test."""
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


@pytest.mark.parametrize("maze", ["umaze", "medium", "large"])
def test_the_environment_reproduces_the_data(maze: str) -> None:
    """Playing the recorded actions from the recorded starts gives the recorded observations and rewards."""
    trajectories, rewards, final = generate_pointmaze(maze, 6, seed=3, progress=False)
    horizon = maze_spec(maze).horizon
    assert (trajectories.lengths == horizon).all()
    assert trajectories.complete.all()
    observations = trajectories.observations.reshape(6, horizon, 4)
    actions = trajectories.actions.reshape(6, horizon, 2)
    env = PointMazeVectorEnv(maze, 6)
    # Starts are float64 in the generator; from their float32 rounding, contacts keep the two within 1e-3.
    env.set_state(observations[:, 0, :2])
    np.testing.assert_array_equal(observations[:, 0, 2:], 0)
    total = np.zeros(6)
    for t in range(horizon):
        after, reward, _, truncated, _ = env.step(actions[:, t])
        recorded = observations[:, t + 1] if t + 1 < horizon else final
        np.testing.assert_allclose(after, recorded, atol=1e-3)
        total += reward
    assert truncated.all()
    np.testing.assert_array_equal(trajectories.returns, rewards.reshape(6, horizon).sum(1, dtype=np.float64))
    np.testing.assert_allclose(total, trajectories.returns, atol=1)


def test_actions_follow_the_formula() -> None:
    """Recomputed from the observations, noise apart: the way-point is the next cell of a path to some goal."""
    spec = maze_spec("umaze")
    trajectories = generate_pointmaze("umaze", 256, seed=0, progress=False).trajectories
    position = trajectories.observations[:, :2].astype(np.float64)
    velocity = trajectories.observations[:, 2:].astype(np.float64)
    cell = spec.nearest_free_cell(position)
    # The way-point is unknown, but is one of the cells next to this one; take the one that explains the action best.
    noise = np.full(len(cell), np.inf)
    for candidate in range(len(spec.free_cells)):
        reachable = np.abs(spec.free_cells[cell] - spec.free_cells[candidate]).sum(1) <= 1
        wanted = 10 * (spec.cell_centres[candidate] - position) - velocity
        inside = (np.abs(trajectories.actions) < 1).all(1) & reachable
        residual = np.where(inside, np.abs(trajectories.actions - wanted).max(1), np.inf)
        noise = np.minimum(noise, residual)
    explained = noise[np.isfinite(noise)]
    assert len(explained) > 1000
    # max of two |0.5 N(0, 1)|: median 0.5 * 1.0519; taking the best of up to three cells biases it down a little.
    assert 0.45 < np.median(explained) < 0.55
    assert np.abs(trajectories.actions).max() == 1


def test_goals_are_random_cells_and_change_on_arrival() -> None:
    """Every cell is visited about equally at its centre, so goals are neither stuck nor only the reward's."""
    spec = maze_spec("umaze")
    trajectories = generate_pointmaze("umaze", 256, seed=1, progress=False).trajectories
    near = np.linalg.norm(trajectories.observations[:, None, :2] - spec.cell_centres, axis=-1) < 0.4
    share = near.any(0) & (near.mean(0) > 0.02)
    assert share.all()
    assert 20 < trajectories.returns.mean() < 30


def test_episode_k_is_the_same_whatever_the_count_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_pointmaze, "_GROUP", 4)
    many = generate_pointmaze("umaze", 10, seed=5, n_threads=2, progress=False)
    few = generate_pointmaze("umaze", 6, seed=5, n_threads=1, progress=False)
    for ours, theirs in zip(few.trajectories, many.trajectories.subset(range(6)), strict=True):
        np.testing.assert_array_equal(ours.observations, theirs.observations)
        np.testing.assert_array_equal(ours.actions, theirs.actions)
    np.testing.assert_array_equal(few.final_observations, many.final_observations[:6])
    other = generate_pointmaze("umaze", 6, seed=6, progress=False)
    assert not np.array_equal(other.trajectories.observations, few.trajectories.observations)
    # Groups must not repeat each other.
    starts = many.trajectories.observations[many.trajectories.cu_seqlens[:-1]]
    assert len(np.unique(starts, axis=0)) == 10


def test_arguments_are_checked() -> None:
    with pytest.raises(EnvError, match="maze: expected one of umaze, medium, large, got 'tiny'"):
        generate_pointmaze("tiny", 1)
    with pytest.raises(DataError, match="episodes: expected at least 1, got 0"):
        generate_pointmaze("umaze", 0)
    with pytest.raises(DataError, match="seed: expected at least 0, got -1"):
        generate_pointmaze("umaze", 1, seed=-1)


def test_saved_as_minari_and_loaded_back() -> None:
    dataset_id = make_pointmaze_dataset("umaze", 5, seed=2, progress=False)
    assert dataset_id == "pointmaze-umaze-v0"
    expected, rewards, final = generate_pointmaze("umaze", 5, seed=2, progress=False)
    trajectories = load(dataset_id)
    np.testing.assert_array_equal(trajectories.observations, expected.observations)
    np.testing.assert_array_equal(trajectories.actions, expected.actions)
    np.testing.assert_array_equal(trajectories.returns, expected.returns)
    assert trajectories.complete.all()
    assert trajectories.env_id == "gac_fast/PointMaze-umaze-v0"

    dataset = minari.load_dataset(dataset_id)
    assert (dataset.total_episodes, dataset.total_steps) == (5, 1500)
    episode = dataset[4]
    np.testing.assert_array_equal(episode.observations[-1], final[4])
    np.testing.assert_array_equal(episode.rewards, rewards[-300:])
    assert episode.truncations.tolist() == [False] * 299 + [True]
    assert not episode.terminations.any()
    assert minari.get_normalized_score(dataset, np.array([240.36])) == pytest.approx(1.0)
    assert dataset.recover_environment().spec.max_episode_steps == 300


def test_minaris_own_writer_makes_the_same_dataset(datasets: Path) -> None:
    """Dataset by dataset: names, types and values; only chunking differs."""
    from minari.data_collector import EpisodeBuffer

    generated = generate_pointmaze("umaze", 2, seed=2, progress=False)
    save_pointmaze_minari(generated, "ours-v0")
    buffers = [
        EpisodeBuffer(
            observations=np.concatenate([episode.observations, generated.final_observations[i : i + 1]]),
            actions=episode.actions,
            rewards=generated.rewards[300 * i : 300 * (i + 1)].astype(np.float64),
            terminations=np.zeros(300, np.bool_),
            truncations=np.arange(300) == 299,
        )
        for i, episode in enumerate(generated.trajectories)
    ]
    minari.create_dataset_from_buffers("theirs-v0", buffers, env="gac_fast/PointMaze-umaze-v0")

    def contents(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def visit(key: str, item: Any) -> None:
            found[key] = (item.dtype, item[()].tolist()) if isinstance(item, h5py.Dataset) else dict(item.attrs)

        with h5py.File(datasets / name / "data" / "main_data.hdf5") as file:
            file.visititems(visit)
        return found

    assert contents("ours-v0") == contents("theirs-v0")
    ours, theirs = (minari.load_dataset(name).storage.metadata for name in ("ours-v0", "theirs-v0"))
    assert theirs.keys() <= ours.keys()
    for key in ("total_steps", "total_episodes", "data_format", "observation_space", "action_space", "env_spec"):
        assert ours[key] == theirs[key]


def test_an_existing_id_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    make_pointmaze_dataset("umaze", 2, dataset_id="mazes/mine-v0", progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(data_pointmaze, "generate_pointmaze", lambda *_: pytest.fail("generated before the check"))
        with pytest.raises(DataError, match="dataset 'mazes/mine-v0' already exists"):
            make_pointmaze_dataset("umaze", 3, dataset_id="mazes/mine-v0")
        with pytest.raises(DataError, match="dataset id 'mine': expected the form"):
            make_pointmaze_dataset("umaze", 3, dataset_id="mine")
    make_pointmaze_dataset("umaze", 3, dataset_id="mazes/mine-v0", overwrite=True, progress=False)
    assert len(load("mazes/mine-v0")) == 3


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != "namespace_metadata.json")


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwriting"])
def test_a_failed_write_leaves_nothing_half_written(
    datasets: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool
) -> None:
    if existing:
        make_pointmaze_dataset("umaze", 2, progress=False)
        before = load("pointmaze-umaze-v0").observations
    create_group = h5py.Group.create_group

    def failing(self: h5py.Group, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "episode_2":
            raise error
        return create_group(self, name, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(h5py.Group, "create_group", failing)
        expected = (
            pytest.raises(DataError, match=r"'pointmaze-umaze-v0' could not be written to .*No space left on device")
            if isinstance(error, OSError)
            else pytest.raises(KeyboardInterrupt)
        )
        with expected:
            make_pointmaze_dataset("umaze", 4, seed=1, overwrite=existing, progress=False)
    if existing:
        np.testing.assert_array_equal(load("pointmaze-umaze-v0").observations, before)
        assert len(_files(datasets)) == 2
        assert len(list(datasets.iterdir())) == 1
    else:
        assert not list(datasets.iterdir())


FULL_DISK = """
import resource, signal
from gac_fast.data.pointmaze import make_pointmaze_dataset
from gac_fast.errors import DataError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    make_pointmaze_dataset("umaze", 8, progress=False)
except DataError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_a_disk_that_fills_up_during_the_write(datasets: Path) -> None:
    """A real failure of the system, by a limit on the size of files; HDF5 would crash on it."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "MINARI_DATASETS_PATH": str(datasets)},
    )
    assert result.returncode == 0, result.stderr
    assert "could not be written" in result.stdout
    assert "File too large" in result.stdout
    assert not _files(datasets)


def test_the_space_checked_for_is_enough(datasets: Path) -> None:
    generated = generate_pointmaze("umaze", 40, progress=False)
    save_pointmaze_minari(generated, "sized-v0")
    size = (datasets / "sized-v0" / "data" / "main_data.hdf5").stat().st_size
    assert 0.6 * data_pointmaze._file_size(generated) < size <= data_pointmaze._file_size(generated)
