"""Speed of a decoder layer's token-local part at `gym` size: 4 trajectories of 1,000 steps with two tokens each."""

from __future__ import annotations

import pytest
import torch

from gac_fast import ops, reference
from gac_fast.reference import BlockWeights

DIM, HEADS, N_Z, HIDDEN, N_TOKENS = 128, 4, 4, 512, 8000
PASSES = ("forward", "backward", "backward_with_weights")


def inputs():
    """x, attended, plan keys and values, cu_seqlens, weights of a middle layer, gradients of x_out and y."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    matrices = {"w_in": (HIDDEN, DIM), "w_out": (DIM, HIDDEN), "w_next": (3 * DIM, DIM)}
    vectors = {"b_in": HIDDEN, "b_next": 3 * DIM}
    weights = BlockWeights(
        *(
            normal(*matrices.get(name, (DIM, DIM))) / DIM**0.5 if name.startswith("w_") else
            normal(vectors.get(name, DIM)) for name in BlockWeights._fields
        )
    )  # fmt: skip
    cu_seqlens = torch.arange(5, dtype=torch.int32) * (N_TOKENS // 4)
    plan = normal(4, N_Z, 2, HEADS, DIM // HEADS)
    stream = normal(N_TOKENS, DIM), normal(N_TOKENS, DIM)
    return (*stream, plan, cu_seqlens, weights, (normal(N_TOKENS, DIM), normal(N_TOKENS, 3 * DIM)))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("what", PASSES)
def test_block(benchmark, cpu_backend, what, bf16):
    x, attended, plan, cu_seqlens, weights, (dx_out, dy) = inputs()
    weights = BlockWeights(*(w.requires_grad_(what == "backward_with_weights") for w in weights))
    x, plan = x.requires_grad_(), plan.requires_grad_()
    attended = attended.to(torch.bfloat16 if bf16 else torch.float32).requires_grad_()
    leaves = [x, attended, plan, *(w for w in weights if w.requires_grad)]

    def forward():
        return ops.decoder_block(x, attended, *plan.unbind(2), cu_seqlens, weights, bf16)

    out = forward()
    expected = reference.decoder_block(x, attended.float(), *plan.unbind(2), cu_seqlens, weights)
    gradients = (dx_out, dy.to(out[1].dtype))

    def backward():
        return torch.autograd.grad(out, leaves, gradients, retain_graph=True)

    bound = 2e-2 if bf16 else 1e-4
    found, wanted = (*out, *backward()), (*expected, *torch.autograd.grad(expected, leaves, (dx_out, dy)))
    for one, other in zip(found, wanted, strict=True):
        assert float((one.float() - other).norm()) < bound * float(other.norm())

    maps = 3 * DIM * DIM + 2 * DIM * HIDDEN + 3 * DIM * DIM
    benchmark.extra_info["flop"] = 2 * N_TOKENS * maps * (2 if what == "backward_with_weights" else 1)
    benchmark(forward if what == "forward" else backward)
