"""One step of every environment through the whole decoder, on ring-cached keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _dispatch, _threads
from gac_fast.reference import StepWeights

__all__ = ["DecodeState", "Units", "WeightsOf", "decode_step", "has_fast_bf16"]

OP = "decode_step"
_dispatch.register(OP, "cpp")

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

    The tensors may be written to; they are never replaced.

    Args:
        n_layers, n_rows, window, n_heads, width, n_z, act_dim: L, P, W (in tokens), H, d, n_z, act_dim.
        dtype, device: of the model.
        bf16: keep the rings in bfloat16 and let the C++ engine round the layers' weights and the operands of their
            products to it (sums, norms, softmax and the residual stream stay in float32). The reference computes in
            ``dtype`` on what the rings hold. Float64 models keep float64.
    """

    def __init__(
        self, *, n_layers: int, n_rows: int, window: int, n_heads: int, width: int, n_z: int, act_dim: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", bf16: bool = False,
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
        self._forget()

    @property
    def bf16(self) -> bool:
        """Whether the rings are in bfloat16."""
        return self.ring_k.dtype == torch.bfloat16

    def reset(self, rows: Tensor) -> None:
        """Start new episodes in ``rows``, bool [P]; plans stay."""
        self.last_action.masked_fill_(rows[:, None], 0)
        self.steps.masked_fill_(rows, 0)
        self._stale = True
        self._unsure = True

    def _forget(self) -> None:
        self._packed: Any = None
        self._tensors: list[Tensor] | None = None
        self._weights: StepWeights | None = None
        self._memory: Any = None
        self._units: Units | None = None
        self._content: Any = None
        # Whether all of the weights are to be compared before the next step.
        self._unsure = False

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


_ENGINE_PARTS = frozenset(("_packed", "_tensors", "_weights", "_memory", "_units", "_content"))


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the C++ engine runs there on matrix units for bfloat16."""
    return _dispatch.problem(OP, "cpp", device) is None and _dispatch.cpp_engine()._isa() == "amx"


class WeightsOf:
    """``decoder.step_weights()`` again and again, read anew only when a parameter or module of it was replaced.

    Args:
        decoder: a module with ``step_weights``.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self._entries: list[tuple[dict[str, Any], str, Any]] | None = None

    def __call__(self) -> StepWeights:
        if self._entries is None or not _dispatch.cpp_engine()._same_entries(self._entries):
            self._weights = self.decoder.step_weights()
            self._entries = None
            parameters = {id(p) for p in self.decoder.parameters()}
            # What is computed from parameters (by a parametrisation) is computed anew each time.
            if _dispatch.problem(OP, "cpp", torch.device("cpu")) is None and all(
                id(x) in parameters for x in _flat(self._weights)
            ):
                self._entries = [
                    (table, name, value)
                    for module in self.decoder.modules()
                    for table in (module._parameters, module._modules)
                    for name, value in table.items()
                ]
        return self._weights

    def __getstate__(self) -> dict[str, Any]:
        return {"decoder": self.decoder, "_entries": None}


def decode_step(weights: StepWeights, state: DecodeState, observations: Array, units: Units | None = None) -> Array:
    """Feed a_{t-1} (with C = 2, from the second step on) and s_t of every environment, and read the mean action.

    The per-step path of the actor: no registered op of torch, no gradients. Rows may be at different steps. Afterwards
    ``state.steps`` is one more and ``state.last_action`` the normalised mean action; with action noise, overwrite it.

    The C++ engine packs the weights once, and again when they changed. At every step it compares version counters,
    addresses and the first 64 bytes of each tensor, which a training step changes one and all; at the first step after
    ``state.reset`` all bytes. Only a write to a part of a tensor through ``.data``, or by a fused optimiser, none of
    which count as versions, may thus go unseen until then.

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
    backend = _dispatch.choose(OP, state.steps.device, _dispatch.refusal(weights.embed_state_w))
    shape = (state.steps.shape[0], weights.embed_state_w.shape[1])
    if getattr(observations, "shape", None) != shape:
        got = list(observations.shape) if hasattr(observations, "shape") else type(observations).__name__
        raise ValueError(f"obs: expected shape {list(shape)}, got {got}")
    if backend == "cpp":
        if isinstance(observations, np.ndarray):
            return _decode_step_cpp(weights, state, observations, units)
        x = observations.detach().cpu()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.to(torch.float32)
        return torch.from_numpy(_decode_step_cpp(weights, state, x.numpy(), units))
    return _decode_step_reference(weights, state, observations, units)


@torch.no_grad()
def _decode_step_reference(weights: StepWeights, state: DecodeState, observations: Array, units: Units | None) -> Array:
    ring = state.ring_k
    x = torch.as_tensor(observations, device=ring.device).to(state.last_action.dtype)
    # A tensor on a device goes unchecked: reading the answer back would cost a wait at every step.
    if isinstance(observations, np.ndarray) or x.device.type == "cpu":
        finite = torch.isfinite(x).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            _raise_not_finite(row, x[row].tolist())
    state.clear_stale(1 if weights.embed_action_w is None else 2)
    if units is not None:
        x = (x - units.obs_mean) / units.obs_std
    out = reference.decode_step(
        weights, x, ring, state.ring_v, state.plan_k, state.plan_v, state.steps, state.last_action
    )
    if units is not None:
        out = out * units.action_half + units.action_mid
    return out.cpu().numpy() if isinstance(observations, np.ndarray) else out


def _raise_not_finite(row: int, values: list[float]) -> None:
    raise FloatingPointError(f"obs: expected finite values, environment {row} has {values}")


def _decode_step_cpp(weights: StepWeights, state: DecodeState, x: np.ndarray, units: Units | None) -> np.ndarray:
    if weights is not state._weights or state._unsure or state._packed.stale():
        _pack(weights, state)
    if state._memory is None or units is not state._units:
        _bind(state, units)
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
    state._weights, state._unsure = weights, False


def _bind(state: DecodeState, units: Units | None) -> None:
    bits = [ring.view(torch.int16) if state.bf16 else ring for ring in (state.ring_k, state.ring_v)]
    tensors = (*bits, state.plan_k, state.plan_v, state.steps, state.last_action)
    arrays = [] if units is None else [x.contiguous().numpy() for x in units]
    state._memory = _dispatch.cpp_engine()._DecodeState(*(x.numpy() for x in tensors), arrays)
    state._units = units
