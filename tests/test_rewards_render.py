"""Templates and tokenizers between policy and reward: the score is the plain one all the same."""

import random

import pytest
import torch
from conftest import tiny_reward, tiny_tokenizer
from histories import assert_scores, fresh
from tiny_tokenizers import (
    BEGUN,
    CHAT,
    CHATML,
    FILM,
    LLAMA3,
    MISTRAL,
    PLAIN,
    begun_ids,
    byte_bpe,
    chat_prefix,
    letters,
    metaspace,
    models_for,
    sentencepiece,
)

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import ClassifierReward, Completion, JudgeReward, Response, RewardPrompt, render
from stars_fast.rewards.render import Rendering
from stars_fast.text.template import SENTINEL

CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.5, beta=0.6, max_new_tokens=14)


def rescored(policy_tokenizer, reward_tokenizer, reward, prompt_text, tokens, finished, eos):
    """Tokenise the whole text afresh and score all of it."""
    text = policy_tokenizer.decode(tokens, skip_special_tokens=True)
    if not finished:
        text = text.rstrip("\ufffd")
    ids = reward_tokenizer(prompt_text + text)["input_ids"]
    if tokens[-1] == eos and reward_tokenizer.eos_token_id is not None:
        ids.append(reward_tokenizer.eos_token_id)
    return fresh(reward, ids)


# Chat templates


def test_the_same_tokenizer_given_twice_is_shared(policy32, reward32, tokenizer32):
    other = tiny_tokenizer(32)
    other.chat_template = None
    engine = StarsEngine(policy32, reward32, tokenizer=tokenizer32, reward_tokenizer=other)
    assert engine.reward.make_rendering(tokenizer32).shared_ids
    out = engine.generate(["w5 w6", "w7"], CONFIG, seed=0)
    assert_scores(out, lambda i, tokens, _: fresh(reward32, [[5, 6], [7]][i] + tokens))


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
    scorer.open([prompt], 8)
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


# As of published models: thoughts go into a block that is closed for every answer; the prompt opens it; the thought is
# left out; it is written anew.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in c else '' %}<think>\n{{ t }}\n"
    "</think>\n\n{{ c.split('</think>')[-1].lstrip('\n') }}{% else %}{{ c }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if opened %}<think>\n{% endif %}{% endif %}"
)
TEMPLATES = {
    "thinks": THINK,
    "opens": "{% set opened = true %}" + THINK,
    "leaves out": CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
    "renames": CHATML.replace("m['content']", "m['content'] | replace('<think>', '[T]') | replace('</think>', '[/T]')"),
    "trims": LLAMA3,
    "plain": CHATML,
}
ANSWERS = [
    "the cat",
    " the cat\n",
    "<think>\nhello\n</think>\n\nthe cat",
    "hello\n</think>\n\nthe cat",
    "<think>a</think>b",
]


def score_of(scorer, prompt, answer, ours, finished=True):
    """One answer, in a session of its own."""
    scorer.begin([prompt], 99, 2, None)
    scorer.open([prompt], 99)
    tokens = ours(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        (score,) = scorer.score([Completion(Response(prompt), tokens, finished=finished, tokenizer=ours)])
    scorer.end()
    return score.item()


def of_template(reward, tokenizer, messages, answer, **variables):
    """The model's own reward of the conversation as transformers renders it."""
    turns = [*messages, {"role": "assistant", "content": answer}]
    return fresh(reward, tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **variables))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "foreign"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_an_answer_is_scored_as_its_template_writes_it(template, shared):
    theirs = byte_bpe(300, template=template)
    ours = theirs if shared else byte_bpe(263)
    scorer = ClassifierReward(reward := models_for(ours, theirs)[1], theirs, ours)
    prompt = RewardPrompt(0, CHAT, None, tokenizer=theirs)
    for answer in ANSWERS:
        expected = of_template(reward, theirs, CHAT, answer)
        assert score_of(scorer, prompt, answer, ours) == pytest.approx(expected, abs=1e-4), answer


