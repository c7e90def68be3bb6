"""Runs the application until it is told to stop, and lets what is under way come to its end."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket

import uvicorn

from stars_fast.serve.app import create_app
from stars_fast.serve.service import Service

_BACKLOG = 2048  # uvicorn's own
_AFTERWARDS = 5.0  # seconds for streams to say that they were ended


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.create_task(self._service.drain(self._grace))
        await super().shutdown(sockets)
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, though nobody answers yet: a port in use is told of before models are loaded.

    Two sockets that only have the address would both get it. Of a name's addresses the first is taken. Raises OSError.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except BaseException:
        bound.close()
        raise
    return bound


def serve(service: Service, bound: socket.socket, api_key: str | None, grace: float) -> None:
    """Answer requests until SIGTERM or SIGINT, then for at most ``grace`` seconds; a second SIGINT ends it at once.

    To be called in the main thread.
    """
    config = uvicorn.Config(
        create_app(service, api_key),
        log_config=None,  # as it is set up already
        access_log=False,
        server_header=False,
        workers=1,
        ws="none",
        timeout_graceful_shutdown=math.ceil(grace + _AFTERWARDS),
    )
    # uvicorn raises the signal once more when it is through: that is no failure.
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
    gc.collect()
    gc.freeze()  # models and modules stay: each full collection would look through them again, for a heartbeat's time
    try:
        _Server(config, service, grace).run(sockets=[bound])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        gc.unfreeze()
        service.engine.close()
