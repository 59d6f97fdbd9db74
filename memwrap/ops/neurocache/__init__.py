"""Neurocache: retrieved compressed states and the attention to them (Safaya and Yuret 2024).

Shapes: B batch, T queries, M columns that retrieve, k hits, n neighbours of a hit, N = k n, d width
of compressed states, C entries, w columns of context, h query heads, g KV heads, e head width.
"""

from __future__ import annotations

from memwrap.ops.neurocache.op import LAYOUTS, Layout, attend, context, neighbours, search_buckets

__all__ = ["LAYOUTS", "Layout", "attend", "context", "neighbours", "search_buckets"]
