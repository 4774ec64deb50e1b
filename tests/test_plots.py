"""Pictures are drawn whole, from what comes in, without a display or global state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from gac_fast import plots
from gac_fast.errors import DataError

WALLS = np.array(
    [(x, y) for x in range(-2, 3) for y in range(-2, 3) if abs(x) == 2 or abs(y) == 2 or (y == 0 and x < 1)]
)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, to look into."""
    found: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *arguments: object, **keywords: object) -> None:
        found.append(self)
        save(self, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def assert_picture(path: Path) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 200
    assert pixels.std() > 5
    assert list(path.parent.glob(".*")) == []


def write_csv(path: Path, n: int = 200) -> Path:
    lines = ["step,grad_norm,nll_per_step,held_out/nll_per_step,odd_name,held_out/nll_other_plan,empty"]
    for step in range(n):
        held_out = f"{-0.5 + 1 / (step + 1)}" if step % 20 == 0 else ""
        lines.append(
            f"{step},{10 ** (step % 4)},{-1 + 1 / (step + 1)},{held_out},{'nan' if step == 3 else step},{held_out},"
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def test_learning_curves(tmp_path: Path, figures: list[Figure]) -> None:
    plots.learning_curves(write_csv(tmp_path / "metrics.csv"), tmp_path / "plots" / "curves.png")
    assert_picture(tmp_path / "plots" / "curves.png")
    nll, grad_norm, odd = figures[0].axes
    assert nll.get_title(loc="left") == "action NLL (nats per step)"
    assert [text.get_text() for text in nll.get_legend().get_texts()] == ["train", "held out", "held out, other plan"]
    assert grad_norm.get_title(loc="left") == "gradient norm"
    assert grad_norm.get_yscale() == "log"
    assert nll.get_yscale() == "linear"
    assert odd.get_title(loc="left") == "odd name"
    # Raw curve with the gap of the NaN left out, then its running mean.
    assert [len(line.get_xdata()) for line in odd.lines] == [199, 199]
    assert all(axes.get_xlabel() == "update" for axes in (nll, grad_norm, odd))


def test_own_labels_and_number_of_panels(tmp_path: Path, figures: list[Figure]) -> None:
    plots.learning_curves(
        write_csv(tmp_path / "metrics.csv"), tmp_path / "c.png", labels={"odd_name": "oddness (m/s)"}, max_panels=1
    )
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["oddness (m/s)"]


@pytest.mark.parametrize("n", [1, 2, 4, 5, 10])
def test_every_number_of_panels(tmp_path: Path, figures: list[Figure], n: int) -> None:
    names = [f"m{i}" for i in range(n)]
    (tmp_path / "m.csv").write_text("\n".join([",".join(["step", *names]), *(",".join("1" * (n + 1)) for _ in "ab")]))
    plots.learning_curves(tmp_path / "m.csv", tmp_path / "c.svg")
    drawn = [axes for axes in figures[0].axes if axes.lines]
    assert [axes.get_title(loc="left") for axes in drawn] == names
    assert (tmp_path / "c.svg").read_text().count("update") >= 1


def test_running_mean() -> None:
    assert plots._running_mean(np.ones(59)) is None
    values = np.random.default_rng(0).normal(size=300)
    mean = plots._running_mean(values)
    assert mean is not None
    expected = [values[max(i - 5, 0) : i + 6].mean() for i in range(300)]
    np.testing.assert_allclose(mean, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected a column 'step', found None"),
        ("epoch,loss\n1,2\n", r"expected a column 'step', found \['epoch', 'loss'\]"),
        ("step,loss\n1,nan\n2,\n", "holds no metric with a finite value"),
        ("step,loss\n", "holds no metric with a finite value"),
    ],
)
def test_metrics_that_cannot_be_drawn(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        plots.learning_curves(tmp_path / "m.csv", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_predicted_vs_achieved(tmp_path: Path, figures: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    predicted, achieved = rng.normal(80, 5, 64), rng.normal(90, 30, 64)
    plots.predicted_vs_achieved(predicted, achieved, tmp_path / "a.png")
    assert_picture(tmp_path / "a.png")
    (axes,) = figures[0].axes
    np.testing.assert_allclose(axes.collections[0].get_offsets(), np.stack([predicted, achieved], 1))
    np.testing.assert_allclose(axes.collections[1].get_offsets(), [[predicted.mean(), achieved.mean()]])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[1:] == ["64 episodes", f"mean: {predicted.mean():.1f} predicted, {achieved.mean():.1f} achieved"]
    assert axes.get_xlim() == axes.get_ylim()

    starts = rng.uniform(-1, 1, (64, 2))
    plots.predicted_vs_achieved(predicted, achieved, tmp_path / "b.png", starts, walls=WALLS, goal=(-1, 1))
    assert_picture(tmp_path / "b.png")
    for axes, values in zip(figures[1].axes[1:3], (achieved, achieved - predicted), strict=True):
        points = axes.collections[-1]
        np.testing.assert_allclose(points.get_offsets(), starts)
        np.testing.assert_allclose(points.get_array(), values)
    assert figures[1].axes[2].collections[-1].get_clim() == pytest.approx(
        (-np.abs(achieved - predicted).max(), np.abs(achieved - predicted).max())
    )


def test_equal_returns_still_draw(tmp_path: Path) -> None:
    plots.predicted_vs_achieved([3.0], [3.0], tmp_path / "a.png", starts=[[0.0, 0.0]])
    assert_picture(tmp_path / "a.png")


def tracks(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.cumsum(rng.normal(0, 0.05, (20 + i, 2)), axis=0) for i in range(n)]


def test_maze_episodes(tmp_path: Path, figures: list[Figure]) -> None:
    returns = np.random.default_rng(1).permutation(50).astype(float)
    positions = tracks(50)
    plots.maze_episodes(positions, returns, WALLS, 1.0, (-1, 1), 0.45, tmp_path / "maze.png")
    assert_picture(tmp_path / "maze.png")
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    # Best first, worst last, the others evenly between.
    titles = [float(axes.get_title().removeprefix("return ")) for axes in panels]
    assert titles == [49 - round(i) for i in np.linspace(0, 49, 12)]
    for axes, value in zip(panels, titles, strict=True):
        (line,) = [c for c in axes.collections if isinstance(c, LineCollection)]
        track = positions[int(np.argmax(returns == value))]
        np.testing.assert_allclose([segment[0] for segment in line.get_segments()], track[:-1])
        np.testing.assert_allclose(axes.lines[0].get_xydata()[0], track[0])


def test_few_and_short_episodes(tmp_path: Path, figures: list[Figure]) -> None:
    plots.maze_episodes([np.zeros((1, 2))], [0.25], WALLS, 1.0, (-1, 1), 0.45, tmp_path / "maze.png")
    assert_picture(tmp_path / "maze.png")
    assert figures[0].axes[0].get_title() == "return 0.2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [1.0]), r"achieved: expected shape \[2\], got \[1\]"),
        # Would broadcast to [2, 2] without a word.
        (([1.0, 2.0], [[1.0], [2.0]]), r"achieved: expected shape \[2\], got \[2, 1\]"),
        (([1.0, np.nan], [1.0, 2.0]), "predicted: expected finite values, found 1 NaN"),
        (([], []), "predicted is empty"),
    ],
)
def test_returns_that_cannot_be_drawn(tmp_path: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plots.predicted_vs_achieved(*arguments, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("positions", "returns", "walls", "message"),
    [
        (tracks(2), [1.0], WALLS, r"returns: expected shape \[2\], got \[1\]"),
        ([np.zeros((5, 3))], [1.0], WALLS, r"positions\[0\]: expected shape \[n, 2\], got \[5, 3\]"),
        ([], [], WALLS, "expected at least one episode"),
        ([np.zeros((0, 2))], [1.0], WALLS, "each with at least one position"),
        (tracks(1), [1.0], [1.0, 2.0], r"walls: expected shape \[n, 2\], got \[2\]"),
    ],
)
def test_episodes_that_cannot_be_drawn(
    tmp_path: Path, positions: list, returns: list, walls: list, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        plots.maze_episodes(positions, returns, walls, 1.0, (0, 0), 0.45, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_import_is_light_and_drawing_needs_no_pyplot(tmp_path: Path) -> None:
    script = """
import sys
from gac_fast import plots
assert "matplotlib" not in sys.modules
plots.predicted_vs_achieved([1.0, 2.0], [2.0, 1.0], sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.png")], check=True)


ONLINE = (
    "step,explore/target,explore/best,explore/achieved,explore/predicted,noisy_exploit/achieved,noisy_exploit/predicted,"
    "online/env_steps,online/env_steps_per_second,exploit/achieved,exploit/predicted,time/env,time/learning\n"
    "40,100,90,30,50,60,80,1000,5000,,,0.2,0.8\n"
    "80,110,95,40,60,70,90,2000,6000,75,85,0.3,0.7\n"
    "120,115,120,50,65,80,95,3100,5500,,,0.25,0.75\n"
)


def test_an_online_run_is_drawn_against_its_environment_steps(tmp_path: Path, figures: list[Figure]) -> None:
    (tmp_path / "metrics.csv").write_text(ONLINE)
    plots.online_curves(tmp_path / "metrics.csv", tmp_path / "online.png")
    assert_picture(tmp_path / "online.png")
    returns, honesty, speed, time = figures[0].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in returns.get_lines()}
    assert lines["explored"] == ([1000, 2000, 3100], [30, 40, 50])
    assert lines["exploit, achieved"] == ([2000], [75])
    assert lines["target"][1] == [100, 110, 115]
    dots = {dot.get_label(): dot.get_offsets().tolist() for dot in honesty.collections}
    assert dots["explored"] == [[50, 30], [60, 40], [65, 50]]
    assert dots["exploit"] == [[85, 75]]
    assert list(speed.get_lines()[0].get_ydata()) == [5000, 6000, 5500]
    assert [area.get_label() for area in time.collections] == ["env", "learning"]


def test_a_run_without_environment_steps_has_no_online_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(DataError, match="holds no environment steps"):
        plots.online_curves(tmp_path / "metrics.csv", tmp_path / "online.png")
    assert not (tmp_path / "online.png").exists()
