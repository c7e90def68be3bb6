"""The implicit reward is the log-ratio of two plain forward passes, whatever was scored, kept and dropped before."""

import copy

import pytest
import torch
from conftest import tiny_policy, tiny_tokenizer
from histories import assert_engine_agrees, ids_prompts, live
from tiny_tokenizers import CHATML, byte_bpe

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import Completion, ImplicitReward, Response, RewardPrompt, implicit

VOCAB = 32
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=2.0, beta=1.0, max_new_tokens=14)


@pytest.fixture(scope="module")
def pair():
    return tiny_policy(VOCAB, seed=2, hidden=32), tiny_policy(VOCAB, seed=3)


@torch.no_grad()
def fresh(pair, prefix, answer, weights="sum", kl=None):
    """By plain passes over the whole text."""
    if not answer:
        return 0.0
    ids, total = torch.tensor([prefix + answer]), 0.0
    ours, reference = (model(ids, use_cache=False).logits[0].log_softmax(-1) for model in pair)
    for k, token in enumerate(answer, 1):
        a, b = ours[len(prefix) + k - 2], reference[len(prefix) + k - 2]
        value = (a - b)[token].item() + (0.0 if kl is None else (b.exp() * (b - a)).sum().item())
        total += value / (k if weights == "1/k" else 1)
    return total


def draw(chance):
    return [chance.randrange(VOCAB - 1) for _ in range(chance.randint(1, 4))]


@pytest.mark.parametrize(
    "weights, slots, kl",
    [("sum", 2000, "sequential"), ("1/k", 60, "sequential"), ("sum", 40, None), ("sum", 40, "sequential")],
)
def test_the_log_ratio_is_exact_after_any_history(pair, weights, slots, kl):
    scorer = ImplicitReward(*pair, beta=0.5, weights=weights, kl=kl)

    def expected(completion):
        return 0.5 * fresh(pair, completion.response.prompt.ids, completion.tokens, weights, kl)

    live(scorer, ids_prompts(PROMPTS), expected, draw=draw, slots=slots, seed=slots, rounds=8, eos=VOCAB - 1)


@pytest.mark.parametrize("kl, most", [(None, (5, 5)), ("sequential", (5, 9)), ("sequential", (9, 5))])
def test_passes_of_few_tokens_give_the_same(pair, monkeypatch, kl, most):
    """Also where one model's are larger, and few logits are compared at a time."""
    monkeypatch.setattr(implicit, "_COMPARED", 3 * VOCAB)
    scorer = ImplicitReward(*pair, kl=kl)
    for cache, tokens in zip(scorer.caches, most, strict=True):
        cache.max_packed = tokens

    def expected(completion):
        return fresh(pair, completion.response.prompt.ids, completion.tokens, kl=kl)

    live(scorer, ids_prompts(PROMPTS), expected, draw=draw, rounds=6)


@pytest.mark.parametrize("forgetful", [0, 1])
def test_what_only_one_model_has_forgotten_is_compared_where_both_stand(pair, forgetful):
    scorer = ImplicitReward(*pair, kl="sequential")
    scorer.begin(prompts := ids_prompts(PROMPTS[:1]), 24, 8, None)
    scorer.open(prompts, 24)
    response = Response(prompts[0])
    with torch.no_grad():
        for segment in ([3, 1, 4], [1, 5], [9, 2, 6]):
            completions = [Completion(response, segment), Completion(response, [segment[0], 7])]
            for completion, value in zip(completions, scorer.score(completions), strict=True):
                assert value == pytest.approx(fresh(pair, PROMPTS[0], completion.tokens, kl="sequential"), abs=1e-4)
            scorer.commit(completions[0])
            scorer.discard(completions[1])
            response.tokens = completions[0].tokens
            scorer.caches[forgetful].close(response)
    scorer.end()


def test_ids_that_neither_model_can_write_add_no_divergence():
    """Whose logits are masked, as those of padding."""
    ours, reference = torch.tensor([[0.3, 0.1, -torch.inf]]), torch.tensor([[0.5, 0.9, -torch.inf]])
    (value,) = implicit._compared(ours, [0], reference, [0], [1])
    a, b = ours[0, :2].log_softmax(0), reference[0, :2].log_softmax(0)
    assert value == pytest.approx((a - b)[1].item() + (b.exp() * (b - a)).sum().item(), abs=1e-6)


def test_the_policy_guided_by_a_pair_and_by_its_own_log_ratio(policy32, pair):
    for reference in (pair[1], policy32):
        engine = StarsEngine(policy32, ImplicitReward(pair[0], reference))

        def expected(i, tokens, ends, eos, reference=reference):
            return fresh((pair[0], reference), PROMPTS[i], tokens)

        out = assert_engine_agrees(engine, PROMPTS, CONFIG, expected, num_return_sequences=2)
        assert any(segment.attempts > 1 for row in out.segments for segment in row)
        assert policy32.config._attn_implementation == "sdpa"


