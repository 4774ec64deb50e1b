"""decode_step: steps through rings equal the full banded pass; rows are independent; the C++ engine equals both."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import row_error
from core_fixtures import ACT_DIM, OBS_DIM, make_batch, make_model, make_normalization, model_config, random_seeds

from gac_fast import ops, reference
from gac_fast.errors import BackendError
from gac_fast.model import GAC
from gac_fast.ops import DecodeState, Units
from gac_fast.reference import StepWeights

CONTEXTS = ["states", "states_actions"]
# (rings and products in bfloat16, largest row error against float64)
PRECISIONS = [pytest.param(False, 1e-5, id="float32"), pytest.param(True, 2e-2, id="bf16")]


def make_state(model: GAC, z0: torch.Tensor, *, bf16: bool = False) -> DecodeState:
    """A state whose rings begin far from zero, so that reading a slot before it is written would show."""
    config, decoder = model.config, model.decoder
    state = DecodeState(
        n_layers=config.n_layers, n_rows=len(z0), window=decoder.window, n_heads=config.n_heads,
        width=config.dim // config.n_heads, n_z=config.n_z, act_dim=model.act_dim, dtype=z0.dtype, bf16=bf16,
    )  # fmt: skip
    with torch.no_grad():
        keys = [layer.plan_keys(model.prior(z0)) for layer in decoder.layers]
        for i, (k, v) in enumerate(keys):
            state.plan_k[i], state.plan_v[i] = k, v
    state.ring_k.fill_(torch.nan)
    state.ring_v.fill_(torch.nan)
    state.reset(torch.ones(len(z0), dtype=torch.bool))
    return state


@torch.no_grad()
def run_episode(model, state, batch, p, *, units=None) -> torch.Tensor:
    """Acts on a batch's states after its own actions, [P * length, act_dim]."""
    weights, length = model.decoder.step_weights(), len(batch.observations) // p
    rows = torch.arange(p) * length
    out = []
    for t in range(length):
        if t > 0:
            state.last_action.copy_(batch.actions[rows + t - 1])
        out.append(ops.decode_step(weights, state, batch.observations[rows + t], units))
    return torch.stack(out, dim=1).flatten(0, 1)


@torch.no_grad()
def full_pass(model, batch, z0) -> torch.Tensor:
    return model.decoder.mean(model.trunk(batch), model.prior(z0), batch.cu_seqlens, batch.positions)


# ---------------------------------------------------------------------------------------------------------------------
# Reference


@pytest.mark.parametrize(("window", "length"), [(1, 5), (3, 2), (3, 17), (5, 5), (20, 7)])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_reference_equals_the_full_pass(context, window, length, dtype, bound):
    model = make_model(model_config(context=context, window=window), dtype=dtype)
    batch, z0 = make_batch([length] * 3, dtype=dtype), random_seeds(3, model.config, dtype=dtype)
    with ops.backend("reference"):
        out = run_episode(model, make_state(model, z0), batch, 3)
    assert row_error(out, full_pass(model, batch, z0)) < bound
    assert ops.dispatch_counts()["decode_step", "reference"] == length


@torch.no_grad()
def test_inactive_rows_keep_their_ring():
    model = make_model()
    state = make_state(model, random_seeds(4, model.config))
    state.clear_stale(1)
    rings = state.ring_k, state.ring_v
    zero = torch.zeros(4, dtype=torch.int64)
    weights = model.decoder.weights()
    feed = (weights, torch.randn(4, model.config.dim), *rings, state.plan_k, state.plan_v)
    reference.decode_token(*feed, zero, zero)
    before = [ring.clone() for ring in rings]
    active = torch.tensor([True, False, True, False])
    reference.decode_token(*feed, zero + 1, zero + 1, active)
    for old, new in zip(before, rings, strict=True):
        assert torch.equal(new[:, ~active], old[:, ~active])
        assert bool((new[:, active, 1] != old[:, active, 1]).any(-1).all())
        assert torch.equal(new[:, active, 0], old[:, active, 0])


