"""Checkpoints: named tensors and a JSON state in one folder, whole or absent, checked to the last byte.

A checkpoint is a folder, by custom `<run>/checkpoints/step_00001000/`, that holds

- `tensors.safetensors`: every tensor;
- `state.json`: `format_version`, the manifest of the tensors (dtype, shape, SHA-256 of the bytes), the caller's state.

`state.json` starts with its own SHA-256, taken with the digest's characters as zeros; the manifest covers every byte of
the tensor file. The folder is written under a temporary name, synced and renamed, so a crash leaves the checkpoints
before it as they were. Nothing is pickled. This file knows no model: `flatten` and `unflatten` turn nested state (of an
optimiser, say) into what `save` takes and back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gac_fast.errors import CheckpointError, ConfigError
from gac_fast.files import sync

__all__ = [
    "FORMAT_VERSION",
    "checkpoint_path",
    "flatten",
    "latest",
    "list_checkpoints",
    "load",
    "load_state",
    "prune",
    "save",
    "unflatten",
]

FORMAT_VERSION = 1

_TENSORS = "tensors.safetensors"
_STATE = "state.json"

# Every format version begins its state.json like this, so that an older reader can tell damage from a newer version.
_DIGEST_START = b'{"sha256": "'
_NO_DIGEST = b"0" * 64

_SAVING, _REPLACED, _REMOVED = ".saving", ".replaced", ".removed"

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def checkpoint_path(run_dir: str | os.PathLike[str], step: int) -> Path:
    """The folder of the checkpoint of `step` in a run: `<run_dir>/checkpoints/step_00001000`."""
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints of a run, oldest step first; empty if there is none. Leftovers of a crash are not listed."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    names = {_visible_name(entry.name) for entry in folder.iterdir() if entry.is_dir()}
    return [folder / name for name in sorted((n for n in names if _step(n) is not None), key=lambda n: _step(n) or 0)]


def latest(run_dir: str | os.PathLike[str]) -> Path:
    """The checkpoint of the highest step of a run.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    found = list_checkpoints(run_dir)
    if not found:
        raise CheckpointError(f"{Path(run_dir)} holds no checkpoint: expected a folder checkpoints/step_<number> in it")
    return found[-1]


def prune(run_dir: str | os.PathLike[str], keep_last: int = 3, keep: Collection[int] = ()) -> list[Path]:
    """Remove all checkpoints of a run but the `keep_last` newest and those of the steps in `keep`.

    Returns the folders removed, oldest first.
    """
    if keep_last < 1:
        raise ConfigError(f"keep_last must be at least 1, so that a run can be resumed, got {keep_last}")
    removed = [path for path in list_checkpoints(run_dir)[:-keep_last] if _step(path.name) not in keep]
    for path in removed:
        # Renamed first: half of a removed checkpoint must not look like a damaged one.
        hidden = _hidden(path, _REMOVED)
        os.rename(_find(path), hidden)
        shutil.rmtree(hidden)
    return removed


def _step(name: str) -> int | None:
    match = re.fullmatch(r"step_(\d+)", name)
    return int(match[1]) if match else None


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _visible_name(name: str) -> str:
    """The checkpoint's name, also where a crash between two renames left it under its `.replaced` name."""
    return name[1 : -len(_REPLACED)] if name.startswith(".") and name.endswith(_REPLACED) else name


def _find(path: Path) -> Path:
    replaced = _hidden(path, _REPLACED)
    return replaced if not path.exists() and replaced.is_dir() else path


