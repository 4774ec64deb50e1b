"""Speed of acting where it is long, or wide: deep in an episode, and in up to 4,096 environments.

``step, ... history=1000`` is a step that comes after 999 others. Peers that keep no cache encode all of them anew: the
``naive`` provider is this project's model, acting so; the Decision Transformers of Hugging Face's transformers and of
d3rlpy are models of the same width and depth, with three tokens per step, as their own libraries act by them
(``make peers`` makes their environment). ``late`` holds steps of one long episode against each other: they must cost
the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from bench_decode_step import ACT_DIM, BOUNDS, OBS_DIM, EagerActor, cost, units
from harness import PEERS_PYTHON, Case, Peer, Providers, attempt, engine_problem, row_error, under
from naive import NaiveActor
from torch import Tensor

from gac_fast.act import Actor
from gac_fast.config import Config, preset
from gac_fast.model import GAC


def make(tiny: bool, n: int, context: str = "states_actions") -> tuple[str, Config, GAC, Tensor]:
    size = "tiny" if tiny else "gym"
    config = preset(size).replace(model={"context": context})
    torch.manual_seed(0)
    return size, config, GAC(config.model, OBS_DIM, ACT_DIM), torch.randn(n, config.model.n_z, config.model.dim)


def engines(model: GAC, z0: Tensor) -> Providers:
    """Actors of reference and engine, or why there is none."""
    found: Providers = {("reference", "float32"): Actor(model, units(torch.float32), z0, bf16=False)}
    for dtype in ("float32", "bfloat16"):
        problem = engine_problem("decode_step", dtype)
        found["cpp", dtype] = problem or Actor(model, units(torch.float32), z0, bf16=dtype == "bfloat16")
    return found


def advance(actor: Actor, table: Tensor, steps: int, naive: NaiveActor) -> Tensor:
    """So many steps, the last of which ``naive`` remembers; the observation that comes next."""
    m = actor.model.config
    seen = m.n_layers * (m.window - 1) + 1  # an action depends on no more, and on their distances alone
    past = []
    for i in range(steps):
        obs = table[i % len(table)]
        past.append((obs, actor.act(obs).clone()))
        past = past[-seen:]
    naive.observations, naive.actions = (torch.stack(x, dim=1) for x in zip(*past, strict=True))
    return table[steps % len(table)]


@pytest.mark.parametrize("history", [20, 1000])
@pytest.mark.parametrize("n", [1, 8])
def test_step(compare, tiny, n_threads, n, history):
    if n_threads > 1 and history > 100:
        pytest.skip("as with a history of 20, but for what encodes it anew: see one thread")
    history = min(history, 24) if tiny else history
    size, config, model, z0 = make(tiny, n)
    observations = torch.randn(history, n, OBS_DIM)
    naive = NaiveActor(model, z0)
    *past, last = observations
    with contextlib.ExitStack() as stack:
        providers: Providers = {}
        for library, name in (("hf", "HF DT"), ("d3rlpy", "d3rlpy DT")):
            if not PEERS_PYTHON.exists():
                providers[name, "float32"] = "not installed: make peers"
            elif tiny:
                providers[name, "float32"] = "left out with toy sizes"
            elif library == "d3rlpy" and n > 1:
                providers[name, "float32"] = "acts in one environment at a time"
            else:
                arguments = ("--history", history, "--envs", n, "--threads", n_threads)
                peer = attempt(lambda a=(library, *arguments): Peer("acting", *a))
                if isinstance(peer, Peer):
                    stack.callback(peer.close)
                providers[name, "float32"] = peer
        actors = engines(model, z0)
        eager = EagerActor(model, z0)
        # All see the actions of the reference, so that each step is of one history.
        reference = actors["reference", "float32"]
        for obs in past:
            action = under("reference", lambda obs=obs: reference.act(obs))()
            eager.act(obs)
            naive.observations = torch.cat((naive.observations, obs[:, None]), dim=1)
            naive.actions = torch.cat((naive.actions, action[:, None]), dim=1)
            for (name, _), actor in actors.items():
                if name == "cpp" and not isinstance(actor, str):
                    actor.act(obs)
        expected = under("reference", lambda: reference.act(last))()
        assert row_error(naive.look(last), expected) < BOUNDS["float32"]
        providers["naive", "float32"] = lambda: naive.look(last)
        assert row_error(eager.act(last), expected) < BOUNDS["float32"]
        providers["eager torch", "float32"] = lambda: eager.act(last)
        for (name, dtype), actor in actors.items():
            if isinstance(actor, str):
                providers[name, dtype] = actor
                continue
            run = under("reference" if name == "reference" else "", lambda actor=actor: actor.act(last))
            if name == "cpp":
                assert row_error(run(), expected) < BOUNDS[dtype], dtype
            providers[name, dtype] = run
        flops, n_bytes = cost(config, n)
        shape = f"{size} C={config.model.tokens_per_step} N={n} history={history}"
        case = Case("acting", "step", shape, flops, n_bytes, n, "environment steps")
        rarely = [] if history < 100 else [(name, "float32") for name in ("HF DT", "d3rlpy DT", "naive")]
        compare(case, providers, rarely)


@torch.no_grad()
def repeated(few: Actor, n: int) -> Actor:
    """An actor in n environments that are those of another one over and over, each with what it has seen so far."""
    rows = torch.arange(n) % len(few)
    many = Actor(few.model, few.normalization, few.z0[rows], bf16=few.bf16)
    for name, axis in (("ring_k", 1), ("ring_v", 1), ("steps", 0), ("last_action", 0)):
        torch.index_select(getattr(few._state, name), axis, rows, out=getattr(many._state, name))
    return many


@pytest.mark.parametrize("n", [1, 16, 256, 4096])
def test_environments(compare, tiny, n_threads, n):
    """On rings that are full: 16 environments fill them, and more than that are the same ones repeated."""
    if n_threads > 1 and n > 1000:
        pytest.skip("takes seconds: on one thread alone")
    n, few = (min(n, 5), min(n, 3)) if tiny else (n, min(n, 16))
    size, config, model, z0 = make(tiny, few)
    observations = torch.randn(config.model.window + 3, few, OBS_DIM)
    *past, last = observations
    last = last[torch.arange(n) % few]
    providers: Providers = {}
    expected = None
    for (name, dtype), actor in engines(model, z0).items():
        if isinstance(actor, str):
            providers[name, dtype] = actor
            continue
        filled = torch.stack([under(name, lambda obs=obs, a=actor: a.act(obs))() for obs in past])
        actor = repeated(actor, n)
        run = under("reference" if name == "reference" else "", lambda actor=actor: actor.act(last))
        actions = torch.cat((filled.flatten(0, 1), run()))
        expected = actions if expected is None else expected
        assert row_error(actions, expected) < BOUNDS[dtype], f"{name} {dtype}"
        providers[name, dtype] = run
    flops, n_bytes = cost(config, n)
    shape = f"{size} C={config.model.tokens_per_step} N={n}"
    rarely = [("reference", "float32")] if n > 1000 else []
    compare(Case("acting", "environments", shape, flops, n_bytes, n, "environment steps"), providers, rarely)


@pytest.mark.parametrize("n", [8])
def test_late(compare, tiny, n_threads, n):
    """Steps 100, 1,000 and 10,000 of an episode, by one actor each, which takes that very step again and again."""
    if n_threads > 1:
        pytest.skip("as on one thread")
    size, config, model, z0 = make(tiny, n)
    problem = engine_problem("decode_step")
    lengths = (4, 5, 6) if tiny else (100, 1000, 10_000)
    providers: Providers = {}
    table = torch.randn(64, n, OBS_DIM)

    def nth_step(length: int) -> Callable[[], Tensor]:
        actor, naive = Actor(model, units(torch.float32), z0, bf16=False), NaiveActor(model, z0)
        obs = advance(actor, table, length - 1, naive)
        assert row_error(actor.act(obs), naive.look(obs)) < BOUNDS["float32"], length

        def step() -> Tensor:
            # As many tokens as before, in the same slots. The oldest that it read is lost, which takes no other time.
            actor._state.steps.fill_(length - 1)
            return actor.act(obs)

        step()
        assert step().isfinite().all()
        assert actor._state.steps.tolist() == [length] * n
        return step

    providers["reference", "float32"] = under("reference", under("reference", lambda: nth_step(lengths[0]))())
    for length in lengths:
        providers[f"cpp, step {length}", "float32"] = problem or nth_step(length)
    flops, n_bytes = cost(config, n)
    shape = f"{size} C={config.model.tokens_per_step} N={n}"
    compare(Case("acting", "late", shape, flops, n_bytes, n, "environment steps"), providers)
