"""Advantages of segments: values that do not know what they judge, plans by regression, the decoder's head start."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from core_fixtures import interrupted_at, seeded_vector
from test_offline import assert_same_run
from test_offline import config as offline_config
from test_online import assert_same_run as assert_same_online_run
from test_online import config as online_config
from test_online import rewarded_data, tensors_of, tune

import gac_fast
from gac_fast.config import Config, preset
from gac_fast.data import Trajectories
from gac_fast.data.pointmaze import make_pointmaze_dataset
from gac_fast.envs import maze_spec
from gac_fast.errors import ConfigError, DataError
from gac_fast.evaluate import evaluate
from gac_fast.plan import regression_direction
from gac_fast.policy import ExploitActor, load
from gac_fast.train import offline as offline_module
from gac_fast.train import values as values_module
from gac_fast.train.baseline import BaselineTrainer
from gac_fast.train.offline import OfflineTrainer
from gac_fast.train.online import OnlineTrainer, Spaces
from gac_fast.train.values import fit_values, segment_advantages, values_of_data

SEGMENT = {"segment": 2, "segment_returns": "advantage"}


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    monkeypatch.setattr(values_module, "N_UPDATES", 60)


def config(make=online_config, **train) -> Config:
    """From states alone, as segments want it."""
    model = {"return_context": "none", "context": "states", "window": 1, "action_token_dropout": 0.0}
    return make(model=model).replace(train=SEGMENT | train, plan={"method": "regression"}, posterior={"warmup": 0.5})


def lucky_episodes(n: int = 60, steps: int = 12) -> tuple[Trajectories, np.ndarray, np.ndarray]:
    """The return to go is what the state says and luck that it does not: 3 a step times the first observation, and one
    draw for the whole episode, shared out over its steps. The second observation names the episode."""
    rng = np.random.default_rng(0)
    good, luck = rng.normal(size=(2, n))
    observations = np.repeat(np.stack([good, np.arange(n) / n], 1), steps, axis=0).astype(np.float32)
    rewards = np.repeat(3 * good + 2 * luck, steps).astype(np.float32)
    cu_seqlens = np.arange(n + 1) * steps
    episodes = Trajectories(
        observations, np.zeros((n * steps, 1), np.float32), cu_seqlens, rewards.reshape(n, steps).sum(1, np.float64),
        np.ones(n, np.bool_), np.full(1, -1, np.float32), np.ones(1, np.float32), rewards=rewards,
    )  # fmt: skip
    return episodes, good, luck


def test_values_know_states_and_times_and_no_luck(monkeypatch):
    monkeypatch.setattr(values_module, "N_UPDATES", 600)
    episodes, good, luck = lucky_episodes()
    model = fit_values(episodes, seed=3)
    found = values_of_data(model, episodes, seed=3).reshape(60, 12)
    left = 12 - np.arange(12)
    assert np.corrcoef(found[:, 0], good)[0, 1] > 0.9
    # Nothing of what only the own episode could tell; the members that saw it do know.
    surprise = found - 3 * good[:, None] * left
    assert abs(np.corrcoef(surprise[:, 0], luck)[0, 1]) < 0.3
    seen = model.of_members(torch.from_numpy(episodes.observations), torch.arange(12).repeat(60)).numpy().mean(0)
    seen = seen.reshape(60, 12)
    assert np.corrcoef((seen - found)[:, 0], luck)[0, 1] > 0.45
    # Less is left to earn later.
    assert np.abs(found[:, 0] / 12).mean() == pytest.approx(np.abs(found[:, 8] / 4).mean(), rel=0.35)
    with pytest.raises(DataError, match="at least 5 episodes whose return is known, to fit values to, got 4"):
        fit_values(episodes.subset(range(4)))


def test_advantages_by_hand():
    """Two episodes of 5 and 2 steps, the second one cut."""
    rewards = np.array([1, 2, 4, 8, 16, 32, 64], np.float32)
    episodes = Trajectories(
        np.zeros((7, 1), np.float32), np.zeros((7, 1), np.float32), np.array([0, 5, 7]), np.array([31.0, 96.0]),
        np.array([True, False]), np.full(1, -1, np.float32), np.ones(1, np.float32), rewards=rewards,
    )  # fmt: skip
    raw, episode = episodes.segments(1)
    parts = segment_advantages(raw, np.array([10.0, 20, 30, 40, 50, 60, 70]), episode)
    # The rewards, and the value it leads to, less the one it begins with.
    assert parts.returns.tolist() == [
        1 + 20 - 10,
        2 + 30 - 20,
        4 + 40 - 30,
        8 + 50 - 40,
        16 - 50,
        32 + 70 - 60,
        64 - 70,
    ]
    assert parts.complete.tolist() == [True] * 6 + [False]


def test_a_run_on_advantages_resumes_bit_for_bit_and_predicts_returns(tmp_path):
    conf, episodes = config(offline_config), rewarded_data()
    whole = gac_fast.train(episodes, conf, tmp_path / "whole", progress=False, tensorboard=False)
    with interrupted_at(OfflineTrainer, 6):
        part = gac_fast.train(episodes, conf, tmp_path / "part", progress=False, tensorboard=False)
    with pytest.MonkeyPatch.context() as patch:
        # Values are taken from the checkpoint.
        patch.setattr("gac_fast.train.offline.fit_values", None)
        gac_fast.train(episodes, conf, part, resume=True, progress=False, tensorboard=False)
    shutil.rmtree(part / "checkpoints" / "step_00000007")
    assert_same_run(whole, part)

    policy, raw = load(whole), episodes.segments(2)[0]
    assert policy.values is not None
    assert not np.allclose(policy.returns.numpy(), raw.returns)
    env = seeded_vector(4)
    result = evaluate(policy, env, 4, seed=0)
    start, _ = seeded_vector(4).reset(seed=0)
    plans = policy.exploit(4, start, seed=0)
    values = policy.values.value(torch.as_tensor(start, dtype=torch.float32), torch.zeros(4)).numpy()
    np.testing.assert_allclose(result.predicted, plans.return_mean.numpy() + values, rtol=1e-5)
    assert np.abs(values).min() > 1e-3


def test_a_taken_folder_is_refused_before_values_are_fitted(tmp_path, monkeypatch):
    monkeypatch.setattr("gac_fast.train.offline.fit_values", lambda *_: pytest.fail("values were fitted"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=r"run folder .*thesis is not empty"):
            gac_fast.train(rewarded_data(), config(offline_config), tmp_path / "thesis", progress=False, **flags)
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_fit_takes_few_threads_and_gives_them_back(monkeypatch):
    episodes, _, _ = lucky_episodes(20, 4)
    before, during = torch.get_num_threads(), []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: (during.append(torch.get_num_threads()), randint(*a, **k))[1])
    torch.set_num_threads(3)
    try:
        fit_values(episodes)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(during) == {values_module.MOST_THREADS}


def test_the_decoder_begins_alone():
    trainer = OfflineTrainer(rewarded_data(), config(offline_config))
    before, seen = trainer.posterior.z0.clone(), []
    plan_and_errors = trainer.model.plan_and_errors
    trainer.model.plan_and_errors = lambda z0, *args: seen.append(z0) or plan_and_errors(z0, *args)
    for step in range(12):
        batch, rows = trainer.batches.draw(step)
        values, _ = trainer.run_update()
        if step < 6:
            assert torch.equal(trainer.posterior.z0, before)
            assert torch.equal(seen[-1], trainer.posterior.tensors["z0"][rows].roll(1, 0))
            assert "drift_ratio" not in values
        else:
            assert not torch.equal(trainer.posterior.z0, before)
            assert "drift_ratio" in values
        assert batch.n_trajectories == len(rows)
        assert trainer.plans_known == (step >= 6)
    # A run made longer does not begin again.
    trainer.config = trainer.config.replace(train={"n_updates": 100})
    assert trainer.infers
    # Rows that stand for no chain are nobody's neighbours.
    rows, real = torch.tensor([3, 5, 7, 99, 99]), torch.tensor([True, True, True, False, False])
    others = trainer.posterior.seeds_of_others(rows.clamp(max=trainer.posterior.n_trajectories), real)
    assert torch.equal(others[:3], trainer.posterior.z0[[7, 3, 5]])
    trainer.batches.close()


def test_plans_by_regression_follow_the_returns():
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randn(400, 2, 8, generator=generator)
    true = torch.randn(2, 8, generator=generator)
    true /= true.norm()
    returns = 50 + 20 * (seeds * true).sum((1, 2)) + 20 * torch.randn(400, generator=generator)
    direction = regression_direction(seeds, returns)
    assert float((direction * true).sum()) > 0.9
    assert float(direction.norm()) == pytest.approx(1, rel=1e-6)
    with pytest.raises(DataError, match=r"trajectories of different returns, got 400 that are all 1$"):
        regression_direction(seeds, torch.ones(400))

    trainer = OfflineTrainer(rewarded_data(), config(offline_config))
    policy = trainer.policy()
    trainer.batches.close()
    along = policy.regression_direction()
    scale = along.numel() ** 0.5
    for radius, low, high in ((1e-6, -0.6, 0.6), (1.0, 0.4, 0.95), (50.0, 0.999, 1.0)):
        z0 = policy.exploit(6, radius=radius).z0
        torch.testing.assert_close(z0.flatten(1).norm(dim=1), torch.full((6,), scale))
        cosines = (z0 * along).sum((1, 2)) / scale
        assert low <= float(cosines.mean()) <= high + 1e-6
    # Followed further than they lie: the same as keys and values of z(0) + 2 (z - z(0)).
    acted = policy.exploiting(policy.exploit(2), overrides={"strength": 2.0})
    prior = policy.model.prior
    z, zero = prior(acted.z0), prior(torch.zeros_like(acted.z0))
    _, v = policy.model.decoder.layers[0].plan_keys(zero + 2 * (z - zero))
    torch.testing.assert_close(acted._state.plan_v[0], v.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(acted._state.plan_v[0], policy.model.decoder.layers[0].plan_keys(z)[1])
    with pytest.raises(
        ConfigError, match=r"plan\.method must be ascent or average where model\.return_context = 'first_state'"
    ):
        Config().replace(model={"return_context": "first_state"}, plan={"method": "regression"})


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values_module, "N_UPDATES", 60)
        folder = tmp_path_factory.mktemp("advantages") / "run"
        return gac_fast.train(rewarded_data(), config(), folder, progress=False, tensorboard=False)


def test_fine_tuning_goes_on_with_advantages(offline, tmp_path):
    options = {"conf": config().replace(online={"capacity": 40, "checkpoint_every": 2}), "data": rewarded_data()}
    explored = []

    class Watched(OnlineTrainer):
        def add(self, found):
            explored.append(found)
            super().add(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gac_fast.train.online.OnlineTrainer", Watched)
        whole = tune(offline, tmp_path / "whole", **options)
    tensors, policy = tensors_of(whole), load(offline)
    n = len(policy.returns)
    assert torch.equal(tensors["data.returns"][:n], policy.returns)
    first = explored[0]
    assert first.whole is not None
    # Advantages of an episode's segments add up to how its return compares with the value of its start.
    sums = np.bincount(first.episode, first.episodes.returns)
    np.testing.assert_allclose(sums, first.whole - first.start_values, rtol=1e-6, atol=1e-6)
    starts = first.episodes.observations[first.episodes.cu_seqlens[:-1]][first.opens]
    np.testing.assert_allclose(first.start_values, policy.start_values(starts), rtol=1e-5)
    with interrupted_at(OnlineTrainer, 10):
        part = tune(offline, tmp_path / "part", **options)
    tune(None, part, resume=True, **options)
    assert_same_online_run(whole, part)


def test_advantages_need_values_and_segments():
    with pytest.raises(ConfigError, match=r"train\.segment_returns must be to_go where train\.segment = 0"):
        Config().replace(train={"segment_returns": "advantage"})
    with pytest.raises(ConfigError, match="advantages are over the values of a run on offline data"):
        OnlineTrainer(config(), Spaces.of_data(rewarded_data()))
    # A baseline is trained as it is from returns to go.
    trainer = BaselineTrainer(rewarded_data(), config(offline_config).replace(baseline={"method": "bc"}))
    trainer.run_update()
    trainer.batches.close()
    assert trainer.values is None
    cut = dataclasses.replace(rewarded_data(), rewards=None)
    with pytest.raises(DataError, match="keep_rewards=True"):
        OfflineTrainer(cut, config(offline_config))


def test_the_preset_of_the_larger_mazes_learns_from_segments_of_their_episodes(tmp_path, monkeypatch):
    assert preset("pointmaze-medium") == preset("pointmaze-large")
    monkeypatch.setattr(offline_module, "_write_plots", lambda run: None)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    dataset, spec = make_pointmaze_dataset("large", 6, progress=False), maze_spec("large")
    short = {"n_updates": 1, "batch_size": 4, "bf16": "off", "held_out": 0.0}
    conf = preset("pointmaze-large").replace(train=short, plan={"n_steps": 2})
    with pytest.warns(UserWarning, match="the first steps of a segment are learnt without what came before them"):
        run = gac_fast.train(dataset, conf, tmp_path / "run", progress=False, tensorboard=False)
    policy = load(run)
    assert policy.env_id == spec.env_id
    assert (len(policy.returns), int(policy.opens.sum())) == (6 * spec.horizon // 100, 6)
    starts = policy.first_observations[policy.opens].numpy()
    plans = policy.exploit(6, starts)
    assert np.isfinite(policy.start_values(starts) + plans.return_mean.numpy()).all()
    assert isinstance(policy.exploiting(plans), ExploitActor)
