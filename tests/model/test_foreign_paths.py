"""What is opened by a name: a saved model's files lead to no files elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import save_small_base
from transformers import AutoModelForCausalLM

import memwrap
from memwrap.data.documents import load_documents
from memwrap.data.readers import files_in
from memwrap.model.opening import is_memory_model, open_model, open_tokenizer
from memwrap.model.weight_files import seal


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    model = memwrap.wrap(AutoModelForCausalLM.from_pretrained(base), "window", segment_size=16)
    model.save_pretrained(tmp_path / "saved", include_base=True)
    return tmp_path / "saved"


def edited(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    marks = config.pop("sealed")["marks"]
    path.write_text(json.dumps(config))
    seal(folder, marks)


def test_the_tokenizer_of_an_own_base_is_found(saved: Path, base: Path) -> None:
    tokenizer = open_tokenizer(saved, open_model(saved))
    assert tokenizer("def f")["input_ids"]
    for file in base.glob("tokenizer*"):
        shutil.copy(file, saved)
    assert open_tokenizer(saved, open_model(saved)).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("place", ["{elsewhere}", "../elsewhere", "/etc", "http://127.0.0.1:9/x"])
def test_a_base_that_somebody_else_wrote_down_is_not_followed(
    saved: Path, base: Path, tmp_path: Path, place: str
) -> None:
    shutil.copytree(base, tmp_path / "elsewhere")
    edited(saved, base_model=place.format(elsewhere=tmp_path / "elsewhere"), base_mark="0" * 32)
    with pytest.raises(ValueError, match=r"did not save there|not in the folder"):
        open_tokenizer(saved, open_model(saved))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_a_link_out_is_refused(saved: Path, base: Path, name: str) -> None:
    for file in base.glob("tokenizer*"):
        shutil.copy(file, saved)
    (saved / name).unlink()
    (saved / name).symlink_to(base / name)
    with pytest.raises(ValueError, match="which is not in the folder"):
        open_tokenizer(saved, open_model(saved))


@pytest.mark.parametrize("whole", [False, True], ids=["a template", "the folder of templates"])
def test_a_chat_template_that_is_a_link_out_is_refused(
    saved: Path, base: Path, tmp_path: Path, whole: bool
) -> None:
    for file in base.glob("tokenizer*"):
        shutil.copy(file, saved)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("a secret")
    templates = saved / "additional_chat_templates"
    if whole:
        templates.symlink_to(tmp_path / "elsewhere")
    else:
        templates.mkdir()
        (templates / "x.jinja").symlink_to(tmp_path / "elsewhere" / "x.jinja")
    with pytest.raises(ValueError, match="which is not in the folder"):
        open_tokenizer(saved, open_model(saved))


def test_a_damaged_tokenizer_is_refused_in_a_sentence(saved: Path, base: Path) -> None:
    for file in base.glob("tokenizer*"):
        shutil.copy(file, saved)
    (saved / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "strange"}}')
    with pytest.raises(ValueError, match="is damaged"):
        open_tokenizer(saved, open_model(saved))


@pytest.mark.parametrize("what", [".old", ".gone.json"])
def test_completing_a_stopped_save_changes_and_reads_nothing_elsewhere(
    saved: Path, tmp_path: Path, what: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (saved, saved / ".saved"):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "file").write_text("x")
    target = elsewhere
    if what == ".gone.json":
        target = elsewhere / "names"
        target.write_text('["config.json"]')
    (saved / ".saved" / what).symlink_to(target)
    with pytest.raises(ValueError, match=r"cannot be completed|not in the folder"):
        open_model(saved)
    assert [path.name for path in elsewhere.iterdir()] == ["names"] * (what == ".gone.json")
    assert (saved / "config.json").is_file()


def test_a_config_is_looked_at_within_limits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        is_memory_model(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"not in the folder|holds no model"):
        is_memory_model(tmp_path)


def test_links_in_a_folder_of_documents_lead_nowhere_else(tmp_path: Path) -> None:
    """Whoever made the folder made its links too; a file that is meant can be named."""
    folder, elsewhere = tmp_path / "documents", tmp_path / "elsewhere"
    for place in (folder / "train", elsewhere):
        place.mkdir(parents=True)
        (place / "text.md").write_text("a text of some words")
    (folder / "again.md").symlink_to("train/text.md")
    (folder / "itself.md").symlink_to("itself.md")
    (folder / "zero.md").symlink_to("/dev/zero")
    assert [path.name for path in files_in(folder)] == ["again.md", "text.md"]
    (folder / "secret.md").symlink_to(elsewhere / "text.md")
    with pytest.raises(ValueError, match=r"secret\.md.*not in the folder"):
        files_in(folder)
    (folder / "secret.md").unlink()
    assert len(load_documents(str(folder), split="train")) == 1
    shutil.rmtree(folder / "train")
    (folder / "train").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"train.*not in the folder"):
        load_documents(str(folder), split="train")
