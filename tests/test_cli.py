"""The command line from data to video: what it prints and leaves behind, that flags win, and one line per error."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

from gac_fast import checkpoint, cli, ops
from gac_fast.cli import main
from gac_fast.config import PRESETS, Config, ModelConfig, PlanConfig, PosteriorConfig, TrainConfig
from gac_fast.errors import BackendError, EnvError
from gac_fast.results import read_rows

UMAZE = "gac_fast/PointMaze-umaze-v0"
HOPPER = ROOT / "tests" / "data" / "hopper-medium-cut.hdf5"

# Every value differs from the default of its field.
ODD = Config(
    model=ModelConfig(dim=32, window=4, return_dropout=0.0),
    posterior=PosteriorConfig(step_size=0.2, n_steps=1),
    plan=PlanConfig(n_steps=10, kappa=2.0),
    train=TrainConfig(n_updates=6, batch_size=3, seed=5, bf16="on"),
)


@pytest.fixture(scope="module", autouse=True)
def minari_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Datasets go to a folder of the tests, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        patch.delenv("GAC_FAST_DEBUG", raising=False)
        yield


@pytest.fixture(scope="module")
def dataset(minari_folder: None) -> str:
    """Eight UMaze episodes made by the command line."""
    assert main(["data", "pointmaze", "--maze", "umaze", "--episodes", "8", "--dataset-id", "cli/umaze-v0"]) == 0
    return "cli/umaze-v0"


def train_flags(data: str | Path, run: Path, *more: str) -> list[str]:
    return ["train", "--data", str(data), "--run-dir", str(run), "--no-tensorboard", *more]


TINY = ("--preset", "tiny", "--train.n-updates", "4", "--train.batch-size", "2", "--train.checkpoint-every", "2")


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates; tests that change it copy it."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert main(train_flags(dataset, run, *TINY)) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def error_of(arguments: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gac-fast: error: ")
    assert err.count("\n") == 1
    return err


def read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    assert isinstance(values, dict)
    return values


def table(text: str) -> dict[str, str]:
    """Rows of the printed table by their name."""
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines() if "  " in line.strip())


def config_of(*flags: str) -> Config:
    """What `train` makes of these flags."""
    command = cli._parse(["train", "--data", "x", *flags])
    assert isinstance(command, cli.Train)
    return command.config


def test_data_pointmaze_says_what_it_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "pointmaze", "--maze", "umaze", "--episodes", "3", "--seed", "4"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["dataset"] == "pointmaze-umaze-v0"
    assert rows["environment"] == UMAZE
    assert rows["episodes"] == "3"
    assert rows["steps"] == "900, 300 to 300 per episode"
    assert re.fullmatch(r"[\d,]+ steps/s, saving included", rows["speed"])

    again = ["data", "pointmaze", "--maze", "umaze", "--episodes", "2"]
    assert "dataset 'pointmaze-umaze-v0' already exists" in error_of(again, capsys)
    assert main([*again, "--overwrite"]) == 0
    assert table(capsys.readouterr().out)["episodes"] == "2"


def test_data_show_of_a_file_with_a_cut_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths, rewards = (3, 4, 2), np.asarray([1, 1, 1, 5, 5, 5, 5, 9, 9], np.float32)
    ends = np.zeros(sum(lengths), np.bool_)
    ends[[2, 6]] = True
    path = tmp_path / "hopper-three-v2.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros((9, 11), np.float32)
        file["actions"] = np.zeros((9, 3), np.float32)
        file["rewards"] = rewards
        file["terminals"] = ends
    assert main(["data", "show", str(path)]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["episodes"] == "3, 1 of them cut: their returns are too small"
    assert rows["steps"] == "9, 2 to 4 per episode"
    assert rows["return"] == "mean 11.50, standard deviation 8.50"
    assert rows["percentiles"].startswith("0%: 3.00, ")
    assert rows["percentiles"].endswith("100%: 20.00")
    # (11.5 + 20.272305) / (3234.3 + 20.272305)
    assert rows["normalised"] == "mean 0.98"


def test_data_show_without_any_known_return(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32)
        file["rewards"], file["terminals"] = np.ones(4, np.float32), np.zeros(4, np.bool_)
    assert main(["data", "show", str(path)]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["return"] == "unknown: the data cut every episode"
    assert "normalised" not in rows


def test_preset_is_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "odd", ODD)
    assert config_of("--preset", "odd") == ODD
    assert config_of("--preset=odd") == ODD
    assert config_of() == PRESETS["gym"]


@pytest.mark.parametrize("order", ["flag last", "flag first"])
@pytest.mark.parametrize(
    ("flag", "value", "section", "name", "expected"),
    [
        ("--model.dim", "64", "model", "dim", 64),
        ("--model.dim", "128", "model", "dim", ModelConfig.dim),
        ("--model.return-dropout", "0.3", "model", "return_dropout", ModelConfig.return_dropout),
        ("--posterior.step-size", "0.1", "posterior", "step_size", 0.1),
        ("--posterior.step-size", "0.3", "posterior", "step_size", PosteriorConfig.step_size),
        ("--plan.kappa", "0.5", "plan", "kappa", 0.5),
        ("--plan.kappa", "1", "plan", "kappa", PlanConfig.kappa),
        ("--train.seed", "7", "train", "seed", 7),
        ("--train.seed", "0", "train", "seed", TrainConfig.seed),
        ("--train.bf16", "off", "train", "bf16", TrainConfig.bf16),
        ("--train.batch_size", "32", "train", "batch_size", TrainConfig.batch_size),
    ],
)
def test_flags_win_over_the_preset(
    order: str, flag: str, value: str, section: str, name: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "odd", ODD)
    flags = (flag, value, "--preset", "odd") if order == "flag first" else ("--preset", "odd", flag, value)
    assert getattr(getattr(ODD, section), name) != expected
    assert config_of(*flags) == ODD.replace(**{section: {name: expected}})


def test_every_field_is_a_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for section, fields in Config().to_dict().items():
        for name in fields:
            assert f"--{section}.{name.replace('_', '-')}" in text


def test_train_leaves_a_whole_run(trained: Path, dataset: str) -> None:
    config = Config.from_dict(read(trained / "config.json"))
    assert config == PRESETS["tiny"].replace(train={"n_updates": 4, "batch_size": 2, "checkpoint_every": 2})
    environment = read(trained / "environment.json")
    assert {"packages", "git", "command"} <= environment.keys()
    assert checkpoint.latest(trained).name == "step_00000004"
    with (trained / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)][-1] == "4"
    assert (trained / "plots" / "learning_curves.png").stat().st_size > 1000
    result = read(trained / "result.json")
    assert result["data"] == dataset
    assert result["step"] == 4
    assert "held_out/steering" in result["offline"]


def test_resume_starts_from_the_run_and_takes_flags(run: Path, dataset: str) -> None:
    assert main(train_flags(dataset, run, "--resume", "--train.n-updates", "5")) == 0
    config = Config.from_dict(read(run / "config.json"))
    assert config == PRESETS["tiny"].replace(train={"n_updates": 5, "batch_size": 2, "checkpoint_every": 2})
    assert checkpoint.latest(run).name == "step_00000005"


def test_resume_takes_the_same_command_again(run: Path, dataset: str) -> None:
    assert main(train_flags(dataset, run, *TINY, "--resume")) == 0
    assert checkpoint.latest(run).name == "step_00000004"


def test_resume_names_the_field_that_changed(run: Path, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    for flags, message in (
        (["--train.batch-size", "3"], "expected train.batch_size 3, the run to resume has 2"),
        (["--model.window", "8"], "expected model.window 8, the run to resume has 4"),
        (["--posterior.n-steps", "1"], "expected posterior.n_steps 1, the run to resume has 3"),
        (["--preset", "gym"], "expected model.dim 128, the run to resume has 32"),
    ):
        assert message in error_of(train_flags(dataset, run, "--resume", *flags), capsys)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_resume_refuses_other_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(train_flags(HOPPER, run, "--resume"), capsys)
    assert f"expected env_id 'Hopper-v5' as in the data, the checkpoint has '{UMAZE}'" in message


def test_train_refuses_a_folder_in_use(run: Path, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "already holds a run" in error_of(train_flags(dataset, run, *TINY), capsys)
    assert main(train_flags(dataset, run, *TINY, "--overwrite", "--train.seed", "3")) == 0
    assert read(run / "config.json")["train"]["seed"] == 3


def test_train_refuses_before_the_work(tmp_path: Path, dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    mistyped = tmp_path / "mistyped"
    mistyped.mkdir()
    (mistyped / "config.json").write_text('{"train": {"seed": "x"}}')
    for flags, message in (
        (
            train_flags(dataset, run, "--preset", "huge"),
            f"preset 'huge' is unknown; expected one of {', '.join(sorted(PRESETS))}",
        ),
        (train_flags(tmp_path / "none.hdf5", run), "none.hdf5: expected an HDF5 file, found no such file"),
        (train_flags(dataset, run, "--model.dim", "33"), "model.dim must be a multiple of model.n_heads = 4, got 33"),
        (train_flags(dataset, run, "--plan.kappa", "-1"), "plan.kappa must be at least 0, got -1.0"),
        (train_flags(dataset, run, "--model.rope-base", "inf"), "model.rope_base must be finite, got inf"),
        (train_flags(damaged, run), f"{damaged}: expected an HDF5 file or a Minari id, found a folder"),
        (["data", "show", str(damaged)], f"{damaged}: expected an HDF5 file or a Minari id, found a folder"),
        (train_flags(dataset, run, "--env", "Hoper-v5"), "environment 'Hoper-v5': expected a registered gymnasium id"),
        (train_flags(dataset, run, "--train.device", "abacus"), "expected auto, cpu or a CUDA device, got 'abacus'"),
        (train_flags(dataset, run, "--resume"), "expected a run to resume, found no config.json"),
        (train_flags(dataset, damaged, "--resume"), "damaged/config.json: expected JSON, found something else"),
        (train_flags(dataset, mistyped, "--resume"), "mistyped/config.json: train.seed must be an integer, got 'x'"),
        (["train", "--data", dataset, "--resume"], "--resume: expected --run-dir to name the run to resume"),
        (train_flags(dataset, run, *TINY, "--resume", "--overwrite"), "--resume and --overwrite exclude each other"),
    ):
        assert message in error_of(flags, capsys)
    assert not run.exists()


INTERRUPT = """
import os, signal, sys
from gac_fast import cli
from gac_fast.train.offline import OfflineTrainer

