"""window_attention against a dense mask in float64: forward, gradients, odd sizes, strides, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import row_error
from torch import Tensor

from gac_fast import ops


def dense(q, k, v, cu_seqlens, window, positions=None, rope_base=10000.0) -> Tensor:
    """The definition: one [N, N] mask; rotary as a product of complex numbers."""
    n, _, width = q.shape
    if positions is not None:
        half = width // 2
        frequency = torch.tensor([rope_base ** (-2 * i / width) for i in range(half)], dtype=torch.float64)
        turn = torch.exp(1j * positions.double()[:, None, None] * frequency)

        def rotate(x: Tensor) -> Tensor:
            y = torch.complex(x[..., :half], x[..., half:]) * turn
            return torch.cat((y.real, y.imag), dim=-1)

        q, k = rotate(q), rotate(k)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(n), right=True)
    visible = (owner[:, None] == owner[None, :]) & (j <= i) & (i - j < window)
    score = torch.einsum("ihd,jhd->hij", q, k) / width**0.5
    weight = torch.softmax(score.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.einsum("hij,jhd->ihd", weight, v)


def packed(lengths, heads=2, width=8, dtype=torch.float64, seed=0):
    """q, k, v as slices of one fused product (strided), offsets, positions."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    qkv = torch.randn(n, 3, heads, width, generator=generator, dtype=torch.float64)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]) if n else torch.zeros(0, dtype=torch.int64)
    return (*qkv.to(dtype).unbind(1), cu, positions)


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
