"""Online fine-tuning: explore with plans for a target return, learn from what came of it, and go on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gac_fast import checkpoint, ops
from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.data.buffer import EpisodeBuffer
from gac_fast.errors import CheckpointError, ConfigError, DataError, EnvError
from gac_fast.evaluate import EvalResult, check_fit, check_task, evaluate, same_task
from gac_fast.files import read_json
from gac_fast.model.normalization import SMALLEST_STD, Normalization
from gac_fast.model.values import ValueModel
from gac_fast.plan import Plans, TargetSchedule, predict
from gac_fast.policy import Policy, ReplanningActor, load
from gac_fast.posterior import ONLINE, PosteriorState
from gac_fast.rollout import SEED_LIMIT, Rollout, rollout
from gac_fast.train.batches import Batches, Mix
from gac_fast.train.log import Logger, Progress, RunDir, StopSignal, last_metrics, merge_result, start_run
from gac_fast.train.trainer import (
    Trainer,
    TrainingDivergedError,
    check_config,
    check_finite,
    check_state,
    fingerprint,
    split,
    uses_bf16,
)
from gac_fast.train.values import has_advantages, segment_advantages

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from gac_fast.act import Actor

__all__ = ["OnlineTrainer", "Spaces", "finetune"]

# What else may differ between a run and its resumption; the first three for one that diverged.
MAY_CHANGE = {
    "online.learning_rate",
    "posterior.step_size",
    "train.grad_clip",
    *(f"online.{name}" for name in ("n_steps", "n_updates", "eval_every", "eval_episodes", "checkpoint_every")),
}

# First words of what a round's seeds are made of.
ENV, PLAN, NOISE, EVALUATION, COMPARED = range(5)

# Second word of the key of random plans ("FILL").
FILL_KEY = 0x46494C4C

# Plans that ranking compares an episode with, and the least spread of their returns, standardised.
N_COMPARED = 16
SMALLEST_SPREAD = 0.1


class Spaces(NamedTuple):
    """What the method needs to know of an environment."""

    obs_dim: int
    act_dim: int
    action_low: np.ndarray
    """float32 [act_dim]"""
    action_high: np.ndarray
    env_id: str | None

    @classmethod
    def of(cls, env: VectorEnv[Any, Any, Any], env_id: str | None) -> Spaces:
        """Those of a vector environment with flat observations and a Box of actions.

        Raises:
            EnvError: an action without bounds.
        """
        space: Any = env.single_action_space
        low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise EnvError(f"{env_id}: expected an action space with bounds, got {space}")
        return cls(env.single_observation_space.shape[0], space.shape[0], low, high, env_id)  # type: ignore[index]

    @classmethod
    def of_data(cls, data: Trajectories) -> Spaces:
        """Those that episodes come from."""
        return cls(data.obs_dim, data.act_dim, data.action_low, data.action_high, data.env_id)


Vectors = Sequence["VectorEnv[Any, Any, Any]"]
"""Vector environments that are run as one."""


class Starts(NamedTuple):
    """Where n plans are to begin."""

    states: np.ndarray | Tensor
    """[n, obs_dim], in environment units."""
    first: int
    """Number of the episode that environment 0 is in."""
    rows: np.ndarray
    """int64 [n], their environments."""
    segments: np.ndarray
    """int64 [n], segments of the episode before; 0 where it begins."""
    expected: np.ndarray | None
    """float64 [n], return that the model expects from there of plans of the prior, where trajectories are segments."""


PlansFor = Callable[[Starts, Policy], Plans]


class Explored(NamedTuple):
    """Trajectories of one round: its episodes, or their segments."""

    episodes: Trajectories
    z0: np.ndarray
    """float32 [n, n_z, D], seeds of the plans that made them."""
    predicted: np.ndarray
    """[n], return that the model expected of each."""
    planning_seconds: float
    acting_seconds: float
    seconds: float
    """All of it."""
    expected: np.ndarray | None = None
    """[n], of segments: return that it expected of plans of the prior from there."""
    numbers: np.ndarray | None = None
    """int64 [n], of segments: the episode of each, in order."""
    whole: np.ndarray | None = None
    """[episodes], their returns, where those of segments are advantages."""
    start_values: np.ndarray | None = None
    """[episodes], what advantages are over at the starts of episodes."""

    @property
    def opens(self) -> np.ndarray:
        """bool [n], trajectories that an episode begins with."""
        if self.numbers is None:
            return np.ones(len(self.episodes), np.bool_)
        return np.diff(self.numbers, prepend=-1) != 0

    @property
    def episode(self) -> np.ndarray:
        """int64 [n], which of the round's episodes each belongs to."""
        return np.cumsum(self.opens) - 1

    @property
    def episode_returns(self) -> np.ndarray:
        """float64 [n], of the whole episode that each is a part of; of segments whose returns are advantages, these."""
        returns = self.episodes.returns
        return returns[self.opens][self.episode] if self.whole is None else returns