def test_float64_takes_the_reference(cpp_engine):
    model = make_model(dtype=torch.float64)
    state = make_state(model, random_seeds(2, model.config, dtype=torch.float64), bf16=True)
    assert not state.bf16
    ops.decode_step(model.decoder.step_weights(), state, torch.zeros(2, OBS_DIM, dtype=torch.float64))
    assert ops.dispatch_counts() == {("decode_step", "reference"): 1}


def test_a_backend_that_cannot_run_is_refused():
    model = make_model()
    state = make_state(model, random_seeds(1, model.config))
    with ops.backend("triton"), pytest.raises(BackendError, match=r"decode_step.*triton"):
        ops.decode_step(model.decoder.step_weights(), state, torch.zeros(1, OBS_DIM))


# ---------------------------------------------------------------------------------------------------------------------
# The C++ engine


def check_against_float64(config, *, p, length, bf16, bound, obs_dim=OBS_DIM, act_dim=ACT_DIM) -> None:
    model = make_model(config, obs_dim=obs_dim, act_dim=act_dim)
    batch = make_batch([length] * p, obs_dim=obs_dim, act_dim=act_dim)
    z0 = random_seeds(p, config)
    with ops.backend("cpp"):
        out = run_episode(model, make_state(model, z0, bf16=bf16), batch, p)
    assert ops.dispatch_counts()["decode_step", "cpp"] == length
    exact = make_model(config, obs_dim=obs_dim, act_dim=act_dim, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    wide = batch._replace(observations=batch.observations.double(), actions=batch.actions.double())
    expected = full_pass(exact, wide, z0.double())
    # Rows of whole episodes: a single action near zero has no scale of its own.
    assert row_error(out.view(p, -1), expected.view(p, -1)) < bound


@pytest.mark.parametrize(("bf16", "bound"), PRECISIONS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("p", "window", "length", "fields"),
    [
        (1, 1, 4, {}),
        (3, 3, 11, {"dim": 64, "n_heads": 4, "n_z": 1}),
        (17, 5, 7, {"dim": 96, "n_heads": 4, "n_z": 7}),
        (3, 20, 26, {"dim": 128, "n_heads": 4, "n_z": 4, "mlp_ratio": 4}),
        (2, 40, 9, {"dim": 24, "n_heads": 2, "n_z": 3, "mlp_ratio": 1}),
    ],
)
def test_engine_equals_float64_on_every_path(isa, p, window, length, fields, context, bf16, bound):
    check_against_float64(
        model_config(context=context, window=window, **fields), p=p, length=length, bf16=bf16, bound=bound
    )


@pytest.mark.parametrize(("bf16", "bound"), PRECISIONS)
@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_engine_equals_float64_at_every_width(cpp_engine, dim, heads, bf16, bound):
    config = model_config(context="states_actions", window=6, dim=dim, n_heads=heads, n_z=4)
    check_against_float64(config, p=3, length=9, bf16=bf16, bound=bound, obs_dim=17, act_dim=6)


@pytest.mark.parametrize(("obs_dim", "act_dim"), [(1, 1), (40, 33), (348, 17)])
def test_any_number_of_observations_and_actions(isa, obs_dim, act_dim):
    config = model_config(context="states_actions", n_layers=1)
    check_against_float64(config, p=2, length=5, bf16=False, bound=1e-5, obs_dim=obs_dim, act_dim=act_dim)


@pytest.mark.parametrize("start", [255, 65_533, 3_000_000])
def test_positions_far_into_an_episode(cpp_engine, start):
    """Angles are exact where a float32 product would be off by 0.1."""
    model = make_model(model_config(context="states_actions", window=4))
    z0 = random_seeds(2, model.config)
    states = {name: make_state(model, z0) for name in ("reference", "cpp")}
    obs = torch.randn(6, 2, OBS_DIM)
    for state in states.values():
        state.ring_k.normal_(generator=torch.Generator().manual_seed(0))
        state.ring_v.normal_(generator=torch.Generator().manual_seed(1))
        state.steps.fill_(start)
    for x in obs:
        out = {}
        for name, state in states.items():
            with ops.backend(name), torch.no_grad():
                out[name] = ops.decode_step(model.decoder.step_weights(), state, x)
        assert row_error(out["cpp"], out["reference"]) < 1e-5
    assert torch.equal(states["cpp"].steps, torch.full((2,), start + 6))


@pytest.mark.parametrize("engine", ["reference", "cpp"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_rows_may_be_at_different_steps(request, engine, context):
    """Rows that start anew at different times, over rings full of NaN."""
    if engine == "cpp":
        request.getfixturevalue("cpp_engine")
    model = make_model(model_config(context=context, window=3))
    p, length = 5, 12
    batch, z0 = make_batch([length] * p), random_seeds(p, model.config)
    expected = full_pass(model, batch, z0).view(p, length, -1)
    obs, actions = batch.observations.view(p, length, -1), batch.actions.view(p, length, -1)
    state, weights = make_state(model, z0), model.decoder.step_weights()
    rows, age = torch.arange(p), torch.zeros(p, dtype=torch.int64)
    with ops.backend(engine), torch.no_grad():
        for now in range(length):
            restart = torch.tensor([now > 0 and now % (i + 2) == 0 for i in range(p)])
            if now == 5:
                # What an overflow leaves.
                state.ring_k[:, restart], state.ring_v[:, restart] = torch.nan, torch.inf
            state.reset(restart)
            age[restart] = 0
            assert torch.equal(state.steps, age)
            first = age == 0
            assert bool((state.last_action[first] == 0).all())
            state.last_action.copy_(torch.where(first[:, None], 0, actions[rows, age - 1]))
            out = ops.decode_step(weights, state, obs[rows, age])
            assert row_error(out, expected[rows, age]) < 1e-5, f"step {now}"
            assert torch.equal(state.last_action, out)
            age += 1
    assert len(set(age.tolist())) > 2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("p", [1, 2, 3, 8, 17, 70])
def test_the_number_of_threads_changes_no_bit(isa, p, bf16):
    model = make_model(model_config(context="states_actions", window=4, dim=32))
    batch, z0 = make_batch([6] * p), random_seeds(p, model.config)
    results = []
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            with ops.backend("cpp"):
                results.append(run_episode(model, make_state(model, z0, bf16=bf16), batch, p))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, results[0]) for x in results[1:])


@pytest.mark.parametrize(
    ("p", "bf16", "context"), [(1, False, "states_actions"), (8, False, "states"), (3, True, "states")]
)
def test_threads_that_share_every_product_change_no_bit(cpp_engine, p, bf16, context):
    # Weights beyond what one thread keeps near.
    model = make_model(model_config(context=context, window=4, dim=256, n_heads=4))
    z0, obs = random_seeds(p, model.config), torch.randn(6, p, OBS_DIM)
    weights, before = model.decoder.step_weights(), torch.get_num_threads()
    # With AddressSanitizer a step takes longer than a worker stays awake: that they take part is not asserted there.
    slow = "asan" in os.environ.get("LD_PRELOAD", "")
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            runs = cpp_engine._together_runs()
            # Only workers that are awake take part: on a busy machine, or under a sanitizer, that may take a while.
            for _ in range((20 if slow else 2000) if n_threads > 1 else 1):
                state, actions = make_state(model, z0, bf16=bf16), []
                for x in obs:
                    cpp_engine._parallel_for(np.zeros((n_threads, 1), np.int64), n_threads, work_us=20)
                    actions.append(ops.decode_step(weights, state, x))
                results.append(torch.stack(actions))
                assert torch.equal(results[-1], results[0])
                if cpp_engine._together_runs() > runs:
                    break
            if not slow or n_threads == 1:
                assert (cpp_engine._together_runs() > runs) == (n_threads > 1)
    finally:
        torch.set_num_threads(before)


def make_units() -> Units:
    return Units(*make_normalization()[:4])


def strided(x: np.ndarray) -> Iterator[np.ndarray]:
    """The same values in other layouts."""
    yield x.astype(np.float64)
    yield np.asfortranarray(x)
    wide = np.zeros((2 * x.shape[0], 3 * x.shape[1]), np.float32)
    wide[::2, 1::3] = x
    yield wide[::2, 1::3]
    yield np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]
    yield x.astype(">f4")
    read_only = x.copy()
    read_only.setflags(write=False)
    yield read_only
    yield np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)


