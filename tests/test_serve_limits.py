"""What is too much, too late or too large is refused in words, and leaves nothing behind."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from serving import chunks_of, running, tiny_engine, wait_for

from stars_fast.rewards import CallableReward


@pytest.fixture(scope="module")
def server():
    with running(tiny_engine(), limits={"max_waiting": 4}, timeout=20.0) as server:
        yield server


def raw(server, request: bytes) -> bytes:
    """What comes back on a connection of its own, until it is closed or silent."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        connection.sendall(request)
        answer = b""
        while not answer.endswith(b"}") and (part := connection.recv(65536)):
            answer += part
        return answer


def posted(server, body: bytes, **headers: str) -> httpx.Response:
    return server.http.post("/v1/completions", content=body, headers={"content-type": "application/json", **headers})


class Held(CallableReward):
    """Answers once it may."""

    def __init__(self):
        self.may = threading.Event()
        super().__init__(lambda completions: [self.may.wait(60) * 1.0 for _ in completions])


def test_a_burst_beyond_the_limit_is_turned_away():
    reward = Held()
    with running(tiny_engine(reward), limits={"max_waiting": 4}) as server, ThreadPoolExecutor(4) as pool:
        ask = lambda i: server.post(prompt="x", max_tokens=12, seed=i)  # noqa: E731
        let_in = [pool.submit(ask, i) for i in range(2)] + [pool.submit(server.post, prompt="x", max_tokens=6, n=2)]
        wait_for(lambda: server.gauge("stars_requests_open") == 4)
        for body in (*({"prompt": "x"} for _ in range(10)), {"prompt": "x", "n": 4}, {"prompt": ["x", "y"], "n": 2}):
            refused = server.post(**body)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert "max_waiting=4" in refused.text
        for body in ({"prompt": "x", "n": 5}, {"prompt": ["x"] * 5}, {"prompt": ["x", "y"], "n": 3}):
            refused = server.post(**body)
            assert refused.status_code == 400 and "max_waiting=4" in refused.json()["error"]["message"]
        reward.may.set()
        assert [answer.result().status_code for answer in let_in] == [200] * 3
        server.settle()
        assert server.gauge("stars_admission_rejections_total") == 12


def test_the_work_of_a_request_has_a_bound(server):
    for body in (
        {"n": 4, "stars": {"method": {"name": "metropolis_hastings", "steps": 1024, "chains": 1024}}},
        {"n": 4, "stars": {"method": {"name": "metropolis_hastings", "steps": 200, "chains": 100}}},
        {"prompt": ["x"] * 100, "stars": {"method": {"name": "best_of_n", "n": 1000}}},
    ):
        got = server.post(**{"prompt": "x", **body})
        assert got.status_code == 400 and ("at most 65536" in got.text or "max_waiting" in got.text)


def test_a_hundred_refused_prompts_leave_no_reservation(server):
    before = server.gauge("stars_http_responses_total")
    for i in range(100):
        body = ({"prompt": "x" * 3000}, {"prompt": [[1], [99999]]}, {"prompt": "x", "max_tokens": 600 + i})[i % 3]
        assert server.post(**body).status_code == 400
    assert server.gauge("stars_requests_open") == 0
    assert server.gauge("stars_http_responses_total") >= before + 100
    server.ask()


def test_a_timeout_gives_what_is_there_or_408_and_what_it_has_cost(caplog):
    class Slow(CallableReward):
        """Longer than the timeout from the second time on."""

        calls = 0

        def __init__(self):
            super().__init__(self.score)

        def score(self, completions):
            self.calls += 1
            if self.calls > 1:
                time.sleep(0.4)
            return [0.0] * len(completions)

    reward = Slow()
    asked = dict(
        max_tokens=400,
        ignore_eos=True,
        timeout=0.3,
        stars={"segment_length": 4, "method": {"name": "blockwise_best_of_n", "n": 3}},
    )
    with running(tiny_engine(reward)) as server, caplog.at_level("INFO", logger="stars_fast.serve"):
        server.post(prompt="x", max_tokens=1)  # what the first request costs beside
        for stream in (False, True):
            reward.calls = 0
            got = server.post(prompt="x", stream=stream, **{**asked, "stars": {**asked["stars"], "trace": True}})
            last = chunks_of(got.text)[-1] if stream else got.json()
            assert last["choices"][0]["finish_reason"] == "abort"
            if stream:
                trace = [len(chunk["choices"][0]["stars"].get("trace", [])) for chunk in chunks_of(got.text)]
                assert trace == [*[1] * (len(trace) - 1), 0] and len(trace) > 1
            else:
                usage = got.json()["usage"]
                assert usage["stars"]["drawn_tokens"] >= 3 * usage["completion_tokens"] > 0
            server.settle()
        asked |= {"timeout": 0.1, "stars": {"method": "best_of_n"}}
        late = server.post(prompt="x", **asked)
        assert late.status_code == 408 and late.json()["error"]["param"] == "timeout"
        assert late.headers["x-should-retry"] == "false"
        server.settle()
        fields = [record.fields for record in caplog.records if record.fields.get("status") == 408]
        assert fields[0]["prompt_tokens"] > 0 and fields[0]["drawn_tokens"] > 0


