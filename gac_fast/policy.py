"""What :func:`gac_fast.load` returns: model, units and posterior seeds, and the ways to plan and act with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gac_fast import checkpoint
from gac_fast import plan as planning
from gac_fast.act import Actor, Array, HasSeeds
from gac_fast.config import Config, PlanConfig
from gac_fast.errors import CheckpointError, ConfigError
from gac_fast.model import GAC
from gac_fast.model.normalization import Normalization
from gac_fast.model.values import ValueModel
from gac_fast.plan import Plans

__all__ = ["ExploitActor", "PlansAnew", "Policy", "ReplanningActor", "load"]

# Starts over which plans for unknown first states are averaged.
N_STARTS = 16


class Policy:
    """A trained joint model, ready for inference.

    Attributes:
        model: the joint model, in evaluation mode.
        normalization: units.
        config: of the run.
        env_id: environment the data came from, or None.
        z0: [B, n_z, D] posterior seeds of the training trajectories.
        returns: float64 [B], their returns in environment units.
        first_observations: [B, obs_dim], in environment units.
        usable: bool [B], episodes that were trained on, whose return is known and whose chain was moved at all.
        step: parameter updates made.
        opens: bool [B], trajectories that an episode begins with: all, unless they are segments.
        episode_returns: float64 [B], of the episodes that the trajectories are parts of; their own, unless they are
            segments that return what is to go.
        candidates: int64 [n], trajectories whose seeds exploit starts from, best first: those given, then all other
            usable ones by return.
        values: of states, where returns are advantages of segments: what plans are said to return is beyond the value
            of the state they begin at. None: it is all of it.
        source: folder of the checkpoint it was loaded from; None for one that was not.
    """

    source: Path | None = None

    def __init__(
        self, model: GAC, normalization: Normalization, config: Config, env_id: str | None,
        z0: Tensor, returns: Tensor, first_observations: Tensor, usable: Tensor, step: int = 0,
        candidates: Tensor | None = None, opens: Tensor | None = None,
        values: ValueModel | None = None, episode_returns: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model = model.eval()
        self.normalization = normalization
        self.config = config
        self.env_id = env_id
        self.z0, self.returns, self.first_observations, self.usable = z0, returns, first_observations, usable
        self.step = step
        self._direction: Tensor | None = None
        self._average: tuple[float, Tensor] | None = None
        self.episode_returns = returns if episode_returns is None else episode_returns
        self.values = values
        self.opens = torch.ones_like(usable) if opens is None else opens
        found = usable & self.opens
        found = found if bool(found.any()) else usable
        order = torch.where(found, returns, -torch.inf).argsort(descending=True, stable=True)
        self._best = order[: int(found.sum())]
        self.candidates = self._best
        if candidates is not None:
            self.candidates = torch.cat((candidates, self._best[~torch.isin(self._best, candidates)]))

    def __repr__(self) -> str:
        return f"Policy({self.env_id or 'unnamed environment'}, {len(self.returns)} trajectories, step {self.step})"

    @property
    def device(self) -> torch.device:
        return self.normalization.obs_mean.device

    @property
    def obs_dim(self) -> int:
        """Of the environment's observations."""
        return self.model.obs_dim

    def describe(self, plans: str, target: float | None) -> str:
        """A name for how it acted: the kind of ``plans``, with the return asked for where there was one."""
        return plans if target is None else f"{plans} {target:g}"

    def start_values(self, obs: np.ndarray | Tensor) -> np.ndarray:
        """float64 [n], what the predicted returns of plans for the first states ``obs`` [n, obs_dim], in environment
        units, leave out: their values, or 0."""
        if self.values is None:
            return np.zeros(len(obs))
        x = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.values.value(x, torch.zeros(len(x), device=self.device)).cpu().numpy()

    def _plan_config(self, overrides: dict[str, Any]) -> PlanConfig:
        return self.config.replace(plan=overrides).plan

    def _starts(self, n: int, obs: np.ndarray | Tensor | None, seed: int) -> Tensor | None:
        """Normalised first states: [n, 1, obs_dim] of given ones, else [G, obs_dim] of the data's."""
        if obs is not None:
            x = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
            if x.shape != (n, self.model.obs_dim):
                raise ValueError(f"obs: expected shape [{n}, {self.model.obs_dim}], got {list(x.shape)}")
            if not bool(torch.isfinite(x).all()):
                raise ValueError("obs: expected finite values, got NaN or infinity")
        if not self.model.returns.uses_first_state:
            return None
        if obs is not None:
            return self.normalization.observations(x)[:, None]
        generator = torch.Generator().manual_seed(seed)
        starts = self.first_observations if bool(self.opens.all()) else self.first_observations[self.opens]
        rows = torch.randperm(len(starts), generator=generator)[:N_STARTS]
        return self.normalization.observations(starts[rows])

    def exploit(
        self,
        n: int,
        obs: np.ndarray | Tensor | None = None,
        seed: int = 0,
        numbers: np.ndarray | Tensor | None = None,
        **overrides: Any,
    ) -> Plans:
        """Plans for high expected return, by ascent from the best trajectories' posterior seeds and prior samples; or
        along the regression of returns on all posterior seeds, or one plan, the average of all posterior seeds by
        what their episodes returned, both whatever the start, where ``plan.method`` says so.

        Args:
            n: number of plans P.
            obs: [n, obs_dim] first observations in environment units; row i then gets the best plan for its own start
                (used where the return model takes the first state), as ``evaluate`` does it. None plans for the data's
                starts on average and repeats the ``n_keep`` best plans.
            seed: of the prior samples.
            numbers: int64 [n], by regression: which of the samples of ``seed`` are theirs; None: 0 to n - 1.
            overrides: fields of :class:`PlanConfig`, such as ``n_steps=200`` or ``kappa=0.5``.
        """
        _check_count(n)
        config = self._plan_config(overrides)
        if config.method == "regression":
            # No start matters here; one that does not fit is refused all the same.
            self._starts(n, obs, seed)
            rows = None if numbers is None else torch.as_tensor(numbers, device=self.device)
            direction = self.regression_direction()
            return planning.along(self.model, self.normalization, direction, n, config.radius, seed, rows)
        if config.method == "average":
            starts = self._per_plan(n, self._starts(n, obs, seed))
            one = self.average_seed(config.average_temperature)
            return planning.predict(self.model, self.normalization, one.repeat(n, 1, 1), starts)
        seeds = self.z0[self.candidates[: config.n_best]]
        return planning.exploit(self.model, self.normalization, seeds, n, config, self._starts(n, obs, seed), seed=seed)

    def regression_direction(self) -> Tensor:
        """Unit vector [n_z, D] along which the returns of the training trajectories grow with their posterior seeds."""
        if self._direction is None:
            self._direction = planning.regression_direction(self.z0[self.usable], self.returns[self.usable])
        return self._direction

    def average_seed(self, temperature: float) -> Tensor:
        """[1, n_z, D], the average posterior seed of the training trajectories by what their episodes returned."""
        if self._average is None or self._average[0] != temperature:
            rows = self.usable & ~self.episode_returns.isnan()
            one = planning.average_seed(self.z0[rows], self.episode_returns[rows], temperature)
            self._average = temperature, one[None]
        return self._average[1]

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
        """Plans sampled from p(z0 | y = target).

        Args:
            n: number of plans P.
            target: wanted return in environment units, one for all or [n]; where returns are advantages, that beyond
                the values of the starts.
            obs: [n, obs_dim] first observations, as in :meth:`exploit`.
            seed: of the samples.
            start: [n, n_z, D] seeds that sampling starts from; None draws them from the prior.
            numbers: int64 [n], which of the draws of ``seed`` are theirs, so that plans asked for apart are other ones;
                None: 0 to n - 1.
            overrides: fields of :class:`PlanConfig`.

        Raises:
            ConfigError: a target is not finite, or its square in the model's units is not.
        """
        _check_count(n)
        wanted = torch.as_tensor(target, dtype=torch.float64, device=self.device).float()
        if wanted.shape not in ((), (n,)):
            raise ValueError(f"target: expected a number or shape [{n}], got {list(wanted.shape)}")
        # The energy squares it.
        if not bool(torch.isfinite(self.normalization.returns(wanted).square()).all()):
            raise ConfigError(f"target: expected a finite return, also when squared in float32, got {target}")
        starts = self._per_plan(n, self._starts(n, obs, seed))
        rows = None if numbers is None else torch.as_tensor(numbers, device=self.device)
        return planning.explore(
            self.model, self.normalization, n, wanted, self._plan_config(overrides), starts, seed=seed, start=start,
            numbers=rows,
        )  # fmt: skip

    def best(self, n: int) -> Tensor:
        """Numbers of the n best training trajectories whose return is known, int64 [n], best first; they repeat."""
        _check_count(n)
        return self._best[torch.arange(n, device=self._best.device) % len(self._best)]

    def posterior_best(self, n: int) -> Plans:
        """Posterior plans of the n best training trajectories, best first; they repeat if there are fewer."""
        rows = self.best(n)
        return self._predict(self.z0[rows], self.first_observations[rows])

    def prior_plans(self, n: int, seed: int = 0) -> Plans:
        """Plans drawn from the prior."""
        _check_count(n)
        generator = torch.Generator().manual_seed(seed)
        shape = (n, self.model.config.n_z, self.model.config.dim)
        return self._predict(torch.randn(shape, generator=generator).to(self.device), None)

    def _per_plan(self, n: int, starts: Tensor | None) -> Tensor | None:
        return starts if starts is None or starts.ndim == 3 else starts.expand(n, *starts.shape)

    def _predict(self, z0: Tensor, obs: Tensor | None) -> Plans:
        starts = self._per_plan(len(z0), self._starts(len(z0), obs, 0))
        return planning.predict(self.model, self.normalization, z0, starts)

    def actor(
        self,
        plans: Plans | Tensor | np.ndarray,
        action_noise: float | np.ndarray | Tensor = 0.0,
        seed: int = 0,
        bf16: bool | Literal["auto"] = "auto",
        cuda_graph: bool = False,
        noise_correlation: float = 0.0,
    ) -> Actor:
        """An :class:`Actor` for ``len(plans)`` environments, plan i acting in environment i.

        Args:
            plans: or their seeds, [P, n_z, D].
            action_noise, seed, bf16, cuda_graph, noise_correlation: as for :class:`Actor`.
        """
        z0 = plans.z0 if isinstance(plans, Plans) else plans
        return Actor(self.model, self.normalization, z0, action_noise, seed, bf16, cuda_graph, noise_correlation)

    def exploiting(
        self, plans: Plans, plan_seed: int = 0, overrides: dict[str, Any] | None = None, **options: Any
    ) -> Actor:
        """An actor that begins with ``plans`` of :meth:`exploit`, follows them as far as ``plan.strength`` says, and
        plans anew as ``plan.replan_every`` does.

        Args:
            plans: one per environment.
            plan_seed: of planning.
            overrides: fields of :class:`PlanConfig`.
            options: as for :meth:`actor`.
        """
        overrides = overrides or {}
        config = self._plan_config(overrides)
        every, options = config.replan_every, {"strength": config.strength} | options
        if every == 0:
            return Actor(self.model, self.normalization, plans.z0, **options)
        return ExploitActor(self, plans, every, plan_seed, overrides, **options)


