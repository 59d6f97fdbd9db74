"""What the recurrent ops share: checks, padding, and sequences that are joined into one row.

Shapes: B rows, H query heads, Hkv key-value heads, T tokens, Dk and Dv channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype


def check_sequences(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """Refuse queries, keys, values and a state that do not fit each other.

    Raises:
        ValueError: says what was got and what is needed.
    """
    if k.dim() != 4 or v.shape[:3] != k.shape[:3] or v.dim() != 4:
        raise ValueError(
            f"k is {list(k.shape)} and v is {list(v.shape)}; they must be (B, Hkv, T, Dk) and "
            "(B, Hkv, T, Dv)."
        )
    batch, heads, tokens, width = k.shape
    fits = q.dim() == 4 and (q.shape[0], *q.shape[2:]) == (batch, tokens, width)
    if not fits or q.shape[1] % heads:
        raise ValueError(
            f"q is {list(q.shape)}; for these keys it must be ({batch}, a multiple of {heads}, "
            f"{tokens}, {width})."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; they must be of one.")
    rows = batch
    if cu_seqlens is not None:
        rows = _check_cumulated(cu_seqlens, batch, tokens, mask)
    if state is not None:
        wanted = (rows, heads, width, v.shape[3])
        if state.shape != wanted or state.dtype != accumulation_dtype(q):
            raise ValueError(
                f"state is {list(state.shape)} of {state.dtype}; for these inputs it must be "
                f"{list(wanted)} of {accumulation_dtype(q)}."
            )
    if mask is not None and (mask.shape != (batch, tokens) or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {list(mask.shape)} of {mask.dtype}; it must be ({batch}, {tokens}) of "
            "torch.bool."
        )


def _check_cumulated(cu: Tensor, batch: int, tokens: int, mask: Tensor | None) -> int:
    """Return the number of sequences. What `cu` holds is looked at on the CPU only."""
    if batch != 1 or mask is not None:
        raise ValueError(f"cu_seqlens needs one row and no mask; there are {batch} rows.")
    if cu.dim() != 1 or len(cu) < 2 or cu.is_floating_point():
        raise ValueError(f"cu_seqlens is {list(cu.shape)} of {cu.dtype}; it must be N + 1 integers")
    if cu.device.type == "cpu":
        places = cu.tolist()
        if places[0] != 0 or places[-1] != tokens or places != sorted(places):
            raise ValueError(f"cu_seqlens is {places}; it must rise from 0 to {tokens}.")
    return len(cu) - 1


def masked_tokens(mask: Tensor, *tensors: Tensor | None) -> Any:
    """Fill tensors `(B, H, T, ...)` with zeros where `mask` `(B, T)` is false, NaN there too."""
    hidden = ~mask[:, None]
    return tuple(
        None if x is None else x.masked_fill(hidden.view(*hidden.shape, *[1] * (x.dim() - 3)), 0.0)
        for x in tensors
    )


def by_sequence(
    function: Callable[..., tuple[Tensor, Tensor]], cu_seqlens: Tensor,
    tensors: Sequence[Tensor | None], state: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run `function(*tensors, state, scale)` for each of the joined sequences."""
    places = cu_seqlens.tolist()
    outs, states = [], []
    for index, (start, end) in enumerate(pairwise(places)):
        part = [None if x is None else x[:, :, start:end] for x in tensors]
        out, last = function(*part, state[index : index + 1], scale)
        outs.append(out)
        states.append(last)
    return torch.cat(outs, 2), torch.cat(states)
