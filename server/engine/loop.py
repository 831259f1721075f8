"""The engine's thread: inbox -> schedule -> launch -> publish the step before -> result -> commit, turn after turn.

Where the runner can, the loop runs ahead: result and commit are those of the step launched a turn before, so that the
device has its next step before the host knows the tokens of the last. Whether the scheduler can follow, it says itself.

The tokens of a step are published when the next one has been launched: the event loop turns them into text and bytes
while the device, or native code that needs no interpreter lock, works. With nothing to launch they leave at once.

Not asyncio and not HTTP. It is the only code that touches the scheduler after `start`. A step that raises ends every
live sequence with an error and the loop with it: the process is then unhealthy and says so, instead of limping on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from server.core import FinishReason, SampledToken, ScheduledBatch, Sequence, StepOutput, StepTimes
from server.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

FAILED = "the engine failed while this request ran; the server's log has the cause"
NOT_FINITE = "the model's logits for this request are not finite; send another prompt, or try --dtype float32"
IDLE_TURN_S = 1.0  # an idle loop still turns, so that its age shows whether the thread lives

OnStep = Callable[[int, float, StepTimes], None]  # tokens and seconds of a step, and their split, for metrics


class PendingStep(Protocol):
    """A step on its way."""

    def result(self) -> list[SampledToken]:
        """Wait for the step: a token for each work that samples, then one for each of its guesses. Called once."""
        ...


class Runner(Protocol):
    """What computes a batch. `server.engine.runner.ModelRunner`, or a fake one in tests and benchmarks."""

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the result of the one before it has been asked for."""
        ...

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> PendingStep:
        """Begin a step, without waiting for it where the device runs by itself; fill in `times` by `result`.

        A runner without such a device computes in `result`, so that what is published meanwhile is not held up.
        """
        ...


@dataclass(slots=True)
class _Launched:
    """A step whose result has not been asked for."""

    batch: ScheduledBatch
    pending: PendingStep
    times: StepTimes
    started_s: float  # of its turn, monotonic


