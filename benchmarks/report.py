"""The table and the chart of measured speed, from the rows of ``harness.COLUMNS``.

python benchmarks/report.py benchmarks/results/speed.csv
python benchmarks/report.py benchmarks/results/speed.csv --plot benchmarks/results/speed.png
"""

from __future__ import annotations

import argparse
import csv
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gac_fast.speed import roof

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"
THRESHOLDS = Path(__file__).with_name("thresholds.toml")

Row = Mapping[str, Any]

LPT = "LPT's published code, quoted and not run here: 508 time steps/s on one core of a processor with AMX"
# What stepping by the runner's vector environment has to reach, as times as fast as others.
STEP_BARS = {"mujoco.batch": 0.9, "async": 2.0, "sync": 1.5, "envpool": None}
LOOP_BAR = 0.9  # of what stepping and acting one after the other would take, each alone and on all threads
THREAD_BAR = 0.9  # of the gain that a large matrix product has


class Bar(NamedTuple):
    """A ratio of times in one run, on one thread: that of ``against`` over that of ``provider``, see :func:`ratio`."""

    op: str
    mode: str
    shape: str
    dtype: str
    at_least: float
    against: str = "reference"
    provider: str = "cpp"


def read_bars(path: Path, kind: str) -> tuple[Bar, ...]:
    """Those of a file like ``thresholds.toml``.

    Args:
        kind: ``goal``, what the project set itself, or ``at_least``, what no change may fall below.

    Raises:
        ValueError: an entry with another key, or without one that it needs.
    """
    bars = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["ratio"]:
        missing, unknown = NEEDED - entry.keys(), entry.keys() - NEEDED - {"provider", "goal"}
        if missing or unknown:
            wrong = f"no {', '.join(sorted(missing))}" if missing else f"got {', '.join(sorted(unknown))}"
            raise ValueError(f"{path}: expected entries of {', '.join(sorted(NEEDED))}, provider and goal, {wrong}")
        work = entry["op"], entry["mode"], entry["shape"]
        who = entry["against"], entry.get("provider", "cpp")
        bars += [Bar(*work, dtype, float(ratio), *who) for dtype, ratio in entry.get(kind, {}).items()]
    return tuple(bars)


NEEDED = {"op", "mode", "shape", "against", "at_least"}
BARS = read_bars(THRESHOLDS, "goal")


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def case_of(row: Row) -> tuple[str, str, str, int]:
    """What is compared with one another: op, mode, shape, threads."""
    return row["op"], row["mode"], row["shape"], int(row["threads"])


