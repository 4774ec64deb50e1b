"""Reference scores and the normalised score: 0 is a random policy, 100 an expert, both as returns of one episode."""

from __future__ import annotations

import re
from typing import overload

import numpy as np
import numpy.typing as npt

from gac_fast.errors import DataError

__all__ = ["POINTMAZE_SCORE_EPISODES", "has_reference_scores", "normalized_score", "reference_scores"]

# D4RL's table (d4rl/infos.py): one pair per robot, for every quality of data and every version.
_GYM_MUJOCO = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
}

# The same table, Maze2D v1; sparse rewards, then dense.
_MAZE2D = {
    "umaze": (23.85, 161.86),
    "medium": (13.13, 277.39),
    "large": (6.7, 273.99),
    "umaze-dense": (68.537689, 193.66285642381482),
    "medium-dense": (44.264742, 297.4552547777125),
    "large-dense": (30.569041, 303.4857382709002),
}

POINTMAZE_SCORE_EPISODES = 16_384
"""Episodes behind each PointMaze reference score."""

# Means of reference_returns(maze, "random" | "controller", episodes=16_384, seed=0); standard errors are at most 0.7.
_POINTMAZE = {
    "umaze": (35.05, 240.36),
    "medium": (18.85, 474.76),
    "large": (14.18, 604.30),
}

_PATTERNS = (
    (re.compile(r"(?:mujoco/)?(hopper|halfcheetah|walker2d)(?:[-_/].*)?"), _GYM_MUJOCO),
    (re.compile(r"maze2d-(umaze|medium|large)(?:-sparse)?-v1"), _MAZE2D),
    (re.compile(r"maze2d-((?:umaze|medium|large)-dense)-v1"), _MAZE2D),
    (re.compile(r"(?:gac_fast/)?pointmaze-(umaze|medium|large)(?:-v\d+)?"), _POINTMAZE),
)


def reference_scores(name: str) -> tuple[float, float]:
    """Returns that score 0 and 100.

    Args:
        name: an environment id ('Hopper-v5', 'gac_fast/PointMaze-umaze-v0'), a D4RL name ('hopper-medium-v2',
            'maze2d-umaze-v1'), a Minari id ('mujoco/hopper/medium-v0') or a short name ('pointmaze-umaze'). Mind that
            D4RL made its scores with the environments of its time; say which version yours is.

    Raises:
        DataError: there are no reference scores for ``name``.
    """
    for pattern, table in _PATTERNS:
        match = pattern.fullmatch(name.lower())
        if match:
            return table[match.group(1)]
    known = [*_GYM_MUJOCO, *(f"maze2d-{maze}-v1" for maze in _MAZE2D), *(f"pointmaze-{maze}" for maze in _POINTMAZE)]
    raise DataError(
        f"{name!r} has no reference scores, so there is no normalised score: report the return itself "
        f"(known: {', '.join(known)})"
    )


def has_reference_scores(name: str | None) -> bool:
    """Whether ``normalized_score`` knows ``name``."""
    return name is not None and any(pattern.fullmatch(name.lower()) for pattern, _ in _PATTERNS)


@overload
def normalized_score(name: str, returns: float) -> float: ...
@overload
def normalized_score(name: str, returns: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]: ...


def normalized_score(name: str, returns: float | npt.NDArray[np.floating]) -> float | npt.NDArray[np.float64]:
    """Returns on the scale from 0 (random) to 100 (expert), same shape.

    For a standard deviation, divide by ``(high - low) / 100`` of ``reference_scores`` instead: this map has an offset.

    Raises:
        DataError: there are no reference scores for ``name``.
    """
    low, high = reference_scores(name)
    score = 100.0 * (np.asarray(returns, np.float64) - low) / (high - low)
    return float(score) if np.ndim(returns) == 0 else score
