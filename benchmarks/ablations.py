"""What every part of the method is worth: variants of a preset, trained and evaluated alike.

python -m benchmarks.ablations pointmaze-umaze --data pointmaze-umaze-v0
python -m benchmarks.ablations hopper-medium --data hopper-medium.hdf5 --only preset "2 plan vectors" --seeds 0 1
python -m benchmarks.ablations hopper-medium --preset-run runs/hopper-s0 runs/hopper-s1 --planning
python -m benchmarks.ablations --markdown docs/ablations.md

A variant is a preset with a few fields changed. One that changes planning alone acts by the runs of the preset itself;
any other is trained, into ``<runs>/<task>/<variant>-s<seed>``. Every run acts under several seeds of planning and of
environments, and each of these evaluations is a row of ``benchmarks/results/ablations/<task>.csv``. What a row or a
finished run is there for is skipped, an interrupted training goes on: the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from gac_fast.config import Config, preset
from gac_fast.errors import ConfigError, DataError, GacError
from gac_fast.files import locked, read_json, replacing
from gac_fast.intervals import t_interval

if TYPE_CHECKING:
    from gac_fast.data import Trajectories

RESULTS = Path(__file__).resolve().parent / "results" / "ablations"
PRESET = "preset"

ActsBy = Literal["exploit", "best posterior plans", "target", "prior plans", "no plan"]
N_BEST = 64
"""Posterior plans of that many best trajectories, and the trajectories whose mean return is the target."""


@dataclass(frozen=True)
class Variant:
    """A preset with changes."""

    name: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields by section of the configuration."""
    acts_by: ActsBy = "exploit"
    """Kind of its plans. ``target``: plans sampled for the mean return of the best training trajectories."""

    @property
    def trains(self) -> bool:
        """Whether it needs runs of its own, beside those of the preset."""
        return not set(self.changes) <= {"plan"}

    @property
    def label(self) -> str:
        """The changes as a cell of the table of rows: what tells two definitions of one name apart."""
        return json.dumps({**self.changes, "acts_by": self.acts_by}, sort_keys=True)


@dataclass(frozen=True)
class Task:
    """Variants of one preset on one data set."""

    preset: str
    episodes: int
    """Of one evaluation."""
    eval_seeds: tuple[int, ...]
    variants: tuple[Variant, ...]


_ACTING = (
    Variant("best posterior plans", acts_by="best posterior plans"),
    Variant("plans for the best returns", acts_by="target"),
    Variant("plans of the prior", acts_by="prior plans"),
    Variant("no plan (z0 = 0)", acts_by="no plan"),
)
FREE = 1e6
"""A trust region without bounds."""

