"""Logits processors of a user's own: functions of the text, and others that follow one text by a state."""

import itertools
import math
from sys import getsizeof

import pytest
import torch
from conftest import tiny_policy
from test_dropin import CONFIG, PAD, PROMPTS, VOCAB, completions, facade
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from stars_fast.inputs import processors
from stars_fast.inputs.processors import _Following, _fresh, foreign_processors, row_processor

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


@pytest.fixture(scope="module")
def policy():
    policy = tiny_policy(VOCAB, hidden=32)
    policy.generation_config.pad_token_id = PAD
    return policy


class Counting(LogitsProcessor):
    """Lets the n-th token be n: it counts its calls, as matchers of a grammar advance by theirs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return only(self.calls % 30, scores)


class Successor(LogitsProcessor):
    """Lets two tokens follow each: a state in a list, that refuses a text other than the last with a token more."""

    def __init__(self):
        self.seen, self.started = [], False

    def __call__(self, input_ids, scores):
        if self.started:
            assert input_ids[0, :-1].tolist() == self.seen
            self.seen.append(int(input_ids[0, -1]))
        else:
            self.started = True
            self.seen += input_ids[0].tolist()
        last = self.seen[-1]
        return only([(last + 1) % 30, (last + 2) % 30], scores)


class Uncopied(Counting):
    """What cannot be copied."""

    def __deepcopy__(self, memo):
        return self

    __copy__ = __reduce_ex__ = lambda self, *_: self


def only(allowed, scores):
    out = torch.full_like(scores, -math.inf)
    out[:, allowed] = scores[:, allowed]
    return out


def processed(policy, *processors, **kwargs):
    return facade(policy, logits_processor=LogitsProcessorList(processors), seed=0, **kwargs)


def test_a_processor_that_counts_is_given_a_copy_for_each_text(policy):
    config = CONFIG.replace(ignore_eos=True, target_reward=5.0, max_attempts=3)
    counting = Counting()
    texts = processed(policy, counting, config=config, num_return_sequences=2)[:, 5:].tolist()
    assert texts == [list(range(1, CONFIG.max_new_tokens + 1))] * 8
    assert counting.calls == 0


def test_candidates_do_not_mix_up_a_state(policy):
    """Under rejection, side by side, with as many copies as texts or fewer."""
    texts = completions(processed(policy, Successor(), num_return_sequences=4))
    for row, text in enumerate(texts):
        path = [PROMPTS[row // 4][-1], *text]
        assert all((after - before) % 30 in (1, 2) for before, after in itertools.pairwise(path))
    assert len({tuple(text) for text in texts}) > 4


def test_texts_that_are_forgotten_are_shown_again(policy, monkeypatch):
    expected = processed(policy, Successor())
    monkeypatch.setattr("stars_fast.inputs.processors._FOLLOWERS", 1)
    assert torch.equal(processed(policy, Successor()), expected)


def test_a_state_that_cannot_be_copied_is_refused_by_name(policy):
    with pytest.raises(ValueError, match=r"Uncopied.*state of its own.*from the ids it is given"):
        processed(policy, Uncopied())


def test_allowed_tokens_with_a_state_are_refused_by_name(policy):
    asked = []

    def allowed(row, ids):
        asked.append(row)
        return [len(asked) % 7]

    with pytest.raises(ValueError, match=r"prefix_allowed_tokens_fn=\S*allowed.*state of its own"):
        facade(policy, prefix_allowed_tokens_fn=allowed)


class Broken(LogitsProcessor):
    def __init__(self, error, after=2):
        self.error, self.after = error, after

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 5 + self.after:
            raise self.error
        return scores


@pytest.mark.parametrize("after", [-1, 2])
@pytest.mark.parametrize(
    "error, told", [(AssertionError(), "AssertionError: without a message"), (KeyError("x"), "KeyError: 'x'")], ids=str
)
def test_an_error_of_a_processor_names_it(policy, error, told, after):
    config = CONFIG.replace(ignore_eos=True)
    with pytest.raises(RuntimeError, match=rf"prompts\[\d\]: the logits processor \S*\.Broken raised {told}"):
        processed(policy, Broken(error, after), config=config)


def test_a_processor_of_the_ids_is_used_as_it_is(policy):
    class Odd(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return only(slice(1, None, 2), scores)

    odd, ids = Odd(), torch.tensor([[5, 6]])
    foreign = foreign_processors(LogitsProcessorList([odd]), policy.generation_config, ids, VOCAB)
    assert list(foreign.processors) == [odd] and foreign.whole
    logits = row_processor(foreign.processors, ids, None, 0)([3], torch.zeros(1, VOCAB))
    assert logits[0, ::2].isinf().all() and not logits[0, 1::2].any()


class InTensor(LogitsProcessor):
    """Counts in a tensor that it changes in place, beside a model in a dict of lists."""

    def __init__(self, model=None):
        self.calls, self.models = torch.zeros(1, dtype=torch.int64), {"scorers": [model]}

    def __call__(self, input_ids, scores):
        self.calls += 1
        return only(int(self.calls) % 30, scores)


def test_a_state_in_a_tensor_is_copied_for_each_text(policy):
    config, counting = CONFIG.replace(ignore_eos=True, target_reward=5.0, max_attempts=3), InTensor()
    texts = processed(policy, counting, config=config, num_return_sequences=2)[:, 5:].tolist()
    assert texts == [list(range(1, CONFIG.max_new_tokens + 1))] * 8
    assert counting.calls == 0


def test_models_in_lists_and_dicts_are_shared_by_the_copies():
    class Dear(torch.nn.Module):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    counting = InTensor(Dear())
    copied = _fresh(counting)
    assert copied.models["scorers"][0] is counting.models["scorers"][0] and copied.calls is not counting.calls


@pytest.mark.parametrize("kind", [InTensor, lambda: PrefixConstrainedLogitsProcessor(lambda *_: [1, 2], 1)])
def test_a_processor_is_asked_once_whether_it_keeps_a_state(policy, kind, monkeypatch):
    asked, keeps = [], processors._keeps_state
    monkeypatch.setattr(processors, "_keeps_state", lambda *one: asked.append(one) or keeps(*one))
    given = LogitsProcessorList([kind()])
    first, second = (foreign_processors(given, policy.generation_config, torch.tensor([[5, 6]]), VOCAB) for _ in "12")
    assert len(asked) == 1 and [type(one) for one in first.processors] == [type(one) for one in second.processors]


def test_texts_that_copies_follow_are_not_held():
    """There may be a thousand, of as many tokens as fit a model."""
    following = _Following(lambda ids, logits: logits, 4000)
    for last in range(8):
        following(torch.tensor([[9] * 4000 + [last]]), torch.zeros(1, 4))
    assert [getsizeof(key) < 100 for key in following._followers] == [True] * 8
