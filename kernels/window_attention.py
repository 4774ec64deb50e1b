"""Causal window attention over packed trajectories, rotary positions inside: forward and backward.

A program owns a tile of BT tokens that never crosses a trajectory. Its keys are those of the tile itself and, before
it, blocks of BP tokens back to the start of the window; in the backward its queries go on in blocks of BP tokens to
where the window of the tile's last token ends. So the work is tokens times window, and one kernel gives dq, dk and dv
with each score computed once for the tile itself and once more at either side.

Short windows (one block before, one after) rotate q and k on the fly. Long ones read q and k that
:func:`rotary_kernel` has rotated, block after block. Scores are in base 2: exp2 is what the hardware has.

In bfloat16 on Hopper short windows are ``window_walk``'s, and everything else is a long one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gac_fast.kernels._halves import load_halves, load_rows, rotated, store_halves
from gac_fast.kernels._launch import INTERPRETED, Launch, Option, architecture_of, choose
from gac_fast.kernels._rotary import cos_sin, rotary_turns
from gac_fast.kernels._tiles import bounds, find_tile, n_tiles
from gac_fast.kernels.window_walk import window_walk_backward_kernel, window_walk_kernel

__all__ = ["shipped", "window_attention", "window_attention_backward"]

_LOG2_E = 1.4426950408889634

# ---------------------------------------------------------------------------------------------------------------------
# Device functions: a head's two halves apart, because rotary pairs are (i, i + d / 2)


@triton.jit
def _moved(p_x, rows, stride_t):
    """The pointer that many rows on; the rows of a long window times their stride may exceed 2^31."""
    return p_x + rows * stride_t.to(tl.int64)


@triton.jit
def _product(b_a1, b_a2, b_b1, b_b2):
    """a b^T over both halves, float32."""
    return tl.dot(b_a2, tl.trans(b_b2), tl.dot(b_a1, tl.trans(b_b1), input_precision="ieee"), input_precision="ieee")


@triton.jit
def _attend(
    b_o, b_max, b_sum, b_q1, b_q2, p_k, p_v, o_row, o_j, b_low, low, stride_kt, stride_vt, p_angles, scale,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, ROTATE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One block of keys before the tile into the running softmax of its queries."""
    m_j = o_j >= low
    b_k1, b_k2 = load_halves(p_k, o_row, m_j, stride_kt, HALF, BH)
    if ROTATE:
        b_cos, b_sin = load_halves(p_angles, o_row, m_j, WIDTH, HALF, BH)
        b_k1, b_k2 = rotated(b_k1, b_k2, b_cos, b_sin)
    b_v = load_rows(p_v, o_row, m_j, stride_vt, WIDTH, BD).to(DOT)
    b_s = _product(b_q1, b_q2, b_k1.to(DOT), b_k2.to(DOT))
    b_s = tl.where(o_j[None, :] >= b_low[:, None], b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_old = tl.exp2((b_max - b_new) * scale)
    b_p = tl.exp2(b_s * scale - (b_new * scale)[:, None])
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(DOT), b_v, b_o * b_old[:, None], input_precision="ieee")
    return b_o, b_new, b_sum


@triton.jit
def _score_gradient(b_s, b_lse, b_dp, b_delta, visible, scale):
    """Softmax weights and the gradient of the scores; ``b_lse`` and ``b_delta`` broadcast against the scores."""
    b_p = tl.where(visible, tl.exp2(b_s * scale - b_lse), 0.0)
    return b_p, b_p * (b_dp - b_delta)


