"""What a memory sums over segments: how large it is, and what keeps it from growing.

A memory names such tensors of a layer's tree (`Memory.sums`). All of a head are scaled and measured
together: what most methods read is a quotient of two sums, a weighted mean of what was written.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Memory
from memwrap.memories.settings import Range
from memwrap.ops import accumulation_dtype
from memwrap.state.trees import Tree

TINY = 1e-12


class SummedConfig(MemoryConfig):
    """Fields of every memory whose state is a sum over segments.

    Attributes:
        state_decay: whenever a segment closes, the sums are multiplied by it before they are
            written to. 1: nothing is forgotten.
        read_cap: what a token (of a head) reads is scaled down to so many times the norm of what it
            is added to. `None`: added as it is.
    """

    not_in_state: ClassVar[frozenset[str]] = frozenset({"state_decay", "read_cap"})

    state_decay: Annotated[float, Range(above=0, most=1)] = 1.0
    read_cap: Annotated[float, Range(above=0)] | None = None

    def capped(self, read: Tensor, beside: Tensor) -> Tensor:
        """Scale what is `read` to keep to `read_cap` where it is added to `beside` `(..., D)`;
        columns of it behind the first D are scaled along."""
        if self.read_cap is None:
            return read
        wide, columns = accumulation_dtype(read), beside.shape[-1]
        size, other = (
            torch.linalg.vector_norm(x[..., :columns], dim=-1, keepdim=True, dtype=wide)
            for x in (read.to(wide), beside.to(wide))
        )
        most = self.read_cap * other + TINY
        return read * (most / torch.maximum(size, most)).to(read.dtype)


def decayed(memory: Memory, layer: int, state: Tree) -> Tree:
    """Let a layer's sums decay, which a memory is about to write to as a segment closes."""
    config, names = memory.config, [name for name in memory.sums if name in state]
    if not names or not isinstance(config, SummedConfig) or config.state_decay == 1:
        return state
    first, rate = memory.sums_before(layer), config.state_decay
    return state | {n: state[n] * rate + first.get(n, 0.0) * (1 - rate) for n in names}


def state_norms(memory: Memory, tree: Tree) -> dict[int, Tensor]:
    """Compute the norm of what a memory has summed in its state, `(B,)` by layer: of the head where
    it is largest."""
    norms: dict[int, Tensor] = {}
    for layer, state in tree.get("layers", {}).items():
        if names := [name for name in memory.sums if name in state]:
            first, heads = memory.sums_before(int(layer)), state[names[0]].dim() - 2
            sums = [(state[n] - first.get(n, 0.0)).flatten(heads) for n in names]
            by_head = torch.linalg.vector_norm(torch.cat(sums, -1), dim=-1)
            norms[int(layer)] = by_head.flatten(1).amax(1)
    return norms
