"""Rows of one head inside a kernel; its two halves apart where rotary pairs (i, i + d / 2) are turned."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_halves", "load_rows", "rotated", "store_halves"]


@triton.jit
def load_halves(p_x, o_row, m_row, stride_t, HALF: tl.constexpr, BH: tl.constexpr):
    o_d = tl.arange(0, BH)
    # [rows, BH] twice
    p = p_x + (o_row[:, None] * stride_t + o_d[None, :])
    m = m_row[:, None] & (o_d < HALF)[None, :]
    return tl.load(p, mask=m, other=0.0), tl.load(p + HALF, mask=m, other=0.0)


@triton.jit
def store_halves(p_x, o_row, m_row, stride_t, b_x1, b_x2, HALF: tl.constexpr, BH: tl.constexpr):
    o_d = tl.arange(0, BH)
    p = p_x + (o_row[:, None] * stride_t + o_d[None, :])
    m = m_row[:, None] & (o_d < HALF)[None, :]
    tl.store(p, b_x1.to(p_x.dtype.element_ty), mask=m)
    tl.store(p + HALF, b_x2.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def load_rows(p_x, o_row, m_row, stride_t, WIDTH: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    # [rows, BD]
    return tl.load(
        p_x + (o_row[:, None] * stride_t + o_d[None, :]), mask=m_row[:, None] & (o_d < WIDTH)[None, :], other=0.0
    )


@triton.jit
def rotated(b_x1, b_x2, b_cos, b_sin):
    b_x1, b_x2 = b_x1.to(tl.float32), b_x2.to(tl.float32)
    return b_x1 * b_cos - b_x2 * b_sin, b_x2 * b_cos + b_x1 * b_sin
