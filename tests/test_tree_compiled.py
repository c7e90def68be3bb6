"""Decoder layers compile whole, once for all layers of a kind and all numbers of rows, and compute the same."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import sum_reward, tiny_policy
from generated_code import code_of_a_layer, launches
from test_architectures import CONFIG, FAMILIES, PROMPTS, causal_lm
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from stars_fast import StarsEngine
from stars_fast.async_engine import AsyncStarsEngine
from stars_fast.policy.policy import Policy
from stars_fast.tree import compiled
from stars_fast.tree.attention import active, plugged
from stars_fast.tree.compiled import CompiledLayers
from stars_fast.tree.difference import relative
from stars_fast.tree.joined import join

# Their rotary embeddings pair other elements than halves (Cohere, DeepSeek, gpt-oss), or there are none.
NOT_ROTATED_WITH_THE_APPEND = {"gpt2", "opt", "cohere2", "gpt_oss", "deepseek_v3"}
LLAMA = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
SHAPES = {"llama": LlamaConfig(**LLAMA), "qwen2": Qwen2Config(**LLAMA, num_key_value_heads=2)}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# One of each kind of layer: fused or normed heads, windows and soft caps, no or partial rotary, experts, sinks, MLA.
@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "phi3", "gemma2", "gpt2", "opt", "gpt_neox", "mixtral", "cohere2", "gpt_oss", "deepseek_v3"],
)
def test_layers_compile_whole_and_compute_the_same(family):
    model = causal_lm(family, FAMILIES[family])
    plain = StarsEngine(model, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    engine, counter, rotated = StarsEngine(model, sum_reward), CompileCounter(), []

    def joining(module, inputs):
        join(module)
        rotated.append("attend_rotated" in module.code)
        return counter(module, inputs)

    layers = CompiledLayers(model, backend=joining)
    with layers.running():
        compiled = engine.generate(PROMPTS, CONFIG, seed=0)
    assert len(layers) == model.config.num_hidden_layers
    assert counter.frame_count > 0
    assert any(rotated) == (family not in NOT_ROTATED_WITH_THE_APPEND)
    assert compiled.completions == plain.completions
    for ours, theirs in zip(compiled.logprobs, plain.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", SHAPES)
def test_a_decode_layer_is_twelve_launches(family):
    """Counted in what Inductor writes for an H100. Our attention is two: it appends, and attends."""
    model = AutoModelForCausalLM.from_config(SHAPES[family], dtype=torch.bfloat16).eval()
    code = code_of_a_layer(model)
    found = ["norm" if "rsqrt" in name else "own" if name.startswith("triton") else name for name in launches(code)]
    product = "addmm" if family == "qwen2" else "mm"  # which have a bias
    attention, last = ["stars_fast.attend_rotated", "mm"], ["mm", "mm", "own", "stars_fast.product_onto"]
    assert found == ["norm", *[product] * 3, *attention, "norm", *last]
    assert len(found) + 1 == 12
    assert "div_floor_integer" not in code, "a head size that is no constant"


def _scaled(x, a, weight):
    total = torch.add(x, a, alpha=0.5)
    return total + F.linear(torch.tanh(total), weight, None)


def _changed(x, a, weight):
    total = x + a
    inner = torch.tanh(total)
    total.mul_(2.0)
    return total + F.linear(inner, weight, None)


def _changed_by_an_operator(x, a, weight):
    total = x + a
    inner = torch.tanh(total)
    total += 1.0
    return total + F.linear(inner, weight, None)


def _changed_addend(x, a, weight):
    addend = a * 1.0
    total = x + addend
    inner = torch.tanh(total)
    addend[:] = 0.0
    return total + F.linear(inner, weight, None)


def _changed_in_a_view(x, a, weight):
    total = x + a
    F.relu(total[0], inplace=True)
    return total + F.linear(torch.tanh(x), weight, None)


def _changed_between_products(x, a, weight):
    total = x + a
    first = F.linear(total, weight, None)
    total.mul_(2.0)
    return first * F.linear(total, weight, None)


@pytest.mark.parametrize(
    ("layer", "joined"),
    [
        (lambda x, a, weight: (total := x + a) + F.linear(torch.tanh(total), weight, None), True),
        (_scaled, False),
        (_changed, False),
        (_changed_by_an_operator, False),
        (_changed_addend, False),
        (_changed_in_a_view, False),
        (_changed_between_products, False),
    ],
)
@torch.no_grad()
def test_sums_and_products_of_what_is_changed_in_between_are_left_alone(layer, joined, monkeypatch):
    monkeypatch.setattr("stars_fast.tree.joined.PRODUCTS", not joined)
    code = []

    def joining(module, inputs):
        join(module)
        code.append(module.code)
        return module

    values = [torch.randn(size) for size in ((1, 5, 8), (1, 5, 8), (8, 8))]
    expected = layer(*values)
    torch.testing.assert_close(torch.compile(layer, backend=joining, fullgraph=True, dynamic=True)(*values), expected)
    assert ("product_onto" in code[0]) == joined


@torch.no_grad()
def test_a_product_is_added_to_rows_of_any_size_however_far_apart_they_lie():
    room, x, weight = torch.randn(1, 5, 128), torch.randn(1, 5, 8), torch.randn(72, 8)
    total, beside = room[..., :72], room[..., 72:].clone()
    expected = total + F.linear(x, weight)
    torch.ops.stars_fast.product_onto.default(total, x, weight)
    torch.testing.assert_close(total, expected)
    assert torch.equal(room[..., 72:], beside)


@torch.no_grad()
def test_a_rotation_in_more_bits_than_the_attention_is_not_moved_into_it():
    code, rotations = [], (torch.randn(1, 5, 8), torch.randn(1, 5, 8))

    def joining(module, inputs):
        join(module)
        code.append(module.code)
        return module

    def half(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)

    def layer(q, k, cos, sin, wide):
        q, k = (x.float() if wide else x for x in (q, k))
        cos, sin = cos[:, None].to(q.dtype), sin[:, None].to(q.dtype)
        q, k = (((x * cos) + (half(x) * sin)).to(torch.bfloat16) for x in (q, k))
        q, k = (x[0].transpose(0, 1) for x in (q, k))
        return torch.ops.stars_fast.attend.default(q, k, k, 0, 1.0, 0, 0.0, None)

    class Attention:
        def attend(self, layer, q, k, v, **_):
            return v

    x = torch.randn(1, 4, 5, 8).bfloat16()
    for wide in (False, True):
        with active(Attention()):
            torch.compile(layer, backend=joining, fullgraph=True, dynamic=True)(x, x, *rotations, wide)
    assert ["attend_rotated" in one for one in code] == [True, False]


def test_layers_and_numbers_of_rows_share_their_code():
    model, counter = tiny_policy(64, hidden=32, layers=12), CompileCounter()
    engine = StarsEngine(model, sum_reward)
    with CompiledLayers(model, backend=counter).running():
        for prompts in (PROMPTS, PROMPTS * 3, PROMPTS * 7):
            engine.generate(prompts, CONFIG, seed=0)
    assert counter.frame_count <= 2  # one row, and any other number


def test_many_models_compile_in_one_process():
    """Their layers share one function in transformers, and so its limit of compilations."""
    for family in ("llama", "qwen2", "gemma", "olmo2", "phi3", "granite"):
        model = causal_lm(family, FAMILIES[family])
        with CompiledLayers(model, backend="eager").running():
            StarsEngine(model, sum_reward).generate(PROMPTS, CONFIG, seed=0)


def test_the_model_has_its_own_forward_again():
    model = tiny_policy()
    before = [module.forward.__func__ for module in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), CompiledLayers(model, backend="eager").running():
        raise RuntimeError("on purpose")
    assert [module.forward.__func__ for module in model.modules()] == before


def run(model, layers=None):
    engine = StarsEngine(model, sum_reward)
    if layers is not None:
        engine.policy._compiled, engine.policy.torch_compile = layers, True
    return engine.generate(PROMPTS, CONFIG, seed=0)


def test_a_second_engine_compiles_nothing(monkeypatch):
    model, counter = tiny_policy(64, hidden=32), CompileCounter()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: counter)
    first, second = CompiledLayers(model), CompiledLayers(model)
    run(model, first)
    run(model, second)
    assert counter.frame_count == first.compilations > 0
    assert second.compilations == 0


def test_hooks_that_come_and_go_are_followed():
    model = tiny_policy(64, hidden=32)
    layers, plain = CompiledLayers(model, "eager"), run(model).completions
    assert run(model, layers).completions == plain
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0)
    assert run(model, layers).completions == run(model).completions != plain
    handle.remove()
    assert run(model, layers).completions == plain


def test_layers_may_be_entered_twice_at_once():
    model = tiny_policy(64, hidden=32)
    one, other = CompiledLayers(model, "eager").running(), CompiledLayers(model, "eager").running()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert all("forward" in vars(layer) for layer in model.model.layers)
    other.__exit__(None, None, None)
    assert not any("forward" in vars(module) for module in model.modules())


def elsewhere(model, ids):
    """The logits that another thread has of the model."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: model(ids).logits).result()


