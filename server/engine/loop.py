"""The engine's thread: inbox -> schedule -> run -> commit -> publish, one turn after the other.

Not asyncio and not HTTP. It is the only code that touches the scheduler after `start`. A step that raises ends every
live sequence with an error and the loop with it: the process is then unhealthy and says so, instead of limping on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from server.core import FinishReason, SampledToken, ScheduledBatch, Sequence, StepOutput
from server.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

IDLE_TURN_S = 1.0  # an idle loop still turns, so that its age shows whether the thread lives
SPEED_MEMORY = 0.05  # weight of the newest finished sequence in the running mean of service times


class Runner(Protocol):
    """What computes a batch. `server.engine.runner.ModelRunner`, or a fake one in tests and benchmarks."""

    def run(self, batch: ScheduledBatch) -> list[SampledToken]:
        """One token for each piece of work that samples, in order."""
        ...


class EngineLoop:
    """Owns scheduler and runner; `add` and `abort` may be called from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        on_step: Callable[[int, float], None] | None = None,
        check_every_step: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.alive = False
        self.last_turn_s = time.monotonic()
        self._runner = runner
        self._on_step = on_step  # (tokens, seconds) of each step, for metrics
        self._check_every_step = check_every_step
        self._inbox: deque[tuple[str, Sequence]] = deque()
        self._num_unread = 0  # added, not yet in the scheduler
        self._wake = threading.Condition()
        self._stopping = False
        self._failed = False
        self._thread: threading.Thread | None = None
        self._publish: Callable[[list[StepOutput]], None] = lambda outputs: None
        self._service_s = 1.0  # running mean of a sequence's time from admission to end

    @property
    def num_running(self) -> int:
        """Sequences admitted and not ended."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences accepted and not yet running."""
        return len(self.scheduler.waiting) + self._num_unread

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

    def add(self, sequence: Sequence) -> None:
        """Accept a sequence."""
        self._send("add", sequence)

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence before the next step; nothing if it has ended."""
        self._send("abort", sequence)

    def estimate_wait_s(self) -> int:
        """Seconds until a place in the queue is likely to be free, for Retry-After."""
        return max(1, min(60, round(self._service_s * (self.num_waiting + 1) / max(1, self.num_running))))

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
        except Exception:
            batch = [s.request_id for s in self.scheduler.running]
            logger.exception("engine step failed; requests running: %s", batch)
            self.alive = False
            self._fail_all()
        finally:
            self.alive = False

    def _turn(self) -> None:
        self._read_inbox()
        outputs = self._expire()
        started = time.monotonic()
        batch = self.scheduler.schedule(started)
        if batch is not None:
            sampled = self._runner.run(batch)
            now = time.monotonic()
            outputs += self.scheduler.commit(batch, sampled, now)
            self._note_finished(batch)
            if self._on_step is not None:
                self._on_step(batch.num_tokens, now - started)
        if self._check_every_step:
            self.scheduler.check()
        self.last_turn_s = time.monotonic()
        if outputs:
            self._publish(outputs)
        elif batch is None:
            with self._wake:
                if not self._inbox and not self._stopping:
                    self._wake.wait(IDLE_TURN_S)

    def _read_inbox(self) -> None:
        while True:
            with self._wake:
                if not self._inbox:
                    return
                what, sequence = self._inbox.popleft()
                self._num_unread -= what == "add"
                if what == "add":
                    self.scheduler.add(sequence)
            if what == "abort" and sequence.finish_reason is None:
                self.scheduler.end(sequence, FinishReason.ABORT)

    def _expire(self) -> list[StepOutput]:
        now = time.monotonic()
        late = [s for s in self.scheduler.live() if s.deadline_s is not None and s.deadline_s <= now]
        for sequence in late:
            sequence.timings.finished_s = now
            self.scheduler.end(sequence, FinishReason.DEADLINE)
        return [StepOutput(s.request_id, None, finish_reason=FinishReason.DEADLINE) for s in late]

    def _note_finished(self, batch: ScheduledBatch) -> None:
        for work in batch.work:
            timings = work.sequence.timings
            if timings.finished_s is not None and timings.scheduled_s is not None:
                self._service_s += SPEED_MEMORY * (timings.finished_s - timings.scheduled_s - self._service_s)

    def _fail_all(self) -> None:
        with self._wake:
            added = [sequence for what, sequence in self._inbox if what == "add"]
            self._inbox.clear()
            self._num_unread = 0
            self._failed = True
        failed = [*self.scheduler.live(), *added]
        for sequence in failed:
            sequence.finish_reason = FinishReason.ERROR
            self.scheduler.blocks.release(sequence)
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()
        self._publish([_failure(sequence) for sequence in failed])


def _failure(sequence: Sequence) -> StepOutput:
    message = "the engine failed while this request ran; the server's log has the cause"
    return StepOutput(sequence.request_id, None, finish_reason=FinishReason.ERROR, error=message)
