"""Builds the C++ engine `gac_fast._C` with CMake; all metadata is in pyproject.toml.

Environment variables:
    GAC_FAST_NO_CPP=1  install without the C++ engine
    CXX                the C++ compiler
    CMAKE_ARGS         further arguments for CMake, for example -DGAC_FAST_SANITIZE=address (options in CMakeLists.txt)
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """Marks an extension whose sources and flags CMakeLists.txt knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures and builds every CMakeExtension."""

    def run(self) -> None:
        # SystemExit, not an exception: the installer then prints this sentence and no traceback around it.
        problem = missing_tool()
        if problem is not None:
            raise SystemExit(f"error: {problem}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake_executable(),
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DGAC_FAST_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        ninja = ninja_executable()
        if ninja is not None and "CMAKE_GENERATOR" not in os.environ:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake_executable(), "--build", str(build_dir), "--parallel"], check=True)


def missing_tool() -> str | None:
    """One sentence about what the C++ build lacks, None where it lacks nothing."""
    way_out = "or set GAC_FAST_NO_CPP=1 to install gac_fast without its C++ engine"
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"]
    if sys.platform != "win32" and not any(shutil.which(candidate) for candidate in candidates):
        looked_for = " or ".join(candidates)
        return f"gac_fast needs a C++17 compiler and found no {looked_for}: install one, name it by CXX, {way_out}"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"gac_fast needs the C headers of this Python and found no {header}: install them, {way_out}"
    return None


def cmake_executable() -> str:
    """The `cmake` wheel of the build environment, whose bin folder may not be on PATH; else the system's."""
    try:
        import cmake
    except ImportError:
        return "cmake"
    return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")


def ninja_executable() -> str | None:
    """The `ninja` wheel of the build environment; else the system's; None leaves CMake its default generator."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


with_cpp = os.environ.get("GAC_FAST_NO_CPP", "0") in ("", "0")

setup(
    # kernels/ at the top would collide with another project's `import kernels`, so it installs inside the package.
    packages=[*find_packages(include=["gac_fast", "gac_fast.*"]), "gac_fast.kernels"],
    package_dir={"gac_fast.kernels": "kernels"},
    package_data={"gac_fast": ["py.typed", "*.pyi"], "gac_fast.data": ["published.csv"]},
    include_package_data=False,
    ext_modules=[CMakeExtension("gac_fast._C")] if with_cpp else [],
    cmdclass={"build_ext": CMakeBuild},
)
