"""Scarce memory costs time, never a text, a request or a slot."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import make_requests, sum_reward, tiny_policy, tiny_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.inputs.job import Job
from stars_fast.loop.heartbeat import Loop
from stars_fast.loop.one_answer import OneAnswer
from stars_fast.loop.scheduler import Scheduler
from stars_fast.rewards import Reward
from stars_fast.rewards.callable import CallableReward

VOCAB = 32
PROMPTS = [[(5 * i + j * j) % (VOCAB - 1) for j in range(1 + i % 7)] for i in range(12)]
SEEDS = [100 + 7 * i for i in range(12)]
# Every other prompt accepts whatever it draws, and outgrows those that are still in a segment.
CONFIG = StarsConfig(
    segment_length=4, max_attempts=5, target_reward=[1.5, -50.0] * 6, beta=0.6, max_new_tokens=34, candidates=1
)
HARD = CONFIG.replace(target_reward=[50.0, -50.0] * 6)  # nothing but fallbacks for the others
FILTERED = dict(top_k=12, top_p=0.95, repetition_penalty=1.1, temperature=1.3)
TIGHT = dict(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=11, ignore_eos=True)
SCARCE = 60  # slots: little more than one request at its end, where twelve with two samples each would run


class Seen(Counter):
    """What happened inside the loop, with its promises checked as it runs."""

    def __init__(self, monkeypatch):
        super().__init__()
        for owner, name in ((Loop, "preempt"), (OneAnswer, "commit"), (Loop, "retreat"), (Loop, "propose")):
            monkeypatch.setattr(owner, name, self._watch(getattr(owner, name), getattr(self, name)))

    def _watch(self, method, look):
        def watched(owner, *args):
            look(owner, *args)
            return method(owner, *args)

        return watched

    def preempt(self, loop, request):
        assert request is loop.admitted[-1]
        self["preempted"] += 1
        self["with a best"] += request.best is not None
        self["in a segment"] += request.attempts > 0

    def commit(self, strategy, request, chosen, accepted):
        self["fallbacks encoded again"] += chosen.draw.node < 0

    def retreat(self, loop, large):
        self["retreats"] += 1

    def propose(self, loop):
        """Just before: the slots taken are those that the scheduler counts."""
        behind = sum(len(request.trunk.pending) for request in loop.encoding)
        prompts = {request.prompt for request in loop.encoding}
        behind += sum(len(prompt.ids) - prompt.encoded for prompt in prompts)
        assert loop.trunks.policy.tree.live_slots + behind == loop.scheduler.held(loop.admitted)
        self["most at once"] = max(self["most at once"], len(loop.running))


@pytest.fixture
def seen(monkeypatch):
    return Seen(monkeypatch)


@pytest.fixture(scope="module", params=["classifier", "callable"])
def kind(request):
    return request.param


def make_engine(kind, **limits):
    reward = sum_reward if kind == "callable" else tiny_reward(VOCAB, hidden=32)
    return StarsEngine(tiny_policy(VOCAB, hidden=32), reward, **limits)


def generate(engine, config=CONFIG, samples=2, **overrides):
    return engine.generate(PROMPTS, config, seed=SEEDS, num_return_sequences=samples, **overrides)


def assert_all_free(engine):
    trees = [engine.policy.tree]
    if (tree_model := getattr(engine.reward, "tree_model", None)) is not None:
        trees.append(tree_model.tree)
    assert all(tree.live_slots == tree.nodes == 0 for tree in trees)


def assert_same(out, plenty, rows=None):
    """Texts, traces, rewards and log-probabilities; as everywhere, rounding may flip one text in a hundred."""
    flipped = 0
    for row in range(len(plenty.completions)) if rows is None else rows:
        if out.completions[row] != plenty.completions[row]:
            flipped += 1
            continue
        ours, theirs = out.segments[row], plenty.segments[row]
        assert [s.tokens for s in ours] == [s.tokens for s in theirs]
        assert [(s.attempts, s.accepted) for s in ours] == [(s.attempts, s.accepted) for s in theirs]
        assert [s.reward for s in ours] == pytest.approx([s.reward for s in theirs], abs=1e-4)
        assert out.rewards[row] == pytest.approx(plenty.rewards[row], abs=1e-4)
        assert out.logprobs[row] == pytest.approx(plenty.logprobs[row], abs=1e-4)
        assert out.finish_reasons[row] == plenty.finish_reasons[row]
    assert flipped <= 1


@pytest.mark.parametrize(("candidates", "overrides"), [(1, {}), (1, FILTERED), (3, FILTERED), ("auto", {})], ids=str)
def test_a_request_that_was_preempted_goes_on_where_it_was(kind, seen, candidates, overrides):
    overrides = overrides | {"candidates": candidates}
    plenty = generate(make_engine(kind), **overrides)
    assert plenty.stats["preemptions"] == seen["preempted"] == 0
    engine = make_engine(kind, kv_cache_tokens=SCARCE)
    out = generate(engine, **overrides)
    assert out.errors == [None] * 24
    assert_same(out, plenty)
    assert out.stats["preemptions"] == seen["preempted"] > 10
    assert seen["in a segment"] > 0 and seen["retreats"] == 0
    if candidates == 1 and out.completions == plenty.completions:  # no candidate is drawn twice
        assert out.stats["policy_tokens"] == plenty.stats["policy_tokens"]
    assert out.stats["policy_tokens"] == out.stats["committed_tokens"] + out.stats["discarded_tokens"]
    assert_all_free(engine)


def test_a_fallback_may_have_been_drawn_before_its_request_was_preempted(kind, seen):
    plenty = generate(make_engine(kind), HARD)
    assert {row // 2 % 2 for row in range(24) if not any(s.accepted for s in plenty.segments[row])} == {0}
    engine = make_engine(kind, kv_cache_tokens=SCARCE)
    assert_same(generate(engine, HARD), plenty)
    assert seen["with a best"] > 0 and seen["fallbacks encoded again"] > 10
    assert_all_free(engine)


@pytest.mark.parametrize("segment_length, max_new_tokens", [(1, 9), (5, 13), (50, 12)])
def test_slots_are_counted_to_the_last_one(seen, segment_length, max_new_tokens):
    """From the fewest that one request needs up: nothing ever asks the tree for a slot it does not have."""
    config = CONFIG.replace(segment_length=segment_length, max_new_tokens=max_new_tokens)
    fewest = max(map(len, PROMPTS)) + config.chosen_method.slots(config)
    plenty = generate(make_engine("callable"), config, samples=1)
    for slots, candidates in itertools.product((fewest, fewest + 1, fewest + 7, 2 * fewest), (1, "auto")):
        engine = make_engine("callable", kv_cache_tokens=slots)
        assert_same(generate(engine, config, samples=1, candidates=candidates), plenty)
        assert_all_free(engine)
    assert seen["retreats"] == 0


def test_a_stream_reports_each_segment_once(kind):
    engine = make_engine(kind, kv_cache_tokens=SCARCE)
    events = list(engine.stream(PROMPTS, CONFIG, seed=SEEDS, num_return_sequences=2))
    out = generate(engine)
    assert out.stats["preemptions"] > 10
    for row, segments in enumerate(out.segments):
        assert [e.segment.tokens for e in events if e.index == row] == [segment.tokens for segment in segments]


def test_more_requests_run_at_once_than_have_room_to_their_end(seen):
    for slots in (80, 200):
        seen.clear()
        generate(make_engine("callable", kv_cache_tokens=slots))
        to_their_end = slots // CONFIG.chosen_method.slots(CONFIG)  # prompts not even counted
        assert seen["most at once"] >= 2 * to_their_end


class Open(CallableReward):
    """Notes how many responses it has scored and not been told to forget."""

    def begin(self, *args):
        super().begin(*args)
        self.responses, self.most = set(), 0

    def score(self, completions):
        self.responses |= {completion.response for completion in completions}
        self.most = max(self.most, len(self.responses))
        return super().score(completions)

    def close(self, response):
        self.responses.discard(response)


def test_a_scorer_has_no_more_responses_open_than_run(seen):
    reward = Open(sum_reward)
    generate(StarsEngine(tiny_policy(VOCAB, hidden=32), reward, kv_cache_tokens=SCARCE, max_rows=5))
    assert seen["preempted"] > 10 and 1 < reward.most <= 5


def test_an_engine_closed_in_the_middle_keeps_nothing(kind):
    engine = make_engine(kind, kv_cache_tokens=SCARCE)
    stream = engine.stream(PROMPTS, HARD, seed=SEEDS, num_return_sequences=2)
    for _ in range(30):
        next(stream)
    stream.close()
    assert_all_free(engine)


# Who comes first


def submit(engine, priority, prompt, **settings):
    call = engine.prepare(Arguments([prompt], CONFIG, {"target_reward": -50.0} | settings, seed=0))
    call.priority = priority
    job = Job(call, None)
    engine.core.submit(job)
    return job


def test_the_lower_priority_runs_first_and_the_older_of_equals():
    engine = make_engine("callable", max_rows=1)
    jobs = [submit(engine, priority, [5, 6]) for priority in (2, 0, 1, 0, 1)]
    over = []
    while engine.core.step():
        over += [i for i, job in enumerate(jobs) if job.over and i not in over]
    assert over + [i for i in range(5) if i not in over] == [1, 3, 2, 4, 0]


def test_who_gives_way_has_the_highest_number_and_of_those_is_the_youngest(monkeypatch):
    engine, gone = make_engine("callable", kv_cache_tokens=SCARCE), []
    preempt = Loop.preempt

    def watched(loop, request):
        others = [one for one in loop.running + loop.encoding if one is not request]
        assert all((one.priority, one.id) < (request.priority, request.id) for one in others)
        gone.append(request)
        preempt(loop, request)

    monkeypatch.setattr(Loop, "preempt", watched)
    jobs = [submit(engine, priority, [5, 6]) for priority in (1, 0, 1, 2)]
    while engine.core.step():
        pass
    plenty = make_engine("callable").generate([[5, 6]], CONFIG, seed=0, target_reward=-50.0).completions
    assert all(engine.output(job).completions == plenty for job in jobs)
    assert gone and gone[0] is jobs[3].requests[0] and jobs[1].requests[0] not in gone


def test_a_request_that_does_not_fit_alone_fails_by_name_and_others_go_on(monkeypatch):
    """Where memory, and no setting, says how many slots there are."""
    monkeypatch.setattr("stars_fast.loop.core.default_tokens", lambda *args: SCARCE)
    engine, prompts = make_engine("callable"), [[5, 6], [7] * SCARCE, [8]]
    plenty = make_engine("callable", kv_cache_tokens=500).generate(
        [[5, 6], [8]], CONFIG, seed=[1, 3], target_reward=1.5
    )
    out = engine.generate(prompts, CONFIG, seed=[1, 2, 3], target_reward=1.5)
    assert out.errors == [None, f"it does not fit into kv_cache_tokens={SCARCE} slots, even alone", None]
    assert [out.completions[0], out.completions[2]] == plenty.completions
    assert_all_free(engine)


def test_an_error_in_counting_slots_is_no_endless_loop(monkeypatch):
    monkeypatch.setattr(Scheduler, "admit", lambda *args: 0)
    engine = make_engine("callable")
    with pytest.warns(UserWarning, match="no request succeeded"):
        out = generate(engine)
    assert all("does not fit into kv_cache_tokens" in error for error in out.errors)
    assert_all_free(engine)


class Hidden(Reward):
    """A reward of hidden states, which fails where it is given none."""

    needs_hidden_state = True

    def score(self, completions):
        assert all(completion.hidden.shape == (32,) for completion in completions)
        return sum_reward([completion.tokens for completion in completions])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("segment_length", [1, 3, 5, 50])
def test_what_admission_counts_for_one_is_never_more_than_its_method_says(segment_length, whole):
    config = CONFIG.replace(segment_length=segment_length, max_new_tokens=13)
    (request,) = make_requests(config, 7, whole=whole)
    for _ in range(13):
        peak, alone = request.strategy.peak(request), config.chosen_method.slots(config)
        assert len(request.tokens) + request.strategy.branch(request) <= peak <= alone
        assert Scheduler(1, 7 + alone).admit([request], []) == 1
        request.tokens.append(1)


@pytest.mark.parametrize("method", ["stars", "cards", "args", "best_of_n", "particle_filter"])
@pytest.mark.filterwarnings("ignore:method=.* itself")
def test_the_fewest_slots_suffice_where_hidden_states_are_needed(monkeypatch, method):
    """A candidate's last token is encoded with it then."""
    monkeypatch.setattr(Loop, "retreat", lambda loop, tokens, cause: pytest.fail(cause))
    config, prompts = StarsConfig(**TIGHT, method=method), [[1, 2, 3, 4], [5]]
    slots = 4 + config.chosen_method.slots(config.chosen_method.rule(config))
    plenty = StarsEngine(tiny_policy(VOCAB, hidden=32), Hidden()).generate(prompts, config, seed=[1, 2])
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), Hidden(), kv_cache_tokens=slots)
    out = engine.generate(prompts, config, seed=[1, 2])
    assert out.errors == [None] * 2 and out.completions == plenty.completions
    assert_all_free(engine)
    few = StarsEngine(tiny_policy(VOCAB, hidden=32), Hidden(), kv_cache_tokens=slots - 1)
    with pytest.raises(ValueError, match=f"needs {slots} slots"):
        few.generate(prompts, config)


