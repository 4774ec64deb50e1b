"""Environments: the own ones on ``mujoco.batch``, and any other through gymnasium. Knows nothing of the method."""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gac_fast.envs._opengl import load_triton_first
from gac_fast.envs.mazes import MAZES, MazeSpec, maze_spec
from gac_fast.errors import EnvError

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv

__all__ = [
    "ENGINES", "MAZES", "MazeSpec", "close_vector", "engine_of", "make_env", "make_halves", "make_parts", "make_vector",
    "maze_spec", "resolve_env_id",
]  # fmt: skip

ENGINES = ("native", "sync", "async", "envpool")
"""What steps a vector: ``mujoco.batch``, gymnasium in one process, gymnasium in one process per row, or EnvPool."""


def resolve_env_id(env_id: str) -> str:
    """The registered gymnasium id for ``env_id``, which may be short for an own one ('pointmaze-umaze').

    A prefix that names an engine, as in 'sync:Hopper-v5', is left off. What EnvPool knows is EnvPool's affair: ids with
    its prefix are returned as they are.

    Raises:
        EnvError: nothing of that name is registered; the message suggests the closest names.
    """
    engine, env_id = _split(env_id)
    if engine == "envpool":
        return env_id
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


def engine_of(env_id: str) -> str | None:
    """The engine in front of an id whose environment is the same without it; EnvPool's environments are its own."""
    engine, _ = _split(env_id)
    return None if engine == "envpool" else engine


def make_vector(
    env: str | VectorEnv, num_envs: int = 1, seed: int | None = None, engine: str | None = None, **kwargs: Any
) -> VectorEnv:
    """A vector environment with flat observations and continuous actions.

    The own PointMaze, Hopper-v5, HalfCheetah-v5 and Walker2d-v5 run on ``mujoco.batch``, other ids in one process
    (``SyncVectorEnv``: for light MuJoCo tasks faster than processes); all with gymnasium's ``NEXT_STEP`` autoreset,
    declared in ``metadata``: the step after an episode's last ignores its action, returns the new start and reward 0.
    So all rows can always be stepped, and an episode is exactly the steps up to and including the first termination or
    truncation.

    Args:
        env: gymnasium id, short name ('pointmaze-umaze'), either with an engine in front ('sync:Hopper-v5'), or a
            vector environment, which is returned unchanged.
        num_envs: rows; of no effect on a vector environment.
        seed: reset with this seed now; a later ``reset()`` continues its random stream.
        engine: one of ``ENGINES``; None takes the one in front of the id, or else the fastest that is always there.
        **kwargs: for the environment's constructor.

    Raises:
        EnvError: unknown id, a package it needs is missing, or its spaces are not what the method can use.
    """
    from gymnasium.vector import VectorEnv

    if isinstance(env, str):
        vector = _make_vector(env, num_envs, engine, kwargs)
    elif isinstance(env, VectorEnv):
        vector = env
    else:
        raise EnvError(f"env: expected an environment id or a gymnasium VectorEnv, got {type(env).__name__}")
    _check_spaces(vector.single_observation_space, vector.single_action_space, env if isinstance(env, str) else vector)
    if seed is not None:
        vector.reset(seed=seed)
    return vector


