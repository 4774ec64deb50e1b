"""Causal window attention over packed trajectories, with rotary positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _arrays, _check, _dispatch, _threads

__all__ = ["window_attention", "window_attention_qkv"]

OP = "window_attention"
_dispatch.register(OP, "triton", "cpp")

# The engine counts tokens in 31 bits; a longer window sees no more.
_MOST_TOKENS = 2**31 - 1


@torch.library.custom_op("gac_fast::window_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor]:
    """The output [N, H, d], and what the backward needs of the softmax, float32 [2, H, N]."""
    out, softmax = _empty(q)
    _dispatch.cpp_engine()._window_attention(
        _arrays.heads(q),
        _arrays.heads(k),
        _arrays.heads(v),
        _arrays.integers(cu_seqlens),
        window,
        None if positions is None else _arrays.integers(positions),
        rope_base,
        _arrays.heads(out),
        softmax.numpy(),
        _threads.count(),
    )
    return out, softmax


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor]:
    return _empty(q)


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    n, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((2, heads, n), dtype=torch.float32)


@torch.library.custom_op("gac_fast::window_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int,
    positions: Tensor | None,
    rope_base: float,
    softmax: Tensor,
) -> Tensor:
    """The gradients of q, k and v as one [3, N, H, d]."""
    grads = q.new_empty((3, *q.shape))
    d_q, d_k, d_v = (_arrays.heads(grad) for grad in grads.unbind())
    _dispatch.cpp_engine()._window_attention_backward(
        _arrays.heads(d_out),
        _arrays.heads(q),
        _arrays.heads(k),
        _arrays.heads(v),
        _arrays.integers(cu_seqlens),
        window,
        None if positions is None else _arrays.integers(positions),
        rope_base,
        softmax.numpy(),
        d_q,
        d_k,
        d_v,
        _threads.count(),
    )
    return grads


@_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int,
    positions: Tensor | None,
    rope_base: float,
    softmax: Tensor,
) -> Tensor:
    return q.new_empty((3, *q.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.window, positions, ctx.rope_base = inputs
    _, softmax = output
    ctx.mark_non_differentiable(softmax)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, cu_seqlens, positions, softmax)


def _differentiate(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 7
    q, k, v, cu_seqlens, positions, softmax = ctx.saved_tensors
    grads = _backward(d_out, q, k, v, cu_seqlens, ctx.window, positions, ctx.rope_base, softmax)
    return (*grads.unbind(), None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


# The same on q, k and v side by side, as one product of a model makes them: their gradients are then one tensor too,
# where autograd would gather three.


@torch.library.custom_op("gac_fast::window_attention_qkv", mutates_args=())
def _forward_qkv(
    qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor]:
    """As :func:`_forward` of qkv [N, 3, H, d]."""
    out, softmax = _empty(qkv[:, 0])
    q, k, v = (_arrays.heads(x) for x in qkv.unbind(1))
    _dispatch.cpp_engine()._window_attention(
        q, k, v, _arrays.integers(cu_seqlens), window, None if positions is None else _arrays.integers(positions),
        rope_base, _arrays.heads(out), softmax.numpy(), _threads.count(),
    )  # fmt: skip
    return out, softmax


@_forward_qkv.register_fake
def _(
    qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor]:
    return _empty(qkv[:, 0])


@torch.library.custom_op("gac_fast::window_attention_qkv_backward", mutates_args=())
def _backward_qkv(
    d_out: Tensor, qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float,
    softmax: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient [N, 3, H, d]."""
    grads = qkv.new_empty(qkv.shape)
    q, k, v = (_arrays.heads(x) for x in qkv.unbind(1))
    d_q, d_k, d_v = (_arrays.heads(x) for x in grads.unbind(1))
    _dispatch.cpp_engine()._window_attention_backward(
        _arrays.heads(d_out), q, k, v, _arrays.integers(cu_seqlens), window,
        None if positions is None else _arrays.integers(positions), rope_base, softmax.numpy(), d_q, d_k, d_v,
        _threads.count(),
    )  # fmt: skip
    return grads


@_backward_qkv.register_fake
def _(
    d_out: Tensor, qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float,
    softmax: Tensor,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _save_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.window, positions, ctx.rope_base = inputs
    _, softmax = output
    ctx.mark_non_differentiable(softmax)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, cu_seqlens, positions, softmax)


