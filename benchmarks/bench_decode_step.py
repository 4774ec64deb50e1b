"""Speed of acting: one step of N environments through ``Actor.act``, on rings that are full.

Whatever the actor does around the op is timed with it, for all providers alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from harness import Case, engine_problem, row_error, under
from torch import Tensor

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

    def roll(one: Actor, backend: str) -> Tensor:
        return torch.stack([under(backend, lambda obs=obs: one.act(obs))() for obs in observations])

    expected = roll(actor("float64"), "reference")
    providers: dict[tuple[str, str], Callable[[], object] | str] = {}
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
