"""What every way of storing a matrix would cost in output error, matrix by matrix, on the calibration text.

Not what an output error costs in loss (`sensitivity`) and not the choice (`allocate`). The float model runs layer by
layer; each matrix is rounded to 8 and 4 bits as it would be, and its whitened spectrum gives the error of every rank
without trying each. Errors are relative: tr(D H D^T) / tr(W H W^T) for an error D of W and second moments H of its
inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spq.apply import INPUT_OF, Applier
from spq.config import SPQConfig
from spq.decoder import ALL_INPUTS, LayerRunner
from spq.errors import ModelFileError
from spq.layout import EMBEDDING, HEAD, layer_linears
from spq.moments import Moments, output_energy
from spq.progress import StageClock
from spq.prune import bias_compensation, dropping_errors, energy_scores, kept_width, refit_errors
from spq.recipe import Recipe
from spq.source import Source
from spq.svd import decompose
from spq.tiles import round_up, tile_multiple

SURVEY_WEIGHT = 6.0  # a layer's share of time, see `rules`
MOST_RANKS = 12  # tried per matrix, evenly spread
WIDTH_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
DENSE, INT8, INT4 = Recipe("dense"), Recipe("int8"), Recipe("int4")


@dataclass(slots=True)
class MatrixSurvey:
    """Errors of one matrix."""

    shape: tuple[int, int]
    errors: dict[Recipe, float]  # relative output error by recipe
    noise_gain: float  # relative output error of Gaussian weight noise of variance 1

    @property
    def probe_variance(self) -> float:
        """Variance of noise that does as much harm as 4 bits: where the loss is measured."""
        return self.errors[INT4] / self.noise_gain


@dataclass(slots=True)
class ModelSurvey:
    """Errors of a whole model."""

    matrices: dict[str, MatrixSurvey]
    scores: list[Tensor]  # float32 [width] of each layer: what a neuron is worth
    widths: list[dict[int, float]]  # of each layer: kept neurons -> relative error at the output of down_proj


@dataclass(slots=True)
class Surveyor:
    """One run over the float model; holds a layer, its moments and the calibration states."""

    source: Source
    options: SPQConfig
    applier: Applier
    clock: StageClock

    def run(self, windows: Tensor) -> ModelSurvey:
        """Survey everything on windows int64 [count, len]. Raises ModelFileError for what is not finite."""
        spec = self.source.spec
        found = ModelSurvey({}, [], [])
        for table in (EMBEDDING,) if spec.tied else (EMBEDDING, HEAD):
            found.matrices[table] = self._table(table)
        runner = LayerRunner(spec, windows.shape[1], self.source.device)
        hidden = self.source.embed(windows)
        for layer in range(spec.num_layers):
            with self.clock.stage("survey", layer, SURVEY_WEIGHT):
                self._layer(layer, runner, hidden, found)
        return found

    def _layer(self, layer: int, runner: LayerRunner, hidden: Tensor, found: ModelSurvey) -> None:
        """By itself, so that nothing of a layer is left when the next one is read."""
        spec = self.source.spec
        state = self.source.layer_state(layer)
        moments = runner.run(layer, runner.build(layer, state), hidden, observe=ALL_INPUTS).moments
        if not all(inputs.finite for inputs in moments.values()):
            raise ModelFileError(f"activations of layer {layer} are not finite; the model is damaged")
        prefix = spec.layer_prefix(layer)
        for name in layer_linears(spec, layer):
            weight = state[f"{name.removeprefix(f'{prefix}.')}.weight"]
            found.matrices[name] = self._matrix(name, weight, moments[INPUT_OF[name.rpartition(".")[2]]])
        self._neurons(found, state["mlp.down_proj.weight"], moments["down"])

    def _table(self, module: str) -> MatrixSurvey:
        """The embedding or head by its weights alone: every row counts the same. It may also stay as it is: it is a
        large part of small models, and the last thing that more bytes than int8 can buy."""
        weight = self.source.weight(module)
        energy = float(weight.double().square().sum())
        errors = {DENSE: 0.0}
        for recipe in (INT8, INT4):
            stored = self.applier.store(module, weight, None, recipe).dequantize().to(weight.device)
            errors[recipe] = float((weight - stored).double().square().sum()) / energy if energy > 0 else 0.0
        return MatrixSurvey(_shape(weight), errors, weight.numel() / energy if energy > 0 else 1.0)

    def _matrix(self, module: str, weight: Tensor, inputs: Moments) -> MatrixSurvey:
        second = inputs.second.to(weight.device)
        energy = output_energy(weight, second)
        if energy <= 0:  # a zero matrix, or inputs that are always zero: nothing costs anything
            return MatrixSurvey(_shape(weight), {INT8: 0.0, INT4: 0.0}, 1.0)
        errors: dict[Recipe, float] = {}
        rest = weight
        for recipe in (INT8, INT4):
            stored = self.applier.store(module, weight, None, recipe, second=second, channel_max=inputs.peak)
            rest = weight - stored.dequantize().to(weight.device)
            errors[recipe] = output_energy(rest, second) / energy
        ranks = self._ranks(weight)
        tails = _tails(decompose(weight, second).energy)
        lost = _tails(decompose(rest, second).energy)
        for rank in ranks:
            tail = float(tails[rank])
            for recipe in (INT8, INT4):  # both factors are rounded
                errors[Recipe(recipe.stored, rank)] = tail + 2 * errors[recipe] * (1 - tail)
            errors[Recipe("int4", correction=rank)] = float(lost[rank]) * errors[INT4] + errors[INT8]
        return MatrixSurvey(_shape(weight), errors, weight.shape[0] * float(second.trace()) / energy)

    def _ranks(self, weight: Tensor) -> list[int]:
        """Ranks that may be worth trying: whole tiles, at most two thirds of the smaller side."""
        small = min(weight.shape)
        tile = tile_multiple(small, self.options.rank_multiple)
        last = max(tile, small * 2 // 3 // tile * tile)
        count = min(MOST_RANKS, last // tile)
        spread = {round_up(round(last * (i + 1) / count), tile, last) for i in range(count)} if count else set()
        return sorted({rank for rank in spread | {tile} if rank < small})

    def _neurons(self, found: ModelSurvey, down: Tensor, inputs: Moments) -> None:
        second = inputs.second.to(down.device)
        scores = energy_scores(second.diagonal(), down).float()
        order = scores.argsort(descending=True, stable=True)
        refitted = self.options.compensation == "refit"
        lost = refit_errors(second, down, order) if refitted else dropping_errors(second, down, order)
        energy = float(lost[0])
        errors: dict[int, float] = {}
        for share in WIDTH_SHARES if energy > 0 else ():
            width = kept_width(down.shape[1], 1 - share, self.options.width_multiple)
            if width < down.shape[1] and width not in errors:
                error = float(lost[width])
                if self.options.compensation == "bias":  # the mean of what is lost comes back
                    error -= float(bias_compensation(inputs.mean, down, order[width:]).double().square().sum())
                errors[width] = max(0.0, error) / energy
        found.scores.append(scores.cpu())
        found.widths.append(errors)


def _tails(energy: Tensor) -> Tensor:
    """float64 [n + 1]: the share of the energy [n] beyond each rank."""
    total = energy.double().sum()
    kept = torch.cat((torch.zeros(1, dtype=torch.float64, device=energy.device), energy.double().cumsum(0)))
    return (1 - kept / total).clamp_min(0.0) if total > 0 else torch.zeros_like(kept)


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
