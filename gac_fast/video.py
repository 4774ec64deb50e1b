"""Films of episodes: frames into a file, and a way to render them without a display."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gac_fast.errors import ConfigError, DataError, EnvError
from gac_fast.files import replacing

__all__ = ["headless_backend", "record"]

_PROBE = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"


def headless_backend() -> str:
    """Choose how MuJoCo renders here, and say it in the environment variable MUJOCO_GL.

    A display is used where there is one; else EGL, then OSMesa. A backend is tried in a process of its own, as a broken
    driver can end the process that loads it. gymnasium environments read MUJOCO_GL when they first render;
    `mujoco.Renderer` reads it when mujoco is first imported, so call this before.

    Returns:
        "egl", "osmesa" or "glfw", or what MUJOCO_GL asked for.

    Raises:
        EnvError: nothing works, or what MUJOCO_GL asks for does not.
    """
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    if asked:
        failure = _probe(asked)
        if failure:
            raise EnvError(f"cannot render: MUJOCO_GL={asked} does not work here ({failure}). {_ADVICE}")
        return asked
    if not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "glfw"
    failures = []
    for backend in ("egl", "osmesa"):
        failure = _probe(backend)
        if not failure:
            os.environ["MUJOCO_GL"] = backend
            return backend
        failures.append(f"{backend}: {failure}")
    raise EnvError(f"cannot render without a display ({'; '.join(failures)}). {_ADVICE}")


_ADVICE = (
    "Install EGL (Debian and Ubuntu: apt-get install libegl1 libgl1-mesa-dri) or OSMesa (apt-get install libosmesa6), "
    "or go without a video"
)


def _probe(backend: str) -> str | None:
    """Try to make a rendering context in a process of its own: None if it works, else the reason."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env={**os.environ, "MUJOCO_GL": backend},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return "no answer within 60 s"
    if done.returncode < 0:
        return f"crashed with signal {-done.returncode}"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {done.returncode}"
    return None


def record(frames: Iterable[NDArray[np.uint8]], path: str | os.PathLike[str], fps: float = 30.0) -> Path:
    """Write frames as they come to a film, whole or not at all.

    Args:
        frames: uint8 RGB frames [height, width, 3], all of one size; `env.render()` of render_mode "rgb_array" gives
            them. An odd height or width gains a repeated last row or column in MP4, which knows even ones only.
        path: `.mp4` (H.264) or `.gif`; an existing file is replaced.
        fps: frames per second; in GIF the time of a frame is rounded to 1/100 s.

    Returns:
        The path written.

    Raises:
        ConfigError: another suffix, or an fps that is not positive.
        DataError: no frames, or one of the wrong shape or dtype.
        EnvError: the encoder failed.
    """
    path = Path(path)
    write = {".mp4": _write_mp4, ".gif": _write_gif}.get(path.suffix.lower())
    if write is None:
        raise ConfigError(
            f"video {path}: expected a name that ends in .mp4 or .gif, got {path.suffix or 'no suffix'!r}"
        )
    if not fps > 0:
        raise ConfigError(f"video {path}: fps must be positive, got {fps}")
    checked = _check(frames)
    first = next(checked, None)
    if first is None:
        raise DataError(f"video {path}: there are no frames to write")
    with replacing(path) as temporary:
        write(chain([first], checked), first.shape, temporary, fps)
    return path


def _check(frames: Iterable[Any]) -> Iterator[NDArray[np.uint8]]:
    shape = None
    for i, frame in enumerate(frames):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise DataError(
                f"frame {i}: expected uint8 [height, width, 3], got {frame.dtype} {list(frame.shape)}"
                + (" (does the environment have render_mode='rgb_array'?)" if frame.dtype == object else "")
            )
        shape = shape or frame.shape
        if frame.shape != shape:
            raise DataError(f"frame {i}: expected the size of the first, {list(shape)}, got {list(frame.shape)}")
        yield frame


def _write_mp4(frames: Iterator[NDArray[np.uint8]], shape: tuple[int, ...], path: Path, fps: float) -> None:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise EnvError("writing .mp4 needs the package imageio-ffmpeg: install it, or write a .gif") from error

    height, width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", quality=7, macro_block_size=1, ffmpeg_log_level="error"
    )
    sent = 0
    try:
        writer.send(None)
        for frame in frames:
            frame = np.pad(frame, ((0, height - shape[0]), (0, width - shape[1]), (0, 0)), mode="edge")
            writer.send(np.ascontiguousarray(frame))
            sent += 1
    except OSError as error:
        raise EnvError(f"the video encoder failed: {error}") from error
    finally:
        writer.close()
    # The encoder's exit status is not passed on: on a full disk it can leave a cut film without a word.
    try:
        kept, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except (OSError, RuntimeError) as error:
        raise EnvError("the video encoder left no readable film: is the disk full?") from error
    if kept != sent:
        raise EnvError(f"the video encoder kept {kept} of {sent} frames: is the disk full?")


def _write_gif(frames: Iterator[NDArray[np.uint8]], shape: tuple[int, ...], path: Path, fps: float) -> None:
    from PIL import Image

    images = (Image.fromarray(frame) for frame in frames)
    duration = max(10, round(100 / fps) * 10)
    next(images).save(path, format="GIF", save_all=True, append_images=images, duration=duration, loop=0)
