"""A thread that prepares what a loop will ask for next."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Feeder"]

T = TypeVar("T")

# Seconds.
HEAD_START = 0.005


class Feeder(Generic[T]):
    """``make(0)``, ``make(1)``, ... prepared in order by a thread, up to ``depth`` ahead of the loop that takes them.

    The thread starts at the first :meth:`take` and ends with :meth:`close`, when the feeder is garbage collected, at
    the end of the interpreter, or by an error. It runs in a copy of the context of the caller that started it. In the
    child of a fork, which has no such thread, the next :meth:`take` starts one.

    Args:
        make: number -> result, called by one thread at a time. It must not refer to the feeder, or the feeder would
            never be collected.
        depth: results prepared ahead, at least 1.
    """

    def __init__(self, make: Callable[[int], T], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        self._make = make
        self._depth = depth
        self._run: _Run[T] | None = None
        self._stop: weakref.finalize | None = None

    def take(self, number: int) -> T:
        """The result of ``make(number)``; any number but the one after the last makes the thread begin anew there.

        Raises:
            what ``make(number)`` raised; the next call then tries again.
        """
        run = self._run
        try:
            if run is None or run.pid != os.getpid() or run.next != number:
                self.close()
                self._run = run = _Run(self._make, number, self._depth)
                # Before the start, which an interrupt may cut short.
                self._stop = weakref.finalize(self, run.stop)
                run.start()
            return run.take()
        except BaseException:
            # Interrupted or failed: what the thread was at is no longer known to be the next.
            self.close()
            raise

    def close(self) -> None:
        """Stop the thread and wait for it; what it prepared is dropped. A later :meth:`take` starts another."""
        if self._stop is not None:
            self._stop()
        self._run = self._stop = None


class _Run(Generic[T]):
    """One thread and what it has ready. Knows the feeder's ``make`` and not the feeder."""

    def __init__(self, make: Callable[[int], T], first: int, depth: int) -> None:
        self.pid = os.getpid()
        self.next = first  # what take() gives next
        self._make = make
        self._depth = depth
        self._ready: deque[tuple[T, None] | tuple[None, BaseException]] = deque()
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._work, first), name="gac_fast feeder", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def take(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            value, error = self._ready.popleft()
            self.next += 1
            self._changed.notify_all()
        if error is not None:
            try:
                raise error
            finally:
                # Its traceback holds this frame.
                del error
        return value  # type: ignore[return-value]

    def stop(self) -> None:
        # In the child of a fork the lock may be held by a thread that is not there.
        if self.pid != os.getpid():
            return
        with self._changed:
            self._stopping = True
            self._ready.clear()
            self._changed.notify_all()
        # Garbage may be collected in any thread.
        if self._thread is not threading.current_thread():
            # Not begun: a start that was cut short, whose thread ends as it begins.
            with contextlib.suppress(RuntimeError):
                self._thread.join()
            self._ready.clear()

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or len(self._ready) < self._depth)
                # Nothing is urgent while something is ready: whoever took the last result works with it first, and does
                # not share the interpreter meanwhile.
                self._changed.wait_for(lambda: self._stopping or not self._ready, timeout=HEAD_START)
                if self._stopping:
                    return
            outcome: tuple[T, None] | tuple[None, BaseException]
            try:
                outcome = self._make(number), None
            except BaseException as error:
                outcome = None, error
            failed = outcome[1] is not None
            with self._changed:
                self._ready.append(outcome)
                self._changed.notify_all()
            del outcome
            if failed:
                return
            number += 1
