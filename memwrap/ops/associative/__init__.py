"""The associative memory of ARMT: DPFP features, reading, writing.

Rodkin et al., "Associative Recurrent Memory Transformer" (2024), section 3. One matrix A
maps key features to values, z normalises it. Shapes: B batch, H heads, T queries, M written
tokens, K features a key, V value channels. A is `(B, H, K, V)`, z is `(B, H, K)`.

The sums are kept in float32 (float64 for float64 inputs) whatever the inputs' dtype.
`read_projected` and `write_projected` take queries and keys before the feature map, of width D
with `K = 2 nu D`: the kernels make the features themselves.
"""

from __future__ import annotations

from memwrap.ops.associative.chunked import EPS, dpfp, features
from memwrap.ops.associative.op import read, read_projected, write, write_projected

__all__ = ["EPS", "dpfp", "features", "read", "read_projected", "write", "write_projected"]
