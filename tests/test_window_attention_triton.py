"""window_attention on the Triton engine: by the interpreter in float32, compiled without a GPU, on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import row_error
from kernel_fixtures import assert_fits, compile_cases
from test_window_attention import dense, dense_weights, gradient_error, packed, sizes_of_terms
from torch import Tensor

from gac_fast import ops
from gac_fast.errors import BackendError

pytest.importorskip("triton")

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def compare(q, k, v, cu, window, positions, rope_base=10000.0) -> None:
    """Forward and all gradients against the dense mask in float64 on the same rounded inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    if q.is_cuda:
        out = ops.window_attention(*leaves, cu, window, positions, rope_base)
    else:
        with ops.backend("triton"):
            out = ops.window_attention(*leaves, cu, window, positions, rope_base)
    cu, positions = cu.cpu(), None if positions is None else positions.cpu()
    expected = dense(*exact, cu, window, positions, rope_base)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    out.backward(weight.to(q.device))
    expected.backward(weight.double())
    assert out.dtype == q.dtype
    assert row_error(out, expected) < BOUNDS[q.dtype]
    softmax = dense_weights(*exact[:2], cu, window, positions, rope_base)
    sizes = sizes_of_terms(*exact, softmax, weight.double())
    for name, ours, theirs, size in zip("qkv", leaves, exact, sizes, strict=True):
        assert gradient_error(ours.grad, theirs.grad, size) < BOUNDS[q.dtype], name


def test_triton_interpreter_agrees(run_interpreted):
    run_interpreted(__file__)


# ---------------------------------------------------------------------------------------------------------------------
# By the interpreter


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("window", [1, 5, 33, 2**62])
def test_interpreted_equals_the_dense_mask(window):
    for lengths in ((1,), (5, 1, 12), (0, 40, 0, 0, 71, 1)):
        q, k, v, cu, positions = packed(lengths, 2, 8, torch.float32)
        compare(q, k, v, cu, window, positions, 100.0)
    assert ops.dispatch_counts() == {("window_attention", "triton"): 3}


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("heads", "width"), [(3, 10), (2, 32), (1, 48), (1, 256)])
def test_interpreted_head_counts_and_widths(heads, width):
    q, k, v, cu, positions = packed((9, 0, 40), heads, width, torch.float32)
    compare(q, k, v, cu, 23, positions)
    compare(q, k, v, cu, 40, None)


OPTIONS = [(64, 16, 2, False), (32, 64, 1, False), (16, 16, 1, True), (32, 16, 1, True), (64, 32, 1, True)]


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("bt", "bp", "together", "is_long"), OPTIONS)
def test_interpreted_tiles_of_other_dtypes(bt, bp, together, is_long, monkeypatch):
    """The tiles that bfloat16 and other devices take."""
    from gac_fast.kernels import window_attention as kernel
    from gac_fast.kernels._launch import Option

    option = Option((("BT", bt), ("BP", bp), ("HEADS", together)), 4, 1)
    monkeypatch.setattr(kernel, "_options", lambda *args, **kwargs: [option])
    monkeypatch.setattr(kernel, "_is_long", lambda *args: is_long)
    for window in (70 if is_long else bp + 1, 13):
        compare(*packed((20, 1, 75), 2, 8, torch.float32)[:4], window, torch.arange(96))


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("tiles", "window", "width"), [(1, 64, 32), (2, 65, 10), (2, 5, 16), (4, 33, 8), (16, 1, 32)])
def test_interpreted_walk(tiles, window, width, monkeypatch):
    """What bfloat16 takes on Hopper: programs that begin within a trajectory, end with it, or hold all of it."""
    from gac_fast.kernels import window_attention as kernel
    from gac_fast.kernels._launch import Launch, Option

    run, names = Launch.run, []
    option = Option((("BT", 64), ("TILES", tiles)), 4, 2)
    monkeypatch.setattr(kernel, "_walks", lambda *args: True)
    monkeypatch.setattr(kernel, "_walk_option", lambda *args: option)
    monkeypatch.setattr(Launch, "run", lambda launch: (names.append(launch.name), run(launch)))
    q, k, v, cu, positions = packed((0, 40, 64, 0, 193, 1), 2, width, torch.float32)
    compare(q, k, v, cu, window, positions, 100.0)
    compare(q, k, v, cu, window, None)
    assert [name for name in names if name != "rotary_kernel"] == 2 * [
        "window_walk_kernel", "window_walk_backward_kernel"
    ]  # fmt: skip


