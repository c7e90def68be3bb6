"""Templates, tails, tokenizers and functions between policy and reward: the score is the plain one all the same."""

import asyncio
import copy
import random
import threading
import warnings

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from stars_fast import StarsConfig, StarsEngine, demo
from stars_fast.rewards import (
    CallableReward,
    ClassifierReward,
    Completion,
    ImplicitReward,
    JudgeReward,
    Response,
    Reward,
    RewardPrompt,
    WeightedSum,
)
from stars_fast.rewards.render import Rendering

CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the cat sat on the mat and the dog sat on the cat",
    "user assistant hello there, how are you today? I am fine; thank you.",
    "über naïve café — “quoted” text, 漢字 and 😀😀 faces",
    "a  b   c\n\nd e f  tion ation nation national internationalisation",
]


def byte_bpe(size, *, corpus=CORPUS, template=None, add_bos=False, eos="<eos>"):
    """A byte-level BPE tokenizer; how it merges depends on its size and corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 4, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos, additional_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = template
    return fast


def models_for(policy_tokenizer, reward_tokenizer=None, **fields):
    policy = tiny_policy(len(policy_tokenizer), hidden=32, eos_token_id=policy_tokenizer.eos_token_id, positions=512)
    size = len(reward_tokenizer or policy_tokenizer)
    return policy, tiny_reward(size, hidden=32, positions=512, scale=0.7, **fields)


@torch.no_grad()
def fresh(reward, ids):
    """The head at the last token of a full forward pass."""
    return reward.score(reward.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]).item()


def assert_scores(out, expected, samples=1):
    """``expected(prompt index, tokens, finished)`` of every prefix that was committed."""
    assert out.errors == [None] * len(out.errors)
    assert any(segment.attempts > 1 for row in out.segments for segment in row)
    for row, segments in enumerate(out.segments):
        tokens = []
        for k, segment in enumerate(segments):
            tokens += segment.tokens
            finished = k + 1 == len(segments)
            assert segment.reward == pytest.approx(expected(row // samples, list(tokens), finished), abs=1e-4)


# The policy's ids, no template


@pytest.mark.parametrize("tail", ["auto", "none", [3, 4, 5]], ids=str)
def test_shared_ids_are_scored_as_they_are_with_the_tail_behind_them(policy32, reward32, tail):
    prompts = [[5, 6, 7], [8]]
    out = StarsEngine(policy32, reward32, reward_tail=tail).generate(prompts, CONFIG, seed=0, num_return_sequences=4)
    assert "stop" in out.finish_reasons
    after = tail if isinstance(tail, list) else []

    def expected(i, tokens, finished):
        ended = after and tokens[-1] == 31  # an EOS gives way to the tail
        return fresh(reward32, prompts[i] + (tokens[:-1] if ended else tokens) + after)

    assert_scores(out, expected, samples=4)


def test_the_same_tokenizer_given_twice_is_shared(policy32, reward32, tokenizer32):
    other = tiny_tokenizer(32)
    other.chat_template = None
    engine = StarsEngine(policy32, reward32, tokenizer=tokenizer32, reward_tokenizer=other)
    assert engine.reward.shared_ids
    out = engine.generate(["w5 w6", "w7"], CONFIG, seed=0)
    assert_scores(out, lambda i, tokens, _: fresh(reward32, [[5, 6], [7]][i] + tokens))


# Chat templates

CHAT = [{"role": "system", "content": "the cat sat"}, {"role": "user", "content": "hello there, how are you?"}]


def chat_prefix(tokenizer, messages):
    """transformers' own rendering up to the answer: one beginning-of-sequence token at most."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    "template, tail", [(LLAMA3, "<|eot_id|>"), (CHATML, "<|im_end|>\n")], ids=["llama-3", "chatml"]
)
@pytest.mark.parametrize("reward_tail", ["auto", "template", "none", [9, 10]], ids=str)
def test_a_chat_is_scored_as_its_template_renders_it(template, tail, add_bos, reward_tail):
    tokenizer = byte_bpe(300, template=template, add_bos=add_bos)
    policy, reward = models_for(tokenizer)
    engine = StarsEngine(policy, reward, tokenizer=tokenizer, reward_tokenizer=tokenizer, reward_tail=reward_tail)
    out = engine.generate([CHAT, CHAT[1:]], CONFIG, seed=1, num_return_sequences=3, eos_token_id=list(range(100, 130)))
    after = {"none": [], "auto": None, "template": None}.get(str(reward_tail), reward_tail)
    if after is None:
        after = tokenizer(tail, add_special_tokens=False)["input_ids"]
    assert "stop" in out.finish_reasons
    bos = tokenizer.bos_token_id
    if add_bos and template is CHATML:
        return  # whether a template that writes no bos wants one is the tokenizer's business; see the next test

    def expected(i, tokens, finished):
        prefix = chat_prefix(tokenizer, CHAT[i:])
        assert prefix.count(bos) == (template is LLAMA3)
        ended = after and 100 <= tokens[-1] < 130
        return fresh(reward, prefix + (tokens[:-1] if ended else tokens) + after)

    assert_scores(out, expected, samples=3)


