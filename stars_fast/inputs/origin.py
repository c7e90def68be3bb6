"""What a traced output came of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.inputs.job import Job
from stars_fast.loop.request import Request
from stars_fast.methods.numbers import plain
from stars_fast.report.trace_lines import Origin


def origin(job: Job, requests: Sequence[Request], tokenizer: Any) -> Origin:
    """Of a job that is over, whose rows these are."""
    call, seed = job.call, plain(job.call.arguments.seed)
    prompts = [request.prompt_index for request in requests]
    seeds = [seed[i] if isinstance(seed, Sequence) else seed for i in prompts]
    return Origin(
        settings=_settings(call.config),
        loop=call.terms.method.loop,
        samples=call.config.num_return_sequences,
        prompts=[call.prompts[i].source for i in prompts],
        prompt_ids=[call.prompts[i].ids for i in prompts],
        seeds=[None if one is None else int(one) for one in seeds],
        rules=[(request.target, request.base, request.beta) for request in requests],
        unfinished=[request.looked_at if request.finish_reason in ("error", "abort") else [] for request in requests],
        tokenizer=tokenizer,
    )


def _settings(config: StarsConfig) -> dict[str, Any]:
    """JSON-ready, without what belongs to single prompts. Of a method that holds a model the name; of a fit, which is
    long, whether there is one.
    """
    try:
        method = config.whole_method.to_dict()
    except ValueError:
        method = config.whole_method.name
    own = {name: None for name in ("target_reward", "base_reward") if isinstance(getattr(config, name), tuple)}
    return {**config.replace(method="stars", fit=None, **own).to_dict(), "method": method, "fit": bool(config.known)}
