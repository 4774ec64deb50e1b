"""Trajectory decoder: causal windowed transformer whose every layer also attends to the plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gac_fast import ops
from gac_fast.config import ModelConfig
from gac_fast.reference import BlockWeights, DecoderWeights, LayerWeights, PlanMap, StepWeights

__all__ = ["Decoder"]


def _bf16(x: Tensor) -> bool:
    """Whether autocast rounds the operands of products."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16


def _linear(layer: nn.Linear, x: Tensor, bf16: bool) -> Tensor:
    return ops.norm_linear(x, None, None, layer.weight, layer.bias, bf16)


class DecoderLayer(nn.Module):
    """Window attention, plan attention and MLP, each behind a layer norm and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.n_heads = config.n_heads
        self.rope_base = config.rope_base
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.plan_q = nn.Linear(dim, dim)
        self.plan_kv = nn.Linear(dim, 2 * dim)
        # Without it the decoder sees a set: permuting plan vectors would move the predicted return and no action.
        self.plan_position = nn.Parameter(0.5 * torch.randn(config.n_z, dim))
        self.plan_out = nn.Linear(dim, dim)
        self.mlp_in = nn.Linear(dim, config.mlp_ratio * dim)
        self.mlp_out = nn.Linear(config.mlp_ratio * dim, dim)

    def weights(self) -> LayerWeights:
        return LayerWeights(
            self.norm1.weight, self.norm1.bias, self.qkv.weight, self.qkv.bias, self.out.weight, self.out.bias,
            self.norm2.weight, self.norm2.bias, self.plan_q.weight, self.plan_q.bias,
            self.plan_out.weight, self.plan_out.bias,
            self.norm3.weight, self.norm3.bias, self.mlp_in.weight, self.mlp_in.bias,
            self.mlp_out.weight, self.mlp_out.bias,
        )  # fmt: skip

    def attend_window(self, x: Tensor, cu_seqlens: Tensor, window: int, positions: Tensor) -> Tensor:
        """The part that does not depend on the plan: [N, D] -> [N, D]."""
        weights = (
            self.norm1.weight, self.norm1.bias, self.qkv.weight, self.qkv.bias, self.out.weight, self.out.bias
        )  # fmt: skip
        return ops.window_block(x, weights, cu_seqlens, positions, self.n_heads, window, self.rope_base, _bf16(x))

    def plan_keys(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Plan [B, n_z, D] -> keys and values [B, n_z, H, d]."""
        b, n_z, dim = z.shape
        k, v = self.plan_kv(z + self.plan_position).view(b, n_z, 2, self.n_heads, dim // self.n_heads).unbind(2)
        return k, v

    def block_weights(self, with_out: bool, norm: nn.LayerNorm, after: nn.Linear) -> BlockWeights:
        """What follows window attention, up to the norm and map ``after`` this layer; W_o where ``with_out``."""
        return BlockWeights(
            self.out.weight if with_out else None, self.out.bias if with_out else None,
            self.norm2.weight, self.norm2.bias, self.plan_q.weight, self.plan_q.bias,
            self.plan_out.weight, self.plan_out.bias,
            self.norm3.weight, self.norm3.bias, self.mlp_in.weight, self.mlp_in.bias,
            self.mlp_out.weight, self.mlp_out.bias,
            norm.weight, norm.bias, after.weight, after.bias,
        )  # fmt: skip


class Decoder(nn.Module):
    """p(tau | z) = prod_t N(a_t; mu(s_<=t, a_<t, z), sigma_a^2), the mean read at the state token of step t.

    C tokens per step: C = 1 reads states alone; C = 2 interleaves s_t (token 2t) and a_t (token 2t + 1).
    """

    def __init__(self, config: ModelConfig, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.tokens_per_step = config.tokens_per_step
        self.window = config.window * config.tokens_per_step
        self.n_heads = config.n_heads
        self.rope_base = config.rope_base
        self.embed_state = nn.Linear(obs_dim, config.dim)
        if self.tokens_per_step == 2:
            self.embed_action = nn.Linear(act_dim, config.dim)
            self.dropped_action = nn.Parameter(torch.zeros(config.dim))
        layers = [DecoderLayer(config) for _ in range(config.n_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, act_dim)
        self.log_sigma_a = nn.Parameter(torch.full((act_dim,), -0.7))
        # Residual branches start small, so that the depth does not set the scale of the stream.
        with torch.no_grad():
            for layer in layers:
                for branch in (layer.out, layer.plan_out, layer.mlp_out):
                    branch.weight.mul_((3 * config.n_layers) ** -0.5)

    def weights(self) -> DecoderWeights:
        """Parameters in the order that :func:`gac_fast.reference.decode_token` takes them."""
        return DecoderWeights(
            tuple(layer.weights() for layer in self.layers),  # type: ignore[operator]
            self.norm.weight, self.norm.bias, self.head.weight, self.head.bias, self.n_heads, self.rope_base,
        )  # fmt: skip

    def step_weights(self) -> StepWeights:
        """Parameters as :func:`gac_fast.ops.decode_step` takes them."""
        state, action = self.embed_state, self.embed_action if self.tokens_per_step == 2 else None
        return StepWeights(
            state.weight, state.bias,
            None if action is None else action.weight, None if action is None else action.bias,
            self.weights(),
        )  # fmt: skip

    def embed_actions(self, actions: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Action tokens [n, D] of normalised actions [n, act_dim]; ``dropped`` bool [n] marks those left out."""
        tokens = _linear(self.embed_action, actions, _bf16(actions))
        if dropped is not None:
            tokens = torch.where(dropped[:, None], self.dropped_action.to(tokens.dtype), tokens)
        return tokens

    def trunk(
        self,
        observations: Tensor,
        actions: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Embedding and the first window attention, which no plan touches: computed once per update.

        Args:
            observations: [n, obs_dim] normalised, n steps packed.
            actions: [n, act_dim] normalised; read where C = 2.
            cu_seqlens: int32 [B + 1] in **steps**.
            positions: int [n], time step within its trajectory.
            dropped: bool [n], action tokens to leave out.

        Returns:
            [C * n, D].
        """
        # The stream keeps the observations' precision where autocast rounds the operands of products.
        x = _linear(self.embed_state, observations, _bf16(observations)).to(observations.dtype)
        if self.tokens_per_step == 2:
            x = torch.stack((x, self.embed_actions(actions, dropped).to(x.dtype)), dim=1).flatten(0, 1)
            cu_seqlens, positions = cu_seqlens * 2, positions.repeat_interleave(2)
        return self.layers[0].attend_window(x, cu_seqlens, self.window, positions)  # type: ignore[operator]

    def stack(self) -> ops.LayerStack:
        """The layers as :func:`gac_fast.ops.decoder_layers` takes them."""

        def make() -> ops.LayerStack:
            layers: list[DecoderLayer] = list(self.layers)  # type: ignore[arg-type]
            behind = [(layer.norm1, layer.qkv) for layer in layers[1:]] + [(self.norm, self.head)]
            weights = tuple(layer.block_weights(i > 0, *behind[i]) for i, layer in enumerate(layers))
            return ops.LayerStack(weights, self.n_heads, self.window, self.rope_base)

        return ops.while_fixed(self, make)

    def plan_maps(self) -> list[PlanMap]:
        """Each layer's map of the plan to keys and values."""
        layers: list[DecoderLayer] = list(self.layers)  # type: ignore[arg-type]
        return [PlanMap(layer.plan_kv.weight, layer.plan_kv.bias, layer.plan_position) for layer in layers]

    def in_heads(self, kv: Tensor) -> Tensor:
        """[..., D] -> [..., H, d]."""
        return kv.view(*kv.shape[:-1], self.n_heads, kv.shape[-1] // self.n_heads)

    def mean(self, trunk: Tensor, z: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Tensor:
        """Mean actions under a plan per trajectory.

        Args:
            trunk: [C * n, D] of :meth:`trunk`.
            z: [B, n_z, D].
            cu_seqlens, positions: as there, in steps.

        Returns:
            [n, act_dim] in [-1, 1].
        """
        layers: list[DecoderLayer] = list(self.layers)  # type: ignore[arg-type]
        plan = [layer.plan_keys(z) for layer in layers]
        return torch.tanh(self.before_tanh(trunk, plan, cu_seqlens, positions, _bf16(trunk)))

    def before_tanh(
        self,
        trunk: Tensor,
        plan: Tensor | list[tuple[Tensor, Tensor]],
        cu_seqlens: Tensor,
        positions: Tensor,
        bf16: bool,
    ) -> Tensor:
        """What :meth:`mean` takes the tanh of, under keys and values [L, 2, B, n_z, H, d] or L pairs of them."""
        return ops.decoder_layers(trunk, plan, cu_seqlens, positions, self.stack(), bf16, self.tokens_per_step)
