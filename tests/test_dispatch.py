"""Backend choice, forced backends, counters, and the argument checks of the attention ops."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.errors import BackendError
from gac_fast.ops import _dispatch

CPU = torch.device("cpu")


def noise() -> Tensor:
    return ops.philox_normal((1, 2), torch.arange(2), 0, 5)


@pytest.fixture
def without_cpp(monkeypatch):
    monkeypatch.setattr(_dispatch, "_load_cpp_engine", lambda: (None, "gac_fast._C is not installed"))
    monkeypatch.setattr(_dispatch, "_told_of_missing_engine", True)


# ---------------------------------------------------------------------------------------------------------------------
# Choice


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        ({"major": 9, "shared_memory_per_block_optin": 232448}, None),
        ({"major": 8, "shared_memory_per_block_optin": 166912}, None),
        ({"major": 8, "shared_memory_per_block_optin": 101376}, "163 KiB of shared memory per block, a card has 99"),
        ({"major": 7, "shared_memory_per_block_optin": 98304}, "compute capability 8.0 or more, a card has 7.0"),
    ],
    ids=["H100", "A100", "small", "old"],
)
def test_devices_that_the_kernels_do_not_fit_are_named(monkeypatch, properties, problem):
    card = types.SimpleNamespace(name="a card", **properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    found = _dispatch._device_problem.__wrapped__(torch.device("cuda"))
    assert found is None if problem is None else problem in found


@pytest.mark.usefixtures("cpp_engine")
def test_cpu_takes_the_cpp_engine_where_it_is_installed():
    noise()
    assert ops.dispatch_counts() == {("philox_normal", "cpp"): 1}


@pytest.mark.usefixtures("without_cpp")
def test_cpu_takes_the_reference_without_the_cpp_engine():
    noise()
    assert ops.dispatch_counts() == {("philox_normal", "reference"): 1}


def test_counts_add_up_per_op_and_backend_until_reset():
    with ops.backend("reference"):
        noise()
        noise()
        ops.pack_batch(torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor([0, 3]), torch.tensor([0]))
    assert ops.dispatch_counts() == {("philox_normal", "reference"): 2, ("pack_batch", "reference"): 1}
    ops.reset_dispatch_counts()
    assert ops.dispatch_counts() == {}


def test_environment_variable_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv("GAC_FAST_BACKEND", "reference")
    noise()
    assert ops.dispatch_counts() == {("philox_normal", "reference"): 1}
    monkeypatch.setenv("GAC_FAST_BACKEND", "triton")
    with pytest.raises(
        BackendError, match="philox_normal: GAC_FAST_BACKEND forces the triton backend, which cannot run"
    ):
        noise()


def test_context_manager_goes_before_the_environment_variable_and_nests(monkeypatch):
    monkeypatch.setenv("GAC_FAST_BACKEND", "triton")
    with ops.backend("reference"):
        noise()
        with ops.backend("triton"), pytest.raises(BackendError, match=r"backend\(\) forces the triton backend"):
            noise()
        noise()
    with pytest.raises(BackendError, match="GAC_FAST_BACKEND"):
        noise()
    assert ops.dispatch_counts() == {("philox_normal", "reference"): 2}


def test_context_manager_ends_with_an_error_inside_it():
    with pytest.raises(ZeroDivisionError), ops.backend("triton"):
        raise ZeroDivisionError
    noise()


def test_context_manager_holds_for_its_own_thread(monkeypatch):
    monkeypatch.setenv("GAC_FAST_BACKEND", "reference")
    failed = []

    def call() -> None:
        try:
            noise()
        except BackendError as error:
            failed.append(error)

    with ops.backend("triton"):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert not failed


def test_unknown_backends_are_refused(monkeypatch):
    with pytest.raises(BackendError, match=r"backend\(\): expected one of reference, triton, cpp, got 'cuda'"):
        ops.backend("cuda").__enter__()
    monkeypatch.setenv("GAC_FAST_BACKEND", "C++")
    with pytest.raises(BackendError, match=r"GAC_FAST_BACKEND: expected one of reference, triton, cpp, got 'C\+\+'"):
        noise()


@pytest.mark.usefixtures("without_cpp")
def test_a_forced_backend_that_is_not_installed_raises():
    with ops.backend("cpp"), pytest.raises(BackendError, match=r"cannot run: gac_fast\._C is not installed"):
        noise()


def test_a_forced_backend_without_an_engine_for_the_op_raises():
    with ops.backend("triton"), pytest.raises(BackendError, match="pack_batch has no triton engine"):
        _dispatch.choose("pack_batch", torch.device("cpu"))


@pytest.mark.usefixtures("cpp_engine")
def test_arguments_that_no_engine_takes_go_to_the_reference_or_raise():
    q = torch.zeros(4, 1, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 4])
    ops.window_attention(q, q, q, cu_seqlens, 2)
    ops.plan_attention(q, q[None], q[None], cu_seqlens)
    assert ops.dispatch_counts() == {("window_attention", "reference"): 1, ("plan_attention", "reference"): 1}
    ops.window_attention(q.float(), q.float(), q.float(), cu_seqlens, 2)
    assert ops.dispatch_counts()["window_attention", "cpp"] == 1
    with ops.backend("cpp"), pytest.raises(BackendError, match="cannot run: the engines take float32 and bfloat16"):
        ops.window_attention(q, q, q, cu_seqlens, 2)
    with ops.backend("reference"):
        ops.window_attention(q, q, q, cu_seqlens, 2)


@pytest.mark.usefixtures("cpp_engine")
def test_an_engine_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(_dispatch, "__version__", "99.0")
    _dispatch._load_cpp_engine.cache_clear()
    try:
        reason = _dispatch.problem("pack_batch", "cpp", CPU)
    finally:
        _dispatch._load_cpp_engine.cache_clear()
    assert reason is not None
    assert "the package is 99.0: install it again" in reason


@pytest.fixture
def launcher_probe(monkeypatch):
    """The probe for Triton's compiler with nothing remembered, on a machine that calls it gcc and has the headers."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_dispatch, "_triton_missing", lambda: None)
    monkeypatch.setattr(_dispatch.shutil, "which", lambda name: name if name == "gcc" else None)
    monkeypatch.setattr(_dispatch.Path, "exists", lambda path: path.name == "Python.h")
    _dispatch._launcher_problem.cache_clear()
    yield monkeypatch
    _dispatch._launcher_problem.cache_clear()


