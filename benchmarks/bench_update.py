"""Speed of one training update: three Langevin steps on the plans, then one step of the parameters.

The peer is this project's own update in eager PyTorch, whose attention is banded. ``naive`` is what published code
does: a mask over all pairs of tokens of padded trajectories, and Langevin steps through the whole decoder. The second
batch has trajectories of uneven lengths, where padding shows. ``lengths`` holds updates on as many time steps against
each other, in short trajectories or in one long one: they must cost the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness import NEEDS_CUDA, Case, compiled, engine_problem, instead, under
from naive import NaiveTrainer
from torch import Tensor

from gac_fast import ops
from gac_fast.config import Config, preset
from gac_fast.model import GAC, Batch
from gac_fast.posterior import PosteriorState
from gac_fast.train.update import Parts, make_optimizer, parts_of, update

OBS_DIM, ACT_DIM = 11, 3  # hopper
# Of the losses (relative), the chains (rms) and each parameter's gradient (norm of the difference over the norm).
# Three Langevin steps feed an action's error back into the plan, and bfloat16 rounds every product.
BOUNDS = {"float32": (1e-4, 1e-4, 1e-3), "bfloat16": (2e-2, 2e-2, 5e-2)}


class Trainer(NamedTuple):
    """All that an update moves, and its batch."""

    model: GAC
    optimizer: torch.optim.Optimizer
    posterior: PosteriorState
    batch: Batch
    rows: Tensor
    config: Config

    def step(self) -> dict[str, Tensor]:
        return update(*self)


def trainer(config: Config, lengths: list[int], dtype: str) -> Trainer:
    """A fresh one: the same model, chains and batch every time."""
    torch.manual_seed(0)
    model = GAC(config.model, OBS_DIM, ACT_DIM)
    model.bf16 = dtype == "bfloat16"
    b, n = len(lengths), sum(lengths)
    posterior = PosteriorState(config.posterior, b, config.model.n_z, config.model.dim, 0, torch.device("cpu"))
    steps = torch.tensor(lengths)
    cu_seqlens = torch.nn.functional.pad(steps.cumsum(0), (1, 0))
    sequence = torch.repeat_interleave(torch.arange(b), steps)
    seen = torch.arange(b) < b - 1  # one trajectory's plan is inferred without the return
    batch = Batch(
        observations=torch.randn(n, OBS_DIM), actions=2 * torch.rand(n, ACT_DIM) - 1,
        cu_seqlens=cu_seqlens.to(torch.int32), positions=torch.arange(n) - cu_seqlens[sequence], sequence=sequence,
        returns=torch.randn(b), has_return=seen, has_label=torch.ones(b, dtype=torch.bool),
    )  # fmt: skip
    rows = torch.arange(b) + b * ~seen
    return Trainer(model, make_optimizer(model, config.train), posterior, batch, rows, config)


def cost(config: Config, n_steps: int) -> tuple[float, float]:
    """Least work (FLOP) and traffic (bytes in float32) of one update.

    Work: products of the decoder, a forward as 1, data gradients as 1, weight gradients as 1; the part before the
    first plan attention once. Traffic: every layer's input and its gradient written and read once in every pass.
    """
    m, passes = config.model, config.posterior.n_steps
    tokens = m.tokens_per_step * n_steps
    attend = 8 * m.dim**2 + 4 * m.tokens_per_step * m.window * m.dim
    rest = 4 * m.dim**2 + 4 * m.n_z * m.dim + 4 * m.mlp_ratio * m.dim**2
    layers = m.n_layers * (attend + rest)
    return tokens * (3 * layers + 2 * passes * (layers - attend)), 16.0 * tokens * m.dim * m.n_layers * (passes + 1)


def first_update(config: Config, lengths: list[int], name: str, dtype: str) -> tuple[Trainer, dict[str, Tensor]]:
    """A trainer after one update by a backend, from the same state and with the same dropout, and the losses."""
    one = trainer(config, lengths, dtype)
    ops.reset_dispatch_counts()
    torch.manual_seed(1)
    losses = under(name if name == "reference" else "", one.step)()
    assert ("window_attention", name) in ops.dispatch_counts()
    # The engine may leave to the reference what it has no engine for.
    for op, backend in ops.dispatch_counts():
        assert backend == name or (name == "cpp" and engine_problem(op)), (op, backend)
    return one, losses


def assert_agrees(
    dtype: str, expected: tuple[Trainer, dict[str, Tensor]], found: tuple[Trainer, dict[str, Tensor]]
) -> None:
    """The engine's first update gives what the reference's gives."""
    (a, losses), (b, other) = expected, found
    loss_bound, chain_bound, gradient_bound = BOUNDS[dtype]
    for key in ("loss", "action_error", "return_error", "nll_per_step"):
        assert float(other[key]) == pytest.approx(float(losses[key]), rel=loss_bound), key
    assert float((a.posterior.z0 - b.posterior.z0).square().mean().sqrt()) < chain_bound
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        # Adam's first step is the sign of the gradient, in which rounding shows: the gradients themselves are held.
        if p.grad is not None:
            assert float((p.grad - q.grad).norm() / p.grad.norm().clamp_min(1e-12)) < gradient_bound, name


def naive(config: Config, lengths: list[int]) -> NaiveTrainer:
    """That of :func:`trainer`, whose energy of the chains it finds too."""
    one = trainer(config, lengths, "float32")
    z0 = one.posterior.z0[: len(lengths)].clone()
    found = NaiveTrainer(one.model, one.optimizer, one.batch, z0, config)
    p = config.posterior
    with torch.no_grad():
        energy = one.model.energy(z0, one.batch, p.action_temperature, p.return_temperature)
        torch.testing.assert_close(found.energy(z0), energy, rtol=BOUNDS["float32"][0], atol=0)
    return found


@pytest.mark.parametrize("lengths", [[1000] * 4, [400, 200, 100, 100]], ids=["even", "uneven"])
@pytest.mark.parametrize("context", ["states_actions", "states"])
def test_update(compare, tiny, compilers, context, lengths):
    size = "tiny" if tiny else "gym"
    config = preset(size).replace(model={"context": context})
    even = lengths[0] == lengths[1]
    if context == "states" and not even:
        pytest.skip("with C=2 alone")
    if tiny:
        lengths = [12, 12] if even else [12, 5]
    providers = {("naive", "float32"): naive(config, lengths).step, ("CUDA graphs", "float32"): NEEDS_CUDA}
    providers |= {
        ("reference", dtype): under("reference", trainer(config, lengths, dtype).step)
        for dtype in ("float32", "bfloat16")
    }
    expected = first_update(config, lengths, "reference", "float32")
    for dtype in ("float32", "bfloat16"):
        problem = engine_problem("window_attention", dtype)
        if problem is None:
            assert_agrees(dtype, expected, first_update(config, lengths, "cpp", dtype))
            providers["cpp", dtype] = under("", trainer(config, lengths, dtype).step)
        else:
            providers["cpp", dtype] = problem

    def compile_parts(by: Callable[..., Any]) -> Callable[[], object]:
        one = trainer(config, lengths, "float32")
        parts = Parts(*map(by, parts_of(one.model, config)[:3]))
        run = under("reference", lambda: update(*one, parts))
        losses = run()
        # Its dropout draws other masks, of which the chains and the actions know nothing.
        for key in ("action_error", "nll_per_step"):
            assert float(losses[key]) == pytest.approx(float(expected[1][key]), rel=BOUNDS["float32"][0]), key
        return run

    if context == "states" or not even:
        compilers = instead(compilers, "left out: compiled with C=2 B=4 T=1000 alone")
    elif not isinstance(compilers["torch.compile max-autotune"], str):
        compilers = {**compilers, "torch.compile max-autotune": "left out: tunes for many minutes"}
    providers = {**compiled(compilers, compile_parts), **providers}
    flops, n_bytes = cost(config, sum(lengths))
    shape = f"{size} C={config.model.tokens_per_step} B={len(lengths)} {'T=' if even else 'uneven T<='}{lengths[0]}"
    mode = f"{config.posterior.n_steps} posterior steps"
    case = Case("update", mode, shape, flops, n_bytes, sum(lengths), "time steps")
    compare(case, providers, [("naive", "float32")])


def test_lengths(compare, tiny, n_threads):
    """10,000 time steps in trajectories of 100, 1,000 and 10,000."""
    if n_threads > 1:
        pytest.skip("as on one thread")
    size, n_steps, lengths = ("tiny", 24, (6, 12, 24)) if tiny else ("gym", 10_000, (100, 1000, 10_000))
    config = preset(size)
    p = config.posterior
    providers: dict[tuple[str, str], Callable[[], object] | str] = {}
    for dtype in ("float32", "bfloat16"):
        for length in lengths:
            who = f"cpp, T={length}", dtype
            problem = engine_problem("window_attention", dtype)
            if dtype == "float32" and engine_problem("window_attention", "bfloat16") is None:
                problem = "left out: takes seconds, see bfloat16"
            if problem is not None:
                providers[who] = problem
                continue
            one = trainer(config, [length] * (n_steps // length), dtype)

            def energy(one: Trainer = one) -> Tensor:
                z0 = one.posterior.z0[: one.batch.n_trajectories]
                with torch.no_grad():
                    return one.model.energy(z0, one.batch, p.action_temperature, p.return_temperature)

            torch.testing.assert_close(energy(), under("reference", energy)(), rtol=BOUNDS[dtype][0], atol=0)
            providers[who] = under("", one.step)
    flops, n_bytes = cost(config, n_steps)
    shape = f"{size} C={config.model.tokens_per_step} {n_steps} time steps"
    compare(Case("update", "lengths", shape, flops, n_bytes, n_steps, "time steps"), providers)
