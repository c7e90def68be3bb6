"""The engine on a GPU: its law holds, and every way of running it gives the CPU's texts."""

import copy

import pytest
import test_methods
import torch
from conftest import sum_reward, tiny_policy, tiny_reward
from test_law import PROMPT, PROMPTS, SAMPLES, VOCAB, oracle, p_attempts, p_text, run, wave_reward
from test_methods import EVERY
from test_models_as_users_have_them import LORA, lora
from test_same_text import CONFIG, FILTERED, SEEDS, flips
from test_same_text import PROMPTS as TEXTS
from test_tree_media import draws_behind_pictures
from tiny_vision import family_model
from transformers import LogitsProcessor, LogitsProcessorList

import stars_fast
from stars_fast import StarsEngine
from stars_fast.loop import selection
from stars_fast.loop.queue import Queue
from stars_fast.methods import Cards, Guided
from stars_fast.policy.mixed import MixedSteps
from stars_fast.policy.policy import Policy
from stars_fast.policy.steps import Steps
from stars_fast.tree import prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error:.*captured in a CUDA graph", "error:.*do not compile", "error:.*else compiled"),
]
DEVICE = "cuda"
EAGER = dict(cuda_graphs=False, torch_compile=False)
CAPTURED, COMPILED = dict(torch_compile=False), dict(torch_compile=True)
WAYS = {"eager": EAGER, "captured": CAPTURED}


def make_engine(device=DEVICE, reward="classifier", dtype=torch.float32, **limits):
    policy = tiny_policy(32, hidden=32).to(device, dtype)
    scorer = tiny_reward(32, hidden=32).to(device, dtype) if reward == "classifier" else reward
    return StarsEngine(policy, scorer, **limits)


def texts(engine, **overrides):
    out = engine.generate(TEXTS, CONFIG, seed=SEEDS, **({"candidates": 3} | overrides))
    assert set(out.errors) == {None}
    return out.completions


# The law


@pytest.mark.parametrize("candidates", [1, 4])
def test_the_law_holds(candidates):
    policy = tiny_policy(VOCAB, seed=3)
    runs = run(tiny_policy(VOCAB, seed=3).to(DEVICE), wave_reward, [PROMPT], SAMPLES, candidates=candidates)
    oracles = {0: oracle(policy, PROMPT)}
    assert p_text(runs, oracles) > 1e-3
    assert p_attempts(runs, oracles) > 1e-3


def test_the_law_holds_with_a_classifier_as_reward():
    policy, classifier = tiny_policy(VOCAB, seed=3), tiny_reward(VOCAB, seed=2)
    oracles = {i: oracle(policy, prompt, classifier=classifier) for i, prompt in enumerate(PROMPTS)}
    runs = run(policy.to(DEVICE), classifier.to(DEVICE), PROMPTS, SAMPLES // 4, candidates=3)
    assert p_text(runs, oracles) > 1e-3
    assert p_attempts(runs, oracles) > 1e-3


# The same texts


@pytest.mark.parametrize(
    "overrides",
    [{}, dict(candidates=1), dict(candidates="auto"), FILTERED, dict(method=Cards(entropy=2.0, shortest=2, longest=6))],
    ids=lambda overrides: "-".join(overrides) or "plain",
)
@pytest.mark.parametrize("way", WAYS)
def test_float32_texts_are_those_of_the_cpu(way, overrides):
    engine = make_engine(**WAYS[way])
    assert flips(texts(make_engine("cpu"), **overrides), texts(engine, **overrides)) <= 1
    assert (engine.policy.graphs.made > 0) == (way == "captured")


def test_compiled_layers_give_the_texts_of_the_cpu():
    engine = make_engine(**COMPILED)
    assert flips(texts(make_engine("cpu")), texts(engine)) <= 1
    assert engine.policy.graphs.made > 0 and engine.policy.torch_compile
    assert engine.policy._compiled._compared, "with launched ones, before they were captured"


def test_layers_that_compute_something_else_compiled_run_without(monkeypatch):
    """Code that leaves a quarter of its output out, as a fault of a compiler may."""
    look_up = torch._dynamo.lookup_backend

    def faulty(module, inputs, **options):
        right = look_up("inductor")(module, inputs, **options)
        return lambda *arguments: tuple(0.75 * output for output in right(*arguments))

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: faulty)
    engine = make_engine(**COMPILED)
    try:
        with pytest.warns(UserWarning, match="compute something else compiled"):
            there = texts(engine)
    finally:
        torch._dynamo.reset()
    assert flips(texts(make_engine("cpu")), there) <= 1
    assert engine.policy.graphs.made > 0 and not engine.policy.torch_compile


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EVERY)
def test_every_method_gives_the_texts_of_the_cpu(name, way):
    method = copy.deepcopy(EVERY[name])
    for part in ("draft", "mlp"):
        if hasattr(method, part):
            getattr(method, part).to(DEVICE)
    engine = make_engine(**WAYS[way])
    there = test_methods.generate(engine, method)
    here = test_methods.generate(make_engine("cpu"), EVERY[name])
    assert there.errors == here.errors == [None] * 6
    assert flips(here.completions, there.completions) <= 1
    test_methods.assert_all_free(engine)


