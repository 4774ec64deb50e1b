"""Copies chosen trajectories next to each other, ready for one update."""

from __future__ import annotations

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _check, _dispatch

__all__ = ["pack_batch"]

OP = "pack_batch"
_dispatch.register(OP, "cpp")


def pack_batch(
    observations: Tensor, actions: Tensor, cu_seqlens: Tensor, indices: Tensor, *, pin_memory: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather whole trajectories of packed storage into one packed batch.

    Equivalent to :func:`gac_fast.reference.pack_batch`.

    Args:
        observations: float32 [N, obs_dim], on the CPU.
        actions: float32 [N, act_dim], on the CPU.
        cu_seqlens: int64 [B + 1], offsets of the trajectories in time steps.
        indices: int64 [b] within [0, B), the trajectories in the order wanted; may repeat.
        pin_memory: put the batch into page-locked memory, so that its copy to a GPU can overlap work.

    Returns:
        observations [n, obs_dim], actions [n, act_dim] and cu_seqlens int32 [b + 1] of the batch, n its time steps.

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
        if x.device.type != "cpu":
            raise ValueError(f"{name}: expected device cpu, got {x.device}")
    _check.shape("observations", observations, "N", "obs_dim")
    _check.shape("actions", actions, observations.shape[0], "act_dim")
    _check.shape("cu_seqlens", cu_seqlens, "B + 1")
    _check.shape("indices", indices, "b")

    if _dispatch.choose(OP, observations.device) == "cpp":
        return _pack_batch_cpp(observations, actions, cu_seqlens, indices, pin_memory)
    _check_indices(indices, cu_seqlens.shape[0] - 1)
    batch = reference.pack_batch(observations, actions, cu_seqlens, indices)
    if pin_memory:
        obs, act, cu = (x.pin_memory() for x in batch)
        return obs, act, cu
    return batch


def _pack_batch_cpp(
    observations: Tensor, actions: Tensor, cu_seqlens: Tensor, indices: Tensor, pin_memory: bool
) -> tuple[Tensor, Tensor, Tensor]:
    engine = _dispatch.cpp_engine()
    n_steps = observations.shape[0]
    # Row-contiguous sources are read in place.
    obs_in, act_in = (x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous() for x in (observations, actions))
    cu_in, indices_in = cu_seqlens.numpy(), indices.numpy()
    n = engine._packed_length(cu_in, indices_in, n_steps)
    obs = torch.empty((n, obs_in.shape[1]), dtype=torch.float32, pin_memory=pin_memory)
    act = torch.empty((n, act_in.shape[1]), dtype=torch.float32, pin_memory=pin_memory)
    cu = torch.empty(indices.shape[0] + 1, dtype=torch.int32, pin_memory=pin_memory)
    engine._pack_batch(
        observations=obs_in.numpy(),
        actions=act_in.numpy(),
        cu_seqlens=cu_in,
        indices=indices_in,
        out_observations=obs.numpy(),
        out_actions=act.numpy(),
        out_cu_seqlens=cu.numpy(),
    )
    return obs, act, cu


def _check_indices(indices: Tensor, n_trajectories: int) -> None:
    outside = (indices < 0) | (indices >= n_trajectories)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        expected = f"expected values within [0, {n_trajectories})"
        raise ValueError(f"indices: {expected}, got {int(indices[i])} at position {i}")
