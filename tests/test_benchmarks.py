"""The harness of the benchmarks: fair turns, honest rows, verdicts; and every case still runs, on toy sizes."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT

from gac_fast import ops, preset

DATE = "2026-01-02T03:04:05+00:00"


def outside() -> dict[str, str]:
    """The environment without pytest-xdist's variables: pytest-benchmark measures nothing in one of its workers."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("harness")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("report")


def make_row(provider: str, p50: float, **fields: object) -> dict[str, object]:
    """A row of the first bar's case (2.5x in float32, 6x in bfloat16) unless told otherwise."""
    return {
        "date": DATE, "commit": "abc", "op": "decode_step", "provider": provider, "mode": "step",
        "shape": "gym C=2 N=1", "dtype": "float32", "threads": 1, "rounds": 9, "p20_us": 0.9 * p50, "p50_us": p50,
        "p80_us": 1.2 * p50, "speedup": "", "flops": 1e6, "bytes": 1e5, "flop_per_s": 1e12 / p50,
        "bytes_per_s": 1e11 / p50, "matmul_flop_per_s": 1e11, "copy_bytes_per_s": 1e10, "isa": "amx", "cpu": "Some CPU",
        "cores": 2, "python": "3.11", "torch": "2.13", "gac_fast": "0", "compiler": "gcc",
        "items": "", "unit": "", "peak_mib": "", "note": "",
    } | fields  # fmt: skip


class FakeBenchmark:
    """pytest-benchmark's ``pedantic``, noting nothing."""

    def pedantic(self, target, setup, rounds, iterations):
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target()


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def test_providers_take_turns_with_the_main_one_last(harness):
    called: list[str] = []
    runs = {name: (lambda name=name: called.append(name)) for name in ("main", "reference", "peer")}
    settings = harness.Settings(seconds=1000.0, min_rounds=4, max_rounds=4)
    times, rounds = harness.alternate(runs, settings, "main", FakeBenchmark().pedantic)
    assert rounds == 4
    assert {name: len(t) for name, t in times.items()} == {"reference": 4, "peer": 4, "main": 4}
    # Short calls are repeated within a turn to warm up.
    assert len(called) > 3 * (2 + 4)
    turns = [name for name, before in zip(called, [None, *called], strict=False) if name != before]
    assert turns[-12:] == ["reference", "peer", "main"] * 4


def test_a_gain_is_measured_within_a_round(harness, report, monkeypatch):
    """The same call on one thread and on two, in turn, though the machine gets slower from round to round."""
    clock = [0.0]

    def timed(run):
        run()
        clock[0] += 1.0
        return clock[0] * (2.0 if torch.get_num_threads() == 1 else 1.25)

    class Enabled(FakeBenchmark):
        stats, extra_info, group = object(), {}, ""

    monkeypatch.setattr(harness, "_timed", timed)
    monkeypatch.setattr(harness, "SETTLE_SECONDS", 0.0)  # 400 rounds of it
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        recorder = harness.Recorder(None, harness.Settings(1e6, 400, 400), tiny=True)
        providers = {("reference", "float32"): lambda: None, ("cpp", "float32"): lambda: None}
        recorder.compare(Enabled(), harness.Case("op", "fwd", "N=1"), providers)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    reference, engine = recorder.rows
    assert (reference["threads"], reference["gain"], reference["matmul_gain"]) == (2, "", "")
    # Of neighbours in time, 2 / 1.25 but for what the clock does from one to the next.
    assert engine["gain"] == pytest.approx(1.6, rel=0.01)
    assert engine["matmul_gain"] == pytest.approx(1.6, rel=0.02)
    assert report.thread_gain(recorder.rows, engine) == engine["gain"] / engine["matmul_gain"]
    assert report.thread_gain(recorder.rows, reference) is None


