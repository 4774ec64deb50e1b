"""Online fine-tuning: rounds and their log, chains that begin at the plans, resuming bit for bit, what goes wrong."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from core_fixtures import (
    ACT_DIM,
    OBS_DIM,
    counting_vector,
    interrupted_at,
    make_trajectories,
    model_config,
    seeded_vector,
)
from gymnasium.envs.registration import EnvSpec

import gac_fast
from gac_fast import checkpoint
from gac_fast.config import Config, OnlineConfig, PlanConfig, PosteriorConfig, TrainConfig
from gac_fast.envs.delayed import DelayedReward
from gac_fast.errors import CheckpointError, ConfigError, DataError, EnvError
from gac_fast.plan import TargetSchedule
from gac_fast.policy import Policy, load
from gac_fast.rollout import rollout
from gac_fast.train import online as online_module
from gac_fast.train.metrics import N_COMPARED
from gac_fast.train.online import OnlineTrainer, finetune
from gac_fast.train.trainer import TrainingDivergedError, hold_out

# Of CountingEnv.
LOW, HIGH = np.array([-1.25, -2.5], np.float32), np.array([1.75, 3.5], np.float32)
LENGTHS = [[3, 5], [4], [6, 2], [3]]

# What depends on the clock alone.
CLOCK = {"online/env_steps_per_second", "time_steps_per_second"}


def data(seed: int = 0):
    episodes = make_trajectories([6, 5, 7, 4, 8, 5, 6, 7, 5, 6], seed=seed)
    actions = np.clip(episodes.actions, LOW, HIGH)
    return dataclasses.replace(episodes, actions=actions, action_low=LOW, action_high=HIGH)


def config(train=None, model=None, plan=None, method="langevin", **online) -> Config:
    defaults = {
        "n_steps": 60, "n_envs": 4, "updates_per_round": 3, "capacity": 11, "keep_best": 2, "target_best": 3,
        "fill_episodes": 6, "eval_every": 2, "eval_episodes": 4, "checkpoint_every": 1, "learning_rate": 1e-2,
    }  # fmt: skip
    fields = {"context": "states_actions", "action_token_dropout": 0.2, "return_context": "first_state"}
    training = {
        "n_updates": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup": 2, "held_out": 0.2, "log_every": 3,
        "eval_every": 6, "checkpoint_every": 6, "keep_checkpoints": 100, "device": "cpu",
    }  # fmt: skip
    return Config(
        model=model_config(**(fields | (model or {}))),
        posterior=PosteriorConfig(method=method, tau_only_fraction=0.25),
        plan=PlanConfig(**({"n_steps": 3, "n_best": 3, "n_prior": 2} | (plan or {}))),
        train=TrainConfig(**(training | (train or {}))),
        online=OnlineConfig(**(defaults | online)),
    )  # fmt: skip


def counting():
    """Episodes of known lengths, whose observations name their environment."""
    return counting_vector(LENGTHS)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """They take a second each."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(online_module, "_write_plots", lambda run: None)


@pytest.fixture
def pictures():
    """Asks for the pictures of a run."""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("offline") / "run"
    return gac_fast.train(data(), config(), folder, progress=False, tensorboard=False)


def tune(offline, folder: Path, conf: Config | None = None, vector=None, **options) -> Path:
    options = {"progress": False, "tensorboard": False, "data": data()} | options
    return finetune(
        offline, vector if vector is not None else seeded_vector(4), conf or config(), run_dir=folder, **options
    )


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in CLOCK and not k.startswith("time/")}
            for row in csv.DictReader(file)
        ]


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows_of(folder) if row.get(name)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.latest(folder))[0]


def assert_same_run(one: Path, two: Path) -> None:
    a, b = checkpoint.load(checkpoint.latest(one)), checkpoint.load(checkpoint.latest(two))
    assert a[0].keys() == b[0].keys()
    for name in a[0]:
        assert torch.equal(a[0][name], b[0][name]), name
    drop = {"config", "online"}
    assert {k: v for k, v in a[1].items() if k not in drop} == {k: v for k, v in b[1].items() if k not in drop}
    assert a[1]["online"]["achieved"] == b[1]["online"]["achieved"]
    assert rows_of(one) == rows_of(two)


# Rounds


