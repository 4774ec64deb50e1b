"""Speed of a layer norm and the map behind it, as the first layer has it: all gradients in the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import ROW_BOUND, Case, engine_problem, row_error, under
from torch import Tensor

from gac_fast import ops

NAMES = ("y", "dx", "dnorm_w", "dnorm_b", "dw", "db")


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_norm_linear(compare, tiny, mode):
    n, n_in, n_out = (20, 32, 96) if tiny else (8000, 128, 384)
    torch.manual_seed(0)
    shapes = ((n, n_in), (n_in,), (n_in,), (n_out, n_in), (n_out,))
    x, norm_w, norm_b, w, b = (torch.randn(shape) for shape in shapes)
    # What bfloat16 can hold: all dtypes then do the same sum.
    exact = [y.bfloat16().double() for y in (x, 1 + 0.1 * norm_w, 0.1 * norm_b, w / n_in**0.5, 0.1 * b)]
    dy = torch.randn(n, n_out).bfloat16().double()

    def prepare(dtype: str, backend: str) -> tuple[Callable[[], object], list[Tensor]]:
        """The timed call, and the output and gradients of one pass."""
        bf16 = dtype == "bfloat16"
        leaves = [y.to(torch.float32 if bf16 else getattr(torch, dtype)).requires_grad_() for y in exact]

        def forward() -> Tensor:
            return ops.norm_linear(*leaves, bf16=bf16)

        out = under(backend, forward)()
        gradient = dy.to(out.dtype)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

        return under(backend, forward if mode == "fwd" else backward), [out.detach(), *under(backend, backward)()]

    _, expected = prepare("float64", "reference")
    providers: dict[tuple[str, str], Callable[[], object] | str] = {}
    for name in ("reference", "cpp"):
        for dtype in ("float32", "bfloat16"):
            problem = engine_problem("norm_linear", dtype) if name == "cpp" else None
            if problem is not None:
                providers[name, dtype] = problem
                continue
            providers[name, dtype], results = prepare(dtype, name)
            for what, value, right in zip(NAMES, results, expected, strict=True):
                error = row_error(value.flatten(), right.flatten())  # single rows are held in tests/test_norm_linear.py
                assert error < ROW_BOUND[dtype], f"{name} {dtype} {what}: {error:.2e}"

    flops = 2.0 * n * n_in * n_out * (1 if mode == "fwd" else 2)
    rows = {"fwd": n_in + n_out, "bwd": 2 * n_in + n_out}[mode]
    shape = f"{'tiny ' * tiny}N={n} {n_in} to {n_out}"
    compare(Case("norm_linear", mode, shape, flops, {"float32": 4.0 * n * rows, "bfloat16": 2.0 * n * rows}), providers)