def _order(row: Row) -> tuple[Any, ...]:
    """Sorts cases as people count: N=8 before N=64."""
    op, mode, shape, threads = case_of(row)
    return op, mode, [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", shape)], threads


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of every case the rows of its last run, so that all ratios are made within a run."""
    rows = list(rows)
    last: dict[tuple[str, str, str, int], str] = {}
    for row in rows:
        last[case_of(row)] = max(last.get(case_of(row), ""), row["date"])
    return [row for row in rows if row["date"] == last[case_of(row)]]


def _find(rows: Iterable[Row], case: tuple[str, str, str, int], provider: str, dtype: str) -> Row | None:
    for row in rows:
        if case_of(row) == case and (row["provider"], row["dtype"]) == (provider, dtype):
            return row
    return None


def was_measured(row: Row) -> bool:
    """False of a row that says why there is none."""
    return row["p50_us"] not in (None, "")


def ratio(rows: Sequence[Row], row: Row, against: str = "reference") -> float | None:
    """Median time of ``against`` over that of ``row``, in the same run; None where one did not run.

    Peers count in float32, the engine doing other work of as much in the dtype of ``row``.
    """
    base = _find(rows, case_of(row), against, row["dtype"] if against.startswith("cpp") else "float32")
    if base is None or not (was_measured(base) and was_measured(row)):
        return None
    return float(base["p50_us"]) / float(row["p50_us"])


def over_fastest_peer(rows: Sequence[Row], row: Row) -> float | None:
    """Time of the fastest that is not the engine over that of ``row``; None for peers.

    A float32 row meets peers in float32 alone; a bfloat16 row, whose user accepts either, the fastest of all.
    """
    if row["provider"] != "cpp":
        return None
    peers = [other for other in rows if case_of(other) == case_of(row) and other["date"] == row["date"]]
    peers = [other for other in peers if was_measured(other)]
    allowed = {"float32", row["dtype"]}
    times = [float(peer["p50_us"]) for peer in peers if peer["provider"] != "cpp" and peer["dtype"] in allowed]
    return min(times) / float(row["p50_us"]) if times else None


def thread_gain(rows: Sequence[Row], row: Row) -> float | None:
    """Gain of ``row`` over one thread, divided by the gain that a large matrix product has in the same run."""
    if int(row["threads"]) == 1 or not was_measured(row):
        return None
    if row.get("gain") and row.get("matmul_gain"):
        return float(row["gain"]) / float(row["matmul_gain"])
    # Before a gain was measured within a case, the two were cases of their own.
    one = _find(rows, (*case_of(row)[:3], 1), row["provider"], row["dtype"])
    if (
        one is None
        or one["date"] != row["date"]
        or not was_measured(one)
        or not (row["matmul_flop_per_s"] and one["matmul_flop_per_s"])
    ):
        return None
    gain = float(one["p50_us"]) / float(row["p50_us"])
    return gain / (float(row["matmul_flop_per_s"]) / float(one["matmul_flop_per_s"]))


def bars_of(row: Row) -> list[Bar]:
    """The bars that a row has to reach."""
    if int(row["threads"]) != 1:
        return []
    who = row["op"], row["mode"], row["shape"], row["dtype"], row["provider"]
    return [bar for bar in BARS if (*bar[:4], bar.provider) == who]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def text(rows: Sequence[Row]) -> str:
    """The table of ratios, then how every bar of an op that ran is met."""
    rows = latest(rows)
    header = (
        "work", "provider", "p50", "p20 .. p80", "ratio", "by round", "best peer", "of the roof", "peak MiB",
        "per second", "thread gain",
    )  # fmt: skip
    lines, blank = [header], [""] * (len(header) - 3)
    before = None
    for row in sorted(rows, key=lambda row: (_order(row), not was_measured(row))):
        case = case_of(row)
        work = f"{case[0]}, {case[1]}, {case[2]}, {_threads(case[3])}"
        who = (work if case != before else "", f"{row['provider']} {row['dtype']}")
        if not was_measured(row):
            # Several that have the same reason share a line.
            if case == before and lines[-1][2:] == (row["note"], *blank):
                who = (lines[-1][0], f"{lines[-1][1]}, {who[1]}")
                lines.pop()
            lines.append((*who, row["note"], *blank))
            before = case
            continue
        before = case
        bound = roof(row)
        lines.append(
            (
                *who,
                _duration(row["p50_us"]),
                f"{_duration(row['p20_us'])} .. {_duration(row['p80_us'])}",
                _times(ratio(rows, row)),
                _times(row["speedup"]),
                _times(over_fastest_peer(rows, row)),
                "" if bound is None else f"{bound[1]:.0%} {bound[0]}",
                str(row.get("peak_mib") or ""),
                _rate(row),
                _number(thread_gain(rows, row)),
            )
        )
    # A line of who was not measured may be long, and ends with the reason.
    widths = [max(len(line[i]) for line in lines if line[3] or i == 0) for i in range(len(header))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    verdicts = [*_verdicts(rows), *_thread_verdicts(rows), *_runner_verdicts(rows)]
    return "\n".join([*table, "", *verdicts, *_notes(rows)])


def described(bar: Bar) -> str:
    who = "" if bar.provider == "cpp" else f" of {bar.provider}"
    return f"{bar.op}, {bar.mode}, {bar.shape}, {bar.dtype}{who}: at least {bar.at_least:g}x over {bar.against}"


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """One line per bar of the ops that ran."""
    lines = []
    for bar in BARS:
        if bar.op not in {row["op"] for row in rows if not row["shape"].startswith("tiny")}:
            continue
        row = _find(rows, (*bar[:3], 1), bar.provider, bar.dtype)
        what = described(bar)
        reached = None if row is None else ratio(rows, row, bar.against)
        if reached is not None:
            verdict = f"{reached:.2f}x, {'met' if reached >= bar.at_least else 'NOT MET'}"
        elif bar.dtype == "bfloat16" and all(row["isa"] != "amx" for row in rows):
            verdict = "not measurable here (no AMX)"
        else:
            verdict = "not run"
        lines.append(f"bar  {what}: {verdict}")
    return lines


def _thread_verdicts(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in sorted(rows, key=_order):
        gain = thread_gain(rows, row) if row["provider"] == "cpp" else None
        if gain is not None:
            work = f"{row['op']}, {row['mode']}, {row['shape']}, {row['dtype']}, {_threads(row['threads'])}"
            verdict = "met" if gain >= THREAD_BAR else "NOT MET"
            lines.append(f"bar  {work}: at least {THREAD_BAR:g} of the gain of a large product: {gain:.2f}, {verdict}")
    return lines


def _runner_verdicts(rows: Sequence[Row]) -> list[str]:
    """Stepping against other ways to step, and the loop against what its two halves take alone."""
    lines = []
    of_runner = [row for row in rows if row["op"] == "runner" and not row["shape"].startswith("tiny")]
    of_runner = [row for row in of_runner if was_measured(row)]
    for case in sorted({case_of(row) for row in of_runner}, key=lambda case: (case[1], case[2], case[3])):
        times = {row["provider"]: float(row["p50_us"]) for row in of_runner if case_of(row) == case}
        work = f"{case[0]}, {case[1]}, {case[2]}, {_threads(case[3])}"
        if case[1] == "step" and "VectorEnv" in times:
            for against, at_least in STEP_BARS.items():
                if against not in times:
                    continue
                reached = times[against] / times["VectorEnv"]
                if at_least is None:
                    lines.append(f"     {work}: {reached:.2f}x over {against}")
                else:
                    verdict = "met" if reached >= at_least else "NOT MET"
                    lines.append(f"bar  {work}: at least {at_least:g}x over {against}: {reached:.2f}x, {verdict}")
        if case[1] == "loop" and {"mujoco.batch", "act"} <= set(times):
            loops = [name for name in ("halves", "one vector") if name in times]
            for name in loops:
                reached = (times["mujoco.batch"] + times["act"]) / times[name]
                verdict = f", {'met' if reached >= LOOP_BAR else 'NOT MET'}" if name == loops[0] else ""
                mark = "bar " if name == loops[0] else "    "
                lines.append(
                    f"{mark} {work}, {name}: at least {LOOP_BAR:g} of 1/(1/step + 1/act): {reached:.2f}{verdict}"
                )
    return lines


def _notes(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in sorted(rows, key=_order):
        sizes = re.search(r"B=(\d+) T=(\d+)", row["shape"])
        if row["op"] == "update" and sizes and was_measured(row):
            per_second = int(sizes[1]) * int(sizes[2]) / (float(row["p50_us"]) * 1e-6)
            who = f"{row['shape']}, {row['provider']} {row['dtype']}, {_threads(row['threads'])}"
            lines.append(f"update, {who}: {per_second:,.0f} time steps/s")
    if lines:
        lines.append(LPT)
    floors = sorted({(int(row["threads"]), row["dtype"]) for row in rows if row["matmul_flop_per_s"]})
    for threads, dtype in floors:
        of = [row for row in rows if (int(row["threads"]), row["dtype"]) == (threads, dtype)]
        matmul = [float(row["matmul_flop_per_s"]) / 1e9 for row in of if row["matmul_flop_per_s"]]
        copies = [float(row["copy_bytes_per_s"]) / 1e9 for row in of if row["copy_bytes_per_s"]]
        lines.append(
            f"floors, {_threads(threads)}, {dtype}: large product {min(matmul):,.0f} to {max(matmul):,.0f} GFLOP/s, "
            f"large copy {min(copies):.1f} to {max(copies):.1f} GB/s"
        )
    where = sorted({(row["cpu"], row["isa"], row["torch"], row["commit"], row["date"]) for row in rows})
    return lines + ["on {}, path {}, torch {}, commit {}, {}".format(*one) for one in where]


def _duration(microseconds: Any) -> str:
    value = float(microseconds)
    for limit, scale, unit in ((1e3, 1, "us"), (1e6, 1e3, "ms")):
        if value < limit:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e6:.3g} s"


def _threads(n: Any) -> str:
    return "1 thread" if int(n) == 1 else f"{n} threads"


def _number(value: Any) -> str:
    return "" if value in (None, "") else f"{float(value):.2f}"


def _times(value: Any) -> str:
    return "" if value in (None, "") else f"{float(value):.2f}x"


def _rate(row: Row) -> str:
    items = row.get("items")
    return f"{1e6 * float(items) / float(row['p50_us']):,.0f} {row['unit']}" if items else ""


# ---------------------------------------------------------------------------------------------------------------------
# Chart


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of the ratios on one thread, one group per case, with a mark where the issue wants them.

    Raises:
        ValueError: no row of the C++ engine has a reference in its run.
    """
    from gac_fast.plots import _COLOURS, _figure

    rows = [row for row in latest(rows) if int(row["threads"]) == 1]
    engine = sorted((row for row in rows if row["provider"] == "cpp" and was_measured(row)), key=_order)
    bars = []
    for row in engine:
        peers = [bar.against for bar in bars_of(row)] or ["reference"]
        for peer in peers:
            at_least = {bar.against: bar.at_least for bar in bars_of(row)}.get(peer)
            reached = ratio(rows, row, peer)
            if reached is not None:
                bars.append((row, peer, reached, at_least))
    if not bars:
        raise ValueError("no row of the C++ engine on one thread has a peer in its run: nothing to draw")
    with _figure(path, 8.5, 1.2 + 0.27 * len(bars)) as figure:
        axes = figure.subplots()
        colours = {"float32": _COLOURS[0], "bfloat16": _COLOURS[1]}
        labelled: set[str] = set()
        for y, (row, _, reached, at_least) in enumerate(bars):
            label = f"C++ {row['dtype']}" if row["dtype"] not in labelled else None
            axes.barh(y, reached, color=colours.get(row["dtype"], _COLOURS[6]), height=0.72, label=label)
            labelled.add(row["dtype"])
            axes.annotate(f" {reached:.1f}x", (max(reached, at_least or 0), y), va="center", fontsize=8)
            if at_least is not None:
                label = "to reach" if "bar" not in labelled else None
                axes.plot([at_least] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.8, label=label)
                labelled.add("bar")
        names = [f"{row['op']}, {row['mode']}, {row['shape']}, over {peer}" for row, peer, *_ in bars]
        axes.set_yticks(range(len(bars)), names)
        axes.invert_yaxis()
        axes.axvline(1, color="0.4", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlim(min(0.7, 0.8 * min(bar[2] for bar in bars)), 1.6 * max(max(b[2], b[3] or 0) for b in bars))
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        axes.minorticks_off()
        axes.grid(False, axis="y")
        axes.set_xlabel("times as fast as the peer in float32, same run, one thread (medians)")
        axes.set_title(f"{engine[-1]['cpu']}, torch {engine[-1]['torch']}", fontsize=8)
        axes.legend(loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--plot", type=Path, help="write the chart to this file")
    arguments = parser.parse_args()
    rows = read(arguments.csv)
    if arguments.plot is None:
        print(text(rows))
        return
    try:
        plot(rows, arguments.plot)
    except ValueError as error:
        raise SystemExit(f"no chart: {error}") from None
    print(f"chart: {arguments.plot}")


if __name__ == "__main__":
    main()
