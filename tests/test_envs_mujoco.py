"""Hopper, HalfCheetah and Walker2d on mujoco.batch against gymnasium's own environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco.batch
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

from gac_fast.envs import make_vector
from gac_fast.envs.mujoco import ENVIRONMENTS, MujocoVectorEnv
from gac_fast.errors import EnvError

NAMES = list(ENVIRONMENTS)
# Those that fall over.
WALKERS = ["Hopper-v5", "Walker2d-v5"]


def gymnasiums(env_id: str, n: int, **arguments: Any) -> VectorEnv:
    return gymnasium.make_vec(env_id, n, vectorization_mode="sync", **arguments)


def assert_equal_steps(ours: VectorEnv, theirs: VectorEnv, n_steps: int, scale: float = 1.0) -> int:
    """Step both under the same random actions, all results equal to the last bit; returns the episodes that ended."""
    rng = np.random.default_rng(0)
    n_ended = 0
    for t in range(n_steps):
        actions = (scale * rng.uniform(-1, 1, ours.action_space.shape)).astype(np.float32)
        results = ours.step(actions)
        for name, x, y in zip(
            ("observation", "reward", "termination", "truncation"), results, theirs.step(actions), strict=False
        ):
            np.testing.assert_array_equal(x, y, err_msg=f"{name} of step {t + 1}")
            assert x.dtype == y.dtype
        n_ended += int((results[2] | results[3]).sum())
    return n_ended


@pytest.mark.parametrize(("env_id", "n_steps", "n_ended"), [
    ("Hopper-v5", 300, 100), ("Walker2d-v5", 300, 100), ("HalfCheetah-v5", 1002, 20),
])  # fmt: skip
def test_twenty_seeds_are_gymnasiums_bit_for_bit(env_id: str, n_steps: int, n_ended: int) -> None:
    """Episodes that end and those that start after them, all from one seed."""
    ours, theirs = MujocoVectorEnv(env_id, 20), gymnasiums(env_id, 20)
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.single_action_space == theirs.single_action_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    np.testing.assert_array_equal(ours.reset(seed=40)[0], theirs.reset(seed=40)[0])
    assert assert_equal_steps(ours, theirs, n_steps) >= n_ended


@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("env_id", WALKERS)
def test_a_thousand_steps(env_id: str, n: int) -> None:
    """Whole episodes up to the time limit, most of them lying on the ground in many contacts."""
    arguments = {"terminate_when_unhealthy": False}
    ours, theirs = MujocoVectorEnv(env_id, n, **arguments), gymnasiums(env_id, n, **arguments)
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    assert assert_equal_steps(ours, theirs, 1002) == n


@pytest.mark.parametrize(("env_id", "arguments"), [
    ("Hopper-v5", {"exclude_current_positions_from_observation": False, "frame_skip": 2}),
    ("Hopper-v5", {"forward_reward_weight": 2.5, "ctrl_cost_weight": 0.3, "healthy_reward": 0.7}),
    ("Hopper-v5", {"healthy_state_range": (-3.0, 2.0), "healthy_z_range": (1.0, 1.4), "healthy_angle_range": (-1, 1)}),
    ("Hopper-v5", {"healthy_state_range": (-0.1, 50.0)}),
    ("Hopper-v5", {"reset_noise_scale": 0.05, "max_episode_steps": 7}),
    ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False, "forward_reward_weight": 0.5}),
    ("HalfCheetah-v5", {"ctrl_cost_weight": 0.0, "reset_noise_scale": 0.3, "frame_skip": 3}),
    ("Walker2d-v5", {"healthy_z_range": (1.1, 1.4), "healthy_angle_range": (-0.2, 0.1), "healthy_reward": 2.0}),
    ("Walker2d-v5", {"exclude_current_positions_from_observation": False, "xml_file": "walker2d.xml"}),
])  # fmt: skip
def test_arguments_are_gymnasiums(env_id: str, arguments: dict[str, Any]) -> None:
    ours, theirs = MujocoVectorEnv(env_id, 3, **arguments), gymnasiums(env_id, 3, **arguments)
    assert ours.single_observation_space == theirs.single_observation_space
    np.testing.assert_array_equal(ours.reset(seed=1)[0], theirs.reset(seed=1)[0])
    assert_equal_steps(ours, theirs, 80)


@pytest.mark.parametrize("env_id", NAMES)
def test_from_the_same_state(env_id: str) -> None:
    """A state far from any start."""
    ours, theirs = MujocoVectorEnv(env_id, 1), gymnasiums(env_id, 1)
    ours.reset(seed=0)
    theirs.reset(seed=0)
    single = theirs.envs[0].unwrapped
    rng = np.random.default_rng(5)
    position = single.init_qpos + rng.uniform(-0.05, 0.05, single.model.nq) + 3.0 * (np.arange(single.model.nq) == 0)
    velocity = rng.uniform(-15, 15, single.model.nv)
    single.reset()
    single.set_state(position, velocity)
    np.testing.assert_array_equal(ours.set_state(position[None], velocity[None])[0], single._get_obs())
    for t in range(20):
        action = rng.uniform(-1.5, 1.5, (1, single.model.nu)).astype(np.float32)
        observation, reward, terminated, _, _ = single.step(action[0])
        observations, rewards, terminations, _, _ = ours.step(action)
        np.testing.assert_array_equal(observations[0], observation, err_msg=f"step {t + 1}")
        assert (rewards[0], terminations[0]) == (reward, terminated)
        if terminated:
            break


@pytest.mark.parametrize("env_id", NAMES)
def test_start_k_of_a_seed_is_gymnasiums_start_of_seed_plus_k(env_id: str) -> None:
    ours = MujocoVectorEnv(env_id, 5)
    single = gymnasium.make(env_id)
    observations, _ = ours.reset(seed=11)
    for k in range(5):
        np.testing.assert_array_equal(observations[k], single.reset(seed=11 + k)[0])
    # A row's next start comes from its own stream, whoever else starts.
    again, _ = ours.reset(options={"reset_mask": np.array([False, False, False, False, True])})
    np.testing.assert_array_equal(again[4], single.reset()[0])
    np.testing.assert_array_equal(again[:4], observations[:4])
    # And a seed for some rows is for them alone.
    some, _ = ours.reset(seed=70, options={"reset_mask": np.array([False, True, False, False, False])})
    np.testing.assert_array_equal(some[1], single.reset(seed=71)[0])
    np.testing.assert_array_equal(some[0], observations[0])


@pytest.mark.parametrize("env_id", NAMES)
def test_unseeded_starts_have_gymnasiums_distribution(env_id: str) -> None:
    """Uniform within the noise scale about the model's own pose; velocities of HalfCheetah normal."""
    n = 3000
    env = MujocoVectorEnv(env_id, n, exclude_current_positions_from_observation=False)
    observations, _ = env.reset()
    nq = env.position.shape[1]
    scale = env.task.reset_noise_scale
    noise = (observations - np.concatenate((env._origin[0], env._origin[1]))) / scale
    uniform = noise if env_id != "HalfCheetah-v5" else noise[:, :nq]
    assert np.abs(uniform).max() <= 1
    # Kolmogorov and Smirnov's distance, whose 1e-6 quantile is sqrt(ln(2e6) / 2 n), for every dimension.
    bound = np.sqrt(np.log(2e6) / (2 * n))
    steps = np.arange(1, n + 1) / n
    for column in uniform.T:
        assert np.abs(np.sort(column) / 2 + 0.5 - steps).max() < bound + 1 / n
    if env_id == "HalfCheetah-v5":
        normal = noise[:, nq:]
        assert np.abs(normal.mean(0)).max() < 5 / np.sqrt(n)
        assert np.abs(normal.var(0) - 1).max() < 5 * np.sqrt(2 / n)
        assert np.abs((normal**4).mean(0) - 3).max() < 6 * np.sqrt(96 / n)
    # Independent dimensions and rows; two resets differ.
    correlation = np.corrcoef(noise.T) - np.eye(noise.shape[1])
    assert np.abs(correlation).max() < 5.5 / np.sqrt(n)
    assert np.abs(np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1]) < 5 / np.sqrt(n)
    assert not np.array_equal(env.reset()[0], observations)


