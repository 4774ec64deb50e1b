"""The Actor: resets, plans, units, kinds of arrays, noise, errors. (That it equals the full pass: test_model.py.)"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import row_error
from core_fixtures import ACT_DIM, OBS_DIM, make_model, make_normalization, model_config, random_seeds

from gac_fast import ops
from gac_fast.act import Actor
from gac_fast.ops import _threads
from gac_fast.plan import Plans

P = 4
MASK = torch.tensor([True, False, True, False])


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything here holds for both."""
    if request.param == "cpp":
        request.getfixturevalue("cpp_engine")
    with ops.backend(request.param):
        yield request.param
    other = {"reference": "cpp", "cpp": "reference"}[request.param]
    assert ("decode_step", other) not in ops.dispatch_counts() or "engines" in request.node.name


def make_actor(context="states", seed=0, **options) -> Actor:
    model = make_model(model_config(context=context, window=3))
    return Actor(model, make_normalization(), random_seeds(P, model.config, seed=seed), **options)


def observations(n: int, seed: int = 0) -> torch.Tensor:
    """[n, P, obs_dim]"""
    return torch.randn(n, P, OBS_DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize("steps_before", [1, 2, 3, 8])
def test_reset_rows_equal_a_fresh_actor_and_the_others_are_untouched(context, steps_before):
    used, undisturbed, fresh = make_actor(context), make_actor(context), make_actor(context)
    for obs in observations(steps_before):
        used.act(obs)
        undisturbed.act(obs)
    used.reset(MASK)
    for step, obs in enumerate(observations(8, seed=1)):
        out, kept, new = used.act(obs), undisturbed.act(obs), fresh.act(obs)
        assert torch.equal(out[MASK], new[MASK])
        assert torch.equal(out[~MASK], kept[~MASK])
        # Otherwise the test could not tell one from the other. (Later both have forgotten what was before.)
        assert step > 0 or not torch.equal(kept[MASK], new[MASK])


@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_reset_with_new_plans_changes_the_masked_rows_plans_alone(context):
    used, undisturbed, fresh = make_actor(context), make_actor(context), make_actor(context, seed=1)
    plans = random_seeds(P, used.model.config, seed=1)
    # Rows outside the mask are not read.
    plans[~MASK] = torch.nan
    for obs in observations(5):
        used.act(obs)
        undisturbed.act(obs)
    used.reset(MASK.numpy(), Plans(plans, torch.zeros(P), torch.zeros(P)))
    for obs in observations(5, seed=1):
        out, kept, new = used.act(obs), undisturbed.act(obs), fresh.act(obs)
        assert torch.equal(out[MASK], new[MASK])
        assert torch.equal(out[~MASK], kept[~MASK])


@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_reset_takes_away_what_an_overflow_left(context):
    """0 times NaN is NaN: no weight of an attention hides a NaN of an earlier episode."""
    used, fresh = make_actor(context), make_actor(context)
    obs = observations(1)[0]
    # Finite, and infinite in the model's units.
    obs[MASK] = 3e38
    # More than one step: the first slot is written again before it is read.
    for _ in range(3):
        assert bool(used.act(obs)[MASK].isnan().all())
    used.reset(MASK)
    for obs in observations(5, seed=1):
        assert torch.equal(used.act(obs)[MASK], fresh.act(obs)[MASK])


def test_reset_of_all_and_of_none():
    used, fresh = make_actor(), make_actor()
    first = [used.act(obs) for obs in observations(5)]
    used.reset()
    assert all(torch.equal(used.act(obs), out) for obs, out in zip(observations(5), first, strict=True))
    fresh.act(observations(1)[0])
    used.reset()
    used.act(observations(1)[0])
    used.reset(torch.zeros(P, dtype=torch.bool), random_seeds(P, used.model.config, seed=5))
    assert torch.equal(used.act(observations(2)[1]), fresh.act(observations(2)[1]))


def test_rows_do_not_touch_each_other():
    together, model = make_actor("states_actions"), make_model(model_config(context="states_actions", window=3))
    alone = Actor(model, make_normalization(), random_seeds(P, model.config)[2:3])
    for obs in observations(6):
        assert torch.allclose(together.act(obs)[2:3], alone.act(obs[2:3]), rtol=0, atol=1e-5)


def test_numpy_in_numpy_out_and_tensor_in_tensor_out():
    one, two = make_actor(), make_actor()
    obs = observations(1)[0]
    from_tensor, from_numpy = one.act(obs), two.act(obs.numpy().astype(np.float64))
    assert isinstance(from_tensor, torch.Tensor)
    assert isinstance(from_numpy, np.ndarray)
    assert from_numpy.dtype == np.float32
    assert from_numpy.shape == (P, ACT_DIM) == from_tensor.shape
    np.testing.assert_array_equal(from_numpy, from_tensor.numpy())


def test_actions_are_in_environment_units():
    actor = make_actor()
    units = actor.normalization
    low, high = units.action_mid - units.action_half, units.action_mid + units.action_half
    with torch.no_grad():
        actor.model.decoder.head.bias.fill_(50.0)
    out = actor.act(observations(1)[0])
    assert torch.allclose(out, high.expand(P, -1))
    assert bool((low < high).all())


def test_noise_is_seeded_clamped_and_remembered():
    obs = observations(40)
    runs = [[actor.act(o) for o in obs] for actor in (make_actor(action_noise=0.3, seed=s) for s in (0, 0))]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    noisy, clean = make_actor(action_noise=0.1), make_actor()
    units = clean.normalization
    difference = torch.stack([(noisy.act(o) - clean.act(o)) / units.action_half for o in obs])
    # Clamping at the walls takes a little; 320 draws.
    assert 0.06 < float(difference.std()) < 0.13
    wild = make_actor(action_noise=100.0).act(obs[0])
    walls = torch.stack((units.action_mid - units.action_half, units.action_mid + units.action_half))
    assert bool(((wild - walls[:, None]).abs().min(dim=0).values < 1e-5).float().mean() > 0.9)
    # With actions in the context the noisy action is what the decoder reads back.
    noisy, clean = make_actor("states_actions", action_noise=0.3), make_actor("states_actions")
    noisy.act(obs[0]), clean.act(obs[0])
    noisy.action_noise = 0.0
    assert not torch.allclose(noisy.act(obs[1]), clean.act(obs[1]), rtol=0, atol=1e-4)


def test_a_step_like_the_one_before_is_one_call(engine):
    """The same actions as the long way, new arrays each time, and nothing done where anything is another one."""
    actor, other = make_actor("states_actions"), make_actor("states_actions")
    state, seen = actor._state, []

    def step(obs: torch.Tensor | np.ndarray, short: bool) -> None:
        n_before = ops.dispatch_counts()["decode_step", engine] if seen else 0
        again, steps = state.again, state.steps.clone()
        if again is not None and not short:
            assert again(actor.model, obs, 0) is None
            assert torch.equal(state.steps, steps)
        out = actor.act(obs)
        assert ops.dispatch_counts()["decode_step", engine] == n_before + 1
        assert (state.again is again and again is not None) == (short and engine == "cpp")
        assert type(out) is type(obs)
        other._state.again = other._state._kept_again = None
        expected = other.act(obs)
        assert torch.equal(torch.as_tensor(out), torch.as_tensor(expected))
        assert all(not np.shares_memory(np.asarray(out), x) for x in seen)
        seen.append(np.asarray(out))
        ops._dispatch._counts["decode_step", engine] -= 1  # the other's

    obs = observations(12)
    step(obs[0], False)
    for x in obs[1:3]:
        step(x, True)
    step(obs[3].numpy(), True)
    step(obs[3].double().numpy(), True)
    step(obs[4].flip(1).clone().flip(1), True)
    step(torch.stack((obs[4], obs[4]), 2)[:, :, 0], True)
    for model in (actor.model, other.model):
        with torch.no_grad():
            model.decoder.layers[1].mlp_in.weight[3, 70 % model.config.dim] += 1
    step(obs[5], False)
    step(obs[6], True)
    for model in (actor.model, other.model):
        model.decoder.head.weight = torch.nn.Parameter(-model.decoder.head.weight.detach())
    step(obs[7], False)
    step(obs[8], True)
    if engine == "cpp":
        with ops.backend("reference"):
            assert state.again(actor.model, obs[0], 0) is None
        for bad in (
            obs[0][:2],
            obs[0] / 0,
            obs[0].int(),
            [1.0],
            torch.view_as_complex(torch.stack((obs[0],) * 2, 2)).conj().imag,
        ):
            assert state.again(actor.model, bad, 0) is None
        assert state.again(other.model, obs[0], 0) is None
        actor.reset(MASK)
        assert state.again is None


def test_the_actor_reads_the_models_present_weights():
    actor = make_actor()
    before = actor.act(observations(1)[0])
    with torch.no_grad():
        actor.model.decoder.head.weight.mul_(-1)
    actor.reset()
    assert not torch.equal(actor.act(observations(1)[0]), before)


def test_the_parts_of_an_actor_share_its_packed_weights_until_the_models_change():
    actor, obs = make_actor(), observations(1)[0]
    actor.act(obs)
    actor.reset()
    one, two = actor.split([1, P - 1])
    first = one.act(obs[:1])
    assert one._state._packed is actor._state._packed
    with torch.no_grad():
        actor.model.decoder.head.weight.mul_(-1)
    alone = make_actor()
    alone.model.load_state_dict(actor.model.state_dict())
    assert torch.equal(two.act(obs[1:]), alone.split([1, P - 1])[1].act(obs[1:]))
    one.reset()
    assert not torch.equal(one.act(obs[:1]), first)
    packed = [x._state._packed for x in (actor, one, two)]
    assert len(set(map(id, packed))) == 3 or packed == [None] * 3


@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_weights_may_change_within_an_episode(context):
    """What is in the rings stays; the next step runs on the new weights."""
    actor, other = make_actor(context), make_actor(context)
    obs = observations(6)
    for x in obs[:3]:
        actor.act(x), other.act(x)
    optimizer = torch.optim.SGD(actor.model.decoder.parameters(), lr=0.5)
    for p in actor.model.decoder.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(actor.act(obs[3]), other.act(obs[3]))
    other.model.load_state_dict(actor.model.state_dict())
    assert not torch.equal(actor.act(obs[4]), other.act(obs[4]))
    # A new decoder in the model's place, on the same history.
    one, two = make_actor(context), make_actor(context)
    for x in obs[:3]:
        assert torch.equal(one.act(x), two.act(x))
    one.model.decoder = copy.deepcopy(actor.model.decoder)
    two.model.load_state_dict(one.model.state_dict(), assign=True)
    assert torch.equal(one.act(obs[3]), two.act(obs[3]))


@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_a_deep_copy_goes_on_by_itself(context):
    actor = make_actor(context, action_noise=0.2)
    obs = observations(6)
    for x in obs[:3]:
        actor.act(x)
    other = copy.deepcopy(actor)
    # Noise included.
    for x in obs[3:]:
        assert torch.equal(actor.act(x), other.act(x))
    with torch.no_grad():
        actor.model.decoder.head.weight.mul_(-1)
    assert not torch.equal(actor.act(obs[0]), other.act(obs[0]))


def test_bf16_acts_close_to_float32(engine):
    full, narrow = make_actor("states_actions", bf16=False), make_actor("states_actions", bf16=True)
    a = torch.stack([full.act(x) for x in observations(12)])
    b = torch.stack([narrow.act(x) for x in observations(12)])
    assert row_error(b.flatten(1), a.flatten(1)) < 2e-2
    assert not torch.equal(a, b)
    assert b.dtype == torch.float32


def test_auto_acts_as_the_decoder_was_trained(engine):
    for trained in (False, True):
        model = make_model()
        model.bf16 = trained
        actor = Actor(model, make_normalization(), random_seeds(P, model.config))
        assert actor.bf16 == (trained and ops.has_fast_bf16(torch.device("cpu")))
        assert Actor(model, make_normalization(), random_seeds(P, model.config), bf16=not trained).bf16 != trained
    with pytest.raises(ValueError, match="bf16: expected True, False or 'auto', got 'on'"):
        make_actor(bf16="on")


class Pendulums:
    """P damped points that every action pushes: observations depend smoothly on all actions before."""

    def __init__(self, n: int) -> None:
        self.x = torch.linspace(-1, 1, n)[:, None] * torch.tensor([1.0, 0.5, -1.0])

    def step(self, action: torch.Tensor) -> None:
        push = torch.nn.functional.pad(action, (0, 1))
        self.x = 0.9 * self.x + 0.1 * torch.sin(3 * self.x.roll(1, dims=1)) + 0.05 * push


def test_64_episodes_follow_the_reference_in_both_engines(cpp_engine):
    """Whole episodes, each engine acting for itself in a world of its own."""
    for context in ("states", "states_actions"):
        model = make_model(model_config(context=context, window=8))
        actors = {
            name: Actor(model, make_normalization(), random_seeds(64, model.config), bf16=False)
            for name in ("reference", "cpp")
        }
        worlds = {name: Pendulums(64) for name in actors}
        moved = 0.0
        for _ in range(60):
            actions = {}
            for name, actor in actors.items():
                with ops.backend(name):
                    actions[name] = actor.act(worlds[name].x)
            torch.testing.assert_close(worlds["cpp"].x, worlds["reference"].x, rtol=0, atol=1e-4)
            torch.testing.assert_close(actions["cpp"], actions["reference"], rtol=0, atol=1e-4)
            before = worlds["cpp"].x
            for name, world in worlds.items():
                world.step(actions[name])
            moved = max(moved, float((worlds["cpp"].x - before).abs().max()))
        assert moved > 0.05


def test_an_actor_in_inference_mode():
    actor, other = make_actor("states_actions"), make_actor("states_actions")
    for x in observations(4):
        with torch.inference_mode():
            out = actor.act(x.numpy())
        np.testing.assert_array_equal(out, other.act(x).numpy())


def test_len_and_repr():
    assert len(make_actor()) == P
    assert "4 environments" in repr(make_actor())


@pytest.mark.parametrize("bad", [np.zeros((P, OBS_DIM + 1)), np.zeros((P - 1, OBS_DIM)), np.zeros(OBS_DIM)])
def test_observations_of_another_shape(bad):
    with pytest.raises(ValueError, match=r"obs: expected shape \[4, 3\], got "):
        make_actor().act(bad)


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_observations_that_are_not_finite(value, kind):
    obs = np.zeros((P, OBS_DIM), np.float32)
    obs[2, 1] = value
    actor = make_actor()
    with pytest.raises(FloatingPointError, match="obs: expected finite values, environment 2 has"):
        actor.act(obs if kind == "numpy" else torch.from_numpy(obs))
    # Nothing was fed.
    fresh = make_actor().act(observations(1)[0])
    assert torch.equal(actor.act(observations(1)[0]), fresh)


def test_bad_masks_and_plans():
    actor = make_actor()
    with pytest.raises(ValueError, match=r"mask: expected bool \[4\], got torch.bool \[3\]"):
        actor.reset(MASK[:3])
    with pytest.raises(ValueError, match=r"mask: expected bool \[4\], got torch.int64 \[4\]"):
        actor.reset(MASK.long())
    with pytest.raises(ValueError, match=r"plans: expected seeds of shape \[4, 2, 16\], got \[2, 2, 16\]"):
        actor.reset(MASK, random_seeds(2, actor.model.config))
    plans = random_seeds(P, actor.model.config)
    plans[2, 0, 3] = torch.inf
    with pytest.raises(ValueError, match="plans: expected finite seeds, plan 2 has NaN or infinity"):
        actor.reset(MASK, plans)
    # Nothing was changed.
    assert torch.equal(actor.act(observations(1)[0]), make_actor().act(observations(1)[0]))


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z0: z0[:, :1], r"z0: expected seeds of shape \[P, 2, 16\], got \[4, 1, 16\]"),
        (lambda z0: z0[0], r"z0: expected seeds of shape \[P, 2, 16\], got \[2, 16\]"),
        (lambda z0: z0[:0], r"z0: expected seeds of shape \[P, 2, 16\] with P >= 1, got \[0, 2, 16\]"),
        (lambda z0: z0.long(), "z0: expected floating-point seeds, got torch.int64"),
        (lambda z0: torch.where(z0 == z0[1, 0, 2], torch.nan, z0), "z0: expected finite seeds, plan 1 has NaN or inf"),
    ],
)
def test_bad_seeds(change, message, kind):
    model = make_model()
    bad = change(random_seeds(P, model.config))
    with pytest.raises(ValueError, match=message):
        Actor(model, make_normalization(), bad.numpy() if kind == "numpy" else bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_seeds_of_any_float_type(dtype, kind):
    z0 = random_seeds(P, make_model().config).half()
    expected = Actor(make_model(), make_normalization(), z0.float())
    given = z0.to(dtype).numpy() if kind == "numpy" else z0.to(dtype)
    if kind == "numpy":
        given.setflags(write=False)
    actor = Actor(make_model(), make_normalization(), given)
    obs = observations(1)[0]
    out = actor.act(obs)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.act(obs))
    actor.reset(plans=given)
    assert torch.equal(actor.act(obs), out)


