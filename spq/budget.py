"""Deciding by a budget: measured errors times measured sensitivities, chosen by the knapsack.

Not the rules of the papers (`rules`). Parts are the embedding, an untied head, each attention matrix, and each MLP,
whose three matrices share a width. The prediction is the sum of the parts' losses; `run` measures what came of it, for
the choice from everything and for those from less, whose predictions are surer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from spq.allocate import Option, choose, pareto, total_bytes, total_loss
from spq.allocator import mapped_blocks, release_freed
from spq.apply import Applier
from spq.architecture import ATTENTION, MLP, ModelSpec
from spq.config import SPQConfig
from spq.errors import OptionError
from spq.layout import EMBEDDING, HEAD, layer_linears, linear_path, model_vectors, module_has_bias
from spq.progress import StageClock
from spq.recipe import Decision, Recipe, Storage
from spq.sensitivity import PROBE_TOKENS, measure
from spq.source import Source
from spq.survey import INT4, SURVEY_WEIGHT, ModelSurvey, Surveyor

SENSITIVITY_WEIGHT = 6.0  # a layer's share of time, see `rules`


Allowed = Callable[[Recipe, bool], bool]  # of a recipe, and of a narrower MLP
ASSORTMENTS: dict[str, Allowed] = {  # what may be bought; errors are least sure where most is dropped
    "everything": lambda recipe, narrower: True,
    "whole MLPs": lambda recipe, narrower: not narrower,
    "bits alone": lambda recipe, narrower: not narrower and recipe.rank is None and not recipe.correction,
}


@dataclass(slots=True)
class Market:
    """Everything that can be bought: the options of every part, and bytes that are spent in any case."""

    parts: list[list[Option]]
    fixed_bytes: int
    widths: list[int]  # unpruned
    scores: list[Tensor]

    def fits(self, budget: int) -> bool:
        """Whether the smallest of everything is within `budget` bytes."""
        return self._least() <= budget

    def decide(self, budget: int) -> Decision:
        """The best choice within `budget` bytes. Raises OptionError where nothing fits."""
        chosen = choose(self.parts, budget - self.fixed_bytes)
        if chosen is None:
            raise OptionError(
                f"a budget of {budget} bytes is below the smallest this model can be made, {self._least()} bytes; "
                "raise it"
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

    def _least(self) -> int:
        return sum(pareto(part)[0].nbytes for part in self.parts) + self.fixed_bytes


@dataclass(slots=True)
class MarketCache:
    """The markets of the run before: several budgets for one model, text and way of storing need one survey."""

    key: str = ""
    markets: dict[str, Market] = field(default_factory=dict)

    def get(self, key: str, make: Callable[[], dict[str, Market]]) -> dict[str, Market]:
        """Those of `key`, made where the last ones were of another."""
        if key != self.key:
            self.key, self.markets = key, make()
        return self.markets


def open_markets(
    source: Source, options: SPQConfig, applier: Applier, storage: Storage, windows: Tensor, clock: StageClock
) -> dict[str, Market]:
    """Survey the model and measure its sensitivities on windows int64 [count, len]; a market by each of ASSORTMENTS."""
    with mapped_blocks():
        survey = Surveyor(source, options, applier, clock).run(windows)
    probe = windows[: max(1, PROBE_TOKENS // windows.shape[1])]
    coefficients = _coefficients(source, options, survey, probe, clock)
    widths, fixed = [source.spec.intermediate_size] * source.spec.num_layers, _fixed_bytes(source)
    shop = Shop(source.spec, survey, coefficients, storage)
    return {name: Market(shop.parts(allowed), fixed, widths, survey.scores) for name, allowed in ASSORTMENTS.items()}


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
    release_freed()
    found = {}
    for name, rise in rises.items():
        error = survey.matrices[name].errors[INT4]
        found[name] = rise / error if error > 0 else 0.0
    return found


@dataclass(frozen=True, slots=True)
class Shop:
    """Turns measured errors into options with a price and a loss."""

    spec: ModelSpec
    survey: ModelSurvey
    coefficients: dict[str, float]
    storage: Storage

    def parts(self, allowed: Allowed) -> list[list[Option]]:
        """The options of every part that are `allowed`."""
        spec = self.spec
        found = [self._matrix(name, allowed) for name in ([EMBEDDING] if spec.tied else [EMBEDDING, HEAD])]
        for layer in range(spec.num_layers):
            prefix = spec.layer_prefix(layer)
            found += [self._matrix(f"{prefix}.{linear_path(local)}", allowed) for local in ATTENTION]
            found.append(self._mlp(layer, prefix, allowed))
        return found

    def _matrix(self, name: str, allowed: Allowed, shape: tuple[int, int] | None = None) -> list[Option]:
        """What may be done with a matrix, of `shape` where neurons were dropped."""
        matrix, coefficient = self.survey.matrices[name], self.coefficients[name]
        rows, columns = matrix.shape if shape is None else shape
        return pareto(
            [
                Option(self.storage.nbytes(recipe, (rows, columns)), coefficient * error, {name: recipe})
                for recipe, error in matrix.errors.items()
                if max(recipe.rank or 0, recipe.correction) < min(rows, columns)
                and allowed(recipe, (rows, columns) != matrix.shape)
            ]
        )

    def _mlp(self, layer: int, prefix: str, allowed: Allowed) -> list[Option]:
        """Widths times what may be done with the three matrices of that width."""
        names = [f"{prefix}.{linear_path(local)}" for local in MLP]
        rows, hidden = self.survey.matrices[names[0]].shape
        found: list[Option] = []
        for width, lost in ({rows: 0.0} | self.survey.widths[layer]).items():
            gate, up, down = (
                self._matrix(name, allowed, shape)
                for name, shape in zip(names, [(width, hidden), (width, hidden), (hidden, width)], strict=True)
            )
            pruned = self.coefficients[names[2]] * lost
            found += _both(_both(gate, up), [replace(o, loss=o.loss + pruned, width=(layer, width)) for o in down])
        return pareto(found)


def _both(first: list[Option], second: list[Option]) -> list[Option]:
    """The front of one of each; fronts of fronts lose nothing, since bytes and losses add up."""
    return pareto(
        [
            Option(a.nbytes + b.nbytes, a.loss + b.loss, {**a.recipes, **b.recipes}, b.width)
            for a in first
            for b in second
        ]
    )


def _fixed_bytes(source: Source) -> int:
    """Norms and biases, as the source stores them."""
    tensors = source.checkpoint.tensors
    names = list(model_vectors(source.spec))
    for layer in range(source.spec.num_layers):
        names += [f"{m}.bias" for m in layer_linears(source.spec, layer) if module_has_bias(source.spec, m)]
    return sum(tensors[name].nbytes for name in names)
