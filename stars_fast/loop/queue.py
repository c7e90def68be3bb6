"""Who runs and who waits: admission, and what gives way where the running requests have outgrown the slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from stars_fast.loop.request import Request
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.trunks import Trunks
from stars_fast.outputs import Stats
from stars_fast.rewards.base import Response, Reward, RewardPrompt


class Queue:
    """The requests of a call. Whoever gives its slots back goes on where it was: nothing here changes a text.

    Parameters
    ----------
    requests : sequence of Request
        Admitted in this order.
    trunks : Trunks
        Of the policy's tree.
    reward : Reward
        Forgets the responses that wait.
    scheduler, stats
    """

    def __init__(
        self, requests: Sequence[Request], trunks: Trunks, reward: Reward, scheduler: Scheduler, stats: Stats
    ) -> None:
        self.trunks, self.reward, self.scheduler, self.stats = trunks, reward, scheduler, stats
        self.trees = [trunks]  # all that a method uses
        self.waiting = deque(requests)
        self.running: list[Request] = []  # the oldest first
        self.encoding: list[Request] = []  # admitted after these; not all of their text is in the tree yet
        self.encoded = 0  # tokens of them in this heartbeat
        self.scores_soon = True  # whether unfinished answers are scored

    def admit(self) -> None:
        """Give waiting requests the rows and slots that are free. Their texts are encoded first (:meth:`join`)."""
        count = self.scheduler.admit(self.waiting, self.admitted)
        if not count and self.waiting and not self.admitted:
            raise RuntimeError(
                f"prompts[{self.waiting[0].prompt_index}] is never admitted, though it alone was found to fit into "
                f"{self.scheduler.kv_cache_tokens} slots: the two counts differ, which is a bug of stars_fast"
            )
        self.encoding += [self.waiting.popleft() for _ in range(count)]
        for trunks in self.trees:
            trunks.keep_prompts(self.admitted)

    @property
    def admitted(self) -> list[Request]:
        """All that hold slots, the oldest first."""
        return self.running + self.encoding

    def join(self) -> list[Request]:
        """Encode of the admitted requests what a heartbeat has room for. Those that are ready run from now on.

        The policy reads their texts and, where answers are scored before they end, the reward model their prompts: as
        many tokens each.
        """
        self.encoded = 0
        if not self.encoding:
            return []
        trunks, before = self.trunks_ahead(), self.reward.tokens
        leaves = [leaf for request in self.encoding for leaf in request.leaves]
        most = self.scheduler.encoding_tokens(len(self.running), len(self.encoding))
        self.encoded = trunks.encode(leaves, most)
        joined = [request for request in self.encoding if all(map(trunks.ready, request.leaves))]
        if self.scores_soon:
            behind = self._behind([request.response.prompt for request in joined], most)
            joined = [request for request in joined if request.response.prompt not in behind]
            self.encoded += self.reward.tokens - before
        self.encoding = [request for request in self.encoding if request not in joined]
        self.running += joined
        return joined

    def _behind(self, prompts: Sequence[RewardPrompt], most: int) -> set[RewardPrompt]:
        """Prompts that the reward model has not read to their end. Where it fails, scoring meets that again, and says
        for whom.
        """
        try:
            return set(self.reward.read_ahead(prompts, most))
        except Exception:
            return set()

    def trunks_ahead(self) -> Trunks:
        """Where a request's text is encoded before it runs."""
        return self.trunks

    def make_room(self) -> None:
        """Where the running requests have outgrown the slots, the youngest give way: first waiting best candidates."""
        lacking = -self.scheduler.spare(self.admitted)
        for request in reversed(self.admitted):
            if lacking <= 0:
                return
            lacking -= self._release_best(request)
        while len(self.admitted) > 1 and self.scheduler.spare(self.admitted) < 0:
            self.preempt(self.admitted[-1])

    def preempt(self, request: Request) -> None:
        """Give all the request's slots back. It waits at the front of the queue, and goes on where it was."""
        self._release_best(request)
        for leaf in request.leaves:
            for trunks in self.trees:
                trunks.give_back(leaf)
            # The scorer forgets it too: a response that waits does not grow.
            self.reward.close(leaf.response)
            leaf.response = Response(leaf.prompt.reward_prompt, leaf.tokens, ends=leaf.response.ends)
        if request.best is not None:
            request.best.completion.response = request.response
        (self.running if request in self.running else self.encoding).remove(request)
        self.waiting.appendleft(request)
        self.stats.preemptions += 1

    def _release_best(self, request: Request) -> int:
        """Forget the keys and values of the best candidate so far, not its tokens: a fallback encodes them again.

        Returns the slots that this frees.
        """
        if request.best is None or request.best.draw.node < 0:
            return 0
        self.trunks.policy.tree.release(request.best.draw.node)
        request.best.draw.node = -1
        return self.scheduler.branch_slots(request)

    def retreat(self, cause: str) -> list[Request]:
        """After a forward pass that ran out of memory: from an empty tree, with half the tokens. Returns who failed."""
        for request in self.admitted[::-1]:
            self.preempt(request)
        for trunks in self.trees:
            trunks.keep_prompts([])
        for trunks in self.trees:  # two may share a tree: all have let go of it by now
            trunks.policy.clear()  # the failed pass may have left branches
        if self.scheduler.shrink(self.scheduler.packed // 2):
            return []
        request = self.waiting.popleft()
        self.fail(request, f"too little memory for this request alone, a token at a time: {cause}")
        return [request]

    def drop_finished(self) -> None:
        """Requests that have ended run no longer."""
        self.running = [request for request in self.running if request.finish_reason is None]

    def fail(self, request: Request, cause: str) -> None:
        """End a request with an error; what it has committed is kept."""
        if request.best is not None:
            self._release_best(request)
            self.reward.discard(request.best.completion)
            request.best = None
        request.error, request.reward = cause, float("nan")
        self.finish(request, "error")

    def finish(self, request: Request, reason: str) -> None:
        """End a request, and free what it and its members hold."""
        self.scheduler.retire(request)
        for member in dict.fromkeys([*request.leaves, request]):
            member.finish_reason = reason
            for trunks in self.trees:
                trunks.give_back(member)
            self.reward.close(member.response)
