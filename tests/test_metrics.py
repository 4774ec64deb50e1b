"""Offline metrics where the answer is known: by formula on any model, by training on episodes with a hidden goal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from core_fixtures import goal_trajectories, make_trajectories, model_config, random_seeds

from gac_fast.config import Config, PosteriorConfig, TrainConfig
from gac_fast.train.metrics import held_out_metrics, infer_from_trajectory
from gac_fast.train.offline import OfflineTrainer


def trainer(data, **fields) -> OfflineTrainer:
    config = Config(
        model=model_config(**fields), posterior=PosteriorConfig(action_temperature=0.1),
        train=TrainConfig(
            n_updates=300, batch_size=32, learning_rate=1e-2, warmup=10, held_out=0.25, device="cpu", seed=1
        ),
    )  # fmt: skip
    return OfflineTrainer(data, config)


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, float], dict[str, float], OfflineTrainer]:
    """Metrics before and after a short training on episodes whose actions and return follow a hidden goal."""
    t = trainer(goal_trajectories(160, 12), return_dropout=0.0, window=2)
    before = t.metrics()
    for _ in range(300):
        t.run_update()
    return before, t.metrics(), t


def test_plans_steer_after_training_on_hidden_goals(trained):
    before, after, _ = trained
    # Actions are 0.8 g: two goals uniform on [-1, 1] differ by 0.8 sqrt(2 / 3) = 0.65 rms, episodes of one batch alike.
    assert after["held_out/steering"] > 0.4
    assert after["held_out/steering"] > 3 * before["held_out/steering"]
    assert after["held_out/nll_other_plan"] > after["held_out/nll_per_step"] + 1.0


def test_the_return_is_read_from_the_trajectory_alone(trained):
    before, after, _ = trained
    assert after["held_out/tau_only_corr"] > 0.8
    assert after["held_out/return_rmse"] < 0.6 < before["held_out/return_rmse"]
    assert 0.4 < after["held_out/return_coverage"] <= 1.0
    assert after["held_out/return_nll"] < before["held_out/return_nll"]


def test_the_spread_of_actions_is_fitted(trained):
    _, after, t = trained
    ids = t.held_out
    batch = t.batches.of(ids)
    z0 = infer_from_trajectory(t.model, batch, ids, t.config, t.config.train.seed)
    with torch.no_grad():
        rms = t.model.action_errors(batch, t.model.prior(z0)).mean(0).sqrt()
        sigma = t.model.decoder.log_sigma_a.exp()
    assert bool(((sigma / rms - 1).abs() < 0.5).all())
    # A Gaussian of that spread, in nats per step.
    expected = float((sigma.log() + 0.5 * (rms / sigma) ** 2).sum()) + math.log(2 * math.pi)
    assert after["held_out/nll_per_step"] == pytest.approx(expected, abs=1e-3)


def test_the_metrics_are_their_formulas():
    t = trainer(
        make_trajectories([5, 8, 3, 6, 7, 4, 9, 5, 6, 7, 5, 4], complete=[True] * 10 + [False, True]),
        return_context="first_state",
    )
    ids = torch.tensor([1, 10, 4, 6])
    found = held_out_metrics(t.model, t.batches, ids, t.config, seed=3)
    batch = t.batches.of(ids)
    z0 = infer_from_trajectory(t.model, batch, ids, t.config, 3)
    with torch.no_grad():
        own = t.model.mean_actions(batch, t.model.prior(z0)).double()
        other = t.model.mean_actions(batch, t.model.prior(z0[[2, 3, 0, 1]])).double()
        sigma = t.model.decoder.log_sigma_a.exp().double()
        mean, std = (x.double().numpy() for x in t.model.return_moments(t.model.prior(z0), batch.first_states))
    for name, actions in (("nll_per_step", own), ("nll_other_plan", other)):
        density = torch.distributions.Normal(actions, sigma).log_prob(batch.actions.double())
        assert found[name] == pytest.approx(-float(density.sum(-1).mean()), rel=1e-5)
    assert found["steering"] == pytest.approx(float((own - other).square().mean().sqrt()), rel=1e-4)
    # Episode 10 was cut: its label is not used.
    known = [0, 2, 3]
    mean, std, y = mean[known], std[known], batch.returns.double().numpy()[known]
    assert found["tau_only_corr"] == pytest.approx(np.corrcoef(mean, y)[0, 1], rel=1e-4)
    plans = t.model.prior(torch.randn(32, 2, 16, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        promised = [t.model.return_moments(plans, s.expand(32, -1))[0].mean() for s in batch.first_states[known]]
    left = np.corrcoef(mean - np.array(promised), y - np.array(promised))[0, 1]
    assert found["plan_corr"] == pytest.approx(left, rel=1e-3)
    assert found["return_rmse"] == pytest.approx(np.sqrt(np.mean((y - mean) ** 2)), rel=1e-5)
    assert found["return_coverage"] == pytest.approx(np.mean(np.abs(y - mean) <= std))
    density = -0.5 * ((y - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    assert found["return_nll"] == pytest.approx(-density.mean(), rel=1e-5)


def test_many_trajectories_are_measured_in_chunks_of_two_or_more():
    t = trainer(make_trajectories([3] * 90))
    ids = torch.arange(65)
    found = held_out_metrics(t.model, t.batches, ids, t.config)
    sizes = [len(chunk) for chunk in ids.tensor_split(2)]
    parts = [held_out_metrics(t.model, t.batches, chunk, t.config) for chunk in ids.tensor_split(2)]
    expected = sum(part["nll_per_step"] * n for part, n in zip(parts, sizes, strict=True)) / 65
    assert found["nll_per_step"] == pytest.approx(expected, rel=1e-4)


def test_returns_that_are_unknown_give_no_return_metrics():
    t = trainer(make_trajectories([5] * 8, complete=[True] * 5 + [False] * 3))
    found = held_out_metrics(t.model, t.batches, torch.tensor([5, 6, 7]), t.config)
    assert found.keys() == {"nll_per_step", "nll_other_plan", "steering"}


def test_one_trajectory_is_too_few():
    t = trainer(make_trajectories([5] * 8))
    with pytest.raises(ValueError, match="ids: expected at least 2 trajectories, got 1"):
        held_out_metrics(t.model, t.batches, torch.tensor([3]), t.config)


def test_inference_from_the_trajectory_does_not_see_the_return_and_is_reproducible():
    t = trainer(make_trajectories([5] * 8))
    ids = torch.tensor([1, 2])
    batch = t.batches.of(ids)
    z0 = infer_from_trajectory(t.model, batch, ids, t.config, 0)
    shifted = batch._replace(returns=batch.returns + 100)
    assert torch.equal(z0, infer_from_trajectory(t.model, shifted, ids, t.config, 0))
    assert not torch.equal(z0, infer_from_trajectory(t.model, batch, ids, t.config, 1))
    assert z0.shape == random_seeds(2, t.config.model).shape
    assert all(p.requires_grad and p.grad is None for p in t.model.parameters())
    # The noise goes with the trajectory, not with its place in the batch.
    swapped = infer_from_trajectory(t.model, t.batches.of(ids.flip(0)), ids.flip(0), t.config, 0)
    assert torch.allclose(swapped.flip(0), z0, rtol=0, atol=1e-4)
