"""seed_plans: from seeds to the plan and to all layers' keys and values; the C++ engine against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.reference import PlanMap, PriorWeights


def inputs(p: int, n_z: int, dim: int, hidden: int, n_layers: int) -> tuple[PriorWeights, list[PlanMap], Tensor]:
    """With ``hidden`` 0 the identity."""
    g = torch.Generator().manual_seed(p)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)

    d = n_z * dim
    prior = PriorWeights(normal(hidden, d), normal(hidden), normal(d, hidden), normal(d)) if hidden else None
    layers = [PlanMap(normal(2 * dim, dim), normal(2 * dim), normal(n_z, dim)) for _ in range(n_layers)]
    return prior or PriorWeights(None, None, None, None), layers, torch.randn(p, n_z, dim, generator=g)


def run(function, prior, layers, z0, dz: Tensor | None, dkv: Tensor):
    leaves = [
        w.detach().to(z0.dtype).requires_grad_() for w in (*prior, *(w for one in layers for w in one)) if w is not None
    ]
    n = sum(w is not None for w in prior)
    taken = PriorWeights(*leaves[:n]) if n else prior
    z, kv = function(taken, [PlanMap(*leaves[i : i + 3]) for i in range(n, len(leaves), 3)], z0)
    loss = (kv * dkv.to(z0.dtype)).sum() + (0 if dz is None else (z * dz.to(z0.dtype)).sum())
    return [z.detach(), kv.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize(
    ("p", "n_z", "dim", "hidden", "with_dz"),
    [(1, 1, 64, 8, True), (3, 4, 96, 40, True), (17, 7, 16, 33, False), (4, 3, 10, 0, True), (0, 2, 16, 8, True)],
)
def test_forward_and_gradients_equal_the_reference(p, n_z, dim, hidden, with_dz):
    prior, layers, z0 = inputs(p, n_z, dim, hidden, 3)
    g = torch.Generator().manual_seed(1)
    dz = torch.randn(p, n_z, dim, generator=g) if with_dz else None
    dkv = torch.randn(3, 2, p, n_z, dim, generator=g)
    expected = run(reference.seed_plans, prior, layers, z0.double(), dz, dkv)
    found = run(ops.seed_plans, prior, layers, z0, dz, dkv)
    assert ops.dispatch_counts() == {("seed_plans", "cpp"): 1}
    for x, y in zip(found, expected, strict=True):
        # Gradients are sums over plans, of random signs: held as a whole.
        assert row_error(x.reshape(1, -1), y.reshape(1, -1)) < 1e-5
    assert row_error(found[1], expected[1]) < 1e-5
    torch.set_num_threads(2)
    try:
        again = run(ops.seed_plans, prior, layers, z0, dz, dkv)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True))


@pytest.mark.usefixtures("cpp_engine")
def test_seeds_that_ask_for_a_gradient_get_it_from_the_reference():
    prior, layers, z0 = inputs(2, 2, 8, 5, 1)
    z, kv = ops.seed_plans(prior, layers, z0.requires_grad_())
    (z.sum() + kv.sum()).backward()
    assert z0.grad is not None
    assert ops.dispatch_counts() == {("seed_plans", "reference"): 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda prior, layers, z0: (prior, layers, z0[0]), r"z0: expected shape \[P, n_z, D\], got \[2, 8\]"),
        (lambda prior, layers, z0: (prior, layers, z0[:, :0]), "z0: expected plans of at least one value"),
        (lambda prior, layers, z0: (prior._replace(b1=None), layers, z0), "prior: expected all weights or none, got 3"),
        (lambda prior, layers, z0: (prior._replace(w2=prior.w1), layers, z0), r"prior.w2: expected shape \[16, 5\]"),
        (
            lambda prior, layers, z0: (prior, [layers[0]._replace(b=layers[0].b[1:])], z0),
            r"layers\[0\].b: expected shape \[16\], got \[15\]",
        ),
        (lambda prior, layers, z0: (prior, layers, z0.double()), "weights: expected dtype float64, got float32"),
    ],
    ids=["rank", "empty", "half", "w2", "b", "dtype"],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.seed_plans(*change(*inputs(2, 2, 8, 5, 1)))
