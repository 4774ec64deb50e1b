"""The joint model: every path gives one likelihood, influence reaches exactly as far as it should, gradients hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import row_error
from core_fixtures import (
    make_batch,
    make_model,
    make_normalization,
    make_trajectories,
    model_config,
    random_seeds,
    single,
)

from gac_fast.act import Actor
from gac_fast.model import GAC
from gac_fast.model.gac import PAIR_CHUNK
from gac_fast.model.normalization import Normalization

CONTEXTS = ["states", "states_actions"]


def mean_actions(model: GAC, batch, z0):
    return model.decoder.mean(model.trunk(batch), model.prior(z0), batch.cu_seqlens, batch.positions)


# ---------------------------------------------------------------------------------------------------------------------
# Packed = each trajectory alone = ring-cached


@pytest.mark.parametrize("window", [1, 4, 7, 50])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@torch.no_grad()
def test_packing_changes_nothing(context, window, dtype, bound):
    model = make_model(model_config(context=context, window=window), dtype=dtype)
    lengths = [1, 23, 7, 2, 31]
    batch = make_batch(lengths, dtype=dtype)
    z0 = random_seeds(len(lengths), model.config, dtype=dtype)
    packed = mean_actions(model, batch, z0)
    for i in range(len(lengths)):
        alone = mean_actions(model, single(batch, i), z0[i : i + 1])
        rows = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
        assert row_error(packed[rows], alone) < bound, f"trajectory {i}"


def padded_mean_actions(model: GAC, batch, z0):
    """The decoder on trajectories padded to [B, T], with its weights alone: dense masks, rotary by complex numbers."""
    decoder, c, heads = model.decoder, model.decoder.tokens_per_step, model.config.n_heads
    lengths = batch.cu_seqlens.diff().tolist()

    def pad(x):
        # Padding that would show.
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True, padding_value=50.0)

    x = decoder.embed_state(pad(batch.observations))
    if c == 2:
        x = torch.stack((x, decoder.embed_action(pad(batch.actions))), dim=2).flatten(1, 2)
    b, t, dim = x.shape
    width = dim // heads
    i, j = torch.arange(t)[:, None], torch.arange(t)[None, :]
    real = torch.arange(t)[None, :] < c * torch.tensor(lengths)[:, None]
    visible = ((j <= i) & (i - j < c * model.config.window))[None] & real[:, None, :]
    # Tokens of padding look at themselves, as a softmax over nothing is NaN.
    visible = (visible | torch.eye(t, dtype=torch.bool))[:, None]
    frequency = model.config.rope_base ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.exp(1j * (torch.arange(t) // c).double()[:, None] * frequency)[None, :, None]

    def rotate(x):
        turned = torch.complex(*x.double().chunk(2, dim=-1)) * turn
        return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)

    def attend(q, k, v, mask=None):
        score = torch.einsum("bihd,bjhd->bhij", q, k) / width**0.5
        if mask is not None:
            score = score.masked_fill(~mask, -torch.inf)
        return torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v).flatten(2)

    z = model.prior(z0)
    for layer in decoder.layers:
        q, k, v = layer.qkv(layer.norm1(x)).view(b, t, 3, heads, width).unbind(2)
        x = x + layer.out(attend(rotate(q), rotate(k), v, visible))
        q = layer.plan_q(layer.norm2(x)).view(b, t, heads, width)
        k, v = layer.plan_kv(z + layer.plan_position).view(b, -1, 2, heads, width).unbind(2)
        x = x + layer.plan_out(attend(q, k, v))
        x = x + layer.mlp_out(torch.nn.functional.silu(layer.mlp_in(layer.norm3(x))))
    mean = decoder.head(decoder.norm(x[:, ::c])).tanh()
    return torch.cat([mean[row, :length] for row, length in enumerate(lengths)])


@pytest.mark.parametrize("window", [1, 4, 50])
@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_packed_equals_padded(context, window):
    model = make_model(model_config(context=context, window=window))
    lengths = [1, 23, 7, 2, 31]
    batch = make_batch(lengths)
    z0 = random_seeds(len(lengths), model.config)
    expected = padded_mean_actions(model, batch, z0)
    assert expected.shape == (sum(lengths), 2)
    # Two engines in float32: a mean action near zero keeps the absolute error of its layers.
    assert row_error(mean_actions(model, batch, z0), expected) < 5e-5


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
@torch.no_grad()
def test_the_actor_repeats_the_full_pass(context, dtype, bound):
    """An actor's own rollout, read again as one trajectory, has the mean actions it acted by."""
    model = make_model(model_config(context=context, window=4), dtype=dtype)
    units = make_normalization(dtype=dtype)
    z0 = random_seeds(3, model.config, dtype=dtype)
    actor = Actor(model, units, z0)
    batch = make_batch([19] * 3, dtype=dtype)
    observations = batch.observations.view(3, 19, -1)
    acted = [units.actions(actor.act(observations[:, t] * units.obs_std + units.obs_mean)) for t in range(19)]
    actions = torch.stack(acted, dim=1).flatten(0, 1)
    assert row_error(actions, mean_actions(model, batch._replace(actions=actions), z0)) < bound


