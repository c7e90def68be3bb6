"""Packed passes keep to the slots that are free, however much of a response its texts have in common."""

import pytest
import torch
from conftest import tiny_policy, tiny_reward

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import Completion, ImplicitReward, Response, RewardPrompt, WeightedSum
from stars_fast.rewards.cache import Text, TreeCache
from stars_fast.tree.model import TreeModel


def test_texts_that_cut_their_response_short_are_counted_with_what_the_others_then_encode_again():
    """As re-tokenised answers do: one text that departs early makes all of the pass start where it departs."""
    reward = tiny_reward(32)
    cache = TreeCache(TreeModel(reward, reward.model, "reward"))
    prompt = RewardPrompt(0, [1, 2], [1, 2])
    cache.begin(4, 30, 60)
    cache.open({prompt: [1, 2]})
    response, long = Response(prompt), [1, 2, *range(3, 21)]
    with torch.no_grad():
        first = Completion(response, long[2:])
        list(cache.encode([Text(first, long, [])]))
        cache.commit(first)
        texts = [Text(Completion(response, []), long + [k] * 4, []) for k in (21, 22, 23)]
        texts.append(Text(Completion(response, []), [1, 2, *range(20, 2, -1)], []))
        found = {}
        for rows, features in cache.encode(texts):
            found |= {row.place: feature for row, feature in zip(rows, features, strict=True)}
        for place, text in enumerate(texts):
            whole = reward.model(torch.tensor([text.ids]), use_cache=False).last_hidden_state[0, -1]
            assert found[place].tolist() == pytest.approx(whole.tolist(), abs=1e-4)
    cache.end()
    assert (cache.model.tree.free_slots, cache.model.tree.nodes) == (60, 0)


CONFIG = StarsConfig(segment_length=4, max_attempts=4, target_reward=1.5, beta=0.6, max_new_tokens=8)
PROMPTS = [[1, 2, 3], list(range(1, 31)), [4], list(range(30, 1, -1)), [4]]


def scorer(kind):
    tuned, reference = (tiny_policy(32, hidden=32, seed=seed) for seed in (5, 6))
    if kind == "classifier":
        return tiny_reward(32, hidden=32)
    implicit = ImplicitReward(tuned, reference)
    return implicit if kind == "implicit" else WeightedSum([(1.0, implicit)])


def generate(kind):
    engine = StarsEngine(tiny_policy(32, hidden=32), scorer(kind))
    pieces = []
    for tree in engine.reward.tree_models:
        extend = tree.extend
        tree.extend = lambda leaves, runs, *args, extend=extend, **kwargs: (
            pieces.append(sum(map(len, runs))) or extend(leaves, runs, *args, **kwargs)
        )
    out = engine.generate(PROMPTS, CONFIG, seed=[3, 4, 5, 6, 7], candidates=2)
    assert out.errors == [None] * len(PROMPTS)
    return out, pieces


@pytest.mark.parametrize("kind", ["classifier", "implicit", "weighted"])
def test_long_prompts_are_read_in_pieces_while_others_decode(kind, request):
    whole, at_once = generate(kind)
    request.getfixturevalue("fickle")  # from 1 to 8 tokens a heartbeat
    out, pieces = generate(kind)
    assert max(pieces) <= 8 < max(at_once)
    assert sum(pieces) == sum(at_once)
    assert out.completions == whole.completions
    assert out.rewards == pytest.approx(whole.rewards, abs=1e-4)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_prompt_read_ahead_is_the_prompt_read_at_once(lag):
    reward = tiny_reward(32, hidden=32)
    prompts = [RewardPrompt(i, ids, ids) for i, ids in enumerate(PROMPTS)]
    found = []
    for most in (1000, 7):
        cache = TreeCache(TreeModel(reward, reward.model, "reward"), lag=lag)
        cache.begin(8, 40, 200)
        cache.open(dict(zip(prompts, PROMPTS, strict=True)))
        with torch.no_grad():
            rounds = 0
            while left := cache.read_ahead(prompts, most):
                rounds += 1
                assert left == [prompt for prompt in prompts if len(prompt.source) > lag][-len(left) :]
            assert rounds == (0 if most == 1000 else (sum(len(ids) - lag for ids in PROMPTS) - 1) // 7)
            texts = [
                Text(Completion(Response(prompt), [9, 8]), [*prompt.source, 9, 8], [], [len(prompt.source)])
                for prompt in prompts
            ]
            ((_, features),) = cache.encode(texts)
        assert cache.tokens == sum(len(ids) - lag for ids in PROMPTS) + 2 * len(PROMPTS)
        found.append(features)
        cache.end()
        assert cache.model.tree.nodes == 0
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_what_finds_no_slots_ahead_is_read_when_it_is_needed():
    reward = tiny_reward(32, hidden=32)
    cache = TreeCache(TreeModel(reward, reward.model, "reward"))
    prompts = [RewardPrompt(i, ids, ids) for i, ids in enumerate(PROMPTS[:4])]
    cache.begin(1, 40, 40)
    cache.open(dict(zip(prompts, PROMPTS, strict=False)))
    with torch.no_grad():
        assert cache.read_ahead(prompts, 1000) == []
        assert cache.tokens == 40
        for prompt in prompts:
            ((_, features),) = cache.encode([Text(Completion(Response(prompt), [9]), [*prompt.source, 9], [])])
            whole = reward.model(torch.tensor([[*prompt.source, 9]]), use_cache=False).last_hidden_state[0, -1]
            assert features[0].tolist() == pytest.approx(whole.tolist(), abs=1e-4)
    cache.end()
    assert cache.model.tree.nodes == 0
