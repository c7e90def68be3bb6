"""The model on paper counts what real models hold and do, and says what DESIGN's speed goals say."""

import json
import random
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from conftest import tiny_policy, tiny_reward
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BertConfig, MambaConfig, T5Config
from typer.testing import CliRunner

from benchmarks.roofline import (
    GPUS,
    Achievable,
    AttentionLayer,
    ModelCost,
    Workload,
    best_candidates,
    config_named,
    decode_step,
    gpu_named,
    heartbeat,
    prefill,
    renewal,
    score_pass,
    short_names,
)
from benchmarks.roofline.__main__ import app
from stars_fast.tree.model import TreeModel
from stars_fast.tree.slots import SlotPool

H200 = GPUS["h200"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 63,
    "pad_token_id": 63,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"num_key_value_heads": None, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"num_key_value_heads": None, "word_embed_proj_dim": 32, "ffn_dim": 48},
    "deepseek_v3": {**MLA, "num_key_value_heads": 4, "first_k_dense_replace": 2},
}


def tiny_config(family, **fields):
    return CONFIG_MAPPING[family](**{**SIZES, **FAMILIES.get(family, {}), **fields})


@pytest.fixture(scope="module")
def costs() -> dict[str, ModelCost]:
    return {name: ModelCost.from_config(config_named(name), role_of(name)) for name in short_names()}


def role_of(name: str) -> str:
    return "reward" if name.endswith("reward") else "policy"


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_real_model(family):
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config).eval()
    cost = ModelCost.from_config(config, dtype=torch.float32)
    shapes = TreeModel(model, model, "policy").shapes

    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.head == model.get_output_embeddings().weight.numel()
    assert [(one.kv_heads, one.key_size, one.value_size) for one in cost.layers] == [shapes[i] for i in sorted(shapes)]
    assert cost.kv_bytes_per_token == SlotPool.bytes_per_slot(shapes, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_of_a_real_forward_pass(family):
    """One token that sees itself: what torch counts, less the few of the rotary frequencies."""
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([[5]]), use_cache=False)

    counted = decode_step(ModelCost.from_config(config), rows=1, groups=1, context=0, branch=0, gpu=H200).operations
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.005)


