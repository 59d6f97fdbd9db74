"""Values that the type of a setting holds and values that it does not, made from the type alone."""

from __future__ import annotations

import math
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from memwrap.memories.settings import Kind, Range

# Of every kind that a file or a caller may hand in.
ANYTHING: list[Any] = [
    None, True, False, -1, 0, 3, 1.5, math.inf, "nonsense", "8", "", b"x", [], [0], ["q"], [True],
    {}, {"q": 1}, (0, 1), {0}, 1j, int,
]  # fmt: skip


def inside(hint: Any) -> list[Any]:
    """Values that the type holds: all of a few, else those at its limits."""
    return [value for option in _options(hint) for value in _inside(option)]


def outside(hint: Any) -> list[Any]:
    """Values that the type does not hold: all other kinds, and of its own what is just beyond."""
    kinds = {_kind(option) for option in _options(hint)}
    kinds |= {int} if float in kinds else set()
    others = [value for value in ANYTHING if type(value) not in kinds]
    return others + [value for option in _options(hint) for value in _beyond(option)]


def _options(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _kind(hint: Any) -> Any:
    hint = _plain(hint)
    return type(get_args(hint)[0]) if get_origin(hint) is Literal else get_origin(hint) or hint


def _inside(hint: Any) -> list[Any]:
    kind = _kind(hint)
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if kind in (int, float):
        return _limits(hint)[0]
    if kind is list:
        values = inside(get_args(_plain(hint))[0])
        return [values, values[:1]]
    # The text is a curriculum too.
    return {NoneType: [None], bool: [True, False], str: ["0:2"], dict: [{}, {"a": 1}]}[kind]


def _beyond(hint: Any) -> list[Any]:
    kind = _kind(hint)
    if get_origin(hint) is Literal:
        return ["nonsense", *(f"{text} " for text in get_args(hint)), get_args(hint)[0].upper()]
    if kind in (int, float):
        return _limits(hint)[1]
    if kind is list:
        item = get_args(_plain(hint))[0]
        twice = [inside(item)[:1] * 2] if _rules(hint, Kind) else []
        return [[], *([*inside(item), value] for value in outside(item)), *twice]
    return [""] if kind is str and _rules(hint, Kind) else []


def _rules(hint: Any, of: type) -> list[Any]:
    return [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, of)]


def _limits(hint: Any) -> tuple[list[Any], list[Any]]:
    """The last numbers inside and the first ones outside."""
    (span,) = _rules(hint, Range) or [Range()]
    step = _kind(hint) is int

    def beside(value: Any, to: float) -> Any:
        return value + int(math.copysign(1, to)) if step else math.nextafter(value, to)

    pairs = [
        (span.least, beside(span.least, -math.inf)) if span.least > -math.inf else None,
        (span.most, beside(span.most, math.inf)) if span.most < math.inf else None,
        None if span.above is None else (beside(span.above, math.inf), span.above),
        None if span.below is None else (beside(span.below, -math.inf), span.below),
    ]
    found = [pair for pair in pairs if pair is not None]
    middle = [7] if span == Range() else []
    return [i for i, _ in found] + middle, [o for _, o in found] + ([] if step else [math.nan])
