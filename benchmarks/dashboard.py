"""`python -m benchmarks.dashboard --server spq=URL [--server gptq=URL] --png FILE`: the dashboard without Grafana.

A real Prometheus scrapes the given servers each second; each server in turn gets the same load, at rising numbers of
streams; then each query of the dashboard is asked, and what came back is drawn (matplotlib, the extra `plots`). The
last line is JSON: how many series each panel had. It shows that the dashboard works; it is no measurement of servers.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.panel_plot import Named, write_png
from benchmarks.panels import Panel, everything, load, panels
from benchmarks.prometheus import SCRAPE_S, Prometheus, watch

WORDS = ("captain", "sea", "sky", "men", "table", "night", "road", "house", "river", "story", "harbour", "winter")
OPENING = "The captain looked at the sea and at the sky, went down to his men, sat at their table, and said that"
ANSWER_TOKENS = 48
RATE_INTERVAL = "10s"
CALM_S = 5.0  # before, between and after the loads


def main() -> None:
    """Watch, load, ask, draw."""
    arguments = _parser().parse_args()
    targets: dict[str, list[str]] = {}
    for job, url in arguments.server:
        targets.setdefault(job, []).append(url.removeprefix("http://").rstrip("/"))
    with tempfile.TemporaryDirectory() as folder, watch(targets, Path(folder)) as prometheus:
        start = time.time()
        time.sleep(CALM_S)
        for job, url in arguments.server:
            for streams in arguments.streams:
                print(f"{job} {url}: {streams} streams for {arguments.seconds:g} s", flush=True)
                put_load(url.rstrip("/"), streams, arguments.seconds)
            time.sleep(CALM_S)
        found = panels(load(), everything(RATE_INTERVAL))
        answers = [(panel, ask(prometheus, panel, start, time.time())) for panel in found]
    day = time.strftime("%Y-%m-%d")
    title = f"The dashboard's queries, answered by Prometheus on {day} and drawn by matplotlib; no picture of Grafana."
    write_png(answers, f"{title} {arguments.note}".strip(), arguments.png)
    print(json.dumps({"png": str(arguments.png), "series": {p.title: sum(map(len, named)) for p, named in answers}}))


def ask(prometheus: Prometheus, panel: Panel, start_s: float, end_s: float) -> list[Named]:
    """Named series of each query of a panel: over the time, or now where the query is instant."""
    found: list[Named] = []
    for query in panel.queries:
        series = (
            prometheus.query(query.expr)
            if query.instant
            else prometheus.query_range(query.expr, start_s, end_s, SCRAPE_S)
        )
        found.append([(query.name(one.labels), one) for one in series])
    return found


def put_load(url: str, streams: int, seconds: float) -> None:
    """Keep so many completions going; refused ones are sent again. Raises URLError where nothing answers."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=_stream, args=(url, model, end, seed)) for seed in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _stream(url: str, model: str, end: float, seed: int) -> None:
    """One client: an answer after the other, all prompts with the same opening."""
    draw = random.Random(seed)
    while time.monotonic() < end:
        prompt = f"{OPENING} {' '.join(draw.choices(WORDS, k=draw.randint(4, 40)))}"
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "seed": seed}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=120).close()
        except urllib.error.HTTPError as error:
            error.close()
            time.sleep(0.2)


def _server(text: str) -> tuple[str, str]:
    job, _, url = text.partition("=")
    if not url.startswith("http://"):
        raise argparse.ArgumentTypeError(f"{text}: write JOB=http://HOST:PORT")
    return job, url


def _streams(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__)
    what = "a running server, and its job in prometheus.yml: spq or gptq; repeat for several"
    parser.add_argument("--server", type=_server, action="append", required=True, metavar="JOB=URL", help=what)
    parser.add_argument("--streams", type=_streams, default=[1, 4, 12], help="numbers of streams, e.g. 1,4,12")
    parser.add_argument("--seconds", type=float, default=20.0, help="at each number of streams")
    parser.add_argument("--note", default="", help="what the servers are, for the picture")
    parser.add_argument("--png", type=Path, required=True, help="file to write")
    return parser


if __name__ == "__main__":
    main()
