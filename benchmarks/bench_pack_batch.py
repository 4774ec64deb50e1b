"""Speed of drawing 32 trajectories and of packing them, in the sizes of hopper-medium-replay and hopper-medium."""

from __future__ import annotations

import pytest
import torch
from harness import Case, engine_problem, under

from gac_fast import ops

OBS_DIM, ACT_DIM = 11, 3


@pytest.mark.parametrize("mean_length", [200, 1000])
def test_pack_batch(compare, tiny, mean_length):
    n_trajectories, n_drawn = (5, 3) if tiny else (500, 32)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean_length // 2, mean_length * 3 // 2, (n_trajectories,), generator=generator)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    n_steps = int(cu_seqlens[-1])
    observations = torch.randn(n_steps, OBS_DIM, generator=generator)
    actions = torch.randn(n_steps, ACT_DIM, generator=generator)
    indices = torch.randint(0, n_trajectories, (n_drawn,), generator=generator)

    def pack() -> tuple[torch.Tensor, ...]:
        return ops.pack_batch(observations, actions, cu_seqlens, indices)

    problem = engine_problem("pack_batch")
    expected = under("reference", pack)()
    if problem is None:
        assert all(torch.equal(x, y) for x, y in zip(under("cpp", pack)(), expected, strict=True))
    # Trajectories are read once; all of the batch is written.
    n_bytes = sum(x.numel() * x.element_size() for x in (*expected, *expected[:2]))
    case = Case("pack_batch", "fwd", f"{'tiny ' * tiny}B={n_drawn} T~{mean_length}", bytes=n_bytes)
    compare(
        case, {("reference", "float32"): under("reference", pack), ("cpp", "float32"): problem or under("cpp", pack)}
    )


@pytest.mark.parametrize("n_trajectories", [2_000, 100_000])
def test_draw_trajectories(compare, tiny, n_trajectories):
    n, n_drawn = (50, 3) if tiny else (n_trajectories, 32)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 1000, (n,), generator=generator).double()

    def draw() -> torch.Tensor:
        return ops.draw_trajectories(weights, n_drawn, (0, 1), 7)

    problem = engine_problem("pack_batch")
    if problem is None:
        assert torch.equal(under("cpp", draw)(), under("reference", draw)())
    case = Case("pack_batch", "draw", f"{'tiny ' * tiny}{n_drawn} of {n_trajectories}", bytes=8 * (n + n_drawn))
    compare(
        case, {("reference", "float32"): under("reference", draw), ("cpp", "float32"): problem or under("cpp", draw)}
    )
