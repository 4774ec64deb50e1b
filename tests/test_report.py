"""Reports: what the tables say of the rows, that nothing foreign is overwritten, and which file is wrong where."""

from __future__ import annotations

import csv
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from gac_fast.cli import main
from gac_fast.data import reference_scores
from gac_fast.errors import DataError
from gac_fast.intervals import t_interval
from gac_fast.report import dataset_of, published_scores, report
from gac_fast.results import COLUMNS, Row, append_rows, read_rows
from gac_fast.speed import BEGIN, END, NEEDED, write_between

MACHINE = "2 cores of something, with | in it"


def row(step: int, mean: float, seed: int, kind: str = "exploit", predicted: float | None = None) -> Row:
    low, high = reference_scores("hopper")
    score = 100 * (mean - low) / (high - low)
    return Row(step, mean, score, seed, kind, predicted, 100, 2.5, "0123456789ab", MACHINE, 7, "Hopper-v5", 2)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """GAC with three seeds, of which one was evaluated twice at its last step; a peer with one; a task of no known
    scale; and files that are none of these."""
    folder = tmp_path / "results"
    gac = [row(step, step + 100.0 * seed, seed, predicted=2000.0) for seed in (0, 1, 2) for step in (1000, 1500)]
    append_rows(folder / "gac" / "hopper-medium.csv", [row(1500, 9999.0, 2), *gac])
    others = [row(1000, 1900.0, 0, "exploit, best"), row(0, 1613.0, 0, "data")]
    append_rows(folder / "gac" / "hopper-medium.csv", others)
    append_rows(folder / "bc" / "hopper-medium.csv", [row(1500, 1580.0, 0, "bc")])
    swimmer = [row(10, 35.0, seed, predicted=30.0)._replace(normalised=None) for seed in (0, 1)]
    append_rows(folder / "gac" / "swimmer.csv", swimmer)
    (folder / "speed.csv").write_text("op,p50_us\nblock,3\n")
    (folder / "gpu").mkdir()
    (folder / "gpu" / "h200.csv").write_text("date,commit,op,p50_us\n2026,abc,block,3\n")
    return folder


def table_rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows that begin with this cell."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if cells[0] == first]


