"""What an update asks of torch's threads and of the C library's memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT
from core_fixtures import make_policy

from gac_fast import ops
from gac_fast.act import Actor
from gac_fast.ops import _threads


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("cpp_engine", "three_threads")
def test_the_engine_takes_all_threads_and_torch_one():
    x = torch.zeros(2)
    assert _threads.count() == 3
    with ops.left_to_the_engine("block", x):
        assert (torch.get_num_threads(), _threads.count()) == (1, 3)
        with ops.left_to_the_engine("block", x):
            assert (torch.get_num_threads(), _threads.count()) == (1, 3)
        assert (torch.get_num_threads(), _threads.count()) == (1, 3)
    assert (torch.get_num_threads(), _threads.count()) == (3, 3)


@pytest.mark.usefixtures("three_threads")
def test_an_exact_number_holds_for_the_calling_thread():
    found: list[int] = []
    with _threads.Exactly(2):
        assert _threads.count() == 2
        with _threads.Exactly(7):
            assert _threads.count() == 7
        other = threading.Thread(target=lambda: found.append(_threads._local.n_threads))
        other.start()
        other.join()
        assert (_threads.count(), found) == (2, [0])
    assert _threads.count() == 3


@pytest.mark.usefixtures("cpp_engine", "three_threads")
def test_an_error_gives_the_threads_back():
    with pytest.raises(KeyError), ops.left_to_the_engine("block", torch.zeros(2)):
        raise KeyError
    assert _threads.count() == 3


@pytest.mark.usefixtures("cpp_engine", "three_threads")
def test_updates_of_two_threads_do_not_meet():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with ops.left_to_the_engine("block", torch.zeros(2)):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert (torch.get_num_threads(), _threads.count()) == (3, 3)
    with ops.left_to_the_engine("block", torch.zeros(2)):
        assert (torch.get_num_threads(), _threads.count()) == (1, 3)
    leave.set()
    thread.join()


@pytest.mark.usefixtures("three_threads")
def test_nothing_changes_where_the_engine_does_not_run():
    with ops.left_to_the_engine("block", torch.zeros(2, dtype=torch.float64)):
        assert torch.get_num_threads() == 3
    with ops.backend("reference"), ops.left_to_the_engine("block", torch.zeros(2)):
        assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("cpp_engine", "three_threads")
def test_an_actor_is_split_on_one_thread_of_torch(monkeypatch):
    policy, new_state, found = make_policy(), Actor._new_state, []
    actor = policy.actor(policy.prior_plans(4))
    monkeypatch.setattr(Actor, "_new_state", lambda *args: found.append(torch.get_num_threads()) or new_state(*args))
    (part,) = actor.split([4])
    assert (found, part._n_threads) == ([1], 3)


FAULTS = """
import resource, sys, torch
from gac_fast import ops
kept = ops.keep_freed_memory()
assert kept == (sys.argv[1] == "kept"), kept
def use():
    blocks = [torch.ones(10 << 20) for _ in range(3)]  # of 40 MiB, beyond what glibc's own threshold grows to
    del blocks
for _ in range(20): use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(expected: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, expected], cwd=ROOT, env={**os.environ, **environment}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc's allocator")
def test_freed_memory_stays_for_the_next_update():
    # Twenty times three blocks of 10,240 pages.
    assert faults("kept") < 10_000
    assert faults("not", GAC_FAST_KEEP_MEMORY="0") > 50_000
    # Whoever tunes the allocator is left alone.
    faults("not", MALLOC_TRIM_THRESHOLD_="100000")