def test_tied_weights_are_stored_once_and_read_as_the_head():
    tied, untied = (ModelCost.from_config(tiny_config("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.parameters - tied.parameters == tied.head == untied.head == 64 * 32
    assert tied.body == untied.body == untied.parameters - 2 * untied.head


def test_a_reward_model_has_a_head_of_one_score():
    model = tiny_reward(32)
    cost = ModelCost.from_config(model.config, "reward")
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.head == model.score.weight.numel()
    assert cost.vocab == 1


def test_all_experts_are_read_and_the_routed_ones_computed():
    mixture = ModelCost.from_config(tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=1))
    assert mixture.experts == 2 * 4 * 3 * 32 * 48
    assert mixture.body - mixture.active == pytest.approx(mixture.experts * 3 / 4, rel=0.01)  # norms beside
    assert decode_step(mixture, 1, 1, 8, 0, H200).bytes > 2 * mixture.body


def test_configs_in_the_package_have_the_published_sizes(costs):
    billions = {name: round(cost.parameters / 1e9, 3) for name, cost in costs.items()}
    assert billions == {
        "llama-2-7b": 6.738,
        "llama-2-7b-reward": 6.607,
        "llama-3.1-70b": 70.554,
        "llama-3.1-8b": 8.030,
        "llama-3.1-8b-reward": 7.505,
        "llama-3.2-1b": 1.236,
        "llama-3.2-1b-reward": 1.236,
        "qwen2.5-7b": 7.616,
    }
    assert costs["llama-2-7b"].kv_bytes_per_token == 524_288
    assert costs["qwen2.5-7b"].kv_bytes_per_token == 57_344
    assert costs["llama-3.2-1b"].kv_bytes_per_token == 32_768


def keys_read(rows, groups, context, branch, queries, window):
    """Slots written and read, one by one: (with a shared trunk, with a trunk per row, (query, key) pairs per row)."""
    sees = [range(max(0, q - window + 1), q + 1) for q in range(context + branch, context + branch + queries)]
    keys = {key for seen in sees for key in seen}
    trunk, own = sum(key < context for key in keys), sum(key >= context for key in keys)
    shared = groups * trunk + rows * (own + queries)
    return shared, rows * (trunk + own + queries), sum(len(seen) for seen in sees)


@pytest.mark.parametrize(
    ("context", "branch", "queries", "window"), [(50, 0, 1, 999), (50, 6, 1, 20), (50, 30, 1, 20), (9, 0, 5, 999)]
)
def test_attention_reads_a_trunk_once_per_request(context, branch, queries, window):
    layer = AttentionLayer(4, 2, 8, 12, window=window)
    cost = ModelCost(0, 0, 0, 0, 0, 0, 0, 0, "one layer", 0, 0, (layer,), torch.bfloat16)
    forward = score_pass(cost, 6, 2, context, queries, H200)
    if queries == 1:
        forward = decode_step(cost, 6, 2, context, branch, H200)
    shared, per_row, pairs = keys_read(6, 2, context, branch, queries, window)
    assert forward.attention_bytes == forward.bytes == shared * 2 * (8 + 12) * 2
    assert forward.per_row_attention_bytes == per_row * 2 * (8 + 12) * 2
    assert forward.operations == 6 * pairs * 2 * 4 * (8 + 12)


def test_a_decode_step_reads_body_head_keys_and_logits(costs):
    cost = costs["qwen2.5-7b"]
    step = decode_step(cost, 8, 2, 100, 5, H200)
    logits, gathered = 8 * 152_064, 8 * 3584
    weights = cost.parameters - 152_064 * 3584  # all but the embedding table
    assert step.bytes == 2 * (weights + gathered + 2 * logits) + step.attention_bytes
    assert step.attention_bytes == 57_344 * (2 * 100 + 8 * 7)
    assert step.launch_s == pytest.approx(1.3e-6 * (9 * 28 + 4))


def test_scoring_reads_the_weights_once_and_computes_new_tokens_only(costs):
    reward = costs["llama-2-7b-reward"]
    one, two = (score_pass(reward, rows, 64, 256, 16, H200, tail=4) for rows in (64, 128))
    linear = 2 * reward.active * 64 * 20
    assert linear < one.operations < 1.03 * linear
    assert two.operations == pytest.approx(2 * one.operations)
    assert reward.bytes < two.bytes < 1.5 * one.bytes


@pytest.mark.parametrize(
    ("acceptance", "candidates", "limit"), [(0.3, 1, 20), (0.1, 3, 20), (0.05, 8, 20), (0.2, 4, 6), (1.0, 2, 20)]
)
def test_renewal_agrees_with_a_simulation(acceptance, candidates, limit):
    rng, segments = random.Random(0), 40_000
    heartbeats = drawn = fallbacks = 0
    for _ in range(segments):
        attempts, accepted = 0, False
        while not accepted and attempts < limit:
            group = min(candidates, limit - attempts)
            accepted = any([rng.random() < acceptance for _ in range(group)])
            attempts, drawn, heartbeats = attempts + group, drawn + group, heartbeats + 1
        fallbacks += not accepted
    expected = renewal(acceptance, candidates, limit)
    assert heartbeats / segments == pytest.approx(expected.heartbeats, rel=0.02)
    assert drawn / segments == pytest.approx(expected.candidates, rel=0.02)
    assert fallbacks / segments == pytest.approx(expected.fallback, abs=0.006)


def test_without_a_limit_commits_are_one_less_all_rejected():
    assert 1 / renewal(0.3, 3, 3000).heartbeats == pytest.approx(1 - 0.7**3)
    assert renewal(0.3, 20, 20).heartbeats == 1  # the fallback commits


def test_more_acceptance_bandwidth_and_rate_never_cost_speed(costs):
    models = costs["qwen2.5-7b"], costs["llama-2-7b-reward"]

    def speed(workload=None, gpu=H200):
        return best_candidates(*models, workload or Workload(), gpu).tokens_per_second

    by_acceptance = [speed(Workload(acceptance=a)) for a in (0.05, 0.15, 0.3, 0.5, 0.9, 1.0)]
    assert by_acceptance == sorted(by_acceptance)
    assert speed(Workload(context=1024)) < speed() < speed(Workload(batch=128))
    assert speed(Workload(tail=16)) < speed()
    assert speed(gpu=replace(H200, bandwidth=4e12)) < speed() < speed(gpu=replace(H200, matrix_rate=2e15))
    more, less = (replace(H200, achievable=one) for one in (Achievable(kernels_per_layer=37), Achievable(host_s=0)))
    assert speed(gpu=more) < speed() < speed(gpu=less)
    best = [best_candidates(*models, Workload(acceptance=a), H200).candidates for a in (0.05, 0.3, 1.0)]
    assert best == sorted(best, reverse=True) and best[-1] == 1


def test_achievable_is_never_faster_than_the_floor(costs):
    models = costs["llama-3.2-1b"], costs["llama-3.2-1b-reward"]
    perfect = replace(H200, achievable=Achievable(bandwidth=1, matrix=1, launch_s=0, host_s=0))
    for candidates in (1, 4, 20):
        row = heartbeat(*models, Workload(), candidates, perfect)
        assert row.tokens_per_second <= row.floor_tokens_per_second
        assert all(stage.achievable_s >= stage.floor_s * (1 - 1e-12) for stage in row.stages)
        assert row.tokens_per_second > heartbeat(*models, Workload(), candidates, H200).tokens_per_second


def test_a_retry_needs_no_forward_pass_for_its_first_token(costs):
    """With segments of one token, only the requests that committed run the policy, for the next leaf's logits."""
    models = costs["llama-2-7b"], costs["llama-2-7b-reward"]
    seldom, always = (heartbeat(*models, Workload(1, 1, a, max_attempts=500), 1, H200).stages[0] for a in (0.01, 1.0))
    step = decode_step(models[0], 1, 1, 255, 0, H200)
    assert always.bytes == pytest.approx(step.bytes, rel=1e-3)
    assert seldom.bytes == pytest.approx(0.01 * step.bytes, rel=0.05)


def test_a_heartbeat_where_all_is_accepted_is_the_sum_of_its_passes(costs):
    policy, reward = costs["llama-3.2-1b"], costs["qwen2.5-7b"]
    row = heartbeat(policy, reward, Workload(acceptance=1.0), 2, H200)
    propose, _, _, _, refill = row.stages
    extension = decode_step(policy, 64, 64, 255, 0, H200)
    steps = [decode_step(policy, 128, 64, 256, drawn, H200) for drawn in range(15)]
    first_draw = 128 * 128_256 * 2
    assert propose.bytes == pytest.approx(extension.bytes + first_draw + sum(step.bytes for step in steps))
    assert propose.operations == pytest.approx(extension.operations + sum(step.operations for step in steps))
    fresh = [prefill(cost, 64 * 16 / 128, 192, H200) for cost in (policy, reward)]
    assert refill.achievable_s == pytest.approx(sum(stage.achievable_s for stage in fresh))
    assert row.committed_tokens == 64 * 16


def test_scoring_in_order_reads_what_is_looked_at(costs):
    models, work = (costs["llama-2-7b"], costs["llama-2-7b-reward"]), Workload(acceptance=0.3)
    at_once, in_order = (heartbeat(*models, replace(work, in_order=one), 3, H200) for one in (False, True))
    before, after = (row.stages[1].operations for row in (at_once, in_order))
    assert after / before == pytest.approx((1 + 0.7 + 0.7**2) / 3, rel=0.01)
    assert in_order.committed_tokens == at_once.committed_tokens
    assert in_order.tokens_per_second > 1.03 * at_once.tokens_per_second
    assert best_candidates(*models, replace(work, in_order=True), H200).candidates >= 3


def test_few_candidates_and_those_that_are_all_accepted_have_the_same_pass_in_order(costs):
    models = costs["qwen2.5-7b"], costs["llama-2-7b-reward"]
    for work, candidates in ((Workload(1), 8), (Workload(16), 3), (Workload(), 1)):
        assert heartbeat(*models, replace(work, in_order=True), candidates, H200) == heartbeat(
            *models, work, candidates, H200
        )
    accepted = Workload(acceptance=1.0, in_order=True)
    row = heartbeat(*models, accepted, 2, H200)
    assert row.stages[1] == replace(score_pass(models[1], 64, 64, 256, 16, H200), name="score")


def test_candidates_that_do_not_fit_are_not_chosen(costs):
    models = costs["llama-2-7b"], costs["llama-2-7b-reward"]
    workload = Workload(acceptance=0.15)
    free = best_candidates(*models, workload, H200)
    tight = replace(H200, memory=heartbeat(*models, workload, 2, H200).memory)
    assert free.candidates > 2 and free.fits
    assert best_candidates(*models, workload, tight).candidates == 2
    assert not best_candidates(*models, workload, GPUS["l40s"]).fits


# Policy, acceptance, candidates and accepted tokens/s of DESIGN.md section 8, and the gain over M = 1 given there.
GOALS = [
    ("llama-2-7b", 0.15, 4, 1850, 1.65),
    ("llama-2-7b", 0.3, 3, 3100, 1.38),
    ("llama-2-7b", 0.5, 2, 4400, 1.18),
    ("qwen2.5-7b", 0.15, 3, 2200, None),
    ("qwen2.5-7b", 0.3, 2, 3800, None),
    ("qwen2.5-7b", 0.5, 2, 5500, None),
]


@pytest.mark.parametrize(("policy", "acceptance", "candidates", "goal", "gain"), GOALS)
def test_the_speed_goals_of_the_design_come_out(costs, policy, acceptance, candidates, goal, gain):
    models, workload = (costs[policy], costs["llama-2-7b-reward"]), Workload(acceptance=acceptance)
    assert heartbeat(*models, workload, candidates, H200).tokens_per_second == pytest.approx(goal, rel=0.15)
    best = best_candidates(*models, workload, H200)
    assert abs(best.candidates - candidates) <= 1
    if gain is not None:
        alone = heartbeat(*models, workload, 1, H200).tokens_per_second
        assert best.tokens_per_second / alone == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize(("acceptance", "gain"), [(0.15, 6), (0.3, 3.2), (0.5, 2)])
def test_the_gain_of_candidates_at_batch_one_is_that_of_the_design(costs, acceptance, gain):
    models, workload = (costs["qwen2.5-7b"], costs["llama-2-7b-reward"]), Workload(1, acceptance=acceptance)
    best = best_candidates(*models, workload, H200)
    alone = heartbeat(*models, workload, 1, H200).tokens_per_second
    assert best.tokens_per_second / alone == pytest.approx(gain, rel=0.1)


def test_prefill_of_long_prompts_is_bound_by_matrix_work(costs):
    cost = costs["qwen2.5-7b"]
    stage = prefill(cost, 8, 512, H200)
    assert stage.floor_s == stage.operations / H200.matrix_rate > stage.bytes / H200.bandwidth


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


PAIR = ("--policy", "llama-3.2-1b", "--reward", "llama-3.2-1b-reward")


def test_the_command_prints_stages_and_candidates():
    result = invoke(*PAIR, "--acceptance", "0.5")
    assert result.exit_code == 0, result.output
    for word in ("propose", "score", "select", "host", "refill", "heartbeat", "tok/s", "h200"):
        assert word in result.output


def test_json_holds_what_the_functions_return(costs):
    result = invoke(*PAIR, "--json", "--batch", 8, "--max-attempts", 7, "--bandwidth", 3, "--tflops", 500)
    report = json.loads(result.output)
    models = costs["llama-3.2-1b"], costs["llama-3.2-1b-reward"]
    gpu = replace(H200, bandwidth=3e12, matrix_rate=500e12)
    expected = best_candidates(*models, Workload(8, max_attempts=7), gpu)
    assert report["best_candidates"] == expected.candidates
    best = next(row for row in report["heartbeats"] if row["candidates"] == expected.candidates)
    assert best["tokens_per_second"] == pytest.approx(expected.tokens_per_second)
    assert [row["candidates"] for row in report["heartbeats"]] == sorted({1, 2, 3, 4, 6, expected.candidates})
    assert report["workload"]["prompt"] == 192
    assert report["policy"]["kv_bytes_per_token"] == 32_768
    stage = {"name", "bytes", "operations", "attention_bytes", "per_row_attention_bytes"}
    assert set(best["stages"][0]) == stage | {"floor_s", "achievable_s", "launch_s"}


def test_the_shipped_models_are_called_demo():
    report = json.loads(invoke("--policy", "demo", "--reward", "demo", "--json").output)
    assert report["policy"]["class"] == "LlamaForCausalLM"
    assert report["reward"]["class"] == "LlamaForSequenceClassification"


def test_a_folder_and_a_file_name_a_config(tmp_path):
    tiny_policy(32).save_pretrained(tmp_path / "policy")
    tiny_reward(32).save_pretrained(tmp_path / "reward")
    names = "--policy", tmp_path / "policy", "--reward", tmp_path / "reward" / "config.json"
    report = json.loads(invoke(*names, "--json").output)
    parameters = sum(parameter.numel() for parameter in tiny_policy(32).parameters())
    assert report["policy"]["parameters"] == parameters


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--gpu", "tpu"), "a100-80gb, b200, h100-sxm, h200, l40s"),
        (("--acceptance", 0), "acceptance=0.0"),
        (("--acceptance", 1.5), "acceptance=1.5"),
        (("--batch", 0), "batch=0"),
        (("--context", 50), "context=50.0"),
        (("--bandwidth", 0), "bandwidth=0.0"),
        (("--policy", "./nowhere"), "nowhere"),
        (("--policy", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_input_is_named(options, complaint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or it asks six times whose name that is
    result = invoke(*PAIR, *options)
    assert result.exit_code == 2
    assert complaint in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("config", "role", "complaint"),
    [
        (T5Config(), "policy", "encoder-decoder"),
        (BertConfig(), "reward", "not causal"),
        (MambaConfig(), "policy", "linear_attention"),
        (MambaConfig(), "reward", "not the config of a sequence classifier"),
        (tiny_config("lfm2", layer_types=["conv", "full_attention"]), "policy", "conv"),
        (tiny_config("llama"), "judge", "judge"),
    ],
)
def test_configs_without_a_causal_model_are_refused(config, role, complaint):
    with pytest.raises(ValueError, match=complaint):
        ModelCost.from_config(config, role)


def test_gpus_are_found_in_any_case_and_others_refused():
    assert gpu_named("H200") is H200
    with pytest.raises(ValueError, match="choose from a100-80gb"):
        gpu_named("h300")
    with pytest.raises(ValueError, match="fraction of matrix is 2"):
        Achievable(matrix=2)
    with pytest.raises(ValueError, match="candidates=21"):
        renewal(0.3, 21, 20)
