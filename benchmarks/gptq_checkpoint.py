"""`python -m benchmarks.gptq_checkpoint FOLDER OUT --bits 4`: a rival of `docs/results.md`, made by GPTQModel.

Runs with the Python of an environment that has GPTQModel (see benchmarks/README.md); nothing here needs it installed.
The calibration windows are those that `spq-compress` takes from the same text by default.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from spq.calibrate import choose_windows, read_text, tokenize


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gptq_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="model folder, not packed")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--bits", type=int, choices=[4, 8], required=True)
    parser.add_argument("--group", type=int, default=128, help="inputs per scale; must divide every width")
    parser.add_argument("--calibration", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where to quantize, cpu or cuda (default: cpu)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gptqmodel = importlib.import_module("gptqmodel")
    ids = tokenize(arguments.folder, read_text(arguments.calibration))
    windows, _ = choose_windows(ids, arguments.windows, arguments.window_tokens, arguments.seed)
    config = gptqmodel.QuantizeConfig(bits=arguments.bits, group_size=arguments.group, sym=True, desc_act=False)
    model = gptqmodel.GPTQModel.load(str(arguments.folder), config, device=arguments.device, dtype=torch.float16)
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    model.quantize(samples, batch_size=1)
    model.save(str(arguments.out))


if __name__ == "__main__":
    main()
