"""Several memories on one backbone, at places of their own."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from support import MEMORIES

import memwrap
from memwrap.memories.pairs import check_together
from memwrap.memories.protocol import InsertsTokens, places_of
from memwrap.memories.registry import memory_class
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    assert_close,
    assert_same_states,
    ids,
    padded,
    randomise,
    tiny,
    wrapped,
)


def fit(*names: str) -> bool:
    """Whether the memories need nothing that only one can have."""
    try:
        check_together({name: memory_class(name) for name in names})
    except ValueError:
        return False
    prefixes = [n for n in names if has_prefix(n)]
    cutting = [n for n in names if issubclass(memory_class(n), InsertsTokens)]
    return not (prefixes and cutting)


@cache
def has_prefix(name: str) -> bool:
    return bool(wrapped(name).memories[name].__dict__.get("num_prefix"))


PAIRS = [p for p in combinations(MEMORIES, 2) if fit(*p)]
# One pair of each two sorts of memories (by their places); the others are `slow`.
SORTS = {frozenset(tuple(places_of(memory_class(name))) for name in p): p for p in reversed(PAIRS)}
SLOW = [p if p in SORTS.values() else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS]


@pytest.mark.parametrize(("first", "second"), SLOW)
def test_two_memories(first: str, second: str, tmp_path: Path) -> None:
    base = build("llama")
    text = ids(1, 21)
    with torch.no_grad():
        before = base(text).logits
        model = randomise(memwrap.wrap(base, tiny(first), tiny(second)))
        want = model(text, use_cache=True)
        state = model.new_state(1)
        pieces = [model(p, cache=state).logits for p in text.split(3, 1)]
        assert_close(torch.cat(pieces, 1), want.logits, label="pieces")
        assert_same_states(state, want.cache)
        both, mask = padded([text[0], ids(13, seed=4)], "left")
        assert_close(model(both, attention_mask=mask).logits[0], want.logits[0], label="padding")
        model.save_pretrained(tmp_path)
        base = memwrap.unwrap(model)
        assert torch.equal(base(text).logits, before)
        assert torch.equal(memwrap.load(tmp_path, base)(text).logits, want.logits)


def test_some_memories_fit() -> None:
    assert len(SORTS) > 6 and ("armt", "infini") in PAIRS and ("infini", "rmt") in PAIRS
    newer = {("armt", "rmt"), ("armt", "hmt"), ("armt", "autocompressor")}
    assert newer | {("memoryprompt", "rmt"), ("armt", "landmark")} <= set(PAIRS)
    with pytest.raises(ValueError, match="first position, which the prefix of 'rmt' takes"):
        memwrap.wrap(build("llama"), tiny("landmark"), tiny("rmt"))
    with pytest.raises(ValueError, match="both attach at the attention place"):
        memwrap.wrap(build("llama"), tiny("infini"), tiny("window"))
