"""`python -m benchmarks.memory FOLDER`: where the memory of a server goes, and how long each part of its start takes.

The start-up of `server.cli` and `server.startup` in this process and in its order, in a thread as there, then prompts
through the engine; no HTTP. Per phase: seconds, resident memory behind it, the highest within it (the kernel's own
mark, set back at each phase; the engine sets it back once more, before its largest step), and how resident memory is
made up: private pages, and pages of files (libraries), which the kernel could take back. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.engine.engine import Engine

MIB = 2**20
IMPORTS = ("server.cli", "torch", "server.startup")  # what each takes is what those before it have not imported
WATCHED = ("torch._dynamo", "torch._inductor", "triton", "sympy", "transformers.modeling_utils", "numpy")


def read_status() -> dict[str, int]:
    """Bytes of this process: VmRSS, VmHWM, RssAnon, RssFile."""
    lines = [line.split() for line in Path("/proc/self/status").read_text("ascii").splitlines()]
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0].startswith(("VmRSS", "VmHWM", "Rss"))}


class Phases:
    """Readings at the ends of phases; each is printed as it is taken."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._started_s = time.perf_counter()

    def end(self, name: str) -> None:
        """The phase that began with the last call has ended."""
        now, status = time.perf_counter(), read_status()
        row = {"phase": name, "seconds": now - self._started_s, **status}
        before = self.rows[-1]["VmRSS"] if self.rows else 0
        print(f"{name:28} {row['seconds']:6.2f} s   {(status['VmRSS'] - before) / MIB:+7.1f} = "
              f"{status['VmRSS'] / MIB:6.1f} MiB, at most {status['VmHWM'] / MIB:6.1f}   private "
              f"{status['RssAnon'] / MIB:6.1f}   files {status['RssFile'] / MIB:6.1f}", flush=True)  # fmt: skip
        self.rows.append(row)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back: proc(5)
        self._started_s = time.perf_counter()


async def answer(engine: Engine, streams: int, prompt: int, new: int) -> None:
    """`streams` prompts at once, to the end."""
    from server.core import SamplingParams
    from server.engine.engine import GenerationRequest

    params = SamplingParams(max_tokens=new, temperature=0.0)
    prompts = [[8 + (37 * i + 13 * j) % 200 for j in range(prompt)] for i in range(streams)]
    generations = engine.submit([GenerationRequest(str(i), ids, params) for i, ids in enumerate(prompts)])

    async def read(generation: Any) -> None:
        async for _ in generation:
            continue

    await asyncio.gather(*map(read, generations))


async def measure(options: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All phases in order."""
    phases = Phases()
    phases.end("interpreter")
    for name in IMPORTS:
        importlib.import_module(name)
        phases.end(f"import {name}")
    from server.config import ServerConfig
    from server.startup import start_up

    def report(phase: str, done: float, detail: str = "", eta_s: float | None = None) -> None:
        if phase == "loading" and done in (0.0, 1.0):
            phases.end("weights" if done else "tokenizer, configuration")

    engine, _tokenizer = await asyncio.to_thread(start_up, ServerConfig(**options), report, on_step=lambda *times: None)
    phases.end("largest step, KV cache")
    engine.start(asyncio.get_running_loop())
    for streams in map(int, arguments.streams.split(",")):
        await answer(engine, streams, arguments.prompt_tokens, arguments.new_tokens)
        phases.end(f"{streams} streams")
    await engine.drain(0)
    ledger = {kind: size for kind, size in engine.info.ledger.items() if kind != "free"}
    print("ledger: " + ", ".join(f"{kind} {size / MIB:.1f}" for kind, size in ledger.items()) + " MiB")
    return phases.rows


def main() -> None:
    """Measure, print a line per phase, what was imported that a server can do without, then JSON."""
    arguments = _parser().parse_args()
    options = {"model": str(arguments.folder), "preset": "none", "threads": arguments.threads,
               "max_num_seqs": arguments.max_num_seqs, "max_model_len": arguments.max_model_len,
               "kv_memory": arguments.kv_memory * MIB, "prefix_caching": False}  # fmt: skip
    rows = asyncio.run(measure(options, arguments))
    imported = [name for name in WATCHED if name in sys.modules]
    print(f"imported, of {', '.join(WATCHED)}: {', '.join(imported) or 'none'}")
    print(json.dumps({"options": options, "phases": rows, "imported": imported}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="model folder, packed or not (that is served as it is)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="as the server's (default: 16)")
    parser.add_argument("--max-model-len", type=int, default=256, help="as the server's (default: 256)")
    parser.add_argument("--kv-memory", type=int, default=80, help="MiB (default: 80, as in loadtest.servers)")
    parser.add_argument("--streams", default="1,8,16", help="bursts (default: 1,8,16)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="per prompt (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=64, help="per answer (default: 64)")
    return parser


if __name__ == "__main__":
    main()
