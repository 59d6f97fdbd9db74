"""MemoryConfig: the settings that all memories share, checked when they are made."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

ALIGNMENTS = ("left", "right", "center")


@dataclass(kw_only=True)
class MemoryConfig:
    """Fields that all memories share. Subclass it with the fields of one method.

    Attributes:
        segment_size: tokens that are read at once; the memory is written when so many are full.
        bptt_segments: gradients flow through at most so many segments (`None`: all). A
            sequence is cut into windows of that many segments.
        loss_on: `"all"` tokens, or only the `"last"` segment of each row.
        alignment: where a call's tokens are cut: from the `"left"`, from the `"right"` (the
            first segment is the short one), or in `"center"` (nearly equal lengths). Only
            "left" gives the same result however the tokens are fed.
        length_spread: in training, the segments of a window of `bptt_segments` get random lengths
            of the same sum, each at most so much longer than `segment_size` (1/3: up to 4/3 of
            it; never with `count_padding`). 0: never.
        count_padding: cut by columns and let padding inside a segment take up positions, as
            published code does. Off: a row gives the same alone and padded in a batch.
    """

    name: ClassVar[str] = ""

    segment_size: int = 512
    bptt_segments: int | None = None
    loss_on: str = "all"
    alignment: str = "left"
    length_spread: float = 0.0
    count_padding: bool = False

    def __post_init__(self) -> None:
        self._positive("segment_size")
        self._positive("bptt_segments", optional=True)
        self._one_of("loss_on", ("all", "last"))
        self._one_of("alignment", ALIGNMENTS)
        self._number("length_spread", 0, 1)
        for entry in fields(self):
            if entry.type == "bool" and not isinstance(getattr(self, entry.name), bool):
                self._fail(entry.name, "true or false")

    def detach_before(self, segment: int) -> bool:
        """Whether gradients are cut between segment `segment - 1` and `segment` of a call."""
        return self.bptt_segments is not None and segment % self.bptt_segments == 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with the memory's `name`."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MemoryConfig:
        """Build from a dict (its `name` may be left out).

        Raises:
            ValueError: for an unknown key; suggests the nearest.
        """
        values = dict(values)
        name = values.pop("name", cls.name)
        if name != cls.name:
            raise ValueError(f"{cls.__name__} got the settings of {name!r}; it needs {cls.name!r}.")
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(known)}."
                raise ValueError(f"{cls.__name__} has no field `{key}`; {hint}")
        return cls(**values)

    @classmethod
    def tiny(cls) -> MemoryConfig:
        """A small configuration, as the tests of every memory use it."""
        return cls(segment_size=8)

    @property
    def longest_segment(self) -> int:
        """Tokens of the longest segment that training may draw."""
        return math.floor(self.segment_size * (1 + self.length_spread))

    def _fail(self, name: str, allowed: str) -> None:
        raise ValueError(
            f"{type(self).__name__}.{name} is {getattr(self, name)!r}; it must be {allowed}."
        )

    def _layers(self, name: str = "layers") -> None:
        value = getattr(self, name)
        if value is None:
            return
        if (
            not isinstance(value, list)
            or not value
            or any(type(i) is not int or i < 0 for i in value)
        ):
            self._fail(name, "None or a list of layer numbers from 0")
        if len(set(value)) != len(value):
            self._fail(name, "a list without repetitions")

    def _positive(self, name: str, *, optional: bool = False, zero: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        least = 0 if zero else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._fail(name, f"an integer of at least {least}" + (" or None" if optional else ""))

    def _number(self, name: str, least: float, most: float = math.inf) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not least <= value <= most
        ):
            limits = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
            self._fail(name, f"a number {limits}")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._fail(name, "one of " + ", ".join(map(repr, allowed)))