PlansAnew = Callable[[Tensor, np.ndarray, np.ndarray], Plans]
"""(states [m, obs_dim] in environment units, their environments int64 [m], time steps of their episodes int64 [m]) ->
m plans."""


class ReplanningActor(Actor):
    """An :class:`Actor` that gets a plan for the state at hand every so many steps of an episode.

    Args:
        policy: gives model and units.
        plans: of the first steps, one per environment.
        every: time steps that a plan is followed for, at least 1.
        plan_anew: asked for the plans to go on with. Parts of a split actor ask at the same time, each for
            environments of its own.
        **options: as for :class:`Actor`.

    Attributes:
        age: int64 [P], time steps of the present episode so far.
    """

    def __init__(self, policy: Policy, plans: Plans | Tensor, every: int, plan_anew: PlansAnew, **options: Any) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1 time step, got {every}")
        super().__init__(policy.model, policy.normalization, plans.z0 if isinstance(plans, Plans) else plans, **options)
        self.every, self.plan_anew = every, plan_anew
        self.age = np.zeros(len(self), np.int64)
        self._planned = np.ones(len(self), np.bool_)
        self._rests = np.zeros(len(self), np.bool_)
        # Of the actor that this one is a part of.
        self._first_row = 0

    def reset(
        self, mask: np.ndarray | Tensor | None = None, plans: np.ndarray | Tensor | HasSeeds | None = None
    ) -> None:
        """As :meth:`Actor.reset`; without ``plans`` the next step plans for the start that it is shown."""
        super().reset(mask, plans)
        rows = np.ones(len(self), np.bool_) if mask is None else torch.as_tensor(mask).cpu().numpy()
        self.age[rows], self._planned[rows] = 0, plans is not None
        self._rests[:] = False

    def rest(self, mask: np.ndarray | Tensor) -> None:
        """As :meth:`Actor.rest`; nothing is planned for these either."""
        super().rest(mask)
        self._rests |= torch.as_tensor(mask).cpu().numpy()

    def _act(self, obs: Array) -> Array:
        due = np.flatnonzero((((self.age > 0) & (self.age % self.every == 0)) | ~self._planned) & ~self._rests)
        if len(due):
            rows = torch.from_numpy(due).to(self.device)
            states = torch.as_tensor(obs, device=self.device)[rows]
            z0 = self.z0.clone()
            z0[rows] = self.plan_anew(states, due + self._first_row, self.age[due]).z0
            mask = torch.zeros(len(self), dtype=torch.bool, device=self.device)
            mask[rows] = True
            self.change_plans(z0, mask)
            self._planned[due] = True
        actions = super()._act(obs)
        self.age += 1
        return actions

    def split(self, sizes: Sequence[int]) -> list[ReplanningActor]:  # type: ignore[override]
        """As :meth:`Actor.split`."""
        parts: list[ReplanningActor] = super().split(sizes)  # type: ignore[assignment]
        for part, start in zip(parts, np.cumsum(sizes) - sizes, strict=True):
            rows = slice(start, start + len(part))
            part.age, part._rests = self.age[rows].copy(), self._rests[rows].copy()
            part._planned = self._planned[rows].copy()
            part._first_row = self._first_row + int(start)
        return parts