def _clean(parent: Path) -> None:
    """Finish or undo what a crash interrupted in a folder of checkpoints."""
    for entry in sorted(parent.glob(".*")):
        if entry.name.endswith(_REPLACED) and not (parent / _visible_name(entry.name)).exists():
            os.rename(entry, parent / _visible_name(entry.name))
        elif entry.name.endswith((_SAVING, _REPLACED, _REMOVED)):
            shutil.rmtree(entry)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | np.ndarray[Any, Any]],
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint folder, replacing one of the same name, so that it is whole or absent at every moment.

    Args:
        path: the folder to make; its parents are made too.
        tensors: tensors or arrays by name, of any shape, device and strides; float64, float32, bfloat16, float16, bool,
            or integers of 8 to 64 bits.
        state: what JSON can hold exactly: dicts with string keys, lists, strings, ints, finite floats, bools, None.
            Tuples come back as lists, NumPy scalars as Python's.

    Raises:
        CheckpointError: a value that cannot be kept exactly, named; or the disk is full or refuses, in which case
            nothing half-written stays and the checkpoints already there are as they were.
    """
    path = Path(path)
    plain = _plain(state, "state")
    dense = _dense(tensors)
    temporary = _hidden(path, _SAVING)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent)
        temporary.mkdir()
        try:
            save_file(dense, temporary / _TENSORS)
            sync(temporary / _TENSORS)
            (temporary / _STATE).write_bytes(_document(temporary / _TENSORS, dense, plain))
            sync(temporary / _STATE)
            # safetensors makes its file readable by the owner alone, whatever the umask.
            shutil.copymode(temporary / _STATE, temporary / _TENSORS)
            sync(temporary)
            _put_in_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in dense.values())
        raise CheckpointError(
            f"cannot write checkpoint {path}: {getattr(error, 'strerror', None) or error}; its tensors need {needed:,} "
            f"bytes, {_free(path)} are free on that disk; the checkpoints already there are untouched"
        ) from error


def _put_in_place(temporary: Path, path: Path) -> None:
    replaced = _hidden(path, _REPLACED)
    if path.is_dir():
        os.rename(path, replaced)
    try:
        os.rename(temporary, path)
    except OSError:
        if replaced.exists():
            os.rename(replaced, path)
        raise
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _free(path: Path) -> str:
    for folder in path.parents:
        try:
            return f"{shutil.disk_usage(folder).free:,}"
        except OSError:
            continue
    return "unknown"


def _dense(tensors: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with a storage of its own, as safetensors asks."""
    dense: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"tensor names are strings, got {name!r}")
        if isinstance(value, np.ndarray | np.generic):
            value = _as_tensor(name, np.asarray(value))
        if not isinstance(value, Tensor):
            raise CheckpointError(f"tensor {name!r}: expected a tensor or an array, got {type(value).__name__}")
        if value.dtype not in _CODES or value.layout != torch.strided or value.is_meta:
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise CheckpointError(f"tensor {name!r}: a checkpoint cannot hold one of {kind}")
        value = value.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        # contiguous() lets any stride pass along sizes 0 and 1, but a view as bytes does not.
        regular = value.stride() == torch.empty(value.shape, device="meta").stride()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes or not regular:
            value = value.clone(memory_format=torch.contiguous_format)
        storages.add(value.untyped_storage().data_ptr())
        dense[name] = value
    return dense