def test_every_environment_may_have_its_own_noise():
    obs = observations(60)
    levels = np.linspace(0, 0.3, P)
    noisy, clean = make_actor(action_noise=levels), make_actor()
    units = clean.normalization
    difference = torch.stack([(noisy.act(o) - clean.act(o)) / units.action_half for o in obs])
    assert bool((difference[:, 0] == 0).all())
    # 120 draws for each; the walls take a little.
    assert torch.allclose(difference.std(dim=(0, 2)), torch.from_numpy(levels).float(), rtol=0.35, atol=1e-6)


def test_correlated_noise_keeps_its_size_and_forgets_at_its_rate():
    obs = observations(400)
    noisy, clean = make_actor(action_noise=0.05, noise_correlation=10.0), make_actor()
    units = clean.normalization
    steps = torch.stack([(noisy.act(o) - clean.act(o)) / units.action_half for o in obs])
    assert 0.035 < float(steps.std()) < 0.065
    centred = steps - steps.mean()
    lags = {lag: float((centred[lag:] * centred[:-lag]).mean() / centred.square().mean()) for lag in (1, 10, 60)}
    assert lags[1] == pytest.approx(math.exp(-0.1), abs=0.08)
    assert lags[10] == pytest.approx(math.exp(-1), abs=0.2)
    assert abs(lags[60]) < 0.3
    # A new episode begins with a draw of its own, and only there.
    before = noisy._noise.clone()
    noisy.reset(torch.arange(P) == 1)
    assert bool(noisy._noise[1].isnan().all())
    keep = torch.arange(P) != 1
    assert torch.equal(noisy._noise[keep], before[keep])
    assert np.isfinite(noisy.act(obs[0]).numpy()).all()


