"""All steps of the inference of a batch of plans: gradient ascent, or Langevin steps towards a target return."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _check, _dispatch, _threads
from gac_fast.reference import PriorWeights, ReturnWeights

__all__ = ["plan_ascent", "plan_langevin"]

OP = "plan_ascent"
LANGEVIN = "plan_langevin"


def _members_refusal(members: int) -> str | None:
    from gac_fast.kernels import plan_ascent as kernel

    return kernel.refusal(members)


for _name in (OP, LANGEVIN):
    _dispatch.register(_name, "triton", "cpp", triton_refuses=lambda sizes: _members_refusal(sizes.members))

_WORD = 1 << 32

# Both take the weights as lists without the None of an identity prior, and the context as [P, G, obs_dim].


@torch.library.custom_op("gac_fast::plan_ascent", mutates_args=())
def _plan_ascent(
    prior_weights: Sequence[Tensor],
    return_weights: Sequence[Tensor],
    z0: Tensor,
    context: Tensor | None,
    n_steps: int,
    step_size: float,
    kappa: float,
    prior_weight: float,
    radius: float,
    max_norm: float,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _outputs(z0)
    _dispatch.cpp_engine()._plan_ascent(
        *_inputs(prior_weights, return_weights, z0, context, out), n_steps, step_size, kappa, prior_weight, radius,
        max_norm, bf16, _threads.count(),
    )  # fmt: skip
    return out


@torch.library.custom_op("gac_fast::plan_langevin", mutates_args=())
def _plan_langevin(
    prior_weights: Sequence[Tensor],
    return_weights: Sequence[Tensor],
    z0: Tensor,
    target: Tensor,
    plans: Tensor,
    context: Tensor | None,
    n_steps: int,
    step_size: float,
    max_drift_ratio: float,
    seed0: int,
    seed1: int,
    first_step: int,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _outputs(z0)
    _dispatch.cpp_engine()._plan_langevin(
        *_inputs(prior_weights, return_weights, z0, context, out), n_steps, step_size,
        target.detach().contiguous().numpy(), max_drift_ratio, seed0, seed1, plans.numpy(), first_step, bf16,
        _threads.count(),
    )  # fmt: skip
    return out


@torch.library.custom_op("gac_fast::plan_ascent_triton", mutates_args=())
def _plan_ascent_triton(
    prior_weights: Sequence[Tensor],
    return_weights: Sequence[Tensor],
    z0: Tensor,
    context: Tensor | None,
    n_steps: int,
    step_size: float,
    kappa: float,
    prior_weight: float,
    radius: float,
    max_norm: float,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from gac_fast.kernels import plan_ascent as kernel

    out = _outputs(z0)
    kernel.run(
        prior_weights, return_weights, z0, context, out, n_steps, step_size=step_size, kappa=kappa,
        prior_weight=prior_weight, radius=radius, max_norm=max_norm, bf16=bf16,
    )  # fmt: skip
    return out


@torch.library.custom_op("gac_fast::plan_langevin_triton", mutates_args=())
def _plan_langevin_triton(
    prior_weights: Sequence[Tensor],
    return_weights: Sequence[Tensor],
    z0: Tensor,
    target: Tensor,
    plans: Tensor,
    context: Tensor | None,
    n_steps: int,
    step_size: float,
    max_drift_ratio: float,
    seed0: int,
    seed1: int,
    first_step: int,
    bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from gac_fast.kernels import plan_ascent as kernel

    out = _outputs(z0)
    kernel.run(
        prior_weights, return_weights, z0, context, out, n_steps, step_size=step_size, target=target.contiguous(),
        plans=plans.contiguous(), max_drift_ratio=max_drift_ratio, seed=(seed0, seed1), first_step=first_step,
        bf16=bf16,
    )  # fmt: skip
    return out


def _fake(
    prior_weights: Sequence[Tensor], return_weights: Sequence[Tensor], z0: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return _outputs(z0)


for _op in (_plan_ascent, _plan_langevin, _plan_ascent_triton, _plan_langevin_triton):
    _op.register_fake(_fake)


def _outputs(z0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z0.new_empty(z0.shape), z0.new_empty(z0.shape[0]), z0.new_empty(z0.shape[0])


def _inputs(
    prior_weights: Sequence[Tensor],
    return_weights: Sequence[Tensor],
    z0: Tensor,
    context: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> list[object]:
    rows = z0.reshape(z0.shape[0], z0.shape[1] * z0.shape[2])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if context is not None and context.stride(2) != 1:
        context = context.contiguous()
    prior, returns = ([w.detach().contiguous().numpy() for w in weights] for weights in (prior_weights, return_weights))
    seeds, mean, std = out
    return [
        prior, returns, rows.detach().numpy(), None if context is None else context.detach().numpy(),
        seeds.view(rows.shape).numpy(), mean.numpy(), std.numpy(), z0.shape[2],
    ]  # fmt: skip


def plan_ascent(
    prior_weights: PriorWeights,
    return_weights: ReturnWeights,
    z0: Tensor,
    *,
    n_steps: int,
    step_size: float,
    kappa: float = 0.0,
    prior_weight: float = 0.0,
    radius: float = math.inf,
    max_norm: float = math.inf,
    context: Tensor | None = None,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise the lower bound of the return inside a trust region; equivalent to :func:`gac_fast.reference.plan_ascent`.

    Args:
        z0: float32 or float64 [P, n_z, D] seeds; float64 always takes the reference.
        n_steps: ascent steps, at least 0.
        step_size: of the first step in units of sqrt(d); finite.
        kappa, prior_weight: weights in the bound; finite.
        radius, max_norm: of the two balls in units of sqrt(d), at least 0; infinite by default.
        context: [P, obs_dim] or [P, G, obs_dim] normalised first states, where the return model takes them. Starts
            expanded over the plans are read once.
        bf16: round the operands of the products to bfloat16 (the reference leaves them as they are); sums, seeds,
            norms and gradients stay float32. (The Triton engine also keeps the slopes of activations and the gradient
            at the plan in bfloat16 between products.)

    Returns:
        seeds [P, n_z, D], mean [P] and std [P] of the standardised return.

    Raises:
        ValueError: an argument out of range or of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check_inputs(prior_weights, return_weights, z0, context, n_steps, step_size)
    _check_number("kappa", kappa)
    _check_number("prior_weight", prior_weight)
    _check_radius("radius", radius)
    _check_radius("max_norm", max_norm)
    refused = _dispatch.refusal(z0) or _refused(OP, z0.device, return_weights.w1.shape[0])
    engine = _dispatch.choose(OP, z0.device, refused)
    if engine != "reference":
        with torch.no_grad():
            return (_plan_ascent if engine == "cpp" else _plan_ascent_triton)(
                [w for w in prior_weights if w is not None], list(return_weights), z0, _with_starts(context), n_steps,
                step_size, kappa, prior_weight, radius, max_norm, bf16,
            )  # fmt: skip
    return reference.plan_ascent(
        prior_weights, return_weights, z0, n_steps=n_steps, step_size=step_size, kappa=kappa,
        prior_weight=prior_weight, radius=radius, max_norm=max_norm, context=context,
    )  # fmt: skip


def plan_langevin(
    prior_weights: PriorWeights,
    return_weights: ReturnWeights,
    z0: Tensor,
    target: Tensor,
    *,
    n_steps: int,
    step_size: float,
    seed: tuple[int, int],
    plans: Tensor,
    first_step: int = 0,
    max_drift_ratio: float = math.inf,
    context: Tensor | None = None,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample p(z0 | y = target) by Langevin steps; equivalent to :func:`gac_fast.reference.plan_langevin`.

    Args:
        z0: float32 or float64 [P, n_z, D], where the chains are; float64 always takes the reference.
        target: standardised returns like z0, [P] or one for all.
        n_steps: Langevin steps, at least 0.
        step_size: s in z0 <- z0 - (s^2 / 2) grad E + s * noise; finite, at least 0.
        seed: of the noise, two words within [0, 2^32).
        plans: int64 [P], ids of the plans in the noise, within [0, 2^32).
        first_step: the step in the noise of the first step; the last one stays below 2^32.
        max_drift_ratio: greatest |drift| / |noise|, at least 0; a step is shrunk until it holds.
        context, bf16: as in :func:`plan_ascent`.

    Returns:
        seeds [P, n_z, D], mean [P] and std [P] of the standardised return.

    Raises:
        ValueError: an argument out of range or of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check_inputs(prior_weights, return_weights, z0, context, n_steps, step_size)
    if step_size < 0:
        raise ValueError(f"step_size: expected at least 0, got {step_size}")
    _check_radius("max_drift_ratio", max_drift_ratio)
    _check.dtype("target", target, z0.dtype)
    _check.device("target", target, "z0", z0)
    if target.shape not in ((), (len(z0),)):
        raise ValueError(f"target: expected shape [{len(z0)}] or [], got {list(target.shape)}")
    _check.dtype("plans", plans, torch.int64)
    _check.device("plans", plans, "z0", z0)
    _check.shape("plans", plans, len(z0))
    if len(seed) != 2 or not all(0 <= word < _WORD for word in seed):
        raise ValueError(f"seed: expected two words within [0, 2^32), got {tuple(seed)}")
    if not 0 <= first_step <= _WORD - max(n_steps, 1):
        raise ValueError(f"first_step: expected {n_steps} steps within [0, 2^32), got the first at {first_step}")
    refused = _dispatch.refusal(z0) or _refused(LANGEVIN, z0.device, return_weights.w1.shape[0])
    engine = _dispatch.choose(LANGEVIN, z0.device, refused)
    if engine != "reference":
        with torch.no_grad():
            return (_plan_langevin if engine == "cpp" else _plan_langevin_triton)(
                [w for w in prior_weights if w is not None], list(return_weights), z0, target.expand(len(z0)), plans,
                _with_starts(context), n_steps, step_size, max_drift_ratio, *seed, first_step, bf16,
            )  # fmt: skip
    return reference.plan_langevin(
        prior_weights, return_weights, z0, target, n_steps=n_steps, step_size=step_size, seed=seed, plans=plans,
        first_step=first_step, max_drift_ratio=max_drift_ratio, context=context,
    )  # fmt: skip


def _refused(op: str, device: torch.device, members: int) -> str | None:
    """Why the Triton engine takes no such return models, where it would run."""
    return _members_refusal(members) if _dispatch.is_for_triton(op, device) else None


# As choose(): a compiled graph asks once, when it is traced.
_refused._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _with_starts(context: Tensor | None) -> Tensor | None:
    return context[:, None] if context is not None and context.ndim == 2 else context


def _check_inputs(
    prior_weights: PriorWeights,
    return_weights: ReturnWeights,
    z0: Tensor,
    context: Tensor | None,
    n_steps: int,
    step_size: float,
) -> None:
    _check.dtype("z0", z0, torch.float32, torch.float64)
    _check.shape("z0", z0, "P", "n_z", "D")
    d = z0.shape[1] * z0.shape[2]
    if d == 0:
        raise ValueError(f"z0: expected plans of at least one value, got {list(z0.shape)}")
    _check_weights("prior_weights", prior_weights, z0)
    _check_weights("return_weights", return_weights, z0)
    if prior_weights.w1 is not None:
        _check.shape("prior_weights.w1", prior_weights.w1, "hidden", "inputs")
        hidden = prior_weights.w1.shape[0]
        for name, shape in (("w1", (hidden, d)), ("b1", (hidden,)), ("w2", (d, hidden)), ("b2", (d,))):
            _check.shape(f"prior_weights.{name}", getattr(prior_weights, name), *shape)
    _check.shape("return_weights.w1", return_weights.w1, "E", "hidden", "inputs")
    members, hidden1, n_inputs = return_weights.w1.shape
    _check.shape("return_weights.w2", return_weights.w2, members, "hidden", hidden1)
    hidden2 = return_weights.w2.shape[1]
    if 0 in (members, hidden1, hidden2):
        raise ValueError(
            "return_weights: expected at least one member and one unit in each layer, got "
            f"{list(return_weights.w1.shape)} and {list(return_weights.w2.shape)}"
        )
    for name, shape in (("b1", (hidden1,)), ("b2", (hidden2,)), ("w3", (2, hidden2)), ("b3", (2,))):
        _check.shape(f"return_weights.{name}", getattr(return_weights, name), members, *shape)
    if context is not None:
        _check.tensor("context", context)
    got = 0 if context is None or context.ndim == 0 else context.shape[-1]
    if got != n_inputs - d:
        raise ValueError(f"context: expected {n_inputs - d} features for this return model, got {got}")
    if context is not None:
        _check.dtype("context", context, z0.dtype)
        _check.device("context", context, "z0", z0)
        if context.ndim not in (2, 3) or context.shape[-1] == 0 or (context.ndim == 3 and context.shape[1] == 0):
            raise ValueError(f"context: expected shape [P, obs_dim] or [P, G, obs_dim], got {list(context.shape)}")
        if len(context) != len(z0):
            raise ValueError(f"context: expected {len(z0)} rows, one per plan, got {len(context)}")
    if n_steps < 0:
        raise ValueError(f"n_steps: expected at least 0, got {n_steps}")
    _check_number("step_size", step_size)


def _check_weights(name: str, weights: PriorWeights | ReturnWeights, z0: Tensor) -> None:
    missing = [field for field, w in weights._asdict().items() if w is None]
    if missing:
        if len(missing) < len(weights) or not isinstance(weights, PriorWeights):
            raise ValueError(f"{name}: expected all weights or none, got None as {', '.join(missing)}")
        return
    for field, w in weights._asdict().items():
        _check.dtype(f"{name}.{field}", w, z0.dtype)
        _check.device(f"{name}.{field}", w, "z0", z0)


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _check_radius(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value}")
