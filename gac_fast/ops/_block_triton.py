"""The Triton engine of the block, as registered ops: what :mod:`gac_fast.ops.block` runs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac_fast.reference import BlockWeights

__all__ = ["refusal", "run"]

# What the kernels hold in registers.
_MOST_DIM = 256
_MOST_PLAN_VECTORS = 16


def refusal(dim: int, n_z: int) -> str | None:
    """Why the kernels do not take these sizes; None where they do."""
    if dim > _MOST_DIM:
        return f"the Triton engine takes up to {_MOST_DIM} columns, got {dim}"
    if n_z > _MOST_PLAN_VECTORS:
        return f"the Triton engine takes up to {_MOST_PLAN_VECTORS} plan vectors, got {n_z}"
    return None


def _all(weights: Sequence[Tensor]) -> list[Tensor | None]:
    missing = len(BlockWeights._fields) - len(weights)
    return [*[None] * missing, *(w.contiguous() for w in weights)]


def _rows(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Neighbouring elements along the last axis."""
    if x is None:
        return None
    x = x if dtype is None else x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("gac_fast::block_triton", mutates_args=())
def _forward(
    x: Tensor,
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    bf16: bool,
    save: bool,
    wants_dx: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_out and y, then what the backward reads."""
    from gac_fast.kernels import block as kernel

    dtype = torch.bfloat16 if bf16 else torch.float32
    x_out, y, saved = kernel.forward(
        _rows(x),
        _rows(attended, dtype),
        _rows(plan_k),
        _rows(plan_v),
        cu_seqlens.contiguous(),
        _all(weights),
        dtype,
        save,
    )
    return x_out, y, *saved


@_forward.register_fake
def _(
    x: Tensor, attended: Tensor | None, plan_k: Tensor, plan_v: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor],
    bf16: bool, save: bool, wants_dx: bool, wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from gac_fast.kernels import block as kernel

    sizes = kernel.sizes_of(plan_k, _all(weights))
    x_out, y, saved = kernel.empty_outputs(x, plan_k, sizes, torch.bfloat16 if bf16 else torch.float32, save)
    return x_out, y, *saved


@torch.library.custom_op("gac_fast::block_triton_backward", mutates_args=())
def _backward(
    dx_out: Tensor | None,
    dy: Tensor | None,
    saved: Sequence[Tensor],
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    wants_dx: bool,
    wants_weights: bool,
) -> list[Tensor]:
    """Plan keys and values; then, where wanted, x and attended; then, where wanted, the weights."""
    from gac_fast.kernels import block as kernel

    dtype = saved[0].dtype
    # Autocast is off in the backward of autograd, but may be on around a direct call.
    with torch.autocast(plan_k.device.type, enabled=False):
        found = kernel.backward(
            _rows(dx_out, torch.float32), _rows(dy, dtype), kernel.Saved(*saved), _rows(attended, dtype),
            _rows(plan_k), _rows(plan_v), cu_seqlens.contiguous(), _all(weights), wants_dx, wants_weights,
        )  # fmt: skip
    stream = [x for x in (found.dx, found.dattended) if x is not None]
    return [found.dplan_k, found.dplan_v, *stream, *found.weights]


@_backward.register_fake
def _(
    dx_out: Tensor | None, dy: Tensor | None, saved: Sequence[Tensor], attended: Tensor | None, plan_k: Tensor,
    plan_v: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor], wants_dx: bool, wants_weights: bool,
) -> list[Tensor]:  # fmt: skip
    normed, rstd = saved[:2]
    n, _, dim = normed.shape
    grads = [rstd.new_empty(plan_k.shape), rstd.new_empty(plan_k.shape)]
    if wants_dx or wants_weights:
        grads.append(rstd.new_empty((n, dim)))
        if len(weights) == len(BlockWeights._fields):
            grads.append(normed.new_empty((n, dim)))
    if wants_weights:
        grads += [w.new_empty(w.shape) for w in weights]
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, attended, plan_k, plan_v, cu_seqlens, weights, _, _, ctx.wants_dx, ctx.wants_weights = inputs
    ctx.has_attended = attended is not None
    ctx.set_materialize_grads(False)
    kept = attended if ctx.wants_weights else None
    ctx.n_saved = len(output) - 2
    ctx.save_for_backward(*output[2:], kept, plan_k, plan_v, cu_seqlens, *weights)


def _differentiate(ctx: Any, dx_out: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    saved, rest = list(ctx.saved_tensors[: ctx.n_saved]), ctx.saved_tensors[ctx.n_saved :]
    (attended, plan_k, plan_v, cu_seqlens), weights = rest[:4], list(rest[4:])
    if dx_out is None and dy is None:
        return (None,) * 5 + ([None] * len(weights), *(None,) * 4)
    dplan_k, dplan_v, *grads = torch.ops.gac_fast.block_triton_backward(
        dx_out, dy, saved, attended, plan_k, plan_v, cu_seqlens, weights, ctx.wants_dx, ctx.wants_weights
    )
    dx = dattended = None
    if ctx.wants_dx or ctx.wants_weights:
        dx = grads.pop(0)
        if ctx.has_attended:
            dattended = grads.pop(0)
    dweights = grads if ctx.wants_weights else [None] * len(weights)
    return dx, dattended, dplan_k.to(plan_k.dtype), dplan_v.to(plan_v.dtype), None, dweights, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def run(
    x: Tensor, attended: Tensor | None, plan_k: Tensor, plan_v: Tensor, cu_seqlens: Tensor, weights: list[Tensor],
    bf16: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The block on checked arguments; ``weights`` without those that are None."""
    grad = torch.is_grad_enabled()
    wants_weights = grad and any(weight.requires_grad for weight in weights)
    wants_dx = grad and (x.requires_grad or (attended is not None and attended.requires_grad))
    wants_plan = grad and (plan_k.requires_grad or plan_v.requires_grad)
    x_out, y, *_ = torch.ops.gac_fast.block_triton(
        x, attended, plan_k, plan_v, cu_seqlens, weights, bf16, wants_weights or wants_dx or wants_plan, wants_dx,
        wants_weights,
    )  # fmt: skip
    return x_out, y