def test_the_tables_say_what_the_rows_say(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["report", str(results), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == ["report", str(out / "report.md")]
    text = (out / "report.md").read_text()
    means = [1500.0, 1600.0, 1700.0]
    scores = [100 * (x + 20.272305) / (3234.3 + 20.272305) for x in means]
    interval = t_interval(scores)
    assert interval is not None
    score, details, _ = table_rows(text, "gac, exploit")
    (honest,) = table_rows(text, "hopper-medium")
    expected = f"{np.mean(scores):.1f} [{interval.low:.1f}, {interval.high:.1f}] (3)"
    assert score[1:] == [expected, "35.0 r [35.0, 35.0] (2)"]
    assert details[1:4] == ["0, 1, 2", "1,500", "1600.0"]
    assert details[5:8] == ["2000.0", "100", "2"]
    assert details[8].endswith("with \\| in it")
    assert details[9:] == ["Hopper-v5", "2"]
    assert honest == ["hopper-medium", "gac, exploit", "2000.0", "1600.0", "+400.0", "+25%"]
    # One seed has no interval; the best checkpoint, the peer and the data have lines of their own.
    assert table_rows(text, "gac, exploit, best")[0][1] == "59.0 (1)"
    assert table_rows(text, "bc, bc")[0][1] == "49.2 (1)"
    assert table_rows(text, "*data*")[0][1] == "50.2 (1)"
    (published,) = table_rows(text, "LPT")
    assert published[1] == "58.5 +- 1.9"
    assert "hopper-medium-v2 (beside hopper-medium)" in text
    assert "On D4RL's **own** data" in text
    names = {path.name for path in out.iterdir()}
    assert names == {"report.md", "calibration.png", "curves_hopper-medium.png", "curves_swimmer.png"}
    assert {name for name in names if name != "report.md"} == set(re.findall(r"\]\((.*?)\)", text))
    # The same files, the same report, in place of the earlier one.
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    report(results, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_seeds_of_different_last_steps_get_no_interval(results: Path, tmp_path: Path) -> None:
    append_rows(results / "gac" / "swimmer.csv", [row(30, 45.0, 1)._replace(normalised=None)])
    score, _, details = table_rows(report(results, tmp_path / "out").read_text(), "gac, exploit")
    assert score[2] == "40.0 r (2, steps 10 to 30)"
    assert details[1:5] == ["0, 1", "10 to 30", "40.0", ""]


@pytest.mark.parametrize("name", ["report.md", "calibration.png"])
def test_a_foreign_file_is_never_replaced(name: str, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(DataError, match=f"{name}: expected a free name or a file of an earlier report, found another"):
        report(results, out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed", "sed", r"line 1: expected a column 'seed', got step, return, normalised, sed, kind"),
        ("\n1000,", "\n1e3,", r"line 3, column 'step': expected an integer of at least 0, got '1e3'"),
        (",2000.0,", ",nan,", r"line 3, column 'predicted': expected a finite number, got 'nan'"),
        ("exploit,2000.0", "exploit", r"line 3: expected 13 columns as in line 1, got 12"),
        (",exploit,2000.0", ",,2000.0", r"line 3, column 'kind': expected a name, got nothing"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_named(
    old: str, new: str, message: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results / "gac" / "hopper-medium.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=f"{path}, {message}"):
        report(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_columns_may_be_more_and_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    append_rows(path, [row(5, 7.0, 1)])
    header, cells = csv.reader(path.read_text().splitlines())
    assert tuple(header) == COLUMNS
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["note", *header[::-1]], ["hm", *cells[::-1]]])
    assert read_rows(path) == [row(5, 7.0, 1)]
    with pytest.raises(DataError, match="line 1: expected the columns step,return,normalised"):
        append_rows(path, [row(5, 7.0, 1)])


def test_a_file_from_before_is_read_and_never_mixed_with_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    append_rows(path, [row(5, 7.0, 1)])
    path.write_text(re.sub(",[^,]*,[^,]*,[^,]*$", "", path.read_text(), flags=re.MULTILINE))
    old = path.read_bytes()
    before = row(5, 7.0, 1)._replace(eval_seed=None, env_id=None, evaluations=None)
    assert read_rows(path) == [before]
    with pytest.raises(DataError, match="a file from before the last 3: add ',eval_seed,env_id,evaluations' to line 1"):
        append_rows(path, [row(6, 7.0, 1)])
    assert path.read_bytes() == old
    # As the message has it.
    header, line = old.decode().splitlines()
    path.write_text(f"{header},eval_seed,env_id,evaluations\n{line},,,\n")
    append_rows(path, [row(6, 7.0, 1)])
    assert read_rows(path) == [before, row(6, 7.0, 1)]


def test_two_that_make_a_file_at_once_write_one_header(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    path, whole = tmp_path / "x.csv", tmp_path / "whole.csv"
    append_rows(whole, [row(5, 7.0, 1)])
    other = threading.Thread(target=append_rows, args=(path, [row(6, 7.0, 1)]))
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other.start()
        other.join(timeout=0.2)
        assert path.read_bytes() == b""
        file.write(whole.read_bytes())
    other.join(timeout=60)
    assert read_rows(path) == [row(5, 7.0, 1), row(6, 7.0, 1)]


def test_published_scores_name_their_source() -> None:
    found = published_scores()
    assert all(one.source and one.checkpoint in ("", "last", "best") for one in found)
    tasks = {one.dataset for one in found}
    assert len(tasks) == 9
    gac = [one.score for one in found if one.method == "GAC"]
    # Of the paper's nine tasks.
    assert (len(gac), round(sum(gac) / 9, 1)) == (9, 65.4)
    assert len({(one.dataset, one.method, one.checkpoint) for one in found}) == len(found)
    for task, dataset in (
        ("hopper-medium-replay", "hopper-medium-replay-v2"), ("pointmaze-umaze", "maze2d-umaze-v1"), ("swimmer", None),
    ):  # fmt: skip
        assert dataset_of(task) == dataset
    assert {dataset_of(f"pointmaze-{size}") for size in ("umaze", "medium", "large")} < tasks


def speed_row(provider: str, p50: float | None, **fields: object) -> dict[str, object]:
    """A row of acting in one environment on one thread; 1e6 FLOP of 1e11 a second, 1e3 bytes of 1e10."""
    row: dict[str, object] = dict.fromkeys(NEEDED, "") | {
        "date": "2026-02-03T00:00:00", "commit": "abc", "op": "decode_step", "provider": provider, "mode": "step",
        "shape": "gym C=2 N=1", "dtype": "float32", "threads": 1, "rounds": 9, "isa": "amx", "cpu": "Some CPU",
        "torch": "2", "matmul_flop_per_s": 1e11, "copy_bytes_per_s": 1e10,
    }  # fmt: skip
    if p50 is None:
        return row | {"rounds": 0} | fields
    spread = {"p20_us": 0.9 * p50, "p50_us": p50, "p80_us": 1.1 * p50}
    return row | spread | {"flop_per_s": 1e12 / p50, "bytes_per_s": 1e9 / p50} | fields


def test_speed_tables_are_made_from_the_last_run_and_tell_what_is_slower(tmp_path: Path, results: Path) -> None:
    old = {"date": "2026-02-01T00:00:00"}
    late = {"op": "acting", "mode": "step", "shape": "gym C=2 N=1 history=1000"}
    wide = {"op": "acting", "mode": "environments", "items": 64, "unit": "environment steps", "peak_mib": 3.0}
    rows = [
        speed_row("reference", 1.0, **old), speed_row("cpp", 0.5, **old),
        speed_row("reference", 900.0), speed_row("eager torch", 100.0),
        speed_row("eager torch", 10.0, dtype="bfloat16"),
        speed_row("cpp", 40.0), speed_row("cpp", 20.0, dtype="bfloat16"),
        speed_row("reference", 5.0, shape="tiny C=2 N=1"),
        speed_row("HF DT", None, note="not installed: make peers", **late), speed_row("cpp", 30.0, **late),
        *(speed_row(f"torch.compile{mode}", None, note="left out", shape=f"gym C=2 N={n}")
          for mode in ("", " max-autotune") for n in (1, 8)),
        *(speed_row("cpp", 80.0 * n, shape=f"gym C=2 N={n}", **wide) for n in (1, 16)),
    ]  # fmt: skip
    with (results / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, NEEDED)
        writer.writeheader()
        writer.writerows(rows)
    (results / "gpu").mkdir(exist_ok=True)
    (results / "gpu" / "card.csv").write_text("case,p50_us\nblock,3\n")  # timings of another kind
    (tmp_path / "thresholds.toml").write_text(
        '[[ratio]]\nop = "decode_step"\nmode = "step"\nshape = "gym C=2 N=1"\nagainst = "reference"\n'
        "goal = { float32 = 2.5, bfloat16 = 6 }\n"
    )
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["report", str(results), "--out", str(tmp_path / "out"), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| work")
    assert text.endswith(f"\n{END}\nafter\n")
    assert table_rows(text, "acting, 1 environment, C=2") == [
        [
            "acting, 1 environment, C=2", "eager torch, 100 us [90.0, 110]",
            "40.0 us [36.0, 44.0] (**2.5x**, 25% of FLOP)", "20.0 us [18.0, 22.0] (**5.0x**, 50% of FLOP)",
            "2.5x / 6x",
        ]
    ]  # fmt: skip
    # In bfloat16 the eager actor of the same dtype is faster.
    assert table_rows(text, "`decode_step`, step, gym C=2 N=1, 1 thread") == [
        ["`decode_step`, step, gym C=2 N=1, 1 thread", "bfloat16, 20.0 us [18.0, 22.0]",
         "eager torch bfloat16, 10.0 us [9.00, 11.0]", "0.50x"]
    ]  # fmt: skip
    # In the table of the case, and among all that was not measured.
    assert table_rows(text, "HF DT, float32") == [
        ["HF DT, float32", "not installed: make peers"],
        ["HF DT, float32", "not installed: make peers", "`acting`, step, gym C=2 N=1 history=1000, 1 thread"],
    ]
    both = "torch.compile, float32; torch.compile max-autotune, float32"
    assert table_rows(text, both) == [[both, "left out", "`decode_step`, 2 cases"]]
    assert "2026-02-03; Some CPU, path amx, torch 2; commit abc." in text
    whole = (tmp_path / "out" / "report.md").read_text()
    assert whole.count("eager torch, 100 us") == 1
    rate = table_rows(whole, "environments, gym C=2 N=16, 1 thread")[0][-2:]
    assert rate == ["50,000 environment steps/s", "3"]
    assert (tmp_path / "out" / "speed.png").stat().st_size > 5_000
    readme.write_text("no marks\n")
    with pytest.raises(DataError, match="expected one line <!-- speed tables"):
        write_between(readme, "text")
    with (results / "speed.csv").open("a", newline="") as file:
        csv.DictWriter(file, NEEDED).writerow(speed_row("cpp", 1.0) | {"p50_us": "fast"})
    with pytest.raises(DataError, match=r"speed\.csv, line 18, column 'p50_us': expected a number .*, got 'fast'"):
        report(results, tmp_path / "out")
