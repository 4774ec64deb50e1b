"""return_losses: what the return models are trained on; the C++ engine against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.reference import ReturnWeights


def inputs(
    p: int, members: int, n_obs: int, hidden: tuple[int, int] = (24, 19)
) -> tuple[ReturnWeights, dict[str, Tensor | None]]:
    g = torch.Generator().manual_seed(p)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    n_in, (h1, h2), e = 3 * 16 + n_obs, hidden, members
    weights = ReturnWeights(
        normal(e, h1, n_in) / n_in**0.5, normal(e, h1), normal(e, h2, h1) / h1**0.5, normal(e, h2),
        # Some variances lie beyond their range.
        normal(e, 2, h2) * torch.tensor([0.3, 2.0])[:, None], normal(e, 2),
    )  # fmt: skip
    seen = (torch.arange(p) % 2 == 0).float() / max(1, p)
    return weights, {
        "z": normal(p, 3, 16), "y": normal(p), "seen": seen, "fitted": (1 - seen) / max(1, p),
        "context": normal(p, n_obs) if n_obs else None,
    }  # fmt: skip


def run(function, weights: ReturnWeights, given: dict[str, Tensor | None], dtype: torch.dtype, dropout: float):
    leaves = [w.detach().to(dtype).requires_grad_() for w in weights]
    given = {name: None if x is None else x.to(dtype) for name, x in given.items()}
    z = given["z"].requires_grad_()
    torch.manual_seed(0)
    losses = function(ReturnWeights(*leaves), **given, dropout=dropout)
    return [torch.stack(losses).detach(), *torch.autograd.grad(losses[0] + 0.1 * losses[1], [z, *leaves])]


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize(
    ("p", "members", "n_obs", "dropout"), [(1, 1, 0, 0.0), (5, 3, 4, 0.0), (4, 2, 0, 0.3), (17, 1, 11, 0.3)]
)
def test_losses_and_gradients_equal_the_reference(monkeypatch, p, members, n_obs, dropout):
    weights, given = inputs(p, members, n_obs)
    found = run(ops.return_losses, weights, given, torch.float32, dropout)
    assert ops.dispatch_counts() == {("return_losses", "cpp"): 1}
    # float64 draws other masks: those of float32 in their place.
    torch.manual_seed(0)
    masks = [torch.empty(members, p, h).bernoulli_(1 - dropout).div_(1 - dropout).double() for h in (24, 19) if dropout]
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda h, _: h * masks.pop(0))
    expected = run(reference.return_losses, weights, given, torch.float64, dropout)
    assert float((found[0] / expected[0] - 1).nan_to_num().abs().max()) < 1e-5
    for x, y in zip(found[1:], expected[1:], strict=True):
        assert row_error(x.reshape(1, -1), y.reshape(1, -1)) < 1e-5
    assert row_error(found[1].flatten(1), expected[1].flatten(1)) < 1e-5
    torch.set_num_threads(2)
    try:
        again = run(ops.return_losses, weights, given, torch.float32, dropout)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True))


@pytest.mark.usefixtures("cpp_engine")
def test_dropout_draws_what_the_reference_draws():
    weights, given = inputs(4, 2, 0)
    found = run(ops.return_losses, weights, given, torch.float32, 0.4)
    expected = run(reference.return_losses, weights, given, torch.float32, 0.4)
    assert all(row_error(x.reshape(1, -1), y.reshape(1, -1)) < 1e-5 for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("z", lambda x: x[0], r"z: expected shape \[P, n_z, D\], got \[3, 16\]"),
        ("y", lambda x: x[:, None], r"y: expected shape \[4\], got \[4, 1\]"),
        ("fitted", lambda x: x.double(), "fitted: expected dtype float32, got float64"),
        ("context", lambda _: torch.zeros(4, 2), r"weights.w1: expected shape \[E, hidden, 50\], got \[2, 24, 48\]"),
        ("dropout", lambda _: 1.0, r"dropout: expected a share in \[0, 1\), got 1.0"),
    ],
    ids=["z", "y", "fitted", "context", "dropout"],
)
def test_bad_arguments_are_named(name, change, message):
    weights, given = inputs(4, 2, 0)
    with pytest.raises(ValueError, match=message):
        ops.return_losses(weights, **{"dropout": 0.0, **given, name: change(given.get(name))})
