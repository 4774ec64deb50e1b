"""action_errors: mean squared errors of tanh(y) by dimension; the C++ engine against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error

from gac_fast import ops, reference


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(("n", "act_dim", "some"), [(1, 1, False), (7, 3, True), (2600, 6, True), (1025, 17, False)])
def test_errors_and_gradient_equal_the_reference(n, act_dim, some, bf16):
    g = torch.Generator().manual_seed(n)
    y = (2 * torch.randn(n, act_dim, generator=g)).to(torch.bfloat16 if bf16 else torch.float32)
    actions, grad = 2 * torch.rand(n, act_dim, generator=g) - 1, torch.rand(act_dim, generator=g)
    counts = torch.rand(n, generator=g) < 0.7 if some else None
    leaves = y.clone().requires_grad_(), y.double().requires_grad_()
    expected = reference.action_errors(leaves[1], actions.double(), counts)
    found = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        try:
            errors = ops.action_errors(leaves[0], actions, counts)
            found += [errors.detach(), *torch.autograd.grad(errors, leaves[0], grad)]
        finally:
            torch.set_num_threads(1)
    assert ops.dispatch_counts() == {("action_errors", "cpp"): 2}
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert row_error(found[0], expected) < 1e-5
    # The gradient is of the type of y.
    expected.backward(grad.double())
    bound = 2e-2 if bf16 else 1e-5
    assert row_error(found[1].float().view(1, -1), leaves[1].grad.view(1, -1)) < bound
    if counts is not None:
        assert not found[1][~counts].any()


@pytest.mark.usefixtures("cpp_engine")
def test_of_no_steps_there_is_no_mean():
    y = torch.zeros(3, 2, requires_grad=True)
    errors = ops.action_errors(y, torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool))
    errors.sum().backward()
    assert errors.isnan().all()


@pytest.mark.parametrize(
    ("y", "actions", "counts", "message"),
    [
        ((3,), (3, 2), None, r"y: expected shape \[n, act_dim\], got \[3\]"),
        ((3, 2), (3, 1), None, r"actions: expected shape \[3, 2\], got \[3, 1\]"),
        ((3, 2), (3, 2), (2,), r"counts: expected shape \[3\], got \[2\]"),
    ],
)
def test_bad_arguments_are_named(y, actions, counts, message):
    flags = None if counts is None else torch.ones(counts, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        ops.action_errors(torch.zeros(y), torch.zeros(actions), flags)
