"""The documentation: every memory has its page, every page its place, every link its target."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

import memwrap

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

PARTS = [
    "What it is",
    "When to take it",
    "Settings",
    "Costs",
    "What other implementations do, and what memwrap does",
    "Measured here",
]


def navigation() -> list[str]:
    """The pages of mkdocs.yml's nav, in order."""

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    return pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """What headings are called in links, by mkdocs and by GitHub alike."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub(lambda m: m[0].strip("`"), text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("memory", memwrap.available())
def test_every_memory_has_a_page_in_the_navigation(memory: str) -> None:
    page = f"methods/{memory}.md"
    assert (DOCS / page).is_file(), f"{memory} has no docs/{page}"
    assert page in navigation(), f"docs/{page} is not in mkdocs.yml's nav"


@pytest.mark.parametrize("memory", memwrap.available())
def test_every_memory_page_has_the_parts_of_all_and_its_settings(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(f"methods/{memory}.md")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [h for h in headings if h in PARTS] == PARTS, headings
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("settings_tables")
    assert tables.page(memory, text) == text, "run benchmarks/settings_tables.py"
    settings = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    for field in dataclasses.fields(memwrap.config_class(memory)):
        assert settings.count(f"\n| `{field.name}` | ") == 1


def test_the_page_of_backbones_names_every_class_of_the_installed_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = importlib.import_module("backbones_table")
    rows = json.loads(table.RESULTS.read_text())
    page = table.page(rows)
    for name, kind in table.class_names().items():
        assert f"| `{name}` | {kind} |" in page
    if f"transformers {transformers.__version__}," in text_of("backbones.md"):
        assert page == text_of("backbones.md"), "run benchmarks/backbones_table.py none"
    newer = table.page({name: row for name, row in rows.items() if name != "llama"})
    assert re.search(r"^\| `llama` \| LlamaForCausalLM \| not tried", newer, re.MULTILINE)


def test_navigation_and_pages_are_the_same() -> None:
    listed = navigation()
    assert len(listed) == len(set(listed))
    assert set(listed) == set(PAGES)


@pytest.mark.parametrize("memory", memwrap.available())
def test_every_memory_has_its_row_in_the_index_of_papers(memory: str) -> None:
    lines = text_of("papers.md").splitlines()
    rows = [line for line in lines if line.startswith(f"| [`{memory}`]")]
    assert len(rows) == 1, f"{memory} needs one row in docs/papers.md, not {len(rows)}"
    cells = [cell.strip() for cell in rows[0].strip("|").split(" | ")]
    name, paper, file, *_, vectors, _, seen = cells
    assert len(cells) == 7 and all(cells), cells
    assert name == f"[`{memory}`](methods/{memory}.md)"
    assert re.search(r"arXiv \d{4}\.\d{5}\b", paper), paper
    module = importlib.import_module(memwrap.config_class(memory).__module__).__name__
    assert f"`{module.replace('.', '/')}.py`" in file
    paths = re.findall(r"`((?:memwrap|tests)/[\w/.]+)`", f"{file} {vectors}")
    assert [path for path in paths if not (ROOT / path).exists()] == []
    runner = f"tests/conformance/test_{memory}.py"
    assert f"`{runner}`" in vectors or not (ROOT / runner).exists()
    assert f"methods/{memory}.md#measured-here" in seen


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = text_of(page)
    for link in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (DOCS / page).parent / file if file else DOCS / page
        assert target.is_file(), f"docs/{page} links to {link}"
        assert target.resolve().is_relative_to(DOCS), f"docs/{page}: {link} is not on the site"
        if anchor and target.suffix == ".md":
            known = anchors(target.read_text(encoding="utf-8"))
            assert anchor in known, f"docs/{page} links to {link}; there are {sorted(known)}"


@pytest.mark.parametrize("page", PAGES)
def test_snippets_are_python(page: str) -> None:
    for snippet in SNIPPET.findall(text_of(page)):
        compile(snippet, page, "exec")


def test_public_names_are_on_the_api_page() -> None:
    listed = set(re.findall(r"^::: memwrap\.(\w+)$", text_of("api.md"), re.MULTILINE))
    assert set(memwrap.__all__) - {"__version__"} == listed
