"""Servers taking turns under one load: who starts when, who sleeps, and when a turn counts.

First each server alone, for its memory: started, one burst per level, ended. Servers that map the same file would
share it otherwise. Sampling takes CPU, so nothing is timed here.

Then all together, for their times: all are started and stay resident; the one whose turn it is runs, the others are
stopped (SIGSTOP), so they take memory and no CPU. Turns alternate, A B C A B C, so that drift of the machine meets all
alike. A turn is a warm-up request, then per level one burst of N streams (three in a row at one stream). It waits until
other processes are quiet; where they disturbed it, it is tried again, and marked if that did not help.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks import report
from benchmarks.client import Wave, make_prompts, run_wave
from benchmarks.process import Running, members, read_cpu
from benchmarks.servers import Server

START_LIMIT_S = 900
QUIET_LIMIT_S = 30.0  # how long to wait for other processes before a burst
OPTIONS_OF_SERVERS = ("SPQ_", "LLAMA_", "VLLM_", "OMP_")  # variables that would set what the commands do not say

log = logging.getLogger(__name__)


class Contender:
    """A server with the process that runs it."""

    def __init__(self, server: Server, values: dict[str, str], environment: Mapping[str, str], logs: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.template = server  # without the paths of this machine
        self.server = server.filled(values | {"port": str(self.port)})
        self._environment = {k: v for k, v in environment.items() if not k.startswith(OPTIONS_OF_SERVERS)}
        self._log = logs / f"{server.name}.log"
        self._process: Running | None = None

    def start(self) -> float:
        """Start it and wait until it is ready, which took the seconds returned. Raises NotReady."""
        self._process = Running(self.server.command, self._environment | dict(self.server.env), self._log)
        return self._process.wait_ready(f"http://127.0.0.1:{self.port}{self.server.ready}", START_LIMIT_S)

    def stop(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    @property
    def running(self) -> Running:
        """The process; a start must have come first."""
        assert self._process is not None, f"{self.server.name} was not started"
        return self._process


class Load:
    """The work, equal for all: prompts by seed, so that every server answers the same ones in the same round."""

    def __init__(self, model: Path, prompt_tokens: int, new_tokens: int, max_others: float) -> None:
        self.model, self.prompt_tokens, self.new_tokens, self.max_others = model, prompt_tokens, new_tokens, max_others

    def burst(self, contender: Contender, streams: int, seed: int) -> Wave:
        """One wave, checked: raises UnequalWork."""
        prompts = make_prompts(self.model, streams, self.prompt_tokens, seed)
        extra = dict(contender.server.extra)
        wave = asyncio.run(run_wave(contender.port, prompts, self.new_tokens, extra, contender.server.takes_ids))
        wave.check(self.prompt_tokens)
        return wave

    def turn(self, contender: Contender, streams: int, round_: int, attempt: int) -> report.Turn:
        """A few waves of `streams`, and what others took of the machine meanwhile."""
        seeds = [_seed(round_, streams, attempt, wave) for wave in range(3 if streams == 1 else 1)]
        session = contender.running.session
        wait_for_quiet(session, self.max_others)
        before, own = read_cpu(session), time.process_time()
        waves = [self.burst(contender, streams, seed) for seed in seeds]
        after, own = read_cpu(session), time.process_time() - own
        others = before.cores_of_others(after, own)
        answers = [answer for wave in waves for answer in wave.answers]
        return report.Turn(
            server=contender.server.name,
            streams=streams,
            round=round_,
            tokens_per_s=statistics.median(wave.tokens_per_s for wave in waves),
            ttft_s=[answer.ttft_s for answer in answers],
            itl_s=[gap for answer in answers for gap in answer.gaps_s],
            cpu_s_per_token=(after.tree_s - before.tree_s) / (len(answers) * self.new_tokens),
            others_cores=others,
            noisy=others > self.max_others,
        )


def _seed(round_: int, streams: int, attempt: int, wave: int) -> int:
    """Another for each burst of one server, the same for all servers: no cache holds a prompt that comes."""
    return ((round_ * 1000 + streams) * 100 + attempt) * 10 + wave


def wait_for_quiet(session: int, max_others: float) -> None:
    """Until others took less than `max_others` cores for a second, or for QUIET_LIMIT_S."""
    end = time.monotonic() + QUIET_LIMIT_S
    while time.monotonic() < end:
        before = read_cpu(session)
        time.sleep(1.0)
        if before.cores_of_others(read_cpu(session), 0.0) <= max_others:
            return


def quietest(load: Load, contender: Contender, streams: int, round_: int, attempts: int) -> report.Turn:
    """The first quiet attempt, or else the one that others disturbed least."""
    best: report.Turn | None = None
    for attempt in range(attempts):
        turn = load.turn(contender, streams, round_, attempt)
        if best is None or turn.others_cores < best.others_cores:
            best = turn
        best.discarded = attempt
        if not turn.noisy:
            break
    assert best is not None
    return best


def measure_memory(contender: Contender, load: Load, levels: list[int]) -> report.Memory:
    """Peaks of one server alone, from its start to the end of a burst per level."""
    try:
        if contender.server.prepares:
            contender.start()
            contender.stop()
        ready_s = contender.start()
        with contender.running.sampling():
            for streams in levels:
                load.burst(contender, streams, _seed(0, streams, 0, 0))
        return report.Memory(*contender.running.peak_bytes(), len(members(contender.running.session)), ready_s)
    finally:
        contender.stop()


def compare(
    contenders: list[Contender], load: Load, levels: list[int], rounds: int, attempts: int
) -> list[report.Turn]:
    """All turns of all rounds. Whatever happens, all servers are ended."""
    turns: list[report.Turn] = []
    try:
        for contender in contenders:
            contender.start()
            load.burst(contender, max(levels), _seed(0, 0, 0, 0))
            contender.running.sleep()
        for round_ in range(1, rounds + 1):
            for contender in contenders:
                contender.running.wake()
                load.burst(contender, 1, _seed(round_, 0, 0, 0))
                for streams in levels:
                    turns.append(turn := quietest(load, contender, streams, round_, attempts))
                    log.info(
                        "round %d: %s at %d: %.1f tokens/s, others took %.2f cores%s",
                        round_, turn.server, streams, turn.tokens_per_s, turn.others_cores,
                        ", noisy" if turn.noisy else "",
                    )  # fmt: skip
                contender.running.sleep()
    finally:
        for contender in contenders:
            contender.stop()
    return turns
