"""``stars-fast serve`` as a process: how it starts, warns, refuses and ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest
from serving import CONFIG, ENDLESS, chunks_of, running, tiny_engine
from typer.testing import CliRunner

from stars_fast import StarsConfig, StarsEngine
from stars_fast.cli import app, serve
from stars_fast.serve.server import bind

SERVE = ("serve", "--policy", "demo", "--reward", "demo", "--port", "0")


@pytest.fixture(autouse=True)
def logs_as_before(monkeypatch):
    monkeypatch.setattr("stars_fast.serve.logs.log_json", lambda: None)  # it would hold on to a closed stderr


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, [*SERVE, *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@contextmanager
def started(*arguments, **environment):
    """The process, where it listens, and its log so far."""
    command = [sys.executable, "-m", "stars_fast", *SERVE, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    log, ready = list[str](), threading.Event()

    def read() -> None:
        for line in process.stderr:
            log.append(line)
            if "startup complete" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(120) and process.poll() is None, log
        (address,) = [line for line in log if "http://" in line]
        yield process, "http://" + json.loads(address)["message"].split("http://")[1], log
    finally:
        process.kill()
        process.wait()
        reader.join()


def test_it_starts_offline_warns_of_pilots_and_ends_a_stream_whole_on_sigterm():
    options = ("--api-key", "secret", "--max-model-len", 900)
    with started(*options, HF_HUB_OFFLINE="1", WEB_CONCURRENCY="4") as (process, url, log):
        warning, alone = [json.loads(line)["message"] for line in log if '"warning"' in line]
        assert "WEB_CONCURRENCY=4" in alone and "CUDA_VISIBLE_DEVICES" in alone
        assert "--fit" in warning and "--target-reward" in warning
        client = httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=60)
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 900
        stars = {"target_reward": 1.0, "segment_length": 8}
        asked = dict(prompt="This film is", max_tokens=160, seed=0, stream=True, ignore_eos=True, stars=stars)
        with client.stream("POST", "/v1/completions", json=asked) as got:
            parts = got.iter_text()
            text = next(parts)
            process.send_signal(signal.SIGTERM)
            text += "".join(parts)
        assert chunks_of(text)[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        assert all(isinstance(json.loads(line), dict) for line in log if line.startswith("{"))


def test_open_requests_are_ended_with_what_they_have_when_the_grace_is_over():
    asked = dict(prompt="x", max_tokens=450, seed=0, stream=True, **ENDLESS)
    with running(tiny_engine(), grace=0.1) as server, server.http.stream("POST", "/v1/completions", json=asked) as got:
        parts = got.iter_text()
        text = next(parts)
        server.stop()
        text += "".join(parts)
    assert chunks_of(text)[-1]["choices"][0]["finish_reason"] == "abort"


def test_an_address_is_taken_before_anybody_answers():
    with bind("127.0.0.1", 0) as first, pytest.raises(OSError, match="in use"):
        bind(*first.getsockname())


def test_what_cannot_be_served_is_refused_before_models_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("stars_fast.cli.models.load_engine", None)
    assert "refuse or sample" in refused("--greedy", "yes")
    assert "is empty" in refused("--api-key", " ")
    assert "stars_config" in refused("--fit", tmp_path) or "stars_fit.json" in refused("--fit", tmp_path)
    assert "unknown" in refused("--set", "alhpa=1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in refused("--port", port)


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch):
    find = serve.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else find(name))
    assert "this command needs fastapi: install the extra 'serve'" in refused()


def test_the_command_line_imports_no_server():
    code = "import sys, stars_fast, stars_fast.cli; assert not {'fastapi', 'uvicorn', 'pydantic'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_segments_longer_than_a_heartbeat_may_be_are_refused_at_the_start():
    assert "max_segment_length=8" in refused("--max-segment-length", 8)


def test_a_fit_brings_its_segments_and_sampling_and_spares_the_pilots():
    assert "in the fit): give --set top_k=50, or make" in refused("--fit", "demo", "--set", "top_k=3")
    from stars_fast.serve.assembly import calibrates, with_fit

    config = with_fit(StarsConfig(fit="demo"), ())
    assert config.top_k == 50 and not calibrates(config) and calibrates(StarsConfig())
    assert with_fit(StarsConfig(fit="demo", top_k=3), ("top_k",)).top_k == 3
    assert not calibrates(StarsConfig(method="vanilla")) and not calibrates(StarsConfig(target_reward=2.0))


def test_another_temperature_than_the_fits_is_told_what_needs_no_fit(recwarn):
    from stars_fast.serve.assembly import with_fit

    with running(StarsEngine("demo", "demo"), config=with_fit(StarsConfig(fit="demo", acceptance=0.2), ())) as server:
        asked = {"prompt": "This film is", "max_tokens": 2, "temperature": 0.7}
        told = server.post("/v1/completions", **asked).json()["error"]["message"]
        assert 'give temperature=1.0, or stars: {"target_reward": ...}' in told and "stars_fast" not in told
        answered = server.post("/v1/completions", **asked, stars={"target_reward": 1.0})
    assert answered.status_code == 200
    assert not [one for one in recwarn if "without effect" in str(one.message)], "the operator has not named both"


def test_a_service_takes_its_length_from_a_config_that_says_it_and_gives_the_engine_back():
    from stars_fast.serve.assembly import service_of

    engine = tiny_engine()
    engine.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="max_segment_length=8"):
        service_of(engine, StarsConfig(target_reward=1.0), "tiny", max_segment_length=8)
    for config, longest in ((CONFIG, None), (CONFIG.replace(max_new_tokens=64), 64)):
        service = service_of(engine, config, "tiny")
        service.engine.close()
        assert service.max_tokens == longest and service.timeout == 600
    chat = [{"role": "user", "content": "hi"}, {"role": "user", "content": "there"}]
    assert engine.tokenizer.apply_chat_template(chat, tokenize=False).endswith("hi\nthere")
