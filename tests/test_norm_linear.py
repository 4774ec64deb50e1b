"""norm_linear: a linear map of every token with or without a norm before it; the C++ engine against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.errors import BackendError

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAMES = ("x", "norm_w", "norm_b", "w", "b")


def arguments(n: int, n_in: int, n_out: int, has_norm: bool, seed: int = 0) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g) for s in ((n, n_in), (n_out, n_in), (n_out,)))
    norm_w, norm_b = 1 + 0.3 * torch.randn(n_in, generator=g), 0.3 * torch.randn(n_in, generator=g)
    return [3 * x + 1, norm_w if has_norm else None, norm_b if has_norm else None, w / n_in**0.5, b]


def gradients(function, args: list[Tensor | None], dy: Tensor, wanted: tuple[str, ...] = NAMES, **options):
    leaves = [
        None if x is None else x.detach().requires_grad_(name in wanted) for name, x in zip(NAMES, args, strict=True)
    ]
    y = function(*leaves, **options)
    y.backward(dy.to(y.dtype))
    return y.detach(), [None if x is None else x.grad for x in leaves]


def in_float64(args: list[Tensor | None], dy: Tensor, bf16: bool):
    """The reference; where the engine rounds the operands of products, from operands so rounded."""
    double = [None if x is None else x.double() for x in args]
    if bf16 and args[1] is None:
        double[0], double[3] = args[0].bfloat16().double(), args[3].bfloat16().double()
    return gradients(reference.norm_linear, double, dy.double())


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    ("n", "n_in", "n_out"), [(1, 64, 192), (3, 11, 128), (17, 96, 288), (130, 128, 384), (65, 7, 3), (64, 192, 33)]
)
def test_forward_and_gradients_equal_the_reference(n, n_in, n_out, has_norm, bf16):
    args = arguments(n, n_in, n_out, has_norm)
    dy = torch.randn(n, n_out, generator=torch.Generator().manual_seed(1))
    bound = BOUNDS[torch.bfloat16 if bf16 else torch.float32]
    expected, expected_grads = in_float64(args, dy, bf16)
    y, grads = gradients(ops.norm_linear, args, dy, bf16=bf16)
    assert ops.dispatch_counts() == {("norm_linear", "cpp"): 1}
    assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert row_error(y, expected) < bound
    for name, grad, reference_grad in zip(NAMES, grads, expected_grads, strict=True):
        assert (grad is None) == (reference_grad is None), name
        if grad is None or reference_grad is None:
            continue
        # A row of a weight's gradient sums random signs over few tokens; bfloat16 rounds each of what is summed.
        if name == "x" or not bf16:
            assert row_error(grad, reference_grad) < bound, name
        else:
            assert float((grad - reference_grad).norm() / reference_grad.norm()) < bound, name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_strided_and_bfloat16_rows(dtype, has_norm):
    """Every other row of a wider array, as the state tokens of a step are."""
    args = arguments(40, 64, 96, has_norm)
    wide = torch.full((80, 70), torch.nan, dtype=dtype)
    wide[::2, 3:67] = args[0].to(dtype)
    args[0] = wide[::2, 3:67]
    bf16 = dtype == torch.bfloat16
    dy = torch.randn(40, 192, generator=torch.Generator().manual_seed(1))[:, ::2]
    expected, expected_grads = in_float64(args, dy, bf16)
    y, grads = gradients(ops.norm_linear, args, dy, bf16=bf16)
    assert grads[0].dtype == dtype
    assert row_error(y, expected) < BOUNDS[dtype]
    assert row_error(grads[0], expected_grads[0]) < BOUNDS[dtype]


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize("wanted", [("x",), ("w",), ("b",), ("norm_b",), ("x", "norm_w")], ids="-".join)
def test_gradients_only_where_asked_for(wanted):
    args = arguments(9, 32, 20, True)
    dy = torch.randn(9, 20)
    _, grads = gradients(ops.norm_linear, args, dy, wanted)
    _, expected = gradients(ops.norm_linear, args, dy)
    for name, grad, full in zip(NAMES, grads, expected, strict=True):
        if name in wanted:
            assert torch.equal(grad, full)
        else:
            assert grad is None


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_bits_do_not_depend_on_threads(bf16):
    args = arguments(5000, 64, 96, True)
    dy = torch.randn(5000, 96, generator=torch.Generator().manual_seed(1))
    found = []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            y, grads = gradients(ops.norm_linear, args, dy, bf16=bf16)
            found.append([y, *grads])
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("cpp_engine")
def test_no_tokens():
    args = arguments(0, 16, 8, True)
    y, grads = gradients(ops.norm_linear, args, torch.empty(0, 8))
    assert y.shape == (0, 8)
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.usefixtures("cpp_engine")
def test_registered_op_passes_opcheck(has_norm, bf16):
    args = [None if x is None else x.requires_grad_() for x in arguments(5, 16, 8, has_norm)]
    torch.library.opcheck(torch.ops.gac_fast.norm_linear.default, (*args, bf16, True))


@pytest.mark.usefixtures("cpp_engine")
def test_compiles_into_one_graph():
    args = arguments(6, 16, 8, True)
    compiled = torch.compile(lambda *a: 2 * ops.norm_linear(*a), fullgraph=True, backend="aot_eager")
    dy = torch.randn(6, 8)
    y, grads = gradients(compiled, args, dy)
    expected, expected_grads = gradients(lambda *a: 2 * ops.norm_linear(*a), args, dy)
    assert all(torch.equal(a, b) for a, b in zip([y, *grads], [expected, *expected_grads], strict=True))


def test_reference_takes_autocast_and_float64():
    args = arguments(4, 16, 8, True)
    with ops.backend("reference"):
        assert ops.norm_linear(*args, bf16=True).dtype == torch.bfloat16
    assert ops.norm_linear(*(x.double() for x in args)).dtype == torch.float64
    assert ops.dispatch_counts() == {("norm_linear", "reference"): 2}
    with ops.backend("cpp"), pytest.raises(BackendError, match=r"norm_linear: .* float64"):
        ops.norm_linear(*(x.double() for x in args))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4, 15)}, r"x: expected shape \[N, 16\], got \[4, 15\]"),
        ({"x": torch.ones(4, 16).bfloat16()}, "x: expected dtype float32, got bfloat16"),
        ({"w": torch.ones(8, 16).bfloat16()}, "w: expected dtype float32 or float64, got bfloat16"),
        ({"w": torch.ones(0, 16)}, r"w: expected sizes of at least 1, got \[0, 16\]"),
        ({"b": torch.ones(7)}, r"b: expected shape \[8\], got \[7\]"),
        ({"b": torch.ones(8).double()}, "b: expected dtype float32, got float64"),
        ({"norm_b": None}, "norm_b: expected None where norm_w is None, and only there"),
        ({"norm_w": torch.ones(15)}, r"norm_w: expected shape \[16\], got \[15\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_named(changes, message):
    args = dict(zip(NAMES, arguments(4, 16, 8, True), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        ops.norm_linear(**args)
