"""The GPU pass and the table of resources: that the scripts work, on the CPU; nothing is claimed of a GPU here."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("resources")


# ---------------------------------------------------------------------------------------------------------------------
# Import diet: torch, triton, numpy and the standard library


BARE = """
import sys

class Bare:
    blocked = ("gymnasium", "gymnasium_robotics", "mujoco", "minari", "tyro", "h5py", "safetensors", "tqdm",
               "tensorboard", "matplotlib", "imageio", "imageio_ffmpeg", "hypothesis", "datasets")

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ImportError(name + " is not on this machine")

sys.meta_path.insert(0, Bare())
"""


def test_what_the_pass_needs_imports_on_a_bare_machine():
    """Run where everything else that gac_fast may import is not there."""
    names = ["ops", "model", "posterior", "train.update", "train.recorded", "kernels", "act"]
    wanted = [f"gac_fast.{name}" for name in names] + ["benchmarks.gpu", "benchmarks.resources"]
    code = (
        BARE
        + f"""
import importlib, pkgutil
for name in {wanted!r}:
    importlib.import_module(name)
kernels = sys.modules["gac_fast.kernels"]
for info in pkgutil.iter_modules(kernels.__path__):
    importlib.import_module("gac_fast.kernels." + info.name)
"""
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_tests_of_the_kernels_import_there_too(gpu, monkeypatch, tmp_path):
    installed = importlib.util.find_spec
    bare = ("torch", "triton", "numpy", "pytest", "pytest_benchmark")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: installed(name) if name in bare else None)
    files, left_out = gpu.test_files()
    assert {"tests/test_philox_normal.py", "tests/test_recorded.py", "tests/test_convergence.py"} <= set(files)
    # Whole runs, which save checkpoints, and environments: no test of a kernel is left out.
    assert left_out == {
        "test_gpu.py": "safetensors", "test_offline.py": "safetensors", "test_rollout.py": "gymnasium"
    }  # fmt: skip
    (tmp_path / "bare.py").write_text(BARE)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "bare", "-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-q",
         "--collect-only", "-m", "gpu", *files],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_philox_normal.py::test_gpu_equals_the_reference[1]" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The pass


def test_without_a_device_it_says_so_in_one_sentence(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out.startswith("benchmarks.gpu needs a CUDA device and found none")
    assert not (tmp_path / "out").exists()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_every_part_runs_dry_and_is_not_run_again(gpu, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--dry-run", "--no-compile"]) == 0
    text = capsys.readouterr().out
    assert "no time in this table says anything about a GPU" in text
    rows = read(out / "gpu.csv")
    assert tuple(rows[0]) == gpu.COLUMNS
    assert {row["gpu"] for row in rows} == {"none (dry run)"}
    assert {row["op"] for row in rows} >= {"tests", "sanitizer", "update", "decode_step", "plan_ascent", "block"}
    timed = [row for row in rows if row["p50_us"]]
    assert {row["op"] for row in timed} == {
        "update",
        "decode_step",
        "plan_ascent",
        "window_attention",
        "train",
        "runner",
    }
    for row in timed:
        assert float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert row["op"] in ("train", "runner") or float(row["copy_bytes_per_s"]) > 0
    assert not [row for row in rows if row["status"].startswith(("WRONG", "FAILED", "failed", "DIFFER"))]
    # Peers that did not run are there, with the reason.
    assert {row["status"] for row in rows if "compile" in row["provider"]} == {"left out: --no-compile"}
    assert all(json.loads((out / "parts" / f"{part.name}.json").read_text())["finished"] for part in gpu.PARTS)
    assert gpu.main(["--out", str(out), "--dry-run", "--only", "update"]) == 0
    assert "update: finished before, skipped" in capsys.readouterr().out
    assert read(out / "gpu.csv") == rows
    # Rows of several commits never stand in one table.
    monkeypatch.setattr(gpu, "commit", lambda: "another")
    assert gpu.main(["--out", str(out), "--dry-run", "--only", "sanitizer"]) == 0
    assert "sanitizer: was run on another commit" in capsys.readouterr().out
    assert {row["commit"] for row in read(out / "gpu.csv") if row["op"] == "sanitizer"} == {"another"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run is for machines without a GPU")
def test_every_peer_runs_dry(gpu, tmp_path):
    """Those that are compiled are traced, as one graph each."""
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--dry-run"]) == 0
    rows = read(out / "gpu.csv")
    for op, peers in {
        "window_attention": {"reference", "sdpa dense", "sdpa banded", "flex 128", "sdpa banded + max-autotune"},
        "update": {"reference", "reference + graph", "reference + compile", "reference + max-autotune + graph"},
        "plan_ascent": {"reference", "torch", "torch + compile", "torch + max-autotune + graph"},
        "decode_step": {"reference", "torch", "torch + compile", "torch + max-autotune + graph"},
    }.items():
        assert peers <= {row["provider"] for row in rows if row["op"] == op and row["p50_us"]}, op


def test_the_whole_stays_below_eight_minutes(gpu):
    assert sum(part.seconds for part in gpu.PARTS) <= 8 * 60
    for name in gpu.warm_names():
        op, which, *peer = name.split(":")
        assert op == "repeats" or int(which) < {"plan_ascent": 3, "window_attention": 1}.get(op, 4)
        assert set(peer) <= ({*gpu.cases_of(op, torch.device("cpu"), tiny=True)[0].providers} if peer else set())
    shapes = {(op, shape) for op, shape in gpu.BARS}
    planned = {
        "update": ("gym C=2 B=500 T=1000", "gym C=1 B=64 T=300"), "plan_ascent": ("gym E=1 P=64", "gym E=1 P=4096"),
        "decode_step": ("gym C=2 N=1024", "gym C=1 N=1"), "window_attention": ("B=500 T=2000 H=4 d=32 W=64",),
    }  # fmt: skip
    assert {(op, shape) for op, some in planned.items() for shape in some} <= shapes


@pytest.mark.parametrize(("window", "block"), [(4, 16), (17, 16), (33, 16), (64, 64), (70, 64)])
def test_flex_attention_sees_what_the_window_sees(gpu, window, block):
    """Its mask of blocks is written down, not found by trying all pairs."""
    from gpu_cases import flex_attend

    from gac_fast import reference

    b, t, heads, width = 3, 100, 2, 16
    torch.manual_seed(0)
    q, k, v = torch.randn(3, b * t, heads, width).unbind(0)
    positions, cu_seqlens = torch.arange(t).repeat(b), torch.arange(b + 1, dtype=torch.int32) * t
    table = reference._rotary_table(positions, width, 10000.0, torch.float32)
    found = flex_attend(torch.device("cpu"), b * t, t, window, block, table)(q, k, v)
    expected = reference.window_attention(q, k, v, cu_seqlens, window, positions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def make_row(provider: str, p50: object, **fields: Any) -> dict[str, Any]:
    return {
        "op": "plan_ascent", "mode": "100 steps", "shape": "gym E=1 P=64", "provider": provider, "p50_us": p50,
        "roof_share": 0.5, "status": "", "dtype": "bfloat16",
    } | fields  # fmt: skip


def test_verdicts_take_the_best_peer_and_every_bar(gpu):
    bar = gpu.Bar(3.0, most_us=1500.0, roof_share=0.4)
    rows = [make_row("triton", 1000.0), make_row("triton + graph", 900.0), make_row("torch + compile", 2800.0)]
    rows += [make_row("torch", 9000.0), make_row("flex 64", "", status="failed: no")]
    assert gpu.verdict(rows, bar) == ("900 us (triton + graph)", "2800 us (torch + compile)", "3.11x", "50%", "met")
    assert gpu.verdict([*rows, make_row("graph", 2000.0)], bar)[-1] == "NOT MET (3x)"
    assert gpu.verdict([make_row("triton", 2000.0, roof_share=0.1), make_row("torch", 9e3)], bar)[-1] == (
        "NOT MET (1500 us, 40% of the roof)"
    )
    assert gpu.verdict([make_row("torch", 9e3)], bar)[-1] == "no value"
    assert gpu.verdict(rows, None)[-1] == "-"
    # An option that no call takes is neither.
    option = make_row("triton option (a program for each plan)", 1.0)
    assert gpu.verdict([*rows, option], bar) == gpu.verdict(rows, bar)
    # Without any peer nothing is claimed.
    assert gpu.verdict([make_row("triton", 10.0)], bar)[-1] == "NOT MET (3x)"


def context(gpu: ModuleType, tmp_path: Path, dry: bool = True) -> Any:
    return gpu.Context(
        gpu.Record(tmp_path / "parts" / "x.json"), torch.device("cpu"), dry, False, True, 100, tmp_path,
        machine={"gpu": "test"},
    )  # fmt: skip


def planned(gpu: ModuleType, **providers: Any) -> Any:
    from gpu_cases import Planned

    return Planned("op", "fwd", "N=1", "float32", 1e6, 1e6, 1e-3, providers, lambda: [torch.ones(3)])


def test_wrong_results_and_failing_peers_are_rows_and_are_not_timed(gpu, tmp_path):
    from gpu_cases import Built

    def fail() -> Any:
        raise RuntimeError("does not\ncompile")

    timed = []
    ctx = context(gpu, tmp_path)
    makers = {
        "triton": lambda: Built(lambda: timed.append("triton"), [torch.ones(3)]),
        "wrong": lambda: Built(lambda: timed.append("wrong"), [torch.ones(3) * 1.1]),
        "nan": lambda: Built(lambda: timed.append("nan"), [torch.full((3,), torch.nan)]),
        "nothing": lambda: Built(lambda: timed.append("nothing"), []),
        "flex": fail,
    }
    clock = gpu.Clock(ctx.device, 0.01)
    floors = gpu.measure_floors(ctx.device, clock, True)
    for name, make in makers.items():
        gpu.measure(ctx, planned(gpu, **makers), name, make, clock, floors)
    status = {row["provider"]: row["status"] for row in gpu.Record.load(tmp_path, "x").rows}
    assert set(timed) == {"triton"}
    assert status["triton"] == ""
    assert status["wrong"].startswith("WRONG: relative error 1.0e-01, allowed 1e-03")
    assert status["nan"].startswith("WRONG")
    assert status["flex"] == "failed: RuntimeError: does not compile"
    assert status["nothing"].startswith("failed: ValueError")
    assert gpu.is_wrong({"provider": "wrong", "status": status["wrong"]})
    assert not gpu.is_wrong({"provider": "flex 64", "status": status["flex"]})
    assert gpu.is_wrong({"provider": "triton", "status": status["flex"]})


def test_processes_side_by_side_keep_their_order(gpu, tmp_path):
    commands = [[sys.executable, "-c", f"print({i}); raise SystemExit({i % 2})"] for i in range(5)]
    assert gpu.in_parallel(commands, tmp_path, "x") == [(i % 2, str(i)) for i in range(5)]


LOSES = """
import os
import pytest

