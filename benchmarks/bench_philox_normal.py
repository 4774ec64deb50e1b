"""Speed of counter-based noise, in normals per second; `torch.randn` beside it is another generator, as a yardstick."""

from __future__ import annotations

import pytest
import torch

from gac_fast import ops, reference

SEED = (1, 2)
SIZES = [(1, 512), (64, 512), (1024, 512)]


@pytest.mark.parametrize(("n_plans", "n"), SIZES)
def test_philox_normal(benchmark, cpu_backend, n_plans, n):
    plans = torch.arange(n_plans)
    out = torch.empty(n_plans, n)
    ops.philox_normal(SEED, plans, 3, n, out=out)
    torch.testing.assert_close(out, reference.philox_normal(SEED, plans, 3, n), rtol=0, atol=1e-6)

    benchmark.extra_info["normals"] = out.numel()
    benchmark(ops.philox_normal, SEED, plans, 3, n, out=out)


@pytest.mark.parametrize(("n_plans", "n"), SIZES)
def test_torch_randn(benchmark, n_plans, n):
    out = torch.empty(n_plans, n)
    benchmark.extra_info["normals"] = out.numel()
    benchmark(torch.randn, n_plans, n, out=out)
