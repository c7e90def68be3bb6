"""A server of tiny models on the loopback address, and what may be asked of it."""

import json
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn
from tiny_tokenizers import CHATML, byte_bpe, models_for

from stars_fast import AsyncStarsEngine, StarsConfig, StarsEngine
from stars_fast.serve.app import create_app
from stars_fast.serve.server import _Server, bind
from stars_fast.serve.service import Service

CONFIG = StarsConfig(segment_length=6, max_attempts=4, target_reward=0.5, base_reward=0.0, beta=0.7)
ENDLESS = {"ignore_eos": True, "stars": {"target_reward": 1e6, "segment_length": 4}}


def tiny_engine(reward=None, **options) -> StarsEngine:
    """Random models over a byte-level vocabulary: answers are full of characters that are cut anywhere."""
    tokenizer = byte_bpe(400, template=CHATML)
    policy, classifier = models_for(tokenizer)
    return StarsEngine(policy, classifier if reward is None else reward, tokenizer=tokenizer, **options)


class Server:
    """Where it listens, and what is behind it."""

    def __init__(self, service: Service, url: str, api_key: str | None, server: uvicorn.Server) -> None:
        self.service, self.url, self._server = service, url, server
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60)

    def post(self, path="/v1/completions", **body):
        return self.http.post(path, json=body)

    def ask(self, **body) -> dict:
        response = self.post(**{"prompt": "the cat", "max_tokens": 12, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def stop(self) -> None:
        self._server.should_exit = True

    def gauge(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def settle(self, seconds: float = 10.0) -> None:
        """Wait until nothing is under way, then assert that all slots are free but those of kept prefixes."""
        until = time.monotonic() + seconds
        while self.gauge("stars_requests_running") or self.gauge("stars_requests_open"):
            assert time.monotonic() < until, "requests are under way still"
            time.sleep(0.02)
        engine = self.service.engine.engine
        with engine.core._turn():
            for tree in (engine.policy, *engine.reward.tree_models):
                tree.prefixes.clear()
                assert tree.tree.free_slots == tree.tree.capacity - 1
            assert not (engine.core._callers or engine.core._caller_of or self.service.engine._jobs)


def wait_for(condition, seconds: float = 30.0) -> None:
    """Until it is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it has not come to that"
        time.sleep(0.01)


@contextmanager
def running(engine, *, api_key=None, config=CONFIG, limits=None, grace=0.0, **terms):
    """A server in a thread of this process; ``stop`` is what a signal does."""
    shared = AsyncStarsEngine(engine, **(limits or {}))
    service = Service(shared, "tiny", config, **terms)
    bound = bind("127.0.0.1", 0)
    app = create_app(service, api_key)
    settings = uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=20)
    server = _Server(settings, service, grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        assert server.started, "uvicorn has not come up"
        yield Server(service, f"http://127.0.0.1:{bound.getsockname()[1]}", api_key, server)
    finally:
        server.should_exit = True
        thread.join()
        shared.close()


def events_of(text: str) -> list[str]:
    """What follows ``data:`` in a stream."""
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]


def chunks_of(text: str) -> list[dict]:
    """The chunks of a stream that ended well."""
    *chunks, done = events_of(text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]
