"""Offline runs: reproducible, resumable bit for bit, stopped cleanly, never ruined by a diverged update."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import row_error
from core_fixtures import make_trajectories, model_config

import gac_fast
from gac_fast import checkpoint, ops
from gac_fast.config import Config, PosteriorConfig, TrainConfig
from gac_fast.errors import CheckpointError, ConfigError, DataError, EnvError
from gac_fast.policy import from_checkpoint, load
from gac_fast.train import offline
from gac_fast.train import trainer as trainer_module
from gac_fast.train.metrics import N_COMPARED
from gac_fast.train.offline import OfflineTrainer, TrainingDivergedError, pick_device, uses_bf16
from gac_fast.train.update import compiled

LENGTHS = [6, 5, 7, 4, 8, 5, 6, 7, 5, 6]
COMPLETE = [True] * 7 + [False] + [True] * 2

# What depends on the clock alone.
CLOCK = {"time_steps_per_second"}


def data(seed: int = 0, **fields):
    return make_trajectories(LENGTHS, complete=COMPLETE, seed=seed, **fields)


def config(method="langevin", model=None, **train) -> Config:
    """Twelve updates with logs, metrics and checkpoints at different beats."""
    defaults = {
        "n_updates": 12, "batch_size": 4, "learning_rate": 1e-2, "warmup": 3, "held_out": 0.2, "log_every": 3,
        "eval_every": 6, "checkpoint_every": 4, "keep_checkpoints": 10, "device": "cpu",
    }  # fmt: skip
    fields = {"context": "states_actions", "action_token_dropout": 0.2, "return_context": "first_state"}
    return Config(
        model=model_config(**(fields | (model or {}))),
        posterior=PosteriorConfig(method=method, tau_only_fraction=0.25),
        train=TrainConfig(**(defaults | train)),
    )  # fmt: skip


def run(path: Path, conf: Config | None = None, dataset=None, **options) -> Path:
    return gac_fast.train(
        dataset or data(), conf or config(), path, **({"progress": False, "tensorboard": False} | options)
    )


def checkpoints(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {p.name: checkpoint.load(p)[0] for p in checkpoint.list_checkpoints(path)}


def metrics(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def assert_same_run(one: Path, two: Path, but: tuple[str, ...] = ()) -> None:
    a, b = checkpoints(one), checkpoints(two)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key in a[name].keys() - set(but):
            assert torch.equal(a[name][key], b[name][key]), f"{name}: {key}"
    assert metrics(one) == metrics(two)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes most of the time of so short a run; one test does without this."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(offline, "_write_plots", lambda run: None)


@pytest.fixture
def pictures():
    """Asks for the pictures of a run."""


@pytest.fixture(scope="module", params=["langevin", "variational"])
def whole(request, tmp_path_factory) -> tuple[Path, Config]:
    """An uninterrupted run."""
    conf = config(request.param)
    return run(tmp_path_factory.mktemp("whole") / "run", conf), conf


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


@pytest.mark.usefixtures("pictures")
def test_a_run_folder_is_complete(tmp_path):
    path = run(tmp_path / "run", tensorboard=True)
    assert json.loads((path / "config.json").read_text()) == config().to_dict()
    assert {"python", "packages", "git", "command"} <= json.loads((path / "environment.json").read_text()).keys()
    assert [p.name for p in checkpoint.list_checkpoints(path)] == ["step_00000004", "step_00000008", "step_00000012"]
    assert (path / "plots" / "learning_curves.png").stat().st_size > 1000
    assert any((path / "tensorboard").iterdir())
    rows = {int(row["step"]): row for row in metrics(path)}
    assert list(rows) == [3, 6, 9, 12]
    trained = {
        "loss",
        "action_error",
        "return_error",
        "nll_per_step",
        "drift_ratio",
        "langevin_step",
        "seed_norm",
        "grad_norm",
    }
    held_out = {
        "nll_per_step",
        "nll_other_plan",
        "steering",
        "tau_only_corr",
        "return_rmse",
        "return_coverage",
        "return_nll",
    }
    assert trained | {f"held_out/{name}" for name in held_out} <= rows[6].keys()
    assert all(rows[step][name] for step in rows for name in trained)
    assert all(bool(rows[step]["held_out/steering"]) == (step in (6, 12)) for step in rows)
    assert float(rows[3]["learning_rate"]) == pytest.approx(1e-2)


def test_parameters_and_chains_moved_and_held_out_chains_did_not(whole):
    path, conf = whole
    start = OfflineTrainer(data(), conf)
    end = checkpoint.load(checkpoint.latest(path))[0]
    for name, p in start.model.named_parameters():
        assert not torch.equal(p, end[f"model.{name}"]), name
    moved = (end["posterior.z0"] != start.posterior.tensors["z0"]).flatten(1).any(1)
    held = start.held_out.tolist()
    assert len(held) == 2
    # Chains given (tau, y) first, then those given tau alone; episode 7 was cut, so its return is never shown.
    assert not bool(moved[held].any())
    assert not bool(moved[[10 + i for i in held]].any())
    assert not bool(moved[7])
    others = [i for i in range(10) if i not in held and i != 7]
    assert bool(moved[others].all())
    assert bool((end["posterior.n_draws"][moved] > 1).all())


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    path = run(tmp_path / "run", config(checkpoint_every=2, keep_checkpoints=3))
    assert [p.name for p in checkpoint.list_checkpoints(path)] == ["step_00000008", "step_00000010", "step_00000012"]


def test_no_held_out_episodes_no_metrics(tmp_path):
    path = run(tmp_path / "run", config(held_out=0.0))
    assert not any(name.startswith("held_out") for name in metrics(path)[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Reproduction


def test_the_same_seed_gives_the_same_run(whole, tmp_path):
    path, conf = whole
    # The global generator's state is not an input.
    torch.manual_seed(12345)
    np.random.seed(54321)  # noqa: NPY002
    assert_same_run(path, run(tmp_path / "again", conf))


def test_another_seed_gives_another_run(whole, tmp_path):
    path, conf = whole
    other = run(tmp_path / "other", conf.replace(train={"seed": 1}))
    a, b = (checkpoint.load(checkpoint.latest(p))[0] for p in (path, other))
    for key in ("model.decoder.head.weight", "posterior.z0", "posterior.n_draws"):
        assert not torch.equal(a[key], b[key]), key
    assert metrics(path) != metrics(other)


@pytest.mark.parametrize("step", [4, 8, 12])
def test_resume_from_any_checkpoint_is_bit_identical(whole, step, tmp_path):
    path, conf = whole
    resumed = tmp_path / "run"
    shutil.copytree(path, resumed)
    for p in checkpoint.list_checkpoints(resumed):
        if p.name > f"step_{step:08d}":
            shutil.rmtree(p)
    torch.manual_seed(999)
    run(resumed, conf, resume=True)
    assert_same_run(path, resumed)


def test_a_run_that_kept_a_generator_for_its_batches_can_be_resumed(whole, tmp_path):
    """As checkpoints did before a batch followed from its number."""
    path, conf = whole
    tensors, state = checkpoint.load(checkpoint.checkpoint_path(path, 8))
    state["config"]["train"].pop("prefetch")
    old = tmp_path / "run"
    shutil.copytree(path, old)
    shutil.rmtree(checkpoint.checkpoint_path(old, 12))
    checkpoint.save(checkpoint.checkpoint_path(old, 8), tensors | {"rng.batches": torch.Generator().get_state()}, state)
    run(old, conf, resume=True)
    shutil.rmtree(checkpoint.checkpoint_path(old, 8))
    shutil.copytree(checkpoint.checkpoint_path(path, 8), checkpoint.checkpoint_path(old, 8))
    assert_same_run(path, old)


@pytest.mark.usefixtures("cpp_engine")
def test_batches_prepared_ahead_are_the_same_and_leave_no_thread(whole, tmp_path):
    path, conf = whole
    before = set(threading.enumerate())
    assert_same_run(path, run(tmp_path / "none", conf.replace(train={"prefetch": 0})))
    assert_same_run(path, run(tmp_path / "many", conf.replace(train={"prefetch": 9})))
    assert set(threading.enumerate()) == before
    # A run that ends by an error leaves none either.
    with pytest.raises(TrainingDivergedError):
        run(tmp_path / "diverged", conf.replace(train={"learning_rate": 1e25, "warmup": 0, "log_every": 1}))
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on_as_if_nothing_was(whole, number, tmp_path, monkeypatch):
    path, conf = whole
    run_update = OfflineTrainer.run_update

    def interrupted(self):
        if self.step == 6:
            os.kill(os.getpid(), number)
        return run_update(self)

    with monkeypatch.context() as patch:
        patch.setattr(OfflineTrainer, "run_update", interrupted)
        stopped = run(tmp_path / "run", conf)
    assert [p.name for p in checkpoint.list_checkpoints(stopped)] == ["step_00000004", "step_00000007"]
    run(stopped, conf, resume=True)
    shutil.rmtree(checkpoint.checkpoint_path(stopped, 7))
    assert_same_run(path, stopped)


def test_a_finished_run_may_be_lengthened(tmp_path):
    path = run(tmp_path / "run")
    run(path, config(n_updates=16), resume=True)
    assert checkpoint.latest(path).name == "step_00000016"
    assert int(metrics(path)[-1]["step"]) == 16


def test_planning_may_change_and_bfloat16_may_not_between_run_and_resumption(tmp_path):
    path = run(tmp_path / "run", config(bf16="on"))
    state = checkpoint.load(checkpoint.latest(path))[1]
    assert state["bf16"] is True
    longer = config(bf16="on", n_updates=14).replace(plan={"radius": 2.0})
    run(path, longer, resume=True)
    assert load(path).config.plan.radius == 2.0
    trainer = OfflineTrainer(data(), config(bf16="off"))
    with pytest.raises(CheckpointError, match=r"train\.bf16"):
        trainer.restore(checkpoint.latest(path))
    # "auto" takes what was decided where the run began, whatever it would mean here.
    started = OfflineTrainer(data(), config(bf16="auto"))
    started.model.bf16 = not started.model.bf16
    saved = started.save(tmp_path / "auto")
    again = OfflineTrainer(data(), config(bf16="auto"))
    before = again.model.bf16
    again.restore(saved)
    assert again.model.bf16 is not before


@pytest.mark.parametrize("field", ["observations", "actions", "action_high"])
def test_resume_refuses_data_that_differ_anywhere(whole, field, tmp_path):
    path, conf = whole
    dataset = data()
    changed = getattr(dataset, field).copy()
    changed[-1] += 0.5
    trainer = OfflineTrainer(dataclasses.replace(dataset, **{field: changed}), conf)
    with pytest.raises(CheckpointError, match="trained on other episodes"):
        trainer.restore(checkpoint.latest(path))


@pytest.mark.parametrize(("size", "fraction", "expected"), [(4, 0.125, 1), (8, 0.25, 2), (4, 0.0, 0), (1, 0.5, 0)])
def test_some_chains_of_every_batch_see_no_return(size, fraction, expected):
    conf = config(batch_size=size).replace(posterior={"tau_only_fraction": fraction})
    trainer = OfflineTrainer(make_trajectories(LENGTHS), conf)
    batch, rows = trainer.batches.draw(0)
    assert int((~batch.has_return).sum()) == int((rows >= len(LENGTHS)).sum()) == expected


def test_the_return_of_a_cut_episode_influences_nothing(whole, tmp_path):
    path, conf = whole
    dataset = data()
    changed = dataclasses.replace(dataset, returns=np.where(dataset.complete, dataset.returns, 1e4))
    assert_same_run(path, run(tmp_path / "run", conf, changed), but=("data.returns",))
    # While the label of a complete one does.
    changed = dataclasses.replace(dataset, returns=dataset.returns + np.eye(10)[0])
    other = run(tmp_path / "other", conf, changed)
    assert metrics(other) != metrics(path)


@pytest.mark.usefixtures("cpp_engine")
def test_reference_and_fast_ops_train_alike(tmp_path):
    ops.reset_dispatch_counts()
    fast = run(tmp_path / "fast")
    assert ops.dispatch_counts()["philox_normal", "cpp"] > 0
    ops.reset_dispatch_counts()
    with ops.backend("reference"):
        plain = run(tmp_path / "plain")
    assert {name for _, name in ops.dispatch_counts()} == {"reference"}
    a, b = (checkpoint.load(checkpoint.latest(path))[0] for path in (fast, plain))
    # Normals agree to 1e-6; twelve updates with Adam's division by small moments amplify that.
    for key in a:
        if key.startswith(("model.", "posterior.z0")):
            assert torch.allclose(a[key], b[key], rtol=0, atol=1e-3), key
    last = [float(metrics(path)[-1]["loss"]) for path in (fast, plain)]
    assert last[0] == pytest.approx(last[1], rel=1e-4)


def test_bfloat16_runs(tmp_path):
    path = run(tmp_path / "run", config(bf16="on"))
    losses = [float(row["loss"]) for row in metrics(path)]
    exact = [float(row["loss"]) for row in metrics(run(tmp_path / "exact"))]
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.05)
    assert uses_bf16(config(bf16="on"), torch.device("cpu"))
    assert not uses_bf16(config(bf16="off"), torch.device("cpu"))
    assert isinstance(uses_bf16(config(bf16="auto"), torch.device("cpu")), bool)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_diverged_update_raises_and_is_never_saved(tmp_path):
    conf = config(learning_rate=1e25, warmup=0, log_every=100, checkpoint_every=1)
    with pytest.raises(
        TrainingDivergedError, match=r"update \d+: \w+ is (nan|inf); the checkpoints in .* are from before"
    ):
        run(tmp_path / "run", conf)
    for name, tensors in checkpoints(tmp_path / "run").items():
        for key, value in tensors.items():
            assert not value.is_floating_point() or bool(torch.isfinite(value).all()), f"{name}: {key}"


def test_divergence_shows_in_the_log_row_too(tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"smaller train.learning_rate"):
        run(tmp_path / "run", config(learning_rate=1e25, warmup=0, log_every=1, checkpoint_every=100))


def test_an_existing_run_is_not_overwritten_unasked(whole):
    path, conf = whole
    before = checkpoints(path).keys()
    with pytest.raises(ConfigError, match="already holds a run: resume it, overwrite it or choose another folder"):
        run(path, conf)
    assert checkpoints(path).keys() == before


def test_overwrite_starts_anew(tmp_path):
    path = run(tmp_path / "run")
    run(path, config(n_updates=4), overwrite=True)
    assert [p.name for p in checkpoint.list_checkpoints(path)] == ["step_00000004"]
    assert int(metrics(path)[-1]["step"]) == 4


def test_resume_asks_for_the_same_configuration_data_and_environment(whole):
    path, conf = whole
    with pytest.raises(CheckpointError, match=r"expected train.learning_rate 0.5, the run to resume has 0.01"):
        run(path, conf.replace(train={"learning_rate": 0.5}), resume=True)
    with pytest.raises(CheckpointError, match=r"expected model.window 4, the run to resume has 3"):
        run(path, conf.replace(model={"window": 4}), resume=True)
    with pytest.raises(CheckpointError, match="trained on other episodes than the data given now"):
        run(path, conf, data(seed=1), resume=True)
    with pytest.raises(CheckpointError, match="expected env_id 'Other-v0' as in the data, the checkpoint has 'Toy-v0'"):
        run(path, conf, data(env_id="Other-v0"), resume=True)
    with pytest.raises(CheckpointError, match="expected act_dim 4 as in the data, the checkpoint has 2"):
        run(path, conf, data(act_dim=4), resume=True)


def test_an_environment_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(EnvError, match="Pendulum-v1: the policy was trained on"):
        run(tmp_path / "run", env="Pendulum-v1")
    assert not (tmp_path / "run").exists()


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="resume: expected run_dir to name the run to resume, got None"):
        gac_fast.train(data(), config(), resume=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["posterior.z0", "rng.torch", "model.decoder.head.weight"])
def test_resume_from_a_checkpoint_that_lacks_a_tensor(whole, name, tmp_path):
    path, conf = whole
    tensors, state = checkpoint.load(checkpoint.latest(path))
    checkpoint.save(
        checkpoint.checkpoint_path(tmp_path / "run", 12), {k: v for k, v in tensors.items() if k != name}, state
    )
    with pytest.raises(CheckpointError, match=name):
        run(tmp_path / "run", conf, resume=True)


def test_data_that_leave_nothing_to_train_on():
    with pytest.raises(DataError, match="expected more than 2 episodes, which are held out, got 2"):
        OfflineTrainer(make_trajectories([3, 4]), config())
    with pytest.raises(DataError, match="expected a training episode whose return is known, all 8 were cut"):
        OfflineTrainer(make_trajectories(LENGTHS, complete=[False] * 10), config())
    dataset = data()
    held = OfflineTrainer(dataset, config()).held_out.numpy()
    cut = dataclasses.replace(dataset, complete=np.isin(np.arange(10), held))
    with pytest.raises(DataError, match="expected a training episode whose return is known, all 8 were cut"):
        OfflineTrainer(cut, config())


def test_an_unusable_device_is_named():
    with pytest.raises(ConfigError, match="device: expected auto, cpu or a CUDA device, got 'quantum'"):
        pick_device("quantum")
    with pytest.raises(ConfigError, match="device: expected auto, cpu or a CUDA device, got 'meta'"):
        pick_device("meta")
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="device: expected auto, cpu or a CUDA device, got 'cuda'"):
            pick_device("cuda")


def test_threads_are_set_where_asked_for(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run(tmp_path / "run", config(n_updates=1, n_threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_seeds_that_planning_starts_from_are_settled_and_their_chains_untouched(whole):
    _path, conf = whole
    trainer = OfflineTrainer(data(), conf)
    fresh = trainer.policy()
    # Nothing was moved yet: all are prior draws, and still something to plan from.
    assert int(fresh.usable.sum()) == int(trainer.usable.sum())
    trainer.run_update()
    visited = trainer.posterior.tensors["n_draws"][:10] > 1
    assert 0 < int(visited.sum()) < int(trainer.usable.sum())
    assert torch.equal(trainer.policy().usable, trainer.usable & visited)
    before = {name: value.clone() for name, value in trainer.posterior.tensors.items()}
    ids, seeds = trainer.best_seeds()
    assert all(torch.equal(before[name], value) for name, value in trainer.posterior.tensors.items())
    returns = trainer.data.returns[ids.numpy()]
    assert returns.tolist() == sorted(returns, reverse=True)
    assert not set(trainer.held_out.tolist()) & set(ids.tolist())
    assert trainer.data.complete[ids.numpy()].all()
    batch = trainer.batches.of(ids, torch.ones(len(ids), dtype=torch.bool))
    p = conf.posterior
    with torch.no_grad():
        misfit = [
            float(
                (
                    trainer.model.energy(z, batch, p.action_temperature, p.return_temperature)
                    - 0.5 * z.square().sum((1, 2))
                ).sum()
            )
            for z in (before["z0"][ids], seeds)
        ]
    assert misfit[1] < misfit[0]
    settled = trainer.policy(settle=True)
    assert torch.equal(settled.z0[ids], seeds)
    assert bool(settled.usable[ids].all())


def test_seeds_are_settled_by_the_engine_as_by_autograd(whole, cpp_engine):
    trainer = OfflineTrainer(data(), whole[1])
    trainer.run_update()
    ops.reset_dispatch_counts()
    _, seeds = trainer.best_seeds()
    by_engine = ops.dispatch_counts().get(("posterior_langevin", "cpp"), 0)
    assert (by_engine > 0) == (whole[1].posterior.method == "langevin")
    with ops.backend("reference"):
        _, expected = trainer.best_seeds()
    assert row_error(seeds, expected) < 1e-4
    assert row_error(trainer.posterior.z0[trainer.best_ids()], expected) > 1e-2


def test_resume_names_what_a_checkpoint_lacks_and_the_device_it_was_made_on(whole, tmp_path):
    path, conf = whole
    tensors, state = checkpoint.load(checkpoint.latest(path))
    for key in ("bf16", "data_fingerprint"):
        checkpoint.save(tmp_path / key, tensors, {k: v for k, v in state.items() if k != key})
        with pytest.raises(CheckpointError, match=f"expected '{key}' in its state"):
            OfflineTrainer(data(), conf).restore(tmp_path / key)
    checkpoint.save(tmp_path / "cuda", tensors, state | {"device": "cuda"})
    with pytest.raises(CheckpointError, match=r"the run was made on cuda, this is cpu: set train\.device"):
        OfflineTrainer(data(), conf).restore(tmp_path / "cuda")
    tensors["posterior.z0"] = tensors["posterior.z0"][:1]
    checkpoint.save(tmp_path / "shape", tensors, state)
    with pytest.raises(CheckpointError, match=r"posterior\.z0: expected shape"):
        OfflineTrainer(data(), conf).restore(tmp_path / "shape")


def test_chains_that_see_no_return_are_drawn_from_all_lengths():
    """Drawn without replacement by length, the last of a batch are short ones; which hide their return must not be."""
    dataset = make_trajectories([2] * 30 + [40] * 10)
    trainer = OfflineTrainer(dataset, config(batch_size=24).replace(posterior={"tau_only_fraction": 0.25}))
    hidden, long = 0, 0
    for number in range(60):
        _, rows = trainer.batches.draw(number)
        ids = rows[rows >= 40] - 40
        hidden, long = hidden + len(ids), long + int((ids >= 30).sum())
    # Eight of ten long ones are in training and in nearly every batch of 24: a third of it, whichever part is hidden.
    assert 0.2 < long / hidden < 0.5


def test_the_trainers_policy_is_the_saved_one(whole):
    path, conf = whole
    trainer = OfflineTrainer(data(), conf)
    trainer.restore(checkpoint.latest(path))
    mine, loaded = trainer.policy(settle=True), load(path)
    assert torch.equal(mine.z0, loaded.z0)
    assert mine.step == loaded.step == 12
    assert torch.equal(mine.usable, loaded.usable)
    assert mine.best(20).tolist() == loaded.best(20).tolist()
    assert torch.equal(mine.exploit(3, n_steps=3).z0, loaded.exploit(3, n_steps=3).z0)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled and recorded


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ConfigError, match=r"^train\.cuda_graph: expected a CUDA device, got cpu$"):
        OfflineTrainer(data(), config(cuda_graph="on"))


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces and runs what it traced as it is."""
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(trainer_module, "compiled", lambda parts: compiled(parts, backend="eager"))
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_run_is_a_run(tmp_path):
    """It stops like any other, and goes on without the flag."""
    folder = run(tmp_path / "run", config(compile="on", n_updates=4))
    run(folder, config(n_updates=6), resume=True)
    assert [row["step"] for row in metrics(folder)] == ["3", "4", "6"]
    assert np.isfinite([float(value) for row in metrics(folder) for value in row.values() if value]).all()


