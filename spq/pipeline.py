"""The passes of a compression over a checkpoint, one decoder layer at a time: S (SVD), P (pruning), Q (int8).

Not the output folder (`compress`). The order is SPQ's: activations are measured with the attention already
factorised, pruning needs the scores of all layers, and rounding comes last. So there are two passes:

1. per layer: SVD of q, k, v, o; accepted factors go to a spool folder as floats; the layer runs on the calibration
   states and leaves one score per MLP neuron. Skipped where neither SVD nor pruning is asked for.
2. per layer: MLP rows and columns are dropped, everything is quantized and written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels.weights import DenseWeight, Leaf
from spq.architecture import ATTENTION, MLP
from spq.checkpoint import Checkpoint
from spq.config import SPQConfig
from spq.decoder import LayerRunner
from spq.errors import ModelFileError
from spq.layout import EMBEDDING, FINAL_NORM, HEAD, layer_linears, layer_vectors, linear_path
from spq.manifest import ModulePlan
from spq.progress import StageClock
from spq.prune import kept_neurons, kept_width, prune_ratios
from spq.quantize import CHUNK_ELEMENTS, GranularityRule, quantize, quantize_streamed
from spq.report import MatrixReport
from spq.svd import RankChoice, choose_rank, decompose
from spq.tensorfile import DTYPES, read_header, read_rows, read_tensor
from spq.writer import TensorWriter

SVD_WEIGHT, ACTIVATION_WEIGHT, WRITE_WEIGHT = 4.0, 2.0, 1.0  # rough shares of a layer's time


def total_weight(options: SPQConfig, num_layers: int) -> float:
    """Weight of all steps of a run, for `StageClock`; the embedding and the head count as one layer."""
    first = (SVD_WEIGHT if options.uses_svd else 0.0) + (ACTIVATION_WEIGHT if options.uses_pruning else 0.0)
    return num_layers * (first + WRITE_WEIGHT) + WRITE_WEIGHT


@dataclass(slots=True)
class Pipeline:
    """State of one run. `windows` int64 [count, len] are calibration tokens, None where none are needed."""

    checkpoint: Checkpoint
    options: SPQConfig
    device: torch.device
    windows: Tensor | None
    writer: TensorWriter
    spool: Path
    clock: StageClock
    plans: dict[str, ModulePlan] = field(default_factory=dict)
    matrices: dict[str, MatrixReport] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    _choices: dict[str, RankChoice] = field(default_factory=dict)
    _scores: list[Tensor] = field(default_factory=list)  # float32 [width] per layer

    def run(self) -> None:
        """Both passes. Raises ModelFileError for weights that are not finite."""
        spec = self.checkpoint.spec
        if self.options.uses_svd or self.options.uses_pruning:
            self._first_pass()
        self.widths = self._kept_widths()
        rule = self._granularity()
        with self.clock.stage("write", 0, WRITE_WEIGHT):
            self._write_table(EMBEDDING, per_channel=True if self.options.quantize_embedding else None)
            if not spec.tied:
                shape = (spec.vocab_size, spec.hidden_size)
                self._write_table(HEAD, rule.per_channel(HEAD, shape) if self.options.quantize else None)
            self.writer.add(FINAL_NORM, self._read(FINAL_NORM))
        for layer in range(spec.num_layers):
            with self.clock.stage("write", layer, WRITE_WEIGHT):
                self._write_layer(layer, rule)

    def _first_pass(self) -> None:
        spec, windows = self.checkpoint.spec, self.windows
        runner = hidden = None
        if windows is not None:
            runner = LayerRunner(spec, windows.shape[1], self.device)
            hidden = self._embed(windows)
        for layer in range(spec.num_layers):
            attention: dict[str, Tensor] = {}
            if self.options.uses_svd:
                with self.clock.stage("svd", layer, SVD_WEIGHT):
                    attention = self._factorise(layer)
            if runner is not None and hidden is not None:
                with self.clock.stage("activations", layer, ACTIVATION_WEIGHT):
                    state = self._layer_state(layer, attention)
                    score = runner.run(layer, runner.build(layer, state), hidden, observe=["score"]).score
                    if score is None or not bool(torch.isfinite(score).all()):
                        raise ModelFileError(f"activations of layer {layer} are not finite; the model is damaged")
                    self._scores.append(score)

    def _factorise(self, layer: int) -> dict[str, Tensor]:
        """Decide on and spool the factors of q, k, v, o; returns the approximated weights (kept ones are absent)."""
        approximated: dict[str, Tensor] = {}
        for local in ATTENTION:
            module = f"{self.checkpoint.spec.layer_prefix(layer)}.{linear_path(local)}"
            info = self.checkpoint.tensors[f"{module}.weight"]
            weight = self._read(f"{module}.weight").to(self.device, torch.float32)
            spectrum = decompose(weight)
            itemsize = 1 if self.options.quantize else DTYPES[info.dtype].itemsize
            bias = f"{module}.bias" in self.checkpoint.tensors
            shape = (weight.shape[0], weight.shape[1])
            choice = choose_rank(spectrum.energy, shape, bias, itemsize, self.options)
            self._choices[module] = choice
            if choice.rank is not None:
                down, up = spectrum.factors(choice.rank, self.options.sigma)
                save_file({"down": down.cpu(), "up": up.cpu()}, self.spool / f"{module}.safetensors")
                if self.options.uses_pruning:
                    approximated[f"{linear_path(local)}.weight"] = up @ down
        return approximated

    def _layer_state(self, layer: int, attention: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a layer by their names inside it, float32 on the device."""
        prefix = f"{self.checkpoint.spec.layer_prefix(layer)}."
        names = list(layer_vectors(self.checkpoint.spec, layer))
        for module in layer_linears(self.checkpoint.spec, layer):
            names += [
                f"{module}.{part}" for part in ("weight", "bias") if f"{module}.{part}" in self.checkpoint.tensors
            ]
        state = dict(attention)
        for name in names:
            if (inside := name.removeprefix(prefix)) not in state:
                state[inside] = self._read(name).to(self.device, torch.float32)
        return state

    def _kept_widths(self) -> list[int]:
        spec, options = self.checkpoint.spec, self.options
        width = spec.intermediate_size
        if not self._scores:
            return [width] * spec.num_layers
        means = [float(score.mean()) for score in self._scores]
        ratios = prune_ratios(means, options.min_prune_ratio, options.max_prune_ratio)
        return [kept_width(width, ratio, options.width_multiple) for ratio in ratios]

    def _granularity(self) -> GranularityRule:
        """The scale rule over the output sizes of every linear layer as it will be stored; a tied head counts."""
        spec = self.checkpoint.spec
        sizes = [spec.vocab_size]
        for layer, width in enumerate(self.widths):
            for module, (rows, _) in layer_linears(spec, layer, width).items():
                choice = self._choices.get(module)
                sizes += [rows] if choice is None or choice.rank is None else [choice.rank, rows]
        return GranularityRule.over(self.options.granularity, sizes)

    def _write_layer(self, layer: int, rule: GranularityRule) -> None:
        spec, width = self.checkpoint.spec, self.widths[layer]
        for name in layer_vectors(spec, layer):
            self.writer.add(name, self._read(name))
        kept = None if width == spec.intermediate_size else kept_neurons(self._scores[layer], width)
        for module in layer_linears(spec, layer):
            weight = self._read(f"{module}.weight")
            bias = self._read(f"{module}.bias") if f"{module}.bias" in self.checkpoint.tensors else None
            before, local = (weight.shape[0], weight.shape[1]), module.rpartition(".")[2]
            if kept is not None and local in MLP:
                weight = weight[:, kept] if local == "down_proj" else weight[kept]
                bias = bias[kept] if bias is not None and local != "down_proj" else bias
            self._write_matrix(module, weight, bias, before, rule)

    def _write_matrix(
        self, module: str, weight: Tensor, bias: Tensor | None, before: tuple[int, int], rule: GranularityRule
    ) -> None:
        """Store one matrix [out, in] whole or as the factors in the spool."""
        choice = self._choices.get(module)
        shape = (weight.shape[0], weight.shape[1])
        written = self.writer.tensor_bytes
        packed = self.options.quantize
        if choice is None or choice.rank is None:
            per_channel = rule.per_channel(module, shape) if packed else None
            self._write_leaf(module, weight, bias, per_channel)
            plan = ModulePlan(kind="int8" if packed else "dense", shape=shape)
        else:
            factors = read_header(self.spool / f"{module}.safetensors")
            for name, extra in (("down", None), ("up", bias)):
                factor = read_tensor(factors[name]).to(torch.float32 if packed else weight.dtype)
                size = (factor.shape[0], factor.shape[1])
                per_channel = rule.per_channel(f"{module}.{name}", size) if packed else None
                self._write_leaf(
                    f"{module}.{name}", factor.to(weight.dtype) if not packed else factor, extra, per_channel
                )
            plan = ModulePlan(kind="low_rank", shape=shape, rank=choice.rank, factors="int8" if packed else "dense")
        self._note(module, plan, before, per_channel, self.writer.tensor_bytes - written, bias)

    def _write_leaf(self, name: str, weight: Tensor, bias: Tensor | None, per_channel: bool | None) -> None:
        leaf: Leaf = DenseWeight(weight, bias) if per_channel is None else quantize(weight, per_channel, bias)
        self._write(name, leaf)

    def _write(self, name: str, leaf: Leaf) -> None:
        if isinstance(leaf, DenseWeight):
            self.writer.add(f"{name}.weight", leaf.weight)
        else:
            self.writer.add(f"{name}.qweight", leaf.qweight)
            self.writer.add(f"{name}.scale", leaf.scale)
        if leaf.bias is not None:
            self.writer.add(f"{name}.bias", leaf.bias)

    def _write_table(self, module: str, per_channel: bool | None) -> None:
        """The embedding or the head, read by row ranges: it can be larger than a layer."""
        info = self.checkpoint.tensors[f"{module}.weight"]
        shape = (info.shape[0], info.shape[1])
        written = self.writer.tensor_bytes
        if per_channel is None:
            self._write(module, DenseWeight(self._read(info.name)))
        else:
            self._write(module, quantize_streamed(lambda a, b: self._read(info.name, (a, b)), shape, per_channel))
        plan = ModulePlan(kind="dense" if per_channel is None else "int8", shape=shape)
        self._note(module, plan, shape, per_channel, self.writer.tensor_bytes - written, None)

    def _note(
        self,
        module: str,
        plan: ModulePlan,
        before: tuple[int, int],
        per_channel: bool | None,
        written: int,
        bias: Tensor | None,
    ) -> None:
        choice = self._choices.get(module)
        self.plans[module] = plan
        self.matrices[module] = MatrixReport(
            kind=plan.kind,
            shape_before=before,
            shape=plan.shape,
            rank=plan.rank,
            energy_rank=None if choice is None else choice.energy_rank,
            reason="" if choice is None else choice.reason,
            per_channel=per_channel,
            bytes_fp16=2 * before[0] * before[1] + (0 if bias is None else 2 * before[0]),
            bytes=written,
        )

    def _embed(self, windows: Tensor) -> Tensor:
        """Embedding rows of windows [count, len] -> float32 [count, len, hidden] on the CPU."""
        info = self.checkpoint.tensors[f"{EMBEDDING}.weight"]
        top = int(windows.max())
        if top >= info.shape[0]:
            raise ModelFileError(
                f"{info.path.parent}: its tokenizer makes token {top}, but the embedding has {info.shape[0]} rows"
            )
        hidden = torch.empty((*windows.shape, info.shape[1]), dtype=torch.float32)
        step = max(1, CHUNK_ELEMENTS // info.shape[1])
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            inside = (windows >= start) & (windows < stop)
            hidden[inside] = self._read(info.name, (start, stop))[windows[inside] - start].float()
        return hidden

    def _read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A source tensor, or some of its rows. Raises ModelFileError where a value is not finite."""
        info = self.checkpoint.tensors[name]
        tensor = read_tensor(info) if rows is None else read_rows(info, *rows)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{info.path}: {name} holds NaN or infinite values; download the model again")
        return tensor
