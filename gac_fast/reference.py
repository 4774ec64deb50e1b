"""Every accelerated op in plain PyTorch: the oracle of the tests, the baseline of the benchmarks, the fallback.

Shapes: N tokens packed over B trajectories (``cu_seqlens`` int [B + 1] in tokens), H heads of width d, D = H * d,
``n_z`` plan vectors, P plans or environments, E members of the return ensemble.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "BlockWeights",
    "DecoderWeights",
    "LayerWeights",
    "PackedBatch",
    "PlanMap",
    "PriorWeights",
    "ReturnWeights",
    "StepWeights",
    "action_errors",
    "adamw",
    "decode_step",
    "decode_token",
    "decoder_block",
    "draw_trajectories",
    "drop_steps",
    "mlp_residual",
    "norm_linear",
    "pack_batch",
    "philox4x32",
    "philox_normal",
    "plan_ascent",
    "plan_attention",
    "plan_langevin",
    "plan_norm",
    "prior",
    "return_losses",
    "return_model",
    "return_moments",
    "rotary",
    "seed_plans",
    "window_attention",
]

NORM_EPS = 1e-5

# ---------------------------------------------------------------------------------------------------------------------
# Attention over packed trajectories


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate the pairs (i, i + d/2) of ``x`` [N, H, d] by ``positions`` [N] * base^(-2i/d)."""
    return _rotate(x, *_rotary_table(positions, x.shape[-1], base, x.dtype))


