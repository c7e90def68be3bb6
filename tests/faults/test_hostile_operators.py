"""Wrong arguments of operators and of ``stars_fast._C`` are errors: no crash, and nothing written by a call that fails.

The cases run in a process of their own, one after another; where it dies, the case is named and another one goes on.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stars_fast import _C, ops

Arguments = dict[str, Any]
Case = tuple[str, str, Callable[[], "Call"]]  # name, what must come of it ("refused", or "either"), what to call


class Call:
    """A function and its arguments, and those of them that it may write."""

    def __init__(self, function: Callable[..., Any], arguments: Arguments, written: tuple[str, ...] = ()) -> None:
        self.function, self.arguments, self.written = function, arguments, written

    def run(self) -> str:
        """What came of it."""
        tensors = {name: x for name, x in self.arguments.items() if _has_memory(x)}
        before = {name: x.clone() for name, x in tensors.items()}
        try:
            self.function(*self.arguments.values())
            outcome, may_change = "returned", self.written
        except Exception as error:
            outcome, may_change = f"refused: {type(error).__name__}: {error}", ()
        for name, x in tensors.items():
            if name not in may_change and not torch.equal(x.nan_to_num(), before[name].nan_to_num()):
                outcome = f"{name} was changed by a call that was {outcome}"
        return outcome


def _has_memory(x: Any) -> bool:
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or x.device.type != "cpu":
        return False
    return x.numel() < 10**6 and x.data_ptr() != 0


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def kv_append() -> Call:
    arguments = {"k": torch.randn(3, 2, 8), "v": torch.randn(3, 2, 4)}
    arguments |= {"k_pool": torch.zeros(10, 2, 8), "v_pool": torch.zeros(10, 2, 4), "slots": ints(4, 0, 9)}
    return Call(ops.kv_append, arguments, ("k_pool", "v_pool"))


def tree_attention() -> Call:
    arguments = {
        "q": torch.randn(5, 4, 8),  # the last one is padding
        "k_pool": torch.randn(20, 2, 8),
        "v_pool": torch.randn(20, 2, 8),
        "out": torch.zeros(5, 4, 8),
        "trunk_slots": ints(1, 2, 3, 4, 5, 0).view(2, 3),
        "trunk_len": ints(3, 2),
        "branch_slots": ints(6, 0, 7, 8, 9, 10).view(3, 2),
        "branch_len": ints(1, 2, 2),
        "group_indptr": ints(0, 1, 3),
        "query_indptr": ints(0, 1, 2, 4),
        "max_rows": 2,
        "max_queries": 2,
        "scale": 0.3,
        "window": 0,
        "softcap": 0.0,
        "sinks": torch.zeros(4),
    }
    return Call(ops.tree_attention, arguments, ("out",))


def sample_step() -> Call:
    def full(value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full((3,), value, dtype=dtype)

    arguments = {
        "logits": torch.randn(3, 50),
        "keys": full(7, torch.int64),
        "segment": full(0),
        "attempt": full(0),
        "position": full(0),
        "alive": full(True, torch.bool),
        "limit": full(9),
        "temperature": full(0.7, torch.float32),
        "top_k": full(5),
        "top_p": full(0.9, torch.float32),
        "min_p": full(0.1, torch.float32),
        "repetition_penalty": full(1.2, torch.float32),
        "seen": torch.zeros(3, 50, dtype=torch.bool),
        "eos": torch.full((3, 1), -1),
    }
    return Call(ops.sample_step, arguments, ("position", "alive", "seen"))


def select_and_commit() -> Call:
    def zeros(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype)

    arguments = {"reward": torch.randn(5), "length": ints(1, 2, 3, 1, 1), "ended": zeros(5, torch.bool)}
    arguments |= {"group_indptr": ints(0, 2, 4), "keys": torch.arange(2), "segment": zeros(2), "attempts": zeros(2)}
    arguments |= {"committed": zeros(2), "max_new_tokens": ints(8, 8), "max_attempts": ints(9, 2)}
    arguments |= {"base": zeros(2, torch.float64), "target": torch.ones(2, dtype=torch.float64)}
    arguments |= {"beta": torch.ones(2, dtype=torch.float64), "ramp": zeros(2, torch.bool)}
    arguments |= {"best_reward": torch.zeros(2), "best_attempt": ints(-1, -1), "best_length": zeros(2)}
    arguments |= {"best_ended": zeros(2, torch.bool)}
    return Call(ops.select_and_commit, arguments, ("attempts", *(f"best_{x}" for x in BEST)))


BEST = ("reward", "attempt", "length", "ended")


def gather_logprobs() -> Call:
    return Call(ops.gather_logprobs, {"logits": torch.randn(3, 50), "tokens": torch.tensor([0, 49, 7])})


OPERATORS = (kv_append, tree_attention, sample_step, select_and_commit, gather_logprobs)
# Arguments that may come in any dtype or strides, because they are turned into what the kernel reads.
CONVERTED = {"k", "v", "q", "logits", "sinks"}
DTYPES = ("float64", "int64", "complex", "uint8")

# The values that each table may hold, and the flat positions that are read.
RANGES: dict[tuple[Callable[[], Call], str], tuple[int, int, range | tuple[int, ...]]] = {
    (kv_append, "slots"): (0, 9, range(3)),
    (tree_attention, "trunk_slots"): (0, 19, range(5)),
    (tree_attention, "trunk_len"): (0, 3, range(2)),
    (tree_attention, "branch_slots"): (0, 19, (0, 2, 3, 4, 5)),
    (tree_attention, "branch_len"): (0, 2, range(3)),
    (tree_attention, "group_indptr"): (0, 3, range(3)),
    (tree_attention, "query_indptr"): (0, 5, range(4)),
    (select_and_commit, "group_indptr"): (0, 5, range(3)),
    (gather_logprobs, "tokens"): (0, 49, range(3)),
}
FAR = (-(2**31), 2**31 - 1, 10**6)


def contents() -> Iterator[Case]:
    for (operator, name), (low, high, positions) in RANGES.items():
        for position, value in itertools.product(positions, (low - 1, high + 1, *FAR)):
            yield (
                f"{operator.__name__}: {name}[{position}] = {value}",
                "refused",
                _with_value(operator, name, position, value),
            )
    for operator, name in (
        (tree_attention, "group_indptr"),
        (tree_attention, "query_indptr"),
        (select_and_commit, "group_indptr"),
    ):
        yield f"{operator.__name__}: {name} begins at 1", "refused", _with_value(operator, name, 0, 1)
        yield f"{operator.__name__}: {name} falls", "refused", _with_value(operator, name, -1, 0)


def _with_value(operator: Callable[[], Call], name: str, position: int, value: int) -> Callable[[], Call]:
    def made() -> Call:
        call = operator()
        call.arguments[name].view(-1)[position] = value
        return call

    return made


def any_values() -> Iterator[Case]:
    """Every value of settings and of counts that may be anything: a result, whatever it says."""
    unchecked = {
        sample_step: set(sample_step().arguments) - {"alive", "seen"},
        select_and_commit: set(select_and_commit().arguments) - {"ended", "ramp", "best_ended", "group_indptr"},
        tree_attention: ("q", "k_pool", "v_pool", "sinks"),
        kv_append: ("k", "v"),
        gather_logprobs: ("logits",),
    }
    for operator, names in unchecked.items():
        for name in sorted(names):
            dtype = operator().arguments[name].dtype
            if dtype.is_floating_point:
                values = (0.0, -1.0, 1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan"))
            else:
                values = (0, -1, torch.iinfo(dtype).min, torch.iinfo(dtype).max)
            for value in values:
                yield f"{operator.__name__}: {name} all {value}", "returned", _filled(operator, name, value)
    scalars: dict[str, tuple[tuple[Any, str], ...]] = {
        "max_rows": ((-1, "either"), (2**62, "either")),
        "max_queries": ((-1, "either"), (2**62, "either")),
        "scale": ((float("nan"), "returned"), (float("inf"), "returned"), (1e300, "returned")),
        "window": ((-1, "refused"), (-(2**63), "refused"), (2**63 - 1, "returned"), (2**63, "refused")),
        "softcap": ((float("nan"), "returned"), (-1.0, "returned"), (1e-300, "returned")),
    }
    for name, tried in scalars.items():
        for value, expected in tried:
            yield f"tree_attention: {name} = {value}", expected, _replaced(tree_attention, name, lambda _, v=value: v)


def _filled(operator: Callable[[], Call], name: str, value: float) -> Callable[[], Call]:
    def made() -> Call:
        call = operator()
        call.arguments[name].fill_(value)
        return call

    return made


def _replaced(operator: Callable[[], Call], name: str, change: Callable[[Any], Any]) -> Callable[[], Call]:
    def made() -> Call:
        call = operator()
        call.arguments[name] = change(call.arguments[name])
        return call

    return made


def _without_storage(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), -1)[..., 0]


SHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "one shorter": lambda x: x[:-1].clone(),
    "one longer": lambda x: torch.cat((x, x[:1])),
    "empty": lambda x: x[:0].clone(),
    "one dimension more": lambda x: x[None].clone(),
    "flat": lambda x: x.flatten()[:1].squeeze().clone(),
    "last dimension cut": lambda x: x[..., :-1].clone(),
    "last dimension empty": lambda x: x[..., :0].clone(),
    "2**40 long": lambda x: x[:1].expand(2**40, *x.shape[1:]),
    "without storage": _without_storage,
    "on the meta device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "None": lambda x: None,
    "a list": lambda x: x.tolist(),
}
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float64": lambda x: x.double() if x.dtype != torch.float64 else x.float(),
    "int64": lambda x: x.long() if x.dtype != torch.int64 else x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "uint8": lambda x: x.to(torch.uint8),
    "strided": _strided,
    "one value expanded": lambda x: x.flatten()[:1].expand(x.shape),
}


def forms() -> Iterator[Case]:
    """Tensors of another shape, dtype, layout or device."""
    may_differ = {  # another size is the size of everything then, or says how much is used
        ("kv_append", "k"), ("kv_append", "v"), ("tree_attention", "q"), ("tree_attention", "sinks"),
        ("sample_step", "seen"), ("sample_step", "eos"), ("sample_step", "logits"), ("gather_logprobs", "logits"),
        ("tree_attention", "trunk_slots"), ("tree_attention", "branch_slots"),
    }  # fmt: skip
    for operator in OPERATORS:
        for name, x in operator().arguments.items():
            if not isinstance(x, torch.Tensor):
                continue
            for form, change in (SHAPES | LAYOUTS).items():
                lenient = (operator.__name__, name) in may_differ if form in SHAPES else name in CONVERTED
                lenient |= operator is kv_append and name[1:] == "_pool" and form in DTYPES  # any dtype is rounded to
                lenient |= operator is gather_logprobs and form in ("strided", "one value expanded")
                expected = "either" if lenient or (form == "one longer" and "pool" in name) else "refused"
                if form == "on the meta device":  # torch may take the whole call for one that has no data
                    expected = "either"
                yield f"{operator.__name__}: {name} {form}", expected, _replaced(operator, name, change)


def overlaps() -> Iterator[Case]:
    """What is written shares memory with another argument."""
    for operator in OPERATORS:
        call = operator()
        for name, other in itertools.product(call.written, call.arguments):
            if name != other and isinstance(call.arguments[other], torch.Tensor) and other != "sinks":
                yield f"{operator.__name__}: {other} inside {name}", "refused", _shared(operator, name, other)


def _shared(operator: Callable[[], Call], name: str, other: str) -> Callable[[], Call]:
    def made() -> Call:
        call = operator()
        x, y = call.arguments[name], call.arguments[other]
        memory = torch.zeros(x.nbytes + y.nbytes + 16, dtype=torch.uint8)
        start = max(0, (x.nbytes - 1) // 8 * 8)  # y begins in x's last bytes, or at the same place
        call.arguments[name] = memory[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        call.arguments[other] = memory[start : start + y.nbytes].view(y.dtype).view(y.shape).copy_(y)
        return call

    return made


def heads() -> Iterator[Case]:
    """Numbers and sizes of heads that do not fit one another."""
    for query_heads, kv_heads, size in ((5, 2, 8), (4, 3, 8), (1, 2, 8), (4, 0, 8), (2, 2, 0)):

        def made(query_heads: int = query_heads, kv_heads: int = kv_heads, size: int = size) -> Call:
            call = tree_attention()
            for name, shape in (("q", (5, query_heads, size)), ("out", (5, query_heads, 8))):
                call.arguments[name] = torch.randn(shape)
            call.arguments |= {"k_pool": torch.randn(20, kv_heads, size), "v_pool": torch.randn(20, kv_heads, 8)}
            call.arguments["sinks"] = None
            return call

        yield f"tree_attention: {query_heads} heads share {kv_heads} of size {size}", "refused", made
    for groups in (0, 2**20):

        def pools(kv_heads: int = 2**40, groups: int = groups) -> Call:
            call = tree_attention()
            for name in ("q", "out", "k_pool", "v_pool"):
                call.arguments[name] = torch.empty(0, kv_heads, 8)
            call.arguments |= {"trunk_slots": torch.zeros(groups, 0, dtype=torch.int32), "sinks": None}
            call.arguments |= {"trunk_len": torch.zeros(groups, dtype=torch.int32), "branch_len": ints()}
            call.arguments |= {"branch_slots": torch.zeros(0, 2**40, dtype=torch.int32), "query_indptr": ints(0)}
            call.arguments["group_indptr"] = torch.zeros(groups + 1, dtype=torch.int32)
            return call

        yield f"tree_attention: nothing for 2**40 heads and {groups} groups", "returned", pools


STRANGE = (-2, -(2**63), 2**62, 2**63, 2**64, None, "x", 1.5, [1], float("nan"))
METHODS = ("fork", "extend", "cut", "shift", "retain", "release", "release_all", "length", "slots", "plan")


def trees() -> Iterator[Case]:
    """Methods of the tree, with names and numbers that are none, and on objects that hold no tree."""

    def tree() -> _C.SegmentTree:
        made = _C.SegmentTree(16)
        made.extend(made.fork(), 4)
        return made

    one_name = ("retain", "release", "length", "slots")
    tried: dict[str, list[tuple[Any, ...]]] = {name: [(x,) for x in STRANGE] for name in one_name}
    tried |= {"fork": [(x,) for x in STRANGE], "release_all": [([x],) for x in STRANGE]}
    for method in ("extend", "cut", "shift"):
        tried[method] = [pair for x in STRANGE for pair in ((x, 1), (0, x))]
    tried["shift"].remove((0, -2))  # which is an offset
    tried["plan"] = [three for x in STRANGE for three in (([x], [1], [1]), ([0], [x], [1]), ([0], [1], [x]))]
    tried["plan"] += [([0, 0], [2**31 - 1] * 2, []), ([0] * 3, [1], [1]), ([], [], [1]), (0, 1, 1)]
    tried["plan"] += [([0], [3], [2**31 - 1] * 3), ([[0]], [1], [1])]
    for method, arguments in tried.items():
        for values in arguments:
            yield f"SegmentTree.{method}{values}", "refused", _method(tree, method, values)
    for x in (0, *STRANGE, 2**31):
        yield f"SegmentTree({x!r})", "refused", lambda x=x: Call(_C.SegmentTree, {"capacity": x})
    for how, empty in (
        ("__new__", lambda: _C.SegmentTree.__new__(_C.SegmentTree)),
        ("copy.copy", lambda: copy.copy(tree())),
    ):
        for method in METHODS:
            values = {"extend": (0, 1), "release_all": ([],), "plan": ([-1], [1], [1]), "fork": ()}
            values |= dict.fromkeys(("cut", "shift"), (0, 0))
            yield f"{how}: {method}", "refused", _method(empty, method, values.get(method, (0,)))
        for name in ("capacity", "free_slots", "live_slots", "nodes"):
            yield f"{how}: {name}", "refused", lambda e=empty, n=name: Call(lambda: getattr(e(), n), {})


def _method(tree: Callable[[], Any], method: str, values: tuple[Any, ...]) -> Callable[[], Call]:
    return lambda: Call(lambda *arguments: getattr(tree(), method)(*arguments), dict(enumerate(values)))


def functions() -> Iterator[Case]:
    """What else the module offers. Kernels take addresses: none at all is refused, for which size ever."""
    for value in (-1, 2**64, None, "x", 1.5):
        yield f"philox4x32({value!r})", "refused", lambda x=value: Call(_C.philox4x32, {"key": x, "counter": [0] * 4})
        yield f"philox4x32(0, [{value!r}])", "refused", lambda x=value: Call(_C.philox4x32, {"k": 0, "c": [x] * 4})
        yield f"gumbel({value!r})", "refused", lambda x=value: Call(_C.gumbel, {"bits": x})
    for size in (0, 3, 5):
        yield f"philox4x32, {size} words", "refused", lambda n=size: Call(_C.philox4x32, {"key": 0, "counter": [0] * n})
    counts = {"kv_append": 14, "tree_attention": 28, "sample_step": 23, "select_and_commit": 24, "gather_logprobs": 7}
    for name, count in counts.items():
        for kernel, size in itertools.product((name, f"check_{name}"), (-1, 1, 2, 2**62)):
            sizes = {i: size for i in _SIZES[name]}
            arguments = {str(i): sizes.get(i, 0) for i in range(count)}
            yield (
                f"_C.{kernel} of size {size} at no address",
                "refused",
                lambda k=kernel, a=arguments: Call(getattr(_C, k), a),
            )
        arguments = {str(i): None for i in range(count)}
        yield f"_C.{name} of None", "refused", lambda k=name, a=arguments: Call(getattr(_C, k), a)


_SIZES = {
    "kv_append": (4, 9, 11, 12, 13),
    "tree_attention": (7, 8, 9, 10, 11, 12, 15, 16, 19, 20),
    "sample_step": (2, 3, 17),
    "select_and_commit": (0, 1),
    "gather_logprobs": (2, 3),
}
GROUPS = (contents, any_values, forms, overlaps, heads, trees, functions)


def cases() -> list[Case]:
    return [case for group in GROUPS for case in group()]


def run_from(first: int, last: int | None = None) -> None:
    """Runs the cases from that one on; says of each that it begins, and what came of it."""
    torch.set_num_threads(1)
    if sys.platform == "linux":  # a case that wants much memory gets an error and not the machine's
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, resource.RLIM_INFINITY))
    for index, (_, _, made) in enumerate(cases()[first:last], first):
        print(json.dumps([index, "died"]), flush=True)
        torch.manual_seed(0)
        print(json.dumps([index, made().run()]), flush=True)


def in_a_process(first: int, last: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    } | environment
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({__file__!r})['run_from']({first}, {last})"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


@pytest.fixture(scope="module")
def outcomes() -> list[str]:
    known: dict[int, str] = {}
    for _ in range(5):  # deaths that are looked past
        done = in_a_process(len(known))
        known |= dict(json.loads(line) for line in done.stdout.splitlines())
        if done.returncode == 0:
            break
        assert known, done.stderr
        known[max(known)] = f"died: exit status {done.returncode}"
    return [known.get(index, "not reached") for index in range(len(cases()))]


def test_no_case_kills_the_process(outcomes):
    assert len(outcomes) >= 500
    names = [name for name, _, _ in cases()]
    assert len(set(names)) == len(names)
    assert [(name, how) for name, how in zip(names, outcomes, strict=True) if not how.startswith(("ref", "ret"))] == []


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_what_is_wrong_is_refused_and_what_is_right_returns(outcomes, group):
    members = {name for name, _, _ in group()}
    strangers = [
        (name, expected, how)
        for (name, expected, _), how in zip(cases(), outcomes, strict=True)
        if name in members and expected != "either" and not how.startswith(expected)
    ]
    assert strangers == []


def test_a_refusal_names_the_argument_the_place_the_value_and_the_range(outcomes):
    said = dict(zip((name for name, _, _ in cases()), outcomes, strict=True))
    for name, words in {
        "kv_append: slots[2] = 10": r"slots[2] is 10, must be from 0 to 9",
        "tree_attention: trunk_slots[4] = -1": r"trunk_slots[1, 1] is -1, must be from 0 to 19",
        "tree_attention: branch_len[1] = 3": r"branch_len[1] is 3, must be from 0 to 2",
        "tree_attention: query_indptr falls": r"query_indptr[3] is 0, must be from 2 to 5",
        "tree_attention: k_pool inside out": r"out, which is written, shares memory with k_pool",
        "tree_attention: 5 heads share 2 of size 8": r"q has 5 heads, which cannot share the 2 of k_pool and v_pool",
        "gather_logprobs: tokens[0] = 50": r"tokens[0] = 50 is outside the vocabulary of 50",
        "__new__: plan": r"its __init__ was not called",
    }.items():
        assert words in said[name], said[name]


def test_other_kernels_are_checked_as_those_in_cpp_are(outcomes):
    count = len(list(contents()))
    done = in_a_process(0, count, STARS_FAST_KERNELS="reference")
    assert list(dict(json.loads(line) for line in done.stdout.splitlines()).values()) == outcomes[:count], done.stderr
