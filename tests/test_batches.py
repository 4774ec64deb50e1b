"""Batches of an update and the thread that prepares them: what they hold, that none is written over, how it ends."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from conftest import ROOT
from core_fixtures import make_trajectories, model_config

from gac_fast import ops
from gac_fast.config import Config, PosteriorConfig, TrainConfig
from gac_fast.errors import BackendError, ConfigError
from gac_fast.model.normalization import Normalization
from gac_fast.train.batches import Batches, Mix, bucket
from gac_fast.train.feeder import Feeder

LENGTHS = [3, 30, 6, 9, 12, 5]


def batches(
    sampling="length", tau_only_fraction=0.25, complete=None, held_out=(), dropout=0.0, device="cpu", bucketed=None,
    **train,
):  # fmt: skip
    config = Config(
        model=model_config(context="states_actions", action_token_dropout=dropout),
        posterior=PosteriorConfig(tau_only_fraction=tau_only_fraction),
        train=TrainConfig(**{"batch_size": 4, "sampling": sampling, **train}),
    )
    data = make_trajectories(LENGTHS, complete=complete)
    held = torch.tensor(held_out, dtype=torch.int64)
    return data, Batches(data, Normalization.fit(data), held, config, torch.device(device), bucketed)


@pytest.fixture(params=["reference", "cpp"])
def on_backend(request):
    if request.param == "cpp":
        request.getfixturevalue("cpp_engine")
    with ops.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def no_thread_stays():
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= before


def feeders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gac_fast feeder"]


def wait_until(done) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.001)


# ---------------------------------------------------------------------------------------------------------------------
# What a batch holds


def test_a_batch_holds_whole_trajectories_in_the_models_units():
    data, b = batches()
    batch = b.of(torch.tensor([4, 0, 4]))
    assert batch.cu_seqlens.tolist() == [0, 12, 15, 27]
    assert batch.sequence.tolist() == [0] * 12 + [1] * 3 + [2] * 12
    assert batch.positions.tolist() == [*range(12), *range(3), *range(12)]
    units = Normalization.fit(data)
    obs, actions, y, _ = data.episode(4)
    assert torch.equal(batch.observations[:12], units.observations(torch.from_numpy(obs)))
    assert torch.equal(batch.actions[15:], units.actions(torch.from_numpy(actions)))
    assert float(batch.actions.abs().max()) <= 1
    assert float(batch.returns[0]) == pytest.approx((y - float(units.return_mean)) / float(units.return_std), abs=1e-5)
    assert torch.equal(batch.first_states, batch.observations[[0, 12, 15]])
    assert not bool(batch.has_return.any())
    assert bool(batch.has_label.all())


def test_a_drawn_batch_equals_that_of_its_trajectories(on_backend):
    data, b = batches(dropout=0.3, complete=[True, True, False, True, True, True])
    for number in range(5):
        batch, rows = b.draw(number)
        expected = b.of(rows % len(data), batch.has_return, batch.dropped)
        assert batch.is_real is None
        for name, x, y in zip(batch._fields[:-1], batch[:-1], expected[:-1], strict=True):
            assert x.dtype == y.dtype, name
            assert torch.equal(x, y), name
    assert {name for _, name in ops.dispatch_counts()} == {on_backend}
    assert len(feeders()) == (on_backend == "cpp")


@pytest.mark.usefixtures("on_backend")
def test_draws_have_no_repetition_and_mark_the_tau_only_rows():
    data, b = batches(complete=[True, True, False, True, True, True])
    for number in range(50):
        batch, rows = b.draw(number)
        ids = rows % len(data)
        assert len(set(ids.tolist())) == 4
        assert torch.equal(rows >= len(data), ~batch.has_return)
        assert not bool(batch.has_return[3])
        assert torch.equal(batch.has_label, ids != 2)
        assert not bool((batch.has_return & (ids == 2)).any())
        assert bool((batch.returns[ids == 2] == 0).all())
        # All but the last fourth see their return, unless it is unknown.
        assert batch.has_return[:3].tolist() == (ids[:3] != 2).tolist()


@pytest.mark.usefixtures("on_backend")
def test_held_out_trajectories_are_never_drawn():
    data, b = batches(held_out=(1, 4), batch_size=32)
    assert b.size == 4
    drawn = {int(row) % len(data) for number in range(20) for row in b.draw(number)[1]}
    assert drawn == {0, 2, 3, 5}


@pytest.mark.parametrize("sampling", ["length", "uniform"])
def test_trajectories_are_drawn_by_length_or_alike(sampling):
    data, b = batches(sampling, batch_size=1)
    n = 3000
    ids = torch.tensor([int(b.draw(number)[1]) % len(data) for number in range(n)])
    counts = torch.bincount(ids, minlength=6)
    share = torch.from_numpy(data.lengths / data.lengths.sum()) if sampling == "length" else torch.full((6,), 1 / 6)
    assert bool(((counts / n - share).abs() < 5 * (share * (1 - share) / n).sqrt()).all())


@pytest.mark.usefixtures("on_backend")
def test_action_tokens_are_dropped_at_their_rate():
    _, b = batches(dropout=0.3, batch_size=6)
    dropped = torch.cat([b.draw(number)[0].dropped for number in range(40)]).double()
    assert abs(float(dropped.mean()) - 0.3) < 5 * math.sqrt(0.21 / len(dropped))
    assert batches()[1].draw(0)[0].dropped is None


@pytest.mark.usefixtures("cpp_engine")
def test_a_batch_follows_from_seed_and_number_alone():
    def some(order, **train):
        _, b = batches(dropout=0.3, **train)
        found = {}
        for number in order:
            batch, rows = b.draw(number)
            found[number] = [x.clone() for x in (*batch[:-1], rows)]
        return found

    expected = some(range(6))
    with ops.backend("reference"):
        others = [some(range(6))]
    others += [some([4, 2, 3, 0, 5, 1]), some(range(6), prefetch=0), some(range(6), prefetch=7), some([3])]
    for other in others:
        for number, parts in other.items():
            assert all(torch.equal(x, y) for x, y in zip(parts, expected[number], strict=True))
    different = some(range(6), seed=1)
    assert not any(torch.equal(different[number][-2], expected[number][-2]) for number in range(6))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.usefixtures("on_backend")
def test_a_batch_that_is_kept_is_never_written_over():
    _, b = batches(dropout=0.3)
    kept = [b.draw(number) for number in range(12)]
    # A view of a part, and what autograd saved, keep it as well.
    scale = torch.ones((), requires_grad=True)
    loss = sum((scale * batch.returns).sum() for batch, _ in kept)
    positions = [batch.positions[2:5] for batch, _ in kept]
    for i, (batch, rows) in enumerate(kept):
        fresh, fresh_rows = batches(dropout=0.3)[1].draw(i)
        assert torch.equal(rows, fresh_rows)
        assert all(torch.equal(x, y) for x, y in zip(batch[:-1], fresh, strict=False))
    expected_gradient = sum(float(batch.returns.sum()) for batch, _ in kept)
    expected_positions = [p.clone() for p in positions]
    del kept, batch, rows, fresh, fresh_rows
    for number in range(12, 40):
        b.draw(number)
    loss.backward()
    assert float(scale.grad) == pytest.approx(expected_gradient, abs=1e-4)
    assert all(torch.equal(x, y) for x, y in zip(positions, expected_positions, strict=True))


@pytest.mark.usefixtures("cpp_engine")
def test_memory_is_used_again():
    _, b = batches(prefetch=2)

    def address(number):
        return b.draw(number)[1].untyped_storage().data_ptr()

    assert len({address(number) for number in range(50)}) <= 4
    kept = [b.draw(number) for number in range(50, 80)]
    assert len({rows.untyped_storage().data_ptr() for _, rows in kept}) == 30
    del kept
    assert len({address(number) for number in range(80, 120)}) <= 5


# ---------------------------------------------------------------------------------------------------------------------
# The thread


@pytest.mark.usefixtures("cpp_engine")
def test_batches_are_prepared_ahead_and_no_further():
    _, b = batches(prefetch=3)
    b.draw(0)
    wait_until(lambda: ops.dispatch_counts()["pack_batch", "cpp"] >= 2 * 4)
    time.sleep(0.05)
    assert ops.dispatch_counts() == {("pack_batch", "cpp"): 2 * 4}
    b.draw(1)
    wait_until(lambda: ops.dispatch_counts()["pack_batch", "cpp"] >= 2 * 5)


@pytest.mark.usefixtures("cpp_engine")
def test_without_prefetch_and_on_the_reference_there_is_no_thread():
    _, b = batches(prefetch=0)
    b.draw(0)
    assert not feeders()
    _, b = batches()
    b.draw(0)
    assert len(feeders()) == 1
    with ops.backend("reference"):
        b.draw(1)
    assert not feeders()
    b.draw(2)
    assert len(feeders()) == 1
    with ops.backend("triton"), pytest.raises(BackendError, match=r"pack_batch: .* forces the triton backend"):
        b.draw(3)
    with pytest.raises(ConfigError, match=r"train\.prefetch must be at least 0, got -1"):
        batches(prefetch=-1)


@pytest.mark.usefixtures("cpp_engine")
def test_closing_and_collecting_end_the_thread():
    _, b = batches()
    first = b.draw(0)[1].tolist()
    (thread,) = feeders()
    b.close()
    assert not thread.is_alive()
    b.close()
    # It can be taken up again.
    assert b.draw(0)[1].tolist() == first
    (thread,) = feeders()
    del b
    gc.collect()
    assert not thread.is_alive()


def test_results_come_in_order_and_a_jump_begins_anew():
    made = []
    feeder = Feeder(lambda number: made.append(number) or number * number, depth=2)
    assert [feeder.take(number) for number in (3, 4, 5)] == [9, 16, 25]
    wait_until(lambda: made == [3, 4, 5, 6, 7])
    assert [feeder.take(number) for number in (5, 6, 100)] == [25, 36, 10_000]
    feeder.close()
    assert made[5:7] == [5, 6]
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        Feeder(int, depth=0)


def test_an_error_comes_out_as_itself_when_its_turn_comes():
    class OwnError(Exception):
        pass

    broken = {2}

    def make(number):
        if number in broken:
            raise OwnError(f"number {number}")
        return number

    feeder = Feeder(make, depth=3)
    assert [feeder.take(0), feeder.take(1)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OwnError, match="number 2") as caught:
            feeder.take(2)
        # With the place where it happened.
        assert caught.traceback[-1].name == "make"
    assert not feeders()
    broken.clear()
    assert [feeder.take(2), feeder.take(3)] == [2, 3]
    feeder.close()


@pytest.mark.usefixtures("cpp_engine")
def test_an_error_in_the_engine_comes_out_of_draw():
    _, b = batches()
    b._packer.weights[3] = math.nan
    with pytest.raises(ValueError, match="weights: expected finite values of at least 0, got nan at position 3"):
        b.draw(0)
    b._packer.weights[3] = 1.0
    assert len(b.draw(0)[1]) == 4


def test_an_interrupt_while_waiting_ends_the_thread():
    started, release = threading.Event(), threading.Event()

    def make(number):
        started.set()
        release.wait(10)
        return number

    def interrupt():
        started.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        release.set()

    feeder = Feeder(make, depth=2)
    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        feeder.take(0)
    other.join()
    # The interrupt may come while the thread is being started.
    wait_until(lambda: not feeders())
    assert feeder.take(0) == 0
    feeder.close()


def test_a_feeder_that_is_dropped_drops_what_it_prepared():
    class Result:
        pass

    prepared = []

    def make(number):
        result = Result()
        prepared.append(weakref.ref(result))
        return result

    feeder = Feeder(make, depth=4)
    feeder.take(0)
    wait_until(lambda: len(prepared) == 5)
    del feeder
    assert not feeders()
    assert not any(ref() for ref in prepared)


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_child_of_a_fork_goes_on_by_itself_and_processes_end():
    """With a thread at work in the parent; in processes of their own, which must end without being told to."""
    script = """
