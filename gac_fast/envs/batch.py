"""What the own vector environments have in common: episodes of simulations that are stepped together."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from gac_fast.errors import EnvError

__all__ = ["BatchVectorEnv", "available_cpus", "checked_actions", "new_batch"]

Floats = npt.NDArray[np.floating]


def available_cpus() -> int:
    """CPUs this process may run on, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_actions(actions: Any, shape: tuple[int, ...]) -> Floats:
    """``actions`` as a float array of its own precision.

    Raises:
        EnvError: another shape, or a value that is not finite.
    """
    actions = np.asarray(actions)
    if actions.dtype.kind != "f":
        actions = actions.astype(np.float64)
    if actions.shape != shape:
        raise EnvError(f"actions: expected shape {shape}, got {actions.shape}")
    if not np.isfinite(actions).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(actions))[0])
        raise EnvError(f"actions: expected finite numbers, got {actions[index]} at {index}")
    return actions


def new_batch(model: Any, num_envs: int, n_threads: int | None, what: str) -> Any:
    """A ``mujoco.batch.Batch`` of ``num_envs`` simulations on ``n_threads`` threads (default: one per CPU).

    Raises:
        EnvError: a number is out of range, or mujoco is too old; ``what`` names who asks.
    """
    if num_envs < 1:
        raise EnvError(f"num_envs: expected at least 1, got {num_envs}")
    if n_threads is not None and n_threads < 1:
        raise EnvError(f"n_threads: expected at least 1, got {n_threads}")
    try:
        import mujoco.batch
    except ImportError:
        import mujoco

        raise EnvError(f"{what} needs mujoco.batch of mujoco >= 4.0, found {mujoco.__version__}") from None
    return mujoco.batch.Batch(model, nsim=num_envs, nthread=min(n_threads or available_cpus(), num_envs))


