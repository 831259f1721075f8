"""`python -m benchmarks.speculation`: what guessing ahead brings on text that repeats itself, and costs on other text.

The real engine in this process, without HTTP, on a trained model; with and without guesses in turn, and the answers
compared token by token. (Where two tokens are all but equally near a random number, the last bits of the logits decide,
and they may depend on the shape of the batch: an answer in some hundreds may differ.) Repetitive: a passage three times
over and the beginning of a fourth, to be continued. Plain: the beginnings of sentences. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.config import ServerConfig
from server.core import SamplingParams
from server.engine.build import build_engine, pick_device
from server.engine.engine import Engine, GenerationRequest
from server.model.resolve import prepare_folder
from server.tokenizer import Tokenizer

PASSAGE = (
    "The ship left the harbour at noon, with nine men on board and bread for twenty days. The captain wrote down the "
    "wind, the sails, and the names of the men: Adam, Ben, Carl, David, Ernest, Frank, George, Henry and John.\n\n"
)
BEGINNINGS = (
    "It was a cold and rainy night, and",
    "The old man looked out of the window and",
    "“My dear,” said the doctor, “you must",
    "In the middle of the forest there stood",
    "She had never seen so many people as",
    "When the train arrived at last,",
    "The letter was written in a hand that",
    "Nobody in the village could remember",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of text."""

    name: str
    prompts: tuple[str, ...]
    temperature: float


CASES = (
    Case("repetitive, greedy", tuple(PASSAGE * 3 + PASSAGE[: 20 + 5 * i] for i in range(8)), 0.0),
    Case("plain, greedy", BEGINNINGS, 0.0),
    Case("plain, temperature 0.7", BEGINNINGS, 0.7),
)


@dataclass(slots=True)
class Run:
    """One pass over a case's prompts."""

    seconds: float
    answers: list[list[int]]
    num_draft_tokens: int
    num_accepted_tokens: int


async def run(engine: Engine, prompts: list[list[int]], case: Case, new_tokens: int) -> Run:
    """All prompts at once."""
    before = engine.stats()
    started = time.perf_counter()
    requests = [
        GenerationRequest(f"{i}", p, SamplingParams(max_tokens=new_tokens, temperature=case.temperature, seed=i))
        for i, p in enumerate(prompts)
    ]

    async def collect(generation: Any) -> list[int]:
        return [output.token_id async for outputs in generation for output in outputs]

    answers = await asyncio.gather(*map(collect, engine.submit(requests)))
    after = engine.stats()
    return Run(
        time.perf_counter() - started,
        answers,
        after.num_draft_tokens - before.num_draft_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
    )


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per case and number of streams."""
    guesses = [0, *map(int, arguments.guesses.split(","))]
    engines: dict[int, Engine] = {}
    for count in guesses:
        options: dict[str, Any] = {"model": arguments.model, "preset": arguments.preset, "threads": arguments.threads,
                                   "speculative_ngram": count, "prefix_caching": False}  # fmt: skip
        config = ServerConfig(**options)
        folder = prepare_folder(config, pick_device(config), lambda *report: None)
        tokenizer = Tokenizer(folder)
        engines[count] = build_engine(folder, config, progress=lambda phase, done: None)
        engines[count].start(asyncio.get_running_loop())
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        for streams in map(int, arguments.streams.split(",")):
            prompts = [tokenizer.encode(text) for text in case.prompts[:streams]]
            runs: dict[int, list[Run]] = {count: [] for count in guesses}
            for _ in range(arguments.rounds + 1):
                for count in guesses:
                    runs[count].append(await run(engines[count], prompts, case, arguments.new_tokens))
            for count in guesses:
                rows.append(_row(case, streams, count, runs[count][1:], runs[0][1:], arguments.new_tokens))
                print(_line(rows[-1]), flush=True)
    for engine in engines.values():
        await engine.drain(0)
    return rows


def _row(case: Case, streams: int, count: int, ours: list[Run], plain: list[Run], new_tokens: int) -> dict[str, Any]:
    pairs = [pair for a, b in zip(ours, plain, strict=True) for pair in zip(a.answers, b.answers, strict=True)]
    guessed = sum(r.num_draft_tokens for r in ours)
    ratios = [b.seconds / a.seconds for a, b in zip(ours, plain, strict=True)]
    return {
        "case": case.name,
        "streams": streams,
        "guesses": count,
        "tokens_per_s": statistics.median(streams * new_tokens / r.seconds for r in ours),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "guessed_per_token": guessed / (len(ours) * streams * new_tokens),
        "accepted": sum(r.num_accepted_tokens for r in ours) / guessed if guessed else None,
        "answers": len(pairs),
        "equal_answers": sum(a == b for a, b in pairs),
    }


def _line(row: dict[str, Any]) -> str:
    accepted = (
        "" if row["accepted"] is None else f"  {row['accepted']:.0%} of {row['guessed_per_token']:.2f} a token right"
    )
    return (
        f"{row['case']:24} x{row['streams']:<2} guesses {row['guesses']:2}  {row['tokens_per_s']:8.1f} tok/s  ratio "
        f"{row['ratio']:.2f} [{row['ratio_min']:.2f}..{row['ratio_max']:.2f}]  "
        f"{row['equal_answers']}/{row['answers']} answers equal{accepted}"
    )


def main() -> None:
    """Measure and print a table, then JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/storyteller", type=lambda text: str(Path(text)))
    parser.add_argument("--preset", default="default", choices=("default", "paper", "int8", "none"))
    parser.add_argument("--guesses", default="4,8", help="most tokens guessed ahead (default: 4,8)")
    parser.add_argument("--streams", default="1,8", help="streams at once, at most 8 (default: 1,8)")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5, help="turns after a warm-up (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments))
    print(json.dumps({"options": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
