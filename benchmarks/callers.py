"""Accepted tokens a second where callers come one by one, beside one call with all prompts and one call a prompt.

``python3 benchmarks/callers.py [--prompts 32] [--rounds 3] [--http] [--json FILE]``, on the demo models. Every way
writes the same texts, which is checked; ways take turns, so that a busy machine slows all of them. ``--http`` asks the
server of ``stars-fast serve`` as well, in a thread of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import stars_fast
from stars_fast import AsyncStarsEngine, StarsConfig, StarsEngine

CONFIG = StarsConfig(max_new_tokens=64, target_reward=2.0, base_reward=0.0)
Texts = list[list[int]]
Taken = tuple[Texts, float, float]  # ids, seconds, and seconds of this process' threads on a core


def served(engine: StarsEngine, prompts: list[str], callers: int) -> Taken:
    """By a session, so many callers at a time."""

    async def run() -> Taken:
        session, gate = AsyncStarsEngine(engine, max_waiting=len(prompts)), asyncio.Semaphore(callers)

        async def one(i: int) -> list[int]:
            async with gate:
                events = [event async for event in session.generate(prompts[i], CONFIG, seed=i)]
            return [token for event in events if event.segment for token in event.segment.tokens]

        try:
            return await timed(asyncio.gather(*map(one, range(len(prompts)))))
        finally:
            session.close()

    return asyncio.run(run())


async def timed(texts: Awaitable[Texts]) -> Taken:
    started, busy = time.perf_counter(), time.process_time()
    return await texts, time.perf_counter() - started, time.process_time() - busy


def over_http(engine: StarsEngine, prompts: list[str], callers: int, want: Texts) -> Taken:
    """By the server, which gives texts: the ids are those that are wanted where the texts are theirs."""
    import httpx
    import uvicorn

    from stars_fast.serve.app import create_app
    from stars_fast.serve.server import bind
    from stars_fast.serve.service import Service

    async def run() -> Taken:
        session, gate = AsyncStarsEngine(engine, max_waiting=len(prompts)), asyncio.Semaphore(callers)
        service, bound = Service(session, "demo", CONFIG, max_tokens=CONFIG.max_new_tokens), bind("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()

        async def one(i: int) -> list[int]:
            async with gate:
                answer = await client.post("/v1/completions", json={"prompt": prompts[i], "seed": i})
            same = answer.json()["choices"][0]["text"] == engine.tokenizer.decode(want[i], skip_special_tokens=True)
            return want[i] if same else []

        try:
            while not server.started:
                await asyncio.sleep(0.01)
            url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=600) as client:
                return await timed(asyncio.gather(*map(one, range(len(prompts)))))
        finally:
            server.should_exit = True
            thread.join()
            session.close()

    return asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    policy, reward, tokenizer = stars_fast.demo.load()
    engine = StarsEngine(policy, reward, tokenizer=tokenizer)
    prompts = [stars_fast.demo.PROMPTS[i % len(stars_fast.demo.PROMPTS)] for i in range(options.prompts)]

    def called(size: int) -> Taken:
        started, busy, texts = time.perf_counter(), time.process_time(), Texts()
        for i in range(0, len(prompts), size):
            seeds = list(range(i, min(i + size, len(prompts))))
            texts += engine.generate(prompts[i : i + size], CONFIG, seed=seeds).completions
        return texts, time.perf_counter() - started, time.process_time() - busy

    want, *_ = called(len(prompts))
    ways: dict[str, Callable[[], Taken]] = {
        "one call": lambda: called(len(prompts)),
        "one call a prompt": lambda: called(1),
    }
    for callers in (1, 4, 16, 32):
        ways[f"{callers} callers"] = lambda callers=callers: served(engine, prompts, callers)
        if options.http:
            ways[f"{callers} over HTTP"] = lambda callers=callers: over_http(engine, prompts, callers, want)
    taken = {name: list[tuple[float, float]]() for name in ways}  # per token
    for _ in range(options.rounds):
        for name, way in ways.items():
            texts, seconds, busy = way()
            tokens = sum(map(len, texts))
            taken[name].append((seconds / tokens, busy / tokens))
            other = sum(a != b for a, b in zip(texts, want, strict=True))
            assert other <= max(1, len(prompts) // 100), f"{name}: {other} texts differ"
    whole = median(seconds for seconds, _ in taken["one call"])
    rows = [
        {
            "way": name,
            "tokens_per_second": 1 / (seconds := median(one for one, _ in rounds)),
            "of_one_call": whole / seconds,
            "core_milliseconds_per_token": 1000 * median(one for _, one in rounds),
        }
        for name, rounds in taken.items()
    ]
    for row in rows:
        print(
            f"{row['way']:18} {row['tokens_per_second']:8.0f} tokens/s  {row['of_one_call']:.2f} of one call  "
            f"{row['core_milliseconds_per_token']:6.2f} ms of a core a token"
        )
    if options.json:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
