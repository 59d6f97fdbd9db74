"""Invariant 11: every way to generate agrees with recomputation from scratch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_greedy,
    assert_memory_matters,
    assert_same_states,
    ids,
    needs_ids,
    padded,
    pairs,
    wrapped,
)

# Every length ends in another place of a segment; answers cross a segment's end.
NEW = SEGMENT + 1
NO_END: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
GREEDY: dict[str, Any] = {**NO_END, "do_sample": False}


@pairs("branches")
def test_greedy_equals_recomputation(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    assert_memory_matters(model, ids(1, 2 * SEGMENT))
    # Another family than llama has no other arithmetic of places in a segment: over one end.
    llama = family == "llama"
    for length in (3, SEGMENT, 2 * SEGMENT + 3) if llama else (2 * SEGMENT - 3,):
        prompt, new = ids(1, length, seed=length), NEW if llama else 6
        got = model.generate(prompt, **{**GREEDY, "max_new_tokens": new})
        assert torch.equal(got[:, :length], prompt) and got.shape[1] == length + new
        assert_greedy(model, prompt, got[:, length:], length)


@pairs()
def test_left_padded_prompts(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    rows = [ids(1, n, seed=n)[0] for n in (2 * SEGMENT + 3, SEGMENT, 3)]
    text, mask = padded(rows, "left")
    got = model.generate(text, attention_mask=mask, **GREEDY)[:, text.shape[1] :]
    for index, row in enumerate(rows):
        assert_greedy(model, row[None], got[index : index + 1], index)
    assert got.shape == (len(rows), NEW)
    text, mask = padded(rows, "right")
    with pytest.raises(ValueError, match="left"):
        model.generate(text, attention_mask=mask, **GREEDY)


@pytest.mark.long
@pairs()
def test_sampling_equals_recomputation(memory: str, family: str) -> None:
    model, prompt = wrapped(memory, family), ids(2, SEGMENT + 2)
    torch.manual_seed(5)
    got = model.generate(prompt, **NO_END, do_sample=True, top_k=0, temperature=0.7)
    torch.manual_seed(5)
    text = prompt
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(text, use_cache=False).logits[:, -1] / 0.7
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], 1)
    assert torch.equal(got, text)
    torch.manual_seed(6)
    assert not torch.equal(model.generate(prompt, **NO_END, do_sample=True, top_k=0), got)


@pytest.mark.long
@pairs()
def test_beams_equal_recomputation(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    rows = [ids(1, n, seed=n)[0] for n in (2 * SEGMENT + 3, SEGMENT - 1)]
    text, mask = padded(rows, "left")
    new = 6  # the first row closes a segment with its fifth
    settings = {**GREEDY, "max_new_tokens": new, "num_beams": 3, "num_return_sequences": 2}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    got = model.generate(text, attention_mask=mask, **settings)
    want = model.generate(text, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.sequences_scores, want.sequences_scores)
    origins = got.beam_indices[:, :new]
    assert bool((origins != origins[:, :1]).any())  # beams changed places, so states had to
    alone = model.generate(rows[1][None], **settings)
    assert torch.equal(got.sequences[2:, text.shape[1] :], alone.sequences[:, len(rows[1]) :])


@pytest.mark.long
@pairs()
def test_scores_streamer_and_embeddings(memory: str, family: str) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, prompt = wrapped(memory, family), ids(1, 2 * SEGMENT + 3)
    streamer = Collect()
    settings = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(prompt, **GREEDY, **settings, streamer=streamer)
    assert streamer.ended and streamer.ids == out.sequences[0].tolist()
    with torch.no_grad():
        logits = model(out.sequences[:, :-1]).logits[:, prompt.shape[1] - 1 :]
    assert_close(torch.stack(out.logits, 1), logits)
    plain = model.generate(prompt, **GREEDY)
    assert torch.equal(plain, out.sequences)
    assert torch.equal(model.generate(prompt, **GREEDY, use_cache=False), plain)
    if needs_ids(model):
        return
    embeds = model.get_input_embeddings()(prompt)
    from_embeds = model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(from_embeds, plain[:, prompt.shape[1] :])


@pytest.mark.long
@pairs()
def test_chunked_prefill(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    rows = [ids(1, n, seed=n)[0] for n in (2 * SEGMENT + 3, SEGMENT)]
    text, mask = padded(rows, "left")
    for kwargs in ({"inputs": text, "attention_mask": mask}, {"inputs": text[:1]}):
        want = model.generate(**kwargs, **GREEDY)
        assert torch.equal(model.generate(**kwargs, **GREEDY, prefill_chunk_size=5), want)


@pairs()
def test_continuing_a_state(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    book, question = ids(1, 2 * SEGMENT + 1), ids(1, 4, seed=3)
    whole = torch.cat([book, question], 1)
    state = model.read(book)
    before = state.clone()
    new_only = model.generate(question, cache=state, **GREEDY)
    assert torch.equal(new_only[:, : question.shape[1]], question)
    assert new_only.shape[1] == question.shape[1] + NEW
    assert_greedy(model, whole, new_only[:, question.shape[1] :])
    full_ids = model.generate(whole, cache=state, **GREEDY)
    assert torch.equal(full_ids, torch.cat([book, new_only], 1))
    assert_same_states(state, before, 0.0)  # read once, ask many times
    forgotten = model.generate(question, **GREEDY)
    assert not torch.equal(forgotten, new_only), "the book does not matter here"
    for rows, sizes in (("num_beams", 3), ("num_return_sequences", 2)):
        sampled = rows == "num_return_sequences"
        settings = {**GREEDY, "max_new_tokens": 5, rows: sizes, "do_sample": sampled}
        torch.manual_seed(0)
        got = model.generate(question, cache=state, **settings)
        torch.manual_seed(0)
        ref = model.generate(whole, **settings)
        assert torch.equal(got, ref[:, book.shape[1] :]), rows


@pytest.mark.long
@pairs()
def test_one_state_serves_a_batch_of_questions(memory: str, family: str) -> None:
    model, book = wrapped(memory, family), ids(1, 2 * SEGMENT + 5)
    state = model.read(book)
    rows = [ids(1, n, seed=n)[0] for n in (6, 2)]
    text, mask = padded(rows, "left")
    got = model.generate(text, attention_mask=mask, cache=state, **GREEDY)
    for index, row in enumerate(rows):
        answer = got[index : index + 1, text.shape[1] :]
        assert_greedy(model, torch.cat([book, row[None]], 1), answer, index)
    assert got.shape == (2, text.shape[1] + NEW)
    assert state.batch_size == 1


@pytest.mark.long
@pairs()
def test_generated_text_is_remembered(memory: str, family: str) -> None:
    model, prompt = wrapped(memory, family), ids(1, SEGMENT + 5)
    out = model.generate(prompt, **GREEDY, return_dict_in_generate=True)
    state = out.cache
    read = out.sequences[:, : int(state.tokens_seen)]
    assert read.shape[1] in (out.sequences.shape[1], out.sequences.shape[1] - 1)
    assert int(state.segments) == read.shape[1] // SEGMENT == 2
    assert_same_states(state, model.read(read))
    # The next turn: the ids that were not read yet, and a question.
    turn = torch.cat([out.sequences, ids(1, 3, seed=4)], 1)
    # An answer may hold the id of padding, which transformers would take for it without a mask.
    real = torch.ones_like(turn)
    want = model.generate(turn, attention_mask=real, cache=state, **GREEDY)
    assert torch.equal(want[:, : turn.shape[1]], turn) and want.shape[1] == turn.shape[1] + NEW
    assert_greedy(model, turn, want[:, turn.shape[1] :])
    new, real = turn[:, read.shape[1] :], real[:, read.shape[1] :]
    got = model.generate(new, attention_mask=real, cache=state, **GREEDY)
    assert torch.equal(got, want[:, read.shape[1] :])


@pairs()
def test_without_remembering_the_last_segment_stays_open(memory: str, family: str) -> None:
    model, prompt = wrapped(memory, family), ids(1, SEGMENT + 5)
    out = model.generate(prompt, remember=False, return_dict_in_generate=True, **GREEDY)
    state = out.cache
    assert int(state.segments) == 1 and int(state.fill) == int(state.tokens_seen) - SEGMENT
    want = model.generate(prompt, **GREEDY)
    cut = 2 * SEGMENT - prompt.shape[1]
    assert torch.equal(out.sequences[:, : prompt.shape[1] + cut], want[:, : prompt.shape[1] + cut])


@pairs()
def test_a_state_held_open_can_remember_again(memory: str, family: str) -> None:
    """`remember=False` is said of one call: a later one writes full segments as always."""
    model, prompt = wrapped(memory, family), ids(1, SEGMENT + 5)
    settings = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True}
    state = model.generate(prompt, remember=False, **settings).cache
    assert (int(state.segments), int(state.fill)) == (1, SEGMENT - 1)
    after = model.read(ids(1, SEGMENT + 1, seed=2), state=state)
    assert (int(after.segments), int(after.fill)) == (3, 0)
    closed = model.read(ids(1, SEGMENT, seed=2), state=model.close_segment(state))
    assert (int(closed.segments), int(closed.fill)) == (3, 0)
    # Also where the open segment has grown beyond a segment's size.
    state = model.generate(prompt, **{**settings, **GREEDY}, remember=False).cache
    assert int(state.fill) > SEGMENT and int(state.segments) == 1
    closed = model.read(ids(1, SEGMENT, seed=2), state=model.close_segment(state))
    assert (int(closed.segments), int(closed.fill)) == (3, 0)
    longer = model.read(ids(1, SEGMENT, seed=2), state=state)
    assert int(longer.tokens_seen) == int(state.tokens_seen) + SEGMENT
    assert int(longer.segments) >= 2


@pytest.mark.long
@pairs()
def test_states_of_different_readings_answer_together(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    books = [ids(1, n, seed=n) for n in (2 * SEGMENT + 5, 3)]
    questions = [ids(1, n, seed=n)[0] for n in (6, 2)]
    state = memwrap.MemoryState.cat([model.read(book) for book in books])
    text, mask = padded(questions, "left")
    got = model.generate(text, attention_mask=mask, cache=state, **GREEDY)
    for index, (book, question) in enumerate(zip(books, questions, strict=True)):
        answer = got[index : index + 1, text.shape[1] :]
        assert_greedy(model, torch.cat([book, question[None]], 1), answer, index)
    assert got.shape == (2, text.shape[1] + NEW)


@pytest.mark.long
@pairs()
def test_rows_that_end_early_do_not_disturb_others(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    for seed in range(20):
        text = ids(2, SEGMENT + 1, seed=seed)
        plain = model.generate(text, **GREEDY)
        first, second = plain[:, text.shape[1] :].tolist()
        places = [i for i in range(1, NEW - 1) if first[i] not in (*first[:i], *second)]
        if places:
            break
    else:
        pytest.fail("no prompts whose answers differ: greedy repeats itself")
    end = places[0]
    got = model.generate(text, **{**GREEDY, "eos_token_id": first[end]})
    assert torch.equal(got[1], plain[1])
    assert got[0, text.shape[1] :].tolist() == first[: end + 1] + [0] * (NEW - 1 - end)


@pytest.mark.long
@pairs()
def test_assisted_decoding_equals_greedy(memory: str, family: str) -> None:
    """Drafts that are refused, in the middle of a segment and over its end, leave no trace."""
    model, book, question = wrapped(memory, family), ids(1, SEGMENT + 3), ids(1, 6, seed=1)
    options = {**GREEDY, "return_dict_in_generate": True}
    want = model.generate(question, cache=(state := model.read(book)), **options)
    drafts = {"prompt_lookup_num_tokens": 3}, {"assistant_model": build("llama")}
    for drafted in drafts:
        for prompt in (question, torch.cat([book, question], 1)):
            got = model.generate(prompt, cache=state, **drafted, **options)
            assert torch.equal(got.sequences[:, -NEW:], want.sequences[:, -NEW:]), drafted
            assert_same_states(got.cache, want.cache, 1e-5)


@pairs()
def test_crop_takes_tokens_back(memory: str, family: str) -> None:
    model, book, more = wrapped(memory, family), ids(1, SEGMENT + 5), ids(1, 6, seed=1)
    state = model.read(book)
    state.activate_past_recording()
    with torch.no_grad():
        for piece in more.split([2, 4], 1):  # the segment closes in the second
            model(piece, cache=state)
        state.crop(-5)
        assert state.get_seq_length() == book.shape[1] + 1
        want = model(torch.cat([more[:, :1], book], 1), cache=model.read(book)).logits[:, 1:]
        assert_close(model(book, cache=state).logits, want, 1e-5)


def test_what_was_not_recorded_is_taken_back_within_the_open_segment(memory: str) -> None:
    model = wrapped(memory)
    state = model.read(ids(2, SEGMENT + 5))
    keeps = state.droppable
    assert keeps in (0, 5)
    for count in (-6, 1, -2 * SEGMENT):
        with pytest.raises(ValueError, match=r"taken back|take back"):
            state.crop(count)
    state.crop(-keeps)
    assert_same_states(state, model.read(ids(2, SEGMENT + 5)[:, : SEGMENT + 5 - keeps]), 1e-5)
    assert state.get_seq_length() == SEGMENT + 5 - keeps


def test_what_cannot_work_says_why(memory: str) -> None:
    model, prompt = wrapped(memory), ids(1, SEGMENT)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(prompt, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="MemoryState"):
        model.generate(prompt, cache=DynamicCache(), **GREEDY)
    state = model.read(ids(2, 5))
    with pytest.raises(ValueError, match="rows"):
        model.generate(ids(3, 4), cache=state, **GREEDY)
    with pytest.raises(ValueError, match=r"new token|empty"):
        model.generate(cache=model.read(prompt), **GREEDY)