@pytest.mark.usefixtures("pictures")
def test_a_run_explores_learns_evaluates_and_can_be_loaded(offline_run, tmp_path):
    folder = tune(offline_run, tmp_path / "run")
    before, after = tensors_of(offline_run), tensors_of(folder)
    assert column(folder, "online/episodes") == [4] * len(rows_of(folder))
    steps = column(folder, "online/env_steps")
    assert steps[0] == len(checkpoint.load(checkpoint.list_checkpoints(folder)[1])[0]["online.actions"])
    assert steps[-2] < 60 <= steps[-1]
    assert column(folder, "step") == [9 + 3 * i for i in range(len(steps))]
    moved = [n for n in before if n.startswith("model.") and not torch.equal(before[n], after[n])]
    assert len(moved) > 0.8 * sum(n.startswith("model.") for n in before)
    assert column(folder, "explore/target")
    assert column(folder, "noisy_exploit/achieved")
    assert len(column(folder, "exploit/achieved")) == len(column(folder, "exploit/predicted")) == 2
    shares = [sum(float(row[k]) for k in row if k.startswith("time/")) for row in _all_rows(folder)]
    np.testing.assert_allclose(shares, 1.0, atol=1e-6)

    result = json.loads((folder / "result.json").read_text())
    assert result["env_steps"] == steps[-1]
    assert result["episodes"] == 4 * len(steps)
    assert result["exploit"]["episodes"] == 4
    assert result["begun_at"].endswith("step_00000006")
    for name in ("learning_curves.png", "online.png"):
        assert (folder / "plots" / name).stat().st_size > 10_000, name

    policy = load(folder)
    assert policy.step == 6 + 3 * len(steps)
    assert len(policy.returns) == 10 + min(11, 4 * len(steps))
    # Online episodes are among those to plan from, their seeds where they moved to.
    saved = after["data.rows"]
    torch.testing.assert_close(policy.z0[:10][~_settled(after)[:10]], after["posterior.z0"][:10][~_settled(after)[:10]])
    assert saved[10:].min() >= 10
    assert policy.exploit(4, np.zeros((4, OBS_DIM), np.float32)).z0.shape == (4, policy.model.config.n_z, 16)


def _all_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def _settled(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    settled = torch.zeros(len(tensors["data.returns"]), dtype=torch.bool)
    settled[tensors["best.ids"]] = True
    return settled


@pytest.mark.parametrize("sizes", [[4], [2, 2]])
def test_an_actor_is_told_as_much_with_its_time_taken_as_without(sizes):
    """Of rewards and of rows that have finished, whose actions need not be computed."""

    class Told:
        z0 = np.zeros((4, 1, 2), np.float32)
        device = torch.device("cpu")

        def __init__(self, heard, first=0):
            self.heard, self.first = heard, first

        def split(self, sizes):
            return [Told(self.heard, sum(sizes[:i])) for i in range(len(sizes))]

        def act(self, obs):
            return np.zeros((len(obs), ACT_DIM), np.float32)

        def rest(self, mask):
            self.heard.append((self.first, "rest", mask.tolist()))

        def rewarded(self, rewards):
            self.heard.append((self.first, "rewarded", rewards.tolist()))

    def heard(wrap):
        told, starts = [], np.cumsum([0, *sizes])
        vectors = [counting_vector(LENGTHS[i:j]) for i, j in itertools.pairwise(starts)]
        assert rollout(vectors, lambda obs, first: wrap(Told(told)), 4, seed=0).z0.shape == (4, 1, 2)
        return sorted(told, key=lambda one: one[0])

    bare = heard(lambda actor: actor)
    assert {what for _, what, _ in bare} == {"rest", "rewarded"}
    assert heard(online_module._Watched) == bare


@pytest.mark.parametrize("method", ["langevin", "variational"])
def test_chains_begin_at_the_seeds_that_made_their_episodes(tmp_path, method):
    conf = config(method=method)
    start = gac_fast.train(data(), conf, tmp_path / "offline", progress=False, tensorboard=False)
    seen = []

    class Watched(OnlineTrainer):
        def add(self, explored):
            super().add(explored)
            rows = self.rows[-len(explored.z0) :]
            n = self.posterior.n_trajectories
            z0 = self.posterior.tensors["z0"]
            np.testing.assert_array_equal(z0[rows].numpy(), explored.z0)
            np.testing.assert_array_equal(z0[n + rows].numpy(), explored.z0)
            if method == "variational":
                np.testing.assert_array_equal(self.posterior.tensors["mean"][n + rows].numpy(), explored.z0)
            # What acted in row i is what is kept of row i.
            data = self.buffer.trajectories
            assert [e.observations[0, 0] for e in list(data)[-4:]] == [0, 1, 2, 3]
            seen.append(explored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "OnlineTrainer", Watched)
        tune(start, tmp_path / "run", conf, counting())
    assert len(seen) >= 3
    assert np.abs(seen[0].z0 - seen[1].z0).min() > 0


def test_offline_chains_go_on_where_they_were(offline_run, tmp_path):
    saved = tensors_of(offline_run)
    trainer = OnlineTrainer(config(), online_module.Spaces.of_data(data()), data())
    trainer.begin_at(checkpoint.latest(offline_run))
    n = trainer.posterior.n_trajectories
    assert n == 10 + 11
    torch.testing.assert_close(trainer.posterior.tensors["z0"][:10], saved["posterior.z0"][:10], rtol=0, atol=0)
    torch.testing.assert_close(trainer.posterior.tensors["z0"][n : n + 10], saved["posterior.z0"][10:], rtol=0, atol=0)
    trainer.close()


def test_the_target_follows_what_was_achieved(offline_run, tmp_path):
    conf = config(n_steps=70, exploit_share=0.0)
    rounds = []

    class Watched(OnlineTrainer):
        def next_schedule(self):
            schedule = super().next_schedule()
            rounds.append((self.data.returns.copy(), list(self.achieved), schedule.target))
            return schedule

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "OnlineTrainer", Watched)
        folder = tune(offline_run, tmp_path / "run", conf)
    schedule = TargetSchedule(conf.online.target_best)
    expected = [schedule.update(known.tolist(), achieved or None) for known, achieved, _ in rounds]
    assert [value for _, _, value in rounds] == expected
    assert column(folder, "explore/target") == expected
    assert rounds[0][1] == []
    assert len(rounds[1][1]) == 4
    assert len(set(expected)) > 1


