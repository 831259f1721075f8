"""Deciding by rules: ranks by a share of energy, widths by the logarithm of activations, as in SPQ and its relatives.

Not by a budget (`budget`). Where activations are measured, the layer runs with its attention already factorised, as in
the released code of SPQ (arXiv 2602.18420); accepted factors go to a spool folder as floats and need no second SVD.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from spq.apply import INPUT_OF, chosen_factors
from spq.architecture import ATTENTION
from spq.config import SPQConfig
from spq.decoder import InputName, LayerRunner
from spq.errors import ModelFileError, OutputError
from spq.layout import EMBEDDING, HEAD, layer_linears, linear_path
from spq.manifest import Stored
from spq.moments import Moments
from spq.progress import StageClock
from spq.prune import energy_scores, kept_width, prune_ratios
from spq.recipe import Decision, Recipe
from spq.source import Source
from spq.svd import RankChoice, choose_rank, decompose
from spq.tensorfile import read_header, read_tensor

SVD_WEIGHT, ACTIVATION_WEIGHT = 4.0, 2.0  # rough shares of a layer's time; writing a layer counts 1


@dataclass(slots=True)
class Rules:
    """One run of deciding. `windows` int64 [count, len] are calibration tokens, None where none are needed."""

    source: Source
    options: SPQConfig
    windows: Tensor | None
    spool: Path
    clock: StageClock

    @staticmethod
    def weight(options: SPQConfig) -> float:
        """Share of a layer's time, for `StageClock`."""
        return (SVD_WEIGHT if options.uses_svd else 0.0) + (ACTIVATION_WEIGHT if options.uses_pruning else 0.0)

    def decide(self) -> Decision:
        """Recipes of all matrices. Raises ModelFileError for weights or activations that are not finite."""
        spec, options = self.source.spec, self.options
        choices: dict[str, RankChoice] = {}
        scores: list[Tensor] = []
        means: list[float] = []
        runner = hidden = None
        if self.windows is not None and (options.uses_pruning or options.svd_metric == "whitened"):
            runner = LayerRunner(spec, self.windows.shape[1], self.source.device)
            hidden = self.source.embed(self.windows)
        for layer in range(spec.num_layers if options.uses_svd or options.uses_pruning else 0):
            self._look_at(layer, runner, hidden, choices, means, scores)
        width = spec.intermediate_size
        widths = [width] * spec.num_layers
        if options.uses_pruning:
            ratios = prune_ratios(means, options.min_prune_ratio, options.max_prune_ratio)
            widths = [kept_width(width, ratio, options.width_multiple) for ratio in ratios]
        return Decision(self._recipes(choices), widths, scores if options.uses_pruning else [], choices)

    def _look_at(
        self, layer: int, runner: LayerRunner | None, hidden: Tensor | None, choices: dict[str, RankChoice],
        means: list[float], scores: list[Tensor],
    ) -> None:  # fmt: skip
        """Decide on the factors of a layer, run it with them, and add what its neurons showed. By itself, so that
        nothing of a layer is left when the next one is read."""
        spec, options = self.source.spec, self.options
        state = self.source.layer_state(layer)
        if options.uses_svd and layer >= spec.num_layers - (options.svd_last_layers or spec.num_layers):
            with self.clock.stage("svd", layer, SVD_WEIGHT):
                moments = None
                if options.svd_metric == "whitened":
                    assert runner is not None and hidden is not None
                    shown = runner.run(layer, runner.build(layer, state), hidden.clone(), ("attention", "o"))
                    moments = shown.moments
                    del shown
                state |= self._factorise(layer, state, moments, choices)
                del moments
        if runner is None or hidden is None:
            return
        with self.clock.stage("activations", layer, ACTIVATION_WEIGHT if options.uses_pruning else 0.0):
            by_energy = options.uses_pruning and options.prune_score == "energy"
            observe: tuple[Literal["score", "down"], ...] = ("score", "down") if by_energy else ("score",)
            shown = runner.run(layer, runner.build(layer, state), hidden, observe)
            score = shown.score
            if score is None or not bool(torch.isfinite(score).all()):
                raise ModelFileError(f"activations of layer {layer} are not finite; the model is damaged")
            means.append(float(score.mean()))
            if by_energy:
                energy = shown.moments["down"].second.diagonal()
                score = energy_scores(energy, state["mlp.down_proj.weight"]).float().cpu()
            scores.append(score)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Accepted factors of a matrix, float32 (down, up), from the spool."""
        found = read_header(self.spool / f"{module}.safetensors")
        down, up = (read_tensor(found[name]).to(self.source.device) for name in ("down", "up"))
        return down, up

    def _spool(self, module: str, down: Tensor, up: Tensor) -> None:
        try:
            save_file({"down": down.cpu(), "up": up.cpu()}, self.spool / f"{module}.safetensors")
        except SafetensorError as error:  # its own kind of OSError
            raise OutputError(f"{self.spool}: {module} cannot be written ({error}); free some disk space") from error

    def _factorise(
        self,
        layer: int,
        state: dict[str, Tensor],
        moments: dict[InputName, Moments] | None,
        choices: dict[str, RankChoice],
    ) -> dict[str, Tensor]:
        """Decide on and spool the factors of q, k, v, o; returns the approximated weights (kept ones are absent)."""
        approximated: dict[str, Tensor] = {}
        options = self.options
        for local in ATTENTION:
            module = f"{self.source.spec.layer_prefix(layer)}.{linear_path(local)}"
            weight = state[f"{linear_path(local)}.weight"]
            second = None if moments is None else moments[INPUT_OF[local]].second
            spectrum = decompose(weight, second)
            itemsize = 1 if options.quantize else self.source.itemsize(module)  # shares are alike at 4 bits
            shape = (weight.shape[0], weight.shape[1])
            choice = choose_rank(spectrum.energy, shape, f"{linear_path(local)}.bias" in state, itemsize, options)
            choices[module] = choice
            if choice.rank is not None:
                down, up = chosen_factors(spectrum, second, choice.rank, options)
                self._spool(module, down, up)
                approximated[f"{linear_path(local)}.weight"] = up @ down
        return approximated

    def _recipes(self, choices: dict[str, RankChoice]) -> dict[str, Recipe]:
        spec, options = self.source.spec, self.options
        stored: Stored = ("int4" if options.bits == 4 else "int8") if options.quantize else "dense"
        table: Stored = ("int4" if options.embedding_bits == 4 else "int8") if options.quantize_embedding else "dense"
        recipes = {EMBEDDING: Recipe(table)}
        if not spec.tied:
            recipes[HEAD] = Recipe(stored)
        for layer in range(spec.num_layers):
            for module, (rows, columns) in layer_linears(spec, layer).items():
                rank = choices[module].rank if module in choices else None
                correction = 0 if rank is not None else min(options.correction_rank, rows, columns)
                recipes[module] = Recipe(stored, rank, correction)
        return recipes
