"""Speed of counter-based noise; ``torch.randn`` beside it is another generator, as a yardstick."""

from __future__ import annotations

import pytest
import torch
from harness import Case, engine_problem, under

from gac_fast import ops, reference

SEED = (1, 2)


@pytest.mark.parametrize(("n_plans", "n"), [(1, 512), (64, 512), (1024, 512)])
def test_philox_normal(compare, tiny, n_plans, n):
    if tiny:
        n_plans, n = min(n_plans, 4), 16
    plans = torch.arange(n_plans)
    out = torch.empty(n_plans, n)

    def draw() -> torch.Tensor:
        return ops.philox_normal(SEED, plans, 3, n, out=out)

    problem = engine_problem("philox_normal")
    if problem is None:
        expected = reference.philox_normal(SEED, plans, 3, n)
        torch.testing.assert_close(under("cpp", draw)(), expected, rtol=0, atol=1e-6)
    case = Case("philox_normal", "fwd", f"{'tiny ' * tiny}P={n_plans} n={n}", bytes=4.0 * out.numel())
    providers = {
        ("torch.randn", "float32"): lambda: torch.randn(n_plans, n, out=out),
        ("reference", "float32"): under("reference", draw),
        ("cpp", "float32"): problem or under("cpp", draw),
    }
    compare(case, providers)
