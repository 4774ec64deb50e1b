"""The demo in small: every number and picture it promises, and what it refuses before the work."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import collect_demo
from gac_fast import checkpoint, demo
from gac_fast.demo import Demo, main
from gac_fast.errors import ConfigError, EnvError

SMALL = ("--preset", "pointmaze-umaze", "--data-episodes", "16", "--n-updates", "3", "--eval-episodes", "8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small demo's folder, and what it printed; it replaced an earlier one."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "result.json").write_text('{"from": "an earlier demo"}')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*SMALL, "--run-dir", str(folder)]) == 0
    return folder, printed.getvalue()


def result_of(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "result.json").read_text())
    assert isinstance(values, dict)
    return values


def test_result_holds_every_number(finished: tuple[Path, str]) -> None:
    values = result_of(finished[0])
    assert "from" not in values
    # Returns of UMaze: at most one per step, of 300.
    for name in (
        "random_mean", "data_mean", "data_best", "prior_plan_mean", "best_posterior_mean", "exploit_mean",
    ):  # fmt: skip
        assert 0 <= values[name] <= 300, name
    assert values["data_mean"] < values["data_best"]
    assert values["random_mean"] < values["data_best"]
    assert values["exploit_std"] >= 0
    assert np.isfinite(values["predicted_mean"])
    assert values["seconds"] > 0
    assert (values["episodes"], values["seed"], values["n_updates"], values["step"]) == (8, 0, 3, 3)
    assert values["n_evaluations"] == 3
    assert values["evaluation"]["return_mean"] == values["exploit_mean"]
    assert values["evaluation"]["episodes"] == 8


def test_its_rows_say_where_they_were_made(finished: tuple[Path, str]) -> None:
    found = {row.kind: row for row in collect_demo.rows(finished[0])}
    values = result_of(finished[0])
    where = ("gac_fast/PointMaze-umaze-v0", 8, values["exploit_mean"])
    exploit, data = found["exploit"], found["data"]
    assert (exploit.env_id, exploit.episodes, exploit.mean) == where
    assert (exploit.eval_seed, exploit.evaluations) == (demo.EVAL_SEED, 3)
    assert (data.eval_seed, data.evaluations) == (None, None)


def test_steering_metrics_are_those_of_training(finished: tuple[Path, str]) -> None:
    values = result_of(finished[0])
    steering = values["steering_metrics"]
    assert {"held_out/steering", "replay/best_plans", "replay/their_data"} <= steering.keys()
    assert all(np.isfinite(value) for value in steering.values())
    offline = {k: v for k, v in values["offline"].items() if k.startswith(("held_out/", "replay/"))}
    assert steering == offline


@pytest.mark.parametrize("name", ["learning_curves", "predicted_vs_achieved", "episodes"])
def test_pictures(name: str, finished: tuple[Path, str]) -> None:
    with Image.open(finished[0] / "plots" / f"{name}.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_progress_and_table_are_shown(finished: tuple[Path, str]) -> None:
    folder, text = finished
    values = result_of(folder)
    for line in ("1/4  16 controller episodes", "2/4  training, 3 updates", "3/4  planning and acting, 8", "4/4  pic"):
        assert line in text
    assert "return over 8 fresh episodes" in text
    for label, name in (
        ("uniform random actions", "random_mean"),
        ("data, mean episode", "data_mean"),
        ("data, best episode", "data_best"),
        ("plans from the prior", "prior_plan_mean"),
        ("plans of the 64 best episodes", "best_posterior_mean"),
        ("exploit, predicted", "predicted_mean"),
        ("exploit, achieved", "exploit_mean"),
    ):
        assert re.search(rf"^  {label} +{re.escape(f'{values[name]:.1f}')}\b", text, re.MULTILINE), label
    assert f"+- {values['exploit_std']:.1f}" in text
    for name, value in values["steering_metrics"].items():
        assert re.search(rf"^  {name} +{re.escape(f'{value:.3f}')}$", text, re.MULTILINE), name
    assert str(folder / "result.json") in text


def test_the_run_can_be_loaded(finished: tuple[Path, str]) -> None:
    assert checkpoint.latest(finished[0]).name == "step_00000003"


def test_random_policy_is_seeded() -> None:
    first, again, other = (demo.random_policy("pointmaze-umaze", 16, seed) for seed in (1, 1, 2))
    assert first.shape == (16,)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert ((first >= 0) & (first <= 300)).all()


def test_random_actions_are_uniform_over_the_action_space() -> None:
    from gac_fast import envs

    env = envs.make_vector("pointmaze-umaze", num_envs=500)
    actor = demo._UniformActor(env.action_space, np.random.default_rng(0))
    actions = actor.act(np.zeros((500, 4), np.float32))
    env.close()
    assert (actions.shape, actions.dtype) == ((500, 2), np.float32)
    assert -1 <= actions.min() < -0.9 < 0.9 < actions.max() <= 1
    # 1/3 is the variance of a uniform law on [-1, 1].
    assert actions.var() == pytest.approx(1 / 3, rel=0.1)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when the demo starts to make data."""
    monkeypatch.setattr("gac_fast.data.pointmaze.generate_pointmaze", lambda *args, **kwargs: pytest.fail("made data"))


