"""What the kernels need of a GPU, found by compiling every launch that they ship at the usual sizes and at those of the
slow tests (``tests/kernel_fixtures.py``); no GPU is needed.

    python -m benchmarks.resources --out kernels.csv --markdown kernels.md
    python -m benchmarks.resources --out kernels.csv --only block --widths 128 --dtypes bfloat16 --architectures 90

Makes the rows that an earlier call with the same --out has not made; those of an op whose sources have changed are
dropped. Exit status 1 where a bfloat16 kernel spills, where shared memory does not fit, where a launch does not compile
or where wgmma might read what it should not; spills in float32 are listed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import importlib
import inspect
import itertools
import multiprocessing
import pkgutil
import re
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import ROOT, append_rows

sys.path.insert(0, str(ROOT / "tests"))

COLUMNS = (
    "op", "kernel", "option", "constants", "dtype", "D", "architecture", "triton", "registers", "stack", "local",
    "shared", "seconds", "kernels", "status",
)  # fmt: skip
WIDTHS = (64, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float32")
ARCHITECTURES = (80, 90)
HEAD_WIDTH = 32
N_Z = 4
WINDOW = 32


class Task(NamedTuple):
    """All launches of one op at one width, for one architecture."""

    op: str
    dtype: str
    dim: int
    architecture: int


def modules() -> dict[str, Any]:
    """Kernel modules that say what they ship, by op."""
    import gac_fast.kernels

    found = {}
    for info in pkgutil.iter_modules(gac_fast.kernels.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"gac_fast.kernels.{info.name}")
            if hasattr(module, "shipped"):
                found[info.name] = module
    return found


@functools.cache
def fingerprint(op: str) -> str:
    """Of the sources that an op's kernels are made of: its own file, and the files of kernels/ that it imports."""
    wanted, sources = [op], {}
    while wanted:
        name = wanted.pop()
        path = ROOT / "kernels" / f"{name}.py"
        if name in sources or not path.exists():
            continue
        sources[name] = path.read_bytes()
        for modules in re.findall(rb"^\s*from gac_fast\.kernels(?:\.(\w+))? import (.*)$", sources[name], re.MULTILINE):
            wanted += [x.decode() for x in ([modules[0]] if modules[0] else re.findall(rb"\w+", modules[1]))]
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name])
    return digest.hexdigest()[:12]


