"""Shared by the benchmarks: every case checks its result before it is timed, and says what it ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import report
import torch
from harness import COMPILE_MODES, NORMAL, QUICK, TINY, Case, Compilers, Provider, Providers, Recorder

from gac_fast import ops

RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gac_fast benchmarks")
    group.addoption("--threads", help="thread counts to measure, for example 1,2 (default: those the machine has)")
    group.addoption("--quick", action="store_true", help="half a second per case instead of 0.6")
    group.addoption("--tiny", action="store_true", help="toy sizes, one round: shows that the cases run, no speed")
    group.addoption("--compile", action="store_true", help="torch.compile and FlexAttention too, on one thread")
    group.addoption("--guarded", action="store_true", help="only the cases that thresholds.toml names")
    group.addoption("--csv", type=Path, metavar="PATH", help="append the rows to this file")


def pytest_configure(config: pytest.Config) -> None:
    tiny = config.getoption("--tiny")
    settings = TINY if tiny else QUICK if config.getoption("--quick") else NORMAL
    bars = report.read_bars(report.THRESHOLDS, "at_least") if config.getoption("--guarded") else None
    only = None if bars is None else {bar[:3] for bar in bars}
    config.stash[RECORDER] = Recorder(config.getoption("--csv"), settings, tiny, only)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("--threads")
    if given is None:
        threads = [n for n in (1, 2) if n <= len(os.sched_getaffinity(0))]
    else:
        try:
            threads = [int(n) for n in given.split(",")]
        except ValueError:
            threads = [0]
        if min(threads) < 1:
            raise pytest.UsageError(f"--threads: expected counts such as 1,2, got {given!r}")
    metafunc.parametrize("n_threads", threads, ids=[f"{n}t" for n in threads], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A case runs at all thread counts before the next one starts: their quotient is told."""

    def case(item: pytest.Item) -> tuple[str, tuple[str, ...]]:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        others = tuple(f"{name}={value}" for name, value in params.items() if name != "n_threads")
        return item.nodeid.partition("[")[0], others

    first: dict[tuple[str, tuple[str, ...]], int] = {}
    for i, item in enumerate(items):
        first.setdefault(case(item), i)
    items.sort(key=lambda item: first[case(item)])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    recorder = config.stash[RECORDER]
    if recorder.rows:
        terminalreporter.section("speed against the reference")
        terminalreporter.write_line(report.text(recorder.rows))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()


@pytest.fixture(autouse=True)
def own_dispatch_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case chooses its backends itself."""
    monkeypatch.delenv("GAC_FAST_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of torch and of the engine; every case runs at each count."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def memory_as_in_training() -> None:
    """Freed memory stays with the process, for all providers alike; ``GAC_FAST_KEEP_MEMORY=0`` leaves it as it is."""
    ops.keep_freed_memory()


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> bool:
    """Whether to take toy sizes."""
    return request.config.stash[RECORDER].tiny


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """``compare(case, providers, rarely=(), once=False)``: see :meth:`harness.Recorder.compare`."""

    def run(case: Case, providers: Providers, rarely: Collection[Provider] = (), once: bool = False) -> None:
        recorder = request.config.stash[RECORDER]
        if recorder.only is not None and (case.op, case.mode, case.shape) not in recorder.only:
            pytest.skip("thresholds.toml does not name this case")
        recorder.compare(benchmark, case, providers, rarely, once)

    return run


@pytest.fixture
def compilers(request: pytest.FixtureRequest, tiny: bool, n_threads: int) -> Iterator[Compilers]:
    """What makes the compiled peers of a function, or why they are left out: see :func:`harness.compiled`."""
    reason = None
    if tiny:
        reason = "left out with toy sizes"
    elif not request.config.getoption("--compile"):
        reason = "left out: takes minutes, --compile runs it"
    elif n_threads > 1:
        reason = "left out: compiled for one thread alone"
    yield {name: reason or mode for name, mode in COMPILE_MODES.items()}
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def record_plain(request: pytest.FixtureRequest, n_threads: int) -> Iterator[None]:
    """Cases that call ``benchmark`` themselves go to the CSV too, if ``extra_info`` names op, mode and shape."""
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is not None:
        callspec = getattr(request.node, "callspec", None)
        backend = callspec.params.get("cpu_backend", "") if callspec else ""
        request.config.stash[RECORDER].add_plain(benchmark, backend)


@pytest.fixture(params=["reference", "cpp"])
def cpu_backend(request: pytest.FixtureRequest) -> Any:
    """The backends of the CPU; a missing engine skips its cases."""
    if request.param == "cpp":
        pytest.importorskip("gac_fast._C")
    with ops.backend(request.param):
        yield request.param
