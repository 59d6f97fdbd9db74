"""What the backward pass computes once more instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` now and, instead of keeping what it needs for gradients, in the backward pass.

    That may come after the blocks around the call have ended (`ops.backend`, `Memory.only`), and in
    another thread, which has none of the variables of this one: so it gets a copy of them.
    """
    context = copy_context()
    return checkpoint(
        lambda *given: context.copy().run(function, *given), *args, use_reentrant=False
    )
