"""A weighted sum is the sum of its parts, each of which lives as if it were alone."""

import math

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward
from histories import assert_engine_agrees, fresh, ids_prompts, live

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import (
    CallableReward,
    ClassifierReward,
    Completion,
    HiddenStateProbe,
    ImplicitReward,
    Response,
    Reward,
    RewardPrompt,
    RuleReward,
    WeightedSum,
)
from stars_fast.rewards.base import score_each

VOCAB = 32
PROMPTS = [[5, 6, 7, 8, 9], [12]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.0, beta=0.6, max_new_tokens=12)


@torch.no_grad()
def log_ratio(pair, prompt, answer):
    logprobs = [m(torch.tensor([prompt + answer]), use_cache=False).logits[0].log_softmax(-1) for m in pair]
    return sum((logprobs[0] - logprobs[1])[len(prompt) + k - 1, token].item() for k, token in enumerate(answer))


class Counted(Reward):
    """Counts segments in the state that the protocol lets it keep."""

    def score(self, completions):
        for completion in completions:
            completion.state = (completion.response.state or 0) + 1
        return [float(completion.state) for completion in completions]

    def commit(self, completion):
        completion.response.state = completion.state

    def fork(self, response):
        twin = super().fork(response)
        twin.state = response.state
        return twin


@pytest.fixture(scope="module")
def pair():
    return tiny_policy(VOCAB, seed=2), tiny_policy(VOCAB, seed=3)


def test_every_part_is_exact_after_any_history(reward32, pair):
    other = tiny_reward(VOCAB, seed=7)
    parts = [
        (1.0, ClassifierReward(reward32)),
        (-0.5, ClassifierReward(other, tail=[3, 4])),
        (0.3, ImplicitReward(*pair)),
        (0.1, Counted()),
    ]
    scorer = WeightedSum(parts)

    def expected(completion):
        prompt, tokens = completion.response.prompt.ids, completion.tokens
        ended = tokens[:-1] if completion.eos else tokens
        values = {
            "ClassifierReward": fresh(reward32, prompt + tokens),
            "ClassifierReward_2": fresh(other, prompt + ended + [3, 4]),
            "ImplicitReward": log_ratio(pair, prompt, tokens),
            "Counted": len(completion.response.ends) + 1,
        }
        assert scorer.parts(completion) == pytest.approx(values, abs=1e-4)
        return sum(weight * value for (weight, _), value in zip(parts, values.values(), strict=True))

    def draw(chance):
        return [chance.randrange(VOCAB - 1) for _ in range(chance.randint(1, 4))]

    live(scorer, ids_prompts(PROMPTS), expected, draw=draw, eos=VOCAB - 1, rounds=8)
    assert len(scorer.tree_models) == 4


@pytest.mark.parametrize("slots", [None, 40])
def test_the_engine_is_guided_by_the_sum(policy32, reward32, pair, slots):
    scorer = WeightedSum({"liked": (0.5, ClassifierReward(reward32)), "aligned": (0.2, ImplicitReward(*pair))})
    engine = StarsEngine(policy32, scorer, kv_cache_tokens=slots)

    def expected(i, tokens, ends, eos):
        return 0.5 * fresh(reward32, PROMPTS[i] + tokens) + 0.2 * log_ratio(pair, PROMPTS[i], tokens)

    out = assert_engine_agrees(engine, PROMPTS, CONFIG, expected, num_return_sequences=4)
    assert out.stats["reward_tokens"] == scorer.tokens > 0
    assert bool(out.stats["preemptions"]) == (slots is not None)


def one(tokens=(1, 2)):
    return Completion(Response(RewardPrompt(0, [1], [1])), list(tokens))


class Returns(Reward):
    def __init__(self, value):
        self.value = value

    def score(self, completions):
        return [self.value] * len(completions)


