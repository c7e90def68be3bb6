"""Fresh texts go through a library's kernel where one serves, and give what ours gives."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_policy, tiny_reward
from torch.nn.attention import varlen

from stars_fast import StarsConfig, StarsEngine
from stars_fast.ops._library import CHECKS
from stars_fast.tree import model, prefill
from stars_fast.tree.compiled import CompiledLayers
from stars_fast.tree.joined import join
from stars_fast.tree.prefill import FLASH_ATTN, TORCH, Library, Shape, chosen, refused

CPU = torch.device("cpu")
USUAL = Shape(8, 2, 128, 128, torch.bfloat16)


def by_rows(q, k, v, rows, longest, scale, window=0, softcap=0.0):
    """What every library's kernel computes, in plain torch."""
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
    for start, stop in zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True):
        assert stop - start <= longest
        seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        if window:
            seen = seen.triu(1 - window)
        one = (x[start:stop].transpose(0, 1)[None].float() for x in (q, k, v))
        attended = F.scaled_dot_product_attention(*one, seen, scale=scale, enable_gqa=True)
        out[start:stop] = attended[0].transpose(0, 1).to(q.dtype)
    return out


@pytest.fixture
def asked(monkeypatch):
    """The rows that a stand-in serves, of any length and in float32 too, as tuples of their lengths."""
    rows = []

    def attend(q, k, v, pointers, *rest):
        rows.append(tuple(pointers.diff().tolist()))
        return by_rows(q, k, v, pointers, *rest)

    library = Library(FLASH_ATTN, attend)
    monkeypatch.setattr(prefill, "libraries", lambda device: (library,))
    monkeypatch.setattr(prefill, "_DTYPES", (torch.float32,))
    monkeypatch.setitem(prefill.LEAST_TOKENS, FLASH_ATTN, 6)
    return rows


def test_both_models_read_fresh_texts_through_the_library_and_nothing_changes(asked, monkeypatch):
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17]]
    config = StarsConfig(target_reward=0.5, base_reward=0.0, segment_length=4, max_new_tokens=8)

    def completions():
        engine = StarsEngine(tiny_policy(32, hidden=32), tiny_reward(32, hidden=32))
        asked.clear()  # the probe of the models' own numbers is no matter here
        return engine.generate(prompts, config, seed=0).completions

    through_it = completions()
    assert asked == [(8, 7)] * 4, "two layers of policy and of reward model, and no later pass"
    monkeypatch.setattr(prefill, "libraries", lambda device: ())
    assert completions() == through_it


@pytest.mark.skipif(bool(CHECKS), reason="rotated beforehand, where the operators check their arguments")
def test_layers_that_leave_rotating_to_the_append_give_the_library_rotated_keys(asked, monkeypatch):
    model, prompts = tiny_policy(32, hidden=32), [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17]]
    config = StarsConfig(target_reward=-9.0, base_reward=-9.0, segment_length=4, max_new_tokens=4)
    engine = StarsEngine(model, lambda completions: [0.0] * len(completions))
    expected = engine.generate(prompts, config, seed=0)
    asked.clear()
    torch._dynamo.reset()

    def joined(module, inputs):
        join(module)
        assert "attend_rotated" in module.code
        return module.forward

    with CompiledLayers(model, joined).running():
        out = engine.generate(prompts, config, seed=0)
    torch._dynamo.reset()
    assert asked == [(8, 7)] * 2 and out.completions == expected.completions
    torch.testing.assert_close(torch.tensor(out.logprobs), torch.tensor(expected.logprobs), atol=1e-5, rtol=0)


def test_a_prefix_in_the_tree_keeps_our_kernel(asked, monkeypatch):
    monkeypatch.setattr(model, "PREFILL_CHUNK", 8)
    engine = StarsEngine(tiny_policy(32, hidden=32), lambda completions: [0.0] * len(completions))
    asked.clear()
    config = StarsConfig(target_reward=-9.0, base_reward=-9.0, segment_length=4, max_new_tokens=4)
    engine.generate([[*range(1, 21)]], config, seed=0)
    assert asked == [(8,)] * 2, "only the first of three pieces has nothing before it"


def test_short_rows_keep_our_kernel(asked):
    engine = StarsEngine(tiny_policy(32, hidden=32), lambda completions: [0.0] * len(completions))
    asked.clear()
    config = StarsConfig(target_reward=-9.0, base_reward=-9.0, segment_length=4, max_new_tokens=4)
    engine.generate([[1, 2, 3], [4, 5, 6, 7, 8]], config, seed=0)
    assert asked == []


