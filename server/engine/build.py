"""From a model folder and the options to a ready engine: load, run the largest step, size the cache from what is left.

Not the download or the compression (`server.service`): the folder is packed, or plain and to be served as it is.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from kernels.ops import make_ops
from server.config import ServerConfig
from server.core import SamplingParams, ScheduledBatch, Sequence, Timings, Work
from server.engine.engine import Engine, ModelInfo
from server.engine.kv_cache import allocate, bytes_per_token
from server.engine.loop import EngineLoop, OnStep
from server.engine.memory import MemoryBudgetError, plan_kv, read_memory
from server.engine.runner import ModelRunner
from server.model.facts import compression_facts
from server.model.llama import Llama
from server.model.load import load_model
from server.scheduler.blocks import BlockManager
from server.scheduler.ngram import NgramDrafter
from server.scheduler.scheduler import Scheduler
from server.sizes import format_bytes
from spq.checkpoint import open_model
from spq.errors import OptionError
from spq.memory import PeakMemory

logger = logging.getLogger(__name__)

KERNEL_ROWS = (1, 5, 17, 33, 65)  # one batch of each class of rows in kernels.gpu.configs
THREAD_TRIALS = 5
THREAD_GAIN = 0.9  # of the time on one thread, or more threads are not worth their waiting

Progress = Callable[[Literal["loading", "warming_up"], float], None]  # phase, share of it done


def build_engine(
    folder: Path,
    config: ServerConfig,
    *,
    progress: Progress,
    on_step: OnStep | None = None,
) -> Engine:
    """A loaded engine, not yet started.

    Raises spq.errors.SpqError (the folder), OptionError (an option), MemoryBudgetError (too little memory).
    """
    device = pick_device(config)
    dtype = pick_dtype(config, device)
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    ops = make_ops(device, dtype, config.backend)
    source = open_model(folder)
    spec = source.spec
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        raise OptionError(
            f"--max-model-len {config.max_model_len} exceeds the model's {spec.max_positions} positions; lower it"
        )
    wanted_len = config.max_model_len or spec.max_positions
    progress("loading", 0.0)
    model, used = load_model(source, ops, wanted_len, lambda done, total: progress("loading", done / total))
    manifest = source.manifest
    source.close()
    before = read_memory(device)
    if config.memory_budget is not None and before.process > config.memory_budget:
        raise MemoryBudgetError(
            f"the process holds {format_bytes(before.process)} with the weights loaded, more than --memory-budget "
            f"{format_bytes(config.memory_budget)}; it needs more than that, plus the KV cache"
        )
    progress("warming_up", 0.0)
    ops.use_threads(threads)
    kv_dtype = dtype if config.kv_dtype == "auto" else getattr(torch, config.kv_dtype)
    workspace = warm_up(model, config, min(config.max_batch_tokens, wanted_len), kv_dtype)
    if config.threads is None and device.type == "cpu":
        pick_threads(model, threads, config.block_size, kv_dtype)
    after = read_memory(device)
    held = max(after.process, before.process + workspace)  # given back after a step, needed again by the next
    after = replace(after, process=held, free=after.free - (held - after.process))
    plan = plan_kv(
        after,
        device=device,
        token_bytes=bytes_per_token(spec, kv_dtype),
        block_size=config.block_size,
        wanted_len=wanted_len,
        explicit_len=config.max_model_len is not None,
        max_num_seqs=config.max_num_seqs,
        memory_budget=config.memory_budget,
        kv_memory=config.kv_memory,
    )
    if plan.max_model_len < wanted_len:
        logger.warning("context limited to %d of %d tokens by memory", plan.max_model_len, wanted_len)
    cache = allocate(spec, plan.num_blocks * config.block_size, kv_dtype, device)
    kv_bytes = plan.num_blocks * config.block_size * bytes_per_token(spec, kv_dtype)
    ledger = {
        "weights": used.weights,
        "low_rank": used.low_rank,
        "kv": kv_bytes,
        "workspace": workspace,
        "other": after.process - workspace - used.weights - used.low_rank,
        "free": plan.limit - after.process - kv_bytes,
    }
    prefix_caching = config.prefix_caching and not model.rope.length_dependent
    blocks = BlockManager(plan.num_blocks, config.block_size, prefix_caching)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_model_len=plan.max_model_len,
        admission_reserve=config.admission_reserve,
        drafter=NgramDrafter(config.speculative_ngram) if config.speculative_ngram else None,
    )
    runner = ModelRunner(model, cache, config.block_size)
    loop = EngineLoop(scheduler, runner, on_step=on_step)
    info = ModelInfo(
        max_model_len=plan.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        block_size=config.block_size,
        num_blocks=plan.num_blocks,
        kv_tokens=plan.num_blocks * config.block_size,
        max_num_seqs=config.max_num_seqs,
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=str(kv_dtype).removeprefix("torch."),
        device=device_name(device),
        backend=ops.name,
        ledger=ledger,
        compression=compression_facts(spec, manifest),
    )
    return Engine(loop, info, max_queue=config.max_queue)


def pick_device(config: ServerConfig) -> torch.device:
    """`auto` is CUDA where torch finds it. Raises OptionError."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda, but torch finds no CUDA device; use --device cpu or install a CUDA build")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def pick_dtype(config: ServerConfig, device: torch.device) -> torch.dtype:
    """`auto`: float32 on CPU; bfloat16 from compute capability 9.0 on, float16 before (int8 converts cheaply to it)."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (9, 0) else torch.float16


def device_name(device: torch.device) -> str:
    """'cuda: NVIDIA ...' or 'cpu'."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"


