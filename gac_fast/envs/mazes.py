"""Geometry of the three mazes: everything a plot or a controller needs, without a simulator.

Coordinates are metres with the maze centred on the origin; a cell is (row, column) with row 0 at the top (largest y).
The maps are those of gymnasium-robotics' PointMaze_UMaze-v3, PointMaze_Medium-v3 and PointMaze_Large-v3.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gac_fast.errors import EnvError

__all__ = ["MAZES", "MazeSpec", "maze_spec"]

_UMAZE = """
#####
#...#
###.#
#...#
#####
"""

_MEDIUM = """
########
#..##..#
#..#...#
##...###
#..#...#
#.#..#.#
#...#..#
########
"""

_LARGE = """
############
#....#.....#
#.##.#.#.#.#
#......#...#
#.####.###.#
#..#.#.....#
##.#.#.#.###
#..#...#...#
############
"""


@dataclass(frozen=True)
class MazeSpec:
    """One maze: its map, fixed goal and horizon."""

    name: str
    env_id: str
    """Gymnasium id of the environment"""
    rows: tuple[str, ...]
    """The map, '#' for a wall cell and '.' for a free one"""
    goal_cell: tuple[int, int]
    """(row, column)"""
    horizon: int
    """Steps of an episode"""
    cell_size: float = 1.0
    """Metres"""
    wall_height: float = 0.4
    """Metres"""
    goal_radius: float = 0.45
    """Metres around the goal within which the reward is 1"""
    start_noise: float = 0.25
    """Starts are uniform within this distance of a cell's centre, in x and in y"""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the map."""
        return len(self.rows), len(self.rows[0])

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """(x_min, x_max, y_min, y_max) of the map including its walls, as matplotlib's ``imshow`` takes it."""
        height, width = self.shape
        half_width, half_height = width * self.cell_size / 2, height * self.cell_size / 2
        return -half_width, half_width, -half_height, half_height

    @cached_property
    def walls(self) -> list[tuple[float, float, float, float]]:
        """(x_min, y_min, width, height) of every wall cell."""
        half = self.cell_size / 2
        return [
            (float(x) - half, float(y) - half, self.cell_size, self.cell_size)
            for x, y in self.cell_to_xy(np.array(self.wall_cells))
        ]

    @cached_property
    def wall_cells(self) -> list[tuple[int, int]]:
        """(row, column) of every wall, row by row."""
        return [(i, j) for i, row in enumerate(self.rows) for j, cell in enumerate(row) if cell == "#"]

    @cached_property
    def free_cells(self) -> npt.NDArray[np.int64]:
        """[F, 2], (row, column) of every free cell, row by row."""
        return np.array([(i, j) for i, row in enumerate(self.rows) for j, cell in enumerate(row) if cell == "."])

    @cached_property
    def cell_centres(self) -> npt.NDArray[np.float64]:
        """[F, 2], (x, y) of the centre of every free cell, in the order of ``free_cells``."""
        return self.cell_to_xy(self.free_cells)

    @cached_property
    def goal_xy(self) -> npt.NDArray[np.float64]:
        """[2], the centre of the goal cell."""
        return self.cell_to_xy(np.array(self.goal_cell))

    @property
    def goal_index(self) -> int:
        """Index of the goal cell in ``free_cells``."""
        return int(np.flatnonzero((self.free_cells == self.goal_cell).all(axis=1))[0])

    @cached_property
    def next_cells(self) -> npt.NDArray[np.int64]:
        """[F, F], where a shortest path from free cell i (row) to free cell j (column) goes first; i itself at i = j.

        Cells are connected up, down, left and right; ties go to the first of these in that order.
        """
        index = {(int(i), int(j)): f for f, (i, j) in enumerate(self.free_cells)}
        neighbours = [
            [index[step] for step in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)) if step in index]
            for i, j in index
        ]
        table = np.empty((len(index), len(index)), np.int64)
        for goal in range(len(index)):
            distance = {goal: 0}
            queue = deque([goal])
            while queue:
                cell = queue.popleft()
                for neighbour in neighbours[cell]:
                    if neighbour not in distance:
                        distance[neighbour] = distance[cell] + 1
                        queue.append(neighbour)
            for cell in range(len(index)):
                table[cell, goal] = goal if cell == goal else min(neighbours[cell], key=distance.__getitem__)
        return table

    def cell_to_xy(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Centres (x, y) [..., 2] of ``cells`` (row, column) [..., 2]."""
        height, width = self.shape
        x = (cells[..., 1] + 0.5 - width / 2) * self.cell_size
        y = (height / 2 - cells[..., 0] - 0.5) * self.cell_size
        return np.stack([x, y], axis=-1)

    def xy_to_cell(self, xy: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Cells (row, column) [..., 2] that hold the points ``xy`` [..., 2]."""
        height, width = self.shape
        row = np.floor(height / 2 - xy[..., 1] / self.cell_size)
        column = np.floor(xy[..., 0] / self.cell_size + width / 2)
        return np.stack([row, column], axis=-1).astype(np.int64)

    def nearest_free_cell(self, xy: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Index [...] into ``free_cells`` of the cell that holds each point [..., 2].

        A point inside a wall (the ball may sink into one by a hair) belongs to the free cell with the nearest centre.
        """
        height, width = self.shape
        cells = self.xy_to_cell(xy)
        row = np.clip(cells[..., 0], 0, height - 1)
        column = np.clip(cells[..., 1], 0, width - 1)
        index = self._free_index[row, column]
        outside = index < 0
        if outside.any():
            distance = np.square(xy[outside][:, None, :] - self.cell_centres[None]).sum(axis=-1)
            index = index.copy()
            index[outside] = distance.argmin(axis=1)
        return index

    def start_positions(self, uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Map uniform numbers in [0, 1) [..., 3] to start positions (x, y) [..., 2]: a free cell, then the offset."""
        cell = np.floor(uniform[..., 0] * len(self.free_cells)).astype(np.int64)
        return self.cell_centres[cell] + (2.0 * uniform[..., 1:] - 1.0) * self.start_noise

    @cached_property
    def _free_index(self) -> npt.NDArray[np.int64]:
        index = np.full(self.shape, -1, np.int64)
        index[self.free_cells[:, 0], self.free_cells[:, 1]] = np.arange(len(self.free_cells))
        return index


def _spec(name: str, text: str, goal_cell: tuple[int, int], horizon: int) -> MazeSpec:
    return MazeSpec(
        name=name,
        env_id=f"gac_fast/PointMaze-{name}-v0",
        rows=tuple(text.split()),
        goal_cell=goal_cell,
        horizon=horizon,
    )


MAZES: dict[str, MazeSpec] = {
    "umaze": _spec("umaze", _UMAZE, goal_cell=(1, 1), horizon=300),
    "medium": _spec("medium", _MEDIUM, goal_cell=(6, 6), horizon=600),
    "large": _spec("large", _LARGE, goal_cell=(7, 10), horizon=800),
}


def maze_spec(maze: str) -> MazeSpec:
    """The maze of that name ('umaze', 'medium', 'large'), also by 'pointmaze-umaze' or its gymnasium id.

    Raises:
        EnvError: there is no such maze.
    """
    for name, spec in MAZES.items():
        if maze in (name, f"pointmaze-{name}", spec.env_id):
            return spec
    raise EnvError(f"maze: expected one of {', '.join(MAZES)}, got {maze!r}")
