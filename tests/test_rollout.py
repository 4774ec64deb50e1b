"""rollout on hand-counted environments, in every autoreset mode of gymnasium."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from core_fixtures import (
    ACT_DIM,
    OBS_DIM,
    CountingEnv,
    counting_vector,
    make_model,
    make_normalization,
    model_config,
    random_seeds,
)
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from gac_fast import ops
from gac_fast.act import Actor
from gac_fast.envs import close_vector, make_halves, make_vector
from gac_fast.envs.delayed import DelayedReward
from gac_fast.errors import DataError, EnvError
from gac_fast.rollout import Rollout, rollout

MODES = list(AutoresetMode)
FIELDS = ("returns", "lengths", "terminated", "first_observations", "packed_observations", "packed_actions")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while (left := [t for t in threading.enumerate() if t.name == "gac_fast rollout"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def assert_same(x: Rollout, y: Rollout) -> None:
    """Bit for bit."""
    assert x.n_kept == y.n_kept
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(x, field), getattr(y, field), err_msg=field)


def actor_maker(calls: list[tuple[np.ndarray, int]] | None = None):
    model = make_model(model_config())

    def make(obs: np.ndarray, first: int) -> Actor:
        if calls is not None:
            calls.append((obs.copy(), first))
        return Actor(model, make_normalization(), random_seeds(len(obs), model.config))

    return make


def hand_count(index: int, episode: int, length: int) -> float:
    """Sum of 100 * index + episode + t / 10 over t = 1 .. length."""
    return sum(100 * index + episode + t / 10 for t in range(1, length + 1))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_returns_and_lengths_of_one_round(mode):
    lengths = [[3], [1], [7]]
    result = rollout(counting_vector(lengths, mode), actor_maker(), 3, seed=0)
    assert result.lengths.tolist() == [3, 1, 7]
    assert result.returns.tolist() == pytest.approx([hand_count(i, 0, n) for i, (n,) in enumerate(lengths)])
    assert result.returns.dtype == np.float64
    assert result.terminated.tolist() == [True, False, True]
    assert result.first_observations.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_short_episodes_are_not_over_represented(mode):
    """One environment's episodes are ten times as long as the others': it still gives its share of them."""
    env = counting_vector([[2], [20], [2], [2]], mode)
    result = rollout(env, actor_maker(), 12)
    assert result.lengths.tolist() == [2, 20, 2, 2] * 3
    starts = result.first_observations.astype(int)
    expected = [hand_count(i, episode, n) for (i, episode, _), n in zip(starts, result.lengths, strict=True)]
    assert result.returns.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_a_last_round_smaller_than_the_vector(mode):
    calls: list[tuple[np.ndarray, int]] = []
    result = rollout(counting_vector([[2], [5], [3]], mode), actor_maker(calls), 5)
    assert result.lengths.tolist() == [2, 5, 3, 2, 5]
    assert [first for _, first in calls] == [0, 3]
    assert [len(obs) for obs, _ in calls] == [3, 3]
    assert result.first_observations[:, 0].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_truncation_and_termination_are_told_apart(mode):
    result = rollout(counting_vector([[4], [4]], mode), actor_maker(), 6)
    assert result.terminated.tolist() == [(i + episode) % 2 == 0 for i, episode, _ in result.first_observations]
    assert len(set(result.terminated.tolist())) == 2


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_kept_episodes_are_what_was_seen_and_done(mode):
    env = counting_vector([[3], [1], [4]], mode)
    result = rollout(env, actor_maker(), 6, keep=4)
    assert [len(x) for x in result.observations] == [3, 1, 4, 3]
    for i, (obs, actions) in enumerate(zip(result.observations, result.actions, strict=True)):
        assert obs.dtype == actions.dtype == np.float32
        assert obs[:, 0].tolist() == [i % 3] * len(obs)
        assert obs[:, 1].tolist() == [result.first_observations[i, 1]] * len(obs)
        assert obs[:, 2].tolist() == list(range(len(obs)))
        assert actions.shape == (len(obs), ACT_DIM)
    np.testing.assert_allclose(result.actions[2], env.envs[2].actions[:4])


def test_trajectories_of_a_rollout():
    env = counting_vector([[3], [1], [4]])
    data = rollout(env, actor_maker(), 6, keep=6).trajectories(env, "Counting-v0")
    assert data.lengths.tolist() == [3, 1, 4, 3, 1, 4]
    assert data.env_id == "Counting-v0"
    assert data.complete.all()
    assert data.returns[0] == pytest.approx(hand_count(0, 0, 3))
    assert (data.obs_dim, data.act_dim) == (OBS_DIM, ACT_DIM)
    assert (data.action_low.tolist(), data.action_high.tolist()) == ([-1.25, -2.5], [1.75, 3.5])


def test_trajectories_of_a_rollout_that_kept_some():
    env = counting_vector([[3], [1], [4]])
    result = rollout(env, actor_maker(), 6, keep=4)
    data = result.trajectories(env)
    assert data.lengths.tolist() == [3, 1, 4, 3]
    assert data.returns.tolist() == result.returns[:4].tolist()
    assert data.complete.tolist() == [True] * 4
    np.testing.assert_array_equal(data.observations, np.concatenate(result.observations))


def test_trajectories_of_a_rollout_that_kept_none():
    env = counting_vector([[3], [1], [4]])
    with pytest.raises(DataError, match="trajectories: expected at least 1 kept episode, got 0 of 6: set keep"):
        rollout(env, actor_maker(), 6).trajectories(env)


def test_whatever_acts_can_be_rolled_out():
    env = counting_vector([[3], [2]])
    env.action_space.seed(0)

    class RandomPolicy:
        def act(self, obs: np.ndarray) -> np.ndarray:
            return env.action_space.sample()

    result = rollout(env, lambda obs, first: RandomPolicy(), 4, keep=4)
    assert result.lengths.tolist() == [3, 2, 3, 2]
    assert len(np.unique(np.concatenate(result.actions), axis=0)) == 10


def test_the_plans_history_starts_anew_each_round():
    """A fresh actor repeats the second round: nothing of the first remains."""
    model = make_model(model_config(window=8))
    env = counting_vector([[5]])

    def make(obs, first):
        return Actor(model, make_normalization(), random_seeds(1, model.config))

    result = rollout(env, make, 2, keep=2)
    actor = make(None, 0)
    again = np.concatenate([actor.act(obs[None]) for obs in result.observations[1]])
    np.testing.assert_allclose(again, result.actions[1], rtol=0, atol=1e-6)


def test_rounds_are_seeded_one_after_another(monkeypatch):
    env = counting_vector([[2], [2]])
    seeds = []
    reset = env.reset
    monkeypatch.setattr(env, "reset", lambda **kwargs: (seeds.append(kwargs.get("seed")), reset(**kwargs))[1])
    rollout(env, actor_maker(), 6, seed=10)
    assert seeds == [10, 12, 14]
    seeds.clear()
    rollout(env, actor_maker(), 2)
    assert seeds == [None]
    seeds.clear()
    # Every row's seed, 2^31 - 2 at most here, is below 2^31; after the last block comes the beginning.
    rollout(env, actor_maker(), 6, seed=2**31 - 5)
    assert seeds == [2**31 - 5, 2**31 - 3, 1]


def test_no_two_episodes_of_a_rollout_start_alike():
    env = SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1", max_episode_steps=1)] * 4)

    class Still:
        def act(self, obs: np.ndarray) -> np.ndarray:
            return np.zeros((4, 1), np.float32)

    firsts = rollout(env, lambda obs, first: Still(), 16, seed=0).first_observations
    assert len(np.unique(firsts, axis=0)) == 16


def test_progress_counts_episodes_and_steps():
    calls = []
    rollout(counting_vector([[2], [4]]), actor_maker(), 3, on_step=lambda done, steps: calls.append((done, steps)))
    assert calls == [(0, 2), (1, 4), (1, 5), (2, 6), (2, 7), (3, 8)]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", "environment 1 failed at step 3, 1 episodes done: the arm fell off"),
        ("nan_observation", "environment 1 returned a non-finite observation at step 3, 1 episodes done"),
        ("nan_reward", "environment 1 returned a non-finite reward at step 3, 1 episodes done"),
    ],
)
def test_a_failing_environment_is_named(fault, message, mode):
    env = counting_vector([[1], [9]], mode, faults={1: {(0, 3): fault}})
    with pytest.raises(EnvError, match=message) as caught:
        rollout(env, actor_maker(), 2, keep=2)
    error = caught.value
    assert (error.environment, error.step) == (1, 3)
    assert error.finished.lengths.tolist() == [1]
    assert error.finished.returns.tolist() == pytest.approx([hand_count(0, 0, 1)])
    assert error.finished.z0.shape[0] == error.finished.n_kept == len(error.finished.observations) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", "environment 1 failed at its reset, 0 episodes done: the arm fell off"),
        ("nan_observation", "environment 1 returned a non-finite observation at its reset, 0 episodes done"),
    ],
)
def test_a_failing_reset_is_named(fault, message):
    with pytest.raises(EnvError, match=message) as caught:
        rollout(counting_vector([[3], [3]], faults={1: {(0, 0): fault}}), actor_maker(), 2)
    assert (caught.value.environment, caught.value.step, caught.value.finished) == (1, 0, None)


@pytest.mark.parametrize("fault", ["nan_observation", "nan_reward"])
def test_what_a_finished_environment_does_is_of_no_matter(fault):
    # Environment 0 is done after two steps; the fault is in an episode that is discarded.
    env = counting_vector([[2], [8]], faults={0: {(1, 1): fault}})
    result = rollout(env, actor_maker(), 2)
    assert result.lengths.tolist() == [2, 8]
    assert np.isfinite(result.returns).all()


def test_at_least_one_episode():
    with pytest.raises(EnvError, match="episodes: expected at least 1, got 0"):
        rollout(counting_vector([[2]]), actor_maker(), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Several vectors


def seeds_of(number: int, config: Any, n: int = 5) -> torch.Tensor:
    """Plan seeds that differ from number to number."""
    return torch.randn(n, config.n_z, config.dim, generator=torch.Generator().manual_seed(number))


class Elementwise:
    """A policy whose rows know nothing of each other, for any number of them; the sine makes small differences grow."""

    def __init__(self, act_dim: int, scale: float = 1.0) -> None:
        self.act_dim, self.scale = act_dim, scale

    def act(self, obs: np.ndarray) -> np.ndarray:
        return (self.scale * np.sin(20 * obs[:, -self.act_dim :])).astype(np.float32)


class Split(Elementwise):
    def split(self, sizes: Sequence[int]) -> list[Elementwise]:
        self.sizes = list(sizes)
        return [Elementwise(self.act_dim, self.scale) for _ in sizes]


class SeededCounting(CountingEnv):
    """Whose episode's number is that of the round, as the seed of row i in round r of five rows is 5 r + i."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            self.episode = (seed - self.index) // len(LENGTHS) - 1
        return super().reset(seed=seed)


