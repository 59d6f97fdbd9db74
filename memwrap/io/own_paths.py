"""Telling paths that this user wrote into a file from those that somebody else did.

A saved model may name the folder of its base. Such a path is followed where the file carries a mark
that only this user can have made: a keyed hash, whose key lies beside the Hub's token and is never
written anywhere else.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

import huggingface_hub

from memwrap.io.atomic_files import scratch

_BYTES = 32


def mark_of(path: str) -> str:
    """Make a mark for a path; empty where no key can be kept."""
    key = _key(make=True)
    return "" if key is None else hmac.new(key, path.encode(), hashlib.sha256).hexdigest()[:32]


def is_own(path: str, mark: str) -> bool:
    """Tell whether this user made the mark for this path."""
    key = _key(make=False)
    if key is None or not mark:
        return False
    wanted = hmac.new(key, path.encode(), hashlib.sha256).hexdigest()[:32]
    return hmac.compare_digest(wanted.encode(), str(mark).encode())


def _key(*, make: bool) -> bytes | None:
    path = Path(huggingface_hub.constants.HF_HOME) / "memwrap" / "paths.key"
    try:
        if make and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch(path) as folder, suppress(FileExistsError):  # another was first
                new = folder / path.name
                new.touch(mode=0o600)
                new.write_bytes(secrets.token_bytes(_BYTES))
                os.link(new, path)
        key = path.read_bytes()
    except OSError:
        return None
    return key if len(key) == _BYTES else None
