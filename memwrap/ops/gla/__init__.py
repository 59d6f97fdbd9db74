"""Gated linear attention: a matrix that forgets by a gate and takes in one key and value a token.

Yang et al., "Gated Linear Attention Transformers" (2023), eq. 3; without a gate it is plain
linear attention, with a gate that is one number a head RetNet and Mamba-2. Shapes: B rows, H
query heads, Hkv key-value heads (query head h reads state `h // (H / Hkv)`), T tokens, Dk and Dv
channels of a head. For each token, the old state decays by the token's own gate, the token is
written, and the query reads what is there then:

    S_t = exp(g_t) * S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

No feature map, no normaliser and no positions: those belong to the memories that use it.
"""

from __future__ import annotations

from memwrap.ops.gla.op import scan

__all__ = ["scan"]
