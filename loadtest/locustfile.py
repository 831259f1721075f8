"""`locust -f loadtest/locustfile.py --host http://127.0.0.1:8000`, from the root of the clone: users, shape, summary.

Headless with `--headless -u 16 -r 4 -t 60s`, else with locust's page on port 8089. docs/loadtest.md has the rest.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from locust import LoadTestShape, events

from loadtest.options import add_options
from loadtest.shapes import users_at
from loadtest.tally import Tally, held
from loadtest.users import Burst, Chat, Completion, Disconnecting, LongPrompt, SharedPrefix

__all__ = ["Burst", "Chat", "Completion", "Disconnecting", "LongPrompt", "Shape", "SharedPrefix"]

log = logging.getLogger(__name__)


@events.init_command_line_parser.add_listener
def _(parser: Any) -> None:
    add_options(parser)


@events.test_start.add_listener
def begin(environment: Any, **more: Any) -> None:
    """Look at the server before the load."""
    key = environment.parsed_options.bearer or None
    environment.tally = Tally(time.monotonic(), held(environment.host or "", key))


@events.test_stopping.add_listener
def stopping(environment: Any, **more: Any) -> None:
    """Users end from here on; the time of the run is up to now."""
    environment.stopped_s = time.monotonic()


@events.test_stop.add_listener
def end(environment: Any, **more: Any) -> None:
    """Write the summary."""
    key = environment.parsed_options.bearer or None
    log.info("summary %s", environment.tally.summary(environment.host or "", key, environment.stopped_s))


class Shape(LoadTestShape):
    """--shape over --users, --run-time and --spawn-rate, or the page's fields."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Users that should be there, and how many may come a second; None: it is over."""
        environment: Any = self.runner.environment if self.runner else None
        options = environment.parsed_options
        try:
            users = users_at(
                options.shape, self.get_run_time(), options.run_time, options.num_users or 1, options.steps
            )
        except ValueError as error:
            log.error("%s", error)
            environment.process_exit_code = 2
            return None
        return None if users is None else (users, options.spawn_rate or 1)
