"""Attention of every token to the plan vectors of its own trajectory: forward and backward.

A program owns a tile of BT tokens of one trajectory and one head; keys and values are n_z <= 16 rows, padded to the 16
that a tensor core takes, so a softmax is complete in one step and the backward needs nothing but q, k and v again. The
gradients of the plan are sums over a trajectory: each tile leaves its part, and a second kernel adds the parts of a
trajectory in the order of its tiles. No atomics: the same bits every time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gac_fast.kernels._launch import INTERPRETED, Launch, Option, choose
from gac_fast.kernels._tiles import bounds, find_tile, n_tiles

__all__ = ["MOST_PLAN_VECTORS", "plan_attention", "plan_attention_backward", "shipped"]

MOST_PLAN_VECTORS = 16
_LOG2_E = 1.4426950408889634


@triton.jit
def _load_rows(p_x, o_row, m_row, stride, WIDTH: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    # [rows, BD]
    return tl.load(
        p_x + (o_row[:, None] * stride + o_d[None, :]), mask=m_row[:, None] & (o_d < WIDTH)[None, :], other=0.0
    )


@triton.jit
def _store_rows(p_x, o_row, m_row, stride, b_x, WIDTH: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    p = p_x + (o_row[:, None] * stride + o_d[None, :])
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_d < WIDTH)[None, :])


@triton.jit
def _softmax(b_s, m_z, scale):
    """Rows of scores [BT, BZ] to weights, in base 2."""
    b_s = tl.where(m_z[None, :], b_s, -float("inf"))
    b_p = tl.exp2((b_s - tl.max(b_s, 1)[:, None]) * scale)
    return b_p / tl.sum(b_p, 1)[:, None]


@triton.jit(do_not_specialize=["n_tokens", "n_sequences"])
def plan_attention_kernel(
    p_q, p_k, p_v, p_cu, p_o,
    n_tokens, n_sequences, n_heads, n_z, scale,
    stride_qt, stride_qh, stride_kb, stride_kz, stride_kh, stride_vb, stride_vz, stride_vh, stride_ot, stride_oh,
    WIDTH: tl.constexpr, BD: tl.constexpr, BZ: tl.constexpr, DOT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One tile and head of the forward."""
    i_b, _, end, first = find_tile(p_cu, n_tokens, n_sequences, tl.program_id(0) // n_heads, BT)
    if first >= end:
        return
    i_t, i_b = first.to(tl.int64), i_b.to(tl.int64)
    i_h = (tl.program_id(0) % n_heads).to(tl.int64)
    o_i, o_z = tl.arange(0, BT), tl.arange(0, BZ)
    m_i, m_z = o_i < end - first, o_z < n_z
    b_q = _load_rows(p_q + i_t * stride_qt + i_h * stride_qh, o_i, m_i, stride_qt, WIDTH, BD).to(DOT)
    b_k = _load_rows(p_k + i_b * stride_kb + i_h * stride_kh, o_z, m_z, stride_kz, WIDTH, BD).to(DOT)
    b_v = _load_rows(p_v + i_b * stride_vb + i_h * stride_vh, o_z, m_z, stride_vz, WIDTH, BD).to(DOT)
    b_p = _softmax(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), m_z, scale)
    b_o = tl.dot(b_p.to(DOT), b_v, input_precision="ieee")
    _store_rows(p_o + i_t * stride_ot + i_h * stride_oh, o_i, m_i, stride_ot, b_o, WIDTH, BD)


