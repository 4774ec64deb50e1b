"""window_attention against a dense mask in float64: forward, gradients, odd sizes, strides, bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import row_error
from torch import Tensor

from gac_fast import ops


def rotated(x, positions, rope_base=10000.0) -> Tensor:
    """Rotary, as a product of complex numbers."""
    half = x.shape[-1] // 2
    powers = [rope_base ** (-i / half) for i in range(half)]
    frequency = torch.tensor(powers, dtype=torch.float64, device=x.device)
    turn = torch.exp(1j * positions.double()[:, None, None] * frequency)
    y = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((y.real, y.imag), dim=-1)


def dense_weights(q, k, cu_seqlens, window, positions=None, rope_base=10000.0) -> Tensor:
    """Softmax weights [H, N, N] of the definition: one mask."""
    n, _, width = q.shape
    if positions is not None:
        q, k = rotated(q, positions, rope_base), rotated(k, positions, rope_base)
    tokens = torch.arange(n, device=q.device)
    i, j = tokens[:, None], tokens[None, :]
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    visible = (owner[:, None] == owner[None, :]) & (j <= i) & (i - j < window)
    score = torch.einsum("ihd,jhd->hij", q, k) / width**0.5
    return torch.softmax(score.masked_fill(~visible, -torch.inf), dim=-1)


def dense(q, k, v, cu_seqlens, window, positions=None, rope_base=10000.0) -> Tensor:
    """The definition."""
    weight = dense_weights(q, k, cu_seqlens, window, positions, rope_base)
    return torch.einsum("hij,jhd->ihd", weight, v)


@torch.no_grad()
def sizes_of_terms(q, k, v, weight, d_out) -> tuple[Tensor, Tensor, Tensor]:
    """What the rounding of a row [N, H] of dq, dk and dv grows with: the root of the sum of its squared terms.

    dq_i = sum_j p_ij (do_i v_j - do_i o_i) k_j / sqrt(d), and where one key has nearly all of the weight the bracket
    is a small difference of large terms (none at all where a token sees itself alone). Both products are counted by
    their own terms, not by what is left of them. Roots of sums of squares, as errors of either sign add up: sums of
    sizes would pass errors several times larger.
    """
    o = torch.einsum("hij,jhd->ihd", weight, v)
    brackets = torch.einsum("ihd,jhd->hij", d_out**2, v**2) + (d_out * o).square().sum(-1).t()[:, :, None]
    terms = weight**2 * brackets / q.shape[-1]
    # Rotations leave the lengths of k_j and q_i as they are.
    dq = torch.einsum("hij,jh->ih", terms, k.square().sum(-1))
    dk = torch.einsum("hij,ih->jh", terms, q.square().sum(-1))
    dv = torch.einsum("hij,ih->jh", weight**2, d_out.square().sum(-1))
    return dq.sqrt(), dk.sqrt(), dv.sqrt()


def gradient_error(ours: Tensor, theirs: Tensor, size: Tensor) -> float:
    """Largest error of a row of a gradient beside the row or the size of its terms; NaN anywhere gives 1e9."""
    error = (ours.to(theirs) - theirs).norm(dim=-1) / theirs.norm(dim=-1).maximum(size).clamp(min=1e-30)
    return float(error.nan_to_num(nan=1e9).max()) if error.numel() else 0.0


def packed(lengths, heads=2, width=8, dtype=torch.float64, seed=0):
    """q, k, v as slices of one fused product (strided), offsets, positions."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    qkv = torch.randn(n, 3, heads, width, generator=generator, dtype=torch.float64)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]) if n else torch.zeros(0, dtype=torch.int64)
    return (*qkv.to(dtype).unbind(1), cu, positions)


BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def rounded_gradients(q, k, v, cu, window, positions, d_out, dtype, defect="") -> list[Tensor]:
    """dq, dk and dv, rounded where an engine on matrix units rounds; or wrong."""

    def r(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    turned_q, turned_k = (x if defect == "no rotation" else r(rotated(x, positions)) for x in (q, k))
    weight = dense_weights(turned_q, turned_k, cu, window + (defect == "a key too many"))
    o = r(torch.einsum("hij,jhd->ihd", weight, v))
    delta = (d_out * o).sum(-1).t()[:, :, None] * (defect != "no delta")
    d_score = r(weight * (torch.einsum("ihd,jhd->hij", d_out, v) - delta)) / q.shape[-1] ** 0.5
    dq, dk = torch.einsum("hij,jhd->ihd", d_score, turned_k), torch.einsum("hij,ihd->jhd", d_score, turned_q)
    if defect not in ("no rotation", "not turned back"):
        dq, dk = rotated(dq, -positions), rotated(dk, -positions)
    if defect == "another head":
        dq = dq.roll(1, 1)
    if defect == "a key too few":
        dq = dq - rotated(torch.einsum("hj,jhd->jhd", d_score.diagonal(dim1=1, dim2=2), turned_k), -positions)
    return [r(x) for x in (dq, dk, torch.einsum("hij,ihd->jhd", r(weight), d_out))]


DEFECTS = ("a key too many", "a key too few", "no rotation", "not turned back", "no delta", "another head")


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [4, 33, 100])
def test_the_measure_of_gradients_passes_rounding_and_no_defect(window, dtype):
    """Rows of several hundred tokens: among them some whose softmax has all its weight on one key."""
    *rounded, cu, positions = packed((40, 0, 200, 1), 4, 32, dtype)
    exact = [x.double().requires_grad_() for x in rounded]
    d_out = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    theirs = torch.autograd.grad(dense(*exact, cu, window, positions), exact, d_out)
    exact = [x.detach() for x in exact]
    sizes = sizes_of_terms(*exact, dense_weights(*exact[:2], cu, window, positions), d_out)

    def errors(defect: str = "") -> list[float]:
        ours = rounded_gradients(*exact, cu, window, positions, d_out, dtype, defect)
        return [gradient_error(x, y, size) for x, y, size in zip(ours, theirs, sizes, strict=True)]

    assert max(errors()) < 0.75 * BOUNDS[dtype]
    for defect in DEFECTS:
        assert max(errors(defect)[:2]) > 10 * BOUNDS[dtype], defect
    # Beside most rows the terms are no larger than the row: an error counts by it.
    for x, size in zip(theirs, sizes, strict=True):
        assert float((size / x.norm(dim=-1)).median()) < 2.5


LENGTHS = [(1,), (7,), (1, 1, 1), (5, 1, 12), (40, 3, 17), (0, 5, 0, 9), (33, 64)]


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("window", [1, 2, 5, 16, 23, 200])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_the_dense_mask(lengths, window):
    q, k, v, cu, positions = packed(lengths)
    expected = dense(q, k, v, cu, window, positions, 100.0)
    assert row_error(ops.window_attention(q, k, v, cu, window, positions, 100.0), expected) < 1e-12
    assert ops.dispatch_counts() == {("window_attention", "reference"): 1}


@pytest.mark.parametrize(("heads", "width"), [(1, 8), (3, 10), (1, 256)])
def test_head_counts_and_widths(heads, width):
    q, k, v, cu, positions = packed((9, 20), heads, width)
    assert row_error(ops.window_attention(q, k, v, cu, 4, positions), dense(q, k, v, cu, 4, positions)) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_lower_precision(dtype, bound):
    q, k, v, cu, positions = packed((31, 50), dtype=dtype)
    out = ops.window_attention(q, k, v, cu, 12, positions)
    assert out.dtype == dtype
    # The oracle sees the rounded inputs. bfloat16 softmax weights carry 2^-9 each.
    assert row_error(out, dense(q.double(), k.double(), v.double(), cu, 12, positions)) < bound


def test_without_positions_nothing_rotates():
    q, k, v, cu, positions = packed((6, 11))
    out = ops.window_attention(q, k, v, cu, 4)
    assert row_error(out, dense(q, k, v, cu, 4)) < 1e-12
    assert row_error(ops.window_attention(q, k, v, cu, 4, torch.zeros_like(positions)), out) < 1e-12
    assert row_error(ops.window_attention(q, k, v, cu, 4, positions), out) > 1e-2


def test_only_position_differences_matter():
    q, k, v, cu, positions = packed((6, 11))
    out = ops.window_attention(q, k, v, cu, 4, positions)
    assert row_error(ops.window_attention(q, k, v, cu, 4, positions + 1000), out) < 1e-9
    assert row_error(ops.window_attention(q, k, v, cu, 4, 2 * positions), out) > 1e-3


