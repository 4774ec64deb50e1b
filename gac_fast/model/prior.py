"""Plan prior: z0 ~ N(0, I), z = norm(U(z0))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gac_fast import reference
from gac_fast.config import ModelConfig
from gac_fast.reference import PriorWeights

__all__ = ["Prior"]


class Prior(nn.Module):
    """U as a residual MLP on the flattened seed (d - hidden - d, SiLU), or the identity."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.prior
        d = config.n_z * config.dim
        if config.prior == "mlp":
            self.hidden = nn.Linear(d, config.prior_hidden)
            self.out = nn.Linear(config.prior_hidden, d)
            # A small start: U begins near the identity, so that chains begun as prior draws remain plausible.
            with torch.no_grad():
                self.out.weight.mul_(0.1)
                self.out.bias.zero_()

    def weights(self) -> PriorWeights:
        """Parameters in the order that :func:`gac_fast.reference.prior` takes them."""
        if self.kind == "identity":
            return PriorWeights(None, None, None, None)
        return PriorWeights(self.hidden.weight, self.hidden.bias, self.out.weight, self.out.bias)

    def forward(self, z0: Tensor) -> Tensor:
        """Seeds [P, n_z, D] -> plans [P, n_z, D], every plan vector of rms 1."""
        return reference.prior(self.weights(), z0)
