"""Speed of the mean squared errors of mean actions, and of their gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import ROW_BOUND, Case, Providers, engine_problem, row_error, under
from torch import Tensor

from gac_fast import ops


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_action_errors(compare, tiny, mode):
    n, act_dim = (40, 3) if tiny else (64_000, 6)  # a batch of 64 episodes of halfcheetah
    torch.manual_seed(0)
    exact_y = torch.randn(n, act_dim).bfloat16().double()
    exact_actions, exact_grad = 2 * torch.rand(n, act_dim).double() - 1, torch.rand(act_dim).double()

    def prepare(dtype: str, backend: str) -> tuple[Callable[[], object], list[Tensor]]:
        """The timed call, and errors and gradient of one pass."""
        y = exact_y.to(getattr(torch, dtype), copy=True).requires_grad_()
        actions, grad = (x.to(torch.promote_types(y.dtype, torch.float32)) for x in (exact_actions, exact_grad))

        def forward() -> Tensor:
            return ops.action_errors(y, actions)

        errors = under(backend, forward)()

        def backward(errors: Tensor = errors) -> tuple[Tensor, ...]:
            return torch.autograd.grad(errors, y, grad, retain_graph=True)

        calls = {"fwd": forward, "bwd": backward, "fwd+bwd": lambda: backward(forward())}
        return under(backend, calls[mode]), [errors.detach(), *under(backend, backward)()]

    _, expected = prepare("float64", "reference")
    providers: Providers = {}
    for name in ("reference", "cpp"):
        for dtype in ("float32", "bfloat16"):
            # Of the engine any path takes y in bfloat16: there is no product in it.
            problem = engine_problem("action_errors") if name == "cpp" else None
            if problem is not None:
                providers[name, dtype] = problem
                continue
            providers[name, dtype], results = prepare(dtype, name)
            for what, x, right in zip(("errors", "dy"), results, expected, strict=True):
                error = row_error(x.flatten(), right.flatten())
                assert error < ROW_BOUND[dtype], f"{name} {dtype} {what}: {error:.2e}"

    # y read, dy written, in the row's dtype; actions in float32.
    ys, actions = {"fwd": (1, 1), "bwd": (2, 1), "fwd+bwd": (3, 2)}[mode]
    n_bytes = {"float32": 4.0 * (ys + actions) * n * act_dim, "bfloat16": (2.0 * ys + 4.0 * actions) * n * act_dim}
    compare(Case("action_errors", mode, f"{'tiny ' * tiny}n={n} A={act_dim}", bytes=n_bytes), providers)
