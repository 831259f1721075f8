"""Which bars of a GPU day are met, and the tables: what `gpu_serving` measured becomes verdicts and Markdown.

Every bar is a line of its own, whatever happened: "met" and "missed" are said of an H100 alone, on another device the
figures stand beside "not run on an H100", and where a figure is missing the line says which part it should have come
from and why that part gave none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, Any]
GEMM_ROWS = (1, 4, 16)  # "M <= 16"
OURS, INT8, FP16, KV16 = "ours spq", "ours int8", "ours fp16", "ours spq 16-bit KV"
RIVAL = "gptqmodel-8"


@dataclass(frozen=True, slots=True)
class Bar:
    """One line. `value` is what must be at least (or at most) `limit`."""

    bar: str
    limit: float
    at_least: bool
    value: float | None
    note: str  # the figures behind it, or why there is none

    def verdict(self, gpu: str) -> str:
        """met, missed, or why neither can be said."""
        if self.value is None:
            return f"not run: {self.note}"
        if "H100" not in gpu:
            return f"not run on an H100 (this is {gpu})"
        return "met" if (self.value >= self.limit if self.at_least else self.value <= self.limit) else "missed"


class Figures:
    """The rows of one model, by system and batch."""

    def __init__(self, report: Row, model: str) -> None:
        self._parts = [part for part in report["parts"] if part["model"] == model]

    def speed(self, system: str, batch: int, metric: str) -> float | None:
        """A figure; the lowest where a system ran in several ways. None: not measured."""
        values = [
            row[metric] for row in self._rows("speed", system) if row["batch"] == batch and row.get(metric) is not None
        ]
        return min(values) if values else None

    def memory(self, system: str, field: str) -> float | None:
        """Bytes of one reading, or None."""
        return next((row[field] for row in self._rows("memory", system) if row.get(field) is not None), None)

    def why_not(self, system: str) -> str:
        """What is known of a figure that is missing."""
        for part in self._parts:
            if system in part["systems"]:
                failed = [row["failed"] for row in part["rows"] if row.get("failed")]
                return f"{system}: {part['reason'] or '; '.join(failed[:1]) or 'its row has no such figure'}"
        return f"{system}: no such part in this run"

    def _rows(self, kind: str, system: str) -> Iterator[Row]:
        return (r for part in self._parts for r in part["rows"] if r["kind"] == kind and r["system"] == system)


def bars(report: Row) -> list[Bar]:
    """Every bar for a GPU, from the parts of the model that `report["bar_model"]` names and the kernels' own check."""
    model = report["bar_model"]
    figures = Figures(report, model)
    ms = {name: figures.speed(name, 1, "ms_per_token") for name in (OURS, FP16, RIVAL)}
    rates = {name: figures.speed(name, 64, "decode_tokens_per_s") for name in (OURS, KV16)}
    whole = {name: figures.speed(name, 64, "tokens_per_s") for name in (OURS, KV16)}
    loaded = {name: figures.memory(name, "bytes_loaded") for name in (OURS, RIVAL)}
    weight, packed = loaded[OURS], figures.memory(OURS, "bytes_packed")

    def ratio(text: str, limit: float, a: str, b: str, values: dict[str, float | None], swap: bool, more: str) -> Bar:
        """values[a] / values[b] (swapped for times: theirs / ours) as a bar."""
        missing = next((name for name in (a, b) if values[name] is None), None)
        if missing is not None:
            return Bar(text, limit, True, None, figures.why_not(missing))
        x, y = values[a] or 0.0, values[b] or 0.0
        return Bar(text, limit, True, y / x if swap else x / y, f"{a} {x:.4g}, {b} {y:.4g} {more}")

    kv_note, total, total16 = "tokens/s while all decode", whole[OURS], whole[KV16]
    if total and total16:
        kv_note += f"; {total / total16:.2f} with the prompts' time in it"
    first = ms[OURS]
    below = "memory after load below 8-bit GPTQ"
    return [
        _gemm(report),
        Bar(f"{model} SPQ (half-rank attention), batch 1: at most 2.9 ms a token", 2.9, False, first,
            figures.why_not(OURS) if first is None else "ms, from the gaps between tokens"),
        ratio(f"{model} SPQ, batch 1: at least 1.8x fp16 with graphs", 1.8, OURS, FP16, ms, True, "ms a token"),
        ratio(f"{model} SPQ, batch 1: at least 1.15x the best 8-bit GPTQ", 1.15, OURS, RIVAL, ms, True, "ms a token"),
        ratio("batch 64: int8 KV at least 1.5x 16-bit KV", 1.5, OURS, KV16, rates, False, kv_note),
        Bar("memory after load within 3 % of the byte count", 0.03, False,
            None if weight is None or not packed else abs(weight / packed - 1),
            figures.why_not(OURS) if weight is None or not packed
            else f"{weight / 1e9:.3f} GB by the driver without the context, {packed / 1e9:.3f} GB packed"),
        ratio(below, 1.0, OURS, RIVAL, loaded, True, "bytes by the driver"),
    ]  # fmt: skip