def test_units_and_layouts_of_observations(cpp_engine):
    model = make_model(model_config(context="states_actions"))
    z0, units = random_seeds(4, model.config), make_units()
    obs = torch.randn(4, OBS_DIM)
    weights = model.decoder.step_weights()
    with ops.backend("reference"), torch.no_grad():
        expected = ops.decode_step(weights, make_state(model, z0), obs, units)
    out = ops.decode_step(weights, make_state(model, z0), obs, units)
    assert isinstance(out, torch.Tensor)
    assert row_error(out, expected) < 1e-5
    normalised = ops.decode_step(weights, make_state(model, z0), (obs - units.obs_mean) / units.obs_std)
    assert torch.allclose(normalised * units.action_half + units.action_mid, out, rtol=0, atol=1e-6)
    for layout in strided(obs.numpy()):
        again = ops.decode_step(weights, make_state(model, z0), layout, units)
        assert isinstance(again, np.ndarray)
        np.testing.assert_array_equal(again, out.numpy())
    half = ops.decode_step(weights, make_state(model, z0), obs.bfloat16(), units)
    assert 0 < row_error(half, out) < 2e-2
    transposed = obs.t().contiguous().t()
    assert torch.equal(ops.decode_step(weights, make_state(model, z0), transposed, units), out)
    assert ops.dispatch_counts()["decode_step", "cpp"] == 11