@pytest.mark.parametrize("template", [LLAMA3, CHATML], ids=["llama-3", "chatml"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_there_is_exactly_one_bos_where_template_or_tokenizer_want_one(template, add_bos):
    tokenizer = byte_bpe(300, template=template, add_bos=add_bos)
    reward = models_for(tokenizer)[1]
    scorer = ClassifierReward(reward, tokenizer, tokenizer)
    scorer.begin([prompt := RewardPrompt(0, CHAT, [1])], 8, 2, None)
    prefix = scorer._contexts[prompt].prefix
    assert prefix.count(tokenizer.bos_token_id) == (add_bos or template is LLAMA3)
    assert (prefix[0] == tokenizer.bos_token_id) == (add_bos or template is LLAMA3)
    scorer.end()


def test_text_prompts_become_a_user_turn():
    tokenizer = byte_bpe(300, template=CHATML)
    policy, reward = models_for(tokenizer)
    engine = StarsEngine(policy, reward, tokenizer=tokenizer, reward_tokenizer=tokenizer)
    out = engine.generate(["the cat sat"], CONFIG, seed=0, ignore_eos=True)
    prefix = chat_prefix(tokenizer, [{"role": "user", "content": "the cat sat"}])
    tail = tokenizer("<|im_end|>\n")["input_ids"]
    assert_scores(out, lambda i, tokens, _: fresh(reward, prefix + tokens + tail))


def test_the_answer_is_not_rendered_again():
    """Templates such as Llama 3's strip the answer; its ids are scored as they were drawn, white space included."""
    tokenizer = byte_bpe(300, template=LLAMA3)
    _, reward = models_for(tokenizer)
    scorer = ClassifierReward(reward, tokenizer, tokenizer)
    scorer.begin([prompt := RewardPrompt(0, CHAT, [1])], 8, 2, None)
    answer = tokenizer("  the cat  ", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        (score,) = scorer.score([Completion(Response(prompt), answer, tokenizer=tokenizer)])
    tail = tokenizer("<|eot_id|>", add_special_tokens=False)["input_ids"]
    assert score == pytest.approx(fresh(reward, chat_prefix(tokenizer, CHAT) + answer + tail), abs=1e-4)
    scorer.end()


def test_a_template_that_does_not_show_the_answer_is_refused(tokenizer32, policy32, reward32):
    other = tiny_tokenizer(32)
    other.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    engine = StarsEngine(policy32, reward32, tokenizer=tokenizer32, reward_tokenizer=other)
    with pytest.raises(ValueError, match="verbatim"):
        engine.generate(["w1"], CONFIG)


# Another tokenizer than the policy's


def rescored(policy_tokenizer, reward_tokenizer, reward, prompt_text, tokens, finished, eos):
    """Tokenise the whole text afresh and score all of it."""
    text = policy_tokenizer.decode(tokens, skip_special_tokens=True)
    if not finished:
        text = text.rstrip("\ufffd")
    ids = reward_tokenizer(prompt_text + text)["input_ids"]
    if tokens[-1] == eos and reward_tokenizer.eos_token_id is not None:
        ids.append(reward_tokenizer.eos_token_id)
    return fresh(reward, ids)


def letters(alphabet="abc "):
    """A policy's tokenizer that spells."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)} | {"<eos>": len(alphabet)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("max_rows, slots", [(64, None), (3, 40)])
def test_a_foreign_tokenizer_scores_the_text_not_the_ids(add_bos, max_rows, slots):
    """The reward's merges cross the policy's segments, so its last tokens change as the text grows."""
    chance = random.Random(0)
    corpus = ["".join(chance.choice("abc ") for _ in range(400)) for _ in range(4)]
    ours, theirs = letters(), byte_bpe(263 + 60, corpus=corpus, add_bos=add_bos)
    policy, reward = models_for(ours, theirs)
    prompts = ["abc cab", "a"]
    engine = StarsEngine(
        policy, reward, tokenizer=ours, reward_tokenizer=theirs, max_rows=max_rows, kv_cache_tokens=slots
    )
    assert not engine.reward.shared_ids
    out = engine.generate(prompts, CONFIG, seed=0, num_return_sequences=6)
    assert set(out.finish_reasons) == {"stop", "length"}
    merged = 0
    for row, segments in enumerate(out.segments):
        text, before = prompts[row // 6], []
        for segment in segments:
            text += ours.decode(segment.tokens, skip_special_tokens=True)
            ids = theirs(text)["input_ids"]
            merged += ids[: len(before)] != before
            before = ids
    assert merged > 5  # otherwise this test proves little

    def expected(i, tokens, finished):
        return rescored(ours, theirs, reward, prompts[i], tokens, finished, ours.eos_token_id)

    assert_scores(out, expected, samples=6)
    tree = engine.reward.tree_model.tree
    assert tree.free_slots == tree.capacity - 1


def test_a_character_split_between_segments_is_held_back():
    """Bytes of one character drawn one by one: the unfinished one is not scored as a replacement character."""
    ours, theirs = byte_bpe(263), byte_bpe(263 + 80)
    _, reward = models_for(ours, theirs)
    face = ours("😀", add_special_tokens=False)["input_ids"]
    assert len(face) == 4
    scorer = ClassifierReward(reward, theirs, ours)
    scorer.begin([prompt := RewardPrompt(0, "the cat ", [1])], 20, 4, None)
    response = Response(prompt)
    before = fresh(reward, theirs("the cat ")["input_ids"])
    whole = fresh(reward, theirs("the cat 😀")["input_ids"])
    with torch.no_grad():
        for k in range(4):
            completion = Completion(response, face[k : k + 1], tokenizer=ours)
            (score,) = scorer.score([completion])
            assert score == pytest.approx(whole if k == 3 else before, abs=1e-4)
            scorer.commit(completion)
            response.tokens = completion.tokens
    scorer.end()


def test_a_chat_under_a_foreign_tokenizer_is_rendered_in_the_rewards_own_template():
    ours, theirs = byte_bpe(263 + 40, template=CHATML), byte_bpe(263 + 100, template=LLAMA3, add_bos=True)
    policy, reward = models_for(ours, theirs)
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    out = engine.generate([CHAT], CONFIG, seed=0, num_return_sequences=4)
    prefix, tail = chat_prefix(theirs, CHAT), theirs.convert_tokens_to_ids(["<|eot_id|>"])

    def expected(i, tokens, finished):
        text = ours.decode(tokens, skip_special_tokens=True)
        text = text if finished else text.rstrip("\ufffd")
        return fresh(reward, prefix + theirs(text, add_special_tokens=False)["input_ids"] + tail)

    assert_scores(out, expected, samples=4)


def metaspace(words):
    """Like SentencePiece's: a word's leading space belongs to it, and decoding drops the one at the very front."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"▁{word}": i + 2 for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_the_space_between_prompt_and_answer_is_kept():
    ours, theirs = metaspace(["cat", "dog", "mat", "sat", "the", "on"]), byte_bpe(263 + 60)
    policy, reward = models_for(ours, theirs)
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    out = engine.generate(["the cat"], CONFIG, seed=0, ignore_eos=True)
    prompt = ours("the cat")["input_ids"]

    def expected(i, tokens, finished):
        return fresh(reward, theirs(ours.decode(prompt + tokens, skip_special_tokens=True))["input_ids"])

    assert ours.decode(prompt + out.completions[0][:1], skip_special_tokens=True).count(" ") >= 2
    assert_scores(out, expected)


def test_a_prompt_of_nothing_but_special_tokens_can_be_scored_under_a_foreign_tokenizer():
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 90, add_bos=True)
    policy, reward = models_for(ours, theirs)
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    out = engine.generate([[ours.bos_token_id]], CONFIG, seed=0, ignore_eos=True)

    def expected(i, tokens, finished):
        return rescored(ours, theirs, reward, "", tokens, finished, None)

    assert_scores(out, expected)


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ 'Q:' if m['role'] == 'user' else 'A:' }}{{ m['content'] }}\n{% endfor %}"


