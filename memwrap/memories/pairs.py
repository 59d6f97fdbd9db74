"""Which memories can be on one model together."""

from __future__ import annotations

from memwrap.memories.protocol import InsertsTokens, Memory, SoftPrompt, places_of

_EXCLUSIVE = ("attention", "logits", "inserted")


def check_together(memories: dict[str, type[Memory]]) -> None:
    """Refuse memories that need one and the same thing.

    Raises:
        ValueError: names both and what they would share.
    """
    taken: dict[str, str] = {}
    for name, memory in memories.items():
        for place in places_of(memory):
            if place in _EXCLUSIVE and place in taken:
                raise ValueError(
                    f"{name!r} and {taken[place]!r} both attach at the {place} place; wrap with "
                    "one of them."
                )
            taken.setdefault(place, name)


def check_prefix(memories: dict[str, Memory]) -> None:
    """Refuse a prefix in front of segments that another memory cuts into blocks.

    Raises:
        ValueError: names both.
    """
    cutting = [name for name, memory in memories.items() if isinstance(memory, InsertsTokens)]
    for name, memory in memories.items():
        if cutting and isinstance(memory, SoftPrompt) and memory.num_prefix:
            raise ValueError(
                f"{cutting[0]!r} counts its blocks from a segment's first position, which the "
                f"prefix of {name!r} takes; wrap with one of them."
            )
