"""A method is a name with parameters, or an object of one's own; what it lacks is said before work starts."""

import math
import warnings

import pytest
from conftest import sum_reward, tiny_policy, tiny_tokenizer
from test_methods import EVERY, PROMPTS, VOCAB, generate, make_engine

from stars_fast import StarsConfig, calibrate
from stars_fast.methods import (
    METHODS,
    RSD,
    Args,
    Cards,
    Method,
    OptimalStopping,
    ParticleFilter,
    PersonaJudge,
    RejectionSampling,
)
from stars_fast.rewards import Reward
from stars_fast.text.personas import read_personas
from stars_fast.text.prompts import read_prompts

NEAR_SIGHTED = tiny_policy(VOCAB, hidden=32, seed=7)
NEAR_SIGHTED.config.max_position_embeddings = 12


@pytest.mark.parametrize(
    "value",
    ["cards", Cards(entropy=2.5), {"name": "treebon", "n": 8}, ParticleFilter(), EVERY["persona_judge"]],
    ids=str,
)
def test_a_method_survives_saving(tmp_path, value):
    config = StarsConfig(method=value)
    config.save_pretrained(tmp_path)
    assert StarsConfig.from_pretrained(tmp_path) == config
    assert hash(StarsConfig.from_pretrained(tmp_path)) == hash(config)


def test_a_threshold_is_a_number():
    with pytest.raises(TypeError, match="threshold='a' must be a number"):
        RSD(threshold="a")


def test_a_rejected_token_has_no_weight_where_the_reward_has_none():
    class Rejecting(Reward):
        def score(self, completions):
            return [-math.inf if completion.tokens[-1] % 2 else 0.0 for completion in completions]

    out = generate(make_engine(Rejecting()), Args(top_k=4, weight=0.0))
    assert out.completions == generate(make_engine(), Args(top_k=4, weight=0.0)).completions


def test_a_name_and_the_method_with_its_defaults_are_the_same():
    assert StarsConfig(method=Cards()) == StarsConfig(method="cards") == StarsConfig(method={"name": "cards"})
    assert StarsConfig(method="cards").chosen_method == Cards()


def test_models_in_a_method_are_not_saved(tmp_path):
    for name, parameter in (("rsd", "draft"), ("mara", "mlp")):
        with pytest.raises(ValueError, match=f"method='{name}': {parameter} is a .* cannot be saved"):
            StarsConfig(method=EVERY[name]).save_pretrained(tmp_path)
    assert StarsConfig(method=RSD(draft="some/model")).to_dict()["method"] == {"name": "rsd", "draft": "some/model"}


class Shortest(Method):
    """A method of a user's own: of two candidates the shorter one."""

    name = "shortest"
    has_target = False

    def rule(self, config):
        return config.replace(target_reward=float("inf"), max_attempts=2)

    def values(self, candidates):
        return [-float(len(candidate.draw.tokens)) for candidate in candidates]


def test_a_method_of_ones_own_is_a_few_lines():
    out = generate(make_engine(), Shortest())
    assert out.errors == [None] * 6 and all(s.attempts == 2 for segments in out.segments for s in segments)


