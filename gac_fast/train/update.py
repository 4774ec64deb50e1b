"""One packed batch in, new parameters out."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gac_fast import ops
from gac_fast.config import Config, TrainConfig
from gac_fast.model import GAC, Batch
from gac_fast.posterior import PosteriorState, PosteriorStats, refine

__all__ = [
    "Losses",
    "Parts",
    "compiled",
    "frozen",
    "learning_rate",
    "load_optimizer_state",
    "make_optimizer",
    "optimizer_state",
    "parts_of",
    "records",
    "set_learning_rate",
    "update",
]

# Of the NLL that fits the variances. Small, since its gradient shares the norm that clipping allows.
VARIANCE_WEIGHT = 0.1

# Sizes of batch and states of autograd that each compiled part may be specialised to; the compiler's own limit is 8.
MOST_SPECIALISATIONS = 64


def records(config: Config, device: torch.device) -> bool:
    """Whether updates on ``device`` are recorded as CUDA graphs."""
    if config.train.cuda_graph != "auto":
        return config.train.cuda_graph == "on"
    # By itself only the kind of update that a GPU has run so: of many small kernels it took an H200 a twelfth.
    is_usual = config.posterior.method == "langevin" and config.baseline.method == "none"
    return device.type == "cuda" and is_usual and config.train.compile == "off"


def make_optimizer(model: nn.Module, config: TrainConfig, recorded: bool | None = None) -> torch.optim.AdamW:
    """AdamW with decay on the matrices of linear maps only.

    Args:
        recorded: its learning rate is a tensor beside the parameters, which a recorded update reads; default where
            ``config.cuda_graph`` is ``on``.
    """
    recorded = config.cuda_graph == "on" if recorded is None else recorded
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        is_matrix = p.ndim >= 2 and name.rpartition(".")[2].startswith("w")
        (decayed if is_matrix else plain).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # One pass over memory for each parameter, where the plain one makes a dozen.
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True, capturable=recorded)
    if recorded:
        lr = torch.tensor(config.learning_rate, dtype=torch.float32, device=next(model.parameters()).device)
        for group in optimizer.param_groups:
            group["lr"] = lr
    return optimizer


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to ``final_lr_ratio`` of the peak at ``n_updates``."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.n_updates - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.learning_rate * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Of all groups; where it is a tensor, in place and without waiting for its device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``state_dict()`` as it is whether or not updates are recorded: learning rates as numbers."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over what :func:`optimizer_state` gave, whether or not updates are recorded now as they were then."""
    own = [{name: group[name] for name in ("lr", "capturable")} for group in optimizer.param_groups]
    rates = [float(group["lr"]) for group in state["param_groups"]]
    optimizer.load_state_dict(state)
    for group, mine, rate in zip(optimizer.param_groups, own, rates, strict=True):
        group.update(mine)
        if isinstance(mine["lr"], Tensor):
            mine["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside: posterior passes make none for weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class Losses(NamedTuple):
    """Zero-dimensional tensors."""

    loss: Tensor  # what the parameters are moved by
    action_error: Tensor
    return_error: Tensor
    action_nll: Tensor


class Parts(NamedTuple):
    """What an update asks of the model, as it is or compiled."""

    trunk: Callable[[Batch], Tensor]
    energy: Callable[[Tensor, Batch, Tensor], Tensor]  # of z0, batch and detached trunk
    losses: Callable[[Tensor, Batch, Tensor], Losses]  # of z0, batch and trunk
    # Of batch and detached trunk: the energy as the engine takes it, None where it does not.
    seed_energy: Callable[[Batch, Tensor], ops.SeedEnergy | None] = lambda batch, trunk: None


def parts_of(model: GAC, config: Config) -> Parts:
    """Those of a model."""
    t, p = config.train, config.posterior
    if config.baseline.method != "none":
        return Parts(model.trunk, _no_energy, functools.partial(_action_losses, model))

    def energy(z0: Tensor, batch: Batch, trunk: Tensor) -> Tensor:
        return model.energy(z0, batch, p.action_temperature, p.return_temperature, trunk)

    def seed_energy(batch: Batch, trunk: Tensor) -> ops.SeedEnergy | None:
        return model.seed_energy(batch, p.action_temperature, p.return_temperature, trunk)

    def losses(z0: Tensor, batch: Batch, trunk: Tensor) -> Losses:
        z, errors = model.plan_and_errors(z0, batch, trunk)
        action_loss = errors.mean()
        # The variances are fitted with means and plans held fixed. That of the return sees plans inferred from tau
        # alone, for a plan that has seen the return makes errors look small.
        action_nll = _mean_nll(model, errors)
        seen = batch.has_return
        return_loss, return_nll = model.return_losses(z, batch, seen, batch.has_label & ~seen)

        loss = action_loss + t.return_weight * return_loss + VARIANCE_WEIGHT * (action_nll + return_nll)
        return Losses(loss, action_loss, return_loss, action_nll)

    return Parts(model.trunk, energy, losses, seed_energy)


def _no_energy(z0: Tensor, batch: Batch, trunk: Tensor) -> Tensor:
    raise AssertionError("a baseline has no posterior")


def _action_losses(model: GAC, z0: Tensor, batch: Batch, trunk: Tensor) -> Losses:
    """Those of a baseline: the likelihood of the actions, weighted as in GAC's loss."""
    _, errors = model.plan_and_errors(z0, batch, trunk)
    action_loss = errors.mean()
    action_nll = _mean_nll(model, errors)
    return Losses(action_loss + VARIANCE_WEIGHT * action_nll, action_loss, action_loss.new_zeros(()), action_nll)


def _mean_nll(model: GAC, errors: Tensor) -> Tensor:
    """Of a step, means held fixed, from the mean squared errors [act_dim]: the likelihood is linear in them."""
    return -model.action_log_likelihood(errors.detach()[None])[0]


def compiled(parts: Parts, backend: str = "inductor", mode: str | None = None) -> Parts:
    """The same through ``torch.compile``, each part as one graph, specialised to every size of batch it meets."""
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MOST_SPECIALISATIONS)

    def one(part: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(part, backend=backend, mode=mode, dynamic=False, fullgraph=True)

    return Parts(one(parts.trunk), one(parts.energy), one(parts.losses))


def update(
    model: GAC,
    optimizer: torch.optim.Optimizer,
    posterior: PosteriorState | None,
    batch: Batch,
    rows: Tensor,
    config: Config,
    parts: Parts | None = None,
    infer: bool = True,
) -> dict[str, Tensor]:
    """Posterior steps on the batch's chains, then one parameter step.

    Nothing is read back from the device, and no state of Python changes: a CUDA graph may record it.

    Args:
        posterior: chains; None for a baseline, whose plan is held at zero.
        batch: trajectories in the order of ``rows``; ``has_return`` False where the chain must not see the return.
        rows: int64 [b], rows of the posterior state, distinct where ``batch.is_real``, 2 * B elsewhere.
        parts: those of ``model`` under ``config``, compiled for example; None takes them as they are.
        infer: False leaves the chains alone and decodes each trajectory under the seed of another one.

    Returns:
        detached zero-dimensional diagnostics, on the device.
    """
    with ops.left_to_the_engine("block", batch.observations):
        # The optimiser's step comes after all that reads the weights.
        with ops.fixed_weights():
            values = _gradients(model, optimizer, posterior, batch, rows, parts or parts_of(model, config), infer)
        values["grad_norm"] = clipped_step(model, optimizer, config.train.grad_clip)
        return values


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clip the norm of the gradients, then move the parameters; the norm before, [].

    The C++ engine does both in one call where it can; the optimiser's state is torch's in either case.
    """
    moved, gradients, decays = [], [], []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                moved.append(p)
                gradients.append(p.grad)
                decays.append(group["weight_decay"])
    states = [optimizer.state[p] for p in moved]
    # The first step of a parameter makes its state.
    if not moved or not all(states) or not ops.adamw_takes(moved):
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        return norm
    first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    # One learning rate for all groups: set_learning_rate() sees to it.
    group = optimizer.param_groups[0]
    return ops.adamw(
        moved, gradients, first, second, steps, decays, learning_rate=group["lr"], betas=group["betas"],
        eps=group["eps"], max_norm=max_norm, kept=vars(optimizer).setdefault("_engine", {}),
    )  # fmt: skip


def _gradients(
    model: GAC,
    optimizer: torch.optim.Optimizer,
    posterior: PosteriorState | None,
    batch: Batch,
    rows: Tensor,
    parts: Parts,
    infer: bool,
) -> dict[str, Tensor]:
    """The chains moved, the gradients of the parameters left in them; diagnostics."""
    trunk = parts.trunk(batch)
    known = trunk.detach()
    stats: PosteriorStats | None = None
    if posterior is None:
        z0 = batch.observations.new_zeros(batch.n_trajectories, model.config.n_z, model.config.dim)
    elif not infer:
        z0 = posterior.seeds_of_others(rows, batch.is_real)
    else:
        seed_energy = parts.seed_energy(batch, known) if posterior.config.method == "langevin" else None
        # Where autograd differentiates the energy, not with respect to the weights.
        with frozen(model) if seed_energy is None else contextlib.nullcontext():
            z0, stats = refine(
                posterior,
                rows,
                lambda z0: parts.energy(z0, batch, known),
                is_real=batch.is_real,
                seed_energy=seed_energy,
            )

    losses = parts.losses(z0, batch, trunk)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    losses.loss.backward()
    with torch.no_grad():
        values = {"loss": losses.loss.detach(), "action_error": losses.action_error.detach()}
        if stats is not None:
            values["return_error"] = losses.return_error.detach()
        values |= {
            "nll_per_step": losses.action_nll.detach(),
            "sigma_a": model.decoder.log_sigma_a.exp().mean(),
        }
        if stats is not None:
            values |= {
                "drift_ratio": stats.drift_ratio,
                "langevin_step": stats.step_size,
                "seed_norm": stats.seed_norm,
            }
        return values