@triton.jit(do_not_specialize=["n_tokens", "n_sequences"])
def plan_attention_backward_kernel(
    p_do, p_q, p_k, p_v, p_cu, p_dq, p_parts,
    n_tokens, n_sequences, n_heads, n_z, scale, grad_scale,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kb, stride_kz, stride_kh, stride_vb, stride_vz, stride_vh,
    stride_dt, stride_dh,
    WIDTH: tl.constexpr, BD: tl.constexpr, BZ: tl.constexpr, DOT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dq of one tile and head, and its part of dk and dv: float32 [n_tiles, n_z, 2, H, d]."""
    i_tile = tl.program_id(0) // n_heads
    i_b, _, end, first = find_tile(p_cu, n_tokens, n_sequences, i_tile, BT)
    if first >= end:
        return
    i_t, i_b = first.to(tl.int64), i_b.to(tl.int64)
    i_h = (tl.program_id(0) % n_heads).to(tl.int64)
    o_i, o_z = tl.arange(0, BT), tl.arange(0, BZ)
    m_i, m_z = o_i < end - first, o_z < n_z
    b_q = _load_rows(p_q + i_t * stride_qt + i_h * stride_qh, o_i, m_i, stride_qt, WIDTH, BD).to(DOT)
    b_do = _load_rows(p_do + i_t * stride_gt + i_h * stride_gh, o_i, m_i, stride_gt, WIDTH, BD).to(DOT)
    b_k = _load_rows(p_k + i_b * stride_kb + i_h * stride_kh, o_z, m_z, stride_kz, WIDTH, BD).to(DOT)
    b_v = _load_rows(p_v + i_b * stride_vb + i_h * stride_vh, o_z, m_z, stride_vz, WIDTH, BD).to(DOT)
    b_p = _softmax(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), m_z, scale)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])).to(DOT)
    b_dq = tl.dot(b_ds, b_k, input_precision="ieee") * grad_scale
    _store_rows(p_dq + i_t * stride_dt + i_h * stride_dh, o_i, m_i, stride_dt, b_dq, WIDTH, BD)
    # Rows past the end have q = do = 0 and add nothing.
    b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision="ieee") * grad_scale
    b_dv = tl.dot(tl.trans(b_p.to(DOT)), b_do, input_precision="ieee")
    stride_part = n_heads * WIDTH
    p_part = p_parts + i_tile.to(tl.int64) * (2 * n_z * stride_part) + i_h * WIDTH
    _store_rows(p_part, o_z, m_z, 2 * stride_part, b_dk, WIDTH, BD)
    _store_rows(p_part + stride_part, o_z, m_z, 2 * stride_part, b_dv, WIDTH, BD)


@triton.jit(do_not_specialize=["n_tokens", "size"])
def plan_sum_kernel(p_parts, p_cu, p_out, n_tokens, size, BT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the parts of one trajectory, in the order of its tiles; one program per trajectory and BLOCK elements."""
    i_b = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = bounds(p_cu, n_tokens, i_b)
    # Where find_tile puts them.
    p_part = p_parts + (start // BT + i_b) * size
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, end - start, BT):
        # [BLOCK]
        b_sum += tl.load(p_part + o, mask=o < size, other=0.0)
        p_part += size
    tl.store(p_out + i_b * size + o, b_sum.to(p_out.dtype.element_ty), mask=o < size)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers

_SUM_BLOCK = 256


def _options(width: int, dtype: torch.dtype, backward: bool) -> list[Option]:
    """The likely best first; a backward has one, since the order of its sums depends on the tiles."""
    if dtype == torch.float32:
        return [Option((("BT", 64 if width <= 64 else 16),), 4, 1)]
    if width > 32:
        return [Option((("BT", 64),), 4 if width <= 64 else 8, 1)]
    wide = Option((("BT", 128),), 4, 1)
    return [wide] if backward else [wide, Option((("BT", 64),), 4, 1)]


def _rows(x: Tensor) -> Tensor:
    """Kernels read any strides but these: elements of a head apart, rows that a tile cannot span."""
    return x if x.stride(-1) == 1 and x.stride(-3) < 2**20 else x.contiguous()


def _shared(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[dict[str, Tensor | int | float | None], dict[str, object]]:
    """Arguments and constants of both kernels."""
    n, heads, width = q.shape
    arguments: dict[str, Tensor | int | float | None] = {
        "p_q": q, "p_k": k, "p_v": v, "p_cu": cu_seqlens,
        "n_tokens": n, "n_sequences": cu_seqlens.shape[0] - 1, "n_heads": heads, "n_z": k.shape[1],
        "scale": _LOG2_E / math.sqrt(width), "stride_qt": q.stride(0), "stride_qh": q.stride(1),
    }  # fmt: skip
    for name, x in (("k", k), ("v", v)):
        arguments |= {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bzh")}
    constants: dict[str, object] = {
        "WIDTH": width, "BD": max(16, triton.next_power_of_2(width)), "BZ": MOST_PLAN_VECTORS,
        "DOT": tl.float32 if INTERPRETED or q.dtype == torch.float32 else tl.bfloat16,
    }  # fmt: skip
    return arguments, constants


def _n_tiles(q: Tensor, cu_seqlens: Tensor, option: Option) -> int:
    return n_tiles(q.shape[0], cu_seqlens.shape[0] - 1, dict(option.tiles)["BT"])


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, option: Option) -> list[Launch]:
    arguments, constants = _shared(q, k, v, cu_seqlens)
    arguments |= {"p_o": out, "stride_ot": out.stride(0), "stride_oh": out.stride(1)}
    grid = (_n_tiles(q, cu_seqlens, option) * q.shape[1],)
    return [Launch(plan_attention_kernel, grid, arguments, constants, option)]


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, d_q: Tensor, d_plan: Tensor, parts: Tensor,
    option: Option,
) -> list[Launch]:  # fmt: skip
    arguments, constants = _shared(q, k, v, cu_seqlens)
    arguments |= {
        "p_do": d_out, "p_dq": d_q, "p_parts": parts, "grad_scale": 1 / math.sqrt(q.shape[2]),
        "stride_gt": d_out.stride(0), "stride_gh": d_out.stride(1),
        "stride_dt": d_q.stride(0), "stride_dh": d_q.stride(1),
    }  # fmt: skip
    size = d_plan[0].numel()
    summed = {"p_parts": parts, "p_cu": cu_seqlens, "p_out": d_plan, "n_tokens": q.shape[0], "size": size}
    sum_option = Option((("BT", dict(option.tiles)["BT"]), ("BLOCK", _SUM_BLOCK)), 4, 1)
    tile_grid = (_n_tiles(q, cu_seqlens, option) * q.shape[1],)
    sum_grid = (d_plan.shape[0], triton.cdiv(size, _SUM_BLOCK))
    return [
        Launch(plan_attention_backward_kernel, tile_grid, arguments, constants, option),
        Launch(plan_sum_kernel, sum_grid, summed, {}, sum_option),
    ]


def _parts(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Memory for the parts of the plan's gradient, [n_tiles, n_z, 2, H, d]."""
    n_z, (_, heads, width) = k.shape[1], q.shape
    count = _n_tiles(q, cu_seqlens, _options(width, q.dtype, backward=True)[0])
    return q.new_empty((count, n_z, 2, heads, width), dtype=torch.float32)


def plan_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor) -> None:
    """Fill ``out`` [N, H, d].

    Args:
        q: [N, H, d], N < 2^31 - 256.
        k, v: [B, n_z, H, d], n_z <= 16.
        cu_seqlens: int [B + 1], contiguous.
    """
    if q.numel() == 0:
        return
    q, k, v = _rows(q), _rows(k), _rows(v)

    n, heads, width = q.shape

    def launches(option: Option) -> list[Launch]:
        return _forward(q, k, v, cu_seqlens, out, option)

    key = ("plan_attention", q.dtype, heads, width, n.bit_length())
    for launch in launches(choose(key, launches, _options(width, q.dtype, backward=False), q.device)):
        launch.run()


def plan_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, d_q: Tensor, d_plan: Tensor
) -> None:
    """Fill ``d_q`` [N, H, d] and ``d_plan`` [B, n_z, 2, H, d], contiguous, the gradients of k and v."""
    if q.numel() == 0:
        # Nothing looked at the plans.
        d_plan.zero_()
        return
    d_out, q, k, v = _rows(d_out), _rows(q), _rows(k), _rows(v)
    option = _options(q.shape[2], q.dtype, backward=True)[0]
    for launch in _backward(d_out, q, k, v, cu_seqlens, d_q, d_plan, _parts(q, k, cu_seqlens), option):
        launch.run()


def shipped(dim: int, heads: int, n_z: int, dtype: torch.dtype, *, n_tokens: int = 2**20) -> list[Launch]:
    """Every launch, on tensors that hold nothing, that the launchers may pick at these sizes."""
    width = dim // heads
    q = torch.empty(n_tokens, heads, width, dtype=dtype, device="meta")
    d_plan = torch.empty(512, n_z, 2, heads, width, dtype=dtype, device="meta")
    k, v = d_plan.unbind(2)
    cu_seqlens = torch.empty(513, dtype=torch.int32, device="meta")
    parts = _parts(q, k, cu_seqlens)
    launches = []
    for option in _options(width, dtype, backward=False):
        launches += _forward(q, k, v, cu_seqlens, q, option)
    for option in _options(width, dtype, backward=True):
        launches += _backward(q, q, k, v, cu_seqlens, q, d_plan, parts, option)
    return launches
