"""sdist, wheel and editable install in clean environments; the pins; what a missing tool says."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gac_fast._version import __version__

NO_CPP = os.environ.get("GAC_FAST_NO_CPP", "0") not in ("", "0")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def run_ok(*command: object, cwd: Path, **env: str) -> str:
    result = run(*command, cwd=cwd, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that builds leave nothing in the real one."""
    copy = tmp_path_factory.mktemp("source") / "gac_fast"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def sdist_and_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from nothing but the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run_ok(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture
def clean_environment(tmp_path: Path) -> Callable[..., Path]:
    """Installs into a new environment and returns its Python.

    The dependencies come from the environment of the tests by a .pth line, which does not run the .pth files there:
    an editable gac_fast of that environment stays invisible.
    """

    def install(*arguments: object, **env: str) -> Path:
        folder = tmp_path / "environment"
        run_ok(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
        python = folder / "bin" / "python"
        purelib = run_ok(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
        Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
        run_ok(*pip, "install", *options, *arguments, cwd=tmp_path, **env)
        return python

    return install


def modules_of_the_tree() -> set[str]:
    named = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gac_fast").rglob("*.py")}
    return named | {f"gac_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


# ---------------------------------------------------------------------------------------------------------------------
# What is in the distributions


def test_sdist_holds_all_that_builds_and_tests_and_nothing_built(sdist_and_wheel):
    with tarfile.open(sdist_and_wheel[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in (("csrc", "*"), ("kernels", "*.py"), ("tests", "*.py"), ("benchmarks", "*.py")):
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern)}
        assert {name for name in expected if "__pycache__" not in name} <= names
    assert {"CMakeLists.txt", "setup.py", "constraints.txt", "LICENSE", "CITATION.cff", "gac_fast/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package_and_nothing_else(sdist_and_wheel):
    with zipfile.ZipFile(sdist_and_wheel[1]) as archive:
        names = archive.namelist()
    assert {name for name in names if name.endswith(".py")} == modules_of_the_tree()
    assert {"gac_fast/py.typed", "gac_fast/_C.pyi", "gac_fast/data/published.csv"} <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == (0 if NO_CPP else 1)
    assert {name.split("/")[0] for name in names} == {"gac_fast", f"gac_fast-{__version__}.dist-info"}


# ---------------------------------------------------------------------------------------------------------------------
# Installed in a clean environment

USE = """
import sys
import torch
import gac_fast, gac_fast.kernels.philox_normal
from gac_fast import ops, reference

for module in (gac_fast, gac_fast.kernels.philox_normal):
    assert module.__file__.startswith(sys.prefix), module.__file__
plans = torch.arange(3)
noise = ops.philox_normal((1, 2), plans, 5, 11)
torch.testing.assert_close(noise, reference.philox_normal((1, 2), plans, 5, 11), rtol=0, atol=1e-6)
((_, backend),) = ops.dispatch_counts()
"""


@pytest.mark.skipif(NO_CPP, reason="installed without the C++ engine (GAC_FAST_NO_CPP)")
def test_wheel_works_in_a_clean_environment(sdist_and_wheel, clean_environment, tmp_path):
    python = clean_environment(sdist_and_wheel[1])
    use = (
        USE
        + "import gac_fast._C\nassert gac_fast._C.__file__.startswith(sys.prefix)\nassert backend == 'cpp', backend\n"
    )
    run_ok(python, "-I", "-c", use, cwd=tmp_path)
    help_text = run_ok(python.parent / "gac-fast", "--help", cwd=tmp_path)
    assert "gac-fast" in help_text


def test_sdist_without_the_cpp_engine_works_and_says_so(sdist_and_wheel, clean_environment, tmp_path):
    # No compiler can be found either: nothing may look for one.
    python = clean_environment(sdist_and_wheel[0], GAC_FAST_NO_CPP="1", CXX="/nonexistent/c++")
    use = USE + (
        "assert backend == 'reference', backend\n"
        "(entry,) = (entry for entry in ops.status('cpu') if entry.op == 'philox_normal')\n"
        "print(entry)\n"
        "try:\n"
        "    with ops.backend('cpp'): ops.philox_normal((1, 2), plans, 5, 11)\n"
        "except gac_fast.errors.BackendError as error: print(error)\n"
    )
    told = run_ok(python, "-I", "-c", "import gac_fast.errors\n" + use, cwd=tmp_path).splitlines()
    assert told[0].startswith("philox_normal on cpu: reference")
    for line in told:
        assert "gac_fast._C is not installed (GAC_FAST_NO_CPP=1 leaves it out" in line
    assert len(told) == 2


def test_editable_install_finds_the_kernels_and_follows_the_source(source, clean_environment, tmp_path):
    python = clean_environment("--editable", source, GAC_FAST_NO_CPP="1")
    use = USE.replace("sys.prefix", repr(str(source)))
    run_ok(python, "-I", "-c", use, cwd=tmp_path)
    added = source / "kernels" / "added_later.py"
    added.write_text("ANSWER = 42\n")
    try:
        run_ok(python, "-I", "-c", "from gac_fast.kernels.added_later import ANSWER", cwd=tmp_path)
    finally:
        added.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Metadata and pins


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_every_constraint_is_one_exact_version():
    for requirement in pins().values():
        assert re.fullmatch(r"==[0-9][^*+]*", str(requirement.specifier)), requirement
    assert str(pins()["torch"].specifier) == "==2.13.0"
    assert str(pins()["triton"].specifier) == "==3.7.1"


def test_constraints_pin_every_dependency_down_to_the_last():
    pinned = pins()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    todo = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"], *build]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        key = (name, tuple(sorted(requirement.extras)))
        # CUDA builds of torch pin their own NVIDIA packages.
        if key in seen or name.startswith(("nvidia", "cuda")):
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        seen.add(key)
        assert name in pinned, f"{requirement} is not pinned in constraints.txt"
        version = str(pinned[name].specifier).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} does not allow {version}"
        for child in importlib.metadata.requires(name) or []:
            parsed = Requirement(child)
            extras = ["", *requirement.extras]
            if parsed.marker is None or any(parsed.marker.evaluate({"extra": extra}) for extra in extras):
                parsed.marker = None
                todo.append(str(parsed))


def test_version_is_told_in_one_place():
    assert importlib.metadata.version("gac_fast") == __version__
    assert "version" in PROJECT["dynamic"]
    others = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", ROOT / "CITATION.cff"]
    assert not [path.name for path in others if f'"{__version__}"' in path.read_text()]


# ---------------------------------------------------------------------------------------------------------------------
# Missing tools: one sentence each


def test_build_without_a_compiler_says_one_sentence(source, tmp_path):
    build = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path)
    result = run(*build, cwd=source, PATH="/nonexistent", CXX="", GAC_FAST_NO_CPP="")
    assert result.returncode != 0
    assert result.stderr.strip() == (
        "error: gac_fast needs a C++17 compiler and found no c++ or g++ or clang++: install one, name it by CXX, "
        "or set GAC_FAST_NO_CPP=1 to install gac_fast without its C++ engine"
    )


@pytest.fixture
def make(source: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `make` in a fresh copy of the source tree, at ``tmp_path / "tree"``."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    tree = tmp_path / "tree"
    shutil.copytree(source, tree)
    # Not the variables of a `make test` that runs these tests.
    unset = {"MAKEFLAGS": "", "MAKELEVEL": "", "MFLAGS": "", "GAC_FAST_NO_CPP": ""}
    return lambda *arguments: run("make", *arguments, cwd=tree, **unset)


def test_make_without_a_python_says_one_sentence(make, tmp_path):
    result = make("test", "PYTHON=/nonexistent/python3.9")
    assert result.returncode != 0
    (told,) = (line for line in result.stderr.splitlines() if not line.startswith("make"))
    assert told.startswith(
        "error: gac_fast needs Python >= 3.11 with its venv module and found none in PYTHON=/nonexist"
    )
    assert not (tmp_path / "tree" / ".venv").exists()


def test_make_without_a_compiler_says_one_sentence_before_any_download(make, tmp_path):
    python = tmp_path / "tree" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho called >> called\n")
    python.chmod(0o755)
    result = make("demo", "CXX=/nonexistent/c++")
    assert result.returncode != 0
    (told,) = (line for line in result.stderr.splitlines() if not line.startswith("make"))
    assert told.startswith("error: gac_fast needs a C++17 compiler and found no /nonexistent/c++: install one")
    assert "GAC_FAST_NO_CPP=1" in told
    assert not (tmp_path / "tree" / "called").exists()


@pytest.mark.parametrize("given", [None, "/somewhere/else"])
def test_ci_takes_the_full_data_from_the_variable_before_the_shared_folder(given, tmp_path):
    root, tools = tmp_path / "clone", tmp_path / "tools"
    for folder in (root / ".ci", tools, tmp_path / "shared" / "data"):
        folder.mkdir(parents=True)
    script = shutil.copy(ROOT / ".ci" / "run", root / ".ci" / "run")
    (tools / "make").write_text('#!/bin/sh\necho "$1 $GAC_FAST_DATA"\n[ "$1" != "$FAILS" ]\n')
    (tools / "make").chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "GAC_FAST_DATA"}
    variables["PATH"] = f"{tools}:{variables['PATH']}"
    if given is not None:
        variables["GAC_FAST_DATA"] = given
    data = given or root / ".." / "shared" / "data"
    # Sanitizers and kernels run beside the other tests, whose last line comes last; theirs are told where they fail.
    sanitizers, kernels = f"sanitize-short {data}\n", f"test-kernels {data}\n"
    for fails, told in (("", ""), ("test", ""), ("sanitize-short", sanitizers), ("test-kernels", sanitizers + kernels)):
        done = subprocess.run([script], env=variables | {"FAILS": fails}, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == bool(fails)
        assert done.stdout == f"lint {data}\ntest {data}\n{told}"
        log = sanitizers if fails == "sanitize-short" else sanitizers + kernels
        assert (root / "build" / "beside.log").read_text() == log


def test_ci_leaves_no_test_to_nobody():
    """The tests that `make test` is told to leave out in CI are those of `make test-kernels`."""
    (pattern,) = re.findall(r"--ignore-glob=(\S+?)\"", (ROOT / ".ci" / "run").read_text())
    recipe = (ROOT / "Makefile").read_text().partition("test-kernels:")[2].splitlines()[1]
    assert recipe.endswith(f'-m "not slow" {pattern}')
    assert len(list(ROOT.glob(pattern))) >= 5


def test_make_help_lists_the_targets(make):
    told = make("help").stdout
    for target in ("demo", "test", "test-all", "lint", "bench", "clean"):
        assert f"make {target} " in told
