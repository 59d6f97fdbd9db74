"""MemoryPrompt: the frozen model, what the network is told, closing without a suffix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memwrap
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_states,
    error_of,
    gradients,
    ids,
    wrapped,
)

NAME = "memoryprompt"
TEXT = ids(2, 3 * SEGMENT + 3)


@pytest.mark.parametrize("settings", [{}, {"memory_size": None}, {"pooling": "mean"}])
def test_three_segments_by_hand(settings: dict[str, Any]) -> None:
    model = wrapped(NAME, **settings)
    memory, embed = model.memories[NAME], model.get_input_embeddings()
    with torch.no_grad():
        logits, prompt, state = [], None, None
        for part in TEXT[:, : 3 * SEGMENT].split(SEGMENT, 1):
            parts = [embed(part)] if prompt is None else [prompt, embed(part)]
            hidden = model.get_decoder()(inputs_embeds=torch.cat(parts, 1)).last_hidden_state
            hidden = hidden[:, -SEGMENT:]
            logits.append(model.get_output_embeddings()(hidden))
            told = hidden.mean(1) if settings.get("pooling") == "mean" else hidden[:, -1]
            state = memory.lstm(memory.mlp(told), state)
            if memory.project is None:
                prompt = state[0].view(2, 2, -1)
            else:
                prompt = memory.tokens + memory.project(state[0]).view(2, 2, -1)
        assert_close(model(TEXT[:, : 3 * SEGMENT]).logits, torch.cat(logits, 1))
        read = model.new_state(2)
        pieces = [model(p, cache=read).logits for p in TEXT.split([3, 11, 1, 12], 1)]
    assert_close(torch.cat(pieces, 1)[:, : 3 * SEGMENT], torch.cat(logits, 1))
    assert_close(read.memories[NAME]["hidden"], state[0])


def test_the_language_model_stays_frozen() -> None:
    model = wrapped(NAME)
    model.backbone.requires_grad_(False)
    before = {n: p.clone() for n, p in model.backbone.named_parameters()}
    optimizer = torch.optim.SGD(model.memory_parameters(), lr=0.1)
    model.train()(TEXT, labels=TEXT).loss.backward()
    optimizer.step()
    found = gradients(model)
    assert set(found) == {n for n, _ in model.named_parameters() if n.startswith("memory")}
    assert all(float(g.abs().max()) > 0 for g in found.values())
    assert all(torch.equal(p, before[n]) for n, p in model.backbone.named_parameters())


def test_closing_runs_no_token_through_the_backbone() -> None:
    """No suffix: what an open segment left is all that closing needs."""
    model = wrapped(NAME)
    state = model.read(TEXT[:, : SEGMENT + 3])
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the backbone was run"))
    closed = model.close_segment(state)
    assert closed.segments.tolist() == [2, 2] and closed.fill.tolist() == [0, 0]
    assert not closed.open.tree and state.fill.tolist() == [3, 3]
    changed = error_of(closed.memories[NAME]["hidden"], state.memories[NAME]["hidden"])
    assert changed > 1e-3
    assert_same_states(model.close_segment(closed), closed, 0.0)


def test_a_first_prompt_has_the_scale_of_embeddings() -> None:
    base = wrapped(NAME).backbone
    model = memwrap.wrap(base, "memoryprompt", segment_size=8)
    state = model.read(TEXT)
    with torch.no_grad():
        prompt = model.memories[NAME].prefix(state.memories[NAME])
        scale = float(prompt.std() / model.get_input_embeddings().weight.std())
    assert prompt.shape == (2, 5, 32) and 0.3 < scale < 5
