"""Compiled layers read weights that share an input as one product; no memory is added, and nobody else notices."""

import copy

import pytest
import torch
from conftest import sum_reward, tiny_policy
from test_architectures import CONFIG, PROMPTS
from torch import nn
from transformers import AutoModelForCausalLM

from stars_fast import StarsEngine
from stars_fast.tree.compiled import CompiledLayers
from stars_fast.tree.shared_products import SharedProducts, merge_equal_products


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def products(graph):
    """How many linear layers a graph has, through oneDNN or not."""
    return sum("linear" in str(node.target) for node in graph.nodes if node.op == "call_function")


class Counting:
    """A backend that counts the products of each graph it is given."""

    def __init__(self):
        self.counts = []

    def __call__(self, module, inputs):
        self.counts.append(products(module.graph))
        return module.forward


def texts(model, layers=None):
    engine = StarsEngine(model, sum_reward)
    if layers is not None:
        engine.policy._compiled, engine.policy.torch_compile = layers, True
    return engine.generate(PROMPTS, CONFIG, seed=0)


def joined(model):
    """Whether the products of each layer are one: attention, then gate and up."""
    layer = model.model.layers[0]
    return [
        len({one.weight.untyped_storage().data_ptr() for one in group}) == 1
        for group in ([layer.self_attn.q_proj, layer.self_attn.v_proj], [layer.mlp.gate_proj, layer.mlp.up_proj])
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_has_four_products_and_the_same_numbers(bias):
    model = tiny_policy(64, hidden=32, attention_bias=bias, mlp_bias=bias)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    plain, counting = texts(model), Counting()
    compiled = texts(model, CompiledLayers(model, counting))
    assert set(counting.counts) == {4}
    assert compiled.completions == plain.completions
    for ours, theirs in zip(compiled.logprobs, plain.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)


def test_weights_stay_what_they_were_and_take_no_more_memory(tmp_path):
    model = tiny_policy(64, hidden=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    CompiledLayers(model)
    assert joined(model) == [True, True]
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    for found in (model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()):
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)


def test_outside_layers_are_as_they_were():
    model = tiny_policy(64, hidden=32)
    ids = torch.tensor([PROMPTS[0]])
    kinds, logits = [type(module) for module in model.modules()], model(ids).logits
    layers = CompiledLayers(model, "eager")
    with pytest.raises(RuntimeError, match="on purpose"), layers.running():
        raise RuntimeError("on purpose")
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(model(ids).logits, logits)


def test_weights_that_change_between_calls_are_followed():
    model, other = tiny_policy(64, hidden=32, seed=1), tiny_policy(64, hidden=32, seed=2)
    layers = CompiledLayers(model, "eager")
    engine = StarsEngine(model, sum_reward)
    engine.policy._compiled, engine.policy.torch_compile = layers, True

    def check(expected):
        assert engine.generate(PROMPTS, CONFIG, seed=0).completions == texts(expected).completions
        assert joined(model) == [True, True]

    check(tiny_policy(64, hidden=32, seed=1))
    model.load_state_dict(other.state_dict())  # in place
    check(other)
    third = tiny_policy(64, hidden=32, seed=3)
    model.load_state_dict(copy.deepcopy(third).state_dict(), assign=True)  # other tensors
    check(third)
    with torch.no_grad():
        for one in (model, third):
            one.model.layers[0].self_attn.k_proj.weight.mul_(-1)
    check(third)


def test_graphs_of_the_first_call_serve_the_second():
    """They rely on where weights lie, so these are moved before."""
    engine = StarsEngine(tiny_policy(64, hidden=32), sum_reward)
    policy = engine.policy
    policy._compiled, policy.torch_compile, policy.graphs.enabled = None, True, True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stars_fast.tree.compiled.CompiledLayers.__init__.__defaults__", ("eager",))
        engine.generate(PROMPTS, CONFIG, seed=0)
        kept = dict(policy.graphs._kept)
        engine.generate(PROMPTS, CONFIG, seed=0)
    assert joined(policy.model) == [True, True]
    assert kept and all(policy.graphs._kept[shape] is work for shape, work in kept.items())


def test_adapters_and_other_layers_of_their_own_are_left_alone():
    peft = pytest.importorskip("peft")
    model = tiny_policy(64, hidden=32)
    weight = model.model.layers[0].self_attn.v_proj.weight
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    plain, counting = texts(adapted), Counting()
    compiled = texts(adapted, CompiledLayers(adapted, counting))
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert set(counting.counts) == {4 + 2 + 2}  # q, k, v and the adapter's two; o; gate and up; down
    assert compiled.completions == plain.completions


@pytest.mark.parametrize(
    "q, k, v",
    [
        (nn.Linear(8, 4), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)),  # biases of some
        (nn.Linear(8, 4, dtype=torch.bfloat16), nn.Linear(8, 4), nn.Linear(8, 4)),
        (nn.Linear(7, 3), nn.Linear(7, 3), nn.Linear(7, 3)),  # views would begin anywhere
        (nn.Linear(8, 4), nn.Linear(16, 4), nn.Linear(8, 4)),
        (nn.Linear(8, 4), nn.Identity(), nn.Linear(8, 4)),
    ],
    ids=["bias", "dtype", "alignment", "input", "class"],
)
def test_what_does_not_fit_together_stays_apart(q, k, v):
    parent = nn.Module()
    parent.q_proj, parent.k_proj, parent.v_proj = q, k, v
    before = q.weight.data_ptr()
    with SharedProducts([parent]).running():
        assert type(q) is nn.Linear
    assert q.weight.data_ptr() == before


class Cross(nn.Module):
    """Queries read one text, keys and values another."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, y):
        return self.q_proj(x), self.k_proj(y), self.v_proj(y)


class Writing(Cross):
    def forward(self, x, y):
        x = x.clone()
        first = self.q_proj(x)
        x.mul_(2)
        return first, self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("kind", [Cross, Writing])
def test_products_of_different_inputs_stay_apart(kind):
    torch.manual_seed(0)
    module, x, y = kind(), torch.randn(3, 8), torch.randn(3, 8)
    counts = []

    def backend(graph, inputs):
        merge_equal_products(graph.graph)
        graph.recompile()
        counts.append(products(graph.graph))
        return graph.forward

    with torch.no_grad():
        expected = module(x, y)
        with SharedProducts([module]).running():
            actual = torch.compile(module, backend=backend)(x, y)
    assert counts == [2]
    torch.testing.assert_close(actual, expected)


def test_layers_that_do_not_compile_run_without_and_say_so():
    def refuse(module, inputs):
        raise RuntimeError("no compiler")

    model = tiny_policy(64, hidden=32)
    with pytest.warns(UserWarning, match="(?s)do not compile.*no compiler"):
        compiled = texts(model, CompiledLayers(model, refuse))
    assert compiled.completions == texts(model).completions
