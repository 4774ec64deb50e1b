"""What both kernels of plan inference compute elementwise."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["at_least", "log_slope", "moment_slopes", "over_vectors", "silu", "variance_of", "vector_sums"]

_LEAST_LOG = tl.constexpr(-8.0)
_MOST_LOG = tl.constexpr(4.0)


@triton.jit
def silu(h):
    """silu and its slope."""
    s = tl.sigmoid(h)
    a = h * s
    return a, s + a * (1.0 - s)


@triton.jit
def at_least(x, least):
    """max(x, least) that keeps NaN."""
    return tl.where(x < least, least, x)


@triton.jit
def vector_sums(x, VECTORS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """Sums over the columns of each plan vector of a tile: [BP, BD] -> [BP, VECTORS]."""
    if VECTORS == 1:
        sums = tl.sum(x, axis=1)[:, None]
    else:
        sums = tl.sum(tl.reshape(x, (BP, VECTORS, BD // VECTORS)), axis=2)
    return sums


@triton.jit
def over_vectors(s, VECTORS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """The reverse: [BP, VECTORS] -> something that broadcasts to [BP, BD]."""
    if VECTORS > 1:
        s = tl.reshape(tl.broadcast_to(s[:, :, None], (BP, VECTORS, BD // VECTORS)), (BP, BD))
    return s


@triton.jit
def moment_slopes(mean, std, target, kappa, n, LANGEVIN: tl.constexpr):
    """By the mean of one member: share + each * (its mean - mean); by its log-variance: each / 2 * its variance."""
    if LANGEVIN:
        off = (target - mean) / std
        by_mean = off / std
        by_std = (off * off - 1.0) / std
    else:
        by_mean = 1.0
        by_std = -kappa
    return by_mean / n, by_std / (std * n)


@triton.jit
def log_slope(log_variance, each):
    """What the log-variance of a member adds: its clamp has no slope outside its range."""
    within = (log_variance >= _LEAST_LOG) & (log_variance <= _MOST_LOG)
    return tl.where(within, 0.5 * each * tl.exp(log_variance), 0.0)


@triton.jit
def variance_of(log_variance):
    """Of a member."""
    clamped = tl.where(log_variance < _LEAST_LOG, _LEAST_LOG, log_variance)
    return tl.exp(tl.where(clamped > _MOST_LOG, _MOST_LOG, clamped))
