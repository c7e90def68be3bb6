"""A quality estimator's reward is what its heads say of source and translation in a plain pass over the pair."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import refused, tiny_policy, tiny_tokenizer
from oracle import Oracle, Rule, next_token_probabilities, p_value, text
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutput

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import Completion, QualityReward, Response, RewardPrompt

VOCAB, HIDDEN = 32, 16
CONFIG = StarsConfig(method={"name": "best_of_n", "n": 3}, max_new_tokens=6, segment_length=3)
SOURCES = ["w5 w16 w7", "w20"]


def pairing():
    """``w12`` is three tokens of one word; special tokens as XLM-R has them."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "w", *(f"##{digit}" for digit in range(10))]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )


def classifier(kind, labels):
    config = XLMRobertaConfig(
        vocab_size=15,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        type_vocab_size=1,
        num_labels=labels,
        initializer_range=0.6,
    )
    with torch.random.fork_rng():
        torch.manual_seed(labels)
        return kind(config).eval()


@pytest.fixture(scope="module")
def tagger():
    return classifier(XLMRobertaForTokenClassification, 2)


@pytest.fixture(scope="module")
def estimator():
    """Of the first token and the mean over the translation."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(2 * HIDDEN, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())


@torch.no_grad()
def plain(tagger, estimator, source, answer, answer_first=True):
    """P(OK) of each word, and the sentence head's value, by the layout of the pair."""
    tokenizer = pairing()
    hidden = tagger.base_model(**tokenizer(*(answer, source)[:: 1 if answer_first else -1], return_tensors="pt"))
    hidden = hidden.last_hidden_state[0]
    before = 0 if answer_first else len(tokenizer.tokenize(source)) + 2  # the special token in front of the answer
    lengths = [len(tokenizer.tokenize(word)) for word in answer.split()]
    starts = [before + 1 + sum(lengths[:i]) for i in range(len(lengths))]
    mean = hidden[before : before + sum(lengths) + 2].mean(0)
    return tagger.classifier(hidden[starts]).softmax(-1)[:, 0].tolist(), estimator(torch.cat((mean, hidden[0]))).item()


@pytest.mark.parametrize("answer_first", [True, False])
def test_the_reward_is_that_of_both_heads_over_the_pair(tagger, estimator, answer_first):
    reward = QualityReward(
        tagger.base_model,
        pairing(),
        words=tagger.classifier,
        sentence=estimator,
        pooling="mixed",
        mix=0.3,
        answer_first=answer_first,
    )
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), reward, tokenizer=tiny_tokenizer(VOCAB))
    out = engine.generate(SOURCES, CONFIG, seed=1, num_return_sequences=3)
    assert out.errors == [None] * 6 and out.stats["reward_tokens"] > 0
    spread = set()
    for source, answer, found, segments in zip(
        [one for one in SOURCES for _ in range(3)], out.texts, out.rewards, out.segments, strict=True
    ):
        sure, sentence = plain(tagger, estimator, source, answer, answer_first)
        bad = [p < 0.5 for p in sure]
        words = 1 - sum(value for value, _ in itertools.groupby(bad)) / len(sure)
        assert segments[-1].parts == pytest.approx({"sentence": sentence, "words": words}, abs=1e-5)
        assert found == pytest.approx(0.3 * sentence + 0.7 * words, abs=1e-5)
        spread.add(round(words, 3))
    assert len(spread) > 1


def test_a_sequence_classifiers_own_head_says_what_its_model_says(tagger):
    model, tokenizer = classifier(XLMRobertaForSequenceClassification, 1), pairing()
    reward = QualityReward(model.base_model, tokenizer, sentence=model.classifier)
    engine = StarsEngine(tiny_policy(VOCAB), reward, tokenizer=tiny_tokenizer(VOCAB))
    out = engine.generate(SOURCES, CONFIG, seed=0)
    with torch.no_grad():
        own = [
            model(**tokenizer(a, s, return_tensors="pt")).logits.item() for s, a in zip(SOURCES, out.texts, strict=True)
        ]
    assert out.rewards == pytest.approx(own, abs=1e-5)


class Certain(nn.Module):
    """An encoder whose features are the ids themselves."""

    def __init__(self):
        super().__init__()
        self.config = XLMRobertaConfig(vocab_size=15, max_position_embeddings=66, pad_token_id=1)
        self.embed = nn.Embedding.from_pretrained(torch.eye(15))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask):
        return BaseModelOutput(last_hidden_state=self.embed(input_ids))


class Sure(nn.Module):
    """P(OK) of a token by its id: of a digit, a tenth of it and a half of that; of anything else 1."""

    def forward(self, features):
        ok = torch.cat((torch.ones(5), (torch.arange(10) + 0.5) / 10))[features.argmax(-1)]
        return torch.stack((ok, 1 - ok), -1).log()


def digits():
    """A pair's tokenizer whose words are digits."""
    tokenizer = pairing()
    vocab = {**{piece: i for piece, i in tokenizer.get_vocab().items() if i < 5}, **{f"w{d}": 5 + d for d in range(10)}}
    tokenizer.backend_tokenizer.model = models.WordLevel(vocab, unk_token="<unk>")
    return tokenizer


