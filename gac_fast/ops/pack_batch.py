"""Draws trajectories by weight and copies them next to each other, ready for one update."""

from __future__ import annotations

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _arrays, _check, _dispatch
from gac_fast.reference import PackedBatch

__all__ = ["PackedBatch", "draw_trajectories", "drop_steps", "pack_batch"]

OP = "pack_batch"
_dispatch.register(OP, "cpp")

_CPU = torch.device("cpu")
_WORD = 1 << 32
_MAX_NUMBER = 1 << 63


def pack_batch(
    observations: Tensor,
    actions: Tensor,
    cu_seqlens: Tensor,
    indices: Tensor,
    *,
    out: PackedBatch | None = None,
    pin_memory: bool = False,
) -> PackedBatch:
    """Gather whole trajectories of packed storage into one packed batch.

    Equivalent to :func:`gac_fast.reference.pack_batch`.

    Args:
        observations: float32 [N, obs_dim], on the CPU.
        actions: float32 [N, act_dim], on the CPU.
        cu_seqlens: int64 [B + 1], offsets of the trajectories in time steps.
        indices: int64 [b] within [0, B), the trajectories in the order wanted; may repeat.
        out: contiguous tensors of the batch's own shapes, filled and returned; default new ones.
        pin_memory: put new tensors into page-locked memory, so that their copy to a GPU can overlap work.

    Returns:
        observations [n, obs_dim], actions [n, act_dim], cu_seqlens int32 [b + 1], positions and sequence int64 [n] of
        the batch, n its time steps.

    Raises:
        ValueError: an argument of another dtype, device or shape, or an index out of range, naming it.
        BackendError: a forced backend cannot run.
    """
    for name, x in (("observations", observations), ("actions", actions)):
        _check.dtype(name, x, torch.float32)
    for name, x in (("cu_seqlens", cu_seqlens), ("indices", indices)):
        _check.dtype(name, x, torch.int64)
    for name, x in (
        ("observations", observations),
        ("actions", actions),
        ("cu_seqlens", cu_seqlens),
        ("indices", indices),
    ):
        _on_cpu(name, x)
    _check.shape("observations", observations, "N", "obs_dim")
    _check.shape("actions", actions, observations.shape[0], "act_dim")
    _check.shape("cu_seqlens", cu_seqlens, "B + 1")
    _check.shape("indices", indices, "b")

    is_cpp = _dispatch.choose(OP, _CPU) == "cpp"
    if is_cpp:
        n = _dispatch.cpp_engine()._packed_length(
            _arrays.integers(cu_seqlens), _arrays.integers(indices), observations.shape[0]
        )
    else:
        _check_indices(indices, cu_seqlens.shape[0] - 1)
        n = int((cu_seqlens[indices + 1] - cu_seqlens[indices]).sum())
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "observations": (torch.float32, (n, observations.shape[1])),
        "actions": (torch.float32, (n, actions.shape[1])),
        "cu_seqlens": (torch.int32, (indices.shape[0] + 1,)),
        "positions": (torch.int64, (n,)),
        "sequence": (torch.int64, (n,)),
    }
    if out is None:
        out = PackedBatch(
            **{
                name: torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
                for name, (dtype, shape) in expected.items()
            }
        )
    else:
        for name, (dtype, shape) in expected.items():
            _check_out(f"out.{name}", getattr(out, name), dtype, *shape)
    if not is_cpp:
        for target, x in zip(out, reference.pack_batch(observations, actions, cu_seqlens, indices), strict=True):
            target.copy_(x)
        return out
    # Row-contiguous sources are read in place.
    obs_in, act_in = (x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous() for x in (observations, actions))
    _dispatch.cpp_engine()._pack_batch(
        observations=obs_in.detach().numpy(),
        actions=act_in.detach().numpy(),
        cu_seqlens=cu_seqlens.numpy(),
        indices=indices.numpy(),
        **{f"out_{name}": x.numpy() for name, x in out._asdict().items()},
    )
    return out


