"""What the return models are trained on: the error of their means, with dropout, and the fit of their variances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _check, _direct, _dispatch, _threads
from gac_fast.reference import ReturnWeights

__all__ = ["return_losses"]

OP = "return_losses"
_dispatch.register(OP, "cpp")


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, context: Tensor | None, y: Tensor, seen: Tensor, fitted: Tensor,
        masks: list[Tensor] | None, *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.empty(2, dtype=torch.float64)
        ctx.arrays = (
            [_array(w) for w in weights], _array(z), None if context is None else _array(context), _array(y),
            _array(seen), _array(fitted), [_array(mask) for mask in masks or ()], out.numpy(),
        )  # fmt: skip
        _dispatch.cpp_engine()._return_losses(*ctx.arrays, 0.0, 0.0, None, [], _threads.count())
        ctx.save_for_backward(z, *weights)
        mean, variance = out.float().unbind()
        return mean.clone(), variance.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor) -> tuple[Any, ...]:
        z, *weights = ctx.saved_tensors
        dz = torch.empty(z.shape) if ctx.needs_input_grad[0] else None
        grads = [torch.empty(w.shape) for w in weights] if any(ctx.needs_input_grad[6:]) else []
        _dispatch.cpp_engine()._return_losses(
            *ctx.arrays, float(d_mean), float(d_variance), None if dz is None else dz.numpy(),
            [g.numpy() for g in grads], _threads.count(),
        )  # fmt: skip
        return dz, None, None, None, None, None, *(grads if grads else (None,) * len(weights))


def return_losses(
    weights: ReturnWeights,
    z: Tensor,
    y: Tensor,
    seen: Tensor,
    fitted: Tensor,
    context: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Losses of the return models' means, with dropout, and of their variances, without.

    Equivalent to :func:`gac_fast.reference.return_losses`. Dropout draws from torch's generator, in the order in which
    the reference does. The engine gives the same bits on any number of threads.

    Args:
        weights: r.
        z: [P, n_z, D] plans, float32 (or float64, which the reference takes).
        y: [P] standardised returns.
        seen, fitted: [P], what a plan counts in the first and in the second loss.
        context: [P, obs_dim], first states where r takes them.
        dropout: of both hidden layers, in [0, 1).

    Returns:
        ``sum seen (y - r)^2`` and ``sum fitted ((y - r)^2 exp(-v) + v) / 2`` over members and plans, both []. The
        second moves neither the plans nor the means.

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("z", z, torch.float32, torch.float64)
    _check.shape("z", z, "P", "n_z", "D")
    n_plans, d = z.shape[0], z.shape[1] * z.shape[2]
    if d == 0:
        raise ValueError(f"z: expected plans of at least one value, got {list(z.shape)}")
    for name, x in (("y", y), ("seen", seen), ("fitted", fitted)):
        _check.dtype(name, x, z.dtype)
        _check.device(name, x, "z", z)
        _check.shape(name, x, n_plans)
    if context is not None:
        _check.dtype("context", context, z.dtype)
        _check.device("context", context, "z", z)
        _check.shape("context", context, n_plans, "obs_dim")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a share in [0, 1), got {dropout}")
    n_in = d + (0 if context is None else context.shape[1])
    _check.shape("weights.w1", weights.w1, "E", "hidden", n_in)
    members, hidden1, _ = weights.w1.shape
    _check.shape("weights.w2", weights.w2, members, "hidden", hidden1)
    hidden2 = weights.w2.shape[1]
    if 0 in (members, hidden1, hidden2):
        raise ValueError(f"weights: expected sizes of at least 1, got {[members, hidden1, hidden2]}")
    for name, shape in (("b1", (hidden1,)), ("b2", (hidden2,)), ("w3", (2, hidden2)), ("b3", (2,))):
        _check.shape(f"weights.{name}", getattr(weights, name), members, *shape)
    for name, w in weights._asdict().items():
        _check.dtype(f"weights.{name}", w, z.dtype)
        _check.device(f"weights.{name}", w, "z", z)
    refused = _dispatch.refusal(z)
    if refused is None and not all(map(_direct.unseen, (z, *weights))):
        refused = "the engine runs where no compiler or mode looks on"
    if _dispatch.choose(OP, z.device, refused) == "reference":
        return reference.return_losses(weights, z, y, seen, fitted, context, dropout)
    masks = None
    if dropout > 0:
        masks = [
            torch.empty(members, n_plans, hidden).bernoulli_(1 - dropout).div_(1 - dropout)
            for hidden in (hidden1, hidden2)
        ]
    found: tuple[Tensor, Tensor] = _Losses.apply(z, context, y, seen, fitted, masks, *weights)
    return found
