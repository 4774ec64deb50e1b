"""Checkpoints come back exactly or not at all: round trips, every kind of damage, full disks, crashes."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gac_fast import checkpoint
from gac_fast.errors import CheckpointError, ConfigError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.weight": torch.randn(5, 3, generator=generator),
        "model.bias": torch.randn(3, generator=generator),
        "empty": torch.zeros(0, 4),
        "step": torch.tensor(7),
    }


STATE = {"step": 1000, "config": {"name": "umaze", "rates": [1e-4, 0.25]}, "done": False, "note": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = checkpoint.checkpoint_path(tmp_path, 1000)
    checkpoint.save(path, some_tensors(), STATE)
    return path


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        # Bytes, so that NaN payloads and the sign of zero count.
        assert (
            found[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
        ), name


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip(saved: Path) -> None:
    tensors, state = checkpoint.load(saved)
    assert_same(tensors, some_tensors())
    assert state == STATE
    assert len({file.stat().st_mode for file in saved.iterdir()}) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7, 3)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.arange(math.prod(shape) * 8, dtype=torch.int64) * 37 % 251
    tensor = (raw % 2).bool() if dtype == torch.bool else raw.to(torch.uint8).view(dtype)
    tensor = tensor[: math.prod(shape)].reshape(shape)
    checkpoint.save(tmp_path / "c", {"odd": torch.ones(3, dtype=torch.uint8), "x": tensor}, {})
    tensors, _ = checkpoint.load(tmp_path / "c")
    assert_same(tensors, {"odd": torch.ones(3, dtype=torch.uint8), "x": tensor})


def test_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    given = {
        "base": base,
        "again": base,
        "transposed": base.T,
        "row": base[1],
        "strided": base[:, ::2],
        "expanded": torch.ones(1).expand(1000),
        "one_of_many": torch.ones(9)[::9],
        "none_of_many": torch.ones(9)[9:].as_strided((0,), (0,)),
        "parameter": torch.nn.Parameter(base),
        "conjugate": torch.view_as_real(torch.complex(base, base).conj().resolve_conj())[..., 1],
    }
    checkpoint.save(tmp_path / "c", given, {})
    tensors, _ = checkpoint.load(tmp_path / "c")
    assert_same(tensors, {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in given.items()})
    # One row of a big tensor must not drag the tensor along.
    assert (tmp_path / "c" / "tensors.safetensors").stat().st_size < 10_000


def test_arrays(tmp_path: Path) -> None:
    arrays = {
        "floats": np.linspace(0, 1, 5),
        "reversed": np.arange(4)[::-1],
        "big_endian": np.arange(4, dtype=">i4"),
        "read_only": np.frombuffer(b"abc", dtype=np.uint8),
        "scalar": np.float32(1.5),
    }
    checkpoint.save(tmp_path / "c", arrays, {})
    tensors, _ = checkpoint.load(tmp_path / "c")
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
    assert tensors["big_endian"].dtype == torch.int32


def test_the_tensor_file_is_plain_safetensors(saved: Path) -> None:
    tensors = load_file(saved / "tensors.safetensors")
    assert_same(dict(sorted(tensors.items())), dict(sorted(some_tensors().items())))


def test_loaded_tensors_own_their_memory(saved: Path) -> None:
    tensors, _ = checkpoint.load(saved)
    shutil.rmtree(saved)
    tensors["model.weight"].add_(1)
    assert torch.equal(tensors["model.weight"], some_tensors()["model.weight"] + 1)
    assert tensors["model.weight"].data_ptr() % 64 == 0


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**130), 2**130)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(state=st.dictionaries(st.text(), json_values, max_size=4))
@settings(max_examples=60, deadline=None)
def test_state_round_trips_exactly(tmp_path_factory: pytest.TempPathFactory, state: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "state" / "c"
    checkpoint.save(path, {}, state)
    _, found = checkpoint.load(path)
    assert repr(found) == repr(state)


def test_numpy_scalars_and_tuples_become_plain(tmp_path: Path) -> None:
    state = {"f": np.float32(0.1), "i": np.int64(3), "b": np.bool_(True), "t": (1, 2), "s": np.str_("x")}
    checkpoint.save(tmp_path / "c", {}, state)
    _, found = checkpoint.load(tmp_path / "c")
    assert repr(found) == repr({"f": float(np.float32(0.1)), "i": 3, "b": True, "t": [1, 2], "s": "x"})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"train": {"loss": [0.0, math.nan]}}, r"state\.train\.loss\[1\] is nan"),
        ({"best": -math.inf}, r"state\.best is -inf"),
        ({"best": np.float32("inf")}, r"state\.best is inf"),
        ({"a": {3: 1}}, r"state\.a has the key 3: keys must be strings"),
        ({"a": torch.ones(2)}, r"state\.a is a Tensor, which JSON cannot hold; tensors and arrays go to the tensors"),
        ({"a": np.ones(2)}, r"state\.a is a ndarray"),
        ({"a": {1, 2}}, r"state\.a is a set"),
        ({"a": Path("x")}, r"state\.a is a \w*Path"),
        ({"a": 1j}, r"state\.a is a complex"),
    ],
)
def test_state_that_json_cannot_hold(tmp_path: Path, state: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "c", {}, state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"z": torch.ones(2, dtype=torch.complex64)}, "tensor 'z': a checkpoint cannot hold one of torch.complex64"),
        ({"z": torch.ones(2, device="meta")}, "tensor 'z': .* on meta"),
        ({"z": torch.eye(2).to_sparse()}, "tensor 'z': .* torch.sparse_coo"),
        ({"z": np.array(["a"])}, "tensor 'z': a checkpoint cannot hold an array of <U1"),
        ({"z": [1.0]}, "tensor 'z': expected a tensor or an array, got list"),
        ({3: torch.ones(2)}, "tensor names are strings, got 3"),
    ],
)
def test_tensors_that_cannot_be_held(tmp_path: Path, tensors: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "c", tensors, {})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def flip(path: Path, position: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def test_every_byte_of_both_files_is_covered(tmp_path: Path) -> None:
    saved = tmp_path / "c"
    checkpoint.save(saved, {"a": torch.ones(3), "b": torch.zeros(0)}, {"step": 1000})
    for name in ("state.json", "tensors.safetensors"):
        file = saved / name
        content = file.read_bytes()
        for position in range(len(content)):
            flip(file, position, bit=1 << position % 8)
            with pytest.raises(CheckpointError) as caught:
                checkpoint.load(saved)
            assert name in str(caught.value), f"byte {position}: {caught.value}"
            file.write_bytes(content)
    checkpoint.load(saved)


def test_damage_names_the_tensor(saved: Path) -> None:
    file = saved / "tensors.safetensors"
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    for name in ("model.weight", "model.bias", "step"):
        content = file.read_bytes()
        flip(file, 8 + length + header[name]["data_offsets"][1] - 1, bit=0x80)
        with pytest.raises(CheckpointError, match=rf"tensor '{name}' in .*tensors\.safetensors is damaged"):
            checkpoint.load(saved)
        file.write_bytes(content)


def test_damage_in_header_and_state(saved: Path) -> None:
    state = saved / "state.json"
    intact = state.read_bytes()
    state.write_bytes(intact.replace(b"umaze", b"umazf"))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: its content does not match its sha256"):
        checkpoint.load(saved)
    state.write_bytes(b"\x00" + intact[1:])
    with pytest.raises(CheckpointError, match=r"state\.json is damaged or cut: it is not valid JSON"):
        checkpoint.load(saved)
    state.write_bytes(intact)

    file = saved / "tensors.safetensors"
    position = file.read_bytes().index(b'"dtype"')
    flip(file, position + 1)
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is damaged: its header is no list of tensors"):
        checkpoint.load(saved)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_truncated_file(saved: Path, name: str, keep: int) -> None:
    file = saved / name
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{name} is (damaged or cut|cut or damaged|damaged)"):
        checkpoint.load(saved)


def test_appended_bytes(saved: Path) -> None:
    with (saved / "tensors.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"expected [\d,]+ bytes, found [\d,]+"):
        checkpoint.load(saved)


def test_missing_renamed_and_reshaped_tensor(saved: Path) -> None:
    tensors = some_tensors()
    file = saved / "tensors.safetensors"
    save_file({name: t for name, t in tensors.items() if name != "model.bias"}, file)
    with pytest.raises(CheckpointError, match=r"tensor 'model\.bias' is missing in .*tensors\.safetensors"):
        checkpoint.load(saved)
    save_file({**tensors, "other": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"holds a tensor 'other' that state\.json does not list"):
        checkpoint.load(saved)
    save_file({**tensors, "model.weight": torch.zeros(3, 5)}, file)
    with pytest.raises(CheckpointError, match=r"'model\.weight' .* expected F32 \[5, 3\], found F32 \[3, 5\]"):
        checkpoint.load(saved)
    save_file({**tensors, "model.weight": torch.zeros(5, 3, dtype=torch.int32)}, file)
    with pytest.raises(CheckpointError, match=r"'model\.weight' .* expected F32 \[5, 3\], found I32 \[5, 3\]"):
        checkpoint.load(saved)


def test_tensors_of_another_checkpoint(saved: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "other", {n: t + 1 if n == "step" else t for n, t in some_tensors().items()}, STATE)
    shutil.copy(tmp_path / "other" / "tensors.safetensors", saved)
    with pytest.raises(CheckpointError, match=r"tensor 'step' .* is damaged"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing: the checkpoint is incomplete"):
        checkpoint.load(saved)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint: expected a folder checkpoints/step_<number>"):
        checkpoint.latest(tmp_path)
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_newer_format(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    checkpoint.save(saved, some_tensors(), STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format_version 2, newer than the 1 that .* update gac_fast$"):
        checkpoint.load(saved)
    # The same by hand, without the digest that a newer gac_fast would write.
    document = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**document, "format_version": 3}))
    with pytest.raises(CheckpointError, match=r"format_version 3, newer .* unless the file is damaged"):
        checkpoint.load(saved)


def test_saving_again_replaces(saved: Path) -> None:
    checkpoint.save(saved, {"only": torch.ones(1)}, {"step": 1})
    tensors, state = checkpoint.load(saved)
    assert list(tensors) == ["only"]
    assert state == {"step": 1}
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_list_latest_prune(tmp_path: Path) -> None:
    for step in (5, 100, 20, 123456789):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, step), {}, {"step": step})
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "step_x").mkdir()
    names = ["step_00000005", "step_00000020", "step_00000100", "step_123456789"]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == names
    assert checkpoint.latest(tmp_path).name == names[-1]
    with pytest.raises(ConfigError, match=r"keep_last must be at least 1.* got 0"):
        checkpoint.prune(tmp_path, keep_last=0)
    assert [p.name for p in checkpoint.prune(tmp_path, keep_last=2, keep=[5])] == [names[1]]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [names[0], *names[2:]]
    assert checkpoint.prune(tmp_path, keep_last=9) == []
    assert (tmp_path / "checkpoints" / "notes").is_dir()


def test_full_disk(saved: Path) -> None:
    """The kernel refuses to write more than 64 KiB to a file, in a process of its own."""
    before = tree(saved.parent)
    script = """
