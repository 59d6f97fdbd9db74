"""Checks of a state that comes from a file: its signature, its tensors and their shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memwrap.state.file_check import counts_padding
from memwrap.state.memory_state import MemoryState
from memwrap.state.trees import (
    RECENT,
    STORE,
    Tree,
    part_of,
    tree_leaves,
)

_MOST = 2**53


def check_shapes(
    state: MemoryState, fresh: MemoryState, growing: Mapping[str, Collection[str]] | None = None,
    windows: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Refuse a state whose tensors are not those of its memories.

    Args:
        state: from a file.
        fresh: one row of the model's that has read nothing.
        growing: the memories whose tensors become longer in dimension 2, and which of them are not
            empty in a fresh state.
        windows: what the backbone's layers see, by their numbers.

    Raises:
        ValueError: names the first tensor that is missing, foreign, misshapen or of another dtype.
    """
    for name, tree in fresh.memories.items():
        got = dict(tree_leaves(state.memories.get(name, {})))
        needed = _with_pages(dict(tree_leaves(tree)), got)
        for key in sorted(needed.keys() ^ got.keys()):
            fault = "lacks" if key in needed else "holds the foreign tensor"
            raise ValueError(f"The state {fault} {name}.{key}; its file is damaged. Read again.")
        longer = (growing or {}).get(name)
        places = {key: _growing_dimension(key, like, longer) for key, like in needed.items()}
        for key, tensor in needed.items():
            have, want, place = got[key].shape, [state.batch_size, *tensor.shape[1:]], places[key]
            if place is not None and len(have) == len(want):
                want[place] = max(want[place], have[place])
            _check_leaf(f"{name}.{key}", got[key], tensor, tuple(want))
        _check_pages(name, got)
        _check_lengths(name, got, needed, places)
        _check_layers(name, state.memories.get(name, {}), tree, windows or {})


def check_open(state: MemoryState, opened: MemoryState, segment_size: int, vocab: int) -> None:
    """Refuse an open segment that is not one of the model's.

    Args:
        state: from a file.
        opened: a state of the model, one row with a token in its open segment.
        segment_size: tokens of a whole segment.
        vocab: ids there are.

    Raises:
        ValueError: names the first tensor that is missing, foreign, misshapen or of another dtype.
    """
    fill, length = state.fill, len(state.open)
    if not state.hold_open and bool((fill >= segment_size).any()):
        raise ValueError("The state's open segment is full; its file is damaged. Read again.")
    got, needed = (dict(tree_leaves(s.open.tree)) for s in (state, opened))
    for key in sorted(needed.keys() ^ got.keys()) if length or got else ():
        fault = "lacks" if key in needed else "holds the foreign tensor"
        raise ValueError(f"The state {fault} open.{key}; its file is damaged. Read again.")
    for key, tensor in got.items():
        like = needed[key]
        want = (state.batch_size, *like.shape[1:2], length, *like.shape[3:])
        _check_leaf(f"open.{key}", tensor, like, want, vocab)
    if length and int(state.open.positions.max()) >= length + segment_size:
        raise ValueError("The state's open positions are too large; its file is damaged.")
    ids, counts = got.get("tokens.ids"), state.open.tokens
    # Without a hash embeddings were read; padding that is counted has no ids.
    if ids is not None and state.ids_hash is not None and not counts_padding(state):
        before = torch.nn.functional.pad(counts, (1, 0))[:, :-1]
        text = state.open.valid & (counts > before) & (counts > 0)  # no prompt, nothing inserted
        if bool((ids[:, 0, :, 0][text] < 0).any()):
            raise ValueError("The state's open.tokens.ids lack some; its file is damaged.")


def check_ranges(name: str, tree: Tree, ranges: Iterable[tuple[Tensor, Any, Any]]) -> None:
    """Refuse whole numbers of a memory's tree that no reading gives.

    Args:
        name: the memory's.
        tree: its state.
        ranges: numbers `(B, ...)`, and the least and the most they may be, for all or `(B,)`.

    Raises:
        ValueError: names the first tensor that holds another number.
    """
    names = {id(tensor): key for key, tensor in tree_leaves(tree)}
    for tensor, *limits in ranges:
        if not tensor.numel():
            continue
        least, most = (torch.as_tensor(limit).cpu() for limit in limits)
        rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
        if bool((rows.amin(1).cpu() < least).any()) or bool((rows.amax(1).cpu() > most).any()):
            where = names.get(id(tensor), "store")
            raise ValueError(
                f"The state's {name}.{where} holds numbers that no reading gives; its file is "
                "damaged. Read the text again."
            )


