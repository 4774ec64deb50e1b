"""Speed of acting: one step of N environments through ``Actor.act``, on rings that are full.

Whatever the actor does around the op is timed with it, for all providers alike; what a program does around the actor
is not. So observations are cut out beforehand, and the C++ engine is not forced but asserted: with its weights and
rings it has driven Python out of the near caches, where these few lines would cost as much as a quarter of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import NEEDS_CUDA, Case, compiled, engine_problem, instead, row_error, under
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.act import Actor
from gac_fast.config import Config, preset
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization

OBS_DIM, ACT_DIM = 11, 3  # hopper

# Of the actions over two windows of steps and a little, which is twice round every ring. With C = 2 an actor reads its
# own actions, and errors feed themselves.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}


def cost(config: Config, n: int) -> tuple[float, dict[str, float]]:
    """Least work (FLOP) and traffic (bytes by dtype of weights and rings) of a step of n environments."""
    m = config.model
    c, d = m.tokens_per_step, m.dim
    weights = m.n_layers * (4 * d**2 + 2 * d**2 + 2 * m.mlp_ratio * d**2)
    attention = m.n_layers * 2 * (c * m.window + m.n_z) * d
    rings = m.n_layers * 2 * (c * m.window + m.n_z) * d * n
    flops = 2.0 * n * c * (weights + attention)
    return flops, {"float32": 4.0 * (weights + rings), "bfloat16": 2.0 * (weights + rings)}


def units(dtype: torch.dtype) -> Normalization:
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    return Normalization(
        zero.expand(OBS_DIM), one.expand(OBS_DIM), zero.expand(ACT_DIM), one.expand(ACT_DIM), zero, one
    )


class EagerActor:
    """Acting in eager PyTorch written for speed: both tokens of a step in one pass, torch's SDPA on the ring.

    Less than an :class:`Actor`: all environments start together, there is nothing to reset, and no units are changed.
    So a step has one place in the ring, one mask and one rotation for all rows, the latter two made beforehand.
    """

    @torch.inference_mode()
    def __init__(self, model: GAC, z0: Tensor, by: Callable[..., Any] | None = None) -> None:
        """``by`` compiles what a step computes."""
        decoder, m = model.decoder, model.config
        self.compute = self._compute if by is None else by(self._compute)
        self.decoder, self.weights = decoder, decoder.weights()
        self.heads, self.width, self.c = m.n_heads, m.dim // m.n_heads, m.tokens_per_step
        z = model.prior(z0)
        self.plans = [tuple(x.transpose(1, 2).contiguous() for x in layer.plan_keys(z)) for layer in decoder.layers]
        # The tokens of a step lie side by side. With C = 2 one step more than the window: the action token still sees
        # what the state token after it does not.
        self.period = m.window + self.c - 1
        shape = (len(z0), m.n_heads, self.c * self.period, self.width)
        self.rings = [(torch.zeros(shape), torch.zeros(shape)) for _ in decoder.layers]
        # A slice would be a constant of a compiled step, and an index takes longer where it is not compiled.
        self.slots = None if by is None else torch.arange(self.c * self.period)
        # First the steps that fill the ring, then one round of it, which repeats.
        self.biases = [self.bias(step) for step in range(2 * self.period)]
        self.rotate_until(1024)
        self.step = 0
        self.last_action = torch.zeros(len(z0), model.act_dim)

    def bias(self, step: int) -> Tensor | None:
        """What a step's tokens (rows) add to the scores of the slots; None where they see them all."""
        in_step = torch.arange(1 - self.c, 1)
        tokens = (self.c * step + in_step)[:, None]
        steps = step - (step - torch.arange(self.period)) % self.period  # the last one written to each place
        held = (self.c * steps[:, None] + in_step).flatten()
        visible = (held <= tokens) & (held > tokens - self.decoder.window) & (held >= 0)
        visible |= held == tokens  # the first step has no action token; what stands in for it needs something to see
        return None if visible.all() else torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)

    def rotate_until(self, n_steps: int) -> None:
        """Rotary table of the first steps; rows step to step + C - 1 are those of a step's tokens."""
        positions = torch.arange(1 - self.c, n_steps)
        cos, sin = reference._rotary_table(positions, self.width, self.decoder.rope_base, torch.float32)
        self.cos, self.sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
        self.n_steps = n_steps

    @torch.inference_mode()
    def act(self, obs: Tensor) -> Tensor:
        if self.step == self.n_steps:
            self.rotate_until(2 * self.n_steps)
        round_step = self.step % self.period
        new = slice(self.c * round_step, self.c * (round_step + 1))
        bias = self.biases[self.step if self.step < self.period else self.period + round_step]
        cos, sin = self.cos[self.step : self.step + self.c], self.sin[self.step : self.step + self.c]
        places = new if self.slots is None else self.slots[new]
        self.last_action = self.compute(obs, self.last_action, places, bias, cos, sin)
        self.step += 1
        return self.last_action

    def _compute(
        self, obs: Tensor, last_action: Tensor, new: slice | Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        decoder, heads, width = self.decoder, self.heads, self.width
        x = decoder.embed_state(obs)
        x = x[:, None] if self.c == 1 else torch.stack((decoder.embed_action(last_action), x), dim=1)
        n = x.shape[0]  # of [N, C, D]
        for w, (ring_k, ring_v), (plan_k, plan_v) in zip(self.weights.layers, self.rings, self.plans, strict=True):
            qkv = reference.norm_linear(x, w.norm1_w, w.norm1_b, w.w_qkv, w.b_qkv).view(n, self.c, 3, heads, width)
            qk = qkv[:, :, :2]
            q, k = torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin).transpose(1, 3).unbind(2)
            ring_k[:, :, new], ring_v[:, :, new] = k, qkv[:, :, 2].transpose(1, 2)
            if self.c == 2 and w is self.weights.layers[-1]:
                # The action is read at the state token, and nothing else reads what this layer makes of the other.
                q, x, bias = q[:, :, -1:], x[:, -1:], None if bias is None else bias[-1:]
            out = F.scaled_dot_product_attention(q, ring_k, ring_v, attn_mask=bias)
            x = x + F.linear(out.transpose(1, 2).flatten(2), w.w_o, w.b_o)
            q = reference.norm_linear(x, w.norm2_w, w.norm2_b, w.w_plan_q, w.b_plan_q)
            out = F.scaled_dot_product_attention(q.view(n, -1, heads, width).transpose(1, 2), plan_k, plan_v)
            x = x + F.linear(out.transpose(1, 2).flatten(2), w.w_plan_o, w.b_plan_o)
            x = reference.mlp_residual(x, w.norm3_w, w.norm3_b, w.w_in, w.b_in, w.w_out, w.b_out)
        w = self.weights
        return reference.norm_linear(x[:, -1], w.norm_w, w.norm_b, w.w_head, w.b_head).tanh_()


