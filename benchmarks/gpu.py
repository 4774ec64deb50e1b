"""The GPU pass: tests on the device, repeats, sanitizer, then speed against the best of PyTorch; a table comes last.

    python -m benchmarks.gpu --out DIR            everything, below 8 minutes; the next call does only what is missing
                                                  (on another commit: everything)
    python -m benchmarks.gpu --out DIR --only decode_step
    python -m benchmarks.gpu --out DIR --dry-run  every part on the CPU and in toy sizes: shows that the script works

Needs torch, triton, numpy, pytest and pytest-benchmark beside an installed gac_fast; nothing is fetched. Exit status:
0, or 1 where a result is wrong, or 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_cases import FEWER_REPEATS, OPTION, Built, Planned, cases_of, one_pass, option_name, repeat_cases
from harness import ROOT, Floors, append_rows, commit, quantile

from gac_fast import ops
from gac_fast._version import __version__
from gac_fast.ops import _dispatch

COLUMNS = (
    "date", "commit", "op", "provider", "mode", "shape", "dtype", "rounds", "p20_us", "p50_us", "p80_us", "speedup",
    "flops", "bytes", "flop_per_s", "bytes_per_s", "matmul_flop_per_s", "copy_bytes_per_s", "roof_share", "peak_gib",
    "status", "gpu", "driver", "cuda", "python", "torch", "triton", "gac_fast",
)  # fmt: skip
"""Of the CSV, those of ``harness.COLUMNS`` where they mean the same. ``speedup`` is over the eager reference;
``roof_share`` the time of the binding roof (products or copy, as measured in the run) over this one; ``status`` empty
where it was measured, else why not, or what was found."""

N_REPEATS = 1000
OUT_OF_TIME = "ran out of time"
FLUSH_BYTES = 256 * 2**20
N_PROCESSES = max(1, min(14, len(os.sched_getaffinity(0)) - 2))
SHARDS_PER_PROCESS = 1
"""Of the tests: more even out what some take longer, and each costs seconds to start Python and the device."""


class Part(NamedTuple):
    """One of the pass, which runs in a process of its own and ends with it."""

    name: str
    seconds: int
    run: Callable[[Context], None]


class Bar(NamedTuple):
    """What a case is to reach.

    Attributes:
        over_peers: least time of the fastest peer over that of the engine.
        most_us: longest time.
        roof_share: least share of the binding roof.
    """

    over_peers: float
    most_us: float | None = None
    roof_share: float | None = None


BARS: Mapping[tuple[str, str], Bar] = {
    ("update", "gym C=2 B=500 T=1000"): Bar(2.0, most_us=50_000),
    ("update", "gym C=1 B=500 T=1000"): Bar(2.0, most_us=25_000),
    ("update", "gym C=2 B=64 T=300"): Bar(2.0),
    ("update", "gym C=1 B=64 T=300"): Bar(2.0),
    ("plan_ascent", "gym E=1 P=64"): Bar(3.0, most_us=1_500),
    ("plan_ascent", "gym E=1 P=4096"): Bar(4.0, most_us=2_500),
    ("decode_step", "gym C=2 N=1024"): Bar(3.0, most_us=75),
    ("decode_step", "gym C=1 N=1024"): Bar(3.0, most_us=60),
    ("decode_step", "gym C=2 N=1"): Bar(2.0),
    ("decode_step", "gym C=1 N=1"): Bar(2.0),
    ("window_attention", "B=500 T=2000 H=4 d=32 W=64"): Bar(1.5, roof_share=0.6),
    # Beside the simulator alone: the share of its speed that a policy on the device leaves.
    ("runner", "gym C=2 Hopper-v5 N=64 T=150"): Bar(0.9),
}


# ---------------------------------------------------------------------------------------------------------------------
# Records: one file per part, written after every row


@dataclass
class Record:
    """What a part has found so far."""

    path: Path
    finished: bool = False
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    pending: dict[str, Any] | None = None
    """The row that is being made: what to blame where the process is killed."""

    @classmethod
    def load(cls, out: Path, name: str) -> Record:
        path = out / "parts" / f"{name}.json"
        if not path.exists():
            return cls(path)
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, found["finished"], found["seconds"], found["rows"], found["pending"])

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        content = {name: getattr(self, name) for name in ("finished", "seconds", "rows", "pending")}
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")
        new.replace(self.path)


@dataclass
class Context:
    """What a part works with."""

    record: Record
    device: torch.device
    dry: bool
    quick: bool
    may_compile: bool
    seconds: float
    out: Path
    started: float = field(default_factory=time.monotonic)
    skipped: bool = False
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def has(self, **key: Any) -> bool:
        return any(all(row[name] == value for name, value in key.items()) for row in self.record.rows)

    def begin(self, **fields: Any) -> None:
        self.record.pending = dict(fields)
        self.record.save()

    def add(self, **fields: Any) -> None:
        self.record.pending = None
        self.record.rows.append({name: {**self.machine, **fields}.get(name, "") for name in COLUMNS})
        self.record.save()


def machine(device: torch.device) -> dict[str, Any]:
    """The columns that are the same in all rows of a run."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none (dry run)", "driver": driver(),
        "cuda": torch.version.cuda or "none", "python": platform.python_version(), "torch": torch.__version__,
        "triton": version_of("triton"), "gac_fast": __version__,
    }  # fmt: skip


