"""Safetensors files by their headers: where each tensor of a folder lies, and reading one of them.

Not the meaning of the tensors (`checkpoint`). Headers are read without touching the data, so that a damaged folder
is refused before anything is loaded; a tensor is read by `readinto` rather than mapped, so that it is an ordinary
private tensor, nothing stays resident, and the resident memory reported for a run is what the run needs.

Files that `spq.writer` made carry a CRC-32 of each tensor in `__metadata__`, checked where a whole tensor is read:
0.5 to 0.8 s a GB (zlib, one shared core of a Zen 3). It finds damage by disks and copies; who writes other weights can
sum them too.
"""

from __future__ import annotations

import itertools
import os
import zlib
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spq.errors import ModelFileError
from spq.jsonfile import MAX_BYTES, parse_json_object, read_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHECKSUMS = "crc32"  # in `__metadata__`: eight hexadecimal digits a tensor, in the order of their data
MAX_DIMENSIONS = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file, by its header."""

    name: str
    path: Path
    dtype: str  # safetensors' name, e.g. "F16"
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int
    crc32: int | None = None  # of its bytes, where the file says it

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises ModelFileError, naming the file, if it is missing, cut short, or its header is not consistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelFileError(f"{path}: {size} bytes, shorter than its header says; download the file again")
            raw = file.read(min(length, MAX_BYTES + 1))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: file is missing; download the model again") from error
    except OSError as error:
        raise ModelFileError(f"{path}: not a readable safetensors file ({error}); download it again") from error
    header = parse_json_object(raw, path)
    metadata = header.pop("__metadata__", None)
    tensors = [_info(name, path, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_places(path, tensors, 8 + length, size)
    return {info.name: info for info in _with_checksums(path, tensors, metadata)}


def _info(name: str, path: Path, entry: Any, data_start: int) -> TensorInfo:
    """One entry of a header. Raises ModelFileError where bytes and shape disagree."""
    if not name.isprintable():
        raise ModelFileError(f"{path}: a tensor is called {name!a}, which is no name")
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        readable = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
        readable = readable and len(shape) <= MAX_DIMENSIONS and len(offsets) == 2
    except (KeyError, TypeError):
        readable = False
    if not readable:
        raise ModelFileError(f"{path}: header entry of {name} is not readable; download the file again")
    start, end = offsets
    known = DTYPES.get(dtype)
    if end < start or (known is not None and end - start != prod(shape) * known.itemsize):
        raise ModelFileError(f"{path}: {name} is {dtype!a} {shape} but has {end - start} bytes in the header")
    return TensorInfo(name, path, dtype, tuple(shape), data_start + start, data_start + end)


def _check_places(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """As the format asks: one tensor after the other, from the header to the end of the file. They come in order."""
    end = max((info.end for info in tensors), default=start)
    if size != end:
        cut = "cut short" if size < end else "too long"
        raise ModelFileError(f"{path}: {cut}: {size} bytes, its header says {end}; download the file again")
    ends = itertools.chain([start], (info.end for info in tensors))
    for before, info in zip(ends, tensors, strict=False):
        if info.start != before:
            kind = "overlaps the tensor before it" if info.start < before else "lies behind a gap"
            raise ModelFileError(f"{path}: {info.name} {kind}; download the file again")


def _with_checksums(path: Path, tensors: list[TensorInfo], metadata: Any) -> list[TensorInfo]:
    """With what `__metadata__` says of their bytes. Raises ModelFileError where that does not fit."""
    text = metadata.get(CHECKSUMS) if isinstance(metadata, dict) else None
    if text is None:
        return tensors
    try:
        sums = [int(part, 16) for part in text.split()]
        return [replace(info, crc32=crc) for info, crc in zip(tensors, sums, strict=True)]
    except (AttributeError, ValueError) as error:
        raise ModelFileError(f"{path}: its checksums are not those of {len(tensors)} tensors") from error


def locate_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder, from one file or from the shards its index names.

    Raises ModelFileError: no safetensors file (with the remedy if there are pickles), an index that names a missing
    shard or a tensor the shard does not hold, a damaged file.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _locate_shards(folder, index)
    if (folder / SINGLE_NAME).is_file():
        return read_header(folder / SINGLE_NAME)
    pickles = sorted(folder.glob("pytorch_model*.bin")) + sorted(folder.glob("*.pth")) + sorted(folder.glob("*.pt"))
    if pickles:
        raise ModelFileError(
            f"{folder}: only pickled weights ({pickles[0].name}), which can run code when opened; get the "
            "safetensors revision, or convert on a machine you trust: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)"
        )
    raise ModelFileError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME}; a model needs safetensors weights")


def _locate_shards(folder: Path, index: Path) -> dict[str, TensorInfo]:
    """The tensors of a sharded folder, as its index lists them."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelFileError(f"{index}: not a readable index, without a weight_map; download it again")
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelFileError(f"{index}: {name!a} is said to lie in {shard!a}, which is not a file name")
        if shard not in headers:
            if not os.path.isfile(folder / shard):  # Path.is_file raises for a name that is too long
                raise ModelFileError(f"{index}: names shard {shard!a}, which is missing; download the model again")
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise ModelFileError(f"{index}: {name!a} should be in {shard!a}, which does not hold it")
        tensors[name] = headers[shard][name]
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor, on the CPU in its stored dtype.

    Raises ModelFileError if the file changed since its header was read, or holds other bytes than were written.
    """
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise ModelFileError(f"{info.path}: {info.name} has dtype {info.dtype}, which is not supported")
    flat = torch.empty(info.nbytes // dtype.itemsize, dtype=dtype)
    target = flat.view(torch.uint8).numpy().data
    try:
        with info.path.open("rb") as file:
            file.seek(info.start)
            got = file.readinto(target) if info.nbytes else 0
    except OSError as error:
        raise ModelFileError(f"{info.path}: {info.name} cannot be read ({error})") from error
    if got != info.nbytes:
        raise ModelFileError(f"{info.path}: {info.name} ends after {got} of {info.nbytes} bytes; the file changed")
    if info.crc32 is not None and zlib.crc32(target) != info.crc32:
        raise ModelFileError(f"{info.path}: {info.name} is damaged: not the bytes that were written; copy it again")
    return flat.view(info.shape)


def read_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows start..stop of a tensor [rows, ...], as `read_tensor`; the others are not touched."""
    row_bytes = info.nbytes // max(1, info.shape[0])
    piece = replace(
        info,
        shape=(stop - start, *info.shape[1:]),
        crc32=None,  # of the whole
        start=info.start + start * row_bytes,
        end=info.start + stop * row_bytes,
    )
    return read_tensor(piece)
