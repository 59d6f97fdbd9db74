"""Checking plain values against dataclasses: unknown keys and wrong types, said plainly."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any


def check(cls: type, values: Any, where: str, prefix: str = "") -> None:
    """Unknown keys and wrong types, of a recipe or a part of one."""
    hints = typing.get_type_hints(cls)
    known = {entry.name: hints[entry.name] for entry in fields(cls)}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in known:
            raise ValueError(f"{where}: unknown key `{full}`; {_nearest(str(key), cls, prefix)}")
        if _is_reference(value):
            continue
        section = _section(known[key])
        if section is not None and isinstance(value, dict):
            check(section, value, where, f"{full}.")
        elif not _fits(value, known[key]):
            raise ValueError(
                f"{where}: `{full}` is {value!r} ({_word(type(value))}); "
                f"it must be {_describe(known[key])}{_advice(value, known[key])}."
            )


def _nearest(key: str, cls: type, prefix: str) -> str:
    names = [entry.name for entry in fields(cls)]
    near = difflib.get_close_matches(key, names, n=1)
    if near:
        return f"did you mean `{prefix}{near[0]}`?"
    for name, hint in typing.get_type_hints(cls).items():  # the right key at the wrong place
        section = _section(hint)
        if section and key in [entry.name for entry in fields(section)]:
            return f"did you mean `{name}.{key}`?"
    return f"allowed: {', '.join(prefix + name for name in names)}."


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _section(hint: Any) -> type | None:
    """The dataclass that a field holds, if any."""
    return next((o for o in _options(hint) if is_dataclass(o)), None)  # type: ignore[return-value]


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and ("${" in value or value == "???")


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, option) for option in _options(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is list:
        inner = typing.get_args(hint)[0]
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return isinstance(value, hint)


_WORDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false",
    dict: "a mapping of keys", list: "a list", type(None): "null",
}  # fmt: skip


def _advice(value: Any, hint: Any) -> str:
    # YAML reads 0:8 as a number of base 60.
    return " (put it in quotes)" if str in _options(hint) and isinstance(value, int) else ""


def _word(kind: Any) -> str:
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _describe(hint: Any) -> str:
    words = []
    for option in _options(hint):
        if typing.get_origin(option) is list:
            words.append(f"a list (each {_describe(typing.get_args(option)[0])})")
        elif is_dataclass(option):
            words.append("a mapping of keys")
        else:
            words.append(_word(typing.get_origin(option) or option))
    return " or ".join(words)


def build(cls: Any, values: dict[str, Any]) -> Any:
    """Make the dataclass; sections become theirs."""
    hints = typing.get_type_hints(cls)
    made: dict[str, Any] = {}
    for entry in fields(cls):
        if entry.name not in values:
            continue
        value = copy.deepcopy(values[entry.name])
        section = _section(hints[entry.name])
        made[entry.name] = build(section, value) if section and value is not None else value
    return cls(**made)


__all__ = ["build", "check"]
