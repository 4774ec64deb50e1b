"""PointMaze: a force-actuated ball in a maze with one fixed goal.

Physics and maps are those of gymnasium-robotics' PointMaze-v3; one step is one simulation step of 0.01 s.

- Observation: (x, y, vx, vy) float32, metres and metres per second.
- Action: force (x, y), clipped to [-1, 1].
- Reward: 1 where the ball is within 0.45 m of the goal after the step, else 0.
- Start: uniform over the free cells, +-0.25 m in x and y, at rest.
- End: truncated after 300 (umaze), 600 (medium) or 800 (large) steps; never terminated.

Importing this module registers the gymnasium ids ``gac_fast/PointMaze-{umaze,medium,large}-v0``.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from gac_fast.envs._opengl import load_triton_first
from gac_fast.envs.batch import BatchVectorEnv, Floats, checked_actions, new_batch
from gac_fast.envs.mazes import MAZES, MazeSpec, maze_spec
from gac_fast.errors import EnvError

if TYPE_CHECKING:
    import mujoco

__all__ = ["MAX_SPEED", "PointMazeEnv", "PointMazePhysics", "PointMazeVectorEnv", "load_model", "register"]

MAX_SPEED = 5.0
"""Velocities are clipped to +- this before each step, metres per second."""


def load_model(maze: str) -> mujoco.MjModel:
    """Compile gymnasium-robotics' ball and the walls of ``maze`` into a MuJoCo model.

    Raises:
        EnvError: no such maze, or mujoco or gymnasium-robotics is not installed.
    """
    return _compile_model(maze_spec(maze).name)


@cache
def _compile_model(maze: str) -> mujoco.MjModel:
    try:
        import mujoco
    except ImportError as error:
        raise EnvError(f"PointMaze needs mujoco >= 4.0, which cannot be imported: {error}") from None
    # The package itself is not imported: that would register a hundred environments only to find one file.
    package = importlib.util.find_spec("gymnasium_robotics")
    if package is None or package.origin is None:
        raise EnvError("PointMaze needs the model of the package gymnasium-robotics, which is not installed")
    path = Path(package.origin).parent / "envs" / "assets" / "point" / "point.xml"
    if not path.is_file():
        raise EnvError(f"PointMaze: expected gymnasium-robotics to hold {path.name} at {path}, found no such file")

    spec = MAZES[maze]
    root = ET.parse(path).getroot()
    world = root.find("worldbody")
    assert world is not None
    size, half_height = spec.cell_size / 2, spec.wall_height / 2
    for cell in spec.wall_cells:
        x, y = spec.cell_to_xy(np.array(cell))
        ET.SubElement(
            world,
            "geom",
            name=f"block_{cell[0]}_{cell[1]}",
            type="box",
            pos=f"{x} {y} {half_height}",
            size=f"{size} {size} {half_height}",
            contype="1",
            conaffinity="1",
            rgba="0.7 0.5 0.3 1.0",
        )
    ET.SubElement(
        world,
        "site",
        name="target",
        type="sphere",
        pos=f"{spec.goal_xy[0]} {spec.goal_xy[1]} {half_height}",
        size="0.2",
        rgba="1 0 0 0.7",
    )
    return mujoco.MjModel.from_xml_string(ET.tostring(root, encoding="unicode"))


class PointMazePhysics:
    """``num_envs`` balls in one maze, stepped on a thread pool; no episodes, no randomness.

    Results do not depend on the number of threads.
    """

    position: npt.NDArray[np.float64]
    """[num_envs, 2], live view"""
    velocity: npt.NDArray[np.float64]
    """[num_envs, 2], live view"""

    def __init__(self, maze: str, num_envs: int, n_threads: int | None = None) -> None:
        self.spec = maze_spec(maze)
        self._batch = new_batch(load_model(maze), num_envs, n_threads, "PointMaze")
        import mujoco

        self._no_stage = int(mujoco.mjtStage.mjSTAGE_NONE)
        self.position = self._batch.bind("qpos")
        self.velocity = self._batch.bind("qvel")
        self._control = self._batch.bind("ctrl")

    def place(
        self,
        position: npt.NDArray[np.float64],
        velocity: npt.NDArray[np.float64] | float = 0.0,
        ids: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Put balls ``ids`` (default: all) at ``position`` [n, 2] with ``velocity`` [n, 2], forgetting their past."""
        self._batch.reset(ids, stage=self._no_stage)
        rows = slice(None) if ids is None else ids
        self.position[rows] = position
        self.velocity[rows] = velocity

    def step(self, actions: npt.NDArray[np.floating], ids: npt.NDArray[np.int64] | None = None) -> None:
        """Advance balls ``ids`` (default: all) by one step; ``actions`` [num_envs, 2] must be finite."""
        if ids is None:
            np.clip(actions, -1.0, 1.0, out=self._control)
            np.clip(self.velocity, -MAX_SPEED, MAX_SPEED, out=self.velocity)
        else:
            self._control[ids] = np.clip(actions[ids], -1.0, 1.0)
            self.velocity[ids] = np.clip(self.velocity[ids], -MAX_SPEED, MAX_SPEED)
        self._batch.step(ids)

    def observations(self) -> npt.NDArray[np.float32]:
        """(x, y, vx, vy) of every ball, a fresh [num_envs, 4] array."""
        return np.concatenate([self.position, self.velocity], axis=1, dtype=np.float32, casting="same_kind")

    def at_goal(self) -> npt.NDArray[np.bool_]:
        """[num_envs], which balls are within the goal radius."""
        offset = self.position - self.spec.goal_xy
        return np.square(offset).sum(axis=1) <= self.spec.goal_radius**2


