"""Landmark attention: the grouped softmax, and the choice and reading of stored blocks.

Mohtashami and Jaggi, "Landmark Attention" (2023), sections 3.1 and 3.2. A block is m tokens and
one landmark behind them. A query weighs the tokens of its own block and the landmarks of earlier
blocks in one softmax; what a landmark gets is shared out among its block's tokens by a softmax over
these. The values of landmarks are never read.

Shapes: B batch, H query heads, Hkv KV heads (query head h belongs to KV head `h // (H / Hkv)`,
which is never repeated), T queries, K keys, N blocks, m tokens of a block, R blocks that a query
reads. Scores and sums are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from memwrap.ops.landmark.blocks import (
    block_scores,
    choose,
    merge,
    queries_for,
    read_slots,
    shares,
    used_blocks,
)
from memwrap.ops.landmark.chunked import AT_ONCE, SAVED, again_later
from memwrap.ops.landmark.naive import grouped_softmax
from memwrap.ops.landmark.op import attention, retrieved

__all__ = [
    "AT_ONCE", "SAVED", "again_later", "attention", "block_scores", "choose", "grouped_softmax",
    "merge", "queries_for", "read_slots", "retrieved", "shares", "used_blocks",
]  # fmt: skip
