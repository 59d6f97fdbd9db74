"""What the scripts share that write recorded results into the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
Rows = list[list[str]]


def load(name: str) -> dict[str, Any]:
    """A recorded result; empty where it was not measured yet."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def put(page: str, mark: str, text: str) -> None:
    """Replace what stands between a page's marks."""
    path = DOCS / page
    path.write_text(placed(path.read_text(), mark, text))


def placed(page: str, mark: str, text: str) -> str:
    """Return a page's text with `text` between its marks."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2]
    if not found or not after:
        raise SystemExit(f"A page has no marks {begin} and {end}: {page[:40]!r}.")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def table(rows: Rows) -> str:
    """Markdown; the first row is the head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def of_machine(values: dict[str, Any]) -> str:
    return f"{values['cpu']}, {values['cores']} cores, one thread, torch {values['torch']}"
