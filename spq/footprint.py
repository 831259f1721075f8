"""What a model folder weighs: file and resident bytes, and the compression rates of arXiv 2505.07289, made general.

TCr, theoretical: 1 - stored payload bits / (16 N), over the matrices (embedding included, a tied table once), N their
elements in the original. Payload are integers or floats of the matrices; scales, zero points, biases and norms are not
in it, so that it reduces to the paper's 1 - (b/16)(1 - s/100) for a sparsity of s % and b bits everywhere.
MCr, measured: 1 - bytes of the weight files / bytes of the original's tensors in float16. This one pays for everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from spq.checkpoint import Checkpoint, open_model
from spq.layout import model_linears, model_vectors, module_has_bias, num_parameters
from spq.manifest import ModulePlan
from spq.tensorfile import DTYPES

BITS = {"int8": 8, "int4": 4}
SIZES = {"int8": 1, "uint8": 1, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes and counts of one folder."""

    file_bytes: int  # of the weight files, headers included
    resident_bytes: int  # of all tensors once they are loaded and decoded, without what a back end adds
    fp16_bytes: int  # of the original's tensors in float16
    num_parameters: int  # of the original
    num_weights: int  # elements of the original's matrices
    stored_weights: int  # elements of the matrices and factors that are stored
    payload_bits: int  # of those

    @property
    def tcr(self) -> float:
        """Theoretical compression rate; negative where float32 is stored."""
        return 1.0 - self.payload_bits / (16 * self.num_weights)

    @property
    def mcr(self) -> float:
        """Measured compression rate."""
        return 1.0 - self.file_bytes / self.fp16_bytes

    @property
    def sparsity(self) -> float:
        """Share of the matrices' elements that is not stored; negative where corrections outweigh what was cut."""
        return 1.0 - self.stored_weights / self.num_weights

    @property
    def bits_per_stored_weight(self) -> float:
        """Payload bits over stored elements."""
        return self.payload_bits / self.stored_weights

    @property
    def bits_per_weight(self) -> float:
        """File bits over the original's parameters: what a budget is counted in."""
        return 8 * self.file_bytes / self.num_parameters


def measure_footprint(folder: Path) -> Footprint:
    """The footprint of a plain or packed folder, from its headers. Raises SpqError as `open_model`."""
    checkpoint = open_model(folder)
    spec, manifest = checkpoint.spec, checkpoint.manifest
    linears = model_linears(spec)
    parameters = num_parameters(spec)
    stored = bits = resident = 0
    for module, shape in linears.items():
        plan = ModulePlan(kind="dense", shape=shape) if manifest is None else manifest.modules[module]
        for part, kind, count in _parts(module, plan):
            stored += count
            bits += count * (BITS[kind] if kind in BITS else 8 * _itemsize(checkpoint, f"{part}.weight"))
        decoded = plan.model_copy(update={"codec": "raw"})
        for name, (tensor_shape, dtype) in decoded.tensors(module, module_has_bias(spec, module)).items():
            resident += prod(tensor_shape) * (SIZES[dtype] if dtype in SIZES else _itemsize(checkpoint, name))
    for name, vector_shape in model_vectors(spec).items():
        resident += prod(vector_shape) * _itemsize(checkpoint, name)
    files = {info.path for info in checkpoint.tensors.values()}
    result = Footprint(
        file_bytes=sum(path.stat().st_size for path in files),
        resident_bytes=resident,
        fp16_bytes=2 * parameters,
        num_parameters=parameters,
        num_weights=sum(map(prod, linears.values())),
        stored_weights=stored,
        payload_bits=bits,
    )
    checkpoint.close()
    return result


def _parts(module: str, plan: ModulePlan) -> list[tuple[str, str, int]]:
    """(name, how it is stored, elements) of the matrices that make up a module."""
    rows, columns = plan.shape
    if plan.kind == "low_rank":
        return _pair(module, plan.rank or 0, plan.factors or "dense", rows, columns)
    parts = [(module, str(plan.kind), rows * columns)]
    if plan.correction is not None:
        parts += _pair(f"{module}.correction", plan.correction.rank, plan.correction.factors, rows, columns)
    return parts


def _pair(name: str, rank: int, stored: str, rows: int, columns: int) -> list[tuple[str, str, int]]:
    return [(f"{name}.down", stored, rank * columns), (f"{name}.up", stored, rank * rows)]


def _itemsize(checkpoint: Checkpoint, name: str) -> int:
    return DTYPES[checkpoint.tensors[name].dtype].itemsize
