"""Environment units to the model's and back: observations and returns standardised, actions scaled to [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gac_fast.data import Trajectories

__all__ = ["Normalization"]

# Below this a dimension is constant: it is centred and left unscaled.
SMALLEST_STD = 1e-6


class Normalization(NamedTuple):
    """Affine maps fitted on all episodes of a data set, held-out ones too; float32 on the model's device."""

    obs_mean: Tensor  # [obs_dim]
    obs_std: Tensor  # [obs_dim]
    action_mid: Tensor  # [act_dim], middle of the action space
    action_half: Tensor  # [act_dim], half its width
    return_mean: Tensor  # []
    return_std: Tensor  # []

    @classmethod
    def fit(cls, data: Trajectories) -> Normalization:
        """Statistics of ``data``; those of the return over complete episodes alone."""
        stats = data.statistics()
        obs_std = torch.as_tensor(stats.obs_std)
        return_std = torch.as_tensor(stats.return_std, dtype=torch.float64)
        low, high = torch.as_tensor(data.action_low), torch.as_tensor(data.action_high)
        parts = (
            torch.as_tensor(stats.obs_mean),
            torch.where(obs_std > SMALLEST_STD, obs_std, 1.0),
            (high + low) / 2,
            (high - low) / 2,
            torch.as_tensor(stats.return_mean, dtype=torch.float64),
            torch.where(return_std > SMALLEST_STD, return_std, 1.0),
        )
        return cls(*(part.to(torch.float32) for part in parts))

    def to(self, device: torch.device) -> Normalization:
        """The same on another device."""
        return Normalization(*(part.to(device) for part in self))

    def observations(self, x: Tensor) -> Tensor:
        """Environment -> model."""
        return (x - self.obs_mean) / self.obs_std

    def actions(self, x: Tensor) -> Tensor:
        """Environment -> [-1, 1]."""
        return (x - self.action_mid) / self.action_half

    def to_environment(self, actions: Tensor) -> Tensor:
        """[-1, 1] -> environment."""
        return actions * self.action_half + self.action_mid

    def returns(self, y: Tensor) -> Tensor:
        """Environment -> standardised."""
        return (y - self.return_mean) / self.return_std
