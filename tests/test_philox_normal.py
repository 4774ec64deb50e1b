"""Philox4x32-10 and Box-Muller: reference against published vectors, every engine against the reference."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.errors import BackendError

if INTERPRETED:
    import triton
    import triton.language as tl

    from gac_fast.kernels.philox_normal import box_muller

    @triton.jit
    def box_muller_kernel(p_words, p_angles, p_out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        x0, x1 = box_muller(tl.load(p_words + i).to(tl.uint32), tl.load(p_angles + i).to(tl.uint32))
        tl.store(p_out + i, x0)
        tl.store(p_out + BLOCK + i, x1)


SEED = (0xDEADBEEF, 0x12345678)
SIZES = [1, 3, 4, 77, 1024, 1027]


def ids(n_plans: int) -> tuple[Tensor, Tensor]:
    """Plans and steps that use all 32 bits, the extremes first."""
    generator = torch.Generator().manual_seed(0)
    plans, steps = torch.randint(0, 1 << 32, (2, n_plans), generator=generator).unbind(0)
    plans[0] = (1 << 32) - 1
    steps[0] = 0
    return plans.clone(), steps.clone()


def reference_words(seed: tuple[int, int], plans: Tensor, steps: Tensor, n: int) -> Tensor:
    counter = torch.zeros(len(plans), (n + 3) // 4, 4, dtype=torch.int64)
    counter[..., 0] = torch.arange((n + 3) // 4)
    counter[..., 1] = plans[:, None]
    counter[..., 2] = steps[:, None]
    return reference.philox4x32(seed, counter).reshape(len(plans), -1)[:, :n]


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF,) * 4,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_reference_gives_the_known_answers_of_random123(key, counter, expected):
    assert tuple(reference.philox4x32(key, torch.tensor(counter)).tolist()) == expected


def test_reference_normals_have_the_moments_of_a_standard_normal():
    x = reference.philox_normal(SEED, torch.arange(64), 0, 4096).double()
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Neighbours share a Philox call or a word pair, and must still be independent.
    for lag in (1, 2, 3, 4):
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 5 / math.sqrt(n)


# ---------------------------------------------------------------------------------------------------------------------
# The C++ engine


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("n", [*SIZES, 4096 * 2 + 6])
def test_cpp_words_are_bit_equal(cpp_engine, n):
    plans, steps = ids(5)
    for n_threads in (1, 3):
        out = torch.full((5, n), -1)
        cpp_engine._philox_words(*SEED, plans.numpy(), steps.numpy(), out.numpy(), n_threads)
        assert torch.equal(out, reference_words(SEED, plans, steps, n))


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("n", SIZES)
def test_cpp_normals_equal_the_reference(n):
    plans, steps = ids(5)
    with ops.backend("cpp"):
        actual = ops.philox_normal(SEED, plans, steps, n)
    torch.testing.assert_close(actual, reference.philox_normal(SEED, plans, steps, n), rtol=0, atol=1e-6)
    assert ops.dispatch_counts() == {("philox_normal", "cpp"): 1}


@pytest.mark.usefixtures("isa")
def test_cpp_normals_of_a_million_words_stay_close(cpp_engine):
    plans = torch.arange(250)
    out = torch.empty(250, 4096)
    cpp_engine._philox_normal(*SEED, plans.numpy(), plans.numpy(), out.numpy())
    expected = reference.philox_normal(SEED, plans, plans, 4096)
    assert float(expected.abs().max()) > 5  # the tail is there
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_cpp_normals_do_not_depend_on_the_threads(cpp_engine):
    plans, steps = ids(37)
    for n in (5, 1027, 9001):
        single, several = torch.empty(2, 37, n).unbind(0)
        cpp_engine._philox_normal(*SEED, plans.numpy(), steps.numpy(), single.numpy(), 1)
        cpp_engine._philox_normal(*SEED, plans.numpy(), steps.numpy(), several.numpy(), 3)
        assert torch.equal(single, several)


# ---------------------------------------------------------------------------------------------------------------------
# The public op, on whatever engines run here


@pytest.fixture(params=["reference", "cpp"])
def on_backend(request):
    if request.param == "cpp":
        request.getfixturevalue("cpp_engine")
    with ops.backend(request.param):
        yield request.param


@pytest.mark.usefixtures("on_backend")
def test_fills_a_strided_output_and_nothing_beside_it():
    plans, steps = ids(6)
    wide_plans = torch.stack((plans, plans + 1), dim=1)[:, 0]
    for out_of in (lambda x: x[1:4, 2:15], lambda x: x[::2, ::3], lambda x: x.t()[:6, :7]):
        storage = torch.full((12, 45), math.nan)
        out = out_of(storage)
        expected = reference.philox_normal(SEED, plans[: len(out)], steps[: len(out)], out.shape[1])
        assert ops.philox_normal(SEED, wide_plans[: len(out)], steps[: len(out)], out.shape[1], out=out) is out
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert storage.isnan().sum() == storage.numel() - out.numel()


@pytest.mark.usefixtures("on_backend")
def test_one_step_for_all_plans_equals_that_step_for_each():
    plans, _ = ids(3)
    assert torch.equal(ops.philox_normal(SEED, plans, 7, 9), ops.philox_normal(SEED, plans, torch.full((3,), 7), 9))


@pytest.mark.usefixtures("on_backend")
def test_noise_depends_on_seed_plan_step_and_element_alone():
    plans = torch.tensor([4, 9])
    x = ops.philox_normal(SEED, plans, 3, 40)
    assert torch.equal(ops.philox_normal(SEED, plans.flip(0), 3, 16), x.flip(0)[:, :16])
    for other in (
        ops.philox_normal((SEED[0], SEED[1] ^ 1), plans, 3, 40),
        ops.philox_normal(SEED, plans + 1, 3, 40),
        ops.philox_normal(SEED, plans, 4, 40),
    ):
        assert (other != x).all()


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize(("n_plans", "n"), [(0, 8), (3, 0)])
def test_empty_output(n_plans, n):
    assert ops.philox_normal(SEED, torch.arange(n_plans), 0, n).shape == (n_plans, n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": (1, 1 << 32)}, r"seed: expected two words within \[0, 2\^32\), got \(1, 4294967296\)"),
        ({"seed": (1, 2, 3)}, r"seed: expected two words"),
        ({"plans": torch.arange(3, dtype=torch.int32)}, "plans: expected dtype int64, got int32"),
        ({"plans": torch.zeros(3, 1, dtype=torch.int64)}, r"plans: expected shape \[P\], got \[3, 1\]"),
        ({"step": -1}, r"step: expected a value within \[0, 2\^32\), got -1"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, r"step: expected shape \[3\], got \[2\]"),
        ({"n": -1}, r"n: expected 0 to 2\^34 elements, got -1"),
        ({"out": torch.zeros(3, 7)}, r"out: expected shape \[3, 8\], got \[3, 7\]"),
        ({"out": torch.zeros(3, 8, dtype=torch.float64)}, "out: expected dtype float32, got float64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.philox_normal(**{"seed": SEED, "plans": torch.arange(3), "step": 0, "n": 8, **arguments})


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize("where", ["plans", "step"])
def test_cpp_names_an_id_out_of_range_and_writes_nothing(where):
    arguments = {"plans": torch.arange(3), "step": torch.zeros(3, dtype=torch.int64)}
    arguments[where] = torch.tensor([0, 1, 1 << 32])
    out = torch.full((3, 8), math.nan)
    message = rf"{where}: expected values within \[0, 2\^32\), got 4294967296 in row 2"
    with ops.backend("cpp"), pytest.raises(ValueError, match=message):
        ops.philox_normal(SEED, **arguments, n=8, out=out)
    assert out.isnan().all()


def test_triton_does_not_run_on_cpu_tensors():
    with ops.backend("triton"), pytest.raises(BackendError, match=r"philox_normal: .* got cpu tensors"):
        ops.philox_normal(SEED, torch.arange(3), 0, 8)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5)], ids=str)
def test_registered_op_passes_opcheck(on_backend, shape):
    arguments = (torch.zeros(shape), torch.arange(shape[0]), torch.ones(shape[0], dtype=torch.int64), *SEED)
    torch.library.opcheck(torch.ops.gac_fast.philox_normal_.default, arguments)


def test_compiles_into_one_graph(on_backend):
    def noise(plans: Tensor, step: Tensor) -> Tensor:
        return 2 * ops.philox_normal(SEED, plans, step, 10)

    plans, steps = ids(4)
    # The tracer is under test, not the code generator behind it.
    compiled = torch.compile(noise, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(plans, steps), noise(plans, steps))
    assert set(ops.dispatch_counts()) == {("philox_normal", on_backend)}


# ---------------------------------------------------------------------------------------------------------------------
# The Triton kernel: by the interpreter on CPU tensors, compiled without a GPU, and on a GPU where there is one


def test_triton_interpreter_agrees(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.interpreter
@pytest.mark.parametrize("n", SIZES)
def test_interpreted_words_are_bit_equal(n):
    from gac_fast.kernels import philox_normal as kernel

    plans, steps = ids(3)
    out = torch.full((3, n), -1)
    kernel.philox_words(SEED, plans, steps, out)
    assert torch.equal(out, reference_words(SEED, plans, steps, n))


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("n", SIZES)
def test_interpreted_normals_equal_the_reference(n):
    plans, steps = ids(3)
    with ops.backend("triton"):
        actual = ops.philox_normal(SEED, plans, steps, n)
    torch.testing.assert_close(actual, reference.philox_normal(SEED, plans, steps, n), rtol=0, atol=1e-6)
    assert ops.dispatch_counts() == {("philox_normal", "triton"): 1}


@pytest.mark.interpreter
def test_interpreted_kernel_fills_a_strided_output_and_nothing_beside_it():
    plans, steps = ids(6)
    storage = torch.full((5, 60), math.nan)
    out = storage[1:4, 3:50:3]
    with ops.backend("triton"):
        ops.philox_normal(SEED, plans[::2], steps[::2], out.shape[1], out=out)
    expected = reference.philox_normal(SEED, plans[::2], steps[::2], out.shape[1])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert storage.isnan().sum() == storage.numel() - out.numel()


@pytest.mark.interpreter
def test_interpreted_box_muller_is_exact_at_its_edges():
    """The largest radii, u next to 1, the branch point of the logarithm, and the borders of the quarter turns."""
    branch = 0xB504F334
    radii = [0, 1, 2, 3, 100, branch - 1, branch, branch + 1, 0xFFFFFF00, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 31]
    quarters = [(k << 29) + d for k in range(9) for d in (-1, 0, 1) if 0 <= (k << 29) + d < 1 << 32]
    words, angles = torch.cartesian_prod(torch.tensor(radii), torch.tensor(quarters)).t().contiguous()
    block = triton.next_power_of_2(len(words))
    words, angles = (torch.nn.functional.pad(x, (0, block - len(x))) for x in (words, angles))
    out = torch.full((2, block), math.nan)
    box_muller_kernel[(1,)](words, angles, out, BLOCK=block)

    radius = (-2 * ((words.double() + 1) * 2.0**-32).log()).sqrt()
    angle = angles.double() * (2 * math.pi * 2.0**-32)
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("raw_words", [False, True], ids=["normals", "words"])
@pytest.mark.parametrize("architecture", [80, 90], ids=["sm_80", "sm_90"])
def test_compiles_without_a_gpu_and_without_spills(architecture, raw_words, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gac_fast.kernels.philox_normal import philox_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    pointers = {"p_out": "*i64" if raw_words else "*fp32", "p_plans": "*i64", "p_steps": "*i64"}
    constants = {"BLOCK": 256, "RAW_WORDS": raw_words}
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i64" if name.startswith("stride") else "i32")
        for name in philox_kernel.arg_names
    }
    source = ASTSource(fn=philox_kernel, signature=signature, constexprs=constants)
    cubin = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
    assert cubin[:4] == b"\x7fELF"

    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    assert "Function philox_kernel" in usage
    assert " STACK:0 " in usage
    assert " LOCAL:0 " in usage


@pytest.mark.gpu
@pytest.mark.parametrize("n", SIZES)
def test_gpu_equals_the_reference(n):
    plans, steps = (x.cuda() for x in ids(5))
    actual = ops.philox_normal(SEED, plans, steps, n)
    assert ops.dispatch_counts() == {("philox_normal", "triton"): 1}
    torch.testing.assert_close(actual.cpu(), reference.philox_normal(SEED, plans, steps, n).cpu(), rtol=0, atol=1e-6)
