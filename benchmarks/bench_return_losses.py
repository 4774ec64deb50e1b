"""Speed of the losses of the return models and of all their gradients: dropout, one model or an ensemble of four."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import ROW_BOUND, Case, Providers, engine_problem, row_error, under
from torch import Tensor

from gac_fast import ops
from gac_fast.config import preset
from gac_fast.model import GAC
from gac_fast.reference import ReturnWeights

DROPOUT = 0.3


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("n_members", [1, 4])
def test_return_losses(compare, tiny, mode, n_members):
    size, n = ("tiny", 5) if tiny else ("gym", 64)
    config = preset(size).replace(model={"return_ensemble": n_members}).model
    torch.manual_seed(0)
    model = GAC(config, 1, 1)
    z0, exact_y = torch.randn(n, config.n_z, config.dim), torch.randn(n)
    exact_seen = (torch.arange(n) % 8 > 0) / n

    def prepare(dtype: str, backend: str, dropout: float) -> tuple[Callable[[], object], list[Tensor]]:
        """The timed call, and the losses and gradients of one pass."""
        of = getattr(torch, dtype)
        leaves = [w.detach().to(of, copy=True).requires_grad_() for w in model.returns.weights()]
        z = z0.to(of, copy=True).requires_grad_()
        y, seen = exact_y.to(of), exact_seen.to(of)

        def forward() -> Tensor:
            mean, variance = ops.return_losses(ReturnWeights(*leaves), z, y, seen, 1 / n - seen, dropout=dropout)
            return mean + 0.1 * variance

        loss = under(backend, forward)()

        def backward(loss: Tensor = loss) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss, [z, *leaves], retain_graph=True)

        calls = {"fwd": forward, "bwd": backward, "fwd+bwd": lambda: backward(forward())}
        return under(backend, calls[mode]), [loss.detach()[None], *under(backend, backward)()]

    _, expected = prepare("float64", "reference", 0.0)
    providers: Providers = {}
    for name in ("reference", "cpp"):
        problem = engine_problem("return_losses") if name == "cpp" else None
        if problem is not None:
            providers[name, "float32"] = problem
            continue
        # float64 would draw other masks: held without dropout, timed with it.
        for x, right in zip(prepare("float32", name, 0.0)[1], expected, strict=True):
            assert row_error(x.flatten(), right.flatten()) < ROW_BOUND["float32"], name
        providers[name, "float32"], _ = prepare("float32", name, DROPOUT)

    d, h = config.n_z * config.dim, config.return_hidden
    weights = n_members * (d * h + h * h + 2 * h)
    # Forward with dropout and once more without; backwards of both, data gradients of the first alone.
    passes = {"fwd": 2, "bwd": 3, "fwd+bwd": 5}[mode]
    n_bytes = 4.0 * weights * (1 if mode == "fwd" else 2)
    shape = f"{size} E={n_members} P={n} dropout={DROPOUT:g}"
    compare(Case("return_losses", mode, shape, 2.0 * passes * weights * n, n_bytes), providers)
