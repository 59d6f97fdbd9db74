"""The commands `memwrap read` and `memwrap chat`: a document read once, asked many times."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from memwrap.cli.shared import (
    Dtype,
    MemoryName,
    ModelName,
    Passes,
    files_and_settings,
    load_model,
    load_tokenizer,
    plain_errors,
)


@plain_errors
def read(
    model: ModelName,
    words: Annotated[
        list[str],
        typer.Argument(metavar="FILE... [KEY=VALUE]...", help="Files and folders; settings."),
    ],
    output: Annotated[Path, typer.Option("-o", help="State file to write.")],
    memory: MemoryName = None,
    state: Annotated[Path | None, typer.Option(help="A state file to continue.")] = None,
    passes: Passes = 1,
    dtype: Dtype = None,
) -> None:
    """Read text, Markdown, HTML, PDF and code into a state file."""
    import memwrap

    files, settings = files_and_settings(words)
    texts = read_texts(files)
    loaded = load_model(model, dtype, memory, settings)
    current = memwrap.MemoryState.load(state, loaded) if state is not None else None
    current = _into(loaded, load_tokenizer(model, loaded), texts, current, passes)
    current.save(output)
    typer.echo(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


@plain_errors
def chat(
    model: ModelName,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]... [KEY=VALUE]...", help="More files; settings."),
    ] = None,
    memory: MemoryName = None,
    read: Annotated[
        list[str] | None, typer.Option("--read", help="A file or folder to read first.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="A state file of `memwrap read`.")] = None,
    ask: Annotated[str | None, typer.Option(help="One question, then leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    passes: Passes = 1,
    dtype: Dtype = None,
) -> None:
    """Talk with a model about what it read: memwrap chat smollm2 --memory infllm --read FILE.

    Without --ask: /undo, /reset, /save FILE and /quit are commands.
    """
    import memwrap

    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("`--max-new-tokens` must be at least 1, `--temperature` 0 or more.")
    files, settings = files_and_settings(words)
    files = [*(read or []), *files]
    texts = read_texts(files) if files else {}
    loaded = load_model(model, dtype, memory, settings)
    tokenizer = load_tokenizer(model, loaded)
    current = memwrap.MemoryState.load(state, loaded) if state is not None else None
    if texts:
        current = _into(loaded, tokenizer, texts, current, passes)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    from memwrap.chat import Conversation

    talk = Conversation(loaded, tokenizer, current, max_new_tokens=max_new_tokens, **sampling)
    if ask is not None:
        talk.ask(ask, _streamer(tokenizer))
        return
    _converse(talk, _streamer(tokenizer))


def read_texts(names: list[str]) -> dict[Path, str]:
    """Read files and folders, say what was left out and end with a count.

    Raises:
        ValueError: if nothing can be read.
        ImportError: if a library for one of them is missing.
    """
    from memwrap.data.readers import files_in, read_files

    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            paths += files_in(path)
        elif path.is_file():
            paths.append(path)
        else:
            raise ValueError(f"{name!r} is no file or folder.")
    texts, problems = read_files(paths)
    if not texts:
        first = next(iter(problems.values()), f"no file in {', '.join(names)}")
        raise ValueError(f"Nothing can be read: {first}")
    for problem in problems.values():
        typer.echo(f"left out: {problem}", err=True)
    left = f", {len(problems)} left out" if problems else ""
    files = "1 file" if len(texts) == 1 else f"{len(texts)} files"
    typer.echo(f"{files}{left}, {sum(map(len, texts.values())):,} characters", err=True)
    return texts


def _into(model: Any, tokenizer: Any, texts: dict[Path, str], state: Any, passes: int) -> Any:
    """Read texts one after the other, all of them `passes` times; say what it took."""
    from memwrap.chat import read_document
    from memwrap.model.text_reading import check_passes

    check_passes(model.memories, passes)

    start, before = time.monotonic(), 0 if state is None else int(state.tokens_seen[0])
    for path, text in [*texts.items()] * passes:
        state = read_document(model, tokenizer, text, state, progress=path.name)
    number, seconds = int(state.tokens_seen[0]) - before, time.monotonic() - start
    typer.echo(
        f"read {number:,} tokens in {seconds:.1f} s; the memory holds {state.nbytes / 1e6:.1f} MB",
        err=True,
    )
    return state


def _streamer(tokenizer: Any) -> Any:
    """Make what prints an answer as it grows: a long one takes a minute on a CPU."""
    from transformers import TextStreamer

    return TextStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _converse(talk: Any, streamer: Any) -> None:
    seen = int(talk.state.tokens_seen[0]) if talk.state is not None else 0
    typer.echo(f"{seen:,} tokens read. /undo, /reset, /save FILE, /quit; Ctrl-C stops an answer")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        if not sys.stdin.isatty():  # what is piped in is not seen otherwise
            typer.echo(line)
        if line in ("/quit", "/exit"):
            return
        if line == "/undo":
            try:
                talk.undo()
                typer.echo("taken back: the last question and its answer")
            except ValueError as error:
                typer.echo(str(error), err=True)
        elif line == "/reset":
            talk.reset()
            typer.echo("back to what was read before the first question")
        elif line.split()[:1] == ["/save"]:
            _save(talk, line.removeprefix("/save").strip())
        elif line.startswith("/") and " " not in line:
            typer.echo(f"no command {line}; there are /undo, /reset, /save FILE, /quit", err=True)
        elif line:
            try:
                talk.ask(line, streamer)
            except ValueError as error:
                typer.echo(str(error), err=True)
            except KeyboardInterrupt:
                streamer.end()
                typer.echo("stopped; nothing of it is kept", err=True)


def _save(talk: Any, path: str) -> None:
    if not path or talk.state is None:
        typer.echo("give a file (/save FILE), after something was said or read", err=True)
        return
    talk.state.save(path)
    typer.echo(f"wrote {path}")


__all__ = ["chat", "read", "read_texts"]