def _gemm(report: Row) -> Bar:
    """The slowest int8 product of up to 16 rows, from the JSON of kernels.gpu_check."""
    text, limit = "int8 GEMM: at least 2.0 TB/s for M <= 16", 2.0
    kernels = report.get("kernels")
    if kernels is None:
        return Bar(text, limit, True, None, "no JSON of kernels.gpu_check was given (--kernels)")
    rows = [row for part in kernels["sections"].get("gemm", []) for row in part["rows"]]
    measured = [row for row in rows if row.get("rows") in GEMM_ROWS and "tb_per_s" in row]
    if not measured:
        return Bar(text, limit, True, None, "kernels.gpu_check measured no product of so few rows")
    slowest = min(measured, key=lambda row: float(row["tb_per_s"]))
    reached = sum(row["tb_per_s"] >= limit for row in measured)
    note = (
        f"TB/s of the slowest: {slowest['name']} of {slowest['model']} at {slowest['rows']} rows; {reached} of "
        f"{len(measured)} products reach it"
    )
    return Bar(text, limit, True, float(slowest["tb_per_s"]), note)


def judged(report: Row) -> list[Row]:
    """The bars as rows of a table."""
    gpu = report["environment"].get("gpu") or "a CPU"
    return [asdict(bar) | {"verdict": bar.verdict(gpu)} for bar in bars(report)]


def markdown(report: Row) -> str:
    """Bars, speeds, memory, and the parts that did not end well."""
    environment = report["environment"]
    load = report["load"]
    lines = [
        f"# Serving on a GPU, {report['date_utc']}, commit {report['commit']}",
        "",
        f"{environment.get('gpu') or 'CPU'}, driver {report['driver'] or 'none'}, torch {environment.get('torch')}; "
        f"prompts of {load['prompt_tokens']} tokens, answers of {load['new_tokens']}.",
        "",
        *_table(("bar", "figure", "limit", "verdict", "from"), [
            (bar["bar"], bar["value"], ("at least " if bar["at_least"] else "at most ") + f"{bar['limit']:g}",
             bar["verdict"], "" if bar["value"] is None else bar["note"])
            for bar in report["bars"]
        ]),
        *_table(("model", "system", "batch", "ms a token", "tokens/s, all decoding", "tokens/s with prompts",
                 "TTFT p50 ms", "ITL p95 ms"), [
            (part["model"], " ".join(filter(None, (row["system"], row.get("mode")))), row["batch"],
             *(row.get("failed", row.get(key)) if key == "ms_per_token" else row.get(key) for key in
               ("ms_per_token", "decode_tokens_per_s", "tokens_per_s", "ttft_p50_ms", "itl_p95_ms")))
            for part in report["parts"] for row in part["rows"] if row["kind"] == "speed"
        ]),
        *_table(("model", "system", "GB packed", "GB loaded", "context", "GB ready", "GB at full KV"), [
            (model, system, *(_gb(row.get(key)) for key in
             ("bytes_packed", "bytes_loaded", "bytes_before", "bytes_ready", "bytes_full_kv")))
            for (model, system), row in _memory(report).items()
        ]),
        *_table(("part", "status", "reason"), [
            (part["part"], part["status"], (part["reason"] or "").replace("\n", " ")[-300:])
            for part in report["parts"] if part["status"] != "ok"
        ]),
    ]  # fmt: skip
    return "\n".join(lines)


def _memory(report: Row) -> dict[tuple[str, str], Row]:
    """All readings of a system in one row."""
    found: dict[tuple[str, str], Row] = {}
    for part in report["parts"]:
        for row in (row for row in part["rows"] if row["kind"] == "memory"):
            found.setdefault((part["model"], row["system"]), {}).update(row)
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    texts = [[_text(cell) for cell in row] for row in rows]
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in texts),
        "",
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _gb(value: float | None) -> float | None:
    return None if value is None else value / 1e9
