"""Quantised models, as users load them, are plugged in, compiled and counted like others; their law is their own."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_policy, tiny_reward
from test_architectures import CONFIG, PROMPTS, fresh_logprobs
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.roofline import GPUS, ModelCost, decode_step
from stars_fast import StarsEngine
from stars_fast.report.weights import Weights, stored_bytes
from stars_fast.tree.compiled import CompiledLayers
from stars_fast.tree.graphs import addresses
from stars_fast.tree.support import warn_of_shared_scales

# And how far from a plain pass: activations in 8 bits make a step of what was a difference in the last bit.
KINDS = {"Int8WeightOnlyConfig": 1e-4, "Int8DynamicActivationInt8WeightConfig": 0.15, "Float8WeightOnlyConfig": 1e-4}


class Int8Linear(nn.Module):
    """A linear layer of nobody's class, whose weights are buffers."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def plain(self):
        linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight.data = self.packed * self.scale
        return linear

    def forward(self, x):
        return F.linear(x, self.packed * self.scale)


def replaced(model, kind, make):
    """The model with each layer of this kind in its decoder layers made another."""
    for layer in model.base_model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is kind:
                    setattr(module, name, make(child))
    return model


def pair():
    return tiny_policy(32, hidden=32), tiny_reward(32, hidden=32)


def results(models, prompts=PROMPTS):
    out = StarsEngine(*models).generate(prompts, CONFIG, seed=0)
    assert out.errors == [None] * len(prompts)
    return out


def test_layers_of_another_class_give_the_texts_of_the_weights_they_stand_for():
    quantised = [replaced(model, nn.Linear, Int8Linear) for model in pair()]
    plain = [replaced(copy.deepcopy(model), Int8Linear, Int8Linear.plain) for model in quantised]
    ours, theirs = results(quantised), results(plain)
    assert ours.completions == theirs.completions
    assert ours.rewards == pytest.approx(theirs.rewards, abs=1e-4)
    assert results(pair()).rewards != pytest.approx(theirs.rewards, abs=1e-3), "another law than the unquantised one"


def test_layers_of_another_class_compile_whole():
    policy, ids = replaced(tiny_policy(32, hidden=32), nn.Linear, Int8Linear), torch.tensor([[1, 2, 3]])
    layers = CompiledLayers(policy, backend="eager")
    with torch.no_grad():
        expected = policy(ids, use_cache=False).logits
    with torch.no_grad(), layers.running():
        torch.testing.assert_close(policy(ids, use_cache=False).logits, expected)
    assert len(layers) == 2


def test_a_graph_notices_that_weights_of_another_class_lie_elsewhere():
    policy = replaced(tiny_policy(32, hidden=32), nn.Linear, Int8Linear)
    seen = addresses(policy)
    assert addresses(policy) == seen
    layer = policy.model.layers[0].mlp.up_proj
    layer.packed = layer.packed.clone()
    assert addresses(policy) != seen


@pytest.mark.parametrize(
    ("granularity", "scale", "warned"), [("PerTensor", None, 1), ("PerTensor", 1, 0), ("PerRow", None, 0)]
)
def test_scales_shared_by_all_rows_are_warned_of(granularity, scale, warned, recwarn):
    policy = tiny_policy(32)
    weight = policy.model.layers[1].mlp.up_proj.weight
    weight.act_quant_kwargs = SimpleNamespace(granularity=type(granularity, (), {})())
    weight.act_quant_scale = scale
    warn_of_shared_scales(policy, "policy")
    assert [("up_proj" in str(one.message)) for one in recwarn] == [True] * warned


def test_quantised_weights_count_as_the_numbers_they_stand_for_and_the_bytes_they_take():
    for model in pair():
        before, after = Weights.of(model), Weights.of(replaced(model, nn.Linear, Int8Linear))
        for name in ("parameters", "body", "active", "head", "multiplied", "head_bytes"):
            assert getattr(after, name) == getattr(before, name), name
        rows = sum(module.out_features for module in model.modules() if isinstance(module, Int8Linear))
        assert before.body_bytes - after.body_bytes == 3 * before.active - 4 * rows, "1 byte for 4, and the scales"
        assert before.bytes - after.bytes == before.body_bytes - after.body_bytes


def test_packed_weights_count_as_their_layer_says():
    layer = nn.Module()
    layer.in_features, layer.out_features = 16, 8
    layer.register_buffer("packed", torch.zeros(2, 8, dtype=torch.int32))  # eight numbers of four bits each
    layer.register_buffer("zeros", torch.zeros(1, 1, dtype=torch.int32))
    layer.bias = nn.Parameter(torch.zeros(8))
    found = Weights.of(layer)
    assert (found.parameters, found.active, found.bytes) == (16 * 8 + 8, 16 * 8, 64 + 4 + 32)


