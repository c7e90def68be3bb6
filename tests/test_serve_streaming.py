"""Streams to the byte: nothing is taken back, nothing is cut within a character, silence is kept alive."""

import json
import random
import re
import threading
import time

import httpx
import pytest
from serving import CONFIG, ENDLESS, chunks_of, events_of, running, tiny_engine

from stars_fast.serve.answers import StopCut


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def server(engine):
    with running(engine) as server:
        yield server


def test_a_chat_stream_is_what_openai_writes(server):
    asked = dict(messages=[{"role": "user", "content": "hi"}], max_tokens=18, seed=1, stream=True, ignore_eos=True)
    asked["stream_options"] = {"include_usage": True}
    with server.http.stream("POST", "/v1/chat/completions", json=asked) as got:
        text = got.read().decode("ascii")  # Unicode's own line breaks are escaped
    assert got.headers["content-type"].startswith("text/event-stream") and got.headers["x-accel-buffering"] == "no"
    assert re.fullmatch(r"(data: [^\r\n]+\n\n)+", text)
    role, *contents, usage = chunks_of(text)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in contents] == [None, None, "length"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 18
    assert {chunk["id"] for chunk in contents} == {role["id"]} and role["object"] == "chat.completion.chunk"
    assert all(chunk["usage"] is None for chunk in (role, *contents))


def test_pieces_are_whole_characters_and_add_up(engine, server):
    """The vocabulary is bytes: most answers have characters of two to four of them."""
    prompt, config = "naïve 漢字 😀", CONFIG.replace(max_new_tokens=30, segment_length=2, max_attempts=1)
    for seed in range(3):
        want = engine.generate([prompt], config, seed=[seed]).texts[0]
        stars = {"segment_length": 2, "max_attempts": 1}
        asked = dict(prompt=prompt, max_tokens=30, seed=seed, stream=True, stars=stars)
        pieces = [chunk["choices"][0]["text"] for chunk in chunks_of(server.post(**asked).text)]
        assert "".join(pieces) == want and len(pieces) > 5


def test_a_stop_string_is_never_shown_nor_any_part_of_it(engine, server):
    config, hits = CONFIG.replace(max_new_tokens=40, ignore_eos=True), 0
    for stop in ("the", "at", "o", " you"):
        stops = (stop, "never there")
        want = engine.generate(["the cat"], config.replace(stop_strings=stops), seed=[5]).texts[0]
        hits += stop in want
        asked = dict(seed=5, max_tokens=40, ignore_eos=True, stop=list(stops))
        whole = server.ask(**asked)["choices"][0]
        chunks = chunks_of(server.post(prompt="the cat", stream=True, **asked).text)
        pieces = [chunk["choices"][0]["text"] for chunk in chunks]
        assert whole["text"] == "".join(pieces) == want.partition(stop)[0]
        assert whole["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"]
        assert (whole["finish_reason"] == "stop") == (stop in want)
    assert hits


def test_text_up_to_a_stop_string_holds_back_beginnings_alone():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=20))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(2)]
        cut, shown, fed = StopCut(stops), "", 0
        while fed < len(text):
            size = rng.randint(0, 4)
            fed += size
            shown += cut.add(text[fed - size : fed], last=fed >= len(text))
            assert text.startswith(shown) and (cut.found or fed - len(shown) < max(map(len, stops)))
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        assert shown == text[: min(ends)[1]] if ends else shown == text


