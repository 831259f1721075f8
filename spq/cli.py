"""spq-compress: the command line of `compress`, and the only reader of the environment in this package.

Not a library: errors end the process with one line and status 2.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from spq.calibrate import bundled_calibration, read_text, text_hash
from spq.compress import Progress, compress
from spq.config import PresetName, SPQConfig
from spq.errors import OptionError, SpqError
from spq.evaluate import evaluate_folder
from spq.hub import find_model
from spq.output import refuse_existing
from spq.report import PerplexityReport, PredictionReport, Report

MIB = 1 << 20
GROUPS = {
    "budget (rank, width and bits of every matrix are chosen)": ("budget", "ratio", "target_perplexity"),
    "SVD (attention matrices)": (
        "variance_threshold",
        "rank_rule",
        "sigma",
        "min_saving",
        "rank_multiple",
        "svd_metric",
        "svd_last_layers",
        "svd_residual",
    ),
    "pruning (MLP neurons)": (
        "min_prune_ratio",
        "max_prune_ratio",
        "width_multiple",
        "prune_score",
        "compensation",
    ),
    "quantization": (
        "quantize",
        "granularity",
        "quantize_embedding",
        "bits",
        "embedding_bits",
        "group",
        "symmetric",
        "feedback",
        "correction_rank",
    ),
    "double compression": ("scaling_alpha", "integer_pruning", "coding_loss", "entropy_coding"),
    "recovery (LoRA training of the float model before rounding; extra `recovery`)": (
        "recover_steps",
        "recover_rank",
        "recover_lr",
    ),
    "calibration": ("calibration_windows", "calibration_len", "seed"),
}
BUDGETS = ("budget", "ratio", "target_perplexity")
METAVARS = {"budget": "BYTES", "ratio": "RATIO", "target_perplexity": "PPL", "bits": "4|8", "embedding_bits": "4|8"}
EPILOG = """Every option can also be set as SPQ_<NAME>, e.g. SPQ_MAX_PRUNE_RATIO=0.1 or SPQ_QUANTIZE=false; the command
line wins. Options of the three stages default to the preset's values; those shown are of the preset `default`."""


def build_parser() -> argparse.ArgumentParser:
    """The parser; option values stay strings, SPQConfig checks them."""
    parser = argparse.ArgumentParser(
        prog="spq-compress",
        description="Compress a LLaMA, Mistral, Qwen2 or Qwen3 checkpoint by SVD, pruning and int8 quantization.",
        epilog=EPILOG,
    )
    parser.add_argument("source", metavar="MODEL", help="model folder (safetensors) or Hugging Face id, e.g. org/name")
    parser.add_argument("-o", "--out", metavar="FOLDER", help="folder to write (required)")
    parser.add_argument("--preset", metavar="NAME", help=f"{', '.join(get_args(PresetName))} (default: default)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hugging Face id (default: main)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace FOLDER if it is a model folder")
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        if title == "calibration":
            group.add_argument("--calibration", metavar="FILE", help="UTF-8 text (default: the bundled sample)")
        if title.startswith("recovery"):
            group.add_argument("--recover-text", metavar="FILE", help="UTF-8 text (default: the calibration text)")
        for name in names:
            _add_option(group, name)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--evaluate", metavar="FILE", help="UTF-8 text to measure perplexity on, before and after")
    group.add_argument(
        "--evaluate-window", metavar="TOKENS", type=int, help="window (default: the context, at most 2048)"
    )
    group.add_argument("--evaluate-tokens", metavar="TOKENS", type=int, help="use only so many (default: all)")
    return parser


def _add_option(group: Any, name: str) -> None:
    field = SPQConfig.model_fields[name]
    flag, help_text = "--" + name.replace("_", "-"), field.description
    if field.annotation is bool:
        default = "yes" if field.default else "no"
        group.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=None, help=f"{help_text} (default: {default})"
        )
        return
    shown = {None: "none" if name in BUDGETS else "auto"}.get(field.default, field.default)
    choices = get_args(field.annotation) if isinstance(field.default, str) else ()
    metavar = "|".join(choices) if choices else METAVARS.get(name, "RATIO" if field.annotation is float else "N")
    group.add_argument(flag, metavar=metavar, help=f"{help_text} (default: {shown})")


