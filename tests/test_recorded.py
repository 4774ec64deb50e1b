"""Updates of few sizes for compilers and graphs: filled-up batches, nothing read back, compiled, recorded."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from model_fixtures import ACT_DIM, OBS_DIM, make_batch, make_model, model_config
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gac_fast import ops, reference
from gac_fast.config import Config, PosteriorConfig, TrainConfig, preset
from gac_fast.errors import EngineWarning
from gac_fast.model import GAC, Batch
from gac_fast.ops import _dispatch
from gac_fast.posterior import PosteriorState
from gac_fast.train import recorded
from gac_fast.train.recorded import N_PLAIN, RecordedUpdate
from gac_fast.train.update import (
    compiled,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    parts_of,
    records,
    set_learning_rate,
    update,
)

N_CHAINS = 6


class Parts(NamedTuple):
    """All that an update moves."""

    model: GAC
    optimizer: torch.optim.Optimizer
    posterior: PosteriorState
    config: Config

    def run(self, batch: Batch, rows: Tensor, parts: Any = None, infer: bool = True) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return update(self.model, self.optimizer, self.posterior, batch, rows, self.config, parts, infer)

    def all(self) -> dict[str, Tensor]:
        return {
            **{name: p.detach().clone() for name, p in self.model.named_parameters()},
            **{f"{name}.grad": p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None},
            **{f"posterior.{name}": x.clone() for name, x in self.posterior.tensors.items()},
        }


def make(
    method: str = "langevin", dtype: torch.dtype = torch.float32, device: str = "cpu", train: Any = None, **model: Any
) -> Parts:
    config = Config(
        model=model_config(**{"return_dropout": 0.0, **model}), posterior=PosteriorConfig(method=method),
        train=TrainConfig(**{"learning_rate": 1e-2, **(train or {})}),
    )  # fmt: skip
    net = make_model(config.model, dtype=dtype).to(device)
    m = config.model
    posterior = PosteriorState(config.posterior, N_CHAINS, m.n_z, m.dim, 0, torch.device(device))
    for x in (posterior._memory, posterior.tensors):
        x.update({name: value.to(dtype) for name, value in x.items() if value.is_floating_point()})
    posterior.tensors.update({name: x[: 2 * N_CHAINS] for name, x in posterior._memory.items()})
    return Parts(net, make_optimizer(net, config.train), posterior, config)


def plain_batch(lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Batch, Tensor]:
    """The last chain sees tau alone."""
    b = len(lengths)
    batch = make_batch(lengths, dtype=dtype, seed=seed, has_return=[True] * (b - 1) + [False])
    dropped = torch.arange(sum(lengths)) % 3 == 0
    return batch._replace(dropped=dropped), torch.tensor([*range(b - 1), 2 * N_CHAINS - 1])


def fill_up(batch: Batch, rows: Tensor, n: int, b: int) -> tuple[Batch, Tensor]:
    """To n steps and b trajectories, with values that would show."""

    def wide(x: Tensor, size: int, value: float) -> Tensor:
        return torch.cat((x, torch.full((size - len(x), *x.shape[1:]), value).to(x.dtype)))

    was_n, was_b = len(batch.positions), len(batch.returns)
    cu = torch.tensor([*batch.cu_seqlens.tolist(), *[was_n] * (b - was_b - 1), n], dtype=torch.int32)
    filled = Batch(
        wide(batch.observations, n, 3.0), wide(batch.actions, n, 0.7), cu,
        torch.cat((batch.positions, torch.arange(n - was_n))), wide(batch.sequence, n, b - 1),
        wide(batch.returns, b, 9.0), wide(batch.has_return, b, 0), wide(batch.has_label, b, 0),
        None if batch.dropped is None else wide(batch.dropped, n, 0), torch.arange(b) < was_b,
    )  # fmt: skip
    return filled, wide(rows, b, 2 * N_CHAINS)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# Filled-up batches


@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize("method", ["langevin", "variational"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_fills_a_batch_up_changes_nothing(method, context, dtype):
    fields = {"context": context, "return_ensemble": 2, "return_context": "first_state"}
    if context == "states_actions":
        fields["action_token_dropout"] = 0.3
    batch, rows = plain_batch([5, 9, 1, 7], dtype)
    expected, filled = make(method, dtype, **fields), make(method, dtype, **fields)
    before = filled.all()
    spare = {name: x[2 * N_CHAINS].clone() for name, x in filled.posterior._memory.items()}
    values = expected.run(batch, rows)
    # Rounding of sums of another length aside: the work is the same.
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-5}
    assert_same(filled.run(*fill_up(batch, rows, 40, 7)), values, **tolerance)
    # Adam's first step is the sign of the gradient, in which float32 shows its rounding: the gradients are held.
    held = (lambda name: True) if dtype == torch.float64 else (lambda name: ".grad" in name or "posterior" in name)
    one, other = ({name: x for name, x in parts.all().items() if held(name)} for parts in (filled, expected))
    assert_same(one, other, **tolerance)
    assert not torch.equal(filled.all()["decoder.head.weight"], before["decoder.head.weight"])
    for name, x in spare.items():
        assert torch.equal(filled.posterior._memory[name][2 * N_CHAINS], x), name


def test_a_batch_of_one_more_step_is_filled_up_too():
    batch, rows = plain_batch([5, 9])
    one, other = make(), make()
    one.run(batch, rows)
    other.run(*fill_up(batch, rows, 15, 3))
    assert_same(other.all(), one.all(), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is read back. Tensors of the meta device hold no data: whoever asks for a value, a count or a copy fails.


@pytest.fixture
def meta_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused optimiser, and the model without autocast, on the meta device, which stands for a GPU."""
    from torch.optim import optimizer

    supported = optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*supported, "meta"])
    # It has no kernel for the meta device where the learning rate is a tensor.
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *_, **__: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def on_meta(batch: Batch, rows: Tensor) -> tuple[Batch, Tensor]:
    return Batch(*(None if x is None else x.to("meta") for x in batch)), rows.to("meta")


