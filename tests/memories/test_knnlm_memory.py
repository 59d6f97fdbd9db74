"""kNN-LM: the store, the text itself, mixing, building, tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memwrap
from memwrap.data.stdlib_corpus import Document
from memwrap.engine.loss import Collect
from memwrap.evaluation.knnlm import tune
from memwrap.memories.knnlm import adapt
from memwrap.retrieval.datastore import add_document, build_store, read_tokens
from memwrap.state.trees import alike
from memwrap.stores import FaissStore, TorchStore, open_store
from memwrap.testing.families import FAMILIES, build
from memwrap.testing.helpers import assert_close, error_of, ids, padded, randomise, tiny

TEXT = ids(1, 40)


def model_of(family: str = "llama", **settings: Any) -> Any:
    base = {"segment_size": 8, "top_k": 4, "temperature": 5.0, "interpolation": 0.5}
    return memwrap.wrap(build(family), memwrap.KnnLMConfig(**{**base, **settings})).eval()


def store_of(model: Any, *texts: Tensor) -> TorchStore:
    store = TorchStore(model.memories["knnlm"].width, model.memories["knnlm"].config.metric)
    for number, text in enumerate(texts):
        add_document(model, store, text, f"d{number}")
    return store


@pytest.mark.parametrize("key", ["ffn", "hidden"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@torch.no_grad()
def test_mixing_by_hand(key: str, metric: str) -> None:
    model = model_of(key=key, metric=metric, temperature=20.0)
    plain = model(TEXT).logits
    corpus = ids(120, seed=5)
    store = store_of(model, corpus)
    assert (
        len(store) == 119 and store.entries(torch.arange(3)).values.tolist() == corpus[1:4].tolist()
    )
    model.memories["knnlm"].attach(store)
    keys = torch.cat([k for _, k in read_tokens(model, TEXT[0])])
    corpus_keys = torch.cat([k for _, k in read_tokens(model, corpus)])[:-1]
    if metric == "l2":
        scores = -(keys[:, None] - corpus_keys).square().sum(-1)
    else:
        scores = keys @ corpus_keys.T
    top = scores.topk(4)
    p = torch.zeros_like(plain[0]).scatter_add(
        1, corpus[1:][top.indices], (top.values / 20).softmax(-1)
    )
    want = (0.5 * plain[0].softmax(-1) + 0.5 * p).log()
    got = model(TEXT)
    assert_close(got.logits[0].log_softmax(-1), want)
    assert error_of(got.logits, plain) > 1e-2
    assert torch.equal(model(TEXT, memory_control="off").logits, plain)
    loss = F.cross_entropy(got.logits[0, :-1], TEXT[0, 1:])
    assert model(TEXT, labels=TEXT).loss.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_is_what_the_feed_forward_block_is_given(family: str) -> None:
    """Ablating it is the proof: with the block's input the last hidden state follows."""
    model = model_of(family)
    with torch.no_grad():
        keys = torch.cat([k for _, k in read_tokens(model, TEXT[0, :8])])
        hidden = torch.cat([k for _, k in read_tokens(model, TEXT[0, :8], Collect.HIDDEN)])
    assert keys.shape == hidden.shape == (8, 32) and error_of(keys, hidden) > 1e-2
    assert not any(m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_what_was_read_is_searched_beside_the_store() -> None:
    model = model_of(cache_size=64, top_k=3, temperature=50.0)
    plain = model(TEXT).logits
    both = model_of(cache_size=64, top_k=3, temperature=50.0)
    both.memories["knnlm"].attach(store_of(both, ids(50, seed=9)))
    mixed = both(TEXT).logits
    assert error_of(mixed[:, 8:], plain[:, 8:]) > 1e-3
    state = model.read(TEXT)
    tree = state.memories["knnlm"]
    # The last token of the last segment still waits for the one behind it.
    assert tree["count"].tolist() == [39]
    assert tree["tokens"][0, 0, :, 0].tolist() == TEXT[0, 1:].tolist()
    keys = torch.cat([k for _, k in read_tokens(model, TEXT[0])])
    assert_close(tree["keys"][0, 0], keys[:39])
    small = model_of(cache_size=10).read(TEXT).memories["knnlm"]
    assert sorted(small["tokens"][0, 0, :, 0].tolist()) == sorted(TEXT[0, 30:].tolist())
    assert small["count"].tolist() == [39]


@torch.no_grad()
def test_rows_keep_their_own_text() -> None:
    model = model_of(cache_size=16)
    rows = [TEXT[0, :21], TEXT[0, 5:18]]
    for side in ("left", "right"):
        text, mask = padded(rows, side)
        state = model.read(text, mask)
        for index, row in enumerate(rows):
            alone = model.read(row[None]).memories["knnlm"]
            for name, value in alone.items():
                # The ring is as long as the longer row needs.
                got = alike(state.memories["knnlm"][name][index].float(), value[0].float())
                assert_close(*got)


def test_adaptive_settings_follow_distances() -> None:
    costs = torch.tensor([[1.0, 3.0], [4.0, torch.inf]])
    weight, heat = adapt(costs, 0.5, 2.0, 2.0)
    assert_close(torch.as_tensor(weight)[:, 0], 0.5 * torch.tensor([-0.5, -2.0]).exp())
    assert heat[:, 0].tolist() == [4.0, 8.0]
    model = model_of(adaptive=True, distance_scale=1e9, temperature=1.0)
    plain = model_of()
    for each in (model, plain):
        each.memories["knnlm"].attach(store_of(each, ids(50, seed=9)))
    assert error_of(model(TEXT).logits, plain(TEXT).logits) > 1e-3
    model.memories["knnlm"].config.distance_scale = 1e-6
    assert_close(model(TEXT).logits, model(TEXT, memory_control="off").logits)


def test_the_store_is_saved_beside_the_model_or_by_path(tmp_path: Path) -> None:
    model = model_of()
    corpus = ids(60, seed=5)
    store = FaissStore(32, path=tmp_path / "store")
    add_document(model, store, corpus, "d")
    store.build()
    store.close()
    model.memories["knnlm"].attach(tmp_path / "store")
    with torch.no_grad():
        want = model(TEXT).logits
        model.save_pretrained(tmp_path / "beside")
        (tmp_path / "store").rename(tmp_path / "moved")
        beside = memwrap.load(tmp_path / "beside", build("llama"))
        assert torch.equal(beside(TEXT).logits, want)
        by_path = model_of(store=str(tmp_path / "moved"))
        assert torch.equal(by_path(TEXT).logits, want)
        by_path.save_pretrained(tmp_path / "path")
        assert not (tmp_path / "path" / "knnlm_store").exists()
        loaded = memwrap.load(tmp_path / "path", build("llama"))
        assert torch.equal(loaded(TEXT).logits, want)
    (tmp_path / "moved").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no store"):
        memwrap.load(tmp_path / "path", build("llama"))


@torch.no_grad()
def test_generation_uses_the_store() -> None:
    """A store of the model's own continuation with another ending changes what is said."""
    model = model_of(interpolation=0.99, temperature=1e-3, top_k=1, segment_size=64)
    prompt = TEXT[:, :6]
    said = model.generate(
        prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    wanted = torch.cat([said[0, :8], torch.tensor([77, 78, 79])])
    model.memories["knnlm"].attach(store_of(model, wanted))
    got = model.generate(
        prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert got[0].tolist() == wanted.tolist()


def test_with_another_memory_the_keys_know_what_it_remembers() -> None:
    model = randomise(memwrap.wrap(build("llama"), tiny("armt"), tiny("knnlm", cache_size=0)))
    model.eval()
    with torch.no_grad():
        keys = torch.cat([k for _, k in read_tokens(model, TEXT[0])])
        late = torch.cat([k for _, k in read_tokens(model, TEXT[0, 8:])])
    assert error_of(late, keys[8:]) > 1e-2
    store = store_of(model, TEXT[0])
    model.memories["knnlm"].attach(store)
    with torch.no_grad():
        got, off = model(TEXT).logits, model(TEXT, memory_control="off").logits
        split, state = [], model.new_state(1)
        for part in TEXT.split(5, 1):
            split.append(model(part, cache=state).logits)
    assert error_of(got, off) > 1e-2
    assert_close(torch.cat(split, 1), got)


class Letters:
    """A tokenizer for the tests: one id a character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 100 for c in text]}


def documents(count: int = 6) -> list[Document]:
    return [
        Document(f"d{n}", "train", f"document {n} says {n * n} and no more. " * 3)
        for n in range(count)
    ]


def test_a_stopped_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    whole = FaissStore(32, path=tmp_path / "whole", shard_size=50)
    count = build_store(model, Letters(), documents(), whole, progress=False)  # type: ignore[arg-type]
    store = FaissStore(32, path=tmp_path / "s", shard_size=50)
    real, calls = FaissStore.add, []

    def failing(self: FaissStore, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FaissStore, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        build_store(model, Letters(), documents(), store, progress=False)  # type: ignore[arg-type]
    store._lock()  # as if the process had ended: what waited is lost
    again = FaissStore.load(tmp_path / "s", shard_size=50)
    assert again.cursor == {"documents": 3} and 0 < len(again) < count
    assert build_store(model, Letters(), documents(), again, progress=False) == count  # type: ignore[arg-type]
    assert torch.equal(again.vectors(range(count)), whole.vectors(range(count)))
    entries, want = again.entries(torch.arange(count)), whole.entries(torch.arange(count))
    assert entries.values.tolist() == want.values.tolist()
    assert entries.documents.tolist() == want.documents.tolist()
    assert again.documents == whole.documents == tuple(d.name for d in documents())
    other = memwrap.wrap(build("llama", seed=3), memwrap.KnnLMConfig(segment_size=8))
    with pytest.raises(ValueError, match="another model"):
        build_store(other, Letters(), documents(), again, progress=False)  # type: ignore[arg-type]
    again.close()
    whole.close()


def test_tuning_measures_what_the_model_gives(tmp_path: Path) -> None:
    model = model_of(interpolation=None, temperature=None, top_k=8)
    held_out = torch.tensor(Letters()("document 9 says 81 and no more. " * 2)["input_ids"])
    texts = [torch.tensor(Letters()(d.text)["input_ids"]) for d in documents()]
    store = FaissStore(32, path=tmp_path / "s")
    for text in texts:
        add_document(model, store, text)
    with pytest.raises(ValueError, match="no kNN-LM store"):
        tune(model, [held_out])
    model.memories["knnlm"].attach(store)
    found = tune(
        model, [held_out], weights=(0.0, 0.3, 0.6), temperatures=(1.0, 10.0), progress=False
    )
    assert found.best.nats < found.base and found.tokens == len(held_out) - 1 and found.hits > 0.5
    store.note({"tuned": found.tuned()})
    with torch.no_grad():
        got = model(held_out[None], labels=held_out[None]).loss.item()
        off = model(held_out[None], labels=held_out[None], memory_control="off").loss.item()
    assert got == pytest.approx(found.best.nats, rel=1e-4)
    assert off == pytest.approx(found.base, rel=1e-4)
    store.build()
    store.close()
    assert open_store(tmp_path / "s").notes["tuned"] == found.tuned()
    model.memories["knnlm"].config.adaptive = True
    best = tune(
        model, [held_out], weights=(0.0, 0.3), temperatures=(10.0, 100.0), progress=False
    ).best
    store.note({"tuned": {k: v for k, v in vars(best).items() if v is not None and k != "nats"}})
    with torch.no_grad():
        got = model(held_out[None], labels=held_out[None]).loss.item()
    assert got == pytest.approx(best.nats, rel=1e-4)


def test_bad_settings() -> None:
    model = model_of()
    for store, words in ((TorchStore(7), "width 7"), (TorchStore(32, "ip"), "'ip'")):
        with pytest.raises(ValueError, match=words):
            model.memories["knnlm"].attach(store)
    store = TorchStore(32)
    store.note({"key": "hidden"})
    with pytest.raises(ValueError, match="'hidden'"):
        model.memories["knnlm"].attach(store)