def test_a_gpu_without_a_c_compiler_takes_the_reference(launcher_probe):
    cuda = torch.device("cuda")
    assert _dispatch.problem("philox_normal", "triton", cuda) is None
    assert _dispatch._select("philox_normal", cuda) == "triton"
    launcher_probe.setattr(_dispatch.shutil, "which", lambda name: None)
    # It was asked once.
    assert _dispatch.problem("philox_normal", "triton", cuda) is None
    _dispatch._launcher_problem.cache_clear()
    reason = "Triton needs a C compiler at run time, and neither gcc nor clang is found (CC names another)"
    assert _dispatch.problem("philox_normal", "triton", cuda) == reason
    assert _dispatch._select("philox_normal", cuda) == "reference"


def test_the_compiler_that_cc_names_has_to_be_there(launcher_probe):
    launcher_probe.setenv("CC", "gcc-99")
    reason = _dispatch.problem("philox_normal", "triton", torch.device("cuda"))
    assert reason == "Triton needs a C compiler at run time, and CC names 'gcc-99', which is not found"


def test_the_launcher_needs_the_headers_of_python(launcher_probe):
    launcher_probe.setattr(_dispatch.Path, "exists", lambda path: False)
    reason = _dispatch.problem("philox_normal", "triton", torch.device("cuda"))
    assert "Triton needs the headers of Python at run time, and " in reason
    assert reason.endswith(" has no Python.h")


# ---------------------------------------------------------------------------------------------------------------------
# Status


@pytest.mark.usefixtures("cpp_engine")
def test_status_names_every_op_its_active_backend_and_the_reasons_of_the_others():
    report = {entry.op: entry for entry in ops.status("cpu")}
    assert set(report) >= {"pack_batch", "philox_normal", "plan_attention", "window_attention"}
    assert report["window_attention"].active == "cpp"
    assert report["pack_batch"].problems["triton"] == "pack_batch has no triton engine"
    assert "needs CUDA tensors" in report["philox_normal"].problems["triton"]
    for entry in report.values():
        assert "reference" not in entry.problems
        assert str(entry).startswith(f"{entry.op} on cpu: {entry.active}")
    # Asking is not calling.
    assert ops.dispatch_counts() == {}


def test_status_shows_a_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv("GAC_FAST_BACKEND", "triton")
    assert all(entry.active == "" for entry in ops.status("cpu"))


@pytest.mark.usefixtures("without_cpp")
def test_status_without_the_cpp_engine_says_so():
    entry = next(entry for entry in ops.status("cpu") if entry.op == "philox_normal")
    assert entry.active == "reference"
    assert entry.problems["cpp"] == "gac_fast._C is not installed"


# ---------------------------------------------------------------------------------------------------------------------
# Paths of the C++ engine


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own: the engine reads its variable once."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


FORCED_PATH = """
import torch
from gac_fast import _C, ops
from gac_fast.errors import BackendError

def attempt(call):
    try:
        call()
        print("ran:", _C._isa())
    except BackendError as error:
        print(error)

def noise():
    ops.philox_normal((1, 2), torch.arange(2), 0, 5)

attempt(noise)
with ops.backend("cpp"):
    attempt(noise)
with ops.backend("reference"):
    noise()
(status,) = (status for status in ops.status("cpu") if status.op == "philox_normal")
print(repr(status.active), status.problems.get("cpp"))
print(sorted(ops.dispatch_counts()))
"""