def counting_parts(
    lengths: Sequence[Sequence[int]],
    sizes: Sequence[int],
    mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    faults: dict[int, dict[tuple[int, int], str]] | None = None,
    kind: Any = SyncVectorEnv,
) -> list[VectorEnv]:
    """As ``counting_vector``, in vectors of these sizes."""
    makers = [functools.partial(SeededCounting, i, one, (faults or {}).get(i)) for i, one in enumerate(lengths)]
    parts, first = [], 0
    for size in sizes:
        parts.append(kind(makers[first : first + size], autoreset_mode=mode))
        first += size
    return parts


LENGTHS = [[3, 5], [1, 2], [7, 2], [2, 9], [4, 4]]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("sizes", [(3, 2), (1, 4), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_parts_give_what_the_whole_gives(mode, sizes, noise):
    """Two rounds and a part of a third, with a real actor."""
    model = make_model(model_config(window=3))

    def make(obs: np.ndarray, first: int) -> Actor:
        assert len(obs) == len(LENGTHS)
        return Actor(model, make_normalization(), seeds_of(first, model.config), noise, seed=first)

    whole = rollout(counting_parts(LENGTHS, (5,), mode)[0], make, 12, seed=0, keep=11)
    parts = rollout(counting_parts(LENGTHS, sizes, mode), make, 12, seed=0, keep=11)
    assert whole.n_kept == parts.n_kept == 11
    for field in FIELDS[:-1]:
        np.testing.assert_array_equal(getattr(parts, field), getattr(whole, field), err_msg=field)
    # To the rounding of products of other heights.
    np.testing.assert_allclose(parts.packed_actions, whole.packed_actions, rtol=0, atol=1e-5)
    expected = np.concatenate([seeds_of(first, model.config) for first in (0, 5, 10)])[:12]
    for result in (whole, parts):
        np.testing.assert_array_equal(result.z0, expected)
        assert result.z0.dtype == np.float32


@pytest.mark.parametrize("env_id", ["Hopper-v5", "pointmaze-umaze", "sync:Hopper-v5"])
@pytest.mark.parametrize("policy", [Elementwise, Split])
def test_halves_of_a_simulation_are_the_whole_bit_for_bit(env_id, policy):
    arguments = {"max_episode_steps": 25}
    whole, halves = make_vector(env_id, 5, **arguments), make_halves(env_id, 5, **arguments)
    act_dim = whole.single_action_space.shape[0]
    results = [rollout(env, lambda obs, first: policy(act_dim), 13, seed=4, keep=13) for env in (whole, halves)]
    assert_same(*results)
    assert len(np.unique(results[0].first_observations, axis=0)) == 13
    delayed = rollout([DelayedReward(half) for half in halves], lambda obs, first: policy(act_dim), 13, seed=4, keep=13)
    assert_same(delayed, results[0])


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5"])
def test_delayed_rewards_of_whole_episodes_are_bit_for_bit_the_same(env_id):
    bare, delayed = make_vector(env_id, 3), DelayedReward(make_vector(env_id, 3))
    act_dim = bare.single_action_space.shape[0]
    results = [rollout(env, lambda obs, first: Elementwise(act_dim, 0.3), 4, seed=1, keep=4) for env in (bare, delayed)]
    assert_same(*results)
    assert np.abs(results[0].returns).min() > 0


def test_one_part_acts_while_another_is_stepped():
    """Each step of a vector lasts until the other one's actor has been called."""
    acting = [threading.Event(), threading.Event()]
    waited: list[bool] = []

    class Waits(CountingEnv):
        def step(self, action: np.ndarray) -> Any:
            waited.append(acting[1 - self.index].wait(20))
            return super().step(action)

    class Tells:
        def __init__(self, index: int) -> None:
            self.index, self.thread = index, None

        def act(self, obs: np.ndarray) -> np.ndarray:
            acting[self.index].set()
            return np.zeros((1, ACT_DIM), np.float32)

    class Both(Tells):
        def split(self, sizes: Sequence[int]) -> list[Tells]:
            return [Tells(0), Tells(1)]

    parts = [SyncVectorEnv([functools.partial(Waits, i, [3])]) for i in range(2)]
    assert rollout(parts, lambda obs, first: Both(-1), 2).lengths.tolist() == [3, 3]
    assert waited == [True] * 6


def test_without_split_all_rows_are_acted_for_at_once():
    shapes = []

    class Whole(Elementwise):
        def act(self, obs: np.ndarray) -> np.ndarray:
            shapes.append((len(obs), threading.current_thread() is threading.main_thread()))
            return super().act(obs)

    result = rollout(counting_parts(LENGTHS, (2, 3)), lambda obs, first: Whole(ACT_DIM), 5)
    assert result.lengths.tolist() == [3, 1, 7, 2, 4]
    assert shapes == [(5, True)] * 7


def test_a_part_whose_episodes_are_not_wanted_is_not_stepped():
    parts = counting_parts(LENGTHS, (3, 2))
    rollout(parts, lambda obs, first: Split(ACT_DIM), 2)
    assert [len(env.actions) for part in parts for env in part.envs[:1]] == [3, 0]


def test_progress_of_parts_goes_up_to_all():
    calls: list[tuple[int, int]] = []
    threads = set()

    def on_step(done: int, steps: int) -> None:
        threads.add(threading.current_thread())
        calls.append((done, steps))

    rollout(counting_parts(LENGTHS, (3, 2)), lambda obs, first: Split(ACT_DIM), 10, seed=0, on_step=on_step)
    assert threads == {threading.main_thread()}
    assert calls == sorted(set(calls))
    assert (5, 17) in calls
    assert calls[-1] == (10, 39)


def test_a_backend_that_is_forced_holds_for_the_parts_too():
    model = make_model(model_config())
    ops.reset_dispatch_counts()
    with ops.backend("reference"), torch.inference_mode():
        rollout(
            counting_parts(LENGTHS, (3, 2)),
            lambda obs, first: Actor(model, make_normalization(), random_seeds(5, model.config)),
            5,
        )
    assert {backend for (op, backend), n in ops.dispatch_counts().items() if n and op == "decode_step"} == {"reference"}


def test_vectors_that_do_not_fit_are_refused():
    env = counting_vector([[2]])
    with pytest.raises(EnvError, match="env: expected at least one vector environment, got none"):
        rollout([], actor_maker(), 1)
    with pytest.raises(EnvError, match="env: expected different vectors, got one of them twice"):
        rollout([env, env], actor_maker(), 1)
    with pytest.raises(EnvError, match="env: expected spaces of the same shapes in all vectors, got"):
        rollout([env, make_vector("Hopper-v5", 1)], actor_maker(), 1)
    with pytest.raises(EnvError, match="timeout: expected more than 0 seconds, got 0"):
        rollout(env, actor_maker(), 1, timeout=0)


# ---------------------------------------------------------------------------------------------------------------------
# Plan seeds, growth


def test_without_seeds_there_are_none():
    assert rollout(counting_vector([[2]]), lambda obs, first: Elementwise(ACT_DIM), 2).z0 is None
    # One actor of two had none.
    makers = [actor_maker(), lambda obs, first: Elementwise(ACT_DIM)]
    assert rollout(counting_vector([[2]]), lambda obs, first: makers[first](obs, first), 2).z0 is None


def test_an_actors_seeds_are_those_it_was_given():
    model = make_model(model_config())
    z0 = random_seeds(4, model.config)
    actor = Actor(model, make_normalization(), z0)
    torch.testing.assert_close(actor.z0, z0, rtol=0, atol=0)
    new = seeds_of(1, model.config, 4)
    actor.reset(np.array([False, True, False, True]), new)
    assert [torch.equal(actor.z0[i], (new if i % 2 else z0)[i]) for i in range(4)] == [True] * 4


def test_long_episodes_outgrow_the_first_buffers():
    env = counting_vector([[700], [3]])
    result = rollout(env, lambda obs, first: Elementwise(ACT_DIM), 4, keep=4)
    assert result.lengths.tolist() == [700, 3, 700, 3]
    for obs, n in zip(result.observations, result.lengths, strict=True):
        assert obs[:, 2].tolist() == list(range(n))
    assert result.cu_seqlens.tolist() == [0, 700, 703, 1403, 1406]
    assert all(np.shares_memory(obs, result.packed_observations) for obs in result.observations)


def test_observations_are_the_actors_until_it_has_acted():
    """One buffer takes all of a run's observations; what an actor is made from is its own."""
    addresses, made = set(), []

    class Looks(Elementwise):
        def act(self, obs: np.ndarray) -> np.ndarray:
            addresses.add(obs.ctypes.data)
            return super().act(obs)

    def make(obs: np.ndarray, first: int) -> Looks:
        made.append(obs)
        return Looks(ACT_DIM)

    rollout(counting_vector([[4], [3]]), make, 4)
    assert len(addresses) == 1
    assert len(made) == 2
    assert all(obs[:, 2].tolist() == [0, 0] for obs in made)


@pytest.mark.gpu
def test_observations_for_a_gpu_lie_in_pinned_memory():
    model = make_model(model_config()).to("cuda")
    pinned = []

    class Looks(Actor):
        def act(self, obs: np.ndarray) -> np.ndarray:
            pinned.append(torch.from_numpy(obs).is_pinned())
            return super().act(obs)

    def make(obs: np.ndarray, first: int) -> Actor:
        return Looks(model, make_normalization().to("cuda"), random_seeds(2, model.config))

    rollout(counting_vector([[4], [3]]), make, 2)
    assert pinned == [True] * 4


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong


@pytest.mark.parametrize("policy", [Elementwise, Split])
@pytest.mark.parametrize("fault", ["crash", "nan_observation", "nan_reward"])
def test_a_failing_part_leaves_what_was_finished(fault, policy):
    """The second round breaks in environment 3, the first of its vector, at step 4 of 9."""
    parts = counting_parts(LENGTHS, (3, 2), faults={3: {(1, 4): fault}})
    with pytest.raises(EnvError, match=r"environment 3 .* at step 4, \d+ episodes done") as caught:
        rollout(parts, lambda obs, first: policy(ACT_DIM), 20, seed=0, keep=20)
    error = caught.value
    assert (error.environment, error.step) == (3, 4)
    found = error.finished
    assert found.lengths[:5].tolist() == [3, 1, 7, 2, 4]
    # Of the second round whatever had ended: row 1 and 2 after two steps, perhaps row 4 after four, never row 3.
    rows = found.first_observations[5:, 0].astype(int).tolist()
    assert 3 not in rows
    assert rows == sorted(rows)
    assert found.n_kept == len(found.returns)
    for obs, n, start in zip(found.observations, found.lengths, found.first_observations, strict=True):
        assert obs[:, 2].tolist() == list(range(n))
        assert obs[0].tolist() == start.tolist()
    assert found.trajectories(parts[0]).num_steps == found.lengths.sum()


def test_an_action_that_is_not_finite_is_the_actors():
    class Breaks(Elementwise):
        def act(self, obs: np.ndarray) -> np.ndarray:
            actions = super().act(obs)
            actions[1] = np.where(obs[1, 2] == 3, np.nan, actions[1])
            return actions

    message = "the actor gave environment 1 an action that is not finite at step 4, 1 episodes done"
    with pytest.raises(EnvError, match=message) as caught:
        rollout(counting_vector([[2], [8]]), lambda obs, first: Breaks(ACT_DIM), 2)
    assert (caught.value.environment, caught.value.step) == (1, 4)
    assert caught.value.finished.lengths.tolist() == [2]


@pytest.mark.parametrize("policy", [Elementwise, Split])
def test_an_error_of_the_actor_is_its_own(policy):
    class Refuses(policy):
        def act(self, obs: np.ndarray) -> np.ndarray:
            raise FloatingPointError("no")

        def split(self, sizes: Sequence[int]) -> list[Any]:
            return [Refuses(ACT_DIM) for _ in sizes]

    with pytest.raises(FloatingPointError, match="no"):
        rollout(counting_parts(LENGTHS, (3, 2)), lambda obs, first: Refuses(ACT_DIM), 5)


class Stuck(CountingEnv):
    """Waits at step ``at`` of its second episode, if its index is ``who``, until it is let go or for 20 seconds."""

    def __init__(self, index: int, who: int, let_go: Any, at: int = 2) -> None:
        super().__init__(index, [3])
        self.who, self.let_go, self.at = who, let_go, at

    def step(self, action: np.ndarray) -> Any:
        if (self.index, self.episode, self.t + 1) == (self.who, 1, self.at):
            self.let_go()
        return super().step(action)


def stuck_parts(kind: Callable[..., VectorEnv], sizes: Sequence[int], let_go: Any) -> list[VectorEnv]:
    numbers = iter(range(sum(sizes)))
    return [kind([functools.partial(Stuck, next(numbers), 2, let_go) for _ in range(size)]) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "policy"), [((3,), Elementwise), ((1, 2), Elementwise), ((1, 2), Split), ((2, 1), Split)]
)
def test_a_simulator_that_hangs(policy, sizes):
    free = threading.Event()
    parts = stuck_parts(SyncVectorEnv, sizes, lambda: free.wait(20))
    where = {(3,): "one of the environments 0 to 2", (2, 1): "environment 2", (1, 2): "one of the environments 1 to 2"}
    message = rf"{where[sizes]} failed at step 2, \d episodes done: no answer within 1 s"
    try:
        with pytest.raises(EnvError, match=message) as caught:
            rollout(parts, lambda obs, first: policy(ACT_DIM), 9, timeout=1.0)
    finally:
        free.set()
    assert caught.value.step == 2
    # Where parts do not wait for each other, the others may have ended their second episode too.
    assert caught.value.finished.lengths.tolist()[:3] == [3, 3, 3]
    assert 2 not in caught.value.finished.first_observations[3:, 0]


@pytest.mark.parametrize("policy", [Elementwise, Split])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (functools.partial(time.sleep, 600), "no answer within 1 s"),
        (functools.partial(os._exit, 3), "EOFError|ConnectionResetError"),
        (functools.partial(int, "x"), "invalid literal for int"),
    ],
    ids=["hangs", "dies", "raises"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_process_that_fails_is_named(fault, message, policy):
    parts = stuck_parts(AsyncVectorEnv, (1, 2), fault)
    started = time.monotonic()
    with pytest.raises(EnvError, match=rf"environment 2 failed at step 2, \d episodes done: .*({message})") as caught:
        rollout(parts, lambda obs, first: policy(ACT_DIM), 9, timeout=1.0)
    assert (caught.value.environment, caught.value.step) == (2, 2)
    assert caught.value.finished.lengths.tolist()[:3] == [3, 3, 3]
    for part in parts:
        close_vector(part)
    # Nobody waits for the one that hangs.
    assert time.monotonic() - started < 300


def test_processes_take_turns_with_the_actor():
    """Disabled autoreset goes through the processes as well; results are those of one process."""
    arguments = {"mode": AutoresetMode.DISABLED}
    parts = counting_parts(LENGTHS, (3, 2), kind=AsyncVectorEnv, **arguments)
    whole = counting_parts(LENGTHS, (5,), **arguments)
    results = [rollout(env, lambda obs, first: Split(ACT_DIM), 12, seed=0, keep=12) for env in (parts, whole)]
    assert_same(*results)
    for part in parts:
        part.close()


@pytest.mark.parametrize("policy", [Elementwise, Split])
@pytest.mark.parametrize("sizes", [(5,), (3, 2)], ids=str)
def test_ctrl_c_ends_the_threads(sizes, policy):
    """The signal comes while the calling thread waits."""

    class Slow(CountingEnv):
        def step(self, action: np.ndarray) -> Any:
            time.sleep(0.002)
            if (self.index, self.t) == (0, 10):
                os.kill(os.getpid(), signal.SIGINT)
            return super().step(action)

    numbers = iter(range(5))
    parts = [SyncVectorEnv([functools.partial(Slow, next(numbers), [10_000]) for _ in range(size)]) for size in sizes]
    with pytest.raises(KeyboardInterrupt):
        rollout(parts, lambda obs, first: policy(ACT_DIM), 5)
    assert not [thread for thread in threading.enumerate() if thread.name == "gac_fast rollout"]
    # The vectors are as they were after some step and can be used again.
    assert all(len(part.reset()[0]) == part.num_envs for part in parts)


def test_without_a_timeout_a_single_vector_stays_in_the_calling_thread():
    threads = set()

    class Here(CountingEnv):
        def step(self, action: np.ndarray) -> Any:
            threads.add(threading.current_thread())
            return super().step(action)

    for timeout in (None, 5.0):
        rollout(SyncVectorEnv([functools.partial(Here, 0, [3])]), actor_maker(), 2, timeout=timeout)
        assert (threads == {threading.main_thread()}) == (timeout is None)
