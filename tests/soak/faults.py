"""`python -m tests.soak.faults --runs 200`: a server under load in which something breaks, again and again.

Each run starts a server, loads it, and lets one thing fail at a random moment: a step (an error, no memory), the
engine's thread, the numbers (NaN), or the process (SIGTERM, SIGKILL). What must follow stands in docs/reliability.md;
it is checked from outside. A run that takes longer than the limit hung.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence

from loadtest.process import members
from tests.soak.target import Target, finish, serving
from tests.soak.traffic import Outcome, ask, body

STREAMS = 12
NEW_TOKENS = 48
HUNG_S = 90.0
FAULTS = ("kernel", "memory", "thread", "nan", "sigterm", "sigkill")
FATAL = ("kernel", "memory", "thread")  # the engine ends, the process stays and says so


def one_run(number: int) -> tuple[str, list[str]]:
    """The fault of a run, and what was wrong with what followed."""
    draw = random.Random(number)
    fault, step = FAULTS[number % len(FAULTS)], draw.randint(3, 60)
    program: Sequence[str] = ("-m", "server") if fault.startswith("sig") else ("-m", "tests.soak.faulty_server")
    os.environ["SOAK_FAULT"] = f"{fault}:{step}"  # the child reads it
    with serving("--max-num-seqs", "8", "--drain-timeout", "60", program=program) as target:
        wrong = asyncio.run(asyncio.wait_for(under_load(target, fault, draw), HUNG_S))
        told_s = time.monotonic()
    if time.monotonic() - told_s > 15:
        wrong.append("the process did not end when told to")
    if members(target.pid):
        wrong.append("a process is left")
    return fault, [f"run {number}, {fault} at step {step}: {what}" for what in wrong]


async def under_load(target: Target, fault: str, draw: random.Random) -> list[str]:
    """Load it, let it fail, and look."""
    asked = [
        asyncio.create_task(ask(target.port, body(draw, NEW_TOKENS, stream=number % 4 != 0)))
        for number in range(STREAMS)
    ]
    if fault.startswith("sig"):
        await asyncio.sleep(draw.random() * 0.6)
        os.kill(target.pid, signal.SIGTERM if fault == "sigterm" else signal.SIGKILL)
    outcomes = await asyncio.gather(*asked)
    if fault == "sigterm":
        return await after_sigterm(target, outcomes)
    if fault == "sigkill":
        return [] if all(o.done or o.error for o in outcomes) else ["a client was left without an end"]
    if fault == "nan":
        return await after_nan(target, outcomes, draw)
    return await after_failure(target, outcomes, draw)


async def after_failure(target: Target, outcomes: list[Outcome], draw: random.Random) -> list[str]:
    """Every request ended, whole or with the reason; the server is unready and says why; it lives."""
    wrong = [f"a request ended without a reason: {o}" for o in outcomes if not whole(o) and not o.error]
    if all(whole(o) for o in outcomes):
        wrong.append("the fault did not show")
    for path in ("/health", "/ready"):
        if await asyncio.to_thread(status, target.port, path) != 503:
            wrong.append(f"{path} is not 503 after the engine failed")
    late = await ask(target.port, body(draw, 2))
    if late.status < 500 or not late.error:
        wrong.append(f"a request after the failure was answered with {late.status}")
    return wrong if target.alive() else [*wrong, "the process ended by itself"]


async def after_nan(target: Target, outcomes: list[Outcome], draw: random.Random) -> list[str]:
    """What hit broken numbers ended with an error; the server goes on."""
    wrong = [f"a request ended without a reason: {o}" for o in outcomes if not whole(o) and not o.error]
    if not any(o.error and "not finite" in o.error for o in outcomes):
        wrong.append("no request was told that its numbers are not finite")
    if await asyncio.to_thread(status, target.port, "/health") != 200:
        wrong.append("/health is not 200 although the engine goes on")
    return wrong


async def after_sigterm(target: Target, outcomes: list[Outcome]) -> list[str]:
    """What was accepted is answered whole; what came later is refused or finds no one; the process is gone."""
    wrong = [f"an accepted request was not answered whole: {o}" for o in outcomes if o.status == 200 and not whole(o)]
    wrong += [f"a refusal without its reason: {o}" for o in outcomes if o.status not in (0, 200) and not o.error]
    end = time.monotonic() + 20
    while members(target.pid) and time.monotonic() < end:
        await asyncio.sleep(0.1)
    return wrong if not members(target.pid) else [*wrong, "the process is still there 20 s after the last answer"]


def whole(outcome: Outcome) -> bool:
    """Whether an answer came to its end."""
    return outcome.done and outcome.completion_tokens == NEW_TOKENS and outcome.error is None


def status(port: int, path: str) -> int:
    """Of a GET."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, which is its seed")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with serving():
        pass  # compresses once, for all runs
    wrong: list[str] = []
    runs: Counter[str] = Counter()
    for number in range(arguments.first, arguments.first + arguments.runs):
        try:
            fault, found = one_run(number)
        except TimeoutError:
            fault, found = FAULTS[number % len(FAULTS)], [f"run {number}: hung"]
        runs[fault] += 1
        wrong += found
        for line in found:
            print(line, flush=True)
    return finish("faults", {"runs": dict(runs), "seconds": round(time.monotonic() - begun, 1)}, wrong)


if __name__ == "__main__":
    sys.exit(main())
