"""``stars_fast.generate`` and ``custom_generate=decoding(...)`` take and honour what ``model.generate`` does."""

import copy
import gc
import inspect
import math
import pickle
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType

import pytest
import torch
import transformers
from conftest import sum_reward, tiny_policy, tiny_reward, tiny_tokenizer
from scipy.stats import chisquare
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    TopKLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation import utils as transformers_generate

import stars_fast
from stars_fast import StarsConfig, StarsEngine, StarsGenerateOutput
from stars_fast.methods import Args, Cards, Mara
from stars_fast.policy.policy import Policy
from stars_fast.rewards import Reward

VOCAB, EOS, PAD = 32, 31, 0
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)
ANYTHING = CONFIG.replace(target_reward=-math.inf)  # plain sampling


@pytest.fixture(scope="module")
def policy():
    policy = tiny_policy(VOCAB, hidden=32)
    policy.generation_config.pad_token_id = PAD
    return policy


def inputs(prompts=PROMPTS):
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def facade(policy, reward=sum_reward, config=CONFIG, prompts=PROMPTS, **kwargs):
    return stars_fast.generate(policy, **inputs(prompts), reward_model=reward, stars_config=config, **kwargs)


def callback(policy, reward=sum_reward, config=CONFIG, prompts=PROMPTS, **kwargs):
    own = {name: kwargs.pop(name) for name in ("streamer", "tokenizer", "seed") if name in kwargs}
    how = stars_fast.decoding(reward, config, **own)
    return policy.generate(**inputs(prompts), custom_generate=how, **{"do_sample": True, **kwargs})


both = pytest.mark.parametrize("generate", [facade, callback])
# transformers tells a call without max_new_tokens to set it; the length then comes from StarsConfig.
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


def completions(out, width=5, pad=PAD):
    """Rows without prompt and padding; PAD itself may be sampled, so only what follows an EOS is cut."""
    rows = [row[width:] for row in out.tolist()]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


# Shapes and fields


@both
def test_rows_are_prompts_as_they_came_and_then_the_text(policy, generate):
    out = generate(policy, num_return_sequences=3, max_new_tokens=9)
    assert out.shape[0] == 12 and out.shape[1] <= 14 and out.dtype == torch.int64
    assert torch.equal(out[:, :5], inputs()["input_ids"].repeat_interleave(3, 0))


@both
def test_what_follows_an_eos_is_padding(policy, generate):
    out = generate(policy, num_return_sequences=16, max_new_tokens=14)
    ended = 0
    for row, completion in zip(out.tolist(), completions(out), strict=True):
        ended += completion[-1] == EOS
        assert set(row[5 + len(completion) :]) <= {PAD}
    assert 0 < ended < len(out)


@both
def test_left_padding_is_not_seen(policy, generate):
    padded = generate(policy, seed=[1, 2, 3, 4])
    for i, prompt in enumerate(PROMPTS):
        alone = generate(policy, prompts=[prompt], seed=[i + 1])
        assert completions(alone, len(prompt))[0] == completions(padded)[i]