def test_an_actor_knows_the_seeds_that_act():
    model = make_model(model_config(context="states_actions", window=3))
    seeds, others = random_seeds(P, model.config), random_seeds(P, model.config, seed=9)
    actor = Actor(model, make_normalization(), seeds)
    assert torch.equal(actor.z0, seeds)
    actor.reset(torch.arange(P) == 2, others)
    assert torch.equal(actor.z0[2], others[2])
    assert torch.equal(actor.z0[:2], seeds[:2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_noise": -0.1}, "action_noise: expected finite values of at least 0, got -0.1"),
        ({"action_noise": math.nan}, "action_noise: expected finite values of at least 0, got nan"),
        ({"action_noise": np.zeros(P + 1)}, rf"action_noise: expected a number or shape \[{P}\], got \[{P + 1}\]"),
        ({"noise_correlation": -1.0}, "noise_correlation: expected a number of at least 0, got -1.0"),
    ],
)
def test_noise_out_of_bounds_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_actor(**fields)


@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize("steps_before", [0, 5])
@pytest.mark.parametrize("noise", [0.0, 0.4, "correlated"])
def test_the_parts_of_an_actor_do_what_it_would_have_done(context, steps_before, noise):
    """In any order of theirs; rows that are at other points of their episodes included."""
    options = {"action_noise": np.linspace(0, 0.4, P), "noise_correlation": 5.0} if noise == "correlated" else {}
    whole, to_split = (make_actor(context, **{"action_noise": noise, **options}) for _ in range(2))
    z0 = to_split.z0.clone()
    for obs in observations(steps_before):
        whole.act(obs)
        to_split.act(obs)
    if steps_before:
        for actor in (whole, to_split):
            actor.reset(MASK)
            actor.act(observations(1, seed=2)[0])
    parts = to_split.split([1, P - 1])
    assert [len(part) for part in parts] == [1, P - 1]
    assert torch.equal(torch.cat([part.z0 for part in parts]), z0)
    for t, obs in enumerate(observations(9, seed=1)):
        rows = obs.split([1, P - 1])
        found = {i: parts[i].act(rows[i]) for i in ([0, 1] if t % 2 else [1, 0])}
        torch.testing.assert_close(torch.cat((found[0], found[1])), whole.act(obs), rtol=0, atol=1e-5)


