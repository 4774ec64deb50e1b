"""What offline and online training share: everything that changes during training, and what is done with it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gac_fast import checkpoint
from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.errors import CheckpointError, ConfigError, DataError, GacError
from gac_fast.evaluate import evaluate
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization
from gac_fast.model.values import ValueModel
from gac_fast.policy import Policy, plan_seeds, returns_of_episodes
from gac_fast.posterior import PosteriorState, refine
from gac_fast.train.batches import Batches
from gac_fast.train.metrics import INFERENCE_STEPS, N_COMPARED, held_out_metrics
from gac_fast.train.recorded import RecordedUpdate
from gac_fast.train.update import (
    compiled,
    frozen,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    parts_of,
    records,
    set_learning_rate,
    update,
)
from gac_fast.train.values import has_advantages, segment_advantages, values_of_data

__all__ = [
    "Trainer",
    "TrainingDivergedError",
    "check_config",
    "check_finite",
    "check_state",
    "fingerprint",
    "hold_out",
    "pick_device",
    "replay_seed",
    "split",
    "uses_bf16",
]

MAX_HELD_OUT_MEASURED = 64

# As many as the offline metrics give an episode that they infer from scratch.
SETTLE_STEPS = INFERENCE_STEPS


# What may differ between a run and its resumption, of whichever kind, beside all of plan. None of it changes what an
# update means: n_threads, compile and cuda_graph may change the order of sums, hence last bits.
RESUME_MAY_CHANGE = {
    f"train.{name}" for name in ("log_every", "keep_checkpoints", "n_threads", "prefetch", "compile", "cuda_graph")
}


class TrainingDivergedError(GacError, RuntimeError):
    """A loss became NaN or infinite."""


def uses_bf16(config: Config, device: torch.device) -> bool:
    """Whether the decoder runs under bfloat16 autocast on ``device``."""
    if config.train.bf16 != "auto":
        return config.train.bf16 == "on"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def pick_device(name: str) -> torch.device:
    """Torch device of a configuration; ``auto`` takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: expected auto, cpu or a CUDA device, got {name!r}: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or a CUDA device, got {name!r}")
    return device


