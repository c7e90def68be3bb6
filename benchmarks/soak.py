"""Random calls of every method in one process for a long time: what must stay as it was is looked at after each.

``python benchmarks/soak.py --minutes 60 --seed 0`` on tiny models and small pools. Calls with random settings, streams
that are closed, interrupts, rewards that fail, threads, and async callers that leave, are aborted or run out of time.
It ends with 1 where a slot or an entry is lost, a text differs from a fresh engine's, a model is not as it was, or
memory grows once all sizes have been met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from stars_fast import AsyncStarsEngine, StarsConfig, StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods import METHODS, RSD, Guided, Mara, ParticleFilter, PersonaJudge, Plans, TreeBoN
from stars_fast.rewards import Completion, Reward

VOCAB = 64
SLOTS, ROWS = 110, 16
MOST_NEW = 24


def tiny(kind: type[PreTrainedModel], seed: int, **fields: Any) -> PreTrainedModel:
    """A model of two layers with weights far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=VOCAB - 1,
        pad_token_id=None,
        bos_token_id=None,
        **fields,
    )
    return kind(config).float().eval()


class Fails(Reward):
    """A reward that raises, or returns nonsense, for some texts: always for the same."""

    def score(self, completions: Sequence[Completion]) -> list[Any]:
        numbers = [hash(tuple(one.response.prompt.ids + one.tokens)) % 997 for one in completions]
        if 0 in numbers:
            raise ValueError("not this one")
        return [(None, float("nan"))[n - 1] if n < 3 else n / 997 - 0.5 for n in numbers]


