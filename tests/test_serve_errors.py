"""Who is told what: the key before all, a refusal in words, a failure by its class alone, and always an answer."""

import asyncio
import json
from collections import Counter

import pytest
from serving import CONFIG, events_of, running, tiny_engine
from starlette.testclient import TestClient

from stars_fast import AsyncStarsEngine
from stars_fast.async_engine import _add
from stars_fast.outputs import Stats
from stars_fast.rewards import CallableReward
from stars_fast.serve.app import create_app
from stars_fast.serve.service import Service

SECRET = "TOPSECRET of another caller"


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


class ReadTimeout(Exception):
    """Neither Error nor Exception by name."""


class Fragile(CallableReward):
    """Raises where it is told to: for one completion, or in what all requests share."""

    broken = shared = None

    def __init__(self):
        super().__init__(lambda completions: [self.broken or 1.0 for _ in completions])

    def commit(self, completion):
        if self.shared is not None:
            raise self.shared


@pytest.fixture(scope="module")
def server():
    with running(tiny_engine(Fragile())) as server:
        yield server


@pytest.fixture(scope="module")
def service():
    session = AsyncStarsEngine(tiny_engine())
    yield Service(session, "tiny", CONFIG)
    session.close()


def test_no_path_is_open_without_the_key_but_those_for_machines_that_watch(service):
    app = create_app(service, "secret\n")
    for root in ("", "/llm"):
        for prefix in {"", root}:  # proxies take the root path off; Ray Serve leaves it on
            client = TestClient(app, root_path=root)
            for path in ("/health", "/version", "/metrics"):
                assert client.get(prefix + path).status_code == 200
            for path in ("/v1/models", "/v1/models/tiny", "/openapi.json", "/v1/nowhere", "/health/../v1/models"):
                assert client.get(prefix + path).status_code == 401, (root, prefix, path)
            assert client.post(f"{prefix}/v1/completions", json={"prompt": "x"}).status_code == 401
            assert client.get(f"{prefix}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    with pytest.raises(ValueError, match="api_key is empty"):
        TestClient(create_app(service, " \n")).get("/health")


def test_the_latency_of_requests_is_counted_under_a_root_path(service):
    count = lambda: sum(  # noqa: E731
        sample.value for sample in service.metrics.whole.collect()[0].samples if sample.name.endswith("_count")
    )
    before = count()
    TestClient(create_app(service), root_path="/llm").get("/llm/v1/models")
    assert count() == before + 1


def test_an_unhandled_error_is_answered_under_the_requests_id(service, monkeypatch):
    monkeypatch.setattr(service, "check", lambda body: 1 / 0)
    got = TestClient(create_app(service)).post(
        "/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "mine-1"}
    )
    assert got.status_code == 500 and got.headers["x-request-id"] == "mine-1"
    assert got.json()["error"]["message"] == "the server failed: ZeroDivisionError"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
@pytest.mark.parametrize(
    "error, status",
    [
        (Panic(SECRET), 500),
        (RuntimeError(SECRET), 500),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), 400),
        (json.JSONDecodeError("bad", "x", 0), 400),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_ends_the_reading_of_a_prompt_is_answered(server, monkeypatch, error, status, prompt, stream):
    def prepare(arguments):
        raise error

    monkeypatch.setattr(server.service.engine.engine, "prepare", prepare)
    got = server.post(prompt=prompt, max_tokens=3, stream=stream)
    assert got.status_code == status and "TOPSECRET" not in got.text
    assert status == 400 or type(error).__name__ in got.json()["error"]["message"]
    monkeypatch.undo()
    server.settle()
    assert server.gauge("stars_requests_open") == 0


def test_a_refused_prompt_of_several_is_named(server):
    got = server.post(prompt=[[1], [99999]], max_tokens=3)
    assert got.status_code == 400 and got.json()["error"]["message"].startswith("prompt[1] holds id 99999")


@pytest.mark.parametrize("place", ["broken", "shared"])
@pytest.mark.parametrize(
    "kind", [ValueError, TypeError, NotImplementedError, TimeoutError, KeyError, ReadTimeout, AssertionError]
)
def test_what_fails_later_is_the_servers_fault_and_told_by_its_class_alone(server, place, kind):
    reward = server.service.engine.engine.reward
    setattr(reward, place, kind(SECRET))
    try:
        whole = server.post(prompt="x", max_tokens=12, seed=1, n=2)
        stream = server.post(prompt="x", max_tokens=12, seed=1, stream=True)
    finally:
        setattr(reward, place, None)
    assert whole.status_code == 500 and f"failed: {kind.__name__};" in whole.json()["error"]["message"]
    told = stream.json() if stream.status_code == 500 else json.loads(events_of(stream.text)[-2])
    assert told["error"]["code"] == 500 and kind.__name__ in told["error"]["message"]
    assert "TOPSECRET" not in whole.text + stream.text
    server.ask()


def test_a_bug_in_a_heartbeat_is_no_bad_request(server, monkeypatch):
    def propose(*_, **__):
        raise TypeError(SECRET)

    monkeypatch.setattr(server.service.engine.engine.policy, "propose", propose)
    got = server.post(prompt="x", max_tokens=12, seed=1)
    assert got.status_code == 500 and "TOPSECRET" not in got.text and "TypeError" in got.text
    monkeypatch.undo()
    server.ask()


def test_a_reservation_ends_with_a_bad_argument():
    async def go():
        async with AsyncStarsEngine(tiny_engine(), max_waiting=2) as session:
            for wrong in ({"priority": "high"}, {"timeout": -1}, {"request_id": 3}, {"seed": "x"}, {"trace": 2}):
                session.reserve()
                with pytest.raises((TypeError, ValueError)):
                    async for _ in session.generate("x", reserved=True, **wrong):
                        pass
            assert session.metrics()["open_requests"] == 0
            assert [event async for event in session.generate("x", CONFIG.replace(max_new_tokens=3), seed=0)]

    asyncio.run(go())


def test_counts_are_added_from_a_copy_while_the_engine_counts():
    class Moving(Counter):
        def items(self):
            raise RuntimeError("dictionary changed size during iteration")

    total, stats = Stats(), Stats()
    stats.rows = Moving({1: 2})
    _add(total, stats)
    assert total.rows == {1: 2}
