"""One update: its loss written out, what moves and what must not, clipping, schedule, bfloat16."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import row_error
from model_fixtures import make_batch, make_model, model_config, random_seeds

from gac_fast import ops
from gac_fast.config import Config, PosteriorConfig, TrainConfig
from gac_fast.posterior import PosteriorState
from gac_fast.train.update import VARIANCE_WEIGHT, frozen, learning_rate, make_optimizer, update

LENGTHS = [5, 9, 4, 7]
ROWS = torch.tensor([0, 1, 2, 7])  # the last chain sees tau alone
HAS_RETURN = [True, True, True, False]


def setup(method="langevin", bf16=False, train=None, **fields):
    """Model, optimiser, posterior, batch and configuration of one update."""
    defaults = {"return_dropout": 0.0}
    config = Config(
        model=model_config(**(defaults | fields)), posterior=PosteriorConfig(method=method),
        train=TrainConfig(**{"learning_rate": 1e-2, **(train or {})}),
    )  # fmt: skip
    model = make_model(config.model)
    model.bf16 = bf16
    posterior = PosteriorState(
        config.posterior, len(LENGTHS), config.model.n_z, config.model.dim, 0, torch.device("cpu")
    )
    batch = make_batch(LENGTHS, has_return=HAS_RETURN)
    return model, make_optimizer(model, config.train), posterior, batch, config


def run(parts, rows=ROWS):
    model, optimizer, posterior, batch, config = parts
    torch.manual_seed(0)
    return update(model, optimizer, posterior, batch, rows, config)


def everything(parts) -> dict[str, torch.Tensor]:
    """All tensors an update may change, copied."""
    model, _, posterior, *_ = parts
    return {k: v.clone() for k, v in (dict(model.named_parameters()) | posterior.tensors).items()}


@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize("method", ["langevin", "variational"])
def test_every_parameter_and_the_batches_chains_move(method, context):
    dropout = 0.5 if context == "states_actions" else 0.0
    parts = setup(
        method, context=context, action_token_dropout=dropout, return_ensemble=2, return_context="first_state"
    )
    model, _, posterior, batch, _ = parts
    if dropout:
        parts = (*parts[:3], batch._replace(dropped=torch.arange(25) % 2 == 0), parts[4])
    before = everything(parts)
    values = run(parts)
    assert all(math.isfinite(float(value)) and value.ndim == 0 and not value.requires_grad for value in values.values())
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
        assert bool(torch.isfinite(p).all()), name
    moved = (posterior.tensors["z0"] != before["z0"]).flatten(1).any(1)
    assert moved.nonzero().flatten().tolist() == ROWS.tolist()


@pytest.mark.usefixtures("cpp_engine")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_bits_do_not_depend_on_the_threads(bf16):
    found = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        try:
            parts = setup(bf16=bf16, context="states_actions")
            run(parts)
            assert torch.get_num_threads() == n_threads
        finally:
            torch.set_num_threads(1)
        found.append(everything(parts))
    assert ("block", "cpp") in ops.dispatch_counts()
    for other in found[1:]:
        assert all(torch.equal(other[name], x) for name, x in found[0].items())


@pytest.mark.parametrize("return_ensemble", [1, 3])
def test_the_loss_is_the_written_one(return_ensemble):
    parts = setup(return_ensemble=return_ensemble, train={"grad_clip": 1e9, "return_weight": 0.4})
    model, _, posterior, batch, _ = parts
    old = copy.deepcopy(model)
    values = run(parts)
    z = old.prior(posterior.tensors["z0"][ROWS])
    errors = old.action_errors(batch, z)
    means, _ = old.predict_return(z, None)
    _, log_variances = old.predict_return(z.detach(), None)
    seen = batch.returns[:3] - means[:, :3]
    honest = batch.returns[3] - means[:, 3].detach()
    return_nll = (0.5 * (honest.square() / log_variances[:, 3].exp() + log_variances[:, 3])).mean()
    sigma = old.decoder.log_sigma_a.exp()
    action_nll = (0.5 * errors.detach() / sigma**2 + sigma.log() + 0.5 * math.log(2 * math.pi)).sum(-1).mean()
    loss = errors.mean() + 0.4 * seen.square().mean() + VARIANCE_WEIGHT * (action_nll + return_nll)
    assert float(values["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(values["action_error"]) == pytest.approx(float(errors.detach().mean()), rel=1e-5)
    assert float(values["return_error"]) == pytest.approx(float(seen.detach().square().mean()), rel=1e-5)
    assert float(values["nll_per_step"]) == pytest.approx(float(action_nll.detach()), rel=1e-5)
    # So are its gradients: the fit of the variances shapes neither the means nor the plans.
    loss.backward()
    for (name, new), p in zip(model.named_parameters(), old.parameters(), strict=True):
        assert torch.allclose(new.grad, p.grad, rtol=1e-3, atol=1e-6), name
    expected = VARIANCE_WEIGHT * (1 - errors.detach().mean(0) / sigma.detach() ** 2)
    assert torch.allclose(model.decoder.log_sigma_a.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_chain_given_tau_alone_never_sees_the_return():
    one, two = setup(), setup()
    two = (*two[:3], two[3]._replace(returns=two[3].returns + torch.tensor([0.0, 0.0, 0.0, 5.0])), two[4])
    a, b = run(one), run(two)
    for name in one[2].tensors:
        assert torch.equal(one[2].tensors[name], two[2].tensors[name]), name
    # Nor does the fit of the mean; only the variance is fitted to it.
    assert float(a["return_error"]) == float(b["return_error"])
    assert not torch.equal(one[0].returns.w3, two[0].returns.w3)


def test_a_chain_given_the_return_sees_it():
    one, two = setup(), setup()
    two = (*two[:3], two[3]._replace(returns=two[3].returns + torch.tensor([5.0, 0.0, 0.0, 0.0])), two[4])
    run(one), run(two)
    same = (one[2].tensors["z0"] == two[2].tensors["z0"]).flatten(1).all(1)
    assert (~same).nonzero().flatten().tolist() == [0]


def test_an_unknown_return_touches_nothing():
    """Episodes that were cut carry a label that is never read."""
    one, two = setup(), setup()
    hidden = one[3]._replace(has_label=torch.tensor([True, True, True, False]))
    one = (*one[:3], hidden, one[4])
    two = (*two[:3], hidden._replace(returns=hidden.returns + torch.tensor([0.0, 0.0, 0.0, 1e3])), two[4])
    run(one), run(two)
    other = everything(two)
    for name, value in everything(one).items():
        assert torch.equal(value, other[name]), name


def test_a_batch_without_any_return_still_learns_actions():
    parts = setup()
    batch = parts[3]._replace(has_return=torch.zeros(4, dtype=torch.bool), has_label=torch.zeros(4, dtype=torch.bool))
    values = run((*parts[:3], batch, parts[4]), ROWS % 4 + 4)
    assert float(values["return_error"]) == 0.0
    assert all(math.isfinite(float(value)) for value in values.values())
    assert not bool(parts[0].returns.w1.grad.any())
    assert bool(parts[0].decoder.head.weight.grad.any())


def test_gradients_are_clipped():
    parts = setup(train={"grad_clip": 0.01})
    values = run(parts)
    norm = torch.cat([p.grad.flatten() for p in parts[0].parameters() if p.grad is not None]).norm()
    assert float(values["grad_norm"]) > 0.05
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_the_loss_falls():
    parts = setup()
    first = float(run(parts)["loss"])
    for _ in range(60):
        last = float(run(parts)["loss"])
    assert last < 0.7 * first


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(learning_rate=2.0, warmup=4, n_updates=24, final_lr_ratio=0.1)
    assert [learning_rate(step, config) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert learning_rate(4, config) == pytest.approx(2.0)
    assert learning_rate(14, config) == pytest.approx(2.0 * 0.55)
    assert learning_rate(24, config) == pytest.approx(0.2)
    assert learning_rate(1000, config) == pytest.approx(0.2)
    assert learning_rate(0, TrainConfig(learning_rate=2.0, warmup=0)) == 2.0


def test_vectors_do_not_decay():
    model = make_model()
    decayed, plain = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_frozen_restores_what_it_found():
    model = make_model()
    model.decoder.head.weight.requires_grad_(False)
    inside = []

    def fail() -> None:
        inside.extend(p.requires_grad for p in model.parameters())
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), frozen(model):
        fail()
    assert not any(inside)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {"decoder.head.weight"}


@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_bfloat16_autocast_agrees_loosely(context):
    exact, rounded = setup(context=context), setup(bf16=True, context=context)
    batch = exact[3]
    z = exact[0].prior(random_seeds(4, exact[0].config))
    with torch.no_grad():
        means = [model.mean_actions(batch, z) for model in (exact[0], rounded[0])]
    assert means[1].dtype == torch.float32
    assert not torch.equal(*means)
    # Relative to all rows together: a row near zero keeps the absolute error of its layers, not a relative one.
    assert row_error(means[1].view(1, -1), means[0].view(1, -1)) < 2e-2
    assert float((means[1] - means[0]).abs().max()) < 2e-2
    a, b = run(exact), run(rounded)
    assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=2e-2)
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in rounded[0].parameters())
    assert rounded[2].tensors["z0"].dtype == torch.float32
