"""Mixtures of memories: a token is written to a few of M recurrent states, and read from these.

Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories" (2025), eq. 5-8. A state that a
token is not sent to neither takes anything in nor decays. M memories of B rows are B * M rows of an
op, each with a mask of its own, so that every recurrence with a `mask` can be mixed. Shapes: B
rows, T tokens, M memories, k of them a token; with a shared memory, which all tokens are sent to,
there are N = M + 1 states, the shared one last, else N = M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The memories that tokens are sent to.

    Attributes:
        probabilities: `(B, T, M)`, softmax of the router's logits.
        chosen: `(B, T, k)`, memories by falling probability; the first of equal ones comes first.
        weights: `(B, T, M)`, of what is read: probabilities of the chosen, divided by their sum; 0
            for the others.
    """

    probabilities: Tensor
    chosen: Tensor
    weights: Tensor

    @classmethod
    def of(cls, logits: Tensor, top_k: int) -> Routing:
        """Send tokens to their `top_k` memories; the choice has no gradient, the weights have."""
        probabilities = logits.softmax(-1)
        chosen = probabilities.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        kept = logits.gather(-1, chosen).softmax(-1)  # exactly 1, without a gradient, for one
        weights = torch.zeros_like(probabilities).scatter(-1, chosen, kept)
        return cls(probabilities, chosen, weights)

    def mask(self, valid: Tensor, shared: bool) -> Tensor:
        """Tell which tokens each state takes in, `(B * N, T)` bool; `valid` `(B, T)` are real."""
        sent = torch.zeros_like(self.weights, dtype=torch.bool).scatter(-1, self.chosen, True)
        sent = F.pad(sent, (0, 1), value=True) if shared else sent
        return (sent & valid[..., None]).transpose(1, 2).flatten(0, 1)

    def mixed(self, read: Tensor) -> Tensor:
        """Weigh what tokens read from the M memories `(B, M, H, T, D)`: `(B, H, T, D)`."""
        return torch.einsum("btm,bmhtd->bhtd", self.weights.to(read.dtype), read)

    def imbalance(self, valid: Tensor) -> Tensor:
        """Measure by row how unevenly tokens are sent, `(B,)`: k where all memories get the same,
        at most M (the Switch Transformer's loss, summed over ranks); 0 without real tokens."""
        real = valid[..., None].to(self.probabilities)
        count = real.sum(1).clamp_min(1)
        sent = F.one_hot(self.chosen, self.probabilities.shape[-1]).sum(-2) * real
        share, mean = sent.sum(1) / count, (self.probabilities * real).sum(1) / count
        return share.shape[-1] * (share * mean).sum(-1)
