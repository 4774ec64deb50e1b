"""Statistics of scores over runs and episodes: interquartile mean, bootstrap intervals, t intervals.

Definitions are those of Agarwal et al. (2021, arXiv 2108.13264): the mean of the middle half of all scores, and the
percentile interval of a stratified bootstrap. NumPy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "bootstrap", "interquartile_mean", "mean", "standard_error", "t_interval"]

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

# Scores resampled at once: 32 MB of them.
CHUNK = 4_000_000


class Interval(NamedTuple):
    """Ends of an interval."""

    low: float
    high: float


def mean(scores: npt.ArrayLike) -> Floats:
    """Along the last axis."""
    return np.asarray(np.asarray(scores, np.float64).mean(axis=-1))


def interquartile_mean(scores: npt.ArrayLike) -> Floats:
    """Mean of the middle half along the last axis: a quarter of n, rounded down, is left out at either end."""
    x = np.asarray(scores, np.float64)
    n = x.shape[-1]
    cut = n // 4
    if cut:
        x = np.partition(x, (cut, n - cut - 1), axis=-1)[..., cut : n - cut]
    return np.asarray(x.mean(axis=-1))


def standard_error(scores: npt.ArrayLike) -> float:
    """Of the mean of independent scores [n]; NaN for fewer than two."""
    x = np.asarray(scores, np.float64)
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def bootstrap(
    scores: Sequence[npt.ArrayLike],
    statistic: Statistic,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    resample_runs: bool = False,
) -> Interval:
    """Percentile interval of a statistic of all scores together.

    Args:
        scores: one array [n_r] per run, the strata: every resample draws n_r scores of run r, with replacement. The
            interval covers what other episodes of **these** runs would have given, and says nothing of other seeds.
        statistic: maps [..., n] to [...], as :func:`interquartile_mean` does.
        level: share of the resamples within the interval.
        n_resamples: number of resamples.
        seed: of the resampling.
        resample_runs: draw the runs with replacement too, before the scores within them. The interval then covers
            other runs (seeds) as well; runs need equal numbers of scores. Of fewer than about ten runs it is too
            narrow, as n runs seem to vary by a factor (n - 1) / n less than they do.
    """
    strata = [np.asarray(one, np.float64) for one in scores]
    sizes = [len(one) for one in strata]
    if not strata or min(sizes) == 0 or any(one.ndim != 1 for one in strata):
        raise ValueError(f"scores: expected one array of at least one score per run, got {[x.shape for x in strata]}")
    if resample_runs and len(set(sizes)) > 1:
        raise ValueError(f"scores: expected as many scores of every run to resample runs, got {sizes}")
    if not 0 < level < 1 or n_resamples < 1:
        raise ValueError(f"level, n_resamples: expected a share and at least 1, got {level}, {n_resamples}")
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, n_resamples, per := max(1, CHUNK // sum(sizes))):
        n = min(per, n_resamples - start)
        if resample_runs:
            every, (runs, size) = np.stack(strata), (len(strata), sizes[0])
            which = rng.integers(runs, size=(n, runs, 1))
            drawn = every[which, rng.integers(size, size=(n, runs, size))].reshape(n, -1)
        else:
            drawn = np.concatenate([one[rng.integers(len(one), size=(n, len(one)))] for one in strata], axis=1)
        found.append(statistic(drawn))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(found), (tail, 100 - tail))
    return Interval(float(low), float(high))


def t_interval(scores: npt.ArrayLike, level: float = 0.95) -> Interval | None:
    """Student's interval of the mean of independent, roughly normal scores [n], such as means of runs.

    It is wide for few runs, as it should be. None for fewer than two.
    """
    x = np.asarray(scores, np.float64)
    if len(x) < 2:
        return None
    half = _t_quantile(0.5 + level / 2, len(x) - 1) * standard_error(x)
    return Interval(float(x.mean() - half), float(x.mean() + half))


def _t_quantile(p: float, dof: int) -> float:
    """p-quantile, p > 0.5, of Student's t, by bisection of its distribution function."""
    low, high = 0.0, 1.0
    while _t_below(high, dof) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, dof) < p else (low, middle)
    return high


def _t_below(t: float, dof: int) -> float:
    """P(T <= t), t >= 0: the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    theta = math.atan2(t, math.sqrt(dof))
    cos, sin = math.cos(theta), math.sin(theta)
    odd = dof % 2
    term = total = (cos if odd else 1.0) if dof > 1 else 0.0
    for k in range(2 + odd, dof - 1, 2):
        term *= (k - 1) / k * cos * cos
        total += term
    inside = (theta + sin * total) * 2 / math.pi if odd else sin * total
    return 0.5 + inside / 2
