"""Packed passes keep to the slots that are free, however much of a response its texts have in common."""

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from histories import fresh, ids_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import ClassifierReward, Completion, ImplicitReward, Response, RewardPrompt, WeightedSum
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


# Prompts that begin alike

SYSTEM = [(7 * i) % 31 for i in range(100)]
CHATS = [[*SYSTEM, 3, 1, 4], [*SYSTEM, 2, 7], [*SYSTEM, 1, 6, 1, 8]]
OWN = sum(len(ids) - len(SYSTEM) for ids in CHATS)


@torch.no_grad()
def score(scorer, prompts, tokens=(5, 6)):
    """Rewards of one answer to each prompt, which is then finished."""
    completions = [Completion(Response(prompt), list(tokens)) for prompt in prompts]
    rewards = [float(reward) for reward in scorer.score(completions)]
    for completion in completions:
        scorer.discard(completion)
        scorer.close(completion.response)
    return rewards


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("ahead", [0, 1000, 30])
def test_a_shared_system_prompt_is_read_once(reward32, at_once, ahead):
    scorer, prompts = ClassifierReward(reward32), ids_prompts(CHATS)
    (cache,) = scorer.caches
    scorer.begin(prompts, 8, 8, None)
    for group in [prompts] if at_once else [[prompt] for prompt in prompts]:
        scorer.open(group, 8)
        with torch.no_grad():
            while ahead and scorer.read_ahead(group, ahead):
                pass
        for prompt, reward in zip(group, score(scorer, group), strict=True):
            assert reward == pytest.approx(fresh(reward32, [*prompt.ids, 5, 6]), abs=1e-4)
        scorer.forget(group)
    assert cache.tokens == len(SYSTEM) + OWN + 2 * len(CHATS)
    assert cache.model.tree.live_slots == len(SYSTEM) + OWN, "kept for the next"
    scorer.open(again := ids_prompts(CHATS), 8)
    score(scorer, again)
    assert cache.tokens == len(SYSTEM) + OWN + 2 * 2 * len(CHATS)
    scorer.end()
    assert (cache.model.tree.live_slots, cache.model.tree.nodes) == (0, 0)


def test_logits_of_what_follows_a_kept_beginning_are_asked_for():
    """A scorer that reads the prediction of each id leaves a prompt's last to the pass that encodes the answer."""
    pair = [tiny_policy(32, hidden=32, seed=seed) for seed in (5, 6)]
    apart, together = ([], [])
    for found, group in ((apart, 1), (together, 3)):
        scorer = ImplicitReward(*pair)
        for start in range(0, 3, group):
            scorer.begin(prompts := ids_prompts(CHATS[start : start + group]), 8, 8, None)
            scorer.open(prompts, 8)
            found += score(scorer, prompts)
            tokens = scorer.tokens
            scorer.end()
    assert together == pytest.approx(apart, abs=1e-4)
    assert tokens == 2 * (len(SYSTEM) + OWN + len(CHATS)), "of each answer all but its last"


@pytest.mark.parametrize("slots", [106, 150, 220])
def test_what_is_kept_makes_way(reward32, slots):
    """Little more than one text: beginnings that nobody uses take no room from those that are scored."""
    scorer, others = ClassifierReward(reward32), [[k] * 100 for k in range(1, 4)]
    scorer.begin([], 4, 8, slots)
    for _ in range(2):
        for ids in (*CHATS, *others):
            scorer.open(prompts := ids_prompts([ids]), 2)
            assert score(scorer, prompts) == pytest.approx([fresh(reward32, [*ids, 5, 6])], abs=1e-4)
            scorer.forget(prompts)
    scorer.open(prompts := ids_prompts([*CHATS, *others]), 2)
    expected = [fresh(reward32, [*prompt.ids, 5, 6]) for prompt in prompts]
    assert score(scorer, prompts) == pytest.approx(expected, abs=1e-4)
    scorer.end()
    assert scorer.caches[0].model.tree.free_slots == slots


