"""PointMaze: physics, rewards, episode boundaries, starts, geometry and pictures."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_fast.envs import MAZES, make_env, make_vector, maze_spec
from gac_fast.envs.pointmaze import PointMazeEnv, PointMazeVectorEnv
from gac_fast.errors import EnvError

NAMES = ["umaze", "medium", "large"]
REST = np.zeros((1, 2))


@pytest.mark.parametrize(
    ("maze", "peer"),
    [("umaze", "PointMaze_UMaze-v3"), ("medium", "PointMaze_Medium-v3"), ("large", "PointMaze_Large-v3")],
)
def test_step_by_step_as_gymnasium_robotics(maze: str, peer: str) -> None:
    """From the same state, with pushes long enough to run into walls, observations agree to 1e-6."""
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    theirs = gymnasium.make(peer, max_episode_steps=10_000).unwrapped
    ours = PointMazeVectorEnv(maze, 3)
    for episode in range(3):
        observation, _ = theirs.reset(seed=episode)
        theirs.goal = ours.maze.goal_xy.copy()
        ours.set_state(observation["observation"][:2], observation["observation"][2:])
        rng = np.random.default_rng(episode)
        for t in range(250):
            if t % 50 == 0:
                push = rng.uniform(-1.2, 1.2, 2)
            action = (push + 0.3 * rng.normal(size=2)).astype(np.float32)
            observation, reward, *_ = theirs.step(action)
            mine, rewards, _, _, _ = ours.step(np.tile(action, (3, 1)))
            state = np.concatenate([ours.physics.position, ours.physics.velocity], axis=1)
            np.testing.assert_allclose(state, np.tile(observation["observation"], (3, 1)), atol=1e-6, rtol=0)
            np.testing.assert_array_equal(mine, state.astype(np.float32))
            assert (rewards == reward).all()


def test_maps_are_gymnasium_robotics() -> None:
    from gymnasium_robotics.envs.maze import maps

    for name, peer in zip(NAMES, (maps.U_MAZE, maps.MEDIUM_MAZE, maps.LARGE_MAZE), strict=True):
        assert [[int(cell == "#") for cell in row] for row in maze_spec(name).rows] == peer


@pytest.mark.parametrize(
    ("maze", "goal", "horizon"),
    [("umaze", (-1, 1), 300), ("medium", (2.5, -2.5), 600), ("large", (4.5, -3), 800)],
)
def test_goals_and_horizons(maze: str, goal: tuple[float, float], horizon: int) -> None:
    spec = maze_spec(maze)
    np.testing.assert_array_equal(spec.goal_xy, goal)
    assert spec.horizon == horizon
    assert tuple(spec.free_cells[spec.goal_index]) == spec.goal_cell
    env = PointMazeVectorEnv(maze, 1)
    env.reset(seed=0)
    truncated = [bool(env.step(REST)[3][0]) for _ in range(horizon)]
    assert truncated == [False] * (horizon - 1) + [True]


def test_reward_is_of_the_position_after_the_step() -> None:
    env = PointMazeVectorEnv("umaze", 4)
    goal = env.maze.goal_xy
    # 0.05 m per step at full speed: into the goal, out of it, and at rest just inside and just outside.
    offset = np.array([[0.48, 0], [0.44, 0], [0.44, 0], [0.46, 0]])
    env.set_state(goal + offset, [[-5, 0], [5, 0], [0, 0], [0, 0]])
    observation, rewards, terminated, truncated, _ = env.step(np.zeros((4, 2)))
    distance = np.linalg.norm(observation[:, :2] - goal, axis=1)
    assert (distance < 0.45).tolist() == [True, False, True, False]
    assert rewards.tolist() == [1, 0, 1, 0]
    assert rewards.dtype == np.float64
    assert not terminated.any()
    assert not truncated.any()


def test_velocity_is_clipped_before_and_action_at_each_step() -> None:
    env = PointMazeVectorEnv("umaze", 2)
    env.set_state([0, 1], [[20, 0], [5, 0]])
    observation, *_ = env.step([[0, 0], [0, 0]])
    np.testing.assert_array_equal(observation[0], observation[1])
    env.set_state([0, 1])
    observation, *_ = env.step([[30, -7], [1, -1]])
    np.testing.assert_array_equal(observation[0], observation[1])
    assert observation[0, 2] > 0.1


def _play(env: Any, steps: int, num_envs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations, rewards and truncations of ``steps`` steps of full force to the right."""
    seen = [env.step(np.tile(np.float32([1, 0]), (num_envs, 1))) for _ in range(steps)]
    observations, rewards, _, truncations, _ = zip(*seen, strict=True)
    return np.stack(observations), np.stack(rewards), np.stack(truncations)


