"""What the kernels' tests share: one op under every implementation, outputs and gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memwrap.ops import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def results(name: str, function: Callable[..., Sequence[Tensor]], *leaves: Tensor) -> list[Tensor]:
    """Outputs and the gradients of their weighted sum, with one implementation."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    with backend(name):
        outputs = function(*leaves)
    loss = sum(
        (x * draw(*x.shape, seed=70 + n, dtype=x.dtype)).sum() for n, x in enumerate(outputs)
    )
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    unused = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [x.detach().float().cpu() for x in [*outputs, *unused]]


def agree(got: list[Tensor], want: list[Tensor], tolerance: float, dtype: torch.dtype) -> None:
    """Largest difference over largest value; gradients rounded to a half type get its step.

    The inputs are of size 1. Results below 0.05 are compared as if they were 0.05: some gradients
    are 0 by cancellation (one channel: the read does not depend on the query).
    """
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert bool(a.isfinite().all()), f"result {n} is not finite"
        if not b.numel():
            continue
        allowed = tolerance if dtype == torch.float32 else tolerance + torch.finfo(dtype).eps
        error = float((a - b).abs().max() / b.abs().max().clamp_min(0.05))
        assert error <= allowed, f"result {n}: {error:.1e} > {allowed:.1e}"


def opcheck(operator: Any, given: tuple[Any, ...]) -> None:
    """torch's own check of an operator; 2.15 looks at gradients there that it warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(operator, given)
