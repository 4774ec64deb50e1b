"""plan_attention against a loop over trajectories in float64: forward, gradients, odd sizes, bad input."""

from __future__ import annotations

import itertools

import numpy as np
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


# ---------------------------------------------------------------------------------------------------------------------
# The C++ engine

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(q, k, v, cu) -> None:
    """Forward and all gradients of the C++ engine against the loop in float64 on the same rounded inputs."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    with ops.backend("cpp"):
        out = ops.plan_attention(*leaves, cu)
    expected = by_trajectory(*exact, cu)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    out.backward(weight)
    expected.backward(weight.double())
    assert out.dtype == q.dtype
    assert row_error(out, expected) < BOUNDS[q.dtype]
    assert row_error(leaves[0].grad, exact[0].grad) < BOUNDS[q.dtype]
    # Per trajectory: a plan vector that few tokens look at has next to no gradient of its own.
    for name, ours, theirs in zip("kv", leaves[1:], exact[1:], strict=True):
        assert row_error(ours.grad.flatten(1), theirs.grad.flatten(1)) < BOUNDS[q.dtype], name


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("n_z", [1, 4, 7, 64])
def test_cpp_equals_the_loop(dtype, n_z):
    for lengths in ((1,), (3,), (17,), (1, 1), (5, 1, 70), (0, 33, 0)):
        compare(*inputs(lengths, n_z, 2, 16, dtype))
    assert ops.dispatch_counts() == {("plan_attention", "cpp"): 6}


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("heads", "width"), [(1, 8), (3, 10), (1, 12), (2, 24), (4, 32), (8, 16), (1, 48), (1, 64), (2, 96), (1, 256)]
)
def test_cpp_head_counts_and_widths(dtype, heads, width):
    compare(*inputs((9, 0, 70), 5, heads, width, dtype))


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_cpp_long_sequences_are_cut_into_chunks(dtype):
    compare(*inputs((1030, 7, 1100), 4, 1, 8, dtype))


@pytest.mark.usefixtures("isa")
def test_cpp_reads_strided_views():
    q, k, v, cu = inputs((40, 26), 3, 2, 16, torch.float32)
    with ops.backend("cpp"):
        expected = ops.plan_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu)
        assert torch.equal(ops.plan_attention(q, k, v, cu), expected)
        q_by_head, k_by_head = (x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in (q, k))
        assert torch.equal(ops.plan_attention(q_by_head, k_by_head, v, cu.long()), expected)
        apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
        assert torch.equal(ops.plan_attention(*apart, cu), expected)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_cpp_bits_do_not_depend_on_the_threads(cpp_engine, dtype):
    q, k, v, cu = inputs((1500, 3, 800), 4, 2, 16, dtype)
    weight = torch.randn(q.shape).to(dtype)

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = ops.plan_attention(*leaves, cu)
        return out, *torch.autograd.grad(out, leaves, weight)

    was = torch.get_num_threads()
    first = run()
    try:
        for n_threads in (2, 3):
            torch.set_num_threads(n_threads)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(was)
    assert ops.dispatch_counts() == {("plan_attention", "cpp"): 3}


@pytest.mark.usefixtures("cpp_engine")
def test_cpp_no_tokens():
    q, k, v, _ = inputs((2,), dtype=torch.float32)
    k = k.clone().requires_grad_()
    out = ops.plan_attention(q[:0], k, v, torch.tensor([0, 0]))
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    # Nothing looked at the plan.
    assert float(k.grad.abs().max()) == 0.0


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 7, 7], r"cu_seqlens: expected 0 at position 0, got 1"),
        ([0, 9, 7], r"cu_seqlens: expected offsets that do not fall, got 7 at position 2 after 9"),
        ([0, 3, 8], r"cu_seqlens: expected 7, the number of tokens, at position 2, got 8"),
    ],
    ids=["start", "falling", "long"],
)
def test_cpp_names_bad_offsets(offsets, message):
    q, k, v, _ = inputs((3, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.plan_attention(q, k, v, torch.tensor(offsets))


BAD_ARRAYS = {
    "dtype": ({"q": np.zeros((7, 2, 8))}, r"q: expected dtype float32 or int16 .*, got float64"),
    "dtype of k": ({"k": np.zeros((2, 3, 2, 8), np.int16)}, r"k: expected dtype float32 as q, got int16"),
    "rank": ({"k": np.zeros((2, 3, 16), np.float32)}, r"k: expected shape \(2, \*, 2, 8\), got \(2, 3, 16\)"),
    "vectors": ({x: np.zeros((2, 0, 2, 8), np.float32) for x in "kv"}, r"k: expected at least 1 plan vector"),
    "shape of v": ({"v": np.zeros((2, 2, 2, 8), np.float32)}, r"v: expected shape \(2, 3, 2, 8\), got \(2, 2, 2, 8\)"),
    "stride": ({"v": np.zeros((2, 3, 2, 16), np.float32)[..., ::2]}, r"v: expected neighbouring elements in a head"),
    "out": ({"out": np.zeros((7, 2, 7), np.float32)}, r"out: expected shape \(7, 2, 8\), got \(7, 2, 7\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_the_binding_names_bad_arrays(cpp_engine, change, message):
    arguments = {x: np.zeros((7, 2, 8), np.float32) for x in ("q", "out")}
    arguments |= {x: np.zeros((2, 3, 2, 8), np.float32) for x in ("k", "v")}
    arguments |= {"cu_seqlens": np.array([0, 3, 7]), "n_threads": 1}
    cpp_engine._plan_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        cpp_engine._plan_attention(**(arguments | change))


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_registered_ops(dtype):
    q, k, v, cu = inputs((9, 6), dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.gac_fast.plan_attention.default, (*leaves, cu))
    torch.library.opcheck(torch.ops.gac_fast.plan_attention_backward.default, (q, q, k, v, cu))


@pytest.mark.usefixtures("cpp_engine")
def test_compiles_into_one_graph():
    q, k, v, cu = inputs((9, 6), dtype=torch.float32)

    def attend(k):
        return ops.plan_attention(q, k, v, cu).square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    plain, traced = k.clone().requires_grad_(), k.clone().requires_grad_()
    attend(plain).backward()
    compiled(traced).backward()
    assert torch.equal(plain.grad, traced.grad)
    assert float(plain.grad.abs().max()) > 0
