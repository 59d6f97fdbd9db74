"""The loss of a model that learns to give another's distribution (Memory Decoder's loss).

Shapes: N predicted tokens, V the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive(logits: Tensor, targets: Tensor, probs: Tensor, share: float) -> Tensor:
    """Compute as specified, one token after the other: `share` times the mean of
    sum_v P_v (log P_v - log softmax(s)_v), and the rest of the cross entropy with `targets`."""
    total = logits.new_zeros(())
    for scores, target, p in zip(logits, targets.tolist(), probs, strict=True):
        logs = scores.softmax(0).log()
        apart = sum(p[v] * (p[v].log() - logs[v]) for v in range(len(p)) if p[v] > 0)
        total = total + share * apart - (1 - share) * logs[target]
    return total / len(targets)


def imitation_losses(logits: Tensor, targets: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both parts of the loss, means over N.

    Args:
        logits: `(N, V)` of the model that learns.
        targets: `(N,)` the tokens that came.
        probs: `(N, V)` the distribution to follow; rows of zeros (there is none) count as no
            divergence.

    Returns:
        The divergence KL(probs || softmax(logits)), and the cross entropy with the targets.
    """
    logs = logits.log_softmax(-1)
    apart = F.kl_div(logs, probs.to(logs.dtype), reduction="none").sum(-1)
    return apart.mean(), F.nll_loss(logs, targets)


def imitation_loss(logits: Tensor, targets: Tensor, probs: Tensor, share: float = 0.5) -> Tensor:
    """Compute `share` times the divergence and the rest of the cross entropy; see
    `imitation_losses`."""
    apart, surprise = imitation_losses(logits, targets, probs)
    return torch.lerp(surprise, apart, share)