# Forward passes that run out of memory


def plant(monkeypatch, engine, fails):
    """The policy's forward pass raises where ``fails(call, ids)``, after it has written keys and values."""
    forward, calls = engine.policy.forward, itertools.count()

    def scarce(ids, positions, context, **kwargs):
        output = forward(ids, positions, context, **kwargs)
        if fails(next(calls), ids.tolist()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return output

    monkeypatch.setattr(engine.policy, "forward", scarce)


@pytest.mark.parametrize(
    "fails",
    [lambda call, ids: len(ids) > 5, lambda call, ids: call in (0, 25)],
    ids=["more than 5 tokens", "now and then"],
)
def test_a_forward_pass_that_runs_out_of_memory_changes_no_text(monkeypatch, kind, seen, fails):
    plenty = generate(make_engine(kind), candidates=3)
    engine = make_engine(kind, max_rows=50)
    plant(monkeypatch, engine, fails)
    out = generate(engine, candidates=3)
    assert out.errors == [None] * 24
    assert seen["retreats"] >= 2 and out.stats["preemptions"] > 24
    assert out.stats["policy_tokens"] == out.stats["committed_tokens"] + out.stats["discarded_tokens"]
    assert_same(out, plenty)
    assert_all_free(engine)


def test_only_the_request_that_does_not_fit_alone_fails(monkeypatch, kind):
    """A prompt with an id that no other text ever encodes."""
    prompts = [*PROMPTS[:3], [4, VOCAB - 1, 5], *PROMPTS[4:]]
    plenty = make_engine(kind).generate(prompts, CONFIG, seed=SEEDS)
    engine = make_engine(kind)
    plant(monkeypatch, engine, lambda call, ids: VOCAB - 1 in ids)
    out = engine.generate(prompts, CONFIG, seed=SEEDS)
    assert [row for row, error in enumerate(out.errors) if error is not None] == [3]
    assert "too little memory for this request alone" in out.errors[3] and "20.00 MiB" in out.errors[3]
    assert_same(out, plenty, rows=set(range(12)) - {3})
    assert_all_free(engine)


def test_who_waits_is_not_failed_for_a_pass_that_it_had_no_part_in(monkeypatch):
    """It may come before those that run, where it needs what they have not left."""
    engine = make_engine("callable", max_rows=1)
    runs = submit(engine, 1, [5])
    engine.core.step()
    engine.core.loop.scheduler.shrink(1, 1)  # nothing is left to halve
    waits = submit(engine, 0, [7])
    plant(monkeypatch, engine, lambda call, ids: call == 0)
    while engine.core.step():
        pass
    assert "too little memory for this request alone" in runs.requests[0].error
    assert waits.requests[0].error is None and len(waits.requests[0].tokens) > 0
    assert_all_free(engine)
