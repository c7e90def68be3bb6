"""The core: one loop over both models that many callers share, each with its own requests."""

from __future__ import annotations

import copy
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stars_fast.loop.caller import Caller, Size
from stars_fast.loop.heartbeat import Loop
from stars_fast.loop.in_order import PASS, PASS_OF_GPUS
from stars_fast.loop.memory import InUse
from stars_fast.loop.request import Request
from stars_fast.loop.row_cost import PRIOR_RATIO, PRIOR_RATIO_OF_GPUS, Heartbeat, HeartbeatCost
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.session import Session
from stars_fast.loop.turn import Turn
from stars_fast.loop.warm_up import Kind, capture
from stars_fast.notices import log, warn
from stars_fast.outputs import Cause
from stars_fast.policy.policy import Policy
from stars_fast.rewards.base import Reward
from stars_fast.stays import Stays
from stars_fast.tree.attention import is_plugged
from stars_fast.tree.lack import is_lack_of_memory
from stars_fast.tree.memory import default_tokens, divide_devices

# Steps in a row that fail, and are taken again, with nothing committed between.
_RETAKEN = 2
# Mistakes in a program, ours most likely: devices fail otherwise, and what a scorer's hooks raise is told by itself.
_BUGS = (AssertionError, AttributeError, LookupError, NameError, TypeError)


