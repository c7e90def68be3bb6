"""What Prometheus is told: counts of requests, and what engine and trees hold when it asks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stars_fast.async_engine import AsyncStarsEngine
from stars_fast.loop.row_cost import Heartbeat
from stars_fast.outputs import SegmentEvent

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """One registry per server; all names begin with ``stars_``, but for those of the process."""

    def __init__(self, engine: AsyncStarsEngine) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_EngineCollector(engine))
        self.responses = Counter("stars_http_responses", "Answers to HTTP requests.", ["status"], registry=registry)
        self.answers = Counter("stars_answers", "Answers that ended, by why.", ["reason"], registry=registry)
        self.rejections = Counter(
            "stars_admission_rejections", "Requests turned away for lack of room.", registry=registry
        )
        self.prompt_tokens = Counter("stars_prompt_tokens", "Of prompts that were answered.", registry=registry)
        self.tokens = Counter("stars_generation_tokens", "Of answers.", registry=registry)
        self.candidates = Counter("stars_candidates", "Candidates looked at.", ["verdict"], registry=registry)
        self.fallbacks = Counter(
            "stars_fallbacks", "Segments of which no candidate was accepted: the best one was taken.", registry=registry
        )
        self.first = Histogram(
            "stars_time_to_first_segment_seconds", "Of a request.", buckets=_SECONDS, registry=registry
        )
        self.whole = Histogram(
            "stars_e2e_request_latency_seconds", "Of a request, to its last byte.", buckets=_SECONDS, registry=registry
        )
        self.heartbeats = Histogram("stars_heartbeat_seconds", "Of one round.", buckets=_SHORT, registry=registry)
        self.rows = Histogram(
            "stars_rows_per_heartbeat", "Candidates drawn side by side.", buckets=_ROWS, registry=registry
        )
        self.rewards = Summary("stars_reward_of_answers", "Of answers.", registry=registry)
        self.unheard = Counter("stars_disconnects", "Clients that left before the end.", registry=registry)
        engine.engine.on_heartbeat = self._beat

    def _beat(self, heartbeat: Heartbeat) -> None:
        timing = heartbeat.timing
        self.heartbeats.observe(timing.propose_seconds + timing.score_seconds)
        self.rows.observe(timing.rows)

    def count(self, event: SegmentEvent) -> None:
        """What an event brings."""
        segment = event.segment
        if segment is not None:
            self.tokens.inc(len(segment.tokens))
            self.candidates.labels("accepted").inc(segment.accepted)
            self.candidates.labels("rejected").inc(segment.attempts - segment.accepted)
            self.fallbacks.inc(not segment.accepted)
        if event.finish_reason is not None:
            self.answers.labels(event.finish_reason).inc()
            if segment is not None and math.isfinite(segment.reward):
                self.rewards.observe(segment.reward)

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Asks the engine at each scrape."""

    def __init__(self, engine: AsyncStarsEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        counts = self.engine.metrics()
        for name, field, about in (
            ("drawn_tokens", "policy_tokens", "Tokens sampled."),
            ("discarded_tokens", "discarded_tokens", "Of the sampled ones, those that are in no answer."),
            ("reward_tokens", "reward_tokens", "Tokens that the reward model read."),
            ("calibration_tokens", "calibration_tokens", "Of the discarded ones, those drawn to find targets."),
            ("preemptions", "preemptions", "Requests that gave their slots back for a while."),
        ):
            yield CounterMetricFamily(f"stars_{name}", about, counts[field])
        for name, field, about in (
            ("requests_open", "open_requests", "Answers that were asked for and have not ended: prompts times n."),
            ("requests_running", "running", "Answers and pilots that take part in heartbeats."),
            ("requests_waiting", "waiting", "Answers and pilots that wait for room."),
        ):
            yield GaugeMetricFamily(f"stars_{name}", about, counts[field])
        slots = GaugeMetricFamily("stars_kv_slots", "Slots of a tree of keys and values.", labels=["tree"])
        used = GaugeMetricFamily("stars_kv_slots_used", "Of these, taken; kept prefixes are.", labels=["tree"])
        engine = self.engine.engine
        for name, trees in (("policy", [engine.policy]), ("reward", engine.reward.tree_models)):
            capacity = sum(model.tree.capacity - 1 for model in trees)
            slots.add_metric([name], capacity)
            used.add_metric([name], capacity - sum(model.tree.free_slots for model in trees))
        yield slots
        yield used