def test_actions_near_zero_keep_their_digits(isa):
    model = make_model()
    with torch.no_grad():
        model.decoder.head.weight.mul_(1e-4)
        model.decoder.head.bias.mul_(1e-4)
    z0, obs, out = random_seeds(3, model.config), torch.randn(3, OBS_DIM), {}
    for name in ("reference", "cpp"):
        with ops.backend(name), torch.no_grad():
            out[name] = ops.decode_step(model.decoder.step_weights(), make_state(model, z0), obs)
    assert float(out["cpp"].abs().max()) < 1e-3
    assert row_error(out["cpp"], out["reference"]) < 1e-5


def test_the_engine_may_change_within_an_episode(cpp_engine):
    """Both read and write the same rings, bfloat16 ones too."""
    for bf16, bound in ((False, 1e-5), (True, 2e-2)):
        model = make_model(model_config(context="states_actions", window=4))
        batch, z0 = make_batch([12] * 3), random_seeds(3, model.config)
        expected = full_pass(model, batch, z0).view(3, 12, -1)
        state, weights = make_state(model, z0, bf16=bf16), model.decoder.step_weights()
        for t in range(12):
            if t > 0:
                state.last_action.copy_(batch.actions.view(3, 12, -1)[:, t - 1])
            with ops.backend("cpp" if t % 3 == 0 else "reference"), torch.no_grad():
                out = ops.decode_step(weights, state, batch.observations.view(3, 12, -1)[:, t])
            assert row_error(out, expected[:, t]) < bound
        assert state.bf16 == bf16


# ---------------------------------------------------------------------------------------------------------------------
# Weights that change


def optimizer_step(model):
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=0.05)
    model.decoder.head.bias.grad = torch.ones_like(model.decoder.head.bias)
    model.decoder.layers[1].qkv.weight.grad = torch.ones_like(model.decoder.layers[1].qkv.weight)
    optimizer.step()


def load_state(model):
    model.load_state_dict(make_model(model.config, seed=5).state_dict())


