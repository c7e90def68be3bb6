"""A call under way: its pilots, its requests, its events, and what came of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from stars_fast.inputs.call import Call
from stars_fast.loop.caller import Size
from stars_fast.loop.pilot import Pilot, read_pilot, solve
from stars_fast.loop.request import Request
from stars_fast.loop.stream import Progress, new_events
from stars_fast.notices import log
from stars_fast.outputs import Cause, SegmentEvent, as_cause


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
    failed : dict of int to Cause
        What went wrong, by row of the output. The first has its exception; of the others the log has one of a kind.
    begun : bool
        Whether the core has asked for its requests; an error before that is about what was asked.
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
        self._bar = Progress(call.terms.method)
        self.events: deque[SegmentEvent] = deque()
        self.requests: list[Request | None] = [None] * call.rows
        self.pilots: list[Pilot | None] = [None] * len(call.prompts)
        self._drawn: dict[int, list[Request]] = {}  # pilots that are under way, by prompt
        self.error: BaseException | None = None
        self.begun = False
        self.aborted = False  # the caller has asked for its end
        self.over = False
        self.failed: dict[int, Cause] = {}
        self._logged: set[type] = set()
        self._started = time.perf_counter()

    def show_on(self, bar: Progress) -> None:
        """Tell a bar of the targets that are found, before the job begins."""
        self._bar = bar
        bar.expect(len(self.call.prompts) if self.call.calibrates else 0)

    @property
    def has_news(self) -> bool:
        return self.over or bool(self.events)

    @property
    def stats(self) -> Any:
        return self.call.terms.stats

    def start(self) -> Sequence[Request]:
        self.begun = True
        if self.aborted or self.over:  # by another thread, on its way here
            return []
        prompts = range(len(self.call.prompts))
        if self.call.calibrates or not self.guided:
            self._drawn = {i: self.call.pilot_requests(i) for i in prompts}
            return [request for pilot in self._drawn.values() for request in pilot]
        return [request for i in prompts for request in self._guided(i, None)]

    def moved(self, request: Request) -> Sequence[Request]:
        if not request.terms.pilot:
            self._tell(request)
            return []
        i = request.prompt_index
        if i not in self._drawn or any(one.finish_reason is None for one in self._drawn[i]):
            return []  # several may end in one heartbeat
        try:
            pilot = read_pilot(self._drawn[i], self.call.config)
            pilot = solve(pilot, self.call.config, self.call.config.acceptance) if self.guided else pilot
        except Exception as error:
            pilot = Pilot(error=Cause.of(error, "calibration: "))
        self.pilots[i] = pilot
        further = self._guided(i, pilot) if self.guided else []
        for one in further:  # in its pilots' place: a prompt whose target is known has its answers before others begin
            one.id = self._drawn[i][0].id
        self._bar.calibrated(sum(len(one.tokens) for one in self._drawn.pop(i)))
        if not self._drawn:
            self.stats.calibration_seconds = time.perf_counter() - self._started
        return further

    def _guided(self, prompt: int, pilot: Pilot | None) -> list[Request]:
        requests = self.call.guided_requests(prompt, pilot)
        for request in requests:
            self.requests[request.index] = request
            if request.finish_reason is not None:
                self._tell(request)
        return [request for request in requests if request.finish_reason is None]

    def _tell(self, request: Request) -> None:
        """Events of a request that has moved or ended."""
        self.events += new_events(request, self.tokenizer)
        if request.error is not None and request.finish_reason != "abort":
            self.note(request)
        self.notify()

    def note(self, request: Request) -> None:
        """A request has come to an error: what is known of it goes into the log, and is kept of the first."""
        if request.index in self.failed:  # whoever is interrupted is told again
            return
        cause = as_cause(request.error or "")
        error = cause.exception
        if error is not None and type(error) not in self._logged:
            self._logged.add(type(error))
            log(f"prompts[{request.prompt_index}]: {cause}", error)
        # An exception holds its frames, and they what they worked on.
        request.error = self.failed[request.index] = cause.without_frames() if self.failed else cause

    @property
    def first_failure(self) -> Cause:
        """What went wrong first."""
        return next(iter(self.failed.values()))

    def break_off(self, cause: Cause) -> None:
        """The only answer's reader has failed: what there is of it stands, with this error."""
        (request,) = self.requests
        if request is None:
            return
        if request.finish_reason is None or request.finish_reason == "abort":
            request.finish_reason, request.reward = "error", float("nan")
        request.error = cause
        self.note(request)

    def fail(self, error: Exception, live: Sequence[Request]) -> None:
        if not self.guided or self.call.arguments.on_error == "raise":
            return self.end(error)
        cause, left = Cause.of(error, "what all requests share failed: "), deque(live)
        try:
            while left:
                request = left.popleft()
                if request.finish_reason is None:
                    request.error, request.finish_reason, request.reward = cause, "error", float("nan")
                left += self.moved(request)
        except Exception as another:
            return self.end(another)
        self.end(None)

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
