"""TRL's GRPO trainer takes its rollouts from the engine."""

from __future__ import annotations

import os
from contextlib import closing

import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward, tiny_tokenizer
from tiny_pictures import IMAGE, llava, llava_processor, picture

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from stars_fast import StarsConfig, StarsEngine  # noqa: E402
from stars_fast.integrations.trl import by_plan, engine_reward, rollout_func  # noqa: E402
from stars_fast.methods import Plans  # noqa: E402
from stars_fast.tree.model import TreeModel  # noqa: E402

GROUP, TOKENS = 4, 6
PROMPTS = ["a b c", "d e"]


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def make(rollout, steps=1, model=None, processing=None, rows=None, reward_funcs=engine_reward, **settings):
        torch.manual_seed(0)
        args = trl.GRPOConfig(
            output_dir=os.fspath(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            learning_rate=0.1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            **settings,
        )
        return trl.GRPOTrainer(
            model=model or tiny_policy(32),
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=datasets.Dataset.from_list(rows or [{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=processing or tiny_tokenizer(32),
            rollout_func=rollout,
        )

    return make


def recorded(rollout, calls):
    def record(prompts, trainer):
        calls.append((prompts, rollout(prompts, trainer)))
        return calls[-1][1]

    return record


def test_a_step_trains_on_the_engines_rollouts_and_rewards(make_trainer):
    calls = []
    trainer = make_trainer(recorded(rollout_func(tiny_reward(32)), calls))
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    trainer.train()
    (prompts, rollouts), *_ = calls
    assert sorted(prompts) == sorted(PROMPTS * GROUP)
    assert all(len(values) == len(prompts) for values in rollouts.values())
    assert all(len(ids) <= TOKENS for ids in rollouts["completion_ids"])
    logged = trainer.state.log_history[0]["reward"]
    assert logged == pytest.approx(sum(rollouts["engine_rewards"]) / len(prompts), abs=1e-4)
    assert not torch.equal(before, trainer.model.model.embed_tokens.weight)


def test_logprobs_are_those_of_the_weights_of_the_step(make_trainer):
    """Of the second step too: nothing stale is used after the weights have changed."""
    calls, checked = [], []
    rollout = rollout_func(tiny_reward(32))

    def check(prompts, trainer):
        rollouts = rollout(prompts, trainer)
        calls.append(trainer.model.model.embed_tokens.weight.detach().clone())
        for prompt, completion, logprobs in zip(
            rollouts["prompt_ids"], rollouts["completion_ids"], rollouts["logprobs"], strict=True
        ):
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            checked.append((torch.tensor(logprobs) - expected).abs().max().item())
        return rollouts

    make_trainer(check, steps=2, temperature=0.7).train()
    assert len(calls) == 2 and not torch.equal(*calls)
    assert max(checked) < 1e-4


def test_gradients_find_the_memory_of_keys_and_values_free_unless_it_is_kept(make_trainer, monkeypatch):
    made = []

    def make(*models, **options):
        made.append(StarsEngine(*models, **options))
        return made[-1]

    monkeypatch.setattr("stars_fast.integrations.trl.StarsEngine", make)
    trainer = make_trainer(None)
    for keep in (False, True):
        rollout = rollout_func(tiny_reward(32), references=lambda prompt: [7], keep_memory=keep)
        rollout(PROMPTS, trainer)
        pools = [tree.pool for tree in (made[-1].policy, *made[-1].reward.tree_models)]
        assert [pool.slots > 1 for pool in pools] == [keep, keep]
    rollout(PROMPTS, trainer)
    assert made[-1].policy.pool is pools[0]


def test_memory_that_another_engine_has_in_use_costs_no_rollout(make_trainer):
    trainer, reward = make_trainer(None), tiny_reward(32)
    other = StarsEngine(tiny_policy(32), reward)
    with closing(other.stream([[5]], target_reward=9.0, base_reward=0.0, segment_length=2, max_new_tokens=8)) as events:
        next(events)
        with pytest.warns(UserWarning, match="memory of keys and values is kept: another engine with this reward"):
            rollouts = rollout_func(reward)(PROMPTS, trainer)
        assert len(rollouts["completion_ids"]) == len(PROMPTS) and list(events)


def test_a_device_that_fails_as_memory_is_released_is_not_taken_for_one_in_use(make_trainer, monkeypatch):
    def fail(model):
        raise RuntimeError("an illegal memory access was encountered")

    trainer, rollout = make_trainer(None), rollout_func(tiny_reward(32))
    monkeypatch.setattr(TreeModel, "free", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rollout(PROMPTS, trainer)


def test_samples_of_a_group_share_a_request_and_keep_the_prompts_order(make_trainer):
    trainer = make_trainer(rollout_func(tiny_reward(32)))
    rollouts = rollout_func(tiny_reward(32))(["a b c"] * 3 + ["d e"] + ["a b c"] * 3, trainer)
    long, short = rollouts["prompt_ids"][0], rollouts["prompt_ids"][3]
    assert rollouts["prompt_ids"] == [long] * 3 + [short] + [long] * 3
    assert long != short


CHAT = [{"role": "user", "content": "w4 w5"}]


@pytest.fixture
def rollouts(make_trainer):
    def run(prompts, config=None, **settings):
        trainer = make_trainer(rollout_func(tiny_reward(32), config), **settings)
        trainer.processing_class.chat_template = (
            "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if not thinking %}w9{% endif %}"
        )
        torch.manual_seed(0)
        return trainer.rollout_func(prompts, trainer)

    return run


def test_prompts_are_rendered_with_the_trainers_variables(rollouts):
    assert rollouts([CHAT] * 2)["prompt_ids"] == [[4, 5, 9]] * 2
    assert rollouts([CHAT] * 2, chat_template_kwargs={"thinking": True})["prompt_ids"] == [[4, 5]] * 2


def drawn(out):
    return {token for ids in out["completion_ids"] for token in ids}


def test_generation_kwargs_of_the_trainer_hold(rollouts):
    free = drawn(rollouts(PROMPTS * 8)) - {31}
    assert not drawn(rollouts(PROMPTS * 8, generation_kwargs={"suppress_tokens": sorted(free)})) & free
    cold = rollouts(PROMPTS * 8, temperature=5.0, generation_kwargs={"temperature": 1e-4, "eos_token_id": [31, 40]})
    assert len({tuple(ids) for ids in cold["completion_ids"]}) == 1


@pytest.mark.parametrize(
    "config, given, longest",
    [
        (None, {}, TOKENS),
        (StarsConfig(method="vanilla"), {}, TOKENS),
        (StarsConfig(method="vanilla", max_new_tokens=4), {}, 4),
        (StarsConfig(method="vanilla", max_new_tokens=64), {}, TOKENS),
        (None, {"generation_kwargs": {"max_new_tokens": 3}}, 3),
        (None, {"generation_kwargs": {"max_new_tokens": 99}}, TOKENS),
        (StarsConfig(target_reward=9.0, max_attempts=2, segment_length=64), {}, TOKENS),
    ],
    ids=str,
)
def test_no_completion_is_longer_than_the_trainer_allows(rollouts, config, given, longest):
    out = rollouts(PROMPTS * 8, config, **given)
    assert max(map(len, out["completion_ids"])) == longest


def test_answers_end_as_the_trainers_own_do(make_trainer):
    """By the tokenizer's EOS too, where the model's generation_config has another."""
    trainer = make_trainer(None)
    trainer.model.generation_config.eos_token_id = 3
    trainer.eos_token_ids = [31, 3]
    out = rollout_func(tiny_reward(32))(PROMPTS * 16, trainer)
    assert {3, 31} <= {ids[-1] for ids in out["completion_ids"]}
    assert all(not {3, 31} & set(ids[:-1]) for ids in out["completion_ids"])


def test_what_a_rollout_cannot_be_made_of_is_refused_at_once():
    with pytest.raises(ValueError, match=r"needs answer, and TRL .*reward_funcs"):
        rollout_func(lambda completions, answer, log_extra=None, **columns: [])
    with pytest.raises(TypeError, match=r"takes rollout_func\(reward\)"):
        rollout_func(PROMPTS, object())
    assert callable(rollout_func(lambda completions, images: []))


def test_settings_that_rollouts_cannot_have_are_named(rollouts):
    with pytest.raises(ValueError, match="do_sample=False"):
        rollouts(PROMPTS, generation_kwargs={"do_sample": False})
    with pytest.warns(UserWarning, match="presence_penalty .*no effect"):
        rollouts(PROMPTS, generation_kwargs={"presence_penalty": 1.0})
    with pytest.warns(UserWarning, match=r"num_beams=4, which guidance does not apply"):
        rollouts(PROMPTS, generation_kwargs={"num_beams": 4})


PLANS = StarsConfig(method=Plans(children=2, delimiter=None, longest=3), segment_length=4)


def test_a_group_is_plans_with_answers_below_them_and_each_plan_has_its_childrens_mean(make_trainer):
    calls, seen = [], []

    def tokens(completion_ids, **columns):
        return [float(sum(ids)) for ids in completion_ids]

    def record(plan_reward, **columns):
        seen.append((columns["plan"], plan_reward))
        return by_plan(tokens)(**columns)

    rollout = recorded(rollout_func(sum_reward_of_ids, PLANS), calls)
    make_trainer(rollout, reward_funcs=record).train()
    ((_, out), *_), ((plans, plan_rewards), *_) = calls, seen
    assert plans == out["plan"] == [0, 0, 1, 1, 2, 2, 3, 3]
    for first in range(0, 8, 2):
        pair, rewards = out["completion_ids"][first : first + 2], out["engine_rewards"][first : first + 2]
        assert pair[0][:3] == pair[1][:3]
        assert out["plan_reward"][first] == out["plan_reward"][first + 1] == pytest.approx(sum(rewards) / 2)
    assert plan_rewards == out["plan_reward"]
    assert len({tuple(ids) for ids in out["completion_ids"]}) > 4


def sum_reward_of_ids(prompts, completions, completion_ids, **columns):
    return sum_reward(completion_ids)


def test_a_plans_share_of_right_answers_leaves_out_those_without_an_answer():
    right = by_plan(lambda plan, right: right)
    assert right(plan=[0, 0, 1, 1, 2], right=[1.0, 0.0, None, 1.0, None]) == [0.5, 0.5, 1.0, 1.0, None]


def test_plans_that_are_not_whole_are_refused(rollouts):
    with pytest.raises(ValueError, match="3 samples, which are not whole plans of children=2"):
        rollouts(["a b c"] * 3, PLANS)


def test_reference_answers_are_read_by_the_weights_of_the_step(make_trainer):
    answers = {"a b c": "w4 w5 w6", "d e": [7], "w1": None}
    trainer = make_trainer(None, temperature=0.7)
    rollout = rollout_func(tiny_reward(32), references=answers.__getitem__)
    for _ in range(2):
        out = rollout(["a b c"] * 2 + ["w1"] + ["d e"], trainer)
        assert out["reference_ids"] == [[4, 5, 6, 31]] * 2 + [None, [7]]
        for prompt, answer, logprobs in zip(*(out[name] for name in COLUMNS), strict=True):
            if answer is None:
                assert logprobs is None
                continue
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        with torch.no_grad():
            trainer.model.model.embed_tokens.weight.mul_(1.5)


COLUMNS = ("prompt_ids", "reference_ids", "reference_logprobs")


def test_rollouts_of_prompts_with_pictures_are_what_the_trainer_reads(make_trainer):
    """TRL computes log-probabilities from pictures and ids; they are the rollouts' where both have read the same."""
    model, processor, calls = llava(), llava_processor(), []
    rows = [
        {"prompt": [{"role": "user", "content": "what is it?"}], "image": picture(seed)} for seed in range(len(PROMPTS))
    ]
    rollout = rollout_func(sum_reward_of_ids, StarsConfig(method="vanilla"), references=lambda prompt: "it")
    trainer = make_trainer(
        recorded(rollout, calls), model=model, processing=processor, rows=rows, remove_unused_columns=False
    )
    batch = [rows[0]] * GROUP + [rows[1]] * GROUP
    with torch.no_grad():
        inputs = trainer._generate_and_score_completions(batch)
        ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
        mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
        logits = model.eval()(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
        logits[..., IMAGE] = -torch.inf  # it is never drawn
    (_, out), *_ = calls
    start = inputs["prompt_ids"].shape[1]
    logprobs = logits[:, start - 1 : -1].log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    for row, found in enumerate(out["logprobs"]):
        assert found == pytest.approx(logprobs[row, : len(found)].tolist(), abs=1e-4)
    assert out["prompt_ids"][0].count(IMAGE) > 1 and out["prompt_ids"][0] == out["prompt_ids"][GROUP]
    first, other = out["reference_logprobs"][0], out["reference_logprobs"][GROUP]
    assert out["reference_logprobs"] == [first] * GROUP + [other] * GROUP and first != other
