"""Sharing through the Hub's standard calls, against a stand-in that keeps repos in folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import TOLERANCE, ids, wrapped

TEXT = ids(2, 21)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds repos; huggingface_hub's calls go there."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token: str | None = None, **_: Any) -> None:
            self.token = token

        def create_repo(self, repo_id: str, *, exist_ok: bool = False, **_: Any) -> None:
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            if not (root / repo_id).is_dir():
                raise FileNotFoundError(f"no repo {repo_id}")
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"uploaded with token {self.token}"

    def snapshot_download(repo_id: str, **_: Any) -> str:
        if not (root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no repo {repo_id}")
        return str(root / repo_id)

    def metadata(url: str, **_: Any) -> None:
        if not (root / url.split("/resolve/")[0].split("/", 3)[3]).is_dir():
            kind = huggingface_hub.errors.RepositoryNotFoundError
            raise kind.__new__(kind)  # making one takes a server's answer

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT).logits


@pytest.mark.long
@pytest.mark.proof("Sharing through the Hub's calls (a stand-in for the server)", "huggingface_hub")
@pytest.mark.parametrize("memory", memwrap.available())
def test_pushed_and_loaded_by_repo_id(memory: str, hub: Path) -> None:
    model = wrapped(memory)
    assert model.push_to_hub("somebody/book-memory", token="t") == "uploaded with token t"
    names = {f.name for f in (hub / "somebody/book-memory").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = memwrap.load("somebody/book-memory", build("llama"))
    assert torch.equal(logits(loaded), logits(model))
    again = memwrap.MemoryModelForCausalLM.from_pretrained("somebody/book-memory", build("llama"))
    assert torch.equal(logits(again), logits(model))


def test_saving_can_push_and_a_base_can_go_along(hub: Path, tmp_path: Path) -> None:
    model = wrapped("armt")
    model.save_pretrained(
        tmp_path / "m", include_base=True, push_to_hub=True, repo_id="somebody/whole"
    )
    loaded = memwrap.load("somebody/whole")
    assert float((logits(loaded) - logits(model)).abs().max()) <= TOLERANCE


def test_what_is_not_there_says_so(hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model 'nobody/nothing'"):
        memwrap.load("nobody/nothing", build("llama"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        memwrap.load("./nowhere/at/all")
