"""python -m spq.results: compress real models in several ways, measure them on held-out text, write a Markdown table.

Not a test and not a benchmark of speed: it answers one question, whether SVD and pruning pay once int8 is there.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from transformers.utils import logging as transformers_logging

from spq.calibrate import bundled_calibration, read_text
from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import ModelFileError, SpqError
from spq.evaluate import Perplexity, evaluate_folder
from spq.report import Report

MIB = 1 << 20
STORY_MARK = "<|endoftext|>\n"
INT8, DEFAULT, PAPER8 = "int8 alone", "default (SPQ)", "paper rules, int8 embedding"
VARIANTS: dict[str, SPQConfig] = {
    INT8: SPQConfig.preset("int8"),
    "int8 + SVD": SPQConfig.preset("default", max_prune_ratio=0.0),
    "int8 + pruning": SPQConfig.preset("default", variance_threshold=1.0),
    DEFAULT: SPQConfig.preset("default"),
    "paper rules": SPQConfig.preset("paper"),
    PAPER8: SPQConfig.preset("paper", quantize_embedding=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One model with its texts; evaluation and calibration share no passage."""

    name: str
    folder: Path
    text_name: str
    calibration: str
    evaluation: str
    window: int


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    variant: str
    nbytes: int
    ratio: float  # to float16
    perplexity: float
    num_low_rank: int
    num_pruned: int
    seconds: float | None  # of compressing