@pytest.mark.parametrize(
    "value, message",
    [
        ("magic", "method='magic' is unknown; known methods: vanilla, .*best_of_n.*persona_judge"),
        ({"name": "cards", "heat": 1}, "method='cards' has no parameter 'heat'; it has entropy, shortest, longest"),
        ({"name": "treebon", "n": 6}, "n=6 must be a multiple of branching=4"),
        ({"name": "best_of_n", "n": 0}, "best_of_n: n=0 must be at least 1"),
        ({"name": "mara", "top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"name": "particle_filter", "delimiter": ""}, "delimiter='' must be text"),
        ({"name": "rsd", "threshold": math.nan}, "rsd: threshold=nan"),
    ],
    ids=str,
)
def test_a_method_that_does_not_exist_or_fit_is_named_with_those_that_do(value, message):
    with pytest.raises(ValueError, match=message):
        StarsConfig(method=value)


def test_a_misspelt_name_is_told_what_it_may_have_been():
    likely = r"'{}'.* \(did you mean '{}'\?\)"
    for misspelt, named in (
        (lambda: OptimalStopping(budgets=4), likely.format("budgets", "budget")),
        (lambda: StarsConfig(target_rewards=1.0), likely.format("target_rewards", "target_reward")),
        (lambda: StarsConfig().replace(betta=1.0), likely.format("betta", "beta")),
    ):
        with pytest.raises(TypeError, match=named):
            misspelt()
    with pytest.raises(ValueError, match=likely.format("entopy", "entropy")):
        StarsConfig(method={"name": "cards", "entopy": 1})
    with pytest.raises(ValueError, match="method='star' is unknown" + r" \(did you mean 'stars'\?\)"):
        StarsConfig(method="star")


def test_the_class_of_a_method_is_refused_as_such():
    with pytest.raises(TypeError, match=r"method=ParticleFilter is a class: write ParticleFilter\(\.\.\.\)"):
        make_engine().generate([[1]], method=ParticleFilter)


def test_a_parameter_of_the_method_among_the_settings_is_told_where_it_belongs():
    with pytest.raises(TypeError, match=r"'n' is a parameter of the method.*: give method=BestOfN\(n=4\)"):
        make_engine().generate([[1]], method="best_of_n", n=4)
    with pytest.raises(TypeError, match=r"'n' is not a field .* \(give num_return_sequences\); the fields"):
        make_engine().generate([[1]], method="stars", n=4)


@pytest.mark.parametrize(
    "method, message",
    [
        ("rsd", "needs a draft model"),
        (RSD(draft=tiny_policy(16), delimiter=None), "LlamaForCausalLM has 16 ids and the policy 32"),
        ("mara", "needs the network"),
        ("persona_judge", "needs two preferences"),
        (PersonaJudge(draft_prompt="be kind", judge_prompt="be brief"), r"prompts\[0\] and the preference"),
        (
            PersonaJudge(draft_prompt=[VOCAB], judge_prompt=[1]),
            r"\[0\], under a preference, holds id 32, outside",
        ),
        (RSD(draft=NEAR_SIGHTED, delimiter=None), "max_new_tokens=11 exceeds the limit of the draft model's 12 pos"),
    ],
    ids=["no draft", "another vocabulary", "no network", "no preferences", "words before ids", "no id", "positions"],
)
def test_what_a_method_lacks_is_said_before_work_starts(method, message):
    with pytest.raises((ValueError, TypeError), match=message):
        generate(make_engine(), method)


def test_args_refuses_a_function_of_text():
    with pytest.raises(ValueError, match="method='args' scores every likely next token"):
        generate(make_engine(sum_reward), "args")


def test_methods_without_a_target_are_not_calibrated():
    with pytest.raises(ValueError, match="method='vanilla' has no target reward to calibrate"):
        calibrate(make_engine(), PROMPTS, method="vanilla", max_new_tokens=4)
    assert generate(make_engine(), "vanilla", target_reward=None).stats["calibration_tokens"] == 0
    assert generate(make_engine(), RejectionSampling(), target_reward=None).stats["calibration_tokens"] > 0


def test_a_calibration_keeps_the_settings_that_another_method_needs():
    found = calibrate(make_engine(), PROMPTS, method="cards", max_new_tokens=6, samples=2, seed=0).config
    assert (found.segment_length, found.top_k, found.method) == (StarsConfig().segment_length, None, "cards")
    report = calibrate(make_engine(), PROMPTS, method="rejection_sampling", max_new_tokens=6, samples=2).report()
    assert len(report["acceptance_by_position"]) == 1


def test_a_setting_that_a_method_overrules_is_warned_of_and_others_are_not():
    with pytest.warns(UserWarning, match="cards' sets segment_length=64 itself: segment_length=4 has no effect"):
        make_engine().generate([[1]], method="cards", segment_length=4, target_reward=0.0, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*were drawn to find a target")
        for name in set(METHODS) - {"plans", "rsd", "mara", "persona_judge"}:
            make_engine().generate([[1]], method=name, max_new_tokens=2, seed=0)


def test_a_list_of_targets_has_one_per_prompt_even_where_no_method_reads_it():
    with pytest.raises(ValueError, match="target_reward has 2 entries for 1 prompts"):
        make_engine().generate([[1]], method="best_of_n", target_reward=[1.0, 2.0], max_new_tokens=2)


def test_a_preference_joins_the_system_message_and_stands_behind_a_bos():
    tokenizer = tiny_tokenizer(VOCAB)
    system, user = {"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}
    merged = {"role": "system", "content": "w5\n\nw1"}
    prompts = read_prompts([[system, user], [user]], tokenizer)
    expected = read_prompts([[merged, user], [{**system, "content": "w5"}, user]], tokenizer)
    assert read_personas(prompts, ["w5"], tokenizer) == [[prompt.ids] for prompt in expected]
    assert read_personas(read_prompts([[3, 8], [8]], None), [(5, 6)], None, 3) == [[[3, 5, 6, 8]], [[5, 6, 8]]]
