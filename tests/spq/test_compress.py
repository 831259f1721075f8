from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernels.weights import Int8Weight, LowRankWeight
from spq.checkpoint import open_model
from spq.compress import Progress, compress
from spq.config import SPQConfig
from spq.decoder import LayerRunner
from spq.errors import CalibrationError, ModelFileError, OutputError, UnsupportedModelError
from spq.quantize import quantize
from spq.report import read_report
from spq.svd import decompose

CPU = torch.device("cpu")
FAMILIES = ["llama", "llama_bias", "mistral", "qwen2", "qwen3"]


def tiny_options(**overrides: Any) -> SPQConfig:
    values = {"variance_threshold": 0.6, "max_prune_ratio": 0.3, "calibration_windows": 4, "calibration_len": 16}
    values |= {"prune_score": "up", "compensation": "none"}  # each matrix on its own: what is stored can be recomputed
    return SPQConfig.preset("default", **(values | overrides))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_what_the_stages_make_of_it(
    make_model: Callable[..., Path], text: str, tmp_path: Path, family: str, tied: bool
) -> None:
    source, out = make_model(family, tied=tied), tmp_path / "out"
    report = compress(source, out, tiny_options(), calibration_text=text, device=CPU)
    plain, packed = open_model(source), open_model(out)
    assert packed.manifest is not None
    assert report.num_low_rank > 0 and report.num_pruned_neurons > 0
    assert ("lm_head" in packed.manifest.modules) is not tied
    for name, plan in packed.manifest.modules.items():
        if name == "model.embed_tokens" or ".mlp." in name:
            continue
        before, after = plain.linear(name), packed.linear(name)
        if plan.kind == "low_rank":
            assert isinstance(after, LowRankWeight) and plan.rank is not None
            down, up = decompose(before.dequantize()).factors(plan.rank, "down")
            assert torch.equal(after.down.qweight, quantize(down, True).qweight)  # type: ignore[union-attr]
            assert torch.equal(after.up.qweight, quantize(up, True).qweight)  # type: ignore[union-attr]
        else:
            assert isinstance(after, Int8Weight)
            assert torch.equal(after.qweight, quantize(before.dequantize(), True).qweight)
        assert (before.bias is None) == (after.bias is None)
        if before.bias is not None and after.bias is not None:
            assert torch.equal(before.bias, after.bias)
    for layer, width in enumerate(packed.manifest.mlp_widths):
        prefix = f"model.layers.{layer}.mlp"
        gate, up, down = (packed.linear(f"{prefix}.{name}") for name in ("gate_proj", "up_proj", "down_proj"))
        source_up, source_down = plain.linear(f"{prefix}.up_proj"), plain.linear(f"{prefix}.down_proj")
        rows = quantize(source_up.dequantize(), True).qweight
        kept = [i for row in up.qweight for i in (rows == row).all(dim=1).nonzero()[:, 0].tolist()]  # type: ignore[union-attr]
        assert len(kept) == width and kept == sorted(kept)
        expected = quantize(source_down.dequantize()[:, kept], True)
        assert torch.equal(expected.qweight, down.qweight)  # type: ignore[union-attr]
        gate_rows = quantize(plain.linear(f"{prefix}.gate_proj").dequantize()[kept], True)
        assert torch.equal(gate_rows.qweight, gate.qweight)  # type: ignore[union-attr]
        if source_up.bias is not None and source_down.bias is not None:
            assert torch.equal(up.bias, source_up.bias[kept])  # type: ignore[arg-type]
            assert torch.equal(down.bias, source_down.bias)  # type: ignore[arg-type]


def test_pruned_neurons_are_those_with_the_smallest_activation(
    make_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    weak = [3, 10, 11, 40]
    for layer in range(3):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][weak] *= 1e-3
    save_file(tensors, source / "model.safetensors")
    options = tiny_options(
        variance_threshold=1.0, min_prune_ratio=0.055, max_prune_ratio=0.055, width_multiple=1, quantize=False
    )
    compress(source, tmp_path / "out", options, calibration_text=text, device=CPU)
    strong = [i for i in range(72) if i not in weak]
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(all_tensors(tmp_path / "out")[name], tensors[name][strong])