def load_state_by_assignment(model):
    model.load_state_dict(make_model(model.config, seed=5).state_dict(), assign=True)


def write_one_value(model):
    with torch.no_grad():
        model.decoder.layers[0].mlp_out.weight[-1, -1] += 3.0


def write_by_data(model):
    model.decoder.layers[0].norm2.bias.data.add_(1.0)


def replace_data(model):
    model.decoder.embed_state.weight.data = model.decoder.embed_state.weight.data * 2


def fused_step(model):
    """Of a part of one matrix: a fused optimiser counts no version."""
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=0.05, weight_decay=0.0, fused=True)
    grad = torch.zeros_like(model.decoder.head.weight)
    grad[1:] = 1.0
    model.decoder.head.weight.grad = grad
    optimizer.step()


def write_a_part_by_data(model):
    model.decoder.layers[0].mlp_out.weight.data[1:].mul_(3)


CHANGES = [optimizer_step, load_state, load_state_by_assignment, write_one_value, write_by_data, replace_data]


@pytest.mark.parametrize("change", [*CHANGES, fused_step, write_a_part_by_data])
def test_weights_changed_in_any_way_act_after_a_reset(cpp_engine, change):
    model = make_model(model_config(context="states_actions"))
    z0, x = random_seeds(2, model.config), torch.randn(2, OBS_DIM)
    state = make_state(model, z0)
    weights_of = ops.WeightsOf(model.decoder)
    ops.decode_step(weights_of(), state, x)
    change(model)
    state.reset(torch.ones(2, dtype=torch.bool))
    found = ops.decode_step(weights_of(), state, x)
    fresh = make_state(model, z0)
    fresh.plan_k.copy_(state.plan_k)
    fresh.plan_v.copy_(state.plan_v)
    assert torch.equal(found, ops.decode_step(ops.WeightsOf(model.decoder)(), fresh, x))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_act_at_the_next_step(cpp_engine, change, bf16):
    model = make_model(model_config(context="states_actions"))
    z0, obs = random_seeds(2, model.config), torch.randn(4, 2, OBS_DIM)
    state = make_state(model, z0, bf16=bf16)
    weights_of = ops.WeightsOf(model.decoder)
    for x in obs[:2]:
        ops.decode_step(weights_of(), state, x)
    untouched, expected = copy.deepcopy(state), copy.deepcopy(state)
    old = copy.deepcopy(model)
    change(model)
    out = ops.decode_step(weights_of(), state, obs[2])
    assert torch.equal(out, ops.decode_step(model.decoder.step_weights(), expected, obs[2]))
    assert not torch.equal(out, ops.decode_step(old.decoder.step_weights(), untouched, obs[2]))


def test_weights_are_packed_once(cpp_engine):
    model = make_model()
    state, weights_of = make_state(model, random_seeds(1, model.config)), ops.WeightsOf(model.decoder)
    ops.decode_step(weights_of(), state, torch.zeros(1, OBS_DIM))
    packed = state._packed
    for _ in range(3):
        ops.decode_step(weights_of(), state, torch.zeros(1, OBS_DIM))
        ops.decode_step(model.decoder.step_weights(), state, torch.zeros(1, OBS_DIM))
    assert state._packed is packed
    write_one_value(model)
    ops.decode_step(weights_of(), state, torch.zeros(1, OBS_DIM))
    assert state._packed is not packed


def test_a_step_like_the_one_before_still_goes_where_it_is_sent(cpp_engine, monkeypatch):
    model = make_model()
    state, weights = make_state(model, random_seeds(2, model.config)), model.decoder.step_weights()
    obs = torch.randn(2, OBS_DIM)

    def step() -> None:
        ops.decode_step(weights, state, obs)

    step()
    step()
    assert ops.dispatch_counts() == {("decode_step", "cpp"): 2}
    with ops.backend("reference"):
        step()
    monkeypatch.setenv("GAC_FAST_BACKEND", "reference")
    step()
    with ops.backend("cpp"):
        step()
    monkeypatch.setenv("GAC_FAST_BACKEND", "")
    step()
    assert ops.dispatch_counts() == {("decode_step", "cpp"): 4, ("decode_step", "reference"): 2}
    with pytest.raises(ValueError, match=r"obs: expected shape \[2, \d+\], got \[1, \d+\]"):
        ops.decode_step(weights, state, obs[:1])


