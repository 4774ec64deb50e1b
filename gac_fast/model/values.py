"""Value model V(s, t): the return to go that data lead to from a state, by members that each know a part of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ValueModel"]

HIDDEN = 64


class ValueModel(NamedTuple):
    """K multilayer perceptrons obs_dim + 1 - 64 - 64 - 1 with SiLU, of state and time step; float32.

    The episode's time step is a part of the state, since what is left to earn before a time limit depends on it.
    """

    w1: Tensor  # [K, obs_dim + 1, 64]
    b1: Tensor  # [K, 1, 64]
    w2: Tensor  # [K, 64, 64]
    b2: Tensor  # [K, 1, 64]
    w3: Tensor  # [K, 64, 1]
    b3: Tensor  # [K, 1, 1]
    obs_mean: Tensor  # [obs_dim]
    obs_std: Tensor  # [obs_dim]
    horizon: Tensor  # [], time steps of the longest episode
    mean: Tensor  # [], of returns to go, in environment units
    std: Tensor  # []

    @classmethod
    def untrained(
        cls, n_members: int, obs_mean: Tensor, obs_std: Tensor, horizon: int, mean: float, std: float, seed: int
    ) -> ValueModel:
        """Weights uniform within 1 / sqrt(inputs), biases 0."""
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for n_in, n_out in ((len(obs_mean) + 1, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)):
            bound = 1 / math.sqrt(n_in)
            w = torch.empty(n_members, n_in, n_out).uniform_(-bound, bound, generator=generator)
            layers += [w, torch.zeros(n_members, 1, n_out)]
        units = (obs_mean.float(), obs_std.float(), *(torch.tensor(float(x)) for x in (horizon, mean, std)))
        return cls(*layers, *units)

    @property
    def n_members(self) -> int:
        """K."""
        return len(self.w1)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What training moves."""
        return self[:6]

    def inputs(self, observations: Tensor, steps: Tensor) -> Tensor:
        """[n, obs_dim + 1] of states [n, obs_dim] in environment units and their time steps [n]."""
        states = (observations - self.obs_mean) / self.obs_std
        return torch.cat((states, (2 * steps.to(states.dtype) / self.horizon - 1)[:, None]), dim=1)

    def standardised(self, inputs: Tensor) -> Tensor:
        """[K, n] of inputs [K, n, obs_dim + 1], in standard deviations of the returns to go."""
        h = F.silu(torch.baddbmm(self.b1, inputs, self.w1))
        h = F.silu(torch.baddbmm(self.b2, h, self.w2))
        return torch.baddbmm(self.b3, h, self.w3)[..., 0]

    @torch.no_grad()
    def of_members(self, observations: Tensor, steps: Tensor) -> Tensor:
        """float64 [K, n], returns to go in environment units.

        Args:
            observations: [n, obs_dim] in environment units.
            steps: [n], time steps of their episodes so far.
        """
        inputs = self.inputs(observations, steps)
        values = self.standardised(inputs.expand(self.n_members, *inputs.shape))
        return values.double() * self.std.double() + self.mean.double()

    def value(self, observations: Tensor, steps: Tensor) -> Tensor:
        """float64 [n], the members' mean: of states that are in nobody's data."""
        return self.of_members(observations, steps).mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {f"values.{name}": value for name, value in self._asdict().items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> ValueModel | None:
        """Inverse of :meth:`tensors`; None where there are none."""
        if "values.w1" not in tensors:
            return None
        return cls(*(tensors[f"values.{name}"] for name in cls._fields))

    def to(self, device: torch.device) -> ValueModel:
        """The same on another device."""
        return ValueModel(*(x.to(device) for x in self))
