"""The engine: turns prompts into requests, runs them, and gathers what came of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from stars_fast.config import StarsConfig
from stars_fast.inputs.call import Arguments, Call, prepare, read_pilot
from stars_fast.inputs.limits import check_positions, most_slots
from stars_fast.inputs.models import draft_policy, load_policy, load_reward
from stars_fast.loop.dispatch import generation
from stars_fast.loop.pilot import PILOT_SAMPLES, Pilot, pilot_config, solve
from stars_fast.loop.request import Request
from stars_fast.loop.row_cost import PRIOR_RATIO, PRIOR_RATIO_OF_GPUS, Heartbeat, HeartbeatCost
from stars_fast.loop.scheduler import Scheduler, candidate_slots
from stars_fast.loop.stream import new_events, progress_bar
from stars_fast.methods import RSD, Population
from stars_fast.methods.numbers import integer, real
from stars_fast.notices import warn
from stars_fast.outputs import SegmentEvent, StarsOutput
from stars_fast.policy.policy import Policy
from stars_fast.rewards import CallableReward, Reward
from stars_fast.tree.attention import plugged
from stars_fast.tree.memory import default_tokens, divide_devices

# Expected share of candidates accepted where targets are calibrated per prompt.
_DEFAULT_ACCEPTANCE = 0.3
_DEFAULT_ROWS = {"cpu": 64, "cuda": 256}


class StarsEngine:
    """Reward-guided generation with one tree of keys and values per model.

    Parameters
    ----------
    policy : transformers causal LM, path, hub id or "demo"
        Used as it is: dtype, device, LoRA and quantisation are the caller's. Plugged in only while generating.
    reward : transformers sequence classifier with one label, stars_fast.rewards.Reward, callable, path or hub id
        A callable has TRL's signature ``(prompts, completions, completion_ids=..., **columns) -> list[float | None]``,
        sync or async.
    tokenizer : transformers tokenizer, optional
        The policy's; loaded beside a policy given by name. Needed for text, chats and stop strings.
    reward_tokenizer : transformers tokenizer, optional
        The reward model's, where it differs or has a chat template.
    reward_tail : "auto", "template", "none" or sequence of int
        What follows the answer whenever it is scored; see :class:`stars_fast.rewards.ClassifierReward`.
    device : str or torch.device, optional
        Where models given by name are loaded. Default: a CUDA or ROCm device if torch names one, else the CPU. Objects
        stay where they are.
    max_rows : int, optional
        Most candidates side by side. Default 64 on a CPU, 256 on a GPU.
    kv_cache_tokens : int, optional
        Slots of each tree. Default: what the call wants, bounded by free memory. Where requests outgrow them, some wait
        or are encoded again; no text changes.
    gpu_memory_utilization : float
        On a CUDA device, the share of its memory that weights, both trees and forward passes may take together, where
        ``kv_cache_tokens`` is not given. In (0, 1].
    cuda_graphs : bool
        Whether decode steps and small forward passes on a CUDA device are captured; the first call of a size takes
        longer then.
    torch_compile : bool
        Whether decoder layers of both models run compiled on a CUDA device; the first call takes some seconds longer.

    Attributes
    ----------
    on_heartbeat : callable, optional
        Called after each heartbeat of later calls with a :class:`stars_fast.loop.row_cost.Heartbeat`, to observe them.

    Raises
    ------
    NotImplementedError
        For a model family that cannot run on a tree, by name.
    TypeError, ValueError
        For arguments that are not what they should be.
    """

    def __init__(
        self,
        policy: PreTrainedModel | str | os.PathLike[str],
        reward: Any,
        *,
        tokenizer: Any = None,
        reward_tokenizer: Any = None,
        reward_tail: str | Sequence[int] = "auto",
        device: str | torch.device | None = None,
        max_rows: int | None = None,
        kv_cache_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        cuda_graphs: bool = True,
        torch_compile: bool = True,
    ) -> None:
        max_rows = None if max_rows is None else integer("max_rows", max_rows, 1)
        self.kv_cache_tokens = None if kv_cache_tokens is None else integer("kv_cache_tokens", kv_cache_tokens, 1)
        self.gpu_memory_utilization = real("gpu_memory_utilization", gpu_memory_utilization, 0.0, 1.0, open_below=True)
        if device is not None and not any(isinstance(one, (str, os.PathLike)) for one in (policy, reward)):
            raise ValueError(f"device={device!r}: policy and reward are objects, which stay where they are")
        model, self.tokenizer = load_policy(policy, tokenizer, device)
        self.policy = Policy(model, cuda_graphs, torch_compile)
        self.reward: Reward = load_reward(reward, self.tokenizer, reward_tokenizer, reward_tail, model, device)
        for tree in self.reward.tree_models:
            tree.accelerate(cuda_graphs, torch_compile)
        self.max_rows = max_rows or _DEFAULT_ROWS.get(self.policy.device.type, 64)
        self._draft: Policy | None = None  # kept until another is asked for
        self.costs: dict[str, HeartbeatCost] = {}  # by method; what is learned on this machine serves the next call
        self.on_heartbeat: Callable[[Heartbeat], None] | None = None
        self._busy = False

    def generate(
        self,
        prompts: Any,
        config: StarsConfig | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        reward_prompts: Any = None,
        columns: dict[str, Sequence[Any]] | None = None,
        seed: int | Sequence[int] | None = None,
        on_error: str = "return",
        streamer: Any = None,
        progress: bool = False,
        **overrides: Any,
    ) -> StarsOutput:
        """Generate responses that the reward model likes.

        Parameters
        ----------
        prompts : str, list of str, list of chat message lists, list of id lists, id tensor ``[batch, length]``, or
            what a tokenizer returns
            A chat that ends with an assistant's turn is gone on with. Text that has its BOS already gets no other.
        config : StarsConfig, optional
        attention_mask : torch.Tensor, optional
            ``[batch, length]``, with an id tensor. A tokenizer's output brings its own.
        reward_prompts : like prompts, optional
            What the reward sees as the prompt, where that differs.
        columns : dict, optional
            Further arguments of a callable reward, one value per prompt.
        seed : int or sequence of int, optional
            An int keys prompt i, sample j by (seed, i, j); a sequence gives one seed per prompt, keyed
            (seed_i, 0, j). None draws one from torch's global generator.
        on_error : {"return", "raise"}
            Whether a request that fails ends with finish reason "error", or raises.
        streamer : transformers streamer, optional
            Gets the prompt and then each committed segment. One prompt and one sample only.
        progress : bool
            Show a bar with accepted tokens/s and, where candidates are tested, the acceptance rate.
        **overrides
            Fields of StarsConfig for this call.

        Returns
        -------
        StarsOutput

        Raises
        ------
        ValueError, TypeError, NotImplementedError
            For invalid arguments, before any work starts.
        RuntimeError
            With ``on_error="raise"``, the first request's error.
        """
        arguments = Arguments(prompts, config, overrides, attention_mask, reward_prompts, columns, seed, on_error)
        return self.run(arguments, streamer, progress)

    def stream(
        self,
        prompts: Any,
        config: StarsConfig | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        reward_prompts: Any = None,
        columns: dict[str, Sequence[Any]] | None = None,
        seed: int | Sequence[int] | None = None,
        on_error: str = "return",
        **overrides: Any,
    ) -> Iterator[SegmentEvent]:
        """Like :meth:`generate`, yielding a :class:`SegmentEvent` whenever a request commits a segment."""
        arguments = Arguments(prompts, config, overrides, attention_mask, reward_prompts, columns, seed, on_error)
        return self._events(self._prepare(arguments))

    def run(self, arguments: Arguments, streamer: Any = None, progress: bool = False) -> StarsOutput:
        """:meth:`generate`, with its arguments in one piece."""
        call = self._prepare(arguments)
        if streamer is not None:
            if call.rows > 1:
                raise ValueError(f"streamer: takes one response, not {call.rows}; use StarsEngine.stream")
            streamer.put(torch.tensor([call.prompts[0].ids], device="cpu"))
        try:
            with progress_bar(progress, call.rows) as advance:
                for event in self._events(call):
                    advance(event)
                    if streamer is not None and event.segment is not None:
                        streamer.put(torch.tensor(event.segment.tokens, device="cpu"))
        finally:
            if streamer is not None:
                streamer.end()  # whoever reads it waits for the end, whatever happens
        return self._output(call)

    def run_pilots(self, arguments: Arguments, samples: int) -> tuple[StarsConfig, list[Pilot]]:
        """Unguided responses with their partial rewards, per prompt; see :func:`stars_fast.calibrate`."""
        call = self._prepare(arguments)
        if not call.config.chosen_method.has_target:
            raise ValueError(f"method={call.config.chosen_method.name!r} has no target reward to calibrate")
        with self._exclusive(call):
            return call.config, self._pilots(call, samples)

    def _prepare(self, arguments: Arguments) -> Call:
        for tree in (self.policy, *self.reward.tree_models):
            tree.check_unchanged()
        call = prepare(arguments, self.policy, self.reward, self.tokenizer, self.kv_cache_tokens)
        if isinstance(method := call.config.chosen_method, RSD):
            self._draft = draft_policy(method.draft, self._draft, self.policy, self.tokenizer)
            for index, prompt in enumerate(call.prompts):
                check_positions(index, len(prompt.ids), call.config, self._draft, "draft model")
        return call

    def _events(self, call: Call) -> Iterator[SegmentEvent]:
        with self._exclusive(call):
            pilots = None
            if call.config.target_reward is None and call.config.chosen_method.has_target:
                pilots = self._pilots(call, PILOT_SAMPLES)
                for pilot in pilots:
                    solve(pilot, call.config, _DEFAULT_ACCEPTANCE)
                self._warn_of_constant(pilots)
            call.requests = call.guided_requests(pilots)
            for request in self._run(call, call.requests, call.config):
                if request.error is not None and call.arguments.on_error == "raise":
                    raise RuntimeError(f"prompts[{request.prompt_index}]: {request.error}")
                yield from new_events(request, self.tokenizer)
            if all(request.error is not None for request in call.requests):
                warn(
                    f"no request succeeded; the first ended with: {call.requests[0].error} (output.errors has them "
                    "all; on_error='raise' raises the first)"
                )

    def _warn_of_constant(self, pilots: Sequence[Pilot]) -> None:
        solved = [pilot for pilot in pilots if pilot.error is None]
        if solved and not any(pilot.varies for pilot in solved):
            ids = isinstance(self.reward, CallableReward) and self.reward.tokenizer is None
            warn(
                "the reward is the same for all pilot responses: nothing is guided while it does not vary"
                + (" (it was called with token ids: give tokenizer= for text)" if ids else "")
            )

    @contextmanager
    def _exclusive(self, call: Call) -> Iterator[None]:
        """One call at a time: the trees belong to it. Keeps its time and token balance."""
        if self._busy:
            raise RuntimeError("this engine is already generating: exhaust or close the earlier stream first")
        self._busy = True
        started = time.perf_counter()
        try:
            yield
        finally:
            self._busy = False
            call.stats.discarded_tokens = call.stats.policy_tokens - call.stats.committed_tokens
            call.stats.seconds = time.perf_counter() - started

    def _pilots(self, call: Call, samples: int) -> list[Pilot]:
        started = time.perf_counter()
        requests = call.pilot_requests(samples)
        for _ in self._run(call, requests, pilot_config(call.config, samples)):
            pass
        # Pilot responses are thrown away, so what they committed counts as discarded.
        call.stats.committed_tokens = 0
        call.stats.calibration_tokens = call.stats.policy_tokens
        call.stats.calibration_seconds = time.perf_counter() - started
        return [read_pilot(requests[i : i + samples], call.config) for i in range(0, len(requests), samples)]

    def _run(self, call: Call, requests: Sequence[Request], config: StarsConfig) -> Iterator[Request]:
        """Run requests to their end; those that failed before they started come first."""
        yield from (request for request in requests if request.error is not None)
        live = [request for request in requests if request.error is None]
        if not live:
            return
        method = config.chosen_method
        width = method.width if isinstance(method, Population) else config.max_attempts
        rows = min(self.max_rows, len(live) * width)
        longest = max(most_slots(request.prompt.ids, request.prompt.personas, config) for request in live)
        whole = method.needs_hidden_state or self.reward.needs_hidden_state
        draft = self._draft if isinstance(method, RSD) else None
        trees = [self.policy, *self.reward.tree_models, *([] if draft is None else [draft])]
        divide_devices(trees, rows, self.gpu_memory_utilization)
        # `longest` counts all answers of a population, else one.
        holders = min(len(live), -(-rows // width)) if isinstance(method, Population) else rows
        tokens = self.kv_cache_tokens or default_tokens(self.policy, holders, longest)
        prompts = list(dict.fromkeys(request.prompt.reward_prompt for request in live))
        with ExitStack() as stack:
            for policy in [self.policy] if draft is None else [self.policy, draft]:
                policy.begin(tokens, longest, candidate_slots(config))
                stack.enter_context(plugged(policy.model))
            stack.callback(self.reward.end)
            self.reward.begin(prompts, config.max_new_tokens, rows, self.kv_cache_tokens)
            self.reward.open(prompts, config.max_new_tokens)
            ratio = PRIOR_RATIO if self.policy.device.type == "cpu" else PRIOR_RATIO_OF_GPUS
            cost = self.costs.setdefault(method.name, HeartbeatCost(ratio))
            scheduler = Scheduler(config, self.max_rows, tokens, whole, cost, self.policy.graphs.enabled)
            if self.policy.sharded:  # every process must plan alike, and each has a clock of its own
                scheduler.cost, scheduler.learns = HeartbeatCost(ratio), False
            loop = generation(
                config,
                draft,
                *(self.policy, self.reward, live, config, call.sampling, scheduler, self.tokenizer, call.stats),
            )
            loop.on_heartbeat = self.on_heartbeat
            try:
                yield from loop.run()
            except BaseException:  # the caller's, or a stream closed early: requests still hold their branches
                for trunks in loop.trees:
                    trunks.policy.clear()
                raise
            finally:
                call.stats.reward_tokens += self.reward.tokens

    def _output(self, call: Call) -> StarsOutput:
        requests = call.requests
        rows = [request.prompt.ids + request.tokens for request in requests]
        width = max(len(row) for row in rows)
        pad = pad_token_id(self.policy.model, self.tokenizer, call.sampling.eos_token_ids)
        decode = None if self.tokenizer is None else self.tokenizer.decode
        return StarsOutput(
            sequences=torch.tensor([row + [pad] * (width - len(row)) for row in rows], device="cpu"),
            completions=[list(request.tokens) for request in requests],
            texts=None if decode is None else [decode(r.tokens, skip_special_tokens=True) for r in requests],
            rewards=[request.reward for request in requests],
            finish_reasons=[request.finish_reason or "error" for request in requests],
            errors=[request.error for request in requests],
            logprobs=[request.logprobs for request in requests],
            sampling_logprobs=[request.sampling_logprobs for request in requests],
            segments=[request.segments for request in requests],
            stats=call.stats.to_dict(),
        )


def pad_token_id(model: PreTrainedModel, tokenizer: Any, eos_token_ids: Sequence[int]) -> int:
    """What pads sequences: the tokenizer's or model's pad id, else an EOS, else 0."""
    generation_config = getattr(model, "generation_config", None)
    for pad in (getattr(tokenizer, "pad_token_id", None), getattr(generation_config, "pad_token_id", None)):
        if pad is not None:
            return int(pad)
    return eos_token_ids[0] if eos_token_ids else 0
