"""From an engine to a service: what `stars-fast serve` and a Ray Serve replica do alike before the first request."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from stars_fast.async_engine import AsyncStarsEngine
from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.loop.caller import SEGMENT_LENGTH
from stars_fast.serve.service import TIMEOUT, Service

_OF_A_FIT = ("segment_length", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# For models without a template, such as the demo's: what was said, one turn after another.
_PLAIN_TEMPLATE = (
    "{{ bos_token | default('', true) }}"
    "{% for message in messages %}{{ message['content'] }}{{ '' if loop.last else '\\n' }}{% endfor %}"
)
_log = logging.getLogger("stars_fast.serve")


def service_of(
    engine: StarsEngine,
    config: StarsConfig,
    model: str,
    *,
    given: Collection[str] | None = None,
    max_model_len: int | None = None,
    max_segment_length: int = SEGMENT_LENGTH,
    max_waiting: int = 256,
    timeout: float | None = TIMEOUT,
    samples_greedy: bool = False,
    image_folder: str | os.PathLike[str] | None = None,
) -> Service:
    """A service over an engine, warmed up, whose settings a request can be answered with.

    A policy without a chat template gets a plain one, if it reads no sources. A fit's segment length and sampling stand
    where the config says nothing. Closing ``service.engine`` gives the engine back.

    Parameters
    ----------
    engine : StarsEngine
    config : StarsConfig
        What requests leave open.
    model : str
        What clients call it.
    given : collection of str, optional
        Fields of the config that were set on purpose. Default: those that differ from StarsConfig's own.
    max_model_len, max_segment_length, max_waiting
        As in :class:`~stars_fast.AsyncStarsEngine`.
    timeout : float, optional
        Seconds; no request may have more. None: no bound.
    samples_greedy : bool
        Whether temperature 0 is taken for one that was not given.
    image_folder : path, optional
        Where pictures may lie that a request names.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        For settings that no request could be answered with, and a policy without a tokenizer.
    """
    if engine.tokenizer is None:
        raise ValueError("the policy has no tokenizer beside it: give tokenizer=")
    given = _set_in(config) if given is None else given
    config = with_fit(config, given)
    length = min(config.chosen_method.rule(config).segment_length, config.max_new_tokens)
    if length > max_segment_length:
        raise ValueError(f"segment_length={length} is more than max_segment_length={max_segment_length}")
    if not getattr(engine.tokenizer, "chat_template", None) and not engine.policy.from_source:
        engine.tokenizer.chat_template = _PLAIN_TEMPLATE
        _log.info("the policy has no chat template: of a chat it reads the contents, a line each")
    engine.prepare(Arguments(["Hello"], config.replace(max_new_tokens=1)))  # on trial
    session = AsyncStarsEngine(
        engine, max_model_len=max_model_len, max_segment_length=max_segment_length, max_waiting=max_waiting
    )
    try:
        engine.warm_up(config)  # in the pools that are held from here on
        if calibrates(config):
            _log.warning(
                "no target reward, no fit: each request first draws 8 unguided answers to find its target, about 8 "
                "times the tokens and a whole answer's time before the first byte. Give --fit DIR (stars-fast fit "
                "makes one) or --target-reward X"
            )
        longest = config.max_new_tokens if "max_new_tokens" in given else None
        folder = None if image_folder is None else Path(image_folder)
        return Service(session, model, config, longest, timeout, samples_greedy, image_folder=folder)
    except BaseException:
        session.close()
        raise


def with_fit(config: StarsConfig, given: Collection[str]) -> StarsConfig:
    """The config with what its fit was made with, but for the fields that were given."""
    made = {} if config.known is None else config.known.made_for
    return config.replace(**{name: made[name] for name in _OF_A_FIT if name in made and name not in given})


def calibrates(config: StarsConfig) -> bool:
    """Whether requests that give no target draw pilots."""
    method = config.chosen_method
    return method.has_target and config.target_reward is None and not (method.uses_fit and config.known is not None)


def _set_in(config: StarsConfig) -> set[str]:
    plain = StarsConfig()
    return {field.name for field in fields(config) if getattr(config, field.name) != getattr(plain, field.name)}
