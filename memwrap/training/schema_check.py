"""Checking plain values against settings: unknown keys and wrong values, said plainly."""

from __future__ import annotations

import copy
import difflib
from typing import Any, get_args

from memwrap.memories.settings import Settings, describe, fits


def check(cls: type[Settings], values: Any, source: str, prefix: str = "") -> None:
    """Refuse unknown keys and wrong values of a recipe or a part of one.

    Raises:
        ValueError: names `source`, the key and its value; suggests the nearest key.
    """
    known = cls.types()
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in known:
            raise ValueError(f"{source}: unknown key `{full}`; {_nearest(str(key), cls, prefix)}")
        if _is_reference(value):
            continue
        section = _section(known[key])
        if section is not None and isinstance(value, dict):
            check(section, value, source, f"{full}.")
        elif not fits(value, known[key]):
            words = describe(known[key]).replace("None", "null")
            # YAML reads 0:8 as a number of base 60.
            advice = " (put it in quotes)" if "text" in words and isinstance(value, int) else ""
            raise ValueError(f"{source}: `{full}` is {value!r}; it must be {words}{advice}.")


def _nearest(key: str, cls: type[Settings], prefix: str) -> str:
    for name, hint in cls.types().items():  # the right key at the wrong place
        section = _section(hint)
        if section and key in section.types():
            return f"did you mean `{name}.{key}`?"
    names = list(cls.types())
    near = difflib.get_close_matches(key, names, n=1)
    if near:
        return f"did you mean `{prefix}{near[0]}`?"
    return f"allowed: {', '.join(prefix + name for name in names)}."


def _section(hint: Any) -> type[Settings] | None:
    """Return the settings that a field holds, if any."""
    options = (hint, *get_args(hint))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Settings)), None)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and ("${" in value or value == "???")


def build(cls: type[Settings], values: dict[str, Any]) -> Any:
    """Make the settings of a dict; sections become theirs."""
    made: dict[str, Any] = {}
    for name, value in copy.deepcopy(values).items():
        section = _section(cls.types()[name])
        made[name] = build(section, value) if section and value is not None else value
    return cls(**made)


__all__ = ["build", "check"]
