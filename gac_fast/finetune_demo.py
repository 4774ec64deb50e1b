"""``make finetune-demo``: the offline model of the demo improves itself by acting in UMaze, beside a control run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gac_fast.config import Config, preset
from gac_fast.errors import ConfigError

if TYPE_CHECKING:
    from gac_fast.evaluate import EvalResult

__all__ = ["FinetuneDemo", "main", "run"]

ENV = "pointmaze-umaze"
# Seed of the evaluation of demo 0; every further demo has starts of its own, none of them the demo's.
EVAL_SEED = 2_000_003


@dataclass(frozen=True)
class FinetuneDemo:
    """Go on from a finished demo: explore, learn, plan, and show what that brings and what updates alone bring."""

    run: Path = Path("runs/demo")
    """Folder of the demo."""
    run_dir: Path = Path("runs/demo-online")
    """Folder of the new run; an earlier one there is replaced."""
    n_steps: int = 0
    """Environment steps; 0 takes the preset's."""
    eval_episodes: int = 256
    """Fresh episodes from random starts, for each of the three policies."""
    preset: str = "pointmaze-umaze"
    """Preset whose planning and online settings are used."""
    control: bool = True
    """Run as many updates again without a new episode, to tell what acting is worth."""

    def __post_init__(self) -> None:
        if self.eval_episodes < 1:
            raise ConfigError(f"eval_episodes: expected at least 1, got {self.eval_episodes}")
        if self.n_steps < 0:
            raise ConfigError(f"n_steps: expected at least 0, got {self.n_steps}")


def run(demo: FinetuneDemo) -> dict[str, Any]:
    """Run it; returns what it adds to ``result.json``.

    Raises:
        ConfigError: no finished demo there, or the folder holds something that is not a run.
        KeyboardInterrupt: a run was asked to stop by a signal.
    """
    from gac_fast.data.pointmaze import generate_pointmaze
    from gac_fast.demo import MAZE, pictures
    from gac_fast.evaluate import evaluate
    from gac_fast.policy import load
    from gac_fast.train.log import RunDir, merge_result, read_result

    started = time.perf_counter()
    made = read_result(RunDir(demo.run))
    if "exploit_mean" not in made:
        raise ConfigError(f"run: expected the folder of a finished demo (make demo), found none in {demo.run}")
    seed, n = int(made["seed"]), demo.eval_episodes
    config = _config(demo, load(demo.run).config)
    data_episodes = int(made.get("data_episodes", 16384))
    _say(f"1/4  the {data_episodes:,} controller episodes of {demo.run}, made again")
    data = generate_pointmaze(MAZE, data_episodes, seed=seed).trajectories

    _say(f"2/4  {config.online.n_steps:,} environment steps, {config.online.updates_per_round} updates a round")
    run_dir = RunDir(_finetune(demo.run, config, data, demo.run_dir))
    offline, online = load(demo.run), load(run_dir.path)
    values: dict[str, Any] = {"seed": seed, "finetune_seconds": time.perf_counter() - started}
    policies = {"offline": offline, "online": online}
    if demo.control:
        n_updates = online.step - offline.step
        _say(f"3/4  control: {n_updates:,} updates on the offline data alone")
        control = config.replace(online={"explore": "off", "n_updates": n_updates, "eval_every": 0})
        policies["control"] = load(_finetune(demo.run, control, data, run_dir.path / "control"))

    _say(f"4/4  planning and acting, {n} fresh episodes for each policy")
    results = {
        name: evaluate(policy, ENV, n, EVAL_SEED + 1000 * seed, keep=n if name == "online" else 0)
        for name, policy in policies.items()
    }
    exploit = results["online"]
    best = read_result(run_dir)
    values |= {
        "offline_mean": results["offline"].mean,
        "exploit_mean": exploit.mean,
        "exploit_std": exploit.std,
        "exploit_standard_error": exploit.standard_error,
        "predicted_mean": float(exploit.predicted.mean()),
        "control_mean": results["control"].mean if demo.control else None,
        "control_predicted_mean": float(results["control"].predicted.mean()) if demo.control else None,
        "env_steps": best["env_steps"],
        "rounds": best["rounds"],
        "n_updates": online.step - offline.step,
        "episodes": n,
        "evaluation": exploit.summary(),
    }
    pictures(run_dir.plots, exploit)
    values["seconds"] = time.perf_counter() - started
    merge_result(run_dir, values)
    _say(_table(values, results))
    _say(f"{run_dir.result}, pictures in {run_dir.plots}")
    return values


def _config(demo: FinetuneDemo, own: Config) -> Config:
    named = preset(demo.preset).to_dict()
    online = named["online"] | ({"n_steps": demo.n_steps} if demo.n_steps else {})
    return own.replace(plan=named["plan"], online=online)


def _finetune(start: Path, config: Config, data: Any, folder: Path) -> Path:
    """A whole run; a demo that was stopped is begun anew, as ``make demo`` is."""
    from gac_fast.train.log import RunDir
    from gac_fast.train.online import finetune

    path = finetune(start, ENV, config, data=data, run_dir=folder, overwrite=RunDir(folder).config.exists())
    if not _is_finished(path, config):
        raise KeyboardInterrupt
    return path


def _is_finished(path: Path, config: Config) -> bool:
    from gac_fast.train.log import RunDir, last_metrics

    metrics = last_metrics(RunDir(path).metrics)
    if config.online.explore == "on":
        return metrics.get("online/env_steps", 0) >= config.online.n_steps
    return metrics.get("online/updates", 0) >= config.online.n_updates


def _table(values: dict[str, Any], results: dict[str, EvalResult]) -> str:
    from gac_fast.data import reference_scores

    _, controller = reference_scores(ENV)
    lines = [
        "",
        f"return over {values['episodes']} fresh episodes (the noiseless controller, told the goal: {controller:.0f})",
        f"  {'':<32}{'predicted':>10}{'achieved':>10}",
    ]
    names = {"offline": "offline model", "control": "the same updates, nothing new", "online": "after acting"}
    for name, label in names.items():
        if name in results:
            result = results[name]
            lines.append(f"  {label:<32}{np.mean(result.predicted):>10.1f}{result.mean:>10.1f}  +- {result.std:.1f}")
    lines.append(f"  {values['env_steps']:,} environment steps, {values['n_updates']:,} updates")
    lines.append(f"  {values['seconds']:.0f} s in all, {values['finetune_seconds']:.0f} of them for learning by acting")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m gac_fast.finetune_demo``; returns the exit status."""
    from gac_fast import cli

    program = "python -m gac_fast.finetune_demo"
    return cli.exit_status("finetune-demo", lambda: run(cli.parse(FinetuneDemo, argv, prog=program)))


if __name__ == "__main__":
    raise SystemExit(main())
