"""`python -m benchmarks.engine`: what one engine step costs beside the model, with a runner that answers at once.

Full decode batches, phase by phase: schedule, prepare (the step's tensors), commit, publish, and the whole turn of the
loop with its metrics. Then steps a second with a made up device that takes `--device-ms` a step, in plain order and
running ahead: what of the host's time the device waits for. Times are medians over steps, on one thread; the spread is
the 10th and 90th percentile. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from server.core import SampledToken, SamplingParams, ScheduledBatch, Sequence, StepOutput, StepTimes, Timings
from server.engine import inputs
from server.engine.loop import EngineLoop
from server.metrics import Metrics
from server.scheduler.blocks import BlockManager
from server.scheduler.scheduler import Scheduler

BLOCK_SIZE = 16
WARM_STEPS = 20


class InstantRunner:
    """Draws the same token at once, and counts the time since it was last called: a turn without the model."""

    runs_ahead = False

    def __init__(self) -> None:
        self.turns_s: list[float] = []
        self._left_s: float | None = None

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> InstantRunner:
        """Keep the batch."""
        self._batch = batch
        return self

    def result(self) -> list[SampledToken]:
        """One token per sampling work."""
        if self._left_s is not None:
            self.turns_s.append(time.perf_counter() - self._left_s)
        tokens = [SampledToken(100) for work in self._batch.work if work.samples]
        self._left_s = time.perf_counter()
        return tokens


class Device:
    """Takes a fixed time a step, beside the host and one step after the other; inputs are prepared as for a GPU."""

    def __init__(self, step_s: float, runs_ahead: bool) -> None:
        self.runs_ahead = runs_ahead
        self.ends_s: list[float] = []
        self._step_s = step_s
        self._free_s = 0.0  # when the device has done all it was given
        self._tables = inputs.PageTables()

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> DeviceStep:
        """Prepare, and hand over."""
        inputs.to_device(inputs.collect(batch, BLOCK_SIZE, self._tables), BLOCK_SIZE, torch.device("cpu"))
        self._free_s = max(self._free_s, time.perf_counter()) + self._step_s
        return DeviceStep(self, len(batch.work), self._free_s)


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step of it."""

    device: Device
    num_tokens: int
    due_s: float

    def result(self) -> list[SampledToken]:
        """Wait for its end."""
        time.sleep(max(0.0, self.due_s - time.perf_counter()))
        self.device.ends_s.append(time.perf_counter())
        return [SampledToken(100) for _ in range(self.num_tokens)]


def make_scheduler(num_seqs: int, prompt: int, steps: int, prefix_caching: bool) -> Scheduler:
    """All sequences running, each about to decode, with room for `steps` steps."""
    pages = -(-(prompt + steps + 1) // BLOCK_SIZE)
    scheduler = Scheduler(
        BlockManager(num_seqs * pages, BLOCK_SIZE, prefix_caching),
        max_num_seqs=num_seqs,
        max_batch_tokens=num_seqs * (prompt + 1),
        max_model_len=prompt + steps + 1,
        admission_reserve=0.3,
    )
    for i in range(num_seqs):
        ids = [i, *range(1000, 1000 + prompt - 1)]
        params = SamplingParams(max_tokens=steps, temperature=0.0, eos_token_ids=frozenset({2}))
        scheduler.add(Sequence(f"request-{i}", ids, prompt, params, Timings(0.0)))
    step(scheduler)
    assert len(scheduler.running) == num_seqs
    return scheduler


def step(scheduler: Scheduler) -> None:
    """One step outside the clock."""
    batch = scheduler.schedule(0.0)
    assert batch is not None
    scheduler.commit(batch, [SampledToken(100) for _ in batch.work], 0.0)


def time_phases(scheduler: Scheduler, steps: int) -> dict[str, list[float]]:
    """Seconds of each phase over `steps` decode steps, the calls made by hand."""
    device = torch.device("cpu")
    seconds: dict[str, list[float]] = {"schedule": [], "prepare": [], "commit": []}
    tables = inputs.PageTables()

    def prepare(batch: ScheduledBatch) -> object:
        return inputs.to_device(inputs.collect(batch, BLOCK_SIZE, tables), BLOCK_SIZE, device)

    def timed(phase: str, call: Callable[[], object]) -> object:
        started = time.perf_counter()
        result = call()
        seconds[phase].append(time.perf_counter() - started)
        return result

    for _ in range(steps):
        batch = timed("schedule", lambda: scheduler.schedule(0.0))
        assert isinstance(batch, ScheduledBatch)
        timed("prepare", lambda b=batch: prepare(b))  # type: ignore[misc]
        sampled = [SampledToken(100) for _ in batch.work]
        timed("commit", lambda b=batch, s=sampled: scheduler.commit(b, s, 0.0))  # type: ignore[misc]
    return seconds


def time_turns(scheduler: Scheduler, steps: int) -> list[float]:
    """Seconds of a whole turn of the real loop but for the runner; outputs are published to nobody."""
    runner = InstantRunner()
    loop = EngineLoop(scheduler, runner, on_step=Metrics("none").step)
    published: list[list[StepOutput]] = []
    loop.start(published.append)
    while len(runner.turns_s) < steps and loop.alive:
        time.sleep(0.02)
    loop.stop()
    return runner.turns_s[:steps]


def time_device(scheduler: Scheduler, steps: int, step_s: float, runs_ahead: bool) -> list[float]:
    """Seconds between the ends of steps of a made up device."""
    device = Device(step_s, runs_ahead)
    loop = EngineLoop(scheduler, device, on_step=Metrics("none").step)
    published: list[list[StepOutput]] = []
    loop.start(published.append)
    while len(device.ends_s) <= steps and loop.alive:
        time.sleep(0.02)
    loop.stop()
    return [b - a for a, b in pairwise(device.ends_s[: steps + 1])]


def main() -> None:
    """Measure and print a table, then JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", default="1,64,256", help="running sequences (default: 1,64,256)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400, help="steps timed (default: 400)")
    parser.add_argument("--device-ms", type=float, default=3.0, help="a step of the made up device (default: 3)")
    parser.add_argument("--prefix-caching", default="on", choices=("on", "off"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    caching = arguments.prefix_caching == "on"
    rows = []
    for count in map(int, arguments.sequences.split(",")):
        length = 2 * (arguments.steps + WARM_STEPS)
        scheduler = make_scheduler(count, arguments.prompt_tokens, length, caching)
        for _ in range(WARM_STEPS):
            step(scheduler)
        phases = time_phases(scheduler, arguments.steps)
        phases["scheduler"] = [a + b for a, b in zip(phases["schedule"], phases["commit"], strict=True)]
        phases["turn"] = time_turns(make_scheduler(count, arguments.prompt_tokens, length, caching), arguments.steps)
        for name, ahead in (("device", False), ("ahead", True)):
            scheduler = make_scheduler(count, arguments.prompt_tokens, length, caching)
            phases[name] = time_device(scheduler, arguments.steps, arguments.device_ms / 1e3, ahead)
        for phase, seconds in phases.items():
            tenths = statistics.quantiles(seconds, n=10)
            row = {"sequences": count, "phase": phase, "median_ms": 1e3 * statistics.median(seconds),
                   "p10_ms": 1e3 * tenths[0], "p90_ms": 1e3 * tenths[-1]}  # fmt: skip
            rows.append(row)
            print(f"{count:4} sequences  {phase:10} {row['median_ms']:7.3f} ms "
                  f"[{row['p10_ms']:.3f}..{row['p90_ms']:.3f}]")  # fmt: skip
    print(json.dumps({"options": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
