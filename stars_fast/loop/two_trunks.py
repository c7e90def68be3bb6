"""What strategies share whose requests have a trunk more: in another model's tree, or under another prompt."""

from __future__ import annotations

from collections.abc import Sequence

from stars_fast.loop.one_answer import OneAnswer
from stars_fast.loop.queue import Queue
from stars_fast.loop.request import PromptNode, Request, Trunk
from stars_fast.loop.trunks import Trunks


class TwoTrunks(OneAnswer):
    """Keeps a second trunk of each request, where all that is committed is encoded, too.

    Parameters
    ----------
    queue : Queue
    drafts : Trunks
        Where the second trunks lie: drafts are drawn there.
    """

    judges_on_device = False

    def __init__(self, queue: Queue, drafts: Trunks) -> None:
        super().__init__(queue)
        self.drafts = drafts
        self._draft_trunks: dict[Request, Trunk] = {}
        self._nodes: dict[PromptNode, tuple[PromptNode, PromptNode]] = {}

    def both(self, prompt: PromptNode) -> tuple[PromptNode, PromptNode]:
        """What a request to this prompt stands on, in its own trunk and in the second."""
        raise NotImplementedError

    def enter(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.prompt not in self._nodes:
                self._nodes[request.prompt] = self.both(request.prompt)
            own, second = self._nodes[request.prompt]
            request.trunk, self._draft_trunks[request] = Trunk(own), Trunk(second)

    def preempt(self, request: Request) -> None:
        self.drafts.give_back(self._draft_trunks[request], request.tokens)
        super().preempt(request)

    def close(self, request: Request) -> None:
        self.drafts.give_back(self._draft_trunks.pop(request), request.tokens)
        if not any(other.prompt is request.prompt for other in self._draft_trunks):
            self._nodes.pop(request.prompt, None)
        super().close(request)

    def drop(self, request: Request) -> None:
        self.drafts.forget(self._draft_trunks[request], request.tokens)
        super().drop(request)