@pytest.mark.parametrize("mode", ["vector_entry_point", "sync"])
def test_episode_boundaries_by_hand(mode: str) -> None:
    """Five steps, then one that only resets, then five steps again; gymnasium's own vectorisation agrees."""
    env = gymnasium.make_vec(
        "gac_fast.envs.pointmaze:gac_fast/PointMaze-umaze-v0",
        num_envs=2,
        vectorization_mode=mode,
        max_episode_steps=5,
    )
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    first, _ = env.reset(seed=0)
    observations, rewards, truncations = _play(env, 13, 2)
    assert truncations[:, 0].tolist() == [
        False,
        False,
        False,
        False,
        True,
        False,
        False,
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    np.testing.assert_array_equal(truncations[:, 0], truncations[:, 1])
    # Steps 6 and 12 (index 5 and 11) ignore their action: at rest at a new start, reward 0.
    for index in (5, 11):
        np.testing.assert_array_equal(observations[index, :, 2:], 0)
        np.testing.assert_array_equal(rewards[index], 0)
        assert not np.array_equal(observations[index], first)
    assert (observations[[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12], :, 2] != 0).all()


def test_rows_reset_by_mask_run_on_their_own_clock() -> None:
    env = PointMazeVectorEnv("umaze", 3, max_episode_steps=5)
    env.reset(seed=0)
    before = _play(env, 2, 3)[0][-1]
    after, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    np.testing.assert_array_equal(after[1, 2:], 0)
    _, _, truncations = _play(env, 12, 3)
    assert (np.flatnonzero(truncations[:, 0]) + 1).tolist() == [3, 9]
    assert (np.flatnonzero(truncations[:, 1]) + 1).tolist() == [5, 11]
    np.testing.assert_array_equal(truncations[:, 2], truncations[:, 0])


def test_rows_that_reset_do_not_disturb_the_others() -> None:
    """A row's states are the same whether or not its neighbour resets in between."""
    alone, together = (PointMazeVectorEnv("umaze", 2, max_episode_steps=limit) for limit in (100, 100))
    start = alone.set_state([[0, 1], [1, 0]])
    np.testing.assert_array_equal(together.set_state([[0, 1], [1, 0]]), start)
    for t in range(20):
        if t == 7:
            together.reset(options={"reset_mask": np.array([True, False])})
        action = np.float32([[0.3, -1], [-0.5, 1]])
        np.testing.assert_array_equal(alone.step(action)[0][1], together.step(action)[0][1])


def test_with_autoreset_disabled_the_caller_resets() -> None:
    env = PointMazeVectorEnv("umaze", 2, max_episode_steps=3, autoreset_mode="Disabled")
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    env.reset(seed=0)
    assert _play(env, 3, 2)[2][-1].all()
    with pytest.raises(EnvError, match="environment 0 was stepped after its episode ended"):
        env.step(np.zeros((2, 2)))
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(EnvError, match="environment 1 was stepped after its episode ended"):
        env.step(np.zeros((2, 2)))
    env.reset()
    assert not env.step(np.zeros((2, 2)))[3].any()


def test_results_do_not_depend_on_threads() -> None:
    runs = []
    for n_threads in (1, 2, 3):
        env = PointMazeVectorEnv("medium", 64, n_threads=n_threads)
        env.reset(seed=4)
        rng = np.random.default_rng(0)
        runs.append([env.step(rng.uniform(-1, 1, (64, 2)))[0] for _ in range(100)][-1])
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


@pytest.mark.parametrize("maze", NAMES)
def test_starts_are_uniform(maze: str) -> None:
    env = PointMazeVectorEnv(maze, 20_000)
    observations, _ = env.reset(seed=0)
    spec = env.maze
    np.testing.assert_array_equal(observations[:, 2:], 0)
    cell = spec.nearest_free_cell(observations[:, :2].astype(np.float64))
    offset = observations[:, :2] - spec.cell_centres[cell]
    assert np.abs(offset).max() <= 0.25 + 1e-6
    # Chi-squared against equal shares: mean k - 1, variance 2 (k - 1); six standard deviations.
    counts = np.bincount(cell, minlength=len(spec.free_cells))
    expected = 20_000 / len(counts)
    chi_squared = np.square(counts - expected).sum() / expected
    assert chi_squared < len(counts) - 1 + 6 * np.sqrt(2 * (len(counts) - 1))
    # Uniform on +-0.25: mean 0 and variance 1/48, to five standard errors.
    assert np.abs(offset.mean(0)).max() < 5 * np.sqrt(1 / 48 / 20_000)
    assert np.abs(offset.var(0) * 48 - 1).max() < 5 * np.sqrt(0.8 / 20_000)
    assert abs(np.corrcoef(offset.T)[0, 1]) < 5 / np.sqrt(20_000)


def test_start_k_of_a_seed_does_not_depend_on_num_envs() -> None:
    many, _ = PointMazeVectorEnv("umaze", 6).reset(seed=7)
    two = PointMazeVectorEnv("umaze", 2)
    np.testing.assert_array_equal(two.reset(seed=7)[0], many[:2])
    np.testing.assert_array_equal(two.reset()[0], many[2:4])
    single = make_env("pointmaze-umaze")
    np.testing.assert_array_equal(single.reset(seed=7)[0], many[0])
    np.testing.assert_array_equal(single.reset()[0], many[1])
    assert not np.array_equal(two.reset(seed=8)[0], many[:2])


def test_single_and_vector_environments_agree() -> None:
    single, vector = make_env("pointmaze-medium"), make_vector("pointmaze-medium", 1)
    np.testing.assert_array_equal(single.reset(seed=3)[0], vector.reset(seed=3)[0][0])
    rng = np.random.default_rng(0)
    for step in range(1, 601):
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        observation, reward, terminated, truncated, _ = single.step(action)
        observations, rewards, terminations, truncations, _ = vector.step(action[None])
        np.testing.assert_array_equal(observation, observations[0])
        assert (reward, terminated, truncated) == (rewards[0], terminations[0], truncations[0])
        assert truncated == (step == 600)


@pytest.mark.filterwarnings("ignore:.*A Box observation space:UserWarning")
def test_single_environment_keeps_gymnasiums_rules() -> None:
    check_env(PointMazeEnv("umaze"), skip_render_check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda env: env.step([[0, 0], [np.nan, 0]]), r"actions: expected finite numbers, got nan at \(1, 0\)"),
        (lambda env: env.step([[0, 0]]), r"actions: expected shape \(2, 2\), got \(1, 2\)"),
        (lambda env: env.reset(options={"reset_mask": [True, False]}), r"shape \(2,\), got list"),
        (lambda env: env.reset(options={"reset_mask": np.ones(3, bool)}), r"got bool of shape \(3,\)"),
        (lambda env: env.reset(options={"reset_mask": np.ones(2)}), r"got float64 of shape \(2,\)"),
    ],
)
def test_bad_calls_are_refused(call: Any, message: str) -> None:
    env = PointMazeVectorEnv("umaze", 2)
    env.reset(seed=0)
    with pytest.raises(EnvError, match=message):
        call(env)


