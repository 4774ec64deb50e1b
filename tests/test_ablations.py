"""The ablation script: what it trains, evaluates and skips, and what its table says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from benchmarks import ablations
from benchmarks.ablations import PRESET, Row, Task, Variant, main, read
from gac_fast.config import PRESETS
from gac_fast.intervals import t_interval

DATA = ROOT / "tests" / "data" / "hopper-medium-replay-cut.hdf5"
VARIANTS = (
    Variant(PRESET),
    Variant("1 plan vector", {"model": {"n_z": 1}}),
    Variant("kappa 3", {"plan": {"kappa": 3.0}}),
    Variant("no plan", acts_by="no plan"),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "quick", PRESETS["tiny"].replace(train={"n_updates": 2, "batch_size": 2}))
    monkeypatch.setitem(ablations.TASKS, "hopper", Task("quick", 2, (5, 6), VARIANTS))


def test_what_is_there_is_skipped_and_what_a_variant_changes_is_made_anew(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, runs = tmp_path / "results", tmp_path / "runs"
    command = ["hopper", "--results", str(results), "--runs", str(runs)]
    assert main([*command, "--planning"]) == 2
    assert "--data: expected what to train on, as a run is missing, got nothing" in capsys.readouterr().err
    assert main([*command, "--data", str(DATA), "--only", "no plan", "1 plan vector"]) == 0
    rows = read(results / "hopper.csv")
    assert [(row.variant, row.evaluation_seed) for row in rows] == [
        ("no plan", 5), ("no plan", 6), ("1 plan vector", 5), ("1 plan vector", 6),
    ]  # fmt: skip
    assert sorted(path.name for path in (runs / "hopper").iterdir()) == ["1-plan-vector-s0", "preset-s0"]

    # Nothing is trained any more, so that data are not even asked for; planning differs and is evaluated.
    before = (results / "hopper.csv").read_text()
    assert main(command) == 0
    assert (results / "hopper.csv").read_text().startswith(before)
    assert [row.variant for row in read(results / "hopper.csv")[4:]] == [PRESET] * 2 + ["kappa 3"] * 2
    assert main(command) == 0
    assert len(read(results / "hopper.csv")) == 8

    # A variant that means something else by now has no rows, and the run that bears its name is not taken for it.
    other = (*VARIANTS[:1], Variant("1 plan vector", {"model": {"n_z": 1, "window": 2}}))
    monkeypatch.setitem(ablations.TASKS, "hopper", Task("quick", 2, (5, 6), other))
    capsys.readouterr()
    assert main(command) == 2
    assert "1-plan-vector-s0: holds another run, expected model.window 2, got 4: move" in capsys.readouterr().err
    foreign = ["--preset-run", str(runs / "hopper" / "1-plan-vector-s0")]
    assert main([*command, *foreign]) == 2
    assert "expected a run of the preset: expected model.n_z 2, got 1" in capsys.readouterr().err


def test_the_table_compares_seed_by_seed(tiny: None, tmp_path: Path) -> None:
    results, document = tmp_path / "results", tmp_path / "page.md"
    document.write_text("before\n<!-- table: hopper -->\nold\n<!-- end of table -->\nafter\n")
    assert main(["--markdown", str(document), "--results", str(results)]) == 0
    returns = (VARIANTS[0], [(10.0, 20.0), (30.0, 50.0)]), (VARIANTS[2], [(15.0, 25.0), (20.0, 30.0)])
    for variant, by_seed in returns:
        for seed, means in enumerate(by_seed):
            for eval_seed, mean in enumerate(means):
                row = Row(
                    variant.name, variant.label, seed, eval_seed, 2, mean, 1.0, mean - 2, 99.0, 2, 90.0, "Hopper-v5",
                    "abc", "some machine", "2026-01-02T03:04:05+00:00",
                )  # fmt: skip
                if (seed, eval_seed) == (0, 0):
                    ablations.append(results / "hopper.csv", row._replace(mean_return=1e6))
                ablations.append(results / "hopper.csv", row)
    assert main(["--markdown", str(document), "--results", str(results)]) == 0
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("before", "after", 8)
    its, changed = (line[2:-2].split(" | ") for line in lines[4:6])
    gap = t_interval([20 - 15, 25 - 40])
    assert gap is not None
    assert its[:4] == [PRESET, "15, 40", "28 [-131, 186]", ""]
    assert changed[:6] == [
        "kappa 3", "20, 25", "22 [-9, 54]", f"-5 [{gap.low:+.0f}, {gap.high:+.0f}]", "99", "20",
    ]  # fmt: skip
    assert changed[6] == f"{np.mean([np.std([15, 25], ddof=1), np.std([20, 30], ddof=1)]):.0f}"
    assert (its[7], changed[7]) == ("1.5", "")
