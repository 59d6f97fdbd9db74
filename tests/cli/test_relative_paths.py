"""Paths relative to the working directory, in every command and call that takes one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap import exporting
from memwrap.stores import FaissStore, TorchStore, open_store
from memwrap.testing.helpers import error_of, ids

TEXT = "".join(f"Line {n}: the number of this line is {n}.\n" for n in range(40))
TINY = (
    "trainer.device=cpu", "trainer.save_every=1", "data.max_tokens=64", "data.min_tokens=8",
    "data.split=null", "data.eval_split=null", "trainer.batch_size=1",
)  # fmt: skip


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a base, a saved model and texts."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(name + TEXT)
    monkeypatch.chdir(tmp_path)
    model = memwrap.wrap(load_base("base"), "rmt", segment_size=16, num_memory_tokens=2)
    model.save_pretrained("model")
    AutoTokenizer.from_pretrained("base").save_pretrained("model")
    return tmp_path


def load_base(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.slow
def test_reading_talking_and_exporting(here: Path) -> None:
    run("read", "model", "texts/a.txt", "-o", "states/a.safetensors")
    run("read", "model", "texts", "-o", "b.safetensors", "--state",
        "states/a.safetensors")  # fmt: skip
    run("chat", "model", "--state", "b.safetensors", "--ask", "Line 3",
        "--max-new-tokens", "2")  # fmt: skip
    run("chat", "model", stdin="Line 3\n/save talk.safetensors\n/quit\n")
    assert {p.name for p in here.rglob("*.safetensors")} >= {"a.safetensors", "talk.safetensors"}
    output = run("export", "model", "deep/exported").output
    assert "wrote deep/exported" in output and "loads without memwrap" in output
    assert (here / "deep" / "exported" / "modeling_memwrap.py").is_file()
    run("doctor", "--model", "base")
    assert not list(here.rglob(".exporting-*"))


@pytest.mark.slow
def test_training_and_measuring(here: Path) -> None:
    words = ("model.name=base", "data.source=texts", "output=runs/first", *TINY)
    run("train", "rmt_lora_tiny", *words, "trainer.steps=1")
    shutil.copy(here / "runs" / "first" / "recipe.yaml", here / "mine.yaml")
    run("train", "mine.yaml", "trainer.steps=2", "resume=true")
    run("train", "mine.yaml", "trainer.steps=1", "init_from=runs/first", "output=runs/second")
    words = ("--documents", "texts", "--split", "all", "--tokens", "40", "--count", "2")
    run("eval", "runs/first", *words)
    assert (here / "runs" / "first" / "eval" / "perplexity.json").is_file()
    run("eval", "model", *words, "-o", "measured")
    found = ("runs/first/eval/perplexity.json", "measured/perplexity.json")
    run("compare", *found, "-o", "both.html")
    assert (here / "both.html").stat().st_size > 500


def test_stores(here: Path) -> None:
    run("store", "build", "texts", "-o", "stores/one", "--model", "base", "--split", "all",
        "--segment", "16")  # fmt: skip
    run("store", "tune", "stores/one", "--model", "base", "--documents", "texts", "--split", "all",
        "--tokens", "40", "--count", "1", "--top-k", "4")  # fmt: skip
    run("store", "info", "stores/one", "--check")
    run("store", "remove", "stores/one", "a.txt")
    run("bench", "stores", "--entries", "200", "--dim", "4", "--queries", "5", "-o", "r/one.json")
    assert (here / "r" / "one.json").is_file()
    exact, indexed = TorchStore(4), FaissStore(4, path="stores/two")
    for store in (exact, indexed):
        store.add(torch.eye(4))
        store.commit()
    exact.save("exact")
    indexed.save("stores/three")
    for path in ("exact", "stores/two", "stores/three"):
        assert len(open_store(path)) == 4


@pytest.mark.slow
def test_calls_of_the_library(here: Path) -> None:
    model = memwrap.load("model")
    text = ids(1, 40)
    state = model.read(text)
    state.save("state.safetensors")
    assert memwrap.MemoryState.load("state.safetensors", model).nbytes == state.nbytes
    assert exporting.export(model, "out") is not None
    model.save_pretrained("deep/copy")
    for path in ("out", "./out", "deep/copy"):
        assert error_of(memwrap.load(path)(text).logits, model(text).logits) < 1e-5
    mind = memwrap.wrap(load_base("base"), "extended_mind", segment_size=16)
    library = memwrap.Library.encode(mind.eval(), {"one": text[0]})
    library.save("library")
    assert memwrap.Library.load("library", mind).documents.keys() == {"one"}


def test_a_saved_model_finds_its_base_from_elsewhere(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and store were given by relative paths; another working directory has none such."""
    want = memwrap.load("model")(ids(1, 40)).logits
    store = FaissStore(32, path="store")
    store.add(torch.randn(8, 32))
    store.commit()
    memwrap.wrap(load_base("base"), "knnlm", store="store").save_pretrained("searching")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    again = memwrap.load("../model")
    assert again.config.base_model == str(here / "base")
    assert len(memwrap.load("../searching").memories["knnlm"].store) == 8
    assert torch.equal(again(ids(1, 40)).logits, want)
