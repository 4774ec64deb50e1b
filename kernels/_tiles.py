"""Tiles of a packed batch, found inside a kernel: no table, no launch and no memory of their own."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["bounds", "find_tile", "n_tiles"]


def n_tiles(n_tokens: int, n_sequences: int, size: int) -> int:
    """Tiles of at most ``size`` tokens that never cross a trajectory, the empty ones counted; a bound that needs no
    reading of the device."""
    return n_tokens // size + n_sequences


@triton.jit
def bounds(p_cu, n_tokens, i_sequence):
    """First token and end of a trajectory, int32; offsets that break the contract do not become addresses."""
    start = tl.maximum(tl.load(p_cu + i_sequence).to(tl.int32), 0)
    end = tl.minimum(tl.load(p_cu + i_sequence + 1).to(tl.int32), n_tokens)
    return start, end


@triton.jit
def find_tile(p_cu, n_tokens, n_sequences, i_tile, BT: tl.constexpr):
    """Trajectory, its first token, its end, and first token of tile ``i_tile``, all int32.

    Trajectory b owns the tiles from cu[b] // BT + b on: at least as many as it needs, since a ceiling of a difference
    exceeds the difference of two floors by at most one. A tile holds no token where its first one is not before the
    end.
    """
    low = i_tile * 0
    high = low + n_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        owns = (tl.load(p_cu + middle) // BT).to(tl.int32) + middle <= i_tile
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle - 1)
    start, end = bounds(p_cu, n_tokens, low)
    first = start + (i_tile - (start // BT + low)) * BT
    return low, start, end, first
