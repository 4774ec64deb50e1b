"""Whether the ratios of a run stay above ``thresholds.toml``; exit status 1 where one does not.

python benchmarks/check.py runs/bench-check.csv

Ratios within one run do not depend on how fast the machine is. What was not run falls short too, but for bfloat16 on a
processor without AMX.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from report import THRESHOLDS, Bar, Row, _find, described, latest, ratio, read, read_bars


class Verdict(NamedTuple):
    """Of one threshold: ``ok``, ``BELOW``, ``NOT RUN`` or ``not measurable``."""

    bar: Bar
    word: str
    detail: str

    @property
    def fails(self) -> bool:
        return self.word in ("BELOW", "NOT RUN")

    def __str__(self) -> str:
        return f"{self.word:<14}  {described(self.bar)}: {self.detail}"


def verdicts(rows: Iterable[Row], bars: Sequence[Bar]) -> list[Verdict]:
    """One per threshold, of the last run of its case on one thread."""
    rows = latest(rows)
    return [_verdict(rows, bar) for bar in bars]


def _verdict(rows: Sequence[Row], bar: Bar) -> Verdict:
    row = _find(rows, (*bar[:3], 1), bar.provider, bar.dtype)
    if row is None:
        return Verdict(bar, "NOT RUN", "no row")
    reached = ratio(rows, row, bar.against)
    if reached is None:
        reason = row["note"] or f"{bar.against} was not measured"
        without_amx = bar.dtype == "bfloat16" and reason.startswith("no AMX")
        return Verdict(bar, "not measurable" if without_amx else "NOT RUN", reason)
    # By round it is blind to what else the machine did for a while.
    if bar.against == "reference" and row["speedup"] not in (None, ""):
        reached = float(row["speedup"])
    return Verdict(bar, "ok" if reached >= bar.at_least else "BELOW", f"{reached:.2f}x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--thresholds", type=Path, default=THRESHOLDS)
    arguments = parser.parse_args()
    if not arguments.csv.is_file():
        print(f"{arguments.csv}: expected the rows of a run, found no file", file=sys.stderr)
        return 2
    found = verdicts(read(arguments.csv), read_bars(arguments.thresholds, "at_least"))
    for verdict in found:
        print(verdict)
    failed = sum(verdict.fails for verdict in found)
    print(f"{len(found) - failed} of {len(found)} thresholds hold" + (f", {failed} DO NOT" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
