"""Run folders, metrics that a resumed run continues exactly, progress and clean stopping."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gac_fast.errors import ConfigError
from gac_fast.train.log import (
    Logger,
    Progress,
    RunDir,
    StopSignal,
    environment,
    git_commit,
    merge_result,
    read_result,
    start_run,
    update_result,
)


def test_start_run_writes_config_and_environment(tmp_path: Path) -> None:
    run = start_run(tmp_path / "deep" / "run", {"seed": 3, "train": {"rates": (0.1,)}})
    assert json.loads(run.config.read_text()) == {"seed": 3, "train": {"rates": [0.1]}}
    found = json.loads(run.environment.read_text())
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert set(found["packages"]) >= {"numpy", "triton", "mujoco", "gymnasium", "gymnasium-robotics", "minari"}
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["cpu"]
    assert {"git", "platform", "gpu", "started", "command"} <= set(found)
    assert Path(run) == tmp_path / "deep" / "run"


def test_start_run_takes_an_empty_folder_and_refuses_others(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = start_run(tmp_path / "run", {"seed": 1})
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match=r"run folder .*run already holds a run: resume it, overwrite it or choose"):
        start_run(tmp_path / "run", {"seed": 2})
    assert run.config.read_bytes() == before

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis is not empty: clear it or choose another folder"):
        start_run(tmp_path / "thesis", {})
    with pytest.raises(ConfigError, match=r"holds no run \(no config.json\): not overwriting it"):
        start_run(tmp_path / "thesis", {}, overwrite=True)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    with pytest.raises(ConfigError, match="expected a folder, found a file"):
        start_run(tmp_path / "thesis" / "chapter.txt", {})


def test_overwrite_and_resume(tmp_path: Path) -> None:
    run = start_run(tmp_path, {"seed": 1})
    for folder in (run.checkpoints / "step_00000001", run.tensorboard, run.plots):
        folder.mkdir(parents=True)
        (folder / "file").write_text("old")
    run.metrics.write_text("step\n1\n")
    run.result.write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")

    before = set(tmp_path.rglob("*"))
    start_run(tmp_path, {"seed": 2}, resume=True)
    assert set(tmp_path.rglob("*")) == before
    assert json.loads(run.config.read_text()) == {"seed": 2}
    # Where the run began stays on record beside where it went on.
    start_run(tmp_path, {"seed": 2}, resume=True)
    found = json.loads(run.environment.read_text())
    again = found.pop("resumed")
    assert len(again) == 2
    assert all(entry.keys() == environment().keys() for entry in (found, *again))
    assert found["started"] <= again[0]["started"] <= again[1]["started"]

    start_run(tmp_path, {"seed": 3}, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "environment.json", "notes.txt"]
    assert json.loads(run.config.read_text()) == {"seed": 3}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=m"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


ADD = """
import sys
from pathlib import Path
from gac_fast.train.log import RunDir, update_result
for _ in range(25):
    update_result(RunDir(Path(sys.argv[1])), lambda earlier: {"n": earlier["n"] + 1})
