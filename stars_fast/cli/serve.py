"""``stars-fast serve``: OpenAI's API over one engine."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stars_fast.cli import models
from stars_fast.cli.console import fail, refusing, refusing_models
from stars_fast.names import with_extra
from stars_fast.rows.engines import Names

if TYPE_CHECKING:
    from stars_fast.cli.settings import Settings
    from stars_fast.config import StarsConfig

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(
    policy: models.PolicyName = None,
    reward: models.RewardName = None,
    host: Annotated[str, typer.Option(help="Address to listen at; of a name the first.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="STARS_API_KEY", help="What clients must send. The variable keeps it out of `ps`."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; the policy's hub id or folder's name.")
    ] = None,
    fit: models.FitName = None,
    target_reward: Annotated[
        float | None, typer.Option(help="Of requests that give none: no pilots then.", show_default=False)
    ] = None,
    config: models.SettingsFile = None,
    set_: models.Assignments = None,
    greedy: Annotated[
        str, typer.Option(metavar="refuse|sample", help="What becomes of temperature 0, which evaluations send.")
    ] = "refuse",
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Folder whose pictures a request may name; every client may see them. Default: none."),
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most open answers; further ones get 503.")] = 256,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a prompt with its answer; at most 8192 where not given.")
    ] = None,
    max_segment_length: Annotated[
        int, typer.Option(min=1, help="Longest segment; all requests wait for the longest of a heartbeat.")
    ] = 32,
    timeout: Annotated[float, typer.Option(min=0.0, help="Most seconds of a request; 0 for no bound.")] = 600.0,
    timeout_graceful_shutdown: Annotated[
        float, typer.Option(min=0.0, help="Seconds for open requests after SIGTERM.")
    ] = 30.0,
    tokenizer: models.TokenizerName = None,
    processor: models.ProcessorName = None,
    reward_tokenizer: models.RewardTokenizerName = None,
    reward_tail: models.RewardTail = "auto",
    max_rows: models.MaxRows = None,
    kv_cache_tokens: models.KvCacheTokens = None,
    dtype: models.Dtype = "auto",
    device: models.Device = "auto",
) -> None:
    """Serve a policy under the guidance of a reward model, over OpenAI's API.

    --config and --set are what requests leave open. See docs/serve.md.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        fail(f"this command needs {', '.join(missing)}: {with_extra('serve')}")
    from stars_fast.cli.settings import read_settings

    _check_usage(api_key, greedy, image_folder)
    with refusing(OSError, ValueError, TypeError):
        settings = read_settings(config, set_ or ())
        settings = settings._replace(config=_guided(settings, fit, target_reward))
    names = Names(
        policy or settings.policy, reward or settings.reward, tokenizer, reward_tokenizer, reward_tail, processor
    )
    models.check_models(names, dtype)
    from stars_fast.serve.server import bind, serve

    try:
        bound = bind(host, port)
    except (OSError, UnicodeError) as error:
        fail(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}")
    with bound:
        engine = models.load_engine(names, dtype, device, max_rows, kv_cache_tokens)
        from stars_fast.serve.assembly import service_of
        from stars_fast.serve.logs import log_json

        if engine.tokenizer is None:
            fail("the policy has no tokenizer beside it: give --tokenizer")
        if image_folder is not None and engine.processor is None:
            fail(f"--image-folder {image_folder}: the policy has no processor to read pictures: give --processor")
        log_json()
        with refusing_models():
            service = service_of(
                engine,
                settings.config,
                served_model_name or _model_name(str(names.policy)),
                given=settings.given,
                max_model_len=max_model_len,
                max_segment_length=max_segment_length,
                max_waiting=max_waiting,
                timeout=timeout or None,
                samples_greedy=greedy == "sample",
                image_folder=image_folder,
            )
        log = logging.getLogger("stars_fast.serve")
        if (workers := os.environ.get("WEB_CONCURRENCY", "1")) != "1":
            log.warning(
                f"WEB_CONCURRENCY={workers}: this is one process, since one engine fills a GPU. Start one for each "
                "GPU, with CUDA_VISIBLE_DEVICES and a port of its own, behind a proxy"
            )
        if api_key is None and host not in _LOOPBACK:
            log.warning("no --api-key: whoever reaches this address may use the server")
        address = bound.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        log.info(f"serving {service.model!r} at http://{shown}:{address[1]}")
        serve(service, bound, api_key, timeout_graceful_shutdown)


def _check_usage(api_key: str | None, greedy: str, image_folder: Path | None) -> None:
    if greedy not in ("refuse", "sample"):
        fail(f"--greedy {greedy!r}: must be refuse or sample")
    if api_key is not None and not api_key.strip():
        fail("--api-key (or STARS_API_KEY) is empty: leave it out, or give a key")
    if image_folder is not None and not image_folder.is_dir():
        fail(f"--image-folder {image_folder}: there is no such folder")


def _guided(settings: Settings, fit: str | None, target_reward: float | None) -> StarsConfig:
    """The settings with the fit and the target that were given."""
    changes: dict[str, Any] = {"fit": fit, "target_reward": target_reward}
    return settings.config.replace(**{name: value for name, value in changes.items() if value is not None})


def _model_name(policy: str) -> str:
    """Without the folders above it: clients need not know them."""
    return Path(policy).resolve().name if os.path.isdir(policy) else policy