run_update = OfflineTrainer.run_update

def interrupted(trainer):
    values = run_update(trainer)
    if trainer.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return values

OfflineTrainer.run_update = interrupted
sys.exit(cli.main(sys.argv[1:]))
"""


def test_interrupted_training_saves_and_stops(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = train_flags(dataset, run, "--preset", "tiny", "--train.batch-size", "2", "--train.n-updates", "100000")
    done = subprocess.run([sys.executable, "-c", INTERRUPT, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SIGINT: saving and stopping" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"3 of 100,000: go on with --run-dir {run} --resume" in done.stdout
    assert checkpoint.latest(run).name == "step_00000003"
    assert main(train_flags(dataset, run, "--resume", "--train.n-updates", "4")) == 0
    assert checkpoint.latest(run).name == "step_00000004"


ONLINE = [
    "--online.n-envs", "2", "--online.updates-per-round", "1", "--online.capacity", "8", "--online.keep-best", "2",
    "--online.eval-episodes", "2", "--train.batch-size", "2",
]  # fmt: skip


def test_finetune_goes_on_from_a_run_with_its_own_configuration(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    flags = [str(trained), "--steps", "600", "--run-dir", str(new), "--no-tensorboard", *ONLINE]
    assert main(["finetune", *flags]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["run"] == str(new)
    assert rows["environment steps"] == "600"
    assert rows["checkpoint"] == str(new / "checkpoints" / "step_00000005")
    result, config, own = read(new / "result.json"), read(new / "config.json"), read(trained / "config.json")
    # Data and environment are those of the run.
    assert result["data"] == read(trained / "result.json")["data"]
    assert result["env_id"] == UMAZE
    assert result["exploit"]["episodes"] == 2
    assert config["model"] == own["model"]
    assert config["online"]["n_steps"] == 600
    # More steps, with the command that made it.
    assert main(["finetune", "--run-dir", str(new), "--resume", "--steps", "1200", "--no-tensorboard"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["environment steps"] == "1,200"
    assert read(new / "config.json")["online"]["n_envs"] == 2


def test_train_and_finetune_keep_the_engine_in_front_of_the_environment(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gymnasium.vector import SyncVectorEnv

    from gac_fast import envs
    from gac_fast.train import offline, online

    made, make_parts = [], envs.make_parts
    monkeypatch.setattr(
        envs, "make_parts", lambda *args, **kwargs: made.append(make_parts(*args, **kwargs)) or made[-1]
    )
    for module in (offline, online):
        # Pictures take a second each.
        monkeypatch.setattr(module, "_write_plots", lambda run: None)
    old, new, env = tmp_path / "old", tmp_path / "new", ["--env", "sync:pointmaze-umaze"]
    assert main(train_flags(dataset, old, *TINY, *env, "--train.replay-episodes", "2")) == 0
    assert main(["finetune", str(old), *env, "--steps", "600", "--run-dir", str(new), "--no-tensorboard", *ONLINE]) == 0
    assert main(["finetune", "--run-dir", str(new), "--resume", "--steps", "1200", "--no-tensorboard"]) == 0
    # Replay; acting and evaluating, twice.
    assert [isinstance(parts[0].unwrapped, SyncVectorEnv) for parts in made] == [True] * 5
    result = read(new / "result.json")
    assert (result["env_id"], result["engine"]) == (UMAZE, "sync")


def test_finetune_from_scratch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new"
    flags = ["--preset", "tiny", "--env", "pointmaze-umaze", "--online.fill-episodes", "2", "--steps", "1200", *ONLINE]
    assert main(["finetune", *flags, "--run-dir", str(new), "--no-tensorboard"]) == 0
    # The two episodes that fill the buffer come on top.
    assert table(capsys.readouterr().out)["environment steps"] == "1,800"
    assert read(new / "result.json")["data"] is None


def test_what_finetune_refuses(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new"
    for flags, message in (
        ([], "RUN: expected the folder of a run to go on from, or --preset to start from scratch"),
        (["--preset", "tiny"], "--env: expected an environment id"),
        ([tmp_path / "none"], "none: expected the folder of a run, found no such folder"),
        ([tmp_path], "expected a run to go on from, found no config.json"),
        ([trained, "--env", "pointmaze-medium"], "another task with spaces of the same shapes"),
        ([trained, "--online.n-envs", "0"], "online.n_envs must be at least 1, got 0"),
        ([trained, "--model.n-layers", "5"], "expected model.n_layers 5, the run to resume has"),
        ([trained, "--resume"], "--resume: expected --run-dir to name the run to resume"),
        ([trained, "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ):
        where = ["--run-dir", str(new)] if "--resume" not in flags else []
        assert message in error_of(["finetune", *map(str, flags), *where], capsys), flags
    assert not new.exists()


def test_eval_adds_to_the_result(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(run), "--episodes", "4", "--seed", "2"]) == 0
    rows = table(capsys.readouterr().out)
    result = read(run / "result.json")
    assert result["step"] == 4
    assert result["n_evaluations"] == 1
    ((name, entry),) = result["evaluations"].items()
    assert name == f"{UMAZE}, exploit, step 4, 4 episodes, seed 2"
    assert entry["evaluation"] == 1
    assert (entry["plans"], entry["target"], entry["step"], entry["checkpoint"]) == ("exploit", None, 4, "last")
    assert (entry["env_id"], entry["episodes"], entry["seed"]) == (UMAZE, 4, 2)
    assert {"return_mean", "return_standard_error", "return_median", "predicted_mean", "versions"} <= entry.keys()
    assert (run / entry["plot"]).stat().st_size > 1000
    assert rows["environment"] == UMAZE
    assert rows["checkpoint"] == "step 4 (last)"
    assert rows["return mean"] == f"{entry['return_mean']:.2f}"
    assert rows["standard error"] == f"{entry['return_standard_error']:.2f}"
    assert rows["return median"] == f"{entry['return_median']:.2f}"
    assert rows["predicted mean"] == f"{entry['predicted_mean']:.2f}"
    assert rows["normalised mean"] == f"{entry['normalized_mean']:.2f}"
    assert "mujoco" in rows["versions"]
    assert rows["evaluations"] == "1 of this run so far"

    # The same again replaces its entry, and counts; another stands beside it.
    assert main(["eval", str(run), "--env", "pointmaze-umaze", "--episodes", "4", "--seed", "2"]) == 0
    again = read(run / "result.json")
    assert again["n_evaluations"] == 2
    assert again["evaluations"][name]["return_mean"] == entry["return_mean"]
    assert main(["eval", str(run), "--episodes", "2", "--step", "2"]) == 0
    chosen = read(run / "result.json")
    assert chosen["n_evaluations"] == 3
    assert len(chosen["evaluations"]) == 2
    assert chosen["evaluations"][f"{UMAZE}, exploit, step 2, 2 episodes, seed 0"]["checkpoint"] == "chosen"


def reconfigured(run: Path, copy: Path, changes: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Path:
    """A copy of a run as if it had been trained with other values, or its checkpoint had other entries."""
    tensors, state = checkpoint.load(checkpoint.latest(run))
    config = Config.from_dict(state["config"]).replace(**sections).to_dict()
    state = {**state, "config": config, **(changes or {})}
    checkpoint.save(checkpoint.checkpoint_path(copy, state["step"]), tensors, state)
    shutil.copy(run / "result.json", copy)
    return copy


def test_eval_of_several_runs_gives_intervals_over_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, wide, table_csv = tmp_path / "other", tmp_path / "wide", tmp_path / "gac" / "pointmaze-umaze.csv"
    reconfigured(run, other, train={"seed": 1})
    reconfigured(run, wide, train={"seed": 2}, plan={"kappa": 2.0})
    capsys.readouterr()
    flags = ["--csv", str(table_csv), "--pooled", str(tmp_path / "pooled.json")]
    assert main(["eval", str(run), str(other), "--episodes", "3", *flags]) == 0
    *each, pooled = capsys.readouterr().out.split("\n\n")
    entries = [next(iter(read(path / "result.json")["evaluations"].values())) for path in (run, other)]
    for text, path, entry in zip(each, (run, other), entries, strict=True):
        assert table(text)["run"] == str(path)
        assert table(text)["return mean"] == f"{entry['return_mean']:.2f}"
    means = [entry["return_mean"] for entry in entries]
    rows = table(pooled)
    assert rows["all runs"] == "2 runs of 3 episodes, last checkpoints"
    assert rows["return mean"].startswith(f"{np.mean(means):.2f}, normalised ")
    assert rows["standard error"] == f"{abs(means[0] - means[1]) / 2:.2f} over runs"
    assert rows["pooled"] == str(tmp_path / "pooled.json")
    stored = read(tmp_path / "pooled.json")
    assert (stored["runs"], stored["seed"], list(stored["checkpoints"])) == ([str(run), str(other)], 0, ["last"])
    assert stored["checkpoints"]["last"]["return_mean"] == pytest.approx(np.mean(means))
    found = read_rows(table_csv)
    assert [(row.step, row.seed, row.kind, row.episodes) for row in found] == [
        (4, 0, "exploit", 3),
        (4, 1, "exploit", 3),
    ]
    assert [row.mean for row in found] == means
    assert {(row.eval_seed, row.env_id, row.evaluations) for row in found} == {(0, UMAZE, 1)}
    took = [read(run / "result.json")["train_seconds"] + entry["seconds"] for entry in entries]
    assert [row.seconds for row in found] == pytest.approx(took, abs=0.1)
    # What is there stays, and what does not fit is refused, all before the work.
    before = table_csv.read_bytes()
    assert main(["eval", str(run), "--episodes", "1", "--plans", "prior", "--csv", str(table_csv)]) == 0
    assert table_csv.read_bytes().startswith(before)
    third = read_rows(table_csv)[2]
    assert (third.kind, third.evaluations) == ("prior plans", 2)
    torn = tmp_path / "torn.csv"
    torn.write_bytes(table_csv.read_bytes()[:-3])
    results = {path: (path / "result.json").read_text() for path in (run, other)}
    for flags, message in (
        ([], "RUN: expected the folder of at least one run, got none"),
        ([run, tmp_path / "none"], "none: expected the folder of a run, found no such folder"),
        ([run, other, run], f"{run}: expected different runs, got one of them twice"),
        ([run, run / "checkpoints" / "step_00000002"], "expected different runs, got one of them twice"),
        ([run, shutil.copytree(run, tmp_path / "copy")], f"expected another train.seed than {run} has, got 0 too"),
        ([run, wide], f"{wide}: expected plan.kappa 1.0 as in {run}, got 2.0: intervals are over seeds of one"),
        ([run, other, "--video", "a.gif"], "--video: expected a single RUN to film, got 2"),
        ([run, "--csv", torn], "torn.csv, line 4: expected the end of a line, got the end of the file"),
        ([run, "--csv", run / "metrics.csv"], "metrics.csv, line 1: expected the columns step,return,normalised,"),
        ([run, "--pooled", "a.json"], "--pooled: expected several RUNs, got 1"),
        ([run, other, "--pooled", "a.txt"], "--pooled: expected a name that ends in .json, got a.txt"),
        (
            [run, "--step", "2", "--checkpoint", "best"],
            "--checkpoint best: expected the folders of runs alone, got --s",
        ),
        ([checkpoint.latest(run), "--checkpoint", "best"], "folders of runs alone, got the checkpoint"),
        ([run, "--checkpoint", "best"], f"expected {run} to have a best checkpoint, got nothing chose one"),
    ):
        assert message in error_of(["eval", *flags], capsys)
    assert {path: (path / "result.json").read_text() for path in results} == results


def test_eval_refuses_to_pool_what_was_not_trained_alike(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(name: str, seed: int, **changes: Any) -> Path:
        return reconfigured(run, tmp_path / name, changes, train={"seed": seed})

    online = other("online", 3, online={"env_steps": 10})
    for path, message in (
        (other("longer", 1, step=5), f"longer: expected a checkpoint of step 4 as that of {run}, got 5"),
        (online, f"online: expected an offline run as {run} is, got a fine-tuned one"),
        (other("data", 2, data_fingerprint="0" * 64), "got one on cli/umaze-v0 (000000000000): the content differs"),
    ):
        assert message in error_of(["eval", run, path], capsys)
    # Of runs that spent their environment steps, the number of updates is what the episodes made it.
    budget = Config().online.n_steps
    spent = [other(f"spent {seed}", seed, online={"env_steps": budget + seed}, step=4 + seed) for seed in (4, 5)]
    assert "expected a checkpoint of step 4" in error_of(
        ["eval", online, other("more", 9, online={"env_steps": 10}, step=9)], capsys
    )
    monkeypatch.setattr(cli, "_make_plans", lambda policy, command: pytest.fail(f"alike, step {policy.step}"))
    with pytest.raises(pytest.fail.Exception, match="alike, step 8"):
        main(["eval", *map(str, spent)])


def test_eval_of_the_best_checkpoint_beside_the_last(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replays = {2: 5.0, 4: 9.0, 6: 9.0, 8: 1.0}
    monkeypatch.setattr(
        "gac_fast.train.trainer.Trainer.replay", lambda trainer, env: {"replay/best_plans": replays[trainer.step]}
    )
    monkeypatch.setattr("gac_fast.train.offline._write_plots", lambda run: None)
    run, rows_csv = tmp_path / "run", tmp_path / "rows.csv"
    flags = [*TINY, "--env", "pointmaze-umaze", "--train.eval-every", "2", "--train.keep-checkpoints", "1"]
    flags += ["--train.checkpoint-every", "100", "--train.held-out", "0", "--plan.n-best", "1"]
    assert main(train_flags(dataset, run, *flags, "--train.n-updates", "6")) == 0
    more = ["--env", "pointmaze-umaze", "--train.n-updates", "8"]
    assert main(train_flags(dataset, run, "--resume", *more)) == 0
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step_00000004", "step_00000008"]
    assert "best.z0" in checkpoint.load(checkpoint.checkpoint_path(run, 4))[0]
    capsys.readouterr()
    assert main(["eval", str(run), "--episodes", "2", "--csv", str(rows_csv)]) == 0
    last, best = (table(text) for text in capsys.readouterr().out.split("\n\n"))
    assert (last["checkpoint"], best["checkpoint"]) == ("step 8 (last)", "step 4 (best of 4 replays in training)")
    assert best["evaluations"] == "2 of this run so far, and 4 replays in training"
    entries = read(run / "result.json")["evaluations"].values()
    assert [(entry["checkpoint"], entry["chosen_by"]) for entry in entries] == [
        ("last", None), ("best", "best of 4 replays in training"),
    ]  # fmt: skip
    assert len({entry["plot"] for entry in entries}) == 2
    final, chosen = read_rows(rows_csv)
    assert [row[:1] + row[4:5] for row in (final, chosen)] == [(8, "exploit"), (4, "exploit, best")]
    assert final.seconds is not None
    assert final.seconds > 0
    assert chosen.seconds is None
    shutil.rmtree(checkpoint.checkpoint_path(run, 4))
    message = error_of(["eval", run, "--checkpoint", "best"], capsys)
    assert "got step 4, best of 4 replays in training, is not kept" in message


def test_without_replays_earlier_evaluations_of_other_seeds_choose(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("2", "4"):
        assert main(["eval", str(run), "--episodes", "2", "--seed", "1", "--step", step]) == 0
    result = read(run / "result.json")
    for entry in result["evaluations"].values():
        entry["return_mean"] = {2: 50.0, 4: 20.0}[entry["step"]]
    (run / "result.json").write_text(json.dumps(result))
    # Its own episodes would flatter what they chose.
    assert "nothing chose one" in error_of(["eval", run, "--seed", "1", "--checkpoint", "best"], capsys)
    assert main(["eval", str(run), "--episodes", "1", "--checkpoint", "best"]) == 0
    assert table(capsys.readouterr().out)["checkpoint"] == "step 2 (best of 2 steps evaluated before from other starts)"


@pytest.mark.parametrize("flags", [["prior"], ["posterior-best"], ["explore", "--target", "40"]], ids=lambda f: f[0])
def test_eval_plans(flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gac_fast.policy import Policy

    asked = []
    for name in ("exploit", "explore", "prior_plans", "posterior_best"):
        method = getattr(Policy, name)

        def recorded(policy: Policy, *args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            asked.append((_name, args))
            return _method(policy, *args, **kwargs)

        monkeypatch.setattr(Policy, name, recorded)
    assert main(["eval", str(run), "--episodes", "3", "--plans", *flags]) == 0
    expected = {
        "prior": ("prior_plans", (3, 0)),
        "posterior-best": ("posterior_best", (3,)),
        "explore": ("explore", (3, 40.0)),
    }
    assert asked == [expected[flags[0]]]
    (entry,) = read(run / "result.json")["evaluations"].values()
    assert entry["plans"] == flags[0]
    assert entry["target"] == (40.0 if flags[0] == "explore" else None)


def test_eval_runs_the_engine_in_front_of_the_environment(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gymnasium.vector import SyncVectorEnv

    from gac_fast import envs

    made, make_parts = [], envs.make_parts
    monkeypatch.setattr(
        envs, "make_parts", lambda *args, **kwargs: made.append(make_parts(*args, **kwargs)) or made[-1]
    )
    for env in ("sync:pointmaze-umaze", "pointmaze-umaze"):
        assert main(["eval", str(run), "--episodes", "2", "--env", env]) == 0
    assert [isinstance(parts[0].unwrapped, SyncVectorEnv) for parts in made] == [True, False]
    assert f"{UMAZE} by sync" in capsys.readouterr().out
    sync, own = read(run / "result.json")["evaluations"].values()
    assert [(x["env_id"], x["engine"]) for x in (sync, own)] == [(UMAZE, "sync"), (UMAZE, None)]
    assert sync["normalized_mean"] is not None


def test_eval_of_a_checkpoint_adds_to_its_run(run: Path) -> None:
    folder = checkpoint.checkpoint_path(run, 2)
    assert main(["eval", str(folder), "--episodes", "1"]) == 0
    assert not (folder / "result.json").exists()
    (entry,) = read(run / "result.json")["evaluations"].values()
    assert entry["step"] == 2


def test_eval_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "result.json").read_text()
    for flags, message in (
        ([tmp_path / "none"], "none: expected the folder of a run, found no such folder"),
        ([tmp_path], "holds no checkpoint"),
        ([run, "--step", "3"], "step_00000003"),
        ([run, "--env", "PointMase-v9"], "environment 'PointMase-v9': expected a registered gymnasium id"),
        (
            [run, "--env", "Pendulum-v1"],
            f"Pendulum-v1: the policy was trained on {UMAZE} with observations [4] and actions [2], got an environment "
            "with [3] and [1]",
        ),
        ([run, "--episodes", "0"], "--episodes: expected at least 1, got 0"),
        ([run, "--seed", "-1"], "--seed: expected a value in [0, 2^32), got -1"),
        ([run, "--seed", "4294967296"], "--seed: expected a value in [0, 2^32), got 4294967296"),
        ([run, "--plans", "explore"], "--target: expected the wanted return with --plans explore"),
        ([run, "--target", "3"], "--target: expected the wanted return with --plans explore, and only there"),
        ([run, "--plans", "explore", "--target", "nan"], "--target: expected a finite return, got nan"),
        (
            [run, "--plans", "explore", "--target", "1e39"],
            "target: expected a finite return, also when squared in float32, got 1e+39",
        ),
        ([run, "--device", "abacus"], "device: expected auto, cpu or a CUDA device, got 'abacus'"),
        ([run, "--video", "film.avi"], "--video: expected a name that ends in .mp4 or .gif, got film.avi"),
    ):
        assert message in error_of(["eval", *flags], capsys)
    assert (run / "result.json").read_text() == before


def test_eval_refuses_a_damaged_result_before_it_is_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "result.json").write_text("[]")
    assert "result.json: expected a JSON object, found a list" in error_of(["eval", run, "--episodes", "1"], capsys)
    assert (run / "result.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_evaluations": "x"}, "n_evaluations: expected an integer of at least 0, found 'x'"),
        ({"n_evaluations": -1}, "n_evaluations: expected an integer of at least 0, found -1"),
        ({"evaluations": []}, "evaluations: expected an object, found []"),
    ],
    ids=str,
)
def test_eval_refuses_a_damaged_result_before_the_work(
    values: dict[str, Any], message: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gac_fast.evaluate.evaluate", lambda *args, **kwargs: pytest.fail("evaluated"))
    (run / "result.json").write_text(json.dumps(values))
    assert f"{run / 'result.json'}: {message}" in error_of(["eval", run, "--episodes", "1"], capsys)
    assert read(run / "result.json") == values


@pytest.mark.parametrize("target", ["-1e39", "1e30"])
def test_a_target_beyond_float32_is_refused_before_any_environment_is_made(
    target: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gac_fast.envs.make_vector", lambda *args, **kwargs: pytest.fail("made an environment"))
    message = error_of(["eval", run, "--plans", "explore", f"--target={target}"], capsys)
    assert f"target: expected a finite return, also when squared in float32, got {float(target)}" in message


def test_an_environment_that_cannot_render_loses_the_film_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def make_env(env_id: str, **kwargs: Any) -> Any:
        raise EnvError(f"environment {env_id!r} cannot be made: it has no picture")

    monkeypatch.setattr("gac_fast.video.headless_backend", lambda: "egl")
    monkeypatch.setattr("gac_fast.envs.make_env", make_env)
    capsys.readouterr()
    assert main(["eval", str(run), "--episodes", "2", "--video", str(tmp_path / "film.mp4")]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.endswith("cannot be made: it has no picture\n")
    (entry,) = read(run / "result.json")["evaluations"].values()
    assert table(out)["return mean"] == f"{entry['return_mean']:.2f}"
    assert entry["video"] is None
    assert (run / entry["plot"]).is_file()


def test_a_plot_that_fails_loses_itself_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "plot.png")

    monkeypatch.setattr("gac_fast.plots.predicted_vs_achieved", full)
    capsys.readouterr()
    assert main(["eval", str(run), "--episodes", "1", "--csv", str(tmp_path / "x.csv")]) == 2
    out, err = capsys.readouterr()
    assert err.endswith("plot.png: No space left on device\n")
    (entry,) = read(run / "result.json")["evaluations"].values()
    assert entry["plot"] is None
    assert table(out)["return mean"] == f"{entry['return_mean']:.2f}"
    assert (table(out)["standard error"], entry["return_standard_error"]) == ("none: one episode", None)
    assert read_rows(tmp_path / "x.csv")[0].mean == entry["return_mean"]


def test_the_film_is_added_to_the_entry(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    film = tmp_path / "film.mp4"
    monkeypatch.setattr("gac_fast.video.headless_backend", lambda: "egl")
    monkeypatch.setattr(cli, "_film", lambda *args: None)
    capsys.readouterr()
    assert main(["eval", str(run), "--episodes", "2", "--video", str(film)]) == 0
    result = read(run / "result.json")
    (entry,) = result["evaluations"].values()
    assert (entry["video"], entry["episodes"], result["n_evaluations"]) == (str(film), 2, 1)
    assert table(capsys.readouterr().out)["video"] == str(film)


def test_eval_without_a_way_to_render(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def headless_backend() -> str:
        raise EnvError("cannot render without a display (egl: none; osmesa: none). Install EGL")

    monkeypatch.setattr("gac_fast.video.headless_backend", headless_backend)
    film = tmp_path / "film.mp4"
    assert "cannot render without a display" in error_of(["eval", run, "--video", film], capsys)
    assert not film.exists()
    assert "evaluations" not in read(run / "result.json")


# The film of a whole episode takes a software renderer half a minute.
SHORT_FILM = """
import sys
from gac_fast import cli, envs

