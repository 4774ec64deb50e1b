"""What a decoder layer applies to each token alone, from one window attention to the next, in one pass."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from gac_fast import reference
from gac_fast.ops import _block_triton, _check, _direct, _dispatch, _threads
from gac_fast.ops._arrays import array as _array
from gac_fast.ops._arrays import padded as _padded
from gac_fast.ops._arrays import rows as _rows
from gac_fast.reference import BlockWeights

__all__ = ["decoder_block", "fixed_weights"]

T = TypeVar("T")

Call = Callable[[], object]
"""One call of the engine on given memory."""

OP = "block"
_dispatch.register(OP, "triton", "cpp", triton_refuses=lambda sizes: _block_triton.refusal(sizes.dim, sizes.n_z))

# ---------------------------------------------------------------------------------------------------------------------
# Packed weights, kept by content: version counters miss what fused optimisers and ``p.data`` do, and reading the
# weights takes about a hundredth of the time of the pass that uses them.

# The layers of a model or two; while one trains, most of them are packs of weights gone by.
_MOST_PACKS = 16
_packs: OrderedDict[Any, Any] = OrderedDict()
_packs_lock = threading.Lock()


class _Fixed(threading.local):
    """Packs of this thread by the places of their weights, while these do not change."""

    packs: dict[Any, Any] | None = None


_fixed = _Fixed()


@contextlib.contextmanager
def fixed_weights() -> Iterator[None]:
    """Inside, no weight of a block changes, and the engine need not look for it (in the calling thread).

    An update asks a dozen times for each layer, and the comparisons and their preparation take 2% of it.
    """
    if _fixed.packs is not None:
        yield
        return
    _fixed.packs = {}
    try:
        yield
    finally:
        _fixed.packs = None


def _unflatten(weights: Sequence[Tensor]) -> BlockWeights:
    return BlockWeights(*weights) if len(weights) == len(BlockWeights._fields) else BlockWeights(None, None, *weights)


def _pack(weights: Sequence[Tensor], bf16: bool, backward: bool) -> Any:
    w = _unflatten(weights)
    maps = (
        (w.w_o, w.b_o), (w.w_plan_q, w.b_plan_q), (w.w_plan_o, w.b_plan_o), (w.w_in, w.b_in), (w.w_out, w.b_out),
        (w.w_next, w.b_next),
    )  # fmt: skip
    # The engine folds scale and offset of a norm into the map behind it.
    norms = (w.norm2_w, w.norm2_b, w.norm3_w, w.norm3_b, w.norm_w, w.norm_b)
    return _dispatch.cpp_engine()._BlockWeights(
        [_array(_rows(matrix, torch.float32)) for matrix, _ in maps],
        [None if bias is None else _array(bias.contiguous()) for _, bias in maps],
        [_array(x.contiguous()) for x in norms], bf16, backward, _threads.count(),
    )  # fmt: skip


def packed(weights: Sequence[Tensor], bf16: bool, backward: bool) -> Any:
    """The engine's form of the weights."""
    engine = _dispatch.cpp_engine()
    if _fixed.packs is not None:
        place = (engine._isa(), bf16, backward, *(w.data_ptr() for w in weights), weights[-2].shape, weights[-6].shape)
        if place not in _fixed.packs:
            # With the weights, for memory that was given back may be another tensor's next. They are new: an update
            # has moved them, and nobody has asked for their packs before.
            _fixed.packs[place] = _pack(weights, bf16, backward), list(weights)
        return _fixed.packs[place][0]
    return _packed_by_content(engine, weights, bf16, backward)


def while_fixed(owner: Any, make: Callable[[], T]) -> T:
    """What ``make`` gives, kept for ``owner`` while its weights are fixed (in the calling thread), else made anew."""
    if torch.compiler.is_compiling() or _fixed.packs is None:
        return make()
    # With the owner, whose address is not to be another's.
    key = id(owner)
    if key not in _fixed.packs:
        _fixed.packs[key] = make(), owner
    value: T = _fixed.packs[key][0]
    return value


