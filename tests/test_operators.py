"""The operators keep torch.library's contract, so that torch.compile and CUDA graphs see through them."""

import inspect
import os
import pydoc
import re
import subprocess
import sys

import pytest
import torch
from test_sample_step import arguments, random_logits
from test_select_and_commit import tables
from test_tree_attention import SHAPES, tree

from stars_fast import ops

CASES = {
    "kv_append": lambda: (
        torch.randn(3, 2, 8),
        torch.randn(3, 2, 4),
        torch.zeros(9, 2, 8),
        torch.zeros(9, 2, 4),
        torch.tensor([4, 2, 8], dtype=torch.int32),
    ),
    "rotary_append": lambda: (
        torch.randn(3, 4, 8),
        torch.randn(3, 2, 8),
        torch.randn(3, 2, 4),
        *torch.randn(2, 3, 6),
        torch.zeros(9, 2, 8),
        torch.zeros(9, 2, 4),
        torch.tensor([4, 2, 8], dtype=torch.int32),
    ),
    "tree_attention": lambda: (*tree(**SHAPES["scoring"]).values(), 4, 2.0, torch.zeros(4)),
    "sample_step": lambda: tuple(
        arguments(random_logits(3, 50), top_k=5, seen=torch.zeros(3, 50, dtype=torch.bool), eos=(1,)).values()
    ),
    "select_and_commit": lambda: tuple(tables([2, 1], [0.1, -0.4, 0.3]).values()),
    "gather_logprobs": lambda: (torch.randn(4, 30), torch.arange(4)),
    "skinny_product": lambda: (
        torch.randn(1, 4, 32),
        [torch.randn(9, 32), torch.randn(5, 32)],
        [torch.zeros(9), torch.zeros(5)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.stars_fast, name).default, CASES[name]())


def test_opcheck_without_seen_tokens():
    torch.library.opcheck(torch.ops.stars_fast.sample_step.default, tuple(arguments(random_logits(3, 50)).values()))


@pytest.mark.parametrize("name", CASES)
def test_help_states_arguments_shapes_and_what_is_written(name):
    operator = getattr(ops, name)
    words = pydoc.plain(pydoc.render_doc(operator))
    assert f"{name}(Tensor " in words
    for argument in operator._schema.arguments:
        assert re.search(rf"^ +(\w+, )*{argument.name}(, \w+)*$", words, re.M), f"{argument.name} has no paragraph"
    assert words.count("``[") >= 3 and ("written" in words) == operator._schema.is_mutable
    assert list(inspect.signature(operator).parameters) == [argument.name for argument in operator._schema.arguments]


@pytest.mark.parametrize("setting, checked", [("STARS_FAST_CHECKS", True), ("STARS_FAST_DEBUG", False)])
def test_what_is_checked_on_gpus_has_a_setting_of_its_own(setting, checked):
    """STARS_FAST_DEBUG is the command line's: tracebacks cost no time."""
    kernel = "from stars_fast.ops._library import operators; print(operators['kv_append'].cuda.function)"
    code = f"import stars_fast.ops; {kernel}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STARS_FAST_")}
    environment |= {setting: "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=100, env=environment)
    assert ("_checked" in told) == checked, told
