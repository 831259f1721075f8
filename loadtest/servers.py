"""What is compared, as plain data: how each server starts, what it takes of a request. benchmarks/README.md says why.

Each runs at its best settings on two cores, with room for 16 answers of at most 256 tokens and no more, and with caches
of prompts off where there is a switch. `{name}` in a command is a path or a number from the options of `compare`.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "ours"
SLOTS, SLOT_TOKENS = 16, 256


@dataclass(frozen=True, slots=True)
class Server:
    """One server. `weights_bits` is the width its matrices are stored in; bars name rivals by it."""

    name: str
    command: tuple[str, ...]
    version: tuple[str, ...]  # prints it
    ready: str  # path that answers 200 when a request may come
    weights_bits: int
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of the request that only it has
    takes_ids: bool = True  # prompts as token ids; else as text of as many tokens
    env: Mapping[str, str] = field(default_factory=dict)
    prepares: bool = False  # the first start makes a file that later ones read; it is done before, not measured
    url: str | None = None  # it runs already, there; then no command
    needs: tuple[str, str] | None = None  # a flag of the CPU, and why

    def filled(self, values: Mapping[str, str]) -> Server:
        """With the values in place. Raises KeyError with the name of one that is missing."""
        return dataclasses.replace(
            self,
            command=tuple(part.format_map(values) for part in self.command),
            version=tuple(part.format_map(values) for part in self.version),
            env={name: value.format_map(values) for name, value in self.env.items()},
            extra={k: v.format_map(values) if isinstance(v, str) else v for k, v in self.extra.items()},
        )


def with_flags(servers: Mapping[str, Server], variant: str) -> Server:
    """The server of `NAME=BASE FLAG ...`: BASE with flags appended, so that settings can be compared in turn.

    Raises ValueError where there is no such base.
    """
    name, _, rest = variant.partition("=")
    base, *flags = shlex.split(rest) or [""]
    if base not in servers or not name:
        raise ValueError(f"--variant {variant}: write NAME=BASE FLAG ..., with BASE one of {', '.join(servers)}")
    return dataclasses.replace(servers[base], name=name, command=(*servers[base].command, *flags))


def given(name: str, url: str, model: str, extra: Mapping[str, Any], takes_ids: bool) -> Server:
    """A server that someone else started. What its weights are is not known."""
    return Server(name, (), (), "/v1/models", 0, {"model": model, **extra}, takes_ids, url=url)


def _ours(preset: str, bits: int) -> Server:
    # 19.2 KiB a token of int8 keys and values in the benchmark's model
    flags = f"--preset {preset} --threads {{threads}} --max-num-seqs {SLOTS} --max-model-len {SLOT_TOKENS}"
    flags += f" --kv-memory {SLOTS * SLOT_TOKENS * 20}KiB --prefix-caching off --cache-dir {{cache}}"
    return Server(
        name=OURS if preset == "int8" else f"{OURS}-{preset}",
        command=("{python}", "-m", "server", "--model", "{model}", "--served-model-name", "bench", "--port", "{port}",
                 *flags.split()),
        version=("git", "describe", "--always", "--dirty"),
        ready="/ready",
        weights_bits=bits,
        extra={"ignore_eos": True},
        prepares=True,
    )  # fmt: skip


def _llama_cpp(kind: str, bits: int, variant: str = "", more: str = "--flash-attn off") -> Server:
    flags = f"--parallel {SLOTS} --ctx-size {SLOTS * SLOT_TOKENS} --threads {{threads}} --threads-batch {{threads}}"
    flags += f" --no-cache-prompt --cache-ram 0 --no-ui --offline {more}"
    return Server(
        name=f"llama.cpp-{kind}{variant}",
        command=("{llama_server}", "--model", f"{{gguf}}/{kind}.gguf", "--port", "{port}", *flags.split()),
        version=("{llama_server}", "--version"),
        ready="/health",
        weights_bits=bits,
        extra={"ignore_eos": True, "cache_prompt": False},
    )


def _transformers(name: str, bits: int, dtype: str, model: str = "{model}") -> Server:
    flags = f"--dtype {dtype} --device cpu --log-level error --continuous-batching"
    flags += f" --cb-block-size 64 --cb-num-blocks {SLOTS * SLOT_TOKENS // 64}"
    return Server(
        name=f"transformers-{name}",
        command=("{transformers_python}", "-m", "transformers.cli.transformers", "serve", model,
                 "--host", "127.0.0.1", "--port", "{port}", *flags.split()),
        version=("{transformers_python}", "-c",
                 "import torch, transformers; print(transformers.__version__, torch.__version__)"),
        ready="/health",
        weights_bits=bits,
        extra={"model": model},
        takes_ids=False,
        # the last: GPTQModel counts cores, and on two gives the CPU no worker of its own accord
        env={"OMP_NUM_THREADS": "{threads}", "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "{threads}"},
    )  # fmt: skip


def _vllm(name: str, bits: int, dtype: str, model: str = "{model}", needs: tuple[str, str] | None = None) -> Server:
    flags = f"--dtype {dtype} --max-model-len {SLOT_TOKENS} --max-num-seqs {SLOTS} --no-enable-prefix-caching"
    return Server(
        name=f"vllm-{name}",
        command=("{vllm_python}", "-m", "vllm.entrypoints.openai.api_server", "--model", model,
                 "--served-model-name", "bench", "--host", "127.0.0.1", "--port", "{port}", *flags.split()),
        version=("{vllm_python}", "-c", "import vllm, torch; print(vllm.__version__, torch.__version__)"),
        ready="/health",
        weights_bits=bits,
        extra={"ignore_eos": True},
        env={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
             "VLLM_CPU_OMP_THREADS_BIND": "{cores}"},
        prepares=True,  # compiles the model for minutes, and keeps that
        needs=needs,
    )  # fmt: skip


def catalogue() -> dict[str, Server]:
    """All known servers by name."""
    servers = (
        _ours("int8", 8),
        _ours("int4", 4),
        _ours("default", 8),
        _ours("none", 32),
        _llama_cpp("q8_0", 8),
        _llama_cpp("q8_0", 8, "-early", "--flash-attn off --batch-size 128 --ubatch-size 128"),
        _llama_cpp(
            "q8_0",
            8,
            "-small",
            "--flash-attn on --cache-type-k q8_0 --cache-type-v q8_0 --batch-size 64 --ubatch-size 64",
        ),
        _llama_cpp("f16", 16),
        _llama_cpp("q4_0", 4),
        _transformers("bfloat16", 16, "bfloat16"),
        _transformers("float32", 32, "float32"),
        _transformers("gptq4", 4, "float32", "{gptq}"),
        _vllm("bfloat16", 16, "bfloat16"),
        _vllm("float32", 32, "float32"),
        _vllm("gptq4", 4, "auto", "{gptq}", ("avx512f", "its 4-bit product, cpu_gemm_wna16, is not in its AVX2 code")),
    )
    return {server.name: server for server in servers}
