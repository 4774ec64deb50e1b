"""From plan seeds to the plan and to the keys and values that the decoder's layers read of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _arrays, _check, _direct, _dispatch, _threads
from gac_fast.reference import PlanMap, PriorWeights

__all__ = ["seed_plans"]

OP = "seed_plans"
_dispatch.register(OP, "cpp")


def _array(x: Tensor) -> Any:
    return _arrays.array(x.contiguous())


class _Plans(torch.autograd.Function):
    """Weights flat: those of the prior, then three of each layer."""

    @staticmethod
    def forward(ctx: Any, z0: Tensor, n_prior: int, *weights: Tensor) -> tuple[Tensor, Tensor]:
        prior, layers = _split(weights, n_prior)
        n_plans, n_z, _ = z0.shape
        z0 = z0.detach().contiguous()
        before = torch.empty(n_plans, len(prior[1]) if prior else 0)
        z, scale, kv = torch.empty(z0.shape), torch.empty(n_plans, n_z), torch.empty(len(layers), 2, *z0.shape)
        _dispatch.cpp_engine()._seed_plans(
            [_array(w) for w in prior], [[_array(w) for w in layer] for layer in layers], z0.numpy(), before.numpy(),
            z.numpy(), scale.numpy(), kv.numpy(), _threads.count(),
        )  # fmt: skip
        ctx.n_prior = n_prior
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z0, before, z, scale, *weights)
        return z, kv

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dkv: Tensor | None) -> tuple[Any, ...]:
        z0, before, z, scale, *weights = ctx.saved_tensors
        prior, layers = _split(weights, ctx.n_prior)
        grads = [torch.empty(w.shape) for w in weights]
        dprior, dlayers = _split(grads, ctx.n_prior)
        if dkv is None:
            dkv = torch.zeros(len(layers), 2, *z.shape)
        _dispatch.cpp_engine()._seed_weights(
            [_array(w) for w in prior], [[_array(w) for w in layer] for layer in layers], z0.numpy(), before.numpy(),
            _array(z), scale.numpy(), _array(dkv), None if dz is None else _array(dz), [g.numpy() for g in dprior],
            [[g.numpy() for g in layer] for layer in dlayers], _threads.count(),
        )  # fmt: skip
        return None, None, *grads


def _split(flat: Sequence[Tensor], n_prior: int) -> tuple[Sequence[Tensor], list[Sequence[Tensor]]]:
    return flat[:n_prior], [flat[i : i + 3] for i in range(n_prior, len(flat), 3)]


def seed_plans(prior: PriorWeights, layers: Sequence[PlanMap], z0: Tensor) -> tuple[Tensor, Tensor]:
    """The plan of seeds, and all layers' keys and values of it.

    Equivalent to :func:`gac_fast.reference.seed_plans`. The engine makes gradients of weights, not of seeds: seeds that
    ask for one take the reference. It gives the same bits on any number of threads.

    Args:
        prior: U, all None for the identity.
        layers: of each layer, its map of the plan to keys and values.
        z0: float32 (or float64, which the reference takes) [P, n_z, D].

    Returns:
        z [P, n_z, D], and keys and values [L, 2, P, n_z, D].

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("z0", z0, torch.float32, torch.float64)
    _check.shape("z0", z0, "P", "n_z", "D")
    n_z, dim = z0.shape[1:]
    if n_z * dim == 0:
        raise ValueError(f"z0: expected plans of at least one value, got {list(z0.shape)}")
    given = [w for w in prior if w is not None]
    if len(given) not in (0, 4):
        raise ValueError(f"prior: expected all weights or none, got {len(given)}")
    if prior.w1 is not None:
        _check.shape("prior.w1", prior.w1, "hidden", n_z * dim)
        hidden = prior.w1.shape[0]
        for name, shape in (("b1", (hidden,)), ("w2", (n_z * dim, hidden)), ("b2", (n_z * dim,))):
            _check.shape(f"prior.{name}", getattr(prior, name), *shape)
    for i, layer in enumerate(layers):
        for name, shape in (("w", (2 * dim, dim)), ("b", (2 * dim,)), ("position", (n_z, dim))):
            _check.shape(f"layers[{i}].{name}", getattr(layer, name), *shape)
    flat = [*given, *(w for layer in layers for w in layer)]
    for w in flat:
        _check.dtype("weights", w, z0.dtype)
        _check.device("weights", w, "z0", z0)
    refused = _dispatch.refusal(z0)
    if refused is None and not (
        all(map(_direct.unseen, (z0, *flat))) and not (torch.is_grad_enabled() and z0.requires_grad)
    ):
        refused = "the engine makes no gradient of seeds, and runs where no compiler or mode looks on"
    if _dispatch.choose(OP, z0.device, refused) == "reference":
        return reference.seed_plans(prior, layers, z0)
    found: tuple[Tensor, Tensor] = _Plans.apply(z0, len(given), *flat)
    return found
