"""What came of a job that is over: its output, its first error, and what its caller is warned of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from stars_fast.inputs.job import Job
from stars_fast.inputs.origin import origin
from stars_fast.loop.request import Request
from stars_fast.notices import warn
from stars_fast.outputs import StarsOutput
from stars_fast.text.media import written_before
from stars_fast.text.tokens import text_of

# A target counts as out of reach where, of so many segments at least, no larger share is accepted.
_MANY_SEGMENTS, _HARDLY_ANY = 16, 0.01


def output_of(job: Job, model: PreTrainedModel, tokenizer: Any, texts: bool) -> StarsOutput:
    """With or without texts; ``model`` and ``tokenizer`` are the policy's."""
    requests = [request for request in job.requests if request is not None]
    rows = [written_before(request.prompt) + request.tokens for request in requests]
    width = max(map(len, rows), default=0)
    pad = pad_token_id(model, tokenizer, job.call.terms.sampling.eos_token_ids)
    padded = [row + [pad] * (width - len(row)) for row in rows]
    decoded = [_text(request, job, tokenizer) for request in requests] if texts and tokenizer is not None else None
    return StarsOutput(
        sequences=torch.tensor(padded, dtype=torch.int64, device="cpu").view(len(rows), width),
        completions=[list(request.tokens) for request in requests],
        texts=decoded,
        rewards=[request.reward for request in requests],
        finish_reasons=[request.finish_reason or "error" for request in requests],
        errors=[None if request.error is None else str(request.error) for request in requests],
        logprobs=[request.logprobs for request in requests],
        sampling_logprobs=[request.sampling_logprobs for request in requests],
        segments=[request.segments for request in requests],
        stats=job.stats.to_dict(),
        origin=origin(job, requests, tokenizer) if job.call.terms.trace else None,
    )


def _text(request: Request, job: Job, tokenizer: Any) -> str:
    """The completion's text; where there is none to be had, the request says why, and its ids are whole."""
    text, cause = text_of(tokenizer, request.tokens, f"prompts[{request.prompt_index}]")
    if cause is not None and request.error is None:
        request.error = cause
        job.note(request)
    return text


def pad_token_id(model: PreTrainedModel, tokenizer: Any, eos_token_ids: Sequence[int]) -> int:
    """What pads sequences: the tokenizer's or model's pad id, else an EOS, else 0."""
    generation_config = getattr(model, "generation_config", None)
    for pad in (getattr(tokenizer, "pad_token_id", None), getattr(generation_config, "pad_token_id", None)):
        if pad is not None:
            return int(pad)
    return eos_token_ids[0] if eos_token_ids else 0


def first_error(job: Job) -> RuntimeError:
    """The first failure, with its cause."""
    row, cause = next(iter(job.failed.items()))
    error = RuntimeError(f"prompts[{row // job.call.config.num_return_sequences}]: {cause}")
    error.__cause__ = cause.exception
    return error


class Remarks:
    """What an engine warns its callers of; what holds for calls to come as well is said once."""

    def __init__(self) -> None:
        self._missed = set[Any]()  # targets that nothing reached, and that were named
        self._priced = False  # whether what pilots cost was said

    def on(self, job: Job, without_text: bool, where: str) -> None:
        """``without_text``: the reward was called with token ids though it reads text. ``where`` errors are found."""
        solved = [pilot for pilot in job.pilots if pilot is not None and pilot.error is None]
        if solved and not any(pilot.varies for pilot in solved):
            warn(
                "the reward is the same for all pilot responses: nothing is guided while it does not vary"
                + (" (it was called with token ids: give tokenizer= for text)" if without_text else "")
            )
        self._on_pilots(job)
        self._on_unreached(job)
        if job.failed and job.call.arguments.on_error != "raise":
            failed, rows = len(job.failed), job.call.rows
            warn(
                ("no request succeeded" if failed == rows else f"{failed} of {rows} requests failed")
                + f"; the first ended with: {job.first_failure} ({where}; on_error='raise' raises the first)"
            )

    def _on_pilots(self, job: Job) -> None:
        """What targets per prompt cost, where a fit would spare it."""
        stats = job.stats
        if stats.calibration_tokens and job.guided and job.call.terms.method.uses_fit and not self._priced:
            self._priced = True
            warn(
                f"{stats.calibration_tokens} of {stats.policy_tokens} policy tokens were drawn to find a target for "
                "each prompt. What stars_fast.fit(engine, prompts) returns, once, spares them in every call with fit=; "
                "so does target_reward="
            )

    def _on_unreached(self, job: Job) -> None:
        target, method = job.call.config.target_reward, job.call.terms.method
        segments = [one for request in job.requests if request is not None for one in request.segments]
        tested = [one for one in segments if math.isfinite(one.threshold)]
        if target is None or not method.has_target or target in self._missed or len(tested) < _MANY_SEGMENTS:
            return
        if sum(segment.accepted for segment in tested) <= _HARDLY_ANY * len(tested):
            self._missed.add(target)
            best = max((one.reward for one in tested), default=math.nan)
            warn(
                f"hardly any of {len(tested)} segments was accepted (their best reward is {best:.3g}): target_reward="
                f"{target!r:.80} lies beyond what the policy reaches with beta={job.call.config.beta:g}, so that each "
                "segment costs max_attempts and is the best of them. Give a lower one, or target_reward=None, which "
                "calibrates it"
            )