import resource, sys, torch
from gac_fast import checkpoint
from gac_fast.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for path in sys.argv[1:]:
    try:
        checkpoint.save(path, {"big": torch.zeros(1 << 20)}, {})
    except CheckpointError as error:
        print(error)
"""
    new = checkpoint.checkpoint_path(saved.parents[1], 2000)
    done = subprocess.run(
        [sys.executable, "-c", script, str(new), str(saved)], capture_output=True, text=True, check=True
    )
    for path, line in zip((new, saved), done.stdout.splitlines(), strict=True):
        assert f"cannot write checkpoint {path}: " in line
        assert "File too large" in line
        assert "need 4,194,304 bytes" in line
        assert "already there are untouched" in line
    assert tree(saved.parent) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    checkpoint.load(saved)


@pytest.mark.parametrize("call", ["save_file", "sync", "_put_in_place"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_failure_leaves_what_was(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    before = tree(saved.parent)
    monkeypatch.setattr(checkpoint, call, fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt), match=r"No space left on device; .*free on that disk|^$"):
        checkpoint.save(saved, {"x": torch.ones(3)}, {})
    monkeypatch.undo()
    assert tree(saved.parent) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_failed_rename_puts_the_old_one_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def fail_to_place(source: Path, target: Path) -> None:
        if source.name.endswith(".saving"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    before = tree(saved.parent)
    monkeypatch.setattr(os, "rename", fail_to_place)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.save(saved, {"x": torch.ones(3)}, {})
    assert tree(saved.parent) == before


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot write checkpoint .*c: (File exists|Not a directory); its tensors need 12 bytes"
    ):
        checkpoint.save(tmp_path / "file" / "c", {"x": torch.ones(3)}, {})
    with pytest.raises(CheckpointError, match=f"cannot write checkpoint {tmp_path / 'file'}: "):
        checkpoint.save(tmp_path / "file", {"x": torch.ones(3)}, {})
    assert (tmp_path / "file").read_text() == ""


def test_killed_while_saving(tmp_path: Path) -> None:
    """kill -9 at every stage of a save leaves the newest whole checkpoint in place, and the next save tidies up."""
    # One process that forks: importing torch seven times would take longer than the test.
    script = """
