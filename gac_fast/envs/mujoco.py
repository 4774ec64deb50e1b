"""Hopper-v5, HalfCheetah-v5 and Walker2d-v5 on ``mujoco.batch``: gymnasium's environments, bit for bit, in one call.

Model files, observations, rewards and ends are those of ``gymnasium.envs.mujoco``; rewards and observations of all
rows are computed together, and the simulation steps of an environment step run inside the batch. Row k of seed s starts
as gymnasium's own environment under ``reset(seed=s + k)`` and draws its later starts from the same stream, which is
what ``SyncVectorEnv`` does too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode

from gac_fast.envs.batch import BatchVectorEnv, Floats, new_batch
from gac_fast.errors import EnvError

if TYPE_CHECKING:
    import mujoco

__all__ = ["ENVIRONMENTS", "MujocoVectorEnv"]

# Observed velocities of Hopper and Walker2d are clipped to +- this.
MAX_SPEED = 10.0

Range = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """What gymnasium's constructor of one environment takes, with its defaults."""

    xml_file: str
    frame_skip: int
    forward_reward_weight: float
    ctrl_cost_weight: float
    reset_noise_scale: float
    exclude_current_positions_from_observation: bool = True


@dataclass(frozen=True)
class HalfCheetah(Task):
    xml_file: str = "half_cheetah.xml"
    frame_skip: int = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1


@dataclass(frozen=True)
class Walker2d(Task):
    xml_file: str = "walker2d_v5.xml"
    frame_skip: int = 4
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 1e-3
    reset_noise_scale: float = 5e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (0.8, 2.0)
    healthy_angle_range: Range = (-1.0, 1.0)


@dataclass(frozen=True)
class Hopper(Walker2d):
    xml_file: str = "hopper.xml"
    healthy_z_range: Range = (0.7, float("inf"))
    healthy_angle_range: Range = (-0.2, 0.2)
    healthy_state_range: Range = (-100.0, 100.0)


ENVIRONMENTS: dict[str, Callable[..., Task]] = {
    "Hopper-v5": Hopper,
    "HalfCheetah-v5": HalfCheetah,
    "Walker2d-v5": Walker2d,
}
"""Constructor of the task by gymnasium id"""


def _task(env_id: str, arguments: dict[str, Any]) -> Task:
    if env_id not in ENVIRONMENTS:
        raise EnvError(f"env_id: expected one of {', '.join(ENVIRONMENTS)}, got {env_id!r}")
    task = ENVIRONMENTS[env_id]()
    known = [field.name for field in fields(task)]
    for name in arguments:
        if name not in known:
            raise EnvError(
                f"{env_id} on mujoco.batch: expected arguments among {', '.join(known)}, got {name!r}; "
                f"'sync:{env_id}' takes all of gymnasium's"
            )
    task = ENVIRONMENTS[env_id](**arguments)
    if not isinstance(task.frame_skip, int) or task.frame_skip < 1:
        raise EnvError(f"frame_skip: expected at least 1, got {task.frame_skip!r}")
    return task


def _healthy_bounds(task: Walker2d, n_state: int) -> tuple[Floats, Floats]:
    """Between what the height, the angle and, in Hopper, all further positions and velocities have to be."""
    bounds = np.array([task.healthy_z_range, task.healthy_angle_range], np.float64)
    if isinstance(task, Hopper):
        # Of positions and velocities end to end, the first two (x and height) are left out.
        state = np.tile(np.array(task.healthy_state_range, np.float64), (n_state - 2, 1))
        state[0] = max(state[0, 0], bounds[1, 0]), min(state[0, 1], bounds[1, 1])
        bounds = np.concatenate((bounds[:1], state))
    return bounds[:, 0].copy(), bounds[:, 1].copy()


def _load_model(task: Task) -> mujoco.MjModel:
    try:
        import mujoco
    except ImportError as error:
        raise EnvError(f"this environment needs mujoco >= 4.0, which cannot be imported: {error}") from None
    path = Path(task.xml_file).expanduser()
    # As gymnasium reads it: a name without a folder is one of its own files.
    if not task.xml_file.startswith((".", "/", "~")):
        path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / task.xml_file
    if not path.is_file():
        raise EnvError(f"xml_file: expected a MuJoCo model, found no file {path}")
    return mujoco.MjModel.from_xml_path(str(path))


