"""Scorers of prompts with pictures give what plain forward passes give that see them, or say why they do not."""

import copy
import dataclasses
import itertools
import shutil

import pytest
import torch
from conftest import refused, tiny_policy, tiny_reward
from histories import fresh, live
from safetensors.torch import load_file, save_file
from tiny_pictures import (
    IMAGE,
    VOCAB,
    asked,
    gemma3,
    gemma3_processor,
    llava,
    llava_processor,
    paligemma,
    picture,
    processed,
    qwen2_5_vl,
    qwen_inputs,
)
from tiny_vision import answer_logprobs, answered, randomised
from transformers import (
    Gemma3ForSequenceClassification,
    LlavaModel,
    LlavaPreTrainedModel,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from stars_fast import StarsConfig, StarsEngine
from stars_fast.rewards import (
    ClassifierReward,
    Completion,
    GroundingReward,
    ImplicitReward,
    JudgeReward,
    ProcessReward,
    Response,
    RewardPrompt,
    RuleReward,
    ValueHeadReward,
    WeightedSum,
    noised,
)
from stars_fast.text.media import forward_arguments
from stars_fast.text.prompts import read_prompts
from stars_fast.tree.model import TreeModel
from stars_fast.tree.prefixes import LEAST

WORDS = [list(range(start, start + length)) for start, length in ((10, 3), (30, 1), (50, 5), (71, 2))]
CHATS = [asked(picture(0)), asked(picture(1), picture(2, 32, 32), text="and these?")]


def read(prompts, model, processor=None):
    """Prompts as an engine of this policy hands them to a scorer."""
    tokenizer = getattr(processor, "tokenizer", None)
    found = read_prompts(prompts, tokenizer, processor=processor, takes=forward_arguments(model))
    return [
        RewardPrompt(i, prompt.source, prompt.ids, tokenizer=tokenizer, media=prompt.media)
        for i, prompt in enumerate(found)
    ]


def draw(chance):
    return list(chance.choice(WORDS))


def alone(media):
    """The inputs of a prompt that a processor made for itself."""
    return dict(media.inputs)


def of_row(media):
    """Those of a row of :func:`qwen_inputs`, without its padding."""
    there, grid = media.inputs["attention_mask"][media.row].bool(), media.inputs["image_grid_thw"]
    pixels = media.inputs["pixel_values"].split(grid.prod(-1).tolist())[media.row]
    rows = {name: media.inputs[name][media.row, there][None] for name in ("input_ids", "mm_token_type_ids")}
    return rows | {"pixel_values": pixels, "image_grid_thw": grid[media.row : media.row + 1]}


def logprob(model, inputs, answer, kind=0):
    return answer_logprobs(model, inputs, answer, kind).sum().item()


FAMILIES = {
    "llava": (llava, lambda: read(CHATS, llava(), llava_processor()), alone),
    "gemma3": (gemma3, lambda: read(CHATS, gemma3(), gemma3_processor()), alone),
    "qwen2.5": (qwen2_5_vl, lambda: read(qwen_inputs((4, 8), (8, 4), (4, 4)), qwen2_5_vl()), of_row),
}


@pytest.mark.parametrize("family, slots", [("llava", 2000), *((family, 90) for family in FAMILIES)])
def test_the_log_ratio_sees_the_pictures_after_any_history(family, slots):
    make, prompts, inputs = FAMILIES[family]
    pair = [make(seed) for seed in (1, 2)]
    scorer = ImplicitReward(*pair, beta=0.5)

    def expected(completion):
        given = inputs(completion.response.prompt.media)
        ours, reference = (logprob(model, given, completion.tokens) for model in pair)
        return 0.5 * (ours - reference)

    live(scorer, prompts(), expected, draw=draw, slots=slots, rounds=4, seed=slots)


def test_a_pair_that_sees_prompts_in_both_directions_reads_text_whole_too():
    pair, text = [paligemma(seed) for seed in (1, 2)], [1, 5, 9, 7, 30]
    ids = torch.tensor([[IMAGE] * 16 + text])
    seen = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    scorer = ImplicitReward(*pair)

    def expected(completion):
        prompt = completion.response.prompt
        given = torch.tensor([prompt.ids])
        given = {**(prompt.media.inputs if prompt.media else {}), "input_ids": given, "token_type_ids": 0 * given}
        ours, reference = (logprob(model, given, completion.tokens, kind=1) for model in pair)
        return ours - reference

    live(scorer, [*read(seen, pair[0]), RewardPrompt(1, text, text)], expected, draw=draw, slots=90, rounds=5)


def as_rendered(processor, prompt, answer, chat=None):
    """What the processor itself makes of the prompt's chat, as far as the answer's end."""
    form = {"add_generation_prompt": True, "tokenize": False}
    text = processor.apply_chat_template(prompt.source if chat is None else chat, **form) + answer
    made = processor(text=[text], images=[prompt.media.images], return_tensors="pt", add_special_tokens=False)
    return {name: value for name, value in made.items() if name in ("input_ids", "pixel_values")}


def test_a_foreign_pair_reads_chat_and_pictures_with_its_own_processor():
    pair, processor = [llava(seed) for seed in (1, 2)], llava_processor()
    prompts = read(CHATS, gemma3(), gemma3_processor())
    scorer = ImplicitReward(*pair, processor=processor)

    def expected(completion):
        prompt, total = completion.response.prompt, 0.0
        before, whole = (as_rendered(processor, prompt, text) for text in ("", completion.text))
        answer = whole["input_ids"][0, before["input_ids"].shape[1] :].tolist() + [2] * completion.eos
        for model, sign in zip(pair, (1, -1), strict=True):
            total += sign * logprob(model, before, answer)
        return total

    live(scorer, prompts, expected, draw=draw, rounds=5, tokenizer=prompts[0].tokenizer, eos=2)


def test_a_judge_is_shown_the_pictures_in_front_of_its_question():
    judge, processor = llava(3), llava_processor()
    scorer = JudgeReward(judge, processor=processor, yes="Y", no="N", template="{prompt}|{answer}|{question}")
    verdicts = [processor.tokenizer(word)["input_ids"][0] for word in "YN"]

    @torch.no_grad()
    def expected(completion):
        prompt = completion.response.prompt
        asks = f"{prompt.source[0]['content'][-1]['text']}|{completion.text}|{scorer.question}"
        content = [*prompt.source[0]["content"][:-1], {"type": "text", "text": asks}]
        inputs = as_rendered(processor, prompt, "", [{"role": "user", "content": content}])
        yes, no = judge(**inputs, use_cache=False).logits[0, -1, verdicts].tolist()
        return yes - no

    prompts = read(CHATS, gemma3(), gemma3_processor())
    live(scorer, prompts, expected, draw=draw, slots=190, rounds=4, tokenizer=prompts[0].tokenizer)


class SteppedLlava(LlavaPreTrainedModel):
    """A process reward model of two labels."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlavaModel(config)
        self.score = torch.nn.Linear(config.text_config.hidden_size, 2)
        self.post_init()


def test_a_classifier_of_steps_reads_the_pictures_in_front_of_them():
    model, processor = randomised(SteppedLlava(llava().config), 3), llava_processor()
    scorer = ProcessReward.qwen(model, processor=processor, step_token="|", system=None, aggregate="mean")
    mark = processor.tokenizer("|")["input_ids"][0]

    @torch.no_grad()
    def expected(completion):
        ends = [*completion.response.ends, len(completion.tokens)]
        steps = [completion.tokens[a:b] for a, b in zip([0, *ends], ends, strict=False) if b > a]
        text = "".join(f"{completion.tokenizer.decode(step).strip()}|" for step in steps or [[]])
        inputs = as_rendered(processor, completion.response.prompt, text)
        scores = model.score(model.model(**inputs, use_cache=False).last_hidden_state[0]).softmax(-1)[:, 1]
        return scores[inputs["input_ids"][0] == mark].mean().item()

    prompts = read(CHATS, gemma3(), gemma3_processor())
    live(scorer, prompts, expected, draw=draw, rounds=4, tokenizer=prompts[0].tokenizer)


def test_a_process_reward_model_reads_the_pictures_in_its_first_turn():
    model, processor = llava(4), llava_processor()
    labels = processor.tokenizer("+-")["input_ids"]
    scorer = ProcessReward.rlhflow(model, processor=processor, aggregate="min")

    @torch.no_grad()
    def expected(completion):
        prompt = completion.response.prompt
        *images, question = prompt.source[0]["content"]
        ends = [*completion.response.ends, len(completion.tokens)]
        steps = [completion.tokens[a:b] for a, b in zip([0, *ends], ends, strict=False) if b > a]
        steps = [completion.tokenizer.decode(step).strip() for step in steps] or [""]
        scores, turns = [], []
        for place, step in enumerate(steps):
            text = f"{question['text']} {step}" if place == 0 else step
            turns.append({"role": "user", "content": [*(images if place == 0 else ()), {"type": "text", "text": text}]})
            shown = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            made = processor(text=[shown], images=[prompt.media.images], return_tensors="pt", add_special_tokens=False)
            inputs = {name: made[name] for name in ("input_ids", "pixel_values")}
            scores.append(model(**inputs, use_cache=False).logits[0, -1, labels].softmax(-1)[0].item())
            turns.append({"role": "assistant", "content": [{"type": "text", "text": "+"}]})
        return min(scores)

    prompts = read(CHATS, gemma3(), gemma3_processor())
    live(scorer, prompts, expected, draw=draw, rounds=4, tokenizer=prompts[0].tokenizer)


class ValuedQwen(Qwen2_5_VLPreTrainedModel):
    """A vision-language model with one value at the last token."""

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2_5_VLModel(config)
        self.score = torch.nn.Linear(config.text_config.hidden_size, 1, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(hidden[:, -1]))


def labelled(config):
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


CLASSIFIERS = {
    "gemma3": lambda: randomised(Gemma3ForSequenceClassification(labelled(gemma3().config)), 3),
    "qwen2.5": lambda: randomised(ValuedQwen(labelled(qwen2_5_vl().config)), 3),
}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_reads_what_the_policy_reads(family):
    model, (_, prompts, inputs) = CLASSIFIERS[family](), FAMILIES[family]
    scorer = ClassifierReward(model)

    @torch.no_grad()
    def expected(completion):
        given = answered(inputs(completion.response.prompt.media), completion.tokens)
        return model.score(model.model(**given, use_cache=False).last_hidden_state[0, -1]).item()

    assert scorer.tree_model is not None
    live(scorer, prompts(), expected, draw=draw, slots=100, rounds=3)


def a_blank(inputs):
    return {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], 0.1)}


def a_blank_in_place(inputs):
    inputs["pixel_values"].fill_(0.1)
    return inputs


@pytest.mark.parametrize(("noise", "dimmed"), [(300, lambda inputs: noised(inputs, 300)), (a_blank_in_place, a_blank)])
def test_grounding_is_what_an_answer_gains_by_the_pictures_being_clear(noise, dimmed):
    model, processor = llava(), llava_processor()
    scorer = GroundingReward(model, noise=noise, beta=2.0)

    def expected(completion):
        inputs = alone(completion.response.prompt.media)
        clear, dim = (logprob(model, one, completion.tokens) for one in (inputs, dimmed(inputs)))
        return 2.0 * (clear - dim)

    prompts = read(CHATS, model, processor)
    live(scorer, prompts, expected, draw=draw, rounds=5)
    assert abs(expected(Completion(Response(prompts[0]), WORDS[0]))) > 0.01


def test_noise_is_vcds_and_each_pictures_own():
    inputs = qwen_inputs((4, 8), (8, 4), (4, 4))
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].roll(16, 0), "image_grid_thw": torch.tensor(
        [[1, 4, 4], [1, 4, 8], [1, 8, 4]])}  # fmt: skip
    assert torch.equal(noised(swapped)["pixel_values"], noised(inputs)["pixel_values"].roll(16, 0))
    assert torch.equal(noised(inputs)["pixel_values"], noised(inputs)["pixel_values"])
    kept = torch.cumprod(1 - (torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5), 0)[500]
    pixels = torch.randn(3, 2, 3, 32, 32)
    pixels[1, 1], pixels[2, :, :, 20:] = 0.0, 0.0  # a picture that fills a row up, and pictures that end early
    dim = noised({"pixel_values": pixels})["pixel_values"]
    assert torch.equal(dim == 0, pixels == 0)
    noise = (dim - kept.sqrt() * pixels)[0] / (1 - kept).sqrt()
    assert noise.mean().abs() < 0.05 and abs(noise.std() - 1) < 0.05
    assert (noise[0] - noise[1]).abs().mean() > 1  # two pictures of one size
    assert torch.equal(noised({"pixel_values": pixels[2:, :, :, :20]})["pixel_values"], dim[2:, :, :, :20])
    with refused("pixel_values", "input_ids"):
        noised({"input_ids": torch.tensor([[1]])})
    with refused("step=1000", "at most 999"):
        noised(inputs, 1000)


def test_a_value_head_is_found_in_a_folder_and_read_behind_the_template(tmp_path):
    model, processor, v_head = qwen2_5_vl(5), llava_processor(), randomised(torch.nn.Linear(32, 1), 3)
    model.save_pretrained(tmp_path / "apart")
    processor.tokenizer.save_pretrained(tmp_path / "apart")
    head = {f"v_head.summary.{name}": value for name, value in v_head.state_dict().items()}
    with pytest.raises(ValueError, match=r"no v_head\.summary\.weight"):
        ValueHeadReward.from_pretrained(str(tmp_path / "apart"), processor=processor)
    save_file(head, tmp_path / "apart" / "value_head.safetensors", metadata={"format": "pt"})
    shutil.copytree(tmp_path / "apart", tmp_path / "inside")
    (tmp_path / "inside" / "value_head.safetensors").unlink()
    weights = load_file(tmp_path / "inside" / "model.safetensors")
    save_file(weights | head, tmp_path / "inside" / "model.safetensors", metadata={"format": "pt"})
    prompts = read(qwen_inputs((4, 8), (8, 4)), model)
    for place in ("apart", "inside"):
        scorer = ValueHeadReward.from_pretrained(str(tmp_path / place), tokenizer="policy", tail=[7, 8])

        @torch.no_grad()
        def expected(completion):
            given = answered(of_row(completion.response.prompt.media), [*completion.tokens, 7, 8])
            return v_head(model.model(**given, use_cache=False).last_hidden_state[0, -1]).item()

        live(scorer, prompts, expected, draw=draw, rounds=3)


def test_a_part_of_a_sum_may_read_a_chats_text_alone_beside_one_that_sees_its_pictures():
    pair, own, classifier = (llava(1), llava(2)), llava_processor().tokenizer, tiny_reward(VOCAB)
    own.chat_template = llava_processor().chat_template
    parts = {"seen": (1.0, ImplicitReward(*pair)), "kind": (0.5, ClassifierReward(classifier, own))}
    prompts = read(CHATS, pair[0], llava_processor())

    def expected(completion):
        prompt = completion.response.prompt
        given, said = alone(prompt.media), [{"role": "user", "content": prompt.source[0]["content"][-1]["text"]}]
        ours, reference = (logprob(model, given, completion.tokens) for model in pair)
        ids = own.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        return ours - reference + 0.5 * fresh(classifier, [*ids, *completion.tokens])

    live(WeightedSum(parts, text_only=["kind"]), prompts, expected, draw=draw, slots=2000, rounds=4)
    with refused(r"prompts\[0\] has pictures", "text_only="):
        WeightedSum(parts).check(prompts, 8, None)
    with refused(r"prompts\[0\] is what a processor made", "give the chat"):
        WeightedSum(parts, text_only=["kind"]).check(read(processed(llava_processor(), CHATS[0]), pair[0]), 8, None)
    with refused("text_only", "no part 'kin'", "seen, kind"):
        WeightedSum(parts, text_only="kin")


CONFIG = StarsConfig(segment_length=4, max_attempts=4, target_reward=1.0, base_reward=0.0, beta=0.5, max_new_tokens=8)


def test_the_engine_guides_answers_to_pictures_alike_however_many_candidates():
    policy, processor = llava(), llava_processor()
    rewards = [
        ImplicitReward(llava(1), llava(2)),
        GroundingReward(policy),
        JudgeReward(gemma3(3), processor=gemma3_processor(), yes="Y", no="N"),
    ]
    for reward in rewards:
        engine = StarsEngine(policy, reward, processor=processor)
        outputs = [
            engine.generate([*CHATS, *CHATS[:1]], CONFIG, seed=[1, 2, 1], candidates=candidates)
            for candidates in (1, 4)
        ]
        outputs.append(engine.generate(CHATS[:1], CONFIG, seed=[1]))
        assert all(error is None for output in outputs for error in output.errors)
        assert outputs[0].completions == outputs[1].completions
        assert outputs[0].completions[0] == outputs[0].completions[2] == outputs[2].completions[0]
        assert any(segment.attempts > 1 for row in outputs[0].segments for segment in row)
        assert outputs[0].rewards == pytest.approx(outputs[1].rewards, abs=1e-4)


def test_scorers_that_would_not_see_the_pictures_say_what_to_give_them():
    model, processor = llava(), llava_processor()
    chats = read(CHATS, model, processor)
    inputs = read(processed(processor, CHATS[1]), model)
    inputs[0].tokenizer = processor.tokenizer
    foreign = gemma3_processor()
    bare = copy.copy(processor.tokenizer)
    bare.chat_template = None
    marked = copy.copy(processor.tokenizer)
    marked.chat_template = processor.chat_template + " "
    same = copy.copy(processor.tokenizer)
    same.chat_template = processor.chat_template
    alike = [dataclasses.replace(prompt, tokenizer=same) for prompt in chats]
    of_text = [tiny_policy(VOCAB, seed=seed) for seed in (0, 1)]
    cases = [
        (ImplicitReward(llava(), llava(1), tokenizer=copy.copy(same)), alike, ()),
        (ImplicitReward(llava(), llava(1), tokenizer=same, chat_template_kwargs={"a": 1}), alike, ("processor=",)),
        (ClassifierReward(tiny_reward(VOCAB)), chats, ("pictures", "ClassifierReward", "text alone", "rule")),
        (ImplicitReward(*of_text), inputs, ("pictures", "ImplicitReward", "text")),
        (ImplicitReward(llava(), llava(1), tokenizer=marked), chats, ("pictures", "processor=")),
        (ImplicitReward(gemma3(), gemma3(1), processor=foreign), inputs, ("what a processor made", "chat")),
        (JudgeReward(model, bare, yes="Y", no="N"), chats, ("pictures", "processor=")),
        (JudgeReward(gemma3(), processor=foreign, yes="Y", no="N"), inputs, ("what a processor made", "chat")),
        (ImplicitReward(qwen2_5_vl(), qwen2_5_vl(1)), read(qwen_inputs((4, 4)), qwen2_5_vl()), ()),
        (ImplicitReward(llava(), llava(1)), read(qwen_inputs((4, 4)), qwen2_5_vl()), ("image_grid_thw", "processor=")),
        (ImplicitReward(llava(), llava(1), tokenizer=same), [dataclasses.replace(alike[0], media=None)], ("without",)),
        (GroundingReward(model), [RewardPrompt(0, [5, 6], [5, 6])], ("no pictures", "GroundingReward")),
    ]
    for scorer, prompts, words in cases:
        for ask in (scorer.check, lambda prompts, new, slots, scorer=scorer: scorer.begin(prompts, new, 1, slots)):
            if not words:
                ask(prompts, 8, None)
                continue
            with refused(r"prompts\[0\]", *words):
                ask(prompts, 8, None)
        scorer.end()
    with refused("processor", "transformers processor"):
        JudgeReward(model, processor=processor.tokenizer)
    with refused("tokenizer='policy'", "processor="):
        ImplicitReward(llava(), llava(1), tokenizer="policy", processor=processor)
    with refused("tokenizer has", "processor=", "leave tokenizer= out"):
        JudgeReward(model, foreign.tokenizer, processor=processor)
    ends = dict(processor(text=["what is <image>"], images=[[picture(0)]], return_tensors="pt"))
    ends.pop("token_type_ids", None)
    with refused(r"prompts\[0\]", "picture", "last"):
        ImplicitReward(llava(), llava(1)).check(read(ends, model), 8, None)


def test_a_reward_model_by_name_comes_with_the_processor_beside_it(tmp_path):
    policy, processor = llava(), llava_processor()
    torch.manual_seed(0)
    classifier = Gemma3ForSequenceClassification(dataclasses.replace(gemma3().config, num_labels=1)).eval()
    classifier.save_pretrained(tmp_path)
    call = dict(method="vanilla", max_new_tokens=4, seed=0, on_error="raise")
    own = StarsEngine(policy, ClassifierReward(classifier, processor=gemma3_processor()), processor=processor)
    expected = own.generate(CHATS, **call).rewards
    gemma3_processor().tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"reward='{tmp_path}' takes pictures.*pass reward_tokenizer="):
        bare = StarsEngine(policy, tmp_path, processor=processor)
    with refused(r"prompts\[0\]", "processor=", "reward_tokenizer="):
        bare.generate(CHATS, **call)
    given = StarsEngine(policy, classifier, processor=processor, reward_tokenizer=gemma3_processor())
    gemma3_processor().save_pretrained(tmp_path)
    named = StarsEngine(policy, tmp_path, processor=processor)
    for engine in (given, named):
        assert engine.generate(CHATS, **call).rewards == pytest.approx(expected, abs=1e-5)


def test_a_vision_language_model_is_no_reward_model_by_name(tmp_path):
    llava().config.save_pretrained(tmp_path)
    with refused("reward='", "LlavaConfig", "no sequence classifier", "JudgeReward"):
        StarsEngine(llava(), tmp_path, processor=llava_processor())


def test_functions_are_given_the_pictures_they_ask_for_and_rules_judge_the_text():
    policy, processor, seen = llava(), llava_processor(), []

    def looks(completions, images):
        seen.extend(images)
        return [float(len(one)) for one in images]

    chats = [*CHATS, [{"role": "user", "content": "no picture"}]]

    def reads_text(prompts, completions):
        return [0.0 for _ in completions]

    engine = StarsEngine(policy, looks, processor=processor)
    output = engine.generate(CHATS, CONFIG, seed=0)
    assert output.rewards == [1.0, 2.0]
    assert {id(image) for images in seen for image in images} == {
        id(part["image"]) for chat in CHATS for part in chat[0]["content"] if part["type"] == "image"
    }
    assert engine.generate(CHATS, CONFIG, seed=0, columns={"images": ["abc", "d"]}).rewards == [3.0, 1.0]
    assert engine.generate(chats, CONFIG, seed=0).rewards == [1.0, 2.0, 0.0]
    plain = StarsEngine(policy, looks, processor=processor)
    assert plain.generate(chats[2:], CONFIG, seed=0).rewards == [0.0]  # of its neighbours it knows nothing
    assert plain.generate(chats, CONFIG, seed=0).rewards == [1.0, 2.0, 0.0]
    with refused("images", "columns="):
        StarsEngine(tiny_policy(VOCAB), looks, tokenizer=processor.tokenizer).generate(["no picture"], CONFIG)
    with refused("images", "columns="):
        engine.generate(processor(text=["<image>?"], images=[[picture(0)]], return_tensors="pt"), CONFIG)
    for reward in (reads_text, RuleReward({"a": 1.0})):
        assert StarsEngine(policy, reward, processor=processor).generate(chats, CONFIG, seed=0).errors == [None] * 3
    engine, texts = StarsEngine(policy, tiny_reward(VOCAB), processor=processor), ["a dog", "two cats", "none"]
    assert engine.generate(chats, CONFIG, seed=0, reward_prompts=texts).errors == [None] * 3


PARTS_ALONE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% elif c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("policy", ["llava", "gemma3"])
def test_answers_to_pictures_are_what_the_template_writes_around_and_makes_of_them(policy):
    """It shows an answer as parts alone, and trims it: text that is read anew stands behind the same pictures."""
    model, processor, head = llava(6), llava_processor(), randomised(torch.nn.Linear(32, 1), 3)
    processor.chat_template = PARTS_ALONE
    scorer = ValueHeadReward(model, head, processor=processor)
    make, its = {"llava": (llava, llava_processor), "gemma3": (gemma3, gemma3_processor)}[policy]
    text = [{"role": "user", "content": "no picture"}]
    prompts = read([*CHATS, [*CHATS[0], {"role": "assistant", "content": "It"}], text], make(), its())

    @torch.no_grad()
    def expected(completion):
        prompt = completion.response.prompt
        said = "It" * (prompt.index == 2) + completion.text
        asked, answer = prompt.source[0], {"role": "assistant", "content": [{"type": "text", "text": said}]}
        if prompt.media is None:
            asked = {**asked, "content": [{"type": "text", "text": asked["content"]}]}
        text = processor.apply_chat_template([asked, answer], tokenize=False)
        images = None if prompt.media is None else [prompt.media.images]
        made = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        inputs = {name: made[name] for name in ("input_ids", "pixel_values") if name in made}
        return head(model.model(**inputs, use_cache=False).last_hidden_state[0, -1]).item()

    def spaced(chance):
        return [4] * chance.randint(0, 1) + draw(chance) + [4] * chance.randint(0, 1)

    live(scorer, prompts, expected, draw=spaced, slots=150, rounds=3, tokenizer=prompts[0].tokenizer)


def test_a_batch_is_read_in_one_pass_and_its_ids_are_never_taken_for_other_pictures(monkeypatch):
    reads, model = [], llava()
    read_media = TreeModel.read_media
    monkeypatch.setattr(
        TreeModel, "read_media", lambda *args, **kwargs: reads.append(list(args[2])) or read_media(*args, **kwargs)
    )
    processor = llava_processor()
    text = ["<image> what is in this picture, and where is it from?"] * 2
    images = [[picture(0)], [picture(1)]]
    prompts = read(dict(processor(text=text, images=images, return_tensors="pt")), model)
    assert prompts[0].ids == prompts[1].ids and len(prompts[0].ids) > LEAST
    pair, rewards = [llava(1), llava(2)], []
    scorer, alike = ImplicitReward(*pair), RewardPrompt(2, prompts[0].ids, prompts[0].ids)  # without a picture
    with torch.no_grad():
        scorer.begin(prompts, 8, 4, None)
        for _ in range(2):
            scorer.open([*prompts, alike], 8)
            assert scorer.read_ahead(prompts, 3) == []
            rewards.append(scorer.score([Completion(Response(prompt), WORDS[0]) for prompt in [*prompts, alike]]))
            assert reads == [[0, 1], [0, 1]]  # by each model
            reads.clear()
            scorer.forget([*prompts, alike])
        scorer.end()
    blind = [logprob(model, {"input_ids": torch.tensor([alike.ids])}, WORDS[0]) for model in pair]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)
    assert rewards[0][2] == pytest.approx(blind[0] - blind[1], abs=1e-4)
    assert all(abs(one - other) > 1e-3 for one, other in itertools.combinations(rewards[0], 2))


def test_batches_are_read_ahead_as_far_as_one_may_and_at_least_one():
    model = llava()
    prompts = [prompt for chat in CHATS for prompt in read(chat, model, llava_processor())]
    text = RewardPrompt(2, [7] * 40, [7] * 40)
    scorer = ImplicitReward(llava(1), llava(2))
    with torch.no_grad():
        scorer.begin([*prompts, text], 8, 4, None)
        scorer.open([*prompts, text], 8)
        before = scorer.tokens
        assert set(scorer.read_ahead([*prompts, text], 1)) == {prompts[1], text}
        assert scorer.tokens - before == 2 * (len(prompts[0].ids) - 1)
        assert set(scorer.read_ahead([*prompts, text], len(prompts[1].ids) + 9)) == {text}
        assert scorer.read_ahead([*prompts, text], 100) == []
        assert scorer.tokens - before == 2 * (sum(len(prompt.ids) for prompt in [*prompts, text]) - 3)
        scorer.end()
