"""What is made of a tensor and kept beside it, for as long as the tensor lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Weak: what is kept goes with the tensor that it was made of. Calls in several threads may share
# it: whichever writes last has written the same.
_KEPT: Any = WeakIdKeyDictionary()


def kept_beside(tensor: Tensor, name: Hashable, make: Callable[[], Any]) -> Any:
    """Compute `make()`, which is always the same for this very tensor, to which nobody writes, and
    `name`; and keep it, except where gradients are recorded."""
    if torch.is_grad_enabled():
        return make()
    known = _KEPT.get(tensor)
    if known is not None and name in known:
        return known[name]
    made = make()
    if made is not tensor:  # or it would live for ever
        _KEPT[tensor] = {**(_KEPT.get(tensor) or {}), name: made}
    return made
