"""The demo of fine-tuning in small: every number and picture it promises, the control run, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gac_fast import demo, finetune_demo
from gac_fast.config import PRESETS
from gac_fast.policy import load

SMALL = {"n_envs": 4, "updates_per_round": 2, "capacity": 16, "keep_best": 4, "eval_every": 2, "eval_episodes": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Folders of a small demo and of its fine-tuning, and what that printed."""
    folder = tmp_path_factory.mktemp("runs")
    offline, online = folder / "demo", folder / "demo-online"
    flags = ("--data-episodes", "16", "--n-updates", "2", "--eval-episodes", "4")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        assert demo.main([*flags, "--run-dir", str(offline)]) == 0
        patch.setitem(PRESETS, "small", PRESETS["pointmaze-umaze"].replace(online=SMALL))
        flags = ("--preset", "small", "--n-steps", "3600", "--eval-episodes", "6")
        assert finetune_demo.main(["--run", str(offline), "--run-dir", str(online), *flags]) == 0
    return offline, online, printed.getvalue()


def result_of(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "result.json").read_text())
    assert isinstance(values, dict)
    return values


def test_the_result_holds_every_number(finished: tuple[Path, Path, str]) -> None:
    _, online, printed = finished
    values = result_of(online)
    for name in ("offline_mean", "exploit_mean", "control_mean"):
        assert 0 <= values[name] <= 300, name
    assert values["exploit_std"] >= 0
    assert values["seconds"] >= values["finetune_seconds"] > 0
    # Three rounds of four episodes of 300 steps.
    assert (values["env_steps"], values["rounds"], values["n_updates"], values["episodes"]) == (3600, 3, 6, 6)
    assert values["evaluation"]["return_mean"] == values["exploit_mean"]
    assert values["evaluation"]["predicted_mean"] == values["predicted_mean"]
    for text in (
        "offline model",
        "the same updates, nothing new",
        "after acting",
        "3,600 environment steps, 6 updates",
    ):
        assert text in printed


def test_the_control_run_made_the_same_updates_and_saw_nothing_new(finished: tuple[Path, Path, str]) -> None:
    offline, online, _ = finished
    before, after, control = load(offline), load(online), load(online / "control")
    assert control.step == after.step == before.step + 6
    assert len(control.returns) == len(before.returns) == 16
    assert len(after.returns) == 16 + 12


@pytest.mark.parametrize("name", ["online", "learning_curves", "predicted_vs_achieved", "episodes"])
def test_pictures(name: str, finished: tuple[Path, Path, str]) -> None:
    with Image.open(finished[1] / "plots" / f"{name}.png") as image:
        assert min(image.size) > 200


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune_demo.main(["--run", str(tmp_path)]) == 2
    assert (
        f"run: expected the folder of a finished demo (make demo), found none in {tmp_path}" in capsys.readouterr().err
    )
    assert finetune_demo.main(["--eval-episodes", "0"]) == 2
    assert "eval_episodes: expected at least 1, got 0" in capsys.readouterr().err
