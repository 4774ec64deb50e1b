"""All steps of the inference of few plans by programs that go alone: no barrier between programs.

``plan_groups`` shares 64 plans among programs that wait for one another nine times a step. Here a program owns up to
eight plans for all steps and reads all weights of every step, from the second-level cache into its registers; what
passes from product to product stays on its processor.

**Products.** Rows are outputs, columns plans: a warp multiplies 16 rows of weights with 8 plans, the least that tensor
cores take, so that eight plans cost what one does. Weights lie in memory as those products want them in registers
(``_as_operand``): a thread reads 16 bytes and multiplies them, without a detour through shared memory. That is written
as reshapes and permutations of plain tensors, right however the compiler lays them out, and for how it does lay them
out they are no work; a test looks into what it made of them.

**The stream.** A step is written out, so that its weights follow each other at constant offsets, and each R tiles are
loaded AHEAD before their use, across products: barriers within a program do not stop loads that are on their way. A
step ends where its gradient is known; the next one starts to load before it makes the update. Of all tiles those that a
step begins with, and KEPT of every 16 more, are read by way of the first-level cache, where they have room to stay; all
others pass it by.

A step (sizes as in ``plan_ascent``; z, its start, slopes and gradients are float32 in registers):

== =============== ===============================================================
1  W1 z            a = silu, and its slope
2  W2 a            u = z + ..., x = norm(u), by vectors of the plan
3  R1 x            a1 and its slope; the part of a first state comes as a bias
4  R2 a1           of each member: its heads, then moments of all and g2
6  R2' g2          of each member: g1 = ... * slope1
7  R1' g1          back through the norm: gu
8  W2' gu          gh = ... * slope
9  W1' gh          g = ... + gu - weight z, and the update
== =============== ===============================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gac_fast.kernels._launch import INTERPRETED, Launch, Option
from gac_fast.kernels._plan_math import at_least, log_slope, moment_slopes, silu, variance_of
from gac_fast.kernels.philox_normal import box_muller, philox4x32

__all__ = ["best_own", "launch", "option_for", "refusal", "single_kernel"]

_NORM_EPS = tl.constexpr(1e-5)
_LEAST_NORM = tl.constexpr(1e-12)
_INTERPRETED = tl.constexpr(INTERPRETED)
# Over which of two dimensions without neighbours in memory the compiler spreads warps first, by its version. Whatever
# it does is right; spread as here, loads bring every thread what it multiplies.
_WARPS_LAST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))

# Columns of a product of tensor cores.
_PLANS = 8


@triton.jit
def _nought():
    """0 of which the compiler does not know it: addresses that hold it are made where they are used, not all of a step
    before the loop, in registers."""
    nought = 0
    if not _INTERPRETED:
        nought = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )
        nought = tl.multiple_of(nought, 256)
    return nought


@triton.jit
def _for_warps(p, B: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, WARPS: tl.constexpr):
    """Pointers to B blocks of SIZE for each warp, STRIDE from warp to warp: [WARPS, B, SIZE] or [B, WARPS, SIZE]."""
    o_size = tl.arange(0, SIZE)[None, None, :]
    o_warp = tl.arange(0, WARPS) * STRIDE
    o_block = tl.arange(0, B) * (SIZE if STRIDE == 0 else WARPS * SIZE)
    if _WARPS_LAST:
        o = o_block[:, None, None] + o_warp[None, :, None] + o_size
    else:
        o = o_warp[:, None, None] + o_block[None, :, None] + o_size
    return p + o


@triton.jit
def _weights(p_w, AT: tl.constexpr, AHEAD: tl.constexpr, KEPT: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr):
    """R tiles, the ``AT``-th R of the stream: in each 16 rows of 16 for each warp, 8 elements for each thread."""
    p_tiles = _for_warps(p_w + AT * (R * WARPS * 256), R, 256, 256, WARPS)
    if AT < AHEAD or AT * KEPT % 16 < KEPT:
        b_w = tl.load(p_tiles, eviction_policy="evict_last")
    else:
        b_w = tl.load(p_tiles, cache_modifier=".cg")
    return b_w


@triton.jit
def _as_operand(b_w, H: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr):
    """R tiles -> [WARPS, 16 H, 16 R / H]: lane (8, 4) has rows lane // 4 and + 8 of each tile, columns 2 (lane % 4),
    + 1, + 8 and + 9."""
    if _WARPS_LAST:
        b_w = tl.permute(tl.reshape(b_w, (R // H, H, WARPS, 8, 4, 2, 2, 2)), (2, 1, 6, 3, 0, 5, 4, 7))
    else:
        b_w = tl.permute(tl.reshape(b_w, (WARPS, R // H, H, 8, 4, 2, 2, 2)), (0, 2, 6, 3, 1, 5, 4, 7))
    return tl.reshape(b_w, (WARPS, 16 * H, 16 * (R // H)))


@triton.jit
def _activations(p_x, i, S: tl.constexpr, WARPS: tl.constexpr, N: tl.constexpr):
    """The ``i``-th 16 S rows of what ``_leave`` left, for every warp: [WARPS, 16 S, N]."""
    P: tl.constexpr = 2 if S > 1 else 1
    b_x = tl.load(_for_warps(p_x + i * (S * 16 * N), S // P, 16 * P * N, 0, WARPS))
    if _WARPS_LAST:
        b_x = tl.permute(tl.reshape(b_x, (S // P, WARPS, N, 4, P, 2, 2)), (1, 0, 4, 5, 3, 6, 2))
    else:
        b_x = tl.permute(tl.reshape(b_x, (WARPS, S // P, N, 4, P, 2, 2)), (0, 1, 4, 5, 3, 6, 2))
    return tl.reshape(b_x, (WARPS, 16 * S, N))


@triton.jit
def _store(p, x, mask):
    """``tl.store`` of bfloat16 or float32 as it lies in registers: that one first brings neighbours in memory together,
    by way of shared memory."""
    if _INTERPRETED:
        tl.store(p, x, mask=mask)
    elif x.dtype == tl.bfloat16:
        tl.inline_asm_elementwise(
            "st.global.b16 [$1], $2; mov.b32 $0, 0;", "=r,l,h,~{memory}", [p, x.to(tl.int16, bitcast=True)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0;}", "=r,l,r,r,~{memory}",
            [p, x.to(tl.int32, bitcast=True), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _leave(p_x, x, S: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    """An operand [WARPS, ROWS, N] in the order in which ``_activations`` reads 16 S rows: by 16 P of them, [N, 4, P, 2,
    2], where P = 2 fills 16 bytes of a thread."""
    P: tl.constexpr = 2 if S > 1 else 1
    row = tl.arange(0, WARPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    o = row // (16 * P) * (16 * P * N) + row % 8 // 2 * (4 * P) + row // 16 % P * 4 + row % 16 // 8 * 2 + row % 2
    o = o[:, :, None] + 16 * P * tl.arange(0, N)[None, None, :]
    _store(p_x + o, x.to(p_x.dtype.element_ty), True)


@triton.jit
def _product(ring, p_w, p_x, AT: tl.constexpr, K: tl.constexpr, H: tl.constexpr, TILES: tl.constexpr,
             AHEAD: tl.constexpr, KEPT: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr,
             N: tl.constexpr):  # fmt: skip
    """The next K x H tiles of the stream, from tile ``AT`` on, times the 16 K rows of an operand.

    Returns [WARPS, 16 H, N], float32, and the AHEAD x R tiles of weights that follow.
    """
    acc = tl.zeros((WARPS, 16 * H, N), tl.float32)
    for i in tl.static_range(K * H // R):
        b_x = _activations(p_x, i, R // H, WARPS, N)
        acc = tl.dot(_as_operand(ring[0], H, R, WARPS), b_x, acc, input_precision="ieee")
        ring = ring[1:]
        if AT // R + i + AHEAD < TILES // R:
            ring = ring + (_weights(p_w, AT // R + i + AHEAD, AHEAD, KEPT, R, WARPS),)
    return acc, ring


@triton.jit
def _of_rows(p, H: tl.constexpr, WARPS: tl.constexpr):
    """A vector by rows, [WARPS, 16 H, 1]; 16 rows of each warp at once, so few that every thread loads its own."""
    o = tl.arange(0, WARPS)[:, None] * (16 * H) + tl.arange(0, 16)[None, :]
    if H == 1:
        b = tl.load(p + o)
    else:
        if H == 2:
            b = tl.join(tl.load(p + o), tl.load(p + 16 + o))
        else:
            even = tl.join(tl.load(p + o), tl.load(p + 32 + o))
            b = tl.join(even, tl.join(tl.load(p + 16 + o), tl.load(p + 48 + o)))
        b = tl.reshape(tl.permute(tl.reshape(b, (WARPS, 16, H)), (0, 2, 1)), (WARPS, 16 * H))
    return b[:, :, None]


@triton.jit
def _sums(x, PARTS: tl.constexpr, WARPS: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Over each of PARTS parts of the rows: [WARPS, R, N] -> [PARTS, N]."""
    return tl.sum(tl.reshape(x, (PARTS, WARPS * R // PARTS, N)), axis=1)


@triton.jit
def _two_sums(x, y, WARPS: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Over all rows of both, [1, N] each."""
    return tl.split(tl.sum(tl.reshape(tl.join(x, y), (1, WARPS * R, N, 2)), axis=1))


@triton.jit
def _over_rows(s, PARTS: tl.constexpr, WARPS: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """[PARTS, N] -> [WARPS, R, N], or something that broadcasts to it."""
    if PARTS == 1:
        s = s[:, None, :]
    else:
        s = tl.reshape(tl.broadcast_to(s[:, None, :], (PARTS, WARPS * R // PARTS, N)), (WARPS, R, N))
    return s


@triton.jit
def _normals(p_plans, o_plan, m_plan, row, step, seed0, seed1, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Noise of the plans at ``step``, [WARPS, R, N]: element (vector * WIDTH + place) of each."""
    plan = tl.load(p_plans + o_plan, mask=m_plan, other=0).to(tl.uint32)[None, None, :]
    element = ((row // PADDED) * WIDTH + row % PADDED)[:, :, None]
    zero = (element * 0).to(tl.uint32) + plan * 0
    w0, w1, w2, w3 = philox4x32(
        zero + (element // 4).to(tl.uint32), zero + plan, zero + step.to(tl.uint32), zero,
        zero + seed0.to(tl.uint32), zero + seed1.to(tl.uint32),
    )  # fmt: skip
    word = element % 4
    cosine, sine = box_muller(tl.where(word < 2, w0, w2), tl.where(word < 2, w1, w3))
    return tl.where(word % 2 == 0, cosine, sine)


@triton.jit(do_not_specialize=["n_plans", "n_own", "n_steps", "first_step", "seed0", "seed1"])
def single_kernel(
    p_w, p_b, p_z0, p_first, p_target, p_plans, p_seeds, p_mean, p_std, p_x,
    n_plans, n_own, n_steps, step_size, kappa, prior_weight, reach, most_norm, longest, first_step, seed0, seed1,
    stride_z0_plan, stride_z0_vector, stride_z0_element, stride_first_plan,
    LANGEVIN: tl.constexpr, HAS_PRIOR_WEIGHT: tl.constexpr, HAS_RADIUS: tl.constexpr, HAS_MOST_NORM: tl.constexpr,
    HAS_CONTEXT: tl.constexpr, VECTORS_ALL: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    MEMBERS: tl.constexpr,
    D: tl.constexpr, U: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr,  # rows, in tiles
    ROOM: tl.constexpr, N: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    # Where the products begin in the stream: a tile of rows is WARPS tiles of 16 for what sums over it.
    T2: tl.constexpr = U * D * WARPS
    T3: tl.constexpr = T2 + D * U * WARPS
    T4: tl.constexpr = T3 + MEMBERS * H1 * D * WARPS
    T6: tl.constexpr = T4 + MEMBERS * H2 * H1 * WARPS
    T7: tl.constexpr = T6 + MEMBERS * H1 * H2 * WARPS
    T8: tl.constexpr = T7 + D * MEMBERS * H1 * WARPS
    T9: tl.constexpr = T8 + U * D * WARPS
    # Rows of a warp.
    R_D: tl.constexpr = 16 * D
    R_U: tl.constexpr = 16 * U
    R_1: tl.constexpr = 16 * H1
    R_2: tl.constexpr = 16 * H2
    # Vectors: biases of the prior, of the second layers, heads.
    B2: tl.constexpr = R_U * WARPS
    BR2: tl.constexpr = B2 + R_D * WARPS
    ROWS_1: tl.constexpr = R_1 * WARPS
    ROWS_2: tl.constexpr = R_2 * WARPS
    W3: tl.constexpr = BR2 + MEMBERS * ROWS_2
    B3: tl.constexpr = W3 + 2 * MEMBERS * ROWS_2
    PARTS: tl.constexpr = R_D * WARPS // PADDED

    o_own = tl.arange(0, N)
    o_plan = tl.program_id(0).to(tl.int64) * n_own + o_own
    m_plan = (o_own < n_own) & (o_plan < n_plans)
    p_even = p_x + tl.program_id(0).to(tl.int64) * (2 * ROOM)
    p_odd = p_even + ROOM

    # [WARPS, R_D], [WARPS, R_D, N]
    row = tl.arange(0, WARPS)[:, None] * R_D + tl.arange(0, R_D)[None, :]
    vector = row // PADDED
    place = row % PADDED
    m_row = ((place < WIDTH) & (vector < VECTORS_ALL))[:, :, None]
    o_z0 = vector.to(tl.int64) * stride_z0_vector + place.to(tl.int64) * stride_z0_element
    z = tl.load(
        p_z0 + o_plan[None, None, :] * stride_z0_plan + o_z0[:, :, None], mask=m_row & m_plan[None, None, :], other=0.0
    )
    start = z
    from_zero = tl.zeros((1, N), tl.float32)
    if HAS_RADIUS:
        from_zero = _sums(z * z, 1, WARPS, R_D, N)
    firsts = ()
    if HAS_CONTEXT:
        row_1 = tl.arange(0, WARPS)[:, None] * R_1 + tl.arange(0, R_1)[None, :]
        for e in tl.static_range(MEMBERS):
            # [WARPS, R_1, N]
            b_first = tl.load(
                p_first + o_plan[None, None, :] * stride_first_plan + (e * ROWS_1 + row_1)[:, :, None],
                mask=m_plan[None, None, :], other=0.0,
            )  # fmt: skip
            firsts = firsts + (b_first,)
    target = tl.zeros((1, N), tl.float32)
    if LANGEVIN:
        target += tl.load(p_target + o_plan, mask=m_plan, other=0.0)[None, :]
    g = tl.zeros((WARPS, R_D, N), tl.float32)

    # A step begins with the update by the gradient of the one before, and the last one makes moments alone.
    for i_step in tl.range(n_steps + 1, disable_licm=True, num_stages=1):
        nought = _nought()
        step = i_step - 1 + tl.program_id(0) * 0
        p_ws = p_w + nought
        p_bs = p_b + nought
        p_read = p_even + nought
        p_write = p_odd + nought
        ring = ()
        for i in tl.static_range(AHEAD):
            if i < TILES // R:
                ring = ring + (_weights(p_ws, i, AHEAD, KEPT, R, WARPS),)

        if HAS_PRIOR_WEIGHT:
            g -= prior_weight * z
        norm = at_least(tl.sqrt_rn(_sums(g * g, 1, WARPS, R_D, N)), _LEAST_NORM)
        move_noise = norm
        if LANGEVIN:
            move_noise = longest / norm
            move_noise = tl.where(move_noise > step_size, step_size, move_noise)
            move = 0.5 * move_noise * move_noise
        else:
            move = step_size * (1.0 - step.to(tl.float32) / tl.cast(tl.maximum(n_steps, 1), tl.float32)) / norm
        moved = z + g * move[:, None, :]
        if HAS_RADIUS:
            off = moved - start
            offsets, across = _two_sums(off * off, off * start, WARPS, R_D, N)
            inside = reach / at_least(tl.sqrt_rn(offsets), _LEAST_NORM)
            inside = tl.where(inside >= 1.0, 1.0, inside)
            # |start + inside * off|^2
            norms = at_least(from_zero + inside * (2.0 * across + inside * offsets), 0.0)
            moved = start + off * inside[:, None, :]
        elif HAS_MOST_NORM:
            norms = _sums(moved * moved, 1, WARPS, R_D, N)
        if HAS_MOST_NORM:
            within = most_norm / at_least(tl.sqrt_rn(norms), _LEAST_NORM)
            within = tl.where(within >= 1.0, 1.0, within)
            moved *= within[:, None, :]
        if LANGEVIN:
            normals = _normals(p_plans, o_plan, m_plan, row, first_step + step, seed0, seed1, WIDTH, PADDED)
            moved += tl.where(m_row, normals * move_noise[:, None, :], 0.0)
        z = tl.where(i_step > 0, moved, z)
        if U > 0:
            _leave(p_read, z, R // U, WARPS, R_D, N)
            tl.debug_barrier()

        u = z
        if U > 0:
            # 1
            h, ring = _product(ring, p_ws, p_read, 0, D * WARPS, U, TILES, AHEAD, KEPT, R, WARPS, N)
            a, slope = silu(h + _of_rows(p_bs, U, WARPS))
            _leave(p_write, a, R // D, WARPS, R_U, N)
            tl.debug_barrier()
            # 2
            h, ring = _product(ring, p_ws, p_write, T2, U * WARPS, D, TILES, AHEAD, KEPT, R, WARPS, N)
            u = h + _of_rows(p_bs + B2, D, WARPS) + z
        scale = tl.rsqrt(_sums(u * u, PARTS, WARPS, R_D, N) / WIDTH + _NORM_EPS)
        scale = _over_rows(scale, PARTS, WARPS, R_D, N)
        x = u * scale
        _leave(p_read, x, R // H1, WARPS, R_D, N)
        tl.debug_barrier()

        # 3
        slopes1 = ()
        for e in tl.static_range(MEMBERS):
            h, ring = _product(
                ring, p_ws, p_read, T3 + e * (H1 * D * WARPS), D * WARPS, H1, TILES, AHEAD, KEPT, R, WARPS, N
            )
            if HAS_CONTEXT:
                h += firsts[e]
            else:
                h += _of_rows(p_first + nought + e * ROWS_1, H1, WARPS)
            a, slope1 = silu(h)
            slopes1 = slopes1 + (slope1,)
            _leave(p_write + e * (ROWS_1 * N), a, R // H2, WARPS, R_1, N)
        tl.debug_barrier()

        # 4
        means = ()
        logs = ()
        slopes2 = ()
        for e in tl.static_range(MEMBERS):
            h, ring = _product(
                ring, p_ws, p_write + e * (ROWS_1 * N), T4 + e * (H2 * H1 * WARPS), H1 * WARPS, H2, TILES, AHEAD, KEPT,
                R, WARPS, N,
            )  # fmt: skip
            a, slope2 = silu(h + _of_rows(p_bs + BR2 + e * ROWS_2, H2, WARPS))
            slopes2 = slopes2 + (slope2,)
            w_mean = _of_rows(p_bs + W3 + e * ROWS_2, H2, WARPS)
            w_log = _of_rows(p_bs + W3 + (MEMBERS + e) * ROWS_2, H2, WARPS)
            # [1, N]
            mean_e, log_e = _two_sums(a * w_mean, a * w_log, WARPS, R_2, N)
            means = means + (mean_e + tl.load(p_bs + B3 + e),)
            logs = logs + (log_e + tl.load(p_bs + B3 + MEMBERS + e),)
        mean = means[0]
        for e in tl.static_range(1, MEMBERS):
            mean += means[e]
        mean = mean / MEMBERS
        variance = tl.zeros((1, N), tl.float32)
        for e in tl.static_range(MEMBERS):
            variance += variance_of(logs[e]) + (means[e] - mean) * (means[e] - mean)
        std = tl.sqrt_rn(variance / MEMBERS)
        if i_step == n_steps:
            o_found = tl.arange(0, N)[None, :] + nought
            m_found = (o_found < n_own) & (tl.program_id(0).to(tl.int64) * n_own + o_found < n_plans)
            o_found = tl.program_id(0).to(tl.int64) * n_own + o_found
            tl.store(p_mean + o_found, mean, mask=m_found)
            tl.store(p_std + o_found, std, mask=m_found)
        share, each = moment_slopes(mean, std, target, kappa, MEMBERS * 1.0, LANGEVIN)
        for e in tl.static_range(MEMBERS):
            by_mean = (share + each * (means[e] - mean))[:, None, :]
            by_log = log_slope(logs[e], each)[:, None, :]
            w_mean = _of_rows(p_bs + W3 + e * ROWS_2, H2, WARPS)
            w_log = _of_rows(p_bs + W3 + (MEMBERS + e) * ROWS_2, H2, WARPS)
            g2 = slopes2[e] * by_mean * w_mean + slopes2[e] * by_log * w_log
            _leave(p_read + e * (ROWS_2 * N), g2, R // H1, WARPS, R_2, N)
        tl.debug_barrier()

        # 6
        for e in tl.static_range(MEMBERS):
            h, ring = _product(
                ring, p_ws, p_read + e * (ROWS_2 * N), T6 + e * (H1 * H2 * WARPS), H2 * WARPS, H1, TILES, AHEAD, KEPT,
                R, WARPS, N,
            )  # fmt: skip
            _leave(p_write + e * (ROWS_1 * N), h * slopes1[e], R // D, WARPS, R_1, N)
        tl.debug_barrier()

        # 7: back through x = u / rms(u)
        h, ring = _product(ring, p_ws, p_write, T7, MEMBERS * H1 * WARPS, D, TILES, AHEAD, KEPT, R, WARPS, N)
        along = _sums(h * x, PARTS, WARPS, R_D, N) / WIDTH
        g = (h - x * _over_rows(along, PARTS, WARPS, R_D, N)) * scale
        if U > 0:
            _leave(p_read, g, R // U, WARPS, R_D, N)
            tl.debug_barrier()
            # 8
            h, ring = _product(ring, p_ws, p_read, T8, D * WARPS, U, TILES, AHEAD, KEPT, R, WARPS, N)
            _leave(p_write, h * slope, R // D, WARPS, R_U, N)
            tl.debug_barrier()
            # 9
            h, ring = _product(ring, p_ws, p_write, T9, U * WARPS, D, TILES, AHEAD, KEPT, R, WARPS, N)
            g += h

    # Anew, not kept all the way.
    nought = _nought()
    row = (tl.arange(0, WARPS) + nought)[:, None] * R_D + (tl.arange(0, R_D) + nought)[None, :]
    vector = row // PADDED
    place = row % PADDED
    m_row = ((place < WIDTH) & (vector < VECTORS_ALL))[:, :, None]
    o_last = tl.arange(0, N) + nought
    o_plan = tl.program_id(0).to(tl.int64) * n_own + o_last
    m_plan = (o_last < n_own) & (o_plan < n_plans)
    _store(
        p_seeds + o_plan[None, None, :] * (VECTORS_ALL * WIDTH) + (vector * WIDTH + place)[:, :, None], z,
        m_row & m_plan[None, None, :],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, weights, launches

# Tiles of 16 rows of a warp that one product may have: its sums are in registers, and seeds, starts, plans and
# gradients are as many each. Slopes of members are too: with four the compiled kernel spills.
_MOST_HEIGHT = 4
_MOST_MEMBERS = 2
# Tiles of a step, each of which is code: two members at the `gym` size have 416.
_MOST_TILES = 432


def counts(sizes: Any, warps: int) -> dict[str, int]:
    """Constants of the kernel: rows in powers of 2 of 16 for each warp."""
    rows, e = 16 * warps, sizes.members
    vector = triton.next_power_of_2(sizes.dim)

    def tiles(n: int) -> int:
        return int(triton.next_power_of_2(triton.cdiv(n, rows)))

    d, h1, h2 = tiles(sizes.n_z * vector), tiles(sizes.hidden1), tiles(sizes.hidden2)
    u = tiles(sizes.hidden) if sizes.hidden else 0
    return {
        "PADDED": vector, "D": d, "U": u, "H1": h1, "H2": h2, "N": _PLANS,
        "TILES": 2 * warps * (2 * d * u + e * h1 * (d + h2)),
        # Elements of the widest operand.
        "ROOM": max(d, u, e * h1, e * h2) * rows * _PLANS,
    }  # fmt: skip


def refusal(sizes: Any) -> str | None:
    """Why programs that go alone do not take a call; None where they do."""
    warps = dict(option_for(sizes, False).tiles)["WARPS"]
    if sizes.apart:
        return "several starts for each plan"
    if sizes.members > _MOST_MEMBERS:
        return f"more than {_MOST_MEMBERS} members"
    c = counts(sizes, warps)
    if max(c[name] for name in ("D", "U", "H1", "H2")) > _MOST_HEIGHT:
        return f"more than {_MOST_HEIGHT * 16 * warps} rows of a product"
    if c["TILES"] > _MOST_TILES:
        return f"more than {_MOST_TILES} tiles of weights"
    return None


def option_for(sizes: Any, langevin: bool) -> Option:
    if INTERPRETED:
        return Option((("WARPS", 4), ("R", 4), ("AHEAD", 3), ("KEPT", 2)), 4, 1)
    # 64 KB on their way; less where noise, members or a first state need the registers.
    ahead = 2 if sizes.members > 1 else 3 if langevin or sizes.n_obs > 0 else 4
    return Option((("WARPS", 8), ("R", 4), ("AHEAD", ahead), ("KEPT", 1)), 8, 1)


def best_own(n_plans: int) -> int:
    """Plans of a program: the fewest with which what all programs read is bound by a processor's share of the
    second-level cache (some 110 GB/s), not by all of it (5.5 TB/s); counted, not measured."""
    return min(_PLANS, max(1, triton.cdiv(n_plans, 50)))


def pack(
    sizes: Any, c: Mapping[str, int], warps: int, prior: Sequence[Tensor], returns: Sequence[Tensor],
    context: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The stream of weights [TILES, warps, 256]; all vectors, float32; and what the first layer of the return model
    begins with, its bias and the first state's part, [P or 1, E * h1]."""
    rows = 16 * warps
    d, u, h1, h2 = (c[name] * rows for name in ("D", "U", "H1", "H2"))
    w1, b1, w2, b2, w3, b3 = returns
    n_seeds = sizes.n_z * sizes.dim

    def wider(w: Tensor, size: int) -> Tensor:
        return torch.nn.functional.pad(w, (0, size - w.shape[-1])) if w.shape[-1] < size else w

    def higher(w: Tensor, size: int) -> Tensor:
        return torch.nn.functional.pad(w, (0, 0, 0, size - w.shape[-2])) if w.shape[-2] < size else w

    def seeds(w: Tensor) -> Tensor:
        # [..., n_z * D] -> [..., d]
        if c["PADDED"] != sizes.dim:
            w = wider(w.unflatten(-1, (sizes.n_z, sizes.dim)), c["PADDED"]).flatten(-2)
        return wider(w, d)

    def tiles(w: Tensor) -> Tensor:
        # [outputs, inputs] -> by 16 inputs, then by tiles of every warp's outputs
        w = w.reshape(warps, -1, 2, 8, w.shape[1] // 16, 2, 4, 2)
        return w.permute(4, 1, 0, 3, 6, 5, 2, 7).reshape(-1, warps, 256)

    r1 = higher(seeds(w1[..., :n_seeds]), h1)  # [E, h1, d]
    r2 = higher(wider(w2, h1), h2)  # [E, h2, h1]
    matrices = [*r1, *r2, *r2.transpose(1, 2), r1.flatten(0, 1).t()]
    vectors = [w1.new_zeros(d)]
    if prior:
        m1, m2 = higher(seeds(prior[0]), u), higher(seeds(prior[2].t()), u)  # [u, d] both
        matrices = [m1, m2.t(), *matrices, m2, m1.t()]
        vectors = [wider(prior[1], u), seeds(prior[3])]
    stream = torch.cat([tiles(w) for w in matrices]).to(dtype)
    vectors += [wider(b2, h2), wider(w3.transpose(0, 1), h2), b3.t()]
    first = b1[None]  # [P or 1, E, H1]
    if sizes.n_obs:
        assert context is not None
        first = first + torch.einsum("po,eho->peh", context[:, 0], w1[..., n_seeds:])
    return stream, torch.cat([x.reshape(-1) for x in vectors]), wider(first, h1).flatten(1).contiguous()


_ARGUMENTS = (
    "p_z0", "p_target", "p_plans", "p_seeds", "p_mean", "p_std", "n_plans", "n_steps", "step_size", "kappa",
    "prior_weight", "reach", "most_norm", "longest", "first_step", "seed0", "seed1", "stride_z0_plan",
    "stride_z0_vector", "stride_z0_element",
)  # fmt: skip


def launch(call: Any, own: int | None = None) -> Launch:
    """The one launch of a call of ``plan_ascent``, with ``own`` plans to a program, up to eight."""
    sizes, arguments, z0 = call.sizes, call.arguments, call.z0
    option = option_for(sizes, call.constants["LANGEVIN"])
    warps = dict(option.tiles)["WARPS"]
    if own is None:
        own = best_own(z0.shape[0])
    c = counts(sizes, warps)
    stream, vectors, first = pack(sizes, c, warps, call.prior, call.returns, arguments["p_context"], call.dtype)
    programs = triton.cdiv(z0.shape[0], own)
    of_call = {name: arguments[name] for name in _ARGUMENTS} | {
        "p_w": stream, "p_b": vectors, "p_first": first, "n_own": own,
        "p_x": z0.new_empty((programs, 2, c["ROOM"]), dtype=call.dtype),
        "stride_first_plan": first.stride(0) if len(first) > 1 else 0,
    }  # fmt: skip
    constants = {
        **call.constants, **c, "VECTORS_ALL": sizes.n_z, "WIDTH": sizes.dim, "MEMBERS": sizes.members,
        "HAS_CONTEXT": sizes.n_obs > 0,
    }  # fmt: skip
    return Launch(single_kernel, (programs,), of_call, constants, option)
