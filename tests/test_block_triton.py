"""decoder_block on the Triton engine: interpreted against float64, compiled without a GPU, run where there is one."""

from __future__ import annotations

import pytest
import torch
from conftest import row_error
from kernel_fixtures import assert_fits, compile_cases, wgmma_hazards
from test_block import block_inputs, run_block

from gac_fast import ops
from gac_fast.errors import BackendError
from gac_fast.reference import BlockWeights

# ---------------------------------------------------------------------------------------------------------------------
# By the interpreter


def test_triton_interpreter_agrees(run_interpreted):
    run_interpreted(__file__)


CASES = {
    # Tiles of 16 tokens: trajectories of less, none, exactly one and several of them.
    "heads": {"lengths": (5, 40, 1, 0, 16), "dim": 32, "heads": 4, "n_z": 3, "hidden": 48, "n_next": 96},
    "first_layer": {"lengths": (0, 17, 0), "dim": 64, "heads": 8, "n_z": 1, "hidden": 64, "n_next": 7,
                    "with_out": False},
    "one_token": {"lengths": (1,), "dim": 16, "heads": 1, "n_z": 16, "hidden": 8, "n_next": 6},
    "odd": {"lengths": (3, 17), "dim": 20, "heads": 2, "n_z": 7, "hidden": 33, "n_next": 17},
    "groups_of_heads": {"lengths": (4, 18), "dim": 96, "heads": 12, "n_z": 16, "hidden": 100, "n_next": 70},
    "gym": {"lengths": (20, 2), "dim": 128, "heads": 4, "n_z": 4, "hidden": 512, "n_next": 384},
    "wide": {"lengths": (33, 2), "dim": 192, "heads": 6, "n_z": 5, "hidden": 130, "n_next": 192},
    "wider": {"lengths": (18,), "dim": 256, "heads": 1, "n_z": 2, "hidden": 64, "n_next": 70},
}  # fmt: skip


def check(inputs, found, expected, bound):
    n, n_z = len(inputs[0]), inputs[2].shape[1]
    assert found.keys() <= expected.keys()
    for name, value in found.items():
        x, y = value.float(), expected[name]
        # As in test_block: a row of few outputs, or of the gradient of few tokens, keeps the rounding of the rest.
        if (name in BlockWeights._fields and (n < 64 or n_z == 1)) or y.shape[-1] < 16:
            x, y = x.reshape(1, -1), y.reshape(1, -1)
        assert row_error(x, y) < bound, name


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "data"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_interpreted_forward_and_every_gradient(case, frozen):
    inputs = block_inputs(**case)
    with ops.backend("reference"):
        expected = run_block(inputs, dtype=torch.float64)
    ops.reset_dispatch_counts()
    with ops.backend("triton"):
        found = run_block(inputs, frozen=frozen)
    assert ops.dispatch_counts() == {("block", "triton"): 1}
    check(inputs, found, expected, 1e-5)


@pytest.mark.interpreter
def test_interpreted_inference_saves_nothing_and_equals_training():
    x, attended, plan, cu, weights, _ = block_inputs((5, 20))
    with ops.backend("triton"):
        trained = ops.decoder_block(x.clone().requires_grad_(), attended, *plan.unbind(2), cu, weights)
        x_out, y, *saved = torch.ops.gac_fast.block_triton(
            x, attended, *plan.unbind(2), cu, list(weights), False, False, False, False
        )
    assert torch.equal(trained[0], x_out)
    assert torch.equal(trained[1], y)
    assert saved[0].numel() == saved[1].numel() == 0


