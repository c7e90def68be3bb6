"""Every family that transformers' attention interface reaches gives its own numbers; the others are refused by name."""

import copy
import warnings

import pytest
import torch
from conftest import sum_reward, tiny_policy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from stars_fast import StarsConfig, StarsEngine

VOCAB, EOS = 64, 63
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 4]]
# Rejections, fallbacks and several candidates at once, so that forks and rollbacks are in every row's history.
CONFIG = StarsConfig(
    segment_length=4, max_attempts=5, target_reward=1.5, beta=0.4, candidates=3, max_new_tokens=18, ignore_eos=True
)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "tie_word_embeddings": False,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MIXED = {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 8},
    # transformers 5.17 would leave out the soft cap with its default, sdpa.
    "gemma2": {**MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "smollm3": {},
    "gpt2": GPT,
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "starcoder2": {"sliding_window": 6},
    "stablelm": {},
    "cohere2": MIXED,
    "gpt_oss": {**MIXED, "num_local_experts": 4},
    "deepseek_v3": {
        **MLA,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
}
STATEFUL = {"qwen3_next": {}, "mamba": {}, "lfm2": {"layer_types": ["conv", "full_attention"] * 2}}
NEO = {"attention_types": [[["global"], SIZES["num_hidden_layers"]]], "num_layers": SIZES["num_hidden_layers"]}
OUT_OF_REACH = {"bloom": {}, "gpt_neo": NEO, "falcon": {}}


def build(auto, family, fields, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(CONFIG_MAPPING[family](**{**SIZES, **fields, **more})).float().eval()
        with torch.no_grad():  # sinks and biases start at zero, where a mistake with them would not show
            for name, parameter in model.named_parameters():
                if name.endswith(("sinks", "bias", "self_attn.A")):
                    parameter.normal_(std=0.5)
    return model


def causal_lm(family, fields, **more):
    return build(AutoModelForCausalLM, family, fields, **more)


def untouched(model):
    """A copy that the engine never sees, on the family's own attention code."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


@torch.no_grad()
def fresh_logprobs(model, prompt, completion):
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]


@torch.no_grad()
def fresh_reward(model, ids):
    """The head at the last token, found by position."""
    base = getattr(model, model.base_model_prefix)
    head = model.score if hasattr(model, "score") else model.classifier
    return head(base(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_untouched_policy(family):
    model = causal_lm(family, FAMILIES[family])
    fresh, implementation = untouched(model), model.config._attn_implementation
    out = StarsEngine(model, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    attempts = [segment.attempts for row in out.segments for segment in row]
    assert out.errors == [None, None]
    assert max(attempts) > CONFIG.candidates  # went on after a heartbeat without a winner
    for prompt, completion, logprobs in zip(PROMPTS, out.completions, out.logprobs, strict=True):
        expected = fresh_logprobs(fresh, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == implementation


def test_a_sliding_window_is_seen_in_the_numbers():
    """The window above is short enough to matter: without it the expected values are others."""
    windowed, full = (causal_lm("mistral", {"sliding_window": window}) for window in (7, None))
    completion = StarsEngine(windowed, sum_reward).generate(PROMPTS, CONFIG, seed=0).completions[0]
    difference = fresh_logprobs(windowed, PROMPTS[0], completion) - fresh_logprobs(full, PROMPTS[0], completion)
    assert difference.abs().max() > 0.1


def classifiers():
    table = AutoModelForSequenceClassification._model_mapping
    return [family for family in FAMILIES if CONFIG_MAPPING[family] in table]


def classifier(family, fields, **more):
    return build(AutoModelForSequenceClassification, family, fields, num_labels=1, **more)


def assert_rewards_are_fresh(out, reward):
    assert out.errors == [None, None]
    for prompt, segments in zip(PROMPTS, out.segments, strict=True):
        ids = list(prompt)
        for segment in segments:
            ids += segment.tokens
            assert segment.reward == pytest.approx(fresh_reward(reward, ids), abs=1e-4)


@pytest.mark.parametrize("family", classifiers())
def test_rewards_are_those_of_the_untouched_reward_model(family):
    model = classifier(family, FAMILIES[family])
    fresh = untouched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = StarsEngine(tiny_policy(VOCAB, hidden=32), model)
        # Ends by EOS, which is this model's pad id: it must be pooled all the same.
        out = engine.generate(PROMPTS, CONFIG, seed=0, target_reward=2.0, ignore_eos=False, eos_token_id=[EOS, 7, 9])
    assert_rewards_are_fresh(out, fresh)
    assert engine.reward.tree_model is not None


@pytest.mark.parametrize("family", STATEFUL | OUT_OF_REACH)
def test_a_policy_that_a_tree_cannot_hold_is_refused_by_name(family):
    model = causal_lm(family, (STATEFUL | OUT_OF_REACH)[family])
    with pytest.raises(NotImplementedError, match=rf"policy is a {type(model).__name__} \(model_type='{family}'\)"):
        StarsEngine(model, sum_reward)


@pytest.mark.parametrize("family", ["diffllama", "doge"])
def test_a_policy_whose_numbers_come_out_different_is_refused_by_name(family):
    """Their layers reach the interface, but do more with keys or values than it shows."""
    model = causal_lm(family, {})
    with pytest.raises(NotImplementedError, match=rf"policy is a {type(model).__name__} \(model_type='{family}'\)"):
        StarsEngine(model, sum_reward)


@pytest.mark.parametrize("family, fields", [("bloom", {}), ("gpt_neo", NEO), ("ctrl", GPT | {"dff": 48})])
def test_a_causal_reward_out_of_reach_is_scored_in_full_with_one_warning(family, fields):
    assert_scored_in_full(classifier(family, fields), fresh_reward)


def test_a_bidirectional_reward_is_scored_in_full_with_one_warning():
    @torch.no_grad()
    def fresh(model, ids):
        return model(torch.tensor([ids])).logits.item()

    assert_scored_in_full(classifier("bert", {"pad_token_id": 0}), fresh)


def assert_scored_in_full(model, fresh):
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out = engine.generate(PROMPTS, CONFIG, seed=0, target_reward=1.0)
    messages = [str(w.message) for w in caught if type(model).__name__ in str(w.message)]
    assert len(messages) == 1 and "scored in full" in messages[0]
    assert out.errors == [None, None]
    for prompt, segments in zip(PROMPTS, out.segments, strict=True):
        ids = list(prompt)
        for segment in segments:
            ids += segment.tokens
            assert segment.reward == pytest.approx(fresh(model, ids), abs=1e-4)


def test_a_window_that_lives_in_the_mask_alone_bounds_the_texts():
    """Qwen2-MoE tells its mask of the window but not the attention interface; up to the window both are the same."""
    window = 16
    fields = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0, "num_experts": 4}
    policy = causal_lm("qwen2_moe", {**fields, "layer_types": ["sliding_attention"] * SIZES["num_hidden_layers"]})
    engine = StarsEngine(policy, sum_reward)
    out = engine.generate([[5, 6, 7]], CONFIG, max_new_tokens=window - 3, seed=0)
    expected = fresh_logprobs(policy, [5, 6, 7], out.completions[0])
    torch.testing.assert_close(torch.tensor(out.logprobs[0]), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=rf"prompts\[0\].* {window} positions"):
        engine.generate([[5, 6, 7]], CONFIG, max_new_tokens=window - 2, seed=0)


def test_a_model_spread_over_devices_is_refused():
    policy = causal_lm("llama", {})
    policy.lm_head = policy.lm_head.to("meta")
    with pytest.raises(NotImplementedError, match=r"Llama.*cpu, meta"):
        StarsEngine(policy, sum_reward)


def test_dynamic_rotary_scaling_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = causal_lm("llama", {"rope_parameters": rope})
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM .*dynamic"):
        StarsEngine(model, sum_reward)


def longrope(original):
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
    }
    return causal_lm("phi3", {"rope_parameters": rope, "original_max_position_embeddings": original})


def test_longrope_rows_may_not_pass_the_switch():
    """Past it the frequencies of every row would change with the longest."""
    engine = StarsEngine(longrope(40), sum_reward)
    with pytest.raises(ValueError, match=r"prompts\[0\].*40 positions"):
        engine.generate([[5] * 30], CONFIG)
    model = untouched(engine.policy.model)
    prompt = PROMPTS[0] * 2
    out = engine.generate([prompt], CONFIG, seed=0)
    expected = fresh_logprobs(model, prompt, out.completions[0])
    torch.testing.assert_close(torch.tensor(out.logprobs[0]), expected, atol=1e-4, rtol=0)


def test_models_built_from_one_config_do_not_disturb_each_other():
    """transformers keeps the attention setting on the config, which such models share."""
    policy = causal_lm("llama", {})
    with torch.random.fork_rng():
        other, reward = (
            auto.from_config(policy.config) for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification)
        )
    assert other.config is policy.config
    first = StarsEngine(policy, sum_reward).stream(PROMPTS, CONFIG, seed=0)
    next(first)
    second = StarsEngine(other, sum_reward).stream(PROMPTS, CONFIG, seed=0)
    next(second)
    first.close()
    for _ in second:  # the first one's end must not take the plug-in from the second
        pass
    expected = StarsEngine(other, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    for prompt, completion, logprobs in zip(PROMPTS, expected.completions, expected.logprobs, strict=True):
        fresh = fresh_logprobs(other, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), fresh, atol=1e-4, rtol=0)
    assert policy.config._attn_implementation == "sdpa"
    del reward
