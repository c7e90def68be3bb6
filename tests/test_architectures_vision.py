"""Prompts with pictures give the untouched model's own numbers, in every family whose layers a tree can hold."""

import copy
import functools

import pytest
import torch
from tiny_vision import FAMILIES, IMAGE, answer_logprobs, family_model, family_prompt, together

from stars_fast.policy.leaf import Leaf, Sampling
from stars_fast.policy.policy import Policy
from stars_fast.tree import attention
from stars_fast.tree.attention import plugged
from stars_fast.tree.check import max_difference

WORDS = [7, 8, 9, 10, 11, 12]  # a prompt without a picture
TOLERANCE = 1e-4


@functools.cache
def policy_of(name):
    policy = Policy(family_model(name))
    policy.begin(600, 128, 8)
    return policy


@pytest.fixture(autouse=True)
def nothing_stays(request):
    """No test leaves anything in a tree."""
    with torch.no_grad():
        yield
    name = request.node.callspec.params["name"]
    assert policy_of(name).tree.nodes == 0


def words(name):
    ids = torch.tensor([WORDS])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # With sdpa alone, tokens of the first PaliGemma see each other whether its processor asks for it or not.
    return {**inputs, "token_type_ids": torch.zeros_like(ids)} if name == "paligemma" else inputs


def read(policy, prompts):
    """Nodes and logits of prompts of one each."""
    both = [policy.read_media(prompt) for prompt in prompts]
    return [node for nodes, _ in both for node in nodes], [row for _, logits in both for row in logits]


def read_words(policy, name):
    if policy.reads_whole:
        return read(policy, [words(name)])
    return policy.prefill([-1], [WORDS])


def proposed(policy, nodes, logits, branches, segment=0):
    leaves = [
        Leaf(node, row, Sampling(), key, segment, 0, branches, 6)
        for key, (node, row) in enumerate(zip(nodes, logits, strict=True))
    ]
    return policy.propose(leaves)


def worst(name, prompts, answers, groups):
    """How far the log-probabilities of draws are from those of plain passes over prompt, answer so far and draw."""
    errors = [0.0]
    for prompt, answer, draws in zip(prompts, answers, groups, strict=True):
        for draw in draws:
            whole, kind = [*answer, *draw.tokens], FAMILIES[name].answer_type
            expected = answer_logprobs(family_model(name), prompt, whole, kind)[len(answer) :]
            errors.append(float((expected - torch.tensor(draw.logprobs)).abs().max()))
    return max(errors)


def release(policy, nodes, groups=()):
    policy.tree.release_all([*nodes, *(draw.node for draws in groups for draw in draws)])


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_are_those_of_the_untouched_policy(name):
    """Two pictures and a text go on side by side, twice, and all over again once everything was given back."""
    policy = policy_of(name)
    prompts = [family_prompt(name, 0), family_prompt(name, 1), words(name)]
    drawn = {}
    for branches in (1, 4):
        with plugged(policy.model):
            nodes, logits = read(policy, prompts[:2])
            plan = policy.plan(nodes, [0, 0], [])
            assert tuple((plan.trunk_position - plan.trunk_len).tolist()) == FAMILIES[name].offsets
            text, text_logits = read_words(policy, name)
            nodes, logits = nodes + text, logits + text_logits
            groups = proposed(policy, nodes, logits, branches)
            chosen = [draws[0] for draws in groups]
            policy.finish_branches(chosen)
            again = proposed(policy, [draw.node for draw in chosen], [draw.logits for draw in chosen], branches, 1)
        release(policy, nodes, groups + again)
        assert policy.tree.nodes == 0
        drawn[branches] = [[draw.tokens for draw in draws] for draws in groups + again]
        if branches == 4:
            answers = [draw.tokens for draw in chosen]
            error = max(worst(name, prompts, [[]] * 3, groups), worst(name, prompts, answers, again))
            assert error < TOLERANCE
    assert drawn[1] == [draws[:1] for draws in drawn[4]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_is_read_in_one_pass(name, side):
    policy = policy_of(name)
    prompts = [family_prompt(name, which) for which in (0, 1)]
    with plugged(policy.model):
        nodes, logits = policy.read_media(together(prompts, side), (1, 0))
        groups = proposed(policy, nodes, logits, 2)
    release(policy, nodes, groups)
    assert worst(name, prompts[::-1], [[]] * 2, groups) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_without_pictures_are_exact(name):
    policy = policy_of(name)
    assert max_difference(policy) < TOLERANCE
    policy.begin(600, 128, 8)
    assert policy.reads_whole == (name == "paligemma")


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].offsets != (0, 0)])
def test_the_offset_is_seen_in_the_numbers(name):
    policy, prompt = policy_of(name), family_prompt(name, 0)
    with plugged(policy.model):
        nodes, logits = policy.read_media(prompt)
        policy.tree.shift(nodes[0], 0)
        groups = proposed(policy, nodes, logits, 2)
    release(policy, nodes, groups)
    assert worst(name, [prompt], [[]], groups) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "paligemma", "paligemma2"])
def test_the_mask_of_a_prompt_is_seen_in_the_numbers(name, monkeypatch):
    """Read as other texts are, each token seeing those before it, the same prompt gives other numbers."""
    policy, prompt = policy_of(name), family_prompt(name, 1)
    call = attention.PromptContext.call

    def causal(self, module, query, key, value, mask, **options):
        if module in self.writes:
            size = key.shape[2]
            mask = torch.full((1, 1, size, size), -torch.inf).triu(1)
        return call(self, module, query, key, value, mask, **options)

    monkeypatch.setattr(attention.PromptContext, "call", causal)
    with plugged(policy.model):
        nodes, logits = policy.read_media(prompt)
    release(policy, nodes)
    plain = policy.model(**prompt).logits[0, -1]
    assert (logits[0] - plain).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_ids_that_stand_for_pictures_are_not_drawn(name):
    policy, prompt = policy_of(name), family_prompt(name, 0)
    with plugged(policy.model):
        nodes, (logits,) = policy.read_media(prompt)
        raised = logits.index_fill(0, torch.tensor([IMAGE]), 50.0)
        ((draw,),) = groups = proposed(policy, nodes, [raised], 1)
    release(policy, nodes, groups)
    assert IMAGE in policy.barred and draw.tokens[0] != IMAGE
    assert draw.logprobs[0] == pytest.approx(raised.log_softmax(0)[draw.tokens[0]].item(), abs=1e-4)
    assert draw.sampling_logprobs[0] > draw.logprobs[0] + 30


@pytest.mark.parametrize("name", ["llava"])
@pytest.mark.parametrize("layers", [1, 2])
def test_pictures_are_refused_where_somebody_has_compiled_layers(name, layers):
    """Which modules attend in them is hidden: without their keys, answers would be to another prompt."""
    model = copy.deepcopy(family_model(name))
    for layer in model.model.language_model.layers[:layers]:
        layer.compile(backend="eager")
    policy = Policy(model)
    policy.begin(600, 128, 8)
    with plugged(model), pytest.raises(NotImplementedError, match=r"layers \[0.*\] were compiled before the engine"):
        policy.read_media(family_prompt(name, 0))
    assert policy.tree.nodes == 0
