"""How long a segment a backbone can read: a table of learned positions ends; angles that depend on
how much is fed at once do so beyond some length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class PositionLimit:
    """The most positions that a segment may take, and why."""

    positions: int
    reason: str

    def check(self, positions: Tensor) -> None:
        """Refuse positions, such as those of a memory that counts a text's tokens, beyond it.

        Raises:
            ValueError: says why.
        """
        last = int(positions.max())
        if last >= self.positions:
            raise ValueError(
                f"A memory reads at position {last}, but {self.reason}; take one that stays near "
                "its segment (window, infini), or shorter texts."
            )


def angle_limit(config: Any) -> PositionLimit | None:
    """Find the length beyond which rotary angles depend on how much is fed at once: keys that are
    kept would not fit those of later tokens. None: there is none."""
    limits = [
        (most, kind)
        for settings in _settings(getattr(config, "rope_parameters", None))
        if (kind := str(settings.get("rope_type"))) in _BY_LENGTH
        and (most := settings.get("original_max_position_embeddings", _longest(config)))
    ]
    if not limits:
        return None
    most, kind = min(limits)
    return PositionLimit(
        most,
        f"beyond {most} the backbone's angles ({kind}) depend on how much is fed at once",
    )


def _longest(config: Any) -> int | None:
    original = getattr(config, "original_max_position_embeddings", None)
    return original or getattr(config, "max_position_embeddings", None)


def _settings(parameters: Any) -> Iterator[dict[str, Any]]:
    """Iterate over settings of angles, which some configs have for each kind of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters:
        yield parameters
    for value in parameters.values():
        yield from _settings(value)
