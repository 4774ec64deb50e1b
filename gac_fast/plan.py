"""Policy improvement: inference of plans, batched over P plans at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gac_fast import ops
from gac_fast.config import PlanConfig
from gac_fast.errors import DataError
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization

__all__ = ["Plans", "TargetSchedule", "along", "exploit", "explore", "predict", "regression_direction"]


@dataclass(frozen=True)
class Plans:
    """P plans with what the return model says of them."""

    z0: Tensor
    """[P, n_z, D] seeds."""
    return_mean: Tensor
    """[P] predicted return in environment units."""
    return_std: Tensor
    """[P] its standard deviation in environment units: the model's own, and the ensemble's disagreement."""

    def __len__(self) -> int:
        return len(self.z0)

    def __getitem__(self, rows: Tensor | slice) -> Plans:
        return Plans(self.z0[rows], self.return_mean[rows], self.return_std[rows])


@torch.no_grad()
def predict(model: GAC, normalization: Normalization, z0: Tensor, first_states: Tensor | None) -> Plans:
    """Plans of given seeds.

    Args:
        z0: [P, n_z, D].
        first_states: normalised [P, obs_dim] or [P, G, obs_dim]; None where the return model takes none.
    """
    mean, std = model.return_moments(model.prior(z0), first_states)
    return _plans(normalization, z0, mean, std)


def _plans(normalization: Normalization, z0: Tensor, mean: Tensor, std: Tensor) -> Plans:
    scale = normalization.return_std
    return Plans(z0, mean * scale + normalization.return_mean, std * scale)


def regression_direction(seeds: Tensor, returns: Tensor) -> Tensor:
    """Unit vector [n_z, D] along which returns grow: of a ridge regression on seeds, its penalty that of as many draws
    of the prior as there are dimensions.

    Args:
        seeds: [M, n_z, D], posterior seeds of trajectories.
        returns: [M], theirs.

    Raises:
        DataError: there are no two different returns, or seeds that have nothing to do with them.
    """
    y = returns.double()
    if len(y) < 2 or not bool(y.std(correction=0) > 0):
        got = f"{len(y)} that are all {float(y[0]):g}" if len(y) else "none"
        raise DataError(f"plan.method = 'regression': expected trajectories of different returns, got {got}")
    y = (y - y.mean()) / y.std(correction=0)
    x = seeds.flatten(1).double()
    x = x - x.mean(0)
    d = x.shape[1]
    slope = torch.linalg.solve(x.T @ x + d * torch.eye(d, dtype=x.dtype, device=x.device), x.T @ y)
    length = slope.norm()
    if not bool(length > 0):
        raise DataError(
            "plan.method = 'regression': expected seeds that tell of returns, got a regression without slope"
        )
    return (slope / length).to(seeds.dtype).view(seeds.shape[1:])


def average_seed(seeds: Tensor, returns: Tensor, temperature: float) -> Tensor:
    """[n_z, D], the average of seeds by exp(R / (temperature std(R))), taken to the prior's typical norm sqrt(d).

    What single seeds hold of their own trajectory's luck goes out in the average; what is left tells the policies that
    return much from those that return little, where data are of several.

    Args:
        seeds: [M, n_z, D], posterior seeds of trajectories.
        returns: [M], of the episodes that these are (parts of).
        temperature: above 0; the smaller, the fewer count.

    Raises:
        DataError: there are none.
    """
    r = returns.double()
    if len(r) == 0:
        raise DataError("plan.method = 'average': expected trajectories of known return, got none")
    spread = r.std(correction=0)
    weights = torch.softmax((r - r.max()) / (temperature * spread) if bool(spread > 0) else torch.zeros_like(r), 0)
    mean = (weights @ seeds.flatten(1).double()).view(seeds.shape[1:])
    return (mean * (math.sqrt(mean.numel()) / mean.norm().clamp_min(1e-12))).to(seeds.dtype)


@torch.no_grad()
def along(
    model: GAC,
    normalization: Normalization,
    direction: Tensor,
    n: int,
    radius: float,
    seed: int = 0,
    numbers: Tensor | None = None,
) -> Plans:
    """Samples of the prior, moved ``radius`` sqrt(d) along a direction and back to the prior's typical norm sqrt(d).

    Args:
        direction: [n_z, D], of length 1.
        n: number of plans.
        seed: of the samples.
        numbers: int64 [n], which of the draws of ``seed`` are theirs; None: 0 to n - 1.
    """
    rows = torch.arange(n, device=direction.device) if numbers is None else numbers
    z0 = ops.philox_normal((seed & 0xFFFFFFFF, 0x414C4F4E), rows, 0, direction.numel()).view(n, *direction.shape)
    scale = math.sqrt(direction.numel())
    z0 = z0 + radius * scale * direction
    z0 = z0 * (scale / z0.flatten(1).norm(dim=1).view(-1, 1, 1))
    return predict(model, normalization, z0, None)


@torch.no_grad()
def exploit(
    model: GAC,
    normalization: Normalization,
    seeds: Tensor,
    n: int,
    config: PlanConfig,
    first_states: Tensor | None = None,
    seed: int = 0,
) -> Plans:
    """Plans of the greatest lower bound ``mean - kappa * std + lambda * log p(z0)``, by ascent in a trust region.

    The ascent starts from ``seeds`` and from prior samples. Without given starts the ``n_keep`` best are returned, best
    first, and repeated: what a plan is worth should not depend on how many are asked for. With starts, all candidates
    are scored for each start and the ``n_refine`` most promising ones raised.

    Args:
        seeds: [M, n_z, D], posterior seeds of good trajectories.
        n: number of plans.
        first_states: normalised. [G, obs_dim]: plan for the average over G starts. [n, 1, obs_dim]: row i is the
            start of plan i. None where the return model takes no start.
        seed: of the prior samples.
    """
    generator = torch.Generator(device=seeds.device).manual_seed(seed)
    prior = torch.randn(config.n_prior, *seeds.shape[1:], generator=generator, device=seeds.device)
    candidates = torch.cat((seeds[: config.n_best], prior))
    if len(candidates) == 0:
        raise ValueError("exploit: expected at least one candidate from n_best seeds and n_prior samples, got none")
    per_start = first_states is not None and first_states.ndim == 3
    context = first_states
    if first_states is not None and per_start:
        # All pairs are scored; only the most promising few of each start are worth the ascent.
        k = min(config.n_refine, len(candidates))
        z = model.prior(candidates)
        mean, std = model.return_moments_of_pairs(z, first_states[:, 0])
        top = _bound(mean, std, candidates, config).topk(k, dim=1).indices
        candidates = candidates[top].flatten(0, 1)
        context = first_states[:, 0].repeat_interleave(k, dim=0)
    elif first_states is not None:
        context = first_states.expand(len(candidates), *first_states.shape)
    z0, mean, std = ops.plan_ascent(
        model.prior.weights(),
        model.returns.weights(),
        candidates,
        n_steps=config.n_steps,
        step_size=config.step_size,
        kappa=config.kappa,
        prior_weight=config.prior_weight,
        radius=config.radius,
        max_norm=config.max_norm,
        context=context,
        bf16=config.bf16 == "on",
    )
    bound = _bound(mean, std, z0, config)
    rows = torch.arange(n, device=z0.device)
    if per_start:
        best = bound.view(n, -1).argmax(dim=1) + bound.numel() // n * rows
    else:
        best = bound.topk(min(config.n_keep, len(bound))).indices
        best = best[rows % len(best)]
    return _plans(normalization, z0[best], mean[best], std[best])


def _bound(mean: Tensor, std: Tensor, z0: Tensor, config: PlanConfig) -> Tensor:
    return mean - config.kappa * std - 0.5 * config.prior_weight * z0.square().sum((1, 2))


@torch.no_grad()
def explore(
    model: GAC,
    normalization: Normalization,
    n: int,
    target: float | Tensor,
    config: PlanConfig,
    first_states: Tensor | None = None,
    seed: int = 0,
    start: Tensor | None = None,
    numbers: Tensor | None = None,
) -> Plans:
    """Plans sampled from p(z0 | y = target) by Langevin steps, with a return of less variance.

    What each return model claims of it is divided by ``explore_sharpness``; how far members of an ensemble disagree
    counts in full.

    Args:
        n: number of plans.
        target: wanted return in environment units, one for all or [n].
        first_states: normalised [n, G, obs_dim] starts per plan, where the return model takes them.
        seed: of start and noise.
        start: [n, n_z, D] seeds to start from; None draws them from the prior.
        numbers: int64 [n], which of the draws of ``seed`` are theirs; None: 0 to n - 1.
    """
    c = model.config
    device = normalization.obs_mean.device
    plans = torch.arange(n, device=device) if numbers is None else numbers
    key = (seed & 0xFFFFFFFF, 0x45585052)

    z0 = ops.philox_normal(key, plans, 0, c.n_z * c.dim).view(n, c.n_z, c.dim) if start is None else start
    weights = model.returns.weights()
    shift = weights.b3.new_tensor((0.0, math.log(config.explore_sharpness)))
    z0, mean, std = ops.plan_langevin(
        model.prior.weights(),
        weights._replace(b3=weights.b3 - shift),
        z0,
        normalization.returns(torch.as_tensor(target, dtype=torch.float32, device=device)),
        n_steps=config.n_steps,
        step_size=config.explore_step_size,
        seed=key,
        plans=plans,
        first_step=1,
        max_drift_ratio=0.5,
        context=first_states if model.returns.uses_first_state else None,
        bf16=config.bf16 == "on",
    )
    if config.explore_sharpness != 1.0:
        return predict(model, normalization, z0, first_states)
    return _plans(normalization, z0, mean, std)


@dataclass
class TargetSchedule:
    """The dynamically adjusted target return y* of exploration.

    With b the mean of the best ``n_best`` returns and sd the standard deviation of the data's returns:
    y* = b + 0.5 sd while the last round reached at least y* - sd on average; else y* <- 0.5 y* + 0.5 (b + 0.25 sd).
    """

    n_best: int = 32
    target: float | None = None
    """Current y* in environment units; None before the first round."""

    def update(self, returns: Sequence[float], achieved: Sequence[float] | None = None) -> float:
        """Next target.

        Args:
            returns: of all episodes known, in environment units.
            achieved: of the last round's episodes; None before the first.
        """
        if len(returns) == 0:
            raise ValueError("TargetSchedule.update: expected at least one return, got none")
        y = torch.as_tensor(returns, dtype=torch.float64)
        best = float(y.sort(descending=True).values[: self.n_best].mean())
        sd = float(y.std(correction=0))
        reached = self.target is None or achieved is None or len(achieved) == 0
        if not reached:
            reached = math.fsum(achieved) / len(achieved) >= self.target - sd  # type: ignore[arg-type,operator]
        if reached or self.target is None:
            self.target = best + 0.5 * sd
        else:
            self.target = 0.5 * self.target + 0.5 * (best + 0.25 * sd)
        return self.target