def launches(task: Task) -> Iterator[Any]:
    """Every launch once: with one and with two tokens per step, in the first layer and in the others; of slow tests."""
    from kernel_fixtures import SIZES

    shipped = modules()[task.op].shipped
    dtype, of_task = getattr(torch, task.dtype), {"dim": task.dim, "architecture": task.architecture}
    usual = [
        {"heads": max(1, task.dim // HEAD_WIDTH), "n_z": N_Z, "tokens_per_step": tokens_per_step,
         "window": WINDOW * tokens_per_step, "has_o": has_o}
        for tokens_per_step, has_o in itertools.product((2, 1), (True, False))
    ]  # fmt: skip
    tested = [size for size in SIZES.get(task.op, []) if size["dim"] == task.dim and size.get("dtype", dtype) == dtype]
    seen = set()
    known = inspect.signature(shipped).parameters
    for sizes in (*usual, *tested):
        wanted = {**of_task, **sizes, "dtype": dtype}
        for launch in shipped(**{name: value for name, value in wanted.items() if name in known}):
            key = (launch.name, str(launch.option), constants(launch))
            if key not in seen:
                seen.add(key)
                yield launch


def constants(launch: Any) -> str:
    """Of the kernel, its tiles left aside, and the arguments that it does without."""
    given = [f"{name}={getattr(value, 'value', value)}" for name, value in launch.constants.items()]
    # A number to some kernels, but one that is compiled in a way of its own.
    if launch.arguments.get("n_z") == 16:
        given.append("n_z=16")
    return " ".join([*given, *(f"no {name}" for name, value in launch.arguments.items() if value is None)])


def missing(task: Task, made: Container[tuple[str, ...]]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Launches that have no row among those ``made``, each with the beginning of its row."""
    import triton

    for launch in launches(task):
        row = {
            "op": task.op, "kernel": launch.name, "option": str(launch.option), "constants": constants(launch),
            "dtype": task.dtype, "D": task.dim, "architecture": f"sm_{task.architecture}",
            "triton": triton.__version__, "kernels": fingerprint(task.op),
            **dict.fromkeys(("registers", "stack", "local", "shared", "status"), ""),
        }  # fmt: skip
        if key_of(row) not in made:
            yield row, launch


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in COLUMNS[:8])


def rows_of(task: Task, made: Container[tuple[str, ...]] = ()) -> list[dict[str, Any]]:
    """Of :func:`missing` launches, compiled here."""
    from kernel_fixtures import resources, wgmma_hazards

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row, launch in missing(task, made):
            start = time.perf_counter()
            try:
                row |= resources(launch, task.architecture, Path(folder))._asdict()
                # From the cache of the compiler.
                asm = launch.compile(task.architecture).asm
                row["status"] = "; ".join(wgmma_hazards(asm["ttgir"], asm["ptx"]))
            except Exception as error:
                row["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            row["seconds"] = round(time.perf_counter() - start, 1)
            row["status"] = row["status"] or problem(row, task.architecture)
            rows.append(row)
    return rows


def problem(row: Mapping[str, Any], architecture: int) -> str:
    """What a reader should see at once."""
    from kernel_fixtures import SHARED_LIMIT

    if int(row["shared"]) > SHARED_LIMIT[architecture]:
        return f"does not fit: more than {SHARED_LIMIT[architecture]} bytes of shared memory"
    return "spills" if int(row["stack"]) or int(row["local"]) else ""


def is_failure(row: Mapping[str, Any]) -> bool:
    return row["status"] != "" and not (row["status"] == "spills" and row["dtype"] == "float32")


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people: one line per launch, sm_80 and sm_90 beside each other."""
    cells = ("registers", "stack", "local", "shared")
    by_launch: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("op", "kernel", "constants", "option", "dtype", "D", "triton"))
        by_launch.setdefault(key, {})[row["architecture"]] = row
    architectures = sorted({str(row["architecture"]) for row in rows})
    head = ["op", "kernel", "constants", "option", "dtype", "D", "Triton"]
    head += [f"{name}: registers / stack / local / shared" for name in architectures]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, found in by_launch.items():
        values = []
        for name in architectures:
            row = found.get(name)
            if row is None:
                values.append("")
            elif row["registers"] == "":
                values.append(str(row["status"]))
            else:
                said = f" ({row['status']})" if row["status"] else ""
                values.append(" / ".join(str(row[cell]) for cell in cells) + said)
        lines.append(f"| {' | '.join([*key, *values])} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV; what it holds of this Triton is not made again")
    parser.add_argument("--markdown", type=Path, help="the same as a table")
    parser.add_argument("--only", action="append", help="this op alone; may be repeated")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    arguments = parser.parse_args(argv)
    known = modules()
    for name in arguments.only or ():
        if name not in known:
            parser.error(f"--only: expected one of {', '.join(known) or 'no name, as no kernel ships any'}, got {name}")
    found = read(arguments.out)
    rows = [row for row in found if row["kernels"] == fingerprint(row["op"])]
    if len(rows) < len(found) or not arguments.out.exists():
        arguments.out.unlink(missing_ok=True)
        append_rows(arguments.out, rows, COLUMNS)
    before = frozenset(map(key_of, rows))
    tasks = [
        Task(op, dtype, dim, architecture)
        for dtype in arguments.dtypes for op in arguments.only or known for dim in arguments.widths
        for architecture in arguments.architectures
    ]  # fmt: skip
    tasks = [task for task in tasks if any(missing(task, before))]
    for task, made in zip(tasks, compiled(tasks, before, arguments.jobs), strict=True):
        append_rows(arguments.out, made, COLUMNS)
        seconds = sum(row["seconds"] for row in made)
        size = f"{task.op}, {task.dtype}, D={task.dim}, sm_{task.architecture}"
        print(f"{size}: {len(made)} launches, {seconds:.0f} s", flush=True)
    rows = read(arguments.out)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows), encoding="utf-8")
    for row in rows:
        if row["status"]:
            what = " ".join(row[name] for name in ("op", "kernel", "option", "constants", "dtype"))
            print(f"{what} D={row['D']} {row['architecture']}: {row['status']}")
    print(f"{len(rows)} launches in {arguments.out}")
    return int(any(is_failure(row) for row in rows))


def compiled(tasks: Sequence[Task], made: frozenset[tuple[str, ...]], jobs: int) -> Iterator[list[dict[str, Any]]]:
    if jobs <= 1:
        yield from (rows_of(task, made) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(rows_of, tasks, itertools.repeat(made))


if __name__ == "__main__":
    sys.exit(main())