@pytest.mark.parametrize(
    ("seconds_per_call", "rounds"),
    [
        (2e-3, 12),
        (0.02, 5),
        (0.1, 3),
        (0.6, 2),
        (1.3, 1),
    ],  # three warm-up calls and a measured one of both, or measured ones alone
)
def test_rounds_fill_the_time_and_floors_are_measured_in_some(harness, monkeypatch, seconds_per_call, rounds):
    def timed(run):
        run()
        return seconds_per_call

    monkeypatch.setattr(harness, "_timed", timed)
    monkeypatch.setattr(harness.torch, "get_num_threads", lambda: 1)  # on several, turns begin with 20 ms unmeasured
    runs = {"reference": lambda: None, "main": lambda: None}
    settings = harness.Settings(seconds=0.2, min_rounds=3, max_rounds=1000)
    floors = harness.floor_runs(tiny=True)
    times, found = harness.alternate(runs, settings, "main", FakeBenchmark().pedantic, floors)
    assert found == rounds
    assert times["reference"] == dict.fromkeys(range(found), seconds_per_call)
    assert min(found, 3) <= len(times["copy", "float32"]) <= harness.MAX_FLOOR_ROUNDS
    rates = harness.Floors.of(times, tiny=True)
    assert rates.copy == pytest.approx(2 * 2**16 / seconds_per_call)
    assert rates.matmul["float32"] == pytest.approx(2 * 64**3 / seconds_per_call)


def test_what_takes_long_is_measured_in_few_rounds_and_paired_with_the_same_ones(harness, monkeypatch):
    clock = [0.0]

    def timed(run):
        clock[0] += 1.0
        return clock[0] * (10.0 if run() == "slow" else 1.0)

    monkeypatch.setattr(harness, "_timed", timed)
    runs = {("naive", "float32"): lambda: "slow", harness.REFERENCE: lambda: None, ("cpp", "float32"): lambda: None}
    rare = [("naive", "float32")]
    settings = harness.Settings(seconds=1e9, min_rounds=7, max_rounds=7)
    times, rounds = harness.alternate(
        runs, settings, ("cpp", "float32"), FakeBenchmark().pedantic, threads={}, rarely=rare
    )
    assert (rounds, len(times[rare[0]]), len(times[harness.REFERENCE])) == (7, 2, 7)
    both = harness.pairs(times[harness.REFERENCE], times[rare[0]])
    assert list(times[rare[0]]) == [0, 4]
    # The clock of a round: the slow one first, then the reference.
    assert [reference - slow / 10 for reference, slow in both] == [1.0] * 2
    row = harness.row(harness.Case("op", "fwd", "N=1"), rare[0], times[rare[0]], times[harness.REFERENCE], None)
    assert row["speedup"] == pytest.approx(0.1, rel=0.2)
    # One whose only call was before is not called again, and goes with the first round.
    runs[rare[0]] = pytest.fail
    times, _ = harness.alternate(
        runs, settings, ("cpp", "float32"), FakeBenchmark().pedantic, rarely=rare, known={rare[0]: 7.0}
    )
    assert times[rare[0]] == {0: 7.0}


def test_what_wakes_slowly_is_called_for_longer_before_it_is_timed(harness, monkeypatch):
    class Waking:
        warm_seconds, n_calls = 0.5, 0

        def __call__(self):
            self.n_calls += 1

    def timed(run):
        run()
        return 0.01

    monkeypatch.setattr(harness, "_timed", timed)
    monkeypatch.setattr(harness.torch, "get_num_threads", lambda: 1)
    runs = {"waking": Waking(), "main": lambda: None}
    harness.alternate(runs, harness.Settings(1e3, 2, 2), "main", FakeBenchmark().pedantic)
    assert runs["waking"].n_calls == 2 + 2 * (50 + 1)


