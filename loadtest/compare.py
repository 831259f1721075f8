"""`python -m loadtest.compare`: servers under the same load in turn, and a report of who is better in what.

    python -m loadtest.compare --model MODEL --rivals RIVALS --servers ours,llama.cpp-q8_0,vllm-gptq4
    python -m loadtest.compare --model MODEL --server spq=http://spq:8000 --server gptq=http://vllm:8000
    python -m loadtest.compare --model MODEL --server spq=http://spq:8000 --rounds 1 --add

The first starts them, the second finds them running. The last is for servers that must not run at once: each call adds
its rounds to what --out has, and the report is of all of them. `contest` says how turns are taken, `equal` what is
refused, `verdict` what the sentences mean.
Exit status: 0; 3 where the work was not equal, with the reason in the report; 1 where the subject did not start.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from pathlib import Path

from loadtest import report
from loadtest.client import UnequalWork
from loadtest.contender import Contender
from loadtest.contest import Load, compare, given_memory, measure_memory
from loadtest.device import gpu_bytes
from loadtest.discover import NoServer, find_model
from loadtest.equal import check_extra, check_turns
from loadtest.facts import cpu_flags, facts_of
from loadtest.process import NotReady
from loadtest.servers import Server, catalogue, given, with_flags

UNEQUAL = 3
RIVALS = {  # what install_rivals.sh makes in its folder, by option
    "llama_server": "llama.cpp/bin/llama-server",
    "gguf": "gguf",
    "transformers_python": "transformers/bin/python",
    "vllm_python": "vllm/bin/python",
    "gptq": "gptq4",
}

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the report, print its table and verdict."""
    command = parser()
    options = command.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        contenders = make_contenders(options)
        before = report.Results.load(options.out) if options.add and (options.out / report.RESULTS).exists() else None
        results = begin(options, contenders, before)
    except (KeyError, ValueError, NoServer) as error:
        command.error(f"no server or path of the name {error}" if isinstance(error, KeyError) else str(error))
    except UnequalWork as error:
        return _refused(str(error))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers it runs are ended too
    try:
        measure(options, contenders, results)
        check_turns(results.turns)
    except UnequalWork as error:
        report.write_refusal(results, str(error), options.out)
        return _refused(str(error))
    except NotReady as error:
        print(f"a server did not start: {error}", file=sys.stderr)
        return 1
    report.write(results, options.out)
    print((options.out / report.MARKDOWN).read_text("utf-8"))
    return 0


def _refused(reason: str) -> int:
    print(f"not compared, because the work was not equal: {reason}", file=sys.stderr)
    return UNEQUAL


def make_contenders(options: argparse.Namespace) -> list[Contender]:
    """The servers asked for, none started. Raises KeyError, ValueError, NoServer, UnequalWork."""
    known = catalogue()
    for variant in options.variant:
        added = with_flags(known, variant)
        known[added.name] = added
    servers = [known[name] for name in options.servers.split(",") if name]
    servers += [_found(options, text) for text in options.server]
    if not servers:
        raise ValueError("no server: --servers names those to start, --server those that run")
    more = {name: json.loads(text) for name, _, text in (fields.partition("=") for fields in options.extra)}
    servers = [dataclasses.replace(s, extra={**s.extra, **more.get(s.name, {})}) for s in servers]
    options.cache.mkdir(parents=True, exist_ok=True)
    paths = {name: str(options.rivals / path) for name, path in RIVALS.items()} if options.rivals else {}
    paths |= {k: str(v) for k, v in vars(options).items() if v is not None}
    paths |= {"python": sys.executable, "cores": f"0-{options.threads - 1}"}
    for server in servers:
        check_extra(server.name, more.get(server.name, {}))
    return [Contender(server, paths, os.environ, options.cache, options.api_key or None) for server in servers]


def _found(options: argparse.Namespace, text: str) -> Server:
    """The server of NAME=URL, with the fields that it takes."""
    name, _, url = text.partition("=")
    if not name or not url:
        raise ValueError(f"--server {text}: write NAME=URL")
    found = find_model(url.rstrip("/"), options.api_key or None)
    extra = {"ignore_eos": True} if found.takes_ignore_eos else {}
    extra |= {"cache_prompt": False} if found.owner == "llamacpp" else {}
    return given(name, url.rstrip("/"), found.model, extra, takes_ids=found.takes_ignore_eos)


def begin(options: argparse.Namespace, contenders: list[Contender], before: report.Results | None) -> report.Results:
    """Results without the turns to come. Raises ValueError where those `before` are of another load."""
    names = [contender.server.name for contender in contenders]
    bits = {contender.server.name: contender.server.weights_bits for contender in contenders}
    bits |= {name: int(number) for name, _, number in (text.partition("=") for text in options.bits)}
    facts = facts_of(options, contenders)
    if before is None:
        return report.Results(options.subject or names[0], facts, bits, [], {})
    if before.facts["load"] != facts["load"]:
        raise ValueError(f"--add: {options.out} was made with another load: {before.facts['load']}")
    facts["servers"] = {**before.facts["servers"], **facts["servers"]}
    return report.Results(options.subject or before.subject, facts, before.bits | bits, before.turns, before.memory)


