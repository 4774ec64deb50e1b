"""What the GPU pass runs: cases with their providers, the engine's and all that PyTorch offers, on any device.

The peers are written here for speed, as a user of PyTorch would: products in the row's dtype, no Python between the
launches of a compiled or recorded one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_block import exact_inputs
from bench_decode_step import cost as decode_cost
from bench_plan_ascent import N_STEPS
from bench_plan_ascent import cost as ascent_cost
from bench_update import cost as update_cost
from torch import Tensor

from gac_fast import ops, reference
from gac_fast.config import Config, preset
from gac_fast.model import GAC, Batch
from gac_fast.ops.decode_step import DecodeState
from gac_fast.posterior import PosteriorState
from gac_fast.reference import BlockWeights, StepWeights
from gac_fast.train.update import Parts, compiled, make_optimizer, parts_of, update

OBS_DIM, ACT_DIM = 17, 6  # halfcheetah
MODES = {"compile": None, "max-autotune": "max-autotune-no-cudagraphs"}
"""Of ``torch.compile``, by what providers call them; graphs are recorded by :func:`recorded`, for all alike."""
ASCENT_STEPS = 100

OPTION = "triton option"
"""How names of providers begin that are kernels of the engine which no call takes by itself."""

Run = Callable[[], object]


class Built(NamedTuple):
    """A provider that is ready: what to time, and what it gave before, for the comparison with the reference."""

    run: Run
    results: list[Tensor]
    replayed: tuple[list[Tensor], list[Tensor]] | None = None
    """Of a recorded call: what a replay gave, and what the same call gives that is not recorded."""


@dataclass
class Planned:
    """A case and who does it.

    Attributes:
        flops, bytes: least work and least traffic.
        bound: of the relative error of each result against :meth:`expected`.
        providers: name -> builder. Names that begin with ``triton`` are the engine's; ``reference`` is the eager one.
        reference: what is right.
    """

    op: str
    mode: str
    shape: str
    dtype: str
    flops: float
    bytes: float
    bound: float
    providers: Mapping[str, Callable[[], Built]]
    reference: Callable[[], list[Tensor]]
    _expected: list[Tensor] = field(default_factory=list)

    def expected(self) -> list[Tensor]:
        if not self._expected:
            self._expected = [x.detach() for x in self.reference()]
        return self._expected


N_WARM = 3
"""Calls before a call is recorded."""


@dataclass(frozen=True)
class Replay:
    """A recorded call, together with what its kernels read: once freed, that memory would be another's."""

    replay: Run
    recorded: Run

    def __call__(self) -> None:
        self.replay()


def recorded(run: Run, device: torch.device) -> tuple[Run, list[Tensor]]:
    """``run`` as a CUDA graph, as it is on the CPU; and the memory of its results, which the next replay fills."""
    if device.type != "cuda":
        for _ in range(N_WARM):
            run()
        kept: list[Tensor] = []

        def call() -> None:
            kept[:] = tensors(run())

        return call, kept
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(N_WARM):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    # A leaf's node of autograd belongs to the stream that it was made on, and whatever graph of an earlier call is left
    # keeps it: a backward of the recording would make that stream wait for the one that is recorded.
    gc.collect()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = run()
    return Replay(graph.replay, run), [x.detach() for x in (out if isinstance(out, list | tuple) else (out,))]


def replayed(replay: Run, kept: list[Tensor]) -> list[Tensor]:
    """What one replay gives; NaN where it writes nothing."""
    for x in kept:
        x.fill_(math.nan)
    replay()
    return tensors(kept)


def by_compiler(function: Callable[..., Any], device: torch.device, mode: str) -> Callable[..., Any]:
    """Through ``torch.compile`` in one of :data:`MODES`; on the CPU its tracing alone."""
    torch._dynamo.reset()
    if device.type != "cuda":
        return torch.compile(function, backend="eager", dynamic=False, fullgraph=True)
    return torch.compile(function, mode=MODES[mode], dynamic=False, fullgraph=True)


