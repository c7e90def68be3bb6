"""``stars-fast doctor``: what this machine has, and which path given models take on it."""

from __future__ import annotations

import json
import os
import platform
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stars_fast.cli.console import fail, one_line, refusing, refusing_models, stdout
from stars_fast.cli.pair import examine_pair, pair_words, trouble
from stars_fast.rows.engines import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stars_fast.policy.policy import Policy
    from stars_fast.rewards import ClassifierReward
    from stars_fast.tree.model import TreeModel

TREE, IN_FULL, REFUSED = "tree plug-in", "scored in full", "refused"
_NO_PICTURES = "not read: a prompt that has any is refused"
_MISSING = "not built: run `pip install .` in a checkout, with a C++17 compiler"

Report = dict[str, Any]


def run(
    policy: Annotated[str | None, typer.Option(help="Causal LM to examine: folder, hub id or 'demo'.")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward model to examine: folder, hub id or 'demo'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, devices and kernels, how given models would run, and what the reward model sees of the policy's
    texts. Exit code 1 if one is refused, or scores otherwise than a plain forward pass does.
    """

    quiet_transformers()
    with refusing(RuntimeError, ValueError):  # a setting of the kernels that does not exist
        report = examine_machine()
    if not report["extension"]["built"]:
        _print(report, as_json)
        fail(f"the C++ extension is {report['extension']['detail']}", 1)
    with refusing_models():
        written_by, scored_by = _Loaded(), _Loaded()
        if policy is not None:
            report["models"]["policy"], written_by = _examine("policy", policy)
        if reward is not None:
            report["models"]["reward"], scored_by = _examine("reward", reward, written_by)
        if written_by.runs is not None and scored_by.runs is not None:
            reads = report["models"]["reward"]["reads"]
            report["pair"] = examine_pair(written_by.runs, scored_by.runs, written_by.tokenizer, reads)
    _print(report, as_json)
    if any(model["path"] == REFUSED for model in report["models"].values()):
        raise typer.Exit(1)
    if wrong := trouble(report["pair"]) if report["pair"] else "":
        fail(wrong, 1)


def examine_machine() -> Report:
    """Versions, devices, the C++ extension, and the kernel of each operator per kind of device."""
    import torch
    import transformers

    import stars_fast

    versions = {
        "stars_fast": stars_fast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "triton": _triton_version(),
    }
    extension, devices = _extension(), _devices()
    return {
        "versions": versions,
        "platform": platform.platform(),
        "devices": devices,
        "extension": extension,
        "kernels_setting": os.environ.get("STARS_FAST_KERNELS"),
        "kernels": _kernels() if extension["built"] else {},
        "fresh_prompts": _libraries(devices),
        "models": {},
        "pair": {},
    }


def _triton_version() -> str | None:
    try:
        return str(import_module("triton").__version__)
    except (ImportError, AttributeError):
        return None


def _devices() -> list[Report]:
    import torch

    devices: list[Report] = [{"device": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory})
    return devices


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _extension() -> Report:
    try:
        module = import_module("stars_fast._C")
    except ImportError as error:
        return {"built": False, "detail": f"{_MISSING} ({error})"}
    return {"built": True, "detail": str(module.__file__)}


def _kernels() -> dict[str, dict[str, str]]:
    import torch

    import_module("stars_fast.ops")
    from stars_fast.ops._library import operators

    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {name: {kind: operator.kernel(kind) for kind in kinds} for name, operator in sorted(operators.items())}


def _libraries(devices: list[Report]) -> dict[str, dict[str, str]]:
    """Of each CUDA device, which libraries may attend to fresh prompts, or what keeps them from it."""
    gpus = [device["device"] for device in devices if device["device"].startswith("cuda")]
    if not gpus:
        return {}
    import torch

    from stars_fast.tree.prefill import libraries

    return {gpu: {one.name: one.problem or "works" for one in libraries(torch.device(gpu))} for gpu in gpus}


class _Loaded(NamedTuple):
    """A model, what lies beside it, and what runs it; a policy that is not there reads and writes nothing."""

    model: PreTrainedModel | None = None
    tokenizer: Any = None
    processor: Any = None
    runs: Any = None  # the Policy or ClassifierReward; None where it is refused


def _examine(role: str, name: str, policy: _Loaded | None = None) -> tuple[Report, _Loaded]:
    """Load a model and say which path it takes; of a reward model, whose ids it reads. Raises OSError for a name that
    leads nowhere, or to broken files.
    """
    from stars_fast.inputs.models import load_classifier, load_policy

    try:
        loaded = _Loaded(*(load_policy(name, None) if policy is None else load_classifier(name, None)))
        model = loaded.model
        assert model is not None
        described = _describe(model)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        return {"name": name, "path": REFUSED, "reason": one_line(error)}, _Loaded()
    try:
        path, runs = _policy_path(loaded) if policy is None else _reward_path(loaded, policy)
    except (ValueError, TypeError, NotImplementedError) as error:
        return {"name": name, **described, "path": REFUSED, "reason": one_line(error)}, loaded
    return {"name": name, **described, **path}, loaded._replace(runs=runs)


def _describe(model: PreTrainedModel) -> Report:
    from stars_fast.report.weights import Weights

    parameter, weights = next(model.parameters()), Weights.of(model)
    return {
        "class": type(model).__name__,
        "parameters": weights.parameters,
        "weights_bytes": weights.bytes,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
    }


def _policy_path(loaded: _Loaded) -> tuple[Report, Policy]:
    from stars_fast.policy.encoder_decoder import policy_of

    assert loaded.model is not None
    runs = policy_of(loaded.model)
    pictures = _NO_PICTURES
    if runs.takes_media and loaded.processor is None:
        pictures = "read of what a processor returns: none lies beside it, so that chats with pictures need processor="
    elif runs.takes_media:
        pictures = f"read, those of chats by the {type(loaded.processor).__name__} beside it"
    return {**_tree_path(runs, "its attention runs on the tree of slots"), "pictures": pictures}, runs


def _reward_path(loaded: _Loaded, policy: _Loaded) -> tuple[Report, ClassifierReward]:
    from stars_fast.rewards import ClassifierReward
    from stars_fast.text.tokenizers import is_processor, same_vocabulary

    assert loaded.model is not None
    beside = "processor" if is_processor(loaded.tokenizer) else "tokenizer"
    scorer = ClassifierReward(loaded.model, **{beside: loaded.tokenizer})
    if policy.model is not None:
        scorer.check_policy(policy.model, policy.tokenizer)
    if scorer.reads.tokenizer is None:
        reads = f"the policy's ids ({scorer.reads.why or 'no tokenizer lies beside it'})"
    else:
        reads = f"its own {beside}, which lies beside it"
        if policy.tokenizer is not None:
            same = same_vocabulary(scorer.reads.tokenizer, policy.tokenizer)
            reads += ", with the policy's vocabulary: ids are shared" if same else ": answers are tokenised anew"
    if scorer.tree_model is None:
        return {"path": IN_FULL, "reason": scorer.reason, "reads": reads, "pictures": _NO_PICTURES}, scorer
    why, pictures = "it is causal, and its attention runs on the tree of slots", _NO_PICTURES
    if scorer.tree_model.takes_media and scorer.processor is None:
        pictures = "read as the policy reads them, where ids and template are the policy's; else it needs a processor"
    elif scorer.tree_model.takes_media:
        pictures = f"read by its {type(scorer.processor).__name__}"
    return {**_tree_path(scorer.tree_model, why), "reads": reads, "pictures": pictures}, scorer


def _tree_path(tree_model: TreeModel, reason: str) -> Report:
    from stars_fast.tree.check import absolute_tolerance, max_difference
    from stars_fast.tree.prefill import in_words

    difference = max_difference(tree_model)
    return {
        "path": TREE,
        "reason": reason,
        "layers": len(tree_model.shapes),
        "kv_bytes_per_token": tree_model.bytes_per_token,
        "max_positions": tree_model.max_positions,
        "fresh_prompts": in_words(tree_model.asks, tree_model.device),
        "max_difference": difference,
        "agrees": difference <= absolute_tolerance(tree_model.dtype),
    }


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    console = stdout()
    _print_section(console, "versions", {name: version or "-" for name, version in report["versions"].items()})
    _print_section(console, "machine", {device["device"]: _device_words(device) for device in report["devices"]})
    extension = report["extension"]
    _print_section(console, "extension", {"stars_fast._C": extension["detail"]})
    setting = report["kernels_setting"]
    _print_section(
        console,
        "kernels" + (f" (STARS_FAST_KERNELS={setting})" if setting else ""),
        {
            name: ", ".join(kernel if len(kinds) == 1 else f"{kind}: {kernel}" for kind, kernel in kinds.items())
            for name, kinds in report["kernels"].items()
        },
    )
    for gpu, told in report["fresh_prompts"].items():
        _print_section(console, f"fresh prompts on {gpu}", told)
    for role, model in report["models"].items():
        _print_section(console, f"{role}: {model['name']}", _model_words(model))
    if report["pair"]:
        _print_section(console, "the pair", pair_words(report["pair"]))


def _print_section(console: Console, title: str, lines: dict[str, Any]) -> None:
    if not lines:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=18, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(f"  {name}", value if isinstance(value, Text) else str(value))
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print()


def _device_words(device: Report) -> str:
    if "threads" in device:
        threads = device["threads"]
        return f"{device['name']}, {threads} thread{'s' * (threads != 1)}"
    return f"{device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB"


def _model_words(model: Report) -> dict[str, Any]:
    colour = {TREE: "green", IN_FULL: "yellow", REFUSED: "red"}[model["path"]]
    words: dict[str, Any] = {"path": Text.assemble((model["path"], colour), f": {model['reason']}")}
    if "class" in model:
        words["model"] = f"{model['class']}, {model['parameters']:,} parameters, {model['dtype']} on {model['device']}"
    if "reads" in model:
        words["reads"] = model["reads"]
    if "pictures" in model:
        words["pictures"] = model["pictures"]
    if model["path"] == TREE:
        words["keys and values"] = f"{model['kv_bytes_per_token']:,} bytes a token in {model['layers']} layers"
        if model["fresh_prompts"]:  # sources are read by the model's own attention
            words["fresh prompts"] = f"by {model['fresh_prompts']}"
        words["positions"] = f"{model['max_positions']:,}" if model["max_positions"] else "no limit"
        verdict = "agrees" if model["agrees"] else "MORE THAN ROUNDING EXPLAINS"
        words["self-check"] = Text(
            f"{verdict}: at most {model['max_difference']:.1e} from a plain forward pass",
            style="" if model["agrees"] else "red",
        )
    return words
