"""norm_linear and mlp_residual against their formulas in float64, decoder_block against the reference."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from conftest import row_error
from core_fixtures import make_batch, make_model, model_config

from gac_fast import ops, reference
from gac_fast.config import Config, TrainConfig
from gac_fast.errors import BackendError
from gac_fast.posterior import PosteriorState
from gac_fast.reference import BlockWeights
from gac_fast.train.update import make_optimizer, update


def parts(dim=10, hidden=14, rows=(5, 3), dtype=torch.float64):
    """x, norm weight and bias, W_in, b_in, W_out, b_out; x with a mean and scale that the norm must remove."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, dim), (dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,))
    x, *weights = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return 3 * x + 7, *weights


def norm_linear(x, norm_w, norm_b, w, b):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return ((x - mean) / (variance + 1e-5).sqrt() * norm_w + norm_b) @ w.T + (0 if b is None else b)


def mlp_residual(x, norm_w, norm_b, w_in, b_in, w_out, b_out):
    h = norm_linear(x, norm_w, norm_b, w_in, b_in)
    return x + (h / (1 + torch.exp(-h))) @ w_out.T + b_out


@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_norm_linear(rows, dtype, bound):
    x, norm_w, norm_b, w, b, *_ = parts(rows=rows, dtype=dtype)
    expected = norm_linear(*(y.double() for y in (x, norm_w, norm_b, w, b)))
    assert row_error(reference.norm_linear(x, norm_w, norm_b, w, b), expected) < bound
    without_bias = norm_linear(*(y.double() for y in (x, norm_w, norm_b, w)), None)
    assert row_error(reference.norm_linear(x, norm_w, norm_b, w, None), without_bias) < bound


@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_mlp_residual(rows, dtype, bound):
    arguments = parts(rows=rows, dtype=dtype)
    assert row_error(reference.mlp_residual(*arguments), mlp_residual(*(x.double() for x in arguments))) < bound


def test_gradients():
    leaves = [x.requires_grad_() for x in parts(dim=4, hidden=5, rows=(3,))]
    assert torch.autograd.gradcheck(reference.mlp_residual, leaves)
    assert torch.autograd.gradcheck(reference.norm_linear, leaves[:5])


def test_a_constant_row_stays_finite():
    x, *weights = parts(rows=(2,))
    x[0] = 7.0
    assert bool(torch.isfinite(reference.mlp_residual(x, *weights)).all())


# ---------------------------------------------------------------------------------------------------------------------
# decoder_block


