"""`memwrap store` and `memwrap bench stores`, with a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run
from transformers import AutoTokenizer, LlamaForCausalLM

import memwrap
from memwrap.stores import FaissStore, open_store


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        lines = (f"Line {n} of document {number} says {n * number}.\n" for n in range(8))
        (folder / f"d{number}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def store(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    words = ("store", "build", corpus, "-o", path, "--model", base, "--split", "all")
    result = run(*words, "--segment", 16)
    assert "entries of 4 documents" in result.output
    assert result.output.splitlines()[-1] == run(*words, "--segment", 16).output.splitlines()[-1]
    return path


def test_build_and_info(store: Path) -> None:
    output = run("store", "info", store, "--check").output
    opened = open_store(store)
    assert f"{len(opened):,}" in output and "whole" in output and "Flat" in output
    assert opened.documents == tuple(f"d{n}.txt" for n in range(4))
    assert opened.notes["segment_size"] == 16 and opened.notes["key"] == "ffn"


def test_tune_notes_its_result(store: Path, base: Path, corpus: Path) -> None:
    words = ("--model", base, "--documents", corpus, "--split", "all", "--tokens", 64)
    output = run("store", "tune", store, *words, "--count", 1, "--top-k", 8).output
    assert "without the store" in output and "noted in the store" in output
    tuned = open_store(store).notes["tuned"]
    # The store holds the very text: the more of it the better.
    assert tuned["interpolation"] == 0.8
    config = memwrap.KnnLMConfig(store=str(store), segment_size=16, top_k=8)
    model = memwrap.wrap(LlamaForCausalLM.from_pretrained(base), config)
    assert model.memories["knnlm"].settings(torch.ones(1))[0] == 0.8  # type: ignore[operator]


def test_remove(store: Path, tmp_path: Path) -> None:
    open_store(store).save(tmp_path / "copy")
    before = len(open_store(tmp_path / "copy"))
    output = run("store", "remove", tmp_path / "copy", "d2.txt").output
    left = len(open_store(tmp_path / "copy"))
    assert f"removed {before - left:,} entries" in output and left < before
    assert "no document" in run("store", "remove", tmp_path / "copy", "d9", expect=2).output


def test_a_model_with_a_memory_builds_too(base: Path, corpus: Path, tmp_path: Path) -> None:
    wrapped = memwrap.wrap(
        LlamaForCausalLM.from_pretrained(base), "armt", segment_size=16, num_memory_tokens=2
    )
    wrapped.save_pretrained(tmp_path / "armt")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "armt")
    words = ("store", "build", corpus, "-o", tmp_path / "s", "--split", "all", "--tokens", 20)
    run(*words, "--model", tmp_path / "armt")
    opened = open_store(tmp_path / "s")
    assert isinstance(opened, FaissStore) and opened.notes["segment_size"] == 16
    assert set(opened.notes["model"]) == {"backbone", "memories"}


def test_bench_stores(tmp_path: Path) -> None:
    output = run(
        "bench", "stores", "--entries", 500, "--dim", 8, "--queries", 20, "-o", tmp_path / "r.json"
    ).output
    assert "recall@16 1.000" in output
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["stores"]) == {"torch", "faiss"} and result["entries"] == 500
    for got in result["stores"].values():
        assert got["recall_at_16"] == 1.0 and got["bytes_per_vector"] >= 32


def test_errors_in_plain_words(base: Path, tmp_path: Path) -> None:
    assert "no store" in run("store", "info", tmp_path, expect=2).output
    assert "--url" in run("bench", "stores", "--stores", "pgvector", expect=2).output
    assert "Unknown stores" in run("bench", "stores", "--stores", "x", expect=2).output
    words = ("store", "build", tmp_path / "nothing", "-o", tmp_path / "s", "--model", base)
    assert "no file or folder" in run(*words, expect=2).output
