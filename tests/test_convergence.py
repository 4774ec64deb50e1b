"""A tiny GAC trained by the reference and by every engine: losses, parameters and chains agree within stated bounds."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT
from model_fixtures import ACT_DIM, OBS_DIM, make_model
from torch import Tensor

from gac_fast import ops
from gac_fast.config import Config, ModelConfig, PosteriorConfig, TrainConfig
from gac_fast.model import Batch
from gac_fast.ops import _dispatch
from gac_fast.posterior import PosteriorState
from gac_fast.train.update import learning_rate, make_optimizer, set_learning_rate, update

N_UPDATES = 50
# As much as the interpreter does in half a minute, updates and posterior steps; all of it in the slow tests.
INTERPRETED = {"n_updates": 2, "n_posterior": 1}

LENGTHS = ([7, 12, 1, 9], [9, 3, 14], [20, 5, 1, 2])

# Of losses: the largest difference over the largest loss. Of parameters: the norm of the difference over the norm of
# what training changed; of chains, over their own. Measured between reference and C++ engine: 1e-7 and 3e-5 in float32;
# 1e-3 and 2e-2 in bfloat16, where Adam's first steps, which are the signs of gradients, show the rounding.
BOUNDS = {"float32": (2e-6, 5e-4), "bfloat16": (1e-2, 0.1)}


class Trained(NamedTuple):
    losses: Tensor  # [updates, 4]
    before: Tensor  # all parameters
    after: Tensor
    names: list[str]  # of parameters that stayed as they were
    chains: Tensor
    counts: dict[tuple[str, str], int]


def batches(device: str) -> list[tuple[Batch, Tensor]]:
    """Trajectories that each follow a hidden goal, which the return tells; the last chain of a batch sees tau alone."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for lengths in LENGTHS:
        b, steps = len(lengths), torch.tensor(lengths)
        n = int(steps.sum())
        cu = torch.nn.functional.pad(steps.cumsum(0), (1, 0))
        sequence = torch.arange(b).repeat_interleave(steps)
        goal = 2 * torch.rand(b, ACT_DIM, generator=generator) - 1
        noise = 0.05 * torch.randn(n, ACT_DIM, generator=generator)
        seen = torch.arange(b) < b - 1
        batch = Batch(
            torch.randn(n, OBS_DIM, generator=generator), (0.8 * goal[sequence] + noise).clamp(-1, 1),
            cu.to(torch.int32), torch.arange(n) - cu[sequence], sequence, 2 * goal[:, 0], seen,
            torch.ones(b, dtype=torch.bool),
        )  # fmt: skip
        rows = torch.arange(b) + 4 * ~seen
        found.append((Batch(*(None if x is None else x.to(device) for x in batch)), rows.to(device)))
    return found


def train(
    engine: str, dtype: str, context: str, device: str = "cpu", n_updates: int = N_UPDATES, n_posterior: int = 3
) -> Trained:
    model_config = ModelConfig(
        dim=64, n_layers=2, n_heads=2, window=4, mlp_ratio=2, n_z=2, context=context, prior_hidden=16,
        return_hidden=16, return_dropout=0.0, return_ensemble=2,
    )  # fmt: skip
    config = Config(
        model_config, PosteriorConfig(n_steps=n_posterior),
        train=TrainConfig(learning_rate=1e-3, warmup=5, n_updates=N_UPDATES),
    )  # fmt: skip
    model = make_model(model_config).to(device)
    model.bf16 = dtype == "bfloat16"
    optimizer = make_optimizer(model, config.train)
    posterior = PosteriorState(config.posterior, 4, 2, 64, 0, torch.device(device))
    flat = torch.nn.utils.parameters_to_vector
    before, one_by_one = flat(model.parameters()).detach().clone(), [p.detach().clone() for p in model.parameters()]
    ops.reset_dispatch_counts()
    losses, data = [], batches(device)
    with only(engine):
        for number in range(n_updates):
            set_learning_rate(optimizer, learning_rate(number, config.train))
            values = update(model, optimizer, posterior, *data[number % len(data)], config)
            losses.append(torch.stack([values[name] for name in ("loss", "action_error", "return_error", "grad_norm")]))
    still = [
        name
        for (name, p), old in zip(model.named_parameters(), one_by_one, strict=True)
        if torch.equal(p.detach(), old)
    ]
    after = flat(model.parameters()).detach()
    return Trained(torch.stack(losses), before, after, still, posterior.z0.clone(), ops.dispatch_counts())


