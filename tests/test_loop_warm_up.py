"""How many graphs a call asks for, counted with stand-ins for them, and what is made before the first."""

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward, word_reward

from benchmarks.micro.shapes import as_on_a_gpu, counting, stand_ins
from stars_fast import AsyncStarsEngine, StarsConfig, StarsEngine
from stars_fast.policy.steps import Shape, Steps
from stars_fast.tree.graphs import Captured
from stars_fast.tree.passes import Pass, PassShape

VOCAB = 32
CONFIG = StarsConfig(
    segment_length=16, max_new_tokens=32, ignore_eos=True, target_reward=0.0, beta=1.0, alpha=1.0, candidates=3
)


@pytest.fixture
def engine(monkeypatch):
    with stand_ins():
        models = tiny_policy(VOCAB, layers=1), tiny_reward(VOCAB, layers=1)
        yield as_on_a_gpu(StarsEngine(*models, max_rows=256, kv_cache_tokens=20_000))


def prompts(count, length=24):
    return [[(i * j + j) % VOCAB for j in range(length)] for i in range(count)]


def test_a_call_meets_few_shapes_and_launches_none(engine):
    with counting() as first:
        engine.generate(prompts(64), CONFIG, seed=0)
    decode = {shape for _, shape in first.shapes if isinstance(shape, Shape)}
    assert first.launched == 0
    assert first.graphs == len(first.shapes) <= 14
    assert len(decode) <= 5
    with counting() as later:
        engine.generate(prompts(64), CONFIG, seed=1)
    assert later.launched == 0
    assert first.graphs + later.graphs == len(first.shapes | later.shapes) <= 18


def test_steady_heartbeats_have_one_decode_step_and_one_extension(engine):
    with counting() as counted:
        engine.generate(prompts(64), CONFIG, seed=0, target_reward=-9.0)  # all are accepted at once
    assert {shape[:3] for _, shape in counted.shapes if isinstance(shape, Shape)} == {(192, 64, 4)}
    assert {shape[:5] for role, shape in counted.shapes if role == "policy" and isinstance(shape, PassShape)} == {
        (64, 64, 64, 1, 1)
    }
    assert counted.graphs == len(counted.shapes) == 3  # with what the first prompts that end alike leave to be read


def test_prompts_let_in_a_few_at_a_time_share_their_shapes(engine):
    with counting() as counted:
        for count, length in ((1, 20), (2, 30), (3, 50), (5, 40), (7, 33), (9, 60), (6, 120)):
            engine.generate(prompts(count, length), CONFIG, seed=0, max_new_tokens=1)
    read = {shape for role, shape in counted.shapes if role == "policy" and shape.most_queries > 1}
    assert {shape.tokens for shape in read} <= {64, 128, 192, 256, 512, 768}
    assert len(read) <= 6 and counted.launched == 0


@pytest.mark.parametrize(("requests", "candidates"), [(64, 3), (64, "auto"), (1, "auto")])
def test_a_warm_engine_makes_no_graph_in_its_first_call(engine, requests, candidates):
    config = CONFIG.replace(candidates=candidates)
    with counting() as before:
        told = engine.warm_up(config, requests=requests, max_model_len=200)
    assert told.graphs == before.graphs > 20 and not told.remark
    assert engine.warm_up(config, requests=requests, max_model_len=200).graphs == 0
    with counting() as counted:
        engine.generate(prompts(requests), config, seed=0)
    assert counted.runs and counted.launched == 0
    assert counted.graphs <= (0 if candidates == 3 else 2)  # acceptance differs from request to request


def test_warming_up_leaves_nothing_in_the_trees_and_where_rounding_is_the_same_no_other_text(engine):
    plain = StarsEngine(engine.policy.model, engine.reward.model, max_rows=256, kv_cache_tokens=20_000)
    expected = plain.generate(prompts(5), CONFIG, seed=3)
    engine.warm_up(CONFIG, requests=5, max_model_len=100)
    assert engine.core.loop is None
    assert engine.policy.tree.free_slots == engine.policy.tree.capacity - 1  # slot 0 is nobody's
    assert engine.generate(prompts(5), CONFIG, seed=3).completions == expected.completions