def _check_leaf(
    name: str, tensor: Tensor, like: Tensor, want: tuple[int, ...], most: int | None = None
) -> None:
    """Refuse a tensor of another shape, dtype or, for integers, another range than `like`'s."""
    have = tuple(tensor.shape)
    if have != want or tensor.dtype != like.dtype:
        raise ValueError(
            f"The state's {name} has shape {have} ({tensor.dtype}), not {want} ({like.dtype}); its "
            "file is damaged. Read the text again."
        )
    if tensor.dtype == torch.long and tensor.numel():
        least = min(-1 if most else 0, int(like.min()) if like.numel() else 0)
        if int(tensor.min()) < least or int(tensor.max()) >= (most or _MOST):
            raise ValueError(f"The state's {name} is out of range; its file is damaged.")


def _check_pages(name: str, leaves: dict[str, Tensor]) -> None:
    """Refuse a store whose pages have gaps, or parts of different lengths."""
    pages: dict[str, dict[int, set[int]]] = {}
    for key, tensor in leaves.items():
        if place := _page_of(key):
            pages.setdefault(place[0], {}).setdefault(place[1], set()).add(tensor.shape[1])
    for store, lengths_of in pages.items():
        lengths = [lengths_of.get(number, set()) for number in range(len(lengths_of))]
        full = lengths[0]
        good = all(len(one) == 1 for one in lengths)
        good = good and all(one == full for one in lengths[:-1]) and max(lengths[-1]) <= max(full)
        if not good:
            raise ValueError(
                f"The state's {name}.{store} has pages of other lengths; its file is damaged."
            )


def _growing_dimension(key: str, like: Tensor, longer: Collection[str] | None) -> int | None:
    """Give the dimension in which a tensor becomes longer than it is in a fresh state, if any;
    `longer` are the names of those that are not empty there (None: of no other tensors)."""
    if _page_of(key):
        return 1
    name = key.rpartition(".")[2]
    grows = longer is not None and like.dim() > 2 and (like.shape[2] == 0 or name in longer)
    return 2 if grows or f".{RECENT}." in f".{key}" else None


def _check_lengths(
    name: str, leaves: dict[str, Tensor], fresh: dict[str, Tensor], places: dict[str, int | None]
) -> None:
    """Refuse tensors of one part (`trees.part_of`) that grew to different lengths."""
    lengths: dict[tuple[str, int], set[int]] = {}
    for key, tensor in leaves.items():
        if places[key] == 2:
            begun = part_of(key), fresh[key].shape[2]
            lengths.setdefault(begun, set()).add(tensor.shape[2])
    for part in (part for (part, _), counts in lengths.items() if len(counts) > 1):
        raise ValueError(
            f"The state's {name}.{part} has parts of other lengths; its file is damaged."
        )


def _check_layers(name: str, tree: Tree, fresh: Tree, windows: Mapping[str, Any]) -> None:
    """Refuse recent tokens of which a layer has not as many as another that is like it: what its
    attention sees, and what a fresh state holds of it. Masks are made once for all of them."""
    lengths: dict[Any, set[tuple[int, ...]]] = {}
    for layer, inner in tree.get("layers", {}).items():
        shapes = tuple((key, t.shape) for key, t in tree_leaves(fresh["layers"][layer]))
        leaves = [t for key, t in tree_leaves(inner) if f".{RECENT}." in f".{key}"]
        kind = lengths.setdefault((windows.get(layer), shapes), set())
        kind.add(tuple(t.shape[2] for t in leaves))
    if any(len(kind) > 1 for kind in lengths.values()):
        raise ValueError(
            f"The state's {name}.layers have other numbers of recent tokens than layers like them; "
            "its file is damaged. Read the text again."
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


def signature_difference(state_signature: dict[str, Any], model_signature: dict[str, Any]) -> str:
    """Name the first thing in which a state's signature differs from a model's."""
    if not state_signature:
        return "it carries no signature"
    backbone, memories = (state_signature.get(name) or {} for name in ("backbone", "memories"))
    for key, value in model_signature["backbone"].items():
        if backbone.get(key) != value:
            return f"its backbone has {key} {_short(backbone.get(key))}, this one {value!r}"
    names = [m["name"] for m in memories]
    if names != [m["name"] for m in model_signature["memories"]]:
        wanted = [m["name"] for m in model_signature["memories"]]
        return f"its memories are {_short(names)}, here {wanted}"
    used, now = state_signature.get("adapters"), model_signature["adapters"]
    if used != now:
        used = _short(used) if used else "off"
        return f"it was read with the adapters {used} in use, here they are {now or 'off'}"
    for left, right in zip(memories, model_signature["memories"], strict=True):
        for key in right:
            if left.get(key) != right[key]:
                got = _short(left.get(key))
                return f"its {right['name']} has {key} {got}, this one {right[key]!r}"
    return "its settings differ"


def _short(value: Any) -> str:
    """Write a value of a file as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
