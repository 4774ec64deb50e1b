"""Tiny models and batches; needs nothing but torch, so that it serves on a bare GPU machine too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac_fast.config import ModelConfig
from gac_fast.model import GAC, Batch

OBS_DIM, ACT_DIM = 3, 2


def model_config(**fields: Any) -> ModelConfig:
    """A model of a few thousand parameters: two layers that see three steps each."""
    tiny = {
        "dim": 16, "n_layers": 2, "n_heads": 2, "window": 3, "mlp_ratio": 2, "n_z": 2, "context": "states",
        "prior_hidden": 8, "return_hidden": 8,
    }  # fmt: skip
    return ModelConfig(**(tiny | fields))


def make_model(
    config: ModelConfig | None = None,
    *,
    obs_dim: int = OBS_DIM,
    act_dim: int = ACT_DIM,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> GAC:
    """A model whose every parameter is random: biases, norms and the dropped-action token included."""
    torch.manual_seed(seed)
    model = GAC(config or model_config(), obs_dim, act_dim)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if (p.ndim < 2 or name.startswith("returns.b")) and name != "decoder.log_sigma_a":
                p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype)


def make_batch(
    lengths: Sequence[int],
    *,
    obs_dim: int = OBS_DIM,
    act_dim: int = ACT_DIM,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    has_return: Sequence[bool] | None = None,
) -> Batch:
    """Random trajectories of the given lengths, packed."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.tensor(lengths)
    n, b = int(steps.sum()), len(lengths)
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), steps.cumsum(0)))
    sequence = torch.repeat_interleave(torch.arange(b), steps)
    return Batch(
        observations=torch.randn(n, obs_dim, generator=generator, dtype=torch.float64).to(dtype),
        actions=(2 * torch.rand(n, act_dim, generator=generator, dtype=torch.float64) - 1).to(dtype),
        cu_seqlens=cu.to(torch.int32),
        positions=torch.arange(n) - cu[sequence],
        sequence=sequence,
        returns=torch.randn(b, generator=generator, dtype=torch.float64).to(dtype),
        has_return=torch.ones(b, dtype=torch.bool) if has_return is None else torch.tensor(has_return),
        has_label=torch.ones(b, dtype=torch.bool),
    )


def single(batch: Batch, i: int) -> Batch:
    """Trajectory i of a batch alone."""
    rows = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
    n = rows.stop - rows.start
    return Batch(
        batch.observations[rows], batch.actions[rows], torch.tensor([0, n], dtype=torch.int32), batch.positions[rows],
        torch.zeros(n, dtype=torch.int64), batch.returns[i : i + 1], batch.has_return[i : i + 1],
        batch.has_label[i : i + 1], None if batch.dropped is None else batch.dropped[rows],
    )  # fmt: skip


def random_seeds(p: int, config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Plan seeds [p, n_z, D] of the prior."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(p, config.n_z, config.dim, generator=generator, dtype=torch.float64).to(dtype)
