"""What the server was started with, and what it makes of a request: settings, limits, refusals."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import State

from stars_fast.async_engine import AsyncStarsEngine
from stars_fast.config import StarsConfig
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods.numbers import shown
from stars_fast.rewards.base_rendered import RenderedReward
from stars_fast.serve.errors import Refusal, in_terms_of_requests, named, unavailable
from stars_fast.serve.metrics import Metrics
from stars_fast.serve.pictures import MOST_BYTES, MOST_HELD, open_pictures
from stars_fast.serve.refused import check_served
from stars_fast.serve.schema import MOST_CANDIDATES, Asked, ChatRequest
from stars_fast.text.media import written_before
from stars_fast.text.turns import texts_of

COMPLETION_TOKENS = 16  # of a completion that does not say how long, as OpenAI has it
CHATS = "/v1/chat/completions"
TIMEOUT = 600.0  # seconds of a request, unless the server says otherwise

_log = logging.getLogger("stars_fast.serve")
_DIRECT = ("temperature", "top_p", "min_p", "repetition_penalty", "ignore_eos")


@dataclass
class Service:
    """The engine with what requests are answered by.

    Attributes
    ----------
    engine : AsyncStarsEngine
    model : str
        What clients call it.
    config : StarsConfig
        What a request leaves open.
    max_tokens : int, optional
        Of a request that does not say. None: 16 for completions, the rest of the context for chats.
    timeout : float, optional
        Seconds; no request may have more. None: no bound.
    samples_greedy : bool
        Whether temperature 0 is taken for one that was not given.
    keep_alive : float
        Seconds of silence after which a stream sends a comment.
    image_folder : Path, optional
        Where pictures may lie that a request names. None: requests bring theirs with them.
    """

    engine: AsyncStarsEngine
    model: str
    config: StarsConfig
    max_tokens: int | None = None
    timeout: float | None = TIMEOUT
    samples_greedy: bool = False
    keep_alive: float = 15.0
    image_folder: Path | None = None
    metrics: Metrics = field(init=False)
    pixels: int = field(default=0, init=False)  # of the pictures of open requests

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self.draining, self._greedy_told = False, False

    def max_body(self, path: str) -> int:
        """Most bytes of a request: ids of the longest prompt, written as JSON several times over; a chat's pictures."""
        pictures = self.reads_pictures and path == CHATS
        return max(1 << 20, 16 * self.engine.max_model_len) + MOST_BYTES * pictures

    @property
    def reads_pictures(self) -> bool:
        """Whether chats may have any."""
        return self.engine.engine.processor is not None

    def trouble(self) -> str | None:
        """Why no request can be answered, if so."""
        if self.engine.dead is not None:
            return "the engine's thread has died"
        return "the server is shutting down" if self.draining else None

    def check(self, body: Asked) -> None:
        """Refuse what this server has not, or cannot do."""
        if body.model is not None and body.model != self.model:
            raise Refusal(f"model={shown(body.model)}: there is {self.model!r} here", 404, "model")
        check_served(body)
        if isinstance(body, ChatRequest) and body.pictures and not self.reads_pictures:
            param = f"{body.pictures[0]}.type"
            raise Refusal(f"{param}='image_url': the policy of this server reads no pictures", param=param)
        prompts, most = len(body.prompts), self.engine.max_waiting
        if prompts * body.samples > most:
            raise Refusal(
                f"n={body.samples} answers to each of {prompts} prompts: this server has max_waiting={most}",
                param="n" if prompts == 1 else "prompt",
            )
        if (reason := self.trouble()) is not None:
            raise unavailable(reason)

    async def prompts(self, body: Asked, costs: State) -> list[Any]:
        """What is to be answered, with its pictures opened. Raises Refusal for those that are none, and while those of
        others take up too much. Whose ``costs`` these are takes their ``pixels`` back when it ends.

        A chat without a template is, to a policy that reads sources, the text of its turns: of that a tokenizer makes a
        source that ends as one does, which it does not of what a template writes.
        """
        engine = self.engine.engine
        bare = engine.policy.from_source and not getattr(engine.tokenizer, "chat_template", None)
        if isinstance(body, ChatRequest) and bare:
            return ["\n".join(text for turn in body.prompts[0] for text in texts_of(turn))]
        if not isinstance(body, ChatRequest) or not body.pictures:
            return body.prompts
        if self.pixels >= MOST_HELD:
            self.metrics.rejections.inc()
            raise unavailable(f"the pictures of open requests have {self.pixels} pixels, of at most {MOST_HELD}")
        chat, costs.pixels = await asyncio.to_thread(open_pictures, body.prompts[0], self.image_folder)
        self.pixels += costs.pixels
        return [chat]

    async def settings(self, body: Asked, prompts: list[Any]) -> tuple[StarsConfig, list[Any]]:
        """The request's settings over the server's, and its prompts: as they were read, where their length was asked.

        Raises
        ------
        Refusal
            For values that the engine refuses, in the request's own terms.
        """
        changes: dict[str, Any] = {"num_return_sequences": body.samples}
        changes |= {name: value for name in _DIRECT if (value := getattr(body, name)) is not None}
        if self.is_greedy(body):
            del changes["temperature"]
        if body.top_k is not None:
            changes["top_k"] = max(body.top_k, 0)
        if body.stop:
            changes["stop_strings"] = body.stop
        if body.stars is not None:
            changes |= body.stars.model_dump(exclude_none=True, exclude={"trace"})
        changes["max_new_tokens"] = body.longest or self.max_tokens or COMPLETION_TOKENS
        try:
            if "method" in changes:  # candidates stay those of the server's guides, if it has any
                changes["method"] = self.config.whole_method.selecting(changes["method"])
            config = self.config.replace(**changes)
            method = config.chosen_method
            ruled = method.rule(config)
            given = set[str]() if body.stars is None else body.stars.model_fields_set
            if idle := [name for name in given & changes.keys() if getattr(ruled, name) != getattr(config, name)]:
                raise Refusal(f"stars.{idle[0]}: method={method.name!r} decides it itself", param=f"stars.{idle[0]}")
            config = ruled  # what the server was started with for another method is none of this one's
            if not method.uses_fit:
                config = config.replace(fit=None)
            elif method.has_target and config.target_reward is not None:  # which decides alone
                config = config.replace(fit=None, acceptance=StarsConfig().acceptance)
            each = method.rows(config.replace(candidates="auto"))
            if (work := len(body.prompts) * body.samples * each) > MOST_CANDIDATES:
                raise Refusal(
                    f"{len(body.prompts)} prompts, n={body.samples} and up to {each} candidates under "
                    f"method={method.name!r} are {work} candidates: at most {MOST_CANDIDATES} in a request",
                    param="n",
                )
            if isinstance(body, ChatRequest) and body.longest is None and self.max_tokens is None:
                room, prompts = await asyncio.to_thread(self._room, body, prompts, config)
                config = config.replace(max_new_tokens=max(room, 1))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise self.refused(str(error)) from error
        return config, prompts

    def _room(self, body: ChatRequest, prompts: list[Any], config: StarsConfig) -> tuple[int, list[Any]]:
        """Tokens that are left for the answer to a chat, in both models; and the chat as it was read."""
        shortest = config.replace(max_new_tokens=1)
        arguments = Arguments(prompts, shortest, chat_template_kwargs=body.chat_template_kwargs)
        call, engine = self.engine.engine.prepare(arguments), self.engine.engine
        length = len(call.prompts[0].ids)
        room = self.engine.max_model_len - length
        if (positions := engine.policy.max_positions) is not None:
            room = min(room, positions - len(written_before(call.prompts[0])))
        if engine.kv_cache_tokens is not None:
            room = min(room, engine.kv_cache_tokens - length - config.segment_length)
        if isinstance(reward := engine.reward, RenderedReward) and reward.max_positions is not None:
            context = reward.context(call.nodes[0].reward_prompt)
            room = min(room, reward.max_positions - len(context.prefix) - len(context.tail))
        return room, prompts if engine.policy.from_source else list(call.prompts)  # a source has its target behind it

    def is_greedy(self, body: Asked) -> bool:
        """Whether temperature 0 was asked for, which is sampled here. Raises Refusal where the server does not."""
        if body.temperature != 0:
            return False
        if not self.samples_greedy:
            raise Refusal(
                "temperature=0: greedy decoding leaves no candidates to choose among; give at least 1e-6, or start the "
                "server with --greedy sample",
                param="temperature",
            )
        if not self._greedy_told:
            self._greedy_told = True
            _log.warning("temperature=0 was asked for, and is sampled (--greedy sample); said once")
        return True

    def seconds(self, body: Asked) -> float | None:
        """Within which the request is to be answered."""
        return min((one for one in (body.timeout, self.timeout) if one is not None), default=None)

    def refused(self, message: str) -> Refusal:
        """What the engine refuses before anything is drawn."""
        message = in_terms_of_requests(message)
        return Refusal(message, param=named(message))

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait until the open ones have ended; then end them with what they have."""
        self.draining = True
        await self.engine.drain(seconds)
