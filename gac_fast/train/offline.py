"""Offline training: policy evaluation on a fixed set of episodes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from gac_fast import checkpoint, ops
from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.errors import CheckpointError, ConfigError
from gac_fast.evaluate import check_fit
from gac_fast.model.normalization import Normalization
from gac_fast.model.values import ValueModel
from gac_fast.posterior import PosteriorState
from gac_fast.train.batches import Batches
from gac_fast.train.best import REPLAY, best_replay
from gac_fast.train.log import (
    Logger,
    Progress,
    RunDir,
    StopSignal,
    check_run_dir,
    last_metrics,
    merge_result,
    read_result,
    start_run,
)
from gac_fast.train.trainer import (
    Trainer,
    TrainingDivergedError,
    check_config,
    check_finite,
    check_state,
    fingerprint,
    hold_out,
    pick_device,
    split,
    uses_bf16,
)
from gac_fast.train.update import learning_rate
from gac_fast.train.values import fit_values, has_advantages

__all__ = ["OfflineTrainer", "TrainingDivergedError", "make_trainer", "pick_device", "train", "uses_bf16"]

# What else may differ between a run and its resumption; the learning rate falls over n_updates.
MAY_CHANGE = {f"train.{name}" for name in ("n_updates", "eval_every", "checkpoint_every", "replay_episodes")}


class OfflineTrainer(Trainer):
    """Training on a fixed set of episodes.

    Args:
        data: episodes; kept as they are, never copied.
        config: of the run.
    """

    def __init__(
        self, data: Trajectories, config: Config, values: ValueModel | None = None, progress: bool = False
    ) -> None:
        super().__init__(config)
        self._settled: tuple[int, tuple[Tensor, Tensor]] | None = None
        if values is None and has_advantages(config):
            values = fit_values(data, config.train.seed, hold_out(data, config)[0].numpy(), progress)
        self.values = values
        parts = split(data, config, values)
        data, self.held_out, self.usable, self.opens, self._raw = parts
        self.episode_returns = parts.episode_returns
        self.data = data
        self.rows = torch.arange(len(data))
        self.normalization = Normalization.fit(data)
        self.batches = Batches(data, self.normalization, self.held_out, config, self.device)
        self._make_model(data.obs_dim, data.act_dim)
        n_chains = len(data) if config.baseline.method == "none" else 0
        self.posterior = PosteriorState(
            config.posterior, n_chains, config.model.n_z, config.model.dim, config.train.seed, self.device
        )
        self._make_update()

    def learning_rate(self) -> float:
        return learning_rate(self.step, self.config.train)

    @property
    def infers(self) -> bool:
        """As :attr:`Trainer.infers`: from where ``posterior.warmup`` says, and in a run made longer ever after."""
        t = self.config.train
        return self.plans_known or self.step >= min(round(self.config.posterior.warmup * t.n_updates), t.n_updates - 1)

    def best_seeds(self) -> tuple[Tensor, Tensor]:
        """As :meth:`Trainer.best_seeds`, once per step: a replay and the checkpoint of it need the same ones."""
        if self._settled is None or self._settled[0] != self.step:
            self._settled = self.step, super().best_seeds()
        return self._settled[1]

    def ranking(self) -> Tensor:
        """float64 [B], by which the trajectories are picked that exploit starts from.

        Their returns; of segments, whose starts lie anywhere in an episode, how far these are above what the model
        expects of plans from that start (where it takes the first state).
        """
        if self.opens is None or not self.model.returns.uses_first_state:
            return torch.from_numpy(self.data.returns)
        return self.advantages(self.data)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the data set: every array of it, action bounds included."""
        return fingerprint(self._raw)

    def save(self, run_dir: Path, settle: bool = False, keep: Collection[int] = ()) -> Path:
        """Write the checkpoint of the present step and drop those beyond ``keep_checkpoints``.

        Args:
            settle: with settled seeds to plan from, as a finished run has them anyway.
            keep: steps whose checkpoints stay all the same.
        """
        # Without settled seeds planning begins at the greatest returns, which tell little of segments.
        settle = settle or self.opens is not None or self.step >= self.config.train.n_updates
        tensors, state = self._tensors(settle)
        path = checkpoint.checkpoint_path(run_dir, self.step)
        checkpoint.save(path, tensors, {**state, "data_fingerprint": self.fingerprint})
        checkpoint.prune(run_dir, keep_last=self.config.train.keep_checkpoints, keep=keep)
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
        check_state(state, path, expected, self.device)
        mine = {"env_id": self.data.env_id, "obs_dim": self.data.obs_dim, "act_dim": self.data.act_dim}
        for name, value in mine.items():
            if state[name] != value:
                raise CheckpointError(
                    f"{path}: expected {name} {value!r} as in the data, the checkpoint has {state[name]!r}"
                )
        if state["data_fingerprint"] != self.fingerprint:
            raise CheckpointError(f"{path}: the run was trained on other episodes than the data given now")
        # Planning happens after training, and so does what is online.
        check_config(state, path, self.config, MAY_CHANGE, free={"plan", "online"})
        self._restore_tensors(tensors, state, path)
        self.plans_known = bool((self.posterior.tensors["n_draws"] > 1).any())
        # Advantages to the last bit, whatever machine and threads they were made with.
        self.data = dataclasses.replace(self.data, returns=tensors["data.returns"].numpy())
        self._settled = None
        self.batches.close()
        self.batches = Batches(self.data, self.normalization, self.held_out, self.config, self.device)