def apply_environment(arguments: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Fill what the command line left open from SPQ_* variables. Raises OptionError for a value that means nothing."""
    for name, value in vars(arguments).items():
        text = environ.get(f"SPQ_{name.upper()}")
        if value is not None or text is None or name == "source":
            continue
        boolean = name == "overwrite" or (
            name in SPQConfig.model_fields and SPQConfig.model_fields[name].annotation is bool
        )
        if boolean:
            if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
                raise OptionError(f"SPQ_{name.upper()}={text!r} is neither true nor false")
            setattr(arguments, name, text.lower() in ("1", "true", "yes"))
        elif name in ("evaluate_window", "evaluate_tokens"):
            if not text.isdigit():
                raise OptionError(f"SPQ_{name.upper()}={text!r} is not a number of tokens")
            setattr(arguments, name, int(text))
        else:
            setattr(arguments, name, text)


def options_of(arguments: argparse.Namespace) -> SPQConfig:
    """The SPQConfig asked for. Raises OptionError naming the option."""
    given = {name: getattr(arguments, name) for names in GROUPS.values() for name in names}
    overrides = {name: value for name, value in given.items() if value is not None}
    for name in ("rank_multiple", "width_multiple", "svd_last_layers"):
        if overrides.get(name) == "auto":
            overrides[name] = None
    usual = "budget" if overrides.keys() & set(BUDGETS) else "default"
    return SPQConfig.preset(usual if arguments.preset is None else arguments.preset, **overrides)


def choose_device(name: str | None) -> torch.device:
    """The device for a name; auto takes CUDA where there is one. Raises OptionError."""
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise OptionError(f"device {name!r} is none of auto, cpu, cuda, cuda:N")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return torch.device(name)


def _refuse_unused(arguments: argparse.Namespace, options: SPQConfig) -> None:
    """Raises OptionError for an option that another one makes void."""
    if arguments.recover_text is not None and not options.recover_steps:
        raise OptionError(f"--recover-text {arguments.recover_text}: nothing is trained; add --recover-steps")
    if arguments.calibration is not None and not _needs_calibration(arguments, options):
        raise OptionError(
            f"--calibration {arguments.calibration}: nothing is calibrated with these options; leave it out"
        )
    for name in ("evaluate_window", "evaluate_tokens"):
        if getattr(arguments, name) is not None and arguments.evaluate is None:
            raise OptionError(f"--{name.replace('_', '-')} without a text; add --evaluate FILE")


def _needs_calibration(arguments: argparse.Namespace, options: SPQConfig) -> bool:
    return options.uses_text or (options.recover_steps > 0 and arguments.recover_text is None)


def run(arguments: argparse.Namespace) -> Report:
    """Do what was asked. Raises SpqError."""
    if arguments.out is None:
        raise OptionError("no output folder; give one with -o FOLDER")
    out, options, device = Path(arguments.out), options_of(arguments), choose_device(arguments.device)
    overwrite = bool(arguments.overwrite)
    refuse_existing(out, overwrite)
    _refuse_unused(arguments, options)
    evaluation = None if arguments.evaluate is None else read_text(Path(arguments.evaluate))
    text = ""
    if _needs_calibration(arguments, options):
        text = read_text(bundled_calibration() if arguments.calibration is None else Path(arguments.calibration))
    lesson = "" if arguments.recover_text is None else read_text(Path(arguments.recover_text))
    if options.recover_steps and evaluation is not None and text_hash(evaluation) == text_hash(lesson or text):
        raise OptionError(f"--evaluate {arguments.evaluate}: is the text that is trained on; evaluate on another one")
    source = find_model(arguments.source, arguments.revision)
    with tqdm(total=100.0, unit="%", bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}", disable=None) as bar:
        told = False

        def show(progress: Progress) -> None:
            nonlocal told
            if progress.expected_bytes is not None and not told:
                told = True
                bar.write(f"memory    peak of about {progress.expected_bytes / MIB:.0f} MiB expected", file=sys.stderr)
            bar.n = 100.0 * progress.done
            place = "" if progress.stage == "recover" else f" layer {progress.layer + 1}/{progress.num_layers}"
            bar.set_description_str(f"{progress.stage}{place}", refresh=False)
            eta = "" if progress.eta_s is None else f", about {progress.eta_s:.0f} s left"
            bar.set_postfix_str(f"{progress.elapsed_s:.0f} s{eta}")

        report = compress(
            source,
            out,
            options,
            calibration_text=text,
            device=device,
            recovery_text=lesson,
            progress=show,
            overwrite=overwrite,
        )
    if evaluation is not None:
        how = {"device": device, "window": arguments.evaluate_window, "max_tokens": arguments.evaluate_tokens}
        before, after = (evaluate_folder(folder, evaluation, **how) for folder in (source, out))
        measured = PerplexityReport(
            before=before.value,
            after=after.value,
            num_tokens=after.num_tokens,
            protocol=after.protocol,
            text_hash=text_hash(evaluation),
        )
        report = report.model_copy(update={"perplexity": measured})
        report.save(out)
    return report


def describe(report: Report) -> str:
    """The report in a few lines."""
    matrices = len(report.matrices)
    lines = [
        f"size      {report.bytes_packed / MIB:.2f} MiB, {report.ratio:.1%} of float16 "
        f"({report.bytes_fp16 / MIB:.2f} MiB), {report.ratio / 2:.1%} of float32",
        f"low rank  {report.num_low_rank} of {matrices} matrices",
        f"pruned    {report.num_pruned_neurons} MLP neurons",
        f"memory    peak {report.peak_rss_bytes / MIB:.0f} MiB resident "
        f"({report.rss_at_start_bytes / MIB:.0f} MiB before the run), {report.peak_gpu_bytes / MIB:.0f} MiB GPU"
        + ("" if report.expected_bytes is None else f"; {report.expected_bytes / MIB:.0f} MiB were expected"),
        "seconds   " + ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items()),
    ]
    if report.recovery is not None:
        found = report.recovery
        lines.append(
            f"recovered loss {found.loss_before:.4f} -> {found.loss_after:.4f} nats before rounding, on "
            f"{found.held_out_tokens} tokens of its text not trained on; {found.steps} steps, {found.tokens} tokens"
        )
    if report.prediction is not None:
        lines.append("predicted " + describe_prediction(report.prediction))
    if report.perplexity is not None:
        measured = report.perplexity
        lines.append(f"perplexity {measured.before:.3f} -> {measured.after:.3f} ({measured.protocol})")
    return "\n".join(lines)


def describe_prediction(found: PredictionReport) -> str:
    """What the allocator expected, what was measured, and a warning where they are far apart."""
    if found.base is None or found.predicted is None or found.measured is None:
        return f"the loss rises by {found.rise:.5f} nats; not checked: the calibration text has no windows left"
    weak = "; the prediction is weak: trust the measurement" if found.weak else ""
    tried = ", ".join(f"{name} {kl:.5f}" for name, kl in found.tried.items())
    return (
        f"perplexity {found.base:.3f} -> {found.predicted:.3f}, measured {found.measured:.3f} on {found.num_tokens} "
        f"tokens of the calibration text that nothing was fitted to{weak}"
        + (f"\nchosen by KL in nats per token: {tried}" if len(found.tried) > 1 else "")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for anything the user can mend."""
    arguments = build_parser().parse_args(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        apply_environment(arguments, os.environ)
        print(describe(run(arguments)))
    except SpqError as error:
        print(f"spq-compress: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