def sentencepiece(template):
    """SentencePiece's way: the first word of a text gets a space, words carry theirs in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<s>", "</s>"], show_progress=False)
    corpus = ["[INST] the film is good [/INST] I like it very much abcdefgh .,? QA: \n STARFASTANSWER"]
    tokenizer.train_from_iterator(corpus * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


FILM = [{"role": "user", "content": "the film is good"}]


@pytest.mark.parametrize("template", [MISTRAL, PLAIN], ids=["mistral", "plain"])
@pytest.mark.parametrize("answer", ["I like it", "abc", "the film. I"])
def test_a_foreign_chat_and_its_answer_are_tokenised_in_one_piece(template, answer):
    """Apart, a SentencePiece tokenizer would put a space of its own in front of the answer, or of what follows it."""
    ours, theirs = byte_bpe(263), sentencepiece(template)
    scorer = ClassifierReward(reward := models_for(ours, theirs)[1], theirs, ours)
    scorer.begin([prompt := RewardPrompt(0, FILM, [1])], 40, 2, None)
    response = Response(prompt)
    drawn = ours(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for length in (len(drawn) // 2, len(drawn)):
            completion = Completion(
                response, drawn[len(response.tokens) : length], length == len(drawn), tokenizer=ours
            )
            (score,) = scorer.score([completion])
            text = ours.decode(drawn[:length])
            whole = [*FILM, {"role": "assistant", "content": text}]
            ids = theirs.apply_chat_template(whole, tokenize=True, return_dict=False)
            assert score == pytest.approx(fresh(reward, ids), abs=1e-4)
            scorer.commit(completion)
            response.tokens = completion.tokens
    scorer.end()


def test_shared_answers_bring_the_space_behind_the_prompt_along():
    tokenizer = sentencepiece(MISTRAL)
    rendering = Rendering(tokenizer, tokenizer, "auto")
    context = rendering.context(RewardPrompt(0, FILM, [1]))
    whole = [*FILM, {"role": "assistant", "content": "I like it"}]
    expected = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    answer = expected[len(context.prefix) : -1]
    assert tokenizer.decode(answer) == "I like it"
    completion = Completion(Response(RewardPrompt(0, FILM, [1])), answer, tokenizer=tokenizer)
    assert rendering.target(context, completion, causal=True) + context.tail == expected


# Prompts given as ids


def test_ids_of_a_rendered_chat_are_not_rendered_again():
    tokenizer = byte_bpe(300, template=CHATML, eos="<|im_end|>")
    policy, reward = models_for(tokenizer)
    engine = StarsEngine(policy, reward, tokenizer=tokenizer, reward_tokenizer=tokenizer)
    ids = chat_prefix(tokenizer, CHAT)
    tail = tokenizer("<|im_end|>\n")["input_ids"]
    out = engine.generate([ids], CONFIG, seed=0, ignore_eos=True)
    assert_scores(out, lambda i, tokens, _: fresh(reward, ids + tokens + tail))
    chat = engine.generate([CHAT], CONFIG, seed=0, ignore_eos=True)
    assert out.completions == chat.completions and out.rewards == pytest.approx(chat.rewards)


def test_ids_of_plain_text_become_a_user_turn():
    tokenizer = byte_bpe(300, template=CHATML, add_bos=True)
    rendering = Rendering(tokenizer, tokenizer, "auto")
    ids = tokenizer("the cat sat")["input_ids"]
    expected = rendering.context(RewardPrompt(0, "the cat sat", ids)).prefix
    for given in (ids, [tokenizer.eos_token_id, *ids], [*ids, tokenizer.eos_token_id]):
        assert rendering.context(RewardPrompt(0, given, given)).prefix == expected


def test_ids_of_a_rendered_chat_are_refused_where_the_reward_has_its_own_template():
    ours, theirs = byte_bpe(263 + 40, template=CHATML), byte_bpe(263 + 100, template=LLAMA3)
    policy, reward = models_for(ours, theirs)
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    ids = chat_prefix(ours, CHAT)
    with pytest.raises(ValueError, match=r"prompts\[1\].*<\|im_start\|>.*reward_prompts="):
        engine.generate([[1], ids], CONFIG)
    out = engine.generate([ids], CONFIG, seed=0, reward_prompts=[CHAT])
    assert out.errors == [None]
    assert out.rewards == pytest.approx(engine.generate([CHAT], CONFIG, seed=0).rewards)


# Bidirectional


def test_a_bidirectional_reward_reads_the_whole_text_every_time():
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 90, add_bos=True)
    policy, _ = models_for(ours)
    config = BertConfig(
        vocab_size=len(theirs),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.3,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = BertForSequenceClassification(config).train()  # dropout must be off while scoring
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    with pytest.warns(UserWarning, match=r"BertForSequenceClassification is scored in full .* bidirectional"):
        out = engine.generate(["the cat", "a dog sat on"], CONFIG, seed=0, ignore_eos=True, target_reward=3.0)
    assert reward.training
    reward.eval()

    @torch.no_grad()
    def expected(i, tokens, finished):
        text = ours.decode(tokens, skip_special_tokens=True)
        text = ["the cat", "a dog sat on"][i] + (text if finished else text.rstrip("\ufffd"))
        return reward(**theirs(text, return_tensors="pt", return_token_type_ids=False)).logits.item()

    assert_scores(out, expected)


# Functions

PROMPTS = [[5, 6, 7], [8]]


def expect_same_text(policy, reward, **kwargs):
    plain = StarsEngine(policy, sum_reward).generate(PROMPTS, CONFIG, seed=0)
    out = StarsEngine(policy, reward).generate(PROMPTS, CONFIG, seed=0, **kwargs)
    assert out.completions == plain.completions


def of(completions):
    return sum_reward(completions)


SIGNATURES = {
    "completions": lambda completions: of(completions),
    "prompts, completions": lambda prompts, completions: of(completions),
    "completion_ids": lambda completion_ids: of(completion_ids),
    "prompts, **kwargs": lambda prompts, **kwargs: of(kwargs["completions"]),
    "positional only": lambda prompts, completions, /: of(completions),
    "keyword only": lambda *, completion_ids, prompts: of(completion_ids),
    "defaults": lambda completions, trainer_state=None, log_extra=None: of(completions),
    "a column": lambda completions, bonus: [r + b for r, b in zip(of(completions), bonus, strict=True)],
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_a_function_is_called_with_what_it_takes(policy32, signature):
    expect_same_text(policy32, SIGNATURES[signature], columns={"bonus": [0.0, 0.0], "unused": ["a", "b"]})


def test_columns_reach_the_completions_of_their_prompt(policy32):
    seen = set()

    def reward(prompts, completions, answer):
        seen.update((tuple(prompt), value) for prompt, value in zip(prompts, answer, strict=True))
        return sum_reward(completions)

    expect_same_text(policy32, reward, columns={"answer": ["x", "y"]})
    assert seen == {((5, 6, 7), "x"), ((8,), "y")}


def test_an_async_function_is_awaited_with_and_without_a_running_loop(policy32):
    """One event loop for a whole call of the engine, so that what is bound to a loop stays good; then it is gone."""
    loops, threads = [], []

    async def reward(completions):
        await asyncio.sleep(0)
        if asyncio.get_running_loop() not in loops:
            loops.append(asyncio.get_running_loop())
            threads.append(threading.current_thread())
        assert not torch.is_grad_enabled()
        return sum_reward(completions)

    expect_same_text(policy32, reward)
    assert len(loops) == 1

    async def notebook():
        expect_same_text(policy32, reward)

    asyncio.run(notebook())
    assert len(loops) == 2
    assert all(loop.is_closed() for loop in loops) and not any(thread.is_alive() for thread in threads)


def test_an_async_function_can_be_scored_outside_a_call_of_the_engine():
    async def reward(completions):
        await asyncio.sleep(0)
        return sum_reward(completions)

    scorer = CallableReward(reward)
    for _ in range(2):
        assert scorer.score([Completion(Response(RewardPrompt(0, [1], [1])), [2, 3])]) == sum_reward([[2, 3]])
    assert not [thread for thread in threading.enumerate() if thread.name == "stars-fast-reward"]


def test_a_task_left_behind_by_an_async_function_ends_with_the_call(policy32):
    cancelled = []

    async def forever():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def reward(completions):
        if not cancelled:
            tasks.append(asyncio.ensure_future(forever()))
            await asyncio.sleep(0)
        return sum_reward(completions)

    tasks = []
    expect_same_text(policy32, reward)
    assert tasks and len(cancelled) == len(tasks)


@pytest.mark.parametrize(
    "reward",
    [lambda completions, answer: 0, lambda completions, answer, /: 0, lambda completions, *, answer, extra=1: 0],
    ids=["by name or place", "by place", "by name"],
)
def test_a_function_that_needs_what_nobody_gives_is_refused_before_work_starts(policy32, reward):
    engine = StarsEngine(policy32, reward)
    with pytest.raises(ValueError, match=r"'answer'.*columns="):
        engine.generate(PROMPTS, CONFIG, seed=0, columns={"other": [1, 2]})


def test_optional_parameters_by_place_keep_their_places(policy32):
    def reward(prompts, bonus=0.5, completions=(), /):
        assert bonus == 0.5
        return sum_reward(completions)

    expect_same_text(policy32, reward)


def test_a_batch_that_fails_where_each_alone_does_not_is_told_once_a_call(policy32):
    def reward(completions):
        if len(completions) > 1:
            raise MemoryError("too many at once")
        return sum_reward(completions)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expect_same_text(policy32, reward)
        told = [str(w.message) for w in caught]
        assert len(told) == 1 and "MemoryError: too many at once" in told[0] and "one by one" in told[0]
        expect_same_text(policy32, reward)
    assert len(caught) == 2


def test_a_failure_that_ends_its_request_is_told_there_alone(policy32, recwarn):
    def reward(prompts, completions):
        if [8] in prompts:
            raise KeyError("eight")
        return sum_reward(completions)

    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=0)
    assert out.errors[0] is None and "eight" in out.errors[1]
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["classifier", "function"])
def test_a_scorer_at_work_for_one_engine_is_refused_to_another(policy32, reward32, kind):
    scorer = ClassifierReward(reward32) if kind == "classifier" else CallableReward(sum_reward)
    first, second = StarsEngine(policy32, scorer), StarsEngine(policy32, scorer)
    whole = first.generate(PROMPTS, CONFIG, seed=0)
    stream = first.stream(PROMPTS, CONFIG, seed=0)
    next(stream)
    with pytest.raises(RuntimeError, match="is scoring for another call"):
        second.generate(PROMPTS, CONFIG, seed=0)
    assert all(event.error is None for event in stream)
    assert second.generate(PROMPTS, CONFIG, seed=0).rewards == pytest.approx(whole.rewards)


def test_chats_arrive_as_message_lists(policy32, tokenizer32):
    chats = [[{"role": "user", "content": "w5 w6"}], [{"role": "user", "content": "w7"}]]
    calls = []

    def reward(prompts, completions, completion_ids):
        calls.append((prompts, completions, completion_ids))
        return sum_reward(completion_ids)

    StarsEngine(policy32, reward, tokenizer=tokenizer32).generate(chats, CONFIG, seed=0)
    for prompts, completions, ids in calls:
        assert all(prompt in chats for prompt in prompts)
        for completion, tokens in zip(completions, ids, strict=True):
            text = tokenizer32.decode(tokens, skip_special_tokens=True)
            assert completion == [{"role": "assistant", "content": text}]


def test_reward_prompts_stand_in_for_the_prompts(policy32, tokenizer32, reward32):
    seen = []

    def reward(prompts, completion_ids):
        seen.extend(prompts)
        return sum_reward(completion_ids)

    StarsEngine(policy32, reward, tokenizer=tokenizer32).generate(
        ["w1", "w2"], CONFIG, seed=0, reward_prompts=["w8 w9", [{"role": "user", "content": "w3"}]]
    )
    assert all(prompt in ("w8 w9", [{"role": "user", "content": "w3"}]) for prompt in seen) and len(seen) > 2
    out = StarsEngine(policy32, reward32).generate(PROMPTS, CONFIG, seed=0, reward_prompts=[[1], [2, 3]])
    assert_scores(out, lambda i, tokens, _: fresh(reward32, [[1], [2, 3]][i] + tokens))


def test_reward_prompts_need_not_suit_the_policys_tokenizer():
    """A base model's tokenizer has no chat template; whoever reads messages or text does without one."""
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 100, template=LLAMA3)
    policy, reward = models_for(ours, theirs)
    seen = []

    def function(prompts, completion_ids):
        seen.extend(prompts)
        return sum_reward(completion_ids)

    StarsEngine(policy, function, tokenizer=ours).generate(["a"], CONFIG, seed=0, reward_prompts=[CHAT])
    assert seen[0] == CHAT
    StarsEngine(policy, function).generate([[9]], CONFIG, seed=0, reward_prompts=["the cat"])
    assert seen[-1] == "the cat"
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    out = engine.generate(["a"], CONFIG, seed=0, reward_prompts=[CHAT])
    prefix, tail = chat_prefix(theirs, CHAT), theirs.convert_tokens_to_ids(["<|eot_id|>"])

    def expected(i, tokens, finished):
        text = ours.decode(tokens, skip_special_tokens=True)
        text = text if finished else text.rstrip("\ufffd")
        return fresh(reward, prefix + theirs(text, add_special_tokens=False)["input_ids"] + tail)

    assert_scores(out, expected)


