"""Safetensors files by their headers: where each tensor of a folder lies, and reading one of them.

Not the meaning of the tensors (`checkpoint`). Headers are read without touching the data, so that a damaged folder
is refused before anything is loaded; a tensor is read by `readinto` rather than mapped, so that it is an ordinary
private tensor, nothing stays resident, and the resident memory reported for a run is what the run needs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spq.errors import ModelFileError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

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
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelFileError(f"{path}: {size} bytes, shorter than its header says; download the file again")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: file is missing; download the model again") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not a readable safetensors file ({error}); download it again") from error
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: its safetensors header is not an object; download it again")
    tensors = {name: _info(name, path, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    expected = max((info.end for info in tensors.values()), default=8 + length)
    if size != expected:
        cut = "cut short" if size < expected else "too long"
        raise ModelFileError(f"{path}: {cut}: {size} bytes, its header says {expected}; download the file again")
    return tensors


def _info(name: str, path: Path, entry: Any, data_start: int) -> TensorInfo:
    """One entry of a header. Raises ModelFileError where bytes and shape disagree."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: header entry of {name} is not readable ({error})") from error
    known = DTYPES.get(dtype)
    if start < 0 or end < start or (known is not None and end - start != prod(shape) * known.itemsize):
        raise ModelFileError(f"{path}: {name} is {dtype} {list(shape)} but has {end - start} bytes in the header")
    return TensorInfo(name, path, dtype, shape, data_start + start, data_start + end)


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
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text("utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{index}: not a readable index ({error!r}); download it again") from error
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelFileError(f"{index}: {name} is said to lie in {shard!r}, which is not a file name")
        if shard not in headers:
            if not (folder / shard).is_file():
                raise ModelFileError(f"{index}: names shard {shard}, which is missing; download the model again")
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise ModelFileError(f"{index}: {name} should be in {shard}, which does not hold it")
        tensors[name] = headers[shard][name]
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """The tensor, on the CPU in its stored dtype. Raises ModelFileError if the file changed since its header."""
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise ModelFileError(f"{info.path}: {info.name} has dtype {info.dtype}, which is not supported")
    flat = torch.empty(info.nbytes // dtype.itemsize, dtype=dtype)
    try:
        with info.path.open("rb") as file:
            file.seek(info.start)
            got = file.readinto(flat.view(torch.uint8).numpy().data) if info.nbytes else 0
    except OSError as error:
        raise ModelFileError(f"{info.path}: {info.name} cannot be read ({error})") from error
    if got != info.nbytes:
        raise ModelFileError(f"{info.path}: {info.name} ends after {got} of {info.nbytes} bytes; the file changed")
    return flat.view(info.shape)


def read_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows start..stop of a tensor [rows, ...], as `read_tensor`; the others are not touched."""
    row_bytes = info.nbytes // max(1, info.shape[0])
    piece = replace(
        info,
        shape=(stop - start, *info.shape[1:]),
        start=info.start + start * row_bytes,
        end=info.start + stop * row_bytes,
    )
    return read_tensor(piece)
