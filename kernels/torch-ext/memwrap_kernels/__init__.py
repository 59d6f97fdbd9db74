"""Triton kernels of the memories, importable alone: needs torch and triton only.

`infini` holds the compressive memory of Infini-attention, `infini_scan` its way over all segments
of a sequence, `armt` the associative one of ARMT,
`landmark` the grouped softmax of Landmark attention, `gla` gated linear attention, `delta` the
(gated) delta rule and the recurrent step for decoding.
`memwrap.ops` chooses these kernels for tensors on a GPU; TRITON_INTERPRET=1 in the environment,
set before the first import, runs them on a CPU in Triton's interpreter (slow, for tests).
"""

from . import armt, delta, gla, infini, infini_scan, landmark
from .launch import interpreted, runs_on
from .tiles import MAX_HEAD_DIM

__all__ = [
    "MAX_HEAD_DIM", "armt", "delta", "gla", "infini", "infini_scan", "interpreted", "landmark",
    "runs_on",
]  # fmt: skip
