"""The Python API: its names, its signatures, its ten lines, and what importing it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gac_fast
from gac_fast.data import from_episodes

EXPORTS = {
    "Actor", "BackendError", "CheckpointError", "Config", "ConfigError", "DataError", "EnvError", "EvalResult",
    "GacError", "Plans", "Policy", "Trajectories", "__version__", "errors", "evaluate", "finetune", "load", "preset",
    "train",
}  # fmt: skip


def run(script: str) -> str:
    """Standard output of a Python process of its own."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exports() -> None:
    assert set(gac_fast.__all__) == EXPORTS
    assert set(dir(gac_fast)) >= EXPORTS
    for name in EXPORTS:
        assert getattr(gac_fast, name) is not None
    with pytest.raises(AttributeError, match="'gac_fast' has no attribute 'finetoon'"):
        gac_fast.finetoon  # noqa: B018


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names, with defaults where they have some; self and open keywords left out."""
    return [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in inspect.signature(function).parameters.values()
        if p.name != "self" and p.kind is not p.VAR_KEYWORD
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("load", ["run_dir", "step=None", "device=cpu"]),
        ("Policy.exploit", ["n", "obs=None", "seed=0", "numbers=None"]),
        ("Policy.explore", ["n", "target", "obs=None", "seed=0", "start=None", "numbers=None"]),
        (
            "Policy.actor",
            ["plans", "action_noise=0.0", "seed=0", "bf16=auto", "cuda_graph=False", "noise_correlation=0.0"],
        ),
        (
            "finetune",
            ["policy", "env", "config=None", "data=None", "run_dir=None", "resume=False", "overwrite=False"]
            + ["progress=True", "tensorboard=True"],
        ),
        ("Actor.act", ["obs"]),
        ("Actor.reset", ["mask=None", "plans=None"]),
        ("evaluate", ["policy", "env", "episodes=100", "seed=0", "plans=None", "keep=0", "progress=False"]),
        (
            "train",
            ["dataset", "config=None", "run_dir=None", "env=None", "resume=False", "overwrite=False"]
            + ["progress=True", "tensorboard=True"],
        ),
        ("preset", ["name"]),
    ],
)
def test_signatures(name: str, expected: list[str]) -> None:
    function: Any = gac_fast
    for part in name.split("."):
        function = getattr(function, part)
    assert parameters(function) == expected


def test_fields_of_plans() -> None:
    assert [field.name for field in fields(gac_fast.Plans)] == ["z0", "return_mean", "return_std"]


def test_every_error_is_a_gac_error() -> None:
    for name in EXPORTS:
        if name.endswith("Error"):
            assert issubclass(getattr(gac_fast, name), gac_fast.GacError)
            assert getattr(gac_fast.errors, name) is getattr(gac_fast, name)


def test_import_is_light() -> None:
    heavy = "torch gymnasium gymnasium_robotics mujoco minari h5py tyro matplotlib numpy triton tensorboard tqdm"
    assert run(f"import sys, gac_fast; print([m for m in {heavy.split()} if m in sys.modules])") == "[]\n"


def test_policy_and_ops_import_no_simulator() -> None:
    heavy = "gymnasium gymnasium_robotics mujoco minari tyro matplotlib tensorboard"
    script = (
        f"import sys, gac_fast; gac_fast.load; gac_fast.ops; print([m for m in {heavy.split()} if m in sys.modules])"
    )
    assert run(script) == "[]\n"


CHECK_CALLABLE = """
import gac_fast, inspect, types

for call, error, message in (
    (lambda: gac_fast.train(3.5), gac_fast.DataError, "expected a file, a Minari dataset id or Trajectories"),
    (lambda: gac_fast.evaluate(None, "nowhere", episodes=0), gac_fast.EnvError, "episodes: expected at least 1"),
):
    try:
        call()
    except error as raised:
        assert message in str(raised), raised
    else:
        raise AssertionError("no error")

import gac_fast.train.offline, gac_fast.train.log
import gac_fast.train.offline as offline
import gac_fast.evaluate as evaluation
from gac_fast.evaluate import evaluate as function