@pytest.mark.parametrize(
    "name, answer", [("thinks", "<think>\nhello"), ("opens", "hello"), ("opens", "<think>\nhello")]
)
def test_a_thought_that_is_not_closed_yet_stands_where_it_will_stand_once_it_is(name, answer):
    tokenizer = byte_bpe(300, template=TEMPLATES[name])
    scorer = ClassifierReward(reward := models_for(tokenizer)[1], tokenizer, tokenizer)
    asked = chat_prefix(tokenizer, CHAT)
    ids, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, "<|im_end|>\n"))
    score = score_of(scorer, RewardPrompt(0, CHAT, asked, tokenizer=tokenizer), answer, tokenizer, finished=False)
    assert score == pytest.approx(fresh(reward, asked + ids + tail), abs=1e-4)


def test_a_prompt_that_holds_what_stands_for_answers_is_shown_whole():
    tokenizer = byte_bpe(300, template=CHATML)
    scorer = ClassifierReward(reward := models_for(tokenizer)[1], tokenizer, tokenizer)
    for text in (SENTINEL, f"the {SENTINEL}R cat {SENTINEL}"):
        chat = [{"role": "user", "content": text}]
        expected = of_template(reward, tokenizer, chat, "you")
        assert score_of(scorer, RewardPrompt(0, chat, [1]), "you", tokenizer) == pytest.approx(expected, abs=1e-4)


def test_an_answer_that_the_prompt_begins_goes_on_from_what_the_policy_read():
    """Here a template that trims it, so that its last space is not the policy's."""
    tokenizer = byte_bpe(300, template=LLAMA3)
    policy, reward = models_for(tokenizer)
    begun = [*FILM, {"role": "assistant", "content": "I like "}]
    ids = tokenizer.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    tail = [tokenizer.convert_tokens_to_ids("<|eot_id|>")]

    def joins(completions, completion_ids):
        texts = ["I like" + tokenizer.decode(one, skip_special_tokens=True) for one in completion_ids]
        return [float(c[0]["content"] == text.rstrip("\ufffd")) for c, text in zip(completions, texts, strict=True)]

    classified, called = (
        StarsEngine(policy, one, tokenizer=tokenizer, reward_tokenizer=tokenizer) for one in (reward, joins)
    )
    for prompts, shown in (([begun], None), ([ids], [begun])):
        out = called.generate(prompts, CONFIG, seed=0, reward_prompts=shown, ignore_eos=True)
        assert {segment.reward for segment in out.segments[0][:-1]} == {1.0}
        out = classified.generate(prompts, CONFIG, seed=0, reward_prompts=shown, ignore_eos=True)
        assert_scores(out, lambda i, tokens, _: fresh(reward, ids + tokens + tail))


def test_the_reward_templates_variables_are_its_own_before_the_calls():
    tokenizer = byte_bpe(300, template="{{ tone }}" + CHATML)
    policy, reward = models_for(tokenizer)
    for own, call, tone in (({"tone": "a"}, {"tone": "b"}, "a"), (None, {"tone": "b"}, "b"), (None, None, "")):
        engine = StarsEngine(
            policy, reward, tokenizer=tokenizer, reward_tokenizer=tokenizer, reward_chat_template_kwargs=own
        )
        out = engine.generate([CHAT], CONFIG, seed=0, chat_template_kwargs=call, ignore_eos=True)
        before = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False, tone=tone)
        tail = tokenizer("<|im_end|>\n")["input_ids"]
        assert_scores(out, lambda i, tokens, _, before=before, tail=tail: fresh(reward, before + tokens + tail))
    with pytest.raises(ValueError, match="reward_chat_template_kwargs"):
        StarsEngine(policy, lambda completions: [], tokenizer=tokenizer, reward_chat_template_kwargs={"a": 1})


def test_of_named_templates_the_default_is_read():
    plain, named = (byte_bpe(300, template=LLAMA3) for _ in range(2))
    named.chat_template = {"default": LLAMA3, "rag": CHATML}
    policy, reward = models_for(plain)
    chat = [{"role": "user", "content": "the cat"}]
    one, other = (
        StarsEngine(policy, reward, tokenizer=tokenizer, reward_tokenizer=tokenizer).generate([chat], CONFIG, seed=0)
        for tokenizer in (plain, named)
    )
    assert other.errors == [None] and (other.texts, other.rewards) == (one.texts, one.rewards)


