"""Scarce memory costs time, never a text, a request or a slot."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.heartbeat import Loop
from stars_fast.loop.one_answer import OneAnswer
from stars_fast.policy.policy import Policy
from stars_fast.rewards.callable import CallableReward
from stars_fast.tree import memory

VOCAB = 32
PROMPTS = [[(5 * i + j * j) % (VOCAB - 1) for j in range(1 + i % 7)] for i in range(12)]
SEEDS = [100 + 7 * i for i in range(12)]
# Every other prompt accepts whatever it draws, and outgrows those that are still in a segment.
CONFIG = StarsConfig(
    segment_length=4, max_attempts=5, target_reward=[1.5, -50.0] * 6, beta=0.6, max_new_tokens=34, candidates=1
)
HARD = CONFIG.replace(target_reward=[50.0, -50.0] * 6)  # nothing but fallbacks for the others
FILTERED = dict(top_k=12, top_p=0.95, repetition_penalty=1.1, temperature=1.3)
SCARCE = 60  # slots: little more than one request at its end, where twelve with two samples each would run
GIB = 1 << 30


# The size of the pools


def test_pools_of_both_models_and_everything_else_fill_the_share_and_no_more():
    """Llama-2-7B with a reward model of its size, bfloat16, on 139 GiB."""
    total, weights, rows = 139 * GIB, 2 * 13 * GIB, 256
    token = 32 * 32 * (128 + 128) * 2
    workspace = memory.workspace_bytes(rows, 32000, 4096, 11008, 2) + memory.workspace_bytes(rows, 0, 4096, 11008, 2)
    for utilization in (0.3, 0.9, 1.0):
        tokens = memory.pool_tokens(total, weights, workspace, [token, token], utilization)
        used = weights + workspace + 2 * tokens * token
        assert used <= utilization * total < used + 2 * token
    assert 90_000 < memory.pool_tokens(total, weights, workspace, [token, token], 0.9) < 110_000


def test_a_device_that_is_full_already_has_room_for_no_tokens():
    assert memory.pool_tokens(100, 95, 0, [1], 0.9) == 0


def test_logits_and_activations_are_set_aside():
    assert memory.workspace_bytes(8, 1000, 0, 0, 2) == 8 * 1000 * 4 * 2
    assert memory.workspace_bytes(0, 1000, 64, 256, 2) == 16384 * (8 * 64 + 4 * 256) * 2
    assert memory.workspace_bytes(8, 1000, 64, 256, 2, 1024) == 8 * 1000 * 4 * 2 + 1024 * (8 * 64 + 4 * 256) * 2


def test_what_graphs_keep_to_themselves_is_counted():
    policy = Policy(tiny_policy(64, hidden=32))
    launched = memory._workspace(policy, 8)
    policy.graphs.enabled = True
    config = policy.model.config
    captured = memory.workspace_bytes(8, 64, 32, config.intermediate_size, 4, 1024)
    assert memory._workspace(policy, 8) == launched + captured


class FakeModel:
    """What the arithmetic asks of a tree model."""

    def __init__(self, device, bytes_per_token, slots=1):
        self.device, self.bytes_per_token, self.vocab_size = torch.device(device), bytes_per_token, 1000
        self.pool, self.dtype = SimpleNamespace(slots=slots), torch.bfloat16
        self.model = self.body = None
        self.graphs = SimpleNamespace(enabled=True)
        self.text_config = SimpleNamespace(hidden_size=64, intermediate_size=256)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 1 GiB with 200 MB of weights, on which the models' own pools are the only other thing."""
    models = []

    def free(device):
        return GIB - 200_000_000 - sum(m.pool.slots * m.bytes_per_token for m in models if m.device == device)

    monkeypatch.setattr(memory, "free_bytes", free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free(device), GIB))
    return models


def test_both_models_get_equally_many_tokens_however_often_a_device_is_divided(gpu):
    gpu += [FakeModel("cuda:0", 3000), FakeModel("cuda:0", 1000)]
    sizes = []
    for _ in range(3):
        memory.divide_devices(gpu, 8, 0.9)
        for model in gpu:
            model.pool.slots = memory.default_tokens(model, rows=10**6, tokens_per_row=100) + 1
            sizes.append(model.pool.slots)
            assert memory._bounds[model] + 1 == model.pool.slots  # not kept only because it is there
    assert len(set(sizes)) == 1
    used = 200_000_000 + sizes[0] * 4000 + sum(memory._workspace(model, 8) for model in gpu)
    assert 0.89 * GIB < used < 0.9 * GIB + 4000


def test_a_call_that_wants_less_takes_less_and_one_row_is_always_tried(gpu):
    gpu.append(FakeModel("cuda:0", 1000))
    memory.divide_devices(gpu, 8, 0.9)
    assert memory.default_tokens(gpu[0], rows=2, tokens_per_row=100) == 200
    memory.divide_devices(gpu, 8, 0.1)
    assert memory.default_tokens(gpu[0], rows=20, tokens_per_row=100) == 100


def test_devices_are_divided_one_by_one(gpu):
    gpu += [FakeModel("cuda:0", 1000), FakeModel("cuda:1", 1000)]
    memory.divide_devices(gpu, 8, 0.9)
    alone = memory.default_tokens(gpu[0], 10**6, 1)
    memory.divide_devices([gpu[0], FakeModel("cuda:0", 1000)], 8, 0.9)
    assert memory.default_tokens(gpu[1], 10**6, 1) == alone > 1.9 * memory.default_tokens(gpu[0], 10**6, 1)


def test_all_models_on_a_cpu_share_what_one_would_get(monkeypatch):
    models = [FakeModel("cpu", size) for size in (3000, 1000, 1000)]
    monkeypatch.setattr(
        memory, "free_bytes", lambda device: GIB - sum(m.pool.slots * m.bytes_per_token for m in models)
    )
    sizes = []
    for _ in range(2):
        memory.divide_devices(models, 8, 0.9)
        for model in models:
            model.pool.slots = memory.default_tokens(model, rows=10**6, tokens_per_row=100) + 1
        sizes.append([model.pool.slots for model in models])
    assert sizes[0] == sizes[1] == [sizes[0][0]] * 3
    assert 0.39 * GIB < sum(m.pool.slots * m.bytes_per_token for m in models) < 0.4 * GIB + 5000


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), True, "most"])
def test_a_share_of_memory_lies_between_nothing_and_everything(policy32, share):
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=.*\(0, 1\]"):
        StarsEngine(policy32, sum_reward, gpu_memory_utilization=share)


# Requests that outgrow the slots


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

    def retreat(self, loop, tokens, cause):
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


@pytest.mark.parametrize("candidates", [1, 3, "auto"])
@pytest.mark.parametrize("overrides", [{}, FILTERED], ids=["plain", "filtered"])
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
    assert seen["with a best"] > 3 and seen["fallbacks encoded again"] > 10
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
