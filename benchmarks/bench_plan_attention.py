"""Speed of the attention of every token to its trajectory's plan vectors, forward and backward, beside torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import ROW_BOUND, Case, engine_problem, row_error, under
from torch import Tensor

from gac_fast import ops


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_plan_attention(compare, tiny, mode):
    b, t, heads, width, n_z = (2, 10, 2, 8, 3) if tiny else (4, 2000, 4, 32, 4)
    n = b * t
    torch.manual_seed(0)
    # The same in every dtype: q, k, v and the upstream gradient.
    shapes = ((n, heads, width), (b, n_z, heads, width), (b, n_z, heads, width), (n, heads, width))
    exact = [torch.randn(shape).bfloat16().double() for shape in shapes]
    cu_seqlens = torch.arange(b + 1, dtype=torch.int32) * t

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.plan_attention(q, k, v, cu_seqlens)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # episodes of one length alone allow it
        q, k, v = q.view(b, t, heads, width).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    def prepare(attend: Callable[..., Tensor], dtype: str, backend: str) -> tuple[Callable[[], object], list[Tensor]]:
        """The timed call, and output and gradients of one pass."""
        q, k, v, g = (x.to(getattr(torch, dtype), copy=True) for x in exact)
        inputs = [x.requires_grad_(True) for x in (q, k, v)]
        forward = under(backend, lambda: attend(q, k, v))

        def backward(out: object, keep: bool = False) -> tuple[Tensor, ...]:
            # Returned, not accumulated: there is nothing to clear.
            return torch.autograd.grad(out, inputs, g, retain_graph=keep)

        out = forward()
        results = [out.detach(), *under(backend, lambda: backward(out, keep=True))()]
        calls = {
            "fwd": forward,
            "bwd": under(backend, lambda: backward(out, keep=True)),
            "fwd+bwd": under(backend, lambda: backward(attend(q, k, v))),
        }
        return calls[mode], results

    _, expected = prepare(op, "float64", "reference")
    wanted = [("sdpa", "float32", sdpa, ""), ("reference", "float32", op, "reference")]
    wanted += [("cpp", dtype, op, "cpp") for dtype in ("float32", "bfloat16")]
    providers: dict[tuple[str, str], object] = {}
    for name, dtype, attend, backend in wanted:
        problem = engine_problem("plan_attention", dtype) if name == "cpp" else None
        if problem is not None:
            providers[name, dtype] = problem
            continue
        providers[name, dtype], results = prepare(attend, dtype, backend)
        for what, x, y in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
            error = row_error(x, y)
            # dq is a difference of n_z terms, and in a few rows of many it all but vanishes: peers get more room.
            assert error < ROW_BOUND[dtype] * (1 if name == "cpp" else 10), f"{name} {dtype} {what}: {error:.2e}"

    products = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}[mode]
    tensors = {"fwd": 2, "bwd": 3, "fwd+bwd": 4}[mode]  # of the tokens; the plan's are small
    size = n * heads * width
    case = Case(
        "plan_attention", mode, f"{'tiny ' * tiny}B={b} T={t} H={heads} d={width} n_z={n_z}",
        2.0 * products * n * n_z * heads * width,
        {"float32": 4.0 * tensors * size, "bfloat16": 2.0 * tensors * size},
    )  # fmt: skip
    compare(case, providers)
