"""Adds that fail leave nothing behind, and what a search would stumble over is found before it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

import memwrap
from memwrap.stores import FaissStore, Store, TorchStore, embedded, index_files, open_store, shards
from memwrap.stores.files import read_json, write_arrays, write_json
from memwrap.testing.families import VOCABULARY, build
from memwrap.testing.helpers import ids

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_an_add_whose_shard_cannot_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FaissStore(4, path=tmp_path / "s", shard_size=10, dtype="float32")
    store.add(X[:10], values=torch.arange(10), document="a", cursor=1)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_arrays", full_disk)
        with pytest.raises(OSError, match="No space"):
            store.add(X[10:20], values=torch.arange(10, 20), document="b", cursor=2)
    assert (len(store), store.documents, store.cursor) == (10, ("a",), 1)
    store.add(X[10:20], values=torch.arange(10, 20), document="b", cursor=2)  # tried again
    store.build()
    store.close()
    again: Any = open_store(tmp_path / "s")
    again.verify()
    assert (len(again), again.documents, again.cursor) == (20, ("a", "b"), 2)
    assert again.search(X[:20], 1).ids.flatten().tolist() == list(range(20))


WRONG: dict[str, dict[str, Any]] = {
    "numbers that are not finite": {"vectors": torch.full((3, 4), torch.nan)},
    "too few values": {"vectors": X[:3], "values": [1, 2]},
    "spans that end before they start": {"vectors": X[:3], "spans": [[2, 1]] * 3},
    "a cursor that is no JSON": {"vectors": X[:3], "cursor": object()},
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("kind", [TorchStore, FaissStore])
def test_a_refused_add_changes_nothing(kind: type[Store], what: str) -> None:
    store = kind(4)
    store.add(X[:5], values=torch.arange(5), document="a")
    before = store.search(X[:2], 5)
    with pytest.raises(ValueError):
        store.add(**{"document": "b", **WRONG[what]})
    after = store.search(X[:2], 5)
    assert torch.equal(before.ids, after.ids) and torch.equal(before.scores, after.scores)
    assert (len(store), tuple(store.documents)) == (5, ("a",))


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,SQ8", "HNSW8"])
def test_verify_finds_vectors_under_wrong_numbers(factory: str, tmp_path: Path) -> None:
    vectors = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    store = FaissStore(4, path=tmp_path, factory=factory, dtype="float32")
    store.add(vectors)
    store.build()
    store.close()
    opened: Any = open_store(tmp_path)
    opened.verify()
    index = faiss.index_factory(4, factory)
    index.train(vectors.numpy())
    index.add(vectors.flip(0).numpy())
    file = next(tmp_path.glob("index-*.faiss"))
    faiss.write_index(index, str(file))
    about = read_json(tmp_path / "index.json")
    about = {k: v for k, v in about.items() if k not in ("format", "version")}
    data = file.read_bytes()
    write_json(tmp_path / "index.json", about | {"size": len(data), "crc32": zlib.crc32(data)})
    again: Any = open_store(tmp_path)
    with pytest.raises(ValueError, match="does not hold the store's vectors"):
        again.verify()


def test_a_header_beside_shards_of_another_store_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        store = FaissStore(4, path=tmp_path / name)
        store.add(X)
        store.build()
        store.close()
    (tmp_path / "a" / "store.json").write_bytes((tmp_path / "b" / "store.json").read_bytes())
    with pytest.raises(ValueError, match="is of another store than the store"):
        open_store(tmp_path / "a")


def test_clearing_that_is_stopped_is_finished_at_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half of it would be a store without some entries, and with removed ones back."""
    store = FaissStore(4, path=tmp_path / "s", shard_size=20, dtype="float32")
    store.add(X)
    store.remove([3, 59])
    store.build()
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "clear_files", full_disk)
        with pytest.raises(OSError, match="No space"):
            store.clear()
    store.close()
    again: Any = FaissStore(4, path=tmp_path / "s", shard_size=20)
    assert len(again) == 0 and not list((tmp_path / "s").glob("*.faiss"))
    again.add(X[:20])  # and what comes then stays
    again.build()
    again.close()
    assert len(open_store(tmp_path / "s")) == 20


def test_another_index_of_as_many_entries_leaves_the_old_one_until_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FaissStore(4, path=tmp_path / "s", factory="Flat")
    store.add(X)
    store.build()
    store.factory = "HNSW8"
    with monkeypatch.context() as patch:
        patch.setattr(index_files, "write_json", full_disk)
        with pytest.raises(OSError, match="No space"):
            store.build()
    store.close()
    old: Any = open_store(tmp_path / "s")
    old.verify()
    assert old.made_by == "Flat"
    old.factory = "HNSW8"
    old.build()
    old.close()
    assert [p.name for p in (tmp_path / "s").glob("*.faiss")] == ["index-0000000000600.faiss"]
    new: Any = open_store(tmp_path / "s")
    new.verify()
    assert new.made_by == "HNSW8"


def test_ids_that_the_model_has_not_are_refused() -> None:
    model = memwrap.wrap(build("llama"), "knnlm", segment_size=8)
    store = TorchStore(32)
    store.add(torch.randn(9, 32), values=torch.full((9,), VOCABULARY))
    model.memories["knnlm"].attach(store)
    with pytest.raises(ValueError, match=f"holds the id {VOCABULARY}, the model has {VOCABULARY}"):
        model(ids(1, 5))


def test_entries_without_a_token_say_nothing() -> None:
    """An entry that has no value is no vote for the first token."""
    model = memwrap.wrap(build("llama"), "knnlm", segment_size=8).eval()
    want = model(ids(1, 5)).logits
    store = TorchStore(32)
    store.add(torch.randn(9, 32))
    model.memories["knnlm"].attach(store)
    assert torch.equal(model(ids(1, 5)).logits, want)


@pytest.mark.parametrize("store", [TorchStore(4), FaissStore(4)])
def test_what_no_file_could_hold_is_refused_when_it_is_given(store: Any) -> None:
    store.add(torch.eye(4))
    for values in ([-2] * 4, [2**31] * 4):
        with pytest.raises(ValueError, match="must be from -1"):
            store.add(torch.eye(4), values=values)
    with pytest.raises(ValueError, match="whole numbers"):
        store.remove([0.5])
    for number in (9, -2):
        with pytest.raises(ValueError, match="must be from -1 to 3"):
            store.entries(torch.tensor([number]))
    with pytest.raises(ValueError, match="at most"):
        store.search(torch.eye(4), 10**9)
    assert len(store) == 4 and store.remove([torch.tensor(1), 1]) == 1


@pytest.mark.parametrize("ids", [[], [3, 3], [5, 3]])
def test_marks_of_removed_entries_that_no_store_writes(ids: list[int], tmp_path: Path) -> None:
    store = FaissStore(4, path=tmp_path / "store")
    store.add(torch.eye(4).repeat(2, 1))
    store.remove([3])
    store.close()
    write_arrays(tmp_path / "store" / "removed.safetensors", {"ids": np.array(ids, np.int64)}, {})
    with pytest.raises(ValueError, match=r"removed\.safetensors is damaged"):
        open_store(tmp_path / "store")
