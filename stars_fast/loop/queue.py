"""Who runs and who waits: admission, and who gives way where the running requests have outgrown the slots."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TypeVar

from stars_fast.loop.memory import TooLarge
from stars_fast.loop.request import PromptNode, Request, Strategy, Tree, Trunk
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.trunks import Trunks
from stars_fast.notices import warn
from stars_fast.outputs import Cause
from stars_fast.rewards.base import Reward, RewardPrompt
from stars_fast.tree.lack import is_lack_of_memory

T = TypeVar("T")

_order = attrgetter("order")


class Queue:
    """The requests of a core. Whoever gives its slots back resumes from its committed tokens: no text changes.

    Parameters
    ----------
    trunks : Trunks
        Of the policy's tree.
    reward : Reward
        Begun by the caller.
    scheduler : Scheduler
    tokenizer : transformers tokenizer, optional
        The policy's.
    """

    def __init__(self, trunks: Trunks, reward: Reward, scheduler: Scheduler, tokenizer: object) -> None:
        self.trunks, self.reward, self.scheduler, self.tokenizer = trunks, reward, scheduler, tokenizer
        self.strategies: list[Strategy] = []  # of those that are here
        self.waiting: list[Request] = []  # in order
        self.running: list[Request] = []
        self.encoding: list[Request] = []  # admitted after these; not all of their text is in the tree yet
        self.encoded = 0  # tokens of them in this heartbeat
        self.committed = 0  # tokens, so far
        self.broken: dict[
            Request, Cause
        ] = {}  # whose scorer has raised where it should have kept or let go of something

    def submit(self, requests: Sequence[Request]) -> None:
        """They wait for rows and slots; their ``strategy`` is set."""
        for request in requests:
            insort(self.waiting, request, key=_order)

    @property
    def admitted(self) -> list[Request]:
        """All that hold slots, in order."""
        return sorted(self.running + self.encoding, key=_order)

    def admit(self) -> None:
        """Give waiting requests the rows and slots that are free; who does not fit even alone fails.

        Their texts are encoded first (:meth:`join`).
        """
        count = self.scheduler.admit(self.waiting, self.admitted)
        while not count and self.waiting and not self.admitted:
            request = self.waiting.pop(0)
            slots = self.scheduler.kv_cache_tokens
            self.fail(request, f"it does not fit into kv_cache_tokens={slots} slots, even alone")
            count = self.scheduler.admit(self.waiting, [])
        self.encoding += self.waiting[:count]
        del self.waiting[:count]
        self.keep_prompts()

    def keep_prompts(self) -> None:
        """Release the prompts of requests that hold no slots."""
        admitted = self.admitted
        kept: dict[Tree, list[PromptNode]] = {tree: [] for tree in self._trees()}
        for request in admitted:
            kept[self.trunks] += request.strategy.prompts(request)
            for tree, prompt in request.strategy.beside(request):
                kept[tree].append(prompt)
        for tree, prompts in kept.items():
            tree.keep_prompts(prompts)

    def _clear_trees(self) -> None:
        for tree in self._trees():
            tree.clear()

    def _trees(self) -> list[Tree]:
        """The policy's, and those that strategies have besides, which several may share."""
        return list(dict.fromkeys([self.trunks, *(tree for strategy in self.strategies for tree in strategy.trees)]))

    def join(self) -> list[Request]:
        """Encode of the admitted requests what a heartbeat has room for. Those that are ready run from now on.

        The policy reads their texts and, where answers are scored before they end, the reward model their prompts: as
        many tokens each; whose prompt it cannot read fails. Returns who runs now.
        """
        self.encoded = 0
        if not self.encoding:
            return []
        before = self.reward.tokens
        longest = max((request.room for request in self.running), default=1)
        most = self.scheduler.encoding_tokens(len(self.running), len(self.encoding), longest)
        wanted = due(self.encoding)
        for tree, trunks in wanted.items():
            self.encoded += tree.encode(trunks, most - self.encoded) if self.encoded < most else 0
        self.fail_unreadable(wanted)
        joined = [r for r in self.encoding if all(tree.ready(trunk) for tree, trunk in r.strategy.due(r))]
        soon = dict.fromkeys(r.response.prompt for r in joined if r.terms.method.scores_unfinished)
        behind, errors = self._read_ahead(list(soon), most) if soon else (set[RewardPrompt](), {})
        self.encoded += self.reward.tokens - before
        failed = [request for request in joined if request.response.prompt in errors]
        joined = [r for r in joined if r.response.prompt not in behind and r not in failed]
        self.encoding = [request for request in self.encoding if request not in joined and request not in failed]
        for request in failed:
            self.fail(request, errors[request.response.prompt])
        self.running += joined
        return joined

    def fail_unreadable(self, wanted: Mapping[Tree, Sequence[Trunk]]) -> None:
        """Requests end whose prompt, among those of these trunks, the model has refused to read."""
        if all(trunk.prompt.error is None for trunks in wanted.values() for trunk in trunks):
            return
        for request in self.admitted:
            errors = [trunk.prompt.error for _, trunk in request.strategy.due(request)]
            if (error := next(filter(None, errors), None)) is not None:
                self.leave({request})
                self.fail(request, error)

    def _read_ahead(
        self, prompts: Sequence[RewardPrompt], most: int
    ) -> tuple[set[RewardPrompt], dict[RewardPrompt, str]]:
        """Prompts that the reward model has not read to their end, and what it raised about others.

        Where it raises, each prompt is asked for alone, so that one costs no other.
        """
        try:
            return set(self.reward.read_ahead(prompts, most)), {}
        except Exception as error:
            self.reward.unsure = True
            if is_lack_of_memory(error):  # scoring makes room for itself
                return set(), {}
            if len(prompts) == 1:
                return set(), {prompts[0]: Cause.of(error, "the reward raised ")}
            behind, errors = set[RewardPrompt](), dict[RewardPrompt, str]()
            for prompt in prompts:
                late, wrong = self._read_ahead([prompt], most)
                behind |= late
                errors |= wrong
            if not errors:
                kind = type(error).__name__
                warn(f"the reward raised {kind} for {len(prompts)} prompts at once but not for each alone: {error}")
            return behind, errors

    def make_room(self) -> None:
        """Where running requests have outgrown the slots, the last in order give way: first waiting best candidates."""
        admitted = self.admitted
        lacking = -self.scheduler.spare(admitted)
        for request in reversed(admitted):
            if lacking <= 0:
                return
            lacking -= request.strategy.give_back(request) * request.terms.copies
        while len(admitted) > 1 and self.scheduler.spare(admitted) < 0:
            self.preempt(admitted.pop())

    def preempt(self, request: Request) -> None:
        """Give all the request's slots back. It waits in its place, and resumes from its committed tokens."""
        request.strategy.preempt(request)
        self._wait_again(request)
        request.terms.stats.preemptions += 1

    def _wait_again(self, request: Request) -> None:
        (self.running if request in self.running else self.encoding).remove(request)
        insort(self.waiting, request, key=_order)

    def retreat(self, large: TooLarge) -> None:
        """After a pass that did not fit: from empty trees, with half of it; one that does not fit alone fails."""
        admitted = self.admitted
        for request in admitted[::-1]:
            self.preempt(request)
        self._clear_trees()  # the failed pass may have left branches
        scheduler = self.scheduler
        if scheduler.shrink(large.tokens, large.rows):
            return
        if len(admitted) > 1 and scheduler.shrink(0, scheduler.max_rows):  # until it is known whose pass it was
            return
        request = admitted[0]  # who waits, for more slots than were free, may come before it
        self.waiting.remove(request)
        self.fail(request, f"too little memory for this request alone, a token at a time: {large.cause}")

    def start_over(self, requests: Iterable[Request]) -> None:
        """After a heartbeat that broke off, wherever that was: these wait again, and nothing is left in any tree."""
        self.waiting, self.running, self.encoding = sorted(requests, key=_order), [], []
        for request in self.waiting:
            request.strategy.drop(request)
        self._clear_trees()
        self.drop_finished()

    def drop_finished(self) -> None:
        """Requests that have ended run no longer. Those that are broken end; who has ended before keeps its answer."""
        while self.broken:
            request, cause = self.broken.popitem()
            if request.finish_reason is None:
                self.leave({request})
                self.fail(request, cause)
            elif request.error is None:
                request.error = cause
        self.running = [request for request in self.running if request.finish_reason is None]

    def withdraw(self, requests: Iterable[Request]) -> None:
        """Abort requests, wherever they are, with what they have committed; all they hold is free."""
        leaving = {request for request in requests if request.finish_reason is None}
        self.leave(leaving)
        for request in leaving:  # out before they end: an interrupt finds none half ended among those that run
            self.fail(request, "abort", "abort")
        self.drop_finished()
        self.keep_prompts()

    def leave(self, leaving: Container[Request]) -> None:
        """They are neither waiting nor running."""
        self.waiting, self.running, self.encoding = (
            [request for request in group if request not in leaving]
            for group in (self.waiting, self.running, self.encoding)
        )

    def tell(self, answer: Request, hook: Callable[[T], None], told: T) -> None:
        """Call the reward's ``commit``, ``discard`` or ``close``: what that raises ends this request, and no other."""
        try:
            hook(told)
        except Exception as error:
            self.reward.unsure = True
            name = getattr(hook, "__name__", "hook")
            self.broken.setdefault(answer.owner or answer, Cause.of(error, f"the reward's {name} raised "))

    def fail(self, request: Request, cause: str, reason: str = "error") -> None:
        """End a request with an error; what it has committed is kept."""
        request.error, request.reward = cause, float("nan")
        self.finish(request, reason)

    def finish(self, request: Request, reason: str) -> None:
        """End a request, and free what it holds."""
        self.scheduler.retire(request)
        request.finish_reason = reason
        request.strategy.close(request)


def due(requests: Sequence[Request]) -> dict[Tree, list[Trunk]]:
    """What has to be in which tree before these requests draw."""
    wanted: dict[Tree, list[Trunk]] = {}
    for request in requests:
        for tree, trunk in request.strategy.due(request):
            wanted.setdefault(tree, []).append(trunk)
    return wanted
