"""`python -m benchmarks.step FOLDER`: what a step of a model takes in the engine's runner, without scheduler and HTTP.

Prompts first, then greedy decode steps, by number of streams. For one decode step of one stream also what Python adds:
function calls (cProfile) and the time outside the model's forward pass and logits. Lowest, median and 90th percentile;
the last line is JSON. Times need a quiet machine, the calls do not.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import time
from pathlib import Path

import torch

from kernels.bench_machine import describe
from kernels.ops import make_ops
from server.core import SamplingParams, ScheduledBatch, Sequence, StepTimes, Timings, Work
from server.engine.kv_cache import allocate
from server.engine.runner import ModelRunner
from server.model.load import load_model
from spq.checkpoint import open_model

BLOCK_SIZE = 16
PROFILED_STEPS = 20


def make_sequences(count: int, prompt: int, new: int, vocab: int) -> list[Sequence]:
    """Random prompts, each with the pages it will need."""
    pages = -(-(prompt + new + 1) // BLOCK_SIZE)
    params = SamplingParams(max_tokens=new, temperature=0.0)
    return [
        Sequence(f"s{i}", torch.randint(8, vocab, (prompt,)).tolist(), prompt, params, Timings(time.monotonic()),
                 block_table=list(range(i * pages, (i + 1) * pages)))
        for i in range(count)
    ]  # fmt: skip


def step(runner: ModelRunner, sequences: list[Sequence], tokens: int) -> tuple[float, StepTimes]:
    """One step of `tokens` tokens for each sequence; seconds of the whole and by phase."""
    times = StepTimes()
    started = time.perf_counter()
    sampled = runner.launch(ScheduledBatch(tuple(Work(s, tokens, samples=True) for s in sequences)), times).result()
    spent = time.perf_counter() - started
    for sequence, token in zip(sequences, sampled, strict=True):
        sequence.num_computed_tokens += tokens
        sequence.token_ids.append(token.token_id)
    return spent, times


def measure(runner: ModelRunner, streams: int, arguments: argparse.Namespace, vocab: int) -> dict[str, float]:
    """Milliseconds of the prompts (`--chunk` prompts a step) and of decode steps."""
    prefills, steps, outside = [], [], []
    for _ in range(arguments.rounds + 1):
        sequences = make_sequences(streams, arguments.prompt_tokens, arguments.new_tokens, vocab)
        parts = [sequences[i : i + arguments.chunk] for i in range(0, streams, arguments.chunk)]
        prefills.append(sum(step(runner, part, arguments.prompt_tokens)[0] for part in parts))
        for _ in range(arguments.new_tokens):
            spent, times = step(runner, sequences, 1)
            steps.append(spent)
            outside.append(spent - times.run)
    steps, outside = sorted(steps[arguments.new_tokens :]), sorted(outside[arguments.new_tokens :])
    return {
        "prefill_ms": 1e3 * sorted(prefills[1:])[len(prefills[1:]) // 2],
        "step_ms_min": 1e3 * steps[0],
        "step_ms_median": 1e3 * steps[len(steps) // 2],
        "step_ms_90": 1e3 * steps[int(0.9 * len(steps))],
        "outside_model_ms_median": 1e3 * outside[len(outside) // 2],
    }


def calls_per_step(runner: ModelRunner, arguments: argparse.Namespace, vocab: int) -> float:
    """Function calls that Python makes in a decode step of one stream."""
    sequences = make_sequences(1, arguments.prompt_tokens, PROFILED_STEPS + 2, vocab)
    step(runner, sequences, arguments.prompt_tokens)
    step(runner, sequences, 1)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(PROFILED_STEPS):
        step(runner, sequences, 1)
    profile.disable()
    calls: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return calls / PROFILED_STEPS


def main() -> None:
    """Measure, and print a line per number of streams, then JSON."""
    arguments = _parser().parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    ops = make_ops(device, torch.float32, arguments.backend)
    source = open_model(arguments.folder)
    length = arguments.prompt_tokens + max(arguments.new_tokens, PROFILED_STEPS) + 2
    model, used = load_model(source, ops, length)
    ops.use_threads(arguments.threads)
    streams = [int(n) for n in arguments.streams.split(",")]
    pages = max(streams) * -(-length // BLOCK_SIZE)
    cache = allocate(source.spec, pages * BLOCK_SIZE, getattr(torch, arguments.kv_dtype), device)
    runner = ModelRunner(model, cache, BLOCK_SIZE)
    rows = {}
    for count in streams:
        rows[count] = row = measure(runner, count, arguments, source.spec.vocab_size)
        print(f"{ops.name} x{count:<3} prompts {row['prefill_ms']:8.1f} ms   step {row['step_ms_min']:7.2f} ms at "
              f"best, {row['step_ms_median']:7.2f} median, {row['step_ms_90']:7.2f} 90 %   outside the model "
              f"{row['outside_model_ms_median']:.2f} ms", flush=True)  # fmt: skip
    calls = calls_per_step(runner, arguments, source.spec.vocab_size)
    print(f"{calls:.0f} Python calls in a step of one stream; weights {used.weights + used.low_rank} bytes")
    options = {name: str(value) for name, value in vars(arguments).items()}
    print(json.dumps(describe(device) | {"options": options, "rows": rows, "calls_per_step": calls}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="model folder, packed or not")
    parser.add_argument("--backend", default="auto", help="auto, native, cpu or reference (default: auto)")
    parser.add_argument("--kv-dtype", default="float32", help="float32, bfloat16, float16 or int8 (default: float32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: cores)")
    parser.add_argument("--streams", default="1,8,16", help="streams at once (default: 1,8,16)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens per prompt (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=30, help="decode steps a round (default: 30)")
    parser.add_argument("--chunk", type=int, default=4, help="prompts a step takes (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after one that is dropped (default: 3)")
    return parser


if __name__ == "__main__":
    main()
