"""Steps are scored as the published process reward models score them: their whole conversation, in one plain pass."""

import math

import pytest
import torch
from conftest import tiny_config, tiny_policy
from histories import assert_engine_agrees, live, text_prompts
from tiny_tokenizers import CHATML, LLAMA3, byte_bpe
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel, PreTrainedTokenizerFast

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import Completion, ProcessReward, Response, process
from stars_fast.rewards.process import QWEN_SYSTEM
from stars_fast.text.chat import encode

CONFIG = StarsConfig(segment_length=4, max_attempts=4, target_reward=0.7, beta=0.2, max_new_tokens=12)
TEXTS = ["the cat sat", "how are you?"]
ALPHABET = "▁[]/INST+-=?.qwertyuiopasdfghjklzxcvbnm0123456789ABCDEFLGHJKMOPQRUVWXYZ"
STEP = "<|im_end|>"  # stands in for <extra_0>: a special token that the template knows, too


class StepClassifier(LlamaPreTrainedModel):
    """The published shape of Qwen2.5-Math-PRM: a base model, and a small network of two labels on every token."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return self.score(self.model(input_ids, **kwargs).last_hidden_state)


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StepClassifier(tiny_config(300, hidden=32, positions=1024)).eval()


@pytest.fixture(scope="module")
def chatml():
    return byte_bpe(300, template=CHATML)


@pytest.fixture(scope="module")
def llama3():
    return byte_bpe(300, template=LLAMA3)


def steps_of(tokenizer, tokens, ends, finished=False):
    """Texts between the ends."""
    steps, done = [], ""
    for end in [*ends, len(tokens)]:
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        text = text if finished and end == len(tokens) else text.rstrip("\ufffd")
        steps.append(text[len(done) :].strip())
        done = max(done, text, key=len)
    return [step for step in steps if step] or [""]


@torch.no_grad()
def by_step_tokens(model, tokenizer, question, steps, system=QWEN_SYSTEM):
    """As the model card of Qwen2.5-Math-PRM-7B: steps joined by the token, probability of class 1 at each."""
    turns = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer("".join(step + STEP for step in steps), add_special_tokens=False)["input_ids"]
    mark = tokenizer.convert_tokens_to_ids(STEP)
    probabilities = model(torch.tensor([before + ids]), use_cache=False)[0, len(before) :].softmax(-1)
    return [row[1].item() for row, token in zip(probabilities, ids, strict=True) if token == mark]


@torch.no_grad()
def by_labels(model, tokenizer, question, steps):
    """As RLHFlow's math-rm: the conversation up to each label, which is predicted at the third id from its end."""
    labels = [tokenizer("+")["input_ids"][-1], tokenizer("-")["input_ids"][-1]]
    turns, scores = [], []
    for place, step in enumerate(steps):
        turns.append({"role": "user", "content": step if place else f"{question} {step}"})
        turns.append({"role": "assistant", "content": "+"})
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -3]
        scores.append(logits[labels].softmax(-1)[0].item())
    return scores


def draw(chance):
    return [chance.choice([*range(72, 100), *range(265, 300)]) for _ in range(chance.randint(1, 4))]


@pytest.mark.parametrize("aggregate", ["last", "min", "mean", "prod"])
def test_step_tokens_are_scored_once_and_as_published(classifier, chatml, aggregate):
    combine = {"last": lambda s: s[-1], "min": min, "mean": lambda s: sum(s) / len(s), "prod": math.prod}[aggregate]

    def expected(completion):
        steps = steps_of(chatml, completion.tokens, completion.response.ends, completion.finished)
        return combine(by_step_tokens(classifier, chatml, completion.response.prompt.source, steps))

    scorer = ProcessReward.qwen(classifier, chatml, step_token=STEP, aggregate=aggregate)
    live(scorer, text_prompts(TEXTS, chatml), expected, draw=draw, tokenizer=chatml, eos=1, rounds=6)


def test_labels_are_predicted_as_published(llama3):
    model = tiny_policy(300, seed=6, positions=1024)

    def expected(completion):
        steps = steps_of(llama3, completion.tokens, completion.response.ends, completion.finished)
        return sum(scores := by_labels(model, llama3, completion.response.prompt.source, steps)) / len(scores)

    scorer = ProcessReward.rlhflow(model, llama3, aggregate="mean")
    live(scorer, text_prompts(TEXTS, llama3), expected, draw=draw, tokenizer=llama3, eos=1, rounds=6)


