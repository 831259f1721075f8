from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import OutputError, PackedFormatError, UnsupportedModelError
from spq.layout import model_vectors, module_has_bias
from spq.manifest import CorrectionPlan, ModulePlan
from spq.recode import main, recode
from spq.report import read_report

DOWN = "model.layers.0.mlp.down_proj"  # with a correction
PLAIN = "model.layers.2.mlp.down_proj"
SIZES = {"hidden_size": 96, "intermediate_size": 160}


@pytest.fixture
def packed(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A packed folder with every kind of matrix, of integers that are worth coding."""
    source, out = make_model("qwen3", tied=True, dtype=torch.float16, **SIZES), tmp_path / "packed"
    compress(source, out, SPQConfig.preset("int8"), calibration_text="", device=torch.device("cpu"))
    checkpoint = open_model(out)
    assert checkpoint.manifest is not None
    plans = dict(checkpoint.manifest.modules)

    def change(module: str, **fields: Any) -> None:
        plans[module] = ModulePlan(shape=plans[module].shape, **fields)

    change("model.layers.0.self_attn.q_proj", kind="low_rank", rank=24, factors="int8")
    change("model.layers.0.self_attn.k_proj", kind="low_rank", rank=16, factors="int4", group=32)
    change("model.layers.0.mlp.up_proj", kind="int4", group=32)
    change("model.layers.1.mlp.up_proj", kind="int4", group=32, symmetric=False)
    change(DOWN, kind="int8", correction=CorrectionPlan(rank=8))
    change("model.layers.1.mlp.down_proj", kind="dense", correction=CorrectionPlan(rank=8, factors="int4"), group=32)
    change("model.layers.2.self_attn.o_proj", kind="dense")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: checkpoint.vector(name) for name in model_vectors(checkpoint.spec)}
    for module, plan in plans.items():
        for name, (shape, dtype) in plan.tensors(module, module_has_bias(checkpoint.spec, module)).items():
            noise = torch.randn(shape, generator=generator)
            if dtype == "int8":
                tensors[name] = (3 * noise).round().clamp(-127, 127).to(torch.int8)
            elif dtype == "uint8":
                halves = (1.5 * torch.randn((2, *shape), generator=generator)).round().clamp(-8, 7).to(torch.int32) + 8
                value = halves[0] if name.endswith("zero") else halves[0] + 16 * halves[1]
                tensors[name] = value.to(torch.uint8)
            else:
                wanted = {"F16": torch.float16, "F32": torch.float32, "float": torch.float16}[dtype]
                tensors[name] = (0.02 * noise.abs() + 0.01).to(wanted)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = checkpoint.manifest.model_copy(update={"modules": plans}).dump()
    (out / "config.json").write_text(json.dumps(config))
    return out


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a packed folder, decoded."""
    source = open_model(folder)
    assert source.manifest is not None
    names = list(model_vectors(source.spec))
    for module, plan in source.manifest.modules.items():
        names += plan.model_copy(update={"codec": "raw"}).tensors(module, module_has_bias(source.spec, module))
    return {name: source.vector(name) for name in names}


def test_there_and_back_is_the_same_file(packed: Path, tmp_path: Path) -> None:
    done = recode(packed, tmp_path / "coded", "zstd")
    assert done.matrices == done.coded + 1  # all but the dense one
    assert done.bytes_stored < 0.8 * done.bytes_raw
    coded = open_model(tmp_path / "coded")
    assert coded.manifest is not None
    assert coded.manifest.modules[DOWN].codec == "zstd"
    assert f"{DOWN}.qweight" not in coded.tensors and f"{DOWN}.correction.up.qweight.zstd" in coded.tensors
    before, after = contents(packed), contents(tmp_path / "coded")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    for module in coded.manifest.modules:
        if module != "model.embed_tokens":
            weight, expected = coded.linear(module), open_model(packed).linear(module)
            assert type(weight) is type(expected) and torch.equal(weight.dequantize(), expected.dequantize())
    recode(tmp_path / "coded", tmp_path / "raw", "raw")
    first, second = load_file(packed / "model.safetensors"), load_file(tmp_path / "raw" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert open_model(tmp_path / "raw").manifest == open_model(packed).manifest


def test_the_report_says_the_new_size(packed: Path, tmp_path: Path) -> None:
    recode(packed, tmp_path / "coded", "zstd")
    file = tmp_path / "coded" / "model.safetensors"
    assert read_report(tmp_path / "coded").bytes_files == file.stat().st_size < (packed / file.name).stat().st_size


def test_what_does_not_shrink_stays_raw(packed: Path, tmp_path: Path) -> None:
    path = packed / "model.safetensors"
    tensors = load_file(path)
    flat = torch.arange(-127, 128).repeat(200)[: tensors[f"{PLAIN}.qweight"].numel()]
    order = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))
    tensors[f"{PLAIN}.qweight"] = flat[order].to(torch.int8).view_as(tensors[f"{PLAIN}.qweight"])
    save_file(tensors, path)
    recode(packed, tmp_path / "coded", "zstd")
    coded = open_model(tmp_path / "coded")
    assert coded.manifest is not None
    assert coded.manifest.modules[PLAIN].codec == "raw" and f"{PLAIN}.qweight" in coded.tensors
    assert coded.manifest.modules["model.layers.1.mlp.up_proj"].codec == "zstd"