@pytest.mark.interpreter
def test_interpreted_walk_gives_the_same_bits_in_tiles_of_any_number(monkeypatch):
    from gac_fast.kernels import window_attention as kernel
    from gac_fast.kernels._launch import Option

    monkeypatch.setattr(kernel, "_walks", lambda *args: True)
    q, k, v, cu, positions = packed((300, 70), 1, 16, torch.float32)
    leaves, found = [x.detach().requires_grad_() for x in (q, k, v)], []
    for tiles in (1, 2, 8):
        option = Option((("BT", 64), ("TILES", tiles)), 4, 2)
        monkeypatch.setattr(kernel, "_walk_option", lambda *args, option=option: option)
        with ops.backend("triton"):
            out = ops.window_attention(*leaves, cu, 64, positions)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.interpreter
def test_interpreted_positions_may_be_anything():
    q, k, v, cu, positions = packed((30, 10), 1, 8, torch.float32)
    with ops.backend("triton"):
        near = ops.window_attention(q, k, v, cu, 8, positions)
        for shift in (10_000, -5000, 2**40):
            assert row_error(ops.window_attention(q, k, v, cu, 8, positions + shift), near) < 1e-5
        far = torch.full_like(positions, 2**63 - 1)
        far[::2] = -(2**63)
        assert bool(ops.window_attention(q, k, v, cu, 8, far).isfinite().all())
    for scattered in (positions * 10**6, positions * -(10**9), positions.int().flip(0)):
        compare(q, k, v, cu, 8, scattered)
    for base in (0.5, 1e6):
        compare(q, k, v, cu, 8, positions, base)


@pytest.mark.interpreter
def test_interpreted_reads_strided_views():
    q, k, v, cu, positions = packed((40, 26), 3, 16, torch.float32)
    with ops.backend("triton"):
        expected = ops.window_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, 9, positions)
        assert torch.equal(ops.window_attention(q, k, v, cu, 9, positions), expected)
        by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        assert torch.equal(ops.window_attention(*by_head, cu, 9, positions), expected)
        # Elements apart: copied first.
        apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        assert torch.equal(ops.window_attention(*apart, cu, 9, positions), expected)
        wide = torch.stack((positions, positions), 1)[:, 0]
        assert torch.equal(ops.window_attention(q, k, v, cu.long(), 9, wide), expected)
        offsets = torch.stack((cu, cu), 1)[:, 0]
        assert torch.equal(ops.window_attention(q, k, v, offsets, 9, positions), expected)


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("window", [5, 100])
def test_interpreted_gradients_of_one_fused_product(window):
    *_, cu, positions = packed((20, 9), 2, 8, torch.float32)
    product = torch.randn(29, 48, generator=torch.Generator().manual_seed(3), requires_grad=True)
    exact = product.detach().double().requires_grad_()
    with ops.backend("triton"):
        out = ops.window_attention_qkv(product.view(29, 3, 2, 8), cu, window, positions)
        apart = ops.window_attention(*product.view(29, 3, 2, 8).unbind(1), cu, window, positions)
    assert torch.equal(out, apart)
    expected = dense(*exact.view(29, 3, 2, 8).unbind(1), cu, window, positions)
    assert row_error(out, expected) < 1e-5
    # An expanded gradient, and a strided one.
    for gradient in (torch.ones(()).expand(29, 2, 8), torch.randn(29, 8, 2).transpose(1, 2)):
        (ours,) = torch.autograd.grad(out, product, gradient, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, exact, gradient.double(), retain_graph=True)
        assert row_error(ours, theirs) < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("is_long", [False, True])
