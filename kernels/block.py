"""A decoder layer between two window attentions, forward and backward, one program per tile of tokens.

What the kernels compute is in ``gac_fast.reference.decoder_block``. How:

* Weights are packed by one small launch: cast, padded to the tiles of the products, scale and offset of each norm
  folded into the map behind it (so that a norm is ``(x - mean) / std`` and its result is the operand of both passes).
* The maps around the plan attention are folded into the plan: with ``M = K W_q`` [n_z, D] and ``N = V W_o^T`` per
  trajectory and head, the scores are ``normed M^T`` and what is added to the stream is ``softmax N``. Two products with
  D columns per token less, and in the backward their gradients come from sums per trajectory instead of per token.
* The hidden layer of the MLP lives in registers, a few columns at a time; the backward computes it again.
* Gradients of the plan are sums per tile, added in the order of the tiles by a second launch.

bfloat16, D = 128, hidden 512, n_next 384, n_z H = 16, per token: forward 401 kFLOP and 2.0 kB (2.8 kB where it saves
for the backward), backward of the data 544 kFLOP and 3.1 kB, weights 384 kB through L2 per tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gac_fast.kernels import _launch
from gac_fast.kernels._launch import Launch, Option, architecture_of

__all__ = ["Gradients", "Saved", "Sizes", "backward", "forward", "shipped"]

_EPS = tl.constexpr(1e-5)

# ---------------------------------------------------------------------------------------------------------------------
# Device functions


@triton.jit
def _normalise(x, o_d, D: tl.constexpr, DP: tl.constexpr):
    """(x - mean) / std of each row, zero beyond D columns, and 1 / std; ``x`` is zero there."""
    mean = tl.sum(x, axis=1) / D
    x = x - mean[:, None]
    if D != DP:
        x = tl.where(o_d[None, :] < D, x, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + _EPS)
    return x * rstd[:, None], rstd


@triton.jit
def _norm_gradient(g, normed, rstd, o_d, D: tl.constexpr, DP: tl.constexpr):
    """The gradient of what :func:`_normalise` took, given that of its result; zero beyond D columns as both are."""
    mean = tl.sum(g, axis=1) / D
    along = tl.sum(g * normed, axis=1) / D
    dx = (g - mean[:, None] - normed * along[:, None]) * rstd[:, None]
    if D != DP:
        dx = tl.where(o_d[None, :] < D, dx, 0.0)
    return dx


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    if FAST:
        # One instruction of the special unit, which the exact form asks for two: it would be the bound of the MLP.
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * t + 0.5
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softmax(s, N_Z: tl.constexpr, NZ: tl.constexpr):
    """Over groups of NZ columns, of which N_Z count; the rest become zero."""
    BT: tl.constexpr = s.shape[0]
    CB: tl.constexpr = s.shape[1]
    s = tl.reshape(s, (BT, CB // NZ, NZ))
    if N_Z != NZ:
        s = tl.where(tl.arange(0, NZ)[None, None, :] < N_Z, s, float("-inf"))
    e = tl.exp(s - tl.max(s, axis=2)[:, :, None])
    return tl.reshape(e / tl.sum(e, axis=2)[:, :, None], (BT, CB))


@triton.jit
def _softmax_gradient(p, dp, NZ: tl.constexpr):
    BT: tl.constexpr = p.shape[0]
    CB: tl.constexpr = p.shape[1]
    along = tl.sum(tl.reshape(p * dp, (BT, CB // NZ, NZ)), axis=2)
    along = tl.reshape(tl.broadcast_to(along[:, :, None], (BT, CB // NZ, NZ)), (BT, CB))
    return p * (dp - along)


@triton.jit
def _rows(p_tile, BT: tl.constexpr):
    """Tokens int64 [BT] of a tile and which of them count.

    Each phase of a kernel asks anew: addresses kept from one phase to the next would take the registers of the sums
    between them, and the compiler keeps whatever it has computed once.
    """
    # int64 before any product with a stride.
    o_t = tl.load(p_tile + 1, volatile=True).to(tl.int64) + tl.arange(0, BT)
    return o_t, tl.arange(0, BT) < tl.load(p_tile + 2, volatile=True)


# ---------------------------------------------------------------------------------------------------------------------
# Small launches: tiles, weights, the plan


# A table, where window attention searches in its kernel (`find_tile`): a backward here has one program per processor,
# and nothing would hide the search's loads, each of which waits for the one before, nine for 512 trajectories.
@triton.jit
def tiles_kernel(p_cu, p_tiles, n_sequences, n_tiles, SIZE: tl.constexpr, BLOCK: tl.constexpr, BS: tl.constexpr):
    """Tiles of SIZE tokens that never cross a trajectory: [n_tiles, 4] of trajectory, first token, tokens, number.

    The tiles of trajectory b start at cu[b] // SIZE + b, which leaves room for all of them, and no sum over the
    trajectories before it is needed. Tiles of no token lie between.
    """
    o_tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros((BLOCK,), tl.int32) - 1
    for i in range(0, n_sequences, BS):
        o_s = i + tl.arange(0, BS)
        # [BS]
        start = tl.load(p_cu + o_s, mask=o_s < n_sequences, other=0) // SIZE + o_s
        sequence += tl.sum(((start[None, :] <= o_tile[:, None]) & (o_s < n_sequences)[None, :]).to(tl.int32), axis=1)
    m_tile = o_tile < n_tiles
    first = tl.load(p_cu + sequence, mask=m_tile, other=0)
    end = tl.load(p_cu + sequence + 1, mask=m_tile, other=0)
    number = o_tile - (first // SIZE + sequence)
    begin = first + number * SIZE
    count = tl.minimum(tl.maximum(end - begin, 0), SIZE)
    p_tile = p_tiles + o_tile * 4
    tl.store(p_tile, sequence, mask=m_tile)
    tl.store(p_tile + 1, tl.where(count > 0, begin, 0).to(tl.int32), mask=m_tile)
    tl.store(p_tile + 2, count.to(tl.int32), mask=m_tile)
    tl.store(p_tile + 3, number.to(tl.int32), mask=m_tile)


@triton.jit
def _pack_rows(
    p_w, p_norm_w, p_norm_b, p_b, p_to, p_bias, i_block, n_rows, stride_row, stride_column,
    D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BR rows of a map, zero beyond its own, with the norm before it folded in; ``p_b`` None for no bias."""
    o_r = i_block * BR + tl.arange(0, BR)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    # [BR, DP]
    b_w = tl.load(
        p_w + o_r[:, None] * stride_row + o_d[None, :] * stride_column,
        mask=(o_r < n_rows)[:, None] & m_d[None, :], other=0.0,
    )  # fmt: skip
    if p_b is not None:
        b_bias = tl.load(p_b + o_r, mask=o_r < n_rows, other=0.0)
        if p_norm_b is not None:
            b_bias += tl.sum(b_w * tl.load(p_norm_b + o_d, mask=m_d, other=0.0)[None, :], axis=1)
        tl.store(p_bias + o_r, b_bias)
    if p_norm_w is not None:
        b_w *= tl.load(p_norm_w + o_d, mask=m_d, other=0.0)[None, :]
    tl.store(p_to + o_r[:, None] * DP + o_d[None, :], b_w.to(p_to.dtype.element_ty))


