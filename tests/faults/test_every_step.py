"""Every step of a call raises once, or from some moment on: what one request brings costs that one, a bug may end the
call, and nothing is left.

A fixed part runs by default. All of it: ``STARS_FAST_FAULTS=all pytest tests/faults``, or so many of each, drawn at
random: ``STARS_FAST_FAULTS=500``.
"""

import importlib
import itertools
import os
import random
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_policy, tiny_reward, tiny_tokenizer

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods import RSD, Guided, Mara, MetropolisHastings, Navigator, PersonaJudge
from stars_fast.tree.model import TreeModel
from stars_fast.tree.segment_tree import SegmentTree, SlotsExhausted

VOCAB = 32
PROMPTS = [[10 + i, 3, 4 + i] for i in range(8)]
DRAFT, NETWORK = tiny_policy(VOCAB, hidden=32, seed=7), torch.nn.Linear(32, 2)
NAVIGATOR, TOLD = torch.nn.Linear(2, 2), dict(blocks=[[20, 21], [22]], questions=[[14, 15], [16]], scores=[1, 2])
METHODS = {
    "stars": dict(),
    "best_of_n": dict(method="best_of_n", max_attempts=3),
    "particle_filter": dict(method="particle_filter"),
    "metropolis_hastings": dict(method=MetropolisHastings(steps=3), candidates=2),
    "args": dict(method="args"),
    "mara": dict(method=Mara(mlp=NETWORK, top_k=6)),
    "guided": dict(method=Guided([(DRAFT, 0.5), (None, -0.3, lambda ids: [7, *ids])], method="stars")),
    "rsd": dict(method=RSD(draft=DRAFT, delimiter=None, longest=4, threshold=0.5)),
    "persona_judge": dict(method=PersonaJudge(draft_prompt=[4, 5], judge_prompt=[6])),
    "navigator": dict(method=Navigator(network=NAVIGATOR, n=2, steps=3, longest=4, delimiter=None, **TOLD)),
}
CONFIG = StarsConfig(target_reward=1.0, segment_length=4, max_attempts=4, max_new_tokens=12, beta=0.6, ignore_eos=True)

ERRORS = {
    "ValueError": lambda: ValueError("planted"),
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("planted"),
    "SlotsExhausted": lambda: SlotsExhausted("planted"),
    "MemoryError": lambda: MemoryError("planted"),
    "allocator": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: planted"),
    "bug": lambda: AssertionError("planted"),
}
CALLS = (1, 2, 5, 12)


class Step(NamedTuple):
    """What is made to raise, and whose failure that is."""

    where: str  # module:object.attribute, or a hook of the call
    whose: str = "all"  # "one": a request's own; "call": refused before it begins


STEPS = {
    # the policy
    "prefill": Step("stars_fast.policy.policy:Policy.prefill"),
    "propose": Step("stars_fast.policy.policy:Policy.propose"),
    "last tokens": Step("stars_fast.policy.policy:Policy.finish_branches"),
    "enumerate": Step("stars_fast.policy.policy:Policy.fork_tokens"),
    "read": Step("stars_fast.policy.policy:Policy.read"),
    "decode step": Step("stars_fast.policy.steps:Steps.forward"),
    "draw": Step("stars_fast.policy.steps:Steps.draw"),
    "draw of a mix": Step("stars_fast.policy.mixed:MixedSteps.draw_of"),
    "sample_step": Step("stars_fast.policy.steps:sample_step"),
    # both models
    "extend": Step("stars_fast.tree.model:TreeModel.extend"),
    "forward": Step("stars_fast.tree.model:TreeModel.forward"),
    "plan": Step("stars_fast.tree.model:plan"),
    "table of slots": Step("stars_fast.tree.segment_tree:_sections"),
    "kv_append": Step("stars_fast.tree.attention:kv_append"),
    "tree_attention": Step("stars_fast.tree.attention:tree_attention"),
    "head": Step("torch.nn:Linear.forward"),
    # the tree
    "tree plan": Step("stars_fast.tree.segment_tree:SegmentTree.plan"),
    "tree retain": Step("stars_fast.tree.segment_tree:SegmentTree.retain", "one"),  # the reward's, in commit and close
    "tree cut": Step("stars_fast.tree.segment_tree:SegmentTree.cut", "one"),
    "tree release": Step("stars_fast.tree.segment_tree:SegmentTree.release", "one"),
    "tree release_all": Step("stars_fast.tree.segment_tree:SegmentTree.release_all"),
    # the loop
    "admit": Step("stars_fast.loop.scheduler:Scheduler.admit"),
    "select_and_commit": Step("stars_fast.loop.selection:select_and_commit"),
    "grow": Step("stars_fast.loop.trunks:Trunks.append"),
    "note": Step("stars_fast.loop.heartbeat:Loop.note"),
    # the reward
    "reward open": Step("stars_fast.rewards.base_rendered:RenderedReward.open", "call"),
    "reward read_ahead": Step("stars_fast.rewards.base_rendered:RenderedReward.read_ahead"),
    "reward score": Step("stars_fast.rewards.classifier:ClassifierReward.score"),
    "reward encode": Step("stars_fast.rewards.cache:TreeCache.encode"),
    "reward commit": Step("stars_fast.rewards.base_rendered:RenderedReward.commit", "one"),
    "reward discard": Step("stars_fast.rewards.base_rendered:RenderedReward.discard", "one"),
    "reward close": Step("stars_fast.rewards.base_rendered:RenderedReward.close", "one"),
    "reward fork": Step("stars_fast.rewards.base_rendered:RenderedReward.fork", "one"),
    "reward fork_at": Step("stars_fast.rewards.base_rendered:RenderedReward.fork_at", "one"),
    "reward forget": Step("stars_fast.rewards.base_rendered:RenderedReward.forget"),
    # what a request brings
    "values": Step("stars_fast.methods.base:Method.values", "one"),
    "values of args": Step("stars_fast.methods.args_mara:Args.values", "one"),
    "network": Step("stars_fast.methods.args_mara:Mara.values", "one"),
    "navigator": Step("stars_fast.methods.navigator:Navigator.action", "one"),
    "select": Step("stars_fast.methods.particles:ParticleFilter.select", "one"),
    "log_ratio": Step("stars_fast.methods.metropolis:MetropolisHastings.log_ratio", "one"),
    "stop test": Step("stop", "one"),
    "logits processor": Step("processor", "one"),
    "decode": Step("decode", "one"),
    # who looks on
    "on_heartbeat": Step("on_heartbeat"),
}