def test_the_selection_is_compiled_before_the_first_call(engine, monkeypatch):
    asked = []
    monkeypatch.setattr("stars_fast.loop.warm_up.select_and_commit", lambda *arguments: asked.append(len(arguments)))
    engine.warm_up(CONFIG, requests=1, max_model_len=100)
    assert asked == [18]


def test_an_engine_that_is_held_open_is_warmed_up_in_its_own_room(engine):
    served = AsyncStarsEngine(engine, max_model_len=128)
    try:
        engine.warm_up(CONFIG, requests=2)
        kept = engine.policy.graphs._kept.keys()
        assert {shape.trunk for shape in kept} == {256}
        assert {shape.length for shape in kept if isinstance(shape, Shape)} == {32}
        assert engine.core.loop is not None
    finally:
        served.close()


def test_scorers_are_not_asked():
    def never(**_):
        raise AssertionError("asked")

    with stand_ins():
        engine = as_on_a_gpu(StarsEngine(tiny_policy(VOCAB, hidden=32), never, kv_cache_tokens=4_000))
        assert engine.warm_up(CONFIG, requests=2, max_model_len=100).graphs > 0


@pytest.mark.parametrize("scorer", [sum_reward, word_reward])
def test_nothing_is_done_where_there_are_no_graphs(scorer):
    engine = StarsEngine(tiny_policy(VOCAB), sum_reward)
    told = engine.warm_up(progress=True)
    assert told == (0, 0.0, "nothing was captured: the policy is on cpu")
    assert not engine.policy.graphs._kept


@pytest.mark.parametrize("lacking", [Pass, Steps])
def test_what_memory_is_short_of_is_launched_and_all_else_stays_captured(engine, monkeypatch, lacking):
    capture, refused = Captured.capture, []

    def capturing(work, *where):
        if type(work) is lacking and (work.model.role, work.shape) not in refused and len(refused) < 2:
            refused.append((work.model.role, work.shape))
            raise torch.OutOfMemoryError("no room")
        capture(work, *where)

    plain = StarsEngine(engine.policy.model, engine.reward.model, max_rows=256, kv_cache_tokens=20_000)
    expected = plain.generate(prompts(64), CONFIG, seed=0)
    monkeypatch.setattr(Captured, "capture", capturing)
    with counting() as counted, pytest.warns(UserWarning, match="no memory for a CUDA graph of .*no room"):
        told = engine.warm_up(CONFIG, requests=64, max_model_len=200)
    models = (engine.policy, *engine.reward.tree_models)
    assert told.graphs == counted.graphs == sum(model.graphs.captured for model in models) > 40
    assert told.remark.startswith("memory is short") and "no room" in told.remark
    with counting() as later:
        assert engine.generate(prompts(64), CONFIG, seed=0).completions == expected.completions
    assert later.graphs == 0, "nothing runs out of memory again"
    assert {(run.role, run.shape) for run in later.runs if run.launched} <= set(refused)


def test_a_decode_step_that_cannot_be_captured_keeps_its_rows(engine, monkeypatch):
    def capturing(work, *_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Captured, "capture", capturing)
    with counting() as counted, pytest.warns(UserWarning, match="launched one by one"):
        engine.generate(prompts(8), CONFIG, seed=0)
    assert engine.core.max_rows == 256
    assert counted.graphs == 0 and {run.launched for run in counted.runs} == {True}
    assert len(engine.policy.graphs.unaffordable) == len({shape for role, shape in counted.shapes if role == "policy"})


def test_arguments_are_checked(engine):
    with pytest.raises(ValueError, match="requests=0"):
        engine.warm_up(requests=0)
    with pytest.raises(ValueError, match="max_model_len=1"):
        engine.warm_up(max_model_len=1)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.warm_up()
