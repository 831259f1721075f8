"""Deciding by a budget: measured errors times measured sensitivities, chosen by the knapsack.

Not the rules of the papers (`rules`). Parts are the embedding, an untied head, each attention matrix, and each MLP,
whose three matrices share a width. The prediction is the sum of the parts' losses; `compress` measures what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from spq.allocate import Option, choose, pareto, total_bytes, total_loss
from spq.apply import Applier
from spq.architecture import ATTENTION, MLP
from spq.config import SPQConfig
from spq.errors import OptionError
from spq.layout import EMBEDDING, HEAD, layer_linears, linear_path, model_vectors, module_has_bias
from spq.progress import StageClock
from spq.recipe import Decision, Storage
from spq.sensitivity import PROBE_TOKENS, measure
from spq.source import Source
from spq.survey import INT4, SURVEY_WEIGHT, MatrixSurvey, ModelSurvey, Surveyor

SENSITIVITY_WEIGHT = 6.0  # a layer's share of time, see `rules`


@dataclass(slots=True)
class Market:
    """Everything that can be bought: the options of every part, and bytes that are spent in any case."""

    parts: list[list[Option]]
    fixed_bytes: int
    widths: list[int]  # unpruned
    scores: list[Tensor]

    def decide(self, budget: int) -> Decision:
        """The best choice within `budget` bytes. Raises OptionError where nothing fits."""
        chosen = choose(self.parts, budget - self.fixed_bytes)
        if chosen is None:
            least = sum(pareto(part)[0].nbytes for part in self.parts) + self.fixed_bytes
            raise OptionError(
                f"a budget of {budget} bytes is below the smallest this model can be made, {least} bytes; raise it"
            )
        decision = Decision({}, list(self.widths), self.scores, predicted_nll=total_loss(chosen))
        for option in chosen:
            decision.recipes.update(option.recipes)
            if option.width is not None:
                decision.widths[option.width[0]] = option.width[1]
        return decision

    def decide_for_loss(self, rise: float) -> Decision:
        """The smallest choice whose predicted rise of the loss is at most `rise` nats per token.

        Raises OptionError where even the largest costs more.
        """
        fronts = [pareto(part) for part in self.parts]
        low = total_bytes([front[0] for front in fronts]) + self.fixed_bytes
        high = total_bytes([front[-1] for front in fronts]) + self.fixed_bytes
        best = self.decide(high)
        if best.predicted_nll is None or best.predicted_nll > rise:
            raise OptionError(
                f"a rise of the loss by {rise:.5f} nats is below what 8 bits cost ({best.predicted_nll:.5f}); "
                "raise target_perplexity"
            )
        while high - low > max(64, high // 10000):
            middle = (low + high) // 2
            tried = self.decide(middle)
            if tried.predicted_nll is not None and tried.predicted_nll <= rise:
                high, best = middle, tried
            else:
                low = middle
        return best


def open_market(
    source: Source, options: SPQConfig, applier: Applier, storage: Storage, windows: Tensor, clock: StageClock
) -> Market:
    """Survey the model and measure its sensitivities on windows int64 [count, len]."""
    survey = Surveyor(source, options, applier, clock).run(windows)
    probe = windows[: max(1, PROBE_TOKENS // windows.shape[1])]
    coefficients = _coefficients(source, options, survey, probe, clock)
    spec = source.spec
    parts = [
        _matrix_options(name, survey.matrices[name], coefficients[name], storage)
        for name in ([EMBEDDING] if spec.tied else [EMBEDDING, HEAD])
    ]
    for layer in range(spec.num_layers):
        prefix = spec.layer_prefix(layer)
        parts += [
            _matrix_options(name, survey.matrices[name], coefficients[name], storage)
            for name in (f"{prefix}.{linear_path(local)}" for local in ATTENTION)
        ]
        parts.append(_mlp_options(layer, prefix, survey, coefficients, storage))
    return Market(parts, _fixed_bytes(source), [spec.intermediate_size] * spec.num_layers, survey.scores)


def market_weight() -> float:
    """A layer's share of time, for `StageClock`."""
    return SURVEY_WEIGHT + SENSITIVITY_WEIGHT


def _coefficients(
    source: Source, options: SPQConfig, survey: ModelSurvey, probe: Tensor, clock: StageClock
) -> dict[str, float]:
    """Nats per token and unit of relative output error, by module."""
    variances = {name: matrix.probe_variance for name, matrix in survey.matrices.items()}
    layers = source.spec.num_layers
    with clock.stage("sensitivity", 0, SENSITIVITY_WEIGHT * layers):
        rises = measure(source, probe, variances, options.seed)
    found = {}
    for name, rise in rises.items():
        error = survey.matrices[name].errors[INT4]
        found[name] = rise / error if error > 0 else 0.0
    return found


def _matrix_options(
    name: str, matrix: MatrixSurvey, coefficient: float, storage: Storage, shape: tuple[int, int] | None = None
) -> list[Option]:
    """What may be done with a matrix, of `shape` where neurons were dropped."""
    rows, columns = matrix.shape if shape is None else shape
    return pareto(
        [
            Option(storage.nbytes(recipe, (rows, columns)), coefficient * error, {name: recipe})
            for recipe, error in matrix.errors.items()
            if max(recipe.rank or 0, recipe.correction) < min(rows, columns)
        ]
    )


def _mlp_options(
    layer: int, prefix: str, survey: ModelSurvey, coefficients: dict[str, float], storage: Storage
) -> list[Option]:
    """Widths times what may be done with the three matrices of that width."""
    names = [f"{prefix}.{linear_path(local)}" for local in MLP]
    rows, hidden = survey.matrices[names[0]].shape
    errors = {rows: 0.0} | survey.widths[layer]
    found: list[Option] = []
    for width, lost in errors.items():
        shapes = [(width, hidden), (width, hidden), (hidden, width)]
        fronts = [
            _matrix_options(name, survey.matrices[name], coefficients[name], storage, shape)
            for name, shape in zip(names, shapes, strict=True)
        ]
        pruned = coefficients[names[2]] * lost
        found += pareto(list(_combined(fronts, pruned, (layer, width))))
    return pareto(found)


def _combined(fronts: list[list[Option]], loss: float, width: tuple[int, int]) -> Iterable[Option]:
    for gate, up, down in product(*fronts):
        three = (gate, up, down)
        recipes = {name: recipe for option in three for name, recipe in option.recipes.items()}
        yield Option(total_bytes(three), total_loss(three) + loss, recipes, width)


def _fixed_bytes(source: Source) -> int:
    """Norms and biases, as the source stores them."""
    tensors = source.checkpoint.tensors
    names = list(model_vectors(source.spec))
    for layer in range(source.spec.num_layers):
        names += [f"{m}.bias" for m in layer_linears(source.spec, layer) if module_has_bias(source.spec, m)]
    return sum(tensors[name].nbytes for name in names)
