"""Gradients that are computed while a call still reads, so that its graph does not grow.

Where memories are detached (`bptt_segments`), the segments before have nothing more to do with
those that follow. The gradients of their loss are computed right there, and their graph is let go;
the call's backward pass multiplies them by the gradient of the sum of losses, and adds them as if
the graph had been kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PLAIN = (Tensor, torch.nn.Parameter)


class EarlyGradients:
    """The sum of losses whose graph was let go, and its gradients.

    Args:
        embeds: the call's embeddings, which are asked for gradients instead of what they are made
            of; None: the call has ids.
    """

    def __init__(self, embeds: Tensor | None) -> None:
        self._embeds = embeds if embeds is not None and embeds.requires_grad else None
        self._total: Tensor | None = None
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, loss: Tensor) -> bool:
        """Compute a loss's gradients; its graph is no longer needed.

        Returns:
            False where that would not be the same, and nothing was done: float16 needs the scale
            that the final loss has, sharded weights their own backward pass, and hooks run once
            a call.
        """
        inputs = self._inputs(loss)
        if inputs is None or not all(map(_usual, inputs)):
            return False
        # A graph that windows share (of weights that are computed) has to last.
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        for tensor, gradient in zip(inputs, gradients, strict=True):
            if gradient is not None:
                known = self._found.get(id(tensor))
                total = gradient if known is None else known[1] + gradient
                self._found[id(tensor)] = tensor, total
        self._total = loss.detach() if self._total is None else self._total + loss.detach()
        return True

    @property
    def loss(self) -> Tensor | None:
        """The sum of all losses, whose backward pass gives the gradients; None: there are none."""
        if self._total is None:
            return None
        tensors, gradients = zip(*self._found.values(), strict=True) if self._found else ((), ())
        return _Given.apply(self._total, gradients, *tensors)

    def _inputs(self, loss: Tensor) -> list[Tensor] | None:
        """Find the leaves of a loss's graph, and the embeddings; None if it has no graph."""
        if loss.grad_fn is None:
            return None
        ends = None if self._embeds is None else self._embeds.grad_fn
        leaves: dict[int, Tensor] = {}
        waiting: list[Any] = [loss.grad_fn]
        seen = {loss.grad_fn}
        while waiting:
            node = waiting.pop()
            if node is ends and self._embeds is not None:
                leaves[id(self._embeds)] = self._embeds
                continue
            if hasattr(node, "variable"):
                leaves[id(node.variable)] = node.variable
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return list(leaves.values())


def _usual(tensor: Tensor) -> bool:
    """Tell whether a tensor's gradient is the same when it comes in parts, and early."""
    hooked = bool(tensor._backward_hooks) or tensor.retains_grad
    kind = tensor.device.type
    half = tensor.dtype == torch.float16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    )
    return type(tensor) in _PLAIN and tensor.numel() > 0 and not (hooked or half)


class _Given(torch.autograd.Function):
    """A number with gradients that are known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: Any, *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, None, *(g * gradient.to(g.dtype) for g in ctx.gradients)
