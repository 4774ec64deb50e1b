"""Return model p(y | z) = N(y; r(z), sigma(z)^2), y standardised by the data."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from gac_fast import reference
from gac_fast.config import ModelConfig
from gac_fast.reference import ReturnWeights

__all__ = ["ReturnModel"]


class ReturnModel(nn.Module):
    """E independent MLPs d - hidden - hidden - 2 with SiLU and dropout: mean and log-variance heads."""

    def __init__(self, config: ModelConfig, obs_dim: int) -> None:
        super().__init__()
        self.dropout = config.return_dropout
        self.uses_first_state = config.return_context == "first_state"
        inputs = config.n_z * config.dim + (obs_dim if self.uses_first_state else 0)
        sizes = (inputs, config.return_hidden, config.return_hidden, 2)
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes), start=1):
            bound = 1 / math.sqrt(n_in)
            w = torch.empty(config.return_ensemble, n_out, n_in).uniform_(-bound, bound)
            self.register_parameter(f"w{i}", nn.Parameter(w))
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(config.return_ensemble, n_out)))

    def weights(self) -> ReturnWeights:
        """Parameters in the order that :func:`gac_fast.reference.return_model` takes them."""
        return ReturnWeights(self.w1, self.b1, self.w2, self.b2, self.w3, self.b3)  # type: ignore[arg-type]

    @torch.no_grad()
    def change_units(self, scale: float, shift: float) -> None:
        """Let the model predict y' = scale * y + shift where it predicted y, with the standard deviation that goes
        with it (van Hasselt et al., arXiv 1602.07714)."""
        weights = self.weights()
        weights.w3[:, 0].mul_(scale)
        weights.b3[:, 0].mul_(scale).add_(shift)
        weights.b3[:, 1].add_(2 * math.log(scale))

    def forward(self, z: Tensor, first_state: Tensor | None, dropout: bool = False) -> tuple[Tensor, Tensor]:
        """Means and log-variances [E, P] of the standardised return.

        Args:
            z: [P, n_z, D].
            first_state: [P, obs_dim] normalised; used where ``return_context`` is ``first_state``, else ignored.
            dropout: draw dropout masks (training); off in posterior passes and planning.

        Raises:
            ValueError: the model takes the first state and none was given.
        """
        if self.uses_first_state and first_state is None:
            raise ValueError("first_state: expected [P, obs_dim] since return_context is 'first_state', got None")
        context = first_state if self.uses_first_state else None
        return reference.return_model(self.weights(), z, context, self.dropout if dropout else 0.0)