def draw_trajectories(weights: Tensor, n: int, seed: tuple[int, int], number: int) -> Tensor:
    """Draw ``number`` of a run: n trajectories without repetition, by weight, in random order.

    Equivalent to :func:`gac_fast.reference.draw_trajectories`, bit for bit. A function of its arguments alone: any
    draw of a run can be made at any time.

    Args:
        weights: float64 [B], finite and at least 0, on the CPU; 0 is never drawn.
        n: at most the number of positive weights.
        seed: two words within [0, 2^32).
        number: within [0, 2^63).

    Returns:
        int64 [n].

    Raises:
        ValueError: an argument out of range or of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("weights", weights, torch.float64)
    _on_cpu("weights", weights)
    _check.shape("weights", weights, "B")
    _check_key(seed, number)
    if not 0 <= n <= weights.shape[0]:
        raise ValueError(f"n: expected 0 to {weights.shape[0]} trajectories, got {n}")
    if _dispatch.choose(OP, _CPU) == "cpp":
        ids = torch.empty(n, dtype=torch.int64)
        _dispatch.cpp_engine()._draw_trajectories(*seed, number, weights.detach().numpy(), ids.numpy())
        return ids
    wrong = ~(weights.isfinite() & (weights >= 0))
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(f"weights: expected finite values of at least 0, got {float(weights[i]):f} at position {i}")
    n_positive = int((weights > 0).sum())
    if n > n_positive:
        raise ValueError(f"n: expected at most the {n_positive} trajectories of positive weight, got {n}")
    return reference.draw_trajectories(weights, n, seed, number)


def drop_steps(n: int, share: float, seed: tuple[int, int], number: int, *, out: Tensor | None = None) -> Tensor:
    """Which of n steps draw ``number`` of a run leaves out, each with probability ``share``.

    Equivalent to :func:`gac_fast.reference.drop_steps`, bit for bit.

    Args:
        n: at least 0.
        share: within [0, 1].
        seed, number: as for :func:`draw_trajectories`.
        out: contiguous bool [n] on the CPU, filled and returned; default a new tensor.

    Returns:
        bool [n].

    Raises:
        ValueError: an argument out of range or of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    if n < 0:
        raise ValueError(f"n: expected at least 0, got {n}")
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a value within [0, 1], got {share}")
    _check_key(seed, number)
    if out is None:
        out = torch.empty(n, dtype=torch.bool)
    else:
        _check_out("out", out, torch.bool, n)
    if _dispatch.choose(OP, _CPU) == "cpp":
        _dispatch.cpp_engine()._drop_steps(*seed, number, reference.drop_threshold(share), out.numpy())
        return out
    return out.copy_(reference.drop_steps(n, share, seed, number))


def works_beside() -> bool:
    """Whether these ops now run on an engine that lets other Python threads work meanwhile, on one core.

    Raises:
        BackendError: a forced backend cannot run.
    """
    return _dispatch.active(OP, _CPU) == "cpp"


def _on_cpu(name: str, x: Tensor) -> None:
    if x.device.type != "cpu":
        raise ValueError(f"{name}: expected device cpu, got {x.device}")


def _check_out(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> None:
    _check.dtype(name, x, dtype)
    _on_cpu(name, x)
    _check.shape(name, x, *shape)
    _check.no_gradient(name, x)
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(x.stride())}")


def _check_key(seed: tuple[int, int], number: int) -> None:
    if len(seed) != 2 or not all(0 <= word < _WORD for word in seed):
        raise ValueError(f"seed: expected two words within [0, 2^32), got {tuple(seed)}")
    if not 0 <= number < _MAX_NUMBER:
        raise ValueError(f"number: expected a value within [0, 2^63), got {number}")


def _check_indices(indices: Tensor, n_trajectories: int) -> None:
    outside = (indices < 0) | (indices >= n_trajectories)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        expected = f"expected values within [0, {n_trajectories})"
        raise ValueError(f"indices: {expected}, got {int(indices[i])} at position {i}")
