"""Retrieval attention: every query attends to its `top_k` best entries of a large cache.

Shapes: B batch, H query heads, Hkv heads of the cache, G = H / Hkv, T queries, N entries, D and Dv
widths of keys and values, k = min(top_k, N). Query head h searches the cache of head h // G, which
is never repeated. Which entries are chosen has no gradient; their keys and values have.
"""

from __future__ import annotations

from memwrap.ops.retrieve.chunked import gather, normalise
from memwrap.ops.retrieve.op import SIMILARITIES, Read, attend, attend_to, search

__all__ = ["SIMILARITIES", "Read", "attend", "attend_to", "gather", "normalise", "search"]
