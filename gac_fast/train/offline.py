"""Offline training: policy evaluation on a fixed set of episodes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gac_fast import checkpoint, ops
from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.errors import CheckpointError, ConfigError, DataError, GacError
from gac_fast.evaluate import check_fit, evaluate
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization
from gac_fast.policy import Policy, plan_seeds
from gac_fast.posterior import PosteriorState, refine
from gac_fast.train.batches import Batches
from gac_fast.train.log import Logger, Progress, RunDir, StopSignal, last_metrics, merge_result, start_run
from gac_fast.train.metrics import INFERENCE_STEPS, held_out_metrics
from gac_fast.train.recorded import RecordedUpdate
from gac_fast.train.update import (
    compiled,
    frozen,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    parts_of,
    set_learning_rate,
    update,
)

__all__ = ["OfflineTrainer", "TrainingDivergedError", "train"]

# What may differ between a run and its resumption beside all of plan. None of it changes what an update means: the
# learning rate falls over n_updates; n_threads, compile and cuda_graph may change the order of sums, hence last bits.
RESUME_MAY_CHANGE = {
    "train.n_updates",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.n_threads",
    "train.prefetch",
    "train.replay_episodes",
    "train.compile",
    "train.cuda_graph",
}

MAX_HELD_OUT_MEASURED = 64

# As many as the offline metrics give an episode that they infer from scratch.
SETTLE_STEPS = INFERENCE_STEPS


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


class OfflineTrainer:
    """Everything that changes during training, with the means to save and restore it exactly.

    Args:
        data: episodes; kept as they are, never copied.
        config: of the run.
    """

    def __init__(self, data: Trajectories, config: Config) -> None:
        t = config.train
        self.config = config
        self.data = data
        self.device = pick_device(t.device)
        if t.cuda_graph == "on" and self.device.type != "cuda":
            raise ConfigError(f"train.cuda_graph: expected a CUDA device, got {self.device.type}")
        torch.manual_seed(t.seed)
        order = torch.from_numpy(np.random.default_rng(t.seed).permutation(len(data)))
        n_held_out = 0 if t.held_out == 0 else max(2, round(t.held_out * len(data)))
        if len(data) - n_held_out < 1:
            raise DataError(f"data: expected more than {n_held_out} episodes, which are held out, got {len(data)}")
        self.held_out = order[:n_held_out].sort().values
        self.usable = torch.from_numpy(data.complete).clone()
        self.usable[self.held_out] = False
        if not self.usable.any():
            raise DataError(
                f"data: expected a training episode whose return is known, all {len(data) - n_held_out} were cut"
            )
        self.normalization = Normalization.fit(data)
        self.batches = Batches(data, self.normalization, self.held_out, config, self.device)
        self.model = GAC(config.model, data.obs_dim, data.act_dim).to(self.device)
        self.model.bf16 = uses_bf16(config, self.device)
        self.optimizer = make_optimizer(self.model, t)
        self.posterior = PosteriorState(
            config.posterior, len(data), config.model.n_z, config.model.dim, t.seed, self.device
        )
        self.step = 0
        parts = parts_of(self.model, config)
        if t.compile == "on":
            parts = compiled(parts)
        self._update = functools.partial(update, self.model, self.optimizer, self.posterior, config=config, parts=parts)
        self._recorded = RecordedUpdate(self._update) if t.cuda_graph == "on" else None

    def run_update(self) -> tuple[dict[str, Tensor], int]:
        """One update: diagnostics (on the device) and the environment time steps it used."""
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config.train))
        batch, rows = self.batches.draw(self.step)
        values = (self._recorded or self._update)(batch, rows)
        self.step += 1
        return values, self.batches.n_steps

    def metrics(self) -> dict[str, float]:
        """Offline metrics of the held-out episodes, ``held_out/<name>``; empty if none are held out."""
        ids = self.held_out[:MAX_HELD_OUT_MEASURED]
        if len(ids) < 2:
            return {}
        values = held_out_metrics(self.model, self.batches, ids, self.config, seed=self.config.train.seed)
        return {f"held_out/{name}": value for name, value in values.items()}

    def best_seeds(self) -> tuple[Tensor, Tensor]:
        """Settled seeds of the best training trajectories, the state of their chains left as it is.

        An update moves only its own batch: on many episodes a chain is moved a few times, some not once. Those that
        planning starts from get :data:`SETTLE_STEPS` posterior steps more.

        Returns:
            trajectories int64 [n] and seeds [n, n_z, D], with n = min(plan.n_best, episodes of known return).
        """
        p = self.config.posterior
        returns = torch.where(self.usable, torch.from_numpy(self.data.returns), -torch.inf)
        n = min(max(1, self.config.plan.n_best), int(self.usable.sum()))
        ids = returns.argsort(descending=True, stable=True)[:n]
        found = []
        for chunk in ids.split(self.config.train.batch_size):
            batch = self.batches.of(chunk, torch.ones(len(chunk), dtype=torch.bool))
            with torch.no_grad():
                trunk = self.model.trunk(batch)
            with frozen(self.model):
                energy = functools.partial(
                    self.model.energy,
                    batch=batch,
                    action_temperature=p.action_temperature,
                    return_temperature=p.return_temperature,
                    trunk=trunk,
                )
                rows = chunk.to(self.device)
                found.append(refine(self.posterior, rows, energy, n_steps=SETTLE_STEPS, store=False)[0])
        return ids, torch.cat(found)

    def policy(self, settle: bool = False) -> Policy:
        """The present model as a policy; it shares the weights.

        Args:
            settle: plan from :meth:`best_seeds`, as a finished run does.
        """
        ids, seeds = self.best_seeds() if settle else (None, None)
        b = len(self.data)
        z0, usable = plan_seeds(
            self.posterior.z0,
            self.posterior.tensors["n_draws"][:b],
            self.usable.to(self.device),
            None if ids is None else ids.to(self.device),
            seeds,
        )
        return Policy(
            self.model, self.batches.normalization, self.config, self.data.env_id, z0,
            torch.from_numpy(self.data.returns).to(self.device),
            torch.from_numpy(self.data.observations[self.data.cu_seqlens[:-1]]).to(self.device),
            usable, self.step,
        )  # fmt: skip

    def replay(self, env: str) -> dict[str, float]:
        """Replay of good plans: mean return in ``env`` under the posterior plans of the best training trajectories."""
        n = self.config.train.replay_episodes
        policy = self.policy(settle=True)
        plans = policy.posterior_best(n)
        result = evaluate(policy, env, n, seed=self.config.train.seed, plans=plans)
        data = self.data.returns[policy.best(n).cpu().numpy()]
        return {"replay/best_plans": result.mean, "replay/their_data": float(data.mean())}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the data set: every array of it, action bounds included."""
        d = self.data
        digest = hashlib.sha256()
        for array in (d.cu_seqlens, d.returns, d.complete, d.action_low, d.action_high, d.observations, d.actions):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, run_dir: Path) -> Path:
        """Write the checkpoint of the present step and drop those beyond ``keep_checkpoints``."""
        tensors: dict[str, Any] = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"posterior.{name}": value for name, value in self.posterior.tensors.items()}
        tensors |= {f"normalization.{name}": value for name, value in self.normalization._asdict().items()}
        optimizer_tensors, optimizer = checkpoint.flatten("optimizer", optimizer_state(self.optimizer))
        tensors |= optimizer_tensors | {
            "data.returns": torch.from_numpy(self.data.returns),
            "data.first_observations": torch.from_numpy(self.data.observations[self.data.cu_seqlens[:-1]]),
            "data.usable": self.usable,
            "rng.torch": torch.get_rng_state(),
        }
        if self.step >= self.config.train.n_updates:
            tensors["best.ids"], tensors["best.z0"] = self.best_seeds()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "step": self.step,
            "config": self.config.to_dict(),
            "env_id": self.data.env_id,
            "obs_dim": self.data.obs_dim,
            "act_dim": self.data.act_dim,
            "data_fingerprint": self.fingerprint,
            "bf16": self.model.bf16,
            "device": self.device.type,
            "optimizer": optimizer,
        }
        path = checkpoint.checkpoint_path(run_dir, self.step)
        checkpoint.save(path, tensors, state)
        checkpoint.prune(run_dir, keep_last=self.config.train.keep_checkpoints)
        return path

    def restore(self, path: Path) -> None:
        """Take over a checkpoint of this very configuration and data.

        Batches follow from seed and step. Checkpoints from before that hold a generator's state, ``rng.batches``, which
        is left unread: such a run goes on with other batches than it would have drawn then.

        Raises:
            CheckpointError: another environment, other data or another configuration, naming what differs.
        """
        tensors, state = checkpoint.load(path)
        expected = {"step", "config", "env_id", "obs_dim", "act_dim", "data_fingerprint", "optimizer", "bf16", "device"}
        if expected - state.keys():
            raise CheckpointError(
                f"{path}: expected {min(expected - state.keys())!r} in its state, found no such entry"
            )
        if state["device"] != self.device.type:
            raise CheckpointError(
                f"{path}: the run was made on {state['device']}, this is {self.device.type}: set train.device"
            )
        mine = {"env_id": self.data.env_id, "obs_dim": self.data.obs_dim, "act_dim": self.data.act_dim}
        for name, value in mine.items():
            if state[name] != value:
                raise CheckpointError(
                    f"{path}: expected {name} {value!r} as in the data, the checkpoint has {state[name]!r}"
                )
        if state["data_fingerprint"] != self.fingerprint:
            raise CheckpointError(f"{path}: the run was trained on other episodes than the data given now")
        # Through Config: a run from before a field existed has that field's default.
        earlier = Config.from_dict(state["config"]).to_dict()
        for section, fields in self.config.to_dict().items():
            for name, value in fields.items():
                saved = earlier[section][name]
                # Planning happens after training.
                free = section == "plan" or f"{section}.{name}" in RESUME_MAY_CHANGE
                if saved != value and not free:
                    raise CheckpointError(
                        f"{path}: expected {section}.{name} {value!r}, the run to resume has {saved!r}"
                    )
        try:
            self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
            self.posterior.load({name: tensors[f"posterior.{name}"] for name in self.posterior.tensors})
            load_optimizer_state(self.optimizer, checkpoint.unflatten(tensors, state["optimizer"]))
            self.normalization = Normalization(*(tensors[f"normalization.{name}"] for name in Normalization._fields))
            torch.set_rng_state(tensors["rng.torch"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        self.batches.close()
        self.batches = Batches(self.data, self.normalization, self.held_out, self.config, self.device)
        # As it was decided where the run began: "auto" may mean another thing on this machine.
        self.model.bf16 = state["bf16"]
        if self._recorded is not None:
            self._recorded.forget()
        self.step = state["step"]


def default_run_dir(data: Trajectories, config: Config) -> Path:
    """``runs/<environment>-s<seed>-<time>``."""
    name = (data.env_id or "data").split("/")[-1].lower()
    return Path("runs") / f"{name}-s{config.train.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def train(
    dataset: Trajectories | str | Path,
    config: Config | None = None,
    run_dir: str | Path | None = None,
    *,
    env: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    tensorboard: bool = True,
) -> Path:
    """Train offline and return the folder of the run.

    SIGINT and SIGTERM save a checkpoint and stop cleanly; ``resume=True`` goes on from the newest checkpoint, on the
    CPU bit for bit as if it had never stopped.

    Args:
        dataset: episodes, or what :func:`gac_fast.data.load` takes (an HDF5 file, a Minari id).
        config: of the run; default :class:`Config`.
        run_dir: default ``runs/<environment>-s<seed>-<time>``.
        env: environment id for the replay of good plans at every ``eval_every``; None leaves it out.
        resume: go on from the newest checkpoint of ``run_dir``.
        overwrite: replace a run that is there.
        progress: show a progress bar.
        tensorboard: write TensorBoard files beside the CSV.

    Raises:
        DataError, ConfigError, CheckpointError: what does not fit, named.
        TrainingDivergedError: a loss became NaN or infinite; the checkpoints saved before remain.
    """
    from gac_fast import data as data_module

    if not isinstance(dataset, Trajectories):
        dataset = data_module.load(dataset)
    config = config or Config()
    t = config.train
    if resume and run_dir is None:
        raise ConfigError("resume: expected run_dir to name the run to resume, got None")
    if t.n_threads:
        torch.set_num_threads(t.n_threads)
    ops.keep_freed_memory()
    trainer = OfflineTrainer(dataset, config)
    if env is not None:
        # Now, not at the first replay, many updates later.
        check_fit(trainer.policy(), env)
    folder = Path(run_dir) if run_dir is not None else default_run_dir(dataset, config)
    if resume:
        trainer.restore(checkpoint.latest(folder))
    run = start_run(folder, config.to_dict(), overwrite=overwrite, resume=resume)
    with (
        contextlib.closing(trainer.batches),
        Logger(run.path, tensorboard=tensorboard) as logger,
        Progress(t.n_updates, "train", initial=trainer.step, disable=not progress) as bar,
        StopSignal() as stop,
    ):
        if resume:
            logger.truncate_after(trainer.step)
        _loop(trainer, run, logger, bar, stop, env)
    merge_result(run, {"env_id": dataset.env_id, "step": trainer.step, "offline": last_metrics(run.metrics)})
    _write_plots(run)
    return run.path


def _loop(
    trainer: OfflineTrainer, run: RunDir, logger: Logger, bar: Progress, stop: StopSignal, env: str | None
) -> None:
    t = trainer.config.train
    steps_since, clock, saved = 0, time.perf_counter(), -1
    values: dict[str, Tensor] = {}
    while trainer.step < t.n_updates and not stop.requested:
        values, n_steps = trainer.run_update()
        steps_since += n_steps
        bar.update(1, n_steps, loss=values["loss"], action_error=values["action_error"])
        step = trainer.step
        last = step == t.n_updates
        row: dict[str, float] = {}
        if step % t.log_every == 0 or last:
            row = {name: float(value) for name, value in values.items()}
            _check_finite(row, step, run)
            elapsed = time.perf_counter() - clock
            row["learning_rate"] = learning_rate(step - 1, t)
            row["time_steps_per_second"] = steps_since / max(elapsed, 1e-9)
            steps_since, clock = 0, time.perf_counter()
        if last or (t.eval_every and step % t.eval_every == 0):
            row |= trainer.metrics()
            if env is not None:
                row |= trainer.replay(env)
            clock, steps_since = time.perf_counter(), 0
        if row:
            logger.log(step, row)
        if last or step % t.checkpoint_every == 0:
            _check_finite(values, step, run)
            trainer.save(run.path)
            saved = step
    if saved != trainer.step:
        _check_finite(values, trainer.step, run)
        trainer.save(run.path)


def _check_finite(row: Mapping[str, float | Tensor], step: int, run: RunDir) -> None:
    for name, value in row.items():
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"update {step}: {name} is {value}; the checkpoints in {run.checkpoints} are from before; "
                "a smaller train.learning_rate or posterior.step_size usually helps"
            )


def _write_plots(run: RunDir) -> None:
    from gac_fast import plots

    # A run stopped before its first row has nothing to draw.
    if run.metrics.exists() and len(run.metrics.read_text().splitlines()) > 1:
        run.plots.mkdir(exist_ok=True)
        plots.learning_curves(run.metrics, run.plots / "learning_curves.png")
