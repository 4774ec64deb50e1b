"""Speed of what a user runs: training, evaluation, the online loop, commands as whole processes, and the import.

Data are random trajectories in the sizes of hopper or halfcheetah: speed does not ask what is learnt. The backend is
that of everything inside; ``cpp`` takes bfloat16 where the row says so. Rows of whole processes tell all the memory
that a process ever held, the others what a call takes beyond what was there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from bench_update import BOUNDS
from bench_update import cost as update_cost
from harness import Case, Process, Providers, engine_problem, row_error, under

from gac_fast import Config, evaluate, finetune, preset
from gac_fast.data import from_arrays
from gac_fast.data.trajectories import Trajectories
from gac_fast.envs import make_vector
from gac_fast.train.offline import OfflineTrainer

SIZES = {"Hopper-v5": (11, 3), "HalfCheetah-v5": (17, 6)}  # observations and actions
ACTION_BOUND = {"float32": 1e-4, "bfloat16": 5e-2}


def trajectories(env_id: str, n: int, length: int) -> Trajectories:
    """n episodes of one length, cut by a time limit."""
    rng = np.random.default_rng(0)
    obs_dim, act_dim = SIZES[env_id]
    ends = np.arange(1, n * length + 1) % length == 0
    return from_arrays(
        rng.standard_normal((n * length, obs_dim), np.float32),
        rng.uniform(-1, 1, (n * length, act_dim)).astype(np.float32),
        rng.standard_normal(n * length, np.float32), np.zeros_like(ends), ends,
        action_bounds=(np.full(act_dim, -1.0), np.full(act_dim, 1.0)), env_id=env_id,
    )  # fmt: skip


def backends() -> dict[tuple[str, str], str | None]:
    """Provider -> why it cannot run, None where it can."""
    found: dict[tuple[str, str], str | None] = {("reference", "float32"): None}
    for dtype in ("float32", "bfloat16"):
        found["cpp", dtype] = engine_problem("window_attention", dtype)
    return found


def config_of(tiny: bool, dtype: str, **groups: dict[str, object]) -> Config:
    train = {"bf16": "on" if dtype == "bfloat16" else "off", **groups.pop("train", {})}
    return preset("tiny" if tiny else "gym").replace(train=train, **groups)


@pytest.mark.parametrize("n_episodes", [1, 16, 64, 256])
def test_training(compare, tiny, n_threads, n_episodes):
    """An update with all that goes on around it: drawing, packing, the chains, the optimiser's rates."""
    if n_threads > 1 and n_episodes > 16:
        pytest.skip("takes seconds: on one thread alone")
    length, n_episodes = (10, min(n_episodes, 3)) if tiny else (100, n_episodes)
    data = trajectories("Hopper-v5", max(8, 2 * n_episodes), length)
    providers: Providers = {}
    losses: dict[str, float] = {}
    for (name, dtype), problem in backends().items():
        if name == "reference" and n_episodes > 16:
            problem = "left out: takes seconds, see B=16"
        elif dtype == "float32" and n_episodes > 64 and engine_problem("window_attention", "bfloat16") is None:
            problem = "left out: takes seconds, see B=64"
        if problem is not None:
            providers[name, dtype] = problem
            continue
        train = {"batch_size": n_episodes, "n_updates": 1_000_000, "held_out": 0.0}
        trainer = OfflineTrainer(data, config_of(tiny, dtype, train=train))
        run = under("reference" if name == "reference" else "", trainer.run_update)
        values, n_steps = run()
        assert n_steps == n_episodes * length
        losses[dtype if name == "cpp" else "reference"] = float(values["action_error"])
        providers[name, dtype] = run
    if "reference" not in losses:
        # Not timed, but what the engine does is held against it all the same.
        train = {"batch_size": n_episodes, "n_updates": 1_000_000, "held_out": 0.0}
        trainer = OfflineTrainer(data, config_of(tiny, "float32", train=train))
        losses["reference"] = float(under("reference", trainer.run_update)()[0]["action_error"])
    for dtype in losses.keys() & BOUNDS.keys():
        assert losses[dtype] == pytest.approx(losses["reference"], rel=BOUNDS[dtype][0]), dtype
    config = config_of(tiny, "float32")
    flops, n_bytes = update_cost(config, n_episodes * length)
    size = "tiny" if tiny else "gym"
    shape = f"{size} C={config.model.tokens_per_step} B={n_episodes} T={length}"
    case = Case("end_to_end", "training", shape, flops, n_bytes, n_episodes * length, "time steps")
    compare(case, providers, list(providers) if n_episodes > 10 else [])


ENV = "HalfCheetah-v5"  # whose episodes end by their time limit alone


