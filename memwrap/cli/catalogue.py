"""The memories' names, places and summaries, read from their source: nothing is imported, so
`memwrap list` prints at once."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

ROOM = Path(__file__).parents[1] / "memories"
_GROUP = "memwrap.memories"  # as memwrap.memories.registry has it, which imports torch


@dataclass(frozen=True)
class Entry:
    """A memory: its name, where it attaches, and its summary."""

    name: str
    places: str
    summary: str


def own_memories() -> list[Entry]:
    """List memwrap's own memories."""
    places = _places()
    entries = []
    for path in sorted(ROOM.glob("*.py")):
        classes = {n.name: n for n in _tree(path).body if isinstance(n, ast.ClassDef)}
        for node in classes.values():
            config = _registered(node)
            if config is None:
                continue
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            points = ", ".join(place for place, kind in places.items() if kind in bases)
            text = (ast.get_docstring(classes[config]) or "").split("\n\n")[0]
            entries.append(Entry(_name(classes[config]), points, " ".join(text.split())))
    return entries


def other_memories() -> list[Entry]:
    """List the memories of other packages, which are imported for it."""
    names = sorted(entry_points(group=_GROUP).names)
    if not names:
        return []
    from memwrap.memories.protocol import places_of
    from memwrap.memories.registry import config_class, memory_class

    entries = []
    for name in names:
        try:
            text = (config_class(name).__doc__ or "").split("\n\n")[0]
            places = ", ".join(places_of(memory_class(name)))
            entries.append(Entry(name, places, " ".join(text.split())))
        except ValueError as error:  # of another package; the others are fine
            entries.append(Entry(name, "broken", str(error)))
    return entries


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _places() -> dict[str, str]:
    """Read the table of places: the class of each by its name."""
    for node in _tree(ROOM / "protocol.py").body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "PLACES":
            table = node.value
            if isinstance(table, ast.Dict):
                pairs = zip(table.keys, table.values, strict=True)
                return {getattr(k, "value", ""): getattr(v, "id", "") for k, v in pairs}
    return {}


def _registered(node: ast.ClassDef) -> str | None:
    """Return the config class that a class is registered with."""
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register":
            return getattr(call.args[0], "id", None)
    return None


def _name(config: ast.ClassDef) -> str:
    for node in config.body:
        target = getattr(node, "target", None)
        if isinstance(node, ast.AnnAssign) and getattr(target, "id", "") == "name":
            return str(getattr(node.value, "value", ""))
    return ""


__all__ = ["Entry", "other_memories", "own_memories"]
