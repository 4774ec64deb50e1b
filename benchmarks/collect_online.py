"""Gather the curves of fine-tuned runs: what exploit achieved and predicted at each evaluation, per environment step.

python benchmarks/collect_online.py --csv benchmarks/results/hopper_online.csv --plot docs/images/hopper_online.png \
    runs/hopper-online-s0 runs/hopper-online-s0-control ...

A run that only updated (``online.explore off``) is the control of its seed; its curve goes by updates alone.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "kind", "seed", "env_steps", "updates", "episodes", "return", "standard_error", "predicted", "env_id", "commit",
    "machine",
)  # fmt: skip


def rows(run: Path) -> list[dict[str, Any]]:
    """One per evaluation of a fine-tuned run, in order; the last one of ``gac-fast eval`` follows as ``..., end``.

    Raises:
        ValueError: there is no evaluation in its metrics.
    """
    config = json.loads((run / "config.json").read_text())
    where = json.loads((run / "environment.json").read_text())
    result = json.loads((run / "result.json").read_text())
    git = where["git"] or {"commit": "unknown", "dirty": False}
    same = {
        "seed": config["train"]["seed"],
        "env_id": result["env_id"],
        "commit": git["commit"][:12] + ("+dirty" if git["dirty"] else ""),
        "machine": f"{where['cores']} cores {where['cpu']}",
    }
    kind = "online" if config["online"]["explore"] == "on" else "control"
    found = []
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if not line.get("exploit/achieved"):
                continue
            found.append(
                same
                | {
                    "kind": kind,
                    "env_steps": int(float(line.get("online/env_steps") or 0)),
                    "updates": int(float(line["online/updates"])),
                    "episodes": config["online"]["eval_episodes"],
                    "return": float(line["exploit/achieved"]),
                    "standard_error": float(line["exploit/standard_error"]),
                    "predicted": float(line["exploit/predicted"]),
                }
            )
    if not found:
        raise ValueError(f"{run}: expected evaluations in its metrics.csv, found none")
    made = [one for one in result.get("evaluations", {}).values() if one["plans"] == "exploit"]
    if made:
        last = max(made, key=lambda one: one["evaluation"])
        found.append(
            found[-1]
            | {
                "kind": f"{kind}, end",
                "episodes": last["episodes"],
                "return": last["return_mean"],
                "standard_error": last["return_standard_error"],
                "predicted": last["predicted_mean"],
            }
        )
    return found


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Returns over updates, a colour per seed: acting as a line, the control dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, seed in enumerate(sorted({row["seed"] for row in found})):
        for kind, style in (("online", "-"), ("control", "--")):
            mine = [row for row in found if row["seed"] == seed and row["kind"] == kind]
            label = f"seed {seed}, {'acting' if kind == 'online' else 'the same updates, nothing new'}"
            x, y = [row["updates"] for row in mine], [row["return"] for row in mine]
            error = [row["standard_error"] for row in mine]
            axes.errorbar(
                x, y, error, color=f"C{i}", linestyle=style, marker=".", capsize=2, label=label if mine else None
            )
            if kind == "online" and mine:
                per_update = mine[-1]["env_steps"] / mine[-1]["updates"]
    axes.set_xlabel("updates")
    top = axes.secondary_xaxis("top", functions=(lambda x: x * per_update, lambda x: x / per_update))
    top.set_xlabel("environment steps of the acting runs")
    axes.set_ylabel(f"{found[0]['env_id']}: return of exploit")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path, required=True, help="written anew")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    found = [row for run in arguments.runs for row in rows(run)]
    with arguments.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    if arguments.plot is not None:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