def error_of(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("demo: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-episodes", "0"], "eval_episodes: expected at least 1, got 0"),
        (["--data-episodes", "-5"], "data_episodes: expected at least 1, got -5"),
        (["--n-updates", "-1"], "train.n_updates must be at least 1, got -1"),
        (["--seed", "-1"], "train.seed must be in [0, 2^32), got -1"),
        (["--preset", "huge"], "preset 'huge' is unknown"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_are_refused_before_the_work(
    flags: list[str], message: str, tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    assert message in error_of([*flags, "--run-dir", str(folder)], capsys)
    assert not folder.exists()


def test_a_demo_checks_itself() -> None:
    with pytest.raises(ConfigError, match="eval_episodes: expected at least 1, got -1"):
        Demo(eval_episodes=-1)


def test_a_folder_of_something_else_is_refused_before_the_work(
    tmp_path: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    assert f"run folder {tmp_path} is not empty" in error_of(["--run-dir", str(tmp_path)], capsys)
    file = tmp_path / "letters.txt"
    assert f"run folder {file}: expected a folder, found a file" in error_of(["--run-dir", str(file)], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]
    assert file.read_text() == "dear"


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (OSError(28, "No space left on device", "result.json"), "result.json: No space left on device"),
        (EnvError("the environment failed"), "the environment failed"),
    ],
    ids=["disk", "environment"],
)
def test_an_error_on_the_way_is_one_line(
    raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Demo) -> None:
        raise raised

    monkeypatch.delenv("GAC_FAST_DEBUG", raising=False)
    monkeypatch.setattr(demo, "run", fail)
    assert error_of([], capsys) == f"demo: error: {message}\n"


def test_an_interrupted_demo_exits_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training takes the signal itself, saves and returns; the demo stops there."""
    from gac_fast.train.offline import OfflineTrainer

    run_update = OfflineTrainer.run_update

    def interrupted(trainer: OfflineTrainer) -> Any:
        values = run_update(trainer)
        signal.raise_signal(signal.SIGINT)
        return values

    monkeypatch.setattr(OfflineTrainer, "run_update", interrupted)
    folder = tmp_path / "demo"
    assert main([*SMALL, "--run-dir", str(folder)]) == 130
    out, err = capsys.readouterr()
    assert err.endswith("\ndemo: interrupted\n")
    assert "Traceback" not in err
    assert "2/4" in out
    assert "3/4" not in out
    assert checkpoint.latest(folder).name == "step_00000001"


def test_an_interrupt_outside_of_training_exits_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gac_fast.data.pointmaze.generate_pointmaze", interrupted)
    assert main([*SMALL, "--run-dir", str(tmp_path / "demo")]) == 130
    assert capsys.readouterr().err == "demo: interrupted\n"