def _differentiate_qkv(ctx: Any, d_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 5
    qkv, cu_seqlens, positions, softmax = ctx.saved_tensors
    return (_backward_qkv(d_out, qkv, cu_seqlens, ctx.window, positions, ctx.rope_base, softmax), *(None,) * 4)


_forward_qkv.register_autograd(_differentiate_qkv, setup_context=_save_qkv)


# ---------------------------------------------------------------------------------------------------------------------
# The Triton engine: one backward for q, k and v apart and for all in one tensor


def _triton_outputs(q: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logarithms of the softmax denominators [H, N], angles [N, d] (none without positions)."""
    n, heads, width = q.shape
    lse = q.new_empty((heads, n), dtype=torch.float32)
    angles = q.new_empty((0 if positions is None else n, width), dtype=torch.float32)
    return q.new_empty(q.shape), lse, angles


def _run_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor, Tensor]:
    from gac_fast.kernels import window_attention as kernel

    outputs = _triton_outputs(q, positions)
    kernel.window_attention(q, k, v, cu_seqlens.contiguous(), window, positions, rope_base, *outputs)
    return outputs


@torch.library.custom_op("gac_fast::window_attention_triton", mutates_args=())
def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [N, H, d], and what the backward needs of the softmax and of the rotation."""
    return _run_triton(q, k, v, cu_seqlens, window, positions, rope_base)


@_triton_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _triton_outputs(q, positions)


@torch.library.custom_op("gac_fast::window_attention_qkv_triton", mutates_args=())
def _triton_qkv_forward(
    qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same on one [N, 3, H, d]."""
    q, k, v = qkv.unbind(1)
    return _run_triton(q, k, v, cu_seqlens, window, positions, rope_base)


@_triton_qkv_forward.register_fake
def _(
    qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _triton_outputs(qkv[:, 0], positions)


@torch.library.custom_op("gac_fast::window_attention_triton_backward", mutates_args=())
def _triton_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int,
    positions: Tensor | None,
    rope_base: float,
    out: Tensor,
    lse: Tensor,
    angles: Tensor,
) -> Tensor:
    """The gradients of q, k and v as one [N, 3, H, d]."""
    from gac_fast.kernels import window_attention as kernel

    n, heads, width = q.shape
    grads = q.new_empty((n, 3, heads, width))
    cu_seqlens = cu_seqlens.contiguous()
    kernel.window_attention_backward(
        d_out, q, k, v, cu_seqlens, window, positions, rope_base, out, lse, angles, grads
    )  # fmt: skip
    return grads


@_triton_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int,
    positions: Tensor | None,
    rope_base: float,
    out: Tensor,
    lse: Tensor,
    angles: Tensor,
) -> Tensor:
    n, heads, width = q.shape
    return q.new_empty((n, 3, heads, width))


def _triton_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, cu_seqlens, ctx.window, positions, ctx.rope_base = inputs
    _, lse, angles = output
    ctx.mark_non_differentiable(lse, angles)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, cu_seqlens, positions, *output)


def _triton_differentiate(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 7
    q, k, v, cu_seqlens, positions, *output = ctx.saved_tensors
    grads = _triton_backward(d_out, q, k, v, cu_seqlens, ctx.window, positions, ctx.rope_base, *output)
    return (*grads.unbind(1), None, None, None, None)


def _triton_qkv_differentiate(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 5
    qkv, cu_seqlens, positions, *output = ctx.saved_tensors
    q, k, v = qkv.unbind(1)
    grads = _triton_backward(d_out, q, k, v, cu_seqlens, ctx.window, positions, ctx.rope_base, *output)
    return grads, None, None, None, None


_triton_forward.register_autograd(_triton_differentiate, setup_context=_triton_save)
_triton_qkv_forward.register_autograd(_triton_qkv_differentiate, setup_context=_triton_save)

# ---------------------------------------------------------------------------------------------------------------------


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
    The engines take float32 and bfloat16 (sums and softmax in float32) and read strided q, k and v in place where the
    elements of a head are neighbours. They give the same bits every time, the C++ engine on any number of threads.

    Args:
        q, k, v: [N, H, d], float32, bfloat16 or float64, one dtype and device; d even, 8 to 256.
        cu_seqlens: int32 or int64 [B + 1], token offsets of the packed trajectories, rising from 0 to N.
        window: at least 1, in **tokens** (tokens per step times the window in steps).
        positions: int32 or int64 [N], the time step of each token; None leaves q and k unrotated.
        rope_base: positive base of the rotary frequencies.

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
    _check.shape("q", q, "N", "H", "d")
    _check.shape("k", k, *q.shape)
    _check.shape("v", v, *q.shape)
    _check_inputs("q", q, cu_seqlens, window, positions, rope_base)

    engine = _choose(q)
    if engine == "reference":
        return reference.window_attention(q, k, v, cu_seqlens, window, positions, rope_base)
    run = _triton_forward if engine == "triton" else _forward
    return run(q, k, v, cu_seqlens, min(window, _MOST_TOKENS), positions, rope_base)[0]


def window_attention_qkv(
    qkv: Tensor,
    cu_seqlens: Tensor,
    window: int,
    positions: Tensor | None = None,
    rope_base: float = 10000.0,
) -> Tensor:
    """:func:`window_attention` of queries, keys and values that lie side by side; counted as that op.

    Args:
        qkv: [N, 3, H, d].
        cu_seqlens, window, positions, rope_base: as there.

    Returns:
        [N, H, d].

    Raises:
        ValueError, BackendError: as there.
    """
    _check.dtype("qkv", qkv, torch.float32, torch.bfloat16, torch.float64)
    _check.shape("qkv", qkv, "N", 3, "H", "d")
    _check_inputs("qkv", qkv, cu_seqlens, window, positions, rope_base)

    engine = _choose(qkv[:, 0])
    if engine == "reference":
        q, k, v = qkv.unbind(1)
        return reference.window_attention(q, k, v, cu_seqlens, window, positions, rope_base)
    run = _triton_qkv_forward if engine == "triton" else _forward_qkv
    return run(qkv, cu_seqlens, min(window, _MOST_TOKENS), positions, rope_base)[0]


def _check_inputs(
    name: str, x: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> None:
    """What both forms ask of heads ``x`` [N, ..., d] and of the rest."""
    _check.device("cu_seqlens", cu_seqlens, name, x)
    _check.head_width(x.shape[-1], name)
    _check.cu_seqlens(cu_seqlens, x.shape[0])
    if window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}")
    if positions is not None:
        _check.dtype("positions", positions, *_check.INTEGERS)
        _check.device("positions", positions, name, x)
        _check.shape("positions", positions, x.shape[0])
    if not 0.0 < rope_base < math.inf:
        raise ValueError(f"rope_base: expected a positive number, got {rope_base}")


def _choose(q: Tensor) -> str:
    refused = _dispatch.refusal(q)
    n, heads, _ = q.shape
    if refused is None and n * heads >= 2**31 and _dispatch.is_for_triton(OP, q.device):
        refused = f"the Triton engine takes fewer than 2^31 tokens times heads, got {n} x {heads}"
    return _dispatch.choose(OP, q.device, refused)
