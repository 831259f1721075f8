"""How much the loss rises per unit of relative output error of each matrix, measured once with noise.

The linearity theorem (HIGGS, Malinovskii et al. 2024, theorem 1): for small errors the perplexity rises by a sum over
layers of a coefficient times a squared relative error. Here the error is that of the outputs on calibration text, and
the rise is the divergence KL(original || noisy) of the next token, which is what the loss rises by where the model
fits its text, without the loss's own noise. Not what turns options into errors (`survey`).

The float model is held whole, as transformers has it, in float32 on a CPU and in its own dtype on a GPU, with the
hidden states before every layer (layers x tokens x hidden, float32, on the CPU): noise in a layer runs from there on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from spq.decoder import LayerRunner
from spq.layout import EMBEDDING, HEAD
from spq.source import Source

DRAWS = 2  # of noise per matrix; their mean is taken
BATCH_TOKENS = 1024  # through the head at a time
PROBE_TOKENS = 2048  # of the calibration windows, whose loss is measured


@torch.inference_mode()
def measure(source: Source, windows: Tensor, variances: Mapping[str, float], seed: int) -> dict[str, float]:
    """KL in nats per token, by module, when its weight alone gets Gaussian noise of this variance.

    `windows` int64 [count, len] are the text.
    """
    device = source.device
    dtype = torch.float32 if device.type == "cpu" else "auto"  # half precision is slow and, in sums, rough on CPUs
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, local_files_only=True)
    probe = Probe(model.to(device).eval(), LayerRunner(source.spec, windows.shape[1], device, model.dtype), windows)
    probe.run_base()
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for name, variance in variances.items():
        parameter = model.get_submodule(name).weight
        original, total = parameter.clone(), 0.0
        for _ in range(DRAWS):
            noise = torch.randn(original.shape, generator=generator) * variance**0.5
            parameter.copy_(original + noise.to(original))
            total += probe.divergence(_first_layer(name, source))
        parameter.copy_(original)
        found[name] = total / DRAWS
    return found


@dataclass(slots=True)
class Probe:
    """The float model on one text, with what it says without noise."""

    model: Any
    runner: LayerRunner
    windows: Tensor
    states: list[Tensor] | None = None  # before each layer and after the last, float32 [count, len, hidden] on the CPU
    log_probs: Tensor | None = None  # [tokens, vocab] on the CPU

    def run_base(self) -> None:
        """Keep states and log probabilities of the model as it is."""
        hidden = self._embed()
        self.states = [hidden.clone()]
        for layer, module in enumerate(self.model.model.layers):
            self.runner.run(layer, module, hidden)
            self.states.append(hidden.clone())
        self.log_probs = torch.cat([self._head(part).cpu() for part in self._parts(hidden)])

    def divergence(self, first: int) -> float:
        """Mean KL(before || now) over the tokens, where what changed comes before layer `first` or in it (-1: in the
        embedding)."""
        assert self.states is not None and self.log_probs is not None
        hidden = self._embed() if first < 0 else self.states[first].clone()
        for layer in range(max(first, 0), len(self.model.model.layers)):
            self.runner.run(layer, self.model.model.layers[layer], hidden)
        total, start = 0.0, 0
        for part in self._parts(hidden):
            now = self._head(part)
            before = self.log_probs[start : start + len(now)].to(now.device)
            start += len(now)
            total += float((before.exp() * (before - now)).sum(-1).double().sum())
        return total / start

    def _embed(self) -> Tensor:
        device = self.model.get_input_embeddings().weight.device
        embedded: Tensor = self.model.get_input_embeddings()(self.windows.to(device))
        return embedded.float().cpu()

    def _parts(self, hidden: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = torch.split(hidden.flatten(0, 1), BATCH_TOKENS)
        return parts

    def _head(self, hidden: Tensor) -> Tensor:
        """float32 [tokens, vocab]."""
        weight = self.model.lm_head.weight
        logits = self.model.lm_head(self.model.model.norm(hidden.to(weight.device, weight.dtype)))
        return functional.log_softmax(logits.float(), -1)


def _first_layer(module: str, source: Source) -> int:
    """The layer from which a change of `module` shows; the number of layers for an untied head."""
    if module == EMBEDDING:
        return -1
    return source.spec.num_layers if module == HEAD else int(module.split(".")[2])
