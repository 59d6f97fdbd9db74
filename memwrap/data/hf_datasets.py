"""Rows of the `datasets` library as documents: one column, or a template filled with several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Any

from memwrap.data.stdlib_corpus import Document


def from_datasets(
    source: str,
    split: str | None,
    limit: int | None,
    template: str | None,
    options: dict[str, Any],
) -> list[Document]:
    """Read the rows of a dataset as documents; arguments as `load_documents` takes them, `source`
    without its first word."""
    name, _, rest = source.partition(":")
    named, _, column = rest.partition(":")
    if not name or ":" in column:
        raise ValueError(
            f"`source` is 'datasets:{source}'; it must be 'datasets:NAME[:SPLIT[:COLUMN]]'."
        )
    if named and split and named != split:
        raise ValueError(
            f"`split` is {split!r}, but the source 'datasets:{source}' names the split "
            f"{named!r}; leave one of them out."
        )
    split = split or named or "train"
    rows = _dataset(name, split, options)
    if template is not None and column:
        raise ValueError(
            f"The source 'datasets:{source}' names the column {column!r}, and there is a "
            "`template`; leave one of them out."
        )
    write = _writer(name, split, list(rows.column_names), column or "text", template)
    documents = []
    for index, row in enumerate(rows):
        text = write(index, row)
        if text.strip():
            documents.append(Document(f"{name}/{split}/{index:08d}", split, text))
        if limit is not None and len(documents) == limit:
            break
    if not documents:
        label = "template" if template else f"column {column or 'text'!r}"
        raise ValueError(f"The {label} of {name!r} ({split}) holds no text.")
    return documents


def _writer(
    name: str, split: str, columns: list[str], column: str, template: str | None
) -> Callable[[int, dict[str, Any]], str]:
    """Make the function that writes a row's text: its column, or the template filled with
    several."""
    try:
        named = (
            [column] if template is None else [p[1] for p in Formatter().parse(template) if p[1]]
        )
    except ValueError as error:
        raise ValueError(f"`template` is {template!r}: {error}.") from error
    missing = [c for c in named if c not in columns]
    if missing or not named:
        raise ValueError(
            f"The dataset {name!r} has no column {(missing or [''])[0]!r}; it has "
            f"{', '.join(columns)}. Name the one with the text: 'datasets:{name}:{split}:COLUMN'."
        )

    def write(index: int, row: dict[str, Any]) -> str:
        for one in named:
            if not isinstance(row[one], str):
                raise ValueError(
                    f"Row {index} of {name!r} has a {type(row[one]).__name__} in the column "
                    f"{one!r}; it must be text."
                )
        return row[column] if template is None else template.format(**row)

    return write


def _dataset(name: str, split: str, options: dict[str, Any]) -> Any:
    """Load the split of a dataset; errors of `datasets` become a ValueError with what was asked."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading {name!r} needs datasets: pip install datasets.") from error
    folder = Path(name).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(
                f"The dataset {name!r} has no split {split!r}; it has {', '.join(saved)}."
            )
        return saved[split]
    try:
        return datasets.load_dataset(name, split=split, **options)
    except (ValueError, OSError, ConnectionError) as error:
        raise ValueError(
            f"datasets could not load the split {split!r} of {name!r}: {error}"
        ) from error


__all__ = ["from_datasets"]
