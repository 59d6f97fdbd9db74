"""The delta rule: a matrix from which a key's old value is taken away before the new one is put in.

Schlag et al. (2021), "Linear Transformers Are Secretly Fast Weight Programmers", eq. 23; Yang et
al., "Parallelizing Linear Transformers with the Delta Rule" (2024) and "Gated Delta Networks"
(2024), eq. 10. Shapes as in `memwrap.ops.gla`. For each token:

    S' = exp(g_t) * S_{t-1}
    S_t = S' + k_t (beta_t * (v_t - k_t S'))^T        o_t = scale * q_t S_t

g_t may be a number for each key channel, a row of S: Kimi Delta Attention (Kimi Team 2025, "Kimi
Linear"). With a strength of erasing b_t for each key channel, beta_t is of the write alone (Gated
DeltaNet 2; b_t = beta_t is the line above):

    S_t = S' + k_t (beta_t * v_t - (b_t * k_t) S')^T

Keys longer than 1 make the recurrence unstable for beta near 1: give unit keys, or `l2norm`.
"""

from __future__ import annotations

from memwrap.ops.delta.chunked import EPS, unit
from memwrap.ops.delta.op import scan

__all__ = ["EPS", "scan", "unit"]
