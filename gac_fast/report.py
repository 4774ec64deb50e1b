"""Tables and pictures of learning results, made from ``<folder>/<method>/<task>.csv`` and published scores; of measured
speed, from ``<folder>/speed.csv``.

Everything in a report follows from the files, so the same files give the same report, byte for byte.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gac_fast.data.scores import has_reference_scores
from gac_fast.errors import DataError
from gac_fast.files import replacing
from gac_fast.intervals import t_interval
from gac_fast.results import BEST, Row, holds_results, read_rows
from gac_fast.speed import has_rows, speed_picture, speed_tables

__all__ = ["Published", "dataset_of", "published_scores", "report"]

NAME = "report.md"
SPEED, SPEED_PICTURE = "speed.csv", "speed.png"
MARK = "<!-- made by gac-fast report -->"
LEVELS = ("data best", "data", "random")
"""Kinds of rows that are no evaluation of the method: what there is to compare with."""

DETAILS = (
    "method, kind", "seeds", "step", "return", "95% interval", "predicted", "episodes each", "seconds", "made at",
    "environment", "evaluations",
)  # fmt: skip


class Published(NamedTuple):
    """A score in print."""

    dataset: str
    """D4RL's name, with its version."""
    method: str
    score: float
    spread: str
    """As printed, often a standard error or deviation; empty where none is."""
    checkpoint: str
    """last or best, where the source says which."""
    source: str
    note: str


def published_scores() -> list[Published]:
    """Scores in print on D4RL's Gym-MuJoCo v2 and Maze2D v1."""
    text = files("gac_fast.data").joinpath("published.csv").read_text(encoding="utf-8")
    _, *rows = csv.reader(text.splitlines())
    return [Published(dataset, method, float(score), *others) for dataset, method, score, *others in rows]


def dataset_of(task: str) -> str | None:
    """D4RL's name of what a task corresponds to; None where there is nothing of the kind."""
    task = re.sub(r"-v\d+$", "", task.lower())
    if re.fullmatch(r"(hopper|halfcheetah|walker2d)-(medium|medium-replay)", task):
        return f"{task}-v2"
    maze = re.fullmatch(r"(?:pointmaze|maze2d)-(umaze|medium|large)", task)
    return f"maze2d-{maze[1]}-v1" if maze else None


class _Line(NamedTuple):
    """The rows of one kind of one method on one task."""

    task: str
    method: str
    kind: str
    rows: dict[tuple[int, int], Row]
    """The last row of every (seed, step)."""

    @property
    def label(self) -> str:
        return f"{self.method}, {self.kind}"

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for seed, _ in self.rows})

    def final(self) -> list[Row]:
        """Of every seed the row of the greatest step."""
        return [self.rows[max(key for key in self.rows if key[0] == seed)] for seed in self.seeds]

    @property
    def uneven(self) -> str:
        """The span of last steps where they differ, else empty. A chosen checkpoint may be of any step."""
        steps = [row.step for row in self.final()]
        return "" if self.kind.endswith(BEST) or self.kind in LEVELS or len(set(steps)) == 1 else _span(steps)

    def curve(self) -> tuple[list[int], list[list[Row]]]:
        """Steps that all seeds have, and the rows [seeds, steps]."""
        steps = sorted(set.intersection(*({step for s, step in self.rows if s == seed} for seed in self.seeds)))
        return steps, [[self.rows[seed, step] for step in steps] for seed in self.seeds]