def test_two_prompts_stream_side_by_side(server):
    asked = dict(prompt=["the cat", "a dog"], n=2, max_tokens=20, seed=2)
    whole = server.ask(**asked)
    texts = [""] * 4
    for chunk in chunks_of(server.post(**asked, stream=True).text):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_silence_is_kept_alive_and_an_error_ends_the_stream_in_words():
    waits, calls = threading.Event(), []

    def reward(completions):
        calls.append(1)
        if len(calls) == 2:
            waits.wait(10)
        if len(calls) > 2:
            raise RuntimeError("cannot read /secret/place of the other caller")
        return [0.0] * len(completions)

    with running(tiny_engine(reward), keep_alive=0.05) as server:
        body = dict(prompt="x", stream=True, max_tokens=40, seed=0, **ENDLESS)
        body["stars"] = {"segment_length": 4, "method": "blockwise_best_of_n"}
        text, alive = "", 0
        with server.http.stream("POST", "/v1/completions", json=body) as got:
            for line in got.iter_text():
                text += line
                alive += line.count(": keep-alive\n\n")
                if alive == 3:
                    waits.set()
        *_, error, done = events_of(text)
        message = json.loads(error)["error"]
        assert alive >= 3 and done == "[DONE]"
        assert message["code"] == 500 and "RuntimeError" in message["message"]
        assert "secret" not in text and "other caller" not in text
        server.settle()


def test_a_stream_begins_before_its_first_segment_and_says_then_what_goes_wrong():
    may, error = threading.Event(), [None]

    def reward(completions):
        may.wait(30)
        return [error[0] or 0.0] * len(completions)

    with running(tiny_engine(reward), keep_alive=0.05) as server:
        for wrong, status in ((None, None), (RuntimeError("secret"), 500)):
            may.clear()
            error[0], text = wrong, ""
            with server.http.stream("POST", "/v1/completions", json=dict(prompt="x", max_tokens=3, stream=True)) as got:
                assert got.status_code == 200
                for line in got.iter_text():
                    text += line
                    if text.count(": keep-alive") == 2:
                        may.set()
            *_, last, done = events_of(text)
            assert text.startswith(": keep-alive\n\n: keep-alive\n\n") and done == "[DONE]"
            assert json.loads(last).get("error", {}).get("code") == status
        may.clear()
        with (
            pytest.raises(httpx.ReadTimeout),
            server.http.stream("POST", "/v1/completions", json=dict(prompt="x", stream=True), timeout=0.3) as got,
        ):
            for _ in got.iter_text():
                raise httpx.ReadTimeout("enough")
        may.set()
        server.settle()


def test_a_trace_adds_up_to_the_attempts(server):
    got = server.ask(max_tokens=24, seed=3, stars={"trace": True})
    trace = got["choices"][0]["stars"]["trace"]
    assert sum(segment["attempts"] for segment in trace) == got["usage"]["stars"]["candidates"]
    assert sum(segment["tokens"] for segment in trace) == got["usage"]["completion_tokens"]
    for segment in trace:
        verdicts = [candidate["verdict"] for candidate in segment["candidates"]]
        assert len([one for one in verdicts if one != "unseen"]) == segment["attempts"]
        (winner,) = [one for one in segment["candidates"] if one["verdict"] in ("accepted", "fallback")]
        assert winner["text"] in got["choices"][0]["text"] or "\ufffd" in winner["text"]
    chunks = chunks_of(server.post(prompt="the cat", max_tokens=24, seed=3, stream=True, stars={"trace": True}).text)
    assert [segment for chunk in chunks for segment in chunk["choices"][0]["stars"]["trace"]] == trace


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_let_go_of_at_once(server, stream):
    server.settle()
    before = {name: server.gauge(f"stars_{name}_total") for name in ("disconnects", "generation_tokens")}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=server.url, timeout=0.3) as client,
        client.stream(
            "POST", "/v1/completions", json=dict(prompt="x", max_tokens=400, stream=stream, **ENDLESS)
        ) as got,
    ):
        began = time.monotonic()
        for _ in got.iter_bytes():
            if time.monotonic() > began + 0.3:
                raise httpx.ReadTimeout("enough")
    server.settle(2.0)
    assert server.gauge("stars_disconnects_total") == before["disconnects"] + 1
    assert server.gauge("stars_generation_tokens_total") < before["generation_tokens"] + 400
