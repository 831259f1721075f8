"""The tensors of one matrix as a loader brings them, in any order, checked against the manifest.

Not vLLM's loader and not files. What does not belong is refused by its name, and so is what has not come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.weights import LinearWeight
from spq.entropy import CodedTensor, decode, row_blocks
from spq.errors import PackedFormatError
from spq.manifest import ANY, ModulePlan
from spq.stored import stored_weight

DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}


class Arrival:
    """What there is of one matrix; `module` is its full name, for example `model.layers.0.self_attn.q_proj`."""

    def __init__(self, module: str, plan: ModulePlan, bias: bool) -> None:
        """`bias`: whether the architecture has one; the plan may say otherwise."""
        self.module = module
        self.plan = plan
        self._expected = plan.tensors(module, bias)
        self._tensors: dict[str, Tensor] = {}

    @property
    def missing(self) -> list[str]:
        """Full names of the tensors that have not come."""
        return sorted(self._expected.keys() - self._tensors.keys())

    def take(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor by its name inside the module, for example `up.qweight`.

        Raises PackedFormatError for one that the manifest does not have, or has in another shape or dtype.
        """
        full = f"{self.module}.{name}"
        if full not in self._expected:
            raise PackedFormatError(f"tensor {full} is not in the manifest; compress again")
        shape, kind = self._expected[full]
        if tensor.shape != shape and not (shape == (ANY,) and tensor.dim() == 1):
            raise PackedFormatError(f"{full} is {list(tensor.shape)}, should be {list(shape)}")
        if not (tensor.is_floating_point() if kind == "float" else tensor.dtype == DTYPES[kind]):
            raise PackedFormatError(f"{full} is {tensor.dtype}, should be {kind}")
        self._tensors[full] = tensor

    def weight(self) -> LinearWeight:
        """The matrix; the tensors are given up. Raises PackedFormatError for missing ones and for a damaged block."""
        if self.missing:
            raise PackedFormatError(f"tensors are missing: {', '.join(self.missing)}; compress again")
        for name, (shape, kind) in self.plan.coded(self.module).items():
            coded = CodedTensor(
                self._tensors.pop(f"{name}.zstd"), self._tensors.pop(f"{name}.blocks"), row_blocks(shape)
            )
            self._tensors[name] = decode(coded, shape, DTYPES[kind], name, torch.get_num_threads())
        tensors, self._tensors = self._tensors, {}
        return stored_weight(self.module, self.plan, tensors, tensors.__getitem__)
