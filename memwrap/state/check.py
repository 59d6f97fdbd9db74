"""Checks of a state that comes from a file: its signature, its tensors and their shapes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from memwrap.state.memory_state import MemoryState
from memwrap.state.trees import (
    STORE,
    tree_leaves,
)


def check_shapes(state: MemoryState, fresh: MemoryState, growing: Collection[str] = ()) -> None:
    """Refuse a state whose tensors are not those of its memories; those of the memories named in
    `growing` may be longer than fresh ones (dimension 2).

    Raises:
        ValueError: names the first tensor that is missing, foreign or misshapen.
    """
    for name, tree in fresh.memories.items():
        got = dict(tree_leaves(state.memories.get(name, {})))
        needed = _with_pages(dict(tree_leaves(tree)), got)
        for key in sorted(needed.keys() ^ got.keys()):
            what = "lacks" if key in needed else "holds the foreign tensor"
            raise ValueError(f"The state {what} {name}.{key}; its file is damaged. Read again.")
        for key, tensor in needed.items():
            have = tuple(got[key].shape)
            want = (state.batch_size, *tensor.shape[1:])
            if _page_of(key):  # a store's second dimension grows
                want = (*want[:1], *have[1:2], *want[2:])
            elif name in growing:
                want = _grown(want, have)
            if have != want:
                raise ValueError(
                    f"The state's {name}.{key} has shape {have}, not {want}; its file is damaged. "
                    "Read the text again."
                )


def _page_of(key: str) -> tuple[str, int, str] | None:
    """Split a name: `a.store.7.key` -> `("a.store", 7, "key")`; None for what is in no store."""
    *path, leaf = key.split(".")
    if len(path) > 1 and path[-2] == STORE and path[-1].isdecimal():
        return ".".join(path[:-1]), int(path[-1]), leaf
    return None


def _with_pages(needed: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collect the leaves of a fresh state and, for stores, those of as many pages as `got` has."""
    pages: dict[str, set[int]] = {}
    for key in got:
        if place := _page_of(key):
            pages.setdefault(place[0], set()).add(place[1])
    result = dict(needed)
    for key, tensor in needed.items():
        if place := _page_of(key):
            store, _, leaf = place
            count = len(pages.get(store, ()))
            result |= {f"{store}.{page}.{leaf}": tensor for page in range(count)}
    return result


def signature_difference(theirs: dict[str, Any], own: dict[str, Any]) -> str:
    """Name the first thing in which a state's signature differs from a model's."""
    if not theirs:
        return "it carries no signature"
    for key, value in own["backbone"].items():
        got = theirs["backbone"].get(key)
        if got != value:
            return f"its backbone has {key} {got!r}, this one {value!r}"
    names = [m["name"] for m in theirs["memories"]]
    if names != [m["name"] for m in own["memories"]]:
        return f"its memories are {names}, here {[m['name'] for m in own['memories']]}"
    for left, right in zip(theirs["memories"], own["memories"], strict=True):
        for key in right:
            if left.get(key) != right[key]:
                return f"its {right['name']} has {key} {left.get(key)!r}, this one {right[key]!r}"
    return "its settings differ"


def _grown(want: tuple[int, ...], have: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape there is, if it is longer than the wanted one in a single dimension."""
    if len(want) != len(have):
        return want
    other = [(a, b) for a, b in zip(want, have, strict=True) if a != b]
    return have if len(other) == 1 and other[0][0] < other[0][1] and want[0] == have[0] else want
