"""Whatever was forked, rolled back, dropped and committed before, numbers equal those of a fresh forward pass.

And afterwards nothing is left: every slot is free again, and the host models are as they were.
"""

import copy
import gc
import random

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from transformers import AutoModelForCausalLM, GptOssConfig

import stars_fast.tree.model
from stars_fast import StarsConfig, StarsEngine
from stars_fast.policy.leaf import Leaf, Sampling
from stars_fast.policy.policy import Policy
from stars_fast.rewards import ClassifierReward, Completion, Response, RewardPrompt
from stars_fast.tree import memory
from stars_fast.tree.attention import plugged

VOCAB, EOS = 32, 31
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
CONFIG = StarsConfig(segment_length=4, max_attempts=6, target_reward=1.5, beta=0.6, max_new_tokens=18)


@torch.no_grad()
def fresh_logprobs(policy, prompt, completion):
    """Log-probabilities ``[len(completion), V]`` by one plain forward pass."""
    return policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def fresh_reward(reward, ids):
    hidden = reward.model(torch.tensor([ids]), use_cache=False).last_hidden_state
    return reward.score(hidden[0, -1]).item()


def assert_fresh(out, policy, reward, prompts=PROMPTS, samples=1):
    assert out.errors == [None] * len(prompts) * samples
    for row, completion in enumerate(out.completions):
        prompt = prompts[row // samples]
        expected = fresh_logprobs(policy, prompt, completion)[torch.arange(len(completion)), torch.tensor(completion)]
        torch.testing.assert_close(torch.tensor(out.logprobs[row]), expected, atol=1e-4, rtol=0)
        ids = list(prompt)
        for segment in out.segments[row]:
            ids += segment.tokens
            assert segment.reward == pytest.approx(fresh_reward(reward, ids), abs=1e-4)


def assert_all_free(engine):
    for tree in (engine.policy.tree, engine.reward.tree_model.tree):
        assert (tree.free_slots, tree.nodes) == (tree.capacity - 1, 0)


# One heartbeat at a time


@pytest.mark.parametrize("seed", range(4))
def test_the_policy_is_exact_after_any_history(policy32, seed):
    """Random forks, extensions and releases; every row's numbers are checked as they come."""
    chance, policy = random.Random(seed), Policy(policy32)
    policy.allocate(600)
    with torch.no_grad(), plugged(policy32):
        nodes, logits = policy.prefill([-1] * 3, PROMPTS)
        texts = {node: (list(ids), row) for node, ids, row in zip(nodes, PROMPTS, logits, strict=True)}
        for segment in range(12):
            leaves = chance.sample(sorted(texts), k=min(len(texts), 3))
            asked = [
                Leaf(
                    node=node,
                    logits=texts[node][1],
                    sampling=Sampling(),
                    key=chance.getrandbits(60),
                    segment=segment,
                    first_attempt=0,
                    candidates=chance.randint(1, 5),
                    length=chance.randint(1, 4),
                )
                for node in leaves
            ]
            for node, draws in zip(leaves, policy.propose(asked), strict=True):
                kept = chance.randrange(len(draws))
                for place, draw in enumerate(draws):
                    ids = texts[node][0]
                    expected = fresh_logprobs(policy32, ids, draw.tokens)
                    expected = expected[torch.arange(len(draw.tokens)), torch.tensor(draw.tokens)]
                    torch.testing.assert_close(torch.tensor(draw.logprobs), expected, atol=1e-4, rtol=0)
                    if place == kept:
                        (child,), (row,) = policy.prefill([draw.node], [draw.tokens[-1:]])
                        texts[child] = (ids + draw.tokens, row)
                    policy.tree.release(draw.node)
            while len(texts) > 6:
                gone = chance.choice(sorted(texts))
                policy.tree.release(gone)
                del texts[gone]
        for node in texts:
            policy.tree.release(node)
    assert policy.tree.free_slots == policy.tree.capacity - 1


@pytest.mark.parametrize("slots", [40, 90, 2000])
@pytest.mark.parametrize("tail", ["none", (3, 4)], ids=str)
def test_the_reward_is_exact_after_any_history(reward32, tail, slots):
    """Candidates scored, kept waiting, committed late or never, while the tree drops what it has no room for."""
    chance = random.Random(slots)
    scorer = ClassifierReward(reward32, tail=tail)
    after = [] if tail == "none" else list(tail)
    prompts = [RewardPrompt(i, ids, ids) for i, ids in enumerate(PROMPTS)]
    scorer.begin(prompts, 24, 8, slots)
    scorer.open(prompts, 24)
    responses = [Response(prompt) for prompt in prompts for _ in range(2)]
    waiting = {}
    with torch.no_grad():
        for _ in range(40):
            batch = []
            for response in chance.sample(responses, k=chance.randint(1, 6)):
                for _ in range(chance.randint(1, 4)):
                    segment = [chance.randrange(VOCAB - 1) for _ in range(chance.randint(1, 4))]
                    batch.append(Completion(response, segment))
            for completion, value in zip(batch, scorer.score(batch), strict=True):
                ids = completion.response.prompt.ids + completion.tokens + after
                assert value == pytest.approx(fresh_reward(reward32, ids), abs=1e-4)
            for completion in batch + list(waiting.values()):
                response = completion.response
                fate = chance.choice(["wait", "commit", "discard", "discard"])
                if fate == "wait" and response not in waiting:
                    waiting[response] = completion
                    continue
                if waiting.get(response) is completion:
                    del waiting[response]
                if fate != "commit" or len(completion.tokens) > 20 or response in waiting:
                    scorer.discard(completion)
                    continue
                if completion.tokens[: len(response.tokens)] == response.tokens:
                    scorer.commit(completion)
                    response.tokens = completion.tokens
            for place, response in enumerate(responses):
                if len(response.tokens) > 18:
                    scorer.discard(waiting.pop(response)) if response in waiting else None
                    scorer.close(response)
                    responses[place] = Response(response.prompt)
    scorer.end()
    assert scorer.tree_model.tree.free_slots == slots


# Through the engine


@pytest.mark.parametrize("max_rows", [1, 5, 64])
@pytest.mark.parametrize("slots", [29, 60, 150, None])
def test_the_engine_is_exact_however_scarce_rows_and_slots_are(policy32, reward32, max_rows, slots):
    engine = StarsEngine(policy32, reward32, max_rows=max_rows, kv_cache_tokens=slots)
    out = engine.generate(PROMPTS, CONFIG, seed=1, num_return_sequences=3)
    assert any(not segment.accepted for row in out.segments for segment in row)
    assert_fresh(out, policy32, reward32, samples=3)
    assert_all_free(engine)


@pytest.mark.parametrize("candidates", [1, 4, 20, "auto"])
def test_samples_that_share_a_prompt_do_not_disturb_each_other(policy32, reward32, candidates):
    engine = StarsEngine(policy32, reward32)
    out = engine.generate(PROMPTS[:1], CONFIG, seed=2, num_return_sequences=8, candidates=candidates)
    assert_fresh(out, policy32, reward32, PROMPTS[:1], samples=8)
    assert_all_free(engine)


def test_prompts_longer_than_a_prefill_chunk_are_exact(policy32, reward32, monkeypatch):
    monkeypatch.setattr(stars_fast.tree.model, "PREFILL_CHUNK", 8)
    prompts = [[(3 * i) % VOCAB for i in range(length)] for length in (7, 8, 9, 16, 30)]
    engine = StarsEngine(policy32, reward32)
    out = engine.generate(prompts, CONFIG, seed=0)
    assert_fresh(out, policy32, reward32, prompts)
    assert_all_free(engine)


def test_a_prompt_of_more_tokens_than_the_chunk_as_it_ships_is_exact():
    policy, reward = (make(VOCAB, hidden=16, layers=1, positions=1300) for make in (tiny_policy, tiny_reward))
    prompts = [[(7 * i + i // 5) % VOCAB for i in range(length)] for length in (1100, 3)]
    assert len(prompts[0]) > 2 * stars_fast.tree.model.PREFILL_CHUNK
    out = StarsEngine(policy, reward).generate(prompts, CONFIG, seed=0)
    assert_fresh(out, policy, reward, prompts)


def test_scoring_in_several_passes_is_exact(policy32, reward32, monkeypatch):
    monkeypatch.setattr("stars_fast.rewards.cache._MAX_PACKED", 6)
    engine = StarsEngine(policy32, reward32)
    assert_fresh(engine.generate(PROMPTS, CONFIG, seed=0), policy32, reward32)
    assert_all_free(engine)


# What is left afterwards


def test_all_slots_are_free_after_a_calibrated_call(policy32, reward32):
    engine = StarsEngine(policy32, reward32)
    out = engine.generate(PROMPTS, CONFIG, seed=0, target_reward=None, num_return_sequences=2)
    assert_fresh(out, policy32, reward32, samples=2)
    assert_all_free(engine)


class Fails(ClassifierReward):
    """Raises for one prompt from its second segment on."""

    def score(self, completions):
        scores = super().score(completions)
        if any(c.response.prompt.index == 1 and c.response.tokens for c in completions):
            raise OverflowError("no score today")
        return scores


def test_a_request_that_fails_leaves_no_slots_behind_and_the_others_exact(policy32, reward32):
    engine = StarsEngine(policy32, Fails(reward32))
    out = engine.generate(PROMPTS, CONFIG, seed=0, ignore_eos=True, num_return_sequences=2)
    assert [error is None for error in out.errors] == [True, True, False, False, True, True]
    assert_all_free(engine)
    keep = [0, 1, 4, 5]
    for name in ("completions", "logprobs", "segments", "errors"):
        setattr(out, name, [getattr(out, name)[row] for row in keep])
    assert_fresh(out, policy32, reward32, [PROMPTS[0], PROMPTS[2]], samples=2)


def test_all_slots_are_free_after_an_error_that_is_raised(policy32, reward32):
    engine = StarsEngine(policy32, Fails(reward32))
    with pytest.raises(RuntimeError, match=r"prompts\[1\].*no score today"):
        engine.generate(PROMPTS, CONFIG, seed=0, ignore_eos=True, on_error="raise")
    assert_all_free(engine)
    assert_untouched(policy32, reward32)


class Failing:
    """A function that works a number of times."""

    def __init__(self, function, healthy):
        self.function, self.healthy = function, healthy

    def __call__(self, *args, **kwargs):
        self.healthy -= 1
        if self.healthy < 0:
            raise MemoryError("no room")
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("model", ["policy", "reward"])
def test_all_slots_are_free_after_a_failure_in_a_forward_pass(policy32, reward32, model, monkeypatch):
    """Such as a lack of memory, at any call."""
    engine = StarsEngine(policy32, reward32)
    tree_model = engine.policy if model == "policy" else engine.reward.tree_model
    for healthy in (0, 1, 3):
        monkeypatch.setattr(tree_model, "forward", Failing(tree_model.forward, healthy))
        try:
            out = engine.generate(PROMPTS, CONFIG, seed=0)
        except MemoryError:
            assert model == "policy"
        else:
            assert any("no room" in error for error in out.errors if error)
        assert_all_free(engine)
        monkeypatch.undo()
    assert_fresh(engine.generate(PROMPTS, CONFIG, seed=0), policy32, reward32)


@pytest.mark.parametrize("how", ["close", "forget"])
def test_all_slots_are_free_after_a_stream_that_is_not_read_to_its_end(policy32, reward32, how):
    engine = StarsEngine(policy32, reward32)
    stream = engine.stream(PROMPTS, CONFIG, seed=0, num_return_sequences=2)
    for _ in range(4):
        next(stream)
    assert engine.policy.tree.live_slots and engine.reward.tree_model.tree.live_slots
    if how == "close":
        stream.close()
    del stream
    gc.collect()
    assert_all_free(engine)
    assert_untouched(policy32, reward32)
    assert_fresh(engine.generate(PROMPTS, CONFIG, seed=0), policy32, reward32)


def assert_untouched(*models):
    for model in models:
        assert model.config._attn_implementation == "sdpa"
        assert not any(module.training for module in model.modules())


# The host models


def gpt_oss():
    """Sinks and mixed windows, with its own attention code only: sdpa would be wrong for it."""
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("make", [lambda: tiny_policy(VOCAB, hidden=32), gpt_oss], ids=["llama", "gpt_oss"])
def test_ordinary_generation_is_the_same_before_during_and_after(reward32, make):
    policy = make()
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7]])

    def ordinary():
        return policy.generate(
            ids, attention_mask=(ids > 0).long(), do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=None
        )

    expected, logits, implementation = ordinary(), policy(ids).logits, policy.config._attn_implementation
    engine = StarsEngine(policy, reward32)
    assert torch.equal(ordinary(), expected)
    stream = engine.stream(PROMPTS, CONFIG, seed=0)
    events = [next(stream)]
    assert torch.equal(ordinary(), expected)
    events += stream
    assert torch.equal(ordinary(), expected)
    assert torch.equal(policy(ids).logits, logits) and not policy.training
    assert policy.config._attn_implementation == implementation
    undisturbed = engine.generate(PROMPTS, CONFIG, seed=0).completions
    for index, completion in enumerate(undisturbed):
        assert completion == [token for event in events if event.index == index for token in event.segment.tokens]


def test_dropout_is_off_while_generating_and_back_on_afterwards(reward32):
    policy, reward = tiny_policy(VOCAB, hidden=32, attention_dropout=0.5), copy.deepcopy(reward32)
    expected = StarsEngine(policy, reward).generate(PROMPTS, CONFIG, seed=0)
    policy.train()
    reward.train()
    policy.model.layers[0].eval()  # a module's own mode comes back, not just the model's
    out = StarsEngine(policy, reward).generate(PROMPTS, CONFIG, seed=0)
    assert out.completions == expected.completions and out.rewards == expected.rewards
    assert policy.training and reward.training and reward.score.training
    assert not policy.model.layers[0].training and policy.model.layers[1].training
    policy.eval()
    assert_fresh(out, policy, reward32)


def test_a_stream_that_ends_does_not_turn_dropout_on_for_another(reward32):
    policy = tiny_policy(VOCAB, hidden=32).train()
    first, second = (StarsEngine(policy, reward32).stream([[5, 6]], CONFIG, seed=0) for _ in range(2))
    next(first), next(second)
    first.close()
    assert not policy.training
    second.close()
    assert policy.training


def test_a_pool_that_is_large_enough_is_kept(policy32, reward32):
    engine = StarsEngine(policy32, reward32)
    engine.generate(PROMPTS, CONFIG, seed=0)
    pools = engine.policy.pool, engine.reward.tree_model.pool
    engine.generate(PROMPTS[:2], CONFIG, seed=0)
    assert (engine.policy.pool, engine.reward.tree_model.pool) == pools


def test_what_a_pool_holds_counts_as_free_for_the_next(policy32, monkeypatch):
    policy = Policy(policy32)
    total = 1000 * policy.bytes_per_token
    monkeypatch.setattr(memory, "free_bytes", lambda device: total - policy.pool.slots * policy.bytes_per_token)
    pools, sizes = [], []
    for _ in range(4):
        sizes.append(memory.default_tokens(policy, rows=100, tokens_per_row=50))
        policy.allocate(sizes[-1])
        pools.append(policy.pool)
    assert len(set(sizes)) == 1 and len(set(map(id, pools))) == 1
    assert sizes[0] < 500  # a share of the 1000 only, however often it is asked
