"""Settings of the harness for tasks on long texts: `memwrap lm_eval --preset NAME`."""

from __future__ import annotations

import argparse
import difflib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from memwrap.assets import ROOT, asset
from memwrap.assets.places import find_model
from memwrap.io.reading import read_json

FOLDER = ROOT / "lm-eval"
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
"""The lengths that RULER's tasks in the harness have a metric for."""


def presets() -> list[str]:
    """Name the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str, lengths: Sequence[int] = (), model: str | None = None) -> dict[str, Any]:
    """Load a preset: what the harness takes as `--config`.

    Args:
        name: of `presets()`.
        lengths: tokens of the texts, for tasks that come in lengths; by default the preset's.
        model: a saved model or a name, whose tokenizer measures texts that are made.

    Raises:
        ValueError: for an unknown name, or lengths that the tasks do not have.
    """
    if name not in presets():
        near = difflib.get_close_matches(name, presets(), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"There is no preset {name!r}. {hint}Known: {', '.join(presets())}.")
    settings: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    about = settings.get("metadata", {})
    if lengths:
        about["max_seq_lengths"] = _lengths(name, list(lengths), about)
    if about and model is not None:
        about["tokenizer"] = str(tokenizer_place(model))
    return settings


def _lengths(name: str, lengths: list[int], about: dict[str, Any]) -> Any:
    """Write lengths as the tasks of a preset take them."""
    if not about:
        raise ValueError(f"{name} has texts of their own lengths; leave --lengths out.")
    if isinstance(about["max_seq_lengths"], list):
        wrong = [n for n in lengths if n not in RULER_LENGTHS]
        if wrong:
            known = ", ".join(map(str, RULER_LENGTHS))
            raise ValueError(f"{name} has no metric for {wrong[0]} tokens; lengths: {known}.")
        return lengths
    if len(lengths) != 1 or lengths[0] % 1024:
        raise ValueError(
            f"{name} takes one length a run, a multiple of 1024 such as 16384; got {lengths}."
        )
    return f"{lengths[0] // 1024}k"


def tokenizer_place(name: str) -> str | Path:
    """Find the folder or name that transformers' own classes load a model's tokenizer from."""
    folder = Path(find_model(name))
    if (folder / "tokenizer_config.json").is_file() or not (folder / "config.json").is_file():
        return folder if folder.is_dir() else name
    base = read_json(folder / "config.json").get("base_model")
    return asset(base) or base if base else folder


@contextmanager
def expanded(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Put a file of settings in the place of `--preset` and `--lengths`.

    Yields:
        Arguments that the harness understands; its own go before what the preset says.

    Raises:
        ValueError: as `load_preset`, and for lengths that are no numbers.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--lengths")
    given, rest = parser.parse_known_args(list(arguments))
    if given.preset is None:
        yield list(arguments)
        return
    try:
        lengths = [int(part) for part in (given.lengths or "").split(",") if part]
    except ValueError:
        raise ValueError(f"--lengths {given.lengths}: give numbers, as in 8192,16384.") from None
    settings = load_preset(given.preset, lengths, _model_of(rest))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{given.preset}.yaml"
        path.write_text(yaml.safe_dump(settings), "utf-8")
        yield ["run", "--config", str(path), *(rest[1:] if rest[:1] == ["run"] else rest)]


def _model_of(arguments: Sequence[str]) -> str | None:
    """Find the model, or its tokenizer, in `--model_args`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model_args", "-a", nargs="+", default=[])
    words = ",".join(parser.parse_known_args(list(arguments))[0].model_args).split(",")
    values = dict(word.partition("=")[::2] for word in words)
    return values.get("tokenizer") or values.get("pretrained")


__all__ = ["expanded", "load_preset", "presets", "tokenizer_place"]
