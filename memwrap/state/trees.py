"""Trees of tensors: what a memory's state is made of.

A tree is a nested `dict[str, Tensor | dict]`; every tensor has the batch as its first
dimension. All that is done to a state (selecting rows, detaching, saving) is written here
once, for every memory.

Three names have a meaning. A subtree `"store"` grows with the text: it is a dict of pages, `"0"`,
`"1"`, ..., each a tree of tensors `(B, n, ...)` whose second dimension counts entries; every page
but the last is full, and a row that has fewer entries than another holds zeros behind its own. A
subtree `"host"` stays in the host's memory wherever the rest of the state goes. A subtree
`"recent"` holds tensors `(B, H, n, ...)` of the last tokens, the youngest last: they are as long as
the row needs that has read most, and others have zeros in front.

What else becomes longer (`Claims.lengthens`) does so part by part: tensors of one dict whose names
begin alike (`kept_key`, `kept_value`; or are one word each) are equally long. See `part_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from memwrap.ops.buffers.right_aligned import lengthened

STORE, HOST, RECENT = "store", "host", "recent"

# Nested dicts whose leaves are tensors; a recursive type would only move the checks elsewhere.
Tree = dict[str, Any]


def tree_map(function: Callable[..., Tensor], tree: Tree, *trees: Tree) -> Tree:
    """Apply `function` to the tensors that stand at the same place in every tree."""
    result: Tree = {}
    for name, node in tree.items():
        peers = [other[name] for other in trees]
        if isinstance(node, dict):
            result[name] = tree_map(function, node, *peers)
        else:
            result[name] = function(node, *peers)
    return result


def tree_to(tree: Tree, device: torch.device | str) -> Tree:
    """Move a tree to another device; what belongs to the host stays there."""
    result: Tree = {}
    for name, node in tree.items():
        if name == HOST:
            result[name] = node
        else:
            result[name] = tree_to(node, device) if isinstance(node, dict) else node.to(device)
    return result


def aligned(*trees: Tree) -> list[Tree]:
    """Bring the stores and the recent tokens of trees to one length: missing entries are zero
    (nothing is copied where nothing is missing)."""
    results: list[Tree] = [{} for _ in trees]
    for name, node in trees[0].items():
        nodes = [tree[name] for tree in trees]
        if name == STORE:
            nodes = _same_pages(nodes)
        elif name == RECENT:
            nodes = _same_starts(nodes)
        elif isinstance(node, dict):
            nodes = aligned(*nodes)
        for result, value in zip(results, nodes, strict=True):
            result[name] = value
    return results


def _same_starts(nodes: list[Tree]) -> list[Tree]:
    most = {name: max(node[name].shape[2] for node in nodes) for name in nodes[0]}
    return [{name: lengthened(node[name], count) for name, count in most.items()} for node in nodes]


def _same_pages(stores: list[Tree]) -> list[Tree]:
    names = {name for store in stores for name in store}
    results: list[Tree] = [{} for _ in stores]
    for name in sorted(names, key=int):
        pages = [store.get(name) for store in stores]
        like = next(page for page in pages if page is not None)
        for leaf in like:
            most = max(page[leaf].shape[1] for page in pages if page is not None)
            for page, store, result in zip(pages, stores, results, strict=True):
                tensor = store["0"][leaf][:, :0] if page is None else page[leaf]
                missing = most - tensor.shape[1]
                if missing:
                    shape = (tensor.shape[0], missing, *tensor.shape[2:])
                    tensor = torch.cat([tensor, tensor.new_zeros(shape)], 1)
                result.setdefault(name, {})[leaf] = tensor
    return results


def tree_leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield `(dotted name, tensor)` for every tensor of the tree."""
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from tree_leaves(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node


def part_of(key: str) -> str:
    """Give the part to which a tensor belongs, by its dotted name: tensors that grow are as long as
    the others of their part. `a.kept_key` -> `a.kept`, `a.host.key` and `a.valid` -> `a`, and all
    of a `"recent"` -> that."""
    *path, leaf = (name for name in key.split(".") if name != HOST)
    if path and path[-1] != RECENT and "_" in leaf:
        path.append(leaf.rpartition("_")[0])
    return ".".join(path)


def tree_build(leaves: dict[str, Tensor]) -> Tree:
    """Undo `tree_leaves`."""
    tree: Tree = {}
    for name, tensor in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tensor
    return tree


def alike(*tensors: Tensor) -> list[Tensor]:
    """Bring tensors to one shape but for their rows: where one is shorter than another, zeros stand
    behind its own. What a memory keeps in tensors that grow lies at their beginning."""
    shapes = {t.shape[1:] for t in tensors}
    if len(shapes) == 1:
        return list(tensors)
    most = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return [_longer(t, most) for t in tensors]


def _longer(tensor: Tensor, sizes: list[int]) -> Tensor:
    missing = [want - have for want, have in zip(sizes, tensor.shape[1:], strict=True)]
    return torch.nn.functional.pad(tensor, [x for m in reversed(missing) for x in (0, m)])


def where_rows(rows: Tensor, new: Tree, old: Tree) -> Tree:
    """Take `new` for the rows where `rows` (B,) is true, `old` elsewhere."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        if a is b:
            return a
        a, b = alike(a, b)
        mask = rows.to(a.device).view(-1, *[1] * (a.dim() - 1))
        return torch.where(mask, a, b.to(a.dtype))

    return tree_map(choose, *aligned(new, old))
