from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spq.errors import ModelFileError
from spq.gptq import TABLE, open_gptq, unpack_matrix, write_plain
from spq.writer import copy_companions


def pack(values: Tensor, bits: int) -> Tensor:
    """Values int [rows, n] -> int32 [rows, ceil(n * bits / 32)], low bits first, one by one."""
    per_word = 32 // bits
    words = -(-values.shape[1] // per_word)
    packed = torch.zeros(values.shape[0], words, dtype=torch.int64)
    for column in range(values.shape[1]):
        packed[:, column // per_word] += values[:, column].long() << (bits * (column % per_word))
    return (packed - (packed >= 1 << 31).long() * (1 << 32)).to(torch.int32)


def as_gptq(weight: Tensor, bits: int, group: int, g_idx: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a random matrix of weight's shape [out, in], and its values."""
    rows, columns = weight.shape
    groups = -(-columns // group)
    q = torch.randint(0, 1 << bits, (columns, rows))
    zeros = torch.randint(1, 1 << bits, (groups, rows))
    scales = (torch.rand(groups, rows) * 0.1).half()
    values = ((q - zeros[g_idx]).float() * scales.float()[g_idx]).T
    tensors = {"qweight": pack(q.T, bits).T.contiguous(), "qzeros": pack(zeros - 1, bits), "scales": scales}
    return tensors | {"g_idx": g_idx.to(torch.int32)}, values


def make_checkpoint(source: Path, out: Path, bits: int) -> dict[str, Tensor]:
    """A GPTQ folder of random matrices; returns the values of all tensors."""
    out.mkdir()
    copy_companions(source, out)
    stored, values = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if "_proj" in name:
            g_idx = torch.arange(tensor.shape[1]) // 16
            parts, values[name] = as_gptq(tensor, bits, 16, g_idx)
            stored |= {f"{module}.{part}": value for part, value in parts.items()}
        else:
            stored[name], values[name] = tensor.bfloat16(), tensor
    save_file(stored, out / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": "gptq"}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_are_unpacked(bits: int) -> None:
    torch.manual_seed(0)
    g_idx = (torch.arange(44) // 16)[torch.randperm(44)]  # activation order; 44 and 20 fill no whole words
    tensors, values = as_gptq(torch.empty(20, 44), bits, 16, g_idx)
    found = unpack_matrix(tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"], bits)
    torch.testing.assert_close(found, values, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_becomes_plain(make_model: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    source = make_model(tied=True)
    values = make_checkpoint(source, tmp_path / "gptq", bits)
    found = open_gptq(tmp_path / "gptq")
    assert (found.bits, found.group) == (bits, 16)
    assert found.tensor_bytes < found.file_bytes == (tmp_path / "gptq" / "model.safetensors").stat().st_size
    assert write_plain(found, source, tmp_path / "plain") == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == values.keys()
    for name, value in values.items():  # what GPTQ left alone is the original's, not its bfloat16
        torch.testing.assert_close(plain[name], value, rtol=0, atol=0)
    rows, columns = values[TABLE].shape
    assert write_plain(found, source, tmp_path / "int8", int8_table=True) == rows * columns - 4 * rows
    table = load_file(tmp_path / "int8" / "model.safetensors")[TABLE]
    assert 0 < float((table - values[TABLE]).norm() / values[TABLE].norm()) < 0.02


@pytest.mark.parametrize(
    "quantization", [None, {"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": 3},
                     {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}],
)  # fmt: skip
def test_other_checkpoints_are_refused(
    make_model: Callable[..., Path], tmp_path: Path, quantization: dict[str, object] | None
) -> None:
    folder = make_model()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="GPTQ"):
        open_gptq(folder)
