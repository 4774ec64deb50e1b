"""Standard normals that depend on (seed, plan, step, element) alone, the same on every engine."""

from __future__ import annotations

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _check, _dispatch, _threads

__all__ = ["philox_normal"]

OP = "philox_normal"
_dispatch.register(OP, "triton", "cpp")

_WORD = 1 << 32
# The first counter word holds element // 4.
_MAX_ELEMENTS = 4 * _WORD


# Mutates an output that Python allocates: PyTorch then knows its shape, and callers may reuse the memory.
@torch.library.custom_op("gac_fast::philox_normal_", mutates_args={"out"})
def _philox_normal(out: Tensor, plans: Tensor, step: Tensor, seed0: int, seed1: int) -> None:
    if out.numel() == 0:
        return
    engine = _dispatch.choose(OP, out.device)
    if engine == "cpp":
        # The engine writes rows of neighbouring elements.
        has_rows = out.stride(1) == 1 or out.shape[1] == 1
        rows = out if has_rows else torch.empty(out.shape, dtype=torch.float32)
        threads = _threads.count()
        _dispatch.cpp_engine()._philox_normal(seed0, seed1, plans.numpy(), step.numpy(), rows.numpy(), threads)
        if rows is not out:
            out.copy_(rows)
    elif engine == "triton":
        from gac_fast.kernels import philox_normal as kernel

        kernel.philox_normal((seed0, seed1), plans, step, out)
    else:
        out.copy_(reference.philox_normal((seed0, seed1), plans, step, out.shape[1]))


@_philox_normal.register_fake
def _(out: Tensor, plans: Tensor, step: Tensor, seed0: int, seed1: int) -> None:
    return None


def philox_normal(
    seed: tuple[int, int], plans: Tensor, step: int | Tensor, n: int, *, out: Tensor | None = None
) -> Tensor:
    """Independent standard normals for P plans, reproducible element by element.

    Equivalent to :func:`gac_fast.reference.philox_normal` (Philox4x32-10 and Box-Muller): the random integers are
    bit-equal on every engine, the normals equal to 1e-6.

    Args:
        seed: two words within [0, 2^32).
        plans: int64 [P], ids within [0, 2^32); its device is where the normals are made.
        step: int, or int64 [P], within [0, 2^32). (A CUDA engine uses the low 32 bits of both without a check.)
        n: elements per plan, at least 0.
        out: float32 [P, n] of any strides, filled and returned; default a new tensor.

    Returns:
        float32 [P, n].

    Raises:
        ValueError: an argument out of range or of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("plans", plans, torch.int64)
    _check.shape("plans", plans, "P")
    if len(seed) != 2 or not all(0 <= word < _WORD for word in seed):
        raise ValueError(f"seed: expected two words within [0, 2^32), got {tuple(seed)}")
    if not 0 <= n <= _MAX_ELEMENTS:
        raise ValueError(f"n: expected 0 to 2^34 elements, got {n}")
    n_rows = plans.shape[0]
    if isinstance(step, Tensor):
        _check.dtype("step", step, torch.int64)
        _check.device("step", step, "plans", plans)
        _check.shape("step", step, n_rows)
    else:
        if not 0 <= step < _WORD:
            raise ValueError(f"step: expected a value within [0, 2^32), got {step}")
        step = torch.full((n_rows,), step, dtype=torch.int64, device=plans.device)
    if out is None:
        out = torch.empty((n_rows, n), dtype=torch.float32, device=plans.device)
    else:
        _check.dtype("out", out, torch.float32)
        _check.device("out", out, "plans", plans)
        _check.shape("out", out, n_rows, n)
        _check.no_gradient("out", out)
    _philox_normal(out, plans, step, *seed)
    return out