class ExploitActor(ReplanningActor):
    """A :class:`ReplanningActor` whose plans are those of :meth:`Policy.exploit`.

    Args:
        policy: plans, and gives model and units.
        plans: of the first steps, one per environment.
        every: time steps that a plan is followed for, at least 1.
        plan_seed: of planning.
        overrides: fields of :class:`PlanConfig`.
        **options: as for :class:`Actor`.
    """

    def __init__(
        self, policy: Policy, plans: Plans, every: int, plan_seed: int, overrides: dict[str, Any], **options: Any
    ) -> None:
        def plan_anew(states: Tensor, rows: np.ndarray, age: np.ndarray) -> Plans:
            return policy.exploit(len(rows), states, plan_seed, **overrides)

        super().__init__(policy, plans, every, plan_anew, **options)
        self.policy, self.plan_seed, self.overrides = policy, plan_seed, overrides


def _check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"n: expected at least 1 plan, got {n}")


def load(run_dir: str | Path, step: int | None = None, device: str | torch.device = "cpu") -> Policy:
    """The policy of a run, or of one checkpoint folder; a :class:`gac_fast.baseline.BaselinePolicy` where the run
    trained a baseline.

    Args:
        run_dir: folder of a run (its newest checkpoint is taken), or of a checkpoint.
        step: take this step's checkpoint instead of the newest.
        device: where the model goes.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    path = Path(run_dir)
    if step is not None:
        path = checkpoint.checkpoint_path(path, step)
    elif not (path / "state.json").exists():
        path = checkpoint.latest(path)
    policy = from_checkpoint(*checkpoint.load(path), device=device, name=str(path))
    policy.source = path
    return policy


def plan_seeds(
    z0: Tensor, n_draws: Tensor, usable: Tensor, best_ids: Tensor | None, best_z0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Posterior seeds to plan from, and which of them are more than prior draws.

    Args:
        z0: [B, n_z, D], chains given (tau, y).
        n_draws: int64 [B], draws each has had; 1 for a chain that no update has moved yet.
        usable: bool [B], trained on and of known return.
        best_ids, best_z0: int64 [n] and [n, n_z, D], settled seeds of the best trajectories, where there are some.

    Returns:
        seeds [B, n_z, D], and ``usable`` without the chains that were never moved (as it was if none was moved).
    """
    moved = n_draws > 1
    if best_ids is not None and best_z0 is not None:
        z0, moved = z0.clone(), moved.clone()
        z0[best_ids], moved[best_ids] = best_z0, True
    found = usable & moved
    return z0, found if bool(found.any()) else usable


