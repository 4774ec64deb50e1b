"""decode_token: tokens fed one at a time through rings equal the full banded pass; rows are independent."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error
from core_fixtures import make_batch, make_model, model_config, random_seeds

from gac_fast import ops
from gac_fast.errors import BackendError
from gac_fast.model import GAC


class Stepper:
    """Rings and plan keys of P rows around decode_token, without the Actor."""

    def __init__(self, model: GAC, z0: torch.Tensor) -> None:
        config, decoder = model.config, model.decoder
        width = config.dim // config.n_heads
        # Far from zero, so that reading a slot before it is written would show.
        self.ring_k = torch.full((config.n_layers, len(z0), decoder.window, config.n_heads, width), 1e3, dtype=z0.dtype)
        self.ring_v = self.ring_k.clone()
        keys = [layer.plan_keys(model.prior(z0)) for layer in decoder.layers]
        self.plan_k, self.plan_v = (torch.stack(x) for x in zip(*keys, strict=True))
        self.weights = decoder.weights()

    def feed(self, token, n_seen, positions, active=None):
        return ops.decode_token(
            self.weights, token, self.ring_k, self.ring_v, self.plan_k, self.plan_v, n_seen, positions, active
        )


@pytest.mark.parametrize(("window", "length"), [(1, 5), (3, 2), (3, 17), (5, 5), (20, 7)])
@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@torch.no_grad()
def test_equals_the_full_pass(context, window, length, dtype, bound):
    model = make_model(model_config(context=context, window=window), dtype=dtype)
    p, c = 3, model.decoder.tokens_per_step
    batch = make_batch([length] * p, dtype=dtype)
    z0 = random_seeds(p, model.config, dtype=dtype)
    expected = model.decoder.mean(model.trunk(batch), model.prior(z0), batch.cu_seqlens, batch.positions)
    stepper = Stepper(model, z0)
    rows = torch.arange(p) * length
    for t in range(length):
        position = torch.full((p,), t)
        if c == 2 and t > 0:
            token = model.decoder.embed_actions(batch.actions[rows + t - 1])
            stepper.feed(token, torch.full((p,), 2 * t - 1), position - 1)
        out = stepper.feed(model.decoder.embed_state(batch.observations[rows + t]), torch.full((p,), c * t), position)
        assert row_error(out, expected[rows + t]) < bound, f"step {t}"
    assert ops.dispatch_counts()["decode_step", "reference"] == (length if c == 1 else 2 * length - 1)


@torch.no_grad()
def test_rows_may_be_at_different_steps():
    model = make_model(dtype=torch.float64)
    lengths, delays = [9, 4, 7], torch.tensor([0, 5, 2])
    batch = make_batch(lengths, dtype=torch.float64)
    z0 = random_seeds(3, model.config, dtype=torch.float64)
    expected = model.decoder.mean(model.trunk(batch), model.prior(z0), batch.cu_seqlens, batch.positions)
    stepper = Stepper(model, z0)
    starts = batch.cu_seqlens[:-1].long()
    for now in range(9):
        step = now - delays
        active = step >= 0
        step = step.clamp_min(0)
        token = model.decoder.embed_state(batch.observations[starts + step])
        out = stepper.feed(token, step, step, active)
        assert row_error(out[active], expected[(starts + step)[active]]) < 1e-12


@torch.no_grad()
def test_inactive_rows_keep_their_ring():
    model = make_model()
    stepper = Stepper(model, random_seeds(4, model.config))
    zero = torch.zeros(4, dtype=torch.int64)
    stepper.feed(torch.randn(4, model.config.dim), zero, zero)
    before = stepper.ring_k.clone(), stepper.ring_v.clone()
    active = torch.tensor([True, False, True, False])
    stepper.feed(torch.randn(4, model.config.dim), zero + 1, zero + 1, active)
    for old, new in zip(before, (stepper.ring_k, stepper.ring_v), strict=True):
        assert torch.equal(new[:, ~active], old[:, ~active])
        assert bool((new[:, active, 1] != old[:, active, 1]).any(-1).all())
        assert torch.equal(new[:, active, 0], old[:, active, 0])


def test_a_backend_that_cannot_run_is_refused():
    model = make_model()
    stepper = Stepper(model, random_seeds(1, model.config))
    zero = torch.zeros(1, dtype=torch.int64)
    with ops.backend("triton"), pytest.raises(BackendError, match=r"decode_step.*triton"):
        stepper.feed(torch.randn(1, model.config.dim), zero, zero)
