"""All steps of the inference of plans by groups of programs: one launch, a barrier of the group between two products.

``plan_ascent`` gives a program its plans for all steps; it then waits for 40 tiles of weights one after another, 2,700
cycles each (measured on an H200), however few plans there are. Here a group of G programs shares a tile of BP plans:
each takes some columns of every product, and what it leaves in memory the others read behind the next barrier. Few
plans so use many processors, and many plans read the weights half as often.

Plans are rows. A step (sizes as in ``plan_ascent``):

== ============================== =====================================================
1  z W1^T [BP, U]                 a = silu, and its slope
2  a W2^T [BP, d]                 u = z + ..., x = norm(u), by vectors of the plan
3  x R1^T [BP, E H1]              a1 and its slope
4  a1 R2^T [BP, H2] of each member  its heads, slope
6  moments, g2 R2 [BP, E H1]      g1 = ... * slope1
7  g1 R1 [BP, d]                  back through the norm: gu
8  gu W2 [BP, U]                  gh = ... * slope
9  gh W1 [BP, d]                  g = ... + gu - weight z
10 (no product)                   the update, by rows
== ============================== =====================================================

All programs of a group must run at the same time: there are never more programs than processors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gac_fast.kernels._launch import INTERPRETED, Launch, Option
from gac_fast.kernels._plan_math import (
    at_least,
    log_slope,
    moment_slopes,
    over_vectors,
    silu,
    variance_of,
    vector_sums,
)
from gac_fast.kernels.philox_normal import box_muller, philox4x32

__all__ = ["MOST_SCRATCH", "PROCESSORS", "group_kernel", "launch", "option_for", "processors_of", "refusal"]

_NORM_EPS = tl.constexpr(1e-5)
_LEAST_NORM = tl.constexpr(1e-12)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Streaming multiprocessors of an H100 or H200; on a smaller device there are as many programs as it has.
PROCESSORS = 132
_MOST_PROGRAMS = 8

# Bytes that the groups of a launch may have beside the weights, unless one of them alone needs more.
MOST_SCRATCH = 1 << 30


@triton.jit
def _nought():
    """0 of which the compiler does not know it, each time anew: offsets that hold it are not kept from phase to phase,
    in registers that the products need."""
    nought = 0
    if not _INTERPRETED:
        nought = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )
        # Loads stay as wide as they were.
        nought = tl.multiple_of(nought, 256)
    return nought


@triton.jit
def _wait_for_group(p_count, arrivals):
    """A barrier of the programs of a group: ``arrivals`` in all, the earlier barriers' included."""
    tl.debug_barrier()
    tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(p_count, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _product(p_x, stride_x, p_w, K: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """x w^T, float32 [BP, BN], of rows x [BP, K] and w [BN, K]."""
    nought = _nought()
    o_k = tl.arange(0, BK) + nought
    o_p = tl.arange(0, BP) + nought
    o_n = tl.arange(0, BN) + nought
    acc = tl.zeros((BP, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        # [BP, BK], [BN, BK]; x was written by other programs: not by way of a cache of this processor's own.
        b_x = tl.load(p_x + o_p[:, None] * stride_x + (k + o_k)[None, :], cache_modifier=".cg")
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :])
        acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision="ieee")
    return acc


@triton.jit
def _row_noise(p_plans, o_plan, m_plan, column, step, seed0, seed1, WIDTH: tl.constexpr, PADDED: tl.constexpr,
               BN: tl.constexpr):  # fmt: skip
    """Normals [rows, BN] of columns ``column`` on: element (vector * WIDTH + place) of the plans' noise at ``step``."""
    # [rows, 1]
    plan = tl.load(p_plans + o_plan, mask=m_plan, other=0).to(tl.uint32)[:, None]
    k0 = seed0.to(tl.uint32)
    k1 = seed1.to(tl.uint32)
    if WIDTH % 4 == 0:
        # One Philox call for four columns, which belong to one plan vector.
        at = column + 4 * tl.arange(0, BN // 4)
        c0 = (((at // PADDED) * WIDTH + at % PADDED) // 4).to(tl.uint32)[None, :]
        zero = (c0 * 0) + (plan * 0)
        w0, w1, w2, w3 = philox4x32(zero + c0, zero + plan, zero + step.to(tl.uint32), zero, zero + k0, zero + k1)
        x0, x1 = box_muller(w0, w1)
        x2, x3 = box_muller(w2, w3)
        normals = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    else:
        at = column + tl.arange(0, BN)
        element = ((at // PADDED) * WIDTH + at % PADDED)[None, :]
        c0 = (element // 4).to(tl.uint32)
        zero = (c0 * 0) + (plan * 0)
        w0, w1, w2, w3 = philox4x32(zero + c0, zero + plan, zero + step.to(tl.uint32), zero, zero + k0, zero + k1)
        word = element % 4
        cosine, sine = box_muller(tl.where(word < 2, w0, w2), tl.where(word < 2, w1, w3))
        normals = tl.where(word % 2 == 0, cosine, sine)
    return normals


@triton.jit(do_not_specialize=["n_plans", "n_steps", "first_step", "seed0", "seed1"])
def group_kernel(
    p_w, p_b, p_z0, p_context, p_target, p_plans, p_seeds, p_mean, p_std, p_op, p_f, p_count,
    n_plans, n_steps, n_obs, step_size, kappa, prior_weight, reach, most_norm, longest, first_step, seed0, seed1,
    stride_z0_plan, stride_z0_vector, stride_z0_element, stride_context_plan, stride_context_obs,
    LANGEVIN: tl.constexpr, HAS_PRIOR_WEIGHT: tl.constexpr, HAS_RADIUS: tl.constexpr, HAS_MOST_NORM: tl.constexpr,
    VECTORS_ALL: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, MEMBERS: tl.constexpr,
    MEMBERS_ROOM: tl.constexpr,
    D: tl.constexpr, U: tl.constexpr, C: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr,  # columns, padded
    G: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # Where the weights begin.
    W1: tl.constexpr = 0
    W2: tl.constexpr = W1 + U * D
    R1: tl.constexpr = W2 + D * U
    R2: tl.constexpr = R1 + MEMBERS * H1 * (D + C)
    R2T: tl.constexpr = R2 + MEMBERS * H2 * H1
    R1T: tl.constexpr = R2T + MEMBERS * H1 * H2
    W2T: tl.constexpr = R1T + D * MEMBERS * H1
    W1T: tl.constexpr = W2T + U * D
    # And the vectors beside them.
    B1: tl.constexpr = 0
    B2: tl.constexpr = B1 + U
    BR1: tl.constexpr = B2 + D
    BR2: tl.constexpr = BR1 + MEMBERS * H1
    W3: tl.constexpr = BR2 + MEMBERS * H2
    B3: tl.constexpr = W3 + 2 * MEMBERS * H2
    # Memory of a group: operands, and float32.
    O_Z: tl.constexpr = 0
    O_X: tl.constexpr = O_Z + BP * D
    O_GU: tl.constexpr = O_X + BP * (D + C)
    O_A: tl.constexpr = O_GU + BP * D
    O_S: tl.constexpr = O_A + BP * U
    O_GH: tl.constexpr = O_S + BP * U
    O_A1: tl.constexpr = O_GH + BP * U
    O_S1: tl.constexpr = O_A1 + BP * MEMBERS * H1
    O_G1: tl.constexpr = O_S1 + BP * MEMBERS * H1
    O_S2: tl.constexpr = O_G1 + BP * MEMBERS * H1
    OPERANDS: tl.constexpr = O_S2 + BP * MEMBERS * H2
    F_Z: tl.constexpr = 0
    F_START: tl.constexpr = F_Z + BP * D
    F_G: tl.constexpr = F_START + BP * D
    F_RMS: tl.constexpr = F_G + BP * D
    F_HEAD: tl.constexpr = F_RMS + BP * (D // PADDED)
    F_SQUARES: tl.constexpr = F_HEAD + 2 * BP * MEMBERS_ROOM
    FLOATS: tl.constexpr = F_SQUARES + BP * (D // BD)
    VECTORS: tl.constexpr = BD // PADDED

    OP: tl.constexpr = p_op.dtype.element_ty
    i_group = tl.program_id(0) // G
    rank = tl.program_id(0) % G
    n_groups = tl.num_programs(0) // G
    n_tiles = (n_plans + BP - 1) // BP
    p_op += i_group.to(tl.int64) * OPERANDS
    p_f += i_group.to(tl.int64) * FLOATS
    p_count += i_group
    o_member = tl.arange(0, MEMBERS_ROOM)
    arrivals = i_group * 0
    wide = arrivals.to(tl.int64)  # makes int64 of what is added to it

    for i_tile in tl.range(i_group, n_tiles, n_groups, disable_licm=True, num_stages=1):
        first_plan = (wide + i_tile) * BP
        # By rows, few at a time: every element has an address of its own.
        for i_row in tl.range(rank, BP // BR, G, num_stages=1, disable_licm=True):
            nought = _nought()
            o_row = i_row * BR + tl.arange(0, BR) + nought
            row = first_plan + o_row
            for i in tl.range(D // BD, num_stages=1, disable_licm=True):
                column = i * BD + tl.arange(0, BD) + nought
                vector = column // PADDED
                place = column % PADDED
                m_column = (place < WIDTH) & (vector < VECTORS_ALL)
                # [BR, BD]
                b_z = tl.load(
                    p_z0 + row[:, None] * stride_z0_plan
                    + (vector.to(tl.int64) * stride_z0_vector + place.to(tl.int64) * stride_z0_element)[None, :],
                    mask=(row < n_plans)[:, None] & m_column[None, :], other=0.0,
                )  # fmt: skip
                o_at = o_row[:, None] * D + column[None, :]
                tl.store(p_f + F_Z + o_at, b_z)
                tl.store(p_op + O_Z + o_at, b_z.to(OP))
                if HAS_RADIUS:
                    tl.store(p_f + F_START + o_at, b_z)
            if C > 0:
                for i in tl.range(C // BN, num_stages=1, disable_licm=True):
                    column = i * BN + tl.arange(0, BN) + nought
                    # [BR, BN]
                    b_c = tl.load(
                        p_context + row[:, None] * stride_context_plan
                        + column.to(tl.int64)[None, :] * stride_context_obs,
                        mask=(row < n_plans)[:, None] & (column < n_obs)[None, :], other=0.0,
                    )  # fmt: skip
                    tl.store(p_op + O_X + o_row[:, None] * (D + C) + (D + column)[None, :], b_c.to(OP))
        arrivals += G
        _wait_for_group(p_count, arrivals)

        for step in tl.range(n_steps + 1, disable_licm=True, num_stages=1):
            # 1
            for i in tl.range(rank, U // BN, G, num_stages=1, disable_licm=True):
                nought = _nought()
                o_p = tl.arange(0, BP) + nought
                o_n = tl.arange(0, BN) + nought
                bias = tl.load(p_b + B1 + i * BN + o_n)[None, :]
                acc = _product(p_op + O_Z, D, p_w + W1 + i * (BN * D), D, BP, BN, BK, STAGES)
                a, slope = silu(acc + bias)
                o_at = o_p[:, None] * U + (i * BN + o_n)[None, :]
                tl.store(p_op + O_A + o_at, a.to(OP))
                tl.store(p_op + O_S + o_at, slope.to(OP))
            arrivals += G
            _wait_for_group(p_count, arrivals)

            # 2
            for i in tl.range(rank, D // BD, G, num_stages=1, disable_licm=True):
                nought = _nought()
                o_p = tl.arange(0, BP) + nought
                o_d = tl.arange(0, BD) + nought
                bias = tl.load(p_b + B2 + i * BD + o_d)[None, :]
                acc = _product(p_op + O_A, U, p_w + W2 + i * (BD * U), U, BP, BD, BK, STAGES)
                u = acc + bias
                u += tl.load(p_f + F_Z + o_p[:, None] * D + (i * BD + o_d)[None, :], cache_modifier=".cg")
                # [BP, VECTORS]
                rms = tl.rsqrt(vector_sums(u * u, VECTORS, BP, BD) / WIDTH + _NORM_EPS)
                o_vector = o_p[:, None] * (D // PADDED) + (i * VECTORS + tl.arange(0, VECTORS))[None, :]
                tl.store(p_f + F_RMS + o_vector, rms)
                x = u * over_vectors(rms, VECTORS, BP, BD)
                tl.store(p_op + O_X + o_p[:, None] * (D + C) + (i * BD + o_d)[None, :], x.to(OP))
            arrivals += G
            _wait_for_group(p_count, arrivals)

            # 3
            for i in tl.range(rank, MEMBERS * H1 // BN, G, num_stages=1, disable_licm=True):
                nought = _nought()
                o_p = tl.arange(0, BP) + nought
                o_n = tl.arange(0, BN) + nought
                bias = tl.load(p_b + BR1 + i * BN + o_n)[None, :]
                acc = _product(p_op + O_X, D + C, p_w + R1 + i * (BN * (D + C)), D + C, BP, BN, BK, STAGES)
                a, slope = silu(acc + bias)
                o_at = o_p[:, None] * (MEMBERS * H1) + (i * BN + o_n)[None, :]
                tl.store(p_op + O_A1 + o_at, a.to(OP))
                tl.store(p_op + O_S1 + o_at, slope.to(OP))
            arrivals += G
            _wait_for_group(p_count, arrivals)

            # 4
            for e in tl.range(rank, MEMBERS, G, num_stages=1, disable_licm=True):
                nought = _nought()
                o_p = tl.arange(0, BP) + nought
                o_h2 = tl.arange(0, H2) + nought
                bias = tl.load(p_b + BR2 + e * H2 + o_h2)[None, :]
                w_mean = tl.load(p_b + W3 + e * H2 + o_h2)[None, :]
                w_log = tl.load(p_b + W3 + MEMBERS * H2 + e * H2 + o_h2)[None, :]
                b_mean = tl.load(p_b + B3 + e)
                b_log = tl.load(p_b + B3 + MEMBERS + e)
                acc = _product(p_op + O_A1 + e * H1, MEMBERS * H1, p_w + R2 + e * (H2 * H1), H1, BP, H2, BK, STAGES)
                a, slope = silu(acc + bias)
                tl.store(p_op + O_S2 + o_p[:, None] * (MEMBERS * H2) + (e * H2 + o_h2)[None, :], slope.to(OP))
                p_head = p_f + F_HEAD + o_p * (2 * MEMBERS_ROOM) + e
                tl.store(p_head, tl.sum(a * w_mean, axis=1) + b_mean)
                tl.store(p_head + MEMBERS_ROOM, tl.sum(a * w_log, axis=1) + b_log)
            arrivals += G
            _wait_for_group(p_count, arrivals)

            # 5: everyone for itself
            nought = _nought()
            o_p = tl.arange(0, BP) + nought
            m_member = (o_member < MEMBERS)[None, :]
            # [BP, MEMBERS_ROOM]
            p_head = p_f + F_HEAD + o_p[:, None] * (2 * MEMBERS_ROOM) + o_member[None, :]
            b_mean = tl.load(p_head, mask=m_member, other=0.0, cache_modifier=".cg")
            b_log = tl.load(p_head + MEMBERS_ROOM, mask=m_member, other=0.0, cache_modifier=".cg")
            mean = tl.sum(b_mean, axis=1) / MEMBERS
            off = tl.where(m_member, b_mean - mean[:, None], 0.0)
            b_variance = tl.where(m_member, variance_of(b_log), 0.0)
            std = tl.sqrt_rn(tl.sum(b_variance + off * off, axis=1) / MEMBERS)
            if step == n_steps:
                if rank == 0:
                    m_plan = first_plan + o_p < n_plans
                    tl.store(p_mean + first_plan + o_p, mean, mask=m_plan)
                    tl.store(p_std + first_plan + o_p, std, mask=m_plan)
            else:
                target = tl.zeros((BP,), tl.float32)
                if LANGEVIN:
                    target = tl.load(p_target + first_plan + o_p, mask=first_plan + o_p < n_plans, other=0.0)
                share, each = moment_slopes(mean, std, target, kappa, MEMBERS * 1.0, LANGEVIN)
                by_mean = (tl.zeros((BP,), tl.float32) + share)[:, None] + each[:, None] * off
                by_log = log_slope(b_log, each[:, None])

                # 6
                for i in tl.range(rank, MEMBERS * H1 // BN, G, num_stages=1, disable_licm=True):
                    nought = _nought()
                    o_p = tl.arange(0, BP) + nought
                    o_n = tl.arange(0, BN) + nought
                    o_h2 = tl.arange(0, H2) + nought
                    e = i // (H1 // BN)
                    # [BP, H2], [BN, H2], [BP, BN]
                    b_s2 = tl.load(
                        p_op + O_S2 + o_p[:, None] * (MEMBERS * H2) + (e * H2 + o_h2)[None, :], cache_modifier=".cg"
                    )
                    b_w = tl.load(p_w + R2T + i * (BN * H2) + o_n[:, None] * H2 + o_h2[None, :])
                    o_at = o_p[:, None] * (MEMBERS * H1) + (i * BN + o_n)[None, :]
                    slope = tl.load(p_op + O_S1 + o_at, cache_modifier=".cg")
                    w_mean = tl.load(p_b + W3 + e * H2 + o_h2)[None, :]
                    w_log = tl.load(p_b + W3 + MEMBERS * H2 + e * H2 + o_h2)[None, :]
                    of_member = o_member[None, :] == e
                    # [BP, 1]
                    own_mean = tl.sum(tl.where(of_member, by_mean, 0.0), axis=1)[:, None]
                    own_log = tl.sum(tl.where(of_member, by_log, 0.0), axis=1)[:, None]
                    g2 = (own_mean * w_mean + own_log * w_log) * b_s2.to(tl.float32)
                    acc = tl.dot(g2.to(OP), tl.trans(b_w), input_precision="ieee")
                    tl.store(p_op + O_G1 + o_at, (acc * slope.to(tl.float32)).to(OP))
                arrivals += G
                _wait_for_group(p_count, arrivals)

                # 7: back through x = u / rms(u)
                for i in tl.range(rank, D // BD, G, num_stages=1, disable_licm=True):
                    nought = _nought()
                    o_p = tl.arange(0, BP) + nought
                    o_d = tl.arange(0, BD) + nought
                    p_x = p_op + O_X + o_p[:, None] * (D + C) + (i * BD + o_d)[None, :]
                    b_x = tl.load(p_x, cache_modifier=".cg")
                    o_vector = o_p[:, None] * (D // PADDED) + (i * VECTORS + tl.arange(0, VECTORS))[None, :]
                    rms = tl.load(p_f + F_RMS + o_vector, cache_modifier=".cg")
                    acc = _product(
                        p_op + O_G1, MEMBERS * H1, p_w + R1T + i * (BD * MEMBERS * H1), MEMBERS * H1, BP, BD, BK, STAGES
                    )
                    x = b_x.to(tl.float32)
                    along = vector_sums(acc * x, VECTORS, BP, BD) / WIDTH
                    gu = (acc - x * over_vectors(along, VECTORS, BP, BD)) * over_vectors(rms, VECTORS, BP, BD)
                    tl.store(p_op + O_GU + o_p[:, None] * D + (i * BD + o_d)[None, :], gu.to(OP))
                arrivals += G
                _wait_for_group(p_count, arrivals)

                # 8
                for i in tl.range(rank, U // BN, G, num_stages=1, disable_licm=True):
                    nought = _nought()
                    o_p = tl.arange(0, BP) + nought
                    o_n = tl.arange(0, BN) + nought
                    o_at = o_p[:, None] * U + (i * BN + o_n)[None, :]
                    slope = tl.load(p_op + O_S + o_at, cache_modifier=".cg")
                    acc = _product(p_op + O_GU, D, p_w + W2T + i * (BN * D), D, BP, BN, BK, STAGES)
                    tl.store(p_op + O_GH + o_at, (acc * slope.to(tl.float32)).to(OP))
                arrivals += G
                _wait_for_group(p_count, arrivals)

                # 9
                for i in tl.range(rank, D // BD, G, num_stages=1, disable_licm=True):
                    nought = _nought()
                    o_p = tl.arange(0, BP) + nought
                    o_d = tl.arange(0, BD) + nought
                    o_at = o_p[:, None] * D + (i * BD + o_d)[None, :]
                    b_gu = tl.load(p_op + O_GU + o_at, cache_modifier=".cg")
                    acc = _product(p_op + O_GH, U, p_w + W1T + i * (BD * U), U, BP, BD, BK, STAGES)
                    acc += b_gu.to(tl.float32)
                    if HAS_PRIOR_WEIGHT:
                        acc -= prior_weight * tl.load(p_f + F_Z + o_at, cache_modifier=".cg")
                    tl.store(p_f + F_G + o_at, acc)
                    tl.store(p_f + F_SQUARES + i * BP + o_p, tl.sum(acc * acc, axis=1))
                arrivals += G
                _wait_for_group(p_count, arrivals)

                # 10
                for i_row in tl.range(rank, BP // BR, G, num_stages=1, disable_licm=True):
                    nought = _nought()
                    o_d = tl.arange(0, BD) + nought
                    o_row = i_row * BR + tl.arange(0, BR) + nought
                    squares = tl.zeros((BR,), tl.float32)
                    for i in tl.range(D // BD, num_stages=1, disable_licm=True):
                        squares += tl.load(p_f + F_SQUARES + i * BP + o_row, cache_modifier=".cg")
                    norm = at_least(tl.sqrt_rn(squares), _LEAST_NORM)
                    if LANGEVIN:
                        longest_s = longest / norm
                        move_noise = tl.where(longest_s > step_size, step_size, longest_s)
                        move = 0.5 * move_noise * move_noise
                    else:
                        move = step_size * (1.0 - (step + wide).to(tl.float32) / n_steps.to(tl.float32)) / norm
                    inside = tl.zeros((BR,), tl.float32) + 1.0
                    within = tl.zeros((BR,), tl.float32) + 1.0
                    if HAS_RADIUS or HAS_MOST_NORM:
                        norms = tl.zeros((BR,), tl.float32)
                        offsets = tl.zeros((BR,), tl.float32)
                        across = tl.zeros((BR,), tl.float32)
                        starts = tl.zeros((BR,), tl.float32)
                        for i in tl.range(D // BD, num_stages=1, disable_licm=True):
                            o_at = o_row[:, None] * D + (i * BD + o_d)[None, :]
                            z = tl.load(p_f + F_Z + o_at, cache_modifier=".cg")
                            z += tl.load(p_f + F_G + o_at, cache_modifier=".cg") * move[:, None]
                            norms += tl.sum(z * z, axis=1)
                            if HAS_RADIUS:
                                start = tl.load(p_f + F_START + o_at, cache_modifier=".cg")
                                off_start = z - start
                                offsets += tl.sum(off_start * off_start, axis=1)
                                across += tl.sum(off_start * start, axis=1)
                                starts += tl.sum(start * start, axis=1)
                        if HAS_RADIUS:
                            inside = reach / at_least(tl.sqrt_rn(offsets), _LEAST_NORM)
                            inside = tl.where(inside >= 1.0, 1.0, inside)
                            # |start + inside * off|^2
                            brought_in = starts + inside * (2.0 * across + inside * offsets)
                            norms = tl.where(inside >= 1.0, norms, at_least(brought_in, 0.0))
                        if HAS_MOST_NORM:
                            within = most_norm / at_least(tl.sqrt_rn(norms), _LEAST_NORM)
                            within = tl.where(within >= 1.0, 1.0, within)
                    for i in tl.range(D // BD, num_stages=1, disable_licm=True):
                        column = i * BD + o_d
                        o_at = o_row[:, None] * D + column[None, :]
                        z = tl.load(p_f + F_Z + o_at, cache_modifier=".cg")
                        z += tl.load(p_f + F_G + o_at, cache_modifier=".cg") * move[:, None]
                        if HAS_RADIUS:
                            start = tl.load(p_f + F_START + o_at, cache_modifier=".cg")
                            z = start + (z - start) * inside[:, None]
                        if HAS_MOST_NORM:
                            z *= within[:, None]
                        if LANGEVIN:
                            noise = _row_noise(
                                p_plans, first_plan + o_row, first_plan + o_row < n_plans, i * BD,
                                first_step + step + wide.to(tl.int32), seed0, seed1, WIDTH, PADDED, BD,
                            )  # fmt: skip
                            m_column = (column % PADDED < WIDTH) & (column // PADDED < VECTORS_ALL)
                            z += tl.where(m_column[None, :], noise * move_noise[:, None], 0.0)
                        tl.store(p_f + F_Z + o_at, z)
                        tl.store(p_op + O_Z + o_at, z.to(OP))
                arrivals += G
                _wait_for_group(p_count, arrivals)

        for i_row in tl.range(rank, BP // BR, G, num_stages=1, disable_licm=True):
            nought = _nought()
            o_row = i_row * BR + tl.arange(0, BR) + nought
            row = first_plan + o_row
            for i in tl.range(D // BD, num_stages=1, disable_licm=True):
                column = i * BD + tl.arange(0, BD) + nought
                vector = column // PADDED
                place = column % PADDED
                m_column = (place < WIDTH) & (vector < VECTORS_ALL)
                z = tl.load(p_f + F_Z + o_row[:, None] * D + column[None, :], cache_modifier=".cg")
                tl.store(
                    p_seeds + row[:, None] * (VECTORS_ALL * WIDTH) + (vector * WIDTH + place)[None, :], z,
                    mask=(row < n_plans)[:, None] & m_column[None, :],
                )  # fmt: skip
        # Nobody begins the next tile while another one still reads this one.
        arrivals += G
        _wait_for_group(p_count, arrivals)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, weights, launches


def _up(n: int, size: int) -> int:
    return int(triton.cdiv(n, size)) * size


def padded(sizes: Any, bk: int) -> dict[str, int]:
    """Columns of the kernel's matrices: multiples of the tiles of products over them."""
    vector = triton.next_power_of_2(sizes.dim)
    bd = max(bk, vector)
    return {
        "PADDED": vector, "D": _up(sizes.n_z * vector, bd), "BD": bd, "U": _up(sizes.hidden, bk),
        "C": _up(sizes.n_obs, bk), "H1": _up(sizes.hidden1, bk), "H2": max(bk, triton.next_power_of_2(sizes.hidden2)),
    }  # fmt: skip


def refusal(sizes: Any) -> str | None:
    """Why groups do not take a call; None where they do."""
    if sizes.hidden == 0:
        return "the prior is the identity"
    if sizes.apart:
        return "several starts for each plan"
    if sizes.dim > 128 or sizes.hidden2 > 128:
        return "tiles of more than 128 columns"
    return None


def processors_of(device: torch.device) -> int:
    """How many programs certainly run at the same time."""
    if device.type != "cuda":
        return PROCESSORS
    return min(PROCESSORS, torch.cuda.get_device_properties(device).multi_processor_count)


def option_for(n_plans: int, processors: int = PROCESSORS) -> tuple[Option, int]:
    """Tiles and programs of a group, by these numbers alone: a tile decides where sums are cut."""
    if INTERPRETED:
        # One program at a time: others would wait for it for ever.
        return Option((("BP", 16), ("BN", 16), ("BK", 16), ("BR", 16), ("STAGES", 1)), 4, 1), 1
    bp = 64
    tiles = triton.cdiv(n_plans, bp)
    group = 1
    while group < _MOST_PROGRAMS and 2 * group * tiles <= processors:
        group *= 2
    # By programs of a group, columns of a product and loads ahead: the fastest on an H200 that do not spill.
    bn, stages = {8: (32, 3), 4: (64, 4), 2: (128, 4)}.get(group, (64, 3))
    tiles_of = (("BP", bp), ("BN", bn), ("BK", 64), ("BR", 8), ("STAGES", stages))
    return Option(tiles_of, 8, stages, cooperative=True), group


def pack(
    sizes: Any, c: Mapping[str, int], prior: Sequence[Tensor], returns: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All matrices, each [columns of the product, what it sums over], and all vectors, float32."""
    d, u, context, h1, h2 = c["D"], c["U"], c["C"], c["H1"], c["H2"]
    w1, b1, w2, b2, w3, b3 = returns
    n_seeds = sizes.n_z * sizes.dim

    def columns(w: Tensor, size: int) -> Tensor:
        return torch.nn.functional.pad(w, (0, size - w.shape[-1])) if w.shape[-1] < size else w

    def rows(w: Tensor, size: int) -> Tensor:
        return torch.nn.functional.pad(w, (0, 0, 0, size - w.shape[-2])) if w.shape[-2] < size else w

    def seeds(w: Tensor) -> Tensor:
        # [..., n_z * D] -> [..., d]
        if c["PADDED"] != sizes.dim:
            w = columns(w.unflatten(-1, (sizes.n_z, sizes.dim)), c["PADDED"]).flatten(-2)
        return columns(w, d)

    m1, m2 = rows(seeds(prior[0]), u), rows(seeds(prior[2].t()), u)  # [u, d] both
    r1 = rows(seeds(w1[..., :n_seeds]), h1).flatten(0, 1)  # [E h1, d]
    first = r1
    if context:
        first = torch.cat((r1, rows(columns(w1[..., n_seeds:], context), h1).flatten(0, 1)), dim=1)
    r2 = rows(columns(w2, h1), h2)  # [E, h2, h1]
    matrices = torch.cat([
        x.reshape(-1) for x in (m1, m2.t(), first, r2, r2.transpose(1, 2), r1.t(), m2, m1.t())
    ]).to(dtype)  # fmt: skip
    vectors = torch.cat([
        x.reshape(-1) for x in (columns(prior[1], u), seeds(prior[3]), columns(b1, h1), columns(b2, h2),
                                columns(w3.transpose(0, 1), h2), b3.t())
    ])  # fmt: skip
    return matrices, vectors


_ARGUMENTS = (
    "p_z0", "p_context", "p_target", "p_plans", "p_seeds", "p_mean", "p_std", "n_plans", "n_steps", "n_obs",
    "step_size", "kappa", "prior_weight", "reach", "most_norm", "longest", "first_step", "seed0", "seed1",
    "stride_z0_plan", "stride_z0_vector", "stride_z0_element", "stride_context_plan", "stride_context_obs",
)  # fmt: skip


def launch(call: Any, option: Option, group: int) -> Launch:
    """The one launch of a call of ``plan_ascent``."""
    sizes, arguments, z0 = call.sizes, call.arguments, call.z0
    tiles = dict(option.tiles)
    c = padded(sizes, max(tiles["BK"], tiles["BN"]))
    matrices, vectors = pack(sizes, c, call.prior, call.returns, call.dtype)
    bp, e, room = tiles["BP"], sizes.members, triton.next_power_of_2(sizes.members)
    operands = bp * (3 * c["D"] + c["C"] + 3 * c["U"] + e * (3 * c["H1"] + c["H2"]))
    floats = bp * (3 * c["D"] + c["D"] // c["PADDED"] + 2 * room + c["D"] // c["BD"])
    # With fewer groups than tiles each takes several, one after the other.
    most = min(processors_of(z0.device) // group, MOST_SCRATCH // (operands * call.dtype.itemsize + floats * 4))
    n_groups = min(triton.cdiv(z0.shape[0], bp), max(1, most))
    of_call = {name: arguments[name] for name in _ARGUMENTS} | {
        "p_w": matrices, "p_b": vectors, "p_op": z0.new_empty((n_groups, operands), dtype=call.dtype),
        "p_f": z0.new_empty((n_groups, floats), dtype=torch.float32),
        "p_count": torch.zeros(n_groups, dtype=torch.int32, device=z0.device),
    }  # fmt: skip
    constants = {
        **call.constants, **c, "VECTORS_ALL": sizes.n_z, "WIDTH": sizes.dim, "MEMBERS": e, "MEMBERS_ROOM": room,
        "G": group,
    }  # fmt: skip
    return Launch(group_kernel, (n_groups * group,), of_call, constants, option)
