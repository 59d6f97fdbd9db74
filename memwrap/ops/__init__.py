"""The mathematics of the memories as pure functions, and the choice of implementation.

`naive` is the specification, plain and slow; `torch` is the fast (chunked) one. Use
`with memwrap.ops.backend("naive"):` to force an implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

BACKENDS = ("auto", "naive", "torch", "triton")
_choice: ContextVar[str] = ContextVar("memwrap_ops_backend", default="auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block with one implementation: `"naive"`, `"torch"` or `"auto"`.

    Raises:
        ValueError: for an unknown name, or for one whose kernels are not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown ops backend {name!r}; allowed: {', '.join(BACKENDS)}.")
    if name == "triton":
        raise ValueError("The Triton kernels are not part of this version; use 'torch'.")
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def current_backend() -> str:
    """The implementation that an op called now will use: `"naive"` or `"torch"`."""
    return "naive" if _choice.get() == "naive" else "torch"


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 tensor: the dtype in which sums are kept."""
    return torch.promote_types(tensor.dtype, torch.float32)
