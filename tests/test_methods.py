"""Every method keeps the engine's promises."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward, tiny_tokenizer

from stars_fast import StarsConfig, StarsEngine
from stars_fast.loop.heartbeat import Loop
from stars_fast.methods import (
    METHODS,
    RSD,
    Args,
    BestOfN,
    BlockwiseBestOfN,
    Cards,
    Mara,
    MetropolisHastings,
    OptimalStopping,
    ParticleFilter,
    PersonaJudge,
    Plans,
    PowerSampling,
    RejectionSampling,
    Stars,
    TreeBoN,
    Vanilla,
)
from stars_fast.rewards import Reward

VOCAB = 32
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
SEEDS = [4, 5, 6]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=11)
NETWORK = torch.nn.Linear(32, 2)
EVERY = {
    "vanilla": Vanilla(),
    "plans": Plans(children=2, delimiter=None, longest=3),
    "best_of_n": BestOfN(n=3),
    "rejection_sampling": RejectionSampling(),
    "metropolis_hastings": MetropolisHastings(steps=4),
    "power_sampling": PowerSampling(alpha=2.0, steps=4),
    "stars": Stars(),
    "cards": Cards(entropy=2.0, shortest=2, longest=6),
    "blockwise_best_of_n": BlockwiseBestOfN(n=3),
    "optimal_stopping": OptimalStopping(budget=2.5),
    "args": Args(top_k=4),
    "treebon": TreeBoN(n=4, branching=2, layers=3),
    "particle_filter": ParticleFilter(particles=3),
    "rsd": RSD(draft=tiny_policy(VOCAB, hidden=32, seed=7), delimiter=None, longest=4),
    "mara": Mara(mlp=NETWORK),
    "persona_judge": PersonaJudge(draft_prompt=[3, 4], judge_prompt=[1, 2, 3], block=3),
}


class Sums(Reward):
    """A reward of ids that is no plain function, so that ARGS takes it too."""

    def score(self, completions):
        return sum_reward([completion.tokens for completion in completions])


def make_engine(reward=None, **limits):
    return StarsEngine(tiny_policy(VOCAB, hidden=32), reward or Sums(), **limits)


def generate(engine, method, prompts=PROMPTS, seed=SEEDS, **overrides):
    settings = {"num_return_sequences": 2, "method": method} | overrides
    return engine.generate(prompts, CONFIG, seed=seed, **settings)


def assert_all_free(engine):
    trees = [engine.policy.tree] + ([engine._drafts.tree] if engine._drafts else [])
    if getattr(engine.reward, "tree_model", None) is not None:
        trees.append(engine.reward.tree_model.tree)
    assert all(tree.live_slots == tree.nodes == 0 for tree in trees)


@pytest.fixture(scope="module", params=EVERY)
def method(request):
    return EVERY[request.param]


@pytest.fixture(scope="module")
def together(method):
    """Two texts of each prompt in one call, scored by a classifier."""
    engine = make_engine(tiny_reward(VOCAB, hidden=32))
    out = generate(engine, method)
    assert out.errors == [None] * 6
    assert_all_free(engine)
    return out


def test_every_name_has_a_method():
    assert list(METHODS) == list(EVERY)
    assert all(type(EVERY[name]) is METHODS[name] and METHODS[name].name == name for name in METHODS)


def test_texts_end_at_eos_or_the_limit_and_say_so(method, together):
    assert {"length"} <= set(together.finish_reasons) <= {"length", "stop"}
    for completion, reason, segments in zip(
        together.completions, together.finish_reasons, together.segments, strict=True
    ):
        assert (completion[-1] == VOCAB - 1) == (reason == "stop") and len(completion) <= CONFIG.max_new_tokens
        assert VOCAB - 1 not in completion[:-1]
        assert reason == "stop" or len(completion) == CONFIG.max_new_tokens
        assert [token for segment in segments for token in segment.tokens] == completion
        if isinstance(method, Stars):
            assert all(len(segment.tokens) == CONFIG.segment_length for segment in segments[:-1])
    stats = together.stats
    twice = sum(len(own[0].tokens) for own in together.segments[1::2]) if isinstance(method, Plans) else 0
    assert stats["committed_tokens"] == sum(map(len, together.completions)) - twice
    assert stats["policy_tokens"] == stats["committed_tokens"] + stats["discarded_tokens"]


@torch.no_grad()
def test_rewards_and_logprobs_are_those_of_plain_forward_passes(method, together):
    policy, reward = tiny_policy(VOCAB, hidden=32), tiny_reward(VOCAB, hidden=32)
    for row, completion in enumerate(together.completions):
        prompt = PROMPTS[row // 2]
        hidden = reward.model(torch.tensor([prompt + completion]), use_cache=False).last_hidden_state[0, -1]
        assert together.rewards[row] == pytest.approx(reward.score(hidden).item(), abs=1e-4)
        context = list(method.judge_prompt) + prompt if isinstance(method, PersonaJudge) else prompt
        logprobs = policy(torch.tensor([context + completion]), use_cache=False).logits[0].log_softmax(1)
        expected = [logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(completion)]
        if isinstance(method, RSD):  # the policy does not read its drafts before it has to
            drafted = [segment.accepted for segment in together.segments[row] for _ in segment.tokens]
            assert [math.isnan(logprob) for logprob in together.logprobs[row]] == drafted
            expected = [math.nan if draft else e for draft, e in zip(drafted, expected, strict=True)]
        assert together.logprobs[row] == pytest.approx(expected, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("limits", [{}, {"max_rows": 2}], ids=str)
def test_the_text_does_not_depend_on_the_neighbours_or_on_the_rows(method, together, limits):
    engine = make_engine(tiny_reward(VOCAB, hidden=32), **limits)
    alone = [generate(engine, method, [p], [seed]).completions for p, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert list(itertools.chain(*alone)) == together.completions
    assert_all_free(engine)


def test_a_stream_tells_the_same_text_segment_by_segment(method, together):
    engine = make_engine(tiny_reward(VOCAB, hidden=32))
    events = list(engine.stream(PROMPTS, CONFIG, seed=SEEDS, num_return_sequences=2, method=method))
    for row, completion in enumerate(together.completions):
        mine = [event for event in events if event.index == row]
        assert [token for event in mine for token in event.segment.tokens] == completion
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [together.finish_reasons[row]]


def test_few_slots_suffice_and_change_nothing(method, together):
    with pytest.raises(ValueError, match="kv_cache_tokens") as refused:
        generate(make_engine(kv_cache_tokens=1), method, prompts=[max(PROMPTS, key=len)], seed=0)
    slots = int(re.search(r"needs (\d+) slots", str(refused.value))[1])
    engine = make_engine(tiny_reward(VOCAB, hidden=32), kv_cache_tokens=slots)
    assert generate(engine, method).completions == together.completions
    assert_all_free(engine)
    with pytest.raises(ValueError, match="kv_cache_tokens"):
        generate(make_engine(kv_cache_tokens=slots - 1), method)


def test_one_request_by_itself_finds_the_slots_that_it_was_given(method):
    """Pools are made for the call: one prompt and one sample, or one row at a time, is all that they have room for."""
    alone, rowwise = make_engine(), make_engine(max_rows=1)
    one = {"num_return_sequences": 1}
    assert generate(alone, method, PROMPTS[:1], SEEDS[:1], **one).errors == [None]
    assert generate(rowwise, method, PROMPTS, SEEDS, **one).errors == [None] * 3


@pytest.mark.parametrize("method", [ParticleFilter(particles=16), BestOfN(n=16)], ids=["population", "trials"])
@pytest.mark.parametrize("reward", [None, "hidden"])
def test_populations_shrink_until_passes_fit(monkeypatch, method, reward):
    """Every pass of more than three tokens runs out of memory: three halvings of what is drawn at once."""
    engine = make_engine(reward and Hidden())
    plenty = generate(engine, method, PROMPTS[:1], SEEDS[:1])
    forward = engine.policy.forward

    def scarce(ids, *args, **kwargs):
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(engine.policy, "forward", scarce)
    out = generate(engine, method, PROMPTS[:1], SEEDS[:1])
    assert out.errors == [None] * 2 and out.completions == plenty.completions
    assert_all_free(engine)


def test_a_pass_that_runs_out_of_memory_changes_no_text(monkeypatch, method, together):
    engine, calls, retreats = make_engine(tiny_reward(VOCAB, hidden=32)), itertools.count(), []
    forward, retreat = engine.policy.forward, Loop.retreat

    def scarce(*args, **kwargs):
        output = forward(*args, **kwargs)
        if next(calls) in (0, 6):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    monkeypatch.setattr(engine.policy, "forward", scarce)
    monkeypatch.setattr(Loop, "retreat", lambda loop, large: retreats.append(large.cause) or retreat(loop, large))
    assert generate(engine, method).completions == together.completions
    assert retreats
    assert_all_free(engine)


def test_extensions_launched_ahead_change_no_text(monkeypatch, method, together):
    engine, ahead = make_engine(tiny_reward(VOCAB, hidden=32)), []
    monkeypatch.setattr(engine.core, "ahead", True)
    extend = Loop.extend_ahead
    monkeypatch.setattr(Loop, "extend_ahead", lambda loop: ahead.append(len(loop.running)) or extend(loop))
    out = generate(engine, method)
    assert out.completions == together.completions and any(ahead)
    assert out.stats["committed_tokens"] == together.stats["committed_tokens"]
    assert_all_free(engine)


class FailsFor(Sums):
    """Raises for answers to one of the prompts."""

    def score(self, completions):
        if any(completion.response.prompt.index == 1 for completion in completions):
            raise RuntimeError("no")
        return super().score(completions)


@pytest.mark.filterwarnings("ignore:the reward raised")
def test_a_request_that_fails_does_not_cost_the_others_theirs(method):
    sound, engine = generate(make_engine(), method), make_engine(FailsFor())
    out = generate(engine, method)
    assert [error is not None for error in out.errors] == [False, False, True, True, False, False]
    assert [out.completions[row] for row in (0, 1, 4, 5)] == [sound.completions[row] for row in (0, 1, 4, 5)]
    assert_all_free(engine)


def test_logits_that_are_not_finite_end_a_request_with_an_error(method):
    engine = make_engine()
    with torch.no_grad():
        engine.policy.model.lm_head.weight.fill_(float("nan"))
    out = generate(engine, method)
    if isinstance(method, RSD):  # whose drafts are sound: only the policy's own steps fail
        assert {error for error in out.errors} <= {None, "the policy's logits are not finite"}
    else:
        assert all("the policy's logits are not finite" in error for error in out.errors)
    assert_all_free(engine)


def test_a_closed_stream_keeps_nothing(method):
    engine = make_engine(tiny_reward(VOCAB, hidden=32))
    stream = engine.stream(PROMPTS, CONFIG, seed=SEEDS, method=method)
    next(stream)
    stream.close()
    assert_all_free(engine)


def test_stop_strings_end_an_answer(method):
    tokenizer = tiny_tokenizer(VOCAB)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), Sums(), tokenizer=tokenizer)
    out = generate(engine, method, stop_strings=["w2", "w7", "w9", "w11"])
    assert "stop" in out.finish_reasons
    stops = {2, 7, 9, 11, *range(20, 30), VOCAB - 1}  # w2 is in w20 to w29 too
    for completion, reason in zip(out.completions, out.finish_reasons, strict=True):
        assert not stops & set(completion[:-1]) and (completion[-1] in stops) == (reason == "stop")


SIDE_BY_SIDE = ("best_of_n", "rejection_sampling", "metropolis_hastings", "power_sampling", "cards")


@pytest.mark.parametrize("name", [*SIDE_BY_SIDE, "blockwise_best_of_n", "mara"])
def test_what_is_drawn_side_by_side_does_not_change_the_text(name):
    texts = [generate(make_engine(), EVERY[name], candidates=count).completions for count in (1, 2, "auto")]
    assert texts[0] == texts[1] == texts[2]


# What is scored


class Finished(Sums):
    """Fails on unfinished answers."""

    partial = False

    def score(self, completions):
        assert all(completion.finished for completion in completions)
        return super().score(completions)


ITEM = (
    "vanilla",
    "plans",
    "best_of_n",
    "rejection_sampling",
    "metropolis_hastings",
    "power_sampling",
    "mara",
    "persona_judge",
)


@pytest.mark.parametrize("name", ITEM)
def test_methods_for_whole_answers_never_score_unfinished_ones(name):
    out = generate(make_engine(Finished()), EVERY[name], target_reward=None)
    assert out.errors == [None] * 6 and out.rewards == pytest.approx(sum_reward(out.completions))


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(ITEM)))
def test_the_others_refuse_a_reward_that_makes_sense_at_the_end_only(name):
    instead = f"{', '.join(ITEM)} and navigator score finished ones only"
    with pytest.raises(ValueError, match=f"method='{name}' scores unfinished answers.*Finished.*; {instead}"):
        generate(make_engine(Finished()), EVERY[name])


class Hidden(Sums):
    """A reward of hidden states, which it compares with a plain forward pass."""

    needs_hidden_state = True

    @torch.no_grad()
    def score(self, completions):
        for completion in completions:
            ids = torch.tensor([completion.response.prompt.ids + completion.tokens])
            expected = tiny_policy(VOCAB, hidden=32).model(ids, use_cache=False).last_hidden_state[0, -1]
            assert torch.allclose(completion.hidden, expected, atol=1e-4)
        return super().score(completions)

    def parts(self, completion):
        return {"length": float(len(completion.tokens)), "twice": 2.0 * len(completion.tokens)}


@pytest.mark.parametrize("name", ["stars", "cards", "best_of_n", "metropolis_hastings", "args", "particle_filter"])
def test_a_reward_sees_the_policys_hidden_state_and_may_tell_its_parts(name):
    engine = make_engine(Hidden())
    out, plain = generate(engine, EVERY[name]), generate(make_engine(), EVERY[name])
    assert out.errors == [None] * 6 and out.completions == plain.completions
    assert_all_free(engine)
    for completion, segments in zip(out.completions, out.segments, strict=True):
        assert segments[-1].parts == {"length": len(completion), "twice": 2 * len(completion)}
    assert all(segment.parts is None for segments in plain.segments for segment in segments)


@pytest.mark.parametrize("name", ["rsd", "persona_judge"])
def test_a_reward_of_hidden_states_is_refused_where_the_policy_has_not_read_what_is_scored(name):
    with pytest.raises(ValueError, match=f"method='{name}' .*Hidden needs the policy's hidden state"):
        generate(make_engine(Hidden()), EVERY[name])


LARGEST = 2**31 - 1


@pytest.mark.parametrize(
    "method, as_large",
    [
        (Cards(shortest=LARGEST, longest=LARGEST), {"shortest": 99, "longest": 99}),
        (Args(top_k=LARGEST), {"top_k": VOCAB}),
        (Mara(top_k=LARGEST, mlp=NETWORK), {"top_k": VOCAB}),
        (TreeBoN(layers=LARGEST), {"layers": 99}),
        (PersonaJudge([1], [2], block=LARGEST), {"block": 99}),
        (RSD(tiny_policy(VOCAB), longest=LARGEST, delimiter=None), {"longest": 99}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_lengths_beyond_the_answer_and_tops_beyond_the_vocabulary_cost_nothing(policy32, reward32, method, as_large):
    engine = StarsEngine(policy32, reward32)
    out = engine.generate(PROMPTS, CONFIG.replace(method=method), seed=SEEDS)
    like = engine.generate(PROMPTS, CONFIG.replace(method=dataclasses.replace(method, **as_large)), seed=SEEDS)
    assert out.errors == [None] * 3 and out.completions == like.completions
