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
