"""A probe reads what the engine hands on, all rows in one call."""

import pytest
import torch
from torch import nn

from stars_fast.rewards import Completion, HiddenStateProbe, Response, RewardPrompt


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
