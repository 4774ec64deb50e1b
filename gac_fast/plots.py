"""Pictures of a run: learning curves, predicted against achieved returns, episodes in a maze.

Everything comes in as plain arrays and files. Colours are those of Okabe and Ito, or cividis and viridis: they differ
for colour-blind readers and in grey print. No pyplot, so no global state and no display is needed.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gac_fast.errors import DataError
from gac_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "METRIC_LABELS", "Curve", "learning_curves", "maze_episodes", "online_curves", "predicted_vs_achieved",
    "result_calibration", "result_curves",
]  # fmt: skip

METRIC_LABELS: Mapping[str, str] = {
    "nll_per_step": "action NLL (nats per step)",
    "steering": "steering (rms action difference)",
    "tau_only_corr": "tau-only corr(y, r)",
    "plan_corr": "the same beyond what the start says",
    "action_error": "action error (mean squared)",
    "return_error": "return error (mean squared, standardised)",
    "return_rmse": "return error (rms, standardised)",
    "return_coverage": "returns within one predicted std",
    "return_nll": "return NLL (nats, standardised)",
    "drift_ratio": "Langevin drift / noise",
    "seed_norm": "|z0| / sqrt(d)",
    "grad_norm": "gradient norm",
    "time_steps_per_second": "time steps per second",
    "learning_rate": "learning rate",
}
"""What the axes of well-known metrics say, by the last part of the metric's name; also the order of their panels."""

