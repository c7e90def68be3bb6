"""Packed passes keep to the slots that are free, however much of a response its texts have in common."""

import pytest
import torch
from conftest import tiny_reward

from stars_fast.rewards import Completion, Response, RewardPrompt
from stars_fast.rewards.incremental import Text, TreeCache
from stars_fast.tree.model import TreeModel


def test_texts_that_cut_their_response_short_are_counted_with_what_the_others_then_encode_again():
    """As re-tokenised answers do: one text that departs early makes all of the pass start where it departs."""
    reward = tiny_reward(32)
    cache = TreeCache(TreeModel(reward, reward.model, "reward"))
    prompt = RewardPrompt(0, [1, 2], [1, 2])
    cache.begin({prompt: [1, 2]}, 4, 30, 60)
    response, long = Response(prompt), [1, 2, *range(3, 21)]
    with torch.no_grad():
        first = Completion(response, long[2:])
        list(cache.encode([Text(first, long, [])]))
        cache.commit(first)
        texts = [Text(Completion(response, []), long + [k] * 4, []) for k in (21, 22, 23)]
        texts.append(Text(Completion(response, []), [1, 2, *range(20, 2, -1)], []))
        found = {}
        for rows, features in cache.encode(texts):
            found |= {row.place: feature for row, feature in zip(rows, features, strict=True)}
        for place, text in enumerate(texts):
            whole = reward.model(torch.tensor([text.ids]), use_cache=False).last_hidden_state[0, -1]
            assert found[place].tolist() == pytest.approx(whole.tolist(), abs=1e-4)
    cache.end()
    assert (cache.model.tree.free_slots, cache.model.tree.nodes) == (60, 0)