def make_halves(env_id: str, num_envs: int, engine: str | None = None, **kwargs: Any) -> list[VectorEnv]:
    """``num_envs`` rows in two vectors, of which one can be stepped while a policy acts for the other.

    :func:`gac_fast.rollout.rollout` takes them in place of one vector, and gets the same starts. A single row makes a
    single vector.

    Args:
        env_id, num_envs, engine, **kwargs: as :func:`make_vector`.

    Raises:
        EnvError: as ``make_vector``.
    """
    from gac_fast.envs.batch import BatchVectorEnv, available_cpus

    first = (num_envs + 1) // 2
    halves = [make_vector(env_id, first, engine=engine, **kwargs)]
    if num_envs > first:
        if isinstance(halves[0], BatchVectorEnv) and kwargs.get("n_threads") is None:
            # Together as many as there are processors: while one half acts, the other has its own of them.
            kwargs = {**kwargs, "n_threads": (available_cpus() + 1) // 2}
            halves[0].close()
            halves = [make_vector(env_id, first, engine=engine, **kwargs)]
        # Rows of the own mazes share one random stream: the second half has to know where it begins.
        shared = {"first_row": first} if hasattr(halves[0], "first_row") else {}
        halves.append(make_vector(env_id, num_envs - first, engine=engine, **kwargs, **shared))
    return halves


def make_parts(env_id: str, num_envs: int, engine: str | None = None, **kwargs: Any) -> list[VectorEnv]:
    """``num_envs`` rows in whatever :func:`gac_fast.rollout.rollout` runs fastest.

    Halves where the simulation leaves Python alone and there is more than one processor; otherwise one vector: two
    threads that both run Python only take turns.

    Args:
        env_id, num_envs, engine, **kwargs: as :func:`make_vector`.

    Raises:
        EnvError: as ``make_vector``.
    """
    prefix, name = _split(env_id)
    if num_envs > 1 and engine is None and prefix in (None, "native"):
        from gac_fast.envs.batch import available_cpus

        if available_cpus() > 1 and resolve_env_id(name) in _native_ids():
            return make_halves(env_id, num_envs, **kwargs)
    return [make_vector(env_id, num_envs, engine=engine, **kwargs)]


def close_vector(vector: VectorEnv) -> None:
    """Close a vector that may have crashed or may hang; processes that do not end are ended."""
    from gymnasium.vector import AsyncVectorEnv

    if isinstance(vector.unwrapped, AsyncVectorEnv):
        for process in vector.unwrapped.processes:
            process.terminate()
        with contextlib.suppress(Exception):
            vector.close(terminate=True)
    else:
        vector.close()


def make_env(env_id: str, render_mode: str | None = None, **kwargs: Any) -> gymnasium.Env:
    """A single environment, for pictures and videos (``render_mode='rgb_array'``).

    Raises:
        EnvError: as ``make_vector``.
    """
    import gymnasium

    if render_mode is not None:
        load_triton_first()
    with _gymnasium_errors(env_id):
        single = gymnasium.make(resolve_env_id(env_id), render_mode=render_mode, **kwargs)
    _check_spaces(single.observation_space, single.action_space, env_id)
    return single


def _split(env_id: str) -> tuple[str | None, str]:
    """(engine in front of the id or None, id)."""
    engine, colon, name = env_id.partition(":")
    return (engine, name) if colon and engine in ENGINES else (None, env_id)


def _make_vector(env_id: str, num_envs: int, engine: str | None, kwargs: dict[str, Any]) -> VectorEnv:
    if num_envs < 1:
        raise EnvError(f"num_envs: expected at least 1, got {num_envs}")
    if engine is not None and engine not in ENGINES:
        raise EnvError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    prefix, name = _split(env_id)
    engine = engine or prefix
    if kwargs.get("render_mode") is not None:
        load_triton_first()
    if engine == "envpool":
        from gac_fast.envs.envpool import EnvPoolVectorEnv

        return EnvPoolVectorEnv(name, num_envs, **kwargs)
    import gymnasium

    resolved = resolve_env_id(name)
    from gac_fast.envs.mujoco import ENVIRONMENTS, MujocoVectorEnv

    if engine == "native" and resolved not in _native_ids():
        names = ", ".join(_native_ids())
        raise EnvError(f"environment {env_id!r}: expected one that runs on mujoco.batch ({names}), got another")
    with _gymnasium_errors(env_id):
        if engine in (None, "native") and resolved in ENVIRONMENTS:
            vector = MujocoVectorEnv(resolved, num_envs, **kwargs)
            vector.spec = copy.deepcopy(gymnasium.spec(resolved))
            vector.spec.max_episode_steps = vector.max_episode_steps
            return vector
        mode = engine if engine in ("sync", "async") else None
        return gymnasium.make_vec(resolved, num_envs=num_envs, vectorization_mode=mode, **kwargs)


def _native_ids() -> list[str]:
    from gac_fast.envs.mujoco import ENVIRONMENTS

    return [*(spec.env_id for spec in MAZES.values()), *ENVIRONMENTS]


@contextlib.contextmanager
def _gymnasium_errors(env_id: str) -> Iterator[None]:
    import gymnasium

    try:
        yield
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
