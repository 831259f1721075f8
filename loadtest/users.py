"""Users that ask as clients do and read the stream: what each asks. `reader` sends, reads and counts.

A class per kind, so that locust picks and weighs them by name: `locust -f loadtest/locustfile.py Chat Burst`, or on its
page with --class-picker. Each waits for its answer before it asks again.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import gevent
from locust import User, task

from loadtest.prompts import Texts
from loadtest.reader import CHAT, COMPLETIONS, Reader

NUMBERS = itertools.count()  # of users of this process: each has texts of its own


class Streaming(User):
    """What all have: a reader and texts."""

    abstract = True

    def on_start(self) -> None:
        """Find the server's model. Raises NoServer, which locust reports, and the user ends."""
        self.options = self.environment.parsed_options
        self.reader = Reader(self.environment, self.host or self.environment.host or "")
        self.texts = Texts(self.options.load_seed, next(NUMBERS))

    def wait_time(self) -> float:
        """Seconds until the next task: exponential, as from independent people."""
        mean = self.environment.parsed_options.think_s
        return random.expovariate(1 / mean) if mean else 0.0

    def completion(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Body of /v1/completions."""
        return {"prompt": prompt, "max_tokens": max_tokens}


class Chat(Streaming):
    """A conversation of three turns; each sends the ones before it again."""

    weight = 4

    @task
    def talk(self) -> None:
        """Three questions and answers."""
        messages = [{"role": "system", "content": "You answer in one sentence."}]
        for _ in range(3):
            messages.append({"role": "user", "content": self.texts.words(self.options.prompt_words)})
            body = {"messages": messages, "max_tokens": self.texts.tokens(self.options.new_tokens)}
            answer = self.reader.ask("chat", CHAT, body)
            if answer is None:
                return
            messages.append({"role": "assistant", "content": answer.text})


class Completion(Streaming):
    """A short prompt of its own."""

    weight = 4

    @task
    def complete(self) -> None:
        """One answer."""
        prompt = self.texts.words(self.options.prompt_words)
        self.reader.ask("completion", COMPLETIONS, self.completion(prompt, self.texts.tokens(self.options.new_tokens)))


class LongPrompt(Streaming):
    """Much to read, little to say: prefill."""

    weight = 1

    @task
    def read(self) -> None:
        """One answer of a quarter of the length."""
        prompt = self.texts.words(self.options.long_words)
        self.reader.ask("long", COMPLETIONS, self.completion(prompt, max(1, self.options.new_tokens // 4)))


class SharedPrefix(Streaming):
    """The same beginning for every user, then words of its own: what a cache of prefixes is for."""

    weight = 1

    @task
    def complete(self) -> None:
        """One answer."""
        prompt = f"{self.texts.shared(self.options.shared_words)} {self.texts.words(8)}"
        self.reader.ask("shared", COMPLETIONS, self.completion(prompt, self.texts.tokens(self.options.new_tokens)))


class Burst(Streaming):
    """Several requests at once, then a pause as long as they took."""

    weight = 1

    @task
    def burst(self) -> None:
        """All answers, and the pause."""
        bodies = [
            self.completion(self.texts.words(self.options.prompt_words), self.texts.tokens(self.options.new_tokens))
            for _ in range(self.options.burst_size)
        ]
        began = gevent.get_hub().loop.now()
        gevent.joinall([gevent.spawn(self.reader.ask, "burst", COMPLETIONS, body) for body in bodies])
        gevent.sleep(max(0.0, gevent.get_hub().loop.now() - began))


class Disconnecting(Streaming):
    """Hangs up in the middle of the answer."""

    weight = 1

    @task
    def leave(self) -> None:
        """A few pieces of a long answer."""
        body = self.completion(self.texts.words(self.options.prompt_words), 4 * self.options.new_tokens)
        self.reader.ask("left", COMPLETIONS, body, leave_after=self.options.leave_after)
