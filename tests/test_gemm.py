"""The packed products that the C++ ops are made of: every path of the processor, odd sizes, both precisions."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("begin", ["zero", "bias", "add"])
@pytest.mark.parametrize(("n_out", "n_in"), [(128, 128), (33, 17), (2, 7), (96, 64), (256, 512)])
def test_packed_products(cpp_engine, n_out, n_in, begin, bf16):
    generator = torch.Generator().manual_seed(0)
    for m in (1, 2, 3, 4, 5, 6, 11, 12, 13, 16, 17, 31, 32, 33, 64):
        x, w, y = (torch.randn(*size, generator=generator) for size in ((m, n_in), (n_out, n_in), (m, n_out)))
        bias = torch.randn(n_out, generator=generator)
        rounded = (v.bfloat16().double() if bf16 else v.double() for v in (x, w))
        expected = torch.matmul(*(v.T if i else v for i, v in enumerate(rounded)))
        expected += {"zero": 0, "bias": bias, "add": y}[begin]
        for transposed in (False, True):
            out = y.clone()
            cpp_engine._gemm(
                x.numpy(),
                (w.T.contiguous() if transposed else w).numpy(),
                bias.numpy() if begin == "bias" else None,
                out.numpy(),
                transposed=transposed,
                add=begin == "add",
                bf16=bf16,
            )
            assert row_error(out, expected) < 1e-5, f"m = {m}, transposed = {transposed}"


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(("n_out", "n_in"), [(128, 128), (33, 17)])
def test_a_row_does_not_depend_on_the_rows_beside_it(cpp_engine, n_out, n_in, bf16):
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*size, generator=generator) for size in ((70, n_in), (n_out, n_in), (n_out,)))

    def product(rows: slice) -> torch.Tensor:
        out = torch.empty(len(x[rows]), n_out)
        cpp_engine._gemm(x[rows].numpy(), w.numpy(), bias.numpy(), out.numpy(), bf16=bf16)
        return out

    whole = product(slice(None))
    for m in range(1, 35):
        for first in (0, 70 - m):
            rows = slice(first, first + m)
            assert torch.equal(product(rows), whole[rows]), f"rows {first} to {first + m}"


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_may_lie_apart(cpp_engine, transposed):
    generator = torch.Generator().manual_seed(0)
    x, w, y = (torch.randn(*size, generator=generator) for size in ((5, 9), (5, 20) if transposed else (9, 12), (7, 8)))
    bias = torch.randn(14, generator=generator)
    x, y, bias = x[::2, 2:7], y[::3, :7], bias[::2]
    w = w[:, 4:11] if transposed else w[2:, 1:6]
    out = y.numpy()
    cpp_engine._gemm(x.numpy(), w.numpy(), bias.numpy(), out, transposed=transposed)
    assert row_error(y, x.double() @ (w.double() if transposed else w.double().T) + bias) < 1e-5
