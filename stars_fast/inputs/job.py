"""A call under way: its pilots, its requests, its events, and what came of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from stars_fast.inputs.call import Call
from stars_fast.loop.caller import Size
from stars_fast.loop.pilot import ACCEPTANCE, Pilot, read_pilot, solve
from stars_fast.loop.request import Request
from stars_fast.loop.stream import new_events
from stars_fast.outputs import SegmentEvent


class Job:
    """What one caller of the core asked for. Targets of a prompt are solved for, and its requests enter, as soon as its
    own pilots have ended.

    Parameters
    ----------
    call : Call
    tokenizer : transformers tokenizer, optional
        The policy's, for the events' text.
    guided : bool
        Whether anything follows the pilots.
    deadline : float, optional
        Of time.monotonic().
    notify : callable, optional
        Called, on the thread that took the step, whenever there are news.

    Attributes
    ----------
    events : deque of SegmentEvent
        Not taken yet.
    requests : list of Request or None
        By row of the output; None where its pilots have not ended.
    pilots : list of Pilot or None
        By prompt.
    error : BaseException or None
        What ended the job as a whole.
    over : bool
        Whether nothing more will come.
    """

    def __init__(
        self,
        call: Call,
        tokenizer: Any,
        *,
        guided: bool = True,
        deadline: float | None = None,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self.call, self.tokenizer, self.guided = call, tokenizer, guided
        self.size: Size = call.size
        self.deadline, self.notify = deadline, notify
        self.events: deque[SegmentEvent] = deque()
        self.requests: list[Request | None] = [None] * call.rows
        self.pilots: list[Pilot | None] = [None] * len(call.prompts)
        self._drawn: dict[int, list[Request]] = {}  # pilots that are under way, by prompt
        self.error: BaseException | None = None
        self.aborted = False  # the caller has asked for its end
        self.over = False
        self._started = time.perf_counter()

    @property
    def has_news(self) -> bool:
        return self.over or bool(self.events)

    @property
    def stats(self) -> Any:
        return self.call.terms.stats

    def start(self) -> Sequence[Request]:
        if self.aborted:
            return []
        prompts = range(len(self.call.prompts))
        if self.call.calibrates or not self.guided:
            self._drawn = {i: self.call.pilot_requests(i) for i in prompts}
            return [request for pilot in self._drawn.values() for request in pilot]
        return [request for i in prompts for request in self._guided(i, None)]

    def moved(self, request: Request) -> Sequence[Request]:
        if not request.terms.pilot:
            self.events += new_events(request, self.tokenizer)
            self.notify()
            return []
        i = request.prompt_index
        if i not in self._drawn or any(one.finish_reason is None for one in self._drawn[i]):
            return []  # several may end in one heartbeat
        pilot = self.pilots[i] = read_pilot(self._drawn[i], self.call.config)
        further = self._guided(i, solve(pilot, self.call.config, ACCEPTANCE)) if self.guided else []
        del self._drawn[i]
        if not self._drawn:
            self.stats.calibration_seconds = time.perf_counter() - self._started
        return further

    def _guided(self, prompt: int, pilot: Pilot | None) -> list[Request]:
        requests = self.call.guided_requests(prompt, pilot)
        for request in requests:
            self.requests[request.index] = request
            if request.finish_reason is not None:
                self.events += new_events(request, self.tokenizer)
                self.notify()
        return [request for request in requests if request.finish_reason is None]

    def end(self, error: BaseException | None) -> None:
        if self.over:
            return
        self.stats.seconds = time.perf_counter() - self._started
        if self.aborted:
            samples = self.call.config.num_return_sequences
            for row, request in enumerate(self.requests):
                if request is None or request.finish_reason == "abort":
                    self.events.append(SegmentEvent(row, *divmod(row, samples), None, None, "abort", "aborted"))
        self.error, self.over = error, True
        self.notify()
