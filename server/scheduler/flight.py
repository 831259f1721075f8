"""Steps that are launched and not yet booked: what is taken for granted of them, and what of them is dropped.

Not the decision to schedule ahead of them (`Scheduler.schedule`). While a step runs, the next one is scheduled as if it
had ended: each sequence has computed its piece, and where a token is being drawn, -1 - row stands in its place, row of
what that step draws. The device puts the token there (`server.engine.inputs.resolve`), the host learns it a step later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.core import ScheduledBatch, Sequence


@dataclass(slots=True)
class Step:
    """One step on its way."""

    batch: ScheduledBatch
    assumed: bool = False  # its sequences stand as after it, but for the ids of the tokens drawn
    dropped: set[Sequence] = field(default_factory=set)  # what it computes of them is not wanted any more

    def leaving(self) -> list[Sequence]:
        """Sequences that have ended since its launch and hold their pages until it lands."""
        return [sequence for sequence in self.dropped if sequence.finish_reason is not None]


class StepsInFlight:
    """The launched steps, in order: one in plain order, two while the loop runs ahead and the first is about to land.

    The pages of a sequence that ends stay its own until the steps launched before have landed, since they may write to
    them.
    """

    def __init__(self) -> None:
        self.bound: set[Sequence] = set()  # running sequences whose next step needs what this one brings to the host
        self._steps: deque[Step] = deque()

    def __bool__(self) -> bool:
        return bool(self._steps)

    def depart(self, batch: ScheduledBatch) -> ScheduledBatch:
        """A step that is launched now; returns it."""
        self._steps.append(Step(batch))
        return batch

    def land(self, batch: ScheduledBatch) -> Step:
        """The oldest step, which must be this one, has come back."""
        step = self._steps.popleft()
        assert step.batch is batch, "steps land in the order of their launch"
        return step

    def assume(self) -> None:
        """Let the sequences of the one step in flight stand as after it."""
        [step] = self._steps
        step.assumed = True
        row = -1
        for work in step.batch.work:
            sequence = work.sequence
            if sequence not in step.dropped:
                sequence.num_computed_tokens += work.num_tokens
                if work.samples:
                    sequence.token_ids.append(row)
            row -= work.samples

    def drop(self, sequence: Sequence) -> bool:
        """A sequence ends: whether a step is in flight, with whose landing its pages have to wait."""
        self.bound.discard(sequence)
        if self._steps:
            self._steps[-1].dropped.add(sequence)
        return bool(self._steps)

    def rerun(self, sequence: Sequence) -> None:
        """Undo the newest token, which was not drawn: the next step runs the one before it again, in plain order.

        What was launched behind it is void.
        """
        sequence.token_ids.pop()
        sequence.num_computed_tokens -= 1
        self.bound.add(sequence)
        self._steps[-1].dropped.add(sequence)

    def leaving(self) -> Iterator[Sequence]:
        """Sequences that have ended and still hold pages."""
        for step in self._steps:
            yield from step.leaving()

    def clear(self) -> None:
        """Forget all."""
        self.bound.clear()
        self._steps.clear()
