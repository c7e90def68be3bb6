"""The policy and its guides draw one token together: exactly the softmax of the mix, whatever decides about it."""

import copy
import gc
import json
import math
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import refused, sum_reward, tiny_policy, tiny_tokenizer
from oracle import Oracle, attempts, next_token_probabilities, p_value, text
from test_async_engine import alone, served
from test_law import PROMPT, ROWS, RULE, wave, wave_reward
from test_law import VOCAB as FEW_IDS
from test_methods import CONFIG, EVERY, PROMPTS, SEEDS, VOCAB, Sums
from test_methods_navigator import navigator

from stars_fast import StarsConfig, StarsEngine, calibrate
from stars_fast.inputs import models
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods import METHODS, RSD, BestOfN, Guided, Mara, PersonaJudge, Stars, Vanilla
from stars_fast.policy.mixed import MixedSteps

POLICY, TWIN, GUIDE, OTHER = (tiny_policy(VOCAB, hidden=32, seed=seed) for seed in (0, 0, 7, 8))


def without(ids):
    """Another prompt, longer than the prompt."""
    return [3, 4, 1, *ids]


MIXES = {
    "0.7 policy + 0.3 guide": Guided([(GUIDE, 0.3)], weight=0.7, method=Stars()),
    "policy + 0.5 (expert - anti-expert)": Guided([(GUIDE, 0.5), (OTHER, -0.5)], method=Stars()),
    "2 policy - policy under another prompt": Guided([(None, -1.0, without)], weight=2.0, method=Stars()),
    "five trunks in two trees": Guided([(None, -0.5, without), (GUIDE, 1.0), (None, 0.2), (GUIDE, -0.3, without)], 1.2),
}
KINDS = ("policy + 0.5 (expert - anti-expert)", "five trunks in two trees")


def make_engine(reward=None, padded=False, **limits):
    engine = StarsEngine(POLICY, reward or Sums(), **limits)
    engine.policy.graphs.enabled = padded
    return engine


def held(engine):
    return sum(model.tree.nodes for model in {engine.policy, *engine._guides})


@torch.no_grad()
def mixed_logprobs(method, prompt, completion):
    """Of each token under the softmax of the weighted logits of plain forward passes, and under the policy alone."""
    parts = [(POLICY, method.weight, None), *method.guides]
    logits = []
    for model, _, transform in parts:
        read = prompt if transform is None else transform(prompt)
        plain = (model or POLICY)(torch.tensor([read + completion]), use_cache=False)
        logits.append(plain.logits[0, len(read) - 1 : -1].double())
    mix = sum(weight * one for (_, weight, _), one in zip(parts, logits, strict=True))
    tokens = torch.tensor(completion)[:, None]
    return [one.log_softmax(-1).gather(1, tokens)[:, 0].tolist() for one in (mix, logits[0])]


