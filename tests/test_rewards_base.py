"""What every scorer is promised, and what is made of what it returns."""

import math
import warnings

import pytest
import torch
from conftest import sum_reward, tiny_tokenizer
from histories import assert_scores, fresh
from test_rewards_callable import CONFIG, PROMPTS, expect_same_text
from tiny_tokenizers import CHAT, LLAMA3, byte_bpe, chat_prefix, models_for

from stars_fast import StarsEngine
from stars_fast.rewards import CallableReward, ClassifierReward, Completion, Response, Reward, RewardPrompt
from stars_fast.rewards.base import score_each

# Prompts


def test_reward_prompts_stand_in_for_the_prompts(policy32, tokenizer32, reward32):
    seen = []

    def reward(prompts, completion_ids):
        seen.extend(prompts)
        return sum_reward(completion_ids)

    given = ["w8 w9", [{"role": "user", "content": "w3"}]]
    StarsEngine(policy32, reward, tokenizer=tokenizer32).generate(["w1", "w2"], CONFIG, seed=0, reward_prompts=given)
    assert all(prompt in given for prompt in seen) and all(prompt in seen for prompt in given)
    out = StarsEngine(policy32, reward32).generate(PROMPTS, CONFIG, seed=0, reward_prompts=[[1], [2, 3]])
    assert_scores(out, lambda i, tokens, _: fresh(reward32, [[1], [2, 3]][i] + tokens))
    assert [row[: len(prompt)].tolist() for row, prompt in zip(out.sequences, PROMPTS, strict=True)] == PROMPTS


def test_reward_prompts_need_not_suit_the_policys_tokenizer():
    """A base model's tokenizer has no chat template; whoever reads messages or text does without one."""
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 100, template=LLAMA3)
    policy, reward = models_for(ours, theirs)
    seen = []

    def function(prompts, completion_ids):
        seen.extend(prompts)
        return sum_reward(completion_ids)

    StarsEngine(policy, function, tokenizer=ours).generate(["a"], CONFIG, seed=0, reward_prompts=[CHAT])
    assert seen[0] == CHAT
    StarsEngine(policy, function).generate([[9]], CONFIG, seed=0, reward_prompts=["the cat"])
    assert seen[-1] == "the cat"
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    out = engine.generate(["a"], CONFIG, seed=0, reward_prompts=[CHAT])
    prefix, tail = chat_prefix(theirs, CHAT), theirs.convert_tokens_to_ids(["<|eot_id|>"])

    def expected(i, tokens, finished):
        text = ours.decode(tokens, skip_special_tokens=True)
        text = text if finished else text.rstrip("\ufffd")
        return fresh(reward, prefix + theirs(text, add_special_tokens=False)["input_ids"] + tail)

    assert_scores(out, expected)


def test_a_reward_prompt_whose_ids_nobody_can_tell_is_named(policy32, reward32, tokenizer32):
    with pytest.raises(ValueError, match=r"reward_prompts\[1\] is text, but there is no tokenizer"):
        StarsEngine(policy32, reward32).generate(PROMPTS, CONFIG, reward_prompts=[[1], "w2"])
    bare = tiny_tokenizer(32)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"reward_prompts\[1\] is a chat, and this policy has no chat template"):
        StarsEngine(policy32, reward32, tokenizer=bare).generate(PROMPTS, CONFIG, reward_prompts=["w1", CHAT])


# The protocol


def test_a_reward_of_the_users_own_keeps_state_through_the_protocol(policy32):
    """Every completion that was scored is committed or discarded, and every response closed."""

    class Counting(Reward):
        def begin(self, prompts, max_new_tokens, rows, kv_cache_tokens):
            self.scored, self.closed, self.ended = set(), 0, 0

        def score(self, completions):
            self.scored.update(completions)
            return sum_reward([completion.tokens for completion in completions])

        def commit(self, completion):
            self.scored.remove(completion)

        def discard(self, completion):
            self.scored.remove(completion)

        def close(self, response):
            self.closed += bool(response.tokens)

        def end(self):
            self.ended += 1

    reward = Counting()
    expect_same_text(policy32, reward)
    assert not reward.scored and reward.closed == len(PROMPTS) and reward.ended == 1


def test_a_reward_for_finished_answers_only_is_refused(policy32):
    class Final(Reward):
        partial = False

        def score(self, completions):
            return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"Final \(partial=False\)"):
        StarsEngine(policy32, Final()).generate(PROMPTS, CONFIG)


