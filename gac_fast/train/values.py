"""Returns of segments that know what the segment itself did: advantages over a cross-fitted value of its start."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.errors import DataError
from gac_fast.model.values import ValueModel
from gac_fast.train.log import Progress

__all__ = ["fit_values", "has_advantages", "segment_advantages", "values_of_data"]

N_MEMBERS = 5
N_UPDATES = 4000
BATCH_SIZE = 256  # steps, of each member
LEARNING_RATE = 3e-3
WARMUP = 50
WEIGHT_DECAY = 1e-2
MOST_THREADS = 2

# Steps whose values are computed at once.
CHUNK = 65_536


def has_advantages(config: Config) -> bool:
    """Whether returns of segments are advantages; a baseline has no use for either."""
    return config.train.segment_returns == "advantage" and config.baseline.method == "none"


def _member_of(data: Trajectories, seed: int) -> npt.NDArray[np.int64]:
    """int64 [B], the member that is not shown an episode; complete episodes, which alone are shown, in equal parts."""
    order = np.random.default_rng([seed, 0x56414C]).permutation(len(data))
    order = np.concatenate((order[data.complete[order]], order[~data.complete[order]]))
    member = np.empty(len(data), np.int64)
    member[order] = np.arange(len(data)) % N_MEMBERS
    return member


def _steps_of(data: Trajectories) -> npt.NDArray[np.int64]:
    """int64 [N], time steps within episodes."""
    return np.arange(data.num_steps) - np.repeat(data.cu_seqlens[:-1], data.lengths)


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    """More gain nothing on matrices this small, and on a busy machine of many cores wait for one another."""
    n = torch.get_num_threads()
    torch.set_num_threads(min(n, MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(n)


def fit_values(data: Trajectories, seed: int = 0, held_out: npt.ArrayLike = (), progress: bool = False) -> ValueModel:
    """Regress the returns to go of all steps on state and time step, each member on four fifths of the episodes.

    No member is fitted to what it is asked about afterwards (:func:`values_of_data`): a value that had seen an episode
    would know its return, and nothing would be left for its actions to explain.

    Args:
        data: episodes with the rewards of steps; those that were cut are left out.
        seed: of weights, of batches, and of who sees which episode.
        held_out: numbers of episodes that no member is shown.
        progress: show a bar.

    Raises:
        DataError: rewards are missing, or there are fewer complete episodes than members.
    """
    to_go = data.returns_to_go()
    usable = data.complete.copy()
    usable[np.asarray(held_out, np.int64)] = False
    n_complete = int(usable.sum())
    if n_complete < N_MEMBERS:
        raise DataError(
            f"train.segment_returns = 'advantage': expected at least {N_MEMBERS} episodes whose return is known, to "
            f"fit values to, got {n_complete}"
        )
    stats = data.statistics()
    known = np.repeat(usable, data.lengths)
    std = float(to_go[known].std())
    obs_std = torch.from_numpy(stats.obs_std)
    model = ValueModel.untrained(
        N_MEMBERS, torch.from_numpy(stats.obs_mean), torch.where(obs_std > 1e-6, obs_std, 1.0),
        int(data.lengths.max()), float(to_go[known].mean()), std if std > 1e-6 else 1.0, seed,
    )  # fmt: skip
    member = _member_of(data, seed)
    shown = [np.flatnonzero(np.repeat(usable & (member != k), data.lengths)) for k in range(N_MEMBERS)]
    # Few episodes may all be one member's own.
    rows = [torch.from_numpy(x if len(x) else np.flatnonzero(known)) for x in shown]
    observations, steps = torch.from_numpy(data.observations), torch.from_numpy(_steps_of(data))
    targets = torch.from_numpy((to_go - float(model.mean)) / float(model.std)).float()
    weights = [w.requires_grad_() for w in model.weights]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    generator = torch.Generator().manual_seed(seed)
    with Progress(N_UPDATES, "values", disable=not progress) as bar, _few_threads():
        for i in range(N_UPDATES):
            rate = LEARNING_RATE * min(1.0, (i + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * i / N_UPDATES))
            for group in optimizer.param_groups:
                group["lr"] = rate
            drawn = torch.stack([r[torch.randint(len(r), (BATCH_SIZE,), generator=generator)] for r in rows])
            flat = drawn.flatten()
            inputs = model.inputs(observations[flat], steps[flat]).view(*drawn.shape, -1)
            loss = (model.standardised(inputs) - targets[drawn]).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss, inputs=weights)
            optimizer.step()
            bar.update(1, error=loss.detach())
    return ValueModel(*(x.detach() for x in model))


def values_of_data(model: ValueModel, data: Trajectories, seed: int = 0) -> npt.NDArray[np.float64]:
    """float64 [N], value of every step by the member that was not shown its episode.

    Args:
        data: the episodes that ``model`` was fitted to.
        seed: that it was fitted with.
    """
    observations, steps = torch.from_numpy(data.observations), torch.from_numpy(_steps_of(data))
    member = torch.from_numpy(np.repeat(_member_of(data, seed), data.lengths))
    found = [
        model.of_members(x, t).gather(0, m[None])[0]
        for x, t, m in zip(observations.split(CHUNK), steps.split(CHUNK), member.split(CHUNK), strict=True)
    ]
    return torch.cat(found).numpy()


def segment_advantages(
    parts: Trajectories, values: npt.NDArray[np.float64] | Tensor, episode: npt.NDArray[np.int64]
) -> Trajectories:
    """Segments with their advantages in the place of their returns: the rewards of a segment and the value of where it
    leads, less the value of its first state.

    Args:
        parts: segments in order, with returns to the end of their episodes.
        values: [n], of their first states.
        episode: int64 [n], of each.

    Returns:
        the segments. Of a cut episode all but the last are complete: what comes after them is known.
    """
    beyond = parts.returns - np.asarray(values)
    last = np.append(episode[1:] != episode[:-1], True)
    after = np.where(last, 0.0, np.append(beyond[1:], 0.0))
    return dataclasses.replace(parts, returns=beyond - after, complete=parts.complete | ~last)
