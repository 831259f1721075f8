"""spq-eval: the command line of `judge`. Errors end the process with one line and status 2.

Reads no environment variables; `spq.cli` is the compressor's command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from spq.cli import choose_device
from spq.errors import OptionError, SpqError
from spq.hub import find_model
from spq.judge import Judge
from spq.quality import COMPOSITE_FORMULA, COMPOSITE_NAME
from spq.rows import Row, render_rows
from spq.scoring import LocalModel
from spq.served import ServedModel
from spq.tasks import Tasks
from spq.texts import EvaluationText, c4, plain_text, wikitext

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NOT_BY_URL = "not available by URL: KL (a server gives no full logits), bytes of files, TCr, MCr, composite"


def build_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        prog="spq-eval",
        description="Measure models on held-out text and tasks, alike: folders in process, servers by URL.",
        epilog="docs/evaluation.md says what the numbers mean.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="model folder, plain or packed, hub id, or URL of a running server"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per model and line, for spq.pareto")
    text = parser.add_argument_group("texts")
    text.add_argument("--text", metavar="FILE", type=Path, action="append", help="UTF-8 text; may be repeated")
    text.add_argument("--wikitext", metavar="FOLDER", type=Path, help="WikiText-2: its test part")
    text.add_argument("--c4", metavar="FILE", type=Path, help="C4 documents, JSON lines")
    text.add_argument("--reference", metavar="FOLDER", help="the original: agreement, KL and retention against it")
    text.add_argument("--window", metavar="TOKENS", type=int, help="default: the context, at most 2048")
    text.add_argument("--max-tokens", metavar="TOKENS", type=int, help="of each text (default: all)")
    text.add_argument("--bos", action="store_true", help="begin each window with BOS")
    task = parser.add_argument_group("tasks (need the extra eval)")
    task.add_argument("--truthfulqa", metavar="FILE", type=Path, help="mc_task.json: mc1 and mc2")
    task.add_argument("--gsm8k", metavar="FILE", type=Path, help="test.jsonl, without worked examples unless:")
    task.add_argument("--gsm8k-shots", metavar="FILE", type=Path, help="train.jsonl: five worked examples")
    task.add_argument("--limit", metavar="N", type=int, help="questions per task (default: all)")
    task.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="for tasks by URL (default: --reference)")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", metavar="NAME", help="of folders: auto, cpu, cuda or cuda:N (default: auto)")
    where.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="of folders; auto: float32 on CPU, float16 on CUDA"
    )
    where.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: PyTorch's)")
    where.add_argument("--concurrency", metavar="N", type=int, help="requests at a time to a server (default: 4)")
    where.add_argument("--api-key", metavar="KEY", help="for a server that wants one")
    return parser


def is_url(model: str) -> bool:
    """Whether a MODEL names a server."""
    return model.startswith(("http://", "https://"))


def read_texts(arguments: argparse.Namespace) -> list[EvaluationText]:
    """All texts asked for. Raises SpqError, also where two have one name."""
    texts = [plain_text(path) for path in arguments.text or ()]
    texts += [] if arguments.wikitext is None else [wikitext(arguments.wikitext)]
    texts += [] if arguments.c4 is None else [c4(arguments.c4)]
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"two texts are named {name!r}; rename one file")
    return texts


def refuse_unused(arguments: argparse.Namespace) -> None:
    """Raise OptionError for an option that is out of range or means nothing without another."""
    has_text = bool(arguments.text or arguments.wikitext or arguments.c4)
    has_task = bool(arguments.truthfulqa or arguments.gsm8k)
    has_url = any(map(is_url, arguments.models))
    if not has_text and not has_task:
        raise OptionError("nothing to measure; give --text, --wikitext, --c4, --truthfulqa or --gsm8k")
    has_folder = not all(map(is_url, arguments.models)) or arguments.reference is not None
    needs = {
        "a text": (has_text, ("window", "max_tokens", "bos")),
        "a text or a task by URL": (has_text or (has_task and has_url), ("reference",)),
        "a task": (has_task, ("limit",)),
        "--gsm8k": (arguments.gsm8k is not None, ("gsm8k_shots",)),
        "a task by URL": (has_task and has_url, ("tokenizer",)),
        "a URL": (has_url, ("concurrency", "api_key")),
        "a folder": (has_folder, ("device", "threads")),
    }
    for what, (there, names) in needs.items():
        for name in names:
            if getattr(arguments, name) not in (None, False) and not there:
                raise OptionError(f"--{name.replace('_', '-')} without {what}")
    for name in ("window", "max_tokens", "limit", "threads", "concurrency"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} {value}: give at least 1")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows, one model after the other, each as soon as it is there. Raises SpqError."""
    refuse_unused(arguments)
    texts = read_texts(arguments)
    tasks = None
    if arguments.truthfulqa is not None or arguments.gsm8k is not None:
        tokenizer = arguments.tokenizer or (None if arguments.reference is None else Path(arguments.reference))
        if tokenizer is None and any(map(is_url, arguments.models)):
            raise OptionError("tasks by URL need the model's tokenizer; add --tokenizer FOLDER")
        tasks = Tasks(arguments.truthfulqa, arguments.gsm8k, arguments.gsm8k_shots, arguments.limit, tokenizer)
        tasks.check()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    dtype = DTYPES.get(arguments.dtype, torch.float32 if device.type == "cpu" else torch.float16)
    models = [model if is_url(model) else find_model(model, None) for model in arguments.models]
    reference = None
    if arguments.reference is not None:
        reference = LocalModel(find_model(arguments.reference, None), device, dtype)
    with tqdm(total=len(models), unit="model", disable=None) as bar:
        judge = Judge(
            texts, device, dtype, reference, arguments.window, arguments.max_tokens, arguments.bos, tasks,
            on_text=bar.set_postfix_str,
        )  # fmt: skip
        for given, model in zip(arguments.models, models, strict=True):
            bar.set_description_str(Path(given).name)
            if isinstance(model, str):
                server = ServedModel(model, api_key=arguments.api_key, concurrency=arguments.concurrency or 4)
                yield judge.server(server)
            else:
                yield judge.folder(model, given)
            bar.update()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for anything the user can mend."""
    arguments = build_parser().parse_args(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    rows = []
    try:
        for row in run(arguments):
            rows.append(row)
            if arguments.json:
                print(row.model_dump_json(), flush=True)
    except SpqError as error:
        print(f"spq-eval: {error}", file=sys.stderr)
        return 2
    if not arguments.json:
        print(render_rows(rows))
        if any(row.composite is not None for row in rows):
            print(f"\n{COMPOSITE_NAME}: {COMPOSITE_FORMULA}")
        if any(map(is_url, arguments.models)):
            print(f"\n{NOT_BY_URL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