@pytest.mark.parametrize("way", WAYS | {"compiled": COMPILED})
def test_mixes_give_the_texts_of_the_cpu(way):
    """A guide with a tree of its own, and the policy under another prompt: one graph holds all of a step."""

    def mix(device):
        return Guided([(tiny_policy(32, hidden=32, seed=7).to(device), 0.5), (None, -0.3, lambda ids: [3, 4, *ids])])

    engine = make_engine(**(WAYS | {"compiled": COMPILED})[way])
    here, there = (texts(one, method=mix(one.policy.device)) for one in (make_engine("cpu"), engine))
    assert flips(here, there) <= 1
    mixed = [work for work in engine.policy.graphs._kept.values() if isinstance(work, MixedSteps)]
    assert bool(mixed) == any(work.graph is not None for work in mixed) == (way != "eager")


@pytest.mark.parametrize("way", WAYS | {"compiled": COMPILED})
def test_texts_behind_pictures_are_those_of_the_cpu(way):
    """Prompts whose positions are off by different numbers lie in one plan, and in one graph."""
    policy = Policy(copy.deepcopy(family_model("qwen2_5_vl")).to(DEVICE), **(WAYS | {"compiled": COMPILED})[way])
    (tokens, logprobs), (there, close) = (
        draws_behind_pictures(Policy(family_model("qwen2_5_vl"))),
        draws_behind_pictures(policy),
    )
    assert flips(tokens, there) <= 1
    if tokens == there:
        torch.testing.assert_close(close, logprobs, atol=1e-3, rtol=0)
    assert (policy.graphs.made > 0) == (way != "eager")


@pytest.mark.parametrize("overrides", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_fresh_texts_read_through_a_library_give_the_numbers_of_plain_passes(overrides, monkeypatch):
    served, chosen = [], prefill.chosen
    monkeypatch.setattr(prefill, "chosen", lambda *ask: served.append(chosen(*ask)) or served[-1])
    policy = tiny_policy(32, hidden=32, positions=4096).to(DEVICE, torch.bfloat16)
    engine = StarsEngine(policy, tiny_reward(32, hidden=32, positions=4096).to(DEVICE, torch.bfloat16), **overrides)
    prompts = [[i % 30 for i in range(start, start + 700)] for start in (1, 7)]
    out = engine.generate(prompts, CONFIG, seed=SEEDS[:2], candidates=3)
    assert any(served), prefill.in_words(engine.policy.asks, engine.policy.device)
    with torch.no_grad():
        for prompt, completion, logprobs in zip(prompts, out.completions, out.logprobs, strict=True):
            plain = policy(torch.tensor([prompt + completion], device=DEVICE)).logits[0].float().log_softmax(1).cpu()
            expected = [plain[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]
            assert logprobs == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids=str)
def test_policy_and_reward_model_may_lie_on_different_devices(devices):
    policy, reward = devices
    engine = StarsEngine(tiny_policy(32, hidden=32).to(policy), tiny_reward(32, hidden=32).to(reward))
    assert flips(texts(make_engine("cpu")), texts(engine)) <= 1


def test_scarce_slots_do_not_change_the_text():
    engine = make_engine(kv_cache_tokens=100, **CAPTURED)
    assert flips(texts(make_engine("cpu")), texts(engine)) <= 1


def test_adapters_are_those_that_are_on():
    peft = pytest.importorskip("peft")
    model = lora(peft, **LORA["attention and mlp"])
    here = StarsEngine(model, sum_reward)
    there = StarsEngine(copy.deepcopy(model).to(DEVICE), sum_reward, **CAPTURED)
    adapted = texts(here)
    assert flips(adapted, texts(there)) <= 1
    with model.disable_adapter(), there.policy.model.disable_adapter():
        plain = texts(here)
        assert flips(plain, texts(there)) <= 1
    assert flips(adapted, texts(there)) <= 1 < flips(adapted, plain)


def test_weights_quantised_by_torchao_give_the_texts_of_the_cpu():
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)

    def quantised(device):
        policy = tiny_policy(32, hidden=32)
        torchao.quantize_(policy, torchao.Int8WeightOnlyConfig())
        return StarsEngine(policy.to(device), sum_reward, **CAPTURED)

    there = quantised(DEVICE)
    assert flips(texts(quantised("cpu")), texts(there)) <= 1
    assert there.policy.graphs.made > 0


class NotToken(LogitsProcessor):
    """Forbids one token."""

    def __call__(self, input_ids, scores):
        scores[:, 5] = -torch.inf
        return scores


