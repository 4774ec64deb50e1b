"""Speed of making plans of seeds, with all layers' keys and values of them, and of the gradients of all weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import ROW_BOUND, Case, Providers, engine_problem, row_error, under
from torch import Tensor

from gac_fast import ops
from gac_fast.config import preset
from gac_fast.model import GAC
from gac_fast.reference import PlanMap, PriorWeights


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_seed_plans(compare, tiny, mode):
    size, n = ("tiny", 5) if tiny else ("gym", 64)
    config = preset(size).model
    torch.manual_seed(0)
    model = GAC(config, 2, 1)
    exact = torch.randn(n, config.n_z, config.dim)
    upstream = torch.randn(config.n_layers, 2, n, config.n_z, config.dim), torch.randn(exact.shape)

    def prepare(dtype: str, backend: str) -> tuple[Callable[[], object], list[Tensor]]:
        """The timed call, and plans and gradients of one pass."""
        of = getattr(torch, dtype)
        prior, *maps = (
            [w.detach().to(of, copy=True).requires_grad_() for w in one]
            for one in (model.prior.weights(), *model.decoder.plan_maps())
        )
        leaves = [*prior, *(w for one in maps for w in one)]
        z0, (dkv, dz) = exact.to(of), (x.to(of) for x in upstream)

        def forward() -> tuple[Tensor, Tensor]:
            return ops.seed_plans(PriorWeights(*prior), [PlanMap(*one) for one in maps], z0)

        out = under(backend, forward)()

        def backward(out: tuple[Tensor, Tensor] = out) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, (dz, dkv), retain_graph=True)

        calls = {"fwd": forward, "bwd": backward, "fwd+bwd": lambda: backward(forward())}
        return under(backend, calls[mode]), [*(x.detach() for x in out), *under(backend, backward)()]

    _, expected = prepare("float64", "reference")
    providers: Providers = {}
    for name in ("reference", "cpp"):
        problem = engine_problem("seed_plans") if name == "cpp" else None
        if problem is not None:
            providers[name, "float32"] = problem
            continue
        providers[name, "float32"], results = prepare("float32", name)
        for x, right in zip(results, expected, strict=True):
            assert row_error(x.flatten(), right.flatten()) < ROW_BOUND["float32"], name

    d, plan = config.n_z * config.dim, config.n_layers * 2 * config.dim**2
    macs = n * (2 * d * config.prior_hidden + config.n_z * plan)
    weights = 2 * d * config.prior_hidden + plan
    made = n * d * (1 + 2 * config.n_layers)
    # The backward has weight gradients and, but for the first map, data gradients.
    first = n * d * config.prior_hidden
    flops = 2.0 * {"fwd": macs, "bwd": 2 * macs - first, "fwd+bwd": 3 * macs - first}[mode]
    n_bytes = 4.0 * {"fwd": weights + made, "bwd": 2 * weights + made, "fwd+bwd": 3 * weights + 2 * made}[mode]
    compare(Case("seed_plans", mode, f"{size} P={n} L={config.n_layers}", flops, n_bytes), providers)