def report(results: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write ``report.md`` with its pictures.

    Args:
        results: folder that holds ``<method>/<task>.csv``; tables of other things there are not read. Of files right in
            it only ``speed.csv`` is, where it has the columns of ``make bench``.
        out: folder to write to. What an earlier report left there is replaced, other files are never.

    Returns:
        The file written.

    Raises:
        DataError: there is no such file, one lacks a column or holds a cell that is not what it should be (file, line
            and column are named), or a file that no report made is in the way.
    """
    folder, out = Path(results), Path(out)
    lines = _read(folder)
    tasks = sorted({line.task for line in lines})
    pictures = {f"curves_{_slug(task)}.png": task for task in tasks}
    calibrated = _calibrated(lines)
    measured = has_rows(folder / SPEED)
    names = [NAME, *pictures, *(["calibration.png"] if calibrated else []), *([SPEED_PICTURE] if measured else [])]
    if len(pictures) < len(tasks):
        raise DataError(f"{folder}: expected tasks whose names differ in letters and digits, got {', '.join(tasks)}")
    _check_own(out, names)
    from gac_fast import plots

    for name, task in pictures.items():
        _draw_curves([line for line in lines if line.task == task], task, out / name)
    if calibrated:
        plots.result_calibration(calibrated, out / "calibration.png")
    text = "\n".join(_markdown(folder, lines, tasks, pictures, bool(calibrated))) + "\n"
    if measured:
        drawn = f"\n![Rates by size]({SPEED_PICTURE})\n" if speed_picture(folder / SPEED, out / SPEED_PICTURE) else ""
        text += f"\n## Speed\n\n{speed_tables(folder / SPEED)}\n{drawn}"
    with replacing(out / NAME) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out / NAME


def _read(folder: Path) -> list[_Line]:
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of results, found {'a file' if folder.exists() else 'nothing'}")
    lines: dict[tuple[str, str, str], _Line] = {}
    for path in sorted(folder.glob("*/*.csv")):
        # Beside methods lie folders of other measurements.
        if not holds_results(path):
            continue
        for row in read_rows(path):
            key = path.stem, path.parent.name, row.kind
            line = lines.setdefault(key, _Line(*key, {}))
            line.rows[row.seed, row.step] = row
    if not lines:
        raise DataError(f"{folder}: expected rows in <method>/<task>.csv, found none")
    return sorted(lines.values(), key=lambda line: (line.task, *_order((line.method, line.kind))))


def _check_own(out: Path, names: Sequence[str]) -> None:
    """Refuse to replace a file that is not an earlier report's."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: expected a folder to write to, found a file")
    own: set[str] = set()
    earlier = out / NAME
    if earlier.is_file():
        text = earlier.read_text(encoding="utf-8", errors="replace")
        if text.startswith(MARK):
            own = {NAME, *re.findall(r"\]\(([^()/]+\.png)\)", text)}
    for name in names:
        if (out / name).exists() and name not in own:
            raise DataError(f"{out / name}: expected a free name or a file of an earlier report, found another file")


def _draw_curves(lines: Sequence[_Line], task: str, path: Path) -> None:
    from gac_fast import plots

    scored = all(row.normalised is not None for line in lines for row in line.rows.values())
    curves: list[plots.Curve] = []
    levels: dict[str, float] = {}
    for line in lines:
        if line.kind in LEVELS:
            values = [_value(row, scored) for row in line.final()]
            levels.setdefault(line.kind, float(np.mean(values)))
            continue
        steps, rows = line.curve()
        if not steps:
            # Seeds that share no step are drawn by themselves.
            for seed in line.seeds:
                own = sorted(step for s, step in line.rows if s == seed)
                alone = [[_value(line.rows[seed, step], scored) for step in own]]
                curves.append(plots.Curve(f"{line.label}, seed {seed}", own, alone))
            continue
        curves.append(plots.Curve(line.label, steps, [[_value(row, scored) for row in seed] for seed in rows]))
    levels = {name: levels[name] for name in LEVELS if name in levels}
    plots.result_curves(curves, levels, "normalised score" if scored else "mean return", task, path)


def _value(row: Row, scored: bool) -> float:
    if not scored:
        return row.mean
    assert row.normalised is not None
    return row.normalised


def _calibrated(lines: Iterable[_Line]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """(predicted, achieved) of every last evaluation that has a prediction, by task and label."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for line in lines:
        pairs = [(row.predicted, row.mean) for row in line.final() if row.predicted is not None]
        if pairs and line.kind not in LEVELS:
            predicted, achieved = zip(*pairs, strict=True)
            found.setdefault(line.task, {})[line.label] = (list(predicted), list(achieved))
    return found


def _markdown(
    folder: Path, lines: Sequence[_Line], tasks: Sequence[str], pictures: dict[str, str], calibrated: bool
) -> Iterable[str]:
    yield MARK
    yield "# Learning results"
    yield ""
    best = f"; `{BEST.strip(', ')}` marks a checkpoint that earlier evaluations chose" if _has_best(lines) else ""
    yield (
        f"Made by `gac-fast report {folder.as_posix()}` from every `<method>/<task>.csv` in it; do not edit. Of rows "
        "of the same step, seed and kind the last one counts, and of every seed its greatest step. `exploit` acts by a "
        f"method's own plans at the last checkpoint{best}. Brackets are 95% intervals of the mean over seeds "
        "(Student's t), the number of seeds in parentheses; one seed has no interval, nor have seeds whose last steps "
        "differ, whose span stands there instead. Scores are 0 for the random and "
        "100 for the expert return of D4RL's table (PointMaze: of this package's own random actions and noiseless "
        "controller)."
    )
    yield from ("", "## Scores", "")
    yield from ("Mean normalised score, or mean return (r) where a task has no reference scores.", "")
    methods = sorted({(line.method, line.kind) for line in lines if line.kind not in LEVELS}, key=_order)
    by_key = {(line.task, line.method, line.kind): line for line in lines}
    table = []
    for method, kind in methods:
        table.append([f"{method}, {kind}", *(_score(by_key.get((task, method, kind))) for task in tasks)])
    for level in LEVELS:
        found = [next((x for x in lines if x.task == task and x.kind == level), None) for task in tasks]
        if any(found):
            table.append([f"*{level}*", *(_score(x) for x in found)])
    yield from _table(["", *tasks], table)
    yield from _published(tasks)
    for name, task in pictures.items():
        yield from ("", f"## {task}", "", f"![Learning curves on {task}]({name})", "")
        yield "Lines are means over seeds, bands go from the lowest seed to the highest." + (
            "" if has_reference_scores(task) else " Returns, as the task has no reference scores."
        )
        yield "`evaluations` counts those of a run up to the one shown."
        yield ""
        yield from _table(
            DETAILS,
            [_details(line) for line in lines if line.task == task],
        )
    if calibrated:
        yield from ("", "## Calibration", "", "![Predicted against achieved returns](calibration.png)", "")
        yield "Every point is the evaluation of one seed. Above the diagonal more was achieved than predicted."
        yield ""
        yield from _table(
            ["task", "method, kind", "predicted", "achieved", "predicted - achieved", "relative"],
            [
                [task, label, f"{p:.1f}", f"{a:.1f}", f"{p - a:+.1f}", f"{100 * (p - a) / abs(a):+.0f}%" if a else "-"]
                for task, panel in _calibrated(lines).items()
                for label, (p, a) in ((label, (np.mean(x), np.mean(y))) for label, (x, y) in panel.items())
            ],
        )


def _has_best(lines: Iterable[_Line]) -> bool:
    return any(line.kind.endswith(BEST) for line in lines)


def _order(key: tuple[str, str]) -> tuple[bool, str, bool, str]:
    """GAC first, and its own plans before others."""
    method, kind = key
    return method != "gac", method, not kind.startswith("exploit"), kind


def _published(tasks: Sequence[str]) -> Iterable[str]:
    known = {dataset: task for task in tasks if (dataset := dataset_of(task)) is not None}
    scores = [row for row in published_scores() if row.dataset in known]
    if not scores:
        return
    yield from ("", "## Published scores", "")
    yield (
        "On D4RL's **own** data and environments of its time. A task above has the layout of the data set beside it, "
        "but other episodes, unless its file was D4RL's own; PointMaze has another goal rule, simulator and scale than "
        "Maze2D. So these numbers say what is usual, not who wins. Last and best are told apart where a source does."
    )
    yield ""
    keys = list(dict.fromkeys((row.method, row.checkpoint) for row in scores))
    cells = {(row.method, row.checkpoint, row.dataset): row for row in scores}
    table = []
    for method, which in keys:
        found = [cells.get((method, which, dataset)) for dataset in known]
        about = dict.fromkeys(f"{x.source}{f' ({x.note})' if x.note else ''}" for x in found if x is not None)
        values = ["" if x is None else f"{x.score:.1f}" + (f" +- {x.spread}" if x.spread else "") for x in found]
        table.append([method + (f", {which}" if which else ""), *values, "; ".join(about)])
    yield from _table(["", *(f"{dataset} (beside {task})" for dataset, task in known.items()), "source"], table)


def _score(line: _Line | None) -> str:
    if line is None:
        return ""
    rows = line.final()
    scored = all(row.normalised is not None for row in rows)
    values = [_value(row, scored) for row in rows]
    mean = f"{np.mean(values):.1f}{'' if scored else ' r'}"
    if line.uneven:
        return f"{mean} ({len(values)}, steps {line.uneven})"
    return f"{mean}{_interval(values)} ({len(values)})"


def _interval(values: Sequence[float]) -> str:
    interval = t_interval(values)
    return "" if interval is None else f" [{interval.low:.1f}, {interval.high:.1f}]"


def _details(line: _Line) -> list[str]:
    rows = line.final()
    values = [row.mean for row in rows]
    predicted = [row.predicted for row in rows if row.predicted is not None]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    envs = dict.fromkeys(row.env_id for row in rows if row.env_id is not None)
    evaluations = [row.evaluations for row in rows if row.evaluations is not None]
    made = dict.fromkeys(f"{row.commit or 'no commit'}, {row.machine or 'no machine'}" for row in rows)
    return [
        line.label,
        ", ".join(map(str, line.seeds)),
        _span([row.step for row in rows]),
        f"{np.mean(values):.1f}",
        "" if line.uneven else _interval(values).strip(),
        f"{np.mean(predicted):.1f}" if predicted else "",
        _span([row.episodes for row in rows]),
        f"{np.mean(seconds):.0f}" if seconds else "",
        "; ".join(made),
        ", ".join(envs),
        _span(evaluations) if evaluations else "",
    ]


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    for cells in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in text.lower())
