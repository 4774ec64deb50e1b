"""Behaviour cloning and the decision transformer on GAC's decoder: what acts, and how a return is asked for.

Both are the decoder of :mod:`gac_fast.model.decoder` with its plan held at zero, whose keys and values are then learned
constants. The decision transformer reads the return to go, the rewards still to come, as one more number of the state
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gac_fast.act import Actor, Array, HasSeeds
from gac_fast.config import Config
from gac_fast.errors import ConfigError
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization
from gac_fast.plan import Plans
from gac_fast.policy import Policy

__all__ = ["BaselinePolicy", "ReturnActor"]


class ReturnActor(Actor):
    """An :class:`Actor` whose decoder reads the return to go beside each observation.

    It starts at the target of each environment, and :meth:`rewarded` takes off what was earned.

    Args:
        targets: [P], in environment units.
        model, normalization, z0, **options: as for :class:`Actor`; the model's observations are one number longer than
            the environment's.

    Attributes:
        targets: float64 [P].
        to_go: float64 [P], the returns to go that the next actions are chosen by.
    """

    def __init__(
        self, model: GAC, normalization: Normalization, z0: np.ndarray | Tensor, targets: np.ndarray, **options: Any
    ) -> None:
        super().__init__(model, normalization, z0, **options)
        self.targets = self._checked("targets", targets)
        self.to_go = self.targets.copy()
        self._inputs = self._make_inputs(len(self))

    def _make_inputs(self, n_rows: int) -> np.ndarray:
        # Where the model is on a GPU it copies from here.
        shape = (n_rows, self.model.obs_dim)
        return torch.zeros(shape, dtype=torch.float32, pin_memory=self.device.type == "cuda").numpy()

    def _checked(self, name: str, values: np.ndarray) -> np.ndarray:
        values = np.array(values, np.float64)
        if values.shape != (len(self),) or not np.isfinite(values).all():
            raise ValueError(f"{name}: expected {len(self)} finite numbers, got {values}")
        return values

    def reset(
        self, mask: np.ndarray | Tensor | None = None, plans: np.ndarray | Tensor | HasSeeds | None = None
    ) -> None:
        """As :meth:`Actor.reset`; returns to go start anew at the targets, those of ``plans`` if these are
        :class:`Plans`."""
        super().reset(mask, plans)
        rows = np.ones(len(self), np.bool_) if mask is None else torch.as_tensor(mask).cpu().numpy()
        if isinstance(plans, Plans):
            given = plans.return_mean.double().cpu().numpy()
            self.targets = self._checked("plans.return_mean", np.where(rows, given, self.targets))
        self.to_go[rows] = self.targets[rows]

    def rewarded(self, rewards: np.ndarray) -> None:
        """Take the rewards [P] of the last step off the returns to go."""
        self.to_go -= np.asarray(rewards, np.float64)

    def _act(self, obs: Array) -> Array:
        expected = (len(self), self.model.obs_dim - 1)
        if tuple(obs.shape) != expected:
            raise ValueError(f"obs: expected shape {list(expected)}, got {list(obs.shape)}")
        if isinstance(obs, Tensor):
            to_go = torch.as_tensor(self.to_go, dtype=obs.dtype, device=obs.device)
            return super()._act(torch.cat((obs, to_go[:, None]), dim=1))
        self._inputs[:, :-1] = obs
        self._inputs[:, -1] = self.to_go
        return super()._act(self._inputs)

    def split(self, sizes: Sequence[int]) -> list[ReturnActor]:  # type: ignore[override]
        """As :meth:`Actor.split`."""
        parts: list[ReturnActor] = super().split(sizes)  # type: ignore[assignment]
        start = 0
        for part in parts:
            rows = slice(start, start + len(part))
            part.targets, part.to_go = self.targets[rows].copy(), self.to_go[rows].copy()
            part._inputs = self._make_inputs(len(part))
            start = rows.stop
        return parts


class BaselinePolicy(Policy):
    """A trained baseline, for whatever takes a :class:`Policy`.

    It plans nothing: its :class:`Plans` are zero seeds, and say in ``return_mean`` which return the decision
    transformer is asked for; that is NaN for behaviour cloning, which is asked for nothing and predicts nothing.

    Args:
        first_observations: [B, model.obs_dim], as trained on.
        model, normalization, config, env_id, returns, usable, step, opens: as for :class:`Policy`.
    """

    def __init__(
        self, model: GAC, normalization: Normalization, config: Config, env_id: str | None,
        returns: Tensor, first_observations: Tensor, usable: Tensor, step: int = 0, opens: Tensor | None = None,
    ) -> None:  # fmt: skip
        z0 = first_observations.new_zeros(1, config.model.n_z, config.model.dim).expand(len(returns), -1, -1)
        self.method = config.baseline.method
        n = model.obs_dim - (self.method == "dt")
        super().__init__(
            model, normalization, config, env_id, z0, returns, first_observations[:, :n], usable, step, opens=opens
        )

    def __repr__(self) -> str:
        return f"BaselinePolicy({self.method}, {self.env_id or 'unnamed environment'}, step {self.step})"

    @property
    def obs_dim(self) -> int:
        return self.model.obs_dim - (self.method == "dt")

    @property
    def default_target(self) -> float:
        """The greatest return of the episodes trained on, environment units."""
        return float(self.returns[self.best(1)][0])

    def describe(self, plans: str, target: float | None) -> str:
        """As of any policy's own plans; a return that was named as the target."""
        return plans if target is None else f"target {target:g}"

    def _plans(self, n: int, target: float | np.ndarray | Tensor) -> Plans:
        z0 = self.normalization.obs_mean.new_zeros(n, self.config.model.n_z, self.config.model.dim)
        std = 0.0 if self.method == "dt" else float("nan")
        # float64: a target is taken as it was given.
        mean = torch.as_tensor(target, dtype=torch.float64, device=self.device).expand(n).clone()
        return Plans(z0, mean, torch.full_like(mean, std))

    def exploit(
        self,
        n: int,
        obs: np.ndarray | Tensor | None = None,
        seed: int = 0,
        numbers: np.ndarray | Tensor | None = None,
        **overrides: Any,
    ) -> Plans:
        """What the baseline does best: the decision transformer is asked for :attr:`default_target`.

        Args:
            n: number of environments.
            obs, seed, numbers: of no effect.
            overrides: none are known.
        """
        if n < 1:
            raise ValueError(f"n: expected at least 1 plan, got {n}")
        self._plan_config(overrides)
        return self._plans(n, self.default_target if self.method == "dt" else float("nan"))

    def explore(
        self,
        n: int,
        target: float | np.ndarray | Tensor,
        obs: np.ndarray | Tensor | None = None,
        seed: int = 0,
        start: Tensor | None = None,
        numbers: np.ndarray | Tensor | None = None,
        **overrides: Any,
    ) -> Plans:
        """Ask the decision transformer for ``target``, in environment units, one for all or [n].

        Raises:
            ConfigError: behaviour cloning, which cannot be asked; or a target that is not finite.
        """
        if self.method != "dt":
            raise ConfigError(f"target: expected none, as behaviour cloning cannot be asked for a return, got {target}")
        if not bool(torch.as_tensor(target).isfinite().all()):
            raise ConfigError(f"target: expected a finite return, got {target}")
        return self._plans(n, target)

    def posterior_best(self, n: int) -> Plans:
        """Raises :class:`ConfigError`: a baseline has no posterior."""
        raise ConfigError(f"plans: expected exploit, or explore for dt, as a {self.method} run has no posterior plans")

    def prior_plans(self, n: int, seed: int = 0) -> Plans:
        """Raises :class:`ConfigError`: a baseline has no prior."""
        raise ConfigError(f"plans: expected exploit, or explore for dt, as a {self.method} run has no prior")

    def exploiting(
        self, plans: Plans, plan_seed: int = 0, overrides: dict[str, Any] | None = None, **options: Any
    ) -> Actor:
        """As :meth:`actor`: there is nothing to plan anew."""
        return self.actor(plans, **options)

    def actor(
        self,
        plans: Plans | Tensor | np.ndarray,
        action_noise: float | np.ndarray | Tensor = 0.0,
        seed: int = 0,
        bf16: bool | Literal["auto"] = "auto",
        cuda_graph: bool = False,
        noise_correlation: float = 0.0,
    ) -> Actor:
        """An actor for ``len(plans)`` environments; for the decision transformer a :class:`ReturnActor`.

        Raises:
            ValueError: bare seeds where a target is needed.
        """
        options: dict[str, Any] = {
            "action_noise": action_noise, "seed": seed, "bf16": bf16, "cuda_graph": cuda_graph,
            "noise_correlation": noise_correlation,
        }  # fmt: skip
        if self.method != "dt":
            return super().actor(plans, **options)
        if not isinstance(plans, Plans):
            raise ValueError("plans: expected those of exploit or explore, which say the target return, got bare seeds")
        targets = plans.return_mean.double().cpu().numpy()
        return ReturnActor(self.model, self.normalization, plans.z0, targets, **options)
