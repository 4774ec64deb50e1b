"""What the scripts of this folder share: data, evaluation, result rows, stopping and resuming.

They run in an environment of their own (``make peers``), whose gymnasium is older than the package asks for, so they
take from the package only what needs no simulator. Evaluation is that of ``gac-fast eval``: episode i starts as
``reset(seed=seed + i)`` of gymnasium's own environment does, and its return is the sum of its rewards.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gac_fast.data import Trajectories, load, normalized_score
from gac_fast.errors import ConfigError, DataError, EnvError, GacError
from gac_fast.files import read_json, write_json
from gac_fast.intervals import standard_error
from gac_fast.results import Row, append_rows, check_appendable
from gac_fast.train.log import Progress, StopSignal, environment, machine, short_commit

RESULTS = Path("benchmarks") / "results"
SAVE_EVERY = 5000
"""Updates after which a run is saved at the latest."""


class Agent(Protocol):
    """What acts in an evaluation; row i is episode i."""

    def begin(self, n: int) -> None:
        """n new episodes."""

    def act(self, rows: np.ndarray, obs: np.ndarray) -> np.ndarray:
        """Actions [m, act_dim] of the episodes ``rows`` (int64 [m]), from obs [m, obs_dim]; environment units."""

    def rewarded(self, rows: np.ndarray, rewards: np.ndarray) -> None:
        """What these actions earned, [m]."""


class Learner(Protocol):
    """One method of one library."""

    def update(self) -> dict[str, float]:
        """One gradient step; what to show of it."""

    def agents(self) -> list[tuple[str, float | None, Agent]]:
        """Kind of each result row (``exploit`` is what the method does by itself), the return it promises (None: none),
        and what acts."""

    def save(self, path: Path) -> None:
        """Everything that training goes on from."""

    def load(self, path: Path, seed: int) -> None:
        """Take over what :meth:`save` wrote; batches are drawn by ``seed`` from here on."""


@dataclass
class Steps:
    """A file's steps as arrays, whole episodes end to end; actions within [-1, 1]."""

    observations: np.ndarray  # float32 [N, obs_dim], standardised where the learner asked for it
    actions: np.ndarray  # float32 [N, act_dim]
    rewards: np.ndarray  # float32 [N]
    terminals: np.ndarray  # bool [N], ended by the environment
    timeouts: np.ndarray  # bool [N], the last step of every other episode
    returns_to_go: np.ndarray  # float64 [N]
    data: Trajectories
    obs_mean: np.ndarray  # [obs_dim]
    obs_std: np.ndarray  # [obs_dim]

    def normalise(self, obs: np.ndarray) -> np.ndarray:
        """Environment -> what the learner reads, float32."""
        return ((obs - self.obs_mean) / self.obs_std).astype(np.float32)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """[-1, 1] -> environment, float32."""
        low, high = self.data.action_low, self.data.action_high
        return (np.clip(actions, -1, 1) * ((high - low) / 2) + (high + low) / 2).astype(np.float32)


def read_steps(path: Path, standardise: bool, whole_only: bool) -> Steps:
    """Read an HDF5 file in D4RL layout by the rules of ``gac_fast.data``.

    Args:
        standardise: of the observations.
        whole_only: leave out cut episodes, whose returns to go are too small.
    """
    import h5py

    data = load(path, keep_rewards=True)
    with h5py.File(path) as file:
        # Of a Maze2D run the last row is left off.
        terminals = file["terminals"][: data.num_steps].astype(np.bool_)
    if whole_only and not data.complete.all():
        print(f"{int((~data.complete).sum())} cut episodes are left out", file=sys.stderr)
        terminals = terminals[np.repeat(data.complete, data.lengths)]
        data = data.subset(data.complete)
    assert data.rewards is not None
    ends = np.zeros(data.num_steps, np.bool_)
    ends[data.cu_seqlens[1:] - 1] = True
    statistics = data.statistics()
    mean, std = np.zeros(data.obs_dim), np.ones(data.obs_dim)
    if standardise:
        mean, std = statistics.obs_mean, np.where(statistics.obs_std > 1e-6, statistics.obs_std, 1.0)
    half, mid = (data.action_high - data.action_low) / 2, (data.action_high + data.action_low) / 2
    steps = Steps(
        data.observations, (data.actions - mid) / half, data.rewards, terminals, ends & ~terminals,
        data.returns_to_go(), data, mean, std,
    )  # fmt: skip
    if standardise:
        steps.observations = steps.normalise(data.observations)
    return steps


