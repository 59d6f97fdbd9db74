"""What is shipped: a small LM and adapters trained for it, by name."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent


def asset(name: str | Path) -> Path | None:
    """The folder of a shipped model such as `"tiny-lm"`, or None if nothing has that name."""
    folder = ROOT / str(name)
    plain = "/" not in str(name) and "\\" not in str(name) and not str(name).startswith(".")
    return folder if plain and (folder / "config.json").is_file() else None


def asset_name(path: str | Path) -> str:
    """The name of a shipped model given its folder; any other path as it is."""
    if not str(path):
        return ""
    folder = Path(path)
    same = folder.is_dir() and folder.resolve().parent == ROOT.resolve()
    return folder.name if same else str(path)