class OnlineTrainer(Trainer):
    """Training on episodes that come in, beside those of an offline data set.

    Args:
        config: of the run.
        spaces: of the environment, and of the data where there is some.
        offline: episodes of a fixed data set, or None.
        values: of the run gone on from, where returns of segments are advantages.

    Attributes:
        offline: its trajectories: the episodes, or their segments.
        n_episodes: episodes that came in.
        env_steps: their time steps.
    """

    def __init__(
        self, config: Config, spaces: Spaces, offline: Trajectories | None = None, values: ValueModel | None = None
    ) -> None:
        super().__init__(config)
        if has_advantages(config) and values is None:
            raise ConfigError(
                "train.segment_returns: expected to_go, as advantages are over the values of a run on offline data, "
                "got advantage without such a run"
            )
        self.values = values if has_advantages(config) else None
        online = config.online
        self.spaces = spaces
        self.held_out, self._offline_usable = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)
        self._offline_opens: Tensor | None = torch.zeros(0, dtype=torch.bool) if config.train.segment else None
        self._offline_episode_returns = torch.zeros(0, dtype=torch.float64)
        self._raw = offline
        if offline is not None:
            parts = split(offline, config, self.values)
            offline, self.held_out, self._offline_usable, self._offline_opens, self._raw = parts
            whole = parts.episode_returns
            self._offline_episode_returns = torch.from_numpy(offline.returns) if whole is None else whole
        self.offline = offline
        self.buffer = EpisodeBuffer(offline, online.capacity, online.keep_best)
        self.schedule = TargetSchedule(online.target_best)
        self.round = 0
        self.in_round = False
        self.updates_left = 0
        self.n_episodes = 0
        self.env_steps = 0
        self.fill_steps = 0
        self.filled = offline is not None
        self.achieved: list[float] = []
        self.row: dict[str, float] = {}
        self.normalization = _units_of(spaces) if offline is None else Normalization.fit(offline)
        self._make_model(spaces.obs_dim, spaces.act_dim)
        n_chains = self.buffer.n_offline + online.capacity
        self.posterior = PosteriorState(
            config.posterior, n_chains, config.model.n_z, config.model.dim, config.train.seed, self.device, ONLINE
        )
        self._make_update()
        self._refresh()

    def learning_rate(self) -> float:
        o = self.config.online
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.spent())))
        return o.learning_rate * (o.final_lr_ratio + (1 - o.final_lr_ratio) * cosine)

    def exploring_radius(self) -> float:
        """Trust region of exploit's plans while exploring: from bold to what is used in the end, by equal ratios."""
        o, spent = self.config.online, min(1.0, self.spent())
        return o.bold_radius ** (1 - spent) * o.radius**spent

    def spent(self) -> float:
        """Share of the budget used up; of the one that ends the run first."""
        o = self.config.online
        parts = [self.n_updates / o.n_updates] if o.n_updates else []
        if o.explore == "on":
            parts.append((self.env_steps - self.fill_steps) / o.n_steps)
        return max(parts)

    @property
    def n_updates(self) -> int:
        """Updates since training online began."""
        return self.step - self.first_step

    first_step = 0
    """Updates that the model had before."""

    @property
    def has_episodes(self) -> bool:
        """Whether there is anything to learn from."""
        return self.buffer.n_offline + self.buffer.n_online > 0

    def _refresh(self) -> None:
        """Whatever follows from the episodes there are."""
        self.close()
        buffer = self.buffer
        if not self.has_episodes:
            return
        self.data = data = buffer.trajectories
        online = torch.arange(len(data)) >= buffer.n_offline
        self.usable = torch.cat((self._offline_usable, torch.from_numpy(data.complete[buffer.n_offline :])))
        if self._offline_opens is not None:
            self.opens = torch.cat((self._offline_opens, torch.from_numpy(buffer.opens)))
            whole = torch.from_numpy(buffer.episode_returns)
            self.episode_returns = torch.cat((self._offline_episode_returns, whole))
        self.rows = torch.cat((torch.arange(buffer.n_offline), buffer.n_offline + torch.from_numpy(buffer.slots)))
        o = self.config.online
        best = torch.zeros(len(data), dtype=torch.bool)
        best[buffer.n_offline + torch.from_numpy(buffer.best())] = True
        mix = Mix(online, best, o.online_share, o.best_share, self.rows, self.posterior.n_trajectories)
        self.batches = Batches(data, self.normalization, self.held_out, self.config, self.device, mix=mix)

    def begin_at(self, path: Path) -> None:
        """Go on from a checkpoint of training, offline or online: weights, optimiser, units, and the offline chains.

        Raises:
            CheckpointError: of another model, other units of actions, or other offline episodes.
        """
        tensors, state = checkpoint.load(path)
        check_state(state, path, {"step", "config", "obs_dim", "act_dim", "optimizer", "bf16", "device"}, None)
        check_config(state, path, self.config, set(), free={"plan", "online", "train", "posterior"})
        for name in ("obs_dim", "act_dim"):
            if state[name] != getattr(self.spaces, name):
                raise CheckpointError(
                    f"{path}: expected {name} {getattr(self.spaces, name)} as in the environment, "
                    f"the checkpoint has {state[name]}"
                )
        method = Config.from_dict(state["config"]).posterior.method
        if method != self.config.posterior.method:
            raise CheckpointError(
                f"{path}: expected posterior.method {self.config.posterior.method!r}, the checkpoint has {method!r}"
            )
        saved_train = Config.from_dict(state["config"]).train
        for name in ("segment", "segment_returns"):
            saved, mine = getattr(saved_train, name), getattr(self.config.train, name)
            if saved != mine:
                raise CheckpointError(f"{path}: expected train.{name} {mine!r}, the checkpoint has {saved!r}")
        if self.offline is not None and state.get("data_fingerprint") != self._fingerprint():
            raise CheckpointError(f"{path}: the run was trained on other episodes than the data given now")
        own = self.posterior
        b = 0 if self.offline is None else len(self.offline)
        self._take_over_returns(tensors)
        n_saved = len(tensors["posterior.n_draws"]) // 2
        for name, mine in own.tensors.items():
            saved = tensors[f"posterior.{name}"]
            mine[:b], mine[own.n_trajectories :][:b] = saved[:b], saved[n_saved:][:b]
        self._restore_tensors(tensors | {f"posterior.{n}": x for n, x in own.tensors.items()}, state, path)
        self.first_step = self.step
        # A new run: it may be on another device.
        self.model.bf16 = uses_bf16(self.config, self.device)
        self._take_over_split(tensors)
        self._refresh()

    def _take_over_returns(self, tensors: dict[str, Tensor]) -> None:
        """Advantages to the last bit, whatever machine and threads they were made with."""
        if self.offline is None or self.values is None:
            return
        returns = tensors["data.returns"][: len(self.offline)].numpy()
        self.offline = dataclasses.replace(self.offline, returns=returns)
        self._offline_episode_returns = torch.from_numpy(returns)
        self.buffer = EpisodeBuffer(self.offline, self.config.online.capacity, self.config.online.keep_best)

    def _take_over_split(self, tensors: dict[str, Tensor]) -> None:
        """Hold out what the run before did, whatever the seed of this one."""
        if self.offline is None:
            return
        self._offline_usable = tensors["data.usable"][: len(self.offline)].clone()
        held_out = tensors.get("data.held_out")
        if held_out is None:
            # A checkpoint of before it was written down: episodes that the data cut are trained on then.
            held_out = (torch.from_numpy(self.offline.complete) & ~self._offline_usable).nonzero()[:, 0]
        self.held_out = held_out.clone()

    def add(self, explored: Explored) -> None:
        """Keep new episodes, their chains begun at the seeds that made them.

        The first that an untrained model sees give the units of observations.
        """
        if not self.has_episodes and self.step == 0:
            self.normalization = Normalization.fit(explored.episodes)
        worth = self._worth(explored.episodes) if self.config.train.segment else None
        slots = torch.from_numpy(self.buffer.add(explored.episodes, worth, explored.opens, explored.episode_returns))
        kept = slots >= 0
        z0 = torch.from_numpy(explored.z0)[kept].to(self.device)
        self.posterior.begin_at((self.buffer.n_offline + slots[kept]).to(self.device), z0)
        self.n_episodes += int(explored.opens.sum())
        self.env_steps += explored.episodes.num_steps
        self._refresh()
        self._fit_units()

    def _worth(self, new: Trajectories) -> np.ndarray:
        """float64 [b + n], advantages of the online segments that are here and of new ones, under the model as it is:
        what a return is worth that most of all depends on where the segment begins."""
        here = [self.advantages(self.data, self.buffer.n_offline)] if self.buffer.n_online else []
        return torch.cat([*here, self.advantages(new)]).numpy()

    def end_fill(self) -> None:
        """The buffer holds what learning begins with; its steps are no part of the budget."""
        self.filled, self.fill_steps = True, self.env_steps
        self.round += 1
        if self.step == 0:
            # The first few may have come alone, before an environment failed.
            units = Normalization.fit(self.data)
            self.normalization = self.normalization._replace(obs_mean=units.obs_mean, obs_std=units.obs_std)
            self._refresh()

    def _fit_units(self) -> None:
        """Standardise returns as batches hold them, and let the return model say the same in the new units.

        Online returns come to lie ten standard deviations of the offline ones away: their errors would take all of the
        gradient that clipping allows.
        """
        data, weights = self.data, self.batches.shares().numpy() * self.data.complete
        weights /= weights.sum()
        mean = float(weights @ data.returns)
        std = float(np.sqrt(weights @ np.square(data.returns - mean)))
        old = self.normalization
        new = old._replace(return_mean=old.return_mean.new_tensor(mean), return_std=old.return_std.new_tensor(std))
        if not std > SMALLEST_STD:
            return
        self.model.returns.change_units(
            float(old.return_std / new.return_std), float((old.return_mean - new.return_mean) / new.return_std)
        )
        self.normalization = new
        self._refresh()

    def ranking(self) -> Tensor:
        """float64 [B], by which the trajectories are picked that exploit starts from.

        Of segments, whose starts lie anywhere in an episode, their advantages. Of episodes their returns; where the
        return model takes the first state, minus the better of two ranks: by return, and by how far it lies above what
        the model expects of plans from that start, in standard deviations over plans. The best returns alone are those
        of the luckiest starts, whose plans know nothing of the way there.
        """
        if self.opens is not None:
            return self.advantages(self.data)
        returns = torch.from_numpy(self.data.returns)
        if not self.model.returns.uses_first_state:
            return returns
        # Plans as batches hold them.
        share = self.config.online.online_share
        usable = self.usable.nonzero()[:, 0]
        online = usable >= self.buffer.n_offline
        n_online = int(online.sum())
        per_offline, per_online = (1 - share) / max(1, len(usable) - n_online), share / max(1, n_online)
        weights = torch.where(online, per_online, per_offline)
        generator = torch.Generator().manual_seed(self.seed(COMPARED))
        # Where only one kind is there the other's share is nobody's.
        drawn = usable[(weights + 1e-12).multinomial(min(N_COMPARED, len(usable)), generator=generator)]
        units, data = self.batches.normalization, self.data
        starts = units.observations(torch.from_numpy(data.observations[data.cu_seqlens[:-1]]).to(self.device))
        with torch.no_grad():
            z = self.model.prior(self.posterior.z0[self.rows[drawn].to(self.device)])
            expected, _ = self.model.return_moments_of_pairs(z, starts)  # [B, N_COMPARED]
        y = units.returns(returns.to(self.device, torch.float32))
        above = (y - expected.mean(dim=1)) / expected.std(dim=1, correction=0).clamp_min(SMALLEST_SPREAD)
        return -torch.minimum(self._ranks(returns), self._ranks(above.double().cpu()))

    def _ranks(self, values: Tensor) -> Tensor:
        """float64 [B], 0 for the greatest of the usable trajectories."""
        order = torch.where(self.usable, values, -torch.inf).argsort(descending=True, stable=True)
        return torch.empty(len(values), dtype=torch.float64).index_copy_(0, order, torch.arange(len(values)).double())

    def close(self) -> None:
        """End the thread that prepares batches."""
        if hasattr(self, "batches"):
            self.batches.close()

    def next_schedule(self) -> TargetSchedule:
        """The schedule as it is in the next round; it becomes the trainer's own once that round is over.

        Its target is a return. A segment's return mostly tells where it began: there the target is an advantage, asked
        for beyond what the model expects of each start.
        """
        data, schedule = self.data, copy.copy(self.schedule)
        known = data.returns
        if self.opens is not None:
            known = (self.advantages(data) * self.normalization.return_std.double()).numpy()
        schedule.update(known[data.complete].tolist(), self.achieved or None)
        return schedule

    def expected_returns(self, states: np.ndarray | Tensor) -> np.ndarray:
        """float64 [n], mean return in environment units that the model expects of plans of the prior."""
        units = self.normalization
        expected = self.expected(states).double().cpu()
        return (expected * units.return_std.double() + units.return_mean.double()).numpy()

    def seed(self, kind: int) -> int:
        """Of one part of the present round, within [0, SEED_LIMIT)."""
        words = np.random.SeedSequence([self.config.train.seed, kind, self.round])
        return int(words.generate_state(1, np.uint64)[0] % SEED_LIMIT)

    def save(self, run_dir: Path, settle: bool = False) -> Path:
        """Write the checkpoint of the present step and drop those beyond ``keep_checkpoints``."""
        # Of segments the greatest returns, from which planning begins without settled seeds, tell little.
        settle |= self.opens is not None and self.filled
        return self.write(run_dir, *self._whole(settle))

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint of the present step would hold, copied: for :meth:`write`, whatever happens until then."""
        tensors, state = self._whole(settle=False)
        return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}, copy.deepcopy(state)

    def write(self, run_dir: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint and drop those beyond ``keep_checkpoints``."""
        path = checkpoint.checkpoint_path(run_dir, state["step"])
        checkpoint.save(path, tensors, state)
        checkpoint.prune(run_dir, keep_last=self.config.train.keep_checkpoints)
        return path

    def check_finite(self) -> None:
        """Raises :class:`TrainingDivergedError` if a parameter is NaN or infinite, or the plan of a trajectory."""
        for name, value in self.model.named_parameters():
            if not bool(value.isfinite().all()):
                raise TrainingDivergedError(f"update {self.step}: the model's {name} is NaN or infinite")
        lost = self.lost_chains()
        if lost:
            raise TrainingDivergedError(f"update {self.step}: {lost}")

    def lost_chains(self) -> str:
        """Says which trajectories' plans are NaN or infinite; empty where none is."""
        if not self.has_episodes:
            return ""
        z0, n = self.posterior.tensors["z0"], self.posterior.n_trajectories
        wrong = ~(z0[:n].isfinite() & z0[n:].isfinite()).flatten(1).all(dim=1).cpu()
        found = wrong[self.rows].nonzero()[:, 0].tolist()
        if not found:
            return ""
        others = f" and those of {len(found) - 1} others are" if len(found) > 1 else " is"
        i = found[0] - self.buffer.n_offline
        kind = f"online trajectory {self.buffer.born[i]}" if i >= 0 else f"offline trajectory {found[0]}"
        return f"the plan of {kind}{others} NaN or infinite"

    def _whole(self, settle: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and state of a checkpoint."""
        tensors, state = self._tensors(settle and bool(self.usable.any()))
        tensors["data.rows"] = self.rows
        tensors |= {f"online.{name}": torch.from_numpy(array) for name, array in self.buffer.state().items()}
        state["online"] = {
            "round": self.round,
            "in_round": self.in_round,
            "updates_left": self.updates_left,
            "episodes": self.n_episodes,
            "env_steps": self.env_steps,
            "fill_steps": self.fill_steps,
            "filled": self.filled,
            "first_step": self.first_step,
            "target": self.schedule.target,
            "achieved": self.achieved,
            "row": self.row,
        }
        # Of the fixed episodes; the others are in here.
        state["data_fingerprint"] = None if self.offline is None else self._fingerprint()
        return tensors, state

    _known_fingerprint: str | None = None

    def _fingerprint(self) -> str:
        if self._known_fingerprint is None:
            assert self._raw is not None
            self._known_fingerprint = fingerprint(self._raw)
        return self._known_fingerprint

    def restore(self, path: Path) -> None:
        """Take over a checkpoint of this very run.

        Raises:
            CheckpointError: not of an online run, or of other data or another configuration, naming what differs.
        """
        tensors, state = checkpoint.load(path)
        expected = {"step", "config", "obs_dim", "act_dim", "data_fingerprint", "optimizer", "bf16", "device", "online"}
        check_state(state, path, expected, self.device)
        for name, value in (("obs_dim", self.spaces.obs_dim), ("act_dim", self.spaces.act_dim)):
            if state[name] != value:
                raise CheckpointError(f"{path}: expected {name} {value}, the checkpoint has {state[name]}")
        if state["data_fingerprint"] != (None if self.offline is None else self._fingerprint()):
            raise CheckpointError(f"{path}: the run was trained on other offline episodes than those given now")
        # With offline episodes it is theirs, which may bear any name.
        saved_id, env_id = (None, None) if self.offline is not None else (state["env_id"], self.spaces.env_id)
        if saved_id is not None and env_id is not None and not same_task(saved_id, env_id):
            raise CheckpointError(f"{path}: expected environment {env_id!r}, the run to resume has {saved_id!r}")
        check_config(state, path, self.config, MAY_CHANGE, free={"plan"})
        self._restore_tensors(tensors, state, path)
        arrays = {
            name.removeprefix("online."): value.numpy() for name, value in tensors.items() if name.startswith("online.")
        }
        saved = state["online"]
        try:
            self._take_over_returns(tensors)
            self.buffer.load(arrays, self.spaces)
            self._take_over_split(tensors)
            self.round, self.in_round, self.updates_left = saved["round"], saved["in_round"], saved["updates_left"]
            self.env_steps, self.first_step = saved["env_steps"], saved["first_step"]
            self.n_episodes = saved.get("episodes", self.buffer.n_added)
            self.fill_steps, self.filled = saved["fill_steps"], saved["filled"]
            self.schedule.target, self.achieved, self.row = saved["target"], saved["achieved"], saved["row"]
        except (KeyError, DataError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        self._refresh()


def _units_of(spaces: Spaces) -> Normalization:
    """Of an environment of which nothing was seen: only the actions are scaled."""
    low, high = torch.from_numpy(spaces.action_low), torch.from_numpy(spaces.action_high)
    zeros = torch.zeros(spaces.obs_dim)
    return Normalization(zeros, zeros + 1, (high + low) / 2, (high - low) / 2, torch.zeros(()), torch.ones(()))


class _Watched:
    """An actor whose time is taken.

    Attributes:
        seconds: spent acting; parts of a split actor act at the same time and count each.
    """

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._parts: list[_Watched] = []
        self._seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        """Whatever else a rollout uses of an actor that has it: ``z0``, ``device``, ``rest``, ``rewarded``."""
        return getattr(self._actor, name)

    @property
    def seconds(self) -> float:
        return self._seconds + sum(part.seconds for part in self._parts)

    def split(self, sizes: Sequence[int]) -> list[_Watched]:
        self._parts = [_Watched(part) for part in self._actor.split(sizes)]
        return self._parts

    def act(self, obs: np.ndarray) -> np.ndarray:
        begin = time.perf_counter()
        action = self._actor.act(obs)
        self._seconds += time.perf_counter() - begin
        return action


class _Stopped(BaseException):
    """Raised out of a rollout that was asked to stop."""


class _Segments:
    """What is known of the segments of a rollout, by episode and number of segment.

    Args:
        before: number of the first episode.
    """

    def __init__(self, before: int) -> None:
        self._before = before
        self._of: dict[tuple[int, int], tuple[np.ndarray, float, float]] = {}

    def add(self, starts: Starts, plans: Plans) -> None:
        """Plans of segments that begin."""
        assert starts.expected is not None
        z0, predicted = plans.z0.cpu().numpy(), plans.return_mean.cpu().numpy()
        for i, key in enumerate(zip((starts.first + starts.rows).tolist(), starts.segments.tolist(), strict=True)):
            self._of[key] = z0[i], float(predicted[i]), float(starts.expected[i])

    def cut(
        self, result: Rollout, trainer: OnlineTrainer, vectors: Vectors, times: tuple[float, float, float]
    ) -> Explored:
        """The kept episodes, cut where plans began.

        Args:
            times: of planning, of acting, and all of it.
        """
        length, n = trainer.config.train.segment, result.n_kept
        lengths, begins = result.lengths[:n], result.cu_seqlens
        counts = -(-lengths // length)
        episode = np.repeat(np.arange(n), counts)
        segment = np.arange(len(episode)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = begins[episode] + segment * length
        to_go = np.empty(begins[-1])
        assert result.packed_rewards is not None
        for start, stop in itertools.pairwise(begins):
            np.cumsum(result.packed_rewards[start:stop][::-1], out=to_go[start:stop][::-1])
        # The sum in step order.
        to_go[begins[:-1]] = result.returns[:n]
        whole = result.trajectories(vectors[0], trainer.spaces.env_id)
        parts = dataclasses.replace(
            whole, cu_seqlens=np.append(first, begins[-1]), returns=to_go[first], complete=whole.complete[episode]
        )
        whole_returns = start_values = None
        if trainer.values is not None:
            states = torch.from_numpy(whole.observations[first])
            values = trainer.values.value(states, torch.from_numpy(segment * length)).numpy()
            parts = segment_advantages(parts, values, episode)
            whole_returns, start_values = whole.returns, values[segment == 0]
        numbers = self._before + result.numbers[episode]
        known = [self._of[key] for key in zip(numbers.tolist(), segment.tolist(), strict=True)]
        z0, predicted, expected = (np.array(column) for column in zip(*known, strict=True))
        return Explored(parts, z0, predicted, *times, expected, numbers, whole_returns, start_values)


def explore(
    trainer: OnlineTrainer,
    vectors: Vectors,
    plans_for: PlansFor,
    episodes: int,
    action_noise: float,
    on_step: Callable[[int, int], None] | None = None,
    before: int = 0,
) -> Explored:
    """Whole episodes, one plan for each, or one for each of their segments.

    Args:
        action_noise: of the noisiest environment; that of the others is spread evenly.
        before: episodes made with the same seeds before, a multiple of the environments: these are others.
        on_step: as of :func:`gac_fast.rollout.rollout`.

    Raises:
        EnvError: as ``rollout``; its ``explored`` holds what was finished.
        TrainingDivergedError: a plan is NaN or infinite.
    """
    started = time.perf_counter()
    policy = trainer.policy() if trainer.has_episodes else _untrained(trainer)
    length = trainer.config.train.segment
    segments = _Segments(before) if length else None
    predicted = np.zeros(episodes)
    watched: list[_Watched] = []
    planning = time.perf_counter() - started
    anew = 0.0

    def planned(states: np.ndarray | Tensor, first: int, rows: np.ndarray, age: np.ndarray) -> Plans:
        nonlocal planning, anew
        begin = time.perf_counter()
        if segments is None:
            starts = Starts(states, first, rows, np.zeros_like(rows), None)
        else:
            starts = Starts(states, first, rows, age // length, trainer.expected_returns(states))
        plans = plans_for(starts, policy)
        wrong = ~plans.z0.isfinite().flatten(1).all(dim=1).cpu().numpy()
        if wrong.any():
            i = int(wrong.argmax())
            raise TrainingDivergedError(f"step {age[i]}, environment {rows[i]}: the model's plan is NaN or infinite")
        if segments is not None:
            segments.add(starts, plans)
        seconds = time.perf_counter() - begin
        if age.any():
            anew += seconds
        else:
            planning += seconds
        return plans

    def make_actor(obs: np.ndarray, done: int) -> _Watched:
        rows, first = np.arange(len(obs)), before + done
        plans = planned(obs, first, rows, np.zeros_like(rows))
        mine = slice(done, min(done + len(obs), episodes))
        predicted[mine] = plans.return_mean[: mine.stop - mine.start].cpu().numpy()
        seed = trainer.seed(NOISE) + first
        options: dict[str, Any] = {
            "action_noise": action_noise * _levels(seed, len(obs)),
            "seed": seed,
            "noise_correlation": trainer.config.online.noise_correlation,
        }
        if segments is None:
            actor = policy.actor(plans, **options)
        else:
            actor = ReplanningActor(
                policy, plans, length, lambda states, rows, age: planned(states, first, rows, age), **options
            )
        watched.append(_Watched(actor))
        return watched[-1]

    def explored(result: Rollout) -> Explored:
        seconds = time.perf_counter() - started
        # Parts act at the same time: their share of the time is that of one of them.
        acting = (sum(w.seconds for w in watched) - anew) / len(vectors)
        times = planning + anew / len(vectors), acting, seconds
        if segments is not None:
            return segments.cut(result, trainer, vectors, times)
        assert result.z0 is not None
        whole = result.trajectories(vectors[0], trainer.spaces.env_id)
        return Explored(whole, result.z0, predicted[result.numbers], *times)

    try:
        result = rollout(
            vectors,
            make_actor,
            episodes,
            trainer.seed(ENV) + before,
            episodes,
            on_step,
            keep_rewards=segments is not None,
        )
    except EnvError as error:
        if error.finished is not None and error.finished.n_kept:
            error.explored = explored(error.finished)  # type: ignore[attr-defined]
        raise
    return explored(result)


def _levels(seed: int, n: int) -> np.ndarray:
    """n levels spread evenly over (0, 1], in random order."""
    return np.random.default_rng(seed).permutation(np.arange(1, n + 1) / n)


def _untrained(trainer: OnlineTrainer) -> Policy:
    c, device = trainer.config.model, trainer.device
    return Policy(
        trainer.model, trainer.normalization.to(device), trainer.config, trainer.spaces.env_id,
        torch.zeros(1, c.n_z, c.dim, device=device), torch.zeros(1, dtype=torch.float64, device=device),
        torch.zeros(1, trainer.spaces.obs_dim, device=device), torch.ones(1, dtype=torch.bool, device=device),
        trainer.step,
    )  # fmt: skip


def finetune(
    policy: Policy | str | Path | None,
    env: str | VectorEnv[Any, Any, Any] | Sequence[VectorEnv[Any, Any, Any]],
    config: Config | None = None,
    *,
    data: Trajectories | str | Path | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    tensorboard: bool = True,
) -> Path:
    """Improve a policy by acting, and return the folder of the run.

    In rounds: plans are sampled for a target return that follows what was achieved, one per environment; each acts for
    a whole episode; the episodes join the buffer, their posterior chains begun at the seeds that made them; updates
    follow on offline and online episodes. Where ``config.train.segment`` says that trajectories are segments, plans are
    made anew for each, and it is segments that are kept and learnt from. SIGINT and SIGTERM save a checkpoint and stop
    cleanly; ``resume=True`` goes on from the newest checkpoint, on the CPU bit for bit as if it had never stopped.

    Args:
        policy: to begin with: folder of a run, or what :func:`gac_fast.load` returned. None begins with an untrained
            model, whose random plans fill the buffer first.
        env: environment id, or a vector environment of the caller's or several that are run as one (of their
            ``num_envs``, not ``online.n_envs``).
        config: of the run; default that of the policy, or :class:`Config`. The model must be the policy's.
        data: the episodes that the policy was trained on, or what :func:`gac_fast.data.load` takes; default what its
            run recorded. Without any, training is on online episodes alone.
        run_dir: default ``runs/<environment>-online-s<seed>-<time>``.
        resume: go on from the newest checkpoint of ``run_dir``; ``policy`` matters only where there is none yet, and
            ``config`` is that of the run by default.
        overwrite: replace a run that is there.
        progress: show a progress bar.
        tensorboard: write TensorBoard files beside the CSV.

    Raises:
        DataError, ConfigError, CheckpointError, EnvError: what does not fit, named. An environment that failed in the
            middle ends the run so, with the episodes finished until then kept in a checkpoint.
        TrainingDivergedError: a loss, a parameter or a plan became NaN or infinite; what was before is in a checkpoint.
    """
    from gac_fast import envs

    if resume and run_dir is None:
        raise ConfigError("resume: expected run_dir to name the run to resume, got None")
    if resume and config is None and run_dir is not None:
        config = Config.from_dict(read_json(RunDir(Path(run_dir)).config))
    if isinstance(policy, str | Path):
        policy = load(policy)
    if config is None:
        config = policy.config if policy is not None else Config()
    for known in (config, config if policy is None else policy.config):
        if known.baseline.method != "none":
            raise ConfigError(
                f"baseline.method: expected none, as a baseline has no plans to explore with, got "
                f"{known.baseline.method!r}"
            )
    t, online = config.train, config.online
    if policy is not None and policy.config.train.segment_returns != t.segment_returns:
        raise ConfigError(
            f"train.segment_returns: expected {policy.config.train.segment_returns!r} as in the run that is gone on "
            f"from, got {t.segment_returns!r}"
        )
    config = config.replace(plan={"radius": online.radius})
    if t.n_threads:
        torch.set_num_threads(t.n_threads)
    ops.keep_freed_memory()
    # The engine in front of an id is no part of what the run and its policy are named after.
    env_id = envs.resolve_env_id(env) if isinstance(env, str) else None
    folder = Path(run_dir) if run_dir is not None else _default_run_dir(env_id, config)
    source: str | None = None
    if data is None:
        source = _recorded_data(folder if resume else policy)
        data = source
    elif isinstance(data, str | Path):
        source = str(data)
    offline = _load(data, keep_rewards=t.segment > 0)
    if isinstance(env, str) and offline is not None:
        # Now, not at the first evaluation.
        check_task(offline.env_id, env, "the data are of")
    if offline is None and policy is not None and not resume:
        warnings.warn(
            f"fine-tuning {_name(policy) or 'a policy'} without the data it was trained on (data=...): it learns from "
            "online episodes alone",
            stacklevel=2,
        )
    if isinstance(env, str):
        vectors = envs.make_parts(env, num_envs=online.n_envs)
    else:
        vectors = [envs.make_vector(one) for one in (env if isinstance(env, Sequence) else [env])]
    if not vectors:
        raise EnvError("env: expected an environment id or at least one vector environment, got none")
    try:
        spaces = Spaces.of(vectors[0], env_id or (offline.env_id if offline is not None else None))
        _check_spaces(spaces, offline)
        rows = sum(vector.num_envs for vector in vectors)
        parts, what = _most_segments(vectors[0], t.segment), ""
        if parts > 1:
            what = f" of {parts} segments each"
        if online.capacity < online.keep_best + rows * parts:
            raise ConfigError(
                f"online.capacity must be at least online.keep_best + {rows} environments{what}, or a round would drop "
                f"its own episodes, got {online.capacity}"
            )
        begins_at = checkpoint.latest(folder) if resume and checkpoint.list_checkpoints(folder) else None
        values = None if policy is None else policy.values
        if begins_at is not None and has_advantages(config):
            values = ValueModel.of_tensors(checkpoint.load(begins_at)[0])
        trainer = OnlineTrainer(config, spaces, offline, None if values is None else values.to(torch.device("cpu")))
        if begins_at is not None:
            trainer.restore(begins_at)
        elif policy is not None:
            _begin_at(trainer, policy)
            if isinstance(env, str):
                check_fit(policy, env)
        run = start_run(folder, config.to_dict(), overwrite=overwrite, resume=resume)
        merge_result(
            run,
            {
                "env_id": spaces.env_id,
                "engine": envs.engine_of(env) if isinstance(env, str) else None,
                "data": source,
                "begun_at": _name(policy) if not resume else _begun_at(run),
            },
        )
        explores = online.explore == "on"
        with (
            contextlib.closing(trainer),
            Logger(run.path, tensorboard=tensorboard) as logger,
            Progress(
                online.n_steps if explores else online.n_updates,
                "finetune",
                initial=trainer.env_steps if explores else trainer.n_updates,
                disable=not progress,
                unit="step" if explores else "update",
            ) as bar,
            StopSignal() as stop,
        ):
            if resume:
                logger.truncate_after(trainer.step)
            _Loop(trainer, vectors, env, run, logger, bar, stop).run()
    finally:
        if isinstance(env, str):
            for vector in vectors:
                envs.close_vector(vector)
    _write_plots(run)
    return run.path


def _default_run_dir(env_id: str | None, config: Config) -> Path:
    name = (env_id or "env").split("/")[-1].lower()
    return Path("runs") / f"{name}-online-s{config.train.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _recorded_data(run: Path | Policy | None) -> str | None:
    """What a run's ``result.json`` names as its data."""
    if isinstance(run, Policy):
        # <run>/checkpoints/step_<n>
        run = None if run.source is None else run.source.parent.parent
    if run is None or not RunDir(run).result.is_file():
        return None
    value = read_json(RunDir(run).result).get("data")
    return value if isinstance(value, str) else None


