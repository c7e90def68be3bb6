"""A session of a scorer with models: prompts come and go while others are scored, and are checked from anywhere."""

import threading

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from histories import fresh, ids_prompts, text_prompts
from tiny_tokenizers import CHATML, byte_bpe
from transformers import LlamaForTokenClassification

from stars_fast.rewards import (
    ClassifierReward,
    Completion,
    ImplicitReward,
    JudgeReward,
    ProcessReward,
    Response,
    RewardPrompt,
    WeightedSum,
)

TEXTS = ["the cat sat on the mat", "how are you today?", "hello there"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe(300, template=CHATML)


def classifier(tokenizer):
    return ClassifierReward(tiny_reward(300, positions=512), tokenizer)


def squashed(tokenizer):
    """Scored in full."""
    scorer = classifier(tokenizer)
    scorer.tree_model, scorer.reason = None, "it is a test"
    scorer._start([])
    scorer.vocab_size = 300
    return scorer


def implicit(tokenizer):
    return ImplicitReward(*(tiny_policy(300, seed=seed, positions=512) for seed in (2, 3)), tokenizer=tokenizer)


def judge(tokenizer):
    return JudgeReward(tiny_policy(300, positions=512), tokenizer, yes="Y", no="N")


def process(tokenizer):
    config = tiny_reward(300, positions=512).config
    config.num_labels = 2
    model = LlamaForTokenClassification(config).eval()
    return ProcessReward.qwen(model, tokenizer, step_token="<|im_end|>")


def weighted(tokenizer):
    return WeightedSum([(1.0, classifier(tokenizer)), (0.5, judge(tokenizer))])


EVERY = [classifier, squashed, implicit, judge, process, weighted]


def parts(scorer):
    return [part.reward for part in scorer._parts] if isinstance(scorer, WeightedSum) else [scorer]


def maps(scorer):
    """All that a scorer remembers of prompts, responses and completions."""
    for part in parts(scorer):
        yield from (part._contexts, getattr(part, "_committed", {}))
        for cache in part.caches:
            yield from (cache._runs, cache._prefixes, cache._responses, cache._completions)


@torch.no_grad()
def answered(scorer, tokenizer, prompts, segments):
    """Rewards of answers that grow by these segments, which are then finished."""
    responses, rewards = [Response(prompt) for prompt in prompts], []
    for segment in segments:
        batch = [Completion(response, segment, tokenizer=tokenizer) for response in responses]
        rewards += [float(value) for value in scorer.score(batch)]
        for completion in batch:
            scorer.commit(completion)
            completion.response.tokens = completion.tokens
            completion.response.ends.append(len(completion.tokens))
    for response in responses:
        scorer.close(response)
    return rewards


@pytest.mark.filterwarnings("ignore:.*scored in full")
@pytest.mark.parametrize("make", EVERY)
def test_a_prompt_that_joins_late_is_scored_as_one_that_was_there_and_nothing_is_left_of_it(make, tokenizer):
    scorer, segments = make(tokenizer), [tokenizer(text)["input_ids"] for text in (" the dog", " sat")]
    scorer.begin(prompts := text_prompts(TEXTS, tokenizer), 24, 8, None)
    scorer.open(prompts, 24)
    expected = answered(scorer, tokenizer, prompts, segments)
    scorer.end()
    assert not any(maps(scorer))
    scorer.begin(early := text_prompts(TEXTS[:1], tokenizer), 24, 8, None)
    scorer.open(early, 24)
    found = answered(scorer, tokenizer, early, segments)
    scorer.open(late := text_prompts(TEXTS[1:], tokenizer), 24)
    scorer.forget(early)
    found += answered(scorer, tokenizer, late, segments)
    assert sorted(found) == pytest.approx(sorted(expected), abs=1e-4)
    scorer.forget(late)
    assert not any(maps(scorer))
    for model in scorer.tree_models:
        model.prefixes.clear()
        assert model.tree.nodes == 0
    scorer.end()


@pytest.mark.filterwarnings("ignore:.*scored in full")
@pytest.mark.parametrize("make", EVERY)
def test_a_prompt_that_cannot_join_leaves_nothing_behind(make, tokenizer):
    scorer = make(tokenizer)
    scorer.begin([], 24, 8, None)
    bad = text_prompts([TEXTS[0], "the cat " * 400], tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[1\] has .* positions limit of 512"):
        scorer.open(bad, 24)
    assert not any(maps(scorer))
    scorer.end()


@pytest.mark.filterwarnings("ignore:.*scored in full")
@pytest.mark.parametrize("make", EVERY)
def test_another_thread_checks_while_a_session_is_open_and_disturbs_nobody(make, tokenizer):
    scorer, segment = make(tokenizer), tokenizer(" the dog")["input_ids"]
    scorer.begin(prompts := text_prompts(TEXTS, tokenizer), 24, 8, None)
    scorer.open(prompts, 24)
    expected = answered(scorer, tokenizer, prompts, [segment])
    renderings = [part.rendering(prompts[0]) for part in parts(scorer)]
    refused, stop = [], threading.Event()

    def check():
        while not stop.is_set():
            scorer.check(text_prompts(TEXTS, tokenizer), 24, None)
            try:
                scorer.check(text_prompts(["the cat " * 400], tokenizer), 24, None)
            except ValueError as error:
                refused.append(str(error))

    thread = threading.Thread(target=check)
    thread.start()
    for _ in range(500):
        if refused:
            break
        assert answered(scorer, tokenizer, prompts, [segment]) == pytest.approx(expected, abs=1e-4)
    stop.set()
    thread.join()
    assert refused and "prompts[0] has" in refused[0]
    assert [part.rendering(prompts[0]) for part in parts(scorer)] == renderings
    scorer.end()
    assert not any(maps(scorer))


def test_pools_are_too_small_for_what_they_were_not_made_for(reward32, small_pools):
    short, long = ids_prompts([[1] * 10]), ids_prompts([[1] * 100])
    scorer = ClassifierReward(reward32)
    scorer.begin(short, 8, 4, None)
    assert scorer.fits(short, 8) and scorer.fits(short * 9, 8)
    assert not scorer.fits(long, 8) and not scorer.fits(short, 100)
    scorer.end()
    scorer.begin(long, 8, 4, None)
    assert scorer.fits(long * 9, 8)
    scorer.end()
    scorer.begin([], 8, 4, 60)
    assert scorer.fits(long, 8), "as large as they may be"
    scorer.end()


def test_rewards_are_in_the_order_of_the_completions(reward32):
    """A pass keeps those of one response together."""
    scorer, prompts = ClassifierReward(reward32), ids_prompts([[1, 2], [3]])
    scorer.begin(prompts, 8, 4, None)
    scorer.open(prompts, 8)
    first, second = map(Response, prompts)
    batch = [Completion(one, [k]) for k, one in enumerate([first, second, second, first, second, first])]
    with torch.no_grad():
        rewards = scorer.score(batch)
    expected = [fresh(reward32, completion.response.prompt.ids + completion.tokens) for completion in batch]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-4)
    scorer.end()


def test_a_scorer_serves_one_engine_after_another_each_with_its_own_tokenizer(tokenizer):
    """Given no policy's tokenizer, it reads answers by that of the engine that asks."""
    other, scorer = byte_bpe(340), classifier(tokenizer)
    found = []
    for ours in (tokenizer, other, tokenizer):
        prompt = RewardPrompt(0, "the cat", None, tokenizer=ours)
        scorer.begin([prompt], 24, 8, None)
        scorer.open([prompt], 24)
        found += answered(scorer, ours, [prompt], [ours(" sat on the mat")["input_ids"]])
        scorer.end()
    assert found == pytest.approx([found[0]] * 3, abs=1e-4)
