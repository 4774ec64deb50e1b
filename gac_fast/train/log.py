"""What a run leaves behind: its folder, configuration and environment, metrics as CSV and TensorBoard, and progress."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from gac_fast.errors import ConfigError
from gac_fast.files import locked, read_json, replacing, write_json

if TYPE_CHECKING:
    import torch
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

__all__ = [
    "GitState",
    "Logger",
    "Progress",
    "RunDir",
    "StopSignal",
    "check_run_dir",
    "environment",
    "git_commit",
    "last_metrics",
    "machine",
    "merge_result",
    "metric_rows",
    "read_result",
    "short_commit",
    "start_run",
    "update_result",
    "write_json",
]

_PACKAGES = (
    "gac-fast",
    "torch",
    "numpy",
    "triton",
    "mujoco",
    "gymnasium",
    "gymnasium-robotics",
    "minari",
    "safetensors",
)
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "MUJOCO_GL", "OMP_NUM_THREADS", "TRITON_INTERPRET")


@dataclass(frozen=True)
class RunDir:
    """The folder of a run and the names in it."""

    path: Path

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def plots(self) -> Path:
        return self.path / "plots"


def check_run_dir(run_dir: str | os.PathLike[str], overwrite: bool = False, resume: bool = False) -> RunDir:
    """What :func:`start_run` refuses, before any work that it would lose; nothing is written.

    Raises:
        ConfigError: the folder holds something and neither flag allows it, or it is not a run's folder.
    """
    run = RunDir(Path(run_dir))
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"run folder {run.path}: expected a folder, found a file")
    if run.path.is_dir() and any(run.path.iterdir()) and not resume:
        is_run = run.config.exists()
        if not overwrite:
            held = "already holds a run: resume it, overwrite it" if is_run else "is not empty: clear it"
            raise ConfigError(f"run folder {run.path} {held} or choose another folder")
        if not is_run:
            raise ConfigError(
                f"run folder {run.path} is not empty and holds no run (no config.json): not overwriting it"
            )
    return run


def start_run(
    run_dir: str | os.PathLike[str], config: Mapping[str, Any], overwrite: bool = False, resume: bool = False
) -> RunDir:
    """Make the folder of a run and write its `config.json` and `environment.json`.

    Args:
        run_dir: the folder; new or empty, unless `overwrite` or `resume`.
        config: the configuration of the run, as `dataclasses.asdict` gives it.
        overwrite: remove what an earlier run left in the folder; other files stay.
        resume: keep everything in the folder, and write only the two files anew.

    Raises:
        ConfigError: the folder holds something and neither flag allows it, or it is not a run's folder.
    """
    run = check_run_dir(run_dir, overwrite, resume)
    if run.path.is_dir() and any(run.path.iterdir()) and not resume:
        _remove_run(run)
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.config, config)
    here = environment()
    if resume and run.environment.exists():
        first = read_json(run.environment)
        here = {**first, "resumed": [*first.get("resumed", []), here]}
    write_json(run.environment, here)
    return run


def _remove_run(run: RunDir) -> None:
    for folder in (run.checkpoints, run.tensorboard, run.plots):
        if folder.exists():
            shutil.rmtree(folder)
    # config.json last: until then an interrupted removal can be repeated.
    for file in (run.result, run.metrics, run.environment, run.config):
        file.unlink(missing_ok=True)


class GitState(NamedTuple):
    """The commit a checkout is at, and whether tracked files differ from it."""

    commit: str
    dirty: bool


def git_commit(package: str | os.PathLike[str] | None = None) -> GitState | None:
    """The git state of the project's checkout, or None where the package does not run from one.

    Args:
        package: folder of the package; its parent must be the root of the checkout, lest an installed package report
            the repository that happens to hold the virtual environment. By default gac_fast's own.
    """
    root = (Path(package) if package is not None else Path(__file__).parents[1]).resolve().parent
    # A git hook sets these, for another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], env=variables, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:
        return None
    commit = git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    return GitState(commit, bool(git("status", "--porcelain", "--untracked-files=no")))


def environment() -> dict[str, Any]:
    """What a result depends on beside the configuration: versions, commit, machine, threads, device, variables."""
    import torch

    git = git_commit()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": git._asdict() if git else None,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "variables": {
            name: value for name, value in os.environ.items() if name in _VARIABLES or name.startswith("GAC_FAST_")
        },
    }


def short_commit() -> str:
    """Of the checkout, for a table: twelve digits, and +dirty where tracked files differ; empty outside of one."""
    git = git_commit()
    return "" if git is None else git.commit[:12] + ("+dirty" if git.dirty else "")


def machine(device: torch.device) -> str:
    """What computes on a device, for a table."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores {_cpu_name()}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Logger:
    """Appends metrics to `metrics.csv` and, as scalars, to TensorBoard.

    The CSV is wide: `step`, then one column per name in order of first appearance; cells without a value are empty. A
    new name rewrites the file with a longer header, atomically. Rows are flushed as they are logged; a row cut by a
    crash is dropped when the file is opened again.

    Args:
        run_dir: folder of the run.
        tensorboard: write `tensorboard/` too.
    """

    def __init__(self, run_dir: str | os.PathLike[str], tensorboard: bool = True) -> None:
        run = RunDir(Path(run_dir))
        run.path.mkdir(parents=True, exist_ok=True)
        self._path = run.metrics
        self._tensorboard_dir = run.tensorboard if tensorboard else None
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._file: TextIO | None = None
        self._columns: list[str] = []
        self._last_step: int | None = None
        self._rewrite(*_read_rows(self._path))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
            step: number of updates made; never below that of the row before.
            values: numbers by name (Python, NumPy, one-element tensors). Names with a slash are grouped by TensorBoard.
        """
        if self._file is None:
            raise ValueError(f"the log {self._path} is closed")
        if self._last_step is not None and step < self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}: use truncate_after to go back")
        numbers = {name: _number(name, value) for name, value in values.items()}
        new = [name for name in numbers if name not in self._columns]
        if new:
            self._rewrite(self._columns + new, _read_rows(self._path)[1])
        cells = ["" if name not in numbers else repr(numbers[name]) for name in self._columns[1:]]
        self._file.write(_csv_line([str(step), *cells]))
        self._file.flush()
        self._last_step = step
        if self._tensorboard_dir is not None:
            writer = self._open_tensorboard(self._tensorboard_dir)
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
            writer.flush()

    def truncate_after(self, step: int) -> None:
        """Drop what was logged after `step`, so that a run resumed there logs what an uninterrupted one would."""
        columns, rows = _read_rows(self._path)
        rows = [row for row in rows if int(row[0]) <= step]
        # Columns that only the dropped rows had go too: they come again where they first came.
        kept = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
        self._rewrite([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
        self._purge_step = step + 1
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Flush and close both logs."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewrite(self, columns: list[str], rows: list[list[str]]) -> None:
        """Put these columns and rows (which may lack the last columns) in place of the file, and open it to append."""
        with replacing(self._path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(_csv_line(columns))
            file.writelines(_csv_line(row + [""] * (len(columns) - len(row))) for row in rows)
        if self._file is not None:
            self._file.close()
        self._file = self._path.open("a", encoding="utf-8", newline="")
        self._columns = columns
        self._last_step = int(rows[-1][0]) if rows else None

    def _open_tensorboard(self, folder: Path) -> SummaryWriter:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(f"TensorBoard logs need the package tensorboard ({error})") from error
            self._writer = SummaryWriter(str(folder), purge_step=self._purge_step)
        return self._writer


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric {name!r} is no number but a {type(value).__name__}") from error


def _csv_line(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Columns and whole rows of a metrics file; a new log where there is none."""
    if not path.exists():
        return ["step"], []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    columns, *rows = list(csv.reader(io.StringIO(whole))) or [["step"]]
    if columns[:1] != ["step"]:
        raise ConfigError(f"{path} is no metrics log: expected a first column 'step', found {columns[:1]}")
    return columns, [row for row in rows if len(row) == len(columns) and row[0].isdecimal()]


