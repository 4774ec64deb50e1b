"""An update recorded as a CUDA graph, once per size of batch, and replayed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gac_fast.errors import EngineWarning
from gac_fast.model import Batch

__all__ = ["RecordedUpdate"]

Update = Callable[..., dict[str, Tensor]]

# Updates of a size before it is recorded: kernels are compiled and chosen, libraries make their work spaces.
N_PLAIN = 3
MOST_RECORDINGS = 12


class RecordedUpdate:
    """Calls like the update it records: each call is one update, the first few of a size as they are.

    What an update moves (parameters, optimiser, chains, the generator's state) must stay where it is in memory;
    :meth:`forget` the recordings where it was replaced.

    Args:
        run: (batch, rows, infer=...) -> zero-dimensional diagnostics. It reads nothing back from the device.
        moved: what it changes and others may keep something made of: their versions count replays too, which write
            where torch does not look.
        may_fail: where a recording cannot be made, as for want of memory, say so and go on plainly.
    """

    def __init__(self, run: Update, moved: Sequence[Tensor] = (), may_fail: bool = False) -> None:
        self._run = run
        self._moved = moved
        self._may_fail = may_fail
        self._gave_up = False
        self._recordings: dict[Any, _Recording] = {}
        self._pool: Any = None

    def __call__(self, batch: Batch, rows: Tensor, infer: bool = True) -> dict[str, Tensor]:
        if self._gave_up:
            return self._run(batch, rows, infer=infer)
        key = infer, *(None if x is None else (x.shape, x.dtype) for x in (*batch, rows))
        if key not in self._recordings:
            self._recordings[key] = _Recording(batch, rows)
        one = self._recordings[key]
        one.read(batch, rows)
        if one.replay is not None:
            return self._replayed(one)
        if len(one.names) == 0 or one.n_plain < N_PLAIN:
            values = plainly(lambda: self._run(one.batch, one.rows, infer=infer), rows.device)
            one.n_plain += 1
            one.names = tuple(values)
            return values
        # All graphs draw on one pool: they run one at a time, and none reads what another left there.
        if self.n_recordings >= MOST_RECORDINGS:
            # Their pool grows with every size and gives nothing back.
            self.forget()
            self._recordings[key] = one
        if self._pool is None:
            self._pool = make_pool()
        try:
            one.replay, one.stacked = record(
                lambda: torch.stack(
                    [x.to(torch.float32) for x in self._run(one.batch, one.rows, infer=infer).values()]
                ),
                len(one.names), rows.device, self._pool,
            )  # fmt: skip
        except RuntimeError as error:
            # Nothing of it has run.
            if not self._may_fail:
                raise
            warnings.warn(
                f"train.cuda_graph = auto: updates go on without a CUDA graph, as recording one failed: {error}",
                EngineWarning, stacklevel=2,
            )  # fmt: skip
            self.forget()
            self._gave_up = True
            return self._run(batch, rows, infer=infer)
        return self._replayed(one)

    def _replayed(self, one: _Recording) -> dict[str, Tensor]:
        assert one.replay is not None
        one.replay()
        if self._moved:
            torch.autograd.graph.increment_version(self._moved)
        return one.values()

    @property
    def n_recordings(self) -> int:
        """Sizes of batch that are recorded."""
        return sum(one.replay is not None for one in self._recordings.values())

    def forget(self) -> None:
        """Drop all recordings."""
        self._recordings.clear()
        self._pool = None


class _Recording:
    """Memory that the inputs of one size are copied to, and the graph that reads it."""

    def __init__(self, batch: Batch, rows: Tensor) -> None:
        self.batch = Batch._make(None if x is None else torch.empty_like(x) for x in batch)
        self.rows = torch.empty_like(rows)
        self.n_plain = 0
        self.names: tuple[str, ...] = ()
        self.replay: Callable[[], None] | None = None
        self.stacked: Tensor | None = None

    def read(self, batch: Batch, rows: Tensor) -> None:
        for target, x in zip((*self.batch, self.rows), (*batch, rows), strict=True):
            if target is not None and x is not None:
                target.copy_(x, non_blocking=True)

    def values(self) -> dict[str, Tensor]:
        assert self.stacked is not None
        # The next replay writes over it.
        return dict(zip(self.names, self.stacked.clone().unbind(), strict=True))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: torch keeps memory by stream, and its own for captures is of the device that captured first."""
    return torch.cuda.Stream(device)


def plainly(run: Callable[[], dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Run on a stream beside the default one, as what is recorded later must have run before."""
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        values = run()
    torch.cuda.current_stream(device).wait_stream(stream)
    for x in values.values():
        x.record_stream(torch.cuda.current_stream(device))
    return values


def make_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def record(
    run: Callable[[], Tensor], n_values: int, device: torch.device, pool: Any
) -> tuple[Callable[[], None], Tensor]:
    """A function that replays ``run``, which is not run now, and the tensor [n_values] that each replay fills."""
    graph = torch.cuda.CUDAGraph()
    # The thread that prepares batches goes on calling CUDA meanwhile.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"),
    ):
        out = run()
    assert out.shape == (n_values,)
    return graph.replay, out
