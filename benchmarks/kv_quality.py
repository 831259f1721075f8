"""What the dtype of the KV cache costs in quality: python -m benchmarks.kv_quality --case FOLDER=TEXT [--case ...].

Each text is cut into windows of the model's context and run through the server's model in chunks, once per dtype over a
paged cache of its own; every key and value is read back from that cache. Compared with the float32 cache, token by
token: perplexity (with the standard error of the paired difference), KL divergence, equal most likely tokens, and
greedy answers of 64 tokens.

--outliers F multiplies one rotary pair of channels of each key head by F and divides it in the queries by F. The
function stays what it was, but the keys get outliers, as those of large models have: a stress test for scales.
--as-stored leaves out what the loader does against that (server.model.balance).
Prints Markdown; the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from torch.nn import functional

from kernels.ops import LayerKv, make_ops
from server.core import SamplingParams, ScheduledBatch, Sequence, Timings, Work
from server.engine import inputs
from server.engine.kv_cache import allocate
from server.engine.runner import ModelRunner
from server.model import load
from server.model.llama import Llama
from server.scheduler.blocks import BlockManager
from server.scheduler.scheduler import Scheduler
from spq.calibrate import read_text, tokenize
from spq.checkpoint import open_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
BLOCK, CHUNK = 16, 128  # tokens
PROMPT, ANSWER, ANSWERS = 32, 64, 48  # tokens, tokens, sequences
STORY_MARK = "<|endoftext|>\n"


@dataclass(slots=True)
class Row:
    """One dtype on one model and text."""

    model: str
    dtype: str
    num_tokens: int
    perplexity: float
    change_percent: float  # of perplexity, against float32
    change_error: float  # its standard error
    kl: float  # nats per token, float32 to this
    same_top: float  # share of tokens
    same_answers: float  # share of sequences


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", required=True, metavar="FOLDER=TEXT", help="model and text file")
    parser.add_argument("--tokens", type=int, default=20000, help="of each text (default: 20000)")
    parser.add_argument("--outliers", default="1", help="factors of the stress test, 1 = none (default: 1)")
    parser.add_argument("--as-stored", action="store_true", help="do not even out the channels of keys")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    print(
        "| model | KV | perplexity | change | KL, nats | same top token | same answers |\n|---|---|---|---|---|---|---|"
    )
    began = time.perf_counter()
    for case in arguments.case:
        folder, _, text = case.partition("=")
        for factor in map(float, arguments.outliers.split(",")):
            with tempfile.TemporaryDirectory() as scratch:
                made = Path(folder) if factor == 1 else with_outliers(Path(folder), factor, Path(scratch))
                name = Path(folder).name + ("" if factor == 1 else f", keys x{factor:g}")
                patch = mock.patch.object(load, "balance_projections", lambda q, k, head_dim: (q, k))
                with patch if arguments.as_stored else contextlib.nullcontext():
                    found = measure(made, name, read_text(Path(text)).replace(STORY_MARK, ""), arguments.tokens)
            for row in found:
                print(line(row), flush=True)
            rows += found
    facts = {"torch": torch.__version__, "machine": platform.machine(), "seconds": time.perf_counter() - began}
    print(json.dumps({**facts, **vars(arguments), "rows": [asdict(row) for row in rows]}))


@torch.inference_mode()
def measure(folder: Path, name: str, text: str, num_tokens: int) -> list[Row]:
    """All dtypes on one model."""
    source = open_model(folder)
    spec = source.spec
    window = spec.max_positions
    model, _used = load.load_model(source, make_ops(torch.device("cpu"), torch.float32), window)
    source.close()
    ids = tokenize(folder, text)[:num_tokens]
    windows = ids[: len(ids) // window * window].view(-1, window)
    caches = {n: allocate(spec, -(-window // BLOCK) * BLOCK, d, model.ops.device) for n, d in DTYPES.items()}
    losses: dict[str, list[torch.Tensor]] = {n: [] for n in DTYPES}
    divergence, same = dict.fromkeys(DTYPES, 0.0), dict.fromkeys(DTYPES, 0)
    for tokens in windows.tolist():
        for start in range(0, window, CHUNK):
            scores = {n: chunk_scores(model, cache, tokens, start) for n, cache in caches.items()}
            exact = scores["float32"]
            targets = torch.tensor(tokens[start + 1 : start + CHUNK + 1])
            for n, found in scores.items():
                losses[n].append(functional.nll_loss(found[: len(targets)], targets, reduction="none").double())
                divergence[n] += float((exact.exp() * (exact - found)).sum())
                same[n] += int((found.argmax(-1) == exact.argmax(-1)).sum())
    prompts = [row[:PROMPT] for row in windows.view(-1, min(window, 256))[:ANSWERS].tolist()]
    answers = {n: generate(model, prompts, d) for n, d in DTYPES.items()}
    base = torch.cat(losses["float32"])
    rows = []
    for n in DTYPES:
        change = torch.cat(losses[n]) - base
        rows.append(
            Row(
                model=name,
                dtype=n,
                num_tokens=len(base),
                perplexity=torch.cat(losses[n]).mean().exp().item(),
                change_percent=100 * torch.expm1(change.mean()).item(),
                change_error=100 * (change.std() / len(change) ** 0.5).item(),
                kl=divergence[n] / windows.numel(),
                same_top=same[n] / windows.numel(),
                same_answers=sum(map(list.__eq__, answers[n], answers["float32"])) / len(prompts),
            )
        )
    return rows


def chunk_scores(model: Llama, cache: list[LayerKv], tokens: list[int], start: int) -> torch.Tensor:
    """Log-probabilities [CHUNK, vocab] after tokens[start : start + CHUNK], the earlier ones being in the cache."""
    sequence = new_sequence("window", tokens, 0)
    sequence.block_table = list(range(-(-len(tokens) // BLOCK)))
    sequence.num_computed_tokens = start
    work = Work(sequence, min(CHUNK, len(tokens) - start), samples=False)
    host = inputs.collect(ScheduledBatch((work,)), BLOCK, inputs.PageTables())
    step = inputs.to_device(host, BLOCK, model.ops.device)
    hidden = model.forward(step.token_ids, step.positions, host.lengths, step.attention, cache)
    return torch.log_softmax(model.logits(hidden), -1)


def generate(model: Llama, prompts: list[list[int]], dtype: torch.dtype) -> list[list[int]]:
    """Greedy answers, all in one batch."""
    pages = len(prompts) * -(-(PROMPT + ANSWER) // BLOCK)
    runner = ModelRunner(model, allocate(model.spec, pages * BLOCK, dtype, model.ops.device), BLOCK)
    scheduler = Scheduler(
        BlockManager(pages, BLOCK, prefix_caching=False),
        max_num_seqs=len(prompts),
        max_batch_tokens=8 * CHUNK,
        max_model_len=PROMPT + ANSWER,
        admission_reserve=1.0,
    )
    sequences = [new_sequence(str(i), prompt, ANSWER) for i, prompt in enumerate(prompts)]
    for sequence in sequences:
        scheduler.add(sequence)
    while (batch := scheduler.schedule(0.0)) is not None:
        scheduler.commit(batch, runner.run(batch), 0.0)
    return [sequence.token_ids[PROMPT:] for sequence in sequences]


def new_sequence(name: str, tokens: list[int], max_tokens: int) -> Sequence:
    """A greedy one that only its length ends."""
    return Sequence(name, list(tokens), len(tokens), SamplingParams(max_tokens, temperature=0.0), Timings(0.0))


def with_outliers(folder: Path, factor: float, out: Path) -> Path:
    """A plain LLaMA folder with the slowest rotary pair of each key head multiplied and of each query head divided."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    source = open_model(folder)
    size = source.spec.head_dim
    source.close()
    for path in out.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        for name, tensor in tensors.items():
            scale = factor if ".k_proj." in name else 1 / factor if ".q_proj." in name else None
            if scale is not None:
                heads = tensor.view(-1, size, *tensor.shape[1:])
                heads[:, [size // 2 - 1, size - 1]] *= scale
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return out


def line(row: Row) -> str:
    """A line of the table."""
    change = "" if row.dtype == "float32" else f"{row.change_percent:+.4f} ± {row.change_error:.4f} %"
    return (
        f"| {row.model} | {row.dtype} | {row.perplexity:.4f} | {change} | {row.kl:.1e} | {row.same_top:.2%} "
        f"| {row.same_answers:.0%} |"
    )


if __name__ == "__main__":
    main()
