"""Mean squared errors of mean actions tanh(y), by dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _arrays, _check, _direct, _dispatch, _threads

__all__ = ["action_errors"]

OP = "action_errors"
_dispatch.register(OP, "cpp")


class _Errors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, actions: Tensor, counts: Tensor | None) -> Tensor:
        y, actions = y.contiguous(), actions.contiguous()
        squares = torch.zeros(y.shape[1], dtype=torch.float64)
        flags = None if counts is None else counts.contiguous().numpy()
        _dispatch.cpp_engine()._action_errors(
            _arrays.array(y), actions.numpy(), flags, torch.ones(y.shape[1]).numpy(), None, squares.numpy(),
            _threads.count(),
        )  # fmt: skip
        ctx.n = len(y) if counts is None else int(counts.sum())
        ctx.flags = flags
        ctx.save_for_backward(y, actions)
        return (squares / ctx.n).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, actions = ctx.saved_tensors
        dy = torch.empty_like(y)
        _dispatch.cpp_engine()._action_errors(
            _arrays.array(y), actions.numpy(), ctx.flags, (grad * 2 / ctx.n).contiguous().numpy(), _arrays.array(dy),
            None, _threads.count(),
        )  # fmt: skip
        return dy, None, None


def action_errors(y: Tensor, actions: Tensor, counts: Tensor | None = None) -> Tensor:
    """The mean over steps of ``(a - tanh y)^2``, for each dimension of the actions.

    Equivalent to :func:`gac_fast.reference.action_errors`. The engine sums in float64 over fixed ranges of steps: the
    same bits on any number of threads.

    Args:
        y: [n, act_dim], float32 or bfloat16 (or float64, which the reference takes).
        actions: [n, act_dim], float32 or that of y.
        counts: bool [n], steps that count; None for all. Of none the mean is NaN.

    Returns:
        [act_dim], of the actions' dtype.

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("y", y, torch.float32, torch.bfloat16, torch.float64)
    _check.shape("y", y, "n", "act_dim")
    _check.dtype("actions", actions, torch.float32, y.dtype)
    _check.device("actions", actions, "y", y)
    _check.shape("actions", actions, *y.shape)
    if counts is not None:
        _check.dtype("counts", counts, torch.bool)
        _check.device("counts", counts, "y", y)
        _check.shape("counts", counts, y.shape[0])
    refused = _dispatch.refusal(y)
    if refused is None and actions.dtype != torch.float32:
        refused = "the engine takes actions of float32"
    if refused is None and not (_direct.unseen(y) and not actions.requires_grad):
        refused = "the engine makes no gradient of actions, and runs where no compiler or mode looks on"
    if _dispatch.choose(OP, y.device, refused) == "reference":
        return reference.action_errors(y, actions, counts)
    found: Tensor = _Errors.apply(y, actions, counts)
    return found
