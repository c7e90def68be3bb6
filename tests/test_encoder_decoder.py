"""Encoder-decoders as policies: sources at the beginning of trunks, families against their untouched forward passes."""

import asyncio
import copy
import threading
from functools import cache

import pytest
import torch
import transformers
from conftest import refused, sum_reward, tiny_policy, tiny_reward, tiny_tokenizer, word_reward
from starlette.testclient import TestClient
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM
from transformers.generation import EncoderNoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

import stars_fast
from stars_fast import AsyncStarsEngine, StarsConfig, StarsEngine
from stars_fast.inputs.models import load_policy
from stars_fast.methods import Guide, Guided, PersonaJudge
from stars_fast.ops import tree_attention
from stars_fast.policy.encoder_decoder import EncoderDecoder
from stars_fast.policy.policy import Policy
from stars_fast.serve.app import create_app
from stars_fast.serve.assembly import service_of
from stars_fast.serve.service import Service
from stars_fast.tree.attention import TreeContext, plugged
from stars_fast.tree.check import max_difference

VOCAB, PAD, START, EOS = 32, 1, 2, 31
SOURCES = [[5, 6, 7, 8, 9, 10, 11], [12, 5, 20], [9, 9, 21, 22, 23, 24, 25, 26, 27, 28, 29, 4]]
CONFIG = StarsConfig(
    target_reward=1.2, beta=0.5, segment_length=4, max_new_tokens=11, max_attempts=6, num_return_sequences=2
)
_IDS = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=0, eos_token_id=EOS)
_ENCODER = dict(encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=24)
_DECODER = dict(decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32, decoder_start_token_id=START)
_T5GEMMA = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
_T5GEMMA |= dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=6, **_IDS)
_T5 = dict(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
FAMILIES = ["marian", "bart", "mbart", "m2m_100", "pegasus", "t5gemma"]


def tiny_seq2seq(family, positions=64, **fields):
    """A model of the family whose weights give laws that are far from uniform and depend on the source."""
    if family == "t5gemma":  # transformers 5.17 leaves soft caps out of its own sdpa
        parts = {"encoder": _T5GEMMA, "decoder": {**_T5GEMMA, "cross_attention_hidden_size": 16}}
        start = {"decoder_start_token_id": START, "attn_implementation": "eager"}
        config = transformers.T5GemmaConfig(**parts, **_IDS, **start)
    elif family == "t5":
        config = transformers.T5Config(**_T5)
    else:
        sizes = dict(d_model=16, max_position_embeddings=positions, forced_eos_token_id=None, scale_embedding=True)
        config = transformers.AutoConfig.for_model(family, **_ENCODER, **_DECODER, **_IDS, **sizes, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed_positions" not in name:
                torch.nn.init.normal_(weight, std=0.3 if "embed" in name or "shared" in name else 0.25)
    return model


family = cache(tiny_seq2seq)


@torch.no_grad()
def plain_logits(model, source, target, answer):
    """Logits ``[T, V]`` of each token of an answer, by the untouched model's forward pass."""
    ids = torch.tensor([[*target, *answer]])
    output = model(input_ids=torch.tensor([source]), decoder_input_ids=ids, decoder_attention_mask=torch.ones_like(ids))
    return output.logits[0, len(target) - 1 : -1]


def assert_exact(model, out, sources, begun, samples):
    for row, (answer, said) in enumerate(zip(out.completions, out.logprobs, strict=True)):
        logits = plain_logits(model, sources[row // samples], begun[row // samples], answer)
        expected = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
        torch.testing.assert_close(torch.tensor(said), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_are_the_models_own_and_no_schedule_changes_a_text(name, small_pools):
    model = family(name)
    outs = [
        StarsEngine(model, sum_reward_of_ids, **pools).generate(
            SOURCES, CONFIG, candidates=candidates, seed=3, ignore_eos=True
        )
        for candidates, pools in [(1, {}), (8, {}), (1, {"kv_cache_tokens": 40})]
    ]
    assert outs[2].stats["preemptions"] > 0  # and sources read again
    for out in outs:
        assert out.completions == outs[0].completions
        assert_exact(model, out, SOURCES, [[START]] * len(SOURCES), samples=2)
    assert model.config._attn_implementation != "stars_tree"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def sum_reward_of_ids(prompts, completions, completion_ids, **columns):
    return sum_reward(completion_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_steps_and_passes_are_the_models_own(name):
    model = family(name)
    engine = StarsEngine(model, sum_reward_of_ids)
    engine.policy.graphs.enabled = True
    out = engine.generate(SOURCES, CONFIG, candidates=3, seed=3)
    assert out.completions == StarsEngine(model, sum_reward_of_ids).generate(SOURCES, CONFIG, seed=3).completions
    assert_exact(model, out, SOURCES, [[START]] * len(SOURCES), samples=2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*captured in a CUDA graph")
@pytest.mark.parametrize("name", FAMILIES)
def test_captured_steps_on_a_gpu_have_the_log_probabilities_of_the_cpu(name):
    model = tiny_seq2seq(name)
    engine = StarsEngine(copy.deepcopy(model).cuda(), sum_reward_of_ids)
    assert_exact(model, engine.generate(SOURCES, CONFIG, seed=3), SOURCES, [[START]] * len(SOURCES), samples=2)
    assert engine.policy.graphs.captured > 0


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("blenderbot", {}),
        ("blenderbot-small", {}),
        ("plbart", {}),
        ("pegasus_x", {"num_global_tokens": 4, "block_size": 8}),
        ("bigbird_pegasus", {}),
        ("nllb-moe", {"num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 2}),
    ],
)
def test_families_that_are_built_alike_run_too(name, fields):
    assert max_difference(EncoderDecoder(tiny_seq2seq(name, **fields))) < 1e-4


def test_an_answer_depends_on_its_source():
    model = family("bart")
    first, other = (plain_logits(model, source, [START], [7, 8]).log_softmax(-1) for source in SOURCES[:2])
    assert (first - other).abs().max() > 0.1  # what the tolerance above tells apart


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_sources_is_read_in_one_pass(side):
    policy, width = EncoderDecoder(family("m2m_100")), max(map(len, SOURCES))
    padding = [[PAD] * (width - len(source)) for source in SOURCES]
    if side == "left":
        rows = [[*pad, *source] for pad, source in zip(padding, SOURCES, strict=True)]
    else:
        rows = [[*source, *pad] for pad, source in zip(padding, SOURCES, strict=True)]
    ids = torch.tensor(rows)
    mask = (ids != PAD).long()
    policy.allocate(100)
    with plugged(policy.model):
        nodes, logits = policy.read_media({"input_ids": ids, "attention_mask": mask}, rows=[2, 0, 1])
        _, after = policy.prefill(nodes, [[7, 8], [7], [9, 9, 4]])
    answers = [[7, 8], [7], [9, 9, 4]]
    for source, first, last, answer in zip([SOURCES[i] for i in (2, 0, 1)], logits, after, answers, strict=True):
        plain = plain_logits(policy.model, source, [START], [*answer, 0])
        torch.testing.assert_close(torch.stack([first, last]), plain[[0, -1]], atol=1e-5, rtol=0)


def test_a_pass_that_fails_leaves_no_slots_taken():
    policy = EncoderDecoder(family("marian"))
    policy.allocate(20)
    free = policy.tree.free_slots
    with plugged(policy.model), pytest.raises(IndexError):
        policy.read_media({"input_ids": torch.tensor([[5, VOCAB]])})
    assert policy.tree.free_slots == free


@pytest.mark.parametrize("name", ["bart", "m2m_100", "marian"])
def test_more_tokens_are_packed_than_the_decoder_has_positions(name):
    model = tiny_seq2seq(name, positions=24)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    out = StarsEngine(model, sum_reward_of_ids).generate(SOURCES, CONFIG, num_return_sequences=8, candidates=4, seed=1)
    assert_exact(model, out, SOURCES, [[START]] * len(SOURCES), samples=8)
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())


def test_changed_position_weights_are_the_next_calls():
    model = tiny_seq2seq("bart")
    engine = StarsEngine(model, sum_reward_of_ids)
    engine.generate(SOURCES, CONFIG, seed=1)
    with torch.no_grad():
        model.get_decoder().embed_positions.weight.mul_(-3)
    assert_exact(model, engine.generate(SOURCES, CONFIG, seed=1), SOURCES, [[START]] * 3, samples=2)


@pytest.mark.parametrize("ask", ["told", "refresh"])
def test_a_hook_that_is_gone_when_another_thread_comes_to_it_does_not_fail_that_one(ask):
    model, begun, gone, failed = tiny_seq2seq("bart"), threading.Event(), threading.Event(), []
    policy = EncoderDecoder(model)
    policy.allocate(20)

    def user():
        try:
            plain_logits(model, SOURCES[0], [START], [7])
        except Exception as error:
            failed.append(error)

    def wait(module, args):  # between torch's look at its hooks and ours
        if threading.current_thread() is thread:
            begun.set()
            assert gone.wait(20)

    def while_here(*args):
        if threading.current_thread() is not thread and not begun.is_set():
            thread.start()
            assert begun.wait(20)

    thread, embedding = threading.Thread(target=user), model.get_decoder().embed_positions
    if ask == "told":
        embedding.register_forward_pre_hook(wait)
        with policy._table.told(torch.tensor([0])):
            while_here()
    else:
        embedding.register_forward_hook(lambda module, args, output: (while_here(), wait(module, args))[0])
        policy._table.refresh(5, torch.zeros(1, 1, 16))
    gone.set()
    thread.join()
    assert not failed


def test_the_id_that_pads_is_never_drawn():
    model = tiny_seq2seq("m2m_100")  # which would give it no position
    with torch.no_grad():
        model.lm_head.weight[PAD] = 8 * model.lm_head.weight[7]
    out = StarsEngine(model, sum_reward_of_ids).generate(SOURCES, CONFIG, seed=1)
    assert not any(PAD in answer for answer in out.completions)
    with pytest.warns(UserWarning, match="eos_token_id=1 is never drawn"):
        StarsEngine(model, sum_reward_of_ids).generate(SOURCES, CONFIG, seed=1, eos_token_id=PAD)


# What targets begin with


def test_a_target_begins_with_the_start_and_the_language_that_the_generation_config_forces():
    model = tiny_seq2seq("m2m_100")
    engine = StarsEngine(model, sum_reward_of_ids)
    model.generation_config.update(decoder_start_token_id=4, forced_bos_token_id=9)  # from the next call on
    out = engine.generate(SOURCES, CONFIG, seed=1)
    assert out.sequences[:, :2].tolist() == [[4, 9]] * 6
    assert out.sequences[0, 2 : 2 + len(out.completions[0])].tolist() == out.completions[0]
    assert_exact(model, out, SOURCES, [[4, 9]] * 3, samples=2)


def test_each_prompt_may_bring_what_its_target_begins_with():
    model, begun = family("mbart"), [[START, 9], [START, 10, 4, 6]]
    prompts = [
        {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([ids])}
        for source, ids in zip(SOURCES, begun, strict=False)
    ]
    engine = StarsEngine(model, sum_reward_of_ids)
    out = engine.generate(prompts, CONFIG, seed=1)
    assert_exact(model, out, SOURCES, begun, samples=2)
    swapped = engine.generate([{**prompts[0], "decoder_input_ids": torch.tensor([[START, 10]])}], CONFIG, seed=1)
    assert swapped.logprobs[0] != out.logprobs[0]


def test_a_start_as_long_as_its_source_is_read():
    model = family("mbart")
    prompt = {"input_ids": torch.tensor([[5, 6]]), "decoder_input_ids": torch.tensor([[START, 9]])}
    out = StarsEngine(model, sum_reward_of_ids).generate(prompt, CONFIG, seed=1)
    assert_exact(model, out, [[5, 6]], [[START, 9]], samples=2)


@pytest.mark.parametrize("field", ["repetition_penalty", "encoder_no_repeat_ngram_size"])
def test_penalties_see_the_target_alone_and_those_of_the_encoder_its_source(field):
    model = tiny_seq2seq("bart")
    setattr(model.generation_config, field, 2)
    out = StarsEngine(model, sum_reward_of_ids).generate(SOURCES, CONFIG, seed=1, target_reward=-10.0)
    for row, (answer, said) in enumerate(zip(out.completions, out.sampling_logprobs, strict=True)):
        source = SOURCES[row // 2]
        of_encoder = EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([source]))
        processor = RepetitionPenaltyLogitsProcessor(2.0) if field == "repetition_penalty" else of_encoder
        for place, logits in enumerate(plain_logits(model, source, [START], answer)):
            logits = processor(torch.tensor([[START, *answer[:place]]]), logits[None])[0]
            logits[PAD] = -torch.inf
            assert float(logits.log_softmax(-1)[answer[place]]) == pytest.approx(said[place], abs=1e-4)


# Where there are several callers


def test_a_session_has_room_for_a_source_and_a_target_that_each_fill_their_positions():
    engine, source = StarsEngine(family("bart"), sum_reward_of_ids), [5, 6, 7, 8] * 15
    config = CONFIG.replace(max_new_tokens=60, segment_length=20, num_return_sequences=1, ignore_eos=True)

    async def answer():
        async with AsyncStarsEngine(engine) as served:
            assert served.max_model_len == 128
            return [token async for event in served.generate(source, config, seed=1) for token in event.segment.tokens]

    assert asyncio.run(answer()) == engine.generate([source], config, seed=[1]).completions[0]


def test_a_chat_that_says_no_length_has_what_its_target_leaves():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    engine = StarsEngine(family("bart"), lambda prompts, completions: [0.0] * len(prompts), tokenizer=tokenizer)
    session = AsyncStarsEngine(engine)
    body = {"messages": [{"role": "user", "content": "w5 w6 w7"}], "ignore_eos": True}
    try:
        client = TestClient(create_app(Service(session, "tiny", StarsConfig(target_reward=0.0))))
        got = client.post("/v1/chat/completions", json=body).json()
    finally:
        session.close()
    assert got["usage"]["completion_tokens"] == 63, got


def test_a_served_chat_without_a_template_is_the_source_that_its_text_is():
    tokenizer, read = tiny_tokenizer(), []
    tokenizer.chat_template = None
    ends = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert tokenizer("w5 w6")["input_ids"][-1] == EOS

    def reward(prompts, completions):
        read.extend(prompts)
        return [0.0] * len(prompts)

    engine = StarsEngine(family("bart"), reward, tokenizer=tokenizer)
    service = service_of(engine, StarsConfig(target_reward=0.0, max_new_tokens=3), "tiny")
    turns = [{"role": "system", "content": "w5 w6"}, {"role": "user", "content": [{"type": "text", "text": "w7"}]}]
    try:
        client = TestClient(create_app(service))
        chat = client.post("/v1/chat/completions", json={"messages": turns, "seed": 1}).json()
        text = client.post("/v1/completions", json={"prompt": "w5 w6\nw7", "max_tokens": 3, "seed": 1}).json()
    finally:
        service.engine.close()
    assert chat["choices"][0]["message"]["content"] == text["choices"][0]["text"], chat
    assert chat["usage"]["prompt_tokens"] == text["usage"]["prompt_tokens"] and set(read) == {"w5 w6\nw7"}


# What rewards see


def test_a_reward_sees_the_source_and_the_answer_as_text():
    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return word_reward(completions)

    engine = StarsEngine(family("bart"), reward, tokenizer=tiny_tokenizer())
    out = engine.generate(["w5 w6 w7", "w8 w9"], CONFIG, seed=1)
    assert {prompt for prompt, _ in seen} == {"w5 w6 w7", "w8 w9"}
    assert set(zip(["w5 w6 w7", "w5 w6 w7", "w8 w9", "w8 w9"], out.texts, strict=True)) <= set(seen)


def test_a_reward_does_not_see_what_a_target_begins_with():
    seen = []

    def reward(prompts, completions, completion_ids):
        seen.extend(zip(prompts, map(tuple, completion_ids), strict=True))
        return sum_reward(completion_ids)

    prompt = {"input_ids": torch.tensor([[5, 6]]), "decoder_input_ids": torch.tensor([[START, 9, 10]])}
    out = StarsEngine(family("mbart"), reward).generate(prompt, CONFIG, seed=1, method="best_of_n")
    assert out.sequences[0, :3].tolist() == [START, 9, 10] and ([5, 6], tuple(out.completions[0])) in seen


def test_a_classifier_of_the_same_ids_scores_the_answer_behind_the_source():
    model, reward = family("bart"), tiny_reward(VOCAB)
    engine = StarsEngine(model, reward, reward_tokenizer="policy", reward_tail="none")
    out = engine.generate(SOURCES, CONFIG, seed=1, target_reward=0.0)
    for row, answer in enumerate(out.completions):
        with torch.no_grad():
            expected = float(reward(input_ids=torch.tensor([SOURCES[row // 2] + answer])).logits)
        assert out.rewards[row] == pytest.approx(expected, abs=1e-5)


# What is refused


def test_t5_is_refused_by_name():
    with refused("T5ForConditionalGeneration", "(T5Attention|0 layers)"):
        StarsEngine(tiny_seq2seq("t5"), sum_reward_of_ids)


def test_what_does_not_fit_is_refused_by_name():
    engine = StarsEngine(tiny_seq2seq("bart", positions=16), sum_reward_of_ids)
    with refused(r"prompts\[1\]", "17", "encoder", "16"):
        engine.generate([[5], [5] * 17], CONFIG)
    with refused(r"prompts\[0\]", "1 tokens of its target", "max_new_tokens=16", "16"):
        engine.generate([[5] * 16], CONFIG, max_new_tokens=16)
    assert len(engine.generate([[5] * 16], CONFIG, max_new_tokens=15, seed=0).completions) == 2
    for wrong in (torch.tensor([START]), torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[0.5]])):
        with refused(r"prompts\[0\]", "decoder_input_ids"):
            engine.generate({"input_ids": torch.tensor([[5]]), "decoder_input_ids": wrong}, CONFIG)
    with refused("decoder_attention_mask"):
        mask = torch.ones(1, 1, dtype=torch.int64)
        engine.generate({"input_ids": mask, "decoder_input_ids": mask, "decoder_attention_mask": mask}, CONFIG)
    small = StarsEngine(family("bart"), sum_reward_of_ids, kv_cache_tokens=19)
    with refused("5 tokens", "20", "slots", "kv_cache_tokens=19"):  # a source of 4, a start, an answer and a segment
        small.generate([[5] * 4], CONFIG)


def test_a_start_for_each_prompt_of_a_batch_is_refused_with_the_way_that_works():
    model = tiny_seq2seq("bart")
    engine = StarsEngine(model, sum_reward_of_ids)
    model.generation_config.decoder_start_token_id = [START, 9]
    with refused(r"decoder_start_token_id=\[2, 9\]", "decoder_input_ids"):
        engine.generate(SOURCES[:2], CONFIG)


def test_methods_that_read_prompts_in_several_ways_are_refused():
    engine = StarsEngine(family("bart"), sum_reward_of_ids)
    guided = Guided(models=[Guide(family("bart"), 0.5)])
    for method in (guided, PersonaJudge(draft_prompt=[5], judge_prompt=[6])):
        with refused(f"method='{method.name}'", "BartForConditionalGeneration"):
            engine.generate(SOURCES, method=method)


def test_an_encoder_decoder_beside_a_policy_is_refused():
    engine = StarsEngine(tiny_policy(VOCAB), sum_reward_of_ids)
    with refused("BartForConditionalGeneration", "encoder-decoder"):
        engine.generate(SOURCES, method=Guided(models=[Guide(family("bart"), 0.5)]))


def test_speech_is_refused():
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = transformers.WhisperConfig(**shape, vocab_size=VOCAB, encoder_attention_heads=2, decoder_attention_heads=2)
    config.pad_token_id = 0
    with refused("WhisperForConditionalGeneration", "input_features"):
        EncoderDecoder(transformers.WhisperForConditionalGeneration(config))


def test_separate_vocabularies_are_refused():
    model = tiny_seq2seq("marian", share_encoder_decoder_embeddings=False, decoder_vocab_size=VOCAB + 3)
    with refused("MarianMTModel", "32", "35"):
        EncoderDecoder(model)


def test_inside_generate_a_source_is_refused_with_the_way_that_works():
    with refused("encoder-decoder", "StarsEngine"):
        stars_fast.generate(
            copy.deepcopy(family("bart")), torch.tensor([[5, 6]]), reward_model=sum_reward_of_ids, max_new_tokens=4
        )


# Around it


def test_a_policy_by_name_is_the_class_that_was_saved(tmp_path):
    family("marian").save_pretrained(tmp_path)
    model, *_ = load_policy(tmp_path, None)
    assert type(model) is transformers.MarianMTModel
    family("t5gemma").save_pretrained(tmp_path / "other")
    assert type(load_policy(tmp_path / "other", None)[0]) is transformers.T5GemmaForConditionalGeneration


def test_the_numbers_of_the_check_are_those_of_branches_below_a_source(monkeypatch):
    policy = EncoderDecoder(tiny_seq2seq("pegasus"))
    assert max_difference(policy) < 1e-5
    monkeypatch.setattr(TreeContext, "look", lambda self, layer, q, **options: torch.zeros_like(q))
    with refused("PegasusForConditionalGeneration", "differ"):
        EncoderDecoder(tiny_seq2seq("pegasus"))


def test_queries_beyond_a_branch_see_the_trunk_alone():
    q, pool = torch.randn(3, 2, 8), torch.randn(6, 2, 8)
    out = torch.empty_like(q)
    int32 = {"dtype": torch.int32}
    trunk, branch = torch.tensor([[4, 2, 5]], **int32), torch.zeros(1, 1, **int32)
    lengths = torch.tensor([3], **int32), torch.tensor([0], **int32), torch.tensor([0, 1], **int32)
    tree_attention(
        q, pool, pool, out, trunk, lengths[0], branch, *lengths[1:], torch.tensor([0, 3], **int32), 1, 3, 0.5
    )
    keys = pool[[4, 2, 5]]
    weights = (0.5 * torch.einsum("qhd,khd->qhk", q, keys)).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("qhk,khd->qhd", weights, keys))


def test_a_decoder_only_policy_is_none():
    assert type(StarsEngine(tiny_policy(VOCAB), sum_reward_of_ids).policy) is Policy
