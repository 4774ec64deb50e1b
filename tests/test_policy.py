"""Policy: choice of seeds, starts, overrides, bad input; load from a run and from damaged checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from core_fixtures import OBS_DIM, make_policy, make_trajectories, model_config

import gac_fast
from gac_fast import checkpoint
from gac_fast.config import Config, PlanConfig, TrainConfig
from gac_fast.errors import CheckpointError
from gac_fast.policy import from_checkpoint, load

PLAN = PlanConfig(n_steps=5, n_best=4, n_prior=3)


def policy(**fields):
    return make_policy(Config(model=model_config(**fields), plan=PLAN))


def obs(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, OBS_DIM)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def test_best_trajectories_are_usable_ones_by_return():
    p = policy()
    # Returns are 0 to 11; 11 and 3 are held out or cut.
    assert p.best(4).tolist() == [10, 9, 8, 7]
    assert p.best(12).tolist() == [10, 9, 8, 7, 6, 5, 4, 2, 1, 0, 10, 9]
    assert torch.equal(p.posterior_best(2).z0, p.z0[[10, 9]])


def test_exploit_starts_from_the_best_seeds_and_prior_samples():
    p = policy()
    plans = p.exploit(7, n_steps=0, n_best=4, n_prior=0)
    found = {tuple(row.flatten().tolist()) for row in plans.z0}
    assert found == {tuple(p.z0[i].flatten().tolist()) for i in (10, 9, 8, 7)}
    mixed = p.exploit(7, n_steps=0)
    seeds = {tuple(p.z0[i].flatten().tolist()) for i in range(12)}
    assert sum(tuple(row.flatten().tolist()) in seeds for row in mixed.z0) == 4


def test_prior_plans_are_standard_normal_and_seeded():
    p = policy()
    plans = p.prior_plans(500, seed=3)
    assert plans.z0.shape == (500, 2, 16)
    assert abs(float(plans.z0.mean())) < 5 / 16_000**0.5
    assert abs(float(plans.z0.std()) - 1) < 5 / 32_000**0.5
    assert torch.equal(plans.z0, p.prior_plans(500, seed=3).z0)
    assert not torch.equal(plans.z0, p.prior_plans(500, seed=4).z0)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and starts


@pytest.mark.parametrize("return_context", ["none", "first_state"])
@pytest.mark.parametrize("given", [None, "numpy", "tensor"])
def test_shapes_of_plans(return_context, given):
    p = policy(return_context=return_context)
    x = None if given is None else obs(6) if given == "numpy" else torch.from_numpy(obs(6))
    for plans in (p.exploit(6, x), p.explore(6, 45.0, x)):
        assert plans.z0.shape == (6, 2, 16)
        assert plans.return_mean.shape == plans.return_std.shape == (6,)
        assert bool((plans.return_std > 0).all())
        assert p.actor(plans).act(obs(6)).shape == (6, 2)


def test_given_starts_matter_only_where_the_return_model_takes_them():
    plain, knowing = policy(), policy(return_context="first_state")
    assert torch.equal(plain.exploit(3, obs(3)).z0, plain.exploit(3).z0)
    one, other = knowing.exploit(3, obs(3)), knowing.exploit(3, -obs(3))
    assert not torch.equal(one.return_mean, other.return_mean)
    # Each row is planned for its own start.
    swapped = knowing.exploit(3, obs(3)[::-1].copy())
    assert torch.allclose(swapped.return_mean, one.return_mean.flip(0), rtol=0, atol=1e-3)


def test_posterior_best_is_predicted_for_the_episodes_own_start():
    p = policy(return_context="first_state")
    plans = p.posterior_best(2)
    states = p.normalization.observations(p.first_observations[[10, 9]])
    with torch.no_grad():
        mean, _ = p.model.return_moments(p.model.prior(p.z0[[10, 9]]), states)
    assert torch.allclose(plans.return_mean, 40 + 10 * mean, rtol=0, atol=1e-4)


def test_overrides_replace_fields_of_the_plan_configuration():
    p = policy()
    assert not torch.equal(p.exploit(3, n_steps=1).z0, p.exploit(3, n_steps=20).z0)
    assert torch.equal(p.exploit(3, n_steps=5).z0, p.exploit(3).z0)
    with pytest.raises(gac_fast.ConfigError, match=r"plan\.n_stepz is unknown; expected one of"):
        p.exploit(3, n_stepz=1)
    with pytest.raises(gac_fast.ConfigError, match=r"plan\.n_steps must be an integer, got '3'"):
        p.exploit(3, n_steps="3")
    with pytest.raises(gac_fast.ConfigError, match=r"plan.step_size must be greater than 0, got -1"):
        p.exploit(3, step_size=-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.exploit(0), "n: expected at least 1 plan, got 0"),
        (lambda p: p.explore(0, 1.0), "n: expected at least 1 plan, got 0"),
        (lambda p: p.posterior_best(0), "n: expected at least 1 plan, got 0"),
        (lambda p: p.prior_plans(-1), "n: expected at least 1 plan, got -1"),
        (lambda p: p.explore(2, float("nan")), "target: expected a finite return, .*got nan"),
        (lambda p: p.exploit(2, obs(3)), r"obs: expected shape \[2, 3\], got \[3, 3\]"),
        (lambda p: p.exploit(2, obs(2)[:, :2]), r"obs: expected shape \[2, 3\], got \[2, 2\]"),
        (lambda p: p.exploit(2, obs(2) * np.nan), "obs: expected finite values, got NaN or infinity"),
        (lambda p: p.actor(torch.zeros(2, 1, 16)), r"z0: expected seeds of shape \[P, 2, 16\], got \[2, 1, 16\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(policy())


# ---------------------------------------------------------------------------------------------------------------------
# load


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = Config(
        model=model_config(return_context="first_state"),
        plan=PLAN,
        train=TrainConfig(n_updates=4, batch_size=4, checkpoint_every=2, warmup=1, held_out=0.2, device="cpu"),
    )
    data = make_trajectories([6, 5, 7, 4, 8, 5, 6, 7, 5, 6], complete=[True] * 7 + [False] + [True] * 2)
    path = tmp_path_factory.mktemp("runs") / "run"
    return gac_fast.train(data, config, path, progress=False, tensorboard=False)


def test_load_takes_the_newest_checkpoint_or_the_one_asked_for(run_dir):
    newest, early = load(run_dir), gac_fast.load(run_dir, step=2)
    assert (newest.step, early.step) == (4, 2)
    assert load(checkpoint.checkpoint_path(run_dir, 2)).step == 2
    assert newest.env_id == "Toy-v0"
    assert "Toy-v0, 10 trajectories, step 4" in repr(newest)
    assert not newest.model.training
    weights = [p.model.decoder.head.weight for p in (newest, early)]
    assert not torch.equal(*weights)


def test_a_loaded_policy_excludes_cut_and_held_out_episodes(run_dir):
    p = load(run_dir)
    tensors, _ = checkpoint.load(checkpoint.latest(run_dir))
    assert int(tensors["data.usable"].sum()) in (7, 8)  # 2 of 10 are held out, one is cut
    # Chains that were never moved are prior draws and no posterior seeds.
    moved = tensors["posterior.n_draws"][:10] > 1
    if "best.ids" in tensors:
        moved[tensors["best.ids"]] = True
    assert torch.equal(p.usable, tensors["data.usable"] & moved)
    assert not bool(p.usable[7])
    assert 7 not in p.best(50).tolist()


def test_loading_twice_gives_the_same_plans_and_actions(run_dir):
    one, two = load(run_dir), load(run_dir)
    plans = [p.exploit(3, obs(3), seed=1) for p in (one, two)]
    assert torch.equal(plans[0].z0, plans[1].z0)
    actions = [p.actor(x).act(obs(3)) for p, x in zip((one, two), plans, strict=True)]
    np.testing.assert_array_equal(*actions)
    assert np.abs(actions[0]).max() <= 2.0


def test_missing_runs_and_checkpoints(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*step_00000003"):
        load(run_dir, step=3)


def test_a_missing_tensor_or_entry_is_named(run_dir):
    tensors, state = checkpoint.load(checkpoint.latest(run_dir))
    for name in ("normalization.obs_std", "data.usable", "posterior.z0"):
        with pytest.raises(CheckpointError, match=f"run: expected '{name}' in it"):
            from_checkpoint({k: v for k, v in tensors.items() if k != name}, state, name="run")
    with pytest.raises(CheckpointError, match=r"(?s)weights do not fit its configuration.*decoder.head.weight"):
        from_checkpoint({k: v for k, v in tensors.items() if k != "model.decoder.head.weight"}, state)
    with pytest.raises(CheckpointError, match="expected 'obs_dim' in it"):
        from_checkpoint(tensors, {k: v for k, v in state.items() if k != "obs_dim"})


def test_weights_of_another_size_are_refused(run_dir):
    tensors, state = checkpoint.load(checkpoint.latest(run_dir))
    other = json.loads(json.dumps(state))
    other["config"]["model"]["dim"] = 32
    with pytest.raises(CheckpointError, match="weights do not fit its configuration"):
        from_checkpoint(tensors, other)


def test_an_exploiting_actor_plans_anew_for_the_states_at_hand(monkeypatch):
    model = model_config(return_context="first_state")
    p = make_policy(Config(model=model, plan=PLAN, train=TrainConfig(segment=4)))
    starts, plans = obs(3), p.exploit(3, obs(3))
    assert type(p.exploiting(plans)).__name__ == "Actor"
    asked = []
    exploit = p.exploit
    monkeypatch.setattr(p, "exploit", lambda n, obs, seed, **how: asked.append(obs) or exploit(n, obs, seed, **how))
    actor = p.exploiting(plans, 4, overrides={"replan_every": 2})
    by_hand = p.actor(plans)
    states = np.random.default_rng(1).normal(size=(6, 3, OBS_DIM)).astype(np.float32)
    for step, state in enumerate(states):
        if step == 3:
            # Environment 1 begins anew: it gets a plan for its new start, and its steps are counted from here.
            for one in (actor, by_hand):
                one.reset(np.array([False, True, False]))
        due = {2: [0, 1, 2], 3: [1], 4: [0, 2], 5: [1]}.get(step)
        if due:
            z0 = by_hand.z0.clone()
            z0[due] = exploit(len(due), state[due], 4).z0
            assert not torch.equal(z0, by_hand.z0)
            by_hand.change_plans(z0)
        np.testing.assert_array_equal(actor.act(state), by_hand.act(state))
    assert [len(one) for one in asked] == [3, 1, 2, 1]
    np.testing.assert_array_equal(asked[0].numpy(), states[2])
    assert not np.array_equal(starts, states[2])
    # Nothing is planned for what rests.
    actor.rest(np.array([True, False, True]))
    for state in states[:2]:
        actor.act(state)
    assert [len(one) for one in asked] == [3, 1, 2, 1, 1]
    actor.age[:] = [6, 3, 6]
    parts = actor.split([1, 2])
    assert [part.age.tolist() for part in parts] == [[6], [3, 6]]
