"""What a folder's broken files lead to in Python: errors of normal types, in words that name the folder."""

import json

import pytest
from conftest import tiny_policy
from transformers import AutoConfig, Gemma3nTextConfig

from stars_fast import StarsEngine
from stars_fast.inputs import repositories


@pytest.fixture
def folder(tmp_path):
    tiny_policy(8, layers=1).save_pretrained(tmp_path)
    return tmp_path


def set_in_config(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_broken_weights_are_an_os_error_that_names_the_folder_and_keeps_its_cause(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(OSError, match=f"^'{folder}' cannot be loaded: SafetensorError: ") as raised:
        StarsEngine(folder, len)
    assert type(raised.value.__cause__).__name__ == "SafetensorError"


@pytest.mark.parametrize("nested", [False, True])
def test_layers_without_end_are_refused_before_they_are_made(folder, nested):
    fields = {"num_hidden_layers": 10**9}
    set_in_config(folder, **({"text_config": fields} if nested else fields))
    with pytest.raises(
        ValueError, match=f"'{folder}': its config.json has num_hidden_layers=1000000000: .*at most 10000"
    ):
        StarsEngine(folder, len)


def test_a_size_with_layer_in_its_name_is_no_number_of_layers(tmp_path):
    """Gemma 3n has a vocabulary per layer, of 262,144."""
    Gemma3nTextConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert repositories.read(AutoConfig, tmp_path).vocab_size_per_layer_input == 262144
