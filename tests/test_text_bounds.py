"""Chat templates cannot run for ever or fill the memory; those of models render as ever, at the same speed."""

import resource
import time

import pytest
from conftest import refused, sum_reward, tiny_tokenizer
from jinja2 import UndefinedError
from test_rewards_render import TEMPLATES
from tiny_tokenizers import BEGUN, CHAT, CHATML, byte_bpe
from transformers.utils import chat_template_utils

from stars_fast import StarsConfig, StarsEngine
from stars_fast.text import bounds
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
    "replace by name": "{{ ('a' * 99999) | replace(new='b' * 99999, old='a') }}",
    "join": "{{ ('b' * 99999).join('a' * 99999) }}",
    "indent": "{{ ('a\\n' * 9999) | indent(999999) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "wordwrap": "{{ ('a' * 99999) | wordwrap(1, wrapstring='b' * 99999) }}",
    "join of a generator": "{{ range(99999) | map('string') | join('b' * 99999) }}",
    "fields": "{{ ('{0}' * 9999).format('b' * 99999) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') | length }}",
    "lists in capitals": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | upper }}",
    "its source": "a" * 300_000,
}


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY.keys())
def test_a_template_that_goes_too_far_is_refused_soon(template, monkeypatch):
    monkeypatch.setattr(bounds, "_SECONDS", 0.5)
    tokenizer = tiny_tokenizer(32)
    tokenizer.chat_template = template
    began, held = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        (ValueError, RecursionError, UndefinedError), match=r"the chat template (makes|runs|has)|recursion|lipsum"
    ):
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
        if "false" in template:  # transformers would compute that
            assert within == "b"
        else:
            assert within == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_nobody_elses_renderings_are_changed_and_none_is_forgotten():
    tokenizer, compiled = (
        byte_bpe(300, template=CHATML + "{# of its own #}"),
        chat_template_utils._compile_jinja_template,
    )
    own = compiled(tokenizer.chat_template)
    assert rendered(tokenizer, CHAT, {}) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert compiled(tokenizer.chat_template) is own and not isinstance(own.environment, BoundedEnvironment)
    compiled.cache_clear()
    assert rendered(tokenizer, CHAT, {}) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_tokenizer_with_a_rendering_of_its_own_is_left_to_it():
    tokenizer = byte_bpe(300, template=CHATML)
    tokenizer.apply_chat_template = lambda conversation, tokenize: "its own"
    assert rendered(tokenizer, CHAT, {}) == "its own"


def test_a_template_that_measures_the_chat_at_every_turn_reads_a_long_one():
    ends = "{% if loop.index0 < messages|length - 1 %}{{ m['content'] }}{% else %}last{% endif %}"
    tokenizer = byte_bpe(300, template=f"{{% for m in messages %}}{ends}{{% endfor %}}")
    chat = [{"role": "user", "content": "the cat"}] * 2001
    began = time.thread_time()
    assert rendered(tokenizer, chat, {}) == "the cat" * 2000 + "last"
    assert time.thread_time() - began < 1


@pytest.mark.parametrize(
    "call",
    ["truncate(1000)", "wordwrap(60)", "indent(4)", "replace('a', 'bb')", "center(80)", "tojson(indent=4)"],
)
def test_calls_that_make_little_of_a_long_text_are_no_greed(call):
    tokenizer = byte_bpe(300, template=f"{{% for i in range(9) %}}{{{{ messages[0].content | {call} }}}}{{% endfor %}}")
    chat = [{"role": "user", "content": "the cat sat on it\n" * 1400}]
    assert rendered(tokenizer, chat, {}) == tokenizer.apply_chat_template(chat, tokenize=False)


def test_a_chat_of_many_long_turns_is_no_greed():
    growing = "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t + m.content %}{% endfor %}{{ n.t }}"
    tokenizer = byte_bpe(300, template=growing)
    chat = [{"role": "user", "content": "the cat sat " * 100}] * 200
    assert len(rendered(tokenizer, chat, {})) == 200 * 1200
