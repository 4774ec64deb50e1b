"""The Actor: resets, plans, units, kinds of arrays, noise, errors. (That it equals the full pass: test_model.py.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_fixtures import ACT_DIM, OBS_DIM, make_model, make_normalization, model_config, random_seeds

from gac_fast.act import Actor
from gac_fast.plan import Plans

P = 4
MASK = torch.tensor([True, False, True, False])


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


def test_the_actor_reads_the_models_present_weights():
    actor = make_actor()
    before = actor.act(observations(1)[0])
    with torch.no_grad():
        actor.model.decoder.head.weight.mul_(-1)
    actor.reset()
    assert not torch.equal(actor.act(observations(1)[0]), before)


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
