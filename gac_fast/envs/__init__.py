"""Environments: the own PointMaze on ``mujoco.batch``, and any other through gymnasium. Knows nothing of the method."""

from __future__ import annotations

import contextlib
import difflib
import io
from typing import TYPE_CHECKING, Any

from gac_fast.envs.mazes import MAZES, MazeSpec, maze_spec
from gac_fast.errors import EnvError

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv

__all__ = ["MAZES", "MazeSpec", "make_env", "make_vector", "maze_spec", "resolve_env_id"]


def resolve_env_id(env_id: str) -> str:
    """The registered gymnasium id for ``env_id``, which may be short for an own one ('pointmaze-umaze').

    Raises:
        EnvError: nothing of that name is registered; the message suggests the closest names.
    """
    import gymnasium

    import gac_fast.envs.pointmaze  # noqa: F401  (registers the own ids)

    for name, spec in MAZES.items():
        if env_id.lower() in (f"pointmaze-{name}", spec.env_id.lower()):
            return spec.env_id
    if env_id in gymnasium.registry:
        return env_id
    if ":" not in env_id:
        _register_robotics()
        if env_id in gymnasium.registry:
            return env_id
    try:
        # Resolves "module:id" and ids without a version, and names what is wrong otherwise.
        return gymnasium.spec(env_id).id
    except Exception as error:
        names = [f"pointmaze-{name}" for name in MAZES] + list(gymnasium.registry)
        folded = {name.lower(): name for name in names}
        close = [folded[name] for name in difflib.get_close_matches(env_id.lower(), folded, n=3, cutoff=0.6)]
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise EnvError(
            f"environment {env_id!r}: expected a registered gymnasium id, got one that is unknown{hint}"
        ) from (error)


def make_vector(env: str | VectorEnv, num_envs: int = 1, seed: int | None = None, **kwargs: Any) -> VectorEnv:
    """A vector environment with flat observations and continuous actions.

    The own PointMaze runs on ``mujoco.batch``, other ids in one process (``SyncVectorEnv``: for light MuJoCo tasks
    faster than processes); both with gymnasium's ``NEXT_STEP`` autoreset, declared in ``metadata``: the step after an
    episode's last ignores its action, returns the new start and reward 0. So all rows can always be stepped, and an
    episode is exactly the steps up to and including the first termination or truncation.

    Args:
        env: gymnasium id, short name ('pointmaze-umaze'), or a vector environment, which is returned unchanged.
        num_envs: rows; of no effect on a vector environment.
        seed: reset with this seed now; a later ``reset()`` continues its random stream.
        **kwargs: for the environment's constructor.

    Raises:
        EnvError: unknown id, a package it needs is missing, or its spaces are not what the method can use.
    """
    from gymnasium.vector import VectorEnv

    if isinstance(env, str):
        vector = _make(env, kwargs, num_envs)
    elif isinstance(env, VectorEnv):
        vector = env
    else:
        raise EnvError(f"env: expected an environment id or a gymnasium VectorEnv, got {type(env).__name__}")
    _check_spaces(vector.single_observation_space, vector.single_action_space, env if isinstance(env, str) else vector)
    if seed is not None:
        vector.reset(seed=seed)
    return vector


def make_env(env_id: str, render_mode: str | None = None, **kwargs: Any) -> gymnasium.Env:
    """A single environment, for pictures and videos (``render_mode='rgb_array'``).

    Raises:
        EnvError: as ``make_vector``.
    """
    single = _make(env_id, {"render_mode": render_mode, **kwargs}, None)
    _check_spaces(single.observation_space, single.action_space, env_id)
    return single


def _make(env_id: str, kwargs: dict[str, Any], num_envs: int | None) -> Any:
    import gymnasium

    if num_envs is not None and num_envs < 1:
        raise EnvError(f"num_envs: expected at least 1, got {num_envs}")
    resolved = resolve_env_id(env_id)
    try:
        if num_envs is None:
            return gymnasium.make(resolved, **kwargs)
        return gymnasium.make_vec(resolved, num_envs=num_envs, **kwargs)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise EnvError(f"environment {env_id!r} cannot be made: {error}") from error


def _check_spaces(observation_space: Any, action_space: Any, env: Any) -> None:
    from gymnasium.spaces import Box

    for name, space in (("observation", observation_space), ("action", action_space)):
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise EnvError(f"environment {env}: expected a one-dimensional Box as {name} space, got {space}")


def _register_robotics() -> None:
    import gymnasium

    # Its import prints notices about environments that nobody asked for.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            import gymnasium_robotics
        except ImportError:
            return
        gymnasium.register_envs(gymnasium_robotics)