def test_beginnings_that_are_kept_do_not_cut_a_pass_short(reward32, monkeypatch):
    scorer, passes = ClassifierReward(reward32), []
    (cache,) = scorer.caches
    scorer.begin([], 4, 8, 130)
    scorer.open(kept := ids_prompts(CHATS[:1]), 8)
    score(scorer, kept)
    scorer.forget(kept)
    monkeypatch.setattr(cache, "_pass", lambda *args, own=cache._pass: passes.append(args) or own(*args))
    scorer.open(prompts := ids_prompts([[9]] * 20), 8)
    score(scorer, prompts)
    assert len(passes) == 1 and len(cache.model.prefixes) == 0
    scorer.end()


HISTORY = st.lists(
    st.tuples(st.sampled_from(["open", "score", "commit", "discard", "close", "forget", "ahead"]), st.integers(0, 59)),
    min_size=20,
    max_size=50,
)


@given(history=HISTORY, slots=st.sampled_from([80, 120, 1000]))
@settings(max_examples=25, deadline=None)
def test_any_history_of_prompts_and_answers_is_exact_and_leaves_nothing(reward32, history, slots):
    texts = [[*SYSTEM[:40], 1], [*SYSTEM[:50], 2, 3], SYSTEM[:36], [4]]
    scorer = ClassifierReward(reward32)
    (cache,) = scorer.caches
    scorer.begin([], 8, 4, slots)
    opened, responses, waiting = [], [], {}

    def finish(response):
        for completion in waiting.pop(response, ()):
            scorer.discard(completion)
        scorer.close(response)
        responses.remove(response)

    with torch.no_grad():
        for what, number in history:
            if what == "open" or not opened:
                opened += (prompts := ids_prompts([texts[number % 4]]))
                scorer.open(prompts, 8)
                responses += [Response(prompt) for prompt in prompts * 2]
            elif what == "ahead":
                scorer.read_ahead(opened, number)
            elif what == "forget":
                for response in [one for one in responses if one.prompt is opened[number % len(opened)]]:
                    finish(response)
                scorer.forget([opened.pop(number % len(opened))])
            elif what == "score" and responses:
                asked = (responses * 2)[number % len(responses) :][: 1 + number % 3]
                batch = [Completion(response, [number % 31, k]) for k, response in enumerate(asked)]
                for completion, reward in zip(batch, scorer.score(batch), strict=True):
                    ids = completion.response.prompt.ids + completion.tokens
                    assert float(reward) == pytest.approx(fresh(reward32, ids), abs=1e-4)
                    waiting.setdefault(completion.response, []).append(completion)
            elif waiting:
                response = sorted(waiting, key=responses.index)[number % len(waiting)]
                if what == "close" or (what == "commit" and len(response.tokens) > 5):
                    finish(response)
                    continue
                chosen, *others = waiting.pop(response)
                for completion in others if what == "commit" else [chosen, *others]:
                    scorer.discard(completion)
                if what == "commit":
                    scorer.commit(chosen)
                    response.tokens = chosen.tokens
    for response in list(responses):
        finish(response)
    scorer.forget(opened)
    held = (cache._runs, cache._prefixes, cache._responses, cache._completions, scorer._contexts, scorer._rendered)
    assert not any(held)
    cache.model.prefixes.clear()
    assert (cache.model.tree.free_slots, cache.model.tree.nodes) == (slots, 0)
    scorer.end()


def test_prompts_that_were_answered_make_way_before_what_is_waiting():
    reward = tiny_reward(32, hidden=32)
    cache = TreeCache(TreeModel(reward, reward.model, "reward"))
    cache.begin(2, 12, 40)
    prompts = [RewardPrompt(i, [i, *range(3, 10)], [i, *range(3, 10)]) for i in range(1, 9)]
    cache.open({prompt: prompt.source for prompt in prompts})

    def encoded(completion):
        prompt = completion.response.prompt
        before = cache.tokens
        list(cache.encode([Text(completion, [*prompt.source, *completion.tokens], [])]))
        return cache.tokens - before

    with torch.no_grad():
        first, *others = map(Response, prompts)
        waiting = Completion(first, [9, 8])
        assert encoded(waiting) == 8 + 2
        for response in others:
            answer = Completion(response, [7, 6])
            assert encoded(answer) == 8 + 2
            cache.commit(answer)
            cache.close(response)
        cache.commit(waiting)
        first.tokens += waiting.segment
        assert encoded(Completion(first, [5])) == 1