def evaluate(
    agent: Agent, env_id: str, episodes: int, seed: int, stop: StopSignal, show: Callable[[int], None]
) -> np.ndarray | None:
    """Returns float64 [episodes]; None where it was stopped."""
    import gymnasium

    envs = [gymnasium.make(env_id) for _ in range(episodes)]
    try:
        obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
        returns, rows = np.zeros(episodes), np.arange(episodes)
        agent.begin(episodes)
        while len(rows):
            if stop.requested:
                return None
            actions = agent.act(rows, obs[rows])
            rewards, ended = np.zeros(len(rows)), np.zeros(len(rows), np.bool_)
            for k, i in enumerate(rows):
                obs[i], rewards[k], terminated, truncated, _ = envs[i].step(actions[k])
                ended[k] = terminated or truncated
            returns[rows] += rewards
            agent.rewarded(rows, rewards)
            rows = rows[~ended]
            if ended.any():
                show(episodes - len(rows))
        return returns
    finally:
        for env in envs:
            env.close()


def check_env(env_id: str, steps: Steps) -> None:
    """Before the work: the environment exists and has the spaces of the data.

    Raises:
        EnvError: naming what differs.
    """
    import gymnasium

    try:
        env = gymnasium.make(env_id)
    except Exception as error:
        raise EnvError(
            f"environment {env_id!r} cannot be made with gymnasium {gymnasium.__version__}: {error}"
        ) from None
    found = env.observation_space.shape, env.action_space.shape
    env.close()
    expected = (steps.data.obs_dim,), (steps.data.act_dim,)
    if found != expected:
        raise EnvError(f"{env_id}: expected observations and actions of shapes {expected} as in the data, got {found}")


