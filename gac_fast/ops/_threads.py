"""How many threads the C++ engine takes: as many as torch, or all of torch's while torch itself keeps to one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from gac_fast.ops import _dispatch

__all__ = ["Exactly", "count", "left_to_the_engine"]


class _Local(threading.local):
    """As torch's own setting, that of one thread of Python."""

    n_threads = 0


_local = _Local()


def count() -> int:
    """Threads for a call of the engine."""
    return _local.n_threads or torch.get_num_threads()


class Exactly:
    """Inside, the engine takes so many threads. Holds for the calling thread.

    A class, as a generator takes several times as long, at every step of every part of an actor.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads

    def __enter__(self) -> None:
        self.before = _local.n_threads
        _local.n_threads = self.n_threads

    def __exit__(self, *error: object) -> None:
        _local.n_threads = self.before


@contextlib.contextmanager
def left_to_the_engine(op: str, x: Tensor) -> Iterator[None]:
    """Inside, torch's own operations run on one thread, and the engine on as many as torch had before.

    After a product on several threads, those of OpenMP go on spinning for milliseconds (its default policy), on the
    cores that the engine's threads are about to need. Where the engine does nearly all of the work, torch's share is
    better done on one. Holds for the calling thread.

    Args:
        op: the op that is most of the work; nothing changes unless the C++ engine runs it for tensors like ``x``.
    """
    if _local.n_threads or _dispatch.refusal(x) is not None or _dispatch.active(op, x.device) != "cpp":
        yield
        return
    n_threads = torch.get_num_threads()
    try:
        _local.n_threads = n_threads
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(n_threads)
        _local.n_threads = 0
