"""rollout on hand-counted environments, in every autoreset mode of gymnasium."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from core_fixtures import ACT_DIM, OBS_DIM, counting_vector, make_model, make_normalization, model_config, random_seeds
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gac_fast.act import Actor
from gac_fast.errors import DataError, EnvError
from gac_fast.rollout import rollout

MODES = list(AutoresetMode)


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
        ("crash", "the environment failed at step 2, 1 episodes done: the arm fell off"),
        ("nan_observation", "environment 1 returned a non-finite observation"),
        ("nan_reward", "environment 1 returned a non-finite reward"),
    ],
)
def test_a_failing_environment_is_named(fault, message, mode):
    env = counting_vector([[1], [9]], mode, faults={1: {(0, 3): fault}})
    with pytest.raises(EnvError, match=message):
        rollout(env, actor_maker(), 2)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", "the environment failed at its reset, 0 episodes done: the arm fell off"),
        ("nan_observation", "environment 1 returned a non-finite observation"),
    ],
)
def test_a_failing_reset_is_named(fault, message):
    with pytest.raises(EnvError, match=message):
        rollout(counting_vector([[3], [3]], faults={1: {(0, 0): fault}}), actor_maker(), 2)


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
