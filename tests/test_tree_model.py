"""A model on a tree is the one that the engine was made for."""

import pytest
from conftest import tiny_policy, tiny_reward

from stars_fast import StarsEngine
from stars_fast.tree import attention, model
from stars_fast.tree.slots import SlotPool


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


def test_a_pool_that_the_device_has_no_room_for_is_named_with_its_size(monkeypatch):
    engine = StarsEngine(tiny_policy(32), tiny_reward(32), kv_cache_tokens=2**20)

    class Refusing(SlotPool):
        def __init__(self, shapes, slots, *args):
            if slots > 2**20:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 67108864 bytes")
            super().__init__(shapes, slots, *args)

    monkeypatch.setattr(model, "SlotPool", Refusing)
    with pytest.raises(
        MemoryError, match=r"1048576 slots of the policy take 0\.1 GiB, .*cpu .* smaller kv_cache_tokens"
    ):
        engine.generate([[1]], max_new_tokens=4, target_reward=0.0)
    monkeypatch.undo()
    assert engine.generate([[1]], max_new_tokens=4, target_reward=0.0).errors == [None]


def test_the_layers_of_a_pass_work_out_once_which_program_has_what(monkeypatch):
    engine, asked, passes = StarsEngine(tiny_policy(32), tiny_reward(32)), [], []  # of two layers each
    forward = model.TreeModel.forward
    monkeypatch.setattr(attention, "tree_work", lambda q, *_: asked.append(q.shape[0]))
    monkeypatch.setattr(
        model.TreeModel, "forward", lambda *args, **kw: (passes.append(len(args[1])), forward(*args, **kw))[1]
    )
    assert engine.generate([[4, 5, 6]], target_reward=0.0, max_new_tokens=4).errors == [None]
    assert asked == passes and 3 in passes
