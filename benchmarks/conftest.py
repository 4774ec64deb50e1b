"""Shared by the benchmarks: every case checks its result before it is timed, and says what it ran on."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from gac_fast import ops


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()


@pytest.fixture(params=["reference", "cpp"])
def cpu_backend(request: pytest.FixtureRequest) -> Any:
    """The backends of the CPU; a missing engine skips its cases."""
    if request.param == "cpp":
        pytest.importorskip("gac_fast._C")
    with ops.backend(request.param):
        yield request.param
