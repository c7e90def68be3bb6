"""Reward models of one label, scored on the tree where that gives their own value, else in full."""

import warnings

import pytest
import torch
from conftest import tiny_config, tiny_policy, tiny_reward, tiny_tokenizer
from histories import assert_scores, fresh, ids_prompts
from tiny_tokenizers import byte_bpe, models_for
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from stars_fast import StarsConfig, StarsEngine, demo
from stars_fast.rewards import ClassifierReward, Completion, ImplicitReward, Response, RewardPrompt, WeightedSum
from stars_fast.rewards.base import score_each
from stars_fast.rewards.classifier import score_in_full

VOCAB = 32
PROMPTS = [[1, 2, 3], [4, 5]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=0.5, beta=0.6, max_new_tokens=16)


def seeded(make, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(config).eval()


@torch.no_grad()
def own(model, ids):
    return model(input_ids=torch.tensor([ids])).logits.item()


def assert_own_values(model, **kwargs):
    """Every committed prefix has the reward that the model itself gives it."""
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), model, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = engine.generate(PROMPTS, CONFIG, seed=0, num_return_sequences=3)
    assert out.errors == [None] * 6
    for row, segments in enumerate(out.segments):
        ids = list(PROMPTS[row // 3])
        for segment in segments:
            ids += segment.tokens
            assert segment.reward == pytest.approx(own(model, ids), abs=1e-4)
    return engine.reward


# Pooling


def test_a_bidirectional_model_that_pools_by_its_pad_id_is_scored_at_the_last_token():
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=VOCAB - 2,  # never at the end of a committed segment below
        eos_token_id=VOCAB - 1,
        bos_token_id=2,
        num_labels=1,
        use_bidirectional_attention=True,
    )
    model = seeded(Gemma3TextForSequenceClassification, config)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    reward = ClassifierReward(model)
    assert reward.tree_model is None and "bidirectional" in reward.reason
    rows = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12, 13]]
    with torch.no_grad():
        assert score_in_full(model, rows) == pytest.approx([own(model, row) for row in rows], abs=1e-5)
        # A pad id at the end is a token like others.
        model.config.pad_token_id = None
        expected = own(model, [3, 4, VOCAB - 2])
        model.config.pad_token_id = VOCAB - 2
        assert score_in_full(model, [[3, 4, VOCAB - 2]]) == pytest.approx([expected], abs=1e-5)


def test_a_model_without_a_pad_id_is_scored_in_full_without_losing_batches():
    model = tiny_reward(VOCAB, hidden=32)
    assert model.config.pad_token_id is None
    rows = [[1, 2, 3], [4, 5, 6], [7, 8]]
    with torch.no_grad():
        assert score_in_full(model, rows) == pytest.approx([own(model, row) for row in rows], abs=1e-5)


class Squashed(LlamaForSequenceClassification):
    """Makes more of its head's value."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = torch.sigmoid(-output.logits)
        return output


def test_a_model_that_makes_more_of_its_heads_value_is_scored_in_full():
    plain = tiny_reward(VOCAB, hidden=32)
    model = Squashed(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    reward = assert_own_values(model)
    assert reward.tree_model is None and "its logits are not its head's value" in reward.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad", [None, 0, 4])
def test_a_plain_head_is_scored_on_the_tree_whatever_its_pad_id_and_dtype(dtype, pad):
    assert ClassifierReward(tiny_reward(VOCAB, hidden=32, pad_token_id=pad).to(dtype)).tree_model is not None


def test_rewards_stay_on_the_device_of_their_model(reward32, monkeypatch):
    scorer, prompts = ClassifierReward(reward32), ids_prompts(PROMPTS)
    scorer.begin(prompts, 8, 8, None)
    scorer.open(prompts, 8)
    completions = [Completion(Response(prompt), [5, k]) for prompt in prompts for k in range(3)]
    with torch.no_grad(), monkeypatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "__float__", "__iter__"):
            patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} copies to the host"))
        scores = score_each(scorer, completions)
        assert scores.tensor is not None and scores.tensor.shape == (6,)
    expected = [fresh(reward32, completion.response.prompt.ids + completion.tokens) for completion in completions]
    assert [reward for reward, _ in scores] == pytest.approx(expected, abs=1e-4)
    scorer.end()


# PEFT


@pytest.fixture
def adapted():
    """A tiny reward model, wrapped."""
    peft = pytest.importorskip("peft")

    def adapt(config):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(tiny_reward(VOCAB, hidden=32), config(peft)).eval()

    return adapt


def test_a_reward_model_with_lora_is_scored_on_the_tree_with_its_adapters(adapted):
    model = adapted(
        lambda peft: peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    )
    assert abs(own(model, [1, 2, 3]) - own(tiny_reward(VOCAB, hidden=32), [1, 2, 3])) > 1e-3
    assert assert_own_values(model).tree_model is not None


def test_a_reward_model_with_a_learned_prompt_is_scored_in_full(adapted):
    """Its virtual tokens belong to the wrapper: the model inside does not see them."""
    model = adapted(lambda peft: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    assert assert_own_values(model).tree_model is None


# Rows that do not fit


def gpt2(positions):
    return seeded(
        GPT2ForSequenceClassification,
        GPT2Config(
            vocab_size=40,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=positions,
            num_labels=1,
            pad_token_id=0,
            eos_token_id=39,
            bos_token_id=None,
        ),
    )


def roberta(positions):
    return seeded(
        RobertaForSequenceClassification,
        RobertaConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=positions + 2,  # the padding's own, and one that is never used
            num_labels=1,
        ),
    )


@pytest.mark.filterwarnings("ignore:.*scored in full")
@pytest.mark.parametrize("model", [gpt2, roberta])
def test_positions_are_checked_before_anything_runs_and_before_each_score(model):
    """A foreign tokenizer's lengths: the prompt's is known at once, the answer's when it is drawn."""
    ours, theirs = tiny_tokenizer(VOCAB), tiny_tokenizer(40)
    theirs.chat_template = None
    engine = StarsEngine(tiny_policy(VOCAB), model(24), tokenizer=ours, reward_tokenizer=theirs)
    assert engine.reward.max_positions == 24
    options = {"seed": 0, "base_reward": 0.0, "max_new_tokens": 16, "ignore_eos": True}
    with pytest.raises(ValueError, match=r"prompts\[1\] has 30 tokens for the reward model.*positions limit of 24"):
        engine.generate(["w2", " ".join(["w1"] * 30)], CONFIG, **options)
    out = engine.generate(["w2", " ".join(["w1"] * 20)], CONFIG, **options)
    assert out.errors[0] is None
    assert "for the reward model" in out.errors[1] and "24 positions" in out.errors[1]


