"""Acting: one plan per environment for the whole episode, a ring of keys and values per layer."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gac_fast import ops
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization
from gac_fast.reference import DecoderWeights

__all__ = ["Actor"]

Array = TypeVar("Array", np.ndarray, Tensor)


class HasSeeds(Protocol):
    """Such as :class:`gac_fast.plan.Plans`."""

    @property
    def z0(self) -> Tensor: ...


class Actor:
    """Stateful batched decoding for P environments.

    Each call of :meth:`act` feeds s_t (and a_{t-1} where the decoder reads actions) to a decoder that keeps the last K
    steps per layer. This equals the full banded pass over the episode so far, at a cost that does not grow with it.

    Args:
        model: the joint model; its weights are read at every step, never copied.
        normalization: units of observations and actions.
        z0: [P, n_z, D], one plan seed per environment, P >= 1; NumPy or tensor, of any float type and device. It goes
            to the device and type of ``normalization``.
        action_noise: standard deviation of Gaussian noise on the action, in units of half the action space.
        seed: of that noise.

    Raises:
        ValueError: ``z0`` has another shape, is not of a float type, or is not finite (checked if it comes on the CPU).
    """

    def __init__(
        self,
        model: GAC,
        normalization: Normalization,
        z0: np.ndarray | Tensor,
        action_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.normalization = normalization
        self.action_noise = action_noise
        z0 = self._seeds("z0", z0, None)
        self._generator = torch.Generator(device=z0.device).manual_seed(seed)
        config, decoder = model.config, model.decoder
        n_rows, width = len(z0), config.dim // config.n_heads
        ring = (config.n_layers, n_rows, decoder.window, config.n_heads, width)
        self._ring_k = torch.zeros(ring, dtype=z0.dtype, device=z0.device)
        self._ring_v = torch.zeros_like(self._ring_k)
        plan = (config.n_layers, n_rows, config.n_z, config.n_heads, width)
        self._plan_k = torch.zeros(plan, dtype=z0.dtype, device=z0.device)
        self._plan_v = torch.zeros_like(self._plan_k)
        self._steps = torch.zeros(n_rows, dtype=torch.int64, device=z0.device)
        self._last_action = torch.zeros(n_rows, model.act_dim, dtype=z0.dtype, device=z0.device)
        self._set_plans(torch.ones(n_rows, dtype=torch.bool, device=z0.device), z0)

    def __len__(self) -> int:
        """Number of environments P."""
        return len(self._steps)

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

    @torch.no_grad()
    def _set_plans(self, rows: Tensor, z0: Tensor) -> None:
        # All rows are computed and the masked ones kept: the same shapes, hence the same bits, as in a fresh actor.
        z, keep = self.model.prior(z0), rows[:, None, None, None]
        for i, layer in enumerate(self.model.decoder.layers):
            k, v = layer.plan_keys(z)  # type: ignore[operator]
            self._plan_k[i] = torch.where(keep, k, self._plan_k[i])
            self._plan_v[i] = torch.where(keep, v, self._plan_v[i])

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
        rows = torch.ones_like(self._steps, dtype=torch.bool)
        if mask is not None:
            rows = torch.as_tensor(mask, device=self._steps.device)
            if rows.dtype != torch.bool or rows.shape != self._steps.shape:
                raise ValueError(f"mask: expected bool [{len(self)}], got {rows.dtype} {list(rows.shape)}")
        if plans is not None:
            z0 = plans if isinstance(plans, np.ndarray | Tensor) else plans.z0
            self._set_plans(rows, self._seeds("plans", z0, rows))
        # A slot counts only once a token of the new episode has filled it, but weight 0 times NaN is NaN: whatever an
        # earlier episode left must go. Filled under a mask, as rows picked by one would make the host wait.
        for ring in (self._ring_k, self._ring_v):
            ring.masked_fill_(rows[:, None, None, None], 0)
        self._last_action.masked_fill_(rows[:, None], 0)
        self._steps.masked_fill_(rows, 0)

    @torch.no_grad()
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
        x = torch.as_tensor(obs, device=self._ring_k.device).to(self._ring_k.dtype)
        if x.shape != (len(self), self.model.obs_dim):
            raise ValueError(f"obs: expected shape [{len(self)}, {self.model.obs_dim}], got {list(x.shape)}")
        # A tensor on a device goes unchecked: reading the answer back would cost a wait at every step.
        if isinstance(obs, np.ndarray) or x.device.type == "cpu":
            finite = torch.isfinite(x).all(dim=1)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                raise FloatingPointError(f"obs: expected finite values, environment {row} has {x[row].tolist()}")
        decoder = self.model.decoder
        weights, c = decoder.weights(), decoder.tokens_per_step
        if c == 2:
            token = decoder.embed_actions(self._last_action)
            self._feed(weights, token, 2 * self._steps - 1, self._steps - 1, self._steps > 0)
        token = decoder.embed_state(self.normalization.observations(x))
        action = self._feed(weights, token, c * self._steps, self._steps, None)
        if self.action_noise > 0:
            noise = torch.randn(action.shape, generator=self._generator, dtype=action.dtype, device=action.device)
            action = (action + self.action_noise * noise).clamp(-1, 1)
        self._last_action.copy_(action)
        self._steps += 1
        out = self.normalization.to_environment(action)
        return out.cpu().numpy() if isinstance(obs, np.ndarray) else out

    def _feed(
        self, weights: DecoderWeights, token: Tensor, n_seen: Tensor, positions: Tensor, active: Tensor | None
    ) -> Tensor:
        n_seen, positions = n_seen.clamp_min(0), positions.clamp_min(0)
        return ops.decode_token(
            weights, token, self._ring_k, self._ring_v, self._plan_k, self._plan_v, n_seen, positions, active
        )
