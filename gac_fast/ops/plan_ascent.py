"""All steps of gradient ascent for a batch of plans."""

from __future__ import annotations

import math

from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _dispatch
from gac_fast.reference import PriorWeights, ReturnWeights

__all__ = ["plan_ascent"]

OP = "plan_ascent"
_dispatch.register(OP)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise the lower bound of the return inside a trust region; see :func:`gac_fast.reference.plan_ascent`.

    Returns:
        seeds [P, n_z, D], mean [P] and std [P] of the standardised return.

    Raises:
        ValueError: ``z0`` is not [P, n_z, D], or ``context`` is missing, unasked for or of another number of rows.
        BackendError: a forced backend cannot run.
    """
    if z0.ndim != 3:
        raise ValueError(f"z0: expected shape [P, n_z, D], got {list(z0.shape)}")
    n_inputs = return_weights.w1.shape[-1] - z0[0].numel() if len(z0) else None
    got = 0 if context is None else context.shape[-1]
    if n_inputs is not None and got != n_inputs:
        raise ValueError(f"context: expected {n_inputs} features for this return model, got {got}")
    if context is not None and len(context) != len(z0):
        raise ValueError(f"context: expected {len(z0)} rows, one per plan, got {len(context)}")
    _dispatch.choose(OP, z0.device)
    return reference.plan_ascent(
        prior_weights, return_weights, z0, n_steps=n_steps, step_size=step_size, kappa=kappa,
        prior_weight=prior_weight, radius=radius, max_norm=max_norm, context=context,
    )  # fmt: skip
