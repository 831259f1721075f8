"""Manifest: what a packed folder says about itself, in `quantization_config` of its config.json (format v1).

Not the tensors (`checkpoint` checks them against this) and not the measurements of a run (`report`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spq.config import SPQConfig
from spq.errors import PackedFormatError

QUANT_METHOD = "spq"
FORMAT_VERSION = 1
REPORT_NAME = "spq_report.json"

Kind = Literal["int8", "low_rank", "dense"]
FloatOrInt8 = Literal["float", "int8"]


class ModulePlan(BaseModel):
    """How one matrix is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    shape: tuple[int, int]  # (out, in), after pruning
    rank: int | None = Field(default=None, ge=1)  # low_rank only
    factors: Literal["int8", "dense"] | None = None  # low_rank only: how both factors are stored

    def tensors(self, module: str, bias: bool) -> dict[str, tuple[tuple[int, ...], FloatOrInt8 | Literal["F32"]]]:
        """Tensor name -> (shape, dtype class) of what the folder must hold for this matrix."""
        rows, columns = self.shape
        found: dict[str, tuple[tuple[int, ...], FloatOrInt8 | Literal["F32"]]] = {}
        parts: list[tuple[str, int, int, bool]] = [(module, rows, columns, self.kind == "int8")]
        if self.kind == "low_rank":
            rank, packed = self.rank or 0, self.factors == "int8"
            parts = [(f"{module}.down", rank, columns, packed), (f"{module}.up", rows, rank, packed)]
        for name, out_features, in_features, packed in parts:
            if packed:
                found[f"{name}.qweight"] = ((out_features, in_features), "int8")
                found[f"{name}.scale"] = ((out_features,), "F32")
            else:
                found[f"{name}.weight"] = ((out_features, in_features), "float")
        if bias:
            found[f"{parts[-1][0]}.bias"] = ((rows,), "float")
        return found


class Manifest(BaseModel):
    """Contents of a packed folder, format version 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["spq"] = "spq"
    format_version: Literal[1] = 1
    options: SPQConfig
    modules: dict[str, ModulePlan]
    mlp_widths: tuple[int, ...]  # kept neurons of each layer

    @classmethod
    def parse(cls, data: dict[str, Any], path: Path) -> Manifest:
        """The manifest in `data`, read from `path`. Raises PackedFormatError naming the field."""
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise PackedFormatError(
                f"{path}: packed format version {version!r}, this program reads {FORMAT_VERSION}; compress again"
            )
        try:
            manifest = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PackedFormatError(f"{path}: quantization_config.{where}: {first['msg']}; compress again") from error
        for name, plan in manifest.modules.items():
            needed = plan.kind == "low_rank"
            if (plan.rank is not None) != needed or (plan.factors is not None) != needed:
                raise PackedFormatError(
                    f"{path}: module {name} is {plan.kind} with rank {plan.rank} and factors {plan.factors}; only a "
                    "low_rank module has these, and it needs both; compress again"
                )
        return manifest

    def dump(self) -> dict[str, Any]:
        """As JSON data; null fields are left out."""
        return self.model_dump(mode="json", exclude_none=False) | {
            "modules": {name: plan.model_dump(mode="json", exclude_none=True) for name, plan in self.modules.items()}
        }
