"""torch tensors as the NumPy arrays that the C++ engine reads and writes in place."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def heads(x: Tensor) -> npt.NDArray[Any]:
    """float32 as it is, bfloat16 as int16 of its bits; copied only where the elements of a row lie apart."""
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def integers(x: Tensor) -> npt.NDArray[Any]:
    return x.detach().numpy()
