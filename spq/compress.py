"""compress(): a model folder in, a packed folder out.

Not the passes over the layers (`pipeline`): here are the checks before, the output folder and the report. The folder
is made under a temporary name beside its final one and renamed at the end, config.json last, so that a run that dies
leaves nothing that could be taken for a model.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from spq.cache import source_hash
from spq.calibrate import choose_windows, text_hash, tokenize
from spq.checkpoint import Checkpoint, open_model, read_config
from spq.config import SPQConfig
from spq.errors import OutputError, UnsupportedModelError
from spq.layout import expected_source
from spq.manifest import FORMAT_VERSION, Manifest
from spq.memory import PeakMemory
from spq.pipeline import Pipeline, total_weight
from spq.progress import Progress, StageClock
from spq.report import Report
from spq.writer import TensorWriter, copy_companions

__all__ = ["Progress", "compress"]

MAX_SHARD_BYTES = 1 << 30


def compress(
    source: Path,
    out: Path,
    options: SPQConfig,
    *,
    calibration_text: str,
    device: torch.device,
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
    """Compress the plain checkpoint in `source` into a packed folder `out`; returns what is in its spq_report.json.

    Holds one decoder layer and the calibration states (windows x len x hidden float32) at a time. The calibration
    text is only read where options.uses_pruning. Raises SpqError: a damaged or unsupported source, weights that are
    not finite, a text that is too short, an `out` that exists (unless `overwrite`) or cannot be written.
    """
    refuse_existing(out, overwrite)
    checkpoint = open_model(source)
    if checkpoint.manifest is not None:
        raise UnsupportedModelError(f"{source}: already packed; compress the original checkpoint")
    memory = PeakMemory(device)
    clock = StageClock(checkpoint.spec.num_layers, total_weight(options, checkpoint.spec.num_layers), progress)
    windows = None
    if options.uses_pruning:
        with clock.stage("tokenize", 0, 0.0):
            windows = _windows(source, checkpoint, options, calibration_text)
    _remove_orphans(out)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        (temporary / "spool").mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{temporary}: cannot be made ({error}); choose another output folder") from error
    try:
        writer = TensorWriter(temporary, max_shard_bytes)
        pipeline = Pipeline(checkpoint, options, device, windows, writer, temporary / "spool", clock)
        pipeline.run()
        bytes_files = writer.finish()
        shutil.rmtree(temporary / "spool")
        copy_companions(source, temporary)
        manifest = Manifest(options=options, modules=pipeline.plans, mlp_widths=tuple(pipeline.widths))
        report = _report(checkpoint, pipeline, memory, source, calibration_text, bytes_files)
        report.save(temporary)
        config = read_config(source) | {"quantization_config": manifest.dump()}
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        _move(temporary, out, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises OutputError where `out` is there and may not be replaced, or is no model folder."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists already; choose another output folder, or replace it with --overwrite")
    if not (out / "config.json").is_file():
        raise OutputError(f"{out}: is no model folder (no config.json), so it is not overwritten; remove it yourself")


def _remove_orphans(out: Path) -> None:
    """Delete the temporary folders of runs for the same `out` whose process is gone: killed ones cannot do it."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        process = folder.name.split(".")[-2]
        if process.isdecimal() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _windows(source: Path, checkpoint: Checkpoint, options: SPQConfig, text: str) -> Tensor:
    length = min(options.calibration_len, checkpoint.spec.max_positions)
    return choose_windows(tokenize(source, text), options.calibration_windows, length, options.seed)


def _move(temporary: Path, out: Path, overwrite: bool) -> None:
    """Put the finished folder in place. Raises OutputError where another run was faster."""
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    try:
        if overwrite and out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be put in place ({error}); it may have appeared during the run") from error
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _report(
    checkpoint: Checkpoint, pipeline: Pipeline, memory: PeakMemory, source: Path, text: str, bytes_files: int
) -> Report:
    options, windows, spec = pipeline.options, pipeline.windows, checkpoint.spec
    parameters = sum(prod(shape) for shape in expected_source(spec).values())
    return Report(
        format_version=FORMAT_VERSION,
        source_hash=source_hash(source),
        calibration_hash="" if windows is None else text_hash(text),
        calibration_tokens=0 if windows is None else windows.numel(),
        options=options,
        matrices=pipeline.matrices,
        mlp_widths=tuple(pipeline.widths),
        num_low_rank=sum(plan.kind == "low_rank" for plan in pipeline.plans.values()),
        num_pruned_neurons=sum(spec.intermediate_size - width for width in pipeline.widths),
        num_parameters=parameters,
        bytes_fp16=2 * parameters,
        bytes_fp32=4 * parameters,
        bytes_packed=pipeline.writer.tensor_bytes,
        bytes_files=bytes_files,
        device=str(pipeline.device),
        rss_at_start_bytes=memory.rss_at_start_bytes,
        peak_rss_bytes=memory.rss_bytes(),
        peak_gpu_bytes=memory.gpu_bytes(),
        seconds={name: round(value, 3) for name, value in pipeline.clock.seconds.items()},
    )