def version_of(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return "none"


def driver() -> str:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else "none"


# ---------------------------------------------------------------------------------------------------------------------
# Right first


def kernel_tests(ctx: Context) -> None:
    """Tests marked ``gpu`` of all files that import here."""
    if ctx.has(op="tests", provider="pytest", mode="gpu"):
        return
    files, left_out = test_files()
    if ctx.dry:
        files = files[:2]
    ctx.record.rows.clear()
    for name, missing in left_out.items():
        ctx.add(op="tests", provider=name, mode="left out", status=f"needs {missing}, which is not installed")
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    found = subprocess.run([*pytest, "--collect-only", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    if found.returncode != 0 or not ids or ctx.dry:
        last = (found.stdout.strip().splitlines() or ["no output"])[-1]
        failed = "" if found.returncode == 0 and ids else "FAILED to collect: "
        ctx.add(op="tests", provider="pytest", mode="gpu", status=f"{failed}{last}")
        return
    ctx.begin(op="tests", provider="pytest", mode="gpu")
    for log in ctx.out.glob("tests*.log"):
        if log.name != "tests.log":
            log.unlink()
    ended, good = run_tests(ids, ctx.out)
    counts = Counter(ended.values())
    said = ", ".join(f"{number} {word}" for word, number in counts.items())
    ctx.add(
        op="tests", provider="pytest", mode="gpu", status=said if good else f"FAILED ({ctx.out}/tests*.log): {said}"
    )


def run_tests(ids: Sequence[str], out: Path) -> tuple[dict[str, str], bool]:
    """How each ended, and whether all is well; those that came after a lost device are run again, once."""
    pytest = [sys.executable, "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider"]
    # Most of their time goes into compiling kernels, one core each.
    n = min(SHARDS_PER_PROCESS * N_PROCESSES, len(ids))
    ended = dict.fromkeys(ids, "not run")
    good, shards = True, [ids[i::n] for i in range(n)]
    for name in ("tests", "tests-again"):
        results = in_parallel([[*pytest, *shard] for shard in shards], out, name)
        for shard, (_, text) in zip(shards, results, strict=True):
            ended.update(outcomes(shard, text))
        # What loses the device fails, in the first round too.
        good = good and all(code == 0 for code, _ in results)
        shards = [rest for shard, (_, text) in zip(shards, results, strict=True) if (rest := after_loss(shard, text))]
    return ended, good


def outcomes(ids: Sequence[str], text: str) -> dict[str, str]:
    """How those that were begun ended, in the order of running, by the lines of ``pytest -v``."""
    ended: dict[str, str] = {}
    for line in text.splitlines():
        for name in ids:
            # Without a blank: the last line of a process that was killed.
            if line == name or line.startswith(f"{name} "):
                word = re.match("[A-Z]+", line[len(name) + 1 :].lstrip())
                ended[name] = word[0].lower() if word and word[0].lower() in ENDS else "crashed"
    return ended


# As torch says it, and as Triton does; running out of memory loses nothing.
LOST = r"CUDA error|illegal memory access|Triton Error \[CUDA\](?!.*out of memory)"
ENDS = ("passed", "failed", "skipped", "error", "xfail", "xpass")


def after_loss(ids: Sequence[str], text: str) -> list[str]:
    """What came after the first test that lost the device, as an error leaves no call of CUDA in its process."""
    ended = outcomes(ids, text)
    said = [line for line in text.splitlines() if re.search(LOST, line)]
    order = list(ended)
    for i, name in enumerate(order):
        if ended[name] == "crashed" or any(line.startswith((f"FAILED {name} ", f"ERROR {name} ")) for line in said):
            return [*order[i + 1 :], *(other for other in ids if other not in ended)]
    return []


def in_parallel(commands: Sequence[Sequence[str]], out: Path, name: str) -> list[tuple[int, str]]:
    """Exit status and output of each, a few at a time."""

    def one(number: int) -> tuple[int, str]:
        log = out / f"{name}.{number}.log"
        with log.open("w", encoding="utf-8") as file:
            # Columns: pytest cuts its summary to them.
            done = subprocess.run(
                commands[number], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False,
                env={**os.environ, "COLUMNS": "1000"},
            )  # fmt: skip
        return done.returncode, log.read_text(encoding="utf-8", errors="replace").strip()

    with ThreadPoolExecutor(N_PROCESSES) as pool:
        return list(pool.map(one, range(len(commands))))


def compile_kernels(ctx: Context) -> None:
    """What the parts that follow start, started once by several processes: their time is then not the compiler's."""
    if ctx.has(op="compile", provider="warm-up", mode=""):
        return
    if ctx.dry:
        warm("plan_ascent:0", ctx.device, dry=True)
        ctx.add(op="compile", provider="warm-up", mode="", status="dry run")
        return
    names = [name for name in warm_names() if ctx.may_compile or name.count(":") < 2]
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(ctx.out), "--warm"]
    ctx.begin(op="compile", provider="warm-up", mode="")
    results = in_parallel([[*command, name] for name in names], ctx.out, "compile")
    bad = [name for name, (code, _) in zip(names, results, strict=True) if code != 0]
    ctx.add(
        op="compile", provider="warm-up", mode="",
        status=f"{len(names) - len(bad)} of {len(names)} started" + (f", not {', '.join(bad)}" if bad else ""),
    )  # fmt: skip


def warm_names() -> list[str]:
    """Of the engine's kernels; then of peers that compile, whose code Inductor keeps, all but those that autotune:
    on a device that others use they would choose by chance."""
    cases = {"decode_step": 4, "update": 4, "plan_ascent": 3, "window_attention": 1}
    # One plan has no peer that compiles.
    with_peers = {**cases, "plan_ascent": 2}
    peers = {
        "decode_step": ["torch + compile"], "plan_ascent": ["torch + compile"],
        "update": ["triton + compile"],
        "window_attention": ["flex 128", "flex 64", "sdpa banded + compile"],
    }  # fmt: skip
    names = ["repeats:bfloat16", "repeats:float32", *(f"{op}:{i}" for op, n in cases.items() for i in range(n))]
    names.append(f"plan_ascent:0:{option_name(1)}")
    return names + [f"{op}:{i}:{peer}" for op, n in with_peers.items() for i in range(n) for peer in peers[op]]


def warm(name: str, device: torch.device, dry: bool) -> None:
    """One provider of a case, or every op of the repeats, once."""
    op, which, *provider = name.split(":")
    if op != "repeats":
        cases_of(op, device, tiny=dry)[int(which)].providers["".join(provider) or "triton"]()
        return
    errors = []
    for run in repeat_cases(device, which, "tiny" if dry else "full").values():
        try:
            run()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def test_files() -> tuple[list[str], dict[str, str]]:
    """Files of tests that are marked ``gpu``, and those left out with the module that is missing."""
    files, left_out = [], {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if "mark.gpu" not in path.read_text(encoding="utf-8"):
            continue
        missing = missing_import(path, set())
        if missing is None:
            files.append(str(path.relative_to(ROOT)))
        else:
            left_out[path.name] = missing
    return files, left_out


def missing_import(path: Path, seen: set[Path]) -> str | None:
    """A module that a file of the project imports on loading, itself or by another one, and that is not installed."""
    seen.add(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            homes = [ROOT / "tests", ROOT] if parts[0] != "gac_fast" else [ROOT]
            own = [home.joinpath(*parts).with_suffix(".py") for home in homes]
            own += [home.joinpath(*parts) / "__init__.py" for home in homes]
            for file in own:
                if file.exists() and file not in seen and (missing := missing_import(file, seen)) is not None:
                    return missing
            here = any((home / parts[0]).exists() or (home / f"{parts[0]}.py").exists() for home in homes)
            if parts[0] not in sys.stdlib_module_names and not here and importlib.util.find_spec(parts[0]) is None:
                return parts[0]
    return None


def repeats(ctx: Context) -> None:
    """The same bits from every one of many runs."""
    most = 3 if ctx.dry else N_REPEATS // 10 if ctx.quick else N_REPEATS
    for dtype in ("float32", "bfloat16"):
        for name, run in repeat_cases(ctx.device, dtype, "tiny" if ctx.dry else "full").items():
            n = max(3, most // 10) if name in FEWER_REPEATS else most
            key = {"op": name, "provider": "triton", "mode": f"{n} repeats", "dtype": dtype}
            if ctx.has(**key):
                continue
            ctx.begin(**key)
            with reported(ctx, key):
                ops.reset_dispatch_counts()
                first = [x.clone() for x in run()]
                differ = torch.zeros((), dtype=torch.bool, device=ctx.device)
                for _ in range(n - 1):
                    for x, y in zip(run(), first, strict=True):
                        differ |= (bits(x) != bits(y)).any()
                problem = "DIFFER" if bool(differ) else "NOT FINITE" if not finite(first) else engines(ctx)
                ctx.add(**key, status=problem or "bit-identical")


def bits(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def finite(tensors: Sequence[torch.Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


def engines(ctx: Context) -> str:
    """Which ops did not run on the kernels that they have here; nothing in a dry run, which has none."""
    counted = [(op, name) for op, name in ops.dispatch_counts() if "triton" in _dispatch._engines[op]]
    other = sorted({f"{op} on {name}" for op, name in counted if name != "triton"})
    return f"no kernel: {', '.join(other)}" if other and not ctx.dry else ""


def sanitizer(ctx: Context) -> None:
    """Small shapes once under compute-sanitizer: accesses out of bounds, races in shared memory."""
    if ctx.dry:
        one_pass(ctx.device, "tiny")
    tool = find_sanitizer()
    for check in ("memcheck", "racecheck"):
        key = {"op": "sanitizer", "provider": "compute-sanitizer", "mode": check}
        if ctx.has(**key):
            continue
        if tool is None or ctx.dry:
            ctx.add(**key, status="not run: dry run" if ctx.dry else "not installed")
            continue
        ctx.begin(**key)
        log = ctx.out / f"{check}.log"
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu"]
        with log.open("w", encoding="utf-8") as file:
            # Of all kernels, those of torch too, but in the work space of a caching allocator nothing is out of bounds.
            done = subprocess.run(
                [*command, "--out", str(ctx.out), "--one-pass"], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False,
            )  # fmt: skip
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log.read_text(encoding="utf-8", errors="replace"))
        text = summary[-1] if summary else f"no summary, exit status {done.returncode}"
        ctx.add(**key, status=text if done.returncode == 0 else f"FAILED ({log}): {text}")


def find_sanitizer() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


@contextlib.contextmanager
def reported(ctx: Context, key: Mapping[str, Any]) -> Iterator[None]:
    """What fails inside becomes a row: nothing is dropped silently."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        ctx.add(**key, status="failed: out of memory")
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        ctx.add(**key, status=f"failed: {type(error).__name__}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# Then fast


class Clock:
    """Times calls on the device by its own events, the L2 cache overwritten before each."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 8, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> list[float]:
        """Seconds of each of at least 5 and at most 200 calls, after 3 that are not counted; of 2 in a dry run."""
        if self.device.type != "cuda":
            return self._some(run, 2)
        estimate = min(self._some(run, 3))
        return self._some(run, int(min(200, max(5, self.seconds / max(estimate, 1e-6)))))

    def _some(self, run: Callable[[], object], n: int) -> list[float]:
        if self.device.type != "cuda":
            times = []
            for _ in range(n):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            return times
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e-3 for start, end in events]


def measure_floors(device: torch.device, clock: Clock, tiny: bool) -> Floors:
    """What the device does at best: large products in both dtypes and a large copy."""
    n = 64 if tiny else 8192
    matmul = {}
    for name, size in (("bfloat16", n), ("float32", n if tiny else n // 2)):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(a)
        matmul[name] = 2 * size**3 / quantile(clock(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)), 0.5)
    source = torch.randn(2**14 if tiny else 2**28, device=device)
    target = torch.empty_like(source)
    copy = 2 * 4 * source.numel() / quantile(clock(lambda: target.copy_(source)), 0.5)
    return Floors(matmul, copy)


def timed(op: str) -> Callable[[Context], None]:
    """The part that measures the cases of an op."""

    def run(ctx: Context) -> None:
        clock = Clock(ctx.device, 0.15 if ctx.quick else 0.4)
        floors = measure_floors(ctx.device, clock, ctx.dry)
        planned = cases_of(op, ctx.device, tiny=ctx.dry)
        # Where the time runs out, no case is without its engine, then none without its plain peers.
        for turn in range(4):
            for case in planned:
                for provider, make in case.providers.items():
                    if turn_of(provider) == turn:
                        measure(ctx, case, provider, make, clock, floors)

    return run


def turn_of(provider: str) -> int:
    """The engine first, what compiles for long last."""
    if "autotune" in provider:
        return 3
    return 2 if "compile" in provider or "flex" in provider else 0 if is_engine(provider) else 1


def is_engine(provider: str) -> bool:
    """What a call takes by itself."""
    return provider.startswith("triton") and not provider.startswith(OPTION)


def measure(
    ctx: Context, case: Planned, provider: str, make: Callable[[], Built], clock: Clock, floors: Floors
) -> None:
    """One row: built, compared with the reference, then timed."""
    key = {"op": case.op, "provider": provider, "mode": case.mode, "shape": case.shape, "dtype": case.dtype}
    if ctx.has(**key):
        return
    if not ctx.may_compile and turn_of(provider) >= 2:
        ctx.add(**key, status="left out: --no-compile")
        return
    if ctx.left < 2 and not ctx.dry:
        ctx.skipped = True
        return
    ctx.begin(**key)
    on_gpu = ctx.device.type == "cuda"
    with reported(ctx, key):
        # Before the row's own memory is counted, and its ops.
        expected = case.expected()
        ops.reset_dispatch_counts()
        if on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(ctx.device)
        built = make()
        # What is compared with lies there all the time; the comparison itself needs more.
        peak = torch.cuda.max_memory_allocated(ctx.device) - sum(x.nbytes for x in expected) if on_gpu else 0
        # Each of a replay and its like may be off by the bound.
        checks = [("relative error", built.results, expected, case.bound)]
        if built.replayed is not None:
            checks.append(("relative error of the replay", *built.replayed, 2 * case.bound))
        for what, found, wanted, bound in checks:
            errors = [relative_error(x, y) for x, y in zip(found, wanted, strict=True)]
            wrong = [error for error in errors if not error <= bound]
            if wrong or not errors:
                error = wrong[0] if wrong else float("inf")
                ctx.add(**key, status=f"WRONG: {what} {error:.1e}, allowed {bound:.0e}; not timed")
                return
        other = engines(ctx) if provider.startswith("triton") else ""
        times = clock(built.run)
        p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
        roof = max(case.flops / floors.matmul[case.dtype], case.bytes / floors.copy)
        ctx.add(
            **key, rounds=len(times), p20_us=short(p20 * 1e6), p50_us=short(p50 * 1e6), p80_us=short(p80 * 1e6),
            flops=short(case.flops), bytes=short(case.bytes), flop_per_s=short(case.flops / p50),
            bytes_per_s=short(case.bytes / p50),
            matmul_flop_per_s=short(floors.matmul[case.dtype]), copy_bytes_per_s=short(floors.copy),
            roof_share=short(roof / p50),
            peak_gib=short(peak / 2**30) if on_gpu else "", status=other,
        )  # fmt: skip
    built = None
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


TRAINED = {False: (256, 300, 100), True: (4, 20, 2)}
"""Episodes, their steps, and updates that are timed; of a dry run too."""


def training(ctx: Context) -> None:
    """A training of the gym size with its batches, gone on with from a checkpoint: milliseconds per update."""
    for provider in ("triton", "reference"):
        key = {"op": "train", "provider": provider, "mode": "after a resumption", "dtype": "bfloat16"}
        episodes, steps, n = TRAINED[ctx.dry]
        key["shape"] = f"{'tiny' if ctx.dry else 'gym'} C=2 B={2 if ctx.dry else 64} T={steps}"
        if ctx.has(**key):
            continue
        missing = [name for name in ("safetensors", "tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
        if missing:
            ctx.add(**key, status=f"not run: needs {', '.join(missing)}")
            continue
        if ctx.left < 5 and not ctx.dry:
            ctx.skipped = True
            return
        ctx.begin(**key)
        with reported(ctx, key), tempfile.TemporaryDirectory() as folder:
            on_reference = ops.backend("reference") if provider == "reference" else contextlib.nullcontext()
            ops.reset_dispatch_counts()
            with on_reference:
                times, losses = trained(ctx, Path(folder) / "run", episodes, steps, n)
            p20, p50, p80 = (quantile(times, q) for q in (0.2, 0.5, 0.8))
            found = engines(ctx) if provider == "triton" else ""
            ctx.add(
                **key, rounds=n, p20_us=short(p20 * 1e6), p50_us=short(p50 * 1e6), p80_us=short(p80 * 1e6),
                status=found if all(map(math.isfinite, losses)) else f"FAILED: the last losses are {losses[-3:]}",
            )  # fmt: skip


def trained(ctx: Context, folder: Path, episodes: int, steps: int, n: int) -> tuple[list[float], list[float]]:
    """Seconds of each of n updates in a row, a few before them not counted, after n updates and a checkpoint of
    another training; the losses of all that it made."""
    import numpy as np

    from gac_fast import checkpoint
    from gac_fast.config import preset
    from gac_fast.data import from_episodes
    from gac_fast.train.offline import OfflineTrainer, train

    rng = np.random.default_rng(0)
    data = from_episodes(
        [
            {
                "observations": rng.normal(size=(steps, 17)), "actions": rng.uniform(-1, 1, size=(steps, 6)),
                "rewards": rng.normal(size=steps),
            }
            for _ in range(episodes)
        ],
        action_bounds=(-np.ones(6), np.ones(6)),
    )  # fmt: skip
    config = preset("tiny" if ctx.dry else "gym").replace(
        model={"context": "states_actions"},
        train={
            "batch_size": 2 if ctx.dry else 64, "log_every": 1, "eval_every": 0, "held_out": 0.0,
            "device": ctx.device.type, "n_updates": n,
        },
    )  # fmt: skip
    train(data, config, folder, progress=False, tensorboard=False)
    trainer = OfflineTrainer(data, config.replace(train={"n_updates": 3 * n}))
    seconds, losses = [], []
    with contextlib.closing(trainer.batches):
        trainer.restore(checkpoint.latest(folder))
        for _ in range(2 * n):
            start = time.perf_counter()
            values, _ = trainer.run_update()
            # Read, as a log does: the update is over.
            losses.append(float(values["loss"]))
            seconds.append(time.perf_counter() - start)
    return seconds[n:], losses


LOOP = {False: (64, 150, 7), True: (4, 3, 1)}
"""Environments, their steps, and rounds; of a dry run too."""


def runner(ctx: Context) -> None:
    """Whole episodes of Hopper by a policy on the device, beside the simulator alone: seconds of a round."""
    n, n_steps, rounds = LOOP[ctx.dry]
    shape = f"{'tiny' if ctx.dry else 'gym'} C=2 Hopper-v5 N={n} T={n_steps}"
    keys = [
        {"op": "runner", "provider": provider, "mode": "loop", "shape": shape, "dtype": "bfloat16"}
        for provider in ("triton", "mujoco.batch")
    ]
    if all(ctx.has(**key) for key in keys):
        return
    missing = [name for name in ("gymnasium", "mujoco") if importlib.util.find_spec(name) is None]
    if missing:
        ctx.add(**keys[0], status=f"not run: needs {', '.join(missing)}")
        return
    ctx.begin(**keys[0])
    with reported(ctx, keys[0]):
        ops.reset_dispatch_counts()
        times = looped(ctx, n, n_steps, rounds)
        found = engines(ctx)
        for key, name in zip(keys, ("halves", "bare"), strict=True):
            p20, p50, p80 = (quantile(times[name], q) for q in (0.2, 0.5, 0.8))
            ctx.add(
                **key, rounds=rounds, p20_us=short(p20 * 1e6), p50_us=short(p50 * 1e6), p80_us=short(p80 * 1e6),
                status=found if name == "halves" else "",
            )  # fmt: skip


def looped(ctx: Context, n: int, n_steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of rounds in turns: two halves with the policy, and the simulator alone with the same states and
    controls."""
    import numpy as np
    from bench_runner import ACT_DIM, ENV, OBS_DIM, BareStepper, units

    from gac_fast.act import Actor
    from gac_fast.config import preset
    from gac_fast.envs import close_vector, make_halves, make_vector
    from gac_fast.model import GAC
    from gac_fast.rollout import rollout

    config = preset("tiny" if ctx.dry else "gym").replace(model={"context": "states_actions"})
    torch.manual_seed(0)
    model = GAC(config.model, OBS_DIM, ACT_DIM).to(ctx.device)
    z0 = torch.randn(n, config.model.n_z, config.model.dim, device=ctx.device)
    actor = Actor(model, units(torch.float32).to(ctx.device), z0, bf16=not ctx.dry)

    def make_actor(obs: np.ndarray, first: int) -> Actor:
        actor.reset()
        return actor

    n_threads = len(os.sched_getaffinity(0))
    # Of equal length, so that all rows count to the end.
    arguments = {"terminate_when_unhealthy": False, "max_episode_steps": n_steps}
    states: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        whole = make_vector(ENV, n, n_threads=n_threads, **arguments)
        stack.callback(close_vector, whole)
        halves = make_halves(ENV, n, n_threads=max(1, n_threads // 2), **arguments)
        for half in halves:
            stack.callback(close_vector, half)
        seen = rollout(
            whole, make_actor, n, seed=0, keep=n, on_step=lambda done, steps: states.append(whole._batch.state.copy())
        )
        actions = np.stack([np.stack([episode[t] for episode in seen.actions]) for t in range(n_steps)])
        bare = BareStepper(n, n_threads, states, actions)

        def step_all() -> None:
            for _ in range(n_steps):
                bare()

        calls: dict[str, Callable[[], object]] = {
            "halves": lambda: rollout(halves, make_actor, n, seed=0), "bare": step_all,
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(1 + rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if i:
                    times[name].append(time.perf_counter() - start)
    return times


def same_case(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(row[name] == key[name] for name in ("op", "mode", "shape", "dtype"))


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of the whole tensor."""
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp_min(1e-12))


def short(value: float) -> float:
    return float(f"{value:.5g}")


PARTS = (
    Part("tests", 95, kernel_tests),
    Part("compile", 55, compile_kernels),
    Part("repeats", 30, repeats),
    Part("decode_step", 50, timed("decode_step")),
    Part("plan_ascent", 50, timed("plan_ascent")),
    Part("window_attention", 50, timed("window_attention")),
    Part("update", 75, timed("update")),
    Part("train", 25, training),
    Part("runner", 20, runner),
    Part("sanitizer", 30, sanitizer),
)
"""In the order of running. Their seconds bound the whole pass."""


# ---------------------------------------------------------------------------------------------------------------------
# The pass


def run_part(part: Part, arguments: argparse.Namespace) -> None:
    """In this process."""
    record = Record.load(arguments.out, part.name)
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    # A float32 row is float32 throughout, for peers as for the engine.
    torch.backends.cuda.matmul.allow_tf32 = False
    ctx = Context(
        record, device, arguments.dry_run, arguments.quick, not arguments.no_compile, part.seconds, arguments.out,
        machine=machine(device),
    )  # fmt: skip
    try:
        with ops.backend("reference") if ctx.dry else contextlib.nullcontext():
            part.run(ctx)
            # What ended an earlier call comes after what that call did not reach.
            if any(ran_out(row) for row in record.rows):
                record.rows[:] = [row for row in record.rows if not ran_out(row)]
                part.run(ctx)
        record.finished = not ctx.skipped
    finally:
        record.seconds += time.monotonic() - ctx.started
        record.save()


def run_isolated(part: Part, arguments: argparse.Namespace) -> None:
    """In a process of its own, which ends with its time: a compiler that hangs takes nothing with it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(arguments.out), "--part", part.name]
    command += [
        f"--{name}" for name in ("dry-run", "quick", "no-compile") if getattr(arguments, name.replace("-", "_"))
    ]
    caches = {
        name: os.environ.get(name, str(arguments.out.resolve() / "cache" / folder))
        for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton"))
    }
    log = arguments.out / f"{part.name}.log"
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **caches}, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(part.seconds)
            reason = "" if code == 0 else f"FAILED: ended with exit status {code}, see {log}"
        except subprocess.TimeoutExpired:
            reason = f"{OUT_OF_TIME}: not finished within the {part.seconds} s of this part"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if reason:
        if part.name == "tests":
            reason = with_outcomes(reason, arguments.out)
        record = Record.load(arguments.out, part.name)
        blamed = record.pending or {"op": part.name, "provider": "all", "mode": ""}
        known = record.rows[-1] if record.rows else dict(machine(torch.device("cpu")), gpu="unknown")
        same = {name: known[name] for name in machine_columns()}
        record.rows.append({name: {**same, **blamed, "status": reason}.get(name, "") for name in COLUMNS})
        record.pending = None
        record.save()


def with_outcomes(reason: str, out: Path) -> str:
    """What is known of tests that did not end; those that failed are no matter of time."""
    ended: dict[str, str] = {}
    # Those that ran again come last.
    for log in sorted(out.glob("tests*.log"), key=lambda log: log.name.startswith("tests-again")):
        lines = re.findall(
            r"^(\S*::.*) (PASSED|FAILED|ERROR)\b", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
        ended.update((name.rstrip(), word.lower()) for name, word in lines)
    found = Counter(ended.values())
    said = f"{reason}; by then {', '.join(f'{n} {word}' for word, n in sorted(found.items())) or 'none had ended'}"
    return said if set(found) <= {"passed"} else f"FAILED: {said}"


def ran_out(row: Mapping[str, Any]) -> bool:
    """Not all is known of it: the next call tries again."""
    return OUT_OF_TIME in str(row["status"])


def machine_columns() -> tuple[str, ...]:
    return ("date", "commit", "gpu", "driver", "cuda", "python", "torch", "triton", "gac_fast")


def write_csv(out: Path, records: Sequence[Record]) -> Path:
    """All rows of all parts that are of this commit, in one file that is written anew."""
    path, new = out / "gpu.csv", out / "gpu.csv.new"
    new.unlink(missing_ok=True)
    here = commit()
    append_rows(new, with_speedup([row for record in records for row in record.rows if row["commit"] == here]), COLUMNS)
    return new.replace(path)


def with_speedup(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Filled once all are there, as the reference of a case is not measured first."""
    filled = []
    for row in rows:
        base = [x["p50_us"] for x in rows if x["provider"] == "reference" and x["p50_us"] != "" and same_case(x, row)]
        timed = base and row["p50_us"] != ""
        filled.append({**row, "speedup": short(float(base[0]) / float(row["p50_us"])) if timed else ""})
    return filled


def verdict(rows: Sequence[Mapping[str, Any]], bar: Bar | None) -> tuple[str, ...]:
    """Cells of one case: engine, fastest peer, their ratio, share of the roof, whether the bar is met."""

    def fastest(of_engine: bool) -> Mapping[str, Any] | None:
        timed = [
            row for row in rows
            if row["p50_us"] != "" and is_engine(row["provider"]) == of_engine
            and not row["provider"].startswith(OPTION)
        ]  # fmt: skip
        return min(timed, key=lambda row: float(row["p50_us"]), default=None)

    def cell(row: Mapping[str, Any] | None) -> str:
        return f"{float(row['p50_us']):.5g} us ({row['provider']})" if row else "-"

    mine, peer = fastest(True), fastest(False)
    ratio = float(peer["p50_us"]) / float(mine["p50_us"]) if mine and peer else None
    said = "-"
    if bar is not None and mine is None:
        said = "no value"
    elif bar is not None and mine is not None:
        short_of = []
        if ratio is None or ratio < bar.over_peers:
            short_of.append(f"{bar.over_peers:g}x")
        if bar.most_us is not None and float(mine["p50_us"]) > bar.most_us:
            short_of.append(f"{bar.most_us:g} us")
        if bar.roof_share is not None and float(mine["roof_share"]) < bar.roof_share:
            short_of.append(f"{bar.roof_share:.0%} of the roof")
        said = f"NOT MET ({', '.join(short_of)})" if short_of else "met"
    share = f"{float(mine['roof_share']):.0%}" if mine and mine["roof_share"] != "" else "-"
    return cell(mine), cell(peer), f"{ratio:.2f}x" if ratio else "-", share, said


def table(records: Sequence[Record], dry: bool) -> str:
    """What was found, short."""
    rows = [row for record in records for row in record.rows]
    lines = []
    cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["shape"]:
            cases.setdefault((row["op"], row["mode"], row["shape"]), []).append(row)
    cells = [("case", "engine", "fastest of PyTorch", "ratio", "of the roof", "bar")] if cases else []
    for (op, mode, shape), found in cases.items():
        cells.append((f"{op}, {mode}, {shape}", *verdict(found, None if dry else BARS.get((op, shape)))))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) if cells else 0)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for row in rows:
        if row["status"] and not quiet(row):
            what = " ".join(str(row[name]) for name in ("op", "provider", "mode", "shape", "dtype") if row[name])
            lines.append(f"{what}: {row['status']}")
    n = sum(row["status"].startswith("bit-identical") for row in rows)
    of = sum("repeats" in row["mode"] for row in rows)
    if of:
        lines.append(f"bit-identical repeats: {n} of {of} ops and dtypes")
    return "\n".join(lines)


def quiet(row: Mapping[str, Any]) -> bool:
    return row["status"] == "bit-identical" or row["mode"] == "left out" or row["op"] == "compile"


def is_wrong(row: Mapping[str, Any]) -> bool:
    """A result that should not be; a peer that does not run is none."""
    status = str(row["status"])
    own = row["provider"] in ("pytest", "compute-sanitizer", "all") or str(row["provider"]).startswith("triton")
    return status.startswith(("WRONG", "DIFFER", "NOT FINITE")) or (own and status.lower().startswith("failed"))


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of records, logs and gpu.csv")
    parser.add_argument("--only", action="append", choices=names, help="this part alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave out peers that torch.compile makes")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, toy sizes: shows that the script works")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--one-pass", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--warm", choices=warm_names(), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device and found none (--dry-run runs its parts on the CPU)")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one_pass:
        one_pass(torch.device("cuda"), "small")
        return 0
    if arguments.warm:
        warm(arguments.warm, torch.device("cuda"), dry=False)
        return 0
    parts = {part.name: part for part in PARTS}
    if arguments.part:
        run_part(parts[arguments.part], arguments)
        return 0
    for name in arguments.only or names:
        record = Record.load(arguments.out, name)
        if any(row["commit"] != commit() for row in record.rows[:1]):
            print(f"{name}: was run on another commit, its records are dropped", flush=True)
            record.path.unlink()
        elif record.finished:
            print(f"{name}: finished before, skipped", flush=True)
            continue
        print(f"{name}: at most {parts[name].seconds} s", flush=True)
        # Without a device nothing can hang; one part shows that a process of its own works.
        (run_part if arguments.dry_run and name != "tests" else run_isolated)(parts[name], arguments)
        # After every part: whoever stops the pass has what was measured.
        write_csv(arguments.out, [Record.load(arguments.out, name) for name in names])
    records = [Record.load(arguments.out, name) for name in names]
    path = write_csv(arguments.out, records)
    print(f"rows: {path}")
    unfinished = [name for name, record in zip(names, records, strict=True) if not record.finished]
    if unfinished:
        print(f"not finished: {', '.join(unfinished)} (the same command goes on with them)")
    if arguments.dry_run:
        print("dry run on the CPU: no time in this table says anything about a GPU")
    print(table(records, arguments.dry_run))
    return int(any(is_wrong(row) for record in records for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
