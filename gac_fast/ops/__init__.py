"""The accelerated ops: one file each, every one with a plain PyTorch reference and engines chosen by device."""

from gac_fast.ops._dispatch import (
    BACKENDS,
    ModelSizes,
    OpStatus,
    backend,
    cpu_isa,
    dispatch_counts,
    refusals,
    reset_dispatch_counts,
    status,
)
from gac_fast.ops._memory import keep_freed_memory
from gac_fast.ops._threads import left_to_the_engine
from gac_fast.ops.action_errors import action_errors
from gac_fast.ops.adamw import adamw, adamw_takes
from gac_fast.ops.block import decoder_block, fixed_weights, while_fixed
from gac_fast.ops.decode_step import DecodeState, Units, WeightsOf, decode_step, has_fast_bf16, prepare_again
from gac_fast.ops.decoder_layers import LayerStack, decoder_layers, runs_directly
from gac_fast.ops.norm_linear import norm_linear
from gac_fast.ops.pack_batch import PackedBatch, draw_trajectories, drop_steps, pack_batch
from gac_fast.ops.philox_normal import philox_normal
from gac_fast.ops.plan_ascent import plan_ascent, plan_langevin
from gac_fast.ops.plan_attention import plan_attention
from gac_fast.ops.posterior_langevin import SeedEnergy, energy_runs_directly, posterior_langevin
from gac_fast.ops.return_losses import return_losses
from gac_fast.ops.seed_plans import seed_plans
from gac_fast.ops.window_attention import window_attention, window_attention_qkv
from gac_fast.ops.window_block import window_block

__all__ = [
    "BACKENDS",
    "DecodeState",
    "LayerStack",
    "ModelSizes",
    "OpStatus",
    "PackedBatch",
    "SeedEnergy",
    "Units",
    "WeightsOf",
    "action_errors",
    "adamw",
    "adamw_takes",
    "backend",
    "cpu_isa",
    "decode_step",
    "decoder_block",
    "decoder_layers",
    "dispatch_counts",
    "draw_trajectories",
    "drop_steps",
    "energy_runs_directly",
    "fixed_weights",
    "has_fast_bf16",
    "keep_freed_memory",
    "left_to_the_engine",
    "norm_linear",
    "pack_batch",
    "philox_normal",
    "plan_ascent",
    "plan_attention",
    "plan_langevin",
    "posterior_langevin",
    "prepare_again",
    "refusals",
    "reset_dispatch_counts",
    "return_losses",
    "runs_directly",
    "seed_plans",
    "status",
    "while_fixed",
    "window_attention",
    "window_attention_qkv",
    "window_block",
]
