"""Speed of packing 32 trajectories of the sizes of hopper-medium-replay (about 200 steps) and hopper-medium (1,000)."""

from __future__ import annotations

import pytest
import torch

from gac_fast import ops, reference

OBS_DIM, ACT_DIM, N_TRAJECTORIES, BATCH = 11, 3, 500, 32


@pytest.mark.parametrize("mean_length", [200, 1000])
def test_pack_batch(benchmark, cpu_backend, mean_length):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean_length // 2, mean_length * 3 // 2, (N_TRAJECTORIES,), generator=generator)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    n_steps = int(cu_seqlens[-1])
    observations = torch.randn(n_steps, OBS_DIM, generator=generator)
    actions = torch.randn(n_steps, ACT_DIM, generator=generator)
    indices = torch.randint(0, N_TRAJECTORIES, (BATCH,), generator=generator)
    batch = ops.pack_batch(observations, actions, cu_seqlens, indices)
    expected = reference.pack_batch(observations, actions, cu_seqlens, indices)
    assert all(torch.equal(x, y) for x, y in zip(batch, expected, strict=True))

    benchmark.extra_info["bytes"] = sum(x.numel() * x.element_size() for x in batch)
    benchmark(ops.pack_batch, observations, actions, cu_seqlens, indices)
