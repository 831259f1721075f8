"""Texts for users: seeded, plain words, of about a token each in any vocabulary; no tokenizer is needed.

For users whose load need not be equal to the token; `client.make_prompts` is for comparisons.
"""

from __future__ import annotations

import random

WORDS = (
    "the", "old", "ship", "came", "home", "with", "a", "cold", "wind", "and", "nobody", "knew", "what", "was", "in",
    "it", "but", "all", "night", "they", "had", "seen", "light", "on", "water", "far", "from", "land", "one", "man",
    "said", "that", "she", "would", "not", "be", "there", "before", "day", "so", "we", "went", "down", "to", "look",
    "at", "her",
)  # fmt: skip


class Texts:
    """Prompts of one user: the same for the same seed and number."""

    def __init__(self, seed: int, number: int) -> None:
        self._draw = random.Random(f"{seed}/{number}")
        self._shared = random.Random(f"{seed}/shared")  # the same for all users of a run

    def words(self, count: int) -> str:
        """So many words, another text at each call."""
        return " ".join(self._draw.choices(WORDS, k=count))

    def shared(self, count: int) -> str:
        """So many words, the same for every user and call of a run."""
        state = self._shared.getstate()
        text = " ".join(self._shared.choices(WORDS, k=count))
        self._shared.setstate(state)
        return text

    def tokens(self, most: int) -> int:
        """Length of an answer: between half of `most` and `most`."""
        return self._draw.randint(max(1, most // 2), most)
