"""What is no argument gets a TypeError or ValueError that names it, shows the value and says what is allowed, at once.

Numbers may be any library's. One table: what takes an argument, its kind, and values that are wrong for this one.
"""

import asyncio
import math
import re
import warnings
from dataclasses import dataclass
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from itertools import count, repeat
from operator import length_hint
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sum_reward, tiny_policy, tiny_reward, tiny_tokenizer

import stars_fast
from stars_fast import AsyncStarsEngine, StarsConfig, StarsEngine, calibrate, demo, methods, rewards
from stars_fast.methods.numbers import plain, shown


class Four(IntEnum):
    FOUR = 4


class Half(float):
    pass


class Mute:
    """A value that cannot even be shown."""

    def __repr__(self):
        raise RuntimeError("no")


POLICY, REWARD, TOKENIZER = tiny_policy(32), tiny_reward(32), tiny_tokenizer(32)
OTHER = tiny_policy(32, seed=5)
ENGINE, BY_IDS = StarsEngine(POLICY, REWARD, tokenizer=TOKENIZER), rewards.CallableReward(sum_reward)
BIG = StarsConfig(max_new_tokens=4, segment_length=2, target_reward=0.0)
IDS = [[1, 2]]

NO_SCALARS = [b"4", (), {}, {1: 2}, object(), Mute(), int, len, 4j, iter([4]), Exception()]
NO_SCALARS.append(torch.empty((), device="meta"))
NO_NUMBERS = ["4", "", True, np.bool_(True), math.nan, -(10**400), Decimal("nan"), Decimal("sNaN"), *NO_SCALARS]
KINDS: dict[str, tuple[list[Any], list[Any]]] = {  # what must be taken, as the first is, and what must not be
    "integer": (
        [4, np.int64(4), np.int8(4), np.uint16(4), np.array(4), torch.tensor(4), torch.tensor(4).char(),
         Four.FOUR],
        [2.0, 4.5, math.inf, -1, -(10**5000), Decimal(4), Fraction(4), np.float64(4), torch.tensor(4.0), *NO_NUMBERS],
    ),
    "real": (
        [0.5, np.float64(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5),
         torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.5, requires_grad=True), Fraction(1, 2),
         Decimal("0.5"), Half(0.5)],
        [np.float32("nan"), torch.tensor(math.nan), *NO_NUMBERS],
    ),
    "truth": (
        [True, np.bool_(True), torch.tensor(True)],
        [1, 0, 1.0, "yes", "", np.int64(1), torch.tensor([True, False]), [True], *NO_SCALARS],
    ),
    "choice": ([], [3, "", "Never", True, ["a"], np.array(["a", "b"]), torch.zeros(2), *NO_SCALARS]),
    "text": ([], [3, True, ["a", "b"], torch.zeros(2), *NO_SCALARS]),
    "model": ([], [3, True, [], torch.zeros(2), *NO_SCALARS]),
    "none": ([], []),
    "form": ([], [3, 2.5, True, object(), Mute(), int, 4j, torch.zeros(()), count()]),
}  # fmt: skip


@dataclass
class Argument:
    """``make(value)`` is the call; the error must hold ``name``, which is also the attribute that keeps the value."""

    name: str
    kind: str
    make: Any
    bad: tuple[Any, ...] = ()
    good: tuple[Any, ...] = ()
    but: tuple[Any, ...] = ()  # of the kind's wrong values, those that this one takes
    read: Any = None


def config(name, kind, *bad, **more):
    return Argument(name, kind, lambda value: StarsConfig(**{name: value}), bad, **more)


def method(cls, name, kind, *bad, **more):
    return Argument(name, kind, lambda value: cls(**{name: value}), bad, **more)


def engine(name, kind, *bad, given=(POLICY, REWARD), **more):
    return Argument(name, kind, lambda value: StarsEngine(*given, **{name: value}), bad, read=lambda _: None, **more)


def call(name, kind, *bad, how=ENGINE.generate, **more):
    return Argument(name, kind, lambda value: how(**{"prompts": IDS, "config": BIG, name: value}), bad, **more)


def session(name, kind, *bad, **more):
    def make(value):
        opened = AsyncStarsEngine(ENGINE, **{name: value})
        opened.close()
        return opened

    return Argument(name, kind, make, bad, **more)


def served(name, kind, *bad, **more):
    async def answer(opened, value):
        async for _ in opened.generate(**{"prompt": "w1", "config": BIG, name: value}):
            pass

    def make(value):
        opened = AsyncStarsEngine(ENGINE, max_model_len=16)
        try:
            asyncio.run(answer(opened, value))
        finally:
            opened.close()

    return Argument(name, kind, make, bad, **more)


