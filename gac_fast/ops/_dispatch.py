"""Which engine runs an op: chosen by device, forced by :func:`backend` or ``GAC_FAST_BACKEND``, counted per call.

Inside the C++ engine, :func:`cpu_isa` and ``GAC_FAST_CPU_ISA`` force the instruction set.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from gac_fast._version import __version__
from gac_fast.errors import BackendError, EngineWarning

__all__ = [
    "BACKENDS",
    "ModelSizes",
    "OpStatus",
    "backend",
    "cpu_isa",
    "dispatch_counts",
    "refusals",
    "reset_dispatch_counts",
    "status",
]

BACKENDS = ("reference", "triton", "cpp")
ENVIRONMENT_VARIABLE = "GAC_FAST_BACKEND"


class ModelSizes(NamedTuple):
    """What decides whether an engine takes the calls of a model."""

    dim: int
    n_heads: int
    n_z: int
    members: int
    """Of the return model's ensemble."""


_engines: dict[str, tuple[str, ...]] = {}
_limits: dict[str, Callable[[ModelSizes], str | None]] = {}
_forced: ContextVar[str | None] = ContextVar("gac_fast_backend", default=None)
_counts: Counter[tuple[str, str]] = Counter()
_told_of_missing_engine = False


@dataclass(frozen=True)
class OpStatus:
    """What can run one op on one device."""

    op: str
    device: str
    active: str
    """The backend that a call takes; the empty string where a forced one cannot run."""
    problems: Mapping[str, str]
    """Backends that cannot run, each with the reason."""

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.problems.items())
        return f"{self.op} on {self.device}: {self.active or 'none'}" + (f" ({reasons})" if reasons else "")


def register(op: str, *engines: str, triton_refuses: Callable[[ModelSizes], str | None] | None = None) -> None:
    """Declare ``op`` and its engines beside the reference, in the order of preference.

    Args:
        triton_refuses: why the Triton engine does not take the calls of a model, in the words of a forced call; where
            it is left out that engine takes every model, as the C++ engine does in any case.
    """
    _engines[op] = engines
    if triton_refuses is not None:
        _limits[op] = triton_refuses


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op inside the ``with`` block onto one backend; it goes before ``GAC_FAST_BACKEND``.

    Holds for the thread (and the asynchronous task) that entered the block.

    Args:
        name: ``"reference"``, ``"triton"`` or ``"cpp"``.

    Raises:
        BackendError: unknown name; inside the block, an op that cannot run there.
    """
    token = _forced.set(_checked(name, "backend()"))
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Force the C++ engine onto one instruction set inside the ``with`` block; it goes before ``GAC_FAST_CPU_ISA``.

    Holds for the whole process, unlike :func:`backend`: enter it in one thread at a time. The former choice comes back
    at the end.

    Args:
        name: ``"portable"``, ``"avx2"``, ``"avx512"`` or ``"amx"``.

    Raises:
        BackendError: unknown name, a path that this processor cannot run, or no C++ engine.
    """
    engine, reason = _load_cpp_engine()
    if engine is None:
        raise BackendError(f"cpu_isa() forces the {name} path of the C++ engine, which cannot run: {reason}")
    if not name:
        raise BackendError("cpu_isa(): expected the name of a path, got ''")
    try:
        former = engine._use_isa(name)
    except (ValueError, RuntimeError) as error:
        raise BackendError(str(error)) from None
    try:
        yield
    finally:
        engine._use_isa(former)


def dispatch_counts() -> dict[tuple[str, str], int]:
    """Calls per (op, backend) since the start or the last :func:`reset_dispatch_counts`.

    A compiled graph counts an op that it sees through (the attention references) once, when it is traced.
    """
    return dict(_counts)


def reset_dispatch_counts() -> None:
    """Set all counts of :func:`dispatch_counts` to zero."""
    _counts.clear()


