"""The loop: make room, admit, extend, propose, score, select, commit. A call of the engine is a :class:`Generation`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from stars_fast.config import StarsConfig
from stars_fast.decode import Leaf, RowProcessor, Sampling
from stars_fast.methods.stars import acceptance_probability, base_reward
from stars_fast.ops.select_and_commit import EARLIER, INVALID, select_and_commit
from stars_fast.outputs import SegmentTrace, Stats
from stars_fast.policy import Draw, Policy
from stars_fast.request import Candidate, PromptNode, Request
from stars_fast.rewards.base import Completion, Response, Reward, score_each
from stars_fast.scheduler import Scheduler
from stars_fast.tree.segment_tree import SlotsExhausted


class Generation:
    """Runs requests to their end. Nobody waits for another's retries; all share the heartbeat of K tokens.

    Parameters
    ----------
    policy, reward
        Both begun by the caller (trees allocated, models plugged).
    requests : sequence of Request
        Admitted in this order.
    config, sampling, scheduler
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
        self.policy, self.reward, self.scheduler = policy, reward, scheduler
        self.config, self.sampling, self.tokenizer, self.stats = config, sampling, tokenizer, stats
        self.waiting = deque(requests)
        self.running: list[Request] = []  # the oldest first
        self.packed = 0  # tokens of the forward pass that runs
        self._encoded: set[PromptNode] = set()  # prompts in the tree

    def run(self) -> Iterator[Request]:
        """Yield a request whenever it has committed a segment (its last trace is new) or has failed."""
        while self.waiting or self.running:
            yield from self.heartbeat()
        self._release_idle_prompts()

    @torch.no_grad()
    def heartbeat(self) -> list[Request]:
        """One round for every running request. Returns those that committed a segment or failed."""
        self.make_room()
        admitted, failed = self.admit(), list[Request]()
        try:
            self.extend()
            failed = self.set_base_rewards(admitted)
            self.running = [request for request in self.running if request.finish_reason is None]
            candidates = self.propose()
        except (torch.OutOfMemoryError, SlotsExhausted) as error:
            cause = f"{type(error).__name__}: {error}"
        else:
            self.score(candidates)
            return failed + self.select_and_commit(candidates)
        # Out here nothing of the failed pass is alive: an exception holds its frames, and they their tensors.
        return failed + self.retreat(cause)

    def make_room(self) -> None:
        """Where the running requests have outgrown the slots, the youngest give way: first waiting best candidates."""
        lacking = -self.scheduler.spare(self.running)
        for request in reversed(self.running):
            if lacking <= 0:
                return
            lacking -= self._release_best(request)
        while len(self.running) > 1 and self.scheduler.spare(self.running) < 0:
            self.preempt(self.running[-1])

    def preempt(self, request: Request) -> None:
        """Give all the request's slots back. It waits at the front of the queue, and goes on where it was."""
        self._release_best(request)
        if request.leaf >= 0:
            self.policy.tree.release(request.leaf)
        request.leaf, request.leaf_logits, request.pending = -1, None, list(request.tokens)
        # The scorer forgets it too: a response that waits does not grow.
        self.reward.close(request.response)
        request.response = Response(request.prompt.reward_prompt, request.tokens, ends=request.response.ends)
        if request.best is not None:
            request.best.completion.response = request.response
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.stats.preemptions += 1

    def _release_best(self, request: Request) -> int:
        """Forget the keys and values of the best candidate so far, not its tokens: a fallback encodes them again.

        Returns the slots that this frees.
        """
        if request.best is None or request.best.draw.node < 0:
            return 0
        self.policy.tree.release(request.best.draw.node)
        request.best.draw.node = -1
        return self.scheduler.branch_slots(request)

    def retreat(self, cause: str) -> list[Request]:
        """After a forward pass that ran out of memory: from an empty tree, with half the tokens. Returns who failed."""
        for request in self.running[::-1]:
            self.preempt(request)
        self._release_idle_prompts()
        self.policy.clear()  # the failed pass may have left branches
        if self.scheduler.shrink(self.packed // 2):
            return []
        request = self.waiting.popleft()
        self.fail(request, f"too little memory for this request alone, a token at a time: {cause}")
        return [request]

    def admit(self) -> list[Request]:
        """Move waiting requests into free rows."""
        count = self.scheduler.admit(self.waiting, self.running)
        admitted = [self.waiting.popleft() for _ in range(count)]
        self.running += admitted
        self._release_idle_prompts()
        return admitted

    def _release_idle_prompts(self) -> None:
        for prompt in self._encoded - {request.prompt for request in self.running}:
            self.policy.tree.release(prompt.node)
            prompt.node, prompt.logits = -1, None
            self._encoded.remove(prompt)

    def extend(self) -> None:
        """Encode what is not in the tree: prompts, last tokens of segments just committed, all of who was preempted."""
        while True:
            for request in self.running:
                if request.leaf < 0 and request.prompt.node >= 0:
                    self.policy.tree.retain(request.prompt.node)
                    request.leaf, request.leaf_logits = request.prompt.node, request.prompt.logits
            prompts = [p for p in dict.fromkeys(request.prompt for request in self.running) if p.node < 0]
            behind = [request for request in self.running if request.leaf >= 0 and request.pending]
            if not prompts and not behind:
                return
            self._encode(prompts, behind)

    def _encode(self, prompts: Sequence[PromptNode], behind: Sequence[Request]) -> None:
        """Encode prompts, and what requests have committed since their leaf."""
        leaves = [-1] * len(prompts) + [request.leaf for request in behind]
        nodes, logits = self._prefill(leaves, [p.ids for p in prompts] + [request.pending for request in behind])
        for prompt, node, row in zip(prompts, nodes, logits, strict=False):
            prompt.node, prompt.logits = node, row
        self._encoded.update(prompts)
        for request, node, row in zip(behind, nodes[len(prompts) :], logits[len(prompts) :], strict=True):
            self.policy.tree.release(request.leaf)
            request.leaf, request.leaf_logits, request.pending = node, row, []

    def _prefill(self, leaves: Sequence[int], runs: Sequence[list[int]]) -> tuple[list[int], list[torch.Tensor]]:
        """:meth:`Policy.prefill` in as many passes as the scheduler's limit asks for: one, unless memory ran out."""
        nodes, logits = list(leaves), [torch.empty(0)] * len(leaves)
        begun, done = [False] * len(runs), [0] * len(runs)
        while True:
            pieces: dict[int, list[int]] = {}
            self.packed = 0
            for i, run in enumerate(runs):
                if done[i] < len(run) and self.packed < self.scheduler.prefill_tokens:
                    pieces[i] = run[done[i] : done[i] + self.scheduler.prefill_tokens - self.packed]
                    self.packed += len(pieces[i])
            if not pieces:
                return nodes, logits
            new, rows = self.policy.prefill([nodes[i] for i in pieces], list(pieces.values()))
            for (i, piece), node, row in zip(pieces.items(), new, rows, strict=True):
                if begun[i]:
                    self.policy.tree.release(nodes[i])
                nodes[i], logits[i], begun[i] = node, row, True
                done[i] += len(piece)

    def set_base_rewards(self, admitted: Sequence[Request]) -> list[Request]:
        """``r0`` of new requests that need r(x), the reward of the empty answer. Returns those it failed for."""
        new = [request for request in admitted if request.base is None]
        needs = dict.fromkeys(request.prompt for request in new if request.prompt.empty_reward is None)
        empty = [Completion(Response(prompt.reward_prompt), [], tokenizer=self.tokenizer) for prompt in needs]
        errors: dict[PromptNode, str] = {}
        if empty:
            for prompt, completion, (value, error) in zip(needs, empty, score_each(self.reward, empty), strict=True):
                self.reward.discard(completion)
                self.reward.close(completion.response)
                prompt.empty_reward = value
                if error is not None or value == float("-inf"):
                    errors[prompt] = error or "it is -inf"
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
        """Draw candidates for every running request, side by side."""
        if not self.running:
            return []
        shares = self.scheduler.candidates(self.running)
        self.packed = sum(shares)
        leaves = [self._leaf(request, share) for request, share in zip(self.running, shares, strict=True)]
        self.stats.heartbeats += 1
        return [
            [self._candidate(request, draw) for draw in draws]
            for request, draws in zip(self.running, self.policy.propose(leaves, self.sampling), strict=True)
        ]

    def _leaf(self, request: Request, candidates: int) -> Leaf:
        assert request.leaf_logits is not None
        return Leaf(
            node=request.leaf,
            logits=request.leaf_logits,
            key=request.key,
            segment=len(request.segments),
            first_attempt=request.attempts,
            candidates=candidates,
            length=min(self.config.segment_length, self.config.max_new_tokens - len(request.tokens)),
            seen=self._seen(request),
            processor=_after(request),
        )

    def _seen(self, request: Request) -> torch.Tensor | None:
        if self.sampling.repetition_penalty == 1.0:
            return None
        assert request.leaf_logits is not None
        seen = torch.zeros(request.leaf_logits.shape[-1], dtype=torch.bool, device=self.policy.device)
        seen[request.prompt.ids + request.tokens] = True
        return seen

    def _candidate(self, request: Request, draw: Draw) -> Candidate:
        """Cut a draw at its stop string or criterion, so that it is scored as it would be returned."""
        self.stats.policy_tokens += len(draw.tokens)
        ended, eos = draw.ended, draw.ended
        if request.stop is not None:
            for length in range(1, len(draw.tokens) + 1):
                if request.stop(request.tokens + draw.tokens[:length]):
                    ended, eos = True, eos and length == len(draw.tokens)
                    draw.cut(length)
                    break
        length = len(request.tokens) + len(draw.tokens)
        finished = ended or length == self.config.max_new_tokens
        completion = Completion(request.response, draw.tokens, finished, eos, self.tokenizer)
        return Candidate(draw, completion, ended)

    def score(self, candidates: Sequence[Sequence[Candidate]]) -> None:
        """One packed pass of the reward model over the new tokens of all candidates."""
        drawn = [candidate for group in candidates for candidate in group]
        for candidate in drawn:
            if not candidate.draw.finite:
                candidate.error = "the policy's logits are not finite"
        sound = [candidate for candidate in drawn if candidate.error is None]
        if sound:
            scores = score_each(self.reward, [candidate.completion for candidate in sound])
            for candidate, (reward, error) in zip(sound, scores, strict=True):
                candidate.reward, candidate.error = reward, error

    def select_and_commit(self, candidates: Sequence[Sequence[Candidate]]) -> list[Request]:
        """Accept, fall back or go on, per request; roll everything else back. Returns those that moved or failed."""
        if not candidates:
            return []
        changed = []
        for request, group, verdict in zip(self.running, candidates, self._select(candidates), strict=True):
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
                self._commit(request, chosen, verdict.accepted)
                changed.append(request)
        self.running = [request for request in self.running if request.finish_reason is None]
        return changed

    def _select(self, candidates: Sequence[Sequence[Candidate]]) -> list[_Verdict]:
        """Ask the operator, and note thresholds and acceptance."""
        requests, drawn = self.running, [candidate for group in candidates for candidate in group]
        counts = [0, *(len(group) for group in candidates)]
        int32, float64 = torch.int32, torch.float64
        attempts = torch.tensor([request.attempts for request in requests], dtype=int32)
        best_attempt = torch.tensor([request.best_attempt for request in requests], dtype=int32)
        first_row = torch.tensor(counts).cumsum(0, dtype=int32)
        groups, rows = len(requests), len(drawn)
        winner, accepted, thresholds = select_and_commit(
            torch.tensor([candidate.reward for candidate in drawn], dtype=torch.float32),
            torch.tensor([len(candidate.draw.tokens) for candidate in drawn], dtype=int32),
            torch.tensor([candidate.ended for candidate in drawn]),
            first_row,
            torch.tensor([request.key for request in requests]),
            torch.tensor([len(request.segments) for request in requests], dtype=int32),
            attempts,
            torch.tensor([len(request.tokens) for request in requests], dtype=int32),
            torch.full((groups,), self.config.max_new_tokens, dtype=int32),
            torch.full((groups,), self.config.max_attempts, dtype=int32),
            torch.tensor([_known(request.base) for request in requests], dtype=float64),
            torch.tensor([request.target for request in requests], dtype=float64),
            torch.tensor([request.beta for request in requests], dtype=float64),
            self.config.finished_threshold == "target",
            torch.tensor([request.best.reward if request.best else 0.0 for request in requests], dtype=torch.float32),
            best_attempt,
            # The tree writes the slot tables anew in its next plan: nothing to keep in the operator's.
            *_empty_tables(groups, rows),
        )
        for candidate, tau in zip(drawn, thresholds.tolist(), strict=True):
            candidate.threshold = tau
        for request, group in zip(requests, candidates, strict=True):
            for candidate in group:
                if candidate.error is None:
                    request.acceptance_sum += acceptance_probability(
                        candidate.reward, candidate.threshold, request.beta
                    )
                    request.scored += 1
        starts = first_row.tolist()
        return [
            _Verdict(row - start if row >= 0 else row, won, looked, best)
            for row, start, won, looked, best in zip(
                winner.tolist(), starts, accepted.tolist(), attempts.tolist(), best_attempt.tolist(), strict=False
            )
        ]

    def _roll_back(self, candidates: Sequence[Candidate], keep: Candidate | None) -> None:
        """Release the branches of all but one."""
        for candidate in candidates:
            if candidate is not keep:
                if candidate.draw.node >= 0:
                    self.policy.tree.release(candidate.draw.node)
                self.reward.discard(candidate.completion)

    def _commit(self, request: Request, chosen: Candidate, accepted: bool) -> None:
        """The chosen branch becomes the request's leaf; its last token waits for the next heartbeat's forward pass.

        All its tokens do where the branch was given up for room.
        """
        draw = chosen.draw
        request.segments.append(
            SegmentTrace(draw.tokens, chosen.reward, chosen.threshold, request.attempts, accepted, sum(draw.logprobs))
        )
        self.reward.commit(chosen.completion)
        if draw.node >= 0:
            self.policy.tree.release(request.leaf)
            request.leaf, request.pending = draw.node, draw.tokens[-1:]
        else:
            request.pending = list(draw.tokens)
        request.leaf_logits = None
        request.tokens += draw.tokens
        request.logprobs += draw.logprobs
        request.sampling_logprobs += draw.sampling_logprobs
        request.response.tokens = request.tokens
        request.response.ends.append(len(request.tokens))
        request.reward = chosen.reward
        request.attempts, request.best, request.best_attempt = 0, None, -1
        self.stats.committed_tokens += len(draw.tokens)
        if chosen.ended:
            self._finish(request, "stop")
        elif len(request.tokens) == self.config.max_new_tokens:
            self._finish(request, "length")

    def fail(self, request: Request, cause: str) -> None:
        """End a request with an error; what it has committed is kept."""
        if request.best is not None:
            self._roll_back([request.best], keep=None)
            request.best = None
        request.error, request.reward = cause, float("nan")
        self._finish(request, "error")

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request.leaf >= 0:
            self.policy.tree.release(request.leaf)
        request.leaf, request.leaf_logits, request.pending = -1, None, []
        self.reward.close(request.response)


def _after(request: Request) -> RowProcessor | None:
    """The request's logits processor, on top of what it has committed."""
    processor = request.processor
    return processor and (lambda drawn, logits: processor(request.tokens + drawn, logits))


class _Verdict(NamedTuple):
    """What the selection operator says of one request."""

    winner: int  # place in the request's group, or NONE, EARLIER, INVALID
    accepted: bool
    attempts: int
    best_attempt: int


def _known(base: float | None) -> float:
    assert base is not None, "r0 is set when a request is admitted"
    return base


def _empty_tables(groups: int, rows: int) -> tuple[torch.Tensor, ...]:
    """best_slots, best_len, trunk_slots, trunk_len, branch_slots, branch_len, keep: all without width."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return zeros(groups, 0), zeros(groups), zeros(groups, 0), zeros(groups), zeros(rows, 0), zeros(rows), zeros(rows)
