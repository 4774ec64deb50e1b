"""Helpers of the tests of Triton kernels: what a launch needs of a GPU, found by compiling it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of shared memory that one program may ask for.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


class Resources(NamedTuple):
    """Of one compiled kernel: registers per thread; stack, local and shared memory in bytes."""

    registers: int
    stack: int
    local: int
    shared: int


def resources(launch: Any, architecture: int, folder: Path) -> Resources:
    """Compile a :class:`gac_fast.kernels._launch.Launch` to machine code and read what it needs.

    Set TRITON_CACHE_DIR to a fresh folder first where the compiler itself is under test.
    """
    import triton

    compiled = launch.compile(architecture)
    cubin = compiled.asm["cubin"]
    assert cubin[:4] == b"\x7fELF"
    path = folder / f"{launch.name}_{architecture}.cubin"
    path.write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    line = usage[usage.index(f"Function {launch.name}") :]

    def number(word: str) -> int:
        match = re.search(rf"\b{word}:(\d+)", line)
        assert match is not None, usage
        return int(match.group(1))

    # Dynamic shared memory is asked for at the launch; the cubin names the static part alone.
    shared = max(int(compiled.metadata.shared), number("SHARED"))
    return Resources(number("REG"), number("STACK"), number("LOCAL"), shared)


def assert_fits(launch: Any, architecture: int, folder: Path, *, spills: bool = False) -> Resources:
    """No spills (unless ``spills``) and no more shared memory than the architecture has."""
    found = resources(launch, architecture, folder)
    what = f"{launch.name} [{launch.option}] on sm_{architecture}: {found}"
    assert found.shared <= SHARED_LIMIT[architecture], what
    if not spills:
        assert found.stack == 0, what
        assert found.local == 0, what
    return found


def far_apart(x: Tensor, stride: int, folder: Path) -> Tensor:
    """x with rows ``stride`` elements apart; a sparse file is behind it, so that what lies between takes no room."""
    path = folder / "far_apart"
    whole = torch.from_file(str(path), shared=True, size=len(x) * stride, dtype=x.dtype)
    path.unlink()
    rows = torch.empty(x.shape, device="meta").stride()[1:]
    return whole.as_strided(x.shape, (stride, *rows)).copy_(x)