class BatchVectorEnv(VectorEnv[Floats, Floats, npt.NDArray[Any]]):
    """``num_envs`` independent episodes; what a simulation does is left to :meth:`_start`, :meth:`_advance` and
    :meth:`_observe`.

    What happens after an episode's last step is declared in ``metadata["autoreset_mode"]``: with ``NEXT_STEP`` (the
    default) the row's next step ignores its action, returns the new start and reward 0; with ``DISABLED`` the caller
    resets with ``options={"reset_mask": mask}`` and stepping a finished row is an error. Infos are empty.

    Args:
        num_envs: number of episodes in parallel.
        max_episode_steps: truncate after so many steps.
        autoreset_mode: ``NEXT_STEP`` or ``DISABLED``, as the enum or its value.
        single_observation_space, single_action_space: of one row.

    Raises:
        EnvError: an argument is out of range.
    """

    def __init__(
        self,
        num_envs: int,
        max_episode_steps: int,
        autoreset_mode: AutoresetMode | str,
        single_observation_space: Space[Any],
        single_action_space: Space[Any],
    ) -> None:
        try:
            mode = AutoresetMode(autoreset_mode)
        except ValueError:
            mode = None
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
            raise EnvError(f"autoreset_mode: expected NEXT_STEP or DISABLED, got {autoreset_mode!r}")
        if max_episode_steps < 1:
            raise EnvError(f"max_episode_steps: expected at least 1, got {max_episode_steps}")
        self.metadata = {"render_modes": [], "autoreset_mode": mode}
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.single_observation_space, self.single_action_space = single_observation_space, single_action_space
        self.observation_space = batch_space(single_observation_space, num_envs)
        self.action_space = batch_space(single_action_space, num_envs)
        self._action_shape = (num_envs, *(single_action_space.shape or ()))
        self._elapsed = np.zeros(num_envs, np.int64)
        self._done = np.zeros(num_envs, np.bool_)
        self._started = np.zeros(num_envs, np.bool_)
        self._all_started = False
        # Rows that are not stepped; None where there are none.
        self._parked: npt.NDArray[np.bool_] | None = None

    def park(self, mask: npt.NDArray[np.bool_] | None) -> None:
        """Leave rows out of further steps until their next reset: nobody looks at them, so nobody should wait for them.

        A parked row takes any action, stays as it is, earns 0 and does not end.

        Args:
            mask: bool [num_envs], added to the rows that are parked already; None takes all of them up again.
        """
        if mask is None:
            self._parked = None
        elif mask.any():
            self._parked = mask.copy() if self._parked is None else self._parked | mask

    @abstractmethod
    def _start(self, ids: npt.NDArray[np.int64]) -> None:
        """Put rows ``ids`` at fresh starts."""

    @abstractmethod
    def _advance(
        self, actions: Floats, ids: npt.NDArray[np.int64] | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_] | None]:
        """One step of rows ``ids`` (None: all) under ``actions`` [num_envs, act_dim].

        Returns:
            Rewards and terminations [num_envs], the latter None where there are none; what they are in other rows is
            of no matter.
        """

    @abstractmethod
    def _observe(self) -> Floats:
        """Observations [num_envs, obs_dim], a fresh array."""

    def _seed(self, seed: int, ids: npt.NDArray[np.int64]) -> None:
        """Seed rows ``ids`` with ``seed`` as :meth:`reset` got it; gymnasium's generator has been seeded already."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Start new episodes in all rows, or in those of ``options["reset_mask"]``, a boolean array [num_envs].

        Returns:
            Observations [num_envs, obs_dim] of all rows, and an empty dict.
        """
        super().reset(seed=seed)
        mask = None if options is None else options.get("reset_mask")
        if mask is None:
            ids = np.arange(self.num_envs)
        else:
            if not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
                raise EnvError(
                    f"options['reset_mask']: expected a boolean array of shape ({self.num_envs},), got "
                    f"{f'{mask.dtype} of shape {mask.shape}' if isinstance(mask, np.ndarray) else type(mask).__name__}"
                )
            ids = np.flatnonzero(mask)
        if seed is not None:
            self._seed(seed, ids)
        self._restart(ids)
        return self._observe(), {}

    def step(
        self, actions: Floats
    ) -> tuple[Floats, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """Advance every row by one step.

        Args:
            actions: [num_envs, act_dim].

        Returns:
            Observations [num_envs, obs_dim], rewards [num_envs] float64, terminations and truncations [num_envs], and
            an empty dict.

        Raises:
            EnvError: an action is not finite or of the wrong shape, or a row has no running episode.
        """
        actions = checked_actions(actions, self._action_shape)
        if not self._all_started:
            raise EnvError(f"environment {np.flatnonzero(~self._started)[0]} was stepped before its first reset")
        ids = finished = None
        done, parked = self._done, self._parked
        if done.any() or parked is not None:
            rests = np.zeros_like(done) if parked is None else parked
            finished, ids = np.flatnonzero(done & ~rests), np.flatnonzero(~(done | rests))
            if len(finished) and self.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
                raise EnvError(
                    f"environment {finished[0]} was stepped after its episode ended; "
                    "with autoreset disabled, reset it first with options={'reset_mask': mask}"
                )
            self._restart(finished)
        if ids is None or len(ids):
            rewards, terminations = self._advance(actions, ids)
        else:
            rewards, terminations = np.zeros(self.num_envs), None
        if terminations is None:
            terminations = np.zeros(self.num_envs, np.bool_)
        self._elapsed += 1
        if finished is not None:
            rewards[finished], terminations[finished], self._elapsed[finished] = 0.0, False, 0
        truncations = self._elapsed >= self.max_episode_steps
        if parked is not None:
            rewards[parked], terminations[parked], truncations[parked] = 0.0, False, False
            self._elapsed[parked] -= 1
        ended = terminations | truncations
        self._done = ended if parked is None else np.where(parked, done, ended)
        return self._observe(), rewards, terminations, truncations, {}

    def _restart(self, ids: npt.NDArray[np.int64]) -> None:
        if len(ids):
            self._start(ids)
            self._begin(ids)

    def _begin(self, ids: npt.NDArray[np.int64]) -> None:
        """Count the steps of rows ``ids``, which have just been placed, from 0."""
        self._elapsed[ids] = 0
        self._done[ids] = False
        self._started[ids] = True
        if self._parked is not None:
            self._parked[ids] = False
            self._parked = self._parked if self._parked.any() else None
        self._all_started = bool(self._started.all())
