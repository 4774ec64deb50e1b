"""Whatever comes in, the C++ engine and the ops on it raise an error that names the argument, or return; never a crash.

A target is a function with good arguments; hypothesis damages up to three of them. The targets run in another process
(this file as a script), so that a crash is a failure like any other, with its last call shown; a new process takes the
targets after it. A new function of the engine needs an entry in TARGETS. GAC_FAST_FUZZ_EXAMPLES sets the number of
calls of each target.
"""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from gac_fast import ops, reference

Draw = Callable[[st.SearchStrategy], Any]
Arguments = dict[str, Any]

SEED = 20240607
EXAMPLES = int(os.environ.get("GAC_FAST_FUZZ_EXAMPLES", "40"))
WORD = 2**32


@dataclass(frozen=True)
class Target:
    good: Callable[[Draw], Arguments]
    """Arguments that the function takes as they are."""
    kept: frozenset[str] = frozenset()
    """Arguments left alone: a huge value is allowed, and would take hours or all memory."""
    parts: tuple[str, ...] = ()
    """What a message may name instead of an argument."""


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
        "out_positions": np.zeros(n, np.int64),
        "out_sequence": np.zeros(n, np.int64),
    }


def draw_trajectories(draw: Draw) -> Arguments:
    n = size(draw, 0)
    out = np.zeros(size(draw, 0, n), np.int64)
    return {"seed0": 1, "seed1": 2, "number": 3, "weights": np.arange(1.0, n + 1), "out": out}


