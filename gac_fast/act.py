"""Acting: one plan per environment for the whole episode, a ring of keys and values per layer."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gac_fast import ops
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization
from gac_fast.ops import _threads

__all__ = ["Actor"]

Array = TypeVar("Array", np.ndarray, Tensor)

# Rows are moved together once no more than this share of them is wanted: moving a row costs as much as two steps of it.
COMPACT = 0.8


class HasSeeds(Protocol):
    """Such as :class:`gac_fast.plan.Plans`."""

    @property
    def z0(self) -> Tensor: ...


class Actor:
    """Stateful batched decoding for P environments.

    Each call of :meth:`act` feeds s_t (and a_{t-1} where the decoder reads actions) to a decoder that keeps the last K
    steps per layer. This equals the full banded pass over the episode so far, at a cost that does not grow with it.

    Args:
        model: the joint model; every step acts on its weights as they then are. (The engines keep packed copies and
            pack again what has changed; :func:`gac_fast.ops.decode_step` says what it sees at once, and what at the
            next reset.)
        normalization: units of observations and actions.
        z0: [P, n_z, D], one plan seed per environment, P >= 1; NumPy or tensor, of any float type and device. It goes
            to the device and type of ``normalization``.
        action_noise: standard deviation of Gaussian noise on the action, in units of half the action space; one for
            all environments, or [P].
        noise_correlation: steps after which the noise has forgotten 1 - 1/e of itself: 0 draws it anew at every step,
            many steps push an episode consistently one way.
        seed: of that noise.
        bf16: let the engines run the decoder's layers in bfloat16: several times faster where the processor has
            matrix units for it, actions to about 1%. ``"auto"`` does so where it has them and the decoder was trained
            so (``model.bf16``), which is then how its actions were fitted; a decoder trained in float32 acts in
            float32.
        cuda_graph: with the Triton engine on a GPU, replay each step as a CUDA graph, which takes less of the host.
        strength: how far plans are taken from that of the seed 0, as a multiple of where they lie: beyond 1 they change
            more than any trajectory that was learnt from.

    Attributes:
        z0: [P, n_z, D], the seeds it acts by.

    Raises:
        ValueError: ``z0`` has another shape, is not of a float type, or is not finite (checked if it comes on the CPU);
            ``action_noise`` or ``noise_correlation`` is negative, not finite, or of another shape.
    """

    def __init__(
        self,
        model: GAC,
        normalization: Normalization,
        z0: np.ndarray | Tensor,
        action_noise: float | np.ndarray | Tensor = 0.0,
        seed: int = 0,
        bf16: bool | Literal["auto"] = "auto",
        cuda_graph: bool = False,
        noise_correlation: float = 0.0,
        strength: float = 1.0,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength: expected a number of at least 0, got {strength}")
        self.strength = strength
        if bf16 not in (True, False, "auto"):
            raise ValueError(f"bf16: expected True, False or 'auto', got {bf16!r}")
        self.model = model
        self.normalization = normalization
        self.z0 = z0 = self._seeds("z0", z0, None)
        self.action_noise = action_noise
        if not 0 <= noise_correlation < math.inf:
            raise ValueError(f"noise_correlation: expected a number of at least 0, got {noise_correlation}")
        self.noise_correlation = noise_correlation
        self._generator = torch.Generator(device=z0.device).manual_seed(seed)
        # Noise is drawn for so many rows, of which the actor's begin at the second number: see split.
        self._noise_rows = (len(z0), 0)
        # Those of the calling thread, but for the parts of a split actor.
        self._n_threads, self._inference = 0, False
        self._is_plain = type(self)._act is Actor._act
        self._turn: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if bf16 == "auto":
            bf16 = model.bf16 and ops.has_fast_bf16(z0.device)
        self._state = self._new_state(len(z0), z0.dtype, z0.device, bf16, cuda_graph)
        self._weights = ops.WeightsOf(model.decoder)
        self._units = _units(normalization)
        self._set_plans(torch.ones(len(z0), dtype=torch.bool, device=z0.device), z0)
        # While rows rest: the rows of the others, and their part of the state.
        self._awake: Tensor | None = None
        self._awake_state = self._state
        # Noise of the step before, of unit variance; NaN where an episode begins.
        self._noise = torch.full((len(z0), model.act_dim), math.nan, dtype=z0.dtype, device=z0.device)

    @property
    def action_noise(self) -> float | np.ndarray | Tensor:
        """Standard deviation of the noise; it may be set at any time."""
        return self._action_noise

    @action_noise.setter
    def action_noise(self, value: float | np.ndarray | Tensor) -> None:
        levels = torch.as_tensor(value, dtype=self.z0.dtype, device=self.z0.device)
        if levels.shape not in ((), (len(self.z0),)):
            raise ValueError(f"action_noise: expected a number or shape [{len(self.z0)}], got {list(levels.shape)}")
        if not bool(((levels >= 0) & levels.isfinite()).all()):
            raise ValueError(f"action_noise: expected finite values of at least 0, got {value}")
        self._action_noise = value
        # [P, 1], or None where nothing is to be added.
        self._noise_levels = levels.expand(len(self.z0))[:, None] if bool(levels.any()) else None

    def __len__(self) -> int:
        """Number of environments P."""
        return len(self._state.steps)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.z0.device

    @property
    def bf16(self) -> bool:
        """Whether keys and values, and on the engines the decoder's products, are in bfloat16."""
        return self._state.bf16

    def __repr__(self) -> str:
        window = self.model.config.window
        return f"Actor({len(self)} environments, window={window} steps, action_noise={self.action_noise})"

    def _seeds(self, name: str, z0: np.ndarray | Tensor, rows: Tensor | None) -> Tensor:
        """Checked seeds on the actor's device; those outside ``rows`` (bool [P], None for all) may be anything."""
        config, like = self.model.config, self.normalization.obs_mean
        # A copy: torch takes over a read-only array only with a warning.
        z0 = torch.from_numpy(z0.copy()) if isinstance(z0, np.ndarray) else torch.as_tensor(z0)
        if not z0.is_floating_point():
            raise ValueError(f"{name}: expected floating-point seeds, got {z0.dtype}")
        p = "P" if rows is None else len(rows)
        expected = f"{name}: expected seeds of shape [{p}, {config.n_z}, {config.dim}]"
        if z0.ndim != 3 or z0.shape[1:] != (config.n_z, config.dim) or (rows is not None and len(z0) != len(rows)):
            raise ValueError(f"{expected}, got {list(z0.shape)}")
        if len(z0) == 0:
            raise ValueError(f"{expected} with P >= 1, got {list(z0.shape)}")
        if z0.device.type == "cpu":
            finite = torch.isfinite(z0).flatten(1).all(dim=1)
            if rows is not None:
                finite |= ~rows.cpu()
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                raise ValueError(f"{name}: expected finite seeds, plan {row} has NaN or infinity")
        return z0.to(like.device, like.dtype)

    def _new_state(
        self, n_rows: int, dtype: torch.dtype, device: torch.device, bf16: bool, cuda_graph: bool
    ) -> ops.DecodeState:
        config, decoder = self.model.config, self.model.decoder
        return ops.DecodeState(
            n_layers=config.n_layers, n_rows=n_rows, window=decoder.window, n_heads=config.n_heads,
            width=config.dim // config.n_heads, n_z=config.n_z, act_dim=self.model.act_dim,
            dtype=dtype, device=device, bf16=bf16, cuda_graph=cuda_graph,
        )  # fmt: skip

    @torch.no_grad()
    def _set_plans(self, rows: Tensor, z0: Tensor) -> None:
        # All rows are computed and the masked ones kept: the same shapes, hence the same bits, as in a fresh actor.
        z, keep = self.model.prior(z0), rows[:, None, None, None]
        if self.strength != 1.0:
            z = torch.lerp(self.model.prior(torch.zeros_like(z0[:1])), z, self.strength)
        for layer, plan_k, plan_v in zip(
            self.model.decoder.layers, self._state.plan_k, self._state.plan_v, strict=True
        ):
            k, v = layer.plan_keys(z)  # type: ignore[operator]
            plan_k.copy_(torch.where(keep, k, plan_k))
            plan_v.copy_(torch.where(keep, v, plan_v))

    def reset(
        self, mask: np.ndarray | Tensor | None = None, plans: np.ndarray | Tensor | HasSeeds | None = None
    ) -> None:
        """Start new episodes.

        Args:
            mask: bool [P], environments that start anew; None for all. The others keep their history untouched.
            plans: new plan seeds for them, [P, n_z, D] (rows outside the mask are not read), or anything with such a
                ``z0``; None keeps their plans.

        Raises:
            ValueError: a mask or seeds of another shape or type, or seeds that are not finite (checked on the CPU).
        """
        self._wake()
        rows = self._rows(mask)
        if plans is not None:
            self._change_plans(rows, plans)
        self._state.reset(None if mask is None else rows)
        self._noise[rows] = math.nan

    def change_plans(self, plans: np.ndarray | Tensor | HasSeeds, mask: np.ndarray | Tensor | None = None) -> None:
        """Go on with other plans in the middle of episodes, whose history stays.

        Args:
            plans: as for :meth:`reset`.
            mask: bool [P], environments that get them; None for all.

        Raises:
            ValueError: as :meth:`reset`.
        """
        self._change_plans(self._rows(mask), plans)

    def _rows(self, mask: np.ndarray | Tensor | None) -> Tensor:
        """bool [P] on the device, all where there is no mask."""
        steps = self._state.steps
        if mask is None:
            return torch.ones_like(steps, dtype=torch.bool)
        rows = torch.as_tensor(mask, device=steps.device)
        if rows.dtype != torch.bool or rows.shape != steps.shape:
            raise ValueError(f"mask: expected bool [{len(self)}], got {rows.dtype} {list(rows.shape)}")
        return rows

    def _change_plans(self, rows: Tensor, plans: np.ndarray | Tensor | HasSeeds) -> None:
        given = plans if isinstance(plans, np.ndarray | Tensor) else plans.z0
        z0 = self._seeds("plans", given, rows)
        self.z0 = torch.where(rows[:, None, None], z0, self.z0)
        self._set_plans(rows, z0)
        if self._awake is not None:
            for name in ("plan_k", "plan_v"):
                torch.index_select(getattr(self._state, name), 1, self._awake, out=getattr(self._awake_state, name))

    def act(self, obs: Array) -> Array:
        """Mean actions (plus noise, if any) for the current observations.

        Args:
            obs: [P, obs_dim] in environment units, NumPy or tensor.

        Returns:
            [P, act_dim] in environment units, of the kind that came in.

        Raises:
            ValueError: wrong shape.
            FloatingPointError: an observation is NaN or infinite (checked in NumPy arrays and on the CPU).
        """
        # Most steps are like the one before. Noise of parts needs what surrounds them; subclasses do more at a step.
        again = self._state.again if self._is_plain else None
        if again is not None and self._awake is None and (self._noise_levels is None or self._n_threads == 0):
            out = again(self.model, obs, self._n_threads)
            if out is not None:
                return out if self._noise_levels is None else self._add_noise(out, self._noise_levels)
        if not isinstance(obs, np.ndarray | Tensor):
            obs = torch.as_tensor(obs)
        # A module's own way to its parts is a function of Python, at every step.
        if self._weights.decoder is not self.model._modules["decoder"]:
            self._weights = ops.WeightsOf(self.model.decoder)
        if self._n_threads == 0:
            return self._act(obs)
        with self._turn, _threads.Exactly(self._n_threads):
            if not self._inference:
                return self._act(obs)
            with torch.inference_mode():
                return self._act(obs)

    def _act(self, obs: Array) -> Array:
        if self._awake is None:
            again = None if self._is_plain else self._state.again
            out = None if again is None else again(self.model, obs, 0)
            if out is None:
                out = ops.decode_step(self._weights(), self._state, obs, self._units)
                if self._state.again is None:
                    ops.prepare_again(self.model, self._weights, self._state)
            return out if self._noise_levels is None else self._add_noise(out, self._noise_levels)
        if obs.shape[:1] != (len(self),):
            raise ValueError(f"obs: expected shape {[len(self), self.model.obs_dim]}, got {list(obs.shape)}")
        rows: Any = self._awake.numpy() if isinstance(obs, np.ndarray) else self._awake
        out = ops.decode_step(self._weights(), self._awake_state, obs[rows], self._units)
        if self._noise_levels is not None:
            out = self._add_noise(out, self._noise_levels)
        shape = (len(self), self.model.act_dim)
        every: Any = np.zeros(shape, out.dtype) if isinstance(out, np.ndarray) else out.new_zeros(shape)
        every[rows] = out
        return every

    @torch.no_grad()
    def rest(self, mask: np.ndarray | Tensor) -> None:
        """Say which environments need no actions until the next :meth:`reset`, as their episodes are over.

        They get action 0, or what they would have got: on the CPU the others are computed alone once a fifth of the
        rows rests. A reset of any rows wakes all; what a row has rested through is missing from its history then.

        Args:
            mask: bool [P]. Rows that rest already go on doing so.
        """
        rests = torch.as_tensor(mask)
        if rests.dtype != torch.bool or rests.shape != self._state.steps.shape:
            raise ValueError(f"mask: expected bool [{len(self)}], got {rests.dtype} {list(rests.shape)}")
        if self.device.type != "cpu":
            return
        before = torch.arange(len(self)) if self._awake is None else self._awake
        keep = ~rests[before]
        n = int(keep.sum())
        if n == 0 or n > COMPACT * len(before):
            return
        whole = self._awake_state if self._awake is not None else self._state
        begun = bool(whole.steps.any())
        if begun:
            whole.clear_stale(self.model.config.tokens_per_step)
        state = self._new_state(n, whole.last_action.dtype, self.device, whole.bf16, whole.cuda_graph)
        chosen = keep.nonzero()[:, 0]
        for name in ("plan_k", "plan_v", *(("ring_k", "ring_v") if begun else ())):
            torch.index_select(getattr(whole, name), 1, chosen, out=getattr(state, name))
        for name in ("steps", "last_action"):
            torch.index_select(getattr(whole, name), 0, chosen, out=getattr(state, name))
        self._awake, self._awake_state = before[chosen], state

    @torch.no_grad()
    def _wake(self) -> None:
        """All rows in one state again, as resets and parts want them."""
        if self._awake is None:
            return
        part, whole = self._awake_state, self._state
        part.clear_stale(self.model.config.tokens_per_step)
        whole.clear_stale(self.model.config.tokens_per_step)
        for name in ("ring_k", "ring_v"):
            getattr(whole, name)[:, self._awake] = getattr(part, name)
        for name in ("steps", "last_action"):
            getattr(whole, name)[self._awake] = getattr(part, name)
        self._awake, self._awake_state = None, whole

    @torch.no_grad()
    def split(self, sizes: Sequence[int]) -> list[Actor]:
        """One actor for each of several groups of consecutive rows, at the present point of their episodes.

        Together they do what this one would have done, noise included; it is not to act any more itself. They may act
        at the same time, each in a thread of its own, and share the threads that the engine has here.

        Args:
            sizes: rows of each group, at least 1, P in all.

        Raises:
            ValueError: the sizes are others.
        """
        if min(sizes, default=0) < 1 or sum(sizes) != len(self):
            raise ValueError(f"sizes: expected positive numbers of rows, {len(self)} in all, got {list(sizes)}")
        # Or torch's threads, which have memory to clear here, spin on when the parts begin to act.
        with _threads.left_to_the_engine("decode_step", self.z0):
            return self._split(sizes)

    def _split(self, sizes: Sequence[int]) -> list[Actor]:
        self._wake()
        whole = self._state
        begun = bool(whole.steps.any())
        if begun:
            whole.clear_stale(self.model.config.tokens_per_step)
        # A GPU does one thing after the other anyway, and while one part records a graph no other may use it.
        turn = threading.Lock() if self.device.type == "cuda" else contextlib.nullcontext()
        parts, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            state = self._new_state(size, whole.last_action.dtype, self.device, whole.bf16, whole.cuda_graph)
            names = ["plan_k", "plan_v", *(["ring_k", "ring_v"] if begun else [])]
            for name in names:
                getattr(state, name).copy_(getattr(whole, name)[:, rows])
            state.steps.copy_(whole.steps[rows])
            state.last_action.copy_(whole.last_action[rows])
            part = copy.copy(self)
            part.z0 = self.z0[rows]
            part._noise = self._noise[rows]
            part._noise_levels = None if self._noise_levels is None else self._noise_levels[rows]
            part._turn = turn
            part._n_threads, part._inference = max(1, _threads.count() // len(sizes)), torch.is_inference_mode_enabled()
            state.take_packed(whole)
            part._state = part._awake_state = state
            part._weights = ops.WeightsOf(self.model.decoder)
            part._generator = torch.Generator(device=self.device)
            part._generator.set_state(self._generator.get_state())
            part._noise_rows = (self._noise_rows[0], self._noise_rows[1] + start)
            parts.append(part)
            start += size
        return parts

    @torch.no_grad()
    def _add_noise(self, out: Array, levels: Tensor) -> Array:
        """The same actions with noise, of the same kind; it is what the decoder will read back."""
        action = self._awake_state.last_action
        drawn, start = self._noise_rows
        shape = (drawn, action.shape[1])
        noise = torch.randn(shape, generator=self._generator, dtype=action.dtype, device=action.device)
        noise = noise[start : start + len(self)]
        if self.noise_correlation > 0:
            # An Ornstein-Uhlenbeck process, begun in its stationary law.
            kept = math.exp(-1 / self.noise_correlation)
            follows = self._noise * kept + noise * math.sqrt(1 - kept * kept)
            noise = torch.where(self._noise.isnan(), noise, follows)
            self._noise = noise
        noise = noise * levels
        action.add_(noise if self._awake is None else noise[self._awake]).clamp_(-1, 1)
        noisy = self.normalization.to_environment(action)
        return noisy.cpu().numpy() if isinstance(out, np.ndarray) else noisy


def _units(normalization: Normalization) -> ops.Units:
    n = normalization
    return ops.Units(n.obs_mean, n.obs_std, n.action_mid, n.action_half)