@pytest.mark.parametrize("kind", ["classifier", "function"])
def test_a_scorer_at_work_for_one_engine_is_refused_to_another(policy32, reward32, kind):
    scorer = ClassifierReward(reward32) if kind == "classifier" else CallableReward(sum_reward)
    first, second = StarsEngine(policy32, scorer), StarsEngine(policy32, scorer)
    whole = first.generate(PROMPTS, CONFIG, seed=0)
    stream = first.stream(PROMPTS, CONFIG, seed=0)
    next(stream)
    with pytest.raises(RuntimeError, match="is scoring for another call"):
        second.generate(PROMPTS, CONFIG, seed=0)
    assert all(event.error is None for event in stream)
    assert second.generate(PROMPTS, CONFIG, seed=0).rewards == pytest.approx(whole.rewards)


# Scores


def test_a_batch_that_fails_where_each_alone_does_not_is_told_once_a_call(policy32):
    def reward(completions):
        if len(completions) > 1:
            raise MemoryError("too many at once")
        return sum_reward(completions)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expect_same_text(policy32, reward)
        told = [str(w.message) for w in caught]
        assert len(told) == 1 and "MemoryError: too many at once" in told[0] and "one by one" in told[0]
        expect_same_text(policy32, reward)
    assert len(caught) == 2


def test_a_failure_that_ends_its_request_is_told_there_alone(policy32, recwarn):
    def reward(prompts, completions):
        if [8] in prompts:
            raise KeyError("eight")
        return sum_reward(completions)

    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=0)
    assert out.errors[0] is None and "eight" in out.errors[1]
    (warning,) = recwarn.list  # of the request, and none that its batch was lost
    assert "requests failed" in str(warning.message)


class Returns(Reward):
    """Scores that are known beforehand."""

    def __init__(self, values):
        self.values = values

    def score(self, completions):
        return self.values


def answers(count):
    prompt = RewardPrompt(0, [1], [1])
    return [Completion(Response(prompt), [k]) for k in range(count)]


def test_scores_in_a_tensor_stay_there_until_somebody_looks_and_are_copied_once(monkeypatch):
    values, copies = torch.tensor([0.5, -math.inf, 2.0]), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: copies.append(1) or tolist(tensor))
    scores = score_each(Returns(values), answers(3))
    assert scores.tensor is values and len(scores) == 3 and not copies
    assert list(scores) == [(0.5, None), (-math.inf, None), (2.0, None)] and scores[2] == (2.0, None)
    assert len(copies) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_reward_in_a_tensor_is_told_as_in_a_list(value):
    in_a_list, in_a_tensor = (score_each(Returns(make([1.0, value])), answers(2)) for make in (list, torch.tensor))
    assert in_a_tensor.tensor is not None and in_a_list.tensor is None
    assert in_a_tensor[0] == in_a_list[0] == (1.0, None)
    assert in_a_tensor[1][1] == in_a_list[1][1] == f"the reward returned {value}; it must be finite, or -inf to reject"
    assert math.isnan(in_a_tensor[1][0])


def test_a_list_keeps_its_full_precision():
    assert score_each(Returns([0.1 + 0.2]), answers(1))[0] == (0.1 + 0.2, None)


@pytest.mark.parametrize("values", [torch.tensor([[1.0], [2.0]]), torch.tensor([1, 2]), [torch.tensor(1), 2]])
def test_tensors_of_another_form_are_read_one_by_one(values):
    scores = score_each(Returns(values), answers(2))
    assert scores.tensor is None and list(scores) == [(1.0, None), (2.0, None)]


def test_a_tensor_of_another_length_is_an_error_of_each():
    scores = score_each(Returns(torch.zeros(3)), answers(2))
    assert scores.tensor is None
    assert all("returned 3 values for 1 completions" in error for _, error in scores)


def test_a_scorer_is_told_of_the_policy_and_its_tokenizer_under_a_name_that_nothing_else_had(policy32, tokenizer32):
    class Told(Reward):
        told = None

        def score(self, completions):
            return [0.0] * len(completions)

        def check_vocabulary(self, policy_ids, policy):  # as scorers of earlier versions have it
            return policy_ids < 0

        def check_policy(self, policy, tokenizer):
            self.told = policy, tokenizer

    assert StarsEngine(policy32, Told(), tokenizer=tokenizer32).reward.told == (policy32, tokenizer32)