def scored(reward, answers, finished=True):
    words = tiny_tokenizer(VOCAB)
    prompt = RewardPrompt(0, "w1", [1], tokenizer=words)
    reward.begin([prompt], 8, 8, None)
    reward.open([prompt], 8)
    ids = [words(answer)["input_ids"] for answer in answers]
    values = reward.score([Completion(Response(prompt), one, finished, tokenizer=words) for one in ids])
    reward.end()
    return values


def test_errors_of_one_severity_side_by_side_are_one():
    reward = QualityReward(Certain(), digits(), words=Sure(), severities={0.2: 10, 0.4: 5, 0.6: 1})
    answers = ["w9 w8", "w0 w9", "w1 w0 w9", "w1 w3 w9", "w5 w9 w4", "w2 w3 w0 w5 w9"]
    expected = [1, 1 - 10 / 2, 1 - 10 / 3, 1 - 15 / 3, 1 - 2 / 3, 1 - 16 / 5]
    assert scored(reward, answers) == pytest.approx(expected)
    assert scored(reward, ["", "w9"]) == [0, 1]  # nothing is no translation
    assert scored(reward, [""]) == [0]
    assert scored(QualityReward(Certain(), digits(), words=Sure()), ["w0 w9 w1 w9"]) == [0.5]


def test_each_token_is_a_word_where_a_script_has_no_spaces():
    for per_token, expected in ((True, 1 - 1 / 2), (False, 1.0)):
        tokenizer = pairing()  # w0 is a word of two tokens, and only the second is bad
        reward = QualityReward(Certain(), tokenizer, words=Sure(), per_token=per_token)
        assert scored(reward, ["w0"]) == [expected]


def test_unfinished_translations_are_scored_by_their_words_but_the_last(estimator):
    with_partial = dict(words=Sure(), sentence=nn.Linear(15, 1), partial=True)
    reward = QualityReward(Certain(), digits(), **with_partial)
    assert scored(reward, ["w9 w0 w0", "w9 w0", "w9", ""], finished=False) == [0.5, 1.0, 0.0, 0.0]
    assert scored(reward, ["w9 w0"]) != [0.5]
    policy, tokenizer = tiny_policy(VOCAB), tiny_tokenizer(VOCAB)
    engine = StarsEngine(policy, QualityReward(Certain(), digits(), words=Sure()), tokenizer=tokenizer)
    with refused("'stars' scores unfinished answers", "QualityReward"):
        engine.generate(["w1"], StarsConfig())
    with refused("partial=True", "words="):
        QualityReward(Certain(), digits(), sentence=nn.Linear(15, 1), partial=True)


def test_guided_by_tags_the_text_follows_the_enumerated_law():
    rule = Rule(segment_length=1, max_attempts=4, max_new_tokens=3, target_reward=1.0, alpha=1.0, beta=0.4, eos=3)
    policy, names = tiny_policy(4, seed=3), tiny_tokenizer(4)  # w0 and w1 are bad

    def reward(completion):
        done = rule.finished(completion)
        words = [token for token in completion if token != 3][: None if done else -1]
        errors = sum(bad for bad, _ in itertools.groupby(token < 2 for token in words))
        return 1 - 3 * errors / len(words) if words else 0

    scorer = QualityReward(Certain(), digits(), words=Sure(), severities={0.2: 3.0}, partial=True)
    engine = StarsEngine(policy, scorer, tokenizer=names, max_rows=4000)
    out = engine.generate([[1, 2]], seed=0, num_return_sequences=800, reward_prompts=["w1"], **rule.stars_config())
    found = [tuple(one) for one in out.completions]
    assert out.rewards == pytest.approx([reward(one) for one in found])
    assert len(Counter(out.rewards)) > 2
    law, blind = (
        Oracle(next_token_probabilities(policy, [1, 2], rule), reward, one).law(text)
        for one in (rule, replace(rule, beta=1e9))
    )
    assert p_value({0: found}, {0: law}) > 1e-3
    assert p_value({0: found}, {0: blind}) < 1e-6


def test_what_is_no_head_or_tokenizer_is_refused(tagger):
    encoder, tokenizer = tagger.base_model, pairing()
    with refused("words=, sentence="):
        QualityReward(encoder, tokenizer)
    with refused("pooling='mean'", "'first' or 'mixed'"):
        QualityReward(encoder, tokenizer, sentence=nn.Linear(HIDDEN, 1), pooling="mean")
    with refused("severities={}"):
        QualityReward(encoder, tokenizer, words=tagger.classifier, severities={})
    with refused("tokenizer is None", "fast"):
        QualityReward(encoder, None, words=tagger.classifier)
    with pytest.raises(TypeError, match=r"words=Linear.* gives \[\d+, 1\].*at least one label more"):
        QualityReward(encoder, tokenizer, words=nn.Linear(HIDDEN, 1))
    with pytest.raises(TypeError, match=r"sentence=Linear.* gives \[2, 1, 3\].*one value each"):
        QualityReward(encoder, tokenizer, sentence=nn.Linear(HIDDEN, 3))
    with pytest.raises(TypeError, match=r"sentence=Linear.* must take features \[2, 1, 32\]"):
        QualityReward(encoder, tokenizer, sentence=nn.Linear(HIDDEN, 1), pooling="mixed")
