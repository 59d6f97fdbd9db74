"""Whole models: read in the segments that a case names, by the library's own rule or by request."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from memwrap.engine.plan import segment_lengths

ALIGNMENTS = {None: "left", "left (None)": "left", "left": "left", "right": "right",
              "center": "center"}  # fmt: skip


def alignment_of(case: Case) -> str:
    return case.among("segment_alignment", ALIGNMENTS)


def cuts_of(lengths: Sequence[int], total: int) -> list[slice]:
    """Columns of segments of these lengths, which must make up the text."""
    ends = list(accumulate(lengths))
    assert ends[-1] == total, f"segments of {list(lengths)} tokens do not make up {total}"
    return [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def size_for(lengths: Sequence[int]) -> int:
    """The segment size that cuts a text so; where none does, one that no segment fills."""
    regular = list(lengths) == segment_lengths(sum(lengths), lengths[0])
    return lengths[0] if regular else max(lengths) + 1


def next_tokens(ids: Tensor) -> Tensor:
    """Targets by predicting position."""
    return F.pad(ids[:, 1:], (0, 1), value=-100)


def by_segment(
    model: Any, ids: Tensor, lengths: Sequence[int], state: Any = None, *,
    close_last: bool = True, detach: bool = False,
) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """Logits, mean loss and state of a text, each segment a call and closed by request. Gradients
    flow from call to call, unless states are detached."""
    targets = next_tokens(ids)
    count = int((targets != -100).sum())
    state = model.new_state(len(ids)) if state is None else state
    logits, loss = [], torch.zeros((), dtype=model.dtype)
    cuts = cuts_of(lengths, ids.shape[1])
    for index, columns in enumerate(cuts):
        with torch.no_grad():
            logits.append(model(ids[:, columns], cache=state.clone()).logits)
        out = model(
            ids[:, columns], shift_labels=targets[:, columns], cache=state,
            num_items_in_batch=count,
        )  # fmt: skip
        loss, state = loss + out.loss, out.cache.detach() if detach else out.cache
        if index < len(cuts) - 1 or close_last:
            state = model.loop().close(state)
    return torch.cat(logits, 1), loss, state


def read(
    model: Any, ids: Tensor, lengths: Sequence[int], *, detach: bool = False
) -> tuple[Tensor, Tensor, Any]:
    """The same in one call, where the library cuts the text so by itself.

    Args:
        detach: no gradient passes from segment to segment; the model's config must say so too.
    """
    assert sum(lengths) == ids.shape[1], (
        f"segments of {list(lengths)} tokens do not make up {ids.shape[1]}"
    )
    if size_for(lengths) == max(lengths) + 1:
        return by_segment(model, ids, lengths, detach=detach)
    with torch.no_grad():
        logits = model(ids).logits
    out = model(ids, labels=ids, use_cache=True)
    return logits, out.loss, model.close_segment(out.cache)


def loss_per_segment(logits: Tensor, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The cross entropy inside each segment: its first token is no target."""
    return torch.stack(
        [
            F.cross_entropy(logits[:, c][:, :-1].flatten(0, 1), ids[:, c][:, 1:].flatten())
            for c in cuts_of(lengths, ids.shape[1])
        ]
    )


def shift_labels_of(case: Case) -> Tensor:
    """Targets by predicting position; `labels_mask` chooses among the predicting positions."""
    shifted = next_tokens(case.tensors["labels"])
    mask = case.given("labels_mask")
    return shifted if mask is None else shifted.masked_fill(~mask.bool(), -100)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, mask: Tensor | None, want: Tensor) -> Tensor:
    """Logits of the whole text; where the mask is 0 the reference's own are put in.

    The original also computes logits at padding; ours are zeros, and nobody reads either.
    """
    logits = model(ids, attention_mask=mask).logits
    return logits if mask is None else torch.where(mask[..., None].bool(), logits, want)


@torch.no_grad()
def states_by_segment(
    model: Any, ids: Tensor, mask: Tensor | None, lengths: Sequence[int]
) -> list[Any]:
    """States after each segment, read one at a time; a short one is closed by request."""
    state, states = model.new_state(len(ids)), []
    for columns in cuts_of(lengths, ids.shape[1]):
        part = None if mask is None else mask[:, columns]
        state = model.close_segment(model.read(ids[:, columns], part, state=state))
        states.append(state)
    return states


def generated(model: Any, ids: Tensor, count: int) -> Tensor:
    """`(B, count)` greedy new ids, the last segment left open, as published code generates."""
    out = model.generate(
        ids, remember=False, do_sample=False, eos_token_id=None, pad_token_id=0,
        max_new_tokens=count,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


@torch.no_grad()
def greedy(backbone: Any, embeds: Tensor, count: int) -> Tensor:
    """`(B, count)` new ids of a bare backbone, by argmax, the text computed anew for each."""
    ids = []
    for _ in range(count):
        ids.append(backbone(inputs_embeds=embeds).logits[:, -1:].argmax(-1))
        embeds = torch.cat([embeds, backbone.get_input_embeddings()(ids[-1])], 1)
    return torch.cat(ids, 1)
