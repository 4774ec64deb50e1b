"""What the scripts of benchmarks/peers take from the package, data and protocol; the libraries are not needed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from benchmarks.peers import common, d3rlpy_offline, hf_dt
from gac_fast.envs import make_vector
from gac_fast.results import read_rows
from gac_fast.rollout import rollout
from gac_fast.train.log import StopSignal

REPLAY = ROOT / "tests" / "data" / "hopper-medium-replay-cut.hdf5"


class Linear:
    """The same actions for both: a fixed linear map of what is observed."""

    weights = np.random.default_rng(0).normal(size=(11, 3))
    earned: list[float]

    def begin(self, n: int) -> None:
        self.earned = [0.0] * n

    def act(self, *rows_and_obs: np.ndarray) -> np.ndarray:
        return np.tanh(rows_and_obs[-1].astype(np.float32) @ self.weights).astype(np.float32)

    def rewarded(self, rows: np.ndarray, rewards: np.ndarray) -> None:
        for i, reward in zip(rows, rewards, strict=True):
            self.earned[i] += float(reward)


def test_evaluation_is_that_of_the_package() -> None:
    class Acts:
        def act(self, obs: np.ndarray) -> np.ndarray:
            return Linear().act(obs)

    ours = rollout(make_vector("Hopper-v5", 5), lambda obs, first: Acts(), 5, seed=7)
    shown: list[int] = []
    agent = Linear()
    with StopSignal() as stop:
        theirs = common.evaluate(agent, "Hopper-v5", 5, 7, stop, shown.append)
        assert theirs is not None
        np.testing.assert_allclose(theirs, ours.returns, rtol=1e-5)
        assert agent.earned == theirs.tolist()
        assert len(set(ours.lengths)) > 1, "episodes should end at different steps"
        assert shown[-1] == 5
        stop.requested = True
        assert common.evaluate(agent, "Hopper-v5", 5, 7, stop, shown.append) is None


def test_windows_hold_the_returns_to_go_of_their_steps() -> None:
    steps = common.read_steps(REPLAY, standardise=True, whole_only=True)
    data = steps.data
    np.testing.assert_allclose(steps.observations.mean(0), 0, atol=1e-4)
    assert (steps.terminals | steps.timeouts).sum() == len(data)
    batch = hf_dt.Windows(steps, 5, seed=0).draw(64)
    lengths = batch["attention_mask"].sum(1)
    assert set(lengths) > {1, 5}
    for i, length in enumerate(lengths):
        real = slice(5 - length, 5)
        assert not batch["attention_mask"][i, : 5 - length].any()
        row = np.flatnonzero((steps.actions == batch["actions"][i, 5 - length]).all(1))[0]
        rows = slice(row, row + length)
        episode = int(np.searchsorted(data.cu_seqlens, row, side="right")) - 1
        assert rows.stop <= data.cu_seqlens[episode + 1]
        np.testing.assert_array_equal(batch["states"][i, real], steps.observations[rows])
        np.testing.assert_array_equal(
            batch["timesteps"][i, real], np.arange(*rows.indices(10**9)) - data.cu_seqlens[episode]
        )
        assert data.rewards is not None
        left = data.rewards[row : data.cu_seqlens[episode + 1]].astype(np.float64).sum()
        assert batch["returns_to_go"][i, 5 - length, 0] * hf_dt.RETURN_SCALE == pytest.approx(left, rel=1e-5)


class Constant:
    """A learner of nothing, which draws a number at each update."""

    def __init__(self) -> None:
        self.n = 0
        self.drawn: list[float] = []

    def update(self) -> dict[str, float]:
        self.n += 1
        self.drawn.append(float(np.random.rand()))  # noqa: NPY002
        return {}

    def agents(self) -> list[tuple[str, float | None, Any]]:
        return [("exploit", None, Linear())]

    def save(self, path: Path) -> None:
        path.write_text(str(self.n))

    def load(self, path: Path, seed: int) -> None:
        self.n = int(path.read_text())


def run(tmp_path: Path, *more: str) -> tuple[int, Constant]:
    learner = Constant()

    def make(o: argparse.Namespace) -> tuple[common.Steps, Any]:
        return common.read_steps(o.data, standardise=False, whole_only=False), lambda: learner

    flags = ["--data", str(REPLAY), "--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out.csv")]
    options = common.parser("x", 4, 2).parse_args([*flags, "--episodes", "2", *more])
    return common.main("constant", [], options, make), learner


def test_a_run_leaves_rows_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--eval-every", "2")[0] == 0
    header, *rows = (tmp_path / "out.csv").read_text().splitlines()
    assert header == (ROOT / "benchmarks/results/gac/pointmaze-umaze.csv").read_text().splitlines()[0]
    assert [row.split(",")[0] for row in rows] == ["2", "4"]
    status, learner = run(tmp_path, "--resume", "--updates", "7")
    assert (status, learner.n) == (0, 7)
    assert (tmp_path / "out.csv").read_text().splitlines()[-1].startswith("7,")
    capsys.readouterr()
    for flags, message in (
        ([], "holds a run already"),
        (["--resume", "--seed", "1"], "expected a run of seed 1, it is one of 0"),
        (["--updates", "0"], "--updates: expected at least 1, got 0"),
        (["--data", "none.hdf5"], "--data: expected an HDF5 file, found no file none.hdf5"),
        (["--resume", "--env", "Walker2d-v5"], "expected observations and actions of shapes ((11,), (3,))"),
        (["--resume", "--env", "Hoper-v5"], "environment 'Hoper-v5' cannot be made"),
    ):
        assert run(tmp_path, *flags)[0] == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("constant: error: ")
        assert message in error


def test_a_run_stopped_in_its_evaluation_makes_it_and_draws_other_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, save = [], Constant.save
    monkeypatch.setattr(common, "SAVE_EVERY", 3)
    monkeypatch.setattr(Constant, "save", lambda learner, path: (saved.append(learner.n), save(learner, path)))
    evaluate = common.evaluate

    def stopped(agent: Any, env_id: str, episodes: int, seed: int, stop: StopSignal, show: Any) -> None:
        stop.requested = True

    monkeypatch.setattr(common, "evaluate", stopped)
    status, first = run(tmp_path)
    assert (status, saved) == (130, [3, 4])
    assert not (tmp_path / "out.csv").exists()
    monkeypatch.setattr(common, "evaluate", evaluate)
    assert run(tmp_path, "--resume")[0] == 0
    # Once: there is nothing left to do.
    assert run(tmp_path, "--resume")[0] == 0
    status, more = run(tmp_path, "--resume", "--updates", "8")
    assert [(row.step, row.evaluations, row.env_id) for row in read_rows(tmp_path / "out.csv")] == [
        (4, 1, "Hopper-v5"), (8, 2, "Hopper-v5"),
    ]  # fmt: skip
    assert (len(more.drawn), len({*first.drawn, *more.drawn})) == (4, 8)


@pytest.mark.parametrize("script", [d3rlpy_offline, hf_dt], ids=["d3rlpy", "transformers"])
def test_a_missing_library_is_named(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("d3rlpy", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert script.cli(["--data", "x", *(["iql"] if script is d3rlpy_offline else [])]) == 2
    assert "make peers" in capsys.readouterr().err