def test_a_part_that_fails_fails_the_completion_by_name_unless_it_only_records():
    for value, said in ((None, "returned None"), (math.nan, "returned nan"), (math.inf, "returned inf")):
        scorer = WeightedSum({"bad": (0.0, Returns(1.0)), "good": (2.0, Returns(value))})
        (failed,) = score_each(scorer, [one()])
        assert math.isnan(failed[0]) and f"good: the reward {said}" in failed[1]
        scorer = WeightedSum({"good": (2.0, Returns(1.5)), "bad": (0.0, Returns(value))})
        assert scorer.score([completion := one()]) == [3.0]
        assert math.isnan(scorer.parts(completion)["bad"])
    assert WeightedSum([(2.0, Returns(-math.inf)), (1.0, Returns(5.0))]).score([one()]) == [-math.inf]


class Asked(Reward):
    """Returns what stands in the first token's place; remembers which completions each call held."""

    def __init__(self, values, partial=True):
        self.values, self.partial, self.calls = values, partial, []

    def score(self, completions):
        self.calls.append([completion.segment[0] for completion in completions])
        return [self.values[completion.segment[0]] for completion in completions]

    def commit(self, completion):
        completion.response.state = self.values[completion.segment[0]]


def test_one_bad_completion_costs_the_others_nothing():
    first, second = Asked([1.0, 2.0, 3.0]), Asked([1.0, None, 3.0])
    scorer = WeightedSum({"a": (1.0, first), "b": (10.0, second)})
    scores = score_each(scorer, [one((i,)) for i in range(3)])
    assert [value for value, error in scores if error is None] == [11.0, 33.0]
    assert scores[1][1] == "the reward raised ValueError: b: the reward returned None"
    assert first.calls == second.calls == [[0, 1, 2]]


def test_a_sum_is_unsure_once_a_part_is_until_it_begins_anew(reward32):
    class Broken(Reward):
        broken = True

        def score(self, completions):
            if self.broken:
                raise ValueError("no")
            return [0.0] * len(completions)

    part, (prompt,) = Broken(), ids_prompts(PROMPTS[:1])
    reward = WeightedSum([(1.0, ClassifierReward(reward32)), (1.0, WeightedSum([(1.0, part)]))])
    for part.broken in (True, False):
        reward.begin([prompt], 4, 1, None)
        reward.unsure = False  # as the engine says of it
        reward.open([prompt], 4)
        reward.score([Completion(Response(prompt), [1])])
        assert reward.unsure == part.broken
        reward.end()


def test_parts_are_not_asked_what_is_rejected_already():
    rule, model = Asked([0.0, -math.inf]), Asked([1.0, 2.0])
    scorer = WeightedSum({"rule": (1.0, rule), "model": (1.0, model)})
    kept, rejected = one((0,)), one((1,))
    assert scorer.score([kept, rejected]) == [1.0, -math.inf]
    assert model.calls == [[0]]
    assert scorer.parts(rejected)["rule"] == -math.inf and math.isnan(scorer.parts(rejected)["model"])
    scorer.commit(kept)
    assert [own.state for own in kept.response.state] == [0.0, 1.0]
    scorer.commit(rejected)  # as the best of those that are all rejected
    assert [own.state for own in rejected.response.state] == [-math.inf, None]


def test_a_rejection_of_negative_weight_is_an_error_with_the_parts_name():
    scorer = WeightedSum({"rule": (-0.5, Returns(-math.inf)), "other": (1.0, Returns(-math.inf))})
    ((value, error),) = score_each(scorer, [one()])
    assert math.isnan(value) and "rule: it returned -inf to reject, of which its weight -0.5" in error


def test_a_part_that_only_records_finished_answers_leaves_the_sum_partial():
    final = Asked([5.0], partial=False)
    scorer = WeightedSum({"guide": (1.0, Returns(1.0)), "final": (0.0, final)})
    assert scorer.partial
    begun, done = one((0,)), one((0,))
    done.finished = True
    assert scorer.score([begun, done]) == [1.0, 1.0]
    assert math.isnan(scorer.parts(begun)["final"]) and scorer.parts(done)["final"] == 5.0


