"""Where a faiss store searches when faiss has GPUs: with a stand-in for a GPU, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import pytest
import torch
from torch import Tensor

from memwrap.stores import FaissStore, open_store
from memwrap.stores import gpu as module

DIM = 8


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)).half().float()


X, Q = drawn(400), drawn(7, seed=1)


class OnGpu:
    """An index as a GPU has it: no parameters of a search, and limits."""

    def __init__(self, index: Any, number: int, options: Any) -> None:
        self.index, self.number, self.options = faiss.clone_index(index), number, options
        self.ntotal, self.nprobe, self.searches = index.ntotal, 1, 0

    def search(self, queries: Any, k: int) -> Any:
        assert k <= module.MOST
        self.searches += 1
        lists = faiss.try_extract_index_ivf(self.index)
        if lists is not None:
            lists.nprobe = self.nprobe
        return self.index.search(queries, k)


class FaissWithGpus:
    """faiss, and what its package for GPUs has beside."""

    def __init__(self, count: int = 2, full: bool = False) -> None:
        self.count, self.full, self.copies = count, full, []

    def __getattr__(self, name: str) -> Any:
        return getattr(faiss, name)

    class GpuClonerOptions:
        useFloat16 = allowCpuCoarseQuantizer = False

    class StandardGpuResources:
        def setTempMemory(self, size: int) -> None:
            assert size == module.SCRATCH

    class GpuParameterSpace:
        def set_index_parameter(self, index: OnGpu, name: str, value: int) -> None:
            assert name == "nprobe" and 1 <= value <= module.MOST
            index.nprobe = value

    def get_num_gpus(self) -> int:
        return self.count

    def index_cpu_to_gpu(self, resources: Any, number: int, index: Any, options: Any) -> OnGpu:
        if self.full:
            raise RuntimeError("Error in void* StandardGpuResourcesImpl\nout of memory")
        self.copies.append(OnGpu(index, number, options))
        return self.copies[-1]


@pytest.fixture()
def gpus(monkeypatch: pytest.MonkeyPatch) -> FaissWithGpus:
    found = FaissWithGpus()
    monkeypatch.setattr(module, "faiss_module", lambda: found)
    return found


def store(**options: Any) -> FaissStore:
    made = FaissStore(DIM, **options)
    made.add(X)
    return made


def same(one: FaissStore, other: FaissStore, k: int = 5) -> None:
    a, b = one.search(Q, k), other.search(Q, k)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.scores, b.scores)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,SQ8", "OPQ4,IVF4,PQ4x4"])
def test_the_same_code_searches_a_gpu(factory: str, gpus: FaissWithGpus) -> None:
    own, there = store(factory=factory, effort=3), store(factory=factory, effort=3, device="cpu")
    same(own, there)
    (copy,) = gpus.copies
    assert copy.searches == 1 and copy.number == 0
    assert copy.options.useFloat16 == ("PQ" in factory) and copy.options.allowCpuCoarseQuantizer
    if "IVF" in factory:
        assert copy.nprobe == own.effort
    same(own, there)
    assert len(gpus.copies) == 1 and copy.searches == 2


def test_the_copy_follows_the_store(gpus: FaissWithGpus, tmp_path: Path) -> None:
    own = store(path=tmp_path / "s", device="cuda:1")
    there = store(device="cpu")
    same(own, there)
    for one in (own, there):
        one.add(drawn(50, seed=2))
    same(own, there)
    assert [(c.ntotal, c.number) for c in gpus.copies] == [(400, 1), (450, 1)]
    for one in (own, there):  # a GPU cannot leave entries out: it is asked for more
        one.remove(range(100))
    same(own, there)
    assert gpus.copies[-1].searches == 2
    own.build()
    own.close()
    same(open_store(tmp_path / "s", device="cpu"), there)  # type: ignore[arg-type]
    same(open_store(tmp_path / "s", device="cuda"), there)  # type: ignore[arg-type]
    assert len(gpus.copies) == 3
    own.clear()
    own.add(X[:10])
    assert own.search(X[:3], 1).ids.tolist() == [[0], [1], [2]]


def test_more_neighbours_than_a_gpu_gives(
    gpus: FaissWithGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 20)
    own = store(device="cuda")
    same(own, store(device="cpu"), 21)
    assert not gpus.copies
    same(own, store(device="cpu"), 20)
    assert len(gpus.copies) == 1
    own.remove([0])
    assert own.search(Q, 20).ids.shape == (7, 20) and gpus.copies[0].searches == 1


def test_kinds_that_stay_on_the_cpu(gpus: FaissWithGpus, tmp_path: Path) -> None:
    same(store(factory="HNSW8"), store(factory="HNSW8", device="cpu"))
    with pytest.raises(ValueError, match=r"no such kind of index on a GPU.*device='cpu'"):
        store(factory="HNSW8", device="cuda").search(Q, 3)
    written = store(path=tmp_path / "s")
    written.build()
    written.close()
    same(FaissStore.load(tmp_path / "s", mmap=True), store(device="cpu"))
    assert not gpus.copies
    with pytest.raises(ValueError, match="mapped"):
        FaissStore.load(tmp_path / "s", mmap=True, device="cuda")


def test_no_graph_is_chosen_for_a_gpu(
    gpus: FaissWithGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memwrap.stores.indexes.FLAT_MOST", 100)
    there, own = store(device="cpu", path=tmp_path / "cpu"), store(path=tmp_path / "gpu")
    for one, kind in ((there, "HNSW32"), (own, "Flat")):
        one.build()
        assert one.made_by == kind
        one.close()
    for folder, device, kind in (
        ("cpu", None, "Flat"),
        ("cpu", "cpu", "HNSW32"),
        ("gpu", None, "Flat"),
        ("gpu", "cpu", "Flat"),
    ):
        found = FaissStore.load(tmp_path / folder, device=device)
        found.search(Q, 3)
        assert found.made_by == kind


def test_a_full_gpu(gpus: FaissWithGpus) -> None:
    gpus.full = True
    own = store()
    with pytest.warns(UserWarning, match=r"searched on the CPU.*out of memory"):
        own.search(Q, 3)
    same(own, store(device="cpu"))  # and warns no more
    with pytest.raises(ValueError, match=r"GPU 0: out of memory"):
        store(device="cuda").search(Q, 3)


def test_devices_that_are_not_there(gpus: FaissWithGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("gpu", "cuda:x", "mps"):
        with pytest.raises(ValueError, match="`device`"):
            FaissStore(DIM, device=device)
    with pytest.raises(ValueError, match="sees 2 GPUs"):
        FaissStore(DIM, device="cuda:2")
    gpus.count = 0
    same(store(), store(device="cpu"))
    assert not gpus.copies
    monkeypatch.setattr(module, "faiss_module", lambda: faiss)  # faiss-cpu
    same(store(), store(device="cpu"))
    with pytest.raises(ImportError, match=r"memwrap\[gpu\]"):
        FaissStore(DIM, device="cuda")
