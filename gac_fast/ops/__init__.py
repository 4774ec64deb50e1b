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
from gac_fast.ops.block import decoder_block, fixed_weights
from gac_fast.ops.decode_step import DecodeState, Units, WeightsOf, decode_step, has_fast_bf16, prepare_again
from gac_fast.ops.norm_linear import norm_linear
from gac_fast.ops.pack_batch import PackedBatch, draw_trajectories, drop_steps, pack_batch
from gac_fast.ops.philox_normal import philox_normal
from gac_fast.ops.plan_ascent import plan_ascent, plan_langevin
from gac_fast.ops.plan_attention import plan_attention
from gac_fast.ops.window_attention import window_attention, window_attention_qkv

__all__ = [
    "BACKENDS",
    "DecodeState",
    "ModelSizes",
    "OpStatus",
    "PackedBatch",
    "Units",
    "WeightsOf",
    "backend",
    "cpu_isa",
    "decode_step",
    "decoder_block",
    "dispatch_counts",
    "draw_trajectories",
    "drop_steps",
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
    "prepare_again",
    "refusals",
    "reset_dispatch_counts",
    "status",
    "window_attention",
    "window_attention_qkv",
]