def test_it_asks_for_what_its_parts_ask_for():
    final = RuleReward(predicates={len: 1.0}, partial=False)
    probe = HiddenStateProbe(torch.nn.Linear(4, 1))
    assert WeightedSum([(1.0, Returns(0))]).partial and not WeightedSum([(1.0, Returns(0)), (1.0, final)]).partial
    assert WeightedSum([(1.0, probe), (1.0, Returns(0))]).needs_hidden_state
    watched = WeightedSum({"guide": (1.0, Returns(0)), "text": (0.0, CallableReward(len))})
    assert not watched.reads_text, "a part that is only watched misleads nobody"
    watched.weights = {"text": 1.0}
    assert watched.reads_text
    completion = one()
    completion.hidden = torch.ones(4)
    scorer = WeightedSum([(1.0, probe)])
    with torch.no_grad():
        assert scorer.score([completion]) == pytest.approx(probe.probe(torch.ones(1, 4))[0].tolist())


def test_parts_that_began_are_ended_where_another_cannot_begin(policy32, reward32, monkeypatch):
    first, second = CallableReward(sum_reward), ClassifierReward(reward32, tail=[3] * 300)
    monkeypatch.setattr(second, "check", lambda *_: None)
    last = ClassifierReward(tiny_reward(VOCAB, seed=7))
    engine = StarsEngine(policy32, WeightedSum([(1.0, first), (1.0, second), (1.0, last)]))
    with pytest.raises(ValueError, match=r"prompts\[0\].*positions limit"):
        engine.generate(PROMPTS, CONFIG)
    assert [part._calls for part in (first, second, last)] == [0, 0, 0]


def test_sums_that_cannot_be_are_refused(policy32, reward32):
    scorer = Returns(1.0)
    with pytest.raises(ValueError, match="parts is empty"):
        WeightedSum([])
    with pytest.raises(TypeError, match="part 'a' is a function"):
        WeightedSum({"a": (1.0, sum_reward)})
    with pytest.raises(ValueError, match="part 'Returns': weight=nan"):
        WeightedSum([(math.nan, scorer)])
    with pytest.raises(ValueError, match="given twice"):
        WeightedSum([(1.0, scorer), (2.0, scorer)])
    with pytest.raises(ValueError, match=r"32 embeddings, fewer than the 40 ids"):
        StarsEngine(tiny_policy(40), WeightedSum([(1.0, ClassifierReward(reward32))]))


def test_a_candidate_whose_response_came_back_without_its_state_is_committed_to_it():
    """That is how a request gives its memory back while its best candidate waits."""
    scorer, completion = WeightedSum([(1.0, Counted())]), one()
    scorer.score([completion])
    scorer.close(completion.response)
    completion.response = Response(completion.response.prompt)
    scorer.commit(completion)
    assert scorer.score([Completion(completion.response, [3])]) == [2.0]


def test_a_prompt_that_one_part_refuses_is_forgotten_by_the_parts_before_it():
    first, last = ClassifierReward(tiny_reward(VOCAB, seed=7)), CallableReward(lambda completions, answer: 0)
    scorer, prompts = WeightedSum([(1.0, first), (1.0, last)]), ids_prompts(PROMPTS)
    scorer.begin(prompts, 8, 8, None)
    with pytest.raises(ValueError, match="'answer'"):
        scorer.open(prompts, 8)
    assert not first._contexts and not first.caches[0]._runs
    scorer.end()


def test_weights_are_set_by_name_between_calls_and_tell_one_sum_from_another():
    final = Asked([5.0], partial=False)
    scorer = WeightedSum({"guide": (1.0, Returns(2.0)), "final": (0.0, final)})
    before = scorer.described
    scorer.weights = {"guide": 3.0}
    assert scorer.weights == {"guide": 3.0, "final": 0.0} and scorer.score([one()]) == [6.0] and scorer.partial
    assert scorer.described != before and "3 guide (Returns)" in scorer.described
    scorer.weights = {"final": 1.0}
    assert not scorer.partial
    for weights, named in ({"guid": 1.0}, "'guid'; there are guide, final"), ({"guide": math.nan}, "'guide': weight"):
        with pytest.raises(ValueError, match=named):
            scorer.weights = weights
    scorer.begin([], 1, 1, None)
    with pytest.raises(RuntimeError, match="between calls"):
        scorer.weights = {"guide": 1.0}
    scorer.end()
    scorer.weights = {"guide": 1.0}
