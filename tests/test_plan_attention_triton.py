"""plan_attention on the Triton engine: by the interpreter in float32, compiled without a GPU, on a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error
from kernel_fixtures import assert_fits, compile_cases
from test_plan_attention import by_trajectory, inputs
from torch import Tensor

from gac_fast import ops
from gac_fast.errors import BackendError

pytest.importorskip("triton")

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(q, k, v, cu) -> None:
    """Forward and all gradients against the loop in float64 on the same rounded inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    if q.is_cuda:
        out = ops.plan_attention(*leaves, cu)
    else:
        with ops.backend("triton"):
            out = ops.plan_attention(*leaves, cu)
    expected = by_trajectory(*exact, cu.cpu())
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    out.backward(weight.to(q.device))
    expected.backward(weight.double())
    assert out.dtype == q.dtype
    assert row_error(out, expected) < BOUNDS[q.dtype]
    # With one plan vector the weights are constant and q has no gradient: rows count by their absolute error below a
    # tenth of the terms that cancel, which grow with the root of d.
    floor = 0.1 * max(1.0, (q.shape[-1] / 8) ** 0.5)
    error = (leaves[0].grad.cpu().double() - exact[0].grad).norm(dim=-1) / exact[0].grad.norm(dim=-1).clamp(min=floor)
    assert float(error.nan_to_num(nan=1e9).max()) < BOUNDS[q.dtype]
    # Per trajectory: a plan vector that few tokens look at has next to no gradient of its own.
    for name, ours, theirs in zip("kv", leaves[1:], exact[1:], strict=True):
        error = (ours.grad.cpu().double() - theirs.grad).flatten(1).norm(dim=-1)
        assert float((error / theirs.grad.flatten(1).norm(dim=-1).clamp(min=floor)).max()) < BOUNDS[q.dtype], name


def test_triton_interpreter_agrees(run_interpreted):
    run_interpreted(__file__)


# ---------------------------------------------------------------------------------------------------------------------
# By the interpreter


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("n_z", [1, 4, 7, 16])
def test_interpreted_equals_the_loop(n_z):
    for lengths in ((1,), (5, 1, 130), (0, 33, 0), (64, 65, 63)):
        compare(*inputs(lengths, n_z, 2, 16, torch.float32))
    assert ops.dispatch_counts() == {("plan_attention", "triton"): 4}


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("heads", "width"), [(3, 10), (1, 24), (4, 32), (1, 96), (1, 256)])
def test_interpreted_head_counts_and_widths(heads, width):
    compare(*inputs((9, 0, 70), 5, heads, width, torch.float32))


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("size", [16, 128])
def test_interpreted_tiles_of_other_dtypes(size, monkeypatch):
    from gac_fast.kernels import plan_attention as kernel
    from gac_fast.kernels._launch import Option

    monkeypatch.setattr(kernel, "_options", lambda *args, **kwargs: [Option((("BT", size),), 4, 1)])
    compare(*inputs((40, 1, 0, 150), 4, 2, 8, torch.float32))


@pytest.mark.interpreter
def test_interpreted_reads_strided_views():
    q, k, v, cu = inputs((40, 26), 3, 2, 16, torch.float32)
    with ops.backend("triton"):
        expected = ops.plan_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu)
        assert torch.equal(ops.plan_attention(q, k, v, cu), expected)
        q_by_head, k_by_head = (x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in (q, k))
        assert torch.equal(ops.plan_attention(q_by_head, k_by_head, v, cu.long()), expected)
        apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
        assert torch.equal(ops.plan_attention(*apart, cu), expected)
        offsets = torch.stack((cu, cu), 1)[:, 0]
        assert torch.equal(ops.plan_attention(q, k, v, offsets), expected)


