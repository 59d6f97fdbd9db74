"""Documents to train and evaluate on: where they come from, how they become batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memwrap.data.hf_datasets import from_datasets
from memwrap.data.readers import KINDS, files_in, read_files
from memwrap.data.stdlib_corpus import SPLITS, Document, split_of, stdlib_corpus
from memwrap.io.reading import inside

_HOW = "give 'stdlib', a folder, a file of text, or 'datasets:NAME[:SPLIT[:COLUMN]]'"


# Where a single file is cut: 85% train, 5% validation, 10% test, as documents are drawn.
_CUTS = {"train": (0.0, 0.85), "validation": (0.85, 0.90), "test": (0.90, 1.0)}


def load_documents(
    source: str | Path,
    split: str | None = None,
    *,
    limit: int | None = None,
    template: str | None = None,
    **options: Any,
) -> list[Document]:
    """Read documents.

    Args:
        source: where they are:

            * `"stdlib"`: the text of the Python standard library (`memwrap.data.stdlib_corpus`);
            * a folder: every text, Markdown, HTML, PDF and code file in it and below that is not
              hidden; one that cannot be read is left out with a warning. A document's split is
              drawn by a hash of its name, unless the folder has a subfolder named like the split;
            * one file, of data such as JSON too; its first 85% are "train", the next 5%
              "validation", the rest "test";
            * `"datasets:NAME[:SPLIT[:COLUMN]]"`: a dataset of the `datasets` library, from the
              Hub, a local folder, or one written by `save_to_disk`.
        split: `"train"`, `"validation"`, `"test"`, or None for all. Of a dataset: any split
            that it has (default: "train").
        limit: at most so many documents.
        template: text of a dataset's row with its columns in braces, as in
            `"### Instruction:\\n{instruction}\\n\\n### Response:\\n{output}"`, instead of one
            column.
        options: keywords for `datasets.load_dataset`, such as `name` or `revision`.

    Returns:
        Documents; those of the standard library, of files and folders in name order.

    Raises:
        ValueError: for an unknown source or split, options where none are taken, a source
            without text, a file that cannot be read, or a dataset without the column.
        ImportError: if `pypdf`, `beautifulsoup4` or `datasets` is needed and missing.
    """
    name = str(source)
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}; it must be at least 1, or None for all.")
    if name.startswith("datasets:"):
        return from_datasets(name.removeprefix("datasets:"), split, limit, template, options)
    if template is not None:
        options = {"template": template}
    if options:
        raise ValueError(
            f"`{next(iter(options))}` is an option of 'datasets:...' sources; {name!r} takes none."
        )
    if split is not None and split not in SPLITS:
        raise ValueError(f"`split` is {split!r}; allowed: {', '.join(SPLITS)}, or None.")
    path = Path(name).expanduser()
    if name == "stdlib":
        documents = stdlib_corpus(split)
    elif path.is_dir():
        documents = _from_folder(path, split)
    elif path.is_file():
        documents = [_from_file(path, split)]
    else:
        raise ValueError(f"`source` is {name!r}, which is no file or folder; {_HOW}.")
    return documents[:limit]


def _from_file(path: Path, split: str | None) -> Document:
    texts, problems = read_files([path])
    if problems:
        raise ValueError(problems[path])
    text = texts[path]
    if split is not None:
        begin, end = (_line_at(text, fraction) for fraction in _CUTS[split])
        text = text[begin:end]
    if not text.strip():
        part = f"the {split} part of {path}" if split else str(path)
        raise ValueError(f"There is no text in {part}; a scanned PDF needs OCR first.")
    return Document(path.name, split or split_of(path.name), text)


def _line_at(text: str, fraction: float) -> int:
    """Find the start of the first line at or after `fraction` of the text."""
    place = round(len(text) * fraction)
    if place in (0, len(text)):
        return place
    newline = text.find("\n", place)
    return place if newline < 0 else newline + 1


def _from_folder(folder: Path, split: str | None) -> list[Document]:
    divided = split is not None and (folder / split).is_dir()
    root = inside(folder, split) if split is not None and divided else folder
    paths = files_in(root)
    # A folder of its own holds a whole split: its files belong to no other, and what a hash
    # would put into it is for training.
    own_folder = [s for s in SPLITS if (folder / s).is_dir()] if split and not divided else []
    paths = [p for p in paths if p.relative_to(root).parts[0] not in own_folder]
    if not paths:
        raise ValueError(f"The folder {root} holds no files of {KINDS}.")
    wanted = {}
    for path in paths:
        name = path.relative_to(root).as_posix()
        part = split if split is not None and divided else split_of(name)
        part = "train" if part in own_folder else part
        if split is not None and part != split:
            continue
        wanted[path] = name, part
    texts, problems = read_files(wanted)
    documents = [Document(*wanted[path], text) for path, text in texts.items()]
    if problems and not documents:
        first = next(iter(problems.values()))
        raise ValueError(f"None of {len(problems)} files in {root} can be read: {first}")
    for problem in problems.values():
        warnings.warn(f"left out: {problem}", stacklevel=3)
    if not documents:
        raise ValueError(
            f"None of the {len(paths)} files in {root} falls into the split {split!r} (drawn by "
            f"a hash of their names); put files into {folder / str(split)}, or use split=None."
        )
    return documents


def long_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, min_tokens: int
) -> list[Document]:
    """Make documents of at least `min_tokens` tokens of what there is.

    A long document stands alone. Shorter ones of the same split and top folder (the first
    part of the name) are joined in name order until they are long enough; what is left over
    is dropped.

    Args:
        documents: of any length.
        tokenizer: counts the tokens, special ones left out.
        min_tokens: the least length.

    Returns:
        Documents in name order; a joined one is named after its first and last part.

    Raises:
        ValueError: if `min_tokens` is not positive.
    """
    if min_tokens < 1:
        raise ValueError(f"`min_tokens` is {min_tokens}; it must be at least 1.")

    def count(text: str) -> int:
        return len(encode(tokenizer, text, special=False))

    result = []
    pending: dict[tuple[str, str], list[Document]] = {}
    lengths: dict[tuple[str, str], int] = {}
    for document in sorted(documents, key=lambda d: d.name):
        length = count(document.text)
        if length >= min_tokens:
            result.append(document)
            continue
        top = document.name.split("/")[0] if "/" in document.name else ""
        group = (document.split, top)
        pending.setdefault(group, []).append(document)
        lengths[group] = lengths.get(group, 0) + length
        # The sum decides when to look; where texts meet, tokens may merge.
        if lengths[group] >= min_tokens:
            text = "\n\n".join(d.text for d in pending[group])
            if count(text) >= min_tokens:
                first, last = pending[group][0].name, pending[group][-1].name
                result.append(Document(f"{first}..{last}", document.split, text))
                del pending[group], lengths[group]
    return sorted(result, key=lambda d: d.name)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Compute the token ids of a text of any length."""
    # `verbose=False`: a document longer than the backbone's window is what memories are for.
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
