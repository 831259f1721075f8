"""The server with a fault built in: `SOAK_FAULT=kernel:40 python -m tests.soak.faulty_server --model ...`.

Only the cause is put in, at the step named, where it would arise; how the server takes it is its own.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import torch

from server.cli import main
from server.core import ScheduledBatch, StepTimes
from server.engine import runner as runner_module
from server.engine.loop import EngineLoop
from server.model.llama import Llama


def serving() -> bool:
    """Whether this is the engine's thread: start-up runs steps too, on its own."""
    return threading.current_thread().name == "engine-loop"


def install(kind: str, step: int) -> None:
    """Let `step` (counted from the first of the loop) fail in this way."""
    count = 0

    if kind in ("kernel", "memory"):
        launch = runner_module.ModelRunner.launch

        def failing(self: Any, batch: ScheduledBatch, times: StepTimes) -> Any:
            nonlocal count
            count += serving()
            if count == step and kind == "kernel":
                raise RuntimeError("soak: the kernel failed")
            if count == step:
                raise torch.cuda.OutOfMemoryError("soak: CUDA out of memory")
            return launch(self, batch, times)

        runner_module.ModelRunner.launch = failing  # type: ignore[method-assign]
    elif kind == "nan":
        logits = Llama.logits

        def broken(self: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += serving()
            found = logits(self, *arguments, **named)
            if count >= step:
                found[0] = float("nan")
            return found

        Llama.logits = broken  # type: ignore[method-assign]
    elif kind == "thread":
        turn = EngineLoop._turn

        def dying(self: Any) -> None:
            nonlocal count
            count += self._launched is not None or bool(self.scheduler.running)
            if count == step:
                raise SystemExit  # a thread ends without a word
            turn(self)

        EngineLoop._turn = dying  # type: ignore[method-assign]
    else:
        raise ValueError(f"no such fault: {kind}")


if __name__ == "__main__":
    named, _, at = os.environ["SOAK_FAULT"].partition(":")
    install(named, int(at))
    sys.exit(main())
