"""spq-search: compress a model in many ways, measure each, and draw which are worth having.

Not the compression (`compress`), the measuring (`judge`) nor the drawing (`pareto`). Points are all combinations of
variance threshold, prune ratio, bits and correction rank, and the allocator's budgets; each is made in a temporary
folder and removed once measured. Every row is written as soon as it is there: a search that was stopped goes on where
it was when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from spq.budget import MarketCache
from spq.cache import source_hash
from spq.calibrate import bundled_calibration, read_text, text_hash
from spq.cli import choose_device
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import CalibrationError, OptionError, OutputError, SpqError
from spq.hub import find_model
from spq.judge import Judge
from spq.pareto import make_views, write_report
from spq.quality import COMPOSITE_FORMULA, COMPOSITE_NAME
from spq.rows import Option, Row, read_rows, render_rows, write_rows
from spq.scoring import LocalModel
from spq.texts import plain_text

ROWS = "rows.jsonl"
ORIGINAL = "original"
BITS = (8, 4)


@dataclass(frozen=True, slots=True)
class Grid:
    """What is walked: every combination of the first four, and the budgets (shares of the float16 bytes)."""

    variance: tuple[float, ...]
    prune: tuple[float, ...]
    bits: tuple[int, ...]
    correction: tuple[int, ...]
    budgets: tuple[float, ...]

    def points(self) -> Iterator[tuple[str, SPQConfig]]:
        """(name, options) of every point; how each is made is that of preset budget. Raises OptionError."""
        for variance, prune, bits, correction in product(self.variance, self.prune, self.bits, self.correction):
            yield (
                f"v{variance:g} p{prune:g} b{bits} c{correction}",
                SPQConfig.preset(
                    "default",
                    variance_threshold=variance,
                    svd_metric="whitened",
                    max_prune_ratio=prune,
                    bits=bits,
                    feedback=True,
                    correction_rank=correction,
                ),
            )
        for ratio in self.budgets:
            yield f"budget {ratio:g}", SPQConfig.preset("budget", ratio=ratio)


GRIDS = {
    "small": Grid((1.0, 0.9), (0.0, 0.1), BITS, (0, 16), (0.5, 0.375, 0.25)),
    "full": Grid(
        (1.0, 0.98, 0.95, 0.9), (0.0, 0.05, 0.1, 0.2), BITS, (0, 16, 64), (0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875)
    ),
}


@dataclass(slots=True)
class Search:
    """One model, calibrated on one text and measured on another."""

    source: Path
    out: Path
    calibration: str
    judge: Judge  # its first text is what the front is drawn of; its reference is the original
    on_point: Callable[[str], None]
    on_refused: Callable[[str, SpqError], None]
    markets: MarketCache = field(default_factory=MarketCache)

    def run(self, points: Sequence[tuple[str, SPQConfig]]) -> list[Row]:
        """Rows of the original and of every point that can be made, those of earlier runs reused; draws the report.

        Other rows in the folder (of another model, text or grid) are kept out of the report and dropped. A point that
        its options or the model forbid is told to `on_refused`. Raises SpqError for everything else.
        """
        keys = {name: self._key(options) for name, options in points} | {ORIGINAL: self._key(None)}
        path = self.out / ROWS
        known = {row.options.get("key"): row for row in (read_rows(path) if path.is_file() else [])}
        rows = [known[key] for key in keys.values() if key in known]
        for name, options in [(ORIGINAL, None), *points]:
            self.on_point(name)
            if keys[name] in known:
                continue
            try:
                rows.append(self._measure(name, options, keys[name]))
            except OptionError as error:
                self.on_refused(name, error)
                continue
            _save(rows, path)
        write_report(rows, self.out, title=f"{self.source.name}: size against quality")
        return rows

    def _measure(self, name: str, options: SPQConfig | None, key: str) -> Row:
        """One row; the folder that is measured is gone afterwards."""
        shown: dict[str, Option] = {"key": key}
        if options is None:
            return self.judge.folder(self.source, name, shown)
        shown |= {
            field: getattr(options, field)
            for field in ("variance_threshold", "max_prune_ratio", "bits", "correction_rank", "ratio")
            if getattr(options, field) is not None
        }
        with tempfile.TemporaryDirectory(prefix=".search.", dir=self.out) as scratch:
            packed = Path(scratch) / "packed"
            compress(
                self.source, packed, options, calibration_text=self.calibration, device=self.judge.device,
                markets=self.markets,
            )  # fmt: skip
            return self.judge.folder(packed, name, shown)

    def _key(self, options: SPQConfig | None) -> str:
        """What decides a row: model, options, both texts and how much of them, by hash."""
        parts = {
            "source": source_hash(self.source),
            "options": None if options is None else options.model_dump(mode="json"),
            "calibration": text_hash(self.calibration),
            "texts": [text.sha256 for text in self.judge.texts],
            "protocol": [self.judge.window, self.judge.max_tokens, str(self.judge.dtype)],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _save(rows: Sequence[Row], path: Path) -> None:
    """Replace the file at once: whoever interrupts finds the rows before or after, never half a line."""
    temporary = path.with_suffix(".part")
    try:
        write_rows(rows, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error})") from error


def build_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(prog="spq-search", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="plain model folder or hub id")
    parser.add_argument("-o", "--out", metavar="FOLDER", type=Path, required=True, help="for rows.jsonl and the front")
    parser.add_argument("--grid", choices=list(GRIDS), default="small", help="for lists not given (default: small)")
    for name, kind in (("variance", float), ("prune", float), ("bits", int), ("correction", int), ("budgets", float)):
        parser.add_argument(f"--{name}", metavar="A,B,...", type=_list_of(kind), help="explicit list; '' for none")
    parser.add_argument("--text", metavar="FILE", type=Path, help="to calibrate on (default: the bundled sample)")
    parser.add_argument("--evaluate", metavar="FILE", type=Path, required=True, help="to measure on; another text")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="of the evaluation (default: all)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def _list_of(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    def numbers(text: str) -> tuple[float, ...]:
        return tuple(kind(part) for part in text.split(",") if part.strip())

    return numbers


def run(arguments: argparse.Namespace) -> list[Row]:
    """Do what was asked. Raises SpqError."""
    if arguments.max_tokens is not None and arguments.max_tokens < 2:
        raise OptionError(f"--max-tokens {arguments.max_tokens}: give at least 2")
    names = ("variance", "prune", "bits", "correction", "budgets")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    usual = GRIDS[arguments.grid]
    points = list(Grid(**{name: given.get(name, getattr(usual, name)) for name in names}).points())
    calibration = read_text(bundled_calibration() if arguments.text is None else arguments.text)
    evaluation = plain_text(arguments.evaluate)
    if evaluation.sha256 == text_hash(calibration):
        raise CalibrationError(f"{arguments.evaluate}: is the calibration text; measure on another one")
    device = choose_device(arguments.device)
    source = find_model(arguments.model, None)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{arguments.out}: cannot be made ({error})") from error
    judge = Judge([evaluation], device, dtype, LocalModel(source, device, dtype), max_tokens=arguments.max_tokens)
    with tqdm(total=len(points) + 1, unit="model", disable=None) as bar:

        def show(name: str) -> None:
            bar.set_description_str(name)
            bar.update()

        def refuse(name: str, error: SpqError) -> None:
            bar.write(f"spq-search: {name} is left out: {error}", file=sys.stderr)

        return Search(source, arguments.out, calibration, judge, show, refuse).run(points)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for anything the user can mend, 130 where interrupted."""
    arguments = build_parser().parse_args(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        rows = run(arguments)
    except SpqError as error:
        print(f"spq-search: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spq-search: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    front = [rows[point.row] for point in make_views(rows)[0].front]
    print(f"On the front, {len(front)} of {len(rows)} (all in {arguments.out / ROWS}):\n\n{render_rows(front)}")
    best = max((row for row in rows if row.composite is not None), key=lambda row: row.composite or 0.0, default=None)
    if best is not None:
        print(f"\nhighest {COMPOSITE_NAME}: {best.name}, {best.composite:.4f} ({COMPOSITE_FORMULA})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
