"""Offline metrics on held-out episodes: what can be known of a model without a simulator."""

from __future__ import annotations

import torch
from torch import Tensor

from gac_fast import ops
from gac_fast.config import Config
from gac_fast.model import GAC, Batch
from gac_fast.model.gac import LOG_2PI
from gac_fast.posterior import langevin
from gac_fast.train.batches import Batches
from gac_fast.train.update import frozen

__all__ = ["N_COMPARED", "held_out_metrics", "infer_from_trajectory"]

INFERENCE_STEPS = 40
CHUNK = 32

# Plans from the prior over which the expected return of a start is averaged.
N_COMPARED = 32


def infer_from_trajectory(model: GAC, batch: Batch, ids: Tensor, config: Config, seed: int) -> Tensor:
    """Plan seeds given tau alone: Langevin from a prior draw, [B, n_z, D].

    Args:
        batch: trajectories whose returns are hidden (``has_return`` all False).
        ids: int64 [B], which fix the noise together with ``seed``.
    """
    shape = (len(ids), config.model.n_z, config.model.dim)
    key = (seed & 0xFFFFFFFF, 0x54415530)

    def noise(step: int) -> Tensor:
        return ops.philox_normal(key, ids, step + 1, shape[1] * shape[2]).view(shape)

    p = config.posterior
    with torch.no_grad():
        trunk = model.trunk(batch)
    with frozen(model):
        z0, _ = langevin(
            lambda z0: model.energy(z0, batch, p.action_temperature, p.return_temperature, trunk), noise(-1),
            n_steps=INFERENCE_STEPS, step_size=p.step_size, noise=noise, max_drift_ratio=p.max_drift_ratio,
        )  # fmt: skip
    return z0


def held_out_metrics(model: GAC, batches: Batches, ids: Tensor, config: Config, seed: int = 0) -> dict[str, float]:
    """Metrics of trajectories ``ids`` (int64 [h], at least 2), plans inferred from tau alone.

    Returns:
        - ``nll_per_step``: -log p(a_t | s_<=t, own plan), nats per step;
        - ``nll_other_plan``: the same under the plan of another trajectory, half a chunk of ``ids`` away;
        - ``steering``: rms difference of the mean actions (within [-1, 1]) under own and other plan, same states;
        - ``tau_only_corr``: correlation of y and r(z), z from tau alone;
        - ``plan_corr``, where the return model takes the first state: the same of y and r(z, s_1), each less the mean
          of r(z, s_1) over plans of the prior: what the plan adds to what the start says;
        - ``return_rmse``: of r(z), in units of the return's standard deviation;
        - ``return_coverage``: share of returns within one predicted standard deviation (0.68 if calibrated);
        - ``return_nll``: Gaussian NLL of the standardised return.
    """
    if len(ids) < 2:
        raise ValueError(f"ids: expected at least 2 trajectories, got {len(ids)}")
    sums = torch.zeros(4, dtype=torch.float64)
    means, stds, ys, starts = [], [], [], []
    shape = (N_COMPARED, config.model.n_z, config.model.dim)
    compared = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(batches.device)
    # Chunks of at least two, so that everyone has another's plan to be compared with: one from far away in the list,
    # where neighbours may be segments of one episode.
    for chunk in ids.tensor_split(max(1, len(ids) // CHUNK)):
        batch = batches.of(chunk)
        z0 = infer_from_trajectory(model, batch, chunk.to(batch.observations.device), config, seed)
        with torch.no_grad():
            z = model.prior(z0)
            trunk = model.trunk(batch)
            own, other = (model.mean_actions(batch, plan, trunk) for plan in (z, z.roll(len(z) // 2, 0)))
            nll_own, nll_other = (
                -model.action_log_likelihood((batch.actions - mean).square()).double().sum() for mean in (own, other)
            )
            difference = (own - other).double().square().sum()
            sums += torch.stack((nll_own, nll_other, difference, difference.new_tensor(len(own)))).cpu()
            mean, std = model.return_moments(z, batch.first_states)
            labelled = batch.has_label
            means.append(mean[labelled].cpu())
            stds.append(std[labelled].cpu())
            ys.append(batch.returns[labelled].cpu())
            if model.returns.uses_first_state:
                expected, _ = model.return_moments_of_pairs(model.prior(compared), batch.first_states[labelled])
                starts.append(expected.mean(dim=1).cpu())
    n = float(sums[3])
    out = {
        "nll_per_step": float(sums[0]) / n,
        "nll_other_plan": float(sums[1]) / n,
        "steering": (float(sums[2]) / (n * model.act_dim)) ** 0.5,
    }
    mean, std, y = (torch.cat(parts).double() for parts in (means, stds, ys))
    if len(y) >= 2:
        z_score = (y - mean) / std
        out |= {
            "tau_only_corr": _correlation(mean, y),
            "return_rmse": float((y - mean).square().mean().sqrt()),
            "return_coverage": float((z_score.abs() <= 1).double().mean()),
            "return_nll": float((0.5 * z_score.square() + std.log()).mean()) + 0.5 * LOG_2PI,
        }
        if starts:
            expected = torch.cat(starts).double()
            out["plan_corr"] = _correlation(mean - expected, y - expected)
    return out


def _correlation(x: Tensor, y: Tensor) -> float:
    centred = torch.stack((x - x.mean(), y - y.mean()))
    return float(centred.prod(0).sum() / centred.square().sum(1).sqrt().prod().clamp_min(1e-12))
