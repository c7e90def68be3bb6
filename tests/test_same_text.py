"""The same seed gives the same tokens, whatever is drawn side by side, batched, or short of memory (float32, CPU).

Rounding differs between batch shapes, so one flip in a hundred texts is tolerated; a fault changes most of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward

from stars_fast import StarsConfig, StarsEngine

VOCAB = 32
PROMPTS = [[(5 * i + j * j) % (VOCAB - 1) for j in range(1 + i % 7)] for i in range(16)]
SEEDS = [100 + 7 * i for i in range(16)]
FILTERED = dict(top_k=12, top_p=0.95, min_p=0.01, repetition_penalty=1.1, temperature=1.3)
SHORT = dict(candidates=3, max_new_tokens=9, **FILTERED)  # for the interpreter, which is slow
CONFIG = StarsConfig(segment_length=4, max_attempts=6, target_reward=1.5, beta=0.6, max_new_tokens=18)


def reward_of(kind):
    return sum_reward if kind == "callable" else tiny_reward(VOCAB, hidden=32)


def generate(
    kind="classifier", prompts=PROMPTS, seed=SEEDS, max_rows=1024, kv_cache_tokens=None, padded=False, **overrides
):
    policy = tiny_policy(VOCAB, hidden=32)
    engine = StarsEngine(policy, reward_of(kind), max_rows=max_rows, kv_cache_tokens=kv_cache_tokens)
    for tree in (engine.policy, *engine.reward.tree_models):
        tree.graphs.enabled = padded
    return engine.generate(prompts, CONFIG, seed=seed, **overrides)


@pytest.fixture(scope="module", params=["classifier", "callable"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def one_at_a_time(kind):
    """Four texts a prompt by the one-at-a-time algorithm; it must have something to reject and to fall back on."""
    out = generate(kind, candidates=1, num_return_sequences=4)
    segments = [segment for row in out.segments for segment in row]
    assert sum(not s.accepted for s in segments) > 5
    assert sum(s.attempts > 1 for s in segments) > len(segments) / 4
    assert len({tuple(c) for c in out.completions}) > 50
    assert {"stop", "length"} <= set(out.finish_reasons)
    return out


def flips(one, other) -> int:
    assert len(one) == len(other)
    return sum(a != b for a, b in zip(one, other, strict=True))


def of_each(out, samples):
    """The first few of the four texts of every prompt."""
    return [completion for i in range(16) for completion in out.completions[4 * i : 4 * i + samples]]


@pytest.mark.parametrize("candidates", [2, 8, "auto"])
def test_candidates_side_by_side_do_not_change_the_text(kind, one_at_a_time, candidates):
    out = generate(kind, candidates=candidates, num_return_sequences=4)
    assert flips(one_at_a_time.completions, out.completions) <= 1
    if candidates != "auto":  # it needs no further candidates in a batch of 64; test_prompts_alone... uses some
        assert out.stats["discarded_tokens"] > 1.1 * one_at_a_time.stats["discarded_tokens"]


def test_prompts_alone_and_together_give_the_same_text(kind, one_at_a_time):
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), reward_of(kind))
    outs = [
        engine.generate([prompt], CONFIG, seed=[seed], num_return_sequences=4)
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    alone = [completion for out in outs for completion in out.completions]
    assert sum(out.stats["discarded_tokens"] for out in outs) > 1.1 * one_at_a_time.stats["discarded_tokens"]
    assert flips(one_at_a_time.completions, alone) <= 1


def test_the_order_of_the_prompts_does_not_matter(kind, one_at_a_time):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    out = generate(kind, [PROMPTS[i] for i in order], [SEEDS[i] for i in order], num_return_sequences=4)
    expected = [completion for i in order for completion in one_at_a_time.completions[4 * i : 4 * i + 4]]
    assert flips(expected, out.completions) <= 1


def test_more_samples_leave_the_first_ones_as_they_are(kind, one_at_a_time):
    out = generate(kind, num_return_sequences=2)
    assert flips(of_each(one_at_a_time, 2), out.completions) <= 1


@pytest.mark.parametrize("max_rows", [1, 3])
def test_the_number_of_rows_does_not_change_the_text(kind, one_at_a_time, max_rows):
    out = generate(kind, max_rows=max_rows, num_return_sequences=2)
    assert flips(of_each(one_at_a_time, 2), out.completions) <= 1


def test_a_scheduler_that_changes_its_mind_does_not_change_the_text(kind, one_at_a_time, fickle):
    out = generate(kind, num_return_sequences=4)
    assert flips(one_at_a_time.completions, out.completions) <= 1
    assert out.stats["discarded_tokens"] > 1.1 * one_at_a_time.stats["discarded_tokens"]
    assert len(set(out.stats["rows"])) > 5


@pytest.mark.parametrize(("kv_cache_tokens", "candidates"), [(48, 4), (48, "auto"), (100, 4), (400, "auto")])
def test_scarce_slots_do_not_change_the_text(kind, one_at_a_time, kv_cache_tokens, candidates):
    out = generate(kind, kv_cache_tokens=kv_cache_tokens, candidates=candidates, num_return_sequences=4)
    assert out.errors == [None] * 64
    assert flips(one_at_a_time.completions, out.completions) <= 1


@pytest.mark.parametrize("overrides", [{}, dict(candidates=3), dict(candidates=3, **FILTERED)], ids=str)
def test_rows_padded_for_graphs_do_not_change_the_text(kind, overrides):
    prompts, seeds = PROMPTS[:11], SEEDS[:11]
    plain, padded = (generate(kind, prompts, seeds, padded=padded, **overrides) for padded in (False, True))
    assert flips(plain.completions, padded.completions) <= 1


def test_a_second_thread_does_not_change_the_text(kind, one_at_a_time):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        out = generate(kind, num_return_sequences=4)
    finally:
        torch.set_num_threads(before)
    assert flips(one_at_a_time.completions, out.completions) <= 1


@pytest.mark.parametrize("kernels", ["reference", "interpret"])
def test_the_text_is_the_same_on_every_set_of_kernels(kernels):
    """Of a policy and a reward that both run on them."""
    if kernels == "interpret":
        pytest.importorskip("triton", minversion="3.7", reason="the interpreter of older ones fails on NumPy 2.4")
    prompts, seeds = PROMPTS[:2], SEEDS[:2]
    program = (
        "import json, torch, test_same_text as t; torch.set_num_threads(1);"
        f"print(json.dumps(t.generate('classifier', {prompts}, {seeds}, **t.SHORT).completions))"
    )
    environment = os.environ | {
        "STARS_FAST_KERNELS": kernels,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    native = generate("classifier", prompts, seeds, **SHORT).completions
    assert json.loads(done.stdout.splitlines()[-1]) == native
    assert len({tuple(completion) for completion in native}) == 2


def test_one_engine_gives_the_same_text_again_and_sees_new_weights(kind):
    policy = tiny_policy(VOCAB, hidden=32)
    engine = StarsEngine(policy, reward_of(kind))
    first = engine.generate(PROMPTS, CONFIG, seed=SEEDS).completions
    assert engine.generate(PROMPTS, CONFIG, seed=SEEDS).completions == first
    policy.load_state_dict(tiny_policy(VOCAB, hidden=32, seed=9).state_dict())
    changed = engine.generate(PROMPTS, CONFIG, seed=SEEDS).completions
    fresh = StarsEngine(policy, reward_of(kind)).generate(PROMPTS, CONFIG, seed=SEEDS).completions
    assert changed == fresh
    assert flips(first, changed) > 12
