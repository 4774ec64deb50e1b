"""Tables and pictures of measured speed, made from the rows that ``make bench`` appends to ``speed.csv``.

Of every case its last run counts, so that all ratios are made within a run. What is slower than PyTorch is told too.
"""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gac_fast.errors import DataError
from gac_fast.files import replacing

__all__ = ["NEEDED", "has_rows", "roof", "speed_picture", "speed_tables", "write_between"]

Row = Mapping[str, str]

NEEDED = (
    "date", "commit", "op", "provider", "mode", "shape", "dtype", "threads", "rounds", "p20_us", "p50_us", "p80_us",
    "flop_per_s", "bytes_per_s", "matmul_flop_per_s", "copy_bytes_per_s", "isa", "cpu", "torch", "items", "unit",
    "peak_mib", "note",
)  # fmt: skip
"""Columns that the tables are made from."""

BEGIN, END = "<!-- speed tables, made by gac-fast report: begin -->", "<!-- speed tables: end -->"

Key = tuple[str, str, str, int]
"""Op, mode, shape, threads."""


class _Work(NamedTuple):
    """A line of the first table."""

    label: str
    op: str
    mode: str
    shape: str
    peer: str = ""
    """Provider to hold it against; empty: the fastest in float32."""


_WINDOW = "B=4 T=2000 H=4 d=32 W=64"
HEADLINES = (
    *(
        _Work(f"acting, {n} environment{'s' * (n > 1)}, C={c}", "decode_step", "step", f"gym C={c} N={n}")
        for c in (2, 1)
        for n in (1, 8, 64)
    ),
    *(
        _Work(f"planning, {n:,} plan{'s' * (n > 1)} x 20 steps", "plan_ascent", "20 steps", f"gym E=1 P={n}")
        for n in (1, 64, 1024)
    ),
    _Work("window attention, forward + backward, 4 x 2,000 tokens", "window_attention", "fwd+bwd", _WINDOW),
    _Work("the same beside dense-mask SDPA", "window_attention", "fwd+bwd", _WINDOW, "sdpa dense"),
    _Work("the same beside banded SDPA", "window_attention", "fwd+bwd", _WINDOW, "sdpa banded"),
    *(
        _Work(
            f"training update, 4 x 1,000 steps, 3 Langevin steps, C={c}", "update", "3 posterior steps",
            f"gym C={c} B=4 T=1000",
        )
        for c in (2, 1)
    ),
)  # fmt: skip


def has_rows(path: Path) -> bool:
    """Whether this is a file of rows of ``make bench``."""
    return path.is_file() and set(NEEDED) <= _columns(path)


def _columns(path: Path) -> set[str]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return set(next(csv.reader(file), ()))


def speed_tables(path: Path, brief: bool = False) -> str:
    """The tables in Markdown, without a heading of their own.

    Args:
        brief: leave out those from end to end.

    Raises:
        DataError: a cell is not what it should be; names file, line and column.
    """
    rows = _latest(_read(path))
    goals = _goals(path.parent.parent / "thresholds.toml")
    whole = [] if brief else _whole(rows)
    tables = [_headlines(rows, goals), _losses(rows), _histories(rows), whole, _missing(rows), _made(rows)]
    return "\n".join(line for table in tables for line in table)


def _read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows: list[Row] = []
        for row in reader:
            numbers = ("threads", "rounds") if row["rounds"] == "0" else ("threads", "rounds", "p50_us")
            for column in numbers:
                try:
                    good = float(row[column]) >= 0
                except (TypeError, ValueError):
                    good = False
                if not good:
                    where = f"{path}, line {reader.line_num}, column {column!r}"
                    raise DataError(f"{where}: expected a number of at least 0, got {row[column]!r}")
            rows.append(row)
    return rows


def _key(row: Row) -> Key:
    return row["op"], row["mode"], row["shape"], int(row["threads"])


