"""Adapters, quantised weights and tensor parallelism run as they are; weights that come and go are refused by name."""

import copy
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import sum_reward, tiny_policy
from test_architectures import CONFIG, PROMPTS, fresh_logprobs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from stars_fast import StarsEngine
from stars_fast.tree.graphs import addresses

VOCAB = 64


def policy(hidden=32):
    return tiny_policy(VOCAB, hidden=hidden)


def generate(model, reward=sum_reward):
    return StarsEngine(model, reward).generate(PROMPTS, CONFIG, seed=0)


def assert_fresh(out, model):
    assert out.errors == [None] * len(PROMPTS)
    for prompt, completion, logprobs in zip(PROMPTS, out.completions, out.logprobs, strict=True):
        expected = fresh_logprobs(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


# Adapters


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


LORA = {
    "attention and mlp": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved modules": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["v_proj", "up_proj"], "use_dora": True},
}


def lora(peft, **fields):
    """A policy whose adapters are not zero, as they would be before training."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about tied embeddings
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **fields)
        return peft.get_peft_model(policy(), config).eval()


@pytest.mark.parametrize("kind", LORA)
def test_logprobs_are_those_of_the_policy_with_its_adapters(peft, kind):
    model = lora(peft, **LORA[kind])
    weights = copy.deepcopy(model.state_dict())
    out = generate(model)
    assert_fresh(out, model)
    assert out.completions != generate(policy()).completions
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_adapters_may_be_turned_off_switched_and_merged_between_calls(peft):
    model = lora(peft, **LORA["attention and mlp"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_adapter("other", peft.LoraConfig(init_lora_weights=False, target_modules=["o_proj", "up_proj"]))
    engine = StarsEngine(model, sum_reward)

    def texts():
        out = engine.generate(PROMPTS, CONFIG, seed=0)
        assert_fresh(out, model)
        return out.completions

    adapted = texts()
    with model.disable_adapter():
        assert texts() == generate(policy()).completions
    model.set_adapter("other")
    assert texts() != adapted
    model.set_adapter("default")
    assert texts() == adapted
    model.delete_adapter("other")
    model.merge_adapter()
    assert texts() == adapted
    model.unmerge_adapter()
    assert texts() == adapted


def test_merged_adapters_give_the_numbers_of_unmerged_ones(peft):
    model = lora(peft, **LORA["attention and mlp"])
    out = generate(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    again = generate(merged)
    assert again.completions == out.completions
    for logprobs, expected in zip(again.logprobs, out.logprobs, strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-4)


def test_a_captured_graph_is_not_used_with_other_adapters(peft):
    model = lora(peft, **LORA["attention and mlp"])
    seen = addresses(model)
    assert addresses(model) == seen
    with model.disable_adapter():
        assert addresses(model) != seen
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.scale_layer(2.0)
    assert addresses(model) != seen
    layer.unscale_layer(2.0)
    assert addresses(model) == seen
    model.merge_adapter()
    assert addresses(model) != seen


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_policy_with_a_learned_prompt_is_refused_by_name(peft, kind):
    """Its virtual tokens come before every text, and are in no tree."""
    model = peft.get_peft_model(policy(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(NotImplementedError, match=rf"policy is a PeftModelForCausalLM .*{kind}"):
        StarsEngine(model, sum_reward)


def test_a_captured_graph_is_not_used_with_other_hooks():
    model = policy()
    seen = addresses(model)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: output)
    assert addresses(model) != seen
    handle.remove()
    assert addresses(model) == seen


# Quantised weights


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao.quantization", exc_type=ImportError)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_logprobs_are_those_of_the_policy_quantised_by_torchao(torchao, kind):
    if not hasattr(torchao, kind):
        pytest.skip(f"this torchao has no {kind}")
    model = policy()
    torchao.quantize_(model, getattr(torchao, kind)())
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    out = generate(model)
    assert_fresh(out, model)
    plain = fresh_logprobs(policy(), PROMPTS[0], out.completions[0])
    assert (torch.tensor(out.logprobs[0]) - plain).abs().max() > 1e-3  # quantisation is seen in the numbers


def test_a_captured_graph_is_not_used_once_quantised_weights_lie_elsewhere(torchao):
    """They are wrappers, whose own address is always 0."""
    model = policy()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    seen = addresses(model)
    assert addresses(model) == seen
    model.lm_head = copy.deepcopy(model.lm_head)
    assert addresses(model) != seen


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A policy and a reward model that two ranks can share: two heads of keys and values."""
    folder = tmp_path_factory.mktemp("models")
    for name, model_class in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=VOCAB - 1,
            pad_token_id=None,
            num_labels=1,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model_class(config).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_logprobs_are_those_of_the_policy_quantised_by_bitsandbytes(saved, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    try:
        model = AutoModelForCausalLM.from_pretrained(saved / "policy", quantization_config=settings).eval()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes {bitsandbytes.__version__} does not run on this machine: {error}")
    assert isinstance(model.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert_fresh(generate(model), model)


# Tensor parallelism


def load(auto, folder):
    if "RANK" not in os.environ:
        return auto.from_pretrained(folder).eval()
    try:  # transformers 5.17 knows no plan in a DistributedConfig, later ones take it nowhere else
        from transformers.distributed import DistributedConfig

        plan = {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):
        plan = {"tp_plan": "auto"}
    return auto.from_pretrained(folder, **plan).eval()


def one_rank(folder):
    """What every rank runs: nothing tells it apart from the others but where its shard is."""
    torch.set_num_threads(1)
    policy = load(AutoModelForCausalLM, folder / "policy")
    reward = load(AutoModelForSequenceClassification, folder / "reward")
    engine = StarsEngine(policy, reward)
    out = engine.generate(PROMPTS, CONFIG, seed=0, num_return_sequences=2)
    seen = addresses(policy)
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().clone())
    return {
        "completions": out.completions,
        "rewards": out.rewards,
        "logprobs": out.logprobs,
        "segments": [[(segment.tokens, segment.attempts) for segment in row] for row in out.segments],
        "errors": out.errors,
        "heads": [heads for heads, _, _ in engine.policy.shapes.values()],
        "reward_heads": [heads for heads, _, _ in engine.reward.tree_model.shapes.values()],
        "shards that move are noticed": addresses(policy) != seen,
    }


def torchrun(folder, ranks=2, seconds=90):
    """:func:`one_rank` on gloo ranks; all of them end here, whatever becomes of them."""
    tests = os.path.dirname(__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    paths = [tests, os.path.dirname(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, __file__, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        pytest.fail(f"{ranks} ranks did not end within {seconds} s:\n{log[-12000:]}")
    assert process.returncode == 0, log[-12000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.skipif(sys.platform == "win32", reason="ends its ranks by process group")
def test_two_ranks_of_a_tensor_parallel_policy_and_reward_give_the_texts_of_one_process(saved):
    pytest.importorskip("accelerate", reason="transformers loads shards through it")
    alone = json.loads(json.dumps(one_rank(saved)))
    ranks = torchrun(saved)
    assert ranks[0] == ranks[1]  # bit for bit
    assert alone["heads"] == alone["reward_heads"] == [2, 2]
    assert ranks[0]["heads"] == ranks[0]["reward_heads"] == [1, 1]  # each holds its own heads' keys and values
    for same in ("completions", "segments", "errors"):
        assert ranks[0][same] == alone[same]
    assert alone["errors"] == [None] * 4
    assert ranks[0]["shards that move are noticed"]
    assert any(attempts > 1 for row in alone["segments"] for _, attempts in row)
    assert ranks[0]["rewards"] == pytest.approx(alone["rewards"], abs=1e-4)
    for logprobs, expected in zip(ranks[0]["logprobs"], alone["logprobs"], strict=True):
        assert logprobs == pytest.approx(expected, abs=1e-4)


# Weights that come and go


def offloaders(accelerate, folder):
    layers = {name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}
    layers |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return {
        "cpu_offload": lambda model: accelerate.cpu_offload(model, "cpu"),
        "disk_offload": lambda model: accelerate.disk_offload(model, folder, "cpu"),
        "dispatch_model": lambda model: accelerate.dispatch_model(model, layers, "cpu", offload_dir=folder),
        # Its weights lie on the CPU between two calls, all of them, and none is on the meta device.
        "cpu_offload_with_hook": lambda model: accelerate.cpu_offload_with_hook(model, "cuda")[0],
    }


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model", "cpu_offload_with_hook"])
def test_a_policy_that_accelerate_offloads_is_refused_by_name(tmp_path, how):
    accelerate = pytest.importorskip("accelerate")
    model = offloaders(accelerate, tmp_path)[how](policy())
    with pytest.raises(NotImplementedError, match=r"policy is a LlamaForCausalLM .*accelerate offloads"):
        StarsEngine(model, sum_reward)


def test_hooks_that_move_no_weights_are_no_obstacle():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(policy(), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    assert_fresh(generate(model), model)


if __name__ == "__main__":  # one rank of torchrun
    from pathlib import Path

    target = Path(sys.argv[1])
    (target / f"rank{os.environ['RANK']}.json").write_text(json.dumps(one_rank(target)))
    torch.distributed.destroy_process_group()
