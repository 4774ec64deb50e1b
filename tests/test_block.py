"""norm_linear and mlp_residual against their formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error

from gac_fast import reference


def parts(dim=10, hidden=14, rows=(5, 3), dtype=torch.float64):
    """x, norm weight and bias, W_in, b_in, W_out, b_out; x with a mean and scale that the norm must remove."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, dim), (dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,))
    x, *weights = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return 3 * x + 7, *weights


def norm_linear(x, norm_w, norm_b, w, b):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return ((x - mean) / (variance + 1e-5).sqrt() * norm_w + norm_b) @ w.T + (0 if b is None else b)


def mlp_residual(x, norm_w, norm_b, w_in, b_in, w_out, b_out):
    h = norm_linear(x, norm_w, norm_b, w_in, b_in)
    return x + (h / (1 + torch.exp(-h))) @ w_out.T + b_out


@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_norm_linear(rows, dtype, bound):
    x, norm_w, norm_b, w, b, *_ = parts(rows=rows, dtype=dtype)
    expected = norm_linear(*(y.double() for y in (x, norm_w, norm_b, w, b)))
    assert row_error(reference.norm_linear(x, norm_w, norm_b, w, b), expected) < bound
    without_bias = norm_linear(*(y.double() for y in (x, norm_w, norm_b, w)), None)
    assert row_error(reference.norm_linear(x, norm_w, norm_b, w, None), without_bias) < bound


@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_mlp_residual(rows, dtype, bound):
    arguments = parts(rows=rows, dtype=dtype)
    assert row_error(reference.mlp_residual(*arguments), mlp_residual(*(x.double() for x in arguments))) < bound


def test_gradients():
    leaves = [x.requires_grad_() for x in parts(dim=4, hidden=5, rows=(3,))]
    assert torch.autograd.gradcheck(reference.mlp_residual, leaves)
    assert torch.autograd.gradcheck(reference.norm_linear, leaves[:5])


def test_a_constant_row_stays_finite():
    x, *weights = parts(rows=(2,))
    x[0] = 7.0
    assert bool(torch.isfinite(reference.mlp_residual(x, *weights)).all())