def test_inference_tensors_are_watched_byte_by_byte(cpp_engine):
    with torch.inference_mode():
        model = make_model()
        z0 = random_seeds(1, model.config)
        state = make_state(model, z0)
        weights = model.decoder.step_weights()
        assert weights.embed_state_w.is_inference()
        before = ops.decode_step(weights, state, torch.zeros(1, OBS_DIM))
        packed = state._packed
        state.reset(torch.ones(1, dtype=torch.bool))
        assert torch.equal(ops.decode_step(weights, state, torch.zeros(1, OBS_DIM)), before)
        assert state._packed is packed
        write_one_value(model)
        state.reset(torch.ones(1, dtype=torch.bool))
        assert not torch.equal(ops.decode_step(weights, state, torch.zeros(1, OBS_DIM)), before)


def test_another_path_of_the_engine_packs_anew(cpp_engine):
    model = make_model()
    z0, weights = random_seeds(3, model.config), model.decoder.step_weights()
    state, obs = make_state(model, z0), torch.randn(3, OBS_DIM)
    paths = [name for name, problem in cpp_engine._isa_problems() if not problem]
    out = []
    try:
        for name in [*paths, *reversed(paths)]:
            cpp_engine._use_isa(name)
            state.reset(torch.ones(3, dtype=torch.bool))
            out.append(ops.decode_step(weights, state, obs))
    finally:
        cpp_engine._use_isa("")
    assert all(row_error(x, out[0]) < 1e-5 for x in out)


def test_a_parametrised_weight_is_read_anew(cpp_engine):
    model = make_model()
    torch.nn.utils.parametrizations.weight_norm(model.decoder.layers[0].mlp_in)
    state, weights_of = make_state(model, random_seeds(1, model.config)), ops.WeightsOf(model.decoder)
    out = []
    for _ in range(2):
        with torch.no_grad():
            out.append(ops.decode_step(weights_of(), state, torch.ones(1, OBS_DIM)))
            state.reset(torch.ones(1, dtype=torch.bool))
            model.decoder.layers[0].mlp_in.parametrizations.weight.original0.mul_(1.5)
    assert not torch.equal(*out)


# ---------------------------------------------------------------------------------------------------------------------
# Copies, processes, bad input


def test_copies_go_their_own_way(cpp_engine):
    model = make_model(model_config(context="states_actions"))
    z0, obs = random_seeds(2, model.config), torch.randn(4, 2, OBS_DIM)
    weights, state = model.decoder.step_weights(), make_state(model, z0)
    ops.decode_step(weights, state, obs[0])
    # Its packed weights and pointers cannot be pickled, and do not go along.
    assert not {type(x).__module__ for x in state.__getstate__().values()} & {"gac_fast._C"}
    other = copy.deepcopy(state)
    out = ops.decode_step(weights, state, obs[1])
    assert other.ring_k.data_ptr() != state.ring_k.data_ptr()
    assert torch.equal(ops.decode_step(weights, other, obs[1]), out)
    assert torch.equal(other.ring_k.nan_to_num(), state.ring_k.nan_to_num())


def _step_in_child(queue, weights, state, obs) -> None:
    torch.set_num_threads(2)
    queue.put(ops.decode_step(weights, state, obs).numpy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_steps_on(cpp_engine):
    model = make_model()
    state, obs = make_state(model, random_seeds(8, model.config)), np.ones((8, OBS_DIM), np.float32)
    weights = model.decoder.step_weights()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ops.decode_step(weights, state, obs)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_step_in_child, args=(queue, weights, state, torch.from_numpy(obs)))
        child.start()
        from_child = queue.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0
        np.testing.assert_array_equal(ops.decode_step(weights, state, obs), from_child)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ["reference", "cpp"])