def test_activations_are_measured_with_the_factorised_attention(
    make_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[dict[str, torch.Tensor]] = []
    build = LayerRunner.build

    def spy(self: LayerRunner, layer: int, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        built.append(dict(state))
        return build(self, layer, state)

    monkeypatch.setattr(LayerRunner, "build", spy)
    source, options = make_model(), tiny_options()
    report = compress(source, tmp_path / "out", options, calibration_text=text, device=CPU)
    plain = open_model(source)
    for layer, state in enumerate(built):
        for local in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            name = f"model.layers.{layer}.{local}"
            rank, weight = report.matrices[name].rank, plain.linear(name).dequantize()
            if rank is None:
                assert torch.equal(state[f"{local}.weight"], weight)
            else:
                down, up = decompose(weight).factors(rank, options.sigma)
                assert torch.equal(state[f"{local}.weight"], up @ down)
                assert not torch.allclose(up @ down, weight, atol=1e-3)
    assert len(built) == 3 and report.num_low_rank > 0


def test_nothing_asked_for_is_identity(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("qwen3", dtype=torch.bfloat16)
    options = SPQConfig.preset("int8", quantize=False)
    report = compress(source, tmp_path / "out", options, calibration_text="", device=CPU)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.bytes_packed == report.bytes_fp16 and report.calibration_hash == ""


def test_shards_do_not_change_the_model(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    whole, sharded = make_model(), tmp_path / "sharded"
    first, second = tmp_path / "a", tmp_path / "b"
    compress(whole, first, tiny_options(), calibration_text=text, device=CPU)
    for path in whole.iterdir():
        sharded.mkdir(exist_ok=True)
        if path.suffix != ".safetensors":
            (sharded / path.name).write_bytes(path.read_bytes())
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, sharded / f"m{number}.safetensors")
    weight_map = {
        name: f"m{number}.safetensors" for number, part in enumerate((names[::2], names[1::2])) for name in part
    }
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = compress(sharded, second, tiny_options(), calibration_text=text, device=CPU, max_shard_bytes=9000)
    files = sorted(second.glob("*.safetensors"))
    assert len(files) > 2 and report.bytes_files == sum(path.stat().st_size for path in files)
    a, b = all_tensors(first), all_tensors(second)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    open_model(second).close()
    with safe_open(files[0], "pt") as file:  # the reference reader agrees
        assert file.metadata().keys() == {"format", "crc32"} and file.metadata()["format"] == "pt"


def test_counted_bytes_are_file_bytes(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source, out = make_model(tied=True), tmp_path / "out"
    report = compress(source, out, tiny_options(), calibration_text=text, device=CPU)
    file = out / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert report.bytes_files == file.stat().st_size == report.bytes_packed + header
    norms = sum(info.nbytes for name, info in open_model(out).tensors.items() if "norm" in name)
    assert sum(matrix.bytes for matrix in report.matrices.values()) + norms == report.bytes_packed
    counted = sum(p.numel() for p in all_tensors(source).values())
    assert report.num_parameters == counted and report.bytes_fp32 == 4 * counted
    assert read_report(out) == report


@pytest.mark.parametrize("preset", ["paper", "int8"])
def test_other_presets(make_model: Callable[..., Path], text: str, tmp_path: Path, preset: str) -> None:
    overrides = {"calibration_windows": 4, "calibration_len": 16} if preset == "paper" else {}
    options = SPQConfig.preset(preset, **overrides)
    report = compress(make_model(), tmp_path / "out", options, calibration_text=text, device=CPU)
    modules = open_model(tmp_path / "out").manifest.modules  # type: ignore[union-attr]
    assert modules["model.embed_tokens"].kind == ("dense" if preset == "paper" else "int8")
    per_channel = report.matrices["model.layers.0.self_attn.o_proj"].per_channel
    assert per_channel is (preset == "int8")
    scale = all_tensors(tmp_path / "out")["model.layers.0.self_attn.o_proj.scale"]
    assert (scale.unique().numel() == 1) is (preset == "paper")


def test_paper_threshold_rules_see_every_factor(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    report = compress(
        make_model(), tmp_path / "out", tiny_options(granularity="mix_percentile"), calibration_text=text, device=CPU
    )
    sizes = [260]
    for name, matrix in report.matrices.items():
        if name not in ("lm_head", "model.embed_tokens"):
            sizes += [matrix.shape[0]] if matrix.rank is None else [matrix.rank, matrix.shape[0]]
    median = sorted(sizes)[len(sizes) // 2] if len(sizes) % 2 else sum(sorted(sizes)[len(sizes) // 2 - 1 :][:2]) / 2
    for name, matrix in report.matrices.items():
        if name != "model.embed_tokens" and matrix.rank is None:
            assert matrix.per_channel is (matrix.shape[0] >= median)


def test_progress_rises_to_one(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    seen: list[Progress] = []
    compress(make_model(), tmp_path / "out", tiny_options(), calibration_text=text, device=CPU, progress=seen.append)
    done = [step.done for step in seen]
    assert done == sorted(done) and done[0] == 0.0 and done[-1] == 1.0 and seen[-1].eta_s == 0.0
    assert {step.stage for step in seen} == {"tokenize", "svd", "activations", "write"}


def test_a_failing_run_leaves_nothing(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    def stop(step: Progress) -> None:
        if step.stage == "write" and step.layer == 1:
            raise KeyboardInterrupt

    source = make_model()
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", tiny_options(), calibration_text=text, device=CPU, progress=stop)
    assert set(tmp_path.iterdir()) == before


def test_a_killed_run_leaves_no_model(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    (tmp_path / "text").write_text(text)
    program = """if True:
        import sys, time, torch
        from pathlib import Path
        from spq.compress import compress
        from spq.config import SPQConfig
        def stop(step):
            if step.stage == "write" and step.layer == 2:
                print("here", flush=True)
                time.sleep(60)
        options = SPQConfig.preset("default", calibration_windows=4, calibration_len=16)
        compress(Path(sys.argv[1]), Path(sys.argv[2]), options, calibration_text=Path(sys.argv[3]).read_text(),
                 device=torch.device("cpu"), progress=stop)
    """
    repo = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(out), str(tmp_path / "text")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(repo)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert not out.exists()
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    assert len(left) == 1 and not (left[0] / "config.json").exists()
    with pytest.raises(ModelFileError):
        open_model(left[0])


def test_existing_output_is_refused_or_replaced(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    int8 = SPQConfig.preset("int8")
    compress(source, out, int8, calibration_text="", device=CPU)
    stamp = (out / "config.json").stat().st_mtime_ns
    with pytest.raises(OutputError, match=r"exists already.*--overwrite"):
        compress(source, out, int8, calibration_text="", device=CPU)
    assert (out / "config.json").stat().st_mtime_ns == stamp
    time.sleep(0.01)
    compress(source, out, int8, calibration_text="", device=CPU, overwrite=True)
    assert (out / "config.json").stat().st_mtime_ns > stamp
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").write_text("dear")
    with pytest.raises(OutputError, match="is no model folder"):
        compress(source, tmp_path / "mine", int8, calibration_text="", device=CPU, overwrite=True)
    with pytest.raises(UnsupportedModelError, match="already packed"):
        compress(out, tmp_path / "again", int8, calibration_text="", device=CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_named(
    make_model: Callable[..., Path], tmp_path: Path, name: str, value: float
) -> None:
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ModelFileError, match=f"{name} holds NaN or infinite"):
        compress(source, tmp_path / "out", SPQConfig.preset("int8"), calibration_text="", device=CPU)
    assert not (tmp_path / "out").exists()


def test_companions_travel(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"no")
    compress(source, tmp_path / "out", SPQConfig.preset("int8"), calibration_text="", device=CPU)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "spq_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_short_text_and_wrong_tokenizer(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="4 windows of 16 need 64"):
        compress(make_model(), tmp_path / "out", tiny_options(), calibration_text="short", device=CPU)
    small = make_model("qwen2", vocab_size=50)
    with pytest.raises(ModelFileError, match="the embedding has 50 rows"):
        compress(small, tmp_path / "out", tiny_options(), calibration_text=text, device=CPU)


def test_memory_stays_near_one_layer(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """24 layers of 4.7 MiB; a run that kept them all would need more than 110 MiB. The second moment of down_proj's
    inputs is 8 MiB here, and its factor and copies as much each."""
    source = make_model(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4, num_key_value_heads=4
    )
    report = compress(
        source,
        tmp_path / "out",
        SPQConfig.preset("default", calibration_windows=4, calibration_len=32),
        calibration_text="abcdefgh" * 100,
        device=CPU,
    )
    assert report.bytes_fp32 > 95 << 20
    assert report.peak_rss_bytes - report.rss_at_start_bytes < 85 << 20


def test_folders_of_killed_runs_are_removed_and_those_of_living_ones_are_not(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    child = subprocess.Popen(["true"])
    child.wait()  # a process number that is free now
    orphan, alive = tmp_path / f".out.{child.pid}.tmp", tmp_path / f".out.{os.getppid()}.tmp"
    for folder in (orphan, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    compress(make_model(), tmp_path / "out", SPQConfig.preset("int8"), calibration_text="", device=CPU)
    assert not orphan.exists()
    assert alive.exists()