def _latest(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """By case the rows of its last run; toy sizes are no measurement."""
    cases: dict[Key, list[Row]] = {}
    for row in rows:
        if not row["shape"].startswith("tiny"):
            cases.setdefault(_key(row), []).append(row)
    return {key: [row for row in of if row["date"] == max(r["date"] for r in of)] for key, of in cases.items()}


def _goals(path: Path) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Goals of the project, by op, mode, shape and peer; of several peers all have the same."""
    if not path.is_file():
        return {}
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["ratio"]
    return {(e["op"], e["mode"], e["shape"], e["against"]): e["goal"] for e in entries if "goal" in e}


def _time(row: Row) -> float:
    return float(row["p50_us"])


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["p50_us"]]


def _one(rows: Sequence[Row], provider: str, dtype: str) -> Row | None:
    found = [row for row in rows if (row["provider"], row["dtype"]) == (provider, dtype)]
    return found[0] if found else None


def _peers(rows: Sequence[Row], dtype: str) -> list[Row]:
    """What the engine's row of a dtype is held against: a user of bfloat16 accepts float32 too."""
    others = [row for row in _measured(rows) if not row["provider"].startswith("cpp")]
    return [row for row in others if row["dtype"] in ("float32", dtype)]


def _headlines(
    rows: dict[Key, list[Row]], goals: Mapping[tuple[str, str, str, str], Mapping[str, float]]
) -> Iterable[str]:
    table = []
    for work in HEADLINES:
        of = rows.get((work.op, work.mode, work.shape, 1), [])
        peers = [row for row in _peers(of, "float32") if work.peer in ("", row["provider"])]
        if not peers:
            continue
        best = min(peers, key=_time)
        goal = next(
            (g for (*k, who), g in goals.items() if (*k,) == work[1:4] and who == (work.peer or "reference")), {}
        )
        cells = [work.label, f"{best['provider']}, {_spread(best)}"]
        for dtype in ("float32", "bfloat16"):
            row = _one(of, "cpp", dtype)
            cells.append("" if row is None else _against(row, best))
        cells.append(" / ".join(f"{x:g}x" for x in goal.values()))
        table.append(cells)
    if table:
        yield from _table(
            ["work, one thread", "fastest in PyTorch, float32", "C++ float32", "C++ bfloat16 (AMX)", "goal"], table
        )


def _against(row: Row, peer: Row) -> str:
    """Time and spread, ratio, and the share of what bounds it."""
    if not row["p50_us"]:
        return row["note"]
    reached = roof(row)
    bound = f", {reached[1]:.0%} of {reached[0]}" if reached else ""
    return f"{_spread(row)} (**{_time(peer) / _time(row):.1f}x**{bound})"


def roof(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """What bounds a row, and the share that it reaches of the rate of a large product, or copy."""
    shares = [
        (float(row[rate]) / float(row[floor]), name)
        for name, rate, floor in (
            ("FLOP", "flop_per_s", "matmul_flop_per_s"),
            ("bytes", "bytes_per_s", "copy_bytes_per_s"),
        )
        if row[rate] not in (None, "") and row[floor] not in (None, "")
    ]
    if not shares:
        return None
    share, name = max(shares)
    return name, share


def _losses(rows: dict[Key, list[Row]]) -> Iterable[str]:
    """Rows of the engine that something else was faster than."""
    table = []
    for key in sorted(rows, key=_order):
        for row in _measured(rows[key]):
            peers = _peers(rows[key], row["dtype"])
            if row["provider"] != "cpp" or not peers:
                continue
            best = min(peers, key=_time)
            if _time(best) < _time(row):
                op, mode, shape, threads = key
                work = f"`{op}`, {mode}, {shape}, {threads} thread{'s' * (threads > 1)}"
                who = f"{best['provider']} {best['dtype']}, {_spread(best)}"
                table.append([work, f"{row['dtype']}, {_spread(row)}", who, f"{_time(best) / _time(row):.2f}x"])
    yield from ("", "Where PyTorch is faster:", "")
    if table:
        yield from _table(["work", "C++", "faster", "ratio"], table)
    else:
        yield "nowhere in these rows."


def _histories(rows: dict[Key, list[Row]]) -> Iterable[str]:
    """Acting deep in an episode beside what encodes the history anew."""
    keys = [key for key in rows if key[:2] == ("acting", "step") and key[3] == 1]
    if not keys:
        return
    keys.sort(key=_order)
    who = list(dict.fromkeys((row["provider"], row["dtype"]) for key in keys for row in rows[key]))
    table = []
    for provider, dtype in who:
        found = [_one(rows[key], provider, dtype) for key in keys]
        cells = ["" if row is None else _spread(row) if row["p50_us"] else row["note"] for row in found]
        table.append([f"{provider}, {dtype}", *cells])
    yield from ("", "One step of acting after a history, one thread:", "")
    yield from _table(["", *(re.sub(r"^gym ", "", key[2]) for key in keys)], table)


def _whole(rows: dict[Key, list[Row]]) -> Iterable[str]:
    """From end to end, and acting in many environments."""
    table = []
    for key in sorted(rows, key=_order):
        op, mode, shape, threads = key
        if op != "end_to_end" and (op, mode) not in (("acting", "environments"), ("acting", "late")):
            continue
        for row in rows[key]:
            cells = [f"{mode}, {shape}, {threads} thread{'s' * (threads > 1)}", f"{row['provider']}, {row['dtype']}"]
            if row["p50_us"]:
                rate = f"{1e6 * float(row['items']) / _time(row):,.0f} {row['unit']}/s" if row["items"] else ""
                table.append([*cells, _spread(row), rate, f"{float(row['peak_mib']):,.0f}" if row["peak_mib"] else ""])
            else:
                table.append([*cells, row["note"], "", ""])
    if table:
        yield from ("", "From end to end, and acting in many environments or late in an episode:", "")
        yield from _table(["work", "by", "time of a call", "rate", "peak MiB"], table)


def _missing(rows: dict[Key, list[Row]]) -> Iterable[str]:
    """Who was not measured, why, and where; those who share reason and places in one line."""
    where: dict[tuple[str, str], dict[str, list[str]]] = {}
    for key in sorted(rows, key=_order):
        op, mode, shape, threads = key
        case = f"{mode}, {shape}, {threads} thread{'s' * (threads > 1)}"
        for row in rows[key]:
            if not row["p50_us"]:
                of_op = where.setdefault((f"{row['provider']}, {row['dtype']}", row["note"]), {})
                of_op.setdefault(op, []).append(case)
    who: dict[tuple[str, str], list[str]] = {}
    for (provider, reason), of_op in where.items():
        cases = [f"`{op}`, {of[0] if len(of) == 1 else f'{len(of)} cases'}" for op, of in of_op.items()]
        who.setdefault((reason, "; ".join(cases)), []).append(provider)
    if who:
        yield from ("", "Not measured in these runs:", "")
        yield from _table(["by", "why", "of"], [["; ".join(of), *reason] for reason, of in who.items()])


def _made(rows: dict[Key, list[Row]]) -> Iterable[str]:
    of = [row for case in rows.values() for row in case]
    where = list(dict.fromkeys((row["cpu"], row["isa"], row["torch"]) for row in of))
    commits = sorted({row["commit"] for row in of})
    days = sorted(row["date"][:10] for row in of)
    made = "; ".join(f"{cpu}, path {isa}, torch {torch}" for cpu, isa, torch in where)
    yield ""
    yield (
        "`make bench`, medians with 20th and 80th percentiles over rounds in brackets (without: one call), of each "
        "case its last run, "
        f"{_days(days)}; {made}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}."
    )


def _days(days: Sequence[str]) -> str:
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _spread(row: Row) -> str:
    p20, p50, p80 = (_number(float(row[name])) for name in ("p20_us", "p50_us", "p80_us"))
    unit = p50[1]
    if p20[1] == p80[1] == unit:
        return f"{p50[0]} {unit}" if p20[0] == p80[0] else f"{p50[0]} {unit} [{p20[0]}, {p80[0]}]"
    return f"{p50[0]} {unit} [{p20[0]} {p20[1]}, {p80[0]} {p80[1]}]"


def _number(microseconds: float) -> tuple[str, str]:
    for limit, scale, unit in ((1e3, 1.0, "us"), (1e6, 1e3, "ms")):
        if microseconds < limit:
            return _three(microseconds / scale), unit
    return _three(microseconds / 1e6), "s"


def _three(x: float) -> str:
    return f"{x:.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def _order(key: Key) -> tuple[object, ...]:
    """As people count: N=8 before N=64."""
    op, mode, shape, threads = key
    return op, mode, [(0, int(x), "") if x.isdecimal() else (1, 0, x) for x in re.split(r"(\d+)", shape)], threads


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    for cells in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def speed_picture(path: Path, picture: Path) -> bool:
    """Draw how rates grow with environments and with the batch; False, and no file, without such rows.

    Args:
        path: rows of ``make bench``.
    """
    rows = _latest(_read(path))
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for (op, mode, shape, threads), of in sorted(rows.items(), key=lambda item: _order(item[0])):
        size = re.search(r"\bN=(\d+)" if op == "acting" else r"\bB=(\d+)", shape)
        if (op, mode) not in (("acting", "environments"), ("end_to_end", "training")) or threads != 1 or not size:
            continue
        for row in _measured(of):
            panel = panels.setdefault(mode, {}).setdefault(f"{row['provider']} {row['dtype']}", [])
            panel.append((int(size[1]), 1e6 * float(row["items"]) / _time(row)))
    if not panels:
        return False
    from gac_fast.plots import _figure

    labels = {
        "environments": ("environments", "environment steps/s of acting"),
        "training": ("trajectories in a batch", "time steps/s of training"),
    }
    with _figure(picture, 4.2 * len(panels), 3.0) as figure:
        for axes, (mode, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name, points in lines.items():
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel(labels[mode][0])
            axes.set_ylabel(labels[mode][1])
            axes.legend()
    return True


def write_between(path: Path, text: str) -> None:
    """Put ``text`` in the place of what stands between the marks of the speed tables in a Markdown file.

    Raises:
        DataError: there is no such file, or it has not one mark of each kind in this order.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a Markdown file, found none")
    before, *rest = path.read_text(encoding="utf-8").split(BEGIN)
    between = rest[0].split(END) if len(rest) == 1 else []
    if len(between) != 2:
        raise DataError(f"{path}: expected one line {BEGIN} and after it one {END}")
    with replacing(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{text}\n{END}{between[1]}", encoding="utf-8")