def test_peak_memory_is_that_of_the_call(harness):
    held = [torch.ones(8 * 2**20)]  # 32 MiB, freed and kept by the allocator or not

    def call():
        held.clear()
        a = torch.ones(10 * 2**20)
        return a + (a + 1.0) * 2.0  # 40 MiB three times at once

    call()
    peak = harness.peak_mib(call)
    if peak is None:
        pytest.skip("this system does not say")
    assert 75 < peak < 165
    assert harness.peak_mib(lambda: None) < 4


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_a_whole_process_is_timed_and_its_own_peak_is_told(harness, tmp_path):
    said = tmp_path / "threads"
    code = "import os, pathlib, time; x = bytearray(b'1') * 2**26; time.sleep(0.3); "
    code += "pathlib.Path(os.environ['WHERE']).write_text(os.environ['OMP_NUM_THREADS'])"
    one = harness.Process([sys.executable, "-c", code], WHERE=str(said))
    assert harness._timed(one) >= 0.3
    assert said.read_text() == str(torch.get_num_threads())
    # 64 MiB and an interpreter: less than this process holds, which the system's own count would begin with.
    assert 64 < one.peak_mib() < 100
    assert harness.peak_mib(one) == one.peak_mib()
    failing = harness.Process([sys.executable, "-c", "import sys; print('a last word'); sys.exit(3)"])
    with pytest.raises(RuntimeError, match=r"exit status 3: a last word"):
        failing()


STAND_IN = """
import sys

if sys.argv[1:] == ["--envs", "2"]:
    print("ready", flush=True)
    for line in sys.stdin:
        print({"time": "0.25", "peak": "3.5"}[line.strip()], flush=True)
        if line.strip() == "peak":
            break
elif sys.argv[1:] == ["--envs", "3"]:
    print("failed: ImportError: no such library")
"""


def test_a_peer_answers_from_a_process_of_its_own(harness, monkeypatch, tmp_path):
    """Or says why it cannot, and never passes for one that was measured."""
    peers = tmp_path / "benchmarks" / "peers"
    peers.mkdir(parents=True)
    (peers / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "PEERS_PYTHON", sys.executable)
    peer = harness.Peer("stand_in", "--envs", 2)
    try:
        assert harness._timed(peer) == 0.25
        assert harness.peak_mib(peer) == 3.5
        with pytest.raises(RuntimeError, match="the peer's process has ended"):
            peer()
    finally:
        peer.close()
    assert peer._process.poll() is not None
    assert harness.attempt(lambda: harness.Peer("stand_in", "--envs", 3)) == (
        "failed: RuntimeError: ImportError: no such library"
    )
    assert harness.attempt(lambda: harness.Peer("stand_in")) == "failed: RuntimeError: no answer"


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def test_quantiles_are_those_of_numpy(harness):
    times = np.random.default_rng(0).random(12)
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert harness.quantile(list(times), q) == pytest.approx(np.quantile(times, q))
    assert harness.quantile([3.0], 0.2) == 3.0


def test_a_row_has_rates_floors_and_the_median_ratio_over_rounds(harness):
    case = harness.Case("op", "fwd", "N=1", flops=3e6, bytes={"float32": 8e3, "bfloat16": 4e3})
    floors = harness.Floors({"float32": 1e11, "bfloat16": 1e12}, 1e10)
    # The machine slows down in the last round: the ratio of a round does not see it.
    row = harness.row(case, ("cpp", "bfloat16"), {0: 1e-6, 1: 2e-6, 2: 3e-6}, {0: 4e-6, 1: 8e-6, 2: 300e-6}, floors)
    assert (row["p50_us"], row["speedup"], row["rounds"]) == (2.0, 4.0, 3)
    assert (row["flop_per_s"], row["bytes_per_s"]) == (1.5e12, 2e9)
    assert (row["matmul_flop_per_s"], row["copy_bytes_per_s"]) == (1e12, 1e10)
    assert row["threads"] == torch.get_num_threads()
    plain = harness.row(harness.Case("op", "fwd", "N=1"), ("cpp", "float32"), {0: 1e-6}, {}, None)
    assert {plain[name] for name in ("speedup", "flops", "bytes", "flop_per_s", "matmul_flop_per_s")} == {""}


