"""One step of AdamW on all parameters of a model at once, after clipping the norm of their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _check, _dispatch, _threads

__all__ = ["adamw", "adamw_takes"]

OP = "adamw"
_dispatch.register(OP, "cpp")


def adamw_takes(values: Sequence[Tensor]) -> bool:
    """Whether the C++ engine moves these parameters."""
    return _dispatch.active(OP, values[0].device) == "cpp" and all(
        x.dtype == torch.float32 and x.is_contiguous() for x in values
    )


@torch.no_grad()
def adamw(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Sequence[Tensor],
    decays: Sequence[float],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    max_norm: float = math.inf,
) -> Tensor:
    """Clip the norm of all gradients together, then move the parameters, all in place.

    Equivalent to :func:`gac_fast.reference.adamw`, and to ``torch.nn.utils.clip_grad_norm_`` followed by a step of
    ``torch.optim.AdamW``. The C++ engine gives the same bits on any number of threads, and writes gradients only where
    their norm exceeds ``max_norm``. It is called once per update with all that there is, so no compiler sees it.

    Args:
        values, gradients, first, second: float32, one shape and no gaps for each parameter: it, its gradient, its
            moments.
        steps: float32 [] of each parameter, steps taken so far.
        decays: weight decay of each parameter.
        learning_rate, betas, eps: as in ``torch.optim.AdamW``.
        max_norm: positive.

    Returns:
        float32 [], the norm before clipping.

    Raises:
        ValueError: an argument of another dtype, device, shape or number, naming it.
        BackendError: a forced backend cannot run.
    """
    lists = {"gradients": gradients, "first": first, "second": second, "steps": steps, "decays": decays}
    for name, one in lists.items():
        if len(one) != len(values):
            raise ValueError(f"{name}: expected {len(values)}, one per parameter, got {len(one)}")
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number, got {max_norm}")
    device = values[0].device if values else torch.device("cpu")
    if _dispatch.choose(OP, device) == "reference":
        for i, value in enumerate(values):
            for name in ("gradients", "first", "second"):
                _check.shape(f"{name}[{i}]", lists[name][i], *value.shape)  # type: ignore[arg-type]
        return reference.adamw(
            values, gradients, first, second, steps, decays, learning_rate=learning_rate, betas=betas, eps=eps,
            max_norm=max_norm,
        )  # fmt: skip
    # The engine checks the rest: in Python that would take as long as the step.
    arrays = [[x.detach().numpy() for x in one] for one in (values, gradients, first, second, steps)]
    norm = _dispatch.cpp_engine()._adamw(*arrays, decays, learning_rate, *betas, eps, max_norm, _threads.count())
    # The engine writes where torch does not look; whoever keeps something made of a parameter asks for its version.
    torch.autograd.graph.increment_version([x for one in (values, first, second, steps) for x in one])
    return torch.tensor(norm, dtype=torch.float32)
