"""Sums over tokens that the C++ engine makes weight gradients of: every path, odd sizes, both precisions."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error
from torch import Tensor

SIZES = [(128, 128), (512, 128), (128, 512), (3, 64), (96, 40), (33, 17), (1, 1), (5, 200)]


def array(x: Tensor):
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def run(engine, maps: list[tuple[Tensor, Tensor]], n_threads: int = 1) -> list[Tensor]:
    out = [torch.full((dy.shape[1], x.shape[1]), torch.nan) for dy, x in maps]
    engine._weight_gradients(
        [(array(dy), array(x), dw.numpy(), []) for (dy, x), dw in zip(maps, out, strict=True)], n_threads
    )
    return out


def rows(n: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of neighbouring elements, some way apart, NaN between them."""
    storage = torch.full((n, width + 5), torch.nan, dtype=dtype)
    storage[:, 2 : 2 + width] = torch.randn(n, width, generator=generator).to(dtype)
    return storage[:, 2 : 2 + width]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("n", [0, 1, 2, 31, 33, 257, 2048, 2049, 5000])
def test_sums_over_rows(cpp_engine, n, dtype):
    generator = torch.Generator().manual_seed(n)
    maps = [(rows(n, o, dtype, generator), rows(n, i, dtype, generator)) for o, i in SIZES[:: 1 if n < 300 else 3]]
    for (dy, x), dw in zip(maps, run(cpp_engine, maps), strict=True):
        # The operands are what they are: bfloat16 rounds nothing here, so the bound is that of float32 sums.
        scale = dy.double().norm(dim=0)[:, None] * x.double().norm(dim=0)[None]
        expected = dy.double().T @ x.double()
        assert dw.isfinite().all()
        if n < 2:
            assert row_error(dw, expected) < 1e-6
        else:
            # Sums of random signs cancel: an element is held against what was added up, not against what is left.
            assert float(((dw - expected).abs() / scale).max()) < 1e-6, (dy.shape, x.shape)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_bits_do_not_depend_on_threads_or_on_the_other_maps(cpp_engine, dtype):
    generator = torch.Generator().manual_seed(0)
    maps = [(rows(5000, o, dtype, generator), rows(5000, i, dtype, generator)) for o, i in SIZES[2:6]]
    expected = run(cpp_engine, maps)
    for n_threads in (2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(run(cpp_engine, maps, n_threads), expected, strict=True))
    for one, dw in zip(maps, expected, strict=True):
        assert torch.equal(run(cpp_engine, [one])[0], dw)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("n_out", "n_in"), [(40, 96), (33, 17), (3, 64)])
def test_gradients_of_a_folded_norm_are_taken_apart(cpp_engine, n_out, n_in):
    """The map W (x * norm_w + norm_b): from the operand before scale and offset to the gradients of all three."""
    g = torch.Generator().manual_seed(0)
    dy, x, w = (torch.randn(*s, generator=g) for s in ((50, n_out), (50, n_in), (n_out, n_in)))
    norm_w, norm_b = torch.randn(n_in, generator=g), torch.randn(n_in, generator=g)
    leaves = [t.double().requires_grad_() for t in (w, norm_w, norm_b)]
    ((x.double() * leaves[1] + leaves[2]) @ leaves[0].T * dy.double()).sum().backward()
    dw, dnorm_w, dnorm_b = torch.full((n_out, n_in), torch.nan), torch.full((n_in,), torch.nan), torch.zeros(n_in)
    norm = [t.numpy() for t in (w, dy.sum(0), norm_w, norm_b, dnorm_w, dnorm_b)]
    cpp_engine._weight_gradients([(dy.numpy(), x.numpy(), dw.numpy(), norm)], 2)
    for found, leaf in zip((dw, dnorm_w, dnorm_b), leaves, strict=True):
        assert row_error(found, leaf.grad) < 1e-5


def test_no_maps_and_empty_maps(cpp_engine):
    cpp_engine._weight_gradients([], 2)
    assert run(cpp_engine, [(torch.ones(4, 0), torch.ones(4, 3))])[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([(torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 3), torch.ones(2, 3))], r"maps\[0\].dy: .*float64"),
        ([(torch.ones(4), torch.ones(4, 3), torch.ones(2, 3))], r"maps\[0\].dy: expected shape \(\*, \*\), got \(4\)"),
        ([(torch.ones(4, 2), torch.ones(5, 3), torch.ones(2, 3))], r"maps\[0\].x: expected shape \(4, \*\)"),
        ([(torch.ones(4, 2), torch.ones(4, 3), torch.ones(3, 2))], r"maps\[0\].dw: expected shape \(2, 3\)"),
        ([(torch.ones(4, 2), torch.ones(4, 3), torch.ones(2, 6)[:, ::2])], r"maps\[0\].dw: expected rows of neigh"),
        ([(torch.ones(4, 2), torch.ones(4, 3), torch.ones(2, 6)[:, :3])], r"maps\[0\].dw: expected rows without gaps"),
        ([(torch.ones(2, 4).T, torch.ones(4, 3), torch.ones(2, 3))], r"maps\[0\].dy: expected rows of neighbouring"),
        (
            [(torch.ones(4, 2), torch.ones(4, 3, dtype=torch.int16), torch.ones(2, 3))],
            r"maps\[0\].x: expected dtype float32",
        ),
        (
            [(torch.ones(4, 2), torch.ones(4, 3), torch.ones(2, 3))] * 2
            + [(torch.ones(4, 2, dtype=torch.int16), torch.ones(4, 3, dtype=torch.int16), torch.ones(2, 3))],
            r"maps\[2\].dy: expected the dtype of the first map, got int16",
        ),
    ],
    ids=range(9),
)
def test_bad_arrays_are_named(cpp_engine, maps, message):
    with pytest.raises(ValueError, match=message):
        cpp_engine._weight_gradients([(*(x.numpy() for x in one), []) for one in maps], 1)