def drop_steps(draw: Draw) -> Arguments:
    return {"seed0": 1, "seed1": 2, "number": 3, "threshold": WORD // 2, "out": np.zeros(size(draw, 0), np.bool_)}


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


def rows_of_map(draw: Draw) -> tuple[int, int, int, bool, Callable[..., np.ndarray]]:
    """Tokens, inputs and outputs of a linear map, whether bfloat16, and what makes arrays of that."""
    n, n_in, n_out, bf16 = size(draw, 0, 70), size(draw, 1, 40), size(draw, 1, 40), draw(st.booleans())
    return n, n_in, n_out, bf16, lambda *shape: floats(*shape).astype(np.int16) if bf16 else floats(*shape)


def norm_linear(draw: Draw) -> Arguments:
    n, n_in, n_out, bf16, make = rows_of_map(draw)
    has_norm = draw(st.booleans())
    residual = draw(st.sampled_from([None, floats(n, n_out)]))
    return {
        "weight": floats(n_out, n_in),
        "bias": floats(n_out),
        "has_norm": has_norm,
        "bf16": bf16,
        "x": floats(n, n_in),
        "residual": residual,
        "y": make(n, n_out) if residual is None else floats(n, n_out),
        "operand": make(n, 32 * (-(-n_in // 32))) if has_norm else None,
        "rstd": floats(n) if has_norm else None,
        "n_threads": size(draw, 1, 2),
    }


def norm_linear_backward(draw: Draw) -> Arguments:
    n, n_in, n_out, bf16, make = rows_of_map(draw)
    has_norm, as_float = draw(st.booleans()), bf16 and draw(st.booleans())
    return {
        "weight": floats(n_out, n_in),
        "has_norm": has_norm,
        "bf16": bf16,
        "dy": floats(n, n_out) if as_float else make(n, n_out),
        "operand": make(n, 32 * (-(-n_in // 32))) if has_norm else None,
        "rstd": floats(n) if has_norm else None,
        "dy_operand": make(n, n_out) if as_float else None,
        "dx_start": draw(st.sampled_from([None, floats(n, n_in)])),
        "dx": draw(st.sampled_from([None, floats(n, n_in)])),
        "dbias": draw(st.sampled_from([None, floats(n_out)])),
        "n_threads": size(draw, 1, 2),
    }


def weight_gradients(draw: Draw) -> Arguments:
    n, _, _, _, make = rows_of_map(draw)
    sizes = [(size(draw, 0, 40), size(draw, 0, 40)) for _ in range(size(draw, 0, 3))]

    def norm(o: int, i: int) -> list[np.ndarray]:
        some = draw(st.integers(0, 3)) == 0
        return [floats(o, i), floats(o), floats(i), floats(i), floats(i), floats(i)] if some else []

    maps = [[make(n, o), make(n, i), floats(o, i), norm(o, i)] for o, i in sizes]
    return {"maps": maps, "n_threads": size(draw, 1, 2)}


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


def adamw(draw: Draw) -> Arguments:
    shapes = [(size(draw, 0, 40), size(draw, 1, 40)) for _ in range(size(draw, 0, 3))]
    lists = {name: [floats(*shape) for shape in shapes] for name in ("values", "gradients", "first", "second")}
    return {
        **lists, "steps": [np.zeros((), np.float32) for _ in shapes], "decays": [0.1] * len(shapes),
        "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "max_norm": 1.0, "n_threads": size(draw, 1, 2),
    }  # fmt: skip


@dataclass
class SeedSizes:
    """Plan seeds, U, the layers' maps of the plan, and return models."""

    p: int
    n_z: int
    dim: int
    hidden: int
    layers: int
    members: int
    n_obs: int

    def model(self, with_prior: bool) -> Arguments:
        d = self.n_z * self.dim
        prior = [floats(self.hidden, d), floats(self.hidden), floats(d, self.hidden), floats(d)]
        layer = [floats(2 * self.dim, self.dim), floats(2 * self.dim), floats(self.n_z, self.dim)]
        return {"prior": prior if with_prior else [], "layers": [list(layer) for _ in range(self.layers)]}

    def returns(self) -> list[np.ndarray]:
        n_in, e, h = self.n_z * self.dim + self.n_obs, self.members, self.hidden
        return [floats(e, h, n_in), floats(e, h), floats(e, h, h), floats(e, h), floats(e, 2, h), floats(e, 2)]

    def plans(self) -> np.ndarray:
        return floats(self.p, self.n_z, self.dim)

    def context(self) -> np.ndarray | None:
        return floats(self.p, self.n_obs) if self.n_obs else None

    def saved(self, with_prior: bool) -> Arguments:
        """What the forward leaves, and keys and values."""
        return {
            "before": floats(self.p, self.hidden if with_prior else 0), "z": self.plans(),
            "scale": floats(self.p, self.n_z), "kv": floats(self.layers, 2, self.p, self.n_z, self.dim),
        }  # fmt: skip


def seed_sizes(draw: Draw) -> SeedSizes:
    return SeedSizes(size(draw, 0, 5), *(size(draw, 1, 5) for _ in range(3)), size(draw, 0, 2), size(draw, 1, 2),
                     size(draw, 0, 2))  # fmt: skip


def seed_plans(draw: Draw) -> Arguments:
    s, with_prior = seed_sizes(draw), draw(st.booleans())
    return {**s.model(with_prior), "z0": s.plans(), **s.saved(with_prior), "n_threads": size(draw, 1, 2)}


def seed_gradient(draw: Draw) -> Arguments:
    s, with_prior = seed_sizes(draw), draw(st.booleans())
    saved = s.saved(with_prior)
    return {
        **s.model(with_prior), "returns": s.returns(), "context": s.context(), "y": floats(s.p),
        "weight": floats(s.p), "z0": s.plans(), **{k: v for k, v in saved.items() if k != "kv"}, "dkv": saved["kv"],
        "dkv_scale": 2.0, "gradient": s.plans(), "n_threads": size(draw, 1, 2),
    }  # fmt: skip


def seed_weights(draw: Draw) -> Arguments:
    s, with_prior = seed_sizes(draw), draw(st.booleans())
    saved, grads = s.saved(with_prior), s.model(with_prior)
    return {
        **s.model(with_prior), "z0": s.plans(), **{k: v for k, v in saved.items() if k != "kv"}, "dkv": saved["kv"],
        "dz": draw(st.sampled_from([None, s.plans()])), "dprior": grads["prior"], "dlayers": grads["layers"],
        "n_threads": size(draw, 1, 2),
    }  # fmt: skip


def seed_move(draw: Draw) -> Arguments:
    s = seed_sizes(draw)
    return {
        "z0": s.plans(), "gradient": s.plans(), "step_size": 0.1, "max_drift_ratio": 0.5, "seed0": 1, "seed1": 2,
        "ids": np.arange(s.p), "steps": np.arange(s.p) + WORD - 9, "size": floats(s.p), "ratio": floats(s.p),
        "n_threads": size(draw, 1, 2),
    }  # fmt: skip


def action_errors(draw: Draw) -> Arguments:
    n, act_dim, bf16 = size(draw, 0, 40), size(draw, 0, 5), draw(st.booleans())
    y, dy = ((floats(n, act_dim).astype(np.int16) if bf16 else floats(n, act_dim)) for _ in range(2))
    return {
        "y": y, "actions": floats(n, act_dim), "counts": draw(st.sampled_from([None, np.ones(n, bool)])),
        "scale": floats(act_dim), "dy": draw(st.sampled_from([None, dy])),
        "squares": draw(st.sampled_from([None, np.zeros(act_dim)])), "n_threads": size(draw, 1, 2),
    }  # fmt: skip


def return_losses(draw: Draw) -> Arguments:
    s = seed_sizes(draw)
    masks = [floats(s.members, s.p, s.hidden) for _ in range(2)]
    return {
        "weights": s.returns(), "z": s.plans(), "context": s.context(), "y": floats(s.p), "seen": floats(s.p),
        "fitted": floats(s.p), "masks": masks if draw(st.booleans()) else [], "losses": np.zeros(2),
        "factor_mean": 1.0, "factor_variance": 0.1, "dz": draw(st.sampled_from([None, s.plans()])),
        "dweights": s.returns() if draw(st.booleans()) else [], "n_threads": size(draw, 1, 2),
    }  # fmt: skip


@dataclass
class BlockSizes:
    """A decoder layer."""

    heads: int
    width: int
    hidden: int
    n_next: int
    n: int
    n_z: int
    cu_seqlens: np.ndarray
    bf16: bool

    @property
    def dim(self) -> int:
        return self.heads * self.width

    def rows(self, columns: int, *, stream: bool = False, padded: bool = False) -> np.ndarray:
        columns = (columns + 31) // 32 * 32 if padded else columns
        return heads(None, self.n, columns, bf16=self.bf16 and not stream)

    def plan(self) -> np.ndarray:
        return heads(None, len(self.cu_seqlens) - 1, self.n_z, self.heads, self.width, bf16=self.bf16)


def block_sizes(draw: Draw) -> BlockSizes:
    n = size(draw, 0, 12)
    return BlockSizes(
        size(draw, 1, 3), draw(st.sampled_from([2, 8, 10])), size(draw), size(draw), n, size(draw, 1, 5),
        offsets(draw, n), draw(st.booleans()),
    )  # fmt: skip


def block_weights(sizes: BlockSizes, *, backward: bool) -> Arguments:
    dim, hidden, n_next = sizes.dim, sizes.hidden, sizes.n_next
    shapes = [(dim, dim), (dim, dim), (dim, dim), (hidden, dim), (dim, hidden), (n_next, dim)]
    weights, biases = [floats(*shape) for shape in shapes], [floats(shape[0]) for shape in shapes]
    norms = [floats(dim) for _ in range(6)]
    return {
        "weights": weights, "biases": biases, "norms": norms, "bf16": sizes.bf16, "backward": backward, "n_threads": 1,
    }  # fmt: skip


def block(draw: Draw) -> Arguments:
    from gac_fast import _C

    s = block_sizes(draw)
    arguments = {
        "weights": _C._BlockWeights(**block_weights(s, backward=True)),
        "x": s.rows(s.dim, stream=True),
        "attended": s.rows(s.dim),
        "plan_k": s.plan(),
        "plan_v": s.plan(),
        "cu_seqlens": s.cu_seqlens,
        "x_out": s.rows(s.dim, stream=True),
        "y": s.rows(s.n_next),
    }
    return {**arguments, **block_saved(s), "n_threads": 1}


def block_saved(s: BlockSizes) -> Arguments:
    return {
        "normed1": s.rows(s.dim, padded=True),
        "normed2": s.rows(s.dim, padded=True),
        "rstd": s.rows(2, stream=True),
        "probs": s.rows(s.heads * s.n_z, stream=True),
        "q": None if s.bf16 else s.rows(s.dim, padded=True),
        "hidden": None if s.bf16 else s.rows(s.hidden, padded=True),
    }


def block_backward(draw: Draw) -> Arguments:
    from gac_fast import _C

    s = block_sizes(draw)
    widths = (s.dim, s.dim, s.dim, s.hidden, s.dim, s.dim, s.hidden, s.dim)
    return {
        "weights": _C._BlockWeights(**block_weights(s, backward=True)),
        "dx_out": s.rows(s.dim, stream=True),
        "dy": s.rows(s.n_next),
        "x_out": s.rows(s.dim, stream=True),
        **block_saved(s),
        "plan_k": s.plan(),
        "plan_v": s.plan(),
        "cu_seqlens": s.cu_seqlens,
        "dx": s.rows(s.dim, stream=True),
        "dattended": s.rows(s.dim),
        "dplan_k": floats(len(s.cu_seqlens) - 1, s.n_z * s.dim),
        "dplan_v": floats(len(s.cu_seqlens) - 1, s.n_z * s.dim),
        "operands": [s.rows(width, padded=True) for width in widths],
        "dbias": floats(4 * s.dim + s.hidden + s.n_next),
        "n_threads": 1,
    }


@dataclass
class DecodeSizes:
    """A decoder and its environments."""

    heads: int
    width: int
    hidden: int
    obs_dim: int
    act_dim: int
    layers: int
    n: int
    window: int
    n_z: int
    reads_actions: bool
    bf16: bool


def decode_sizes(draw: Draw) -> DecodeSizes:
    return DecodeSizes(*(size(draw, 1, 4) * k for k in (1, 2, 1, 1, 1)), size(draw, 1, 2), size(draw, 1, 4),
                       size(draw, 1, 4), size(draw, 1, 4), draw(st.booleans()), draw(st.booleans()))  # fmt: skip


def decode_tensors(s: DecodeSizes) -> list[Tensor]:
    dim = s.heads * s.width
    maps = [(dim, s.obs_dim), *([(dim, s.act_dim)] if s.reads_actions else [])]
    layer = [(dim,), (3 * dim, dim), (dim, dim), (dim,), (dim, dim), (dim, dim), (dim,), (s.hidden, dim),
             (dim, s.hidden)]  # fmt: skip
    shapes = [*maps, *(layer * s.layers), (dim,), (s.act_dim, dim)]
    return [torch.from_numpy(x) for shape in shapes for x in (floats(*shape), floats(shape[0]))]


def decode_weights(s: DecodeSizes) -> Arguments:
    weights = decode_tensors(s)
    return {
        "tensors": weights,
        "arrays": [x.numpy() for x in weights],
        "n_heads": s.heads,
        "rope_base": 100.0,
        "reads_actions": s.reads_actions,
        "bf16": s.bf16,
    }


def decode_state(draw: Draw, s: DecodeSizes) -> Arguments:
    units = [floats(n) for n in (s.obs_dim, s.obs_dim, s.act_dim, s.act_dim)]
    ring = (s.layers, s.n, s.window, s.heads, s.width)
    return {
        "ring_k": heads(draw, *ring, bf16=s.bf16),
        "ring_v": heads(draw, *ring, bf16=s.bf16),
        "plan_k": floats(s.layers, s.n, s.n_z, s.heads, s.width),
        "plan_v": floats(s.layers, s.n, s.n_z, s.heads, s.width),
        "steps": np.arange(s.n),
        "last_action": floats(s.n, s.act_dim),
        "units": draw(st.sampled_from([[], units])),
    }


def decode_state_step(draw: Draw) -> Arguments:
    from gac_fast import _C

    s = decode_sizes(draw)
    return {
        "self": _C._DecodeState(**decode_state(draw, s)),
        "weights": _C._DecodeWeights(**decode_weights(s)),
        "observations": floats(s.n, s.obs_dim).astype(draw(st.sampled_from(["f4", "f8"]))),
        "out": floats(s.n, s.act_dim),
        "n_threads": 1,
    }


def same_entries(draw: Draw) -> Arguments:
    table = {"a": 1}
    return {"entries": [(table, "a", draw(st.sampled_from([1, 2, table])))] * size(draw, 0, 3)}


def tensors(arguments: Arguments) -> Arguments:
    return {name: torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def philox_op(draw: Draw) -> Arguments:
    arguments = tensors(philox(np.float32)(draw))
    return {"seed": (1, 2), **{k: arguments[k] for k in ("plans", "step", "out")}, "n": arguments["out"].shape[1]}


def window_op(draw: Draw) -> Arguments:
    names = ("q", "k", "v", "cu_seqlens", "window", "positions", "rope_base")
    arguments = tensors(window_attention(draw))
    return {name: as_bf16(arguments[name]) for name in names}


def window_qkv_op(draw: Draw) -> Arguments:
    arguments = window_op(draw)
    qkv = torch.stack([arguments.pop(name).contiguous() for name in ("q", "k", "v")], dim=1)
    return {"qkv": qkv, **arguments}


def norm_linear_op(draw: Draw) -> Arguments:
    n, n_in, n_out, bf16, _ = rows_of_map(draw)
    norm = draw(st.sampled_from([None, torch.ones(n_in)]))
    return {"x": torch.randn(n, n_in), "norm_w": norm, "norm_b": norm, "w": torch.randn(n_out, n_in),
            "b": torch.randn(n_out), "bf16": bf16}  # fmt: skip


def plan_op(draw: Draw) -> Arguments:
    arguments = tensors(plan_attention(draw))
    return {name: as_bf16(arguments[name]) for name in ("q", "k", "v", "cu_seqlens")}


def plan_steps_op(langevin: bool) -> Callable[[Draw], Arguments]:
    def good(draw: Draw) -> Arguments:
        arguments = tensors(plan_steps(langevin)(draw))
        names = ["context", "n_steps", "step_size", "bf16"]
        names += ["target", "plans", "first_step", "max_drift_ratio"] if langevin else []
        names += [] if langevin else ["kappa", "prior_weight", "radius", "max_norm"]
        prior = [torch.from_numpy(x) for x in arguments["prior_weights"]]
        return {
            "prior_weights": reference.PriorWeights(*(prior or [None] * 4)),
            "return_weights": reference.ReturnWeights(*(torch.from_numpy(x) for x in arguments["return_weights"])),
            "z0": arguments["z0"].unflatten(1, (-1, arguments["dim"])),
            **{name: arguments[name] for name in names},
            **({"seed": (1, 2)} if langevin else {}),
        }

    return good


def block_op(draw: Draw) -> Arguments:
    s = block_sizes(draw)
    matrices = block_weights(s, backward=True)
    w, b = ([torch.from_numpy(x) for x in matrices[name]] for name in ("weights", "biases"))
    norm = torch.ones(s.dim)
    o, q, plan_o, in_, out, next_ = zip(w, b, strict=True)
    arguments = {"x": s.rows(s.dim, stream=True), "attended": s.rows(s.dim), "plan_k": s.plan(), "plan_v": s.plan()}
    return {
        **{name: as_bf16(x) for name, x in tensors({**arguments, "cu_seqlens": s.cu_seqlens}).items()},
        "weights": reference.BlockWeights(*o, norm, norm, *q, *plan_o, norm, norm, *in_, *out, norm, norm, *next_),
        "bf16": s.bf16,
    }


def decode_op(draw: Draw) -> Arguments:
    s = decode_sizes(draw)
    flat = decode_tensors(s)
    embeddings = flat[: 4 if s.reads_actions else 2]
    layers = flat[len(embeddings) : -4]
    state = ops.DecodeState(n_layers=s.layers, n_rows=s.n, window=s.window, n_heads=s.heads, width=s.width, n_z=s.n_z,
                            act_dim=s.act_dim, bf16=s.bf16)  # fmt: skip
    decoder = reference.DecoderWeights(
        tuple(reference.LayerWeights(*layers[i : i + 18]) for i in range(0, len(layers), 18)),
        *flat[-4:],
        s.heads,
        100.0,
    )
    units = ops.Units(*(torch.ones(n) for n in (s.obs_dim, s.obs_dim, s.act_dim, s.act_dim)))
    return {
        "weights": reference.StepWeights(*(embeddings + [None, None])[:4], decoder),
        "state": state,
        "observations": floats(s.n, s.obs_dim),
        "units": draw(st.sampled_from([None, units])),
    }


def as_bf16(x: Any) -> Any:
    return x.view(torch.bfloat16) if isinstance(x, Tensor) and x.dtype == torch.int16 else x


# Huge numbers of threads are for _parallel_for alone: hundreds of them would wait for one another.
THREADS = frozenset({"n_threads"})
SEED_ARGUMENTS = frozenset({"seed", "number"})

TARGETS: dict[str, Target] = {
    "_C._gemm": Target(gemm, kept=frozenset({"repeats"})),
    "_C._philox_normal": Target(philox(np.float32)),
    "_C._philox_words": Target(philox(np.int64)),
    "_C._packed_length": Target(packed_length),
    "_C._pack_batch": Target(pack_batch),
    "_C._draw_trajectories": Target(draw_trajectories, parts=("n:",)),
    "_C._drop_steps": Target(drop_steps),
    "_C._parallel_for": Target(parallel_for, kept=frozenset({"work_us", "fail_at", "repeats"})),
    "_C._window_attention": Target(window_attention, kept=THREADS),
    "_C._window_attention_backward": Target(with_gradients(window_attention, "q", "k", "v"), kept=THREADS),
    "_C._norm_linear": Target(norm_linear, kept=THREADS),
    "_C._norm_linear_backward": Target(norm_linear_backward, kept=THREADS),
    "_C._weight_gradients": Target(weight_gradients, kept=THREADS),
    "_C._adamw": Target(adamw, kept=THREADS),
    "_C._seed_plans": Target(seed_plans, kept=THREADS),
    "_C._seed_gradient": Target(seed_gradient, kept=THREADS),
    "_C._seed_weights": Target(seed_weights, kept=THREADS),
    "_C._seed_move": Target(seed_move, kept=THREADS),
    "_C._action_errors": Target(action_errors, kept=THREADS),
    "_C._return_losses": Target(return_losses, kept=THREADS),
    "_C._plan_attention": Target(plan_attention, kept=THREADS),
    "_C._plan_attention_backward": Target(with_gradients(plan_attention, "q", "k", "v"), kept=THREADS),
    "_C._plan_ascent": Target(plan_steps(langevin=False), kept=THREADS | {"n_steps"}),
    "_C._plan_langevin": Target(plan_steps(langevin=True), kept=THREADS | {"n_steps"}),
    "_C._BlockWeights": Target(lambda draw: block_weights(block_sizes(draw), backward=draw(st.booleans())),
                               kept=THREADS),
    "_C._block_fingerprint": Target(lambda draw: {"arrays": [floats(size(draw, 0, 200)) for _ in range(3)]}),
    "_C._block": Target(block, kept=THREADS),
    "_C._block_backward": Target(block_backward, kept=THREADS),
    "_C._DecodeWeights": Target(lambda draw: decode_weights(decode_sizes(draw)),
                                parts=("embed_", "layer ", "norm ", "head ", "mlp_in ")),
    "_C._DecodeState": Target(lambda draw: decode_state(draw, decode_sizes(draw)),
                              parts=("obs_mean", "obs_std", "action_mid", "action_half")),
    "_C._DecodeState.step": Target(decode_state_step, kept=THREADS | {"self"}),
    "_C._same_entries": Target(same_entries),
    "ops.philox_normal": Target(philox_op, kept=frozenset({"seed", "n"})),
    "ops.pack_batch": Target(lambda draw: tensors(trajectories(draw))),
    "ops.draw_trajectories": Target(
        lambda draw: {"weights": torch.arange(1.0, 6.0).double(), "n": size(draw, 0, 5), "seed": (1, 2), "number": 3},
        kept=SEED_ARGUMENTS),
    "ops.drop_steps": Target(
        lambda draw: {"n": 5, "share": 0.5, "seed": (1, 2), "number": 3, "out": torch.zeros(5, dtype=torch.bool)},
        kept=SEED_ARGUMENTS | {"n"}),
    "ops.window_attention": Target(window_op),
    "ops.window_attention_qkv": Target(window_qkv_op),
    "ops.norm_linear": Target(norm_linear_op),
    "ops.plan_attention": Target(plan_op),
    "ops.plan_ascent": Target(plan_steps_op(langevin=False), kept=frozenset({"n_steps"})),
    "ops.plan_langevin": Target(plan_steps_op(langevin=True), kept=frozenset({"n_steps", "seed"})),
    "ops.decoder_block": Target(block_op),
    "ops.decode_step": Target(decode_op, kept=frozenset({"weights", "state", "units"}), parts=("obs",)),
}  # fmt: skip
# No input to speak of.
WITHOUT_TARGET = {
    "_build_info", "_has_variable", "_keep_freed_memory", "_isa", "_isa_reason", "_isa_problems", "_use_isa",
    "_together_runs",
    # Takes objects of the package alone, and numbers; tests/test_act.py and tests/test_thread_pool.py call them.
    "_decode_again", "_run_together",
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Damage

NUMBERS = [-1, 0, 1, 2, 7, 2**31 - 1, 2**31, WORD - 1, WORD, 2**63 - 1, -(2**63), 2**64, 0.5, -0.5, 1e300,
           float("nan"), float("inf"), None, "1", [], True]  # fmt: skip
# What the type checker lets through to an op.
REALS = [x for x in NUMBERS if type(x) in (int, float)]
INTEGERS = [-1, 0, 1, 7, 2**31, WORD, 2**63 - 1, -(2**63)]


def damaged(draw: Draw, value: Any, scalars: list[Any]) -> Any:
    if isinstance(value, np.ndarray):
        return damaged_array(draw, value)
    if isinstance(value, Tensor):
        return damaged_tensor(draw, value)
    if isinstance(value, tuple) and hasattr(value, "_replace"):
        field = draw(st.sampled_from(value._fields))
        return value._replace(**{field: damaged(draw, getattr(value, field), [None])})
    if isinstance(value, list) and value:
        i = draw(st.integers(0, len(value) - 1))
        one = [*value[:i], damaged(draw, value[i], scalars), *value[i + 1 :]]
        return draw(st.sampled_from([one, one, value[:i], None]))
    if value is None or isinstance(value, bool):
        return draw(st.sampled_from([None, True, False]))
    return draw(st.sampled_from(scalars))


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
            filled[...] = draw(st.sampled_from(
                [np.nan, np.inf, 1e38] if x.dtype.kind == "f" else [True, False] if x.dtype.kind == "b" else
                [v for v in INTEGERS if np.iinfo(x.dtype).min <= v <= np.iinfo(x.dtype).max]))  # fmt: skip
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
            if x.dtype == torch.bool:
                return ~x
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
    from gac_fast import _C
    from gac_fast.errors import GacError

    module, function_name = name.split(".", 1)
    function = operator.attrgetter(function_name)({"_C": _C, "ops": ops}[module])
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
            arguments[argument] = damaged(draw, arguments[argument], NUMBERS if module == "_C" else REALS)
        text = f"{name}({', '.join(f'{k}={describe(v)}' for k, v in arguments.items())})"
        # The last line before a crash.
        print(text, file=sys.stderr, flush=True)
        try:
            function(**arguments)
            n_returned += 1
        except (ValueError, TypeError, RuntimeError, FloatingPointError, GacError) as error:
            n_raised += 1
            message = str(error)
        else:
            return
        assert any(word in message for word in (*arguments, *target.parts)), f"names no argument: {message} of {text}"

    with np.errstate(all="ignore"):
        check()
    print(f"{name}: {n_returned} returned, {n_raised} raised", file=sys.stderr)
    # Where few cases exist, hypothesis ends early.
    fewest = (n_returned + n_raised) // 20
    assert n_returned > fewest, "hardly a call that ran"
    assert n_raised > fewest, "hardly a call that was refused"


@functools.cache
def outcomes() -> dict[str, str]:
    """Of every target: the empty string, or what went wrong."""
    found: dict[str, str] = {}
    while left := [name for name in TARGETS if name not in found]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *left], capture_output=True, text=True, check=False
        )
        for line in done.stdout.splitlines():
            name, _, text = line.partition(" ")
            found[name] = text.replace("\\n", "\n")
        if crashed := next((name for name in left if name not in found), None):
            found[crashed] = f"exit status {done.returncode}\n{done.stderr[-4000:]}"
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_bad_input_never_crashes(cpp_engine, name):
    assert not outcomes()[name], f"{name}, seed {SEED}: {outcomes()[name]}"


def test_every_function_of_the_engine_has_a_target(cpp_engine):
    functions = {name for name, value in vars(cpp_engine).items() if callable(value) and not name.startswith("__")}
    assert functions - WITHOUT_TARGET <= {name.removeprefix("_C.") for name in TARGETS}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        problem = ""
        try:
            run_target(name, SEED)
        except Exception:
            problem = traceback.format_exc()[-4000:].replace("\n", "\\n")
        print(name, problem, flush=True)