@pytest.mark.interpreter
def test_interpreted_gradients_that_are_expanded_or_strided():
    q, k, v, cu = inputs((9, 0, 20), 3, 2, 8, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with ops.backend("triton"):
        out = ops.plan_attention(*leaves, cu)
    expected = by_trajectory(*exact, cu)
    for gradient in (torch.ones(()).expand(29, 2, 8), torch.randn(29, 8, 2).transpose(1, 2)):
        ours = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        theirs = torch.autograd.grad(expected, exact, gradient.double(), retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.interpreter
def test_interpreted_no_tokens():
    q, k, v, _ = inputs((2,), dtype=torch.float32)
    k = k.clone().requires_grad_()
    with ops.backend("triton"):
        out = ops.plan_attention(q[:0], k, v, torch.tensor([0, 0]))
    out.sum().backward()
    assert out.shape == (0, 2, 8)
    # Nothing looked at the plan.
    assert float(k.grad.abs().max()) == 0.0


@pytest.mark.interpreter
def test_interpreted_offsets_that_break_the_contract_stay_within_the_tensors():
    q, k, v, _ = inputs((3, 4), dtype=torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for offsets in ([-5, 3, 7], [0, 7, 3], [0, 3, 2**20]):
        with ops.backend("triton"):
            ops.plan_attention(*leaves, torch.tensor(offsets)).sum().backward()


@pytest.mark.interpreter
def test_interpreted_same_bits_every_time():
    q, k, v, cu = inputs((150, 3, 80), 4, 2, 8, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run():
        with ops.backend("triton"):
            out = ops.plan_attention(*leaves, cu)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.interpreter
def test_interpreted_more_plan_vectors_than_a_tile_holds():
    q, k, v, cu = inputs((3, 4), 17, dtype=torch.float32)
    message = "plan_attention: .* the Triton engine takes 1 to 16 plan vectors, got 17"
    with ops.backend("triton"), pytest.raises(BackendError, match=message):
        ops.plan_attention(q, k, v, cu)
    # Other engines take them.
    with ops.backend("reference"):
        ops.plan_attention(q, k, v, cu)


@pytest.mark.interpreter
def test_interpreted_registered_ops():
    q, k, v, cu = inputs((3, 2), dtype=torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.gac_fast.plan_attention_triton.default, (*leaves, cu))
    torch.library.opcheck(torch.ops.gac_fast.plan_attention_triton_backward.default, (q, q, k, v, cu))


@pytest.mark.interpreter
def test_interpreted_compiles_into_one_graph():
    q, k, v, cu = inputs((9, 6), dtype=torch.float32)

    def attend(k):
        return ops.plan_attention(q, k, v, cu).square().sum()

    with ops.backend("triton"):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        plain, traced = k.clone().requires_grad_(), k.clone().requires_grad_()
        attend(plain).backward()
        compiled(traced).backward()
    assert torch.equal(plain.grad, traced.grad)
    assert float(plain.grad.abs().max()) > 0
    assert set(ops.dispatch_counts()) == {("plan_attention", "triton")}


# ---------------------------------------------------------------------------------------------------------------------
# Without the interpreter


def test_triton_does_not_run_on_cpu_tensors_unless_interpreted():
    q, k, v, cu = inputs((3, 4), dtype=torch.float32)
    with ops.backend("triton"), pytest.raises(BackendError, match=r"plan_attention: .* got cpu tensors"):
        ops.plan_attention(q, k, v, cu)


@pytest.mark.usefixtures("cpp_engine")
def test_limits_of_triton_are_its_own():
    q, k, v, cu = inputs((3, 4), 17, dtype=torch.float32)
    ops.plan_attention(q, k, v, cu)
    assert ops.dispatch_counts() == {("plan_attention", "cpp"): 1}


def check_compiled(launches, architecture, folder, spills=False) -> None:
    for launch in launches:
        assert_fits(launch, architecture, folder, spills=spills)


def test_gym_compiles_without_spills(tmp_path, monkeypatch):
    from gac_fast.kernels.plan_attention import shipped

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launches = shipped(128, 4, 4, torch.bfloat16)
    assert {launch.name for launch in launches} == {
        "plan_attention_kernel", "plan_attention_backward_kernel", "plan_sum_kernel"
    }  # fmt: skip
    check_compiled(launches, 90, tmp_path)
    ptx = launches[0].compile(90).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "ld.global.v4" in ptx


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype", "architecture"), compile_cases("plan_attention"))
def test_every_width_compiles(sizes, dtype, architecture, tmp_path):
    from gac_fast.kernels.plan_attention import shipped

    check_compiled(shipped(**sizes, dtype=dtype), architecture, tmp_path, spills=dtype == torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("n_z", [1, 4, 7, 16])
def test_gpu_equals_the_loop(dtype, n_z):
    for lengths in ((1,), (5, 1, 700), (0, 33, 0), (64, 65, 1063)):
        compare(*(x.cuda() for x in inputs(lengths, n_z, 4, 32, dtype)))
    assert ops.dispatch_counts() == {("plan_attention", "triton"): 4}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(1, 8), (3, 10), (2, 24), (8, 16), (1, 48), (2, 96), (1, 128), (1, 256)])
def test_gpu_head_counts_and_widths(dtype, heads, width):
    compare(*(x.cuda() for x in inputs((9, 0, 170), 5, heads, width, dtype)))


@pytest.mark.gpu
def test_gpu_leaves_many_plan_vectors_to_the_reference():
    q, k, v, cu = (x.cuda() for x in inputs((3, 4), 17, dtype=torch.float32))
    ops.plan_attention(q, k, v, cu)
    assert ops.dispatch_counts() == {("plan_attention", "reference"): 1}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_gpu_gives_the_same_bits_a_hundred_times(dtype):
    q, k, v, cu = (x.cuda() for x in inputs((1000, 3, 517) * 20, 4, 4, 32, dtype))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run() -> tuple[Tensor, ...]:
        out = ops.plan_attention(*leaves, cu)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