def _spaces() -> tuple[Any, Any]:
    return (
        gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
        gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32),
    )


class PointMazeVectorEnv(BatchVectorEnv):
    """PointMaze for ``num_envs`` independent episodes, stepped together.

    Episodes end together unless single rows are reset. What happens after the last step is declared in
    ``metadata["autoreset_mode"]``: with ``NEXT_STEP`` (the default) the row's next step ignores its action, returns
    the new start and reward 0; with ``DISABLED`` the caller resets with ``options={"reset_mask": mask}`` and stepping
    a finished row is an error.

    Start k of a seed is the same whatever ``num_envs``: rows draw their starts in order from one generator. Actions are
    clipped to [-1, 1]; observations are float32, and no episode terminates.

    Args:
        maze: 'umaze', 'medium' or 'large'.
        num_envs: number of episodes in parallel.
        n_threads: threads that step the physics, the calling one included; default one per CPU. Results do not
            depend on it.
        max_episode_steps: truncate after so many steps; default the maze's own horizon.
        autoreset_mode: ``NEXT_STEP`` or ``DISABLED``, as the enum or its value.
        first_row: these are the rows from ``first_row`` on of a larger vector: ``reset(seed=s)`` gives what those rows
            of it get under ``s - first_row``, so that two halves whose seeds are apart by the first one's size start
            as the whole does.

    Raises:
        EnvError: an argument is out of range, or a package is missing.
    """

    def __init__(
        self,
        maze: str = "umaze",
        num_envs: int = 1,
        n_threads: int | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        first_row: int = 0,
    ) -> None:
        self.maze = maze_spec(maze)
        if first_row < 0:
            raise EnvError(f"first_row: expected at least 0, got {first_row}")
        self.first_row = first_row
        horizon = self.maze.horizon if max_episode_steps is None else max_episode_steps
        super().__init__(num_envs, horizon, autoreset_mode, *_spaces())
        self.physics = PointMazePhysics(maze, num_envs, n_threads)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Start new episodes in all rows, or in those of ``options["reset_mask"]``, a boolean array [num_envs].

        Returns:
            Observations [num_envs, 4] of all rows, and an empty dict.
        """
        return super().reset(seed=None if seed is None else max(seed - self.first_row, 0), options=options)

    def set_state(self, position: npt.ArrayLike, velocity: npt.ArrayLike = 0.0) -> Floats:
        """Start an episode in every row from ``position`` [num_envs, 2] and ``velocity`` [num_envs, 2].

        Returns:
            Observations [num_envs, 4].
        """
        positions = np.broadcast_to(np.asarray(position, np.float64), (self.num_envs, 2))
        velocities = np.broadcast_to(np.asarray(velocity, np.float64), (self.num_envs, 2))
        self.physics.place(positions, velocities)
        self._begin(np.arange(self.num_envs))
        return self._observe()

    def _seed(self, seed: int, ids: npt.NDArray[np.int64]) -> None:
        self.np_random.random((self.first_row, 3))

    def _start(self, ids: npt.NDArray[np.int64]) -> None:
        self.physics.place(self.maze.start_positions(self.np_random.random((len(ids), 3))), ids=ids)

    def _advance(
        self, actions: Floats, ids: npt.NDArray[np.int64] | None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_] | None]:
        self.physics.step(actions, ids)
        return self.physics.at_goal().astype(np.float64), None

    def _observe(self) -> Floats:
        return self.physics.observations()


class PointMazeEnv(gymnasium.Env[npt.NDArray[np.float32], npt.NDArray[np.floating]]):
    """PointMaze for one episode at a time, which can be rendered.

    The same seed gives the same first start as ``PointMazeVectorEnv``. The step limit is the ``TimeLimit`` that
    ``gymnasium.make`` adds.

    Args:
        maze: 'umaze', 'medium' or 'large'.
        render_mode: None or 'rgb_array'.
        width, height: pixels of a frame.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012  (declared so by gymnasium)

    def __init__(
        self, maze: str = "umaze", render_mode: str | None = None, width: int = 480, height: int = 480
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise EnvError(f"render_mode: expected None or 'rgb_array', got {render_mode!r}")
        self.maze = maze_spec(maze)
        self.render_mode = render_mode
        self.observation_space, self.action_space = _spaces()
        self.physics = PointMazePhysics(maze, 1, n_threads=1)
        self._frame_size = (width, height)
        self._renderer: _TopView | None = None
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start a new episode; returns the observation [4] and an empty dict."""
        super().reset(seed=seed)
        self.physics.place(self.maze.start_positions(self.np_random.random((1, 3))))
        self._started = True
        return self.physics.observations()[0], {}

    def step(
        self, action: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Advance by one step; ``action`` [2] is clipped to [-1, 1]."""
        if not self._started:
            raise EnvError("the environment was stepped before its first reset")
        self.physics.step(checked_actions(action, (2,))[None])
        return self.physics.observations()[0], float(self.physics.at_goal()[0]), False, False, {}

    def render(self) -> npt.NDArray[np.uint8] | None:
        """The maze from above, [height, width, 3], or None without a render mode.

        Raises:
            EnvError: neither EGL nor OSMesa works on this machine.
        """
        if self.render_mode is None:
            return None
        if self._renderer is None:
            self._renderer = _TopView(self.maze, *self._frame_size)
        return self._renderer.frame(self.physics.position[0])

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class _TopView:
    """Off-screen pictures of a maze, seen from straight above.

    The context is made here rather than by ``mujoco.Renderer``, whose choice is fixed by MUJOCO_GL when mujoco is
    first imported: without that variable it asks for a display.
    """

    def __init__(self, maze: MazeSpec, width: int, height: int) -> None:
        import mujoco

        load_triton_first()
        self._context = _offscreen_context(width, height)
        model = copy.copy(load_model(maze.name))
        self._data = mujoco.MjData(model)
        self._model = model
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        ball = model.geom("particle_geom").id
        model.geom_rgba[ball] = (0.3, 0.6, 0.3, 1.0)
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        self._scene = mujoco.MjvScene(model, maxgeom=500)
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE.value
        self._camera.lookat[:] = 0.0
        self._camera.azimuth, self._camera.elevation = 90.0, -90.0
        rows, columns = maze.shape
        span = max(rows, columns * height / width) * maze.cell_size
        self._camera.distance = 1.03 * span / 2 / np.tan(np.radians(model.vis.global_.fovy) / 2) + maze.wall_height
        self._viewport = mujoco.MjrRect(0, 0, width, height)

    def frame(self, position: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
        import mujoco

        self._context.make_current()
        self._data.qpos[:] = position
        mujoco.mj_forward(self._model, self._data)
        mujoco.mjv_updateScene(
            self._model, self._data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        mujoco.mjr_render(self._viewport, self._scene, self._mjr)
        pixels = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._viewport, self._mjr)
        return np.ascontiguousarray(pixels[::-1])

    def close(self) -> None:
        self._context.make_current()
        self._mjr.free()
        self._context.free()


def _offscreen_context(width: int, height: int) -> Any:
    """A current OpenGL context without a display, by EGL or else OSMesa; MUJOCO_GL forces one of them."""
    import importlib

    forced = os.environ.get("MUJOCO_GL", "").lower()
    names: Sequence[str] = (forced,) if forced in ("egl", "osmesa") else ("egl", "osmesa")
    failures = []
    for name in names:
        platform = os.environ.get("PYOPENGL_PLATFORM")
        try:
            context = importlib.import_module(f"mujoco.{name}").GLContext(width, height)
            context.make_current()
            return context
        # The OpenGL bindings fail in many ways on a machine without drivers, AttributeError on None among them.
        except Exception as error:
            failures.append(f"{name}: {error}")
            if platform is None:
                os.environ.pop("PYOPENGL_PLATFORM", None)
            else:
                os.environ["PYOPENGL_PLATFORM"] = platform
    raise EnvError(
        "cannot render without a display: install EGL (libegl1) or OSMesa (libosmesa6), or set MUJOCO_GL to the one "
        f"installed ({'; '.join(failures)})"
    )


def register() -> None:
    """Register the three gymnasium ids; once is enough, more does no harm."""
    for name, spec in MAZES.items():
        if spec.env_id not in gymnasium.registry:
            gymnasium.register(
                id=spec.env_id,
                entry_point="gac_fast.envs.pointmaze:PointMazeEnv",
                vector_entry_point="gac_fast.envs.pointmaze:PointMazeVectorEnv",
                max_episode_steps=spec.horizon,
                kwargs={"maze": name},
            )


register()
