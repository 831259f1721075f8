"""What is to be done with each matrix, and what that costs in bytes: the result of deciding, the input of writing.

Not who decides (`rules`, `budget`) and not the doing (`apply`, `pipeline`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from spq.manifest import CorrectionPlan, ModulePlan, Stored
from spq.prune import kept_neurons
from spq.svd import RankChoice


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one matrix is to be stored."""

    stored: Stored  # the matrix, or both factors
    rank: int | None = None  # of a factor pair
    correction: int = 0  # rank of the pair beside the matrix; 0: none


@dataclass(frozen=True, slots=True)
class Storage:
    """What all matrices of a model have in common."""

    group: int  # inputs per scale at 4 bits
    symmetric: bool
    float_bytes: int  # per element of a matrix that stays float
    correction: Stored = "int8"  # how the factors of corrections are stored

    def nbytes(self, recipe: Recipe, shape: tuple[int, int]) -> int:
        """Bytes of the tensors of a matrix of shape (out, in), without bias."""
        rows, columns = shape
        size = (
            self._leaf(recipe.stored, rows, columns)
            if recipe.rank is None
            else self._leaf(recipe.stored, recipe.rank, columns) + self._leaf(recipe.stored, rows, recipe.rank)
        )
        if recipe.correction:
            rank = recipe.correction
            size += self._leaf(self.correction, rank, columns) + self._leaf(self.correction, rows, rank)
        return size

    def plan(self, recipe: Recipe, shape: tuple[int, int], bias: bool | None) -> ModulePlan:
        """The entry of the manifest; `bias` None: as the architecture has it."""
        return ModulePlan(
            kind=recipe.stored if recipe.rank is None else "low_rank",
            shape=shape,
            rank=recipe.rank,
            factors=None if recipe.rank is None else recipe.stored,
            group=self.group if recipe.stored == "int4" else None,
            symmetric=self.symmetric if recipe.stored == "int4" else True,
            bias=bias,
            correction=CorrectionPlan(rank=recipe.correction, factors=self.correction) if recipe.correction else None,
        )

    def _leaf(self, stored: Stored, rows: int, columns: int) -> int:
        if stored == "dense":
            return rows * columns * self.float_bytes
        if stored == "int8":
            return rows * columns + 4 * rows
        groups = -(-columns // self.group)
        return rows * -(-columns // 2) + rows * groups * (2 if self.symmetric else 3)


@dataclass(slots=True)
class Decision:
    """Recipes for a whole model."""

    recipes: dict[str, Recipe]  # by module name: every matrix, the embedding, an untied head
    widths: list[int]  # kept neurons of each layer
    scores: list[Tensor]  # float32 [width] of each layer: which neurons stay; empty where all do
    choices: dict[str, RankChoice] = field(default_factory=dict)  # where a rule looked at a spectrum
    predicted_nll: float | None = None  # expected rise of the loss, nats per token; the allocator's

    def kept(self, layer: int, width: int) -> Tensor | None:
        """Ascending indices int64 of the neurons of a layer of `width` that stay; None where all do."""
        return kept_neurons(self.scores[layer], self.widths[layer]) if self.widths[layer] < width else None

    def in_float(self) -> Decision:
        """The same ranks and widths, nothing rounded and so nothing to correct."""
        recipes = {module: Recipe("dense", recipe.rank) for module, recipe in self.recipes.items()}
        return replace(self, recipes=recipes)


def same(first: Decision, second: Decision) -> bool:
    """Whether two decisions make the same model."""
    return first.recipes == second.recipes and first.widths == second.widths
