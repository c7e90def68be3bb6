"""TRL's GRPO trainer takes its rollouts from the engine."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import tiny_policy, tiny_reward, tiny_tokenizer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from stars_fast import StarsConfig  # noqa: E402
from stars_fast.integrations.trl import engine_reward, rollout_func  # noqa: E402

GROUP, TOKENS = 4, 6
PROMPTS = ["a b c", "d e"]


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def make(rollout, steps=1, **settings):
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
            model=tiny_policy(32),
            reward_funcs=engine_reward,
            args=args,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tiny_tokenizer(32),
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


def test_settings_that_rollouts_cannot_have_are_named(rollouts):
    with pytest.raises(ValueError, match="do_sample=False"):
        rollouts(PROMPTS, generation_kwargs={"do_sample": False})
    with pytest.warns(UserWarning, match="presence_penalty .*no effect"):
        rollouts(PROMPTS, generation_kwargs={"presence_penalty": 1.0})
    with pytest.warns(UserWarning, match=r"num_beams=4, which guidance does not apply"):
        rollouts(PROMPTS, generation_kwargs={"num_beams": 4})
