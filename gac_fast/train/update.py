"""One packed batch in, new parameters out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gac_fast import ops
from gac_fast.config import Config, TrainConfig
from gac_fast.model import GAC, Batch
from gac_fast.posterior import PosteriorState, refine

__all__ = ["frozen", "learning_rate", "make_optimizer", "update"]

# Of the NLL that fits the variances. Small, since its gradient shares the norm that clipping allows.
VARIANCE_WEIGHT = 0.1


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on the matrices of linear maps only."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        is_matrix = p.ndim >= 2 and name.rpartition(".")[2].startswith("w")
        (decayed if is_matrix else plain).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # One pass over memory for each parameter, where the plain one makes a dozen.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to ``final_lr_ratio`` of the peak at ``n_updates``."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.n_updates - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.learning_rate * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside: posterior passes make none for weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def update(
    model: GAC,
    optimizer: torch.optim.Optimizer,
    posterior: PosteriorState,
    batch: Batch,
    rows: Tensor,
    config: Config,
) -> dict[str, Tensor]:
    """Posterior steps on the batch's chains, then one parameter step.

    Args:
        batch: trajectories in the order of ``rows``; ``has_return`` False where the chain must not see the return.
        rows: int64 [b], distinct rows of the posterior state.

    Returns:
        detached zero-dimensional diagnostics; nothing is read back from the device.
    """
    with ops.left_to_the_engine("block", batch.observations):
        # The optimiser's step comes after all that reads the weights.
        with ops.fixed_weights():
            values = _gradients(model, optimizer, posterior, batch, rows, config)
        values["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        return values


def _gradients(
    model: GAC,
    optimizer: torch.optim.Optimizer,
    posterior: PosteriorState,
    batch: Batch,
    rows: Tensor,
    config: Config,
) -> dict[str, Tensor]:
    """The chains moved, the gradients of the parameters left in them; diagnostics."""
    t, p = config.train, config.posterior
    trunk = model.trunk(batch)
    known = trunk.detach()
    with frozen(model):

        def energy(z0: Tensor) -> Tensor:
            return model.energy(z0, batch, p.action_temperature, p.return_temperature, known)

        z0, stats = refine(posterior, rows, energy)

    z = model.prior(z0)
    errors = model.action_errors(batch, z, trunk)
    action_loss = errors.mean()
    first_states = batch.first_states
    means, _ = model.predict_return(z, first_states, dropout=True)
    seen = batch.has_return
    squared = model.return_errors(batch, means)
    return_loss = (squared * seen).sum() / (seen.sum().clamp_min(1) * len(means))

    # The variances are fitted with means and plans held fixed. That of the return sees plans inferred from tau alone,
    # for a plan that has seen the return makes errors look small.
    log_sigma = model.decoder.log_sigma_a
    action_nll = -model.action_log_likelihood(errors.detach()).mean()
    fixed_means, log_variances = model.predict_return(z.detach(), first_states)
    return_nll = 0.5 * (model.return_errors(batch, fixed_means.detach()) * (-log_variances).exp() + log_variances)
    honest = batch.has_label & ~seen
    return_nll = (return_nll * honest).sum() / (honest.sum().clamp_min(1) * len(means))

    loss = action_loss + t.return_weight * return_loss + VARIANCE_WEIGHT * (action_nll + return_nll)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    with torch.no_grad():
        return {
            "loss": loss.detach(),
            "action_error": action_loss.detach(),
            "return_error": return_loss.detach(),
            "nll_per_step": action_nll.detach(),
            "sigma_a": log_sigma.exp().mean(),
            "drift_ratio": stats.drift_ratio,
            "langevin_step": stats.step_size,
            "seed_norm": stats.seed_norm,
        }