def test_a_reward_prompt_whose_ids_nobody_can_tell_is_named(policy32, reward32, tokenizer32):
    with pytest.raises(ValueError, match=r"reward_prompts\[1\] is text, but there is no tokenizer"):
        StarsEngine(policy32, reward32).generate(PROMPTS, CONFIG, reward_prompts=[[1], "w2"])
    bare = tiny_tokenizer(32)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"reward_prompts\[1\] does not fit the tokenizer's chat template"):
        StarsEngine(policy32, reward32, tokenizer=bare).generate(PROMPTS, CONFIG, reward_prompts=["w1", CHAT])


def test_a_function_may_reject_for_good_and_fail_for_some(policy32):
    def reward(prompts, completions):
        if [8] in prompts:
            raise KeyError("eight")
        return [-float("inf") if 9 in c else r for c, r in zip(completions, sum_reward(completions), strict=True)]

    out = StarsEngine(policy32, reward).generate(PROMPTS, CONFIG, seed=0, num_return_sequences=4)
    assert out.errors[:4] == [None] * 4
    assert all("KeyError" in error and "eight" in error for error in out.errors[4:])
    accepted = [segment for row in out.segments for segment in row if segment.accepted]
    assert all(9 not in segment.tokens for segment in accepted)


def test_a_reward_of_the_users_own_keeps_state_through_the_protocol(policy32):
    """Every completion that was scored is committed or discarded, and every response closed."""

    class Counting(Reward):
        def begin(self, prompts, max_new_tokens, rows, kv_cache_tokens):
            self.open, self.closed, self.ended = set(), 0, 0

        def score(self, completions):
            self.open.update(completions)
            return sum_reward([completion.tokens for completion in completions])

        def commit(self, completion):
            self.open.remove(completion)

        def discard(self, completion):
            self.open.remove(completion)

        def close(self, response):
            self.closed += bool(response.tokens)

        def end(self):
            self.ended += 1

    reward = Counting()
    expect_same_text(policy32, reward)
    assert not reward.open and reward.closed == len(PROMPTS) and reward.ended == 1


