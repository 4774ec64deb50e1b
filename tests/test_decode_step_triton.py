"""decode_step in Triton: interpreted against float64, compiled without a GPU, and on a GPU where there is one."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import row_error
from core_fixtures import ACT_DIM, OBS_DIM, make_batch, make_model, make_normalization, model_config, random_seeds
from test_decode_step import (
    CHANGES,
    CONTEXTS,
    full_pass,
    fused_step,
    make_state,
    make_units,
    run_episode,
    strided,
    write_a_part_by_data,
    write_by_data,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from kernel_fixtures import assert_fits, compile_cases

from gac_fast import ops
from gac_fast.act import Actor
from gac_fast.errors import BackendError
from gac_fast.kernels import decode_step as kernel
from gac_fast.ops.decode_step import _flat

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def config(**fields):
    """The smallest width that the kernel takes."""
    return model_config(**({"dim": 64, "n_heads": 4} | fields))


def check_against_float64(model_fields, *, p, length, obs_dim=OBS_DIM, act_dim=ACT_DIM, device="cpu", bf16=False):
    """Steps of whole episodes against the banded pass in float64 over the same states and actions."""
    fields = config(**model_fields)
    model = make_model(fields, obs_dim=obs_dim, act_dim=act_dim)
    batch, z0 = make_batch([length] * p, obs_dim=obs_dim, act_dim=act_dim), random_seeds(p, fields)
    exact = make_model(fields, obs_dim=obs_dim, act_dim=act_dim, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    wide = batch._replace(observations=batch.observations.double(), actions=batch.actions.double())
    expected = full_pass(exact, wide, z0.double()).view(p, -1)
    state = make_state(model, z0, bf16=bf16)
    if device != "cpu":
        model = model.to(device)
        batch = batch._replace(observations=batch.observations.to(device), actions=batch.actions.to(device))
        for name in ("ring_k", "ring_v", "plan_k", "plan_v", "steps", "last_action"):
            setattr(state, name, getattr(state, name).to(device))
    ops.reset_dispatch_counts()
    with ops.backend("triton"):
        out = run_episode(model, state, batch, p)
    assert ops.dispatch_counts() == {("decode_step", "triton"): length}
    # Rows of whole episodes: a single action near zero has no scale of its own.
    assert row_error(out.view(p, -1), expected) < BOUND[torch.bfloat16 if bf16 else torch.float32]
    return state, out


# ---------------------------------------------------------------------------------------------------------------------
# The interpreter


def test_triton_interpreter_agrees(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("p", "length", "fields"),
    [
        (1, 1, {"window": 1, "n_z": 1, "n_layers": 1}),
        (2, 3, {"window": 1, "n_heads": 8}),
        (1, 8, {"window": 3, "n_heads": 1, "n_z": 16}),
        (1, 4, {"window": 20, "n_heads": 2, "n_z": 5, "mlp_ratio": 1}),
        (2, 4, {"window": 2, "dim": 96, "n_heads": 4, "n_z": 3}),
        (1, 4, {"window": 2, "dim": 96, "n_heads": 3, "n_layers": 1}),
        (1, 4, {"window": 2, "dim": 128, "n_heads": 4, "n_z": 4, "mlp_ratio": 4, "n_layers": 3}),
        (1, 4, {"window": 2, "dim": 192, "n_heads": 8, "n_layers": 1}),
        (1, 3, {"window": 2, "dim": 256, "n_heads": 1, "n_layers": 1}),
    ],
    ids=str,
)
def test_interpreted_equals_float64(p, length, fields, context):
    """Rings begin full of NaN, and so does the memory of the programs."""
    state, _ = check_against_float64({"context": context, **fields}, p=p, length=length)
    c = 1 if context == "states" else 2
    filled = min(c * length - (c - 1), state.ring_k.shape[2])
    for ring in (state.ring_k, state.ring_v):
        assert bool(ring[:, :, :filled].isfinite().all())
        assert bool(ring[:, :, filled:].isnan().all())


def tile(monkeypatch, environments: int, slots: int) -> None:
    """Programs of so many environments, so many slots at a time."""

    def option_for(n_rows, dim, tokens, dtype, architecture):
        option = kernel._option(environments, dim, tokens, dtype == torch.float32, architecture)
        return option.__class__(tuple({**dict(option.tiles), "WB": slots}.items()), 4, 2)

    monkeypatch.setattr(kernel, "option_for", option_for)


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("environments", "slots"), [(1, 2), (2, 4), (8, 1)])
def test_interpreted_programs_of_any_size(monkeypatch, environments, slots, context):
    """The last program has rows beyond the last environment; the ring takes several loads."""
    tile(monkeypatch, environments, slots)
    check_against_float64({"context": context, "window": 5, "n_layers": 1}, p=3, length=7)


@pytest.mark.interpreter
@pytest.mark.parametrize(("obs_dim", "act_dim"), [(1, 1), (40, 33), (348, 17)])
def test_interpreted_any_number_of_observations_and_actions(obs_dim, act_dim):
    fields = {"context": "states_actions", "n_layers": 1}
    check_against_float64(fields, p=2, length=3, obs_dim=obs_dim, act_dim=act_dim)


@pytest.mark.interpreter
@pytest.mark.parametrize("start", [255, 10_000, 3_000_000])
def test_interpreted_positions_far_into_an_episode(start):
    model = make_model(config(context="states_actions", window=4, n_layers=1))
    exact = make_model(model.config, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    z0 = random_seeds(2, model.config)
    states = [make_state(model, z0), make_state(exact, z0.double())]
    for state in states:
        state.ring_k.copy_(torch.randn(state.ring_k.shape, generator=torch.Generator().manual_seed(0)))
        state.ring_v.copy_(torch.randn(state.ring_v.shape, generator=torch.Generator().manual_seed(1)))
        state.steps.fill_(start)
        state.clear_stale(2)
    for x in torch.randn(2, 2, OBS_DIM):
        with ops.backend("triton"), torch.no_grad():
            out = ops.decode_step(model.decoder.step_weights(), states[0], x)
        with ops.backend("reference"), torch.no_grad():
            expected = ops.decode_step(exact.decoder.step_weights(), states[1], x.double())
        assert row_error(out.view(1, -1), expected.view(1, -1)) < 1e-5
        states[1].last_action.copy_(states[0].last_action)
    assert row_error(states[0].ring_k, states[1].ring_k) < 1e-5
    assert torch.equal(states[0].steps, torch.full((2,), start + 2))


@pytest.mark.interpreter
@pytest.mark.parametrize("context", CONTEXTS)
def test_interpreted_rows_may_be_at_different_steps(monkeypatch, context):
    """Rows that start anew at different times, over rings full of NaN."""
    tile(monkeypatch, 4, 2)
    model = make_model(config(context=context, window=3, n_layers=2))
    p, length = 4, 8
    batch, z0 = make_batch([length] * p), random_seeds(p, model.config)
    expected = full_pass(model, batch, z0).view(p, length, -1)
    obs, actions = batch.observations.view(p, length, -1), batch.actions.view(p, length, -1)
    state, weights = make_state(model, z0), model.decoder.step_weights()
    rows, age = torch.arange(p), torch.zeros(p, dtype=torch.int64)
    with ops.backend("triton"), torch.no_grad():
        for now in range(length):
            restart = torch.tensor([now > 0 and now % (i + 2) == 0 for i in range(p)])
            if now == 6:
                # What an overflow leaves.
                state.ring_k[:, restart], state.ring_v[:, restart] = torch.nan, torch.inf
            state.reset(restart)
            age[restart] = 0
            state.last_action.copy_(torch.where((age == 0)[:, None], 0, actions[rows, age - 1]))
            out = ops.decode_step(weights, state, obs[rows, age])
            assert row_error(out, expected[rows, age]) < 1e-5, f"step {now}"
            assert torch.equal(state.last_action, out)
            age += 1
    assert len(set(age.tolist())) > 2


@pytest.mark.interpreter
def test_interpreted_engine_may_change_within_an_episode(monkeypatch):
    """All read and write the same rings."""
    tile(monkeypatch, 2, 2)
    model = make_model(config(context="states_actions", window=3, n_layers=1))
    batch, z0 = make_batch([9] * 2), random_seeds(2, model.config)
    expected = full_pass(model, batch, z0).view(2, 9, -1)
    state, weights = make_state(model, z0), model.decoder.step_weights()
    for t in range(9):
        if t > 0:
            state.last_action.copy_(batch.actions.view(2, 9, -1)[:, t - 1])
        with ops.backend(("triton", "reference")[t % 2]), torch.no_grad():
            out = ops.decode_step(weights, state, batch.observations.view(2, 9, -1)[:, t])
        assert row_error(out, expected[:, t]) < 1e-5


@pytest.mark.interpreter
def test_interpreted_units_and_layouts_of_observations(monkeypatch):
    tile(monkeypatch, 4, 2)
    model = make_model(config(context="states_actions", n_layers=1))
    z0, units, obs = random_seeds(4, model.config), make_units(), torch.randn(4, OBS_DIM)
    weights = model.decoder.step_weights()
    with ops.backend("reference"), torch.no_grad():
        expected = ops.decode_step(weights, make_state(model, z0), obs, units)
    with ops.backend("triton"):
        out = ops.decode_step(weights, make_state(model, z0), obs, units)
        assert row_error(out, expected) < 1e-5
        for layout in strided(obs.numpy()):
            again = ops.decode_step(weights, make_state(model, z0), layout, units)
            assert isinstance(again, np.ndarray)
            np.testing.assert_array_equal(again, out.numpy())
        half = ops.decode_step(weights, make_state(model, z0), obs.bfloat16(), units)
        assert 0 < row_error(half, out) < 2e-2
        transposed = obs.t().contiguous().t()
        assert torch.equal(ops.decode_step(weights, make_state(model, z0), transposed, units), out)
        state = make_state(model, z0)
        for bad in (np.nan, np.inf, 1e300):
            array = np.zeros((4, OBS_DIM))
            array[1, 2] = bad
            with pytest.raises(FloatingPointError, match=r"obs: expected finite values, environment 1 has \[0.0, 0.0"):
                ops.decode_step(weights, state, array)
        assert bool((state.steps == 0).all())


@pytest.mark.interpreter
def test_interpreted_actions_near_zero_keep_their_digits():
    model = make_model(config(n_layers=1))
    with torch.no_grad():
        model.decoder.head.weight.mul_(1e-4)
        model.decoder.head.bias.mul_(1e-4)
    z0, obs, out = random_seeds(3, model.config), torch.randn(3, OBS_DIM), {}
    for name in ("reference", "triton"):
        with ops.backend(name), torch.no_grad():
            out[name] = ops.decode_step(model.decoder.step_weights(), make_state(model, z0), obs)
    assert float(out["triton"].abs().max()) < 1e-3
    assert row_error(out["triton"], out["reference"]) < 1e-5


@pytest.mark.interpreter
def test_interpreted_actor_with_resets_and_noise(monkeypatch):
    tile(monkeypatch, 4, 2)
    model = make_model(config(context="states_actions", n_layers=1))
    actors = {}
    for name in ("reference", "triton"):
        actor = Actor(model, make_normalization(), random_seeds(4, model.config), action_noise=0.1, seed=3)
        with ops.backend(name):
            out = []
            for t, obs in enumerate(torch.randn(6, 4, OBS_DIM, generator=torch.Generator().manual_seed(0))):
                if t == 3:
                    actor.reset(torch.tensor([True, False, False, True]), random_seeds(4, model.config, seed=7))
                if t == 5:
                    actor.reset()
                out.append(actor.act(obs))
        actors[name] = torch.stack(out)
    assert row_error(actors["triton"], actors["reference"]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Weights that change


def two_steps(change, *, reset: bool):
    """Actions before and after a change, and those of a fresh state that knew nothing else."""
    model = make_model(config(context="states_actions", n_layers=2))
    z0, x = random_seeds(1, model.config), torch.randn(1, OBS_DIM)
    state, weights_of = make_state(model, z0), ops.WeightsOf(model.decoder)
    with ops.backend("triton"):
        before = ops.decode_step(weights_of(), state, x)
        fresh = copy.deepcopy(state)
        change(model)
        if reset:
            for one in (state, fresh):
                one.reset()
        after = ops.decode_step(weights_of(), state, x)
        return before, after, ops.decode_step(ops.WeightsOf(model.decoder)(), fresh, x)


@pytest.mark.interpreter
@pytest.mark.parametrize("change", [c for c in CHANGES if c is not write_by_data])
def test_interpreted_changed_weights_act_at_the_next_step(change):
    before, after, expected = two_steps(change, reset=False)
    assert not torch.equal(before, after)
    assert torch.equal(after, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("change", [write_by_data, fused_step, write_a_part_by_data])
def test_interpreted_uncounted_changes_act_after_a_reset_of_all_rows(change):
    before, after, expected = two_steps(change, reset=True)
    assert not torch.equal(before, after)
    assert torch.equal(after, expected)


@pytest.mark.interpreter
def test_interpreted_weights_are_packed_once_and_stay_where_they_are():
    model = make_model(config(n_layers=1))
    state, weights_of = make_state(model, random_seeds(1, model.config)), ops.WeightsOf(model.decoder)
    x = torch.zeros(1, OBS_DIM)
    with ops.backend("triton"):
        ops.decode_step(weights_of(), state, x)
        step, places = state._triton, [y.data_ptr() for y in (state._triton.packed.matrices, *state._triton.scratch)]
        fills = []
        step.packed.fill = lambda tensors: fills.append(len(tensors))
        for _ in range(3):
            ops.decode_step(weights_of(), state, x)
            ops.decode_step(model.decoder.step_weights(), state, x)
        state.reset(torch.tensor([True]))
        ops.decode_step(weights_of(), state, x)
        assert fills == []
        state.reset()
        ops.decode_step(weights_of(), state, x)
        assert len(fills) == 1
    assert state._triton is step
    assert places == [y.data_ptr() for y in (step.packed.matrices, *step.scratch)]


@pytest.mark.interpreter
def test_interpreted_what_the_kernel_does_not_take():
    x = torch.zeros(1, OBS_DIM)
    for fields, reason in (
        ({"dim": 32, "n_heads": 2}, "takes widths 64, 96, 128, 192, 256, got 32"),
        ({"n_z": 17}, "takes 1 to 16 plan vectors, got 17"),
    ):
        model = make_model(config(**fields))
        state = make_state(model, random_seeds(1, model.config))
        with ops.backend("triton"), pytest.raises(BackendError, match=f"decode_step.*{reason}"):
            ops.decode_step(model.decoder.step_weights(), state, x)
        with ops.backend("reference"), torch.no_grad():
            ops.decode_step(model.decoder.step_weights(), state, x)
    model = make_model(config())
    state = make_state(model, random_seeds(1, model.config), bf16=True)
    with ops.backend("triton"), pytest.raises(BackendError, match="interpreter of Triton computes bfloat16 wrongly"):
        ops.decode_step(model.decoder.step_weights(), state, x)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled without a GPU


@pytest.mark.parametrize("n_rows", [1, 2, 63, 64, 65, 128, 1000, 1024, 4096, 100_000])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options_suit_every_size(n_rows, tokens, dtype):
    for dim, architecture in itertools.product(kernel.WIDTHS, (80, 90)):
        t = dict(kernel.option_for(n_rows, dim, tokens, dtype, architecture).tiles)
        assert t["EA"] == 1 or t["EA"] * 32 < n_rows
        assert t["BE"] * tokens >= 16
        assert t["EA"] <= t["BE"]
        assert all(dim % t[name] == 0 for name in ("BN", "BK", "BH"))
        assert dim // 2 % t["BP"] == 0
        assert min(t[name] for name in ("BP", "BN", "BK", "BH")) >= 16


class NothingSent(TorchDispatchMode):
    """Fails where memory of the host meets the device, for which meta stands: a copy would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert len(devices) <= 1, f"{func} reads memory of the host"
        return out


