"""Speed of all Langevin steps of an update on the plan seeds of a batch, beside autograd through the whole decoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_update import OBS_DIM, cost, trainer
from harness import Case, Providers, engine_problem, row_error, under
from torch import Tensor

from gac_fast import ops, posterior
from gac_fast.config import preset
from gac_fast.model import GAC
from gac_fast.train.update import frozen

# Of what the steps add to the seeds, by chain, against float64.
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}


@pytest.mark.parametrize("context", ["states_actions", "states"])
def test_posterior_langevin(compare, tiny, context):
    size = "tiny" if tiny else "gym"
    config = preset(size).replace(model={"context": context})
    p, lengths = config.posterior, [12, 12] if tiny else [250] * 4
    options = {"n_steps": p.n_steps, "step_size": p.step_size, "max_drift_ratio": p.max_drift_ratio}
    key, ids = (3, 4), torch.arange(len(lengths))
    one = trainer(config, lengths, "float32")
    start = torch.randn(len(lengths), config.model.n_z, config.model.dim)

    def prepare(dtype: str, backend: str) -> Callable[[], Tensor]:
        of = torch.float64 if dtype == "float64" else torch.float32
        model = GAC(config.model, OBS_DIM, one.model.act_dim).to(of)
        model.load_state_dict(one.model.state_dict())
        model.bf16 = dtype == "bfloat16"
        floats = {name: x.to(of) for name, x in one.batch._asdict().items() if x is not None and x.is_floating_point()}
        batch, z0 = one.batch._replace(**floats), start.to(of)
        temperatures = p.action_temperature, p.return_temperature
        with torch.no_grad():
            trunk = under(backend, lambda: model.trunk(batch))()

        def by_autograd() -> Tensor:
            def noise(step: int) -> Tensor:
                return ops.philox_normal(key, ids, step, z0[0].numel()).view(z0.shape).to(of)

            with frozen(model):
                return posterior.langevin(
                    lambda z0: model.energy(z0, batch, *temperatures, trunk), z0, noise=noise, **options
                )[0]

        def by_engine() -> Tensor:
            with ops.fixed_weights():
                energy = model.seed_energy(batch, *temperatures, trunk)
                assert energy is not None
                return ops.posterior_langevin(energy, z0, seed=key, ids=ids, steps=torch.zeros_like(ids), **options)[0]

        return under(backend, by_autograd) if backend == "reference" else by_engine

    moved = (prepare("float64", "reference")() - start).flatten(1)
    providers: Providers = {}
    for name in ("reference", "cpp"):
        for dtype in ("float32", "bfloat16"):
            problem = engine_problem("posterior_langevin", dtype) if name == "cpp" else None
            if problem is not None:
                providers[name, dtype] = problem
                continue
            run = prepare(dtype, name)
            error = row_error((run() - start).flatten(1), moved)
            assert error < BOUNDS[dtype], f"{name} {dtype}: {error:.2e}"
            providers[name, dtype] = run

    # Of an update without its training pass: what as many steps more would add to it.
    twice = config.replace(posterior={"n_steps": 2 * p.n_steps})
    flops, n_bytes = (a - b for a, b in zip(cost(twice, sum(lengths)), cost(config, sum(lengths)), strict=True))
    shape = f"{size} C={config.model.tokens_per_step} B={len(lengths)} T={lengths[0]}"
    compare(Case("posterior_langevin", f"{p.n_steps} steps", shape, flops, n_bytes), providers)
