"""A linear map of every token, with or without the layer norm before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _arrays, _check, _direct, _dispatch, _threads

__all__ = ["norm_linear"]

OP = "norm_linear"
_dispatch.register(OP, "cpp")


def _dtype(bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def _keeps_operand(x: Tensor, norm_w: Tensor | None, bf16: bool) -> bool:
    """Whether the product reads something else than x, which the backward wants to see again."""
    return norm_w is not None or x.dtype != _dtype(bf16)


def _outputs(x: Tensor, norm_w: Tensor | None, w: Tensor, bf16: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the product's operand and 1 / std; the last two empty where nothing keeps them."""
    n, n_in = x.shape
    saves = save and _keeps_operand(x, norm_w, bf16)
    return (
        x.new_empty((n, w.shape[0]), dtype=_dtype(bf16)),
        x.new_empty((n if saves else 0, _arrays.padded(n_in)), dtype=_dtype(bf16)),
        x.new_empty(n if saves and norm_w is not None else 0, dtype=torch.float32),
    )


def _matrix(norm_w: Tensor | None, w: Tensor) -> Any:
    return _arrays.array(_arrays.rows(w if norm_w is None else w * norm_w, torch.float32))


def _run(
    x: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, w: Tensor, b: Tensor, bf16: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(x, norm_w, w, bf16, save)
    y, operand, rstd = outputs
    bias = b if norm_b is None else b + (w * norm_b).sum(-1)
    _dispatch.cpp_engine()._norm_linear(
        _matrix(norm_w, w), bias.detach().contiguous().numpy(), norm_w is not None, bf16,
        _arrays.array(_arrays.rows(x, x.dtype)), None, _arrays.array(y),
        _arrays.array(operand) if save and _keeps_operand(x, norm_w, bf16) else None,
        rstd.numpy() if save and norm_w is not None else None, _threads.count(),
    )  # fmt: skip
    return outputs


_forward = torch.library.custom_op("gac_fast::norm_linear", mutates_args=())(_run)


@_forward.register_fake
def _(
    x: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, w: Tensor, b: Tensor, bf16: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, norm_w, w, bf16, save)


def _run_backward(
    dy: Tensor, x: Tensor, operand: Tensor, rstd: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, w: Tensor,
    bf16: bool, wants_dx: bool, wants_weights: bool,
) -> list[Tensor]:  # fmt: skip
    """Where wanted, the gradient of x; then, where wanted, those of norm_w and norm_b (with a norm), w and b."""
    dx = torch.empty(x.shape, dtype=x.dtype) if wants_dx else None
    db = torch.empty(w.shape[0]) if wants_weights else None
    dy = _arrays.rows(dy, _dtype(bf16))  # type: ignore[assignment]
    has_norm = norm_w is not None
    _dispatch.cpp_engine()._norm_linear_backward(
        _matrix(norm_w, w), has_norm, bf16, _arrays.array(dy), _arrays.array(operand) if has_norm else None,
        rstd.numpy() if has_norm else None, None, None, _arrays.array(dx), _arrays.array(db), _threads.count(),
    )  # fmt: skip
    grads = [dx] if dx is not None else []
    if db is None:
        return grads
    dw = torch.empty(w.shape)
    product_of = operand[:, : w.shape[1]] if len(operand) > 0 else _arrays.rows(x, x.dtype)
    dnorm = [] if norm_w is None else [torch.empty(w.shape[1]), torch.empty(w.shape[1])]
    # The product is the gradient of the matrix that the norm is folded into; the engine takes it apart.
    norm = [] if norm_w is None or norm_b is None else [t.contiguous() for t in (w, db, norm_w, norm_b, *dnorm)]
    _dispatch.cpp_engine()._weight_gradients(
        [(_arrays.array(dy), _arrays.array(product_of), dw.numpy(), [_arrays.array(t) for t in norm])],
        _threads.count(),
    )
    return [*grads, *dnorm, dw, db]


_backward = torch.library.custom_op("gac_fast::norm_linear_backward", mutates_args=())(_run_backward)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, operand: Tensor, rstd: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, w: Tensor,
    bf16: bool, wants_dx: bool, wants_weights: bool,
) -> list[Tensor]:  # fmt: skip
    grads = [x.new_empty(x.shape)] if wants_dx else []
    if wants_weights:
        if norm_w is not None:
            grads += [norm_w.new_empty(norm_w.shape), norm_w.new_empty(norm_w.shape)]
        grads += [w.new_empty(w.shape), w.new_empty(w.shape[0])]
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm_w, norm_b, w, _, ctx.bf16, _ = inputs
    _, operand, rstd = output
    ctx.mark_non_differentiable(operand, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, operand, rstd, norm_w, norm_b, w)


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, operand, rstd, norm_w, norm_b, w = ctx.saved_tensors
    wants_dx, wants_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
    run = _run_backward if _direct.unseen_backward(dy) else torch.ops.gac_fast.norm_linear_backward
    grads = run(dy, x, operand, rstd, norm_w, norm_b, w, ctx.bf16, wants_dx, wants_weights)
    dx = grads.pop(0) if wants_dx else None
    if not wants_weights:
        grads = [None] * 4
    elif norm_w is None:
        grads = [None, None, *grads]
    return (dx, *grads, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
_directly = _direct.function(_run, _save, _differentiate)


def norm_linear(
    x: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, w: Tensor, b: Tensor, bf16: bool = False
) -> Tensor:
    """``W norm(x) + b``, or ``W x + b`` without the weights of a norm.

    Equivalent to :func:`gac_fast.reference.norm_linear`.

    Args:
        x: [N, in], float32 (or float64, which the reference takes); bfloat16 too where ``bf16``.
        norm_w, norm_b: [in] of the layer norm, or both None.
        w, b: [out, in] and [out]; with those of the norm of one dtype, float32 or float64.
        bf16: round the operands of the product, and the result, to bfloat16.

    Returns:
        [N, out]; in bfloat16 where ``bf16``.

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("w", w, torch.float32, torch.float64)
    _check.dtype("x", x, w.dtype, *((torch.bfloat16,) if bf16 else ()))
    _check.device("x", x, "w", w)
    _check.shape("w", w, "out", "in")
    n_out, n_in = w.shape
    if n_out == 0 or n_in == 0:
        raise ValueError(f"w: expected sizes of at least 1, got {list(w.shape)}")
    _check.shape("x", x, "N", n_in)
    _vector("b", b, w, n_out)
    if (norm_w is None) != (norm_b is None):
        raise ValueError("norm_b: expected None where norm_w is None, and only there")
    if norm_w is not None and norm_b is not None:
        _vector("norm_w", norm_w, w, n_in)
        _vector("norm_b", norm_b, w, n_in)

    if _dispatch.choose(OP, w.device, _dispatch.refusal(w)) == "reference":
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return reference.norm_linear(x, norm_w, norm_b, w, b)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, norm_w, norm_b, w, b))
    if _direct.unseen(x):
        run = _directly if save else _run
    else:
        run = torch.ops.gac_fast.norm_linear
    y: Tensor = run(x, norm_w, norm_b, w, b, bf16, save)[0]
    return y


def _vector(name: str, x: Tensor, w: Tensor, size: int) -> None:
    _check.dtype(name, x, w.dtype)
    _check.device(name, x, "w", w)
    _check.shape(name, x, size)
