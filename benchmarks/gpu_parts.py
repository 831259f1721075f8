"""The parts of `gpu_serving`: what each one starts, in order of worth, and the model folders they share.

Not the run itself (when time is up, what is kept) and not the bars. Whatever touches the GPU is a process that ends
with its part, so that each finds the device as the one before did.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_bars import FP16, INT8, KV16, OURS
from benchmarks.gpu_servers import Load, Served, measure_server
from kernels.gpu_check import run_part

Row = dict[str, Any]
MODELS = ("LLaMA-2-7B", "Llama-3-8B")
# In order of worth: the one that bars name, then the others. The package each needs, and the kind of folder it reads.
RIVALS: dict[str, tuple[str, str | None]] = {
    "gptqmodel-8": ("gptqmodel", "gptq8"),
    "transformers-fp16": ("transformers", None),
    "torchao-int8": ("torchao", None),
    "gptqmodel-4": ("gptqmodel", "gptq4"),
    "torchao-int4": ("torchao", None),
}


class PartFailed(RuntimeError):
    """A part gave no rows, or no more of them."""


class PartSkipped(RuntimeError):
    """A part cannot run here: something it needs is not installed."""


@dataclass(frozen=True, slots=True)
class Part:
    """One server of ours or one rival, on one model."""

    model: str
    system: str
    kind: str | None  # of folder, see gpu_models; None: it makes its own model
    flags: tuple[str, ...] = ()  # of the server
    levels: tuple[int, ...] = ()
    package: str | None = None  # a rival: what must be installed

    @property
    def name(self) -> str:
        """As it stands in the JSON."""
        return f"{self.model}/{self.system}"


def all_parts(models: tuple[str, ...], levels: tuple[int, ...], dtype: str) -> list[Part]:
    """Everything, the first model and its rivals first. `dtype` is the 16-bit type that the server takes here."""
    parts = []
    for model in models:
        wide = ("--dtype", dtype, "--kv-dtype", dtype)
        parts += [
            Part(model, OURS, "spq", (), levels),
            Part(model, KV16, "spq", wide, levels[-1:]),
            Part(model, FP16, "fp16", (), levels),
            Part(model, INT8, "int8", (), levels),
        ]
        ends_first = tuple(dict.fromkeys((levels[0], levels[-1], *levels)))  # a batch costs a compilation of minutes
        for name, (package, kind) in RIVALS.items():
            parts.append(Part(model, name, kind, (), ends_first, package))
    return parts


class Workshop:
    """Where parts run: the folder of models and logs, the device, the load."""

    def __init__(self, cache: Path, device: str, load: Load, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._cache, self._device, self._load = cache, device, load
        self._made: tuple[str, str, int] | None = None  # model, kind, bytes of its tensors

    def run(self, part: Part, deadline: float) -> Iterator[Row]:
        """Rows of a part. Raises PartSkipped, PartFailed, or what `measure_server` raises."""
        if part.package is not None:
            if importlib.util.find_spec(part.package) is None:
                raise PartSkipped(f"the package {part.package} is not installed")
            yield from self._rival(part, deadline)
            return
        assert part.kind is not None
        packed = self._make(part.model, part.kind, deadline)
        load = Load(part.levels, self._load.prompt_tokens, self._load.new_tokens, self._load.rounds)
        served = Served(part.system, self._folder, ("--device", self._device, *part.flags))
        log = self._cache / f"{part.name.replace('/', ' ')}.log"
        for row in measure_server(served, load, self._environment, log, deadline):
            yield row | ({"bytes_packed": packed} if row["kind"] == "memory" else {})
        if part.flags:
            return  # the same weights, weighed before
        command = ["-m", "benchmarks.gpu_memory", "--device", self._device]
        (loaded,) = self._rows(command, str(self._folder), deadline)
        yield {"kind": "memory", "system": part.system, "bytes_packed": packed, **loaded}

    def close(self) -> None:
        """Drop the model; logs stay."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._made = None

    @property
    def _folder(self) -> Path:
        return self._cache / "model"

    def _make(self, model: str, kind: str, deadline: float) -> int:
        """The folder holds that model; one at a time, as each takes up to 16 GB. Returns the bytes of its tensors."""
        if self._made is None or self._made[:2] != (model, kind):
            self.close()
            command = ["-m", "benchmarks.gpu_models", "--device", self._device]
            command += ["--shape", model, "--out", str(self._folder)]
            (made,) = self._rows(command, kind, deadline)
            self._made = (model, kind, int(made["bytes_packed"]))
        return self._made[2]

    def _rival(self, part: Part, deadline: float) -> Iterator[Row]:
        command = ["-m", "benchmarks.gpu_rivals", "--device", self._device, "--shape", part.model]
        command += ["--levels", ",".join(map(str, part.levels)), "--rounds", str(self._load.rounds)]
        command += ["--prompt-tokens", str(self._load.prompt_tokens), "--new-tokens", str(self._load.new_tokens)]
        if part.kind is not None:
            packed = self._make(part.model, part.kind, deadline)
            command += ["--folder", str(self._folder)]
        for row in self._rows(command, part.system, deadline):
            yield row | ({"bytes_packed": packed} if part.kind is not None and row["kind"] == "memory" else {})

    def _rows(self, command: list[str], name: str, deadline: float) -> Iterator[Row]:
        """Rows that a process prints, then PartFailed if it broke or was stopped."""
        part = run_part([sys.executable, *command], name, max(0.0, deadline - time.monotonic()))
        yield from part.rows
        if part.error is not None:
            raise PartFailed(part.error)
