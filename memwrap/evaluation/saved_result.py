"""What all measured results have in common: how they are written as JSON and read again."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from memwrap.io.atomic_files import write_text


class SavedResult:
    """A result that is a file: a dataclass of numbers, words, and records of them.

    Attributes:
        format, version: what its file says of itself. older: versions that are read besides.
        records: the class of what some fields hold in lists, or in dicts under names.
    """

    format: ClassVar[str]
    version: ClassVar[int] = 1
    older: ClassVar[frozenset[int]] = frozenset()
    records: ClassVar[dict[str, type]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {"format": self.format, "version": self.version, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Undo `to_dict`.

        Raises:
            ValueError: for another kind of dict, another version, or fields that are not its own.
        """
        versions = {cls.version, *cls.older}
        if values.get("format") != cls.format or values.get("version") not in versions:
            raise ValueError(
                f"This is no {cls.format} result of version {cls.version}: it says format "
                f"{values.get('format')!r}, version {values.get('version')!r}."
            )
        given = {k: v for k, v in values.items() if k not in ("format", "version")}
        if unknown := sorted(given.keys() - {f.name for f in fields(cls)}):  # type: ignore[arg-type]
            raise ValueError(f"A {cls.format} result has no {unknown[0]!r}; make it anew.")
        try:
            for name, kind in cls.records.items():
                items = given[name]
                given[name] = (
                    {key: kind(**item) for key, item in items.items()}
                    if isinstance(items, dict)
                    else [kind(**item) for item in items]
                )
            return cls(**given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"A {cls.format} result is damaged: {error}; make it anew.") from error

    def save(self, path: str | Path) -> None:
        """Write the result as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")