def picture(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a call must leave as it was."""
    modules = list(model.modules())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in modules)
    own = sum("forward" in vars(module) for module in modules)
    flags = tuple(module.training for module in modules)
    return model.config._attn_implementation, flags, tuple(map(type, modules)), hooks, own, torch.is_grad_enabled()


class Soak:
    """Engines over one policy, and what is counted."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.policy = tiny(LlamaForCausalLM, 0)
        self.reward, self.draft = tiny(LlamaForSequenceClassification, 1, num_labels=1), tiny(LlamaForCausalLM, 2)
        self.network = torch.nn.Linear(32, 2)
        self.models = [self.policy, self.reward, self.draft]
        self.before = [picture(model) for model in self.models]
        limits: dict[str, Any] = dict(kv_cache_tokens=SLOTS, max_rows=ROWS)
        self.engines = [StarsEngine(self.policy, self.reward, **limits), StarsEngine(self.policy, Fails(), **limits)]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def config(self) -> StarsConfig:
        rng = self.rng
        new = rng.choice([1, 3, 8, 16, MOST_NEW])
        length = rng.choice([1, 3, 4, 8])
        name = rng.choice(list(METHODS))
        methods: dict[str, Any] = {
            "rsd": RSD(draft=self.draft, delimiter=None, longest=length, threshold=rng.choice([-1.0, 0.0, 1.0])),
            "mara": Mara(mlp=self.network, top_k=rng.choice([1, 4])),
            "persona_judge": PersonaJudge(draft_prompt=[4, 5], judge_prompt=[6]),
            "particle_filter": ParticleFilter(particles=3),
            "plans": Plans(children=2, delimiter=None, longest=length),
            "treebon": TreeBoN(n=4, branching=2, layers=2),
        }
        method = methods.get(name, name)
        if METHODS[name].drawn and rng.random() < 0.3:
            own = (None, -0.3, lambda ids: [5, 6, *ids])
            method = Guided(rng.choice([[(self.draft, 0.5)], [own], [own, (self.draft, 0.5)]]), method=method)
        settings: dict[str, Any] = dict(
            method=method,
            max_new_tokens=new,
            segment_length=min(length, new),
            max_attempts=rng.choice([1, 2, 5]),
            target_reward=rng.choice([-1.0, 0.3, 2.0]),
            beta=rng.choice([0.1, 1.0]),
            num_return_sequences=2 if name == "plans" else rng.choice([1, 1, 2]),
            ignore_eos=rng.random() < 0.5,
        )
        if name == "stars" and rng.random() < 0.3:
            settings |= dict(target_reward=None)
        if name not in ("mara", "args", "persona_judge") and rng.random() < 0.5:
            settings |= dict(temperature=rng.choice([0.5, 1.3]), top_p=0.9, top_k=rng.choice([0, 5]))
        return StarsConfig(**settings)

    def prompts(self, most: int = 5) -> list[list[int]]:
        shared = [self.rng.randrange(VOCAB - 1) for _ in range(8)] if self.rng.random() < 0.3 else []
        return [
            shared + [self.rng.randrange(VOCAB - 1) for _ in range(self.rng.randint(1, 12))]
            for _ in range(self.rng.randint(1, most))
        ]

    # What is done

    def call(self, engine: StarsEngine) -> None:
        prompts, config, seed = self.prompts(), self.config(), self.rng.randrange(10**6)
        out = engine.generate(prompts, config, seed=seed)
        self.counts["failed requests"] += sum(error is not None for error in out.errors)
        self.counts["preemptions"] += out.stats["preemptions"]
        if self.rng.random() < 0.15:
            reward: Any = self.reward if engine is self.engines[0] else Fails()
            fresh = StarsEngine(self.policy, reward).generate(prompts, config, seed=seed)
            self.counts["compared"] += 1
            sound = [i for i, pair in enumerate(zip(out.errors, fresh.errors, strict=True)) if pair == (None, None)]
            if any(out.completions[i] != fresh.completions[i] for i in sound):
                self.wrong.append(f"texts of {prompts} differ under {config}, seed {seed}")

    def closed_stream(self, engine: StarsEngine) -> None:
        streams = [engine.stream(self.prompts(), self.config(), seed=1) for _ in range(self.rng.randint(1, 3))]
        for stream in streams:
            for _ in range(self.rng.randrange(4)):
                next(stream, None)
        self.rng.shuffle(streams)
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]

    def interrupt(self, engine: StarsEngine) -> None:
        left = self.rng.randint(1, 6)

        def observe(heartbeat: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        engine.on_heartbeat = observe
        try:
            with suppress(KeyboardInterrupt):
                engine.generate(self.prompts(), self.config(), seed=2)
        finally:  # the call may be refused before an interrupt is due
            engine.on_heartbeat = None

    def threads(self, engine: StarsEngine) -> None:
        calls = [(self.prompts(2), self.config()) for _ in range(3)]

        def one(prompts: list[list[int]], config: StarsConfig) -> None:
            try:
                engine.generate(prompts, config, seed=3)
            except Exception as error:
                self._raised("a thread", error)

        at_once = [threading.Thread(target=one, args=call) for call in calls]
        for thread in at_once:
            thread.start()
        for thread in at_once:
            thread.join()

    def session(self, engine: StarsEngine) -> None:
        """Async callers, some of whom leave, are aborted or run out of time."""
        jobs = [(self.prompts(1)[0], self.config(), self.rng.random()) for _ in range(self.rng.randint(2, 10))]

        async def one(
            served: AsyncStarsEngine, place: int, prompt: list[int], config: StarsConfig, luck: float
        ) -> None:
            await asyncio.sleep(luck / 20)
            timeout = 0.02 if luck < 0.1 else None
            stream = served.generate(prompt, config, f"{place}", seed=place, timeout=timeout, priority=place % 2)
            try:
                async for _ in stream:
                    if luck > 0.9:
                        await served.abort(f"{place}")
                    elif luck > 0.8:
                        break
            except TimeoutError:
                self.counts["timeouts"] += 1
            except ValueError as error:
                self._raised("an async caller", error)
            finally:
                await stream.aclose()  # type: ignore[attr-defined]

        async def run() -> None:
            async with AsyncStarsEngine(engine, max_model_len=120, max_segment_length=MOST_NEW) as served:
                await asyncio.gather(*(one(served, place, *job) for place, job in enumerate(jobs)))
                await served.drain()
                while served.engine.core.open_calls:
                    await asyncio.sleep(0.001)
                self.look_for_leaks(engine)

        asyncio.run(run())

    # What is looked at

    def look_for_leaks(self, engine: StarsEngine) -> None:
        """While the core is open: when it closes, all its slots are free whatever was lost."""
        core = engine.core
        with core._turn():
            lost = core.open_calls or core._caller_of or (core.loop and core.loop.strategies)
            for model in {engine.policy, *engine._guides, *engine.reward.tree_models}:
                model.prefixes.clear()
                lost = lost or model.tree.nodes or model.tree.free_slots != model.tree.capacity - 1
            for cache in getattr(engine.reward, "caches", ()):
                lost = lost or cache._runs or cache._prefixes or cache._responses or cache._completions
        if lost:
            self.wrong.append(f"something is left after call {self.counts.total()}: {lost}")

    def look_at_models(self) -> None:
        for model, before in zip(self.models, self.before, strict=True):
            if picture(model) != before:
                self.wrong.append(f"the {type(model).__name__} is not as it was after call {self.counts.total()}")

    def round(self) -> None:
        """A few calls of an engine that is held open, so that what they leave is there to be seen."""
        engine = self.rng.choice(self.engines)
        if self.rng.random() < 0.15:
            self._do(self.session, engine)
        else:
            longest = StarsConfig(max_new_tokens=MOST_NEW, segment_length=8, target_reward=0.0)
            held = self.rng.random() < 0.8
            if held:
                size = engine.prepare(Arguments([[1] * 24] * 8, longest, seed=0)).size
                engine.core.hold(size._replace(length=120, segment_length=MOST_NEW, slots=SLOTS))
            for _ in range(self.rng.randint(1, 6)):
                doing: Callable[[StarsEngine], None] = self.rng.choices(
                    [self.call, self.closed_stream, self.interrupt, self.threads], [6, 1, 1, 1]
                )[0]
                self._do(doing, engine)
                if held:
                    self.look_for_leaks(engine)
            if held:
                engine.core.let_go()
        self.look_at_models()

    def _do(self, doing: Callable[[StarsEngine], None], engine: StarsEngine) -> None:
        self.counts[doing.__name__] += 1
        try:
            doing(engine)
        except Exception as error:
            self._raised(doing.__name__, error)

    def _raised(self, who: str, error: Exception) -> None:
        if not _is_refusal(error):
            self.wrong.append(f"{who} raised {type(error).__name__}: {error}")
        self.counts["refused" if _is_refusal(error) else "raised"] += 1


def _is_refusal(error: Exception) -> bool:
    """Random settings may ask for more slots than there are."""
    return isinstance(error, ValueError) and ("slots" in str(error) or "kv_cache_tokens" in str(error))


def resident() -> float:
    """MB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def grows(memory: list[tuple[float, float]]) -> str | None:
    """What grew from the middle of a run to its end; runs of less than two minutes say nothing."""
    seconds = memory[-1][0]
    if seconds < 120:
        return None
    middle = [mb for at, mb in memory if 0.45 * seconds < at < 0.55 * seconds]
    end = [mb for at, mb in memory if at > 0.9 * seconds]
    growth = min(end) - max(middle)
    return f"{growth:.0f} MB more at the end than in the middle" if growth > 32 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of requests that fail, which is what is wanted here
    torch.set_num_threads(1)
    soak, started, memory, told = Soak(options.seed), time.perf_counter(), list[tuple[float, float]](), 0.0
    while (seconds := time.perf_counter() - started) < 60 * options.minutes and len(soak.wrong) < 10:
        soak.round()
        if not memory or seconds - memory[-1][0] > 5:
            memory.append((seconds, resident()))
        if seconds - told > 60:
            told = seconds
            print(f"{seconds:6.0f} s  {memory[-1][1]:6.0f} MB  {dict(soak.counts)}", flush=True)
    memory.append((time.perf_counter() - started, resident()))
    soak.wrong += [growth] if (growth := grows(memory)) else []
    figures = {"seconds": memory[-1][0], "counts": dict(soak.counts), "memory": memory, "wrong": soak.wrong}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    print(f"{memory[-1][0]:.0f} s, seed {options.seed}: {dict(soak.counts)}")
    print("MB: " + ", ".join(f"{mb:.0f}" for _, mb in memory[:: max(1, len(memory) // 12)]))
    print("\n".join(soak.wrong) or "nothing is wrong")
    return bool(soak.wrong)


if __name__ == "__main__":
    sys.exit(main())
