"""Trees of tensors: what a memory's state is made of.

A tree is a nested `dict[str, Tensor | dict]`; every tensor has the batch as its first
dimension. All that is done to a state (selecting rows, detaching, saving) is written here
once, for every memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Nested dicts whose leaves are tensors; a recursive type would only move the checks elsewhere.
Tree = dict[str, Any]


def tree_map(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Apply `function` to the tensors that stand at the same place in every tree."""
    result: Tree = {}
    for name, node in tree.items():
        peers = [other[name] for other in others]
        if isinstance(node, dict):
            result[name] = tree_map(function, node, *peers)
        else:
            result[name] = function(node, *peers)
    return result


def tree_leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield `(dotted name, tensor)` for every tensor of the tree."""
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from tree_leaves(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", node


def tree_build(leaves: dict[str, Tensor]) -> Tree:
    """The inverse of `tree_leaves`."""
    tree: Tree = {}
    for name, tensor in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tensor
    return tree


def where_rows(rows: Tensor, new: Tree, old: Tree) -> Tree:
    """Take `new` for the rows where `rows` (B,) is true, `old` elsewhere."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        a, b = alike(a, b)
        mask = rows.to(a.device).view(-1, *[1] * (a.dim() - 1))
        return torch.where(mask, a, b.to(a.dtype))

    return tree_map(choose, new, old)


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors with as many places: shorter buffers are padded with zeros."""
    if tensors[0].dim() < 3:
        return tensors
    most = max(t.shape[-2] for t in tensors)
    pad = torch.nn.functional.pad
    return tuple(
        t if t.shape[-2] == most else pad(t, (0, 0, 0, most - t.shape[-2])) for t in tensors
    )
