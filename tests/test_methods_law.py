"""What each method returns follows its enumerated law, or is what a few plain lines return."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import tiny_policy, tiny_reward
from oracle import Oracle, attempts, classifier_rewards, completions, next_token_probabilities, p_value, text
from test_law import EOS, PROMPT, ROWS, RULE, VOCAB, wave, wave_reward

from stars_fast import StarsEngine
from stars_fast.methods import (
    RSD,
    Args,
    BestOfN,
    BlockwiseBestOfN,
    Cards,
    Mara,
    ParticleFilter,
    PersonaJudge,
    RejectionSampling,
    TreeBoN,
    Vanilla,
)

SAMPLES = 2000
SHORT = replace(RULE, max_new_tokens=4)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(VOCAB, seed=3)


def reward_at(prompt=PROMPT):
    return lambda completion: wave(prompt, completion)


def oracle(policy, rule, prompt=PROMPT, **sampling):
    return Oracle(next_token_probabilities(policy, prompt, rule, **sampling), reward_at(), rule)


def run(policy, method, rule, samples=SAMPLES, **overrides):
    """Runs, each a tuple of (tokens, attempts, accepted)."""
    engine = StarsEngine(policy, wave_reward, max_rows=ROWS)
    out = engine.generate(
        [PROMPT], method=method, seed=0, num_return_sequences=samples, **rule.stars_config() | overrides
    )
    assert out.errors == [None] * samples
    assert out.rewards == pytest.approx([wave(PROMPT, completion) for completion in out.completions], abs=1e-5)
    return [tuple((tuple(s.tokens), s.attempts, s.accepted) for s in segments) for segments in out.segments]


def assert_law(runs, law, view=text):
    assert p_value({0: [view(r) for r in runs]}, {0: law}) > 1e-3


# One answer at a time


def test_vanilla_is_plain_sampling(policy):
    exact = oracle(policy, replace(SHORT, target_reward=-math.inf))
    assert_law(run(policy, Vanilla(), SHORT), exact.law(text))


@pytest.mark.parametrize("candidates", [1, 2, "auto"])
def test_best_of_n_is_the_best_of_n(policy, candidates):
    exact = oracle(policy, replace(SHORT, target_reward=math.inf, max_attempts=3, segment_length=4))
    runs = run(policy, BestOfN(n=3), SHORT, candidates=candidates)
    assert_law(runs, exact.law(text))
    assert {(count, accepted) for r in runs for _, count, accepted in r} == {(3, False)}


@pytest.mark.parametrize("candidates", [1, 3])
def test_rejection_sampling_tests_whole_answers_at_the_target(policy, candidates):
    exact = oracle(policy, replace(SHORT, alpha=1.0, segment_length=4))
    runs = run(policy, RejectionSampling(), SHORT, candidates=candidates)
    assert_law(runs, exact.law(text))
    assert_law(runs, exact.law(attempts), attempts)


def test_blockwise_best_of_n_is_the_best_of_each_round(policy):
    exact = oracle(policy, replace(SHORT, target_reward=math.inf, max_attempts=3))
    assert_law(run(policy, BlockwiseBestOfN(n=3), SHORT), exact.law(text))


@dataclass(frozen=True)
class UncertaintyOracle(Oracle):
    """Segments end before a token whose untempered distribution has ``entropy`` nats, after ``shortest`` tokens."""

    untempered: dict = None
    entropy: float = math.inf
    shortest: int = 1

    def candidates(self, y):
        growing, done = {(): 1.0}, {}
        for _ in range(min(self.rule.segment_length, self.rule.max_new_tokens - len(y))):
            longer = {}
            for s, p in growing.items():
                law = self.untempered[y + s]
                if len(s) >= self.shortest and -(law * np.log(law)).sum() >= self.entropy:
                    done[s] = p
                    continue
                for token, conditional in enumerate(self.probabilities[y + s]):
                    (done if token == EOS else longer)[(*s, token)] = p * float(conditional)
            growing = longer
        return {s: p for s, p in (done | growing).items() if p > 0}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6, "top_k": 3}], ids=str)
@pytest.mark.parametrize("shortest, candidates", [(1, 3), (2, 1)])
def test_cards_segments_end_where_the_policy_is_uncertain(policy, shortest, candidates, sampling):
    rule = replace(RULE, segment_length=3)
    untempered = next_token_probabilities(policy, PROMPT, rule)
    entropies = [-(law * np.log(law)).sum() for law in untempered.values()]
    threshold = float(np.median(entropies))
    probabilities = next_token_probabilities(policy, PROMPT, rule, **sampling)
    exact = UncertaintyOracle(probabilities, reward_at(), rule, untempered, threshold, shortest)
    method = Cards(entropy=threshold, shortest=shortest, longest=3)
    runs = run(policy, method, rule, candidates=candidates, **{"top_k": 0} | sampling)
    assert {len(tokens) for r in runs for tokens, _, _ in r} == {1, 2, 3}
    assert_law(runs, exact.law(text))
    assert_law(runs, exact.law(lambda r: tuple(len(s[0]) for s in r)), lambda r: tuple(len(s[0]) for s in r))


# Populations


def population_law(exact, width, children, select):
    """The final answer's law; ``select(values)`` yields ``(probability, places)``."""
    rule, law = exact.rule, defaultdict(float)
    states = {((),): 1.0}
    while states:
        following = defaultdict(float)
        for members, p in states.items():
            finished = [y for y in members if y and rule.finished(y)]
            live = [y for y in members if not (y and rule.finished(y))]
            if not live:
                law[max(members, key=exact.reward)] += p
                continue
            count = children if live != [()] else width
            per_leaf = [list(exact.candidates(y).items()) for y in live for _ in range(count)]
            parents = [y for y in live for _ in range(count)]
            for drawn in itertools.product(*per_leaf):
                pool = finished + [y + s for y, (s, _) in zip(parents, drawn, strict=True)]
                chance = p * math.prod(probability for _, probability in drawn)
                for q, places in select([exact.reward(y) for y in pool]):
                    following[tuple(pool[place] for place in places)] += chance * q
        states = {tuple(state): p for state, p in following.items()}
    return dict(law)


