"""`spq-serve`: arguments and SPQ_* variables to a `ServerConfig`, and a running uvicorn.

The only reader of the environment in the server. Every flag has a variable of the same name; a flag wins.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from server.api.access_log import LOGGER
from server.config import ServerConfig
from server.listener import make_server
from server.service import Service
from spq.sizes import parse_bytes

# How long the engine's thread waits before it asks the event loop's for the interpreter. Python's 5 ms are three steps of a
# small model: 3,024 tokens/s, 2,681 without (median of 8 rounds in turn, 16 streams, demo model, EPYC Zen 3, 2026-11-22).
SWITCH_S = 0.0002


class WrongOption(ValueError):
    """An option that cannot be used; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Option:
    """One flag. The field of ServerConfig has the flag's name unless `field` says otherwise."""

    flag: str
    help: str
    parse: Callable[[str], Any] = str
    field: str | None = None
    choices: tuple[str, ...] | None = None
    many: bool = False  # may be repeated; the variable holds a comma-separated list

    @property
    def name(self) -> str:
        """Field of ServerConfig."""
        return self.field or self.flag.replace("-", "_")

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return "SPQ_" + self.flag.replace("-", "_").upper()


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{text!r} is neither on nor off")


FLOATS = ("float32", "float16", "bfloat16")
OPTIONS: dict[str, tuple[Option, ...]] = {
    "model": (
        Option("model", "packed folder, Hugging Face folder, or hub id"),
        Option("revision", "branch, tag or commit, for a hub id"),
        Option(
            "served-model-name",
            "name clients use; repeat for several (default: the folder's name)",
            field="served_model_names",
            many=True,
        ),
        Option(
            "preset",
            "how to compress a model that is not packed; none serves it as it is",
            choices=("default", "paper", "int8", "int4", "none"),
        ),
        Option(
            "weight-budget",
            "bytes its weights may take, e.g. 4GiB: rank, width and bits are chosen by matrix, in place of a preset",
            parse_bytes,
        ),
        Option("calibration", "text file to calibrate on (default: the bundled sample)"),
        Option("cache-dir", "where compressed models are kept"),
        Option("chat-template", "Jinja file that replaces the model's chat template"),
        Option(
            "tool-format",
            "how the model writes calls of tools; auto: as its chat template shows",
            choices=("auto", "json", "hermes", "llama3", "mistral", "mistral11", "pythonic"),
        ),
        Option("max-model-len", "tokens of prompt and answer (default: the model's, or what fits)", int),
    ),
    "device and memory": (
        Option("device", "where to run", choices=("auto", "cuda", "cpu")),
        Option("dtype", "of activations; auto: float32 on CPU, a 16-bit type on CUDA", choices=("auto", *FLOATS)),
        Option(
            "backend",
            "kernels; auto: Triton on CUDA, native (C) where it was built, else cpu",
            choices=("auto", "reference", "cpu", "native", "triton"),
        ),
        Option(
            "kv-dtype",
            "of the KV cache; auto: int8 with the triton and native backends, else as --dtype",
            choices=("auto", "int8", *FLOATS),
        ),
        Option(
            "memory-budget",
            "bytes the whole process may hold on the device, e.g. 6GiB (default: what is free)",
            parse_bytes,
        ),
        Option("kv-memory", "bytes of KV cache at most, e.g. 512MiB (default: what the budget leaves)", parse_bytes),
        Option(
            "resident",
            "weights of layers in memory; coded: compressed without loss on the host, each decoded while the one "
            "before runs",
            choices=("decoded", "coded"),
        ),
        Option(
            "resident-tolerance",
            "share (0..1) of tokens/s of one stream that coded layers may cost; 1: as few bytes as possible",
            float,
        ),
        Option("int8-prefill", "on a GPU, int8 activations for prompts too: faster, at some loss; on or off", _switch),
        Option("cuda-graphs", "on a GPU, record decode steps at start and replay them: on or off", _switch),
        Option("threads", "CPU threads for tensor work (default: all cores where that is faster, else one)", int),
    ),
    "scheduling": (
        Option("max-num-seqs", "sequences running at once", int),
        Option("max-batch-tokens", "tokens per step, so also the longest prefill chunk", int),
        Option("block-size", "tokens per KV page", int),
        Option("prefix-caching", "share KV pages of equal prompt beginnings: on or off", _switch),
        Option("admission-reserve", "share (0..1) of the tokens still to come that admission keeps free", float),
        Option(
            "scheduling-policy",
            "who goes first: fcfs, by arrival; priority, by the field of the request, lower first",
            choices=("fcfs", "priority"),
        ),
        Option(
            "speculative-ngram",
            "tokens guessed ahead, where the last few stood in the text before (0: off); answers stay the same",
            int,
        ),
        Option("max-queue", "sequences that may wait; more are refused with 503", int),
    ),
    "HTTP": (
        Option("host", "address to listen on"),
        Option("port", "port to listen on", int),
        Option(
            "api-key",
            "key that clients must send, KEY or NAME=KEY; repeat for several (default: none)",
            field="api_keys",
            many=True,
        ),
        Option("api-key-file", "TOML file of keys: a table [NAME] each, with key or sha256, and limits of its own"),
        Option("admin-key", "key of /admin, which reloads, drains, puts to sleep and wakes (default: all is refused)"),
        Option("requests-per-minute", "requests of each API key; more are refused with 429", int),
        Option("tokens-per-minute", "tokens of each API key, of prompts and answers, before 429", int),
        Option(
            "cors-origin",
            "origin of web pages that may call, e.g. https://chat.example, or *; repeat for several (default: none)",
            field="cors_origins",
            many=True,
        ),
        Option("tls-cert", "PEM file of the certificate and its chain: HTTPS instead of HTTP"),
        Option("tls-key", "PEM file of its private key"),
        Option(
            "sleep-idle-seconds",
            "seconds without a request after which the model is dropped; the next one loads it again (default: never)",
            float,
            field="sleep_idle_s",
        ),
        Option("request-timeout", "seconds a request may take (default: no limit)", float, field="request_timeout_s"),
        Option(
            "client-timeout",
            "seconds that a client may take to send or to read the next part, before its connection is closed",
            float,
            field="client_timeout_s",
        ),
        Option("drain-timeout", "seconds that accepted requests get after SIGTERM", float, field="drain_timeout_s"),
        Option("max-body", "bytes of a request body at most, e.g. 8MiB", parse_bytes, field="max_body_bytes"),
        Option("max-sequences-per-request", "n times prompts of one call", int),
        Option(
            "response-store",
            "bytes of answers of /v1/responses kept in memory to be continued, e.g. 64MiB; 0: none",
            parse_bytes,
            field="response_store_bytes",
        ),
        Option(
            "trust-request-chat-template",
            "let a request bring its own chat template, a program that may keep all others waiting: on or off",
            _switch,
        ),
        Option("access-log", "a line for each request; json: an object, on stdout", choices=("text", "json", "off")),
        Option(
            "otlp-endpoint",
            "OpenTelemetry collector that gets a trace of each request, OTLP over HTTP, e.g. http://127.0.0.1:4318 "
            "(default: none); needs the extra otel",
        ),
        Option("log-level", "how much to log", choices=("debug", "info", "warning", "error")),
    ),
}