@pytest.mark.interpreter
@pytest.mark.usefixtures("nan_filled_empty")
def test_interpreted_gradient_of_the_plan_alone():
    x, attended, plan, cu, weights, _ = block_inputs((5, 20), n_z=4)

    def gradient(plan, *others):
        plan = plan.clone().requires_grad_()
        x_out, y = ops.decoder_block(*others[:2], *plan.unbind(2), cu, BlockWeights(*others[2:]))
        return torch.autograd.grad(x_out.square().sum() + y.square().sum(), plan)[0]

    with ops.backend("triton"):
        found = gradient(plan, x, attended, *weights)
    with ops.backend("reference"):
        expected = gradient(plan.double(), *(t.double() for t in (x, attended, *weights)))
    assert row_error(found.flatten(1), expected.flatten(1)) < 1e-5


@pytest.mark.interpreter
def test_interpreted_strided_arguments_and_missing_gradients():
    x, attended, plan, cu, weights, _ = block_inputs((7, 20))

    def gradients(x, attended, k, v, cu, loss):
        leaves = [t.requires_grad_() for t in (x, attended, k, v)]
        return torch.autograd.grad(loss(*ops.decoder_block(*leaves, cu, weights)), leaves)

    losses = {
        "x_out": lambda x_out, y: x_out.sum(),
        "y": lambda x_out, y: y.square().sum(),
        "both": lambda x_out, y: x_out[:, ::3].sum() + y.sum(),
    }
    with ops.backend("triton"):
        for name, loss in losses.items():
            dense = gradients(x.clone(), attended.clone(), *(t.clone() for t in plan.unbind(2)), cu, loss)
            strided = gradients(
                torch.stack((x, x - 1), dim=1).detach()[:, 0], attended.T.clone().T, *plan.detach().unbind(2),
                torch.stack((cu.long(), cu.long() + 1), dim=1)[:, 0], loss,
            )  # fmt: skip
            for one, other in zip(dense, strided, strict=True):
                assert torch.equal(one, other), name
                assert bool(one.any()), name


@pytest.mark.interpreter
@pytest.mark.parametrize("lengths", [(0, 0), ()], ids=str)
def test_interpreted_block_of_no_tokens(lengths):
    with ops.backend("triton"):
        found = run_block(block_inputs(lengths))
    assert found["y"].shape == (0, 96)
    assert not any(bool(found[name].any()) for name in ("plan", "w_in", "norm_w", "b_next", "w_plan_q"))