def returns_of_episodes(returns: Tensor, opens: Tensor) -> Tensor:
    """[B], what the episode of each segment returns: that of the last one before it that an episode begins with.

    Args:
        returns: [B], from the first step of each segment on.
        opens: bool [B], segments that an episode begins with; the first is one.
    """
    return returns[opens][opens.long().cumsum(0) - 1]


def _episode_returns(tensors: dict[str, Tensor]) -> Tensor | None:
    """Of a checkpoint; None where its trajectories are episodes, or their returns advantages.

    In one of before they were written down, those of segments that came and went are not known: NaN.
    """
    if (saved := tensors.get("data.episode_returns")) is not None or "data.opens" not in tensors:
        return saved
    if any(name.startswith("values.") for name in tensors):
        return None
    returns, opens = tensors["data.returns"], tensors["data.opens"]
    n = len(returns) - len(tensors.get("online.slots", ()))
    return torch.cat((returns_of_episodes(returns[:n], opens[:n]), torch.full_like(returns[n:], torch.nan)))


def from_checkpoint(
    tensors: dict[str, Tensor], state: dict[str, Any], device: str | torch.device = "cpu", name: str = "checkpoint"
) -> Policy:
    """A policy of what :func:`gac_fast.checkpoint.load` returned."""
    device = torch.device(device)
    try:
        config = Config.from_dict(state["config"])
        model = GAC(config.model, state["obs_dim"], state["act_dim"])
        weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        model.load_state_dict(weights)
        # How the decoder was trained, and hence how it may act.
        model.bf16 = bool(state.get("bf16", False))
        fields = [tensors[f"normalization.{field}"] for field in Normalization._fields]
        returns = tensors["data.returns"]
        if config.baseline.method != "none":
            from gac_fast.baseline import BaselinePolicy

            return BaselinePolicy(
                model.to(device), Normalization(*fields).to(device), config, state["env_id"], returns.to(device),
                tensors["data.first_observations"].to(device), tensors["data.usable"].to(device), state["step"],
                tensors["data.opens"].to(device) if "data.opens" in tensors else None,
            )  # fmt: skip
        # Of an online run, whose episodes come and go; trajectory i of an offline one is row i.
        rows = tensors.get("data.rows", torch.arange(len(returns)))
        z0, usable = plan_seeds(
            tensors["posterior.z0"][rows],
            tensors["posterior.n_draws"][rows],
            tensors["data.usable"],
            tensors.get("best.ids"),
            tensors.get("best.z0"),
        )
        policy = Policy(
            model.to(device), Normalization(*fields).to(device), config, state["env_id"],
            z0.to(device), returns.to(device),
            tensors["data.first_observations"].to(device), usable.to(device), state["step"],
            tensors["best.ids"].to(device) if "best.ids" in tensors else None,
            tensors["data.opens"].to(device) if "data.opens" in tensors else None,
            None if (values := ValueModel.of_tensors(tensors)) is None else values.to(device),
            None if (whole := _episode_returns(tensors)) is None else whole.to(device),
        )  # fmt: skip
    except KeyError as error:
        raise CheckpointError(f"{name}: expected {error.args[0]!r} in it, found no such entry") from None
    except RuntimeError as error:
        raise CheckpointError(f"{name}: its weights do not fit its configuration: {error}") from None
    return policy