import os, signal, sys, torch
from gac_fast import checkpoint
real = {"sync": checkpoint.sync, "rename": os.rename}
def die(name, at):
    count = 0
    def call(*arguments):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*arguments)
    return call
for i, case in enumerate(sys.argv[2:]):
    name, at, step = case.split(":")
    run = os.path.join(sys.argv[1], str(i))
    checkpoint.save(checkpoint.checkpoint_path(run, 1), {"x": torch.full((9,), 1.0)}, {"saved": 1})
    child = os.fork()
    if not child:
        setattr(checkpoint if name == "sync" else os, name, die(name, int(at)))
        checkpoint.save(checkpoint.checkpoint_path(run, int(step)), {"x": torch.full((9,), 2.0)}, {"saved": 2})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, case
"""
    # (call that kills, which one, step saved; value that must be found): a new step, then the same step again, killed
    # before, between and after the two renames that replace it.
    cases = [
        ("sync:1:2", 1),
        ("sync:3:2", 1),
        ("rename:1:2", 1),
        ("sync:4:2", 2),
        ("rename:1:1", 1),
        ("rename:2:1", 1),
        ("sync:4:1", 2),
    ]
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *(case for case, _ in cases)], check=True)
    for i, (stage, expected) in enumerate(cases):
        run = tmp_path / str(i)
        tensors, state = checkpoint.load(checkpoint.latest(run))
        assert state == {"saved": expected}, stage
        assert torch.equal(tensors["x"], torch.full((9,), float(expected))), stage
        kept = checkpoint.list_checkpoints(run)
        checkpoint.save(checkpoint.checkpoint_path(run, 3), {}, {"saved": 3})
        assert sorted((run / "checkpoints").iterdir()) == [*kept, checkpoint.checkpoint_path(run, 3)], stage
        assert checkpoint.load(kept[-1])[1] == {"saved": expected}, stage


def test_optimiser_state_survives() -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        groups = [{"params": list(module[0].parameters())}, {"params": list(module[1].parameters()), "lr": 0.1}]
        optimiser = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
        return module, optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 20)

    def train(parts: tuple, updates: int) -> None:
        module, optimiser, schedule = parts
        for _ in range(updates):
            optimiser.zero_grad()
            module(torch.randn(8, 4)).square().mean().backward()
            optimiser.step()
            schedule.step()

    whole = build()
    train(whole, 4)
    nested = {"parts": [part.state_dict() for part in whole], "rng": torch.get_rng_state(), "best": math.inf}
    tensors, part = checkpoint.flatten("training", nested)
    assert "training.parts.1.state.0.exp_avg" in tensors
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    part = json.loads(json.dumps(part, allow_nan=False))
    train(whole, 4)

    resumed = build()
    found = checkpoint.unflatten(tensors, part)
    assert found["best"] == math.inf
    assert list(found["parts"][1]["state"]) == [0, 1, 2, 3]
    assert found["parts"][1]["param_groups"][0]["betas"] == (0.9, 0.95)
    for target, state in zip(resumed, found["parts"], strict=True):
        target.load_state_dict(state)
    torch.set_rng_state(found["rng"])
    train(resumed, 4)
    for expected, got in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(expected, got)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
leaves = scalars | st.integers(0, 5).map(lambda n: torch.arange(n)) | st.integers(0, 5).map(lambda n: np.arange(n) / 3)
nested_values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.sampled_from(["$", "name", "0", "a.b", "'"]) | st.integers(-1, 2) | st.booleans() | st.none(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


def assert_equal_nested(found: object, expected: object) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert repr(list(found)) == repr(list(expected))
        for key in expected:
            assert_equal_nested(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal_nested(a, b)
    elif isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, strict=True)
    else:
        assert repr(found) == repr(expected)


@given(nested=nested_values)
@settings(max_examples=100, deadline=None)
def test_flatten_round_trips_any_nesting(tmp_path_factory: pytest.TempPathFactory, nested: object) -> None:
    tensors, part = checkpoint.flatten("part", nested)
    path = tmp_path_factory.getbasetemp() / "nested" / "c"
    checkpoint.save(path, {**tensors, "unrelated": torch.ones(1)}, {"part": part})
    loaded, state = checkpoint.load(path)
    assert_equal_nested(checkpoint.unflatten(loaded, state["part"]), nested)


def test_flatten_refuses_and_unflatten_names_what_is_missing() -> None:
    with pytest.raises(CheckpointError, match=r"optimiser\.hook is a function"):
        checkpoint.flatten("optimiser", {"hook": lambda: None})
    tensors, part = checkpoint.flatten("optimiser", {"state": {0: {"exp_avg": torch.ones(2)}}})
    del tensors["optimiser.state.0.exp_avg"]
    with pytest.raises(CheckpointError, match=r"tensor 'optimiser\.state\.0\.exp_avg' is missing"):
        checkpoint.unflatten(tensors, part)
    with pytest.raises(CheckpointError, match="nested state of an unknown kind 'pickle'"):
        checkpoint.unflatten({}, {"$": "pickle"})


def test_format_1_keeps_loading() -> None:
    """A folder written by the first release; every later one must read it."""
    tensors, state = checkpoint.load(Path(__file__).parent / "data" / "checkpoint_format_1")
    assert state == {"step": 3, "config": {"name": "fixture", "rate": 0.1}, "optimiser": {"lr": 0.25}}
    assert_same(
        tensors,
        {
            "weight": torch.tensor([[1.0, -0.5], [0.25, 3.0]]),
            "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "chain": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
            "rng": torch.tensor([0, 127, 255], dtype=torch.uint8),
            "seen": torch.tensor([True, False]),
            "online": torch.zeros(0, 4),
            "step": torch.tensor(3),
        },
    )


def test_no_pickle_is_loaded() -> None:
    source = Path(checkpoint.__file__).read_text()
    for word in ("torch.load", "import pickle", "allow_pickle", "torch.save"):
        assert word not in source