class Progress:
    """Progress of a loop: a bar on a terminal; elsewhere, as in the log of a build, a line every few seconds.

    Args:
        total: number of updates, or of what else is counted.
        description: first word of the bar or line.
        initial: updates made before, where a run is resumed.
        interval: seconds between two lines where there is no terminal.
        file: where to write, by default standard error.
        disable: stay silent.
        clock: monotonic seconds.
        unit: what is counted.
    """

    def __init__(
        self,
        total: int,
        description: str = "train",
        initial: int = 0,
        interval: float = 10.0,
        file: TextIO | None = None,
        disable: bool = False,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "update",
    ) -> None:
        self._total, self._description, self._disable, self._clock = total, description, disable, clock
        self._file = file if file is not None else sys.stderr
        self._initial = self._done = self._shown_done = initial
        self._interval = interval
        self._time_steps = 0
        self._values: dict[str, Any] = {}
        self._start = self._shown_at = clock()
        self._closed = False
        self._bar: tqdm[Any] | None = None
        if not disable and self._file.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=description, unit=unit, file=self._file)
            self._interval = 0.5

    def update(self, updates: int = 1, time_steps: int = 0, **values: Any) -> None:
        """Count updates and the environment time steps they used; `values` are shown beside them.

        Values are read only when shown, so passing a tensor on a device costs no synchronisation at every update.
        """
        self._done += updates
        self._time_steps += time_steps
        self._values.update(values)
        if self._bar is not None:
            self._bar.update(updates)
        if self._clock() - self._shown_at >= self._interval:
            self._show()

    def close(self) -> None:
        """Show the last state and end the line."""
        if self._closed:
            return
        self._closed = True
        if self._done != self._shown_done or self._bar is not None:
            self._show()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        self._shown_at, self._shown_done = self._clock(), self._done
        if self._disable:
            return
        elapsed = self._shown_at - self._start
        parts = []
        if self._time_steps and elapsed > 0:
            parts.append(f"{self._time_steps / elapsed:,.0f} time steps/s")
        parts += [f"{name} {float(value):.4g}" for name, value in self._values.items()]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))
            return
        made, left = self._done - self._initial, self._total - self._done
        if made > 0 and elapsed > 0:
            parts.append(
                f"{_duration(elapsed)} gone" + (f", {_duration(elapsed / made * left)} left" if left > 0 else "")
            )
        percent = 100 * self._done // max(self._total, 1)
        line = f"{self._description}: {self._done}/{self._total} ({percent}%)"
        print(", ".join([line, *parts]), file=self._file, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that a loop can save and stop cleanly.

    A second SIGINT raises KeyboardInterrupt. The handlers from before come back on exit. Off the main thread, where
    Python takes no handlers, the flag just stays False.

        with StopSignal() as stop:
            while not stop.requested:
                ...
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python, which cannot be set back from it either.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            # os.write, for print may be what the signal interrupted.
            message = f"\n{signal.Signals(number).name}: saving and stopping (Ctrl-C again: stop at once)\n"
            with suppress(OSError):
                os.write(2, message.encode())


def last_metrics(metrics_csv: str | os.PathLike[str]) -> dict[str, float]:
    """The last finite value of every column of a metrics file; empty where there is none."""
    columns, rows = _read_rows(Path(metrics_csv))
    last: dict[str, float] = {}
    for row in rows:
        cells = zip(columns[1:], row[1:], strict=False)
        last |= {name: float(cell) for name, cell in cells if cell and math.isfinite(float(cell))}
    return last


def metric_rows(metrics_csv: str | os.PathLike[str], name: str) -> list[tuple[int, float]]:
    """(step, value) wherever column ``name`` of a metrics file holds a finite value; empty where there is none."""
    columns, rows = _read_rows(Path(metrics_csv))
    if name not in columns:
        return []
    i = columns.index(name)
    return [(int(row[0]), float(row[i])) for row in rows if row[i] and math.isfinite(float(row[i]))]


def read_result(run: RunDir) -> dict[str, Any]:
    """What the run's ``result.json`` holds so far."""
    return read_json(run.result) if run.result.exists() else {}


def merge_result(run: RunDir, values: Mapping[str, Any]) -> None:
    """Add to the run's ``result.json``; what others wrote there stays."""
    update_result(run, lambda earlier: values)


def update_result(run: RunDir, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Add to the run's ``result.json`` what follows from what is there, which no other process changes meanwhile.

    Args:
        change: what the file holds so far -> what to add.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    # The folder's lock: the file is replaced, and a lock would go with the old one.
    with locked(run.path):
        earlier = read_result(run)
        write_json(run.result, {**earlier, **change(earlier)})
