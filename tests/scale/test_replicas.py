"""Ray Serve around the server's application: replicas that can answer no more are replaced."""

import contextlib
import json
import os
import signal
import socket
import time

import pytest

from stars_fast import StarsConfig

ray = pytest.importorskip("ray", reason="needs the extra ray")
serve = pytest.importorskip("ray.serve", reason="needs the extra ray-serve")
pytest.importorskip("stars_fast.serve.app", reason="needs the extra serve", exc_type=ImportError)
httpx = pytest.importorskip("httpx")

CONFIG = StarsConfig(target_reward=1.0, base_reward=0.0, max_new_tokens=24)
LIMIT = 120  # seconds


def fatal_reward():
    """Likes long texts; one text ends the thread that asks it, and one its process. It pickles by value."""

    class Panic(BaseException):  # as an extension in Rust raises it
        pass

    def reward(completions, prompts):
        if any("end the thread" in prompt for prompt in prompts):
            raise Panic
        if any("end the process" in prompt for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        return [float(len(completion)) for completion in completions]

    return reward


def ask(address, prompt, **more):
    body = {"model": "critic", "prompt": prompt, "seed": 1, **more}
    return httpx.post(f"{address}/v1/completions", json=body, timeout=30)


@pytest.fixture(scope="module")
def address(cluster):
    from stars_fast.scale.replicas import serve_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port})
    app = serve_app(
        "demo",
        fatal_reward(),
        CONFIG,
        model="critic",
        service={"samples_greedy": True, "max_model_len": 300},
        health_check_period_s=0.5,
        graceful_shutdown_timeout_s=2.0,
        ray_actor_options={"num_cpus": 0.5},
    )
    serve.run(app, name="stars", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.mark.parametrize("end", ["thread", "process"])
def test_a_replica_whose_engine_has_ended_is_replaced(address, end):
    text = ask(address, "The film").json()["choices"][0]["text"]
    with contextlib.suppress(httpx.HTTPError):
        assert ask(address, f"Now end the {end}").status_code >= 500
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        time.sleep(0.5)
        try:
            answer = ask(address, "The film")
        except httpx.HTTPError:
            continue
        if answer.status_code == 200:
            break
    assert answer.json()["choices"][0]["text"] == text


def test_a_replica_answers_as_the_command_does(address):
    """Lengths of the settings, chats for a policy without a template, and what the server was told of greedy ones."""
    whole = ask(address, "The film", ignore_eos=True, temperature=0).json()
    assert whole["usage"]["completion_tokens"] == CONFIG.max_new_tokens
    body = {"messages": [{"role": "user", "content": "The film"}], "seed": 1, "ignore_eos": True}
    chat = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30)
    assert chat.status_code == 200 and chat.json()["usage"]["completion_tokens"] == CONFIG.max_new_tokens
    (model,) = httpx.get(f"{address}/v1/models", timeout=30).json()["data"]
    assert (model["id"], model["max_model_len"]) == ("critic", 300)


def test_a_stream_comes_segment_by_segment(address):
    whole = ask(address, "The film", max_tokens=64).json()["choices"][0]["text"]
    events = ask(address, "The film", max_tokens=64, stream=True).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    pieces = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]]
    assert "data: [DONE]" in events and len(pieces) > 2 and "".join(pieces) == whole
