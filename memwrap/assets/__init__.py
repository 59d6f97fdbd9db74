"""Models that have a name: a small LM and adapters trained for it, which are shipped, and what
`memwrap fetch` brings once."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent
FETCHED = ("smollm2",)
"""Names of models that `memwrap fetch NAME` makes (`memwrap.assets.fetching`)."""


def cache_folder() -> Path:
    """Find where fetched models lie: `$MEMWRAP_CACHE`, else `memwrap` in `$XDG_CACHE_HOME`, else
    in `~/.cache`."""
    folder = os.environ.get("MEMWRAP_CACHE")
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "memwrap"


def asset(name: str | Path) -> Path | None:
    """Return the folder of a model such as `"tiny-lm"` or `"smollm2"`, or None if nothing has that
    name.

    Raises:
        FileNotFoundError: for a model that has to be fetched first.
    """
    plain = "/" not in str(name) and "\\" not in str(name) and not str(name).startswith(".")
    if not plain:
        return None
    for place in (ROOT, cache_folder() if str(name) in FETCHED else ROOT):
        if (place / str(name) / "config.json").is_file():
            return place / str(name)
    if str(name) in FETCHED and not Path(name).exists():
        raise FileNotFoundError(f"{name} is not on this machine yet; run `memwrap fetch {name}`.")
    return None


def asset_name(path: str | Path) -> str:
    """Name a model so that it is found again from any working directory.

    Args:
        path: what it was loaded from.

    Returns:
        The name of a shipped or fetched model given its folder, any other folder's absolute path,
        and what is no folder (a repo id) as it is.
    """
    folder = Path(path)
    if not str(path) or not folder.is_dir():
        return str(path)
    parent = folder.resolve().parent
    if parent == ROOT.resolve():
        return folder.name
    if folder.name in FETCHED and parent == cache_folder().resolve():
        return folder.name
    return str(folder.absolute())