def test_interpreted_tiles_beyond_the_band_are_not_read(is_long, monkeypatch):
    """Work grows with tokens x window: in a product a masked NaN would still spoil what its tile takes part in."""
    from gac_fast.kernels import window_attention as kernel

    monkeypatch.setattr(kernel, "_is_long", lambda *args: is_long)
    q, k, v, cu, positions = packed((205,), 1, 8, torch.float32)
    # A tile whose blocks of 64 keys and queries end before those that are spoilt, 10 at either end.
    inner = slice(96, 112)
    clean, spoilt = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    with torch.no_grad():
        spoilt[0][-10:], spoilt[1][:10], spoilt[2][:10] = torch.nan, torch.nan, torch.nan
    found = []
    for leaves in (clean, spoilt):
        with ops.backend("triton"):
            out = ops.window_attention(*leaves, cu, 5, positions)
        found.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for x, y in zip(*found, strict=True):
        assert bool(y.isnan().any())
        assert torch.equal(x[inner], y[inner])


@pytest.mark.interpreter
def test_interpreted_no_tokens_and_an_unused_output():
    q, k, v, cu, positions = packed((0, 0), dtype=torch.float32)
    q.requires_grad_()
    with ops.backend("triton"):
        ops.window_attention(q, k, v, cu, 3, positions).sum().backward()
        assert q.grad.shape == (0, 2, 8)
        q, k, v, cu, _ = packed((3, 4), dtype=torch.float32)
        out = ops.window_attention(q.requires_grad_(), k, v, cu, 3)
    (grad,) = torch.autograd.grad(out[:3].sum() * 0.0, q)
    assert float(grad.abs().max()) == 0.0


@pytest.mark.interpreter
def test_interpreted_offsets_that_break_the_contract_stay_within_the_tensors():
    q, k, v, _, positions = packed((3, 4), dtype=torch.float32)
    with ops.backend("triton"):
        for offsets in ([-5, 3, 7], [0, 7, 3], [0, 3, 2**20]):
            ops.window_attention(q, k, v, torch.tensor(offsets), 2, positions)


