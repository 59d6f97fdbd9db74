"""Window policies: which layers have the window, and whether the tokens of an answer have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import with_masks
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    assert_close,
    assert_same_states,
    error_of,
    ids,
    padded,
    wrapped,
)

WINDOW, SEGMENT, TOTAL = 9, 7, 45


def causal(total: int = TOTAL) -> tuple[Tensor, Tensor]:
    """Who stands before whom, and who is in whose window, `(T, T)` bool."""
    distance = torch.arange(total)[:, None] - torch.arange(total)[None]
    return distance >= 0, (distance >= 0) & (distance < WINDOW)


def policy(base: Any = None, **settings: Any) -> Any:
    base = build("llama", attention="eager") if base is None else base
    given = {"segment_size": SEGMENT, "window_size": WINDOW, "num_sinks": 0, **settings}
    return memwrap.wrap(base, "window", **given).eval()


@pytest.mark.parametrize(("layers", "windowed"), [([1], [1]), ("alternate", [0])])
def test_other_layers_see_everything(layers: Any, windowed: list[int]) -> None:
    base, text = build("llama", attention="eager"), ids(2, TOTAL)
    every, near = causal()
    want = with_masks(base, text, lambda n, _: (near if n in windowed else every)[None, None])
    model = policy(base, layers=layers)
    with torch.no_grad():
        assert_close(model(text).logits, want, 1e-5)
    memory = model.memories["window"]
    assert not memory.claims.bounded and memory.bytes_per_token > 0
    held = [model.read(ids(1, n * SEGMENT)).nbytes for n in (4, 8)]
    assert held[1] - held[0] == 4 * SEGMENT * memory.bytes_per_token


@pytest.mark.parametrize("layers", [None, "alternate"])
def test_an_answer_sees_everything(layers: Any) -> None:
    """And what stands in front of it stays as the window let it be."""
    base, text, first = build("llama", attention="eager"), ids(2, TOTAL), 24
    every, near = causal()
    answers = near | (every & (torch.arange(TOTAL) >= first)[:, None])
    seen = {n: answers if layers is None or n == 0 else every for n in range(2)}
    want = with_masks(base, text, lambda n, _: seen[n][None, None])
    model = policy(base, layers=layers, decode="full")
    with torch.no_grad():
        plain = model(text).logits
        got = model(text, answer_from=[first, first]).logits
    assert_close(got, want, 1e-5)
    assert torch.equal(plain[:, :first], got[:, :first])
    assert error_of(plain[:, first:], got[:, first:]) > 1e-2


@pytest.mark.parametrize("sizes", [[TOTAL], [1] * TOTAL, [24, 21], [5, 3, 1, 20, 16], [30, 1, 14]])
def test_a_mark_is_not_in_the_size_of_calls(sizes: list[int]) -> None:
    model, text = policy(decode="full", num_sinks=2), ids(2, TOTAL)
    first = torch.tensor([24, 31])
    with torch.no_grad():
        whole = model(text, answer_from=first, use_cache=True)
        state, got = model.new_state(2), []
        for index, piece in enumerate(text.split(sizes, 1)):
            given = {"answer_from": first} if index == 0 else {}
            got.append(model(piece, cache=state, **given).logits)
    assert_close(torch.cat(got, 1), whole.logits)
    assert_same_states(state, whole.cache)
    assert torch.equal(state.answer_from, first)
    memwrap.unwrap(model)
    with torch.no_grad():  # without answers it is the window with sinks
        want = policy(model.backbone, num_sinks=2)(text).logits
        memwrap.unwrap(model)
        got = policy(model.backbone, num_sinks=2, decode="full")(text).logits
    assert_close(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "gpt2"])
def test_padded_rows_are_what_they_are_alone(family: str) -> None:
    settings = {"decode": "full", "layers": [0]}
    model = wrapped("window", family, **settings)
    rows = [ids(n, seed=n) for n in (33, 19)]
    first = torch.tensor([20, 11])
    for side in ("left", "right"):
        text, mask = padded(rows, side)
        with torch.no_grad():
            both = model(text, attention_mask=mask, answer_from=first, use_cache=True)
            for row, alone in enumerate(rows):
                want = model(alone[None], answer_from=first[row : row + 1]).logits[0]
                assert_close(both.logits[row][mask[row].bool()], want)


def test_generation_is_an_answer() -> None:
    """And equals recomputation in one call with the mark at the prompt's end."""
    model = wrapped("window", num_sinks=2, decode="full", layers="alternate")
    prompt = ids(1, 27)
    out = model.generate(
        prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True,
        output_logits=True, eos_token_id=None,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(out.sequences, answer_from=[27]).logits[0, 26:-1]
        other = model(out.sequences).logits[0, 26:-1]
    assert_close(torch.cat(out.logits), logits)
    assert error_of(other[1:], logits[1:]) > 1e-3
    assert out.cache.answer_from.tolist() == [27]
    again = model.generate(
        prompt, max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None
    )
    assert torch.equal(again, out.sequences)
    # A read document, and a question behind it.
    state = model.read(prompt[:, :20])
    told = model.generate(
        prompt[:, 20:], cache=state, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(told[:, 7:], out.sequences[:, 27:])
    # What is read afterwards is no answer.
    after = model.read(ids(1, 5), state=out.cache)
    assert after.answer_from is None


def test_beams_carry_the_mark() -> None:
    model, prompt = wrapped("window", num_sinks=0, decode="full"), ids(2, 19)
    out = model.generate(
        prompt, max_new_tokens=5, num_beams=3, do_sample=False, return_dict_in_generate=True,
        eos_token_id=None,
    )  # fmt: skip
    assert out.cache.answer_from.tolist() == [19, 19]
    with torch.no_grad():
        want = model(out.sequences[:, :-1], answer_from=[19, 19], use_cache=True).cache
    assert_same_states(out.cache, want)


def test_the_first_label_begins_the_answer() -> None:
    model, text = policy(decode="full"), ids(2, TOTAL)
    labels = text.clone()
    labels[0, :24], labels[1, :31] = -100, -100
    with torch.no_grad():
        want = model(text, answer_from=[24, 31]).logits
        got = model(text, labels=labels).logits
        assert_close(got, want, 1e-6)
        plain = model(text, labels=text).logits
        assert_close(plain, model(text).logits, 1e-6)
    # Packed in one row, and a mark that was given has the last word.
    row = torch.cat([text[:1], text[1:]], 1)
    places = torch.arange(TOTAL).repeat(2)[None]
    with torch.no_grad():
        both = model(row, labels=labels.view(1, -1), position_ids=places).loss
        alone = [model(text[n : n + 1], labels=labels[n : n + 1]).loss for n in range(2)]
        assert both.item() == pytest.approx(
            (alone[0] * (TOTAL - 24) + alone[1] * (TOTAL - 31)).item() / (2 * TOTAL - 55), rel=1e-5
        )
        other = model(text, labels=labels, answer_from=[40, 40]).logits
    assert error_of(other, got) > 1e-3


def test_a_mark_is_saved_and_joined(tmp_path: Any) -> None:
    model, text = policy(decode="full"), ids(1, 20)
    with torch.no_grad():
        state = model(text, answer_from=[11], use_cache=True).cache
    state.save(tmp_path / "state.safetensors")
    loaded = memwrap.MemoryState.load(tmp_path / "state.safetensors", model)
    assert loaded.answer_from.tolist() == [11]
    for wrong in (torch.tensor([-1]), torch.tensor([11.0]), torch.tensor([11, 11])):
        forged = state.clone()
        forged.answer_from = wrong
        forged.save(tmp_path / "forged.safetensors")
        with pytest.raises(ValueError, match="answer"):
            memwrap.MemoryState.load(tmp_path / "forged.safetensors", model)
    both = memwrap.MemoryState.cat([loaded, model.read(text)])
    assert both.answer_from[0] == 11 and both.answer_from[1] > 2**60
    with pytest.raises(ValueError, match=r"`answer_from` is \[1.5\]; it needs a whole number"):
        model(text, answer_from=[1.5])
    with pytest.raises(ValueError, match=r"`answer_from` is \[1, 2\]; .* each of the 1 rows"):
        model(text, answer_from=[1, 2])


def test_a_layers_own_window_stays() -> None:
    """Layers that slide by themselves keep their window in an answer too, and keep no more."""
    base, text = build("gemma3"), ids(1, 30)
    with torch.no_grad():
        want = base(text).logits
        model = memwrap.wrap(base, "window", segment_size=6, window_size=64, decode="full").eval()
        got = model(text, answer_from=[10], use_cache=True)
    assert_close(got.logits, want)
    for layer, dims in model.memories["window"].sizes.attention.items():
        held = got.cache.memories["window"]["layers"][str(layer)]["past_key"].shape[2]
        assert held == (30 if dims.window is None else min(30, dims.window - 1))


def test_layers_are_checked() -> None:
    with pytest.raises(ValueError, match="names layer 5; the backbone has"):
        policy(layers=[5])
