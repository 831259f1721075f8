"""`python -m benchmarks.gpu_serving`: 7B- and 8B-shaped random models through the real server, and rivals, on a GPU.

    python -m benchmarks.gpu_serving --json serving.json [--markdown serving.md] [--time-limit SECONDS] [--resume]
                                     [--kernels check.json] [--parts TEXT,TEXT] [--cache-dir DIR] [--small]

Parts run one after the other, those the bars need first: the server as SPQ (half-rank attention), float16 and int8 at
batch 1, 8, 32 and 64, SPQ with a 16-bit KV cache beside the int8 one, what each takes of the device by the driver's
account, then the rivals that are installed. The JSON is written after every part, so whatever ends the run loses one
part at most, and --resume does what is left. A part that fails is named with its reason, and the next one follows.
This process makes no CUDA context. --small: a tiny model, to test the program, on a CPU too.
Exit status: 0 when every part that could run here gave its rows, 1 when one failed or was not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_bars import judged, markdown
from benchmarks.gpu_parts import MODELS, Part, PartSkipped, Workshop, all_parts
from benchmarks.gpu_servers import Load
from kernels.gpu_check import run_part

Row = dict[str, Any]
SMALL = "small"
LEAST_S = 20.0  # with less time left, no part is begun
RIVALS_SHARE = 0.5  # of the time left, for one rival at most: the others are to have their turn
Runner = Callable[[Part, float], Iterator[Row]]  # rows of a part until a time.monotonic()


def run_parts(parts: list[Part], run: Runner, report: Row, deadline: float, save: Callable[[], None]) -> None:
    """Run what `report` has not yet as "ok" or "skipped"; put every part into it, and save after each."""
    done = {part["part"] for part in report["parts"] if part["status"] in ("ok", "skipped")}
    due = [part for part in parts if part.name not in done]
    kept = [part for part in report["parts"] if part["part"] not in {part.name for part in due}]
    report["parts"] = kept + [_entry(part) for part in due]
    for entry, part in zip(report["parts"][len(kept) :], due, strict=True):
        left = deadline - time.monotonic()
        if left < LEAST_S:
            entry["reason"] = "the time limit was reached before it"
            continue
        began = time.monotonic()
        limit = began + left * RIVALS_SHARE if part.package is not None else deadline
        entry["date_utc"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            for row in run(part, limit):
                entry["rows"].append(row)
            entry["status"], entry["reason"] = "ok", None
        except PartSkipped as error:
            entry["status"], entry["reason"] = "skipped", str(error)
        except TimeoutError:
            entry["status"], entry["reason"] = "failed", f"stopped after {time.monotonic() - began:.0f} s: time limit"
        except Exception as error:  # one part must not cost the others; its reason stands in the report
            entry["status"], entry["reason"] = "failed", f"{type(error).__name__}: {error}"
        entry["seconds"] = round(time.monotonic() - began, 1)
        _say(entry)
        save()
    save()


def _entry(part: Part) -> Row:
    return {
        "part": part.name, "model": part.model, "systems": [part.system], "status": "not run",
        "reason": "the run ended before it", "date_utc": None, "seconds": 0.0, "rows": [],
    }  # fmt: skip


def _say(entry: Row) -> None:
    print(f"== {entry['part']}: {entry['status']}, {entry['seconds']} s {entry['reason'] or ''}", flush=True)
    for row in entry["rows"]:
        shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items() if v is not None}
        print("  " + "  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def new_report(environment: Row, load: Load, model: str) -> Row:
    """What every figure depends on, without figures."""
    root = str(Path(__file__).resolve().parents[1])
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", root, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "-C", root, "status", "--porcelain")),
        "driver": _output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "environment": environment,
        "load": {name: getattr(load, name) for name in Load.__slots__},
        "bar_model": model,
        "parts": [],
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _environment(limit_s: float) -> Row:
    """Versions and GPU, asked in another process. Raises SystemExit with its error."""
    part = run_part([sys.executable, "-m", "kernels.gpu.check_part"], "environment", limit_s)
    if part.error is not None:
        raise SystemExit(part.error)
    return part.rows[0]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.time_limit
    levels = tuple(sorted(map(int, options.levels.split(","))))
    load = Load(levels, options.prompt_tokens, options.new_tokens, options.rounds)
    environment = _environment(options.time_limit)
    gpu = environment.get("gpu")
    if gpu is None and not options.small:
        print("no CUDA device: nothing to measure here; --small tests the program", file=sys.stderr)
        return 2
    capability = float(environment.get("compute_capability", 0))
    dtype = "float32" if gpu is None else "bfloat16" if capability >= 9 else "float16"
    models = (SMALL,) if options.small else MODELS
    parts = [p for p in all_parts(models, levels, dtype) if any(text in p.name for text in options.parts.split(","))]
    report = new_report(environment, load, models[0])
    if options.resume and options.json.is_file():
        before = json.loads(options.json.read_text("utf-8"))
        if before["load"] != json.loads(json.dumps(report["load"])) or before["environment"] != environment:
            parser.error(f"--resume: {options.json} was made with another load or on another machine")
        report["parts"] = before["parts"]
    if options.kernels is not None:
        report["kernels"] = json.loads(options.kernels.read_text("utf-8"))

    def save() -> None:
        report["bars"] = judged(report)
        kept = {name: value for name, value in report.items() if name != "kernels"}
        options.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
        if options.markdown is not None:
            options.markdown.write_text(markdown(report) + "\n", "utf-8")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server it runs is ended too
    with tempfile.TemporaryDirectory(dir=options.cache_dir, prefix="gpu-serving-") as folder:
        workshop = Workshop(Path(folder), "cpu" if gpu is None else "cuda", load, os.environ)
        run_parts(parts, workshop.run, report, deadline, save)
    print("\n" + markdown(report))
    return 0 if all(part["status"] in ("ok", "skipped") for part in report["parts"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_serving", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file of results, written after every part")
    parser.add_argument("--markdown", type=Path, help="file of tables, likewise")
    parser.add_argument("--time-limit", type=float, default=560.0, help="seconds in all (default: 560)")
    parser.add_argument("--resume", action="store_true", help="keep what --json has, run what is missing or failed")
    parser.add_argument("--kernels", type=Path, help="JSON of kernels.gpu_check, for the bar of the int8 products")
    parser.add_argument("--parts", default="", help="only parts with one of these texts in their name")
    parser.add_argument(
        "--cache-dir", type=Path, help="for one model at a time, up to 17 GB (default: that of tempfile)"
    )
    parser.add_argument("--levels", default="1,8,32,64", help="streams at once (default: 1,8,32,64)")
    parser.add_argument("--prompt-tokens", type=int, default=768, help="per prompt (default: 768)")
    parser.add_argument("--new-tokens", type=int, default=256, help="per answer (default: 256)")
    parser.add_argument("--rounds", type=int, default=2, help="bursts of each size (default: 2)")
    parser.add_argument("--small", action="store_true", help="a tiny model: does everything run?")
    return parser


if __name__ == "__main__":
    sys.exit(main())
