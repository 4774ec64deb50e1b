"""Rotary angles inside a kernel, exact at any position: phases in turns, as integers that wrap around by themselves."""

from __future__ import annotations

import functools
from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cos_sin", "rotary_turns"]

# 1 / (2 pi) to 160 bits.
_ONE_TURN = Fraction(0x28BE60DB9391054A7F09D5F47D4D377036D8A566, 1 << 160)


@triton.jit
def cos_sin(positions, turns):
    """Cosine and sine, float32, of positions * turns / 2^64 full turns; both int64, broadcast against one another."""
    # The product wraps modulo 2^64, one turn; its upper word is the phase to 2^-32 of a turn.
    phase = ((positions * turns) >> 32).to(tl.uint32)
    # Nearest quarter turn in integers, so that the float32 angle stays within pi/4 of zero.
    quarter = (phase + 0x20000000) >> 30
    theta = (phase - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    t2 = theta * theta
    s = theta + theta * t2 * (-1.6666654611e-1 + t2 * (8.3321608736e-3 - t2 * 1.9515295891e-4))
    c = 1.0 - 0.5 * t2 + t2 * t2 * (4.166664568298827e-2 + t2 * (-1.388731625493765e-3 + t2 * 2.443315711809948e-5))
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return cosine, sine


@functools.lru_cache(maxsize=64)
def _turns(half: int, base: float) -> tuple[int, ...]:
    """base^(-i / half) / (2 pi) modulo 1, in units of 2^-64 and as signed words, from the float64 frequency."""
    words = (int(Fraction(base ** (-i / half)) * _ONE_TURN * (1 << 64)) % (1 << 64) for i in range(half))
    return tuple(word - (1 << 64) if word >= 1 << 63 else word for word in words)


_made: dict[tuple[int, float, torch.device], Tensor] = {}


def rotary_turns(width: int, base: float, device: torch.device) -> Tensor:
    """int64 [width / 2]: what a step of one position adds to the phase of each pair, in 2^-64 turns.

    A constant of (width, base), made once per device, and inside a captured graph for that graph alone.
    """
    key = (width // 2, base, device)
    found = _made.get(key)
    if found is None:
        found = torch.empty(width // 2, dtype=torch.int64, device=device)
        if device.type != "meta":
            # Filled by kernels: a copy from the host would wait for the device, and a graph could not capture it.
            for element, turn in zip(found.unbind(), _turns(width // 2, base), strict=True):
                element.fill_(turn)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _made[key] = found
    return found
