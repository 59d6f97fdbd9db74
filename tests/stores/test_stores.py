"""Stores in memory and on disk: the same neighbours and entries, nothing lost, nothing doubled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memwrap.evaluation.store_bench import overtakes
from memwrap.stores import (
    CROSSOVER,
    FaissStore,
    Store,
    TorchStore,
    choose_kind,
    new_store,
    open_store,
)
from memwrap.stores.indexes import choose_factory

DIM = 8
ROOT = Path(__file__).resolve().parents[2]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Vectors that float16 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()


X, Q = drawn(300, DIM), drawn(9, DIM, seed=1)
SPANS = np.stack([np.arange(300), np.arange(1, 301)], 1)


def filled(store: Store) -> Store:
    for number, part in enumerate(torch.arange(300).split(100)):
        new = store.add(
            X[part], values=part.numpy() * 7, document=f"d{number}", spans=SPANS[part],
            cursor={"next": int(part[-1]) + 1},
        )  # fmt: skip
        assert list(new) == part.tolist()
    return store


def ranked(metric: str) -> tuple[Tensor, Tensor]:
    scores = torch.cdist(Q, X) ** 2 if metric == "l2" else -(Q @ X.T)
    best = scores.sort(1)
    values = best.values if metric == "l2" else -best.values
    return values[:, :5], best.indices[:, :5]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["torch", "faiss", "faiss on disk", "faiss graph"])
def test_all_find_the_same(kind: str, metric: str, tmp_path: Path) -> None:
    made: dict[str, Any] = {
        "torch": lambda: TorchStore(DIM, metric),
        "faiss": lambda: FaissStore(DIM, metric),
        "faiss on disk": lambda: FaissStore(DIM, metric, path=tmp_path / "own", shard_size=120),
        "faiss graph": lambda: FaissStore(DIM, metric, factory="HNSW16"),
    }
    store = filled(made[kind]())
    scores, ids = ranked(metric)
    found = store.search(Q, 5)
    assert torch.equal(found.ids, ids)
    assert torch.allclose(found.scores, scores, atol=1e-4)
    entries = store.entries(found.ids)
    assert np.array_equal(entries.values, ids.numpy() * 7)
    assert np.array_equal(entries.documents, ids.numpy() // 100)
    assert np.array_equal(entries.starts, ids.numpy())
    assert np.array_equal(entries.ends, ids.numpy() + 1)
    assert store.entries(np.array([-1])).values.tolist() == [-1]
    assert len(store) == 300 and store.nbytes >= 300 * DIM * 4
    assert store.documents == ("d0", "d1", "d2") and store.of_document(1) == list(range(100, 200))
    store.save(tmp_path / "saved")
    again = open_store(tmp_path / "saved")
    assert type(again) is type(store) and again.cursor == {"next": 300}
    assert torch.equal(again.search(Q, 5).ids, ids)
    assert store.remove(ids[0].tolist()) == 5 and store.remove(ids[0].tolist()) == 0
    assert not set(store.search(Q, 5).ids.flatten().tolist()) & set(ids[0].tolist())
    before = len(store)
    assert before == 295 and store.remove_document("d1") == before - len(store)
    left = store.search(Q, 3).ids
    assert not bool(((left >= 100) & (left < 200)).any())
    store.save(tmp_path / "less")
    less = open_store(tmp_path / "less")
    assert len(less) == len(store) and torch.equal(less.search(Q, 3).ids, left)
    store.clear()
    assert len(store) == 0 and store.cursor is None and store.documents == ()
    assert store.search(Q, 2).ids.eq(-1).all() and store.search(Q, 2).scores.isinf().all()
    filled(store)
    assert torch.equal(store.search(Q, 5).ids, ids)


def test_fewer_entries_than_neighbours() -> None:
    for store in (TorchStore(DIM), FaissStore(DIM)):
        store.add(X[:2])
        found = store.search(Q, 4)
        assert found.ids[:, 2:].eq(-1).all() and found.scores[:, 2:].isinf().all()
        assert found.ids[:, :2].sort(1).values.tolist() == [[0, 1]] * len(Q)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8_HNSW4,PQ4x4", "SQ8", "OPQ4,IVF4,PQ4x4"])
def test_other_kinds_of_index(factory: str, tmp_path: Path) -> None:
    """All lists searched and all candidates scored anew: these too are exact."""
    store = FaissStore(DIM, path=tmp_path / "s", factory=factory, effort=8, refine=60)
    filled(store).build()  # type: ignore[attr-defined]
    want = ranked("l2")[1]
    found = store.search(Q, 5).ids
    overlap = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.tolist(), want.tolist())])  # noqa: B905
    assert overlap == 1.0
    store.remove([int(found[0, 0])])
    assert int(found[0, 0]) not in store.search(Q, 5).ids[0].tolist()
    store.close()
    mapped = FaissStore.load(tmp_path / "s", mmap=True, effort=8, refine=60)
    assert torch.equal(mapped.search(Q, 5).ids, store.search(Q, 5).ids)
    with pytest.raises(ValueError, match="read-only"):
        mapped.add(X)


def test_index_kinds_follow_the_size() -> None:
    assert choose_factory(1000, 128) == "Flat"
    assert choose_factory(32_768, 128) == choose_factory(200_000, 64) == "HNSW32"
    assert choose_factory(200_000, 128, graph=False) == "Flat"
    assert choose_factory(10**6, 128) == "IVF4096,Flat" == choose_factory(10**6, 128, graph=False)
    assert choose_factory(10**8, 768) == "IVF32768_HNSW32,PQ64"
    assert choose_factory(10**8, 100).endswith("PQ50")
    store = FaissStore(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memwrap.stores.indexes.FLAT_MOST", 50)
        patch.setattr("memwrap.stores.indexes.GRAPH_MOST", 90)
        for count, kind in ((50, "Flat"), (80, "HNSW32"), (120, "IVF32,Flat")):
            store.add(drawn(count - len(store), 2, seed=count))
            store.search(Q[:, :2], 1)
            assert store.made_by == kind and len(store) == count


def test_kinds_follow_the_measured_crossover() -> None:
    result = json.loads((ROOT / "benchmarks/results/stores.json").read_text())["crossover"]
    assert CROSSOVER["cpu"] == result["from_entries"] == overtakes(result)
    assert choose_kind(CROSSOVER["cpu"] - 1) == "torch" and choose_kind(None) == "faiss"
    assert choose_kind(CROSSOVER["cpu"], "cpu") == "faiss"
    assert isinstance(new_store(4, entries=10), TorchStore)
    assert isinstance(new_store(4), FaissStore)


# Rows of a batch, heads, rings


def test_rows_and_heads_are_apart() -> None:
    store = TorchStore(DIM, rows=(2, 3), capacity=6)
    x, q = drawn(2, 3, 5, DIM, seed=2), drawn(2, 3, 4, DIM, seed=3)
    valid = torch.tensor([[True, True, True, True, False], [False, True, False, False, True]])
    store.add(x, valid=valid)
    assert store.counts.tolist() == [4, 2] and len(store) == 6
    found = store.search(q, 3)
    for row, kept in enumerate(([0, 1, 2, 3], [1, 4])):
        for head in range(3):
            want = (torch.cdist(q[row, head], x[row, head][kept]) ** 2).sort(1)
            k = min(3, len(kept))
            assert torch.equal(found.ids[row, head, :, :k], want.indices[:, :3])
            assert torch.allclose(found.scores[row, head, :, :k], want.values[:, :3], atol=1e-5)
    assert found.ids[1, :, :, 2].eq(-1).all()
    store.clear(torch.tensor([0]))
    assert store.search(q, 1).ids[0].eq(-1).all() and store.search(q, 1).ids[1].ge(0).all()


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1] * 9, [9], [20, 2]])
def test_a_ring_keeps_the_last(sizes: list[int], tmp_path: Path) -> None:
    store, seen = TorchStore(DIM, capacity=5), torch.zeros(0, DIM)
    for index, size in enumerate(sizes):
        part = drawn(size, DIM, seed=10 + index)
        store.add(part, values=torch.arange(len(seen), len(seen) + size))
        seen = torch.cat([seen, part])
        first = max(0, len(seen) - 5)
        want = (torch.cdist(Q, seen[first:]) ** 2).sort(1).indices[:, :1] + first
        found = store.search(Q, 1)
        assert torch.equal(found.ids, want), (index, found.ids, want)
        assert np.array_equal(store.entries(found.ids).values, want.numpy())
        assert len(store) == min(5, len(seen))
    store.save(tmp_path)
    again = TorchStore.load(tmp_path)
    assert torch.equal(again.search(Q, 3).ids, store.search(Q, 3).ids)
    again.add(X[:2])
    store.add(X[:2])
    assert torch.equal(again.search(Q, 3).ids, store.search(Q, 3).ids)
    assert store.remove([int(store.search(Q, 1).ids[0, 0])]) == 1 and len(store) == 4


# What is killed, damaged, or wrong

_WRITER = """
import os, signal, sys, time, torch
torch.set_num_threads(1)
from memwrap.stores import FaissStore

