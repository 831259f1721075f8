"""`python -m tests.soak.churn --requests 5000`: clients that leave at every possible moment.

Half of the requests are cut: before the head is whole, in the middle of the body, before the first byte of the answer,
in the middle of the stream, by closing one half of the socket, by reading nothing, or they stay and send no more until
the server closes. When all are gone, cache, queue, tasks, descriptors and memory must be where they were, and a request
asked then must be answered as before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import time
from collections import Counter

from tests.soak.target import Target, finish, grown, serving
from tests.soak.traffic import Outcome, ask, body, head, read_answer

AT_ONCE = 24
NEW_TOKENS = 24
SLACK_MIB = 24.0
KINDS = ("in the head", "in the body", "before the answer", "in the stream", "half closed", "reads nothing", "reset",
         "stalls in the head", "stalls in the body")  # fmt: skip
CLIENT_TIMEOUT_S = 2


async def leave(port: int, kind: str, draw: random.Random) -> None:
    """One request that is cut."""
    request = body(draw, 400 if kind != "half closed" else NEW_TOKENS, stream=draw.random() < 0.7)
    data = json.dumps(request).encode()
    whole = head(data) + data
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if kind.endswith("in the head"):
            writer.write(whole[: draw.randint(1, len(head(data)) - 1)])
        elif kind.endswith("in the body"):
            writer.write(head(data) + data[: draw.randint(0, len(data) - 1)])
        else:
            writer.write(whole)
        await writer.drain()
        if kind.startswith("stalls"):
            answer = await asyncio.wait_for(reader.read(), 30)  # to its end: the server closes
            if not answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 503")):
                raise AssertionError(f"a client that stalled was told {answer[:100]!r}")
        elif kind == "half closed":
            writer.write_eof()
            with contextlib.suppress(asyncio.IncompleteReadError, ValueError):
                await asyncio.wait_for(read_answer(reader, Outcome(), time.monotonic()), 60)
        elif kind == "in the stream":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.readuntil(b"data: "), 10)
            await asyncio.sleep(draw.random() * 0.3)
        elif kind != "before the answer":
            await asyncio.sleep(draw.random() * (1.5 if kind == "reads nothing" else 0.3))
        if kind == "reset":
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # the server closed first: a half request may be refused
    finally:
        writer.close()


async def churn(target: Target, count: int) -> tuple[list[Outcome], Counter[str]]:
    """`count` requests, AT_ONCE at a time, half of them cut."""
    draw, gate = random.Random(3), asyncio.Semaphore(AT_ONCE)
    answered: list[Outcome] = []
    cut: Counter[str] = Counter()

    async def one() -> None:
        async with gate:
            if draw.random() < 0.5:
                kind = draw.choice(KINDS)
                cut[kind] += 1
                await leave(target.port, kind, draw)
            else:
                answered.append(await ask(target.port, body(draw, NEW_TOKENS, stream=draw.random() < 0.7)))

    await asyncio.gather(*(one() for _ in range(count)))
    return answered, cut


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.churn", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=5000)
    arguments = parser.parse_args()
    fixed = body(random.Random(9), NEW_TOKENS, temperature=0)
    limits = ["--max-num-seqs", "16", "--max-queue", "64", "--kv-memory", "3MiB"]
    with serving(*limits, "--client-timeout", str(CLIENT_TIMEOUT_S)) as target:
        asyncio.run(churn(target, 200))  # what is made once
        before, first = target.settled(), asyncio.run(ask(target.port, fixed))
        begun = time.monotonic()
        answered, cut = asyncio.run(churn(target, arguments.requests))
        spent = time.monotonic() - begun
        after, last = target.settled(), asyncio.run(ask(target.port, fixed))
    wrong = grown(before, after, SLACK_MIB)
    if bad := [o for o in answered if not o.done or o.completion_tokens != NEW_TOKENS]:
        wrong.append(f"{len(bad)} of the {len(answered)} requests that stayed were not answered, such as {bad[0]}")
    if not first.text or first.text != last.text:
        wrong.append("the same greedy request was answered otherwise afterwards")
    figures = {
        "seconds": round(spent, 1),
        "answered": len(answered),
        "cut": dict(cut),
        "before": before,
        "after": after,
    }
    return finish("churn", figures, wrong)


if __name__ == "__main__":
    sys.exit(main())