def find_cases(models: Path | None, stories: Path | None, books: Path | None) -> list[Case]:
    """The known models that are there and have a text. Raises SpqError where none is."""
    repo = Path(__file__).resolve().parents[1]
    cases: list[Case] = []
    if models is not None and stories is not None:
        text = read_text(stories).replace(STORY_MARK, "")
        middle = text.index("\n", len(text) // 2) + 1
        for name, window in (("stories260K", 512), ("babyllama-1m", 256)):
            if (models / name).is_dir():
                text_name = "TinyStories sample: calibrated on its first half, evaluated on its second"
                cases.append(Case(name, models / name, text_name, text[:middle], text[middle:], window))
    if books is not None:
        places = [repo / "demo" / "storyteller"] + ([] if models is None else [models / "storyteller"])
        found = [place for place in places if place.is_dir()]
        if found:
            text_name = "calibrated on demo/calibration.txt, evaluated on books that are neither in it nor in training"
            cases.append(
                Case("storyteller", found[0], text_name, read_text(bundled_calibration()), read_text(books), 256)
            )
    if not cases:
        raise ModelFileError(
            "no model with a text: give --models with --stories, or --books with demo/storyteller or --models"
        )
    return cases


def measure(case: Case, max_tokens: int | None) -> tuple[list[Row], Perplexity]:
    """Rows of one model, float16 first, and the evaluation protocol."""
    device = torch.device("cpu")

    def evaluated(folder: Path) -> Perplexity:
        return evaluate_folder(
            folder,
            case.evaluation,
            device=device,
            stored_dtype=torch.float16 if folder == case.folder else None,
            window=case.window,
            max_tokens=max_tokens,
        )

    base = evaluated(case.folder)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (variant, options) in enumerate(VARIANTS.items()):
            started_s = time.monotonic()
            out = Path(scratch) / str(number)
            report: Report = compress(case.folder, out, options, calibration_text=case.calibration, device=device)
            seconds = time.monotonic() - started_s
            if not rows:
                rows.append(Row("float16", report.bytes_fp16, 1.0, base.value, 0, 0, None))
            rows.append(
                Row(
                    variant,
                    report.bytes_packed,
                    report.ratio,
                    evaluated(out).value,
                    report.num_low_rank,
                    report.num_pruned_neurons,
                    seconds,
                )
            )
    return rows, base


def verdict(rows: Sequence[Row]) -> str:
    """Whether SVD and pruning pay against int8 alone, from the rows.

    A variant pays where its bytes fall by a larger share than its perplexity rises; one with no fewer bytes than int8
    cannot pay.
    """
    by_name = {row.variant: row for row in rows}
    base, int8 = by_name["float16"], by_name[INT8]
    parts = [
        f"int8 alone takes {int8.ratio:.1%} of float16 for {_change(int8.perplexity, base.perplexity)} perplexity."
    ]
    for row in rows[2:]:
        parts.append(
            f"{row.variant}: {_change(row.nbytes, int8.nbytes)} bytes and "
            f"{_change(row.perplexity, int8.perplexity)} perplexity against int8 alone: {_outcome(row, int8)}."
        )
    together = _outcome(by_name[DEFAULT], int8)
    answer = {"pays": "pay", "does not pay": "do not pay", "changes nothing": "change nothing"}.get(together, together)
    return " ".join([*parts, f"SVD and pruning together (default): {answer}."])


def _outcome(row: Row, int8: Row) -> str:
    saved, cost = 1.0 - row.nbytes / int8.nbytes, row.perplexity / int8.perplexity - 1.0
    if row.nbytes == int8.nbytes and cost == 0:
        return "changes nothing"
    if saved <= 0:
        return "dominated (no fewer bytes)" if cost >= 0 else "does not pay"
    return "pays" if cost < saved else "does not pay"


def _change(value: float, reference: float) -> str:
    return f"{value / reference - 1.0:+.2%}"


def render(case: Case, rows: Sequence[Row], protocol: str) -> list[str]:
    """Markdown of one model."""
    lines = [
        f"## {case.name}",
        "",
        f"{case.text_name}. {protocol}.",
        "",
        "| variant | weights (MiB) | of float16 | perplexity | low-rank matrices | pruned neurons | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append(
            f"| {row.variant} | {row.nbytes / MIB:.3f} | {row.ratio:.1%} | {row.perplexity:.3f} | {row.num_low_rank} "
            f"| {row.num_pruned} | {seconds} |"
        )
    return [*lines, "", f"**Verdict (computed).** {verdict(rows)}", ""]


def header(arguments: argparse.Namespace) -> list[str]:
    """Title, conditions and how to read the tables."""
    given = [
        ("--models MODELS", arguments.models),
        ("--stories FILE", arguments.stories),
        ("--books FILE", arguments.books),
    ]
    flags = " ".join(flag for flag, value in given if value is not None)
    limit = arguments.max_tokens
    flags += "" if limit is None else f" --max-tokens {limit}"
    extent = "The whole evaluation text is" if limit is None else f"Only the first {limit} tokens of each text are"
    return [
        "# Size and perplexity after compression",
        "",
        f"Made by `python -m spq.results {flags} --threads {arguments.threads}` on "
        f"{datetime.now(UTC):%Y-%m-%d}; {_cpu_name()}, {arguments.threads} thread(s); Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}. "
        f"{extent} used; weights are stored as said, "
        "computed with in float32. Bytes are those of the tensors, a tied table counted once; seconds are those of "
        "compressing. Perplexities of different models are per token of different tokenizers: compare within a table.",
        "",
        "A variant *pays* where its bytes fall by a larger share than its perplexity rises, both against int8 alone.",
        "",
    ]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m spq.results", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder with stories260K, babyllama-1m and/or storyteller")
    parser.add_argument("--stories", type=Path, help="TinyStories text, for the first two")
    parser.add_argument("--books", type=Path, help="held-out books, for storyteller (or demo/storyteller)")
    parser.add_argument("--out", type=Path, help="Markdown file to write (default: standard output)")
    parser.add_argument("--max-tokens", type=int, help="evaluated tokens per model (default: the whole text)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    lines = header(arguments)
    try:
        for case in find_cases(arguments.models, arguments.stories, arguments.books):
            open_model(case.folder).close()
            rows, base = measure(case, arguments.max_tokens)
            lines += render(case, rows, base.protocol)
    except SpqError as error:
        print(f"spq.results: {error}", file=sys.stderr)
        return 2
    text = "\n".join(lines)
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
