"""Chat templates cannot run for ever or fill the memory; those of models render as ever, at the same speed."""

import resource
import time

import pytest
from conftest import refused, sum_reward, tiny_tokenizer
from test_rewards_render import TEMPLATES
from tiny_tokenizers import BEGUN, CHAT, CHATML, byte_bpe
from transformers.utils import chat_template_utils

from stars_fast import StarsConfig, StarsEngine
from stars_fast.text.bounds import BoundedEnvironment
from stars_fast.text.template import rendered

CONFIG = StarsConfig(max_new_tokens=2, target_reward=0.0, base_reward=0.0)
GREEDY = {
    "a text times a number": "{{ 'a' * 10**9 }}",
    "a constant in a branch": "{% if messages %}{{ 'a' * 1000000000 }}{% endif %}",
    "a number times a list": "{{ (1000000000 * [1]) | length }}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that calls itself": "{% for i in [[], []] recursive %}{{ loop([i, i]) }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "joining": "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "joining many": "{% set x = 'a' * 999999 %}{{ " + " ~ ".join("x" * 99) + " }}",
    "blocks": "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "lists of lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "lists as JSON": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "output": "{% set x = 'a' * 99999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "% of a width": "{{ '%1000000000d' % 1 }}",
    "% of an argument": "{{ '%*d' % (1000000000, 1) }}",
    "format of a width": "{{ '{:1000000000d}'.format(1) }}",
    "a filter's format": "{{ '%1000000000d' | format(1) }}",
    "a power": "{{ 2 ** 1000000000 }}",
    "a product of powers": "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "center": "{{ 'a'.center(10**9) }}",
    "a constant's filter": "{{ 'a' | center(1000000000) }}",
    "a mapped filter": "{{ ['a'] | map('center', 1000000000) | list }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\\t' * 9999).expandtabs(999999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "join": "{{ ('b' * 99999).join('a' * 99999) }}",
    "indent": "{{ ('a\\n' * 9999) | indent(999999) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "its source": "a" * 300_000,
}


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY.keys())
def test_a_template_that_goes_too_far_is_refused_soon(template):
    tokenizer = tiny_tokenizer(32)
    tokenizer.chat_template = template
    began, held = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, RecursionError), match=r"the chat template (makes|runs|has)|recursion"):
        rendered(tokenizer, [{"role": "user", "content": "w5"}], {})
    assert time.thread_time() - began < 1.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 64 << 10  # KiB


def test_the_refusal_names_the_prompt_and_what_was_exceeded(policy32, reward32):
    greedy, plain = tiny_tokenizer(32), tiny_tokenizer(32)
    greedy.chat_template = GREEDY["doubling"]
    chat = [{"role": "user", "content": "w5"}]
    with refused(r"prompts\[0\]", "makes more than", "characters", r"by \+"):
        StarsEngine(policy32, sum_reward, tokenizer=greedy).generate([chat], CONFIG)
    with refused(r"prompts\[0\]", "reward", "makes more than"):
        StarsEngine(policy32, reward32, tokenizer=plain, reward_tokenizer=greedy).generate([chat], CONFIG)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), "{% if false %}{{ 'a' * 1000000000 }}{% endif %}b"])
def test_other_templates_render_as_ever(template):
    tokenizer = byte_bpe(300, template=template)
    for chat in (CHAT, BEGUN, [{"role": "user", "content": "the cat\n" * 99_999}]):
        within = rendered(tokenizer, chat, {}, add_generation_prompt=True)
        if "false" not in template:
            chat_template_utils._compile_jinja_template.cache_clear()
        assert within == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_what_was_compiled_before_is_bounded_too_and_nothing_else_is_changed():
    tokenizer = byte_bpe(300, template=CHATML + "{# of its own #}")
    own = chat_template_utils.ImmutableSandboxedEnvironment
    before = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert rendered(tokenizer, CHAT, {}) == before
    assert isinstance(
        chat_template_utils._compile_jinja_template(tokenizer.chat_template).environment, BoundedEnvironment
    )
    assert chat_template_utils.ImmutableSandboxedEnvironment is own and own is not BoundedEnvironment


def test_a_chat_of_many_long_turns_is_no_greed():
    growing = "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t + m.content %}{% endfor %}{{ n.t }}"
    tokenizer = byte_bpe(300, template=growing)
    chat = [{"role": "user", "content": "the cat sat " * 100}] * 200
    assert len(rendered(tokenizer, chat, {})) == 200 * 1200