@torch.no_grad()
def test_other_threads_run_the_layers_as_they_are():
    model, counter, ids = tiny_policy(64, hidden=32), CompileCounter(), torch.arange(6)[None]
    own = model(ids).logits
    with CompiledLayers(model, backend=counter).running():
        assert torch.equal(elsewhere(model, ids), own)
    assert counter.frame_count == 0


@torch.no_grad()
def test_what_a_user_compiles_is_the_models_own_while_a_session_is_open():
    model, ids = tiny_policy(64, layers=1), torch.arange(6)[None]
    own = model(ids).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    session = AsyncStarsEngine(StarsEngine(model, sum_reward))
    torch.testing.assert_close(compiled(ids).logits, own)
    torch.testing.assert_close(elsewhere(compiled, ids), own)
    session.close()


@torch.no_grad()
def test_a_layer_that_was_compiled_in_place_serves_its_user_and_a_session():
    model, ids = tiny_policy(64, layers=1), torch.arange(6)[None]
    own, drawn = model(ids).logits, run(model).completions
    model.model.layers[0].compile(backend="eager")
    engine = StarsEngine(model, sum_reward)
    session = AsyncStarsEngine(engine)
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, own)
        assert engine.generate(PROMPTS, CONFIG, seed=0).completions == drawn
    session.close()