def block_inputs(lengths, dim=32, heads=4, n_z=3, hidden=48, n_next=96, with_out=True):
    """x, attended, plan keys and values [B, n_z, 2, H, d], cu_seqlens, weights, and gradients of x_out and y.

    Everything that the engine rounds to bfloat16 as it comes is exact in it, so that one float64 reference serves both.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().float()

    shapes = {
        "w_in": (hidden, dim),
        "b_in": (hidden,),
        "w_out": (dim, hidden),
        "w_next": (n_next, dim),
        "b_next": (n_next,),
    }
    weights = []
    for name in BlockWeights._fields:
        shape = shapes.get(name, (dim, dim) if name.startswith("w_") else (dim,))
        if name in ("w_o", "b_o") and not with_out:
            weights.append(None)
        elif len(shape) == 2:
            weights.append(normal(*shape) / shape[1] ** 0.5)
        else:
            weights.append(0.3 * normal(*shape) + (1 if name.startswith("norm") and name.endswith("_w") else 0))
    n = sum(lengths)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    attended = normal(n, dim) if with_out else None
    plan = normal(len(lengths), n_z, 2, heads, dim // heads)
    return 2 * normal(n, dim) + 1, attended, plan, cu, BlockWeights(*weights), (normal(n, dim), normal(n, n_next))


def run_block(inputs, bf16=False, dtype=torch.float32, frozen=False):
    """x_out, y and all gradients by name."""
    x, attended, plan, cu, weights, (dx_out, dy) = inputs
    x, plan = (t.to(dtype).requires_grad_() for t in (x.clone(), plan.clone()))
    attended = None if attended is None else attended.to(dtype).clone().requires_grad_()
    weights = BlockWeights(*(None if w is None else w.to(dtype).clone().requires_grad_(not frozen) for w in weights))
    x_out, y = ops.decoder_block(x, attended, *plan.unbind(2), cu, weights, bf16)
    torch.autograd.backward((x_out, y), (dx_out.to(x_out.dtype), dy.to(y.dtype)))
    found = {"x_out": x_out, "y": y, "x": x.grad, "plan": plan.grad.flatten(1)}
    if attended is not None:
        found["attended"] = attended.grad
    for name, w in zip(weights._fields, weights, strict=True):
        if w is not None and not frozen:
            found[name] = w.grad
        assert w is None or (w.grad is None) == frozen
    return {name: t.detach() for name, t in found.items()}


BLOCK_CASES = {
    "gym": {"lengths": (5, 70, 1, 0, 64), "dim": 128, "n_z": 4, "hidden": 512, "n_next": 384},
    "one_token": {"lengths": (1,), "dim": 64, "heads": 8, "n_z": 1, "hidden": 256, "n_next": 192, "with_out": False},
    "odd": {"lengths": (3, 17), "dim": 96, "n_z": 7, "hidden": 100, "n_next": 17},
    "wide": {"lengths": (33, 64), "dim": 192, "heads": 1, "n_z": 4, "hidden": 200, "n_next": 576},
    "wider": {"lengths": (1, 1, 118), "dim": 256, "heads": 8, "n_z": 1, "hidden": 512, "n_next": 768},
    "narrow": {"lengths": (130, 0), "dim": 20, "heads": 2, "n_z": 2, "hidden": 33, "n_next": 7},
}


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("bf16", "bound"), [(False, 1e-5), (True, 2e-2)], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", BLOCK_CASES)
def test_block_forward_and_every_gradient(isa, case, bf16, bound):
    inputs = block_inputs(**BLOCK_CASES[case])
    n = len(inputs[0])
    with ops.backend("reference"):
        expected = run_block(inputs, dtype=torch.float64)
    ops.reset_dispatch_counts()
    found = run_block(inputs, bf16)
    assert ops.dispatch_counts() == {("block", "cpp"): 1}
    assert found["y"].dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        x, y = value.float(), expected[name]
        # A row of the gradient of few tokens is small where those tokens barely move it, and keeps the rounding of the
        # rest; with one plan vector all tokens of a trajectory read the same, and a row is one number. A row of few
        # outputs likewise: these are measured as a whole.
        if (name in BlockWeights._fields and (n < 32 or inputs[2].shape[1] == 1)) or y.shape[-1] < 16:
            x, y = x.reshape(1, -1), y.reshape(1, -1)
        assert row_error(x, y) < bound, name


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_block_makes_no_weight_gradients_where_none_is_asked_for(cpp_engine, bf16):
    inputs = block_inputs((9, 66))
    with_weights, without = (run_block(inputs, bf16, frozen=frozen) for frozen in (False, True))
    assert without.keys() == {"x_out", "y", "x", "plan", "attended"}
    for name, value in without.items():
        assert torch.equal(value, with_weights[name]), name


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_block_is_bit_equal_on_any_number_of_threads(cpp_engine, bf16):
    inputs = block_inputs((200, 1, 90, 0, 64))
    try:
        runs = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            runs.append(run_block(inputs, bf16))
    finally:
        torch.set_num_threads(1)
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_block_takes_strided_arguments_and_missing_gradients(cpp_engine, bf16):
    x, attended, plan, cu, weights, _ = block_inputs((7, 40))

    def gradients(x, attended, k, v, loss):
        leaves = [t.requires_grad_() for t in (x, attended, k, v)]
        return torch.autograd.grad(loss(*ops.decoder_block(*leaves, cu, weights, bf16)), leaves)

    losses = {
        "x_out": lambda x_out, y: x_out.sum(),
        "y": lambda x_out, y: y.float().square().sum(),
        "both": lambda x_out, y: x_out[:, ::3].sum() + y.sum(),
    }
    for name, loss in losses.items():
        dense = gradients(x.clone(), attended.clone(), *(t.clone() for t in plan.unbind(2)), loss)
        strided = gradients(
            torch.stack((x, x - 1), dim=1).detach()[:, 0], attended.T.clone().T, *plan.detach().unbind(2), loss
        )
        for one, other in zip(dense, strided, strict=True):
            assert torch.equal(one, other), name
            assert bool(one.any()), name


def test_block_takes_plan_keys_in_bfloat16(cpp_engine):
    x, attended, plan, cu, weights, _ = block_inputs((7, 40))
    plan = plan.bfloat16()
    rounded = ops.decoder_block(x, attended.bfloat16(), *plan.unbind(2), cu, weights, True)
    exact = ops.decoder_block(x, attended, *plan.float().unbind(2), cu.long(), weights, True)
    assert all(torch.equal(one, other) for one, other in zip(rounded, exact, strict=True))
    k, v = (t.clone().requires_grad_() for t in plan.unbind(2))
    ops.decoder_block(x, attended, k, v, cu, weights, True)[0].square().sum().backward()
    assert k.grad.dtype == v.grad.dtype == torch.bfloat16


def test_block_of_no_tokens(cpp_engine):
    found = run_block(block_inputs((0, 0)))
    assert found["y"].shape == (0, 96)
    assert not any(bool(found[name].any()) for name in ("plan", "w_in", "norm_w", "b_next"))


def test_packed_weights_follow_the_parameters(cpp_engine):
    x, attended, plan, cu, weights, _ = block_inputs((20,))

    def error():
        with ops.backend("reference"):
            expected = ops.decoder_block(x, attended, *plan.unbind(2), cu, weights)[1]
        return row_error(ops.decoder_block(x, attended, *plan.unbind(2), cu, weights)[1], expected)

    assert error() < 1e-5
    weights.w_in.mul_(1.5)
    assert error() < 1e-5
    parameter = weights.norm_b.requires_grad_()
    ops.decoder_block(x, attended, *plan.unbind(2), cu, weights)[1].sum().backward()
    for kind in ({"foreach": True}, {"fused": True}):
        before = parameter.detach().clone()
        torch.optim.AdamW([parameter], lr=0.1, **kind).step()
        assert not torch.equal(parameter, before)
        assert error() < 1e-5
    with torch.inference_mode():
        weights.w_out.mul_(0.5)
        assert error() < 1e-5
    weights.b_in.data.numpy()[-1] += 1
    assert error() < 1e-5
    # Other tensors, perhaps where the old ones were.
    for seed in range(3):
        w_next = torch.randn(weights.w_next.shape, generator=torch.Generator().manual_seed(seed))
        weights = weights._replace(w_next=w_next)
        del w_next
        assert error() < 1e-5


STRUCTURED = {
    "negated": lambda w: w.neg_(),
    "doubled": lambda w: w.mul_(2),
    "fourfold": lambda w: w.mul_(4),
    "a negated row": lambda w: w[3].neg_(),
    "a negated column": lambda w: w[:, 5].neg_(),
    "rows exchanged": lambda w: w.copy_(w.roll(1, 0)),
    "columns exchanged": lambda w: w.copy_(w.roll(16, 1)),
    "two signs": lambda w: w[0, :2].neg_(),
    "reversed": lambda w: w.copy_(w.flip(0)),
}


@pytest.mark.parametrize("change", STRUCTURED.values(), ids=STRUCTURED.keys())
@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (7, 96)], ids=str)
@pytest.mark.usefixtures("isa")
def test_structured_changes_of_weights_show_in_the_fingerprint(cpp_engine, shape, change):
    # A sum of bit patterns would miss sign flips and powers of two: they add multiples of 2^31 and 2^23.
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = cpp_engine._block_fingerprint([w.numpy()])
    assert cpp_engine._block_fingerprint([w.clone().numpy()]) == before
    change(w)
    after = cpp_engine._block_fingerprint([w.numpy()])
    assert after[0] != before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("name", ["w_o", "w_plan_o", "w_in", "w_out", "w_next"])
def test_negated_and_doubled_weights_are_packed_anew(cpp_engine, name):
    x, attended, plan, cu, weights, _ = block_inputs((20,))
    weight = getattr(weights, name)
    for factor in (-1, 2):
        ops.decoder_block(x, attended, *plan.unbind(2), cu, weights)
        weight.mul_(factor)
        found = ops.decoder_block(x, attended, *plan.unbind(2), cu, weights)[1]
        with ops.backend("reference"):
            expected = ops.decoder_block(x, attended, *plan.unbind(2), cu, weights)[1]
        assert row_error(found, expected) < 1e-5


def test_float64_takes_the_reference(cpp_engine):
    inputs = block_inputs((3, 4), dim=16, heads=2, hidden=8, n_next=5)
    run_block(inputs, dtype=torch.float64)
    assert ops.dispatch_counts() == {("block", "reference"): 1}


def op_arguments(inputs, save=True):
    x, attended, plan, cu, weights, _ = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x, attended, *plan.unbind(2))]
    return (*leaves, cu.long(), [w.clone().requires_grad_() for w in weights], False, save, True, True, 1)


def test_registered_block_passes_opcheck(cpp_engine):
    inputs = block_inputs((5, 6), dim=16, heads=2, hidden=8, n_next=5)
    torch.library.opcheck(torch.ops.gac_fast.block.default, op_arguments(inputs))
    *_, (dx_out, dy) = inputs
    _, attended, k, v, cu, weights, bf16, _, wants_dx, wants_weights, _ = op_arguments(inputs)
    with torch.no_grad():
        x_out, _, *saved = torch.ops.gac_fast.block(*op_arguments(inputs))
        arguments = (
            dx_out,
            dy,
            [x_out, *saved],
            attended.detach(),
            k.detach(),
            v.detach(),
            cu,
            [w.detach() for w in weights],
        )
        torch.library.opcheck(
            torch.ops.gac_fast.block_backward.default, (*arguments, bf16, wants_dx, wants_weights, 1),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_block_compiles_into_one_graph(cpp_engine):
    x, attended, plan, cu, weights, _ = block_inputs((5, 6), dim=16, heads=2, hidden=8, n_next=5)
    x.requires_grad_()

    def loss(x, attended, plan):
        return sum(t.square().sum() for t in ops.decoder_block(x, attended, *plan.unbind(2), cu, weights))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x, attended, plan), x)[0] for f in (loss, compiled)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 32, dtype=torch.int32)}, "x: expected dtype float32 or float64, got int32"),
        ({"x": torch.zeros(7, 31)}, r"attended: expected shape \[7, 31\], got \[7, 32\]"),
        ({"attended": None}, "attended: expected None where weights.w_o is None, and only there"),
        ({"plan_k": torch.zeros(1, 3, 4, 8)}, r"plan_k: expected shape \[2, n_z, H, d\], got \[1, 3, 4, 8\]"),
        ({"plan_k": torch.zeros(2, 3, 4, 9)}, "plan_k: expected H \\* d = 32, the width of x, got 4 \\* 9"),
        ({"plan_v": torch.zeros(2, 2, 4, 8)}, r"plan_v: expected shape \[2, 3, 4, 8\], got \[2, 2, 4, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 8])}, "cu_seqlens: expected a last offset of 7, got 8"),
        ({"cu_seqlens": torch.tensor([1, 5, 7])}, "cu_seqlens: expected a first offset of 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 9, 7])}, "cu_seqlens: expected offsets that rise to 7, got 0 before 9"),
        ({"cu_seqlens": torch.tensor([0, -2, 7])}, "cu_seqlens: expected offsets that rise to 7, got 0 before -2"),
        ({"b_in": torch.zeros(3)}, r"weights.b_in: expected shape \[48\], got \[3\]"),
        ({"w_plan_q": torch.zeros(32, 32).double()}, "weights.w_plan_q: expected dtype float32, got float64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_block_arguments_name_the_argument(cpp_engine, change, message):
    x, attended, plan, cu, weights, _ = block_inputs((3, 4))
    arguments = {"x": x, "attended": attended, "plan_k": plan[:, :, 0], "plan_v": plan[:, :, 1], "cu_seqlens": cu}
    name = next(iter(change))
    if name in BlockWeights._fields:
        weights = weights._replace(**change)
    else:
        arguments |= change
    with pytest.raises(ValueError, match=message):
        ops.decoder_block(**arguments, weights=weights)


def test_triton_does_not_run_on_cpu_tensors(cpp_engine):
    x, attended, plan, cu, weights, _ = block_inputs((3, 4))
    with ops.backend("triton"), pytest.raises(BackendError, match=r"block: .* got cpu tensors"):
        ops.decoder_block(x, attended, *plan.unbind(2), cu, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Convergence: a tiny model trained on either engine


@pytest.mark.parametrize("context", ["states", "states_actions"])
@pytest.mark.parametrize(("bf16", "bound"), [(False, 1e-3), (True, 5e-2)], ids=["float32", "bf16"])
def test_training_on_either_engine_agrees(cpp_engine, context, bf16, bound):
    def train(backend):
        config = Config(
            model=model_config(context=context, return_dropout=0.0), train=TrainConfig(learning_rate=3e-3, warmup=0)
        )
        model = make_model(config.model)
        model.bf16 = bf16
        lengths = [5, 12, 1, 30]
        posterior = PosteriorState(config.posterior, 4, config.model.n_z, config.model.dim, 0, torch.device("cpu"))
        batch, optimizer = make_batch(lengths), make_optimizer(model, config.train)
        ops.reset_dispatch_counts()
        with ops.backend(backend) if backend == "reference" else contextlib.nullcontext():
            values = [update(model, optimizer, posterior, batch, torch.arange(4), config) for _ in range(20)]
        assert ops.dispatch_counts()["block", backend] == 20 * 4 * config.model.n_layers
        return torch.stack([v["loss"] for v in values]), dict(model.named_parameters()), posterior.tensors["z0"]

    start = dict(make_model(model_config(context=context, return_dropout=0.0)).named_parameters())
    (loss_r, model_r, z0_r), (loss_c, model_c, z0_c) = train("reference"), train("cpp")
    assert float(loss_c[-1]) < 0.95 * float(loss_c[0])
    assert float((loss_c - loss_r).abs().max()) < bound * float(loss_r.max())
    # Against how far training moved them: Adam's steps have the size of the rate whatever that of the gradient.
    moved, apart = (
        torch.cat([(one[k] - other[k]).flatten() for k in one]).norm().item()
        for one, other in ((model_r, start), (model_r, model_c))
    )
    assert apart < 10 * bound * moved
    assert row_error(z0_c.flatten()[None], z0_r.flatten()[None]) < bound


@pytest.mark.usefixtures("isa", "nan_filled_empty")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("with_out", [True, False], ids=["out", "first"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "weights"])
def test_every_other_row_alone(bf16, with_out, frozen):
    """The same as on the rows picked by hand: bit for bit, with zero as the gradient of the others."""
    lengths = [70, 1, 12]
    x, attended, plan, cu, weights, gradients = block_inputs(lengths, with_out=with_out)

    def run(every: int):
        rows = [None if t is None else t.detach().clone() for t in (x, attended)]
        if every > 1:
            wide = [None if t is None else torch.full((every * len(t), t.shape[1]), 7.0) for t in rows]
            for full, t in zip(wide, rows, strict=True):
                if full is not None:
                    full[::every] = t
            rows = wide
        leaves = [t.requires_grad_() for t in (*rows, plan.clone()) if t is not None]
        own = BlockWeights(*(None if w is None else w.clone().requires_grad_(not frozen) for w in weights))
        leaves += [w for w in own if w is not None and w.requires_grad]
        out = ops.decoder_block(rows[0], rows[1], *leaves[2 if with_out else 1].unbind(2), cu, own, bf16, every)
        return out, torch.autograd.grad(out, leaves, [g.to(y.dtype) for g, y in zip(gradients, out, strict=True)])

    out, grads = run(1)
    out3, grads3 = run(3)
    assert ops.dispatch_counts() == {("block", "cpp"): 2}
    assert all(torch.equal(a, b) for a, b in zip(out3, out, strict=True))
    n_rows = 2 if with_out else 1
    for a, b in zip(grads3[:n_rows], grads[:n_rows], strict=True):
        assert torch.equal(a[::3], b)
        assert not a[1::3].any()
        assert not a[2::3].any()
    assert all(torch.equal(a, b) for a, b in zip(grads3[n_rows:], grads[n_rows:], strict=True))


def test_every_names_what_does_not_divide():
    x, attended, plan, cu, weights, _ = block_inputs([5])
    with pytest.raises(ValueError, match="every: expected a divisor of the 5 rows of x, got 2"):
        ops.decoder_block(x, attended, plan[:, :, 0], plan[:, :, 1], cu, weights, every=2)


@pytest.mark.usefixtures("cpp_engine")
def test_fixed_weights_are_packed_once_and_looked_at_again_afterwards(monkeypatch):
    from gac_fast.ops import block as module

    x, attended, plan, cu, weights, _ = block_inputs([40, 3])
    looks = []
    by_content = module._packed_by_content
    monkeypatch.setattr(module, "_packed_by_content", lambda *args: looks.append(1) or by_content(*args))

    def run():
        return ops.decoder_block(x, attended, plan[:, :, 0], plan[:, :, 1], cu, weights)

    with ops.fixed_weights():
        first = run()
        with ops.fixed_weights():
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
        run()
        # New ones, as after an update: nobody compares them with those of earlier ones.
        assert len(looks) == 0
    weights.w_out.data.mul_(2)
    changed = run()
    assert len(looks) == 1
    assert not torch.equal(changed[0], first[0])
    with ops.fixed_weights():
        assert all(torch.equal(a, b) for a, b in zip(run(), changed, strict=True))
