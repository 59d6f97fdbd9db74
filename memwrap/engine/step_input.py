"""The tensors of one step: what the backbone is given, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memwrap.engine.insertion import Inserted


@dataclass
class Layout:
    """The input of one step.

    Attributes:
        x: `(B, N', D)`: prefix, tokens, suffix, each if any row has it now.
        valid: `(B, N')` bool.
        places: `(B, N')` order inside the segment: what masks are made of.
        position_ids: `(B, N')` where the backbone is told other positions, else None.
        first: columns of the prefix.
        base: `(B,)` rows of the prefix in front of each row's tokens.
        marked: `(B, N')` bool, columns of inserted tokens.
        among: where tokens and those inserted among them stand behind the prefix, if any are.
    """

    x: Tensor
    valid: Tensor
    places: Tensor
    position_ids: Tensor | None
    first: int
    base: Tensor
    marked: Tensor
    among: Inserted | None

    def tokens(self, hidden: Tensor, columns: int, predicting: bool = False) -> Tensor:
        """The tokens' hidden states `(B, N, D)`; `predicting`: at those that predict what
        follows, which may be an inserted token."""
        if self.among is None:
            return hidden[:, self.first : self.first + columns]
        index = self.first + (self.among.after if predicting else self.among.tokens)
        return hidden.gather(1, _wide(index, hidden))

    def spread(self, ids: Tensor) -> Tensor:
        """The tokens' ids `(B, N)` at their columns of the input, -1 elsewhere: `(B, N', 1)`."""
        among = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        index = self.first + (among if self.among is None else self.among.tokens.to(ids.device))
        empty = ids.new_full(self.x.shape[:2], -1)
        # Where there is no token stands -1, which takes no place from another.
        return empty.scatter_reduce(1, index, ids, "amax").unsqueeze(-1)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """An index `(B, N)` of the rows of `like` `(B, N', D)`, as gather wants it."""
    return index.to(like.device)[..., None].expand(-1, -1, like.shape[-1])
