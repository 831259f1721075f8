"""Servers taking turns under one load: who starts when, who sleeps, and when a turn counts.

First each server that is started here alone, for its memory: started, one burst per level, ended. Servers that map the
same file would share it otherwise. Sampling takes CPU, so nothing is timed here.

Then their times, in alternating turns, A B C A B C, so that drift of the machine meets all alike. On a CPU all are
resident; the one whose turn it is runs, the others are stopped (SIGSTOP), so they take memory and no CPU. `alone`, as
on a GPU, which servers must not share, each is started for its turn and ended after it. A turn is a warm-up, then per
level a burst of N streams, or three of one. It waits until other processes are quiet; where they disturbed it, it is
tried again, and marked if that did not help. Of a server started elsewhere neither its CPU nor others' is known.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from loadtest import discover
from loadtest.client import SAMPLING, Prompt, Wave, make_prompts, run_wave
from loadtest.contender import Contender
from loadtest.device import gpu_bytes
from loadtest.process import members, pss_by_kind, read_cpu
from loadtest.turns import BIN_S, Memory, Turn, Work

QUIET_LIMIT_S = 30.0  # how long to wait for other processes before a burst
COUNTERS_LIMIT_S = 2.0  # until a server's /metrics has counted what it has sent
CACHE_HITS = ("vllm:prefix_cache_hits_total", "")  # ours has vLLM's names
GENERATED = ("vllm:generation_tokens_total", "")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """The work, equal for all: prompts by seed, so that every server answers the same ones in the same round."""

    model: Path  # a folder with tokenizer.json, to choose words that are one token each
    prompt_tokens: int
    new_tokens: int
    max_others: float  # cores
    any_chunks: bool = False  # let several tokens come in one chunk

    def prompts(self, streams: int, seed: int) -> list[Prompt]:
        """Those of one burst."""
        return make_prompts(self.model, streams, self.prompt_tokens, seed)

    def burst(self, contender: Contender, prompts: list[Prompt]) -> Wave:
        """One wave, checked: raises UnequalWork."""
        server = contender.server
        wave = asyncio.run(
            run_wave(
                contender.port, prompts, self.new_tokens, dict(server.extra), server.takes_ids,
                host=contender.host, api_key=contender.api_key,
            )
        )  # fmt: skip
        if self.any_chunks:
            wave.check_sizes(self.prompt_tokens)
        else:
            wave.check(self.prompt_tokens)
        return wave

    def turn(self, contender: Contender, streams: int, round_: int, attempt: int) -> Turn:
        """A few waves of `streams`, and what others took of the machine meanwhile."""
        seeds = [_seed(round_, streams, attempt, wave) for wave in range(3 if streams == 1 else 1)]
        asked = [self.prompts(streams, seed) for seed in seeds]
        session = contender.session
        if session is not None:
            wait_for_quiet(session, self.max_others)
        counted = contender.metrics()
        before, own = (None if session is None else read_cpu(session)), time.process_time()
        waves = [self.burst(contender, prompts) for prompts in asked]
        after, own = (None if session is None else read_cpu(session)), time.process_time() - own
        work = _work(waves, seeds, asked, counted, contender)
        others = None if before is None or after is None else before.cores_of_others(after, own)
        cpu = None if before is None or after is None else (after.tree_s - before.tree_s) / work.new_tokens
        answers = [answer for wave in waves for answer in wave.answers]
        return Turn(
            server=contender.server.name,
            streams=streams,
            round=round_,
            tokens_per_s=statistics.median(wave.tokens_per_s for wave in waves),
            ttft_s=[answer.ttft_s for answer in answers],
            itl_s=[gap for answer in answers for gap in answer.gaps_s],
            cpu_s_per_token=cpu,
            others_cores=others,
            noisy=others is not None and others > self.max_others,
            work=work,
            arrivals=_arrivals(waves),
        )


def _work(
    waves: list[Wave], seeds: list[int], asked: list[list[Prompt]], before: discover.Samples, contender: Contender
) -> Work:
    answers = [answer for wave in waves for answer in wave.answers]
    new_tokens = sum(answer.completion_tokens or 0 for answer in answers)
    digest = hashlib.sha256("\0".join(prompt.text for prompts in asked for prompt in prompts).encode())

    def grown(key: tuple[str, str]) -> int | None:
        return int(after[key] - before.get(key, 0.0)) if key in after else None

    end = time.monotonic() + COUNTERS_LIMIT_S
    after = contender.metrics()
    while (grown(GENERATED) or new_tokens) < new_tokens and time.monotonic() < end:
        time.sleep(0.05)
        after = contender.metrics()
    return Work(
        seeds=seeds,
        prompts=digest.hexdigest()[:16],
        sampling=dict(SAMPLING),
        requests=len(answers),
        prompt_tokens=sum(answer.prompt_tokens or 0 for answer in answers),
        new_tokens=new_tokens,
        finish_reasons=sorted({answer.finish_reason for answer in answers}, key=str),
        cached_tokens=grown(CACHE_HITS),
        counted_tokens=grown(GENERATED),
    )


def _arrivals(waves: list[Wave]) -> list[int]:
    """Chunks per BIN_S, over the waves one after the other."""
    times: list[float] = []
    offset = 0.0
    for wave in waves:
        times += [offset + t for answer in wave.answers for t in accumulate((answer.ttft_s, *answer.gaps_s))]
        offset += wave.spent_s
    bins = [0] * (int(max(times, default=0.0) / BIN_S) + 1)
    for t in times:
        bins[int(t / BIN_S)] += 1
    return bins


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


def quietest(load: Load, contender: Contender, streams: int, round_: int, attempts: int) -> Turn:
    """The first quiet attempt, or else the one that others disturbed least."""
    best: Turn | None = None
    for attempt in range(attempts):
        turn = load.turn(contender, streams, round_, attempt)
        if best is None or (turn.others_cores or 0.0) < (best.others_cores or 0.0):
            best = turn
        best.discarded = attempt
        if not turn.noisy:
            break
    assert best is not None
    return best


def measure_memory(contender: Contender, load: Load, levels: list[int]) -> Memory:
    """Peaks of one server alone, from its start to the end of a burst per level. It must be ours to start."""
    try:
        if contender.server.prepares:
            contender.start()
            contender.stop()
        idle = gpu_bytes()
        ready_s = contender.start()
        with contender.running.sampling():
            for streams in levels:
                load.burst(contender, load.prompts(streams, _seed(0, streams, 0, 0)))
        pids = members(contender.running.session)
        used = gpu_bytes()
        return Memory(
            *contender.running.peak_bytes(),
            processes=len(pids),
            ready_s=ready_s,
            device_bytes=None if used is None or idle is None else max(0, used - idle),
            kinds=pss_by_kind(pids),
            ledger=discover.memory_ledger(contender.metrics()),
        )
    finally:
        contender.stop()


def given_memory(contender: Contender, read_bytes: int | None) -> Memory:
    """What can be known of a server that runs elsewhere: the GPU as a whole or as someone read it; its own ledger."""
    used = gpu_bytes() if read_bytes is None else read_bytes
    return Memory(0, 0, 0, 0.0, used, {}, discover.memory_ledger(contender.metrics()))


def compare(
    contenders: list[Contender], load: Load, levels: list[int], rounds: list[int], attempts: int, alone: bool
) -> Iterator[Turn]:
    """All turns of all rounds, as they are made. Whatever happens, all servers started here are ended."""
    try:
        for contender in [] if alone else contenders:
            contender.start()
            load.burst(contender, load.prompts(max(levels), _seed(0, 0, 0, 0)))
            contender.sleep()
        for round_ in rounds:
            for contender in contenders:
                if alone:
                    contender.start()
                    load.burst(contender, load.prompts(max(levels), _seed(0, 0, 0, 0)))
                contender.wake()
                load.burst(contender, load.prompts(1, _seed(round_, 0, 0, 0)))
                for streams in levels:
                    turn = quietest(load, contender, streams, round_, attempts)
                    log.info(
                        "round %d: %s at %d: %.1f tokens/s, others took %.2f cores%s",
                        round_, turn.server, streams, turn.tokens_per_s, turn.others_cores or 0.0,
                        ", noisy" if turn.noisy else "",
                    )  # fmt: skip
                    yield turn
                if alone:
                    contender.stop()
                else:
                    contender.sleep()
    finally:
        for contender in contenders:
            contender.stop()