assert isinstance(gac_fast.train, types.ModuleType) and gac_fast.train.offline is offline
assert gac_fast.evaluate is evaluation and evaluation.EvalResult is gac_fast.EvalResult
assert inspect.signature(gac_fast.train) == inspect.signature(offline.train)
assert inspect.signature(gac_fast.evaluate) == inspect.signature(function)
"""


ORDERS = (
    "import gac_fast; gac_fast.train; gac_fast.evaluate",
    "import gac_fast.train.offline",
    "import gac_fast.evaluate",
    "from gac_fast.train import log; from gac_fast import train, evaluate; assert callable(train)",
    "from gac_fast.evaluate import evaluate; import gac_fast.cli",
    "from gac_fast import *",
)


def test_train_and_evaluate_are_modules_and_functions_in_any_order_of_imports() -> None:
    # One process per order, forked after the slow import they share.
    script = f"""
import os, torch

for first in {ORDERS!r}:
    child = os.fork()
    if not child:
        exec(first)
        exec({CHECK_CALLABLE!r})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
print("done")
"""
    assert run(script) == "done\n"


def test_replaced_function_is_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gac_fast.train.offline.train", lambda dataset: f"trained on {dataset}")
    assert gac_fast.train("x") == "trained on x"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three updates on episodes with the dimensions of PointMaze."""
    rng = np.random.default_rng(0)
    episodes = [
        {
            "observations": rng.normal(size=(length, 4)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            "rewards": rng.uniform(0, 1, length),
        }
        for length in (9, 5, 12, 7, 11, 6, 8, 10)
    ]
    data = from_episodes(episodes, action_bounds=(-1.0, 1.0))
    config = gac_fast.preset("tiny").replace(train={"n_updates": 3, "held_out": 0.0})
    folder = tmp_path_factory.mktemp("api") / "run"
    assert gac_fast.train(data, config, folder, progress=False, tensorboard=False) == folder
    return folder


def test_train_load_plan_act(run_dir: Path) -> None:
    policy = gac_fast.load(run_dir)
    assert isinstance(policy, gac_fast.Policy)
    for plans in (policy.exploit(3), policy.exploit(3, np.zeros((3, 4), np.float32)), policy.explore(3, target=5.0)):
        assert isinstance(plans, gac_fast.Plans)
        assert plans.z0.shape == (3, policy.config.model.n_z, policy.config.model.dim)
        assert plans.return_mean.shape == plans.return_std.shape == (3,)
    # Environment units: the data's returns lie around 4, standardised ones around 0.
    assert abs(float(policy.prior_plans(64).return_mean.mean()) - float(policy.returns.mean())) < 2.0

    actor = policy.actor(plans)
    assert isinstance(actor, gac_fast.Actor)
    obs = np.ones((3, 4), np.float32)
    first, second = actor.act(obs), actor.act(obs)
    assert isinstance(first, np.ndarray)
    assert first.shape == (3, 2)
    assert not np.array_equal(first, second)
    actor.reset()
    as_tensor = actor.act(torch.from_numpy(obs))
    assert isinstance(as_tensor, torch.Tensor)
    np.testing.assert_array_equal(as_tensor.numpy(), first)
    actor.act(obs)
    actor.reset(mask=np.array([True, False, False]), plans=plans)
    third = actor.act(obs)
    np.testing.assert_allclose(third[0], first[0], atol=1e-6)
    assert not np.allclose(third[1:], first[1:], atol=1e-6)


def test_evaluate_takes_an_id_or_a_vector_environment(run_dir: Path) -> None:
    policy = gac_fast.load(run_dir)
    result = gac_fast.evaluate(policy, "pointmaze-umaze", 3, 7)
    assert isinstance(result, gac_fast.EvalResult)
    vector = gac_fast.envs.make_vector("pointmaze-umaze", num_envs=3)
    try:
        again = gac_fast.evaluate(policy, vector, episodes=3, seed=7)
    finally:
        vector.close()
    assert len(result.returns) == 3
    np.testing.assert_array_equal(result.returns, again.returns)
    np.testing.assert_array_equal(result.lengths, [300, 300, 300])
