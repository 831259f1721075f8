"""Damaged, degenerate and interrupted compressions: the right answer or a clear error, and nothing is left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spq.calibrate import tokenize
from spq.compress import Progress, compress
from spq.config import SPQConfig
from spq.errors import ModelFileError, OptionError, OutputError
from spq.report import Report

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"calibration_windows": 4, "calibration_len": 32, "group": 16}
VARIANTS: dict[str, SPQConfig] = {
    "default": SPQConfig.preset("default", **SMALL, variance_threshold=0.9, max_prune_ratio=0.2, rank_multiple=4),
    "whitened": SPQConfig.preset(
        "default", **SMALL, variance_threshold=0.97, max_prune_ratio=0.2, rank_multiple=4, min_saving=0.0,
        svd_metric="whitened", svd_residual=0.25, prune_score="energy", compensation="refit",
    ),
    "bias": SPQConfig.preset(
        "int8", **SMALL, max_prune_ratio=0.2, prune_score="energy", compensation="bias", scaling_alpha=0.5
    ),
    "int4": SPQConfig.preset("int4", **SMALL),
    "correction": SPQConfig.preset("int4", **SMALL, correction_rank=4, scaling_alpha=0.5),
    "coded": SPQConfig.preset("int8", **SMALL, integer_pruning=0.3, entropy_coding=True),
    "budget": SPQConfig.preset("budget", **SMALL, ratio=0.45),
}  # fmt: skip
FIRST = "model.layers.0."
Tensors = dict[str, torch.Tensor]


def edit(folder: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dead_neuron(tensors: Tensors) -> None:
    tensors[f"{FIRST}mlp.gate_proj.weight"][5] = 0
    tensors[f"{FIRST}mlp.up_proj.weight"][5] = 0
    tensors[f"{FIRST}mlp.down_proj.weight"][:, 5] = 0


def neuron_without_input(tensors: Tensors) -> None:
    tensors[f"{FIRST}mlp.up_proj.weight"][5:9] = 0  # only the inputs of down_proj are dead


def dead_channel(tensors: Tensors) -> None:
    """Channel 3 is zero in the embedding and in everything that adds to it: dead in every layer."""
    tensors["model.embed_tokens.weight"][:, 3] = 0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[3] = 0


def zero_matrix(tensors: Tensors) -> None:
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        tensors[f"{FIRST}{name}.weight"].zero_()


def zero_layer(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if name.startswith(FIRST) and name.endswith("proj.weight"):
            tensor.zero_()


def rank_one(tensors: Tensors) -> None:
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        rows, columns = tensors[f"{FIRST}{name}.weight"].shape
        pair = torch.linspace(-1, 1, rows), torch.linspace(0.5, -0.7, columns)
        tensors[f"{FIRST}{name}.weight"] = pair[0].outer(pair[1]) * 0.3


def another_dtype(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.startswith(FIRST):
            tensors[name] = tensors[name].bfloat16()


def equal_row(tensors: Tensors) -> None:
    for name in ("self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        tensors[f"{FIRST}{name}.weight"][7] = 0.125


CHANGES = [
    dead_neuron, neuron_without_input, dead_channel, zero_matrix, zero_layer, rank_one, another_dtype, equal_row,
]  # fmt: skip


@torch.no_grad()
def logits_of(folder: Path, text: str) -> torch.Tensor:
    ids = tokenize(folder, text)[None, :60]
    found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return found


def packed(source: Path, out: Path, text: str, name: str, **how: Any) -> Report:
    return compress(source, out, VARIANTS[name], calibration_text=text, device=CPU, **how)


def assert_near(out: Path, source: Path, text: str) -> None:
    """Random weights amplify every rounding; what is wrong altogether has an error of 1 and more."""
    wanted, found = logits_of(source, text), logits_of(out, text)
    assert bool(torch.isfinite(found).all())
    assert float((found - wanted).square().mean() / wanted.square().mean()) < 0.7


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "spq_report.json"}


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["default", "whitened", "correction", "budget"])  # the others have a part of these
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_degenerate_weights_come_out_near_the_original(
    make_model: Callable[..., Path], text: str, tmp_path: Path, change: Callable[[Tensors], None], name: str
) -> None:
    source = edit(make_model(), change)
    report = packed(source, tmp_path / "out", text, name)
    assert_near(tmp_path / "out", source, text)
    if report.prediction is not None:
        assert report.prediction.rise >= 0 and report.prediction.measured is not None


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [1e5, 1e7])
def test_huge_weights_are_stored_or_named(
    make_model: Callable[..., Path], text: str, tmp_path: Path, name: str, size: float
) -> None:
    def enlarge(tensors: Tensors) -> None:
        tensors[f"{FIRST}mlp.down_proj.weight"][4, 9] = size

    source = edit(make_model(), enlarge)
    four_bits = name in ("int4", "correction", "budget")
    if four_bits and size * 2 / 15 > 65504:
        with pytest.raises(OptionError, match=r"layers\.0\.mlp\.down_proj: a weight of 1e\+07 .* store this"):
            packed(source, tmp_path / "out", text, name)
        assert not (tmp_path / "out").exists() and not left_over(tmp_path)
    else:
        packed(source, tmp_path / "out", text, name)
        assert bool(torch.isfinite(logits_of(tmp_path / "out", text)).all())


def test_a_huge_entry_of_an_int4_table_is_named(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    def enlarge(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][7, 3] = 1e7

    options = SPQConfig.preset("int8", **SMALL, embedding_bits=4)
    with pytest.raises(OptionError, match=r"model\.embed_tokens: a weight of 1e\+07 .* store this matrix in 8 bits"):
        compress(edit(make_model(), enlarge), tmp_path / "out", options, calibration_text=text, device=CPU)
    assert not (tmp_path / "out").exists() and not left_over(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", VARIANTS)
def test_values_that_are_not_finite_are_named(
    make_model: Callable[..., Path], text: str, tmp_path: Path, name: str, value: float
) -> None:
    def damage(tensors: Tensors) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][70, 31] = value

    with pytest.raises(ModelFileError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN or infinite"):
        packed(edit(make_model(), damage), tmp_path / "out", text, name)
    assert not (tmp_path / "out").exists() and not left_over(tmp_path)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to let files grow beyond (EFBIG), in whatever language they are written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["default", "int4", "budget"])
def test_a_refused_write_of_any_file_ends_cleanly(
    make_model: Callable[..., Path], text: str, tmp_path: Path, name: str
) -> None:
    source = make_model()
    packed(source, tmp_path / "whole", text, name)
    sizes = {path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    assert len(sizes) >= 4
    for size in sorted(sizes):
        with files_of_at_most(size - 1), pytest.raises(OutputError, match="cannot be written"):
            packed(source, tmp_path / "out", text, name)
        assert not (tmp_path / "out").exists() and not left_over(tmp_path)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("default", "spq.rules.save_file"),
        ("int4", "spq.run.copy_companions"),
        ("budget", "spq.writer._copy"),
        ("budget", "spq.writer.TensorWriter.finish"),
        ("int4", "spq.report.Report.save"),
        ("coded", "spq.recode.copy_companions"),
    ],
)
def test_a_full_disk_ends_cleanly(
    make_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    def full(*_args: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, full)
    source = edit(make_model(), rank_one)  # which is sure to become factor pairs
    with pytest.raises(OutputError, match=r"cannot be (written|put in place).*No space left"):
        packed(source, tmp_path / "out", text, name)
    assert not (tmp_path / "out").exists() and not left_over(tmp_path)


def killed(source: Path, out: Path, text: str, name: str, stop: Callable[[Progress], None], after_s: float) -> int:
    """Exit status of a run in another process that `stop`, or the time, kills."""

    def run() -> None:
        packed(source, out, text, name, progress=stop, overwrite=True)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(after_s)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def at(stage: str, layer: int) -> Callable[[Progress], None]:
    def stop(step: Progress) -> None:
        if (step.stage, step.layer) == (stage, layer):
            os.kill(os.getpid(), signal.SIGKILL)

    return stop


POINTS = {
    "default": [("tokenize", 0), ("svd", 1), ("activations", 2), ("write", 0), ("write", 2)],
    "int4": [("write", 1)],
    "budget": [("survey", 1), ("sensitivity", 0), ("write", 0), ("write", 2)],
}


@pytest.mark.parametrize("name", POINTS)
def test_after_a_kill_the_same_bytes_come_out(
    make_model: Callable[..., Path], text: str, tmp_path: Path, name: str
) -> None:
    source, out = make_model(), tmp_path / "out"
    begun_s = time.monotonic()
    packed(source, tmp_path / "whole", text, name)
    took_s = time.monotonic() - begun_s
    for stage, layer in POINTS[name]:
        assert killed(source, out, text, name, at(stage, layer), 60.0) == -signal.SIGKILL
        assert not out.exists()
    draw = random.Random(0)
    for _ in range(4):  # anywhere, between files and renames too
        killed(source, out, text, name, lambda step: None, draw.random() * took_s)
    packed(source, out, text, name, overwrite=True)
    assert contents(out) == contents(tmp_path / "whole") and not left_over(tmp_path)


def test_a_kill_between_the_renames_loses_no_model(
    make_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model(), tmp_path / "out"
    packed(source, out, text, "int4")
    before = contents(out)
    replace = os.replace

    def aside_then_die(old: Path, new: Path) -> None:
        replace(old, new)
        if old == out:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", aside_then_die)
        assert killed(source, out, text, "int4", lambda step: None, 60.0) == -signal.SIGKILL
    assert not out.exists() and len(left_over(tmp_path)) == 2
    with pytest.raises(OutputError, match="exists already"):
        packed(source, out, text, "int4")
    assert contents(out) == before and not left_over(tmp_path)
