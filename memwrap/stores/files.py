"""Files of stores: arrays with a checksum, written whole or not at all, read or mapped."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from memwrap.io.atomic_files import SCRATCH, replacing, write_text
from memwrap.io.reading import inside, parse_json
from memwrap.io.reading import read_json as read_any_json
from memwrap.io.whole_folders import SAVED, rewriting
from memwrap.stores.base import METRICS

FORMAT, VERSION = "memwrap-store", 2
HEADER, LOCK = "store.json", ".lock"
FILES = ("store.json", "store.safetensors", "index.json", "index-*.faiss", "shard-*.safetensors",
         "removed.safetensors")  # fmt: skip
_MOST_HEAD = 2**26
_TYPES = {
    "F16": np.float16, "F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64,
    "BOOL": np.bool_,
}  # fmt: skip


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write arrays and a JSON-able description to one safetensors file."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {
        "format": FORMAT, "version": str(VERSION), "about": json.dumps(about),
        "crc32": str(_checksum(arrays)),
        "sums": json.dumps({name: _checksum({name: array}) for name, array in arrays.items()}),
    }  # fmt: skip
    codes = {np.dtype(kind): code for code, kind in _TYPES.items()}
    places = {n: [codes[array.dtype], list(array.shape)] for n, array in arrays.items()}
    metadata["layout"] = str(_text_checksum([metadata["about"], metadata["sums"], places]))
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of `write_arrays` and check every byte of it.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged or foreign; names it.
    """
    about, _, checksum = head_of(path)
    try:
        arrays = load(path.read_bytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if _checksum(arrays) != checksum:
        raise ValueError(f"{path} is damaged: its contents do not have their checksum.")
    return arrays, about


def about_of(path: Path) -> dict[str, Any]:
    """Return the description of a file of `write_arrays`; its length is checked, its contents are
    not.

    Raises:
        FileNotFoundError, ValueError: as `read_arrays`.
    """
    return head_of(path)[0]


def small_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Read some arrays of a file and check their bytes, without reading the others.

    Raises:
        FileNotFoundError, ValueError: as `read_arrays`.
    """
    arrays = [np.array(mapped(path, name)) for name in names]
    sums = parse_json(_metadata(path)["sums"], path)
    for name, array in zip(names, arrays, strict=True):
        if not isinstance(sums, dict) or sums.get(name) != _checksum({name: array}):
            raise ValueError(f"{path} is damaged: its {name} do not have their checksum.")
    return arrays


def mapped(path: Path, name: str) -> np.ndarray:
    """Return an array of a file, mapped from disk; its contents are not checked.

    Raises:
        ValueError: if the file has no such array; as `read_arrays`.
    """
    head, first = head_of(path)[1], _length(path)
    if name not in head:
        raise ValueError(f"{path} is damaged: it has no {name}.")
    entry = head[name]
    kind = np.dtype(_TYPES[entry["dtype"]])
    shape = tuple(entry["shape"])
    if 0 in shape:
        return np.empty(shape, kind)
    return np.memmap(path, kind, "r", 8 + first + entry["data_offsets"][0], shape)


def _metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a file whose head is right."""
    with path.open("rb") as file:
        return json.loads(file.read(8 + _length(path))[8:])["__metadata__"]


def _length(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def head_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Read the description, the arrays' types, shapes and places, and the checksum they should
    have.

    Raises:
        FileNotFoundError, ValueError: as `read_arrays`.
    """
    path = inside(path.parent, path.name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the store is not whole.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MOST_HEAD):
                raise ValueError("it ends too early")
            head = parse_json(file.read(length), "its head")
        metadata = head.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise ValueError("it is no file of a store")
        if metadata["version"] != str(VERSION):
            raise ValueError(f"it has version {metadata['version']}, this memwrap reads {VERSION}")
        places = {name: [entry["dtype"], entry["shape"]] for name, entry in head.items()}
        if metadata["layout"] != str(_text_checksum([metadata["about"], metadata["sums"], places])):
            raise ValueError("its description does not have its checksum")
        end = max((_end_of(entry) for entry in head.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
        about = parse_json(metadata["about"], "its description")
        if not isinstance(about, dict):
            raise ValueError("its description is none")
        return about, head, int(metadata["crc32"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def _end_of(entry: dict[str, Any]) -> int:
    """Find where an array ends; it must have the bytes that its shape needs."""
    kind, shape, (first, end) = _TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, first, end)):
        raise ValueError("a shape or place is no number")
    if end - first != math.prod(shape) * np.dtype(kind).itemsize:
        raise ValueError("an array has not the bytes of its shape")
    return end


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    total = 0
    for name in sorted(arrays):
        if arrays[name].size:
            total = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, total)
    return total


def file_checksum(path: Path) -> int:
    """Compute the CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            total = zlib.crc32(block, total)
    return total


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file that says what it is."""
    about = {"format": FORMAT, "version": VERSION, **values}
    about["checksum"] = _text_checksum(about)
    write_text(path, json.dumps(about, indent=2) + "\n")


def _text_checksum(values: Any) -> int:
    plain = json.loads(json.dumps(values))  # as it is read again
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of `write_json`.

    Raises:
        FileNotFoundError, ValueError: as `read_arrays`.
    """
    path = inside(path.parent, path.name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the store is not whole.")
    values = read_any_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of a memwrap store.")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {values.get('version')}; this memwrap reads {VERSION}."
        )
    if values.pop("checksum", None) != _text_checksum(values):
        raise ValueError(f"{path} is damaged: its contents do not have their checksum.")
    return values


def checked_header(folder: Path, **requirements: Any) -> dict[str, Any]:
    """Read what the header of a store on disk says.

    Args:
        folder: the store's.
        requirements: what it must say.

    Raises:
        FileNotFoundError, ValueError: as `read_arrays`; for a store of which they are not true.
    """
    header = {"factory": None, "removals": False, "id": "", **read_json(folder / HEADER)}
    dim, dtypes = header.get("dim"), ("float16", "float32")
    good = type(dim) is int and 0 < dim < 2**20 and header.get("metric") in METRICS
    good = good and header.get("dtype") in dtypes and isinstance(header.get("notes"), dict)
    for name, value in requirements.items():
        if header.get(name) != value:
            raise ValueError(f"The store {folder} has {name} {header.get(name)!r}, not {value!r}.")
    if not good or not isinstance(header["id"], str):
        raise ValueError(f"{folder / HEADER} is damaged: it does not describe a store.")
    return header


def holds_files(folder: Path) -> bool:
    """Tell whether there is more in a folder than what a killed process left at once."""
    return folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir())


def copy_folder(source: Path, target: Path) -> None:
    """Copy a store so that `target` is the new one or, if that is stopped, the older one.

    Raises:
        ValueError: if a process writes the store at `target`.
    """
    if in_use(target):
        raise ValueError(f"Another process is writing the store {target}; give another folder.")
    with rewriting(target, replaces=FILES) as new:
        left_out = shutil.ignore_patterns(LOCK, SCRATCH, SAVED)
        shutil.copytree(source, new, symlinks=True, ignore=left_out, dirs_exist_ok=True)


def clear_files(folder: Path) -> None:
    """Delete all that a store on disk holds but its header."""
    for pattern in FILES:
        for file in folder.glob(pattern) if pattern != HEADER else ():
            file.unlink()


def lock(folder: Path) -> int | None:
    """Lock a store's folder for writing; the system gives it back when the process ends.

    Returns:
        What to close; None if another process has it.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    file = os.open(folder / LOCK, flags, 0o666)
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return None
    return file


def in_use(folder: Path) -> bool:
    """Tell whether a process writes the store of a folder."""
    if not (folder / LOCK).is_file():
        return False
    file = lock(folder)
    if file is not None:
        os.close(file)
    return file is None