def test_a_reward_for_finished_answers_only_is_refused(policy32):
    class Final(Reward):
        partial = False

        def score(self, completions):
            return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"Final \(partial=False\)"):
        StarsEngine(policy32, Final()).generate(PROMPTS, CONFIG)


# Answers that the prompt begins

BEGUN = [*FILM, {"role": "assistant", "content": "I like"}]


def begun_ids(tokenizer, messages=BEGUN):
    return tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_dict=False)


def test_an_answer_that_the_prompt_begins_is_scored_as_one_turn():
    tokenizer = byte_bpe(300, template=CHATML)
    policy, reward = models_for(tokenizer)
    engine = StarsEngine(policy, reward, tokenizer=tokenizer, reward_tokenizer=tokenizer)
    out = engine.generate([BEGUN], CONFIG, seed=0, ignore_eos=True)
    prefix, tail = begun_ids(tokenizer), tokenizer("<|im_end|>\n")["input_ids"]
    assert out.sequences[0, : len(prefix)].tolist() == prefix
    assert_scores(out, lambda i, tokens, _: fresh(reward, prefix + tokens + tail))


def test_an_answer_that_the_prompt_begins_keeps_its_space_under_a_foreign_tokenizer():
    ours, theirs = sentencepiece(MISTRAL), byte_bpe(300, template=CHATML)
    scorer = ClassifierReward(reward := models_for(ours, theirs)[1], theirs, ours)
    scorer.begin([prompt := RewardPrompt(0, BEGUN, begun_ids(ours))], 8, 2, None)
    tokens = begun_ids(ours, [*FILM, {"role": "assistant", "content": "I like it very"}])[len(prompt.ids) :]
    assert ours.decode(tokens) == "it very"
    completion = Completion(Response(prompt), tokens, finished=True, tokenizer=ours)
    whole = [*FILM, {"role": "assistant", "content": "I like it very"}]
    with torch.no_grad():
        (score,) = scorer.score([completion])
        ids = theirs.apply_chat_template(whole, tokenize=True, return_dict=False)
        assert score == pytest.approx(fresh(reward, ids), abs=1e-4)
    scorer.end()


