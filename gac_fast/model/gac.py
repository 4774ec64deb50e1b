"""The joint model of whole trajectories and their returns, with the one likelihood that all paths share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gac_fast import ops
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
        """Mean of per-step values [n, ...] over the steps of real trajectories: [...]."""
        if self.is_real is None:
            return x.mean(0)
        counts = self.is_real[self.sequence]
        shown = torch.where(counts.view(-1, *(1,) * (x.ndim - 1)), x, 0.0)
        return shown.sum(0) / counts.sum()


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

    def plan_and_errors(self, z0: Tensor, batch: Batch, trunk: Tensor) -> tuple[Tensor, Tensor]:
        """The plans of seeds [B, n_z, D], and :meth:`action_errors` under them, the mean over steps: [act_dim]."""
        if not ops.energy_runs_directly(trunk, z0):
            z = self.prior(z0)
            return z, batch.mean_of_steps(self.action_errors(batch, z, trunk))
        decoder = self.decoder
        z, kv = ops.seed_plans(self.prior.weights(), decoder.plan_maps(), z0)
        y = decoder.before_tanh(trunk, decoder.in_heads(kv), batch.cu_seqlens, batch.positions, self.bf16)
        counts = None if batch.is_real is None else batch.is_real[batch.sequence]
        return z, ops.action_errors(y, batch.actions, counts)

    def predict_return(self, z: Tensor, first_states: Tensor | None, dropout: bool = False) -> tuple[Tensor, Tensor]:
        """Members' means and log-variances [E, B] of the standardised return."""
        return self.returns(z, first_states, dropout)

    def return_losses(self, z: Tensor, batch: Batch, seen: Tensor, fitted: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the members' means, and mean NLL of their variances with means and plans held fixed.

        Args:
            z: [B, n_z, D].
            seen, fitted: bool [B], plans that count in either.
        """
        if batch.returns.shape != z.shape[:1]:
            raise ValueError(f"returns: expected shape {[len(z)]}, got {list(batch.returns.shape)}")
        returns = self.returns
        n_members = len(returns.w1)  # type: ignore[arg-type]
        seen, fitted = (x.to(z.dtype) / (x.sum().clamp_min(1) * n_members) for x in (seen, fitted))
        context = batch.first_states if returns.uses_first_state else None
        return ops.return_losses(returns.weights(), z, batch.returns, seen, fitted, context, returns.dropout)

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

    def seed_energy(
        self,
        batch: Batch,
        action_temperature: float,
        return_temperature: float,
        trunk: Tensor,
    ) -> ops.SeedEnergy | None:
        """:meth:`energy` of a batch as :func:`gac_fast.ops.posterior_langevin` takes it; None where that does not."""
        if not ops.energy_runs_directly(trunk, trunk):
            return None
        return ops.SeedEnergy(
            self.prior.weights(), self.decoder.plan_maps(), self.returns.weights(), self.decoder.stack(),
            trunk.detach(), batch.cu_seqlens, batch.positions, batch.actions,
            batch.first_states if self.returns.uses_first_state else None, batch.returns,
            batch.has_return / return_temperature, action_temperature, self.bf16, self.decoder.tokens_per_step,
        )  # fmt: skip

    def action_log_likelihood(self, errors: Tensor) -> Tensor:
        """log p(a_t | ...) per step [n] from squared errors [n, act_dim], under the fitted sigma_a."""
        log_sigma = self.decoder.log_sigma_a
        return -(0.5 * errors * torch.exp(-2 * log_sigma) + log_sigma + 0.5 * LOG_2PI).sum(-1)
