"""Append what demo runs reached to ``benchmarks/results/gac/pointmaze-umaze.csv``, one row per run and kind of plan.

python benchmarks/collect_demo.py runs/demo runs/demo-s3
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gac_fast.report import LEVELS
from gac_fast.results import Row, append_rows

RESULTS = Path(__file__).parent / "results" / "gac" / "pointmaze-umaze.csv"
KINDS = {
    "random": "random_mean",
    "data": "data_mean",
    "data best": "data_best",
    "prior plans": "prior_plan_mean",
    "best posterior plans": "best_posterior_mean",
    "exploit": "exploit_mean",
}


def rows(run: Path) -> list[Row]:
    """One row per kind of plan of one demo run."""
    from gac_fast.data import normalized_score
    from gac_fast.envs import resolve_env_id

    result = json.loads((run / "result.json").read_text())
    where = json.loads((run / "environment.json").read_text())
    git = where["git"] or {"commit": "unknown", "dirty": False}
    commit = git["commit"][:12] + ("+dirty" if git["dirty"] else "")
    machine = f"{where['cores']} cores {where['cpu']}"
    env_id, eval_seed = resolve_env_id(result["evaluation"]["env_id"]), result["evaluation"]["seed"]
    found = []
    for kind, key in KINDS.items():
        y = result[key]
        row = Row(
            result["n_updates"], y, float(normalized_score("pointmaze-umaze", y)), result["seed"], kind,
            result["predicted_mean"] if kind == "exploit" else None, result["episodes"], round(result["seconds"]),
            commit, machine, None if kind.startswith("data") else eval_seed, env_id,
            None if kind in LEVELS else result["n_evaluations"],
        )  # fmt: skip
        found.append(row)
    return found


def main() -> None:
    for run in sys.argv[1:]:
        append_rows(RESULTS, rows(Path(run)))


if __name__ == "__main__":
    main()