def test_old_episodes_leave_and_the_best_stay(offline_run, tmp_path):
    every = []

    class Watched(OnlineTrainer):
        def add(self, explored):
            every.extend(explored.episodes.returns.tolist())
            # Nothing later is as good as two of the first round.
            returns = explored.episodes.returns.copy()
            if len(every) == 4:
                returns[:2] = every[:2] = [9e3, 8e3]
            super().add(explored._replace(episodes=dataclasses.replace(explored.episodes, returns=returns)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "OnlineTrainer", Watched)
        folder = tune(offline_run, tmp_path / "run", config(n_steps=150), counting())
    state = tensors_of(folder)
    n = 4 * len(rows_of(folder))
    assert n > 11 + 8
    born, returns = state["online.born"], state["online.returns"]
    assert len(born) == 11
    assert int(state["online.n_added"]) == n
    assert set(range(n - 4, n)) <= set(born.tolist())
    assert torch.equal(state["data.returns"][10:], returns)
    assert sorted(returns.tolist())[-2:] == sorted(every)[-2:]
    assert min(born.tolist()) < n - 11


def test_a_control_run_learns_without_acting(offline_run, tmp_path):
    vector = seeded_vector(4)
    steps = []
    vector.step = lambda action: steps.append(1)  # type: ignore[method-assign]
    conf = config(explore="off", n_updates=7, eval_every=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "evaluate", lambda policy, *args: _no_episodes())
        folder = tune(offline_run, tmp_path / "run", conf, vector)
    assert steps == []
    assert column(folder, "online/updates") == [3, 6, 7]
    after, before = tensors_of(folder), tensors_of(offline_run)
    assert not torch.equal(after["model.decoder.log_sigma_a"], before["model.decoder.log_sigma_a"])
    assert len(after["data.returns"]) == 10


def _no_episodes():
    from gac_fast.evaluate import EvalResult
    from gac_fast.rollout import Rollout

    zero = np.zeros(1)
    rollout = Rollout(zero, np.ones(1, np.int64), np.zeros(1, bool), np.zeros((1, OBS_DIM), np.float32))
    return EvalResult("none", zero, np.ones(1, np.int64), zero, zero, rollout, 0, 1.0, {}, None)


def test_from_scratch_random_plans_fill_the_buffer_first(tmp_path):
    folder = tune(None, tmp_path / "run", data=None)
    first = checkpoint.load(checkpoint.list_checkpoints(folder)[0])
    assert first[1]["step"] == 0
    assert len(first[0]["data.returns"]) == 6
    # Units are those of the episodes that came.
    filled = first[0]["online.observations"].double()
    torch.testing.assert_close(first[0]["normalization.obs_mean"].double(), filled.mean(0), rtol=1e-5, atol=1e-5)
    assert first[0]["online.actions"].std() > 0.5
    assert len(rows_of(folder)) >= 2
    assert load(folder).prior_plans(2).return_mean.isfinite().all()


def test_a_fill_that_is_killed_goes_on_where_it_was(tmp_path):
    conf = segment_config(n_steps=10, fill_episodes=10, eval_every=0, capacity=40, checkpoint_every=1)
    whole = tune(None, tmp_path / "whole", conf, data=None)
    explore, calls = online_module.explore, 0

    class Killed(BaseException):
        pass

    def killed(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return explore(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "explore", killed)
        with pytest.raises(Killed):
            tune(None, tmp_path / "part", conf, data=None)
    saved = checkpoint.load(checkpoint.latest(tmp_path / "part"))[1]["online"]
    assert (saved["episodes"], saved["filled"]) == (8, False)
    tune(None, tmp_path / "part", conf, data=None, resume=True)
    assert_same_run(whole, tmp_path / "part")


def test_a_policy_without_its_data_goes_on_with_online_episodes_alone(offline_run, tmp_path):
    with pytest.warns(UserWarning, match="without the data it was trained on"):
        folder = tune(offline_run, tmp_path / "run", data=None)
    after = tensors_of(folder)
    assert len(after["data.returns"]) == len(after["online.returns"])
    before = tensors_of(offline_run)
    assert torch.equal(after["normalization.obs_mean"], before["normalization.obs_mean"])


def test_the_same_seed_gives_the_same_run_and_another_another(offline_run, tmp_path):
    one, two = tune(offline_run, tmp_path / "1"), tune(offline_run, tmp_path / "2")
    assert_same_run(one, two)
    other = tune(offline_run, tmp_path / "3", config(train={"seed": 1}))
    assert not torch.equal(tensors_of(one)["online.actions"][:10], tensors_of(other)["online.actions"][:10])


@pytest.mark.parametrize("explore", ["on", "off"])
def test_the_learning_rate_falls_over_the_budget(offline_run, tmp_path, explore):
    rates = []

    class Watched(OnlineTrainer):
        def run_update(self):
            values = super().run_update()
            rates.append((self.optimizer.param_groups[0]["lr"], self.learning_rate()))
            return values

    conf = config(n_steps=100, explore=explore, n_updates=0 if explore == "on" else 12, final_lr_ratio=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "OnlineTrainer", Watched)
        tune(offline_run, tmp_path / "run", conf)
    used = [rate for rate, _ in rates]
    assert used == sorted(used, reverse=True)
    assert used[0] > 0.9e-2
    assert rates[-1][1] == pytest.approx(0.25e-2)


def test_returns_are_standardised_as_batches_hold_them(offline_run, tmp_path):
    folder = tune(offline_run, tmp_path / "run", config(n_steps=20))
    units = checkpoint.load(checkpoint.latest(folder))[0]
    trainer = OnlineTrainer(config(n_steps=20, radius=0.1), online_module.Spaces.of_data(data()), data())
    trainer.spaces = trainer.spaces._replace(env_id=None)
    trainer.restore(checkpoint.latest(folder))
    drawn = []
    for number in range(1500):
        batch, _ = trainer.batches.draw(number)
        drawn.append(batch.returns)
    trainer.close()
    drawn = torch.cat(drawn)
    # In these units what batches hold is standard; drawing without repetition levels it a little.
    assert abs(float(drawn.mean())) < 0.15
    assert 0.75 < float(drawn.std()) < 1.2
    assert float(units["normalization.return_std"]) == pytest.approx(float(trainer.normalization.return_std))


def test_new_units_of_the_return_leave_what_is_predicted(offline_run):
    trainer = OnlineTrainer(config(), online_module.Spaces.of_data(data()), data())
    trainer.begin_at(checkpoint.latest(offline_run))
    before = trainer.policy().prior_plans(5)
    returns = 100 + 30 * np.arange(4.0)
    episodes = make_trajectories([3, 4, 5, 3])
    episodes = dataclasses.replace(
        episodes, actions=np.clip(episodes.actions, LOW, HIGH), action_low=LOW, action_high=HIGH, returns=returns
    )
    z0 = np.zeros((4, *before.z0.shape[1:]), np.float32)
    trainer.add(online_module.Explored(episodes, z0, np.zeros(4), 0.0, 0.0, 0.0))
    assert float(trainer.normalization.return_mean) > 50
    after = trainer.policy()
    moments = after._predict(before.z0, after.first_observations[:5])
    start = load(offline_run)
    old = start._predict(before.z0, start.first_observations[:5])
    torch.testing.assert_close(moments.return_mean, old.return_mean, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moments.return_std, old.return_std, rtol=1e-4, atol=1e-3)
    trainer.close()


# Stopped and resumed


def test_more_steps_later_is_the_run_that_never_stopped(offline_run, tmp_path):
    # A learning rate that falls over the budget would tell them apart.
    whole = tune(offline_run, tmp_path / "whole", config(n_steps=90, eval_every=0, final_lr_ratio=1.0))
    part = tune(offline_run, tmp_path / "part", config(n_steps=40, eval_every=0, final_lr_ratio=1.0))
    assert len(rows_of(part)) < len(rows_of(whole))
    # The evaluation at the end of the shorter run is in a row the other has without it: weights tell.
    conf = config(n_steps=90, eval_every=0, final_lr_ratio=1.0)
    tune(offline_run, part, conf, resume=True)
    a, b = tensors_of(whole), tensors_of(part)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("update", [8, 12, 14])
def test_an_interrupt_saves_and_a_resumed_run_is_the_same(offline_run, tmp_path, update):
    whole = tune(offline_run, tmp_path / "whole")
    with interrupted_at(OnlineTrainer, update):
        part = tune(offline_run, tmp_path / "part")
    assert checkpoint.latest(part).name == f"step_{update + 1:08d}"
    tune(offline_run, part, resume=True)
    assert_same_run(whole, part)


def test_an_interrupt_while_acting_keeps_the_rounds_before(offline_run, tmp_path):
    whole = tune(offline_run, tmp_path / "whole")
    vector, calls = seeded_vector(4), 0
    step = vector.step

    def interrupted(actions):
        nonlocal calls
        calls += 1
        # In the second round: the first has as many steps as its longest episode.
        if calls == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return step(actions)

    vector.step = interrupted  # type: ignore[method-assign]
    part = tune(offline_run, tmp_path / "part", vector=vector)
    assert checkpoint.latest(part).name == "step_00000009"
    tune(offline_run, part, resume=True)
    assert_same_run(whole, part)


KILLED = """
import os, sys
sys.path.insert(0, "tests")
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_online import tune, config
from gac_fast.train.online import OnlineTrainer

run_update = OnlineTrainer.run_update
def killed(trainer):
    if trainer.step == 13:
        os.kill(os.getpid(), 9)
    return run_update(trainer)
if sys.argv[3] == "kill":
    OnlineTrainer.run_update = killed
tune(Path(sys.argv[1]), Path(sys.argv[2]), config(checkpoint_every=2), resume=sys.argv[3] == "resume")
"""


def test_a_killed_run_goes_on_from_its_last_checkpoint(offline_run, tmp_path):
    def start(folder: str, what: str) -> int:
        arguments = [sys.executable, "-c", KILLED, str(offline_run), str(tmp_path / folder), what]
        return subprocess.run(arguments, cwd=ROOT, timeout=300, check=False).returncode

    assert start("part", "kill") == -signal.SIGKILL
    # After round 2 of 3 updates; the third round had begun.
    assert checkpoint.latest(tmp_path / "part").name == "step_00000012"
    assert start("part", "resume") == 0
    tune(offline_run, tmp_path / "whole", config(checkpoint_every=2))
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    assert len(rows_of(tmp_path / "part")) >= 4


def test_a_run_is_resumed_with_its_own_configuration_and_data_only(offline_run, tmp_path):
    folder = tune(offline_run, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"expected online\.updates_per_round 4, the run to resume has 3"):
        tune(None, folder, config(updates_per_round=4), resume=True)
    with pytest.raises(CheckpointError, match="other offline episodes"):
        tune(None, folder, data=data(seed=1), resume=True)
    with pytest.raises(CheckpointError, match="expected 'online' in its state"):
        tune(None, offline_run, resume=True)
    with pytest.raises(ConfigError, match=r"^resume: expected run_dir"):
        finetune(None, seeded_vector(4), resume=True)


def test_a_run_is_resumed_whatever_its_data_are_called(offline_run, tmp_path):
    called = dataclasses.replace(data(), env_id="hopper-medium-v2")
    spaces = online_module.Spaces.of_data(data())._replace(env_id="Hopper-v5")
    trainer = OnlineTrainer(config(), spaces, called)
    trainer.begin_at(checkpoint.latest(offline_run))
    saved = trainer.save(tmp_path)
    OnlineTrainer(config(), spaces, called).restore(saved)
    alone = OnlineTrainer(config(), spaces)
    alone.add(online_module.Explored(data(), np.zeros((10, 2, 16), np.float32), np.zeros(10), 0.0, 0.0, 0.0))
    saved = alone.save(tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"expected environment 'Walker2d-v5', the run to resume has 'Toy"):
        OnlineTrainer(config(), spaces._replace(env_id="Walker2d-v5")).restore(saved)


# What goes wrong


def test_an_action_that_is_not_finite_names_step_environment_and_checkpoint(offline_run, tmp_path):
    from gac_fast.act import Actor

    act, calls = Actor.act, 0

    def broken(actor, obs):
        nonlocal calls
        calls += 1
        action = act(actor, obs)
        # The last steps of the first round may have been fewer than six; the second has begun.
        if calls == 8:
            action[2] = np.nan
        return action

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Actor, "act", broken)
        with pytest.raises(EnvError, match=r"environment 2 an action that is not finite.*go on from .*step_00000009"):
            tune(offline_run, folder)
    # Those of the first round, and what the second had finished by then.
    assert len(load(folder).returns) >= 14


RARELY_SAVED = {"checkpoint_every": 9, "exploit_share": 0.0}


@pytest.fixture(scope="module")
def rarely_saved(offline_run, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "_write_plots", lambda run: None)
        return tune(offline_run, tmp_path_factory.mktemp("rarely") / "run", config(**RARELY_SAVED))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("loss", r"update 15: loss is nan; a smaller online\.learning_rate.*last good checkpoint.*step_00000012"),
        (
            "chain",
            r"update 15: the plan of offline trajectory 3 is NaN or infinite.*last good checkpoint.*step_00000012",
        ),
        ("plan", r"step 0, environment 3: the model's plan is NaN.*last good checkpoint.*step_00000012"),
    ],
    ids=["loss", "chain", "plan"],
)
def test_what_is_not_finite_is_named_and_loses_nothing(offline_run, rarely_saved, tmp_path, fault, message):
    """Though no checkpoint was written in the rounds before, what they brought is there to go on from."""
    conf = config(**RARELY_SAVED)
    run_update, explore, calls = OnlineTrainer.run_update, Policy.explore, 0

    def broken_update(trainer):
        values, n = run_update(trainer)
        if trainer.step == 15 and fault == "loss":
            values = values | {"loss": values["loss"] * torch.nan}
        elif trainer.step == 15 and fault == "chain":
            trainer.posterior.z0[3, 0] = torch.nan
        return values, n

    def broken_plan(policy, *args, **kwargs):
        nonlocal calls
        calls += 1
        plans = explore(policy, *args, **kwargs)
        if calls == 3 and fault == "plan":
            plans.z0[3, 0, 0] = np.inf
        return plans

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineTrainer, "run_update", broken_update)
        patch.setattr(Policy, "explore", broken_plan)
        with pytest.raises(TrainingDivergedError, match=message):
            tune(offline_run, folder, conf)
    # The episodes that the last updates were to learn from are there too.
    assert len(load(folder).returns) == 10 + min(11, 8 if fault == "plan" else 12)
    tune(offline_run, folder, conf, resume=True)
    assert_same_run(rarely_saved, folder)


