"""`python -m tests.soak.overload --seconds 180`: ten times as many requests as the server can take.

First what it can take: as many streams as run at once, each followed by the next. Then requests arrive at ten times
that rate, whether or not others were answered. Memory must stay flat, what is accepted must be answered in bounded time
and once, the rest refused with Retry-After, and tokens/s stay within 5 % of the unloaded ones: the mean of before and
after, as the speed of a shared machine moves.

A request that is refused takes the time of its connection whatever the model, about that of one token of the demo model
(3 M parameters), and nine of them for every answer show there: `--model demo/storyteller`. The model is by default of
random weights and 88 M parameters, the smallest of the sizes that people serve.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path

from server.bench_model import random_model
from tests.soak.target import CACHE, STORYTELLER, Target, finish, grown, serving
from tests.soak.traffic import Outcome, ask, body, percentile

STREAMS, QUEUE, NEW_TOKENS = 16, 32, 48
FACTOR = 10
SLACK_MIB = 24.0
TOKENS = "vllm:generation_tokens_total"
LEAST_SHARE = 0.95  # of the unloaded tokens/s


async def closed_loop(target: Target, seconds: float) -> list[Outcome]:
    """STREAMS requests at any time."""
    draw, end = random.Random(1), time.monotonic() + seconds
    found: list[Outcome] = []

    async def one() -> None:
        while time.monotonic() < end:
            found.append(await ask(target.port, body(draw, NEW_TOKENS)))

    await asyncio.gather(*(one() for _ in range(STREAMS)))
    return found


async def open_loop(target: Target, per_s: float, seconds: float) -> list[Outcome]:
    """Requests every 1 / per_s seconds, whatever comes of them."""
    draw, started = random.Random(2), time.monotonic()
    tasks = []
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, started + number / per_s - time.monotonic()))
        tasks.append(asyncio.create_task(ask(target.port, body(draw, NEW_TOKENS))))
    return list(await asyncio.gather(*tasks))


async def calm(target: Target, seconds: float) -> tuple[float, float]:
    """Requests and tokens per second of the closed loop."""
    begun, count = time.monotonic(), target.metrics()[TOKENS]
    found = await closed_loop(target, seconds)
    spent = time.monotonic() - begun
    return len(found) / spent, (target.metrics()[TOKENS] - count) / spent


def complain(found: list[Outcome], limit_s: float) -> list[str]:
    """What is wrong with the answers to an overload."""
    accepted = [o for o in found if o.status == 200]
    refused = [o for o in found if o.status == 503]
    wrong = []
    if strange := [o for o in found if o.status not in (200, 503)]:
        wrong.append(f"{len(strange)} requests got neither answer nor refusal, such as {strange[0]}")
    if silent := [o for o in refused if int(o.headers.get("retry-after", "0")) < 1]:
        wrong.append(f"{len(silent)} refusals without Retry-After")
    if short := [o for o in accepted if not o.done or o.completion_tokens != NEW_TOKENS or o.finish_reason != "length"]:
        wrong.append(f"{len(short)} accepted requests were not answered whole, such as {short[0]}")
    if any(len(o.ids) != 1 for o in accepted) or len(set.union(*(o.ids for o in accepted))) != len(accepted):
        wrong.append("an answer's id is missing, doubled or another's")
    if (slowest := percentile([o.total_s for o in accepted], 0.99)) > limit_s:
        wrong.append(f"p99 of accepted requests {slowest:.1f} s is above {limit_s:.1f} s")
    return wrong


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.overload", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="of overload; unloaded a sixth of it before and after"
    )
    parser.add_argument("--model", type=Path, help="folder (default: random weights in the shape 768x12, in int8)")
    arguments = parser.parse_args()
    limits = ["--max-num-seqs", str(STREAMS), "--max-queue", str(QUEUE), "--prefix-caching", "off"]
    model = arguments.model
    if model is None:
        model = random_model("768x12", STORYTELLER, CACHE)
        limits += ["--preset", "int8"]  # random matrices have no low rank to find
    with serving(*limits, model=model) as target:
        asyncio.run(closed_loop(target, 5.0))
        before = target.settled()
        per_s, first = asyncio.run(calm(target, arguments.seconds / 6))
        begun, count = time.monotonic(), target.metrics()[TOKENS]
        found = asyncio.run(open_loop(target, FACTOR * per_s, arguments.seconds))
        spent = time.monotonic() - begun
        tokens = target.metrics()[TOKENS] - count
        loaded = tokens / spent
        after = target.settled()
        _, last = asyncio.run(calm(target, arguments.seconds / 6))
        unloaded = (first + last) / 2
    accepted = [o for o in found if o.status == 200]
    # a full queue before it: its own time and that of those ahead, with half as much again for arrival in bursts
    limit_s = 1.5 * (QUEUE + STREAMS) / per_s
    wrong = complain(found, limit_s) + grown(before, after, SLACK_MIB)
    if tokens != NEW_TOKENS * len(accepted):
        wrong.append(f"{tokens:.0f} tokens were counted, {NEW_TOKENS * len(accepted)} answered")
    if loaded < LEAST_SHARE * unloaded:
        wrong.append(f"{loaded:.0f} tokens/s are below {LEAST_SHARE:.0%} of the unloaded {unloaded:.0f}")
    figures = {
        "model": model.name, "seconds": round(spent, 1), "sent": len(found), "accepted": len(accepted),
        "tokens_per_s_unloaded": [round(first, 1), round(last, 1)], "tokens_per_s_overloaded": round(loaded, 1),
        "total_p50_s": round(percentile([o.total_s for o in accepted], 0.5), 2),
        "total_p99_s": round(percentile([o.total_s for o in accepted], 0.99), 2), "total_limit_s": round(limit_s, 2),
        "refused_p99_ms": round(1e3 * percentile([o.total_s for o in found if o.status == 503], 0.99), 1),
        "before": before, "after": after,
    }  # fmt: skip
    return finish("overload", figures, wrong)


if __name__ == "__main__":
    sys.exit(main())
