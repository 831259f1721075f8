"""A GPTQ checkpoint as plain float tensors, so that a rival's file can be judged without the rival's package.

Not GPTQ itself (`feedback` has our own error feedback). The layout is GPTQ's version 1, as AutoGPTQ and GPTQModel
write it: qweight int32 [in * bits / 32, out], consecutive inputs from the low bits up; qzeros int32 [groups, out *
bits / 32], zero points less one; scales [groups, out]; g_idx int32 [in], the group of every input.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spq.checkpoint import read_config
from spq.errors import ModelFileError
from spq.layout import EMBEDDING
from spq.quantize import quantize
from spq.tensorfile import locate_tensors, read_tensor
from spq.writer import copy_companions

TABLE = f"{EMBEDDING}.weight"
PARTS = ("qweight", "qzeros", "scales", "g_idx")  # of a packed matrix


@dataclass(frozen=True, slots=True)
class GptqFolder:
    """What a checkpoint is and weighs."""

    path: Path
    bits: int
    group: int
    file_bytes: int  # of the weight files
    tensor_bytes: int


def open_gptq(folder: Path) -> GptqFolder:
    """Describe a checkpoint. Raises ModelFileError where it is not GPTQ of version 1 with 4 or 8 bits."""
    found = read_config(folder).get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "gptq":
        raise ModelFileError(f"{folder}: config.json names no GPTQ checkpoint")
    if found.get("bits") not in (4, 8) or found.get("checkpoint_format", "gptq") != "gptq":
        raise ModelFileError(f"{folder}: GPTQ with bits {found.get('bits')} and format "
                             f"{found.get('checkpoint_format')}; only version 1 at 4 or 8 bits is read")  # fmt: skip
    tensors = locate_tensors(folder)
    files = {info.path for info in tensors.values()}
    return GptqFolder(
        folder,
        found["bits"],
        int(found.get("group_size", -1)),
        sum(path.stat().st_size for path in files),
        sum(info.nbytes for info in tensors.values()),
    )


def unpack_matrix(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int) -> Tensor:
    """W float32 [out, in] = (q - zero) * scale of the packed tensors (see above)."""
    q = _unpack(qweight.T, bits).T[: len(g_idx)]  # [in, out]; the last word may be padded
    zeros = _unpack(qzeros, bits)[:, : scales.shape[1]] + 1  # [groups, out]
    group = g_idx.long()
    return ((q - zeros[group]).float() * scales.float()[group]).T.contiguous()


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] -> int32 [rows, n * 32 / bits], low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def write_plain(found: GptqFolder, original: Path, out: Path, *, int8_table: bool = False) -> int:
    """Write `found` as a float32 folder that computes the same; returns the bytes int8 rows of the embedding save.

    Tensors that GPTQ leaves alone (embedding, norms) are taken from `original`: GPTQModel may store them as bfloat16.
    int8_table: the embedding rounded to int8 rows, which GPTQ does not do; 0 bytes are saved where it is not.
    """
    out.mkdir(parents=True)
    copy_companions(found.path, out)
    tensors, plain, saved = locate_tensors(found.path), locate_tensors(original), 0
    state: dict[str, Tensor] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            qweight, qzeros, scales, g_idx = (read_tensor(tensors[f"{module}.{key}"]) for key in PARTS)
            state[f"{module}.weight"] = unpack_matrix(qweight, qzeros, scales, g_idx, found.bits)
        elif part not in PARTS:
            if name not in plain:
                raise ModelFileError(f"{found.path}: {name} is not in {original}: not a checkpoint of this model")
            state[name] = read_tensor(plain[name]).float()
    if int8_table:
        table = quantize(state[TABLE], per_channel=True)
        state[TABLE] = table.dequantize().float()
        saved = table.qweight.numel() - table.scale.nbytes
    save_file(state, out / "model.safetensors")
    config = {key: value for key, value in read_config(found.path).items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1) + "\n", "utf-8")
    return saved
