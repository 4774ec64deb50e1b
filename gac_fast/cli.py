"""The command line: ``gac-fast data | train | baseline | finetune | eval | report | info``.

Each command is a dataclass whose field docs are its help, and a function that runs it. Heavy imports are inside the
functions, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gac_fast._version import __version__
from gac_fast.config import PRESETS, Config, preset
from gac_fast.errors import CheckpointError, ConfigError, EnvError, GacError
from gac_fast.files import read_json, write_json

if TYPE_CHECKING:
    import numpy as np

    from gac_fast.data import Trajectories
    from gac_fast.evaluate import EvalResult
    from gac_fast.plan import Plans
    from gac_fast.policy import Policy
    from gac_fast.results import Row
    from gac_fast.train.log import RunDir

__all__ = ["exit_status", "main", "parse"]

DEFAULT_PRESET = "gym"
TARGET_RULE = "--target: expected the wanted return with --plans explore, and only there or for a dt run"
DEBUG_VARIABLE = "GAC_FAST_DEBUG"
VARIABLES: Mapping[str, str] = {
    "GAC_FAST_BACKEND": "force every op onto reference, triton or cpp; an op that cannot run there raises",
    "GAC_FAST_KEEP_MEMORY": "0: while it trains, freed memory goes back to the system at once, which is slower",
    "GAC_FAST_CPU_ISA": "force a path of the C++ engine: portable, avx2, avx512 or amx; one that cannot run raises",
    "GAC_FAST_DATA": "folder of full D4RL files for the tests that want them",
    DEBUG_VARIABLE: "1: show the traceback of an error",
    "GAC_FAST_NO_CPP": "1 at installation: leave out the C++ engine",
    "CUDA_VISIBLE_DEVICES": "CUDA devices that torch may use",
    "MINARI_DATASETS_PATH": "folder of the local Minari datasets (default ~/.minari/datasets)",
    "MUJOCO_GL": "how MuJoCo renders: egl, osmesa or glfw (default: what works)",
    "OMP_NUM_THREADS": "CPU threads of torch",
    "TRITON_INTERPRET": "1: run Triton kernels on CPU tensors, for tests",
}
"""The environment variables that matter, with their meaning."""

_PresetName = Annotated[
    str | None,
    tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}", help_behavior_hint=f"(default: {DEFAULT_PRESET})"),
]
_RunFolders = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]


@dataclass(frozen=True)
class PointMaze:
    """Generate PointMaze episodes of a noisy way-point controller on MuJoCo, and save them as a Minari dataset."""

    maze: Literal["umaze", "medium", "large"]
    """Which maze: episodes of 300, 600 or 800 steps."""
    episodes: int
    """Number of episodes."""
    seed: int = 0
    """Seed of starts, goals and noise."""
    dataset_id: str | None = None
    """Minari id; default pointmaze-<maze>-v0."""
    overwrite: bool = False
    """Replace a dataset of that id."""


@dataclass(frozen=True)
class Show:
    """Print statistics of an HDF5 file in D4RL layout or of a Minari dataset."""

    source: tyro.conf.Positional[str]
    """File, or Minari id."""


@dataclass(frozen=True)
class Train:
    """Train offline; Ctrl-C saves and stops.

    Every value of the configuration is a flag. Flags win over the preset, and over the configuration of a resumed run.
    """

    data: str
    """HDF5 file in D4RL layout, or Minari dataset id."""
    preset: _PresetName = None
    """Named values to start from; with --resume the default is the run's own configuration."""
    run_dir: Path | None = None
    """Folder of the run; default runs/<environment>-s<seed>-<time>."""
    env: str | None = None
    """Environment for the replay of good plans among the metrics, whose best checkpoint is kept; default: left out."""
    resume: bool = False
    """Go on from the newest checkpoint of --run-dir, as if it had never stopped."""
    overwrite: bool = False
    """Replace a run that is in --run-dir."""
    tensorboard: bool = True
    """Write TensorBoard files beside the CSV."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class Baseline:
    """Train behaviour cloning or a decision transformer on GAC's decoder, data and trainer; Ctrl-C saves and stops.

    Everything but the idea is that of train: presets, flags, run folder, resuming; what concerns plans has no effect.
    """

    method: Annotated[tyro.conf.Positional[Literal["bc", "dt"]], tyro.conf.arg(metavar="{bc,dt}")]
    """Behaviour cloning, or a decision transformer, which reads the return to go with the state."""
    data: str
    """HDF5 file in D4RL layout, or Minari dataset id."""
    best: float | None = None
    """Share of the episodes, the best by return, to learn from, such as 0.1; default all."""
    preset: _PresetName = None
    """Named values to start from; with --resume the default is the run's own configuration."""
    run_dir: Path | None = None
    """Folder of the run; default runs/<environment>-<method>-s<seed>-<time>."""
    env: str | None = None
    """Environment whose mean return is among the metrics; default: that metric is left out."""
    resume: bool = False
    """Go on from the newest checkpoint of --run-dir, as if it had never stopped."""
    overwrite: bool = False
    """Replace a run that is in --run-dir."""
    tensorboard: bool = True
    """Write TensorBoard files beside the CSV."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class Finetune:
    """Improve a run by acting: explore, learn from what came of it, and go on; Ctrl-C saves and stops.

    Every value of the configuration is a flag; without --preset it starts from the run's own. Without RUN training
    starts from scratch, with random plans.
    """

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None
    """Folder of the run to improve, or of one of its checkpoints."""
    env: str | None = None
    """Environment id; default that of the run's data."""
    steps: int | None = None
    """Environment time steps in all; another name for --online.n-steps."""
    data: str | None = None
    """Offline data that the run was trained on; default what the run recorded."""
    preset: _PresetName = None
    """Named values to start from; default the run's own configuration."""
    run_dir: Path | None = None
    """Folder of the new run; default runs/<environment>-online-s<seed>-<time>."""
    resume: bool = False
    """Go on from the newest checkpoint of --run-dir, as if it had never stopped."""
    overwrite: bool = False
    """Replace a run that is in --run-dir."""
    tensorboard: bool = True
    """Write TensorBoard files beside the CSV."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class Eval:
    """Evaluate runs: whole episodes, what they return and what was predicted. Adds to each run's result.json.

    Several runs are seeds of one method: they are evaluated alike, and intervals over them follow.
    """

    runs: _RunFolders
    """Folders of runs, or of single checkpoints of them."""
    env: str | None = None
    """Environment id; default that of the run's data."""
    episodes: int = 100
    """Number of episodes."""
    seed: int = 0
    """Seed of the environments and of planning."""
    plans: Literal["exploit", "prior", "posterior-best", "explore"] = "exploit"
    """Plans to act by: for high return, drawn from the prior, of the best training trajectories, or for --target."""
    target: float | None = None
    """Return that explore, or a decision transformer, is asked for, in environment units; default of the latter the
    greatest of its data. Where returns are advantages of segments, what it is beyond the value of the start is asked of
    every segment."""
    checkpoint: Literal["both", "last", "best"] = "both"
    """The newest checkpoint, the one that earlier evaluations found best (replays in training with --env; else evals of
    two or more --step from other starts), or both, where there is such a one. Not for a checkpoint that is named."""
    step: int | None = None
    """Evaluate this step's checkpoint instead."""
    csv: Path | None = None
    """Append a row per evaluation to this file, benchmarks/results/<method>/<task>.csv by custom."""
    pooled: Path | None = None
    """Write the numbers over several RUNs to this file, a name that ends in .json."""
    video: Path | None = None
    """Film one episode of the first plan: a name that ends in .mp4 or .gif."""
    device: str = "auto"
    """Torch device; auto takes CUDA where there is one."""


