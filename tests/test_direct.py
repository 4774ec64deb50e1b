"""Ops of the C++ engine with and without torch's dispatcher: who looks on sees them, and the bits are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gac_fast import ops
from gac_fast.reference import BlockWeights

DIM, HEADS = 32, 4


class Watching(TorchDispatchMode):
    """Notes the engine's ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gac_fast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def cases() -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """By the name of the op: a call that gives [9, ...], and what it gives gradients to."""
    torch.manual_seed(0)
    cu = torch.tensor([0, 4, 9])
    heads = [normal(9, HEADS, DIM // HEADS) for _ in range(3)]
    qkv, x, attended = normal(9, 3, HEADS, DIM // HEADS), normal(9, DIM), normal(9, DIM)
    plan = [normal(2, 3, HEADS, DIM // HEADS) for _ in range(2)]
    sizes = {"w_in": (48, DIM), "b_in": (48,), "w_out": (DIM, 48), "w_next": (24, DIM), "b_next": (24,)}
    weights = BlockWeights(
        *(normal(*sizes.get(name, (DIM, DIM) if name.startswith("w_") else (DIM,))) for name in BlockWeights._fields)
    )
    w, b, norm_w, norm_b = normal(24, DIM), normal(24), normal(DIM), normal(DIM)
    return {
        "window_attention": (lambda: ops.window_attention(*heads, cu, 3), heads),
        "window_attention_qkv": (lambda: ops.window_attention_qkv(qkv, cu, 3), [qkv]),
        "block": (
            lambda: torch.cat(ops.decoder_block(x, attended, *plan, cu, weights), dim=1),
            [x, attended, *plan, *weights],
        ),
        "norm_linear": (lambda: ops.norm_linear(x, norm_w, norm_b, w, b), [x, norm_w, norm_b, w, b]),
    }


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize("name", ["window_attention", "window_attention_qkv", "block", "norm_linear"])
def test_who_looks_on_sees_the_ops_and_the_bits_are_the_same(name):
    run, leaves = cases()[name]
    gradient = torch.randn(run().shape)
    alone = [run(), *torch.autograd.grad(run(), leaves, gradient)]
    with Watching() as watching:
        out = run()
        watched = [out, *torch.autograd.grad(out, leaves, gradient)]
    backward = f"{name.removesuffix('_qkv')}_backward"
    assert watching.seen == [name, backward]
    assert all(torch.equal(x, y) for x, y in zip(alone, watched, strict=True))
    with torch.no_grad():
        assert torch.equal(run(), out)
        assert not run().requires_grad
    # Nobody may take the gradient for one without dependence on the inputs.
    (grad, *_) = torch.autograd.grad(run(), leaves, gradient, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
