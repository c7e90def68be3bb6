"""Sequential Monte Carlo: unbiased for few particles, and the tilted law of whole texts for many."""

import itertools
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from conftest import refused, tiny_policy, tiny_reward
from oracle import p_value, text
from test_law import RULE, VOCAB
from test_methods import PROMPTS, SEEDS, generate, make_engine
from test_methods_law import assert_law, oracle, run

from stars_fast.methods import ParticleFilter

TEMPERATURE = 1.0
TEXTS = replace(RULE, segment_length=1, max_new_tokens=2)  # 13 of them

pytestmark = pytest.mark.filterwarnings("ignore:method=.* itself")


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(VOCAB, seed=3)


def filtered(method, exact):
    """Every end of a run: ``(probability, estimate of the normalising constant, texts, their shares of the weight)``.

    Of the uniform number, one between each two at which the choice changes stands for all there.
    """
    rule, count = exact.rule, method.particles
    states, ends, chose = {(((),) * count, (0.0,) * count, 1.0): 1.0}, [], Counter()
    while states:
        following = defaultdict(float)
        for (members, weighed, z), p in states.items():
            open_ones = [place for place, y in enumerate(members) if not (y and rule.finished(y))]
            if not open_ones:
                weights = [weight(exact, y, w) for y, w in zip(members, weighed, strict=True)]
                ends.append((p, z * sum(weights) / count, members, [w / sum(weights) for w in weights]))
                continue
            finished = [place for place in range(count) if place not in open_ones]
            drawn = [[(members[i] + s, q) for s, q in exact.candidates(members[i]).items()] for i in open_ones]
            old = [weighed[i] for i in (*finished, *open_ones)]
            for new in itertools.product(*drawn):
                pool = [members[i] for i in finished] + [y for y, _ in new]
                chance = p * math.prod(q for _, q in new)
                weights = [weight(exact, y, w) for y, w in zip(pool, old, strict=True)]
                values = [exact.reward(y) - w for y, w in zip(pool, old, strict=True)]
                steps = [s * count / sum(weights) % 1 for s in itertools.accumulate(weights)]
                for low, high in itertools.pairwise(sorted({0.0, 1.0, *steps})):
                    places = method.select(values, [(low + high) / 2] * count)
                    chose[places is not None] += 1
                    state = tuple(pool), tuple(old), z
                    if places is not None:
                        kept = tuple(pool[place] for place in places)
                        state = kept, tuple(map(exact.reward, kept)), z * sum(weights) / count
                    following[state] += chance * (high - low)
        states = following
    assert min(chose.values()) > 0 and len(chose) == 2, "one of the two branches was never taken"
    return ends


def weight(exact, y, weighed):
    return math.exp((exact.reward(y) - weighed) / TEMPERATURE)


def tilted(exact):
    """The unnormalised target ``pi(y) exp(r(y) / temperature)`` over whole texts."""

    def texts(y=(), p=1.0):
        if y and exact.rule.finished(y):
            yield y, p * math.exp(exact.reward(y) / TEMPERATURE)
            return
        for s, q in exact.candidates(y).items():
            yield from texts(y + s, p * q)

    return dict(texts())


def test_three_particles_are_unbiased_for_the_unnormalised_tilt(policy):
    """``E[Z_hat share(y)] = pi(y) exp(r(y) / T)`` for every text, though the weights decide whether to draw again."""
    exact, estimate = oracle(policy, TEXTS), defaultdict(float)
    for p, z, texts, shares in filtered(ParticleFilter(3, TEMPERATURE, increments=True), exact):
        for y, share in zip(texts, shares, strict=True):
            estimate[y] += p * z * share
    assert dict(estimate) == pytest.approx(tilted(exact), rel=1e-9)


def test_one_particle_is_drawn_by_its_weight(policy):
    method, law = ParticleFilter(3, TEMPERATURE, increments=True), defaultdict(float)
    for p, _, texts, shares in filtered(method, oracle(policy, TEXTS)):
        for y, share in zip(texts, shares, strict=True):
            law[y] += p * share
    assert_law(run(policy, method, TEXTS, samples=800), law)


def test_with_many_particles_whole_texts_follow_the_tilted_law(policy):
    exact = oracle(policy, TEXTS)
    law = tilted(exact)
    law = {y: mass / sum(law.values()) for y, mass in law.items()}
    assert_law(run(policy, ParticleFilter(64, TEMPERATURE, increments=True), TEXTS, samples=150), law)
    few = run(policy, ParticleFilter(2, TEMPERATURE, increments=True), TEXTS, samples=150)
    assert p_value({0: [text(r) for r in few]}, {0: law}) < 1e-3, "150 samples tell nothing"


def test_systematic_resampling_copies_each_particle_as_often_as_it_should():
    method, rng, chosen = ParticleFilter(16, increments=True), random.Random(0), 0
    for _ in range(50):
        shares = [rng.randrange(1, 2000) ** 3 for _ in range(16)]
        expected = [16 * share / sum(shares) for share in shares]
        values = [math.log(share) for share in shares]
        for u in (1e-9, rng.random(), 1 - 1e-9):
            places = method.select(values, [u, *(rng.random() for _ in range(15))])
            if places is not None:
                chosen += 1
                copies = [places.count(place) for place in range(16)]
                assert all(math.floor(e) <= n <= math.ceil(e) for e, n in zip(expected, copies, strict=True))
                assert places == sorted(places) and len(places) == 16
    assert chosen > 50


def test_weights_that_are_alike_are_carried_on_and_so_are_those_rejected_for_good():
    method = ParticleFilter(4, increments=True)
    assert method.select([0.0, 0.1, 0.2, 0.3], [0.5] * 4) is None
    assert method.select([-math.inf] * 4, [0.5] * 4) is None
    assert method.select([-math.inf, 9.0, 0.0, 0.0], [0.5] * 4) == [1, 1, 1, 1]
    assert method.select([math.inf, 9.0, 0.0, 0.0], [0.5] * 4) == [0, 0, 0, 0]  # two rewards too far apart
    assert method.answer([-math.inf, 0.0, -math.inf, -math.inf], 0.01) == 1
    assert {method.answer([-math.inf] * 4, u) for u in (0.1, 0.3, 0.6, 0.9)} == {0, 1, 2, 3}


@pytest.mark.parametrize("limits", [{}, {"max_rows": 3}], ids=str)
def test_weights_carried_on_make_no_text_depend_on_neighbours_or_rows(limits):
    method = ParticleFilter(5, TEMPERATURE, increments=True)
    classifier = tiny_reward(32, hidden=32, scale=3.0)
    together = generate(make_engine(classifier), method)
    engine = make_engine(classifier, **limits)
    alone = [generate(engine, method, [p], [seed]).completions for p, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert list(itertools.chain(*alone)) == together.completions
    assert engine.policy.tree.nodes == 0


def test_an_answer_rejected_for_good_is_not_returned_where_another_is_left(policy):
    out = make_engine(lambda completions: [-math.inf if 1 in y else 0.0 for y in completions]).generate(
        [[5, 6]], method=ParticleFilter(8, increments=True), segment_length=2, max_new_tokens=6, seed=0
    )
    assert out.rewards == [0.0] and 1 not in out.completions[0]


def test_increments_is_true_or_false():
    with refused("particle_filter", "increments='yes'"):
        ParticleFilter(increments="yes")
    assert ParticleFilter(increments=True).to_dict() == {"name": "particle_filter", "increments": True}
