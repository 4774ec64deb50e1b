"""Behaviour cloning and the decision transformer through the trainer of GAC."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gac_fast.baseline import BaselinePolicy
from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.errors import DataError
from gac_fast.evaluate import evaluate
from gac_fast.train.best import REPLAY
from gac_fast.train.metrics import CHUNK
from gac_fast.train.offline import OfflineTrainer

__all__ = ["BaselineTrainer", "episodes_of"]

_log = logging.getLogger(__name__)

# Of GAC's parts, those that stand beside the decoder: nothing trains or reads them here.
WITHOUT_PLANS = {"prior": "identity", "return_hidden": 1, "return_ensemble": 1, "return_context": "none"}


class BaselineTrainer(OfflineTrainer):
    """Trains the decoder alone, its plan held at zero, on the same batches and by the same loss of the actions.

    Args:
        data: all episodes; the decision transformer needs their rewards.
        config: of the run, whose ``baseline.method`` is ``bc`` or ``dt``.

    Attributes:
        data: the episodes learnt from, the return to go behind the observations where there is one.

    Raises:
        DataError: rewards are missing, or no episode is left to learn from.
    """

    def __init__(self, data: Trajectories, config: Config) -> None:
        super().__init__(episodes_of(data, config), config.replace(model=WITHOUT_PLANS))

    def metrics(self) -> dict[str, float]:
        """Of held-out episodes: ``nll_per_step``, in nats, and the mean squared ``action_error``."""
        ids = self.measured()
        if len(ids) == 0:
            return {}
        nll, error, n = 0.0, 0.0, 0
        for chunk in ids.split(CHUNK):
            batch = self.batches.of(chunk)
            z = batch.observations.new_zeros(len(chunk), self.config.model.n_z, self.config.model.dim)
            with torch.no_grad():
                errors = self.model.action_errors(batch, self.model.prior(z))
                nll -= float(self.model.action_log_likelihood(errors).double().sum())
            error += float(errors.double().sum())
            n += len(errors)
        act_dim = self.data.act_dim
        return {"held_out/nll_per_step": nll / n, "held_out/action_error": error / (n * act_dim)}

    def policy(self, settle: bool = False) -> BaselinePolicy:
        """The present model as a policy; it shares the weights."""
        return BaselinePolicy(
            self.model, self.batches.normalization, self.config, self.data.env_id,
            torch.from_numpy(self.data.returns).to(self.device),
            torch.from_numpy(self.data.observations[self.data.cu_seqlens[:-1]]).to(self.device),
            self.usable.to(self.device), self.step,
        )  # fmt: skip

    def replay(self, env: str) -> dict[str, float]:
        """Mean return in ``env``, under the name that it has for GAC: it chooses the best checkpoint."""
        result = evaluate(self.policy(), env, self.config.train.replay_episodes, seed=self.config.train.seed)
        return {REPLAY: result.mean}

    def _tensors(self, settle: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return super()._tensors(settle=False)


def episodes_of(data: Trajectories, config: Config) -> Trajectories:
    """What a baseline learns from: the best episodes where asked for, and the returns to go where they are read.

    A cut episode's return is too small: it is no candidate for the best, and teaches the decision transformer nothing,
    since its returns to go are too small as well. Plain behaviour cloning learns from it.

    Raises:
        DataError: rewards are missing, or every episode was cut.
    """
    method, best = config.baseline.method, config.baseline.best
    if method == "dt" or best < 1:
        whole = np.flatnonzero(data.complete)
        n_cut = len(data) - len(whole)
        if len(whole) == 0:
            raise DataError(f"data: expected an episode whose return is known, all {len(data)} were cut")
        if n_cut:
            _log.warning(
                "%s: %d cut episodes of %d are left out: their returns are too small", method, n_cut, len(data)
            )
        kept = whole
        if best < 1:
            order = np.argsort(-data.returns[whole], kind="stable")
            kept = np.sort(whole[order[: math.ceil(best * len(whole))]])
        if len(kept) < len(data):
            data = data.subset(kept)
    return _with_returns_to_go(data) if method == "dt" else data


def _with_returns_to_go(data: Trajectories) -> Trajectories:
    """The same episodes whose observations end in the return to go."""
    observations = np.empty((data.num_steps, data.obs_dim + 1), np.float32)
    # First, as it is what can be missing.
    observations[:, -1] = data.returns_to_go()
    observations[:, :-1] = data.observations
    return Trajectories(
        observations, data.actions, data.cu_seqlens, data.returns, data.complete,
        data.action_low, data.action_high, data.env_id, data.rewards,
    )  # fmt: skip
