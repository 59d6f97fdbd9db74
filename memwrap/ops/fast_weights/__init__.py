"""Fast weights: a small network whose weights are the state, and one step on them a segment.

LaCT: Zhang et al., "Test-Time Training Done Right" (2025); Titans: Behrouz et al., "Learning to
Memorize at Test Time" (2025). Shapes: B batch, G networks of a row, H query heads (head h reads
network `h // (H / G)`), T tokens, Dk, Dv and Dh widths of a key, a value and inside. A network is a
tuple of matrices `(B, G, out, in)`:

    swiglu   W0, W2 `(Dh, Dk)`, W1 `(Dv, Dh)`     f(x) = W1 (silu(W0 x) * (W2 x))
    linear   W0 `(Dv, Dk)`                        f(x) = W0 x
    mlp      W0 `(Dh, Dk)`, W1 `(Dv, Dh)`, Dk=Dv  f(x) = x + W1 silu(W0 x)

A segment's tokens all take their gradient at the weights that the segment found, so that one step
is a few matrix products. Its formulas are closed: gradients flow through them by plain autograd.
"""

from __future__ import annotations

from memwrap.ops.fast_weights.networks import NETWORKS, Weights, gate_sums, shapes
from memwrap.ops.fast_weights.op import orthogonalized, read, write
from memwrap.ops.fast_weights.rules import STEPS, FastMemory, StepRule, WriteGates

__all__ = [
    "NETWORKS",
    "STEPS",
    "FastMemory",
    "StepRule",
    "Weights",
    "WriteGates",
    "gate_sums",
    "orthogonalized",
    "read",
    "shapes",
    "write",
]
