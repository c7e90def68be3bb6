"""Reading a processor's output leaves keys, values and an offset in the tree, and nothing else anywhere."""

import threading

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from test_methods import EVERY, generate
from tiny_vision import IMAGE, family_model, family_prompt

from stars_fast import StarsEngine
from stars_fast.policy.leaf import Leaf, Sampling
from stars_fast.policy.policy import Policy
from stars_fast.policy.steps import Steps
from stars_fast.rewards import ClassifierReward
from stars_fast.tree.attention import plugged
from stars_fast.tree.passes import Pass
from stars_fast.tree.segment_tree import SlotsExhausted

OTHERS = ("cards", "args", "mara", "rsd", "persona_judge")  # that do not take each token from a plain proposal


@pytest.fixture
def policy():
    made = Policy(family_model("qwen2_5_vl"))
    made.begin(100, 64, 8)
    with torch.no_grad(), plugged(made.model):
        yield made


@pytest.fixture
def prompt():
    return family_prompt("qwen2_5_vl", 0)


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_whatever_it_raises_slots_and_model_are_as_before(policy, prompt):
    before, none = policy.tree.free_slots, hooks(policy.model)
    for inputs, error, message in (
        (prompt | {"input_ids": prompt["input_ids"].clamp_max(IMAGE - 1)}, ValueError, "[Ii]mage"),
        (prompt | {"attention_mask": torch.zeros_like(prompt["input_ids"])}, ValueError, "row 0 .* all padding"),
        ({name: torch.cat([value] * 3) for name, value in prompt.items()}, SlotsExhausted, "117 slots requested"),
    ):
        with pytest.raises(error, match=message):
            policy.read_media(inputs, range(len(inputs["input_ids"])))
        assert (policy.tree.nodes, policy.tree.free_slots, hooks(policy.model)) == (0, before, none)


def test_a_layer_that_has_read_nothing_is_named(policy, prompt):
    policy.modules[torch.nn.Identity()] = 7
    with pytest.raises(NotImplementedError, match=r"policy is a Qwen2_5_VL.*: layers \[7\] have read nothing"):
        policy.read_media(prompt)
    assert policy.tree.nodes == 0


def test_a_decoder_that_reads_more_tokens_than_there_are_ids_is_refused(policy, prompt):
    with pytest.raises(NotImplementedError, match=r"1 x 39 tokens, .* 1 x 38 ids"):
        embeds = policy.model.get_input_embeddings()(prompt["input_ids"])
        shorter = {name: value[:, :-1] for name, value in prompt.items() if name.endswith(("ids", "mask"))}
        handle = policy.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"inputs_embeds": embeds, "position_ids": None}),
            with_kwargs=True,
        )
        try:
            policy.read_media(shorter)
        finally:
            handle.remove()
    assert policy.tree.nodes == 0


def test_tokens_that_lag_are_read_and_not_kept(policy, prompt):
    whole, short = policy.read_media(prompt), policy.read_media(prompt, (0,), 1)
    assert torch.equal(whole[1][0], short[1][0])
    assert [policy.tree.length(nodes[0]) for nodes, _ in (whole, short)] == [39, 38]
    _, again = policy.prefill(whole[0] + short[0], [[5], [int(prompt["input_ids"][0, -1]), 5]])
    torch.testing.assert_close(again[0], again[1], atol=1e-4, rtol=0)


def test_a_row_may_be_asked_for_twice(policy, prompt):
    nodes, logits = policy.read_media(prompt, (0, 0))
    assert torch.equal(*logits) and not set(policy.tree.slots(nodes[0])) & set(policy.tree.slots(nodes[1]))


def test_the_models_ordinary_users_do_not_disturb_a_reading(policy, prompt):
    """Another thread runs the same model, from other positions on, in the middle of a pass."""
    other = family_prompt("qwen2_5_vl", 1)

    def run():
        with torch.no_grad():
            policy.model(**other)

    def interrupt(*_):
        thread = threading.Thread(target=run)
        handle.remove()
        thread.start()
        thread.join()

    handle = policy.model.get_input_embeddings().register_forward_hook(interrupt)
    (node,), (logits,) = policy.read_media(prompt)
    assert policy.plan([node], [0], []).trunk_position.item() == 39 - 18
    torch.testing.assert_close(logits, policy.model(**prompt).logits[0, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def draws_behind_pictures(policy):
    """Draws of two segments behind two prompts whose positions are off by different numbers, side by side."""
    policy.begin(400, 64, 4)
    prompts = [family_prompt("qwen2_5_vl", which) for which in (0, 1)]
    with plugged(policy.model):
        nodes, logits = map(
            list, zip(*[(*nodes, *logits) for nodes, logits in map(policy.read_media, prompts)], strict=True)
        )
        drawn = []
        for segment in range(2):
            leaves = zip(nodes, logits, strict=True)
            drawn += policy.propose([Leaf(*leaf, Sampling(), key, segment, 0, 3, 4) for key, leaf in enumerate(leaves)])
            last = [draws[1] for draws in drawn[-2:]]
            nodes, logits = policy.prefill([draw.node for draw in last], [draw.tokens[-1:] for draw in last])
    tokens, logprobs = ([getattr(one, name) for draws in drawn for one in draws] for name in ("tokens", "logprobs"))
    return tokens, torch.tensor(logprobs)


def test_padded_steps_and_passes_go_on_from_the_positions_of_each_prompt():
    plain, padded = Policy(family_model("qwen2_5_vl")), Policy(family_model("qwen2_5_vl"))
    padded.graphs.enabled = True
    (tokens, logprobs), (same, close) = draws_behind_pictures(plain), draws_behind_pictures(padded)
    assert {type(work) for work in padded.graphs._kept.values()} == {Pass, Steps}
    assert same == tokens
    torch.testing.assert_close(close, logprobs, atol=1e-4, rtol=0)


def test_models_of_text_take_no_media():
    policy, reward = Policy(tiny_policy(32)), ClassifierReward(tiny_reward(32)).tree_model
    assert not policy.takes_media and not policy.reads_whole and policy.barred is None and not reward.takes_media
    assert Policy(family_model("qwen2_5_vl").eval()).takes_media


@pytest.mark.parametrize("name, padded", [("stars", False), ("stars", True), *((name, False) for name in OTHERS)])
def test_no_method_draws_what_stands_for_a_picture(name, padded):
    engine = StarsEngine(tiny_policy(32, hidden=32), tiny_reward(32, hidden=32))
    engine.policy.barred = torch.arange(16)
    engine.policy.graphs.enabled = padded
    out = generate(engine, EVERY[name])
    assert out.errors == [None] * 6 and min(map(min, out.completions)) >= 16
