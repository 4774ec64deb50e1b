"""Langevin and variational inference against closed forms; persistent state; long episodes."""

from __future__ import annotations

import math

import pytest
import torch
from core_fixtures import make_batch, make_model, model_config, random_seeds
from torch import Tensor

from gac_fast import ops
from gac_fast.config import PosteriorConfig
from gac_fast.posterior import LOG_STD_RANGE, PosteriorState, langevin, refine, variational
from gac_fast.train.update import frozen

N_Z, DIM = 2, 2
D = N_Z * DIM

# How many standard errors a statistic may be off: about one false alarm in 10^6 comparisons.
SIGMAS = 5.0


class LinearGaussian:
    """z0 ~ N(0, I), actions M z0 + N(0, T_a), return w z0 + N(0, T_y): the energy and its exact posterior."""

    def __init__(self, stiffness: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(3)
        self.M = stiffness * torch.randn(6, D, generator=generator, dtype=torch.float64)
        self.w = stiffness * torch.randn(D, generator=generator, dtype=torch.float64)
        self.actions = torch.randn(6, generator=generator, dtype=torch.float64)
        self.y, self.t_a, self.t_y = 1.5, 0.5, 0.25
        eye = torch.eye(D, dtype=torch.float64)
        self.precision = eye + self.M.T @ self.M / self.t_a + torch.outer(self.w, self.w) / self.t_y
        self.mean = torch.linalg.solve(self.precision, self.M.T @ self.actions / self.t_a + self.w * self.y / self.t_y)

    def energy(self, z0: Tensor) -> Tensor:
        z = z0.flatten(1).double()
        actions = (self.actions - z @ self.M.T).square().sum(1) / (2 * self.t_a)
        return 0.5 * z.square().sum(1) + actions + (self.y - z @ self.w).square() / (2 * self.t_y)

    def stationary(self, s: float) -> Tensor:
        """Covariance of the unadjusted chain at step s."""
        eye = torch.eye(D, dtype=torch.float64)
        return torch.linalg.inv(self.precision @ (eye - s**2 / 4 * self.precision))

    def chains(self, p: int, n_steps: int, s: float, **options) -> Tensor:
        generator = torch.Generator().manual_seed(0)

        def noise(step: int) -> Tensor:
            return torch.randn(p, N_Z, DIM, generator=generator)

        z0, _ = langevin(self.energy, noise(-1), n_steps=n_steps, step_size=s, noise=noise, **options)
        return z0.flatten(1).double()


def worst_deviation(z0: Tensor, mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """Largest error of sample mean and covariance, in their standard errors for independent normal rows."""
    n = len(z0)
    variance = covariance.diag()
    mean_error = (z0.mean(0) - mean).abs() / (variance / n).sqrt()
    spread = ((torch.outer(variance, variance) + covariance.square()) / n).sqrt()
    return float(mean_error.max()), float(((z0.T.cov() - covariance).abs() / spread).max())


def test_langevin_at_the_default_step_has_the_covariance_of_the_unadjusted_chain():
    problem = LinearGaussian()
    s = PosteriorConfig().step_size
    eigenvalues = torch.linalg.eigvalsh(problem.precision)
    assert s == 0.3
    assert 4 < float(eigenvalues[-1]) < 4 / s**2
    # The slowest direction forgets its start by (1 - s^2 lambda / 2)^n.
    assert (1 - s**2 * float(eigenvalues[0]) / 2) ** 200 < 1e-4
    z0 = problem.chains(20_000, 200, s)
    mean_error, covariance_error = worst_deviation(z0, problem.mean, problem.stationary(s))
    assert mean_error < SIGMAS
    assert covariance_error < SIGMAS
    # Sharp enough to tell the two covariances apart.
    assert worst_deviation(z0, problem.mean, torch.linalg.inv(problem.precision))[1] > 3 * SIGMAS


def test_langevin_samples_the_posterior_as_the_step_goes_to_zero():
    problem = LinearGaussian()
    exact = torch.linalg.inv(problem.precision)
    s, p = 0.05, 10_000
    # The bias of order s^2 / 4 lies below the standard error of p samples.
    bias = float(((problem.stationary(s) - exact).diag() / exact.diag()).max())
    assert bias < 2 * math.sqrt(2 / p)
    mean_error, covariance_error = worst_deviation(problem.chains(p, 1500, s), problem.mean, exact)
    assert mean_error < SIGMAS
    assert covariance_error < SIGMAS + bias / math.sqrt(2 / p)


def test_the_drift_bound_keeps_steep_posteriors_stable():
    """Where s^2 A = 36 lets the plain step explode, the bound finds a step near s^2 A = 1 and keeps sampling."""
    precision, d, p, s = 400.0, 64, 200, 0.3
    generator = torch.Generator().manual_seed(0)

    def run(n_steps: int, max_drift_ratio: float) -> tuple[Tensor, float]:
        z0, stats = langevin(
            lambda z0: 0.5 * precision * z0.square().sum((1, 2)), torch.randn(p, 1, d, generator=generator),
            n_steps=n_steps, step_size=s, noise=lambda _: torch.randn(p, 1, d, generator=generator),
            max_drift_ratio=max_drift_ratio,
        )  # fmt: skip
        return z0, float(stats.step_size)

    assert float(run(10, math.inf)[0].square().mean()) > 1e6
    z0, step = run(600, 0.5)
    assert 0.8 < step * math.sqrt(precision) < 1.2
    # With s^2 = d / (A^2 |z0|^2) the variance settles at 5/4 of the posterior's.
    assert 1.15 < float(z0.square().mean()) * precision < 1.35


def test_the_shipped_defaults_sample_the_same_law_where_the_mean_curvature_is_moderate():
    """Default step and bound, 256 directions of precision 1 to 8: the bound never acts, the covariance is exact."""
    config, d, p = PosteriorConfig(), 256, 2_000
    s = config.step_size
    precision = torch.linspace(1.0, 8.0, d)
    generator = torch.Generator().manual_seed(0)
    z0, stats = langevin(
        lambda z0: 0.5 * (precision * z0.flatten(1).square()).sum(1), torch.randn(p, 2, d // 2, generator=generator),
        n_steps=200, step_size=s, noise=lambda _: torch.randn(p, 2, d // 2, generator=generator),
        max_drift_ratio=config.max_drift_ratio,
    )  # fmt: skip
    assert float(stats.step_size) == pytest.approx(s)
    expected = 1 / (precision * (1 - s**2 / 4 * precision))
    error = (z0.flatten(1).var(0) / expected - 1).abs() / math.sqrt(2 / p)
    assert float(error.max()) < SIGMAS
    # Sharp enough to see the discretisation at all.
    assert float(((z0.flatten(1).var(0) * precision - 1).abs() / math.sqrt(2 / p)).max()) > SIGMAS


def test_the_drift_bound_shrinks_the_step_of_steep_trajectories_alone():
    zero_noise = torch.zeros(2, N_Z, DIM)
    slope = torch.tensor([1.0, 1000.0])

    def energy(z0: Tensor) -> Tensor:
        return slope * z0.flatten(1).sum(1)

    z0, stats = langevin(energy, zero_noise, n_steps=1, step_size=0.3, noise=lambda _: zero_noise, max_drift_ratio=0.5)
    # |drift| / |noise| = s |grad| / (2 sqrt(d)) and |grad| = slope * sqrt(d): 0.15 for the first, 150 for the second.
    assert z0[0].flatten().tolist() == pytest.approx([-0.5 * 0.3**2] * D)
    assert z0[1].flatten().tolist() == pytest.approx([-0.5 * 0.001**2 * 1000] * D)
    assert float(stats.drift_ratio) == pytest.approx((0.15 + 0.5) / 2)
    assert float(stats.step_size) == pytest.approx((0.3 + 0.001) / 2)


def test_langevin_moves_by_the_written_formula():
    problem = LinearGaussian()
    z0 = random_seeds(5, model_config(dim=8, n_heads=1), dtype=torch.float64)[:, :, :DIM]
    eps = torch.randn(z0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved, stats = langevin(problem.energy, z0, n_steps=1, step_size=0.2, noise=lambda _: eps)
    grad = (z0.flatten(1) - problem.mean) @ problem.precision
    expected = z0.flatten(1) - 0.02 * grad + 0.2 * eps.flatten(1)
    assert torch.allclose(moved.flatten(1), expected, rtol=0, atol=1e-12)
    assert float(stats.drift_ratio) == pytest.approx(float((0.1 * grad.norm(dim=1) / math.sqrt(D)).mean()))
    assert float(stats.seed_norm) == pytest.approx(float(expected.norm(dim=1).mean()) / math.sqrt(D))
    assert not moved.requires_grad


def test_variational_finds_the_mean_and_the_inverse_of_the_precisions_diagonal():
    problem = LinearGaussian()
    p = 500
    generator = torch.Generator().manual_seed(0)
    shape = (p, N_Z, DIM)
    mean, log_std = torch.zeros(shape), torch.full(shape, -0.5)
    moments, n_taken = torch.zeros(p, 4, N_Z, DIM), torch.zeros(p, dtype=torch.int64)
    # A falling learning rate lets Adam settle.
    for learning_rate in (0.1, 0.03, 0.01, 0.003, 0.001):
        z0, mean, log_std, moments, n_taken = variational(
            problem.energy, mean, log_std, moments, n_taken, n_steps=150, learning_rate=learning_rate,
            noise=lambda _: torch.randn(shape, generator=generator),
        )  # fmt: skip
    assert n_taken.tolist() == [750] * p
    means, variances = mean.flatten(1).double(), (2 * log_std).exp().flatten(1).double()
    exact = 1 / problem.precision.diag()
    for found, expected in ((means, problem.mean), (variances, exact)):
        standard_error = found.std(0) / math.sqrt(p)
        assert bool(((found.mean(0) - expected).abs() < SIGMAS * standard_error + 2e-3 * exact.sqrt()).all())
    # Not the diagonal of the covariance, which a factorised Gaussian does not match.
    assert float((torch.linalg.inv(problem.precision).diag() - exact).abs().max()) > 0.02
    # The sample is drawn from the Gaussian returned.
    standardised = ((z0 - mean) / log_std.exp()).flatten()
    assert abs(float(standardised.std()) - 1) < SIGMAS / math.sqrt(2 * standardised.numel())


@pytest.mark.parametrize(("curvature", "start", "end"), [(1e12, -5.95, -6.0), (0.0, 0.95, 1.0)])
def test_variational_log_std_stays_in_range(curvature, start, end):
    shape = (1, 1, 2)
    state = (torch.zeros(shape), torch.full(shape, start), torch.zeros(1, 4, 1, 2), torch.zeros(1, dtype=torch.int64))
    _, _, log_std, _, _ = variational(
        lambda z0: curvature * z0.square().sum((1, 2)), *state, n_steps=1, learning_rate=0.1,
        noise=lambda _: torch.ones(shape),
    )  # fmt: skip
    assert LOG_STD_RANGE == (-6.0, 1.0)
    assert log_std.flatten().tolist() == [end, end]


# ---------------------------------------------------------------------------------------------------------------------
# A long episode with many actions


def stiff_model(n_steps: int = 1000, act_dim: int = 6):
    """A model whose actions depend strongly on the plan, and one long episode."""
    model = make_model(model_config(window=8), act_dim=act_dim)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.plan_out.weight.mul_(6)
        model.decoder.head.weight.mul_(3)
    return model, make_batch([n_steps], act_dim=act_dim)


def run_chain(max_drift_ratio: float, n_steps: int = 80) -> tuple[list[float], list[float]]:
    """|z0| / sqrt(d) and the drift ratio of every step."""
    model, batch = stiff_model()
    z0 = random_seeds(1, model.config)
    shape = z0.shape
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        trunk = model.trunk(batch)
    norms, ratios = [], []
    with frozen(model):
        for _ in range(n_steps):
            z0, stats = langevin(
                lambda z: model.energy(z, batch, 0.5, 0.5, trunk), z0, n_steps=1, step_size=0.3,
                noise=lambda _: torch.randn(shape, generator=generator), max_drift_ratio=max_drift_ratio,
            )  # fmt: skip
            norms.append(float(stats.seed_norm))
            ratios.append(float(stats.drift_ratio))
    return norms, ratios


def test_a_1000_step_6_action_episode_keeps_the_chain_stable():
    norms, ratios = run_chain(PosteriorConfig().max_drift_ratio)
    assert all(math.isfinite(norm) and 0.5 < norm < 2.0 for norm in norms)
    assert max(ratios) <= 0.5 + 1e-6
    # The bound is what does it.
    plain_norms, plain_ratios = run_chain(math.inf, n_steps=20)
    assert max(plain_ratios) > 5.0
    assert max(plain_norms) > 3.0


# ---------------------------------------------------------------------------------------------------------------------
# Persistent state


def state(method="langevin", b=4, seed=0, **fields) -> PosteriorState:
    return PosteriorState(PosteriorConfig(method=method, **fields), b, 2, 16, seed, torch.device("cpu"))


def quadratic(z0: Tensor) -> Tensor:
    return z0.square().sum((1, 2))


@pytest.mark.parametrize("method", ["langevin", "variational"])
def test_refine_moves_the_chosen_rows_alone(method):
    posterior = state(method)
    before = {name: tensor.clone() for name, tensor in posterior.tensors.items()}
    rows = torch.tensor([6, 1])
    z0, stats = refine(posterior, rows, quadratic)
    others = [0, 2, 3, 4, 5, 7]
    for name, tensor in posterior.tensors.items():
        assert torch.equal(tensor[others], before[name][others]), name
        assert bool((tensor[rows] != before[name][rows]).flatten(1).any(1).all()) if tensor.ndim > 1 else True, name
    assert torch.equal(posterior.tensors["z0"][rows], z0)
    assert torch.equal(posterior.z0[1], z0[1])
    assert posterior.tensors["n_draws"][1] == 1 + 3 + (method == "variational")
    assert all(math.isfinite(float(x)) for x in stats)


@pytest.mark.parametrize("method", ["langevin", "variational"])
def test_chains_do_not_depend_on_the_order_of_batches(method):
    one, two = state(method), state(method)
    for rows in ([0, 1], [2, 3], [1, 2]):
        refine(one, torch.tensor(rows), quadratic)
    for rows in ([3, 2], [1, 0], [2, 1]):
        refine(two, torch.tensor(rows), quadratic)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name]), name


@pytest.mark.parametrize("method", ["langevin", "variational"])
def test_loaded_state_goes_on_bit_for_bit(method):
    one, two = state(method), state(method, seed=0)
    rows = torch.arange(8)
    refine(one, rows, quadratic)
    two.load({name: tensor.clone() for name, tensor in one.tensors.items()})
    first, second = refine(one, rows, quadratic)[0], refine(two, rows, quadratic)[0]
    assert torch.equal(first, second)


def test_every_draw_is_new_and_every_seed_another():
    posterior = state()
    rows = torch.arange(8)
    draws = [posterior.normals(rows, offset, (2, 16)) for offset in range(3)]
    refine(posterior, rows, quadratic)
    draws.append(posterior.normals(rows, 0, (2, 16)))
    # The draw after three steps is the one that was the fourth before.
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    stacked = torch.stack(draws).flatten()
    assert abs(float(stacked.mean())) < SIGMAS / math.sqrt(stacked.numel())
    assert not torch.equal(state(seed=0).z0, state(seed=1).z0)
    assert torch.equal(state(seed=1).z0, state(seed=1).z0)


def test_posterior_passes_leave_the_weights_without_gradient():
    model = make_model()
    batch = make_batch([5, 6])
    posterior = state(b=2)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        refine(posterior, torch.tensor([0, 1]), lambda z0: model.energy(z0, batch, 0.5, 0.5))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    counts = ops.dispatch_counts()
    assert sum(n for (op, _), n in counts.items() if op == "block") == 3 * model.config.n_layers
