"""Exact searches never hold queries x entries: the largest tensor of any operation is bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memwrap.ops import neighbours, retrieve
from memwrap.ops.retrieve.chunked import _SCORES_AT_ONCE
from memwrap.stores import TorchStore


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.itemsize)
        return result


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-2]))


def nearest(queries: int, entries: int, k: int) -> None:
    neighbours.nearest(drawn(queries, 4), drawn(entries, 4), k)


def stored(queries: int, entries: int, k: int) -> None:
    store = TorchStore(4)
    store.add(drawn(entries, 4))
    store.search(drawn(queries, 4), k)


def heads(queries: int, entries: int, k: int) -> None:
    """Four heads that search two: a row of queries in all."""
    query, keys = drawn(1, 4, queries // 4, 4), drawn(1, 2, entries, 4)
    there = torch.ones(1, entries, dtype=torch.bool)
    retrieve.attend(query, keys, keys, there, k, scale=1.0, similarity="cosine")


SEARCHES = {
    "nearest": (nearest, neighbours._BLOCK),
    "TorchStore": (stored, neighbours._BLOCK),
    "retrieval attention": (heads, _SCORES_AT_ONCE),
}


@pytest.mark.parametrize(("queries", "entries"), [(100, 400_000), (6000, 6000), (120_000, 300)])
@pytest.mark.parametrize("name", SEARCHES)
def test_no_tensor_is_as_large_as_all_scores(name: str, queries: int, entries: int) -> None:
    search: Callable[[int, int, int], None] = SEARCHES[name][0]
    limit = SEARCHES[name][1]
    with Largest() as seen:
        search(queries, entries, 4)
    # A chunk's scores with the best so far beside them, and what was given and is returned.
    allowed = 1.1 * limit + 2 * 4 * (queries + entries)
    assert seen.elements <= allowed < 0.8 * queries * entries
