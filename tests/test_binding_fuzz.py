"""Whatever comes in, the C++ engine and the ops on it raise an error that names the argument, or return; never a crash.

A target is a function with good arguments; hypothesis damages one to three of them. Each target runs in a process of
its own (this file as a script), so that a crash is a failure like any other, with its last call shown. A new function
of the engine needs an entry in TARGETS.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

Draw = Callable[[st.SearchStrategy], Any]
Arguments = dict[str, Any]

SEED = 20240607
EXAMPLES = 60
WORD = 2**32


@dataclass(frozen=True)
class Target:
    good: Callable[[Draw], Arguments]
    """Arguments that the function takes as they are."""
    kept: frozenset[str] = frozenset()
    """Arguments left alone: a huge value is allowed, and would take hours or all memory."""


# ---------------------------------------------------------------------------------------------------------------------
# Good arguments


def size(draw: Draw, low: int = 1, high: int = 9) -> int:
    return draw(st.integers(low, high))


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def offsets(draw: Draw, n: int, dtype: type = np.int64) -> np.ndarray:
    inner = draw(st.lists(st.integers(0, n), max_size=4))
    return np.array([0, *sorted(inner), n], dtype)


def gemm(draw: Draw) -> Arguments:
    m, n_out, n_in = size(draw, 0, 40), size(draw, 0, 40), size(draw, 0, 40)
    transposed = draw(st.booleans())
    return {
        "x": floats(m, n_in),
        "w": floats(n_in, n_out) if transposed else floats(n_out, n_in),
        "bias": draw(st.sampled_from([None, floats(n_out)])),
        "y": floats(m, n_out),
        "transposed": transposed,
        "add": draw(st.booleans()),
        "bf16": draw(st.booleans()),
        "repeats": 1,
    }


def philox(dtype: type) -> Callable[[Draw], Arguments]:
    def good(draw: Draw) -> Arguments:
        p, n = size(draw, 0), size(draw, 0, 20)
        return {
            "seed0": 1,
            "seed1": WORD - 1,
            "plans": np.arange(p),
            "step": np.arange(p) + WORD - 10,
            "out": np.zeros((p, n), dtype),
        }

    return good


def trajectories(draw: Draw) -> Arguments:
    n = size(draw, 0, 12)
    cu = offsets(draw, n)
    indices = draw(st.lists(st.integers(0, len(cu) - 2), max_size=5))
    return {
        "observations": floats(n, size(draw, 1, 4)),
        "actions": floats(n, size(draw, 1, 3)),
        "cu_seqlens": cu,
        "indices": np.array(indices, np.int64),
    }


def pack_batch(draw: Draw) -> Arguments:
    arguments = trajectories(draw)
    n = int(np.diff(arguments["cu_seqlens"])[arguments["indices"]].sum())
    return {
        **arguments,
        "out_observations": floats(n, arguments["observations"].shape[1]),
        "out_actions": floats(n, arguments["actions"].shape[1]),
        "out_cu_seqlens": np.zeros(len(arguments["indices"]) + 1, np.int32),
    }


def packed_length(draw: Draw) -> Arguments:
    arguments = trajectories(draw)
    return {
        "cu_seqlens": arguments["cu_seqlens"],
        "indices": arguments["indices"],
        "n_steps": arguments["observations"].shape[0],
    }


def parallel_for(draw: Draw) -> Arguments:
    counts = np.zeros((size(draw, 0), size(draw, 0)), np.int64)
    return {"counts": counts, "n_threads": size(draw, 0, 3), "work_us": 0, "fail_at": -1, "repeats": 2}


def heads(draw: Draw, *shape: int, bf16: bool) -> np.ndarray:
    x = floats(*shape)
    return (x.view(np.int32) >> 16).astype(np.int16) if bf16 else x


def window_attention(draw: Draw) -> Arguments:
    n, h, d, bf16 = size(draw, 0, 12), size(draw, 1, 3), draw(st.sampled_from([8, 10, 16])), draw(st.booleans())
    x = [heads(draw, n, h, d, bf16=bf16) for _ in range(4)]
    return {
        "q": x[0],
        "k": x[1],
        "v": x[2],
        "cu_seqlens": offsets(draw, n, draw(st.sampled_from([np.int32, np.int64]))),
        "window": size(draw, 1, 20),
        "positions": draw(st.sampled_from([None, np.arange(n), np.arange(n, dtype=np.int32)])),
        "rope_base": 100.0,
        "out": x[3],
        "softmax": floats(2, h, n),
        "n_threads": size(draw, 1, 2),
    }


def plan_attention(draw: Draw) -> Arguments:
    n, h, d, bf16 = size(draw, 0, 12), size(draw, 1, 3), draw(st.sampled_from([8, 10, 16])), draw(st.booleans())
    cu = offsets(draw, n)
    plans = [heads(draw, len(cu) - 1, size(draw, 1, 5), h, d, bf16=bf16)] * 2
    return {
        "q": heads(draw, n, h, d, bf16=bf16),
        "k": plans[0],
        "v": plans[1],
        "cu_seqlens": cu,
        "out": heads(draw, n, h, d, bf16=bf16),
        "n_threads": size(draw, 1, 2),
    }


def with_gradients(good: Callable[[Draw], Arguments], *names: str) -> Callable[[Draw], Arguments]:
    """Arguments of the backward: those of the forward, the gradient of `out`, and room for the others."""

    def backward(draw: Draw) -> Arguments:
        arguments = good(draw)
        arguments["d_out"] = arguments.pop("out")
        return {**arguments, **{f"d_{name}": arguments[name].copy() for name in names}}

    return backward


def plan_steps(langevin: bool) -> Callable[[Draw], Arguments]:
    def good(draw: Draw) -> Arguments:
        p, n_z, dim, hidden, e, n_obs = (size(draw, 1, 4) for _ in range(6))
        d = n_z * dim
        with_context = draw(st.booleans())
        n_in = d + (n_obs if with_context else 0)
        prior = [floats(hidden, d), floats(hidden), floats(d, hidden), floats(d)]
        arguments = {
            "prior_weights": draw(st.sampled_from([[], prior])),
            "return_weights": [
                floats(e, hidden, n_in), floats(e, hidden), floats(e, hidden, hidden), floats(e, hidden),
                floats(e, 2, hidden), floats(e, 2),
            ],
            "z0": floats(p, d),
            "context": floats(p, size(draw, 1, 2), n_obs) if with_context else None,
            "seeds": floats(p, d),
            "mean": floats(p),
            "std": floats(p),
            "dim": dim,
            "n_steps": size(draw, 0, 3),
            "step_size": 0.1,
            "bf16": draw(st.booleans()),
            "n_threads": size(draw, 1, 2),
        }  # fmt: skip
        if langevin:
            noise = {"seed0": 1, "seed1": 2, "plans": np.arange(p), "first_step": 0}
            return {**arguments, "target": floats(p), "max_drift_ratio": 2.0, **noise}
        return {**arguments, "kappa": 0.5, "prior_weight": 0.1, "radius": 1.0, "max_norm": 1.0}

    return good


def tensors(arguments: Arguments) -> Arguments:
    return {name: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def philox_op(draw: Draw) -> Arguments:
    arguments = tensors(philox(np.float32)(draw))
    return {"seed": (1, 2), **{k: arguments[k] for k in ("plans", "step", "out")}, "n": arguments["out"].shape[1]}


def window_op(draw: Draw) -> Arguments:
    names = ("q", "k", "v", "cu_seqlens", "window", "positions", "rope_base")
    arguments = tensors(window_attention(draw))
    return {name: as_bf16(arguments[name]) for name in names}


def plan_op(draw: Draw) -> Arguments:
    arguments = tensors(plan_attention(draw))
    return {name: as_bf16(arguments[name]) for name in ("q", "k", "v", "cu_seqlens")}


def as_bf16(x: Any) -> Any:
    return x.view(torch.bfloat16) if isinstance(x, Tensor) and x.dtype == torch.int16 else x


TARGETS: dict[str, Target] = {
    "_C._gemm": Target(gemm, kept=frozenset({"repeats"})),
    "_C._philox_normal": Target(philox(np.float32)),
    "_C._philox_words": Target(philox(np.int64)),
    "_C._packed_length": Target(packed_length),
    "_C._pack_batch": Target(pack_batch),
    "_C._parallel_for": Target(parallel_for, kept=frozenset({"work_us", "fail_at", "repeats"})),
    "_C._window_attention": Target(window_attention),
    "_C._window_attention_backward": Target(with_gradients(window_attention, "q", "k", "v")),
    "_C._plan_attention": Target(plan_attention),
    "_C._plan_attention_backward": Target(with_gradients(plan_attention, "q", "k", "v")),
    "_C._plan_ascent": Target(plan_steps(langevin=False), kept=frozenset({"n_steps", "n_threads"})),
    "_C._plan_langevin": Target(plan_steps(langevin=True), kept=frozenset({"n_steps", "n_threads"})),
    "ops.philox_normal": Target(philox_op, kept=frozenset({"seed", "n"})),
    "ops.pack_batch": Target(lambda draw: tensors(trajectories(draw))),
    "ops.window_attention": Target(window_op),
    "ops.plan_attention": Target(plan_op),
}
# No input to speak of.
WITHOUT_TARGET = {"_build_info", "_isa", "_isa_reason", "_isa_problems", "_use_isa"}

# ---------------------------------------------------------------------------------------------------------------------
# Damage

NUMBERS = [-1, 0, 1, 2, 7, 2**31 - 1, 2**31, WORD - 1, WORD, 2**63 - 1, -(2**63), 2**64, 0.5, -0.5, 1e300,
           float("nan"), float("inf"), None, "1", [], True]  # fmt: skip
INTEGERS = [-1, 0, 1, 7, 2**31, WORD, 2**63 - 1, -(2**63)]


def damaged(draw: Draw, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return damaged_array(draw, value)
    if isinstance(value, Tensor):
        return damaged_tensor(draw, value)
    if isinstance(value, list) and value:
        i = draw(st.integers(0, len(value) - 1))
        return draw(
            st.sampled_from([[*value[:i], damaged_array(draw, value[i]), *value[i + 1 :]], value[:i], [], None])
        )
    return draw(st.sampled_from(NUMBERS))


def damaged_array(draw: Draw, x: np.ndarray) -> Any:
    axis = draw(st.integers(0, max(0, x.ndim - 1)))
    match draw(st.sampled_from(range(17))):
        case 0:
            return x.astype(
                draw(st.sampled_from([">f4", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u4", "c8", "?", "O"]))
            )
        case 1:
            return x[None]
        case 2:
            return x.reshape(-1)
        case 3:
            return x.sum()
        case 4:
            return np.zeros(
                [draw(st.integers(0, 2 * n + 1)) if i == axis else n for i, n in enumerate(x.shape)], x.dtype
            )
        case 5:
            return np.zeros((0,) * x.ndim, x.dtype)
        case 6:
            return np.flip(x, axis)
        case 7:
            return np.broadcast_to(x[:1], x.shape) if x.ndim else x
        case 8:
            # All rows the same memory, and writeable.
            strides = [0 if i == axis else s for i, s in enumerate(x.strides)]
            return np.lib.stride_tricks.as_strided(x.copy(), x.shape, strides)
        case 9:
            far = np.zeros([n * 5 if i == axis else n for i, n in enumerate(x.shape)], x.dtype)
            return np.moveaxis(np.moveaxis(far, axis, 0)[::5], 0, axis)
        case 10:
            return np.asfortranarray(x)
        case 11:
            read_only = x.copy()
            read_only.flags.writeable = False
            return read_only
        case 12:
            filled = x.copy()
            filled[...] = draw(st.sampled_from([np.nan, np.inf, 1e38] if x.dtype.kind == "f" else [
                v for v in INTEGERS if np.iinfo(x.dtype).min <= v <= np.iinfo(x.dtype).max]))  # fmt: skip
            return filled
        case 13:
            one = x.copy().reshape(-1)
            if one.size and x.dtype.kind == "i":
                one[draw(st.integers(0, one.size - 1))] = draw(st.sampled_from([-1, 0, 5, np.iinfo(x.dtype).max]))
            return one.reshape(x.shape)
        case 14:
            # At an odd address.
            return np.ndarray(x.shape, x.dtype, bytearray(x.nbytes + 1), 1)
        case 15:
            # Strides that are no multiple of an element.
            return np.zeros(x.shape, [("other", "i1"), ("x", x.dtype)])["x"]
        case _:
            return draw(st.sampled_from([None, "text", 3, x.tolist(), torch.from_numpy(x.copy())]))


def damaged_tensor(draw: Draw, x: Tensor) -> Any:
    axis = draw(st.integers(0, max(0, x.dim() - 1)))
    match draw(st.sampled_from(range(12))):
        case 0:
            kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64,
                     torch.bool, torch.complex64]  # fmt: skip
            return x.to(draw(st.sampled_from(kinds)))
        case 1:
            return x[None]
        case 2:
            return x.reshape(-1)
        case 3:
            return x.sum()
        case 4:
            return x.new_zeros([draw(st.integers(0, 2 * n + 1)) if i == axis else n for i, n in enumerate(x.shape)])
        case 5:
            return x.new_zeros((0,) * x.dim())
        case 6:
            return x[:1].expand(x.shape) if len(x) else x
        case 7:
            far = x.new_zeros([n * 5 if i == axis else n for i, n in enumerate(x.shape)])
            return far.transpose(0, axis)[::5].transpose(0, axis)
        case 8:
            return x.to("meta")
        case 9:
            choices = [float("nan"), float("inf"), 1e38] if x.is_floating_point() else INTEGERS
            fitting = [
                v for v in choices if x.is_floating_point() or torch.iinfo(x.dtype).min <= v <= torch.iinfo(x.dtype).max
            ]
            return torch.full_like(x, draw(st.sampled_from(fitting)))
        case 10:
            return x.clone().requires_grad_() if x.is_floating_point() else x.flip(0)
        case _:
            return draw(st.sampled_from([None, "text", 3, x.to(torch.float32).numpy(), x.to_sparse()]))


# ---------------------------------------------------------------------------------------------------------------------
# The process of a target


def describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        interface = value.__array_interface__
        return (
            f"array({value.shape}, {value.dtype}, strides {value.strides}, at {interface['data'][0] % 64} of 64, "
            f"writeable {value.flags.writeable}, {value.reshape(-1)[:6].tolist()})"
        )
    if isinstance(value, Tensor):
        return f"tensor({list(value.shape)}, {value.dtype}, {value.device}, {value.layout})"
    return f"[{', '.join(map(describe, value))}]" if isinstance(value, list) else repr(value)


def run_target(name: str, seed_: int) -> None:
    """Exit status 0 where every call raised what it should, or returned."""
    from gac_fast import _C, ops
    from gac_fast.errors import GacError

    module, function_name = name.split(".")
    function = getattr({"_C": _C, "ops": ops}[module], function_name)
    target = TARGETS[name]
    n_returned = n_raised = 0

    @seed(seed_)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal n_returned, n_raised
        draw = data.draw
        arguments = target.good(draw)
        open_ = [name for name in arguments if name not in target.kept]
        for argument in draw(st.lists(st.sampled_from(open_), max_size=3, unique=True)):
            arguments[argument] = damaged(draw, arguments[argument])
        text = f"{name}({', '.join(f'{k}={describe(v)}' for k, v in arguments.items())})"
        # The last line before a crash.
        print(text, file=sys.stderr, flush=True)
        try:
            function(**arguments)
            n_returned += 1
        except (ValueError, TypeError, RuntimeError, GacError) as error:
            n_raised += 1
            message = str(error)
        else:
            return
        assert any(argument in message for argument in arguments), f"names no argument: {message} of {text}"

    with np.errstate(all="ignore"):
        check()
    print(f"{name}: {n_returned} returned, {n_raised} raised")
    assert n_returned > EXAMPLES // 20, "hardly a call that ran"
    assert n_raised > EXAMPLES // 20, "hardly a call that was refused"


def start(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", __file__, name, str(SEED)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", TARGETS)
def test_bad_input_never_crashes(cpp_engine, name):
    module, function = name.split(".")
    if module == "_C" and not hasattr(cpp_engine, function):
        pytest.skip(f"the engine has no {function}")
    done = start(name)
    assert done.returncode == 0, f"{name}, seed {SEED}, exit status {done.returncode}\n{done.stderr[-4000:]}"


def test_every_function_of_the_engine_has_a_target(cpp_engine):
    functions = {name for name, value in vars(cpp_engine).items() if callable(value) and not name.startswith("__")}
    assert functions - WITHOUT_TARGET <= {name.removeprefix("_C.") for name in TARGETS}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_target(sys.argv[1], int(sys.argv[2]))