class EngineLoop:
    """Owns scheduler and runner; `add` and `abort` may be called from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        on_step: OnStep | None = None,
        check_every_step: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.alive = False
        self.last_turn_s = time.monotonic()
        self._runner = runner
        self._on_step = on_step
        self._check_every_step = check_every_step
        self._inbox: deque[tuple[str, Sequence]] = deque()
        self._num_unread = 0  # added, not yet in the scheduler
        self._wake = threading.Condition()
        self._stopping = False
        self._failed = False
        self._thread: threading.Thread | None = None
        self._publish: Callable[[list[StepOutput]], None] = lambda outputs: None
        self._outputs: list[StepOutput] = []  # not yet published
        self._launched: _Launched | None = None  # a turn ago
        self._landed_s = 0.0  # when the last step was booked, monotonic
        self._next_deadline_s = math.inf  # no live sequence has an earlier one

    @property
    def num_running(self) -> int:
        """Sequences admitted and not ended."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences accepted and not yet running."""
        return len(self.scheduler.queue.waiting) + self._num_unread

    def start(self, publish: Callable[[list[StepOutput]], None]) -> None:
        """Start the thread; `publish` is called on it once per step with the step's outputs."""
        self._publish = publish
        self.alive = True
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in progress."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def release(self) -> None:
        """After `stop`: let go of the runner and of a step it has not finished, whoever still holds this loop."""
        del self._runner
        self._launched = None

    def add(self, sequence: Sequence) -> None:
        """Accept a sequence."""
        self._send("add", sequence)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence before the next step; nothing if it has ended."""
        self._send("abort", sequence)

    def estimate_wait_s(self) -> int:
        """Seconds until a place in the queue is likely to be free, for Retry-After."""
        return max(1, min(60, round(self.scheduler.service_s * (self.num_waiting + 1) / max(1, self.num_running))))

    def _send(self, what: str, sequence: Sequence) -> None:
        with self._wake:
            if not self._failed:
                self._inbox.append((what, sequence))
                self._num_unread += what == "add"
                self._wake.notify()
                return
        if what == "add":  # the loop died after the caller looked
            self._publish([_failure(sequence)])

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._flush()
        except BaseException:  # a thread that just ends would leave every client waiting
            batch = [s.request_id for s in self.scheduler.running]
            logger.exception("engine step failed; requests running: %s", batch)
            self.alive = False
            self._fail_all()
        finally:
            self.alive = False

    def _turn(self) -> None:
        self._read_inbox()
        started = time.monotonic()
        if started >= self._next_deadline_s:
            self._expire(started)
        batch = self.scheduler.schedule(started)
        before, self._launched = self._launched, None if batch is None else self._launch(batch, started)
        publishing_s = time.monotonic()
        self._flush()
        if self._launched is not None:
            self._launched.times.publish = time.monotonic() - publishing_s
        if before is not None:
            self._land(before)
        elif self._launched is None:
            self._rest()
        if self._launched is not None and not self._runner.runs_ahead:
            self._land(self._launched)
            self._launched = None
        if self._check_every_step:
            self.scheduler.check()
        self.last_turn_s = time.monotonic()

    def _launch(self, batch: ScheduledBatch, started_s: float) -> _Launched:
        times = StepTimes()
        scheduled_s = time.monotonic()
        times.schedule = scheduled_s - started_s
        return _Launched(batch, self._runner.launch(batch, times), times, started_s)

    def _land(self, step: _Launched) -> None:
        """Wait for a step and book it. Its time counts from its turn's start, or from the end of the step before."""
        sampled = step.pending.result()
        back_s = time.monotonic()
        self._end_unmatched(back_s)
        outputs = self.scheduler.commit(step.batch, sampled, back_s)
        if any(token.broken for token in sampled):
            outputs = self._end_broken(step.batch, sampled, outputs, back_s)
        self._outputs += outputs
        ended_s = time.monotonic()
        step.times.schedule += ended_s - back_s
        if self._on_step is not None:
            self._on_step(step.batch.num_tokens, ended_s - max(step.started_s, self._landed_s), step.times)
        self._landed_s = ended_s

    def _end_unmatched(self, now_s: float) -> None:
        """End sequences that cannot be matched any further, before what was drawn for them is booked."""
        matched = [(s, s.matcher.failure) for s in self.scheduler.flight.bound if s.matcher is not None]
        for sequence, failure in matched:
            if failure is not None:
                sequence.timings.finished_s = now_s
                self.scheduler.end(sequence, FinishReason.GRAMMAR)
                self._outputs.append(
                    StepOutput(sequence.request_id, None, finish_reason=FinishReason.GRAMMAR, error=failure)
                )

    def _end_broken(
        self, batch: ScheduledBatch, sampled: list[SampledToken], outputs: list[StepOutput], now_s: float
    ) -> list[StepOutput]:
        """End the sequences whose logits were not finite; returns the outputs of the others, and those ends."""
        rows = iter(sampled)
        broken = [w.sequence for w in batch.work for _ in range(w.samples + len(w.draft_ids)) if next(rows).broken]
        ended = {output.request_id for output in outputs if output.finish_reason is not None}
        hit = {s.request_id: s for s in broken if s.finish_reason is None or s.request_id in ended}
        for sequence in hit.values():
            if sequence.finish_reason is None:
                self.scheduler.end(sequence, FinishReason.ERROR)
            sequence.timings.finished_s, sequence.finish_reason = now_s, FinishReason.ERROR
        logger.error("logits are not finite; requests ended: %s", list(hit))
        others = [output for output in outputs if output.request_id not in hit]
        return others + [_failure(sequence, NOT_FINITE) for sequence in hit.values()]

    def _flush(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._publish(outputs)

    def _rest(self) -> None:
        with self._wake:
            if not self._inbox and not self._stopping:
                self._wake.wait(IDLE_TURN_S)

    def _read_inbox(self) -> None:
        while self._inbox:
            with self._wake:
                what, sequence = self._inbox.popleft()
                self._num_unread -= what == "add"
                if what == "add":
                    self.scheduler.add(sequence)
            if what == "add" and sequence.deadline_s is not None:
                self._next_deadline_s = min(self._next_deadline_s, sequence.deadline_s)
            if what == "abort" and sequence.finish_reason is None:
                self.scheduler.end(sequence, FinishReason.ABORT)

    def _expire(self, now_s: float) -> None:
        with_deadline = [(s.deadline_s, s) for s in self.scheduler.live() if s.deadline_s is not None]
        for deadline_s, sequence in with_deadline:
            if deadline_s <= now_s:
                sequence.timings.finished_s = now_s
                self.scheduler.end(sequence, FinishReason.DEADLINE)
                self._outputs.append(StepOutput(sequence.request_id, None, finish_reason=FinishReason.DEADLINE))
        self._next_deadline_s = min((d for d, s in with_deadline if s.finish_reason is None), default=math.inf)

    def _fail_all(self) -> None:
        with self._wake:
            added = [sequence for what, sequence in self._inbox if what == "add"]
            self._inbox.clear()
            self._num_unread = 0
            self._failed = True
        failed = [*self.scheduler.clear(), *added]
        for sequence in failed:
            sequence.finish_reason = FinishReason.ERROR
        self._outputs += [_failure(sequence) for sequence in failed]
        self._flush()


def _failure(sequence: Sequence, message: str = FAILED) -> StepOutput:
    return StepOutput(sequence.request_id, None, finish_reason=FinishReason.ERROR, error=message)
