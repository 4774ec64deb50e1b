"""What published code of latent plans does, restated on this project's model: the same numbers without its shortcuts.

Acting encodes the whole history anew at each step, without a cache. Training pads trajectories to the longest, masks
all pairs of a trajectory's tokens, and sends every Langevin step through the whole decoder. Planning goes by autograd
through a 1-D U-Net from seeds to plans, as the Latent Plan Transformer has it (arXiv 2402.04647), in place of an MLP.
Its own code takes more yet (docs/benchmarks.md quotes it); this is what the ideas cost in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_fast import reference
from gac_fast.config import Config
from gac_fast.model import GAC, Batch
from gac_fast.reference import ReturnWeights


def mean_actions(model: GAC, observations: Tensor, actions: Tensor, z: Tensor) -> Tensor:
    """Mean actions of padded trajectories, all pairs of tokens under a mask.

    Args:
        observations, actions: [B, T, obs_dim] and [B, T, act_dim], normalised; padding lies behind and is not seen.
        z: [B, n_z, D].

    Returns:
        [B, T, act_dim].
    """
    decoder, m = model.decoder, model.config
    c, heads, width = m.tokens_per_step, m.n_heads, m.dim // m.n_heads
    t = observations.shape[1]
    x = decoder.embed_state(observations)
    if c == 2:
        x = torch.stack((x, decoder.embed_action(actions)), dim=2).flatten(1, 2)
    n = c * t
    i = torch.arange(n)
    mask = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - decoder.window)
    table = reference._rotary_table(torch.arange(t).repeat_interleave(c), width, m.rope_base, x.dtype)

    def in_heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, width))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    for layer in decoder.layers:
        q, k, v = map(in_heads, layer.qkv(layer.norm1(x)).chunk(3, dim=-1))
        q, k = reference._rotate(q, *table), reference._rotate(k, *table)
        x = x + layer.out(attend(q, k, v, mask))
        plan_k, plan_v = layer.plan_keys(z)
        x = x + layer.plan_out(attend(in_heads(layer.plan_q(layer.norm2(x))), plan_k, plan_v, None))
        x = x + layer.mlp_out(F.silu(layer.mlp_in(layer.norm3(x))))
    return torch.tanh(decoder.head(decoder.norm(x[:, ::c])))


class NaiveActor:
    """Acts by the whole history, which it keeps; observations and actions in normalised units."""

    def __init__(self, model: GAC, z0: Tensor) -> None:
        with torch.inference_mode():
            self.model, self.z = model, model.prior(z0)
        n = len(z0)
        self.observations = torch.zeros(n, 0, model.obs_dim)
        self.actions = torch.zeros(n, 0, model.act_dim)

    @torch.inference_mode()
    def look(self, obs: Tensor) -> Tensor:
        """The action, which the history does not take up: every call sees as much of it."""
        observations = torch.cat((self.observations, obs[:, None]), dim=1)
        # The token of an action that is not known yet lies behind all that is read.
        actions = torch.cat((self.actions, torch.zeros(len(obs), 1, self.model.act_dim)), dim=1)
        return mean_actions(self.model, observations, actions, self.z)[:, -1]

    def act(self, obs: Tensor) -> Tensor:
        action = self.look(obs)
        self.observations = torch.cat((self.observations, obs[:, None]), dim=1)
        self.actions = torch.cat((self.actions, action[:, None]), dim=1)
        return action


class UNet(nn.Module):
    """Seeds [P, n_z, D] -> plans: convolutions along the plan's vectors, halved and doubled in number once.

    Two residual blocks of width C at full length, two of 2 C at half of it, and back with what was there before.
    """

    def __init__(self, dim: int, width: int = 128) -> None:
        super().__init__()
        self.first = nn.Conv1d(dim, width, 7, padding=3)
        self.down = nn.ModuleList([_Residual(width, width), _Residual(width, width)])
        self.shorter = nn.Conv1d(width, 2 * width, 4, stride=2, padding=1)
        self.middle = nn.ModuleList([_Residual(2 * width, 2 * width), _Residual(2 * width, 2 * width)])
        self.longer = nn.ConvTranspose1d(2 * width, width, 4, stride=2, padding=1)
        self.up = nn.ModuleList([_Residual(2 * width, width), _Residual(width, width)])
        self.last = nn.Conv1d(width, dim, 1)

    def forward(self, z0: Tensor) -> Tensor:
        x = self.first(z0.transpose(1, 2))
        for block in self.down:
            x = block(x)
        y = self.shorter(x)
        for block in self.middle:
            y = block(y)
        x = torch.cat((x, self.longer(y)), dim=1)
        for block in self.up:
            x = block(x)
        return reference.plan_norm(self.last(x).transpose(1, 2))


class _Residual(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(n_in, n_out, 3, padding=1), nn.Conv1d(n_out, n_out, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, n_out), nn.GroupNorm(8, n_out)])
        self.shortcut = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.norms[1](self.second(y))) + self.shortcut(x)


def bound(returns: ReturnWeights, z: Tensor, kappa: float) -> Tensor:
    """What ascent climbs, [P]."""
    mean, std = reference.return_moments(*reference.return_model(returns, z))
    return mean - kappa * std


def ascent(
    prior: Callable[[Tensor], Tensor], returns: ReturnWeights, z0: Tensor, *, kappa: float, **options: float
) -> Tensor:
    """:func:`gac_fast.reference.plan_ascent` through any map from seeds to plans: the seeds after all steps."""
    return ascent_of(lambda z0: bound(returns, prior(z0), kappa), z0, **options)


def ascent_of(
    f: Callable[[Tensor], Tensor], z0: Tensor, *, n_steps: int, step_size: float, radius: float, max_norm: float
) -> Tensor:
    """The same of any bound of seeds."""
    scale, start = math.sqrt(z0[0].numel()), z0

    def norm(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)

    for step in range(n_steps):
        z0 = z0.detach().requires_grad_()
        (grad,) = torch.autograd.grad(f(z0).sum(), z0)
        z0 = z0.detach() + grad * (step_size * (1 - step / n_steps) * scale / norm(grad))
        offset = z0 - start
        z0 = start + offset * (radius * scale / norm(offset)).clamp(max=1)
        z0 = z0 * (max_norm * scale / norm(z0)).clamp(max=1)
    return z0


class NaiveTrainer:
    """Updates on one batch, padded to its longest trajectory; the chains' noise is torch's own."""

    def __init__(self, model: GAC, optimizer: torch.optim.Optimizer, batch: Batch, z0: Tensor, config: Config) -> None:
        self.model, self.optimizer, self.z0, self.config = model, optimizer, z0.clone(), config
        lengths = batch.cu_seqlens.diff()
        b, longest = len(lengths), int(lengths.max())
        self.real = torch.arange(longest) < lengths[:, None]

        def padded(x: Tensor) -> Tensor:
            out = x.new_zeros(b, longest, x.shape[1])
            out[self.real] = x
            return out

        self.observations, self.actions = padded(batch.observations), padded(batch.actions)
        self.returns, self.seen = batch.returns, batch.has_return.float()

    def errors(self, z: Tensor) -> Tensor:
        """Squared errors of the actions, [B, T, act_dim], zero in the padding."""
        found = mean_actions(self.model, self.observations, self.actions, z)
        return torch.where(self.real[..., None], (self.actions - found).square(), 0.0)

    def energy(self, z0: Tensor) -> Tensor:
        """[B]; as :meth:`gac_fast.model.GAC.energy`."""
        p, z = self.config.posterior, self.model.prior(z0)
        means, _ = self.model.predict_return(z, self.observations[:, 0])
        returns = (self.returns - means).square().mean(0) * self.seen
        actions = self.errors(z).sum((1, 2))
        return (
            0.5 * z0.square().sum((1, 2)) + actions / (2 * p.action_temperature) + returns / (2 * p.return_temperature)
        )

    def move_chains(self, noise: Callable[[Tensor], Tensor] = torch.randn_like) -> None:
        """Langevin steps, each through the whole decoder.

        Args:
            noise: standard normals like a tensor.
        """
        p, scale = self.config.posterior, math.sqrt(self.z0[0].numel())
        for _ in range(p.n_steps):
            z0 = self.z0.requires_grad_()
            (grad,) = torch.autograd.grad(self.energy(z0).sum(), z0)
            norm = grad.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)
            s = (2 * p.max_drift_ratio * scale / norm).clamp(max=p.step_size)
            self.z0 = z0.detach() - 0.5 * s.square() * grad + s * noise(grad)

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """What moves the parameters, and of it the errors of actions and returns; all []."""
        z = self.model.prior(self.z0)
        action_error = (self.errors(z).sum((0, 1)) / self.real.sum()).mean()
        means, _ = self.model.predict_return(z, self.observations[:, 0], dropout=True)
        seen = self.seen / (self.seen.sum() * len(means))
        return_error = ((self.returns - means).square() * seen).sum()
        return action_error + self.config.train.return_weight * return_error, action_error, return_error

    def step(self) -> dict[str, Tensor]:
        """Langevin steps, then one of the parameters."""
        self.move_chains()
        loss, action_error, return_error = self.losses()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip)
        self.optimizer.step()
        return {"action_error": action_error.detach(), "return_error": return_error.detach()}
