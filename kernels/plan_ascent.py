"""All steps of the inference of P plans in one launch: prior, return model, backward, update, trust region, noise.

A program owns N plans for all steps; plans are the columns of every matrix here, so that products are [weights] x
[N plans] and use the tensor cores from 16 plans on. One loop runs over the weight tiles of all products of all steps,
in the order of their use, from a buffer that lies in this order: their loads run ahead across products and steps and
never drain. What a product leaves goes to a scratch memory of the program, small enough for the caches, as the operand
of the next one. With several starts for each plan, the return model behind its first layer is a loop over starts apart
from that stream.

A step, rows x columns of the weights (d = n_z * D rows, each plan vector padded to a part or a multiple of a tile):

== ============================= =====================================================
1  W1  [U, d] z0                 a = silu, and its slope
2  W2  [d, U] a                  u = z0 + ..., x = norm(u)
3  R1  [E H1, d + obs] x         a1 and its slope (several starts: the plan's part alone)
4  R2  [E][H2, H1] a1            heads of the members
5  (no product)                  moments, and their gradient at the second layer, g2
6  R2' [E][H1, H2] g2            g1 = ... * slope1
7  R1' [d, E H1] g1              back through the norm: gu
8  W2' [U, d] gu                 gh = ... * slope
9  W1' [d, U] gh                 g = ... + gu - weight z0; the update after its last tile
== ============================= =====================================================

In bfloat16 what lies between products is kept in bfloat16, the last part of the way of the gradient too (gu); seeds,
sums, norms, moments and g itself are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gac_fast.kernels import plan_groups, plan_single
from gac_fast.kernels._launch import INTERPRETED, Launch, Option, architecture_of
from gac_fast.kernels._plan_math import at_least, log_slope, moment_slopes, silu, variance_of
from gac_fast.kernels.philox_normal import box_muller, philox4x32

__all__ = ["Sizes", "likely_option", "plan_ascent_kernel", "refusal", "run", "shipped"]

_NORM_EPS = tl.constexpr(1e-5)
_LEAST_NORM = tl.constexpr(1e-12)
_INTERPRETED = tl.constexpr(INTERPRETED)

# Columns of the return model where each plan has several starts: plans x starts at once. The tensor cores of Hopper
# read them from shared memory, those before it from registers.
_COLUMNS = {80: 32, 90: 64}

# Streaming multiprocessors of an H100 or H200: how many programs run at once.
_PROCESSORS = plan_groups.PROCESSORS


class Alone(NamedTuple):
    """Which calls programs take that go alone (``plan_single``), of those that they can take.

    Attributes:
        most_plans: calls of at most so many plans.
        own: plans of a program; None: as many as ``plan_single`` finds best.
    """

    most_plans: int
    own: int | None = None


# No call: no device has measured them yet. Once one has, this number is all that changes.
ALONE = Alone(most_plans=0)

# Microseconds that a step of a program takes alone, by its plans; counted, not measured.
_CHAIN = {16: 19.0, 32: 21.0, 64: 31.0, 128: 60.0}

# Bytes that the programs of one launch may have beside the weights, unless one program alone needs more. With several
# starts for each plan they grow as plans x starts x members; more plans are then done in several launches.
_MOST_SCRATCH = plan_groups.MOST_SCRATCH


@triton.jit
def _sync():
    """All threads of the program; what one has written to the scratch memory the others then see.

    Not ``tl.debug_barrier``: a loop that holds one has its loads not pipelined, and here no load that runs ahead
    reads what the program writes.
    """
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            "bar.sync 0; mov.b32 $0, $1;", "=r,r,~{memory}", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _vector_sums(x, VECTORS: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Sums over the plan vectors that a tile holds: [B, N] -> [VECTORS, N]."""
    if VECTORS == 1:
        sums = tl.sum(x, axis=0)[None, :]
    else:
        sums = tl.sum(tl.reshape(x, (VECTORS, B // VECTORS, N)), axis=1)
    return sums


@triton.jit
def _over_vectors(s, VECTORS: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """The reverse: [VECTORS, N] -> something that broadcasts to [B, N]."""
    if VECTORS > 1:
        s = tl.reshape(tl.broadcast_to(s[:, None, :], (VECTORS, B // VECTORS, N)), (B, N))
    return s


@triton.jit
def _over_starts(x, CHUNK: tl.constexpr, N: tl.constexpr):
    """[N] -> [CHUNK * N]."""
    return tl.reshape(tl.broadcast_to(x[None, :], (CHUNK, N)), (CHUNK * N,))


@triton.jit
def _write_plan(
    u,
    m,
    total,
    p_x,
    p_rms,
    p_u,
    o_tile,
    WIDTH: tl.constexpr,
    VECTORS: tl.constexpr,
    SPAN: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
):
    """Norm of tile m of u; one of SPAN tiles is done with its last, ``total`` is its sum of squares so far."""
    o_n = tl.arange(0, N)[None, :]
    if SPAN == 1:
        rms = tl.rsqrt(_vector_sums(u * u, VECTORS, B, N) / WIDTH + _NORM_EPS)
        # [VECTORS, N]
        tl.store(p_rms + (m * VECTORS + tl.arange(0, VECTORS))[:, None] * N + o_n, rms)
        tl.store(p_x + m * (B * N) + o_tile, (u * _over_vectors(rms, VECTORS, B, N)).to(p_x.dtype.element_ty))
    else:
        tl.store(p_u + m * (B * N) + o_tile, u)
        total = tl.where(m % SPAN == 0, 0.0, total) + tl.sum(u * u, axis=0)
        if m % SPAN == SPAN - 1:
            rms = tl.rsqrt(total / WIDTH + _NORM_EPS)[None, :]
            tl.store(p_rms + (m // SPAN) * N + o_n, rms)
            _sync()
            for i in tl.range(m - SPAN + 1, m + 1, num_stages=1):
                # [B, N]
                b_u = tl.load(p_u + i * (B * N) + o_tile)
                tl.store(p_x + i * (B * N) + o_tile, (b_u * rms).to(p_x.dtype.element_ty))
    return total


@triton.jit
def _noise(i, p_plans, o_plan, m_plan, step, seed0, seed1, WIDTH: tl.constexpr, PADDED: tl.constexpr,
           ROWS: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Normals [ROWS, N] of rows i * ROWS on: element (vector * WIDTH + place) of the plans' noise at ``step``."""
    # [N]
    plan = tl.load(p_plans + o_plan, mask=m_plan, other=0).to(tl.uint32)[:, None]
    k0 = seed0.to(tl.uint32)
    k1 = seed1.to(tl.uint32)
    if WIDTH % 4 == 0:
        # One Philox call for four rows, which belong to one plan vector.
        row = i * ROWS + 4 * tl.arange(0, ROWS // 4)
        c0 = (((row // PADDED) * WIDTH + row % PADDED) // 4).to(tl.uint32)[None, :]
        zero = (c0 * 0) + (plan * 0)
        w0, w1, w2, w3 = philox4x32(zero + c0, zero + plan, zero + step.to(tl.uint32), zero, zero + k0, zero + k1)
        x0, x1 = box_muller(w0, w1)
        x2, x3 = box_muller(w2, w3)
        normals = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    else:
        row = i * ROWS + tl.arange(0, ROWS)
        element = ((row // PADDED) * WIDTH + row % PADDED)[None, :]
        c0 = (element // 4).to(tl.uint32)
        zero = (c0 * 0) + (plan * 0)
        w0, w1, w2, w3 = philox4x32(zero + c0, zero + plan, zero + step.to(tl.uint32), zero, zero + k0, zero + k1)
        word = element % 4
        cosine, sine = box_muller(tl.where(word < 2, w0, w2), tl.where(word < 2, w1, w3))
        normals = tl.where(word % 2 == 0, cosine, sine)
    return tl.trans(normals)


@triton.jit
def _locate(tile, END1: tl.constexpr, END2: tl.constexpr, END3: tl.constexpr, END4: tl.constexpr, END6: tl.constexpr,
            END7: tl.constexpr, END8: tl.constexpr, R_Z0: tl.constexpr, R_A: tl.constexpr, R_X: tl.constexpr,
            R_A1: tl.constexpr, R_G2: tl.constexpr, R_G1: tl.constexpr, R_GU: tl.constexpr, R_GH: tl.constexpr,
            TILES_U: tl.constexpr, TILES_D: tl.constexpr, TILES_X: tl.constexpr, TILES_1: tl.constexpr,
            TILES_2: tl.constexpr, MEMBERS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Of tiles of the stream: 4 row tile + 2 (it ends here) + 1 (a product begins here), and the row of the operand."""
    begin = tl.where(tile >= END1, END1, 0)
    begin = tl.where(tile >= END2, END2, begin)
    begin = tl.where(tile >= END3, END3, begin)
    begin = tl.where(tile >= END4, END4, begin)
    begin = tl.where(tile >= END6, END6, begin)
    begin = tl.where(tile >= END7, END7, begin)
    begin = tl.where(tile >= END8, END8, begin)
    depth = tl.where(tile >= END1, TILES_U, TILES_D)
    depth = tl.where(tile >= END2, TILES_X, depth)
    depth = tl.where(tile >= END3, TILES_1, depth)
    depth = tl.where(tile >= END4, TILES_2, depth)
    depth = tl.where(tile >= END6, MEMBERS * TILES_1, depth)
    depth = tl.where(tile >= END7, TILES_D, depth)
    depth = tl.where(tile >= END8, TILES_U, depth)
    depth = tl.maximum(depth, 1)
    m = (tile - begin) // depth
    k = (tile - begin) - m * depth
    row = tl.where(tile >= END1, R_A, R_Z0)
    row = tl.where(tile >= END2, R_X, row)
    # Products 4 and 6 read what belongs to their member.
    row = tl.where(tile >= END3, R_A1 + (m // TILES_2) * (TILES_1 * B), row)
    row = tl.where(tile >= END4, R_G2 + (m // TILES_1) * (TILES_2 * B), row)
    row = tl.where(tile >= END6, R_G1, row)
    row = tl.where(tile >= END7, R_GU, row)
    row = tl.where(tile >= END8, R_GH, row)
    return 4 * m + tl.where(k == depth - 1, 2, 0) + tl.where(tile == begin, 1, 0), row + k * B


@triton.jit(do_not_specialize=["n_plans", "n_steps", "n_starts", "first_step", "seed0", "seed1"])
def plan_ascent_kernel(
    p_w,
    p_b,
    p_z0,
    p_context,
    p_target,
    p_plans,
    p_seeds,
    p_mean,
    p_std,
    p_op,
    p_f,
    p_table,
    p_starts,
    p_chunk,
    p_wc,
    n_plans,
    n_steps,
    n_starts,
    n_obs,
    step_size,
    kappa,
    prior_weight,
    reach,
    most_norm,
    longest,
    first_step,
    seed0,
    seed1,
    stride_z0_plan,
    stride_z0_vector,
    stride_z0_element,
    stride_context_plan,
    stride_context_start,
    stride_context_obs,
    # What it does
    LANGEVIN: tl.constexpr,
    HAS_PRIOR_WEIGHT: tl.constexpr,
    HAS_RADIUS: tl.constexpr,
    HAS_MOST_NORM: tl.constexpr,
    APART: tl.constexpr,  # several starts for each plan
    # Sizes
    VECTORS_ALL: tl.constexpr,  # n_z
    WIDTH: tl.constexpr,  # D
    PADDED: tl.constexpr,  # rows of a plan vector
    MEMBERS: tl.constexpr,
    MEMBERS_ROOM: tl.constexpr,  # the next power of 2
    TILES_U: tl.constexpr,  # tiles of B rows: hidden layer of the prior (0: identity),
    TILES_D: tl.constexpr,  # all plan vectors,
    TILES_C: tl.constexpr,  # first state,
    TILES_1: tl.constexpr,  # first and second hidden layer of a return model
    TILES_2: tl.constexpr,
    ROOM_C: tl.constexpr,  # several starts: features of a tile,
    CHUNK: tl.constexpr,  # and starts of each plan at once
    ROWS: tl.constexpr,  # of the seeds, in the update
    B: tl.constexpr,
    N: tl.constexpr,
):
    # Tiles of each product and where they begin.
    C3: tl.constexpr = 0 if APART else TILES_C
    END1: tl.constexpr = TILES_U * TILES_D
    END2: tl.constexpr = END1 + TILES_D * TILES_U
    END3: tl.constexpr = END2 + MEMBERS * TILES_1 * (TILES_D + C3)
    END4: tl.constexpr = END3 + (0 if APART else MEMBERS * TILES_2 * TILES_1)
    END6: tl.constexpr = END4 + (0 if APART else MEMBERS * TILES_1 * TILES_2)
    END7: tl.constexpr = END6 + TILES_D * MEMBERS * TILES_1
    END8: tl.constexpr = END7 + TILES_U * TILES_D
    END9: tl.constexpr = END8 + TILES_D * TILES_U
    # Several starts: the tiles of their loop lie behind the stream.
    W_4: tl.constexpr = END9
    W_6: tl.constexpr = W_4 + MEMBERS * TILES_2 * TILES_1

    # Rows of the scratch memories: operands, and float32.
    ROWS_D: tl.constexpr = TILES_D * B
    ROWS_U: tl.constexpr = TILES_U * B
    ROWS_1: tl.constexpr = MEMBERS * TILES_1 * B
    ROWS_2: tl.constexpr = MEMBERS * TILES_2 * B
    R_Z0: tl.constexpr = 0
    R_X: tl.constexpr = R_Z0 + ROWS_D
    R_GU: tl.constexpr = R_X + ROWS_D + C3 * B
    R_A: tl.constexpr = R_GU + ROWS_D
    R_S: tl.constexpr = R_A + ROWS_U
    R_GH: tl.constexpr = R_S + ROWS_U
    R_A1: tl.constexpr = R_GH + ROWS_U
    R_S1: tl.constexpr = R_A1 + ROWS_1
    R_G1: tl.constexpr = R_S1 + ROWS_1
    R_S2: tl.constexpr = R_G1 + ROWS_1
    R_G2: tl.constexpr = R_S2 + ROWS_2
    OP_ROWS: tl.constexpr = R_G2 + ROWS_2

    VECTORS: tl.constexpr = B // PADDED if PADDED < B else 1
    SPAN: tl.constexpr = PADDED // B if PADDED > B else 1
    F_Z0: tl.constexpr = 0
    F_START: tl.constexpr = F_Z0 + ROWS_D
    F_G: tl.constexpr = F_START + ROWS_D
    F_U: tl.constexpr = F_G + ROWS_D
    F_PART: tl.constexpr = F_U + (ROWS_D if SPAN > 1 else 0)
    F_G1: tl.constexpr = F_PART + (ROWS_1 if APART else 0)
    F_RMS: tl.constexpr = F_G1 + (ROWS_1 if APART else 0)
    F_HEAD: tl.constexpr = F_RMS + TILES_D * VECTORS
    F_SLOPE: tl.constexpr = F_HEAD + 2 * MEMBERS
    F_ROWS: tl.constexpr = F_SLOPE + 2 * MEMBERS

    # Rows of the vector of biases.
    O_B2: tl.constexpr = ROWS_U
    O_BR1: tl.constexpr = O_B2 + ROWS_D
    O_BR2: tl.constexpr = O_BR1 + ROWS_1
    O_W3: tl.constexpr = O_BR2 + ROWS_2
    O_B3: tl.constexpr = O_W3 + 2 * ROWS_2

    OP: tl.constexpr = p_op.dtype.element_ty
    TILE: tl.constexpr = B * N

    i_program = tl.program_id(0).to(tl.int64)
    o_plan = i_program * N + tl.arange(0, N)
    m_plan = o_plan < n_plans
    o_n = tl.arange(0, N)
    o_b = tl.arange(0, B)
    o_tile = o_b[:, None] * N + o_n[None, :]
    o_w = o_b[:, None] * B + o_b[None, :]
    o_rows = tl.arange(0, ROWS)[:, None] * N + o_n[None, :]
    p_op += i_program * (OP_ROWS * N)
    p_f += i_program * (F_ROWS * N)
    if APART:
        # Columns of the return model: CHUNK starts of each plan.
        COLUMNS: tl.constexpr = CHUNK * N
        COLUMNS_TILE: tl.constexpr = B * COLUMNS
        n_chunks = (n_starts + CHUNK - 1) // CHUNK
        p_starts += i_program * (2 * MEMBERS * COLUMNS) * n_chunks
        # Operands of a chunk, then slopes of every member and chunk.
        p_chunk += i_program * ((TILES_1 + TILES_2) * COLUMNS_TILE) * (MEMBERS * n_chunks + 1)
    zero_n = tl.zeros((N,), tl.float32)
    wide = i_program * 0  # makes int64 of what is added to it

    for i in tl.range(ROWS_D // ROWS, num_stages=1):
        row = i * ROWS + tl.arange(0, ROWS)
        vector = row // PADDED
        place = row % PADDED
        m_row = (place < WIDTH) & (vector < VECTORS_ALL)
        # [ROWS, N]
        b_z0 = tl.load(
            p_z0
            + o_plan[None, :] * stride_z0_plan
            + (vector.to(tl.int64) * stride_z0_vector + place.to(tl.int64) * stride_z0_element)[:, None],
            mask=m_row[:, None] & m_plan[None, :],
            other=0.0,
        )
        tl.store(p_f + F_Z0 * N + i * (ROWS * N) + o_rows, b_z0)
        tl.store(p_op + R_Z0 * N + i * (ROWS * N) + o_rows, b_z0.to(OP))
        if HAS_RADIUS:
            tl.store(p_f + F_START * N + i * (ROWS * N) + o_rows, b_z0)
    if C3 > 0:
        for i in tl.range(C3, num_stages=1):
            row = i * B + o_b
            # [B, N]
            b_c = tl.load(
                p_context + o_plan[None, :] * stride_context_plan + row.to(tl.int64)[:, None] * stride_context_obs,
                mask=(row < n_obs)[:, None] & m_plan[None, :],
                other=0.0,
            )
            tl.store(p_op + R_X * N + (TILES_D + i) * TILE + o_tile, b_c.to(OP))
    p_table += i_program * (2 * END9)
    for i in tl.range(0, END9, 128, num_stages=1):
        o_tiles = i + tl.arange(0, 128)
        codes, rows = _locate(
            o_tiles, END1, END2, END3, END4, END6, END7, END8, R_Z0, R_A, R_X, R_A1, R_G2, R_G1, R_GU, R_GH,
            TILES_U, TILES_D, TILES_D + C3, TILES_1, TILES_2, MEMBERS, B,
        )  # fmt: skip
        tl.store(p_table + o_tiles, codes, mask=o_tiles < END9)
        tl.store(p_table + END9 + o_tiles, rows, mask=o_tiles < END9)
    target = zero_n
    if LANGEVIN:
        target = tl.load(p_target + o_plan, mask=m_plan, other=0.0)
    _sync()
    if TILES_U == 0:
        total = zero_n
        for i in tl.range(TILES_D, num_stages=1):
            total = _write_plan(
                tl.load(p_f + F_Z0 * N + i * TILE + o_tile), i, total, p_op + R_X * N, p_f + F_RMS * N, p_f + F_U * N,
                o_tile, WIDTH, VECTORS, SPAN, B, N,
            )  # fmt: skip
        _sync()

    act = tl.load(p_op + (R_Z0 if TILES_U > 0 else R_X) * N + o_tile)
    acc = tl.zeros((B, N), tl.float32)
    total = zero_n  # of a plan vector that spans several tiles
    squares = zero_n  # of the gradient
    head_mean = zero_n
    head_log = zero_n
    # Without the option every address of the body would be made before the loop, and kept in registers.
    for t in tl.range(n_steps * END9 + END4, disable_licm=True):
        step = t // END9
        tile = t % END9
        # [B, B]
        b_w = tl.load(p_w + tile.to(tl.int64) * (B * B) + o_w)

        following = tl.where(tile + 1 >= END9, 0, tile + 1)
        code = tl.load(p_table + tile)
        row_following = tl.load(p_table + END9 + following)
        begins = tl.load(p_table + following) & 1 != 0
        m = code // 4
        last = code & 2 != 0
        # Under a condition, so that it is not taken for a load that may run ahead of what the program writes.
        act_following = act
        if not begins:
            act_following = tl.load(p_op + row_following * N + o_tile)
        acc = tl.dot(b_w, act, acc, input_precision="ieee")

        if last:
            o_row = m * B + o_b
            if tile < END1:
                a, slope = silu(acc + tl.load(p_b + o_row)[:, None])
                tl.store(p_op + R_A * N + m * TILE + o_tile, a.to(OP))
                tl.store(p_op + R_S * N + m * TILE + o_tile, slope.to(OP))
            elif tile < END2:
                u = acc + tl.load(p_b + O_B2 + o_row)[:, None] + tl.load(p_f + F_Z0 * N + m * TILE + o_tile)
                total = _write_plan(
                    u, m, total, p_op + R_X * N, p_f + F_RMS * N, p_f + F_U * N, o_tile, WIDTH, VECTORS, SPAN, B, N
                )
            elif tile < END3:
                h = acc + tl.load(p_b + O_BR1 + o_row)[:, None]
                if APART:
                    tl.store(p_f + F_PART * N + m * TILE + o_tile, h)
                    if m == MEMBERS * TILES_1 - 1:
                        _sync()
                        o_column = tl.arange(0, COLUMNS)
                        o_columns = o_b[:, None] * COLUMNS + o_column[None, :]
                        o_part = o_b[:, None] * N + (o_column % N)[None, :]
                        o_plan_column = i_program * N + o_column % N
                        m_plan_column = o_plan_column < n_plans
                        for s in tl.range(MEMBERS * n_chunks, num_stages=1):
                            e_s = s // n_chunks
                            start = (s % n_chunks) * CHUNK + o_column // N
                            m_column = m_plan_column & (start < n_starts)
                            p_slopes = p_chunk + (wide + s + 1) * ((TILES_1 + TILES_2) * COLUMNS_TILE)
                            for i in tl.range(TILES_1, num_stages=1):
                                # [B, COLUMNS]
                                h_s = tl.load(p_f + F_PART * N + (e_s * TILES_1 + i) * TILE + o_part)
                                for kk in tl.range(TILES_C, num_stages=1):
                                    o_c = kk * ROOM_C + tl.arange(0, ROOM_C)
                                    # [ROOM_C, COLUMNS]
                                    b_c = tl.load(
                                        p_context
                                        + (
                                            o_plan_column * stride_context_plan
                                            + start.to(tl.int64) * stride_context_start
                                        )[None, :]
                                        + o_c.to(tl.int64)[:, None] * stride_context_obs,
                                        mask=(o_c < n_obs)[:, None] & m_column[None, :],
                                        other=0.0,
                                    )
                                    # [B, ROOM_C]
                                    b_wc = tl.load(
                                        p_wc
                                        + (wide + (e_s * TILES_1 + i) * TILES_C + kk) * (B * ROOM_C)
                                        + o_b[:, None] * ROOM_C
                                        + tl.arange(0, ROOM_C)[None, :]
                                    )
                                    h_s = tl.dot(b_wc, b_c.to(OP), h_s, input_precision="ieee")
                                a_s, slope_s = silu(h_s)
                                tl.store(p_chunk + i * COLUMNS_TILE + o_columns, a_s.to(OP))
                                tl.store(p_slopes + i * COLUMNS_TILE + o_columns, slope_s.to(OP))
                            _sync()
                            mean_s = tl.zeros((COLUMNS,), tl.float32) + tl.load(p_b + O_B3 + e_s)
                            log_s = tl.zeros((COLUMNS,), tl.float32) + tl.load(p_b + O_B3 + MEMBERS + e_s)
                            for i in tl.range(TILES_2, num_stages=1):
                                h_s = tl.zeros((B, COLUMNS), tl.float32)
                                for kk in tl.range(TILES_1, num_stages=1):
                                    o_4 = (wide + W_4 + (e_s * TILES_2 + i) * TILES_1 + kk) * (B * B)
                                    b_a1 = tl.load(p_chunk + kk * COLUMNS_TILE + o_columns)
                                    h_s = tl.dot(tl.load(p_w + o_4 + o_w), b_a1, h_s, input_precision="ieee")
                                o_member = (e_s * TILES_2 + i) * B + o_b
                                a_s, slope_s = silu(h_s + tl.load(p_b + O_BR2 + o_member)[:, None])
                                tl.store(p_slopes + (TILES_1 + i) * COLUMNS_TILE + o_columns, slope_s.to(OP))
                                mean_s += tl.sum(a_s * tl.load(p_b + O_W3 + o_member)[:, None], axis=0)
                                log_s += tl.sum(a_s * tl.load(p_b + O_W3 + ROWS_2 + o_member)[:, None], axis=0)
                            tl.store(p_starts + s * COLUMNS + o_column, mean_s)
                            tl.store(p_starts + (MEMBERS * n_chunks + s) * COLUMNS + o_column, log_s)
                            _sync()
                        n_members = (MEMBERS * n_starts).to(tl.float32)
                        o_start = tl.arange(0, CHUNK)[:, None]
                        # [CHUNK, N]
                        p_start = p_starts + o_start * N + o_n[None, :]
                        mean = zero_n
                        for s in tl.range(MEMBERS * n_chunks, num_stages=1):
                            m_start = (s % n_chunks) * CHUNK + o_start < n_starts
                            mean += tl.sum(tl.load(p_start + s * COLUMNS, mask=m_start, other=0.0), axis=0)
                        mean = mean / n_members
                        variance = zero_n
                        for s in tl.range(MEMBERS * n_chunks, num_stages=1):
                            m_start = (s % n_chunks) * CHUNK + o_start < n_starts
                            off = tl.load(p_start + s * COLUMNS, mask=m_start, other=0.0) - mean[None, :]
                            own = variance_of(
                                tl.load(p_start + (MEMBERS * n_chunks + s) * COLUMNS, mask=m_start, other=0.0)
                            )
                            variance += tl.sum(tl.where(m_start, own + off * off, 0.0), axis=0)
                        std = tl.sqrt_rn(variance / n_members)
                        if step == n_steps:
                            tl.store(p_mean + o_plan, mean, mask=m_plan)
                            tl.store(p_std + o_plan, std, mask=m_plan)
                        else:
                            share, each = moment_slopes(mean, std, target, kappa, n_members, LANGEVIN)
                            share_s = _over_starts(zero_n + share, CHUNK, N)
                            each_s = _over_starts(each, CHUNK, N)
                            center = _over_starts(mean, CHUNK, N)
                            for i in tl.range(MEMBERS * TILES_1, num_stages=1):
                                tl.store(p_f + F_G1 * N + i * TILE + o_tile, tl.zeros((B, N), tl.float32))
                            for s in tl.range(MEMBERS * n_chunks, num_stages=1):
                                e_s = s // n_chunks
                                m_column = (s % n_chunks) * CHUNK + o_column // N < n_starts
                                p_slopes = p_chunk + (wide + s + 1) * ((TILES_1 + TILES_2) * COLUMNS_TILE)
                                mean_s = tl.load(p_starts + s * COLUMNS + o_column)
                                log_s = tl.load(p_starts + (MEMBERS * n_chunks + s) * COLUMNS + o_column)
                                by_mean = tl.where(m_column, share_s + each_s * (mean_s - center), 0.0)
                                by_log = tl.where(m_column, log_slope(log_s, each_s), 0.0)
                                for i in tl.range(TILES_2, num_stages=1):
                                    o_member = (e_s * TILES_2 + i) * B + o_b
                                    g2_s = by_mean[None, :] * tl.load(p_b + O_W3 + o_member)[:, None]
                                    g2_s += by_log[None, :] * tl.load(p_b + O_W3 + ROWS_2 + o_member)[:, None]
                                    g2_s *= tl.load(p_slopes + (TILES_1 + i) * COLUMNS_TILE + o_columns).to(tl.float32)
                                    tl.store(p_chunk + (TILES_1 + i) * COLUMNS_TILE + o_columns, g2_s.to(OP))
                                _sync()
                                for i in tl.range(TILES_1, num_stages=1):
                                    b_g1 = tl.zeros((B, COLUMNS), tl.float32)
                                    for kk in tl.range(TILES_2, num_stages=1):
                                        o_6 = (wide + W_6 + (e_s * TILES_1 + i) * TILES_2 + kk) * (B * B)
                                        b_g2 = tl.load(p_chunk + (TILES_1 + kk) * COLUMNS_TILE + o_columns)
                                        b_g1 = tl.dot(tl.load(p_w + o_6 + o_w), b_g2, b_g1, input_precision="ieee")
                                    b_g1 *= tl.load(p_slopes + i * COLUMNS_TILE + o_columns).to(tl.float32)
                                    p_g1 = p_f + F_G1 * N + (e_s * TILES_1 + i) * TILE + o_tile
                                    if CHUNK == 1:
                                        tl.store(p_g1, tl.load(p_g1) + b_g1)
                                    else:
                                        over_starts = tl.sum(tl.reshape(b_g1, (B, CHUNK, N)), axis=1)
                                        tl.store(p_g1, tl.load(p_g1) + over_starts)
                                _sync()
                            for i in tl.range(MEMBERS * TILES_1, num_stages=1):
                                b_g1 = tl.load(p_f + F_G1 * N + i * TILE + o_tile)
                                tl.store(p_op + R_G1 * N + i * TILE + o_tile, b_g1.to(OP))
                else:
                    a, slope = silu(h)
                    tl.store(p_op + R_A1 * N + m * TILE + o_tile, a.to(OP))
                    tl.store(p_op + R_S1 * N + m * TILE + o_tile, slope.to(OP))
            elif tile < END4:
                a, slope = silu(acc + tl.load(p_b + O_BR2 + o_row)[:, None])
                w_mean = tl.load(p_b + O_W3 + o_row)[:, None]
                w_log = tl.load(p_b + O_W3 + ROWS_2 + o_row)[:, None]
                e = m // TILES_2
                first = m % TILES_2 == 0
                head_mean = tl.where(first, tl.load(p_b + O_B3 + e), head_mean) + tl.sum(a * w_mean, axis=0)
                head_log = tl.where(first, tl.load(p_b + O_B3 + MEMBERS + e), head_log) + tl.sum(a * w_log, axis=0)
                if MEMBERS * TILES_2 == 1:
                    std = tl.sqrt_rn(variance_of(head_log))
                    if step == n_steps:
                        tl.store(p_mean + o_plan, head_mean, mask=m_plan)
                        tl.store(p_std + o_plan, std, mask=m_plan)
                    share, each = moment_slopes(head_mean, std, target, kappa, 1.0, LANGEVIN)
                    g2 = ((zero_n + share)[None, :] * w_mean + log_slope(head_log, each)[None, :] * w_log) * slope
                    tl.store(p_op + R_G2 * N + o_tile, g2.to(OP))
                else:
                    tl.store(p_op + R_S2 * N + m * TILE + o_tile, slope.to(OP))
                    if m % TILES_2 == TILES_2 - 1:
                        tl.store(p_f + (F_HEAD + e) * N + o_n, head_mean)
                        tl.store(p_f + (F_HEAD + MEMBERS + e) * N + o_n, head_log)
                    if m == MEMBERS * TILES_2 - 1:
                        _sync()
                        o_member = tl.arange(0, MEMBERS_ROOM)
                        m_member = (o_member < MEMBERS)[:, None]
                        # [MEMBERS_ROOM, N]
                        p_head = p_f + (F_HEAD + o_member)[:, None] * N + o_n[None, :]
                        b_mean = tl.load(p_head, mask=m_member, other=0.0)
                        b_log = tl.load(p_head + MEMBERS * N, mask=m_member, other=0.0)
                        mean = tl.sum(b_mean, axis=0) / MEMBERS
                        off = tl.where(m_member, b_mean - mean[None, :], 0.0)
                        b_variance = tl.where(m_member, variance_of(b_log), 0.0)
                        std = tl.sqrt_rn(tl.sum(b_variance + off * off, axis=0) / MEMBERS)
                        if step == n_steps:
                            tl.store(p_mean + o_plan, mean, mask=m_plan)
                            tl.store(p_std + o_plan, std, mask=m_plan)
                        share, each = moment_slopes(mean, std, target, kappa, MEMBERS * 1.0, LANGEVIN)
                        by_mean = (zero_n + share)[None, :] + each[None, :] * off
                        p_slope = p_f + (F_SLOPE + o_member)[:, None] * N + o_n[None, :]
                        tl.store(p_slope, by_mean, mask=m_member)
                        tl.store(p_slope + MEMBERS * N, log_slope(b_log, each[None, :]), mask=m_member)
                        _sync()
                        for i in tl.range(MEMBERS * TILES_2, num_stages=1):
                            p_of = p_f + (F_SLOPE + i // TILES_2) * N + o_n
                            g2 = tl.load(p_of)[None, :] * tl.load(p_b + O_W3 + i * B + o_b)[:, None]
                            w_log = tl.load(p_b + O_W3 + ROWS_2 + i * B + o_b)[:, None]
                            g2 += tl.load(p_of + MEMBERS * N)[None, :] * w_log
                            g2 *= tl.load(p_op + R_S2 * N + i * TILE + o_tile).to(tl.float32)
                            tl.store(p_op + R_G2 * N + i * TILE + o_tile, g2.to(OP))
            elif tile < END6:
                slope = tl.load(p_op + R_S1 * N + m * TILE + o_tile).to(tl.float32)
                tl.store(p_op + R_G1 * N + m * TILE + o_tile, (acc * slope).to(OP))
            elif tile < END7:
                # Back through z = u / rms(u).
                z = tl.load(p_op + R_X * N + m * TILE + o_tile).to(tl.float32)
                if SPAN == 1:
                    p_rms = p_f + (F_RMS + m * VECTORS + tl.arange(0, VECTORS))[:, None] * N + o_n[None, :]
                    along = _vector_sums(acc * z, VECTORS, B, N) / WIDTH
                    gu = acc - z * _over_vectors(along, VECTORS, B, N)
                    gu *= _over_vectors(tl.load(p_rms), VECTORS, B, N)
                    if TILES_U > 0:
                        tl.store(p_op + R_GU * N + m * TILE + o_tile, gu.to(OP))
                    else:
                        if HAS_PRIOR_WEIGHT:
                            gu -= prior_weight * tl.load(p_f + F_Z0 * N + m * TILE + o_tile)
                        tl.store(p_f + F_G * N + m * TILE + o_tile, gu)
                        squares += tl.sum(gu * gu, axis=0)
                else:
                    tl.store(p_f + F_U * N + m * TILE + o_tile, acc)
                    total = tl.where(m % SPAN == 0, 0.0, total) + tl.sum(acc * z, axis=0)
                    if m % SPAN == SPAN - 1:
                        _sync()
                        along = (total / WIDTH)[None, :]
                        rms = tl.load(p_f + (F_RMS + m // SPAN) * N + o_n)[None, :]
                        for i in tl.range(m - SPAN + 1, m + 1, num_stages=1):
                            z = tl.load(p_op + R_X * N + i * TILE + o_tile).to(tl.float32)
                            gu = (tl.load(p_f + F_U * N + i * TILE + o_tile) - z * along) * rms
                            if TILES_U > 0:
                                tl.store(p_op + R_GU * N + i * TILE + o_tile, gu.to(OP))
                            else:
                                if HAS_PRIOR_WEIGHT:
                                    gu -= prior_weight * tl.load(p_f + F_Z0 * N + i * TILE + o_tile)
                                tl.store(p_f + F_G * N + i * TILE + o_tile, gu)
                                squares += tl.sum(gu * gu, axis=0)
            elif tile < END8:
                slope = tl.load(p_op + R_S * N + m * TILE + o_tile).to(tl.float32)
                tl.store(p_op + R_GH * N + m * TILE + o_tile, (acc * slope).to(OP))
            else:
                g = acc + tl.load(p_op + R_GU * N + m * TILE + o_tile).to(tl.float32)
                if HAS_PRIOR_WEIGHT:
                    g -= prior_weight * tl.load(p_f + F_Z0 * N + m * TILE + o_tile)
                tl.store(p_f + F_G * N + m * TILE + o_tile, g)
                squares += tl.sum(g * g, axis=0)

            if begins:
                _sync()
            if tile == END9 - 1:
                norm = at_least(tl.sqrt_rn(squares), _LEAST_NORM)
                squares = zero_n
                if LANGEVIN:
                    longest_s = longest / norm
                    move_noise = tl.where(longest_s > step_size, step_size, longest_s)
                    move = 0.5 * move_noise * move_noise
                else:
                    move = step_size * (1.0 - step.to(tl.float32) / n_steps.to(tl.float32)) / norm
                inside = zero_n + 1.0
                within = zero_n + 1.0
                if HAS_RADIUS or HAS_MOST_NORM:
                    norms = zero_n
                    offsets = zero_n
                    across = zero_n
                    starts = zero_n
                    for i in tl.range(ROWS_D // ROWS, num_stages=1):
                        z = tl.load(p_f + F_Z0 * N + i * (ROWS * N) + o_rows)
                        z += tl.load(p_f + F_G * N + i * (ROWS * N) + o_rows) * move[None, :]
                        norms += tl.sum(z * z, axis=0)
                        if HAS_RADIUS:
                            start = tl.load(p_f + F_START * N + i * (ROWS * N) + o_rows)
                            off = z - start
                            offsets += tl.sum(off * off, axis=0)
                            across += tl.sum(off * start, axis=0)
                            starts += tl.sum(start * start, axis=0)
                    if HAS_RADIUS:
                        inside = reach / at_least(tl.sqrt_rn(offsets), _LEAST_NORM)
                        inside = tl.where(inside >= 1.0, 1.0, inside)
                        # |start + inside * off|^2
                        brought_in = starts + inside * (2.0 * across + inside * offsets)
                        norms = tl.where(inside >= 1.0, norms, at_least(brought_in, 0.0))
                    if HAS_MOST_NORM:
                        within = most_norm / at_least(tl.sqrt_rn(norms), _LEAST_NORM)
                        within = tl.where(within >= 1.0, 1.0, within)
                for i in tl.range(ROWS_D // ROWS, num_stages=1):
                    z = tl.load(p_f + F_Z0 * N + i * (ROWS * N) + o_rows)
                    z += tl.load(p_f + F_G * N + i * (ROWS * N) + o_rows) * move[None, :]
                    if HAS_RADIUS:
                        start = tl.load(p_f + F_START * N + i * (ROWS * N) + o_rows)
                        z = start + (z - start) * inside[None, :]
                    if HAS_MOST_NORM:
                        z *= within[None, :]
                    if LANGEVIN:
                        noise = _noise(
                            i, p_plans, o_plan, m_plan, first_step + step, seed0, seed1, WIDTH, PADDED, ROWS, N
                        )
                        row_i = i * ROWS + tl.arange(0, ROWS)
                        m_row = (row_i % PADDED < WIDTH) & (row_i // PADDED < VECTORS_ALL)
                        z += tl.where(m_row[:, None], noise * move_noise[None, :], 0.0)
                    tl.store(p_f + F_Z0 * N + i * (ROWS * N) + o_rows, z)
                    if TILES_U > 0:
                        tl.store(p_op + R_Z0 * N + i * (ROWS * N) + o_rows, z.to(OP))
                if TILES_U == 0:
                    _sync()
                    for i in tl.range(TILES_D, num_stages=1):
                        total = _write_plan(
                            tl.load(p_f + F_Z0 * N + i * TILE + o_tile), i, total, p_op + R_X * N, p_f + F_RMS * N,
                            p_f + F_U * N, o_tile, WIDTH, VECTORS, SPAN, B, N,
                        )  # fmt: skip
                _sync()
            if begins:
                act_following = tl.load(p_op + row_following * N + o_tile)
            acc = tl.zeros((B, N), tl.float32)
        act = act_following

    _sync()
    for i in tl.range(ROWS_D // ROWS, num_stages=1):
        row_i = i * ROWS + tl.arange(0, ROWS)
        vector = row_i // PADDED
        place = row_i % PADDED
        m_row = (place < WIDTH) & (vector < VECTORS_ALL)
        # [ROWS, N]
        z = tl.load(p_f + F_Z0 * N + i * (ROWS * N) + o_rows)
        tl.store(
            p_seeds + o_plan[None, :] * (VECTORS_ALL * WIDTH) + (vector * WIDTH + place)[:, None],
            z,
            mask=m_row[:, None] & m_plan[None, :],
        )


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, and the weights in the order of their use


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call, and what follows from them for tiles of B rows.

    Attributes:
        n_z, dim, hidden: of plan and prior (0: the identity).
        members, hidden1, hidden2, n_obs: of the return model.
        apart: several starts for each plan.
    """

    n_z: int
    dim: int
    hidden: int
    members: int
    hidden1: int
    hidden2: int
    n_obs: int
    apart: bool

    @classmethod
    def of(cls, prior: Sequence[Tensor], returns: Sequence[Tensor], z0: Tensor, context: Tensor | None) -> Sizes:
        members, hidden1, n_inputs = returns[0].shape
        _, n_z, dim = z0.shape
        return cls(
            n_z, dim, prior[0].shape[0] if prior else 0, members, hidden1, returns[2].shape[1], n_inputs - n_z * dim,
            context is not None and context.shape[1] > 1,
        )  # fmt: skip

    def padded(self, b: int) -> int:
        """Rows of a plan vector: a divisor or a multiple of the tile."""
        return triton.next_power_of_2(self.dim) if self.dim <= b else triton.cdiv(self.dim, b) * b

    def constants(self, b: int, n: int, *, langevin: bool, columns: int) -> dict[str, int | bool]:
        """Constants of the kernel for tiles of b rows and n plans."""
        rows = triton.cdiv(self.n_z * self.padded(b), b) * b
        room = min(max(triton.next_power_of_2(self.n_obs), 16), 128)
        least = 16 if langevin or self.hidden or self.padded(b) > b else b
        return {
            "APART": self.apart, "VECTORS_ALL": self.n_z, "WIDTH": self.dim, "PADDED": self.padded(b),
            "MEMBERS": self.members, "MEMBERS_ROOM": triton.next_power_of_2(self.members),
            "TILES_U": triton.cdiv(self.hidden, b), "TILES_D": rows // b,
            "TILES_C": triton.cdiv(self.n_obs, room if self.apart else b), "TILES_1": triton.cdiv(self.hidden1, b),
            "TILES_2": triton.cdiv(self.hidden2, b), "ROOM_C": room, "CHUNK": max(1, columns // n),
            # As many as the update keeps in registers, of which the noise needs most. Without a prior the norms follow
            # the update at once: whole tiles, whose offsets both then share, where a tile holds whole plan vectors.
            "ROWS": math.gcd(rows, max((1024 if langevin else 4096) // n, least)),
        }  # fmt: skip

    def scratch_rows(self, c: Mapping[str, int | bool], b: int) -> tuple[int, int]:
        """Rows of N plans in the scratch of a program: operands, and float32."""
        d, u, one, two = (n * b for n in (c["TILES_D"], c["TILES_U"], self.members * c["TILES_1"],
                                          self.members * c["TILES_2"]))  # fmt: skip
        context = 0 if self.apart else c["TILES_C"] * b
        vectors = max(1, b // c["PADDED"])
        spans = c["PADDED"] > b
        f = 3 * d + d * spans + 2 * one * self.apart + c["TILES_D"] * vectors + 4 * self.members
        return 3 * d + context + 3 * u + 3 * one + 2 * two, f


def _padded(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def _fill(tiles: Tensor, w: Tensor) -> None:
    """Cut w into tiles, row by row."""
    _, b, width = tiles.shape
    cut = w.unflatten(0, (-1, b)).unflatten(-1, (-1, width)).transpose(1, 2)
    tiles.view(cut.shape).copy_(cut)


def pack(
    sizes: Sizes, c: Mapping[str, Any], b: int, prior: Sequence[Tensor], returns: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights as tiles [n, b, b] in the order of their use, a float32 vector of biases and heads, and with several
    starts the tiles [E * TILES_1 * TILES_C, b, ROOM_C] of the first layer's context."""
    d, u, one, two = (c[name] * b for name in ("TILES_D", "TILES_U", "TILES_1", "TILES_2"))
    e = sizes.members

    def seeds_last(x: Tensor) -> Tensor:
        # [..., n_z * D] -> [..., d]
        split = _padded(x.unflatten(-1, (sizes.n_z, sizes.dim)), c["PADDED"])
        return _padded(split.flatten(-2), d)

    def rows(x: Tensor, size: int) -> Tensor:
        return _padded(x.transpose(-1, -2), size).transpose(-1, -2)

    stack: list[Tensor] = []
    biases: list[Tensor] = []
    w1, b1, w2, b2, w3, b3 = returns
    r1 = rows(w1, one)  # [E, one, d + obs]
    r1_seeds = seeds_last(r1[..., : sizes.n_z * sizes.dim]).reshape(e * one, d)
    r2 = rows(_padded(w2, one), two)  # [E, two, one]
    context = r1[..., sizes.n_z * sizes.dim :]
    width = c["ROOM_C"] if sizes.apart else b
    context = _padded(context, c["TILES_C"] * width).reshape(e * one, c["TILES_C"] * width)
    if prior:
        u1 = rows(seeds_last(prior[0]), u)  # [u, d]
        u2 = rows(seeds_last(prior[2].t()), u)
        stack += [u1, u2.t()]
        biases += [_padded(prior[1], u), seeds_last(prior[3])]
    else:
        biases += [w1.new_zeros(d)]
    forward = r1_seeds if sizes.apart or not sizes.n_obs else torch.cat((r1_seeds, context), dim=1)
    through = [r2.reshape(e * two, one), r2.transpose(1, 2).reshape(e * one, two)]
    stack += [forward, *([] if sizes.apart else through), r1_seeds.t()]
    if prior:
        stack += [u2, u1.t()]
    if sizes.apart:
        stack += through
    tiles = w1.new_empty((sum(w.numel() for w in stack) // (b * b), b, b), dtype=dtype)
    at = 0
    for w in stack:
        n = w.numel() // (b * b)
        _fill(tiles[at : at + n], w)
        at += n
    context_tiles = None
    if sizes.apart:
        context_tiles = w1.new_empty((context.numel() // (b * width), b, width), dtype=dtype)
        _fill(context_tiles, context)
    biases += [_padded(b1, one), _padded(b2, two), _padded(w3.transpose(0, 1), two), b3.t()]
    return tiles, torch.cat([x.flatten() for x in biases]), context_tiles


# ---------------------------------------------------------------------------------------------------------------------
# Launches


# The heads of all members of a tile of plans are in registers at once.
_MOST_MEMBERS = 64


def refusal(members: int) -> str | None:
    """Why the kernel does not take so many return models; None where it does."""
    if members > _MOST_MEMBERS:
        return f"the Triton engine takes up to {_MOST_MEMBERS} members of the return model, got {members}"
    return None


def _every_option(dtype: torch.dtype, sizes: Sizes, langevin: bool, architecture: int) -> list[Option]:
    """Plans of a program and rows of a tile, narrowest first: those of which no compiled kernel spills."""
    if dtype == torch.float32:
        # Tiles that keep the operands of products without tensor cores in registers.
        every = [(16, 32, 4, 3), (32, 32, 4, 3)]
    elif sizes.apart:
        # Several starts for each plan fill the columns of the products with few plans already.
        every = [(16, 128, 8, 4)] if architecture >= 90 else [(16, 64, 8, 4)]
        if architecture >= 90 and sizes.dim <= 192:
            every.append((32, 128, 8, 4))
    elif architecture >= 90:
        # Without a prior, high tiles that hold a part of a plan vector spill.
        wide = 64 if sizes.hidden == 0 and sizes.dim > 128 else 128
        every = [(16, 128, 8, 4), (32, 128, 8, 4), (64, wide, 8, 4)]
        if sizes.hidden and not langevin:
            every.append((128, 64, 8, 4))
    else:
        every = [(16, 128, 8, 4), (32, 64, 8, 4), (64, 64, 8, 4)]
    return [Option((("B", b), ("N", n)), warps, stages) for n, b, warps, stages in every]


def _likely_time(n_plans: int, n: int) -> float:
    """Microseconds of a step at the `gym` size on one H200, from counts.

    A program reads all weights once a step (1.34 MB) and its scratch besides, all programs from one second-level cache;
    or it waits for its own chain of 42 products, some 600 cycles each with few plans, and 19 results of a few hundred.
    """
    programs = triton.cdiv(n_plans, n)
    running = min(programs, _PROCESSORS)
    read = running * (1.34 + 0.0125 * n) / 5.5
    return triton.cdiv(programs, _PROCESSORS) * max(_CHAIN[n], read)


def likely_option(every: list[Option], n_plans: int) -> Option:
    """The likely best for that many plans; by their number alone, since another tile adds norms in another order."""
    return min(every, key=lambda option: _likely_time(n_plans, dict(option.tiles)["N"]))


@dataclass(frozen=True)
class _Call:
    """Arguments and constants of the kernel that do not depend on the option."""

    sizes: Sizes
    prior: Sequence[Tensor]
    returns: Sequence[Tensor]
    z0: Tensor
    n_starts: int
    dtype: torch.dtype
    options: list[Option]
    columns: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    architecture: int

    def launches(self, option: Option) -> list[Launch]:
        """One launch, or several that follow each other in the same scratch memory."""
        b, n = (dict(option.tiles)[name] for name in ("B", "N"))
        sizes, n_plans = self.sizes, self.z0.shape[0]
        c = sizes.constants(b, n, langevin=self.constants["LANGEVIN"], columns=self.columns)
        op_rows, f_rows = sizes.scratch_rows(c, b)
        tiles, biases, context_tiles = pack(sizes, c, b, self.prior, self.returns, self.dtype)
        # Elements of a program.
        scratch = {
            "p_op": (op_rows * n, self.dtype), "p_f": (f_rows * n, torch.float32),
            "p_table": (2 * len(tiles), torch.int32),
        }  # fmt: skip
        if sizes.apart:
            columns = c["CHUNK"] * n
            every = sizes.members * triton.cdiv(self.n_starts, c["CHUNK"])
            chunk = (c["TILES_1"] + c["TILES_2"]) * b * columns
            scratch |= {"p_starts": (2 * every * columns, torch.float32), "p_chunk": ((every + 1) * chunk, self.dtype)}
        programs = min(triton.cdiv(n_plans, n), programs_at_once(scratch))
        memory = {"p_starts": None, "p_chunk": None, "p_w": tiles, "p_b": biases, "p_wc": context_tiles} | {
            name: self.z0.new_empty((programs, size), dtype=dtype) for name, (size, dtype) in scratch.items()
        }
        found = []
        for first in range(0, n_plans, programs * n):
            of_plans = {
                name: x[first : first + programs * n] if name in _BY_PLAN and isinstance(x, Tensor) else x
                for name, x in self.arguments.items()
            }
            count = min(programs * n, n_plans - first)
            arguments = {**of_plans, "n_plans": count, **memory}
            grid = (triton.cdiv(count, n),)
            found.append(Launch(plan_ascent_kernel, grid, arguments, {**self.constants, **c}, option))
        return found


# Arguments with a row for each plan.
_BY_PLAN = frozenset(("p_z0", "p_context", "p_target", "p_plans", "p_seeds", "p_mean", "p_std"))


def programs_at_once(scratch: Mapping[str, tuple[int, torch.dtype]]) -> int:
    """Programs of one launch, by the elements that each has of some memories: whole rounds of the processors."""
    programs = max(1, _MOST_SCRATCH // sum(size * dtype.itemsize for size, dtype in scratch.values()))
    return programs if programs < _PROCESSORS else programs // _PROCESSORS * _PROCESSORS


def _call(
    prior: Sequence[Tensor],
    returns: Sequence[Tensor],
    z0: Tensor,
    context: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
    n_steps: int,
    *,
    bf16: bool,
    step_size: float,
    architecture: int | None = None,
    kappa: float = 0.0,
    prior_weight: float = 0.0,
    radius: float = math.inf,
    max_norm: float = math.inf,
    target: Tensor | None = None,
    plans: Tensor | None = None,
    max_drift_ratio: float = math.inf,
    seed: tuple[int, int] = (0, 0),
    first_step: int = 0,
) -> _Call:
    langevin = target is not None
    scale = math.sqrt(z0.shape[1] * z0.shape[2])
    seeds, mean, std = out
    # Words as signed integers: always int32, hence one compiled kernel for all seeds.
    seed0, seed1, first = (w - (1 << 32) if w >= 1 << 31 else w for w in (*seed, first_step))
    strides = (0, 0, 0) if context is None else context.stride()
    arguments = {
        "p_z0": z0, "p_context": context, "p_target": target, "p_plans": plans, "p_seeds": seeds, "p_mean": mean,
        "p_std": std, "n_plans": z0.shape[0], "n_steps": n_steps,
        "n_starts": 1 if context is None else context.shape[1], "n_obs": 0 if context is None else context.shape[2],
        "step_size": float(step_size if langevin else step_size * scale), "kappa": float(kappa),
        "prior_weight": 1.0 if langevin else float(prior_weight), "reach": float(radius * scale),
        "most_norm": float(max_norm * scale), "longest": float(2 * max_drift_ratio * scale), "first_step": first,
        "seed0": seed0, "seed1": seed1,
        "stride_z0_plan": z0.stride(0), "stride_z0_vector": z0.stride(1), "stride_z0_element": z0.stride(2),
        "stride_context_plan": strides[0], "stride_context_start": strides[1], "stride_context_obs": strides[2],
    }  # fmt: skip
    constants = {
        "LANGEVIN": langevin, "HAS_PRIOR_WEIGHT": langevin or prior_weight != 0,
        "HAS_RADIUS": not langevin and radius != math.inf, "HAS_MOST_NORM": not langevin and max_norm != math.inf,
    }  # fmt: skip
    # The interpreter knows no bfloat16.
    dtype = torch.bfloat16 if bf16 and not INTERPRETED else torch.float32
    sizes = Sizes.of(prior, returns, z0, context)
    if architecture is None:
        architecture = architecture_of(z0)
    # Products in float32 keep their operands in registers too.
    columns = _COLUMNS[architecture if dtype == torch.bfloat16 else 80]
    every = _every_option(dtype, sizes, langevin, architecture)
    return _Call(
        sizes, prior, returns, z0, arguments["n_starts"], dtype, every, columns, arguments, constants, architecture
    )


def run(
    prior: Sequence[Tensor],
    returns: Sequence[Tensor],
    z0: Tensor,
    context: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
    n_steps: int,
    **options_of_call: Any,
) -> None:
    """Fill ``out`` (seeds [P, n_z, D], mean [P], std [P]) with ascended plans, or with Langevin samples of ``target``.

    The bits depend on the sizes and, in groups, on the processors of the device. Beside packed weights a call takes at
    most 1 GiB, or what 16 to 32 plans need with all their starts where that is more: starts x members x 8 to 16 KB at
    the `gym` size.

    Args:
        prior, returns: weights as the ops take them, without the None of an identity prior.
        z0: float32 [P, n_z, D], any strides.
        context: float32 [P, G, obs_dim] or None.
        options_of_call: those of the ops; ``target`` float32 [P] and ``plans`` int64 [P] make it Langevin steps.
    """
    if z0.shape[0] == 0:
        return
    call = _call(prior, returns, z0, context, out, n_steps, **options_of_call)
    if _alone(call):
        launches = [plan_single.launch(call, ALONE.own)]
    elif _in_groups(call):
        option, group = plan_groups.option_for(z0.shape[0], plan_groups.processors_of(z0.device))
        launches = [plan_groups.launch(call, option, group)]
    else:
        launches = call.launches(likely_option(call.options, z0.shape[0]))
    for launch in launches:
        launch.run()


def _alone(call: _Call) -> bool:
    """Whether programs that go alone take a call: see ``ALONE``."""
    is_theirs = call.dtype == torch.bfloat16 and call.architecture >= 90
    return is_theirs and call.z0.shape[0] <= ALONE.most_plans and plan_single.refusal(call.sizes) is None


def _in_groups(call: _Call) -> bool:
    """Whether groups of programs take a call; what they do not take, or no H200 has measured, goes the other way."""
    is_theirs = call.dtype == torch.bfloat16 and call.architecture >= 90
    return is_theirs and plan_groups.refusal(call.sizes) is None


def shipped(
    dim: int,
    n_z: int,
    dtype: torch.dtype,
    *,
    hidden: int = 256,
    hidden1: int = 128,
    hidden2: int = 128,
    members: int = 1,
    n_obs: int = 0,
    n_starts: int = 1,
    langevin: bool = False,
    architecture: int = 90,
    n_plans: int = 4096,
    alone: bool = False,
) -> list[Launch]:
    """Every launch that some number of plans may get at these sizes, on the meta device, with n_plans plans; or the one
    of programs that go alone."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    d, e, p = n_z * dim, members, n_plans
    prior = [meta(hidden, d), meta(hidden), meta(d, hidden), meta(d)] if hidden else []
    returns = [meta(e, hidden1, d + n_obs), meta(e, hidden1), meta(e, hidden2, hidden1), meta(e, hidden2),
               meta(e, 2, hidden2), meta(e, 2)]  # fmt: skip
    context = meta(p, n_starts, n_obs) if n_obs else None
    of_call: dict[str, Any] = {"kappa": 1.0, "prior_weight": 0.1, "radius": 0.5, "max_norm": 1.1}
    if langevin:
        of_call = {"target": meta(p), "plans": meta(p, dtype=torch.int64), "max_drift_ratio": 0.5, "seed": (1, 2)}
    call = _call(
        prior, returns, meta(p, n_z, dim), context, (meta(p, n_z, dim), meta(p), meta(p)), 100, step_size=0.1,
        bf16=dtype == torch.bfloat16, architecture=architecture, **of_call,
    )  # fmt: skip
    if alone:
        return [plan_single.launch(call)]
    found = [launch for option in call.options for launch in call.launches(option)]
    if _in_groups(call):
        # One number of plans for each size of a group.
        of_groups = {plan_groups.option_for(n) for n in (64, 2112, 4224, 4225)}
        found += [plan_groups.launch(call, *one) for one in sorted(of_groups, key=lambda one: one[1])]
    return found
