"""Learning results as data: one CSV per method and task, which evaluations append to and reports are made from.

``<folder>/<method>/<task>.csv``, one row per evaluation. ``kind`` says what a row is: ``exploit`` are the method's own
plans at that step, ``exploit, best`` those of the checkpoint that earlier evaluations chose; other kinds are other
plans, or what to compare with (``random``, ``data``). Rows are only ever added: of the same step, seed and kind the
last one counts.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gac_fast.errors import DataError
from gac_fast.files import locked

__all__ = ["BEST", "COLUMNS", "Row", "append_rows", "check_appendable", "holds_results", "read_rows"]

BEST = ", best"
"""Ends the kind of a row whose checkpoint was chosen by earlier evaluations."""


class Row(NamedTuple):
    """One evaluation."""

    step: int
    """Parameter updates made."""
    mean: float
    """Mean return; column ``return``."""
    normalised: float | None
    """Mean normalised score."""
    seed: int
    """Seed of the training run."""
    kind: str
    predicted: float | None
    """Mean return that was predicted."""
    episodes: int
    seconds: float | None
    """Of training, up to the last step, and evaluation together; None where that is not known."""
    commit: str
    """Twelve digits, and +dirty where files had changed."""
    machine: str
    eval_seed: int | None = None
    """Seed of the environments and of planning; None where that is not known, as below."""
    env_id: str | None = None
    """Environment of the evaluation, with its version."""
    evaluations: int | None = None
    """How many evaluations of the run were made so far, this one among them."""


COLUMNS = ("step", "return", *Row._fields[2:])
ADDED = ("eval_seed", "env_id", "evaluations")
"""Columns that files from before do without."""


def holds_results(path: str | os.PathLike[str]) -> bool:
    """Whether a file is meant to hold such rows: its header has at least a step, a return or a kind."""
    with Path(path).open(encoding="utf-8", errors="replace", newline="") as file:
        return not {"step", "return", "kind"}.isdisjoint(next(csv.reader(file), []))


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file; columns may come in any order, and further ones are left aside. Files from before the columns
    ``ADDED`` have None there.

    Raises:
        DataError: a column is missing or a cell is not what it should be; names file, line, column, expected and got.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a CSV file, found something else: {error}") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    for column in COLUMNS:
        if column not in header and column not in ADDED:
            raise DataError(f"{path}, line 1: expected a column {column!r}, got {', '.join(header) or 'nothing'}")
    places = [header.index(column) if column in header else None for column in COLUMNS]
    rows = []
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(header):
            raise DataError(f"{where}: expected {len(header)} columns as in line 1, got {len(cells)}")
        found = ["" if i is None else cells[i] for i in places]
        step, value, score, seed, kind, predicted, episodes, seconds, commit, machine, eval_seed, env_id, made = found
        if not kind:
            raise DataError(f"{where}, column 'kind': expected a name, got nothing")
        rows.append(
            Row(
                _integer(step, "step", where), _number(value, "return", where), _optional(score, "normalised", where),
                _integer(seed, "seed", where), kind, _optional(predicted, "predicted", where),
                _integer(episodes, "episodes", where), _optional(seconds, "seconds", where), commit, machine,
                _integer(eval_seed, "eval_seed", where) if eval_seed else None, env_id or None,
                _integer(made, "evaluations", where) if made else None,
            )
        )  # fmt: skip
    return rows


def _integer(cell: str, column: str, where: str) -> int:
    if not cell.isdecimal():
        raise DataError(f"{where}, column {column!r}: expected an integer of at least 0, got {cell!r}")
    return int(cell)


def _number(cell: str, column: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}, column {column!r}: expected a finite number, got {cell!r}")
    return value


def _optional(cell: str, column: str, where: str) -> float | None:
    return _number(cell, column, where) if cell else None


def check_appendable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that rows cannot be appended to: another header, a broken row, or a last line without its end.

    Raises:
        DataError: naming file, line and column; or the name does not end in .csv.
    """
    path = Path(path)
    if path.suffix != ".csv":
        raise DataError(f"{path}: expected a name that ends in .csv")
    if path.is_dir():
        raise DataError(f"{path}: expected a CSV file, found a folder")
    if not path.exists() or not (text := path.read_text(encoding="utf-8", errors="replace")):
        return
    header = next(csv.reader(io.StringIO(text, newline="")), [])
    if tuple(header) == COLUMNS[: -len(ADDED)]:
        raise DataError(
            f"{path}, line 1: expected the columns {','.join(COLUMNS)}, got a file from before the last {len(ADDED)}: "
            f"add ',{','.join(ADDED)}' to line 1 and '{',' * len(ADDED)}' to the others, or name another file"
        )
    if tuple(header) != COLUMNS:
        raise DataError(f"{path}, line 1: expected the columns {','.join(COLUMNS)}, got {','.join(header)}")
    if not text.endswith("\n"):
        raise DataError(f"{path}, line {text.count(chr(10)) + 1}: expected the end of a line, got the end of the file")
    read_rows(path)


def append_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Add rows at the end of a file, which is made with its folder where there is none; what is there stays.

    Raises:
        DataError: as :func:`check_appendable`.
    """
    path = Path(path)
    check_appendable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow("" if cell is None else cell for cell in row)
    with path.open("ab", buffering=0) as file, locked(path):
        # Again: another process may have made the file since.
        check_appendable(path)
        header = "" if os.fstat(file.fileno()).st_size else ",".join(COLUMNS) + "\n"
        file.write((header + text.getvalue()).encode())