def test_bodies_are_bounded_whatever_they_claim(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    claimed = raw(server, head + b"Content-Length: 1073741824\r\n\r\n{")
    assert claimed.startswith(b"HTTP/1.1 413") and b"connection: close" in claimed.lower()
    assert b"1048576 bytes" in claimed
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    assert raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17).startswith(b"HTTP/1.1 413")
    assert raw(server, head + b"Content-Length: 99999999999999999999999\r\n\r\n").startswith(b"HTTP/1.1 4")
    assert raw(server, head + b"Content-Length: -1\r\n\r\n").startswith(b"HTTP/1.1 4")


BODIES = {
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep in what is let through": b'{"prompt": "x", "metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    "digits": b'{"prompt": "x", "n": ' + b"9" * 10_000 + b"}",
    "exponent": b'{"prompt": "x", "temperature": 1e999}',
    "not a number": b'{"prompt": "x", "top_p": NaN}',
    "a billion": b'{"prompt": "x", "n": 1e9}',
    "half a pair": b'{"prompt": "\\ud800"}',
    "half a pair in a key": b'{"prompt": "x", "stars": {"\\udfff": 1}}',
    "half a pair at the stop": b'{"prompt": "x", "stop": "\\udc00"}',
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "truncated": b'{"prompt": "x',
    "a list": b"[1, 2]",
    "null": b"null",
    "nothing": b"",
    "true for one": b'{"prompt": "x", "n": true}',
    "zero for false": b'{"prompt": "x", "stream": 0}',
    "a list in ids": b'{"prompt": [1, [2]]}',
    "ids below zero": b'{"prompt": [-1]}',
    "a long key": b'{"prompt": "x", "stars": {"' + b"k" * 100_000 + b'": 1}}',
    "a path": b'{"prompt": "x", "stars": {"method": {"name": "rsd", "draft": "/etc/passwd"}}}',
    "a fit": b'{"prompt": "x", "stars": {"fit": "/etc/passwd"}}',
}


@pytest.mark.parametrize("kind", BODIES)
def test_odd_bodies_are_refused_shortly(server, kind):
    answer = posted(server, BODIES[kind])
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "BadRequestError" and error["code"] == 400
    assert len(answer.content) < 1500 and "\n" not in error["message"]
    assert not any(word in answer.text for word in ("Traceback", "site-packages", "passwd", ".py"))


@pytest.mark.parametrize(
    "text", ["\0", "a\0b", "👩‍👩‍👧‍👦", "\u202eעברית", "é\u0301" * 50, "\ufffe", "\u2028", " ", "𝔘𝔫𝔦"]
)
def test_every_kind_of_text_is_answered(server, text):
    assert server.ask(prompt=text, seed=1, stop="§" + text)["usage"]["completion_tokens"] > 0
    asked = dict(messages=[{"role": "user", "content": text}], max_tokens=6, stream=True)
    assert chunks_of(server.post("/v1/chat/completions", **asked).text)


def test_other_content_types_paths_and_verbs_are_refused_in_the_same_shape(server):
    plain = posted(server, b'{"prompt": "x"}', **{"content-type": "text/plain"})
    assert plain.status_code == 400 and "application/json" in plain.json()["error"]["message"]
    nowhere = server.http.post("/chat/completions", json={}).json()["error"]
    assert nowhere["code"] == 404 and "/v1/chat/completions" in nowhere["message"]
    verb = server.http.get("/v1/completions")
    assert verb.status_code == 405 and verb.headers["allow"] == "POST"
    assert verb.json()["error"]["code"] == 405 and verb.json()["error"]["message"].endswith("use POST")


def test_temperature_0_may_be_sampled():
    with running(tiny_engine(), samples_greedy=True) as server:
        sampled = server.ask(prompt="x", max_tokens=6, temperature=0, seed=1)
        assert sampled["choices"] == server.ask(prompt="x", max_tokens=6, seed=1)["choices"]