def test_what_fills_a_batch_up_is_not_counted_as_work(monkeypatch):
    monkeypatch.setattr(trainer_module, "compiled", lambda parts: parts)
    plain, filled = OfflineTrainer(data(), config()), OfflineTrainer(data(), config(compile="on"))
    for _ in range(3):
        assert plain.run_update()[1] == filled.run_update()[1]
    for name, x in plain.posterior.tensors.items():
        assert x.shape == filled.posterior.tensors[name].shape
    # The same chains moved, the same number of times.
    assert torch.equal(plain.posterior.tensors["n_draws"], filled.posterior.tensors["n_draws"])


@pytest.mark.gpu
def test_recorded_on_a_device(tmp_path):
    conf = config(device="cuda", cuda_graph="on", n_updates=10, log_every=1)
    folder = run(tmp_path / "run", conf)
    folder = run(folder, conf.replace(train={"n_updates": 20}), resume=True)
    rows = metrics(folder)
    assert len(rows) == 20
    assert np.isfinite([float(row["loss"]) for row in rows]).all()


def test_segments_of_one_episode_are_held_out_together_and_resume(tmp_path):
    rewards = np.random.default_rng(0).normal(size=sum(LENGTHS)).astype(np.float32)
    episodes = dataclasses.replace(data(), rewards=rewards)
    conf = config(segment=2)
    trainer = OfflineTrainer(episodes, conf)
    parts, episode = episodes.segments(2)
    assert len(trainer.data) == len(parts) > len(episodes)
    np.testing.assert_array_equal(trainer.data.returns, parts.returns)
    out = np.isin(np.arange(len(parts)), trainer.held_out)
    assert 0 < out.sum() < len(parts)
    assert not set(episode[out]) & set(episode[~out])
    assert not trainer.usable[torch.from_numpy(out)].any()
    # The best of them are those above what plans from their starts are expected to bring, not the longest way to go.
    z = trainer.model.prior(torch.randn(N_COMPARED, 2, 16, generator=torch.Generator().manual_seed(0)))
    for i in (0, 5):
        start = trainer.batches.of(torch.tensor([i])).first_states.expand(len(z), -1)
        expected = trainer.model.return_moments(z, start)[0].mean()
        y = trainer.normalization.returns(torch.tensor(parts.returns[i]))
        assert float(trainer.ranking()[i]) == pytest.approx(float((y - expected).detach()), abs=1e-5)
    # Plans for no start in particular are for those of episodes.
    policy = trainer.policy()
    assert policy.opens.tolist() == [i == 0 or episode[i - 1] != episode[i] for i in range(len(parts))]
    best = np.flatnonzero(policy.opens.numpy() & trainer.usable.numpy())
    assert policy.best(3).tolist() == best[np.argsort(-parts.returns[best])][:3].tolist()
    trainer.batches.close()
    with pytest.warns(
        UserWarning, match=r"train\.segment = 2 with model\.window = \d+ .* learnt without what came before"
    ):
        whole = run(tmp_path / "whole", conf, episodes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states = {"window": 1, "context": "states", "action_token_dropout": 0.0}
        for fields in ({"model": states}, {"train": {"segment": 0}}):
            offline._warn_of_cut_history(conf.replace(**fields))
    # Whatever the step, it plans from what stands out, and knows the starts.
    early = load(whole, step=4)
    assert torch.equal(early.opens, policy.opens)
    # Every segment knows what its whole episode returned, also in checkpoints of before that was written down.
    first = [episode.tolist().index(e) for e in episode]
    assert torch.equal(early.episode_returns, torch.from_numpy(parts.returns[first]))
    tensors, state = checkpoint.load(checkpoint.checkpoint_path(whole, 4))
    older = from_checkpoint({k: v for k, v in tensors.items() if k != "data.episode_returns"}, state)
    assert torch.equal(older.episode_returns, early.episode_returns)
    r = early.episode_returns[early.usable]
    weights = ((r - r.max()) / (0.5 * r.std(correction=0))).exp()
    mean = (weights.view(-1, 1, 1) * early.z0[early.usable]).sum(0)
    plans = early.exploit(3, method="average", average_temperature=0.5)
    assert plans.return_mean.shape == (3,)
    torch.testing.assert_close(plans.z0, (mean * (mean.numel() ** 0.5 / mean.norm())).float().expand(3, -1, -1))
    assert not torch.allclose(early.exploit(1, method="average").z0[0], plans.z0[0])
    tensors, _ = checkpoint.load(checkpoint.checkpoint_path(whole, 4))
    assert torch.equal(early.candidates[: len(tensors["best.ids"])], tensors["best.ids"])
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(checkpoint.latest(again))
    run(again, conf, episodes, resume=True)
    assert_same_run(whole, again)
    with pytest.raises(DataError, match="keep_rewards=True"):
        OfflineTrainer(data(), conf)
