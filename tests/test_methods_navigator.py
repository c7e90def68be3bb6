"""RL-of-Thoughts: the path is that of a plain loop, and what the policy is told stands in no answer."""

import math
import re

import pytest
import torch
from conftest import refused, sum_reward, tiny_policy, tiny_reward, tiny_tokenizer, word_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.queue import Queue
from stars_fast.methods import Guided, Navigator
from stars_fast.report.trace import load_trace
from stars_fast.rewards import Reward

VOCAB, EOS = 32, 31
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
BLOCKS = [[20, 21], [], [22], [23, 24, 25]]
QUESTIONS = [[14, 15], [16], [17, 18, 19]]
SCORES = [1, 2, 3]
CONFIG = StarsConfig(max_new_tokens=14)


class Network(torch.nn.Module):
    """Changes its mind often; the last block is chosen now and then."""

    def forward(self, scores):
        return (7 * scores.sum() + torch.arange(len(BLOCKS)) * torch.pi / 2).sin()


def navigator(**fields):
    named = dict(network=Network(), blocks=BLOCKS, questions=QUESTIONS, scores=SCORES, delimiter=None, longest=3)
    return Navigator(**named | {"steps": 4} | fields)


def make_engine(reward=sum_reward, policy=None, **limits):
    return StarsEngine(policy or tiny_policy(VOCAB, hidden=32), reward, **limits)


def generate(engine, prompts=PROMPTS, seed=(4, 5, 6), method=None, **overrides):
    return engine.generate(prompts, CONFIG, seed=list(seed), method=method or navigator(), **overrides)


@torch.no_grad()
def logits(policy, ids):
    return policy(torch.tensor([ids]), use_cache=False).logits[0, -1]


def plain_loop(policy, prompt, method, most):
    """Greedy decoding, one model call after the other: (block, scores, tokens) of each step."""
    context, steps, count, ended = list(prompt), [], 0, False
    while not ended:
        block, scores = len(BLOCKS) - 1, None
        if len(steps) + 1 < method.steps:
            rows = [logits(policy, context + list(question))[SCORES].softmax(0) for question in QUESTIONS]
            scores = torch.stack([row @ torch.tensor([1.0, 2.0, 3.0]) for row in rows])
            block = int(method.network(scores).argmax())
        context += BLOCKS[block]
        ended, tokens = block == len(BLOCKS) - 1, []
        while len(tokens) < method.longest and count < most and tokens[-1:] != [EOS]:
            tokens.append(int(logits(policy, context).argmax()))
            context, count = [*context, tokens[-1]], count + 1
        steps.append((block, scores, tokens))
        ended = ended or count == most or tokens[-1] == EOS
    return steps


def test_the_path_is_that_of_a_plain_loop():
    policy, method, met = tiny_policy(VOCAB, hidden=32), navigator(), set()
    out = generate(make_engine(), temperature=1e-6)
    for prompt, segments, completion in zip(PROMPTS, out.segments, out.completions, strict=True):
        expected = plain_loop(policy, prompt, method, CONFIG.max_new_tokens)
        assert [segment.tokens for segment in segments] == [tokens for _, _, tokens in expected]
        assert completion == [token for _, _, tokens in expected for token in tokens]
        for segment, (block, scores, _) in zip(segments, expected, strict=True):
            assert (segment.scaffold.block, segment.scaffold.tokens) == (block, BLOCKS[block])
            assert (segment.scaffold.state is None) == (scores is None)
            if scores is not None:
                assert segment.scaffold.state == pytest.approx(scores.tolist(), abs=1e-5)
            met.add(block)
    assert len(met) > 2, "the network chose hardly anything, and the loop proves little"


@torch.no_grad()
def read_plainly(policy, prompt, segments):
    """Logits of a plain pass over prompt, instructions and answer, at each token of the answer ``[T, V]``."""
    context, places = list(prompt), []
    for segment in segments:
        context += segment.scaffold.tokens
        places += range(len(context) - 1, len(context) - 1 + len(segment.tokens))
        context += segment.tokens
    return policy(torch.tensor([context]), use_cache=False).logits[0, places]


