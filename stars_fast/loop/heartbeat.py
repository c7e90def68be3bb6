"""The loop on one screen: make room, admit, extend, propose, score, judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress

import torch

from stars_fast.loop.memory import TooLarge, passing
from stars_fast.loop.queue import Queue, due
from stars_fast.loop.request import Candidate, Drawn, PromptNode, Proposer, Request, Strategy, Tree, Trunk
from stars_fast.loop.row_cost import Heartbeat, Timing
from stars_fast.loop.selection import trace_unseen
from stars_fast.methods.base import Method
from stars_fast.methods.stars import base_reward
from stars_fast.notices import warn
from stars_fast.outputs import Cause, Stats, as_cause
from stars_fast.policy.leaf import Draw
from stars_fast.rewards.base import Completion, Response, Reward, Scores, score_each
from stars_fast.tree.attention import evaluating, own_dtypes


class Loop(Queue):
    """One round for all requests at a time. Nobody waits for another's retries; all share the K tokens of a round.

    Attributes
    ----------
    on_heartbeat : callable, optional
        Called with a :class:`stars_fast.loop.row_cost.Heartbeat` after each round in which something was drawn.
    ahead : bool
        Whether a round ends with the launch of the next one's extension: a device works on it while the host counts,
        callers are told, and others are let in.
    """

    on_heartbeat: Callable[[Heartbeat], None] | None = None
    ahead = False
    counted = 0  # of the reward's tokens, those that stand in somebody's statistics
    failures, failed_at = 0, 0  # heartbeats that broke off since something was last committed, and tokens then
    _prepared = -1  # captures and compilations so far; the first round has too many to be a measure

    @torch.no_grad()
    @own_dtypes()
    def heartbeat(self) -> None:
        """One round. What has moved, ended or failed is read off the requests."""
        started, before = time.perf_counter(), self.committed
        self.make_room()
        self.admit()
        try:
            joined = self.join()
            self.fail_unreadable(self.extend())
            self.set_base_rewards(joined)
            self.drop_finished()
            drawn = self.propose()
        except TooLarge as error:
            large = TooLarge(error.tokens, error.rows, error.cause)
        else:
            proposed, scored, looked_at = time.perf_counter(), self.reward.tokens, list[Candidate]()
            for requests, stage in self.stages(drawn):
                self.judge(requests, stage, self.score(stage))
                looked_at += [one for group in stage.values() for one in group]
            self.drop_finished()
            committed, clock = self.committed - before, (started, proposed, time.perf_counter())
            try:
                if self.ahead:
                    self.extend_ahead()
            finally:  # the round is over, and counts
                self.note(drawn, looked_at, clock, self.reward.tokens - scored, committed)
            if committed:  # what is begun anew each time, and fails at its end, gets no further by failing again
                self.scheduler.recover()
            return
        # Out here nothing of the failed pass is alive: an exception holds its frames, and they their tensors.
        self.retreat(large)

    def extend(self) -> dict[Tree, list[Trunk]]:
        """Encode what the running requests need before they draw. Returns all that they need."""
        wanted = due(self.running)
        for tree, trunks in wanted.items():
            tree.extend(trunks)
        return wanted

    def set_base_rewards(self, joined: Sequence[Request]) -> None:
        """``r0`` of new requests that need r(x), the reward of the empty answer; where that fails, they do."""
        new = [request for request in joined if request.base is None]
        needs = list(dict.fromkeys(request.prompt for request in new if request.prompt.empty_reward is None))
        empty = [Completion(Response(prompt.reward_prompt), [], tokenizer=self.tokenizer) for prompt in needs]
        errors: dict[PromptNode, Cause] = {}
        if empty and self.reward.needs_hidden_state:
            with passing(rows=len(needs)):
                hidden = self.trunks.policy.hidden_at_end([p.node for p in needs], [p.ids[-1] for p in needs])
            for completion, row in zip(empty, hidden, strict=True):
                completion.hidden = row
        if empty:
            for prompt, completion, (value, error) in zip(needs, empty, score_each(self.reward, empty), strict=True):
                try:
                    self.reward.discard(completion)
                    self.reward.close(completion.response)
                except Exception as raised:
                    self.reward.unsure = True
                    error = error or Cause.of(raised, "the reward raised ")
                if error is None and value > float("-inf"):
                    prompt.empty_reward = value
                else:
                    errors[prompt] = as_cause(error or "it is -inf: set base_reward, alpha=1 or target_reward=None")
        for request in new:
            if request.prompt in errors:
                self.fail(request, errors[request.prompt].after("the empty answer could not be scored: "))
            elif request.prompt.empty_reward is not None:
                request.base = base_reward(request.prompt.empty_reward, request.target, request.terms.config.alpha)

    def propose(self) -> Drawn:
        """Draw candidates for all: most of them in one proposal, side by side."""
        drawn, asks = Drawn(), list[tuple[Request, int]]()
        taken = sum(request.strategy.rows(request) for request in self.running)
        for strategy, requests in _by_strategy(self.running):
            others = taken - sum(strategy.rows(request) for request in requests)
            rows = self.scheduler.max_rows - len(self.encoding) - others
            drawn |= strategy.draw(requests, rows)
            asks += strategy.asks(requests, rows)
        for answer, draws in self._drawn_together(asks).items():
            drawn[answer] = [answer.strategy.candidate(answer, draw) for draw in draws]
        for answer, group in drawn.items():
            for attempt, one in enumerate(group, answer.attempts):
                one.attempt = attempt
        self._encode_last([one for group in drawn.values() for one in group if one.answer.terms.whole])
        return drawn

    def _drawn_together(self, asks: Sequence[tuple[Request, int]]) -> dict[Request, list[Draw]]:
        """In as many proposals as ``max_rows`` asks for: of the policy, and of each set of models that are mixed."""
        draws: dict[Request, list[Draw]] = {answer: [] for answer, _ in asks}
        by_law: dict[Proposer, list[tuple[Request, int]]] = {}
        for answer, count in asks:
            by_law.setdefault(answer.strategy.trunks, []).append((answer, count))
        for trunks, own in by_law.items():
            copies = own[0][0].terms.copies
            most = max(self.scheduler.max_rows // copies, 1)
            for batch in _batches([count for _, count in own], most):
                leaves = [own[i][0].strategy.leaf(own[i][0], count, first) for i, first, count in batch]
                with passing(rows=copies * sum(leaf.candidates for leaf in leaves)):
                    groups = trunks.propose(leaves)
                for (i, _, _), group in zip(batch, groups, strict=True):
                    draws[own[i][0]] += group
        return draws

    def _encode_last(self, candidates: Sequence[Candidate]) -> None:
        """The policy's hidden state at each candidate's last token, which a draw leaves out."""
        policy = self.trunks.policy
        sound = [one for one in candidates if one.error is None]
        for one in sound:
            policy.trim(one.answer.trunk.leaf, one.draw)
        for first in range(0, len(sound), most := self.scheduler.max_rows):
            batch = sound[first : first + most]
            with passing(rows=len(batch)):
                hidden = policy.finish_branches([one.draw for one in batch])
            for one, row in zip(batch, hidden, strict=True):
                one.completion.hidden = row

    def stages(self, drawn: Drawn) -> Iterator[tuple[Sequence[Request], Drawn]]:
        """What is scored together, and whose it is: all candidates, or in several stages some of each request's.

        Each stage is judged before the next is asked for, which is of requests that nothing settled. What is left of
        the others' nobody looks at.
        """
        requests, left = self.running, drawn
        while requests:
            ordered = [answer for answer in left if answer.strategy.looks_in_order(answer)]
            most = self.scheduler.looked_at_together(ordered, [left[answer] for answer in ordered])
            stage = left | {answer: left[answer][:most] for answer in ordered}
            yield requests, stage
            left = {answer: rest for answer in ordered if (rest := left[answer][most:])}
            for answer, rest in list(left.items()):
                if answer.attempts != rest[0].attempt:
                    answer.strategy.roll_back(left.pop(answer))
                    trace_unseen(answer, rest)
            requests = list(left)

    def score(self, drawn: Drawn) -> torch.Tensor | None:
        """One packed pass of the reward model over the new tokens of these, and what methods make of it.

        Returns the rewards ``[B]`` where all of them lie on a device and are compared as they are: they stay there.
        """
        candidates = [one for group in drawn.values() for one in group]
        for one in candidates:
            one.unscored = not one.answer.strategy.asks_reward(one)
        sound = [one for one in candidates if one.error is None]
        asked = [one for one in sound if not one.unscored]
        if asked:
            scores = score_each(self.reward, [one.completion for one in asked])
            if len(asked) == len(candidates) and self._stays(scores, candidates):
                return scores.tensor
            for one, (reward, error) in zip(asked, scores, strict=True):
                one.reward, one.error = reward, error
        if type(self.reward).parts is not Reward.parts:
            for one in asked:
                try:
                    one.parts = self.reward.parts(one.completion) if one.error is None else None
                except Exception as error:
                    one.error = Cause.of(error, "the reward's parts raised ")
        by_method: dict[int, list[Candidate]] = {}
        for one in sound:
            if one.error is None:
                by_method.setdefault(id(one.answer.terms.method), []).append(one)
        for group in by_method.values():
            _set_values(group[0].answer.terms.method, group)
        return None

    def _stays(self, scores: Scores, candidates: Sequence[Candidate]) -> bool:
        """Whether nobody on the host has to look at the rewards before the selection."""
        return (
            scores.tensor is not None
            and scores.tensor.device.type != "cpu"
            and all(type(one.answer.terms.method).values is Method.values for one in candidates)
            and all(one.answer.strategy.judges_on_device for one in candidates)
        )

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        """Each strategy judges its own candidates."""
        for strategy, own in _by_strategy(requests):
            strategy.judge(own, drawn, rewards)

    def extend_ahead(self) -> None:
        """:meth:`extend` for the next round, only where none has to give way first.

        What does not fit is asked for again in the next round, which retreats.
        """
        if self.scheduler.spare(self.admitted) >= 0:
            with suppress(TooLarge):
                self.extend()

    def note(
        self,
        drawn: Drawn,
        looked_at: Sequence[Candidate],
        clock: tuple[float, float, float],
        scored: int,
        committed: int,
    ) -> None:
        """Count, and learn what rows cost: not from rounds that captured or compiled something.

        The host has looked at the device when candidates were drawn, and again when they were judged, so the clock of
        the beginning and of these two moments is all it takes.
        """
        self._count(drawn)
        lengths = [len(one.draw.tokens) for group in drawn.values() for one in group]
        if not lengths:
            return
        models = (self.trunks.policy, *self.reward.tree_models)
        before, self._prepared = self._prepared, sum(model.prepared for model in models)
        measured = before == self._prepared
        beside = max(scored - sum(len(one.draw.tokens) for one in looked_at), 0)
        started, proposed, judged = clock
        seconds = proposed - started, judged - proposed
        timing = Timing(len(lengths), max(lengths), self.encoded, beside, *seconds, len(looked_at))
        if measured and any(lengths):
            self.scheduler.observe(timing)
        if self.on_heartbeat is not None:
            tests = [self.scheduler.seen, *((r.acceptance_sum, r.scored) for r in [*self.admitted, *self.waiting])]
            accepted, tested = (sum(column) for column in zip(*tests, strict=True))
            told = Heartbeat(len(drawn), sum(lengths), committed, accepted, int(tested), measured, timing)
            try:
                self.on_heartbeat(told)
            except Exception as error:  # whoever looks on costs nobody a call
                warn(f"on_heartbeat raised {type(error).__name__}, and is not told any more: {error}")
                self.on_heartbeat = None

    def _count(self, drawn: Drawn) -> None:
        """Into the statistics of each call that took part."""
        parts: dict[Stats, int] = {}
        for answer, group in drawn.items():
            stats = answer.terms.stats
            parts[stats] = parts.get(stats, 0) + sum(len(one.draw.tokens) for one in group)
        for stats in parts:
            own = [len(group) for answer, group in drawn.items() if answer.terms.stats is stats]
            stats.heartbeats += 1
            stats.rows[sum(own)] += 1
            stats.requests[len(own)] += 1
        if parts := parts or {request.terms.stats: 0 for request in self.admitted}:
            encoded, self.counted = self.reward.tokens - self.counted, self.reward.tokens
            for stats, share in _shared_out(parts, encoded):
                stats.reward_tokens += share


def _by_strategy(requests: Sequence[Request]) -> Iterator[tuple[Strategy, list[Request]]]:
    """Requests by how they live in the loop."""
    groups: dict[Strategy, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.strategy, []).append(request)
    return iter(groups.items())


def _set_values(method: Method, candidates: Sequence[Candidate]) -> None:
    """What the selection compares. Where the method raises for all at once, each request's are asked for alone."""
    try:
        with ExitStack() as stack:
            for network in method.networks:
                stack.enter_context(evaluating(network) if isinstance(network, torch.nn.Module) else nullcontext())
            for one, value in zip(candidates, method.values(candidates), strict=True):
                one.score = value
    except Exception as error:
        answers = dict.fromkeys(one.answer for one in candidates)
        if len(answers) == 1:
            for one in candidates:
                one.error = Cause.of(error, f"method={method.name!r} raised ")
        else:
            for answer in answers:
                _set_values(method, [one for one in candidates if one.answer is answer])


def _shared_out(parts: dict[Stats, int], total: int) -> Iterator[tuple[Stats, int]]:
    """``total`` in proportion to the parts, in whole numbers that add up to it."""
    parts = parts if any(parts.values()) else dict.fromkeys(parts, 1)
    whole, given, seen = sum(parts.values()), 0, 0
    for stats, part in parts.items():
        seen += part
        share = total * seen // whole - given
        given += share
        yield stats, share


def _batches(shares: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Batches of (place, first, count) with at most ``most`` rows each, which together are all of the shares."""
    batch, room = list[tuple[int, int, int]](), most
    for place, share in enumerate(shares):
        first = 0
        while first < share:
            count = min(share - first, room)
            batch.append((place, first, count))
            first, room = first + count, room - count
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch
