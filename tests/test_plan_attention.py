"""plan_attention against a loop over trajectories in float64: forward, gradients, odd sizes, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import row_error
from torch import Tensor

from gac_fast import ops


def by_trajectory(q, k, v, cu_seqlens) -> Tensor:
    """The definition, one trajectory at a time."""
    parts = []
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        score = torch.einsum("nhd,zhd->nhz", q[start:stop], k[i]) / q.shape[-1] ** 0.5
        parts.append(torch.einsum("nhz,zhd->nhd", torch.softmax(score, dim=-1), v[i]))
    return torch.cat(parts)


def inputs(lengths, n_z=3, heads=2, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths), heads, width, generator=generator, dtype=torch.float64)
    kv = torch.randn(len(lengths), n_z, 2, heads, width, generator=generator, dtype=torch.float64)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return (q.to(dtype), *kv.to(dtype).unbind(2), cu)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("n_z", [1, 4])
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (5, 1, 70), (64, 65, 63), (130, 3), (0, 5, 0)], ids=str)
def test_equals_the_loop(lengths, n_z):
    q, k, v, cu = inputs(lengths, n_z)
    assert row_error(ops.plan_attention(q, k, v, cu), by_trajectory(q, k, v, cu)) < 1e-12
    assert ops.dispatch_counts() == {("plan_attention", "reference"): 1}


@pytest.mark.parametrize(("heads", "width"), [(1, 8), (3, 10), (1, 256)])
def test_head_counts_and_widths(heads, width):
    q, k, v, cu = inputs((9, 20), 2, heads, width)
    assert row_error(ops.plan_attention(q, k, v, cu), by_trajectory(q, k, v, cu)) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_lower_precision(dtype, bound):
    q, k, v, cu = inputs((31, 50), dtype=dtype)
    out = ops.plan_attention(q, k, v, cu)
    assert out.dtype == dtype
    assert row_error(out, by_trajectory(q.double(), k.double(), v.double(), cu)) < bound


def test_gradients_equal_those_of_the_loop():
    q, k, v, cu = inputs((70, 1, 25))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    copies = [x.clone().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    (ops.plan_attention(*leaves, cu) * weight).sum().backward()
    (by_trajectory(*copies, cu) * weight).sum().backward()
    for name, ours, theirs in zip("qkv", leaves, copies, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-12), name


def test_gradcheck():
    q, k, v, cu = inputs((3, 1), n_z=2, heads=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: ops.plan_attention(q, k, v, cu), leaves)


def test_a_token_sees_the_plan_of_its_own_trajectory_alone():
    q, k, v, cu = inputs((3, 2))
    v = v.clone().requires_grad_()
    out = ops.plan_attention(q, k, v, cu)
    for token, owner in ((0, 0), (2, 0), (3, 1), (4, 1)):
        (grad,) = torch.autograd.grad(out[token].sum(), v, retain_graph=True)
        assert bool((grad[owner].abs().sum((1, 2)) > 0).all())
        assert float(grad[1 - owner].abs().sum()) == 0.0


def test_no_tokens():
    q, k, v, _ = inputs((2,))
    cu = torch.tensor([0, 0], dtype=torch.int32)
    assert ops.plan_attention(q[:0], k, v, cu).shape == (0, 2, 8)


BAD = {
    "dtype of q": (lambda a: a | {"q": a["q"].half()}, r"q: expected dtype .* or float64, got float16"),
    "dtype of v": (lambda a: a | {"v": a["v"].float()}, r"v: expected dtype float64, got float32"),
    "rank": (lambda a: a | {"q": a["q"][0]}, r"q: expected shape \[N, H, d\], got \[2, 8\]"),
    "plans of another number of trajectories": (
        lambda a: a | {"k": a["k"][:1]}, r"k: expected shape \[2, n_z, 2, 8\], got \[1, 3, 2, 8\]"
    ),
    "v of another number of vectors": (
        lambda a: a | {"v": a["v"][:, :2]}, r"v: expected shape \[2, 3, 2, 8\], got \[2, 2, 2, 8\]"
    ),
    "no plan vectors": (lambda a: a | {x: a[x][:, :0] for x in "kv"}, r"k: expected at least 1 plan vector"),
    "narrow": (lambda a: a | {x: a[x][..., :6] for x in "qkv"}, r"even head width of 8 to 256, got 6"),
    "offsets' dtype": (lambda a: a | {"cu_seqlens": a["cu_seqlens"].float()}, r"cu_seqlens: expected dtype int32 or"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, message):
    q, k, v, cu = inputs((3, 4))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cu}
    ops.plan_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        ops.plan_attention(**change(arguments))