make_env = envs.make_env
envs.make_env = lambda env_id, **kwargs: make_env(env_id, max_episode_steps=10, **kwargs)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_eval_films_one_episode(run: Path, tmp_path: Path) -> None:
    import imageio_ffmpeg

    film = tmp_path / "film.mp4"
    flags = ["eval", str(run), "--episodes", "1", "--video", str(film)]
    # A process of its own: the choice of a renderer is for the whole process.
    done = subprocess.run([sys.executable, "-c", SHORT_FILM, *flags], capture_output=True, text=True, check=False)
    if done.returncode == 2 and "cannot render" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(film))
    assert frames == 11
    (entry,) = read(run / "result.json")["evaluations"].values()
    assert entry["video"] == str(film)


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAC_FAST_BACKEND", "reference")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for status in ops.status():
        assert re.search(rf"^  {status.op} +reference$", out, re.MULTILINE)
        for name, reason in status.problems.items():
            assert f"not {name}: {reason}" in out
    rows = table(out)
    assert rows["torch"].startswith("2.")
    assert rows["GAC_FAST_BACKEND"].startswith("reference  [")
    assert {"cpu features", "torch threads", "gpu", "C++ engine", "commit"} <= rows.keys()
    assert set(cli.VARIABLES) <= rows.keys()


