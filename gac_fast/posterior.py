"""Policy evaluation's inner loop: p(z0 | tau, y) by Langevin chains or a local Gaussian, persistent per trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gac_fast import ops
from gac_fast.config import PosteriorConfig

__all__ = ["PosteriorState", "PosteriorStats", "langevin", "refine", "variational"]

Energy = Callable[[Tensor], Tensor]
"""Seeds [P, n_z, D] -> energies [P]."""

Noise = Callable[[int], Tensor]
"""Step index within the call -> standard normals [P, n_z, D]."""

ADAM_BETAS = (0.9, 0.99)
LOG_STD_RANGE = (-6.0, 1.0)
FIRST_LOG_STD = -0.5

# Second words of the noise's key ("POST", "ONLN"): a run that goes on online numbers its chains anew.
OFFLINE, ONLINE = 0x504F5354, 0x4F4E4C4E


class PosteriorStats(NamedTuple):
    """Diagnostics of one refinement, zero-dimensional tensors (never read back inside an update)."""

    drift_ratio: Tensor  # mean |drift| / |noise| of the last step as taken
    step_size: Tensor  # mean Langevin step as taken
    seed_norm: Tensor  # mean |z0| / sqrt(d)


def _gradient(energy: Energy, z0: Tensor) -> Tensor:
    z0 = z0.detach().requires_grad_(True)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(energy(z0).sum(), z0)
    return grad


def _mean(x: Tensor, is_real: Tensor | None) -> Tensor:
    """Over the chains [P, ...], real ones alone."""
    if is_real is None:
        return x.mean()
    return torch.where(is_real, x.flatten(), 0.0).sum() / is_real.sum()


def langevin(
    energy: Energy,
    z0: Tensor,
    *,
    n_steps: int,
    step_size: float,
    noise: Noise,
    max_drift_ratio: float = math.inf,
    is_real: Tensor | None = None,
) -> tuple[Tensor, PosteriorStats]:
    """Unadjusted Langevin: z0 <- z0 - (s^2 / 2) grad E + s * noise.

    Where the drift would exceed ``max_drift_ratio`` times the noise, s of that trajectory's step is shrunk until it
    does not. On a Gaussian posterior of precision A the ratio is s sqrt(mean A) / 2, and the step is unstable from
    s^2 A = 4 on: a bound of 1/2 keeps s^2 A at 1, whatever the number of steps the energy sums. Where it acts it also
    widens the law sampled: by a quarter if all directions are alike, by more in a few directions far stiffer than the
    rest, which are then stable and not exact. The log has the ratio and the step as taken.

    Args:
        energy: [P, n_z, D] -> [P].
        z0: [P, n_z, D], where the chains are.
        noise: step index -> standard normals like z0.
        is_real: bool [P], chains that the diagnostics are of; None takes all.

    Returns:
        the moved seeds and diagnostics.
    """
    scale = math.sqrt(z0[0].numel())
    s = ratio = torch.full((len(z0), 1, 1), step_size, device=z0.device)
    for step in range(n_steps):
        grad = _gradient(energy, z0)
        grad_norm = grad.flatten(1).norm(dim=1)[:, None, None]
        s = (2 * max_drift_ratio * scale / grad_norm.clamp_min(1e-12)).clamp(max=step_size)
        ratio = s * grad_norm / (2 * scale)
        z0 = z0.detach() - 0.5 * s.square() * grad + s * noise(step)
    return z0, _stats(z0, ratio, s, is_real)


def _stats(z0: Tensor, ratio: Tensor, size: Tensor, is_real: Tensor | None) -> PosteriorStats:
    norm = _mean(z0.flatten(1).norm(dim=1), is_real) / math.sqrt(z0[0].numel())
    return PosteriorStats(_mean(ratio, is_real), _mean(size, is_real), norm)


def variational(
    energy: Energy,
    mean: Tensor,
    log_std: Tensor,
    moments: Tensor,
    n_taken: Tensor,
    *,
    n_steps: int,
    learning_rate: float,
    noise: Noise,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adam on the ELBO of a diagonal Gaussian per trajectory, reparameterised: minimise E_q[E(z0)] - entropy.

    Args:
        energy: [P, n_z, D] -> [P]; its |z0|^2 / 2 is the prior's part of the KL term.
        mean, log_std: [P, n_z, D].
        moments: [P, 4, n_z, D], Adam's first and second moments of mean and log-std.
        n_taken: int64 [P], steps each trajectory has taken before.
        noise: step index -> standard normals like mean; index ``n_steps`` is used for the returned sample.

    Returns:
        sample z0 ~ q [P, n_z, D], mean, log_std, moments, n_taken.
    """
    beta1, beta2 = ADAM_BETAS
    for step in range(n_steps):
        eps = noise(step)
        std = log_std.exp()
        grad = _gradient(energy, mean + std * eps)
        grads = torch.stack((grad, grad * eps * std - 1.0), dim=1)  # [P, 2, n_z, D]
        first = beta1 * moments[:, :2] + (1 - beta1) * grads
        second = beta2 * moments[:, 2:] + (1 - beta2) * grads.square()
        moments = torch.cat((first, second), dim=1)
        n_taken = n_taken + 1
        t = n_taken.to(torch.float64)[:, None, None, None]
        move = (first / (1 - beta1**t)) / ((second / (1 - beta2**t)).sqrt() + 1e-8)
        move = (learning_rate * move).to(mean.dtype)
        mean, log_std = mean - move[:, 0], (log_std - move[:, 1]).clamp(*LOG_STD_RANGE)
    return mean + log_std.exp() * noise(n_steps), mean, log_std, moments, n_taken