def test_a_candidate_costs_both_models_its_own_tokens(pair):
    scorer = ImplicitReward(*pair)
    scorer.begin(prompts := ids_prompts(PROMPTS[:1]), 24, 8, None)
    scorer.open(prompts, 24)
    response = Response(prompts[0])
    with torch.no_grad():
        for _ in range(3):
            before = scorer.tokens
            completion = Completion(response, [3, 1, 4, 1, 5])
            scorer.score([completion])
            if response.tokens:
                assert scorer.tokens - before == 2 * 5
            scorer.commit(completion)
            response.tokens = completion.tokens
    scorer.end()


def test_a_foreign_pair_reads_the_text_in_its_own_template():
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 90, template=CHATML)
    pair = [tiny_policy(len(theirs), seed=seed, positions=512) for seed in (2, 3)]
    scorer = ImplicitReward(*pair, tokenizer=theirs)
    question = [{"role": "user", "content": "the cat sat"}]
    prompts = [RewardPrompt(0, question, [1], tokenizer=ours)]
    before = theirs.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    prefix = theirs(before, add_special_tokens=False)["input_ids"]

    def expected(completion):
        ids = theirs(before + completion.text, add_special_tokens=False)["input_ids"]
        assert ids[: len(prefix)] == prefix
        return fresh(pair, prefix, ids[len(prefix) :] + [theirs.eos_token_id] * completion.eos)

    words = [ours(text)["input_ids"] for text in ("the dog ", "sat", "he", "re, you", " 😀")]
    live(scorer, prompts, expected, draw=lambda chance: list(chance.choice(words)), tokenizer=ours, eos=1)


def test_different_vocabularies_are_refused_with_both_sizes(pair):
    small = tiny_policy(20)
    with pytest.raises(ValueError, match=r"32 embeddings and reference 20.*one vocabulary"):
        ImplicitReward(pair[0], small)
    with pytest.raises(ValueError, match=r"32 embeddings and reference 20, and the tokenizer has 32"):
        ImplicitReward(pair[0], small, tokenizer=tiny_tokenizer(32))
    ImplicitReward(pair[0], small, tokenizer=tiny_tokenizer(20))  # of 32 embeddings, 12 are padding
    with pytest.raises(ValueError, match=r"32 embeddings, fewer than the 40 ids of the policy.*tokenizer="):
        StarsEngine(tiny_policy(40), ImplicitReward(*pair))
    with pytest.raises(ValueError, match=r"share their weights.*load the reference separately"):
        ImplicitReward(pair[0], pair[0])
    with pytest.raises(ValueError, match=r"weights='mean'"):
        ImplicitReward(*pair, weights="mean")
    with pytest.raises(ValueError, match=r"kl='reverse': must be 'sequential'"):
        ImplicitReward(*pair, kl="reverse")
    with pytest.raises(ValueError, match=r"kl='sequential': .* 32 ids and reference of 20.*kl=None"):
        ImplicitReward(pair[0], small, tokenizer=tiny_tokenizer(20), kl="sequential")


def test_names_of_models_and_outputs_without_names_are_refused(policy32):
    nameless = copy.deepcopy(policy32)
    nameless.config.return_dict = False
    for model, error, said in (("some/model", TypeError, "is a str"), (nameless, ValueError, "return_dict=False")):
        with pytest.raises(error, match=f"reference.*{said}"):
            ImplicitReward(policy32, model)


def test_a_peft_model_is_not_compared_with_the_model_it_is_put_into():
    peft = pytest.importorskip("peft")
    base = tiny_policy(VOCAB)
    tuned = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model, reference in ((tuned, base), (base, tuned), (tuned, tuned)):
        with pytest.raises(ValueError, match="share their weights"):
            ImplicitReward(model, reference)
    ImplicitReward(tuned, tiny_policy(VOCAB))


def test_an_answer_ends_without_an_eos_where_the_pair_has_none():
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 90, template=CHATML, eos=None)
    scorer = ImplicitReward(*[tiny_policy(len(theirs), seed=s, positions=512) for s in (2, 3)], tokenizer=theirs)
    prompt = RewardPrompt(0, [{"role": "user", "content": "the cat"}], [1], tokenizer=ours)
    tokens = ours("sat")["input_ids"]
    scorer.begin([prompt], 8, 8, None)
    scorer.open([prompt], 8)
    ended = Completion(Response(prompt), [*tokens, 1], True, True, ours)
    with torch.no_grad():
        values = scorer.score([ended, Completion(Response(prompt), tokens, True, False, ours)])
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    scorer.end()
