"""python -m benchmarks.int8_prefill_loss: what the W8A8 mode of long steps costs in perplexity.

    python -m benchmarks.int8_prefill_loss --model FOLDER --text FILE [--presets int8,default] [--max-tokens N]

The model is compressed with each preset and evaluated through transformers in float32, as it is and with the input of
every int8 matrix of its layers rounded as `TritonOps(..., int8_prefill=True)` rounds it: one scale per token. Windows
are at most 256 tokens; every token counts as part of a long step. No GPU is needed, and no speed is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kernels.reference import int8_rows
from spq.calibrate import bundled_calibration, read_text, tokenize
from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.evaluate import perplexity
from spq.modules import Int8Linear

_WINDOW = 256


def round_inputs(model: nn.Module) -> int:
    """Round what every int8 matrix of the layers reads, from now on; the head keeps its input. How many there are."""
    layers = [m for name, m in model.named_modules() if isinstance(m, Int8Linear) and "lm_head" not in name]
    for layer in layers:
        layer.register_forward_pre_hook(_rounded)
    return len(layers)


def _rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (int8_rows(inputs[0]), *inputs[1:])


def measure(folder: Path, text: str, max_tokens: int | None) -> tuple[float, float, int]:
    """(perplexity, perplexity with int8 activations, number of matrices) of a packed folder."""
    checkpoint = open_model(folder)
    window = min(_WINDOW, checkpoint.spec.max_positions)
    checkpoint.close()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()  # type: ignore[no-untyped-call]
    ids = tokenize(folder, text)

    def logits(batch: Tensor) -> Tensor:
        scores: Tensor = model(batch, use_cache=False).logits
        return scores

    before = perplexity(logits, ids, window, max_tokens=max_tokens).value
    count = round_inputs(model)
    return before, perplexity(logits, ids, window, max_tokens=max_tokens).value, count


def main(arguments: list[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="Perplexity with 16-bit and with int8 activations.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder, not packed")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--presets", default="int8,default")
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args(arguments)
    text = read_text(options.text)
    print("| preset | int8 matrices | perplexity | with int8 activations | change |\n|---|---:|---:|---:|---:|")
    for preset in options.presets.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / preset
            calibration = read_text(bundled_calibration())
            config = SPQConfig.preset(preset)
            compress(options.model, out, config, calibration_text=calibration, device=torch.device("cpu"))
            before, after, count = measure(out, text, options.max_tokens)
        print(f"| {preset} | {count} | {before:.3f} | {after:.3f} | {after / before - 1:+.2%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
