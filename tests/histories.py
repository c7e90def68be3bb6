"""Random lives of responses under a scorer, and what a call of the engine must agree with."""

import random

import pytest
import torch

from stars_fast.rewards import Completion, Response, RewardPrompt


def live(scorer, prompts, expected, *, draw, slots=2000, rounds=12, seed=0, tokenizer=None, eos=None):
    """Score, keep waiting, commit, discard, fork and close at random; every value must be ``expected(completion)``.

    ``draw(chance)`` gives a segment. Afterwards the scorer's trees must be empty.
    """
    chance = random.Random(seed)
    scorer.begin(prompts, 24, 8, slots)
    scorer.open(prompts, 24)
    responses = [Response(prompt) for prompt in prompts for _ in range(2)]
    with torch.no_grad():
        for _ in range(rounds):
            batch = []
            for response in chance.sample(responses, k=chance.randint(1, len(responses))):
                for _ in range(chance.randint(1, 3)):
                    segment = draw(chance)
                    ends = eos is not None and chance.random() < 0.2
                    batch.append(Completion(response, segment + [eos] * ends, ends, ends, tokenizer))
            if chance.random() < 0.3:
                batch.append(Completion(chance.choice(responses), [], tokenizer=tokenizer))
            for completion, value in zip(batch, scorer.score(batch), strict=True):
                assert value == pytest.approx(expected(completion), abs=1e-4)
            moved = set()
            for completion in batch:
                response = completion.response
                if not completion.segment or response in moved or chance.random() < 0.5:
                    scorer.discard(completion)
                    continue
                scorer.commit(completion)
                response.tokens = completion.tokens
                response.ends.append(len(response.tokens))
                moved.add(response)
            for place, response in enumerate(responses):
                fate = chance.random()
                if len(response.tokens) > 14 or fate < 0.05:
                    scorer.close(response)
                    responses[place] = Response(response.prompt)
                elif fate < 0.15:
                    responses.append(scorer.fork(response))
    scorer.end()
    for model in scorer.tree_models:
        assert (model.tree.free_slots, model.tree.nodes) == (slots, 0)


@torch.no_grad()
def fresh(reward, ids):
    """The head at the last token of a full forward pass."""
    return reward.score(reward.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]).item()


def assert_scores(out, expected, samples=1):
    """``expected(prompt index, tokens, finished)`` of every prefix that was committed."""
    assert out.errors == [None] * len(out.errors)
    assert any(segment.attempts > 1 for row in out.segments for segment in row)
    for row, segments in enumerate(out.segments):
        tokens = []
        for k, segment in enumerate(segments):
            tokens += segment.tokens
            finished = k + 1 == len(segments)
            assert segment.reward == pytest.approx(expected(row // samples, list(tokens), finished), abs=1e-4)


def ids_prompts(prompts):
    return [RewardPrompt(index, ids, ids) for index, ids in enumerate(prompts)]


def text_prompts(texts, tokenizer):
    return [RewardPrompt(index, text, None, tokenizer=tokenizer) for index, text in enumerate(texts)]


def assert_engine_agrees(engine, prompts, config, expected, **options):
    """A call under STARS whose rewards are ``expected(prompt index, tokens, ends, eos)`` after every segment."""
    out = engine.generate(prompts, config, seed=0, **options)
    assert [error for error in out.errors if error] == []
    samples = len(out.segments) // len(prompts)
    for row, segments in enumerate(out.segments):
        tokens, ends = [], []
        for place, segment in enumerate(segments):
            tokens, last = tokens + segment.tokens, place + 1 == len(segments)
            eos = last and out.finish_reasons[row] == "stop"
            assert segment.reward == pytest.approx(expected(row // samples, tokens, list(ends), eos), abs=1e-4)
            ends.append(len(tokens))
    for model in engine.reward.tree_models:
        assert model.tree.nodes == 0
    return out