class MujocoVectorEnv(BatchVectorEnv):
    """One of gymnasium's ``ENVIRONMENTS`` for ``num_envs`` independent episodes, stepped together on a thread pool.

    Results do not depend on the number of threads, nor a row's on the other rows.

    Args:
        env_id: a key of ``ENVIRONMENTS``.
        num_envs: number of episodes in parallel.
        n_threads: threads that step the physics, the calling one included; default one per CPU.
        max_episode_steps: truncate after so many steps; default gymnasium's 1000.
        autoreset_mode: ``NEXT_STEP`` or ``DISABLED``, as the enum or its value.
        **arguments: those of gymnasium's environment but for the ones of pictures.

    Raises:
        EnvError: an argument is unknown or out of range, or a package is missing.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        n_threads: int | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **arguments: Any,
    ) -> None:
        self.task = _task(env_id, arguments)
        model = _load_model(self.task)
        self._batch = new_batch(model, num_envs, n_threads, env_id)
        self.env_id = env_id
        n_skipped = int(bool(self.task.exclude_current_positions_from_observation))
        low, high = model.actuator_ctrlrange.astype(np.float32).T
        super().__init__(
            num_envs,
            1000 if max_episode_steps is None else max_episode_steps,
            autoreset_mode,
            gymnasium.spaces.Box(-np.inf, np.inf, (model.nq + model.nv - n_skipped,), np.float64),
            gymnasium.spaces.Box(low, high, dtype=np.float32),
        )
        import mujoco
        from mujoco.batch import SimulationError

        # Here, for an import takes its time even where there is nothing left to do.
        self._simulation_error = SimulationError
        self.position = self._batch.bind("qpos")
        self.velocity = self._batch.bind("qvel")
        self._control = self._batch.bind("ctrl")
        # A state row holds time, qpos and qvel one after the other: an observation is one slice of it.
        self._observed = self._batch.state[:, 1 + n_skipped : 1 + model.nq + model.nv]
        if isinstance(self.task, Walker2d):
            low, high = _healthy_bounds(self.task, model.nq + model.nv)
            self._judged = self._batch.state[:, 2 : 2 + len(low)]
            self._healthy_low, self._healthy_high = low, high
        self._n_positions = model.nq - n_skipped
        self._batch.reset(stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        self._fresh_state = self._batch.state[0].copy()
        self._dt = model.opt.timestep * self.task.frame_skip
        self._origin = (model.qpos0.copy(), np.zeros(model.nv))
        self._generators: list[np.random.Generator] = []

    def set_state(self, position: npt.ArrayLike, velocity: npt.ArrayLike) -> Floats:
        """Start an episode in every row from ``position`` [num_envs, nq] and ``velocity`` [num_envs, nv].

        Returns:
            Observations [num_envs, obs_dim].
        """
        ids = np.arange(self.num_envs)
        self._place(ids, np.asarray(position, np.float64), np.asarray(velocity, np.float64))
        self._begin(ids)
        return self._observe()

    def _place(self, ids: npt.NDArray[np.int64], position: Floats, velocity: Floats) -> None:
        # What a reset leaves in a row of the state; a native call for some rows takes longer than this.
        self._batch.state[ids] = self._fresh_state
        self.position[ids] = position
        self.velocity[ids] = velocity
        # As gymnasium's set_state does; the first step's solver starts from what this leaves.
        self._batch.forward(ids)

    def _seed(self, seed: int, ids: npt.NDArray[np.int64]) -> None:
        self._all_generators()
        for i in ids:
            self._generators[i] = np_random(seed + int(i))[0]

    def _all_generators(self) -> list[np.random.Generator]:
        if not self._generators:
            self._generators = [np_random(None)[0] for _ in range(self.num_envs)]
        return self._generators

    def _start(self, ids: npt.NDArray[np.int64]) -> None:
        generators, scale = self._all_generators(), self.task.reset_noise_scale
        position, velocity = (np.empty((len(ids), x.shape[1])) for x in (self.position, self.velocity))
        nq, nv = position.shape[1], velocity.shape[1]
        normal = isinstance(self.task, HalfCheetah)
        # One row's numbers after the other: each has a generator of its own, as gymnasium's environments do.
        for k, i in enumerate(ids):
            position[k] = generators[i].uniform(-scale, scale, nq)
            velocity[k] = (
                scale * generators[i].standard_normal(nv) if normal else generators[i].uniform(-scale, scale, nv)
            )
        position += self._origin[0]
        velocity += self._origin[1]
        self._place(ids, position, velocity)

    def _advance(
        self, actions: Floats, ids: npt.NDArray[np.int64] | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_] | None]:
        task = self.task
        before = self.position[:, 0].copy()
        self._control[:] = actions
        try:
            self._batch.step(ids, nstep=task.frame_skip)
        except self._simulation_error as error:
            failed = EnvError(f"the simulation cannot go on: {error}")
            failed.environment = int(error.ids[0])
            raise failed from error
        velocity = self.position[:, 0] - before
        velocity /= self._dt
        rewards = velocity if task.forward_reward_weight == 1.0 else task.forward_reward_weight * velocity
        terminations = None
        if isinstance(task, Walker2d):
            judged = self._judged
            healthy = ((judged > self._healthy_low) & (judged < self._healthy_high)).all(axis=1)
            rewards += healthy * task.healthy_reward
            if task.terminate_when_unhealthy:
                terminations = ~healthy
        # In the precision of the actions, as gymnasium sums it.
        rewards -= task.ctrl_cost_weight * np.square(actions).sum(axis=1)
        return rewards, terminations

    def _observe(self) -> Floats:
        observations = self._observed.copy()
        if isinstance(self.task, Walker2d):
            velocity = observations[:, self._n_positions :]
            # np.clip takes three times as long, on its way through Python.
            np.minimum(np.maximum(velocity, -MAX_SPEED, out=velocity), MAX_SPEED, out=velocity)
        return observations