@pytest.mark.parametrize("tail", ["none", [3, 4]], ids=str)
def test_shared_ids_must_leave_room_for_the_answer_and_the_tail(tail):
    reward = ClassifierReward(tiny_reward(VOCAB, positions=24), tail=tail)
    fits = 24 - 16 - (2 if tail != "none" else 0)
    prompts = [RewardPrompt(0, [1] * length, [1] * length) for length in (fits, fits + 1)]
    reward.begin(prompts, 16, 2, None)
    reward.open(prompts[:1], 16)
    with pytest.raises(ValueError, match=r"prompts\[0\].*positions limit of 24"):
        reward.open(prompts[1:], 16)
    reward.end()


def test_an_id_the_reward_has_no_embedding_for_ends_that_request_alone():
    """A policy may have more logits than its tokenizer has words."""
    policy, reward = tiny_policy(64, eos_token_id=31), tiny_reward(VOCAB)
    engine = StarsEngine(policy, reward, tokenizer=tiny_tokenizer(VOCAB))
    out = engine.generate([[1, 2]], CONFIG, seed=0)
    assert "outside the reward model's vocabulary of 32" in out.errors[0]
    scorer = ClassifierReward(reward)
    scorer.begin([prompt := RewardPrompt(0, [1], [1])], 8, 2, None)
    scorer.open([prompt], 8)
    with pytest.raises(ValueError, match="holds id 32, outside"):
        scorer.score([Completion(Response(prompt), [5, 32])])
    scorer.end()


def test_a_tail_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="reward_tail holds id 99"):
        StarsEngine(tiny_policy(VOCAB), tiny_reward(VOCAB), reward_tail=[99]).generate(PROMPTS, CONFIG)


# Which way


@pytest.mark.parametrize("tail", ["auto", "none", [3, 4, 5]], ids=str)
def test_shared_ids_are_scored_as_they_are_with_the_tail_behind_them(policy32, reward32, tail):
    prompts = [[5, 6, 7], [8]]
    out = StarsEngine(policy32, reward32, reward_tail=tail).generate(prompts, CONFIG, seed=0, num_return_sequences=4)
    assert "stop" in out.finish_reasons
    after = tail if isinstance(tail, list) else []

    def expected(i, tokens, finished):
        ended = after and tokens[-1] == 31  # an EOS gives way to the tail
        return fresh(reward32, prompts[i] + (tokens[:-1] if ended else tokens) + after)

    assert_scores(out, expected, samples=4)