def test_rows_are_appended_and_other_columns_refused(harness, tmp_path):
    path = tmp_path / "results" / "speed.csv"
    harness.append_rows(path, [make_row("reference", 10.0)])
    harness.append_rows(path, [make_row("cpp", 5.0)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["reference", "cpp"]
    assert tuple(rows[0]) == harness.COLUMNS
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match=r"expected the columns date, commit, .* found a, b"):
        harness.append_rows(path, [make_row("cpp", 5.0)])


def test_the_commit_marks_a_changed_tree_but_not_earlier_results(harness, monkeypatch, tmp_path):
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    source, results = tmp_path / "a.py", tmp_path / "benchmarks" / "results" / "speed.csv"
    results.parent.mkdir(parents=True)
    source.write_text("1\n")
    results.write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = harness.commit()
    assert len(clean) == 12
    results.write_text("2\n")
    assert harness.commit() == clean
    source.write_text("2\n")
    assert harness.commit() == clean + "+dirty"


def test_there_is_no_bfloat16_to_measure_without_amx(harness, cpp_engine):
    assert harness.engine_problem("philox_normal") is None
    cpp_engine._use_isa("portable")
    try:
        assert harness.isa() == "portable"
        assert harness.engine_problem("philox_normal", "bfloat16") == "no AMX (the path is portable)"
    finally:
        cpp_engine._use_isa("")


# ---------------------------------------------------------------------------------------------------------------------
# Table and chart


def test_verdicts(report):
    rows = [make_row("reference", 100.0), make_row("cpp", 40.0), make_row("cpp", 17.0, dtype="bfloat16")]
    lines = report.text(rows).splitlines()
    (float32,) = [line for line in lines if "C=2 N=1, float32: at least 2.5x over reference" in line]
    (bfloat16,) = [line for line in lines if "C=2 N=1, bfloat16: at least 6x over reference" in line]
    assert float32 == "bar  decode_step, step, gym C=2 N=1, float32: at least 2.5x over reference: 2.50x, met"
    assert bfloat16.endswith("at least 6x over reference: 5.88x, NOT MET")
    # Bars of the same op that this run left out show, those of other ops do not.
    assert len([line for line in lines if line.endswith("not run")]) == 2 + 2 * 4
    assert not [line for line in lines if "plan_ascent" in line]


def test_bars_of_bfloat16_without_amx(report):
    rows = [make_row("reference", 100.0, isa="avx2"), make_row("cpp", 50.0, isa="avx2")]
    lines = report.text(rows).splitlines()
    (line,) = [line for line in lines if "C=2 N=1, bfloat16: at least 6x over reference" in line]
    assert line.endswith("not measurable here (no AMX)")


def test_a_bar_against_a_peer(report):
    work = {"op": "window_attention", "mode": "fwd+bwd", "shape": "B=4 T=2000 H=4 d=32 W=64"}
    rows = [
        make_row("sdpa dense", 1000.0, **work),
        make_row("sdpa banded", 90.0, **work),
        make_row("cpp", 50.0, **work),
    ]
    text = report.text(rows)
    assert "at least 15x over sdpa dense: 20.00x, met" in text
    assert "at least 2x over sdpa banded: 1.80x, NOT MET" in text


def test_the_fastest_peer_is_named_beside_the_reference(report):
    rows = [make_row("reference", 100.0), make_row("eager torch", 60.0), make_row("eager torch", 5.0, dtype="bfloat16")]
    rows += [make_row("cpp", 20.0), make_row("cpp", 4.0, dtype="bfloat16")]
    assert report.over_fastest_peer(rows, rows[3]) == 3.0  # float32 against float32
    assert report.over_fastest_peer(rows, rows[4]) == 1.25  # bfloat16 against bfloat16 too
    rows[2] = make_row("eager torch", 80.0, dtype="bfloat16")
    assert report.over_fastest_peer(rows, rows[4]) == 15.0  # whose fastest peer may be in float32
    assert report.over_fastest_peer(rows, rows[1]) is None


def test_the_binding_roof(report):
    row = make_row("cpp", 25.0, items=64, unit="environment steps", peak_mib=1.5)
    # 1e6 FLOP in 25 us of 1e11 a second; 1e5 bytes of 1e10; both would take 10 us. Then twice the bytes.
    assert report.roof(row) == ("FLOP", pytest.approx(0.4)) or report.roof(row) == ("bytes", pytest.approx(0.4))
    assert report.roof(row | {"bytes_per_s": 2 * row["bytes_per_s"]}) == ("bytes", pytest.approx(0.8))
    assert report.roof(row | {"flop_per_s": 2 * row["flop_per_s"]}) == ("FLOP", pytest.approx(0.8))
    assert report.roof(row | {"flop_per_s": "", "bytes_per_s": ""}) is None
    (line,) = [line for line in report.text([row]).splitlines() if line.startswith("decode_step")]
    assert line.split()[-6:] == ["40%", "bytes", "1.5", "2,560,000", "environment", "steps"]


def test_who_was_not_measured_is_told(harness, report):
    case = harness.Case("op", "fwd", "N=1", items=3, unit="steps")
    missing = {**make_row("", 1.0), **harness.missing_row(case, ("peer", "float32"), "not installed: make peers")}
    rows = [make_row("reference", 10.0, op="op", mode="fwd", shape="N=1"), missing]
    assert (missing["rounds"], missing["p50_us"], missing["items"]) == (0, "", "")
    assert report.ratio(rows, missing) is None
    assert report.ratio(rows, rows[0], "peer") is None
    engine = make_row("cpp", 5.0, op="op", mode="fwd", shape="N=1")
    assert report.over_fastest_peer([*rows, engine], engine) == 2.0
    another = missing | {"provider": "other peer", "dtype": "bfloat16"}
    told = report.text([*rows, engine, another])
    assert "  peer float32, other peer bfloat16  not installed: make peers\n" in told
    # Which takes no room from the lines of those that were.
    assert "  reference float32  10 us" in told


def test_thresholds_fail_when_they_should(report, monkeypatch, tmp_path, capsys):
    """Above, below, of a run that left something out, and of one that could not measure it."""
    check = importlib.import_module("check")
    path, table = tmp_path / "speed.csv", tmp_path / "thresholds.toml"
    work = 'op = "decode_step"\nmode = "step"\nshape = "gym C=2 N=1"\n'
    table.write_text(
        f'[[ratio]]\n{work}against = "reference"\nat_least = {{ float32 = 2.0, bfloat16 = 5 }}\n'
        f'[[ratio]]\n{work}against = "eager torch"\nat_least = {{ float32 = 1.5 }}\n'
    )
    harness = importlib.import_module("harness")
    monkeypatch.setattr(sys, "argv", ["check", str(path), "--thresholds", str(table)])
    assert check.main() == 2
    older = {"date": "2026-01-01T00:00:00+00:00"}
    good = [make_row("reference", 100.0), make_row("eager torch", 60.0), make_row("cpp", 30.0)]
    half = make_row("cpp", 15.0, dtype="bfloat16")
    no_amx = half | {"p50_us": "", "rounds": 0, "note": "no AMX (the path is avx2)"}
    # A former run, on two threads or by another peer's time, makes up for nothing.
    others = [make_row("cpp", 10.0, threads=2), make_row("reference", 900.0, **older), make_row("cpp", 1.0, **older)]
    for rows, words in (
        ([*others, *good, half], ["ok", "ok", "ok"]),
        ([*others, *good, no_amx], ["ok", "not measurable", "ok"]),
        ([*good[:2], make_row("cpp", 45.0), half], ["ok", "ok", "BELOW"]),
        ([*good[:2], make_row("cpp", 51.0), half], ["BELOW", "ok", "BELOW"]),
        # By round: the medians of the two were taken at different times.
        ([*good[:2], make_row("cpp", 30.0, speedup=1.9), half], ["BELOW", "ok", "ok"]),
        ([*good[:2], half], ["NOT RUN", "ok", "NOT RUN"]),
        ([good[0], good[2], no_amx | {"note": "gac_fast._C is not installed"}], ["ok", "NOT RUN", "NOT RUN"]),
    ):
        path.unlink(missing_ok=True)
        harness.append_rows(path, rows)
        assert check.main() == (not {"BELOW", "NOT RUN"}.isdisjoint(words))
        found = capsys.readouterr().out.splitlines()
        assert [line[:14].rstrip() for line in found[:-1]] == words
    assert found[-1] == "1 of 3 thresholds hold, 2 DO NOT"
    table.write_text(f"[[ratio]]\n{work}against = 'reference'\nat_lest = {{ float32 = 2.0 }}\n")
    with pytest.raises(ValueError, match=r"expected entries of .*, no at_least"):
        check.main()


def test_gain_of_two_threads_is_held_against_that_of_a_large_product(report):
    two = {"threads": 2, "matmul_flop_per_s": 1.8e11}
    rows = [make_row("cpp", 100.0), make_row("cpp", 61.0, **two), make_row("cpp", 10.0, op="other", **two)]
    assert report.thread_gain(rows, rows[1]) == pytest.approx(100 / 61 / 1.8)
    assert report.thread_gain(rows, rows[0]) is None
    assert report.thread_gain(rows, rows[2]) is None  # one thread was not measured
    assert "2 threads: at least 0.9 of the gain of a large product: 0.91, met" in report.text(rows)
    slower = [rows[0], make_row("cpp", 70.0, **two)]
    assert "a large product: 0.79, NOT MET" in report.text(slower)
    another_run = [make_row("cpp", 100.0, date="2026-01-01T00:00:00+00:00"), rows[1]]
    assert report.thread_gain(another_run, rows[1]) is None


def test_ratios_stay_within_the_last_run_of_a_case(report):
    old = {"date": "2026-01-01T00:00:00+00:00"}
    rows = [make_row("reference", 1000.0, **old), make_row("reference", 100.0), make_row("cpp", 50.0)]
    rows += [make_row("cpp", 1.0, shape="gym C=2 N=8", **old)]
    kept = report.latest(rows)
    assert kept == rows[1:]
    assert report.ratio(kept, rows[2]) == 2.0
    assert report.ratio(kept, rows[3]) is None
    # Peers in float32; the engine beside itself in the same dtype.
    half = make_row("cpp, T=9", 20.0, dtype="bfloat16")
    kept += [half, make_row("cpp, T=1", 10.0, dtype="bfloat16"), make_row("cpp, T=1", 40.0)]
    assert report.ratio(kept, half) == 5.0
    assert report.ratio(kept, half, "cpp, T=1") == 0.5


def test_training_throughput_is_told_beside_the_published_one(report):
    rows = [make_row("reference", 2e6, op="update", mode="3 posterior steps", shape="gym C=2 B=4 T=1000")]
    text = report.text(rows)
    assert "update, gym C=2 B=4 T=1000, reference float32, 1 thread: 2,000 time steps/s" in text
    assert "508 time steps/s" in text


def test_the_runner_is_held_against_other_ways_to_step(report):
    step = {"op": "runner", "mode": "step", "shape": "Hopper-v5 N=64", "dtype": "float64", "threads": 2}
    loop = step | {"mode": "loop", "shape": "gym C=1 Hopper-v5 N=64 T=150"}
    rows = [
        *(make_row(name, time, **step) for name, time in {
            "mujoco.batch": 95.0, "VectorEnv": 100.0, "sync": 140.0, "async": 300.0, "envpool": 110.0,
        }.items()),
        *(make_row(name, time, **loop) for name, time in {
            "mujoco.batch": 80.0, "act": 20.0, "halves": 105.0, "one vector": 125.0,
        }.items()),
    ]  # fmt: skip
    found = [line for line in report.text(rows).splitlines() if ": at least" in line or "over envpool" in line]
    where, loops = "runner, step, Hopper-v5 N=64, 2 threads", "runner, loop, gym C=1 Hopper-v5 N=64 T=150, 2 threads"
    assert [line for line in found if "runner" in line] == [
        f"bar  {loops}, halves: at least 0.9 of 1/(1/step + 1/act): 0.95, met",
        f"     {loops}, one vector: at least 0.9 of 1/(1/step + 1/act): 0.80",
        f"bar  {where}: at least 0.9x over mujoco.batch: 0.95x, met",
        f"bar  {where}: at least 2x over async: 3.00x, met",
        f"bar  {where}: at least 1.5x over sync: 1.40x, NOT MET",
        f"     {where}: 1.10x over envpool",
    ]
    # Without what it is held against there is no verdict.
    assert "of 1/(1/step" not in report.text([row for row in rows if row["provider"] != "act"])


def test_chart(report, tmp_path):
    rows = [make_row("reference", 100.0), make_row("cpp", 40.0), make_row("cpp", 17.0, dtype="bfloat16")]
    path = tmp_path / "speed.png"
    report.plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        report.plot(rows[:1], path)


# ---------------------------------------------------------------------------------------------------------------------
# The cases


def test_the_naive_update_is_that_of_the_reference_where_it_must(harness, monkeypatch):
    """Chains but for their noise, losses and gradients but for dropout and variances; on padded trajectories."""
    bench = importlib.import_module("bench_update")
    from gac_fast.posterior import langevin
    from gac_fast.train import update as module

    monkeypatch.setattr(module, "VARIANCE_WEIGHT", 0.0)
    config = preset("tiny").replace(model={"return_dropout": 0.0})
    one = bench.trainer(config, [12, 5, 1], "float32")
    naive, p = bench.naive(config, [12, 5, 1]), config.posterior
    with ops.backend("reference"):
        parts = module.parts_of(one.model, config)
        trunk = parts.trunk(one.batch)

        def energy(z0: torch.Tensor) -> torch.Tensor:
            return parts.energy(z0, one.batch, trunk.detach())

        z0, _ = langevin(
            energy, naive.z0.clone(), n_steps=p.n_steps, step_size=p.step_size, noise=lambda step: 0 * naive.z0,
            max_drift_ratio=p.max_drift_ratio,
        )  # fmt: skip
        losses = parts.losses(z0, one.batch, trunk)
        losses.loss.backward()
    start = naive.z0.clone()
    naive.move_chains(torch.zeros_like)
    assert float((naive.z0 - start).norm()) > 1e-2
    torch.testing.assert_close(naive.z0, z0, rtol=1e-4, atol=1e-5)
    found = naive.losses()
    expected = losses.loss, losses.action_error, losses.return_error
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=0)
    found[0].backward()
    moved = 0
    for (name, x), y in zip(naive.model.named_parameters(), one.model.parameters(), strict=True):
        if x.grad is not None and float(y.grad.norm()) > 0:
            assert float((x.grad - y.grad).norm() / y.grad.norm()) < 1e-3, name
            moved += 1
        else:  # of the variances, which it has not
            assert y.grad is None or not y.grad.any(), name
    assert moved > 20


