"""From a model folder and the options to a ready engine: load, run the largest step, size the cache from what is left.

Not the download or the compression (`server.service`): the folder is packed, or plain and to be served as it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from kernels.native.backend import NativeOps
from kernels.ops import Ops, make_ops
from server.config import ServerConfig
from server.engine.engine import Engine, ModelInfo
from server.engine.kv_cache import allocate
from server.engine.loop import EngineLoop, OnStep
from server.engine.memory import KvPlan, MemoryBudgetError, plan_kv, read_memory
from server.engine.release import release_freed, release_libraries
from server.engine.residency import settle
from server.engine.runner import ModelRunner
from server.engine.warm_up import measure_graphs, measure_workspace, pick_threads, record_graphs
from server.model.coded import CodedLayers
from server.model.facts import compression_facts
from server.model.load import WeightBytes, load_model
from server.scheduler.blocks import BlockManager
from server.scheduler.ngram import NgramDrafter
from server.scheduler.scheduler import Scheduler
from spq.allocator import mapped_blocks
from spq.checkpoint import open_model
from spq.errors import OptionError
from spq.sizes import format_bytes

logger = logging.getLogger(__name__)

INT8_KV_HEAD = 16  # entries of a head: from here on an int8 cache was measured to keep the quality

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
    try:
        ops = make_ops(device, dtype, config.backend, int8_prefill=config.int8_prefill)
    except ValueError as error:
        raise OptionError(f"--device {device.type}, --backend {config.backend}: {error}") from error
    source = open_model(folder)
    spec = source.spec
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        raise OptionError(
            f"--max-model-len {config.max_model_len} exceeds the model's {spec.max_positions} positions; lower it"
        )
    wanted_len = config.max_model_len or spec.max_positions
    progress("loading", 0.0)
    if device.type == "cpu":
        release_libraries()
    coded = pick_resident(config, ops, threads)
    with mapped_blocks():
        model, used = load_model(source, ops, wanted_len, lambda done, total: progress("loading", done / total), coded)
        facts = compression_facts(source)
        source.close()
        ops.use_threads(threads)
        kv_dtype = pick_kv_dtype(config, spec.head_dim, ops)
        if coded is not None:
            settle(model, coded, kv_dtype, config.resident_tolerance)
            used.leave_coded(coded)
    before = read_memory(device)
    if config.memory_budget is not None and before.process > config.memory_budget:
        fewer = (
            "" if device.type == "cuda" else " (--resident coded --resident-tolerance 1 holds layers in fewer bytes)"
        )
        raise MemoryBudgetError(
            f"the process holds {format_bytes(before.process)} with the weights loaded, more than --memory-budget "
            f"{format_bytes(config.memory_budget)}; it needs more than that, plus the KV cache{fewer}"
        )
    recorded = records_steps(config, ops)
    parts = 3 if recorded else 1  # of the warming up, taken as equally long

    def warming(part: int) -> Callable[[float], None]:
        return lambda done: progress("warming_up", (part + done) / parts)

    workspace = measure_workspace(model, config, wanted_len, kv_dtype, warming(0))
    graph_bytes = measure_graphs(model, config, wanted_len, kv_dtype, warming(1)) if recorded else 0
    decodes = coded is not None and bool(coded.coded)  # which gains from every core
    if config.threads is None and device.type == "cpu" and not decodes:
        pick_threads(model, threads, config.block_size, kv_dtype)
    if device.type == "cpu":
        release_freed()
        release_libraries()
    after = read_memory(device)
    # given back, and needed again by a step and by recording; a CPU's allocator may still hold it
    held = after.process + workspace + graph_bytes
    if device.type == "cpu":
        held = max(after.process, before.process + workspace)
    after = replace(after, process=held, free=after.free - (held - after.process))
    plan = plan_kv(
        after,
        device=device,
        token_bytes=spec.kv_token_bytes(kv_dtype.itemsize),
        block_size=config.block_size,
        wanted_len=wanted_len,
        explicit_len=config.max_model_len is not None,
        max_num_seqs=config.max_num_seqs,
        memory_budget=config.memory_budget,
        kv_memory=config.kv_memory,
    )
    if plan.max_model_len < wanted_len:
        logger.warning("context limited to %d of %d tokens by memory", plan.max_model_len, wanted_len)
    num_pages = plan.num_blocks + recorded  # the last one, where there are graphs, is theirs
    cache = allocate(spec, num_pages * config.block_size, kv_dtype, device)
    graphs = None
    if recorded:
        graphs = record_graphs(model, cache, config, plan.num_blocks, plan.max_model_len, warming(2))
    ledger = make_ledger(
        used,
        plan,
        kv=plan.num_blocks * config.block_size * spec.kv_token_bytes(kv_dtype.itemsize),
        workspace=workspace,
        graphs=graph_bytes,
        process=after.process,
    )
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
    runner = ModelRunner(model, cache, config.block_size, graphs)
    loop = EngineLoop(scheduler, runner, on_step=on_step)
    info = ModelInfo(
        max_model_len=plan.max_model_len,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
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
        compression=facts,
    )
    return Engine(loop, info, max_queue=config.max_queue)


def records_steps(config: ServerConfig, ops: Ops) -> bool:
    """Whether decode steps become CUDA graphs: the reference reads lengths from the host, so it cannot be recorded."""
    return config.cuda_graphs and ops.device.type == "cuda" and ops.name == "triton"


def make_ledger(
    used: WeightBytes, plan: KvPlan, *, kv: int, workspace: int, graphs: int, process: int
) -> dict[str, int]:
    """Bytes on the device by kind; they add up to the limit. `process` is what it holds without the cache."""
    return {
        "weights": used.weights,
        "low_rank": used.low_rank,
        "coded": used.coded,
        "arena": used.arena,
        "kv": kv,
        "workspace": workspace,
        "graphs": graphs,
        "other": process - workspace - graphs - used.total,
        "free": plan.limit - process - kv,
    }


def pick_resident(config: ServerConfig, ops: Ops, threads: int) -> CodedLayers | None:
    """What takes the layers where they stay coded. Raises OptionError where this back end cannot run them."""
    if config.resident == "decoded":
        return None
    if isinstance(ops, NativeOps):
        return CodedLayers(ops, threads)
    reason = {
        "triton": "there is no entropy decoder for GPUs among our dependencies, and one on the host would send every "
        "layer over the bus for each token",
        "cpu": "torch packs its matrices in a form that can be neither coded nor moved; the native back end needs a C "
        "compiler when it is installed",
    }.get(ops.name, "it keeps weights as they were loaded")
    raise OptionError(f"--resident coded needs the native back end on a CPU, this is {ops.name}: {reason}")


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


def pick_kv_dtype(config: ServerConfig, head_dim: int, ops: Ops) -> torch.dtype:
    """`auto`: int8 where the kernels read it as it is and heads are long enough for it to keep the quality
    (docs/kv-cache.md), else the dtype of activations."""
    if config.kv_dtype != "auto":
        named: torch.dtype = getattr(torch, config.kv_dtype)
        return named
    return torch.int8 if ops.name in ("triton", "native") and head_dim >= INT8_KV_HEAD else ops.dtype


def device_name(device: torch.device) -> str:
    """'cuda: NVIDIA ...' or 'cpu'."""
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