def status(device: str | torch.device | None = None) -> list[OpStatus]:
    """For every op: the active backend on ``device`` and why the others cannot run.

    Args:
        device: default the first CUDA device, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    report = []
    for op in sorted(_engines):
        problems = {name: reason for name in BACKENDS if (reason := problem(op, name, device)) is not None}
        try:
            active = _select(op, device)
        except BackendError:
            active = ""
        report.append(OpStatus(op, str(device), active, problems))
    return report


def refusals(sizes: ModelSizes) -> dict[str, dict[str, str | None]]:
    """For every engine and each op that it has: why it does not take the calls of a model; None where it does.

    Whether the engine can run on this machine is another question, which :func:`status` answers.
    """
    found: dict[str, dict[str, str | None]] = {name: {} for name in BACKENDS if name != "reference"}
    for op, engines in sorted(_engines.items()):
        for name in engines:
            refuses = _limits.get(op) if name == "triton" else None
            # Limits are the kernels' own, which are not there without Triton.
            missing = _triton_missing() if refuses is not None else None
            found[name][op] = missing if missing is not None or refuses is None else refuses(sizes)
    return found


def choose(op: str, device: torch.device, refused: str | None = None) -> str:
    """The backend for one call of ``op`` on tensors of ``device``, counted.

    A compiled graph asks once, when it is traced, and keeps the answer.

    Args:
        refused: why no engine takes these arguments, whatever the device; the reference then runs.

    Raises:
        BackendError: a forced backend, or a forced path of the C++ engine, cannot run the op there, or does not exist.
    """
    name = _select(op, device, refused)
    if name == "reference" and refused is None:
        _tell_of_missing_engine(op, device)
    _counts[op, name] += 1
    return name


# What torch.compiler.assume_constant_result does, without its import of the compiler: 2 s that most users never need.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def count(op: str, name: str, n: int = 1) -> None:
    """``n`` calls of ``op`` by backend ``name``, which was chosen for several together."""
    _counts[op, name] += n


def again(op: str, name: str) -> bool:
    """Whether a call goes to backend ``name`` like the one before, then counted; False where it is not certain.

    Args:
        name: what :func:`choose` said of a call with the same arguments but for their values.
    """
    forced = _forced.get()
    if forced is None:
        engine, _ = _load_cpp_engine()
        if engine is None or engine._has_variable(ENVIRONMENT_VARIABLE):
            return False
    elif forced != name:
        return False
    _counts[op, name] += 1
    return True


def active(op: str, device: torch.device) -> str:
    """The backend that :func:`choose` would give, not counted.

    Raises:
        BackendError: a forced backend cannot run the op there, or does not exist.
    """
    return _select(op, device)


def is_for_triton(op: str, device: torch.device) -> bool:
    """Whether the Triton engine would take a call on tensors of ``device``: limits of its own then count."""
    try:
        return _select(op, device) == "triton"
    except BackendError:
        return False


is_for_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def problem(op: str, name: str, device: torch.device) -> str | None:
    """Why backend ``name`` cannot run ``op`` on ``device``; None where it can."""
    if name == "reference":
        return None
    if name not in _engines[op]:
        return f"{op} has no {name} engine"
    return _cpp_problem(device) if name == "cpp" else _triton_problem(device)


def refusal(x: torch.Tensor) -> str | None:
    """Why no engine takes a tensor of this dtype; None where they do."""
    return "the engines take float32 and bfloat16, got float64" if x.dtype == torch.float64 else None


def cpp_engine() -> ModuleType:
    """``gac_fast._C``; call it only where :func:`choose` said ``cpp``."""
    module, _ = _load_cpp_engine()
    assert module is not None
    return module


def _select(op: str, device: torch.device, refused: str | None = None) -> str:
    forced = _forced.get()
    source = "backend()"
    if forced is None and (forced := os.environ.get(ENVIRONMENT_VARIABLE) or None) is not None:
        source = ENVIRONMENT_VARIABLE
        _checked(forced, source)
    if forced is not None:
        reason = problem(op, forced, device)
        if reason is None and forced != "reference":
            reason = refused
        if reason is not None:
            raise BackendError(f"{op}: {source} forces the {forced} backend, which cannot run: {reason}")
        return forced
    if refused is not None:
        return "reference"
    # The interpreter of Triton runs on CPU tensors too, but is for tests alone: never chosen, only forced.
    preferred = "cpp" if device.type == "cpu" else "triton"
    if problem(op, preferred, device) is None:
        return preferred
    if preferred == "cpp" and "cpp" in _engines[op] and (reason := _cpp_isa_problem()) is not None:
        # Forced as well: the reference in its place would be silent.
        raise BackendError(f"{op}: {reason}")
    return "reference"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _cpp_problem(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ engine needs CPU tensors, got {device.type} tensors"
    reason = _load_cpp_engine()[1]
    return reason if reason is not None else _cpp_isa_problem()


def _cpp_isa_problem() -> str | None:
    """What is wrong with ``GAC_FAST_CPU_ISA``, which the engine reads at its first use."""
    engine, _ = _load_cpp_engine()
    if engine is None:
        return None
    try:
        engine._isa()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def _tell_of_missing_engine(op: str, device: torch.device) -> None:
    """Once per process, unless the reference was asked for."""
    global _told_of_missing_engine
    if _told_of_missing_engine or device.type != "cpu" or "cpp" not in _engines[op]:
        return
    if _forced.get() is not None or os.environ.get(ENVIRONMENT_VARIABLE):
        return
    _told_of_missing_engine = True
    message = f"ops on CPU tensors run on the PyTorch reference, which is slower: {_load_cpp_engine()[1]}"
    warnings.warn(message, EngineWarning, stacklevel=3)


@functools.cache
def _load_cpp_engine() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec("gac_fast._C") is None:
        return None, "gac_fast._C is not installed (GAC_FAST_NO_CPP=1 leaves it out; install again without it)"
    try:
        from gac_fast import _C
    except ImportError as error:
        return None, f"gac_fast._C does not load: {error}"
    built = _C._build_info()["version"]
    if built != __version__:
        return None, f"gac_fast._C was built for version {built}, the package is {__version__}: install it again"
    return _C, None


def _triton_problem(device: torch.device) -> str | None:
    if (reason := _triton_missing()) is not None:
        return reason
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"Triton needs CUDA tensors (or TRITON_INTERPRET=1), got {device.type} tensors"
    if device.type == "cpu":
        return None
    return _device_problem(device) or _launcher_problem(os.environ.get("CC"))


# Bytes of shared memory that one program of the kernels may ask for at the least: those of sm_80.
_SHARED_MEMORY = 163 * 1024


@functools.cache
def _device_problem(device: torch.device) -> str | None:
    """The kernels' tiles are made for data-centre cards of compute capability 8.0 (A100) and 9.0 (H100, H200)."""
    if not torch.cuda.is_available():
        return None  # whoever has tensors on such a device cannot be here
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"the kernels need compute capability 8.0 or more, {properties.name} has {properties.major}.0"
    shared = getattr(properties, "shared_memory_per_block_optin", _SHARED_MEMORY)
    if shared < _SHARED_MEMORY:
        return (
            f"the kernels' tiles need {_SHARED_MEMORY // 1024} KiB of shared memory per block, {properties.name} has "
            f"{shared // 1024}"
        )
    return None


@functools.cache
def _launcher_problem(cc: str | None) -> str | None:
    """Triton builds the launcher of its kernels, with ``cc``, gcc or clang, when the first one runs."""
    if cc is not None and shutil.which(cc) is None:
        return f"Triton needs a C compiler at run time, and CC names {cc!r}, which is not found"
    if cc is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler at run time, and neither gcc nor clang is found (CC names another)"
    folders = [sysconfig.get_path("include", "posix_prefix"), *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any((Path(folder) / "Python.h").exists() for folder in folders):
        return f"Triton needs the headers of Python at run time, and {folders[0]} has no Python.h"
    return None


@functools.cache
def _triton_missing() -> str | None:
    for module in ("triton", "gac_fast.kernels"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None
