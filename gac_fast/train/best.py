"""Which checkpoint of a run is its best one, and who says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gac_fast import checkpoint
from gac_fast.train.log import RunDir, metric_rows

__all__ = ["REPLAY", "Best", "best_checkpoint", "best_replay"]

REPLAY = "replay/best_plans"
"""The metric of training that is an evaluation: the mean return under the plans of the best training trajectories."""


class Best(NamedTuple):
    """The checkpoint with the best evaluation recorded so far."""

    step: int
    how: str
    """By which evaluations it was chosen."""
    kept: bool
    """Whether its checkpoint is still there."""


def best_replay(run: RunDir) -> tuple[int, float] | None:
    """(step, mean return) of the best replay of good plans in the run's metrics; the earliest of equals."""
    return max(metric_rows(run.metrics, REPLAY), key=lambda row: (row[1], -row[0]), default=None)


def best_checkpoint(
    run: RunDir,
    evaluations: Mapping[str, Any],
    env_id: str,
    plans: str,
    target: float | None,
    seed: int,
    episodes: int,
) -> Best | None:
    """The best checkpoint by the replays of training; where there were none, by earlier evaluations.

    Args:
        run: whose metrics and checkpoints count.
        evaluations: entries of its ``result.json``.
        env_id, plans, target: of the evaluation to come; earlier ones count if these are the same.
        seed, episodes: of the evaluation to come, whose episode i begins as seed + i says. Earlier ones that share a
            start do not count: chosen by its own episodes, a checkpoint would be reported by the luck that chose it.

    Returns:
        None where fewer than two steps were compared: then nothing has chosen.
    """
    replays = metric_rows(run.metrics, REPLAY)
    best, there = best_replay(run), checkpoint.list_checkpoints(run.path)
    if best is not None and len(replays) > 1:
        how = f"best of {len(replays)} replays in training"
        return Best(best[0], how, checkpoint.checkpoint_path(run.path, best[0]) in there)
    sums: dict[int, tuple[float, int]] = {}
    for entry in evaluations.values():
        same = isinstance(entry, Mapping) and all(
            entry.get(name) == value for name, value in (("env_id", env_id), ("plans", plans), ("target", target))
        )
        apart = same and abs(entry["seed"] - seed) >= (entry["episodes"] if entry["seed"] < seed else episodes)
        if apart and entry.get("return_mean") is not None:
            total, n = sums.get(entry["step"], (0.0, 0))
            sums[entry["step"]] = total + entry["return_mean"] * entry["episodes"], n + entry["episodes"]
    if len(sums) < 2:
        return None
    step = max(sums, key=lambda step: (sums[step][0] / sums[step][1], -step))
    how = f"best of {len(sums)} steps evaluated before from other starts"
    return Best(step, how, checkpoint.checkpoint_path(run.path, step) in there)
