"""The order of imports, what a plain import may load, and that nothing is ever unpickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "gac_fast"

# From the top down; a module imports its own floor and those below. `gac_fast` itself, the public face, stands on top.
FLOORS = [
    {"cli", "demo", "finetune_demo", "__main__"},
    {"train"},
    {"evaluate", "report", "speed"},
    {"policy", "baseline", "rollout"},
    {"checkpoint", "plan", "act", "posterior", "plots", "video"},
    {"model", "data", "envs"},
    {"ops"},
    {"reference", "kernels", "_C"},
    {"config", "errors", "files", "intervals", "results", "_version"},
]
# Neighbours on a floor that do not know each other. data may use envs: it makes episodes with them.
STRANGERS = {
    ("model", "data"),
    ("model", "envs"),
    ("data", "model"),
    ("envs", "model"),
    ("envs", "data"),
    ("envs", "ops"),
    ("envs", "reference"),
    ("data", "ops"),
    ("kernels", "reference"),
    ("kernels", "_C"),
    ("kernels", "config"),
    ("reference", "kernels"),
    ("reference", "_C"),
}
HEAVY = ["gymnasium", "gymnasium_robotics", "mujoco", "minari", "tyro", "matplotlib", "tensorboard", "h5py", "imageio"]


def floor(part: str) -> int:
    found = [i for i, parts in enumerate(FLOORS) if part in parts]
    assert found, f"gac_fast.{part} has no floor: give it one in FLOORS, as the design's import order asks"
    return found[0]


def source_files() -> list[tuple[str, Path]]:
    """Every module of the package as (dotted name below gac_fast, file), kernels under their installed name."""
    named = [(path.relative_to(PACKAGE).with_suffix("").parts, path) for path in sorted(PACKAGE.rglob("*.py"))]
    named += [(("kernels", path.stem), path) for path in sorted((ROOT / "kernels").glob("*.py"))]
    return [(".".join(part for part in parts if part != "__init__"), path) for parts, path in named]


def imports_of(path: Path, name: str) -> Iterator[tuple[str, int]]:
    """Parts of gac_fast that a file imports, with the line; inside functions too, but not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    here = ["gac_fast", *name.split(".")] if name else ["gac_fast"]
    if path.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            modules = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "gac_fast":
                yield (parts[1] if len(parts) > 1 else ""), node.lineno


def violations(name: str, imported: list[tuple[str, int]]) -> list[str]:
    part = name.split(".")[0]
    found = []
    for other, line in imported:
        if other in ("", "__version__"):
            found.append(f"line {line} imports gac_fast itself, which stands above {name}")
        elif other != part and floor(other) < floor(part):
            found.append(f"line {line}: {part} imports {other}, which stands above it")
        elif (part, other) in STRANGERS:
            found.append(f"line {line}: {part} must not know {other}")
    return found


@pytest.mark.parametrize(("name", "path"), [pytest.param(*file, id=file[0] or "gac_fast") for file in source_files()])
def test_imports_run_one_way(name, path):
    imported = list(imports_of(path, name))
    if name:
        assert not violations(name, imported)
    for other, _ in imported:
        if other and name == "":
            assert other.startswith("__") or (PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists()


def test_the_rule_sees_every_form_of_import(tmp_path):
    path = tmp_path / "decoder.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from gac_fast.train import never\n"
        "def f():\n"
        "    import gac_fast.cli\n"
        "    from gac_fast import policy\n"
        "    from ..evaluate import evaluate\n"
        "    importlib.import_module('gac_fast.data')\n"
        "from gac_fast.ops import window_attention\n"
        "from . import prior\n"
    )
    imported = list(imports_of(path, "model.decoder"))
    assert [part for part, _ in imported] == ["ops", "model", "cli", "policy", "evaluate", "data"]
    assert len(violations("model.decoder", imported)) == 4


def test_kernels_know_nothing_of_the_package():
    for name, path in source_files():
        if name.startswith("kernels"):
            assert {part for part, _ in imports_of(path, name)} <= {"kernels"}, name


@pytest.mark.parametrize("module", ["gac_fast", "gac_fast.ops", "gac_fast.model", "gac_fast.policy"])
def test_import_loads_nothing_heavy(module):
    code = (
        f"import sys, {module}; "
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]; sys.exit(', '.join(loaded) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"import {module} loads {result.stderr}"


def unpickling_calls(path: Path) -> Iterator[str]:
    """Calls and imports by which a file could load a pickle."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules.append(node.module or "")
            for module in modules:
                if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"):
                    yield f"line {node.lineno}: imports {module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and keywords.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if keywords.get("allow_pickle", "False") != "False":
                yield f"line {node.lineno}: {called} with allow_pickle"


def test_nothing_is_ever_unpickled():
    folders = ("gac_fast", "kernels", "tests", "benchmarks")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 20
    found = {str(path.relative_to(ROOT)): calls for path in paths if (calls := list(unpickling_calls(path)))}
    assert not found


def test_the_pickle_rule_can_fail(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import pickle\ntorch.load(f)\nnp.load(f, allow_pickle=True)\ntorch.load(f, weights_only=True)\n")
    assert len(list(unpickling_calls(path))) == 3
