"""What is shipped: a small LM and adapters trained for it, by name."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent


def asset(name: str | Path) -> Path | None:
    """Return the folder of a shipped model such as `"tiny-lm"`, or None if nothing has that
    name."""
    folder = ROOT / str(name)
    plain = "/" not in str(name) and "\\" not in str(name) and not str(name).startswith(".")
    return folder if plain and (folder / "config.json").is_file() else None


def asset_name(path: str | Path) -> str:
    """Name a model so that it is found again from any working directory.

    Args:
        path: what it was loaded from.

    Returns:
        The name of a shipped model given its folder, any other folder's absolute path, and what is
        no folder (a repo id) as it is.
    """
    folder = Path(path)
    if not str(path) or not folder.is_dir():
        return str(path)
    return folder.name if folder.resolve().parent == ROOT.resolve() else str(folder.absolute())
