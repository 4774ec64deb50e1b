"""The one protocol, over every kind of vector environment that a rollout may be given."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
from core_fixtures import CountingEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from gac_fast.envs import ENGINES, close_vector, make_halves, make_parts, make_vector
from gac_fast.envs.batch import BatchVectorEnv
from gac_fast.envs.delayed import DelayedReward
from gac_fast.envs.envpool import EnvPoolVectorEnv
from gac_fast.errors import EnvError
from gac_fast.rollout import rollout

HORIZON = 3
N = 2


class FakePool:
    """What ``envpool.make_gymnasium`` returns, as far as it is documented: the step after an episode's last ignores the
    action and gives the new start, rewards are float32, seeds are fixed when the pool is made."""

    def __init__(self, makers: list[Callable[[], gymnasium.Env[Any, Any]]], seed: int = 42) -> None:
        self.envs = [maker() for maker in makers]
        self.observation_space, self.action_space = self.envs[0].observation_space, self.envs[0].action_space
        self._seeds: list[int | None] = [seed + i for i in range(len(self.envs))]
        self._done = np.zeros(len(self.envs), np.bool_)
        self.closed = False

    def _start(self, i: int) -> np.ndarray:
        seed, self._seeds[i] = self._seeds[i], None
        return self.envs[i].reset(seed=seed)[0]

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        self._done[:] = False
        return np.stack([self._start(i) for i in range(len(self.envs))]), {"env_id": np.arange(len(self.envs))}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        results = [
            (self._start(i), 0.0, False, False, {}) if self._done[i] else env.step(action)
            for i, (env, action) in enumerate(zip(self.envs, actions, strict=True))
        ]
        observations, rewards, terminations, truncations, _ = zip(*results, strict=True)
        self._done = np.array(terminations) | np.array(truncations)
        return (
            np.stack(observations), np.array(rewards, np.float32), np.array(terminations), np.array(truncations),
            {"env_id": np.arange(len(self.envs)), "players": {"env_id": np.arange(len(self.envs))}},
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


def gym_maker(env_id: str) -> Callable[[], gymnasium.Env[Any, Any]]:
    return functools.partial(gymnasium.make, env_id, max_episode_steps=HORIZON)


def fake_pool(seed: int | None) -> FakePool:
    return FakePool([gym_maker("Hopper-v5")] * N, **({} if seed is None else {"seed": seed}))


def gym_vector(kind: Any, env_id: str, mode: AutoresetMode) -> VectorEnv:
    return kind([gym_maker(env_id)] * N, autoreset_mode=mode)


def real_pool() -> VectorEnv:
    pytest.importorskip("envpool", exc_type=ImportError)
    return make_vector("envpool:Hopper-v5", N, max_episode_steps=HORIZON)


NEXT, SAME, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED

BARE: dict[str, Callable[[], VectorEnv]] = {
    "native maze": lambda: make_vector("pointmaze-umaze", N, max_episode_steps=HORIZON),
    "native maze, disabled": lambda: make_vector(
        "pointmaze-umaze", N, max_episode_steps=HORIZON, autoreset_mode=DISABLED
    ),
    "native hopper": lambda: make_vector("Hopper-v5", N, max_episode_steps=HORIZON),
    "native hopper, disabled": lambda: make_vector("Hopper-v5", N, max_episode_steps=HORIZON, autoreset_mode=DISABLED),
    "sync maze": lambda: make_vector("sync:pointmaze-umaze", N, max_episode_steps=HORIZON),
    "sync": lambda: make_vector("sync:Hopper-v5", N, max_episode_steps=HORIZON),
    "sync, same step": lambda: gym_vector(SyncVectorEnv, "Hopper-v5", SAME),
    "sync, disabled": lambda: gym_vector(SyncVectorEnv, "Hopper-v5", DISABLED),
    "async": lambda: make_vector("async:Hopper-v5", N, max_episode_steps=HORIZON),
    "async, same step": lambda: gym_vector(AsyncVectorEnv, "Pendulum-v1", SAME),
    "async, disabled": lambda: gym_vector(AsyncVectorEnv, "Pendulum-v1", DISABLED),
    "envpool, stand-in": lambda: EnvPoolVectorEnv("Hopper-v5", N, make_pool=fake_pool),
    "envpool": real_pool,
}
KINDS = {**BARE, **{f"delayed {name}": lambda make=make: DelayedReward(make()) for name, make in BARE.items()}}


@pytest.fixture(params=KINDS)
def env(request: pytest.FixtureRequest) -> Iterator[VectorEnv]:
    vector = KINDS[request.param]()
    yield vector
    close_vector(vector)


def zeros(env: VectorEnv) -> np.ndarray:
    return np.zeros(env.action_space.shape, np.float32)


def test_the_protocol(env: VectorEnv) -> None:
    """Shapes, types, seeds, and episodes of three steps counted by hand: one test, as processes are slow to start."""
    assert isinstance(env, VectorEnv)
    assert env.num_envs == N
    mode = env.metadata["autoreset_mode"]
    for whole, single in (
        (env.observation_space, env.single_observation_space),
        (env.action_space, env.single_action_space),
    ):
        assert whole.shape == (N, *single.shape)
        assert whole.dtype == single.dtype

    starts = []
    for seed in (5, 5, 6):
        observations, info = env.reset(seed=seed)
        assert observations.shape == env.observation_space.shape
        assert observations.dtype == env.observation_space.dtype
        assert isinstance(info, dict)
        starts.append(np.array(observations))
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])
    assert not np.array_equal(starts[0][0], starts[0][1])

    ends, seen = [], [np.array(observations)]
    for step in range(1, 10):
        observations, rewards, terminations, truncations, _ = env.step(zeros(env))
        assert observations.dtype == env.observation_space.dtype
        assert rewards.dtype == np.float64
        for flags in (terminations, truncations):
            assert (flags.dtype, flags.shape) == (np.bool_, (N,))
        seen.append(np.array(observations))
        done = terminations | truncations
        assert done.all() or not done.any()
        if done.any():
            ends.append(step)
            if mode is DISABLED:
                observations, _ = env.reset(options={"reset_mask": done})
                seen[-1] = np.array(observations)
        elif mode is NEXT and step - 1 in ends:
            np.testing.assert_array_equal(rewards, 0)
    # With NEXT_STEP every fourth step only resets.
    assert ends == ([3, 7] if mode is NEXT else [3, 6, 9])
    # What follows the end is a start: another one, and near the model's pose.
    new = seen[4] if mode is NEXT else seen[3]
    assert not np.array_equal(new, seen[0])


@pytest.mark.parametrize("name", BARE)
def test_a_rollout_of_every_kind(name: str) -> None:
    """Two and a half rounds; delayed rewards change nothing; a seed gives the same again."""
    bare, wrapped = BARE[name](), DelayedReward(BARE[name]())

    class Swinging:
        def __init__(self) -> None:
            self.t = 0

        def act(self, obs: np.ndarray) -> np.ndarray:
            assert obs.dtype == np.float32
            self.t += 1
            return np.full(bare.action_space.shape, np.sin(self.t), np.float32)

    results = [rollout(one, lambda obs, first: Swinging(), 5, seed=3, keep=5) for one in (bare, wrapped, bare)]
    for result in results:
        assert result.lengths.tolist() == [HORIZON] * 5
        for field in ("returns", "lengths", "terminated", "first_observations", "packed_observations"):
            np.testing.assert_array_equal(getattr(result, field), getattr(results[0], field))
    if "maze" not in name:
        assert len(np.unique(results[0].returns)) == 5
    assert len(np.unique(results[0].first_observations, axis=0)) == 5
    close_vector(bare)
    close_vector(wrapped)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
def test_delayed_rewards_are_sums_paid_at_the_end(mode: AutoresetMode) -> None:
    """Counted by hand: episode k of environment i rewards 100 i + k + t / 10 at its step t."""
    makers = [functools.partial(CountingEnv, i, lengths) for i, lengths in enumerate([[2, 1], [3]])]
    env = DelayedReward(SyncVectorEnv(makers, autoreset_mode=mode))
    env.reset()
    paid: list[list[float]] = []
    for _ in range(7):
        _, rewards, terminations, truncations, _ = env.step(np.zeros((2, 2), np.float32))
        paid.append(rewards.tolist())
        done = terminations | truncations
        if mode is DISABLED and done.any():
            env.reset(options={"reset_mask": done})
    first, second, long = [0.1 + 0.2], [1.1], [100.1 + 100.2 + 100.3]
    expected = {
        NEXT: [[0, *first, 0, *second, 0, 0, 2.1 + 2.2], [0, 0, *long, 0, 0, 0, 101.1 + 101.2 + 101.3]],
        SAME: [
            [0, *first, *second, 0, 2.1 + 2.2, 3.1, 0],
            [0, 0, *long, 0, 0, 101.1 + 101.2 + 101.3, 0],
        ],
    }
    expected[DISABLED] = expected[SAME]
    np.testing.assert_array_equal(np.array(paid).T, expected[mode])


def test_a_reset_half_way_forgets_the_sum() -> None:
    env = DelayedReward(SyncVectorEnv([functools.partial(CountingEnv, i, [2]) for i in range(2)]))
    env.reset()
    env.step(np.zeros((2, 2), np.float32))
    env.reset()
    env.step(np.zeros((2, 2), np.float32))
    assert env.step(np.zeros((2, 2), np.float32))[1].tolist() == [1.1 + 1.2, 101.1 + 101.2]


# ---------------------------------------------------------------------------------------------------------------------
# EnvPool


def test_a_seed_makes_a_new_pool_and_closes_the_old_one() -> None:
    made: list[tuple[int | None, FakePool]] = []

    def make(seed: int | None) -> FakePool:
        made.append((seed, fake_pool(seed)))
        return made[-1][1]

    env = EnvPoolVectorEnv("Hopper-v5", N, make_pool=make)
    env.reset(seed=7)
    env.reset()
    assert [seed for seed, _ in made] == [None, 7]
    assert [pool.closed for _, pool in made] == [True, False]
    env.close()
    assert made[-1][1].closed


def test_what_a_pool_cannot_do_is_refused() -> None:
    env = EnvPoolVectorEnv("Hopper-v5", N, make_pool=fake_pool)
    with pytest.raises(EnvError, match="environment 0 was stepped before its first reset"):
        env.step(zeros(env))
    with pytest.raises(EnvError, match="options: expected none, as EnvPool resets finished rows by itself"):
        env.reset(options={"reset_mask": np.ones(N, np.bool_)})
    env.reset()
    with pytest.raises(EnvError, match=r"actions: expected shape \(2, 3\), got \(1, 3\)"):
        env.step(zeros(env)[:1])
    with pytest.raises(EnvError, match="num_envs: expected at least 1, got 0"):
        EnvPoolVectorEnv("Hopper-v5", 0, make_pool=fake_pool)


def test_without_envpool_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(EnvError, match=r"EnvPool cannot be imported \(.*\): install it with 'pip install gac_fast"):
        make_vector("envpool:Hopper-v5", 2)


def test_envpools_arguments_and_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def make_gymnasium(env_id: str, **arguments: Any) -> FakePool:
        calls.append((env_id, arguments))
        if env_id == "Nothing-v0":
            raise ValueError("no such task")
        return fake_pool(arguments.get("seed"))

    module = ModuleType("envpool")
    monkeypatch.setattr(module, "make_gymnasium", make_gymnasium, raising=False)
    monkeypatch.setitem(sys.modules, "envpool", module)
    env = make_vector("Hopper-v5", N, engine="envpool", num_threads=3, seed=9)
    assert isinstance(env, EnvPoolVectorEnv)
    expected = {"num_envs": N, "num_threads": 3}
    assert calls == [("Hopper-v5", expected), ("Hopper-v5", {**expected, "seed": 9})]
    with pytest.raises(EnvError, match="EnvPool cannot make environment 'Nothing-v0': no such task"):
        make_vector("envpool:Nothing-v0", N)


# ---------------------------------------------------------------------------------------------------------------------
# Engines, halves and parts


def test_an_engine_is_named_in_front_or_by_keyword() -> None:
    assert ENGINES == ("native", "sync", "async", "envpool")
    with pytest.raises(EnvError, match="engine: expected one of native, sync, async, envpool, got 'fast'"):
        make_vector("Hopper-v5", 2, engine="fast")
    with pytest.raises(EnvError, match=r"'native:Pendulum-v1': expected one that runs on mujoco.batch \(gac_fast"):
        make_vector("native:Pendulum-v1", 2)
    env = make_vector("native:Hopper-v5", 2, engine="sync")
    assert isinstance(env, SyncVectorEnv)
    env.close()


@pytest.mark.parametrize("env_id", ["pointmaze-umaze", "Hopper-v5", "sync:Hopper-v5"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_halves_start_as_the_whole_does(env_id: str, n: int) -> None:
    halves, whole = make_halves(env_id, n, max_episode_steps=4), make_vector(env_id, n, max_episode_steps=4)
    assert [half.num_envs for half in halves] == {1: [1], 2: [1, 1], 5: [3, 2]}[n]
    for seed in (0, 12):
        expected, _ = whole.reset(seed=seed)
        first = 0
        for half in halves:
            observations, _ = half.reset(seed=seed + first)
            np.testing.assert_array_equal(observations, expected[first : first + half.num_envs])
            first += half.num_envs


def test_halves_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for n_cpus, threads in ((1, 1), (2, 1), (7, 4)):
        monkeypatch.setattr("gac_fast.envs.batch.available_cpus", lambda n_cpus=n_cpus: n_cpus)
        halves = make_halves("Hopper-v5", 20)
        assert [half._batch.nthread for half in halves] == [threads, threads]
    assert [half._batch.nthread for half in make_halves("Hopper-v5", 20, n_threads=3)] == [3, 3]


def test_parts_are_halves_where_python_does_not_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gac_fast.envs.batch.available_cpus", lambda: 2)
    assert [part.num_envs for part in make_parts("pointmaze-umaze", 7)] == [4, 3]
    assert [part.num_envs for part in make_parts("native:Hopper-v5", 4)] == [2, 2]
    assert [part.num_envs for part in make_parts("Hopper-v5", 1)] == [1]
    assert [part.num_envs for part in make_parts("sync:Hopper-v5", 4)] == [4]
    assert [part.num_envs for part in make_parts("Pendulum-v1", 4)] == [4]
    monkeypatch.setattr("gac_fast.envs.batch.available_cpus", lambda: 1)
    parts = make_parts("Hopper-v5", 4)
    assert [part.num_envs for part in parts] == [4]
    assert isinstance(parts[0], BatchVectorEnv)


def test_a_first_row_below_zero() -> None:
    with pytest.raises(EnvError, match="first_row: expected at least 0, got -1"):
        make_vector("pointmaze-umaze", 2, first_row=-1)
