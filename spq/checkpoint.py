"""Opening a model folder, packed or plain Hugging Face safetensors, and reading its weights one by one.

Not the writer (`writer`) and not the safetensors container (`tensorfile`). Everything is checked against the
headers before the first weight is read, so that a damaged folder is refused by name at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.weights import Leaf, LinearWeight
from spq.architecture import ModelSpec, read_spec
from spq.entropy import CodedTensor, decode, row_blocks
from spq.errors import ModelFileError, PackedFormatError, UnsupportedModelError
from spq.jsonfile import read_json_object
from spq.layout import EMBEDDING, expected_source, model_linears, model_vectors, module_has_bias
from spq.manifest import ANY, QUANT_METHOD, Manifest, ModulePlan, TensorShapes
from spq.stored import stored_leaf, stored_weight
from spq.tensorfile import TensorInfo, locate_tensors, read_tensor

__all__ = ["Checkpoint", "Manifest", "WeightSource", "open_model"]

FLOATS = ("F16", "BF16", "F32")


class WeightSource(Protocol):
    """Weights of one model, read on demand; tensors are on the CPU in their stored dtype and are not kept."""

    spec: ModelSpec
    manifest: Manifest | None  # None for a plain checkpoint

    def linear(self, name: str) -> LinearWeight:
        """A matrix by module name, e.g. `model.layers.0.mlp.up_proj` or `lm_head` (absent when tied)."""
        ...

    def embedding(self) -> Leaf:
        """The table [vocab, hidden]."""
        ...

    def vector(self, name: str) -> Tensor:
        """A norm by full tensor name, e.g. `model.norm.weight`."""
        ...

    def close(self) -> None:
        """Give up the folder; reading afterwards is an error."""
        ...


class Checkpoint:
    """WeightSource over a checked folder. Files are opened per tensor, so `close` only drops the index.

    Coded tensors are decoded as they are read, on as many threads as torch has.
    """

    def __init__(self, spec: ModelSpec, manifest: Manifest | None, tensors: Mapping[str, TensorInfo]) -> None:
        self.spec = spec
        self.manifest = manifest
        self._tensors = dict(tensors)
        self._coded: TensorShapes = {}
        for module, plan in ({} if manifest is None else manifest.modules).items():
            self._coded |= plan.coded(module)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Header entry of every tensor by name."""
        return self._tensors

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of the norms, which is the source's own."""
        return self._tensors["model.norm.weight"].dtype

    def linear(self, name: str) -> LinearWeight:
        """See WeightSource. Raises ModelFileError if the model has no such matrix."""
        return stored_weight(name, self._plan(name), self._tensors, self.vector)

    def embedding(self) -> Leaf:
        """See WeightSource."""
        return stored_leaf(EMBEDDING, self._plan(EMBEDDING), self._tensors, self.vector)

    def vector(self, name: str) -> Tensor:
        """See WeightSource; also any other tensor by name, decoded where it is coded.

        Raises ModelFileError if there is no such tensor, PackedFormatError for a damaged block.
        """
        if name in self._coded:
            return self._decode(name)
        if name not in self._tensors:
            raise ModelFileError(f"tensor {name} is not in the model (a closed or different one?)")
        return read_tensor(self._tensors[name])

    def close(self) -> None:
        """See WeightSource."""
        self._tensors.clear()

    def _decode(self, name: str) -> Tensor:
        shape, stored = self._coded[name]
        coded = CodedTensor(self.vector(f"{name}.zstd"), self.vector(f"{name}.blocks"), row_blocks(shape))
        dtype = torch.int8 if stored == "int8" else torch.uint8
        where = f"{self._tensors[f'{name}.zstd'].path}: {name}"
        return decode(coded, shape, dtype, where, torch.get_num_threads())

    def _plan(self, name: str) -> ModulePlan | None:
        return None if self.manifest is None else self.manifest.modules.get(name)


