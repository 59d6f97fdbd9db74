"""Rotary positions as the backbone computes them: rotate, and take the rotation back exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

Angles = tuple[Tensor, Tensor]


def rotate(x: Tensor, angles: Angles | None) -> Tensor:
    """Rotate the rotary part of `x` `(B, H, T, D)` by `(cos, sin)`, each `(B, T, R)` or, with
    angles of its own for each head, `(B, H, T, R)`; R <= D."""
    if angles is None:
        return x
    cos, sin = ((a[:, None] if a.dim() == 3 else a).to(x.dtype) for a in angles)
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([part * cos + _half(part) * sin, rest], -1)


# Weak: what is kept goes with the tensor that it was made of. Calls in several threads may share
# it: whichever writes last has written the same.
_ROTATED: Any = WeakIdKeyDictionary()


def rotate_static(x: Tensor, dtype: torch.dtype, angles: Callable[[], Angles | None]) -> Tensor:
    """Rotate `x` in `dtype` by angles that are always the same for this very tensor, which nobody
    writes to. The result is kept beside it, except where gradients are recorded."""
    if torch.is_grad_enabled():
        return rotate(x.to(dtype), angles())
    rotated = _ROTATED.get(x)
    if rotated is None or rotated.dtype != dtype:
        by = angles()
        if by is None:
            return x.to(dtype)
        rotated = _ROTATED[x] = rotate(x.to(dtype), by)
    return rotated


def unrotate(x: Tensor, angles: Angles | None) -> Tensor:
    """Undo `rotate`: by `(cos, -sin)`, divided by `cos^2 + sin^2`, since some rotary embeddings
    scale what they rotate. Computed in float32 (float64 for float64)."""
    if angles is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (a[:, None].to(wide) for a in angles)
    part, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
    back = (part * cos - _half(part) * sin) / (cos * cos + sin * sin)
    return torch.cat([back.to(x.dtype), rest], -1)


def _half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Rotary:
    """A backbone's own rotary module; absent where positions are learned.

    Args:
        decoder: looked through for the module.
        config: its `layer_types` choose the angles where they differ by layer.
    """

    def __init__(self, decoder: nn.Module, config: Any) -> None:
        modules = [m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")]
        self._module = modules[0] if modules else None
        self._types = getattr(config, "layer_types", None)
        self._by_type = (
            bool(modules) and "layer_type" in inspect.signature(type(modules[0]).forward).parameters
        )
        self.rotated: dict[int, bool] | None = None  # which layers rotate, once that is known

    @property
    def present(self) -> bool:
        return self._module is not None

    def kind(self, layer: int) -> str:
        """Name the layer's kind: layers of one kind share their angles; "" for a layer that does
        not rotate."""
        if self._module is None or (self.rotated is not None and not self.rotated[layer]):
            return ""
        return self._types[layer] if self._by_type else "all"  # type: ignore[index]

    def angles(self, positions: Tensor, layer: int, like: Tensor) -> Angles | None:
        """Compute `(cos, sin)`, each `(B, T, R)`, at `positions` `(B, T)` (negative and fractional
        ones too) for a layer; None where it does not rotate. `like` gives dtype and device."""
        kind = self.kind(layer)
        if not kind:
            return None
        module: Any = self._module
        extra = {"layer_type": kind} if self._by_type else {}
        return module(like, positions.to(like.device), **extra)
