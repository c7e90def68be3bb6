"""The routes: OpenAI's paths, and what those who run a server ask it."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from stars_fast import __version__
from stars_fast.serve.answers import Exchange
from stars_fast.serve.errors import Json, Refusal, invalid
from stars_fast.serve.guard import Guard
from stars_fast.serve.schema import Asked, ChatRequest, CompletionRequest
from stars_fast.serve.service import CHATS, Service
from stars_fast.serve.streaming import (
    Chat,
    ClientGone,
    Completion,
    Form,
    Steps,
    Stream,
    next_of,
    server_sent,
    while_heard,
    whole_choice,
)

_ERROR = {"content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}},
    **{
        status: {"description": what, **_ERROR}
        for status, what in {
            400: "The request is invalid, or asks for what is not served.",
            401: "No API key, or a wrong one.",
            404: "There is no such model or path.",
            408: "Nothing was there within the timeout.",
            413: "The body is too large.",
            500: "The reward or the models failed.",
            503: "As many requests are open as may be, or the server is going down: try again.",
        }.items()
    },
}
_PLAIN: dict[int | str, dict[str, Any]] = {
    status: answer for status, answer in _ANSWERS.items() if status in (401, 413)
}


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application, over an engine that is open.

    Parameters
    ----------
    service : Service
    api_key : str, optional
        Without it, whoever reaches the server may use it.
    """
    started = int(time.time())
    app = FastAPI(title="stars-fast", version=__version__, docs_url=None, redoc_url=None)  # those load from a CDN
    app.add_middleware(Guard, service=service, api_key=api_key)
    chat, completion = Chat(), Completion()

    @app.post("/v1/completions", responses=_ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(service, completion, body, request)

    @app.post(CHATS, responses=_ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, chat, body, request)

    def described() -> dict[str, Any]:
        longest = service.engine.max_model_len
        return {
            "id": service.model,
            "object": "model",
            "created": started,
            "owned_by": "stars-fast",
            "max_model_len": longest,
        }

    @app.get("/v1/models", responses=_PLAIN)
    async def models() -> Response:
        return Json({"object": "list", "data": [described()]})

    @app.get("/v1/models/{model:path}", responses={**_PLAIN, 404: _ANSWERS[404]})
    async def model(model: str) -> Response:
        if model != service.model:
            raise Refusal(f"there is no such model; there is {service.model!r}", 404, "model")
        return Json(described())

    @app.get("/health", responses={**_PLAIN, 503: _ANSWERS[503]})
    async def health() -> Response:
        reason = service.trouble()
        return Json({"status": "ok"}) if reason is None else Json({"status": reason}, 503)

    @app.get("/version", responses=_PLAIN)
    async def version() -> Response:
        return Json({"version": __version__})

    @app.get("/metrics", responses={**_PLAIN, 200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _noted(request, error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _noted(request, invalid(error.errors(), error.body)).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told, status = str(error.detail), error.status_code
        if status == 404:
            told = f"there is no such path: there are {CHATS}, /v1/completions and /v1/models (base_url ends with /v1)"
        elif status == 405:
            told = f"{request.method} is not allowed here: use {(error.headers or {}).get('Allow', 'another method')}"
        return _noted(request, Refusal(told, status, headers=error.headers)).response()

    return app


def _noted(request: Request, refusal: Refusal) -> Refusal:
    """For the log."""
    request.state.notes["error"] = refusal.body["error"]["type"]
    return refusal


async def _answer(service: Service, form: Form, body: Asked, request: Request) -> Response:
    """Check, run, and answer: whole, or as a stream, whose status waits for its first segment, but not for long."""
    service.check(body)
    prompts = await service.prompts(body, request.state)
    config, prompts = await service.settings(body, prompts)
    name = form.prefix + uuid.uuid4().hex
    head = {"id": name, "object": form.whole, "created": int(time.time()), "model": service.model}
    exchange = Exchange(service, name, body, prompts, config)
    steps = exchange.steps()

    def note() -> None:
        request.state.notes.update(exchange.notes)

    try:
        if body.stream:
            first = await while_heard(request, next_of(steps), service.keep_alive)
            return Stream(server_sent(form, head, exchange, first, steps), first, steps, note)
        await while_heard(request, _to_the_end(steps))
    except ClientGone:
        return Response(status_code=499)
    finally:
        note()
    choices = [whole_choice(form, choice, body.traced) for choice in exchange.choices]
    return Json({**head, "choices": choices, "usage": exchange.usage})


async def _to_the_end(steps: Steps) -> None:
    async for _ in steps:
        pass