def _packed_by_content(engine: ModuleType, weights: Sequence[Tensor], bf16: bool, backward: bool) -> Any:
    arrays = [_array(w.contiguous()) for w in weights]

    def content() -> Any:
        sizes = len(weights), weights[-2].shape, weights[-6].shape
        return engine._isa(), bf16, backward, sizes, engine._block_fingerprint(arrays)

    key = content()
    with _packs_lock:
        if key in _packs:
            _packs.move_to_end(key)
            return _packs[key]
    packs = _pack(weights, bf16, backward)
    # Another thread may have written to the weights meanwhile.
    if content() == key:
        with _packs_lock:
            _packs[key] = packs
            while len(_packs) > _MOST_PACKS:
                _packs.popitem(last=False)
    return packs


# ---------------------------------------------------------------------------------------------------------------------
# Registered ops


def _first_of(x: Tensor | None, every: int) -> Tensor | None:
    """Rows 0, every, 2 every, ... in place."""
    return x if x is None or every == 1 else x.reshape(-1, every * x.shape[1])[:, : x.shape[1]]


def _outputs(
    x: Tensor, plan_k: Tensor, weights: Sequence[Tensor], bf16: bool, save: bool, every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_out and y, then what the backward reads: two normalised streams, 1 / std of both, the plan's softmax; in
    float32 also queries and pre-activations. bfloat16 computes those two again: on tiles that is faster than memory.
    """
    n, dim = x.shape[0] // every, x.shape[1]
    dtype = torch.bfloat16 if bf16 else torch.float32
    w = _unflatten(weights)
    n_plan = plan_k.shape[1] * plan_k.shape[2]

    def saved(columns: int, dtype: torch.dtype, wanted: bool = True) -> Tensor:
        return x.new_empty((n, columns) if save and wanted else (0, columns), dtype=dtype)

    return (
        x.new_empty((n, dim), dtype=torch.float32), x.new_empty((n, w.w_next.shape[0]), dtype=dtype),
        saved(_padded(dim), dtype), saved(_padded(dim), dtype),
        saved(2, torch.float32), saved(n_plan, torch.float32),
        saved(_padded(dim), torch.float32, not bf16), saved(_padded(w.w_in.shape[0]), torch.float32, not bf16),
    )  # fmt: skip


def run(
    packs: Any,
    x: Tensor,
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    bf16: bool,
    save: bool,
    every: int,
    calls: list[Call] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The engine's forward, with what :func:`packed` gave of the weights.

    Args:
        calls: the engine's call is added to it, for whoever runs it again on other contents of the same memory.
    """
    outputs = _outputs(x, plan_k, weights, bf16, save, every)
    dtype = outputs[1].dtype
    saved = [_array(y) if save else None for y in outputs[2:]]
    if bf16:
        saved[4:] = None, None
    call = functools.partial(
        _dispatch.cpp_engine()._block,
        packs, _array(_rows(_first_of(x, every), torch.float32)), _array(_rows(_first_of(attended, every), dtype)),
        _array(_rows(plan_k, plan_k.dtype)), _array(_rows(plan_v, plan_v.dtype)), _array(cu_seqlens),
        _array(outputs[0]), _array(outputs[1]), *saved, _threads.count(),
    )  # fmt: skip
    call()
    if calls is not None:
        calls.append(call)
    return outputs


def _run(
    x: Tensor,
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    bf16: bool,
    save: bool,
    wants_dx: bool,
    wants_weights: bool,
    every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    packs = packed(weights, bf16, save)
    return run(packs, x, attended, plan_k, plan_v, cu_seqlens, weights, bf16, save, every)


_block = torch.library.custom_op("gac_fast::block", mutates_args=())(_run)


@_block.register_fake
def _(
    x: Tensor, attended: Tensor | None, plan_k: Tensor, plan_v: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor],
    bf16: bool, save: bool, wants_dx: bool, wants_weights: bool, every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(x, plan_k, weights, bf16, save, every)


def _gradients(
    x_out: Tensor, has_attended: bool, plan_k: Tensor, weights: Sequence[Tensor], bf16: bool, wants_dx: bool,
    wants_weights: bool, every: int,
) -> list[Tensor]:  # fmt: skip
    """Plan keys and values; then, where wanted, x and attended; then, where wanted, the weights."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    grads = [torch.empty_like(plan_k, dtype=torch.float32, memory_format=torch.contiguous_format) for _ in range(2)]
    if wants_dx or wants_weights:
        shape = every * x_out.shape[0], x_out.shape[1]
        grads.append(x_out.new_empty(shape, dtype=torch.float32))
        if has_attended:
            grads.append(x_out.new_empty(shape, dtype=dtype))
    if wants_weights:
        grads += [torch.empty_like(w) for w in weights]
    return grads


def run_backward(
    packs: Any,
    dplan: Sequence[Tensor],
    dx_out: Tensor | None,
    dy: Tensor | None,
    saved: Sequence[Tensor],
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    bf16: bool,
    wants_dx: bool,
    wants_weights: bool,
    every: int,
    calls: list[Call] | None = None,
) -> list[Tensor]:
    """The engine's backward. It fills ``dplan``, float32 [B, n_z, D] of keys and values; the rest it returns.

    Args:
        calls: as in :func:`run`, for gradients of weights none.
    """
    x_out = saved[0]
    n, dim = x_out.shape
    dtype = torch.bfloat16 if bf16 else torch.float32
    w = _unflatten(weights)
    # Rows that the block does not read get a gradient of zero, written where the others are.
    stream = [torch.empty((every * n, dim), dtype=torch.float32)] if wants_dx or wants_weights else []
    if stream and w.w_o is not None:
        stream.append(torch.empty((every * n, dim), dtype=dtype))
    operands: list[Any] = []
    dbias = None
    hidden, n_next = w.w_in.shape[0], w.w_next.shape[0]
    if wants_weights:
        widths = (dim, dim, dim, hidden, dim, dim, hidden, dim)
        operands = [_array(torch.empty((n, _padded(width)), dtype=dtype)) for width in widths]
        dbias = torch.empty((3 if w.w_o is None else 4) * dim + hidden + n_next)
    dy = _rows(dy, dtype)
    read = [_array(x) for x in saved]
    normed = read[1:3]
    if bf16:
        read[5:] = None, None
    dx, dattended, *_ = (*(_array(x.view(n, every * dim)) for x in stream), None, None)
    call = functools.partial(
        _dispatch.cpp_engine()._block_backward,
        packs, _array(_rows(dx_out, torch.float32)), _array(dy), *read, _array(_rows(plan_k, plan_k.dtype)),
        _array(_rows(plan_v, plan_v.dtype)), _array(cu_seqlens), dx, dattended,
        *(_array(x.view(x.shape[0], -1)) for x in dplan), operands, _array(dbias),
        _threads.count(),
    )  # fmt: skip
    call()
    if calls is not None:
        calls.append(call)
    if dbias is None:
        return stream
    attended_array = _array(_rows(_first_of(attended, every), dtype))
    return [*stream, *_weight_gradients(w, _array(dy), attended_array, normed, operands, dbias)]


def _run_backward(
    dx_out: Tensor | None,
    dy: Tensor | None,
    saved: Sequence[Tensor],
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: Sequence[Tensor],
    bf16: bool,
    wants_dx: bool,
    wants_weights: bool,
    every: int,
) -> list[Tensor]:
    dplan = [torch.empty(plan_k.shape, dtype=torch.float32) for _ in range(2)]
    packs = packed(weights, bf16, True)
    rest = run_backward(
        packs, dplan, dx_out, dy, saved, attended, plan_k, plan_v, cu_seqlens, weights, bf16, wants_dx, wants_weights,
        every,
    )  # fmt: skip
    # An op may not give back several views of one tensor.
    return [*dplan, *(x.clone() if x.nbytes < x.untyped_storage().nbytes() else x for x in rest)]


def _weight_gradients(
    w: BlockWeights,
    dy: Any | None,
    attended: Any | None,
    normed: Sequence[Any],
    operands: Sequence[Any],
    dbias: Tensor,
) -> list[Tensor]:
    """In the order of ``w``: products over all tokens of what the backward wrote down, arrays as the engine takes."""
    dim, hidden = w.w_plan_q.shape[0], w.w_in.shape[0]
    dx1, dq, dx2, dhidden, dx3, read, activated, normed3 = operands
    ends = list(itertools.accumulate([*([dim] if w.w_o is not None else []), dim, dim, hidden, dim, w.w_next.shape[0]]))
    *db_o, db_q, db_plan_o, db_in, db_out, db_next = (dbias[a:b] for a, b in zip([0, *ends], ends, strict=False))

    maps: list[tuple[Any, Any, Any, list[Any]]] = []

    def product(dy: Any, x: Any, like: Tensor, norm: list[Any] | None = None) -> Tensor:
        """dy^T x over all tokens, once the engine has run."""
        n_out, n_in = like.shape
        dw = torch.empty((n_out, n_in))
        maps.append((dy[:, :n_out], x[:, :n_in], dw.numpy(), norm or []))
        return dw

    def behind_norm(
        dy: Tensor | None, x: Tensor, norm_w: Tensor, norm_b: Tensor, w: Tensor, db: Tensor
    ) -> list[Tensor]:
        """Those of norm_w, norm_b, w and b; the operand x is the norm's result before scale and offset."""
        if dy is None:
            return [torch.zeros_like(norm_w), torch.zeros_like(norm_b), torch.zeros_like(w), db]
        dnorm_w, dnorm_b = torch.empty(dim), torch.empty(dim)
        norm = [_array(t.contiguous()) for t in (w, db, norm_w, norm_b, dnorm_w, dnorm_b)]
        return [dnorm_w, dnorm_b, product(dy, x, w, norm), db]

    # The largest first, so that threads end together.
    d_in = behind_norm(dhidden, normed[1], w.norm3_w, w.norm3_b, w.w_in, db_in)
    dw_out = product(dx3, activated, w.w_out)
    d_next = behind_norm(dy, normed3, w.norm_w, w.norm_b, w.w_next, db_next)
    d_plan_q = behind_norm(dq, normed[0], w.norm2_w, w.norm2_b, w.w_plan_q, db_q)
    dw_plan_o = product(dx2, read, w.w_plan_o)
    dw_o = [product(dx1, attended, w.w_o)] if w.w_o is not None and attended is not None else []
    _dispatch.cpp_engine()._weight_gradients(maps, _threads.count())
    return [*dw_o, *db_o, *d_plan_q, dw_plan_o, db_plan_o, *d_in, dw_out, db_out, *d_next]


_block_backward = torch.library.custom_op("gac_fast::block_backward", mutates_args=())(_run_backward)


@_block_backward.register_fake
def _(
    dx_out: Tensor | None, dy: Tensor | None, saved: Sequence[Tensor], attended: Tensor | None, plan_k: Tensor,
    plan_v: Tensor, cu_seqlens: Tensor, weights: Sequence[Tensor], bf16: bool, wants_dx: bool, wants_weights: bool,
    every: int,
) -> list[Tensor]:  # fmt: skip
    has_o = len(weights) == len(BlockWeights._fields)
    return _gradients(saved[0], has_o, plan_k, weights, bf16, wants_dx, wants_weights, every)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, attended, plan_k, plan_v, cu_seqlens, weights, ctx.bf16, _, ctx.wants_dx, ctx.wants_weights, ctx.every = inputs
    ctx.has_attended = attended is not None
    ctx.set_materialize_grads(False)
    x_out, _, *saved = output
    kept = attended if ctx.wants_weights else None
    ctx.save_for_backward(x_out, *saved, kept, plan_k, plan_v, cu_seqlens, *weights)


def _backward(ctx: Any, dx_out: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    saved, (attended, plan_k, plan_v, cu_seqlens), weights = (
        list(ctx.saved_tensors[:7]), ctx.saved_tensors[7:11], list(ctx.saved_tensors[11:])
    )  # fmt: skip
    if dx_out is None and dy is None:
        return (None,) * 5 + ([None] * len(weights), *(None,) * 5)
    seen = dy if dy is not None else dx_out
    run = _run_backward if seen is not None and _direct.unseen_backward(seen) else torch.ops.gac_fast.block_backward
    dplan_k, dplan_v, *rest = run(
        dx_out, dy, saved, attended, plan_k, plan_v, cu_seqlens, weights, ctx.bf16, ctx.wants_dx, ctx.wants_weights,
        ctx.every,
    )  # fmt: skip
    dx = dattended = None
    if ctx.wants_dx or ctx.wants_weights:
        dx = rest.pop(0)
        if ctx.has_attended:
            dattended = rest.pop(0)
    dweights = rest if ctx.wants_weights else [None] * len(weights)
    dplan = dplan_k.to(plan_k.dtype), dplan_v.to(plan_v.dtype)
    return dx, dattended, *dplan, None, dweights, *(None,) * 5


_block.register_autograd(_backward, setup_context=_setup_context)


# The same with the weights, of which each may ask for its gradient, as the last arguments.
_N_BEFORE = 5  # x, attended, plan_k, plan_v, cu_seqlens
_N_OPTIONS = 5


def _inputs(flat: Sequence[Any]) -> tuple[Any, ...]:
    first = _N_BEFORE + _N_OPTIONS
    return *flat[:_N_BEFORE], list(flat[first:]), *flat[_N_BEFORE:first]


def _backward_flat(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    found = _backward(ctx, *grads)  # type: ignore[arg-type]
    return *found[:_N_BEFORE], *found[_N_BEFORE + 1 :], *found[_N_BEFORE]


_directly = _direct.function(
    lambda *flat: _run(*_inputs(flat)), lambda ctx, flat, output: _setup_context(ctx, _inputs(flat), output),
    _backward_flat,
)  # fmt: skip


def checked_weights(weights: BlockWeights, x: Tensor, has_attended: bool) -> list[Tensor]:
    """Those that a layer of a stream x [N, D] has, in order.

    Raises:
        ValueError: one of another dtype, device or shape, naming it.
    """
    dim = x.shape[1]
    for name in ("w_in", "w_next"):
        _check.shape(f"weights.{name}", getattr(weights, name), "out", "in")
    hidden, n_next = weights.w_in.shape[0], weights.w_next.shape[0]
    sizes = {
        "w_in": (hidden, dim),
        "b_in": (hidden,),
        "w_out": (dim, hidden),
        "w_next": (n_next, dim),
        "b_next": (n_next,),
    }
    given = []
    for name, weight in zip(weights._fields, weights, strict=True):
        if weight is None and name in ("w_o", "b_o") and not has_attended:
            continue
        if weight is None:
            raise ValueError(f"weights.{name}: expected a tensor, got None")
        _check.dtype(f"weights.{name}", weight, x.dtype)
        _check.device(f"weights.{name}", weight, "x", x)
        _check.shape(f"weights.{name}", weight, *sizes.get(name, (dim, dim) if name.startswith("w_") else (dim,)))
        given.append(weight)
    return given


def decoder_block(
    x: Tensor,
    attended: Tensor | None,
    plan_k: Tensor,
    plan_v: Tensor,
    cu_seqlens: Tensor,
    weights: BlockWeights,
    bf16: bool = False,
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """A decoder layer from its window attention to the map that reads it.

    Equivalent to :func:`gac_fast.reference.decoder_block`. The backward makes gradients of weights only where one of
    them asks for it.

    Args:
        x: [every * N, D], float32 (or float64, which the reference takes); the residual stream.
        attended: [every * N, D], float32 or bfloat16, what window attention read; None where ``weights.w_o`` is.
        plan_k, plan_v: [B, n_z, H, d], float32 or bfloat16.
        cu_seqlens: int32 or int64 [B + 1], token offsets of the packed trajectories, rising from 0 to N.
        weights: of dtype and device of x. The C++ engine packs them once and keeps that while they stay as they are.
        bf16: round the operands of products to bfloat16; sums, norms and the stream stay as they are. (Gradients of
            matrices come out rounded to it, as under autocast.)
        every: the block takes rows 0, every, 2 every, ... of x and attended, and leaves the others out.

    Returns:
        x_out [N, D] and y [N, n_next]; y in bfloat16 where ``bf16``.

    Raises:
        ValueError: an argument of another dtype, device or shape, naming it.
        BackendError: a forced backend cannot run.
    """
    _check.dtype("x", x, torch.float32, torch.float64)
    _check.shape("x", x, "N", "D")
    if every < 1 or x.shape[0] % every != 0:
        raise ValueError(f"every: expected a divisor of the {x.shape[0]} rows of x, got {every}")
    n, dim = x.shape[0] // every, x.shape[1]
    if (attended is None) != (weights.w_o is None):
        raise ValueError("attended: expected None where weights.w_o is None, and only there")
    if attended is not None:
        _check.dtype("attended", attended, x.dtype, torch.bfloat16)
        _check.device("attended", attended, "x", x)
        _check.shape("attended", attended, *x.shape)
    for name, plan in (("plan_k", plan_k), ("plan_v", plan_v)):
        _check.dtype(name, plan, x.dtype, torch.bfloat16)
        _check.device(name, plan, "x", x)
    _check.device("cu_seqlens", cu_seqlens, "x", x)
    _check.cu_seqlens(cu_seqlens, n)
    _check.shape("plan_k", plan_k, cu_seqlens.shape[0] - 1, "n_z", "H", "d")
    _, n_z, heads, width = plan_k.shape
    if n_z < 1:
        raise ValueError("plan_k: expected at least 1 plan vector per trajectory, got 0")
    if heads * width != dim:
        raise ValueError(f"plan_k: expected H * d = {dim}, the width of x, got {heads} * {width}")
    _check.shape("plan_v", plan_v, *plan_k.shape)
    given = checked_weights(weights, x, attended is not None)

    refused = _dispatch.refusal(x)
    if refused is None and _dispatch.is_for_triton(OP, x.device):
        refused = _block_triton.refusal(dim, n_z)
    engine = _dispatch.choose(OP, x.device, refused)
    if engine != "cpp" and every > 1:
        x = x.view(n, every, dim)[:, 0]
        attended = None if attended is None else attended.view(n, every, dim)[:, 0]
    if engine == "reference":
        return reference.decoder_block(x, attended, plan_k, plan_v, cu_seqlens, weights, bf16)
    if attended is not None:
        attended = attended.to(torch.bfloat16 if bf16 else torch.float32)
    if engine == "triton":
        return _block_triton.run(x, attended, plan_k, plan_v, cu_seqlens, given, bf16)
    wants_weights = torch.is_grad_enabled() and any(weight.requires_grad for weight in given)
    wants_dx = torch.is_grad_enabled() and (x.requires_grad or (attended is not None and attended.requires_grad))
    wants_plan = torch.is_grad_enabled() and (plan_k.requires_grad or plan_v.requires_grad)
    save = wants_weights or wants_dx or wants_plan
    tensors = x, attended, plan_k, plan_v, cu_seqlens.to(torch.int64)
    options = bf16, save, wants_dx, wants_weights, every
    if not _direct.unseen(x) or not _direct.unseen(plan_k):
        x_out, y, *_ = torch.ops.gac_fast.block(*tensors, given, *options)
    elif save:
        x_out, y, *_ = _directly(*tensors, *options, *given)
    else:
        x_out, y, *_ = _run(*tensors, given, *options)
    return x_out, y
