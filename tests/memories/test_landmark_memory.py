"""Landmark attention as a user meets it: insertion, what is kept and read, its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memwrap
from memwrap.ops import landmark as ops
from memwrap.ops.landmark.chunked import _rows
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_gradients,
    assert_same_states,
    error_of,
    gradients,
    ids,
    padded,
    tiny,
    wrapped,
)

TEXT = ids(2, 3 * SEGMENT + 3)


def model_of(family: str = "llama", **settings: Any) -> Any:
    return wrapped("landmark", family, **settings)


@torch.no_grad()
def fed(model: Any, text: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    state, pieces = model.new_state(len(text)), []
    for piece in text.split(sizes, 1):
        pieces.append(model(piece, cache=state).logits)
    return torch.cat(pieces, 1), state


def test_the_landmark_begins_as_the_mean_embedding() -> None:
    for family in ("llama", "gemma3"):  # the latter scales its embeddings
        base = build(family)
        model = memwrap.wrap(base, tiny("landmark"))
        mean = base.get_input_embeddings()(torch.arange(base.config.vocab_size)).mean(0)
        assert_close(model.memories["landmark"].token[0], mean, 1e-5)
        assert [n for n, _ in model.memories["landmark"].named_parameters()] == ["token"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "opt"])
def test_the_first_block_is_the_bases(family: str) -> None:
    """A landmark changes nothing before it, and with a table of positions none after it moves."""
    model, base = model_of(family), build(family)
    size = tiny("landmark").block_size
    with torch.no_grad():
        got, want = model(TEXT).logits, base(TEXT[:, :SEGMENT]).logits
    assert_close(got[:, :size], want[:, :size])
    assert error_of(got[:, size:SEGMENT], want[:, size:]) > 1e-3


def test_landmarks_take_no_position_of_a_table() -> None:
    seen = []
    model = model_of("gpt2")
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    model.read(TEXT[:, : SEGMENT + 1])
    assert seen[0] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7] and seen[1] == [0]


OPTIONS: dict[str, dict[str, Any]] = {
    "chunk": {"retrieval": "chunk"},
    "first layer": {"first_layer": True, "top_k": 1},
    "offload": {"offload": True},
    "no limit": {"block_size": 1, "cache_size": None, "top_k": 3},
    "few": {"block_size": 3, "cache_size": 2, "top_k": 5},
    "one block": {"segment_size": 4, "block_size": 4},
    "long block": {"block_size": 50},
    "one layer": {"layers": [1]},
    "id": {"landmark_id": 5},
    "predicted": {"landmark_id": 5, "landmark_in_loss": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_not_depend_on_the_feed(name: str) -> None:
    model = model_of(**OPTIONS[name])
    want, state = fed(model, TEXT, [TEXT.shape[1]])
    for sizes in ([5, 3, 1, 10, 8], [1] * TEXT.shape[1]):
        got, other = fed(model, TEXT, sizes)
        assert_close(got, want, label=name)
        assert_same_states(other, state)
    text, mask = padded([TEXT[0], TEXT[1, :13]], "left")
    with torch.no_grad():
        got = model(text, attention_mask=mask).logits
        assert_close(got[0], want[0])
        assert_close(got[1, -13:], want[1, :13])


@pytest.mark.parametrize("name", ["chunk", "no limit", "predicted", "offload"])
def test_options_train(name: str) -> None:
    model = model_of(**OPTIONS[name]).train()
    loss = model(TEXT, labels=TEXT).loss
    loss.backward()
    want = gradients(model)
    model.gradient_checkpointing = True
    model(TEXT, labels=TEXT).loss.backward()
    assert_same_gradients(gradients(model), want, 1e-6)


def test_the_options_differ() -> None:
    with torch.no_grad():
        plain = model_of()(TEXT).logits
        for name in ("chunk", "first layer", "few", "one layer"):
            other = model_of(**OPTIONS[name])(TEXT).logits
            assert error_of(other[:, 2 * SEGMENT :], plain[:, 2 * SEGMENT :]) > 1e-3, name


@torch.no_grad()
def test_offloaded_blocks_stay_on_the_host_and_change_nothing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, far = model_of(), model_of(offload=True)
    want = plain(TEXT).logits
    assert_close(far(TEXT).logits, want, 1e-6)
    with monkeypatch.context() as patch:  # many pieces of the queries, a head at a time
        patch.setattr(ops, "AT_ONCE", 2 * 4 * 130)
        assert_close(far(TEXT).logits, want, 1e-6)
    with memwrap.ops.backend("naive"):
        assert_close(far(TEXT).logits, want)
    state = far.read(TEXT)
    moved = state.to("meta").memories["landmark"]["layers"]["1"]
    assert moved["landmark"].device.type == moved["valid"].device.type == "meta"
    assert {t.device.type for t in moved["host"].values()} == {"cpu"}
    state.save(tmp_path / "state.safetensors")
    again = type(state).load(tmp_path / "state.safetensors", far)
    assert_same_states(again, state, 0.0)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    question = TEXT[:1, :3]
    answers = [m.generate(question, cache=m.read(TEXT[:1]), **settings) for m in (plain, far)]
    assert torch.equal(*answers)


def test_a_call_that_chooses_together_is_not_causal() -> None:
    """What `retrieval="call"` cannot promise; whole segments are still cut by place."""
    model = model_of(retrieval="call", top_k=1)
    changed = TEXT.clone()
    changed[:, -1] = 3 + changed[:, -1] % 7
    with torch.no_grad():
        one, other = model(TEXT).logits, model(changed).logits
        assert_close(other[:, : 3 * SEGMENT], one[:, : 3 * SEGMENT], 1e-6)
    whole, _ = fed(model, TEXT, [TEXT.shape[1]])
    segments, _ = fed(model, TEXT, [SEGMENT, SEGMENT, SEGMENT, 3])
    tokens, _ = fed(model, TEXT, [1] * TEXT.shape[1])
    assert_close(segments, whole)
    assert error_of(tokens, whole) > 1e-3


def layer(state: Any, number: int = 1) -> dict[str, Tensor]:
    return state.memories["landmark"]["layers"][str(number)]


def test_the_last_blocks_are_kept() -> None:
    few, many = (model_of(cache_size=n).read(TEXT) for n in (2, 6))
    assert layer(many)["count"].tolist() == [6, 6] and layer(few)["count"].tolist() == [2, 2]
    # A block's keys know what was read before it: equal where nothing was evicted yet.
    first = {n: model_of(cache_size=n).read(TEXT[:, : 2 * SEGMENT]) for n in (2, 6)}
    for name in ("key", "value", "landmark", "valid"):
        assert_close(layer(first[2])[name].float(), layer(first[6])[name][:, :, 2:4].float())


def test_buffers_grow_and_states_of_different_sizes_meet(tmp_path: Any) -> None:
    settings = {"block_size": 1, "cache_size": None}
    model = model_of(**settings)
    long, short = model.read(TEXT[:1]), model.read(TEXT[1:, :9])
    sizes = [layer(s)["key"].shape[2] for s in (long, short)]
    assert sizes == [32, 16] and layer(long)["count"].tolist() == [24]
    tail = ids(2, 10, seed=5)
    with torch.no_grad():
        joined = type(long).cat([long, short])
        got = model(tail, cache=joined).logits
        for row, state in enumerate((long, short)):
            state.save(tmp_path / "state.safetensors")
            loaded = type(long).load(tmp_path / "state.safetensors", model)
            want = model(tail[row : row + 1], cache=loaded).logits
            assert_close(got[row], want[0])
    damaged = long.clone()
    damaged.memories["landmark"]["layers"]["1"]["key"] = layer(long)["key"][..., :-1]
    damaged.save(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.key has shape"):
        type(long).load(tmp_path / "bad.safetensors", model)


def test_a_partial_block_is_kept_when_its_segment_is_closed() -> None:
    model = model_of()
    state = model.close_segment(model.read(TEXT[:, :6]))
    kept = layer(state)
    assert kept["count"].tolist() == [2, 2]
    assert kept["valid"][0, 0, :2].tolist() == [[True] * 4, [True, True, False, False]]
    assert float(kept["landmark"][:, :, 1].abs().max()) > 0
    assert float(kept["key"][:, :, 1, 2:].abs().max()) == 0
    with torch.no_grad():
        on = model(TEXT[:, 6:9], cache=state.clone()).logits
        cut = state.clone()
        tree = cut.memories["landmark"]["layers"]["1"]
        tree["count"] = tree["count"] - 1
        assert error_of(model(TEXT[:, 6:9], cache=cut).logits, on) > 1e-4


def test_pieces_of_the_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of().train()
    model(TEXT, labels=TEXT).loss.backward()
    want = gradients(model)
    monkeypatch.setattr(ops, "AT_ONCE", 2 * 4 * 130)
    monkeypatch.setattr(ops, "SAVED", 0)
    model(TEXT, labels=TEXT).loss.backward()
    assert_same_gradients(gradients(model), want, 1e-5)


def test_naive_ops_give_the_same_model() -> None:
    model = model_of("gemma2")
    with torch.no_grad():
        want = model(TEXT).logits
        with memwrap.ops.backend("naive"):
            assert_close(model(TEXT).logits, want)


def test_rows_from_another_device_come_over_once() -> None:
    x, flat = torch.randn(1, 2, 5, 3), torch.tensor([[7, 2], [2, 9]])
    want = x.reshape(10, 3)[flat]
    assert torch.equal(_rows(x, flat), want)
    assert torch.equal(_rows(x, flat, torch.device("cpu", 0)), want)


def test_a_predicted_landmark_is_a_target() -> None:
    """The loss by hand: every block's last token predicts the landmark, which predicts on."""
    settings = {"segment_size": 16, "landmark_id": 5}
    text = TEXT[:, :14]
    apart, joined = model_of(**settings), model_of(**settings, landmark_in_loss=True)
    ends = torch.arange(14) % 4 == 3
    with torch.no_grad():
        at_tokens, predicting = apart(text).logits, joined(text).logits
        assert_close(predicting[:, ~ends], at_tokens[:, ~ends])
        nll = -predicting[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None]).sum()
        named = -at_tokens[:, ends].log_softmax(-1)[..., 5].sum()
        want = (nll + named) / (2 * (13 + 3))
        assert joined(text, labels=text).loss.item() == pytest.approx(want.item(), rel=1e-5)
        # A block whose last token has no target names no landmark either.
        labels = text.clone()
        labels[:, 4:] = -100
        want = -predicting[:, :3].log_softmax(-1).gather(2, text[:, 1:4, None]).mean()
        assert joined(text, labels=labels).loss.item() == pytest.approx(want.item(), rel=1e-5)
        plain = -at_tokens[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None]).mean()
        assert apart(text, labels=text).loss.item() == pytest.approx(plain.item(), rel=1e-5)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"landmark_id is 128.*127"):
        memwrap.wrap(build("llama"), tiny("landmark", landmark_id=128))
