"""Append what demo runs reached to ``benchmarks/results/gac/pointmaze-umaze.csv``, one row per run and kind of plan.

python benchmarks/collect_demo.py runs/demo runs/demo-s3
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "gac" / "pointmaze-umaze.csv"
COLUMNS = ("step", "return", "normalised", "seed", "kind", "predicted", "episodes", "seconds", "commit", "machine")
KINDS = {
    "random": "random_mean",
    "data": "data_mean",
    "data best": "data_best",
    "prior plans": "prior_plan_mean",
    "best posterior plans": "best_posterior_mean",
    "exploit": "exploit_mean",
}


def rows(run: Path) -> list[list[object]]:
    """One row per kind of plan of one demo run."""
    from gac_fast.data import normalized_score

    result = json.loads((run / "result.json").read_text())
    where = json.loads((run / "environment.json").read_text())
    git = where["git"] or {"commit": "unknown", "dirty": False}
    commit = git["commit"][:12] + ("+dirty" if git["dirty"] else "")
    machine = f"{where['cores']} cores {where['cpu']}"
    found = []
    for kind, key in KINDS.items():
        y = result[key]
        predicted = result["predicted_mean"] if kind == "exploit" else ""
        found.append(
            [result["n_updates"], y, float(normalized_score("pointmaze-umaze", y)), result["seed"], kind, predicted]
            + [result["episodes"], round(result["seconds"]), commit, machine]
        )
    return found


def main() -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for run in sys.argv[1:]:
            writer.writerows(rows(Path(run)))


if __name__ == "__main__":
    main()
