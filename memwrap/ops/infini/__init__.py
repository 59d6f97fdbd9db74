"""The compressive memory of Infini-attention: features, reading, writing, whole sequences.

Munkhdalai et al., "Leave No Context Behind" (2024), section 2.1. One matrix M maps key
features to values, z normalises it. Shapes: B batch, H query heads, Hkv key-value heads
(query head h uses memory `h // (H / Hkv)`), T tokens, Dk and Dv channels of a head.
M is `(B, Hkv, Dk, Dv)`, z is `(B, Hkv, Dk)`.

The sums are kept in float32 (float64 for float64 inputs) whatever the inputs' dtype. Queries
and keys come un-rotated and unscaled: the memory knows no positions.
"""

from __future__ import annotations

from memwrap.ops.infini.chunked import phi
from memwrap.ops.infini.op import EPS, UPDATES, read, scan, write

__all__ = ["EPS", "UPDATES", "phi", "read", "scan", "write"]