class Core(Stays):
    """Who calls, and whose turn it is; what is open meanwhile, both models' trees and the loop, is a :class:`Session`.

    Requests join at the next heartbeat and leave when they end.

    It opens with the first caller and closes with the last, unless it is held open (:meth:`hold`): weights may change
    while it is closed, and nothing is kept then but the pools' memory. Pools are sized when it opens. A caller that
    needs larger ones waits until the others are through; a held core refuses it.

    Whoever waits for news takes the steps, one thread at a time, for all; nobody's text depends on who that is.

    Parameters
    ----------
    policy : Policy
    reward : Reward
    tokenizer : transformers tokenizer, optional
        The policy's.
    max_rows : int
    kv_cache_tokens : int, optional
    gpu_memory_utilization : float
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        tokenizer: Any,
        max_rows: int,
        kv_cache_tokens: int | None,
        gpu_memory_utilization: float,
    ) -> None:
        self.policy, self.reward, self.tokenizer = policy, reward, tokenizer
        self.max_rows, self.kv_cache_tokens = max_rows, kv_cache_tokens
        self.gpu_memory_utilization = gpu_memory_utilization
        self._ratio = PRIOR_RATIO if policy.device.type == "cpu" else PRIOR_RATIO_OF_GPUS
        self.cost = HeartbeatCost(self._ratio)  # what is learned on this machine serves the next caller
        self._acceptance = (0.0, 0)  # and this
        # From the next opening on, to compare with: scoring in order, and the next extension launched ahead.
        self.in_order, self.ahead = True, policy.device.type != "cpu"
        self._on_heartbeat: Callable[[Heartbeat], None] | None = None
        self.closed = False
        self._held: Size | None = None  # for a session, in pools of this size
        self._session: Session | None = None  # while it is open
        self._process = os.getpid()
        self._forget_callers()

    def _forget_callers(self) -> None:
        self._turns = Turn()
        self._callers: dict[Caller, set[Request]] = {}  # with what of theirs has not ended
        self._caller_of: dict[Request, Caller] = {}
        self._later: deque[Caller] = deque()  # wait for larger pools
        self._gone: deque[tuple[Caller, BaseException | None]] = deque()  # to be withdrawn by whoever has the turn

    # What callers do

    def submit(self, caller: Caller) -> None:
        """Let the caller's requests in, at the next heartbeat.

        Raises
        ------
        ValueError
            For prompts that the reward cannot score, and for what a held core has no room for.
        RuntimeError
            If the core is closed for good, or asked from within its own step.
        """
        with self._turn():
            if self.closed:
                raise RuntimeError("this engine is closed: make a new one")
            session = self._session or self._open(self._held or caller.size)
            if not self._later and session.fits(caller.size, self._held is not None):
                self._enter(caller)
            elif self._held:
                size, own, tokens = caller.size, session.size, session.loop.scheduler.kv_cache_tokens
                raise ValueError(
                    f"the request has up to {size.length} tokens with its answer, segments of {size.segment_length} "
                    f"and {size.slots} slots; this session takes max_model_len={own.length}, max_segment_length="
                    f"{own.segment_length} and {tokens} slots, and prompts that fit the reward model's"
                )
            else:
                self._later.append(caller)

    def abort(self, caller: Caller, error: BaseException | None = None) -> None:
        """End the caller's requests, and free what they hold: at once, or after the step that is being taken.

        Waits for nobody's turn: it may be called while the interpreter collects garbage.
        """
        self._gone.append((caller, error))
        if os.getpid() == self._process and self._turns.try_acquire():
            self._end_turn()

    def wait(self, caller: Caller) -> None:
        """Take steps, or let another thread take them, until the caller has news."""
        self._check_process()
        while not caller.has_news:
            with self._turn(short=False, unless=lambda: caller.has_news) as mine:
                if mine:
                    self._step()

    def step(self) -> bool:
        """One heartbeat for all. Returns whether there is more to do."""
        with self._turn(short=False):
            self._step()
            return bool(self._callers or self._later)

    def hold(self, size: Size) -> None:
        """Hold a session open, with pools of this size, until :meth:`let_go`.

        Raises
        ------
        RuntimeError
            While calls are under way, and if it is closed for good.
        """
        with self._turn():
            if self.closed:
                raise RuntimeError("this engine is closed: make a new one")
            if self._session is not None:
                raise RuntimeError("this engine is generating: let its calls and streams end before a session opens")
            self._open(size)
            self._held = size

    def warm_up(self, size: Size, kind: Kind, show: bool) -> tuple[int, str]:
        """Capture what calls of a kind come to, in the pools that are open, or else in pools of this size.

        Returns how many graphs there are more, and what torch said where memory was short of others.
        """
        with self._turn():
            if self.closed:
                raise RuntimeError("this engine is closed: make a new one")
            session = self._session or self._open(size)
            models = (self.policy, *self.reward.tree_models)
            before = sum(model.graphs.captured for model in models)
            short = capture(self.policy, self.reward.tree_models, kind, session.loop.scheduler, show)
            return sum(model.graphs.captured for model in models) - before, short

    def free(self, beside: Sequence[Policy]) -> None:
        """Give the memory of all trees back, and that of further policies', until it opens again.

        Raises
        ------
        InUse
            While it is open, and while another engine generates with one of the models.
        """
        with self._turn():
            trees = [self.policy, *self.reward.tree_models, *beside]
            in_use = [tree.role for tree in trees if is_plugged(tree.model)]
            if self._session is not None or in_use:
                who = "this engine" if self._session is not None else f"another engine with this {in_use[0]}"
                raise InUse(f"{who} is generating: let calls, streams and sessions end before memory is released")
            for tree in trees:
                tree.free()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what torch keeps serves neither graphs nor other processes

    def let_go(self) -> None:
        """End the session: the core closes once its callers are through."""
        with self._turn():
            self._held = None

    def close(self) -> None:
        """End everything, for good, and free all slots."""
        self.closed = True  # first: nobody comes in between
        with self._turn():
            self._held = None
            for caller in [*self._callers, *self._later]:
                self._withdraw(caller, RuntimeError("this engine was closed"))

    @property
    def loop(self) -> Loop | None:
        """While it is open."""
        session = self._session  # read once: another thread may close it
        return None if session is None else session.loop

    @property
    def open_calls(self) -> int:
        return len(self._callers) + len(self._later)

    @property
    def on_heartbeat(self) -> Callable[[Heartbeat], None] | None:
        """Told of each heartbeat in which something was drawn."""
        return self._on_heartbeat

    @on_heartbeat.setter
    def on_heartbeat(self, observer: Callable[[Heartbeat], None] | None) -> None:
        self._on_heartbeat = observer
        if (loop := self.loop) is not None:
            loop.on_heartbeat = observer

    # Whose turn it is

    @property
    def inside(self) -> bool:
        """Whether a step of its own waits for what asks: to wait for the core would be to wait for oneself."""
        return self._process == os.getpid() and self._turns.inside

    @contextmanager
    def _turn(self, short: bool = True, unless: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """The core is this thread's inside, if it yields True. A short turn waits for one step at most."""
        self._check_process()
        before = self._turns.mine
        try:
            yield self._turns.acquire(short=short, unless=unless)
        finally:
            if self._turns.mine and not before:
                self._end_turn()

    def _end_turn(self) -> None:
        """Withdraw who has gone meanwhile, close where nobody is left, and let others have their turn."""
        try:
            while True:
                try:
                    while self._gone:
                        self._withdraw(*self._gone[0])
                        self._gone.popleft()
                    if self._session is not None and not self._callers:
                        if not self._held:
                            self._shut()
                        elif self.reward.unsure and self.reward.tree_models:
                            self._renew_reward()
                except Exception as error:  # of a scorer that cannot end its session
                    self._fail_all(error)  # who has gone stays: of those who wait for larger pools, nobody else knows
                    warn(f"a session could not be ended: {Cause.of(error)}")
                if self._turns.release(unless=lambda: bool(self._gone)):
                    return
        finally:
            self._turns.release()

    def _check_process(self) -> None:
        """A forked child begins anew: the parent's callers and threads are not there."""
        if self._process == os.getpid():
            return
        self._process, self._held = os.getpid(), None
        for caller in [*self._callers, *self._later]:
            caller.end(RuntimeError("this call began in the process that was forked: call the engine anew"))
        self._callers, self._caller_of = {}, {}
        if self._session is not None:
            self._shut()
        self._forget_callers()

    # Opening and closing

    def _open(self, size: Size) -> Session:
        policy, size = self.policy, size._replace(rows=min(size.rows, self.max_rows))
        trees = [policy, *self.reward.tree_models, *size.beside]
        divide_devices(trees, size.rows, self.gpu_memory_utilization, size.length)
        tokens = self.kv_cache_tokens or default_tokens(policy, min(size.holders, self.max_rows), size.slots)
        passes = PASS if policy.device.type == "cpu" else PASS_OF_GPUS
        scoring = passes if self.in_order and self.reward.in_order else None
        scheduler = Scheduler(self.max_rows, tokens, self.cost, policy.graphs.enabled, scoring, self._acceptance)
        if policy.sharded:  # every process must plan alike, and each has a clock of its own
            scheduler.cost, scheduler.learns = HeartbeatCost(self._ratio), False
        session = self._session = Session(policy, self.reward, self.tokenizer, scheduler, size, self.kv_cache_tokens)
        session.loop.on_heartbeat, session.loop.ahead = self.on_heartbeat, self.ahead
        return session

    def _shut(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._acceptance = session.loop.scheduler.remembered()
            session.close()

    # One step

    def _step(self) -> None:
        try:
            self._let_in_later()
            now = time.monotonic()
            for caller in [one for one in self._callers if one.deadline is not None and one.deadline < now]:
                self._withdraw(caller, TimeoutError("the request's time is up"))
            if self._session is not None and self._callers:
                self._session.loop.heartbeat()
            self._deliver()
        except Exception as error:  # of the models, or of what serves all: nobody's alone
            self._take_again(error)
        except BaseException:  # somebody's interrupt, in the midst of everybody's work
            try:
                self._start_over()
            except Exception as error:
                self._fail_all(error)
            raise

    def _let_in_later(self) -> None:
        """Whoever waits for larger pools comes when nobody else is left; others behind it where they fit."""
        while self._later:
            caller = self._later[0]
            try:
                if self._session is None:
                    self._open(caller.size)
                elif not self._session.fits(caller.size, self._held is not None):
                    return
                if caller not in self._callers:
                    self._enter(caller)
            except Exception as error:
                self._withdraw(caller, error)
            if self._later and self._later[0] is caller:
                self._later.popleft()

    def _enter(self, caller: Caller) -> None:
        try:
            self.reward.open(caller.size.prompts, caller.size.max_new_tokens)
            self._callers[caller] = set()
            self._add(caller, caller.start())
        except BaseException as error:
            self._withdraw(caller, error)
            raise
        if not self._callers[caller]:
            self._withdraw(caller, None)

    def _add(self, caller: Caller, requests: Sequence[Request]) -> None:
        assert self._session is not None
        for request in requests:
            self._session.assign(request, caller.size)
            self._caller_of[request] = caller
            self._callers[caller].add(request)
        self._session.enter(requests)

    def _deliver(self) -> None:
        """Tell callers what has moved: read off the requests, so that what a broken heartbeat did is told, too."""
        for request, caller in list(self._caller_of.items()):
            if request.finish_reason is None and request.reported == len(request.segments):
                continue
            if request not in self._caller_of:  # its caller was withdrawn in here
                continue
            try:
                self._add(caller, caller.moved(request))
            except Exception as error:  # the caller's own: its tokenizer, its report
                self._withdraw(caller, error)
                continue
            if request.finish_reason is not None:  # not before: who is interrupted in here is told again
                self._out(caller, request)
        for caller in [one for one, live in self._callers.items() if not live]:
            self._withdraw(caller, None)

    def _out(self, caller: Caller, request: Request) -> None:
        assert self._session is not None
        del self._caller_of[request]
        self._callers[caller].discard(request)
        self._session.leave(request)

    def _withdraw(self, caller: Caller, error: BaseException | None) -> None:
        """The caller is through, or has gone."""
        if caller in self._later:
            self._later.remove(caller)
            caller.end(error)
        live = self._callers.get(caller)
        if live is None:
            return
        assert self._session is not None
        self._session.loop.withdraw(live)
        for request in list(live):
            self._out(caller, request)
        del self._callers[caller]
        unforgotten: Exception | None = None
        try:
            self.reward.forget(caller.size.prompts)
        except Exception as raised:  # its answers are whole
            self.reward.unsure, unforgotten = True, raised
        caller.end(error)
        if unforgotten is not None:  # last: a warning may be an error
            log("the reward could not forget prompts", unforgotten)
            warn(f"the reward's forget raised {Cause.of(unforgotten)}")

    def _take_again(self, error: Exception) -> None:
        """A step failed: once more from what is committed, unless several failed since the last commit, or it is a bug.

        Processes that share a model must all do alike, and what failed in one of them has not in the others.
        """
        loop = self.loop
        if loop is None or self.policy.sharded or isinstance(error, _BUGS):
            return self._fail_all(error)
        smaller = is_lack_of_memory(error) and loop.scheduler.shrink(0, loop.scheduler.max_rows)
        if loop.committed != loop.failed_at:  # perhaps in the heartbeat that broke off, before it did
            loop.failures = 0
        if loop.failures >= _RETAKEN and not smaller:
            return self._fail_all(error)
        loop.failures, loop.failed_at = loop.failures + 1, loop.committed
        cause = Cause.of(error)
        log(f"a heartbeat broke off, and all requests go on from what they have committed: {cause}", error)
        try:
            self._start_over()
        except BaseException as another:
            self._fail_all(another if isinstance(another, Exception) else error)
            if not isinstance(another, Exception):
                raise
        if not smaller:  # last: a warning may be an error
            warn(f"a heartbeat broke off, and is taken again (its traceback is in the log 'stars_fast'): {cause}")

    def _fail_all(self, error: Exception) -> None:
        """Nothing is known of the trees any more: all callers end, and the next finds an open core.

        A bug is raised to all of them; of what else has failed they may return what they have.
        """
        callers = list(self._callers.items())
        self._callers, self._caller_of = {}, {}
        try:
            self._shut()
        except Exception as another:  # the first cause is told
            log("what was open could not be closed", another)
        for place, (caller, live) in enumerate(callers):
            own = of_its_own(error) if place else error
            if isinstance(error, _BUGS):
                caller.end(own)
            else:
                caller.fail(own, sorted(live, key=lambda request: request.id))
        if self._held is not None:
            self._open(self._held)

    def _start_over(self) -> None:
        """A heartbeat broke off: all requests go on from what they have committed, on empty trees."""
        if self._session is None:
            return
        self._session.loop.start_over(request for request in self._caller_of if request.finish_reason is None)
        self._renew_reward()

    def _renew_reward(self) -> None:
        """Another session of the reward's, into which the prompts of all callers are let."""
        assert self._session is not None
        self._session.renew_reward()
        for caller in self._callers:
            self.reward.open(caller.size.prompts, caller.size.max_new_tokens)


def of_its_own(error: Exception) -> Exception:
    """The same error for another caller: one that is raised twice mixes up its tracebacks."""
    try:
        twin = copy.copy(error).with_traceback(None)
    except Exception:  # of a class that cannot be copied
        twin = RuntimeError(str(error))
    twin.__cause__ = error
    return twin