@pytest.mark.parametrize("mix, padded", [*((mix, False) for mix in MIXES), ("five trunks in two trees", True)])
def test_log_probabilities_are_those_of_plain_forward_passes(mix, padded):
    engine, method = make_engine(padded=padded), MIXES[mix]
    out = engine.generate(PROMPTS, CONFIG, seed=SEEDS, method=method, num_return_sequences=2)
    assert out.errors == [None] * 6
    for row, completion in enumerate(out.completions):
        mixed, raw = mixed_logprobs(method, PROMPTS[row // 2], completion)
        assert out.sampling_logprobs[row] == pytest.approx(mixed, abs=1e-4)
        assert out.logprobs[row] == pytest.approx(raw, abs=1e-4)
    assert held(engine) == 0


# The law


@pytest.fixture(scope="module")
def enumerable():
    """A policy, a guide and one mix of them with their prompt laws: what all runs of a mix follow."""
    policy, guide = tiny_policy(FEW_IDS, seed=3), tiny_policy(FEW_IDS, seed=8)
    rule = replace(RULE, max_new_tokens=4)
    models = [(policy, 1.4, PROMPT), (guide, 0.5, PROMPT), (policy, -0.7, [2, 0, *PROMPT])]
    tables = [next_token_probabilities(model, prompt, rule) for model, _, prompt in models]
    mixed = {}
    for y in tables[0]:
        scores = sum(weight * np.log(table[y]) for (_, weight, _), table in zip(models, tables, strict=True))
        mixed[y] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    guides = [(guide, 0.5), (None, -0.7, lambda ids: [2, 0, *ids])]
    return policy, rule, mixed, tables[0], lambda method: Guided(guides, weight=1.4, method=method)


@pytest.mark.parametrize("method, candidates", [("vanilla", 1), ("stars", 3)])
def test_text_and_attempts_follow_the_enumerated_law_of_the_mix(enumerable, method, candidates):
    policy, rule, mixed, alone, guided = enumerable
    if method == "vanilla":
        rule = replace(rule, target_reward=-math.inf)
    exact, other = (Oracle(table, lambda completion: wave(PROMPT, completion), rule) for table in (mixed, alone))
    engine = StarsEngine(policy, wave_reward, max_rows=ROWS)
    settings = replace(rule, target_reward=1.2).stars_config()
    out = engine.generate(
        [PROMPT], method=guided(method), seed=0, num_return_sequences=1000, candidates=candidates, **settings
    )
    runs = [tuple((tuple(s.tokens), s.attempts, s.accepted) for s in segments) for segments in out.segments]
    for view in (text, attempts):
        assert p_value({0: [view(run) for run in runs]}, {0: exact.law(view)}) > 1e-3
    assert p_value({0: [text(run) for run in runs]}, {0: other.law(text)}) < 1e-3, "it follows the policy alone, too"


# The text


@pytest.fixture(scope="module")
def one_at_a_time():
    """By mixes of all kinds, one candidate at a time."""
    return {mix: make_engine().generate(PROMPTS, CONFIG, seed=SEEDS, method=MIXES[mix], candidates=1) for mix in KINDS}


@pytest.mark.parametrize("mix", KINDS)
@pytest.mark.parametrize("how", ["candidates=8", "alone", "padded", "few rows"])
def test_the_same_seed_gives_the_same_text(one_at_a_time, mix, how):
    expected, call = one_at_a_time[mix], dict(method=MIXES[mix])
    engine = make_engine(padded=how == "padded", **({"max_rows": 3} if how == "few rows" else {}))
    if how == "alone":
        for prompt, seed, completion in zip(PROMPTS, SEEDS, expected.completions, strict=True):
            assert engine.generate([prompt], CONFIG, seed=[seed], **call).completions == [completion]
        return
    if how == "candidates=8":
        call["candidates"] = 8
    assert engine.generate(PROMPTS, CONFIG, seed=SEEDS, **call).completions == expected.completions
    assert held(engine) == 0


@pytest.mark.parametrize("mix", KINDS)
def test_preemption_changes_no_text(small_pools, mix):
    call = dict(method=MIXES[mix], num_return_sequences=2, max_new_tokens=24, ignore_eos=True, seed=SEEDS)
    least = make_engine().prepare(Arguments(PROMPTS, CONFIG, {k: v for k, v in call.items() if k != "seed"})).size.slots
    engine = make_engine(kv_cache_tokens=2 * least)
    out = engine.generate(PROMPTS, CONFIG, **call)
    assert out.stats["preemptions"] > 0 and out.errors == [None] * 6
    assert out.completions == make_engine().generate(PROMPTS, CONFIG, **call).completions
    assert held(engine) == 0


@pytest.mark.parametrize("name", [*(name for name in METHODS if METHODS[name].drawn), "navigator"])
def test_a_mix_of_a_policy_with_itself_is_the_policy_whatever_decides(name):
    """Twice less once is exact, so that every way to live in the loop keeps its texts, and its trees in step."""
    engine, call = make_engine(), dict(seed=SEEDS, num_return_sequences=2)
    decides = navigator(n=2) if name == "navigator" else EVERY[name]
    method = Guided([(TWIN, 1.0), (None, -1.0)], method=decides)
    out, plain = (engine.generate(PROMPTS, CONFIG, method=one, **call) for one in (method, decides))
    assert out.completions == plain.completions and out.errors == [None] * 6
    assert out.rewards == pytest.approx(plain.rewards)
    assert held(engine) == 0


def test_guided_and_plain_requests_of_all_kinds_share_a_session():
    methods = [*MIXES.values(), Stars(), replace(MIXES["0.7 policy + 0.3 guide"], method=BestOfN(n=3))]
    methods.append(RSD(draft=GUIDE, threshold=0.1, delimiter=None, longest=4))
    wanted = [([i % 7, 2], CONFIG.replace(method=methods[i % len(methods)]), i) for i in range(14)]
    engine = make_engine()
    assert served(engine, wanted, 7) == alone(make_engine(), wanted)
    assert held(engine) == engine._drafts.tree.nodes == 0
    assert {model.model.config._attn_implementation for model in engine._guides} == {"sdpa"}


def test_a_heartbeat_that_breaks_off_is_taken_again_with_the_same_text(one_at_a_time, monkeypatch):
    """In the midst of a proposal: the branches in the guides' trees are given back, too."""
    expected, steps, draw = one_at_a_time[KINDS[0]], Counter(), MixedSteps.draw_of

    def breaks(self, logits):
        steps["taken"] += 1
        if steps["taken"] in (3, 12):
            raise torch.OutOfMemoryError("planted") if steps["taken"] == 3 else ValueError("planted")
        draw(self, logits)

    monkeypatch.setattr(MixedSteps, "draw_of", breaks)
    engine = make_engine()
    with pytest.warns(UserWarning, match="is taken again"):
        out = engine.generate(PROMPTS, CONFIG, seed=SEEDS, method=MIXES[KINDS[0]])
    assert out.completions == expected.completions
    assert held(engine) == 0


def test_captured_steps_hold_all_models_until_a_guide_moves():
    guide, engine = copy.deepcopy(GUIDE), make_engine(padded=True)
    call = dict(seed=SEEDS, method=Guided([(guide, 0.3), (None, -0.1, without)], method=Stars()))

    def kept():
        return {key: work for key, work in engine.policy.graphs._kept.items() if isinstance(work, MixedSteps)}

    first = engine.generate(PROMPTS, CONFIG, **call).completions
    engine._guides[0].graphs.enabled = True  # as it is where steps are captured: what they rely on is watched
    assert engine.generate(PROMPTS, CONFIG, **call).completions == first
    steps = kept()
    assert steps
    assert engine.generate(PROMPTS, CONFIG, **call).completions == first
    assert all(kept()[key] is work for key, work in steps.items())
    guide.lm_head.weight = torch.nn.Parameter(guide.lm_head.weight.detach().clone())
    assert engine.generate(PROMPTS, CONFIG, **call).completions == first
    assert all(kept()[key] is not work for key, work in steps.items())


@pytest.mark.parametrize("policy_ids, guide_ids", [(VOCAB, VOCAB + 8), (VOCAB + 8, VOCAB)])
def test_ids_that_the_models_do_not_share_are_never_drawn(policy_ids, guide_ids):
    """Tables of one vocabulary that are padded differently."""
    policy, guide = tiny_policy(policy_ids, hidden=32), tiny_policy(guide_ids, hidden=32, seed=7)
    for model in (policy, guide):
        with torch.no_grad():
            model.lm_head.weight[VOCAB:] *= 20
    engine = StarsEngine(policy, Sums(), tokenizer=tiny_tokenizer(VOCAB))
    out = engine.generate(PROMPTS, method=Guided([(guide, 1.0)]), seed=1, max_new_tokens=20, eos_token_id=[VOCAB - 1])
    assert out.errors == [None] * 3 and max(max(tokens) for tokens in out.completions) < VOCAB


# What is done to the mix


def test_filters_processors_and_penalties_see_the_mix():
    method, seen = Guided([(GUIDE, 0.3)], weight=0.7), []
    engine = make_engine()

    def look(ids, logits):
        seen.append((ids, logits.log_softmax(-1)[0]))
        return logits.index_fill(1, torch.tensor([VOCAB - 1]), -math.inf)

    arguments = Arguments(PROMPTS[:1], CONFIG, dict(method=method, temperature=0.5), seed=1, processor=lambda row: look)
    out = engine.run(arguments)
    (completion,) = out.completions
    mixed, raw = mixed_logprobs(method, PROMPTS[0], completion)
    assert len(completion) == CONFIG.max_new_tokens
    assert [float(law[completion[len(ids)]]) for ids, law in seen] == pytest.approx(mixed, abs=1e-4)
    assert out.logprobs[0] == pytest.approx(raw, abs=1e-4)
    assert out.sampling_logprobs[0] != pytest.approx(mixed, abs=1e-2)


def test_a_guide_whose_logits_are_not_finite_is_not_called_the_policy():
    guide, engine = copy.deepcopy(GUIDE), make_engine()
    call = dict(method=Guided([(guide, 0.3)]), seed=SEEDS)
    assert engine.generate(PROMPTS, CONFIG, **call).errors == [None] * 3
    with torch.no_grad():
        guide.lm_head.weight[5] = math.nan
    errors = engine.generate(PROMPTS, CONFIG, **call).errors
    assert errors == ["the sum of the policy's logits and its guides' is not finite"] * 3


def test_pilots_and_fits_are_of_the_mix():
    method = MIXES["2 policy - policy under another prompt"]
    engine, config = make_engine(), CONFIG.replace(target_reward=None, method=method)
    call = engine.prepare(Arguments(PROMPTS, config))
    assert call.pilot_terms.guides == call.terms.guides == (engine.policy,)
    known = calibrate(engine, PROMPTS, config=config, samples=8, seed=0).config
    assert engine.generate(PROMPTS, known, seed=SEEDS).errors == [None] * 3
    with pytest.raises(ValueError, match="mix is None here, '2 policy \\+ -1 policy under without' in the fit"):
        engine.generate(PROMPTS, known, method="stars", target_reward=None, base_reward=None)


def test_a_prompt_transform_gets_the_prompt_as_it_was_given():
    tokenizer, seen = tiny_tokenizer(VOCAB), []

    def shout(prompt):
        seen.append(copy.deepcopy(prompt))
        if isinstance(prompt, str):
            return "w9 " + prompt
        prompt[-1]["content"] = "w9"  # a copy
        return prompt

    chat = [{"role": "user", "content": "w5 w6"}]
    engine = StarsEngine(POLICY, sum_reward, tokenizer=tokenizer)
    call = engine.prepare(Arguments(["w1 w2", chat], CONFIG, dict(method=Guided([(None, -0.5, shout)]))))
    assert seen == ["w1 w2", chat] and chat[0]["content"] == "w5 w6"
    assert [node.beside[0].ids for node in call.nodes] == [[9, 1, 2], [1, 9, 2, 3]]
    assert [node.slots for node in call.nodes] == [5, 9] and call.terms.copies == 2


# The configuration


def test_a_mix_of_names_is_saved_and_one_of_objects_is_refused_by_name(tmp_path):
    method = Guided([("org/guide", 0.3), (None, -1)], weight=0.7, method=BestOfN(n=3))
    config = StarsConfig(method=method)
    config.save_pretrained(tmp_path)
    assert StarsConfig.from_pretrained(tmp_path) == config
    saved = json.loads((tmp_path / "stars_config.json").read_text())["method"]
    inner = {"name": "best_of_n", "n": 3}
    assert saved == {"name": "guided", "models": [["org/guide", 0.3, None], [None, -1.0, None]], "weight": 0.7} | {
        "method": inner
    }
    assert config.chosen_method == BestOfN(n=3) and config.selecting(Vanilla()).whole_method.guides == method.guides
    for guide, what in (((GUIDE, 1), r"models\[0\] is a LlamaForCausalLM"), ((None, 1, without), "a function")):
        with pytest.raises(ValueError, match=f"method='guided'.*{what}"):
            StarsConfig(method=Guided([guide])).save_pretrained(tmp_path)


def test_a_guide_by_name_is_loaded_once_for_calls_that_are_open_together_and_let_go_of_behind_them(
    tmp_path, monkeypatch
):
    loaded, load, names = [], models.load_policy, [str(tmp_path / name) for name in "ab"]
    monkeypatch.setattr(models, "load_policy", lambda name, *rest: loaded.append(name) or load(name, *rest))
    for name, model in zip(names, (GUIDE, OTHER), strict=True):
        model.save_pretrained(name)
    engine, streams = make_engine(), []
    for name in (*names, *names):
        streams.append(engine.stream(PROMPTS, CONFIG, method=Guided([(name, 0.5)]), seed=1))
        next(streams[-1])
    assert loaded == names
    first = next(weakref.ref(guide) for guide in engine._beside if guide.source == names[0])
    for stream in streams:
        stream.close()
    gc.collect()
    assert first() is None and [guide.source for guide in engine._beside] == names[1:]
    engine.generate(PROMPTS, CONFIG, method=Guided([(names[1], 0.5)]))
    assert loaded == names


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Guided(), ["models", "not empty"]),
        (lambda: Guided([GUIDE]), [r"models\[0\]", r"\(model, weight\)"]),
        (lambda: Guided([(GUIDE, math.inf)]), [r"models\[0\]", "weight=inf"]),
        (lambda: Guided([(3, 1.0)]), [r"models\[0\]", "causal LM"]),
        (lambda: Guided([(None, 1.0, "w1")]), ["prompt_transform='w1'", "function"]),
        (lambda: Guided([(None, 1.0)], method="args"), ["method='args'", "'stars'"]),
        (lambda: Guided([(None, 1.0)], method=Mara(mlp=torch.nn.Linear(2, 2))), ["method='mara'"]),
        (lambda: Guided([(None, 1.0)], method=PersonaJudge([1], [2])), ["method='persona_judge'"]),
        (lambda: Guided([(None, 1.0)], method=Guided([(None, 1.0)])), ["method='guided'"]),
        (lambda: Guided([(None, 1.0)], method="star"), ["'star' is unknown", "stars"]),
        (lambda: Guided([(None, 1.0)], weight="a"), ["weight='a'"]),
    ],
)
def test_what_is_no_mix_is_refused_by_name(make, words):
    with refused(*words):
        make()


