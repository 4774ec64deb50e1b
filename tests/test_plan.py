"""exploit, explore and TargetSchedule."""

from __future__ import annotations

import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from core_fixtures import OBS_DIM, make_model, make_normalization, model_config, random_seeds
from torch.utils._python_dispatch import TorchDispatchMode

from gac_fast import ops
from gac_fast.config import PlanConfig
from gac_fast.plan import Plans, TargetSchedule, exploit, explore, predict

CONFIG = PlanConfig(n_steps=15, step_size=0.1, kappa=0.5, radius=0.4, max_norm=1.0, n_best=6, n_prior=5)
UNITS = make_normalization()


def model(**fields):
    """A model whose return depends strongly on plan and start."""
    made = make_model(model_config(**fields))
    with torch.no_grad():
        for p in made.returns.parameters():
            p.mul_(3)
    return made


def bound(plans: Plans, config: PlanConfig = CONFIG) -> torch.Tensor:
    """The standardised lower bound without the prior's part."""
    return (plans.return_mean - UNITS.return_mean - config.kappa * plans.return_std) / UNITS.return_std


def starts(n: int) -> torch.Tensor:
    return torch.randn(n, OBS_DIM, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------------------------------------------------------
# exploit


@torch.no_grad()
def test_predictions_are_in_environment_units():
    m = model()
    z0 = random_seeds(4, m.config)
    plans = predict(m, UNITS, z0, None)
    mean, std = m.return_moments(m.prior(z0), None)
    assert torch.allclose(plans.return_mean, 40 + 10 * mean)
    assert torch.allclose(plans.return_std, 10 * std)
    assert len(plans) == 4
    assert torch.equal(plans[1:3].z0, z0[1:3])


def test_exploit_returns_the_best_bounds_first_and_they_beat_their_starts():
    m = model()
    seeds = random_seeds(6, m.config, seed=1)
    plans = exploit(m, UNITS, seeds, 11, CONFIG)
    found = bound(plans)
    assert bool((found.diff() <= 1e-6).all())
    assert float(found[0]) > float(bound(predict(m, UNITS, seeds, None)).max())
    # The eleven candidates are six seeds and five prior samples; what is returned is what was predicted of it.
    assert torch.allclose(predict(m, UNITS, plans.z0, None).return_mean, plans.return_mean, rtol=0, atol=1e-3)
    top = exploit(m, UNITS, seeds, 3, CONFIG)
    assert torch.equal(top.z0, plans.z0[:3])


def test_exploit_repeats_candidates_where_more_plans_are_asked_for():
    m = model()
    seeds = random_seeds(2, m.config)
    config = dataclasses.replace(CONFIG, n_best=2, n_prior=1)
    plans = exploit(m, UNITS, seeds, 7, config)
    assert torch.equal(plans.z0[:3], plans.z0[3:6])
    assert torch.equal(plans.z0[0], plans.z0[6])


def test_a_plan_is_worth_the_same_however_many_are_asked_for():
    m = model()
    seeds = random_seeds(6, m.config)
    config = dataclasses.replace(CONFIG, n_keep=3)
    few, many = exploit(m, UNITS, seeds, 3, config), exploit(m, UNITS, seeds, 9, config)
    assert torch.equal(many.z0, few.z0.repeat(3, 1, 1))
    assert torch.equal(many.return_mean, few.return_mean.repeat(3))


def test_exploit_stays_in_the_trust_region_of_its_seeds():
    m = model()
    d = m.config.n_z * m.config.dim
    seeds = random_seeds(6, m.config, seed=1)
    seeds = 0.7 * seeds * (math.sqrt(d) / seeds.flatten(1).norm(dim=1))[:, None, None]
    config = dataclasses.replace(CONFIG, n_prior=0, n_steps=60)
    plans = exploit(m, UNITS, seeds, 6, config)
    distance = (plans.z0[:, None] - seeds[None]).flatten(2).norm(dim=2).min(dim=1).values / math.sqrt(d)
    assert float(distance.max()) <= 0.4 + 1e-5
    assert float(distance.min()) > 0.05
    assert float(plans.z0.flatten(1).norm(dim=1).max()) <= 1.0 * math.sqrt(d) * (1 + 1e-5)


def test_more_steps_never_lower_the_best_bound_much():
    m = model()
    seeds = random_seeds(6, m.config, seed=1)
    best = [
        float(bound(exploit(m, UNITS, seeds, 1, dataclasses.replace(CONFIG, n_steps=n)))[0]) for n in (0, 10, 40, 120)
    ]
    assert best[-1] > best[0]
    for fewer, more in itertools.pairwise(best):
        assert more > fewer - 0.01 * (best[-1] - best[0])


def test_the_prior_part_counts_in_the_choice():
    m = model(prior="identity")
    seeds = random_seeds(6, m.config, seed=1)
    config = dataclasses.replace(CONFIG, n_steps=0, n_prior=0, n_best=6, prior_weight=1e3)
    plans = exploit(m, UNITS, seeds, 6, config)
    norms = plans.z0.flatten(1).norm(dim=1)
    assert bool((norms.diff() >= 0).all())


def test_planning_for_each_start_picks_the_best_candidate_of_that_start():
    m = model(return_context="first_state")
    seeds = random_seeds(6, m.config, seed=1)
    obs = starts(4)
    config = dataclasses.replace(CONFIG, n_refine=11)
    plans = exploit(m, UNITS, seeds, 4, config, obs[:, None], seed=3)
    assert len(plans) == 4
    for i in range(4):
        # All candidates at start i alone, best first.
        alone = exploit(m, UNITS, seeds, 11, CONFIG, obs[i : i + 1], seed=3)
        assert torch.allclose(plans.z0[i], alone.z0[0], rtol=0, atol=1e-5)
        assert float(plans.return_mean[i]) == pytest.approx(float(alone.return_mean[0]), abs=1e-3)
        own = predict(m, UNITS, plans.z0[i : i + 1], obs[i : i + 1])
        assert float(plans.return_mean[i]) == pytest.approx(float(own.return_mean), abs=1e-3)


@pytest.mark.parametrize("n_refine", [1, 2])
def test_per_start_only_the_most_promising_candidates_are_raised(n_refine):
    m = model(return_context="first_state")
    seeds = random_seeds(6, m.config, seed=1)
    obs = starts(5)
    config = dataclasses.replace(CONFIG, n_prior=0, n_refine=n_refine, prior_weight=0.01)
    plans = exploit(m, UNITS, seeds, 5, config, obs[:, None])
    for i in range(5):
        at_start = predict(m, UNITS, seeds, obs[i].expand(6, -1))
        score = bound(at_start) - 0.005 * seeds.square().sum((1, 2))
        top = score.argsort(descending=True)[:n_refine]
        alone = exploit(m, UNITS, seeds[top], 1, config, obs[i : i + 1])
        assert torch.allclose(plans.z0[i], alone.z0[0], rtol=0, atol=1e-4)


def test_planning_for_the_average_start_differs_from_planning_for_one():
    m = model(return_context="first_state")
    seeds = random_seeds(6, m.config, seed=1)
    obs = starts(5)
    plans = exploit(m, UNITS, seeds, 2, CONFIG, obs)
    average = predict(m, UNITS, plans.z0, obs.expand(2, 5, OBS_DIM))
    assert torch.allclose(plans.return_mean, average.return_mean, rtol=0, atol=1e-3)
    assert torch.allclose(plans.return_std, average.return_std, rtol=0, atol=1e-3)
    assert not torch.allclose(plans.z0, exploit(m, UNITS, seeds, 2, CONFIG, obs[:1]).z0, rtol=0, atol=1e-3)


def test_the_seed_chooses_the_prior_samples():
    m = model()
    seeds = random_seeds(6, m.config)
    config = dataclasses.replace(CONFIG, n_best=0)
    one, same, other = (exploit(m, UNITS, seeds, 5, config, seed=seed).z0 for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_no_candidate_is_an_error():
    m = model()
    config = dataclasses.replace(CONFIG, n_prior=0)
    with pytest.raises(ValueError, match="exploit: expected at least one candidate"):
        exploit(m, UNITS, random_seeds(0, m.config), 1, config)


@pytest.mark.usefixtures("cpp_engine")
def test_exploit_uses_the_op():
    m = model()
    exploit(m, UNITS, random_seeds(6, m.config), 2, CONFIG)
    assert ops.dispatch_counts() == {("plan_ascent", "cpp"): 1}


# ---------------------------------------------------------------------------------------------------------------------
# explore


@pytest.mark.parametrize("return_context", ["none", "first_state"])
def test_explore_follows_its_target(return_context):
    m = model(return_context=return_context)
    context = starts(64)[:, None] if return_context == "first_state" else None
    config = dataclasses.replace(CONFIG, n_steps=60)
    prior = float(predict(m, UNITS, random_seeds(64, m.config), context).return_mean.mean())
    low, same, high = (
        float(explore(m, UNITS, 64, prior + shift, config, context, seed=1).return_mean.mean())
        for shift in (-15.0, 0.0, 15.0)
    )
    assert low < prior - 3
    assert abs(same - prior) < 3
    assert high > prior + 3


@pytest.mark.parametrize("return_context", ["none", "first_state"])
def test_sharper_explore_comes_closer_to_the_target(return_context):
    m = model(return_context=return_context)
    context = starts(64)[:, None] if return_context == "first_state" else None
    seeds = random_seeds(64, m.config)
    target = float(predict(m, UNITS, seeds, context).return_mean.mean()) + 25.0
    plans = {}
    for sharpness in (1.0, 4.0, 16.0):
        config = dataclasses.replace(CONFIG, n_steps=60, explore_sharpness=sharpness)
        plans[sharpness] = explore(m, UNITS, 64, target, config, context, seed=1)
        # What is said of a plan does not depend on how it was found.
        again = predict(m, UNITS, plans[sharpness].z0, context)
        torch.testing.assert_close(plans[sharpness].return_mean, again.return_mean, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(plans[sharpness].return_std, again.return_std, rtol=1e-4, atol=1e-3)
    misses = [abs(target - float(p.return_mean.mean())) for p in plans.values()]
    assert misses[0] > misses[1] + 0.5
    assert misses[1] > misses[2] + 0.5


def test_sharpness_divides_the_variance():
    m = model()
    one = explore(m, UNITS, 8, 45.0, dataclasses.replace(CONFIG, n_steps=1, explore_sharpness=9.0))
    with torch.no_grad():
        m.returns.b3[:, 1] -= math.log(9.0)
    other = explore(m, UNITS, 8, 45.0, dataclasses.replace(CONFIG, n_steps=1))
    torch.testing.assert_close(one.z0, other.z0, rtol=1e-5, atol=1e-6)


def test_explore_samples_differ_by_plan_and_seed():
    m = model()
    one, same, other = (explore(m, UNITS, 3, 45.0, CONFIG, seed=seed).z0 for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    assert not one.requires_grad


@pytest.mark.usefixtures("cpp_engine")
def test_planning_in_bf16_is_a_choice():
    m = model()
    seeds = random_seeds(8, m.config)
    plans = {}
    for bf16 in ("off", "on"):
        config = dataclasses.replace(CONFIG, bf16=bf16)
        plans[bf16] = exploit(m, UNITS, seeds, 4, config).z0, explore(m, UNITS, 4, 45.0, config).z0
    for exact, rounded in zip(plans["off"], plans["on"], strict=True):
        assert not torch.equal(exact, rounded)
        # The way of many steps, each about 1% off.
        assert float((exact - rounded).norm() / exact.norm()) < 0.1


def test_explore_may_start_from_given_seeds():
    m = model()
    start = random_seeds(3, m.config, seed=9)
    config = dataclasses.replace(CONFIG, n_steps=0)
    assert torch.equal(explore(m, UNITS, 3, 45.0, config, start=start).z0, start)
    assert not torch.equal(explore(m, UNITS, 3, 45.0, config).z0, start)


def test_planning_leaves_no_gradient_in_the_model():
    m = model()
    explore(m, UNITS, 3, 45.0, CONFIG)
    exploit(m, UNITS, random_seeds(3, m.config), 3, CONFIG)
    assert all(p.grad is None and p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("per_start", [False, True])
def test_planning_on_a_thread_records_no_gradients(per_start):
    """Threads begin with gradients on; two that recorded them for one model's weights at once could wait for each
    other for ever (torch takes the interpreter's lock while it holds that of a parameter)."""
    m = model(return_context="first_state")
    given = starts(3)[:, None] if per_start else starts(3)
    seeds, each = random_seeds(3, m.config), starts(3)[:, None]
    own = {id(p) for p in m.parameters()}
    recorded, seen = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            recorded.extend(func for x in args if torch.is_grad_enabled() and id(x) in own)
            return func(*args, **(kwargs or {}))

    def plan():
        assert torch.is_grad_enabled()
        with ops.backend("reference"), Watch():
            explore(m, UNITS, 3, 45.0, CONFIG, first_states=each)
            exploit(m, UNITS, seeds, 3, CONFIG, given)
            predict(m, UNITS, seeds, each)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(plan).result()
    assert len(seen) > 20
    assert recorded == []


# ---------------------------------------------------------------------------------------------------------------------
# TargetSchedule


def test_target_schedule_by_hand():
    returns = [0.0, 2.0, 4.0, 6.0]  # mean 3, standard deviation sqrt(5)
    sd = math.sqrt(5)
    schedule = TargetSchedule(n_best=2)
    b = 5.0
    assert schedule.update(returns) == pytest.approx(b + 0.5 * sd)
    # At least y* - sd on average: reached.
    reached = b + 0.5 * sd - sd
    assert schedule.update(returns, [reached - 1, reached + 1 + 1e-9]) == pytest.approx(b + 0.5 * sd)
    # Below: halfway to b + sd / 4.
    missed = schedule.update(returns, [reached - 0.1])
    assert missed == pytest.approx(0.5 * (b + 0.5 * sd) + 0.5 * (b + 0.25 * sd))
    # Again below the lower target.
    again = schedule.update(returns, [-100.0])
    assert again == pytest.approx(0.5 * missed + 0.5 * (b + 0.25 * sd))
    # The data improved and the round reached its target: up at once.
    better = [*returns, 10.0, 10.0]
    sd = float(torch.tensor(better, dtype=torch.float64).std(correction=0))
    assert schedule.update(better, [10.0, 10.0]) == pytest.approx(10 + 0.5 * sd)


def test_target_schedule_takes_the_best_32_by_default():
    returns = list(range(100))
    expected = sum(range(68, 100)) / 32 + 0.5 * float(torch.arange(100.0, dtype=torch.float64).std(correction=0))
    assert TargetSchedule().update(returns) == pytest.approx(expected)
    assert TargetSchedule().update([3.0]) == pytest.approx(3.0)


def test_target_schedule_needs_returns():
    with pytest.raises(ValueError, match=r"TargetSchedule.update: expected at least one return, got none"):
        TargetSchedule().update([])