@pytest.mark.parametrize("particles, temperature, max_new_tokens", [(2, 1.0, 3), (3, 0.5, 2)])
def test_a_particle_filter_resamples_by_the_softmax_of_rewards(policy, particles, temperature, max_new_tokens):
    rule = replace(SHORT, segment_length=1, max_new_tokens=max_new_tokens)

    def resample(values):
        weights = np.exp(np.array(values) / temperature)
        weights /= weights.sum()
        for places in itertools.product(range(len(values)), repeat=particles):
            yield float(np.prod(weights[list(places)])), sorted(places)

    law = population_law(oracle(policy, rule), particles, 1, resample)
    runs = run(policy, ParticleFilter(particles=particles, temperature=temperature), rule)
    assert_law(runs, law)


@pytest.mark.parametrize("n, branching, layers", [(2, 2, 3), (4, 2, 2)])
def test_treebon_keeps_the_best_leaves_of_each_layer(policy, n, branching, layers):
    rule = replace(SHORT, segment_length=1, max_new_tokens=layers)

    def best(values):
        yield 1.0, sorted(sorted(range(len(values)), key=lambda i: -values[i])[: n // branching])

    law = population_law(oracle(policy, rule), n, branching, best)
    assert_law(run(policy, TreeBoN(n=n, branching=branching, layers=layers), rule), law)


# Two proposers


@pytest.mark.parametrize("segment_length, sampling", [(2, {}), (3, {"temperature": 0.7}), (1, {"top_k": 3})])
def test_rsd_keeps_good_drafts_and_lets_the_policy_write_the_others(policy, segment_length, sampling):
    draft, rule, threshold = tiny_policy(VOCAB, seed=8), replace(SHORT, segment_length=segment_length), 0.3
    ours, drafts = (oracle(model, rule, **sampling) for model in (policy, draft))

    def law(y=()):
        if y and rule.finished(y):
            return {y: 1.0}
        step = defaultdict(float)
        rejected = 0.0
        for s, p in drafts.candidates(y).items():
            if wave(PROMPT, y + s) >= threshold:
                step[s] += p
            else:
                rejected += p
        for s, p in ours.candidates(y).items():
            step[s] += rejected * p
        whole = defaultdict(float)
        for s, p in step.items():
            for z, q in law(y + s).items():
                whole[z] += p * q
        return whole

    method = RSD(draft=draft, threshold=threshold, delimiter=None, longest=segment_length)
    runs = run(policy, method, rule, **sampling)
    assert {(count, accepted) for r in runs for _, count, accepted in r} == {(1, True), (2, False)}
    assert_law(runs, law())


@pytest.mark.parametrize("block, sampling", [(1, {}), (3, {}), (4, {"temperature": 0.7, "top_k": 3})], ids=str)
def test_persona_judge_samples_the_judge_whatever_the_draft(policy, block, sampling):
    judge, drafting = [2, 0], [1]
    rule = replace(SHORT, target_reward=-math.inf)
    exact = Oracle(next_token_probabilities(policy, judge + PROMPT, rule, **sampling), reward_at(), rule)
    other = Oracle(next_token_probabilities(policy, drafting + PROMPT, rule, **sampling), reward_at(), rule)
    method = PersonaJudge(draft_prompt=drafting, judge_prompt=judge, block=block)
    runs = run(policy, method, SHORT, samples=SAMPLES, **sampling)
    assert_law(runs, exact.law(text))
    assert p_value({0: [text(r) for r in runs]}, {0: other.law(text)}) < 1e-3, "the two prompts could be mixed up"


# Tokens that are looked at rather than drawn


def plain_logits(policy, ids):
    return policy(torch.tensor([ids]), use_cache=False).logits[0, -1]


@torch.no_grad()
def plain_args(policy, reward, prompt, top_k, weight, max_new_tokens):
    y = ()
    while len(y) < max_new_tokens and y[-1:] != (EOS,):
        top = plain_logits(policy, [*prompt, *y]).log_softmax(0).topk(top_k)
        scores = [p + weight * reward[(*y, v)] for p, v in zip(*map(torch.Tensor.tolist, top), strict=True)]
        y += (top.indices[int(np.argmax(scores))].item(),)
    return list(y)


@pytest.mark.parametrize("top_k, weight", [(4, 1.5), (2, 0.5), (3, 0.0)])
def test_args_takes_the_token_with_the_best_sum(policy, top_k, weight):
    classifier, prompts = tiny_reward(VOCAB, seed=2), [[0], [1, 2], [2, 1, 1]]
    out = StarsEngine(policy, classifier).generate(
        prompts, method=Args(top_k=top_k, weight=weight), max_new_tokens=6, seed=0
    )
    for prompt, completion in zip(prompts, out.completions, strict=True):
        rewards = classifier_rewards(classifier, prompt, completions(VOCAB, EOS, 6))
        assert completion == plain_args(policy, rewards, prompt, top_k, weight, 6)
    assert out.stats["policy_tokens"] == top_k * out.stats["committed_tokens"]


def test_args_with_a_temperature_draws_from_the_softmax_of_the_sums(policy):
    classifier, weight, temperature = tiny_reward(VOCAB, seed=2), 1.5, 0.8
    rewards = classifier_rewards(classifier, PROMPT, completions(VOCAB, EOS, 2))
    probabilities = next_token_probabilities(policy, PROMPT, replace(RULE, max_new_tokens=2))

    def law(y=()):
        if len(y) == 2 or y[-1:] == (EOS,):
            return {y: 1.0}
        scores = np.log(probabilities[y]) + weight * np.array([rewards[(*y, v)] for v in range(VOCAB)])
        step = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
        return {z: step[v] * q for v in range(VOCAB) for z, q in law((*y, v)).items()}

    out = StarsEngine(policy, classifier, max_rows=ROWS).generate(
        [PROMPT],
        method=Args(weight=weight, temperature=temperature),
        max_new_tokens=2,
        seed=1,
        num_return_sequences=SAMPLES,
    )
    assert p_value({0: [tuple(c) for c in out.completions]}, {0: law()}) > 1e-3


@torch.no_grad()
def plain_mara(policy, mlp, prompt, top_k, top_p, temperature, max_new_tokens):
    y = []
    while len(y) < max_new_tokens and y[-1:] != [EOS]:
        law = (plain_logits(policy, prompt + y) / temperature).softmax(0).sort(descending=True)
        chosen, mass = law.indices[0].item(), 0.0
        for p, token in list(zip(law.values.tolist(), law.indices.tolist(), strict=True))[:top_k]:
            if mass / law.values[:top_k].sum() >= top_p:
                break
            mass += p
            hidden = policy.model(torch.tensor([[*prompt, *y, token]]), use_cache=False).last_hidden_state[0, -1]
            reject, accept = mlp(hidden[None])[0].tolist()
            if accept > reject:
                chosen = token
                break
        y.append(chosen)
    return y


@pytest.mark.parametrize("candidates", [1, 2, "auto"])
def test_mara_takes_the_likeliest_token_that_the_network_accepts(policy, candidates):
    mlp = torch.nn.Linear(16, 2)  # rejects most tokens, by two coordinates of the hidden state
    with torch.no_grad():
        mlp.weight.copy_(torch.eye(2, 16))
        mlp.bias.copy_(torch.tensor([2.0, 0.0]))
    prompts = [[0], [1, 2], [2, 1, 1], [0, 2]]
    out = StarsEngine(policy, lambda completions: [0.0] * len(completions)).generate(
        prompts, method=Mara(mlp=mlp, top_p=0.99), max_new_tokens=8, seed=0, candidates=candidates
    )
    ranks = [segment.attempts for segments in out.segments for segment in segments]
    assert min(ranks) == 1 < max(ranks) and not all(s.accepted for segments in out.segments for s in segments)
    for prompt, completion in zip(prompts, out.completions, strict=True):
        assert completion == plain_mara(policy, mlp, prompt, 40, 0.99, 0.8, 8)


def test_a_network_with_dropout_is_asked_without_and_left_as_it_was(policy):
    torch.manual_seed(0)
    plain = torch.nn.Linear(policy.config.hidden_size, 2)
    dropping = torch.nn.Sequential(torch.nn.Dropout(0.9), plain).train()
    texts = [run(policy, Mara(mlp=mlp, top_k=4), SHORT, samples=1) for mlp in (plain, dropping)]
    assert texts[0] == texts[1] and dropping.training and dropping[0].training