def test_parts_reset_by_themselves_and_take_new_plans():
    whole = make_actor()
    parts = whole.split([1, P - 1])
    for obs in observations(3):
        for part, rows in zip(parts, obs.split([1, P - 1]), strict=True):
            part.act(rows)
    new = random_seeds(1, whole.model.config, seed=9)
    parts[0].reset(plans=new)
    assert torch.equal(parts[0].z0, new)
    fresh = Actor(whole.model, whole.normalization, new)
    obs = observations(1, seed=7)[0, :1]
    torch.testing.assert_close(parts[0].act(obs), fresh.act(obs), rtol=0, atol=1e-6)


def test_parts_share_the_threads():
    before = torch.get_num_threads()
    counts = []
    try:
        torch.set_num_threads(5)
        for part in make_actor().split([1, P - 1]):
            real = part._act
            part._act = lambda obs, real=real: (counts.append(_threads.count()), real(obs))[1]
            part.act(observations(1)[0, : len(part)])
        assert (counts, _threads.count()) == ([2, 2], 5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [[], [0, 4], [1], [4, 4], [-1, 5]])
def test_bad_sizes_of_parts(sizes):
    with pytest.raises(ValueError, match="sizes: expected positive numbers of rows, "):
        make_actor().split(sizes)


@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_plans_change_in_the_middle_of_an_episode_and_the_history_stays(context):
    changed, kept = make_actor(context), make_actor(context)
    other = random_seeds(P, changed.model.config, seed=5)
    fresh = make_actor(context, seed=5)
    for obs in observations(2):
        changed.act(obs)
        kept.act(obs)
    changed.change_plans(kept.z0)
    changed.change_plans(other, MASK)
    assert torch.equal(changed.z0[MASK], other[MASK])
    assert torch.equal(changed.z0[~MASK], kept.z0[~MASK])
    obs = observations(1, seed=1)[0]
    out, before, new = changed.act(obs), kept.act(obs), fresh.act(obs)
    assert torch.equal(out[~MASK], before[~MASK])
    assert not torch.equal(out[MASK], before[MASK])
    # Neither the plan nor the steps before are lost on it.
    assert not torch.equal(out[MASK], new[MASK])


@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_rows_that_rest_change_nothing_for_the_others_and_a_reset_wakes_them(context, noise):
    whole, resting = (make_actor(context, action_noise=noise, noise_correlation=2.0) for _ in range(2))
    for t, obs in enumerate(observations(12)):
        awake = torch.tensor([True, t < 3, True, t < 6])
        if t in (3, 6):
            resting.rest(~awake)
        if t == 8:
            for actor in (whole, resting):
                actor.change_plans(random_seeds(P, actor.model.config, seed=5))
        found, expected = resting.act(obs.masked_fill(~awake[:, None], math.nan)), whole.act(obs)
        torch.testing.assert_close(found[awake], expected[awake], rtol=0, atol=1e-5)
        assert not found[~awake].any()
    for actor in (whole, resting):
        actor.reset(~awake)
    for obs in observations(5, seed=1):
        torch.testing.assert_close(resting.act(obs), whole.act(obs), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"mask: expected bool \[4\], got torch.bool \[3\]"):
        resting.rest(np.zeros(3, bool))
