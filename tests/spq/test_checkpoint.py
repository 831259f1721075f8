from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.weights import DenseWeight, Int8Weight, LowRankWeight
from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import ModelFileError, PackedFormatError, UnsupportedModelError

Edit = Callable[[Path], None]


@pytest.fixture
def packed(make_model: Callable[..., Path], text: str, tmp_path: Path) -> Path:
    options = SPQConfig.preset(
        "default", variance_threshold=0.5, max_prune_ratio=0.3, calibration_windows=4, calibration_len=16
    )
    out = tmp_path / "packed"
    source = make_model("llama_bias", dtype=torch.float16)
    compress(source, out, options, calibration_text=text, device=torch.device("cpu"))
    return out


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_manifest(change: Callable[[dict[str, object]], object]) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"this is not a header" + b"0" * 50)


Q0 = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (edit_manifest(lambda m: m.update(format_version=3)), PackedFormatError, "packed format version 3, .* reads"),
        (edit_manifest(lambda m: m.pop("mlp_widths")), PackedFormatError, "quantization_config.mlp_widths: Field req"),
        (edit_manifest(lambda m: m.update(adapter={})), PackedFormatError, "quantization_config.adapter: Extra"),
        (edit_manifest(lambda m: m.update(mlp_widths=[72])), PackedFormatError, "1 entries for 3 layers"),
        (edit_manifest(lambda m: m["modules"].pop(UP)), PackedFormatError, f"module {UP} is missing from"),
        (edit_manifest(lambda m: m["modules"].update(extra=m["modules"][UP])), PackedFormatError, "extra is unknown"),
        (edit_manifest(lambda m: m["modules"][UP].update(shape=[1, 2])), PackedFormatError, rf"{UP} is \[1, 2\]"),
        (
            edit_manifest(lambda m: m["modules"][UP].update(rank=3)),
            PackedFormatError,
            "up_proj: Value error, int8 with rank 3",
        ),
        (edit_manifest(lambda m: m.update(quant_method="gptq")), UnsupportedModelError, "quantized with 'gptq'.*orig"),
        (edit_tensors(lambda t: t.pop(f"{UP}.scale")), PackedFormatError, f"tensor {UP}.scale .* is missing"),
        (
            edit_tensors(lambda t: t.update(lora=torch.zeros(2))),
            PackedFormatError,
            "tensor lora is not in its manifest",
        ),
        (
            edit_tensors(lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][1:].contiguous()})),
            PackedFormatError,
            rf"{UP}.qweight is \[\d+, 32\], should be",
        ),
        (
            edit_tensors(lambda t: t.update({f"{UP}.scale": t[f"{UP}.scale"].half()})),
            PackedFormatError,
            f"{UP}.scale is F16, should be F32",
        ),
        (cut, ModelFileError, r"model.safetensors: cut short: \d+ bytes, its header says \d+"),
        (cut_header, ModelFileError, "shorter than its header says"),
        (garbage, ModelFileError, "model.safetensors: not readable as JSON"),
        (lambda f: (f / "model.safetensors").unlink(), ModelFileError, "neither model.safetensors nor"),
        (lambda f: (f / "config.json").write_text("{"), ModelFileError, "config.json"),
    ],
)
def test_damage_is_refused_by_name(packed: Path, edit: Edit, error: type[Exception], message: str) -> None:
    open_model(packed).close()
    edit(packed)
    with pytest.raises(error, match=message):
        open_model(packed)


def test_plain_weights_come_back_bit_for_bit(make_model: Callable[..., Path]) -> None:
    folder = make_model("qwen2", dtype=torch.bfloat16, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    source = open_model(folder)
    assert source.manifest is None and source.dtype == "BF16"
    q = source.linear(Q0)
    assert isinstance(q, DenseWeight) and q.bias is not None
    assert torch.equal(q.weight, expected[f"{Q0}.weight"]) and torch.equal(q.bias, expected[f"{Q0}.bias"])
    assert source.linear("model.layers.0.self_attn.o_proj").bias is None
    assert torch.equal(source.vector("model.norm.weight"), expected["model.norm.weight"])
    assert torch.equal(source.embedding().weight, expected["model.embed_tokens.weight"])  # type: ignore[union-attr]
    source.close()
    with pytest.raises(ModelFileError, match="is not in the model"):
        source.vector("model.norm.weight")


def test_packed_kinds_are_told_apart(packed: Path) -> None:
    source = open_model(packed)
    assert source.manifest is not None
    kinds = {"int8": Int8Weight, "dense": DenseWeight, "low_rank": LowRankWeight}
    for name, plan in source.manifest.modules.items():
        weight = source.embedding() if name == "model.embed_tokens" else source.linear(name)
        assert isinstance(weight, kinds[plan.kind]) and weight.shape == plan.shape
    assert {plan.kind for plan in source.manifest.modules.values()} == {"int8", "low_rank"}
    low_rank = source.linear(Q0)
    assert isinstance(low_rank, LowRankWeight) and low_rank.bias is not None and low_rank.down.bias is None


def test_index_must_match_the_shards(make_model: Callable[..., Path]) -> None:
    folder = make_model(shard="20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.norm.weight"]
    other = next(name for name in index["weight_map"].values() if name != shard)
    for value, message in (
        ("missing.safetensors", "names shard 'missing.safetensors', which is missing"),
        ("../model.safetensors", "which is not a file name"),
        (other, f"'model.norm.weight' should be in '{other}', which does not hold it"),
    ):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.norm.weight": value}}))
        with pytest.raises(ModelFileError, match=message):
            open_model(folder)
    for text, message in (("[]", "not a JSON object"), ('{"weight_map": []}', "not a readable index")):
        path.write_text(text)
        with pytest.raises(ModelFileError, match=message):
            open_model(folder)


def test_plain_folder_is_checked(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value, message in (
        (f"{UP}.weight", None, f"tensor {UP}.weight .* is missing"),
        (f"{UP}.weight", torch.zeros(3, 3), r"is \[3, 3\], config.json says \[72, 32\]"),
        (f"{UP}.weight", torch.zeros(72, 32, dtype=torch.int8), "is I8; supported: F16, BF16, F32"),
    ):
        changed = dict(tensors)
        changed.pop(name)
        save_file(changed if value is None else changed | {name: value}, file)
        with pytest.raises(ModelFileError, match=message):
            open_model(folder)


def test_pickles_are_refused_with_the_remedy(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"pickled weights .pytorch_model.bin.*save_pretrained"):
        open_model(folder)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="not a folder"):
        open_model(tmp_path / "nothing")