def test_a_function_sees_an_answer_that_the_prompt_begins_as_from_trl(policy32, tokenizer32):
    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    chat = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    tokenizer32 = copy.deepcopy(tokenizer32)
    tokenizer32.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    out = StarsEngine(policy32, reward, tokenizer=tokenizer32).generate([chat], CONFIG, seed=0, max_new_tokens=2)
    assert out.sequences[0, :6].tolist() == [1, 5, 6, 2, 1, 7]
    assert all(prompt == chat[:1] for prompt, _ in seen)
    contents = [completion[0]["content"] for _, completion in seen]
    assert "w7" in contents and all(content.startswith("w7") for content in contents)  # the empty answer among them


def test_a_scorer_with_a_text_of_its_own_refuses_an_answer_that_the_prompt_begins(policy32, tokenizer32):
    judge = JudgeReward(policy32, tokenizer32, yes="w4", no="w5", template="w1 {answer} w2")
    chat = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w7"}]
    with pytest.raises(ValueError, match=r"prompts\[1\] ends with an assistant's turn.*reward_prompts="):
        StarsEngine(policy32, judge, tokenizer=tokenizer32).stream([chat[:1], chat], CONFIG)


def test_text_that_begins_with_a_bos_gets_no_second_one_under_a_foreign_tokenizer():
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 90, add_bos=True)
    policy, reward = models_for(ours, theirs)
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    out = engine.generate(["<bos>the cat"], CONFIG, seed=0, ignore_eos=True)
    assert_scores(
        out,
        lambda i, tokens, finished: rescored(ours, theirs, reward, "the cat", tokens, finished, None),
    )


