"""HMT: what the invariants do not ask of every memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memwrap.testing.helpers import SEGMENT, assert_close, error_of, ids, padded, wrapped

TEXT = ids(1, 4 * SEGMENT)


@torch.no_grad()
def logits_in_pieces(model: Any, sizes: list[int]) -> Tensor:
    state, pieces = model.new_state(1), []
    for piece in TEXT.split(sizes, 1):
        pieces.append(model(piece, cache=state).logits)
    return torch.cat(pieces, 1)


def test_the_default_by_hand() -> None:
    """Three segments through the backbone alone, as the page writes them."""
    model = wrapped("hmt", write_token="learned", summary_fraction=0.25)
    memory, base = model.memories["hmt"], model.backbone
    embed, hidden_of = model.get_input_embeddings(), model.get_decoder()

    def last(*parts: Tensor) -> Tensor:
        return hidden_of(inputs_embeds=torch.cat(parts, 1)).last_hidden_state

    with torch.no_grad():
        segments = embed(TEXT).split(SEGMENT, 1)
        initial, topic = memory.tokens[None], memory.summary[None]
        prompt, sensory, cache, logits = initial, segments[0][:, :0], [], []
        for segment in segments:
            hidden = last(prompt, sensory, segment, initial)
            first = 1 + sensory.shape[1]
            logits.append(base.get_output_embeddings()(hidden[:, first : first + SEGMENT]))
            cache = [*cache, hidden[:, -1]][-3:]
            query = memory.query(last(topic, segment[:, -2:], initial)[:, -1])
            keys = memory.key(torch.stack(cache, 1))
            weights = ((keys @ query[0]) / 8**0.5).softmax(-1)
            prompt = (weights[..., None] * torch.stack(cache, 1)).sum(1, keepdim=True)
            sensory = segment[:, -3:]
        assert_close(model(TEXT).logits, torch.cat(logits, 1))
        state = model.read(TEXT)
        assert_close(memory.cache_weights(state.memories["hmt"])[0], weights[0])


def test_the_cache_keeps_the_newest_and_its_weights_sum_to_one() -> None:
    model = wrapped("hmt")
    state, seen = model.new_state(2), []
    texts, mask = padded([ids(1, 5 * SEGMENT)[0], ids(1, 2 * SEGMENT, seed=1)[0]], "right")
    for part, real in zip(texts.split(SEGMENT, 1), mask.split(SEGMENT, 1), strict=True):
        state = model.read(part, real, state=state)
        tree = state.memories["hmt"]
        seen.append(tree["cache"][0, int(tree["count"][0]) - 1])
        for weights, count in zip(
            model.memories["hmt"].cache_weights(tree), tree["count"].tolist(), strict=True
        ):
            assert weights.shape == (count,)
            assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
            assert not weights.requires_grad
    assert tree["count"].tolist() == [3, 2]
    assert torch.equal(tree["cache"][0], torch.stack(seen[-3:]))
    assert bool((tree["cache"][1, 2] == 0).all())


def test_sensory_tokens_are_the_last_ones_read_however_few() -> None:
    model = wrapped("hmt")
    rows = [ids(1, n, seed=n)[0] for n in (SEGMENT, 2, SEGMENT + 1)]
    for side in ("left", "right"):
        state = model.close_segment(model.read(*padded(rows, side)))
        tree = state.memories["hmt"]
        assert tree["num_sensory"].tolist() == [3, 2, 1]
        for index, row in enumerate(rows):
            count = int(tree["num_sensory"][index])
            want = model.get_input_embeddings()(row[-count:])
            assert torch.equal(tree["sensory"][index, :count], want)
            assert bool((tree["sensory"][index, count:] == 0).all())


def test_padding_that_counts_hides_from_the_topic() -> None:
    """With `count_padding` rows are cut by columns; what stands at padding changes nothing."""
    model = wrapped("hmt", count_padding=True, num_sensory=0)
    text, mask = padded([TEXT[0], TEXT[0, 5:]], "left")
    with torch.no_grad():
        want = model(text, attention_mask=mask).logits
        got = model(text.masked_fill(mask == 0, 77), attention_mask=mask).logits
    assert_close(got, want, 1e-6)
    assert_close(got[0], model(TEXT).logits[0].detach())


@pytest.mark.parametrize("settings", [{"num_sensory": 0}, {"recall": False}, {"cache_size": 1}])
def test_smaller_variants_read_in_pieces(settings: dict[str, Any]) -> None:
    model = wrapped("hmt", **settings)
    with torch.no_grad():
        want = model(TEXT).logits
    assert_close(logits_in_pieces(model, [3, 11, 1, 9, 8]), want)
    names = {n for n, _ in model.memories["hmt"].named_parameters()}
    assert ("query.weight" in names) == settings.get("recall", True)
    text = TEXT.repeat(2, 1)
    model.train()(text, labels=text).loss.backward()
    assert all(p.grad is not None for p in model.memory_parameters())


def test_write_tokens_differ() -> None:
    logits = {}
    for token in ("recalled", "learned"):
        with torch.no_grad():
            logits[token] = wrapped("hmt", write_token=token)(TEXT).logits
    assert error_of(logits["learned"], logits["recalled"]) > 1e-2
