"""Text that every Python installation carries: the standard library and its topics.

Nothing is shipped: the text is read from the running interpreter. The split of a document
is decided by a hash of its *name*, so that a module falls on the same side in every Python
version; the manifest records the hash of each document's *content*, so that a reader can
tell whether he sees the very text a checkpoint was trained on. Licence of the text: PSF-2.0.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memwrap.io.atomic_files import write_text

SPLITS = ("train", "validation", "test")
_SALT = "split"
# Generated tables and test suites say little about language and repeat themselves.
_SKIPPED_PARTS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
    "pydoc_data", "__pycache__",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text of the corpus: its name, its split and the text itself."""

    name: str
    split: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def split_of(name: str, *, test: float = 0.10, validation: float = 0.05) -> str:
    """Decide the split of a document, by a hash of its name alone."""
    draw = int(hashlib.sha256((_SALT + name).encode()).hexdigest()[:8], 16) / 2**32
    if draw < test:
        return "test"
    return "validation" if draw < test + validation else "train"


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS & set(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            yield relative.as_posix(), path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some stripped builds leave it out
        return
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def stdlib_corpus(split: str | None = None) -> list[Document]:
    """Collect the documents of the standard library: sources (docstrings included) and topics.

    Args:
        split: `"train"`, `"validation"`, `"test"`, or `None` for all.

    Returns:
        Documents in name order, each content once.

    Raises:
        ValueError: for an unknown split.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; allowed: {', '.join(SPLITS)}, or None.")
    seen: set[str] = set()
    documents = []
    for name, text in (*_sources(), *_topics()):
        if len(text) < 200:
            continue
        document = Document(name, split_of(name), text)
        if document.sha256 in seen:
            continue
        seen.add(document.sha256)
        documents.append(document)
    return [d for d in documents if split is None or d.split == split]


def write_manifest(path: str | Path) -> dict:
    """Record which texts the corpus holds: names, splits, sizes, hashes, licence."""
    documents = stdlib_corpus()
    manifest = {
        "version": 1,
        "source": "Python standard library sources and pydoc_data topics",
        "python": ".".join(map(str, sys.version_info[:3])),
        "licence": "PSF-2.0",
        "split_rule": f"sha256({_SALT!r} + name): 10% test, 5% validation, the rest train",
        "documents": [
            {
                "name": d.name,
                "split": d.split,
                "characters": len(d.text),
                "sha256": d.sha256,
            }
            for d in documents
        ],
    }
    write_text(path, json.dumps(manifest, indent=0) + "\n")
    return manifest


__all__ = ["SPLITS", "Document", "split_of", "stdlib_corpus", "write_manifest"]
