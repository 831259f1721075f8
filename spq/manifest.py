"""Manifest: what a packed folder says about itself, in `quantization_config` of its config.json.

Format 2 adds int4, corrections, biases of the compressor's own and coded integers to format 1, which is read as it was.

Not the tensors (`checkpoint` checks them against this) and not the measurements of a run (`report`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from spq.config import SPQConfig
from spq.entropy import num_blocks, row_blocks
from spq.errors import PackedFormatError

QUANT_METHOD = "spq"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
REPORT_NAME = "spq_report.json"

Stored = Literal["dense", "int8", "int4"]
Kind = Literal["dense", "int8", "int4", "low_rank"]
Codec = Literal["raw", "zstd"]
DtypeClass = Literal["float", "int8", "uint8", "F16", "F32", "I64"]
TensorShapes = dict[str, tuple[tuple[int, ...], DtypeClass]]  # tensor name -> (shape, what it may be stored as)
ANY = -1  # in a shape: as long as the coder made it


class CorrectionPlan(BaseModel):
    """The low-rank pair beside a matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1)
    factors: Stored = "int8"


class ModulePlan(BaseModel):
    """How one matrix is stored. `int4` matrices and factors have a group; only a low_rank one has rank and factors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    shape: tuple[int, int]  # (out, in), after pruning
    rank: int | None = Field(default=None, ge=1)
    factors: Stored | None = None  # how both factors are stored
    group: int | None = Field(default=None, ge=2, multiple_of=2)  # inputs per scale of int4
    symmetric: bool = True  # of int4: no zero points are stored
    bias: bool | None = None  # None: as the architecture has it
    correction: CorrectionPlan | None = None
    codec: Codec = "raw"  # of its integers; what is coded: see `spq.entropy`

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_pair = self.kind == "low_rank"
        if (self.rank is not None) != is_pair or (self.factors is not None) != is_pair:
            raise ValueError(
                f"{self.kind} with rank {self.rank} and factors {self.factors}; only a low_rank module has these, and "
                "it needs both"
            )
        packed = (self.kind, self.factors, None if self.correction is None else self.correction.factors)
        if (self.group is not None) != ("int4" in packed):
            raise ValueError(f"{packed} with group {self.group}; where something is int4, and only there, is a group")
        if self.correction is not None and is_pair:
            raise ValueError("a low_rank module has no correction: a larger rank is the same")
        if self.codec == "zstd" and not {"int8", "int4"} & set(packed):
            raise ValueError(f"codec zstd with {packed}: only integers are coded")
        return self

    def tensors(self, module: str, bias: bool) -> TensorShapes:
        """What the folder must hold for this matrix; `bias` is what the architecture has.

        X of a coded matrix's integers is stored as X.zstd and X.blocks, the offsets of its blocks.
        """
        found = self._raw(module, bias)
        for name, (shape, _) in self.coded(module).items():
            del found[name]
            rows, columns = shape
            found[f"{name}.zstd"] = ((ANY,), "uint8")
            found[f"{name}.blocks"] = ((num_blocks(rows * columns, row_blocks(shape)) + 1,), "I64")
        return found

    def integers(self, module: str) -> TensorShapes:
        """The integer tensors as they are without a codec."""
        return {name: entry for name, entry in self._raw(module, False).items() if entry[1] in ("int8", "uint8")}

    def coded(self, module: str) -> TensorShapes:
        """The tensors that are stored coded, as they come out of it."""
        return {} if self.codec == "raw" else self.integers(module)

    def _raw(self, module: str, bias: bool) -> TensorShapes:
        rows, columns = self.shape
        if self.kind == "low_rank":
            found = self._pair(module, self.rank or 0, self.factors or "dense")
            last = f"{module}.up"
        else:
            found, last = self._leaf(module, rows, columns, self.kind), module
        if self.correction is not None:
            found |= self._pair(f"{module}.correction", self.correction.rank, self.correction.factors)
        if bias if self.bias is None else self.bias:
            found[f"{last}.bias"] = ((rows,), "float")
        return found

    def _pair(self, name: str, rank: int, stored: Stored) -> TensorShapes:
        rows, columns = self.shape
        return self._leaf(f"{name}.down", rank, columns, stored) | self._leaf(f"{name}.up", rows, rank, stored)

    def _leaf(self, name: str, rows: int, columns: int, stored: Stored) -> TensorShapes:
        if stored == "dense":
            return {f"{name}.weight": ((rows, columns), "float")}
        if stored == "int8":
            return {f"{name}.qweight": ((rows, columns), "int8"), f"{name}.scale": ((rows,), "F32")}
        groups = -(-columns // (self.group or columns))
        found: TensorShapes = {
            f"{name}.qweight": ((rows, -(-columns // 2)), "uint8"),
            f"{name}.scale": ((rows, groups), "F16"),
        }
        if not self.symmetric:
            found[f"{name}.zero"] = ((rows, groups), "uint8")
        return found


class Manifest(BaseModel):
    """Contents of a packed folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["spq"] = "spq"
    format_version: Literal[1, 2] = 2
    options: SPQConfig
    modules: dict[str, ModulePlan]
    mlp_widths: tuple[PositiveInt, ...]  # kept neurons of each layer

    @classmethod
    def parse(cls, data: dict[str, Any], path: Path) -> Manifest:
        """The manifest in `data`, read from `path`. Raises PackedFormatError naming the field."""
        version = data.get("format_version")
        if version not in READABLE_VERSIONS:
            raise PackedFormatError(
                f"{path}: packed format version {version!r}, this program reads {READABLE_VERSIONS}; compress again"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PackedFormatError(f"{path}: quantization_config.{where}: {first['msg']}; compress again") from error

    def dump(self) -> dict[str, Any]:
        """As JSON data; of modules what is not the default."""
        modules = {name: plan.model_dump(mode="json", exclude_defaults=True) for name, plan in self.modules.items()}
        return self.model_dump(mode="json") | {"modules": modules}