def test_a_template_that_does_not_show_the_answer_is_refused(tokenizer32, policy32, reward32):
    other = tiny_tokenizer(32)
    other.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    engine = StarsEngine(policy32, reward32, tokenizer=tokenizer32, reward_tokenizer=other)
    with pytest.raises(ValueError, match="verbatim"):
        engine.generate(["w1"], CONFIG)


# Another tokenizer than the policy's


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
    assert not engine.reward.make_rendering(ours).shared_ids
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
    scorer.open([prompt], 20)
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

    def expected(i, tokens, finished):
        text = ours.decode(tokens, skip_special_tokens=True)
        return of_template(reward, theirs, CHAT, text if finished else text.rstrip("\ufffd"))

    assert_scores(out, expected, samples=4)


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


@pytest.mark.parametrize("template", [MISTRAL, PLAIN], ids=["mistral", "plain"])
@pytest.mark.parametrize("answer", ["I like it", "abc", "the film. I"])
def test_a_foreign_chat_and_its_answer_are_tokenised_in_one_piece(template, answer):
    """Apart, a SentencePiece tokenizer would put a space of its own in front of the answer, or of what follows it."""
    ours, theirs = byte_bpe(263), sentencepiece(template)
    scorer = ClassifierReward(reward := models_for(ours, theirs)[1], theirs, ours)
    scorer.begin([prompt := RewardPrompt(0, FILM, [1])], 40, 2, None)
    scorer.open([prompt], 40)
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
    ids, tail = rendering.target(context, completion, causal=True)
    assert ids + tail == expected


def test_text_that_begins_with_a_bos_gets_no_second_one_under_a_foreign_tokenizer():
    ours, theirs = byte_bpe(263 + 40), byte_bpe(263 + 90, add_bos=True)
    policy, reward = models_for(ours, theirs)
    engine = StarsEngine(policy, reward, tokenizer=ours, reward_tokenizer=theirs)
    out = engine.generate(["<bos>the cat"], CONFIG, seed=0, ignore_eos=True)
    assert_scores(
        out,
        lambda i, tokens, finished: rescored(ours, theirs, reward, "the cat", tokens, finished, None),
    )


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


# Answers that the prompt begins


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
    scorer.open([prompt], 8)
    tokens = begun_ids(ours, [*FILM, {"role": "assistant", "content": "I like it very"}])[len(prompt.ids) :]
    assert ours.decode(tokens) == "it very"
    completion = Completion(Response(prompt), tokens, finished=True, tokenizer=ours)
    whole = [*FILM, {"role": "assistant", "content": "I like it very"}]
    with torch.no_grad():
        (score,) = scorer.score([completion])
        ids = theirs.apply_chat_template(whole, tokenize=True, return_dict=False)
        assert score == pytest.approx(fresh(reward, ids), abs=1e-4)
    scorer.end()


def test_a_scorer_with_a_text_of_its_own_refuses_an_answer_that_the_prompt_begins(policy32, tokenizer32):
    judge = JudgeReward(policy32, tokenizer32, yes="w4", no="w5", template="w1 {answer} w2")
    chat = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w7"}]
    with pytest.raises(ValueError, match=r"prompts\[1\] ends with an assistant's turn.*reward_prompts="):
        StarsEngine(policy32, judge, tokenizer=tokenizer32).stream([chat[:1], chat], CONFIG)


def test_vocabularies_are_compared_and_habits_told_by_the_prompt_and_not_by_the_candidate(monkeypatch, policy32):
    compared, told = [], []
    same, habits_of = render.same_vocabulary, Rendering._habits_of
    monkeypatch.setattr(render, "same_vocabulary", lambda *pair: compared.append(pair) or same(*pair))
    monkeypatch.setattr(Rendering, "_habits_of", lambda *asked: told.append(1) or habits_of(*asked))
    reward = tiny_reward(40)
    engine = StarsEngine(policy32, reward, tokenizer=tiny_tokenizer(32), reward_tokenizer=tiny_tokenizer(40))
    assert not compared
    out = engine.generate(["w1", "w2"], seed=0, max_attempts=8, max_new_tokens=32, segment_length=4, target_reward=9.0)
    assert len(told) == 2 and len(compared) == 2, "at the check and at the beginning"
    assert sum(segment.attempts for row in out.segments for segment in row) > 8