def test_a_bidirectional_reward_reads_the_whole_text_every_time():
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 90, add_bos=True)
    policy, _ = models_for(ours)
    config = BertConfig(
        vocab_size=len(theirs),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.3,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = BertForSequenceClassification(config).train()  # dropout must be off while scoring
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    with pytest.warns(UserWarning, match=r"BertForSequenceClassification is scored in full .* bidirectional"):
        out = engine.generate(["the cat", "a dog sat on"], CONFIG, seed=0, ignore_eos=True, target_reward=3.0)
    assert reward.training
    reward.eval()

    @torch.no_grad()
    def expected(i, tokens, finished):
        text = ours.decode(tokens, skip_special_tokens=True)
        text = ["the cat", "a dog sat on"][i] + (text if finished else text.rstrip("\ufffd"))
        return reward(**theirs(text, return_tensors="pt", return_token_type_ids=False)).logits.item()

    assert_scores(out, expected)


def test_an_encoder_decoder_reads_a_drawn_pad_id_and_the_end_that_its_head_looks_for():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_labels": 1, "init_std": 0.5}
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 31, "decoder_start_token_id": 31}
    reward = seeded(BartForSequenceClassification, BartConfig(vocab_size=VOCAB, **sizes, **heads, **ends))
    with pytest.warns(UserWarning, match="scored in full"):
        engine = StarsEngine(tiny_policy(VOCAB, hidden=32), reward, reward_tail=[31])
        out = engine.generate([[1, 2]], CONFIG, seed=0, num_return_sequences=3)
    assert out.errors == [None] * 3
    for tokens, found in zip(out.completions, out.rewards, strict=True):
        answer = tokens[:-1] if tokens[-1] == 31 else tokens
        assert found == pytest.approx(own(reward, [1, 2, *answer, 31]), abs=1e-5)


# What is no reward model


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: LlamaForTokenClassification(tiny_config(VOCAB, num_labels=1)), r"shape \[1, 5, 1\] .*ProcessReward"),
        (lambda: LlamaModel(tiny_config(VOCAB, num_labels=1)), "has no head"),
        (lambda: LlamaForCausalLM(tiny_config(VOCAB, num_labels=1)), r"shape \[1, 5, 32\] for a text of 5 tokens"),
    ],
    ids=["token classifier", "base model", "causal LM"],
)
def test_a_model_that_does_not_give_one_value_per_text_is_refused_by_name(make, said):
    model = make()
    with pytest.raises(TypeError, match=f"{type(model).__name__}.*{said}"):
        ClassifierReward(model)


# Ids of another tokenizer


def another(policy_ids=(1, 2), reward_ids=(1, 2), more=0):
    """Two models by their bos and eos ids, the reward model with more embeddings."""
    names = ("bos_token_id", "eos_token_id")
    policy = tiny_policy(32, **dict(zip(names, policy_ids, strict=True)))
    return policy, tiny_reward(32 + more, **dict(zip(names, reward_ids, strict=True)))


def of_a_classifier(policy, reward):
    return reward


def of_a_weighted_sum(policy, reward):
    return WeightedSum({"liked": (1.0, ClassifierReward(reward))})


def of_an_implicit_pair(policy, reward):
    fields = {name: getattr(reward.config, name) for name in ("bos_token_id", "eos_token_id")}
    return ImplicitReward(*(tiny_policy(reward.config.vocab_size, seed=seed, **fields) for seed in (2, 3)))


@pytest.mark.parametrize("kind", [of_a_classifier, of_a_weighted_sum, of_an_implicit_pair])
@pytest.mark.parametrize(
    "models, found",
    [
        (another(more=1000), "1032 embeddings, .* of 32 .*1000 embeddings more"),
        (another((1, 2), (0, [3, 4])), r"ids \[0\] and \[3, 4\], the policy \[1\] and \[2\]"),
    ],
    ids=["size", "ends"],
)
def test_a_reward_model_of_another_tokenizers_ids_is_warned_of(models, found, kind, monkeypatch):
    monkeypatch.setattr("stars_fast.rewards.ids._warned", set())
    policy, reward = models
    with pytest.warns(UserWarning, match=f"{found}.*tokenizer='policy' if it does, else its own tokenizer"):
        StarsEngine(policy, kind(policy, reward))


@pytest.mark.parametrize(
    "models",
    [another(), another((1, 2), (1, 3)), another((1, 2), (None, 3)), another((1, 2), (0, [2, 3]))],
    ids=["alike", "another eos", "no bos", "an eos in common"],
)
def test_reward_models_of_the_same_family_are_not_warned_of(models, recwarn):
    StarsEngine(*models)
    assert not recwarn.list


def test_the_demo_models_are_not_warned_of(recwarn):
    policy, reward, tokenizer = demo.load()
    StarsEngine(policy, reward, tokenizer=tokenizer)
    assert not recwarn.list


def test_a_reward_model_with_a_tokenizer_of_its_own_is_not_warned_of(tokenizer32, recwarn):
    policy, reward = another(more=1000)
    StarsEngine(policy, reward, tokenizer=tokenizer32, reward_tokenizer=tiny_tokenizer(40))
    assert not recwarn.list
