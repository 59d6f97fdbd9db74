"""MemoryConfig: the settings that all memories share, checked when they are made."""

from __future__ import annotations

import difflib
import math
import textwrap
from dataclasses import asdict, fields
from typing import Any, ClassVar, Literal

from memwrap.memories.settings import Fraction, PositiveInt, Settings


class MemoryConfig(Settings):
    """Fields that all memories share. Subclass it with the fields of one method.

    Examples:
        >>> import memwrap
        >>> memwrap.RMTConfig(segment_size=256, bptt_segments=4).to_dict()["bptt_segments"]
        4

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
    not_in_state: ClassVar[frozenset[str]] = frozenset(
        {"bptt_segments", "loss_on", "length_spread"}
    )
    """Fields of this class on which no state depends, beside those of its base classes: how much is
    looked up, how it is mixed in, how it is trained. A state that was read with other values of
    them can be continued; `model.memory_settings` changes them. All others are in the signature."""

    segment_size: PositiveInt = 512
    bptt_segments: PositiveInt | None = None
    loss_on: Literal["all", "last"] = "all"
    alignment: Literal["left", "right", "center"] = "left"
    length_spread: Fraction = 0.0
    count_padding: bool = False

    def detach_before(self, segment: int) -> bool:
        """Tell whether gradients are cut between segment `segment - 1` and `segment` of a call."""
        return self.bptt_segments is not None and segment % self.bptt_segments == 0

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        free = vars(cls).get("not_in_state", frozenset())
        for name in sorted(free - {entry.name for entry in fields(cls)}):
            raise TypeError(f"{cls.__name__}.not_in_state names {name!r}, which is no field of it.")

    @classmethod
    def free_fields(cls) -> frozenset[str]:
        """Collect the fields on which no state depends."""
        return frozenset().union(*(vars(c).get("not_in_state", ()) for c in cls.__mro__))

    def signature(self) -> dict[str, Any]:
        """Return what a state must have been read with: the fields on which it depends."""
        free = self.free_fields()
        return {name: value for name, value in self.to_dict().items() if name not in free}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict with the memory's `name`."""
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
                few = textwrap.shorten(", ".join(known), 150, placeholder=" and more")
                hint = (
                    f"did you mean `{near[0]}`?"
                    if near
                    else (f"allowed: {few} (help({cls.__name__})).")
                )
                raise ValueError(f"{cls.__name__} has no field `{key}`; {hint}")
        return cls(**values)

    @classmethod
    def on_pretrained(cls) -> dict[str, Any]:
        """Return fields with which training on a pretrained model begins where it was measured to
        go well, for `memwrap train --model` (default: the defaults)."""
        return {}

    @classmethod
    def tiny(cls) -> MemoryConfig:
        """Make a small configuration, as the tests of every memory use it."""
        return cls(segment_size=8)

    @property
    def longest_segment(self) -> int:
        """Tokens of the longest segment that training may draw."""
        return math.floor(self.segment_size * (1 + self.length_spread))
