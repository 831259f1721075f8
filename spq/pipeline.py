"""Writing a decided compression, one decoder layer at a time.

Not the output folder (`compress`) and not the decision (`rules`, `budget`). Where moments are needed, each layer sees
what the compressed layers before it make of the calibration text, and is asked for what the float layer would answer:
errors are not added up blindly. Order within a layer: scaling, pruning, then each matrix by its recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, Int8Weight, Leaf, LinearWeight, LowRankWeight
from spq.apply import INPUT_OF, Applier, Factors, readers
from spq.architecture import MLP
from spq.config import SPQConfig
from spq.decoder import ALL_INPUTS, InputName, LayerRunner
from spq.errors import OptionError
from spq.layout import EMBEDDING, FINAL_NORM, HEAD, layer_linears, layer_vectors, module_has_bias
from spq.manifest import ModulePlan
from spq.moments import Moments
from spq.progress import StageClock
from spq.prune import bias_compensation, refit_kept
from spq.quantize import quantize_streamed
from spq.quantize4 import quantize4_streamed
from spq.recipe import Decision, Storage
from spq.report import MatrixReport
from spq.scaling import channel_scales, fold
from spq.source import Source
from spq.squeeze import Candidate, squeeze
from spq.tensorfile import DTYPES
from spq.writer import TensorWriter

LayerMoments = dict[InputName, Moments]
FactorsOf = Callable[[str], Factors]  # by module name
WRITE_WEIGHT = 1.0  # a layer's share of time, see `rules`
NORMS: dict[InputName, str] = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}  # what feeds an input


@dataclass(slots=True)
class Pipeline:
    """State of the writing. `windows` int64 [count, len] are calibration tokens, None where no moments are needed."""

    source: Source
    options: SPQConfig
    decision: Decision
    windows: Tensor | None
    applier: Applier
    storage: Storage
    writer: TensorWriter
    clock: StageClock
    factors: FactorsOf | None = None  # of modules that the decision left factors for
    plans: dict[str, ModulePlan] = field(default_factory=dict)
    matrices: dict[str, MatrixReport] = field(default_factory=dict)

    def run(self) -> None:
        """Write everything. Raises ModelFileError for weights that are not finite."""
        spec = self.source.spec
        with self.clock.stage("write", 0, WRITE_WEIGHT):
            self._write_table(EMBEDDING)
            if not spec.tied:
                self._write_table(HEAD)
            self.writer.add(FINAL_NORM, self.source.read(FINAL_NORM))
        wanted = [self._wanted(layer) for layer in range(spec.num_layers)]
        last = max((layer for layer, names in enumerate(wanted) if names), default=-1)
        runner = hidden = None
        if self.windows is not None and last >= 0:
            runner = LayerRunner(spec, self.windows.shape[1], self.source.device)
            hidden = self.source.embed(self.windows)
        for layer in range(spec.num_layers):
            with self.clock.stage("write", layer, WRITE_WEIGHT):
                self._do_layer(layer, runner, hidden, wanted[layer], layer < last)

    def _do_layer(
        self, layer: int, runner: LayerRunner | None, hidden: Tensor | None, wanted: tuple[InputName, ...], more: bool
    ) -> None:
        """Measure and write a layer and, where `more` are to be measured, run it as it is stored. By itself, so that
        nothing of it is left when the next one is read."""
        state = self.source.layer_state(layer)
        moments = None
        if runner is not None and hidden is not None and wanted:
            moments = runner.run(layer, runner.build(layer, state), hidden.clone(), wanted).moments
        stored = self._write_layer(layer, state, moments, spread=more)
        if runner is not None and hidden is not None and more:
            del moments
            moved = {name: value.to(self.source.device) for name, value in stored.items()}
            runner.run(layer, runner.build(layer, state | moved), hidden)

    def _wanted(self, layer: int) -> tuple[InputName, ...]:
        """The inputs whose moments the matrices of a layer are stored by."""
        if self.options.uses_all_moments:
            return ALL_INPUTS
        dropped = self.decision.widths[layer] < self.source.spec.intermediate_size
        return ("down",) if dropped and self.options.compensation != "none" else ()

    def _write_layer(
        self, layer: int, state: dict[str, Tensor], moments: LayerMoments | None, spread: bool
    ) -> dict[str, Tensor]:
        """Write a layer; with `spread` returns its weights as stored, in the float layer's shapes: dropped neurons are
        zero."""
        spec = self.source.spec
        prefix = spec.layer_prefix(layer)
        scales: dict[InputName, Tensor] = {}
        squeezed: dict[InputName, Candidate] = {}
        if moments is not None and self.options.coding_loss > 0:
            squeezed = {name: self._squeeze(layer, name, state, moments[name]) for name in ALL_INPUTS}
        if moments is not None and (self.options.scaling_alpha > 0 or squeezed):
            alphas = {name: found.alpha for name, found in squeezed.items()}
            scales = self._scale(state, moments, alphas)
        for name in layer_vectors(spec, layer):
            vector = state[name.removeprefix(f"{prefix}.")]
            self.writer.add(name, vector.to("cpu", DTYPES[self.source.checkpoint.tensors[name].dtype]))
        kept = self.decision.kept(layer, spec.intermediate_size)
        if kept is not None:
            kept = kept.to(self.source.device)
        result: dict[str, Tensor] = {}
        for module, before in layer_linears(spec, layer).items():
            inside, local = module.removeprefix(f"{prefix}."), module.rpartition(".")[2]
            weight, bias = state[f"{inside}.weight"], self.source.bias(module)
            second = channel_max = None
            if moments is not None and INPUT_OF[local] in moments:
                inputs = moments[INPUT_OF[local]]
                second, channel_max = inputs.second, inputs.peak
            if kept is not None and local in MLP:
                if local == "down_proj":
                    weight, bias = self._drop_inputs(weight, bias, kept, moments)
                    if second is not None and channel_max is not None:
                        second, channel_max = second[kept][:, kept], channel_max[kept]
                else:
                    weight, bias = weight[kept], None if bias is None else bias[kept.cpu()]
            recipe = self.decision.recipes[module]
            factors = None
            if recipe.rank is not None and self.factors is not None:
                down, up = self.factors(module)
                scale = scales.get(INPUT_OF[local])
                factors = (down if scale is None else down * scale, up)  # they were made before the scaling
            written, found = self.writer.tensor_bytes, squeezed.get(INPUT_OF[local])
            linear = self.applier.store(
                module, weight, bias, recipe, second=second, channel_max=channel_max, factors=factors,
                zeroed=None if found is None else found.fraction,
            )  # fmt: skip
            self._write(module, linear)
            shape = (weight.shape[0], weight.shape[1])
            own_bias = None if (bias is not None) == module_has_bias(spec, module) else bias is not None
            plan = self.storage.plan(recipe, shape, own_bias)
            self._note(module, plan, before, self.writer.tensor_bytes - written, found)
            if spread:
                result |= as_float_layer(inside, linear, before, kept if local in MLP else None)
        return result

    def _squeeze(self, layer: int, name: InputName, state: dict[str, Tensor], inputs: Moments) -> Candidate:
        """How far the matrices that read an input are scaled and pruned; neurons that are dropped count here still."""
        prefix = self.source.spec.layer_prefix(layer)
        weights = {f"{prefix}.{path}": state[f"{path}.weight"] for path in readers(name)}

        def rounded(module: str, weight: Tensor) -> Int8Weight | Int4Weight:
            return self.applier.nearest(module, weight, self.decision.recipes[module].stored)

        budget = self.options.coding_loss
        try:
            return squeeze(weights, inputs.second, inputs.peak, rounded, scaled=name in NORMS, budget=budget)
        except OptionError as error:
            raise OptionError(f"coding_loss, {prefix}, {name}: {error}") from error

    def _scale(
        self, state: dict[str, Tensor], moments: LayerMoments, alphas: dict[InputName, float]
    ) -> dict[InputName, Tensor]:
        """Compression-aware scaling of the matrices behind a norm, in place: W diag(s), norm / s, moments of x / s.

        alphas: by input, the options' where there is none. Returns s of each input."""
        scales: dict[InputName, Tensor] = {}
        for name, norm in NORMS.items():
            inputs = moments[name]
            scale = channel_scales(inputs.peak, alphas.get(name, self.options.scaling_alpha)).to(self.source.device)
            paths = [f"{path}.weight" for path in readers(name)]
            folded, weights = fold(state[f"{norm}.weight"], [state[path] for path in paths], scale)
            state |= {f"{norm}.weight": folded, **dict(zip(paths, weights, strict=True))}
            inputs.second.div_(scale.double().outer(scale.double()))
            inputs.mean.div_(scale)
            inputs.peak.div_(scale)
            scales[name] = scale
        return scales

    def _drop_inputs(
        self, weight: Tensor, bias: Tensor | None, kept: Tensor, moments: LayerMoments | None
    ) -> tuple[Tensor, Tensor | None]:
        """down_proj without the dropped neurons, made up for as the options say."""
        if self.options.compensation == "none" or moments is None:
            return weight[:, kept], bias
        inputs = moments["down"]
        if self.options.compensation == "refit":
            return refit_kept(weight, inputs.second, kept), bias
        dropped = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        dropped[kept] = False
        extra = bias_compensation(inputs.mean, weight, dropped.nonzero().flatten()).cpu()
        dtype = self.applier.float_dtype
        return weight[:, kept], extra.to(dtype) if bias is None else (bias.float() + extra).to(dtype)

    def _write(self, name: str, linear: LinearWeight) -> None:
        if isinstance(linear, LowRankWeight):
            self._write(f"{name}.down", linear.down)
            self._write(f"{name}.up", linear.up)
            return
        if isinstance(linear, CorrectedWeight):
            self._write(name, linear.main)
            self._write(f"{name}.correction", linear.correction)
            return
        for part, tensor in _tensors(linear).items():
            self.writer.add(f"{name}.{part}", tensor)

    def _write_table(self, module: str) -> None:
        """The embedding or the head, read by row ranges: it can be larger than a layer."""
        info = self.source.checkpoint.tensors[f"{module}.weight"]
        shape = (info.shape[0], info.shape[1])
        written = self.writer.tensor_bytes
        recipe = self.decision.recipes[module]
        leaf: Leaf
        if recipe.stored == "dense":
            leaf = DenseWeight(self.source.read(info.name))
        elif recipe.stored == "int4":
            how = (self.options.group, self.options.symmetric)
            try:
                leaf = quantize4_streamed(lambda a, b: self.source.read(info.name, (a, b)), shape, *how, search=True)
            except OptionError as error:
                raise OptionError(f"{module}: {error}") from error
        else:
            rows = module == EMBEDDING or self.applier.rule.per_channel(module, shape)
            leaf = quantize_streamed(lambda a, b: self.source.read(info.name, (a, b)), shape, rows)
        self._write(module, leaf)
        self._note(module, self.storage.plan(recipe, shape, None), shape, self.writer.tensor_bytes - written)

    def _per_channel(self, module: str, plan: ModulePlan) -> bool | None:
        rule = self.applier.rule
        if plan.kind == "low_rank" and plan.factors == "int8":
            return rule.per_channel(f"{module}.up", (plan.shape[0], plan.rank or 0))
        return (module == EMBEDDING or rule.per_channel(module, plan.shape)) if plan.kind == "int8" else None

    def _note(
        self, module: str, plan: ModulePlan, before: tuple[int, int], written: int, squeezed: Candidate | None = None
    ) -> None:
        choice = self.decision.choices.get(module)
        self.plans[module] = plan
        bias = 2 * before[0] if module_has_bias(self.source.spec, module) else 0
        self.matrices[module] = MatrixReport(
            kind=plan.kind,
            shape_before=before,
            shape=plan.shape,
            rank=plan.rank,
            energy_rank=None if choice is None else choice.energy_rank,
            reason="" if choice is None else choice.reason,
            per_channel=self._per_channel(module, plan),
            bytes_fp16=2 * before[0] * before[1] + bias,
            bytes=written,
            alpha=None if squeezed is None else squeezed.alpha,
            zeroed=None if squeezed is None else squeezed.fraction,
        )