def _load(data: Trajectories | str | Path | None, keep_rewards: bool) -> Trajectories | None:
    from gac_fast import data as data_module

    if data is None or isinstance(data, Trajectories):
        return data
    return data_module.load(data, keep_rewards=keep_rewards)


def _check_spaces(spaces: Spaces, offline: Trajectories | None) -> None:
    if offline is None:
        return
    of_data = Spaces.of_data(offline)
    for name in ("obs_dim", "act_dim", "action_low", "action_high"):
        mine, its = getattr(spaces, name), getattr(of_data, name)
        if not np.array_equal(mine, its):
            raise EnvError(f"{spaces.env_id}: expected {name} {its} as in the data, the environment has {mine}")


def _most_segments(vector: VectorEnv[Any, Any, Any], length: int) -> int:
    """Of an episode; 1 where episodes are not cut, or may be of any length."""
    horizon = getattr(vector.spec, "max_episode_steps", None)
    return 1 if length == 0 or horizon is None else -(-horizon // length)


def _begin_at(trainer: OnlineTrainer, policy: Policy) -> None:
    if policy.source is None:
        raise ConfigError("policy: expected one that was loaded from a run, got one that was not")
    trainer.begin_at(policy.source)


def _name(policy: Policy | None) -> str | None:
    return None if policy is None else str(policy.source)


def _begun_at(run: RunDir) -> str | None:
    value: str | None = read_json(run.result).get("begun_at") if run.result.is_file() else None
    return value


class _Loop:
    """Rounds until the budget is used up or a signal asks to stop."""

    def __init__(
        self,
        trainer: OnlineTrainer,
        vectors: Vectors,
        env: str | VectorEnv[Any, Any, Any] | Sequence[VectorEnv[Any, Any, Any]],
        run: RunDir,
        logger: Logger,
        bar: Progress,
        stop: StopSignal,
    ) -> None:
        self.trainer, self.vectors, self.env, self.run_dir = trainer, vectors, env, run
        self.num_envs = sum(vector.num_envs for vector in vectors)
        self.logger, self.bar, self.stop = logger, bar, stop
        self.online = trainer.config.online
        self.explores = self.online.explore == "on"
        self.values: dict[str, Tensor] = {}
        self.learning_seconds = 0.0
        self.saved: tuple[int, int, bool, int] | None = None
        # Where the run last was known to be finite, and the state that it had there.
        self.kept: tuple[tuple[int, int, bool, int], dict[str, Tensor], dict[str, Any]] | None = None

    def run(self) -> None:
        trainer = self.trainer
        try:
            with contextlib.suppress(_Stopped):
                self._rounds()
            if self.stop.requested and trainer.has_episodes and self.saved != self._point:
                self._check(self.values)
                trainer.check_finite()
                self._save()
        except (TrainingDivergedError, FloatingPointError) as error:
            if self.kept is not None and self.saved != self.kept[0]:
                trainer.write(self.run_dir.path, *self.kept[1:])
            lost = trainer.lost_chains()
            more = f"; {lost}" if lost and lost not in str(error) else ""
            raise TrainingDivergedError(
                f"{error}{more}; the last good checkpoint, with all that came before, is {self._last()}"
            ) from error

    def _rounds(self) -> None:
        trainer = self.trainer
        if not trainer.filled:
            self._fill()
        elif checkpoint.list_checkpoints(self.run_dir.path):
            # Just restored.
            self.saved = self._point
        else:
            self._save()
        while not self.finished and not self.stop.requested:
            if not trainer.in_round:
                self._keep()
                self._begin_round()
            self._keep()
            self._learn()
            if trainer.updates_left == 0:
                self._end_round()

    def _keep(self) -> None:
        """Hold on to the state as it is, for a checkpoint should what follows not be finite.

        Raises:
            TrainingDivergedError: it is not itself.
        """
        self.trainer.check_finite()
        self.kept = self._point, *self.trainer.snapshot()

    @property
    def _point(self) -> tuple[int, int, bool, int]:
        """Where the run is."""
        t = self.trainer
        return t.step, t.round, t.in_round, t.buffer.n_added

    def _check(self, values: Mapping[str, float | Tensor]) -> None:
        check_finite(values, self.trainer.step, remedy="online.learning_rate")

    def _save(self, settle: bool = False) -> None:
        self.trainer.save(self.run_dir.path, settle)
        self.saved = self._point

    @property
    def finished(self) -> bool:
        t = self.trainer
        if t.in_round:
            return False
        return t.spent() >= 1

    def _last(self) -> Path | str:
        found = checkpoint.list_checkpoints(self.run_dir.path)
        return found[-1] if found else "none"

    def _explore(self, plans_for: PlansFor, episodes: int, noise: float, before: int = 0) -> Explored:
        """Episodes, added to the buffer; those of a round that failed too.

        Raises:
            EnvError: the environment failed; the message names the checkpoint that holds what was finished.
        """
        trainer = self.trainer
        counted = 0

        def on_step(done: int, steps: int) -> None:
            nonlocal counted
            if self.stop.requested:
                raise _Stopped
            self.bar.update(steps - counted)
            counted = steps

        try:
            explored = explore(trainer, self.vectors, plans_for, episodes, noise, on_step, before)
        except EnvError as error:
            finished: Explored | None = getattr(error, "explored", None)
            if finished is not None:
                trainer.add(finished)
                # The round does not come again: what is left of it would repeat what is kept.
                trainer.round += 1
            try:
                trainer.check_finite()
            except TrainingDivergedError as wrong:
                raise TrainingDivergedError(f"{error}; {wrong}") from error
            if trainer.has_episodes:
                trainer.save(self.run_dir.path)
            number = 0 if finished is None else int(finished.opens.sum())
            raise EnvError(
                f"{error}; {number} finished episodes of this round are kept, go on from {self._last()}"
            ) from error
        trainer.add(explored)
        return explored

    def _fill(self) -> None:
        """Episodes of random plans; those of an untrained model are noisier."""
        trainer, o = self.trainer, self.online
        noise = o.fill_noise if trainer.step == 0 else o.action_noise

        def plans_for(starts: Starts, policy: Policy) -> Plans:
            return _prior_plans(policy, starts, self.num_envs, trainer.seed(PLAN) + starts.first)

        # In parts, each of them in a checkpoint of its own.
        while (missing := o.fill_episodes - trainer.n_episodes) > 0:
            some = min(missing, o.checkpoint_every * self.num_envs)
            self._explore(plans_for, some, noise, trainer.n_episodes)
            if some < missing:
                self._save()
        trainer.end_fill()
        self._save()

    def _begin_round(self) -> None:
        trainer, o = self.trainer, self.online
        trainer.row = {}
        if self.explores:
            schedule = trainer.next_schedule()
            target = schedule.target
            assert target is not None
            raised = _raised(self.num_envs, o.exploit_share)

            def plans_for(starts: Starts, policy: Policy) -> Plans:
                seed = trainer.seed(PLAN) + starts.first
                return _plans(policy, starts, target, raised, trainer.exploring_radius(), seed)

            explored = self._explore(plans_for, self.num_envs, o.action_noise)
            trainer.schedule = schedule
            trainer.row = _summary(explored, target, raised) | {
                "online/kept": trainer.buffer.n_online,
                "online/env_steps": trainer.env_steps,
            }
            # Where nothing was sampled for the target, all that was achieved speaks to it.
            sampled = (raised if raised.all() else ~raised)[explored.episode]
            beyond = 0.0 if explored.expected is None else explored.expected
            trainer.achieved = (explored.episodes.returns - beyond)[sampled].tolist()
        left = o.n_updates - trainer.n_updates if o.n_updates else o.updates_per_round
        trainer.updates_left, trainer.in_round = min(o.updates_per_round, left), True
        self.learning_seconds = 0.0

    def _learn(self) -> None:
        trainer = self.trainer
        started = time.perf_counter()
        while trainer.updates_left and not self.stop.requested:
            self.values, _ = trainer.run_update()
            trainer.updates_left -= 1
            if trainer.step % trainer.config.train.log_every == 0:
                self._check(self.values)
            self.bar.update(0 if self.explores else 1, loss=self.values["loss"])
        self.learning_seconds += time.perf_counter() - started

    def _end_round(self) -> None:
        trainer, o = self.trainer, self.online
        trainer.round, trainer.in_round = trainer.round + 1, False
        row = trainer.row | {name: float(value) for name, value in self.values.items()}
        row["online/round"] = trainer.round
        row["online/updates"] = trainer.n_updates
        self._check(row)
        trainer.check_finite()
        last = self.finished
        seconds = {name: row.pop(f"time/{name}", 0.0) for name in ("env", "planning", "acting")}
        seconds["learning"] = self.learning_seconds
        started = time.perf_counter()
        if last or (o.eval_every and trainer.round % o.eval_every == 0):
            try:
                result = self._evaluate()
            except EnvError as error:
                trainer.save(self.run_dir.path)
                raise EnvError(f"evaluation after round {trainer.round}: {error}; go on from {self._last()}") from error
            row |= {"exploit/achieved": result.mean, "exploit/predicted": float(result.predicted.mean())}
            if len(result.returns) > 1:
                row["exploit/standard_error"] = result.standard_error
            row |= trainer.metrics()
            self.bar.update(0, exploit=result.mean)
            merge_result(self.run_dir, self._result(result))
        seconds["evaluation"] = time.perf_counter() - started
        whole = sum(seconds.values())
        row |= {f"time/{name}": value / max(whole, 1e-9) for name, value in seconds.items()}
        self.logger.log(trainer.step, row)
        trainer.row = {}
        if last or trainer.round % o.checkpoint_every == 0:
            self._save(settle=last)

    def _evaluate(self) -> EvalResult:
        trainer, o = self.trainer, self.online
        return evaluate(trainer.policy(settle=True), self.env, o.eval_episodes, trainer.seed(EVALUATION))

    def _result(self, result: EvalResult) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "env_id": trainer.spaces.env_id,
            "step": trainer.step,
            "rounds": trainer.round,
            "env_steps": trainer.env_steps,
            "episodes": trainer.n_episodes,
            "exploit": result.summary(),
        }


