from typing import Any

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]

def _build_info() -> dict[str, str]: ...
def _isa() -> str: ...
def _isa_reason() -> str: ...
def _isa_problems() -> list[tuple[str, str]]: ...
def _use_isa(name: str) -> str: ...
def _gemm(
    x: _Floats,
    w: _Floats,
    bias: _Floats | None,
    y: _Floats,
    transposed: bool = False,
    add: bool = False,
    bf16: bool = False,
    repeats: int = 1,
) -> None: ...
def _philox_normal(seed0: int, seed1: int, plans: _Ints, step: _Ints, out: _Floats) -> None: ...
def _philox_words(seed0: int, seed1: int, plans: _Ints, step: _Ints, out: _Ints) -> None: ...
def _packed_length(cu_seqlens: _Ints, indices: _Ints, n_steps: int) -> int: ...
def _pack_batch(
    observations: _Floats,
    actions: _Floats,
    cu_seqlens: _Ints,
    indices: _Ints,
    out_observations: _Floats,
    out_actions: _Floats,
    out_cu_seqlens: npt.NDArray[Any],
) -> None: ...
