"""The command `memwrap serve`: OpenAI's endpoints over a model with memory."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from memwrap.cli.shared import (
    Dtype,
    MemoryName,
    ModelName,
    files_and_settings,
    load_model,
    load_tokenizer,
    plain_errors,
)


@plain_errors
def serve(
    model: ModelName,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the memory.")
    ] = None,
    memory: MemoryName = None,
    states: Annotated[
        Path | None, typer.Option(help="Folder of the named states' files; may be shared.")
    ] = None,
    save_all: Annotated[
        bool, typer.Option("--save-all", help="Write every state to its file at once.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients.")] = None,
    batch: Annotated[int, typer.Option(help="Answers written together.")] = 8,
    max_prompt: Annotated[int, typer.Option(help="Most tokens of one request.")] = 1_000_000,
    max_new: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 4096,
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 600.0,
    state_gb: Annotated[float, typer.Option(help="GB of states kept in memory.")] = 4.0,
    dtype: Dtype = None,
) -> None:
    """Serve a model: memwrap serve smollm2 --memory infllm --states FOLDER.

    OpenAI's /v1/chat/completions and /v1/completions, and /v1/states for named states. With
    MEMWRAP_API_KEY in the environment clients must send it.
    """
    key = os.environ.get("MEMWRAP_API_KEY") or None
    if host not in ("127.0.0.1", "localhost", "::1") and key is None:
        raise ValueError(
            f"--host {host} lets other machines in; set MEMWRAP_API_KEY to a key that they must "
            "send."
        )
    files, settings = files_and_settings(words)
    if files:
        raise ValueError(f"{files[0]!r} is no setting; read files into a state (POST /v1/states).")
    try:
        import uvicorn

        from memwrap.serving import Engine, Limits, NamedStates, create_app
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The server needs {error.name}, which is not installed: pip install 'memwrap[serve]'."
        ) from error
    check_free(host, port)
    limits = Limits(
        max_prompt, max_new, seconds=timeout, batch=batch, state_bytes=int(state_gb * 1e9)
    )
    loaded = load_model(model, dtype, memory, settings)
    tokenizer = load_tokenizer(model, loaded)
    named = NamedStates(loaded, states, limits.state_bytes, save_all)
    application = create_app(
        Engine(loaded, tokenizer, limits), named, name=name or Path(model).name, api_key=key
    )
    count = len(named.names())
    known = "1 state" if count == 1 else f"{count} states"
    typer.echo(f"serving {model} at http://{host}:{port}/v1 ({known})")
    uvicorn.run(application, host=host, port=port, log_level="warning")


def check_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at, before a model is loaded.

    Raises:
        ValueError: says why.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Nothing can listen at {host}, port {port} ({error}); give another --port."
        ) from error


__all__ = ["check_free", "serve"]
