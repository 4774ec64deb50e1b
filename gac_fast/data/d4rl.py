"""Files in D4RL layout: flat transitions in HDF5, read without the ``d4rl`` package.

Needed are ``observations`` [N, obs_dim], ``actions`` [N, act_dim], ``rewards`` [N] and ``terminals`` [N]; ``timeouts``
[N] is used where present; ``next_observations`` and all groups (``infos``, ``metadata``) are ignored. The attribute
``env_id`` names the environment, or else the file name does.

Maze2D v1 is different: its file is one long run, its ``timeouts`` mark where the way-point controller was given a new
goal, and ``rewards[t]`` tells whether ``observations[t]``, rather than the observation after step t, is at the goal. So
timeouts are ignored, the run is cut into episodes of the environment's horizon, and rewards are moved up by one; the
last step, whose reward is unknown, is left off.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gac_fast.data.arrays import (
    BLOCK_ROWS,
    Bounds,
    EpisodeSplit,
    check_actions,
    check_finite,
    check_flags,
    resolve_bounds,
    warn_of_cuts,
)
from gac_fast.data.trajectories import Trajectories
from gac_fast.errors import DataError

__all__ = ["load_d4rl"]

# Bytes per dataset. HDF5 2 takes 8 MiB by default, of no use to a single pass in blocks of whole chunks.
_CHUNK_CACHE = 2**20

_MAZE2D_HORIZONS = {"umaze": 300, "medium": 600, "large": 800}


def load_d4rl(
    path: str | Path,
    *,
    layout: Literal["auto", "episodes", "maze2d"] = "auto",
    horizon: int | None = None,
    action_bounds: Bounds | None = None,
    env_id: str | None = None,
    keep_rewards: bool = False,
) -> Trajectories:
    """Read a file in D4RL layout.

    Episodes end at terminals and timeouts. An episode is marked as cut (``complete`` False) where the file ends inside
    it, or where it timed out before the longest timed-out episode, as replay files have it; one warning says how many.
    Memory stays near the size of the float32 observations and actions, whatever the file's types.

    Args:
        layout: 'episodes', or 'maze2d' for Maze2D v1 (see the module); 'auto' takes the latter for a file whose name or
            ``env_id`` says maze2d, or that holds ``infos/goal`` with the shapes of Maze2D.
        horizon: steps per episode; for 'maze2d' default 300, 600 or 800 by name, for 'episodes' it cuts episodes that
            reach it, which files without timeouts need.
        action_bounds: (low, high), scalars or [act_dim]; default those of the environment, or else -1 and 1.
        env_id: overrides the file's.
        keep_rewards: keep the reward of every step too, which nothing but a return to go needs.

    Raises:
        DataError: the file is missing, damaged, or not in this layout, or holds values that are not finite or actions
            out of bounds; the message names file, field, what was expected and what came.
    """
    import h5py

    path = Path(path)
    if layout not in ("auto", "episodes", "maze2d"):
        raise DataError(f"layout: expected 'auto', 'episodes' or 'maze2d', got {layout!r}")
    if horizon is not None and horizon < 1:
        raise DataError(f"horizon: expected at least 1, got {horizon}")
    if not path.is_file():
        raise DataError(f"{path}: expected an HDF5 file, found {'a folder' if path.is_dir() else 'no such file'}")
    try:
        with h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE) as file:
            return _Reader(path, file, layout, horizon, action_bounds, env_id, keep_rewards).read()
    # h5py reports damage as any of these, at opening or at the first read of a damaged block.
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{path}: expected an intact HDF5 file, but it cannot be read: {_reason(error)}") from error


class _Reader:
    def __init__(
        self,
        path: Path,
        file: Any,
        layout: str,
        horizon: int | None,
        action_bounds: Bounds | None,
        env_id: str | None,
        keep_rewards: bool,
    ) -> None:
        self._path = path
        self._file = file
        self._observations = self._field("observations", 2)
        self._actions = self._field("actions", 2)
        self._rewards = self._field("rewards", 1)
        self._terminals = self._field("terminals", 1)
        self._timeouts = self._field("timeouts", 1) if "timeouts" in file else None
        self._rows = len(self._observations)
        if self._rows == 0:
            raise DataError(f"{path}: observations: expected at least one step, the file is empty")
        for field in (self._actions, self._rewards, self._terminals, self._timeouts):
            if field is not None and len(field) != self._rows:
                raise DataError(
                    f"{path}: {field.name[1:]}: expected {self._rows} rows as in observations, got {len(field)}"
                )
        attribute = file.attrs.get("env_id")
        if isinstance(attribute, bytes):
            attribute = attribute.decode()
        self._env_id = env_id or attribute or _env_id_from_name(path.stem)
        self._bounds = action_bounds
        self._keep_rewards = keep_rewards
        self._kept: npt.NDArray[np.float32] | None = None
        self._maze2d = layout == "maze2d" or (layout == "auto" and self._looks_like_maze2d())
        self._horizon = self._maze2d_horizon(horizon) if self._maze2d else horizon

    def read(self) -> Trajectories:
        # Maze2D: the reward of the last step is that of an observation which the file does not hold.
        n_steps = self._rows - 1 if self._maze2d else self._rows
        if n_steps == 0:
            raise DataError(f"{self._path}: observations: expected at least two rows of a Maze2D run, got one")
        cu_seqlens, returns, complete = self._split(n_steps)
        low, high = resolve_bounds(self._bounds, self._env_id, self._actions.shape[1], str(self._path))
        observations = self._read_float32(self._observations, n_steps)
        check_finite(observations, f"{self._path}: observations")
        actions = self._read_float32(self._actions, n_steps)
        check_actions(actions, low, high, f"{self._path}: actions")
        trajectories = Trajectories(
            observations, actions, cu_seqlens, returns, complete, low, high, self._env_id, self._kept
        )
        warn_of_cuts(complete, str(self._path))
        return trajectories

    def _split(self, n_steps: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        split = EpisodeSplit()
        shift = 1 if self._maze2d else 0
        self._kept = np.empty(n_steps, np.float32) if self._keep_rewards else None
        age = 0
        for start in range(0, n_steps, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, n_steps)
            rewards = self._rewards[start + shift : stop + shift]
            check_finite(rewards, f"{self._path}: rewards", first_row=start + shift)
            terminals = check_flags(self._terminals[start:stop], f"{self._path}: terminals")
            if self._maze2d:
                timeouts = np.zeros(stop - start, np.bool_)
            elif self._timeouts is not None:
                timeouts = check_flags(self._timeouts[start:stop], f"{self._path}: timeouts")
            else:
                timeouts = np.zeros(stop - start, np.bool_)
            if self._horizon is not None:
                timeouts, age = _add_time_limit(terminals, timeouts, self._horizon, age)
            split.add(rewards, terminals, timeouts)
            if self._kept is not None:
                self._kept[start:stop] = rewards
        return split.finish()

    def _field(self, name: str, ndim: int) -> Any:
        import h5py

        if name not in self._file:
            raise DataError(
                f"{self._path}: expected a dataset {name!r}, the file holds {', '.join(self._file) or 'none'}"
            )
        field = self._file[name]
        if not isinstance(field, h5py.Dataset):
            raise DataError(f"{self._path}: {name}: expected a dataset, got a group of {', '.join(field) or 'nothing'}")
        if field.ndim != ndim or 0 in field.shape[1:]:
            expected = "[N, dim]" if ndim == 2 else "[N]"
            raise DataError(f"{self._path}: {name}: expected shape {expected}, got {field.shape}")
        if field.dtype.kind not in "biuf":
            raise DataError(f"{self._path}: {name}: expected numbers, got {field.dtype}")
        return field

    def _read_float32(self, field: Any, n_steps: int) -> npt.NDArray[np.float32]:
        """The first rows of ``field``; HDF5 converts other types on the way, in small pieces."""
        values = np.empty((n_steps, field.shape[1]), np.float32)
        # HDF5 plans a read with several KB per chunk, which adds up in one read of everything; blocks of whole chunks
        # decompress each of them once.
        chunk_rows = field.chunks[0] if field.chunks else 1
        block_rows = max(BLOCK_ROWS // chunk_rows, 1) * chunk_rows
        for start in range(0, n_steps, block_rows):
            rows = np.s_[start : min(start + block_rows, n_steps)]
            # A float64 beyond float32 becomes inf here, which the check that follows names.
            field.read_direct(values, rows, rows)
        return values

    def _looks_like_maze2d(self) -> bool:
        if "maze2d" in (self._env_id or "").lower() or "maze2d" in self._path.stem.lower():
            return True
        # AntMaze files hold infos/goal as well, but are cut properly.
        return "infos/goal" in self._file and self._observations.shape[1] == 4 and self._actions.shape[1] == 2

    def _maze2d_horizon(self, horizon: int | None) -> int:
        if horizon is not None:
            return horizon
        for name in (self._env_id or "", self._path.stem):
            match = re.search(r"umaze|medium|large", name.lower())
            if match:
                return _MAZE2D_HORIZONS[match.group()]
        raise DataError(
            f"{self._path}: this Maze2D run has to be cut into episodes of the environment's horizon, but neither its "
            "name nor env_id says which maze it is: expected horizon=300 (umaze), 600 (medium) or 800 (large)"
        )


def _add_time_limit(
    terminals: npt.NDArray[np.bool_], timeouts: npt.NDArray[np.bool_], horizon: int, age: int
) -> tuple[npt.NDArray[np.bool_], int]:
    """Timeouts [n] with an end after every ``horizon`` steps; ``age`` counts the steps of the running episode."""
    limited = timeouts.copy()
    ends = np.append(np.flatnonzero(terminals | timeouts), len(terminals) - 1)
    start = -age
    for end in ends:
        limited[np.arange(start + horizon - 1, end + 1, horizon)] = True
        if terminals[end] or timeouts[end]:
            start = int(end) + 1
    # Steps since the last end of any kind.
    done = np.flatnonzero(terminals | limited)
    remaining = len(terminals) - 1 - int(done[-1]) if len(done) else age + len(terminals)
    return limited, remaining


def _env_id_from_name(stem: str) -> str | None:
    """Environment that D4RL's own file names stand for, such as hopper_medium-v2 or maze2d-umaze-sparse-v1."""
    stem = stem.lower()
    match = re.match(r"(maze2d-(?:umaze|medium|large))(-sparse)?(-dense)?-v1", stem)
    if match:
        return f"{match.group(1)}{match.group(3) or ''}-v1"
    robots = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d", "ant": "Ant"}
    match = re.match(r"(hopper|halfcheetah|walker2d|ant)[-_]", stem)
    # D4RL recorded its MuJoCo data with v2; of the versions that still run, v4 has the same observations and rewards.
    return f"{robots[match.group(1)]}-v4" if match else None


def _reason(error: Exception) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
