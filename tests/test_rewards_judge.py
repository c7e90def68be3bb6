"""The judge's verdict on every candidate is that of a plain forward pass over the whole question."""

import re
import warnings

import pytest
import torch
from conftest import tiny_policy
from histories import assert_engine_agrees, live, text_prompts
from tiny_tokenizers import CHATML, byte_bpe

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import JudgeReward, RewardPrompt
from stars_fast.rewards.judge import QUESTION
from stars_fast.text.template import SENTINEL

CONFIG = StarsConfig(segment_length=4, max_attempts=4, target_reward=1.0, beta=0.6, max_new_tokens=10)
TEXTS = ["the cat sat", "hello {answer}", "you"]
# The tokenizer made here knows no whole "Yes".
pytestmark = pytest.mark.filterwarnings("ignore:the verdict .* has")


@torch.no_grad()
def verdict(model, tokenizer, before, answer, after):
    """Log-odds of Yes against No, by one plain pass; ``answer`` is ids or text."""
    if isinstance(answer, str):
        ids = tokenizer(before + answer, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(before, add_special_tokens=False)["input_ids"] + answer
    ids = ids + tokenizer(after, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    return (logits[yes] - logits[no]).item()


def asked(tokenizer, prompt):
    """Text in front of the answer and behind it."""
    before, after = f"Question:\n{prompt}\n\nAnswer:\n", f"\n\n{QUESTION} Reply with Yes or No."
    if tokenizer.chat_template:
        before, after = f"<|im_start|>user\n{before}", f"{after}<|im_end|>\n<|im_start|>assistant\n"
    return before, after


def draw(chance):
    return [chance.randrange(10, 260) for _ in range(chance.randint(1, 4))]


@pytest.fixture(scope="module", params=[CHATML, None], ids=["chat", "plain"])
def tokenizer(request):
    return byte_bpe(300, template=request.param)


@pytest.mark.parametrize("slots", [2000, 420])
def test_the_verdict_is_exact_after_any_history(tokenizer, slots):
    model = tiny_policy(300, seed=4, positions=512)

    def expected(completion):
        before, after = asked(tokenizer, completion.response.prompt.source)
        tokens = completion.tokens[:-1] if completion.eos else completion.tokens
        return verdict(model, tokenizer, before, tokens, after)

    scorer = JudgeReward(model, tokenizer)
    live(scorer, text_prompts(TEXTS, tokenizer), expected, draw=draw, slots=slots, tokenizer=tokenizer, eos=1, rounds=8)


def test_a_judge_with_another_tokenizer_reads_the_text(tokenizer):
    ours = byte_bpe(263 + 20)
    model = tiny_policy(300, seed=4, positions=512)

    def expected(completion):
        before, after = asked(tokenizer, completion.response.prompt.source)
        return verdict(model, tokenizer, before, completion.text, after)

    live(JudgeReward(model, tokenizer), text_prompts(TEXTS, ours), expected, draw=draw, tokenizer=ours, rounds=5)


def test_the_policy_judges_itself(tokenizer):
    policy = tiny_policy(300, seed=5, positions=512, eos_token_id=1)
    engine = StarsEngine(policy, JudgeReward(policy, tokenizer), tokenizer=tokenizer)

    def expected(i, tokens, ends, eos):
        before, after = asked(tokenizer, TEXTS[i])
        return verdict(policy, tokenizer, before, tokens[:-1] if eos else tokens, after)

    out = assert_engine_agrees(engine, TEXTS, CONFIG, expected, num_return_sequences=2)
    assert any(segment.attempts > 1 for row in out.segments for segment in row)


def test_chats_are_shown_turn_by_turn_and_ids_without_a_tokenizer_are_the_judges(tokenizer):
    scorer = JudgeReward(tiny_policy(300, positions=512), tokenizer, template="{prompt}|{answer}|")
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert "system: s\nuser: u|" in tokenizer.decode(scorer.context(RewardPrompt(0, chat, [1])).prefix)
    assert "the cat|" in tokenizer.decode(scorer.context(RewardPrompt(0, ids, ids)).prefix)


def test_bad_questions_are_refused(tokenizer):
    model = tiny_policy(300, positions=512)
    with pytest.raises(ValueError, match=r"holds \{answer\} 0 times"):
        JudgeReward(model, tokenizer, template="{prompt}")
    with pytest.raises(ValueError, match="same token"):
        JudgeReward(model, tokenizer, yes="No")
    with pytest.raises(ValueError, match="has no tokens"):
        JudgeReward(model, tokenizer, yes="")
    with pytest.raises(TypeError, match="model is a str"):
        JudgeReward("some/judge", tokenizer)
    with pytest.raises(TypeError, match="tokenizer is a NoneType"):
        JudgeReward(model, None)
    with pytest.raises(ValueError, match="outside the judge's vocabulary of 40"):
        JudgeReward(tiny_policy(40), tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[1\] has \d+ tokens.*positions limit of 160"):
        StarsEngine(
            tiny_policy(300, positions=512),
            JudgeReward(tiny_policy(300, positions=160), tokenizer),
            tokenizer=tokenizer,
        ).generate(["a", "the cat " * 40], CONFIG)


def test_a_verdict_of_which_only_the_beginning_is_read_is_warned_of(tokenizer):
    model = tiny_policy(300, positions=512)
    ids = tokenizer("No, never", add_special_tokens=False)["input_ids"]
    first = re.escape(repr(tokenizer.decode(ids[:1])))
    with pytest.warns(UserWarning, match=rf"verdict 'No, never' has {len(ids)} tokens.*first alone, {first}"):
        JudgeReward(model, tokenizer, yes="Y", no="No, never")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        JudgeReward(model, tokenizer, yes="Y", no="N")


def test_ids_of_a_rendered_chat_are_refused_and_its_messages_are_not():
    tokenizer = byte_bpe(300, template=CHATML)
    chat = [{"role": "user", "content": "the cat sat"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    policy = tiny_policy(300, seed=5, positions=512, eos_token_id=1)
    engine = StarsEngine(policy, JudgeReward(policy, tokenizer), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[0\] is given as ids of a rendered chat.*reward_prompts="):
        engine.generate([ids], CONFIG)
    given = engine.generate([ids], CONFIG, seed=0, reward_prompts=[chat])
    assert given.completions == engine.generate([chat], CONFIG, seed=0).completions


def test_a_question_that_names_a_field_is_only_text(tokenizer):
    question = "does {answer} help {prompt}?"
    scorer = JudgeReward(tiny_policy(300, positions=512), tokenizer, question=question, template="{answer}|{question}")
    context = scorer.context(RewardPrompt(0, "the cat", None, tokenizer=tokenizer))
    assert tokenizer.decode(context.tail).startswith(f"|{question}")


def test_a_judge_without_the_ids_of_its_question_says_where_they_come_from():
    tokenizer = byte_bpe(300)
    template = "{prompt}{answer} the cat sat on the mat"
    scorer = JudgeReward(tiny_policy(270, positions=512), tokenizer, template=template, yes="Y", no="N")
    with pytest.raises(ValueError, match=r"template holds id 2\d\d, outside the reward model's vocabulary of 270"):
        scorer.open([RewardPrompt(0, "a", None, tokenizer=tokenizer)], 8)
    scorer.end()


def test_a_prompt_that_holds_what_stands_for_answers_is_only_text(tokenizer):
    scorer = JudgeReward(tiny_policy(300, positions=512), tokenizer)
    context = scorer.context(RewardPrompt(0, f"the {SENTINEL} cat", None, tokenizer=tokenizer))
    before, after = asked(tokenizer, f"the {SENTINEL} cat")
    assert tokenizer.decode(context.prefix) == before and tokenizer.decode(context.tail) == after


def test_the_judges_template_has_variables_of_its_own(tokenizer):
    thinking = byte_bpe(300, template=CHATML + "{% if enable_thinking is false %}<think></think>{% endif %}")
    for variables, end in (({"enable_thinking": False}, "<think></think>"), (None, "<|im_start|>assistant\n")):
        scorer = JudgeReward(tiny_policy(300, positions=512), thinking, chat_template_kwargs=variables)
        prompt = RewardPrompt(0, "the cat", None, tokenizer=thinking, chat_template_kwargs={"enable_thinking": True})
        assert thinking.decode(scorer.context(prompt).tail).endswith(end)
    with pytest.raises(ValueError, match="chat_template_kwargs sets 'tokenize'"):
        JudgeReward(tiny_policy(300, positions=512), thinking, chat_template_kwargs={"tokenize": True})
