"""What a model's name leads to: a folder, or a repo that the Hub, or its cache here, has."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from memwrap.assets import FETCHED, ROOT, asset

CONFIG = "config.json"
WAIT = 1.5
"""Seconds for the Hub's first word; `HF_HUB_ETAG_TIMEOUT`, where it is set."""


def known_names() -> list[str]:
    """Name the models that have one, shipped or to be fetched."""
    return sorted({path.parent.name for path in ROOT.glob(f"*/{CONFIG}")} | set(FETCHED))


def find_model(name: str | Path, **hub: Any) -> str | Path:
    """Find what a model is loaded from.

    huggingface_hub tries for half a minute where there is no network; whether a name leads anywhere
    is asked here, once. A Hub that is slow to answer is left to the loading, which waits longer.

    Args:
        name: a folder, a name such as `"smollm2"`, or a repo id on the Hub.
        hub: of the loading: `cache_dir`, `token`, `revision`, `local_files_only`.

    Returns:
        A folder, or the repo id.

    Raises:
        FileNotFoundError: if nothing of that name is found; names those that are alike.
    """
    folder = asset(name) or Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name).count("/") > 1 or str(name).startswith("."):
        raise FileNotFoundError(f"There is no folder {name}; save a model there first.")
    if not _cached(str(name), hub):
        reason = "may not be asked" if hub.get("local_files_only") else _asked(str(name), hub)
        if reason:
            raise FileNotFoundError(_unknown(str(name), reason))
    return str(name)


def _cached(name: str, hub: dict[str, Any]) -> bool:
    """Tell whether the Hub's cache has anything of a repo: it may lie in a subfolder alone."""
    told = {key: hub[key] for key in ("cache_dir", "revision") if hub.get(key)}
    try:
        huggingface_hub.snapshot_download(name, local_files_only=True, **told)
    except (OSError, ValueError):
        return False
    return True


def _asked(name: str, hub: dict[str, Any]) -> str:
    """Ask the Hub for a repo's config; returns why it gives none, or "" if it does."""
    wait = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or WAIT)
    try:
        url = huggingface_hub.hf_hub_url(name, CONFIG, revision=hub.get("revision"))
        huggingface_hub.get_hf_file_metadata(url, token=hub.get("token"), timeout=wait)
    except (EntryNotFoundError, GatedRepoError):
        return ""  # the repo is there; what it lacks is said where it is loaded
    except RepositoryNotFoundError:
        return "shows no such model to you"
    except HfHubHTTPError:
        return ""  # for now; here it is worth a few tries
    except Exception as error:  # of the package that carries requests, which differs by version
        if "timeout" in type(error).__name__.lower():
            return ""  # a slow network; loading waits longer
        return f"does not answer ({type(error).__name__})"
    return ""


def _unknown(name: str, reason: str) -> str:
    names = known_names()
    near = difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"names here: {', '.join(names)}."
    return (
        f"There is no model {name[:60]!r}: no folder, no name that memwrap knows, nothing in the "
        f"Hub's cache, and the Hub {reason}. Give a folder or a repo id; {hint}"
    )


__all__ = ["find_model", "known_names"]
