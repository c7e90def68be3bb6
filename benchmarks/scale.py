"""Past one machine: what tokens cost, what needs several devices, and a day of requests on a thousand of them.

python -m benchmarks.scale                           # the tables of docs/scale.md: minutes on one core
python -m benchmarks.scale --only prices --price h200=2.9
python -m benchmarks.scale --plot docs/scale.svg     # and its plot (needs matplotlib)

Everything here is modelled but for the rows that say measured, which are those of ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import pages
from benchmarks.roofline import GPUS, Gpu, Heartbeat, ModelCost, Workload, best_candidates
from benchmarks.simulation.arrivals import SHAPES, Surge, arrival_times, lengths
from benchmarks.simulation.fleet import Replica, Requests, Routing, Served, serve
from stars_fast.report.weights import Weights

# Assumed, in dollars an hour of one GPU. Prices differ by a factor of three between those who let them: put in yours.
PRICES = {"a100-80gb": 1.5, "b200": 5.0, "h100-sxm": 2.5, "h200": 3.5, "l40s": 1.0}
PAIRS = {
    "Llama-2-7B + 7B": ("llama-2-7b", "llama-2-7b-reward"),
    "Llama-3.1-8B + 8B": ("llama-3.1-8b", "llama-3.1-8b-reward"),
    "Llama-3.1-70B + 8B": ("llama-3.1-70b", "llama-3.1-8b-reward"),
}
SHAPE = SHAPES["conversation"]
# Assumed: no trace says how much of a prompt others begin with, nor what candidates are worth.
SHARED, GROUPS, ACCEPTANCE = 0.5, 10_000, (1.5, 3.5)
SEATS, LOAD, REPLICAS, REQUESTS = 64, 5.0, 1_000, 1_000_000
LOADS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)  # requests a second and replica
ROUTINGS: tuple[Routing, ...] = ("prefix", "two", "random")
_BATCH = 64
# Between GPUs of one machine, assumed: bytes a second each way (NVLink of Hopper: half of 900 GB/s), seconds a call.
_LINK, _CALL = 450e9, 10e-6
_USABLE = 0.9  # share of a GPU's memory
_CALM = Surge()


@lru_cache
def models(pair: str) -> tuple[ModelCost, ModelCost]:
    policy, reward = PAIRS[pair]
    return ModelCost.named(policy, "policy"), ModelCost.named(reward, "reward")


def slowdown() -> float:
    """What heartbeats of a 7B pair took on an H200, over what the roofline expected of the same ones."""
    record = pages.newest("engine", pages.records())
    assert record is not None
    told = [pages.steady(record, row) for row in pages.rows_of(record, "engine") if row["beats"] >= 3]
    return fmean(one["milliseconds"] / one["expected"] for one in told)


def dollars(price: float, rate: float, gpus: int = 1) -> float:
    """Of a million tokens, at so many a second on so many GPUs."""
    return price * gpus / 3600 / rate * 1e6


def prices(assumed: dict[str, float]) -> Iterator[str]:
    """Accepted tokens a second of one GPU, and dollars of a million of them."""
    slow = slowdown()
    yield f"batch {_BATCH}, segments of 16, context 256, 128 tokens an answer; measured / expected {slow:.2f}"
    yield from _table(
        "pair, GPU, accepted, candidates, tok/s modelled, with the slowdown, $ / hour assumed, $ / M tokens"
    )
    for pair in ("Llama-2-7B + 7B", "Llama-3.1-8B + 8B"):
        for name, gpu in GPUS.items():
            for acceptance in (0.15, 0.3, 0.5):
                beat = _largest_that_fits(pair, gpu, acceptance)
                if beat is None:
                    yield _row(pair, name, f"{acceptance:.0%}", "does not fit", "", "", "", "")
                    break
                rate = beat.tokens_per_second / slow
                cells = f"{beat.candidates}", f"{beat.tokens_per_second:,.0f}", f"{rate:,.0f}", f"{assumed[name]:.2f}"
                yield _row(pair, name, f"{acceptance:.0%}", *cells, f"{dollars(assumed[name], rate):.2f}")
    record = pages.newest("engine", pages.records())
    assert record is not None
    for row in pages.rows_of(record, "engine"):
        if row["beats"] >= 3:
            told = pages.steady(record, row)
            cost = dollars(assumed["h200"], told["rate"])
            what = "Llama-2-7B + 7B, measured", "h200", f"{row['wanted']:.0%}", f"{told['candidates']:.2g}", ""
            yield _row(*what, f"{told['rate']:,.0f}", f"{assumed['h200']:.2f}", f"{cost:.2f}")


def _largest_that_fits(pair: str, gpu: Gpu, acceptance: float) -> Heartbeat | None:
    for batch in (_BATCH, 32, 16, 8, 4):
        work = Workload(batch, acceptance=acceptance, in_order=True)
        beat = best_candidates(*models(pair), work, replace(gpu, memory=_USABLE * gpu.memory))
        if beat.fits:
            return beat
    return None


def sharded(cost: ModelCost, ways: int) -> ModelCost:
    """A process's part of a model under tensor parallelism."""
    layers = [replace(x, query_heads=x.query_heads // ways, kv_heads=max(x.kv_heads // ways, 1)) for x in cost.layers]
    counts = {field.name: getattr(cost, field.name) // ways for field in fields(Weights)}
    return replace(cost, **counts, vocab=max(cost.vocab // ways, 1), layers=tuple(layers))


def collectives(cost: ModelCost, tokens: float, ways: int) -> float:
    """Seconds of the two all-reduces of each layer in a pass over so many tokens, by a ring."""
    traffic = 2 * (ways - 1) / ways * tokens * cost.hidden * cost.dtype.itemsize
    return 2 * len(cost.layers) * (_CALL + traffic / _LINK) if ways > 1 else 0.0


@dataclass(frozen=True)
class Split:
    """A pair of models on several devices."""

    gpus: int
    propose: float  # seconds
    score: float
    tokens: float  # committed in a heartbeat
    fits: bool

    @property
    def rate(self) -> float:
        """Accepted tokens a second, one stage after the other."""
        return self.tokens / (self.propose + self.score)


def split(pair: str, ways: int, apart: bool, gpu: Gpu, work: Workload) -> Split:
    """With both models over so many GPUs, or the reward model apart on one more."""
    policy, reward = models(pair)
    own = sharded(policy, ways), reward if apart else sharded(reward, ways)
    usable = _USABLE * gpu.memory
    beat = best_candidates(*own, work, replace(gpu, memory=usable * (1 + apart)))
    weights = [one.parameters * one.dtype.itemsize for one in own]
    slots = (beat.memory - sum(weights)) / sum(one.kv_bytes_per_token for one in own)
    each = [held + slots * one.kv_bytes_per_token for held, one in zip(weights, own, strict=True)]
    stages = {stage.name: stage.achievable_s for stage in beat.stages}
    rows = beat.rows * work.segment
    passes = work.segment * collectives(policy, beat.rows, ways)
    scored = 0.0 if apart else collectives(reward, rows, ways)
    rest = stages["select"] + stages["host"]
    fits = max(each) <= usable if apart else sum(each) <= usable
    times = stages["propose"] + passes + rest, stages["score"] + scored
    return Split(ways + apart, *times, beat.committed_tokens, fits)


def devices() -> Iterator[str]:
    """One device, two, or a model over several: H200, without prompts."""
    gpu, work = GPUS["h200"], Workload(_BATCH, in_order=True)
    yield from _table("pair, GPUs, policy ms, reward ms, share of the reward, tok/s, tok/s of a GPU, fits")
    for pair in PAIRS:
        for ways, apart in ((1, False), (1, True), (2, False), (4, False), (8, False)):
            one = split(pair, ways, apart, gpu, work)
            name = f"{ways} + 1" if apart else f"{ways}"
            share = one.score / (one.propose + one.score)
            cells = f"{one.propose * 1e3:.0f}", f"{one.score * 1e3:.0f}", f"{share:.0%}"
            if one.fits:
                yield _row(pair, name, *cells, f"{one.rate:,.0f}", f"{one.rate / one.gpus:,.0f}", "yes")
            else:
                yield _row(pair, name, *cells, "", "", "no")


def replica(seats: int = SEATS) -> Replica:
    """An H200 with Llama-3.1-8B and a reward model of its size."""
    prompt, answer = (float(lengths(q, 100_000, np.random.default_rng(0)).mean()) for q in (SHAPE.prompt, SHAPE.answer))
    a, b = ACCEPTANCE
    work = Workload(seats, acceptance=a / (a + b), context=prompt + answer / 2, response=round(answer), in_order=True)
    return Replica.modelled(*models("Llama-3.1-8B + 8B"), GPUS["h200"], work, seats, SHARED * prompt, slowdown())


def a_day(requests: int, replicas: int, rate: float, surge: Surge = _CALM, streams: int = 1, seed: int = 0) -> Requests:
    """So many requests, ``rate`` a second and replica in the mean: the day is as short as they make it."""
    rng = np.random.default_rng(seed)
    prompt, answer = (lengths(quantiles, requests, rng) for quantiles in (SHAPE.prompt, SHAPE.answer))
    popular = 1 / np.arange(1, GROUPS + 1)
    return Requests(
        arrival_times(requests, requests / rate / replicas, SHAPE, streams, surge, seed),
        prompt,
        (SHARED * prompt).astype(np.int64),
        answer,
        np.clip(rng.beta(*ACCEPTANCE, requests), 0.02, 1.0),
        rng.choice(GROUPS, requests, p=popular / popular.sum()),
    )


def sweep() -> dict[str, list[tuple[float, Served]]]:
    """By routing, what loads of requests a second and replica come to: 100 replicas."""
    return {way: [(load, serve(a_day(40_000, 100, load), replica(), 100, way)) for load in LOADS] for way in ROUTINGS}


def fleet() -> Iterator[tuple[str, Requests, Served]]:
    """A million requests on a thousand GPUs, by what is changed."""
    day, surge = (a_day(REQUESTS, REPLICAS, LOAD, one) for one in (_CALM, Surge(15, 2.0, 0.05)))
    for way in ROUTINGS:
        yield way, day, serve(day, replica(), REPLICAS, way)
    yield "prefix, twice the peak for 1/20 of the day", surge, serve(surge, replica(), REPLICAS, "prefix")


def told(name: str, one: Served, replicas: int) -> str:
    first, whole = (np.percentile(times, [50, 99]) for times in (one.first, one.whole))
    rate = one.committed / one.seconds / replicas
    cells = f"{one.encoding:.0%}", f"{one.hits:.0%}", f"{one.drawn / one.committed:.1f}", f"{rate:,.0f}"
    times = f"{first[0]:.1f} / {first[1]:.1f}", f"{whole[0]:.1f} / {whole[1]:.1f}"
    return _row(name, f"{one.busy:.0%}", *cells, *times)


FLEET = (
    "what, busy, of it prompts, hits, drawn / token, accepted tok/s of a GPU, first segment s p50 / p99, "
    "answer s p50 / p99"
)


def plot(path: Path, day: Requests, one: Served, swept: dict[str, list[tuple[float, Served]]]) -> None:
    """Three panels: the day's arrivals and candidates, its waits, and the waits by load and routing."""
    import matplotlib
    from matplotlib.figure import Figure

    grey = "#858d96"
    look: Any = {
        "svg.hashsalt": "stars-fast",
        "svg.fonttype": "none",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), grey),
    }
    length = float(day.arrival[-1])
    hours = np.linspace(0, 24, 97)
    middle = (hours[1:] + hours[:-1]) / 2
    at = day.arrival / length * 24
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(9.2, 3.2), layout="constrained")
        left, centre, right = figure.subplots(1, 3)
        count = np.histogram(at, hours)[0] / (length / 96) / REPLICAS
        left.step(middle, count, where="mid", color="#bf4b8a", label="requests a second")
        beat = np.digitize(one.beats[:, 0] / length * 24, hours) - 1
        means = [one.beats[beat == i] for i in range(96)]
        left.plot(middle, [x[:, 2].mean() for x in means], color="#2f81f7", label="candidates of each request")
        left.plot(middle, [x[:, 1].mean() for x in means], color="#2da44e", label="running requests")
        left.set(xlabel="hour of the day", title="one of 1,000 replicas, modelled", ylim=(0, None))
        bins = np.digitize(at, hours) - 1
        for share, style in ((50, "-"), (99, ":")):
            for name, times, colour in (("first segment", one.first, "#2f81f7"), ("answer", one.whole, "#d1741c")):
                waits = [np.percentile(times[bins == i], share) for i in range(96)]
                centre.plot(middle, waits, style, color=colour, label=f"{name}, p{share}")
        centre.set(xlabel="hour of the day", ylabel="seconds", yscale="log", title="waits of the day")
        colours = {"random": "#bf4b8a", "two": "#d1741c", "prefix": "#2f81f7"}
        for way, points in swept.items():
            loads = [load for load, _ in points]
            waits = [np.percentile(x.first, 99) for _, x in points]
            right.plot(loads, waits, "o-", ms=3, color=colours[way], label=way)
        right.set(
            xlabel="requests a second and replica",
            ylabel="seconds",
            yscale="log",
            title="first segment, p99, by routing",
        )
        for axes in (centre, right):
            axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
            axes.minorticks_off()
        for axes in (left, centre, right):
            axes.set_facecolor("none")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=7)
        figure.patch.set_alpha(0)
        figure.savefig(path, metadata={"Date": None})


def _table(names: str) -> Iterator[str]:
    columns = names.split(", ")
    yield _row(*columns)
    yield "|" + "---|" * len(columns)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--only", choices=("prices", "devices", "sweep", "fleet"), action="append")
    parser.add_argument("--price", action="append", default=[], metavar="GPU=DOLLARS", help="of an hour")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    assumed = PRICES | {name: float(price) for name, price in (one.split("=") for one in options.price)}
    wanted = options.only or ["prices", "devices", "sweep", "fleet"]
    days: list[tuple[str, Requests, Served]] = []
    swept: dict[str, list[tuple[float, Served]]] = {}
    if "prices" in wanted:
        print("\n".join(prices(assumed)), end="\n\n")
    if "devices" in wanted:
        print("\n".join(devices()), end="\n\n")
    if "sweep" in wanted:
        swept = sweep()
        print("\n".join(_table(FLEET)))
        for way, points in swept.items():
            for load, one in points:
                print(told(f"100 replicas, {load:g}/s each, {way}", one, 100))
        print()
    if "fleet" in wanted:
        print("\n".join(_table(FLEET)))
        for name, requests, one in fleet():
            print(told(f"{REPLICAS:,} replicas, {LOAD:g}/s each, {name}", one, REPLICAS), flush=True)
            days.append((name, requests, one))
    if options.plot and days and swept:
        plot(options.plot, days[0][1], days[0][2], swept)


if __name__ == "__main__":
    main()
