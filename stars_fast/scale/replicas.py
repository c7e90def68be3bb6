"""The server of ``stars-fast serve`` as a Ray Serve application: replicas, balanced, scaled and replaced by Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.names import with_extra

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application


class StarsReplica:
    """One engine with the routes and the settings of ``stars-fast serve``."""

    def __init__(
        self,
        policy: str,
        reward: Any,
        config: StarsConfig,
        model: str,
        api_key: str | None,
        engine: Mapping[str, Any],
        service: Mapping[str, Any],
    ) -> None:
        from stars_fast.serve.assembly import service_of

        self._service = service_of(StarsEngine(policy, reward, **engine), config, model, **service)
        self._api_key = api_key

    def __serve_build_asgi_app__(self) -> FastAPI:
        from stars_fast.serve.app import create_app

        return create_app(self._service, self._api_key)

    def check_health(self) -> None:
        """Raise where no request can be answered any more, so that Ray replaces this replica."""
        if (dead := self._service.engine.dead) is not None:
            raise RuntimeError("the engine's thread has died") from dead

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.engine.close()


def serve_app(
    policy: str,
    reward: Any,
    config: StarsConfig | None = None,
    *,
    model: str | None = None,
    api_key: str | None = None,
    engine: Mapping[str, Any] | None = None,
    service: Mapping[str, Any] | None = None,
    **options: Any,
) -> Application:
    """An application for ``ray.serve.run``. Needs the extra ``ray-serve``; else ImportError.

    Parameters
    ----------
    policy, reward : str
        Folders, hub ids or "demo", which every replica loads itself. ``reward`` may also be a function that pickles.
    config : StarsConfig, optional
        What requests leave open, as ``--config``, ``--set`` and ``--fit`` of the command.
    model : str, optional
        What clients call it. Default: ``policy``, of a folder its name.
    api_key : str, optional
        What clients must send.
    engine, service : mapping, optional
        Arguments of :class:`~stars_fast.StarsEngine`, and of :func:`~stars_fast.serve.assembly.service_of`:
        ``max_model_len``, ``max_segment_length``, ``max_waiting``, ``timeout``, ``samples_greedy``, ``image_folder``,
        ``given``.
    **options
        Of a Ray Serve deployment: ``num_replicas``, ``ray_actor_options``, ``autoscaling_config``, ...

    Examples
    --------
    >>> from ray import serve  # doctest: +SKIP
    >>> from stars_fast.scale.replicas import serve_app
    >>> serve.run(serve_app("org/policy", "org/reward", num_replicas=8, ray_actor_options={"num_gpus": 1}))
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(f"this needs Ray Serve: {with_extra('ray-serve')} ({error})") from error
    service = dict(service or {})
    options = {
        "name": "stars-fast",
        "max_ongoing_requests": service.get("max_waiting", 256),
        "graceful_shutdown_timeout_s": 30.0,
        **options,
    }
    deployment = serve.deployment(serve.ingress()(StarsReplica)).options(**options)
    model = model or (os.path.basename(os.path.realpath(policy)) if os.path.isdir(policy) else policy)
    return deployment.bind(policy, reward, config or StarsConfig(), model, api_key, dict(engine or {}), service)