def measure(options: argparse.Namespace, contenders: list[Contender], results: report.Results) -> None:
    """Fill `results`, and save them after every turn. Who does not start in the memory runs is left out and named.

    Raises UnequalWork, and NotReady where the subject or, later, any does not start.
    """
    load = Load(options.model, options.prompt_tokens, options.new_tokens, options.max_others, options.any_chunks)
    levels = [int(level) for level in options.levels.split(",")]
    read = {name: int(number) for name, _, number in (text.partition("=") for text in options.device_bytes)}
    left_out: dict[str, str] = {}
    for contender in list(contenders):
        name = contender.server.name
        try:
            reason = contender.cannot_run(cpu_flags()) if gpu_bytes() is None else None
            if reason is None and contender.is_ours_to_run and not options.skip_memory:
                results.memory[name] = found = measure_memory(contender, load, levels)
                log.info("%s: peak %.0f MiB", name, found.peak_bytes / 2**20)
        except NotReady as error:  # one that does not start must not cost the others
            reason = str(error)
        if reason is not None:
            log.error("%s is left out: %s", name, reason)
            left_out[name] = reason
            results.bits.pop(name)
            contenders.remove(contender)
    if left_out:
        results.facts["left out"] = left_out
    if results.subject not in results.bits:
        raise NotReady(f"{results.subject}: {left_out[results.subject]}")
    alone = options.alone == "on" or (options.alone == "auto" and gpu_bytes() is not None)
    names = {contender.server.name for contender in contenders}
    first = 1 + max((turn.round for turn in results.turns if turn.server in names), default=0)
    rounds = list(range(first, first + options.rounds))
    for turn in compare(contenders, load, levels, rounds, options.attempts, alone):
        results.turns.append(turn)
        results.save(options.out)
    for contender in contenders:
        if not contender.is_ours_to_run and not options.skip_memory:
            results.memory[contender.server.name] = given_memory(contender, read.get(contender.server.name))
    results.save(options.out)


def parser() -> argparse.ArgumentParser:
    """All options; benchmarks.rivals has them too."""
    made = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__.split("\n")[0])
    which = made.add_argument_group("servers")
    which.add_argument("--servers", default="", help=f"to start, of {', '.join(catalogue())}, and variants")
    which.add_argument("--server", action="append", default=[], metavar="NAME=URL", help="one that runs; repeat")
    which.add_argument(
        "--variant", action="append", default=[], metavar="NAME=BASE FLAG ...", help="BASE with flags appended"
    )
    which.add_argument("--subject", help="whom ratios are of (default: the first)")
    which.add_argument("--bits", action="append", default=[], metavar="NAME=BITS", help="of a running server's weights")
    which.add_argument(
        "--device-bytes", action="append", default=[], metavar="NAME=BYTES",
        help="of the GPU, that a running server takes, where nvidia-smi is not to be had here",
    )  # fmt: skip
    which.add_argument("--api-key", help="for servers that run")
    which.add_argument(
        "--extra", action="append", default=[], metavar="NAME=JSON", help="fields of requests that one server gets"
    )
    which.add_argument(
        "--alone", choices=("auto", "on", "off"), default="auto",
        help="start each server for its turn and end it after; auto: where there is a GPU",
    )  # fmt: skip
    where = made.add_argument_group("files")
    where.add_argument("--model", type=Path, required=True, help="folder; its tokenizer.json makes prompts")
    where.add_argument("--rivals", type=Path, help="folder that install_rivals.sh made; the next five lie in it")
    where.add_argument("--llama-server", type=Path, help="program")
    where.add_argument("--gguf", type=Path, help="folder of q8_0.gguf, f16.gguf, q4_0.gguf")
    where.add_argument("--transformers-python", type=Path, help="python that has transformers[serving] and GPTQModel")
    where.add_argument("--vllm-python", type=Path, help="python that has vLLM")
    where.add_argument("--gptq", type=Path, help="folder of the model with GPTQ's 4-bit weights")
    default = Path("~/.cache/spq-serve/rivals").expanduser()
    where.add_argument("--cache", type=Path, default=default, help="for our packed model and the servers' logs")
    where.add_argument("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
    where.add_argument("--add", action="store_true", help="keep what --out has, and add to it")
    work = made.add_argument_group("load")
    work.add_argument("--levels", default="1,8,16", help="streams at once (default: 1,8,16)")
    work.add_argument("--rounds", type=int, default=3, help="turns of each server at each level (default: 3)")
    work.add_argument("--attempts", type=int, default=3, help="at a turn that others disturb (default: 3)")
    work.add_argument("--max-others", type=float, default=0.25, help="cores that others may take (default: 0.25)")
    work.add_argument("--prompt-tokens", type=int, default=128, help="per prompt (default: 128)")
    work.add_argument("--new-tokens", type=int, default=64, help="per answer (default: 64)")
    work.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each server (default: cores)")
    work.add_argument("--skip-memory", action="store_true", help="times only")
    work.add_argument(
        "--any-chunks", action="store_true", help="let tokens come several at a time; gaps are then between chunks"
    )
    work.add_argument("--note", default="", help="a sentence for the report")
    return made


if __name__ == "__main__":
    sys.exit(main())