class Fault:
    """Raises at its n-th call; at all from there on, if it lasts."""

    def __init__(self, error, at, lasts=False):
        self.error, self.at, self.lasts, self.calls = error, at, lasts, 0

    @property
    def met(self):
        return self.calls >= self.at

    def __call__(self):
        self.calls += 1
        if self.calls == self.at or (self.lasts and self.met):
            raise ERRORS[self.error]()

    def around(self, function):
        def faulty(*args, **kwargs):
            self()
            return function(*args, **kwargs)

        return faulty


@contextmanager
def planted(engine, step, fault):
    """Arguments of the call in which the step is faulty."""
    hooks = {"stop": lambda row: fault.around(lambda ids: False), "processor": lambda row: fault.around(lambda a, b: b)}
    if step.where in hooks:
        yield {step.where: hooks[step.where]}
    elif step.where == "on_heartbeat":
        engine.on_heartbeat = fault.around(lambda heartbeat: None)
        yield {}
        engine.on_heartbeat = None
    else:
        if step.where == "decode":
            owner, name = engine.tokenizer, "decode"
        else:
            module, _, names = step.where.partition(":")
            *owners, name = names.split(".")
            owner = importlib.import_module(module)
            for one in owners:
                owner = getattr(owner, one)
        before = getattr(owner, name)
        setattr(owner, name, fault.around(before))
        try:
            yield {}
        finally:
            setattr(owner, name, before)


