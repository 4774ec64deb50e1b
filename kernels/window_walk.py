"""Causal window attention that walks along a trajectory: bfloat16 on Hopper, windows of at most one tile of keys.

A program owns one head of TILES tiles of BT tokens in a row. What a tile has loaded and rotated its successor needs
again: keys and values in the forward, queries and their gradients in the backward. They are handed on in registers, so
that but for where programs begin every row is read once and every score computed once, and what the next tile needs
is on its way while this one is computed. Each gradient is a sum of two products in one order, whatever TILES is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gac_fast.kernels._halves import load_halves, load_rows, rotated, store_halves
from gac_fast.kernels._tiles import find_tile

__all__ = ["window_walk_backward_kernel", "window_walk_kernel"]

# ---------------------------------------------------------------------------------------------------------------------
# Device functions


@triton.jit
def _turned(b_x1, b_x2, b_cos, b_sin, ROTATE: tl.constexpr, DOT: tl.constexpr):
    """Both halves rotated, side by side: [rows, 2 BH]."""
    if ROTATE:
        b_x1, b_x2 = rotated(b_x1, b_x2, b_cos, b_sin)
    b_x = tl.permute(tl.join(b_x1.to(DOT), b_x2.to(DOT)), (0, 2, 1))
    return tl.reshape(b_x, (b_x.shape[0], 2 * b_x.shape[2]))


@triton.jit
def _load_turned(
    p_x, p_angles, o_row, m_row, stride_t, WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
    ROTATE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    b_x1, b_x2 = load_halves(p_x, o_row, m_row, stride_t, HALF, BH)
    if ROTATE:
        b_cos, b_sin = load_halves(p_angles, o_row, m_row, WIDTH, HALF, BH)
        b_x1, b_x2 = rotated(b_x1, b_x2, b_cos, b_sin)
    return _turned(b_x1, b_x2, 0.0, 0.0, False, DOT)


@triton.jit
def _store_turned_back(
    p_x, p_angles, o_row, m_row, stride_t, b_x, WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    b_x1, b_x2 = tl.split(tl.permute(tl.reshape(b_x, (b_x.shape[0], 2, BH)), (0, 2, 1)))
    if ROTATE:
        b_cos, b_sin = load_halves(p_angles, o_row, m_row, WIDTH, HALF, BH)
        b_x1, b_x2 = rotated(b_x1, b_x2, b_cos, -b_sin)
    store_halves(p_x, o_row, m_row, stride_t, b_x1, b_x2, HALF, BH)


@triton.jit
def _weights(b_k, b_v, b_q, b_do, b_lse, b_delta, visible, scale, DOT: tl.constexpr):
    """Softmax weights and the gradient of the scores, both [keys, queries]: what dk and dv want on their left."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_p = tl.where(visible, tl.exp2(b_s * scale - b_lse[None, :]), 0.0)
    return b_p.to(DOT), (b_p * (b_dp - b_delta[None, :])).to(DOT)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=["n_tokens", "n_sequences", "window"])