def test_a_weight_that_is_not_finite_is_named(offline_run):
    trainer = OnlineTrainer(config(), online_module.Spaces.of_data(data()), data())
    trainer.begin_at(checkpoint.latest(offline_run))
    trainer.check_finite()
    trainer.model.decoder.log_sigma_a.data[0] = torch.nan
    with pytest.raises(TrainingDivergedError, match=r"^update 6: the model's decoder\.log_sigma_a is NaN or infinite$"):
        trainer.check_finite()
    trainer.close()


def test_what_does_not_fit_is_named_before_any_work(offline_run, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(EnvError, match=r"expected obs_dim 3 as in the data, the environment has 4"):
        tune(offline_run, folder, vector=gac_fast.envs.make_vector("pointmaze-umaze", 2))
    with pytest.raises(CheckpointError, match="other episodes than the data given now"):
        tune(offline_run, folder, data=data(seed=3))
    with pytest.raises(CheckpointError, match=r"expected model\.n_layers 3, the run to resume has"):
        tune(offline_run, folder, config(model={"n_layers": 3}))
    with pytest.raises(ConfigError, match="expected one that was loaded from a run"):
        tune(dataclasses_policy(offline_run), folder)
    with pytest.raises(DataError, match="nowhere"):
        tune(offline_run, folder, data="nowhere")
    umaze = dataclasses.replace(data(), env_id="gac_fast/PointMaze-umaze-v0")
    with pytest.raises(EnvError, match=r"^pointmaze-medium: the data are of gac_fast/PointMaze-umaze-v0, another task"):
        tune(None, folder, vector="pointmaze-medium", data=umaze)
    assert not folder.exists()
    for fields, words in (
        ({"explore": "off"}, r"online\.n_updates must be at least 1 where online\.explore = 'off', got 0"),
        ({"capacity": 5}, r"online\.capacity must be at least online\.keep_best \+ online\.n_envs"),
        ({"online_share": 1.5}, r"online\.online_share must be in \[0, 1\], got 1\.5"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(**fields)


def dataclasses_policy(run: Path):
    policy = load(run)
    policy.source = None
    return policy


def test_a_run_that_is_there_is_not_overwritten_unless_told(offline_run, tmp_path):
    folder = tune(offline_run, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        tune(offline_run, folder)
    tune(offline_run, folder, overwrite=True)


def test_spaces_without_bounds_are_refused(tmp_path):
    from gymnasium.spaces import Box

    vector = seeded_vector(4)
    vector.single_action_space = Box(-np.inf, np.inf, (ACT_DIM,), np.float32)
    with pytest.raises(EnvError, match="expected an action space with bounds"):
        tune(None, tmp_path / "run", vector=vector, data=None)


@pytest.mark.parametrize("fault", ["nan_observation", "nan_reward", "crash"])
def test_an_environment_that_fails_is_named_and_loses_nothing(offline_run, tmp_path, fault):
    folder = tmp_path / "run"
    # In the first round, when three of four episodes are over.
    vector = counting_vector(LENGTHS, faults={2: {(0, 5): fault}})
    with pytest.raises(EnvError, match=r"at step 5.*3 finished episodes of this round are kept, go on from .*00000006"):
        tune(offline_run, folder, vector=vector)
    kept = tensors_of(folder)
    assert kept["online.cu_seqlens"].tolist() == [0, 3, 7, 10]
    assert [kept["online.observations"][i, 0].item() for i in (0, 3, 7)] == [0, 1, 3]
    np.testing.assert_array_equal(kept["data.rows"][10:], 10 + kept["online.slots"])
    tune(offline_run, folder, vector=counting(), resume=True)
    assert int(tensors_of(folder)["online.n_added"]) == 3 + 4 * len(rows_of(folder))


def test_the_sum_of_rewards_at_the_end_is_as_good_as_rewards_on_the_way(offline_run, tmp_path):
    """Bit for bit: learning, planning and what is achieved."""
    plain = tune(offline_run, tmp_path / "plain")
    delayed = tune(offline_run, tmp_path / "delayed", vector=DelayedReward(seeded_vector(4)))
    assert_same_run(plain, delayed)
    # Rewards on the way do differ.
    bare, wrapped = seeded_vector(4), DelayedReward(seeded_vector(4))
    for vector in (bare, wrapped):
        vector.reset(seed=1)
    actions = np.zeros((4, ACT_DIM), np.float32)
    assert not np.array_equal(bare.step(actions)[1], wrapped.step(actions)[1])


def test_two_halves_make_the_run_of_one_vector(offline_run, tmp_path):
    one = tune(offline_run, tmp_path / "one", vector=seeded_vector(4))
    halves = tune(offline_run, tmp_path / "halves", vector=[seeded_vector(2), seeded_vector(2)])
    a, b = tensors_of(one), tensors_of(halves)
    assert torch.equal(a["online.cu_seqlens"], b["online.cu_seqlens"])
    for name in ("online.observations", "online.returns", "posterior.z0", "model.decoder.log_sigma_a"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)


def test_ranking_prefers_what_is_much_for_its_start(offline_run):
    trainer = OnlineTrainer(config(), online_module.Spaces.of_data(data()), data())
    trainer.begin_at(checkpoint.latest(offline_run))
    by_return = trainer.data.returns.argsort()[::-1]
    ranks = trainer.ranking()
    usable = trainer.usable.numpy()
    first = next(i for i in by_return if usable[i])
    # The best return leads, beside the one that lies furthest above its start's.
    assert ranks[first] == 0
    assert 1 <= int((ranks[trainer.usable] == 0).sum()) <= 2
    assert len(trainer.best_ids()) == 3
    trainer.close()
    plain = OnlineTrainer(config(model={"return_context": "none"}), online_module.Spaces.of_data(data()), data())
    np.testing.assert_array_equal(plain.ranking().numpy(), data().returns)
    plain.close()


def test_the_fill_is_no_part_of_the_budget(tmp_path):
    conf = config(n_steps=20, fill_episodes=30)
    folder = tune(None, tmp_path / "run", conf, data=None)
    state = checkpoint.load(checkpoint.latest(folder))[1]["online"]
    assert state["fill_steps"] > 60
    assert state["env_steps"] - state["fill_steps"] >= 20
    assert len(rows_of(folder)) >= 1
    assert column(folder, "exploit/achieved")


def test_a_signal_during_the_last_evaluation_leaves_a_settled_checkpoint(offline_run, tmp_path):
    evaluate = online_module._Loop._evaluate

    def interrupted(loop):
        result = evaluate(loop)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module._Loop, "_evaluate", interrupted)
        folder = tune(offline_run, tmp_path / "run", config(eval_every=0))
    assert "best.z0" in tensors_of(folder)


def test_a_round_that_failed_leaves_the_target_of_the_round_before(offline_run, tmp_path):
    folder = tmp_path / "run"
    vector = counting_vector(LENGTHS, faults={2: {(1, 1): "crash"}})
    with pytest.raises(EnvError, match="at step 1"):
        tune(offline_run, folder, vector=vector)
    first = checkpoint.load(checkpoint.list_checkpoints(folder)[-1])[1]["online"]
    assert first["target"] == column(folder, "explore/target")[0]


def test_an_environment_that_fails_in_the_evaluation_loses_no_round(offline_run, tmp_path):
    def broken(*args, **kwargs):
        raise EnvError("the arm fell off")

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "evaluate", broken)
        with pytest.raises(EnvError, match=r"evaluation after round 2: the arm fell off; go on from .*step_00000012"):
            tune(offline_run, folder, config(checkpoint_every=5))
    assert len(load(folder).returns) == 18


def test_another_seed_keeps_the_split_of_the_run_before(offline_run):
    trainer = OnlineTrainer(config(train={"seed": 5}), online_module.Spaces.of_data(data()), data())
    own = trainer.held_out.tolist()
    trainer.begin_at(checkpoint.latest(offline_run))
    usable = tensors_of(offline_run)["data.usable"]
    assert trainer.held_out.tolist() == (~usable).nonzero()[:, 0].tolist() != own
    trainer.close()


def test_cut_episodes_that_were_held_out_stay_so(tmp_path):
    complete = np.ones(len(data()), bool)
    complete[hold_out(data(), config())[0][0]] = False
    cut = dataclasses.replace(data(), complete=complete)
    before = gac_fast.train(cut, config(), tmp_path / "offline", progress=False, tensorboard=False)
    trainer = OnlineTrainer(config(train={"seed": 5}), online_module.Spaces.of_data(cut), cut)
    trainer.begin_at(checkpoint.latest(before))
    held_out = tensors_of(before)["data.held_out"]
    assert torch.equal(trainer.held_out, held_out)
    assert not cut.complete[held_out.numpy()].all()
    assert not trainer.batches._packer.weights[held_out].any()
    trainer.close()


def test_more_environments_than_the_buffer_holds_are_refused(offline_run, tmp_path):
    with pytest.raises(ConfigError, match=r"online\.keep_best \+ 12 environments.*got 11"):
        tune(offline_run, tmp_path / "run", vector=seeded_vector(12))
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_checkpoint_yet_is_begun_anew(offline_run, tmp_path):
    whole = tune(offline_run, tmp_path / "whole")
    part = tune(offline_run, tmp_path / "part")
    for path in checkpoint.list_checkpoints(part):
        shutil.rmtree(path)
    tune(offline_run, part, resume=True)
    assert_same_run(whole, part)


def test_a_resumed_run_needs_no_configuration(offline_run, tmp_path):
    folder = tune(offline_run, tmp_path / "run", config(n_steps=40))
    finetune(None, seeded_vector(4), data=data(), run_dir=folder, resume=True, progress=False, tensorboard=False)


# Runs that were trained on segments

SEGMENT = 2


def rewarded_data():
    episodes = data()
    rewards = np.random.default_rng(1).normal(size=episodes.num_steps).astype(np.float32)
    sums = [part.sum(dtype=np.float64) for part in np.split(rewards, episodes.cu_seqlens[1:-1])]
    return dataclasses.replace(episodes, rewards=rewards, returns=np.array(sums))


def segment_config(**online) -> Config:
    defaults = {"capacity": 16, "n_steps": 40, "checkpoint_every": 2}
    return config({"segment": SEGMENT}, plan={"replan_every": SEGMENT}, **(defaults | online))


@pytest.fixture(scope="module")
def segment_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("segments") / "run"
    return gac_fast.train(rewarded_data(), segment_config(), folder, progress=False, tensorboard=False)


def test_segments_have_their_own_plans_returns_and_chains(segment_run, tmp_path):
    rounds, asked = [], []

    class Watched(OnlineTrainer):
        def add(self, explored):
            check_actions(self, explored)
            super().add(explored)
            rows = self.rows[-len(explored.z0) :]
            n = self.posterior.n_trajectories
            for chain in (rows, n + rows):
                np.testing.assert_array_equal(self.posterior.tensors["z0"][chain].numpy(), explored.z0)
            assert self.opens[-len(explored.z0) :].tolist() == explored.opens.tolist()
            rounds.append(explored)

        def next_schedule(self):
            known, achieved = self.advantages(self.data) * self.normalization.return_std.double(), list(self.achieved)
            schedule = super().next_schedule()
            asked.append((known.tolist(), achieved, schedule.target, []))
            return schedule

    explore = Policy.explore

    def watched(policy, n, target, obs, *args, **kwargs):
        plans = explore(policy, n, target, obs, *args, **kwargs)
        asked[-1][3].append((torch.as_tensor(obs), target))
        return plans

    def check_actions(trainer, explored):
        """Every segment acted by its plan: the same actions again, episode by episode."""
        episodes, numbers = explored.episodes, explored.numbers
        for number in set(numbers.tolist()):
            parts = np.flatnonzero(numbers == number)
            actor = None
            for i in parts:
                z0 = explored.z0[i][None]
                actor = actor or trainer.policy().actor(z0)
                actor.change_plans(z0)
                part = episodes.episode(int(i))
                for state, action in zip(part.observations, part.actions, strict=True):
                    np.testing.assert_allclose(actor.act(state[None])[0], action, rtol=1e-4, atol=1e-5)

    conf = segment_config(action_noise=0.0, n_steps=30, capacity=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_module, "OnlineTrainer", Watched)
        patch.setattr(Policy, "explore", watched)
        folder = tune(segment_run, tmp_path / "run", conf, counting(), data=rewarded_data())

    first = rounds[0]
    assert first.episodes.lengths.tolist() == [2, 1, 2, 2, 2, 2, 2, 2, 1]
    assert first.numbers.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    # (index, episode, step) of the first step of each; step t earned 100 index + episode + t / 10.
    begins = first.episodes.observations[first.episodes.cu_seqlens[:-1]]
    lengths = [3, 4, 6, 3]
    expected = [
        sum(100 * index + episode + t / 10 for t in range(int(step) + 1, lengths[int(index)] + 1))
        for index, episode, step in begins.tolist()
    ]
    assert begins[:, 2].tolist() == [0, 2, 0, 2, 0, 2, 4, 0, 2]
    np.testing.assert_allclose(first.episodes.returns, expected, rtol=1e-12)
    assert all(np.abs(np.diff(first.z0, axis=0)).reshape(8, -1).max(axis=1) > 1e-3)

    # The target: so much beyond what is expected of each start, and it follows what was achieved beyond that.
    start, schedule = load(segment_run), TargetSchedule(conf.online.target_best)
    raised = np.array([False, True, False, True])
    for i, (known, achieved, target, calls) in enumerate(asked):
        assert target == pytest.approx(schedule.update(known, achieved or None), rel=1e-6)
        assert len(calls) == np.bincount(rounds[i].numbers).max()
        if i:
            before = rounds[i - 1]
            mine = ~raised[before.episode]
            np.testing.assert_allclose(achieved, (before.episodes.returns - before.expected)[mine])
    states, wanted = asked[0][3][0]
    model, units = start.model, start.normalization
    z = model.prior(torch.randn(N_COMPARED, 2, 16, generator=torch.Generator().manual_seed(0)))
    mean = model.return_moments_of_pairs(z, units.observations(states))[0].mean(dim=1) * units.return_std
    np.testing.assert_allclose(wanted - asked[0][2], (mean + units.return_mean).detach(), rtol=1e-4, atol=1e-4)
    assert column(folder, "segments/target") == pytest.approx([entry[2] for entry in asked])
    assert column(folder, "online/episodes") == [4] * len(rounds)
    assert json.loads((folder / "result.json").read_text())["episodes"] == 4 * len(rounds)


def test_a_run_on_segments_is_resumed_bit_for_bit(segment_run, tmp_path):
    options = {"conf": segment_config(), "data": rewarded_data()}
    whole = tune(segment_run, tmp_path / "whole", **options)
    # More than there is room for, and the best of them, by what was expected of their starts, are not the latest.
    assert int(tensors_of(whole)["online.n_added"]) > len(tensors_of(whole)["online.born"]) == 16
    with interrupted_at(OnlineTrainer, 10):
        part = tune(segment_run, tmp_path / "part", **options)
    tune(segment_run, part, resume=True, **options)
    assert_same_run(whole, part)


def test_segments_from_scratch_where_all_reward_comes_at_the_end(tmp_path):
    conf = segment_config(n_steps=20, capacity=60)
    folder = tune(None, tmp_path / "run", conf, DelayedReward(seeded_vector(4)), data=None)
    tensors = tensors_of(folder)
    opens, returns = tensors["online.opens"], tensors["online.returns"]
    assert 1 < int(opens.sum()) < len(opens)
    # Every part of an episode has its return.
    assert torch.equal(returns, returns[opens][opens.cumsum(0) - 1])
    assert torch.equal(load(folder).opens, opens)
    assert torch.equal(load(folder).episode_returns, returns)


def test_segments_of_another_length_or_without_rewards_are_refused(offline_run, segment_run, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected train\.segment 2, the checkpoint has 0"):
        tune(offline_run, tmp_path / "run", segment_config(), data=rewarded_data())
    with pytest.raises(DataError, match="keep_rewards=True"):
        tune(segment_run, tmp_path / "run", segment_config())
    vector = seeded_vector(4)
    vector.spec = EnvSpec("Toy-v0", max_episode_steps=7)
    with pytest.raises(ConfigError, match=r"online\.keep_best \+ 4 environments of 4 segments each.*got 16"):
        tune(segment_run, tmp_path / "run", segment_config(), vector, data=rewarded_data())
