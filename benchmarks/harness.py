"""How the benchmarks measure: providers of a case in turn, the machine's own floors beside them, all in one CSV."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import functools
import gc
import importlib
import math
import os
import platform
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from gac_fast import ops
from gac_fast._version import __version__
from gac_fast.train.log import environment

ROOT = Path(__file__).resolve().parent.parent

COLUMNS = (
    "date", "commit", "op", "provider", "mode", "shape", "dtype", "threads", "rounds", "p20_us", "p50_us", "p80_us",
    "speedup", "flops", "bytes", "flop_per_s", "bytes_per_s", "matmul_flop_per_s", "copy_bytes_per_s",
    "isa", "cpu", "cores", "python", "torch", "gac_fast", "compiler", "gain", "matmul_gain",
    "items", "unit", "peak_mib", "note",
)  # fmt: skip
"""Of the CSV. ``date`` names the run. ``speedup`` is the reference's time over this one's, the median over rounds in
which both ran; ``matmul_flop_per_s`` (in ``dtype``) and ``copy_bytes_per_s`` were measured between those rounds, and so
were the time on one thread over the time on these (``gain``) and that of the large product (``matmul_gain``). A call
does ``items`` of ``unit`` (time steps, ...) and takes ``peak_mib`` beyond what lay in memory before. A row of 0 rounds
is of a provider that was not measured, and ``note`` says why."""

REFERENCE = ("reference", "float32")
ALONE = "on one thread"

MATMUL_SIZE = 1536  # 512 to 2048 differ by 3% in float32; two threads are slow on bfloat16 below 1536
COPY_BYTES = 256 * 2**20  # far beyond L2
MAX_FLOOR_ROUNDS = 3
MAX_RARE_ROUNDS = 2  # of providers that take many times as long as the others
# After an operation of torch on several threads, OpenMP's go on spinning for about 16 ms, on the very core that the
# next provider's second thread needs. No provider is measured beside the threads of the one before.
SETTLE_SECONDS = 0.02
KNOWN_SECONDS = 0.2  # a first call that takes so long is not made again to learn how long it takes
MAX_STRETCH = 16  # of the seconds per case, for the sake of the least number of rounds

Provider = tuple[str, str]
"""Who computes and in which dtype: ``("cpp", "bfloat16")``."""

Providers = Mapping[Provider, Callable[[], object] | str]
"""Calls that do the whole work of a case and nothing else, or why there is none. A call with a method ``seconds`` that
does the same and says how long it took is timed by that: it runs in another process. One with a number ``warm_seconds``
is repeated unmeasured for so long, where others would be for less."""

Times = Mapping[int, float]
"""Seconds by round, of those rounds in which it was measured."""


class Settings(NamedTuple):
    """How long one case may run."""

    seconds: float
    min_rounds: int
    max_rounds: int


NORMAL = Settings(seconds=0.6, min_rounds=3, max_rounds=200)
QUICK = Settings(seconds=0.5, min_rounds=3, max_rounds=50)
TINY = Settings(seconds=0.0, min_rounds=1, max_rounds=1)


@dataclass(frozen=True)
class Case:
    """One piece of work that several providers do.

    Attributes:
        mode: what of the op is timed: ``fwd``, ``fwd+bwd``, ``step``, ...
        shape: its sizes in words, the same for all providers.
        flops: least number of floating-point operations; 0 where they are not the point.
        bytes: least memory traffic, by dtype or the same for all; 0 where it is not the point.
        items, unit: what one call gets done, for example 64 ``environment steps``; 0 where time per call says it all.
    """

    op: str
    mode: str
    shape: str
    flops: float = 0.0
    bytes: float | Mapping[str, float] = 0.0
    items: float = 0.0
    unit: str = ""

    def bytes_of(self, dtype: str) -> float:
        return self.bytes.get(dtype, 0.0) if isinstance(self.bytes, Mapping) else self.bytes


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def alternate(
    runs: Mapping[Any, Callable[[], object]],
    settings: Settings,
    main: Any,
    pedantic: Callable[..., object],
    sometimes: Mapping[Any, Callable[[], object]] | None = None,
    threads: Mapping[Any, int] | None = None,
    rarely: Collection[Any] = (),
    known: Mapping[Any, float] | None = None,
) -> tuple[dict[Any, dict[int, float]], int]:
    """Time all of ``runs`` in turn, round after round, so that a change of the machine's mood meets all alike.

    Args:
        runs: what to time; none of them prepares anything.
        main: the one of them that pytest-benchmark times too, last in each round. For its own record alone: what it
            does before takes so long that the engine's threads may fall asleep.
        pedantic: ``benchmark.pedantic``.
        sometimes: timed in at most ``MAX_FLOOR_ROUNDS`` of the rounds.
        threads: numbers of threads of those that run on others than torch's present number.
        rarely: those of ``runs`` that are timed in at most ``MAX_RARE_ROUNDS`` of the rounds, and do not count in how
            many there are. Where a call takes long it is timed once, before the first round, and counted to it.
        known: of some of those, the seconds of the one call that they are to have.

    Returns:
        seconds by round, and the number of rounds.
    """
    sometimes, threads, known = sometimes or {}, threads or {}, known or {}
    present = torch.get_num_threads()
    estimate = {}
    # One that is timed no more than once comes after those that have taken memory from the system.
    for name, run in sorted({**runs, **sometimes}.items(), key=lambda item: item[0] in rarely):
        torch.set_num_threads(threads.get(name, present))
        estimate[name] = known[name] if name in known else _timed(run)
        if name in runs and name not in rarely and estimate[name] < KNOWN_SECONDS:
            estimate[name] = _timed(run)
    torch.set_num_threads(present)
    # Runs in between leave the caches cold: short calls are repeated unmeasured before the measured one.
    n_warm = {name: min(20, max(3, math.ceil(1e-3 / t))) if t < 2e-2 else 0 for name, t in estimate.items()}
    settles = torch.get_num_threads() > 1 and settings.seconds > 0
    if settles:
        n_warm = {name: max(n, math.ceil(SETTLE_SECONDS / estimate[name])) if n else 0 for name, n in n_warm.items()}
    if settings.seconds > 0:
        for name, run in runs.items():
            n_warm[name] = max(n_warm[name], math.ceil(getattr(run, "warm_seconds", 0.0) / estimate[name]))
    counted = [name for name in runs if name not in rarely] or list(runs)
    per_round = sum(estimate[name] * (1 + n_warm[name]) for name in counted)
    rounds = max(settings.min_rounds, min(settings.max_rounds, int(settings.seconds / per_round)))
    # A busy machine can stretch a round a hundredfold, most of all on two threads.
    rounds = min(rounds, max(1, int(MAX_STRETCH * settings.seconds / per_round)))
    stride = dict.fromkeys(sometimes, math.ceil(rounds / MAX_FLOOR_ROUNDS))
    times: dict[Any, dict[int, float]] = {name: {} for name in estimate}
    for name in rarely:
        affordable = int(2 * settings.seconds / estimate[name])
        stride[name] = math.ceil(rounds / max(1, min(MAX_RARE_ROUNDS, affordable)))
        if name in known or (affordable == 0 and settings.seconds > 0):
            times[name] = {0: estimate[name]}
    done_before = [name for name in rarely if times[name]]
    done = 0

    def others() -> None:
        nonlocal done
        for name, run in {**sometimes, **runs}.items():
            if name in done_before or done % stride.get(name, 1):
                continue
            torch.set_num_threads(threads.get(name, present))
            if settles and not n_warm[name]:
                time.sleep(SETTLE_SECONDS)
            for _ in range(n_warm[name]):
                run()
            times[name][done] = _timed(run)
        torch.set_num_threads(present)
        done += 1

    # The main one has to come last.
    runs = {**{name: run for name, run in runs.items() if name != main}, main: runs[main]}
    pedantic(runs[main], setup=others, rounds=rounds, iterations=1)
    return times, rounds


def pairs(a: Times, b: Times) -> list[tuple[float, float]]:
    """Times of two in the rounds in which both were measured."""
    return [(a[i], b[i]) for i in a if i in b]


def _timed(run: Callable[[], object]) -> float:
    own = getattr(run, "seconds", None)
    if own is not None:
        return float(own())
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()


def peak_mib(run: Callable[[], object]) -> float | None:
    """Greatest memory that one call takes beyond what the process holds before it; None where that cannot be told.

    Resident memory, as Linux counts it: what the call returns is in it, and what an engine keeps between calls, the
    inputs and the weights are not. A call with a method ``peak_mib`` answers by that, for its own process.
    """
    own = getattr(run, "peak_mib", None)
    if own is not None:
        return own()
    try:
        # Memory that was freed and kept would be taken again unseen.
        trim = ctypes.CDLL(None).malloc_trim
        gc.collect()
        trim(0)
        before = _status()["VmRSS"]
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        run()
        return max(0.0, (_status()["VmHWM"] - before) / 1024)
    except (AttributeError, OSError, KeyError):
        return None


def _status(process: str = "self") -> dict[str, int]:
    """Sizes of a process in KiB."""
    text = Path(f"/proc/{process}/status").read_text()
    return {name: int(size) for name, size in re.findall(r"^(Vm\w+):\s+(\d+) kB", text, re.MULTILINE)}


def attempt(make: Callable[[], Callable[[], object]]) -> Callable[[], object] | str:
    """What ``make`` gives, or that it failed and how: for peers that need not be able to run here."""
    try:
        return make()
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0][:160]
        return f"failed: {type(error).__name__}: {first}".rstrip(": ")


class Process:
    """A whole process per call, from its start to its end; its peak is all the memory that it ever held."""

    def __init__(self, command: Sequence[str], **variables: str) -> None:
        self._command, self._variables = list(command), variables
        self._peak: float | None = None

    def __call__(self) -> None:
        self.seconds()

    def seconds(self) -> float:
        """From start to end.

        Raises:
            RuntimeError: it failed, with the end of what it said.
        """
        variables = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **self._variables}
        with tempfile.TemporaryFile() as said:
            start = time.perf_counter()
            process = subprocess.Popen(
                self._command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
            watcher = threading.Thread(target=self._watch, args=(process.pid,))
            watcher.start()
            process.wait()
            seconds = time.perf_counter() - start
            watcher.join()
            if process.returncode != 0:
                said.seek(0)
                tail = said.read()[-2000:].decode(errors="replace")
                raise RuntimeError(f"{' '.join(self._command)}: exit status {process.returncode}: {tail}")
        return seconds

    def _watch(self, pid: int) -> None:
        """Note the peak until the process ends. The system's own count at the end would begin with this process."""
        with contextlib.suppress(OSError, KeyError):
            while True:
                self._peak = _status(str(pid))["VmHWM"] / 1024
                time.sleep(0.005)

    def peak_mib(self) -> float | None:
        """Of the last call."""
        if self._peak is None:
            self.seconds()
        return self._peak


PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


class Peer:
    """A step in a process of the peers' environment, which times it itself."""

    def __init__(self, script: str, *arguments: object) -> None:
        """Start ``python -m benchmarks.peers.<script>``.

        Raises:
            RuntimeError: it could not start, with its own words.
        """
        command = [str(PEERS_PYTHON), "-m", f"benchmarks.peers.{script}", *map(str, arguments)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        answer = self._answer()
        if answer != "ready":
            self.close()
            raise RuntimeError(answer.removeprefix("failed: ") or "no answer")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _ask(self, what: str) -> float | None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self._process.stdin, flush=True)
        answer = self._answer()
        return float(answer) if answer else None

    def __call__(self) -> None:
        self.seconds()

    def seconds(self) -> float:
        """What one step took."""
        value = self._ask("time")
        if value is None:
            raise RuntimeError("the peer's process has ended")
        return value

    def peak_mib(self) -> float | None:
        """As :func:`peak_mib`."""
        return self._ask("peak")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


COMPILE_MODES: dict[str, str | dict[str, str]] = {
    "torch.compile": {},
    "torch.compile max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}

Compilers = Mapping[str, str | dict[str, str]]
"""By provider, the arguments of ``torch.compile``, or why it is left out."""


def instead(compilers: Compilers, reason: str) -> Compilers:
    """None of them, for that reason."""
    return dict.fromkeys(compilers, reason)


NEEDS_CUDA = "needs CUDA: make gpu"
"""The reason of a peer that the benchmarks of the GPU measure."""


class Compiled:
    """A call of what was compiled, with the time that compiling took."""

    def __init__(self, run: Callable[[], object], seconds: float) -> None:
        self._run, self.note = run, f"compiled in {seconds:.0f} s"

    def __call__(self) -> object:
        return self._run()


def compiled(
    compilers: Compilers, make: Callable[[Callable[..., Any]], Callable[[], object]]
) -> dict[Provider, Callable[[], object] | str]:
    """The compiled peers of a case.

    Args:
        make: of a function that compiles functions, the call to time, which has compiled and was checked.
    """
    providers: dict[Provider, Callable[[], object] | str] = {}
    for name, options in compilers.items():
        if isinstance(options, str):
            providers[name, "float32"] = options
            continue
        torch.compiler.reset()
        torch._functorch.config.donated_buffer = False  # which would forbid to go backward twice, as here

        def build(options: dict[str, str] = options) -> Callable[[], object]:
            start = time.perf_counter()
            run = make(lambda f: torch.compile(f, dynamic=False, **options))
            return Compiled(run, time.perf_counter() - start)

        providers[name, "float32"] = attempt(build)
    return providers


@functools.cache  # its half a gigabyte takes longer to make than to measure
def floor_runs(tiny: bool = False) -> dict[Any, Callable[[], object]]:
    """What the machine does at best: large products by dtype and a large copy, on torch's threads."""
    n = 64 if tiny else MATMUL_SIZE

    def product(dtype: torch.dtype) -> Callable[[], object]:
        a, b, out = (torch.ones(n, n, dtype=dtype) for _ in range(3))
        return lambda: torch.mm(a, b, out=out)

    source = torch.ones((2**16 if tiny else COPY_BYTES) // 4)
    target = torch.empty_like(source)
    return {
        ("matmul", "float32"): product(torch.float32),
        ("matmul", "bfloat16"): product(torch.bfloat16),
        ("copy", "float32"): lambda: target.copy_(source),
    }


@dataclass(frozen=True)
class Floors:
    """Rates of a large matrix product by dtype (FLOP/s) and of a large copy (bytes/s, read and written)."""

    matmul: Mapping[str, float]
    copy: float
    gain: Mapping[str, float] = field(default_factory=dict)
    """By dtype, what a large product gains over one thread; empty where it was not run there too."""

    @classmethod
    def of(cls, times: Mapping[Any, Times], tiny: bool = False) -> Floors:
        n = 64 if tiny else MATMUL_SIZE
        flops = {
            dtype: 2 * n**3 / statistics.median(times["matmul", dtype].values())
            for dtype in ("float32", "bfloat16")
            if times["matmul", dtype]
        }
        gain = {
            dtype: statistics.median(a / t for a, t in pairs(alone, times["matmul", dtype]))
            for dtype in ("float32", "bfloat16")
            if (alone := times.get(("matmul", dtype, ALONE)))
        }
        size = 2**16 if tiny else COPY_BYTES
        return cls(flops, 2 * size / statistics.median(times["copy", "float32"].values()), gain)


def quantile(times: Sequence[float], q: float) -> float:
    """Linear between the ordered values."""
    ordered = sorted(times)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def under(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """``run`` on one backend; the empty string leaves the choice to the ops."""

    def on_backend() -> object:
        with ops.backend(backend) if backend else contextlib.nullcontext():
            return run()

    return on_backend


def row_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest over the rows (last axis) of |x - reference| / |reference|; a zero row counts by its absolute error."""
    x, reference = x.detach().double(), reference.detach().double()
    norm = reference.norm(dim=-1)
    return float(((x - reference).norm(dim=-1) / torch.where(norm > 0, norm, 1.0)).max())


ROW_BOUND = {"float32": 1e-5, "bfloat16": 2e-2}
"""What :func:`row_error` may be, against the reference in float64 on the same rounded inputs."""


# ---------------------------------------------------------------------------------------------------------------------
# Records


def commit() -> str:
    """Short commit of the checkout, ``+dirty`` where tracked files differ from it, earlier results left aside."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        return subprocess.run(["git", *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode != 0:
            return "unknown"
        results = (":(exclude)benchmarks/results", ":(exclude)docs/images")
        dirty = git("diff", "--quiet", "HEAD", "--", ".", *results).returncode != 0
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+dirty" if dirty else "")


def machine() -> dict[str, Any]:
    """The columns that are the same in all rows of a run but for the path of the engine."""
    here = environment()
    engine = _engine()
    return {
        "date": here["started"], "commit": commit(), "cpu": here["cpu"], "cores": here["cores"],
        "python": platform.python_version(), "torch": torch.__version__, "gac_fast": __version__,
        "compiler": engine._build_info()["compiler"] if engine else "none",
    }  # fmt: skip


def isa() -> str:
    """The path of the C++ engine; ``none`` where there is no engine."""
    engine = _engine()
    return str(engine._isa()) if engine else "none"


def _engine() -> ModuleType | None:
    """``gac_fast._C``, where the ops would take it."""
    usable = any("cpp" not in status.problems for status in ops.status("cpu"))
    return importlib.import_module("gac_fast._C") if usable else None


def engine_problem(op: str, dtype: str = "float32") -> str | None:
    """Why the C++ engine cannot be measured on ``op``; None where it can."""
    problem = {status.op: status.problems.get("cpp") for status in ops.status("cpu")}.get(op, f"there is no op {op}")
    if problem is None and dtype == "bfloat16" and isa() != "amx":
        return f"no AMX (the path is {isa()})"
    return problem


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Append to the CSV, which keeps what it holds.

    Raises:
        ValueError: the file has other columns.
    """
    new = not path.exists()
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        with path.open(newline="", encoding="utf-8") as file:
            found = tuple(next(csv.reader(file), ()))
        if found != tuple(columns):
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}, found {', '.join(found)}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def row(
    case: Case,
    provider: Provider,
    times: Times,
    reference: Times,
    floors: Floors | None,
    alone: Times | None = None,
    peak: float | None = None,
) -> dict[str, Any]:
    """What was measured of one provider, as columns of the CSV.

    Args:
        times: its own.
        reference: those of the reference; empty where it did not run.
        alone: its own on one thread; None where it ran on no more anyway.
        peak: MiB of :func:`peak_mib`.
    """
    name, dtype = provider
    p20, p50, p80 = (quantile(list(times.values()), q) for q in (0.2, 0.5, 0.8))
    n_bytes = case.bytes_of(dtype)
    both, gains = pairs(reference, times), pairs(alone or {}, times)
    speedup = statistics.median(r / t for r, t in both) if both else ""
    gain = statistics.median(a / t for a, t in gains) if gains else ""
    return {
        "op": case.op, "provider": name, "mode": case.mode, "shape": case.shape, "dtype": dtype,
        "threads": torch.get_num_threads(), "rounds": len(times),
        "p20_us": _short(p20 * 1e6), "p50_us": _short(p50 * 1e6), "p80_us": _short(p80 * 1e6),
        "speedup": _short(speedup), "flops": _short(case.flops or ""), "bytes": _short(n_bytes or ""),
        "flop_per_s": _short(case.flops / p50 if case.flops else ""),
        "bytes_per_s": _short(n_bytes / p50 if n_bytes else ""),
        "matmul_flop_per_s": _short(floors.matmul.get(dtype, "") if floors else ""),
        "copy_bytes_per_s": _short(floors.copy if floors else ""), "isa": isa(), "gain": _short(gain),
        "matmul_gain": _short(floors.gain.get(dtype, "") if floors and alone else ""),
        "items": _short(case.items or ""), "unit": case.unit,
        "peak_mib": "" if peak is None else round(peak, 1), "note": "",
    }  # fmt: skip


def missing_row(case: Case, provider: Provider, reason: str) -> dict[str, Any]:
    """A row that says why there is none."""
    told = {"op": case.op, "provider": provider[0], "mode": case.mode, "shape": case.shape, "dtype": provider[1]}
    told |= {"threads": torch.get_num_threads(), "rounds": 0, "isa": isa(), "note": reason}
    return {**dict.fromkeys(row(case, provider, {0: 1.0}, {}, None), ""), **told}


def _short(value: float | str) -> float | str:
    return float(f"{value:.5g}") if isinstance(value, int | float) else value


@dataclass
class Recorder:
    """Rows of this run, appended to the CSV as they come, so that an interrupted run keeps what it has."""

    path: Path | None
    settings: Settings = NORMAL
    tiny: bool = False
    only: Collection[tuple[str, str, str]] | None = None
    """Op, mode and shape of the cases to measure; None: all."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    _machine: dict[str, Any] = field(default_factory=dict)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._machine = self._machine or machine()
        whole = [{name: {**self._machine, **row}[name] for name in COLUMNS} for row in rows]
        if self.path is not None:
            append_rows(self.path, whole)
        self.rows += whole

    def compare(
        self,
        benchmark: Any,
        case: Case,
        providers: Providers,
        rarely: Collection[Provider] = (),
        once: bool = False,
    ) -> None:
        """Time the providers of a case in turn; the last one that runs is the one in pytest-benchmark's own record.

        Args:
            benchmark: the fixture of pytest-benchmark.
            providers: of which all results have been asserted before.
            rarely: those of them that take so long that few rounds have to do.
            once: all of them take so long that one call has to do, in which memory is looked at too. Getting it from
                the system is in its time: not for calls that do little else.
        """
        if torch.get_num_threads() > 1 and len(rarely) < len(providers):
            able = [provider for provider in rarely if not isinstance(providers.get(provider, ""), str)]
            providers = {**providers, **dict.fromkeys(able, "left out: takes long, see one thread")}
        runs = {provider: run for provider, run in providers.items() if not isinstance(run, str)}
        missing = {provider: reason for provider, reason in providers.items() if isinstance(reason, str)}
        rarely = [provider for provider in rarely if provider in runs]
        notes = {provider: getattr(run, "note", "") for provider, run in runs.items()}
        # Of what runs in another process pytest-benchmark would see the way there too.
        here = [name for name in runs if name not in rarely and not hasattr(runs[name], "seconds")]
        main = (here or list(runs))[-1]
        benchmark.group = f"{case.op}: {case.mode}, {case.shape}"
        floor = dict(floor_runs(self.tiny))
        alone: dict[Any, Callable[[], object]] = {}
        if torch.get_num_threads() > 1:
            # A processor changes its speed within a minute, and its neighbours their ways: a gain is of neighbours in
            # time.
            alone = {(*provider, ALONE): run for provider, run in runs.items() if provider[0] == "cpp"}
            floor |= {(*name, ALONE): run for name, run in floor.items() if name[0] == "matmul"}
        peaks: dict[Provider, float | None] = {}
        known: dict[Provider, float] = {}
        if once and not self.tiny:
            rarely = list(runs)
            for provider, run in runs.items():

                def timed(provider: Provider = provider, run: Callable[[], object] = run) -> None:
                    known[provider] = _timed(run)

                peaks[provider] = peak_mib(timed)
        settings = self.settings
        if alone:
            # Every provider of the engine runs twice.
            settings = settings._replace(seconds=settings.seconds / 2, min_rounds=max(1, settings.min_rounds - 2))
        times, rounds = alternate(
            {**runs, **alone},
            settings,
            main,
            benchmark.pedantic,
            floor,
            {n: 1 for n in (*alone, *floor) if ALONE in n},
            rarely,
            known,
        )
        if benchmark.stats is None:  # --benchmark-disable
            return
        assert all(len(times[provider]) == rounds for provider in runs if provider not in rarely)
        # Memory is handed back for it, and would be taken anew while the next one is timed.
        if not self.tiny and not once:
            peaks = {provider: peak_mib(run) for provider, run in runs.items()}
        floors = Floors.of(times, self.tiny)
        reference = times.get(REFERENCE, {})
        rows = []
        for provider in runs:
            found = times[provider], reference, floors, times.get((*provider, ALONE)), peaks.get(provider)
            rows.append(row(case, provider, *found) | {"note": notes[provider]})
        rows += [missing_row(case, provider, reason) for provider, reason in missing.items()]
        benchmark.extra_info.update(
            {"op": case.op, "mode": case.mode, "shape": case.shape, "provider": main[0], "dtype": main[1]}
            | {"flops": case.flops, "bytes": case.bytes_of(main[1]), "providers": rows}
        )
        self.add(rows)

    def add_plain(self, benchmark: Any, provider: str) -> None:
        """Record a case that pytest-benchmark timed alone and that says in ``extra_info`` what it was."""
        info = benchmark.extra_info
        if benchmark.stats is None or "op" not in info or "providers" in info:
            return
        given = {name: info[name] for name in ("flops", "bytes", "items", "unit") if name in info}
        case = Case(info["op"], info["mode"], info["shape"], **given)
        found = (info.get("provider", provider), info.get("dtype", "float32"))
        self.add([row(case, found, dict(enumerate(benchmark.stats.stats.data)), {}, None)])