def _rotary_table(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = width // 2
    # float64: at t = 10,000 a float32 angle is off by 1e-3, and every engine must agree to 1e-5.
    frequency = base ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angle = positions.to(torch.float64)[:, None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class _Blocks(NamedTuple):
    """A packed batch cut into blocks of equal size that never cross a trajectory; the last of each is padded."""

    sequence: Tensor  # [n_blocks] trajectory of each block
    is_first: Tensor  # [n_blocks] bool, first block of its trajectory
    token: Tensor  # [n_blocks * size] packed token of each slot (0 where padded)
    slot: Tensor  # [N] slot of each packed token


def _blocks(cu_seqlens: Tensor, n_tokens: int, size: int) -> _Blocks:
    device = cu_seqlens.device
    cu = cu_seqlens.to(torch.int64)
    n_sequences = cu.numel() - 1
    ends = ((cu.diff() + size - 1) // size).cumsum(0)
    starts = F.pad(ends, (1, 0))[:-1]
    # An upper bound known without reading the device: at most one padded block per trajectory.
    n_blocks = n_tokens // size + n_sequences
    block = torch.arange(n_blocks, device=device)
    sequence = torch.searchsorted(ends, block, right=True).clamp_(max=n_sequences - 1)
    first_token = cu[sequence] + (block - starts[sequence]) * size
    token = first_token[:, None] + torch.arange(size, device=device)
    token = torch.where(token < cu[sequence + 1, None], token, 0).clamp_(max=n_tokens - 1)
    position = torch.arange(n_tokens, device=device)
    owner = torch.searchsorted(cu[1:].contiguous(), position, right=True)
    slot = starts[owner] * size + position - cu[owner]
    return _Blocks(sequence, block == starts[sequence], token.view(-1), slot)


class _Permute(torch.autograd.Function):
    """``x[forward]`` whose gradient is ``grad[backward]``: gathers both ways, hence fast and deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        ctx.save_for_backward(backward)
        return x.index_select(0, forward)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.contiguous().index_select(0, ctx.saved_tensors[0]), None, None


class _Unpermute(torch.autograd.Function):
    """The inverse of :class:`_Permute`; slots that hold no token receive zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.n_slots = x.shape[0]
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.n_slots, *grad.shape[1:])
        return out.index_copy_(0, ctx.saved_tensors[0], grad.contiguous()), None


def _may_read(x: Tensor) -> bool:
    """Whether values can be read where the op is called: no device is waited for, no trace depends on data."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


SMALLEST_BLOCK = 16  # queries per block, however narrow the window: tiny products cost more than masked work


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window: int,
    positions: Tensor | None = None,
    rope_base: float = 10000.0,
) -> Tensor:
    """Causal attention in which a token sees itself and the ``window - 1`` tokens before it in its own trajectory.

    Args:
        q, k, v: [N, H, d].
        cu_seqlens: int [B + 1], token offsets of the trajectories.
        window: in tokens.
        positions: int [N] for the rotation of q and k; None leaves them as they are.
        rope_base: base of the rotary frequencies.

    Returns:
        [N, H, d]; softmax scale 1/sqrt(d).
    """
    n, heads, width = q.shape
    if n == 0:
        return q + k + v
    if positions is not None:
        cos, sin = _rotary_table(positions, width, rope_base, q.dtype)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    size = min(max(window, SMALLEST_BLOCK), n)
    if _may_read(q):
        size = min(size, int(cu_seqlens.diff().max()))
    blocks = _blocks(cu_seqlens, n, size)

    def cut(x: Tensor) -> Tensor:  # [N, H, d] -> [n_blocks, H, size, d]
        return _Permute.apply(x, blocks.token, blocks.slot).view(-1, size, heads, width).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat((x.roll(1, 0), x), dim=2)

    i = torch.arange(size, device=q.device)[:, None]
    j = torch.arange(-size, size, device=q.device)[None, :]
    band = (j <= i) & (j > i - window)
    visible = band & ((j >= 0) | ~blocks.is_first[:, None, None])
    bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -math.inf)
    score = cut(q * width**-0.5) @ with_previous(cut(k)).transpose(-1, -2) + bias[:, None]
    out = torch.softmax(score, dim=-1) @ with_previous(cut(v))
    return _Unpermute.apply(out.transpose(1, 2).reshape(-1, heads, width), blocks.slot)


PLAN_BLOCK = 64  # tokens that share one copy of their trajectory's plan keys


def plan_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Attention of every token to the plan vectors of its own trajectory.

    Args:
        q: [N, H, d].
        k, v: [B, n_z, H, d].
        cu_seqlens: int [B + 1], token offsets of the trajectories.

    Returns:
        [N, H, d]; softmax scale 1/sqrt(d).
    """
    n, heads, width = q.shape
    if n == 0:
        return q.clone()
    blocks = _blocks(cu_seqlens, n, PLAN_BLOCK)
    b_q = _Permute.apply(q * width**-0.5, blocks.token, blocks.slot).view(-1, PLAN_BLOCK, heads, width).transpose(1, 2)
    b_k = k[blocks.sequence].permute(0, 2, 3, 1)  # [n_blocks, H, d, n_z]
    b_v = v[blocks.sequence].transpose(1, 2)  # [n_blocks, H, n_z, d]
    out = torch.softmax(b_q @ b_k, dim=-1) @ b_v
    return _Unpermute.apply(out.transpose(1, 2).reshape(-1, heads, width), blocks.slot)


# ---------------------------------------------------------------------------------------------------------------------
# Block parts


def norm_linear(x: Tensor, norm_w: Tensor | None, norm_b: Tensor | None, w: Tensor, b: Tensor | None) -> Tensor:
    """Layer norm over the last axis (none without its weights), then a linear map: [..., D] -> [..., out]."""
    if norm_w is not None:
        x = F.layer_norm(x, (x.shape[-1],), norm_w, norm_b, NORM_EPS)
    return F.linear(x, w, b)


def mlp_residual(
    x: Tensor, norm_w: Tensor, norm_b: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor
) -> Tensor:
    """``x + W_out silu(W_in norm(x))``: [..., D] -> [..., D]."""
    return x + F.linear(F.silu(norm_linear(x, norm_w, norm_b, w_in, b_in)), w_out, b_out)


class BlockWeights(NamedTuple):
    """What a decoder layer applies to each token alone, and the norm and map that follow it; [out, in] matrices."""

    w_o: Tensor | None  # None for the first layer, whose stream holds the window attention already
    b_o: Tensor | None
    norm2_w: Tensor
    norm2_b: Tensor
    w_plan_q: Tensor
    b_plan_q: Tensor
    w_plan_o: Tensor
    b_plan_o: Tensor
    norm3_w: Tensor
    norm3_b: Tensor
    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    norm_w: Tensor
    norm_b: Tensor
    w_next: Tensor
    b_next: Tensor


def decoder_block(
    x: Tensor,
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: BlockWeights,
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """A decoder layer from its window attention to the map that reads it: plan attention, MLP, and what comes next.

    ``x1 = x + W_o attended``, ``x2 = x1 + W_plan_o plan_attention(W_plan_q norm2(x1))``,
    ``x_out = x2 + W_out silu(W_in norm3(x2))``, ``y = W_next norm(x_out)``, every map with its bias.

    Args:
        x: [N, D], the residual stream.
        attended: [N, D], what window attention read; None where ``weights.w_o`` is.
        plan_k, plan_v: [B, n_z, H, d].
        cu_seqlens: int [B + 1], token offsets of the trajectories.
        bf16: round the operands of products, and y, to bfloat16.

    Returns:
        x_out [N, D] and y [N, n_next].
    """
    w = weights
    n, heads, width = x.shape[0], plan_k.shape[2], plan_k.shape[3]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        if attended is not None and w.w_o is not None:
            x = x + F.linear(attended, w.w_o, w.b_o)
        q = norm_linear(x, w.norm2_w, w.norm2_b, w.w_plan_q, w.b_plan_q).view(n, heads, width)
        read = plan_attention(q, plan_k.to(q.dtype), plan_v.to(q.dtype), cu_seqlens)
        x = x + F.linear(read.reshape(n, heads * width), w.w_plan_o, w.b_plan_o)
        x = mlp_residual(x, w.norm3_w, w.norm3_b, w.w_in, w.b_in, w.w_out, w.b_out)
        return x, norm_linear(x, w.norm_w, w.norm_b, w.w_next, w.b_next)


# ---------------------------------------------------------------------------------------------------------------------
# One token of every environment through the whole decoder


class LayerWeights(NamedTuple):
    """One decoder layer; [out, in] matrices."""

    norm1_w: Tensor
    norm1_b: Tensor
    w_qkv: Tensor
    b_qkv: Tensor
    w_o: Tensor
    b_o: Tensor
    norm2_w: Tensor
    norm2_b: Tensor
    w_plan_q: Tensor
    b_plan_q: Tensor
    w_plan_o: Tensor
    b_plan_o: Tensor
    norm3_w: Tensor
    norm3_b: Tensor
    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor


class DecoderWeights(NamedTuple):
    """All that a token needs of the decoder once it is embedded."""

    layers: tuple[LayerWeights, ...]
    norm_w: Tensor
    norm_b: Tensor
    w_head: Tensor
    b_head: Tensor
    n_heads: int
    rope_base: float


class StepWeights(NamedTuple):
    """All that one environment step needs of the decoder; without action tokens (C = 1) their embedding is None."""

    embed_state_w: Tensor
    embed_state_b: Tensor
    embed_action_w: Tensor | None
    embed_action_b: Tensor | None
    decoder: DecoderWeights


def _read_rings(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query per row and head, q [P, H, d], to W keys, k and v [P, W, H, d]: [P, H, d]."""
    # On the CPU it reads keys where they lie; on a GPU a fused kernel's rounding is not to become the oracle's.
    plainly = contextlib.nullcontext() if q.device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)
    with plainly:
        out = F.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out[:, :, 0]


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
    read: bool = True,
) -> Tensor | None:
    """Feed one token per environment through all layers, keeping its keys and values in the rings.

    Args:
        x: [P, D] embedded tokens.
        ring_k, ring_v: [L, P, W, H, d], **mutated**: token i of an environment lives in slot i % W. They may be of a
            narrower float type than ``x``. What lies in slots not yet filled counts for nothing, but must be finite.
        plan_k, plan_v: [L, P, n_z, H, d].
        n_seen: int64 [P], tokens each environment has been fed before this one.
        positions: int64 [P], time step of the token.
        active: bool [P]; rows that are False leave their ring as it was (their output means nothing).
        read: whether the mean action is wanted; without it the last layer has nothing to do but to keep its keys.

    Returns:
        [P, act_dim], the tanh mean read at this token; None where it is not wanted.
    """
    n_rows, dim = x.shape
    heads, width = weights.n_heads, dim // weights.n_heads
    window = ring_k.shape[2]
    rows = torch.arange(n_rows, device=x.device)
    slot = n_seen % window
    valid = torch.arange(window, device=x.device)[None, :] <= n_seen[:, None]  # [P, W]
    bias = torch.zeros(valid.shape, dtype=x.dtype, device=x.device).masked_fill_(~valid, -math.inf)[:, None, None]
    cos, sin = _rotary_table(positions, width, weights.rope_base, x.dtype)
    for i, w in enumerate(weights.layers):
        q, k, v = norm_linear(x, w.norm1_w, w.norm1_b, w.w_qkv, w.b_qkv).view(n_rows, 3, heads, width).unbind(1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if active is not None:
            k = torch.where(active[:, None, None], k, ring_k[i, rows, slot])
            v = torch.where(active[:, None, None], v, ring_v[i, rows, slot])
        ring_k[i, rows, slot] = k.to(ring_k.dtype)
        ring_v[i, rows, slot] = v.to(ring_v.dtype)
        if not read and i + 1 == len(weights.layers):
            return None
        out = _read_rings(q, ring_k[i].to(x.dtype), ring_v[i].to(x.dtype), bias)
        x = x + F.linear(out.reshape(n_rows, dim), w.w_o, w.b_o)
        q = norm_linear(x, w.norm2_w, w.norm2_b, w.w_plan_q, w.b_plan_q).view(n_rows, heads, width)
        out = _read_rings(q, plan_k[i], plan_v[i], None)
        x = x + F.linear(out.reshape(n_rows, dim), w.w_plan_o, w.b_plan_o)
        x = mlp_residual(x, w.norm3_w, w.norm3_b, w.w_in, w.b_in, w.w_out, w.b_out)
    return torch.tanh(norm_linear(x, weights.norm_w, weights.norm_b, weights.w_head, weights.b_head))


def decode_step(
    weights: StepWeights,
    observations: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    plan_k: Tensor,
    plan_v: Tensor,
    steps: Tensor,
    last_action: Tensor,
) -> Tensor:
    """Advance every environment by one time step: feed a_{t-1} (with C = 2, from the second step on), then s_t.

    Args:
        observations: [P, obs_dim] normalised.
        ring_k, ring_v, plan_k, plan_v: as in :func:`decode_token`; the rings are **mutated**.
        steps: int64 [P], time steps each environment has been fed; **mutated**, one more afterwards.
        last_action: [P, act_dim] normalised, what each environment did last; **mutated**, the mean afterwards.

    Returns:
        [P, act_dim], the tanh mean.
    """

    decoder, places = weights.decoder, (ring_k, ring_v, plan_k, plan_v)
    c = 1 if weights.embed_action_w is None else 2
    if weights.embed_action_w is not None:
        token = F.linear(last_action, weights.embed_action_w, weights.embed_action_b)
        n_seen, positions = (2 * steps - 1).clamp_min(0), (steps - 1).clamp_min(0)
        decode_token(decoder, token, *places, n_seen, positions, steps > 0, read=False)
    token = F.linear(observations, weights.embed_state_w, weights.embed_state_b)
    mean = decode_token(decoder, token, *places, c * steps, steps)
    assert mean is not None
    last_action.copy_(mean)
    steps += 1
    return mean


# ---------------------------------------------------------------------------------------------------------------------
# Plans: prior map, return model, ascent


class PriorWeights(NamedTuple):
    """U(z0) = z0 + W2 silu(W1 z0 + b1) + b2 on the flattened seed; all None for the identity."""

    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None


class ReturnWeights(NamedTuple):
    """E return models with two hidden layers; w_i [E, out, in], b_i [E, out]. The last has two outputs."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor


def plan_norm(x: Tensor) -> Tensor:
    """Scale every plan vector [..., D] to root mean square 1; no parameters."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)


def prior(weights: PriorWeights, z0: Tensor) -> Tensor:
    """Plan of a seed: [P, n_z, D] -> [P, n_z, D], every plan vector of rms 1."""
    if weights.w1 is None or weights.w2 is None:
        return plan_norm(z0)
    flat = z0.flatten(1)
    return plan_norm(
        (flat + F.linear(F.silu(F.linear(flat, weights.w1, weights.b1)), weights.w2, weights.b2)).view_as(z0)
    )


class PlanMap(NamedTuple):
    """A decoder layer's map of the plan to keys and values: W [2 D, D] and b [2 D], and the positions [n_z, D] that are
    added to the plan before."""

    w: Tensor
    b: Tensor
    position: Tensor


def seed_plans(weights: PriorWeights, layers: Sequence[PlanMap], z0: Tensor) -> tuple[Tensor, Tensor]:
    """The plan [P, n_z, D] of seeds, and keys and values [L, 2, P, n_z, D] that the decoder's layers make of it."""
    z = prior(weights, z0)
    if not layers:
        return z, z.new_empty((0, 2, *z.shape))
    kv = [F.linear(z + layer.position, layer.w, layer.b).unflatten(-1, (2, -1)) for layer in layers]
    return z, torch.stack(kv).permute(0, 3, 1, 2, 4)


def action_errors(y: Tensor, actions: Tensor, counts: Tensor | None = None) -> Tensor:
    """The mean over steps of (a - tanh y)^2 for each dimension: y and actions [n, act_dim] -> [act_dim].

    Args:
        counts: bool [n], steps that count; None for all.
    """
    errors = (actions - torch.tanh(y).to(actions.dtype)).square()
    if counts is None:
        return errors.mean(0)
    return torch.where(counts[:, None], errors, 0.0).sum(0) / counts.sum()


LOG_VARIANCE_RANGE = (-8.0, 4.0)


def return_model(
    weights: ReturnWeights, z: Tensor, context: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Standardised return of a plan.

    Args:
        z: [P, n_z, D].
        context: normalised first states where the model takes one: [P, obs_dim], or [P, G, obs_dim] for G starts each.
        dropout: applied to both hidden layers.

    Returns:
        means and log-variances of the members, [E, P], or [E, P, G] with G starts.
    """
    x = z.flatten(1)
    shape = context.shape[:-1] if context is not None else x.shape[:1]
    if context is not None:
        if context.ndim == 3:
            x = x[:, None].expand(*shape, x.shape[-1])
        x = torch.cat((x, context), dim=-1).flatten(0, -2)
    h = x.expand(weights.w1.shape[0], *x.shape)
    for w, b in ((weights.w1, weights.b1), (weights.w2, weights.b2)):
        h = F.silu(torch.baddbmm(b[:, None], h, w.transpose(1, 2)))
        if dropout > 0:
            h = F.dropout(h, dropout)
    out = torch.baddbmm(weights.b3[:, None], h, weights.w3.transpose(1, 2)).view(weights.w1.shape[0], *shape, 2)
    mean, log_variance = out.unbind(-1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def return_losses(
    weights: ReturnWeights,
    z: Tensor,
    y: Tensor,
    seen: Tensor,
    fitted: Tensor,
    context: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Errors of the return models' means, with dropout, and the NLL that fits their variances, without.

    The variances are fitted with means and plans held fixed.

    Args:
        z: [P, n_z, D].
        y, seen, fitted: [P], standardised returns, and what a plan counts in either loss.
        context, dropout: as in :func:`return_model`.

    Returns:
        sum of ``seen * (y - r)^2``, and of ``fitted * ((y - r)^2 exp(-v) + v) / 2`` with v the log-variance.
    """
    means, _ = return_model(weights, z, context, dropout)
    fixed, log_variances = return_model(weights, z.detach(), context)
    nll = 0.5 * ((y - fixed.detach()).square() * (-log_variances).exp() + log_variances)
    return ((y - means).square() * seen).sum(), (nll * fitted).sum()


def return_moments(means: Tensor, log_variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [P] of the equal mixture of E members (and G starts): own variance plus disagreement.

    Args:
        means, log_variances: [E, P] or [E, P, G].
    """
    if means.ndim == 3:
        means, log_variances = (x.transpose(1, 2).flatten(0, 1) for x in (means, log_variances))
    mean = means.mean(0)
    variance = log_variances.exp().mean(0) + (means - mean).square().mean(0)
    return mean, variance.sqrt()


_Weights = TypeVar("_Weights", PriorWeights, ReturnWeights)


def _constants(weights: _Weights) -> _Weights:
    """The same outside the graph: threads that plan with one model record nothing for parameters they share."""
    return type(weights)(*(None if w is None else w.detach() for w in weights))


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
    """Gradient ascent of P plan seeds on ``mean - kappa * std - prior_weight * |z0|^2 / 2`` of the standardised return.

    Step k of S moves by ``step_size * (1 - k/S) * sqrt(d)`` along the normalised gradient, back into the ball of
    ``radius * sqrt(d)`` around the seed it started from, then into the ball of ``max_norm * sqrt(d)`` around zero.

    Args:
        z0: [P, n_z, D] seeds.
        context: [P, obs_dim] or [P, G, obs_dim] normalised first states, where the return model takes them.

    Returns:
        seeds [P, n_z, D], mean [P] and std [P] of the standardised return at them.
    """
    scale = math.sqrt(z0[0].numel()) if len(z0) else 1.0
    start = z0.detach()
    prior_weights, return_weights = _constants(prior_weights), _constants(return_weights)

    def norm(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)

    for step in range(n_steps):
        z0 = z0.detach().requires_grad_(True)
        with torch.enable_grad():
            mean, std = return_moments(*return_model(return_weights, prior(prior_weights, z0), context))
            bound = mean - kappa * std - 0.5 * prior_weight * z0.square().sum((1, 2))
            (grad,) = torch.autograd.grad(bound.sum(), z0)
        z0 = z0.detach() + grad * (step_size * (1 - step / n_steps) * scale / norm(grad))
        offset = z0 - start
        z0 = start + offset * (radius * scale / norm(offset)).clamp(max=1.0)
        z0 = z0 * (max_norm * scale / norm(z0)).clamp(max=1.0)
    with torch.no_grad():
        mean, std = return_moments(*return_model(return_weights, prior(prior_weights, z0), context))
    return z0.detach(), mean, std


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Langevin steps of P plan seeds on E = |z0|^2 / 2 + ((target - mean) / std)^2 / 2 + log std.

    z0 <- z0 - (s^2 / 2) grad E + s * noise with s = ``step_size``, less where the drift of a plan would exceed
    ``max_drift_ratio`` times the noise; step k takes the noise of Philox step ``first_step + k``.

    Args:
        z0: [P, n_z, D], where the chains are.
        target: standardised returns, [P] or [].
        seed: of the noise, two uint32 words.
        plans: int64 [P], ids of the plans in the noise.
        context: as in :func:`plan_ascent`.

    Returns:
        seeds [P, n_z, D], mean [P] and std [P] of the standardised return at them.
    """
    scale = math.sqrt(z0.shape[1] * z0.shape[2])
    z0 = z0.detach()
    prior_weights, return_weights = _constants(prior_weights), _constants(return_weights)
    for step in range(n_steps):
        x = z0.requires_grad_(True)
        with torch.enable_grad():
            mean, std = return_moments(*return_model(return_weights, prior(prior_weights, x), context))
            energy = 0.5 * x.square().sum((1, 2)) + 0.5 * ((target - mean) / std).square() + std.log()
            (grad,) = torch.autograd.grad(energy.sum(), x)
        norm = grad.flatten(1).norm(dim=1)[:, None, None]
        s = (2 * max_drift_ratio * scale / norm.clamp_min(1e-12)).clamp(max=step_size)
        noise = philox_normal(seed, plans, first_step + step, z0[0].numel() if len(z0) else 0)
        z0 = x.detach() - 0.5 * s.square() * grad + s * noise.view_as(z0).to(z0.dtype)
    with torch.no_grad():
        mean, std = return_moments(*return_model(return_weights, prior(prior_weights, z0), context))
    return z0.detach(), mean, std


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser


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
    eps: float,
    max_norm: float,
) -> Tensor:
    """Clip the norm of all gradients together to ``max_norm``, then one step of AdamW (Loshchilov and Hutter 2019).

    Args:
        values, gradients, first, second: of each parameter, its gradient and its moments, **mutated**.
        steps: [] of each parameter, steps taken so far, **mutated**.
        decays: weight decay of each parameter.

    Returns:
        the norm before clipping, [].
    """
    norm = torch.stack([g.norm() for g in gradients]).norm() if gradients else torch.zeros(())
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for x, g, m, v, step, decay in zip(values, gradients, first, second, steps, decays, strict=True):
        g.mul_(clip)
        step += 1
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        root = (v / (1 - betas[1] ** step)).sqrt() + eps
        x.mul_(1 - learning_rate * decay).sub_(learning_rate / (1 - betas[0] ** step) * m / root)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Counter-based noise (Salmon et al. 2011, Philox4x32-10) and packing

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # 32 x 32 -> 64 bits in int64 without overflow: by halves of b.
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(key: tuple[int, int], counter: Tensor) -> Tensor:
    """Philox4x32-10: counters int64 [..., 4] holding uint32 values -> random words, int64 [..., 4] in [0, 2^32)."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key[0] & _MASK32, key[1] & _MASK32
    for _ in range(10):
        hi0, lo0 = _mulhilo(_PHILOX_M[0], c0)
        hi1, lo1 = _mulhilo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox_normal(seed: tuple[int, int], plans: Tensor, step: int | Tensor, n: int) -> Tensor:
    """Standard normals that depend on (seed, plan, step, element) alone.

    Element i of plan p at step s uses word i % 4 of Philox at counter (i // 4, p, s, 0). Words (w0, w1) give
    sqrt(-2 ln u) (cos, sin)(2 pi u') with u = (w0 + 1) / 2^32 and u' = w1 / 2^32 (Box-Muller); (w2, w3) likewise.

    Args:
        seed: two uint32 words.
        plans: int64 [P], ids in [0, 2^32).
        step: int or int64 [P], in [0, 2^32).
        n: elements per plan.

    Returns:
        float32 [P, n].
    """
    blocks = (n + 3) // 4
    counter = torch.zeros(len(plans), blocks, 4, dtype=torch.int64, device=plans.device)
    counter[..., 0] = torch.arange(blocks, device=plans.device)
    counter[..., 1] = plans[:, None]
    counter[..., 2] = step[:, None] if isinstance(step, Tensor) else step
    words = philox4x32(seed, counter).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((words[..., 0::2] + 1.0) * 2.0**-32))
    angle = words[..., 1::2] * (2.0 * math.pi * 2.0**-32)
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return normals.flatten(1)[:, :n].to(torch.float32)


class PackedBatch(NamedTuple):
    """Trajectories next to each other, n time steps in all."""

    observations: Tensor  # [n, obs_dim]
    actions: Tensor  # [n, act_dim]
    cu_seqlens: Tensor  # int32 [b + 1], in time steps
    positions: Tensor  # int64 [n], time step within its trajectory
    sequence: Tensor  # int64 [n], place of its trajectory in the batch


def pack_batch(observations: Tensor, actions: Tensor, cu_seqlens: Tensor, indices: Tensor) -> PackedBatch:
    """Copy the chosen trajectories next to each other.

    Args:
        observations, actions: [N, obs_dim] and [N, act_dim].
        cu_seqlens: int64 [B + 1], in time steps.
        indices: int64 [b], trajectories in the order wanted; may repeat.
    """
    starts = cu_seqlens[indices]
    lengths = cu_seqlens[indices + 1] - starts
    cu = F.pad(lengths.cumsum(0), (1, 0))
    sequence = torch.repeat_interleave(torch.arange(len(indices), device=observations.device), lengths)
    positions = torch.arange(len(sequence), device=observations.device) - cu[sequence]
    steps = positions + starts[sequence]
    return PackedBatch(observations[steps], actions[steps], cu.to(torch.int32), positions, sequence)


# Last counter word of a draw: what its words are for.
_CHOOSE, _DROP = 0, 1
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_LOG_TERMS = 10


def _minus_log(u: Tensor) -> Tensor:
    """-ln(u) for float64 u in (0, 1), by operations that round alike everywhere.

    Libraries' logarithms differ in their last bits, and draws must be equal on every engine.
    """
    mantissa, exponent = torch.frexp(u)
    low = mantissa < _SQRT_HALF
    mantissa = torch.where(low, 2.0 * mantissa, mantissa)
    exponent = exponent - low.to(exponent.dtype)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    s2 = s * s
    series = torch.full_like(u, 1.0 / (2 * _LOG_TERMS - 1))
    for k in range(_LOG_TERMS - 2, -1, -1):
        series = series * s2 + 1.0 / (2 * k + 1)
    return -(exponent.to(torch.float64) * _LN2 + 2.0 * s * series)


def _draw_words(seed: tuple[int, int], number: int, i: Tensor, purpose: int) -> Tensor:
    counter = torch.tensor([0, number & _MASK32, number >> 32, purpose], device=i.device).repeat(len(i), 1)
    counter[:, 0] = i
    return philox4x32(seed, counter)


def draw_trajectories(weights: Tensor, n: int, seed: tuple[int, int], number: int) -> Tensor:
    """n trajectories without repetition, drawn by weight, in random order: draw ``number`` of a run.

    Trajectory i arrives at time -ln(u) / w_i, and the n earliest are drawn (Efraimidis and Spirakis 2006), equal
    times in the order of trajectories. Its words of Philox at counter (i, number, number >> 32, 0) give u = (52 bits
    of w0 and w1 + 1/2) / 2^52; by w2 those drawn are put in order.

    Args:
        weights: float64 [B], at least n of them positive; zero is never drawn.
        seed: two uint32 words.

    Returns:
        int64 [n].
    """
    ids = (weights > 0).nonzero().flatten()
    words = _draw_words(seed, number, ids, _CHOOSE)
    u = (((words[:, 0] << 20) | (words[:, 1] >> 12)).to(torch.float64) + 0.5) * 2.0**-52
    chosen = (_minus_log(u) / weights[ids]).argsort(stable=True)[:n].sort().values
    return ids[chosen[words[chosen, 2].argsort(stable=True)]]


def drop_steps(n: int, share: float, seed: tuple[int, int], number: int) -> Tensor:
    """bool [n], True with probability ``share``: word i % 4 of Philox at (i // 4, number, number >> 32, 1)."""
    words = _draw_words(seed, number, torch.arange((n + 3) // 4), _DROP)
    return words.flatten()[:n] < drop_threshold(share)


def drop_threshold(share: float) -> int:
    """The words below it are the given share of all."""
    return round(share * 2.0**32)