@pytest.mark.parametrize("context", ["states_actions", "states"])
@pytest.mark.parametrize("n", [1, 8, 64])
def test_decode_step(compare, tiny, compilers, n, context):
    size = "tiny" if tiny else "gym"
    config = preset(size).replace(model={"context": context})
    torch.manual_seed(0)
    model = GAC(config.model, OBS_DIM, ACT_DIM)
    z0 = torch.randn(n, config.model.n_z, config.model.dim)
    observations = torch.randn(2 * config.model.window + 4, n, OBS_DIM)

    def actor(dtype: str, **options: object) -> Actor:
        of_dtype = getattr(torch, dtype)
        return Actor(copy.deepcopy(model).to(of_dtype), units(of_dtype), z0.to(of_dtype), **options)

    def roll(one: Actor | EagerActor, backend: str) -> Tensor:
        return torch.stack([under(backend, lambda obs=obs: one.act(obs))() for obs in observations])

    expected = roll(actor("float64"), "reference")
    first = observations[0]
    providers: dict[tuple[str, str], Callable[[], object] | str] = {}
    eager = EagerActor(model, z0)
    assert row_error(roll(eager, "reference"), expected) < BOUNDS["float32"]
    providers["eager torch", "float32"] = lambda: eager.act(first)

    def compile_actor(by: Callable[..., Any]) -> Callable[[], object]:
        one = EagerActor(model, z0, by)
        assert row_error(roll(one, "reference"), expected) < BOUNDS["float32"]
        return lambda: one.act(first)

    # Of one size, for compiling takes long.
    if (n, context) != (8, "states_actions"):
        compilers = instead(compilers, "left out: compiled with C=2 N=8 alone")
    others = {**compiled(compilers, compile_actor), ("CUDA graphs", "float32"): NEEDS_CUDA}
    providers = {**others, **providers}
    for name, dtype in (("reference", "float32"), ("cpp", "float32"), ("cpp", "bfloat16")):
        problem = engine_problem("decode_step", dtype) if name == "cpp" else None
        if problem is not None:
            providers[name, dtype] = problem
            continue
        one = actor("float32", **({"bf16": True} if dtype == "bfloat16" else {}))
        error = row_error(roll(one, name), expected)
        assert error < BOUNDS[dtype], f"{name} {dtype}: {error:.2e}"
        if name == "cpp":
            ops.reset_dispatch_counts()
            one.act(first)
            assert ops.dispatch_counts() == {("decode_step", "cpp"): 1}
            providers[name, dtype] = lambda one=one: one.act(first)
        else:
            providers[name, dtype] = under(name, lambda one=one: one.act(first))
    flops, n_bytes = cost(config, n)
    compare(Case("decode_step", "step", f"{size} C={config.model.tokens_per_step} N={n}", flops, n_bytes), providers)
