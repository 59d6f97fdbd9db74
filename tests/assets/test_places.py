"""A name that leads nowhere is refused at once, with what it may have meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from memwrap.assets import ROOT, places
from memwrap.assets.places import find_model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of the Hub, which does not answer."""
    calls: list[dict[str, Any]] = []

    def silent(url: str, **options: Any) -> None:
        calls.append({"url": url, **options})
        raise ConnectionError("no route")

    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", silent)
    return calls


def test_folders_and_names_are_found_without_the_hub(
    tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    assert find_model("tiny-lm") == ROOT / "tiny-lm" and find_model(tmp_path) == tmp_path
    assert not asked and {"tiny-lm", "armt-facts", "smollm2"} <= set(places.known_names())
    with pytest.raises(FileNotFoundError, match="There is no folder /no/such"):
        find_model("/no/such")


def test_a_mistyped_name_is_asked_for_once(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(FileNotFoundError, match=r"'smolm2'.*does not answer.*mean smollm2\?") as e:
        find_model("smolm2")
    assert len(str(e.value)) <= 320 and len(asked) == 1 and asked[0]["timeout"] < 2
    with pytest.raises(FileNotFoundError, match=r"names here: armt-facts, .*tiny-lm"):
        find_model("Somebody/xyzzy-9000")
    with pytest.raises(FileNotFoundError, match="may not be asked"):
        find_model("Somebody/xyzzy-9000", local_files_only=True)
    assert len(asked) == 2


def test_the_environment_says_how_long_is_waited(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")
    with pytest.raises(FileNotFoundError):
        find_model("smolm2")
    assert asked[0]["timeout"] == 30


def test_what_the_hub_has_or_keeps_back_is_left_to_the_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error: type[Exception] | None = None

    def answer(url: str, **options: Any) -> None:
        if error is not None:
            raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    assert find_model("a/b") == "a/b"
    error = GatedRepoError
    assert find_model("a/b") == "a/b"
    error = TimeoutError
    assert find_model("a/b") == "a/b"
    error = RepositoryNotFoundError
    with pytest.raises(FileNotFoundError, match="shows no such model to you"):
        find_model("a/b")


def test_what_lies_in_the_hubs_cache_is_not_asked_for(
    asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Also where the repo's configs stand in subfolders."""
    repo = tmp_path / "models--a--b"
    (repo / "snapshots" / "0123" / "sub").mkdir(parents=True)
    (repo / "snapshots" / "0123" / "sub" / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    assert find_model("a/b", cache_dir=str(tmp_path)) == "a/b" and not asked
    with pytest.raises(FileNotFoundError, match="does not answer"):
        find_model("a/c", cache_dir=str(tmp_path))
