"""One token of every environment through the whole decoder, on ring-cached keys and values."""

from __future__ import annotations

from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _dispatch
from gac_fast.reference import DecoderWeights

__all__ = ["decode_token"]

OP = "decode_step"
_dispatch.register(OP)


def decode_token(
    weights: DecoderWeights,
    x: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    plan_k: Tensor,
    plan_v: Tensor,
    n_seen: Tensor,
    positions: Tensor,
    active: Tensor | None = None,
) -> Tensor:
    """Mean action [P, act_dim] read at one token per environment; see :func:`gac_fast.reference.decode_token`.

    The per-step path of the actor: it checks nothing and mutates the rings.

    Raises:
        BackendError: a forced backend cannot run.
    """
    _dispatch.choose(OP, x.device)
    return reference.decode_token(weights, x, ring_k, ring_v, plan_k, plan_v, n_seen, positions, active)
