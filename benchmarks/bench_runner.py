"""Speed of stepping 64 Hopper-v5 environments, and of the whole loop with a policy in it.

Bare stepping is ``mujoco.batch`` with the same controls, the same simulation steps and nothing else, from the states
that the vector environment went through. Without EnvPool its row says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from bench_decode_step import ACT_DIM, OBS_DIM, units
from gymnasium.vector import VectorEnv
from harness import Case

from gac_fast import ops
from gac_fast.act import Actor
from gac_fast.config import preset
from gac_fast.envs import close_vector, make_halves, make_vector
from gac_fast.envs.envpool import EnvPoolVectorEnv
from gac_fast.errors import EnvError
from gac_fast.model import GAC
from gac_fast.rollout import rollout

ENV = "Hopper-v5"
N_RECORDED = 100
# Threads sleep while others have their turn, and may wake on one core, from which the system spreads them later: on two
# threads EnvPool took 3 ms a step for the first 40 ms and 1.9 ms from then on.
WARM_SECONDS = 0.05


def recorded(env: VectorEnv, actions: np.ndarray) -> list[np.ndarray]:
    """States of the simulations before each of some steps."""
    states = []
    for action in actions:
        states.append(env._batch.state.copy())
        env.step(action)
    return states


class BareStepper:
    """The next recorded state, controls, simulation steps; again and again."""

    warm_seconds = WARM_SECONDS

    def __init__(self, n: int, n_threads: int, states: list[np.ndarray], actions: np.ndarray) -> None:
        env = make_vector(ENV, n, n_threads=n_threads)
        self._batch, self._frame_skip = env._batch, env.task.frame_skip
        self._control = self._batch.bind("ctrl")
        self._states, self._actions, self._turn = states, actions, 0

    def __call__(self) -> None:
        i = self._turn % len(self._states)
        self._batch.state[:] = self._states[i]
        self._control[:] = self._actions[i]
        self._batch.step(nstep=self._frame_skip)
        self._turn += 1


class Stepper:
    """The next actions, again and again."""

    def __init__(self, env: VectorEnv, actions: np.ndarray, has_threads: bool) -> None:
        self._env, self._actions, self._turn = env, actions, 0
        self.warm_seconds = WARM_SECONDS if has_threads else 0.0
        self.note = f"EnvPool {version('envpool')}" if isinstance(env, EnvPoolVectorEnv) else ""

    def __call__(self) -> None:
        self._env.step(self._actions[self._turn % len(self._actions)])
        self._turn += 1


def test_step(compare, tiny, n_threads):
    n, n_recorded = (4, 5) if tiny else (64, N_RECORDED)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (n_recorded, n, ACT_DIM)).astype(np.float32)
    with contextlib.ExitStack() as stack:

        def make(engine: str, **arguments: Any) -> VectorEnv:
            env = make_vector(ENV, n, engine=engine, **arguments)
            stack.callback(close_vector, env)
            return env

        ours, sync = make("native", n_threads=n_threads), make("sync")
        np.testing.assert_array_equal(ours.reset(seed=0)[0], sync.reset(seed=0)[0])
        for action in actions:
            for x, y in zip(ours.step(action)[:4], sync.step(action)[:4], strict=True):
                np.testing.assert_array_equal(x, y)
        ours.reset(seed=0)
        states = recorded(ours, actions)

        others: dict[str, VectorEnv | str] = {"sync": sync, "async": make("async")}
        try:
            others["envpool"] = make("envpool", num_threads=n_threads)
        except EnvError as error:
            others["envpool"] = f"not installed: pip install gac_fast[envpool] ({error.__cause__})"
        providers: dict[tuple[str, str], Callable[[], object] | str] = {
            (name, "float64"): env if isinstance(env, str) else Stepper(env, actions, isinstance(env, EnvPoolVectorEnv))
            for name, env in others.items()
        }
        providers["mujoco.batch", "float64"] = BareStepper(n, n_threads, states, actions)
        providers["VectorEnv", "float64"] = Stepper(ours, actions, True)
        for env in [ours, *others.values()]:
            if not isinstance(env, str):
                env.reset(seed=0)
        size = "tiny " if tiny else ""
        compare(Case("runner", "step", f"{size}{ENV} N={n}"), providers)


@pytest.mark.parametrize("context", ["states_actions", "states"])
def test_loop(compare, tiny, n_threads, context):
    """Episodes of equal length, so that all rows count to the end; the actor is made beforehand, as for long ones."""
    if context == "states" and n_threads == 1 and not tiny:
        pytest.skip("on one thread with C=2 alone")
    n, n_steps = (4, 3) if tiny else (64, 150)
    size = "tiny" if tiny else "gym"
    config = preset(size).replace(model={"context": context})
    torch.manual_seed(0)
    model = GAC(config.model, OBS_DIM, ACT_DIM)
    bf16 = ops.has_fast_bf16(torch.device("cpu"))
    dtype = "bfloat16" if bf16 else "float32"
    actor = Actor(model, units(torch.float32), torch.randn(n, config.model.n_z, config.model.dim), bf16=bf16)

    def make_actor(obs: np.ndarray, first: int) -> Actor:
        actor.reset()
        return actor

    arguments = {"terminate_when_unhealthy": False, "max_episode_steps": n_steps}
    whole = make_vector(ENV, n, n_threads=n_threads, **arguments)
    states: list[np.ndarray] = []

    def note(done: int, steps: int) -> None:
        states.append(whole._batch.state.copy())

    expected = rollout(whole, make_actor, n, seed=0, keep=n, on_step=note)
    observations = [
        np.ascontiguousarray(np.stack([episode[t] for episode in expected.observations])) for t in range(n_steps)
    ]
    actions = np.stack([np.stack([episode[t] for episode in expected.actions]) for t in range(n_steps)])
    bare = BareStepper(n, n_threads, states, actions)

    def step_all() -> None:
        for _ in range(n_steps):
            bare()

    def act_all() -> None:
        actor.reset()
        for obs in observations:
            actor.act(obs)

    providers: dict[tuple[str, str], Callable[[], object] | str] = {
        ("mujoco.batch", "float64"): step_all,
        ("act", dtype): act_all,
        ("one vector", dtype): lambda: rollout(whole, make_actor, n, seed=0),
    }
    if n_threads > 1:
        halves = make_halves(ENV, n, n_threads=n_threads // 2, **arguments)
        found = rollout(halves, make_actor, n, seed=0, keep=n)
        np.testing.assert_array_equal(found.first_observations, expected.first_observations)
        np.testing.assert_array_equal(found.packed_observations, expected.packed_observations)
        np.testing.assert_array_equal(found.returns, expected.returns)
        providers["halves", dtype] = lambda: rollout(halves, make_actor, n, seed=0)
    shape = f"{size} C={config.model.tokens_per_step} {ENV} N={n} T={n_steps}"
    compare(Case("runner", "loop", shape), providers)
