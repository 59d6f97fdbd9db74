"""Files as text: plain text, Markdown and code as they are, PDF and HTML through libraries."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memwrap.io.reading import inside

_TEXT = (
    ".txt", ".md", ".markdown", ".rst", ".tex", ".org", ".log", ".csv", ".tsv", ".json", ".yaml",
    ".yml", ".toml", ".xml", ".ini", ".cfg",
)  # fmt: skip
_CODE = (
    ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cs", ".go", ".java",
    ".js", ".jsx", ".ts", ".tsx", ".kt", ".lua", ".php", ".pl", ".r", ".rb", ".rs", ".scala",
    ".sh", ".sql", ".swift",
)  # fmt: skip
_HTML = (".html", ".htm", ".xhtml")
SUFFIXES = (*_TEXT, *_CODE, *_HTML, ".pdf")
"""Endings of the files that are read."""
DOCUMENTS = (".txt", ".md", ".markdown", ".rst", *_CODE, *_HTML, ".pdf")
"""Those that are taken from a folder of documents; others when they are named."""
_NEEDS = {".pdf": ("pypdf", "pypdf"), **dict.fromkeys(_HTML, ("bs4", "beautifulsoup4"))}
KINDS = "text, Markdown, HTML, PDF and code"


def check_readers(paths: Iterable[Path]) -> None:
    """Refuse files that need a library which is missing.

    Raises:
        ImportError: names one such file and what to install.
    """
    for path in paths:
        module, package = _NEEDS.get(path.suffix.lower(), ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise ImportError(f"Reading {path} needs {package}: pip install {package}.")


def read_text(path: Path) -> str:
    """Read the text of a file.

    Raises:
        ValueError: for another kind of file, or one that cannot be read as its kind.
        ImportError: if the library for its kind is missing.
    """
    suffix = path.suffix.lower()
    check_readers([path])
    if suffix == ".pdf":
        return _pdf(path)
    if suffix not in SUFFIXES and b"\0" in path.read_bytes():  # LICENSE, and whatever else is text
        raise ValueError(f"{path} is no file of a kind that is read ({KINDS}); convert it to text.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8 first."
        ) from error
    return _html(text, path) if suffix in _HTML else text


def files_in(folder: Path) -> list[Path]:
    """List the documents in a folder and below in name order, hidden files and folders left out.

    Raises:
        ValueError: for a link to what lies elsewhere: whoever made the folder made it.
    """
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in DOCUMENTS)
    names = ((path, path.relative_to(folder)) for path in paths)
    shown = (pair for pair in names if not any(x.startswith(".") for x in pair[1].parts))
    files = sorted((path, name) for path, name in shown if path.is_file())
    for _, name in (pair for pair in files if pair[0].is_symlink()):
        inside(folder, name.as_posix())
    return [path for path, _ in files]


def read_files(paths: Iterable[Path]) -> tuple[dict[Path, str], dict[Path, str]]:
    """Read files; one that cannot be read does not stop the others.

    Returns:
        The texts, and why the other files have none.

    Raises:
        ImportError: if a library is missing, before anything is read.
    """
    paths = list(paths)
    check_readers(paths)
    texts: dict[Path, str] = {}
    problems: dict[Path, str] = {}
    for path in paths:
        try:
            text = read_text(path)
        except (ValueError, OSError) as error:
            problems[path] = str(error)
            continue
        if text.strip():
            texts[path] = text
        else:
            problems[path] = f"There is no text in {path}; a scanned PDF needs OCR first."
    return texts, problems


def _pdf(path: Path) -> str:
    from pypdf import PdfReader

    with _as_problem(path, "a PDF"):
        return "\n".join(page.extract_text() for page in PdfReader(path).pages)


@contextmanager
def _as_problem(path: Path, kind: str) -> Iterator[None]:
    """Make one sentence of whatever a parser raises over a broken file, and says on the way."""
    log = logging.getLogger("pypdf")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of every kind: encryption, recursion, damaged streams
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as {kind} ({reason}); repair it or convert it to text."
        ) from error
    finally:
        log.setLevel(before)


def _html(text: str, path: Path) -> str:
    """Return the visible text, a line a block."""
    with _as_problem(path, "HTML"):
        return _visible(text)


def _visible(text: str) -> str:
    from bs4 import BeautifulSoup

    page = BeautifulSoup(text, "html.parser")
    for hidden in page(["script", "style", "template", "noscript", "head", "title"]):
        hidden.decompose()
    for block in page(["p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "pre"]):
        block.append("\n")
    lines = (line.strip() for line in page.get_text().splitlines())
    return "\n".join(line for line in lines if line)


__all__ = ["DOCUMENTS", "KINDS", "SUFFIXES", "check_readers", "files_in", "read_files", "read_text"]
