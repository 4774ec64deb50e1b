"""EnvPool as a ``gymnasium.vector.VectorEnv``: its own native environments, stepped on its own threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from gac_fast.errors import EnvError

__all__ = ["EnvPoolVectorEnv"]


def _pools(env_id: str, num_envs: int, arguments: dict[str, Any]) -> Callable[[int | None], Any]:
    try:
        import envpool
    # Its import also fails, in many ways, where one of its packages of model files is missing.
    except Exception as error:
        raise EnvError(
            f"EnvPool cannot be imported ({error}): install it with 'pip install gac_fast[envpool]', "
            "or take another engine"
        ) from error

    def make(seed: int | None) -> Any:
        seeded = {} if seed is None else {"seed": seed}
        try:
            return envpool.make_gymnasium(env_id, num_envs=num_envs, **seeded, **arguments)
        except Exception as error:
            raise EnvError(f"EnvPool cannot make environment {env_id!r}: {error}") from error

    return make


class EnvPoolVectorEnv(VectorEnv[npt.NDArray[Any], npt.NDArray[np.floating], npt.NDArray[Any]]):
    """``num_envs`` rows of an EnvPool, in its synchronous mode.

    Autoreset is ``NEXT_STEP``, as EnvPool does it. A pool is seeded only when it is made: ``reset(seed=...)`` makes a
    new one, whose row k has the pool's k-th seed from ``seed`` on. Rewards are float64 of EnvPool's float32.

    Args:
        env_id: as EnvPool names it, for example 'Hopper-v5'.
        num_envs: rows.
        make_pool: makes the pool of a seed (None: any); default ``envpool.make_gymnasium``.
        **arguments: for ``envpool.make_gymnasium``: ``num_threads``, ``max_episode_steps`` and the environment's own.

    Raises:
        EnvError: EnvPool is not installed or does not know the environment.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        make_pool: Callable[[int | None], Any] | None = None,
        **arguments: Any,
    ) -> None:
        if num_envs < 1:
            raise EnvError(f"num_envs: expected at least 1, got {num_envs}")
        self.env_id = env_id
        self.num_envs = num_envs
        self._make_pool = make_pool or _pools(env_id, num_envs, arguments)
        self._pool = self._make_pool(None)
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
        # A pool's own spaces are those of one row.
        self.single_observation_space, self.single_action_space = (
            self._pool.observation_space,
            self._pool.action_space,
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        """Start new episodes in all rows.

        Returns:
            Observations [num_envs, obs_dim], and EnvPool's info.

        Raises:
            EnvError: a part of the rows is to be reset, which autoreset does by itself.
        """
        super().reset(seed=seed)
        if options is not None and options.get("reset_mask") is not None:
            raise EnvError("options: expected none, as EnvPool resets finished rows by itself, got a 'reset_mask'")
        if seed is not None:
            self._close_pool()
            self._pool = self._make_pool(seed)
        self._started = True
        observations, info = self._pool.reset()
        return observations, info

    def step(
        self, actions: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """Advance every row by one step under ``actions`` [num_envs, act_dim].

        Raises:
            EnvError: the actions have another shape, or there was no reset before.
        """
        if not self._started:
            raise EnvError("environment 0 was stepped before its first reset")
        actions = np.asarray(actions, self.single_action_space.dtype)
        if actions.shape != self.action_space.shape:
            raise EnvError(f"actions: expected shape {self.action_space.shape}, got {actions.shape}")
        observations, rewards, terminations, truncations, info = self._pool.step(actions)
        return (
            observations,
            np.asarray(rewards, np.float64),
            np.asarray(terminations, np.bool_),
            np.asarray(truncations, np.bool_),
            info,
        )

    def close_extras(self, **kwargs: Any) -> None:
        self._close_pool()

    def _close_pool(self) -> None:
        close = getattr(self._pool, "close", None)
        if close is not None:
            close()
