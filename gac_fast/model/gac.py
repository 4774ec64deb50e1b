"""The joint model of whole trajectories and their returns, with the one likelihood that all paths share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gac_fast.config import ModelConfig
from gac_fast.model.decoder import Decoder
from gac_fast.model.prior import Prior
from gac_fast.model.returns import ReturnModel
from gac_fast.reference import return_moments

__all__ = ["GAC", "Batch"]

LOG_2PI = math.log(2 * math.pi)

# First states whose pairs with all plans are held at once: bounds the memory.
PAIR_CHUNK = 256


class Batch(NamedTuple):
    """B trajectories packed next to each other, n steps in all; normalised observations, actions and returns."""

    observations: Tensor  # [n, obs_dim]
    actions: Tensor  # [n, act_dim] in [-1, 1]
    cu_seqlens: Tensor  # int32 [B + 1], in steps
    positions: Tensor  # int64 [n], time step within its trajectory
    sequence: Tensor  # int64 [n], trajectory of each step
    returns: Tensor  # [B], standardised; 0 where has_label is False
    has_return: Tensor  # bool [B], whether the posterior sees the return
    has_label: Tensor  # bool [B], whether the return is known at all (cut episodes have none)
    dropped: Tensor | None = None  # bool [n], action tokens left out
    is_real: Tensor | None = None  # bool [B], False for trajectories that only fill up the batch; None: all are real

    @property
    def first_states(self) -> Tensor:
        """[B, obs_dim]."""
        return self.observations[self.cu_seqlens[:-1].long()]

    @property
    def n_trajectories(self) -> int:
        """B."""
        return self.returns.shape[0]

    def sum_steps(self, x: Tensor) -> Tensor:
        """Sum per-step values [n] over each trajectory: [B]."""
        return torch.zeros(self.n_trajectories, dtype=x.dtype, device=x.device).index_add(0, self.sequence, x)

    def mean_of_steps(self, x: Tensor) -> Tensor:
        """Mean of per-step values [n, ...] over the steps of real trajectories: []."""
        if self.is_real is None:
            return x.mean()
        counts = self.is_real[self.sequence]
        shown = torch.where(counts.view(-1, *(1,) * (x.ndim - 1)), x, 0.0)
        return shown.sum() / (counts.sum() * (x.numel() // max(1, x.shape[0])))


class GAC(nn.Module):
    """p(z0) p(tau | z) p(y | z) with z = norm(U(z0)); decoder and return model read the same normalised z.

    Attributes:
        bf16: run the decoder of packed batches under bfloat16 autocast; prior and return model stay in float32.
    """

    def __init__(self, config: ModelConfig, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.config = config
        self.bf16 = False
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.prior = Prior(config)
        self.decoder = Decoder(config, obs_dim, act_dim)
        self.returns = ReturnModel(config, obs_dim)

    def extra_repr(self) -> str:
        return (
            f"obs_dim={self.obs_dim}, act_dim={self.act_dim}, parameters={sum(p.numel() for p in self.parameters()):,}"
        )

    def trunk(self, batch: Batch) -> Tensor:
        """What the decoder computes before any plan: [C * n, D]."""
        with self._autocast(batch):
            return self.decoder.trunk(
                batch.observations, batch.actions, batch.cu_seqlens, batch.positions, batch.dropped
            )

    def _autocast(self, batch: Batch) -> torch.autocast:
        return torch.autocast(batch.observations.device.type, torch.bfloat16, enabled=self.bf16)

    def mean_actions(self, batch: Batch, z: Tensor, trunk: Tensor | None = None) -> Tensor:
        """mu_t under a plan per trajectory, [n, act_dim]; z [B, n_z, D]."""
        if trunk is None:
            trunk = self.trunk(batch)
        with self._autocast(batch):
            mean = self.decoder.mean(trunk, z, batch.cu_seqlens, batch.positions)
        return mean.to(batch.actions.dtype)

    def action_errors(self, batch: Batch, z: Tensor, trunk: Tensor | None = None) -> Tensor:
        """Squared errors (a_t - mu_t)^2, [n, act_dim]: **the** likelihood of posterior, training and metrics.

        mu_t is read at the token of s_t, which sees neither a_t nor anything after it.
        """
        mean = self.mean_actions(batch, z, trunk)
        if batch.actions.shape != mean.shape:
            raise ValueError(f"actions: expected shape {list(mean.shape)}, got {list(batch.actions.shape)}")
        return (batch.actions - mean).square()

    def predict_return(self, z: Tensor, first_states: Tensor | None, dropout: bool = False) -> tuple[Tensor, Tensor]:
        """Members' means and log-variances [E, B] of the standardised return."""
        return self.returns(z, first_states, dropout)

    def return_errors(self, batch: Batch, means: Tensor) -> Tensor:
        """Squared errors (y - r)^2 of members' means [E, B]: [E, B]."""
        # [B, 1] would broadcast to every pair of trajectories without a word.
        if batch.returns.shape != means.shape[1:]:
            raise ValueError(f"returns: expected shape {list(means.shape[1:])}, got {list(batch.returns.shape)}")
        return (batch.returns - means).square()

    def return_moments(self, z: Tensor, first_states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B] of the standardised return, ensemble disagreement included."""
        return return_moments(*self.predict_return(z, first_states))

    def return_moments_of_pairs(self, z: Tensor, first_states: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [n, M] of the standardised return of M plans from each of n first states.

        Args:
            z: [M, n_z, D].
            first_states: [n, obs_dim] normalised.
        """
        pairs = [self._moments_of_pairs(z, chunk) for chunk in first_states.split(PAIR_CHUNK)]
        return torch.cat([mean for mean, _ in pairs]), torch.cat([std for _, std in pairs])

    def _moments_of_pairs(self, z: Tensor, first_states: Tensor) -> tuple[Tensor, Tensor]:
        m, n = len(z), len(first_states)
        means, log_variances = self.predict_return(z, first_states[None].expand(m, n, -1))  # [E, M, n]
        mean, std = return_moments(means.flatten(1), log_variances.flatten(1))
        return mean.view(m, n).T, std.view(m, n).T

    def energy(
        self,
        z0: Tensor,
        batch: Batch,
        action_temperature: float,
        return_temperature: float,
        trunk: Tensor | None = None,
    ) -> Tensor:
        """E(z0; tau, y) = |z0|^2/2 + sum (a - mu)^2 / (2 T_a) + (y - r(z))^2 / (2 T_y), [B].

        The return term is left out where ``batch.has_return`` is False. Ensemble members share the term equally.
        """
        z = self.prior(z0)
        actions = batch.sum_steps(self.action_errors(batch, z, trunk).sum(-1))
        means, _ = self.predict_return(z, batch.first_states)
        returns = self.return_errors(batch, means).mean(0) * batch.has_return
        return 0.5 * z0.square().sum((1, 2)) + actions / (2 * action_temperature) + returns / (2 * return_temperature)

    def action_log_likelihood(self, errors: Tensor) -> Tensor:
        """log p(a_t | ...) per step [n] from squared errors [n, act_dim], under the fitted sigma_a."""
        log_sigma = self.decoder.log_sigma_a
        return -(0.5 * errors * torch.exp(-2 * log_sigma) + log_sigma + 0.5 * LOG_2PI).sum(-1)
