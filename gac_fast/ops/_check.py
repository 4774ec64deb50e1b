"""Checks of tensor arguments; none reads tensor data, so none waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {_name(x.layout)}")


def no_gradient(name: str, x: Tensor) -> None:
    """For what is written to."""
    if x.requires_grad:
        raise ValueError(f"{name}: expected a tensor that asks for no gradient, got one that does")


def dtype(name: str, x: Tensor, *expected: torch.dtype) -> None:
    tensor(name, x)
    if x.dtype not in expected:
        names = " or ".join(_name(dtype) for dtype in expected)
        raise ValueError(f"{name}: expected dtype {names}, got {_name(x.dtype)}")


def device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    tensor(name, x)
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} of {like_name}, got {x.device}")


def shape(name: str, x: Tensor, *expected: int | str) -> None:
    """``expected`` holds a size, or a letter where any size will do."""
    tensor(name, x)
    if x.dim() != len(expected) or any(
        isinstance(size, int) and size != actual for size, actual in zip(expected, x.shape, strict=True)
    ):
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(x.shape)}")


def head_width(width: int, name: str = "q") -> None:
    if width % 2 != 0 or not 8 <= width <= 256:
        raise ValueError(f"{name}: expected an even head width of 8 to 256, got {width}")


def cu_seqlens(x: Tensor, n_tokens: int) -> None:
    """Type and size only: the values stay on the device."""
    dtype("cu_seqlens", x, *INTEGERS)
    shape("cu_seqlens", x, "B + 1")
    if x.shape[0] == 0 or (x.shape[0] == 1 and n_tokens > 0):
        raise ValueError(f"cu_seqlens: expected at least 2 offsets for {n_tokens} tokens, got {x.shape[0]}")


def _name(x: torch.dtype | torch.layout) -> str:
    return str(x).removeprefix("torch.")
