"""The loop: make room, admit, extend, propose, score, select, commit. A call of the engine is a :class:`Generation`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedTokenizerBase

from stars_fast.config import StarsConfig
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Candidate, PromptNode, Request
from stars_fast.loop.row_cost import Heartbeat, Timing
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.selection import first_accepted
from stars_fast.loop.trunks import Trunks
from stars_fast.methods.stars import base_reward
from stars_fast.ops.select_and_commit import EARLIER, INVALID
from stars_fast.outputs import SegmentTrace, Stats
from stars_fast.policy.policy import Draw, Policy
from stars_fast.policy.steps import Leaf, RowProcessor, Sampling
from stars_fast.rewards.base import Completion, Response, Reward, score_each
from stars_fast.tree.attention import evaluating
from stars_fast.tree.segment_tree import SlotsExhausted


class Generation(Queue):
    """Runs requests to their end. Nobody waits for another's retries; all share the heartbeat of K tokens.

    Parameters
    ----------
    policy, reward
        Both begun by the caller (trees allocated, models plugged).
    requests : sequence of Request
        Admitted in this order.
    config : StarsConfig
        With what its method decides itself.
    sampling, scheduler
    tokenizer : optional
        The policy's, for scorers of text.
    stats : Stats
        Counted up in place.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        requests: Sequence[Request],
        config: StarsConfig,
        sampling: Sampling,
        scheduler: Scheduler,
        tokenizer: object,
        stats: Stats,
    ) -> None:
        super().__init__(requests, Trunks(policy, scheduler), reward, scheduler, stats)
        self.policy, self.config, self.sampling, self.tokenizer = policy, config, sampling, tokenizer
        self.method = config.chosen_method
        self.segments = self.method.segments()
        self.scores_soon = self.method.scores_unfinished
        self.prepared = -1  # captures and compilations so far; the first heartbeat has too many to be a measure
        self.on_heartbeat: Callable[[Heartbeat], None] | None = None
        self.committed = stats.committed_tokens  # as of the heartbeat before
        self.has_parts = type(reward).parts is not Reward.parts

    def run(self) -> Iterator[Request]:
        """Yield a request whenever it has committed a segment (its last trace is new) or has failed."""
        while self.waiting or self.admitted:
            yield from self.heartbeat()
        for trunks in self.trees:
            trunks.keep_prompts([])

    @torch.no_grad()
    def heartbeat(self) -> list[Request]:
        """One round for every running request. Returns those that committed a segment or failed."""
        started = time.perf_counter()
        self.make_room()
        self.admit()
        failed = list[Request]()
        try:
            joined = self.join()
            self.extend()
            failed = self.set_base_rewards(joined)
            self.drop_finished()
            candidates = self.propose()
        except (torch.OutOfMemoryError, SlotsExhausted) as error:
            cause = f"{type(error).__name__}: {error}"
        else:
            proposed, scored = time.perf_counter(), self.reward.tokens
            self.score(candidates)
            changed = self.select_and_commit(candidates)
            self.note(candidates, started, proposed, self.reward.tokens - scored)
            return failed + changed
        # Out here nothing of the failed pass is alive: an exception holds its frames, and they their tensors.
        return failed + self.retreat(cause)

    def note(self, candidates: Sequence[Sequence[Candidate]], started: float, proposed: float, scored: int) -> None:
        """Count the rows in use, and learn what they cost: not from heartbeats that captured or compiled something.

        The host has looked at the device when candidates were drawn, and again when they were scored, so two readings
        of the clock are all it takes.
        """
        if not candidates:
            return
        ended = time.perf_counter()
        lengths = [len(candidate.draw.tokens) for group in candidates for candidate in group]
        self.stats.rows[len(lengths)] += 1
        self.stats.requests[len(candidates)] += 1
        models = (*(trunks.policy for trunks in self.trees), *self.reward.tree_models)
        prepared, self.prepared = self.prepared, sum(model.prepared for model in models)
        measured = prepared == self.prepared and any(lengths)
        beside = max(scored - sum(lengths), 0)
        timing = Timing(len(lengths), max(lengths), self.encoded, beside, proposed - started, ended - proposed)
        if measured:
            self.scheduler.observe(timing)
        if self.on_heartbeat is not None:
            committed, self.committed = self.stats.committed_tokens - self.committed, self.stats.committed_tokens
            every = [*self.admitted, *self.waiting]
            accepted = self.scheduler.past[0] + sum(request.acceptance_sum for request in every)
            tested = self.scheduler.past[1] + sum(request.scored for request in every)
            self.on_heartbeat(Heartbeat(len(candidates), sum(lengths), committed, accepted, tested, measured, timing))

    def extend(self) -> None:
        """Encode what is not in the tree."""
        self.trunks.extend(self.drawers())

    def drawers(self) -> list[Request]:
        """Who draws candidates in this heartbeat."""
        return self.running

    def shares(self, drawers: Sequence[Request]) -> list[int]:
        """How many each of them draws."""
        return self.scheduler.candidates(drawers, self.encoding)

    def set_base_rewards(self, admitted: Sequence[Request]) -> list[Request]:
        """``r0`` of new requests that need r(x), the reward of the empty answer. Returns those it failed for."""
        new = [request for request in admitted if request.base is None]
        needs = dict.fromkeys(request.prompt for request in new if request.prompt.empty_reward is None)
        empty = [Completion(Response(prompt.reward_prompt), [], tokenizer=self.tokenizer) for prompt in needs]
        errors: dict[PromptNode, str] = {}
        if empty and self.scheduler.whole:
            hidden = self.policy.hidden_at_end([p.node for p in needs], [p.ids[-1] for p in needs])
            for completion, row in zip(empty, hidden, strict=True):
                completion.hidden = row
        if empty:
            for prompt, completion, (value, error) in zip(needs, empty, score_each(self.reward, empty), strict=True):
                self.reward.discard(completion)
                self.reward.close(completion.response)
                prompt.empty_reward = value
                if error is not None or value == float("-inf"):
                    errors[prompt] = error or "it is -inf: set base_reward, alpha=1 or target_reward=None"
        failed = []
        for request in new:
            if request.prompt in errors:
                self.fail(request, f"the empty answer could not be scored: {errors[request.prompt]}")
                request.prompt.empty_reward = None
                failed.append(request)
            elif request.prompt.empty_reward is not None:
                request.base = base_reward(request.prompt.empty_reward, request.target, self.config.alpha)
        return failed

    def propose(self) -> list[list[Candidate]]:
        """Draw candidates for all who do, side by side."""
        drawers = self.drawers()
        if not drawers:
            return []
        shares = self.shares(drawers)
        self.scheduler.packed = sum(shares)
        self.stats.heartbeats += 1
        groups = [
            [self._candidate(request, draw) for draw in draws]
            for request, draws in zip(drawers, self.draw(drawers, shares), strict=True)
        ]
        if self.scheduler.whole:
            self._encode_last([candidate for group in groups for candidate in group if candidate.draw.finite])
        return groups

    def draw(self, drawers: Sequence[Request], shares: Sequence[int]) -> list[list[Draw]]:
        """Draw ``shares[i]`` candidates for the i-th of them."""
        leaves = [self._leaf(request, share) for request, share in zip(drawers, shares, strict=True)]
        return self.policy.propose(leaves, self.sampling)

    def _encode_last(self, candidates: Sequence[Candidate]) -> None:
        """The policy's hidden state at each candidate's last token, which a draw leaves out."""
        for candidate in candidates:
            self.policy.trim(candidate.leaf, candidate.draw)
        for first in range(0, len(candidates), most := self.scheduler.max_rows):
            batch = candidates[first : first + most]
            self.scheduler.packed = len(batch)
            hidden = self.policy.finish_branches([candidate.draw for candidate in batch])
            for candidate, row in zip(batch, hidden, strict=True):
                candidate.completion.hidden = row

    def _leaf(self, request: Request, candidates: int, place: int = 0) -> Leaf:
        trunk = self.trees[place].of(request)
        assert trunk.logits is not None
        return Leaf(
            node=trunk.leaf,
            logits=trunk.logits,
            key=request.key,
            segment=len(request.segments),
            first_attempt=request.attempts,
            candidates=candidates,
            length=min(self.config.segment_length, self.config.max_new_tokens - len(request.tokens)),
            seen=self._seen(request),
            processor=after(request),
            entropy=self.segments.entropy,
            shortest=self.segments.shortest,
        )

    def _seen(self, request: Request) -> torch.Tensor | None:
        if self.sampling.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(self.policy.vocab_size, dtype=torch.bool, device=self.policy.device)
        seen[request.prompt.ids + request.tokens] = True
        return seen

    def _candidate(self, request: Request, draw: Draw, place: int = 0) -> Candidate:
        """Cut a draw at its stop string or criterion, so that it is scored as it would be returned."""
        self.stats.policy_tokens += len(draw.tokens)
        ended, eos = draw.ended, draw.ended
        leaf = self.trees[place].of(request).leaf
        if self.segments.delimiter is not None and (length := self._step(draw.tokens)) < len(draw.tokens):
            draw.cut(length)
            self.trees[place].policy.trim(leaf, draw)
            ended, eos = False, False
        if request.stop is not None:
            for length in range(1, len(draw.tokens) + 1):
                if request.stop(request.tokens + draw.tokens[:length]):
                    ended, eos = True, eos and length == len(draw.tokens)
                    draw.cut(length)
                    break
        length = len(request.tokens) + len(draw.tokens)
        finished = ended or length == self.config.max_new_tokens
        completion = Completion(request.response, draw.tokens, finished, eos, self.tokenizer)
        return Candidate(draw, completion, ended, leaf, place)

    def _step(self, tokens: list[int]) -> int:
        """Tokens up to and including the one that completes the delimiter; all of them where none does."""
        assert isinstance(self.tokenizer, PreTrainedTokenizerBase) and self.segments.delimiter is not None
        if self.segments.delimiter in self.tokenizer.decode(tokens):
            for length in range(1, len(tokens)):
                if self.segments.delimiter in self.tokenizer.decode(tokens[:length]):
                    return length
        return len(tokens)

    def score(self, candidates: Sequence[Sequence[Candidate]]) -> None:
        """One packed pass of the reward model over the new tokens of all candidates."""
        drawn = [candidate for group in candidates for candidate in group]
        for candidate in drawn:
            candidate.unscored = not self.asks_reward(candidate)
            if not candidate.draw.finite:
                candidate.error = "the policy's logits are not finite"
        asked = [candidate for candidate in drawn if candidate.error is None and not candidate.unscored]
        if asked:
            scores = score_each(self.reward, [candidate.completion for candidate in asked])
            for candidate, (reward, error) in zip(asked, scores, strict=True):
                candidate.reward, candidate.error = reward, error
                if self.has_parts and error is None:
                    candidate.parts = self.reward.parts(candidate.completion)
        sound = [candidate for candidate in drawn if candidate.error is None]
        with ExitStack() as stack:
            for network in self.method.networks:
                if isinstance(network, torch.nn.Module):
                    stack.enter_context(evaluating(network))
            for candidate, value in zip(sound, self.method.values(sound) if sound else [], strict=True):
                candidate.score = value

    def asks_reward(self, candidate: Candidate) -> bool:
        """Whether the reward of a candidate is needed: for the selection, or because it would be the answer."""
        return self.method.scores_unfinished or candidate.completion.finished

    def select_and_commit(self, candidates: Sequence[Sequence[Candidate]]) -> list[Request]:
        """Accept, fall back or go on, per request; roll everything else back. Returns those that moved or failed."""
        if not candidates:
            return []
        changed, verdicts = [], first_accepted(self.running, candidates, self.config)
        for request, group, verdict in zip(self.running, candidates, verdicts, strict=True):
            if verdict.winner == INVALID:
                culprit = group[verdict.attempts - request.attempts - 1]
                self._roll_back(group, keep=None)
                self.fail(request, culprit.error or "a candidate could not be scored")
                changed.append(request)
                continue
            best = request.best
            if verdict.best_attempt >= request.attempts:
                best = group[verdict.best_attempt - request.attempts]
            chosen = best if verdict.winner == EARLIER else None
            if verdict.winner >= 0:
                chosen = group[verdict.winner]
            self._roll_back(group if request.best is None else [*group, request.best], keep=chosen or best)
            request.attempts, request.best, request.best_attempt = verdict.attempts, best, verdict.best_attempt
            if chosen is not None:
                self.stats.committed_tokens += len(chosen.draw.tokens)
                self._commit(request, chosen, verdict.accepted)
                changed.append(request)
        self.drop_finished()
        return changed

    def _roll_back(self, candidates: Sequence[Candidate], keep: Candidate | None) -> None:
        """Release the branches of all but one."""
        dropped = [candidate for candidate in candidates if candidate is not keep]
        for place, trunks in enumerate(self.trees):
            nodes = [one.draw.node for one in dropped if one.place == place and one.draw.node >= 0]
            trunks.policy.tree.release_all(nodes)
        for candidate in dropped:
            self.reward.discard(candidate.completion)

    def _commit(self, request: Request, chosen: Candidate, accepted: bool) -> None:
        """The chosen branch becomes the request's leaf; its last token waits for the next heartbeat's forward pass.

        All its tokens do where the branch was given up for room, or lies in another tree.
        """
        draw = chosen.draw
        logprob = sum(draw.logprobs)
        request.segments.append(
            SegmentTrace(
                draw.tokens, chosen.reward, chosen.threshold, request.attempts, accepted, logprob, chosen.parts
            )
        )
        self.reward.commit(chosen.completion)
        for place, trunks in enumerate(self.trees):
            mine = place == chosen.place
            trunks.append(request, draw.tokens, draw.node if mine else -1, draw.logits if mine else None)
        request.tokens += draw.tokens
        request.logprobs += draw.logprobs
        request.sampling_logprobs += draw.sampling_logprobs
        request.response.tokens = request.tokens
        request.response.ends.append(len(request.tokens))
        request.reward = chosen.reward
        request.attempts, request.best, request.best_attempt, request.limit = 0, None, -1, None
        if chosen.ended:
            self.finish(request, "stop")
        elif len(request.tokens) == self.config.max_new_tokens:
            self.finish(request, "length")


def after(request: Request) -> RowProcessor | None:
    """The request's logits processor, on top of what it has committed."""
    processor = request.processor
    return processor and (lambda drawn, logits: processor(request.tokens + drawn, logits))