def test_evaluation(compare, tiny, n_threads):
    """``gac_fast.evaluate``: plans found, whole episodes by them, and what they returned."""
    n, length = (2, 10) if tiny else (8, 250)
    data = trajectories(ENV, 8, 20)
    vector = make_vector(ENV, n, n_threads=n_threads, max_episode_steps=length)
    providers: Providers = {}
    obs = torch.from_numpy(data.observations[:1])
    first = None
    for (name, dtype), problem in backends().items():
        if problem is not None:
            providers[name, dtype] = problem
            continue
        policy = OfflineTrainer(data, config_of(tiny, dtype)).policy()
        backend = "reference" if name == "reference" else ""
        z0 = policy.z0[:1]
        action = under(backend, lambda p=policy, z=z0: p.actor(z).act(obs))()
        first = action if first is None else first
        assert row_error(action, first) < ACTION_BOUND[dtype], f"{name} {dtype}"
        providers[name, dtype] = under(backend, lambda p=policy: evaluate(p, vector, n))
    quickest = [run for run in providers.values() if not isinstance(run, str)][-1]
    assert quickest().lengths.tolist() == [length] * n
    shape = f"{'tiny' if tiny else 'gym'} {ENV} {n} episodes T={length}"
    compare(Case("end_to_end", "evaluation", shape, items=length * n, unit="environment steps"), providers)


def test_online(compare, tiny, n_threads, tmp_path):
    """``gac_fast.finetune`` from nothing: a round that fills the buffer, one of exploring and learning, and an
    evaluation; checkpoint and pictures of the run are made too. One episode is planned from at the end, not 64, whose
    chains would take most of so short a run to settle."""
    if tiny or n_threads > 1:
        pytest.skip("takes seconds, whatever the sizes: on one thread alone")
    n, length, n_rounds, n_updates = 16, 250, 1, 5
    online = {
        "n_envs": n, "n_steps": n_rounds * n * length, "fill_episodes": n, "updates_per_round": n_updates,
        "eval_every": 0, "eval_episodes": n,
    }  # fmt: skip
    providers: Providers = {}
    vector = make_vector(ENV, n, n_threads=n_threads, max_episode_steps=length)

    def loop(name: str, dtype: str) -> Callable[[], object]:
        config = config_of(False, dtype, online=online, plan={"n_best": 1}, train={"batch_size": 4})

        def run() -> Path:
            where = tmp_path / f"{name}-{dtype}"
            return finetune(None, vector, config, run_dir=where, overwrite=True, progress=False, tensorboard=False)

        return under("reference" if name == "reference" else "", run)

    for (name, dtype), problem in backends().items():
        providers[name, dtype] = problem or loop(name, dtype)
    # Those that fill the buffer, those of the rounds, and those of the evaluation.
    steps = length * n * (1 + n_rounds + 1)
    shape = f"gym {ENV} N={n} T={length} {n_updates} updates a round"
    case = Case("end_to_end", "online loop", shape, items=steps, unit="environment steps")
    compare(case, providers, once=True)


def test_commands(compare, tiny, n_threads, tmp_path):
    """``gac-fast train`` as a whole process: the import, the data, 5 updates, a checkpoint, pictures."""
    if tiny or n_threads > 1:
        pytest.skip("takes seconds, whatever the sizes: on one thread alone")
    n, length, n_updates = 16, 500, 5
    data = trajectories("Hopper-v5", n, length)
    file = tmp_path / "data.hdf5"
    last = np.zeros(data.num_steps, np.bool_)
    last[data.cu_seqlens[1:] - 1] = True
    with h5py.File(file, "w") as f:
        for name, value in {
            "observations": data.observations, "actions": data.actions, "timeouts": last,
            "terminals": np.zeros_like(last), "rewards": np.ones(data.num_steps, np.float32),
        }.items():  # fmt: skip
            f[name] = value
    command = [sys.executable, "-m", "gac_fast", "train", "--data", str(file), "--preset", "gym", "--overwrite"]
    # One episode to plan from at the end, not 64, whose chains would take most of so short a run to settle.
    n_best = 1
    command += ["--plan.n-best", str(n_best), "--train.held-out", "0", "--train.n-updates", str(n_updates)]
    command += ["--train.batch-size", "4", "--no-tensorboard", "--run-dir"]
    providers: Providers = {}
    for (name, dtype), problem in backends().items():
        variables = {"GAC_FAST_BACKEND": "reference"} if name == "reference" else {}
        bf16 = ["--train.bf16", "on" if dtype == "bfloat16" else "off"]
        process = Process([*command, str(tmp_path / f"{name}-{dtype}"), *bf16], **variables)
        providers[name, dtype] = problem or process
    shape = f"gym hopper B=4 T={length} {n_updates} updates n-best {n_best}"
    steps = n_updates * 4 * length
    case = Case("end_to_end", "gac-fast train, whole process", shape, items=steps, unit="time steps")
    compare(case, providers, list(providers))


def test_import(compare, tiny, n_threads):
    """In a fresh process. The package imports torch when something of it is asked for that needs it."""
    if tiny or n_threads > 1:
        pytest.skip("as on one thread and with any sizes")
    statements = {
        "import torch": "import torch",
        "import gac_fast": "import gac_fast",
        "import gac_fast, train, load": "from gac_fast import train, load",
    }
    providers = {(name, "none"): Process([sys.executable, "-c", code]) for name, code in statements.items()}
    compare(Case("end_to_end", "import, whole process", "all"), providers)
