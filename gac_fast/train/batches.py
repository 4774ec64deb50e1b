"""Trajectories drawn and packed into the batches an update takes."""

from __future__ import annotations

import torch
from torch import Tensor

from gac_fast import ops
from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.model import Batch
from gac_fast.model.normalization import Normalization

__all__ = ["Batches"]


class Batches:
    """Packed batches of a data set that stays where it is (no copy is made of it).

    Args:
        data: all episodes, held-out ones included; trajectory numbers are positions in it.
        normalization: on the CPU.
        held_out: int64 [h], trajectories never drawn.
        config: batch size, share of tau-only rows, dropout of action tokens.
        device: where batches go.
    """

    def __init__(
        self, data: Trajectories, normalization: Normalization, held_out: Tensor, config: Config, device: torch.device
    ) -> None:
        self.observations = torch.from_numpy(data.observations)
        self.actions = torch.from_numpy(data.actions)
        self.cu_seqlens = torch.from_numpy(data.cu_seqlens)
        self.normalization = normalization.to(device)
        self.device = device
        self.complete = torch.from_numpy(data.complete)
        returns = normalization.returns(torch.from_numpy(data.returns)).to(torch.float32)
        self.returns = torch.where(self.complete, returns, 0.0)
        self.weights = self.cu_seqlens.diff().to(torch.float64)
        if config.train.sampling == "uniform":
            self.weights.fill_(1.0)
        self.weights[held_out] = 0.0
        self.size = min(config.train.batch_size, int((self.weights > 0).sum()))
        fraction = config.posterior.tau_only_fraction
        # At least one where asked for: without any, the return model's variance is never fitted.
        self.n_tau_only = max(1, round(fraction * self.size)) if fraction > 0 and self.size > 1 else 0
        self.action_token_dropout = config.model.action_token_dropout

    def draw(self, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """A random batch: trajectories without repetition, drawn by their weights.

        Returns:
            the batch, and the posterior rows of its chains, int64 [b]: row i of trajectory i given (tau, y), row
            B + i where the chain sees tau alone (a share of the batch, and every cut episode).
        """
        ids = torch.multinomial(self.weights, self.size, generator=generator)
        # Drawn without replacement, the last are the light ones: those that hide their return should be any.
        ids = ids[torch.randperm(len(ids), generator=generator)]
        has_return = self.complete[ids].clone()
        has_return[self.size - self.n_tau_only :] = False
        dropped = None
        if self.action_token_dropout > 0:
            n = int((self.cu_seqlens[ids + 1] - self.cu_seqlens[ids]).sum())
            dropped = torch.rand(n, generator=generator) < self.action_token_dropout
        rows = torch.where(has_return, ids, ids + len(self.complete))
        return self.of(ids, has_return, dropped), rows.to(self.device)

    def of(self, ids: Tensor, has_return: Tensor | None = None, dropped: Tensor | None = None) -> Batch:
        """The batch of given trajectories.

        Args:
            ids: int64 [b].
            has_return: bool [b], which chains may see the return; None hides it from all.
            dropped: bool [n], action tokens left out.
        """
        obs, actions, cu = ops.pack_batch(self.observations, self.actions, self.cu_seqlens, ids)
        lengths = cu.diff().to(torch.int64)
        sequence = torch.repeat_interleave(torch.arange(len(ids)), lengths)
        positions = torch.arange(len(obs)) - cu[:-1].to(torch.int64)[sequence]
        if has_return is None:
            has_return = torch.zeros(len(ids), dtype=torch.bool)

        def move(x: Tensor) -> Tensor:
            return x.to(self.device, non_blocking=True)

        return Batch(
            self.normalization.observations(move(obs)), self.normalization.actions(move(actions)), move(cu),
            move(positions), move(sequence), move(self.returns[ids]), move(has_return), move(self.complete[ids]),
            None if dropped is None else move(dropped),
        )  # fmt: skip
