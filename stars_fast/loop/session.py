"""What is open while the core has callers: pools of one size, the loop over them, and how requests live in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from stars_fast.loop.caller import Size
from stars_fast.loop.chains import Chains
from stars_fast.loop.enumeration import Enumeration
from stars_fast.loop.guided import GuidedTrunks, SecondTree
from stars_fast.loop.heartbeat import Loop
from stars_fast.loop.navigating import Navigating
from stars_fast.loop.one_answer import OneAnswer
from stars_fast.loop.persona import SelfJudging
from stars_fast.loop.plans import Planning
from stars_fast.loop.population import Populations
from stars_fast.loop.request import Request, Strategy
from stars_fast.loop.rsd import Drafting
from stars_fast.loop.scheduler import Scheduler
from stars_fast.loop.stopping import Stopping
from stars_fast.loop.trials import Trials
from stars_fast.loop.trunks import Trunks
from stars_fast.policy.policy import Policy
from stars_fast.rewards.base import Reward
from stars_fast.tree.attention import plugged

_STRATEGIES: dict[str, type[OneAnswer]] = {
    "segments": OneAnswer,
    "trials": Trials,
    "chains": Chains,
    "population": Populations,
    "tokens": Enumeration,
    "persona": SelfJudging,
    "stopping": Stopping,
    "plans": Planning,
    "navigator": Navigating,
}


class Session:
    """Begins with the pools of both models and their plug-ins, and ends with them. It knows nothing of callers.

    A strategy comes with the first request that asks for it, and leaves with the last; so do trees of models that
    strategies have beside the policy.

    Parameters
    ----------
    policy : Policy
    reward : Reward
    tokenizer : transformers tokenizer, optional
        The policy's.
    scheduler : Scheduler
        The policy's pool, and those of models beside it, have its ``kv_cache_tokens``.
    size : Size
        What pools are made for.
    reward_tokens : int, optional
        Slots of the reward's trees, where the user has said.

    Attributes
    ----------
    loop : Loop
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        tokenizer: Any,
        scheduler: Scheduler,
        size: Size,
        reward_tokens: int | None,
    ) -> None:
        self.policy, self.reward, self.size, self._reward_tokens = policy, reward, size, reward_tokens
        self._strategies: dict[tuple[str, Policy | None, tuple[Policy, ...]], Strategy] = {}
        self._beside: dict[Policy, SecondTree] = {}
        self._uses: Counter[Strategy] = Counter()
        with ExitStack() as stack:
            policy.begin(scheduler.kv_cache_tokens, size.length, size.segment_length)
            stack.callback(policy.clear)
            stack.enter_context(plugged(policy.model))
            stack.callback(reward.end)
            self._begin_reward()
            self.loop = Loop(Trunks(policy, scheduler), reward, scheduler, tokenizer)
            self._stack = stack.pop_all()

    def _begin_reward(self) -> None:
        size = self.size
        self.reward.begin(size.prompts, size.max_new_tokens, size.rows, self._reward_tokens)
        self.reward.unsure = False

    def renew_reward(self) -> None:
        """Another session of the reward's, with nothing left in its trees; whose prompts it scores opens them anew."""
        self.reward.end()
        self._begin_reward()
        self.loop.counted = 0

    def close(self) -> None:
        with self._stack:  # closed whatever raises
            for strategy in self._strategies.values():
                strategy.leave()
            for tree in self._beside.values():
                tree.leave()

    def fits(self, size: Size, fixed: bool) -> bool:
        """Whether requests of this size find room; ``fixed``: no longer ones than the session was made for."""
        own = self.size
        in_use = [model for model in size.beside if model in self._beside]  # of others, the room is made yet
        return (
            size.slots <= self.loop.scheduler.kv_cache_tokens
            and (not fixed or (size.length <= own.length and size.segment_length <= own.segment_length))
            and all(model.has_room(size.length, size.segment_length) for model in (self.policy, *in_use))
            and self.reward.fits(size.prompts, size.max_new_tokens)
        )

    def assign(self, request: Request, size: Size) -> None:
        """Give a request its strategy, which it uses until it leaves."""
        request.strategy = self._strategy(request, size)
        self._uses[request.strategy] += 1

    def enter(self, requests: Sequence[Request]) -> None:
        """Let requests in that have strategies."""
        together: dict[Strategy, list[Request]] = {}
        for request in requests:
            together.setdefault(request.strategy, []).append(request)
        for strategy, group in together.items():
            strategy.enter(group)
        self.loop.submit(requests)

    def leave(self, request: Request) -> None:
        """A request that was assigned a strategy is out of the loop."""
        strategy = request.strategy
        self._uses[strategy] -= 1
        if not self._uses[strategy]:
            del self._uses[strategy]
            strategy.leave()
            self._strategies = {key: one for key, one in self._strategies.items() if one is not strategy}
            self.loop.strategies = list(self._strategies.values())
            used = {tree for one in self.loop.strategies for tree in one.trees}
            unused = [model for model, tree in self._beside.items() if tree not in used]
            for tree in [self._beside.pop(model) for model in unused]:
                tree.leave()

    def _strategy(self, request: Request, size: Size) -> Strategy:
        kind, draft, guides = key = request.terms.method.loop, request.terms.draft, request.terms.guides
        if key not in self._strategies:
            made: Strategy
            if draft is not None:
                made = Drafting(self.loop, self._second(draft, size))
            else:
                made = plain = _STRATEGIES[kind](self.loop)
                if guides:
                    plain.guide(GuidedTrunks(self.loop.trunks, [self._second(guide, size) for guide in guides]))
            self._strategies[key] = made
            self.loop.strategies = list(self._strategies.values())
        return self._strategies[key]

    def _second(self, model: Policy, size: Size) -> Trunks:
        """The tree of a model beside the policy, or the policy's own."""
        if model is self.policy:
            return self.loop.trunks
        if model not in self._beside:
            longest = max(self.size.length, size.length), max(self.size.segment_length, size.segment_length)
            self._beside[model] = SecondTree(model, self.loop.scheduler, *longest)
        return self._beside[model]
