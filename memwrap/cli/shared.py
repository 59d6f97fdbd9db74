"""What the commands share: errors in plain words, and loading a model with its tokenizer."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import typer
from transformers.utils import logging as transformers_logging

import memwrap
from memwrap.assets import asset


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print what the user can mend as one or two lines and leave with code 2.

    `MEMWRAP_TRACEBACK=1` shows where it came from.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ImportError) as error:
            if os.environ.get("MEMWRAP_TRACEBACK"):
                raise
            lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
            typer.echo("error: " + "\n".join(lines[:2]), err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("\ninterrupted", err=True)
            raise typer.Exit(130) from error

    return wrapper


def load_model(name: str, dtype: str | None = None) -> Any:
    """Load a saved model on the best device."""
    import torch

    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype} if dtype else {}
    model: Any = memwrap.load(name, **options)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def load_tokenizer(name: str, model: Any) -> Any:
    """Load the tokenizer that is saved with a model, else its base's."""
    from transformers import AutoTokenizer

    for place in (name, model.config.base_model):
        try:
            return AutoTokenizer.from_pretrained(asset(place) or place)
        except (OSError, ValueError):
            continue
    raise ValueError(f"{name} has no tokenizer; save it there: tokenizer.save_pretrained(folder).")
