"""A probe reads what the engine hands on, all rows in one call."""

import pytest
import torch
from conftest import tiny_reward
from histories import assert_engine_agrees
from torch import nn

from stars_fast import StarsConfig, StarsEngine
from stars_fast.methods.stars import base_reward, threshold
from stars_fast.rewards import (
    ClassifierReward,
    Completion,
    HiddenStateProbe,
    Response,
    RewardPrompt,
    RuleReward,
    WeightedSum,
)

PROMPTS = [[5, 6, 7, 8, 9], [12]]
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=0.5, beta=0.3, max_new_tokens=12)


def completions(count, width=8):
    response = Response(RewardPrompt(0, [1], [1]))
    states = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return [Completion(response, [i], hidden=state) for i, state in enumerate(states)], states


class Network(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, outputs))
        self.calls = 0

    def forward(self, hidden):
        self.calls += 1
        return self.layers(hidden)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_value_is_the_reward_and_two_are_logits(outputs, dtype):
    network = Network(outputs).to(dtype)
    batch, states = completions(5)
    scorer = HiddenStateProbe(network)
    assert scorer.needs_hidden_state and scorer.partial and network.training
    with torch.no_grad():
        scorer.begin([], 8, 8, None)
        values = scorer.score(batch)
        assert network.calls == 1
        wanted = network.layers(states.to(dtype))  # in eval mode: dropout would move it
        scorer.end()
    wanted = wanted[:, 0] if outputs == 1 else wanted.log_softmax(-1).diff()[:, 0]
    assert values == pytest.approx(wanted.tolist(), abs=1e-5)
    assert network.training


def test_what_is_missing_is_said():
    batch, _ = completions(2)
    batch[1].hidden = None
    with pytest.raises(ValueError, match=r"Completion.hidden is None.*needs_hidden_state"):
        HiddenStateProbe(Network(1)).score(batch)
    with pytest.raises(ValueError, match=r"the probe gave \[2, 3\] for 2 rows"):
        HiddenStateProbe(Network(3)).score(completions(2)[0])


@pytest.fixture
def linear():
    """A probe of the tiny policies' width."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(32, 1)


@torch.no_grad()
def probed(policy, linear, ids):
    """By a plain pass of the policy."""
    return linear(policy.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]).item()


def test_a_probe_guides_the_engine_towards_a_target(policy32, linear):
    """The empty answer is scored, too, for the base reward: of the policy's state at the prompt's end."""
    engine = StarsEngine(policy32, HiddenStateProbe(linear))

    def expected(i, tokens, ends, eos):
        return probed(policy32, linear, PROMPTS[i] + tokens)

    out = assert_engine_agrees(engine, PROMPTS, CONFIG, expected, num_return_sequences=3)
    assert any(segment.attempts > 1 for row in out.segments for segment in row)
    for row, segments in enumerate(out.segments):
        if len(segments) > 1:
            base = base_reward(expected(row // 3, [], [], False), 0.5, CONFIG.alpha)
            wanted = threshold(len(segments[0].tokens), CONFIG.max_new_tokens, base, 0.5)
            assert segments[0].threshold == pytest.approx(wanted, abs=1e-4)
    assert any(segments[0].threshold < 0.45 for segments in out.segments), "r(x) made no difference"


def test_a_probe_in_a_sum_leaves_its_value_in_the_trace(policy32, linear):
    classifier = tiny_reward(32, hidden=32)
    parts = {"state": (0.7, HiddenStateProbe(linear)), "liked": (0.3, ClassifierReward(classifier))}
    short = RuleReward(predicates={len: 1.0})
    engine = StarsEngine(policy32, WeightedSum(parts | {"length": (0.0, short)}))

    @torch.no_grad()
    def values(i, tokens):
        ids = PROMPTS[i] + tokens
        liked = classifier(torch.tensor([ids])).logits.item() if len(ids) else 0.0
        return {"state": probed(policy32, linear, ids), "liked": liked, "length": float(len(tokens))}

    def expected(i, tokens, ends, eos):
        found = values(i, tokens)
        return 0.7 * found["state"] + 0.3 * found["liked"]

    out = assert_engine_agrees(engine, PROMPTS, CONFIG, expected)
    for i, segments in enumerate(out.segments):
        tokens = []
        for segment in segments:
            tokens += segment.tokens
            assert segment.parts == pytest.approx(values(i, tokens), abs=1e-4)


def test_a_probe_serves_two_calls_at_once_and_names_the_width_it_cannot_read(policy32, linear):
    network = Network(1)
    scorer = HiddenStateProbe(network)
    scorer.begin([], 8, 8, None)
    scorer.begin([], 8, 8, None)
    scorer.end()
    assert not network.training, "the other call still runs"
    scorer.end()
    assert network.training
    with pytest.raises(ValueError, match=r"does not take \[2, 5\].*hidden_size=5"):
        scorer.score(completions(2, width=5)[0])


@pytest.mark.parametrize(
    "probe, said",
    [(torch.nn.Linear(5, 1), r"does not take \[1, 32\].*hidden_size=32"), (torch.nn.Linear(32, 3), r"gave \[1, 3\]")],
    ids=["width", "outputs"],
)
def test_a_probe_that_does_not_read_the_policys_hidden_state_is_refused_by_the_engine(policy32, probe, said):
    for reward in (HiddenStateProbe(probe), WeightedSum({"probe": (1.0, HiddenStateProbe(probe))})):
        with pytest.raises(ValueError, match=said):
            StarsEngine(policy32, reward)