def quality(name, kind, *bad, **more):
    def make(value):
        head = torch.nn.Linear(OTHER.config.hidden_size, 2)
        return rewards.QualityReward(OTHER.model, TOKENIZER, **{"words": head, name: value})

    return Argument(name, kind, make, bad, **more)


CLOSED = AsyncStarsEngine(StarsEngine(POLICY, sum_reward))
CLOSED.close()
INT32 = (2**31, 10**12, 10**5000)
ARGUMENTS = [
    config("segment_length", "integer", 0, None, good=(2**40,)),
    config("max_attempts", "integer", 0, None, *INT32, good=(10**9,)),
    config("max_new_tokens", "integer", 0, None, *INT32),
    config("num_return_sequences", "integer", 0, None, 10**8),
    config("candidates", "integer", 0, None, "many", good=("auto", 2**40)),
    config("top_k", "integer", good=(None, 0, 2**40)),
    config("eos_token_id", "integer", [-1], [2, "3"], [True], [None], range(10**7), [[1]], good=(None, [1, 2],
        np.array([1, 2])), but=((),)),
    config("alpha", "real", None, 1.5, -0.1, math.inf),
    config("beta", "real", None, 0, -1.0, math.inf, 10**400),
    config("temperature", "real", 0, -1.0, 1e-39, 1e39, math.inf, good=(None, 1e30)),
    config("top_p", "real", 0, 1.5, math.inf, good=(None,)),
    config("min_p", "real", 1.5, -0.5, good=(None,)),
    config("repetition_penalty", "real", 0, 1e-46, 1e39, math.inf, good=(None,)),
    config("target_reward", "real", [1.0, "a"], [None], {1.0}, count(), repeat(1.0), 10**400, good=(None, [1.0],
        math.inf, -math.inf), but=((),)),
    config("base_reward", "real", math.inf, -math.inf, [math.inf], ["a"], good=(None, [1.0]), but=((),)),
    config("ignore_eos", "truth", None),
    config("finished_threshold", "choice", None),
    config("method", "choice", None, {"name": None}, {"name": "best_of_n", 3: 4}, methods.Stars, methods.Method()),
    Argument("best_of_n: n", "choice", lambda value: StarsConfig(method=value), ({"name": "best_of_n", "n": 10**12},),
        but=KINDS["choice"][1]),
    config("stop_strings", "form", [""], ["a", 3], b"ab", repeat("a"), ["a"] * 10**6, {"a": 1}, good=(None, "a",
        ["a"])),
    *(method(cls, "n", "integer", None, 0, 10**12, 2**20) for cls in (methods.BestOfN, methods.BlockwiseBestOfN)),
    method(methods.TreeBoN, "n", "integer", None, 0, 10**12),
    method(methods.TreeBoN, "branching", "integer", None, 0, 5, 10**12),
    method(methods.TreeBoN, "layers", "integer", None, 0, *INT32),
    method(methods.ParticleFilter, "particles", "integer", None, 0, 10**9),
    method(methods.ParticleFilter, "temperature", "real", None, 0, math.inf),
    method(methods.ParticleFilter, "delimiter", "text", "", good=(None, "a")),
    method(methods.ParticleFilter, "increments", "truth", None),
    method(methods.Cards, "entropy", "real", None, -1.0, good=(math.inf,)),
    method(methods.Cards, "shortest", "integer", None, 0, *INT32),
    method(methods.Cards, "longest", "integer", None, 0, *INT32),
    method(methods.Args, "top_k", "integer", None, 0, *INT32),
    method(methods.Args, "weight", "real", None, -1.0, math.inf),
    method(methods.Args, "temperature", "real", None, -1.0, 1e-300, math.inf, good=(0,)),
    method(methods.Mara, "top_k", "integer", None, 0, *INT32),
    method(methods.Mara, "top_p", "real", None, 0, 1.5),
    method(methods.Mara, "temperature", "real", None, 0, math.inf),
    method(methods.Mara, "mlp", "model", "a", but=(int, len), good=(None,)),
    method(methods.PersonaJudge, "block", "integer", None, 0, *INT32),
    *(method(methods.PersonaJudge, name, "form", None, [1.7], [True], ["a"], [-1], b"ab", {1: 2}, good=("a", (1,
        2))) for name in ("draft_prompt", "judge_prompt")),
    method(methods.RSD, "threshold", "real", None, good=(math.inf,)),
    method(methods.RSD, "longest", "integer", None, 0, *INT32),
    method(methods.RSD, "delimiter", "text", "", good=(None,)),
    method(methods.RSD, "draft", "model", good=(None,)),
    engine("max_rows", "integer", 0, 2**20 + 1, *INT32, good=(None,)),
    engine("kv_cache_tokens", "integer", 0, *INT32, good=(None,)),
    engine("gpu_memory_utilization", "real", None, 0, 1.5),
    engine("cuda_graphs", "truth", None),
    engine("torch_compile", "truth", None),
    engine("tokenizer", "model", good=(None,)),
    engine("reward_tokenizer", "model", good=(None,)),
    engine("reward_tail", "form", "all", [True], [1.5], [-1], b"ab", None, good=("none", [1])),
    engine("device", "text", "", "abacus", given=("demo", REWARD)),
    Argument("policy", "model", lambda value: StarsEngine(value, REWARD), (None, torch.nn.Linear(2, 2), type(POLICY),
        REWARD)),
    Argument("reward", "model", lambda value: StarsEngine(POLICY, value), (None, OTHER, rewards.RuleReward),
        but=(len,)),
    *(call(name, kind, *bad, how=how, good=good)
      for how in (ENGINE.generate, ENGINE.stream)
      for name, kind, bad, good in (
          ("prompts", "form", (None, {}, b"ab", [3], [None], [[]], [""], [[1.5]], [[-1]], [[2**70]], [True], [[True]],
              torch.ones(2, 2), iter([[1]])), ()),
          ("config", "form", ({}, "stars", StarsConfig, None.__class__), (None,)),
          ("attention_mask", "none", ("ab", [[1]]), (None,)),
          ("reward_prompts", "form", (b"ab", {}, [[1], [2]], [[]], [[2**70]]), (None,)),
          ("columns", "form", ("ab", [1], {"a": 1}, {"a": []}, {3: [1]}, {"prompts": [1]}, {"a": "b"},
              {"a": iter([1])}), (None, {"a": [1]})),
          ("seed", "form", ("lucky", [1, 2], [1.5], [None], math.nan, {1: 2}), (3, -5, 10**400, np.int64(3),
              torch.tensor(3), [3])),
          ("on_error", "choice", (None, "ignore"), ("raise",)),
          ("temperature", "real", (0, 1e39), ()),
          ("method", "choice", (None,), ("stars",)),
          ("reward_tail", "none", ("all",), ()),
      )),
    call("streamer", "form", good=(None,)),
    call("progress", "truth", None, good=(False,)),
    session("max_model_len", "integer", 0, 1, *INT32, good=(None,)),
    session("max_segment_length", "integer", 0, None),
    session("max_waiting", "integer", 0, None),
    Argument("timeout", "real", lambda value: asyncio.run(CLOSED.drain(value)), (-1.0,), good=(None,)),
    Argument("requests", "integer", lambda value: CLOSED.reserve(value), (None,), good=(0,)),
    Argument("on_heartbeat", "model", lambda value: setattr(StarsEngine(POLICY, sum_reward), "on_heartbeat", value),
        good=(None,), but=(int, len)),
    Argument("engine", "model", AsyncStarsEngine, (None, "demo", POLICY)),
    served("prompt", "form", None, b"ab", [], "", [1.5], [[1]], [-1], [2**70]),
    served("config", "form", {}, "stars"),
    served("request_id", "text", 3),
    served("seed", "integer", "lucky", [1], math.nan, good=(None, 10**30), but=(-1, -(10**400), -(10**5000))),
    served("columns", "form", "ab", [1], {"prompts": 1}, {3: 1}),
    served("priority", "integer", None, "high", good=(10**30,), but=(-1, -(10**400), -(10**5000))),
    served("timeout", "real", "soon", -1.0, -math.inf, good=(None, math.inf)),
    Argument("engine", "model", lambda value: calibrate(value, IDS), (None, "demo")),
    Argument("acceptance", "real", lambda value: calibrate(ENGINE, IDS, value,
        config=BIG.replace(target_reward=None)), (None, 0, 1.5, math.inf)),
    Argument("samples", "integer", lambda value: calibrate(ENGINE, IDS, samples=value, config=BIG), (None, 0, 1,
        10**8)),
    Argument("config", "form", lambda value: calibrate(ENGINE, IDS, config=value), ({}, "stars")),
    Argument("seed", "form", lambda value: calibrate(ENGINE, IDS, config=BIG, seed=value), ("lucky", [1, 2],
        math.nan), but=(3,)),
    *(Argument("model", "model", make, (None, "demo", "a/b", torch.nn.Linear(2, 2)))
      for make in (
          rewards.ClassifierReward, rewards.InternLM2Reward, rewards.ArmoRMReward,
              lambda value: rewards.JudgeReward(value, TOKENIZER),
          lambda value: rewards.ImplicitReward(value, OTHER), lambda value: rewards.ProcessReward.qwen(value,
              TOKENIZER),
          lambda value: rewards.ProcessReward.rlhflow(value, TOKENIZER),
          lambda value: stars_fast.generate(value, torch.tensor(IDS), reward_model=REWARD),
      )),
    *(Argument("tokenizer", "model", make, ("a/b",))
      for make in (
          lambda value: rewards.ClassifierReward(REWARD, value), lambda value: rewards.JudgeReward(OTHER, value),
          lambda value: rewards.ImplicitReward(POLICY, OTHER, tokenizer=value),
              lambda value: rewards.ProcessReward.rlhflow(OTHER, value),
          lambda value: rewards.CallableReward(sum_reward, value), lambda value: stars_fast.decoding(REWARD,
              tokenizer=value)(POLICY, torch.tensor(IDS), generation_config=POLICY.generation_config),
      )[:5]),
    Argument("reward_tail", "form", lambda value: rewards.ClassifierReward(REWARD, tail=value), ("all", [True], [-1],
        None)),
    *(Argument(name, "text", lambda value, name=name: rewards.JudgeReward(OTHER, TOKENIZER, **{"yes": "w4",
        "no": "w5", name: value}), (None,)) for name in ("question", "template", "yes", "no")),
    Argument("reference", "model", lambda value: rewards.ImplicitReward(POLICY, value), (None,)),
    Argument("beta", "real", lambda value: rewards.ImplicitReward(POLICY, OTHER, beta=value), (None, math.inf)),
    Argument("weights", "choice", lambda value: rewards.ImplicitReward(POLICY, OTHER, weights=value), (None,)),
    Argument("kl", "choice", lambda value: rewards.ImplicitReward(POLICY, OTHER, kl=value), ("reverse",)),
    Argument("encoder", "model", lambda value: rewards.QualityReward(value, TOKENIZER, words=torch.nn.Linear(16, 2)),
        (None, torch.nn.Linear(2, 2), OTHER)),
    Argument("tokenizer", "model", lambda value: rewards.QualityReward(OTHER.model, value, words=torch.nn.Linear(16,
        2)), (None, "a/b", "policy")),
    quality("words", "model", torch.nn.Linear(3, 2), torch.nn.Linear(16, 1)),
    quality("sentence", "model", torch.nn.Linear(3, 1), torch.nn.Linear(16, 2)),
    quality("pooling", "choice", None, "mean"),
    quality("severities", "form", "ab", [], {}, [0.5], {0: 1}, {1.5: 1}, {"a": 1}, {0.5: -1}, {0.5: None}, good=(None,
        {0.2: 10, 0.5: 1.0})),
    quality("mix", "real", None, 1.5, -0.1, math.inf, -math.inf),
    *(quality(name, "truth", None) for name in ("answer_first", "per_token", "partial")),
    *(method(methods.Plans, name, "integer", 0, None, 2**31) for name in ("children", "longest")),
    method(methods.Plans, "delimiter", "text", ""),
    Argument("aggregate", "choice", lambda value: rewards.ProcessReward.rlhflow(OTHER, TOKENIZER, aggregate=value),
        (None,)),
    *(Argument(name, "text", lambda value, name=name: rewards.ProcessReward.rlhflow(OTHER, TOKENIZER, **{name: value}),
        (None,)) for name in ("good", "bad")),
    *(Argument("model", "none", make, (REWARD,))
      for make in (
          lambda value: rewards.JudgeReward(value, TOKENIZER),
          lambda value: rewards.ImplicitReward(value, OTHER),
          lambda value: rewards.ProcessReward.rlhflow(value, TOKENIZER),
      )),
    Argument("probe", "model", rewards.HiddenStateProbe, (None,)),
    Argument("function", "model", rewards.CallableReward, (None, max), but=(len,)),
    Argument("patterns", "form", rewards.RuleReward, ("ab", ["a"], {3: 1.0}), ({"a": 1}, {"a": -math.inf})),
    Argument("predicates", "form", lambda value: rewards.RuleReward(predicates=value), ("ab", [len], {"a": 1.0}),
        ({len: 1},)),
    Argument("weight", "real", lambda value: rewards.RuleReward({"a": value}), (None, math.inf),
        read=lambda made: made.patterns[0][1]),
    Argument("weight", "real", lambda value: rewards.RuleReward(None, {len: value}), (None, math.inf),
        read=lambda made: made.predicates[0][1]),
    Argument("partial", "truth", lambda value: rewards.RuleReward({"a": 1}, partial=value), (None,)),
    Argument("weight", "real", lambda value: rewards.WeightedSum([(value, BY_IDS)]), (None, math.inf, 10**400),
        read=lambda made: made._parts[0].weight),
    Argument("part", "form", rewards.WeightedSum, (None, [], [3], [(1.0,)], [(1.0, None)], [(1.0, sum_reward)],
        {"a": 1.0})),
    Argument("stars_config", "form", lambda value: stars_fast.decoding(REWARD, value), ({}, "stars")),
    Argument("stars_config", "form", lambda value: stars_fast.generate(POLICY, reward_model=REWARD,
        stars_config=value), ({}, "stars")),
    Argument("temperature", "form", lambda value: stars_fast.decoding(REWARD, temperature=value)),
    Argument("save_directory", "form", BIG.save_pretrained, (None, b"a")),
    Argument("pretrained_model_name_or_path", "form", StarsConfig.from_pretrained, (None, b"a")),
]  # fmt: skip

