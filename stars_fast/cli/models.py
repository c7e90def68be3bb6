"""Models as the command line names them: ``demo``, a folder or a hub id, put on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

DEMO = "demo"


def quiet_transformers() -> None:
    """No bars while weights load. Warnings stay: a head that the checkpoint lacks is drawn at random."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def policy_named(name: str, tokenizer: str | None, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """The policy and its tokenizer.

    Raises
    ------
    OSError, ValueError, TypeError
        As transformers says, for a name or a model it cannot load.
    """
    from stars_fast.inputs.models import load_policy

    _check_folder(name)
    if name != DEMO:
        model, own = load_policy(name, tokenizer)
        return _placed(model, dtype, device), own
    model, _, own = _demo()
    return _placed(model, dtype, device), load_policy(model, tokenizer or own)[1]


def classifier_named(name: str, tokenizer: str | None, dtype: str, device: str) -> tuple[PreTrainedModel, Any]:
    """The reward model and its tokenizer; None for a tokenizer if it reads the policy's ids. Raises as above."""
    from stars_fast.inputs.models import load_classifier

    _check_folder(name)
    if name == DEMO:
        _, model, own = _demo()
    else:
        model, own = load_classifier(name, tokenizer)
    return _placed(model, dtype, device), tokenizer or own


def config_of(name: str, role: str) -> PreTrainedConfig:
    """The config alone of a policy or reward model, which may also be a file or a short name. Raises as above."""
    from stars_fast import demo
    from stars_fast.roofline import config_named

    return config_named(str(Path(demo.__file__).parent / role) if name == DEMO else name)


def _check_folder(name: str) -> None:
    """transformers takes a folder that does not exist for a hub id, and says so at length."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"no folder {name}: give a model's folder, a hub id or {DEMO!r}")


def _demo() -> tuple[Any, Any, Any]:
    from stars_fast import demo

    try:
        return demo.load()
    except OSError as error:
        raise OSError(f"the demo models are missing here; examples/train_demo.py makes them ({error})") from error


def placement(device: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one. Raises RuntimeError for a name torch lacks."""
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def _placed(model: Any, dtype: str, device: str) -> PreTrainedModel:
    import torch

    try:
        place = placement(device)
        placed: PreTrainedModel = model.to(place) if dtype == "auto" else model.to(place, getattr(torch, dtype))
        return placed
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r}: {error}") from error