@pytest.mark.parametrize(("dim", "heads", "base"), [(64, 4, 1e4), (96, 4, 100.0), (128, 1, 0.5), (256, 2, 1e6)])
def test_packing_copies_nothing_from_the_host(dim, heads, base):
    model = make_model(config(context="states_actions", dim=dim, n_heads=heads))
    tensors = _flat(model.decoder.step_weights())
    packed, half = kernel.Packed(tensors, heads, base, 2, torch.float32), dim // heads // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    assert torch.equal(packed.turns, frequency / (2 * math.pi))
    # First halves of all heads, then second ones.
    first = torch.arange(dim).view(heads, 2, half).transpose(0, 1).flatten()
    assert torch.equal(packed._order, torch.cat((first, first + dim, torch.arange(2 * dim, 3 * dim))))
    on_meta = [x.detach().to("meta") for x in tensors]
    with NothingSent():
        kernel.Packed(on_meta, heads, base, 2, torch.bfloat16)
    with NothingSent(), pytest.raises(AssertionError, match="reads memory of the host"):
        packed.turns.to("meta")


@pytest.mark.parametrize(("tokens", "n_rows"), [(2, 1), (2, 1024), (1, 1024)])
def test_compiles_for_the_gym_size_without_spills(tokens, n_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launch = kernel.shipped(tokens_per_step=tokens, rows=[n_rows])[0]
    assert_fits(launch, 90, tmp_path)


def test_tiles_of_the_mlp_divide_its_width(monkeypatch):
    class Narrow(kernel.Packed):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.hidden = 192

    assert {dict(one.option.tiles)["BH"] for one in kernel.shipped()} == {128}
    monkeypatch.setattr(kernel, "Packed", Narrow)
    assert {dict(one.option.tiles)["BH"] for one in kernel.shipped()} == {64}


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype", "architecture"), compile_cases("decode_step"))
def test_compiles_for_every_width(sizes, dtype, architecture, tmp_path):
    for launch in kernel.shipped(**sizes, dtype=dtype, architecture=architecture):
        assert_fits(launch, architecture, tmp_path, spills=dtype == torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("p", "length", "fields"),
    [
        (1, 5, {"window": 1, "n_z": 1}),
        (130, 9, {"window": 3, "n_heads": 8}),
        (17, 12, {"window": 5, "dim": 96, "n_heads": 4, "n_z": 7}),
        (70, 70, {"window": 32, "dim": 128, "n_heads": 4, "n_z": 4, "mlp_ratio": 4, "n_layers": 3}),
        (1000, 5, {"window": 4, "dim": 128, "n_heads": 4}),
        (5, 8, {"window": 3, "dim": 192, "n_heads": 6, "n_z": 16}),
        (5, 8, {"window": 3, "dim": 256, "n_heads": 1}),
    ],
    ids=str,
)
def test_gpu_equals_float64(p, length, fields, context, bf16):
    check_against_float64({"context": context, **fields}, p=p, length=length, device="cuda", bf16=bf16)


def device_actor(model, n: int, **options) -> Actor:
    units = type(make_normalization())(*(x.cuda() for x in make_normalization()))
    return Actor(model, units, random_seeds(n, model.config), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_gpu_repeats_are_bit_identical(context, bf16):
    model = make_model(config(context=context, dim=128, window=32, n_layers=3)).cuda()
    actor = device_actor(model, 300, bf16=bf16)
    obs = torch.randn(4, 300, OBS_DIM, device="cuda")
    first = None
    for _ in range(100):
        actor.reset()
        out = torch.stack([actor.act(x) for x in obs])
        first = out if first is None else first
        assert torch.equal(out, first)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_gpu_graph_equals_launches(bf16):
    model = make_model(config(context="states_actions", dim=128, window=4, n_layers=2)).cuda()
    plain, graph = device_actor(model, 20, bf16=bf16), device_actor(model, 20, bf16=bf16, cuda_graph=True)
    for t, x in enumerate(torch.randn(12, 20, OBS_DIM, device="cuda")):
        if t == 5:
            for actor in (plain, graph):
                actor.reset(torch.arange(20) % 3 == 0, random_seeds(20, model.config, seed=9))
        if t == 8:
            with torch.no_grad():
                model.decoder.head.bias.add_(0.5)
        assert torch.equal(plain.act(x), graph.act(x))
    assert ops.dispatch_counts() == {("decode_step", "triton"): 24}


@pytest.mark.gpu
def test_gpu_numpy_and_tensors_agree_and_nothing_waits():
    model = make_model(config(context="states", dim=64)).cuda()
    actor, again = device_actor(model, 3), device_actor(model, 3)
    obs = np.random.default_rng(0).normal(size=(5, 3, OBS_DIM))
    for x in obs:
        action = actor.act(x)
        assert isinstance(action, np.ndarray)
        on_device = torch.from_numpy(x).to("cuda", torch.float32)
        torch.cuda.synchronize()
        with torch.cuda.device("cuda"):
            torch.cuda.set_sync_debug_mode("error")
            try:
                out = again.act(on_device)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        np.testing.assert_array_equal(action, out.cpu().numpy())