def test_bad_observations(request, engine):
    if engine == "cpp":
        request.getfixturevalue("cpp_engine")
    model = make_model(model_config(context="states_actions"))
    state, weights = make_state(model, random_seeds(3, model.config)), model.decoder.step_weights()
    with ops.backend(engine), torch.no_grad():
        for shape in ((3, OBS_DIM + 1), (2, OBS_DIM), (OBS_DIM,)):
            for x in (np.zeros(shape, np.float32), torch.zeros(shape)):
                with pytest.raises(ValueError, match=r"obs: expected shape \[3, 3\], got \["):
                    ops.decode_step(weights, state, x)
        for bad in (np.nan, np.inf, 1e300):
            obs = np.zeros((3, OBS_DIM))
            obs[1, 2] = bad
            with pytest.raises(FloatingPointError, match=r"obs: expected finite values, environment 1 has \[0.0, 0.0"):
                ops.decode_step(weights, state, obs)
        assert bool((state.steps == 0).all())


def engine_arguments(model: GAC, *, bf16: bool = False):
    state = make_state(model, random_seeds(2, model.config), bf16=bf16)
    rings = [r.view(torch.int16).numpy() if bf16 else r.numpy() for r in (state.ring_k, state.ring_v)]
    plans = [state.plan_k.numpy(), state.plan_v.numpy()]
    return [*rings, *plans, state.steps.numpy(), state.last_action.numpy()]


@pytest.mark.parametrize(
    ("i", "change", "message"),
    [
        (0, lambda x: x[0], r"ring_k: expected shape \(\*, \*, \*, \*, \*\), got \(2, 3, 2, 8\)"),
        (0, lambda x: x.astype(np.float64), "ring_k: expected dtype int16, got float64"),
        (0, lambda x: x[:, :, :0], "ring_k: expected rows and slots"),
        (1, lambda x: x[:, :, :2], r"ring_v: expected shape \(2, 2, 3, 2, 8\), got \(2, 2, 2, 2, 8\)"),
        (1, lambda x: np.broadcast_to(x[:1], x.shape), "ring_v: expected a writeable array, got a read-only one"),
        (1, lambda x: np.asfortranarray(x), "ring_v: expected a contiguous array, got a strided one"),
        (2, lambda x: x[:, :1], "plan_k: expected shape"),
        (2, lambda x: x[:, :, :0], "plan_k: expected at least one plan vector"),
        (3, lambda x: x.astype(np.float16), "plan_v: expected dtype float32, got float16"),
        (4, lambda x: x.astype(np.int32), "steps: expected dtype int64, got int32"),
        (4, lambda x: x[:1].copy(), r"steps: expected shape \(2\), got \(1\)"),
        (5, lambda x: x[:, 0], "last_action: expected shape"),
        (5, lambda x: x[:, ::-1], "last_action: expected a contiguous array, got a strided one"),
    ],
)
def test_bad_state(cpp_engine, i, change, message):
    arguments = engine_arguments(make_model())
    arguments[i] = change(arguments[i])
    with pytest.raises(ValueError, match=message):
        cpp_engine._DecodeState(*arguments, [])


def flat(weights: StepWeights) -> list[torch.Tensor]:
    decoder = weights.decoder
    tensors = [x for x in weights[:4] if x is not None] + [x for layer in decoder.layers for x in layer]
    return [*tensors, decoder.norm_w, decoder.norm_b, decoder.w_head, decoder.b_head]