"""


def test_results_of_two_processes_and_threads_all_stay(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    merge_result(run, {"n": 0, "begun": True})
    other = subprocess.Popen([sys.executable, "-c", ADD, str(run.path)])

    def add(name: str) -> None:
        # Once the other process has begun: both are at it.
        while read_result(run)["n"] == 0 and other.poll() is None:
            time.sleep(0.001)
        for i in range(10):
            update_result(run, lambda earlier: {"n": earlier["n"] + 1})
            merge_result(run, {f"{name}{i}": i})

    threads = [threading.Thread(target=add, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait(60) == 0
    found = read_result(run)
    assert found == {"n": 45, "begun": True} | {f"{name}{i}": i for name in "ab" for i in range(10)}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "gac_fast"
    package.mkdir(parents=True)
    assert git_commit(package) is None
    git(package.parent, "init")
    assert git_commit(package) is None
    (package / "a.py").write_text("a = 1\n")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "first")
    assert git_commit(package) == (git(package.parent, "rev-parse", "HEAD"), False)

    (package / "untracked.py").write_text("")
    assert git_commit(package) == (git(package.parent, "rev-parse", "HEAD"), False)
    (package / "a.py").write_text("a = 2\n")
    assert git_commit(package) == (git(package.parent, "rev-parse", "HEAD"), True)

    # Installed into a virtual environment that lies in somebody's repository.
    installed = package.parent / ".venv" / "site-packages" / "gac_fast"
    installed.mkdir(parents=True)
    assert git_commit(installed) is None
    # As in a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_commit(package) is not None
    monkeypatch.setenv("PATH", "")
    assert git_commit(package) is None


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def test_columns_grow(tmp_path: Path) -> None:
    with Logger(tmp_path, tensorboard=False) as logger:
        logger.log(0, {"loss": 1 / 3, "norm": np.float32(0.5)})
        assert rows(tmp_path) == ["step,loss,norm", "0,0.3333333333333333,0.5"]
        logger.log(5, {"norm": torch.tensor(2), "held, out": float("nan")})
        logger.log(5, {"loss": 1})
    assert rows(tmp_path) == [
        'step,loss,norm,"held, out"',
        "0,0.3333333333333333,0.5,",
        "5,,2.0,nan",
        "5,1.0,,",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    logger = Logger(tmp_path, tensorboard=False)
    logger.log(3, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 2 comes after step 3: use truncate_after"):
        logger.log(2, {"loss": 1.0})
    with pytest.raises(TypeError, match="metric 'loss' is no number but a Tensor"):
        logger.log(4, {"loss": torch.ones(2)})
    with pytest.raises(TypeError, match="metric 'loss' is no number but a str"):
        logger.log(4, {"loss": "high", "other": 1.0})
    logger.close()
    assert rows(tmp_path) == ["step,loss", "3,1.0"]
    with pytest.raises(ValueError, match="is closed"):
        logger.log(4, {"loss": 1.0})
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(ConfigError, match=r"metrics\.csv is no metrics log: expected a first column 'step'"):
        Logger(tmp_path, tensorboard=False)


def metrics_at(step: int) -> dict[str, float]:
    values = {"loss": 1 / (step + 1), "norm": step / 7}
    if step >= 6:
        values["late"] = -step
    if step % 4 == 0:
        values["held_out/nll"] = 0.1 * step
    return values


@pytest.mark.parametrize("stopped_at", [3, 5, 6, 9])
@pytest.mark.parametrize("checkpoint_at", [-1, 2, 3])
@pytest.mark.parametrize("torn", ["", "7,0.1", "7,0.125,1.0", '7,"'])
def test_resumed_log_equals_the_uninterrupted_one(
    tmp_path: Path, stopped_at: int, checkpoint_at: int, torn: str
) -> None:
    with Logger(tmp_path / "whole", tensorboard=False) as logger:
        for step in range(12):
            logger.log(step, metrics_at(step))
    with Logger(tmp_path / "resumed", tensorboard=False) as logger:
        for step in range(stopped_at + 1):
            logger.log(step, metrics_at(step))
    with (tmp_path / "resumed" / "metrics.csv").open("a") as file:
        file.write(torn)
    with Logger(tmp_path / "resumed", tensorboard=False) as logger:
        logger.truncate_after(checkpoint_at)
        assert len(rows(tmp_path / "resumed")) == checkpoint_at + 2
        for step in range(checkpoint_at + 1, 12):
            logger.log(step, metrics_at(step))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")


def test_a_failed_rewrite_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    logger = Logger(tmp_path, tensorboard=False)
    logger.log(1, {"loss": 1.0})
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        logger.log(2, {"loss": 2.0, "new": 1.0})
    monkeypatch.undo()
    logger.log(3, {"loss": 3.0})
    logger.close()
    assert rows(tmp_path) == ["step,loss", "1,1.0", "3,3.0"]


def test_tensorboard_follows_and_purges(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def logged() -> list[tuple[int, float]]:
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("train/loss")]

    with Logger(tmp_path) as logger:
        for step in range(4):
            logger.log(step, {"train/loss": step / 2})
        assert logged() == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
        logger.truncate_after(1)
        logger.log(2, {"train/loss": 7.0})
    assert logged() == [(0, 0.0), (1, 0.5), (2, 7.0)]


def test_no_tensorboard_files_unless_asked(tmp_path: Path) -> None:
    with Logger(tmp_path, tensorboard=False) as logger:
        logger.log(0, {"loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_prints_a_line_now_and_then() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(200, "train", initial=100, interval=10, file=out, clock=clock) as progress:
        for _ in range(50):
            clock.now += 1
            progress.update(time_steps=1500, loss=torch.tensor(0.123456), y=2)
    lines = out.getvalue().splitlines()
    assert lines[0] == "train: 110/200 (55%), 1,500 time steps/s, loss 0.1235, y 2, 0:10 gone, 1:30 left"
    assert [line.split()[1] for line in lines] == ["110/200", "120/200", "130/200", "140/200", "150/200"]


def test_progress_ends_with_the_last_state_once() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(3, "plan", file=out, clock=clock)
    clock.now += 3700
    progress.update(1)
    clock.now += 1
    progress.update(2)
    progress.close()
    progress.close()
    assert out.getvalue().splitlines() == [
        "plan: 1/3 (33%), 1:01:40 gone, 2:03:20 left",
        "plan: 3/3 (100%), 1:01:41 gone",
    ]


def test_progress_reads_values_only_to_show_them() -> None:
    class Costly:
        reads = 0

        def __float__(self) -> float:
            Costly.reads += 1
            return 1.0

    clock = Clock()
    progress = Progress(100, file=io.StringIO(), clock=clock)
    for _ in range(20):
        clock.now += 1
        progress.update(loss=Costly())
    assert Costly.reads == 2

    silent = io.StringIO()
    with Progress(100, file=silent, clock=clock, disable=True) as progress:
        clock.now += 50
        progress.update(loss=Costly())
    assert silent.getvalue() == ""
    assert Costly.reads == 2


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, out = Clock(), Terminal()
    with Progress(10, "train", file=out, clock=clock) as progress:
        clock.now += 2
        progress.update(4, time_steps=3000, nll=0.5)
    assert "4/10" in out.getvalue()
    assert "1,500 time steps/s, nll 0.5" in out.getvalue()
    assert out.getvalue().count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_the_flag(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err.count("saving and stopping") == 1


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)

    def fail() -> None:
        with StopSignal():
            assert signal.getsignal(signal.SIGINT) is not before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert signal.getsignal(signal.SIGINT) is before


def test_stop_signal_off_the_main_thread() -> None:
    seen: list[bool] = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGINT) is before
