"""One step of every environment through the whole decoder, on ring-cached keys and values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _dispatch, _threads
from gac_fast.reference import StepWeights

__all__ = ["DecodeState", "Units", "WeightsOf", "decode_step", "has_fast_bf16", "prepare_again"]

OP = "decode_step"


def _sizes_refusal(dim: int, n_heads: int, n_z: int) -> str | None:
    from gac_fast.kernels import decode_step as kernel

    return kernel.refusal(dim, n_heads, n_z)


_dispatch.register(
    OP, "triton", "cpp", triton_refuses=lambda sizes: _sizes_refusal(sizes.dim, sizes.n_heads, sizes.n_z)
)

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

Array = TypeVar("Array", np.ndarray, Tensor)


class Units(NamedTuple):
    """Affine maps between the environment's units and the model's."""

    obs_mean: Tensor  # [obs_dim]
    obs_std: Tensor  # [obs_dim]
    action_mid: Tensor  # [act_dim]
    action_half: Tensor  # [act_dim]


class DecodeState:
    """What P environments carry from step to step.

    Attributes:
        ring_k, ring_v: [L, P, W, H, d] keys and values of the last W tokens; token i of an episode in slot i % W.
        plan_k, plan_v: [L, P, n_z, H, d] keys and values of the plans.
        steps: int64 [P], steps fed so far.
        last_action: [P, act_dim] normalised.
        again: see :func:`prepare_again`.

    The tensors may be written to; they are never replaced.

    Args:
        n_layers, n_rows, window, n_heads, width, n_z, act_dim: L, P, W (in tokens), H, d, n_z, act_dim.
        dtype, device: of the model.
        bf16: keep the rings in bfloat16 and let the engines round the layers' weights and the operands of their
            products to it (sums, norms, softmax and the residual stream stay in float32). The reference computes in
            ``dtype`` on what the rings hold. Float64 models keep float64.
        cuda_graph: with the Triton engine on a GPU, replay a step as a CUDA graph: less time of the host per step, one
            copy more of observations and actions.
    """

    def __init__(
        self, *, n_layers: int, n_rows: int, window: int, n_heads: int, width: int, n_z: int, act_dim: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", bf16: bool = False,
        cuda_graph: bool = False,
    ) -> None:  # fmt: skip
        ring_dtype = torch.bfloat16 if bf16 and dtype == torch.float32 else dtype
        ring, plan = (n_layers, n_rows, window, n_heads, width), (n_layers, n_rows, n_z, n_heads, width)
        self.ring_k = torch.zeros(ring, dtype=ring_dtype, device=device)
        self.ring_v = torch.zeros_like(self.ring_k)
        self.plan_k = torch.zeros(plan, dtype=dtype, device=device)
        self.plan_v = torch.zeros_like(self.plan_k)
        self.steps = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self.last_action = torch.zeros(n_rows, act_dim, dtype=dtype, device=device)
        # Slots that no token of the present episode has filled may hold anything, NaN included.
        self._stale = False
        self.cuda_graph = cuda_graph
        self.again: Callable[[object, Any, int], Any] | None = None
        # The same while it is not sure that the weights are still those.
        self._kept_again: Callable[[object, Any, int], Any] | None = None
        self._forget()

    @property
    def bf16(self) -> bool:
        """Whether the rings are in bfloat16."""
        return self.ring_k.dtype == torch.bfloat16

    def reset(self, rows: Tensor | None = None) -> None:
        """Start new episodes in ``rows``, bool [P], default all; plans stay."""
        if rows is None:
            self.last_action.zero_()
            self.steps.zero_()
            self._all_new = True
        else:
            self.last_action.masked_fill_(rows[:, None], 0)
            self.steps.masked_fill_(rows, 0)
        self._stale = True
        self._unsure = True
        self._kept_again, self.again = self.again or self._kept_again, None

    def _forget(self) -> None:
        self._packed: Any = None
        self._tensors: list[Tensor] | None = None
        self._weights: StepWeights | None = None
        self._memory: Any = None
        self._units: Units | None = None
        # Of the observations, once the C++ engine has the memory of this state.
        self._shape: tuple[int, int] | None = None
        self._content: Any = None
        self.again = self._kept_again = None
        # Whether all of the weights are to be compared before the next step.
        self._unsure = False
        # Whether all rows start anew with the next step.
        self._all_new = False
        self._triton: _TritonStep | None = None

    def take_packed(self, other: DecodeState) -> None:
        """Begin with the C++ engine's copy of the weights that another state holds; it is only ever read.

        Whether it is still that of the weights is found out at the first step.
        """
        self._packed, self._tensors, self._content = other._packed, other._tensors, other._content

    def __getstate__(self) -> dict[str, Any]:
        return {name: None if name in _ENGINE_PARTS else value for name, value in self.__dict__.items()}

    def clear_stale(self, tokens_per_step: int) -> None:
        """Zero the slots that no token of the present episode has filled: weight 0 times NaN is NaN."""
        if self._stale:
            n_seen = (tokens_per_step * self.steps - (tokens_per_step - 1)).clamp_min(0)
            slot = torch.arange(self.ring_k.shape[2], device=self.ring_k.device)
            # Masked, as rows picked by a mask would make the host wait.
            unseen = (slot >= n_seen[:, None])[:, :, None, None]
            for ring in (self.ring_k, self.ring_v):
                ring.masked_fill_(unseen, 0)
            self._stale = False


_ENGINE_PARTS = frozenset(
    ("_packed", "_tensors", "_weights", "_memory", "_units", "_shape", "_content", "again", "_kept_again", "_triton")
)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether an engine runs there on matrix units for bfloat16."""
    if device.type == "cuda":
        return _dispatch.problem(OP, "triton", device) is None
    return _dispatch.problem(OP, "cpp", device) is None and _dispatch.cpp_engine()._isa() == "amx"


