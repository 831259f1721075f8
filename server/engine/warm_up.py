"""What runs before the KV cache is sized: every kind of step once, so that its memory is measured and its kernels are
compiled before a request waits for them. On the CPU also the choice of the number of threads.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable

import torch

from kernels.ops import LayerKv
from server.config import ServerConfig
from server.core import SamplingParams, ScheduledBatch, Sequence, Timings, Work
from server.engine.graphs import CudaRecorder, DecodeGraphs
from server.engine.kv_cache import allocate
from server.engine.memory import read_memory
from server.engine.runner import ModelRunner
from server.model.llama import Llama
from spq.memory import PeakMemory

logger = logging.getLogger(__name__)

KERNEL_ROWS = (1, 5, 17, 33, 65)  # one number of each class of rows in kernels.gpu.configs
THREAD_TRIALS = 5
# Most that a step on all cores may take, of the time on one thread. torch's threads wait for each other and so suffer
# from every other program; the native ones do not, and help most with the batches and prompts that are not timed here.
THREAD_GAIN = {"native": 1.2, "cpu": 0.9, "reference": 0.9}

Share = Callable[[float], None]  # told the share that is done


def measure_workspace(
    model: Llama, config: ServerConfig, max_model_len: int, kv_dtype: torch.dtype, progress: Share
) -> int:
    """Run the largest prefill chunk, then decode batches with the costliest sampling, on a throw-away cache.

    On CUDA both are run in each size class that the kernels know, and decodes at short and at the longest context: the
    parts of split attention are counted by it (tokens beyond the prompt's are in its pages again). Returns the bytes a
    step needs beyond weights and cache.
    """
    size = config.block_size
    num_tokens = min(config.max_batch_tokens, max_model_len)
    device = model.ops.device
    cuda = device.type == "cuda"
    pages = list(range(-(-num_tokens // size)))
    cache = allocate(model.spec, len(pages) * size, kv_dtype, device)
    peak = PeakMemory(device)
    resting = torch.cuda.memory_allocated(device) if cuda else peak.rss_at_start_bytes
    runner = ModelRunner(model, cache, size)
    flat = 1000.0  # temperature: every token is about as likely, so the candidates do not suffice and all are sorted
    params = SamplingParams(max_tokens=1, temperature=flat, top_p=0.9, logprobs=20)
    now = Timings(time.monotonic())
    rows_of_kernels = set(KERNEL_ROWS) if cuda else set()
    for length in sorted({min(rows, num_tokens) for rows in rows_of_kernels} | {num_tokens}):
        prompt = Sequence("warm-up", [0] * length, length, params, now, block_table=pages)
        runner.run(ScheduledBatch((Work(prompt, length, samples=True),)))
    classes = {min(rows, config.max_num_seqs) for rows in rows_of_kernels}
    longest = max_model_len if cuda else num_tokens
    steps = [(count, context) for count in sorted(classes | {config.max_sampled_rows}) for context in {1, longest}]
    for done, (count, context) in enumerate(steps, start=1):
        progress(done / (len(steps) + 1))
        table = [pages[i % len(pages)] for i in range(-(-context // size))]
        tokens = [0] * context
        decodes = [
            Sequence(f"warm-up-{i}", tokens, 1, params, now, None, context - 1, block_table=table) for i in range(count)
        ]
        runner.run(ScheduledBatch(tuple(Work(s, 1, samples=True) for s in decodes)))
    workspace = max(0, (peak.gpu_bytes() if cuda else peak.rss_bytes()) - resting)
    del cache, runner
    if cuda:
        torch.cuda.empty_cache()
    return workspace


def record_graphs(
    model: Llama, cache: list[LayerKv], config: ServerConfig, scratch_page: int, max_model_len: int, progress: Share
) -> DecodeGraphs:
    """All decode steps over a cache, recorded."""
    graphs = DecodeGraphs(
        model,
        cache,
        block_size=config.block_size,
        scratch_page=scratch_page,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
    )
    graphs.record(CudaRecorder(), progress)
    return graphs


def measure_graphs(
    model: Llama, config: ServerConfig, max_model_len: int, kv_dtype: torch.dtype, progress: Share
) -> int:
    """Bytes on the device that recorded steps take with their buffers and the scratch page, by the driver's account."""
    device = model.ops.device
    before = read_memory(device).process
    cache = allocate(model.spec, config.block_size, kv_dtype, device)
    graphs = record_graphs(model, cache, config, 0, max_model_len, progress)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    taken = read_memory(device).process - before
    del cache, graphs
    gc.collect()  # a graph is freed with its last reference, which may be in a cycle
    torch.cuda.empty_cache()
    return max(0, taken)


def pick_threads(model: Llama, cores: int, block_size: int, kv_dtype: torch.dtype) -> None:
    """Let all cores work if they do not make a single decode step slower (THREAD_GAIN), else one thread.

    The matrices of a small model are done before a second thread has woken.
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
    chosen = cores if seconds[cores] < THREAD_GAIN[model.ops.name] * seconds[1] else 1
    model.ops.use_threads(chosen)
    logger.info(
        "CPU threads: %d (a decode step takes %.1f ms on %d, %.1f ms on one)",
        chosen,
        1e3 * seconds[cores],
        cores,
        1e3 * seconds[1],
    )
