"""Causal window attention over packed trajectories, with rotary positions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _arrays, _check, _direct, _dispatch, _threads

__all__ = ["window_attention", "window_attention_qkv"]

OP = "window_attention"
_dispatch.register(OP, "triton", "cpp")

# The engine counts tokens in 31 bits; a longer window sees no more.
_MOST_TOKENS = 2**31 - 1


# Each engine has three ops: forwards of q, k and v apart and of one [N, 3, H, d], as one product of a model makes them,
# and a backward whose gradients are such a tensor too, where autograd would gather three.


def _register(
    forward: Any, forward_qkv: Any, backward: Any, outputs: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
    n_read_again: int, run_backward: Callable[..., Tensor] | None = None,
) -> tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]:  # fmt: skip
    """The fake kernels of an engine's ops, and that the backward is the one of both forwards.

    Args:
        outputs: what a forward of q and positions returns, not filled.
        n_read_again: the last outputs of a forward, which are the last arguments of the backward.
        run_backward: the backward as a plain function.

    Returns:
        what saves for the backward, and what differentiates.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, cu_seqlens, ctx.window, positions, ctx.rope_base = inputs
        ctx.n_tensors = len(tensors)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, cu_seqlens, positions, *output[-n_read_again:])

    def differentiate(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * (ctx.n_tensors + 4)
        tensors, rest = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
        cu_seqlens, positions, *read_again = rest
        q, k, v = tensors if ctx.n_tensors == 3 else tensors[0].unbind(1)
        run = run_backward if run_backward is not None and _direct.unseen_backward(d_out) else backward
        grads = run(d_out, q, k, v, cu_seqlens, ctx.window, positions, ctx.rope_base, *read_again)
        return *(grads.unbind(1) if ctx.n_tensors == 3 else (grads,)), *(None,) * 4

    forward.register_fake(lambda q, k, v, cu_seqlens, window, positions, rope_base: outputs(q, positions))
    forward_qkv.register_fake(lambda qkv, cu_seqlens, window, positions, rope_base: outputs(qkv[:, 0], positions))
    backward.register_fake(lambda d_out, q, *_: _empty_grads(q))
    for op in (forward, forward_qkv):
        op.register_autograd(differentiate, setup_context=save)
    return save, differentiate


def _empty_grads(q: Tensor) -> Tensor:
    n, heads, width = q.shape
    return q.new_empty((n, 3, heads, width))


# ---------------------------------------------------------------------------------------------------------------------
# The C++ engine


def _cpp_outputs(q: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output, and what the backward needs of the softmax, float32 [2, H, N]."""
    n, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((2, heads, n), dtype=torch.float32)


def _cpp_inputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Any, ...]:
    offsets = _arrays.integers(cu_seqlens)
    places = None if positions is None else _arrays.integers(positions)
    return _arrays.heads(q), _arrays.heads(k), _arrays.heads(v), offsets, window, places, rope_base


def _run(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor]:
    out, softmax = _cpp_outputs(q, positions)
    inputs = _cpp_inputs(q, k, v, cu_seqlens, window, positions, rope_base)
    _dispatch.cpp_engine()._window_attention(*inputs, _arrays.heads(out), softmax.numpy(), _threads.count())
    return out, softmax


def run_qkv(
    qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float,
    calls: list[Callable[[], object]] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The engine's forward: output and softmax.

    Args:
        calls: the engine's call is added to it, for whoever runs it again on other contents of the same memory.
    """
    q, k, v = qkv.unbind(1)
    out, softmax = _cpp_outputs(q, positions)
    inputs = _cpp_inputs(q, k, v, cu_seqlens, window, positions, rope_base)
    call = functools.partial(
        _dispatch.cpp_engine()._window_attention, *inputs, _arrays.heads(out), softmax.numpy(), _threads.count()
    )
    call()
    if calls is not None:
        calls.append(call)
    return out, softmax


def run_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None,
    rope_base: float, softmax: Tensor, calls: list[Callable[[], object]] | None = None,
) -> Tensor:  # fmt: skip
    """The engine's backward: gradients of queries, keys and values side by side; ``calls`` as in :func:`run_qkv`."""
    grads = _empty_grads(q)
    inputs = _cpp_inputs(q, k, v, cu_seqlens, window, positions, rope_base)
    call = functools.partial(
        _dispatch.cpp_engine()._window_attention_backward,
        _arrays.heads(d_out), *inputs, softmax.numpy(), *map(_arrays.heads, grads.unbind(1)), _threads.count(),
    )  # fmt: skip
    call()
    if calls is not None:
        calls.append(call)
    return grads


def _run_qkv(
    qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor]:
    return run_qkv(qkv, cu_seqlens, window, positions, rope_base)


def _run_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None,
    rope_base: float, softmax: Tensor,
) -> Tensor:  # fmt: skip
    return run_backward(d_out, q, k, v, cu_seqlens, window, positions, rope_base, softmax)


_forward = torch.library.custom_op("gac_fast::window_attention", mutates_args=())(_run)
_forward_qkv = torch.library.custom_op("gac_fast::window_attention_qkv", mutates_args=())(_run_qkv)
_backward = torch.library.custom_op("gac_fast::window_attention_backward", mutates_args=())(_run_backward)
_formula = _register(_forward, _forward_qkv, _backward, _cpp_outputs, 1, run_backward)
_directly, _directly_qkv = _direct.function(_run, *_formula), _direct.function(run_qkv, *_formula)

# ---------------------------------------------------------------------------------------------------------------------
# The Triton engine


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
    return _run_triton(q, k, v, cu_seqlens, window, positions, rope_base)


@torch.library.custom_op("gac_fast::window_attention_qkv_triton", mutates_args=())
def _triton_forward_qkv(
    qkv: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, rope_base: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return _run_triton(q, k, v, cu_seqlens, window, positions, rope_base)


@torch.library.custom_op("gac_fast::window_attention_triton_backward", mutates_args=())
def _triton_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None,
    rope_base: float, out: Tensor, lse: Tensor, angles: Tensor,
) -> Tensor:  # fmt: skip
    from gac_fast.kernels import window_attention as kernel

    grads = _empty_grads(q)
    kernel.window_attention_backward(
        d_out, q, k, v, cu_seqlens.contiguous(), window, positions, rope_base, out, lse, angles, grads
    )
    return grads


_register(_triton_forward, _triton_forward_qkv, _triton_backward, _triton_outputs, 3)

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
    run: Callable[..., Any] = _triton_forward if engine == "triton" else _forward
    if engine == "cpp" and all(map(_direct.unseen, (q, k, v))):
        run = _directly
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
    run: Callable[..., Any] = _triton_forward_qkv if engine == "triton" else _forward_qkv
    if engine == "cpp" and _direct.unseen(qkv):
        run = _directly_qkv
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
