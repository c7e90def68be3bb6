"""What transformers reads of a folder or hub id, and errors in words for what is broken there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import find_adapter_config_file

_MOST_LAYERS = 10_000
# What transformers' configs call their number. Other fields with "layer" in their name are sizes of anything.
_NUMBERS_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def read(auto: Any, name: str, **options: Any) -> Any:
    """``auto.from_pretrained(name, **options)``.

    Raises
    ------
    OSError, ValueError, ImportError
        As transformers says; OSError for all that it and the libraries below it raise by mistake, of broken files.
    """
    try:
        _refuse_endless(name)
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{name!r} cannot be loaded: {type(error).__name__}: {error}") from error


def adapted(name: str) -> str:
    """The model that an adapter changes, as its folder or repository names it. Raises OSError where there is none."""
    file = find_adapter_config_file(name)
    if file is None:
        raise OSError(f"{name!r} holds no adapter")
    return str(json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"])


def _refuse_endless(name: str) -> None:
    """Raise ValueError for more layers than a model has: all are made before it is seen that they have no weights."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except OSError:  # an adapter's folder has none, and whatever else is wrong is said when the model is read
        return
    for part in (values, values.get("text_config")):
        for field, value in part.items() if isinstance(part, dict) else ():
            if field in _NUMBERS_OF_LAYERS and isinstance(value, int) and value > _MOST_LAYERS:
                raise ValueError(f"{name!r}: its config.json has {field}={value}: must be at most {_MOST_LAYERS}")
