"""The whole way on a GPU: train, resume, load, plan, act, evaluate. Each part's own tests say that it is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_fixtures import ACT_DIM, OBS_DIM, counting_vector, make_normalization, model_config

from gac_fast import evaluate
from gac_fast.config import Config, PlanConfig, TrainConfig
from gac_fast.data import Trajectories, from_episodes
from gac_fast.policy import load
from gac_fast.train.log import last_metrics
from gac_fast.train.offline import train

DEVICE = "cuda"
N_EPISODES = 12


def episodes() -> Trajectories:
    """Random ones in the action space of the counting environment."""
    rng = np.random.default_rng(0)
    units = make_normalization()
    low, high = (units.action_mid - units.action_half).numpy(), (units.action_mid + units.action_half).numpy()
    parts = [
        {
            "observations": rng.normal(size=(length, OBS_DIM)),
            "actions": rng.uniform(low, high, size=(length, ACT_DIM)),
            "rewards": rng.normal(size=length),
        }
        for length in rng.integers(3, 12, size=N_EPISODES)
    ]
    return from_episodes(parts, action_bounds=(low, high))


def config(n_updates: int, **model: str) -> Config:
    return Config(
        model=model_config(**model),
        train=TrainConfig(n_updates=n_updates, batch_size=4, log_every=1, checkpoint_every=100, device=DEVICE),
        plan=PlanConfig(n_steps=3, n_best=4, n_prior=4),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize("return_context", ["none", "first_state"])
def test_from_arrays_to_an_evaluation(tmp_path, context, return_context):
    data, fields = episodes(), {"context": context, "return_context": return_context}
    run = train(data, config(5, **fields), tmp_path / "run", progress=False, tensorboard=False)
    assert load(run, device=DEVICE).step == 5
    train(data, config(7, **fields), run, resume=True, progress=False, tensorboard=False)
    assert np.isfinite(list(last_metrics(run / "metrics.csv").values())).all()

    policy = load(run, device=DEVICE)
    assert policy.step == 7
    assert {p.device.type for p in policy.model.parameters()} == {policy.device.type} == {DEVICE}
    obs = np.random.default_rng(1).normal(size=(3, OBS_DIM)).astype(np.float32)
    for plans in (policy.exploit(3, obs), policy.explore(3, float(data.returns.max()), obs), policy.posterior_best(3)):
        assert plans.z0.shape == (3, 2, 16)
        assert {plans.z0.device.type, plans.return_mean.device.type} == {DEVICE}
        assert all(bool(x.isfinite().all()) for x in (plans.z0, plans.return_mean, plans.return_std))

    actor, again = policy.actor(plans), policy.actor(plans.z0.double().cpu().numpy())
    action = actor.act(obs)
    assert isinstance(action, np.ndarray)
    on_device = again.act(torch.from_numpy(obs).to(DEVICE))
    assert on_device.device.type == DEVICE
    np.testing.assert_array_equal(action, on_device.cpu().numpy())
    # What is checked on the CPU alone: a NaN lasts until the reset, and no longer.
    if DEVICE == "cuda":
        again.act(torch.full((3, OBS_DIM), torch.nan, device=DEVICE))
    again.reset(np.ones(3, np.bool_))
    np.testing.assert_array_equal(again.act(obs), action)

    for given in (plans, None):
        result = evaluate(policy, counting_vector([[3], [5]]), episodes=5, plans=given, keep=5)
        assert result.lengths.tolist() == [3, 5, 3, 5, 3]
        assert np.isfinite(result.predicted).all()
        assert np.isfinite(np.concatenate(result.rollout.actions)).all()
