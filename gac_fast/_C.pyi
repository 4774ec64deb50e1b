from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]
_Heads = npt.NDArray[Any]  # float32, or int16 that holds bfloat16
# float32, or bfloat16 as int16
_Any = npt.NDArray[Any]

def _build_info() -> dict[str, str]: ...
def _isa() -> str: ...
def _isa_reason() -> str: ...
def _isa_problems() -> list[tuple[str, str]]: ...
def _use_isa(name: str) -> str: ...
def _has_variable(name: str) -> bool: ...
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
def _parallel_for(counts: _Ints, n_threads: int, work_us: int = 0, fail_at: int = -1, repeats: int = 1) -> int: ...
def _run_together(n_threads: int, n_turns: int) -> int: ...
def _together_runs() -> int: ...
def _window_attention(
    q: _Heads,
    k: _Heads,
    v: _Heads,
    cu_seqlens: npt.NDArray[Any],
    window: int,
    positions: npt.NDArray[Any] | None,
    rope_base: float,
    out: _Heads,
    softmax: _Floats,
    n_threads: int,
) -> None: ...
def _window_attention_backward(
    d_out: _Heads,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    cu_seqlens: npt.NDArray[Any],
    window: int,
    positions: npt.NDArray[Any] | None,
    rope_base: float,
    softmax: _Floats,
    d_q: _Heads,
    d_k: _Heads,
    d_v: _Heads,
    n_threads: int,
) -> None: ...
def _plan_attention(
    q: _Heads, k: _Heads, v: _Heads, cu_seqlens: npt.NDArray[Any], out: _Heads, n_threads: int
) -> None: ...
def _plan_attention_backward(
    d_out: _Heads,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    cu_seqlens: npt.NDArray[Any],
    d_q: _Heads,
    d_k: _Heads,
    d_v: _Heads,
    n_threads: int,
) -> None: ...
def _philox_normal(seed0: int, seed1: int, plans: _Ints, step: _Ints, out: _Floats, n_threads: int = 1) -> None: ...
def _philox_words(seed0: int, seed1: int, plans: _Ints, step: _Ints, out: _Ints, n_threads: int = 1) -> None: ...
def _plan_ascent(
    prior_weights: Sequence[_Floats],
    return_weights: Sequence[_Floats],
    z0: _Floats,
    context: _Floats | None,
    seeds: _Floats,
    mean: _Floats,
    std: _Floats,
    dim: int,
    n_steps: int,
    step_size: float,
    kappa: float,
    prior_weight: float,
    radius: float,
    max_norm: float,
    bf16: bool,
    n_threads: int = 1,
    tile: int = 0,
) -> None: ...
def _plan_langevin(
    prior_weights: Sequence[_Floats],
    return_weights: Sequence[_Floats],
    z0: _Floats,
    context: _Floats | None,
    seeds: _Floats,
    mean: _Floats,
    std: _Floats,
    dim: int,
    n_steps: int,
    step_size: float,
    target: _Floats,
    max_drift_ratio: float,
    seed0: int,
    seed1: int,
    plans: _Ints,
    first_step: int,
    bf16: bool,
    n_threads: int = 1,
    tile: int = 0,
) -> None: ...
def _packed_length(cu_seqlens: _Ints, indices: _Ints, n_steps: int) -> int: ...
def _pack_batch(
    observations: _Floats,
    actions: _Floats,
    cu_seqlens: _Ints,
    indices: _Ints,
    out_observations: _Floats,
    out_actions: _Floats,
    out_cu_seqlens: npt.NDArray[Any],
    out_positions: _Ints,
    out_sequence: _Ints,
) -> None: ...

class _BlockWeights:
    def __init__(
        self,
        weights: Sequence[_Floats | None],
        biases: Sequence[_Floats | None],
        norms: Sequence[_Floats],
        bf16: bool,
        backward: bool,
        n_threads: int,
    ) -> None: ...

