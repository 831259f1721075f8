"""LoRA recovery: training low-rank updates of a compressed model's matrices while it is still in float.

Hu et al. 2021 (arXiv 2106.09685), by the library peft (extra `recovery`). SPQ's released code (arXiv 2602.18420) trains
after rounding, embeddings and norms too, and keeps the updates beside the weights; here every matrix of the layers,
and each factor of a pair, gets an update, all else is frozen, and `recovered` adds the updates before anything is
rounded. Not the rounding (`pipeline`), and nothing for models that are integers already.

Memory: the whole model, in float32 on the CPU and in bfloat16 on a GPU, and the activations of 512 tokens (one window
where it is longer). Deterministic for a seed and a number of threads on the CPU; a GPU adds in no fixed order.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from spq.config import SPQConfig
from spq.errors import CalibrationError, OptionError
from spq.progress import StageClock
from spq.report import RecoveryReport

BATCH_TOKENS = 2048  # of a step
PIECE_TOKENS = 512  # at a time; gradients add up
SCALING = 4  # of an update: rank 8 and alpha 32 in the released code
WARM_UP = 0.1  # share of the steps, linear; the rest is a cosine down to 0
CLIP = 1.0  # largest norm of a gradient
HELD_OUT = 8  # windows the loss is told on, at most a quarter of the text
STEP_WEIGHT = 2.0  # a step's share of time, see `rules`

Update = tuple[Tensor, Tensor]  # down [rank, in], up [out, rank], float32 on the CPU: W + up @ down


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is trained on: `windows` int64 [count, len], in no order; `held_out` are only measured on."""

    windows: Tensor
    held_out: Tensor
    text_hash: str


def check_installed() -> None:
    """Raises OptionError naming the extra where peft is not there."""
    if importlib.util.find_spec("peft") is None:
        raise OptionError("recover_steps needs peft; install the extra: pip install 'spq-serve[recovery]'")


def prepare(ids: Tensor, length: int, seed: int, text_hash: str, avoid: Tensor | None = None) -> Lesson:
    """Cut ids [n] into windows of `length`, leaving out those in avoid [count, length].

    Raises CalibrationError where fewer than two are left.
    """
    windows = ids[: ids.numel() // length * length].view(-1, length)
    for other in () if avoid is None else avoid:
        windows = windows[(windows != other).any(dim=1)]
    if len(windows) < 2:
        raise CalibrationError(
            f"recovery text has {ids.numel()} tokens, which leaves {len(windows)} windows of {length} to train on; "
            "give a longer text or lower calibration_len"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held = max(1, min(HELD_OUT, len(windows) // 4))
    return Lesson(windows[order[held:]], windows[order[:held]], text_hash)


def train(
    folder: Path, lesson: Lesson, options: SPQConfig, device: torch.device, clock: StageClock
) -> tuple[dict[str, Update], RecoveryReport]:
    """Train on the folder of a float model; returns the updates by the name of matrix or factor, and what was gained.

    Raises OptionError where the loss is no longer a number.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model = model.to(device).eval()  # nothing is dropped at random
    layers = attach(model, options.recover_rank, options.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.recover_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, options.recover_steps))
    before = _loss(model, lesson.held_out)
    tokens = 0
    batches = _batches(lesson.windows, options.seed)
    for step in range(options.recover_steps):
        with clock.stage("recover", 0, STEP_WEIGHT):
            batch = next(batches)
            tokens += batch.numel()
            loss = _loss(model, batch, backward=True)
            if not math.isfinite(loss):
                raise OptionError(f"recover_lr {options.recover_lr}: the loss is {loss} at step {step}; lower it")
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    report = RecoveryReport(
        steps=options.recover_steps,
        tokens=tokens,
        parameters=sum(parameter.numel() for parameter in trained),
        loss_before=before,
        loss_after=_loss(model, lesson.held_out),
        held_out_tokens=lesson.held_out.numel() - len(lesson.held_out),
        text_hash=lesson.text_hash,
    )
    if not math.isfinite(report.loss_after):
        raise OptionError(f"recover_lr {options.recover_lr}: the loss is {report.loss_after} after training; lower it")
    return {name: _update(layer) for name, layer in layers.items()}, report


def attach(model: Any, rank: int, seed: int) -> dict[str, Any]:
    """Give every matrix of the decoder layers an update of zero to be trained, and freeze everything else.

    Returns peft's layers by module name. Parameters that are trained are float32.
    """
    from peft import LoraConfig, inject_adapter_in_model  # the extra `recovery`

    names = [
        name for name, module in model.named_modules() if name.startswith("model.layers.") and type(module) is nn.Linear
    ]
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=0.0, target_modules=names)
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return {name: model.get_submodule(name) for name in names}


def _update(layer: Any) -> Update:
    """The trained update of one of peft's layers."""
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return down.detach().float().cpu(), (up.detach().float() * layer.scaling[name]).cpu()


def _share(step: int, steps: int) -> float:
    """Of the highest learning rate, at `step` of `steps`."""
    warm_up = max(1, int(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step + 1 - warm_up) / (steps + 1 - warm_up))


def _batches(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches [count, len] of windows without end; each window comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, BATCH_TOKENS // windows.shape[1])
    while True:
        yield from torch.split(windows[torch.randperm(len(windows), generator=generator)], size)


def _loss(model: Any, windows: Tensor, backward: bool = False) -> float:
    """Mean loss of windows [count, len] in nats per token; `backward` adds up its gradients."""
    count, length = windows.shape
    total = 0.0
    with torch.set_grad_enabled(backward):
        for piece in torch.split(windows, max(1, PIECE_TOKENS // length)):
            ids = piece.to(model.device)
            scores = model(ids, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            loss = loss / (count * (length - 1))
            total += float(loss.detach())
            if backward:
                torch.autograd.backward(loss)
    return total
