"""Speed of clipping and one step of AdamW on all parameters of a model, beside torch's own, fused and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import ROW_BOUND, Case, Providers, engine_problem, row_error, under
from torch import Tensor

from gac_fast import ops
from gac_fast.config import preset
from gac_fast.model import GAC

OPTIONS = {"learning_rate": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "max_norm": 1.0}
DECAY = 0.01


def lists(shapes: list[torch.Size], dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """Parameters after a few steps, the same in either dtype; their gradients are long enough to be clipped."""
    g = torch.Generator().manual_seed(0)
    values, gradients, first = ([torch.randn(s, generator=g) for s in shapes] for _ in range(3))
    second = [torch.rand(s, generator=g) for s in shapes]
    found = {"values": values, "gradients": gradients, "first": first, "second": second}
    return {
        **{name: [x.to(dtype) for x in one] for name, one in found.items()},
        "steps": [torch.tensor(3.0) for _ in shapes],
    }


def by_torch(moved: dict[str, list[Tensor]], fused: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(
        moved["values"], lr=OPTIONS["learning_rate"], betas=OPTIONS["betas"], weight_decay=DECAY, fused=fused
    )
    for x, g, m, v, step in zip(*moved.values(), strict=True):
        x.grad = g
        optimizer.state[x] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(moved["values"], OPTIONS["max_norm"])
        optimizer.step()

    return step


@pytest.mark.parametrize("size", ["gym"])
def test_adamw(compare, tiny, size):
    size = "tiny" if tiny else size
    shapes = [p.shape for p in GAC(preset(size).model, 11, 3).parameters()]
    n = sum(shape.numel() for shape in shapes)
    decays = [DECAY] * len(shapes)

    def prepare(name: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], object], dict[str, list[Tensor]]]:
        moved = lists(shapes, dtype)
        if name.startswith("torch"):
            return by_torch(moved, fused="fused" in name), moved
        kept: dict[str, Any] = {}
        return under(name, lambda: ops.adamw(**moved, decays=decays, kept=kept, **OPTIONS)), moved

    run, expected = prepare("reference", torch.float64)
    run()
    providers: Providers = {}
    for name in ("torch", "torch fused", "reference", "cpp"):
        problem = engine_problem("adamw") if name == "cpp" else None
        if problem is not None:
            providers[name, "float32"] = problem
            continue
        run, moved = prepare(name)
        run()
        for what in ("values", "first", "second"):
            for x, right in zip(moved[what], expected[what], strict=True):
                assert row_error(x.flatten(), right.flatten()) < ROW_BOUND["float32"], f"{name} {what}"
        # The steps that follow find clipped gradients: they are those of a training that clips seldom.
        providers[name, "float32"] = run

    # The norm reads gradients; the step reads four lists and writes three.
    case = Case("adamw", "step", f"{size} {n} parameters", bytes=4.0 * 8 * n)
    compare(case, providers)