def _block_fingerprint(arrays: Sequence[_Floats]) -> tuple[int, int]: ...
def _block(
    weights: _BlockWeights,
    x: _Floats,
    attended: _Any | None,
    plan_k: _Any,
    plan_v: _Any,
    cu_seqlens: _Ints,
    x_out: _Floats,
    y: _Any,
    normed1: _Any | None,
    normed2: _Any | None,
    rstd: _Floats | None,
    probs: _Floats | None,
    q: _Floats | None,
    hidden: _Floats | None,
    n_threads: int,
) -> None: ...
def _block_backward(
    weights: _BlockWeights,
    dx_out: _Floats | None,
    dy: _Any | None,
    x_out: _Floats,
    normed1: _Any,
    normed2: _Any,
    rstd: _Floats,
    probs: _Floats,
    q: _Floats | None,
    hidden: _Floats | None,
    plan_k: _Any,
    plan_v: _Any,
    cu_seqlens: _Ints,
    dx: _Floats | None,
    dattended: _Any | None,
    dplan_k: _Floats,
    dplan_v: _Floats,
    operands: Sequence[_Any],
    dbias: _Floats | None,
    n_threads: int,
) -> None: ...
def _norm_linear(
    weight: _Floats,
    bias: _Floats,
    has_norm: bool,
    bf16: bool,
    x: _Any,
    residual: _Floats | None,
    y: _Any,
    operand: _Any | None,
    rstd: _Floats | None,
    n_threads: int,
) -> None: ...
def _norm_linear_backward(
    weight: _Floats,
    has_norm: bool,
    bf16: bool,
    dy: _Any,
    operand: _Any | None,
    rstd: _Floats | None,
    dy_operand: _Any | None,
    dx_start: _Floats | None,
    dx: _Any | None,
    dbias: _Floats | None,
    n_threads: int,
) -> None: ...
def _keep_freed_memory() -> bool: ...
def _weight_gradients(maps: Sequence[tuple[_Any, _Any, _Floats, Sequence[_Floats]]], n_threads: int) -> None: ...
def _adamw(
    values: Sequence[_Floats],
    gradients: Sequence[_Floats],
    first: Sequence[_Floats],
    second: Sequence[_Floats],
    steps: Sequence[_Floats],
    decays: Sequence[float],
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float,
    n_threads: int,
) -> float: ...
def _draw_trajectories(seed0: int, seed1: int, number: int, weights: npt.NDArray[np.float64], out: _Ints) -> None: ...
def _drop_steps(seed0: int, seed1: int, number: int, threshold: int, out: npt.NDArray[np.bool_]) -> None: ...
def _same_entries(entries: list[tuple[dict[str, Any], str, Any]]) -> bool: ...
def _decode_again(
    owner: object,
    entries: list[tuple[dict[str, Any], str, Any]],
    weights: _DecodeWeights,
    state: _DecodeState,
    outputs: Callable[[bool], list[Any]],
    surroundings: dict[str, Any],
) -> Callable[[object, Any, int], Any]: ...

class _DecodeWeights:
    def __init__(
        self,
        tensors: list[Any],
        arrays: list[npt.NDArray[Any]],
        n_heads: int,
        rope_base: float,
        reads_actions: bool,
        bf16: bool,
    ) -> None: ...
    def stale(self) -> bool: ...

class _DecodeState:
    def __init__(
        self,
        ring_k: npt.NDArray[Any],
        ring_v: npt.NDArray[Any],
        plan_k: _Floats,
        plan_v: _Floats,
        steps: _Ints,
        last_action: _Floats,
        units: list[npt.NDArray[Any]],
    ) -> None: ...
    def step(self, weights: _DecodeWeights, observations: npt.NDArray[Any], out: _Floats, n_threads: int) -> int: ...

def _seed_plans(
    prior: Sequence[_Floats],
    layers: Sequence[Sequence[_Floats]],
    z0: _Floats,
    before: _Floats,
    z: _Floats,
    scale: _Floats,
    kv: _Floats,
    n_threads: int,
) -> None: ...
def _seed_gradient(
    prior: Sequence[_Floats],
    layers: Sequence[Sequence[_Floats]],
    returns: Sequence[_Floats],
    context: _Floats | None,
    y: _Floats,
    weight: _Floats,
    z0: _Floats,
    before: _Floats,
    z: _Floats,
    scale: _Floats,
    dkv: _Floats,
    dkv_scale: float,
    gradient: _Floats,
    n_threads: int,
) -> None: ...
def _seed_weights(
    prior: Sequence[_Floats],
    layers: Sequence[Sequence[_Floats]],
    z0: _Floats,
    before: _Floats,
    z: _Floats,
    scale: _Floats,
    dkv: _Floats,
    dz: _Floats | None,
    dprior: Sequence[_Floats],
    dlayers: Sequence[Sequence[_Floats]],
    n_threads: int,
) -> None: ...
def _seed_move(
    z0: _Floats,
    gradient: _Floats,
    step_size: float,
    max_drift_ratio: float,
    seed0: int,
    seed1: int,
    ids: _Ints,
    steps: _Ints,
    size: _Floats,
    ratio: _Floats,
    n_threads: int,
) -> None: ...
def _action_errors(
    y: _Any,
    actions: _Floats,
    counts: npt.NDArray[np.bool_] | None,
    scale: _Floats,
    dy: _Any | None,
    squares: npt.NDArray[np.float64] | None,
    n_threads: int,
) -> None: ...
def _return_losses(
    weights: Sequence[_Floats],
    z: _Floats,
    context: _Floats | None,
    y: _Floats,
    seen: _Floats,
    fitted: _Floats,
    masks: Sequence[_Floats],
    losses: npt.NDArray[np.float64],
    factor_mean: float,
    factor_variance: float,
    dz: _Floats | None,
    dweights: Sequence[_Floats],
    n_threads: int,
) -> None: ...
