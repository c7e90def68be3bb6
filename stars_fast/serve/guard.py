"""What every HTTP request passes first: its name, the key, the size of its body; and the line that is logged of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stars_fast.serve.errors import Refusal
from stars_fast.serve.service import Service

_OPEN = ("/health", "/metrics", "/version")  # without a key, to machines that watch
_QUIET = ("/health", "/metrics")  # asked every few seconds by machines
_BODY_SECONDS = 60.0  # within which a body must have come
_NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_log = logging.getLogger("stars_fast.serve")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None) -> None:
        self.app, self.service = app, service
        key = None if api_key is None else api_key.strip()  # files end with a line break
        if key == "":
            raise ValueError("api_key is empty: leave it out, or give a key")
        self._key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no others but the lifespan's
            return await self.app(scope, receive, send)
        began, headers, path = time.perf_counter(), Headers(scope=scope), _route(scope)
        given = headers.get("x-request-id", "")
        name = given if _NAME.fullmatch(given) else uuid.uuid4().hex
        notes: dict[str, Any] = {"request_id": name, "status": None}
        scope.setdefault("state", {})["notes"] = notes

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            try:
                self._check_key(path, headers)
                receive = await self._received(path, headers, receive)
            except Refusal as refusal:
                return await refusal.response()(scope, receive, answer)
            await self.app(scope, receive, answer)
        except BaseException as error:  # a tokenizer in Rust may panic, which is no Exception
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit)):
                raise
            _log.error("a request failed", exc_info=error, extra={"fields": {"request_id": name}})
            if notes["status"] is not None:  # the answer has begun: the connection breaks off
                raise
            notes["error"] = "InternalServerError"
            await Refusal(f"the server failed: {type(error).__name__}", 500).response()(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            self.service.pixels -= scope["state"].get("pixels", 0)
            self.service.metrics.responses.labels(str(notes["status"] or 499)).inc()
            if path.startswith("/v1/"):
                self.service.metrics.whole.observe(seconds)
            notes |= {"method": scope["method"], "path": path[:100], "ms": round(1000 * seconds, 1)}
            _log.log(logging.DEBUG if path in _QUIET else logging.INFO, "request", extra={"fields": notes})

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in _OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests have one length: the time of comparing them says nothing of the key's.
        same = secrets.compare_digest(_digest(key.strip().encode("latin-1")), self._key)
        if scheme.lower() != "bearer" or not same:
            message = "wrong API key" if key else "no API key: send the header Authorization: Bearer KEY"
            raise Refusal(message, 401, headers={"WWW-Authenticate": "Bearer"})

    async def _received(self, path: str, headers: Headers, receive: Receive) -> Receive:
        """The whole body, as one message, and then what follows."""
        length, most = headers.get("content-length", "0"), self.service.max_body(path)
        if length.isdecimal() and int(length[:20]) > most:
            raise _too_large(most)
        body, messages = bytearray(), list[Message]()

        async def collect() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    messages.append(message)
                    return
                body.extend(message.get("body", b""))
                if len(body) > most:
                    raise _too_large(most)
                more = message.get("more_body", False)

        try:
            await asyncio.wait_for(collect(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {_BODY_SECONDS:g} seconds"
            raise Refusal(message, 408, headers={"Connection": "close"}) from None
        messages.insert(0, {"type": "http.request", "body": bytes(body), "more_body": False})

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        return replay


def _route(scope: Scope) -> str:
    """What the routes are compared with: the path without the root path, which a proxy or Ray Serve may have in it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if path == root or path.startswith(f"{root}/") else path


def _too_large(most: int) -> Refusal:
    # What is left of the body is not read.
    return Refusal(f"the body has more than {most} bytes", 413, headers={"Connection": "close"})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
