"""python -m kernels.gpu_check: on a machine with a GPU, are the Triton kernels right, and how fast are they?

    python -m kernels.gpu_check [--sections correctness,sanitizer,bandwidth,gemm,attention,decode,serving]
                                [--time-limit SECONDS] [--small] [--jobs N] [--out FILE.json] [--markdown FILE.md]

Compares every operation with the reference in float64, on small shapes also under compute-sanitizer where it is
installed, then measures copy bandwidth, each int8 product, attention by context length, and a decoder of random weights
in the shapes of LLaMA-2-7B and Llama-3-8B, step by step and kernel by kernel. `serving` gives the time that is left to
another program, `benchmarks.gpu_serving`: the whole server, and rivals. `tune` times other tiles than the configured
ones. Every part runs in a process of its own (`kernels.gpu.check_part`), so that one that breaks, even with an illegal
access, loses no other; kernels are compiled by several at a time first, and timed by one at a time. Exit status 0 when
all is right, 1 when a check fails or a part breaks or runs out of time, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SECTIONS = (
    "environment", "correctness", "sanitizer", "bandwidth", "gemm", "attention", "decode", "serving", "tune",
)  # fmt: skip
_TIMED = ("gemm", "attention", "decode", "tune")
_SANITIZER = "compute-sanitizer"
_SANITIZER_LIMIT_S = 150.0  # of one part under it, which is many times slower than without
_SHARING = ("add_linear", "attention_input", "mlp_input", "attention")  # programs that share results, for racecheck
_CLOSING_S = 20.0  # of the time left: for the serving benchmark to end its servers and write
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


def run_part(command: Sequence[str], name: str, timeout_s: float, environment: Mapping[str, str] | None = None) -> Part:
    """Run `command` with `name` as its last argument to its end or its time limit; rows printed before are kept."""
    began, part = time.monotonic(), Part(name)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, name], cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
            encoding="utf-8",
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            printed = _end(process)
            part.error = f"stopped after {timeout_s:.0f} s"
        finally:
            process.kill()  # for any other exception; it has ended otherwise
        errors.seek(0)
        lines = printed.splitlines()
        rows = [line for line in lines if line.startswith("{") and line.endswith("}")]
        if part.error is None and process.returncode:
            said = "\n".join(line for line in lines if line not in rows)[-1000:]
            part.error = f"exit status {process.returncode}: {errors.read()[-2000:]}{said}"
    part.rows = [json.loads(row) for row in rows]
    part.seconds = round(time.monotonic() - began, 1)
    return part


def _end(process: subprocess.Popen[str]) -> str:
    """Ask it to end, as it may have processes of its own to end; then force it. Returns what it had printed."""
    process.terminate()
    try:
        return process.communicate(timeout=_CLOSING_S / 2)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0]


class Check:
    """One run of the chosen sections."""

    def __init__(self, sections: Sequence[str], command: Sequence[str], time_limit_s: float, jobs: int) -> None:
        self.sections: dict[str, list[Part]] = {name: [] for name in sections}
        self._command = list(command)
        self._deadline = time.monotonic() + time_limit_s
        self._jobs = jobs
        self.serving: Row | None = None  # what benchmarks.gpu_serving wrote
        self.serving_tables = ""

    @property
    def ok(self) -> bool:
        """Whether every part of every section is."""
        return all(part.ok for parts in self.sections.values() for part in parts)

    def run(self, parts: dict[str, list[str]]) -> None:
        """`parts` by section. First all correctness and all compilation, several at a time, then timings one by one."""
        timed = [part for name in _TIMED if name in self.sections for part in parts[name]]
        checks = parts["correctness"] if "correctness" in self.sections else []
        sanitized = sanitizer_parts() if "sanitizer" in self.sections else []
        with ThreadPoolExecutor(self._jobs) as pool:
            correctness = [pool.submit(self._run, part, []) for part in checks]
            compiled = [pool.submit(self._run, part, ["--warm"]) for part in timed]
            watched = [pool.submit(self._sanitize, tool, part) for tool, part in sanitized]
            for future in correctness:
                self._record("correctness", future.result())
            for future in watched:
                self._record("sanitizer", future.result())
            for waiting in compiled:
                waiting.result()  # its errors come again when it is timed
        for name in ("environment", "bandwidth", *_TIMED):
            for part in parts[name] if name in self.sections else []:
                self._record(name, self._run(part, ["--copy", str(self._copy_tb_per_s())]))

    def serve(self, options: Sequence[str]) -> None:
        """Run the serving benchmark in the time that is left, by its command line: nothing above is imported here."""
        with tempfile.TemporaryDirectory() as folder:
            kernels, out, tables = (Path(folder) / name for name in ("kernels.json", "serving.json", "serving.md"))
            kernels.write_text(json.dumps(self.as_json()))
            left = self._deadline - time.monotonic()
            command = [sys.executable, "-m", "benchmarks.gpu_serving", "--kernels", str(kernels)]
            command += ["--time-limit", f"{left - _CLOSING_S:.0f}", "--markdown", str(tables), *options, "--json"]
            part = Part("serving", error="not started: the time limit was reached")
            if left > 2 * _CLOSING_S:
                part = run_part(command, str(out), left)
                part.name = "serving"
            if out.is_file():
                self.serving = json.loads(out.read_text())
                part.rows = list(self.serving["bars"])
            if tables.is_file():
                self.serving_tables = tables.read_text()
            self._record("serving", part)

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
            "serving": self.serving,
        }

    def _sanitize(self, tool: str, part: str) -> Part:
        """A part of the correctness section under a tool of compute-sanitizer, on small shapes."""
        if (program := shutil.which(_SANITIZER)) is None:
            return Part(f"{tool}/{part}", [{"ok": True, "skipped": f"{_SANITIZER} is not on the PATH"}])
        watching = [program, "--tool", tool, "--error-exitcode", "9", *self._command, "--small"]
        limit = min(_SANITIZER_LIMIT_S, self._deadline - time.monotonic())
        # torch's allocator would hand out parts of larger allocations, whose bounds the tool does not see
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = run_part(watching, part, limit, environment)
        done.name = f"{tool}/{part}"
        return done

    def _run(self, part: str, options: list[str]) -> Part:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            return Part(part, error="not started: the time limit was reached")
        return run_part([*self._command, *options], part, remaining)

    def _record(self, section: str, part: Part) -> None:
        self.sections[section].append(part)
        print(f"== {part.name}: {'ok' if part.ok else 'FAILED'}, {len(part.rows)} rows, {part.seconds} s", flush=True)
        shown = (
            [row for row in part.rows if not row.get("ok", True)]
            if section in ("correctness", "sanitizer")
            else part.rows
        )
        for row in shown:
            print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        if part.error:
            print(part.error, flush=True)

    def _copy_tb_per_s(self) -> float:
        rows = [row for part in self.sections.get("bandwidth", []) for row in part.rows]
        return float(rows[0]["tb_per_s"]) if rows else float("nan")


def sanitizer_parts() -> list[tuple[str, str]]:
    """(tool, part of the correctness section): memory errors of everything, races where programs share results."""
    from kernels.gpu.check_part import parts

    racing = [name for name in parts("correctness") if name.rpartition("/")[2] in _SHARING]
    return [("memcheck", name) for name in parts("correctness")] + [("racecheck", name) for name in racing]


def markdown(report: Row) -> str:
    """One table per kind of row and section; of correctness one line per part."""
    lines = [f"# GPU check, {report['date_utc']}, commit {report['commit']}", ""]
    for section, parts in report["sections"].items():
        lines += [f"## {section}", ""]
        if section in ("correctness", "sanitizer"):
            lines += _table(_verdicts(parts))
        elif section != "serving":  # that program has tables of its own
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
            "worst error / limit": max((r["error"] / r["limit"] for r in part["rows"] if r.get("limit")), default=0.0),
            "not run": next((row["skipped"] for row in part["rows"] if "skipped" in row), ""),
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
    parser.add_argument("--time-limit", type=float, default=560.0, help="seconds; what is done by then is kept")
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
    if "serving" in sections:
        check.serve(["--small"] if options.small else [])
    report = check.as_json()
    if options.out:
        options.out.write_text(json.dumps(report, indent=1))
    if options.markdown:
        options.markdown.write_text(f"{markdown(report)}\n{check.serving_tables}")
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