@pytest.mark.interpreter
@pytest.mark.parametrize("offsets", [[0, -100, 7], [0, -2000, 7], [-5, 3, 7], [0, 7, 3], [0, 3, 2**20]])
def test_interpreted_walk_writes_within_the_tensors(offsets, monkeypatch):
    from gac_fast.kernels import window_attention as kernel

    monkeypatch.setattr(kernel, "_walks", lambda *args: True)
    n, heads, width, around = 7, 2, 8, 2048 * 48
    whole = []

    def within(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        whole.append((torch.full((2 * around + size,), 3.0), slice(around, around + size)))
        return whole[-1][0][whole[-1][1]].view(shape)

    q, k, v = (within(n, heads, width).normal_() for _ in range(3))
    out, lse, angles, grads = within(n, heads, width), within(heads, n), within(n, width), within(n, 3, heads, width)
    arguments = q, k, v, torch.tensor(offsets), 2, torch.arange(n), 1e4
    kernel.window_attention(*arguments, out, lse, angles)
    kernel.window_attention_backward(torch.ones_like(out), *arguments, out, lse, angles, grads)
    for memory, inside in whole:
        memory[inside] = 3.0
        assert bool((memory == 3.0).all())


@pytest.mark.interpreter
def test_interpreted_same_bits_every_time():
    q, k, v, cu, positions = packed((40, 3, 17), dtype=torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run():
        with ops.backend("triton"):
            out = ops.window_attention(*leaves, cu, 5, positions)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.interpreter
def test_interpreted_registered_ops():
    q, k, v, cu, positions = packed((3, 2), dtype=torch.float32)
    library = torch.ops.gac_fast
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(library.window_attention_triton.default, (*leaves, cu, 4, positions, 10.0))
    product = torch.stack((q, k, v), 1).requires_grad_()
    torch.library.opcheck(library.window_attention_qkv_triton.default, (product, cu, 4, None, 10.0))
    arguments = (q, k, v, cu, 4, positions, 10.0)
    saved = library.window_attention_triton(*arguments)
    torch.library.opcheck(library.window_attention_triton_backward.default, (saved[0], *arguments, *saved))


@pytest.mark.interpreter
def test_interpreted_compiles_into_one_graph():
    q, k, v, cu, positions = packed((9, 6), dtype=torch.float32)
    product = torch.stack((q, k, v), 1)

    def attend(product):
        return ops.window_attention_qkv(product, cu, 4, positions).square().sum()

    with ops.backend("triton"):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        plain, traced = product.clone().requires_grad_(), product.clone().requires_grad_()
        attend(plain).backward()
        compiled(traced).backward()
    assert torch.equal(plain.grad, traced.grad)
    assert float(plain.grad.abs().max()) > 0
    assert set(ops.dispatch_counts()) == {("window_attention", "triton")}


# ---------------------------------------------------------------------------------------------------------------------
# Without the interpreter


@pytest.mark.parametrize(("width", "base"), [(8, 10000.0), (32, 100.0), (10, 0.5), (256, 1e6)])
def test_turns_are_those_of_the_float64_frequencies(width, base):
    from gac_fast.kernels._rotary import rotary_turns

    turns = rotary_turns(width, base, torch.device("cpu"))
    half = width // 2
    for i, turn in enumerate(turns.tolist()):
        expected = base ** (-i / half) / (2 * torch.pi)
        assert abs((turn % 2**64) / 2**64 - expected % 1) < 1e-15
    assert rotary_turns(width, base, torch.device("cpu")) is turns


@pytest.mark.parametrize("packed_qkv", [False, True], ids=["apart", "packed"])
def test_packed_is_the_same_on_every_engine(cpp_engine, packed_qkv):
    q, k, v, cu, positions = packed((9, 6), dtype=torch.float32)
    for name in ("reference", "cpp"):
        with ops.backend(name):
            expected = ops.window_attention(q, k, v, cu, 4, positions)
            product = torch.stack((q, k, v), 1) if not packed_qkv else torch.stack((q, k, v), 0).transpose(0, 1)
            assert torch.equal(ops.window_attention_qkv(product, cu, 4, positions), expected)


BAD = {
    "dtype": (lambda a: a | {"qkv": a["qkv"].half()}, r"qkv: expected dtype .* or float64, got float16"),
    "rank": (lambda a: a | {"qkv": a["qkv"][:, 0]}, r"qkv: expected shape \[N, 3, H, d\], got \[7, 2, 8\]"),
    "thirds": (lambda a: a | {"qkv": a["qkv"][:, :2]}, r"qkv: expected shape \[N, 3, H, d\], got \[7, 2, 2, 8\]"),
    "width": (lambda a: a | {"qkv": a["qkv"][..., :7]}, r"even head width of 8 to 256, got 7"),
    "window": (lambda a: a | {"window": 0}, r"window: expected at least 1 token, got 0"),
    "positions": (lambda a: a | {"positions": a["positions"][:-1]}, r"positions: expected shape \[7\], got \[6\]"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_packed_names_bad_input(change, message):
    q, k, v, cu, positions = packed((3, 4))
    arguments = {"qkv": torch.stack((q, k, v), 1), "cu_seqlens": cu, "window": 2, "positions": positions}
    ops.window_attention_qkv(**arguments)
    with pytest.raises(ValueError, match=message):
        ops.window_attention_qkv(**change(arguments))


def test_triton_does_not_run_on_cpu_tensors_unless_interpreted():
    q, k, v, cu, _ = packed((3, 4), dtype=torch.float32)
    with ops.backend("triton"), pytest.raises(BackendError, match=r"window_attention: .* got cpu tensors"):
        ops.window_attention(q, k, v, cu, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled without a GPU


def check_compiled(launches, architecture, folder, spills=False) -> None:
    for launch in launches:
        assert_fits(launch, architecture, folder, spills=spills)


@pytest.mark.parametrize(("window", "n_tokens"), [(32, 2**20), (64, 2**20), (64, 2**10)])
def test_gym_compiles_without_spills(window, n_tokens, tmp_path, monkeypatch):
    from gac_fast.kernels.window_attention import shipped

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launches = shipped(128, 4, window, torch.bfloat16, n_tokens=n_tokens)
    assert {dict(launch.option.tiles).get("TILES") for launch in launches} == {None, 16 if n_tokens == 2**20 else 1}
    assert {launch.name for launch in launches} == {
        "rotary_kernel", "window_walk_kernel", "window_walk_backward_kernel"
    }  # fmt: skip
    check_compiled(launches, 90, tmp_path)
    ptx = launches[1].compile(90).asm["ptx"]
    # Tensor cores of Hopper, and loads of 16 bytes, ahead of the tile that needs them.
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype", "architecture"), compile_cases("window_attention"))
def test_every_width_compiles(sizes, dtype, architecture, tmp_path):
    from gac_fast.kernels.window_attention import shipped

    # Products without tensor cores hold whole tiles in registers: heads wider than 64 spill, and are listed.
    launches = shipped(**sizes, dtype=dtype, architecture=architecture)
    check_compiled(launches, architecture, tmp_path, spills=dtype == torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [1, 4, 16, 33, 63, 64, 65, 100, 200, 2**62])
def test_gpu_equals_the_dense_mask(dtype, window):
    for lengths, heads, width in (((1,), 2, 16), ((0, 40, 0, 200, 1), 4, 32), ((130, 64, 300), 1, 64)):
        q, k, v, cu, positions = (x.cuda() for x in packed(lengths, heads, width, dtype))
        compare(q, k, v, cu, window, positions)
    assert ops.dispatch_counts() == {("window_attention", "triton"): 3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(1, 8), (3, 10), (2, 24), (8, 16), (1, 48), (2, 96), (1, 128), (1, 256)])
def test_gpu_head_counts_and_widths(dtype, heads, width):
    q, k, v, cu, positions = (x.cuda() for x in packed((9, 0, 170), heads, width, dtype))
    compare(q, k, v, cu, 23, positions)
    compare(q, k, v, cu, 40, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [64, 500])
def test_gpu_many_tokens_take_the_options_of_the_large(dtype, window):
    lengths = [300, 1, 700] * 40
    q, k, v, cu, positions = (x.cuda() for x in packed(lengths, 4, 32, dtype))
    product = torch.stack((q, k, v), 1).requires_grad_()
    exact = product.detach().double().requires_grad_()
    out = ops.window_attention_qkv(product, cu, window, positions)
    with ops.backend("reference"):
        expected = ops.window_attention_qkv(exact, cu, window, positions)
    weight = torch.randn_like(out)
    out.backward(weight)
    expected.backward(weight.double())
    assert row_error(out, expected) < BOUNDS[dtype]
    sizes = []
    for start, end in itertools.pairwise(cu.tolist()):
        one = slice(start, end)
        rows, ends = exact.detach()[one].unbind(1), torch.tensor([0, end - start], device="cuda")
        softmax = dense_weights(*rows[:2], ends, window, positions[one])
        sizes.append(torch.stack(sizes_of_terms(*rows, softmax, weight[one].double()), 1))
    assert gradient_error(product.grad, exact.grad, torch.cat(sizes)) < BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [64, 300])
def test_gpu_gives_the_same_bits_a_hundred_times(dtype, window):
    q, k, v, cu, positions = (x.cuda() for x in packed((1000, 3, 517) * 30, 4, 32, dtype))
    product = torch.stack((q, k, v), 1).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        out = ops.window_attention_qkv(product, cu, window, positions)
        return out, torch.autograd.grad(out.square().sum(), product)[0]

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.gpu
def test_gpu_walks_of_any_number_of_tiles_give_the_same_bits(monkeypatch):
    from gac_fast.kernels import window_attention as kernel

    q, k, v, cu, positions = (x.cuda() for x in packed((1000, 3, 517), 4, 32, torch.bfloat16))
    leaves, option, found = [x.detach().requires_grad_() for x in (q, k, v)], kernel._walk_option, []
    for tiles in (1, 2, 4, 8, 16):

        def of_tiles(*args, tiles=tiles):
            return replace(option(*args), tiles=(("BT", 64), ("TILES", tiles)))

        monkeypatch.setattr(kernel, "_walk_option", of_tiles)
        out = ops.window_attention(*leaves, cu, 64, positions)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [64, 300])
def test_gpu_runs_inside_a_captured_graph(window):
    q, k, v, cu, positions = (x.cuda() for x in packed((100, 3, 57), 4, 32, torch.bfloat16))
    product = torch.stack((q, k, v), 1).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        out = ops.window_attention_qkv(product, cu, window, positions)
        return out, torch.autograd.grad(out, product, torch.ones_like(out))[0]

    # No graph of autograd is kept from here: the node of the leaf that it holds belongs to this stream for as long as
    # it lives, and the backward of the capture would make this stream wait for the one that is captured.
    expected = [x.detach().clone() for x in run()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(captured, expected))
