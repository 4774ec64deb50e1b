"""Counter-based standard normals on the GPU: Philox4x32-10 and Box-Muller.

:func:`philox4x32` and :func:`box_muller` are device functions that other kernels call for their noise; the definition
they share with every engine is in ``gac_fast.reference.philox_normal``.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["box_muller", "philox4x32", "philox_kernel", "philox_normal", "philox_words"]

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)

# Quads (four elements, one Philox call) per program.
_MAX_BLOCK = 256


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four uint32 words of the counter (c0, c1, c2, c3) under the key (k0, k1), all uint32 of one shape or scalar."""
    for _ in tl.static_range(10):
        hi0 = tl.umulhi(c0, _M0)
        lo0 = c0 * _M0
        hi1 = tl.umulhi(c2, _M1)
        lo1 = c2 * _M1
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _minus_log_uniform(w):
    """-ln((w + 1) / 2^32) in float32, for uint32 w."""
    # From sqrt(1/2) up, 1 - u is exact where u itself would round away the digits that the logarithm needs.
    near_one = w >= 0xB504F334
    one_minus_u = (0xFFFFFFFF - w).to(tl.float32) * 2.3283064365386963e-10
    bits = (w + 1).to(tl.float32).to(tl.int32, bitcast=True)
    # Exponent and mantissa in [sqrt(1/2), sqrt(2)).
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    x = tl.where(near_one, -one_minus_u, mantissa - 1.0)
    e = tl.where(near_one, 0, exponent - 32).to(tl.float32)
    # ln(1 + x) by the polynomial of Cephes' logf, ln 2 in two parts.
    y = 7.0376836292e-2
    y = y * x - 1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x - 1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x - 1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x - 2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * x * x - 2.12194440e-4 * e - 0.5 * x * x
    return -(x + y + 0.693359375 * e)


@triton.jit
def box_muller(w0, w1):
    """Two float32 normals of uint32 words: sqrt(-2 ln u) (cos, sin)(2 pi u'), u = (w0 + 1) / 2^32, u' = w1 / 2^32."""
    radius = tl.sqrt_rn(2.0 * _minus_log_uniform(w0))
    # Nearest quarter turn in integers, so that the float32 angle stays within pi/4 of zero and exact to its last digit.
    quarter = (w1 + 0x20000000) >> 30
    theta = (w1 - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    t2 = theta * theta
    s = theta + theta * t2 * (-1.6666654611e-1 + t2 * (8.3321608736e-3 - t2 * 1.9515295891e-4))
    c = 1.0 - 0.5 * t2 + t2 * t2 * (4.166664568298827e-2 + t2 * (-1.388731625493765e-3 + t2 * 2.443315711809948e-5))
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit(do_not_specialize=["seed0", "seed1"])
def philox_kernel(
    p_out,
    p_plans,
    p_steps,
    seed0,
    seed1,
    n,
    n_tiles,
    stride_row,
    stride_element,
    stride_plan,
    stride_step,
    BLOCK: tl.constexpr,
    RAW_WORDS: tl.constexpr,
):
    """Fills a [P, n] output; one program makes 4 BLOCK elements of one row. RAW_WORDS stores the integers instead."""
    i_program = tl.program_id(0)
    # int64 before any product with a stride: P * n may exceed 2^31.
    i_row = (i_program // n_tiles).to(tl.int64)
    i_tile = (i_program % n_tiles).to(tl.int64)
    plan = tl.load(p_plans + i_row * stride_plan).to(tl.uint32)
    step = tl.load(p_steps + i_row * stride_step).to(tl.uint32)

    # [BLOCK]
    c0 = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = philox4x32(
        c0, zero + plan, zero + step, zero, zero + seed0.to(tl.uint32), zero + seed1.to(tl.uint32)
    )
    if RAW_WORDS:
        x0, x1, x2, x3 = w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64)
    else:
        x0, x1 = box_muller(w0, w1)
        x2, x3 = box_muller(w2, w3)
    # [4 BLOCK], element 4 i + j from word j
    b_out = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    o_element = i_tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(p_out + i_row * stride_row + o_element * stride_element, b_out, mask=o_element < n)


def philox_normal(seed: tuple[int, int], plans: Tensor, steps: Tensor, out: Tensor) -> None:
    """Fill ``out`` float32 [P, n], any strides, for plans and steps int64 [P] (their low 32 bits count)."""
    _launch(seed, plans, steps, out, raw_words=False)


def philox_words(seed: tuple[int, int], plans: Tensor, steps: Tensor, out: Tensor) -> None:
    """Fill ``out`` int64 [P, n] with the random words behind :func:`philox_normal`, in [0, 2^32)."""
    _launch(seed, plans, steps, out, raw_words=True)


def _launch(seed: tuple[int, int], plans: Tensor, steps: Tensor, out: Tensor, *, raw_words: bool) -> None:
    n_rows, n = out.shape
    if out.numel() == 0:
        return
    n_quads = triton.cdiv(n, 4)
    block = min(_MAX_BLOCK, triton.next_power_of_2(n_quads))
    n_tiles = triton.cdiv(n_quads, block)
    # Words as signed integers: always int32, hence one compiled kernel for every seed.
    seed0, seed1 = (word - (1 << 32) if word >= 1 << 31 else word for word in seed)
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        philox_kernel[(n_rows * n_tiles,)](
            p_out=out,
            p_plans=plans,
            p_steps=steps,
            seed0=seed0,
            seed1=seed1,
            n=n,
            n_tiles=n_tiles,
            stride_row=out.stride(0),
            stride_element=out.stride(1),
            stride_plan=plans.stride(0),
            stride_step=steps.stride(0),
            BLOCK=block,
            RAW_WORDS=raw_words,
        )