def _summary(explored: Explored, target: float, raised: np.ndarray) -> dict[str, float]:
    """Of a round, for the log; times in seconds.

    Args:
        target: a return, or of segments an advantage.
        raised: bool [episodes], those that acted by exploit's plans.
    """
    opens, expected = explored.opens, explored.expected
    returns, predicted = explored.episodes.returns, explored.predicted
    whole = returns[opens] if explored.whole is None else explored.whole
    start_values = np.zeros(len(whole)) if explored.start_values is None else explored.start_values
    row = {
        "explore/target": target,
        "explore/best": float(whole.max()),
        "online/episodes": int(opens.sum()),
        "online/env_steps_per_second": explored.episodes.num_steps / max(explored.seconds, 1e-9),
        "time/planning": explored.planning_seconds,
        "time/acting": explored.acting_seconds,
        "time/env": max(0.0, explored.seconds - explored.planning_seconds - explored.acting_seconds),
    }
    if expected is not None:
        # What whole episodes were asked for: from their starts.
        row["explore/target"] = float((expected[opens] + start_values).mean()) + target
        row["segments/target"] = target
        row["segments/number"] = len(opens)
    for name, rows in (("explore", ~raised), ("noisy_exploit", raised)):
        if not rows.any():
            continue
        mine = rows[explored.episode]
        row[f"{name}/achieved"] = float(whole[rows[: len(whole)]].mean())
        row[f"{name}/predicted"] = float((predicted[opens] + start_values)[rows[: len(whole)]].mean())
        if expected is not None:
            # Beyond what the model expects of each segment's start.
            row[f"segments/{name}_achieved"] = float((returns - expected)[mine].mean())
            row[f"segments/{name}_predicted"] = float((predicted - expected)[mine].mean())
    return row


