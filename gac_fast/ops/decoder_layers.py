"""All layers of the decoder from the first plan attention to the map behind the last, as one function of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gac_fast.ops import _check, _direct, _dispatch, block
from gac_fast.ops.block import while_fixed
from gac_fast.ops.window_attention import OP as WINDOW_ATTENTION
from gac_fast.ops.window_attention import run_backward as attend_backward
from gac_fast.ops.window_attention import run_qkv as attend
from gac_fast.ops.window_attention import window_attention_qkv
from gac_fast.reference import BlockWeights

__all__ = ["LayerStack", "Tokens", "decoder_layers", "layers_backward", "layers_forward", "runs_directly"]

# It has no engine of its own: it calls those of `block` and `window_attention` one after the other, and is counted as
# these. Between them autograd, the checks and the views of torch took longer than anything else on small batches.


class LayerStack(NamedTuple):
    """What all layers share.

    Attributes:
        weights: of the layers, each with the norm and map that follow it; those of the last lead to the actions.
        n_heads: heads H of the window attentions.
        window: in tokens.
        rope_base: base of the rotary frequencies.
    """

    weights: tuple[BlockWeights, ...]
    n_heads: int
    window: int
    rope_base: float


class Tokens(NamedTuple):
    """Where the tokens of a packed batch lie, C to a step."""

    cu_seqlens: Tensor  # int [B + 1], in tokens
    positions: Tensor  # int [N]
    cu_steps: Tensor  # int [B + 1], in steps
    per_step: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, positions: Tensor, per_step: int) -> Tokens:
        """From offsets and positions in steps."""
        if per_step == 1:
            return cls(cu_seqlens, positions, cu_seqlens, 1)
        return cls(cu_seqlens * per_step, positions.repeat_interleave(per_step), cu_seqlens, per_step)


class _Kept(NamedTuple):
    """Of one layer, for its backward."""

    packs: Any
    saved: list[Tensor]  # the stream behind the layer first
    attended: Tensor | None
    attention: tuple[Tensor, Tensor] | None  # queries, keys and values of the attention behind, and its softmax


def runs_directly(*tensors: Tensor) -> bool:
    """Whether tensors take the C++ engine, and nobody looks on who wants to see each op."""
    x = tensors[0]
    return (
        x.dtype == torch.float32
        and all(map(_direct.unseen, tensors))
        and all(_dispatch.active(op, x.device) == "cpp" for op in (block.OP, WINDOW_ATTENTION))
    )


def layers_forward(
    x: Tensor,
    plan: Tensor,
    tokens: Tokens,
    stack: LayerStack,
    bf16: bool,
    save: bool,
    calls: list[block.Call] | None = None,
) -> tuple[Tensor, list[_Kept]]:
    """The engine's forward, outside of autograd: the last map's output, and what :func:`layers_backward` reads.

    Args:
        calls: those of the engine are added to it, for whoever runs them again on other contents of the same memory.
    """
    kept: list[_Kept] = []
    attended, n_layers = None, len(stack.weights)
    n, dim = x.shape
    cu_tokens, cu_steps = tokens.cu_seqlens.to(torch.int64), tokens.cu_steps.to(torch.int64)
    y = x
    for i, weights in enumerate(stack.weights):
        is_last = i + 1 == n_layers
        given = [w for w in weights if w is not None]
        packs = block.packed(given, bf16, save)
        _dispatch.count(block.OP, "cpp")
        x, y, *saved = block.run(
            packs, x, attended, plan[i, 0], plan[i, 1], cu_steps if is_last else cu_tokens, given, bf16, save,
            tokens.per_step if is_last else 1, calls,
        )  # fmt: skip
        before, attention = attended, None
        if not is_last:
            _dispatch.count(WINDOW_ATTENTION, "cpp")
            qkv = y.view(n, 3, stack.n_heads, dim // stack.n_heads)
            out, softmax = attend(qkv, cu_tokens, stack.window, tokens.positions, stack.rope_base, calls)
            attended, attention = out.view(n, dim), (qkv, softmax)
        if save:
            kept.append(_Kept(packs, [x, *saved], before, attention))
    return y, kept


def layers_backward(
    dy: Tensor,
    kept: Sequence[_Kept],
    plan: Tensor,
    tokens: Tokens,
    stack: LayerStack,
    bf16: bool,
    wants_dx: bool,
    wants_weights: bool,
    calls: list[block.Call] | None = None,
) -> tuple[Tensor, Tensor | None, list[list[Tensor]]]:
    """Gradients of the plan [L, 2, B, n_z, D], of x where it or weights are wanted, and of each layer's weights.

    Args:
        calls: as in :func:`layers_forward`, for gradients of weights none.
    """
    dplan = torch.empty((*plan.shape[:4], plan.shape[4] * plan.shape[5]))
    dweights: list[list[Tensor]] = []
    dx: Tensor | None = None
    cu_tokens, cu_steps = tokens.cu_seqlens.to(torch.int64), tokens.cu_steps.to(torch.int64)
    for i in reversed(range(len(kept))):
        one, is_last = kept[i], i + 1 == len(kept)
        if one.attention is not None:
            qkv, softmax = one.attention
            # The gradient of what this attention read came from the layer behind it.
            q, k, v = qkv.unbind(1)
            dy = attend_backward(
                dy.view(q.shape), q, k, v, cu_tokens, stack.window, tokens.positions, stack.rope_base, softmax, calls
            ).view(len(qkv), -1)
        given = [w for w in stack.weights[i] if w is not None]
        rest = block.run_backward(
            one.packs, (dplan[i, 0], dplan[i, 1]), dx, dy, one.saved, one.attended, plan[i, 0], plan[i, 1],
            cu_steps if is_last else cu_tokens, given, bf16, wants_dx or i > 0, wants_weights,
            tokens.per_step if is_last else 1, calls,
        )  # fmt: skip
        if rest:
            dx = rest.pop(0)
        if one.attended is not None:
            dy = rest.pop(0)
        dweights.insert(0, rest)
    return dplan, dx, dweights


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: Tensor, tokens: Tokens, stack: LayerStack, bf16: bool, *weights: Tensor
    ) -> Tensor:
        y, ctx.kept = layers_forward(x, plan, tokens, stack, bf16, True)
        ctx.tokens, ctx.stack, ctx.bf16 = tokens, stack, bf16
        # Where one of them is written to before the backward, this says so.
        ctx.save_for_backward(plan, *weights)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        plan = ctx.saved_tensors[0]
        wants_dx, wants_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        dplan, dx, dweights = layers_backward(
            dy, ctx.kept, plan, ctx.tokens, ctx.stack, ctx.bf16, wants_dx, wants_weights
        )
        flat = [dw for layer in dweights for dw in layer] if wants_weights else [None] * len(ctx.needs_input_grad[5:])
        return dx if wants_dx else None, dplan.view(plan.shape), None, None, None, *flat


def decoder_layers(
    x: Tensor,
    plan: Tensor | Sequence[tuple[Tensor, Tensor]],
    cu_seqlens: Tensor,
    positions: Tensor,
    stack: LayerStack,
    bf16: bool = False,
    per_step: int = 1,
) -> Tensor:
    """The decoder's layers behind the first window attention.

    Layer i is :func:`gac_fast.ops.decoder_block`; between two of them
    :func:`gac_fast.ops.window_attention_qkv` reads what the first one's map gives.

    Args:
        x: [C * n, D], the stream behind the first window attention, C = ``per_step`` tokens to a step.
        plan: keys and values of each layer, [L, 2, B, n_z, H, d] or L pairs of [B, n_z, H, d]. Only the former go the
            short way.
        cu_seqlens: int [B + 1], offsets of the packed trajectories in steps.
        positions: int [n], time step within its trajectory.
        stack: L layers. The last one takes the first token of every step alone.
        bf16: as in :func:`gac_fast.ops.decoder_block`.

    Returns:
        [n, out] of the last map; in bfloat16 where ``bf16``.

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    tokens = Tokens.of(cu_seqlens, positions, per_step)
    if isinstance(plan, Tensor) and runs_directly(x, plan):
        given = while_fixed(stack, lambda: _checked(stack, x))
        _check_inputs(x, plan, tokens, stack)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, plan, *given)):
            y: Tensor = _Layers.apply(x, plan, tokens, stack, bf16, *given)
            return y
        return layers_forward(x, plan, tokens, stack, bf16, False)[0]
    attended, y = None, x
    for i, weights in enumerate(stack.weights):
        # The means are read at the state tokens: in the last layer the others are done.
        is_last = i + 1 == len(stack.weights)
        x, y = block.decoder_block(
            x, attended, plan[i][0], plan[i][1], tokens.cu_steps if is_last else tokens.cu_seqlens, weights, bf16,
            per_step if is_last else 1,
        )  # fmt: skip
        if not is_last:
            n, dim = y.shape[0], y.shape[1] // 3
            attended = window_attention_qkv(
                y.view(n, 3, stack.n_heads, dim // stack.n_heads), tokens.cu_seqlens, stack.window, tokens.positions,
                stack.rope_base,
            ).reshape(n, dim)  # fmt: skip
    return y


def _checked(stack: LayerStack, x: Tensor) -> list[Tensor]:
    return [w for i, weights in enumerate(stack.weights) for w in block.checked_weights(weights, x, i > 0)]


def _check_inputs(x: Tensor, plan: Tensor, tokens: Tokens, stack: LayerStack) -> None:
    """What the layers' own ops ask of all but the weights."""
    _check.dtype("x", x, torch.float32)
    _check.shape("x", x, "N", "D")
    n, dim = x.shape
    if tokens.per_step < 1 or n % tokens.per_step != 0:
        raise ValueError(f"per_step: expected a divisor of the {n} rows of x, got {tokens.per_step}")
    _check.dtype("plan", plan, torch.float32, torch.bfloat16)
    _check.shape("plan", plan, len(stack.weights), 2, tokens.cu_steps.shape[0] - 1, "n_z", "H", "d")
    if plan.shape[3] < 1:
        raise ValueError("plan: expected at least 1 plan vector per trajectory, got 0")
    if plan.shape[4] * plan.shape[5] != dim:
        raise ValueError(f"plan: expected H * d = {dim}, the width of x, got {plan.shape[4]} * {plan.shape[5]}")
    _check.device("cu_seqlens", tokens.cu_steps, "x", x)
    _check.cu_seqlens(tokens.cu_steps, n // tokens.per_step)
    _check.dtype("positions", tokens.positions, *_check.INTEGERS)
    _check.shape("positions", tokens.positions, n)
