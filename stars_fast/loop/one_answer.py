"""The plain way to live in the loop: one answer grows, a segment at a time, and the first accepted candidate wins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from stars_fast.loop.guided import GuidedTrunks
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import Candidate, Drawn, PromptNode, Request, Tree, Trunk
from stars_fast.loop.selection import Verdict, first_accepted, traced
from stars_fast.loop.trunks import Trunks
from stars_fast.ops.select_and_commit import GOES_ON, INVALID, NONE, STOP
from stars_fast.outputs import Cause, SegmentTrace
from stars_fast.policy.leaf import Draw, Leaf, RowProcessor
from stars_fast.policy.policy import Policy
from stars_fast.rewards.base import Completion, Response, Reward
from stars_fast.text.media import written_before


class OneAnswer:
    """stars, vanilla, cards, blockwise best-of-n, and the pilots of a calibration.

    Parameters
    ----------
    queue : Queue
        Who runs, and what all strategies share: the policy's tree, the reward, the scheduler.
    """

    judges_on_device = True

    def __init__(self, queue: Queue) -> None:
        self.queue, self.scheduler, self.reward = queue, queue.scheduler, queue.reward
        self.trunks: Trunks | GuidedTrunks = queue.trunks
        self.trees: Sequence[Tree] = ()

    def guide(self, trunks: GuidedTrunks) -> None:
        """Candidates are drawn with these guides, from now on."""
        self.trunks = trunks
        self.trees = [tree for tree in dict.fromkeys(trunks.guides) if tree is not trunks.own]

    def enter(self, requests: Sequence[Request]) -> None:
        pass

    def leave(self) -> None:
        pass

    # Rows and slots

    def rows(self, request: Request) -> int:
        return 1

    def prompts(self, request: Request) -> Sequence[PromptNode]:
        return (request.prompt,)

    def held(self, request: Request) -> int:
        waits = request.best is not None and request.best.draw.node >= 0
        return len(request.tokens) + (self.branch(request) if waits else 0)

    def branch(self, request: Request) -> int:
        """A candidate's last token is encoded once it is committed, unless its hidden state is needed."""
        return request.room - (not request.terms.whole)

    def peak(self, request: Request) -> int:
        return len(request.tokens) + 2 * self.branch(request) + (not request.terms.whole)

    def beside(self, request: Request) -> list[tuple[Tree, PromptNode]]:
        return self.trunks.beside(request.prompt)

    # Drawing

    def due(self, request: Request) -> list[tuple[Tree, Trunk]]:
        return self.trunks.due(request.trunk)

    def attempts_there_are(self, request: Request) -> int:
        return request.terms.config.max_attempts

    def asks(self, requests: Sequence[Request], rows: int) -> list[tuple[Request, int]]:
        limits = [self.attempts_there_are(request) - request.attempts for request in requests]
        spare = self.scheduler.spare(self.queue.admitted)
        return list(zip(requests, self.scheduler.candidates(requests, limits, rows, spare), strict=True))

    def draw(self, requests: Sequence[Request], rows: int) -> Drawn:
        return {}

    def leaf(
        self,
        answer: Request,
        candidates: int,
        first: int = 0,
        trunk: Trunk | None = None,
        trunks: Trunks | None = None,
    ) -> Leaf:
        """What the answer contributes to a proposal: so many candidates, from the ``first`` not looked at on."""
        terms, trunk = answer.terms, trunk or answer.trunk
        assert trunk.logits is not None
        beside = [(one.leaf, one.logits) for one in trunk.beside if one.logits is not None]
        assert len(beside) == len(trunk.beside)
        return Leaf(
            node=trunk.leaf,
            logits=trunk.logits,
            sampling=terms.sampling,
            key=answer.key,
            segment=len(answer.segments),
            first_attempt=answer.attempts + first,
            candidates=candidates,
            length=answer.room,
            seen=self._seen(answer, (trunks or self.trunks).policy),
            processor=after(answer),
            entropy=terms.segments.entropy,
            shortest=terms.segments.shortest,
            beside=beside,
            weights=terms.weights,
        )

    def _seen(self, answer: Request, policy: Policy) -> torch.Tensor | None:
        if answer.terms.sampling.repetition_penalty == 1.0:
            return None
        size = policy.logit_size  # prompts may hold ids that cannot be written
        seen = torch.zeros(size, dtype=torch.bool, device=policy.device)
        seen[[token for token in written_before(answer.prompt) + answer.tokens if token < size]] = True
        return seen

    def candidate(
        self, answer: Request, draw: Draw, trunks: Trunks | None = None, trunk: Trunk | None = None
    ) -> Candidate:
        """Cut a draw at its delimiter, stop string or criterion, so that it is scored as it would be returned.

        What these raise is the candidate's error.
        """
        answer.terms.stats.policy_tokens += len(draw.tokens)
        answer.terms.stats.calibration_tokens += len(draw.tokens) * answer.terms.pilot
        ended, eos, error = draw.ended, draw.ended, draw.error
        try:
            if (length := self._step(answer, draw.tokens)) < len(draw.tokens):
                draw.cut(length)
                (trunks or self.trunks).trim(trunk or answer.trunk, draw)
                ended, eos = False, False
            if answer.stop is not None:
                for length in range(1, len(draw.tokens) + 1):
                    if answer.stop(answer.tokens + draw.tokens[:length]):
                        ended, eos = True, eos and length == len(draw.tokens)
                        draw.cut(length)
                        break
        except Exception as raised:
            error = error or Cause.of(raised)
        length = len(answer.tokens) + len(draw.tokens)
        finished = ended or length == answer.terms.config.max_new_tokens
        completion = Completion(answer.response, draw.tokens, finished, eos, self.queue.tokenizer)
        return Candidate(answer, draw, completion, ended, error=error)

    def _step(self, answer: Request, tokens: list[int]) -> int:
        """Tokens up to and including the one that completes the delimiter; all of them where none does."""
        delimiter, tokenizer = answer.terms.segments.delimiter, self.queue.tokenizer
        if delimiter is not None:
            assert isinstance(tokenizer, PreTrainedTokenizerBase)
            if delimiter in tokenizer.decode(tokens):
                for length in range(1, len(tokens)):
                    if delimiter in tokenizer.decode(tokens[:length]):
                        return length
        return len(tokens)

    # Judging

    def looks_in_order(self, answer: Request) -> bool:
        return answer.target < math.inf

    def asks_reward(self, candidate: Candidate) -> bool:
        return candidate.answer.terms.method.scores_unfinished or candidate.completion.finished

    def judge(self, requests: Sequence[Request], drawn: Drawn, rewards: torch.Tensor | None) -> None:
        groups = [drawn[request] for request in requests]
        verdicts = self.verdicts(requests, groups, rewards)
        bests, dropped = list[Candidate | None](), list[Candidate]()
        for request, group, verdict in zip(requests, groups, verdicts, strict=True):
            if request.terms.trace:
                request.looked_at = traced(request, group, verdict)
            best = request.best
            if verdict.winner >= 0:
                best = group[verdict.winner]
            elif verdict.winner != INVALID and verdict.best_attempt >= request.attempts:
                best = group[verdict.best_attempt - request.attempts]
            dropped += [one for one in (*group, request.best) if one is not None and one is not best]
            bests.append(best)
        self.roll_back(dropped)  # of all requests at once, before anything is committed
        for request, group, verdict, best in zip(requests, groups, verdicts, bests, strict=True):
            if verdict.winner == INVALID:
                culprit = group[verdict.attempts - request.attempts - 1]
                self.queue.fail(request, culprit.error or "a candidate could not be scored")
                continue
            request.attempts, request.best, request.best_attempt = verdict.attempts, best, verdict.best_attempt
            if verdict.winner != NONE:
                assert best is not None
                self.commit(request, best, verdict.accepted)
                request.terms.stats.committed_tokens += len(best.draw.tokens) * (not request.terms.pilot)
                if verdict.finish != GOES_ON:
                    self.queue.finish(request, "stop" if verdict.finish == STOP else "length")

    def verdicts(
        self, requests: Sequence[Request], groups: Sequence[Sequence[Candidate]], rewards: torch.Tensor | None
    ) -> list[Verdict]:
        """What becomes of each request's candidates."""
        return first_accepted(requests, groups, rewards)

    def roll_back(self, candidates: Sequence[Candidate]) -> None:
        """Release the branches of candidates that are not committed."""
        self.trunks.release([one.draw for one in candidates])
        for candidate in candidates:
            self.queue.tell(candidate.answer, self.queue.reward.discard, candidate.completion)

    def commit(self, answer: Request, chosen: Candidate, accepted: bool) -> None:
        """The chosen branch becomes the answer's leaf; its last token waits for the next heartbeat's forward pass.

        All its tokens do where the branch was given up for room.
        """
        draw = chosen.draw
        self.queue.tell(answer, self.queue.reward.commit, chosen.completion)
        self.grow(answer, chosen)
        self.queue.committed += len(draw.tokens)
        threshold = chosen.threshold if answer.search is None else answer.search.threshold  # when it was looked at last
        trace = (draw.tokens, chosen.reward, threshold, answer.attempts, accepted, sum(draw.logprobs))
        answer.segments.append(SegmentTrace(*trace, chosen.parts, answer.looked_at or None, answer.scaffold))
        answer.tokens.extend(draw.tokens)
        answer.logprobs += draw.logprobs
        answer.sampling_logprobs += draw.sampling_logprobs
        answer.response.ends.append(len(answer.tokens))
        answer.reward = chosen.reward
        answer.attempts, answer.best, answer.best_attempt, answer.looked_at, answer.scaffold = 0, None, -1, [], None

    def commit_untested(self, answer: Request, chosen: Candidate, accepted: bool = True) -> None:
        """Commit what the selection was not asked about."""
        self.commit(answer, chosen, accepted)
        if chosen.ended or not answer.room:
            self.queue.finish(answer, "stop" if chosen.ended else "length")

    def grow(self, answer: Request, chosen: Candidate) -> None:
        """The trunks follow what is committed."""
        self.trunks.grow(answer.trunk, chosen.draw)

    # Giving way and ending

    def give_back(self, request: Request) -> int:
        """A fallback encodes its tokens again."""
        if request.best is None or request.best.draw.node < 0:
            return 0
        self.roll_back_branch(request.best)
        return self.branch(request)

    def roll_back_branch(self, candidate: Candidate) -> None:
        """Forget the keys and values of a candidate, not its tokens."""
        self.trunks.release([candidate.draw])
        candidate.draw.node, candidate.draw.beside = -1, []

    def preempt(self, request: Request) -> None:
        self.give_back(request)
        self.trunks.give_back(request.trunk, request.context)
        self.reopen(request)

    def reopen(self, answer: Request) -> None:
        """The scorer forgets the answer: a response that waits does not grow."""
        self.queue.tell(answer, self.queue.reward.close, answer.response)
        answer.response = Response(answer.prompt.reward_prompt, list(answer.tokens), ends=list(answer.response.ends))
        if answer.best is not None:
            answer.best.completion.response = answer.response

    def forked(self, request: Request, response: Response) -> Response:
        """A response that goes on from this one; where the scorer cannot, the request ends."""
        try:
            return self.reward.fork(response)
        except Exception as error:
            self.reward.unsure = True
            self.queue.broken[request] = Cause.of(error, "the reward's fork raised ")
            return Reward.fork(self.reward, response)

    def close(self, request: Request) -> None:
        if request.best is not None:
            self.give_back(request)
            self.queue.tell(request, self.queue.reward.discard, request.best.completion)
            request.best = None
        self.trunks.give_back(request.trunk, request.context)
        self.queue.tell(request, self.queue.reward.close, request.response)

    def drop(self, request: Request) -> None:
        request.attempts, request.best, request.best_attempt, request.looked_at = 0, None, -1, []
        self.trunks.forget(request.trunk, request.context)
        self.reopen(request)


def after(answer: Request) -> RowProcessor | None:
    """The answer's logits processor, on top of what it has committed."""
    processor = answer.processor
    return processor and (lambda drawn, logits: processor(answer.tokens + drawn, logits))
