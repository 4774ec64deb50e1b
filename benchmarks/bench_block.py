"""Speed of a decoder layer's token-local part, forward and backward, the latter as Langevin steps and as training ask.

Langevin steps want the gradients of the stream and the plan alone (``bwd frozen``), training those of the weights too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import ROW_BOUND, Case, compiled, engine_problem, instead, row_error, under
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.reference import BlockWeights


def exact_inputs(b: int, t: int, heads: int, width: int, n_z: int, hidden: int) -> tuple[list[Tensor], BlockWeights]:
    """x, attended, plan keys and values, gradients of x_out and y; weights of a middle layer. The same in any dtype."""
    torch.manual_seed(0)
    n, dim = b * t, heads * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    matrices = {"w_in": (hidden, dim), "w_out": (dim, hidden), "w_next": (3 * dim, dim)}
    vectors = {"b_in": hidden, "b_next": 3 * dim}
    weights = []
    for name in BlockWeights._fields:
        if name.startswith("w_"):
            out, inner = matrices.get(name, (dim, dim))
            weights.append(normal(out, inner) / inner**0.5)
        elif name.startswith("norm") and name.endswith("_w"):
            weights.append(1 + 0.1 * normal(dim))
        else:
            weights.append(0.1 * normal(vectors.get(name, dim)))
    plan = (normal(b, n_z, heads, width), normal(b, n_z, heads, width))
    tensors = [normal(n, dim), normal(n, dim), *plan, normal(n, dim), normal(n, 3 * dim)]
    return [x.bfloat16().double() for x in tensors], BlockWeights(*(w.bfloat16().double() for w in weights))


@pytest.mark.parametrize("mode", ["fwd", "bwd frozen", "bwd"])
def test_block(compare, tiny, compilers, mode):
    b, t, heads, width, n_z, hidden = (2, 10, 2, 16, 2, 64) if tiny else (4, 2000, 4, 32, 4, 512)
    n, dim = b * t, heads * width
    exact, exact_weights = exact_inputs(b, t, heads, width, n_z, hidden)
    cu_seqlens = torch.arange(b + 1, dtype=torch.int32) * t

    def prepare(
        dtype: str, backend: str, block: Callable[..., tuple[Tensor, Tensor]] = ops.decoder_block
    ) -> tuple[Callable[[], object], list[Tensor]]:
        """The timed call, and outputs and gradients of one pass."""
        bf16 = dtype == "bfloat16"  # then as the decoder has it: stream and weights in float32
        stream_dtype = torch.float32 if bf16 else getattr(torch, dtype)
        x, attended, plan_k, plan_v, dx_out, dy = (y.to(stream_dtype, copy=True) for y in exact)
        if bf16:
            attended = attended.bfloat16()
        leaves = [y.requires_grad_() for y in (x, attended, plan_k, plan_v)]
        weights = BlockWeights(*(w.to(stream_dtype, copy=True).requires_grad_(mode == "bwd") for w in exact_weights))
        leaves += [w for w in weights if w.requires_grad]

        def forward() -> tuple[Tensor, Tensor]:
            return block(x, attended, plan_k, plan_v, cu_seqlens, weights, bf16)

        out = under(backend, forward)()
        gradients = (dx_out, dy.to(out[1].dtype))

        def backward() -> tuple[Tensor, ...]:
            # Returned, not accumulated: there is nothing to clear.
            return torch.autograd.grad(out, leaves, gradients, retain_graph=True)

        results = [*(y.detach() for y in out), *under(backend, backward)()]
        return under(backend, forward if mode == "fwd" else backward), results

    _, expected = prepare("float64", "reference")
    wanted = [(name, dtype) for name in ("reference", "cpp") for dtype in ("float32", "bfloat16")]
    names = ("x_out", "y", "dx", "dattended", "dplan_k", "dplan_v", *(f"d{name}" for name in BlockWeights._fields))
    providers: dict[tuple[str, str], Callable[[], object] | str] = {}
    for name, dtype in wanted:
        problem = engine_problem("block", dtype) if name == "cpp" else None
        if problem is not None:
            providers[name, dtype] = problem
            continue
        providers[name, dtype], results = prepare(dtype, name)
        for what, x, y in zip(names, results, expected, strict=False):  # weights have gradients in one mode
            error = row_error(x.flatten(), y.flatten())  # single rows are held in tests/test_block.py
            assert error < ROW_BOUND[dtype], f"{name} {dtype} {what}: {error:.2e}"

    def compile_block(by: Callable[..., Callable[..., tuple[Tensor, Tensor]]]) -> Callable[[], object]:
        run, results = prepare("float32", "reference", by(reference.decoder_block))
        for what, x, y in zip(names, results, expected, strict=False):
            error = row_error(x.flatten(), y.flatten())
            assert error < ROW_BOUND["float32"], f"{what}: {error:.2e}"
        return run

    # One compilation is of forward and backward together; that of frozen weights would be another.
    if mode == "bwd frozen":
        compilers = instead(compilers, "left out: compiled with all gradients alone")
    providers = {**compiled(compilers, compile_block), **providers}

    maps = 6 * dim**2 + 2 * dim * hidden
    macs = {"fwd": maps + 2 * n_z * dim, "bwd frozen": maps + 4 * n_z * dim, "bwd": 2 * maps + 4 * n_z * dim}[mode]
    # Elements of [N, D]: those always in float32 (the stream and its gradient), and those in the row's dtype.
    stream, others = (2, 4) if mode == "fwd" else (3, 5)
    case = Case(
        "block", mode, f"{'tiny ' * tiny}B={b} T={t} H={heads} d={width} n_z={n_z} hidden={hidden}",
        2.0 * n * macs,
        {"float32": 4.0 * (stream + others) * n * dim, "bfloat16": (4.0 * stream + 2.0 * others) * n * dim},
    )  # fmt: skip
    compare(case, providers)
