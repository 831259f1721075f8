"""`python -m tests.soak.steady --seconds 3600`: an hour of mixed traffic at 80 % of what the server can take.

Short and long prompts, shared beginnings, streams and whole answers, log-probabilities, stop strings, some clients that
leave. Memory and latency of the last sixth are held against those of the second sixth: what drifts would show.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import replace
from typing import Any

from tests.soak.churn import leave
from tests.soak.target import Holdings, Target, finish, grown, serving
from tests.soak.traffic import WORDS, Outcome, ask, body, percentile

LOAD = 0.8
SLACK_MIB = 8.0
SLOWER = 1.3  # of the median and p95 latency, on a shared machine
SHARED = " ".join(WORDS * 6)


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


async def capacity(target: Target, seconds: float) -> float:
    """Requests per second of 16 clients that never rest."""
    draw, end, done = random.Random(4), time.monotonic() + seconds, 0

    async def one() -> None:
        nonlocal done
        while time.monotonic() < end:
            await ask(target.port, request(draw))
            done += 1

    await asyncio.gather(*(one() for _ in range(16)))
    return done / seconds


async def run(target: Target, per_s: float, seconds: float) -> tuple[list[tuple[float, Outcome]], list[Holdings]]:
    """Requests at random intervals; (when sent, outcome), and the server's holdings every sixth."""
    draw, started = random.Random(5), time.monotonic()
    tasks: list[asyncio.Task[tuple[float, Outcome]]] = []
    readings: list[Holdings] = []

    async def one(at: float) -> tuple[float, Outcome]:
        return at, await ask(target.port, request(draw))

    gone: set[asyncio.Task[None]] = set()
    at = 0.0
    while at < seconds:
        await asyncio.sleep(max(0.0, started + at - time.monotonic()))
        if draw.random() < 0.05:
            task = asyncio.create_task(leave(target.port, draw.choice(("in the stream", "reset")), draw))
            gone.add(task)
            task.add_done_callback(gone.discard)
        else:
            tasks.append(asyncio.create_task(one(at)))
        at += draw.expovariate(per_s)
        if at > (len(readings) + 1) * seconds / 6:
            readings.append(await asyncio.to_thread(target.holdings))
    return list(await asyncio.gather(*tasks)), readings


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.steady", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    arguments = parser.parse_args()
    seconds = arguments.seconds
    with serving("--max-num-seqs", "16", "--kv-memory", "4MiB") as target:
        asyncio.run(capacity(target, 5.0))
        most = asyncio.run(capacity(target, max(5.0, seconds / 60)))
        before = target.settled()
        found, readings = asyncio.run(run(target, LOAD * most, seconds))
        after = target.settled()
    warm = readings[1].rss_mib if len(readings) > 1 else before.rss_mib  # what is made once was made by then
    wrong = grown(replace(before, rss_mib=warm), after, SLACK_MIB)
    if bad := [o for _, o in found if not o.done or o.error]:
        wrong.append(f"{len(bad)} of {len(found)} requests were not answered, such as {bad[0]}")
    early = [o.total_s for at, o in found if seconds / 6 <= at < seconds / 3]
    late = [o.total_s for at, o in found if at >= seconds * 5 / 6]
    for share in (0.5, 0.95):
        if percentile(late, share) > SLOWER * percentile(early, share):
            wrong.append(
                f"latency at {share:.0%} drifted: {percentile(early, share):.2f} to {percentile(late, share):.2f} s"
            )
    figures = {
        "seconds": seconds, "requests": len(found), "requests_per_s": round(len(found) / seconds, 2),
        "most_requests_per_s": round(most, 2),
        "latency_p50_s": [round(percentile(part, 0.5), 3) for part in (early, late)],
        "latency_p95_s": [round(percentile(part, 0.95), 3) for part in (early, late)],
        "rss_mib": [round(reading.rss_mib, 1) for reading in readings], "before": before, "after": after,
    }  # fmt: skip
    return finish("steady", figures, wrong)


if __name__ == "__main__":
    sys.exit(main())
