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
from stars_fast.rows.engines import Names

if TYPE_CHECKING:
    from stars_fast.cli.settings import Settings
    from stars_fast.config import StarsConfig
    from stars_fast.engine import StarsEngine
    from stars_fast.methods.fit import Fit

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_OF_A_FIT = ("segment_length", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# For models without a template, such as the demo's: what was said, one turn after another.
_PLAIN_TEMPLATE = (
    "{{ bos_token | default('', true) }}"
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}"
)


def run(
    policy: models.PolicyName = None,
    reward: models.RewardName = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="STARS_API_KEY", help="What clients must send. The variable keeps it out of `ps`."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; the policy's hub id or folder's name.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="DIR", help="What `stars-fast fit` wrote, or 'demo': no pilots then.")
    ] = None,
    target_reward: Annotated[
        float | None, typer.Option(help="Of requests that give none: no pilots then.", show_default=False)
    ] = None,
    config: models.SettingsFile = None,
    set_: models.Assignments = None,
    greedy: Annotated[
        str, typer.Option(metavar="refuse|sample", help="What becomes of temperature 0, which evaluations send.")
    ] = "refuse",
    max_waiting: Annotated[int, typer.Option(min=1, help="Most open requests; further ones get 503.")] = 256,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a prompt with its answer; at most 8192 where not given.")
    ] = None,
    max_segment_length: Annotated[
        int, typer.Option(min=1, help="Longest segment; all requests wait for the longest of a heartbeat.")
    ] = 32,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Most seconds of a request.", show_default="none")
    ] = None,
    timeout_graceful_shutdown: Annotated[
        float, typer.Option(min=0.0, help="Seconds for open requests after SIGTERM.")
    ] = 30.0,
    workers: Annotated[
        int, typer.Option(envvar="WEB_CONCURRENCY", help="One: a second would load all models again.")
    ] = 1,
    tokenizer: models.TokenizerName = None,
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
        fail(f"{', '.join(missing)} missing: pip install 'stars-fast[serve]'")
    from stars_fast.cli.settings import read_settings

    _check_usage(api_key, greedy, workers)
    with refusing(OSError, ValueError, TypeError):
        settings = read_settings(config, set_ or ())
        settings = settings._replace(config=_guided(settings, fit, target_reward))
    names = Names(policy or settings.policy, reward or settings.reward, tokenizer, reward_tokenizer, reward_tail)
    models.check_models(names, dtype)
    from stars_fast.serve.server import bind

    try:
        bound = bind(host, port)
    except (OSError, UnicodeError) as error:
        fail(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}")
    with bound:
        engine = models.load_engine(names, dtype, device, max_rows, kv_cache_tokens)
        _serve(
            engine,
            settings,
            bound,
            dict(max_model_len=max_model_len, max_segment_length=max_segment_length, max_waiting=max_waiting),
            dict(
                model=served_model_name or _model_name(str(names.policy)),
                timeout=timeout,
                samples_greedy=greedy == "sample",
            ),
            api_key,
            host,
            timeout_graceful_shutdown,
        )


def _serve(
    engine: StarsEngine,
    settings: Settings,
    bound: Any,
    limits: dict[str, Any],
    terms: dict[str, Any],
    api_key: str | None,
    host: str,
    grace: float,
) -> None:
    from stars_fast.async_engine import AsyncStarsEngine
    from stars_fast.serve.logs import log_json
    from stars_fast.serve.server import serve
    from stars_fast.serve.service import Service

    if engine.tokenizer is None:
        fail("the policy has no tokenizer beside it: give --tokenizer")
    if plain := not getattr(engine.tokenizer, "chat_template", None):
        engine.tokenizer.chat_template = _PLAIN_TEMPLATE
    config = settings.config
    length = config.chosen_method.rule(config).segment_length
    if min(length, config.max_new_tokens) > limits["max_segment_length"]:
        fail(f"segment_length={length} is more than --max-segment-length {limits['max_segment_length']}")
    with refusing_models():
        _try(engine, config)
        shared = AsyncStarsEngine(engine, **limits)
        engine.warm_up(config)  # in the pools that are held from here on
    longest = config.max_new_tokens if "max_new_tokens" in settings.given else None
    service = Service(shared, config=config, max_tokens=longest, **terms)
    log_json()
    log = logging.getLogger("stars_fast.serve")
    if plain:
        log.info("the policy has no chat template: of a chat it reads the contents, a line each")
    if _calibrates(config):
        log.warning(
            "no target reward, no fit: each request first draws 8 unguided answers to find its target, about 8 times "
            "the tokens and a whole answer's time before the first byte. Give --fit DIR (stars-fast fit makes one) or "
            "--target-reward X"
        )
    if api_key is None and host not in _LOOPBACK:
        log.warning("no --api-key: whoever reaches this address may use the server")
    address = bound.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    log.info(f"serving {service.model!r} at http://{shown}:{address[1]}")
    serve(service, bound, api_key, grace)


def _check_usage(api_key: str | None, greedy: str, workers: int) -> None:
    if workers != 1:
        fail(
            f"--workers {workers} (or WEB_CONCURRENCY): one process has one engine, and one engine fills a GPU. Start "
            "one server for each GPU, with CUDA_VISIBLE_DEVICES and a port of its own, behind a proxy"
        )
    if greedy not in ("refuse", "sample"):
        fail(f"--greedy {greedy!r}: must be refuse or sample")
    if api_key is not None and not api_key.strip():
        fail("--api-key (or STARS_API_KEY) is empty: leave it out, or give a key")


def _guided(settings: Settings, fit: str | None, target_reward: float | None) -> StarsConfig:
    """The settings with the fit and the target that were given; what a fit was made with stands where nothing does."""
    config = settings.config
    if fit is not None:
        config = config.replace(fit=fit)
        known: Fit | None = config.known
        made = {} if known is None else known.made_for
        config = config.replace(
            **{name: made[name] for name in _OF_A_FIT if name in made and name not in settings.given}
        )
    return config if target_reward is None else config.replace(target_reward=target_reward)


def _calibrates(config: StarsConfig) -> bool:
    """Whether requests that give no target draw pilots."""
    method = config.chosen_method
    return method.has_target and config.target_reward is None and not (method.uses_fit and config.known is not None)


def _try(engine: StarsEngine, config: StarsConfig) -> None:
    """Raise for settings that no request could be answered with."""
    from stars_fast.inputs.arguments import Arguments

    engine.prepare(Arguments(["Hello"], config.replace(max_new_tokens=1)))


def _model_name(policy: str) -> str:
    """Without the folders above it: clients need not know them."""
    return Path(policy).resolve().name if os.path.isdir(policy) else policy
