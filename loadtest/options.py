"""Options of the users, beside locust's own: each a flag, a variable LOADTEST_..., and a field on locust's page."""

from __future__ import annotations

from typing import Any

SHAPES = ("constant", "ramp", "step", "soak")


def add_options(parser: Any) -> None:
    """Add them to locust's parser, which is an argparse parser that also takes env_var and is_secret."""

    def add(flag: str, default: Any, help: str, **more: Any) -> None:
        kind = {} if default is None else {"type": type(default)}
        name = "LOADTEST_" + flag.removeprefix("--").upper().replace("-", "_")
        parser.add_argument(flag, env_var=name, default=default, help=help, **kind, **more)

    add("--shape", "constant", "how many users when: constant, ramp, step, soak", choices=SHAPES)
    add("--steps", 5, "of the shape step")
    add("--model-name", "", "of requests (default: the first of /v1/models)")
    add("--bearer", "", "API key", is_secret=True)
    add("--new-tokens", 64, "of an answer at most; chats and completions ask for half to all of it")
    add("--prompt-words", 40, "of chats, completions and bursts")
    add("--long-words", 400, "of long prompts")
    add("--shared-words", 200, "that all users of a shared prefix begin with")
    add("--burst-size", 4, "requests that a burst sends at once")
    add("--leave-after", 3, "pieces of text after which a disconnecting user hangs up")
    add("--think-s", 0.0, "seconds that a user waits between requests, on average")
    add("--most-retry-s", 10.0, "seconds that a refused user waits at most, whatever Retry-After says")
    add("--load-seed", 0, "of all texts")
    add("--ignore-eos", "auto", "let answers go on to their length", choices=("auto", "on", "off"))