def on_reference(run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with ops.backend("reference"):
            return run()

    return inside


def tensors(out: Any) -> list[Tensor]:
    return [x.detach().clone() for x in (out if isinstance(out, list | tuple) else (out,))]


def variants(
    device: torch.device,
    plain: Callable[[], Callable[[], Any]],
    fast: Callable[[str], Callable[[], Any]] | None,
    name: str,
    pure: bool = True,
) -> dict[str, Callable[[], Built]]:
    """``name`` as it is, recorded, compiled, and both, of builders of a call; not ``pure`` where each moves a state.

    Args:
        fast: builder of what is compiled in a mode.
    """

    def built(make: Callable[[], Callable[[], Any]], record: bool) -> Built:
        following: list[Tensor] = []
        if record and not pure:
            # Another state as far on as the recorded one is at its first replay; never compiled, which takes long.
            other = plain()
            for _ in range(1 + N_WARM):
                other()
            following = tensors(other())
            del other
        run = make()
        results = tensors(run())
        if not record:
            return Built(run, results)
        replay, kept = recorded(run, device)
        return Built(replay, results, (replayed(replay, kept), following or results))

    found = {name: lambda: built(plain, False), f"{name} + graph": lambda: built(plain, True)}
    if fast is not None:
        found[f"{name} + compile"] = lambda: built(lambda: fast("compile"), False)
        found |= {
            f"{name} + {mode} + graph": lambda mode=mode: built(lambda: fast(mode), True)  # type: ignore[misc]
            for mode in MODES
        }
    return found


def cases_of(op: str, device: torch.device, tiny: bool) -> list[Planned]:
    """Of one op, in the order of running."""
    if op == "window_attention":
        return [attention_case(device, tiny)]
    if op == "update":
        sizes = [(2, 10)] if tiny else [(500, 1000), (64, 300)]
        return [update_case(device, tiny, c, *size) for size in sizes for c in (2, 1)]
    if op == "plan_ascent":
        return [ascent_case(device, tiny, n) for n in ([4] if tiny else [64, 4096, 1])]
    return [decode_case(device, tiny, c, n) for n in ([2] if tiny else [1024, 1]) for c in (2, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Window attention


def attention_case(device: torch.device, tiny: bool) -> Planned:
    b, t, heads, width, window = (2, 20, 2, 16, 4) if tiny else (500, 2000, 4, 32, 64)
    n, dtype = b * t, torch.bfloat16
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(n, heads, width, device=device).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    positions = torch.arange(t, device=device).repeat(b)
    cu_seqlens = torch.arange(b + 1, dtype=torch.int32, device=device) * t
    table = reference._rotary_table(positions, width, 10000.0, dtype)

    def both(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            out = attend(q, k, v)
            return [out, *torch.autograd.grad(out, leaves, g)]

        return run

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.window_attention(q, k, v, cu_seqlens, window, positions)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.window_attention(q, k, v, cu_seqlens, window, positions)

    def by_trajectory(x: Tensor) -> Tensor:
        return x.view(b, t, heads, width).transpose(1, 2)

    i = torch.arange(t, device=device)
    dense_mask = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - window)

    def sdpa_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = reference._rotate(q, *table), reference._rotate(k, *table)
        out = F.scaled_dot_product_attention(*(by_trajectory(x) for x in (q, k, v)), attn_mask=dense_mask)
        return out.transpose(1, 2).reshape(n, heads, width)

    n_chunks = -(-t // window)
    pad = n_chunks * window - t
    rows, columns = torch.arange(window, device=device)[:, None], torch.arange(-window, window, device=device)
    first = torch.arange(n_chunks, device=device)[:, None, None] == 0
    band = (columns <= rows) & (columns > rows - window) & ((columns >= 0) | ~first)
    band_mask = band.repeat(b, 1, 1)[:, None]

    def sdpa_banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def chunks(x: Tensor) -> Tensor:
            return F.pad(x.view(b, t, heads, width), (0, 0, 0, 0, 0, pad)).view(b, n_chunks, window, heads, width)

        def with_previous(x: Tensor) -> Tensor:
            return torch.cat((F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x), dim=2)

        q, k = reference._rotate(q, *table), reference._rotate(k, *table)
        parts = (chunks(q), with_previous(chunks(k)), with_previous(chunks(v)))
        out = F.scaled_dot_product_attention(*(x.flatten(0, 1).transpose(1, 2) for x in parts), attn_mask=band_mask)
        out = out.transpose(1, 2).reshape(b, n_chunks * window, heads, width)[:, :t]
        return out.reshape(n, heads, width)

    def flex(block: int, mode: str) -> Callable[[], Built]:
        def make() -> Built:
            attend = flex_attend(device, n, t, window, block, table, mode)
            if device.type != "cuda":
                # It has no backward on the CPU.
                def forward() -> Tensor:
                    return attend(*(x.detach() for x in (q, k, v)))

                return Built(forward, [forward(), *tensors(both(plain)())[1:]])
            run = both(attend)
            return Built(run, tensors(run()))

        return make

    def once(make: Callable[[], Callable[[], Any]]) -> Callable[[], Built]:
        def build() -> Built:
            run = make()
            return Built(run, tensors(run()))

        return build

    providers = {
        "triton": once(lambda: both(op)),
        **variants(device, lambda: on_reference(both(op)), None, "reference"),
        "sdpa dense": once(lambda: both(sdpa_dense)),
        "sdpa banded": once(lambda: both(sdpa_banded)),
        "flex 128": flex(128, "compile"),
        "flex 64": flex(64, "compile"),
        "sdpa banded + compile": once(lambda: both(by_compiler(sdpa_banded, device, "compile"))),
        "reference + compile": once(lambda: both(by_compiler(plain, device, "compile"))),
        "flex 128, max-autotune": flex(128, "max-autotune"),
        "sdpa banded + max-autotune": once(lambda: both(by_compiler(sdpa_banded, device, "max-autotune"))),
    }
    pairs = b * sum(min(j + 1, window) for j in range(t))

    def exact() -> list[Tensor]:
        wide = [x.detach().float().requires_grad_() for x in leaves]
        out = reference.window_attention(*wide, cu_seqlens, window, positions)
        return [out, *torch.autograd.grad(out, wide, g.float())]

    size = n * heads * width
    return Planned(
        "window_attention", "fwd+bwd", f"{'tiny ' * tiny}B={b} T={t} H={heads} d={width} W={window}", "bfloat16",
        2.0 * 7 * pairs * heads * width, 2.0 * 8 * size, 2e-2, providers, exact,
    )  # fmt: skip


def flex_attend(
    device: torch.device, n: int, t: int, window: int, block: int, table: tuple[Tensor, Tensor], mode: str = "compile"
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over one packed sequence, its sliding window within trajectories as a mask of blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    trajectory = torch.arange(n, device=device) // t

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (kv > q - window) & (trajectory[q] == trajectory[kv])

    # Written down rather than found by trying all pairs of a million tokens: a block sees itself and those before it
    # that the window reaches.
    n_blocks = -(-n // block)
    reach = -(-(window - 1) // block)
    i = torch.arange(n_blocks, dtype=torch.int32, device=device)
    counts = (i + 1).clamp(max=reach + 1)
    indices = torch.zeros(n_blocks, n_blocks, dtype=torch.int32, device=device)
    for j in range(min(reach + 1, n_blocks)):
        indices[:, j] = (i - counts + 1 + j).clamp(0, n_blocks - 1)
    blocks = BlockMask.from_kv_blocks(
        counts[None, None], indices[None, None], BLOCK_SIZE=block, mask_mod=mask, seq_lengths=(n, n)
    )
    del indices

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = reference._rotate(q, *table), reference._rotate(k, *table)
        out = flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=blocks)
        return out[0].transpose(0, 1)

    if device.type != "cuda":
        return attend
    return by_compiler(attend, device, mode)


# ---------------------------------------------------------------------------------------------------------------------
# Training update


def make_update(device: torch.device, config: Config, b: int, t: int) -> tuple[Any, ...]:
    """Model, optimiser, posterior, batch, rows and configuration, the same every time."""
    torch.manual_seed(0)
    model = GAC(config.model, OBS_DIM, ACT_DIM).to(device)
    model.bf16 = True
    optimizer = make_optimizer(model, config.train)
    posterior = PosteriorState(config.posterior, b, config.model.n_z, config.model.dim, 0, device)
    generator = torch.Generator().manual_seed(1)
    n = b * t
    observations = torch.randn(n, OBS_DIM, generator=generator).to(device)
    actions = (2 * torch.rand(n, ACT_DIM, generator=generator) - 1).to(device)
    seen = torch.arange(b, device=device) < b - max(1, b // 8)
    batch = Batch(
        observations, actions, torch.arange(b + 1, dtype=torch.int32, device=device) * t,
        torch.arange(t, device=device).repeat(b), torch.arange(b, device=device).repeat_interleave(t),
        torch.randn(b, generator=generator).to(device), seen, torch.ones(b, dtype=torch.bool, device=device),
    )  # fmt: skip
    rows = torch.arange(b, device=device) + b * ~seen
    return model, optimizer, posterior, batch, rows, config


LOSSES = ("loss", "action_error", "return_error", "nll_per_step")


def update_case(device: torch.device, tiny: bool, c: int, b: int, t: int) -> Planned:
    size = "tiny" if tiny else "gym"
    context = "states_actions" if c == 2 else "states"
    # Dropout would draw other masks for each provider; the work without it is the same to a millionth.
    config = preset(size).replace(
        model={"context": context, "return_dropout": 0.0},
        train={"cuda_graph": "on" if device.type == "cuda" else "off"},
    )

    def maker(backend: str, mode: str | None) -> Callable[[], Callable[[], list[Tensor]]]:
        def make() -> Callable[[], list[Tensor]]:
            state = make_update(device, config, b, t)
            parts: Parts = parts_of(state[0], config)
            if mode is not None:
                torch._dynamo.reset()
                on_gpu = device.type == "cuda"
                parts = compiled(parts, "inductor" if on_gpu else "eager", MODES[mode] if on_gpu else None)

            def run() -> list[Tensor]:
                with ops.backend(backend) if backend else contextlib.nullcontext():
                    values = update(*state, parts)
                return [values[name] for name in LOSSES]

            return run

        return make

    def exact() -> list[Tensor]:
        state = make_update(device, config, b, t)
        state[0].bf16 = False
        with ops.backend("reference"):
            values = update(*state)
        return [values[name] for name in LOSSES]

    flops, n_bytes = update_cost(config, b * t)
    providers = {
        **variants(device, maker("", None), lambda mode: maker("", mode)(), "triton", pure=False),
        **variants(device, maker("reference", None), lambda mode: maker("reference", mode)(), "reference", pure=False),
    }
    # Of the traffic in float32: the stream alone is kept so, and each layer's input may be kept in bfloat16.
    return Planned(
        "update", f"{config.posterior.n_steps} posterior steps", f"{size} C={c} B={b} T={t}", "bfloat16", flops,
        n_bytes / 2, 3e-2, providers, exact,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Planning


SHARES = {1: (1,), 4: (1, 4), 64: (1, 2, 4)}
"""By plans: plans of a program, of options that no call takes by itself (``kernels/plan_single.py``)."""


def shares(device: torch.device, n_plans: int) -> tuple[int, ...]:
    before_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return () if before_hopper else SHARES.get(n_plans, ())


def option_name(own: int) -> str:
    return f"{OPTION} (a program for {'each plan' if own == 1 else f'{own} plans'})"


def alone(run: Callable[[], Any], own: int) -> Callable[[], Any]:
    """Of planning on a device: by programs that go alone."""

    def inside() -> Any:
        # The dry run knows no kernels.
        if not torch.cuda.is_available():
            return run()
        from gac_fast.kernels import plan_ascent

        before, plan_ascent.ALONE = plan_ascent.ALONE, plan_ascent.Alone(4096, own)
        try:
            return run()
        finally:
            plan_ascent.ALONE = before

    return inside


def ascent_case(device: torch.device, tiny: bool, n_plans: int) -> Planned:
    size = "tiny" if tiny else "gym"
    config = preset(size).replace(model={"return_ensemble": 1})
    n_steps = 3 if tiny else ASCENT_STEPS
    torch.manual_seed(0)
    model = GAC(config.model, 1, 1).to(device)
    z0 = torch.randn(n_plans, config.model.n_z, config.model.dim, device=device)
    plan = config.plan
    prior, returns = (type(w)(*(x.detach() for x in w)) for w in (model.prior.weights(), model.returns.weights()))
    settings: dict[str, Any] = {
        "n_steps": n_steps, "step_size": plan.step_size, "kappa": plan.kappa, "radius": plan.radius,
        "max_norm": plan.max_norm,
    }  # fmt: skip

    def op() -> list[Tensor]:
        return list(ops.plan_ascent(prior, returns, z0, **settings, bf16=True))

    scale = math.sqrt(z0[0].numel())
    halves = [type(w)(*(x.bfloat16() for x in w)) for w in (prior, returns)]
    sizes = torch.tensor([plan.step_size * (1 - k / n_steps) * scale for k in range(n_steps)], device=device)

    def moments(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            means, log_variances = reference.return_model(halves[1], reference.prior(halves[0], z))
        return reference.return_moments(means.float(), log_variances.float())

    def bound(z: Tensor) -> Tensor:
        mean, std = moments(z)
        return (mean - plan.kappa * std).sum()

    def norm(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)

    def step(z: Tensor, size: Tensor) -> Tensor:
        grad = torch.func.grad(bound)(z)
        z = z + grad * (size / norm(grad))
        offset = z - z0
        z = z0 + offset * (plan.radius * scale / norm(offset)).clamp(max=1.0)
        return z * (plan.max_norm * scale / norm(z)).clamp(max=1.0)

    def ascend(one_step: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.no_grad():
                z = z0
                for i in range(n_steps):
                    z = one_step(z, sizes[i])
                return [z, *moments(z)]

        return run

    def exact() -> list[Tensor]:
        return list(reference.plan_ascent(prior, returns, z0, **settings))

    flops, n_bytes = ascent_cost(config, n_plans)
    providers = {
        **variants(device, lambda: op, None, "triton"),
        **{
            name: make for own in shares(device, n_plans)
            for name, make in variants(device, lambda own=own: alone(op, own), None, option_name(own)).items()
        },
        **variants(device, lambda: on_reference(op), None, "reference"),
    }  # fmt: skip
    if n_plans > 1:
        providers |= variants(
            device, lambda: ascend(step), lambda mode: ascend(by_compiler(step, device, mode)), "torch"
        )
    return Planned(
        "plan_ascent", f"{n_steps} steps", f"{size} E=1 P={n_plans}", "bfloat16", flops * n_steps / N_STEPS,
        n_bytes["bfloat16"], 5e-2, providers, exact,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Acting


class TorchActor:
    """Acting in PyTorch with its step on the device, so that one graph serves every step: eager, compiled, recorded.

    Both tokens of a step in one pass, torch's SDPA on the ring; all environments at the same step.
    """

    def __init__(self, model: GAC, z0: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        m, decoder = model.config, model.decoder
        self.window, self.heads, self.width, self.c = decoder.window, m.n_heads, m.dim // m.n_heads, m.tokens_per_step
        with torch.no_grad():
            z = model.prior(z0)
            plans = [layer.plan_keys(z) for layer in decoder.layers]  # type: ignore[operator]
        self.plans = [tuple(x.detach().to(dtype).transpose(1, 2).contiguous() for x in plan) for plan in plans]
        weights = decoder.step_weights()
        self.weights = StepWeights(
            *(None if x is None else x.detach().to(dtype) for x in weights[:4]),
            weights.decoder._replace(
                layers=tuple(type(w)(*(x.detach().to(dtype) for x in w)) for w in weights.decoder.layers),
                **{name: getattr(weights.decoder, name).detach().to(dtype) for name in NAMES},
            ),
        )  # fmt: skip
        # One step more than the window: the action token still sees what the state token after it does not.
        self.period = m.window + self.c - 1
        shape = (len(z0), m.n_heads, self.c * self.period, self.width)
        self.rings = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)] for _ in decoder.layers]
        cos, sin = reference._rotary_table(
            torch.arange(1 - self.c, 4096, device=device), self.width, decoder.rope_base, dtype
        )
        self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        self.t = torch.zeros((), dtype=torch.int64, device=device)
        self.last = torch.zeros(len(z0), model.act_dim, dtype=dtype, device=device)

    @torch.no_grad()
    def step(self, observations: Tensor) -> Tensor:
        """Normalised observations [n, obs_dim] -> mean actions [n, act_dim]."""
        w, c, t, device = self.weights, self.c, self.t, self.t.device
        x = F.linear(observations.to(w.embed_state_w.dtype), w.embed_state_w, w.embed_state_b)[:, None]
        if c == 2:
            x = torch.cat((F.linear(self.last, w.embed_action_w, w.embed_action_b)[:, None], x), dim=1)
        n = x.shape[0]
        in_step = torch.arange(1 - c, 1, device=device)
        tokens = (c * t + in_step)[:, None]
        steps = t - (t - torch.arange(self.period, device=device)) % self.period
        held = (c * steps[:, None] + in_step).flatten()
        visible = (held <= tokens) & (held > tokens - self.window) & (held >= 0) | (held == tokens)
        slots = (t % self.period) * c + torch.arange(c, device=device)
        rows = t + torch.arange(c, device=device)
        cos, sin = self.cos[rows], self.sin[rows]
        for layer, (ring_k, ring_v), (plan_k, plan_v) in zip(w.decoder.layers, self.rings, self.plans, strict=True):
            qkv = reference.norm_linear(x, layer.norm1_w, layer.norm1_b, layer.w_qkv, layer.b_qkv)
            q, k, v = qkv.view(n, c, 3, self.heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = (y * cos.view(1, 1, c, -1) + y.roll(self.width // 2, -1) * sin.view(1, 1, c, -1) for y in (q, k))
            ring_k.index_copy_(2, slots, k)
            ring_v.index_copy_(2, slots, v)
            mask = visible
            if c == 2 and layer is w.decoder.layers[-1]:
                q, x, mask = q[:, :, -1:], x[:, -1:], visible[-1:]
            out = F.scaled_dot_product_attention(q, ring_k, ring_v, attn_mask=mask[None, None])
            x = x + F.linear(out.transpose(1, 2).flatten(2), layer.w_o, layer.b_o)
            q = reference.norm_linear(x, layer.norm2_w, layer.norm2_b, layer.w_plan_q, layer.b_plan_q)
            out = F.scaled_dot_product_attention(q.view(n, -1, self.heads, self.width).transpose(1, 2), plan_k, plan_v)
            x = x + F.linear(out.transpose(1, 2).flatten(2), layer.w_plan_o, layer.b_plan_o)
            x = reference.mlp_residual(
                x, layer.norm3_w, layer.norm3_b, layer.w_in, layer.b_in, layer.w_out, layer.b_out
            )
        d = w.decoder
        mean = torch.tanh(reference.norm_linear(x[:, -1], d.norm_w, d.norm_b, d.w_head, d.b_head))
        self.last.copy_(mean)
        self.t += 1
        return mean


NAMES = ("norm_w", "norm_b", "w_head", "b_head")


def decode_case(device: torch.device, tiny: bool, c: int, n: int) -> Planned:
    size = "tiny" if tiny else "gym"
    config = preset(size).replace(model={"context": "states_actions" if c == 2 else "states"})
    m = config.model
    torch.manual_seed(0)
    model = GAC(m, OBS_DIM, ACT_DIM).to(device).requires_grad_(False)
    z0 = torch.randn(n, m.n_z, m.dim, device=device)
    # Until the rings are full, all compared; then the last one again and again.
    observations = torch.randn(m.window + 3, n, OBS_DIM, device=device)

    def state(bf16: bool) -> DecodeState:
        found = DecodeState(
            n_layers=m.n_layers, n_rows=n, window=model.decoder.window, n_heads=m.n_heads, width=m.dim // m.n_heads,
            n_z=m.n_z, act_dim=ACT_DIM, device=device, bf16=bf16,
        )  # fmt: skip
        z = model.prior(z0)
        for i, layer in enumerate(model.decoder.layers):
            for target, x in zip((found.plan_k, found.plan_v), layer.plan_keys(z), strict=True):  # type: ignore[operator]
                target[i].copy_(x)
        return found

    def acting(
        make: Callable[[], Callable[[Tensor], Tensor]],
        record: bool,
        plain: Callable[[], Callable[[Tensor], Tensor]] | None = None,
    ) -> Callable[[], Built]:
        """``plain``: the same, not compiled, for the comparison of a recorded step; default ``make``."""

        def build() -> Built:
            following: list[Tensor] = []
            if record:
                # Another state as far on as the recorded one is at its first replay.
                other = (plain or make)()
                for x in (*observations, *[observations[-1]] * N_WARM):
                    other(x)
                following = tensors(other(observations[0]))
                del other
            step = make()
            outputs = torch.stack([step(x).detach().clone() for x in observations])
            last = observations[-1].clone()
            run: Run = functools.partial(step, last)
            if not record:
                return Built(run, [outputs])
            replay, kept = recorded(run, device)
            # Something else than what the steps before it saw: theirs is not what is right.
            last.copy_(observations[0])
            found = replayed(replay, kept)
            last.copy_(observations[-1])
            return Built(replay, [outputs], (found, following))

        return build

    def op(backend: str, bf16: bool = True) -> Callable[[], Callable[[Tensor], Tensor]]:
        def make() -> Callable[[Tensor], Tensor]:
            memory, weights = state(bf16), model.decoder.step_weights()

            def step(x: Tensor) -> Tensor:
                with ops.backend(backend) if backend else contextlib.nullcontext():
                    return ops.decode_step(weights, memory, x)

            return step

        return make

    def peer(mode: str | None) -> Callable[[], Callable[[Tensor], Tensor]]:
        def make() -> Callable[[Tensor], Tensor]:
            actor = TorchActor(model, z0, device, torch.bfloat16)
            return actor.step if mode is None else by_compiler(actor.step, device, mode)

        return make

    def exact() -> list[Tensor]:
        step = op("reference", bf16=False)()
        return [torch.stack([step(x).clone() for x in observations])]

    providers = {
        "triton": acting(op(""), False),
        "triton + graph": acting(op(""), True),
        "reference": acting(op("reference"), False),
        **{f"torch{' + graph' * g}": acting(peer(None), g) for g in (False, True)},
        "torch + compile": acting(peer("compile"), False),
        **{f"torch + {mode} + graph": acting(peer(mode), True, peer(None)) for mode in MODES},
    }
    flops, n_bytes = decode_cost(config, n)
    # With C = 2 an actor reads its own actions, and errors feed themselves.
    return Planned(
        "decode_step", "step", f"{size} C={c} N={n}", "bfloat16", flops, n_bytes["bfloat16"], 5e-2, providers, exact
    )


# ---------------------------------------------------------------------------------------------------------------------
# Every kernel on small shapes: repeats, sanitizer


class Size(NamedTuple):
    """Of what every kernel is run on."""

    model: str  # a preset
    lengths: tuple[int, ...]
    window: int
    n_rows: int  # plans, and environments
    ring: int  # steps that the ring of a long episode holds
    n_steps: int  # of that episode: more
    long: tuple[int, ...]  # lengths of a batch so large that other tiles are chosen; none: left out


SIZES = {
    "tiny": Size("tiny", (1, 20, 13), 6, 5, 4, 10, (30, 1, 20)),
    # For the sanitizer, which slows a kernel by a hundred.
    "small": Size("gym", (1, 70, 129, 2), 64, 33, 4, 10, ()),
    "full": Size("gym", (1, 700, 64, 129, 300, 63, 1000, 2, 17), 64, 200, 16, 40, (2000,) * 19 + (1, 1000, 999)),
}
N_STARTS, N_MEMBERS = 8, 4

FEWER_REPEATS = ("decode_step ring",)
"""Each call of these is many launches of the same kernel: a tenth of the repeats."""


def repeat_cases(device: torch.device, dtype: str, size: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Ops with their gradients, each as a call that does the same every time."""
    s = SIZES[size]
    config = preset(s.model)
    m = config.model
    heads, width, n_z = m.n_heads, m.dim // m.n_heads, m.n_z
    b, n = len(s.lengths), sum(s.lengths)
    of_dtype = getattr(torch, dtype)
    torch.manual_seed(0)

    def packed(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).to(device)
        return ends, torch.cat([torch.arange(length) for length in lengths]).to(device)

    cu_seqlens, _ = packed(s.lengths)

    def normal(*shape: int, like: torch.dtype = of_dtype) -> Tensor:
        return torch.randn(shape).to(like).to(device)

    q = normal(n, heads, width)
    g = normal(n, heads, width)
    plan_k, plan_v = (normal(b, n_z, heads, width) for _ in range(2))

    def with_gradients(forward: Callable[..., Any], leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = forward(*leaves)
        out = list(out) if isinstance(out, tuple) else [out]
        return [*out, *torch.autograd.grad(out, leaves, grads)]

    def window_attention(lengths: tuple[int, ...]) -> Callable[[], list[Tensor]]:
        ends, positions = packed(lengths)
        q, k, v, g = (normal(sum(lengths), heads, width) for _ in range(4))

        def run() -> list[Tensor]:
            return with_gradients(
                lambda q, k, v: ops.window_attention(q, k, v, ends, s.window, positions), [q, k, v], [g]
            )

        return run

    def plan_attention() -> list[Tensor]:
        return with_gradients(lambda q, k, v: ops.plan_attention(q, k, v, cu_seqlens), [q, plan_k, plan_v], [g])

    is_bf16 = dtype == "bfloat16"

    def block(train_weights: bool, heads: int) -> Callable[[], list[Tensor]]:
        dim = heads * width
        _, exact_weights = exact_inputs(1, 1, heads, width, n_z, 4 * dim)
        weights = [w.float().to(device) for w in exact_weights]
        plan_k, plan_v = (normal(b, n_z, heads, width) for _ in range(2))
        x, attended = normal(n, dim, like=torch.float32), normal(n, dim)
        dx, dy = normal(n, dim, like=torch.float32), normal(n, 3 * dim)

        def run() -> list[Tensor]:
            def forward(x: Tensor, attended: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Any:
                w = BlockWeights(*(own or weights))
                return ops.decoder_block(x, attended, k, v, cu_seqlens, w, is_bf16)

            leaves = [x, attended, plan_k, plan_v, *(weights if train_weights else ())]
            return with_gradients(forward, leaves, [dx, dy])

        return run

    def acting(**fields: Any) -> GAC:
        model = GAC(config.replace(model=fields).model, OBS_DIM, ACT_DIM)
        return model.to(device).requires_grad_(False)

    z0 = normal(s.n_rows, m.n_z, m.dim, like=torch.float32)
    ids = torch.arange(len(z0), device=device)
    alone = acting()
    # The mean over several starts of each plan, and over several members.
    of_starts = acting(return_context="first_state", return_ensemble=N_MEMBERS)
    starts = normal(len(z0), N_STARTS, OBS_DIM, like=torch.float32)

    def ascent(model: GAC, context: Tensor | None) -> Callable[[], list[Tensor]]:
        networks = model.prior.weights(), model.returns.weights()
        return lambda: list(ops.plan_ascent(
            *networks, z0, n_steps=5, step_size=0.05, kappa=1.0, radius=0.5, max_norm=1.1, context=context,
            bf16=is_bf16,
        ))  # fmt: skip

    def langevin(model: GAC, context: Tensor | None) -> Callable[[], list[Tensor]]:
        networks = model.prior.weights(), model.returns.weights()
        target = torch.ones((), device=device)
        return lambda: list(ops.plan_langevin(
            *networks, z0, target, n_steps=5, step_size=0.3, seed=(1, 2), plans=ids, max_drift_ratio=0.5,
            context=context, bf16=is_bf16,
        ))  # fmt: skip

    def philox() -> list[Tensor]:
        return [ops.philox_normal((1, 2), ids, 7, 1027)]

    def decode(model: GAC, n_steps: int) -> Callable[[], list[Tensor]]:
        step_weights = model.decoder.step_weights()
        step_inputs = normal(n_steps, len(z0), OBS_DIM, like=torch.float32)

        def run() -> list[Tensor]:
            state = DecodeState(
                n_layers=m.n_layers, n_rows=len(z0), window=model.decoder.window, n_heads=m.n_heads,
                width=m.dim // m.n_heads, n_z=m.n_z, act_dim=ACT_DIM, device=device, bf16=is_bf16,
            )  # fmt: skip
            for i, layer in enumerate(model.decoder.layers):
                for target, x in zip((state.plan_k, state.plan_v), layer.plan_keys(z0), strict=True):  # type: ignore[operator]
                    target[i].copy_(x)
            return [ops.decode_step(step_weights, state, x).clone() for x in step_inputs]

        return run

    cases = {
        "window_attention": window_attention(s.lengths), "plan_attention": plan_attention,
        "block frozen": block(False, heads), "block": block(True, heads), "block wide": block(True, 2 * heads),
        "decode_step": decode(alone, 5), "decode_step ring": decode(acting(window=s.ring), s.n_steps),
        "plan_ascent": ascent(alone, None), "plan_ascent starts": ascent(of_starts, starts),
        "plan_langevin": langevin(alone, None), "plan_langevin starts": langevin(of_starts, starts),
    }  # fmt: skip
    if s.long:
        cases["window_attention long"] = window_attention(s.long)
    return {**cases, "philox_normal": philox} if dtype == "float32" else cases


def one_pass(device: torch.device, size: str) -> None:
    """Each once, in both dtypes."""
    for dtype in ("float32", "bfloat16"):
        for run in repeat_cases(device, dtype, size).values():
            run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
