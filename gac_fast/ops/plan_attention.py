"""Attention of every token to the plan vectors of its own trajectory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _arrays, _check, _dispatch, _threads

__all__ = ["plan_attention"]

OP = "plan_attention"

# What one tile of the Triton kernels holds.
_MOST_PLAN_VECTORS = 16


def _triton_refusal(n_z: int) -> str | None:
    if 1 <= n_z <= _MOST_PLAN_VECTORS:
        return None
    return f"the Triton engine takes 1 to {_MOST_PLAN_VECTORS} plan vectors, got {n_z}"


_dispatch.register(OP, "triton", "cpp", triton_refuses=lambda sizes: _triton_refusal(sizes.n_z))


@torch.library.custom_op("gac_fast::plan_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    out = q.new_empty(q.shape)
    _dispatch.cpp_engine()._plan_attention(
        _arrays.heads(q),
        _arrays.heads(k),
        _arrays.heads(v),
        _arrays.integers(cu_seqlens),
        _arrays.heads(out),
        _threads.count(),
    )
    return out


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("gac_fast::plan_attention_backward", mutates_args=())
def _backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of q [N, H, d], and of k and v as one [B, n_z, 2, H, d]."""
    d_q, d_plan = _empty_grads(q, k)
    d_k, d_v = d_plan.unbind(2)
    _dispatch.cpp_engine()._plan_attention_backward(
        _arrays.heads(d_out),
        _arrays.heads(q),
        _arrays.heads(k),
        _arrays.heads(v),
        _arrays.integers(cu_seqlens),
        _arrays.heads(d_q),
        _arrays.heads(d_k),
        _arrays.heads(d_v),
        _threads.count(),
    )
    return d_q, d_plan


@_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_grads(q, k)


def _empty_grads(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    b, n_z, heads, width = k.shape
    return q.new_empty(q.shape), k.new_empty((b, n_z, 2, heads, width))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    d_q, d_plan = _backward(d_out, *ctx.saved_tensors)
    return (d_q, *d_plan.unbind(2), None)


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("gac_fast::plan_attention_triton", mutates_args=())
def _triton_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    from gac_fast.kernels import plan_attention as kernel

    out = q.new_empty(q.shape)
    kernel.plan_attention(q, k, v, cu_seqlens.contiguous(), out)
    return out


@_triton_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("gac_fast::plan_attention_triton_backward", mutates_args=())
def _triton_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of q [N, H, d], and of k and v as one [B, n_z, 2, H, d]."""
    from gac_fast.kernels import plan_attention as kernel

    d_q, d_plan = _empty_grads(q, k)
    kernel.plan_attention_backward(d_out, q, k, v, cu_seqlens.contiguous(), d_q, d_plan)
    return d_q, d_plan


@_triton_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_grads(q, k)


def _triton_differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    d_q, d_plan = _triton_backward(d_out, *ctx.saved_tensors)
    return (d_q, *d_plan.unbind(2), None)


_triton_forward.register_autograd(_triton_differentiate, setup_context=_save)


def plan_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token attends to all ``n_z`` plan vectors of its trajectory.

    Equivalent to :func:`gac_fast.reference.plan_attention`. Softmax scale 1/sqrt(d). The engines take float32 and
    bfloat16 (sums and softmax in float32), read strided q, k and v in place where the elements of a head are
    neighbours, and give the same bits every time (the C++ engine on any number of threads). The Triton engine takes at
    most 16 plan vectors.

    Args:
        q: [N, H, d], float32, bfloat16 or float64; d even, 8 to 256.
        k, v: [B, n_z, H, d], dtype and device of q.
        cu_seqlens: int32 or int64 [B + 1], token offsets of the packed trajectories, rising from 0 to N.

    Returns:
        [N, H, d].

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it; on the C++ engine also offsets that do
            not rise from 0 to N.
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

    refused = _dispatch.refusal(q)
    if refused is None and _dispatch.is_for_triton(OP, q.device):
        refused = _triton_refusal(n_plan_vectors)
        if refused is None and n * heads >= 2**31:
            refused = f"the Triton engine takes fewer than 2^31 tokens times heads, got {n} x {heads}"
    engine = _dispatch.choose(OP, q.device, refused)
    if engine == "triton":
        return _triton_forward(q, k, v, cu_seqlens)
    if engine == "cpp":
        return _forward(q, k, v, cu_seqlens)
    return reference.plan_attention(q, k, v, cu_seqlens)
