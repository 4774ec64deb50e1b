"""evaluate: which plan acts in which episode, what was predicted of it, numbers of the result, misfits."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from core_fixtures import ACT_DIM, OBS_DIM, CountingEnv, counting_vector, make_policy, model_config
from gymnasium.spaces import Box
from gymnasium.vector import SyncVectorEnv

from gac_fast import evaluate
from gac_fast.config import Config, PlanConfig
from gac_fast.errors import EnvError
from gac_fast.intervals import bootstrap, interquartile_mean, t_interval
from gac_fast.plan import Plans, predict

# gac_fast.evaluate is the function.
evaluation = importlib.import_module("gac_fast.evaluate")
PLAN = PlanConfig(n_steps=2, n_best=3, n_prior=2)


def policy(**fields):
    return make_policy(Config(model=model_config(**fields), plan=PLAN))


def numbered_plans(p, n: int) -> Plans:
    """Prior plans whose prediction is their number."""
    plans = p.prior_plans(n)
    return Plans(plans.z0, torch.arange(n).float(), torch.arange(n).float() / 10)


def test_plan_i_acts_in_episode_i_over_several_rounds():
    p = policy()
    env = counting_vector([[3], [5]])
    plans = numbered_plans(p, 5)
    result = evaluate(p, env, episodes=5, plans=plans, keep=5)
    assert result.lengths.tolist() == [3, 5, 3, 5, 3]
    assert result.predicted.tolist() == [0, 1, 2, 3, 4]
    assert result.predicted_std.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    for i in range(5):
        actor = p.actor(plans[i : i + 1])
        expected = np.concatenate([actor.act(obs[None]) for obs in result.rollout.observations[i]])
        np.testing.assert_allclose(result.rollout.actions[i], expected, rtol=0, atol=1e-5)


def test_fewer_plans_than_episodes_repeat():
    p = policy()
    result = evaluate(p, counting_vector([[1], [1], [1]]), episodes=7, plans=numbered_plans(p, 2))
    assert result.predicted.tolist() == [0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("return_context", ["none", "first_state"])
def test_without_plans_it_exploits_for_each_episodes_start(return_context):
    p = policy(return_context=return_context)
    result = evaluate(p, counting_vector([[2], [2], [2]]), episodes=3, seed=4)
    chosen = p.exploit(3, result.rollout.first_observations, seed=4)
    np.testing.assert_allclose(result.predicted, chosen.return_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(result.predicted_std, chosen.return_std.numpy(), rtol=1e-5)


def test_given_plans_are_predicted_for_the_starts_of_their_episodes():
    p = policy(return_context="first_state")
    plans = p.posterior_best(4)
    result = evaluate(p, counting_vector([[2], [3], [2]]), episodes=5, plans=plans)
    starts = p.normalization.observations(torch.from_numpy(result.rollout.first_observations))
    again = predict(p.model, p.normalization, plans.z0[[0, 1, 2, 3, 0]], starts)
    np.testing.assert_allclose(result.predicted, again.return_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(result.predicted_std, again.return_std.numpy(), rtol=1e-5)
    assert not np.allclose(result.predicted[:4], plans.return_mean.numpy(), rtol=1e-3)


def test_numbers_of_the_result():
    p = policy()
    result = evaluate(p, counting_vector([[1], [2], [3]]), episodes=3, plans=numbered_plans(p, 3), seed=6)
    returns = [0.1, 200.3, 600.6]
    assert result.returns.tolist() == pytest.approx(returns)
    assert result.mean == pytest.approx(np.mean(returns))
    assert result.std == pytest.approx(np.std(returns))
    assert result.standard_error == pytest.approx(np.std(returns, ddof=1) / 3**0.5)
    summary = json.loads(json.dumps(result.summary()))
    assert summary["episodes"] == 3
    assert summary["return_median"] == pytest.approx(200.3)
    assert summary["length_mean"] == 2
    assert summary["predicted_mean"] == 1
    assert summary["seed"] == 6
    assert summary["normalized_mean"] is None
    assert {"torch", "gymnasium", "mujoco"} <= summary["versions"].keys()
    wide = dataclasses.replace(result, predicted_std=np.array([0.0, 199.3, 0.0]))
    assert wide.summary()["prediction_coverage"] == pytest.approx(1 / 3)
    # A decision transformer claims no spread, behaviour cloning predicts nothing.
    for std in (0.0, np.nan):
        claims = dataclasses.replace(result, predicted_std=np.full(3, std))
        assert claims.summary()["prediction_coverage"] is None
        assert evaluation.pooled([claims, claims])["prediction_coverage"] is None
    assert np.isnan(dataclasses.replace(result, returns=result.returns[:1]).standard_error)


def test_a_policy_of_another_environment_is_refused_with_both_names():
    env = counting_vector([[2]])
    env.single_observation_space = Box(-1, 1, (OBS_DIM + 4,), np.float32)
    message = (
        r"SyncVectorEnv: the policy was trained on Toy-v0 with observations \[3\] and actions \[2\], "
        r"got an environment with \[7\] and \[2\]"
    )
    with pytest.raises(EnvError, match=message):
        evaluate(policy(), env, episodes=2)
    with pytest.raises(
        EnvError, match=r"Pendulum-v1: the policy was trained on Toy-v0 .* got an environment with \[3\] and \[1\]"
    ):
        evaluate(policy(), "Pendulum-v1", episodes=2)
    assert ACT_DIM == 2


def test_action_spaces_of_other_bounds_are_refused():
    env = counting_vector([[2]])
    env.single_action_space = Box(np.float32([-1.25, -2.5]), np.float32([1.75, 3.6]), dtype=np.float32)
    message = (
        r"SyncVectorEnv: the policy was trained on Toy-v0 with actions whose high is \[1.75, 3.5\], "
        r"got an environment where it is \[1.75, 3.59"
    )
    with pytest.raises(EnvError, match=message):
        evaluate(policy(), env, episodes=1)
    env.single_action_space = Box(-1, 1, (ACT_DIM,), np.float32)
    with pytest.raises(EnvError, match=r"with actions whose low is \[-1.25, -2.5\], got an environment where it is"):
        evaluate(policy(), env, episodes=1)
    env.single_action_space = Box(-np.inf, np.inf, (ACT_DIM,), np.float32)
    evaluate(policy(), env, episodes=1)


@pytest.fixture
def toy_ids():
    """Tasks A and B of the same shapes, in two namespaces and versions."""
    names = ["test_gac/ToyA-v0", "ToyA-v3", "test_gac/ToyB-v0"]
    for name in names:
        gymnasium.register(name, entry_point=lambda: CountingEnv(0, [2]))
    yield names
    for name in names:
        del gymnasium.registry[name]


def policy_of(env_id: str | None):
    return make_policy(Config(model=model_config(), plan=PLAN), env_id=env_id)


@pytest.mark.usefixtures("toy_ids")
def test_another_task_of_the_same_shapes_is_refused_by_id_and_allowed_as_a_vector():
    p = policy_of("test_gac/ToyA-v0")
    message = (
        "test_gac/ToyB-v0: the policy was trained on test_gac/ToyA-v0, another task with spaces of the same shapes; "
        "pass a vector environment to run it there all the same"
    )
    with pytest.raises(EnvError, match=message):
        evaluate(p, "test_gac/ToyB-v0", episodes=1)
    with pytest.raises(EnvError, match=r"trained on some\.module:test_gac/ToyA-v0, another task"):
        evaluate(policy_of("some.module:test_gac/ToyA-v0"), "test_gac/ToyB-v0", episodes=1)
    vector = SyncVectorEnv([lambda: gymnasium.make("test_gac/ToyB-v0", disable_env_checker=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(p, vector, episodes=1)


@pytest.mark.usefixtures("toy_ids")
@pytest.mark.parametrize(
    "trained_on", ["test_gac/ToyA-v0", "ToyA-v3", None, "", "hopper-medium-v2", "a file: of mine / v1", "ToyC-v0"]
)
def test_versions_namespaces_and_names_that_gymnasium_does_not_know_are_no_hindrance(trained_on):
    assert len(evaluate(policy_of(trained_on), "ToyA-v3", episodes=1).returns) == 1


MAZE_NAMES = ["gac_fast/PointMaze-umaze-v0", "pointmaze-umaze", "PointMaze_UMaze-v3", "maze2d-umaze-v1"]


@pytest.mark.parametrize("env_id", ["gac_fast/PointMaze-umaze-v0", "pointmaze-umaze", "PointMaze-UMaze"])
@pytest.mark.parametrize("trained_on", MAZE_NAMES)
def test_a_maze_is_one_task_under_all_its_names(trained_on, env_id):
    evaluation.check_task(trained_on, env_id)


@pytest.mark.parametrize("trained_on", ["gac_fast/PointMaze-medium-v0", "pointmaze-medium", "PointMaze_Medium-v3"])
def test_another_maze_is_another_task(trained_on):
    with pytest.raises(EnvError, match=f"pointmaze-umaze: the policy was trained on {trained_on}, another task"):
        evaluation.check_task(trained_on, "pointmaze-umaze")


def test_unknown_environments_and_no_episodes():
    with pytest.raises(EnvError, match="NoSuchMaze-v9"):
        evaluate(policy(), "NoSuchMaze-v9", episodes=2)
    with pytest.raises(EnvError, match="episodes: expected at least 1, got 0"):
        evaluate(policy(), counting_vector([[2]]), episodes=0)


def test_the_callers_environment_stays_open_and_an_own_one_is_closed(monkeypatch):
    env = counting_vector([[2]])
    evaluate(policy(), env, episodes=1)
    assert not env.closed
    from gac_fast import envs

    made = counting_vector([[2]], faults={0: {(0, 1): "crash"}})
    monkeypatch.setattr(envs, "make_vector", lambda *args, **kwargs: made)
    with pytest.raises(EnvError, match="the arm fell off"):
        evaluate(policy(), "Toy-v0", episodes=1)
    assert made.closed


def test_parts_are_evaluated_as_one(monkeypatch):
    """Plans are made for all rows at once, whichever vector they are in."""
    p = policy(return_context="first_state")
    whole = evaluate(p, counting_vector([[3], [5], [2]]), episodes=3, seed=4, keep=3)
    makers = [functools.partial(CountingEnv, i, [n]) for i, n in enumerate((3, 5, 2))]
    parts = [SyncVectorEnv(makers[:2]), SyncVectorEnv(makers[2:])]
    found = evaluate(p, parts, episodes=3, seed=4, keep=3)
    assert found.returns.tolist() == whole.returns.tolist()
    assert found.predicted.tolist() == whole.predicted.tolist()
    np.testing.assert_array_equal(found.rollout.z0, whole.rollout.z0)
    np.testing.assert_allclose(found.rollout.packed_actions, whole.rollout.packed_actions, rtol=0, atol=1e-5)
    assert not any(part.closed for part in parts)
    with pytest.raises(EnvError, match="env: expected an environment id or at least one vector environment, got none"):
        evaluate(p, [], episodes=1)
    # Parts that were made for it are all closed again.
    monkeypatch.setattr("gac_fast.envs.make_parts", lambda *args, **kwargs: parts)
    evaluate(p, "Toy-v0", episodes=3)
    assert all(part.closed for part in parts)


def test_progress_bar_reaches_the_end(capsys):
    evaluate(policy(), counting_vector([[2], [3]]), episodes=4, progress=True)
    assert "4/4" in capsys.readouterr().err


def test_interquartile_mean_leaves_out_a_quarter_rounded_down_at_either_end():
    x = np.array([[7.0, -50, 3, 4, 5, 900, 1], [1, 1, 1, 1, 1, 1, 99]])
    assert interquartile_mean(x).tolist() == [(1 + 3 + 4 + 5 + 7) / 5, 1]
    assert interquartile_mean([5.0, 1, 9]) == 5
    assert interquartile_mean([1.0, 2, 4, 100]) == 3


def test_bootstrap_intervals_are_those_of_all_resamples():
    runs = [np.array([0.0, 1.0, 5.0]), np.array([10.0, 13.0, 14.0])]
    draws = [[np.array(x) for x in itertools.product(run, repeat=3)] for run in runs]
    within = [interquartile_mean(np.concatenate(pair)) for pair in itertools.product(*draws)]
    over = [
        interquartile_mean(np.concatenate(pair))
        for i, j in itertools.product(range(2), repeat=2)
        for pair in itertools.product(draws[i], draws[j])
    ]
    for resample_runs, every in ((False, within), (True, over)):
        found = bootstrap(runs, interquartile_mean, level=0.8, n_resamples=40_000, resample_runs=resample_runs, seed=3)
        np.testing.assert_allclose(found, np.percentile(every, (10, 90)), atol=0.02)
    assert bootstrap(runs, interquartile_mean, seed=1) == bootstrap(runs, interquartile_mean, seed=1)
    # Of large samples the interval is the normal one, and what lies between the runs is no part of it.
    rng = np.random.default_rng(0)
    large = [rng.normal(centre, 2, 4000) for centre in (0, 100)]
    low, high = bootstrap(large, lambda x: x.mean(-1), n_resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * 2 / 8000**0.5, rel=0.08)
    with pytest.raises(ValueError, match=r"as many scores of every run to resample runs, got \[3, 4\]"):
        bootstrap([runs[0], np.ones(4)], interquartile_mean, resample_runs=True)
    # Tables of Student's t: 4.302653 for 2 degrees of freedom, 2.776445 for 4.
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    assert t_interval([0.0, 1, 2, 3, 4])[1] == pytest.approx(2 + 2.776445 * 0.5**0.5, abs=1e-6)
    assert t_interval([1.0]) is None


def test_pooled_numbers_of_runs():
    p = policy()
    one = evaluate(p, counting_vector([[1], [2], [3]]), episodes=3, plans=numbered_plans(p, 3))
    shifted = [dataclasses.replace(one, env_id="Hopper-v5", returns=one.returns + shift) for shift in (0, 30, 90)]
    found = json.loads(json.dumps(evaluation.pooled(shifted)))
    means = [r.mean for r in shifted]
    assert (found["runs"], found["episodes"]) == (3, 9)
    assert found["return_mean"] == pytest.approx(np.mean(means))
    assert found["return_standard_error"] == pytest.approx(np.std(means, ddof=1) / 3**0.5)
    assert found["return_mean_interval"] == pytest.approx(t_interval(means))
    assert found["return_iqm"] == pytest.approx(interquartile_mean(np.concatenate([r.returns for r in shifted])))
    # Predicted: 0, 1, 2.
    assert found["prediction_bias"] == pytest.approx(1 - np.mean(means))
    assert found["normalized_mean"] == pytest.approx((np.mean(means) + 20.272305) / 32.54572305)
    low, high = (np.array(found["return_iqm_interval"]) + 20.272305) / 32.54572305
    assert found["normalized_iqm_interval"] == pytest.approx([low, high])
    with pytest.raises(ValueError, match="of one environment and number of episodes"):
        evaluation.pooled([one, shifted[0]])
