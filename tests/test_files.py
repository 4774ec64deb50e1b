"""Files are replaced whole or not at all."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from pathlib import Path

import numpy as np
import pytest

from gac_fast.files import replacing, write_json


def test_replacing_writes_and_tidies(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "file.txt"
    for content in ("one", "two"):
        with replacing(target) as temporary:
            assert temporary.suffix == ".txt"
            assert temporary.parent == target.parent
            temporary.write_text(content)
        assert target.read_text() == content
    assert list(target.parent.iterdir()) == [target]


def test_replacing_keeps_the_old_file_on_an_error(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Inner:
    colour: Colour
    rates: tuple[float, ...]


def test_write_json(tmp_path: Path) -> None:
    obj = {
        "config": Inner(Colour.RED, (0.1, 2.0)),
        "path": Path("a/b"),
        "array": np.arange(3),
        "scalar": np.float32(0.5),
        "none": None,
        "nan": math.nan,
        "arrays": [np.array([1.0, np.inf])],
    }
    write_json(tmp_path / "x.json", obj)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "config": {"colour": "red", "rates": [0.1, 2.0]},
        "path": "a/b",
        "array": [0, 1, 2],
        "scalar": 0.5,
        "none": None,
        "nan": None,
        "arrays": [[1.0, None]],
    }


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"a": [{1, 2}]}, r"x\.json\.a\[0\]: JSON cannot hold a set"),
        ({"a": {3: 1}}, r"x\.json\.a: JSON keys are strings, but one is 3"),
    ],
)
def test_write_json_names_what_it_cannot_hold(tmp_path: Path, obj: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        write_json(tmp_path / "x.json", obj)
    assert not list(tmp_path.iterdir())