class NothingSent(TorchDispatchMode):
    """Fails where memory of the host is copied to the device: it would wait there, and no graph could record it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sources = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device.type == "cpu"]
        # Numbers reach kernels as arguments.
        if "copy" in func.__name__ or any(x.ndim > 0 for x in sources):
            assert not sources, f"{func} reads memory of the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("meta_fused")
@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize("method", ["langevin", "variational"])
@pytest.mark.parametrize("engine", ["reference", "triton"])
def test_an_update_reads_nothing_back(engine, method, context, monkeypatch):
    if engine == "triton":
        # Their fakes, which say what the kernels give back: nothing runs.
        monkeypatch.setattr(_dispatch, "_triton_problem", lambda device: None)
    one = make(method, device="meta", train={"cuda_graph": "on"}, context=context, return_dropout=0.3)
    batch, rows = fill_up(*plain_batch([5, 9, 1, 7]), 40, 7)
    if context == "states":
        batch = batch._replace(dropped=None)
    batch, rows = on_meta(batch, rows)
    with NothingSent():
        for _ in range(2):
            set_learning_rate(one.optimizer, 1e-3)
            values = one.run(batch, rows)
    assert all(x.device.type == "meta" and x.ndim == 0 for x in values.values())
    assert {backend for _, backend in ops.dispatch_counts()} <= {engine, "reference"}


@pytest.mark.usefixtures("meta_fused")
@pytest.mark.parametrize(
    "read",
    [lambda x: float(x.detach()), lambda x: x.cpu(), lambda x: (x > 0).nonzero(), lambda x: x[x > 0], bool],
    ids=["float", "copy", "nonzero", "mask", "bool"],
)
def test_that_proof_can_fail(read, monkeypatch):
    monkeypatch.setattr(Batch, "mean_of_steps", lambda batch, x: (read(x.sum()), x.mean())[1])
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta tensor|register_meta"):
        make(device="meta").run(*on_meta(*plain_batch([5, 9])))


@pytest.mark.usefixtures("meta_fused")
def test_that_proof_of_copies_can_fail(monkeypatch):
    monkeypatch.setattr(Batch, "mean_of_steps", lambda batch, x: x.mean() * torch.tensor([1.0]).to(x.device).sum())
    with NothingSent(), pytest.raises(AssertionError, match="reads memory of the host"):
        make(device="meta").run(*on_meta(*plain_batch([5, 9])))


class Memory(TorchDispatchMode):
    """Bytes of tensors alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._free, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        return out