def _tensors(leaf: Leaf) -> dict[str, Tensor]:
    """Tensors of a leaf by the names of the format."""
    found: dict[str, Tensor | None] = {"bias": leaf.bias}
    if isinstance(leaf, DenseWeight):
        found = {"weight": leaf.weight, **found}
    else:
        found = {"qweight": leaf.qweight, "scale": leaf.scale, **found}
        if isinstance(leaf, Int4Weight):
            found["zero"] = leaf.zero
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def as_float_layer(
    inside: str, linear: LinearWeight, before: tuple[int, int], kept: Tensor | None
) -> dict[str, Tensor]:
    """Weight and bias of a stored matrix by their names in the layer, float32, spread to the shape `before` pruning.

    inside: the module's path in its layer; kept: the neurons that stayed, None where all did or it is not of the MLP.
    """
    dense = linear.dequantize()
    bias = linear.bias
    if kept is not None:
        rows, columns = before
        spread = torch.zeros(rows, columns)
        if inside.endswith("down_proj"):
            spread[:, kept.cpu()] = dense
        else:
            spread[kept.cpu()] = dense
            if bias is not None:
                bias = torch.zeros(rows).index_copy(0, kept.cpu(), bias.float())
        dense = spread
    return {f"{inside}.weight": dense} | ({} if bias is None else {f"{inside}.bias": bias.float()})
