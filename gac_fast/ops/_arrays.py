"""torch tensors as the NumPy arrays that the C++ engine reads and writes in place."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def heads(x: Tensor) -> npt.NDArray[Any]:
    """float32 as it is, bfloat16 as int16 of its bits; copied only where the elements of a row lie apart."""
    if x.requires_grad:
        x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def integers(x: Tensor) -> npt.NDArray[Any]:
    return x.detach().numpy()


# The engine pads rows of operands to this many elements.
_PAD = 32


def padded(n: int) -> int:
    return (n + _PAD - 1) // _PAD * _PAD


def array(x: Tensor | None) -> npt.NDArray[Any] | None:
    """A tensor as the engine takes it: bfloat16 as int16."""
    if x is None:
        return None
    # A call of torch takes longer than the question, and an update makes a thousand arrays.
    if x.requires_grad:
        x = x.detach()
    same: npt.NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return same


def rows(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Rows of neighbouring elements, any distance apart."""
    if x is None:
        return None
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
