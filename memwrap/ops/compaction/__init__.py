"""Compaction of keys and values to a few slots that act like all of them (attention matching).

Zweiger et al., "Fast KV Compaction via Attention Matching" (arXiv 2602.16284). A block of keys and
values acts on a query only by its softmax output and by its mass, the sum of exponentials. A slot
is one of the old keys, a value and a bias on its score; biases are fitted to the mass and values to
the output that reference queries find. Nothing is trained.

Shapes: B batch, H query heads, Hkv key-value heads, G = H / Hkv, N reference queries of a KV head
(those of its G query heads one after the other), T tokens, S slots, D and Dv channels.
"""

from __future__ import annotations

from memwrap.ops.compaction.budgets import best_of_all, capped_shares, slots_of_shares
from memwrap.ops.compaction.matching import Compacted, KeyValueBlock, Matching
from memwrap.ops.compaction.op import compact, fit, key_scores, stack_groups
from memwrap.ops.compaction.running_means import running_means

__all__ = [
    "Compacted",
    "KeyValueBlock",
    "Matching",
    "best_of_all",
    "capped_shares",
    "compact",
    "fit",
    "key_scores",
    "running_means",
    "slots_of_shares",
    "stack_groups",
]  # fmt: skip