# ---------------------------------------------------------------------------------------------------------------------
# Influence


def influence(model, batch, z0, step, dim=0):
    """Gradients of one mean action w.r.t. observations, actions and z0: which rows they reach."""
    leaves = [x.clone().requires_grad_() for x in (batch.observations, batch.actions, z0)]
    out = mean_actions(model, batch._replace(observations=leaves[0], actions=leaves[1]), leaves[2])
    grads = torch.autograd.grad(out[step, dim], leaves, allow_unused=True)
    return [
        [] if g is None else g.flatten(1).abs().sum(1).nonzero().flatten().tolist() for g in grads
    ]  # fmt: skip


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_states_alone_reach_exactly_l_times_k_minus_1_steps_back(n_layers, window):
    model = make_model(model_config(n_layers=n_layers, window=window), dtype=torch.float64)
    batch = make_batch([5, 16, 4], dtype=torch.float64)
    z0 = random_seeds(3, model.config, dtype=torch.float64)
    start, t = 5, 12
    states, actions, seeds = influence(model, batch, z0, start + t)
    reach = n_layers * (window - 1)
    assert states == list(range(start + t - reach, start + t + 1))
    assert actions == []
    assert seeds == [1]


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_with_actions_each_layer_reaches_2k_minus_1_tokens_back(n_layers, window):
    model = make_model(model_config(n_layers=n_layers, window=window, context="states_actions"), dtype=torch.float64)
    batch = make_batch([5, 16, 4], dtype=torch.float64)
    z0 = random_seeds(3, model.config, dtype=torch.float64)
    start, t = 5, 13
    states, actions, seeds = influence(model, batch, z0, start + t)
    # Tokens: s_t is 2t, a_t is 2t + 1. One layer of 2K tokens thus reads one older action, a_{t-K}; the next reads on
    # from that one, an odd distance at every layer.
    first = 2 * t - n_layers * (2 * window - 1)
    assert states == [start + i for i in range(t + 1) if 2 * i >= first]
    assert actions == [start + i for i in range(t) if 2 * i + 1 >= first]
    assert seeds == [1]
    if n_layers == 1:
        assert (states[0], actions[0]) == (start + t - window + 1, start + t - window)


@pytest.mark.parametrize("context", CONTEXTS)
def test_nothing_crosses_into_another_episode_or_back_from_the_future(context):
    model = make_model(model_config(context=context, window=20), dtype=torch.float64)
    batch = make_batch([5, 6, 4], dtype=torch.float64)
    z0 = random_seeds(3, model.config, dtype=torch.float64)
    for episode, (start, stop) in enumerate([(0, 5), (5, 11), (11, 15)]):
        for step in (start, start + 2, stop - 1):
            states, actions, seeds = influence(model, batch, z0, step)
            assert states == list(range(start, step + 1))
            assert actions == ([] if context == "states" else list(range(start, step)))
            assert seeds == [episode]


