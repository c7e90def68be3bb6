"""StarsConfig from a YAML file and from ``--set name=value``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stars_fast.config import StarsConfig
from stars_fast.methods import METHODS, Method
from stars_fast.report.files import check_known, parse_yaml, read_yaml

_FIELDS = tuple(field.name for field in dataclasses.fields(StarsConfig))
_MODELS = ("policy", "reward")
_WORDS = ("finished_threshold", "fit", "method", "stop_strings")  # "1" means the text there, not the number


class Settings(NamedTuple):
    """What a configuration file and the command line say together."""

    config: StarsConfig
    policy: str | None
    reward: str | None
    given: frozenset[str] = frozenset()  # fields of the config that they name


def read_settings(path: Path | None, assignments: Sequence[str] = (), **options: Any) -> Settings:
    """Read a YAML file of StarsConfig fields, ``policy`` and ``reward``; assignments and options win over it.

    Parameters
    ----------
    path : Path, optional
    assignments : sequence of str
        ``name=value``, of a field of StarsConfig or of a parameter of the method that is chosen.
    **options
        Fields that have options of their own; None where one was not given. A method is written as in an assignment.

    Raises
    ------
    OSError
        For a file that cannot be read.
    ValueError, TypeError
        For unknown keys, naming them, for values out of range, and for a field that is given twice.
    """
    values = {} if path is None else _read_file(path)
    models = {name: values.pop(name, None) for name in _MODELS}
    for name, model in models.items():
        if model is not None and not isinstance(model, str):
            raise TypeError(f"{path}: {name}={model!r}: give a folder or a hub id")
    given = {name: value for name, value in options.items() if value is not None}
    if "method" in given:
        given["method"] = _parse("method", given["method"])
    parameters = dict[str, str]()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r}: write name=value")
        if name in given:
            raise ValueError(f"{option(name)} and --set {name}: give one of them")
        if name in _FIELDS:
            values[name] = _parse(name, text)
        else:
            parameters[name] = text
    values |= given
    if parameters:
        values["method"] = _with(values.get("method", StarsConfig().method), parameters)
    config = StarsConfig(**{name: _numbers(name, value) for name, value in values.items()})
    for name in ("target_reward", "base_reward"):
        if isinstance(getattr(config, name), tuple):
            raise ValueError(f"{name} is a list, one per prompt: give one number for all rows, or leave it out")
    return Settings(config, **models, given=frozenset(values))


def _read_file(path: Path) -> dict[str, Any]:
    """The fields and models in a file; a method's parameters stand within its mapping there."""
    values = read_yaml(path, None)
    for name in values:
        having = [one for one, method in METHODS.items() if name not in _FIELDS and _has(method, name)]
        if having:
            chosen = values["method"] if values.get("method") in having else having[0]
            raise ValueError(
                f"{path}: {name} is a parameter of {', '.join(having)}: write method: "
                f"{{name: {chosen}, {name}: {values[name]}}}"
            )
    check_known(map(str, values), str(path), (*_MODELS, *_FIELDS))
    return values


def option(name: str) -> str:
    """The option of a field of StarsConfig that has one, as it is written."""
    return "--n" if name == "num_return_sequences" else f"--{name.replace('_', '-')}"


def _with(method: Any, parameters: Mapping[str, str]) -> dict[str, Any]:
    """A method by name, with parameters from assignments."""
    chosen = dict(method) if isinstance(method, Mapping) else {"name": method}
    known = METHODS.get(chosen["name"]) if isinstance(chosen.get("name"), str) else None
    for name, text in parameters.items():
        if known is None or not _has(known, name):
            having = [one for one, method in METHODS.items() if _has(method, name)]
            if having:
                give = " or ".join(f"--method {one}" for one in having)
                raise ValueError(
                    f"--set {name}={text}: {name} is a parameter of {', '.join(having)}: give {give} with it"
                )
            own = [] if known is None else [field.name for field in dataclasses.fields(known)]
            check_known({name}, "--set", [*_FIELDS, *own])
        words = known is not None and _takes_words(known, name)
        value = _parse(name, text, words)
        chosen[name] = value if words else _numbers(name, value)
    return chosen


def _has(method: type[Method], name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(method))


def _takes_words(method: type[Method], name: str) -> bool:
    """Whether a parameter is text, or the name of a model."""
    types = {field.name: str(field.type) for field in dataclasses.fields(method)}
    return types.get(name, "").startswith(("str", "Any"))


def _parse(name: str, text: str, words: bool = False) -> Any:
    """The value in ``name=value``: YAML, and ``none``. Where it is to be ``words``, no number is one."""
    if text.lower() == "none":
        return None
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    except ValueError as error:
        raise ValueError(f"--set {name}: {error}") from error
    taken = value is None or isinstance(value, (str, list)) or (name == "method" and isinstance(value, dict))
    return text if (words or name in _WORDS) and not taken else value


def _numbers(name: str, value: Any) -> Any:
    """Numbers that YAML takes for text, such as ``1e-3``, ``inf`` and ``-inf``."""
    if isinstance(value, list) and name not in _WORDS:
        return [_numbers(name, one) for one in value]
    if isinstance(value, str) and name not in _WORDS:
        for number in (int, float):
            try:
                return number(value)
            except ValueError:
                pass
    return value