class Place:
    """An engine that is held open, so that what is left in its trees stays there to be seen."""

    def __init__(self, method):
        self.engine = StarsEngine(tiny_policy(VOCAB, hidden=32), tiny_reward(VOCAB, hidden=32))
        self.engine.tokenizer = self.engine.core.tokenizer = tiny_tokenizer(VOCAB)
        self.config = CONFIG.replace(stop_strings="w1 w2 w3", **METHODS[method])
        self.engine.core.hold(self.engine.prepare(self.arguments()).size)
        self.expected = self.run()
        assert self.expected.errors == [None] * len(PROMPTS)
        self.check_nothing_left()

    def arguments(self, **given):
        return Arguments(PROMPTS, self.config, seed=3, **given)

    def run(self, **given):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.engine.run(self.arguments(**given))

    def check_nothing_left(self):
        core, reward = self.engine.core, self.engine.reward
        assert not core.open_calls and not core._caller_of and core._turns._holder is None
        loop = core.loop
        assert loop is not None and not (loop.strategies or loop.waiting or loop.admitted or loop.broken)
        assert not reward._contexts
        for cache in reward.caches:
            assert not (cache._runs or cache._prefixes or cache._responses or cache._completions)
        for model in {self.engine.policy, *self.engine._guides, *reward.tree_models}:
            model.prefixes.clear()
            assert (model.tree.nodes, model.tree.free_slots) == (0, model.tree.capacity - 1)

    def check_works(self):
        out = self.run()
        assert (out.completions, out.errors) == (self.expected.completions, [None] * len(PROMPTS))
        self.check_nothing_left()

    def check(self, step, error, at, lasts=False):
        """Plant it, and look at what comes of the call and of the next. Returns (whether it was met, rows lost)."""
        fault, out = Fault(error, at, lasts), None
        with planted(self.engine, step, fault) as given:
            try:
                out = self.run(**given)
            except Exception as raised:
                meant = step.whose == "call" or error == "bug"
                if not (fault.met and meant and "planted" in str(raised)):
                    raise
        if out is None:
            lost = len(PROMPTS)
        else:
            lost = sum(error is not None for error in out.errors)
            self.check_output(out)
            if not lasts:
                assert lost <= (step.whose == "one"), out.errors
        self.check_nothing_left()
        if fault.met:
            self.check_works()
        return fault.met, lost

    def check_output(self, out):
        """Whoever has no error has its text; whoever has one has the beginning of it, and all where it had ended."""
        for row, (ids, error) in enumerate(zip(out.completions, out.errors, strict=True)):
            whole = self.expected.completions[row]
            assert ids == whole[: len(ids)], (row, error)
            if out.finish_reasons[row] == "error":
                assert "planted" in error and out.rewards[row] != out.rewards[row]
            else:
                assert ids == whole and out.rewards[row] == pytest.approx(self.expected.rewards[row], abs=1e-5)
                assert out.finish_reasons[row] == self.expected.finish_reasons[row]
                assert error is not None or out.texts[row] == self.expected.texts[row]


@pytest.fixture(scope="module")
def places():
    made = {}

    def check(method, step, *fault):
        """In an engine that other faults have met before, unless one of them has spoilt it, or left it smaller passes:
        with one token a pass, the next lack of memory is a request's end.
        """
        place = made.pop(method, None) or Place(method)
        met, _ = place.check(STEPS[step], *fault)
        scheduler = place.engine.core.loop.scheduler
        if (scheduler.max_rows, scheduler.prefill_tokens) == scheduler._most:
            made[method] = place
        else:
            place.engine.close()
        if not met:
            pytest.skip("the call has fewer of these steps")

    yield check
    for one in made.values():
        one.engine.close()


REFUSED = ("logits processor", "persona_judge")
ONCE = [case for case in itertools.product(STEPS, ERRORS, CALLS, METHODS) if case[::3] != REFUSED]
LASTING = [case for case in ONCE if case[1] in ("ValueError", "OutOfMemoryError") and case[2] in (2, 12)]
WANTED = os.environ.get("STARS_FAST_FAULTS")


def some(cases, count):
    """So many of the cases, in which the steps come equally often; all of them, or as many as are asked for."""
    if WANTED == "all":
        return cases
    cases, met, chosen = random.Random(0).sample(cases, len(cases)), Counter(), []
    while len(chosen) < min(count if WANTED is None else int(WANTED), len(cases)):
        least = min(met[step] for step in STEPS)
        case = next(one for one in cases if one not in chosen and met[one[0]] == least)
        chosen.append(case)
        met[case[0]] += 1
    return chosen


@pytest.mark.parametrize("step, error, at, method", some(ONCE, len(STEPS)))
def test_a_step_that_raises_once_costs_at_most_the_request_whose_it_is(places, step, error, at, method):
    places(method, step, error, at)


@pytest.mark.parametrize("step, error, at, method", some(LASTING, len(STEPS) // 2))
def test_a_step_that_goes_on_raising_leaves_whole_what_had_ended(places, step, error, at, method):
    places(method, step, error, at, True)


@pytest.mark.parametrize(
    "method, step, error",
    [
        pytest.param("particle_filter", "tree release_all", "OutOfMemoryError", id="for ever, a round lost at its end"),
        pytest.param("stars", "tree release", "ValueError", id="in later calls, an empty answer without a reward"),
    ],
)
def test_what_goes_on_raising_does_not_go_on(places, method, step, error):
    places(method, step, error, 2, True)


@pytest.mark.parametrize("leak", [(TreeModel, "release"), (SegmentTree, "release_all")])
def test_a_planted_leak_is_seen(monkeypatch, leak):
    """A branch that is not released, once."""
    place = Place("stars")
    owner, name = leak
    release, lost = getattr(owner, name), []

    def leaky(tree, nodes):
        if lost or nodes in (-1, []):
            release(tree, nodes)
        else:
            lost.append(nodes)

    monkeypatch.setattr(owner, name, leaky)
    place.run()
    assert lost
    with pytest.raises(AssertionError):
        place.check_nothing_left()
