"""pack_batch: both engines against a loop over episodes, and their errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from gac_fast import ops

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


def packed_by_hand(observations, actions, cu_seqlens, indices) -> tuple[Tensor, Tensor, Tensor]:
    spans = [slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1])) for i in indices.tolist()]
    lengths = torch.tensor([0] + [span.stop - span.start for span in spans])
    none = slice(0, 0)
    return (
        torch.cat([observations[span] for span in [none, *spans]]),
        torch.cat([actions[span] for span in [none, *spans]]),
        lengths.cumsum(0).to(torch.int32),
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
    batch, _, _ = ops.pack_batch(observations, actions, cu_seqlens, torch.tensor([0]))
    before = observations.clone()
    batch.zero_()
    assert torch.equal(observations, before)


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
    ):
        with pytest.raises(ValueError, match=message):
            cpp_engine._pack_batch(**{**good, **bad})
    cpp_engine._pack_batch(**good)


def test_binding_keeps_no_reference_to_its_arrays(cpp_engine, storage):
    cu_seqlens, indices = storage[2].numpy(), torch.tensor([0, 2]).numpy()
    before = sys.getrefcount(cu_seqlens)
    assert cpp_engine._packed_length(cu_seqlens, indices, 25) == LENGTHS[0] + LENGTHS[2]
    assert sys.getrefcount(cu_seqlens) == before
