"""Speed of planning: 20 steps of ascent for P plans, one return model or an ensemble of four.

``naive`` is autograd through a U-Net from seeds to plans in place of the MLP, as published code has it: other plans
come out, so its loop is held with the MLP in it before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import NEEDS_CUDA, Case, compiled, engine_problem, instead, row_error, under
from naive import UNet, ascent, ascent_of, bound
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.config import Config, preset
from gac_fast.model import GAC

N_STEPS = 20

# Of the seeds after all steps. Every step normalises a gradient, which multiplies what rounding leaves of a small one.
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}


def cost(config: Config, n_plans: int) -> tuple[float, dict[str, float]]:
    """Least work (FLOP, forward and data gradients) and traffic (bytes: weights once, seeds in and out)."""
    m = config.model
    d, h = m.n_z * m.dim, m.return_hidden
    weights = 2 * d * m.prior_hidden + m.return_ensemble * (d * h + h * h + 2 * h)
    seeds = 4.0 * 2 * n_plans * d
    return 4.0 * weights * n_plans * N_STEPS, {"float32": 4 * weights + seeds, "bfloat16": 2 * weights + seeds}


@pytest.mark.parametrize("n_members", [1, 4])
@pytest.mark.parametrize("n_plans", [1, 64, 1024])
def test_plan_ascent(compare, tiny, compilers, n_plans, n_members):
    size, n_plans = ("tiny", min(n_plans, 3)) if tiny else ("gym", n_plans)
    config = preset(size).replace(model={"return_ensemble": n_members})
    torch.manual_seed(0)
    model = GAC(config.model, 1, 1)
    seeds = torch.randn(n_plans, config.model.n_z, config.model.dim)
    plan = config.plan

    def ascend(dtype: torch.dtype, **options: Any) -> Callable[[], tuple[Tensor, ...]]:
        prior, returns = (
            type(w)(*(x.detach().to(dtype) for x in w)) for w in (model.prior.weights(), model.returns.weights())
        )
        z0 = seeds.to(dtype)
        return lambda: ops.plan_ascent(
            prior, returns, z0, n_steps=N_STEPS, step_size=plan.step_size, kappa=plan.kappa, radius=plan.radius,
            max_norm=plan.max_norm, **options,
        )  # fmt: skip

    expected, *_ = under("reference", ascend(torch.float64))()
    weights, prior = model.returns.weights(), model.prior.weights()
    weights, prior = (type(w)(*(x.detach() for x in w)) for w in (weights, prior))
    options = {"n_steps": N_STEPS, "step_size": plan.step_size, "radius": plan.radius, "max_norm": plan.max_norm}

    def by_autograd(to_plans: Callable[[Tensor], Tensor]) -> Tensor:
        return ascent(to_plans, weights, seeds, kappa=plan.kappa, **options)

    def mlp(z0: Tensor) -> Tensor:
        return reference.prior(prior, z0)

    error = row_error(by_autograd(mlp).flatten(1), expected.flatten(1))
    assert error < BOUNDS["float32"], f"naive: {error:.2e}"
    unet = UNet(config.model.dim).requires_grad_(False)
    providers: dict[tuple[str, str], Callable[[], object] | str] = {}
    few = n_plans <= 64
    providers["naive", "float32"] = (lambda: by_autograd(unet)) if few else "left out: takes a minute, see 64 plans"

    def compile_bound(by: Callable[..., Any]) -> Callable[[], object]:
        compiled_bound = by(lambda z0: bound(weights, mlp(z0), plan.kappa))

        def run() -> Tensor:
            return ascent_of(compiled_bound, seeds, **options)

        assert row_error(run().flatten(1), expected.flatten(1)) < BOUNDS["float32"]
        return run

    # Of one size, for compiling takes long: the bound alone, whose gradient is nine tenths of the work.
    if (n_plans, n_members) != (64, 1):
        compilers = instead(compilers, "left out: compiled with E=1 P=64 alone")
    providers |= compiled(compilers, compile_bound)
    providers["CUDA graphs", "float32"] = NEEDS_CUDA
    for name, dtype in (("reference", "float32"), ("cpp", "float32"), ("cpp", "bfloat16")):
        problem = engine_problem("plan_ascent", dtype) if name == "cpp" else None
        if problem is not None:
            providers[name, dtype] = problem
            continue
        run = under(name, ascend(torch.float32, **({"bf16": True} if dtype == "bfloat16" else {})))
        error = row_error(run()[0].flatten(1), expected.flatten(1))
        assert error < BOUNDS[dtype], f"{name} {dtype}: {error:.2e}"
        providers[name, dtype] = run
    flops, n_bytes = cost(config, n_plans)
    case = Case("plan_ascent", f"{N_STEPS} steps", f"{size} E={n_members} P={n_plans}", flops, n_bytes)
    compare(case, providers, [("naive", "float32")])