def peak_memory(engine: str, context: str, b: int, t: int, config: Config) -> float:
    """GiB of a whole update of b episodes of t steps in bfloat16, counted on tensors without data."""
    config = config.replace(model={"context": context})
    with FakeTensorMode(), ops.backend(engine), Memory() as memory:
        model = GAC(config.model, 17, 6)
        model.bf16 = True
        posterior = PosteriorState(config.posterior, b, config.model.n_z, config.model.dim, 0, torch.device("cpu"))
        n = b * t
        batch = Batch(
            torch.empty(n, 17), torch.empty(n, 6), torch.empty(b + 1, dtype=torch.int32),
            torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64), torch.empty(b),
            torch.empty(b, dtype=torch.bool), torch.empty(b, dtype=torch.bool),
        )  # fmt: skip
        optimizer = make_optimizer(model, config.train)
        for _ in range(2):
            update(model, optimizer, posterior, batch, torch.empty(b, dtype=torch.int64), config)
    return memory.peak / 2**30


@pytest.mark.parametrize("engine", ["reference", "triton"])
def test_an_update_of_half_a_million_steps_fits_40_gib(engine, monkeypatch):
    monkeypatch.setattr(reference, "_may_read", lambda x: False)
    if engine == "triton":
        # An op without such an engine runs on the reference.
        monkeypatch.setattr(_dispatch, "_triton_problem", lambda device: None)
        monkeypatch.setattr(_dispatch, "problem", lambda op, name, device: None)
        select = _dispatch._select
        monkeypatch.setattr(
            _dispatch, "_select",
            lambda op, *rest: select(op, *rest) if "triton" in _dispatch._engines[op] else "reference",
        )  # fmt: skip
    gigabytes = peak_memory(engine, "states_actions", 500, 1000, preset("gym"))
    assert 1 < gigabytes < 40, gigabytes


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.fixture
def counting_backend() -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