def write():
    store = FaissStore(4, path=sys.argv[1], shard_size=16, factory="HNSW8", checkpoint_seconds=0)
    first = (store.cursor or {"next": 0})["next"]
    for n in range(first, 60):
        x = torch.arange(n * 10, n * 10 + 10)[:, None] * torch.tensor([1.0, 0.5, 0.25, 2.0])
        values = range(n * 10, n * 10 + 10)
        store.add(x / 64, values=values, document=f"d{n}", cursor={"next": n + 1})
    store.build()

kills = 0
for pause in map(float, sys.argv[2:]):
    child = os.fork()
    if not child:
        write()
        os._exit(0)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
write()
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    """SIGKILL at many moments: the last run completes, no entry is lost, none is there twice."""
    path = tmp_path / "store"
    pauses = [0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.11, 0.13, 0.15, 0.2, 0.25]
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(path), *map(str, pauses)],
        capture_output=True, text=True, cwd=ROOT, timeout=580, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(done.stdout) >= 3, "nothing was killed in the middle: the test proves nothing"
    store = FaissStore.load(path)
    store.verify()
    assert len(store) == 600 and store._indexed == 600 and len(store.documents) == 60
    everything = store.entries(np.arange(600))
    assert everything.values.tolist() == list(range(600))
    assert everything.documents.tolist() == [n // 10 for n in range(600)]
    want = torch.arange(600)[:, None] * torch.tensor([1.0, 0.5, 0.25, 2.0]) / 64
    assert torch.allclose(store.vectors(range(600)), want, atol=1e-2)
    found = store.search(store.vectors(range(600)), 1).ids[:, 0]
    assert float((found == torch.arange(600)).float().mean()) > 0.98
    assert not list(path.glob(".*.tmp"))


_KILLED_AT = """
import os, signal, sys, tempfile, torch
torch.set_num_threads(1)
from memwrap.stores import FaissStore

CALLS = ("open", "fsync", "replace", "unlink")

def write(path):
    store = FaissStore(4, path=path, shard_size=16, factory="HNSW8", checkpoint_seconds=0)
    first = (store.cursor or {"next": 0})["next"]
    for n in range(first, 5):
        x = torch.arange(n * 10, n * 10 + 10)[:, None] * torch.tensor([1.0, 0.5, 0.25, 2.0])
        values = range(n * 10, n * 10 + 10)
        store.add(x / 64, values=values, document=f"d{n}", cursor={"next": n + 1})
    store.build()

def killed(path, moment):
    # The process ends just before its call number `moment` that changes or opens a file.
    child = os.fork()
    if not child:
        left = [moment]
        def counting(real):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call
        for name in CALLS:
            setattr(os, name, counting(getattr(os, name)))
        write(path)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

moment = 1
while killed(f"{sys.argv[1]}/{moment}", moment):
    killed(f"{sys.argv[1]}/{moment}", moment // 2 + 1)  # and once more, while it goes on
    write(f"{sys.argv[1]}/{moment}")
    moment += 1
print(moment - 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
@pytest.mark.slow
def test_a_build_killed_at_every_step_goes_on(tmp_path: Path) -> None:
    """SIGKILL before each single call that opens, syncs, renames or deletes a file."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_AT, str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, timeout=580, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    moments = int(done.stdout)
    assert moments > 25, moments
    want = torch.arange(50)[:, None] * torch.tensor([1.0, 0.5, 0.25, 2.0]) / 64
    for moment in range(1, moments + 1):
        store = FaissStore.load(tmp_path / str(moment))
        store.verify()
        assert len(store) == 50 and store._indexed == 50, moment
        everything = store.entries(np.arange(50))
        assert everything.values.tolist() == list(range(50)), moment
        assert everything.documents.tolist() == [n // 10 for n in range(50)], moment
        assert torch.equal(store.vectors(range(50)), want.half().float()), moment
        assert not list(store.path.glob(".*.tmp"))  # type: ignore[union-attr]


@pytest.fixture()
def on_disk(tmp_path: Path) -> Path:
    store = filled(FaissStore(DIM, path=tmp_path / "s", shard_size=100))
    store.remove([3])
    store.build()  # type: ignore[attr-defined]
    store.close()  # type: ignore[attr-defined]
    return tmp_path / "s"


FILES = (
    "store.json", "index.json", "index-000000000300.faiss", "removed.safetensors",
    "shard-000001.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_damaged_files_are_named(on_disk: Path, name: str, damage: str) -> None:
    assert len(FaissStore.load(on_disk)) == 299
    file = on_disk / name
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "foreign": b"x" * 99}[damage])
    with pytest.raises(ValueError, match=name):
        FaissStore.load(on_disk)


def test_flipped_bytes_are_found(on_disk: Path) -> None:
    for name in ("index-000000000300.faiss", "shard-000001.safetensors"):
        file = on_disk / name
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
        with pytest.raises(ValueError, match=name):
            FaissStore.load(on_disk).verify()
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
    FaissStore.load(on_disk).verify()


def test_missing_files_are_named(on_disk: Path) -> None:
    shard = on_disk / "shard-000001.safetensors"
    shard.rename(on_disk / "away")
    with pytest.raises(FileNotFoundError, match="shard-000001"):
        FaissStore.load(on_disk)
    (on_disk / "away").rename(shard)
    (on_disk / "shard-000002.safetensors").unlink()
    with pytest.raises(ValueError, match="a shard is missing"):
        FaissStore.load(on_disk)
    with pytest.raises(FileNotFoundError, match="no store"):
        open_store(on_disk / "nowhere")


def test_a_torch_store_file_that_is_damaged(tmp_path: Path) -> None:
    filled(TorchStore(DIM)).save(tmp_path)
    file = tmp_path / "store.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-40] ^= 1
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"store\.safetensors is damaged"):
        open_store(tmp_path)


