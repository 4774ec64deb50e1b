"""All Langevin steps of an update on the plan seeds of a packed batch, given its actions and returns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gac_fast.ops import _arrays, _check, _dispatch, _threads, block
from gac_fast.ops.decoder_layers import LayerStack, Tokens, layers_backward, layers_forward, runs_directly
from gac_fast.ops.window_attention import OP as WINDOW_ATTENTION
from gac_fast.reference import PlanMap, PriorWeights, ReturnWeights

__all__ = ["SeedEnergy", "energy_runs_directly", "posterior_langevin"]

OP = "posterior_langevin"
_dispatch.register(OP, "cpp")

_WORD = 1 << 32


class SeedEnergy(NamedTuple):
    """E(z0) = |z0|^2 / 2 + sum (a - mu)^2 / (2 T_a) + weight (y - r(z))^2 / 2 of a batch of B trajectories.

    Attributes:
        prior: U.
        plan_maps: of each layer.
        returns: r.
        stack: the decoder's layers.
        trunk: [C * n, D], the stream behind the first window attention.
        cu_seqlens, positions: int [B + 1] and [n], in steps.
        actions: [n, act_dim].
        context: [B, obs_dim], first states where r takes them.
        y, weight: [B], returns and what their errors count: 0 where the chain must not see it.
        action_temperature: T_a.
        bf16: round the operands of the decoder's products.
        per_step: C.
    """

    prior: PriorWeights
    plan_maps: Sequence[PlanMap]
    returns: ReturnWeights
    stack: LayerStack
    trunk: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    actions: Tensor
    context: Tensor | None
    y: Tensor
    weight: Tensor
    action_temperature: float
    bf16: bool = False
    per_step: int = 1


def energy_runs_directly(trunk: Tensor, z0: Tensor) -> bool:
    """Whether :func:`posterior_langevin` takes such tensors."""
    return runs_directly(trunk, z0) and _dispatch.active(OP, trunk.device) == "cpp"


@torch.no_grad()
def posterior_langevin(
    energy: SeedEnergy,
    z0: Tensor,
    *,
    n_steps: int,
    step_size: float,
    seed: tuple[int, int],
    ids: Tensor,
    steps: Tensor,
    max_drift_ratio: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unadjusted Langevin on the seeds of a batch.

    Equivalent to :func:`gac_fast.posterior.langevin` on :meth:`gac_fast.model.GAC.energy`, which is what runs where
    :func:`energy_runs_directly` says no. The first step makes the engine's calls and their memory, those after it
    are the same calls again. The same bits on any number of threads.

    Args:
        z0: float32 [B, n_z, D], where the chains are.
        n_steps: at least 0.
        step_size: s in z0 <- z0 - (s^2 / 2) grad E + s * noise; finite, at least 0.
        seed: of the noise, two words within [0, 2^32).
        ids: int64 [B] of the chains in the noise, within [0, 2^32).
        steps: int64 [B], the step in the noise of each chain's first step; the last one stays below 2^32.
        max_drift_ratio: greatest |drift| / |noise|, at least 0; a step is shrunk until it holds.

    Returns:
        seeds [B, n_z, D]; step size and ratio of drift to noise [B] as taken last.

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("z0", z0, torch.float32)
    _check.shape("z0", z0, energy.cu_seqlens.shape[0] - 1, "n_z", "D")
    _check.dtype("energy.trunk", energy.trunk, torch.float32)
    if energy.trunk.shape[0] != energy.per_step * energy.actions.shape[0]:
        found = list(energy.trunk.shape)
        raise ValueError(f"energy.trunk: expected {energy.per_step} rows for each action, got {found}")
    if n_steps < 0:
        raise ValueError(f"n_steps: expected at least 0, got {n_steps}")
    if len(seed) != 2 or not all(0 <= word < _WORD for word in seed):
        raise ValueError(f"seed: expected two words within [0, 2^32), got {tuple(seed)}")
    if _dispatch.choose(OP, z0.device) != "cpp":
        raise ValueError("energy: expected tensors that the C++ engine takes, see energy_runs_directly()")
    n_plans = len(z0)
    seeds = z0.detach().clone(memory_format=torch.contiguous_format)
    size, ratio = torch.full((n_plans,), step_size), torch.zeros(n_plans)
    if n_steps == 0:
        return seeds, size, ratio
    taken = steps.clone()
    calls, gradient = _gradient(energy, seeds)
    move = functools.partial(
        _dispatch.cpp_engine()._seed_move, seeds.numpy(), gradient.numpy(), step_size, max_drift_ratio, *seed,
        ids.numpy(), taken.numpy(), size.numpy(), ratio.numpy(), _threads.count(),
    )  # fmt: skip
    move()
    n_layers = len(energy.stack.weights)
    for op, n in ((block.OP, n_layers), (WINDOW_ATTENTION, n_layers - 1)):
        _dispatch.count(op, "cpp", n * (n_steps - 1))
    for _ in range(n_steps - 1):
        taken += 1
        for call in calls:
            call()
        move()
    return seeds, size, ratio


def _gradient(energy: SeedEnergy, z0: Tensor) -> tuple[list[block.Call], Tensor]:
    """The gradient of the energy at z0, and the engine's calls that made it of what lies in z0's memory."""
    engine, threads, stack = _dispatch.cpp_engine(), _threads.count(), energy.stack
    n_plans, n_z, dim = z0.shape
    n_layers = len(stack.weights)
    prior = [_array(w) for w in energy.prior if w is not None]
    maps = [[_array(w) for w in one] for one in energy.plan_maps]
    returns = [_array(w) for w in energy.returns]
    before = torch.empty(n_plans, len(prior[0]) if prior else 0)
    z, scale, gradient = torch.empty(z0.shape), torch.empty(n_plans, n_z), torch.empty(z0.shape)
    kv = torch.empty(n_layers, 2, *z0.shape)
    passed = z0.numpy(), before.numpy(), z.numpy(), scale.numpy()
    tokens = Tokens.of(energy.cu_seqlens, energy.positions, energy.per_step)
    calls: list[block.Call] = []

    def run(function: Callable[..., object], *arguments: Any) -> None:
        calls.append(functools.partial(function, *arguments))
        calls[-1]()

    run(engine._seed_plans, prior, maps, *passed, kv.numpy(), threads)
    plan = kv.view(n_layers, 2, n_plans, n_z, stack.n_heads, dim // stack.n_heads)
    y, kept = layers_forward(energy.trunk.detach(), plan, tokens, stack, energy.bf16, True, calls)
    dy, ones = torch.empty_like(y), torch.ones(y.shape[1])
    run(
        engine._action_errors, _arrays.array(y), _array(energy.actions), None, ones.numpy(), _arrays.array(dy), None,
        threads,
    )  # fmt: skip
    dplan, _, _ = layers_backward(dy, kept, plan, tokens, stack, energy.bf16, False, False, calls)
    run(
        engine._seed_gradient, prior, maps, returns, None if energy.context is None else _array(energy.context),
        _array(energy.y), _array(energy.weight), *passed, dplan.numpy(), 1 / energy.action_temperature,
        gradient.numpy(), threads,
    )  # fmt: skip
    return calls, gradient


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()
