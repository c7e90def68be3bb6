"""What torch makes tensors of by default is the caller's affair, and other threads change it while they load models."""

from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from test_methods import EVERY, generate
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import stars_fast
from stars_fast import StarsConfig, StarsEngine


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def engine():
    return StarsEngine(tiny_policy(32, hidden=32), tiny_reward(32, hidden=32))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_text(name, dtype):
    expected, guided = generate(engine(), EVERY[name]), engine()
    with default_dtype(dtype):
        found = generate(guided, EVERY[name])
    assert found.errors == expected.errors == [None] * 6
    assert found.completions == expected.completions
    assert found.rewards == pytest.approx(expected.rewards, abs=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_the_default_device_changes_no_text(name):
    """Tensors on "meta" hold nothing: whatever is made there by mistake fails."""
    expected, guided = generate(engine(), EVERY[name]), engine()
    with default_device("meta"):
        found = generate(guided, EVERY[name])
    assert found.errors == [None] * 6
    assert found.completions == expected.completions


CONFIG = StarsConfig(segment_length=4, max_new_tokens=12, max_attempts=3, target_reward=0.5, beta=0.6)


def of_llama():
    """The weights are bfloat16, and autocast would make float16 of what their layers give."""
    return tiny_policy(32, hidden=32).bfloat16(), tiny_reward(32, hidden=32).bfloat16()


def of_gpt2():
    """Its layers are no ``nn.Linear``: they follow autocast everywhere."""
    sizes = {"vocab_size": 32, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=31, pad_token_id=0, num_labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval(), GPT2ForSequenceClassification(config).eval()


@pytest.mark.parametrize("models", [of_llama, of_gpt2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_no_text_wherever_an_engine_is_made_and_used(models, dtype):
    def run(made: bool, used: bool):
        with torch.autocast("cpu", dtype, enabled=made):
            engine = StarsEngine(*models())
        with torch.autocast("cpu", dtype, enabled=used):
            out = engine.generate([[5, 6], [7]], CONFIG, seed=0)
            assert torch.is_autocast_enabled("cpu") == used
        assert out.errors == [None] * 2 and engine.policy.dtype == engine.policy.model.dtype
        return out.completions, out.rewards

    assert run(True, True) == run(True, False) == run(False, True) == run(False, False)


def test_the_drop_in_takes_the_models_own_dtype_under_autocast():
    policy, reward = of_gpt2()
    settings = {"reward_model": reward, "stars_config": CONFIG, "seed": 0, "max_new_tokens": 8, "pad_token_id": 0}
    plain = stars_fast.generate(policy, torch.tensor([[5, 6]]), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert stars_fast.generate(policy, torch.tensor([[5, 6]]), **settings).equal(plain)
