"""Time of the sampler per step by rows and kind of request: python -m benchmarks.sampler [--device cuda].

Logits are standard normal times a spread: at 2.4 the nucleus of 0.9 is that of flat text (a few thousand of 32,000
tokens), at 6 that of a trained model (a few dozen). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from server.core import SamplingParams, Sequence, Timings
from server.engine.sampler import Draw

KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p, top-k": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}
KNOWN = 400  # tokens of each sequence, half of them output


def main() -> None:
    """Print milliseconds by kind and rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="1,16,256", help="rows of a step (default: 1,16,256)")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--spread", type=float, default=6.0, help="standard deviation of the logits (default: 6)")
    parser.add_argument("--repeat", type=int, default=7, help="timed steps, the median counts (default: 7)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    counts = [int(text) for text in arguments.rows.split(",")]
    found: dict[str, list[float]] = {}
    print(f"{'ms per step':14}" + "".join(f"{count:>10}" for count in counts))
    for kind, options in KINDS.items():
        found[kind] = [measure(options, count, arguments, device) for count in counts]
        print(f"{kind:14}" + "".join(f"{ms:10.2f}" for ms in found[kind]), flush=True)
    print(
        json.dumps(
            {
                "rows": counts,
                "ms": found,
                "torch": torch.__version__,
                **{k: v for k, v in vars(arguments).items() if k != "rows"},
            }
        )
    )


def measure(options: dict[str, float], count: int, arguments: argparse.Namespace, device: torch.device) -> float:
    """Median milliseconds of one call for `count` rows."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(count, arguments.vocab, generator=generator) * arguments.spread).to(device)
    ids = torch.randint(0, arguments.vocab, (count, KNOWN), generator=generator).tolist()
    sequences = [
        Sequence(str(i), ids[i], KNOWN // 2, SamplingParams(max_tokens=9, seed=i, **options), Timings(0.0))  # type: ignore[arg-type]
        for i in range(count)
    ]
    spent = []
    for turn in range(arguments.repeat + 1):
        rows = logits.clone()
        began = time.perf_counter()
        Draw(rows, sequences).read()
        if turn:
            spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent)


if __name__ == "__main__":
    main()
