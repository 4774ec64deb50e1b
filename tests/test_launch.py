"""Launches as values, and choices: what all Triton kernels share."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_fixtures import assert_fits, far_apart, resources

from gac_fast import ops
from gac_fast.kernels import _launch
from gac_fast.kernels._launch import Launch, Option, choose


@triton.jit
def scale_kernel(p_x, p_out, n, factor, p_bias, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + offsets, mask=offsets < n)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    if p_bias is not None:
        b_x += tl.load(p_bias)
    tl.store(p_out + offsets, b_x * factor, mask=offsets < n)


def launch(x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None, block: int = 64) -> Launch:
    option = Option((("BLOCK", block),), 4, 2)
    grid = (triton.cdiv(x.numel(), block),)
    arguments = {"p_x": x, "p_out": out, "n": x.numel(), "factor": 2.5, "p_bias": bias}
    return Launch(scale_kernel, grid, arguments, {"UPCAST": True}, option)


def test_interpreter_runs_a_launch(run_interpreted):
    run_interpreted(__file__, "interpreter and not slow")


@pytest.mark.slow
def test_interpreter_runs_many_rows(run_interpreted):
    run_interpreted(__file__, "interpreter and slow")


@pytest.mark.interpreter
@pytest.mark.parametrize("bias", [None, torch.tensor([3.0])], ids=["none", "bias"])
def test_interpreted_launch(bias):
    x, out = torch.randn(100), torch.full((100,), torch.nan)
    launch(x, out, bias).run()
    torch.testing.assert_close(out, 2.5 * (x if bias is None else x + 3))


def calls_of_ops(op: str, far: Any) -> Any:
    """Results of an op for tensors as ``far`` lays out their rows."""
    from core_fixtures import make_model, model_config, random_seeds
    from test_block import block_inputs
    from test_decode_step import OBS_DIM, make_state
    from test_plan_ascent import Sizes, random_case
    from test_plan_attention import inputs
    from test_window_attention import packed

    generator = torch.Generator().manual_seed(0)
    # Rows that are 2^20 elements or more apart are copied first.
    many = (2060,)
    if op == "window_attention":
        *qkv, cu, positions = packed(many, 1, 8, torch.float32)
        return ops.window_attention(*far(torch.stack(qkv, 1), (1 << 20) - 16).unbind(1), cu, 3, positions)
    if op == "plan_attention":
        q, k, v, cu = inputs(many, 1, 1, 8, torch.float32)
        return ops.plan_attention(far(q, (1 << 20) - 16), k, v, cu)
    if op == "decoder_block":
        x, attended, plan, cu, weights, _ = block_inputs((3, 2), dim=16, heads=1, n_z=1, hidden=8, n_next=6)
        x, attended = (far(t, 1 << 30) for t in (x, attended))
        return torch.cat(ops.decoder_block(x, attended, *plan.unbind(2), cu, weights), 1)
    if op == "plan_ascent":
        prior, returns, z0, _ = random_case(Sizes(4, n_z=1, dim=8, hidden_u=4, hidden1=4, hidden2=4))
        return ops.plan_ascent(prior, returns, far(z0, 1 << 30), n_steps=1, step_size=0.1)[0]
    if op == "decode_step":
        model = make_model(model_config(dim=64, n_heads=4, n_layers=1))
        state = make_state(model, random_seeds(4, model.config))
        observations = far(torch.randn(4, OBS_DIM, generator=generator), 1 << 30)
        return ops.decode_step(model.decoder.step_weights(), state, observations)
    out = far(torch.zeros(4, 8), 1 << 30)
    from gac_fast.kernels.philox_normal import philox_normal

    philox_normal((1, 2), torch.arange(4), torch.zeros(4, dtype=torch.int64), out)
    return out


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "op",
    [
        *(pytest.param(op, marks=pytest.mark.slow) for op in ("window_attention", "plan_attention")),
        "decoder_block", "plan_ascent", "decode_step", "philox_normal",
    ],
)  # fmt: skip
def test_interpreted_rows_beyond_two_to_the_31(op, tmp_path):
    with ops.backend("triton"), torch.no_grad():
        near = calls_of_ops(op, lambda x, stride: x)
        far = calls_of_ops(op, lambda x, stride: far_apart(x, stride, tmp_path))
    assert near.abs().sum(-1).all()
    assert torch.equal(far, near)


def test_a_grid_of_nothing_starts_nothing():
    launch(torch.empty(0), torch.empty(0)).run()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_launch_compiles_without_a_gpu(architecture, device, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.empty(4096, dtype=torch.bfloat16, device=device)
    found = assert_fits(launch(x, torch.empty_like(x)), architecture, tmp_path)
    assert 0 < found.registers <= 255


def test_aligned_arguments_are_compiled_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.empty(4097, dtype=torch.float32)
    wide = launch(x[:4096], torch.empty(4096), block=512).compile(90).asm["ptx"]
    narrow = launch(x[1:], torch.empty(4096), block=512).compile(90).asm["ptx"]
    assert "ld.global.v4" in wide
    assert "ld.global.v4" not in narrow


@triton.jit(do_not_specialize=["n_plain"])
def sizes_kernel(p_x, n_one, n_sixteen, n_plain):
    tl.store(p_x, n_one + n_sixteen + n_plain)


def test_numbers_are_compiled_as_the_launcher_specialises_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def code(**numbers: int) -> str:
        x = torch.empty(16, dtype=torch.int32, device="meta")
        launched = Launch(sizes_kernel, (1,), {"p_x": x, **numbers}, {}, Option((), 4, 1))
        return str(launched.compile(90).asm["ttir"]).split(") attributes")[0].split("tt.func")[1]

    plain = code(n_one=3, n_sixteen=5, n_plain=7)
    assert all(f"%{name}: i32" in plain for name in ("n_one", "n_sixteen", "n_plain"))
    special = code(n_one=1, n_sixteen=32, n_plain=16)
    assert "%n_one" not in special
    assert "%n_sixteen: i32 {tt.divisibility = 16" in special
    assert "%n_plain: i32 {" not in special
    assert code(n_one=3, n_sixteen=5, n_plain=1) == plain


def test_spills_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    big = outer_launch()
    assert resources(big, 90, tmp_path).stack + resources(big, 90, tmp_path).local > 0
    with pytest.raises(AssertionError, match="outer_kernel"):
        assert_fits(big, 90, tmp_path)


@triton.jit
def outer_kernel(p_x, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    b = b_x[:, None] * b_x[None, :]
    b += tl.sqrt(b)
    tl.store(p_out + o[:, None] * BLOCK + o[None, :], b * tl.sum(b))


def outer_launch() -> Launch:
    x = torch.empty(256, device="meta")
    return Launch(outer_kernel, (1,), {"p_x": x, "p_out": torch.empty(256, 256, device="meta")}, {},
                  Option((("BLOCK", 256),), 4, 1))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Which of a few options

OPTIONS = [Option((("BLOCK", size),), 4, 2) for size in (64, 128, 256)]
TIMES = dict(zip(OPTIONS, (3.0, 1.0, 2.0), strict=True))


class FakeDevices:
    """Two CUDA devices, the second faster or slower than the first, and a clock that knows which one is current."""

    def __init__(self, monkeypatch, names=("H100", "H200")):
        self.current, self.timed, self.capturing = 0, [], False
        monkeypatch.setattr(_launch, "INTERPRETED", False)
        monkeypatch.setattr(_launch, "_chosen", {})
        monkeypatch.setattr(torch.cuda, "device", self.guard)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(_launch, "_milliseconds", self.clock)

    @contextlib.contextmanager
    def guard(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def clock(self, launches):
        (option,) = launches
        self.timed.append((self.current, option))
        return TIMES[option] if self.current == 0 else -TIMES[option]


def choose_on(device: str, key: str = "key") -> Option:
    return choose(key, lambda option: [option], OPTIONS, torch.device(device))


def test_options_are_timed_on_the_device_of_the_tensors_once(monkeypatch):
    devices = FakeDevices(monkeypatch)
    assert choose_on("cuda:1") == OPTIONS[0]
    assert devices.timed == [(1, option) for option in OPTIONS]
    assert devices.current == 0
    assert choose_on("cuda:0") == OPTIONS[1]
    assert devices.timed[3:] == [(0, option) for option in OPTIONS]
    assert (choose_on("cuda:1"), choose_on("cuda:0")) == (OPTIONS[0], OPTIONS[1])
    assert len(devices.timed) == 6
    choose_on("cuda:1", "another key")
    assert len(devices.timed) == 9


def test_devices_of_one_name_share_a_choice(monkeypatch):
    devices = FakeDevices(monkeypatch, ("H100", "H100"))
    assert choose_on("cuda:1") == choose_on("cuda:0") == OPTIONS[0]
    assert len(devices.timed) == 3


def test_nothing_is_timed_during_a_capture_nor_off_the_gpu(monkeypatch):
    devices = FakeDevices(monkeypatch)
    devices.capturing = True
    assert choose_on("cuda:0") == OPTIONS[0]
    devices.capturing = False
    assert choose_on("cpu") == OPTIONS[0]
    assert choose("one", lambda option: [option], OPTIONS[1:2], torch.device("cuda:0")) == OPTIONS[1]
    assert devices.timed == []
    # A capture leaves no choice behind.
    assert choose_on("cuda:0") == OPTIONS[1]


def test_options_that_add_in_another_order_are_not_offered():
    other = Option((("BLOCK", 64),), 8, 2)
    with pytest.raises(ValueError, match="options: expected the same number of warps"):
        choose("key", lambda option: [option], [*OPTIONS, other], torch.device("cpu"))


def order_of_sums(launch: Launch, architecture: int) -> Counter:
    """How the sums and products of a kernel are laid out over threads, the number of rows left aside."""
    ir = str(launch.compile(architecture).asm["ttgir"])
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ir, re.MULTILINE))
    types = re.findall(r'"tt\.reduce"\(.*\n(?:(?!.*"tt\.reduce").*\n)*?\s*\}\) : \((.*?)\) ->', ir)
    types += re.findall(r"(?:ttng\.warp_group_dot|tt\.dot) .* : (.*)$", ir, re.MULTILINE)
    assert ir.count('"tt.reduce"') + len(re.findall(r"(?:warp_group_dot|tt\.dot) ", ir)) == len(types)

    def without_rows(kind: str) -> str:
        kind = re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), kind)
        kind = re.sub(r"<(64|128)x", "<Rx", re.sub(r" loc\(.*|, mutable", "", kind))
        # Registers that hold further rows.
        return re.sub(r", \[64(, 0)+\]", "", kind)

    return Counter(map(without_rows, types))


def timed_together(op: str) -> list[Launch]:
    from gac_fast.kernels import block, plan_attention

    if op == "block":
        found = block.shipped(64, 4, 4, torch.bfloat16)
        return [one for one in found if one.name == "forward_kernel" and one.arguments["p_normed"] is not None]
    return [one for one in plan_attention.shipped(128, 4, 4, torch.bfloat16) if one.name == f"{op}_kernel"]


@pytest.mark.parametrize(("op", "count"), [("block", 2), ("plan_attention", 2)])
def test_timed_options_add_in_one_order(op, count, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    launches = timed_together(op)
    assert len(launches) == count
    first = order_of_sums(launches[0], 90)
    assert first.total() > 0
    for other in launches[1:]:
        assert order_of_sums(other, 90) == first, other.option


def test_another_order_of_sums_is_seen(tmp_path, monkeypatch):
    from gac_fast.kernels import block

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    narrow, wide = (block._option(bt, 64, 32, 64, warps, 2) for bt, warps in ((64, 4), (128, 8)))
    (launch,) = [
        one for one in block.shipped(128, 4, 4, torch.bfloat16) if one.name == "forward_kernel"
        and one.arguments["p_normed"] is not None
    ]  # fmt: skip
    assert order_of_sums(replace(launch, option=narrow), 90) != order_of_sums(replace(launch, option=wide), 90)
