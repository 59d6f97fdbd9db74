"""A tree over segments: which beginnings of texts were read, and the states after them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock

from memwrap.state.memory_state import MemoryState

Ids = tuple[int, ...]


@dataclass
class _Node:
    """The texts that begin with the same closed segments.

    Attributes:
        children: by the ids of the next segment.
        states: by the ids behind the last whole segment; `()` at its end.
    """

    behind: str = ""
    parent: _Node | None = None
    segment: Ids = ()
    children: dict[Ids, _Node] = field(default_factory=dict)
    states: dict[Ids, MemoryState] = field(default_factory=dict)


class PrefixTree:
    """States by the ids that were read, found again by the longest beginning of a text.

    The least recently used are dropped where they take more than `most_bytes`. States share
    tensors, so that this is an upper bound.

    Args:
        segment_size: tokens in a segment.
        most_bytes: of all states together.
    """

    def __init__(self, segment_size: int, most_bytes: int) -> None:
        self.segment_size, self.most_bytes = segment_size, most_bytes
        self._roots: dict[str, _Node] = {}
        self._used: OrderedDict[tuple[int, Ids], tuple[_Node, int]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._used)

    def longest(self, ids: list[int], behind: str = "") -> tuple[MemoryState | None, int]:
        """Find the state of the longest beginning of `ids` that leaves at least one to read.

        Args:
            ids: of a whole text.
            behind: names what was read before them; texts behind different things never meet.

        Returns:
            The state and the number of ids it has read; None and 0 if no beginning was read.
        """
        with self._lock:
            best: tuple[_Node, Ids, int] | None = None
            node, depth = self._roots.get(behind, _Node()), 0
            while True:
                rest = tuple(ids[depth : depth + self.segment_size])
                known = [
                    t for t in node.states if t == rest[: len(t)] and depth + len(t) < len(ids)
                ]
                if known:
                    tail = max(known, key=len)
                    best = node, tail, depth + len(tail)
                following = node.children.get(rest)
                if following is None:
                    break
                node, depth = following, depth + self.segment_size
            if best is None:
                return None, 0
            node, tail, count = best
            self._used.move_to_end((id(node), tail))
            return node.states[tail], count

    def put(self, ids: list[int], state: MemoryState, behind: str = "") -> None:
        """Keep the state after `ids`."""
        with self._lock:
            node, depth = self._roots.setdefault(behind, _Node(behind)), 0
            while depth + self.segment_size <= len(ids):
                segment = tuple(ids[depth : depth + self.segment_size])
                node = node.children.setdefault(segment, _Node(behind, node, segment))
                depth += self.segment_size
            tail = tuple(ids[depth:])
            key = (id(node), tail)
            if key in self._used:
                self._bytes -= self._used[key][1]
            node.states[tail] = state
            self._used[key] = node, state.nbytes
            self._used.move_to_end(key)
            self._bytes += state.nbytes
            while self._bytes > self.most_bytes and self._used:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        (_, tail), (node, size) = self._used.popitem(last=False)
        self._bytes -= size
        del node.states[tail]
        while node.parent is not None and not node.states and not node.children:
            del node.parent.children[node.segment]
            node = node.parent
        if node.parent is None and not node.states and not node.children:
            self._roots.pop(node.behind, None)


__all__ = ["PrefixTree"]