class Trainer:
    """Model, optimiser, posterior and data: everything that changes during training, with the means to save it.

    Attributes:
        data: episodes, packed.
        held_out: int64 [h], episodes never trained on.
        usable: bool [B], episodes trained on whose return is known.
        rows: int64 [B], each episode's trajectory in the posterior.
        opens: bool [B], where trajectories are segments: which ones episodes begin with. None: all are episodes.
        episode_returns: float64 [B], where trajectories are segments that return what is to go: of their episodes.
        values: of states, where the returns of segments are advantages.
        step: updates made.
        plans_known: whether chains were moved at all.
    """

    plans_known = False
    data: Trajectories
    held_out: Tensor
    usable: Tensor
    rows: Tensor
    opens: Tensor | None = None
    episode_returns: Tensor | None = None
    values: ValueModel | None = None
    normalization: Normalization
    batches: Batches
    model: GAC
    optimizer: torch.optim.Optimizer
    posterior: PosteriorState

    def __init__(self, config: Config) -> None:
        t = config.train
        self.config = config
        self.device = pick_device(t.device)
        if t.cuda_graph == "on" and self.device.type != "cuda":
            raise ConfigError(f"train.cuda_graph: expected a CUDA device, got {self.device.type}")
        torch.manual_seed(t.seed)
        self.step = 0

    def _make_model(self, obs_dim: int, act_dim: int) -> None:
        self.model = GAC(self.config.model, obs_dim, act_dim).to(self.device)
        self.model.bf16 = uses_bf16(self.config, self.device)
        self.optimizer = make_optimizer(self.model, self.config.train, records(self.config, self.device))

    def _make_update(self) -> None:
        """Last of all: it holds on to the others."""
        parts = parts_of(self.model, self.config)
        if self.config.train.compile == "on":
            parts = compiled(parts)
        posterior = self.posterior if self.config.baseline.method == "none" else None
        self._update = functools.partial(update, self.model, self.optimizer, posterior, config=self.config, parts=parts)
        self._recorded = None
        if records(self.config, self.device):
            may_fail = self.config.train.cuda_graph == "auto"
            self._recorded = RecordedUpdate(self._update, list(self.model.parameters()), may_fail)

    def learning_rate(self) -> float:
        """Of the next update."""
        raise NotImplementedError

    @property
    def infers(self) -> bool:
        """Whether the next update moves the chains."""
        return True

    def run_update(self) -> tuple[dict[str, Tensor], int]:
        """One update: diagnostics (on the device) and the environment time steps it used."""
        set_learning_rate(self.optimizer, self.learning_rate())
        batch, rows = self.batches.draw(self.step)
        infer = self.infers
        values = (self._recorded or self._update)(batch, rows, infer=infer)
        self.plans_known |= infer
        self.step += 1
        return values, self.batches.n_steps

    def measured(self) -> Tensor:
        """int64 [at most 64], held-out trajectories that metrics are of, spread evenly over all."""
        n = min(len(self.held_out), MAX_HELD_OUT_MEASURED)
        return self.held_out[torch.arange(n) * len(self.held_out) // max(1, n)]

    def metrics(self) -> dict[str, float]:
        """Offline metrics of the held-out episodes, ``held_out/<name>``; empty if none are held out."""
        ids = self.measured()
        if len(ids) < 2:
            return {}
        values = held_out_metrics(self.model, self.batches, ids, self.config, seed=self.config.train.seed)
        return {f"held_out/{name}": value for name, value in values.items()}

    def ranking(self) -> Tensor:
        """float64 [B], by which the best trajectories are picked: their returns."""
        return torch.from_numpy(self.data.returns)

    @torch.no_grad()
    def expected(self, observations: np.ndarray | Tensor) -> Tensor:
        """Mean return over plans of the prior that the model expects from states, standardised, on the device [n].

        Args:
            observations: [n, obs_dim] in environment units.
        """
        c = self.config.model
        generator = torch.Generator().manual_seed(self.config.train.seed)
        z0 = torch.randn(N_COMPARED, c.n_z, c.dim, generator=generator).to(self.device)
        if not self.model.returns.uses_first_state:
            return self.model.return_moments(self.model.prior(z0), None)[0].mean().expand(len(observations))
        states = self.normalization.to(self.device).observations(torch.as_tensor(observations, device=self.device))
        return self.model.return_moments_of_pairs(self.model.prior(z0), states)[0].mean(dim=1)

    def advantages(self, data: Trajectories, first: int = 0) -> Tensor:
        """float64 [B - first], how far the returns of trajectories, from number ``first`` on, lie above what the model
        expects from their first states, in standard deviations of the return."""
        y = self.normalization.returns(torch.from_numpy(data.returns[first:])).to(torch.float32)
        return (y - self.expected(data.observations[data.cu_seqlens[first:-1]]).cpu()).double()

    def best_ids(self) -> Tensor:
        """int64 [min(plan.n_best, episodes of known return)], the best training trajectories, best first."""
        n = min(max(1, self.config.plan.n_best), int(self.usable.sum()))
        return torch.where(self.usable, self.ranking(), -torch.inf).argsort(descending=True, stable=True)[:n]

    def best_seeds(self) -> tuple[Tensor, Tensor]:
        """Settled seeds of the best training trajectories, the state of their chains left as it is.

        An update moves only its own batch: on many episodes a chain is moved a few times, some not once. Those that
        planning starts from get :data:`SETTLE_STEPS` posterior steps more.

        Returns:
            trajectories int64 [n] and seeds [n, n_z, D], with n = min(plan.n_best, episodes of known return).
        """
        p = self.config.posterior
        ids = self.best_ids()
        found = []
        for chunk in ids.split(self.config.train.batch_size):
            batch = self.batches.of(chunk, torch.ones(len(chunk), dtype=torch.bool))
            with torch.no_grad():
                trunk = self.model.trunk(batch)
            # As an update moves chains: by the engine where it takes the energy, else by autograd.
            seed_energy = None
            if p.method == "langevin":
                seed_energy = self.model.seed_energy(batch, p.action_temperature, p.return_temperature, trunk)
            energy = functools.partial(
                self.model.energy,
                batch=batch,
                action_temperature=p.action_temperature,
                return_temperature=p.return_temperature,
                trunk=trunk,
            )
            rows = self.rows[chunk].to(self.device)
            with frozen(self.model) if seed_energy is None else contextlib.nullcontext():
                moved, _ = refine(
                    self.posterior, rows, energy, n_steps=SETTLE_STEPS, store=False, seed_energy=seed_energy
                )
            found.append(moved)
        return ids, torch.cat(found)

    def policy(self, settle: bool = False) -> Policy:
        """The present model as a policy; it shares the weights.

        Args:
            settle: plan from :meth:`best_seeds`, as a finished run does.
        """
        ids, seeds = self.best_seeds() if settle else (None, None)
        # The greatest returns, from which planning begins otherwise, tell little of segments.
        first = self.best_ids() if ids is None and self.opens is not None else ids
        rows = self.rows.to(self.device)
        z0, usable = plan_seeds(
            self.posterior.z0[rows],
            self.posterior.tensors["n_draws"][rows],
            self.usable.to(self.device),
            None if ids is None else ids.to(self.device),
            seeds,
        )
        return Policy(
            self.model, self.batches.normalization, self.config, self.data.env_id, z0,
            torch.from_numpy(self.data.returns).to(self.device),
            torch.from_numpy(self.data.observations[self.data.cu_seqlens[:-1]]).to(self.device),
            usable, self.step, None if first is None else first.to(self.device),
            None if self.opens is None else self.opens.to(self.device),
            None if self.values is None else self.values.to(self.device),
            None if self.episode_returns is None else self.episode_returns.to(self.device),
        )  # fmt: skip

    def replay(self, env: str) -> dict[str, float]:
        """Replay of good plans: mean return in ``env`` under the posterior plans of the best training trajectories.

        A plan of a segment says nothing of whole episodes: there it is exploit's plans, as they are made anew.
        """
        n = self.config.train.replay_episodes
        policy = self.policy(settle=True)
        plans = policy.posterior_best(n) if self.opens is None else None
        result = evaluate(policy, env, n, replay_seed(self.config), plans=plans)
        best = policy.best(n).cpu().numpy()
        data = self.data.returns[best]
        if self.values is not None:
            data = data + policy.start_values(self.data.observations[self.data.cu_seqlens[best]])
        return {"replay/best_plans": result.mean, "replay/their_data": float(data.mean())}

    def _tensors(self, settle: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of a checkpoint: what both kinds of training save, tensors and state."""
        tensors: dict[str, Any] = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"posterior.{name}": value for name, value in self.posterior.tensors.items()}
        tensors |= {f"normalization.{name}": value for name, value in self.normalization._asdict().items()}
        optimizer_tensors, optimizer = checkpoint.flatten("optimizer", optimizer_state(self.optimizer))
        tensors |= optimizer_tensors | {
            "data.returns": torch.from_numpy(self.data.returns),
            "data.first_observations": torch.from_numpy(self.data.observations[self.data.cu_seqlens[:-1]]),
            "data.usable": self.usable,
            "data.held_out": self.held_out,
            "rng.torch": torch.get_rng_state(),
        }
        if self.opens is not None:
            tensors["data.opens"] = self.opens
        if self.episode_returns is not None:
            tensors["data.episode_returns"] = self.episode_returns
        if self.values is not None:
            tensors |= self.values.tensors()
        if settle:
            tensors["best.ids"], tensors["best.z0"] = self.best_seeds()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "step": self.step,
            "config": self.config.to_dict(),
            "env_id": self.data.env_id,
            "obs_dim": self.data.obs_dim,
            "act_dim": self.data.act_dim,
            "bf16": self.model.bf16,
            "device": self.device.type,
            "optimizer": optimizer,
        }
        return tensors, state

    def _restore_tensors(self, tensors: dict[str, Tensor], state: dict[str, Any], path: Path) -> None:
        """Take over what :meth:`_tensors` gave.

        Raises:
            CheckpointError: a tensor is missing or of another shape.
        """
        try:
            self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
            self.posterior.load({name: tensors[f"posterior.{name}"] for name in self.posterior.tensors})
            load_optimizer_state(self.optimizer, checkpoint.unflatten(tensors, state["optimizer"]))
            self.normalization = Normalization(*(tensors[f"normalization.{name}"] for name in Normalization._fields))
            torch.set_rng_state(tensors["rng.torch"])
            if self.device.type == "cuda" and state["device"] == "cuda":
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        # As it was decided where the run began: "auto" may mean another thing on this machine.
        self.model.bf16 = state["bf16"]
        if self._recorded is not None:
            self._recorded.forget()
        self.step = state["step"]


def replay_seed(config: Config) -> int:
    """Of the environments of replays: far from the small seeds that evaluations take, whose episodes would otherwise be
    the very ones that chose the checkpoint."""
    return 2**30 + config.train.seed * 8192 % 2**30


def check_state(state: Mapping[str, Any], path: Path, names: set[str], device: torch.device | None) -> None:
    """Refuse a checkpoint whose state lacks an entry, or which was made on another kind of device (None: any will do).

    Raises:
        CheckpointError: naming it.
    """
    if names - state.keys():
        raise CheckpointError(f"{path}: expected {min(names - state.keys())!r} in its state, found no such entry")
    if device is not None and state["device"] != device.type:
        raise CheckpointError(f"{path}: the run was made on {state['device']}, this is {device.type}: set train.device")


def check_config(state: Mapping[str, Any], path: Path, config: Config, may_change: set[str], free: set[str]) -> None:
    """Refuse a checkpoint of another configuration.

    Args:
        may_change: fields ``section.name`` that may differ beside ``RESUME_MAY_CHANGE``.
        free: sections that may.

    Raises:
        CheckpointError: naming the first field that differs.
    """
    # Through Config: a run from before a field existed has that field's default.
    earlier = Config.from_dict(state["config"]).to_dict()
    may_change = may_change | RESUME_MAY_CHANGE
    for section, fields in config.to_dict().items():
        for name, value in fields.items():
            saved = earlier[section][name]
            if saved != value and section not in free and f"{section}.{name}" not in may_change:
                raise CheckpointError(f"{path}: expected {section}.{name} {value!r}, the run to resume has {saved!r}")


def fingerprint(data: Trajectories) -> str:
    """SHA-256 of a data set: every array of it, action bounds included."""
    digest = hashlib.sha256()
    for array in (
        data.cu_seqlens, data.returns, data.complete, data.action_low, data.action_high, data.observations, data.actions
    ):  # fmt: skip
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hold_out(data: Trajectories, config: Config) -> tuple[Tensor, Tensor]:
    """The split of a data set: held-out episodes int64 [h] ascending, and usable ones bool [B].

    Raises:
        DataError: nothing is left to train on.
    """
    t = config.train
    order = torch.from_numpy(np.random.default_rng(t.seed).permutation(len(data)))
    n_held_out = 0 if t.held_out == 0 else max(2, round(t.held_out * len(data)))
    if len(data) - n_held_out < 1:
        raise DataError(f"data: expected more than {n_held_out} episodes, which are held out, got {len(data)}")
    held_out = order[:n_held_out].sort().values
    usable = torch.from_numpy(data.complete).clone()
    usable[held_out] = False
    if not usable.any():
        raise DataError(
            f"data: expected a training episode whose return is known, all {len(data) - n_held_out} were cut"
        )
    return held_out, usable


class Split(NamedTuple):
    """The trajectories of a data set, episodes or their segments."""

    data: Trajectories
    held_out: Tensor
    """int64 [h], ascending."""
    usable: Tensor
    """bool [B], trained on and of known return."""
    opens: Tensor | None
    """bool [B], which ones episodes begin with; None where all are episodes."""
    raw: Trajectories
    """``data`` with the returns to the end of the episode, whatever stands for them there."""

    @property
    def episode_returns(self) -> Tensor | None:
        """float64 [B], of the episodes that the trajectories are parts of; None where they are episodes, or where
        their returns are advantages, which say more of each."""
        if self.opens is None or self.raw is not self.data:
            return None
        return returns_of_episodes(torch.from_numpy(self.data.returns), self.opens)


def split(data: Trajectories, config: Config, values: ValueModel | None = None) -> Split:
    """Cut a data set into segments where the configuration asks for it, and hold out a part.

    Args:
        values: that advantages are over, of the seed of ``config``; needed where returns of segments are advantages.

    Raises:
        DataError: as :func:`hold_out`, or rewards of steps are missing.
    """
    held_out, usable = hold_out(data, config)
    if not config.train.segment:
        return Split(data, held_out, usable, None, data)
    episodes = data
    raw, episode = data.segments(config.train.segment)
    data = raw
    if has_advantages(config):
        assert values is not None
        of_steps = values_of_data(values, episodes, config.train.seed)
        data = segment_advantages(raw, of_steps[raw.cu_seqlens[:-1]], episode)
    # Parts of one episode share what became of it: they are held out together.
    of = torch.from_numpy(episode)
    opens = torch.cat((torch.ones(1, dtype=torch.bool), of[1:] != of[:-1]))
    out = torch.isin(of, held_out)
    return Split(data, out.nonzero().flatten(), torch.from_numpy(data.complete) & ~out, opens, raw)


def check_finite(
    row: Mapping[str, float | Tensor], step: int, checkpoints: Path | None = None, remedy: str = "train.learning_rate"
) -> None:
    """Raises :class:`TrainingDivergedError` naming the first value that is NaN or infinite.

    Args:
        checkpoints: folder of those that are from before; None: whoever catches it names one.
        remedy: a field that is better smaller.
    """
    for name, value in row.items():
        if not math.isfinite(value):
            before = "" if checkpoints is None else f"; the checkpoints in {checkpoints} are from before"
            raise TrainingDivergedError(
                f"update {step}: {name} is {value}{before}; a smaller {remedy} or posterior.step_size usually helps"
            )
