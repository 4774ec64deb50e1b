"""Shared fixtures and helpers: ``from conftest import row_error``."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# A shell starts what it puts in the background deaf to SIGINT, which the tests of Ctrl-C send.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny tensors gain nothing from threads, and on a busy machine they wait for one another.
torch.set_num_threads(1)

# Full float32 products on every device: a tolerance should measure the op, not the TF32 mode.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Counted skips without a GPU; interpreter cases only in the process that a test starts for them."""
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    deselected = []
    for item in items:
        # Not item.keywords, which hold the names of the folders too.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
        if item.get_closest_marker("interpreter") and not INTERPRETED:
            deselected.append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def row_error(x: Tensor, reference: Tensor) -> float:
    """Largest over the rows (last axis) of |x - reference| / |reference|, in float64.

    Rows whose reference is zero count by their absolute error; NaN anywhere gives inf.
    """
    assert x.shape == reference.shape, f"shapes differ: {tuple(x.shape)} and {tuple(reference.shape)}"
    if x.numel() == 0:
        return 0.0
    x, reference = x.detach().to("cpu", torch.float64), reference.detach().to("cpu", torch.float64)
    norm = reference.norm(dim=-1)
    error = (x - reference).norm(dim=-1) / torch.where(norm > 0, norm, torch.ones_like(norm))
    return float(error.nan_to_num(nan=float("inf")).max())


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """Fresh uninitialised tensors hold NaN (floats) or the largest integer: reads of unwritten memory show."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1000).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@pytest.fixture
def cpp_engine() -> ModuleType:
    """``gac_fast._C``. Skips where the engine was left out on purpose, fails where it should be there and is not."""
    if os.environ.get("GAC_FAST_NO_CPP", "0") not in ("", "0"):
        pytest.skip("installed without the C++ engine (GAC_FAST_NO_CPP)")
    return importlib.import_module("gac_fast._C")


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request: pytest.FixtureRequest, cpp_engine: ModuleType) -> Iterator[str]:
    """Each path of the C++ engine that this processor can run."""
    from gac_fast import ops

    problem = dict(cpp_engine._isa_problems())[request.param]
    if problem:
        pytest.skip(f"{request.param}: {problem}")
    with ops.cpu_isa(request.param):
        assert cpp_engine._isa() == request.param
        yield request.param


@pytest.fixture
def run_interpreted() -> Callable[..., None]:
    """Runs the tests of a file that are marked ``interpreter``, in a process with TRITON_INTERPRET=1.

    The variable has to be set before Triton is imported, hence the process of their own.
    """

    def run(test_file: str, marks: str = "interpreter") -> None:
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", marks, "-p", "no:cacheprovider", "-q", test_file],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        # Exit status 5, no test collected, is a failure too.
        assert result.returncode == 0, result.stdout + result.stderr

    return run


@pytest.fixture(autouse=True)
def own_dispatch_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test chooses its backends itself and counts from zero."""
    from gac_fast import ops

    monkeypatch.delenv("GAC_FAST_BACKEND", raising=False)
    ops.reset_dispatch_counts()
