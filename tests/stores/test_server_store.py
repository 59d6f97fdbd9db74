"""The store on a real PostgreSQL server with pgvector, started from the package pgserver."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from torch import Tensor

from memwrap.stores import TorchStore, new_store, open_store
from memwrap.stores.server import PgVectorStore
from memwrap.stores.urls import parts_of

DIM = 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Q = drawn(500, DIM), drawn(9, DIM, seed=1)
SPANS = np.stack([np.arange(500), np.arange(2, 502)], 1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        warnings.simplefilter("ignore")  # what pgserver and its starting of processes warn of
        import pgserver

        running = pgserver.get_server(folder / "data", cleanup_mode="delete")
    try:
        yield running
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            running.cleanup()


@pytest.fixture()
def url(server: Any, request: pytest.FixtureRequest) -> str:
    table = f"t_{zlib.crc32(request.node.name.encode())}"
    return f"{server.get_uri()}&table={table}"


def filled(url: str, metric: str = "l2") -> PgVectorStore:
    store = PgVectorStore(url, DIM, metric, batch=4)
    for number, part in enumerate(torch.arange(500).split(250)):
        new = store.add(
            X[part], values=part.numpy() * 7, document=f"d{number}", spans=SPANS[part],
            cursor={"next": int(part[-1]) + 1},
        )  # fmt: skip
        assert list(new) == part.tolist()
    return store


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_it_finds_what_exact_search_finds(url: str, metric: str) -> None:
    exact = TorchStore(DIM, metric)
    exact.add(X)
    want = exact.search(Q, 5)
    store = filled(url, metric)
    for _ in range(2):  # without an index, then with it
        found = store.search(Q, 5)
        assert torch.equal(found.ids, want.ids)
        assert torch.allclose(found.scores, want.scores, atol=1e-4)
        store.build()
    entries = store.entries(found.ids)
    assert np.array_equal(entries.values, want.ids.numpy() * 7)
    assert np.array_equal(entries.documents, want.ids.numpy() // 250)
    assert np.array_equal(entries.ends - entries.starts, np.full((9, 5), 2))
    assert store.entries(np.array([[-1, 3]])).values.tolist() == [[-1, 21]]
    assert len(store) == 500 and store.nbytes > 500 * DIM * 4
    assert store.remove_document("d0") == 250 == len(store)
    assert bool((store.search(Q, 5).ids >= 250).all())
    assert store.remove([250, 251, 1]) == 2
    store.clear()
    assert len(store) == 0 and store.documents == () and store.search(Q, 2).ids.eq(-1).all()
    store.add(X[:2])
    found = store.search(Q, 4)
    assert found.ids[:, 2:].eq(-1).all() and found.scores[:, 2:].isinf().all()
    store.close()


def test_another_process_finds_it(url: str, tmp_path: Path) -> None:
    store = filled(url)
    store.note({"tuned": {"temperature": 3.0}})
    store.save(tmp_path)
    with pytest.raises(ValueError, match="names the server"):  # whoever wrote it
        open_store(tmp_path)
    for again in (open_store(url), new_store(DIM, path=url)):
        assert isinstance(again, PgVectorStore)
        assert again.cursor == {"next": 500} and again.documents == ("d0", "d1")
        assert again.notes == {"tuned": {"temperature": 3.0}}
        assert torch.equal(again.search(Q, 3).ids, store.search(Q, 3).ids)
        again.close()
    store.drop()
    store.close()
    with pytest.raises(FileNotFoundError, match="no store"):
        open_store(url)


def cut(server: Any, store: PgVectorStore) -> None:
    """End the store's connection from the server's side."""
    pid = store._connection.info.backend_pid
    with psycopg.connect(server.get_uri(), autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


def test_it_reconnects(server: Any, url: str) -> None:
    store = filled(url)
    want = store.search(Q, 3).ids
    cut(server, store)
    assert torch.equal(store.search(Q, 3).ids, want)
    cut(server, store)
    assert store.add(X[:5], values=range(5)) == range(500, 505)
    assert len(store) == 505
    store.close()


def test_a_load_whose_answer_was_lost_is_not_doubled(url: str) -> None:
    store = filled(url)
    real, tries = store._retrying, []

    def lossy(function: Any) -> Any:
        result = real(function)
        if getattr(function, "__name__", "") == "load":  # the answer never came: once more
            tries.append(1)
            result = real(function)
        return result

    store._retrying = lossy  # type: ignore[method-assign]
    store.add(X[:7])
    assert tries and len(store) == 507 and store.search(X[:1], 2).ids[0].tolist() == [0, 500]
    store.close()


def test_a_failed_load_leaves_nothing(url: str) -> None:
    store = filled(url)
    with pytest.raises(ValueError, match="finite"):
        store.add(torch.full((3, DIM), torch.inf), document="bad")
    other = PgVectorStore(url, DIM)
    other.add(X[:1])
    assert store.add(X[1:2]) == range(501, 502)  # it sees what the other added
    assert store.documents == ("d0", "d1") and len(store) == 502
    other.close()
    store.close()


def test_errors_say_what_is_wrong(url: str, tmp_path: Path) -> None:
    filled(url).close()
    with pytest.raises(ValueError, match="width 8"):
        PgVectorStore(url, 9)
    with pytest.raises(ValueError, match="metric 'l2'"):
        PgVectorStore(url, DIM, "ip")
    with pytest.raises(ValueError, match="at most 2000"):
        PgVectorStore(url, 4096)
    for bad, words in (("ef_search=no", "ef_search"), ("table=a;b", "table")):
        with pytest.raises(ValueError, match=words):
            PgVectorStore(f"postgresql:///x?{bad}", DIM)
    with pytest.raises(ValueError, match="postgresql://"):
        PgVectorStore("mysql://x", DIM)
    away = f"postgresql://me:secret@127.0.0.1:1/notes?host={tmp_path}"
    with pytest.raises(ConnectionError, match="No PostgreSQL server answers at me@") as caught:
        PgVectorStore(away, DIM)
    assert "secret" not in str(caught.value)


def test_urls() -> None:
    url, table, settings = parts_of(
        "postgresql://u@h:5/d?table=x&ef_search=99&options=-c%20a%3Db&sslmode=require"
    )
    assert url == "postgresql://u@h:5/d?options=-c%20a%3Db&sslmode=require"
    assert table == "x" and settings == {"m": 16, "ef_construction": 64, "ef_search": 99}


@pytest.mark.slow
def test_a_server_that_goes_away(tmp_path_factory: pytest.TempPathFactory, server: Any) -> None:
    """Last in the file: it stops the server."""
    store = PgVectorStore(f"{server.get_uri()}&table=gone", DIM)
    store.add(X[:3])
    server.cleanup()
    with pytest.raises(ConnectionError, match="No PostgreSQL server answers"):
        store.search(Q, 1)
