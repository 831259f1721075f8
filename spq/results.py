"""python -m spq.results: compress trained models in every way, measure them alike, write docs/results.md.

Not how a row is measured (`judge`), what is compared (`variants`) and how it is told (`results_page`). Not a test: it
answers what a method is worth at its bytes. Rows go to a file as soon as they are there; a second run goes on from it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from spq.calibrate import bundled_calibration, read_text
from spq.checkpoint import open_model
from spq.errors import ModelFileError, SpqError
from spq.results_page import page
from spq.rows import read_rows
from spq.texts import EvaluationText, wikitext
from spq.trials import TRAINED, Trials
from spq.variants import Setting

CHARACTERS_PER_TOKEN = 8  # more than any of these tokenizers makes of prose: what is beyond is not tokenized
STORY_MARK = "<|endoftext|>\n"
STORY_MODELS = (("stories260K", 512, 32), ("babyllama-1m", 256, 32))  # window, group: 128 divides no width of theirs


@dataclass(frozen=True, slots=True)
class Case:
    """One model with its texts; evaluation and calibration share no passage."""

    name: str
    folder: Path
    calibrated_on: str
    calibration: str
    texts: tuple[EvaluationText, ...]
    setting: Setting


def find_cases(
    models: Path | None, stories: Path | None, books: Path | None, second: EvaluationText | None = None
) -> list[Case]:
    """The known models that are there and have a text. Raises SpqError where none is."""
    repo = Path(__file__).resolve().parents[1]
    more = () if second is None else (second,)
    cases: list[Case] = []
    if books is not None:
        places = [repo / "demo" / "storyteller"] + ([] if models is None else [models / "storyteller"])
        for place in [place for place in places if place.is_dir()][:1]:
            held_out = EvaluationText("held-out books", read_text(books))
            calibration = read_text(bundled_calibration())
            texts = (held_out, *more)
            cases.append(Case("storyteller", place, "demo/calibration.txt", calibration, texts, Setting(256, 64)))
    if models is not None and stories is not None:
        text = read_text(stories).replace(STORY_MARK, "")
        middle = text.index("\n", len(text) // 2) + 1
        for name, window, group in STORY_MODELS:
            if (models / name).is_dir():
                texts = (EvaluationText("TinyStories", text[middle:]), *more)
                half = "the first half of the TinyStories sample (evaluated on the second)"
                cases.append(Case(name, models / name, half, text[:middle], texts, Setting(window, group)))
    if not cases:
        raise ModelFileError(
            "no model with a text: give --models with --stories, or --books with demo/storyteller or --models"
        )
    return cases


def measure(case: Case, arguments: argparse.Namespace) -> None:
    """Fill the file of rows of one model. Raises SpqError."""
    open_model(case.folder).close()
    with tempfile.TemporaryDirectory() as scratch, tqdm(unit="row", desc=case.name, disable=None) as bar:

        def on_row(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        trials = Trials(
            source=case.folder, texts=[beginning(text, arguments.max_tokens) for text in case.texts],
            calibration=case.calibration, setting=case.setting, scratch=Path(scratch),
            rows_file=rows_file(arguments.rows, case), max_tokens=arguments.max_tokens,
            threads=arguments.threads, speed=arguments.speed, on_row=on_row,
        )  # fmt: skip
        endings = [f"{bits}{trained}" for trained in ("", TRAINED) for bits in (8, 4)]
        trials.run([arguments.gptq / f"{case.name}-{ending}" for ending in endings] if arguments.gptq else [])


def beginning(text: EvaluationText, max_tokens: int | None) -> EvaluationText:
    """What can matter of a text of which only `max_tokens` are evaluated: tokenizing all of it for each row is slow."""
    return text if max_tokens is None else EvaluationText(text.name, text.text[: CHARACTERS_PER_TOKEN * max_tokens])


def rows_file(folder: Path, case: Case) -> Path:
    """Where the rows of a model are kept."""
    return folder / f"{case.name}.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m spq.results", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder with stories260K, babyllama-1m and/or storyteller")
    parser.add_argument("--stories", type=Path, help="TinyStories text, for the first two")
    parser.add_argument("--books", type=Path, help="held-out books, for storyteller (or demo/storyteller)")
    parser.add_argument("--wikitext", type=Path, help="folder of WikiText-2: the second text")
    parser.add_argument("--gptq", type=Path, help="folder of checkpoints NAME-8, NAME-4 (benchmarks.gptq_checkpoint)")
    parser.add_argument("--rows", type=Path, required=True, help="folder of measured rows, JSON lines; gone on from")
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: standard output)")
    parser.add_argument("--max-tokens", type=int, help="evaluated tokens per text (default: the whole text)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--speed", action="store_true", help="also tokens/s of our engine (in a clone of the repository)"
    )
    parser.add_argument("--note", default="", help="a sentence for the page, such as the state of the machine")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        second = None if arguments.wikitext is None else wikitext(arguments.wikitext)
        cases = find_cases(arguments.models, arguments.stories, arguments.books, second)
        arguments.rows.mkdir(parents=True, exist_ok=True)
        for case in cases:
            measure(case, arguments)
        told = [
            (case.name, case.calibrated_on, case.setting, read_rows(rows_file(arguments.rows, case))) for case in cases
        ]
    except SpqError as error:
        print(f"spq.results: {error}", file=sys.stderr)
        return 2
    text = page(told, vars(arguments))
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
