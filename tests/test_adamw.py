"""adamw: clipping and one step of the optimiser in one call; the C++ engine against torch and on every path."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import row_error
from torch import Tensor

from gac_fast import ops

SHAPES = [(70, 33), (), (1,), (5, 0), (3, 5, 7), (40_000,)]
DECAYS = [0.1, 0.0, 0.3, 0.1, 0.0, 0.1]
OPTIONS = {"learning_rate": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}


def lists(n_taken: int = 3) -> dict[str, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    values, gradients, first = ([torch.randn(s, generator=g) for s in SHAPES] for _ in range(3))
    second = [torch.rand(s, generator=g) for s in SHAPES]
    steps = [torch.tensor(float(n_taken + i)) for i in range(len(SHAPES))]
    return {"values": values, "gradients": gradients, "first": first, "second": second, "steps": steps}


def run(max_norm: float) -> tuple[Tensor, dict[str, list[Tensor]]]:
    moved = lists()
    versions = [x._version for x in moved["values"]]
    norm = ops.adamw(**moved, decays=DECAYS, max_norm=max_norm, **OPTIONS)
    # Whoever packs weights by their version sees the step.
    assert all(x._version > version for x, version in zip(moved["values"], versions, strict=True))
    return norm, moved


def by_torch(max_norm: float) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """torch's own clipping and optimiser, in float64."""
    moved = {name: [x.double() for x in one] for name, one in lists().items()}
    groups = [{"params": [x], "weight_decay": decay} for x, decay in zip(moved["values"], DECAYS, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98))
    for i, x in enumerate(moved["values"]):
        x.grad = moved["gradients"][i]
        optimizer.state[x] = {"step": moved["steps"][i], "exp_avg": moved["first"][i], "exp_avg_sq": moved["second"][i]}
    norm = torch.nn.utils.clip_grad_norm_(moved["values"], max_norm)
    optimizer.step()
    return norm, moved


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("max_norm", [2.0, math.inf])
def test_equals_torch(max_norm):
    norm, moved = run(max_norm)
    assert ops.dispatch_counts() == {("adamw", "cpp"): 1}
    expected_norm, expected = by_torch(max_norm)
    assert float(norm) == pytest.approx(float(expected_norm), rel=1e-6)
    for name, found in moved.items():
        for x, y in zip(found, expected[name], strict=True):
            assert row_error(x.reshape(1, -1), y.reshape(1, -1)) < 1e-5, (name, list(x.shape))


def test_the_reference_equals_torch():
    with ops.backend("reference"):
        norm, moved = run(2.0)
    expected_norm, expected = by_torch(2.0)
    assert float(norm) == pytest.approx(float(expected_norm), rel=1e-6)
    for x, y in zip(moved["values"], expected["values"], strict=True):
        assert row_error(x.reshape(1, -1), y.reshape(1, -1)) < 1e-5


@pytest.mark.usefixtures("cpp_engine")
def test_bits_do_not_depend_on_the_threads():
    found = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        try:
            norm, moved = run(2.0)
        finally:
            torch.set_num_threads(1)
        found.append([norm, *(x for one in moved.values() for x in one)])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True))


@pytest.mark.usefixtures("cpp_engine")
def test_a_norm_that_is_no_number_shows():
    moved = lists()
    moved["gradients"][0][0] = torch.nan
    norm = ops.adamw(**moved, decays=DECAYS, max_norm=1.0, **OPTIONS)
    assert norm.isnan()
    assert moved["values"][-1].isnan().all()


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gradients", lambda x: x[:-1], "gradients: expected 6, one per parameter, got 5"),
        ("first", lambda x: [x[0].double(), *x[1:]], r"first\[0\]: expected dtype float32, got float64"),
        ("second", lambda x: [x[0][1:], *x[1:]], r"second\[0\]: expected 2310 elements, got 2277"),
        ("values", lambda x: [x[0].T, *x[1:]], r"values\[0\]: expected an array without gaps, got a strided one"),
        ("max_norm", lambda _: 0.0, "max_norm: expected a positive number, got 0.0"),
    ],
    ids=["count", "dtype", "size", "strides", "max_norm"],
)
def test_bad_arguments_are_named(name, change, message):
    arguments = {**lists(), "decays": DECAYS, "max_norm": 1.0, **OPTIONS}
    with pytest.raises(ValueError, match=message):
        ops.adamw(**{**arguments, name: change(arguments[name])})
