"""Launches as values, and choices: what all Triton kernels share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_fixtures import assert_fits, resources

from gac_fast.kernels._launch import Launch, Option


@triton.jit
def scale_kernel(p_x, p_out, n, factor, p_bias, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + offsets, mask=offsets < n)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    if p_bias is not None:
        b_x += tl.load(p_bias)
    tl.store(p_out + offsets, b_x * factor, mask=offsets < n)


def launch(x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None, block: int = 64) -> Launch:
    option = Option((("BLOCK", block),), 4, 2)
    grid = (triton.cdiv(x.numel(), block),)
    arguments = {"p_x": x, "p_out": out, "n": x.numel(), "factor": 2.5, "p_bias": bias}
    return Launch(scale_kernel, grid, arguments, {"UPCAST": True}, option)


def test_interpreter_runs_a_launch(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.interpreter
@pytest.mark.parametrize("bias", [None, torch.tensor([3.0])], ids=["none", "bias"])
def test_interpreted_launch(bias):
    x, out = torch.randn(100), torch.full((100,), torch.nan)
    launch(x, out, bias).run()
    torch.testing.assert_close(out, 2.5 * (x if bias is None else x + 3))


def test_a_grid_of_nothing_starts_nothing():
    launch(torch.empty(0), torch.empty(0)).run()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_launch_compiles_without_a_gpu(architecture, device, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.empty(4096, dtype=torch.bfloat16, device=device)
    found = assert_fits(launch(x, torch.empty_like(x)), architecture, tmp_path)
    assert 0 < found.registers <= 255


def test_aligned_arguments_are_compiled_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.empty(4097, dtype=torch.float32)
    wide = launch(x[:4096], torch.empty(4096), block=512).compile(90).asm["ptx"]
    narrow = launch(x[1:], torch.empty(4096), block=512).compile(90).asm["ptx"]
    assert "ld.global.v4" in wide
    assert "ld.global.v4" not in narrow


@triton.jit(do_not_specialize=["n_plain"])
def sizes_kernel(p_x, n_one, n_sixteen, n_plain):
    tl.store(p_x, n_one + n_sixteen + n_plain)


def test_numbers_are_compiled_as_the_launcher_specialises_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def code(**numbers: int) -> str:
        x = torch.empty(16, dtype=torch.int32, device="meta")
        launched = Launch(sizes_kernel, (1,), {"p_x": x, **numbers}, {}, Option((), 4, 1))
        return str(launched.compile(90).asm["ttir"]).split(") attributes")[0].split("tt.func")[1]

    plain = code(n_one=3, n_sixteen=5, n_plain=7)
    assert all(f"%{name}: i32" in plain for name in ("n_one", "n_sixteen", "n_plain"))
    special = code(n_one=1, n_sixteen=32, n_plain=16)
    assert "%n_one" not in special
    assert "%n_sixteen: i32 {tt.divisibility = 16" in special
    assert "%n_plain: i32 {" not in special
    assert code(n_one=3, n_sixteen=5, n_plain=1) == plain


def test_spills_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    big = outer_launch()
    assert resources(big, 90, tmp_path).stack + resources(big, 90, tmp_path).local > 0
    with pytest.raises(AssertionError, match="outer_kernel"):
        assert_fits(big, 90, tmp_path)


@triton.jit
def outer_kernel(p_x, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    b = b_x[:, None] * b_x[None, :]
    b += tl.sqrt(b)
    tl.store(p_out + o[:, None] * BLOCK + o[None, :], b * tl.sum(b))


def outer_launch() -> Launch:
    x = torch.empty(256, device="meta")
    return Launch(outer_kernel, (1,), {"p_x": x, "p_out": torch.empty(256, 256, device="meta")}, {},
                  Option((("BLOCK", 256),), 4, 1))  # fmt: skip