@triton.jit
def _query_gradient(
    b_dq1, b_dq2, b_q1, b_q2, b_do, b_lse, b_delta, p_k, p_v, o_row, o_j, b_low, low, stride_kt, stride_vt,
    p_angles, scale, WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    ROTATE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What one block of keys before the tile adds to its dq."""
    m_j = o_j >= low
    b_k1, b_k2 = load_halves(p_k, o_row, m_j, stride_kt, HALF, BH)
    if ROTATE:
        b_cos, b_sin = load_halves(p_angles, o_row, m_j, WIDTH, HALF, BH)
        b_k1, b_k2 = rotated(b_k1, b_k2, b_cos, b_sin)
    b_k1, b_k2 = b_k1.to(DOT), b_k2.to(DOT)
    b_v = load_rows(p_v, o_row, m_j, stride_vt, WIDTH, BD).to(DOT)
    b_s = _product(b_q1, b_q2, b_k1, b_k2)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    visible = o_j[None, :] >= b_low[:, None]
    _, b_ds = _score_gradient(b_s, b_lse[:, None], b_dp, b_delta[:, None], visible, scale)
    b_dq1 = tl.dot(b_ds.to(DOT), b_k1, b_dq1, input_precision="ieee")
    b_dq2 = tl.dot(b_ds.to(DOT), b_k2, b_dq2, input_precision="ieee")
    return b_dq1, b_dq2


@triton.jit
def _key_gradient(
    b_dk1, b_dk2, b_dv, b_k1, b_k2, b_v, p_q, p_do, p_o, p_lse, p_delta, o_row, o_j, b_high, high,
    stride_qt, stride_gt, stride_ot, p_angles, scale, WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
    BD: tl.constexpr, ROTATE: tl.constexpr, READ_O: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What one block of queries after the tile adds to its dk and dv; delta comes from o where READ_O."""
    m_j = o_j < high
    b_q1, b_q2 = load_halves(p_q, o_row, m_j, stride_qt, HALF, BH)
    if ROTATE:
        b_cos, b_sin = load_halves(p_angles, o_row, m_j, WIDTH, HALF, BH)
        b_q1, b_q2 = rotated(b_q1, b_q2, b_cos, b_sin)
    b_q1, b_q2 = b_q1.to(DOT), b_q2.to(DOT)
    b_do = load_rows(p_do, o_row, m_j, stride_gt, WIDTH, BD)
    # [BP]
    b_lse = tl.load(p_lse + o_j, mask=m_j, other=0.0)
    if READ_O:
        b_o = load_rows(p_o, o_row, m_j, stride_ot, WIDTH, BD)
        b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    else:
        b_delta = tl.load(p_delta + o_j, mask=m_j, other=0.0)
    b_do = b_do.to(DOT)
    # [keys, queries]: what the products below want on their left.
    b_s = _product(b_k1, b_k2, b_q1, b_q2)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    visible = o_j[None, :] < b_high[:, None]
    b_p, b_ds = _score_gradient(b_s, b_lse[None, :], b_dp, b_delta[None, :], visible, scale)
    b_dv = tl.dot(b_p.to(DOT), b_do, b_dv, input_precision="ieee")
    b_dk1 = tl.dot(b_ds.to(DOT), b_q1, b_dk1, input_precision="ieee")
    b_dk2 = tl.dot(b_ds.to(DOT), b_q2, b_dk2, input_precision="ieee")
    return b_dk1, b_dk2, b_dv


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=["n_tokens", "n_sequences", "window"])
def window_attention_kernel(
    p_q, p_k, p_v, p_angles, p_cu, p_o, p_lse,
    n_tokens, n_sequences, n_groups, window, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, HEADS: tl.constexpr,
    ROTATE: tl.constexpr, LOOP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """o, and the base-2 logarithm of each softmax denominator, [H, N]."""
    i_sequence, start, end, first = find_tile(p_cu, n_tokens, n_sequences, tl.program_id(0) // n_groups, BT)
    if first >= end:
        return
    number = (first - start) // BT
    i_group = tl.program_id(0) % n_groups
    # Rows count from the first token of the tile; so do the bounds of what a row sees.
    o_i = tl.arange(0, BT)
    o_p = tl.arange(0, BP) - BP

    for i in range(HEADS):
        # Read again, or all that follows from it would be carried, in registers, from head to head.
        start, end = bounds(p_cu, n_tokens, i_sequence)
        first = start + number * BT
        first_row = first.to(tl.int64)
        m_i = o_i < end - first
        b_low = tl.maximum(o_i - window + 1, start - first)
        i_h = (i_group * HEADS + i).to(tl.int64)
        p_qh = p_q + first_row * stride_qt + i_h * stride_qh
        p_kh = p_k + first_row * stride_kt + i_h * stride_kh
        p_vh = p_v + first_row * stride_vt + i_h * stride_vh
        b_q1, b_q2 = load_halves(p_qh, o_i, m_i, stride_qt, HALF, BH)
        b_k1, b_k2 = load_halves(p_kh, o_i, m_i, stride_kt, HALF, BH)
        p_anglest = p_angles + first_row * WIDTH
        if ROTATE:
            b_cos, b_sin = load_halves(p_anglest, o_i, m_i, WIDTH, HALF, BH)
            b_q1, b_q2 = rotated(b_q1, b_q2, b_cos, b_sin)
            b_k1, b_k2 = rotated(b_k1, b_k2, b_cos, b_sin)
        b_q1, b_q2, b_k1, b_k2 = b_q1.to(DOT), b_q2.to(DOT), b_k1.to(DOT), b_k2.to(DOT)
        b_v = load_rows(p_vh, o_i, m_i, stride_vt, WIDTH, BD).to(DOT)

        # The tile itself first: every row sees itself, so the running maximum is finite from here on.
        visible = o_i[None, :] <= o_i[:, None]
        if NARROW:
            visible = visible & (o_i[None, :] >= b_low[:, None])
        b_s = tl.where(visible, _product(b_q1, b_q2, b_k1, b_k2), -float("inf"))
        b_max = tl.max(b_s, 1)
        b_p = tl.exp2(b_s * scale - (b_max * scale)[:, None])
        b_sum = tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(DOT), b_v, input_precision="ieee")
        for i_p in range(0, tl.minimum(first - start, window - 1) if LOOP else 1, BP):
            b_o, b_max, b_sum = _attend(
                b_o, b_max, b_sum, b_q1, b_q2, _moved(p_kh, -i_p, stride_kt), _moved(p_vh, -i_p, stride_vt),
                o_p, o_p - i_p, b_low, start - first, stride_kt, stride_vt, p_anglest, scale,
                WIDTH, HALF, BH, BD, ROTATE, DOT,
            )  # fmt: skip

        o_d = tl.arange(0, BD)
        p_oh = p_o + first_row * stride_ot + i_h * stride_oh
        tl.store(
            p_oh + (o_i[:, None] * stride_ot + o_d[None, :]), (b_o / b_sum[:, None]).to(p_o.dtype.element_ty),
            mask=m_i[:, None] & (o_d < WIDTH)[None, :],
        )  # fmt: skip
        tl.store(p_lse + i_h * n_tokens + first + o_i, b_max * scale + tl.log2(b_sum), mask=m_i)


@triton.jit(do_not_specialize=["n_tokens"])
def rotary_kernel(
    p_positions, p_turns, p_angles, p_q, p_k, p_rotated,
    n_tokens, n_heads, stride_position, stride_qt, stride_qh, stride_kt, stride_kh,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Angles [N, d], d / 2 cosines and d / 2 sines of each token; with ROTATE q and k too, rotated, [2, N, H, d]."""
    i_t = tl.program_id(0).to(tl.int64) * BT
    o_i = tl.arange(0, BT)
    o_d = tl.arange(0, BH)
    m_i = i_t + o_i < n_tokens
    # [BT], [BH]
    b_position = tl.load(p_positions + (i_t + o_i) * stride_position, mask=m_i, other=0).to(tl.int64)
    b_turns = tl.load(p_turns + o_d, mask=o_d < HALF, other=0)
    b_cos, b_sin = cos_sin(b_position[:, None], b_turns[None, :])
    store_halves(p_angles + i_t * WIDTH, o_i, m_i, WIDTH, b_cos, b_sin, HALF, BH)
    if ROTATE:
        stride_t = n_heads * WIDTH
        for i in range(n_heads):
            i_h = (tl.program_id(1) + i).to(tl.int64)
            p_to = p_rotated + (i_t * stride_t + i_h * WIDTH)
            b_q1, b_q2 = load_halves(p_q + i_t * stride_qt + i_h * stride_qh, o_i, m_i, stride_qt, HALF, BH)
            b_q1, b_q2 = rotated(b_q1, b_q2, b_cos, b_sin)
            store_halves(p_to, o_i, m_i, stride_t, b_q1, b_q2, HALF, BH)
            b_k1, b_k2 = load_halves(p_k + i_t * stride_kt + i_h * stride_kh, o_i, m_i, stride_kt, HALF, BH)
            b_k1, b_k2 = rotated(b_k1, b_k2, b_cos, b_sin)
            p_to += (i_t * 0 + n_tokens) * stride_t
            store_halves(p_to, o_i, m_i, stride_t, b_k1, b_k2, HALF, BH)


@triton.jit(do_not_specialize=["n_tokens", "n_sequences", "window"])
def window_attention_backward_kernel(
    p_do, p_q, p_k, p_v, p_o, p_lse, p_delta, p_angles, p_cu, p_dq, p_dk, p_dv,
    n_tokens, n_sequences, n_groups, window, scale, grad_scale,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_dt, stride_dh,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, HEADS: tl.constexpr,
    ROTATE: tl.constexpr, TURN_BACK: tl.constexpr, LOOP: tl.constexpr, NARROW: tl.constexpr,
    WITH_DQ: tl.constexpr, WITH_DKV: tl.constexpr,
):  # fmt: skip
    """dq of the tile's queries (WITH_DQ), dk and dv of its keys (WITH_DKV).

    Both at once reads every row once; apart, the first leaves delta = sum(do * o) [H, N] for the second.
    """
    i_sequence, start, end, first = find_tile(p_cu, n_tokens, n_sequences, tl.program_id(0) // n_groups, BT)
    if first >= end:
        return
    number = (first - start) // BT
    i_group = tl.program_id(0) % n_groups

    # Nothing is moved out of the loop, or it would be kept in registers that the heads need.
    for i in tl.range(HEADS, disable_licm=True):
        # Read again, or all that follows from it would be carried, in registers, from head to head.
        start, end = bounds(p_cu, n_tokens, i_sequence)
        first = start + number * BT
        first_row = first.to(tl.int64)
        # Rows count from the first token of the tile.
        o_i = tl.arange(0, BT)
        m_i = o_i < end - first
        # Keys before the tile, queries after it (there are none after one that is not full).
        o_p = tl.arange(0, BP) - BP
        o_n = tl.arange(0, BP) + BT
        p_anglest = p_angles + first_row * WIDTH
        b_low = tl.maximum(o_i - window + 1, start - first)
        b_high = tl.minimum(o_i + window, end - first)
        i_h = (i_group * HEADS + i).to(tl.int64)
        p_gh = p_do + first_row * stride_gt + i_h * stride_gh
        p_qh = p_q + first_row * stride_qt + i_h * stride_qh
        p_kh = p_k + first_row * stride_kt + i_h * stride_kh
        p_vh = p_v + first_row * stride_vt + i_h * stride_vh
        p_oh = p_o + first_row * stride_ot + i_h * stride_oh
        p_lseh = p_lse + i_h * n_tokens + first
        p_deltah = p_delta + i_h * n_tokens + first

        b_q1, b_q2 = load_halves(p_qh, o_i, m_i, stride_qt, HALF, BH)
        b_k1, b_k2 = load_halves(p_kh, o_i, m_i, stride_kt, HALF, BH)
        if ROTATE:
            b_cos, b_sin = load_halves(p_anglest, o_i, m_i, WIDTH, HALF, BH)
            b_q1, b_q2 = rotated(b_q1, b_q2, b_cos, b_sin)
            b_k1, b_k2 = rotated(b_k1, b_k2, b_cos, b_sin)
        b_q1, b_q2, b_k1, b_k2 = b_q1.to(DOT), b_q2.to(DOT), b_k1.to(DOT), b_k2.to(DOT)
        b_v = load_rows(p_vh, o_i, m_i, stride_vt, WIDTH, BD).to(DOT)
        b_do = load_rows(p_gh, o_i, m_i, stride_gt, WIDTH, BD)
        # [BT]
        b_lse = tl.load(p_lseh + o_i, mask=m_i, other=0.0)
        if WITH_DQ:
            b_o = load_rows(p_oh, o_i, m_i, stride_ot, WIDTH, BD)
            b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
            if not WITH_DKV:
                tl.store(p_deltah + o_i, b_delta, mask=m_i)
        else:
            b_delta = tl.load(p_deltah + o_i, mask=m_i, other=0.0)
        b_do = b_do.to(DOT)

        # Keys before the tile, the tile itself, queries after it: in this order fewest accumulators live at once.
        if WITH_DQ:
            b_dq1, b_dq2 = tl.zeros((BT, BH), tl.float32), tl.zeros((BT, BH), tl.float32)
            for i_p in range(0, tl.minimum(first - start, window - 1) if LOOP else 1, BP):
                b_dq1, b_dq2 = _query_gradient(
                    b_dq1, b_dq2, b_q1, b_q2, b_do, b_lse, b_delta,
                    _moved(p_kh, -i_p, stride_kt), _moved(p_vh, -i_p, stride_vt), o_p, o_p - i_p, b_low, start - first,
                    stride_kt, stride_vt, p_anglest, scale, WIDTH, HALF, BH, BD, ROTATE, DOT,
                )  # fmt: skip

        # Rows past the end have do = 0 and add nothing.
        visible = o_i[None, :] <= o_i[:, None]
        if NARROW:
            visible = visible & (o_i[None, :] >= b_low[:, None])
        b_s = _product(b_q1, b_q2, b_k1, b_k2)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_p, b_ds = _score_gradient(b_s, b_lse[:, None], b_dp, b_delta[:, None], visible, scale)
        b_p, b_ds = b_p.to(DOT), b_ds.to(DOT)
        if WITH_DQ:
            b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision="ieee") * grad_scale
            b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision="ieee") * grad_scale
            if TURN_BACK:
                b_cos, b_sin = load_halves(p_anglest, o_i, m_i, WIDTH, HALF, BH)
                b_dq1, b_dq2 = rotated(b_dq1, b_dq2, b_cos, -b_sin)
            p_dqh = p_dq + first_row * stride_dt + i_h * stride_dh
            store_halves(p_dqh, o_i, m_i, stride_dt, b_dq1, b_dq2, HALF, BH)

        if WITH_DKV:
            b_dv = tl.dot(tl.trans(b_p), b_do, input_precision="ieee")
            b_dk1 = tl.dot(tl.trans(b_ds), b_q1, input_precision="ieee")
            b_dk2 = tl.dot(tl.trans(b_ds), b_q2, input_precision="ieee")
            for i_n in range(0, tl.minimum(end - first - BT, window - 1) if LOOP else 1, BP):
                b_dk1, b_dk2, b_dv = _key_gradient(
                    b_dk1, b_dk2, b_dv, b_k1, b_k2, b_v,
                    _moved(p_qh, i_n, stride_qt), _moved(p_gh, i_n, stride_gt), _moved(p_oh, i_n, stride_ot),
                    p_lseh, p_deltah, o_n, o_n + i_n, b_high, end - first, stride_qt, stride_gt, stride_ot,
                    p_anglest, scale, WIDTH, HALF, BH, BD, ROTATE, WITH_DQ, DOT,
                )  # fmt: skip
            p_dkh = p_dk + first_row * stride_dt + i_h * stride_dh
            b_dk1, b_dk2 = b_dk1 * grad_scale, b_dk2 * grad_scale
            if TURN_BACK:
                b_cos, b_sin = load_halves(p_anglest, o_i, m_i, WIDTH, HALF, BH)
                b_dk1, b_dk2 = rotated(b_dk1, b_dk2, b_cos, -b_sin)
            store_halves(p_dkh, o_i, m_i, stride_dt, b_dk1, b_dk2, HALF, BH)
            o_d = tl.arange(0, BD)
            p_dvh = p_dv + first_row * stride_dt + i_h * stride_dh
            tl.store(
                p_dvh + (o_i[:, None] * stride_dt + o_d[None, :]), b_dv.to(p_dv.dtype.element_ty),
                mask=m_i[:, None] & (o_d < WIDTH)[None, :],
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


_WALK_TILE = 64


def _walks(q: Tensor, window: int, hopper: bool) -> bool:
    """Whether ``window_walk`` takes it: windows of one tile, and as many registers as there are."""
    return hopper and q.dtype == torch.bfloat16 and window <= _WALK_TILE + 1 and q.shape[2] in (16, 32)


def _walk_option(q: Tensor, window: int, rotates: bool, backward: bool) -> Option:
    """Tiles in a row: as many as leave every processor several programs; no sum is cut by them."""
    n_tiles = q.shape[0] * q.shape[1] // _WALK_TILE
    in_a_row = max(1, min(16, triton.next_power_of_2(n_tiles // 1056 + 1) // 2))
    tiles = (("BT", _WALK_TILE), ("TILES", in_a_row))
    if backward:
        return Option(tiles, 4, 2)
    # Four programs on a processor, or three, without spills: 533 and 580 us for a million tokens, window 64; else 754.
    return Option(tiles, 4, 3 if rotates else 2, 128 if rotates and window >= _WALK_TILE else 168)


def _is_long(window: int, width: int, dtype: torch.dtype, hopper: bool) -> bool:
    """Whether the keys before a tile come block after block, rotated beforehand.

    Before Hopper always: products read both operands from registers there, and larger blocks would spill.
    """
    return not hopper or dtype != torch.float32 or window > 65 or width > 32


def _options(q: Tensor, window: int, rotates: bool, hopper: bool, backward: bool) -> list[Option]:
    """The likely best first, each as (BT, BP, HEADS, warps, stages, registers).

    Tiles of 64 tokens are what one group of four warps multiplies at once.
    """
    if _walks(q, window, hopper):
        return [_walk_option(q, window, rotates, backward)]
    width = q.shape[2]
    is_long = _is_long(window, width, q.dtype, hopper)
    found: list[tuple[int, int, int, int, int, int | None]]
    if q.dtype == torch.float32:
        if is_long:
            found = [(32, 16, 1, 4, 1, None) if width <= 64 else (16, 16, 1, 8, 1, None)]
        else:
            # Blocks of 64 keys even where fewer would do: smaller ones made the compiler spill.
            found = [(32, 64, 1, 4, 1, None)]
    elif width > 64:
        found = [(64, 32, 1, 8, 2, None)]
        if backward and (width > 128 or not hopper):
            found = [(16, 16, 1, 8, 2, None)]
    else:
        found = [(64, 32 if width >= 16 else 16, 1, 4, 2, None)]
        if hopper:
            found = [(64, 64, 1, 4, 2, None)]
    return [
        Option((("BT", bt), ("BP", bp), ("HEADS", n_together)), warps, stages, registers)
        for bt, bp, n_together, warps, stages, registers in found
    ]


def _rows(x: Tensor) -> Tensor:
    """Kernels read [N, H, d] of any strides but these: elements of a head apart, rows that a tile cannot span."""
    return x if x.stride(2) == 1 and x.stride(0) < 2**20 else x.contiguous()


def _constants(q: Tensor) -> dict[str, object]:
    width = q.shape[2]
    return {
        "WIDTH": width, "HALF": width // 2,
        "BH": max(16, triton.next_power_of_2(width // 2)), "BD": max(16, triton.next_power_of_2(width)),
        "DOT": tl.float32 if INTERPRETED or q.dtype == torch.float32 else tl.bfloat16,
    }  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("th")}


class _Inputs(NamedTuple):
    """What forward and backward have in common, as the kernels read it."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    window: int
    positions: Tensor | None
    turns: Tensor | None
    rotated: Tensor | None
    """Memory for q and k of a long window, [2, N, H, d]."""
    is_long: bool
    walks: bool
    """Whether a program walks along a trajectory (``window_walk``)."""


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, base: float,
    hopper: bool,
) -> _Inputs:  # fmt: skip
    n, _, width = q.shape
    window = min(window, n)
    walks = _walks(q, window, hopper)
    is_long = not walks and _is_long(window, width, q.dtype, hopper)
    turns = None if positions is None else rotary_turns(width, base, q.device)
    rotated = q.new_empty((2, *q.shape)) if is_long and positions is not None else None
    return _Inputs(_rows(q), _rows(k), _rows(v), cu_seqlens, window, positions, turns, rotated, is_long, walks)


def _rotary(x: _Inputs, angles: Tensor) -> list[Launch]:
    """None without positions."""
    if x.positions is None:
        return []
    constants = {name: value for name, value in _constants(x.q).items() if name in ("WIDTH", "HALF", "BH")}
    constants["ROTATE"] = x.rotated is not None
    # Half the tokens where the halves of a head are wider than 64: all of a tile's angles stay in registers.
    tokens = 32 if constants["BH"] <= 64 else 16
    option = Option((("BT", tokens),), 4, 1)
    arguments = {
        "p_positions": x.positions, "p_turns": x.turns, "p_angles": angles,
        "p_q": x.q, "p_k": x.k, "p_rotated": x.rotated, "n_tokens": x.q.shape[0], "n_heads": x.q.shape[1],
        "stride_position": x.positions.stride(0), **_strides(q=x.q, k=x.k),
    }  # fmt: skip
    return [Launch(rotary_kernel, (triton.cdiv(x.q.shape[0], tokens),), arguments, constants, option)]


def _tile_launch(
    kernel: object, x: _Inputs, option: Option, arguments: dict[str, Tensor | int | float | None],
    strides: dict[str, Tensor], flags: dict[str, bool],
) -> Launch:  # fmt: skip
    """A launch over tiles and heads with what both kernels take."""
    q, k = (x.q, x.k) if x.rotated is None else x.rotated.unbind(0)
    (n, heads, width), tiles, n_sequences = q.shape, dict(option.tiles), x.cu_seqlens.shape[0] - 1
    # The heads of a tile side by side: neighbours in memory, they share sectors and angles in the L2 cache.
    n_groups = heads // tiles["HEADS"]
    arguments = {
        "p_q": q, "p_k": k, "p_v": x.v, "p_cu": x.cu_seqlens, "n_tokens": n, "n_sequences": n_sequences,
        "n_groups": n_groups, "window": x.window, "scale": _LOG2_E / math.sqrt(width),
        **arguments, **_strides(q=q, k=k, v=x.v, **strides),
    }  # fmt: skip
    constants = _constants(q) | flags | {
        "ROTATE": x.positions is not None and not x.is_long, "LOOP": x.is_long, "NARROW": x.window < tiles["BT"],
    }  # fmt: skip
    return Launch(kernel, (n_tiles(n, n_sequences, tiles["BT"]) * n_groups,), arguments, constants, option)


def _walk_launch(
    kernel: object, x: _Inputs, option: Option, arguments: dict[str, Tensor | int | float | None],
    strides: dict[str, Tensor],
) -> Launch:  # fmt: skip
    (n, heads, width), tiles, n_sequences = x.q.shape, dict(option.tiles), x.cu_seqlens.shape[0] - 1
    arguments = {
        "p_q": x.q, "p_k": x.k, "p_v": x.v, "p_cu": x.cu_seqlens, "n_tokens": n, "n_sequences": n_sequences,
        "n_heads": heads, "window": x.window, "scale": _LOG2_E / math.sqrt(width),
        **arguments, **_strides(q=x.q, k=x.k, v=x.v, **strides),
    }  # fmt: skip
    constants: dict[str, object] = {name: value for name, value in _constants(x.q).items() if name != "BD"}
    constants |= {
        "BH": max(8, triton.next_power_of_2(width // 2)),
        "ROTATE": x.positions is not None, "NARROW": x.window < tiles["BT"],
    }  # fmt: skip
    grid = (n_tiles(n, n_sequences, tiles["BT"] * tiles["TILES"]) * heads,)
    return Launch(kernel, grid, arguments, constants, option)


def _forward(x: _Inputs, out: Tensor, lse: Tensor, angles: Tensor, option: Option) -> list[Launch]:
    arguments: dict[str, Tensor | int | float | None] = {"p_angles": angles, "p_o": out, "p_lse": lse}
    if x.walks:
        return [*_rotary(x, angles), _walk_launch(window_walk_kernel, x, option, arguments, {"o": out})]
    return [*_rotary(x, angles), _tile_launch(window_attention_kernel, x, option, arguments, {"o": out}, {})]


def _backward(
    x: _Inputs, d_out: Tensor, out: Tensor, lse: Tensor, angles: Tensor, delta: Tensor, grads: Tensor, option: Option
) -> list[Launch]:
    d_q, d_k, d_v = grads.unbind(1)
    arguments: dict[str, Tensor | int | float | None] = {
        "p_do": d_out, "p_o": out, "p_lse": lse, "p_delta": delta, "p_angles": angles,
        "p_dq": d_q, "p_dk": d_k, "p_dv": d_v, "grad_scale": 1 / math.sqrt(x.q.shape[2]),
    }  # fmt: skip
    strides = {"g": d_out, "o": out, "d": d_q}
    if x.walks:
        del arguments["p_delta"]
        return [_walk_launch(window_walk_backward_kernel, x, option, arguments, strides)]
    launches = _rotary(x, angles) if x.is_long else []
    for with_dq, with_dkv in [(True, False), (False, True)] if x.is_long else [(True, True)]:
        flags = {"TURN_BACK": x.positions is not None, "WITH_DQ": with_dq, "WITH_DKV": with_dkv}
        launches.append(_tile_launch(window_attention_backward_kernel, x, option, arguments, strides, flags))
    return launches


def _key(what: str, x: _Inputs) -> tuple[object, ...]:
    """Sizes in classes: octaves of tokens, and windows that the same options serve."""
    n, heads, width = x.q.shape
    return what, x.q.dtype, heads, width, n.bit_length(), (x.window - 1).bit_length(), x.positions is not None


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None, base: float,
    out: Tensor, lse: Tensor, angles: Tensor,
) -> None:  # fmt: skip
    """Fill ``out`` [N, H, d] and what the backward reads again.

    That is ``lse`` float32 [H, N], the base-2 logarithms of the softmax denominators, and, with positions, ``angles``
    float32 [N, d]: d / 2 cosines and d / 2 sines of each token.

    Args:
        q, k, v: [N, H, d], N * H < 2^31.
        cu_seqlens: int [B + 1], contiguous.
        window: in tokens.
        positions: int [N] or None.
        base: of the rotary frequencies.
    """
    if q.numel() == 0:
        return
    hopper = architecture_of(q) >= 90
    x = _inputs(q, k, v, cu_seqlens, window, positions, base, hopper)

    def launches(option: Option) -> list[Launch]:
        return _forward(x, out, lse, angles, option)

    options = _options(x.q, x.window, positions is not None, hopper, backward=False)
    for launch in launches(choose(_key("window_attention", x), launches, options, x.q.device)):
        launch.run()


def window_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor | None,
    base: float, out: Tensor, lse: Tensor, angles: Tensor, grads: Tensor,
) -> None:  # fmt: skip
    """Fill ``grads`` [N, 3, H, d] with the gradients of q, k and v; arguments as :func:`window_attention` had them."""
    if q.numel() == 0:
        return
    hopper = architecture_of(q) >= 90
    x = _inputs(q, k, v, cu_seqlens, window, positions, base, hopper)
    d_out, delta = _rows(d_out), torch.empty_like(lse) if x.is_long else lse

    def launches(option: Option) -> list[Launch]:
        return _backward(x, d_out, out, lse, angles, delta, grads, option)

    options = _options(x.q, x.window, positions is not None, hopper, backward=True)
    for launch in launches(choose(_key("window_attention_backward", x), launches, options, x.q.device)):
        launch.run()


def shipped(
    dim: int, heads: int, window: int, dtype: torch.dtype, *, n_tokens: int = 2**20, rotate: bool = True,
    architecture: int = 90,
) -> list[Launch]:  # fmt: skip
    """Every launch, on tensors that hold nothing, that the launchers may pick at these sizes; ``window`` in tokens."""
    width, hopper = dim // heads, architecture >= 90
    qkv = torch.empty(n_tokens, 3, heads, width, dtype=dtype, device="meta")
    out, grads = torch.empty(n_tokens, heads, width, dtype=dtype, device="meta"), torch.empty_like(qkv)
    lse, angles = torch.empty(heads, n_tokens, device="meta"), torch.empty(n_tokens, width, device="meta")
    cu_seqlens = torch.empty(513, dtype=torch.int32, device="meta")
    positions = torch.empty(n_tokens, dtype=torch.int64, device="meta") if rotate else None
    q, k, v = qkv.unbind(1)
    x = _inputs(q, k, v, cu_seqlens, window, positions, 10000.0, hopper)
    found = []
    for option in _options(q, x.window, rotate, hopper, backward=False):
        found += _forward(x, out, lse, angles, option)
    for option in _options(q, x.window, rotate, hopper, backward=True):
        found += _backward(x, out, out, lse, angles, lse, grads, option)
    # The launch of the angles is the same for every option.
    return list({(str(one.option), one.name, *one.constants.items()): one for one in found}.values())
