"""posterior_langevin: all Langevin steps of an update by the C++ engine, against autograd on the reference in float64;
and the functions of autograd that run several of the decoder's ops at once."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error
from model_fixtures import make_batch, make_model, model_config
from torch import Tensor

from gac_fast import ops, posterior
from gac_fast.train.update import frozen

BOUNDS = {False: 1e-5, True: 2e-2}
LENGTHS = [5, 1, 17, 70]


def case(dtype: torch.dtype, bf16: bool, **fields):
    model = make_model(model_config(**fields), dtype=dtype)
    model.bf16 = bf16
    batch = make_batch(LENGTHS, dtype=dtype, has_return=[True, False, True, True])
    seeds = torch.randn(4, model.config.n_z, model.config.dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        trunk = model.trunk(batch)
    return model, batch, seeds, trunk


IDS, STEPS = torch.tensor([7, 0, 2, 1 << 31]), torch.tensor([0, 5, 1, 9])


def by_autograd(model, batch, seeds: Tensor, trunk: Tensor, max_drift_ratio: float):
    def noise(step: int) -> Tensor:
        return ops.philox_normal((3, 4), IDS, STEPS + step, seeds[0].numel()).view(seeds.shape).to(seeds.dtype)

    with frozen(model), ops.backend("reference"):
        z0, stats = posterior.langevin(
            lambda z0: model.energy(z0, batch, 0.5, 0.3, trunk), seeds, n_steps=3, step_size=0.2, noise=noise,
            max_drift_ratio=max_drift_ratio,
        )  # fmt: skip
    return z0, stats


def by_engine(model, batch, seeds: Tensor, trunk: Tensor, max_drift_ratio: float):
    energy = model.seed_energy(batch, 0.5, 0.3, trunk)
    assert energy is not None
    with ops.fixed_weights():
        return ops.posterior_langevin(
            energy, seeds, n_steps=3, step_size=0.2, seed=(3, 4), ids=IDS, steps=STEPS, max_drift_ratio=max_drift_ratio
        )


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    "fields",
    [
        {"return_context": "first_state", "return_ensemble": 2, "max_drift_ratio": 0.05},
        {"context": "states_actions", "prior": "identity", "n_z": 7, "n_heads": 1, "window": 40},
        {"dim": 96, "n_heads": 4, "n_z": 1, "n_layers": 3},
    ],
    ids=["first_state", "actions", "wide"],
)
def test_chains_move_as_by_autograd(fields, bf16):
    fields = dict(fields)
    bound = fields.pop("max_drift_ratio", float("inf"))
    expected, stats = by_autograd(*case(torch.float64, False, **fields), bound)
    one = case(torch.float32, bf16, **fields)
    ops.reset_dispatch_counts()
    z0, size, ratio = by_engine(*one, bound)
    layers, steps = one[0].config.n_layers, 3
    counts = {("block", "cpp"): steps * layers, ("window_attention", "cpp"): steps * (layers - 1)}
    counts[("posterior_langevin", "cpp")] = 1
    assert ops.dispatch_counts() == counts
    # What the steps added, by chain.
    start = one[2].flatten(1)
    assert row_error(z0.flatten(1) - start, expected.flatten(1) - start) < BOUNDS[bf16]
    assert float(size.mean()) == pytest.approx(float(stats.step_size), rel=BOUNDS[bf16])
    assert float(ratio.mean()) == pytest.approx(float(stats.drift_ratio), rel=BOUNDS[bf16])
    assert bool((size < 0.2).any()) == (bound < 1)
    torch.set_num_threads(2)
    try:
        again = by_engine(*one, bound)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(again, (z0, size, ratio), strict=True))


@pytest.mark.usefixtures("cpp_engine")
def test_what_is_no_case_for_the_engine_is_named():
    model, batch, seeds, trunk = case(torch.float32, False)
    with ops.backend("reference"):
        assert model.seed_energy(batch, 0.5, 0.3, trunk) is None
    energy = model.seed_energy(batch, 0.5, 0.3, trunk)
    options = {"n_steps": 1, "step_size": 0.2, "seed": (3, 4), "ids": IDS, "steps": STEPS}
    for change, message in (
        ({"n_steps": -1}, "n_steps: expected at least 0, got -1"),
        ({"seed": (1 << 32, 0)}, r"seed: expected two words within \[0, 2\^32\)"),
        ({"ids": IDS - 1}, r"ids: expected values within \[0, 2\^32\), got -1 at position 1"),
        ({"step_size": float("nan")}, "step_size: expected a finite number of at least 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.posterior_langevin(energy, seeds, **{**options, **change})
    with pytest.raises(ValueError, match=r"z0: expected shape \[4, n_z, D\], got \[3, 2, 16\]"):
        ops.posterior_langevin(energy, seeds[:3], **options)
    with pytest.raises(ValueError, match=r"energy\.trunk: expected 1 rows for each action"):
        ops.posterior_langevin(energy._replace(trunk=trunk[1:]), seeds, **options)


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_layers_in_one_function_are_those_in_several(context, bf16):
    """Trunk, plan and layers: output, and gradients of every weight, against the reference in float64."""
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpp")):
        model, batch, seeds, _ = case(dtype, bf16 and backend == "cpp", context=context, dim=32, n_heads=4, n_layers=3)
        with ops.backend(backend):
            _, errors = model.plan_and_errors(seeds, batch, model.trunk(batch))
            errors.sum().backward()
        found.append((errors.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (errors, others) = found
    assert row_error(errors, expected) < BOUNDS[bf16]
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        # bfloat16 rounds what a sum over few tokens is made of: each gradient as a whole.
        bound = 3e-2 if bf16 else 1e-5
        assert row_error(others[name].reshape(1, -1), gradient.reshape(1, -1)) < bound, name
