"""The Triton engine of plan_ascent and plan_langevin: interpreted against the reference, compiled, and on a GPU."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import row_error
from kernel_fixtures import assert_fits, compile_cases
from test_plan_ascent import LANGEVIN, OPTIONS, TOLERANCE, Sizes, in_float64, random_case
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.errors import BackendError
from gac_fast.reference import PriorWeights, ReturnWeights

pytest.importorskip("triton")


def with_context(kind: str, p: int = 5, members: int = 3, **fields):
    """A case of odd sizes and its context; seven starts are no whole number of those that the kernel takes at once."""
    n_starts = 7 if kind in ("several", "shared") else 0
    sizes = Sizes(p, n_z=2, dim=24, hidden_u=20, hidden1=40, hidden2=24, members=members,
                  n_obs=0 if kind == "none" else 3)._replace(**fields)  # fmt: skip
    case = random_case(sizes, n_starts, seed=2)
    context = None if kind == "none" else case[3]
    if kind == "shared":
        context = case[3][0].expand(p, -1, -1)
    return (*case[:3], context)


def exact(case):
    *rest, context = case
    return in_float64((*rest, torch.zeros(0) if context is None else context)), context is None


def assert_ascent(case, options, bf16=False, device="cpu", factor=5):
    prior, returns, z0, context = case
    to = [PriorWeights(*(None if w is None else w.to(device) for w in prior)),
          ReturnWeights(*(w.to(device) for w in returns)), z0.to(device)]  # fmt: skip
    moved, mean, std = ops.plan_ascent(
        *to, **options, context=None if context is None else context.to(device), bf16=bf16
    )
    (*doubles, double_context), none = exact(case)
    expected = reference.plan_ascent(*doubles, **options, context=None if none else double_context)
    tolerance = factor * TOLERANCE[bf16]
    assert row_error((moved.cpu() - z0).flatten(1), (expected[0] - doubles[2]).flatten(1)) < tolerance, options
    # Means near zero have no relative error to speak of: against the spread of the returns.
    spread = max(1.0, float(expected[1].abs().max()))
    assert float((mean.cpu() - expected[1]).abs().max()) < tolerance * spread, options
    assert row_error(std[:, None], expected[2][:, None]) < tolerance, options


def assert_langevin(case, options, target, bf16=False, device="cpu", factor=5):
    prior, returns, z0, context = case
    to = [PriorWeights(*(None if w is None else w.to(device) for w in prior)),
          ReturnWeights(*(w.to(device) for w in returns)), z0.to(device), target.to(device)]  # fmt: skip
    on_device = options | {"plans": options["plans"].to(device)}
    moved, mean, std = ops.plan_langevin(
        *to, **on_device, context=None if context is None else context.to(device), bf16=bf16
    )
    (*doubles, double_context), none = exact(case)
    expected = reference.plan_langevin(*doubles, target.double(), **options, context=None if none else double_context)
    tolerance = factor * TOLERANCE[bf16]
    assert row_error(moved.flatten(1), expected[0].flatten(1)) < tolerance
    torch.testing.assert_close(mean.cpu().double(), expected[1], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(std.cpu().double(), expected[2], rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# By the interpreter, float32 alone


def test_triton_interpreter_agrees(run_interpreted):
    run_interpreted(__file__, "interpreter and not slow")


@pytest.mark.slow
def test_triton_interpreter_agrees_at_every_size(run_interpreted):
    run_interpreted(__file__, "interpreter and slow")


@pytest.fixture
def on_triton(nan_filled_empty):
    with ops.backend("triton"):
        yield


# A step takes the direction of the gradient alone. Tiles have 32 rows here.
DIRECTIONS = [
    Sizes(1),
    Sizes(3, n_z=7, dim=96, hidden_u=40, hidden1=33, hidden2=20, members=3),
    Sizes(17, n_z=1, dim=128, hidden_u=0, members=4),
    Sizes(2, n_z=1, dim=20, hidden_u=7, hidden1=3, hidden2=1),
    Sizes(19, n_z=3, dim=10, hidden_u=0, hidden1=48, hidden2=33, members=2, n_obs=37),
]
SLOW_DIRECTIONS = [
    Sizes(65, n_z=4, dim=128, hidden_u=256, hidden1=128, hidden2=128),
    Sizes(6, n_z=7, dim=192, hidden_u=17, hidden1=64, hidden2=48, members=3),
    Sizes(5, n_z=16, dim=64, hidden_u=100, hidden1=96, hidden2=160, members=5),
    Sizes(4, n_z=2, dim=256, hidden_u=64, hidden1=40, hidden2=70, n_obs=33),
    Sizes(33, n_z=3, dim=10, hidden_u=9, hidden1=48, hidden2=33, members=4, n_obs=5),
]


def step_in_the_direction(sizes: Sizes, **keywords):
    case = random_case(sizes)
    case = (*case[:3], case[3] if sizes.n_obs else None)
    options = {"n_steps": 1, "step_size": 0.5, "kappa": 0.7, "prior_weight": 1e-3}
    assert_ascent(case, options, factor=1, **keywords)


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("sizes", DIRECTIONS, ids=lambda sizes: "-".join(map(str, sizes)))
def test_interpreted_takes_the_direction_of_the_gradient(sizes):
    step_in_the_direction(sizes)
    assert ops.dispatch_counts() == {("plan_ascent", "triton"): 1}


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("sizes", [DIRECTIONS[1], DIRECTIONS[3]], ids=lambda sizes: "-".join(map(str, sizes)))
def test_interpreted_knows_the_length_of_the_gradient_too(sizes):
    case = random_case(sizes, seed=1)
    p, d = sizes.p, sizes.n_z * sizes.dim
    # A far target: the energy's gradient is then the return model's for the most part.
    target = torch.linspace(20, 40, p)
    options = {"n_steps": 1, "step_size": 1.0, "seed": (1, 2), "plans": torch.arange(p), "first_step": 5}
    moved, _, _ = ops.plan_langevin(*case[:3], target, **options)
    expected, _, _ = reference.plan_langevin(*in_float64(case)[:3], target.double(), **options)
    known = case[2].double().flatten(1) + reference.philox_normal((1, 2), torch.arange(p), 5, d)
    assert row_error(moved.flatten(1) - known, expected.flatten(1) - known) < TOLERANCE[False]
    assert ops.dispatch_counts() == {("plan_langevin", "triton"): 1}


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("kind", "which"), [("none", 5), ("none", 3), ("one", 4), ("several", 5), ("shared", 2)], ids=str
)
def test_interpreted_has_every_option(kind, which):
    assert_ascent(with_context(kind), {"n_steps": 2, "step_size": 0.1, **OPTIONS[which]})


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(("kind", "dim"), [("none", 24), ("one", 10), ("several", 24)])
def test_interpreted_makes_langevin_steps(kind, dim):
    case = with_context(kind, dim=dim)
    plans = torch.tensor([(1 << 32) - 1, 5, 0, 9, 1])
    assert_langevin(case, {"n_steps": 3, "plans": plans, **LANGEVIN}, torch.linspace(-2, 2, 5))


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
def test_interpreted_has_no_slope_beyond_the_range_of_the_log_variance():
    prior, returns, z0, _ = random_case(Sizes(5, n_z=2, dim=8, hidden_u=8, members=3))
    returns = returns._replace(b3=returns.b3 + torch.tensor([[0.0, 100.0], [0.0, -100.0], [0.0, 0.0]]))
    assert_ascent((prior, returns, z0, None), {"n_steps": 1, "step_size": 0.5, "kappa": 3.0}, factor=1)


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
def test_interpreted_reads_strided_inputs():
    prior, returns, z0, context = with_context("several", p=3, members=1)
    wide = torch.full((6, 2, 48), math.nan)
    wide[::2, :, ::2] = z0
    starts = torch.full((3, 14, 6), math.nan)
    starts[:, ::2, ::2] = context
    many = ReturnWeights(*(torch.stack((w, w), dim=-1)[..., 0] for w in returns))
    options = {"n_steps": 1, "step_size": 0.1, "kappa": 1.0}
    expected = ops.plan_ascent(prior, returns, z0, context=context, **options)
    actual = ops.plan_ascent(prior, many, wide[::2, :, ::2], context=starts[:, ::2, ::2], **options)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
def test_interpreted_keeps_a_nan_in_its_own_row():
    case = random_case(Sizes(6, n_z=2, dim=8, hidden_u=8, members=2))
    options = {"n_steps": 2, "step_size": 0.1, "kappa": 1.0, "radius": 0.3, "max_norm": 1.0}
    spoilt = case[2].clone()
    spoilt[4, 1, 3] = math.nan
    clean = ops.plan_ascent(*case[:3], **options)
    found = ops.plan_ascent(*case[:2], spoilt, **options)
    others = torch.arange(6) != 4
    for x, y in zip(found, clean, strict=True):
        assert x[4].isnan().all()
        assert torch.equal(x[others], y[others])


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("kind", ["none", "shared", "several"])
def test_interpreted_launches_in_turn_give_the_bits_of_one(kind, monkeypatch):
    from gac_fast.kernels import plan_ascent as kernel

    prior, returns, z0, context = with_context(kind, p=37, members=1, dim=8, hidden_u=4, hidden1=8, hidden2=8)
    options = {"n_steps": 1, "step_size": 0.1, "kappa": 1.0, "radius": 0.3}
    target, plans = torch.linspace(-1, 1, 37), torch.arange(100, 137)

    def found():
        ascended = ops.plan_ascent(prior, returns, z0, context=context, **options)
        sampled = ops.plan_langevin(prior, returns, z0, target, n_steps=1, plans=plans, context=context, **LANGEVIN)
        return *ascended, *sampled

    expected, grids = found(), []
    monkeypatch.setattr(kernel, "_MOST_SCRATCH", 1)
    run = kernel.Launch.run
    monkeypatch.setattr(kernel.Launch, "run", lambda launch: (grids.append(launch.grid), run(launch)))
    for x, y in zip(found(), expected, strict=True):
        assert torch.equal(x, y)
    assert len(grids) > 2
    assert set(grids) == {(1,)}


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
def test_interpreted_meets_the_degenerate_cases():
    prior, returns, z0, _ = random_case(Sizes(3, n_z=2, dim=8, hidden_u=8))
    flat = ReturnWeights(*(torch.zeros_like(w) for w in returns))
    # No gradient, no move; no steps, no move; no way, no move.
    assert torch.equal(ops.plan_ascent(prior, flat, z0, n_steps=2, step_size=0.1, kappa=1.0)[0], z0)
    assert torch.equal(ops.plan_ascent(prior, returns, z0, n_steps=0, step_size=0.1)[0], z0)
    assert torch.equal(ops.plan_ascent(prior, returns, z0, n_steps=1, step_size=0.1, radius=0.0)[0], z0)
    inside_nothing = ops.plan_ascent(prior, returns, z0, n_steps=1, step_size=0.1, max_norm=0.0)
    assert torch.equal(inside_nothing[0], torch.zeros_like(z0))
    none = ops.plan_ascent(prior, returns, z0[:0], n_steps=3, step_size=0.1)
    assert [list(x.shape) for x in none] == [[0, 2, 8], [0], [0]]
    still = ops.plan_langevin(
        prior, returns, z0, torch.tensor(1.0), n_steps=2, step_size=0.0, seed=(1, 2), plans=torch.arange(3)
    )
    assert torch.equal(still[0], z0)


@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
def test_interpreted_compiles_into_one_graph_and_passes_opcheck():
    case = random_case(Sizes(3, n_z=2, dim=8, hidden_u=8, members=2))
    prior, returns, z0, _ = case

    def plan(z0: Tensor) -> tuple[Tensor, Tensor]:
        ascended, mean, _ = ops.plan_ascent(prior, returns, z0, n_steps=1, step_size=0.1)
        sampled, _, _ = ops.plan_langevin(prior, returns, z0, mean, n_steps=1, plans=torch.arange(3), **LANGEVIN)
        return ascended, sampled

    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(z0), plan(z0), strict=True):
        assert torch.equal(x, y)
    # Schemas and fake kernels; the op has no gradient to register.
    tests = ("test_schema", "test_faketensor")
    arguments = (list(prior), list(returns), z0, None, 1, 0.1, 1.0, 0.0, 0.5, math.inf, False)
    torch.library.opcheck(torch.ops.gac_fast.plan_ascent_triton.default, arguments, test_utils=tests)
    arguments = (list(prior), list(returns), z0, torch.zeros(3), torch.arange(3), None, 1, 0.1, 0.5, 1, 2, 0, False)
    torch.library.opcheck(torch.ops.gac_fast.plan_langevin_triton.default, arguments, test_utils=tests)


@pytest.mark.interpreter
def test_too_many_members_are_refused():
    case = random_case(Sizes(2, n_z=1, dim=4, hidden_u=4, hidden1=2, hidden2=2, members=65))
    with ops.backend("triton"), pytest.raises(BackendError, match="takes up to 64 members of the return model, got 65"):
        ops.plan_ascent(*case[:3], n_steps=1, step_size=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The same by groups of programs, which take bfloat16 wherever they can; each alone in its group, as the interpreter
# runs one program after the other


@pytest.fixture
def in_groups(on_triton, monkeypatch):
    """Which calls of a test groups took."""
    from gac_fast.kernels import plan_ascent, plan_groups

    taken = []
    monkeypatch.setattr(
        plan_ascent, "_in_groups", lambda call: (taken.append(plan_groups.refusal(call.sizes) is None), taken[-1])[1]
    )
    return taken


GROUP_SIZES = [DIRECTIONS[0], DIRECTIONS[1], DIRECTIONS[3], DIRECTIONS[4]._replace(hidden_u=9)]


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", GROUP_SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_interpreted_groups_take_the_direction_of_the_gradient(sizes, in_groups):
    step_in_the_direction(sizes)
    assert in_groups == [True]


@pytest.mark.interpreter
@pytest.mark.parametrize(("kind", "which"), [("none", 5), ("none", 3), ("one", 4)], ids=str)
def test_interpreted_groups_have_every_option(kind, which, in_groups):
    assert_ascent(with_context(kind), {"n_steps": 2, "step_size": 0.1, **OPTIONS[which]})
    assert in_groups == [True]


@pytest.mark.interpreter
@pytest.mark.parametrize(("kind", "dim"), [("none", 24), ("one", 10)])
def test_interpreted_groups_make_langevin_steps(kind, dim, in_groups):
    plans = torch.tensor([(1 << 32) - 1, 5, 0, 9, 1])
    assert_langevin(with_context(kind, dim=dim), {"n_steps": 3, "plans": plans, **LANGEVIN}, torch.linspace(-2, 2, 5))
    assert in_groups == [True]


@pytest.mark.interpreter
def test_interpreted_groups_meet_the_same_cases(in_groups):
    test_interpreted_has_no_slope_beyond_the_range_of_the_log_variance()
    test_interpreted_keeps_a_nan_in_its_own_row()
    test_interpreted_meets_the_degenerate_cases()
    assert all(in_groups)


@pytest.mark.interpreter
def test_interpreted_groups_take_tiles_in_turn_and_leave_the_rest(in_groups, monkeypatch):
    from gac_fast.kernels import plan_groups

    prior, returns, z0, _ = with_context("none", p=37, members=2, dim=8, hidden_u=4, hidden1=8, hidden2=8)
    options = {"n_steps": 1, "step_size": 0.1, "kappa": 1.0, "radius": 0.3}
    expected, grids, run = ops.plan_ascent(prior, returns, z0, **options), [], plan_groups.Launch.run
    monkeypatch.setattr(plan_groups, "processors_of", lambda device: 1)
    monkeypatch.setattr(plan_groups.Launch, "run", lambda launch: (grids.append(launch.grid), run(launch)))
    for x, y in zip(ops.plan_ascent(prior, returns, z0, **options), expected, strict=True):
        assert torch.equal(x, y)
    assert grids == [(1,)]
    # Sizes that groups do not take.
    for kind, fields in (("several", {}), ("none", {"hidden_u": 0})):
        prior, returns, z0, context = with_context(kind, p=2, **fields)
        ops.plan_ascent(prior, returns, z0, context=context, n_steps=1, step_size=0.1)
    assert in_groups == [True, True, False, False]


def test_groups_fill_the_processors_and_never_more():
    pytest.importorskip("triton")
    from gac_fast.kernels import plan_groups

    chosen = {n: plan_groups.option_for(n)[1] for n in (1, 64, 1024, 1025, 4096, 4224, 4225, 10**6)}
    assert chosen == {1: 8, 64: 8, 1024: 8, 1025: 4, 4096: 2, 4224: 2, 4225: 1, 10**6: 1}
    for n, group in chosen.items():
        assert group == 1 or group * math.ceil(n / 64) <= 132
    assert plan_groups.option_for(64, 4)[1] == 4


def test_scratch_memory_of_groups_is_bounded():
    from gac_fast.kernels import plan_ascent as kernel

    wide = {"members": 64, "hidden1": 1024, "n_plans": 16384}
    launches = [one for one in kernel.shipped(dtype=torch.bfloat16, **GYM, **wide) if one.name == "group_kernel"]
    assert launches
    for one in launches:
        assert sum(one.arguments[name].nbytes for name in ("p_op", "p_f")) <= 1 << 30
        assert one.grid[0] <= 132
        assert one.grid[0] % one.constants["G"] == 0
    # As many groups as processors would need more: fewer take their tiles in turn.
    assert min(one.grid[0] for one in launches) < 66


# ---------------------------------------------------------------------------------------------------------------------
# The same by programs that go alone, which take nothing yet by themselves


@pytest.fixture
def alone(on_triton, monkeypatch):
    """Which calls of a test programs took that go alone."""
    from gac_fast.kernels import plan_ascent, plan_single

    taken = []
    # As few programs as there may be: here one runs after the other.
    monkeypatch.setattr(plan_ascent, "ALONE", plan_ascent.Alone(64, 8))
    monkeypatch.setattr(
        plan_ascent, "_alone", lambda call: (taken.append(plan_single.refusal(call.sizes) is None), taken[-1])[1]
    )
    return taken


# Tiles have 64 rows here: one, two and four of them.
ALONE_SIZES = [
    Sizes(3, n_z=3, dim=48, hidden_u=70, hidden1=70, hidden2=20, n_obs=37),
    Sizes(9, n_z=2, dim=10, hidden_u=0, hidden1=3, hidden2=66, members=2),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", ALONE_SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_interpreted_programs_alone_take_the_direction_of_the_gradient(sizes, alone):
    step_in_the_direction(sizes)
    assert alone == [True]


@pytest.mark.interpreter
@pytest.mark.parametrize(("kind", "which"), [("one", 5), ("none", 4)])
def test_interpreted_programs_alone_have_every_option(kind, which, alone):
    assert_ascent(with_context(kind, members=2), {"n_steps": 2, "step_size": 0.1, **OPTIONS[which]})
    assert alone == [True]


@pytest.mark.interpreter
def test_interpreted_programs_alone_make_langevin_steps(alone):
    case = with_context("none", dim=10, members=1)
    plans = torch.tensor([(1 << 32) - 1, 5, 0, 9, 1])
    assert_langevin(case, {"n_steps": 2, "plans": plans, **LANGEVIN}, torch.linspace(-2, 2, 5))
    assert alone == [True]


@pytest.mark.interpreter
def test_interpreted_programs_alone_meet_the_same_cases(alone, monkeypatch):
    from gac_fast.kernels import plan_ascent, plan_single

    test_interpreted_keeps_a_nan_in_its_own_row()
    prior, returns, z0, _ = random_case(Sizes(3, n_z=2, dim=8, hidden_u=8))
    assert torch.equal(ops.plan_ascent(prior, returns, z0[:2], n_steps=0, step_size=0.1, max_norm=0.1)[0], z0[:2])
    # A plan does not know with which others it is.
    found, grids, run = [], [], plan_single.Launch.run
    monkeypatch.setattr(plan_single.Launch, "run", lambda launch: (grids.append(launch.grid), run(launch)))
    for own in (2, 8):
        monkeypatch.setattr(plan_ascent, "ALONE", plan_ascent.Alone(64, own))
        found.append(ops.plan_ascent(prior, returns, z0, n_steps=1, step_size=0.1, radius=0.1))
    assert grids == [(2,), (1,)]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert all(alone)


def test_programs_go_alone_where_the_one_number_says_so(monkeypatch):
    from gac_fast.kernels import plan_ascent as kernel

    def call(n_plans, dtype=torch.bfloat16, architecture=90):
        # What is asked of a call.
        return SimpleNamespace(
            dtype=dtype, architecture=architecture, z0=torch.empty(n_plans, 4, 128, device="meta"),
            sizes=kernel.Sizes(n_z=4, dim=128, hidden=256, members=1, hidden1=128, hidden2=128, n_obs=0, apart=False),
        )  # fmt: skip

    # Nobody has measured them: they take nothing.
    assert not kernel._alone(call(1))
    monkeypatch.setattr(kernel, "ALONE", kernel.Alone(64))
    assert kernel._alone(call(64))
    assert not kernel._alone(call(65))
    assert not kernel._alone(call(64, torch.float32))
    assert not kernel._alone(call(64, architecture=80))
    # Nor what they do not hold: starts, many members, long plans, many weights.
    for fields in ({"apart": True}, {"members": 3}, {"n_z": 5}, {"hidden": 512}):
        refused = call(64)
        refused.sizes = replace(refused.sizes, **fields)
        assert not kernel._alone(refused)
    found = {n: kernel.plan_single.best_own(n) for n in (1, 50, 51, 64, 400, 10_000)}
    assert found == {1: 1, 50: 1, 51: 2, 64: 2, 400: 8, 10_000: 8}


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("sizes", SLOW_DIRECTIONS, ids=lambda sizes: "-".join(map(str, sizes)))
def test_interpreted_takes_the_direction_of_the_gradient_at_every_size(sizes):
    step_in_the_direction(sizes)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("kind", ["none", "one", "several", "shared"])
def test_interpreted_has_every_option_with_every_context(kind):
    for options in OPTIONS:
        assert_ascent(with_context(kind, p=17), {"n_steps": 3, "step_size": 0.1, **options})


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.usefixtures("on_triton")
def test_interpreted_follows_many_steps():
    case = random_case(Sizes(9, n_z=2, dim=32, members=2))
    options = {"n_steps": 40, "step_size": 0.05, "kappa": 1.0, "radius": 0.5, "max_norm": 1.1}
    follows_many_steps(case, options, 1e-3)


def follows_many_steps(case, options, bound, bf16=False, device="cpu"):
    prior, returns, z0 = case[:3]
    expected, expected_mean, _ = reference.plan_ascent(*in_float64(case)[:3], **options)
    start_mean = reference.plan_ascent(*in_float64(case)[:3], **options | {"n_steps": 0})[1]
    on = [PriorWeights(*(None if w is None else w.to(device) for w in prior)),
          ReturnWeights(*(w.to(device) for w in returns)), z0.to(device)]  # fmt: skip
    moved, mean, _ = ops.plan_ascent(*on, **options, bf16=bf16)
    # Forty normalised steps amplify rounding, most where the gradient is short; the bound hardly differs there.
    assert float((moved.cpu() - expected).flatten(1).norm(dim=1).median()) < bound * float(expected[0].norm())
    gain = float(expected_mean.mean()) - float(start_mean.mean())
    assert gain > 1
    assert abs(float(mean.mean()) - float(expected_mean.mean())) < bound * gain


# ---------------------------------------------------------------------------------------------------------------------
# Compiled without a GPU

GYM = {"dim": 128, "n_z": 4}
SEVERAL = {"members": 4, "n_obs": 17, "n_starts": 8}
VARIANTS = {"ascent": {}, "langevin": {"langevin": True}, "ensemble": {"members": 4, "n_obs": 17}, "starts": SEVERAL}


def compiles(folder, dtype, architecture, only=None, **sizes):
    from gac_fast.kernels import plan_ascent as kernel

    launches = kernel.shipped(dtype=dtype, architecture=architecture, **sizes)
    for one in launches if only is None else launches[only]:
        assert_fits(one, architecture, folder, spills=dtype == torch.float32)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("variant", VARIANTS)
def test_gym_in_bf16_compiles_without_spills(fresh_cache, variant):
    # The narrowest and the widest tile; all of them are among the slow ones.
    compiles(fresh_cache, torch.bfloat16, 90, slice(None, None, 3 if variant == "ascent" else 2), **GYM,
             **VARIANTS[variant])  # fmt: skip


def test_gym_weights_run_ahead_of_the_products(fresh_cache):
    """The stream: asynchronous copies of the weights alone, and products that read them from shared memory."""
    from gac_fast.kernels import plan_ascent as kernel

    compiled = kernel.shipped(dtype=torch.bfloat16, **GYM)[0].compile(90)
    ptx, ir = compiled.asm["ptx"], compiled.asm["ttgir"]
    assert "wgmma.mma_async" in ptx
    copies = [line for line in ir.splitlines() if "async_copy_global_to_local" in line]
    assert copies
    assert all("tensor<128x128x!tt.ptr<bf16>" in line for line in copies)


def test_gym_weights_come_as_operands_to_programs_alone(fresh_cache):
    """Every thread multiplies what it has loaded: no detour of weights or activations through shared memory."""
    from gac_fast.kernels import plan_ascent as kernel

    launch = kernel.shipped(dtype=torch.bfloat16, **GYM, n_plans=64, alone=True)[0]
    assert launch.grid == (32,)
    found = assert_fits(launch, 90, fresh_cache)
    assert found.shared <= 16 * 1024
    compiled = launch.compile(90)
    ptx, ir = compiled.asm["ptx"], compiled.asm["ttgir"]
    # 1.376 MB: 336 times 16 bytes of 256 threads, each one product.
    products = 2 * (2 * 512 * 256 + 512 * 128 + 128 * 128) // 2048
    assert ptx.count("mma.sync.aligned.m16n8k16") == products
    weights = [line for line in ptx.splitlines() if re.search(r"ld\.global\S*(\.cg|evict_last)\S*\.v4", line)]
    assert len(weights) == products
    assert "local_alloc" not in ir
    # Sums over rows alone; with warps spread otherwise there are ten times as many.
    assert ptx.count("st.shared") < 100


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{"langevin": True}, {"hidden": 0}, {"members": 2, "n_obs": 17}], ids=str)
def test_gym_fits_programs_alone_with_every_option(variant, tmp_path):
    from gac_fast.kernels import plan_ascent as kernel

    assert_fits(kernel.shipped(dtype=torch.bfloat16, **GYM, **variant, alone=True)[0], 90, tmp_path)


@pytest.mark.parametrize(("n_plans", "n"), [(1, 16), (64, 16), (1024, 16), (4096, 64), (16384, 128)])
def test_more_plans_get_wider_tiles(n_plans, n):
    from gac_fast.kernels import plan_ascent as kernel

    every = [one.option for one in kernel.shipped(dtype=torch.bfloat16, **GYM) if one.name == "plan_ascent_kernel"]
    assert dict(kernel.likely_option(every, n_plans).tiles)["N"] == n


SCRATCH = ("p_op", "p_f", "p_table", "p_starts", "p_chunk")


@pytest.mark.parametrize(
    ("n_plans", "fields"),
    [
        (16384, {"members": 4, "n_obs": 17, "n_starts": 256}),
        (100_000, {"members": 4, "n_obs": 17, "n_starts": 16}),
        (1_000_000, {}),
    ],
    ids=["256 starts", "16 starts", "no starts"],
)
def test_scratch_memory_is_bounded_however_many_plans_and_starts(n_plans, fields):
    from gac_fast.kernels import plan_ascent as kernel

    launches = kernel.shipped(dtype=torch.bfloat16, n_plans=n_plans, **GYM, **fields)
    groups = [one for one in launches if one.name == "group_kernel"]
    # Theirs is as much for any number of plans.
    assert all(sum(one.arguments[name].nbytes for name in ("p_op", "p_f")) < 1 << 28 for one in groups)
    launches = [one for one in launches if one.name == "plan_ascent_kernel"]
    for option in {one.option for one in launches}:
        in_turn = [one for one in launches if one.option == option]
        assert len(in_turn) > 1
        assert sum(one.arguments["n_plans"] for one in in_turn) == n_plans
        assert [len(one.arguments["p_z0"]) for one in in_turn] == [one.arguments["n_plans"] for one in in_turn]
        assert all(one.grid[0] == -(-one.arguments["n_plans"] // dict(option.tiles)["N"]) for one in in_turn)
        memory = [[one.arguments[name] for name in SCRATCH] for one in in_turn]
        # All in the memory of the first.
        assert all(x is y for other in memory for x, y in zip(other, memory[0], strict=True))
        needed = sum(x.nbytes for x in memory[0] if x is not None)
        assert (1 << 29) < needed <= 1 << 30
        assert all(len(x) >= in_turn[0].grid[0] for x in memory[0] if x is not None)


def test_scratch_memory_of_one_program_is_what_a_launch_has_at_least():
    from gac_fast.kernels import plan_ascent as kernel

    launches = kernel.shipped(
        dtype=torch.bfloat16, n_plans=64, members=64, n_obs=17, n_starts=4096, **GYM
    )  # fmt: skip
    narrow = [one for one in launches if one.option == launches[0].option]
    assert [one.grid for one in narrow] == [(1,)] * 4
    # One more chunk than there are: the activations of the first pass.
    assert narrow[0].arguments["p_chunk"].nbytes == (64 * 4096 // 4 + 1) * 2 * 128 * 64 * 2


def test_the_usual_sizes_take_one_launch():
    from gac_fast.kernels import plan_ascent as kernel

    for fields in ({}, {"langevin": True}, {"members": 4, "n_obs": 17}, {"members": 4, "n_obs": 17, "n_starts": 64}):
        launches = kernel.shipped(dtype=torch.bfloat16, n_plans=1024, **GYM, **fields)
        assert len(launches) == len({one.option for one in launches})


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype", "architecture"), compile_cases("plan_ascent"))
def test_every_size_fits(sizes, dtype, architecture, tmp_path):
    compiles(tmp_path, dtype, architecture, **sizes)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU

precisions = pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
GPU_SIZES = [*DIRECTIONS, *SLOW_DIRECTIONS, Sizes(4133, hidden_u=256, dim=128, hidden1=128, hidden2=128)]


@pytest.mark.gpu
@precisions
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("sizes", GPU_SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_gpu_takes_the_direction_of_the_gradient(sizes, bf16):
    step_in_the_direction(sizes, bf16=bf16, device="cuda")
    assert ops.dispatch_counts() == {("plan_ascent", "triton"): 1}


@pytest.mark.gpu
@precisions
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("kind", ["none", "one", "several", "shared"])
def test_gpu_has_every_option(kind, bf16):
    for options in OPTIONS:
        case = with_context(kind, p=37)
        assert_ascent(case, {"n_steps": 3, "step_size": 0.1, **options}, bf16=bf16, device="cuda")
    plans = torch.arange(37) * 7
    assert_langevin(case, {"n_steps": 4, "plans": plans, **LANGEVIN}, torch.linspace(-2, 2, 37), bf16, "cuda")


@pytest.mark.gpu
@precisions
def test_gpu_follows_many_steps(bf16):
    options = {"n_steps": 40, "step_size": 0.05, "kappa": 1.0, "radius": 0.5, "max_norm": 1.1}
    follows_many_steps(random_case(Sizes(65, members=2)), options, 0.1 if bf16 else 1e-3, bf16, "cuda")


@pytest.mark.gpu
@precisions
@pytest.mark.parametrize("kind", ["none", "several"])
def test_gpu_repeats_bit_for_bit(kind, bf16):
    prior, returns, z0, context = with_context(kind, p=70, dim=128, hidden_u=256, hidden1=128, hidden2=128)
    prior, returns = (type(w)(*(x.cuda() for x in w)) for w in (prior, returns))
    z0, context = z0.cuda(), None if context is None else context.cuda()
    options = {"n_steps": 10, "step_size": 0.1, "kappa": 1.0, "radius": 0.3, "max_norm": 1.0, "bf16": bf16}
    first = ops.plan_ascent(prior, returns, z0, context=context, **options)
    for _ in range(100):
        for x, y in zip(ops.plan_ascent(prior, returns, z0, context=context, **options), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_gpu_call_is_captured_into_a_graph():
    prior, returns, z0, _ = with_context("none", p=20)
    prior, returns = (type(w)(*(x.cuda() for x in w)) for w in (prior, returns))
    z0 = z0.cuda()
    options = {"n_steps": 5, "step_size": 0.1, "bf16": True}
    expected = ops.plan_ascent(prior, returns, z0, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.plan_ascent(prior, returns, z0, **options)
    for x in out:
        x.zero_()
    graph.replay()
    for x, y in zip(out, expected, strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def alone_on_gpu(nan_filled_empty, monkeypatch):
    from gac_fast.kernels import plan_ascent

    monkeypatch.setattr(plan_ascent, "ALONE", plan_ascent.Alone(64))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", ALONE_SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_gpu_programs_alone_take_the_direction_of_the_gradient(sizes, alone_on_gpu):
    step_in_the_direction(sizes, bf16=True, device="cuda")


@pytest.mark.gpu
def test_gpu_programs_alone_have_every_option(alone_on_gpu):
    case = with_context("one", p=37, members=2)
    for options in OPTIONS:
        assert_ascent(case, {"n_steps": 3, "step_size": 0.1, **options}, bf16=True, device="cuda")
    plans = torch.arange(37) * 7
    assert_langevin(case, {"n_steps": 4, "plans": plans, **LANGEVIN}, torch.linspace(-2, 2, 37), True, "cuda")


@pytest.mark.gpu
def test_gpu_programs_alone_repeat_bit_for_bit(alone_on_gpu, monkeypatch):
    from gac_fast.kernels import plan_ascent as kernel

    case = random_case(Sizes(64, dim=128, hidden_u=256, hidden1=128, hidden2=128))
    options = {"n_steps": 40, "step_size": 0.05, "kappa": 1.0, "radius": 0.5, "max_norm": 1.1}
    follows_many_steps(case, options, 0.1, True, "cuda")
    prior, returns = (type(w)(*(x.cuda() for x in w)) for w in case[:2])
    z0 = case[2].cuda()
    first = ops.plan_ascent(prior, returns, z0, **options, bf16=True)
    for own in (1, 2, 3, 8):
        # A plan does not know with which others it is.
        monkeypatch.setattr(kernel, "ALONE", kernel.Alone(64, own))
        for _ in range(25):
            for x, y in zip(ops.plan_ascent(prior, returns, z0, **options, bf16=True), first, strict=True):
                assert torch.equal(x, y)