@dataclass(frozen=True)
class Report:
    """Make tables and pictures of results: scores beside published ones, learning curves, calibration, speed."""

    results: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[RESULTS]")] = Path("benchmarks/results")
    """Folder that holds <method>/<task>.csv, as eval --csv writes them."""
    out: Path = Path("runs/report")
    """Folder for report.md and its pictures; an earlier report there is replaced, other files never."""
    readme: Path | None = None
    """Markdown file whose speed tables, between their marks, are made anew from RESULTS/speed.csv."""


@dataclass(frozen=True)
class Info:
    """Print versions, devices, the active engine of every op and why not another, which sizes of a model the engines
    take, and environment variables."""

    of: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RUN_OR_PRESET]")] = None
    """Preset, or folder of a run, whose sizes are looked at; default every preset."""


_Command = PointMaze | Show | Train | Baseline | Finetune | Eval | Report | Info


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit status: 0, 2 for an error (one line on standard error), 130 for an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"gac-fast {__version__}")
        return 0
    return exit_status("gac-fast", lambda: _run(_parse(arguments)))


def _run(command: _Command) -> None:
    match command:
        case PointMaze():
            _data_pointmaze(command)
        case Show():
            _data_show(command)
        case Train():
            _train(command)
        case Baseline():
            _baseline(command)
        case Finetune():
            _finetune(command)
        case Eval():
            _eval(command)
        case Report():
            _make_report(command)
        case Info():
            _info(command)


