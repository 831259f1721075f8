"""`python -m tests.soak.steady --seconds 3600`: an hour of mixed traffic at 80 % of what the server can take.

Short and long prompts, shared beginnings, streams and whole answers, log-probabilities, stop strings, some clients that
leave. As many clients as the server has places, each resting for a quarter of the time that its last answer took: about
four fifths of the places are busy, however fast the machine is at the moment. A fixed rate was 80 % only in the minute
in which it was measured.

Memory and latency of the last sixth are held against those of the second sixth: what drifts would show. The speed of a
shared machine moves too, so a fixed piece of work is timed all along, and latency is counted in it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

from tests.soak.churn import leave
from tests.soak.target import Holdings, Target, finish, grown, serving
from tests.soak.traffic import WORDS, Outcome, ask, body, percentile

CLIENTS = 16
REST = 0.25  # of the last answer's time: busy for 1 / 1.25 of the time
PARTS = 6
SLACK_MIB = 8.0
SLOWER = 1.3  # of the median and p95 latency
LEAST_S = 30.0
PROBE_ADDITIONS, PROBE_EVERY_S = 100_000, 2.0
SHARED = " ".join(WORDS * 6)


@dataclass(slots=True)
class Hour:
    """What was seen; times are seconds since the beginning."""

    answers: list[tuple[float, Outcome]] = field(default_factory=list)  # (when sent, outcome)
    probes: list[tuple[float, float]] = field(default_factory=list)  # (when, seconds that the piece of work took)
    readings: list[Holdings] = field(default_factory=list)  # at the end of each part
    cpu_s: list[float] = field(default_factory=list)  # of the server, at the same moments
    tokens: list[float] = field(default_factory=list)  # generated, at the same moments
    left: int = 0  # clients that went away


def request(draw: random.Random) -> dict[str, Any]:
    """One of the mix."""
    kind, stream = draw.random(), draw.random() < 0.8
    if kind < 0.25:
        made = body(draw, draw.randint(4, 24), stream=stream)
        return made | {"prompt": f"{SHARED} {draw.random()}"}
    if kind < 0.4:
        return body(draw, draw.randint(8, 32), stream=stream, logprobs=5, temperature=0.7, seed=draw.randint(0, 99))
    if kind < 0.5:
        return body(draw, 40, stream=stream, stop=[" the", "zq"], top_p=0.9)
    return body(draw, draw.randint(8, 64), stream=stream)


async def run(target: Target, seconds: float) -> Hour:
    """CLIENTS that ask, wait and rest; and what is read beside them."""
    hour, started = Hour(), time.monotonic()

    def now() -> float:
        return time.monotonic() - started

    async def client(draw: random.Random) -> None:
        while (at := now()) < seconds:
            if draw.random() < 0.05:
                await leave(target.port, draw.choice(("in the stream", "reset")), draw)
                hour.left += 1
            else:
                hour.answers.append((at, await ask(target.port, request(draw))))
            await asyncio.sleep(REST * (now() - at))

    async def probe() -> None:
        while (at := now()) < seconds:
            hour.probes.append((at, piece_of_work()))
            await asyncio.sleep(PROBE_EVERY_S)

    async def read() -> None:
        for part in range(1, PARTS + 1):
            await asyncio.sleep(max(0.0, part * seconds / PARTS - now()))
            hour.readings.append(await asyncio.to_thread(target.holdings))
            hour.cpu_s.append(target.cpu_s())
            hour.tokens.append((await asyncio.to_thread(target.metrics))["vllm:generation_tokens_total"])

    draw = random.Random(5)
    await asyncio.gather(probe(), read(), *(client(random.Random(draw.random())) for _ in range(CLIENTS)))
    return hour


def piece_of_work() -> float:
    """Seconds that this process needs now for PROBE_ADDITIONS; about 8 ms."""
    began, total = time.perf_counter(), 0
    for number in range(PROBE_ADDITIONS):
        total += number
    return time.perf_counter() - began


def part_of(samples: list[tuple[float, Any]], part: int, seconds: float) -> list[Any]:
    """Those of one part of the time, 0 the first."""
    return [value for at, value in samples if part <= PARTS * at / seconds < part + 1]


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.steady", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    seconds = parser.parse_args().seconds
    if seconds < LEAST_S:
        parser.error(
            f"--seconds: {seconds:g} are too few for {PARTS} parts with probes in each; give {LEAST_S:g} or more"
        )
    with serving("--max-num-seqs", str(CLIENTS), "--kv-memory", "4MiB") as target:
        before = target.settled()
        hour = asyncio.run(run(target, seconds))
        after = target.settled()
    wrong = grown(replace(before, rss_mib=hour.readings[1].rss_mib), after, SLACK_MIB)  # by then all is made once
    if bad := [o for _, o in hour.answers if not o.done or o.error]:
        wrong.append(f"{len(bad)} of {len(hour.answers)} requests were not answered, such as {bad[0]}")
    latency: dict[float, list[float]] = {0.5: [], 0.95: []}
    probes = [statistics.fmean(part_of(hour.probes, part, seconds)) for part in range(PARTS)]
    for share, found in latency.items():
        found += [percentile([o.total_s for o in part_of(hour.answers, n, seconds)], share) for n in range(PARTS)]
        early, late = found[1] / probes[1], found[-1] / probes[-1]
        if late > SLOWER * early:
            wrong.append(f"latency at {share:.0%} drifted from {early:.1f} to {late:.1f} times the piece of work")
    spent = [
        (c1 - c0) / (t1 - t0)
        for (c0, c1), (t0, t1) in zip(itertools.pairwise(hour.cpu_s), itertools.pairwise(hour.tokens), strict=True)
    ]
    figures = {
        "seconds": seconds, "requests": len(hour.answers), "left": hour.left,
        "busy": round(sum(o.total_s for _, o in hour.answers) / seconds / CLIENTS, 3),
        "tokens_per_s": round(hour.tokens[-1] / seconds, 1),
        "latency_p50_s": [round(value, 3) for value in latency[0.5]],
        "latency_p95_s": [round(value, 3) for value in latency[0.95]],
        "piece_of_work_ms": [round(1e3 * value, 2) for value in probes],
        "server_cpu_ms_per_token": [round(1e3 * value, 3) for value in spent],
        "rss_mib": [round(reading.rss_mib, 1) for reading in hour.readings], "before": before, "after": after,
    }  # fmt: skip
    return finish("steady", figures, wrong)


if __name__ == "__main__":
    sys.exit(main())