@pytest.mark.usefixtures("cpp_engine")
def test_the_variable_forces_a_path():
    done = run(FORCED_PATH, GAC_FAST_CPU_ISA="portable")
    assert done.stdout.splitlines() == [
        "ran: portable",
        "ran: portable",
        "'cpp' None",
        "[('philox_normal', 'cpp'), ('philox_normal', 'reference')]",
    ], done.stderr


@pytest.mark.usefixtures("cpp_engine")
def test_a_wrong_variable_raises_where_the_engine_is_chosen_or_forced():
    done = run(FORCED_PATH, GAC_FAST_CPU_ISA="sse9")
    reason = "GAC_FAST_CPU_ISA: expected one of portable, avx2, avx512, amx, got 'sse9'"
    assert done.stdout.splitlines() == [
        f"philox_normal: {reason}",
        f"philox_normal: backend() forces the cpp backend, which cannot run: {reason}",
        f"'' {reason}",
        "[('philox_normal', 'reference')]",
    ], done.stderr


def test_a_path_that_cannot_run_raises(cpp_engine, monkeypatch):
    def refuse():
        raise RuntimeError("GAC_FAST_CPU_ISA forces the amx path, which cannot run: the processor lacks amx_bf16")

    monkeypatch.setattr(cpp_engine, "_isa", refuse)
    with pytest.raises(BackendError, match="philox_normal: GAC_FAST_CPU_ISA forces the amx path, which cannot run: "):
        noise()
    assert ops.dispatch_counts() == {}


def test_cpu_isa_nests_and_restores(cpp_engine):
    start = cpp_engine._isa()
    with ops.cpu_isa("portable"):
        assert (cpp_engine._isa(), cpp_engine._isa_reason()) == ("portable", "forced by cpu_isa()")
        for name in (name for name, problem in cpp_engine._isa_problems() if not problem):
            with ops.cpu_isa(name):
                assert cpp_engine._isa() == name
            assert cpp_engine._isa() == "portable"
        with pytest.raises(ZeroDivisionError), ops.cpu_isa(start):
            raise ZeroDivisionError
        assert cpp_engine._isa() == "portable"
    assert cpp_engine._isa() == start


def test_cpu_isa_refuses(cpp_engine):
    start = cpp_engine._isa()
    names = "portable, avx2, avx512, amx"
    with pytest.raises(BackendError, match=rf"cpu_isa\(\): expected one of {names}, got 'AVX2'"), ops.cpu_isa("AVX2"):
        pytest.fail("entered")
    with pytest.raises(BackendError, match="got ''"), ops.cpu_isa(""):
        pytest.fail("entered")
    for name, problem in cpp_engine._isa_problems():
        if problem:
            with pytest.raises(BackendError, match=f"cpu_isa.. forces the {name} path, which cannot run: {problem}"):
                ops.cpu_isa(name).__enter__()
    assert cpp_engine._isa() == start


@pytest.mark.usefixtures("without_cpp")
def test_cpu_isa_needs_the_engine():
    with pytest.raises(BackendError, match=r"cannot run: gac_fast\._C is not installed"), ops.cpu_isa("avx2"):
        pytest.fail("entered")


MISSING_ENGINE = """
import sys

sys.modules["gac_fast._C"] = None
import torch
import gac_fast
from gac_fast import ops

for step in range(3):
    ops.philox_normal((1, 2), torch.arange(2), step, 5)
    ops.pack_batch(torch.zeros(3, 1), torch.zeros(3, 1), torch.tensor([0, 3]), torch.tensor([0]))
print(sorted(ops.dispatch_counts().items()))
"""


def test_a_missing_engine_is_told_of_once():
    done = run(MISSING_ENGINE, GAC_FAST_BACKEND="")
    assert done.stdout == "[(('pack_batch', 'reference'), 3), (('philox_normal', 'reference'), 3)]\n", done.stderr
    assert done.stderr.count("EngineWarning") == 1
    assert "run on the PyTorch reference, which is slower: gac_fast._C is not installed" in done.stderr


def test_nothing_is_told_where_the_reference_was_asked_for():
    done = run(MISSING_ENGINE, GAC_FAST_BACKEND="reference")
    assert done.stdout.startswith("[(('pack_batch', 'reference'), 3)"), done.stderr
    assert done.stderr == ""


def test_build_info_names_version_compiler_and_instruction_sets(cpp_engine):
    info = cpp_engine._build_info()
    assert set(info) == {"version", "compiler", "standard", "isa", "cpu"}
    assert info["version"] == _dispatch.__version__
    assert info["standard"] == "C++17"
    assert "portable" in info["isa"].split()
    assert set(info["isa"].split()) >= {name for name, problem in cpp_engine._isa_problems() if not problem}
    assert all(info.values())