# Metrics that mean something only beside another one: (its panel, what to add to the line's name).
_BESIDE = {"nll_other_plan": ("nll_per_step", "other plan")}

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.3",
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def _figure(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` x `height` inches, saved to `path` on leaving; the suffix chooses the format."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary)


def learning_curves(
    metrics_csv: str | os.PathLike[str],
    path: str | os.PathLike[str],
    labels: Mapping[str, str] | None = None,
    max_panels: int = 12,
) -> None:
    """Draw the metrics of a run against the update, one panel per metric.

    Columns of one metric share a panel: `nll` (of the training itself) and `held_out/nll` are two lines in the panel
    `nll`. Long noisy curves are drawn faintly with a running mean above. Columns without a finite value are left out.

    Args:
        metrics_csv: a file as `train.log.Logger` writes it: a column `step`, then one per metric, cells may be empty.
        path: picture to write.
        labels: axis labels with units by metric, beside `METRIC_LABELS`; their panels come first.
        max_panels: panels drawn at most.

    Raises:
        DataError: the file has no column `step` or no metric with a finite value.
    """
    labels = {**(labels or {}), **{k: v for k, v in METRIC_LABELS.items() if k not in (labels or {})}}
    panels: dict[str, list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]] = {}
    for column, (steps, values) in _read_metrics(Path(metrics_csv)).items():
        group, _, metric = column.rpartition("/")
        metric, addition = _BESIDE.get(metric, (metric, ""))
        name = ", ".join(filter(None, [group.replace("_", " ") or "train", addition]))
        panels.setdefault(metric, []).append((name, steps, values))
    if not panels:
        raise DataError(f"{metrics_csv} holds no metric with a finite value: nothing to draw")
    order = [metric for metric in labels if metric in panels] + [metric for metric in panels if metric not in labels]
    order = order[:max_panels]
    names = list(dict.fromkeys(name for metric in order for name, _, _ in panels[metric]))

    columns = {1: 1, 2: 2, 4: 2}.get(len(order), 3 if len(order) <= 9 else 4)
    rows = math.ceil(len(order) / columns)
    with _figure(path, 3.5 * columns, 2.5 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, metric in zip(grid, order, strict=False):
            for name, steps, values in panels[metric]:
                colour = _COLOURS[names.index(name) % len(_COLOURS)]
                smooth = _running_mean(values)
                if smooth is not None:
                    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(
                    steps,
                    values if smooth is None else smooth,
                    color=colour,
                    marker="o" if len(steps) < 25 else None,
                    markersize=3,
                    label=name,
                )
            if _spans_decades([values for _, _, values in panels[metric]]):
                axes.set_yscale("log")
            axes.set_title(labels.get(metric, metric.replace("_", " ")), loc="left")
            if len(names) > 1:
                axes.legend()
        for i, axes in enumerate(figure.axes):
            if i >= len(order):
                axes.set_axis_off()
            elif i + columns >= len(order):
                axes.set_xlabel("update")


def _read_metrics(path: Path) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(steps, values) by column, only where the cell holds a finite number."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise DataError(f"{path}: expected a column 'step', found {reader.fieldnames}")
        for row in reader:
            step = _finite(row.pop("step"))
            for column, cell in row.items():
                value = _finite(cell)
                if step is not None and value is not None:
                    steps, values = found.setdefault(column, ([], []))
                    steps.append(step)
                    values.append(value)
    return {column: (np.asarray(steps), np.asarray(values)) for column, (steps, values) in found.items()}


def _finite(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Centred mean over 1/30 of the curve, over fewer points at its ends; None for curves too short to need it."""
    half = len(values) // 60
    if half < 1:
        return None
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    begin, end = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    mean: NDArray[np.float64] = (sums[end] - sums[begin]) / (end - begin)
    return mean


def _spans_decades(curves: Sequence[NDArray[np.float64]]) -> bool:
    low, high = min(float(c.min()) for c in curves), max(float(c.max()) for c in curves)
    return low > 0 and high / low > 300


def online_curves(metrics_csv: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draw an online run against its environment steps.

    Four panels: target, explored and exploited returns; predicted against achieved returns of every round; environment
    steps per second while acting; where the time went.

    Args:
        metrics_csv: of the run, as :func:`gac_fast.train.online.finetune` logs it.
        path: picture to write.

    Raises:
        DataError: the file has no column `step`, or no round with environment steps.
    """
    found = _read_metrics(Path(metrics_csv))
    if "online/env_steps" not in found:
        raise DataError(f"{metrics_csv} holds no environment steps: nothing to draw")
    updates, env_steps = found["online/env_steps"]

    def at(name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Environment steps and values of a column."""
        steps, values = found.get(name, (np.zeros(0), np.zeros(0)))
        return env_steps[np.searchsorted(updates, steps).clip(max=len(env_steps) - 1)], values

    with _figure(path, 11.0, 7.0) as figure:
        ((returns, honesty), (speed, time)) = figure.subplots(2, 2)
        _draw_returns(returns, at)
        _draw_honesty(honesty, found)
        x, values = at("online/env_steps_per_second")
        speed.plot(x, values, color=_COLOURS[0], marker="o" if len(x) < 25 else None, markersize=3)
        speed.set_ylim(bottom=0)
        speed.set_title("environment steps per second while acting", loc="left")
        shares = [(name.removeprefix("time/"), *at(name)) for name in found if name.startswith("time/")]
        if shares:
            time.stackplot(
                shares[0][1],
                [values for _, _, values in shares],
                labels=[name for name, _, _ in shares],
                colors=_COLOURS[: len(shares)],
                alpha=0.8,
            )
            time.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(shares), borderaxespad=0.2)
        time.set_ylim(0, 1)
        time.set_ylabel("share of the round's time")
        for axes in (returns, speed, time):
            axes.set_xlabel("environment steps")


def _draw_returns(axes: Axes, at: Callable[[str], tuple[NDArray[np.float64], NDArray[np.float64]]]) -> None:
    lines = (
        ("explore/target", "target", {"color": "0.4", "linestyle": (0, (4, 3))}),
        ("explore/best", "best explored", {"color": _COLOURS[2], "alpha": 0.6, "linewidth": 0.9}),
        ("explore/achieved", "explored", {"color": _COLOURS[2]}),
        ("noisy_exploit/achieved", "exploit with action noise", {"color": _COLOURS[1], "alpha": 0.5}),
        ("exploit/predicted", "exploit, predicted", {"color": _COLOURS[0], "linestyle": (0, (1, 1.5))}),
        ("exploit/achieved", "exploit, achieved", {"color": _COLOURS[0], "marker": "o", "markersize": 3}),
    )
    for name, label, style in lines:
        x, values = at(name)
        if len(x):
            axes.plot(x, values, label=label, **style)
    axes.set_title("return", loc="left")
    axes.legend(fontsize="x-small")


def _draw_honesty(axes: Axes, found: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> None:
    kinds = (("explore", "explored", 2), ("noisy_exploit", "exploit with action noise", 1), ("exploit", "exploit", 0))
    low, high = math.inf, -math.inf
    for kind, label, colour in kinds:
        if f"{kind}/achieved" not in found or f"{kind}/predicted" not in found:
            continue
        (steps, achieved), (also, predicted) = found[f"{kind}/achieved"], found[f"{kind}/predicted"]
        _, i, j = np.intersect1d(steps, also, return_indices=True)
        axes.scatter(predicted[j], achieved[i], s=18, alpha=0.6, color=_COLOURS[colour], linewidths=0, label=label)
        both = np.concatenate((predicted[j], achieved[i]))
        if len(both):
            low, high = min(low, float(both.min())), max(high, float(both.max()))
    if low <= high:
        margin = 0.05 * (high - low) or 1.0
        limits = (low - margin, high + margin)
        axes.plot(limits, limits, color="0.5", linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlim=limits, ylim=limits)
        axes.legend(fontsize="x-small")
    axes.set(xlabel="predicted, mean of a round", ylabel="achieved")
    axes.set_title("predicted against achieved", loc="left")


def predicted_vs_achieved(
    predicted: ArrayLike,
    achieved: ArrayLike,
    path: str | os.PathLike[str],
    starts: ArrayLike | None = None,
    walls: ArrayLike | None = None,
    cell_size: float = 1.0,
    goal: ArrayLike | None = None,
    radius: float = 0.45,
) -> None:
    """Draw the return each plan promised against the one its episode achieved, and where the episodes started.

    Args:
        predicted: [n] predicted returns, environment units.
        achieved: [n] achieved returns, environment units.
        path: picture to write.
        starts: [n, 2] start positions; with them two more panels show, at each start, the achieved return and the
            achieved minus the predicted one.
        walls: [w, 2] centres of the wall cells of a maze, drawn behind the starts.
        cell_size: edge of a cell, in the units of the positions.
        goal: [2] centre of the goal.
        radius: of the goal, in the units of the positions.

    Raises:
        DataError: shapes that do not match, or a value that is not finite.
    """
    predictions = _array("predicted", predicted, (None,))
    achievements = _array("achieved", achieved, (len(predictions),))
    positions = None if starts is None else _array("starts", starts, (len(predictions), 2))
    if not len(predictions):
        raise DataError("predicted is empty: nothing to draw")

    with _figure(path, 4.0 if positions is None else 12.5, 3.9) as figure:
        panels = figure.subplots(1, 1 if positions is None else 3, squeeze=False)[0]
        _scatter_returns(panels[0], predictions, achievements)
        if positions is not None:
            gap = achievements - predictions
            bound = float(np.abs(gap).max()) or 1.0
            for axes, values, label, colours in (
                (panels[1], achievements, "achieved return", {"cmap": "viridis"}),
                (panels[2], gap, "achieved minus predicted return", {"cmap": "PuOr", "vmin": -bound, "vmax": bound}),
            ):
                _draw_maze(axes, walls, cell_size, goal, radius)
                points = axes.scatter(*positions.T, c=values, s=26, edgecolors="0.35", linewidths=0.3, **colours)
                axes.set(aspect="equal", xlabel="x of the start", ylabel="y of the start")
                axes.grid(False)
                figure.colorbar(points, ax=axes, label=label, shrink=0.8)


def _scatter_returns(axes: Axes, predictions: NDArray[np.float64], achievements: NDArray[np.float64]) -> None:
    low = min(predictions.min(), achievements.min())
    high = max(predictions.max(), achievements.max())
    margin = 0.05 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    mean_p, mean_a = predictions.mean(), achievements.mean()
    axes.plot(limits, limits, color="0.5", linewidth=1, linestyle=(0, (4, 3)), label="predicted = achieved")
    dots = f"{len(predictions)} episodes"
    axes.scatter(predictions, achievements, s=16, color=_COLOURS[0], alpha=0.5, linewidths=0, label=dots)
    axes.axvline(mean_p, color=_COLOURS[1], linewidth=0.8, alpha=0.6)
    axes.axhline(mean_a, color=_COLOURS[1], linewidth=0.8, alpha=0.6)
    mean = f"mean: {mean_p:.1f} predicted, {mean_a:.1f} achieved"
    axes.scatter([mean_p], [mean_a], s=80, marker="D", color=_COLOURS[1], edgecolors="white", zorder=3, label=mean)
    axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="predicted return", ylabel="achieved return")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)


class Curve(NamedTuple):
    """A quantity over training, of several seeds."""

    label: str
    steps: ArrayLike
    """[n], ascending."""
    values: ArrayLike
    """[seeds, n]"""


def result_curves(
    curves: Sequence[Curve], levels: Mapping[str, float], ylabel: str, title: str, path: str | os.PathLike[str]
) -> None:
    """Draw curves as the mean over seeds in a band from the lowest seed to the highest; a single step as a point.

    Args:
        curves: at least one.
        levels: values to draw as horizontal lines, by name.
        ylabel, title: of the picture.
        path: picture to write.

    Raises:
        DataError: shapes that do not match, or a value that is not finite.
    """
    with _figure(path, 6.5, 3.8) as figure:
        axes = figure.subplots()
        for i, curve in enumerate(curves):
            colour = _COLOURS[i % len(_COLOURS)]
            steps = _array(f"steps of {curve.label}", curve.steps, (None,))
            values = _array(f"values of {curve.label}", curve.values, (None, len(steps)))
            mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
            seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
            if len(steps) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(steps, mean, color=colour, marker="o" if len(steps) < 25 else None, markersize=3,
                          label=f"{curve.label} ({seeds})")  # fmt: skip
            else:
                axes.errorbar(steps, mean, yerr=[mean - low, high - mean], color=colour, fmt="o", markersize=4,
                              capsize=3, label=f"{curve.label} ({seeds})")  # fmt: skip
        for i, (name, value) in enumerate(levels.items()):
            style = (0, (4, 2 + 2 * i))
            axes.axhline(value, color="0.5", linewidth=1, linestyle=style, label=f"{name}: {value:.4g}")
        axes.set(xlabel="update", ylabel=ylabel)
        axes.set_title(title, loc="left")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def result_calibration(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], path: str | os.PathLike[str]
) -> None:
    """Draw mean predicted against mean achieved returns of evaluations, a panel per task.

    Args:
        panels: by task and label (predicted [n], achieved [n]); at least one.
        path: picture to write.

    Raises:
        DataError: shapes that do not match, or a value that is not finite.
    """
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _figure(path, 3.6 * columns + 1.6, 3.4 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid:
            axes.set_axis_off()
        shown = {}
        for axes, (task, panel) in zip(figure.axes, panels.items(), strict=False):
            axes.set_axis_on()
            every = []
            for label, (predicted, achieved) in panel.items():
                x = _array(f"predicted of {label}", predicted, (None,))
                y = _array(f"achieved of {label}", achieved, (len(x),))
                colour = _COLOURS[labels.index(label) % len(_COLOURS)]
                shown[label] = axes.scatter(x, y, s=22, alpha=0.7, color=colour, linewidths=0)
                every.append(np.concatenate((x, y)))
            both = np.concatenate(every)
            margin = 0.05 * float(both.max() - both.min()) or 1.0
            limits = (float(both.min()) - margin, float(both.max()) + margin)
            axes.plot(limits, limits, color="0.5", linewidth=1, linestyle=(0, (4, 3)))
            axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="predicted return", ylabel="achieved return")
            axes.set_title(task, loc="left")
        figure.legend(shown.values(), shown.keys(), loc="outside right upper")


def maze_episodes(
    positions: Sequence[ArrayLike],
    returns: ArrayLike,
    walls: ArrayLike,
    cell_size: float,
    goal: ArrayLike,
    radius: float,
    path: str | os.PathLike[str],
    n: int = 12,
) -> None:
    """Draw episodes as paths through a maze, coloured by time, from the best to the worst.

    Of more than `n` episodes, `n` evenly spaced in the ranking by return are drawn, so that the choice flatters nobody.

    Args:
        positions: one [T, 2] array per episode.
        returns: [episodes] achieved returns.
        walls: [w, 2] centres of the wall cells, in the units of the positions.
        cell_size: edge of a cell.
        goal: [2] centre of the goal.
        radius: of the goal.
        path: picture to write.
        n: panels drawn at most.

    Raises:
        DataError: shapes that do not match, or a value that is not finite.
    """
    from matplotlib.collections import LineCollection

    achieved = _array("returns", returns, (len(positions),))
    tracks = [_array(f"positions[{i}]", track, (None, 2)) for i, track in enumerate(positions)]
    if not tracks or min(map(len, tracks)) == 0:
        raise DataError("positions: expected at least one episode, each with at least one position")
    ranked = np.argsort(-achieved, kind="stable")
    chosen = ranked[np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int)]
    longest = max(len(tracks[i]) for i in chosen)

    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    with _figure(path, 2.3 * columns + 0.8, 2.45 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        lines = None
        for axes, i in zip(grid.flat, chosen, strict=False):
            track = tracks[i]
            _draw_maze(axes, walls, cell_size, goal, radius)
            lines = LineCollection(
                list(np.stack([track[:-1], track[1:]], axis=1)), cmap="viridis", linewidths=1.8, capstyle="round"
            )
            lines.set_array(np.arange(len(track) - 1))
            lines.set_clim(0, max(longest - 1, 1))
            axes.add_collection(lines)
            axes.plot(*track[0], "o", color="white", markeredgecolor="black", markeredgewidth=1.2, markersize=6)
            axes.set_aspect("equal")
            axes.set_title(
                f"return {achieved[i]:.0f}" if achieved[i] == round(achieved[i]) else f"return {achieved[i]:.1f}"
            )
        assert lines is not None
        figure.colorbar(lines, ax=grid, label="time step", shrink=0.8, aspect=30)


def _draw_maze(axes: Axes, walls: ArrayLike | None, cell_size: float, goal: ArrayLike | None, radius: float) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Circle, Rectangle

    if walls is not None:
        corners = _array("walls", walls, (None, 2)) - cell_size / 2
        squares = [Rectangle((x, y), cell_size, cell_size) for x, y in corners]
        axes.add_collection(PatchCollection(squares, facecolor="0.82", edgecolor="0.82", linewidth=0.5, zorder=0))
        if len(corners):
            # The outer walls tell nothing beyond their inner faces: half of them is enough.
            low, high = corners.min(axis=0) + 0.6 * cell_size, corners.max(axis=0) + 0.4 * cell_size
            axes.set_xlim(low[0], high[0])
            axes.set_ylim(low[1], high[1])
    if goal is not None:
        x, y = _array("goal", goal, (2,))
        axes.add_patch(
            Circle((x, y), radius, facecolor=_COLOURS[1], edgecolor=_COLOURS[1], alpha=0.3, linewidth=1.2, zorder=0.5)
        )


def _array(name: str, value: ArrayLike, shape: tuple[int | None, ...]) -> NDArray[np.float64]:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        expected = ", ".join("n" if size is None else str(size) for size in shape)
        raise DataError(f"{name}: expected shape [{expected}], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise DataError(f"{name}: expected finite values, found {int((~np.isfinite(array)).sum())} NaN or infinite")
    return array
