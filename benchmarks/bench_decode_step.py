"""Speed of acting: one step of N environments through ``Actor.act``, on rings that are full.

Whatever the actor does around the op is timed with it, for all providers alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Case, engine_problem, row_error, under
from torch import Tensor

from gac_fast import reference
from gac_fast.act import Actor
from gac_fast.config import Config, preset
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization

OBS_DIM, ACT_DIM = 11, 3  # hopper

# Of the actions over two windows of steps. With C = 2 an actor reads its own actions, and errors feed themselves.
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

    Less than an :class:`Actor`: all environments start together, and there is nothing to reset.
    """

    def __init__(self, model: GAC, z0: Tensor) -> None:
        decoder, m = model.decoder, model.config
        self.decoder, self.heads, self.c = decoder, m.n_heads, m.tokens_per_step
        z = model.prior(z0)
        self.plans = [tuple(x.transpose(1, 2).contiguous() for x in layer.plan_keys(z)) for layer in decoder.layers]
        # With C = 2 one slot more than the window: the newest token may not replace what the one before still sees.
        self.slots = decoder.window + self.c - 1
        shape = (len(z0), m.n_heads, self.slots, m.dim // m.n_heads)
        self.rings = [(torch.zeros(shape), torch.zeros(shape)) for _ in decoder.layers]
        self.held = torch.full((self.slots,), -decoder.window - 1)  # the token in each slot
        self.step = 0
        self.last_action = torch.zeros(len(z0), model.act_dim)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        decoder = self.decoder
        x = decoder.embed_state(obs)[:, None]  # [N, tokens, D]
        positions = [self.step]
        if self.c == 2 and self.step > 0:
            x = torch.cat((decoder.embed_action(self.last_action)[:, None], x), dim=1)
            positions = [self.step - 1, self.step]
        n, n_tokens, dim = x.shape
        last = self.c * self.step
        tokens = torch.arange(last - n_tokens + 1, last + 1)
        slots = tokens % self.slots
        self.held[slots] = tokens
        mask = (self.held <= tokens[:, None]) & (self.held > tokens[:, None] - decoder.window) & (self.held >= 0)
        width = dim // self.heads
        cos, sin = reference._rotary_table(torch.tensor(positions), width, decoder.rope_base, x.dtype)

        def heads(y: Tensor) -> Tensor:
            return y.view(n, n_tokens, self.heads, width)

        for layer, (ring_k, ring_v), (plan_k, plan_v) in zip(decoder.layers, self.rings, self.plans, strict=True):
            q, k, v = (heads(y) for y in layer.qkv(layer.norm1(x)).chunk(3, dim=-1))
            q, k = reference._rotate(q, cos, sin), reference._rotate(k, cos, sin)
            ring_k[:, :, slots], ring_v[:, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), ring_k, ring_v, attn_mask=mask)
            x = x + layer.out(out.transpose(1, 2).reshape(n, n_tokens, dim))
            q = heads(layer.plan_q(layer.norm2(x))).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, plan_k, plan_v)
            x = x + layer.plan_out(out.transpose(1, 2).reshape(n, n_tokens, dim))
            x = x + layer.mlp_out(F.silu(layer.mlp_in(layer.norm3(x))))
        self.last_action = torch.tanh(decoder.head(decoder.norm(x[:, -1])))
        self.step += 1
        return self.last_action


@pytest.mark.parametrize("context", ["states_actions", "states"])
@pytest.mark.parametrize("n", [1, 8, 64])
def test_decode_step(compare, tiny, n, context):
    size = "tiny" if tiny else "gym"
    config = preset(size).replace(model={"context": context})
    torch.manual_seed(0)
    model = GAC(config.model, OBS_DIM, ACT_DIM)
    z0 = torch.randn(n, config.model.n_z, config.model.dim)
    observations = torch.randn(2 * config.model.window, n, OBS_DIM)

    def actor(dtype: str, **options: object) -> Actor:
        of_dtype = getattr(torch, dtype)
        return Actor(copy.deepcopy(model).to(of_dtype), units(of_dtype), z0.to(of_dtype), **options)

    def roll(one: Actor | EagerActor, backend: str) -> Tensor:
        return torch.stack([under(backend, lambda obs=obs: one.act(obs))() for obs in observations])

    expected = roll(actor("float64"), "reference")
    providers: dict[tuple[str, str], Callable[[], object] | str] = {}
    eager = EagerActor(model, z0)
    assert row_error(roll(eager, "reference"), expected) < BOUNDS["float32"]
    providers["eager torch", "float32"] = lambda: eager.act(observations[0])
    for name, dtype in (("reference", "float32"), ("cpp", "float32"), ("cpp", "bfloat16")):
        problem = engine_problem("decode_step", dtype) if name == "cpp" else None
        if problem is not None:
            providers[name, dtype] = problem
            continue
        one = actor("float32", **({"bf16": True} if dtype == "bfloat16" else {}))
        error = row_error(roll(one, name), expected)
        assert error < BOUNDS[dtype], f"{name} {dtype}: {error:.2e}"
        providers[name, dtype] = under(name, lambda one=one: one.act(observations[0]))
    flops, n_bytes = cost(config, n)
    compare(Case("decode_step", "step", f"{size} C={config.model.tokens_per_step} N={n}", flops, n_bytes), providers)