@pytest.mark.parametrize("processors", [[], [NotToken()]], ids=["plain", "with a processor"])
def test_the_drop_in_generates_on_the_device_of_its_model(processors):
    def rows(device):
        torch.manual_seed(0)
        return stars_fast.generate(
            tiny_policy(32, hidden=32).to(device),
            torch.tensor([[5, 6, 7], [8, 9, 10]], device=device),
            reward_model=tiny_reward(32, hidden=32).to(device),
            stars_config=CONFIG,
            logits_processor=LogitsProcessorList(processors),
            do_sample=True,
        )

    there = rows(DEVICE)
    assert there.device.type == DEVICE
    assert torch.equal(there.cpu(), rows("cpu"))


# Numbers, waits, memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_and_rewards_are_those_of_plain_forward_passes(dtype):
    engine = make_engine(dtype=dtype, **CAPTURED)
    out = engine.generate(TEXTS, CONFIG, seed=SEEDS, candidates=3)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    policy, reward = engine.policy.model, engine.reward.model
    with torch.no_grad():
        for prompt, completion, logprobs, score in zip(TEXTS, out.completions, out.logprobs, out.rewards, strict=True):
            ids = torch.tensor([prompt + completion], device=DEVICE)
            plain = policy(ids, use_cache=False).logits[0].float().log_softmax(1).cpu()
            expected = [plain[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]
            assert logprobs == pytest.approx(expected, abs=tolerance)
            assert score == pytest.approx(reward(ids).logits.item(), abs=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_the_host_does_not_wait_inside_a_decode_step(way, monkeypatch):
    run_step, steps = Steps.run, []

    def watched(self):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_step(self)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        steps.append(self.graph is not None)

    engine = make_engine(**WAYS[way])
    texts(engine)  # compiles kernels
    monkeypatch.setattr(Steps, "run", watched)
    texts(engine)
    assert set(steps) == {way == "captured"}


def test_calls_that_come_back_capture_nothing_and_leave_nothing_behind():
    engine, used, graphs = make_engine(**CAPTURED), [], []
    for _ in range(7):  # what rows cost is learned, so that the first may come to other numbers of them
        texts(engine)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
        graphs.append(engine.policy.graphs.made)
    assert used[-3] == used[-2] == used[-1] < used[0] + 2**28
    assert graphs[-3] == graphs[-2] == graphs[-1] > 0


def test_running_out_of_memory_changes_no_text(monkeypatch):
    """The logits of 256 rows take most of the memory here; what one call takes is too much for the next."""
    vocab, retreats = 32_000, []
    retreat = Queue.retreat
    monkeypatch.setattr(Queue, "retreat", lambda self, large: retreats.append(large.cause) or retreat(self, large))

    def once():
        engine = StarsEngine(tiny_policy(vocab, hidden=32).to(DEVICE), sum_reward, **EAGER)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
        result = texts(engine, candidates=6, num_return_sequences=3)
        return result, reserved, torch.cuda.max_memory_allocated() - allocated

    expected, reserved, needed = once()
    assert not retreats and needed > 2**26
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((reserved + 0.5 * needed) / whole)
    try:
        actual, *_ = once()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert retreats and "OutOfMemoryError" in retreats[0]
    assert flips(expected, actual) <= 1


@pytest.mark.parametrize("way", [CAPTURED, COMPILED], ids=["captured", "compiled"])
def test_a_policy_that_cannot_be_captured_is_launched_step_by_step_with_a_warning(monkeypatch, way):
    forward, stream = Steps.forward, torch.cuda.current_stream()
    monkeypatch.setattr(Steps, "forward", lambda self: torch.cuda.synchronize() or forward(self))
    engine = make_engine(**way)
    with pytest.warns(UserWarning, match="captured in a CUDA graph"):
        there = texts(engine)
    assert flips(texts(make_engine("cpu")), there) <= 1
    assert torch.cuda.current_stream() == stream
    assert all(work.graph is None for work in engine.policy.graphs._kept.values() if isinstance(work, Steps))


def test_warming_up_for_long_texts_changes_what_rounding_does_at_most():
    expected, engine = texts(make_engine(**CAPTURED)), make_engine(**CAPTURED)
    told = engine.warm_up(requests=4, max_model_len=4096)
    assert told.graphs > 0 and engine.policy.trunk_room > 1024
    assert flips(expected, texts(engine)) <= 1


def test_verdicts_are_decided_where_the_rewards_lie(monkeypatch):
    engine, where, ask = make_engine(**EAGER), [], selection.select_and_commit
    monkeypatch.setattr(selection, "select_and_commit", lambda *args: where.append(args[0].device.type) or ask(*args))
    there = texts(engine)
    assert where and set(where) == {"cuda"}
    monkeypatch.setattr("stars_fast.loop.heartbeat.Loop._stays", lambda *args: False)
    assert texts(engine) == there