def test_results_depend_neither_on_threads_nor_on_other_rows() -> None:
    many, two, alone = (MujocoVectorEnv("Hopper-v5", n, n_threads=k) for n, k in ((6, 3), (6, 1), (1, 1)))
    for env in (many, two):
        env.reset(seed=4)
    alone.reset(seed=6)
    rng = np.random.default_rng(0)
    for _ in range(150):
        actions = rng.uniform(-1, 1, (6, 3)).astype(np.float32)
        first = many.step(actions)
        for x, y in zip(first[:4], two.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(x, y)
        for x, y in zip(first[:4], alone.step(actions[2:3])[:4], strict=True):
            np.testing.assert_array_equal(x[2:3], y)


def test_with_autoreset_disabled_the_caller_resets() -> None:
    ours = MujocoVectorEnv("Walker2d-v5", 3, autoreset_mode="Disabled")
    theirs = gymnasiums("Walker2d-v5", 3, vector_kwargs={"autoreset_mode": AutoresetMode.DISABLED})
    assert ours.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    np.testing.assert_array_equal(ours.reset(seed=2)[0], theirs.reset(seed=2)[0])
    rng = np.random.default_rng(1)
    n_ended = 0
    for _ in range(120):
        actions = rng.uniform(-1, 1, (3, 6)).astype(np.float32)
        results = ours.step(actions)
        for x, y in zip(results[:4], theirs.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(x, y)
        done = results[2] | results[3]
        if done.any():
            n_ended += int(done.sum())
            with pytest.raises(EnvError, match=f"environment {done.argmax()} was stepped after its episode ended"):
                ours.step(actions)
            options = {"reset_mask": done}
            np.testing.assert_array_equal(ours.reset(options=options)[0], theirs.reset(options=options)[0])
    assert n_ended >= 6


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_parked_rows_stay_as_they_are_and_the_others_do_not_notice(mode: AutoresetMode) -> None:
    ours, other = (MujocoVectorEnv("Hopper-v5", 3, autoreset_mode=mode, max_episode_steps=30) for _ in range(2))
    rng = np.random.default_rng(2)
    running = np.ones(3, np.bool_)
    for env in (ours, other):
        env.reset(seed=1)
    last = np.zeros((3, 11))
    while running.any():
        actions = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
        found, expected = ours.step(actions), other.step(actions)
        for x, y in zip(found[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(x[running], y[running])
            np.testing.assert_array_equal(x[~running], last[~running] if x.ndim == 2 else 0)
        last, done = found[0], found[2] | found[3]
        running &= ~done
        ours.park(done)
        if mode is AutoresetMode.DISABLED and (ended := expected[2] | expected[3]).any():
            other.reset(options={"reset_mask": ended})
    # Taken up again, a row begins its next episode; a reset takes up what it resets.
    if mode is AutoresetMode.NEXT_STEP:
        ours.park(None)
        assert not np.array_equal(ours.step(np.zeros((3, 3), np.float32))[0], last)
    np.testing.assert_array_equal(ours.reset(seed=5)[0], other.reset(seed=5)[0])
    actions = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
    np.testing.assert_array_equal(ours.step(actions)[0], other.step(actions)[0])


def test_results_are_fresh_arrays() -> None:
    env = MujocoVectorEnv("Hopper-v5", 2)
    first, _ = env.reset(seed=0)
    kept = first.copy()
    results = [env.step(np.full((2, 3), 0.5, np.float32)) for _ in range(2)]
    np.testing.assert_array_equal(first, kept)
    for x, y in zip(results[0][:4], results[1][:4], strict=True):
        assert not np.shares_memory(x, y)


def test_a_simulation_that_cannot_go_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    env = MujocoVectorEnv("Hopper-v5", 3)
    env.reset(seed=0)

    def step(ids: Any, nstep: int) -> None:
        raise mujoco.batch.SimulationError(np.array([2]), "the stack is full", 3)

    monkeypatch.setattr(env._batch, "step", step)
    with pytest.raises(EnvError, match=r"the simulation cannot go on: .*the stack is full") as caught:
        env.step(np.zeros((3, 3)))
    assert caught.value.environment == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": "Ant-v5"}, "env_id: expected one of Hopper-v5, HalfCheetah-v5, Walker2d-v5, got 'Ant-v5'"),
        ({"num_envs": 0}, "num_envs: expected at least 1, got 0"),
        ({"n_threads": 0}, "n_threads: expected at least 1, got 0"),
        ({"max_episode_steps": 0}, "max_episode_steps: expected at least 1, got 0"),
        ({"autoreset_mode": "SameStep"}, "autoreset_mode: expected NEXT_STEP or DISABLED, got 'SameStep'"),
        ({"frame_skip": 0}, "frame_skip: expected at least 1, got 0"),
        (
            {"gravity": 3},
            "Hopper-v5 on mujoco.batch: expected arguments among .*, got 'gravity'; 'sync:Hopper",
        ),
        ({"env_id": "HalfCheetah-v5", "healthy_reward": 1.0}, "expected arguments among .*, got 'healthy_reward'"),
        ({"xml_file": "./no_such.xml"}, "xml_file: expected a MuJoCo model, found no file no_such.xml"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        MujocoVectorEnv(**{"env_id": "Hopper-v5", **arguments})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda env: env.step([[0, 0, 0], [np.inf, 0, 0]]), r"actions: expected finite numbers, got inf at \(1, 0\)"),
        (lambda env: env.step([[0, 0, 0]]), r"actions: expected shape \(2, 3\), got \(1, 3\)"),
        (lambda env: env.reset(options={"reset_mask": [True, False]}), r"shape \(2,\), got list"),
        (lambda env: MujocoVectorEnv("Hopper-v5").step([[0, 0, 0]]), "stepped before its first reset"),
    ],
)
def test_bad_calls_are_refused(call: Any, message: str) -> None:
    env = MujocoVectorEnv("Hopper-v5", 2)
    env.reset(seed=0)
    with pytest.raises(EnvError, match=message):
        call(env)


@pytest.mark.parametrize("env_id", NAMES)
def test_the_id_makes_the_own_environment_unless_told_otherwise(env_id: str) -> None:
    assert isinstance(make_vector(env_id, 2), MujocoVectorEnv)
    assert isinstance(make_vector(f"native:{env_id}", 2), MujocoVectorEnv)
    for other in (make_vector(f"sync:{env_id}", 2), make_vector(env_id, 2, engine="sync")):
        assert type(other).__name__ == "SyncVectorEnv"
        other.close()
    env = make_vector(env_id, 2, max_episode_steps=9)
    assert env.spec is not None
    assert (env.spec.id, env.spec.max_episode_steps) == (env_id, 9)
    assert gymnasium.spec(env_id).max_episode_steps == 1000
