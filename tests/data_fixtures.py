"""Small data files for the data tests; run as a script to cut tests/data/*-cut.hdf5 anew from the full files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

CUTS = Path(__file__).parent / "data"

# Full file -> episodes kept, from its beginning.
CUT_EPISODES = {
    "hopper-medium": 3,
    "hopper-medium-replay": 12,
    "halfcheetah-medium": 2,
    "halfcheetah-medium-replay": 2,
}


def full_data() -> Path:
    """Folder of the full files, or skip."""
    folder = os.environ.get("GAC_FAST_DATA")
    if not folder:
        pytest.skip("GAC_FAST_DATA names no folder with the full D4RL-layout files")
    return Path(folder)


def cut_file(source: Path, target: Path, episodes: int) -> None:
    """Copy the first ``episodes`` episodes of a D4RL-layout file."""
    with h5py.File(source, "r") as full, h5py.File(target, "w") as cut:
        ends = np.flatnonzero(full["terminals"][:] | full["timeouts"][:])
        rows = int(ends[episodes - 1]) + 1
        for name, field in full.items():
            # Bytes of the same place in their words compress best side by side.
            cut.create_dataset(name, data=field[:rows], compression="gzip", compression_opts=9, shuffle=True)
        cut.attrs["env_id"] = full.attrs["env_id"]
        cut.attrs["note"] = f"the first {episodes} episodes of {source.name}"


def flat_data(lengths: Sequence[int], obs_dim: int = 3, act_dim: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Flat transitions of episodes that all end in a terminal; any field may then be overwritten."""
    rng = np.random.default_rng(seed)
    n_steps = sum(lengths)
    terminals = np.zeros(n_steps, np.bool_)
    terminals[np.cumsum(lengths) - 1] = True
    return {
        "observations": rng.normal(size=(n_steps, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n_steps, act_dim)).astype(np.float32),
        "rewards": rng.normal(size=n_steps).astype(np.float32),
        "terminals": terminals,
        "timeouts": np.zeros(n_steps, np.bool_),
    }


def write_d4rl(path: Path, data: dict[str, Any], **attributes: Any) -> Path:
    """Write ``data`` (names with slashes make groups) as HDF5."""
    with h5py.File(path, "w") as file:
        for name, value in data.items():
            file[name] = value
        file.attrs.update(attributes)
    return path


if __name__ == "__main__":
    for name, episodes in CUT_EPISODES.items():
        cut_file(Path(os.environ["GAC_FAST_DATA"]) / f"{name}.hdf5", CUTS / f"{name}-cut.hdf5", episodes)