@pytest.mark.parametrize(
    "guide, words",
    [
        ((tiny_policy(16), 1.0), [r"models\[0\]", "16 ids", "32"]),
        ((tiny_policy(VOCAB, positions=12), 1.0), [r"models\[0\]'s 12 positions", r"prompts\[0\]"]),
        ((None, 1.0, lambda ids: [99]), [r"prompts\[0\]", "id 99", r"models\[0\]'s"]),
        ((None, 1.0, lambda ids: []), [r"models\[0\]: prompts\[0\]", "empty"]),
        ((None, 1.0, lambda ids: ids[3]), [r"models\[0\]", "IndexError", r"prompts\[0\]"]),
        ((None, 1.0, lambda ids: "w1"), [r"models\[0\]: prompts\[0\]", "tokenizer"]),
    ],
)
def test_a_guide_that_cannot_serve_is_refused_before_any_work(idle, guide, words):
    with refused(*words):
        idle.generate(PROMPTS, CONFIG, method=Guided([guide]), seed=0)


def test_a_guide_on_another_device_is_refused_by_name(monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine.policy, "device", torch.device("cuda", 0))
    with refused(r"models\[0\] is on cpu", "the policy on cuda:0"):
        engine.prepare(Arguments(PROMPTS, CONFIG, dict(method=MIXES["0.7 policy + 0.3 guide"])))


def test_slots_are_those_of_the_tree_that_holds_most():
    """Two prompts and two answers lie in one tree."""
    call = dict(method=Guided([(None, -0.5, without)], weight=1.5), max_new_tokens=8, seed=[1])
    with refused(r"prompts\[0\]", "needs 33 slots", "kv_cache_tokens=32"):
        make_engine(kv_cache_tokens=32).generate([[5, 6, 7]], CONFIG, **call)
    engine = make_engine(kv_cache_tokens=33)
    assert engine.generate([[5, 6, 7]], CONFIG, **call).errors == [None]
