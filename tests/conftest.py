"""Tiny random models: small enough to enumerate, large enough to have every part a real one has."""

import gc
import os
import random
from collections.abc import Iterator

import pytest
import torch

# Without a GPU the kernels' tests run them in Triton's interpreter, which Triton must know before it is imported.
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if KERNEL_DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
# The interpreter computes bfloat16 wrongly without an error.
KERNEL_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if KERNEL_DEVICE == "cuda" else [])]

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from stars_fast import StarsConfig, StarsEngine  # noqa: E402
from stars_fast.loop import core  # noqa: E402
from stars_fast.loop.one_answer import OneAnswer  # noqa: E402
from stars_fast.loop.queue import Queue  # noqa: E402
from stars_fast.loop.request import PromptNode, Request, Terms  # noqa: E402
from stars_fast.loop.scheduler import Scheduler  # noqa: E402
from stars_fast.outputs import Stats  # noqa: E402
from stars_fast.policy.leaf import Sampling  # noqa: E402
from stars_fast.rewards import RewardPrompt  # noqa: E402


def tiny_config(vocab: int, *, hidden: int = 16, layers: int = 2, positions: int = 256, **fields) -> LlamaConfig:
    """A Llama configuration whose random weights give laws that are far from uniform and depend on the context."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.3,
        **{"bos_token_id": None, "eos_token_id": vocab - 1, "pad_token_id": None, **fields},
    )


def tiny_policy(vocab: int = 4, *, seed: int = 0, scale: float = 1.0, **fields) -> LlamaForCausalLM:
    """A causal LM whose EOS is the last id; ``scale`` multiplies the logits, for more or less peaked laws."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = LlamaForCausalLM(tiny_config(vocab, **fields)).float().eval()
    with torch.no_grad():
        policy.lm_head.weight.mul_(scale)
    return policy


def tiny_reward(vocab: int = 4, *, seed: int = 1, scale: float = 1.0, **fields) -> LlamaForSequenceClassification:
    """A reward model with one label over the same vocabulary; ``scale`` multiplies the reward."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reward = LlamaForSequenceClassification(tiny_config(vocab, num_labels=1, **fields)).float().eval()
    with torch.no_grad():
        reward.score.weight.mul_(scale)
    return reward


def tiny_tokenizer(vocab: int = 32) -> PreTrainedTokenizerFast:
    """Words ``w0 w1 ...`` with their index as id; the last one is ``</s>``. It has a chat template."""
    words = {f"w{index}": index for index in range(vocab - 1)} | {"</s>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    return fast


def sum_reward(completions):
    """A callable reward over ids, in [-1, 1.7]."""
    return [((3 * sum(completion) + len(completion)) % 17) / 6 - 1 for completion in completions]


def make_requests(config: StarsConfig, *lengths: int, samples: int = 1, whole: bool = False, **fields) -> list[Request]:
    """Requests that grow one answer each, for prompts of these lengths; they belong to no engine."""
    method, strategy = config.chosen_method, OneAnswer(Queue(None, None, None, None))
    terms = Terms(config, method, method.segments(), Sampling(), Stats(), whole)
    made = []
    for i, length in enumerate(lengths):
        prompt = PromptNode([1] * length, RewardPrompt(i, [1] * length, [1] * length))
        for j in range(samples):
            settings = {"target": 1.5, "base": 0.0, "beta": 0.6} | fields
            made.append(Request(terms, prompt, key=0, prompt_index=i, sample_index=j, **settings))
            made[-1].strategy = strategy
    return made


def word_reward(completions):
    """:func:`sum_reward` of texts in the words of :func:`tiny_tokenizer`."""
    return sum_reward([[int(word[1:]) for word in completion.split()] for completion in completions])


@pytest.fixture
def small_pools(monkeypatch) -> None:
    """Pools of what is wanted when they are made, and nothing for who may come."""
    monkeypatch.setattr("stars_fast.tree.memory._LEAST_TOKENS", 0)


def refused(*parts):
    """The call is refused before any work, with a message that has every one of ``parts`` as a word of its own."""
    words = "".join(rf"(?=[\s\S]*(?<![\w.]){part}(?![\w]))" for part in parts)
    return pytest.raises((ValueError, TypeError, NotImplementedError), match=words)


class FickleScheduler(Scheduler):
    """In each heartbeat it draws other numbers of candidates at random, and encodes as much or as little."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rng = random.Random(0)

    def candidates(self, requests, limits, rows, spare) -> list[int]:
        return [self.rng.randint(1, most) for most in limits]

    def encoding_tokens(self, running: int, encoding: int, segment_length: int) -> int:
        return self.rng.randint(1, 8)


@pytest.fixture
def fickle(monkeypatch) -> None:
    """Engines whose scheduler changes its mind at random."""
    monkeypatch.setattr(core, "Scheduler", FickleScheduler)


@pytest.fixture
def padded() -> StarsEngine:
    """An engine whose passes are padded as they are where graphs are captured."""
    engine = StarsEngine(tiny_policy(32, hidden=32), tiny_reward(32, hidden=32))
    for tree in (engine.policy, *engine.reward.tree_models):
        tree.graphs.enabled = True
    return engine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if KERNEL_DEVICE == "cpu":
        skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What was imported stays; looking through it again and again takes up to half of a test of thousands of texts."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Triton looks for leaks at the end


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from a second thread, and on a busy machine they wait for it: ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def policy32() -> LlamaForCausalLM:
    return tiny_policy(32, hidden=32)


@pytest.fixture(scope="session")
def idle(policy32):
    """An engine that is asked for nothing it could begin with."""

    def unreachable(completions):
        raise AssertionError("work started before the input was checked")

    return StarsEngine(policy32, unreachable)


@pytest.fixture(scope="session")
def reward32() -> LlamaForSequenceClassification:
    return tiny_reward(32, hidden=32)


@pytest.fixture(scope="session")
def tokenizer32() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(32)