def parser(description: str, updates: int, batch_size: int) -> argparse.ArgumentParser:
    """The flags that all scripts take."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="HDF5 file in D4RL layout")
    p.add_argument("--updates", type=int, default=updates, help="gradient steps")
    p.add_argument("--batch-size", type=int, default=batch_size, help="of each")
    p.add_argument("--seed", type=int, default=0, help="of training; episode i is seeded with --eval-seed + i")
    p.add_argument("--eval-seed", type=int, default=0, help="of the first episode, as in gac-fast eval --seed")
    p.add_argument("--episodes", type=int, default=100, help="of each evaluation")
    p.add_argument("--eval-every", type=int, default=0, help="updates between evaluations; 0: one at the end")
    p.add_argument("--env", help="environment id (default: that of the data)")
    p.add_argument("--out", type=Path, help="CSV to append to (default: benchmarks/results/<method>/<file>.csv)")
    p.add_argument("--run-dir", type=Path, help="where the model goes (default: runs/<method>-<file>-s<seed>)")
    p.add_argument("--resume", action="store_true", help="go on from what --run-dir holds")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0: torch's own choice")
    return p


def main(
    method: str,
    packages: Sequence[str],
    options: argparse.Namespace,
    make: Callable[[argparse.Namespace], tuple[Steps, Callable[[], Learner]]],
) -> int:
    """Train, evaluate, append rows. Ctrl-C saves the model and stops; ``--resume`` goes on.

    Args:
        method: name of the folder of results.
        packages: whose versions are recorded.
        make: reads the data, and gives what makes the learner once everything was checked.

    Returns:
        Exit status: 0, 2 for an error (one line on standard error), 130 where it was stopped.
    """
    try:
        return _main(method, packages, options, make)
    except KeyboardInterrupt:
        print(f"{method}: interrupted", file=sys.stderr)
        return 130
    except (GacError, OSError) as error:
        print(f"{method}: error: {error}", file=sys.stderr)
        return 2


def _main(
    method: str,
    packages: Sequence[str],
    o: argparse.Namespace,
    make: Callable[[argparse.Namespace], tuple[Steps, Callable[[], Learner]]],
) -> int:
    for name in ("updates", "batch_size", "episodes"):
        if getattr(o, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(o, name)}")
    for name in ("seed", "eval_seed", "eval_every", "threads"):
        if not 0 <= getattr(o, name) < 2**31:
            raise ConfigError(f"--{name.replace('_', '-')}: expected a value in [0, 2^31), got {getattr(o, name)}")
    if not o.data.is_file():
        raise DataError(f"--data: expected an HDF5 file, found no file {o.data}")
    import torch

    if o.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device: expected a device that torch can use, got {o.device!r}")
    if o.threads:
        torch.set_num_threads(o.threads)
    task = o.data.stem
    run_dir = o.run_dir or Path("runs") / f"{method}-{task}-s{o.seed}"
    out = o.out or RESULTS / method / f"{task}.csv"
    if (run_dir / "state.json").exists() and not o.resume:
        raise ConfigError(f"{run_dir} holds a run already: --resume goes on with it, --run-dir names another folder")
    if o.resume and not (run_dir / "state.json").exists():
        raise ConfigError(f"--resume: expected a run in {run_dir}, found no state.json")
    check_appendable(out)
    torch.manual_seed(o.seed)
    np.random.seed(o.seed)  # noqa: NPY002  (what the libraries draw from)
    steps, make_learner = make(o)
    env_id = o.env or steps.data.env_id
    if env_id is None:
        raise ConfigError("--env: expected an environment id, as the data names none")
    check_env(env_id, steps)
    learner = make_learner()
    identity = {"method": method, "data": o.data.name, "seed": o.seed, "batch_size": o.batch_size}
    done, seconds, evaluations = 0, 0.0, 0
    # What was evaluated of the model as it is: [kind, seed, episodes, environment].
    evaluated: list[list[object]] = []
    if o.resume:
        state = read_json(run_dir / "state.json")
        for name, value in identity.items():
            if state.get(name) != value:
                raise ConfigError(f"{run_dir}: expected a run of {name} {value!r}, it is one of {state.get(name)!r}")
        done, seconds, evaluations = int(state["step"]), float(state["seconds"]), int(state.get("evaluations", 0))
        evaluated = state.get("evaluated", [])
        # Files keep no generators; started by the run's own seed they would repeat the first batches.
        again = int(np.random.SeedSequence([o.seed, done]).generate_state(1)[0] >> 1)
        torch.manual_seed(again)
        np.random.seed(again)  # noqa: NPY002
        learner.load(run_dir / "model", again)
    where = machine(torch.device(o.device))
    here = environment()
    here["packages"] |= {name: importlib.metadata.version(name) for name in packages}
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "environment.json", here)

    def record() -> None:
        state = {"step": done, "seconds": time.perf_counter() - started, "updates": o.updates}
        counts = {"evaluations": evaluations, "evaluated": evaluated}
        write_json(run_dir / "state.json", {**identity, **state, **counts})

    def save() -> None:
        learner.save(run_dir / "model")
        record()

    with StopSignal() as stop:
        started = time.perf_counter() - seconds
        while not stop.requested:
            # One that was stopped in its evaluation begins with that.
            due = done >= o.updates or (o.eval_every > 0 and done > 0 and done % o.eval_every == 0)
            for kind, promised, agent in learner.agents() if due else []:
                this = [kind, o.eval_seed, o.episodes, env_id]
                if this in evaluated:
                    continue
                with Progress(o.episodes, "evaluate", unit="episode") as bar:
                    shown = [0]

                    def show(n: int, bar: Progress = bar, shown: list[int] = shown) -> None:
                        bar.update(n - shown[0])
                        shown[0] = n

                    returns = evaluate(agent, env_id, o.episodes, o.eval_seed, stop, show)
                if returns is None:
                    break
                evaluations += 1
                seconds = time.perf_counter() - started
                _report(out, where, env_id, returns, done, o.seed, kind, promised, seconds, o.eval_seed, evaluations)
                evaluated.append(this)
                record()
            if done >= o.updates or stop.requested:
                break
            goal = min(o.updates, done + o.eval_every - done % o.eval_every) if o.eval_every else o.updates
            evaluated = []
            with Progress(o.updates, method, initial=done) as bar:
                while done < goal and not stop.requested:
                    bar.update(1, **learner.update())
                    done += 1
                    if done % SAVE_EVERY == 0:
                        save()
            save()
    if stop.requested:
        print(f"{method}: stopped after {done} of {o.updates} updates, saved in {run_dir}: go on with --resume")
        return 130
    print(f"run {run_dir}, rows in {out}")
    return 0


def _report(
    out: Path, machine_name: str, env_id: str, returns: np.ndarray, step: int, seed: int, kind: str,
    promised: float | None, seconds: float, eval_seed: int, evaluations: int,
) -> None:  # fmt: skip
    """Print a result and append its row."""
    mean = float(returns.mean())
    try:
        score: float | None = float(normalized_score(env_id, mean))
    except DataError:
        score = None
    row = Row(
        step, mean, score, seed, kind, promised, len(returns), round(seconds, 1), short_commit(), machine_name,
        eval_seed, env_id, evaluations,
    )  # fmt: skip
    append_rows(out, [row])
    error = f" +- {standard_error(returns):.2f}" if len(returns) > 1 else ""
    shown = "no normalised score" if score is None else f"normalised {score:.2f}"
    print(f"{env_id}, step {step:,}, {kind}: return {mean:.2f}{error} of {len(returns)} episodes, {shown}")