def test_a_reward_that_raises_costs_whom_it_raises_for_and_a_broken_commit_those_under_way():
    class Fragile(CallableReward):
        broken = False

        def commit(self, completion):
            if self.broken:
                raise RuntimeError("commit broke at /home/me/reward.py")

    def picky(prompts, completions):
        return [ValueError("of /home/me") if "bad" in prompt else 1.0 for prompt in prompts]

    reward = Fragile(picky)
    with running(tiny_engine(reward)) as server:
        with ThreadPoolExecutor(4) as pool:
            ask = lambda prompt: server.post(prompt=prompt, max_tokens=12, seed=1)  # noqa: E731
            good, bad, other = pool.map(ask, ["good", "bad", "good"])
            assert good.json()["choices"] == other.json()["choices"] and bad.status_code == 500
            reward.broken = True
            answers = list(pool.map(ask, ["a", "b", "c"]))
            reward.broken = False
        for answer in (bad, *answers):
            message = answer.json()["error"]["message"]
            assert answer.status_code == 500 and "Error" in message and "/home" not in message
        assert ask("good").json()["choices"] == good.json()["choices"]
        server.settle()


def test_metrics_add_up_and_are_prometheus_own(server):
    before = {name: server.gauge(f"stars_{name}_total") for name in ("candidates", "generation_tokens", "fallbacks")}
    answers = [server.ask(seed=i, max_tokens=24, n=2) for i in range(4)]
    traces = [choice["stars"] for answer in answers for choice in answer["choices"]]
    assert server.gauge("stars_candidates_total") - before["candidates"] == sum(one["attempts"] for one in traces)
    tokens = server.gauge("stars_generation_tokens_total") - before["generation_tokens"]
    assert tokens == sum(answer["usage"]["completion_tokens"] for answer in answers)
    drawn, discarded = server.gauge("stars_drawn_tokens_total"), server.gauge("stars_discarded_tokens_total")
    assert drawn - discarded >= server.gauge("stars_generation_tokens_total") > 0
    from prometheus_client.parser import text_string_to_metric_families

    text = server.http.get("/metrics").text
    names = [family.name for family in text_string_to_metric_families(text)]
    assert len(names) == len(set(names)) and "stars_heartbeat_seconds" in names


def test_logs_are_json_without_texts(server, caplog):
    from stars_fast.serve.logs import JsonLines

    with caplog.at_level("INFO", logger="stars_fast.serve"):
        text = server.ask(prompt="a secret prompt", seed=1)["choices"][0]["text"]
        named = server.http.get("/v1/models", headers={"X-Request-Id": "mine-1"})
        odd = server.http.get("/v1/models", headers={"X-Request-Id": "no good\tname"})
        wait_for(lambda: sum("status" in record.fields for record in caplog.records) == 3)
    assert named.headers["x-request-id"] == "mine-1" and "\t" not in odd.headers["x-request-id"]
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    (line,) = [line for line in lines if line.get("path") == "/v1/completions"]
    assert line["status"] == 200 and line["completion_tokens"] == 12 and line["finish_reasons"] and line["ms"] > 0
    assert "secret" not in json.dumps(lines) and text not in json.dumps(lines, ensure_ascii=False)


def test_a_dead_engine_says_so():
    with running(tiny_engine()) as server:
        server.service.engine.dead = RuntimeError("gone")
        assert server.http.get("/health").status_code == 503
        answer = server.post(prompt="x")
        assert answer.status_code == 503 and "died" in answer.json()["error"]["message"]
        server.service.engine.dead = None
        assert server.http.get("/health").json() == {"status": "ok"}


def test_bodies_full_of_mistakes_cost_little(server):
    entries = 100_000
    bodies = [
        {"prompt": ["a"] * entries},
        {"prompt": [[1.5]] * entries},
        {"prompt": "x", "stop": [1] * entries},
        {"prompt": "x", "stars": {f"k{i}": i for i in range(entries // 2)}},
        {"prompt": "x", "stars": {"method": {"name": "x", **{f"k{i}": "a" for i in range(entries // 2)}}}},
        {"prompt": "x", **{f"k{i}": i for i in range(entries // 2)}},
    ]
    for body in bodies:
        began = time.process_time()
        answer = server.post(**body)
        assert answer.status_code == 400 and len(answer.content) < 2000
        assert time.process_time() < began + 2.0