lost = []

@pytest.mark.parametrize("i", range(6), ids="{{'n': {}}}".format)
def test_a(i):
    if lost or i == 2:
        lost.append(i)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert i != 5

def test_b():
    if os.environ.get("LOSE"):
        os.abort()

def test_c():
    pytest.skip("no")
"""


def test_tests_that_do_not_end_say_how_far_they_came(gpu, tmp_path):
    part = gpu.Part("tests", 0.05, lambda ctx: None)
    arguments = argparse.Namespace(out=tmp_path, dry_run=True, quick=False, no_compile=True)

    def status() -> str:
        (tmp_path / "parts" / "tests.json").unlink(missing_ok=True)
        gpu.run_isolated(part, arguments)
        return gpu.Record.load(tmp_path, "tests").rows[0]["status"]

    assert status().endswith("s of this part; by then none had ended")
    (tmp_path / "tests.0.log").write_text("a.py::test_a PASSED [ 3%]\na.py::test_b[x y] PASSED [ 5%]\na.py::test_c\n")
    said = status()
    assert said.startswith(gpu.OUT_OF_TIME)
    assert said.endswith("by then 2 passed")
    (tmp_path / "tests.1.log").write_text("a.py::test_d FAILED [ 3%]\n")
    assert status().startswith("FAILED: ran out of time")
    assert gpu.is_wrong({"op": "tests", "provider": "all", "mode": "", "status": status()})


def test_what_comes_after_a_lost_device_is_run_again_once(gpu, tmp_path, monkeypatch):
    (tmp_path / "test_x.py").write_text(LOSES)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "N_PROCESSES", 1)
    monkeypatch.setattr(gpu, "SHARDS_PER_PROCESS", 1)
    ids = [f"test_x.py::test_a[{{'n': {i}}}]" for i in range(6)] + ["test_x.py::test_b", "test_x.py::test_c"]
    ended, good = gpu.run_tests(ids, tmp_path)
    assert list(ended.values()) == ["passed", "passed", "failed", "passed", "passed", "failed", "passed", "skipped"]
    assert not good
    assert gpu.run_tests([ids[0], *ids[6:]], tmp_path)[1]
    # A process that is killed loses what it has not begun.
    monkeypatch.setenv("LOSE", "1")
    ended, good = gpu.run_tests([ids[0], *ids[6:]], tmp_path)
    assert list(ended.values()) == ["passed", "crashed", "skipped"]
    assert not good


def test_a_lost_device_is_known_by_what_torch_and_triton_say(gpu):
    ids = ["test_x.py::test_a[{'n': 1}]", "test_x.py::test_b"]
    # The log of a process that was killed ends in a name alone.
    killed = f"{ids[0]} PASSED [ 50%]\n{ids[1]}"
    assert gpu.outcomes(ids, killed) == {ids[0]: "passed", ids[1]: "crashed"}
    for said, again in (
        ("RuntimeError: Triton Error [CUDA]: misaligned address", ids[1:]),
        ("torch.AcceleratorError: CUDA error: unspecified launch failure", ids[1:]),
        ("RuntimeError: Triton Error [CUDA]: out of memory", []),
        ("AssertionError: x", []),
    ):
        text = f"{ids[0]} FAILED [ 50%]\n{ids[1]} FAILED [100%]\nFAILED {ids[0]} - {said}\nFAILED {ids[1]} - x"
        assert gpu.after_loss(ids, text) == again


def test_repeats_that_differ_are_found(gpu, tmp_path, monkeypatch):
    random = {"random": lambda: [torch.rand(3)], "same": lambda: [torch.ones(3)], "nan": lambda: [torch.ones(3) / 0]}
    monkeypatch.setattr(gpu, "repeat_cases", lambda device, dtype, size: random if dtype == "float32" else {})
    ctx = context(gpu, tmp_path)
    gpu.repeats(ctx)
    status = {row["op"]: row["status"] for row in ctx.record.rows}
    assert status == {"random": "DIFFER", "same": "bit-identical", "nan": "NOT FINITE"}


def test_an_op_without_its_kernel_is_no_success(gpu, tmp_path, monkeypatch):
    from gac_fast import ops

    ids = torch.arange(2)
    case = {"noise": lambda: [ops.philox_normal((1, 2), ids, 0, 4)]}
    monkeypatch.setattr(gpu, "repeat_cases", lambda device, dtype, size: case if dtype == "float32" else {})
    ctx = context(gpu, tmp_path, dry=False)
    ctx.quick = True
    with ops.backend("reference"):
        gpu.repeats(ctx)
    assert ctx.record.rows[0]["status"] == "no kernel: philox_normal on reference"


def test_a_part_that_hangs_is_ended_and_blamed(gpu, tmp_path):
    record = gpu.Record(tmp_path / "parts" / "slow.json")
    record.pending = {"op": "update", "provider": "reference + compile", "mode": "x", "shape": "y", "dtype": "z"}
    record.save()
    arguments = argparse.Namespace(out=tmp_path, dry_run=True, quick=False, no_compile=True)
    gpu.run_isolated(gpu.Part("slow", 0.05, lambda ctx: None), arguments)
    found = gpu.Record.load(tmp_path, "slow")
    assert not found.finished
    assert [(row["provider"], row["status"]) for row in found.rows] == [
        ("reference + compile", "ran out of time: not finished within the 0.05 s of this part")
    ]
    assert not gpu.is_wrong({**found.rows[0], "provider": "triton"})
    # Its row is there: the next call goes on with the others.
    assert gpu.Context(found, torch.device("cpu"), True, False, True, 1, tmp_path).has(**{
        name: found.rows[0][name] for name in ("op", "provider", "mode", "shape", "dtype")
    })  # fmt: skip


def test_what_ran_out_of_time_is_tried_again_after_the_others(gpu, tmp_path):
    key = {"op": "update", "mode": "x", "shape": "y", "dtype": "z"}
    record = gpu.Record(tmp_path / "parts" / "slow.json")
    late = {**dict.fromkeys(gpu.COLUMNS, ""), **key, "provider": "triton", "status": f"{gpu.OUT_OF_TIME}: it did"}
    record.rows = [late, {**late, "provider": "done", "status": ""}]
    record.save()
    order = []

    def run(ctx: Any) -> None:
        for provider in ("triton", "done", "next"):
            if not ctx.has(**key, provider=provider):
                order.append(provider)
                ctx.add(**key, provider=provider)

    arguments = argparse.Namespace(out=tmp_path, dry_run=True, quick=False, no_compile=True)
    gpu.run_part(gpu.Part("slow", 10, run), arguments)
    found = gpu.Record.load(tmp_path, "slow")
    assert order == ["next", "triton"]
    assert found.finished
    assert [row["provider"] for row in found.rows] == ["done", "next", "triton"]
    assert not any(row["status"] for row in found.rows)


@pytest.mark.parametrize("pure", [True, False])
def test_an_empty_recording_is_wrong(gpu, tmp_path, monkeypatch, pure):
    """Of calls that give the same every time, and of those that move a state."""
    import gpu_cases

    def make() -> Any:
        state = torch.ones(3)

        def run() -> torch.Tensor:
            if not pure:
                state.add_(1)
            return state.clone()

        return run

    def measured(record: Any) -> str:
        monkeypatch.setattr(gpu_cases, "recorded", record)
        ctx = context(gpu, tmp_path)
        builders = gpu_cases.variants(ctx.device, make, lambda mode: make(), "triton", pure=pure)
        clock = gpu.Clock(ctx.device, 0.01)
        case = planned(gpu, **builders)
        case.reference = lambda: [torch.ones(3) * (1 if pure else 2)]
        for name in ("triton + graph", "triton + compile + graph"):
            gpu.measure(ctx, case, name, builders[name], clock, gpu.Floors({"float32": 1.0}, 1.0))
        return " ".join(row["status"] for row in ctx.record.rows).strip()

    assert measured(gpu_cases.recorded) == ""
    said = measured(lambda run, device: (lambda: None, [torch.ones(3)]))
    assert said.count("WRONG: relative error of the replay") == 2


def test_speedups_are_filled_when_all_rows_are_there(gpu, tmp_path):
    rows = [make_row("triton", 5.0), make_row("reference", 20.0), make_row("flex", ""), make_row("x", 1.0, shape="z")]
    filled = gpu.with_speedup(rows)
    assert [row["speedup"] for row in filled] == [4.0, 1.0, "", ""]


def test_ops_without_a_kernel_by_design_are_not_blamed(gpu, tmp_path, monkeypatch):
    counts = {("norm_linear", "reference"): 3, ("pack_batch", "cpp"): 1, ("block", "triton"): 2}
    monkeypatch.setattr(gpu.ops, "dispatch_counts", lambda: counts)
    ctx = context(gpu, tmp_path, dry=False)
    assert gpu.engines(ctx) == ""
    counts["block", "reference"] = 1
    assert gpu.engines(ctx) == "no kernel: block on reference"


def test_the_benchmarks_are_a_module_without_being_installed():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--dry-run" in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The table of resources


def shipped_of_the_launch_tests() -> Any:
    from test_launch import launch

    def shipped(dim: int, dtype: torch.dtype, tokens_per_step: int) -> list[Any]:
        x = torch.empty(64 * dim, dtype=dtype, device="meta")
        return [launch(x, torch.empty_like(x), block=block) for block in (64, 128)]

    return shipped


def test_the_table_is_made_once_and_says_what_a_kernel_needs(resources, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    module = SimpleNamespace(shipped=shipped_of_the_launch_tests())
    monkeypatch.setattr(resources, "modules", lambda: {"scale": module})
    arguments = ["--out", str(tmp_path / "k.csv"), "--markdown", str(tmp_path / "k.md"), "--architectures", "90"]
    assert resources.main([*arguments, "--widths", "64", "--dtypes", "bfloat16"]) == 0
    rows = read(tmp_path / "k.csv")
    assert tuple(rows[0]) == resources.COLUMNS
    assert {row["constants"] for row in rows} == {"UPCAST=True no p_bias"}
    assert [(row["kernel"], row["option"]) for row in rows] == [
        ("scale_kernel", f"BLOCK={block} warps=4 stages=2") for block in (64, 128)
    ]
    assert all(int(row["registers"]) > 0 and row["stack"] == row["local"] == "0" for row in rows)
    assert {(row["dtype"], row["D"], row["architecture"]) for row in rows} == {("bfloat16", "64", "sm_90")}
    capsys.readouterr()
    monkeypatch.setattr(resources, "rows_of", lambda *_: pytest.fail("made again"))
    assert resources.main([*arguments, "--widths", "64", "--dtypes", "bfloat16"]) == 0
    assert read(tmp_path / "k.csv") == rows
    text = (tmp_path / "k.md").read_text()
    assert text.count("\n") == 4
    assert f"| {rows[0]['registers']} / 0 / 0 / {rows[0]['shared']} |" in text
    # Other sources: other rows.
    monkeypatch.setattr(resources, "fingerprint", lambda op: "changed")
    monkeypatch.setattr(resources, "rows_of", lambda *_: [])
    assert resources.main([*arguments, "--widths", "64", "--dtypes", "bfloat16"]) == 0
    assert read(tmp_path / "k.csv") == []


def test_spills_fail_in_bfloat16_and_are_listed_in_float32(resources):
    fits = {"stack": 0, "local": 0, "shared": 1000, "registers": 10}
    assert resources.problem(fits, 80) == ""
    assert resources.problem({**fits, "stack": 8}, 80) == "spills"
    assert resources.problem({**fits, "shared": 200 * 1024}, 80).startswith("does not fit")
    assert resources.problem({**fits, "shared": 200 * 1024}, 90) == ""
    assert resources.is_failure({"status": "spills", "dtype": "bfloat16"})
    assert not resources.is_failure({"status": "spills", "dtype": "float32"})
    assert resources.is_failure({"status": "failed: it", "dtype": "float32"})


def test_kernels_that_do_not_compile_are_rows(resources, monkeypatch):
    import kernel_fixtures

    module = SimpleNamespace(shipped=shipped_of_the_launch_tests())
    monkeypatch.setattr(resources, "modules", lambda: {"scale": module})

    def fail(*_: object) -> None:
        raise RuntimeError("PTX\nsays no")

    monkeypatch.setattr(kernel_fixtures, "resources", fail)
    rows = resources.rows_of(resources.Task("scale", "float32", 64, 90))
    assert [row["status"] for row in rows] == ["failed: RuntimeError: PTX says no"] * 2
    assert "failed: RuntimeError" in resources.markdown(rows)
