"""Rewards that users name by file: ``rewards.py:score``."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from stars_fast.names import near

_NAMED = re.compile(r"(?P<file>.+\.py)(?::(?P<name>\w+))?")
_GIVEN = ("prompts", "completions", "completion_ids")
_OF_PICTURES = "images"  # of prompts that have any


def file_of(name: Any) -> Path | None:
    """The file in ``FILE.py:NAME``, or in ``FILE.py`` without one; None for any other name, such as a model's."""
    named = _NAMED.fullmatch(name) if isinstance(name, str) else None
    return None if named is None else Path(named["file"])


def load_function(name: str) -> Any:
    """What ``FILE.py:NAME`` stands for: a function, or a :class:`stars_fast.rewards.Reward`. The file is run.

    What lies beside the file can be imported from it, after all that is installed.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        Where there is no such file, no NAME is given, the file does not run, nothing in it has that name, or it is no
        reward: not to be called, or with arguments that nobody has.
    """
    from stars_fast.rewards import Reward  # and with it torch, which whoever asks file_of does not wait for

    named = _NAMED.fullmatch(name)
    assert named is not None
    path, attribute = Path(named["file"]), named["name"]
    if not path.is_file():
        raise FileNotFoundError(f"reward={name!r}: no file {path}")
    if attribute is None:
        raise ValueError(f"reward={name!r}: give {path}:NAME; what is defined there is {_defined(path)}")
    found = vars(_run(path, name))
    if attribute not in found:
        public = sorted(one for one, value in found.items() if callable(value) and not one.startswith("_"))
        raise ValueError(
            f"reward={name!r}: nothing in {path} is called {attribute!r}{near(attribute, public)}; what can be called "
            f"there is {', '.join(public) or 'nothing'}"
        )
    reward = found[attribute]
    if isinstance(reward, type):
        raise TypeError(f"reward={name!r} is a class: name an instance, made in the file")
    if not isinstance(reward, Reward):
        _check_signature(reward, name)
    return reward


def _defined(path: Path) -> str:
    """The public functions and names of a file, which is not run."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        return f"not to be told: {error}"
    names = [one.name for one in body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    targets = [target for one in body if isinstance(one, ast.Assign) for target in one.targets]
    names += [target.id for target in targets if isinstance(target, ast.Name)]
    return ", ".join(name for name in names if not name.startswith("_")) or "nothing"


def _run(path: Path, name: str) -> ModuleType:
    # Two files of one name are two modules.
    digest = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()
    spec = importlib.util.spec_from_file_location(f"_stars_fast_{path.stem}_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look for it there
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(f"reward={name!r}: running {path} raised {type(error).__name__}: {error}") from error
    return module


def _check_signature(function: Any, name: str) -> None:
    if not callable(function):
        raise TypeError(
            f"reward={name!r} is a {type(function).__name__}: name a function, or a stars_fast.rewards.Reward"
        )
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # of some that are not written in Python; what wraps them says so
        return
    wanted = "give it the parameters completions, and prompts or completion_ids as it needs them"
    if not any(one in _GIVEN or p.kind is p.VAR_KEYWORD for one, p in parameters.items()):
        raise TypeError(f"reward={name!r} takes {', '.join(parameters) or 'nothing'}: {wanted}")
    for one, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if one not in (*_GIVEN, _OF_PICTURES) and not variadic and parameter.default is parameter.empty:
            raise TypeError(
                f"reward={name!r} needs {one!r}, which it is not called with: {wanted}, or give {one} a default"
            )
