"""python -m kernels.gpu_check: on a machine with a GPU, are the Triton kernels right, and how fast are they?

    python -m kernels.gpu_check [--sections correctness,bandwidth,gemm,attention,decode] [--time-limit SECONDS]
                                [--small] [--jobs N] [--out FILE.json] [--markdown FILE.md]

Compares every operation with the reference in float64, then measures copy bandwidth, each int8 product, attention by
context length, and a decoder of random weights in LLaMA-2-7B's shape, step by step and kernel by kernel. `tune` times
other tiles than the configured ones. Every part runs in a process of its own (`kernels.gpu.check_part`), so that one
that breaks, even with an illegal access, loses no other; kernels are compiled by several at a time first, and timed
by one at a time. Exit status 0 when all is right, 1 when a check fails or a part breaks or runs out of time, 2
without a CUDA device.

compute-sanitizer must see the process that launches kernels:
    compute-sanitizer python -m kernels.gpu.check_part correctness/float16/attention_input --small
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SECTIONS = ("environment", "correctness", "bandwidth", "gemm", "attention", "decode", "tune")
_TIMED = ("gemm", "attention", "decode", "tune")
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(slots=True)
class Part:
    """What one part gave."""

    name: str
    rows: list[Row] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it ran to its end and no row says otherwise."""
        return self.error is None and all(row.get("ok", True) for row in self.rows)


def run_part(command: Sequence[str], name: str, timeout_s: float) -> Part:
    """Run one part to its end or its time limit; rows it printed before either are kept."""
    began, part = time.monotonic(), Part(name)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, name], cwd=_ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        try:
            printed, _ = process.communicate(timeout=max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            part.error = f"stopped after {timeout_s:.0f} s"
        errors.seek(0)
        if part.error is None and process.returncode:
            part.error = f"exit status {process.returncode}: {errors.read()[-2000:]}"
    lines = printed.splitlines()
    part.rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    part.seconds = round(time.monotonic() - began, 1)
    return part


class Check:
    """One run of the chosen sections."""

    def __init__(self, sections: Sequence[str], command: Sequence[str], time_limit_s: float, jobs: int) -> None:
        self.sections: dict[str, list[Part]] = {name: [] for name in sections}
        self._command = list(command)
        self._deadline = time.monotonic() + time_limit_s
        self._jobs = jobs

    @property
    def ok(self) -> bool:
        """Whether every part of every section is."""
        return all(part.ok for parts in self.sections.values() for part in parts)

    def run(self, parts: dict[str, list[str]]) -> None:
        """`parts` by section. First all correctness and all compilation, several at a time, then timings one by one."""
        timed = [part for name in _TIMED if name in self.sections for part in parts[name]]
        checks = parts["correctness"] if "correctness" in self.sections else []
        with ThreadPoolExecutor(self._jobs) as pool:
            correctness = [pool.submit(self._run, part, []) for part in checks]
            compiled = [pool.submit(self._run, part, ["--warm"]) for part in timed]
            for future in correctness:
                self._record("correctness", future.result())
            for waiting in compiled:
                waiting.result()  # its errors come again when it is timed
        for name in ("environment", "bandwidth", *_TIMED):
            for part in parts[name] if name in self.sections else []:
                self._record(name, self._run(part, ["--copy", str(self._copy_tb_per_s())]))

    def as_json(self) -> Row:
        """Everything, for a file."""
        return {
            "ok": self.ok,
            "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _output("git", "-C", str(_ROOT), "rev-parse", "HEAD"),
            "uncommitted_changes": bool(_output("git", "-C", str(_ROOT), "status", "--porcelain")),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "sections": {
                name: [{"part": p.name, "seconds": p.seconds, "error": p.error, "rows": p.rows} for p in parts]
                for name, parts in self.sections.items()
            },
        }

    def _run(self, part: str, options: list[str]) -> Part:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            return Part(part, error="not started: the time limit was reached")
        return run_part([*self._command, *options], part, remaining)

    def _record(self, section: str, part: Part) -> None:
        self.sections[section].append(part)
        print(f"== {part.name}: {'ok' if part.ok else 'FAILED'}, {len(part.rows)} rows, {part.seconds} s", flush=True)
        shown = [row for row in part.rows if not row.get("ok", True)] if section == "correctness" else part.rows
        for row in shown:
            print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        if part.error:
            print(part.error, flush=True)

    def _copy_tb_per_s(self) -> float:
        rows = [row for part in self.sections.get("bandwidth", []) for row in part.rows]
        return float(rows[0]["tb_per_s"]) if rows else float("nan")


def markdown(report: Row) -> str:
    """One table per kind of row and section; of correctness one line per part."""
    lines = [f"# GPU check, {report['date_utc']}, commit {report['commit']}", ""]
    for section, parts in report["sections"].items():
        lines += [f"## {section}", ""]
        if section == "correctness":
            lines += _table(_verdicts(parts))
        else:
            rows = [row for part in parts for row in part["rows"]]
            for columns in dict.fromkeys(tuple(row) for row in rows):
                lines += _table([row for row in rows if tuple(row) == columns])
        lines += [f"{part['part']}: {part['error']}\n" for part in parts if part["error"]]
    return "\n".join(lines)


def _verdicts(parts: Iterable[Row]) -> list[Row]:
    return [
        {
            "part": part["part"],
            "checks": len(part["rows"]),
            "failed": sum(not row["ok"] for row in part["rows"]) + (part["error"] is not None),
            "worst error / limit": max((r["error"] / r["limit"] for r in part["rows"] if r["limit"]), default=0.0),
        }
        for part in parts
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    head = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return [*head, *("| " + " | ".join(_short(value) for value in row.values()) + " |" for row in rows), ""]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; return the exit status."""
    parser = argparse.ArgumentParser(description="Check and measure the Triton kernels on a CUDA device.")
    parser.add_argument("--sections", default=",".join(SECTIONS[:-1]), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--time-limit", type=float, default=450.0, help="seconds; what is done by then is kept")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile at once")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write tables to this file")
    options = parser.parse_args(arguments)
    sections = options.sections.split(",")
    if unknown := [name for name in sections if name not in SECTIONS]:
        parser.error(f"unknown sections {unknown}; there are {', '.join(SECTIONS)}")

    import torch  # here: --help needs none of it

    if not torch.cuda.is_available():
        print("no CUDA device: the GPU kernels cannot be checked here", file=sys.stderr)
        return 2
    from kernels.gpu.check_part import parts

    command = [sys.executable, "-m", "kernels.gpu.check_part", *(["--small"] if options.small else [])]
    check = Check(sections, command, options.time_limit, options.jobs)
    check.run({name: parts(name) for name in SECTIONS})
    report = check.as_json()
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))
    if options.markdown:
        options.markdown.write_text(markdown(report))
    print("\nall checks passed" if check.ok else "\nFAILED")
    return 0 if check.ok else 1


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
