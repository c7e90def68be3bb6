"""A fit serves the models it was made for, in any dtype, and no others of their size."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import tiny_policy, tiny_reward
from test_methods_fit import drawn

from stars_fast import StarsConfig, StarsEngine, demo
from stars_fast.inputs.fits import made_for
from stars_fast.inputs.sampling import resolve_sampling
from stars_fast.methods.fit import learn
from stars_fast.rewards import ClassifierReward, ImplicitReward, RuleReward, WeightedSum

PAIR = tiny_policy(32, seed=2), tiny_policy(32, seed=3)
CONFIG = StarsConfig(segment_length=4, max_new_tokens=8, max_attempts=2)


@pytest.fixture(scope="module")
def models():
    return tiny_policy(32, hidden=32), tiny_reward(32, hidden=32)


def recorded(engine, config=CONFIG):
    return made_for(config, resolve_sampling(config, engine.policy.model, None), engine.policy, engine.reward)


@pytest.fixture(scope="module")
def config(models):
    return CONFIG.replace(fit=replace(learn(drawn(60), {}, {}), made_for=recorded(StarsEngine(*models))))


def turned(model):
    model.score.weight.data.neg_()


def tuned(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


@pytest.mark.parametrize("name, change", [("reward", turned), ("reward", tuned), ("policy", tuned)])
def test_a_fit_of_other_weights_of_the_same_sizes_is_refused_by_name(models, config, name, change):
    others = dict(zip(("policy", "reward"), models, strict=True))
    others[name] = copy.deepcopy(others[name])
    with torch.no_grad():
        change(others[name])
    with pytest.raises(ValueError, match=rf"something else \(the {name}'s weights are others here\): give what"):
        StarsEngine(others["policy"], others["reward"]).generate([[1, 2]], config, seed=0)


@pytest.mark.parametrize(
    "make, settings, others",
    [
        (lambda reward, tail: ClassifierReward(reward, "policy", tail=tail), "auto", [3]),
        (lambda reward, beta: ImplicitReward(*PAIR, tokenizer="policy", beta=beta), 1.0, 0.1),
        (lambda reward, weight: RuleReward(predicates={len: weight}), 1.0, -1.0),
        (lambda reward, weight: WeightedSum([(1.0, RuleReward(predicates={len: weight}))]), 1.0, -1.0),
    ],
    ids=["tail", "beta", "rule", "rule of a sum"],
)
def test_a_fit_of_a_scorer_with_other_settings_is_refused_by_name(models, make, settings, others):
    policy, reward = models
    known = replace(learn(drawn(60), {}, {}), made_for=recorded(StarsEngine(policy, make(reward, settings))))
    config = CONFIG.replace(fit=known)
    assert StarsEngine(policy, make(reward, settings)).generate([[1, 2]], config, seed=0).errors == [None]
    with pytest.raises(ValueError, match=r"fit: made for something else \(reward is ."):
        StarsEngine(policy, make(reward, others)).generate([[1, 2]], config, seed=0)


def test_a_templates_variables_describe_a_scorer_alike_in_any_order_and_process(models):
    def described(**variables):
        return ClassifierReward(models[1], "policy", chat_template_kwargs=variables).described

    assert described(tools=[lambda: 1], brief=True) == described(brief=True, tools=[lambda: 2])
    assert described(brief=True) != described(brief=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fit_serves_copies_in_other_dtypes(models, config, dtype):
    engine = StarsEngine(*(copy.deepcopy(model).to(dtype) for model in models))
    assert engine.generate([[1, 2]], config, seed=0).errors == [None]


def test_a_policy_that_is_trained_in_place_keeps_its_fit(models):
    policy, reward = map(copy.deepcopy, models)
    engine = StarsEngine(policy, reward)
    known = replace(learn(drawn(60), {}, {}), made_for=recorded(engine))
    tuned(policy)
    assert engine.generate([[1, 2]], CONFIG, fit=known, seed=0).errors == [None]


def test_a_quantised_model_is_known_by_its_sizes_alone(models, config):
    policy, reward = map(copy.deepcopy, models)
    tuned(policy)
    policy.config.quantization_config = {"quant_method": "any"}
    engine = StarsEngine(policy, reward)
    assert "policy_weights" not in recorded(engine) and "reward_weights" in recorded(engine)
    assert engine.generate([[1, 2]], config, seed=0).errors == [None]


def test_answers_longer_than_a_fits_are_warned_of_once(models, config):
    engine = StarsEngine(*models)
    older = replace(config.known, made_for={k: v for k, v in config.known.made_for.items() if k != "max_new_tokens"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate([[1, 2]], config, seed=0, max_new_tokens=4)
        engine.generate([[1, 2]], config, seed=0, max_new_tokens=16, fit=older)
    with pytest.warns(UserWarning, match="max_new_tokens=16, and the fit was made with max_new_tokens=8"):
        engine.generate([[1, 2]], config, seed=0, max_new_tokens=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate([[1, 2]], config, seed=0, max_new_tokens=16)


def test_the_fit_that_ships_records_the_models_that_ship():
    policy, reward, tokenizer = demo.load()
    engine = StarsEngine(policy, reward, tokenizer=tokenizer)
    config = StarsConfig(top_k=50, fit="demo")
    assert config.known.made_for == recorded(engine, config)
