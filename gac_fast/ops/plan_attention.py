"""Attention of every token to the plan vectors of its own trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _check, _dispatch

__all__ = ["plan_attention"]

OP = "plan_attention"
_dispatch.register(OP)


def plan_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token attends to all ``n_z`` plan vectors of its trajectory.

    Equivalent to :func:`gac_fast.reference.plan_attention`. Softmax scale 1/sqrt(d).

    Args:
        q: [N, H, d], float32, bfloat16 or float64; d even, 8 to 256.
        k, v: [B, n_z, H, d], dtype and device of q.
        cu_seqlens: int32 or int64 [B + 1], token offsets of the packed trajectories, rising from 0 to N.

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
    _check.cu_seqlens(cu_seqlens, n)
    _check.shape("k", k, cu_seqlens.shape[0] - 1, "n_z", heads, width)
    n_plan_vectors = k.shape[1]
    if n_plan_vectors < 1:
        raise ValueError("k: expected at least 1 plan vector per trajectory, got 0")
    _check.shape("v", v, cu_seqlens.shape[0] - 1, n_plan_vectors, heads, width)

    _dispatch.choose(OP, q.device)
    return reference.plan_attention(q, k, v, cu_seqlens)
