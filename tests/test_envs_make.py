"""Environments by id."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from gac_fast.envs import make_env, make_vector, resolve_env_id
from gac_fast.envs.pointmaze import PointMazeVectorEnv
from gac_fast.errors import EnvError


@pytest.mark.parametrize("name", ["pointmaze-large", "PointMaze-Large", "gac_fast/PointMaze-large-v0"])
def test_own_environments_run_on_the_batch(name: str) -> None:
    env = make_vector(name, 3)
    assert isinstance(env, PointMazeVectorEnv)
    assert (env.num_envs, env.maze.name) == (3, "large")
    assert env.spec is not None
    assert env.spec.max_episode_steps == 800


def test_other_ids_run_in_one_process_with_the_declared_autoreset() -> None:
    """Hand-counted: three steps, one that only resets, three steps."""
    env = make_vector("Swimmer-v5", 2, seed=0, max_episode_steps=3)
    assert type(env).__name__ == "SyncVectorEnv"
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    ends = []
    for step in range(1, 9):
        _, rewards, terminations, truncations, _ = env.step(np.zeros((2, 2), np.float32))
        if (terminations | truncations).all():
            ends.append(step)
        if step in (4, 8):
            np.testing.assert_array_equal(rewards, 0)
    assert ends == [3, 7]
    env.close()


def test_a_vector_environment_passes_unchanged() -> None:
    env = PointMazeVectorEnv("umaze", 2)
    assert make_vector(env, 5) is env


def test_the_seed_resets() -> None:
    first, second = (make_vector("pointmaze-umaze", 2, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.reset()[0], second.reset()[0])
    first.step(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Hoper-v5", "did you mean Hopper-v5"),
        ("pointmaze-umaz", "did you mean pointmaze-umaze"),
        ("pointmaze_medium", "did you mean pointmaze-medium"),
        ("Hopper-v99", "did you mean Hopper-v"),
        ("nothing/like-this", "got one that is unknown$"),
        ("no_such_module:Hopper-v5", "got one that is unknown"),
    ],
)
def test_an_unknown_id_suggests_the_closest(name: str, hint: str) -> None:
    with pytest.raises(EnvError, match=rf"environment '{name}': expected a registered gymnasium id, .*{hint}"):
        make_vector(name, 2)


def test_unusable_spaces_are_refused() -> None:
    with pytest.raises(EnvError, match=r"CartPole-v1: expected a one-dimensional Box as action space, got Discrete"):
        make_vector("CartPole-v1", 2)
    with pytest.raises(EnvError, match=r"PointMaze_UMaze-v3: expected a one-dimensional Box as observation space"):
        make_env("PointMaze_UMaze-v3")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(EnvError, match="num_envs: expected at least 1, got 0"):
        make_vector("pointmaze-umaze", 0)
    with pytest.raises(EnvError, match="expected an environment id or a gymnasium VectorEnv, got PointMazeEnv"):
        make_vector(make_env("pointmaze-umaze").unwrapped)  # type: ignore[arg-type]
    with pytest.raises(EnvError, match=r"'Pendulum-v1' cannot be made: .*gravity"):
        make_vector("Pendulum-v1", 2, gravity=10)


def test_ids_resolve() -> None:
    assert resolve_env_id("pointmaze-umaze") == "gac_fast/PointMaze-umaze-v0"
    assert resolve_env_id("Hopper-v5") == "Hopper-v5"
    assert resolve_env_id("sync:Hopper-v5") == "Hopper-v5"
    assert resolve_env_id("native:pointmaze-umaze") == "gac_fast/PointMaze-umaze-v0"
    assert resolve_env_id("envpool:Pong-v5") == "Pong-v5"
    assert resolve_env_id("PointMaze_UMaze-v3") == "PointMaze_UMaze-v3"


def test_geometry_needs_no_simulator() -> None:
    """Plots import mazes without gymnasium or mujoco, and loading data without either as well."""
    code = (
        "import sys; from gac_fast.envs import maze_spec; maze_spec('umaze').walls; import gac_fast.data;"
        "print([name for name in ('gymnasium', 'mujoco', 'minari', 'torch') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert result.stdout.strip() == "[]"
