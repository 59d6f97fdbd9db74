"""DMS: what heads drop, when it is gone, and what a training asks of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import with_masks
from torch import Tensor

import memwrap
from memwrap.engine.inputs import Teacher
from memwrap.memories.parts.training_progress import training_at
from memwrap.ops import delayed_eviction as ops
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, error_of, ids

WINDOW, TOTAL = 6, 45


def dropping(base: Any = None, seed: int = 3, **settings: Any) -> Any:
    """A model whose heads drop about half of their keys."""
    base = build("llama", attention="eager") if base is None else base
    model = memwrap.wrap(base, "dms", **{"segment_size": 7, "window_size": WINDOW, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.memories["dms"].maps.values():
            one.weight.copy_(torch.randn(one.weight.shape, generator=generator))
    return model.eval()


def by_mask(base: Any, model: Any, text: Tensor, window: int) -> Tensor:
    """Logits of the base where every head's mask is made of decisions: the naive statement, layer
    by layer, since a layer's decisions depend on the layers below."""
    place = torch.arange(text.shape[1])
    maps = model.memories["dms"].maps

    def seen(number: int, hidden: Tensor) -> Tensor:
        made = (ops.decision_logits(maps[str(number)](hidden), 1.0) > 0).long()
        until = ops.visible_until(made, window).expand(-1, 2, -1)
        visible = (place[:, None] >= place) & (place[:, None] < until[:, :, None])
        return visible.repeat_interleave(2, 1)

    return with_masks(base, text, seen)


@pytest.mark.parametrize("decisions", ["kv_head", "layer"])
def test_it_is_a_mask_for_every_head(decisions: str) -> None:
    base, text = build("llama", attention="eager"), ids(2, TOTAL)
    model = dropping(base, decisions=decisions)
    want = by_mask(base, model, text, WINDOW)
    with torch.no_grad():
        out = model(text, use_cache=True)
        plain = base(text).logits
    assert_close(out.logits, want, 1e-5)
    assert error_of(plain, want) > 1e-2
    memwrap.unwrap(model)
    other = dropping(base, decisions=decisions, segment_size=16)  # segments do not show
    with torch.no_grad():
        assert_close(other(text).logits, want, 1e-5)


def test_what_is_dropped_takes_no_space() -> None:
    model, text = dropping(), ids(1, 70)
    tree = model.read(text).memories["dms"]["layers"]
    gone = [int(70 - WINDOW - c) for one in tree.values() for c in one["kept_count"].flatten()]
    assert all(5 < n < 60 for n in gone) and len(set(gone)) > 1, gone
    most = max(int(one["kept_count"].max()) for one in tree.values())
    assert max(one["kept_key"].shape[2] for one in tree.values()) == most


def test_the_newest_key_waits_for_its_decision() -> None:
    """A state ends between a key and the token that decides about it."""
    model, text = dropping(window_size=1), ids(1, 21)
    with torch.no_grad():
        want = model(text).logits[:, 14:]
        state = model.read(text[:, :14])  # two whole segments: nothing is open
        assert state.fill.tolist() == [0]
        assert_close(model(text[:, 14:], cache=state).logits, want, 1e-5)
        # The token behind the state decides whether its last key is seen.
        others = [model(torch.tensor([[n]]), cache=state.clone()).logits for n in (5, 9, 30, 60)]
    assert all(torch.isfinite(one).all() for one in others)


def test_it_begins_as_the_base() -> None:
    base, text = build("llama"), ids(2, TOTAL)
    with torch.no_grad():
        want = base(text).logits
        model = memwrap.wrap(base, "dms", segment_size=8, window_size=6).eval()
        assert_close(model(text).logits, want, 1e-4)
    count = [t["kept_count"] for t in model.read(text).memories["dms"]["layers"].values()]
    assert all(bool((c == 40 - 6).all()) for c in count)  # 5 segments are closed


def test_training_drops_softly_and_asks_for_a_share() -> None:
    model = memwrap.wrap(build("llama"), "dms", segment_size=64, window_size=4, compression=5.0)
    text = ids(3, 40)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = model.eval()(text, labels=text).loss
        # Nothing is dropped, and the target is 0 at first, in the end 4 of 5.
        model.memory_settings("dms", noise=False)
        for done, target in ((0.0, 0.0), (0.25, 0.5), (1.0, 0.8)):
            with training_at(done):
                loss = model.train()(text, labels=text).loss
            assert loss.item() == pytest.approx(plain.item() + target, abs=1e-5)
    model.memory_settings("dms", noise=True)
    with training_at(0.25):
        first = [model(text, labels=text).loss.item() for _ in range(2)]
        torch.manual_seed(5)
        second = model(text, labels=text).loss
        torch.manual_seed(5)
        assert model(text, labels=text).loss.item() == second.item()
    assert first[0] != first[1]  # drawn anew
    second.backward()
    for one in model.memories["dms"].maps.values():
        assert float(one.weight.grad.abs().max()) > 0


def test_training_makes_heads_drop() -> None:
    """A few steps of the loss bring the share of dropped keys to the target."""
    torch.manual_seed(0)
    base = build("llama")
    model = memwrap.wrap(base, "dms", segment_size=48, window_size=4, compression=2.0)
    base.requires_grad_(False)
    text = ids(4, 48)
    optimizer = torch.optim.Adam(model.memory_parameters(), lr=3e-3)
    with torch.no_grad():
        taught = Teacher(base.model(text).last_hidden_state, labels=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        model.train()(text, labels=text, teacher=taught).loss.backward()
        optimizer.step()
    tree = model.eval().close_segment(model.read(text)).memories["dms"]["layers"]
    kept = torch.cat([t["kept_count"].flatten() for t in tree.values()]).float().mean() / 44
    assert 0.35 < float(kept) < 0.75, kept


def test_layers_without_decisions_keep_everything() -> None:
    model, text = dropping(layers=[1]), ids(1, 28)
    tree = model.read(text).memories["dms"]["layers"]
    assert tree["0"]["past_count"].tolist() == [28] and "kept_key" in tree["1"]
    assert set(model.memories["dms"].maps) == {"1"}