def _raised(n: int, share: float) -> np.ndarray:
    """bool [n], which of n environments act by exploit's plans, spread evenly over them."""
    i = np.arange(n)
    return np.floor((i + 1) * share) > np.floor(i * share)


def _plans(policy: Policy, starts: Starts, target: float, raised: np.ndarray, radius: float, seed: int) -> Plans:
    """One for each start: sampled for the target, or by ascent within ``radius``.

    Args:
        target: a return, or of segments what is asked for beyond what is expected.
        raised: bool [num_envs], environments whose plans are exploit's.
    """
    states, n = starts.states, len(starts.rows)
    wanted = target if starts.expected is None else starts.expected + target
    # Later segments of an environment have draws of their own.
    numbers = starts.rows + len(raised) * starts.segments
    plans = policy.explore(n, wanted, states, seed, numbers=numbers)
    better = raised[starts.rows]
    if better.any():
        found = policy.exploit(int(better.sum()), states[better], seed, numbers[better], radius=radius)
        where = torch.from_numpy(np.flatnonzero(better)).to(policy.device)
        plans = Plans(*(getattr(plans, f).index_copy(0, where, getattr(found, f)) for f in Plans.__dataclass_fields__))
    return plans


def _prior_plans(policy: Policy, starts: Starts, num_envs: int, seed: int) -> Plans:
    """Random ones; of segments each has a draw of its own, whichever of them ask at the same time."""
    if starts.expected is None:
        return policy.prior_plans(len(starts.rows), seed)
    c = policy.model.config
    numbers = torch.from_numpy(starts.rows + num_envs * starts.segments).to(policy.device)
    z0 = ops.philox_normal((seed, FILL_KEY), numbers, 0, c.n_z * c.dim).view(-1, c.n_z, c.dim)
    states = policy.normalization.observations(torch.as_tensor(starts.states, device=policy.device))
    return predict(policy.model, policy.normalization, z0, states)


def _write_plots(run: RunDir) -> None:
    from gac_fast import plots

    # A run stopped before its first row has nothing to draw.
    if run.metrics.exists() and len(run.metrics.read_text().splitlines()) > 1:
        run.plots.mkdir(exist_ok=True)
        plots.learning_curves(run.metrics, run.plots / "learning_curves.png")
        if "online/env_steps" in last_metrics(run.metrics):
            plots.online_curves(run.metrics, run.plots / "online.png")
