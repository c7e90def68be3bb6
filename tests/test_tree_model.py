"""A model on a tree is the one that the engine was made for."""

import pytest
from conftest import tiny_policy, tiny_reward

from stars_fast import StarsEngine


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_a_model_that_is_another_than_the_engine_was_made_for_is_refused_by_name(role):
    models = dict(policy=tiny_policy(32, hidden=32), reward=tiny_reward(32, hidden=32))
    engine = StarsEngine(**models)
    models[role].bfloat16()
    with pytest.raises(RuntimeError, match=f"the {role} was float32 on cpu, over 32 ids .* and is bfloat16"):
        engine.generate([[5, 6]], target_reward=0.0, max_new_tokens=4)
    models[role].float()
    assert engine.generate([[5, 6]], target_reward=0.0, max_new_tokens=4).errors == [None]
    models["policy"].resize_token_embeddings(16)
    with pytest.raises(RuntimeError, match="over 16 ids"):
        engine.generate([[5, 6]], target_reward=0.0, max_new_tokens=4)