def test_every_plan_vector_has_influence():
    model = make_model(model_config(n_z=3), dtype=torch.float64)
    batch = make_batch([4, 4], dtype=torch.float64)
    z0 = random_seeds(2, model.config, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(mean_actions(model, batch, z0)[1, 0], z0)
    assert bool((grad[0].abs().sum(-1) > 1e-6).all())


@torch.no_grad()
def test_dropped_actions_are_not_read():
    model = make_model(model_config(context="states_actions"), dtype=torch.float64)
    batch = make_batch([8], dtype=torch.float64)
    z0 = random_seeds(1, model.config, dtype=torch.float64)
    dropped = torch.zeros(8, dtype=torch.bool)
    dropped[3] = True
    other = batch.actions.clone()
    other[3] = -other[3]
    masked = mean_actions(model, batch._replace(dropped=dropped), z0)
    assert torch.equal(masked, mean_actions(model, batch._replace(dropped=dropped, actions=other), z0))
    assert row_error(masked, mean_actions(model, batch, z0)) > 1e-4
    assert row_error(mean_actions(model, batch._replace(actions=other), z0), mean_actions(model, batch, z0)) > 1e-4
    # The loss is asked of a step whose action token was dropped all the same.
    assert model.action_errors(batch._replace(dropped=dropped), model.prior(z0)).shape == (8, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The likelihood


@pytest.mark.parametrize("context", CONTEXTS)
def test_gradcheck_of_errors_and_energy_in_z0(context):
    model = make_model(model_config(context=context, dim=8, n_heads=1, window=2), act_dim=1, dtype=torch.float64)
    batch = make_batch([2, 3], act_dim=1, dtype=torch.float64)
    z0 = random_seeds(2, model.config, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z0: model.action_errors(batch, model.prior(z0)), z0, fast_mode=True)
    assert torch.autograd.gradcheck(lambda z0: model.energy(z0, batch, 0.5, 0.3), z0)


@pytest.mark.parametrize("context", CONTEXTS)
def test_gradcheck_in_every_parameter(context):
    config = model_config(
        context=context, dim=8, n_heads=1, n_layers=1, mlp_ratio=1, prior_hidden=3, return_hidden=3,
        return_ensemble=2, return_context="first_state",
    )  # fmt: skip
    model = make_model(config, dtype=torch.float64)
    batch = make_batch([3, 4], dtype=torch.float64)
    z0 = random_seeds(2, model.config, dtype=torch.float64)
    names, leaves = zip(*model.named_parameters(), strict=True)

    def f(*values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(_Energy(model), {f"model.{k}": v for k, v in parameters.items()}, (z0, batch))

    # The joint gradient along random directions: all parameters, far fewer evaluations than one each.
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    grads = torch.autograd.grad(f(*leaves).sum(), leaves, allow_unused=True)
    unused = {name for name, g in zip(names, grads, strict=True) if g is None or not bool(g.any())}
    # Neither the fitted variances nor the token of left-out actions is part of the energy.
    assert unused <= {"decoder.log_sigma_a", "decoder.dropped_action"}


class _Energy(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, z0, batch):
        return self.model.energy(z0, batch, 0.5, 0.3)


def test_the_energy_is_the_written_sum_of_the_losses_errors():
    model = make_model(model_config(return_ensemble=3, return_context="first_state"), dtype=torch.float64)
    batch = make_batch([4, 6, 5], dtype=torch.float64, has_return=[True, False, True])
    z0 = random_seeds(3, model.config, dtype=torch.float64)
    z = model.prior(z0)
    errors = model.action_errors(batch, z)
    means, _ = model.predict_return(z, batch.observations[[0, 4, 10]])
    energy = model.energy(z0, batch, 0.2, 0.7).detach()
    for i, (start, stop) in enumerate(itertools.pairwise([0, 4, 10, 15])):
        expected = 0.5 * float(z0[i].detach().square().sum()) + float(errors[start:stop].detach().sum()) / 0.4
        if i != 1:
            expected += float((batch.returns[i] - means[:, i]).detach().square().mean()) / 1.4
        assert float(energy[i]) == pytest.approx(expected, rel=1e-12)


@torch.no_grad()
def test_hidden_returns_are_not_read():
    model = make_model()
    batch = make_batch([4, 6], has_return=[True, False])
    z0 = random_seeds(2, model.config)
    energy = model.energy(z0, batch, 0.5, 0.5)
    other = model.energy(z0, batch._replace(returns=batch.returns + 3), 0.5, 0.5)
    assert float(energy[0]) != float(other[0])
    assert float(energy[1]) == float(other[1])


def test_the_action_log_likelihood_is_the_normal_density():
    model = make_model(dtype=torch.float64)
    batch = make_batch([4, 6], dtype=torch.float64)
    z0 = random_seeds(2, model.config, dtype=torch.float64)
    with torch.no_grad():
        model.decoder.log_sigma_a.copy_(torch.tensor([-0.3, 0.4]))
        mean = mean_actions(model, batch, z0)
        found = model.action_log_likelihood(model.action_errors(batch, model.prior(z0)))
    expected = torch.distributions.Normal(mean, model.decoder.log_sigma_a.exp()).log_prob(batch.actions).sum(-1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_dropout_is_off_in_the_energy_and_on_where_asked():
    model = make_model(model_config(return_dropout=0.5)).train()
    batch = make_batch([4, 6])
    z0 = random_seeds(2, model.config)
    assert torch.equal(model.energy(z0, batch, 0.5, 0.5), model.energy(z0, batch, 0.5, 0.5))
    z = model.prior(z0)
    first, second = (model.predict_return(z, None, dropout=True)[0] for _ in range(2))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_the_first_state_matters_where_the_return_model_takes_it():
    z0 = random_seeds(2, model_config())
    states = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    knowing = make_model(model_config(return_context="first_state"))
    assert not torch.equal(knowing.return_moments(z0, states)[0], knowing.return_moments(z0, -states)[0])
    plain = make_model()
    assert torch.equal(plain.return_moments(z0, states)[0], plain.return_moments(z0, None)[0])
    with pytest.raises(ValueError, match=r"first_state: expected \[P, obs_dim\] since return_context is 'first_state'"):
        knowing.return_moments(z0, None)


@torch.no_grad()
def test_moments_of_pairs_are_those_of_each_pair():
    model = make_model(model_config(return_context="first_state", return_ensemble=3))
    z = model.prior(random_seeds(3, model.config))
    states = torch.randn(2 * PAIR_CHUNK + 1, 3, generator=torch.Generator().manual_seed(0))
    mean, std = model.return_moments_of_pairs(z, states)
    assert mean.shape == std.shape == (len(states), 3)
    for i in (0, PAIR_CHUNK, len(states) - 1):
        alone = model.return_moments(z, states[i].expand(3, -1))
        assert torch.allclose(torch.stack((mean[i], std[i])), torch.stack(alone), rtol=0, atol=1e-5)


@torch.no_grad()
def test_members_of_an_ensemble_differ_and_their_spread_counts():
    model = make_model(model_config(return_ensemble=4))
    z = model.prior(random_seeds(3, model.config))
    means, log_variances = model.predict_return(z, None)
    assert means.shape == log_variances.shape == (4, 3)
    assert float(means.std(0).min()) > 1e-3
    _, std = model.return_moments(z, None)
    assert bool((std.square() > log_variances.exp().mean(0)).all())


def test_shapes_that_would_broadcast_are_refused():
    model = make_model(act_dim=1)
    batch = make_batch([4, 6], act_dim=1)
    z0 = random_seeds(2, model.config)
    with pytest.raises(ValueError, match=r"returns: expected shape \[2\], got \[2, 1\]"):
        model.energy(z0, batch._replace(returns=batch.returns[:, None]), 0.5, 0.5)
    with pytest.raises(ValueError, match=r"actions: expected shape \[10, 1\], got \[10\]"):
        model.action_errors(batch._replace(actions=batch.actions[:, 0]), model.prior(z0))


# ---------------------------------------------------------------------------------------------------------------------
# Plans that tell the return without moving the actions


@torch.no_grad()
def test_directions_that_leave_the_actions_leave_the_predicted_return():
    model = make_model(model_config(prior="identity"), dtype=torch.float64)
    batch = make_batch([6] * 3, dtype=torch.float64)
    z0 = random_seeds(3, model.config, dtype=torch.float64)

    def moved(other):
        actions = row_error(mean_actions(model, batch, other), mean_actions(model, batch, z0))
        returns = model.predict_return(model.prior(other), None)[0] - model.predict_return(model.prior(z0), None)[0]
        return actions, float(returns.abs().max())

    # The decoder and the return model read norm(z0): the length of each plan vector is such a direction. (Up to the
    # norm's epsilon of 1e-5.)
    longer = z0 * torch.tensor([3.0, 0.7], dtype=z0.dtype)[:, None]
    assert max(moved(longer)) < 1e-4
    assert min(moved(z0.flip(-1))) > 1e-2


def test_null_directions_of_the_mlp_prior_move_neither_actions_nor_return():
    """z = norm(U(z0)) has rank n_z (D - 1) at most: some directions of z0 are lost, through a U that is no identity."""
    model = make_model(model_config(prior="mlp"), dtype=torch.float64)
    batch = make_batch([6], dtype=torch.float64)
    z0 = random_seeds(1, model.config, dtype=torch.float64)
    with torch.no_grad():
        # A U far from the identity, so that the null directions are not the plan vectors themselves.
        model.prior.out.weight.mul_(10)
    jacobian = torch.autograd.functional.jacobian(lambda flat: model.prior(flat.view_as(z0)).flatten(), z0.flatten())
    _, size, directions = torch.linalg.svd(jacobian)
    n_z, dim = model.config.n_z, model.config.dim
    # The epsilon of the norm is all that is left of the lost ones.
    assert float(size[-n_z]) < 1e-4 * float(size[0])
    assert float(size[-n_z - 1]) > 1e-2 * float(size[0])

    @torch.no_grad()
    def moved(direction):
        """Sizes of the central differences of actions and return."""
        step = 1e-4 * direction.view(1, n_z, dim)
        ends = [
            (mean_actions(model, batch, other), model.predict_return(model.prior(other), None)[0])
            for other in (z0 + step, z0 - step)
        ]
        return [float((plus - minus).norm()) / 2e-4 for plus, minus in zip(*ends, strict=True)]

    random = torch.randn(n_z * dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_random = moved(random / random.norm())
    assert min(by_random) > 1e-3
    # The lengths of the plan vectors of z0 are not the lost directions, as with the identity.
    assert min(moved(z0 / z0.norm())) > 1e-2 * min(by_random)
    for null in directions[-n_z:]:
        assert all(lost < 1e-4 * change for lost, change in zip(moved(null), by_random, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Units


def test_normalization_round_trips_and_ignores_cut_returns():
    data = make_trajectories([5, 6, 7, 8], complete=[True, True, False, True])
    units = Normalization.fit(data)
    x = units.observations(torch.from_numpy(data.observations))
    assert torch.allclose(x.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.ones(3), atol=1e-5)
    actions = torch.from_numpy(data.actions)
    assert torch.equal(units.actions(torch.tensor([-2.0, 2.0])), torch.tensor([-1.0, 1.0]))
    assert torch.allclose(units.to_environment(units.actions(actions)), actions, atol=1e-6)
    complete = data.returns[[0, 1, 3]]
    assert float(units.return_mean) == pytest.approx(complete.mean(), rel=1e-6)
    assert float(units.return_std) == pytest.approx(complete.std(), rel=1e-6)


def test_constant_dimensions_are_centred_and_left_unscaled():
    data = make_trajectories([5, 6])
    data.observations[:, 1] = 4.0
    data.returns[:] = 2.0
    units = Normalization.fit(data)
    assert (float(units.obs_std[1]), float(units.return_std)) == (1.0, 1.0)
    assert bool((units.observations(torch.from_numpy(data.observations))[:, 1] == 0).all())


def test_the_model_starts_tame():
    """Prior plans of a new model give actions off the walls of tanh, and returns within the data's range."""
    torch.manual_seed(0)
    model = GAC(model_config(dim=64, n_layers=3), 3, 2)
    batch = make_batch([20] * 8)
    with torch.no_grad():
        z0 = random_seeds(8, model.config)
        assert float(mean_actions(model, batch, z0).abs().mean()) < 0.9
        assert float(model.return_moments(model.prior(z0), None)[0].abs().max()) < 2.0
        assert math.isfinite(float(model.energy(z0, batch, 0.5, 0.5).sum()))


@pytest.mark.parametrize("return_context", ["none", "first_state"])
def test_the_return_model_says_the_same_in_other_units(return_context):
    model = make_model(model_config(return_context=return_context, return_ensemble=2))
    z = random_seeds(5, model.config)
    first = torch.randn(5, model.obs_dim) if return_context == "first_state" else None
    mean, std = model.return_moments(z, first)
    model.returns.change_units(0.25, -1.5)
    changed_mean, changed_std = model.return_moments(z, first)
    torch.testing.assert_close(changed_mean, 0.25 * mean - 1.5)
    torch.testing.assert_close(changed_std, 0.25 * std)
