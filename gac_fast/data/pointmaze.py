"""PointMaze episodes of a noisy way-point controller, on real physics.

The controller heads for a random free cell along a shortest path over cells: its action is
``10 (centre of the next cell - position) - velocity + 0.5 N(0, I)``, clipped to [-1, 1], and once within 0.4 m of the
cell it heads for another. The environment's fixed goal plays no part in that, so most returns are low and a few high.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gac_fast.data.trajectories import Trajectories
from gac_fast.envs.mazes import MazeSpec, maze_spec
from gac_fast.errors import DataError

__all__ = [
    "PointMazeEpisodes",
    "generate_pointmaze",
    "make_pointmaze_dataset",
    "reference_returns",
    "save_pointmaze_minari",
]

# Episodes stepped in lockstep. Part of the definition of the data: random numbers are drawn per group of this size.
_GROUP = 2048
_GAIN = 10.0
_NOISE = 0.5
_ARRIVED = 0.4


class PointMazeEpisodes(NamedTuple):
    """What ``generate_pointmaze`` returns: all that a dataset on disk needs."""

    trajectories: Trajectories
    rewards: npt.NDArray[np.float32]
    """[N], reward of each step"""
    final_observations: npt.NDArray[np.float32]
    """[B, 4], after the last step of each episode"""


def generate_pointmaze(
    maze: str, episodes: int, seed: int = 0, n_threads: int | None = None, progress: bool = True
) -> PointMazeEpisodes:
    """Run the controller for ``episodes`` full episodes.

    Episode k of a seed is the same whatever ``episodes`` and ``n_threads``.

    Args:
        maze: 'umaze', 'medium' or 'large'.
        episodes: number of episodes, of 300, 600 or 800 steps.
        seed: of starts, goals and action noise.
        n_threads: threads for the physics; default one per CPU.
        progress: show a progress bar.

    Raises:
        EnvError: no such maze, or a package is missing.
        DataError: ``episodes`` or ``seed`` is out of range.
    """
    spec = maze_spec(maze)
    _check_counts(episodes, seed)
    horizon = spec.horizon
    observations = np.empty((episodes, horizon, 4), np.float32)
    actions = np.empty((episodes, horizon, 2), np.float32)
    rewards = np.empty((episodes, horizon), np.float32)
    final_observations = np.empty((episodes, 4), np.float32)

    with _progress_bar(episodes * horizon, f"PointMaze {spec.name}", progress) as bar:
        for rows, rng in _groups(episodes, seed):
            count = rows.stop - rows.start
            physics = _physics(spec, count, n_threads)
            physics.place(spec.start_positions(rng.random((_GROUP, 3))[:count]))
            controller = _Controller(spec, count, rng)
            for t in range(horizon):
                observations[rows, t] = physics.observations()
                action = controller.act(physics.position, physics.velocity)
                physics.step(action)
                actions[rows, t] = action
                rewards[rows, t] = physics.at_goal()
                bar.update(count)
            final_observations[rows] = physics.observations()

    trajectories = Trajectories(
        observations=observations.reshape(-1, 4),
        actions=actions.reshape(-1, 2),
        cu_seqlens=np.arange(episodes + 1, dtype=np.int64) * horizon,
        returns=rewards.sum(axis=1, dtype=np.float64),
        complete=np.ones(episodes, np.bool_),
        action_low=np.full(2, -1.0, np.float32),
        action_high=np.full(2, 1.0, np.float32),
        env_id=spec.env_id,
    )
    return PointMazeEpisodes(trajectories, rewards.reshape(-1), final_observations)


def reference_returns(
    maze: str, policy: str, episodes: int = 1024, seed: int = 0, n_threads: int | None = None
) -> npt.NDArray[np.float64]:
    """Returns [episodes] of a policy that defines the score: 'random' (0) or 'controller' (100).

    'random' acts uniformly in [-1, 1]; 'controller' goes to the environment's fixed goal without noise and stays.
    """
    spec = maze_spec(maze)
    _check_counts(episodes, seed)
    if policy not in ("random", "controller"):
        raise DataError(f"policy: expected 'random' or 'controller', got {policy!r}")
    returns = np.zeros(episodes)
    for rows, rng in _groups(episodes, seed):
        count = rows.stop - rows.start
        physics = _physics(spec, count, n_threads)
        physics.place(spec.start_positions(rng.random((_GROUP, 3))[:count]))
        controller = _Controller(spec, count, rng=None)
        for _ in range(spec.horizon):
            if policy == "random":
                action = 2.0 * rng.random((_GROUP, 2), dtype=np.float32)[:count] - 1.0
            else:
                action = controller.act(physics.position, physics.velocity)
            physics.step(action)
            returns[rows] += physics.at_goal()
    return returns


def make_pointmaze_dataset(
    maze: str,
    episodes: int,
    seed: int = 0,
    dataset_id: str | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> str:
    """Generate controller episodes and save them as a local Minari dataset.

    Args:
        dataset_id: Minari id; default 'pointmaze-<maze>-v0'.
        overwrite: replace a dataset of that id instead of refusing.

    Returns:
        The dataset id, for ``gac_fast.data.load``.

    Raises:
        DataError: the id exists or is malformed, or the disk is full. Nothing is left half-written.
    """
    spec = maze_spec(maze)
    dataset_id = dataset_id or f"pointmaze-{spec.name}-v0"
    # A refusal must come before the work, not after it.
    _dataset_path(dataset_id, overwrite)
    generated = generate_pointmaze(maze, episodes, seed, n_threads, progress)
    return save_pointmaze_minari(generated, dataset_id, seed=seed, overwrite=overwrite)


def save_pointmaze_minari(
    generated: PointMazeEpisodes, dataset_id: str, seed: int | None = None, overwrite: bool = False
) -> str:
    """Save generated episodes as a local Minari dataset, under a temporary name until it is whole.

    The HDF5 file has Minari's layout, but is written straight from the packed arrays, without a second copy as
    Minari's episode buffers.

    Args:
        seed: of the generation, noted in the description.

    Returns:
        ``dataset_id``.

    Raises:
        DataError: as ``make_pointmaze_dataset``.
    """
    import gymnasium
    import h5py
    from minari import MinariDataset
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces

    from gac_fast.data.scores import POINTMAZE_SCORE_EPISODES, reference_scores
    from gac_fast.envs.pointmaze import PointMazeVectorEnv

    trajectories, rewards, final_observations = generated
    assert trajectories.env_id is not None
    spec = maze_spec(trajectories.env_id)
    target = _dataset_path(dataset_id, overwrite)
    namespace = parse_dataset_id(dataset_id)[0]
    env = PointMazeVectorEnv(spec.name, 1, n_threads=1)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The leading dot hides an unfinished dataset from Minari's listing.
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            os.chmod(staging, 0o755)
            storage = MinariStorage.new(
                staging / "data",
                observation_space=env.single_observation_space,
                action_space=env.single_action_space,
                env_spec=gymnasium.spec(spec.env_id),
                data_format="hdf5",
            )
            path = staging / "data" / "main_data.hdf5"
            _check_space(path, _file_size(generated))
            with h5py.File(path, "w", track_order=True) as file:
                for i, episode in enumerate(trajectories):
                    start, stop = trajectories.cu_seqlens[i : i + 2]
                    length = int(stop - start)
                    group = file.create_group(f"episode_{i}")
                    group.attrs["id"] = i
                    group.attrs["total_steps"] = length
                    truncations = np.zeros(length, np.bool_)
                    truncations[-1] = True
                    group["observations"] = np.concatenate([episode.observations, final_observations[i : i + 1]])
                    group["actions"] = episode.actions
                    group["rewards"] = rewards[start:stop].astype(np.float64)
                    group["terminations"] = np.zeros(length, np.bool_)
                    group["truncations"] = truncations
            low, high = reference_scores(spec.env_id)
            storage.update_metadata(
                {
                    "dataset_id": dataset_id,
                    "minari_version": _minari_version(),
                    "total_steps": trajectories.num_steps,
                    "total_episodes": len(trajectories),
                    "dataset_size": storage.get_size(),
                    "algorithm_name": "noisy way-point controller",
                    "author": {"gac_fast"},
                    "description": f"PointMaze {spec.name}, noisy way-point controller to random cells, seed {seed}",
                    "requirements": ["gac_fast"],
                    "ref_min_score": low,
                    "ref_max_score": high,
                    "num_episodes_average_score": POINTMAZE_SCORE_EPISODES,
                }
            )
            MinariDataset(staging / "data")
            if namespace is not None and namespace not in list_local_namespaces():
                create_namespace(namespace)
            _replace_directory(staging, target, overwrite)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    # HDF5 reports a full disk as either, depending on when it finds out.
    except (OSError, RuntimeError) as error:
        raise DataError(f"dataset {dataset_id!r} could not be written to {target}: {error}") from error
    return dataset_id


class _Controller:
    """Way-point controller for ``count`` balls; with ``rng=None`` noiseless and bound for the environment's goal."""

    def __init__(self, spec: MazeSpec, count: int, rng: np.random.Generator | None) -> None:
        self._spec = spec
        self._rng = rng
        self._count = count
        self._goal = np.full(count, spec.goal_index) if rng is None else self._draw_goals(rng)

    def act(self, position: npt.NDArray[np.float64], velocity: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Actions [count, 2] for positions and velocities [count, 2]."""
        centres = self._spec.cell_centres
        if self._rng is not None:
            arrived = np.square(position - centres[self._goal]).sum(axis=1) < _ARRIVED**2
            # Drawn for all at every step, so that one ball's arrival does not shift the others' random numbers.
            np.copyto(self._goal, self._draw_goals(self._rng), where=arrived)
        cell = self._spec.nearest_free_cell(position)
        action = _GAIN * (centres[self._spec.next_cells[cell, self._goal]] - position) - velocity
        if self._rng is not None:
            action += _NOISE * self._rng.standard_normal((_GROUP, 2), dtype=np.float32)[: self._count]
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _draw_goals(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        return rng.integers(len(self._spec.free_cells), size=_GROUP)[: self._count]


def _groups(episodes: int, seed: int) -> Iterator[tuple[slice, np.random.Generator]]:
    """Rows and random stream of each group of episodes."""
    for number, start in enumerate(range(0, episodes, _GROUP)):
        stream = np.random.SeedSequence(seed, spawn_key=(number,))
        yield slice(start, min(start + _GROUP, episodes)), np.random.default_rng(stream)


def _physics(spec: MazeSpec, count: int, n_threads: int | None) -> Any:
    # Imported here: gymnasium and mujoco are not needed to load data.
    from gac_fast.envs.pointmaze import PointMazePhysics

    return PointMazePhysics(spec.name, count, n_threads)


def _progress_bar(total: int, label: str, show: bool) -> Any:
    from tqdm import tqdm

    # In a log file every redraw is a line.
    interval = 0.1 if sys.stderr.isatty() else 5.0
    return tqdm(total=total, desc=label, unit="step", unit_scale=True, mininterval=interval, disable=not show)


def _check_counts(episodes: int, seed: int) -> None:
    if episodes < 1:
        raise DataError(f"episodes: expected at least 1, got {episodes}")
    if seed < 0:
        raise DataError(f"seed: expected at least 0, got {seed}")


def _dataset_path(dataset_id: str, overwrite: bool) -> Path:
    """Where Minari keeps ``dataset_id``; refuses a malformed id, and an existing one unless ``overwrite``."""
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"dataset id {dataset_id!r}: expected the form (namespace/)name-v<number>, for example "
            f"'pointmaze-umaze-v0' ({error})"
        ) from None
    path = Path(get_dataset_path(dataset_id))
    if path.exists() and not overwrite:
        raise DataError(f"dataset {dataset_id!r} already exists at {path}: choose another id or ask to overwrite it")
    return path


def _replace_directory(source: Path, target: Path, overwrite: bool) -> None:
    """Rename ``source`` to ``target``; an old ``target`` goes away only once the new one is in place."""
    if target.exists() and overwrite:
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(old / "dataset")
        try:
            source.rename(target)
        except OSError:
            (old / "dataset").rename(target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    else:
        source.rename(target)


def _file_size(generated: PointMazeEpisodes) -> int:
    """Bytes of the HDF5 file, at most: per step the arrays, float64 rewards and two flags, per episode its headers."""
    trajectories = generated.trajectories
    steps = trajectories.observations.nbytes + trajectories.actions.nbytes + (8 + 2) * trajectories.num_steps
    return steps + generated.final_observations.nbytes + 4096 * len(trajectories) + 2**16


def _check_space(path: Path, size: int) -> None:
    """Raise ``OSError`` if ``path`` cannot grow to ``size`` bytes: when a write fails, HDF5 crashes the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(0)
    elif shutil.disk_usage(path).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _minari_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("minari")
