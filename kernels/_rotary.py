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
    # The product wraps modulo 2^64, one turn; its upper word is the phase to 2^-32 of a turn, signed.
    phase = ((positions * turns) >> 32).to(tl.int32)
    # x in [-1/2, 1/2) turns; sin(2 pi x) / x and cos(2 pi x) are minimax polynomials of x^2, both to 4e-7.
    x = phase.to(tl.float32) * 2.3283064365386963e-10
    u = x * x
    s = u * 3.238494873046875 - 14.900115013122559
    s = s * u + 42.0260009765625
    s = s * u - 76.7030258178711
    s = s * u + 81.60513305664062
    s = s * u - 41.34170150756836
    s = s * u + 6.2831854820251465
    c = u * 6.529609680175781 - 25.968313217163086
    c = c * u + 60.16783142089844
    c = c * u - 85.45016479492188
    c = c * u + 64.93911743164062
    c = c * u - 19.73920440673828
    c = c * u + 1.0
    return c, s * x


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