class WeightsOf:
    """``decoder.step_weights()`` again and again, read anew only when a parameter or module of it was replaced.

    Args:
        decoder: a module with ``step_weights``.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self._entries: list[tuple[dict[str, Any], str, Any]] | None = None

    @torch.no_grad()
    def __call__(self) -> StepWeights:
        if self._entries is None or not _same_entries(self._entries):
            self._weights = self.decoder.step_weights()
            self._entries = None
            parameters = {id(p) for p in self.decoder.parameters()}
            # What is computed from parameters (by a parametrisation) is computed anew each time.
            if all(id(x) in parameters for x in _flat(self._weights)):
                self._entries = [
                    (table, name, value)
                    for module in self.decoder.modules()
                    for table in (module._parameters, module._modules)
                    for name, value in table.items()
                ]
        return self._weights

    def __getstate__(self) -> dict[str, Any]:
        return {"decoder": self.decoder, "_entries": None}


def _same_entries(entries: list[tuple[dict[str, Any], str, Any]]) -> bool:
    engine, _ = _dispatch._load_cpp_engine()
    if engine is not None:
        return bool(engine._same_entries(entries))
    return all(table.get(name) is value for table, name, value in entries)


def decode_step(weights: StepWeights, state: DecodeState, observations: Array, units: Units | None = None) -> Array:
    """Feed a_{t-1} (with C = 2, from the second step on) and s_t of every environment, and read the mean action.

    The per-step path of the actor: no registered op of torch, no gradients. Rows may be at different steps. Afterwards
    ``state.steps`` is one more and ``state.last_action`` the normalised mean action; with action noise, overwrite it.

    The C++ engine packs the weights once, and again when they changed. At every step it compares version counters,
    addresses and the first 64 bytes of each tensor, which a training step changes one and all; at the first step after
    ``state.reset`` all bytes. Only a write to a part of a tensor through ``.data``, or by a fused optimiser, none of
    which count as versions, may thus go unseen until then.

    The Triton engine packs the weights once as well. To know without waiting for the device, it compares identities,
    version counters and addresses alone, and packs again at the first step after ``state.reset()`` of all rows.

    Args:
        weights: of the decoder; float32 or float64, on the device of ``state``.
        state: **mutated**.
        observations: [P, obs_dim], NumPy or tensor, of any strides; in units of the environment, or normalised where
            ``units`` is None.
        units: what to normalise by.

    Returns:
        [P, act_dim] of the kind that came in, in units of the environment, or in [-1, 1] where ``units`` is None.

    Raises:
        BackendError: a forced backend cannot run.
        ValueError: wrong shape.
        FloatingPointError: an observation is NaN or infinite (checked in NumPy arrays and on the CPU); nothing was fed.
    """
    # Most steps are like the one before. Beside the engine's weights and rings nothing of Python stays in the near
    # caches, and each question costs more than it seems.
    if (
        weights is state._weights
        and units is state._units
        and getattr(observations, "shape", None) == state._shape
        and not (state._unsure or state._packed.stale())
        and _dispatch.again(OP, "cpp")
    ):
        return _step_cpp(state, observations)

    device = state.steps.device
    refused = _dispatch.refusal(weights.embed_state_w)
    if refused is None and (device.type != "cpu" or _INTERPRETED):
        refused = _triton_refusal(state)
    backend = _dispatch.choose(OP, device, refused)
    shape = (state.steps.shape[0], weights.embed_state_w.shape[1])
    if getattr(observations, "shape", None) != shape:
        got = list(observations.shape) if hasattr(observations, "shape") else type(observations).__name__
        raise ValueError(f"obs: expected shape {list(shape)}, got {got}")
    if backend == "cpp":
        if weights is not state._weights or state._unsure or state._packed.stale():
            _pack(weights, state)
        if state._memory is None or units is not state._units:
            _bind(state, units, shape[1])
        return _step_cpp(state, observations)
    if backend == "triton":
        return _decode_step_triton(weights, state, observations, units)
    return _decode_step_reference(weights, state, observations, units)


@torch.no_grad()
def _decode_step_reference(weights: StepWeights, state: DecodeState, observations: Array, units: Units | None) -> Array:
    ring = state.ring_k
    x = torch.as_tensor(observations, device=ring.device).to(state.last_action.dtype)
    # A tensor on a device goes unchecked: reading the answer back would cost a wait at every step.
    if isinstance(observations, np.ndarray) or x.device.type == "cpu":
        _check_finite(x)
    state.clear_stale(1 if weights.embed_action_w is None else 2)
    if units is not None:
        x = (x - units.obs_mean) / units.obs_std
    out = reference.decode_step(
        weights, x, ring, state.ring_v, state.plan_k, state.plan_v, state.steps, state.last_action
    )
    if units is not None:
        out = out * units.action_half + units.action_mid
    return out.cpu().numpy() if isinstance(observations, np.ndarray) else out


def _check_finite(x: Tensor) -> None:
    finite = torch.isfinite(x).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        _raise_not_finite(row, x[row].tolist())


def _raise_not_finite(row: int, values: list[float]) -> None:
    raise FloatingPointError(f"obs: expected finite values, environment {row} has {values}")


def _step_cpp(state: DecodeState, observations: Array) -> Array:
    if isinstance(observations, np.ndarray):
        return _decode_step_cpp(state, observations)
    x = observations
    if x.requires_grad:
        x = x.detach()
    if x.dtype != torch.float32 or not x.is_cpu:
        x = x.cpu() if x.dtype == torch.float64 else x.to("cpu", torch.float32)
    return torch.from_numpy(_decode_step_cpp(state, x.numpy()))


def _decode_step_cpp(state: DecodeState, x: np.ndarray) -> np.ndarray:
    if x.dtype not in _NATIVE:
        x = x.astype(np.float32)
    out = np.empty(state.last_action.shape, np.float32)
    row = state._memory.step(state._packed, x, out, _threads.count())
    if row >= 0:
        with np.errstate(over="ignore"):
            _raise_not_finite(row, x[row].astype(np.float32).tolist())
    return out


_NATIVE = (np.dtype(np.float32), np.dtype(np.float64))


def _flat(weights: StepWeights) -> list[Tensor]:
    decoder = weights.decoder
    tensors = [x for x in weights[:4] if isinstance(x, Tensor)]
    tensors += [x for layer in decoder.layers for x in layer]
    return [*tensors, decoder.norm_w, decoder.norm_b, decoder.w_head, decoder.b_head]


def _pack(weights: StepWeights, state: DecodeState) -> None:
    engine = _dispatch.cpp_engine()
    tensors, old = _flat(weights), state._tensors or []
    same = len(tensors) == len(old) and all(a is b for a, b in zip(tensors, old, strict=True))
    fresh = not same or state._packed is None or state._packed.stale()
    arrays = [x.detach().contiguous().numpy() for x in tensors]
    content = engine._block_fingerprint(arrays)
    if fresh or content != state._content:
        decoder = weights.decoder
        state._packed = engine._DecodeWeights(
            tensors, arrays, decoder.n_heads, decoder.rope_base, weights.embed_action_w is not None, state.bf16
        )
        state._tensors, state._content = tensors, content
        state.again = state._kept_again = None
    if weights is not state._weights:
        state.again = state._kept_again = None
    state._weights, state._unsure = weights, False
    state.again, state._kept_again = state._kept_again, None


def _bind(state: DecodeState, units: Units | None, n_inputs: int) -> None:
    bits = [ring.view(torch.int16) if state.bf16 else ring for ring in (state.ring_k, state.ring_v)]
    tensors = (*bits, state.plan_k, state.plan_v, state.steps, state.last_action)
    arrays = [] if units is None else [x.contiguous().numpy() for x in units]
    state._memory = _dispatch.cpp_engine()._DecodeState(*(x.numpy() for x in tensors), arrays)
    state._units = units
    state._shape = (state.steps.shape[0], n_inputs)
    state.again = state._kept_again = None


# Results that are allocated ahead, and the bytes that they may take.
_OUTPUTS, _OUTPUT_BYTES = 32, 65536


def prepare_again(owner: Any, weights_of: WeightsOf, state: DecodeState) -> None:
    """After a step of the C++ engine, leave in ``state.again`` a function that does the next one in one call.

    ``state.again(owner, observations, n_threads)`` is ``decode_step(weights_of(), state, observations, units)`` with
    the units of the last step; it looks at the same things. Where anything is not as it was, where the engine would
    have to pack or bind, or would raise an error, it answers None and has done nothing. ``n_threads`` is 0 for those
    of the calling thread. After another engine's step, or with weights that are computed, nothing is prepared.

    Args:
        owner: a module whose ``decoder`` the weights belong to.
    """
    if state.again is not None or state._memory is None or state._unsure or weights_of._entries is None:
        return
    if weights_of._weights is not state._weights:
        return
    shape = tuple(state.last_action.shape)
    n_outputs = max(1, min(_OUTPUTS, _OUTPUT_BYTES // max(1, 4 * state.last_action.numel())))

    def outputs(tensors: bool) -> list[Any]:
        if not tensors:
            return [np.empty(shape, np.float32) for _ in range(n_outputs)]
        # Whatever the mode of the caller, they may be written to in every mode.
        with torch.inference_mode(False):
            return [torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(n_outputs)]

    surroundings = {
        "forced": _dispatch._forced,
        "environment": os.environ._data,  # type: ignore[attr-defined]
        "variable": os.environ.encodekey(_dispatch.ENVIRONMENT_VARIABLE),
        "counts": _dispatch._counts,
        "count": (OP, "cpp"),
        "local": _threads._local,
        "n_threads": torch.get_num_threads,
        "tensor": Tensor,
        "array": np.ndarray,
    }
    entries = [(owner._modules, "decoder", weights_of.decoder), *weights_of._entries]
    engine = _dispatch.cpp_engine()
    state.again = engine._decode_again(owner, entries, state._packed, state._memory, outputs, surroundings)


# ---------------------------------------------------------------------------------------------------------------------
# Triton


def _triton_refusal(state: DecodeState) -> str | None:
    """Why the Triton engine does not take a state that it would get; None where it does, or would not get it."""
    device = state.steps.device
    if not _dispatch.is_for_triton(OP, device):
        return None
    if state.bf16 and device.type == "cpu":
        return "the interpreter of Triton computes bfloat16 wrongly"
    _, _, n_z, heads, width = state.plan_k.shape
    return _sizes_refusal(heads * width, heads, n_z)


class _TritonStep:
    """What the Triton engine keeps for a state: packed weights, memory of its programs, places that a graph knows."""

    def __init__(self, weights: StepWeights, state: DecodeState, units: Units | None) -> None:
        from gac_fast.kernels import decode_step as kernel
        from gac_fast.kernels._launch import architecture_of

        self.kernel = kernel
        self.tensors, self.weights, self.units = _flat(weights), weights, units
        self.marks = [_mark(x) for x in self.tensors]
        decoder, tokens = weights.decoder, 1 if weights.embed_action_w is None else 2
        self.packed = kernel.Packed(self.tensors, decoder.n_heads, decoder.rope_base, tokens, state.ring_k.dtype)
        self.layout = _layout(weights)
        self.arrays = None if units is None else [x.to(torch.float32).contiguous() for x in units]
        ring = state.ring_k
        self.option = kernel.option_for(ring.shape[1], self.packed.dim, tokens, ring.dtype, architecture_of(ring))
        self.scratch = kernel.new_scratch(self.packed, state.ring_k.shape[1], self.option)
        self.on_host: np.ndarray | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: tuple[Tensor, Tensor] | None = None

    def takes(self, weights: StepWeights, units: Units | None) -> bool:
        """Whether these weights and units are its own, packed anew into the same memory where their values changed."""
        if units is not self.units:
            return False
        if weights is not self.weights:
            if _layout(weights) != self.layout:
                return False
            self.tensors, self.weights = _flat(weights), weights
        marks = [_mark(x) for x in self.tensors]
        if marks != self.marks:
            self.packed.fill(self.tensors)
            self.marks = marks
        return True

    def launch(self, state: DecodeState, x: Tensor, out: Tensor) -> None:
        self.kernel.launch(
            self.packed, (state.ring_k, state.ring_v), (state.plan_k, state.plan_v), state.steps, state.last_action,
            x, self.arrays, out, self.scratch, self.option,
        ).run()  # fmt: skip

    def replay(self, state: DecodeState, x: Tensor) -> Tensor:
        if self.static is None:
            self.static = (
                torch.empty(x.shape, dtype=torch.float32, device=x.device),
                torch.empty_like(state.last_action),
            )
        obs, out = self.static
        obs.copy_(x)
        if self.graph is not None:
            self.graph.replay()
        else:
            # The first step compiles the kernel, and what it launches is what the graph then holds.
            self.launch(state, obs, out)
            graph = torch.cuda.CUDAGraph()
            # On a stream of the state's own device: torch's is of whichever device captured first.
            stream = torch.cuda.Stream(x.device)
            with (
                torch.cuda.device(x.device),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self.launch(state, obs, out)
            self.graph = graph
        return out.clone()


def _layout(weights: StepWeights) -> tuple[Any, ...]:
    """What two sets of weights must share to be packed into the same memory."""
    return weights.decoder.n_heads, weights.decoder.rope_base, [x.shape for x in _flat(weights)]


def _mark(x: Tensor) -> tuple[int, int, int]:
    """Tells values of a tensor from later ones without reading them."""
    return id(x), x.data_ptr(), 0 if x.is_inference() else x._version


@torch.no_grad()
def _decode_step_triton(weights: StepWeights, state: DecodeState, observations: Array, units: Units | None) -> Array:
    step = state._triton
    if step is None or not step.takes(weights, units):
        step = state._triton = _TritonStep(weights, state, units)
    elif state._all_new:
        step.packed.fill(step.tensors)
    state._all_new = False
    device = state.steps.device
    if isinstance(observations, np.ndarray):
        if step.on_host is None:
            step.on_host = torch.empty(
                observations.shape, dtype=torch.float32, pin_memory=device.type == "cuda"
            ).numpy()
        # The former step's copy from here is over: its actions were waited for.
        with np.errstate(over="ignore"):
            np.copyto(step.on_host, observations, casting="unsafe")
        x = torch.from_numpy(step.on_host)
        _check_finite(x)
        x = x.to(device, non_blocking=True)
    else:
        x = observations.detach().to(device, torch.float32)
        if device.type == "cpu":
            _check_finite(x)
    if state.cuda_graph and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        out = step.replay(state, x)
    else:
        out = torch.empty_like(state.last_action)
        step.launch(state, x, out)
    return out.cpu().numpy() if isinstance(observations, np.ndarray) else out
