"""plan_ascent, plan_langevin and the return moments: the formula of a step, the trust region, bad input, the engine."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from conftest import row_error
from core_fixtures import OBS_DIM, make_model, model_config, random_seeds
from torch import Tensor

from gac_fast import ops, posterior, reference
from gac_fast.errors import BackendError
from gac_fast.reference import PriorWeights, ReturnWeights

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


def test_a_backend_that_cannot_run_is_refused():
    with ops.backend("triton"), pytest.raises(BackendError, match=r"plan_ascent.*triton"):
        ops.plan_ascent(*weights(), inside(1), n_steps=1, step_size=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Langevin steps


LANGEVIN = {"step_size": 0.3, "seed": (7, 8), "first_step": 3, "max_drift_ratio": 0.5}


@pytest.mark.parametrize("max_drift_ratio", [0.1, math.inf])
def test_langevin_steps_are_those_of_the_posterior(max_drift_ratio):
    w = weights()
    z0, target, plans = inside(5), torch.linspace(-2, 2, 5, dtype=torch.float64), torch.tensor([4, 0, 9, 2, 1 << 31])

    def energy(z: Tensor) -> Tensor:
        mean, std = reference.return_moments(*reference.return_model(w[1], reference.prior(w[0], z)))
        return 0.5 * z.square().sum((1, 2)) + 0.5 * ((target - mean) / std).square() + std.log()

    def noise(step: int) -> Tensor:
        return reference.philox_normal((7, 8), plans, 3 + step, D_TOTAL).view_as(z0).double()

    expected, stats = posterior.langevin(
        energy, z0, n_steps=6, step_size=0.3, noise=noise, max_drift_ratio=max_drift_ratio
    )
    assert bool(stats.step_size < 0.29) == (max_drift_ratio == 0.1)  # the bound acts
    options = LANGEVIN | {"max_drift_ratio": max_drift_ratio}
    moved, mean, std = ops.plan_langevin(*w, z0, target, plans=plans, n_steps=6, **options)
    assert torch.allclose(moved, expected, rtol=0, atol=1e-12)
    moments = reference.return_moments(*reference.return_model(w[1], reference.prior(w[0], moved)))
    assert torch.allclose(torch.stack((mean, std)), torch.stack(moments), rtol=0, atol=1e-12)
    assert not moved.requires_grad


def test_langevin_without_steps_or_plans():
    w = weights()
    z0 = inside(2)
    target = torch.tensor(0.5, dtype=z0.dtype)
    same, mean, _ = ops.plan_langevin(*w, z0, target, plans=torch.arange(2), n_steps=0, **LANGEVIN)
    assert torch.equal(same, z0)
    assert mean.shape == (2,)
    none, mean, _ = ops.plan_langevin(*w, z0[:0], target, plans=torch.arange(0), n_steps=2, **LANGEVIN)
    assert none.shape == (0, *z0.shape[1:])
    assert mean.shape == (0,)


# ---------------------------------------------------------------------------------------------------------------------
# The C++ engine against the reference in float64 on the same inputs


class Sizes(NamedTuple):
    p: int
    n_z: int = 4
    dim: int = 64
    hidden_u: int = 64  # 0: the identity prior
    hidden1: int = 32
    hidden2: int = 32
    members: int = 1
    n_obs: int = 0


def random_case(sizes: Sizes, n_starts: int = 0, seed: int = 0) -> tuple[PriorWeights, ReturnWeights, Tensor, Tensor]:
    """float32 weights of a return that depends on the plan, seeds, and context [P, obs] or [P, G, obs]."""
    generator = torch.Generator().manual_seed(seed)
    d, e = sizes.n_z * sizes.dim, sizes.members

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    def layer(n_out: int, n_in: int, *front: int, gain: float = 1.0) -> tuple[Tensor, Tensor]:
        return normal(*front, n_out, n_in, scale=gain / math.sqrt(n_in)), normal(*front, n_out, scale=0.2)

    prior = (None,) * 4
    if sizes.hidden_u:
        prior = (*layer(sizes.hidden_u, d), *layer(d, sizes.hidden_u))
    returns = (
        *layer(sizes.hidden1, d + sizes.n_obs, e),
        *layer(sizes.hidden2, sizes.hidden1, e),
        *layer(2, sizes.hidden2, e, gain=1.5),
    )
    context = normal(sizes.p, n_starts, sizes.n_obs) if n_starts else normal(sizes.p, sizes.n_obs)
    return PriorWeights(*prior), ReturnWeights(*returns), normal(sizes.p, sizes.n_z, sizes.dim), context


def in_float64(case):
    prior, returns, *rest = case
    exact = (None if w is None else w.double() for w in prior)
    return PriorWeights(*exact), ReturnWeights(*(w.double() for w in returns)), *(x.double() for x in rest)


TOLERANCE = {False: 1e-5, True: 2e-2}
precisions = pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])

SIZES = [
    Sizes(1),
    Sizes(3, n_z=7, dim=96, hidden_u=40, hidden1=33, hidden2=20, members=3),
    Sizes(17, n_z=1, dim=256, hidden_u=0, members=4),
    Sizes(65, n_z=4, dim=128, hidden_u=256, hidden1=128, hidden2=128),
    Sizes(2, n_z=1, dim=20, hidden_u=7, hidden1=3, hidden2=1),
    Sizes(6, n_z=7, dim=192, hidden_u=17, hidden1=64, hidden2=48, members=3),
    Sizes(33, n_z=3, dim=10, hidden_u=9, hidden1=48, hidden2=33, members=4, n_obs=5),
]


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@precisions
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_engine_takes_the_direction_of_the_gradient(sizes, bf16):
    case = random_case(sizes)
    context = case[3] if sizes.n_obs else None
    options = {"n_steps": 1, "step_size": 0.5, "kappa": 0.7, "prior_weight": 1e-3}
    with ops.backend("cpp"):
        moved, mean, std = ops.plan_ascent(*case[:3], **options, context=context, bf16=bf16)
    exact = in_float64(case)
    expected, expected_mean, expected_std = reference.plan_ascent(
        *exact[:3], **options, context=exact[3] if sizes.n_obs else None
    )
    assert row_error((moved - case[2]).flatten(1), (expected - exact[2]).flatten(1)) < TOLERANCE[bf16]
    # Means near zero have no relative error to speak of: against the spread of the returns.
    spread = max(1.0, float(expected_mean.abs().max()))
    assert float((mean - expected_mean).abs().max()) < TOLERANCE[bf16] * spread
    assert row_error(std[:, None], expected_std[:, None]) < TOLERANCE[bf16]
    assert ops.dispatch_counts() == {("plan_ascent", "cpp"): 1}


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@precisions
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_engine_knows_the_length_of_the_gradient_too(sizes, bf16):
    case = random_case(sizes, seed=1)
    context = case[3] if sizes.n_obs else None
    p = sizes.p
    # A far target: the energy's gradient is then the return model's for the most part.
    target = torch.linspace(20, 40, p)
    options = {"n_steps": 1, "step_size": 1.0, "seed": (1, 2), "plans": torch.arange(p), "first_step": 5}
    with ops.backend("cpp"):
        moved, _, _ = ops.plan_langevin(*case[:3], target, **options, context=context, bf16=bf16)
    exact = in_float64(case)
    expected, _, _ = reference.plan_langevin(
        *exact[:3], target.double(), **options, context=exact[3] if sizes.n_obs else None
    )
    known = case[2].double().flatten(1) + reference.philox_normal((1, 2), torch.arange(p), 5, sizes.n_z * sizes.dim)
    assert row_error(moved.flatten(1) - known, expected.flatten(1) - known) < TOLERANCE[bf16]
    assert ops.dispatch_counts() == {("plan_langevin", "cpp"): 1}


CONTEXTS = ["none", "one", "several", "shared", "many", "many shared"]


def with_context(kind: str, p: int = 7, members: int = 3):
    """A case and its context; 300 starts are more than the engine keeps at once, and then there are fewer plans."""
    p = 2 if kind.startswith("many") else p
    n_starts = {"none": 0, "one": 0, "several": 5, "shared": 5, "many": 300, "many shared": 300}[kind]
    sizes = Sizes(
        p, n_z=2, dim=24, hidden_u=20, hidden1=40, hidden2=24, members=members, n_obs=0 if kind == "none" else 3
    )
    case = random_case(sizes, n_starts, seed=2)
    context = None if kind == "none" else case[3]
    if "shared" in kind:
        context = case[3][0].expand(p, -1, -1)
    return (*case[:3], context)


OPTIONS = [
    {},
    {"kappa": 1.5},
    {"kappa": 0.5, "prior_weight": 0.1},
    {"radius": 0.2, "kappa": 1.0},
    {"max_norm": 0.9},
    {"radius": 0.3, "max_norm": 1.0, "kappa": 1.0, "prior_weight": 0.01},
]


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@precisions
@pytest.mark.parametrize("kind", CONTEXTS)
def test_engine_has_every_option(kind, bf16):
    *case, context = with_context(kind)
    exact = in_float64((*case, torch.zeros(0) if context is None else context))
    for options in OPTIONS[-1:] if kind.startswith("many") else OPTIONS:
        steps = {"n_steps": 3, "step_size": 0.1, **options}
        with ops.backend("cpp"):
            moved, mean, std = ops.plan_ascent(*case, **steps, context=context, bf16=bf16)
        expected = reference.plan_ascent(*exact[:3], **steps, context=None if context is None else exact[3])
        # Each step turns the gradient of the next, and the moments follow the seeds.
        tolerance = 5 * TOLERANCE[bf16]
        assert row_error((moved - case[2]).flatten(1), (expected[0] - exact[2]).flatten(1)) < tolerance, options
        torch.testing.assert_close(mean.double(), expected[1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(std.double(), expected[2], rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize("b3", [100.0, -100.0])
def test_engine_has_no_slope_beyond_the_range_of_the_log_variance(b3):
    prior, returns, z0, _ = random_case(Sizes(5, members=2))
    returns = returns._replace(b3=returns.b3 + torch.tensor([0.0, b3]))
    options = {"n_steps": 1, "step_size": 0.5, "kappa": 3.0}
    with ops.backend("cpp"):
        moved, _, std = ops.plan_ascent(prior, returns, z0, **options)
    exact = in_float64((prior, returns, z0))
    expected = reference.plan_ascent(*exact, **options)
    assert row_error((moved - z0).flatten(1), (expected[0] - exact[2]).flatten(1)) < 1e-5
    assert row_error(std[:, None], expected[2][:, None]) < 1e-5


@pytest.mark.usefixtures("cpp_engine")
def test_engine_follows_many_steps():
    case = random_case(Sizes(65, members=2))
    options = {"n_steps": 40, "step_size": 0.05, "kappa": 1.0, "radius": 0.5, "max_norm": 1.1}
    expected, expected_mean, _ = reference.plan_ascent(*in_float64(case)[:3], **options)
    for bf16, bound in ((False, 1e-3), (True, 0.1)):
        with ops.backend("cpp"):
            moved, mean, _ = ops.plan_ascent(*case[:3], **options, bf16=bf16)
        # Forty normalised steps amplify rounding, most where the gradient is short; the bound hardly differs there.
        assert float((moved - expected).flatten(1).norm(dim=1).median()) < bound * float(expected[0].norm())
        gain = float(expected_mean.mean()) - float(ops.plan_ascent(*case[:3], **options | {"n_steps": 0})[1].mean())
        assert gain > 1
        assert abs(float(mean.mean()) - float(expected_mean.mean())) < bound * gain


@pytest.mark.usefixtures("isa")
@precisions
@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("p", [4, 37])
def test_engine_results_depend_on_neither_threads_nor_tiles(cpp_engine, p, kind, bf16):
    prior, returns, z0, context = with_context(kind, p)
    p = len(z0)
    starts = context[:, None] if context is not None and context.ndim == 2 else context
    shared = [
        [w.numpy() for w in prior], [w.numpy() for w in returns], z0.flatten(1).numpy(),
        None if starts is None else starts.numpy(),
    ]  # fmt: skip
    first = None
    for n_threads, tile in ((1, 0), (2, 0), (3, 0), (1, 1), (2, 4), (3, 16), (1, 64)):
        for langevin in (False, True):
            out = torch.full((2, p, 48), math.nan)
            moments = torch.full((2, 2, p), math.nan)
            common = (*shared, out[int(langevin)].numpy(), *moments[int(langevin)].numpy(), 24, 3, 0.1)
            if langevin:
                cpp_engine._plan_langevin(
                    *common,
                    torch.linspace(-1, 1, p).numpy(),
                    0.5,
                    3,
                    4,
                    torch.arange(p).numpy(),
                    1,
                    bf16,
                    n_threads,
                    tile,
                )
            else:
                cpp_engine._plan_ascent(*common, 1.0, 0.0, 0.3, 1.0, bf16, n_threads, tile)
            found = torch.cat((out[int(langevin)], moments[int(langevin)].T), dim=1)
            assert found.isfinite().all()
            if n_threads == 1 and tile == 0:
                first = [found] if not langevin else [first[0], found]
            assert torch.equal(found, first[int(langevin)]), (n_threads, tile, langevin)


@pytest.mark.usefixtures("cpp_engine")
@precisions
def test_engine_reads_strided_inputs(bf16):
    prior, returns, z0, context = with_context("several")
    wide = torch.full((14, 2, 48), math.nan)
    wide[::2, :, ::2] = z0
    starts = torch.full((7, 10, 6), math.nan)
    starts[:, ::2, ::2] = context
    many = [torch.stack((w, w), dim=-1)[..., 0] for w in returns]
    options = {"n_steps": 2, "step_size": 0.1, "kappa": 1.0, "bf16": bf16}
    with ops.backend("cpp"):
        expected = ops.plan_ascent(prior, returns, z0, context=context, **options)
        actual = ops.plan_ascent(prior, ReturnWeights(*many), wide[::2, :, ::2], context=starts[:, ::2, ::2], **options)
        by_rows = ops.plan_ascent(prior, returns, wide[::2, :, ::2].contiguous(), context=context, **options)
    for x, y, z in zip(actual, expected, by_rows, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(z, y)


@pytest.mark.usefixtures("cpp_engine")
@precisions
def test_engine_starts_expanded_over_plans_equal_copies_of_them(bf16):
    *case, context = with_context("shared")
    options = {"n_steps": 2, "step_size": 0.1, "kappa": 1.0, "bf16": bf16}
    with ops.backend("cpp"):
        expanded = ops.plan_ascent(*case, context=context, **options)
        copies = ops.plan_ascent(*case, context=context.contiguous(), **options)
    for x, y in zip(expanded, copies, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("isa")
@precisions
def test_engine_keeps_a_nan_in_its_own_row(bf16):
    case = random_case(Sizes(9, members=2))
    options = {"n_steps": 3, "step_size": 0.1, "kappa": 1.0, "radius": 0.3, "max_norm": 1.0, "bf16": bf16}
    spoilt = case[2].clone()
    spoilt[4, 1, 3] = math.nan
    with ops.backend("cpp"):
        clean = ops.plan_ascent(*case[:3], **options)
        found = ops.plan_ascent(*case[:2], spoilt, **options)
    others = torch.arange(9) != 4
    for x, y in zip(found, clean, strict=True):
        assert x[4].isnan().all()
        assert torch.equal(x[others], y[others])


@pytest.mark.usefixtures("isa")
@precisions
def test_engine_meets_the_degenerate_cases(bf16):
    prior, returns, z0, _ = random_case(Sizes(5))
    flat = ReturnWeights(*(torch.zeros_like(w) for w in returns))
    with ops.backend("cpp"):
        # No gradient, no move; no steps, no move; no way, no move.
        assert torch.equal(ops.plan_ascent(prior, flat, z0, n_steps=3, step_size=0.1, kappa=1.0, bf16=bf16)[0], z0)
        assert torch.equal(ops.plan_ascent(prior, returns, z0, n_steps=0, step_size=0.1, bf16=bf16)[0], z0)
        assert torch.equal(ops.plan_ascent(prior, returns, z0, n_steps=2, step_size=0.1, radius=0.0, bf16=bf16)[0], z0)
        inside_nothing = ops.plan_ascent(prior, returns, z0, n_steps=1, step_size=0.1, max_norm=0.0, bf16=bf16)
        assert torch.equal(inside_nothing[0], torch.zeros_like(z0))
        none = ops.plan_ascent(prior, returns, z0[:0], n_steps=3, step_size=0.1, bf16=bf16)
        still = ops.plan_langevin(
            prior,
            returns,
            z0,
            torch.tensor(1.0),
            n_steps=3,
            step_size=0.0,
            seed=(1, 2),
            plans=torch.arange(5),
            bf16=bf16,
        )
    assert [list(x.shape) for x in none] == [[0, 4, 64], [0], [0]]
    assert torch.equal(still[0], z0)


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@precisions
@pytest.mark.parametrize("kind", CONTEXTS)
def test_engine_makes_langevin_steps(kind, bf16):
    *case, context = with_context(kind)
    target = torch.linspace(-2, 2, len(case[2]))
    plans = torch.tensor([(1 << 32) - 1, 5, 0, 9, 1, 2, 3])[: len(target)]
    options = {"n_steps": 4, "plans": plans, **LANGEVIN}
    with ops.backend("cpp"):
        moved, mean, std = ops.plan_langevin(*case, target, **options, context=context, bf16=bf16)
    exact = in_float64((*case, torch.zeros(0) if context is None else context))
    expected = reference.plan_langevin(
        *exact[:3], target.double(), **options, context=None if context is None else exact[3]
    )
    tolerance = 5 * TOLERANCE[bf16]
    assert row_error(moved.flatten(1), expected[0].flatten(1)) < tolerance
    torch.testing.assert_close(mean.double(), expected[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(std.double(), expected[2], rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("cpp_engine")
def test_engine_noise_belongs_to_the_plan_and_the_step():
    prior, returns, z0, _ = random_case(Sizes(6))
    target = torch.linspace(-1, 1, 6)
    plans = torch.stack((torch.arange(6) * 7, torch.zeros(6, dtype=torch.int64)), dim=1)[:, 0]
    with ops.backend("cpp"):
        together, _, _ = ops.plan_langevin(prior, returns, z0, target, n_steps=3, plans=plans, **LANGEVIN)
        order = torch.tensor([3, 1, 5, 0, 4, 2])
        shuffled, _, _ = ops.plan_langevin(
            prior, returns, z0[order], target[order], n_steps=3, plans=plans[order], **LANGEVIN
        )
        assert torch.equal(shuffled, together[order])
        for changed in ({"seed": (7, 9)}, {"first_step": 4}):
            other, _, _ = ops.plan_langevin(prior, returns, z0, target, n_steps=3, plans=plans, **LANGEVIN | changed)
            assert bool((other - together).flatten(1).norm(dim=1).min() > 0.1)
        one = ops.plan_langevin(prior, returns, z0, torch.tensor(0.5), n_steps=3, plans=plans, **LANGEVIN)
        each = ops.plan_langevin(prior, returns, z0, torch.full((6,), 0.5), n_steps=3, plans=plans, **LANGEVIN)
        assert torch.equal(one[0], each[0])


def test_float64_takes_the_reference_and_refuses_a_forced_engine():
    ops.plan_ascent(*weights(), inside(1), n_steps=1, step_size=0.1)
    assert ops.dispatch_counts() == {("plan_ascent", "reference"): 1}
    with ops.backend("cpp"), pytest.raises(BackendError, match=r"plan_ascent: .*cpp"):
        ops.plan_ascent(*weights(), inside(1), n_steps=1, step_size=0.1)


def op_arguments():
    prior, returns, z0, context = with_context("several")
    return list(prior), list(returns), z0, context


@pytest.mark.usefixtures("cpp_engine")
def test_registered_ops_pass_opcheck():
    prior, returns, z0, context = op_arguments()
    torch.library.opcheck(
        torch.ops.gac_fast.plan_ascent.default,
        (prior, returns, z0, context, 2, 0.1, 1.0, 0.0, 0.5, math.inf, False),
    )
    torch.library.opcheck(
        torch.ops.gac_fast.plan_langevin.default,
        (prior, returns, z0, torch.zeros(7), torch.arange(7), context, 2, 0.1, 0.5, 1, 2, 0, True),
    )


@pytest.mark.usefixtures("cpp_engine")
def test_compiles_into_one_graph():
    prior, returns, z0, context = op_arguments()
    prior, returns = PriorWeights(*prior), ReturnWeights(*returns)

    def plan(z0: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        ascended, mean, _ = ops.plan_ascent(prior, returns, z0, n_steps=2, step_size=0.1, context=context)
        sampled, _, _ = ops.plan_langevin(
            prior, returns, z0, mean, n_steps=2, plans=torch.arange(7), context=context, **LANGEVIN
        )
        return 2 * ascended, sampled

    # The tracer is under test, not the code generator behind it.
    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(z0, context), plan(z0, context), strict=True):
        assert torch.equal(x, y)
    assert set(ops.dispatch_counts()) == {("plan_ascent", "cpp"), ("plan_langevin", "cpp")}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input, the same on every engine


@pytest.fixture(params=["reference", "cpp"])
def on_backend(request):
    if request.param == "cpp":
        request.getfixturevalue("cpp_engine")
    with ops.backend(request.param):
        yield request.param


SHAPE = r"return_weights.w1: expected shape \[E, hidden, inputs\], got \[8, 32\]"
BAD = [
    ({"z0": torch.zeros(2, 32)}, r"z0: expected shape \[P, n_z, D\], got \[2, 32\]"),
    ({"z0": torch.zeros(2, 0, 16)}, r"z0: expected plans of at least one value, got \[2, 0, 16\]"),
    ({"z0": torch.zeros(2, 2, 16).half()}, "z0: expected dtype float32 or float64, got float16"),
    ({"z0": torch.zeros(2, 2, 16).double()}, "prior_weights.w1: expected dtype float64, got float32"),
    ({"z0": torch.zeros(2, 2, 17)}, r"prior_weights.w1: expected shape \[8, 34\], got \[8, 32\]"),
    ({"context": torch.zeros(2, 3)}, r"context: expected 0 features for this return model, got 3"),
    ({"n_steps": -1}, "n_steps: expected at least 0, got -1"),
    ({"step_size": math.nan}, "step_size: expected a finite number, got nan"),
    ({"step_size": math.inf}, "step_size: expected a finite number, got inf"),
    ({"return_weights": ("w1", torch.zeros(8, 32))}, SHAPE),
    ({"return_weights": ("w2", torch.zeros(3, 8, 9))}, r"return_weights.w2: expected shape \[3, hidden, 8\]"),
    ({"return_weights": ("w3", torch.zeros(3, 3, 8))}, r"return_weights.w3: expected shape \[3, 2, 8\]"),
    ({"return_weights": ("b1", torch.zeros(3, 9))}, r"return_weights.b1: expected shape \[3, 8\], got \[3, 9\]"),
    ({"prior_weights": ("b2", torch.zeros(31))}, r"prior_weights.b2: expected shape \[32\], got \[31\]"),
    ({"prior_weights": ("w2", None)}, "prior_weights: expected all weights or none, got None as w2"),
]
BAD_ASCENT = [
    ({"kappa": math.nan}, "kappa: expected a finite number, got nan"),
    ({"prior_weight": math.inf}, "prior_weight: expected a finite number, got inf"),
    ({"radius": math.nan}, "radius: expected a number of at least 0, got nan"),
    ({"max_norm": -1.0}, "max_norm: expected a number of at least 0, got -1.0"),
]
BAD_LANGEVIN = [
    ({"step_size": -0.1}, "step_size: expected at least 0, got -0.1"),
    ({"target": torch.zeros(3)}, r"target: expected shape \[2\] or \[\], got \[3\]"),
    ({"target": torch.zeros(2).double()}, "target: expected dtype float32, got float64"),
    ({"plans": torch.zeros(2)}, "plans: expected dtype int64, got float32"),
    ({"plans": torch.arange(3)}, r"plans: expected shape \[2\], got \[3\]"),
    ({"seed": (1, 1 << 32)}, r"seed: expected two words within \[0, 2\^32\), got \(1, 4294967296\)"),
    ({"first_step": (1 << 32) - 1}, r"first_step: expected 2 steps within \[0, 2\^32\)"),
    ({"max_drift_ratio": math.nan}, "max_drift_ratio: expected a number of at least 0, got nan"),
]


def bad_call(bad, langevin):
    prior, returns = (type(w)(*(x.detach() for x in w)) for w in weights(torch.float32))
    arguments = {"prior_weights": prior, "return_weights": returns, "z0": torch.zeros(2, 2, 16), "n_steps": 2}
    arguments["step_size"] = 0.1
    if langevin:
        arguments |= {"target": torch.zeros(2), "plans": torch.arange(2), "seed": (1, 2)}
    for name, value in bad.items():
        if name.endswith("_weights"):
            value = arguments[name]._replace(**{value[0]: value[1]})
        arguments[name] = value
    return (ops.plan_langevin if langevin else ops.plan_ascent)(**arguments)


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize(("bad", "message"), BAD + BAD_ASCENT, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input_of_the_ascent_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        bad_call(bad, langevin=False)


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize(("bad", "message"), BAD + BAD_LANGEVIN, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_input_of_the_langevin_steps_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        bad_call(bad, langevin=True)


def test_missing_or_short_context_is_named():
    w = weights(torch.float32, return_context="first_state")
    with pytest.raises(ValueError, match=r"context: expected 3 features for this return model, got 0"):
        ops.plan_ascent(*w, torch.zeros(2, 2, 16), n_steps=1, step_size=0.1)
    with pytest.raises(ValueError, match=r"context: expected 2 rows, one per plan, got 1"):
        ops.plan_ascent(*w, torch.zeros(2, 2, 16), n_steps=1, step_size=0.1, context=torch.zeros(1, 3))
    with pytest.raises(
        ValueError, match=r"context: expected shape \[P, obs_dim\] or \[P, G, obs_dim\], got \[2, 0, 3\]"
    ):
        ops.plan_ascent(*w, torch.zeros(2, 2, 16), n_steps=1, step_size=0.1, context=torch.zeros(2, 0, 3))


@pytest.mark.usefixtures("cpp_engine")
def test_cpp_names_a_plan_out_of_range():
    with (
        ops.backend("cpp"),
        pytest.raises(ValueError, match=r"plans: expected values within \[0, 2\^32\), got -1 in row 1"),
    ):
        bad_call({"plans": torch.tensor([0, -1])}, langevin=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("z0", torch.zeros(3, 8, dtype=torch.float64), "z0: expected dtype float32, got float64"),
        ("z0", torch.zeros(8), r"z0: expected shape \(\*, \*\), got \(8\)"),
        ("z0", torch.zeros(8, 3).T, "z0: expected rows of neighbouring elements"),
        ("dim", 3, "dim: expected a divisor of the 8 columns of z0, got 3"),
        ("dim", 0, "dim: expected a divisor of the 8 columns of z0, got 0"),
        ("seeds", torch.zeros(3, 9), r"seeds: expected shape \(3, 8\), got \(3, 9\)"),
        ("seeds", torch.zeros(8, 3).T, "seeds: expected a contiguous array, got a strided one"),
        ("mean", torch.zeros(2), r"mean: expected shape \(3\), got \(2\)"),
        ("context", torch.zeros(3, 1, 1), r"return_weights.w1: expected shape \(\*, \*, 9\), got \(2, 4, 8\)"),
        ("context", torch.zeros(3, 0, 1), r"context: expected starts with features, got \(3, 0, 1\)"),
        ("context", torch.zeros(2, 1, 1), r"context: expected shape \(3, \*, \*\), got \(2, 1, 1\)"),
        ("prior_weights", [torch.zeros(4, 8)], "prior_weights: expected w1, b1, w2, b2 or nothing, got 1 arrays"),
        ("return_weights", [], "return_weights: expected w1, b1, w2, b2, w3, b3, got 0 arrays"),
        ("n_steps", -1, "n_steps: expected at least 0, got -1"),
        ("step_size", math.nan, "step_size: expected a finite number, got nan"),
        ("kappa", math.inf, "kappa: expected a finite number, got inf"),
        ("radius", -1.0, "radius: expected a number of at least 0, got -1"),
        ("n_threads", 0, "n_threads: expected at least 1, got 0"),
        ("tile", -1, "tile: expected at least 0, got -1"),
    ],
)
def test_the_binding_checks_for_itself(cpp_engine, name, value, message):
    sizes = ((2, 4, 8), (2, 4), (2, 4, 4), (2, 4), (2, 2, 4), (2, 2))
    arguments = {
        "prior_weights": [], "return_weights": [torch.zeros(size) for size in sizes], "z0": torch.zeros(3, 8),
        "context": None, "seeds": torch.zeros(3, 8), "mean": torch.zeros(3), "std": torch.zeros(3), "dim": 4,
        "n_steps": 1, "step_size": 0.1, "kappa": 0.0, "prior_weight": 0.0, "radius": 1.0, "max_norm": 1.0,
        "bf16": False, "n_threads": 1, "tile": 0,
    }  # fmt: skip

    def numpy(x):
        return [numpy(y) for y in x] if isinstance(x, list) else x.numpy() if isinstance(x, Tensor) else x

    cpp_engine._plan_ascent(**{key: numpy(x) for key, x in arguments.items()})
    arguments[name] = value
    with pytest.raises(ValueError, match=message):
        cpp_engine._plan_ascent(**{key: numpy(x) for key, x in arguments.items()})
