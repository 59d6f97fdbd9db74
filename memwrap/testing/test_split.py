"""Invariant 1: logits and states do not depend on how tokens are fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memwrap.engine.plan import segment_lengths
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_memory_matters,
    assert_same_states,
    ids,
    needs_ids,
    padded,
    pairs,
    wrapped,
)

TOTAL = 3 * SEGMENT + 3


@torch.no_grad()
def fed(model: Any, text: Tensor, sizes: list[int], **kwargs: Any) -> tuple[Tensor, Any]:
    """Logits and state of a text fed in pieces of the given sizes."""
    state = model.new_state(text.shape[0])
    pieces = []
    for piece in text.split(sizes, 1):
        out = model(piece, cache=state, **kwargs)
        assert out.cache is state
        pieces.append(out.logits)
        assert state.get_seq_length() == sum(p.shape[1] for p in pieces)
    return torch.cat(pieces, 1), state


@pairs("branches")
def test_chunks_and_single_tokens_give_what_the_whole_gives(memory: str, family: str) -> None:
    # Another family than llama has no other arithmetic of places: single tokens over one end.
    feeds = [[5, 3, 1, 10, 8], [1] * TOTAL] if family == "llama" else [[6, *[1] * 4, 9]]
    model, text = wrapped(memory, family), ids(2, sum(feeds[0]))
    assert_memory_matters(model, ids(1, 2 * SEGMENT))
    want, state = fed(model, text, [text.shape[1]])
    full = text.shape[1] // SEGMENT
    assert state.segments.tolist() == [full, full] and state.fill.tolist() == [3, 3]
    for sizes in feeds:
        got, other = fed(model, text, sizes)
        assert_close(got, want, label=f"logits fed in {sizes}")
        assert_same_states(other, state)
    if family == "llama":  # on the others generation is compared with it
        with torch.no_grad():
            without_state = model(text, use_cache=False)
        assert without_state.cache is None
        assert_close(without_state.logits, want, label="logits without a state")


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@pytest.mark.long
@pairs()
@settings(max_examples=6)
@given(sizes=SIZES)
def test_any_chunk_sizes(memory: str, family: str, sizes: list[int]) -> None:
    model, text = wrapped(memory, family), ids(1, sum(sizes))
    want, state = fed(model, text, [sum(sizes)])
    got, other = fed(model, text, sizes)
    assert_close(got, want)
    assert_same_states(other, state)


@pairs("places", families=("llama", "gemma2", "gemma3", "gpt2"))
def test_eager_attention_too(memory: str, family: str) -> None:
    base = build(family, attention="eager")
    model, text = wrapped(memory, base=base), ids(2, TOTAL)
    want, _ = fed(model, text, [TOTAL])
    got, _ = fed(model, text, [5, 3, 1, 10, 8])
    assert_close(got, want)
    with torch.no_grad():
        if family != "gemma2":  # its sdpa is refused by transformers: soft caps
            other = wrapped(memory, family)
            assert other.config._attn_implementation == "sdpa"
            assert_close(other(text).logits, want)


@pairs()
def test_reading_equals_forward(memory: str, family: str) -> None:
    model, text = wrapped(memory, family), ids(2, TOTAL)
    _, want = fed(model, text, [TOTAL])
    state = model.read(text[:, :13])
    before = state.clone()
    after = model.read(text[:, 13:], state=state)
    assert_same_states(after, want)
    assert_same_states(state, before, 0.0)  # read leaves the given state as it is
    rows = model.read([text[0].tolist(), text[1, :9].tolist()])
    assert rows.tokens_seen.tolist() == [TOTAL, 9]
    assert_same_states(rows.select(torch.tensor([0])), want.select(torch.tensor([0])))
    tail = ids(2, 4, seed=3)
    with torch.no_grad():
        got = model(tail, cache=after).logits
        whole = model(torch.cat([text, tail], 1)).logits[:, TOTAL:]
    assert_close(got, whole)


@pairs()
def test_a_second_pass_is_the_text_once_more(memory: str, family: str) -> None:
    model, text = wrapped(memory, family), ids(2, TOTAL)
    rows = [text[0].tolist(), text[1, :9].tolist()]
    if any(m.claims.lengthens for m in model.memories.values()):
        with pytest.raises(ValueError, match=r"`passes` is 2.*entries of the text.*Read once"):
            model.read(rows, passes=2)
        return
    state = model.read(rows, passes=2)
    assert state.tokens_seen.tolist() == [2 * TOTAL, 18]
    assert state.segments.tolist() == [2 * TOTAL // SEGMENT, 18 // SEGMENT]
    for number, row in enumerate(rows):
        alone = state.select(torch.tensor([number]))
        assert_same_states(alone, model.read([row + row]))
    with pytest.raises(ValueError, match="at least 1"):
        model.read(rows, passes=0)


@pairs()
def test_embeddings_give_what_ids_give(memory: str, family: str) -> None:
    model, text = wrapped(memory, family), ids(2, TOTAL)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(text)
        if needs_ids(model):
            with pytest.raises(ValueError, match=r"keeps the ids.*`input_ids`"):
                model(inputs_embeds=embeds)
            return
        got, want = model(inputs_embeds=embeds).logits, model(text).logits
    assert_close(got, want)


@pytest.mark.long
@pairs()
def test_logits_to_keep(memory: str, family: str) -> None:
    model, text = wrapped(memory, family), ids(2, TOTAL)
    with torch.no_grad():
        want = model(text).logits
        assert_close(model(text, logits_to_keep=1).logits, want[:, -1:])
        assert_close(model(text, logits_to_keep=7).logits, want[:, -7:])
        columns = torch.tensor([0, 9, 20])
        assert_close(model(text, logits_to_keep=columns).logits, want[:, columns])


@pairs()
def test_closing_a_segment_writes_it(memory: str, family: str) -> None:
    """A closed short segment is remembered; what follows opens a new segment."""
    model, text = wrapped(memory, family), ids(2, 5)
    open_state = model.read(text)
    closed = model.close_segment(open_state)
    assert open_state.fill.tolist() == [5, 5] and closed.fill.tolist() == [0, 0]
    assert closed.segments.tolist() == [1, 1] and closed.tokens_seen.tolist() == [5, 5]
    assert_same_states(model.close_segment(closed), closed, 0.0)
    # The same as a model whose segments are that short.
    assert_same_states(closed, wrapped(memory, family, segment_size=5).read(text))


@pairs()
@pytest.mark.parametrize(
    "alignment", ["right", *(pytest.param(a, marks=pytest.mark.long) for a in ("left", "center"))]
)
def test_alignments_cut_where_they_say(memory: str, family: str, alignment: str) -> None:
    """A text in one call is its segments one by one, each closed."""
    model = wrapped(memory, family, alignment=alignment)
    rows = [ids(1, n, seed=n) for n in (2 * SEGMENT + 4, SEGMENT + 1)]
    with torch.no_grad():
        for row in rows:
            state, pieces = model.new_state(1), []
            for piece in row.split(segment_lengths(row.shape[1], SEGMENT, alignment), 1):
                pieces.append(model(piece, cache=state).logits)
                state = model.close_segment(state)
            assert_close(model(row).logits, torch.cat(pieces, 1))
        text, mask = padded([row[0] for row in rows], "left")
        logits = model(text, attention_mask=mask).logits
        for index, row in enumerate(rows):
            assert_close(logits[index][mask[index].bool()], model(row).logits[0])