def test_info_where_a_forced_backend_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAC_FAST_BACKEND", "triton")  # which no op but the noise has
    assert main(["info"]) == 0
    assert re.search(r"^  plan_ascent +none: a call raises$", capsys.readouterr().out, re.MULTILINE)


def sections(out: str) -> dict[str, str]:
    """What stands below each title that begins a line."""
    parts = re.split(r"^(\S.*)\n", out, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def taken_by(section: str, engine: str) -> tuple[set[str], dict[str, str]]:
    """Ops that an engine takes, and the reasons of those that it does not."""
    found = re.search(rf"^  taken by {engine} +(.+)\n((?:      not .*\n)*)", section, re.MULTILINE)
    assert found is not None, section
    taken = set() if found[1] == "none" else set(found[1].split(", "))
    return taken, dict(re.findall(r"not (\w+): (.*)", found[2]))


def test_info_says_for_every_preset_which_ops_the_engines_take(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["info"]) == 0
    found = {title: text for title, text in sections(capsys.readouterr().out).items() if title.startswith("sizes of")}
    assert [title.split(":")[0] for title in found] == [f"sizes of preset {name}" for name in PRESETS]
    gym, *_, tiny = found.values()
    taken, refused = taken_by(gym, "triton")
    assert {"block", "decode_step", "plan_ascent", "plan_attention", "plan_langevin", "window_attention"} <= taken
    assert refused == {}
    # A width below those that the kernel of a step is made for.
    taken, refused = taken_by(tiny, "triton")
    assert refused == {"decode_step": "the Triton engine takes widths 64, 96, 128, 192, 256, got 32"}
    assert "decode_step" not in taken
    assert "window_attention" in taken
    assert all(taken_by(text, "cpp") == (taken_by(gym, "cpp")[0], {}) for text in found.values())


def test_info_of_a_run_says_what_a_forced_call_raises(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    config = PRESETS["gym"].replace(model={"n_z": 17, "return_ensemble": 65})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert main(["info", str(tmp_path)]) == 0
    ((title, section),) = [one for one in sections(capsys.readouterr().out).items() if one[0].startswith("sizes of")]
    assert title == f"sizes of {tmp_path}: width 128, heads 4 x 32, plan vectors 17, return models 65"
    taken, refused = taken_by(section, "triton")
    assert refused.keys() == {"block", "decode_step", "plan_ascent", "plan_attention", "plan_langevin"}
    assert "window_attention" in taken
    monkeypatch.setattr("gac_fast.ops._dispatch._triton_problem", lambda device: None)
    q, plan = torch.zeros(3, 4, 32), torch.zeros(1, 17, 4, 32)
    with ops.backend("triton"), pytest.raises(BackendError) as raised:
        ops.plan_attention(q, plan, plan, torch.tensor([0, 3]))
    assert str(raised.value).endswith(f"cannot run: {refused['plan_attention']}")


def test_info_of_what_is_neither_a_preset_nor_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = f"info: expected one of {', '.join(PRESETS)} or the folder of a run, got {str(tmp_path)!r}"
    assert error_of(["info", str(tmp_path)], capsys) == f"gac-fast: error: {message}\n"


def path_rows(out: str) -> list[str]:
    return re.findall(r"^  C\+\+ path .*\n(?:      not .*\n)*", out, re.MULTILINE)[0].splitlines()


def test_info_names_the_path_of_the_engine_and_why_not_a_wider_one(
    capsys: pytest.CaptureFixture[str], cpp_engine: ModuleType
) -> None:
    problems = dict(cpp_engine._isa_problems())
    with ops.cpu_isa("portable"):
        assert main(["info"]) == 0
    chosen, *others = path_rows(capsys.readouterr().out)
    assert chosen.split(None, 2)[2] == "portable: forced by cpu_isa()"
    wider = list(problems)[1:]
    assert others == [f"      not {name}: {problems[name] or 'it could run'}" for name in wider]


@pytest.mark.usefixtures("cpp_engine")
def test_info_shows_a_wrong_choice_of_the_path() -> None:
    command = [sys.executable, "-m", "gac_fast", "info"]
    environment = {**os.environ, "GAC_FAST_CPU_ISA": "sse9"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reason = "GAC_FAST_CPU_ISA: expected one of portable, avx2, avx512, amx, got 'sse9'"
    assert path_rows(done.stdout)[0].split(None, 2)[2] == f"none: {reason}"
    assert re.search(r"^  philox_normal +none: a call raises$", done.stdout, re.MULTILINE)
    assert f"not cpp: {reason}" in done.stdout


def test_info_names_every_variable_the_project_reads() -> None:
    sources = [*(ROOT / "gac_fast").rglob("*.py"), ROOT / "setup.py", ROOT / "Makefile"]
    named = {name for path in sources for name in re.findall(r"\bGAC_FAST_[A-Z_]+\b", path.read_text())}
    assert named == {name for name in cli.VARIABLES if name.startswith("GAC_FAST_")}


@pytest.mark.parametrize("arguments", [["--help"], ["data", "--help"], ["train", "--help"], ["eval", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "usage: gac-fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing subcommand"),
        (["fly"], "Unrecognized options: fly"),
        (["train"], "--data"),
        (["train", "--data", "x", "--model.dimm", "3"], "--model.dimm"),
        (["train", "--data", "x", "--preset"], "Missing value for argument '--preset'"),
        (["train", "--data", "x", "--train.seed", "one"], "Error parsing --train.seed"),
        (["eval", "x", "--plans", "best"], "invalid choice 'best'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = "torch numpy gymnasium mujoco minari matplotlib h5py"
    script = (
        "import sys; from gac_fast.cli import main; main(['--version']); main(['train', '--help']); "
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == f"gac-fast {cli.__version__}"
    assert lines[-1] == "[]"


def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "gac_fast", "train", "--data", "x", "--preset", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gac-fast: error: preset 'none' is unknown")


def test_errors_of_the_system_take_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: cli.Info) -> None:
        with open("/nonexistent/file"):
            pass

    monkeypatch.setattr(cli, "_info", fail)
    assert error_of(["info"], capsys) == "gac-fast: error: /nonexistent/file: No such file or directory\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAC_FAST_DEBUG", "1")
    with pytest.raises(EnvError, match="expected a registered gymnasium id"):
        main(["train", "--data", "x", "--env", "nowhere"])


def test_a_defect_is_not_dressed_up_as_an_error_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: cli.Info) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(cli, "_info", fail)
    with pytest.raises(ValueError, match="a defect"):
        main(["info"])


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(command: cli.Info) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "gac-fast: interrupted\n"
