"""The thread pool of the C++ engine: every index once, whatever runs at the same time, and no hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("cpp_engine")


@pytest.mark.parametrize("n_threads", [-1, 0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_every_index_once(cpp_engine, n, n_threads):
    counts = np.zeros((n, 3), np.int64)
    cpp_engine._parallel_for(counts, n_threads, repeats=5)
    assert (counts == 5).all()


@pytest.mark.parametrize("n_threads", range(1, 9))
def test_the_work_is_shared_by_the_threads_asked_for(cpp_engine, n_threads):
    counts = np.zeros((40, 1), np.int64)
    used = cpp_engine._parallel_for(counts, n_threads, work_us=2000)
    assert (counts == 1).all()
    assert min(n_threads, 2) <= used <= n_threads


def test_far_more_threads_than_processors(cpp_engine):
    # A pool of its own process: it would stay for the other tests.
    script = """
import numpy as np
from gac_fast import _C
counts = np.zeros((2000, 2), np.int64)
used = _C._parallel_for(counts, 1_000_000, work_us=100)
assert (counts == 1).all() and used <= 256, used
"""
    run(script)


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_short_loops_one_after_the_other(cpp_engine, n_threads):
    counts = np.zeros((5, 2), np.int64)
    cpp_engine._parallel_for(counts, n_threads, repeats=20_000)
    assert (counts == 20_000).all()


@pytest.mark.parametrize("n_threads", [1, 2, 8])
def test_an_exception_comes_back_and_the_pool_lives_on(cpp_engine, n_threads):
    for index in (0, 3, 199):
        counts = np.zeros((200, 2), np.int64)
        with pytest.raises(IndexError, match=f"^index {index}$"):
            cpp_engine._parallel_for(counts, n_threads, fail_at=index)
        # The rest ran once or not at all; in one thread, all that came before.
        assert (counts[index] == 0).all()
        assert counts.max(initial=0) <= 1
        assert n_threads > 1 or (counts[:index] == 1).all()
        counts[:] = 0
        cpp_engine._parallel_for(counts, n_threads)
        assert (counts == 1).all()


def test_many_python_threads_at_once(cpp_engine):
    problems = []

    def work(number: int) -> None:
        try:
            for turn in range(150):
                n_threads = 1 + (number + turn) % 5
                counts = np.zeros((1 + turn % 9, 2), np.int64)
                cpp_engine._parallel_for(counts, n_threads, repeats=10)
                assert (counts == 10).all()
                with pytest.raises(IndexError, match=r"^index 0$"):
                    cpp_engine._parallel_for(counts, n_threads, fail_at=0)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not problems


def run(script: str, timeout: float = 60) -> str:
    """A process of its own, which may hang or crash."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BUSY = """
import os, signal, threading
import numpy as np
from gac_fast import _C

def loops(repeats=50):
    for n_threads in (2, 4):
        counts = np.zeros((6, 2), np.int64)
        _C._parallel_for(counts, n_threads, repeats=repeats)
        assert (counts == repeats).all()

stop = False
def busy():
    while not stop:
        loops()

threads = [threading.Thread(target=busy, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
loops()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_busy():
    script = """
for _ in range(25):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            loops()
            # A child of a child, too.
            grandchild = os.fork()
            if grandchild == 0:
                loops()
                os._exit(0)
            os._exit(0 if os.waitpid(grandchild, 0)[1] == 0 else 2)
        except BaseException:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == 0
loops()
stop = True
for thread in threads:
    thread.join()
"""
    run(BUSY + script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_multiprocessing_that_forks():
    script = """
import multiprocessing

def work(seed):
    loops()
    return seed * seed

with multiprocessing.get_context("fork").Pool(3) as pool:
    assert pool.map(work, range(30)) == [seed * seed for seed in range(30)]
stop = True
for thread in threads:
    thread.join()
"""
    run(BUSY + script)


def test_the_interpreter_ends_while_loops_run():
    # Daemon threads are inside the pool when it does.
    for _ in range(3):
        assert run(BUSY + "print('end')") == "end\n"


@pytest.mark.parametrize("n_threads", [2, 3, 16, 1000])
def test_members_of_a_run_meet_each_other_at_every_turn(cpp_engine, n_threads):
    counts = np.zeros((8, 1), np.int64)
    sizes = set()
    for _ in range(500):
        cpp_engine._parallel_for(counts, n_threads, work_us=10)  # workers are awake after it
        sizes.add(cpp_engine._run_together(n_threads, 20))
        if max(sizes) >= 2:
            break
    # Who is late does not take part.
    assert 2 <= max(sizes) <= min(n_threads, 16)
    assert cpp_engine._run_together(1, 20) == 0


def test_arguments_are_checked(cpp_engine):
    counts = np.zeros((3, 2), np.int64)
    with pytest.raises(ValueError, match="counts: expected dtype int64, got float64"):
        cpp_engine._parallel_for(counts.astype(float), 2)
    with pytest.raises(ValueError, match="work_us: expected 0 to 1000000, got -1"):
        cpp_engine._parallel_for(counts, 2, work_us=-1)
    with pytest.raises(ValueError, match="n_turns: expected 0 to 1000000, got -1"):
        cpp_engine._run_together(2, -1)
