"""What is the user's is one line; what is ours is a traceback."""

import errno
import io
import json
import re
import warnings

import pytest
import torch
import typer
from tokenizers import Tokenizer
from typer.testing import CliRunner

from stars_fast.cli import app, console, generate
from stars_fast.cli.console import refusing_models
from stars_fast.report.files import summary

PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "added_tokens": [],
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
}


def test_whatever_a_library_raises_is_one_line_and_bad_usage(capsys):
    for broken, words in (
        (lambda: json.loads("[" * 99_999), "RecursionError: maximum recursion"),
        (lambda: Tokenizer.from_str(json.dumps(PANICS)), "PanicException: Precompiled"),
        (lambda: torch.nn.Embedding(3, 4, padding_idx=7), "AssertionError: Padding_idx must be within"),
    ):
        with pytest.raises(typer.Exit) as left, refusing_models():
            broken()
        error = capsys.readouterr().err
        assert left.value.exit_code == 2 and error.startswith(f"error: {words}") and error.count("\n") == 1


def test_a_mistake_of_our_own_is_seen_as_one():
    with pytest.raises(AttributeError, match="has no attribute 'tokens'"), refusing_models():
        summary(json)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (MemoryError(), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_full_machine_and_an_interruption_say_how_to_go_on(capsys, error, code):
    with pytest.raises(typer.Exit) as left, refusing_models("; run it again"):
        raise error
    assert left.value.exit_code == code and capsys.readouterr().err.endswith("; run it again\n")


def test_a_kernel_that_read_elsewhere_does_not_ask_for_the_same_again(capsys):
    with pytest.raises(typer.Exit), refusing_models("; run it again"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert capsys.readouterr().err == "error: RuntimeError: CUDA error: an illegal memory access was encountered\n"


def test_a_reader_that_had_enough_is_no_error(capsys):
    with pytest.raises(BrokenPipeError), refusing_models():
        raise BrokenPipeError
    assert capsys.readouterr().err == ""


def test_a_long_complaint_is_cut():
    assert console.one_line("x" * 10**6) == "x" * 2000 + " ..."


def test_a_debugging_user_sees_the_traceback(tmp_path, monkeypatch):
    command = ["doctor", "--policy", str(tmp_path)]
    (tmp_path / "config.json").write_text("{")
    assert "Traceback" not in CliRunner().invoke(app, command).stderr
    shown = CliRunner().invoke(app, ["--debug", *command])
    assert "Traceback" in shown.stderr and "JSONDecodeError" in shown.stderr and shown.exit_code == 2
    monkeypatch.setenv("STARS_FAST_DEBUG", "1")
    assert "Traceback" in CliRunner().invoke(app, command).stderr
    monkeypatch.delenv("STARS_FAST_DEBUG")
    assert "Traceback" not in CliRunner().invoke(app, command).stderr


def test_a_warning_is_a_line(capsys):
    with warnings.catch_warnings():
        console.warn_in_one_line()
        warnings.warn("this is\nodd", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: this is odd\n"


def test_a_terminal_gets_no_controls_of_a_model_and_a_pipe_gets_the_text_itself(capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = "a\x1b]52;c;aGk=\x07\tb\r\nc\x9b31md\x7f"
    record = {"id": text, "prompt": text, "completion": text, "error": None, "reward": 1.0, "tokens": 3}
    records = [{**record, "finish_reason": "stop"}, {**record, "error": text}]
    terminal, pipe = Terminal(), io.StringIO()
    generate._write_texts(terminal, records)
    generate._write_texts(pipe, records)
    generate._print_rows(records)
    shown = capsys.readouterr()
    assert terminal.getvalue() == "a\ufffd]52;c;aGk=\ufffd\tb\nc\ufffd31md\ufffd\n" and pipe.getvalue() == f"{text}\n"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown.out + shown.err) and "]52;c;aGk=" in shown.out
