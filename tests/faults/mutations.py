"""Repositories as nobody should publish them: small changes to one sound folder of a model and its tokenizer."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Change = Callable[[Path], None]
_DEEP = "[" * 100_000


# ------------------------------------------------------------------------------------------- broken
def broken() -> dict[str, Change]:
    """What a cut-off download, a disk or a slip of the keyboard makes of a folder."""
    made: dict[str, Change] = {}
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        for name, contents in _CONTENTS.items():
            made[f"{file} {name}"] = _written(file, contents)
        made[f"{file} missing"] = _removed(file)
        made[f"{file} cut off"] = _cut(file, 0.5)
        made[f"{file} a folder"] = _made_a_folder(file)
        made[f"{file} a dangling link"] = _linked(file, "nowhere")
    for field, values in _FIELDS.items():
        for value in values:
            made[f"{field}={value!r:.20}"] = _set("config.json", field, value)
        made[f"no {field}"] = _without("config.json", field)
    for name, value in _TOKENIZER_PARTS:
        made[f"tokenizer.json {name}={json.dumps(value):.40}"] = _set("tokenizer.json", name, value)
    for name, value in _TOKENIZER_SETTINGS:
        made[f"tokenizer_config.json {name}={json.dumps(value):.40}"] = _set("tokenizer_config.json", name, value)
    for name, value in _GENERATION:
        made[f"generation_config.json {name}={json.dumps(value):.40}"] = _set("generation_config.json", name, value)
    return made | _broken_weights()


_CONTENTS = {
    "empty": b"",
    "a brace": b"{",
    "no JSON": b"<html>404</html>",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "text": b'"text"',
    "an empty object": b"{}",
    "deep": _DEEP.encode(),
    "NUL bytes": bytes(100),
    "no UTF-8": b'{"a": "\xff\xfe"}',
}
_COUNTS = (0, -1, "x", 2.5, [])
_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_size": (*_COUNTS, 1 << 62),
    "intermediate_size": (*_COUNTS, 1 << 62),
    "num_hidden_layers": (*_COUNTS, 10**6),
    "num_attention_heads": (*_COUNTS, 3),
    "num_key_value_heads": (*_COUNTS, 3),
    "vocab_size": (*_COUNTS, 1 << 62),
    "head_dim": (*_COUNTS, 7),
    "max_position_embeddings": _COUNTS,
    "rms_norm_eps": (-1.0, "x", 1e308),
    "hidden_act": ("no_such", 3, ""),
    "rope_parameters": (
        {"rope_type": "no_such"},
        {"rope_type": "yarn"},
        {"rope_type": "default", "rope_theta": 0},
        [],
        "x",
    ),
    "pad_token_id": (10**6, -7, "x"),
    "eos_token_id": (10**6, -7, "x", [], [3, "x"]),
    "tie_word_embeddings": (True, "x"),
    "model_type": ("no_such", 3),
    "architectures": (["NoSuch"], 3, []),
    "dtype": ("float8", "int8", 3),
    "attention_bias": (True,),
    "layer_types": (["no_such"] * 2, ["sliding_attention"] * 3),
    "quantization_config": ({"quant_method": "no_such"}, {}, [1]),
}
_TOKENIZER_PARTS = [
    ("model", {"type": "NoSuch"}),
    ("model", None),
    ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "w0"}),
    ("model", {"type": "WordLevel", "vocab": {"w0": -1}, "unk_token": "w0"}),
    ("model", {"type": "WordLevel", "vocab": {"w0": 1 << 40}, "unk_token": "w0"}),
    ("model", {"type": "WordLevel", "vocab": {"w0": 999_999, "w5": 999_998}, "unk_token": "w0"}),
    ("model", {"type": "WordLevel", "vocab": {"w0": 0, "w1": 0}, "unk_token": "w0"}),
    ("model", {"type": "WordLevel", "vocab": {"w1": 1}, "unk_token": "[UNK]"}),
    ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}),
    ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}),
    ("model", {"type": "Unigram", "vocab": [], "unk_id": 7}),
    ("model", {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}),
    ("pre_tokenizer", {"type": "NoSuch"}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a|a)*b"}, "behavior": "Isolated", "invert": False}),
    ("normalizer", {"type": "NoSuch"}),
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}]}),
    ("decoder", {"type": "NoSuch"}),
    ("added_tokens", [{"id": -1}]),
    ("added_tokens", "x"),
    ("truncation", {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}),
    ("padding", {"strategy": {"Fixed": 100}, "direction": "Left", "pad_id": 99, "pad_type_id": 0, "pad_token": "no"}),
]
_TOKENIZER_SETTINGS = [
    ("tokenizer_class", "NoSuch"),
    ("tokenizer_class", 3),
    ("tokenizer_class", "BertTokenizer"),
    ("eos_token", {"content": 3}),
    ("eos_token", ["</s>"]),
    ("model_max_length", "x"),
    ("model_max_length", -1),
    ("chat_template", "{% for %}"),
    ("chat_template", 3),
    ("added_tokens_decoder", {"x": {}}),
    ("extra_special_tokens", 3),
    ("padding_side", "up"),
]
_GENERATION = [
    ("eos_token_id", 10**6),
    ("eos_token_id", "x"),
    ("temperature", -1),
    ("temperature", "x"),
    ("top_k", -5),
    ("top_p", 7),
    ("max_length", -3),
    ("num_beams", "x"),
    ("repetition_penalty", 0),
    ("cache_implementation", "no_such"),
    ("suppress_tokens", [10**6]),
    ("bad_words_ids", "x"),
    ("stop_strings", 3),
    ("watermarking_config", 3),
]


def _broken_weights() -> dict[str, Change]:
    made: dict[str, Change] = {
        f"weights cut to {size}": _cut("model.safetensors", size) for size in (0, 4, 8, 9, 200, 0.5, -1)
    }
    made |= {f"header of {size} bytes": _header_size(size) for size in (0, 1, 10_000_000, (1 << 63) - 1, (1 << 64) - 1)}
    made |= {f"header {name}": _header(edit) for name, edit in _HEADERS.items()}
    made |= {
        "weights are text": _written(
            "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        "weights are a folder": _made_a_folder("model.safetensors"),
        "weights missing": _removed("model.safetensors"),
        "weights are not numbers": _not_finite,
        "a shard missing": _index(
            {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        ),
        "an index of nothing": _index({"weight_map": {}}),
        "an index without a map": _index({}),
        "an index of numbers": _index({"metadata": {}, "weight_map": {"lm_head.weight": 3}}),
        "an index that is a list": _index([]),
    }
    return made


def _rename(header: dict[str, Any]) -> None:
    header["no.such.weight"] = header.pop("lm_head.weight")


_HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "without a weight": lambda header: header.pop("model.norm.weight"),
    "with a strange weight": _rename,
    "of another type": lambda header: header["lm_head.weight"].update(dtype="I8"),
    "of an unknown type": lambda header: header["lm_head.weight"].update(dtype="X7"),
    "of another shape": lambda header: header["lm_head.weight"].update(shape=[16, 32]),
    "of a vast shape": lambda header: header["lm_head.weight"].update(shape=[1 << 40, 1 << 40]),
    "of a negative shape": lambda header: header["lm_head.weight"].update(shape=[-1, 16]),
    "of other places": lambda header: header["lm_head.weight"].update(data_offsets=[5, 9]),
    "of places far away": lambda header: header["lm_head.weight"].update(data_offsets=[1 << 40, 1 << 41]),
    "of no places": lambda header: header["lm_head.weight"].pop("data_offsets"),
}


def _not_finite(folder: Path) -> None:
    path = folder / "model.safetensors"
    contents = path.read_bytes()
    start = 8 + struct.unpack("<Q", contents[:8])[0]
    path.write_bytes(contents[:start] + b"\xff" * (len(contents) - start))


def _header_size(size: int) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])

    return change


def _header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        contents = path.read_bytes()
        end = 8 + struct.unpack("<Q", contents[:8])[0]
        header = json.loads(contents[8:end])
        edit(header)
        written = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(written)) + written + contents[end:])

    return change


def _index(contents: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(contents))

    return change


# ---------------------------------------------------------------------------------------- malicious
def malicious(canary: Path) -> dict[str, Change]:
    """What would make the folder ``canary`` if anything of a repository were run."""
    code = code_of(canary)
    made: dict[str, Change] = {}
    for kind, weights in pickles(canary).items():
        for file in ("pytorch_model.bin", "model.safetensors"):
            made[f"{kind} as {file}"] = _only_weights(file, weights)
    zipped = pickles(canary)["a pickle in a zip"]
    for file in ("consolidated.pth", "model.pt", "tf_model.h5", "flax_model.msgpack", "training_args.bin"):
        made[f"a pickle as {file}"] = _only_weights(file, zipped)
    made["a pickle beside weights"] = _written("pytorch_model.bin", zipped)
    made["a pickle among shards"] = _sharded(zipped)
    for target in ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"):
        for kind in ("llama", "no_such"):
            made[f"auto_map of {target} for {kind}"] = _with_code(
                code, "config.json", target, "evil.Evil", model_type=kind
            )
    made["auto_map of another repository"] = _with_code(code, "config.json", "AutoConfig", "org/name--evil.Evil")
    made["auto_map out of the folder"] = _with_code(
        code, "config.json", "AutoConfig", "../evil.Evil", model_type="no_such"
    )
    made["auto_map of a tokenizer"] = _with_code(
        code, "tokenizer_config.json", "AutoTokenizer", ["evil.Evil", "evil.Evil"]
    )
    made["auto_map of an unknown tokenizer"] = _with_code(
        code, "tokenizer_config.json", "AutoTokenizer", [None, "evil.Evil"], tokenizer_class="Evil"
    )
    made["auto_map of generation"] = _with_code(code, "generation_config.json", "GenerationConfig", "evil.Evil")
    made["auto_map of a processor"] = _with_code(code, "processor_config.json", "AutoProcessor", "evil.Evil")
    made["custom_generate"] = _with_code(
        code, "generation_config.json", "custom_generate", "evil", custom_generate="evil"
    )
    for name in ("os.system", "evil.Evil", "../evil", "__import__", "builtins.exec", "EvilTokenizer"):
        made[f"tokenizer_class {name}"] = _with_code(code, "tokenizer_config.json", "x", "x", tokenizer_class=name)
        made[f"architectures {name}"] = _with_code(code, "config.json", "x", "x", architectures=[name])
    for name in ("org/kernel", "kernels-community/evil:run", "evil", "../evil", "paged|evil"):
        made[f"attention {name}"] = _with_code(code, "config.json", "x", "x", _attn_implementation=name)
    for base in ("../evil", "org/name", "/etc", "."):
        made[f"adapter on {base}"] = _adapter(code, base, zipped)
    made["a quantiser of its own"] = _with_code(
        code, "config.json", "x", "x", quantization_config={"quant_method": "evil"}
    )
    for place, expression in enumerate(_ESCAPES):
        made[f"template {place}"] = _template(expression.format(canary=canary), place)
    for field in ("tokenizer_file", "vocab_file", "added_tokens_file", "name_or_path"):
        made[f"{field} out of the folder"] = _set("tokenizer_config.json", field, "../../../../etc/passwd")
    made["weights out of the folder"] = _index(
        {"metadata": {}, "weight_map": {"lm_head.weight": "../../../../etc/passwd"}}
    )
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        made[f"{file} a link out of the folder"] = _linked(file, "/etc/passwd")
    return made


def code_of(canary: Path) -> str:
    """Python that makes the canary."""
    return f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\n"


_ESCAPES = (
    "cycler.__init__.__globals__.os.makedirs('{canary}')",
    "self.__init__.__globals__.__builtins__.__import__('os').makedirs('{canary}')",
    "lipsum.__globals__['os'].makedirs('{canary}')",
    "raise_exception.__globals__['os'].makedirs('{canary}')",
    "strftime_now.__globals__['os'].makedirs('{canary}')",
    "namespace.__init__.__globals__['os'].makedirs('{canary}')",
    "''.__class__.__mro__[1].__subclasses__()",
    "(messages|attr('__class__')).__base__.__subclasses__()",
    "messages.__init__.__globals__['os'].makedirs('{canary}')",
    "'{{0.__class__}}'.format(messages)",
)


def _template(expression: str, place: int) -> Change:
    """An escape in a chat template, which stands in one file or another."""
    template = "{% for m in messages %}{{ " + expression + " }}w1{% endfor %}"
    if place % 2:
        return _written("chat_template.jinja", template.encode())

    def change(folder: Path) -> None:
        _set("tokenizer_config.json", "chat_template", template)(folder)
        (folder / "chat_template.jinja").unlink()  # it would win

    return change


class _Touch:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def pickles(canary: Path) -> dict[str, bytes]:
    """Files that make the canary when they are unpickled."""
    kinds = {
        "a pickle": pickle.dumps({"lm_head.weight": _Touch(os.makedirs, str(canary))}),
        "a pickled exec": pickle.dumps(_Touch(exec, f"import os; os.makedirs({str(canary)!r})"), protocol=0),
    }
    for name, zipped in (("a pickle in a zip", True), ("a pickle of old", False)):
        file = io.BytesIO()
        torch.save({"lm_head.weight": _Touch(os.makedirs, str(canary))}, file, _use_new_zipfile_serialization=zipped)
        kinds[name] = file.getvalue()
    return kinds


def _only_weights(file: str, contents: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / file).write_bytes(contents)

    return change


def _sharded(contents: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "shard.bin").write_bytes(contents)
        (folder / "pytorch_model.bin.index.json").write_text(
            '{"metadata": {}, "weight_map": {"lm_head.weight": "shard.bin"}}'
        )

    return change


def _with_code(code: str, file: str, key: str, target: Any, **fields: Any) -> Change:
    """Code in every place where it could be looked for, and ``auto_map`` and fields that ask for it."""

    def change(folder: Path) -> None:
        for place in (folder, folder.parent):
            (place / "evil.py").write_text(code)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        path = folder / file
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, "auto_map": {key: target}, **fields}))

    return change


def _adapter(code: str, base: str, weights: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / "evil.py").write_text(code)
        (folder / "adapter_model.bin").write_bytes(weights)
        adapter = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
            "target_modules": ["q_proj"],
            "r": 2,
        }
        (folder / "adapter_config.json").write_text(json.dumps(adapter))

    return change


# ------------------------------------------------------------------------------------------ changes
def _written(file: str, contents: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_bytes(contents)

    return change


def _removed(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def _cut(file: str, size: float) -> Change:
    """To so many bytes; to that share of them, for a fraction; by so many, for a negative number."""

    def change(folder: Path) -> None:
        contents = (folder / file).read_bytes()
        end = int(size * len(contents)) if isinstance(size, float) else size
        (folder / file).write_bytes(contents[:end])

    return change


def _made_a_folder(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return change


def _linked(file: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(target)

    return change


def _edited(file: str, edit: Callable[[dict[str, Any]], Any]) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        edit(values)
        (folder / file).write_text(json.dumps(values))

    return change


def _set(file: str, field: str, value: Any) -> Change:
    return _edited(file, lambda values: values.update({field: value}))


def _without(file: str, field: str) -> Change:
    return _edited(file, lambda values: values.pop(field, None))
