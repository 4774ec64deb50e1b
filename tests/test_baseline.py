"""Behaviour cloning and the decision transformer: what they learn from, what acts, and what a target does."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from core_fixtures import goal_trajectories, make_batch, make_model, make_normalization, model_config, seeded_vector

from gac_fast import checkpoint, load
from gac_fast.baseline import BaselinePolicy, ReturnActor
from gac_fast.cli import main
from gac_fast.config import BaselineConfig, Config, TrainConfig
from gac_fast.data import Trajectories, from_episodes
from gac_fast.errors import ConfigError, DataError
from gac_fast.plan import Plans
from gac_fast.rollout import rollout
from gac_fast.train.baseline import episodes_of
from gac_fast.train.offline import train

REPLAY = ROOT / "tests" / "data" / "hopper-medium-replay-cut.hdf5"


def made(lengths: list[int], complete: list[bool]) -> Trajectories:
    """Episode i, whose step t rewards 10 i + t."""
    rng = np.random.default_rng(0)
    episodes = [
        {"observations": rng.normal(size=(n, 3)), "actions": rng.uniform(-1, 1, (n, 2)), "complete": whole,
         "rewards": 10.0 * i + np.arange(n)}
        for i, (n, whole) in enumerate(zip(lengths, complete, strict=True))
    ]  # fmt: skip
    return from_episodes(episodes, keep_rewards=True)


def baseline(method: str, best: float = 1.0) -> Config:
    return Config(baseline=BaselineConfig(method=method, best=best))


def test_cut_episodes_teach_no_return_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    data = made([2, 3, 1], [True, False, True])
    with caplog.at_level(logging.WARNING):
        seen = episodes_of(data, baseline("dt"))
    assert "dt: 1 cut episodes of 3 are left out" in caplog.text
    # Rewards 0, 1 and 20.
    np.testing.assert_array_equal(seen.observations[:, -1], [1, 1, 20])
    np.testing.assert_array_equal(seen.observations[:, :-1], data.observations[[0, 1, 5]])
    np.testing.assert_array_equal(seen.returns, [1, 20])
    assert episodes_of(data, baseline("bc")) is data
    with pytest.raises(DataError, match="all 1 were cut"):
        episodes_of(made([2], [False]), baseline("dt"))
    with pytest.raises(DataError, match="load them with keep_rewards=True"):
        episodes_of(dataclasses.replace(data, rewards=None), baseline("dt"))


def test_the_best_are_taken_by_return_in_their_order() -> None:
    # Returns 1, 33 (cut), 41, 3 * 30 + 3, 40: the best half of the four whole ones.
    data = made([2, 3, 2, 3, 1], [True, False, True, True, True])
    np.testing.assert_array_equal(episodes_of(data, baseline("bc", 0.5)).returns, [41, 93])
    assert len(episodes_of(data, baseline("bc", 0.01))) == 1
    with pytest.raises(ConfigError, match=r"baseline.best must be 1 where baseline.method = 'none', got 0.5"):
        baseline("none", 0.5)


@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_acting_reads_the_return_to_go_as_training_does(context: str) -> None:
    """Two vectors in threads of their own against one full pass over the observations with their returns to go."""
    config = model_config(context=context, prior="identity")
    model, units = make_model(config, obs_dim=4), make_normalization(obs_dim=4)
    first = make_normalization().obs_mean.new_zeros(6, 4)
    policy = BaselinePolicy(
        model, units, baseline("dt"), None, torch.arange(6.0), first, torch.ones(6, dtype=torch.bool)
    )  # fmt: skip
    assert (policy.obs_dim, policy.default_target) == (3, 5.0)
    target = np.linspace(-2, 3, 5)
    zeros = torch.zeros(5, config.n_z, config.dim)
    actors = []

    def make(obs: np.ndarray, start: int) -> ReturnActor:
        plans = Plans(zeros, torch.from_numpy(target), torch.zeros(5))
        actors.append(policy.actor(plans))
        return actors[-1]

    result = rollout([seeded_vector(3), seeded_vector(2)], make, 5, seed=3, keep=5)
    for i, (obs, actions) in enumerate(zip(result.observations, result.actions, strict=True)):
        # The reward of step t follows from the state after it; the last one earns nothing that is read.
        after = np.abs(obs[1:].astype(np.float64)).sum(1)
        to_go = target[i] - np.concatenate(([0], np.cumsum(1 - after / 3)))
        batch = make_batch([len(obs)], obs_dim=4)._replace(
            observations=units.observations(torch.from_numpy(np.column_stack((obs, to_go)).astype(np.float32))),
            actions=units.actions(torch.from_numpy(actions)),
        )
        with torch.no_grad():
            expected = units.to_environment(model.mean_actions(batch, model.prior(zeros[:1])))
        np.testing.assert_allclose(actions, expected.numpy(), atol=2e-5)


def test_an_actor_starts_anew_at_its_targets() -> None:
    model = make_model(model_config(prior="identity"), obs_dim=4)
    zeros = torch.zeros(2, model.config.n_z, model.config.dim)
    actor = ReturnActor(model, make_normalization(obs_dim=4), zeros, np.array([5.0, 7.0]))
    obs = np.zeros((2, 3), np.float32)
    begun = actor.act(obs)
    actor.rewarded(np.array([1.0, 2.0]))
    np.testing.assert_array_equal(actor.to_go, [4, 5])
    actor.reset(np.array([True, False]))
    np.testing.assert_array_equal(actor.to_go, [5, 5])
    np.testing.assert_array_equal(actor.act(obs)[0], begun[0])
    actor.reset(plans=Plans(zeros, torch.tensor([8.0, 9.0]), torch.zeros(2)))
    np.testing.assert_array_equal(actor.to_go, [8, 9])
    # Tensors take another way to the same decoder.
    from_array = actor.act(obs)
    actor.reset()
    np.testing.assert_allclose(actor.act(torch.from_numpy(obs)).numpy(), from_array, atol=1e-6)
    with pytest.raises(ValueError, match=r"obs: expected shape \[2, 3\], got \[2, 4\]"):
        actor.act(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="targets: expected 2 finite numbers"):
        ReturnActor(model, make_normalization(obs_dim=4), zeros, np.array([5.0, np.nan]))


def goal_data() -> Trajectories:
    """Episodes of ten steps that all go one way, and are paid for it at their end."""
    data = goal_trajectories(64, 10)
    rewards = np.zeros((64, 10), np.float32)
    rewards[:, -1] = data.returns
    return dataclasses.replace(data, rewards=rewards.ravel())


TINY = Config(
    model=model_config(),
    train=TrainConfig(n_updates=60, batch_size=16, warmup=5, learning_rate=1e-2, checkpoint_every=30, eval_every=30),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("baselines")
    return {
        method: train(
            goal_data(), TINY.replace(baseline={"method": method}), root / method, progress=False, tensorboard=False
        )
        for method in ("bc", "dt")
    }


def first_actions(policy: BaselinePolicy, plans: Plans) -> np.ndarray:
    obs = np.random.default_rng(1).normal(size=(len(plans), 3)).astype(np.float32)
    return np.asarray(policy.actor(plans).act(obs))[:, 0]


def test_the_return_asked_for_moves_the_actions(trained: dict[str, Path]) -> None:
    policy = load(trained["dt"])
    assert isinstance(policy, BaselinePolicy)
    # The return is 10 + 5 g and the action 0.8 g.
    for goal in (-0.8, 0.0, 0.8):
        acted = first_actions(policy, policy.explore(32, 10 + 5 * goal))
        assert acted.mean() == pytest.approx(0.8 * goal, abs=0.15)
    assert policy.exploit(2).return_mean.tolist() == [policy.default_target] * 2
    assert policy.default_target == pytest.approx(float(policy.returns[policy.usable].max()))
    with pytest.raises(ValueError, match="which say the target return, got bare seeds"):
        policy.actor(policy.exploit(2).z0)


def test_behaviour_cloning_acts_like_the_mean_and_promises_nothing(trained: dict[str, Path]) -> None:
    policy = load(trained["bc"])
    assert isinstance(policy, BaselinePolicy)
    plans = policy.exploit(32)
    assert bool(plans.return_mean.isnan().all())
    # From one state alone nothing is known of the goal.
    assert abs(first_actions(policy, plans).mean()) < 0.25
    for call in (lambda: policy.explore(1, 3.0), lambda: policy.prior_plans(1), lambda: policy.posterior_best(1)):
        with pytest.raises(ConfigError, match="expected"):
            call()


@pytest.mark.parametrize("method", ["bc", "dt"])
def test_resumed_is_as_if_never_stopped_and_nothing_of_plans_is_kept(
    method: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    whole = checkpoint.load(checkpoint.checkpoint_path(trained[method], 60))[0]
    run = Path(shutil.copytree(trained[method], tmp_path / "run"))
    shutil.rmtree(checkpoint.checkpoint_path(run, 60))
    config = TINY.replace(baseline={"method": method})
    train(goal_data(), config, run, resume=True, progress=False, tensorboard=False)
    again = checkpoint.load(checkpoint.latest(run))[0]
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert len(whole["posterior.z0"]) == 0
    text = (run / "metrics.csv").read_text()
    assert "held_out/action_error" in text
    assert "drift_ratio" not in text


def test_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = ["--preset", "tiny", "--train.n-updates", "2", "--train.held-out", "0", "--run-dir", str(run)]
    assert main(["baseline", "bc", "--best", "0.5", "--data", str(REPLAY), "--no-tensorboard", *flags]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["baseline"] == {"method": "bc", "best": 0.5}
    assert main(["eval", str(run), "--episodes", "2"]) == 0
    (entry,) = json.loads((run / "result.json").read_text())["evaluations"].values()
    assert (entry["predicted_mean"], entry["plot"]) == (None, None)
    assert main(["finetune", str(run), "--run-dir", str(tmp_path / "online")]) == 2
    assert "a baseline has no plans to explore with, got 'bc'" in capsys.readouterr().err

    assert main(["baseline", "dt", "--data", str(REPLAY), "--no-tensorboard", "--overwrite", *flags]) == 0
    assert main(["eval", str(run), "--episodes", "2", "--target", "500"]) == 0
    out = capsys.readouterr().out
    assert "target 500 (dt, target 500)" in out
    assert "predicted std" not in out
    ((name, entry),) = json.loads((run / "result.json").read_text())["evaluations"].items()
    assert "target 500" in name
    assert (entry["target"], entry["predicted_mean"]) == (500, 500)