@pytest.mark.parametrize("context", [pytest.param("states", marks=pytest.mark.slow), "states_actions"])
def test_a_compiled_update_is_the_same_and_made_once_per_size(context, counting_backend):
    one, other = make(context=context), make(context=context)
    parts = compiled(parts_of(other.model, other.config), backend=counting_backend)
    frames = []
    for seed, n in enumerate((40, 44, 40, 44)):
        batch, rows = plain_batch([5, 9, 1, 7 + seed], seed=seed)
        if context == "states":
            batch = batch._replace(dropped=None)
        batch, rows = fill_up(batch, rows, n, 7)
        values = one.run(batch, rows)
        assert_same(other.run(batch, rows, parts), values, rtol=1e-4, atol=1e-6)
        frames.append(counting_backend.frame_count)

    def told_apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the biases of plan keys: a softmax does not see them, and Adam takes the sign of a rounding error."""
        return {name: x[len(x) // 2 :] if name.endswith("plan_kv.bias") else x for name, x in state.items()}

    assert_same(told_apart(other.all()), told_apart(one.all()), rtol=1e-3, atol=1e-5)
    # Trunk, energy and losses, for each of two sizes.
    assert frames == [3, 6, 6, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Recorded


@pytest.fixture
def pretended_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """CUDA graphs without CUDA: recording runs nothing, and replaying runs it on the memory it was recorded with."""
    replays = []

    def record(run: Callable[[], Tensor], n_values: int, device: torch.device, pool: object) -> Any:
        out = torch.full((n_values,), torch.nan)

        def replay() -> None:
            replays.append(out)
            out.copy_(run())

        return replay, out

    monkeypatch.setattr(recorded, "plainly", lambda run, device: run())
    monkeypatch.setattr(recorded, "make_pool", lambda: object())
    monkeypatch.setattr(recorded, "record", record)
    return replays


def test_a_recorded_update_is_the_same_for_every_size(pretended_graphs):
    one, other = make(train={"cuda_graph": "on"}), make(train={"cuda_graph": "on"})
    run = RecordedUpdate(other.run)
    kept = []
    for number in range(12):
        batch, rows = fill_up(*plain_batch([5, 9, 1, 7], seed=number), 40 if number % 2 else 44, 7)
        for parts in (one, other):
            set_learning_rate(parts.optimizer, 0.01 / (number + 1))
        expected, values = one.run(batch, rows), run(batch, rows)
        assert_same(values, expected, rtol=0, atol=0)
        kept.append((expected, values))
        # Every call is one update, the recorded one as well.
        assert_same(other.all(), one.all(), rtol=0, atol=0)
    assert len(pretended_graphs) == 12 - 2 * N_PLAIN
    assert run.n_recordings == 2
    # What a replay gave is not written over by the next.
    for expected, values in kept:
        assert_same(values, expected, rtol=0, atol=0)
    run.forget()
    assert run.n_recordings == 0
    run(batch, rows)
    assert len(pretended_graphs) == 12 - 2 * N_PLAIN


def test_replays_count_as_changes_and_old_recordings_give_way(pretended_graphs, monkeypatch):
    monkeypatch.setattr(recorded, "MOST_RECORDINGS", 2)
    one = make(train={"cuda_graph": "on"})
    weight = next(one.model.parameters())
    moved = list(one.model.parameters())
    run = RecordedUpdate(lambda batch, rows, infer: {"loss": torch.zeros(())}, moved)
    for size, left in ((40, 1), (44, 2), (48, 1)):
        batch, rows = fill_up(*plain_batch([5, 9, 1, 7]), size, 7)
        for _ in range(N_PLAIN):
            run(batch, rows)
        before = weight._version
        run(batch, rows)
        assert weight._version > before
        assert run.n_recordings == left


def test_a_recording_that_fails_leaves_plain_updates_or_the_error(pretended_graphs, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recorded, "record", fails)
    one, other = make(train={"cuda_graph": "on"}), make(train={"cuda_graph": "on"})
    run = RecordedUpdate(other.run, list(other.model.parameters()), may_fail=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", EngineWarning)
        for number in range(N_PLAIN + 3):
            batch, rows = fill_up(*plain_batch([5, 9, 1, 7], seed=number), 40, 7)
            assert_same(run(batch, rows), one.run(batch, rows), rtol=0, atol=0)
    assert_same(other.all(), one.all(), rtol=0, atol=0)
    told = [str(warning.message) for warning in said if warning.category is EngineWarning]
    assert [
        text for text in told if "go on without a CUDA graph" in text and text.endswith("CUDA out of memory")
    ] == told
    assert len(told) == 1
    assert run.n_recordings == 0
    strict = RecordedUpdate(other.run)
    for _ in range(N_PLAIN):
        strict(batch, rows)
    with pytest.raises(torch.OutOfMemoryError):
        strict(batch, rows)


def test_the_learning_rate_of_a_recorded_update_stays_where_it_is():
    one = make(train={"cuda_graph": "on"})
    rates = [group["lr"] for group in one.optimizer.param_groups]
    assert all(isinstance(rate, Tensor) for rate in rates)
    set_learning_rate(one.optimizer, 0.25)
    assert all(group["lr"] is rate for group, rate in zip(one.optimizer.param_groups, rates, strict=True))
    assert [float(rate) for rate in rates] == [0.25, 0.25]


@pytest.mark.parametrize("before", ["off", "on"])
@pytest.mark.parametrize("after", ["off", "on"])
def test_the_optimisers_state_goes_between_recorded_and_plain_runs(before, after):
    batch, rows = plain_batch([5, 9, 1, 7])
    batch = batch._replace(dropped=None)
    one, other = make(train={"cuda_graph": before}), make(train={"cuda_graph": after})
    set_learning_rate(one.optimizer, 0.005)
    one.run(batch, rows)
    state = copy.deepcopy(optimizer_state(one.optimizer))
    assert all(isinstance(group["lr"], float) for group in state["param_groups"])
    own = [group["lr"] for group in other.optimizer.param_groups]
    load_optimizer_state(other.optimizer, state)
    other.model.load_state_dict(one.model.state_dict())
    for x, y in zip(one.posterior._memory.values(), other.posterior._memory.values(), strict=True):
        y.copy_(x)
    for group, mine in zip(other.optimizer.param_groups, own, strict=True):
        assert group["capturable"] == (after == "on")
        assert (group["lr"] is mine) or after == "off"
        assert float(group["lr"]) == pytest.approx(0.005)
    one.run(batch, rows), other.run(batch, rows)
    assert_same(other.all(), one.all(), rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# On a device


def test_updates_are_recorded_by_themselves_where_a_gpu_has_run_them():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    usual = Config()
    assert usual.train.cuda_graph == "auto"
    assert records(usual, cuda)
    assert not records(usual, cpu)
    assert not records(usual.replace(train={"cuda_graph": "off"}), cuda)
    for fields in ({"posterior": {"method": "variational"}}, {"baseline": {"method": "bc"}}):
        assert not records(usual.replace(**fields), cuda)
        assert records(usual.replace(**fields, train={"cuda_graph": "on"}), cuda)
    model = make_model(model_config())
    for is_recorded in (False, True):
        optimizer = make_optimizer(model, usual.train, is_recorded)
        assert all(isinstance(group["lr"], Tensor) == is_recorded for group in optimizer.param_groups)


def to_device(batch: Batch, rows: Tensor) -> tuple[Batch, Tensor]:
    return Batch(*(None if x is None else x.cuda() for x in batch)), rows.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("compile_too", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("context", ["states", "states_actions"])
def test_recorded_on_a_device(context, compile_too):
    train = {"cuda_graph": "on"}
    one, other = (make(device="cuda", train=train, context=context) for _ in range(2))
    torch._dynamo.reset()
    parts = compiled(parts_of(other.model, other.config)) if compile_too else None
    run = RecordedUpdate(lambda batch, rows, infer: update(*other[:3], batch, rows, other.config, parts, infer))
    for number in range(10):
        batch, rows = plain_batch([5, 9, 1, 7], seed=number)
        if context == "states":
            batch = batch._replace(dropped=None)
        batch, rows = to_device(*fill_up(batch, rows, 40 if number % 2 else 44, 7))
        for parts_of_one in (one, other):
            set_learning_rate(parts_of_one.optimizer, 0.01 / (number + 1))
        expected = update(*one[:3], batch, rows, one.config)
        assert_same(run(batch, rows), expected, rtol=2e-3, atol=1e-4)
    assert run.n_recordings == 2
    error = (one.posterior.z0 - other.posterior.z0).square().mean().sqrt()
    assert float(error) < 1e-3


@pytest.mark.gpu
def test_an_update_on_a_device_waits_for_nothing():
    one = make(device="cuda", train={"cuda_graph": "on"}, return_dropout=0.3)
    batch, rows = to_device(*fill_up(*plain_batch([5, 9, 1, 7]), 40, 7))
    one.run(batch._replace(dropped=None), rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        set_learning_rate(one.optimizer, 1e-3)
        update(*one[:3], batch._replace(dropped=None), rows, one.config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sizes_are_those_of_the_fixtures():
    batch, _ = plain_batch([5, 9])
    assert batch.observations.shape == (14, OBS_DIM)
    assert batch.actions.shape == (14, ACT_DIM)
