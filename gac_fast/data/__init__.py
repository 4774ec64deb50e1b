"""Episodes in, packed storage out: D4RL-layout files, Minari datasets, plain arrays, and PointMaze controller data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gac_fast.data.arrays import from_arrays, from_episodes
from gac_fast.data.scores import has_reference_scores, normalized_score, reference_scores
from gac_fast.data.trajectories import Episode, Trajectories, TrajectoryStatistics
from gac_fast.errors import DataError

__all__ = [
    "Episode",
    "Trajectories",
    "TrajectoryStatistics",
    "from_arrays",
    "from_episodes",
    "has_reference_scores",
    "load",
    "normalized_score",
    "reference_scores",
]

_HDF5_SUFFIXES = (".hdf5", ".h5")


def load(source: str | Path | Trajectories, **options: Any) -> Trajectories:
    """Load episodes from wherever ``source`` points.

    Args:
        source: a file in D4RL layout (a ``Path``, an existing file, or a name ending in .hdf5 or .h5), a Minari dataset
            id, or ``Trajectories``, which are returned unchanged.
        **options: of ``gac_fast.data.d4rl.load_d4rl`` or ``gac_fast.data.minari.load_minari``.

    Raises:
        DataError: the source does not exist or holds bad data, or an option is not the loader's.
    """
    if isinstance(source, Trajectories):
        if options:
            raise DataError(f"load: Trajectories take no options, got {', '.join(options)}")
        return source
    if not isinstance(source, (str, Path)) or not str(source):
        raise DataError(f"load: expected a file, a Minari dataset id or Trajectories, got {source!r}")
    is_file = isinstance(source, Path) or source.endswith(_HDF5_SUFFIXES) or Path(source).is_file()
    loader: Any
    if is_file:
        from gac_fast.data.d4rl import load_d4rl as loader
    else:
        from gac_fast.data.minari import load_minari as loader
    known = loader.__kwdefaults__
    unknown = [name for name in options if name not in known]
    if unknown:
        kind = "a D4RL file" if is_file else "a Minari dataset"
        raise DataError(f"load: expected options of {kind} ({', '.join(known)}), got {', '.join(unknown)}")
    return loader(source, **options)
