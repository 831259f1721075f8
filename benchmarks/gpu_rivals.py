"""`python -m benchmarks.gpu_rivals NAME`: one rival alone in its process, at its best, rows as lines of JSON.

Rivals decode a static batch in a loop of their own, without HTTP, scheduling or sampling: greedy, a static cache of
exactly the asked length, the prompt run eagerly, and each step as a CUDA graph, recorded plainly or through
torch.compile (mode "reduce-overhead"). Nothing here favours the server. A batch that fails (memory, a kernel that
cannot be recorded) is a row that says so, and the next one follows. On a CPU steps run eagerly, to test this program.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache

from benchmarks.gpu_models import SHAPES, config_of
from benchmarks.gpu_parts import RIVALS
from benchmarks.gpu_servers import Load
from kernels.gpu.plan import ModelShape
from server.engine.memory import read_memory

Row = dict[str, Any]
Step = Callable[[], object]  # decodes one token of every sequence, from and to a fixed tensor
WARM_STEPS = 3


MODES = {"gptqmodel": ("graph", "compile")}  # the best counts; others are slow where nothing is compiled for them


def load_model(name: str, shape: ModelShape, folder: Path | None, device: torch.device) -> tuple[Any, str]:
    """The model on the device, and what it runs on. Weights are random; float16 on a GPU (torchao-int4: bfloat16)."""
    if folder is not None:
        found = importlib.import_module("gptqmodel").GPTQModel.load(str(folder), device=str(device))
        return found.model, type(found.model.model.layers[0].mlp.down_proj).__name__
    dtype = torch.bfloat16 if name == "torchao-int4" else torch.float16
    config = config_of(shape)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if device.type == "cuda" else torch.float32)
    try:
        with device:
            model = LlamaForCausalLM(config).train(False)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    if name == "transformers-fp16":
        return model, str(model.dtype)
    quantization = importlib.import_module("torchao.quantization")
    if name == "torchao-int8":
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    else:  # the layout of the kernel that torch itself has; others need further packages
        quantization.quantize_(
            model, quantization.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
        )
    return model, type(model.model.layers[0].mlp.down_proj.weight).__name__


class StaticBatch:
    """A batch of random prompts over a static cache."""

    def __init__(self, model: Any, shape: ModelShape, batch: int, load: Load, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(batch)
        self._model, self._device = model, device
        self._cache = StaticCache(config=model.config, max_cache_len=load.prompt_tokens + load.new_tokens)
        size = (batch, load.prompt_tokens)
        self.prompt = torch.randint(8, shape.vocab, size, device=device, generator=generator)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def prefill(self) -> None:
        """From an empty cache to the first token."""
        self._cache.reset()  # type: ignore[no-untyped-call]
        self.token.copy_(self._forward(self.prompt))

    def _forward(self, ids: Tensor) -> Tensor:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        token: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return token

    def step(self, mode: str) -> Step:
        """What decodes one token, warmed up. Call `prefill` before and after."""
        if mode == "eager":
            return lambda: self.token.copy_(self._forward(self.token))
        if mode == "compile":
            # a batch before must not make this one's shapes variable
            torch._dynamo.reset()
            compiled = torch.compile(self._forward, mode="reduce-overhead", dynamic=False)

            def replay() -> None:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                self.token.copy_(compiled(self.token))

            for _ in range(WARM_STEPS):
                replay()
            return replay
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                self.token.copy_(self._forward(self.token))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.token.copy_(self._forward(self.token))
        return graph.replay


def measure(batch: StaticBatch, mode: str, load: Load, device: torch.device, size: int) -> Row:
    """Medians over rounds: time to the first token of the batch, then per step."""
    batch.prefill()
    step = batch.step(mode)
    ttft_s, step_s = [], []
    for _ in range(load.rounds):
        began = _now(device)
        batch.prefill()
        first = _now(device)
        for _ in range(load.new_tokens - 1):
            step()
        last = _now(device)
        ttft_s.append(first - began)
        step_s.append((last - first) / (load.new_tokens - 1))
    ttft, each = statistics.median(ttft_s), statistics.median(step_s)
    return {
        "ms_per_token": 1e3 * each, "ms_per_token_min": 1e3 * min(step_s), "ms_per_token_max": 1e3 * max(step_s),
        "decode_tokens_per_s": size / each,
        "tokens_per_s": size * load.new_tokens / (ttft + each * (load.new_tokens - 1)),
        "ttft_p50_ms": 1e3 * ttft, "ttft_max_ms": 1e3 * max(ttft_s), "rounds": load.rounds,
    }  # fmt: skip


@torch.no_grad()
def run_rival(name: str, shape: ModelShape, folder: Path | None, load: Load, device: torch.device) -> Iterator[Row]:
    """A row of memory, then one per batch and mode."""
    torch.zeros(1, device=device)  # makes the context
    before = read_memory(device).process
    model, kernel = load_model(name, shape, folder, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    loaded = read_memory(device).process - before
    yield {"kind": "memory", "system": name, "kernel": kernel, "bytes_before": before, "bytes_loaded": loaded}
    modes = MODES.get(name.partition("-")[0], ("compile",)) if device.type == "cuda" else ("eager",)
    for size in load.levels:
        for mode in modes:
            row: Row = {"kind": "speed", "system": name, "mode": mode, "batch": size}
            try:
                yield row | measure(StaticBatch(model, shape, size, load, device), mode, load, device, size)
            except Exception as error:  # whatever a rival raises costs one row, not the run
                yield row | {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    yield {"kind": "memory at the end", "system": name, "bytes": read_memory(device).process}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Run it and print rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_rivals", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=RIVALS)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, help="model that gpu_models wrote, for a rival that reads one")
    parser.add_argument("--levels", default="1,64,8,32", help="batch sizes, in order")
    parser.add_argument("--prompt-tokens", type=int, default=768)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    levels = tuple(map(int, options.levels.split(",")))
    load = Load(levels, options.prompt_tokens, options.new_tokens, options.rounds)
    for row in run_rival(options.name, SHAPES[options.shape], options.folder, load, torch.device(options.device)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
