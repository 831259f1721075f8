"""One row of a table of results: what `spq-eval` prints, `spq-search` collects and `pareto` draws. JSON lines on disk.

Not how anything is measured: see `footprint` (bytes and rates) and `quality` (everything about text).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from spq.errors import ModelFileError
from spq.footprint import Footprint
from spq.quality import Quality, composite

MIB = 1 << 20
Option = str | float | int | bool | None


class TextScore(BaseModel):
    """One model on one text; None where it was not measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")

    perplexity: float
    nll: float
    num_tokens: int  # scored
    protocol: str
    text_sha256: str = ""
    base_perplexity: float | None = None
    top1: float | None = None
    kl: float | None = None
    sr_ppl: float | None = None
    sr_top1: float | None = None
    sr_kl: float | None = None
    by_window: tuple[float, ...] = ()  # nll of each window: what the error of a difference follows from

    @classmethod
    def of(cls, quality: Quality, text_sha256: str = "") -> Self:
        """From a measurement."""
        found = quality.perplexity
        return cls(
            perplexity=found.value,
            nll=found.nll,
            num_tokens=found.num_tokens,
            protocol=found.protocol,
            text_sha256=text_sha256,
            base_perplexity=None if quality.base is None else quality.base.value,
            top1=quality.top1,
            kl=quality.kl,
            sr_ppl=quality.sr_ppl,
            sr_top1=quality.sr_top1,
            sr_kl=quality.sr_kl,
            by_window=tuple(round(nll, 6) for nll in quality.by_window),
        )


class TaskScore(BaseModel):
    """One task of lm-evaluation-harness."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float  # 0..1
    stderr: float | None
    num_questions: int
    num_shots: int


class Row(BaseModel):
    """One model. Bytes and rates are None for a server, whose files are not seen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")

    name: str
    file_bytes: int | None = None
    resident_bytes: int | None = None
    fp16_bytes: int | None = None
    bits_per_weight: float | None = None
    tcr: float | None = None
    mcr: float | None = None
    composite: float | None = None  # of the first text with a retention: Sr_kl, else Sr_ppl
    texts: dict[str, TextScore] = {}
    tasks: dict[str, TaskScore] = {}
    tokens_per_s: float | None = None
    options: dict[str, Option] = {}  # how the model was made, for people

    @property
    def score(self) -> TextScore | None:
        """Of the first text."""
        return next(iter(self.texts.values()), None)


def make_row(
    name: str,
    footprint: Footprint | None,
    texts: dict[str, TextScore],
    *,
    tasks: dict[str, TaskScore] | None = None,
    resident_bytes: int | None = None,
    tokens_per_s: float | None = None,
    options: dict[str, Option] | None = None,
) -> Row:
    """A row of what was measured; `resident_bytes` is said where there is no footprint."""
    retention = next((s.sr_ppl if s.sr_kl is None else s.sr_kl for s in texts.values()), None)
    return Row(
        name=name,
        file_bytes=None if footprint is None else footprint.file_bytes,
        resident_bytes=resident_bytes if footprint is None else footprint.resident_bytes,
        fp16_bytes=None if footprint is None else footprint.fp16_bytes,
        bits_per_weight=None if footprint is None else footprint.bits_per_weight,
        tcr=None if footprint is None else footprint.tcr,
        mcr=None if footprint is None else footprint.mcr,
        composite=None
        if footprint is None or retention is None
        else composite(retention, footprint.sparsity, footprint.bits_per_stored_weight),
        texts=texts,
        tasks=tasks or {},
        tokens_per_s=tokens_per_s,
        options=options or {},
    )


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """JSON lines, replacing the file."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), "utf-8")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. Raises ModelFileError naming the line."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: not a readable file of rows ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ModelFileError(f"{path}: line {number} is no row of results: {where} {first['msg']}") from error
    return rows


def render_rows(rows: Sequence[Row]) -> str:
    """A Markdown table: a line per model and text, tasks below."""
    lines = [
        "| model | text | file MiB | resident MiB | bits/weight | perplexity | top-1 | KL nats/token | Sr_ppl | Sr_kl "
        "| TCr | MCr | composite |",
        "|---|---|" + "---:|" * 11,
    ]
    for row in rows:
        for text, score in row.texts.items():
            cells = [
                _number(row.file_bytes, 3, MIB),
                _number(row.resident_bytes, 3, MIB),
                _number(row.bits_per_weight, 2),
                _number(score.perplexity, 4),
                _number(score.top1, 4),
                _number(score.kl, 5),
                _number(score.sr_ppl, 4),
                _number(score.sr_kl, 4),
                _number(row.tcr, 4),
                _number(row.mcr, 4),
                _number(row.composite, 4),
            ]
            lines.append(f"| {row.name} | {text} | " + " | ".join(cells) + " |")
    tasks = [
        f"| {row.name} | {name} | {task.value:.4f} | {_number(task.stderr, 4)} | {task.num_questions} "
        f"| {task.num_shots} |"
        for row in rows
        for name, task in row.tasks.items()
    ]
    if tasks:
        head = ["| model | task | score | standard error | questions | shots |", "|---|---|" + "---:|" * 4]
        lines = ([*lines, ""] if any(row.texts for row in rows) else []) + head + tasks
    return "\n".join(lines)


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
