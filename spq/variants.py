"""What `results` compares on one model: compressions by name, and the search for equal bytes.

Not how they are measured or drawn (`results`, `results_page`). All take the same calibration windows, except `paper`,
which keeps its own 8 windows of 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spq.config import SPQConfig

FLOAT16, INT8, PAPER, DEFAULT = "float16", "int8 everything", "SPQ as published", "SPQ default"
PRUNED = "SPQ default, 20 % pruned"
BUDGET_BITS = (8, 6, 5, 4, 3)
SEARCH_STEPS = 7
TOLERANCE = 0.003  # of the bytes aimed at
NO_SVD, NO_PRUNING = {"variance_threshold": 1.0}, {"max_prune_ratio": 0.0}
PRUNING = {"prune_score": "energy", "compensation": "refit"}
FLOAT = {"quantize": False}
RECOVERED = ", recovered"  # ends the name of a row that was trained
RECOVER_STEPS = 100
PRUNE_20 = {"min_prune_ratio": 0.2, "max_prune_ratio": 0.2}


@dataclass(frozen=True, slots=True)
class Setting:
    """What all compressions of one model share."""

    window: int  # tokens per calibration window
    group: int  # inputs per scale at 4 bits

    def options(self, preset: str, **overrides: Any) -> SPQConfig:
        """A preset with these windows and groups."""
        return SPQConfig.preset(preset, **({"calibration_len": self.window, "group": self.group} | overrides))

    def budget(self, nbytes: int, **overrides: Any) -> SPQConfig:
        """The allocator within so many bytes of tensors."""
        return self.options("budget", budget=nbytes, **overrides)


@dataclass(frozen=True, slots=True)
class Family:
    """Compressions along one dial; `options(x)` of a larger x takes fewer bytes."""

    name: str
    options: Callable[[float], SPQConfig]
    low: float
    high: float


def budget_name(bits: int) -> str:
    """The row of a budget."""
    return f"SPQ budgeted, {bits} bits"


def variants(setting: Setting) -> dict[str, SPQConfig]:
    """The rows of the table that need no search, the original left out."""
    options = setting.options
    alone = {**NO_SVD, **NO_PRUNING}
    found = {INT8: options("int8"), PAPER: SPQConfig.preset("paper", group=setting.group), DEFAULT: options("default")}
    found[PRUNED] = options("default", **PRUNE_20)
    for bits in BUDGET_BITS:
        found[budget_name(bits)] = options("budget", ratio=bits / 16)
    found |= {
        "4 bit, round to nearest": options("int4", feedback=False),
        "4 bit, error feedback": options("int4"),
        "4 bit, feedback, correction rank 8": options("int4", correction_rank=8),
        "SVD alone, plain, 90 % energy, float": options("default", **FLOAT, **NO_PRUNING, variance_threshold=0.9),
        "SVD alone, whitened, 99 % energy, float": options(
            "default", **FLOAT, **NO_PRUNING, variance_threshold=0.99, svd_metric="whitened"
        ),
        "SVD whitened, 99 %, last 2 layers, int8": options(
            "default", **NO_PRUNING, variance_threshold=0.99, svd_metric="whitened", svd_last_layers=2
        ),
        "pruning alone, 20 %, energy + refit, float": options("default", **FLOAT, **NO_SVD, **PRUNING, **PRUNE_20),
    }
    for alpha in (0.0, 0.5, 1.0):
        found[f"double compression, alpha {alpha:g}"] = options(
            "default", **alone, scaling_alpha=alpha, integer_pruning=0.2, entropy_coding=True
        )
    for loss in (0.001, 0.01):
        found[f"double compression, output error within {loss:.1%}"] = options(
            "default", **alone, coding_loss=loss, entropy_coding=True
        )
    return found


def recovered(setting: Setting) -> dict[str, SPQConfig]:
    """The rows that are trained, each beside the one of its name without."""
    how = {"recover_steps": RECOVER_STEPS}
    return {
        f"{DEFAULT}{RECOVERED}": setting.options("default", **how),
        f"{PRUNED}{RECOVERED}": setting.options("default", **PRUNE_20, **how),
        f"{budget_name(4)}{RECOVERED}": setting.options("budget", ratio=4 / 16, **how),
        f"{budget_name(3)}{RECOVERED}": setting.options("budget", ratio=3 / 16, **how),
    }


def parts(setting: Setting) -> list[Family]:
    """Each part of SPQ on its own, with a dial for its bytes: without integers, and on int8."""

    def svd(metric: str, extra: dict[str, Any]) -> Callable[[float], SPQConfig]:
        def at(lost: float) -> SPQConfig:
            how = {**NO_PRUNING, "svd_metric": metric, "variance_threshold": 1 - lost, "min_saving": 0.0}
            return setting.options("default", **how, **extra)

        return at

    def pruning(extra: dict[str, Any]) -> Callable[[float], SPQConfig]:
        def at(ratio: float) -> SPQConfig:
            how = {**NO_SVD, **PRUNING, "min_prune_ratio": ratio, "max_prune_ratio": ratio, "width_multiple": 1}
            return setting.options("default", **how, **extra)

        return at

    found = []
    for name, extra in (("float", FLOAT), ("int8", {})):
        found += [
            Family(f"SVD plain, {name}", svd("plain", extra), 1e-5, 0.95),
            Family(f"SVD whitened, {name}", svd("whitened", extra), 1e-7, 0.95),
            Family(f"pruning, {name}", pruning(extra), 0.0, 0.95),
        ]
    return found


def search(nbytes: Callable[[float], int], family: Family, target: int) -> float:
    """The dial at which a family takes `target` bytes or less, as near as the search comes; `high` where none does.

    By bisection, on a dial that counts in logarithms where `low` is above 0: shares of lost energy span decades.
    """
    low, high = family.low, family.high
    best = high
    for _ in range(SEARCH_STEPS):
        middle = (low * high) ** 0.5 if family.low > 0 else (low + high) / 2
        found = nbytes(middle)
        if found <= target:
            best = high = middle
            if found >= target * (1 - TOLERANCE):
                break
        else:
            low = middle
    return best
