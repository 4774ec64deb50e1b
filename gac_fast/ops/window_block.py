"""The part of a decoder layer that no plan touches: window attention behind a norm, added to the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac_fast.ops import _arrays, _check, _dispatch, _threads
from gac_fast.ops.decoder_layers import runs_directly
from gac_fast.ops.norm_linear import OP as NORM_LINEAR
from gac_fast.ops.norm_linear import norm_linear
from gac_fast.ops.window_attention import OP as WINDOW_ATTENTION
from gac_fast.ops.window_attention import run_backward, run_qkv, window_attention_qkv

__all__ = ["window_block"]

# As `decoder_layers`, it has no engine of its own and is counted as the ops that it calls. Between them the stream was
# rounded, added and copied by torch on one thread.


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cu_seqlens: Tensor, positions: Tensor, n_heads: int, window: int, rope_base: float,
        bf16: bool, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        norm_w, norm_b, w_qkv, b_qkv, w_o, b_o = weights
        n, dim = x.shape
        x = x.contiguous()
        dtype = torch.bfloat16 if bf16 else torch.float32
        engine, threads = _dispatch.cpp_engine(), _threads.count()
        for op, count in ((NORM_LINEAR, 2), (WINDOW_ATTENTION, 1)):
            _dispatch.count(op, "cpp", count)
        matrix, bias = w_qkv * norm_w, b_qkv + (w_qkv * norm_b).sum(-1)
        qkv = torch.empty((n, 3 * dim), dtype=dtype)
        operand, rstd = torch.empty((n, _arrays.padded(dim)), dtype=dtype), torch.empty(n)
        engine._norm_linear(
            matrix.numpy(), bias.numpy(), True, bf16, x.numpy(), None, _arrays.array(qkv), _arrays.array(operand),
            rstd.numpy(), threads,
        )  # fmt: skip
        attended, softmax = run_qkv(qkv.view(n, 3, n_heads, dim // n_heads), cu_seqlens, window, positions, rope_base)
        y = torch.empty((n, dim))
        out = w_o.contiguous().numpy()
        engine._norm_linear(
            out, b_o.contiguous().numpy(), False, bf16, _arrays.array(attended.view(n, dim)), x.numpy(), y.numpy(),
            None, None, threads,
        )  # fmt: skip
        ctx.options = n_heads, window, rope_base, bf16
        ctx.kept = matrix, operand, rstd, qkv, attended, softmax
        ctx.save_for_backward(cu_seqlens, positions, *weights)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        cu_seqlens, positions, *weights = ctx.saved_tensors
        norm_w, norm_b, w_qkv, _, w_o, _ = weights
        matrix, operand, rstd, qkv, attended, softmax = ctx.kept
        n_heads, window, rope_base, bf16 = ctx.options
        n, dim = dy.shape
        engine, threads = _dispatch.cpp_engine(), _threads.count()
        dy = dy.contiguous()
        dy_operand = torch.empty((n, dim), dtype=torch.bfloat16) if bf16 else None
        d_attended, db_o, db_qkv = torch.empty_like(attended), torch.empty(dim), torch.empty(3 * dim)
        engine._norm_linear_backward(
            w_o.contiguous().numpy(), False, bf16, dy.numpy(), None, None, _arrays.array(dy_operand), None,
            _arrays.array(d_attended.view(n, dim)), db_o.numpy(), threads,
        )  # fmt: skip
        q, k, v = qkv.view(n, 3, n_heads, dim // n_heads).unbind(1)
        d_qkv = run_backward(d_attended, q, k, v, cu_seqlens, window, positions, rope_base, softmax).view(n, 3 * dim)
        dx = torch.empty((n, dim)) if ctx.needs_input_grad[0] else None
        engine._norm_linear_backward(
            matrix.numpy(), True, bf16, _arrays.array(d_qkv), _arrays.array(operand), rstd.numpy(), None,
            dy.numpy() if dx is not None else None, _arrays.array(dx), db_qkv.numpy(), threads,
        )  # fmt: skip
        dw_qkv, dw_o = torch.empty(w_qkv.shape), torch.empty(w_o.shape)
        dnorm_w, dnorm_b = torch.empty(dim), torch.empty(dim)
        norm = [_arrays.array(t.contiguous()) for t in (w_qkv, db_qkv, norm_w, norm_b, dnorm_w, dnorm_b)]
        engine._weight_gradients(
            [
                (_arrays.array(d_qkv), _arrays.array(operand[:, :dim]), dw_qkv.numpy(), norm),
                (
                    _arrays.array(dy if dy_operand is None else dy_operand), _arrays.array(attended.view(n, dim)),
                    dw_o.numpy(), [],
                ),
            ],
            threads,
        )  # fmt: skip
        return dx, *(None,) * 6, dnorm_w, dnorm_b, dw_qkv, db_qkv, dw_o, db_o


def window_block(
    x: Tensor,
    weights: Sequence[Tensor],
    cu_seqlens: Tensor,
    positions: Tensor,
    n_heads: int,
    window: int,
    rope_base: float,
    bf16: bool = False,
) -> Tensor:
    """``x + W_o window_attention(W_qkv norm(x))``, every map with its bias.

    Args:
        x: [N, D].
        weights: scale and offset of the norm, W_qkv [3 D, D] and b_qkv, W_o [D, D] and b_o.
        cu_seqlens: int [B + 1], token offsets of the packed trajectories.
        positions: int [N], time step of each token.
        n_heads: H.
        window, rope_base: as in :func:`gac_fast.ops.window_attention`, in tokens.
        bf16: round the operands of products, queries, keys and values to bfloat16.

    Returns:
        [N, D], of the dtype of x.

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    norm_w, norm_b, w_qkv, b_qkv, w_o, b_o = weights
    _check.shape("x", x, "N", "D")
    n, dim = x.shape
    if n_heads < 1 or dim % n_heads != 0:
        raise ValueError(f"n_heads: expected a divisor of the width {dim} of x, got {n_heads}")
    names = ("norm_w", "norm_b", "w_qkv", "b_qkv", "w_o", "b_o")
    shapes = ((dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,))
    for name, w, shape in zip(names, weights, shapes, strict=True):
        _check.dtype(f"weights.{name}", w, x.dtype)
        _check.device(f"weights.{name}", w, "x", x)
        _check.shape(f"weights.{name}", w, *shape)
    asks = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    if asks and runs_directly(x, *weights) and _dispatch.active(NORM_LINEAR, x.device) == "cpp":
        y: Tensor = _Block.apply(x, cu_seqlens, positions, n_heads, window, rope_base, bf16, *weights)
        return y
    qkv = norm_linear(x, norm_w, norm_b, w_qkv, b_qkv, bf16).view(n, 3, n_heads, dim // n_heads)
    attended = window_attention_qkv(qkv, cu_seqlens, window, positions, rope_base).reshape(n, dim)
    return x + norm_linear(attended, None, None, w_o, b_o, bf16)