# ---------------------------------------------------------------------------------------------------------------------
# The attention ops check what enters


def attention_arguments() -> dict:
    q, k, v = torch.randn(3, 10, 2, 8, generator=torch.Generator().manual_seed(0))
    return {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 4, 10])}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"q": torch.zeros(10, 2, 8, dtype=torch.int64)},
            "q: expected dtype float32 or bfloat16 or float64, got int64",
        ),
        ({"k": torch.zeros(10, 2, 8, dtype=torch.float64)}, "k: expected dtype float32, got float64"),
        ({"v": torch.zeros(10, 2, 8, device="meta")}, "v: expected device cpu of q, got meta"),
        ({"q": torch.zeros(10, 16)}, r"q: expected shape \[N, H, d\], got \[10, 16\]"),
        ({"k": torch.zeros(9, 2, 8)}, r"k: expected shape \[10, 2, 8\], got \[9, 2, 8\]"),
        ({"v": torch.zeros(10, 2, 16)}, r"v: expected shape \[10, 2, 8\], got \[10, 2, 16\]"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "cu_seqlens: expected dtype int32 or int64, got float32"),
        ({"cu_seqlens": torch.tensor([[0, 10]])}, r"cu_seqlens: expected shape \[B \+ 1\], got \[1, 2\]"),
        ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens: expected at least 2 offsets for 10 tokens, got 1"),
        ({"window": 0}, "window: expected at least 1 token, got 0"),
        ({"positions": torch.zeros(10)}, "positions: expected dtype int32 or int64, got float32"),
        ({"positions": torch.arange(9)}, r"positions: expected shape \[10\], got \[9\]"),
        ({"rope_base": -1.0}, "rope_base: expected a positive number, got -1.0"),
        ({"rope_base": float("nan")}, "rope_base: expected a positive number, got nan"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_window_attention_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.window_attention(**{**attention_arguments(), "window": 3, **arguments})
    assert ops.dispatch_counts() == {}


@pytest.mark.parametrize("width", [6, 9, 258])
def test_head_width_is_even_and_8_to_256(width):
    q = torch.zeros(10, 2, width)
    with pytest.raises(ValueError, match=f"q: expected an even head width of 8 to 256, got {width}"):
        ops.window_attention(q, q, q, torch.tensor([0, 10]), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": torch.zeros(3, 4, 2, 8)}, r"k: expected shape \[2, n_z, 2, 8\], got \[3, 4, 2, 8\]"),
        ({"v": torch.zeros(2, 5, 2, 8)}, r"v: expected shape \[2, 4, 2, 8\], got \[2, 5, 2, 8\]"),
        ({"k": torch.zeros(2, 0, 2, 8)}, "k: expected at least 1 plan vector per trajectory, got 0"),
        ({"k": torch.zeros(2, 4, 2, 8, dtype=torch.bfloat16)}, "k: expected dtype float32, got bfloat16"),
        ({"cu_seqlens": torch.tensor([0, 10])}, r"k: expected shape \[1, n_z, 2, 8\], got \[2, 4, 2, 8\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_plan_attention_names_bad_arguments(arguments, message):
    plans = torch.zeros(2, 4, 2, 8)
    good = {**attention_arguments(), "k": plans, "v": plans}
    with pytest.raises(ValueError, match=message):
        ops.plan_attention(**{**good, **arguments})


def test_attention_ops_pass_on_every_argument():
    arguments = attention_arguments()
    positions = torch.arange(10)
    with ops.backend("reference"):
        actual = ops.window_attention(**arguments, window=3, positions=positions, rope_base=100.0)
    expected = reference.window_attention(**arguments, window=3, positions=positions, rope_base=100.0)
    assert torch.equal(actual, expected)
    assert ops.dispatch_counts() == {("window_attention", "reference"): 1}

    plans = torch.randn(2, 4, 2, 8)
    with ops.backend("reference"):
        actual = ops.plan_attention(arguments["q"], plans, plans.flip(1), arguments["cu_seqlens"])
    assert torch.equal(actual, reference.plan_attention(arguments["q"], plans, plans.flip(1), arguments["cu_seqlens"]))


def test_dispatch_is_traced_into_one_graph():
    arguments = attention_arguments()
    plans = torch.randn(2, 4, 2, 8)

    def attend(q: Tensor) -> Tensor:
        return ops.plan_attention(q, plans, plans, arguments["cu_seqlens"])

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments["q"]), attend(arguments["q"]))


def test_ops_do_not_import_the_compiler():
    """It costs seconds, and choosing a backend must stay traceable without it."""
    code = "import sys, gac_fast.ops; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
