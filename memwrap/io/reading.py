"""Reading files of other people: no path that leaves a folder, no depth or size without end."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

_MOST_BYTES = 2**26  # an index of 400,000 tensors
_MOST_DEPTH = 64


def inside(folder: Path, name: Any) -> Path:
    """Resolve the path of a file or folder in `folder` that another file names, or that may be a
    link.

    Raises:
        ValueError: if it lies elsewhere.
    """
    try:
        good = isinstance(name, str) and bool(name) and not set(name) & set("\\\0:")
        good = good and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts
        if good and _is_below(folder, (folder / name).resolve()):
            return folder / name
    except (OSError, RuntimeError, ValueError):  # links in a circle, names too long
        pass
    raise ValueError(
        f"{folder} names {str(name)[:100]!r}, or links to it, which is not in the folder; memwrap "
        "reads nothing elsewhere unless you name it."
    )


def _is_below(folder: Path, real: Path) -> bool:
    root = folder.resolve()
    if real.is_relative_to(root):
        return True
    # The Hub's cache: a snapshot's files are links to blobs of the same repository.
    blobs = root.parent.parent / "blobs"
    return (
        root.parent.name == "snapshots" and real.is_relative_to(blobs) and blobs.resolve() == blobs
    )


def read_json(path: Path) -> Any:
    """Read what a JSON file holds.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: for what is no JSON, too deep or too large; names the file.
    """
    return parse_json(read_text(path, _MOST_BYTES), path)


def parse_json(text: str | bytes, source: Any) -> Any:
    """Parse JSON text; errors as `read_json`, naming `source`."""
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{source} has {len(text):,} bytes of JSON; {_MOST_BYTES:,} are read.")
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source} is damaged: it is nested too deeply.") from error
    layer, depth = [values], 0
    while layer := [v for node in layer for v in _inner(node) if isinstance(v, (dict, list))]:
        depth += 1
        if depth > _MOST_DEPTH:
            raise ValueError(f"{source} is damaged: it is nested too deeply.")
    return values


def _inner(node: Any) -> Any:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def read_text(path: Path, limit: int) -> str:
    """Read the text of a file of at most `limit` bytes; errors as `read_json`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes; at most {limit:,} are read of such a file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
