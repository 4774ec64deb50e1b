"""One environment step of the whole decoder on the GPU: a single launch through all layers, without grid barriers.

A program owns a few environments through all layers, with both tokens of a step (C = 2) side by side: rows
``token * BE + environment``, the state token first. The residual stream stays in registers; what has to change its
layout between a product and an attention goes through memory of the program's own, which stays in its caches. Weights
are streamed from the second-level cache, packed as [in, out] matrices of all layers in one buffer
(:class:`Packed`), so that the loop over layers is a loop.

The ring is read as it was before the step, and the step's own tokens from the program's memory: s_t may overwrite the
slot that a_{t-1} is the last to see. Both are folded into one softmax as they come; slots that no token of the episode
has filled are not read at all.

Counted for 1,024 environments of the gym size (D = 128, 3 layers, 64 slots, C = 2) in bfloat16: rings 101 MB and plan
vectors 13 MB from memory, weights 1.4 MB into each of 128 programs from the second-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gac_fast.kernels._launch import Launch, Option

__all__ = ["Packed", "decode_step_kernel", "launch", "new_scratch", "option_for", "refusal", "shipped"]

WIDTHS = (64, 96, 128, 192, 256)
# Tensors of a layer, in the order of ``gac_fast.reference.LayerWeights``.
LAYER_TENSORS = 18

_EPS = tl.constexpr(1e-5)


@triton.jit
def _load(p, mask, MASKED: tl.constexpr):
    if MASKED:
        b_x = tl.load(p, mask=mask, other=0.0)
    else:
        b_x = tl.load(p)
    return b_x


@triton.jit
def _norm(x, p_w, p_b, D: tl.constexpr, DP: tl.constexpr):
    """Layer norm of rows x [M, DP] that are zero from D on, and so is the result."""
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    b_w = _load(p_w + o_d, m_d, D != DP)
    b_b = _load(p_b + o_d, m_d, D != DP)
    mean = tl.sum(x, axis=1) / D
    centred = x - mean[:, None]
    if D != DP:
        centred = tl.where(m_d[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    return centred * tl.rsqrt(variance + _EPS)[:, None] * b_w[None, :] + b_b[None, :]


@triton.jit
def _add_product(
    x, p_a, p_w, p_b, o_m, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """x + a W + b, with a [M, D] in memory and W [D, D]."""
    o_d = tl.arange(0, DP)
    o_k = tl.arange(0, BK)
    m_d = o_d < D
    x += _load(p_b + o_d, m_d, D != DP)[None, :]
    for k in tl.range(0, D, BK, num_stages=STAGES):
        # [M, BK], [BK, DP]
        b_a = tl.load(p_a + o_m[:, None] * D + (k + o_k)[None, :])
        b_w = _load(p_w + (k + o_k)[:, None] * D + o_d[None, :], m_d[None, :], D != DP)
        x = tl.dot(b_a, b_w, x, input_precision="ieee")
    return x


@triton.jit
def _fold(q, k, v, seen, top, total, mixed):
    """Takes keys and values [WB, EA, HP, DHP] into a running softmax (base 2) of q [1, EA, HP, DHP]; seen [WB, EA]."""
    # [WB, EA, HP]
    score = tl.sum(q * k, axis=3)
    score = tl.where(seen[:, :, None], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, axis=0))
    weight = tl.exp2(score - new_top[None, :, :])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, axis=0)
    mixed = mixed * shrink[:, :, None] + tl.sum(weight[:, :, :, None] * v, axis=0)
    return new_top, total, mixed


@triton.jit
def _cos_sin(turns):
    """Cosine and sine of 2 pi turns, float32 of float64: exact to 1e-7 however many turns there are."""
    quarters = 4.0 * (turns - tl.floor(turns))
    nearest = tl.floor(quarters + 0.5)
    theta = ((quarters - nearest) * 1.5707963267948966).to(tl.float32)
    quadrant = nearest.to(tl.int32)
    t2 = theta * theta
    s = theta + theta * t2 * (-1.6666654611e-1 + t2 * (8.3321608736e-3 - t2 * 1.9515295891e-4))
    c = 1.0 - 0.5 * t2 + t2 * t2 * (4.166664568298827e-2 + t2 * (-1.388731625493765e-3 + t2 * 2.443315711809948e-5))
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return cosine, sine


@triton.jit
def _tanh(x):
    """To 2e-7 of its own size: below 0.625 a polynomial (Cephes), above by the exponential."""
    z = x * x
    p = z * -5.70498872745e-3 + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = x + x * z * p
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    # A NaN compares false, and `small` keeps it.
    return tl.where(tl.abs(x) > 0.625, tl.where(x < 0, -large, large), small)


@triton.jit
def _rotations(
    p_steps, p_turns, p_rotation, i_first, n_rows,
    C: tl.constexpr, TURNS: tl.constexpr, TP: tl.constexpr, EA: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Cosines [M, d/2], then sines, of the positions of a program's tokens."""
    o_m = tl.arange(0, C * BE)
    is_state = o_m < BE
    o_row = i_first + o_m % BE
    m_row = (o_m % BE < EA) & (o_row < n_rows)
    steps = tl.load(p_steps + o_row, mask=m_row, other=0)
    position = tl.maximum(steps - tl.where(is_state, 0, 1), 0)
    o_t = tl.arange(0, TP)
    m_t = o_t < TURNS
    turn = tl.load(p_turns + o_t, mask=m_t, other=0.0)
    cosine, sine = _cos_sin(position.to(tl.float64)[:, None] * turn[None, :])
    p_turn = p_rotation + o_m[:, None] * TURNS + o_t[None, :]
    tl.store(p_turn, cosine, mask=m_t[None, :])
    tl.store(p_turn + C * BE * TURNS, sine, mask=m_t[None, :])