TASKS: dict[str, Task] = {
    "pointmaze-umaze": Task(
        "pointmaze-umaze",
        episodes=128,
        eval_seeds=(7, 8, 9, 10),
        variants=(
            Variant(PRESET),
            Variant("variational posterior", {"posterior": {"method": "variational"}}),
            Variant("1 posterior step", {"posterior": {"n_steps": 1}}),
            Variant("8 posterior steps", {"posterior": {"n_steps": 8}}),
            Variant("1 plan vector", {"model": {"n_z": 1}}),
            Variant("4 plan vectors", {"model": {"n_z": 4}}),
            Variant("states and actions", {"model": {"context": "states_actions"}}),
            Variant("return_context none", {"model": {"return_context": "none"}}),
            Variant("kappa 0", {"plan": {"kappa": 0.0}}),
            Variant("kappa 3", {"plan": {"kappa": 3.0}}),
            Variant("radius 0.25", {"plan": {"radius": 0.25}}),
            Variant("no radius", {"plan": {"radius": FREE}}),
            Variant("no trust region", {"plan": {"radius": FREE, "max_norm": FREE}}),
            Variant("no trust region, 1,000 steps", {"plan": {"radius": FREE, "max_norm": FREE, "n_steps": 1000}}),
            Variant("1,000 steps", {"plan": {"n_steps": 1000}}),
            *_ACTING,
        ),
    ),
    "hopper-medium": Task(
        "hopper",
        episodes=40,
        eval_seeds=(1, 2, 3, 4),
        variants=(
            Variant(PRESET),
            Variant("variational posterior", {"posterior": {"method": "variational"}}),
            Variant("1 posterior step", {"posterior": {"n_steps": 1}}),
            Variant("8 posterior steps", {"posterior": {"n_steps": 8}}),
            Variant("2 plan vectors", {"model": {"n_z": 2}}),
            Variant("states and actions", {"model": {"context": "states_actions"}}),
            Variant(
                "ascent, return_context first_state",
                {"model": {"return_context": "first_state"}, "plan": {"method": "ascent", "radius": 0.25}},
            ),
            Variant("no decoder first", {"posterior": {"warmup": 0.0}}),
            Variant("strength 1", {"plan": {"strength": 1.0}}),
            Variant("radius 1", {"plan": {"radius": 1.0}}),
            Variant("no radius", {"plan": {"radius": FREE}}),
            Variant("ascent, kappa 0", {"plan": {"method": "ascent", "radius": 0.25}}),
            Variant("ascent, kappa 1", {"plan": {"method": "ascent", "radius": 0.25, "kappa": 1.0}}),
            Variant("ascent, kappa 3", {"plan": {"method": "ascent", "radius": 0.25, "kappa": 3.0}}),
            Variant("ascent, no trust region", {"plan": {"method": "ascent", "radius": FREE, "max_norm": FREE}}),
            *_ACTING,
        ),
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Row(NamedTuple):
    """One evaluation of one run. No column is named as in the results of methods, so that no report takes these for
    one."""

    variant: str
    changes: str
    training_seed: int
    evaluation_seed: int
    n_episodes: int
    mean_return: float
    std_return: float
    tenth_percentile: float
    predicted_return: float
    updates: int
    training_seconds: float | None
    """None where that is not known."""
    environment: str
    commit: str
    machine: str
    date: str

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What it is there for: variant and its changes, both seeds and the number of episodes."""
        return self[:5]  # type: ignore[return-value]


_NUMBERS: dict[str, Any] = {
    "training_seed": int, "evaluation_seed": int, "n_episodes": int, "updates": int, "mean_return": float,
    "std_return": float, "tenth_percentile": float, "predicted_return": float,
}  # fmt: skip


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        DataError: it has other columns, or a cell is no number where one belongs; names file and line.
    """
    if not path.exists():
        return []
    lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    header = next(lines, [])
    if tuple(header) != Row._fields:
        raise DataError(f"{path}, line 1: expected the columns {','.join(Row._fields)}, got {','.join(header)}")
    rows = []
    for cells in lines:
        where = f"{path}, line {lines.line_num}"
        if len(cells) != len(header):
            raise DataError(f"{where}: expected {len(header)} columns as in line 1, got {len(cells)}")
        values: dict[str, Any] = dict(zip(header, cells, strict=True))
        for name, number in _NUMBERS.items():
            try:
                values[name] = number(values[name])
            except ValueError:
                raise DataError(f"{where}, column {name!r}: expected a number, got {values[name]!r}") from None
        seconds = values["training_seconds"]
        values["training_seconds"] = float(seconds) if seconds else None
        rows.append(Row(**values))
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row; the file is made with its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file, locked(path):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not os.fstat(file.fileno()).st_size:
            writer.writerow(Row._fields)
        writer.writerow("" if cell is None else cell for cell in row)
        file.write(text.getvalue().encode())


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def config_of(task: Task, variant: Variant, seed: int) -> Config:
    """Configuration of a run of a variant."""
    changed = preset(task.preset).replace(**{name: dict(fields) for name, fields in variant.changes.items()})
    return changed.replace(train={"seed": seed})


WHATEVER = {
    "seed", "device", "n_threads", "prefetch", "compile", "cuda_graph", "log_every", "eval_every", "replay_episodes",
    "checkpoint_every", "keep_checkpoints",
}  # fmt: skip
"""Fields of ``train`` that do not change what a run of the preset learns."""


def preset_runs(folders: Iterable[Path], task: Task) -> dict[int, Path]:
    """Finished runs of the preset, by seed.

    Raises:
        ConfigError: one is of another configuration, has not come to its end, or two have one seed.
    """
    from gac_fast.train.log import RunDir, read_result

    found: dict[int, Path] = {}
    for folder in folders:
        run = RunDir(folder)
        if not run.config.is_file():
            raise ConfigError(f"{folder}: expected the folder of a run, found no config.json")
        config = Config.from_dict(read_json(run.config))
        wanted = config_of(task, Variant(PRESET), config.train.seed)
        if difference := trained_otherwise(config, wanted):
            raise ConfigError(f"{folder}: expected a run of the preset: {difference}")
        if read_result(run).get("step") != wanted.train.n_updates:
            raise ConfigError(f"{folder}: expected a finished run of {wanted.train.n_updates:,} updates")
        if found.setdefault(config.train.seed, folder) != folder:
            raise ConfigError(
                f"{folder}: expected another train.seed than {found[config.train.seed]} has, got {config.train.seed}"
            )
    return found


def trained_otherwise(config: Config, wanted: Config) -> str:
    """The first field that makes a run another one than is wanted, whatever its seed; empty where none does.

    How a run plans is looked up when it acts, and what comes after training (``online``) says nothing of it.
    """
    for section in ("model", "posterior", "train", "baseline"):
        for name, value in wanted.to_dict()[section].items():
            got = getattr(getattr(config, section), name)
            if got != value and not (section == "train" and name in WHATEVER):
                return f"expected {section}.{name} {value!r}, got {got!r}"
    return ""


def finish(folder: Path, config: Config, data: Callable[[], Trajectories]) -> None:
    """Train a run, or go on with it; nothing is done for one that is finished.

    Raises:
        ConfigError: the folder holds a run of another configuration.
        KeyboardInterrupt: training was asked to stop by a signal.
    """
    from gac_fast import checkpoint
    from gac_fast.train.log import RunDir, read_result
    from gac_fast.train.offline import train

    run = RunDir(folder)
    if run.config.is_file():
        mine = Config.from_dict(read_json(run.config))
        difference = trained_otherwise(mine, config)
        if not difference and mine.train.seed != config.train.seed:
            difference = f"expected train.seed {config.train.seed}, got {mine.train.seed}"
        if difference:
            raise ConfigError(f"{folder}: holds another run, {difference}: move it away")
    if read_result(run).get("step") == config.train.n_updates:
        return
    resume = folder.is_dir() and bool(checkpoint.list_checkpoints(folder))
    train(data(), config, folder, resume=resume, overwrite=run.config.is_file() and not resume, tensorboard=False)
    if read_result(run).get("step") != config.train.n_updates:
        raise KeyboardInterrupt


def evaluated(folder: Path, task: Task, variant: Variant, eval_seed: int) -> Row:
    """Act by a run as a variant does.

    Raises:
        ConfigError: its data name no environment.
    """
    import torch

    from gac_fast.evaluate import evaluate
    from gac_fast.plan import Plans
    from gac_fast.policy import load
    from gac_fast.train.log import RunDir, machine, read_result, short_commit

    policy = load(folder)
    if policy.env_id is None:
        raise ConfigError(f"{folder}: expected a run whose data name their environment, got one without")
    seed = policy.config.train.seed
    # As the preset plans now, not as it did when the run was trained.
    policy.config = policy.config.replace(plan=config_of(task, variant, seed).to_dict()["plan"])
    n, plans = task.episodes, None
    if variant.acts_by == "best posterior plans":
        plans = policy.posterior_best(N_BEST)
    elif variant.acts_by == "target":
        target = float(policy.returns[policy.best(N_BEST)].mean())
        plans = policy.explore(n, target, seed=eval_seed)
    elif variant.acts_by == "prior plans":
        plans = policy.prior_plans(n, eval_seed)
    elif variant.acts_by == "no plan":
        one = policy.prior_plans(1, eval_seed)
        plans = Plans(torch.zeros_like(one.z0), one.return_mean, one.return_std)
    result = evaluate(policy, policy.env_id, n, eval_seed, plans)
    return Row(
        variant.name, variant.label, seed, eval_seed, n, result.mean, result.std,
        float(np.percentile(result.returns, 10)), float(result.predicted.mean()), policy.step,
        read_result(RunDir(folder)).get("train_seconds"), result.env_id, short_commit(), machine(policy.device),
        time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    )  # fmt: skip


def run(
    name: str, variants: Sequence[Variant], seeds: Sequence[int], data: Callable[[], Trajectories], runs: Path,
    results: Path, ready: Mapping[int, Path],
) -> int:  # fmt: skip
    """Train and evaluate what there is no row of.

    Args:
        name: of the task.
        variants: of it, in the order in which they are made, all seeds of one after another.
        seeds: of training.
        data: loads the episodes; called at most once, and not where nothing is trained.
        runs: folder of the runs.
        results: folder of the rows.
        ready: finished runs of the preset by seed, which need not be trained.

    Returns:
        How many rows were added.
    """
    task, path = TASKS[name], results / f"{name}.csv"
    load, added = functools.cache(data), 0
    for variant in variants:
        for seed in seeds:
            there = {row.key for row in read(path)}
            keys = [(variant.name, variant.label, seed, s, task.episodes) for s in task.eval_seeds]
            if there.issuperset(keys):
                continue
            made = variant if variant.trains else Variant(PRESET)
            folder = runs / name / f"{re.sub(r'[^a-z0-9]+', '-', made.name.lower()).strip('-')}-s{seed}"
            if not variant.trains and seed in ready:
                folder = ready[seed]
            else:
                finish(folder, config_of(task, made, seed), load)
            for key in keys:
                if key not in there:
                    row = evaluated(folder, task, variant, key[3])
                    append(path, row)
                    added += 1
                    print(f"{variant.name}, seed {seed}, evaluation {key[3]}: {row.mean_return:.1f}", flush=True)
    return added


# ---------------------------------------------------------------------------------------------------------------------
# Table

HEADER = (
    "variant", "return by training seed", "mean [95%]", "beside the preset's same seeds [95%]", "predicted",
    "lowest tenth", "sd over evaluations", "minutes",
)  # fmt: skip


def table(name: str, rows: Sequence[Row]) -> list[str]:
    """Markdown lines: a line for every variant of the task that has rows; of equal keys the last row counts."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in {row.key: row for row in rows}.values():
        found.setdefault(row.changes, {}).setdefault(row.training_seed, []).append(row)
    base = {seed: _mean(its) for seed, its in found.get(Variant(PRESET).label, {}).items()}
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for variant in TASKS[name].variants:
        by_seed = dict(sorted(found.get(variant.label, {}).items()))
        if not by_seed:
            continue
        means = {seed: _mean(its) for seed, its in by_seed.items()}
        gaps = [mean - base[seed] for seed, mean in means.items() if seed in base and variant.name != PRESET]
        every = [row for its in by_seed.values() for row in its]
        seconds = [its[0].training_seconds for its in by_seed.values() if its[0].training_seconds is not None]
        predicts = variant.acts_by != "no plan"
        cells = (
            variant.name + (" (trained)" if variant.trains else ""),
            ", ".join(f"{mean:,.0f}" for mean in means.values()),
            _with_interval(list(means.values()), ",.0f"),
            _with_interval(gaps, "+,.0f") if gaps else "",
            f"{np.mean([row.predicted_return for row in every]):,.0f}" if predicts else "",
            f"{np.mean([row.tenth_percentile for row in every]):,.0f}",
            f"{np.mean([np.std([row.mean_return for row in its], ddof=1) for its in by_seed.values()]):,.0f}"
            if all(len(its) > 1 for its in by_seed.values())
            else "",
            f"{np.mean(seconds) / 60:.1f}" if seconds and (variant.trains or variant.name == PRESET) else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _mean(rows: Sequence[Row]) -> float:
    return float(np.mean([row.mean_return for row in rows]))


def _with_interval(values: Sequence[float], form: str) -> str:
    interval = t_interval(values)
    text = f"{np.mean(values):{form}}"
    return text if interval is None else f"{text} [{interval.low:{form}}, {interval.high:{form}}]"


def write_tables(document: Path, results: Path) -> None:
    """Put the tables into a document, each between ``<!-- table: TASK -->`` and ``<!-- end of table -->``.

    Raises:
        DataError: a task that has rows has no place there.
    """
    text = document.read_text(encoding="utf-8")
    for name in TASKS:
        if rows := read(results / f"{name}.csv"):
            start, end = f"<!-- table: {name} -->", "<!-- end of table -->"
            before, found, rest = text.partition(start)
            _, closed, after = rest.partition(end)
            if not (found and closed):
                raise DataError(f"{document}: expected {start!r} and {end!r} after it, found no such place")
            text = "\n".join([before + start, *table(name, rows), end]) + after
    with replacing(document) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for an error, 130 for an interrupt."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=TASKS, help="whose variants to run; none: only --markdown")
    parser.add_argument("--data", help="HDF5 file or Minari id to train on")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone, in this order")
    parser.add_argument("--planning", action="store_true", help="variants alone that need no training of their own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training")
    parser.add_argument("--preset-run", nargs="+", type=Path, default=[], help="finished runs of the preset itself")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "ablations", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--markdown", type=Path, help="document whose tables to write anew")
    args = parser.parse_args(argv)
    try:
        if args.task is None and args.markdown is None:
            raise ConfigError("TASK or --markdown: expected one of them, got neither")
        if args.task is not None:
            task = TASKS[args.task]
            by_name = {variant.name: variant for variant in task.variants}
            for name in args.only or ():
                if name not in by_name:
                    raise ConfigError(f"--only: expected one of {', '.join(map(repr, by_name))}, got {name!r}")
            chosen = [by_name[name] for name in args.only or by_name]
            chosen = [variant for variant in chosen if not (args.planning and variant.trains)]
            ready = preset_runs(args.preset_run, task)

            def data() -> Trajectories:
                from gac_fast.data import load

                if args.data is None:
                    raise ConfigError("--data: expected what to train on, as a run is missing, got nothing")
                return load(args.data, keep_rewards=preset(task.preset).train.segment > 0)

            added = run(args.task, chosen, args.seeds, data, args.runs, args.results, ready)
            print(f"{added} rows added to {args.results / args.task}.csv")
            print("\n".join(table(args.task, read(args.results / f"{args.task}.csv"))))
        if args.markdown is not None:
            write_tables(args.markdown, args.results)
    except KeyboardInterrupt:
        print("ablations: interrupted", file=sys.stderr)
        return 130
    except (GacError, OSError) as error:
        print(f"ablations: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
