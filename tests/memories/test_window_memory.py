"""Window with sinks against what it stands for: plain attention with a band and sinks."""

from __future__ import annotations

import gc

import pytest
import torch
from support import crossed

import memwrap
from memwrap.ops.buffers.kept import _KEPT
from memwrap.testing.families import FAMILIES, build
from memwrap.testing.helpers import assert_close, error_of, ids, padded, wrapped

WINDOWED = ("gemma2", "gemma3", "mistral", "phi3", "qwen2", "qwen3", "smollm3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wide_window_is_the_base(family: str) -> None:
    """As long as the text fits, many segments give what the base gives at once."""
    base = build(family)
    text = ids(2, 37)
    with torch.no_grad():
        want = base(text).logits
        model = memwrap.wrap(base, "window", segment_size=8, window_size=64, num_sinks=3)
        got = model(text).logits
    if family in ("gpt2", "opt"):  # learned positions restart in every segment
        assert_close(got[:, :8], want[:, :8], 1e-5)
    else:
        assert_close(got, want, 1e-4)


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite", "gpt_neox"])
def test_without_sinks_it_is_banded_attention(family: str) -> None:
    base, text, window = build(family, attention="eager"), ids(2, 45), 11
    place = torch.arange(45)
    distance = place[:, None] - place[None]
    band = (distance >= 0) & (distance < window)
    mask = torch.where(band, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)
    with torch.no_grad():
        want = base(text, attention_mask=mask).logits
        model = memwrap.wrap(base, "window", segment_size=8, window_size=window, num_sinks=0)
        assert_close(model(text).logits, want, 1e-4)


@pytest.mark.parametrize("segment", [1, 5, 8, 16, 64])
def test_segments_do_not_show(segment: int) -> None:
    """The result depends on window and sinks, not on how many tokens are read at once."""
    base, text = build("llama"), ids(2, 50)
    with torch.no_grad():
        model = memwrap.wrap(base, "window", segment_size=7, window_size=9, num_sinks=3)
        want = model(text).logits
        memwrap.unwrap(model)
        model = memwrap.wrap(base, "window", segment_size=segment, window_size=9, num_sinks=3)
        assert_close(model(text).logits, want, 1e-4)


@pytest.mark.parametrize(
    ("memory", "family"),
    crossed(
        ["window", "compressive", "ahn", "liger"],
        ["llama", "gemma2", "gemma3", "gpt_neox", "phi3", "opt"], 3,
    ),
)  # fmt: skip
def test_token_by_token_equals_the_whole(memory: str, family: str) -> None:
    """What is kept rotated while a segment is open is what would be rotated anew: rows of unequal
    length, over the ends of segments, with and without gradients, from a copied state too."""
    model, rows = wrapped(memory, family), [ids(n, seed=n) for n in (11, 17)]
    text, mask = padded(rows, "left")
    new = ids(2, 22, seed=3)
    with torch.no_grad():
        want = model(torch.cat([text, new], 1), attention_mask=_more(mask, 22)).logits[:, 17:]
        state = model(text, attention_mask=mask, use_cache=True).cache
        got = []
        for index, token in enumerate(new.split(1, 1)):
            with torch.set_grad_enabled(index == 4):
                got.append(model(token, cache=state).logits.detach())
            if index == 6:
                state = state.detach().clone()
        assert_close(torch.cat(got, 1), want)


def _more(mask: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)


def test_what_is_kept_rotated_goes_with_its_state() -> None:
    model, before = wrapped("window", window_size=30), len(_KEPT)
    with torch.no_grad():
        state = model.read(ids(1, 20))
        for _ in range(3):
            model(ids(1, 1), cache=state)
        assert len(_KEPT) == before + 2  # once a layer
        for _ in range(4):  # a segment closes: the old is gone
            model(ids(1, 1), cache=state)
        assert len(_KEPT) == before + 2
        del state
        gc.collect()
        assert len(_KEPT) == before


def test_sinks_at_their_place_in_a_full_cache() -> None:
    """One layer, by hand: sinks stand right before the window, however far the text has gone."""
    base = build("llama", attention="eager")
    base.model.layers = base.model.layers[:1]
    base.config.num_hidden_layers = 1
    text, window, sinks = ids(1, 40), 6, 2
    with torch.no_grad():
        model = memwrap.wrap(base, "window", segment_size=8, window_size=window, num_sinks=sinks)
        got = model(text).logits[:, -1]
        memwrap.unwrap(model)
        # The first tokens and the last: positions of a cache of `sinks + window` rows.
        kept = torch.cat([text[:, :sinks], text[:, -window:]], 1)
        want = base(kept).logits[:, -1]
    assert_close(got, want, 1e-5)


def test_nothing_else_is_seen() -> None:
    """One layer: a token between sinks and window changes nothing, a sink does."""
    base = build("llama")
    base.model.layers = base.model.layers[:1]
    base.config.num_hidden_layers = 1
    model = memwrap.wrap(base, "window", segment_size=8, window_size=6, num_sinks=2)
    text = ids(1, 40)
    between, sink = text.clone(), text.clone()
    between[:, 20], sink[:, 1] = 5, 7
    with torch.no_grad():
        want = model(text).logits[:, -1]
        assert torch.equal(model(between).logits[:, -1], want)
        assert error_of(model(sink).logits[:, -1], want) > 1e-3


@pytest.mark.parametrize("family", WINDOWED)
def test_a_layers_own_window_stays(family: str) -> None:
    """Layers with a smaller sliding window keep it: a long text gives what the base gives."""
    base, text = build(family), ids(1, 30)
    with torch.no_grad():
        want = base(text).logits
        model = memwrap.wrap(base, "window", segment_size=6, window_size=40)
        assert_close(model(text).logits, want, 1e-4)
