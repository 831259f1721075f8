"""compress(): a model folder in, a packed folder out.

Not the passes over the layers (`pipeline`): here are the checks before, the output folder and the report. The folder
is made under a temporary name beside its final one and renamed at the end, config.json last, so that a run that dies
leaves nothing that could be taken for a model.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from spq.budget import MarketCache, market_weight
from spq.cache import source_hash
from spq.calibrate import choose_windows, text_hash, tokenize
from spq.checkpoint import Checkpoint, open_model
from spq.config import SPQConfig
from spq.errors import OutputError, UnsupportedModelError
from spq.layout import num_parameters
from spq.manifest import FORMAT_VERSION
from spq.memory import PeakMemory
from spq.output import MAX_SHARD_BYTES, put_in_place, refuse_existing, remove_orphans
from spq.peak import Peak
from spq.progress import Progress, StageClock
from spq.recode import recode
from spq.recover import check_installed, prepare
from spq.report import Report, read_report
from spq.rules import Rules
from spq.run import Run, Written
from spq.source import Source
from spq.tensorfile import DTYPES

__all__ = ["Progress", "compress"]


def compress(
    source: Path,
    out: Path,
    options: SPQConfig,
    *,
    calibration_text: str,
    device: torch.device,
    recovery_text: str = "",
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    markets: MarketCache | None = None,
) -> Report:
    """Compress the plain checkpoint in `source` into a packed folder `out`; returns what is in its spq_report.json.

    Holds one decoder layer, moments of its inputs and the calibration states (windows x len x hidden float32) at a
    time; where options.has_budget or options.recover_steps, once the whole float model. The text is only used where
    options.uses_text. `recovery_text` is to be trained on; empty: the calibration text, without the windows that a
    prediction is checked on. `markets`, given to several calls, spares budgets of one model all surveys but the first.
    Raises SpqError: a damaged or unsupported source, weights that are not finite, a text
    that is too short, an `out` that exists (unless `overwrite`) or cannot be written, recovery without its extra.
    """
    remove_orphans(out)
    refuse_existing(out, overwrite)
    if options.recover_steps:
        check_installed()
    checkpoint = open_model(source)
    if checkpoint.manifest is not None:
        raise UnsupportedModelError(f"{source}: already packed; compress the original checkpoint")
    memory = PeakMemory(device)
    layers = checkpoint.spec.num_layers
    deciding = market_weight() if options.has_budget else Rules.weight(options)
    clock = StageClock(layers, layers * deciding + Run.weight(options, layers), progress)
    windows = spare = lesson = ids = None
    length = min(options.calibration_len, checkpoint.spec.max_positions)
    with clock.stage("tokenize", 0, 0.0):
        if options.uses_text:
            ids = tokenize(source, calibration_text)
            windows, spare = choose_windows(ids, options.calibration_windows, length, options.seed)
        if options.recover_steps:
            text = recovery_text or calibration_text
            read = ids if ids is not None and text == calibration_text else tokenize(source, text)
            lesson = prepare(read, length, options.seed, text_hash(text), spare)
    clock.expected_bytes = _expected(checkpoint, options, windows, memory, device)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{temporary}: cannot be made ({error}); choose another output folder") from error
    run = Run(Source(source, checkpoint, device), options, windows, spare, clock, max_shard_bytes, lesson)
    if markets is not None:
        run.cache = markets
    try:
        written = run.make(temporary)
        report = _report(run, written, memory, calibration_text)
        report.save(temporary)
        made = temporary
        if options.entropy_coding:
            made = temporary / "coded"
            recode(temporary, made, "zstd")
            report = read_report(made)
        put_in_place(made, out, overwrite)
    except OSError as error:
        if error.errno is None:  # transformers raises those for what it cannot load
            raise
        raise OutputError(f"{out}: cannot be written ({error}); free some disk space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _expected(
    checkpoint: Checkpoint, options: SPQConfig, windows: Tensor | None, memory: PeakMemory, device: torch.device
) -> int:
    """Peak memory of what is to come, in bytes: resident with what is there already, or on a GPU."""
    gc.collect()  # tokenizers leave cycles
    itemsize = max(DTYPES[info.dtype].itemsize for info in checkpoint.tensors.values())
    shape = None if windows is None else (windows.shape[0], windows.shape[1])
    needed = Peak(checkpoint.spec, options, shape, itemsize).nbytes()
    return needed if device.type == "cuda" else memory.rss_now_bytes() + needed


def _report(run: Run, written: Written, memory: PeakMemory, text: str) -> Report:
    spec, windows = run.source.spec, run.windows
    parameters = num_parameters(spec)
    plans = written.manifest.modules.values()
    return Report(
        format_version=FORMAT_VERSION,
        source_hash=source_hash(run.source.folder),
        calibration_hash="" if windows is None else text_hash(text),
        calibration_tokens=0 if windows is None else windows.numel(),
        options=run.options,
        matrices=written.matrices,
        mlp_widths=written.manifest.mlp_widths,
        num_low_rank=sum(plan.kind == "low_rank" for plan in plans),
        num_pruned_neurons=sum(spec.intermediate_size - width for width in written.manifest.mlp_widths),
        num_parameters=parameters,
        bytes_fp16=2 * parameters,
        bytes_fp32=4 * parameters,
        bytes_packed=written.bytes_packed,
        bytes_files=written.bytes_files,
        device=str(run.source.device),
        rss_at_start_bytes=memory.rss_at_start_bytes,
        peak_rss_bytes=memory.rss_bytes(),
        peak_gpu_bytes=memory.gpu_bytes(),
        expected_bytes=run.clock.expected_bytes,
        seconds={name: round(value, 3) for name, value in run.clock.seconds.items()},
        prediction=written.prediction,
        recovery=written.recovery,
    )