class PosteriorState:
    """What each trajectory keeps between updates, two chains per trajectory: given (tau, y), and given tau alone.

    Noise is counter-based: a chain's draws depend on the seed, its id and how many it has had, never on the order of
    batches, so that state and counters are all that a checkpoint needs.

    Attributes:
        tensors: name -> [2 * B, ...]; row i is trajectory i given (tau, y), row B + i given tau alone. They stay where
            they are in memory, in front of one row more, 2 * B, which stands for chains that do not exist: it is read
            where a batch is filled up, never moves, and is no part of a checkpoint.
    """

    def __init__(
        self,
        config: PosteriorConfig,
        n_trajectories: int,
        n_z: int,
        dim: int,
        seed: int,
        device: torch.device,
        word: int = OFFLINE,
    ) -> None:
        self.config = config
        self.seed = (seed & 0xFFFFFFFF, word)
        self.n_trajectories = n_trajectories
        rows = 2 * n_trajectories + 1
        self._memory: dict[str, Tensor] = {"n_draws": torch.zeros(rows, dtype=torch.int64, device=device)}
        self._memory["z0"] = self.normals(torch.arange(rows, device=device), 0, (n_z, dim))
        self._memory["n_draws"] += 1
        if config.method == "variational":
            shape = (rows, n_z, dim)
            self._memory["mean"] = torch.zeros(shape, device=device)
            self._memory["log_std"] = torch.full(shape, FIRST_LOG_STD, device=device)
            self._memory["moments"] = torch.zeros(rows, 4, n_z, dim, device=device)
            self._memory["n_taken"] = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tensors = {name: x[: 2 * n_trajectories] for name, x in self._memory.items()}

    @property
    def z0(self) -> Tensor:
        """Current seeds given (tau, y), [B, n_z, D]."""
        return self.tensors["z0"][: self.n_trajectories]

    def seeds_of_others(self, rows: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Seeds of the chains ``rows`` (int64 [b]), to each those of the one before it: [b, n_z, D].

        Args:
            is_real: bool [b], False for rows at the end that stand for no chain; None: all are real.
        """
        n = torch.full((), len(rows), device=rows.device) if is_real is None else is_real.sum()
        before = torch.remainder(torch.arange(len(rows), device=rows.device) - 1, n)
        return self._memory["z0"][rows[before]]

    def normals(self, rows: Tensor, offset: int, shape: tuple[int, int]) -> Tensor:
        """Draw ``offset`` (from the next one) of the given chains: [len(rows), *shape]."""
        step = self._memory["n_draws"][rows] + offset
        return ops.philox_normal(self.seed, rows, step, shape[0] * shape[1]).view(-1, *shape)

    def begin_at(self, rows: Tensor, z0: Tensor) -> None:
        """Start the chains of trajectories ``rows`` (int64 [n]) anew, both of each, at ``z0`` [n, n_z, D].

        Their counters of draws go on, so that a row used again never repeats the noise of the one before.
        """
        both = torch.cat((rows, rows + self.n_trajectories))
        seeds = torch.cat((z0, z0))
        self._memory["z0"][both] = seeds
        # They count as moved: whoever acted by a seed has made it more than a draw from the prior.
        self._memory["n_draws"][both] += 1
        if self.config.method == "variational":
            self._memory["mean"][both] = seeds
            self._memory["log_std"][both] = FIRST_LOG_STD
            self._memory["moments"][both] = 0.0
            self._memory["n_taken"][both] = 0

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved tensors.

        Raises:
            RuntimeError: a tensor is of another shape.
        """
        for name, tensor in self.tensors.items():
            # copy_ would broadcast.
            if tensors[name].shape != tensor.shape:
                found, expected = list(tensors[name].shape), list(tensor.shape)
                raise RuntimeError(f"posterior.{name}: expected shape {expected}, got {found}")
            tensor.copy_(tensors[name])


def refine(
    state: PosteriorState,
    rows: Tensor,
    energy: Energy,
    n_steps: int | None = None,
    store: bool = True,
    is_real: Tensor | None = None,
    seed_energy: ops.SeedEnergy | None = None,
) -> tuple[Tensor, PosteriorStats]:
    """Move the chains ``rows`` (int64 [b], distinct) by the configured posterior.

    Args:
        n_steps: posterior steps; None takes the configured number.
        store: keep where they went; False leaves the state as it was.
        is_real: bool [b], False where the row is 2 * B, which may stand there any number of times; None: all are real.
        seed_energy: the same energy as the C++ engine takes it for Langevin steps; None: autograd differentiates
            ``energy``.

    Returns:
        seeds [b, n_z, D] and diagnostics.
    """
    config, tensors = state.config, state._memory
    n_steps = config.n_steps if n_steps is None else n_steps
    updated: dict[str, Tensor] = {}
    z0 = tensors["z0"][rows]
    shape = (z0.shape[1], z0.shape[2])

    def noise(step: int) -> Tensor:
        return state.normals(rows, step, shape)

    if config.method == "langevin" and seed_energy is not None:
        z0, size, ratio = ops.posterior_langevin(
            seed_energy,
            z0,
            n_steps=n_steps,
            step_size=config.step_size,
            seed=state.seed,
            ids=rows,
            steps=tensors["n_draws"][rows],
            max_drift_ratio=config.max_drift_ratio,
        )
        stats = _stats(z0, ratio, size, is_real)
        drawn = n_steps
    elif config.method == "langevin":
        z0, stats = langevin(
            energy,
            z0,
            n_steps=n_steps,
            step_size=config.step_size,
            noise=noise,
            max_drift_ratio=config.max_drift_ratio,
            is_real=is_real,
        )
        drawn = n_steps
    else:
        names = ("mean", "log_std", "moments", "n_taken")
        z0, *moved = variational(
            energy, *(tensors[name][rows] for name in names),
            n_steps=n_steps, learning_rate=config.learning_rate, noise=noise,
        )  # fmt: skip
        updated = dict(zip(names, moved, strict=True))
        zero = torch.zeros((), device=z0.device)
        norm = _mean(z0.flatten(1).norm(dim=1), is_real)
        stats = PosteriorStats(zero, zero, norm / math.sqrt(z0[0].numel()))
        drawn = n_steps + 1
    if store:
        for name, value in {**updated, "z0": z0}.items():
            if is_real is not None:
                # The row that stands for no chain is written what it holds, by all alike: no order of writes shows.
                value = torch.where(is_real.view(-1, *(1,) * (value.ndim - 1)), value, tensors[name][rows])
            tensors[name][rows] = value
        tensors["n_draws"][rows] += drawn if is_real is None else drawn * is_real
    return z0, stats