def open_model(folder: Path) -> Checkpoint:
    """Check a model folder by its headers and return its weights.

    Raises ModelFileError (missing, cut short or inconsistent files), PackedFormatError (a packed folder that breaks
    its manifest) or UnsupportedModelError (another architecture or quantization); each names the file or tensor.
    """
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: not a folder; give a model folder in Hugging Face format")
    spec = read_spec(folder)
    quantization = read_config(folder).get("quantization_config")
    if quantization is None:
        tensors = locate_tensors(folder)
        _check_plain(folder, spec, tensors)
        return Checkpoint(spec, None, tensors)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != QUANT_METHOD:
        raise UnsupportedModelError(
            f"{folder}: already quantized with {method!r}; use the original float checkpoint of this model"
        )
    manifest = Manifest.parse(quantization, folder / "config.json")
    _check_manifest(folder, spec, manifest)
    tensors = locate_tensors(folder)
    _check_packed(folder, spec, manifest, tensors)
    return Checkpoint(spec, manifest, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as written. Raises ModelFileError."""
    return read_json_object(folder / "config.json")


def _check_plain(folder: Path, spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> None:
    """Every tensor the architecture needs is there, as floats of the right shape; others are left alone."""
    for name, shape in expected_source(spec).items():
        info = tensors.get(name)
        if info is None:
            raise ModelFileError(f"{folder}: tensor {name} {list(shape)} is missing; download the model again")
        if info.shape != shape:
            raise ModelFileError(f"{info.path}: {name} is {list(info.shape)}, config.json says {list(shape)}")
        if info.dtype not in FLOATS:
            raise ModelFileError(f"{info.path}: {name} is {info.dtype}; supported: {', '.join(FLOATS)}")


def _check_manifest(folder: Path, spec: ModelSpec, manifest: Manifest) -> None:
    """The manifest describes this architecture: same modules, same shapes, one width per layer."""
    path = folder / "config.json"
    if len(manifest.mlp_widths) != spec.num_layers:
        raise PackedFormatError(
            f"{path}: mlp_widths has {len(manifest.mlp_widths)} entries for {spec.num_layers} layers; compress again"
        )
    expected = model_linears(spec, manifest.mlp_widths)
    for name in sorted(expected.keys() ^ manifest.modules.keys()):
        state = "missing from" if name in expected else "unknown in"
        raise PackedFormatError(f"{path}: module {name} is {state} quantization_config.modules; compress again")
    for name, shape in expected.items():
        plan = manifest.modules[name]
        if plan.shape != shape:
            raise PackedFormatError(f"{path}: module {name} is {list(plan.shape)}, should be {list(shape)}")
        if name == EMBEDDING and (plan.kind == "low_rank" or plan.correction is not None):
            raise PackedFormatError(f"{path}: the embedding can have no low-rank part; compress again")


def _check_packed(folder: Path, spec: ModelSpec, manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
    """The files hold exactly what the manifest lists."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        name: (shape, "float") for name, shape in model_vectors(spec).items()
    }
    for module, plan in manifest.modules.items():
        expected |= plan.tensors(module, module_has_bias(spec, module))
    for name, (shape, dtype) in expected.items():
        info = tensors.get(name)
        if info is None:
            raise PackedFormatError(f"{folder}: tensor {name} {list(shape)} is missing; compress again")
        if info.shape != shape and not (shape == (ANY,) and len(info.shape) == 1):
            raise PackedFormatError(f"{info.path}: {name} is {list(info.shape)}, should be {list(shape)}")
        allowed = {"float": FLOATS, "int8": ("I8",), "uint8": ("U8",)}.get(dtype, (dtype,))
        if info.dtype not in allowed:
            raise PackedFormatError(f"{info.path}: {name} is {info.dtype}, should be {' or '.join(allowed)}")
    for name in sorted(tensors.keys() - expected.keys()):
        raise PackedFormatError(f"{tensors[name].path}: tensor {name} is not in its manifest; compress again")
