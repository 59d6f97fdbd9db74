"""Put the settings of every memory, as its config declares and describes them, into docs/methods.

python benchmarks/settings_tables.py
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from typing import Any

from pages import DOCS, placed, table

import memwrap
from memwrap.memories.settings import describe

ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n     .*)*)", re.MULTILINE)


def meanings(config: type) -> dict[str, str]:
    """What the docstrings of a config and its bases say of each attribute; its own word counts."""
    found: dict[str, str] = {}
    for cls in config.__mro__:
        section = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")[2]
        for names, text in ENTRY.findall(section):
            for name in names.split(", "):
                found.setdefault(name, " ".join(text.split()))
    return found


def settings(config: type[memwrap.MemoryConfig]) -> str:
    """A row a field: name, what it takes, default, meaning; those of all memories at the end."""
    about, hints = meanings(config), config.types()
    shared = [entry.name for entry in fields(memwrap.MemoryConfig)]
    rows = [["setting", "takes", "default", ""]]
    for entry in sorted(fields(config), key=lambda entry: entry.name in shared):
        takes = re.sub(r"'(\w+)'", r'`"\1"`', describe(hints[entry.name]))
        takes = takes.replace("None", "`None`")
        rows.append([f"`{entry.name}`", takes, f"`{_shown(entry.default)}`", about[entry.name]])
    return table(rows)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def page(memory: str, text: str) -> str:
    """Return the text of a memory's page with its settings between the marks."""
    return placed(text, "settings", settings(memwrap.config_class(memory)))


def main() -> None:
    for memory in memwrap.available():
        path = DOCS / "methods" / f"{memory}.md"
        path.write_text(page(memory, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
