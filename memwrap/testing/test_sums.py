"""Invariant 12: what sums over segments can be kept small, whatever way its tokens are fed."""

from __future__ import annotations

from typing import Any

import torch

from memwrap.memories.parts.sums import SummedConfig
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_states,
    error_of,
    gradients,
    ids,
    padded,
    pairs,
    tiny,
    wrapped,
)

TOTAL = 3 * SEGMENT + 3
GUARDS: dict[str, Any] = {"state_decay": 0.5, "read_cap": 0.05}


@pairs(having="sums")
def test_decay_and_cap_do_not_depend_on_feeding(memory: str, family: str) -> None:
    model = wrapped(memory, family, **GUARDS)
    rows = [ids(1, n, seed=n)[0] for n in (TOTAL, 2 * SEGMENT, SEGMENT + 1)]
    with torch.no_grad():
        alone = [model(row[None]) for row in rows]
        text, mask = padded(rows, "left")
        batch = model(text, attention_mask=mask)
        state = model.new_state(1)
        pieces = rows[0][None].split([5, 1, 9, 12], 1)
        fed = [model(piece, cache=state).logits for piece in pieces]
    assert_close(torch.cat(fed, 1), alone[0].logits, label="fed in pieces")
    assert_same_states(state, alone[0].cache)
    for index, single in enumerate(alone):
        got = batch.logits[index][mask[index].bool()]
        assert_close(got, single.logits[0], label=f"row {index}")
        assert_same_states(batch.cache.select(torch.tensor([index])), single.cache)


@pairs(having="sums", families=("llama",))
def test_decay_and_cap_do_what_they_say(memory: str, family: str) -> None:
    """None of them by default; a cap that nothing reaches changes nothing."""
    text = ids(2, TOTAL)
    plain = tiny(memory)
    assert isinstance(plain, SummedConfig)
    assert (plain.state_decay, plain.read_cap) == (1.0, None)
    with torch.no_grad():
        model = wrapped(memory, family)
        logits, state = (want := model(text)).logits, want.cache
        far = wrapped(memory, family, read_cap=1e6)(text)
        near = wrapped(memory, family, read_cap=1e-3)(text)
        faded = wrapped(memory, family, state_decay=1e-3)(text)
    assert_close(far.logits, logits, label="a cap that nothing reaches")
    norms = model.state_norms(state)[memory]
    assert norms and all(norm.shape == (2,) and bool((norm > 0).all()) for norm in norms.values())
    for name, out in (("read_cap", near), ("state_decay", faded)):
        assert error_of(out.logits[:, SEGMENT:], logits[:, SEGMENT:]) > 1e-3, name


@pairs(having="sums", families=("llama",))
def test_gradients_pass_a_decay_and_a_cap(memory: str, family: str) -> None:
    """Also before the first write, where a read of zeros meets the cap."""
    model, text = wrapped(memory, family, **GUARDS).train(), ids(2, TOTAL)
    model(text, labels=text).loss.backward()
    grads = gradients(model)
    assert grads and all(bool(g.isfinite().all()) for g in grads.values())
    others = wrapped(memory, family).train()
    others(text, labels=text).loss.backward()
    assert any(not torch.allclose(g, grads[n]) for n, g in gradients(others).items())


@pairs(having="sums", families=("llama",))
def test_a_state_can_be_continued_with_other_settings(memory: str, family: str) -> None:
    model, text = wrapped(memory, family), ids(1, TOTAL)
    with torch.no_grad():
        state = model(text[:, : 2 * SEGMENT]).cache
        plain = model(text[:, 2 * SEGMENT :], cache=state.clone()).logits
        before = model.memory_settings(memory, **GUARDS)
        assert before == {"state_decay": 1.0, "read_cap": None}
        other = model(text[:, 2 * SEGMENT :], cache=state.clone()).logits
        want = wrapped(memory, family, **GUARDS)(text[:, 2 * SEGMENT :], cache=state).logits
    assert torch.equal(other, want)
    assert error_of(other, plain) > 1e-3