def test_quantised_experts_count_each():
    experts = nn.Module()
    for name in ("gate_up_proj", "down_proj"):
        experts.register_parameter(name, nn.Parameter(torch.zeros(2, 4, 8, dtype=torch.int8), requires_grad=False))
        experts.register_parameter(f"{name}_scale", nn.Parameter(torch.zeros(2, 4, 1)))
    found = Weights.of(experts)
    assert (found.parameters, found.bytes) == (2 * 64, 2 * (64 + 4 * 8))


def test_the_roofline_reads_quantised_layers_in_their_bytes():
    cost = ModelCost.of(tiny_policy(32, hidden=32))
    half = cost.quantised(2)
    assert (half.bytes, half.head_bytes) == (cost.bytes - 2 * cost.body, cost.head_bytes)
    work = (8, 2, 16, 4, GPUS["h200"])
    fewer = decode_step(cost, *work).bytes - decode_step(half, *work).bytes
    assert fewer == 2 * cost.body
    assert decode_step(cost, *work).operations == decode_step(half, *work).operations
    with pytest.raises(ValueError, match="above 0"):
        cost.quantised(0)


@pytest.mark.parametrize("kind", KINDS)
def test_models_quantised_by_torchao_run_as_they_are(kind):
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    before = [Weights.of(model) for model in pair()]
    policy, reward = pair()
    for model in (policy, reward):
        torchao.quantize_(model.base_model, getattr(torchao, kind)())
    for was, model in zip(before, (policy, reward), strict=True):
        now = Weights.of(model)
        assert (now.parameters, now.active, now.head) == (was.parameters, was.active, was.head)
        assert was.active < now.body_bytes < was.body_bytes / 2, "float32 in one byte, scales beside"
    weight = policy.model.layers[0].mlp.up_proj.weight
    assert stored_bytes(weight) < weight.nbytes
    out = results((policy, reward))
    for prompt, completion, logprobs, score in zip(PROMPTS, out.completions, out.logprobs, out.rewards, strict=True):
        expected = fresh_logprobs(policy, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=KINDS[kind], rtol=0)
        with torch.no_grad():
            assert score == pytest.approx(reward(torch.tensor([prompt + completion])).logits.item(), abs=KINDS[kind])


def test_one_scale_for_all_rows_of_a_pass_is_warned_of():
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    policy, ids = tiny_policy(32, hidden=32), torch.tensor([[1, 2, 3, 4]])
    scheme = torchao.Int8DynamicActivationInt8WeightConfig(granularity=torchao.PerTensor())
    torchao.quantize_(policy.base_model, scheme)
    with torch.no_grad():
        alone, beside = policy(ids).logits, policy(torch.cat((ids, ids + 9))).logits[:1]
    assert (alone - beside).abs().max() > 1e-3
    with pytest.warns(UserWarning, match=r"policy's activations .* PerTensor.*PerRow"):
        StarsEngine(policy, tiny_reward(32))


def test_layers_quantised_by_torchao_compile():
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    policy, reward = pair()
    torchao.quantize_(policy.base_model, torchao.Int8WeightOnlyConfig())
    expected = results((policy, reward), PROMPTS[:1]).completions
    with CompiledLayers(policy, backend="aot_eager").running():
        assert results((policy, reward), PROMPTS[:1]).completions == expected


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_models_saved_by_compressed_tensors_run_in_the_bytes_that_transformers_unpacks_them_to(scheme, tmp_path):
    compressed = pytest.importorskip("compressed_tensors", exc_type=ImportError)
    quantization = compressed.quantization
    for name, model in zip(("policy", "reward"), pair(), strict=True):
        group = quantization.preset_name_to_scheme(scheme, ["Linear"])
        settings = quantization.QuantizationConfig(config_groups={"all": group}, ignore=["lm_head", "score"])
        quantization.apply_quantization_config(model, settings)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                largest = 127 if scheme == "W8A8" else 448
                module.weight_scale.data.copy_(module.weight.abs().amax(1, keepdim=True) / largest)
        compressor = compressed.compressors.ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(tmp_path / name)
        compressor.update_config(tmp_path / name)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype="auto")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype="auto")
    loaded = Weights.of(policy)
    out = results((policy, reward))
    assert loaded.active == Weights.of(policy).active
    assert loaded.body_bytes < 1.2 * loaded.active < 4 * loaded.active < Weights.of(policy).body_bytes
    for prompt, completion, logprobs in zip(PROMPTS, out.completions, out.logprobs, strict=True):
        expected = fresh_logprobs(policy, prompt, completion)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=0.15, rtol=0)  # steps, as above
