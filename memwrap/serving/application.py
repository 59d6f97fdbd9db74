"""The HTTP application: OpenAI's chat and completions endpoints, and named states."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memwrap.chat.first_turn import read_document
from memwrap.serving.answers import Answer
from memwrap.serving.engine import Busy, Engine, Stopped
from memwrap.serving.named_states import NamedStates
from memwrap.serving.prompts import chat_ids, ends_of, plain_ids
from memwrap.serving.requests import ChatRequest, CompletionRequest, Fork, NewState

_STATUS: list[tuple[type[Exception], int]] = [
    (Busy, 429), (Stopped, 503), (KeyError, 404), (ValueError, 400), (TimeoutError, 504),
]  # fmt: skip


def create_app(
    engine: Engine, states: NamedStates, *, name: str, api_key: str | None = None
) -> FastAPI:
    """Make the application.

    Args:
        engine: writes the answers; it is started and stopped with the application.
        states: the named states.
        name: of the model, as clients see it.
        api_key: what clients must send as `Authorization: Bearer ...`; None lets everybody in.
    """

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        # A thread waits for each answer: as many as may wait, and some to take requests in.
        threads = anyio.to_thread.current_default_thread_limiter()
        threads.total_tokens = max(threads.total_tokens, engine.limits.waiting + 40)
        with engine:
            yield

    app = FastAPI(title="memwrap", lifespan=running)
    app.add_middleware(_BodyLimit, most=engine.limits.body_bytes)
    for kind, status in _STATUS:
        app.add_exception_handler(kind, _as_error(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(AnyHTTPException, _refused)

    def known(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and not secrets.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "The API key is missing or wrong.")

    server = _Server(engine, states, name)
    guarded: dict[str, Any] = {"dependencies": [Depends(known)]}
    app.get("/health")(lambda: {"status": "ok"})
    app.get("/v1/models", **guarded)(server.models)
    app.post("/v1/chat/completions", **guarded)(server.chat)
    app.post("/v1/completions", **guarded)(server.complete)
    app.get("/v1/states", **guarded)(server.list_states)
    app.post("/v1/states", status_code=201, **guarded)(server.read_state)
    app.get("/v1/states/{name}", **guarded)(server.show_state)
    app.post("/v1/states/{name}/fork", status_code=201, **guarded)(server.fork_state)
    app.post("/v1/states/{name}/save", **guarded)(server.save_state)
    app.delete("/v1/states/{name}", **guarded)(server.delete_state)
    return app


class _Server:
    """The endpoints over one engine and its named states."""

    def __init__(self, engine: Engine, states: NamedStates, name: str) -> None:
        self.engine, self.states, self.name = engine, states, name
        self.ends = ends_of(engine.model, engine.tokenizer)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.name, "object": "model", "created": 0}]}

    async def chat(self, request: ChatRequest, http: Request) -> Any:
        messages = [message.plain() for message in request.messages]
        answer = await run_in_threadpool(
            self._submit, request, lambda state: chat_ids(self.engine.tokenizer, messages, state)
        )
        return await self._answered(answer, request, http, _ChatShape(self.name))

    async def complete(self, request: CompletionRequest, http: Request) -> Any:
        answer = await run_in_threadpool(
            self._submit,
            request,
            lambda state: plain_ids(self.engine.tokenizer, request.prompt, state),
        )
        return await self._answered(answer, request, http, _TextShape(self.name))

    def _submit(self, request: Any, ids_behind: Callable[[Any], list[int]]) -> Answer:
        state, behind = None, ""
        if request.state is not None:
            state, behind = self.states.get(request.state)
            state = state.to(self.engine.model.device)
        ids = ids_behind(state)
        sampling = request.sampling(self.ends, self.engine.limits)
        return self.engine.submit(Answer(ids, sampling, state, behind))

    async def _answered(
        self, answer: Answer, request: Any, http: Request, shape: _ChatShape
    ) -> Any:
        if request.stream:
            pieces = self._stream(answer, request, http, shape)
            return StreamingResponse(pieces, media_type="text/event-stream")
        waiting = asyncio.create_task(run_in_threadpool(answer.wait))
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=0.5)
            if not waiting.done() and await http.is_disconnected():
                answer.cancelled = True
        return shape.whole(waiting.result(), answer.reason, self._usage(answer))

    async def _stream(
        self, answer: Answer, request: Any, http: Request, shape: _ChatShape
    ) -> AsyncIterator[str]:
        try:
            for first in shape.opening():
                yield _event(first)
            while (piece := await run_in_threadpool(answer.pieces.get)) is not None:
                if piece:
                    yield _event(shape.piece(piece))
            if answer.error is not None:
                yield _event({"error": _described(str(answer.error), 500)})
                return
            yield _event(shape.piece("", answer.reason))
            if request.counts:
                yield _event({**shape.frame(), "choices": [], "usage": self._usage(answer)})
            yield "data: [DONE]\n\n"
        finally:  # also where the client has gone
            answer.cancelled = True

    def _usage(self, answer: Answer) -> dict[str, Any]:
        before = 0 if answer.base is None else answer.base.columns
        prompt, drawn = before + len(answer.ids), len(answer.drawn)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": before + answer.cached},
        }

    # States

    def list_states(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"name": name} for name in self.states.names()]}

    def show_state(self, name: str) -> dict[str, Any]:
        state, _ = self.states.get(name)
        return {
            "name": name,
            "tokens": int(state.tokens_seen[0]),
            "segments": int(state.segments[0]),
            "bytes": state.nbytes,
            "saved": self.states.is_saved(name),
        }

    def read_state(self, request: NewState) -> dict[str, Any]:
        if request.name in self.states:
            raise HTTPException(409, f"There is a state {request.name!r} already; delete it first.")
        if request.save:
            self.states.check_folder()
        model, start = self.engine.model, time.perf_counter()
        before = None if request.after is None else self.states.get(request.after)[0]
        state = read_document(model, self.engine.tokenizer, request.text, before)
        self.states.put(request.name, state)
        if request.save:
            self.states.save(request.name)
        seconds = round(time.perf_counter() - start, 3)
        return {**self.show_state(request.name), "seconds": seconds}

    def fork_state(self, name: str, request: Fork) -> dict[str, Any]:
        if request.to in self.states:
            raise HTTPException(409, f"There is a state {request.to!r} already; delete it first.")
        self.states.put(request.to, self.states.get(name)[0].clone())
        return self.show_state(request.to)

    def save_state(self, name: str) -> dict[str, Any]:
        self.states.save(name)
        return self.show_state(name)

    def delete_state(self, name: str) -> dict[str, Any]:
        self.states.delete(name)
        return {"name": name, "deleted": True}


class _ChatShape:
    """The JSON of a chat's answer, whole and in pieces."""

    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, model: str) -> None:
        self.model, self.created = model, int(time.time())
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def frame(self, piece: bool = True) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if piece and self.prefix == "chatcmpl" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        return [{**self.frame(), "choices": [choice]}]

    def piece(self, text: str, reason: str | None = None) -> dict[str, Any]:
        delta = {} if reason else {"content": text}
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return {**self.frame(), "choices": [choice]}

    def whole(self, text: str, reason: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return {**self.frame(piece=False), "choices": [choice], "usage": usage}


class _TextShape(_ChatShape):
    """The JSON of a completion, whole and in pieces."""

    kind, prefix = "text_completion", "cmpl"

    def opening(self) -> list[dict[str, Any]]:
        return []

    def piece(self, text: str, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        return {**self.frame(), "choices": [choice]}

    def whole(self, text: str, reason: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.piece(text, reason), "usage": usage}


class _BodyLimit:
    """Middleware that refuses bodies over `most` bytes, whatever their header says."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most:
                raise HTTPException(413, f"The request is over {self.most} bytes.")
            return message

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most:
            refused = _error(f"The request is over {self.most} bytes.", 413)
            await refused(scope, receive, send)
            return
        await self.app(scope, counted, send)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _described(message: str, status: int) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"message": message, "type": kind, "param": None, "code": status}


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": _described(message, status)}, status_code=status)


def _as_error(status: int) -> Callable[[Request, Any], JSONResponse]:
    def handler(request: Request, error: Any) -> JSONResponse:
        return _error(str(error.args[0] if error.args else error), status)

    return handler


def _refused(request: Request, error: Any) -> JSONResponse:
    return _error(str(error.detail), error.status_code)


def _invalid(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _error("The body is no JSON; send an object.", 400)
    place, said = ".".join(str(part) for part in first["loc"][1:]), first["msg"]
    said = said.removeprefix("Value error, ")
    return _error(f"{place}: {said}" if place else said, 400)


__all__ = ["create_app"]