def test_layers_that_do_not_compile_run_without_and_say_so():
    def refuse(module, inputs):
        raise RuntimeError("no compiler")

    model = tiny_policy(64, hidden=32)
    with pytest.warns(UserWarning, match="(?s)do not compile.*no compiler"):
        compiled = run(model, CompiledLayers(model, refuse))
    assert compiled.completions == run(model).completions


def test_layers_that_hide_whose_pass_it_is_run_uncompiled_and_say_so():
    """On a CUDA device, where layers would run compiled: nothing is run on it here."""
    model = tiny_policy(64, hidden=32, layers=1)
    for hides in (False, True):
        policy = Policy(model)
        policy.device = torch.device("cuda")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            policy.accelerate(cuda_graphs=False, torch_compile=True)
        told = [str(one.message) for one in caught if "layers of LlamaForCausalLM run without" in str(one.message)]
        assert (len(told), policy.torch_compile) == ((1, False) if hides else (0, True))
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
        )


def wrong(module, inputs, of=lambda inputs: True):
    """A compiler whose code gives half as much again."""
    if not of(inputs):
        return module
    return lambda *arguments: tuple(1.5 * output for output in module(*arguments))


def a_single_row(inputs):
    return any(one.ndim == 3 and one.shape[1] == 1 for one in inputs if isinstance(one, torch.Tensor))


@pytest.mark.parametrize("rows", ["any", "one"])
def test_layers_that_compute_something_else_compiled_run_without_and_say_so(rows):
    model, one = tiny_policy(64, hidden=32), dict(candidates=1) if rows == "one" else {}
    plain = StarsEngine(model, sum_reward).generate(PROMPTS[:1], CONFIG, seed=0, **one)
    engine = StarsEngine(model, sum_reward)
    backend = partial(wrong, of=a_single_row) if rows == "one" else wrong
    engine.policy._compiled, engine.policy.torch_compile = CompiledLayers(model, backend), True
    told = (
        "layers of LlamaForCausalLM compute something else compiled.*differ by [1-9][0-9]+%, where rounding explains 1%"
    )
    with pytest.warns(UserWarning, match=told):
        out = engine.generate(PROMPTS[:1], CONFIG, seed=0, **one)
    assert out.completions == plain.completions and not engine.policy.torch_compile
    assert out.logprobs == plain.logprobs, "nothing that was wrong is left in a slot"


def test_compiled_layers_are_compared_once_of_one_row_and_of_more_and_nothing_is_compiled_for_that(monkeypatch):
    model, counter, asked, compares = tiny_policy(64, hidden=32), CompileCounter(), [], []
    engine = StarsEngine(model, sum_reward)
    engine.policy._compiled, engine.policy.torch_compile = CompiledLayers(model, counter), True
    compared, difference = CompiledLayers.disagreement, relative

    def counted(layers, tree, single):
        before = counter.frame_count
        told = compared(layers, tree, single)
        assert counter.frame_count == before > 0
        asked.append(single)
        return told

    monkeypatch.setattr(CompiledLayers, "disagreement", counted)
    monkeypatch.setattr(compiled, "relative", lambda *both: compares.append(len(both[0])) or difference(*both))
    for candidates in (1, 3, 1, 3):
        engine.generate(PROMPTS[:1], CONFIG, seed=0, candidates=candidates)
    assert engine.policy.torch_compile and engine.policy._compiled._compared == {False, True}
    assert compares == [11, 2], "tokens: of both branches, and the first of each"
    assert len(asked) > 2 and set(asked) == {False, True}
    assert engine.policy.tree.free_slots == engine.policy.tree.capacity - 1


def test_compiled_layers_are_not_compared_where_hooks_look_on():
    model = tiny_policy(64, hidden=32)
    policy = Policy(model)
    policy._compiled, policy.torch_compile = CompiledLayers(model, "eager"), True
    policy.begin(40, 20, 4)
    with plugged(model), torch.no_grad():
        with policy._head_inputs() as seen:
            policy.prefill([-1], [[5, 6, 7]])
        assert len(seen) == 1 and not policy._compiled._compared
        policy.prefill([-1], [[5, 6, 7]])
    assert policy._compiled._compared == {False}