# Ids of another tokenizer


def another(policy_ids=(1, 2), reward_ids=(1, 2), more=0):
    """Two models by their bos and eos ids, the reward model with more embeddings."""
    names = ("bos_token_id", "eos_token_id")
    policy = tiny_policy(32, **dict(zip(names, policy_ids, strict=True)))
    return policy, tiny_reward(32 + more, **dict(zip(names, reward_ids, strict=True)))


def of_a_classifier(policy, reward):
    return reward


def of_a_weighted_sum(policy, reward):
    return WeightedSum({"liked": (1.0, ClassifierReward(reward))})


def of_an_implicit_pair(policy, reward):
    fields = {name: getattr(reward.config, name) for name in ("bos_token_id", "eos_token_id")}
    return ImplicitReward(*(tiny_policy(reward.config.vocab_size, seed=seed, **fields) for seed in (2, 3)))


@pytest.mark.parametrize("kind", [of_a_classifier, of_a_weighted_sum, of_an_implicit_pair])
@pytest.mark.parametrize(
    "models, found",
    [
        (another(more=1000), "1032 embeddings, the policy 32"),
        (another((1, 2), (0, [3, 4])), r"ids \[0\] and \[3, 4\], the policy \[1\] and \[2\]"),
    ],
    ids=["size", "ends"],
)
def test_a_reward_model_of_another_tokenizers_ids_is_warned_of(models, found, kind):
    policy, reward = models
    with pytest.warns(UserWarning, match=f"{found}.*tokenizer=.* of its own"):
        StarsEngine(policy, kind(policy, reward))


@pytest.mark.parametrize(
    "models",
    [another(more=399), another((1, 2), (1, 3)), another((1, 2), (None, 3)), another((1, 2), (0, [2, 3]))],
    ids=["padding", "another eos", "no bos", "an eos in common"],
)
def test_reward_models_of_the_same_family_are_not_warned_of(models, recwarn):
    StarsEngine(*models)
    assert not recwarn.list


def test_the_demo_models_are_not_warned_of(recwarn):
    policy, reward, tokenizer = demo.load()
    StarsEngine(policy, reward, tokenizer=tokenizer)
    assert not recwarn.list


def test_a_reward_model_with_a_tokenizer_of_its_own_is_not_warned_of(tokenizer32, recwarn):
    policy, reward = another(more=1000)
    StarsEngine(policy, reward, tokenizer=tokenizer32, reward_tokenizer=tiny_tokenizer(40))
    assert not recwarn.list
