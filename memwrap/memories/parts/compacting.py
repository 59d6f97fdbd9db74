"""Compacting and joining states as a whole: what the model asks of a memory that can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from memwrap.memories.parts.slots import Rows
from memwrap.memories.protocol import Memory
from memwrap.state.trees import Tree


@dataclass
class Request:
    """The wish that layers compact all that they hold.

    Attributes:
        limit: slots of a KV head.
        kept: the fit is to the queries that were kept; otherwise to the step's own.
        measures: the layers also say what that costs.
        trees: the layers' new trees, by number.
        errors: `(Hkv,)` of the layers' heads, by number: the mean square error of their output, in
            parts of what all heads of the layer give.
    """

    limit: int
    kept: bool
    measures: bool = False
    trees: dict[str, Tree] = field(default_factory=dict)
    errors: dict[int, Tensor] = field(default_factory=dict)


_request: ContextVar[Request | None] = ContextVar("memwrap_compact_request", default=None)


class Compacts(Memory):
    """A memory whose states can be compacted and joined as a whole.

    Attributes:
        chosen: layers that have slots, but for those with a window of their own.
    """

    config: Any
    chosen: Sequence[int]

    def has_queries(self, tree: Tree) -> bool:
        """Tell whether all rows of a state hold queries of their text."""
        return False

    def joined(self, trees: Sequence[Tree]) -> Tree:
        """Join the trees of several states of as many rows each, so that one row holds what all of
        its row hold."""
        raise NotImplementedError

    def rows_of(self, layer: int, tree: Tree) -> Rows:
        """Take all rows of a layer's tree, in the order of the text."""
        raise NotImplementedError

    def with_rows(self, layer: int, tree: Tree, rows: Rows) -> Tree:
        """Put rows into an empty layer's tree."""
        raise NotImplementedError

    @contextmanager
    def compacting(self, limit: int, kept: bool, measures: bool = False) -> Iterator[Request]:
        """Let a step inside the block (in this thread) compact every layer before it attends, so
        that later layers see what is already compacted."""
        request = Request(limit, kept, measures)
        token = _request.set(request)
        try:
            yield request
        finally:
            _request.reset(token)

    @property
    def request(self) -> Request | None:
        """The request of the block that runs."""
        return _request.get()