@both
def test_the_rewards_come_with_the_output_object(policy, generate):
    reward = tiny_reward(VOCAB, hidden=32)
    out = generate(policy, reward, return_dict_in_generate=True, num_return_sequences=2, top_k=0)
    assert isinstance(out, StarsGenerateOutput) and isinstance(out, GenerateDecoderOnlyOutput)
    assert out.rewards.shape == (8,) and out["sequences"] is out.sequences
    assert out.stats["committed_tokens"] > 0
    for row, completion in enumerate(completions(out.sequences)):
        with torch.no_grad():
            fresh = reward(torch.tensor([PROMPTS[row // 2] + completion])).logits.item()
        assert out.rewards[row].item() == pytest.approx(fresh, abs=1e-4)


def test_inputs_may_be_positional_as_in_generate(policy):
    ids = torch.tensor([[5, 6, 7]])
    torch.manual_seed(0)
    first = stars_fast.generate(policy, ids, reward_model=sum_reward, stars_config=CONFIG)
    torch.manual_seed(0)
    second = stars_fast.generate(policy, input_ids=ids, reward_model=sum_reward, stars_config=CONFIG)
    assert torch.equal(first, second)
    parameters = list(inspect.signature(stars_fast.generate).parameters)
    assert parameters[:3] == ["model", "inputs", "generation_config"]


@both
def test_torch_manual_seed_reproduces(policy, generate):
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(generate(policy, max_new_tokens=9))
    assert torch.equal(outs[0], outs[1])
    assert outs[0].shape != outs[2].shape or not torch.equal(outs[0], outs[2])


def test_facade_and_callback_are_the_same(policy):
    for kwargs in ({}, {"top_k": 4}, {"temperature": 0.5, "max_new_tokens": 6, "no_repeat_ngram_size": 2}):
        outs = []
        for generate in (facade, callback):
            torch.manual_seed(5)
            outs.append(generate(policy, num_return_sequences=2, **kwargs))
        assert torch.equal(*outs)


# Which setting holds: the call's, then StarsConfig's, then the model's, then transformers' default


def used(monkeypatch, generate, policy, config=ANYTHING, **kwargs):
    """The sampling settings and limits that the engine was run with."""
    seen = {}
    propose = Policy.propose

    def watch(self, leaves):
        seen.update(vars(leaves[0].sampling), length=leaves[0].length, processor=leaves[0].processor)
        return propose(self, leaves)

    monkeypatch.setattr(Policy, "propose", watch)
    generate(policy, config=config, prompts=[[5, 6, 7]], **kwargs)
    return seen


@both
@pytest.mark.parametrize(
    "name, own, config, call",
    [
        ("temperature", 0.9, 0.8, 0.7),
        ("top_k", 9, 8, 7),
        ("top_p", 0.9, 0.8, 0.7),
        ("repetition_penalty", 1.3, 1.2, 1.1),
    ],
)
def test_the_call_wins_over_the_config_and_that_over_the_model(monkeypatch, generate, name, own, config, call):
    policy = tiny_policy(VOCAB, hidden=32)
    assert used(monkeypatch, generate, policy)["top_k"] == 50
    setattr(policy.generation_config, name, own)
    assert used(monkeypatch, generate, policy)[name] == own
    configured = ANYTHING.replace(**{name: config})
    assert used(monkeypatch, generate, policy, configured)[name] == config
    assert used(monkeypatch, generate, policy, configured, **{name: call})[name] == call
    theirs = GenerationConfig(**{name: call}, do_sample=True)
    assert used(monkeypatch, generate, policy, configured, generation_config=theirs)[name] == call


@both
def test_eos_token_id_follows_the_same_order(monkeypatch, generate):
    policy = tiny_policy(VOCAB, hidden=32)
    assert used(monkeypatch, generate, policy)["eos_token_ids"] == (EOS,)
    configured = ANYTHING.replace(eos_token_id=3)
    assert used(monkeypatch, generate, policy, configured)["eos_token_ids"] == (3,)
    assert used(monkeypatch, generate, policy, configured, eos_token_id=[4, 5])["eos_token_ids"] == (4, 5)


@both
@pytest.mark.parametrize(
    "kwargs, length",
    [({}, 14), ({"max_new_tokens": 6}, 6), ({"max_length": 10}, 5), ({"max_length": 30, "max_new_tokens": 7}, 7)],
    ids=str,
)
def test_lengths_are_those_of_the_call_or_else_of_the_config(policy, generate, kwargs, length):
    out = generate(policy, config=CONFIG.replace(ignore_eos=True), **kwargs)
    assert out.shape[1] == 5 + length


@both
def test_lengths_and_counts_of_the_model_hold_where_nobody_else_sets_them(monkeypatch, policy, generate):
    monkeypatch.setattr(policy.generation_config, "max_new_tokens", 4)
    monkeypatch.setattr(policy.generation_config, "num_return_sequences", 3)
    monkeypatch.setattr(policy.generation_config, "do_sample", True)
    config = StarsConfig(target_reward=0.0, segment_length=4, ignore_eos=True)
    rows, width = inputs()["input_ids"].shape
    assert generate(policy, config=config).shape == (3 * rows, width + 4)


def test_num_return_sequences_of_the_config_holds_unless_the_call_says_otherwise(policy):
    config = CONFIG.replace(num_return_sequences=3)
    assert facade(policy, config=config).shape[0] == 12
    assert facade(policy, config=config, num_return_sequences=2).shape[0] == 8
    assert callback(policy, config=config, num_return_sequences=2).shape[0] == 8


# The law


@torch.no_grad()
def first_token_law(policy, prompt, process):
    ids = torch.tensor([prompt])
    return process(ids, policy(ids).logits[:, -1].float()).softmax(-1)[0].double()


def assert_law(out, law):
    counts = torch.bincount(out[:, 5], minlength=len(law)).double()
    assert counts[law == 0].sum() == 0
    keep = law > 0
    expected = law[keep] / law[keep].sum() * len(out)
    common = expected > 5
    observed = torch.cat([counts[keep][common], counts[keep][~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert chisquare(observed, expected).pvalue > 1e-4


def sample_first(generate, policy, prompt=PROMPTS[2], **kwargs):
    torch.manual_seed(0)
    return generate(policy, config=ANYTHING, prompts=[prompt], num_return_sequences=1500, max_new_tokens=1, **kwargs)


@both
def test_transformers_default_of_top_k_50_is_in_the_law(generate):
    policy = tiny_policy(80, hidden=32, scale=0.3)
    law = first_token_law(policy, PROMPTS[2], TopKLogitsWarper(50))
    assert (law == 0).sum() == 30
    assert_law(sample_first(generate, policy), law)
    everything = first_token_law(policy, PROMPTS[2], lambda ids, scores: scores)
    out = sample_first(generate, policy, top_k=0)
    assert_law(out, everything)
    assert (law[out[:, 5]] == 0).any()


@both
@pytest.mark.parametrize("kwargs", [{"typical_p": 0.6}, {"temperature": 0.6, "top_k": 5}, {"min_p": 0.2}], ids=str)
def test_the_law_is_that_of_transformers_own_processors(policy, generate, kwargs):
    torch.manual_seed(0)
    theirs = policy.generate(
        **inputs(PROMPTS[2:3]), do_sample=True, num_return_sequences=1500, max_new_tokens=1, **kwargs
    )
    ours = sample_first(generate, policy, **kwargs)
    a, b = (torch.bincount(out[:, 5], minlength=VOCAB).double() for out in (theirs, ours))
    assert torch.equal(a > 25, (b > 0) & (a > 25)) and torch.equal(b > 25, (a > 0) & (b > 25))
    both_seen = a + b > 20
    statistic = ((a - b)[both_seen] ** 2 / (a + b)[both_seen]).sum().item()
    assert statistic < both_seen.sum() + 5 * math.sqrt(2 * both_seen.sum())


# Streaming


class Recorder:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        if value.dim() > 1:
            assert value.shape[0] == 1  # as transformers' TextStreamer demands
            value = value[0]
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


@both
def test_a_streamer_gets_the_prompt_then_every_token_then_the_end(policy, generate):
    streamer = Recorder()
    out = generate(policy, prompts=PROMPTS[:1], streamer=streamer, seed=1)
    assert streamer.ended == 1 and streamer.puts[0] == PROMPTS[0]
    assert len(streamer.puts) > 2
    assert [token for put in streamer.puts[1:] for token in put] == out[0, 3:].tolist()


def test_a_streamer_takes_one_row_only(policy):
    streamer = Recorder()
    with pytest.raises(ValueError, match="streamer"):
        facade(policy, streamer=streamer)
    assert not streamer.puts and streamer.ended == 1


@pytest.mark.parametrize(
    "generate, kwargs",
    [
        (facade, {"num_beams": 2}),
        (facade, {"do_sample": False}),
        (facade, {"config": CONFIG.replace(eos_token_id=99)}),
        (facade, {"max_rows": 0}),
        (callback, {"num_beams": 2}),
        (callback, {"config": CONFIG.replace(eos_token_id=99)}),
    ],
)
def test_a_refused_call_ends_its_streamer(policy, generate, kwargs):
    """Whoever reads it on another thread would wait for ever."""
    streamer = Recorder()
    with pytest.raises(ValueError):
        generate(policy, prompts=PROMPTS[:1], streamer=streamer, **kwargs)
    assert streamer.ended == 1 and not streamer.puts


# What cannot be had


@both
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"do_sample": False}, "do_sample=False"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
    ],
    ids=str,
)
def test_modes_that_guidance_cannot_have_are_refused(policy, generate, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(policy, **kwargs)
    if "do_sample" not in kwargs:
        with pytest.raises(ValueError, match=message):
            generate(policy, generation_config=GenerationConfig(**kwargs, do_sample=True))


@both
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["inputs_embeds", "past_key_values"])
def test_anything_to_start_from_besides_ids_is_refused(policy, generate, name):
    cache = DynamicCache()
    embeds = policy.get_input_embeddings()(policy(inputs()["input_ids"], past_key_values=cache).logits.argmax(-1))
    with pytest.raises(ValueError, match=f"{name}|cache holds"):  # from 5.24 on transformers hands on a cache
        generate(policy, max_new_tokens=3, **{name: embeds if name == "inputs_embeds" else cache})


@pytest.mark.parametrize("given", ["w3 w4", ["w3"], [[3, 4]]], ids=str)
def test_what_is_no_tensor_of_ids_is_refused_with_what_to_give(policy, given):
    for call in ({"inputs": given}, {"input_ids": given}):
        with pytest.raises(TypeError, match=rf"{next(iter(call))}=.*\*\*tokenizer\(text, return_tensors='pt'\)"):
            stars_fast.generate(policy, reward_model=sum_reward, **call)


def test_an_assistant_is_refused(policy):
    with pytest.raises(ValueError, match="assistant_model"):
        facade(policy, assistant_model=tiny_policy(VOCAB, hidden=32))


def test_unknown_options_of_decoding_are_refused():
    with pytest.raises(TypeError, match="max_row"):
        stars_fast.decoding(sum_reward, CONFIG, max_row=3)


def test_what_is_no_decoding_of_a_reward_says_how_to_make_one(policy):
    call = {"do_sample": True, "max_new_tokens": 2, **inputs()}
    with pytest.raises(TypeError, match=r"custom_generate=decoding\(reward_model\)"):
        policy.generate(**call, custom_generate=stars_fast.decoding)
    with pytest.raises(ValueError, match=r"custom_generate, give decoding\(reward_model\)"):
        policy.generate(**call, custom_generate=stars_fast.generate, reward_model=sum_reward)


def test_a_generation_config_that_is_none_is_refused(policy):
    with pytest.raises(TypeError, match="give a GenerationConfig"):
        stars_fast.generate(policy, **inputs(), generation_config={"top_k": 3}, reward_model=sum_reward)


def test_errors_are_raised_with_the_prompts_index(policy):
    def fails(prompts):
        return [None if prompt == [8] else 0.0 for prompt in prompts]

    with pytest.raises(RuntimeError, match=r"prompts\[1\].*None"):
        facade(policy, fails, on_error="raise")


@both
def test_a_row_that_fails_costs_no_other_and_is_told(policy, generate):
    def fails(prompts, completions):
        if [8] in prompts:
            raise ArithmeticError("not today")
        return sum_reward(completions)

    good = generate(policy, seed=3)
    with pytest.warns(UserWarning, match=r"1 of 4 requests failed.*not today.*return_dict_in_generate=True"):
        out = generate(policy, fails, seed=3)
    assert [row == 1 or ids == completions(good)[row] for row, ids in enumerate(completions(out))] == [True] * 4
    assert set(out[1, 5:].tolist()) == {PAD}
    with pytest.warns(UserWarning, match="1 of 4"):
        out = generate(policy, fails, seed=3, return_dict_in_generate=True)
    assert [error is None for error in out.errors] == out.rewards.isfinite().tolist() == [True, False, True, True]


def test_where_all_rows_fail_a_tensor_raises_the_cause_and_an_output_says_it(policy):
    def fails(prompts):
        raise ArithmeticError("not today")

    with pytest.raises(RuntimeError, match="not today") as raised:
        facade(policy, fails)
    assert isinstance(raised.value.__cause__, ArithmeticError)
    with pytest.warns(UserWarning, match="no request succeeded"):
        out = facade(policy, fails, return_dict_in_generate=True)
    assert out.sequences.shape == (4, 5) and all("not today" in error for error in out.errors)


def test_the_callers_generation_config_is_left_alone(policy):
    theirs = GenerationConfig(max_new_tokens=6, top_k=5, stop_strings=["w9"])
    before, models = theirs.to_dict(), policy.generation_config.to_dict()
    facade(policy, tiny_reward(VOCAB, hidden=32), generation_config=theirs, tokenizer=tiny_tokenizer(VOCAB))
    assert theirs.to_dict() == before and policy.generation_config.to_dict() == models


def test_a_generation_config_is_all_that_transformers_gets(policy, monkeypatch):
    """It deprecates settings beside one, and would say so to a caller who gave none."""
    said = []
    monkeypatch.setattr(transformers_generate.logger, "warning_once", said.append)
    settings = {"top_k": 5, "stop_strings": ["w9"]}
    kwargs = {
        "reward": lambda completion_ids: sum_reward(completion_ids),
        "config": CONFIG.replace(num_return_sequences=2, top_p=0.9, eos_token_id=EOS),
        "tokenizer": tiny_tokenizer(VOCAB),
        "seed": 0,
    }
    out = facade(policy, generation_config=GenerationConfig(**settings), max_new_tokens=None, **kwargs)
    assert not [line for line in said if "together with" in line]
    assert len(out) == 8 and torch.equal(out, facade(policy, **settings, **kwargs))


@pytest.mark.parametrize("name, value", [("method", "cards"), ("segment_length", 4), ("target_reward", 1.0)])
def test_a_setting_of_guidance_in_the_wrong_place_is_told_where_it_belongs(policy, name, value):
    place = re.escape(f"pass stars_config=StarsConfig({name}={value!r})")
    with pytest.raises(TypeError, match=place):
        facade(policy, **{name: value})
    with pytest.raises(TypeError, match=place):
        stars_fast.decoding(sum_reward, **{name: value})


@both
def test_stop_strings_without_a_tokenizer_say_where_it_goes(policy, generate):
    with pytest.raises(ValueError, match=r"pass tokenizer= to StarsEngine, stars_fast\.generate or decoding"):
        generate(policy, config=CONFIG.replace(stop_strings=["w9"]))


def test_who_asks_a_decoder_for_its_signature_finds_its_variables_as_they_were(policy):
    """Only transformers, which has taken its caller's tokenizer away, is given one."""
    kwargs, decoder = {}, stars_fast.decoding(sum_reward, CONFIG, tokenizer=tiny_tokenizer(VOCAB))

    def _extract_generation_mode_kwargs(kwargs):
        return asked(kwargs)

    def asked(kwargs):
        return inspect.signature(decoder)

    assert "tokenizer" in _extract_generation_mode_kwargs(kwargs).parameters and kwargs == {}


def test_a_transformers_that_asks_for_the_signature_elsewhere_is_named(policy, monkeypatch):
    asks = GenerationMixin._extract_generation_mode_kwargs
    renamed = FunctionType(asks.__code__.replace(co_name="_mode_kwargs"), asks.__globals__)
    monkeypatch.setattr(GenerationMixin, "_extract_generation_mode_kwargs", renamed)
    with pytest.warns(UserWarning, match=rf"transformers {re.escape(transformers.__version__)} has not .* tokenizer"):
        callback(policy, max_new_tokens=4)


def test_who_wraps_a_decoder_is_told_what_it_does_not_see(policy):
    decoder = stars_fast.decoding(sum_reward, CONFIG)

    def wrapped(model, input_ids, **given):
        return decoder(model, input_ids, **given)

    with pytest.warns(UserWarning, match="where custom_generate= is the method itself"):
        policy.generate(**inputs(PROMPTS), do_sample=True, max_new_tokens=4, custom_generate=wrapped)


# The engine, which stays with the model


@pytest.fixture
def made(monkeypatch):
    """The options of each engine that is made."""
    given = []
    original = StarsEngine.__init__

    def init(self, *args, **options):
        given.append(options)
        original(self, *args, **options)

    monkeypatch.setattr(StarsEngine, "__init__", init)
    return given


@both
def test_settings_of_the_engine_reach_it(made, generate):
    settings = dict(gpu_memory_utilization=0.5, cuda_graphs=False, max_rows=3)
    if generate is facade:
        facade(tiny_policy(VOCAB), **settings)
    else:
        tiny_policy(VOCAB).generate(
            **inputs(), do_sample=True, custom_generate=stars_fast.decoding(sum_reward, **settings)
        )
    (options,) = made
    assert options.items() >= settings.items()
    assert options["torch_compile"] is False


def test_calls_on_the_same_models_share_an_engine(made):
    policy, reward = tiny_policy(VOCAB), tiny_reward(VOCAB)
    for seed, generate, options in ((0, facade, {}), (1, callback, {}), (2, facade, {"max_new_tokens": 5})):
        out = generate(policy, reward, seed=seed, **options)
        assert len(made) == seed + 1
        assert torch.equal(out, generate(tiny_policy(VOCAB), reward, seed=seed, **options))


def test_weights_may_change_between_calls():
    policy, fresh = tiny_policy(VOCAB), tiny_policy(VOCAB, seed=7)
    before = facade(policy, seed=0)
    policy.load_state_dict(fresh.state_dict())
    after = facade(policy, seed=0)
    assert torch.equal(after, facade(fresh, seed=0)) and not torch.equal(before, after)


class Scorer:
    def score(self, completions):
        return sum_reward(completions)


def test_another_reward_tokenizer_or_option_makes_another_engine(made, tmp_path):
    policy, scorer = tiny_policy(VOCAB), Scorer()
    tiny_reward(VOCAB).save_pretrained(tmp_path)
    calls = [
        (sum_reward, {}),
        (scorer.score, {}),
        (scorer.score, {}),  # another object of the same method
        (Scorer().score, {}),
        (str(tmp_path), {}),
        (str(tmp_path), {"reward_tail": [1, 2]}),
        (str(tmp_path), {"reward_tail": torch.tensor([1, 2])}),
        (str(tmp_path), {"reward_tail": [1, 3]}),
        (tmp_path, {"max_rows": 2}),
        (tmp_path, {"max_rows": 3}),
    ]
    counts = []
    for reward, options in calls:
        facade(policy, reward, max_new_tokens=2, **options)
        counts.append(len(made))
    assert counts == [1, 2, 2, 3, 4, 5, 5, 6, 7, 8]
    for tokenizer in (tiny_tokenizer(VOCAB), tiny_tokenizer(VOCAB)):
        facade(policy, tokenizer=tokenizer, reward=lambda completion_ids: sum_reward(completion_ids), max_new_tokens=2)
    assert len(made) == 10


@pytest.mark.parametrize("changed", ["policy", "reward"])
def test_a_model_that_has_moved_gets_another_engine(made, changed):
    models = {"policy": tiny_policy(VOCAB), "reward": tiny_reward(VOCAB)}
    facade(**models, max_new_tokens=2)
    models[changed].bfloat16()
    facade(**models, max_new_tokens=2)
    models[changed].float()
    assert torch.equal(facade(**models, seed=0), facade(tiny_policy(VOCAB), tiny_reward(VOCAB), seed=0))
    assert len(made) == 4
    models["reward"].resize_token_embeddings(VOCAB + 8)
    facade(**models, max_new_tokens=2)
    assert len(made) == 5


def test_a_dropped_model_takes_its_engine_with_it():
    policy, reward = tiny_policy(VOCAB), tiny_reward(VOCAB)
    facade(policy, reward)
    gone = [weakref.ref(model) for model in (policy, reward, vars(policy)["_stars_fast_engine"].engine)]
    del policy, reward
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_an_engine_of_its_own(made, copied):
    policy, fresh = tiny_policy(VOCAB), tiny_policy(VOCAB, seed=7)
    expected = facade(policy, seed=0)
    other = copied(policy)
    assert vars(other)["_stars_fast_engine"] is None
    other.load_state_dict(fresh.state_dict())
    assert torch.equal(facade(other, seed=0), facade(fresh, seed=0))
    assert torch.equal(facade(policy, seed=0), expected)
    assert len(made) == 3


def test_a_copy_that_shares_its_layers_is_another_model_still(made):
    policy = tiny_policy(VOCAB)
    assert torch.equal(facade(policy, seed=0), facade(copy.copy(policy), seed=0))
    assert len(made) == 2


def test_the_model_is_saved_as_before(tmp_path):
    policy = tiny_policy(VOCAB)
    names = policy.state_dict().keys()
    facade(policy)
    assert policy.state_dict().keys() == names
    policy.save_pretrained(tmp_path)
    assert torch.equal(facade(type(policy).from_pretrained(tmp_path), seed=0), facade(policy, seed=0))


def test_threads_on_one_model_are_all_served():
    policy = tiny_policy(VOCAB)
    expected = [facade(policy, seed=seed) for seed in range(8)]
    barrier = threading.Barrier(4)

    def run(seed):
        barrier.wait()
        return facade(policy, seed=seed)

    with ThreadPoolExecutor(4) as threads:
        outs = list(threads.map(run, range(8)))
    assert all(map(torch.equal, outs, expected))


def test_a_call_within_a_call_has_an_engine_of_its_own():
    policy = tiny_policy(VOCAB)
    inner = []

    def reward(completions):
        inner.append(facade(policy, max_new_tokens=2, seed=0))
        return sum_reward(completions)

    assert torch.equal(facade(policy, reward, seed=1), facade(tiny_policy(VOCAB), seed=1))
    assert all(torch.equal(out, inner[0]) for out in inner)


# Methods


class Sums(Reward):
    def score(self, completions):
        return sum_reward([completion.tokens for completion in completions])


METHODS = [Args(top_k=10, weight=0.0), Args(top_k=10, temperature=1.0), Mara(mlp=torch.nn.Linear(32, 2), top_p=1.0)]


@pytest.mark.parametrize("method", METHODS, ids=["args", "args drawn", "mara"])
def test_likely_tokens_are_those_that_processors_leave(policy, method):
    """Fewer are allowed than the method looks at."""
    banned = [[token] for token in range(VOCAB) if token not in (3, 4, EOS)]
    config = ANYTHING.replace(method=method)
    out = facade(policy, Sums(), config, bad_words_ids=banned, top_k=0, seed=0)
    assert {token for completion in completions(out) for token in completion} <= {3, 4, EOS, PAD}
    assert {3, 4} & {token for completion in completions(out) for token in completion}


def test_args_weighs_the_likelihoods_that_processors_leave(policy):
    """A bias that outweighs everything, which the raw likelihood does not know."""
    config = ANYTHING.replace(method=Args(top_k=VOCAB, weight=0.0), max_new_tokens=5)
    out = facade(policy, Sums(), config, sequence_bias={(7,): 50.0}, top_k=0, seed=0)
    assert all(completion == [7] * 5 for completion in completions(out))


def test_cards_segments_end_by_the_entropy_before_processors(policy):
    """The bias leaves one token and no entropy: by the raw logits, every token is a segment of its own."""
    config = ANYTHING.replace(method=Cards(entropy=1.0, shortest=1), max_new_tokens=5)
    bias = {"sequence_bias": {(7,): 50.0}, "return_dict_in_generate": True}
    assert facade(policy, config=config, prompts=PROMPTS[:1], seed=0, **bias).stats["heartbeats"] == 5


@both
def test_cards_own_top_k_wins_over_defaults_and_loses_to_the_call(monkeypatch, policy, generate):
    seen = []
    propose = Policy.propose
    monkeypatch.setattr(Policy, "propose", lambda *args: seen.append(args[1][0].sampling.top_k) or propose(*args))
    config = ANYTHING.replace(method="cards", max_new_tokens=3)
    generate(policy, config=config)
    generate(policy, config=config, top_k=9)
    generate(policy, config=config.replace(top_k=11))
    assert list(dict.fromkeys(seen)) == [40, 9, 11]
