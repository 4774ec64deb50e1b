"""``make demo``: the whole method on UMaze, from raw physics to a table and pictures, in minutes on two CPU cores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gac_fast.config import Config, preset
from gac_fast.errors import ConfigError

if TYPE_CHECKING:
    from gac_fast.evaluate import EvalResult

__all__ = ["Demo", "main", "run"]

MAZE = "umaze"
N_BEST = 64
N_DRAWN = 12
# Seed of the evaluation of demo 0; every further demo has starts of its own.
EVAL_SEED = 1_000_003


@dataclass(frozen=True)
class Demo:
    """Train on controller episodes of UMaze, plan, act, and show the result."""

    run_dir: Path = Path("runs/demo")
    """Folder of the run; an earlier demo there is replaced."""
    seed: int = 0
    """Seed of data and training; that of evaluation and planning follows from it."""
    data_episodes: int = 16384
    """Controller episodes to generate; their mean return is a tenth of what the noiseless controller gets."""
    eval_episodes: int = 256
    """Fresh episodes from random starts, for every kind of plan."""
    preset: str = "pointmaze-umaze"
    """Configuration to train."""
    n_updates: int = 0
    """Parameter updates; 0 takes the preset's."""
    bf16: Literal["off", "on", "auto"] = "auto"
    """bfloat16 in training; auto where the processor multiplies matrices in it."""

    def __post_init__(self) -> None:
        for name in ("data_episodes", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        _config(self)


def run(demo: Demo) -> dict[str, Any]:
    """Run the demo; returns what it adds to ``result.json``.

    Raises:
        ConfigError: the folder holds something that is not a run.
        KeyboardInterrupt: training was asked to stop by a signal.
    """
    from gac_fast.data.pointmaze import generate_pointmaze
    from gac_fast.evaluate import evaluate
    from gac_fast.policy import load
    from gac_fast.train.log import RunDir, last_metrics, merge_result, start_run
    from gac_fast.train.offline import train

    started = time.perf_counter()
    config = _config(demo)
    env_id = f"pointmaze-{MAZE}"
    # Before the minutes of work: it refuses a folder that holds something else.
    start_run(demo.run_dir, config.to_dict(), overwrite=RunDir(demo.run_dir).config.exists())
    _say(f"1/4  {demo.data_episodes:,} controller episodes in {MAZE}")
    data = generate_pointmaze(MAZE, demo.data_episodes, seed=demo.seed).trajectories
    _say(f"     {data}")
    _say(f"2/4  training, {config.train.n_updates:,} updates of {config.train.batch_size} trajectories")
    run_dir = RunDir(train(data, config, demo.run_dir, env=env_id, overwrite=True))
    policy = load(run_dir.path)
    if policy.step < config.train.n_updates:
        raise KeyboardInterrupt

    _say(f"3/4  planning and acting, {demo.eval_episodes} fresh episodes for each kind of plan")
    n, eval_seed = demo.eval_episodes, EVAL_SEED + 1000 * demo.seed
    results = {
        "prior": evaluate(policy, env_id, n, eval_seed, policy.prior_plans(n, seed=eval_seed)),
        "best posterior": evaluate(policy, env_id, n, eval_seed, policy.posterior_best(N_BEST)),
        "exploit": evaluate(policy, env_id, n, eval_seed, keep=n),
    }
    random_returns = random_policy(env_id, n, eval_seed)
    exploit = results["exploit"]
    values: dict[str, Any] = {
        "random_mean": float(random_returns.mean()),
        "data_mean": float(data.returns.mean()),
        "data_best": float(data.returns.max()),
        "prior_plan_mean": results["prior"].mean,
        "best_posterior_mean": results["best posterior"].mean,
        "exploit_mean": exploit.mean,
        "exploit_std": exploit.std,
        "predicted_mean": float(exploit.predicted.mean()),
        "episodes": n,
        "seed": demo.seed,
        "data_episodes": demo.data_episodes,
        "n_updates": policy.step,
        "steering_metrics": {
            name: value
            for name, value in last_metrics(run_dir.metrics).items()
            if name.startswith(("held_out/", "replay/"))
        },
        "evaluation": exploit.summary(),
        "n_evaluations": len(results),
    }
    _say("4/4  pictures")
    pictures(run_dir.plots, exploit)
    values["seconds"] = time.perf_counter() - started
    merge_result(run_dir, values)
    _say(_table(values))
    _say(f"{run_dir.result}, pictures in {run_dir.plots}")
    return values


def _config(demo: Demo) -> Config:
    train: dict[str, Any] = {"seed": demo.seed, "bf16": demo.bf16}
    if demo.n_updates:
        train["n_updates"] = demo.n_updates
    return preset(demo.preset).replace(train=train)


def random_policy(env_id: str, episodes: int, seed: int) -> np.ndarray:
    """Returns [episodes] of uniform random actions."""
    from gac_fast import envs
    from gac_fast.evaluate import MAX_ENVS
    from gac_fast.rollout import rollout

    env = envs.make_vector(env_id, num_envs=min(episodes, MAX_ENVS))
    actor = _UniformActor(env.action_space, np.random.default_rng(seed))
    try:
        return rollout(env, lambda obs, first: actor, episodes, seed).returns
    finally:
        env.close()


@dataclass
class _UniformActor:
    """Acts without looking."""

    space: Any
    """Box of a vector of environments."""
    rng: np.random.Generator

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Uniform actions, float32 [num_envs, act_dim], for any observations."""
        return self.rng.uniform(self.space.low, self.space.high).astype(np.float32)


def pictures(folder: Path, exploit: EvalResult) -> None:
    """Predicted against achieved returns by start, and episodes in the maze."""
    from gac_fast import plots
    from gac_fast.envs.mazes import maze_spec

    spec = maze_spec(MAZE)
    walls = spec.cell_to_xy(np.array(spec.wall_cells))
    folder.mkdir(exist_ok=True)
    plots.predicted_vs_achieved(
        exploit.predicted, exploit.returns, folder / "predicted_vs_achieved.png",
        starts=exploit.rollout.first_observations[:, :2], walls=walls, cell_size=spec.cell_size,
        goal=spec.goal_xy, radius=spec.goal_radius,
    )  # fmt: skip
    plots.maze_episodes(
        [track[:, :2] for track in exploit.rollout.observations], exploit.returns, walls, spec.cell_size,
        spec.goal_xy, spec.goal_radius, folder / "episodes.png", n=N_DRAWN,
    )  # fmt: skip


def _table(values: dict[str, Any]) -> str:
    rows = [
        ("uniform random actions", values["random_mean"]),
        ("data, mean episode", values["data_mean"]),
        ("data, best episode", values["data_best"]),
        ("plans from the prior", values["prior_plan_mean"]),
        (f"plans of the {N_BEST} best episodes", values["best_posterior_mean"]),
        ("exploit, predicted", values["predicted_mean"]),
        ("exploit, achieved", values["exploit_mean"]),
    ]
    from gac_fast.data import reference_scores

    _, controller = reference_scores(f"pointmaze-{MAZE}")
    lines = [
        "",
        f"return over {values['episodes']} fresh episodes (the noiseless controller, told the goal: {controller:.0f})",
    ]
    lines += [f"  {name:<32}{value:8.1f}" for name, value in rows]
    lines[-1] += f"  +- {values['exploit_std']:.1f}"
    steering = values["steering_metrics"]
    lines += ["held out"] + [f"  {name:<32}{value:8.3f}" for name, value in steering.items()]
    lines.append(f"  {values['seconds']:.0f} s in all")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m gac_fast.demo``; returns the exit status, as :func:`gac_fast.cli.exit_status`."""
    from gac_fast import cli

    return cli.exit_status("demo", lambda: run(cli.parse(Demo, argv, prog="python -m gac_fast.demo")))


if __name__ == "__main__":
    raise SystemExit(main())