def test_far_positions_keep_float32_accuracy():
    q, k, v, cu, positions = packed((40,), dtype=torch.float32)
    near = ops.window_attention(q, k, v, cu, 8, positions)
    # At t = 100,000 a float32 angle would be off by 4e-3.
    assert row_error(ops.window_attention(q, k, v, cu, 8, positions + 100_000), near) < 1e-5


@pytest.mark.parametrize("window", [1, 3, 40])
def test_gradients_equal_those_of_the_dense_mask(window):
    q, k, v, cu, positions = packed((17, 1, 25))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    copies = [x.clone().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    (ops.window_attention(*leaves, cu, window, positions) * weight).sum().backward()
    (dense(*copies, cu, window, positions) * weight).sum().backward()
    for name, ours, theirs in zip("qkv", leaves, copies, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-12), name


def test_gradcheck():
    q, k, v, cu, positions = packed((3, 1, 4), heads=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: ops.window_attention(q, k, v, cu, 3, positions), leaves)


def test_a_token_sees_exactly_its_window():
    q, k, v, cu, positions = packed((6, 20))
    v = v.clone().requires_grad_()
    out = ops.window_attention(q, k, v, cu, 4, positions)
    for token, first in ((6, 6), (8, 6), (9, 6), (10, 7), (25, 22)):
        (grad,) = torch.autograd.grad(out[token].sum(), v, retain_graph=True)
        seen = grad.abs().sum((1, 2)) > 0
        assert seen.nonzero().flatten().tolist() == list(range(first, token + 1))


def test_no_tokens():
    q, k, v, cu, positions = packed(())
    assert ops.window_attention(q, k, v, cu, 3, positions).shape == (0, 2, 8)


def test_the_same_bits_every_time():
    q, k, v, cu, positions = packed((40, 3, 17), dtype=torch.float32)
    leaf = q.clone().requires_grad_()

    def run():
        out = ops.window_attention(leaf, k, v, cu, 5, positions)
        return out, *torch.autograd.grad(out.square().sum(), leaf)

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


BAD = {
    "dtype of q": (lambda a: a | {"q": a["q"].half()}, r"q: expected dtype .* or float64, got float16"),
    "dtype of k": (lambda a: a | {"k": a["k"].float()}, r"k: expected dtype float64, got float32"),
    "rank": (lambda a: a | {"q": a["q"][0]}, r"q: expected shape \[N, H, d\], got \[2, 8\]"),
    "shape of v": (lambda a: a | {"v": a["v"][:, :1]}, r"v: expected shape \[7, 2, 8\], got \[7, 1, 8\]"),
    "odd width": (lambda a: a | {x: a[x][..., :7] for x in "qkv"}, r"even head width of 8 to 256, got 7"),
    "narrow": (lambda a: a | {x: a[x][..., :6] for x in "qkv"}, r"even head width of 8 to 256, got 6"),
    "offsets' dtype": (lambda a: a | {"cu_seqlens": a["cu_seqlens"].float()}, r"cu_seqlens: expected dtype int32 or"),
    "no offsets": (lambda a: a | {"cu_seqlens": a["cu_seqlens"][:1]}, r"cu_seqlens: expected at least 2 offsets for 7"),
    "window": (lambda a: a | {"window": 0}, r"window: expected at least 1 token, got 0"),
    "positions": (lambda a: a | {"positions": a["positions"][:-1]}, r"positions: expected shape \[7\], got \[6\]"),
    "base": (lambda a: a | {"rope_base": -1.0}, r"rope_base: expected a positive number, got -1.0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change, message):
    q, k, v, cu, positions = packed((3, 4))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cu, "window": 2, "positions": positions}
    ops.window_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        ops.window_attention(**change(arguments))


# ---------------------------------------------------------------------------------------------------------------------
# The C++ engine


def compare(q, k, v, cu, window, positions, rope_base=10000.0) -> None:
    """Forward and all gradients of the C++ engine against the dense mask in float64 on the same rounded inputs."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    with ops.backend("cpp"):
        out = ops.window_attention(*leaves, cu, window, positions, rope_base)
    expected = dense(*exact, cu, window, positions, rope_base)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    out.backward(weight)
    expected.backward(weight.double())
    assert out.dtype == q.dtype
    assert row_error(out, expected) < BOUNDS[q.dtype]
    softmax = dense_weights(*exact[:2], cu, window, positions, rope_base)
    sizes = sizes_of_terms(*exact, softmax, weight.double())
    for name, ours, theirs, size in zip("qkv", leaves, exact, sizes, strict=True):
        assert gradient_error(ours.grad, theirs.grad, size) < BOUNDS[q.dtype], name


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [1, 5, 16, 64, 2**62])
def test_cpp_equals_the_dense_mask(dtype, window):
    for lengths in ((1,), (3,), (17,), (1, 1, 1), (0, 33, 0, 100, 1), (70, 31)):
        q, k, v, cu, positions = packed(lengths, 2, 16, dtype)
        compare(q, k, v, cu, window, positions, 100.0)
    assert ops.dispatch_counts() == {("window_attention", "cpp"): 6}


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("heads", "width"), [(1, 8), (3, 10), (1, 12), (2, 24), (4, 32), (8, 16), (1, 48), (1, 64), (2, 96), (1, 256)]
)
def test_cpp_head_counts_and_widths(dtype, heads, width):
    q, k, v, cu, positions = packed((9, 0, 70), heads, width, dtype)
    compare(q, k, v, cu, 23, positions)
    compare(q, k, v, cu, 40, None)


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [3, 64])
def test_cpp_long_sequences_are_cut_into_chunks(dtype, window):
    q, k, v, cu, positions = packed((1030, 7, 1100), 1, 8, dtype)
    compare(q, k, v, cu, window, positions)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_cpp_reads_strided_views(dtype):
    q, k, v, cu, positions = packed((40, 26), 3, 16, dtype)
    with ops.backend("cpp"):
        expected = ops.window_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, 9, positions)
        assert torch.equal(ops.window_attention(q, k, v, cu, 9, positions), expected)
        by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        assert torch.equal(ops.window_attention(*by_head, cu, 9, positions), expected)
        # Elements apart: copied first.
        apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        assert torch.equal(ops.window_attention(*apart, cu, 9, positions), expected)
        wide = torch.stack((positions, positions), 1)[:, 0]
        assert torch.equal(ops.window_attention(q, k, v, cu.long(), 9, wide), expected)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_cpp_bits_do_not_depend_on_the_threads(cpp_engine, dtype):
    q, k, v, cu, positions = packed((1500, 3, 800), 2, 16, dtype)
    weight = torch.randn(q.shape).to(dtype)

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = ops.window_attention(*leaves, cu, 20, positions)
        return out, *torch.autograd.grad(out, leaves, weight)

    was = torch.get_num_threads()
    first = run()
    try:
        for n_threads in (2, 3):
            torch.set_num_threads(n_threads)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(was)
    assert ops.dispatch_counts() == {("window_attention", "cpp"): 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_side_by_side_is_the_same_op(cpp_engine, name, dtype):
    q, k, v, cu, positions = packed((70, 1, 33), 2, 16, dtype)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    with ops.backend(name):
        leaves = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
        expected = ops.window_attention(*leaves, cu, 20, positions, 100.0)
        gradients = torch.autograd.grad(expected, leaves, weight)
        qkv = torch.stack((q, k, v), dim=1).requires_grad_()
        out = ops.window_attention_qkv(qkv, cu, 20, positions, 100.0)
        (gradient,) = torch.autograd.grad(out, qkv, weight)
    assert ops.dispatch_counts() == {("window_attention", name): 2}
    assert torch.equal(out, expected)
    assert gradient.is_contiguous()
    assert torch.equal(gradient, torch.stack(gradients, dim=1))


@pytest.mark.usefixtures("cpp_engine")
def test_side_by_side_passes_opcheck_and_compiles():
    q, k, v, cu, positions = packed((9, 4), 2, 8, torch.float32)
    qkv = torch.stack((q, k, v), dim=1).requires_grad_()
    torch.library.opcheck(torch.ops.gac_fast.window_attention_qkv.default, (qkv, cu, 3, positions, 100.0))
    compiled = torch.compile(lambda x: 2 * ops.window_attention_qkv(x, cu, 3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv), 2 * ops.window_attention_qkv(qkv, cu, 3))


def test_side_by_side_names_bad_arguments():
    q, k, v, cu, _ = packed((9, 4), 2, 8, torch.float32)
    qkv = torch.stack((q, k, v), dim=1)
    with pytest.raises(ValueError, match=r"qkv: expected shape \[N, 3, H, d\], got \[13, 2, 2, 8\]"):
        ops.window_attention_qkv(qkv[:, :2], cu, 3)
    with pytest.raises(ValueError, match="qkv: expected dtype float32 or bfloat16 or float64, got float16"):
        ops.window_attention_qkv(qkv.half(), cu, 3)
    with pytest.raises(ValueError, match="qkv: expected an even head width of 8 to 256, got 7"):
        ops.window_attention_qkv(qkv[..., :7], cu, 3)
    with pytest.raises(ValueError, match="window: expected at least 1 token, got 0"):
        ops.window_attention_qkv(qkv, cu, 0)


@pytest.mark.usefixtures("isa")
def test_cpp_positions_may_be_anything():
    q, k, v, cu, positions = packed((30, 10), 1, 8, torch.float32)
    near = ops.window_attention(q, k, v, cu, 8, positions)
    # The table is shared, so the second call finds the first one's rows.
    for shift in (100_000, -5000, 99_000, 100_000):
        assert row_error(ops.window_attention(q, k, v, cu, 8, positions + shift), near) < 1e-5
    for scattered in (positions * 10**6, positions * -(10**9), positions.int()):
        compare(q, k, v, cu, 8, scattered)
    far = torch.full_like(positions, 2**63 - 1)
    far[::2] = -(2**63)
    assert bool(ops.window_attention(q, k, v, cu, 8, far).isfinite().all())


@pytest.mark.usefixtures("cpp_engine")
def test_cpp_tables_of_several_bases_and_widths():
    for _ in range(2):
        for width, base in itertools.product((8, 10, 16), (10.0, 100.0, 10000.0)):
            q, k, v, cu, positions = packed((12,), 1, width, torch.float32)
            expected = dense(q.double(), k.double(), v.double(), cu, 4, positions, base)
            assert row_error(ops.window_attention(q, k, v, cu, 4, positions, base), expected) < 1e-5


@pytest.mark.usefixtures("cpp_engine")
def test_cpp_gradients_of_one_fused_product():
    *_, cu, positions = packed((20, 9), 2, 8, torch.float32)
    product = torch.randn(29, 48, requires_grad=True)
    ops.window_attention(*product.view(29, 3, 2, 8).unbind(1), cu, 5, positions).square().sum().backward()
    exact = product.detach().double().requires_grad_()
    dense(*exact.view(29, 3, 2, 8).unbind(1), cu, 5, positions).square().sum().backward()
    assert row_error(product.grad, exact.grad) < 1e-5


@pytest.mark.usefixtures("cpp_engine")
def test_cpp_no_tokens_and_an_unused_output():
    q, k, v, cu, positions = packed((0, 0), dtype=torch.float32)
    q.requires_grad_()
    ops.window_attention(q, k, v, cu, 3, positions).sum().backward()
    assert q.grad.shape == (0, 2, 8)
    q, k, v, cu, _ = packed((3, 4), dtype=torch.float32)
    out = ops.window_attention(q.requires_grad_(), k, v, cu, 3)
    (grad,) = torch.autograd.grad(out[:3].sum() * 0.0, q)
    assert float(grad.abs().max()) == 0.0
    assert ops.dispatch_counts() == {("window_attention", "cpp"): 2}


BAD_OFFSETS = {
    "start": ([1, 7], r"cu_seqlens: expected 0 at position 0, got 1"),
    "negative": ([0, -1, 7], r"cu_seqlens: expected offsets that do not fall, got -1 at position 1 after 0"),
    "falling": ([0, 5, 3, 7], r"cu_seqlens: expected offsets that do not fall, got 3 at position 2 after 5"),
    "short": ([0, 3, 6], r"cu_seqlens: expected 7, the number of tokens, at position 2, got 6"),
    "long": ([0, 3, 2**40], r"cu_seqlens: expected 7, the number of tokens, at position 2, got 1099511627776"),
}


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize(("offsets", "message"), BAD_OFFSETS.values(), ids=BAD_OFFSETS.keys())
def test_cpp_names_bad_offsets(offsets, message):
    q, k, v, _, positions = packed((3, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.window_attention(q, k, v, torch.tensor(offsets), 2, positions)
    q = q.requires_grad_()
    cu = torch.tensor([0, 3, 7])
    out = ops.window_attention(q, k, v, cu, 2, positions)
    cu.copy_(torch.tensor([0, 7, 3]))
    # Autograd sees the change first.
    with pytest.raises((ValueError, RuntimeError)):
        out.sum().backward()


BAD_ARRAYS = {
    "dtype of q": ({"q": np.zeros((7, 2, 8))}, r"q: expected dtype float32 or int16 .*, got float64"),
    "dtype of v": ({"v": np.zeros((7, 2, 8), np.int16)}, r"v: expected dtype float32 as q, got int16"),
    "rank": ({"q": np.zeros((7, 16), np.float32)}, r"q: expected shape \(\*, \*, \*\), got \(7, 16\)"),
    "shape": ({"k": np.zeros((7, 1, 8), np.float32)}, r"k: expected shape \(7, 2, 8\), got \(7, 1, 8\)"),
    "stride": ({"k": np.zeros((7, 2, 16), np.float32)[..., ::2]}, r"k: expected neighbouring elements in a head"),
    "width": (
        {x: np.zeros((7, 2, 9), np.float32) for x in "qkv"},
        r"q: expected an even head width of 8 to 256, got 9",
    ),
    "offsets": ({"cu_seqlens": np.zeros((0,), np.int64)}, r"cu_seqlens: expected at least 1 offset, got 0"),
    "offsets' dtype": ({"cu_seqlens": np.zeros((2,))}, r"cu_seqlens: expected dtype int32 or int64, got float64"),
    "window": ({"window": 0}, r"window: expected at least 1 token, got 0"),
    "positions": ({"positions": np.zeros((6,), np.int64)}, r"positions: expected shape \(7\), got \(6\)"),
    "base": ({"rope_base": float("nan")}, r"rope_base: expected a positive number, got nan"),
    "out": ({"out": np.zeros((7, 2, 7), np.float32)}, r"out: expected shape \(7, 2, 8\), got \(7, 2, 7\)"),
    "softmax": ({"softmax": np.zeros((2, 7, 2), np.float32)}, r"softmax: expected shape \(2, 2, 7\), got \(2, 7, 2\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_the_binding_names_bad_arrays(cpp_engine, change, message):
    arguments = {x: np.zeros((7, 2, 8), np.float32) for x in ("q", "k", "v", "out")}
    arguments |= {"cu_seqlens": np.array([0, 3, 7]), "window": 2, "positions": np.arange(7), "rope_base": 10.0}
    arguments |= {"softmax": np.zeros((2, 2, 7), np.float32), "n_threads": 1}
    cpp_engine._window_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        cpp_engine._window_attention(**(arguments | change))


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_registered_ops(dtype):
    q, k, v, cu, positions = packed((9, 6), dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.gac_fast.window_attention.default, (*leaves, cu, 4, positions, 10.0))
    torch.library.opcheck(torch.ops.gac_fast.window_attention.default, (*leaves, cu, 4, None, 10.0))
    out, softmax = torch.ops.gac_fast.window_attention(q, k, v, cu, 4, positions, 10.0)
    arguments = (out, q, k, v, cu, 4, positions, 10.0, softmax)
    torch.library.opcheck(torch.ops.gac_fast.window_attention_backward.default, arguments)


@pytest.mark.usefixtures("cpp_engine")
def test_compiles_into_one_graph():
    q, k, v, cu, positions = packed((9, 6), dtype=torch.float32)

    def attend(q):
        return ops.window_attention(q, k, v, cu, 4, positions).square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    plain, traced = q.clone().requires_grad_(), q.clone().requires_grad_()
    attend(plain).backward()
    compiled(traced).backward()
    assert torch.equal(plain.grad, traced.grad)
    assert float(plain.grad.abs().max()) > 0
