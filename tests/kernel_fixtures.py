"""Helpers of the tests of Triton kernels: what a launch needs of a GPU, found by compiling it, and at which sizes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# Bytes of shared memory that one program may ask for.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

# Arguments of ``shipped`` by op: the sizes at which the slow tests compile, and beside its usual ones the table of
# resources; a dtype means that one alone. Heads as narrow and as wide as they may be, one plan vector and sixteen.
_HEADS = ((64, 8), (128, 8), (96, 4), (128, 4), (96, 2), (128, 2), (192, 2), (128, 1), (192, 1), (256, 1))
_SEVERAL = {"members": 4, "n_obs": 17}
_ASCENTS = ({}, {"langevin": True}, _SEVERAL, {**_SEVERAL, "n_starts": 8})
SIZES: dict[str, list[dict[str, Any]]] = {
    "block": [
        {"dim": 64, "heads": 8, "n_z": 1},
        {"dim": 96, "heads": 12, "n_z": 4},
        {"dim": 128, "heads": 4, "n_z": 4, "has_o": False},
        {"dim": 128, "heads": 4, "n_z": 4, "n_next": 6},
        {"dim": 128, "heads": 16, "n_z": 16},
        {"dim": 192, "heads": 6, "n_z": 7},
        {"dim": 256, "heads": 1, "n_z": 4},
    ],
    "decode_step": [
        {"dim": dim, "heads": heads, "n_z": n_z, "tokens_per_step": tokens}
        for dim, heads, n_z in (
            (64, 4, 16), (64, 8, 1), (96, 4, 4), (128, 4, 4), (128, 1, 16), (192, 6, 4), (192, 3, 5), (256, 8, 4),
            (256, 1, 16),
        )
        for tokens in (1, 2)
    ],
    "plan_attention": [
        {"dim": dim, "heads": heads, "n_z": n_z} for dim, heads in _HEADS for n_z in (4, 16)
    ],
    "plan_ascent": [
        *({"dim": 128, "n_z": 4, **ascent} for ascent in _ASCENTS),
        *(
            {"dim": dim, "n_z": 4, "hidden": hidden, **ascent, "dtype": torch.bfloat16}
            for dim in (64, 96, 192, 256) for hidden in (0, 256) for ascent in _ASCENTS[:2]
        ),
    ],
    "window_attention": [
        *(
            {"dim": dim, "heads": heads, "window": window, "rotate": rotate, "dtype": torch.bfloat16}
            for dim, heads in _HEADS for window in (4, 64, 128, 1000)
            for rotate in ((True, False) if dim == 128 else (True,))
        ),
        *({"dim": dim, "heads": heads, "window": 64, "dtype": torch.float32} for dim, heads in _HEADS),
        # Fewer tiles in a row of a walk: 1, 2, 4 and 8.
        *(
            {"dim": 128, "heads": 4, "window": window, "n_tokens": n_tokens, "dtype": torch.bfloat16}
            for window in (32, 64) for n_tokens in (2**10, 2**16, 2**17, 2**18)
        ),
    ],
}  # fmt: skip


def compile_cases(op: str) -> list[Any]:
    """Parameters ``sizes``, ``dtype`` and ``architecture`` of a slow test that compiles what an op ships.

    Such tests take Triton's cache as it is, like the launcher and the table of resources: what one of them has compiled
    the others find there, by sources, options and versions.
    """
    return [
        pytest.param(
            {name: value for name, value in sizes.items() if name != "dtype"}, dtype, architecture,
            id="-".join(f"{name}{value}" for name, value in sizes.items() if name != "dtype") + of_target,
        )
        for sizes in SIZES[op]
        for dtype, architecture, of_target in (
            (torch.bfloat16, 80, "-bf16-sm_80"), (torch.bfloat16, 90, "-bf16-sm_90"),
            (torch.float32, 80, "-float32-sm_80"), (torch.float32, 90, "-float32-sm_90"),
        )
        if sizes.get("dtype", dtype) == dtype
    ]  # fmt: skip


class Resources(NamedTuple):
    """Of one compiled kernel: registers per thread; stack, local and shared memory in bytes."""

    registers: int
    stack: int
    local: int
    shared: int


def wgmma_hazards(ttgir: str, ptx: str) -> list[str]:
    """Code in which wgmma reads what it should not, found on an H200 with Triton 3.6.

    * A buffer of a pipelined loop that an asynchronous product reads and that is loaded to registers too: the pipeliner
      waits for the load alone, and the next copy may overwrite what the product still reads.
    * Descriptors of two swizzles (or strides) made from one base address: ptxas 12.8 then adds the upper half of the
      second to an unrelated register.
    """
    found, roots, loaded, products = [], {}, set(), set()
    for number, line in enumerate(ttgir.splitlines()):
        # Regions side by side use the same names.
        if match := re.match(r"\s*(%\w+)(?::\d+)? = ", line):
            roots.pop(match[1], None)
        if match := re.match(r"\s*(%\S+) = ttg\.local_alloc : \(\) -> ", line):
            roots[match[1]] = f"{match[1]} of line {number + 1}"
        elif match := re.match(r"\s*(%\S+) = ttg\.memdesc_\w+ (%\w+)", line):
            roots[match[1]] = roots.get(match[2], "")
        elif match := re.search(r" = ttg\.local_load (%\w+)", line):
            loaded.add(roots.get(match[1], ""))
        elif (match := re.search(r" = ttng\.warp_group_dot (%[\w#]+), (%[\w#]+),", line)) and "isAsync = true" in line:
            products |= {roots.get(match[1], ""), roots.get(match[2], "")}
    found += [f"{name.split()[0]} is read by wgmma and loaded" for name in sorted((loaded & products) - {""})]
    halves: dict[str, set[int]] = {}
    for base, offset in re.findall(r"(?:add\.s64|or\.b64)\s+%rd\d+, (%rd\d+), (-?\d{15,});", ptx):
        halves.setdefault(base, set()).add((int(offset) >> 32) & 0xFFFFFFFF)
    found += [
        f"{base} is the base of descriptors {', '.join(map(hex, sorted(of_base)))}"
        for base, of_base in halves.items() if len(of_base) > 1
    ]  # fmt: skip
    return found


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
    """No spills (unless ``spills``), no more shared memory than the architecture has, no :func:`wgmma_hazards`."""
    found = resources(launch, architecture, folder)
    what = f"{launch.name} [{launch.option}] on sm_{architecture}: {found}"
    assert found.shared <= SHARED_LIMIT[architecture], what
    asm = launch.compile(architecture).asm
    assert wgmma_hazards(asm["ttgir"], asm["ptx"]) == [], what
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