def test_every_case_runs_on_toy_sizes(tmp_path, report):
    path = tmp_path / "speed.csv"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--tiny", "--threads", "1", "--csv", str(path), "-q"]
    short = ["--benchmark-max-time=0.001", "--benchmark-min-rounds=1", "--benchmark-quiet", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, *short], cwd=ROOT, env=outside(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = report.read(path)
    measured = {row["op"] for row in rows}
    ops = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert measured == ops
    assert {bar.op for bar in report.BARS} <= measured
    for row in rows:
        assert row["commit"], row["cpu"]
        if row["rounds"] == "0":
            assert row["note"], row
        else:
            assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
    assert "speed against the reference" in result.stdout
    # Peers that this run leaves out, in every case that could have them, and what only a GPU has.
    compiled = [row for row in rows if row["op"] in ("block", "decode_step", "plan_ascent", "window_attention")]
    compiled += [row for row in rows if (row["op"], row["mode"]) == ("update", "3 posterior steps")]
    for case in {report.case_of(row) for row in compiled}:
        of_case = {row["provider"]: row["note"] for row in compiled if report.case_of(row) == case}
        assert all(of_case[name].startswith("left out") for name in ("torch.compile", "torch.compile max-autotune"))
        assert (case[0] in ("block", "window_attention")) or of_case["CUDA graphs"] == "needs CUDA: make gpu"
    assert all(row["note"] in result.stdout for row in rows if row["rounds"] == "0")


def test_a_wrong_thread_count_is_refused(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--threads", "one", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, env=outside(), capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "--threads: expected counts such as 1,2, got 'one'" in result.stdout + result.stderr


PLAIN = """
import pytest
import torch


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_sum(benchmark, name):
    benchmark.extra_info.update(op="sum", mode="fwd", shape="N=1000", dtype="float32", flops=1000, provider=name)
    benchmark(torch.ones(1000).sum)
"""


def test_a_plain_case_of_pytest_benchmark_is_recorded_too(tmp_path, report):
    for name in ("conftest.py", "harness.py", "report.py", "thresholds.toml"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / name)
    (tmp_path / "bench_sum.py").write_text(PLAIN)
    path = tmp_path / "speed.csv"
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-c", str(ROOT / "pyproject.toml"), "--quick", "-q"]
    options = ["--threads", "1,2", "--csv", str(path), "--benchmark-max-time=0.001", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, *options], cwd=ROOT, env=outside(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = report.read(path)
    assert sorted((row["provider"], row["threads"]) for row in rows) == sorted(
        (name, threads) for name in ("reference", "cpp") for threads in ("1", "2")
    )
    assert all(report.ratio(rows, row) for row in rows)
    # One thread and two of a case are neighbours in time.
    assert [row["threads"] for row in rows] == ["1", "2"] * 2


def test_curves_of_fine_tuned_runs_are_gathered(tmp_path, monkeypatch):
    """An acting run and its control: every evaluation, then the last one of ``gac-fast eval``."""
    from benchmarks import collect_online

    runs = []
    for explore, steps in (("on", "100.0"), ("off", "")):
        run = tmp_path / explore
        run.mkdir()
        runs.append(str(run))
        config = {"train": {"seed": 3}, "online": {"explore": explore, "eval_episodes": 64}}
        where = {"git": {"commit": "0123456789abcdef", "dirty": True}, "cores": 2, "cpu": "Some CPU"}
        result: dict[str, object] = {"env_id": "Hopper-v5"}
        if explore == "on":
            last = {"episodes": 100, "return_mean": 9.0, "return_standard_error": 0.5, "predicted_mean": 8.0}
            last |= {"plans": "exploit", "evaluation": 2}
            others = {"return_mean": 7.0, "evaluation": 1}, {"plans": "prior", "evaluation": 3}
            result["evaluations"] = {str(i): last | other for i, other in enumerate(({}, *others))}
        for name, value in (("config", config), ("environment", where), ("result", result)):
            (run / f"{name}.json").write_text(json.dumps(value))
        names = "step,online/env_steps,online/updates,exploit/achieved,exploit/predicted,exploit/standard_error"
        (run / "metrics.csv").write_text(f"{names}\n1,{steps},10.0,,,\n2,{steps},20.0,5.0,4.0,1.0\n")
    table, picture = tmp_path / "curves.csv", tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["collect_online", *runs, "--csv", str(table), "--plot", str(picture)])
    collect_online.main()
    rows = list(csv.DictReader(table.open()))
    assert [(row["kind"], row["env_steps"], row["updates"], row["return"], row["episodes"]) for row in rows] == [
        ("online", "100", "20", "5.0", "64"),
        ("online, end", "100", "20", "9.0", "100"),
        ("control", "0", "20", "5.0", "64"),
    ]
    assert {row["commit"] for row in rows} == {"0123456789ab+dirty"}
    assert picture.stat().st_size > 10_000