def read_config(arguments: list[str], environment: Mapping[str, str]) -> ServerConfig:
    """As `make_config`, for a command line: exits with 2 and one line on a wrong option."""
    try:
        return make_config(arguments, environment)
    except WrongOption as error:
        argparse.ArgumentParser.error(_parser(), str(error))


def make_config(arguments: list[str], environment: Mapping[str, str] | None = None) -> ServerConfig:
    """Options from flags, then SPQ_* variables (None: this process's own), then defaults. Raises WrongOption."""
    environment = os.environ if environment is None else environment
    parser = _parser()
    given, values = vars(parser.parse_args(arguments)), dict[str, Any]()
    known = {option.variable for group in OPTIONS.values() for option in group}
    for group in OPTIONS.values():
        for option in group:
            texts, source = given[option.name], f"--{option.flag}"
            if texts is None and environment.get(option.variable):
                source = option.variable
                text = environment[option.variable]
                texts = [part.strip() for part in text.split(",") if part.strip()] if option.many else text
            if texts is None:
                continue
            try:
                values[option.name] = tuple(map(option.parse, texts)) if option.many else option.parse(texts)
            except ValueError as error:
                parser.error(f"{source}: {error}")
    for name in sorted(n for n in environment if n.startswith("SPQ_") and n not in known):
        logging.getLogger(__name__).debug("variable %s is not an option of spq-serve", name)
    if "model" not in values:
        parser.error("--model (or SPQ_MODEL) is missing: give a packed folder, a Hugging Face folder or a hub id")
    try:
        return ServerConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            parser.error(first["msg"])
        flags = {option.name: option.flag for group in OPTIONS.values() for option in group}
        parser.error(f"--{flags[str(first['loc'][0])]}: {first['msg']}, got {first['input']!r}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 after a drain, 1 if the model could not be served, 2 for a wrong option."""
    config = read_config(sys.argv[1:] if arguments is None else arguments, os.environ)
    sys.setswitchinterval(SWITCH_S)
    set_up_logging(config)
    service = Service(config)
    try:
        server = make_server(service)
    except (OSError, ValueError) as error:
        print(f"spq-serve: {error}", file=sys.stderr)
        sys.exit(2)
    server.run()
    if service.is_starting:  # inside a long matrix operation; the interpreter cannot end while torch's threads run
        os._exit(int(server.failed))
    if server.failed:
        sys.exit(1)


def set_up_logging(config: ServerConfig) -> None:
    """What the process says goes to stderr; a JSON access log to stdout, as it is and nowhere else."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if config.access_log == "json":
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log = logging.getLogger(LOGGER)
        log.handlers, log.propagate = [handler], False


class _Parser(argparse.ArgumentParser):
    """Raises where argparse's own would end the process."""

    def error(self, message: str) -> NoReturn:
        raise WrongOption(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="spq-serve",
        description="Serve a LLaMA-family model over an OpenAI-compatible API, compressed with SPQ.",
        epilog="Every flag has an environment variable: --max-model-len is SPQ_MAX_MODEL_LEN. A flag wins.",
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            default = ServerConfig.model_fields[option.name].default
            note = f" (default: {default})" if default is not None and default != () and option.name != "model" else ""
            group.add_argument(
                f"--{option.flag}",
                dest=option.name,
                action="append" if option.many else "store",
                choices=option.choices,
                metavar=None if option.choices else option.flag.split("-")[-1].upper(),
                help=(option.help + note).replace("%", "%%"),
            )
    return parser