import os, sys, threading
sys.path.insert(0, "tests")
from test_batches import batches
_, b = batches(dropout=0.3)
parent = [b.draw(number)[1].tolist() for number in range(4)]
_, other = batches(dropout=0.3)
for i in range(30):
    other.draw(2 * i)
    child = os.fork()
    if not child:
        own = [b.draw(number)[1].tolist() for number in range(4)]
        assert own == parent, (own, parent)
        b.draw(4)
        other.draw(2 * i + 1)
        b.close()
        # The slow way once: with everything that is registered for the end of a process.
        sys.exit() if i == 29 else os._exit(0)
    other.draw(2 * i + 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert b.draw(4)[1].tolist()
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.gpu
def test_on_a_gpu_batches_are_the_same_however_far_it_is_behind():
    _, here = batches(dropout=0.3, bucketed=True)
    _, there = batches(dropout=0.3, device="cuda")
    busy = torch.randn(2048, 2048, device="cuda")
    kept = []
    for number in range(40):
        for _ in range(10):
            busy = busy @ busy / busy.norm()
        kept.append(there.draw(number))
    for number, (batch, rows) in enumerate(kept):
        expected, expected_rows = here.draw(number)
        assert torch.equal(rows.cpu(), expected_rows)
        for name, x, y in zip(batch._fields, batch, expected, strict=True):
            assert x.device.type == "cuda"
            torch.testing.assert_close(x.cpu(), y, rtol=1e-6, atol=1e-6, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Batches filled up to a few sizes


def test_buckets_are_few_and_hold_what_they_should():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert all(n <= size <= n + n // 8 + 1 for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert [bucket(size) for size in sizes] == sizes
    assert len(set(sizes[2048:])) == 8
    assert sum(size / n for n, size in enumerate(sizes, start=1)) / len(sizes) < 1.05


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_a_batch_filled_up_begins_with_the_plain_one(batch_size):
    complete = [True, True, False, True, True, True]
    data, plain = batches(dropout=0.3, complete=complete, batch_size=batch_size)
    _, filled = batches(dropout=0.3, complete=complete, batch_size=batch_size, bucketed=True)
    for number in range(12):
        (expected, expected_rows), (batch, rows) = plain.draw(number), filled.draw(number)
        n, b = len(expected.positions), len(expected.returns)
        whole_n, whole_b = len(batch.positions), len(batch.returns)
        assert (whole_n, whole_b) == (bucket(n + 1), bucket(b + 1))
        assert plain.n_steps == filled.n_steps == n
        for name, x, y in zip(batch._fields[:-1], batch, expected, strict=False):
            assert torch.equal(x[: len(y)], y), name
        assert batch.is_real.tolist() == [True] * b + [False] * (whole_b - b)
        assert torch.equal(rows[:b], expected_rows)
        assert rows[b:].tolist() == [2 * len(data)] * (whole_b - b)
        assert batch.cu_seqlens[b:].tolist() == [n] * (whole_b - b) + [whole_n]
        assert batch.sequence[n:].tolist() == [whole_b - 1] * (whole_n - n)
        assert batch.positions[n:].tolist() == list(range(whole_n - n))
        assert batch.first_states.shape[0] == whole_b
        for x in (batch.has_return[b:], batch.has_label[b:], batch.returns[b:], batch.dropped[n:]):
            assert not bool(x.any())
        assert bool(batch.actions[n:].isfinite().all())
        assert bool(batch.observations[n:].isfinite().all())


@pytest.mark.usefixtures("nan_filled_empty", "on_backend")
def test_a_batch_filled_up_holds_no_memory_as_it_was_found():
    _, filled = batches(dropout=0.3, bucketed=True)
    assert all(bool(x.isfinite().all()) for number in range(9) for x in filled.draw(number)[0])


def test_compiled_and_recorded_runs_fill_their_batches_up():
    assert batches()[1].draw(0)[0].is_real is None
    for name in ("compile", "cuda_graph"):
        assert batches(**{name: "on"})[1].draw(0)[0].is_real is not None
    assert batches(compile="on", bucketed=False)[1].draw(0)[0].is_real is None


# Offline and online trajectories


def mixed(share: float, batch_size: int = 8, tau_only_fraction: float = 0.25, n_offline: int = 14):
    """20 episodes, the last of them online, with chains elsewhere."""
    data = make_trajectories([4] * 20)
    config = Config(
        model=model_config(),
        posterior=PosteriorConfig(tau_only_fraction=tau_only_fraction),
        train=TrainConfig(batch_size=batch_size, prefetch=0),
    )
    online = torch.arange(20) >= n_offline
    mix = Mix(online, torch.zeros_like(online), share, 0.0, rows=100 + torch.arange(20), n_chains=1000)
    held = torch.tensor([0, 1])
    normalization = Normalization.fit(data)
    return Batches(data, normalization, held, config, torch.device("cpu"), mix=mix), online


@pytest.mark.parametrize(("share", "n_online"), [(0.0, 0), (0.5, 4), (0.75, 6), (1.0, 6)])
def test_a_batch_holds_the_share_of_online_episodes(share, n_online):
    b, online = mixed(share)
    seen = set()
    for number in range(40):
        batch, rows = b.draw(number)
        ids = (rows - 100) % 1000
        assert int(online[ids].sum()) == n_online
        assert len(set(ids.tolist())) == 8
        assert not set(ids.tolist()) & {0, 1}
        hidden = rows >= 1000
        assert torch.equal(batch.has_return, ~hidden)
        # Of each kind its share, so that the variance sees both.
        assert int((hidden & online[ids]).sum()) == round(0.25 * n_online)
        assert int((hidden & ~online[ids]).sum()) == round(0.25 * (8 - n_online))
        seen |= set(ids.tolist())
    assert seen == ({*range(2, 14)} if n_online < 8 else set()) | ({*range(14, 20)} if n_online else set())


def test_without_offline_episodes_a_batch_is_online():
    b, online = mixed(0.25, batch_size=4, n_offline=0)
    _, rows = b.draw(0)
    assert online[(rows - 100) % 1000].all()
    assert b.size == 4


def test_a_tiny_share_still_leaves_a_chain_that_sees_no_return():
    b, _ = mixed(0.5, batch_size=2)
    batch, _ = b.draw(0)
    assert batch.has_return.tolist().count(False) == 1


def test_without_a_mix_and_with_all_of_one_kind_batches_are_the_same():
    data = make_trajectories(LENGTHS)
    config = Config(model=model_config(), train=TrainConfig(batch_size=4))
    n = Normalization.fit(data)
    none = torch.zeros(0, dtype=torch.int64)
    mix = Mix(*torch.zeros(2, 6, dtype=torch.bool), 0.5, 0.5, torch.arange(6), 6)
    one = Batches(data, n, none, config, torch.device("cpu"))
    two = Batches(data, n, none, config, torch.device("cpu"), mix=mix)
    for number in range(3):
        (a, rows_a), (b, rows_b) = one.draw(number), two.draw(number)
        assert torch.equal(rows_a, rows_b)
        assert torch.equal(a.observations, b.observations)
        assert torch.equal(a.has_return, b.has_return)


@pytest.mark.parametrize(("best_share", "n_best"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 2)])
def test_the_best_have_their_own_share(best_share, n_best):
    data = make_trajectories([4] * 20)
    config = Config(model=model_config(), train=TrainConfig(batch_size=8, prefetch=0))
    online, best = torch.arange(20) >= 12, torch.arange(20) >= 18
    mix = Mix(online, best, 0.5, best_share, torch.arange(20), 20)
    none = torch.zeros(0, dtype=torch.int64)
    b = Batches(data, Normalization.fit(data), none, config, torch.device("cpu"), mix=mix)
    for number in range(20):
        ids = b.draw(number)[1] % 20
        assert (int(online[ids].sum()), int(best[ids].sum())) == (4, n_best)
        assert len(ids.unique()) == 8
