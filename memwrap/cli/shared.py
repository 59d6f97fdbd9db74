"""What the commands share: errors in plain words, models with memories, and words that are
settings or files."""

from __future__ import annotations

import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a name as smollm2, or a repo id on the Hub."),
]
MemoryName = Annotated[
    str | None,
    typer.Option("--memory", help="For a model without one, of `memwrap list`, as infllm."),
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the memory, as window_size=1024."),
]
Passes = Annotated[int, typer.Option(help="Times that the text is read before the question.")]
Dtype = Annotated[str | None, typer.Option(help="Of the backbone, as float32.")]


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print what the user can mend as one or two lines and leave with code 2; a warning is a line.

    `MEMWRAP_TRACEBACK=1` shows where it came from.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        before: Any = warnings.formatwarning
        warnings.formatwarning = _note  # type: ignore[assignment]
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # of `memwrap list | head`: click ends the process quietly
            raise
        except (ValueError, TypeError, OSError, ImportError) as error:
            if os.environ.get("MEMWRAP_TRACEBACK"):
                raise
            lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
            typer.echo("error: " + "\n".join(lines[:2]), err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from error
        finally:
            warnings.formatwarning = before

    return wrapper


def _note(message: Warning | str, *where: Any) -> str:
    return f"note: {message}\n"


# Of what transformers imports: notes about libraries and classes that are no use here.
_CHATTY = ("torchao", "torch.utils._pytree")


def hush() -> None:
    """Silence what libraries say while they are imported; call it before they are."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet() -> None:
    """Turn off the bars that transformers shows while it loads, and the Hub's word on each try."""
    import huggingface_hub.utils.logging
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


def settings_of(words: Sequence[str] | None) -> dict[str, Any]:
    """Read `KEY=VALUE` words; values are YAML.

    Raises:
        ValueError: for a word that is no setting.
    """
    import yaml

    values: dict[str, Any] = {}
    for word in words or []:
        key, separator, value = word.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"{word!r} is no setting; give KEY=VALUE, such as window_size=1024.")
        # YAML reads 1e-4 as text.
        number = re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
        try:
            values[key] = float(value) if number else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{word!r} is no setting: its value cannot be read.") from error
    return values


def files_and_settings(words: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Tell files from settings: a setting has a `=` behind a name, and no file is called so."""
    files: list[str] = []
    settings: list[str] = []
    for word in words or []:
        named = word.partition("=")[0].isidentifier() and "=" in word
        (settings if named and not Path(word).exists() else files).append(word)
    return files, settings


def load_model(
    name: str,
    dtype: str | None = None,
    memory: str | None = None,
    settings: Sequence[str] | None = None,
) -> Any:
    """Load a saved memory model, or any model with a memory, on the best device."""
    from memwrap.model.opening import open_model

    quiet()
    return open_model(name, memory, settings_of(settings), dtype=dtype)


def load_tokenizer(name: str, model: Any) -> Any:
    """Load the tokenizer that is saved with a model, else its base's."""
    from memwrap.model.opening import open_tokenizer

    return open_tokenizer(name, model)