ALLOWED = re.compile(
    r"must|give|known|takes|needs|at (least|most)|no (parameter|regular|chat|tensor)|outside|empty|entries|are "
    r"|goes with|pass |write |without|exactly|neither|rename"
)


def parts(value):
    """What of a value an error may show: itself as Python's own, its type or length, or what of it is wrong."""
    yield type(value).__name__
    value = plain(value)
    yield from (
        type(value).__name__,
        shown(value)[:12],
        getattr(value, "__name__", "<"),
        f"has {length_hint(value, -1)} entries",
    )
    if isinstance(value, Decimal):
        yield "nan"
    if length_hint(value, 1) == 0:
        yield "is empty"
    if isinstance(value, (list, tuple, dict, set)):
        for one in [*list(value)[:9], *(value.values() if isinstance(value, dict) else ())]:
            yield from parts(one)


def refusal(argument, value):
    """What is wrong with the error that the value gets; None if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            warnings.simplefilter("error", FutureWarning)
            argument.make(value)
    except (TypeError, ValueError) as error:
        message = str(error)
        wrong = [] if argument.name in message else ["no name"]
        wrong += [] if ALLOWED.search(message) else ["nothing of what is allowed"]
        wrong += [] if len(message) < 500 and "\n" not in message else ["long"]
        wrong += (
            []
            if argument.kind == "none" or any(part.lower() in message.lower() for part in parts(value))
            else ["no value"]
        )
        return f"{', '.join(wrong)}: {type(error).__name__}: {message[:200]}" if wrong else None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "it was taken"


def known(value, values):
    return any(value is one for one in values) or any(
        type(value) is type(one) and type(one) in (int, float, tuple) and value == one for one in values
    )


def name(argument):
    return argument.name


@pytest.mark.parametrize("argument", ARGUMENTS, ids=name)
def test_what_is_no_argument_is_named_with_what_is_allowed(argument):
    wrong = [value for value in KINDS[argument.kind][1] if not known(value, (*argument.but, *argument.good))]
    found = {i: refusal(argument, value) for i, value in enumerate([*wrong, *argument.bad])}
    values = [*wrong, *argument.bad]
    assert {(i, type(values[i]).__name__): said for i, said in found.items() if said is not None} == {}


@pytest.mark.parametrize("argument", [one for one in ARGUMENTS if one.good or KINDS[one.kind][0]], ids=name)
def test_any_librarys_number_and_every_documented_form_is_taken(argument):
    first, *others = KINDS[argument.kind][0] or [None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        warnings.simplefilter("error", FutureWarning)
        for value in others:
            made = argument.make(value)
            kept = argument.read(made) if argument.read else getattr(made, argument.name, None)
            assert kept is None or (kept == first and type(kept) is type(first)), value
        for value in argument.good:
            argument.make(value)


def test_the_table_holds_hundreds_of_arguments():
    assert sum(len(KINDS[one.kind][1]) + len(one.bad) for one in ARGUMENTS) > 1000


def test_what_nobody_takes_is_named():
    for make in (demo.load, StarsConfig, methods.BestOfN, lambda **bogus: StarsEngine(POLICY, REWARD, **bogus)):
        with pytest.raises(TypeError, match="bogus"):
            make(bogus=1)