def exit_status(program: str, run: Callable[[], object]) -> int:
    """Run a program: what its user did wrong, and an interrupt, become one line on standard error.

    Returns:
        Exit status: 0, 2 for an error, 130 for an interrupt.
    """
    try:
        run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (GacError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            raise
        print(f"{program}: error: {' '.join(_sentence(error).split())}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _parse(arguments: list[str]) -> _Command:
    train = Train(data=tyro.MISSING)
    if arguments[:1] == ["train"]:
        train = Train(data=tyro.MISSING, config=_base_config(arguments[1:]))
    plain = Baseline(method=tyro.MISSING, data=tyro.MISSING)
    if arguments[:1] == ["baseline"]:
        plain = Baseline(method=tyro.MISSING, data=tyro.MISSING, config=_base_config(arguments[1:]))
    tune = Finetune()
    if arguments[:1] == ["finetune"]:
        tune = Finetune(config=_tuned_config(arguments[1:]))
    command: Any = (
        Annotated[
            Annotated[PointMaze, tyro.conf.subcommand("pointmaze")] | Annotated[Show, tyro.conf.subcommand("show")],
            tyro.conf.subcommand("data", description="Make a dataset, or look into one."),
        ]
        | Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Baseline, tyro.conf.subcommand("baseline", default=plain)]
        | Annotated[Finetune, tyro.conf.subcommand("finetune", default=tune)]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    return parse(
        command,
        arguments,
        prog="gac-fast",
        description="Generative Actor Critic: learn p(trajectory, return), plan by inference, act fast.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def parse(command: Any, arguments: Sequence[str] | None, **options: Any) -> Any:
    """``tyro.cli``, but what a configuration refuses is raised as the ConfigError it is; tyro would frame it."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(command, args=arguments, **options)
    except SystemExit as stop:
        for cause in _causes(stop):
            if isinstance(cause, ConfigError):
                raise cause from None
        sys.stderr.write(shown.getvalue())
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _base_config(arguments: list[str]) -> Config:
    """What the flags of ``train`` are laid over: they become the parser's changes to this default, so they always win.

    ``--preset`` is honoured with ``--resume`` too: a command repeated with ``--resume`` means the same configuration,
    and where it does not, resuming names the field that differs.
    """
    known = _flags_before_all(arguments)
    if known is None:
        return Config()
    if known.preset is not None or not known.resume:
        return preset(known.preset if known.preset is not None else DEFAULT_PRESET)
    if known.run_dir is None:
        raise ConfigError("--resume: expected --run-dir to name the run to resume, got none")
    return _config_of(Path(known.run_dir), "a run to resume")


def _flags_before_all(arguments: list[str]) -> argparse.Namespace | None:
    """The flags that say where a configuration comes from; None where one lacks its value, of which tyro complains."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--run-dir", "--run_dir")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    try:
        return parser.parse_known_args(arguments)[0]
    except argparse.ArgumentError:
        return None


def _config_of(run: Path, expected: str) -> Config:
    path = run / "config.json"
    if not path.is_file():
        raise ConfigError(f"run folder {run}: expected {expected}, found no config.json")
    values = read_json(path)
    try:
        return Config.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _tuned_config(arguments: list[str]) -> Config:
    """What the flags of ``finetune`` are laid over: a preset, or the configuration of the run.

    A preset changes what happens online; the model and what was fitted with it stay those of the run.
    """
    known = _flags_before_all(arguments)
    if known is None:
        return Config()
    # The first that is no flag nor the value of one: every flag here takes one, but the switches.
    run = next(iter(_positionals(arguments)), None)
    if known.resume and known.run_dir is not None and known.preset is None:
        return _config_of(Path(known.run_dir), "a run to resume")
    if run is None:
        return preset(known.preset if known.preset is not None else DEFAULT_PRESET)
    if not Path(run).is_dir():
        raise CheckpointError(f"{run}: expected the folder of a run, found {_found(Path(run))}")
    own = _config_of(_run_of(Path(run)).path, "a run to go on from")
    if known.preset is None:
        return own
    named = preset(known.preset)
    for section, name in (("train", "segment_returns"), ("model", "return_context")):
        its, mine = (getattr(getattr(config, section), name) for config in (named, own))
        # Presets plan as their own kind of returns allows.
        if its != mine and (named.train.segment or own.train.segment):
            raise ConfigError(
                f"--preset {known.preset}: expected one of {section}.{name} {mine!r} as in {run}, it has {its!r}"
            )
    return own.replace(plan=named.to_dict()["plan"], online=named.to_dict()["online"])


def _positionals(arguments: Sequence[str]) -> Iterator[str]:
    switches = {"resume", "overwrite", "tensorboard"}
    names = switches | {f"no-{name}" for name in switches} | {"help", "h"}
    takes_value = False
    for argument in arguments:
        if argument.startswith("-"):
            takes_value = "=" not in argument and argument.lstrip("-") not in names
        elif takes_value:
            takes_value = False
        else:
            yield argument


def _print_rows(rows: Iterable[tuple[str, object]]) -> None:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _data_pointmaze(command: PointMaze) -> None:
    from gac_fast import data
    from gac_fast.data.pointmaze import make_pointmaze_dataset
    from gac_fast.envs import pointmaze  # noqa: F401  (loads gymnasium before the clock starts)

    started = time.perf_counter()
    dataset_id = make_pointmaze_dataset(
        command.maze, command.episodes, command.seed, command.dataset_id, overwrite=command.overwrite
    )
    seconds = time.perf_counter() - started
    episodes = data.load(dataset_id, download=False)
    speed = f"{episodes.num_steps / seconds:,.0f} steps/s, saving included"
    _print_rows([("dataset", dataset_id), *_statistics(episodes, dataset_id), ("speed", speed)])


def _data_show(command: Show) -> None:
    from gac_fast import data

    _print_rows([("source", command.source), *_statistics(data.load(command.source), command.source)])


def _statistics(episodes: Trajectories, source: str) -> Iterator[tuple[str, object]]:
    import numpy as np

    from gac_fast import data

    cut = len(episodes) - int(episodes.complete.sum())
    lengths = episodes.lengths
    yield "environment", episodes.env_id or "unknown"
    yield "episodes", f"{len(episodes):,}" + (f", {cut:,} of them cut: their returns are too small" if cut else "")
    yield "steps", f"{episodes.num_steps:,}, {lengths.min():,} to {lengths.max():,} per episode"
    yield "dimensions", f"observations {episodes.obs_dim}, actions {episodes.act_dim}"
    returns = episodes.returns[episodes.complete]
    if not len(returns):
        yield "return", "unknown: the data cut every episode"
        return
    yield "return", f"mean {returns.mean():.2f}, standard deviation {returns.std():.2f}"
    levels = (0, 10, 25, 50, 75, 90, 100)
    values = np.percentile(returns, levels)
    yield "percentiles", ", ".join(f"{level}%: {value:.2f}" for level, value in zip(levels, values, strict=True))
    for name in (episodes.env_id, source, Path(source).stem):
        if name is not None and data.has_reference_scores(name):
            yield "normalised", f"mean {data.normalized_score(name, returns).mean():.2f}"
            return


def _train(command: Train) -> None:
    if command.resume and command.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: got both")
    from gac_fast import checkpoint
    from gac_fast.train.log import RunDir, last_metrics, merge_result
    from gac_fast.train.offline import train

    path = train(
        command.data,
        command.config,
        command.run_dir,
        # Resolved now rather than when the data are loaded.
        env=None if command.env is None else _resolved(command.env),
        resume=command.resume,
        overwrite=command.overwrite,
        tensorboard=command.tensorboard,
    )
    run = RunDir(path)
    step = int(checkpoint.latest(path).name.rpartition("_")[2])
    metrics = last_metrics(run.metrics)
    merge_result(run, {"data": command.data})
    planned = command.config.train.n_updates
    stopped = "" if step >= planned else f" of {planned:,}: go on with --run-dir {path} --resume"
    _print_rows(
        [
            ("run", path),
            ("updates", f"{step:,}{stopped}"),
            *((name, f"{value:.4g}") for name, value in metrics.items() if name.startswith(("held_out/", "replay/"))),
        ]
    )


def _baseline(command: Baseline) -> None:
    asked: dict[str, Any] = {"method": command.method}
    if command.best is not None:
        asked["best"] = command.best
    _train(
        Train(
            data=command.data, preset=command.preset, run_dir=command.run_dir, env=command.env, resume=command.resume,
            overwrite=command.overwrite, tensorboard=command.tensorboard,
            config=command.config.replace(baseline=asked),
        )
    )  # fmt: skip


def _finetune(command: Finetune) -> None:
    if command.resume and command.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: got both")
    if command.resume and command.run_dir is None:
        raise ConfigError("--resume: expected --run-dir to name the run to resume, got none")
    if command.run is None and not command.resume and command.preset is None:
        raise ConfigError("RUN: expected the folder of a run to go on from, or --preset to start from scratch")
    from gac_fast import checkpoint
    from gac_fast.policy import load
    from gac_fast.train.log import RunDir, last_metrics, read_result
    from gac_fast.train.offline import pick_device
    from gac_fast.train.online import finetune

    config = command.config
    if command.steps is not None:
        config = config.replace(online={"n_steps": command.steps})
    policy = None
    if command.run is not None and not command.resume:
        policy = load(command.run, device=pick_device(config.train.device))
    env_id = command.env or (policy.env_id if policy is not None else None)
    if env_id is None and command.resume and command.run_dir is not None:
        made = read_result(RunDir(command.run_dir))
        env_id, engine = made.get("env_id"), made.get("engine")
        env_id = env_id if engine is None else f"{engine}:{env_id}"
    if env_id is None:
        raise ConfigError("--env: expected an environment id, as neither flags nor the run name one")
    path = finetune(
        policy,
        _resolved(env_id),
        config,
        data=command.data,
        run_dir=command.run_dir,
        resume=command.resume,
        overwrite=command.overwrite,
        tensorboard=command.tensorboard,
    )
    run = RunDir(path)
    metrics = last_metrics(run.metrics)
    steps = int(metrics.get("online/env_steps", 0))
    done = steps >= config.online.n_steps or config.online.n_updates > 0
    stopped = "" if done else f" of {config.online.n_steps:,}: go on with --run-dir {path} --resume"
    shown = ("explore/target", "explore/achieved", "exploit/predicted", "exploit/achieved", "online/updates")
    _print_rows(
        [
            ("run", path),
            ("environment steps", f"{steps:,}{stopped}"),
            ("checkpoint", checkpoint.latest(path)),
            *((name, f"{metrics[name]:.4g}") for name in shown if name in metrics),
            ("pictures", run.plots),
        ]
    )


def _eval(command: Eval) -> None:
    _check_eval(command)
    if command.video is not None:
        from gac_fast.video import headless_backend

        # Before anything imports mujoco, which reads the choice once.
        headless_backend()
    from gac_fast import envs
    from gac_fast.evaluate import check_fit, evaluate, pooled

    # All of it before the work.
    chosen = [one for path in command.runs for one in _choose(path, command)]
    env_id = _check_alike(chosen, command)
    command = _asked(chosen[0].policy, command)
    plans = [_make_plans(one.policy, command) for one in chosen]
    if len(command.runs) > 1:
        for one in chosen:
            check_fit(one.policy, env_id)
    # Checkpoints of one step, whether that is a run's last or not, and those that were chosen.
    results: dict[str, list[EvalResult]] = {"last": [], "best": []}
    for number, (one, its_plans) in enumerate(zip(chosen, plans, strict=True)):
        if number:
            print()
        result = evaluate(one.policy, env_id, command.episodes, command.seed, its_plans, progress=sys.stderr.isatty())
        result = replace(result, env_id=envs.resolve_env_id(env_id))
        name = _report(one, command, result, envs.engine_of(env_id))
        for label in one.labels:
            if label == "best" or command.checkpoint != "best":
                results["best" if label == "best" else "last"].append(result)
        # As late as the plot, for the same reason.
        if command.video is not None and number == 0:
            _film(one.policy, env_id, its_plans, command.seed, command.video)
            _amend(one.run, name, video=command.video)
            _print_rows([("video", command.video)])
    over_runs = {}
    for label, found in results.items():
        if len(found) > 1 and len(found) == len(command.runs):
            chose = label == "last" and any("chosen" in one.labels for one in chosen)
            name = f"step {chosen[0].policy.step:,}" if chose else label
            over_runs[name] = pooled(found)
            print()
            _print_pooled(name, over_runs[name])
    if command.pooled is not None:
        about = {"runs": [one.path for one in map(_run_of, command.runs)], "seed": command.seed}
        asked = {"plans": command.plans, "target": command.target}
        write_json(command.pooled, {**about, **asked, "checkpoints": over_runs})
        _print_rows([("pooled", command.pooled)])


def _check_eval(command: Eval) -> None:
    """Refuse flags that make no sense, before anything is loaded."""
    if not command.runs:
        raise ConfigError("RUN: expected the folder of at least one run, got none")
    if command.episodes < 1:
        raise ConfigError(f"--episodes: expected at least 1, got {command.episodes}")
    if not 0 <= command.seed < 2**32:
        raise ConfigError(f"--seed: expected a value in [0, 2^32), got {command.seed}")
    if command.plans == "explore" and command.target is None:
        raise ConfigError(TARGET_RULE)
    if command.target is not None and not math.isfinite(command.target):
        raise ConfigError(f"--target: expected a finite return, got {command.target}")
    for path in command.runs:
        if not path.is_dir():
            raise CheckpointError(f"{path}: expected the folder of a run, found {_found(path)}")
    if command.video is not None and command.video.suffix.lower() not in (".mp4", ".gif"):
        raise ConfigError(f"--video: expected a name that ends in .mp4 or .gif, got {command.video}")
    if command.video is not None and len(command.runs) > 1:
        raise ConfigError(f"--video: expected a single RUN to film, got {len(command.runs)}")
    for path in command.runs:
        if command.checkpoint != "both" and (command.step is not None or _run_of(path).path != path.resolve()):
            what = "--step" if command.step is not None else f"the checkpoint {path}"
            raise ConfigError(f"--checkpoint {command.checkpoint}: expected the folders of runs alone, got {what} too")
    if command.pooled is not None and command.pooled.suffix != ".json":
        raise ConfigError(f"--pooled: expected a name that ends in .json, got {command.pooled}")
    if command.pooled is not None and len(command.runs) < 2:
        raise ConfigError("--pooled: expected several RUNs, got 1")
    if command.csv is not None:
        from gac_fast.results import check_appendable

        check_appendable(command.csv)


@dataclass(frozen=True)
class _Chosen:
    """A checkpoint to evaluate."""

    run: RunDir
    policy: Policy
    labels: tuple[str, ...]
    """last, best, or both; chosen where the user named it."""
    how: str | None
    """What chose the best checkpoint, or why there is none; None where nobody asked."""
    text: str


def _choose(path: Path, command: Eval) -> list[_Chosen]:
    """The checkpoints of a run that are to be evaluated, loaded.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: the best one is asked for and there is none; the run's result.json is not what it should be.
    """
    from gac_fast.policy import load
    from gac_fast.train.best import best_checkpoint
    from gac_fast.train.log import read_result
    from gac_fast.train.offline import pick_device

    run = _run_of(path)
    _, evaluations = _evaluations(run, read_result(run))
    device = pick_device(command.device)
    newest = load(path, step=command.step, device=device)
    command = _asked(newest, command)
    step = f"step {newest.step:,}"
    if command.step is not None or path.resolve() != run.path:
        label = "last" if _is_last(run, newest.step) else "chosen"
        return [_Chosen(run, newest, (label,), None, f"{step} ({label})")]
    last = _Chosen(run, newest, ("last",), None, f"{step} (last)")
    env_id = command.env or newest.env_id
    if command.checkpoint == "last" or env_id is None:
        return [last]
    from gac_fast import envs

    best = best_checkpoint(
        run, evaluations, envs.resolve_env_id(env_id), command.plans, command.target, command.seed, command.episodes
    )
    none = "nothing chose one: train with --env, or evaluate two or more --step with another --seed"
    if best is not None and not best.kept and best.step != newest.step:
        none, best = f"step {best.step:,}, {best.how}, is not kept", None
    if best is None and command.checkpoint == "best":
        raise ConfigError(f"--checkpoint best: expected {run.path} to have a best checkpoint, got {none}")
    if best is None:
        return [_Chosen(run, newest, ("last",), none, last.text)]
    if best.step == newest.step:
        text = f"{step} (last; also the {best.how})"
        return [_Chosen(run, newest, ("last", "best"), best.how, text)]
    policy = load(path, step=best.step, device=device)
    found = _Chosen(run, policy, ("best",), best.how, f"step {best.step:,} ({best.how})")
    return [found] if command.checkpoint == "best" else [last, found]


def _asked(policy: Policy, command: Eval) -> Eval:
    """A decision transformer is always asked for a return: naming one needs no more.

    Raises:
        ConfigError: a target for what takes none.
    """
    if command.target is None or command.plans == "explore":
        return command
    if command.plans != "exploit" or policy.config.baseline.method != "dt":
        raise ConfigError(TARGET_RULE)
    return replace(command, plans="explore")


# What may differ between runs that intervals are made over: seeds, and what does not change what is learnt.
_MAY_DIFFER = {
    f"train.{name}"
    for name in (
        "seed", "device", "n_threads", "prefetch", "compile", "cuda_graph", "log_every", "eval_every",
        "replay_episodes", "checkpoint_every", "keep_checkpoints",
    )
}  # fmt: skip


def _check_alike(chosen: Sequence[_Chosen], command: Eval) -> str:
    """The environment to evaluate in, if these are different runs of one method on one task. An engine stays in front.

    Raises:
        ConfigError: a run is named twice, two have one seed, or they differ in task, data, configuration, in how they
            were trained or for how long.
    """
    from gac_fast.evaluate import same_task

    runs = [_run_of(path).path for path in command.runs]
    for i, run in enumerate(runs):
        if run in runs[:i]:
            raise ConfigError(f"{command.runs[i]}: expected different runs, got one of them twice")
    first = chosen[0]
    seeds: dict[int, Path] = {}
    for one in chosen:
        seed = one.policy.config.train.seed
        if seeds.setdefault(seed, one.run.path) != one.run.path:
            raise ConfigError(f"{one.run.path}: expected another train.seed than {seeds[seed]} has, got {seed} too")
        env_id = command.env or one.policy.env_id
        if env_id is None:
            raise ConfigError(f"--env: expected an environment id, as the data of {one.run.path} names none")
        mine, its = (x.policy.env_id for x in (first, one))
        if mine is not None and its is not None and not same_task(mine, its):
            raise ConfigError(f"{one.run.path}: expected a run on {mine} as {first.run.path} is, got one on {its}")
        if one.run.path != first.run.path:
            _check_same_training(first, one, command.checkpoint == "best")
        its_config = one.policy.config.to_dict()
        for section, fields in first.policy.config.to_dict().items():
            for name, value in fields.items():
                alike = its_config[section][name] == value or f"{section}.{name}" in _MAY_DIFFER
                if not alike and one.run.path != first.run.path:
                    raise ConfigError(
                        f"{one.run.path}: expected {section}.{name} {value!r} as in {first.run.path}, got "
                        f"{its_config[section][name]!r}: intervals are over seeds of one configuration"
                    )
    env_id = command.env or first.policy.env_id
    assert env_id is not None
    return _resolved(env_id)


def _resolved(env_id: str) -> str:
    """The registered id, the engine still in front of it.

    Raises:
        EnvError: nothing of that name is registered.
    """
    from gac_fast import envs

    engine, resolved = envs.engine_of(env_id), envs.resolve_env_id(env_id)
    return resolved if engine is None else f"{engine}:{resolved}"


def _check_same_training(first: _Chosen, one: _Chosen, only_best: bool) -> None:
    """Refuse a run that was trained otherwise than the first, on other data, or for longer or shorter.

    A checkpoint that evaluations chose may be of any step: their label says so.

    Raises:
        ConfigError: naming the run, expected and found.
    """
    from gac_fast import checkpoint
    from gac_fast.train.log import read_result

    states = [{} if x.policy.source is None else checkpoint.load_state(x.policy.source) for x in (first, one)]
    ours, its = ("a fine-tuned" if "online" in state else "an offline" for state in states)
    if ours != its:
        raise ConfigError(f"{one.run.path}: expected {ours} run as {first.run.path} is, got {its} one")
    names = [read_result(x.run).get("data") for x in (first, one)]
    if all("data_fingerprint" in state for state in states):
        prints = [state["data_fingerprint"] for state in states]
        known = [
            "no data" if x is None else f"{name or 'data'} ({x[:12]})" for name, x in zip(names, prints, strict=True)
        ]
        alike = prints[0] == prints[1]
    else:
        # Of checkpoints from before, by name.
        known = [Path(name).name for name in names if isinstance(name, str)]
        alike = len(set(known)) < 2
    if not alike:
        raise ConfigError(
            f"{one.run.path}: expected a run on {known[0]} as {first.run.path} is, got one on {known[1]}: "
            "the content differs"
        )
    if ("best",) in (first.labels, one.labels) or only_best or first.policy.step == one.policy.step:
        return
    # Episodes end when they will: runs that spent the same environment steps need not have made the same updates.
    o = one.policy.config.online
    if o.explore == "on" and all(state.get("online", {}).get("env_steps", -1) >= o.n_steps for state in states):
        return
    raise ConfigError(
        f"{one.run.path}: expected a checkpoint of step {first.policy.step:,} as that of {first.run.path}, got "
        f"{one.policy.step:,}: intervals are over seeds that were trained alike; name one --step, or --checkpoint best"
    )


def _found(path: Path) -> str:
    return "a file" if path.exists() else "no such folder"


def _run_of(path: Path) -> RunDir:
    """The run of a run's folder, or of the folder of one of its checkpoints."""
    from gac_fast.train.log import RunDir

    path = path.resolve()
    return RunDir(path.parent.parent if path.parent.name == "checkpoints" else path)


def _make_plans(policy: Policy, command: Eval) -> Plans | None:
    """None leaves it to ``evaluate`` to plan for the starts at hand."""
    match command.plans:
        case "prior":
            return policy.prior_plans(command.episodes, command.seed)
        case "posterior-best":
            return policy.posterior_best(min(command.episodes, max(1, policy.config.plan.n_best)))
        case "explore":
            assert command.target is not None
            starts = policy.first_observations[policy.opens] if bool(policy.opens.any()) else policy.first_observations
            beyond = float(policy.start_values(starts).mean())
            return policy.explore(command.episodes, command.target - beyond, seed=command.seed)
    return None


def _evaluations(run: RunDir, earlier: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Number of evaluations so far, and their entries, in what ``result.json`` holds."""
    number = earlier.get("n_evaluations", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ConfigError(f"{run.result}: n_evaluations: expected an integer of at least 0, found {number!r}")
    evaluations = earlier.get("evaluations", {})
    if not isinstance(evaluations, dict):
        raise ConfigError(f"{run.result}: evaluations: expected an object, found {evaluations!r}")
    return number, evaluations


def _amend(run: RunDir, name: str, **values: Any) -> None:
    """Add to an evaluation's entry in ``result.json``."""
    from gac_fast.train.log import update_result

    def change(earlier: dict[str, Any]) -> dict[str, Any]:
        _, evaluations = _evaluations(run, earlier)
        return {"evaluations": {**evaluations, name: {**evaluations[name], **values}}}

    update_result(run, change)


def _report(one: _Chosen, command: Eval, result: EvalResult, engine: str | None) -> str:
    """Add the evaluation to ``result.json``, print it and draw it; returns the name of its entry."""
    from gac_fast.train.log import metric_rows, update_result

    run, policy = one.run, one.policy
    what = policy.describe(command.plans, command.target)
    env = result.env_id if engine is None else f"{result.env_id} by {engine}"
    name = f"{env}, {what}, step {policy.step}, {len(result.returns)} episodes, seed {result.seed}"
    summary = result.summary()
    # Behaviour cloning predicts nothing.
    predicts = math.isfinite(summary["predicted_mean"])
    plot = run.plots / f"predicted_vs_achieved_{_slug(result.env_id)}_{_slug(what)}.png" if predicts else None
    if plot is not None and one.labels == ("best",):
        plot = plot.with_name(f"{plot.stem}_best.png")
    entry = {
        "plans": command.plans,
        "target": command.target,
        "engine": engine,
        "step": policy.step,
        "checkpoint": one.labels[0],
        "chosen_by": one.how if "best" in one.labels else None,
        **summary,
        "plot": None,
        "video": None,
    }
    number = 0

    def add(earlier: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        number, evaluations = _evaluations(run, earlier)
        number += 1
        return {"n_evaluations": number, "evaluations": {**evaluations, name: {"evaluation": number, **entry}}}

    update_result(run, add)
    rows = []
    if command.csv is not None:
        from gac_fast.results import append_rows

        append_rows(command.csv, _csv_rows(one, what, result, number))
        rows.append(("rows added to", command.csv))

    score = result.normalized_mean
    replays = len(metric_rows(run.metrics, "replay/best_plans"))
    _print_rows(
        [
            *([("run", run.path)] if len(command.runs) > 1 else []),
            ("environment", env),
            ("plans", what + _baseline_note(policy, summary)),
            ("checkpoint", one.text),
            ("episodes", f"{len(result.returns):,}, seed {result.seed}"),
            ("return mean", f"{result.mean:.2f}"),
            ("standard error", f"{result.standard_error:.2f}" if len(result.returns) > 1 else "none: one episode"),
            ("return median", f"{summary['return_median']:.2f}"),
            (
                "interquartile mean",
                f"{summary['return_iqm']:.2f} {_ends(summary['return_iqm_interval'])} (95%)",
            ),
            ("predicted mean", f"{summary['predicted_mean']:.2f}" if predicts else "none"),
            *([("prediction error", _honesty(summary))] if predicts else []),
            ("normalised mean", "none: no reference scores" if score is None else f"{score:.2f}"),
            ("speed", f"{summary['steps_per_second']:,.0f} steps/s, planning included"),
            ("versions", ", ".join(f"{package} {version}" for package, version in result.versions.items())),
            (
                "evaluations",
                f"{number} of this run so far" + (f", and {replays} replays in training" if replays else ""),
            ),
            *([("best checkpoint", one.how)] if one.how is not None and "best" not in one.labels else []),
            ("result", run.result),
            *rows,
        ]
    )
    # Last, as it can fail: the evaluation is saved by then.
    if plot is not None:
        _plot(result, plot)
        _amend(run, name, plot=os.path.relpath(plot, run.path))
        _print_rows([("plot", plot)])
    return name


def _baseline_note(policy: Policy, numbers: Mapping[str, Any]) -> str:
    method = policy.config.baseline.method
    if method == "none":
        return ""
    return " (behaviour cloning)" if method == "bc" else f" (dt, target {numbers['predicted_mean']:g})"


def _ends(interval: Sequence[float]) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _honesty(numbers: Mapping[str, Any]) -> str:
    coverage = numbers["prediction_coverage"]
    within = "" if coverage is None else f", {100 * coverage:.0f}% of episodes within one predicted std"
    return f"{numbers['prediction_bias']:+.2f} on average, rms {numbers['prediction_rmse']:.2f}{within}"


def _csv_rows(one: _Chosen, what: str, result: EvalResult, number: int) -> list[Row]:
    from gac_fast.results import BEST, Row
    from gac_fast.train.log import machine, read_result, short_commit

    made = read_result(one.run)
    trained = made.get("train_seconds") if made.get("step") == one.policy.step else None
    seconds = None if trained is None else round(trained + result.seconds, 1)
    predicted = float(result.predicted.mean())
    kind = {"prior": "prior plans", "posterior-best": "best posterior plans"}.get(what, what)
    return [
        Row(
            one.policy.step, result.mean, result.normalized_mean, one.policy.config.train.seed,
            kind + (BEST if label == "best" else ""), predicted if math.isfinite(predicted) else None,
            len(result.returns), seconds, short_commit(), machine(one.policy.device),
            result.seed, result.env_id, number,
        )
        for label in one.labels
    ]  # fmt: skip


def _print_pooled(label: str, numbers: Mapping[str, Any]) -> None:
    n = numbers["runs"]

    def both(name: str) -> str:
        score = numbers[f"normalized_{name}"]
        scored = "" if score is None else f", normalised {_ends(score) if isinstance(score, list) else f'{score:.2f}'}"
        value = numbers[f"return_{name}"]
        return (_ends(value) if isinstance(value, list) else f"{value:.2f}") + scored

    _print_rows(
        [
            ("all runs", f"{n} runs of {numbers['episodes'] // n:,} episodes, {label} checkpoints"),
            ("return mean", both("mean")),
            ("standard error", f"{numbers['return_standard_error']:.2f} over runs"),
            ("  other seeds", f"{both('mean_interval')} (95%, Student's t over {n} runs)"),
            ("return median", both("median")),
            ("interquartile mean", both("iqm")),
            ("  other episodes", f"{both('iqm_interval')} (95%, bootstrap of episodes within these runs)"),
            ("  other seeds too", f"{both('iqm_interval_over_runs')} (95%, bootstrap of runs and episodes)"),
            *(
                [
                    ("predicted mean", f"{numbers['predicted_mean']:.2f}"),
                    ("prediction error", _honesty(numbers)),
                ]
                if math.isfinite(numbers["predicted_mean"])
                else []
            ),
            ("speed", f"{numbers['steps_per_second']:,.0f} steps/s, planning included"),
        ]
    )


def _is_last(run: RunDir, step: int) -> bool:
    from gac_fast import checkpoint

    return checkpoint.list_checkpoints(run.path)[-1:] == [checkpoint.checkpoint_path(run.path, step)]


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in text.lower())


def _plot(result: EvalResult, path: Path) -> None:
    """Predicted against achieved returns; by start too where the environment is a maze."""
    import numpy as np

    from gac_fast import envs, plots

    geometry: dict[str, Any] = {}
    with contextlib.suppress(EnvError):
        maze = envs.maze_spec(result.env_id)
        geometry = {
            "starts": result.rollout.first_observations[:, :2],
            "walls": maze.cell_to_xy(np.asarray(maze.wall_cells)),
            "cell_size": maze.cell_size,
            "goal": maze.goal_xy,
            "radius": maze.goal_radius,
        }
    plots.predicted_vs_achieved(result.predicted, result.returns, path, **geometry)


def _film(policy: Policy, env_id: str, plans: Plans | None, seed: int, path: Path) -> None:
    """One episode of the first plan."""
    import numpy as np

    from gac_fast import envs
    from gac_fast.video import record

    env = envs.make_env(env_id, render_mode="rgb_array")
    try:

        def frames() -> Iterator[np.ndarray]:
            obs, _ = env.reset(seed=seed)
            if plans is None:
                actor = policy.exploiting(policy.exploit(1, obs[None], seed=seed), seed)
            else:
                actor = policy.actor(plans[:1])
            done = False
            while not done:
                yield env.render()  # type: ignore[misc]
                obs, reward, terminated, truncated, _ = env.step(actor.act(obs[None])[0])
                if (rewarded := getattr(actor, "rewarded", None)) is not None:
                    rewarded(np.array([reward], np.float64))
                done = terminated or truncated
            yield env.render()  # type: ignore[misc]

        record(frames(), path, fps=float(env.metadata.get("render_fps", 30)))
    finally:
        env.close()


def _make_report(command: Report) -> None:
    from gac_fast.report import report

    rows: list[tuple[str, object]] = [("report", report(command.results, command.out))]
    if command.readme is not None:
        from gac_fast.speed import speed_tables, write_between

        write_between(command.readme, speed_tables(command.results / "speed.csv", brief=True))
        rows.append(("speed tables", command.readme))
    _print_rows(rows)


def _info(command: Info) -> None:
    import torch

    from gac_fast import ops
    from gac_fast.train.log import environment

    found = environment()
    git = found["git"]
    features = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    wanted = sorted(name for name in features if name.startswith(("amx", "avx512")))
    packages = {"gac-fast": __version__, **{k: v for k, v in found["packages"].items() if k != "gac-fast"}}
    sections: dict[str, list[tuple[str, object]]] = {
        "versions": [
            ("python", found["python"]),
            *((name, version or "not installed") for name, version in packages.items()),
            ("commit", "not a checkout" if git is None else git["commit"] + (", with changes" if git["dirty"] else "")),
        ],
        "machine": [
            ("platform", found["platform"]),
            ("cpu", f"{found['cpu']}, {found['cores']} cores for this process"),
            ("cpu features", ", ".join(wanted) or "neither AMX nor AVX-512"),
            ("torch threads", found["torch_threads"]),
            ("gpu", ", ".join(found["gpu"]) or "none that torch can use"),
            ("cuda", found["cuda"] or "torch was built without it"),
            *_cpp_engine(),
        ],
        f"ops on {ops.status()[0].device}": [
            (status.op, (status.active or "none: a call raises") + _reasons(status.problems)) for status in ops.status()
        ],
        **_sizes(command.of),
        "environment variables": [
            (name, f"{os.environ.get(name, '(not set)')}  [{meaning}]") for name, meaning in VARIABLES.items()
        ],
    }
    for number, (title, rows) in enumerate(sections.items()):
        print(f"\n{title}" if number else title)
        _print_rows((f"  {name}", value) for name, value in rows)


def _sizes(of: str | None) -> dict[str, list[tuple[str, object]]]:
    """Sections that say which ops each engine takes at the sizes of presets, or of a run."""
    from gac_fast import ops

    if of is None:
        configs = {f"preset {name}": config for name, config in PRESETS.items()}
    elif of in PRESETS:
        configs = {f"preset {of}": PRESETS[of]}
    else:
        if not (Path(of) / "config.json").is_file():
            raise ConfigError(f"info: expected one of {', '.join(PRESETS)} or the folder of a run, got {of!r}")
        configs = {of: _config_of(Path(of), "a run")}
    sections: dict[str, list[tuple[str, object]]] = {}
    for name, config in configs.items():
        model = config.model
        sizes = ops.ModelSizes(model.dim, model.n_heads, model.n_z, model.return_ensemble)
        counts = (
            f"width {sizes.dim}, heads {sizes.n_heads} x {sizes.dim // sizes.n_heads}, plan vectors {sizes.n_z}, "
            f"return models {sizes.members}"
        )
        sections[f"sizes of {name}: {counts}"] = [
            (
                f"taken by {engine}",
                (", ".join(op for op, reason in reasons.items() if reason is None) or "none")
                + _reasons({op: reason for op, reason in reasons.items() if reason is not None}),
            )
            for engine, reasons in ops.refusals(sizes).items()
        ]
    return sections


def _reasons(problems: Mapping[str, str]) -> str:
    return "".join(f"\n      not {name}: {reason}" for name, reason in problems.items())


def _cpp_engine() -> list[tuple[str, object]]:
    try:
        from gac_fast import _C
    except ImportError as error:
        return [("C++ engine", f"absent ({error})")]
    build = ", ".join(f"{name} {value}" for name, value in _C._build_info().items())
    paths = dict(_C._isa_problems())
    try:
        active = _C._isa()
        chosen = f"{active}: {_C._isa_reason()}"
    except (ValueError, RuntimeError) as error:
        active, chosen = "", f"none: {error}"
    names = list(paths)
    wider = names[names.index(active) + 1 :] if active else names
    chosen += _reasons({name: paths[name] or "it could run" for name in wider})
    return [("C++ engine", build), ("C++ path", chosen)]
