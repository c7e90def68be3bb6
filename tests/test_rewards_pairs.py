"""Encoders that were trained on tokenizer(question, answer) are scored on that, separators and token types included."""

import pytest
import torch
from conftest import refused, tiny_policy, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import ClassifierReward

VOCAB = 32
CONFIG = StarsConfig(segment_length=3, max_new_tokens=9, max_attempts=3, target_reward=0.5, beta=0.6)
pytestmark = pytest.mark.filterwarnings("ignore:.*scored in full")


@pytest.fixture(scope="module")
def encoder():
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


def pairing(types: bool = True) -> PreTrainedTokenizerFast:
    """Words, and what BERT puts around two texts."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(VOCAB - 4))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=specials
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_input_names=inputs)


@torch.no_grad()
def own(model, tokenizer, *texts):
    return model(**tokenizer(*texts, return_tensors="pt")).logits.item()


@pytest.mark.parametrize("types", [True, False], ids=["types", "no types"])
def test_answers_are_scored_as_the_second_text_of_a_pair(encoder, types):
    tokenizer = pairing(types)
    reward = ClassifierReward(encoder, tokenizer, pairs=True)
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), reward, tokenizer=tiny_tokenizer(VOCAB))
    chat = [{"role": "user", "content": "w5 w6 w7" if types else [{"type": "text", "text": "w5 w6 w7"}]}]
    out = engine.generate(["w1 w2", chat], CONFIG, seed=0, num_return_sequences=2, ignore_eos=True)
    assert out.errors == [None] * 4
    for question, answer, found in zip(["w1 w2"] * 2 + ["w5 w6 w7"] * 2, out.texts, out.rewards, strict=True):
        assert found == pytest.approx(own(encoder, tokenizer, question, answer), abs=1e-5)
        assert found != pytest.approx(own(encoder, tokenizer, f"{question} {answer}"), abs=1e-3)


def test_one_text_is_warned_of_unless_it_is_said_to_be_right(encoder, recwarn):
    policy, tokenizer = tiny_policy(VOCAB), tiny_tokenizer(VOCAB)
    with pytest.warns(UserWarning, match="BertForSequenceClassification is scored .* as one text.*pairs=True"):
        StarsEngine(policy, encoder, tokenizer=tokenizer, reward_tokenizer=pairing())
    recwarn.clear()
    StarsEngine(policy, ClassifierReward(encoder, pairing(), pairs=False), tokenizer=tokenizer)
    StarsEngine(policy, ClassifierReward(encoder, tokenizer), tokenizer=tokenizer)  # it makes no pairs
    assert not recwarn.list


def test_a_pair_has_one_question_and_nothing_behind_its_answer(encoder):
    reward = ClassifierReward(encoder, pairing(), pairs=True)
    engine = StarsEngine(tiny_policy(VOCAB), reward, tokenizer=tiny_tokenizer(VOCAB))
    turns = [{"role": role, "content": "w1"} for role in ("user", "assistant", "user")]
    with refused(r"prompts\[0\]", "3 turns", "reward_prompts="):
        engine.generate([turns], CONFIG)
    with refused("reward_tail", "pairs=True"):
        ClassifierReward(encoder, pairing(), tail=[3], pairs=True)
    with refused("pairs=True", "tokenizer="):
        StarsEngine(tiny_policy(VOCAB), ClassifierReward(encoder, pairs=True))