@pytest.mark.interpreter
def test_interpreted_tiles_cover_every_token_once_and_never_cross():
    from gac_fast.kernels import block as kernel

    for lengths in ([1], [64], [65, 1, 200], [0, 5, 0, 0, 130, 0], [3] * 40, [15] * 70):
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        tiles = torch.full((sum(lengths) // 16 + len(lengths), 4), -1, dtype=torch.int32)
        kernel.tiles_launch(cu, tiles, 16).run()
        expected = [
            (b, int(cu[b]) + start, min(16, length - start), start // 16)
            for b, length in enumerate(lengths)
            for start in range(0, length, 16)
        ]
        assert [tuple(row) for row in tiles.tolist() if row[2] > 0] == expected
        # The second launch of the backward finds the tiles of a trajectory without the table.
        assert all(tuple(tiles[int(cu[b]) // 16 + b + number]) == (b, *rest, number) for b, *rest, number in expected)


@pytest.mark.interpreter
def test_interpreted_backward_times_nothing(monkeypatch):
    """Another tile adds the gradients of a plan in another order: clocks must not choose it."""
    from gac_fast.kernels import block as kernel

    timed, choose = [], kernel._launch.choose
    monkeypatch.setattr(kernel._launch, "choose", lambda key, *rest: (timed.append(key[0]), choose(key, *rest))[1])
    with ops.backend("triton"):
        run_block(block_inputs((5, 6), dim=16, heads=2, hidden=8, n_next=5))
    assert timed == ["block_forward"]


@pytest.mark.interpreter
def test_interpreted_op_passes_opcheck():
    x, attended, plan, cu, weights, (dx_out, dy) = block_inputs((5, 6), dim=16, heads=2, hidden=8, n_next=5)
    leaves = [t.detach().clone().requires_grad_() for t in (x, attended, *plan.unbind(2))]
    arguments = (*leaves, cu, [w.clone().requires_grad_() for w in weights], False, True, True, True)
    torch.library.opcheck(torch.ops.gac_fast.block_triton.default, arguments)
    with torch.no_grad():
        _, _, *saved = torch.ops.gac_fast.block_triton(*arguments)
        for wants_dx, wants_weights in ((False, False), (True, False), (True, True)):
            torch.library.opcheck(
                torch.ops.gac_fast.block_triton_backward.default,
                (dx_out, dy, saved, attended, *(t.detach() for t in leaves[2:]), cu, list(weights), wants_dx,
                 wants_weights),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip


@pytest.mark.interpreter
def test_interpreted_block_compiles_into_one_graph():
    x, attended, plan, cu, weights, _ = block_inputs((5, 6), dim=16, heads=2, hidden=8, n_next=5)
    x.requires_grad_()

    def loss(x, attended, plan):
        return sum(t.square().sum() for t in ops.decoder_block(x, attended, *plan.unbind(2), cu, weights))

    with ops.backend("triton"):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        grads = [torch.autograd.grad(f(x, attended, plan), x)[0] for f in (loss, compiled)]
    assert torch.equal(*grads)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 272, "heads": 17}, "block: .* forces the triton backend.* up to 256 columns, got 272"),
        ({"n_z": 17}, "block: .* forces the triton backend.* up to 16 plan vectors, got 17"),
    ],
    ids=["dim", "n_z"],
)
def test_interpreted_sizes_that_the_kernels_do_not_take(change, message):
    x, attended, plan, cu, weights, _ = block_inputs((3,), **change)
    with ops.backend("triton"), pytest.raises(BackendError, match=message):
        ops.decoder_block(x, attended, *plan.unbind(2), cu, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled without a GPU


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def assert_all_fit(architecture, dtype, folder, **sizes):
    pytest.importorskip("triton")
    from gac_fast.kernels import block as kernel

    launches = kernel.shipped(dtype=dtype, architecture=architecture, **sizes)
    names = {launch.name for launch in launches}
    assert names == {f"{stem}_kernel" for stem in ("pack", "plan", "tiles", "forward", "backward", "reduce")}
    for launch in launches:
        assert_fits(launch, architecture, folder, spills=dtype == torch.float32)


@pytest.mark.parametrize("mode", ["data", "weights"])
def test_the_tile_of_a_backward_follows_from_the_sizes_alone(mode):
    pytest.importorskip("triton")
    from gac_fast.kernels import block as kernel

    def tiles(dim: int, heads: int = 4, n_next: int = 96, architecture: int = 90) -> list[int]:
        found = kernel.options(kernel.Sizes(dim, heads, 4, 4 * dim, n_next), torch.bfloat16, mode, architecture)
        return [dict(option.tiles)["BT"] for option in found]

    assert tiles(128) == tiles(64) == tiles(128, architecture=80) == [64]
    # Masks of columns, many heads, the head of the decoder.
    assert tiles(96) == tiles(128, n_next=6) == [128]
    assert tiles(128, heads=16) == [64 if mode == "data" else 128]
    assert tiles(256) == [32]


@pytest.mark.usefixtures("fresh_cache")
def test_gym_compiles_without_spills(tmp_path):
    assert_all_fit(90, torch.bfloat16, tmp_path, dim=128, heads=4, n_z=4)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype", "architecture"), compile_cases("block"))
def test_every_size_compiles(sizes, dtype, architecture, tmp_path):
    assert_all_fit(architecture, dtype, tmp_path, **sizes)


@pytest.mark.usefixtures("fresh_cache")
def test_bf16_products_run_on_wgmma():
    pytest.importorskip("triton")
    from gac_fast.kernels import block as kernel

    launch = next(one for one in kernel.shipped(64, 4, 4, torch.bfloat16) if one.name == "forward_kernel")
    ptx = launch.compile(90).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "mma.sync" not in ptx
    # Weights come in by asynchronous copies of 16 bytes.
    assert "cp.async.cg.shared.global" in ptx


# Of the backward as it was when it first ran on an H200, shortened.
SHARED_WITH_REGISTERS = """
    %b_dy_81 = ttg.local_alloc : () -> !ttg.memdesc<1x64x64xbf16, #shared, #smem, mutable>
    %b_w_82 = ttg.local_alloc : () -> !ttg.memdesc<2x64x32xbf16, #shared1, #smem, mutable>
      %b_dy_390 = ttg.memdesc_index %b_dy_81[%g_387] : !ttg.memdesc<1x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
      %b_dy_391 = ttg.local_load %b_dy_390 token %b_dy_389 : !ttg.memdesc<64x64xbf16> -> tensor<64x64xbf16, #blocked1>
      %b_w_392 = ttg.memdesc_index %b_w_82[%g_384] : !ttg.memdesc<2x64x32xbf16> -> !ttg.memdesc<64x32xbf16>
      %g_393 = ttng.warp_group_dot %b_dy_390, %b_w_392, %arg21 {isAsync = true} : !ttg.memdesc<64x64xbf16>
"""
TWO_SWIZZLES = """
	or.b64 	%rd75, %rd17, 4611686293305294848;
	add.s64 	%rd77, %rd17, 4611686293305294850;
	or.b64 	%rd131, %rd17, -9223371899415822336;
	add.s64 	%rd133, %rd17, -9223371899415822334;
"""


def test_hazards_of_wgmma_are_found():
    assert wgmma_hazards(SHARED_WITH_REGISTERS, "") == ["%b_dy_81 is read by wgmma and loaded"]
    assert wgmma_hazards("", TWO_SWIZZLES) == ["%rd17 is the base of descriptors 0x40000040, 0x80000020"]
    assert (
        wgmma_hazards(
            SHARED_WITH_REGISTERS.replace("local_load %b_dy_390", "local_load %other"),
            TWO_SWIZZLES.replace("31, %rd17", "31, %rd18").replace("33, %rd17", "33, %rd18"),
        )
        == []
    )


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


def on_gpu(inputs):
    x, attended, plan, cu, weights, grads = inputs
    moved = (None if t is None else t.cuda() for t in (x, attended, plan, cu))
    return (*moved, BlockWeights(*(None if w is None else w.cuda() for w in weights)), tuple(t.cuda() for t in grads))


GPU_CASES = {
    **CASES,
    "long": {"lengths": (700, 129, 0, 64, 1), "dim": 128, "n_z": 4, "hidden": 512, "n_next": 384},
    "narrow": {"lengths": (200, 128), "dim": 64, "heads": 2, "n_z": 4, "hidden": 256, "n_next": 192},
}


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "data"])
@pytest.mark.parametrize(("bf16", "bound"), [(False, 1e-5), (True, 2e-2)], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_gpu_forward_and_every_gradient(case, bf16, bound, frozen):
    inputs = block_inputs(**case)
    with ops.backend("reference"):
        expected = run_block(inputs, dtype=torch.float64)
    ops.reset_dispatch_counts()
    found = run_block(on_gpu(inputs), bf16, frozen=frozen)
    assert ops.dispatch_counts() == {("block", "triton"): 1}
    check(inputs, {name: value.cpu() for name, value in found.items()}, expected, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_gpu_gives_the_same_bits_a_hundred_times(bf16):
    inputs = on_gpu(block_inputs((300, 1, 64, 0, 129), dim=128, n_z=4, hidden=512, n_next=384))
    first = run_block(inputs, bf16)
    for _ in range(100):
        again = run_block(inputs, bf16)
        assert all(torch.equal(first[name], again[name]) for name in first)