@triton.jit
def _embed(
    p_obs, p_obs_mean, p_obs_std, p_edges, p_last, i_first, n_rows, obs_dim, act_dim, stride_obs_row, stride_obs,
    C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, EA: tl.constexpr, BE: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Tokens [M, DP] of a program's environments, in float32."""
    o_m = tl.arange(0, C * BE)
    is_state = o_m < BE
    o_row = i_first + o_m % BE
    m_row = (o_m % BE < EA) & (o_row < n_rows)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    p_state_b = p_edges + obs_dim * D
    p_action_w = p_state_b + D
    x = tl.zeros([C * BE, DP], tl.float32) + _load(p_state_b + o_d, m_d, D != DP)[None, :]
    if C == 2:
        x = tl.where(is_state[:, None], x, _load(p_action_w + act_dim * D + o_d, m_d, D != DP)[None, :])
    o_o = tl.arange(0, BO)
    for k in range(0, obs_dim, BO):
        m_k = k + o_o < obs_dim
        # [M, BO], [BO, DP]
        b_obs = tl.load(
            p_obs + o_row[:, None] * stride_obs_row + (k + o_o).to(tl.int64)[None, :] * stride_obs,
            mask=(m_row & is_state)[:, None] & m_k[None, :],
            other=0.0,
        )
        if p_obs_mean is not None:
            b_mean = tl.load(p_obs_mean + k + o_o, mask=m_k, other=0.0)
            b_std = tl.load(p_obs_std + k + o_o, mask=m_k, other=1.0)
            b_obs = (b_obs - b_mean[None, :]) / b_std[None, :]
            b_obs = tl.where(is_state[:, None] & m_k[None, :], b_obs, 0.0)
        b_e = tl.load(p_edges + (k + o_o)[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
        x = tl.dot(b_obs, b_e, x, input_precision="ieee")
    if C == 2:
        for k in range(0, act_dim, BO):
            m_k = k + o_o < act_dim
            b_last = tl.load(
                p_last + o_row[:, None] * act_dim + (k + o_o)[None, :],
                mask=(m_row & (o_m >= BE))[:, None] & m_k[None, :],
                other=0.0,
            )
            b_e = tl.load(
                p_action_w + (k + o_o)[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0
            )
            x = tl.dot(b_last, b_e, x, input_precision="ieee")
    return x


@triton.jit
def _act(
    x, p_new, p_norm, p_last, p_out, p_action_mid, p_action_half, i_first, n_rows, act_dim,
    C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ACT_P: tl.constexpr, EA: tl.constexpr, BE: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    """Last norm and head of the state tokens, in float32; p_new is memory of the program's own."""
    o_m = tl.arange(0, C * BE)
    is_state = o_m < BE
    o_row = i_first + o_m % BE
    m_row = (o_m % BE < EA) & (o_row < n_rows)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    o_o = tl.arange(0, BO)
    o_a = tl.arange(0, ACT_P)
    m_a = o_a < act_dim
    b_x = _norm(x, p_norm, p_norm + D, D, DP)
    tl.store(p_new + o_m[:, None] * D + o_d[None, :], b_x, mask=m_d[None, :])
    tl.debug_barrier()
    p_head_w = p_norm + 2 * D
    head = tl.zeros([C * BE, ACT_P], tl.float32) + tl.load(p_head_w + act_dim * D + o_a, mask=m_a, other=0.0)[None, :]
    for k in range(0, D, BO):
        # [M, BO], [BO, ACT_P]
        b_n = tl.load(p_new + o_m[:, None] * D + (k + o_o)[None, :])
        b_e = tl.load(p_head_w + o_a[None, :] * D + (k + o_o)[:, None], mask=m_a[None, :], other=0.0)
        head = tl.dot(b_n, b_e, head, input_precision="ieee")
    mean = _tanh(head)
    o_action = o_row[:, None] * act_dim + o_a[None, :]
    m_action = (m_row & is_state)[:, None] & m_a[None, :]
    tl.store(p_last + o_action, mean, mask=m_action)
    if p_action_mid is not None:
        b_half = tl.load(p_action_half + o_a, mask=m_a, other=0.0)
        b_mid = tl.load(p_action_mid + o_a, mask=m_a, other=0.0)
        mean = mean * b_half[None, :] + b_mid[None, :]
    tl.store(p_out + o_action, mean, mask=m_action)


@triton.jit
def decode_step_kernel(
    p_obs,
    p_obs_mean,
    p_obs_std,
    p_action_mid,
    p_action_half,
    p_matrices,
    p_vectors,
    p_edges,
    p_turns,
    p_ring_k,
    p_ring_v,
    p_plan_k,
    p_plan_v,
    p_steps,
    p_last,
    p_out,
    p_new,
    p_mixed,
    p_rotation,
    n_rows,
    n_layers,
    window,
    obs_dim,
    act_dim,
    stride_obs_row,
    stride_obs,
    q_scale,
    C: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    DHP: tl.constexpr,
    HIDDEN: tl.constexpr,
    N_Z: tl.constexpr,
    ZB: tl.constexpr,
    ACT_P: tl.constexpr,
    EA: tl.constexpr,
    BE: tl.constexpr,
    WB: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BO: tl.constexpr,
    STAGES: tl.constexpr,
    RING_STAGES: tl.constexpr,
):
    """Environments [EA i, EA (i + 1)) for program i, in BE rows per token (products take 16 rows at least)."""
    M: tl.constexpr = C * BE
    DH: tl.constexpr = D // H
    HALF: tl.constexpr = D // 2
    TURNS: tl.constexpr = DH // 2
    # Places in the packed buffers, see Packed.
    W_O: tl.constexpr = 3 * D * D
    W_PLAN_Q: tl.constexpr = 4 * D * D
    W_PLAN_O: tl.constexpr = 5 * D * D
    W_IN: tl.constexpr = 6 * D * D
    W_OUT: tl.constexpr = 6 * D * D + D * HIDDEN
    MATRICES: tl.constexpr = 6 * D * D + 2 * D * HIDDEN
    VECTORS: tl.constexpr = 13 * D + HIDDEN
    operand = p_matrices.dtype.element_ty

    i_program = tl.program_id(0).to(tl.int64)
    i_first = i_program * EA
    p_new += i_program * (M * 3 * D)
    p_mixed += i_program * (M * D)
    p_rotation += i_program * (2 * M * TURNS)

    _rotations(p_steps, p_turns, p_rotation, i_first, n_rows, C, TURNS, DHP // 2, EA, BE)
    x = _embed(
        p_obs, p_obs_mean, p_obs_std, p_edges, p_last, i_first, n_rows, obs_dim, act_dim, stride_obs_row, stride_obs,
        C, D, DP, EA, BE, BO,
    )  # fmt: skip
    # Rotations are stored by some threads and loaded by others.
    tl.debug_barrier()

    PADDED: tl.constexpr = (HP != H) or (DHP != DH)
    i_all = i_first + tl.arange(0, EA)
    t = tl.load(p_steps + i_all, mask=i_all < n_rows, other=0)
    if C == 2:
        # Token 2 t - 1 is the action's; in the first step there is none.
        n_before = tl.minimum(tl.maximum(2 * t - 1, 0), window).to(tl.int32)
        slot_action = tl.where(t > 0, (2 * t - 1) % window, -1).to(tl.int32)
        slot_state = ((2 * t) % window).to(tl.int32)
        slot_gone = slot_action
    else:
        n_before = tl.minimum(t, window).to(tl.int32)
        slot_state = (t % window).to(tl.int32)
        slot_gone = slot_state
    n_before = tl.where(i_all < n_rows, n_before, 0)
    n_slots = tl.max(n_before, axis=0)

    for i_layer in range(n_layers):
        p_w = p_matrices + tl.cast(i_layer, tl.int64) * MATRICES
        p_v = p_vectors + tl.cast(i_layer, tl.int64) * VECTORS
        # Offsets that seem to depend on the layer: the compiler would otherwise keep hundreds of them in registers.
        zero = i_layer // n_layers
        o_m = tl.arange(0, M) + zero
        o_d = tl.arange(0, DP)
        m_d = o_d < D
        o_p = tl.arange(0, BP)
        o_n = tl.arange(0, BN)
        o_g = tl.arange(0, BH)
        o_w = tl.arange(0, WB) + zero
        o_z = tl.arange(0, ZB) + zero
        o_e = tl.arange(0, EA) + zero
        o_h = tl.arange(0, HP) + zero
        o_j = tl.arange(0, DHP)
        i_env = i_first + o_e
        m_env = i_env < n_rows
        # [1, 1, HP, DHP]
        o_hd = (o_h[:, None] * DH + o_j[None, :])[None, None, :, :]
        m_hd = ((o_h < H)[:, None] & (o_j < DH)[None, :])[None, None, :, :]
        ring_of = i_env[None, :, None, None] * window * D + o_hd
        plan_of = i_env[None, :, None, None] * (N_Z * D) + o_hd
        # [1, EA, HP, DHP], rows of this program's memory
        new_of = o_e[None, :, None, None] * (3 * D) + o_hd
        # [EA, HP, DHP]
        o_hd3 = (o_h[:, None] * DH + o_j[None, :])[None, :, :]
        m_hd3 = ((o_h < H)[:, None] & (o_j < DH)[None, :])[None, :, :]
        out_of = o_e[:, None, None] * D + o_hd3

        # -------------------------------------------------------------------------------------------------------------
        # Queries, keys and values; q and k in halves, so that a rotation is two products of columns

        b_x = _norm(x, p_v, p_v + D, D, DP).to(operand)
        for j in tl.range(0, D, BP, num_stages=STAGES):
            # Columns: first halves of q, second ones, then those of k.
            i_part = j // HALF
            o_pair = j - i_part * HALF + o_p
            p_1 = p_w + o_d[:, None] * (3 * D) + i_part * D + o_pair[None, :]
            b_1 = tl.dot(b_x, _load(p_1, m_d[:, None], D != DP), input_precision="ieee")
            b_2 = tl.dot(b_x, _load(p_1 + HALF, m_d[:, None], D != DP), input_precision="ieee")
            p_b = p_v + 2 * D + i_part * D + o_pair
            b_1 += tl.load(p_b)[None, :]
            b_2 += tl.load(p_b + HALF)[None, :]
            p_cos = p_rotation + o_m[:, None] * TURNS + (o_pair % TURNS)[None, :]
            scale = tl.where(i_part == 0, q_scale, 1.0)
            b_cos = tl.load(p_cos) * scale
            b_sin = tl.load(p_cos + M * TURNS) * scale
            o_column = i_part * D + o_pair // TURNS * DH + o_pair % TURNS
            p_rotated = p_new + o_m[:, None] * (3 * D) + o_column[None, :]
            tl.store(p_rotated, b_1 * b_cos - b_2 * b_sin)
            tl.store(p_rotated + TURNS, b_2 * b_cos + b_1 * b_sin)
        for j in tl.range(2 * D, 3 * D, BN, num_stages=STAGES):
            b_w = _load(p_w + o_d[:, None] * (3 * D) + (j + o_n)[None, :], m_d[:, None], D != DP)
            b_1 = tl.dot(b_x, b_w, input_precision="ieee") + tl.load(p_v + 2 * D + j + o_n)[None, :]
            tl.store(p_new + o_m[:, None] * (3 * D) + (j + o_n)[None, :], b_1)
        tl.debug_barrier()

        # -------------------------------------------------------------------------------------------------------------
        # Attention to the ring as it was, and to the step's own tokens

        p_q = p_new + new_of
        q_s = _load(p_q, m_hd, PADDED)
        # As the ring will hold them.
        b_ks = _load(p_q + D, m_hd, PADDED).to(operand).to(tl.float32)
        b_vs = _load(p_q + 2 * D, m_hd, PADDED).to(operand).to(tl.float32)
        one = tl.full([1, EA], 1, tl.int1)
        nothing = tl.zeros([EA, HP, DHP], tl.float32)
        lowest = tl.full([EA, HP], float("-inf"), tl.float32)
        none = tl.zeros([EA, HP], tl.float32)
        top_s, total_s, mixed_s = _fold(q_s, b_ks, b_vs, one, lowest, none, nothing)
        if C == 2:
            p_qa = p_q + BE * 3 * D
            q_a = _load(p_qa, m_hd, PADDED)
            b_ka = _load(p_qa + D, m_hd, PADDED).to(operand).to(tl.float32)
            b_va = _load(p_qa + 2 * D, m_hd, PADDED).to(operand).to(tl.float32)
            top_a, total_a, mixed_a = _fold(q_a, b_ka, b_va, one, lowest, none, nothing)
            top_s, total_s, mixed_s = _fold(q_s, b_ka, b_va, (slot_action >= 0)[None, :], top_s, total_s, mixed_s)

        of_layer = tl.cast(i_layer, tl.int64) * n_rows * window * D
        p_k = p_ring_k + of_layer
        p_values = p_ring_v + of_layer
        for w in tl.range(0, n_slots, WB, num_stages=RING_STAGES):
            i_slot = (w + o_w)[:, None]
            seen = (i_slot < n_before[None, :]) & (i_slot != slot_gone[None, :])
            o_slot = (w + o_w) * D
            # [WB, EA, HP, DHP]
            if PADDED:
                m_seen = seen[:, :, None, None] & m_hd
                b_k = tl.load(p_k + ring_of + o_slot[:, None, None, None], mask=m_seen, other=0.0)
                b_v = tl.load(p_values + ring_of + o_slot[:, None, None, None], mask=m_seen, other=0.0)
            else:
                # Whole rows: the copies in shared memory then have no bank conflicts.
                o_rows = o_slot[:, None, None] + (i_env * window * D)[None, :, None] + o_d[None, None, :]
                b_k = tl.load(p_k + o_rows, mask=seen[:, :, None], other=0.0).reshape(WB, EA, HP, DHP)
                b_v = tl.load(p_values + o_rows, mask=seen[:, :, None], other=0.0).reshape(WB, EA, HP, DHP)
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
            if C == 2:
                top_a, total_a, mixed_a = _fold(q_a, b_k, b_v, seen, top_a, total_a, mixed_a)
                seen = seen & (i_slot != slot_state[None, :])
            top_s, total_s, mixed_s = _fold(q_s, b_k, b_v, seen, top_s, total_s, mixed_s)

        p_read = p_mixed + out_of
        tl.store(p_read, (mixed_s / total_s[:, :, None]).to(operand), mask=m_hd3)
        if C == 2:
            tl.store(p_read + BE * D, (mixed_a / total_a[:, :, None]).to(operand), mask=m_hd3)
        # All of the ring is read, and all of this is written before it is read.
        tl.debug_barrier()
        m_new = m_env[None, :, None, None] & m_hd
        o_new = ring_of + (slot_state * D)[None, :, None, None]
        tl.store(p_k + o_new, _load(p_q + D, m_hd, PADDED).to(operand), mask=m_new)
        tl.store(p_values + o_new, _load(p_q + 2 * D, m_hd, PADDED).to(operand), mask=m_new)
        if C == 2:
            m_new = (m_env & (slot_action >= 0))[None, :, None, None] & m_hd
            o_new = ring_of + (slot_action * D)[None, :, None, None]
            tl.store(p_k + o_new, _load(p_qa + D, m_hd, PADDED).to(operand), mask=m_new)
            tl.store(p_values + o_new, _load(p_qa + 2 * D, m_hd, PADDED).to(operand), mask=m_new)
        x = _add_product(x, p_mixed, p_w + W_O, p_v + 5 * D, o_m, D, DP, BK, STAGES)

        # -------------------------------------------------------------------------------------------------------------
        # Attention to the plan

        b_x = _norm(x, p_v + 6 * D, p_v + 7 * D, D, DP).to(operand)
        for j in tl.range(0, D, BN, num_stages=STAGES):
            b_w = _load(p_w + W_PLAN_Q + o_d[:, None] * D + (j + o_n)[None, :], m_d[:, None], D != DP)
            b_1 = tl.dot(b_x, b_w, input_precision="ieee") + tl.load(p_v + 8 * D + j + o_n)[None, :]
            tl.store(p_new + o_m[:, None] * (3 * D) + (j + o_n)[None, :], b_1 * q_scale)
        tl.debug_barrier()
        q_s = _load(p_q, m_hd, PADDED)
        top_s, total_s, mixed_s = lowest, none, nothing
        if C == 2:
            q_a = _load(p_q + BE * 3 * D, m_hd, PADDED)
            top_a, total_a, mixed_a = lowest, none, nothing
        of_layer = tl.cast(i_layer, tl.int64) * n_rows * (N_Z * D)
        for z in tl.range(0, N_Z, ZB, num_stages=1):
            i_z = z + o_z
            # Rows beyond the last environment see zeros rather than nothing.
            seen = (i_z < N_Z)[:, None] & (o_e >= 0)[None, :]
            m_seen = ((i_z < N_Z)[:, None] & m_env[None, :])[:, :, None, None] & m_hd
            o_plan = of_layer + plan_of + (i_z * D)[:, None, None, None]
            # [ZB, EA, HP, DHP]
            b_k = tl.load(p_plan_k + o_plan, mask=m_seen, other=0.0)
            b_v = tl.load(p_plan_v + o_plan, mask=m_seen, other=0.0)
            top_s, total_s, mixed_s = _fold(q_s, b_k, b_v, seen, top_s, total_s, mixed_s)
            if C == 2:
                top_a, total_a, mixed_a = _fold(q_a, b_k, b_v, seen, top_a, total_a, mixed_a)
        tl.store(p_read, (mixed_s / total_s[:, :, None]).to(operand), mask=m_hd3)
        if C == 2:
            tl.store(p_read + BE * D, (mixed_a / total_a[:, :, None]).to(operand), mask=m_hd3)
        tl.debug_barrier()
        x = _add_product(x, p_mixed, p_w + W_PLAN_O, p_v + 9 * D, o_m, D, DP, BK, STAGES)

        # -------------------------------------------------------------------------------------------------------------
        # MLP

        b_x = _norm(x, p_v + 10 * D, p_v + 11 * D, D, DP).to(operand)
        x += _load(p_v + 12 * D + HIDDEN + o_d, m_d, D != DP)[None, :]
        for j in tl.range(0, HIDDEN, BH, num_stages=STAGES):
            # [DP, BH], [BH, DP]
            b_w = _load(p_w + W_IN + o_d[:, None] * HIDDEN + (j + o_g)[None, :], m_d[:, None], D != DP)
            b_h = tl.dot(b_x, b_w, input_precision="ieee") + tl.load(p_v + 12 * D + j + o_g)[None, :]
            b_h = b_h * tl.sigmoid(b_h)
            b_w = _load(p_w + W_OUT + (j + o_g)[:, None] * D + o_d[None, :], m_d[None, :], D != DP)
            x = tl.dot(b_h.to(operand), b_w, x, input_precision="ieee")

    p_norm = p_edges + (obs_dim + 1) * D
    if C == 2:
        p_norm += (act_dim + 1) * D
    _act(
        x, p_new, p_norm, p_last, p_out, p_action_mid, p_action_half, i_first, n_rows, act_dim,
        C, D, DP, ACT_P, EA, BE, BO,
    )  # fmt: skip
    i_all = i_first + tl.arange(0, EA)
    t = tl.load(p_steps + i_all, mask=i_all < n_rows, other=0)
    tl.store(p_steps + i_all, t + 1, mask=i_all < n_rows)


# ---------------------------------------------------------------------------------------------------------------------
# Packing


class Packed:
    """Weights as the kernel reads them, in memory that stays where it is.

    Attributes:
        matrices: [L, 6 D^2 + 2 D hidden], float32 or bfloat16: [in, out] matrices of q, k, v (with first halves of all
            heads before second ones in q and in k), of the output, plan query, plan output and the MLP.
        vectors: float32 [L, 13 D + hidden], norms and biases in the order of their use.
        edges: float32, embeddings ([in, out] matrix, bias), last norm, head ([out, in] matrix, bias).
        turns: float64 [d / 2], full turns per time step.

    Args:
        tensors: weight and bias of the state embedding, those of the action embedding with C = 2, the 18 tensors of
            each layer as in ``gac_fast.reference.LayerWeights``, weight and bias of the last norm and of the head;
            of any strides, float32, on one device (which may be meta).
        n_heads, rope_base: of the decoder.
        tokens: C.
        dtype: of the matrices.
    """

    def __init__(
        self, tensors: Sequence[Tensor], n_heads: int, rope_base: float, tokens: int, dtype: torch.dtype
    ) -> None:  # fmt: skip
        self.n_heads, self.tokens = n_heads, tokens
        self.dim, self.obs_dim = tensors[0].shape
        self.act_dim = tensors[-1].shape[0]
        self.n_layers = (len(tensors) - 2 * tokens - 4) // LAYER_TENSORS
        self.hidden = tensors[2 * tokens + 14].shape[0]
        dim, device = self.dim, tensors[0].device
        half = dim // n_heads // 2
        matrices = 6 * dim**2 + 2 * dim * self.hidden
        edges = (self.obs_dim + self.act_dim * tokens + tokens + 2) * dim + self.act_dim
        self.matrices = torch.empty(self.n_layers, matrices, dtype=dtype, device=device)
        self.vectors = torch.empty(self.n_layers, 13 * dim + self.hidden, dtype=torch.float32, device=device)
        self.edges = torch.empty(edges, dtype=torch.float32, device=device)
        # Nothing is copied from the host, which would wait for the device: numbers reach kernels as arguments.
        frequency = rope_base ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
        self.turns = torch.empty(half, dtype=torch.float64, device=device)
        for element, turn in zip(self.turns.unbind(), (frequency / (2 * math.pi)).tolist(), strict=True):
            element.fill_(turn)
        # Column of q (or k) behind each packed one.
        pair = torch.arange(dim // 2, device=device)
        first = pair // half * (2 * half) + pair % half
        columns = torch.cat((first, first + half))
        self._order = torch.cat((columns, columns + dim, torch.arange(2 * dim, 3 * dim, device=device)))
        self.fill(tensors)

    @torch.no_grad()
    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Pack anew, into the same memory; other values, the same shapes."""
        c, dim, hidden = self.tokens, self.dim, self.hidden
        layers = tensors[2 * c : -4]

        def stacked(i: int) -> Tensor:
            return torch.stack([x.detach() for x in layers[i::LAYER_TENSORS]])

        at = 0
        # w_qkv, w_o, w_plan_q, w_plan_o, w_in, w_out
        for i, n_in, n_out in (
            (2, dim, 3 * dim), (4, dim, dim), (8, dim, dim), (10, dim, dim), (14, dim, hidden), (16, hidden, dim)
        ):  # fmt: skip
            w = stacked(i)
            if i == 2:
                w = w.index_select(1, self._order)
            self.matrices[:, at : at + n_in * n_out].unflatten(1, (n_in, n_out)).copy_(w.transpose(1, 2))
            at += n_in * n_out
        at = 0
        for i in (0, 1, 3, 5, 6, 7, 9, 11, 12, 13, 15, 17):
            b = stacked(i)
            if i == 3:
                b = b.index_select(1, self._order)
            self.vectors[:, at : at + b.shape[1]].copy_(b)
            at += b.shape[1]
        parts = [x.detach().t() if i % 2 == 0 else x.detach() for i, x in enumerate(tensors[: 2 * c])]
        torch.cat([x.reshape(-1) for x in (*parts, *(x.detach() for x in tensors[-4:]))], out=self.edges)


def refusal(dim: int, n_heads: int, n_z: int) -> str | None:
    """Why the kernel does not take these sizes; None where it does."""
    if dim not in WIDTHS:
        return f"the Triton engine takes widths {', '.join(map(str, WIDTHS))}, got {dim}"
    width = dim // n_heads
    if dim % n_heads != 0 or width % 2 != 0 or not 8 <= width <= 256:
        return f"the Triton engine takes even head widths from 8 to 256, got {n_heads} heads at width {dim}"
    return None if 1 <= n_z <= 16 else f"the Triton engine takes 1 to 16 plan vectors, got {n_z}"


# ---------------------------------------------------------------------------------------------------------------------
# Launching

# Most programs, one for each processor: on an H200 their chains of small products take the time, not their weights' way
# out of the second-level cache.
_PROGRAMS = 128
# Rows of a program's products and its environments: with more the kernel spills registers.
_MOST_ROWS = 32
_MOST_WIDE = 8


def option_for(n_rows: int, dim: int, tokens: int, dtype: torch.dtype, architecture: int = 90) -> Option:
    """How to step ``n_rows`` environments; by sizes alone, since tiles decide where the sum of a softmax is cut."""
    wide = dtype == torch.float32
    # A power of two that gives up to that many programs.
    usual = max(1, triton.next_power_of_2(n_rows) // _PROGRAMS)
    most = min((16 if wide else _MOST_ROWS) // tokens, _MOST_ROWS if dim <= 128 else _MOST_WIDE)
    return _option(min(usual, most), dim, tokens, wide, architecture)


def _option(environments: int, dim: int, tokens: int, wide: bool, architecture: int) -> Option:
    padded = triton.next_power_of_2(dim)
    # Columns of a weight tile: as much at every width.
    columns = max(16, min(64, 64 * 128 // padded // (2 if wide else 1)))
    # Elements of keys that a program holds at once, few enough for no spills; how many such pieces are on their way.
    held, stages = {64: (4096, 8), 96: (2048, 4), 128: (4096, 8), 192: (2048, 8), 256: (4096, 6)}[dim]
    if architecture < 90:
        # Products read both operands from registers there.
        held = 2048
    warps, hidden = 8, _divisor(dim, columns)
    if dim == 128 and not wide and architecture >= 90:
        # Measured on an H200, at 1, 256 and 1,024 environments; four warps where they do not spill.
        warps, hidden = 4 if tokens == 2 and environments in (4, 8) else 8, 128
        if environments > 1:
            held = 2048
    slots = max(1, held // padded // environments)
    tiles = {
        "EA": environments,
        "BE": max(environments, 16 // tokens),
        "WB": slots,
        "BP": _divisor(dim // 2, columns),
        "BN": _divisor(dim, columns),
        "BK": _divisor(dim, columns),
        "BH": hidden,
        "BO": 16,
        "RING_STAGES": 3 if wide else stages,
        "STAGES": 2 if wide or dim > (192 if architecture >= 90 else 128) else 3,
    }
    return Option(tuple(tiles.items()), num_warps=warps, num_stages=tiles["STAGES"])


def _divisor(n: int, most: int) -> int:
    """The largest power of two that divides n, up to ``most``."""
    return min(n & -n, most)


def new_scratch(packed: Packed, n_rows: int, option: Option) -> tuple[Tensor, Tensor, Tensor]:
    """Memory of the programs, for one launch at a time."""
    tiles = dict(option.tiles)
    rows = triton.cdiv(n_rows, tiles["EA"]) * tiles["BE"] * packed.tokens
    device, dim = packed.edges.device, packed.dim
    new = torch.empty(rows, 3 * dim, dtype=torch.float32, device=device)
    mixed = torch.empty(rows, dim, dtype=packed.matrices.dtype, device=device)
    return new, mixed, torch.empty(rows, dim // packed.n_heads, dtype=torch.float32, device=device)


def launch(
    packed: Packed,
    rings: tuple[Tensor, Tensor],
    plans: tuple[Tensor, Tensor],
    steps: Tensor,
    last_action: Tensor,
    observations: Tensor,
    units: Sequence[Tensor] | None,
    out: Tensor,
    scratch: tuple[Tensor, Tensor, Tensor],
    option: Option,
) -> Launch:
    """One step of all environments; **mutates** ``rings``, ``steps`` and ``last_action``, fills ``out``.

    Args:
        packed: weights.
        rings, plans, steps, last_action: as in ``gac_fast.reference.decode_step``, contiguous, the rings of the dtype
            of the packed matrices, the others float32. Slots of the rings that are not filled may hold NaN.
        observations: float32 [P, obs_dim] of any strides.
        units: mean and deviation of observations, middle and half range of actions; float32, contiguous.
        out: float32 [P, act_dim], contiguous.
        scratch: of :func:`new_scratch`, for the same option.
    """
    tiles = dict(option.tiles)
    # Tiles of the MLP are not masked; a width that is no multiple of them takes narrower ones.
    option = replace(option, tiles=tuple({**tiles, "BH": _divisor(packed.hidden, tiles["BH"])}.items()))
    _, n_rows, window, heads, width = rings[0].shape
    dim, n_z = heads * width, plans[0].shape[2]
    mean, std, mid, half = (None, None, None, None) if units is None else units
    tiles = dict(option.tiles)
    arguments: dict[str, Any] = {
        "p_obs": observations,
        "p_obs_mean": mean,
        "p_obs_std": std,
        "p_action_mid": mid,
        "p_action_half": half,
        "p_matrices": packed.matrices,
        "p_vectors": packed.vectors,
        "p_edges": packed.edges,
        "p_turns": packed.turns,
        "p_ring_k": rings[0],
        "p_ring_v": rings[1],
        "p_plan_k": plans[0],
        "p_plan_v": plans[1],
        "p_steps": steps,
        "p_last": last_action,
        "p_out": out,
        "p_new": scratch[0],
        "p_mixed": scratch[1],
        "p_rotation": scratch[2],
        "n_rows": n_rows,
        "n_layers": packed.n_layers,
        "window": window,
        "obs_dim": packed.obs_dim,
        "act_dim": packed.act_dim,
        "stride_obs_row": observations.stride(0),
        "stride_obs": observations.stride(1),
        # The kernel's softmax is one of powers of two.
        "q_scale": width**-0.5 * math.log2(math.e),
    }
    constants = {
        "C": packed.tokens,
        "D": dim,
        "DP": triton.next_power_of_2(dim),
        "H": heads,
        "HP": triton.next_power_of_2(heads),
        "DHP": triton.next_power_of_2(width),
        "HIDDEN": packed.hidden,
        "N_Z": n_z,
        # Plan vectors are float32: beside as many environments as fit, one at a time.
        "ZB": 1 if dim > 128 and tiles["EA"] == _MOST_WIDE else min(triton.next_power_of_2(n_z), tiles["WB"]),
        "ACT_P": max(16, triton.next_power_of_2(packed.act_dim)),
    }
    return Launch(decode_step_kernel, (triton.cdiv(n_rows, tiles["EA"]),), arguments, constants, option)


def shipped(
    dim: int = 128,
    heads: int = 4,
    n_z: int = 4,
    tokens_per_step: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rows: Sequence[int] = (1, 128, 256, 512, 1024, 2048),
    n_layers: int = 3,
    steps: int = 32,
    mlp_ratio: int = 4,
    obs_dim: int = 11,
    act_dim: int = 3,
    architecture: int = 90,
) -> list[Launch]:
    """Launches on meta tensors with every option that is chosen for these numbers of environments."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def linear(n_in: int, n_out: int) -> list[Tensor]:
        return [meta(n_out, n_in), meta(n_out)]

    norm, hidden, c, width = [meta(dim), meta(dim)], mlp_ratio * dim, tokens_per_step, dim // heads
    layer = [
        *norm, *linear(dim, 3 * dim), *linear(dim, dim), *norm, *linear(dim, dim), *linear(dim, dim),
        *norm, *linear(dim, hidden), *linear(hidden, dim),
    ]  # fmt: skip
    embeddings = linear(obs_dim, dim) + (linear(act_dim, dim) if c == 2 else [])
    packed = Packed([*embeddings, *(layer * n_layers), *norm, *linear(dim, act_dim)], heads, 1e4, c, dtype)
    found: dict[Option, Launch] = {}
    for n in rows:
        ring = meta(n_layers, n, c * steps, heads, width, dtype=dtype)
        plan = meta(n_layers, n, n_z, heads, width)
        units = [meta(obs_dim), meta(obs_dim), meta(act_dim), meta(act_dim)]
        option = option_for(n, dim, c, dtype, architecture)
        if option not in found:
            found[option] = launch(
                packed, (ring, ring), (plan, plan), meta(n, dtype=torch.int64), meta(n, act_dim),
                meta(n, obs_dim), units, meta(n, act_dim), new_scratch(packed, n, option), option,
            )  # fmt: skip
    return list(found.values())
