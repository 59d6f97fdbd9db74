"""The delta rule in fast torch; formulas in `memwrap.ops.delta`."""

from __future__ import annotations

from torch import Tensor


def scan_chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`delta.scan`."""
    from memwrap.ops.delta import _scan_naive

    return _scan_naive(q, k, v, beta, g, state, scale)
