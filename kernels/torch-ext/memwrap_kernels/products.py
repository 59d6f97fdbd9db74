"""Matrix products inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Compute `a b` in float32. "wide" is for Triton's interpreter, which multiplies the bits of
    bfloat16 tensors as if they were integers: they are made float32 first."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)