@triton.jit
def pack_kernel(
    p_w_o, p_b_o, p_b_plan_o, p_norm3_w, p_norm3_b, p_w_in, p_b_in, p_w_out, p_b_out, p_norm_w, p_norm_b, p_w_next,
    p_b_next, p_packed, p_bias,
    D: tl.constexpr, HIDDEN: tl.constexpr, N_NEXT: tl.constexpr,
    DP: tl.constexpr, HP: tl.constexpr, NP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Packed: W_o [DP, DP], W_in [HP, DP], W_out^T [HP, DP], W_next [NP, DP].

    Bias: of W_o, W_plan_o and W_out DP each, of W_in HP, of W_next NP.
    """
    i_block = tl.program_id(0)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    if i_block < HP // BR:
        _pack_rows(
            p_w_in, p_norm3_w, p_norm3_b, p_b_in, p_packed + DP * DP, p_bias + 3 * DP, i_block, HIDDEN, D, 1, D, DP, BR
        )
    elif i_block < 2 * (HP // BR):
        _pack_rows(
            p_w_out, None, None, None, p_packed + DP * DP + HP * DP, None, i_block - HP // BR, HIDDEN, 1, HIDDEN,
            D, DP, BR,
        )  # fmt: skip
    elif i_block < 2 * (HP // BR) + NP // BR:
        _pack_rows(
            p_w_next, p_norm_w, p_norm_b, p_b_next, p_packed + DP * DP + 2 * HP * DP, p_bias + 3 * DP + HP,
            i_block - 2 * (HP // BR), N_NEXT, D, 1, D, DP, BR,
        )  # fmt: skip
    elif i_block == 2 * (HP // BR) + NP // BR:
        tl.store(p_bias + DP + o_d, tl.load(p_b_plan_o + o_d, mask=m_d, other=0.0))
        tl.store(p_bias + 2 * DP + o_d, tl.load(p_b_out + o_d, mask=m_d, other=0.0))
    elif p_w_o is not None:
        _pack_rows(
            p_w_o, None, None, p_b_o, p_packed, p_bias, i_block - 2 * (HP // BR) - NP // BR - 1, D, D, 1, D, DP, BR
        )


@triton.jit
def plan_kernel(
    p_k, p_v, p_norm2_w, p_norm2_b, p_w_q, p_b_q, p_w_o, p_plan, p_plan_bias, n_sequences, scale,
    stride_kb, stride_kz, stride_kh, stride_vb, stride_vz, stride_vh,
    D: tl.constexpr, HEADS: tl.constexpr, N_Z: tl.constexpr, UPCAST: tl.constexpr,
    DP: tl.constexpr, NZ: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The maps around the plan attention, applied to the plan: plan [B, 2, CP, DP], its bias [B, CP].

    Column h NZ + z: scale K[z, h] W_q (norm folded in) and scale K[z, h] b_q; V[z, h] W_o^T. Zero where nothing is.
    """
    DT: tl.constexpr = tl.float32 if UPCAST else p_plan.dtype.element_ty
    WIDTH: tl.constexpr = D // HEADS
    i_h = tl.program_id(1)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    i_b = (o_r // NZ).to(tl.int64)
    i_z = o_r % NZ
    m_b = i_b < n_sequences
    m_r = m_b & (i_z < N_Z) & (i_h < HEADS)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    norm_w = tl.load(p_norm2_w + o_d, mask=m_d, other=0.0)
    norm_b = tl.load(p_norm2_b + o_d, mask=m_d, other=0.0)
    p_k += i_b * stride_kb + i_z * stride_kz + i_h * stride_kh
    p_v += i_b * stride_vb + i_z * stride_vz + i_h * stride_vh
    m = tl.zeros((BR, DP), tl.float32)
    n = tl.zeros((BR, DP), tl.float32)
    c = tl.zeros((BR,), tl.float32)
    for i in range(0, WIDTH, BK):
        o_k = i + tl.arange(0, BK)
        m_k = (o_k < WIDTH) & (i_h < HEADS)
        o_row = i_h * WIDTH + o_k
        # [BR, BK]
        b_k = tl.load(p_k[:, None] + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0).to(DT)
        b_v = tl.load(p_v[:, None] + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0).to(DT)
        # [BK, DP]
        m_w = m_k[:, None] & m_d[None, :]
        b_q = tl.load(p_w_q + o_row[:, None] * D + o_d[None, :], mask=m_w, other=0.0)
        b_o = tl.load(p_w_o + o_row[:, None] + o_d[None, :] * D, mask=m_w, other=0.0)
        bias = tl.load(p_b_q + o_row, mask=m_k, other=0.0) + tl.sum(b_q * norm_b[None, :], axis=1)
        c += tl.sum(b_k.to(tl.float32) * bias[None, :], axis=1)
        m = tl.dot(b_k, (b_q * norm_w[None, :]).to(DT), acc=m, input_precision="ieee")
        n = tl.dot(b_v, b_o.to(DT), acc=n, input_precision="ieee")
    o_c = i_h * NZ + i_z
    p_out = p_plan + (i_b * (2 * CP) + o_c)[:, None] * DP + o_d[None, :]
    tl.store(p_out, (m * scale).to(p_plan.dtype.element_ty), mask=m_b[:, None])
    tl.store(p_out + CP * DP, n.to(p_plan.dtype.element_ty), mask=m_b[:, None])
    tl.store(p_plan_bias + i_b * CP + o_c, c * scale, mask=m_b)


@triton.jit
def reduce_kernel(
    p_cu, p_dplan, p_dplan_bias, p_norm2_w, p_norm2_b, p_w_q, p_b_q, p_w_o, p_dk, p_dv, p_dm, p_dn, p_dc, n_sequences,
    scale,
    SIZE: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, N_Z: tl.constexpr, UPCAST: tl.constexpr,
    LOW: tl.constexpr, DP: tl.constexpr, NZ: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of the tiles of one trajectory and head, and leads them back through the maps of the plan.

    dk, dv [B, n_z, H, d]; where gradients of weights are wanted also the sums: dm, dn [H, B, n_z, D], dc [H, B, n_z].
    """
    DT: tl.constexpr = tl.bfloat16 if LOW and not UPCAST else tl.float32
    WIDTH: tl.constexpr = D // HEADS
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    begin = tl.load(p_cu + i_b).to(tl.int64)
    end = tl.load(p_cu + i_b + 1).to(tl.int64)
    i_tile = begin // SIZE + i_b
    o_z = tl.arange(0, BR)
    m_z = o_z < N_Z
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    dm = tl.zeros((BR, DP), tl.float32)
    dn = tl.zeros((BR, DP), tl.float32)
    dc = tl.zeros((BR,), tl.float32)
    o_c = i_h * NZ + o_z
    p_tile = p_dplan + (i_tile * (2 * CP) + o_c)[:, None] * DP + o_d[None, :]
    p_c = p_dplan_bias + i_tile * CP + o_c
    n_tiles = ((end - begin + SIZE - 1) // SIZE).to(tl.int32)
    for _ in range(n_tiles):
        # [BR, DP]
        dm += tl.load(p_tile, mask=m_z[:, None], other=0.0)
        dn += tl.load(p_tile + CP * DP, mask=m_z[:, None], other=0.0)
        dc += tl.load(p_c, mask=m_z, other=0.0)
        p_tile += 2 * CP * DP
        p_c += CP
    if p_dm is not None:
        o_sum = (i_h * n_sequences + i_b) * N_Z + o_z
        m_sum = m_z[:, None] & m_d[None, :]
        tl.store(p_dm + o_sum[:, None] * D + o_d[None, :], dm, mask=m_sum)
        tl.store(p_dn + o_sum[:, None] * D + o_d[None, :], dn, mask=m_sum)
        tl.store(p_dc + o_sum, dc, mask=m_z)
    norm_w = tl.load(p_norm2_w + o_d, mask=m_d, other=0.0)
    norm_b = tl.load(p_norm2_b + o_d, mask=m_d, other=0.0)
    b_m = dm.to(DT)
    for i in range(0, WIDTH, BK):
        o_k = i + tl.arange(0, BK)
        m_k = o_k < WIDTH
        o_row = i_h * WIDTH + o_k
        # [BK, DP]
        m_w = m_k[:, None] & m_d[None, :]
        b_q = tl.load(p_w_q + o_row[:, None] * D + o_d[None, :], mask=m_w, other=0.0)
        bias = tl.load(p_b_q + o_row, mask=m_k, other=0.0) + tl.sum(b_q * norm_b[None, :], axis=1)
        dk = tl.dot(b_m, tl.trans((b_q * norm_w[None, :]).to(DT)), input_precision="ieee") + dc[:, None] * bias[None, :]
        o_out = ((i_b * N_Z + o_z) * HEADS + i_h)[:, None] * WIDTH + o_k[None, :]
        tl.store(p_dk + o_out, dk * scale, mask=m_z[:, None] & m_k[None, :])
    # After the keys, not beside them: before Hopper each of these operands takes the registers of a whole tile.
    b_n = dn.to(DT)
    for i in range(0, WIDTH, BK):
        o_k = i + tl.arange(0, BK)
        m_k = o_k < WIDTH
        # [BK, DP]
        p_o = p_w_o + (i_h * WIDTH + o_k)[:, None] + o_d[None, :] * D
        b_o = tl.load(p_o, mask=m_k[:, None] & m_d[None, :], other=0.0)
        dv = tl.dot(b_n, tl.trans(b_o.to(DT)), input_precision="ieee")
        o_out = ((i_b * N_Z + o_z) * HEADS + i_h)[:, None] * WIDTH + o_k[None, :]
        tl.store(p_dv + o_out, dv, mask=m_z[:, None] & m_k[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def forward_kernel(
    p_tiles, p_x, p_attended, p_w, p_bias, p_plan, p_plan_bias, p_x_out, p_y, p_normed, p_rstd, stride_x,
    stride_attended,
    D: tl.constexpr, N_NEXT: tl.constexpr, N_Z: tl.constexpr, UPCAST: tl.constexpr,
    DP: tl.constexpr, HP: tl.constexpr, NP: tl.constexpr, NZ: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x_out [n, D] and y [n, N_NEXT] of one tile; for the backward normed [n, 3, D] and rstd [n, 3], or None."""
    DT: tl.constexpr = tl.float32 if UPCAST else p_w.dtype.element_ty
    FAST: tl.constexpr = tl.bfloat16 == DT
    p_tile = p_tiles + tl.program_id(0) * 4
    if tl.load(p_tile + 2) == 0:
        return
    i_b = tl.load(p_tile).to(tl.int64)
    o_d = tl.arange(0, DP)
    m_d = (o_d < D)[None, :]

    o_t, m_t = _rows(p_tile, BT)
    # [BT, DP]
    x = tl.load(p_x + o_t[:, None] * stride_x + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
    if p_attended is not None:
        for i in range(0, DP, BK):
            o_k = i + tl.arange(0, BK)
            # [BT, BK]
            b_a = tl.load(
                p_attended + o_t[:, None] * stride_attended + o_k[None, :],
                mask=m_t[:, None] & (o_k < D)[None, :], other=0.0,
            ).to(DT)  # fmt: skip
            # [BK, DP]
            b_w = tl.load(p_w + o_k[:, None] + o_d[None, :] * DP).to(DT)
            x = tl.dot(b_a, b_w, acc=x, input_precision="ieee")
        x += tl.load(p_bias + o_d)[None, :]

    normed, rstd = _normalise(x, o_d, D, DP)
    b_normed = normed.to(DT)
    if p_normed is not None:
        o_t, m_t = _rows(p_tile, BT)
        p_out = p_normed + o_t[:, None] * (3 * D) + o_d[None, :]
        tl.store(p_out, b_normed.to(p_normed.dtype.element_ty), mask=m_t[:, None] & m_d)
        tl.store(p_rstd + o_t * 3, rstd, mask=m_t)
    p_plan += i_b * (2 * CP * DP)
    p_plan_bias += i_b * CP
    for i in range(0, CP, CB):
        o_c = i + tl.arange(0, CB)
        # [CB, DP]
        b_m = tl.load(p_plan + o_c[:, None] * DP + o_d[None, :]).to(DT)
        b_n = tl.load(p_plan + CP * DP + o_c[:, None] * DP + o_d[None, :]).to(DT)
        s = tl.dot(b_normed, tl.trans(b_m), input_precision="ieee") + tl.load(p_plan_bias + o_c)[None, :]
        x = tl.dot(_softmax(s, N_Z, NZ).to(DT), b_n, acc=x, input_precision="ieee")
    x += tl.load(p_bias + DP + o_d)[None, :]

    normed, rstd = _normalise(x, o_d, D, DP)
    b_normed = normed.to(DT)
    if p_normed is not None:
        o_t, m_t = _rows(p_tile, BT)
        p_out = p_normed + D + o_t[:, None] * (3 * D) + o_d[None, :]
        tl.store(p_out, b_normed.to(p_normed.dtype.element_ty), mask=m_t[:, None] & m_d)
        tl.store(p_rstd + o_t * 3 + 1, rstd, mask=m_t)
    for i in range(0, HP, BH):
        o_h = i + tl.arange(0, BH)
        # [BH, DP]
        b_in = tl.load(p_w + DP * DP + o_h[:, None] * DP + o_d[None, :]).to(DT)
        b_out = tl.load(p_w + DP * DP + HP * DP + o_h[:, None] * DP + o_d[None, :]).to(DT)
        h = tl.dot(b_normed, tl.trans(b_in), input_precision="ieee") + tl.load(p_bias + 3 * DP + o_h)[None, :]
        x = tl.dot((h * _sigmoid(h, FAST)).to(DT), b_out, acc=x, input_precision="ieee")
    x += tl.load(p_bias + 2 * DP + o_d)[None, :]
    o_t, m_t = _rows(p_tile, BT)
    tl.store(p_x_out + o_t[:, None] * D + o_d[None, :], x, mask=m_t[:, None] & m_d)

    normed, rstd = _normalise(x, o_d, D, DP)
    b_normed = normed.to(DT)
    if p_normed is not None:
        o_t, m_t = _rows(p_tile, BT)
        p_out = p_normed + 2 * D + o_t[:, None] * (3 * D) + o_d[None, :]
        tl.store(p_out, b_normed.to(p_normed.dtype.element_ty), mask=m_t[:, None] & m_d)
        tl.store(p_rstd + o_t * 3 + 2, rstd, mask=m_t)
    o_t, m_t = _rows(p_tile, BT)
    for i in range(0, NP, BN):
        o_n = i + tl.arange(0, BN)
        # [BN, DP]
        b_w = tl.load(p_w + DP * DP + 2 * HP * DP + o_n[:, None] * DP + o_d[None, :]).to(DT)
        y = tl.dot(b_normed, tl.trans(b_w), input_precision="ieee") + tl.load(p_bias + 3 * DP + HP + o_n)[None, :]
        tl.store(
            p_y + o_t[:, None] * N_NEXT + o_n[None, :], y.to(p_y.dtype.element_ty),
            mask=m_t[:, None] & (o_n < N_NEXT)[None, :],
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit
def backward_kernel(
    p_tiles, p_dx_out, p_dy, p_normed, p_rstd, p_w, p_bias, p_plan, p_plan_bias, p_dx, p_dattended, p_dplan,
    p_dplan_bias, p_dx1, p_dx3, p_dhidden, p_activated, p_dbias, p_stash, stride_dx_out, stride_dy,
    D: tl.constexpr, N_NEXT: tl.constexpr, N_Z: tl.constexpr, UPCAST: tl.constexpr,
    DP: tl.constexpr, HP: tl.constexpr, NP: tl.constexpr, NZ: tl.constexpr, CP: tl.constexpr, CB: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of the data of one tile, and its sums for the plan: dplan [n_tiles, 2, CP, DP].

    dx None: nobody asks below the plan. dx3 given: write down the operands of the gradients of the weights as well
    (dx1 and dx3 [n, D], dhidden and activated [n, HP]) and the sums dbias [n_tiles, 2 DP + HP + NP], which the tiles of
    no token leave as they are. stash [n, D] given: the stream's gradient waits there, in L2, rather than in registers
    while the MLP and the plan attention need them; it may be dx.
    """
    DT: tl.constexpr = tl.float32 if UPCAST else p_w.dtype.element_ty
    FAST: tl.constexpr = tl.bfloat16 == DT
    i_tile = tl.program_id(0).to(tl.int64)
    p_tile = p_tiles + i_tile * 4
    if tl.load(p_tile + 2) == 0:
        return
    i_b = tl.load(p_tile).to(tl.int64)
    o_d = tl.arange(0, DP)
    m_d = (o_d < D)[None, :]
    if p_dbias is not None:
        p_dbias += i_tile * (2 * DP + HP + NP)

    # A loop of its own, from L2 to the next: the pipeliner would give a tile that wgmma and these sums both read one
    # buffer, and overwrite it while wgmma reads.
    if p_dbias is not None and p_dy is not None:
        o_t, m_t = _rows(p_tile, BT)
        for i in tl.range(0, NP, BN, num_stages=1):
            o_n = i + tl.arange(0, BN)
            # [BT, BN]
            b_dy = tl.load(
                p_dy + o_t[:, None] * stride_dy + o_n[None, :],
                mask=m_t[:, None] & (o_n < N_NEXT)[None, :], other=0.0,
            )  # fmt: skip
            tl.store(p_dbias + 2 * DP + HP + o_n, tl.sum(b_dy.to(tl.float32), axis=0))

    # The padding of tokens and columns has gradient zero, and stays so.
    o_t, m_t = _rows(p_tile, BT)
    # [BT, DP]
    if p_dx_out is not None:
        dx = tl.load(p_dx_out + o_t[:, None] * stride_dx_out + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
    else:
        dx = tl.zeros((BT, DP), tl.float32)

    # The map behind.
    if p_dy is not None:
        g = tl.zeros((BT, DP), tl.float32)
        for i in range(0, NP, BN):
            o_n = i + tl.arange(0, BN)
            # [BT, BN]
            b_dy = tl.load(
                p_dy + o_t[:, None] * stride_dy + o_n[None, :],
                mask=m_t[:, None] & (o_n < N_NEXT)[None, :], other=0.0,
            ).to(DT)  # fmt: skip
            # [BN, DP]
            b_w = tl.load(p_w + DP * DP + 2 * HP * DP + o_n[:, None] * DP + o_d[None, :]).to(DT)
            g = tl.dot(b_dy, b_w, acc=g, input_precision="ieee")
        o_t, m_t = _rows(p_tile, BT)
        # [BT, DP]
        normed = tl.load(
            p_normed + 2 * D + o_t[:, None] * (3 * D) + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0
        ).to(tl.float32)
        rstd = tl.load(p_rstd + o_t * 3 + 2, mask=m_t, other=0.0)
        dx += _norm_gradient(g, normed, rstd, o_d, D, DP)
    b_dx = dx.to(DT)
    if p_dx3 is not None:
        o_t, m_t = _rows(p_tile, BT)
        tl.store(p_dx3 + o_t[:, None] * D + o_d[None, :], b_dx.to(p_dx3.dtype.element_ty), mask=m_t[:, None] & m_d)
        tl.store(p_dbias + DP + o_d, tl.sum(dx, axis=0))

    # The MLP, its hidden layer computed again.
    o_t, m_t = _rows(p_tile, BT)
    if p_stash is not None:
        tl.store(p_stash + o_t[:, None] * D + o_d[None, :], dx, mask=m_t[:, None] & m_d)
    p_normed2 = p_normed + D + o_t[:, None] * (3 * D) + o_d[None, :]
    b_normed = tl.load(p_normed2, mask=m_t[:, None] & m_d, other=0.0).to(DT)
    g = tl.zeros((BT, DP), tl.float32)
    for i in range(0, HP, BH):
        o_h = i + tl.arange(0, BH)
        # [BH, DP]
        b_in = tl.load(p_w + DP * DP + o_h[:, None] * DP + o_d[None, :]).to(DT)
        b_out = tl.load(p_w + DP * DP + HP * DP + o_h[:, None] * DP + o_d[None, :]).to(DT)
        h = tl.dot(b_normed, tl.trans(b_in), input_precision="ieee") + tl.load(p_bias + 3 * DP + o_h)[None, :]
        dh = tl.dot(b_dx, tl.trans(b_out), input_precision="ieee")
        sigmoid = _sigmoid(h, FAST)
        activated = h * sigmoid
        dh *= sigmoid + activated * (1.0 - sigmoid)
        b_dh = dh.to(DT)
        if p_dx3 is not None:
            p_a = p_activated + o_t[:, None] * HP + o_h[None, :]
            tl.store(p_a, activated.to(p_activated.dtype.element_ty), mask=m_t[:, None])
            p_h = p_dhidden + o_t[:, None] * HP + o_h[None, :]
            tl.store(p_h, b_dh.to(p_dhidden.dtype.element_ty), mask=m_t[:, None])
            tl.store(p_dbias + 2 * DP + o_h, tl.sum(dh, axis=0))
        g = tl.dot(b_dh, b_in, acc=g, input_precision="ieee")
    # Read again rather than kept through the products.
    o_t, m_t = _rows(p_tile, BT)
    p_normed2 = p_normed + D + o_t[:, None] * (3 * D) + o_d[None, :]
    normed = tl.load(p_normed2, mask=m_t[:, None] & m_d, other=0.0).to(tl.float32)
    rstd = tl.load(p_rstd + o_t * 3 + 1, mask=m_t, other=0.0)
    if p_stash is not None:
        tl.debug_barrier()
        dx = tl.load(p_stash + o_t[:, None] * D + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
    dx += _norm_gradient(g, normed, rstd, o_d, D, DP)
    b_dx = dx.to(DT)

    # The plan attention.
    o_t, m_t = _rows(p_tile, BT)
    if p_stash is not None and p_dx is not None:
        tl.debug_barrier()
        tl.store(p_stash + o_t[:, None] * D + o_d[None, :], dx, mask=m_t[:, None] & m_d)
    b_normed = tl.load(p_normed + o_t[:, None] * (3 * D) + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0).to(DT)
    p_plan += i_b * (2 * CP * DP)
    p_plan_bias += i_b * CP
    p_dplan += i_tile * (2 * CP * DP)
    p_dplan_bias += i_tile * CP
    g = tl.zeros((BT, DP), tl.float32)
    for i in range(0, CP, CB):
        o_c = i + tl.arange(0, CB)
        # [CB, DP]
        b_m = tl.load(p_plan + o_c[:, None] * DP + o_d[None, :]).to(DT)
        b_n = tl.load(p_plan + CP * DP + o_c[:, None] * DP + o_d[None, :]).to(DT)
        s = tl.dot(b_normed, tl.trans(b_m), input_precision="ieee") + tl.load(p_plan_bias + o_c)[None, :]
        p = _softmax(s, N_Z, NZ)
        dp = tl.dot(b_dx, tl.trans(b_n), input_precision="ieee")
        ds = _softmax_gradient(p, dp, NZ)
        b_ds = ds.to(DT)
        # Tokens beyond the tile's have neither dx nor ds. [CB, DP], though wgmma would want the larger size first: of
        # [DP, CB] both operands would lie in shared memory, with rows of 32 bytes (see Sizes.padded_dim).
        p_out = p_dplan + o_c[:, None] * DP + o_d[None, :]
        tl.store(p_out, tl.dot(tl.trans(b_ds), b_normed, input_precision="ieee"))
        tl.store(p_out + CP * DP, tl.dot(tl.trans(p.to(DT)), b_dx, input_precision="ieee"))
        tl.store(p_dplan_bias + o_c, tl.sum(ds, axis=0))
        # Last: the sum of one group of heads, the usual case, takes no registers before.
        if p_dx is not None:
            g = tl.dot(b_ds, b_m, acc=g, input_precision="ieee")
    if p_dx is not None:
        o_t, m_t = _rows(p_tile, BT)
        normed = tl.load(p_normed + o_t[:, None] * (3 * D) + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
        rstd = tl.load(p_rstd + o_t * 3, mask=m_t, other=0.0)
        if p_stash is not None:
            tl.debug_barrier()
            dx = tl.load(p_stash + o_t[:, None] * D + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
        dx += _norm_gradient(g, normed.to(tl.float32), rstd, o_d, D, DP)
        tl.store(p_dx + o_t[:, None] * D + o_d[None, :], dx, mask=m_t[:, None] & m_d)
        if p_dattended is not None:
            b_dx = dx.to(DT)
            if p_dx1 is not None:
                tl.store(
                    p_dx1 + o_t[:, None] * D + o_d[None, :], b_dx.to(p_dx1.dtype.element_ty), mask=m_t[:, None] & m_d
                )
                tl.store(p_dbias + o_d, tl.sum(dx, axis=0))
            for i in range(0, DP, BK):
                o_k = i + tl.arange(0, BK)
                # [DP, BK]
                b_w = tl.load(p_w + o_d[:, None] * DP + o_k[None, :]).to(DT)
                da = tl.dot(b_dx, b_w, input_precision="ieee")
                tl.store(
                    p_dattended + o_t[:, None] * D + o_k[None, :], da.to(p_dattended.dtype.element_ty),
                    mask=m_t[:, None] & (o_k < D)[None, :],
                )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launches

_SMALL = Option((), 4, 2)
_TILE_BLOCK = 128
_MOST_COLUMNS = 16


@dataclass(frozen=True)
class Sizes:
    """Of one block, and of the padded forms that the kernels compute with."""

    dim: int
    heads: int
    n_z: int
    hidden: int
    n_next: int

    @property
    def padded_dim(self) -> int:
        # Here and below 64: rows of 128 bytes and more, one swizzle for all operands in shared memory. ptxas 12.8, of
        # Triton 3.6 and 3.7, computes the descriptor of an operand of wgmma from an unrelated register where one of
        # another swizzle had the same address before it.
        return max(64, triton.next_power_of_2(self.dim))

    @property
    def padded_hidden(self) -> int:
        return int(triton.cdiv(self.hidden, 64) * 64)

    @property
    def padded_next(self) -> int:
        return int(triton.cdiv(self.n_next, 64) * 64)

    @property
    def padded_z(self) -> int:
        return int(triton.next_power_of_2(self.n_z))

    @property
    def columns_at_once(self) -> int:
        """Columns (head, plan vector) of the plan attention that a tile holds at a time."""
        return int(min(max(16, triton.next_power_of_2(self.heads) * self.padded_z), _MOST_COLUMNS))

    @property
    def columns(self) -> int:
        return int(triton.cdiv(self.heads * self.padded_z, self.columns_at_once) * self.columns_at_once)

    @property
    def packed(self) -> int:
        """Elements of the packed weights."""
        return (self.padded_dim + 2 * self.padded_hidden + self.padded_next) * self.padded_dim

    @property
    def biases(self) -> int:
        return 3 * self.padded_dim + self.padded_hidden + self.padded_next

    @property
    def constants(self) -> dict[str, Any]:
        """Constexpr arguments of both passes."""
        return {
            "D": self.dim, "N_NEXT": self.n_next, "N_Z": self.n_z, "UPCAST": _launch.INTERPRETED,
            "DP": self.padded_dim, "HP": self.padded_hidden, "NP": self.padded_next, "NZ": self.padded_z,
            "CP": self.columns, "CB": self.columns_at_once,
        }  # fmt: skip

    @property
    def plan_option(self) -> Option:
        return Option((), 8 if self.padded_dim > 128 else 4, 2)

    @property
    def plan_constants(self) -> dict[str, Any]:
        width = self.dim // self.heads
        return {
            "D": self.dim, "HEADS": self.heads, "N_Z": self.n_z, "UPCAST": _launch.INTERPRETED,
            "DP": self.padded_dim, "NZ": self.padded_z, "CP": self.columns,
            "BR": 16, "BK": 16 if self.padded_dim > 128 else max(16, min(32, triton.next_power_of_2(width))),
        }  # fmt: skip


def _option(
    bt: int, bk: int, bh: int, bn: int, num_warps: int, num_stages: int, registers: int | None = None
) -> Option:
    return Option((("BT", bt), ("BK", bk), ("BH", bh), ("BN", bn)), num_warps, num_stages, registers)


# By pass, padded width and whether wgmma is there (it reads operands from shared memory, others hold them in
# registers): what compiles without spills for bfloat16 with Triton 3.6 and 3.7, the fastest on an H200 first. A tile of
# 64 tokens leaves room for two or three programs per processor, one of 128 halves the traffic of weights, which is not
# what binds. Those of a forward cut no sum, and are timed; those of a backward do, and sizes alone decide: the last one
# is for masks and for many heads.
_OPTIONS = {
    ("forward", 64, True): [_option(64, 64, 64, 64, 4, 2, 128), _option(128, 64, 64, 64, 4, 3)],
    ("forward", 128, True): [_option(64, 64, 32, 64, 4, 3, 168)],
    ("forward", 256, True): [_option(32, 32, 32, 32, 8, 2)],
    ("data", 64, True): [_option(64, 64, 64, 64, 4, 3)],
    ("data", 128, True): [_option(64, 64, 64, 64, 4, 3), _option(128, 64, 64, 64, 8, 3)],
    ("data", 256, True): [_option(32, 32, 32, 32, 8, 2, 240)],
    ("weights", 64, True): [_option(64, 64, 64, 64, 4, 3)],
    ("weights", 128, True): [_option(64, 64, 32, 64, 4, 3), _option(128, 64, 32, 64, 8, 3)],
    ("weights", 256, True): [_option(32, 32, 32, 32, 8, 2, 240)],
    ("forward", 64, False): [_option(64, 64, 64, 64, 4, 2, 128), _option(128, 64, 64, 64, 4, 2)],
    ("forward", 128, False): [_option(64, 64, 64, 64, 4, 2)],
    ("forward", 256, False): [_option(64, 32, 32, 32, 8, 2)],
    ("data", 64, False): [_option(64, 64, 64, 64, 4, 2)],
    ("data", 128, False): [_option(64, 32, 32, 32, 8, 2)],
    ("data", 256, False): [_option(32, 32, 32, 32, 8, 2, 240)],
    ("weights", 64, False): [_option(64, 64, 32, 64, 4, 2)],
    ("weights", 128, False): [_option(64, 32, 32, 32, 8, 2)],
    ("weights", 256, False): [_option(32, 32, 32, 32, 8, 2, 240)],
}


def options(sizes: Sizes, dtype: torch.dtype, mode: str, architecture: int) -> list[Option]:
    """Those that fit, the expected best first; ``mode``: forward, data (the backward of it alone) or weights.

    A backward has one whatever the number of tokens: another tile adds the gradients of a plan in another order.
    """
    if _launch.INTERPRETED:
        return [_option(16, 16, 32, 32, 4, 1)]
    if dtype == torch.float32:
        return [_option(16, 16, 16, 16, 4, 1)]
    found = _OPTIONS[mode, max(64, sizes.padded_dim), architecture >= 90]
    if mode != "forward" and sizes.padded_dim == 128 and sizes.n_next <= 32 and architecture >= 90:
        # Of the last layer, whose next map is the head: masks of its columns make the other tiles spill.
        found = [_option(128, 64, 32, 64, 8, 3)]
    # Masks and the loop over heads take registers that only these leave, and that they must not go without.
    has_masks, has_groups = sizes.dim != sizes.padded_dim, sizes.columns > sizes.columns_at_once
    if mode == "forward":
        return [replace(found[0], registers=None)] if has_masks or has_groups else found
    return found[-1:] if has_masks or (has_groups and mode == "weights") else found[:1]


def forward_options(sizes: Sizes, dtype: torch.dtype, architecture: int, has_o: bool) -> list[Option]:
    """Those of a forward; the first layer's, without a projection before it, spills with Triton 3.7 at three stages."""
    found = options(sizes, dtype, "forward", architecture)
    if has_o:
        return found
    return [replace(one, num_stages=min(one.num_stages, 2)) if one.registers else one for one in found]


class Saved(NamedTuple):
    """What the forward leaves for the backward."""

    normed: Tensor  # [N, 3, D], results of the three norms before scale and offset, dtype of the products
    rstd: Tensor  # [N, 3] float32
    packed: Tensor  # weights, dtype of the products
    bias: Tensor  # float32
    plan: Tensor  # [B, 2, columns, padded D], dtype of the products
    plan_bias: Tensor  # [B, columns] float32


class Gradients(NamedTuple):
    """Of :func:`forward`'s arguments."""

    dplan_k: Tensor  # [B, n_z, H, d] float32
    dplan_v: Tensor
    dx: Tensor | None  # [N, D] float32
    dattended: Tensor | None  # [N, D], dtype of the products
    weights: list[Tensor]  # in the order of the weights; empty where none is wanted


def tiles_launch(cu_seqlens: Tensor, tiles: Tensor, size: int) -> Launch:
    n_tiles, n_sequences = tiles.shape[0], cu_seqlens.shape[0] - 1
    arguments = {"p_cu": cu_seqlens, "p_tiles": tiles, "n_sequences": n_sequences, "n_tiles": n_tiles}
    constants = {"SIZE": size, "BLOCK": _TILE_BLOCK, "BS": 16 if _launch.INTERPRETED else 64}
    return Launch(tiles_kernel, (triton.cdiv(n_tiles, _TILE_BLOCK),), arguments, constants, _SMALL)


def _pack_launch(sizes: Sizes, weights: Sequence[Tensor | None], packed: Tensor, bias: Tensor) -> Launch:
    (w_o, b_o, _, _, _, _, _, b_plan_o, norm3_w, norm3_b, w_in, b_in, w_out, b_out, norm_w, norm_b, w_next, b_next) = (
        weights
    )
    arguments = {
        "p_w_o": w_o, "p_b_o": b_o, "p_b_plan_o": b_plan_o, "p_norm3_w": norm3_w, "p_norm3_b": norm3_b,
        "p_w_in": w_in, "p_b_in": b_in, "p_w_out": w_out, "p_b_out": b_out, "p_norm_w": norm_w, "p_norm_b": norm_b,
        "p_w_next": w_next, "p_b_next": b_next, "p_packed": packed, "p_bias": bias,
    }  # fmt: skip
    constants = {
        "D": sizes.dim, "HIDDEN": sizes.hidden, "N_NEXT": sizes.n_next, "DP": sizes.padded_dim,
        "HP": sizes.padded_hidden, "NP": sizes.padded_next, "BR": 16,
    }  # fmt: skip
    rows = 2 * sizes.padded_hidden + sizes.padded_next + (0 if w_o is None else sizes.padded_dim)
    return Launch(pack_kernel, (rows // 16 + 1,), arguments, constants, _SMALL)


def _plan_launch(
    sizes: Sizes, plan_k: Tensor, plan_v: Tensor, weights: Sequence[Tensor | None], plan: Tensor, plan_bias: Tensor
) -> Launch:
    _, _, norm2_w, norm2_b, w_q, b_q, w_o, *_ = weights
    n_sequences = plan_k.shape[0]
    arguments = {
        "p_k": plan_k, "p_v": plan_v, "p_norm2_w": norm2_w, "p_norm2_b": norm2_b, "p_w_q": w_q, "p_b_q": b_q,
        "p_w_o": w_o, "p_plan": plan, "p_plan_bias": plan_bias, "n_sequences": n_sequences,
        "scale": (sizes.dim // sizes.heads) ** -0.5,
        "stride_kb": plan_k.stride(0), "stride_kz": plan_k.stride(1), "stride_kh": plan_k.stride(2),
        "stride_vb": plan_v.stride(0), "stride_vz": plan_v.stride(1), "stride_vh": plan_v.stride(2),
    }  # fmt: skip
    grid = (triton.cdiv(n_sequences * sizes.padded_z, 16), sizes.columns // sizes.padded_z)
    return Launch(plan_kernel, grid, arguments, sizes.plan_constants, sizes.plan_option)


def _forward_launch(
    sizes: Sizes, tiles: Tensor, x: Tensor, attended: Tensor | None, saved: Saved, x_out: Tensor, y: Tensor, save: bool,
    option: Option,
) -> Launch:  # fmt: skip
    arguments = {
        "p_tiles": tiles, "p_x": x, "p_attended": attended, "p_w": saved.packed, "p_bias": saved.bias,
        "p_plan": saved.plan, "p_plan_bias": saved.plan_bias, "p_x_out": x_out, "p_y": y,
        "p_normed": saved.normed if save else None, "p_rstd": saved.rstd if save else None,
        "stride_x": x.stride(0), "stride_attended": 0 if attended is None else attended.stride(0),
    }  # fmt: skip
    return Launch(forward_kernel, (tiles.shape[0],), arguments, sizes.constants, option)


def _tiles_of(cu_seqlens: Tensor, n: int, size: int) -> Tensor:
    return cu_seqlens.new_empty((n // size + cu_seqlens.shape[0] - 1, 4), dtype=torch.int32)


def sizes_of(plan_k: Tensor, weights: Sequence[Tensor | None]) -> Sizes:
    """Of plan keys [B, n_z, H, d] and the 18 weights of a block."""
    w_in, w_next = weights[10], weights[16]
    assert w_in is not None
    assert w_next is not None
    return Sizes(w_in.shape[1], plan_k.shape[2], plan_k.shape[1], w_in.shape[0], w_next.shape[0])


def empty_outputs(
    x: Tensor, plan_k: Tensor, sizes: Sizes, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor, Saved]:
    """x_out, y and what is saved, not filled; the forward needs the packed forms even where nothing is saved."""
    n, n_sequences = x.shape[0], plan_k.shape[0]
    rows = n if save else 0
    saved = Saved(
        x.new_empty((rows, 3, sizes.dim), dtype=dtype),
        x.new_empty((rows, 3), dtype=torch.float32),
        x.new_empty((sizes.packed,), dtype=dtype),
        x.new_empty((sizes.biases,), dtype=torch.float32),
        x.new_empty((n_sequences, 2, sizes.columns, sizes.padded_dim), dtype=dtype),
        x.new_empty((n_sequences, sizes.columns), dtype=torch.float32),
    )
    x_out = x.new_empty((n, sizes.dim), dtype=torch.float32)
    return x_out, x.new_empty((n, sizes.n_next), dtype=dtype), saved


def forward(
    x: Tensor,
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor | None],
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """The block of ``gac_fast.reference.decoder_block``.

    Args:
        x: [N, D] float32; rows of neighbouring elements, any distance apart, as ``attended`` [N, D] of ``dtype``.
        plan_k, plan_v: [B, n_z, H, d], float32 or bfloat16; elements of a head are neighbours.
        cu_seqlens: int32 or int64 [B + 1].
        weights: the 18 of ``BlockWeights``, float32 and contiguous.
        dtype: of the products, float32 or bfloat16.
        save: whether a backward will follow.

    Returns:
        x_out [N, D] float32, y [N, n_next] of ``dtype``, and what the backward reads.
    """
    sizes = sizes_of(plan_k, weights)
    n = x.shape[0]
    x_out, y, saved = empty_outputs(x, plan_k, sizes, dtype, save)
    _pack_launch(sizes, weights, saved.packed, saved.bias).run()
    _plan_launch(sizes, plan_k, plan_v, weights, saved.plan, saved.plan_bias).run()

    def launches(option: Option) -> list[Launch]:
        size = dict(option.tiles)["BT"]
        tiles = _tiles_of(cu_seqlens, n, size)
        return [
            tiles_launch(cu_seqlens, tiles, size),
            _forward_launch(sizes, tiles, x, attended, saved, x_out, y, save, option),
        ]

    key = "block_forward", sizes, dtype, attended is None, save, n.bit_length(), plan_k.shape[0].bit_length()
    found = forward_options(sizes, dtype, architecture_of(x), attended is not None)
    for launch in launches(_launch.choose(key, launches, found, x.device)):
        launch.run()
    return x_out, y, saved


class _Partials(NamedTuple):
    """Sums per tile, and the operands of the gradients of the weights."""

    dplan: Tensor
    dplan_bias: Tensor
    dx1: Tensor | None
    dx3: Tensor | None
    dhidden: Tensor | None
    activated: Tensor | None
    dbias: Tensor | None


def _empty_partials(
    like: Tensor, sizes: Sizes, n: int, n_tiles: int, dtype: torch.dtype, wants_weights: bool, has_o: bool
) -> _Partials:
    def operand(width: int, wanted: bool = True) -> Tensor | None:
        return like.new_empty((n, width), dtype=dtype) if wants_weights and wanted else None

    return _Partials(
        like.new_empty((n_tiles, 2, sizes.columns, sizes.padded_dim), dtype=torch.float32),
        like.new_empty((n_tiles, sizes.columns), dtype=torch.float32),
        operand(sizes.dim, has_o), operand(sizes.dim), operand(sizes.padded_hidden), operand(sizes.padded_hidden),
        like.new_zeros((n_tiles, sizes.biases - sizes.padded_dim), dtype=torch.float32) if wants_weights else None,
    )  # fmt: skip


def _backward_launch(
    sizes: Sizes, tiles: Tensor, dx_out: Tensor | None, dy: Tensor | None, saved: Saved, dx: Tensor | None,
    dattended: Tensor | None, partials: _Partials, option: Option,
) -> Launch:  # fmt: skip
    stash = None
    if sizes.padded_dim >= 128:
        stash = saved.rstd.new_empty((saved.rstd.shape[0], sizes.dim)) if dx is None else dx
    arguments = {
        "p_tiles": tiles, "p_dx_out": dx_out, "p_dy": dy, "p_normed": saved.normed, "p_rstd": saved.rstd,
        "p_w": saved.packed, "p_bias": saved.bias, "p_plan": saved.plan, "p_plan_bias": saved.plan_bias,
        "p_dx": dx, "p_dattended": dattended, "p_stash": stash,
        **{f"p_{name}": x for name, x in partials._asdict().items()},
        "stride_dx_out": 0 if dx_out is None else dx_out.stride(0), "stride_dy": 0 if dy is None else dy.stride(0),
    }  # fmt: skip
    return Launch(backward_kernel, (tiles.shape[0],), arguments, sizes.constants, option)


def _reduce_launch(
    sizes: Sizes, cu_seqlens: Tensor, partials: _Partials, weights: Sequence[Tensor | None], dk: Tensor, dv: Tensor,
    sums: Sequence[Tensor], low: bool, size: int,
) -> Launch:  # fmt: skip
    _, _, norm2_w, norm2_b, w_q, b_q, w_o, *_ = weights
    dm, dn, dc = sums or (None, None, None)
    arguments = {
        "p_cu": cu_seqlens, "p_dplan": partials.dplan, "p_dplan_bias": partials.dplan_bias, "p_norm2_w": norm2_w,
        "p_norm2_b": norm2_b, "p_w_q": w_q, "p_b_q": b_q, "p_w_o": w_o, "p_dk": dk, "p_dv": dv, "p_dm": dm, "p_dn": dn,
        "p_dc": dc, "n_sequences": dk.shape[0], "scale": (sizes.dim // sizes.heads) ** -0.5,
    }  # fmt: skip
    constants = {**sizes.plan_constants, "SIZE": size, "LOW": low}
    return Launch(reduce_kernel, (dk.shape[0], sizes.heads), arguments, constants, sizes.plan_option)


def backward(
    dx_out: Tensor | None,
    dy: Tensor | None,
    saved: Saved,
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor | None],
    wants_dx: bool,
    wants_weights: bool,
) -> Gradients:
    """Gradients of :func:`forward`; the same bits on every run, in every process.

    Args:
        dx_out: [N, D] float32, dy: [N, n_next] of the dtype of the products; rows of neighbouring elements. At least
            one of them is there.
        attended: read for the gradients of the weights alone.
        wants_dx: of x and of what window attention read; they are there with ``wants_weights`` in any case.
    """
    sizes = sizes_of(plan_k, weights)
    dtype, n, has_o = saved.normed.dtype, saved.normed.shape[0], weights[0] is not None
    wants_dx = wants_dx or wants_weights
    empty = saved.rstd.new_empty
    dk, dv = empty(plan_k.shape), empty(plan_k.shape)
    dx = empty((n, sizes.dim)) if wants_dx else None
    dattended = saved.normed.new_empty((n, sizes.dim)) if wants_dx and has_o else None
    shape = (sizes.heads, plan_k.shape[0], sizes.n_z)
    sums = [empty((*shape, sizes.dim)), empty((*shape, sizes.dim)), empty(shape)] if wants_weights else []
    found = options(sizes, dtype, "weights" if wants_weights else "data", architecture_of(saved.normed))
    option = found[0]
    size = dict(option.tiles)["BT"]
    tiles = _tiles_of(cu_seqlens, n, size)
    partials = _empty_partials(saved.normed, sizes, n, tiles.shape[0], dtype, wants_weights, has_o)
    for launch in (
        tiles_launch(cu_seqlens, tiles, size),
        _backward_launch(sizes, tiles, dx_out, dy, saved, dx, dattended, partials, option),
        _reduce_launch(sizes, cu_seqlens, partials, weights, dk, dv, sums, dtype == torch.bfloat16, size),
    ):
        launch.run()
    dweights = []
    if wants_weights:
        dweights = _weight_gradients(sizes, dy, saved, attended, plan_k, plan_v, weights, partials, sums)
    return Gradients(dk, dv, dx, dattended, dweights)


def _weight_gradients(
    sizes: Sizes, dy: Tensor | None, saved: Saved, attended: Tensor | None, plan_k: Tensor, plan_v: Tensor,
    weights: Sequence[Tensor | None], partials: _Partials, sums: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """In the order of ``weights``: products over all tokens of what the kernel wrote down; of the plan, over plans."""
    w_o, _, norm2_w, norm2_b, w_q, _, _, _, norm3_w, norm3_b, w_in, _, _, _, norm_w, norm_b, w_next, _ = weights
    assert partials.dbias is not None
    dim, dp = sizes.dim, sizes.padded_dim
    db_o, db_out, db_in, db_next = partials.dbias.sum(0).split((dp, dp, sizes.padded_hidden, sizes.padded_next))

    def product(dy: Tensor | None, x: Tensor | None) -> Tensor:
        assert dy is not None
        assert x is not None
        if dy.is_cuda and dy.dtype == torch.bfloat16:
            # Sums of a million rows are split, and their parts, too, are to be float32.
            return torch.mm(dy.T, x, out_dtype=torch.float32)
        return (dy.T @ x).to(torch.float32)

    def unfold(
        dw: Tensor, db: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, w: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Norm and map from the gradient of the two folded into one."""
        assert norm_w is not None
        assert norm_b is not None
        assert w is not None
        return (w * dw).sum(0), db @ w, torch.addcmul(torch.outer(db, norm_b), dw, norm_w), db.clone()

    def by_head(plan: Tensor) -> Tensor:  # [B, n_z, H, d] -> [H, B n_z, d]
        return plan.to(torch.float32).permute(2, 0, 1, 3).reshape(sizes.heads, -1, plan.shape[-1])

    dm, dn, dc = (x.flatten(1, 2) for x in sums)
    scale = (dim // sizes.heads) ** -0.5
    k, v = by_head(plan_k), by_head(plan_v)
    dw_q = (k.transpose(1, 2) @ dm).reshape(dim, dim) * scale
    db_q = (dc[:, None] @ k).reshape(dim) * scale
    dw_plan_o = (dn.transpose(1, 2) @ v).transpose(0, 1).reshape(dim, dim)
    dw_next = saved.rstd.new_zeros((sizes.n_next, dim)) if dy is None else product(dy, saved.normed[:, 2])
    dw_in = product(partials.dhidden, saved.normed[:, 1])[: sizes.hidden]
    return [
        *((product(partials.dx1, attended), db_o[:dim].clone()) if w_o is not None else ()),
        *unfold(dw_q, db_q, norm2_w, norm2_b, w_q),
        # The probabilities of a head add up to one, so its sums add up to the gradient of the stream.
        dw_plan_o, dn[0].sum(0),
        *unfold(dw_in, db_in[: sizes.hidden], norm3_w, norm3_b, w_in),
        product(partials.dx3, partials.activated)[:, : sizes.hidden].contiguous(), db_out[:dim].clone(),
        *unfold(dw_next, db_next[: sizes.n_next], norm_w, norm_b, w_next),
    ]  # fmt: skip


def shipped(
    dim: int,
    heads: int,
    n_z: int,
    dtype: torch.dtype,
    architecture: int = 90,
    hidden: int | None = None,
    n_next: int | None = None,
    has_o: bool = True,
) -> list[Launch]:
    """All launches that the launcher may pick at these sizes, on meta tensors: every mode of both passes."""
    sizes = Sizes(dim, heads, n_z, hidden or 4 * dim, n_next or 3 * dim)
    n, n_sequences = 1 << 20, 512

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    d, h, o = sizes.dim, sizes.hidden, sizes.n_next
    shapes = ((d, d), (d,), (d,), (d,), (d, d), (d,), (d, d), (d,), (d,), (d,), (h, d), (h,), (d, h), (d,), (d,), (d,),
              (o, d), (o,))  # fmt: skip
    weights: list[Tensor | None] = [empty(*shape) for shape in shapes]
    if not has_o:
        weights[:2] = None, None
    cu = empty(n_sequences + 1, dtype=torch.int32)
    plan_k = empty(n_sequences, n_z, 2, heads, dim // heads)[:, :, 0]
    x, dy = empty(n, dim), empty(n, o, dtype=dtype)
    attended = empty(n, dim, dtype=dtype) if has_o else None
    x_out, y, saved = empty_outputs(x, plan_k, sizes, dtype, True)
    found = [
        _pack_launch(sizes, weights, saved.packed, saved.bias),
        _plan_launch(sizes, plan_k, plan_k, weights, saved.plan, saved.plan_bias),
    ]
    tile_sizes = set()
    for option in forward_options(sizes, dtype, architecture, has_o):
        tile_sizes.add(dict(option.tiles)["BT"])
        tiles = _tiles_of(cu, n, dict(option.tiles)["BT"])
        found += [_forward_launch(sizes, tiles, x, attended, saved, x_out, y, save, option) for save in (False, True)]
    dk = empty(n_sequences, n_z, heads, dim // heads)
    shape = (heads, n_sequences, n_z)
    for wants_dx, wants_weights in ((False, False), (True, False), (True, True)):
        for option in options(sizes, dtype, "weights" if wants_weights else "data", architecture):
            size = dict(option.tiles)["BT"]
            tile_sizes.add(size)
            tiles = _tiles_of(cu, n, size)
            partials = _empty_partials(saved.normed, sizes, n, tiles.shape[0], dtype, wants_weights, has_o)
            dx, dattended = (empty(n, dim), attended) if wants_dx else (None, None)
            found.append(_backward_launch(sizes, tiles, x, dy, saved, dx, dattended, partials, option))
            if wants_dx:
                sums = [empty(*shape, dim), empty(*shape, dim), empty(*shape)] if wants_weights else []
                low = dtype == torch.bfloat16
                found.append(_reduce_launch(sizes, cu, partials, weights, dk, dk, sums, low, size))
    found += [tiles_launch(cu, _tiles_of(cu, n, size), size) for size in sorted(tile_sizes)]
    return found