def test_stepping_before_the_first_reset() -> None:
    env = PointMazeVectorEnv("umaze", 2)
    with pytest.raises(EnvError, match="environment 0 was stepped before its first reset"):
        env.step(np.zeros((2, 2)))
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(EnvError, match="environment 1 was stepped before its first reset"):
        env.step(np.zeros((2, 2)))
    with pytest.raises(EnvError, match="before its first reset"):
        PointMazeEnv("umaze").step(np.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maze": "tiny"}, "maze: expected one of umaze, medium, large, got 'tiny'"),
        ({"num_envs": 0}, "num_envs: expected at least 1, got 0"),
        ({"n_threads": 0}, "n_threads: expected at least 1, got 0"),
        ({"max_episode_steps": 0}, "max_episode_steps: expected at least 1, got 0"),
        ({"autoreset_mode": "SameStep"}, "autoreset_mode: expected NEXT_STEP or DISABLED, got 'SameStep'"),
        ({"autoreset_mode": "never"}, "autoreset_mode: expected NEXT_STEP or DISABLED, got 'never'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        PointMazeVectorEnv(**arguments)


# Geometry


@pytest.mark.parametrize("maze", NAMES)
def test_geometry_fits_together(maze: str) -> None:
    spec = maze_spec(maze)
    rows, columns = spec.shape
    assert len(spec.walls) + len(spec.free_cells) == rows * columns
    x_min, x_max, y_min, y_max = spec.extent
    corners = np.array([(x, y, x + width, y + height) for x, y, width, height in spec.walls])
    assert corners.min(0).tolist() == [x_min, y_min, corners[:, 2].min(), corners[:, 3].min()]
    assert (corners[:, 2].max(), corners[:, 3].max()) == (x_max, y_max)
    np.testing.assert_array_equal(spec.xy_to_cell(spec.cell_centres), spec.free_cells)
    assert maze_spec(f"pointmaze-{maze}") is spec
    assert maze_spec(f"gac_fast/PointMaze-{maze}-v0") is spec


@pytest.mark.parametrize("maze", NAMES)
def test_next_cells_follow_shortest_paths(maze: str) -> None:
    """Path lengths equal those of Floyd and Warshall's algorithm."""
    spec = maze_spec(maze)
    n_cells = len(spec.free_cells)
    apart = np.abs(spec.free_cells[:, None] - spec.free_cells[None]).sum(-1)
    distance = np.where(apart <= 1, apart, 10_000)
    for k in range(n_cells):
        distance = np.minimum(distance, distance[:, k, None] + distance[None, k])
    np.testing.assert_array_equal(np.diag(spec.next_cells), np.arange(n_cells))
    for cell in range(n_cells):
        for goal in range(n_cells):
            if cell != goal:
                following = spec.next_cells[cell, goal]
                assert apart[cell, following] == 1
                assert distance[following, goal] == distance[cell, goal] - 1


@given(maze=st.sampled_from(NAMES), u=st.floats(-0.5, 0.5), v=st.floats(-0.5, 0.5), data=st.data())
@settings(max_examples=200, deadline=None)
def test_nearest_free_cell(maze: str, u: float, v: float, data: st.DataObject) -> None:
    spec = maze_spec(maze)
    # Anywhere on the map, walls and a margin outside included.
    x_min, x_max, y_min, y_max = spec.extent
    xy = np.array([[x_min + (u + 0.5) * (x_max - x_min), y_min + (v + 0.5) * (y_max - y_min)]])
    index = spec.nearest_free_cell(xy)[0]
    inside = (spec.free_cells == spec.xy_to_cell(xy)[0]).all(1)
    if inside.any():
        assert index == inside.argmax()
    else:
        distance = np.linalg.norm(spec.cell_centres - xy, axis=1)
        assert distance[index] == pytest.approx(distance.min())


# Pictures


def _rendering(maze: str = "umaze") -> Any:
    env = make_env(f"pointmaze-{maze}", render_mode="rgb_array")
    env.reset(seed=0)
    try:
        env.render()
    except EnvError as error:
        pytest.skip(str(error))
    return env


@pytest.mark.parametrize("maze", NAMES)
def test_the_picture_shows_ball_goal_and_walls_in_their_places(maze: str) -> None:
    env = _rendering(maze)
    spec = env.unwrapped.maze
    height, width = 480, 480
    rows, columns = spec.shape
    scale = height / (1.06 * max(rows, columns))

    def pixel(frame: np.ndarray, x: float, y: float) -> np.ndarray:
        return frame[round(height / 2 - y * scale), round(width / 2 + x * scale)].astype(int)

    start = next(centre for centre in spec.cell_centres if not np.array_equal(centre, spec.goal_xy))
    env.unwrapped.physics.place(start)
    frame = env.render()
    assert frame.shape == (height, width, 3)
    assert frame.dtype == np.uint8
    red, green, blue = pixel(frame, *spec.goal_xy)
    assert red > 2 * max(green, blue)
    red, green, blue = pixel(frame, *start)
    assert green > 1.2 * max(red, blue)
    x, y, size, _ = spec.walls[0]
    red, green, blue = pixel(frame, x + size / 2, y + size / 2)
    assert red > green > blue
    env.close()


def test_without_a_render_mode_there_is_no_picture() -> None:
    env = PointMazeEnv("umaze")
    env.reset(seed=0)
    assert env.render() is None
    with pytest.raises(EnvError, match="render_mode: expected None or 'rgb_array', got 'human'"):
        PointMazeEnv("umaze", render_mode="human")


RENDER = """
from gac_fast.video import headless_backend
headless_backend()
from gac_fast.envs import make_env
from gac_fast.envs.pointmaze import PointMazeEnv
env = PointMazeEnv("umaze", render_mode="rgb_array") if {own} else make_env("Hopper-v5", render_mode="rgb_array")
env.reset(seed=0)
assert env.render().any()
import triton
"""


@pytest.mark.parametrize("own", [True, False])
def test_triton_loads_after_a_picture(own: bool) -> None:
    """Mesa's LLVM and Triton's in one process end it where Mesa's comes first, hence a process of its own."""
    pytest.importorskip("triton")
    _rendering().close()
    command = [sys.executable, "-c", RENDER.format(own=own)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_machine_that_cannot_render_is_told_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco.egl", None)
    monkeypatch.setitem(sys.modules, "mujoco.osmesa", None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    env = PointMazeEnv("umaze", render_mode="rgb_array")
    env.reset(seed=0)
    with pytest.raises(EnvError, match=r"install EGL \(libegl1\) or OSMesa .*egl: .*osmesa: "):
        env.render()


def test_all_mazes_are_registered() -> None:
    for spec in MAZES.values():
        assert gymnasium.spec(spec.env_id).max_episode_steps == spec.horizon
