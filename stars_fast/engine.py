"""The engine: turns prompts into requests, runs them, and gathers what came of them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from stars_fast.config import StarsConfig
from stars_fast.inputs.arguments import Arguments, check_media, check_positions, warn_of_large_batches
from stars_fast.inputs.call import Call, prepare, settings
from stars_fast.inputs.job import Job
from stars_fast.inputs.models import load_policy, load_reward, second_policy
from stars_fast.inputs.outcome import Remarks, first_error, output_of
from stars_fast.inputs.per_prompt import PerPrompt
from stars_fast.locks import Lock
from stars_fast.loop.caller import MOST_POSITIONS, SEGMENT_LENGTH, Size
from stars_fast.loop.core import Core
from stars_fast.loop.pilot import PILOT_SAMPLES, Pilot
from stars_fast.loop.row_cost import Heartbeat
from stars_fast.loop.stream import Streaming, progress_bar
from stars_fast.loop.team import release_team
from stars_fast.loop.warm_up import Kind, WarmUp
from stars_fast.methods.numbers import MOST, integer, real, shown, truth
from stars_fast.outputs import Cause, SegmentEvent, StarsOutput, as_cause
from stars_fast.policy.encoder_decoder import policy_of
from stars_fast.policy.policy import Policy
from stars_fast.rewards import Reward
from stars_fast.stays import Stays
from stars_fast.text.media import identity, written_before

_DEFAULT_ROWS = {"cpu": 64, "cuda": 256}
_MOST_ROWS = 2**20


class StarsEngine(Stays):
    """Reward-guided generation with one tree of keys and values per model.

    Calls and streams may be under way in several threads: they share heartbeats, and each has the text it has alone.

    Parameters
    ----------
    policy : transformers causal LM or encoder-decoder, path or hub id
        Used as it is: dtype, device, LoRA and quantisation are the caller's. Plugged in only while generating.
    reward : transformers sequence classifier with one label, stars_fast.rewards.Reward, callable, path or hub id
        A callable has TRL's signature ``(prompts, completions, completion_ids=..., **columns) -> list[float | None]``,
        sync or async.
    tokenizer : transformers tokenizer, optional
        The policy's; the processor's, or loaded beside a policy given by name. Needed for text, chats and stop strings.
    processor : transformers processor, path or hub id, optional
        What makes the policy's inputs of chats with pictures. What it returns is a prompt, with and without it.
    reward_tokenizer : transformers tokenizer or processor, path, hub id or "policy", optional
        The reward model's; "policy" where it reads the policy's ids. Default: the one that lies where the reward model
        was loaded from, and beside one by name that sees pictures the processor. Where none does, a reward model that
        may have been trained on another's ids is refused, or warned of where nothing can be known.
    reward_tail : "auto", "template", "none" or sequence of int
        What follows the answer whenever it is scored; see :class:`stars_fast.rewards.ClassifierReward`.
    reward_chat_template_kwargs : mapping, optional
        Variables for the reward model's chat template. What is left open is as in the call. Scorers of
        ``stars_fast.rewards`` take theirs when they are made.
    device : str or torch.device, optional
        Where models given by name are loaded. Default: a CUDA or ROCm device if torch names one, else the CPU. Objects
        stay where they are.
    max_rows : int, optional
        Most candidates side by side, from 1 to 16,384: each has logits of its own (10 GB then, of 150,000 ids). Default
        64 on a CPU, 256 on a GPU.
    kv_cache_tokens : int, optional
        Slots of each tree, from 1 to 2**31 - 1 (their numbers have 32 bits). Default: what the call wants, bounded by
        free memory. Where requests outgrow them, some wait or are encoded again; no text changes.
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
    tokenizer, processor
        The policy's, or None.
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
        processor: Any = None,
        reward_tokenizer: Any = None,
        reward_tail: str | Sequence[int] = "auto",
        reward_chat_template_kwargs: Mapping[str, Any] | None = None,
        max_rows: int | None = None,
        kv_cache_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        cuda_graphs: bool = True,
        torch_compile: bool = True,
        device: str | torch.device | None = None,
    ) -> None:
        max_rows = None if max_rows is None else integer("max_rows", max_rows, 1, _MOST_ROWS)
        self.kv_cache_tokens = None if kv_cache_tokens is None else integer("kv_cache_tokens", kv_cache_tokens, 1, MOST)
        utilization = real("gpu_memory_utilization", gpu_memory_utilization, 0.0, 1.0, open_below=True)
        cuda_graphs, torch_compile = truth("cuda_graphs", cuda_graphs), truth("torch_compile", torch_compile)
        if device is not None and not any(isinstance(one, (str, os.PathLike)) for one in (policy, reward)):
            raise ValueError(f"device={device!r}: policy and reward are objects, which stay where they are")
        model, self.tokenizer, self.processor = load_policy(policy, tokenizer, device, processor=processor)
        self.policy = policy_of(model, cuda_graphs, torch_compile)
        self.reward: Reward = load_reward(
            reward, self.tokenizer, reward_tokenizer, reward_tail, model, device, reward_chat_template_kwargs
        )
        for tree in self.reward.tree_models:
            tree.accelerate(cuda_graphs, torch_compile)
        self.max_rows = max_rows or _DEFAULT_ROWS.get(self.policy.device.type, 64)
        self._drafts: Policy | None = None  # the last draft model, for calls that name it again
        self._guides: tuple[Policy, ...] = ()  # of the last guided call, likewise
        self._beside = WeakSet[Policy]()  # these, and those of calls that are open
        self.per_prompt = PerPrompt()
        self._preparing = Lock()
        self._remarks = Remarks()
        limits = (self.max_rows, self.kv_cache_tokens, utilization)
        self.core = Core(self.policy, self.reward, self.tokenizer, *limits)

    @property
    def on_heartbeat(self) -> Callable[[Heartbeat], None] | None:
        return self.core.on_heartbeat

    @on_heartbeat.setter
    def on_heartbeat(self, observer: Callable[[Heartbeat], None] | None) -> None:
        if observer is not None and not callable(observer):
            raise TypeError(f"on_heartbeat={shown(observer)} must be callable, or None")
        self.core.on_heartbeat = observer

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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        streamer: Any = None,
        progress: bool = False,
        trace: bool = False,
        **overrides: Any,
    ) -> StarsOutput:
        """Generate responses that the reward model likes.

        Parameters
        ----------
        prompts : str, list of str, list of chat message lists, list of id lists, id tensor ``[batch, length]``, what a
            tokenizer or the policy's processor returns, or a list of such, one prompt each
            A chat that ends with an assistant's turn is gone on with. Text that has its BOS already gets no other.
            Chats may have pictures, ``{"type": "image", "image": ...}``, where there is a processor.
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
            Whether a request that fails ends with finish reason "error", or raises. Where what all requests share fails
            (a forward pass), those that have ended are returned whole, and the others end with that error.
        chat_template_kwargs : mapping, optional
            Variables for chat templates, such as ``{"enable_thinking": False}``: for the policy's, and for the reward
            model's where the scorer has no value of its own for them.
        streamer : transformers streamer, optional
            Gets the prompt and then each committed segment, and is ended, also where the call is refused. One prompt
            and one sample only.
        progress : bool
            Show a bar: targets found, where they are calibrated; tokens/s, and the share of candidates that is
            accepted, or how many a segment takes.
        trace : bool
            Whether ``SegmentTrace.candidates`` holds what was drawn for a segment, and what became of it: nothing else
            changes, so that candidates which nobody had to look at may have no reward. See docs/trace.md.
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
            With ``on_error="raise"``, the first request's error; its ``__cause__`` is what was raised.
        """
        arguments = Arguments(
            prompts,
            config,
            overrides,
            attention_mask,
            reward_prompts,
            columns,
            seed,
            on_error,
            chat_template_kwargs,
            trace=truth("trace", trace),
        )
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        trace: bool = False,
        **overrides: Any,
    ) -> Iterator[SegmentEvent]:
        """Like :meth:`generate`, yielding a :class:`SegmentEvent` whenever a request commits a segment."""
        arguments = Arguments(
            prompts,
            config,
            overrides,
            attention_mask,
            reward_prompts,
            columns,
            seed,
            on_error,
            chat_template_kwargs,
            trace=truth("trace", trace),
        )
        return self.events(Job(self.prepare(arguments), self.tokenizer))

    def warm_up(
        self,
        config: StarsConfig | None = None,
        *,
        requests: int | None = None,
        max_model_len: int | None = None,
        progress: bool = False,
    ) -> WarmUp:
        """Compile and capture on a GPU, before the first call, what calls come to; without it the first ones do.

        Neither a prompt nor the reward is asked for: passes over padding are captured, in the sizes that small passes
        are padded to, and decode steps of the numbers of rows that ``config`` leads to. What a call meets beside them
        is captured then. Pools are made as an :class:`AsyncStarsEngine` makes them, or are those that one holds open:
        its lengths hold then. A call that needs more, in whatever respect, captures anew.

        Attention splits a trunk by the room that it has, not by its length. So numbers round otherwise with another
        `max_model_len` than without, and where two candidates or tokens are all but equal a text may be another.

        Parameters
        ----------
        config : StarsConfig, optional
            Of the calls to come: its candidates, attempts, segments, EOS ids, and whether repetition is penalised.
        requests : int, optional
            Most of them side by side. Default: ``max_rows``.
        max_model_len : int, optional
            Most tokens of a prompt with its answer. Default: the policy's positions, at most 8,192.
        progress : bool
            Show a bar, on stderr.

        Returns
        -------
        WarmUp
            (graphs, seconds, remark): how many were captured, and why none or not all. On a CPU, and where graphs are
            off, nothing is done, and the remark says so.

        Raises
        ------
        TypeError, ValueError
            For arguments that are not what they should be.
        RuntimeError
            If the engine is closed.
        """
        most = self.max_rows if requests is None else integer("requests", requests, 1)
        longest = MOST_POSITIONS if max_model_len is None else integer("max_model_len", max_model_len, 2, MOST)
        show, models = truth("progress", progress), (self.policy, *self.reward.tree_models)
        _, ruled, sampling = settings(Arguments([], config), self.policy, self.reward, self.tokenizer)
        if not any(model.graphs.enabled for model in models):
            where = "graphs are off" if self.policy.device.type == "cuda" else f"the policy is on {self.policy.device}"
            return WarmUp(0, 0.0, f"nothing was captured: {where}")
        kind = Kind(ruled, sampling, most, ruled.chosen_method.segments().entropy < math.inf)
        length = max(ruled.segment_length, SEGMENT_LENGTH)
        size = Size.of_session(self.max_rows, min(longest, self.policy.longest or longest), length)
        started = time.perf_counter()
        graphs, lack = self.core.warm_up(size, kind, show)
        remark = f"memory is short, so that not all was captured: {lack}" if lack else ""
        return WarmUp(graphs, time.perf_counter() - started, remark)

    def release_memory(self) -> None:
        """Give back the memory of all pools of keys and values, and of graphs, which point into them.

        Between calls both are kept, so that the next call finds them. Release them where something else needs the
        memory in between, as a training step does; the next call makes pools that fit what is free then, and captures
        anew. What layers were compiled to stays, and no text changes.

        Raises
        ------
        RuntimeError
            While calls, streams or sessions are under way, of this engine or of another with the same models.
        """
        self.core.free(list(self._beside))

    def events(self, job: Job) -> Iterator[SegmentEvent]:
        """Run a job to its end, and warn of what failed."""
        yield from self._events(job)
        self.warn_of(job)

    def run(
        self, arguments: Arguments, streamer: Any = None, progress: bool = False, name: str = "responses"
    ) -> StarsOutput:
        """:meth:`generate`, with its arguments in one piece; ``name`` is the bar's."""
        job = self.finished(arguments, streamer, progress, name)
        output = self.output(job)
        self.warn_of(job)
        if job.failed and arguments.on_error == "raise":
            raise first_error(job)
        return output

    def finished(
        self, arguments: Arguments, streamer: Any = None, progress: bool = False, name: str = "responses"
    ) -> Job:
        """A job that is over. Nobody has been warned of what failed, nor have texts been decoded: :meth:`output`."""
        with Streaming.of(streamer) as streaming:
            progress = truth("progress", progress)
            job = Job(self.prepare(arguments), None)  # nobody reads the events' text
            if streaming.wanted and job.call.rows > 1:
                raise ValueError(f"streamer: takes one response, not {job.call.rows}; use StarsEngine.stream")
            if streaming.wanted and job.call.rows:
                streaming.put(torch.tensor([written_before(job.call.prompts[0])], device="cpu"))
            bar = progress_bar(progress, job.call.rows, job.call.terms.method, name)
            with closing(self._events(job)) as events, bar as shown_on:
                job.show_on(shown_on)
                for event in events:
                    shown_on.advance(event)
                    if streaming.wanted and event.segment is not None:
                        try:
                            streaming.put(torch.tensor(event.segment.tokens, device="cpu"))
                        except Exception as error:
                            events.close()
                            while not job.over:  # another thread may be taking a step
                                job.events.clear()
                                self.core.wait(job)
                            job.break_off(Cause.of(error, "the streamer raised "))
        return job

    def run_pilots(self, arguments: Arguments, samples: int) -> tuple[StarsConfig, list[Pilot]]:
        """Unguided responses with their partial rewards, per prompt; see :func:`stars_fast.calibrate`."""
        call = self.prepare(arguments, samples)
        if not call.terms.method.has_target:
            raise ValueError(f"method={call.terms.method.name!r} has no target reward to calibrate")
        job = Job(call, self.tokenizer, guided=False)
        for _ in self._events(job):
            pass
        pilots = [pilot for pilot in job.pilots if pilot is not None]
        for index, pilot in enumerate(pilots):
            if pilot.error is not None:
                pilot.error = as_cause(pilot.error).after(f"prompts[{index}]: ")
        return call.config, pilots

    def prepare(self, arguments: Arguments, samples: int = PILOT_SAMPLES) -> Call:
        """Check a call's arguments and read its prompts; nothing runs yet. Raises what :meth:`generate` raises then."""
        with self._preparing.held():  # tokenizers keep a state
            for tree in (self.policy, *self.reward.tree_models):
                tree.check_unchanged()

            def beside(named: Any, role: str) -> Policy:
                found = second_policy(named, self._beside, self.policy, self.tokenizer, role)
                self._beside.add(found)
                return found

            def guide(named: Any, name: str) -> Policy:
                return self.policy if named is None or named is self.policy.model else beside(named, name)

            models = (self.policy, self.reward, self.tokenizer)
            call = prepare(arguments, *models, self.kv_cache_tokens, samples, self.processor, guide)
            self._guides = call.terms.guides or self._guides
            warn_of_large_batches(call.prompts, call.config.num_return_sequences, self.max_rows)
            if isinstance(targets := call.config.target_reward, tuple):
                self.per_prompt.used(targets, map(identity, call.prompts))
            if (named := call.terms.method.draft_model) is not None:
                draft = self._drafts = beside(named, "draft")
                for index, prompt in enumerate(call.prompts):
                    check_positions(index, len(prompt.ids), call.config, draft, "the draft model")
                    check_media(index, prompt.media, draft, "the draft model")
                call.terms = replace(call.terms, draft=draft)
                call.size = call.size._replace(beside=[draft])
        return call

    def _events(self, job: Job) -> Generator[SegmentEvent, None, None]:
        """Run a job to its end; what is under way of it is ended where nobody reads on."""
        if not job.call.rows:
            job.end(None)
            return
        raises = job.call.arguments.on_error == "raise"
        try:
            self.core.submit(job)
            while not (job.over and not job.events):
                self.core.wait(job)
                while job.events:
                    event = job.events.popleft()
                    if event.error is not None and raises:
                        raise first_error(job)
                    yield event
        finally:
            if not job.over:
                self.core.abort(job)
            if self.core.open_calls:  # another thread takes the steps from here on
                release_team()
        if job.error is not None:
            raise job.error

    def warn_of(self, job: Job, where: str = "output.errors has them all") -> None:
        """Of what a caller should know once a job is over; ``where`` says where its errors are found."""
        self._remarks.on(job, self.reward.reads_text and self.tokenizer is None, where)

    def output(self, job: Job, texts: bool = True) -> StarsOutput:
        """What came of a job that is over, with or without its texts."""
        return output_of(job, self.policy.model, self.tokenizer, texts)

    def close(self) -> None:
        """End what is under way, and free all slots; the engine cannot be used any more."""
        self.core.close()