def test_padded_passes_keep_our_kernel(asked, padded):
    asked.clear()
    config = StarsConfig(target_reward=-9.0, base_reward=-9.0, segment_length=4, max_new_tokens=4)
    padded.generate([[*range(1, 21)]], config, seed=0)
    assert asked == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float32), "float32"),
        (dict(value_size=64), "values of another size than keys"),
        (dict(key_size=100, value_size=100), "heads of 100 elements"),
        (dict(key_size=512, value_size=512), "heads of 512 elements"),
        (dict(sinks=True), "sinks"),
        (dict(softcap=50.0), "a soft cap"),
    ],
    ids=str,
)
def test_what_a_library_does_not_take_goes_to_the_next_or_to_ours(change, reason, monkeypatch):
    shape = USUAL._replace(**change)
    plain, capable = Library(TORCH, by_rows), Library(FLASH_ATTN, by_rows, soft_caps=True)
    assert refused(plain, shape) == reason
    monkeypatch.setattr(prefill, "libraries", lambda device: (plain, capable))
    assert chosen(USUAL._replace(window=7), 2048, CPU) is plain
    assert chosen(USUAL, 100, CPU) is None, "our kernel for short rows"
    assert chosen(shape, 2048, CPU) is (capable if "softcap" in change else None)
    assert reason in prefill.in_words({shape}, CPU)


def test_a_cpu_has_no_library():
    assert prefill.libraries(CPU) == ()
    assert prefill.in_words({USUAL}, CPU) == prefill.OURS


def varlen_stand_in(keywords, names):
    """A function of torch's or flash-attn's signature, which sees windows as they say them."""

    def function(q, k, v, rows, rows_of_keys, longest, longest_of_keys, **options):
        keywords.append(options)
        assert rows is rows_of_keys and longest == longest_of_keys
        left, right = options["window_size"]
        assert right == 0, "causal"
        return by_rows(q, k, v, rows, longest, options[names["scale"]], left + 1)

    return function


def test_the_call_fits_the_signature_that_torch_has(monkeypatch):
    keywords, signature = [], inspect.signature(varlen.varlen_attn)
    stand_in = varlen_stand_in(keywords, {"scale": "scale"})
    stand_in.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    library = prefill._tried(TORCH, prefill._torch, CPU)
    assert library.problem == "" and not library.soft_caps
    for options in keywords:
        signature.bind(*[None] * 7, **options)
    assert [options["window_size"] for options in keywords] == [(-1, 0), (1, 0)]


def test_flash_attn_is_called_as_it_wants(monkeypatch):
    keywords = []
    function = varlen_stand_in(keywords, {"scale": "softmax_scale"})
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=function))
    library = prefill._tried(FLASH_ATTN, prefill._flash_attn, CPU)
    assert library.problem == ""
    assert all(options["causal"] for options in keywords)


def test_a_library_that_does_not_work_is_not_asked_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # import raises
    missing = prefill._tried(FLASH_ATTN, prefill._flash_attn, CPU)
    assert missing.problem.startswith("ModuleNotFoundError")
    ahead = prefill._tried(TORCH, lambda: (lambda q, k, v, *rest: v.mean(0, keepdim=True).expand_as(q), False), CPU)
    assert ahead.problem == "it gives other numbers"
    monkeypatch.setattr(prefill, "libraries", lambda device: (missing, ahead))
    assert chosen(USUAL, 2048, CPU) is None
    assert "it gives other numbers" in prefill.in_words({USUAL}, CPU)


def test_a_pass_that_nobody_bounds_is_bounded(monkeypatch):
    monkeypatch.setattr(model, "MOST_PACKED", 10)
    engine = StarsEngine(tiny_policy(32, hidden=32), tiny_reward(32, hidden=32))
    tree, passes = engine.reward.tree_models[0], []
    forward = tree.forward
    monkeypatch.setattr(
        tree, "forward", lambda ids, *rest, **more: passes.append(len(ids)) or forward(ids, *rest, **more)
    )
    config = StarsConfig(target_reward=-9.0, base_reward=-9.0, segment_length=4, max_new_tokens=4)
    engine.generate([[i, *range(1, 8)] for i in range(8, 11)], config, seed=0)
    assert passes[:3] == [10, 10, 4]