def make_trainer(
    data: Trajectories, config: Config, values: ValueModel | None = None, progress: bool = False
) -> OfflineTrainer:
    """Of GAC, or of the baseline that ``config`` names.

    Args:
        values: of a run that is resumed, if it has some; None fits them where they are needed.
        progress: show how far that is.
    """
    if config.baseline.method == "none":
        return OfflineTrainer(data, config, values, progress)
    from gac_fast.train.baseline import BaselineTrainer

    return BaselineTrainer(data, config)


def default_run_dir(data: Trajectories, config: Config) -> Path:
    """``runs/<environment>-s<seed>-<time>``, a baseline's method before the seed."""
    name = (data.env_id or "data").split("/")[-1].lower()
    if config.baseline.method != "none":
        name += f"-{config.baseline.method}"
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
        config: of the run; default :class:`Config`. Where it names a baseline, that is trained in place of GAC, and
            the parts of its model that a baseline does not have are made as small as can be.
        run_dir: default ``runs/<environment>-s<seed>-<time>``.
        env: environment id for the replay of good plans at every ``eval_every``; None leaves it out. The checkpoint
            of the best replay so far is kept beside the newest ones.
        resume: go on from the newest checkpoint of ``run_dir``.
        overwrite: replace a run that is there.
        progress: show a progress bar.
        tensorboard: write TensorBoard files beside the CSV.

    Raises:
        DataError, ConfigError, CheckpointError: what does not fit, named.
        TrainingDivergedError: a loss became NaN or infinite; the checkpoints saved before remain.
    """
    from gac_fast import data as data_module

    source = None if isinstance(dataset, Trajectories) else str(dataset)
    config = config or Config()
    if not isinstance(dataset, Trajectories):
        dataset = data_module.load(dataset, keep_rewards=config.baseline.method == "dt" or config.train.segment > 0)
    t = config.train
    if resume and run_dir is None:
        raise ConfigError("resume: expected run_dir to name the run to resume, got None")
    if run_dir is not None:
        # Before values are fitted, and whatever else takes its time.
        check_run_dir(run_dir, overwrite=overwrite, resume=resume)
    if t.n_threads:
        torch.set_num_threads(t.n_threads)
    ops.keep_freed_memory()
    values = None
    if run_dir is not None and resume and has_advantages(config):
        values = ValueModel.of_tensors(checkpoint.load(checkpoint.latest(Path(run_dir)))[0])
    trainer = make_trainer(dataset, config, values, progress)
    dataset, config = trainer.data, trainer.config
    _warn_of_cut_history(config)
    if env is not None:
        # Now, not at the first replay, many updates later.
        check_fit(trainer.policy(), env)
    folder = Path(run_dir) if run_dir is not None else default_run_dir(dataset, config)
    if resume:
        trainer.restore(checkpoint.latest(folder))
    run = start_run(folder, config.to_dict(), overwrite=overwrite, resume=resume)
    # What a run that did not come to its end took is not known.
    before, started = read_result(run).get("train_seconds") if resume else 0.0, time.perf_counter()
    merge_result(run, {"train_seconds": None})
    with (
        contextlib.closing(trainer.batches),
        Logger(run.path, tensorboard=tensorboard) as logger,
        Progress(t.n_updates, "train", initial=trainer.step, disable=not progress) as bar,
        StopSignal() as stop,
    ):
        if resume:
            logger.truncate_after(trainer.step)
        _loop(trainer, run, logger, bar, stop, env)
    seconds = None if before is None else round(before + time.perf_counter() - started, 1)
    merge_result(run, {"train_seconds": seconds, **({} if source is None else {"data": source})})
    merge_result(run, {"env_id": dataset.env_id, "step": trainer.step, "offline": last_metrics(run.metrics)})
    _write_plots(run)
    return run.path


def _warn_of_cut_history(config: Config) -> None:
    """Segments suit decoders of the present state alone; others are told."""
    m, length = config.model, config.train.segment
    if length and (m.window > 1 or m.context != "states"):
        warnings.warn(
            f"train.segment = {length} with model.window = {m.window} and model.context = {m.context!r}: the first "
            "steps of a segment are learnt without what came before them in their episode, which the decoder sees when "
            "it acts; with model.window = 1 and model.context = 'states' there is no difference",
            stacklevel=3,
        )


def _loop(
    trainer: OfflineTrainer, run: RunDir, logger: Logger, bar: Progress, stop: StopSignal, env: str | None
) -> None:
    t = trainer.config.train
    steps_since, clock, saved = 0, time.perf_counter(), -1
    values: dict[str, Tensor] = {}
    best = best_replay(run)
    while trainer.step < t.n_updates and not stop.requested:
        values, n_steps = trainer.run_update()
        steps_since += n_steps
        bar.update(1, n_steps, loss=values["loss"], action_error=values["action_error"])
        step = trainer.step
        last = step == t.n_updates
        row: dict[str, float] = {}
        if step % t.log_every == 0 or last:
            row = {name: float(value) for name, value in values.items()}
            check_finite(row, step, run.checkpoints)
            elapsed = time.perf_counter() - clock
            row["learning_rate"] = learning_rate(step - 1, t)
            row["time_steps_per_second"] = steps_since / max(elapsed, 1e-9)
            steps_since, clock = 0, time.perf_counter()
        if last or (t.eval_every and step % t.eval_every == 0):
            row |= trainer.metrics()
            # Before there are plans there is nothing to replay.
            if env is not None and (trainer.plans_known or trainer.config.baseline.method != "none"):
                row |= trainer.replay(env)
                if best is None or row[REPLAY] > best[1]:
                    best = step, row[REPLAY]
            clock, steps_since = time.perf_counter(), 0
        if row:
            logger.log(step, row)
        is_best = best is not None and best[0] == step
        if last or is_best or step % t.checkpoint_every == 0:
            check_finite(values, step, run.checkpoints)
            # The best one as it was replayed, with settled seeds; it stays until a better one comes.
            trainer.save(run.path, settle=is_best, keep=() if best is None else best[:1])
            saved = step
    if saved != trainer.step:
        check_finite(values, trainer.step, run.checkpoints)
        trainer.save(run.path, keep=() if best is None else best[:1])


def _write_plots(run: RunDir) -> None:
    from gac_fast import plots

    # A run stopped before its first row has nothing to draw.
    if run.metrics.exists() and len(run.metrics.read_text().splitlines()) > 1:
        run.plots.mkdir(exist_ok=True)
        plots.learning_curves(run.metrics, run.plots / "learning_curves.png")