@contextlib.contextmanager
def only(engine: str) -> Iterator[None]:
    """Forces an engine onto all ops that have it; the others run on the reference."""
    select = _dispatch._select

    def chosen(op: str, *rest: Any) -> str:
        with ops.backend(engine if engine in _dispatch._engines[op] else "reference"):
            return select(op, *rest)

    told = _dispatch._told_of_missing_engine
    # No engine is missing where the reference is meant.
    _dispatch._select, _dispatch._told_of_missing_engine = chosen, True
    try:
        yield
    finally:
        _dispatch._select, _dispatch._told_of_missing_engine = select, told


@functools.cache
def by_reference(context: str, device: str = "cpu", **sizes: int) -> Trained:
    return train("reference", "float32", context, device, **sizes)


def assert_agrees(found: Trained, expected: Trained, engine: str, dtype: str) -> None:
    # The C++ engine makes the noise of its Langevin steps within them.
    for name in ("window_attention", "block", "posterior_langevin" if engine == "cpp" else "philox_normal"):
        assert found.counts.get((name, engine), 0) > 0, (name, found.counts)
    for name, backend in found.counts:
        assert backend == (engine if engine in _dispatch._engines[name] else "reference"), found.counts
    assert bool(found.losses.isfinite().all())
    loss_bound, bound = BOUNDS[dtype]
    # The action tokens of no batch are dropped.
    assert set(found.names) == set(expected.names) <= {"decoder.dropped_action"}
    error = (found.losses - expected.losses)[:, :3].abs().max() / expected.losses[:, :3].abs().max()
    assert float(error) < loss_bound, f"losses: {float(error):.1e}"
    for what, x, y, start in (
        ("parameters", found.after, expected.after, expected.before), ("chains", found.chains, expected.chains, 0.0),
    ):  # fmt: skip
        error = (x - y).norm() / (y - start).norm()
        assert float(error) < bound, f"{what}: {float(error):.1e}"


def test_the_reference_learns():
    for context in ("states", "states_actions"):
        one = by_reference(context)
        n = len(LENGTHS)
        assert float(one.losses[-n:, 1].mean()) < 0.6 * float(one.losses[:n, 1].mean())
        assert float((one.after - one.before).norm() / one.before.norm()) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_the_cpp_engine(cpp_engine, context, dtype):
    assert_agrees(train("cpp", dtype, context), by_reference(context), "cpp", dtype)


def without_kernels() -> str:
    missing = [op for op in ("window_attention", "block") if "triton" not in _dispatch._engines[op]]
    return f"no Triton engine of {' and '.join(missing)}" if missing else ""


def test_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.interpreter
@pytest.mark.skipif(bool(without_kernels()), reason=without_kernels() or "-")
def test_the_triton_engine_interpreted():
    context = "states_actions"
    expected = by_reference(context, **INTERPRETED)
    assert_agrees(train("triton", "float32", context, **INTERPRETED), expected, "triton", "float32")


@pytest.mark.slow
@pytest.mark.skipif(bool(without_kernels()), reason=without_kernels() or "-")
@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_the_triton_engine_interpreted_all_the_way(context):
    """In a process of its own, as TRITON_INTERPRET is read on import."""

    code = f"""
import sys; sys.path.insert(0, "tests")
import test_convergence as t
t.assert_agrees(t.train("triton", "float32", {context!r}), t.by_reference({context!r}), "triton", "float32")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_the_triton_engine_on_a_device(context, dtype):
    assert_agrees(train("triton", dtype, context, "cuda"), by_reference(context, "cuda"), "triton", dtype)
