"""One step of AdamW on all parameters of a model at once, after clipping the norm of their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _arrays, _check, _dispatch, _threads

__all__ = ["adamw", "adamw_takes"]

OP = "adamw"
_dispatch.register(OP, "cpp")


def adamw_takes(values: Sequence[Tensor]) -> bool:
    """Whether the C++ engine moves these parameters."""
    return _dispatch.active(OP, values[0].device) == "cpp" and all(
        x.dtype == torch.float32 and x.is_contiguous() for x in values
    )


def _kept_arrays(tensors: Sequence[Sequence[Tensor]], kept: dict[str, Any]) -> list[list[Any]]:
    """As the engine takes them; the same ones as long as nothing was replaced, for they take longer to make."""
    places = [x.data_ptr() for one in tensors for x in one]
    if kept.get("places") != places:
        # With the tensors: memory that was given back may be another's next.
        kept["tensors"], kept["places"] = [list(one) for one in tensors], places
        kept["arrays"] = [[x.detach().numpy() for x in one] for one in tensors]
    arrays: list[list[Any]] = kept["arrays"]
    return arrays


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
    kept: dict[str, Any] | None = None,
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
        kept: empty at first, for the caller to give again with every step: what the engine makes of all arguments but
            the gradients.

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
    moved, *state = _kept_arrays((values, first, second, steps), {} if kept is None else kept)
    norm = _dispatch.cpp_engine()._adamw(
        moved, [_arrays.array(x) for x in gradients], *state, decays, learning_rate, *betas, eps, max_norm,
        _threads.count(),
    )  # fmt: skip
    # The engine writes where torch does not look; whoever keeps something made of a parameter asks for its version.
    torch.autograd.graph.increment_version(values)
    return torch.tensor(norm, dtype=torch.float32)