def assert_read_so(policy, prompt, out, row):
    laws = read_plainly(policy, prompt, out.segments[row]).log_softmax(1)
    expected = laws.gather(1, torch.tensor(out.completions[row])[:, None])[:, 0]
    assert out.logprobs[row] == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_text_depends_neither_on_neighbours_nor_on_rows_nor_on_slots(monkeypatch):
    """Nor does a pass ever lack slots: what is read before a step is drawn has its room."""
    monkeypatch.setattr(Queue, "retreat", lambda loop, large: pytest.fail(large.cause))
    reward, method = tiny_reward(VOCAB, hidden=32), navigator(n=3)
    together = generate(make_engine(reward), method=method, num_return_sequences=2)
    assert together.errors == [None] * 6 and together.stats["preemptions"] == 0
    for row in range(6):
        assert_read_so(tiny_policy(VOCAB, hidden=32), PROMPTS[row // 2], together, row)
    path = [[segment.scaffold.block for segment in segments] for segments in together.segments]
    with pytest.raises(ValueError, match="kv_cache_tokens") as few:
        generate(make_engine(kv_cache_tokens=1), [max(PROMPTS, key=len)], [0], method)
    slots = int(re.search(r"needs (\d+) slots", str(few.value))[1])
    for limits, overrides in (
        ({"max_rows": 2}, {}),
        ({}, {"candidates": 1}),
        ({"kv_cache_tokens": slots}, {"candidates": 2}),
        ({"kv_cache_tokens": 2 * slots}, {}),
    ):
        engine = make_engine(reward, **limits)
        out = generate(engine, method=method, num_return_sequences=2, **overrides)
        assert out.completions == together.completions
        assert [[segment.scaffold.block for segment in segments] for segments in out.segments] == path
        assert out.rewards == pytest.approx(together.rewards, abs=1e-4)
        assert engine.policy.tree.live_slots == engine.policy.tree.nodes == 0
    alone = [
        generate(make_engine(reward), [p], [s], method).completions for p, s in zip(PROMPTS, (4, 5, 6), strict=True)
    ]
    assert [one for (one,) in alone] == together.completions[::2]


def test_who_gives_way_reads_its_instructions_again_where_they_stood(monkeypatch):
    """Every request is preempted in every other heartbeat, some with a choice made and candidates waiting."""
    engine, method = make_engine(), navigator(n=4)
    expected, beats = generate(engine, method=method, candidates=1), []
    make_room = Queue.make_room

    def cramped(loop):
        beats.append(len(loop.running))
        if len(beats) % 2:
            for request in list(loop.running):
                loop.preempt(request)
        make_room(loop)

    monkeypatch.setattr(Queue, "make_room", cramped)
    out = generate(engine, method=method, candidates=1)
    assert out.stats["preemptions"] > 10
    assert out.stats["scaffold_tokens"] == expected.stats["scaffold_tokens"], "somebody was asked again"
    assert out.completions == expected.completions
    assert [len(row) for row in out.segments] == [len(row) for row in expected.segments]
    for row, prompt in enumerate(PROMPTS):
        assert_read_so(tiny_policy(VOCAB, hidden=32), prompt, out, row)


def test_guides_read_the_instructions_too():
    policy, method = tiny_policy(VOCAB, hidden=32), navigator(n=2)
    guided = Guided([(None, 0.5, lambda prompt: [1, 2, *prompt])], method=method)
    out = generate(make_engine(), method=guided)
    assert generate(make_engine(max_rows=2), method=guided, candidates=1).completions == out.completions
    for prompt, segments, ids, drawn in zip(PROMPTS, out.segments, out.completions, out.sampling_logprobs, strict=True):
        mix = read_plainly(policy, prompt, segments) + 0.5 * read_plainly(policy, [1, 2, *prompt], segments)
        expected = mix.log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert drawn == pytest.approx(expected.tolist(), abs=1e-4)


def test_instructions_are_in_no_text_and_the_reward_never_sees_them(tmp_path):
    """The policy itself cannot write the ids that instructions are made of."""
    policy, told = tiny_policy(VOCAB, hidden=32), {token for block in BLOCKS for token in block}
    head, seen = policy.lm_head.forward, []
    policy.lm_head.forward = lambda hidden: head(hidden).index_fill(-1, torch.tensor(sorted(told)), -math.inf)

    def reward(completions, completion_ids):
        seen.extend(completion_ids)
        return sum_reward(completion_ids)

    engine = make_engine(reward, policy, tokenizer=tiny_tokenizer(VOCAB))
    blocks, questions = ([" ".join(f"w{i}" for i in ids) for ids in texts] for texts in (BLOCKS, QUESTIONS))
    method = navigator(n=2, blocks=blocks, questions=questions, scores=["w1", "w2", "w3"])
    out = generate(engine, method=method, trace=True)
    assert {block for row in out.segments for block in [s.scaffold.block for s in row]} > {3}
    assert not told & {token for ids in [*out.completions, *seen] for token in ids}
    assert not {f"w{token}" for token in told} & {word for text in out.texts for word in text.split()}
    assert out.sequences[1].tolist()[: 1 + len(out.completions[1])] == PROMPTS[1] + out.completions[1]
    out.save_trace(tmp_path / "trace.jsonl")
    for record, row in zip(load_trace(tmp_path / "trace.jsonl"), out.segments, strict=True):
        assert [s["scaffold"]["tokens"] for s in record["segments"]] == [s.scaffold.tokens for s in row]
    events = list(engine.stream(PROMPTS, CONFIG, seed=[4, 5, 6], method=method))
    assert ["".join(e.text for e in events if e.index == row) for row in range(3)] == out.texts
    assert out.stats["policy_tokens"] == out.stats["committed_tokens"] + out.stats["discarded_tokens"]
    told_tokens = sum(len(s.scaffold.tokens) for row in out.segments for s in row)
    asked = sum(s.scaffold.state is not None for row in out.segments for s in row) * sum(map(len, QUESTIONS))
    assert out.stats["scaffold_tokens"] == told_tokens + asked


def test_the_last_block_ends_an_answer_and_so_do_steps_length_and_eos():
    def always(block):
        return lambda scores: torch.arange(4.0) == block

    engine, plenty = make_engine(), dict(max_new_tokens=40, ignore_eos=True)
    once = generate(engine, method=navigator(network=always(3)), **plenty)
    assert [[s.scaffold.block for s in row] for row in once.segments] == [[3]] * 3
    all_steps = generate(engine, method=navigator(network=always(0)), **plenty)
    assert [[s.scaffold.block for s in row] for row in all_steps.segments] == [[0, 0, 0, 3]] * 3
    assert once.finish_reasons == all_steps.finish_reasons == ["stop"] * 3
    short = generate(engine, method=navigator(network=always(0)), max_new_tokens=7, ignore_eos=True)
    assert short.finish_reasons == ["length"] * 3 and [len(ids) for ids in short.completions] == [7] * 3
    eos = generate(engine, method=navigator(network=always(0), steps=30), max_new_tokens=60)
    assert any(ids[-1] == EOS and len(row) < 30 for ids, row in zip(eos.completions, eos.segments, strict=True))


def test_a_step_ends_with_its_delimiter():
    engine = make_engine(word_reward, tokenizer=tiny_tokenizer(VOCAB))
    out = generate(engine, method=navigator(delimiter="w2", longest=6, steps=9), max_new_tokens=40)
    assert out.errors == [None] * 3
    ends = {2, *range(20, 30)}  # w2 is in w20 to w29 too
    for row in out.segments:
        for segment in row:
            assert not ends & set(segment.tokens[:-1])
            assert segment.tokens[-1] in ends or len(segment.tokens) == 6 or segment is row[-1]


def test_a_network_that_fails_costs_the_requests_that_asked_it_alone():
    def network(scores):
        if scores[0] > threshold:
            raise RuntimeError("too much")
        return torch.arange(4.0).neg()

    threshold = math.inf
    sound = generate(make_engine(), method=navigator(network=network))
    firsts = sorted(row[0].scaffold.state[0] for row in sound.segments)
    threshold = (firsts[-2] + firsts[-1]) / 2
    engine = make_engine()
    with pytest.warns(UserWarning, match="requests failed"):
        out = generate(engine, method=navigator(network=network, steps=2))
    failed = [row[0].scaffold.state[0] > threshold for row in sound.segments]
    assert sum(failed) == 1 and [error is not None for error in out.errors] == failed
    assert "method='navigator' raised RuntimeError: too much" in out.errors[failed.index(True)]
    assert engine.policy.tree.nodes == 0
    with pytest.warns(UserWarning, match="no request succeeded"):
        wrong = generate(engine, method=navigator(network=lambda scores: scores))
    assert all("must be 4 numbers, one per block" in error for error in wrong.errors)


def test_logits_that_are_not_finite_end_a_request_by_name():
    policy = tiny_policy(VOCAB, hidden=32)
    engine = make_engine(policy=policy)
    with torch.no_grad():
        policy.lm_head.weight.fill_(math.nan)
    with pytest.warns(UserWarning, match="no request succeeded"):
        out = generate(engine)
    assert all("the policy's logits are not finite" in error for error in out.errors)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(network=3), ["network=3"]),
        (dict(blocks="abc"), ["blocks='abc'"]),
        (dict(scores=[1]), ["scores", "at least 2"]),
        (dict(scores=[1, -2]), [r"scores\[1\]=-2"]),
        (dict(questions=[[1], 2.5]), [r"questions\[1\]=2.5"]),
        (dict(steps=0), ["steps=0"]),
    ],
    ids=str,
)
def test_parameters_are_checked_by_name(fields, words):
    with refused("navigator", *words):
        navigator(**fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(network=None), ["navigator", "network"]),
        (dict(blocks=[[3], [VOCAB]]), [r"blocks\[1\]", str(VOCAB)]),
        (dict(scores=[1, 40, 3]), [r"scores\[1\]", "40"]),
        (dict(scores=[1, 1]), ["scores", "differ"]),
        (dict(questions=[[3], []]), [r"questions\[1\]"]),
        (dict(blocks=["w1"]), ["tokenizer="]),
        (dict(steps=100), [r"prompts\[0\]", "scaffold", "256"]),
    ],
    ids=str,
)
def test_a_call_that_cannot_be_is_refused_before_any_work(idle, fields, words):
    with refused(*words):
        idle.generate([[1]], CONFIG, method=navigator(**fields))


def test_candidates_are_compared_only_by_a_reward_of_unfinished_text():
    class Whole(Reward):
        partial = False

        def score(self, completions):
            assert all(completion.finished for completion in completions)
            return [0.0] * len(completions)

    engine = make_engine(Whole())
    assert generate(engine).errors == [None] * 3
    with refused("n=2", "partial=False"):
        generate(engine, method=navigator(n=2))