def test_transformers_loads_a_coded_folder(packed: Path, tmp_path: Path) -> None:
    recode(packed, tmp_path / "coded", "zstd")
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    models = []
    for folder in (packed, tmp_path / "coded"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        models.append(model)
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    models[1].save_pretrained(tmp_path / "saved")  # decoded, and says so
    before, after = contents(packed), contents(tmp_path / "saved")
    assert all(torch.equal(before[name], after[name]) for name in before)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def flip(tensor: torch.Tensor) -> None:
    tensor[tensor.numel() // 2] ^= 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: flip(t[f"{DOWN}.qweight.zstd"]), f"model.safetensors: {DOWN}.qweight: block 0 is damaged"),
        (lambda t: flip(t[f"{DOWN}.correction.down.qweight.zstd"]), f"{DOWN}.correction.down.qweight: block 0 is dam"),
        (lambda t: t[f"{DOWN}.qweight.blocks"].add_(1), f"{DOWN}.qweight: its blocks cover bytes 1 to"),
        (
            lambda t: t.update({f"{DOWN}.qweight.zstd": t[f"{DOWN}.qweight.zstd"][:-9].clone()}),
            f"{DOWN}.qweight: its blocks cover bytes 0 to",
        ),
    ],
)
def test_damage_in_the_data_is_named(
    packed: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    recode(packed, tmp_path / "coded", "zstd")
    edit(tmp_path / "coded", change)
    source = open_model(tmp_path / "coded")  # headers are whole
    with pytest.raises(PackedFormatError, match=message):
        source.linear(DOWN)
    with pytest.raises(PackedFormatError, match=message.removeprefix("model.safetensors: ")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "coded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DOWN}.qweight.blocks"), f"tensor {DOWN}.qweight.blocks .* is missing"),
        (lambda t: t.update({f"{DOWN}.qweight.blocks": torch.zeros(7, dtype=torch.int64)}), r"is \[7\], should be"),
        (lambda t: t.update({f"{DOWN}.qweight.zstd": torch.zeros(3, 3, dtype=torch.uint8)}), r"is \[3, 3\], should"),
        (lambda t: t.update({f"{DOWN}.qweight.zstd": torch.zeros(9)}), "zstd is F32, should be U8"),
        (lambda t: t.update({f"{DOWN}.qweight": torch.zeros(9)}), "is not in its manifest"),
    ],
)
def test_damage_in_the_headers_is_refused_at_once(
    packed: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    recode(packed, tmp_path / "coded", "zstd")
    edit(tmp_path / "coded", change)
    with pytest.raises(PackedFormatError, match=message):
        open_model(tmp_path / "coded")


def test_a_codec_needs_integers() -> None:
    with pytest.raises(ValueError, match="only integers are coded"):
        ModulePlan(kind="dense", shape=(2, 2), codec="zstd")


def test_refusals(packed: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="not packed"):
        recode(make_model("llama"), tmp_path / "coded", "zstd")
    with pytest.raises(OutputError, match="exists already"):
        recode(packed, packed, "zstd")
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_command_replaces_a_folder(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(packed), str(packed), "--overwrite"])
    assert "matrices coded" in capsys.readouterr().out
    assert any(name.endswith(".zstd") for name in open_model(packed).tensors)
    with pytest.raises(SystemExit) as stop:
        main([str(packed), str(packed)])
    assert stop.value.code == 2 and "exists already" in capsys.readouterr().err
