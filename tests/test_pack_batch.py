"""Packing against a loop over episodes, draws against the laws they should follow; both engines and their errors."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gac_fast import ops, reference

LENGTHS = [5, 1, 12, 0, 7]


@pytest.fixture(params=["reference", "cpp"])
def on_backend(request):
    if request.param == "cpp":
        request.getfixturevalue("cpp_engine")
    with ops.backend(request.param):
        yield request.param


@pytest.fixture
def storage() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    n = int(cu_seqlens[-1])
    return torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator), cu_seqlens


def packed_by_hand(observations, actions, cu_seqlens, indices) -> tuple[Tensor, ...]:
    spans = [slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1])) for i in indices.tolist()]
    lengths = torch.tensor([0] + [span.stop - span.start for span in spans])
    none = slice(0, 0)
    return (
        torch.cat([observations[span] for span in [none, *spans]]),
        torch.cat([actions[span] for span in [none, *spans]]),
        lengths.cumsum(0).to(torch.int32),
        torch.tensor([t for length in lengths.tolist() for t in range(length)], dtype=torch.int64),
        torch.tensor([i for i, length in enumerate(lengths[1:].tolist()) for _ in range(length)], dtype=torch.int64),
    )


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("indices", [[2], [4, 0, 4, 2], [3], [3, 1, 3], []], ids=str)
def test_equals_a_loop_over_episodes(on_backend, storage, indices):
    indices = torch.tensor(indices, dtype=torch.int64)
    batch = ops.pack_batch(*storage, indices)
    for actual, expected in zip(batch, packed_by_hand(*storage, indices), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert ops.dispatch_counts() == {("pack_batch", on_backend): 1}


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize(
    "view",
    [
        lambda obs: torch.nn.functional.pad(obs, (1, 2))[:, 1:4],
        lambda obs: obs.t().contiguous().t(),
        lambda obs: torch.stack((obs, -obs), dim=1).flatten(0, 1)[::2],
    ],
    ids=["padded rows", "column-major", "every second row"],
)
def test_reads_strided_storage(storage, view):
    observations, actions, cu_seqlens = storage
    indices = torch.tensor([[0, 9], [2, 9], [4, 9]])[:, 0]
    strided = view(observations)
    assert torch.equal(strided, observations)
    batch = ops.pack_batch(strided, actions, cu_seqlens, indices)
    for actual, expected in zip(batch, packed_by_hand(*storage, indices), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("on_backend")
def test_batch_is_a_copy(storage):
    observations, actions, cu_seqlens = storage
    batch = ops.pack_batch(observations, actions, cu_seqlens, torch.tensor([0]))
    before = observations.clone()
    batch.observations.zero_()
    assert torch.equal(observations, before)


@pytest.mark.usefixtures("on_backend")
def test_fills_given_tensors_and_refuses_others(storage):
    indices = torch.tensor([2, 0])
    expected = ops.pack_batch(*storage, indices)
    out = ops.PackedBatch(*(torch.zeros_like(x) for x in expected))
    assert ops.pack_batch(*storage, indices, out=out) is out
    assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))
    for field, bad, message in (
        ("positions", out.positions[1:], r"out.positions: expected shape \[17\], got \[16\]"),
        ("observations", out.observations.double(), "out.observations: expected dtype float32, got float64"),
        ("actions", torch.zeros(17, 4)[:, ::2], r"out.actions: expected a contiguous tensor, got strides \[4, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.pack_batch(*storage, indices, out=out._replace(**{field: bad}))


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": torch.tensor([0, 5])}, r"indices: expected values within \[0, 5\), got 5 at position 1"),
        ({"indices": torch.tensor([-1])}, r"indices: expected values within \[0, 5\), got -1 at position 0"),
        ({"indices": torch.tensor([0], dtype=torch.int32)}, "indices: expected dtype int64, got int32"),
        ({"indices": torch.tensor(0)}, r"indices: expected shape \[b\], got \[\]"),
        (
            {"observations": torch.zeros(25, 3, dtype=torch.float64)},
            "observations: expected dtype float32, got float64",
        ),
        ({"observations": torch.zeros(25)}, r"observations: expected shape \[N, obs_dim\], got \[25\]"),
        ({"actions": torch.zeros(24, 2)}, r"actions: expected shape \[25, act_dim\], got \[24, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens: expected dtype int64, got int32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_named(storage, arguments, message):
    observations, actions, cu_seqlens = storage
    good = {
        "observations": observations,
        "actions": actions,
        "cu_seqlens": cu_seqlens,
        "indices": torch.tensor([0]),
    }
    with pytest.raises(ValueError, match=message):
        ops.pack_batch(**{**good, **arguments})


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5, 3], r"cu_seqlens: expected offsets that rise within \[0, 25\], got 5 to 3 for trajectory 1"),
        ([0, 5, 26], r"cu_seqlens: expected offsets that rise within \[0, 25\], got 5 to 26 for trajectory 1"),
        ([0, -1, 5], r"cu_seqlens: expected offsets that rise within \[0, 25\], got -1 to 5 for trajectory 1"),
    ],
    ids=["falling", "past the end", "negative"],
)
def test_cpp_never_reads_outside_the_storage(storage, offsets, message):
    observations, actions, _ = storage
    with ops.backend("cpp"), pytest.raises(ValueError, match=message):
        ops.pack_batch(observations, actions, torch.tensor(offsets), torch.tensor([1]))


def test_binding_checks_arrays_by_itself(cpp_engine, storage):
    """The boundary to C++ holds without the checks of the public function in front of it."""
    observations, actions, cu_seqlens = (x.numpy() for x in storage)
    indices = torch.tensor([0]).numpy()
    outputs = {
        "out_observations": torch.empty(5, 3).numpy(),
        "out_actions": torch.empty(5, 2).numpy(),
        "out_cu_seqlens": torch.empty(2, dtype=torch.int32).numpy(),
        "out_positions": torch.empty(5, dtype=torch.int64).numpy(),
        "out_sequence": torch.empty(5, dtype=torch.int64).numpy(),
    }
    good = {
        "observations": observations,
        "actions": actions,
        "cu_seqlens": cu_seqlens,
        "indices": indices,
        **outputs,
    }
    read_only = outputs["out_actions"].copy()
    read_only.flags.writeable = False
    for bad, message in (
        ({"observations": observations.astype("float64")}, "observations: expected dtype float32, got float64"),
        (
            {"observations": observations[:, ::2]},
            "observations: expected rows of neighbouring elements, got an element",
        ),
        ({"actions": actions[1:]}, r"actions: expected shape \(25, \*\), got \(24, 2\)"),
        (
            {"out_observations": outputs["out_observations"][1:]},
            r"out_observations: expected shape \(5, 3\), got \(4, 3\)",
        ),
        ({"out_actions": read_only}, "out_actions: expected a writeable array, got a read-only one"),
        ({"out_cu_seqlens": indices}, "out_cu_seqlens: expected dtype int32, got int64"),
        ({"out_positions": outputs["out_positions"][1:]}, r"out_positions: expected shape \(5\), got \(4\)"),
        (
            {"out_sequence": torch.empty(10, dtype=torch.int64).numpy()[::2]},
            "out_sequence: expected neighbouring elements, got an element stride of 16 bytes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cpp_engine._pack_batch(**{**good, **bad})
    cpp_engine._pack_batch(**good)


def test_binding_keeps_no_reference_to_its_arrays(cpp_engine, storage):
    cu_seqlens, indices = storage[2].numpy(), torch.tensor([0, 2]).numpy()
    before = sys.getrefcount(cu_seqlens)
    assert cpp_engine._packed_length(cu_seqlens, indices, 25) == LENGTHS[0] + LENGTHS[2]
    assert sys.getrefcount(cu_seqlens) == before


# ---------------------------------------------------------------------------------------------------------------------
# Draws

SEED = (7, 0x42415443)
NUMBERS = [0, 1, 2**32 - 1, 2**32, 2**63 - 1]


def some_weights(b: int) -> Tensor:
    """Over thirty powers of ten, every third zero."""
    generator = torch.Generator().manual_seed(b)
    weights = 10.0 ** (30 * torch.rand(b, generator=generator, dtype=torch.float64) - 15)
    weights[2::3] = 0
    return weights


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize(("b", "n"), [(1, 1), (2, 2), (7, 3), (1000, 1), (1000, 32), (1000, 667), (20_000, 500)])
def test_cpp_draws_are_bit_equal_to_the_reference(b, n):
    weights = some_weights(b)
    for number in NUMBERS:
        with ops.backend("cpp"):
            ids = ops.draw_trajectories(weights, n, SEED, number)
        assert torch.equal(ids, reference.draw_trajectories(weights, n, SEED, number))
        assert len(set(ids.tolist())) == n
        assert bool((weights[ids] > 0).all())
    assert ops.dispatch_counts() == {("pack_batch", "cpp"): len(NUMBERS)}


@pytest.mark.usefixtures("cpp_engine")
def test_cpp_orders_equal_arrivals_as_the_reference_does():
    """The smallest weights arrive at infinity, all at once."""
    weights = torch.full((40,), 5e-324, dtype=torch.float64)
    weights[30:] = 1.0
    for number in range(20):
        with ops.backend("cpp"):
            ids = ops.draw_trajectories(weights, 20, SEED, number)
        assert torch.equal(ids, reference.draw_trajectories(weights, 20, SEED, number))
        assert set(range(30, 40)) < set(ids.tolist())


def test_the_references_logarithm_is_one():
    generator = torch.Generator().manual_seed(0)
    u = torch.cat(
        (
            torch.rand(10_000, generator=generator, dtype=torch.float64).clamp_min(2.0**-53),
            1 - 2.0 ** -torch.arange(2, 53).double(),
            2.0 ** -torch.arange(1, 54).double(),
        )
    )
    exact = torch.tensor([-math.log(x) for x in u.tolist()], dtype=torch.float64)
    assert float(((reference._minus_log(u) - exact) / exact).abs().max()) < 1e-15


@pytest.mark.parametrize("n", [1, 2, 3])
def test_sets_are_drawn_as_one_by_one_without_replacement(on_backend, n):
    weights = torch.tensor([1.0, 4.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    n_draws = 4000 if on_backend == "cpp" else 1000
    counts = Counter(tuple(sorted(ops.draw_trajectories(weights, n, SEED, i).tolist())) for i in range(n_draws))
    expected: dict[tuple[int, ...], float] = Counter()
    for order in itertools.permutations([0, 1, 3, 4], n):
        p, left = 1.0, float(weights.sum())
        for i in order:
            p, left = p * float(weights[i]) / left, left - float(weights[i])
        expected[tuple(sorted(order))] += p
    assert counts.keys() <= expected.keys()
    chi_square = sum((counts[s] - n_draws * p) ** 2 / (n_draws * p) for s, p in expected.items())
    # Its mean is the degrees of freedom; six standard deviations.
    freedom = len(expected) - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


def test_the_order_says_nothing_of_the_weight(on_backend):
    weights = torch.tensor([10.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    n_draws = 2000 if on_backend == "cpp" else 500
    places = torch.stack([ops.draw_trajectories(weights, 4, SEED, i) for i in range(n_draws)]).argsort(1)
    share = 1 / 4
    counts = torch.stack([(places[:, 0] == place).sum() for place in range(4)]) / n_draws
    assert bool(((counts - share).abs() < 5 * math.sqrt(share * (1 - share) / n_draws)).all())


@pytest.mark.usefixtures("on_backend")
def test_draws_depend_on_seed_number_and_weights_alone():
    weights = torch.arange(1, 1001, dtype=torch.float64)
    strided = torch.stack((weights, -weights), dim=1)[:, 0]
    ids = ops.draw_trajectories(weights, 32, SEED, 5)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(ops.draw_trajectories(strided, 32, SEED, 5), ids)
    finally:
        torch.set_num_threads(threads)
    # Common factors do not matter, as exact powers of two not even in the last bit.
    assert torch.equal(ops.draw_trajectories(8 * weights, 32, SEED, 5), ids)
    for seed, number in (((8, SEED[1]), 5), ((SEED[0], SEED[1] ^ 1), 5), (SEED, 6), (SEED, 5 + 2**32)):
        assert not torch.equal(ops.draw_trajectories(weights, 32, seed, number), ids)


@pytest.mark.usefixtures("on_backend")
def test_nothing_drawn():
    assert ops.draw_trajectories(torch.zeros(3, dtype=torch.float64), 0, SEED, 0).shape == (0,)
    assert ops.draw_trajectories(torch.zeros(0, dtype=torch.float64), 0, SEED, 0).shape == (0,)
    assert ops.drop_steps(0, 0.5, SEED, 0).shape == (0,)


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 3}, r"n: expected at most the 2 trajectories of positive weight, got 3"),
        ({"n": 5}, r"n: expected 0 to 4 trajectories, got 5"),
        ({"n": -1}, r"n: expected 0 to 4 trajectories, got -1"),
        ({"weights": [1.0, -2.0, 1.0]}, r"weights: expected finite values of at least 0, got -2.0+ at position 1"),
        ({"weights": [1.0, 2.0, math.nan]}, r"weights: expected finite values of at least 0, got nan at position 2"),
        ({"weights": [math.inf, 2.0]}, r"weights: expected finite values of at least 0, got inf at position 0"),
        ({"weights": [[1.0]]}, r"weights: expected shape \[B\], got \[1, 1\]"),
        ({"seed": (1, 1 << 32)}, r"seed: expected two words within \[0, 2\^32\), got \(1, 4294967296\)"),
        ({"number": -1}, r"number: expected a value within \[0, 2\^63\), got -1"),
        ({"number": 1 << 63}, r"number: expected a value within \[0, 2\^63\), got 9223372036854775808"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_draw_are_named(arguments, message):
    good = {"weights": [1.0, 0.0, 2.0, 0.0], "n": 1, "seed": SEED, "number": 0}
    arguments = {**good, **arguments}
    arguments["weights"] = torch.tensor(arguments["weights"], dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        ops.draw_trajectories(**arguments)


@pytest.mark.usefixtures("on_backend")
def test_weights_are_float64():
    with pytest.raises(ValueError, match="weights: expected dtype float64, got float32"):
        ops.draw_trajectories(torch.ones(3), 1, SEED, 0)


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize("n", [1, 3, 4, 77, 1024])
def test_cpp_drops_the_same_steps_as_the_reference(n):
    for number, share in itertools.product(NUMBERS, (0.0, 0.3, 1.0)):
        with ops.backend("cpp"):
            dropped = ops.drop_steps(n, share, SEED, number)
        assert torch.equal(dropped, reference.drop_steps(n, share, SEED, number))
        assert share == 0.3 or bool((dropped == (share == 1.0)).all())


@pytest.mark.usefixtures("on_backend")
def test_steps_are_dropped_at_their_rate_independently():
    n, share = 20_000, 0.3
    x = ops.drop_steps(n, share, SEED, 3).double() - share
    variance = share * (1 - share)
    assert abs(float(x.mean())) < 5 * math.sqrt(variance / n)
    for lag in (1, 2, 3, 4):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 * variance / math.sqrt(n)
    out = torch.zeros(n, dtype=torch.bool)
    assert ops.drop_steps(n, share, SEED, 3, out=out) is out
    assert torch.equal(out.double() - share, x)
    assert not torch.equal(ops.drop_steps(n, share, SEED, 4), out)


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "n: expected at least 0, got -1"),
        ({"share": 1.5}, r"share: expected a value within \[0, 1\], got 1.5"),
        ({"share": math.nan}, r"share: expected a value within \[0, 1\], got nan"),
        ({"number": -1}, "number: expected a value within"),
        ({"out": torch.zeros(5)}, "out: expected dtype bool, got float32"),
        ({"out": torch.zeros(4, dtype=torch.bool)}, r"out: expected shape \[5\], got \[4\]"),
        ({"out": torch.zeros(10, dtype=torch.bool)[::2]}, r"out: expected a contiguous tensor, got strides \[2\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_of_dropping_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.drop_steps(**{"n": 5, "share": 0.5, "seed": SEED, "number": 0, **arguments})


def test_binding_of_draws_checks_by_itself(cpp_engine):
    weights, ids = np.ones(4), np.zeros(2, np.int64)
    read_only = ids.copy()
    read_only.flags.writeable = False
    for weights_in, out, message in (
        (weights.astype(np.float32), ids, "weights: expected dtype float64, got float32"),
        (weights[None], ids, r"weights: expected shape \(\*\), got \(1, 4\)"),
        (weights, ids.astype(np.int32), "out: expected dtype int64, got int32"),
        (weights, read_only, "out: expected a writeable array, got a read-only one"),
        (weights, np.zeros(4, np.int64)[::-2], "out: expected neighbouring elements, got an element stride of -16"),
        (weights, np.zeros(5, np.int64), "n: expected at most the 4 trajectories of positive weight, got 5"),
        (weights * np.nan, ids, "weights: expected finite values of at least 0, got -?nan at position 0"),
        (weights[:0], ids, "n: expected at most the 0 trajectories"),
    ):
        with pytest.raises(ValueError, match=message):
            cpp_engine._draw_trajectories(0, 0, 0, weights_in, out)
    for threshold, out, message in (
        (2**32 + 1, np.zeros(3, np.bool_), r"threshold: expected at most 2\^32, got 4294967297"),
        (1, np.zeros(3, np.uint8), "out: expected dtype bool, got uint8"),
        (1, np.zeros((3, 1), np.bool_), r"out: expected shape \(\*\), got \(3, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cpp_engine._drop_steps(0, 0, 0, threshold, out)
    with pytest.raises(TypeError):
        cpp_engine._draw_trajectories(0, 0, -1, weights, ids)
    with pytest.raises(TypeError):
        cpp_engine._drop_steps(2**32, 0, 0, 1, np.zeros(3, np.bool_))


vectors = st.builds(
    lambda values, dtype, step: np.array(values, dtype)[::step],
    st.lists(st.integers(-3, 9), max_size=6),
    st.sampled_from([np.int64, np.int64, np.int64, np.int32, np.float64, np.float32]),
    st.sampled_from([1, 1, 2, -1]),
)
matrices = st.builds(
    lambda rows, columns, dtype, transpose: (lambda x: x.T if transpose else x)(np.ones((rows, columns), dtype)),
    st.integers(0, 6),
    st.integers(0, 3),
    st.sampled_from([np.float32, np.float32, np.float64]),
    st.booleans(),
)


@given(
    arrays=st.tuples(matrices, matrices, vectors, vectors, matrices, matrices, vectors, vectors, vectors),
    weights=st.lists(st.floats(), max_size=5),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_binding_survives_anything(cpp_engine, arrays, weights):
    # Whatever comes in: done, or an exception that names an argument.
    with contextlib.suppress(ValueError):
        cpp_engine._pack_batch(*arrays)
    with contextlib.suppress(ValueError):
        assert cpp_engine._packed_length(arrays[2], arrays[3], 9) >= 0
    with contextlib.suppress(ValueError):
        cpp_engine._draw_trajectories(1, 2, 3, np.array(weights, np.float64), arrays[7])


def test_offsets_beyond_all_bounds_do_not_wrap_around(cpp_engine):
    cu_seqlens = np.array([0, 5, 2**63 - 1])
    message = r"indices: expected a batch of fewer than 2\^31 time steps, got more up to position 1"
    with pytest.raises(ValueError, match=message):
        cpp_engine._packed_length(cu_seqlens, np.array([0, 1, 1]), 2**63 - 1)