def window_walk_kernel(
    p_q, p_k, p_v, p_angles, p_cu, p_o, p_lse,
    n_tokens, n_sequences, n_heads, window, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, ROTATE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """o, and the base-2 logarithm of each softmax denominator, [H, N]; ``window`` is at most BT + 1."""
    _i_sequence, start, end, first = find_tile(p_cu, n_tokens, n_sequences, tl.program_id(0) // n_heads, BT * TILES)
    # Offsets that break the contract may lead to before the start.
    first = tl.maximum(first, start)
    if first >= end:
        return
    i_h = (tl.program_id(0) % n_heads).to(tl.int64)
    first_row = first.to(tl.int64)
    # Rows count from the first token of the program.
    p_q += first_row * stride_qt + i_h * stride_qh
    p_k += first_row * stride_kt + i_h * stride_kh
    p_v += first_row * stride_vt + i_h * stride_vh
    p_o += first_row * stride_ot + i_h * stride_oh
    p_angles += first_row * WIDTH
    p_lse += i_h * n_tokens + first
    n_rows = end - first
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, 2 * BH)

    m_before = o_t - BT >= start - first
    b_k_before = _load_turned(p_k, p_angles, o_t - BT, m_before, stride_kt, WIDTH, HALF, BH, ROTATE, DOT)
    b_v_before = load_rows(p_v, o_t - BT, m_before, stride_vt, WIDTH, 2 * BH).to(DOT)
    for t in range(0, tl.minimum(n_rows, BT * TILES), BT):
        o_i = t + o_t
        m_i = o_i < n_rows
        b_q = _load_turned(p_q, p_angles, o_i, m_i, stride_qt, WIDTH, HALF, BH, ROTATE, DOT)
        b_k = _load_turned(p_k, p_angles, o_i, m_i, stride_kt, WIDTH, HALF, BH, ROTATE, DOT)
        b_v = load_rows(p_v, o_i, m_i, stride_vt, WIDTH, 2 * BH)
        # Handed on in registers and read by wgmma from shared memory: not one buffer of the pipeline for both.
        b_v = tl.where(m_i[:, None], b_v, 0.0).to(DOT)
        # The first key that a query sees in the tile before.
        b_low = tl.maximum(o_t + (BT + 1 - window), BT + start - first - t)
        b_s_before = tl.dot(b_q, tl.trans(b_k_before), input_precision="ieee")
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s_before = tl.where(o_t[None, :] >= b_low[:, None], b_s_before, -float("inf"))
        visible = o_t[None, :] <= o_t[:, None]
        if NARROW:
            visible = visible & (o_t[None, :] > o_t[:, None] - window)
        b_s = tl.where(visible, b_s, -float("inf"))
        # Every query sees itself: finite.
        b_max = tl.maximum(tl.max(b_s_before, 1), tl.max(b_s, 1)) * scale
        b_p_before = tl.exp2(b_s_before * scale - b_max[:, None])
        b_p = tl.exp2(b_s * scale - b_max[:, None])
        b_sum = tl.sum(b_p_before, 1) + tl.sum(b_p, 1)
        b_o = tl.dot(b_p_before.to(DOT), b_v_before, input_precision="ieee")
        b_o = tl.dot(b_p.to(DOT), b_v, b_o, input_precision="ieee")
        tl.store(
            p_o + (o_i[:, None] * stride_ot + o_d[None, :]), (b_o / b_sum[:, None]).to(p_o.dtype.element_ty),
            mask=m_i[:, None] & (o_d < WIDTH)[None, :],
        )  # fmt: skip
        tl.store(p_lse + o_i, b_max + tl.log2(b_sum), mask=m_i)
        b_k_before, b_v_before = b_k, b_v


@triton.jit(do_not_specialize=["n_tokens", "n_sequences", "window"])
def window_walk_backward_kernel(
    p_do, p_q, p_k, p_v, p_o, p_lse, p_angles, p_cu, p_dq, p_dk, p_dv,
    n_tokens, n_sequences, n_heads, window, scale, grad_scale,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_dt, stride_dh,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, DOT: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, ROTATE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of the program's tokens; ``window`` is at most BT + 1.

    A step has keys of one tile and queries of the same and the next one: dk and dv are whole, dq of the next tile is
    begun and handed on. Before its first step a program begins the dq of its own first tile.
    """
    _i_sequence, start, end, first = find_tile(p_cu, n_tokens, n_sequences, tl.program_id(0) // n_heads, BT * TILES)
    # Offsets that break the contract may lead to before the start.
    first = tl.maximum(first, start)
    if first >= end:
        return
    i_h = (tl.program_id(0) % n_heads).to(tl.int64)
    first_row = first.to(tl.int64)
    p_do += first_row * stride_gt + i_h * stride_gh
    p_q += first_row * stride_qt + i_h * stride_qh
    p_k += first_row * stride_kt + i_h * stride_kh
    p_v += first_row * stride_vt + i_h * stride_vh
    p_o += first_row * stride_ot + i_h * stride_oh
    p_dq += first_row * stride_dt + i_h * stride_dh
    p_dk += first_row * stride_dt + i_h * stride_dh
    p_dv += first_row * stride_dt + i_h * stride_dh
    p_angles += first_row * WIDTH
    p_lse += i_h * n_tokens + first
    n_rows = end - first
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, 2 * BH)

    m_t = o_t < n_rows
    b_q = _load_turned(p_q, p_angles, o_t, m_t, stride_qt, WIDTH, HALF, BH, ROTATE, DOT)
    b_do = load_rows(p_do, o_t, m_t, stride_gt, WIDTH, 2 * BH)
    b_o = load_rows(p_o, o_t, m_t, stride_ot, WIDTH, 2 * BH)
    # [BT]; rows past the end have do = 0 and add nothing.
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    b_lse = tl.load(p_lse + o_t, mask=m_t, other=0.0)
    b_do = b_do.to(DOT)
    b_dq = tl.zeros((BT, 2 * BH), tl.float32)
    # [keys, queries]: queries of the next tile whose window still holds a key.
    after = o_t[None, :] < o_t[:, None] + (window - BT)
    if first > start:
        m_before = o_t - BT >= start - first
        b_k = _load_turned(p_k, p_angles, o_t - BT, m_before, stride_kt, WIDTH, HALF, BH, ROTATE, DOT)
        b_v = load_rows(p_v, o_t - BT, m_before, stride_vt, WIDTH, 2 * BH).to(DOT)
        b_p, b_ds = _weights(b_k, b_v, b_q, b_do, b_lse, b_delta, after, scale, DOT)
        b_dq = tl.dot(tl.trans(b_ds), b_k, b_dq, input_precision="ieee")
    b_k = _load_turned(p_k, p_angles, o_t, m_t, stride_kt, WIDTH, HALF, BH, ROTATE, DOT)
    b_v = load_rows(p_v, o_t, m_t, stride_vt, WIDTH, 2 * BH).to(DOT)
    for t in range(0, tl.minimum(n_rows, BT * TILES), BT):
        o_i = t + o_t
        o_n = o_i + BT
        m_i = o_i < n_rows
        m_n = o_n < n_rows
        # Of the next tile, on their way while this one is computed; narrow windows have registers for fewer.
        b_q1, b_q2 = load_halves(p_q, o_n, m_n, stride_qt, HALF, BH)
        b_cos, b_sin = 0.0, 0.0
        if ROTATE:
            b_cos, b_sin = load_halves(p_angles, o_n, m_n, WIDTH, HALF, BH)
        b_do_next = load_rows(p_do, o_n, m_n, stride_gt, WIDTH, 2 * BH)
        b_o_next = load_rows(p_o, o_n, m_n, stride_ot, WIDTH, 2 * BH)
        b_lse_next = tl.load(p_lse + o_n, mask=m_n, other=0.0)
        if not NARROW:
            b_k1, b_k2 = load_halves(p_k, o_n, m_n, stride_kt, HALF, BH)
            b_v_next = load_rows(p_v, o_n, m_n, stride_vt, WIDTH, 2 * BH).to(DOT)

        visible = o_t[None, :] >= o_t[:, None]
        if NARROW:
            visible = visible & (o_t[None, :] < o_t[:, None] + window)
        b_p, b_ds = _weights(b_k, b_v, b_q, b_do, b_lse, b_delta, visible, scale, DOT)
        b_dv = tl.dot(b_p, b_do, input_precision="ieee")
        b_dk = tl.dot(b_ds, b_q, input_precision="ieee")
        b_dq = tl.dot(tl.trans(b_ds), b_k, b_dq, input_precision="ieee") * grad_scale
        _store_turned_back(p_dq, p_angles, o_i, m_i, stride_dt, b_dq, WIDTH, HALF, BH, ROTATE)

        if NARROW:
            b_k1, b_k2 = load_halves(p_k, o_n, m_n, stride_kt, HALF, BH)
            b_v_next = load_rows(p_v, o_n, m_n, stride_vt, WIDTH, 2 * BH).to(DOT)
        b_q = _turned(b_q1, b_q2, b_cos, b_sin, ROTATE, DOT)
        b_delta = tl.sum(b_do_next.to(tl.float32) * b_o_next.to(tl.float32), 1)
        # Summed in registers and read by wgmma from shared memory: not one buffer of the pipeline for both.
        b_do = tl.where(m_n[:, None], b_do_next, 0.0).to(DOT)
        b_lse = b_lse_next
        b_p, b_ds = _weights(b_k, b_v, b_q, b_do, b_lse, b_delta, after, scale, DOT)
        b_dv = tl.dot(b_p, b_do, b_dv, input_precision="ieee")
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee") * grad_scale
        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision="ieee")
        _store_turned_back(p_dk, p_angles, o_i, m_i, stride_dt, b_dk, WIDTH, HALF, BH, ROTATE)
        tl.store(
            p_dv + (o_i[:, None] * stride_dt + o_d[None, :]), b_dv.to(p_dv.dtype.element_ty),
            mask=m_i[:, None] & (o_d < WIDTH)[None, :],
        )  # fmt: skip
        b_k, b_v = _turned(b_k1, b_k2, b_cos, b_sin, ROTATE, DOT), b_v_next
