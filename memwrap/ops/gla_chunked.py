"""Gated linear attention in fast torch; formulas in `memwrap.ops.gla`."""

from __future__ import annotations

from torch import Tensor


def scan_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`gla.scan`."""
    from memwrap.ops.gla import _scan_naive

    return _scan_naive(q, k, v, g, state, scale)
