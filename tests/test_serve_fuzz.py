"""Requests of every kind, valid and not, many at a time: no error that is not meant, and nothing is left behind.

A short run by default. Many more: ``STARS_FAST_SOAK=1 pytest tests/test_serve_fuzz.py``.
"""

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import ENDLESS, running, tiny_engine


def fuzz(server, folder, examples: int, seed: int, phases: str = "fuzzing") -> str:
    """Let schemathesis make requests from the schema. What it may not complain of is that valid ones are refused: a
    schema cannot say all limits.
    """
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json"]
    options = ["--exclude-checks", "positive_data_acceptance", "--max-examples", examples, "--seed", seed]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "COLUMNS": "120"}
    result = subprocess.run(
        [*map(str, command), *map(str, options), "--phases", phases, "--no-color"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,  # it keeps notes
        timeout=2400,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


SOAK = "STARS_FAST_SOAK" in os.environ


@pytest.mark.parametrize("examples", [200 if SOAK else 3])
def test_generated_requests_meet_no_error_of_the_servers_own(tmp_path, examples):
    with running(tiny_engine(), timeout=0.5) as server:
        fuzz(server, tmp_path, examples, seed=7)
        server.settle()
        assert server.gauge('stars_http_responses_total{status="500"}') == 0


class Storm:
    """Requests of random kinds, some of which leave early."""

    def __init__(self, server, seed: int) -> None:
        self.server, self.rng, self.statuses = server, random.Random(seed), list[int]()

    def body(self) -> tuple[str, dict]:
        rng = self.rng
        body = {
            "max_tokens": rng.choice([1, 5, 12, 40]),
            "n": rng.choice([1, 1, 1, 2, 3]),
            "seed": rng.randrange(1000),
            "stream": rng.random() < 0.5,
            "priority": rng.randrange(-2, 3),
            **rng.choice([{}, {"stop": ["the"]}, {"temperature": 1.5}, {"repetition_penalty": 1.2}, {"top_k": 5}]),
            **rng.choice([{}, {"timeout": 0.01}, {"timeout": 0.3}, ENDLESS]),
        }
        stars = rng.choice(
            [
                {},
                {"target_reward": 0.2, "trace": True},
                {"method": "vanilla"},
                {"method": {"name": "best_of_n", "n": 2}},
                {"method": {"name": "particle_filter", "particles": 3}, "segment_length": 4},
                {"segment_length": 3, "candidates": 2},
                {"target_rewrd": 1},
                {"segment_length": 99},
            ]
        )
        body["stars"] = stars if "method" in stars else {**body.get("stars", {}), **stars}
        text = rng.choice(["the cat", "naïve 😀 漢字", "x" * 40, "\0\u202e", "a" * 2000])
        if rng.random() < 0.5:
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
        return "/v1/completions", {**body, "prompt": rng.choice([text, [text, "a dog"], [1, 2, 3], [[1], [2, 3]]])}

    def ask(self, job: tuple[tuple[str, dict], float | None]) -> None:
        (path, body), leaves = job
        try:
            with self.server.http.stream("POST", path, json=body, timeout=leaves or 120) as answer:
                self.statuses.append(answer.status_code)
                for _ in answer.iter_bytes():
                    if leaves is not None and self.rng.random() < 0.5:
                        return
        except httpx.TimeoutException:
            self.statuses.append(0)

    def rage(self, requests: int, callers: int) -> None:
        leaving = [self.rng.choice([None, None, 0.02, 0.1, 0.5]) for _ in range(requests)]
        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(self.ask, [(self.body(), leaves) for leaves in leaving]))


@pytest.mark.parametrize("requests", [2000 if SOAK else 60])
def test_a_storm_leaves_all_slots_free_and_memory_flat(requests):
    engine = tiny_engine(kv_cache_tokens=1500)  # little enough that requests wait and give way
    with running(engine, limits={"max_waiting": 12}) as server:
        storm = Storm(server, seed=requests)
        storm.rage(requests // 4, 16)
        server.settle(30)
        before = server.gauge("process_resident_memory_bytes")
        storm.rage(requests - requests // 4, 16)
        server.settle(30)
        assert {0, 200, 400, 503} <= set(storm.statuses) <= {0, 200, 400, 408, 503}
        assert server.gauge("process_resident_memory_bytes") - before < 40e6
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.ask(seed=1)["choices"][0]["text"]
