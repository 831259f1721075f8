"""Writing a model folder tensor by tensor, with memory for one tensor.

Not what is written (`compress`) and not the reader (`checkpoint`). A safetensors header stands before the data and
lists all of it, so tensors are spooled to a file next to the shard and copied behind the header when the shard is
full; wide dtypes come first, which keeps every tensor aligned.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from spq.errors import OutputError
from spq.tensorfile import CHECKSUMS, DTYPES, INDEX_NAME, SINGLE_NAME

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorWriter:
    """Writes shards of at most `max_shard_bytes` (or one tensor) into a folder."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._spool_path = folder / "spool.part"
        self._spool: BinaryIO | None = None
        self._pending: list[tuple[str, torch.dtype, tuple[int, ...], int, int, int]] = []  # ..., start, size, crc32
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.tensor_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor. Raises OutputError where the disk refuses it."""
        flat = tensor.detach().cpu().contiguous().view(-1)
        if self._pending and self._pending_bytes + flat.nbytes > self._limit:
            self._flush()
        try:
            if self._spool is None:
                self._spool = self._spool_path.open("w+b")
            data = flat.view(torch.uint8).numpy().data
            self._spool.write(data)
        except OSError as error:
            raise OutputError(f"{self._folder}: {name} cannot be written ({error}); free some disk space") from error
        shape = tuple(tensor.shape)
        self._pending.append((name, tensor.dtype, shape, self._pending_bytes, flat.nbytes, zlib.crc32(data)))
        self._pending_bytes += flat.nbytes
        self.tensor_bytes += flat.nbytes

    def finish(self) -> int:
        """Write the last shard and, with several, the index; returns the bytes of the shard files."""
        self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self._folder / SINGLE_NAME)
            return (self._folder / SINGLE_NAME).stat().st_size
        weight_map: dict[str, str] = {}
        total = 0
        for number, (path, names) in enumerate(self._shards, start=1):
            target = self._folder / f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            path.rename(target)
            total += target.stat().st_size
            weight_map |= {name: target.name for name in names}
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True), "utf-8")
        return total

    def close(self) -> None:
        """Drop what was not finished."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None
        self._spool_path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._spool is None:
            return
        ordered = sorted(self._pending, key=lambda entry: -entry[1].itemsize)  # stable: wide dtypes first
        sums = " ".join(f"{entry[-1]:08x}" for entry in ordered)
        header: dict[str, object] = {"__metadata__": {"format": "pt", CHECKSUMS: sums}}
        offset = 0
        for name, dtype, shape, _, size, _ in ordered:
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        path = self._folder / f"shard-{len(self._shards):05d}.part"
        try:
            with path.open("wb") as file:
                file.write(len(raw).to_bytes(8, "little") + raw)
                for _, _, _, start, size, _ in ordered:
                    self._spool.seek(start)
                    _copy(self._spool, file, size)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error}); free some disk space") from error
        self._shards.append((path, [entry[0] for entry in ordered]))
        self.close()
        self._pending, self._pending_bytes = [], 0


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy `size` bytes in pieces of 1 MiB."""
    while size > 0:
        piece = source.read(min(size, 1 << 20))
        target.write(piece)
        size -= len(piece)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what makes a model usable besides weights: tokenizer, generation config, chat template, licence."""
    patterns = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
    for pattern in (*patterns, "generation_config.json", "LICENSE*"):
        for path in source.glob(pattern):
            if path.is_file() and path.suffix not in (".bin", ".safetensors"):
                shutil.copyfile(path, target / path.name)
    for path in source.glob("chat_templates/*.jinja"):
        (target / "chat_templates").mkdir(exist_ok=True)
        shutil.copyfile(path, target / "chat_templates" / path.name)
