"""Reading YAML of other people: no tags, no depth or size without end, aliases included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from memwrap.io.reading import read_text

_MOST_BYTES = 2**20
_MOST_DEPTH = 64
_MOST_NODES = 100_000


def read_yaml_text(path: Path) -> str:
    """Read the text of a YAML file, for a loader: neither too large nor too deep, also with its
    aliases written out.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: otherwise; names the file.
    """
    text = read_text(path, _MOST_BYTES)
    try:
        _check_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML: {reason}") from error
    return text


def read_yaml(path: Path) -> Any:
    """Read what a YAML file holds; errors as `read_yaml_text`."""
    text = read_yaml_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML: {reason}") from error


def _check_yaml(text: str) -> None:
    """Count nodes, those behind aliases every time."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes before it
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor, _MOST_NODES)  # an alias within its own anchor
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.ScalarEvent):
                if event.anchor:
                    sizes[event.anchor] = 1
            else:
                open_nodes.append((event.anchor, count - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > _MOST_NODES or len(open_nodes) > _MOST_DEPTH:
            raise ValueError("it is too deep, or too large with its aliases written out.")
