"""Guesses the next tokens of a sequence by looking up its last few in its own text (prompt lookup, Saxena 2023).

No model and no torch: texts repeat themselves, most of all code, quotes, tables and edits of what the prompt holds. A
guess costs two or three look-ups in a table that grows with the sequence. Whether a guess is right, the model says: the
scheduler keeps what was drawn at each place, so a guess may cost time but never changes an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.core import Sequence

SIZES = (4, 3, 2)  # tokens that must agree; the longest that was seen before decides


@dataclass(slots=True)
class _Text:
    """What is known of one sequence."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> index behind its latest place
    num_indexed: int = 0  # n-grams that end at or before this index are in `ends`
    limit: int = 0  # tokens worth guessing, as the last guesses went


class NgramDrafter:
    """Guesses up to `max_tokens` tokens. One for all sequences of a scheduler."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._texts: dict[Sequence, _Text] = {}

    def draft(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """The tokens that followed when the sequence's last ones stood there before; at most `max_tokens`, maybe none.

        A guess that runs into the end of the text goes on with itself, as a loop would.
        """
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = _Text(limit=self.max_tokens)
        ids = sequence.token_ids
        self._index(text, ids)
        place = next((end for n in SIZES if (end := text.ends.get(tuple(ids[-n:])))), None)
        if place is None:
            return []
        guess: list[int] = []
        for source in range(place, place + min(max_tokens, text.limit)):
            guess.append(ids[source] if source < len(ids) else guess[source - len(ids)])
        return guess

    def note(self, sequence: Sequence, num_draft_tokens: int, num_accepted: int) -> None:
        """How a guess went. The next one is twice as long after one that was right, else as long as this one was right.

        A wrong guess costs a row of the step each, so a text that does not repeat itself should pay for few.
        """
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted
        right = num_accepted == num_draft_tokens
        limit = 2 * num_draft_tokens if right else max(1, num_accepted)
        self._texts[sequence].limit = min(limit, self.max_tokens)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._texts.pop(sequence, None)

    @staticmethod
    def _index(text: _Text, ids: list[int]) -> None:
        """Enter what has come since the last call; the n-grams at the very end have nothing behind them yet."""
        for end in range(text.num_indexed + 1, len(ids)):
            for n in SIZES:
                if end >= n:
                    text.ends[tuple(ids[end - n : end])] = end
        text.num_indexed = max(text.num_indexed, len(ids) - 1)