@pytest.mark.parametrize(
    ("i", "change", "message"),
    [
        (0, lambda x: x[0], "embed_state weight: expected at least 2 dimensions"),
        (1, lambda x: x[:3], r"embed_state bias: expected shape \(16\), got \(3\)"),
        (4, lambda x: x[:, :5], r"layer 0 qkv weight: expected shape \(48, 16\), got \(48, 5\)"),
        (4, lambda x: x.astype(np.float64), "layer 0 qkv weight: expected dtype float32, got float64"),
        (4, lambda x: x.T.copy().T, "layer 0 qkv weight: expected a contiguous array, got a strided one"),
        (21, lambda x: x[:1], r"layer 1 norm1 bias: expected shape \(16\), got \(1\)"),
        (-2, lambda x: x[:0], "head weight: expected at least one action dimension"),
        (-1, lambda x: x[:0], r"head bias: expected shape \(2\), got \(0\)"),
    ],
)
def test_bad_weights(cpp_engine, i, change, message):
    tensors = flat(make_model().decoder.step_weights())
    arrays = [x.detach().numpy() for x in tensors]
    arrays[i] = change(arrays[i])
    with pytest.raises(ValueError, match=message):
        cpp_engine._DecodeWeights(tensors, arrays, 2, 10000.0, False, False)


def test_bad_calls(cpp_engine):
    tensors = flat(make_model().decoder.step_weights())
    arrays = [x.detach().numpy() for x in tensors]
    for n_heads, message in (
        (0, "n_heads: expected a divisor"),
        (3, "n_heads: expected"),
        (16, "head width: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            cpp_engine._DecodeWeights(tensors, arrays, n_heads, 10000.0, False, False)
    for count in (0, 5, len(arrays) - 1):
        with pytest.raises(ValueError, match="arrays: expected embeddings"):
            cpp_engine._DecodeWeights(tensors[:count], arrays[:count], 2, 10000.0, False, False)
    with pytest.raises(ValueError, match="tensors: expected"):
        cpp_engine._DecodeWeights(tensors[1:], arrays, 2, 10000.0, False, False)
    with pytest.raises(ValueError, match="rope_base: expected a positive number"):
        cpp_engine._DecodeWeights(tensors, arrays, 2, float("nan"), False, False)
    weights = cpp_engine._DecodeWeights(tensors, arrays, 2, 10000.0, False, False)
    other = cpp_engine._DecodeWeights(tensors, arrays, 2, 10000.0, False, True)
    arguments = engine_arguments(make_model())
    state = cpp_engine._DecodeState(*arguments, [])
    obs, out = np.zeros((2, OBS_DIM), np.float32), np.zeros((2, ACT_DIM), np.float32)
    for bad in (
        (other, obs, out, "ring_k: expected bfloat16 rings"),
        (weights, obs[:, :1], out, "observations: expected shape"),
        (weights, obs.astype(np.int64), out, "observations: expected dtype float32, got int64"),
        (weights, obs, out[:1], "out: expected shape"),
        (weights, obs, out.astype(np.float64), "out: expected dtype float32"),
        (weights, obs, out.T.copy().T, "out: expected a contiguous array"),
    ):
        with pytest.raises(ValueError, match=bad[3]):
            state.step(*bad[:3], 1)
    arguments[4][1] = -1
    with pytest.raises(ValueError, match=r"steps: expected between 0 and 2\^40, got -1"):
        state.step(weights, obs, out, 1)
    arguments[4][1] = 0
    assert state.step(weights, obs, out, 0) == -1
    with pytest.raises(ValueError, match="units: expected none or four arrays, got 1"):
        cpp_engine._DecodeState(*arguments, [obs[0]])
    wrong = cpp_engine._DecodeState(*arguments, [np.zeros(5, np.float32)] * 2 + [np.zeros(ACT_DIM, np.float32)] * 2)
    with pytest.raises(ValueError, match=r"obs_mean: expected shape \(3\), got \(5\)"):
        wrong.step(weights, obs, out, 1)
    with pytest.raises(ValueError, match="entries: expected tuples"):
        cpp_engine._same_entries([1])
    assert cpp_engine._same_entries([({"a": out}, "a", out)])
    assert not cpp_engine._same_entries([({}, "a", out)])
