"""Causal window attention over packed trajectories, with rotary positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _check, _dispatch

__all__ = ["window_attention"]

OP = "window_attention"
_dispatch.register(OP)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int,
    positions: Tensor | None = None,
    rope_base: float = 10000.0,
) -> Tensor:
    """Each token attends to itself and the ``window - 1`` tokens before it in its own trajectory.

    Equivalent to :func:`gac_fast.reference.window_attention`. Softmax scale 1/sqrt(d); rotary pairs are (i, i + d/2).

    Args:
        q, k, v: [N, H, d], float32, bfloat16 or float64, one dtype and device; d even, 8 to 256.
        cu_seqlens: int32 or int64 [B + 1], token offsets of the packed trajectories, rising from 0 to N.
        window: at least 1, in **tokens** (tokens per step times the window in steps).
        positions: int32 or int64 [N], the time step of each token; None leaves q and k unrotated.
        rope_base: positive base of the rotary frequencies.

    Returns:
        [N, H, d].

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("q", q, torch.float32, torch.bfloat16, torch.float64)
    _check.dtype("k", k, q.dtype)
    _check.dtype("v", v, q.dtype)
    _check.device("k", k, "q", q)
    _check.device("v", v, "q", q)
    _check.device("cu_seqlens", cu_seqlens, "q", q)
    _check.shape("q", q, "N", "H", "d")
    n, heads, width = q.shape
    _check.head_width(width)
    _check.shape("k", k, n, heads, width)
    _check.shape("v", v, n, heads, width)
    _check.cu_seqlens(cu_seqlens, n)
    if window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}")
    if positions is not None:
        _check.dtype("positions", positions, *_check.INTEGERS)
        _check.device("positions", positions, "q", q)
        _check.shape("positions", positions, n)
    if not 0.0 < rope_base < math.inf:
        raise ValueError(f"rope_base: expected a positive number, got {rope_base}")

    _dispatch.choose(OP, q.device)
    return reference.window_attention(q, k, v, cu_seqlens, window, positions, rope_base)
