"""Held-out texts as the field joins them: WikiText-2, C4 and plain files. Nothing is fetched or tokenized here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from spq.calibrate import read_text, text_hash
from spq.errors import CalibrationError

WIKITEXT_FILES = ("wiki.test.raw", "wiki.test.tokens", "test.txt")  # the first that is there


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text under the name that tables show."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Which text exactly was scored."""
        return text_hash(self.text)


def plain_text(path: Path) -> EvaluationText:
    """A UTF-8 file as it is, named after the file. Raises CalibrationError."""
    return EvaluationText(path.stem, read_text(path))


def wikitext(folder: Path) -> EvaluationText:
    """The test part of WikiText-2, its lines joined by blank lines as GPTQ's code and most papers do.

    Of the word-level files (not `.raw`) the literal `<unk>` becomes `unk`, which tokenizers take for a word; their
    perplexities are not those of the raw file. Raises CalibrationError.
    """
    for name in WIKITEXT_FILES:
        if (folder / name).is_file():
            lines = read_text(folder / name).splitlines(keepends=True)
            text = "\n\n".join(line if line.strip() else "" for line in lines)
            raw = name.endswith(".raw")
            return EvaluationText(
                "wikitext2-raw" if raw else "wikitext2", text if raw else text.replace("<unk>", "unk")
            )
    raise CalibrationError(f"{folder}: no {', '.join(WIKITEXT_FILES)}; give the folder of WikiText-2")


def c4(path: Path) -> EvaluationText:
    """C4: the `text` of JSON lines, joined by single spaces as GPTQ's code does. Raises CalibrationError."""
    documents: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{path}: line {number} is no JSON object with a text ({error})") from error
    if not documents or not all(isinstance(document, str) for document in documents):
        raise CalibrationError(f"{path}: no documents; give JSON lines with a text each")
    return EvaluationText("c4", " ".join(documents))
