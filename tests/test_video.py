"""Films are written whole or not at all, and a missing renderer is said in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gac_fast import video
from gac_fast.errors import ConfigError, DataError, EnvError


def frames(n: int = 12, height: int = 48, width: int = 64) -> Iterator[np.ndarray]:
    for i in range(n):
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        frame[:, : (i + 1) * width // n] = (255, 0, 0)
        yield frame


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
def test_mp4(tmp_path: Path, height: int, width: int) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = video.record(frames(12, height, width), tmp_path / "deep" / "film.mp4", fps=24)
    assert path == tmp_path / "deep" / "film.mp4"
    assert list(path.parent.iterdir()) == [path]
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    decoded = [np.frombuffer(raw, np.uint8).reshape(48, 64, 3) for raw in reader]
    assert meta["size"] == (64, 48)
    assert meta["fps"] == 24
    assert len(decoded) == 12
    # Compression blurs, but red stays red and black black.
    for i, expected in enumerate(frames(12, height, width)):
        assert np.abs(decoded[i][:height, :width].astype(int) - expected).mean() < 12, i


def test_gif(tmp_path: Path) -> None:
    path = video.record(frames(5), tmp_path / "film.gif", fps=20)
    with Image.open(path) as image:
        assert image.n_frames == 5
        for i, expected in enumerate(frames(5)):
            image.seek(i)
            assert image.info["duration"] == 50
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - expected).max() == 0
    assert list(tmp_path.iterdir()) == [path]


def test_frames_are_taken_as_they_come(tmp_path: Path) -> None:
    """A few frames are alive at a time, however long the film."""
    alive, most = 0, 0

    class Frame(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= self.base is None

    def counted() -> Iterator[np.ndarray]:
        nonlocal alive, most
        for _ in range(40):
            frame = Frame((16, 16, 3), dtype=np.uint8)
            frame[:] = 0
            alive += 1
            most = max(most, alive)
            yield frame
            del frame

    pytest.importorskip("imageio_ffmpeg")
    video.record(counted(), tmp_path / "film.mp4")
    assert most <= 4


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_failing_renderer_leaves_the_old_film(tmp_path: Path, suffix: str) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield from frames(3)
        raise RuntimeError("the simulator crashed")

    path = tmp_path / f"film{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the simulator crashed"):
        video.record(failing(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_noticed(tmp_path: Path) -> None:
    """The encoder itself may leave a cut film without an error: here it may write no more than 4 KiB."""
    pytest.importorskip("imageio_ffmpeg")
    script = """
import resource, signal, sys
import numpy as np
from gac_fast import video
from gac_fast.errors import EnvError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
noise = np.random.default_rng(0)
try:
    video.record((noise.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(20)), sys.argv[1])
except EnvError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "film.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the video encoder" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no frames to write"),
        (
            [None],
            r"frame 0: expected uint8 \[height, width, 3\], got object \[\] \(does the environment have render_mode",
        ),
        ([np.zeros((4, 4, 3))], "frame 0: .* got float64"),
        ([np.zeros((4, 4), np.uint8)], r"frame 0: .* got uint8 \[4, 4\]"),
        ([np.zeros((4, 4, 4), np.uint8)], r"got uint8 \[4, 4, 4\]"),
        ([np.zeros((0, 4, 3), np.uint8)], r"got uint8 \[0, 4, 3\]"),
        (
            [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)],
            r"frame 1: expected the size of the first, \[4, 4, 3\], got \[4, 6, 3\]",
        ),
    ],
)
def test_bad_frames(tmp_path: Path, given: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        video.record(given, tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


def test_bad_name_and_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"film\.avi: expected a name that ends in \.mp4 or \.gif, got '\.avi'"):
        video.record(frames(), tmp_path / "film.avi")
    with pytest.raises(ConfigError, match="got 'no suffix'"):
        video.record(frames(), tmp_path / "film")
    for fps in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="fps must be positive"):
            video.record(frames(), tmp_path / "film.gif", fps=fps)


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    # Set before it is deleted, so that what the test leaves there is undone too.
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")
    return monkeypatch


@pytest.mark.parametrize(("broken", "expected"), [([], "egl"), (["egl"], "osmesa")])
def test_backend_chosen(headless: pytest.MonkeyPatch, broken: list[str], expected: str) -> None:
    headless.setattr(video, "_probe", lambda backend: "no library" if backend in broken else None)
    assert video.headless_backend() == expected
    assert os.environ["MUJOCO_GL"] == expected


def test_no_backend(headless: pytest.MonkeyPatch) -> None:
    headless.setattr(video, "_probe", lambda backend: f"no {backend} library")
    message = (
        r"cannot render without a display \(egl: no egl library; osmesa: no osmesa library\)\. "
        r"Install EGL .*libegl1.* or OSMesa .*libosmesa6.*, or go without a video"
    )
    with pytest.raises(EnvError, match=message):
        video.headless_backend()
    assert "MUJOCO_GL" not in os.environ


def test_asked_backend(headless: pytest.MonkeyPatch) -> None:
    headless.setenv("MUJOCO_GL", "OSMesa")
    headless.setattr(video, "_probe", lambda backend: None)
    assert video.headless_backend() == "osmesa"
    headless.setattr(video, "_probe", lambda backend: "no library")
    with pytest.raises(EnvError, match=r"MUJOCO_GL=osmesa does not work here \(no library\)"):
        video.headless_backend()


def test_a_display_is_used(headless: pytest.MonkeyPatch) -> None:
    headless.setattr(video, "_probe", lambda backend: "not reached")
    headless.setenv("DISPLAY", ":0")
    assert video.headless_backend() == "glfw"
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("pass", None),
        ("import sys; print('loading', file=sys.stderr); raise ImportError('no libEGL')", "ImportError: no libEGL"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with signal 11"),
        ("import os; assert os.environ['MUJOCO_GL'] == 'egl'", None),
    ],
)
def test_probe(monkeypatch: pytest.MonkeyPatch, script: str, expected: str | None) -> None:
    monkeypatch.setattr(video, "_PROBE", script)
    assert video._probe("egl") == expected


def test_probe_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", never)
    assert video._probe("egl") == "no answer within 60 s"


def test_renders_really(headless: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One falling ball, rendered and recorded by the backend found, in a process of its own."""
    try:
        backend = video.headless_backend()
    except EnvError as error:
        pytest.skip(f"no renderer on this machine: {error}")
    script = """
import sys, mujoco
from gac_fast import video
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><body pos="0 0 1"><freejoint/><geom size=".3"/></body></worldbody></mujoco>'
)
data = mujoco.MjData(model)
renderer = mujoco.Renderer(model, 48, 64)
def frames():
    for _ in range(5):
        mujoco.mj_step(model, data, 20)
        renderer.update_scene(data)
        frame = renderer.render()
        assert frame.std() > 1
        yield frame
video.record(frames(), sys.argv[1])
renderer.close()
"""
    path = tmp_path / "film.gif"
    subprocess.run([sys.executable, "-c", script, str(path)], env={**os.environ, "MUJOCO_GL": backend}, check=True)
    with Image.open(path) as image:
        assert image.size == (64, 48)
        assert image.n_frames == 5