@pytest.mark.parametrize("slots", [None, 95])
def test_the_engine_scores_steps_even_of_requests_that_gave_way(classifier, chatml, slots):
    policy = tiny_policy(300, seed=5, positions=512, eos_token_id=1)
    scorer = ProcessReward.qwen(classifier, chatml, step_token=STEP, system=None, aggregate="prod")
    engine = StarsEngine(policy, scorer, tokenizer=chatml, kv_cache_tokens=slots)

    def expected(i, tokens, ends, eos):
        finished = eos or len(tokens) == CONFIG.max_new_tokens
        steps = steps_of(chatml, tokens, ends, finished)
        return math.prod(by_step_tokens(classifier, chatml, TEXTS[i], steps, system=None))

    out = assert_engine_agrees(engine, TEXTS, CONFIG, expected, num_return_sequences=6)
    assert bool(out.stats["preemptions"]) == (slots is not None)


def test_a_candidate_costs_its_step_and_the_mark(classifier, chatml):
    scorer = ProcessReward.qwen(classifier, chatml, step_token=STEP)
    scorer.begin(prompts := text_prompts(TEXTS[:1], chatml), 24, 8, None)
    scorer.open(prompts, 24)
    response, step = Response(prompts[0]), chatml("the cat")["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            before = scorer.tokens
            completion = Completion(response, step, tokenizer=chatml)
            scorer.score([completion])
            if response.tokens:
                assert scorer.tokens - before == len(step) + 1
            scorer.commit(completion)
            response.tokens = completion.tokens
            response.ends.append(len(response.tokens))
    scorer.end()


@pytest.mark.parametrize("steps", [1, 4])
def test_committed_steps_are_tokenised_once_however_many_candidates_there_are(classifier, chatml, monkeypatch, steps):
    scorer = ProcessReward.qwen(classifier, chatml, step_token=STEP)
    scorer.begin(prompts := text_prompts(TEXTS[:1], chatml), 64, 8, None)
    scorer.open(prompts, 64)
    response, step = Response(prompts[0]), chatml("the cat")["input_ids"]
    for _ in range(steps):
        response.tokens = response.tokens + step
        response.ends.append(len(response.tokens))
    encoded = []
    monkeypatch.setattr(process, "encode", lambda tokenizer, text: encoded.append(text) or encode(tokenizer, text))
    with torch.no_grad():
        scorer.score([completion := Completion(response, step, tokenizer=chatml)])
        assert len(encoded) == steps + 1
        scorer.score([Completion(response, step, tokenizer=chatml) for _ in range(5)])
        assert len(encoded) == steps + 6
        scorer.commit(completion)
        response.tokens = completion.tokens
        response.ends.append(len(response.tokens))
        scorer.score([Completion(response, step, tokenizer=chatml)])
        assert len(encoded) == steps + 8, "the step that was committed, and the new one"
    scorer.close(response)
    assert not scorer._committed
    scorer.end()


def test_a_tokenizer_that_reads_a_step_alone_otherwise_than_in_the_conversation_is_refused():
    words = Tokenizer(models.Unigram([("<unk>", 0.0), ("<bos>", 0.0), *((c, -3.0) for c in ALPHABET)], unk_id=0))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} {% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="reads steps otherwise alone than in its rendered conversation"):
        ProcessReward.rlhflow(tiny_policy(len(tokenizer)), tokenizer)


def test_what_does_not_fit_is_refused(classifier, chatml):
    policy = tiny_policy(300, positions=1024)
    with pytest.raises(ValueError, match="aggregate='max'"):
        ProcessReward.qwen(classifier, chatml, step_token=STEP, aggregate="max")
    with pytest.raises(ValueError, match="step_token='<extra_0>' is not in"):
        ProcessReward.qwen(classifier, chatml)
    with pytest.raises(TypeError, match="tokenizer is a NoneType, None: give a tokenizer, by which"):
        ProcessReward.qwen(classifier, None)
    with pytest.raises(TypeError, match="model is a str"):
        ProcessReward.rlhflow("some/model", chatml)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no base model with a `score` head"):
        ProcessReward.qwen(policy, chatml, step_token=STEP)
    with pytest.raises(ValueError, match="end with the same token"):
        ProcessReward.rlhflow(policy, chatml, bad="+")
    with pytest.raises(ValueError, match="good='' has no token"):
        ProcessReward.rlhflow(policy, chatml, good="")
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        ProcessReward.rlhflow(policy, byte_bpe(300))


def test_ids_of_a_rendered_chat_are_refused(classifier, chatml, llama3):
    policy = tiny_policy(300, positions=1024)
    for tokenizer, scorer in (
        (chatml, ProcessReward.qwen(classifier, chatml, step_token=STEP)),
        (llama3, ProcessReward.rlhflow(policy, llama3)),
    ):
        turns = [{"role": "user", "content": "the cat"}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        with pytest.raises(ValueError, match=r"prompts\[0\] is given as ids of a rendered chat.*reward_prompts="):
            StarsEngine(policy, scorer, tokenizer=tokenizer).generate([ids], CONFIG)
