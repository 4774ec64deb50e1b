"""What all kernels share: a launch as a value that is run, or compiled for a GPU that is not there; choices.

A launcher builds :class:`Launch` objects and runs one of them. Tests and the table of resources compile those same
objects, so what is proven without a GPU is what runs on one.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

__all__ = ["INTERPRETED", "Launch", "Option", "architecture_of", "choose", "specialised_to_16"]

# The interpreter keeps bfloat16 as raw integers and computes garbage without an error: kernels upcast at the load.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Option:
    """One way to run a kernel.

    Attributes:
        tiles: its constexpr tile sizes.
        num_warps, num_stages: as Triton takes them.
        registers: the most per thread, so that more programs fit on a processor; None leaves it to the compiler.
        cooperative: all programs run at the same time, or none does: they wait for one another.
    """

    tiles: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    registers: int | None = None
    cooperative: bool = False

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={size}" for name, size in self.tiles)
        limit = f" registers<={self.registers}" if self.registers else ""
        return f"{tiles} warps={self.num_warps} stages={self.num_stages}{limit}".strip()

    @property
    def compiler_options(self) -> dict[str, int | bool]:
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.cooperative:
            options["launch_cooperative_grid"] = True
        return options if self.registers is None else options | {"maxnreg": self.registers}


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is started with.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: programs, 1 to 3 sizes.
        arguments: by name, tensors, ints, floats and None.
        constants: constexpr arguments by name, the tiles of ``option`` left out.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    option: Option

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def constexprs(self) -> dict[str, Any]:
        none = {name: None for name, value in self.arguments.items() if value is None}
        return {**self.constants, **dict(self.option.tiles), **none}

    def run(self) -> None:
        """Start it on the device of its first tensor."""
        if 0 in self.grid:
            return
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](
                **self.arguments, **self.constants, **dict(self.option.tiles), **self.option.compiler_options
            )  # fmt: skip

    def compile(self, architecture: int) -> Any:
        """For sm_``architecture``, with no GPU needed; the tensors may be on the CPU or on the meta device."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        constexprs = self.constexprs
        signature, attributes = {}, {}
        # As the launcher of Triton specialises, so that this is the code that runs: integers of 1 are constants, and
        # vectors of loads need to know what 16 divides; numbers that the kernel leaves out are neither.
        for i, parameter in enumerate(self.kernel.params):
            name = parameter.name
            value = self.arguments.get(name)
            specialised = isinstance(value, Tensor) or not parameter.do_not_specialize
            if type(value) is int and value == 1 and specialised:
                constexprs[name] = 1
            signature[name] = "constexpr" if name in constexprs else _type_of(name, value)
            if name not in constexprs and specialised and specialised_to_16(value):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
        target = GPUTarget("cuda", architecture, 32)
        return triton.compile(source, target=target, options=self.option.compiler_options)


_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64",
    torch.int16: "*i16", torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip


def architecture_of(x: Tensor) -> int:
    """Whose options a tensor's device takes: 90 from compute capability 9.0 on and where there is no GPU, else 80."""
    return 80 if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0) else 90


def _type_of(name: str, value: Tensor | int | float | None) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"{name}: expected a tensor or a number, got {value!r}")


def specialised_to_16(value: Tensor | int | float | None) -> bool:
    """Whether Triton compiles a kernel of its own for this value being a multiple of 16."""
    if isinstance(value, Tensor):
        # Memory from an allocator of torch is aligned; a meta tensor stands for such memory.
        return value.device.type == "meta" or value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


# ---------------------------------------------------------------------------------------------------------------------
# Which of a few options: measured once per key on a device, the first where nothing can be measured

_chosen: dict[Hashable, int] = {}


def choose(
    key: Hashable, launches: Callable[[Option], Sequence[Launch]], options: Sequence[Option], device: torch.device
) -> Option:
    """The fastest option for a key, timed at its first use; the first option on the CPU and while a graph is captured.

    Clocks differ from run to run, and so may the choice: only options that give the same bits may be timed, those that
    cut every sum into the same parts. Where tiles cut sums, sizes alone decide, and the launcher offers one option.

    Args:
        key: all that the choice may depend on, sizes in a few classes rather than exact.
        launches: the launches of an option, which must be such that running them again changes nothing.
        options: those that fit, the usual best first; of as many warps each, which share the sums of a row.
        device: where the launches run, and are timed, whichever device is the current one.
    """
    if len({option.num_warps for option in options}) > 1:
        raise ValueError(f"options: expected the same number of warps, got {', '.join(map(str, options))}")
    if len(options) == 1 or device.type != "cuda" or INTERPRETED:
        return options[0]
    with torch.cuda.device(device):
        full = (torch.cuda.get_device_name(device), key)
        if full not in _chosen:
            if torch.cuda.is_current_stream_capturing():
                return options[0]
            times = [_milliseconds(launches(option)) for option in options]
            _chosen[full] = times.index(min(times))
    return options[_chosen[full]]


def _milliseconds(launches: Sequence[Launch]) -> float:
    """On the current device."""
    try:
        return float(triton.testing.do_bench(lambda: [one.run() for one in launches], warmup=5, rep=20))
    except OutOfResources:
        # Options are made for the shared memory of data-centre cards.
        return math.inf
