"""plan_ascent and the return moments: the formula of a step, the bound, both balls of the trust region, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from core_fixtures import OBS_DIM, make_model, model_config, random_seeds

from gac_fast import ops, reference
from gac_fast.errors import BackendError

CONFIG = model_config(return_ensemble=3)
D_TOTAL = CONFIG.n_z * CONFIG.dim


def weights(dtype=torch.float64, **fields):
    """Prior and return weights of a model whose return depends strongly on the plan."""
    model = make_model(model_config(return_ensemble=3, **fields), dtype=dtype)
    with torch.no_grad():
        for p in model.returns.parameters():
            p.mul_(3)
    return model.prior.weights(), model.returns.weights()


def bound_of(prior_weights, return_weights, z0, kappa=0.0, prior_weight=0.0, context=None):
    z = reference.prior(prior_weights, z0)
    mean, std = reference.return_moments(*reference.return_model(return_weights, z, context))
    return mean - kappa * std - 0.5 * prior_weight * z0.square().sum((1, 2))


def inside(p, scale=0.8, dtype=torch.float64):
    """Seeds of norm scale * sqrt(d)."""
    z0 = random_seeds(p, CONFIG, dtype=dtype)
    return z0 * (scale * math.sqrt(D_TOTAL) / z0.flatten(1).norm(dim=1))[:, None, None]


def test_one_step_follows_the_numerical_gradient():
    w = weights()
    z0 = inside(2)
    moved, _, _ = ops.plan_ascent(*w, z0, n_steps=1, step_size=0.1, kappa=0.7, prior_weight=0.05)
    grad = torch.zeros_like(z0).flatten(1)
    for i in range(D_TOTAL):
        shift = torch.zeros(D_TOTAL, dtype=z0.dtype)
        shift[i] = 1e-6
        up, down = (bound_of(*w, z0 + sign * shift.view(1, *z0.shape[1:]), 0.7, 0.05) for sign in (1, -1))
        grad[:, i] = (up - down) / 2e-6
    expected = z0 + 0.1 * math.sqrt(D_TOTAL) * (grad / grad.norm(dim=1, keepdim=True)).view_as(z0)
    assert torch.allclose(moved, expected, rtol=0, atol=1e-6)


def test_steps_shrink_linearly():
    w = weights()
    z0 = inside(3)
    by_hand = z0
    for step in range(4):
        # One step of a ascent of length 1 moves by its whole step size.
        by_hand, _, _ = ops.plan_ascent(*w, by_hand, n_steps=1, step_size=0.1 * (1 - step / 4), kappa=1.0)
    moved, mean, std = ops.plan_ascent(*w, z0, n_steps=4, step_size=0.1, kappa=1.0)
    assert torch.allclose(moved, by_hand, rtol=0, atol=1e-12)
    expected = reference.return_moments(*reference.return_model(w[1], reference.prior(w[0], moved)))
    assert torch.allclose(torch.stack((mean, std)), torch.stack(expected), rtol=0, atol=1e-12)
    assert not moved.requires_grad


@pytest.mark.parametrize("prior", ["mlp", "identity"])
@pytest.mark.parametrize("n_steps", [5, 60])
def test_raises_its_bound_and_stays_in_both_balls(prior, n_steps):
    w = weights(prior=prior)
    z0 = inside(16)
    before = bound_of(*w, z0, kappa=0.5)
    moved, mean, std = ops.plan_ascent(*w, z0, n_steps=n_steps, step_size=0.1, kappa=0.5, radius=0.4, max_norm=0.9)
    assert bool((mean - 0.5 * std > before).all())
    distance = (moved - z0).flatten(1).norm(dim=1) / math.sqrt(D_TOTAL)
    norm = moved.flatten(1).norm(dim=1) / math.sqrt(D_TOTAL)
    assert float(distance.max()) <= 0.4 + 1e-9
    assert float(norm.max()) <= 0.9 + 1e-9


def test_without_the_region_the_ascent_leaves_both_balls():
    z0 = inside(4)
    free, _, _ = ops.plan_ascent(*weights(), z0, n_steps=40, step_size=0.1, kappa=0.5)
    assert float((free - z0).flatten(1).norm(dim=1).max()) > 0.5 * math.sqrt(D_TOTAL)
    assert float(free.flatten(1).norm(dim=1).max()) > 0.91 * math.sqrt(D_TOTAL)


def test_a_start_outside_the_norm_ball_is_brought_in():
    w = weights()
    z0 = inside(8, scale=1.5)
    moved, _, _ = ops.plan_ascent(*w, z0, n_steps=20, step_size=0.1, radius=0.3, max_norm=1.0)
    assert float(moved.flatten(1).norm(dim=1).max()) <= math.sqrt(D_TOTAL) * (1 + 1e-9)
    # The nearest point of the norm ball to the start is what the radius then counts from.
    assert float((moved - z0 / 1.5).flatten(1).norm(dim=1).max()) <= 0.3 * math.sqrt(D_TOTAL) * (1 + 1e-9)


def test_more_steps_do_not_lower_the_bound():
    w = weights()
    z0 = inside(32)
    bounds = []
    for n_steps in (0, 10, 30, 100):
        _, mean, std = ops.plan_ascent(*w, z0, n_steps=n_steps, step_size=0.05, kappa=1.0, radius=0.5, max_norm=1.1)
        bounds.append(float((mean - std).mean()))
    gain = bounds[-1] - bounds[0]
    assert gain > 0.1
    for fewer, more in itertools.pairwise(bounds):
        assert more > fewer - 0.01 * gain


def test_kappa_prefers_certain_plans():
    w = weights()
    z0 = inside(16)
    _, greedy_mean, greedy_std = ops.plan_ascent(*w, z0, n_steps=25, step_size=0.1)
    _, careful_mean, careful_std = ops.plan_ascent(*w, z0, n_steps=25, step_size=0.1, kappa=5.0)
    assert float(careful_std.mean()) < float(greedy_std.mean()) - 1e-3
    assert float(careful_mean.mean()) < float(greedy_mean.mean())


def test_prior_weight_shortens_seeds():
    w = weights()
    z0 = inside(16)
    free, _, _ = ops.plan_ascent(*w, z0, n_steps=25, step_size=0.1)
    weighted, _, _ = ops.plan_ascent(*w, z0, n_steps=25, step_size=0.1, prior_weight=10.0)
    assert float(weighted.norm()) < 0.5 * float(free.norm())


def test_no_steps_and_no_plans():
    w = weights()
    z0 = inside(2)
    same, mean, std = ops.plan_ascent(*w, z0, n_steps=0, step_size=0.1)
    assert torch.equal(same, z0)
    assert mean.shape == std.shape == (2,)
    none, mean, std = ops.plan_ascent(*w, z0[:0], n_steps=3, step_size=0.1)
    assert none.shape == (0, *z0.shape[1:])
    assert mean.shape == std.shape == (0,)


def test_plans_do_not_touch_each_other():
    w = weights()
    z0 = inside(5)
    together, _, _ = ops.plan_ascent(*w, z0, n_steps=10, step_size=0.1, kappa=1.0, radius=0.3)
    alone, _, _ = ops.plan_ascent(*w, z0[3:4], n_steps=10, step_size=0.1, kappa=1.0, radius=0.3)
    assert torch.allclose(together[3:4], alone, rtol=0, atol=1e-10)


def test_float32_agrees_with_float64():
    z0 = inside(8)
    exact, mean, _ = ops.plan_ascent(*weights(), z0, n_steps=20, step_size=0.05, kappa=1.0)
    single, single_mean, _ = ops.plan_ascent(*weights(torch.float32), z0.float(), n_steps=20, step_size=0.05, kappa=1.0)
    assert single.dtype == torch.float32
    # Twenty normalised steps amplify rounding.
    assert torch.allclose(single.double(), exact, rtol=0, atol=1e-3)
    assert torch.allclose(single_mean.double(), mean, rtol=0, atol=1e-3)


def test_many_starts_mean_their_mixture():
    w = weights(return_context="first_state")
    z0 = inside(2)
    context = torch.randn(2, 5, OBS_DIM, dtype=z0.dtype, generator=torch.Generator().manual_seed(0))
    _, mean, std = ops.plan_ascent(*w, z0, n_steps=0, step_size=0.1, context=context)
    means, log_variances = [], []
    for g in range(5):
        m, v = reference.return_model(w[1], reference.prior(w[0], z0), context[:, g])
        means.append(m)
        log_variances.append(v)
    m, v = torch.cat(means), torch.cat(log_variances)  # [5 * E, P]
    assert torch.allclose(mean, m.mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(std, (v.exp().mean(0) + m.var(0, correction=0)).sqrt(), rtol=0, atol=1e-12)
    one_start, one_mean, _ = ops.plan_ascent(*w, z0, n_steps=3, step_size=0.1, context=context[:, 0])
    same, same_mean, _ = ops.plan_ascent(*w, z0, n_steps=3, step_size=0.1, context=context[:, :1])
    assert torch.allclose(one_start, same, rtol=0, atol=1e-12)
    assert torch.allclose(one_mean, same_mean, rtol=0, atol=1e-12)


def test_return_moments_of_a_hand_made_mixture():
    means = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    log_variances = torch.tensor([[4.0, 9.0], [2.0, 9.0]]).log()
    mean, std = reference.return_moments(means, log_variances)
    assert mean.tolist() == [2.0, 0.0]
    assert std.tolist() == pytest.approx([2.0, 3.0])  # sqrt((4 + 2) / 2 + 1), sqrt(9)


def test_return_model_by_hand_and_its_clamped_variance():
    model = make_model(model_config(return_ensemble=2), dtype=torch.float64)
    w = model.returns.weights()
    z = random_seeds(3, model.config, dtype=torch.float64)
    w = type(w)(*(x.detach() for x in w))
    means, log_variances = reference.return_model(w, z)
    silu = torch.nn.functional.silu
    for e in range(2):
        h = silu(z.flatten(1) @ w.w1[e].T + w.b1[e])
        out = silu(h @ w.w2[e].T + w.b2[e]) @ w.w3[e].T + w.b3[e]
        assert torch.allclose(means[e], out[:, 0], rtol=0, atol=1e-12)
        assert torch.allclose(log_variances[e], out[:, 1], rtol=0, atol=1e-12)
    huge = w._replace(b3=w.b3 + 100)
    assert float(reference.return_model(huge, z)[1].max()) == reference.LOG_VARIANCE_RANGE[1]
    tiny = w._replace(b3=w.b3 - 100)
    assert float(reference.return_model(tiny, z)[1].min()) == reference.LOG_VARIANCE_RANGE[0]


def test_dropout_acts_only_where_asked_for():
    model = make_model(dtype=torch.float64)
    z = random_seeds(1, model.config, dtype=torch.float64).expand(100, -1, -1)
    torch.manual_seed(0)
    w = model.returns.weights()
    assert float(reference.return_model(w, z, dropout=0.5)[0].detach().std()) > 1e-3
    assert float(reference.return_model(w, z)[0].detach().std()) < 1e-12


def test_plan_norm_and_prior():
    model = make_model(dtype=torch.float64)
    z0 = random_seeds(5, model.config, dtype=torch.float64)
    w = model.prior.weights()
    z = model.prior(z0)
    assert torch.allclose(z.square().mean(-1), torch.ones(5, 2, dtype=z.dtype), rtol=0, atol=1e-4)
    flat = z0.flatten(1)
    u = (flat + torch.nn.functional.silu(flat @ w.w1.T + w.b1) @ w.w2.T + w.b2).view_as(z0)
    assert torch.allclose(z, u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt(), rtol=0, atol=1e-12)
    identity = make_model(model_config(prior="identity"), dtype=torch.float64)
    assert list(identity.prior.parameters()) == []
    assert torch.equal(identity.prior(z0), reference.plan_norm(z0))


@pytest.mark.parametrize(
    ("z0", "context", "message"),
    [
        (torch.zeros(2, 32), None, r"z0: expected shape \[P, n_z, D\], got \[2, 32\]"),
        (torch.zeros(2, 2, 16), torch.zeros(2, 3), r"context: expected 0 features for this return model, got 3"),
    ],
    ids=["rank", "context unasked for"],
)
def test_bad_input_is_named(z0, context, message):
    with pytest.raises(ValueError, match=message):
        ops.plan_ascent(*weights(torch.float32), z0, n_steps=1, step_size=0.1, context=context)


def test_missing_or_short_context_is_named():
    w = weights(torch.float32, return_context="first_state")
    with pytest.raises(ValueError, match=r"context: expected 3 features for this return model, got 0"):
        ops.plan_ascent(*w, torch.zeros(2, 2, 16), n_steps=1, step_size=0.1)
    with pytest.raises(ValueError, match=r"context: expected 2 rows, one per plan, got 1"):
        ops.plan_ascent(*w, torch.zeros(2, 2, 16), n_steps=1, step_size=0.1, context=torch.zeros(1, 3))


def test_a_backend_that_cannot_run_is_refused():
    with ops.backend("triton"), pytest.raises(BackendError, match=r"plan_ascent.*triton"):
        ops.plan_ascent(*weights(), inside(1), n_steps=1, step_size=0.1)
