"""No scorer reads ids of another tokenizer than its own in silence: whose it reads is known, said, or refused."""

import copy
import warnings

import pytest
import torch
from conftest import refused, tiny_config, tiny_policy, tiny_reward, tiny_tokenizer
from test_text_tokenizers import Hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

import stars_fast
from stars_fast import StarsConfig, StarsEngine, demo
from stars_fast.methods import RSD
from stars_fast.rewards import ClassifierReward, ImplicitReward, JudgeReward, WeightedSum, ids

VOCAB = 32
CONFIG = StarsConfig(segment_length=4, max_new_tokens=8, max_attempts=3, target_reward=0.5, beta=0.6)


def backwards():
    """The words of ``tiny_tokenizer`` with other ids."""
    words = {f"w{index}": VOCAB - 2 - index for index in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def in_folder(folder, model, tokenizer=None):
    """The model as an object that was loaded from a folder, with a tokenizer beside it."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(ids, "_warned", set())
    monkeypatch.setattr(ids, "_without", {})


@pytest.fixture
def ours(tokenizer32):
    """A tokenizer without a chat template."""
    tokenizer = copy.deepcopy(tokenizer32)
    tokenizer.chat_template = None
    return tokenizer


def of_a_classifier(model):
    return model


def of_a_scorer(model):
    return ClassifierReward(model)


def of_a_weighted_sum(model):
    return WeightedSum({"liked": (1.0, ClassifierReward(model))})


KINDS = pytest.mark.parametrize("kind", [of_a_classifier, of_a_scorer, of_a_weighted_sum])


@KINDS
def test_a_reward_model_given_as_an_object_reads_the_tokenizer_it_was_saved_with(tmp_path, policy32, ours, kind):
    model, theirs = in_folder(tmp_path, tiny_reward(VOCAB), backwards()), backwards()
    out = StarsEngine(policy32, kind(model), tokenizer=ours).generate(["w1 w2"], CONFIG, seed=0, ignore_eos=True)
    with torch.no_grad():
        text = theirs("w1 w2 " + out.texts[0], return_tensors="pt")["input_ids"]
        assert out.rewards[0] == pytest.approx(model(input_ids=text).logits.item(), abs=1e-5)


@KINDS
def test_a_larger_vocabulary_of_which_nothing_is_known_is_refused(policy32, ours, kind):
    more = ids._MOST_PADDING + 1
    with refused("reward_tokenizer='policy'", "its own tokenizer", f"{VOCAB + more}", "made of a configuration"):
        StarsEngine(policy32, kind(tiny_reward(VOCAB + more)), tokenizer=ours)


@KINDS
def test_a_reward_model_with_an_added_pad_token_reads_the_policys_ids_with_a_warning(policy32, ours, kind):
    with pytest.warns(UserWarning, match=r"Llama\w+ of 33 embeddings, .* of 32 .*tokenizer='policy'"):
        engine = StarsEngine(policy32, kind(tiny_reward(VOCAB + 1)), tokenizer=ours)
    assert engine.generate(["w1 w2"], CONFIG, seed=0).errors == [None]


def test_another_kind_of_model_of_as_many_ids_is_warned_of(tmp_path, policy32, ours):
    theirs = Qwen2ForSequenceClassification(Qwen2Config(**tiny_config(VOCAB, num_labels=1).to_dict()))
    with pytest.warns(UserWarning, match=r"a Qwen2\w+ of 32 .*, a Llama\w+ of 32 .*no tokenizer beside"):
        StarsEngine(policy32, in_folder(tmp_path, theirs), tokenizer=ours)


def test_another_family_is_refused_where_its_tokenizer_is_missing(tmp_path, ours):
    reward = in_folder(tmp_path, tiny_reward(VOCAB, bos_token_id=0, eos_token_id=3))
    with refused(r"\[0\]", r"\[3\]", str(tmp_path), "reward_tokenizer='policy'"):
        StarsEngine(tiny_policy(VOCAB, bos_token_id=1), reward, tokenizer=ours)


@pytest.mark.parametrize("given", [{}, {"tokenizer": tiny_tokenizer(VOCAB)}], ids=["ids alone", "text"])
def test_that_the_policys_ids_are_read_is_said_in_one_word(policy32, recwarn, given):
    for more in (0, 1000):
        reward = tiny_reward(VOCAB + more)
        engine = StarsEngine(policy32, reward, reward_tokenizer="policy", **given)
        assert engine.generate([[1, 2]], CONFIG, seed=0).errors == [None]
        assert "'policy' says so" in engine.reward.reads.why
        StarsEngine(policy32, ClassifierReward(reward, "policy"), **given)
    pair = [tiny_policy(VOCAB, seed=seed) for seed in (2, 3)]
    StarsEngine(policy32, ImplicitReward(*pair, tokenizer="policy"), **given)
    assert not recwarn.list


def test_the_drop_in_takes_the_word_too(policy32, reward32, recwarn):
    inputs, settings = torch.tensor([[1, 2]]), {"stars_config": CONFIG, "seed": 0, "max_new_tokens": 4}
    given = {"reward_tokenizer": "policy"}
    drop_in = stars_fast.generate(policy32, inputs, reward_model=reward32, **given, **settings)
    decoder = stars_fast.decoding(reward32, CONFIG, seed=0, **given)
    custom = policy32.generate(inputs, do_sample=True, max_new_tokens=4, custom_generate=decoder)
    assert drop_in.tolist() == custom.tolist()
    assert not [one for one in recwarn if "ids" in str(one.message)]


@pytest.mark.parametrize("given", [{}, {"tokenizer": tiny_tokenizer(VOCAB)}], ids=["ids alone", "text"])
def test_two_objects_of_as_many_ids_that_were_made_here_are_used_without_a_word(policy32, reward32, recwarn, given):
    StarsEngine(policy32, reward32, **given)
    ids.check_draft(tiny_policy(VOCAB, seed=5), policy32, given.get("tokenizer"))
    assert not recwarn.list


def test_where_nothing_can_be_known_it_is_said_once_and_how_to_say_it(tmp_path, policy32, reward32, ours, recwarn):
    reward = in_folder(tmp_path, reward32)
    for given in ({}, {"tokenizer": ours}):
        StarsEngine(policy32, reward, **given)
    (said,) = recwarn
    assert "nothing says" in str(said.message) and "reward_tokenizer='policy'" in str(said.message)


def test_models_from_one_place_are_each_warned_of_and_again_where_a_warning_was_an_error(tmp_path, policy32, ours):
    reward, draft = in_folder(tmp_path, tiny_reward(VOCAB)), in_folder(tmp_path, tiny_policy(VOCAB, seed=5))
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(UserWarning, match="nothing says that the reward model"):
            warnings.simplefilter("error")
            StarsEngine(policy32, reward, tokenizer=ours)
    with pytest.warns(UserWarning, match="nothing says that draft"):
        ids.check_draft(draft, policy32, ours)


def test_a_repository_that_cannot_be_asked_is_asked_once(monkeypatch, policy32, reward32):
    hub, reward = Hub(monkeypatch, error=ConnectionError("offline")), copy.deepcopy(reward32)
    reward.config._name_or_path = "some/model"
    with pytest.warns(UserWarning, match=r"'some/model' is no folder, and the hub could not be asked .*: offline\)"):
        StarsEngine(policy32, reward)
    StarsEngine(policy32, reward)
    assert hub.asked == 1


def test_no_other_word_stands_for_a_tokenizer(reward32):
    with refused("reward_tokenizer='mine'", "'policy'"):
        ClassifierReward(reward32, "mine")


@pytest.mark.parametrize("given", [{}, {"tokenizer": None}], ids=["text", "ids alone"])
def test_the_demo_models_are_known_to_share_their_ids(recwarn, given):
    policy, reward, tokenizer = demo.load()
    engine = StarsEngine(policy, reward, **{"tokenizer": tokenizer, **given})
    assert engine.generate(tokenizer(["A film"])["input_ids"], CONFIG, seed=0).errors == [None]
    assert "beside" in engine.reward.reads.why and not recwarn.list


def test_models_loaded_from_one_place_share_their_ids(tmp_path, recwarn):
    policy = in_folder(tmp_path, tiny_policy(VOCAB))
    reward = LlamaForSequenceClassification(copy.deepcopy(policy.config))
    reward.config.num_labels = 1
    reward.score = torch.nn.Linear(16, 1, bias=False)
    assert StarsEngine(policy, reward).reward.reads.tokenizer is None
    nameless = tiny_policy(VOCAB)
    StarsEngine(torch.compile(nameless, backend="eager"), ImplicitReward(tiny_policy(VOCAB, seed=5), nameless))
    StarsEngine(policy, ImplicitReward(tiny_policy(VOCAB, seed=5), policy, tokenizer=None))
    assert not [one for one in recwarn if "nothing says" in str(one.message)]


def test_ids_of_a_policy_with_another_tokenizer_beside_it_are_refused(tmp_path, ours):
    policy = in_folder(tmp_path / "policy", tiny_policy(VOCAB), ours)
    model = in_folder(tmp_path / "reward", tiny_reward(VOCAB), backwards())
    judge = in_folder(tmp_path / "judge", tiny_policy(VOCAB), backwards())
    for reward in (model, JudgeReward(judge, backwards(), yes="w1", no="w2")):
        with refused("another vocabulary", "tokenizer="):
            StarsEngine(policy, reward)
    same = in_folder(tmp_path / "same", tiny_reward(VOCAB), ours)
    assert StarsEngine(policy, same).reward.shares_ids(stars_fast.rewards.RewardPrompt(0, [1], [1]))


def test_a_draft_of_another_tokenizer_is_refused_though_it_has_as_many_ids(tmp_path, policy32, ours):
    draft = in_folder(tmp_path, tiny_policy(VOCAB), backwards())
    engine = StarsEngine(policy32, lambda completions: [0.0] * len(completions), tokenizer=ours)
    with refused("draft", "another vocabulary"):
        engine.generate(["w1"], CONFIG, method=RSD(draft=draft))
    assert isinstance(draft, LlamaForCausalLM)


def test_a_scorer_does_not_change_whose_ids_it_reads_between_engines(tmp_path, ours):
    policy = in_folder(tmp_path / "a", tiny_policy(VOCAB), backwards())
    scorer = ClassifierReward(in_folder(tmp_path / "b", tiny_reward(VOCAB), backwards()))
    StarsEngine(policy, scorer)
    StarsEngine(policy, scorer, tokenizer=backwards())
    with refused("earlier engine", "scorer of its own"):
        StarsEngine(policy, scorer, tokenizer=ours)


def test_every_scorer_says_which_tokenizer_it_reads_with(tmp_path, policy32, reward32, ours):
    pair = [tiny_policy(VOCAB, seed=seed) for seed in (2, 3)]
    assert ImplicitReward(*pair, tokenizer=ours).tokenizer is ours
    assert JudgeReward(policy32, ours, yes="w1", no="w2").tokenizer is ours
    assert ClassifierReward(reward32, "policy").tokenizer is None
    scorer = ClassifierReward(in_folder(tmp_path, reward32, backwards()))
    assert scorer.tokenizer is None
    StarsEngine(policy32, scorer, tokenizer=ours)
    assert scorer.tokenizer.get_vocab() == backwards().get_vocab()
