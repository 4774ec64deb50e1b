"""evaluate: which plan acts in which episode, what was predicted of it, numbers of the result, misfits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from core_fixtures import ACT_DIM, OBS_DIM, counting_vector, make_policy, model_config
from gymnasium.spaces import Box

from gac_fast import evaluate
from gac_fast.config import Config, PlanConfig
from gac_fast.errors import EnvError
from gac_fast.plan import Plans

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


def test_numbers_of_the_result():
    p = policy()
    result = evaluate(p, counting_vector([[1], [2], [3]]), episodes=3, plans=numbered_plans(p, 3), seed=6)
    returns = [0.1, 200.3, 600.6]
    assert result.returns.tolist() == pytest.approx(returns)
    assert result.mean == pytest.approx(np.mean(returns))
    assert result.std == pytest.approx(np.std(returns))
    assert result.standard_error == pytest.approx(np.std(returns) / 3**0.5)
    summary = json.loads(json.dumps(result.summary()))
    assert summary["episodes"] == 3
    assert summary["return_median"] == pytest.approx(200.3)
    assert summary["length_mean"] == 2
    assert summary["predicted_mean"] == 1
    assert summary["seed"] == 6
    assert summary["normalized_mean"] is None
    assert {"torch", "gymnasium", "mujoco"} <= summary["versions"].keys()


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


def test_progress_bar_reaches_the_end(capsys):
    evaluate(policy(), counting_vector([[2], [3]]), episodes=4, progress=True)
    assert "4/4" in capsys.readouterr().err
