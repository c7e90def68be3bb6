"""TRL's GRPO trainer takes its rollouts from the engine."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import tiny_policy, tiny_reward, tiny_tokenizer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

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