def pick_threads(model: Llama, cores: int, block_size: int, kv_dtype: torch.dtype) -> None:
    """Keep all cores if they make a single decode step clearly faster than one thread does, else use one.

    The matrices of a small model are done before a second thread has woken, and threads that wait for each other
    suffer most when the machine has other work.
    """
    runner = ModelRunner(model, allocate(model.spec, block_size, kv_dtype, model.ops.device), block_size)
    sequence = Sequence("threads", [0], 1, SamplingParams(max_tokens=1), Timings(time.monotonic()), block_table=[0])
    batch = ScheduledBatch((Work(sequence, 1, samples=True),))
    seconds: dict[int, float] = {}
    for trial in range(THREAD_TRIALS + 1):
        for threads in (cores, 1):
            model.ops.use_threads(threads)
            started = time.perf_counter()
            runner.run(batch)
            spent = time.perf_counter() - started
            if trial:  # the first one starts the threads
                seconds[threads] = min(spent, seconds.get(threads, spent))
    chosen = cores if seconds[cores] < THREAD_GAIN * seconds[1] else 1
    model.ops.use_threads(chosen)
    logger.info(
        "CPU threads: %d (a decode step takes %.1f ms on %d, %.1f ms on one)",
        chosen,
        1e3 * seconds[cores],
        cores,
        1e3 * seconds[1],
    )


def warm_up(model: Llama, config: ServerConfig, num_tokens: int, kv_dtype: torch.dtype) -> int:
    """Run the largest prefill chunk, then decode batches with the costliest sampling, on a throw-away cache.

    On CUDA the batches are one of each size class that the kernels know, at short and long context, so that nothing is
    compiled while a request waits. Returns the bytes a step needs beyond weights and cache, as measured.
    """
    size = config.block_size
    device = model.ops.device
    cuda = device.type == "cuda"
    pages = list(range(-(-num_tokens // size)))
    cache = allocate(model.spec, len(pages) * size, kv_dtype, device)
    peak = PeakMemory(device)
    resting = torch.cuda.memory_allocated(device) if cuda else peak.rss_at_start_bytes
    runner = ModelRunner(model, cache, size)
    params = SamplingParams(max_tokens=1, top_p=0.9, logprobs=20)
    now = Timings(time.monotonic())
    prompt = Sequence("warm-up", [0] * num_tokens, num_tokens, params, now, block_table=pages)
    runner.run(ScheduledBatch((Work(prompt, num_tokens, samples=True),)))
    sizes = {min(rows, config.max_num_seqs) for rows in KERNEL_ROWS} if cuda else set()
    for count in sorted(sizes | {config.max_sampled_rows}):
        for context in {1, num_tokens}:
            decodes = [
                Sequence(f"warm-up-{i}", [0] * context, 1, params, now, None, context - 1, block_table=pages)
                for i in range(count)
            ]
            runner.run(ScheduledBatch(tuple(Work(s, 1, samples=True) for s in decodes)))
    workspace = max(0, (peak.gpu_bytes() if cuda else peak.rss_bytes()) - resting)
    del cache, runner
    if cuda:
        torch.cuda.empty_cache()
    return workspace