def test_one_process_writes(tmp_path: Path) -> None:
    store = FaissStore(DIM, path=tmp_path / "s")
    other = FaissStore(DIM, path=tmp_path / "s")
    with pytest.raises(ValueError, match="Another process"):
        other.add(X)
    store.close()
    other.add(X)
    other.close()


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    for store in (TorchStore(DIM), FaissStore(DIM), FaissStore(DIM, path=tmp_path / "s")):
        filled(store)
        for bad, words in (
            ({"vectors": X[:, :3]}, "shape"),
            ({"vectors": X.long()}, "floating point"),
            ({"vectors": torch.full((2, DIM), torch.nan)}, "finite"),
            ({"vectors": X[:2], "values": [1]}, "values"),
            ({"vectors": X[:2], "spans": [1, 2], "document": "new"}, "spans"),
        ):
            with pytest.raises(ValueError, match=words):
                store.add(**bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`k` is 0"):
            store.search(Q, 0)
        with pytest.raises(ValueError, match="no document"):
            store.remove_document("nobody")
        assert len(store) == 300 and store.documents == ("d0", "d1", "d2")
    with pytest.raises(ValueError, match="float32"):
        FaissStore(DIM).add(torch.full((1, DIM), 1e6))
    for settings, words in (
        ({"dim": 0}, "dim"), ({"metric": "cosine"}, "metric"), ({"dtype": "int8"}, "dtype"),
        ({"shard_size": 0}, "shard_size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            FaissStore(**{"dim": DIM, **settings})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factory"):
        broken = FaissStore(DIM, factory="NOPE")
        broken.add(X)
        broken.search(Q, 1)
    with pytest.raises(ValueError, match="dim 8, not 9"):
        FaissStore(9, path=tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ValueError, match="holds no store"):
        FaissStore(DIM, path=tmp_path / "other")