def _as_tensor(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise CheckpointError(f"tensor {name!r}: a checkpoint cannot hold an array of {array.dtype}") from None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _document(tensor_file: Path, tensors: Mapping[str, Tensor], state: Any) -> bytes:
    """The bytes of state.json for the tensor file written."""
    with tensor_file.open("rb") as file:
        header, _ = _read_header(file, tensor_file)
    body = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "header_sha256": hashlib.sha256(header).hexdigest(),
            "tensors": {
                name: {
                    "dtype": _CODES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "sha256": hashlib.sha256(_bytes(tensor)).hexdigest(),
                }
                for name, tensor in tensors.items()
            },
            "state": state,
        },
        indent=1,
        allow_nan=False,
    ).encode("ascii")
    start, end = _DIGEST_START, b'",' + body[1:] + b"\n"
    digest = hashlib.sha256(start + _NO_DIGEST + end).hexdigest().encode("ascii")
    return start + digest + end


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = float(value) if isinstance(value, np.floating) else value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where} is {value}: the state of a checkpoint holds finite numbers only")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}: keys must be strings (see checkpoint.flatten)")
        return {key: _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    hint = "; tensors and arrays go to the tensors" if isinstance(value, Tensor | np.ndarray) else ""
    raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON cannot hold{hint}")


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint folder back, every byte checked: (tensors on the CPU by name, state).

    Raises:
        CheckpointError: the folder or a file is missing, cut, damaged or of a newer format; the message names the file
            and, where one is to blame, the tensor.
    """
    path = _find(Path(path))
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: expected a folder with {_STATE} and {_TENSORS}")
    document = _read_document(path / _STATE)
    return _read_tensors(path / _TENSORS, document), document["state"]


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a checkpoint folder alone, without its tensors.

    Raises:
        CheckpointError: as :func:`load`.
    """
    state: dict[str, Any] = _read_document(_find(Path(path)) / _STATE)["state"]
    return state


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _read_document(path: Path) -> dict[str, Any]:
    with _open(path) as file:
        content = file.read()
    n = len(_DIGEST_START)
    rest = content[n + 64 :]
    intact = content[:n] == _DIGEST_START and (
        hashlib.sha256(_DIGEST_START + _NO_DIGEST + rest).hexdigest().encode("ascii") == content[n : n + 64]
    )
    try:
        document = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or cut: it is not valid JSON ({error})") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        damage = "" if intact else ", unless the file is damaged: its sha256 does not match"
        raise CheckpointError(
            f"{path} has format_version {version}, newer than the {FORMAT_VERSION} that this gac_fast reads: "
            f"update gac_fast{damage}"
        )
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not match its sha256")
    assert isinstance(document, dict)
    return document


def _read_header(file: BufferedReader, path: Path) -> tuple[bytes, dict[str, Any]]:
    """The first bytes of a safetensors file, length word included, and the entries by name; the file stands behind."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise CheckpointError(f"{path} is damaged or cut: it has {size:,} bytes, too few for the header it announces")
    header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for entry in entries.values():
            begin, end = entry["data_offsets"]
            _ = int(begin), int(end), str(entry["dtype"]), list(entry["shape"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its header is no list of tensors ({error!r})") from error
    return start + header, entries


def _read_tensors(path: Path, document: dict[str, Any]) -> dict[str, Tensor]:
    manifest = document["tensors"]
    with _open(path) as file:
        header, entries = _read_header(file, path)
        for name in manifest.keys() - entries.keys():
            raise CheckpointError(f"tensor {name!r} is missing in {path}, but {_STATE} lists it")
        for name in entries.keys() - manifest.keys():
            raise CheckpointError(f"{path} holds a tensor {name!r} that {_STATE} does not list")
        for name, entry in manifest.items():
            expected, found = (entry["dtype"], entry["shape"]), (entries[name]["dtype"], entries[name]["shape"])
            if expected != found:
                raise CheckpointError(f"tensor {name!r} in {path}: expected {_kind(*expected)}, found {_kind(*found)}")
        if hashlib.sha256(header).hexdigest() != document["header_sha256"]:
            raise CheckpointError(f"{path} is damaged: its header does not match the sha256 in {_STATE}")

        size = os.fstat(file.fileno()).st_size
        expected_size = len(header) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size != expected_size:
            raise CheckpointError(f"{path} is cut or damaged: expected {expected_size:,} bytes, found {size:,}")

        tensors = {}
        for name, entry in manifest.items():
            # Allocated by torch, not viewed in a buffer: alignment decides how some CPU kernels sum, and a resumed run
            # must repeat the uninterrupted one to the bit.
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            view = _bytes(tensor)
            file.seek(len(header) + entries[name]["data_offsets"][0])
            if file.readinto(view) != len(view) or hashlib.sha256(view).hexdigest() != entry["sha256"]:
                raise CheckpointError(f"tensor {name!r} in {path} is damaged: its bytes do not match its sha256")
            tensors[name] = tensor
    return tensors


def _kind(dtype: str, shape: list[int]) -> str:
    return f"{dtype} {shape}"


def flatten(prefix: str, nested: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested state into tensors for `save` and a JSON part, so that `unflatten` restores it exactly.

    Takes what `state_dict()` of modules, optimisers and schedulers and `torch.get_rng_state()` give: tensors and arrays
    inside dicts (of any scalar keys, ints too), lists and tuples, beside None, bools, ints, strings and floats, NaN and
    infinity included. Tensors come back on the CPU without `requires_grad`, arrays as arrays.

    Args:
        prefix: start of the tensors' names, unique within one checkpoint.
        nested: the state.

    Returns:
        (tensors by name `<prefix>.<path>`, JSON part for the state of the checkpoint)
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _split(nested, prefix, tensors)


def unflatten(tensors: Mapping[str, Tensor], json_part: Any) -> Any:
    """The nested state that `flatten` split; `tensors` may hold more than it needs.

    Raises:
        CheckpointError: a tensor that `json_part` names is not in `tensors`.
    """
    if isinstance(json_part, list):
        return [unflatten(tensors, entry) for entry in json_part]
    if not isinstance(json_part, dict):
        return json_part
    match json_part.get("$"):
        case None:
            return {key: unflatten(tensors, entry) for key, entry in json_part.items()}
        case "tensor" | "array" as kind:
            name = json_part["name"]
            if name not in tensors:
                raise CheckpointError(f"tensor {name!r} is missing in the checkpoint")
            return tensors[name] if kind == "tensor" else tensors[name].numpy()
        case "tuple":
            return tuple(unflatten(tensors, entry) for entry in json_part["items"])
        case "dict":
            return {unflatten(tensors, key): unflatten(tensors, entry) for key, entry in json_part["items"]}
        case "float":
            return float(json_part["value"])
        case other:
            raise CheckpointError(f"the checkpoint holds nested state of an unknown kind {other!r}")


def _split(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        name = where
        while name in tensors:  # the keys 1 and "1" of one dict
            name += "'"
        tensors[name] = value if isinstance(value, Tensor) else _as_tensor(name, value)
        return {"$": "tensor" if isinstance(value, Tensor) else "array", "name": name}
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        return {"$": "float", "value": str(float(value))}
    if isinstance(value, tuple):
        return {"$": "tuple", "items": [_split(entry, f"{where}.{i}", tensors) for i, entry in enumerate(value)]}
    if isinstance(value, list):
        return [_split(entry, f"{where}.{i}", tensors) for i, entry in enumerate(value)]
    if isinstance(value, Mapping):
        entries = [(key, _split(entry, f"{where}.{key}", tensors)) for key, entry in value.items()]
        if "$" not in value and all(isinstance(key, str) for key in value):
            return dict(entries)
        return {"$": "dict", "items": [[_split(key, where, tensors), entry] for key, entry in entries]}
    return _plain(value, where)
