"""Several turns with one state: rows that ended, masks that say so, beams, and what re-reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

import memwrap
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_greedy,
    assert_same_states,
    ids,
    padded,
    wrapped,
)

NEW = 2 * SEGMENT
SETTINGS: dict[str, Any] = {
    "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True,
}  # fmt: skip


def first_turn(model: Any, **settings: Any) -> tuple[Any, Tensor, int]:
    """Two rows answered together of which the first ends early: the output, the whole text's mask,
    and the columns of the first row's own text."""
    for seed in range(20):
        prompt = ids(2, SEGMENT + 2, seed=seed)
        free = model.generate(prompt, **{**SETTINGS, "eos_token_id": None}).sequences
        one, other = free[:, prompt.shape[1] :].tolist()
        ends = [t for t in one[: NEW // 2] if t not in other]
        if ends:
            break
    else:
        pytest.fail("no prompts whose answers differ")
    out = model.generate(prompt, **{**SETTINGS, "eos_token_id": ends[0], **settings})
    own = prompt.shape[1] + one.index(ends[0]) + 1
    mask = torch.ones_like(out.sequences)
    mask[0, own:] = 0
    return out, mask, own


@pytest.mark.parametrize("memory", ["rmt", "armt", "window", "infini", "compressive", "landmark"])
def test_a_row_that_ended_reads_nothing_more(memory: str) -> None:
    model = wrapped(memory)
    out, mask, own = first_turn(model)
    state, text = out.cache, out.sequences
    assert state.tokens_seen.tolist() == [own, text.shape[1] - 1]
    assert_same_states(state.select(torch.tensor([0])), model.read(text[:1, :own]))
    question = ids(1, 5, seed=8)
    alone = model(torch.cat([text[:1, :own], question], 1)).logits[:, -5:]
    fed = torch.cat([text[:, state.columns :], question.expand(2, -1)], 1)
    whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    for given in (whole, whole[:, -fed.shape[1] :]):
        got = model(fed, cache=state.clone(), attention_mask=given).logits
        assert_close(got[:1, -5:], alone, label="the row that ended early")
    # The same through generate: with all ids, the mask given or made from the padding.
    turn = torch.cat([text, question.expand(2, -1)], 1)
    again = {**SETTINGS, "max_new_tokens": 6, "eos_token_id": None, "cache": state}
    want = model.generate(turn, **again, attention_mask=whole).sequences[:1, -6:]
    assert_greedy(model, torch.cat([text[:1, :own], question], 1), want)
    assert torch.equal(model.generate(turn, **again).sequences[:1, -6:], want)
    new = model.generate(fed, attention_mask=whole, **again).sequences
    assert torch.equal(new[:1, -6:], want)


def test_a_mask_that_contradicts_what_was_read_is_an_error() -> None:
    model = wrapped("rmt")
    rows = [ids(1, n, seed=n)[0] for n in (11, 5)]
    text, mask = padded(rows, "left")
    state = model.read(text, mask)
    new, one = ids(2, 3), torch.ones(2, 3, dtype=torch.long)
    right = torch.cat([mask, one], 1)
    model(new, cache=state.clone(), attention_mask=right)
    other = padded(rows, "right")[1]  # as many tokens, in other places
    for wrong in (torch.ones(2, 14), torch.cat([other, one], 1)):
        with pytest.raises(ValueError, match="row 1 marks other padding"):
            model(new, cache=state.clone(), attention_mask=wrong.long())
        with pytest.raises(ValueError, match="row 1 marks other padding"):
            model.generate(new, cache=state, attention_mask=wrong.long(), **SETTINGS)
    for length in (7, 20):
        with pytest.raises(ValueError, match=f"covers {length} tokens; there are 3 new ones after"):
            model(new, cache=state.clone(), attention_mask=torch.ones(2, length))
    with pytest.raises(ValueError, match=r"covers 5 tokens; there are 3 new ones\."):
        model(new, attention_mask=torch.ones(2, 5))
    # Padding that is also the end of text cannot be told from it.
    whole = torch.cat([text.masked_fill(mask == 0, 9), new], 1)
    read = model.read(whole[:, :11], mask)
    with pytest.raises(ValueError, match="give `attention_mask`"):
        model.generate(whole, cache=read, **{**SETTINGS, "pad_token_id": 0})


def test_the_mask_is_known_after_saving_selecting_and_in_pieces(tmp_path: Any) -> None:
    model = wrapped("rmt")
    rows = [ids(1, n, seed=n)[0] for n in (11, 5)]
    text, mask = padded(rows, "left")
    state = model.read(text, mask)
    pieces = model.read(text[:, 4:], mask[:, 4:], state=model.read(text[:, :4], mask[:, :4]))
    assert torch.equal(pieces.mask_hash, state.mask_hash)
    state.save(tmp_path / "state.safetensors")
    loaded = memwrap.MemoryState.load(tmp_path / "state.safetensors", model)
    assert torch.equal(loaded.mask_hash, state.mask_hash)
    one = state.select(torch.tensor([1])).repeat(2)
    whole = torch.cat([mask[1:].expand(2, -1), torch.ones(2, 2, dtype=torch.long)], 1)
    model(ids(2, 2), cache=one, attention_mask=whole)


class AfterFive(StoppingCriteria):
    """Ends every row after five tokens, without an end of text."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.arange(len(input_ids)) + 5 <= input_ids.shape[1] - self.prompt  # type: ignore[return-value]


def test_rows_that_other_criteria_end() -> None:
    model, prompt = wrapped("rmt"), ids(3, SEGMENT)
    criteria = StoppingCriteriaList([AfterFive(SEGMENT)])
    out = model.generate(prompt, **SETTINGS, eos_token_id=127, stopping_criteria=criteria)
    assert out.sequences.shape[1] == SEGMENT + 7
    assert out.cache.tokens_seen.tolist() == [SEGMENT + 5, SEGMENT + 6, SEGMENT + 6]
    for row in (0, 1):
        want = model.read(out.sequences[row : row + 1, : SEGMENT + 5 + row])
        assert_same_states(out.cache.select(torch.tensor([row])), want)


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_the_state_after_beams_is_that_of_the_answers(beams: dict[str, int]) -> None:
    model = wrapped("armt")
    book, question = ids(1, SEGMENT + 5), ids(2, 4, seed=3)
    state = model.read(book)
    plain = model.generate(question, cache=state, **SETTINGS, **beams, eos_token_id=None)
    end = int(plain.sequences[0, -3])
    out = model.generate(question, cache=state, **SETTINGS, **beams, eos_token_id=end)
    assert out.cache.batch_size == len(out.sequences)
    for row, answer in enumerate(out.sequences):
        text = answer[: 4 + int((out.beam_indices[row] >= 0).sum())]
        text = text[: len(answer) - 1]  # the last column is read with the next turn
        want = model.read(text[None], state=state)
        got = out.cache.select(torch.tensor([row]))
        assert_same_states(got, want)
        follow = ids(1, 3, seed=9)
        assert_close(
            model(follow, cache=got).logits, model(follow, cache=want.clone()).logits, label="after"
        )


def test_what_reads_the_prompt_again_is_refused_with_a_state() -> None:
    model = wrapped("window")
    state, question = model.read(ids(1, 20)), ids(1, 4, seed=2)
    settings = {**SETTINGS, "eos_token_id": None}
    before = model.generate(question, cache=state, **settings).sequences
    for given in (
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "paged"},
        {"return_legacy_cache": True},
        {"assistant_early_exit": 1},
        {"use_cache": False, "num_beams": 2},
    ):
        with pytest.raises(ValueError):
            model.generate(question, cache=state, **settings, **given)
    assert torch.equal(model.generate(question, cache=state, **settings).sequences, before)
    # Without a state it reads everything for every token, and gives the same.
    whole = torch.cat([ids(1, 20), question], 1)
    again = model.generate(whole, **settings, use_cache=False).sequences
    assert torch.equal(again[:, -NEW:], before[:, -NEW:])


def test_embeddings_continue_a_state() -> None:
    model = wrapped("armt")
    state, question = model.read(ids(1, 20)), ids(1, 30, seed=2)
    want = model.generate(question, cache=state, **SETTINGS).sequences[:, 30:]
    embeds = model.get_input_embeddings()(question)
    for rows in (embeds, embeds[:, :12]):
        got = model.generate(inputs_embeds=rows, cache=state, **SETTINGS).sequences
        if rows.shape[1] == 30:
            assert torch.equal(got, want)
    short = model.generate(question[:, :12], cache=state, **SETTINGS).sequences[:, 12:]
    assert torch.equal(got, short)


@pytest.mark.parametrize("name", ["do_sample", "num_beams"])
def test_the_models_own_settings_count_too(name: str) -> None:
    """Rows are repeated by what `generate` resolves, from the keywords, the config given or the
    model's own."""
    model = wrapped("rmt")
    state, question = model.read(ids(1, 20)), ids(1, 4, seed=2)
    settings: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"num_beams": 3} if name == "num_beams" else {"num_return_sequences": 3}
    if name == "do_sample":
        settings["do_sample"] = True
    torch.manual_seed(0)
    want = model.generate(question, cache=state, **settings)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    torch.manual_seed(0)
    got = model.generate(question, cache=state)
    assert torch.equal(got, want)


def test_the_mask_is_known_after_crop() -> None:
    model = wrapped("rmt")
    rows = [ids(1, n, seed=n)[0] for n in (SEGMENT + 5, SEGMENT + 2)]
    text, mask = padded(rows, "left")
    state = model.read(text, mask)
    state.crop(-2)
    want = model.read(text[:, :-2], mask[:, :-2])
    assert torch.equal(state.mask_hash, want.mask_hash)
    whole = torch.cat([mask[:, :-2], torch.ones(2, 3, dtype=torch.long)], 1)
    model(ids(2, 3), cache=state, attention_mask=whole)
