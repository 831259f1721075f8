"""What compression did to a model, in numbers for metrics and `/v1/models`. Counted from shapes, not from the run."""

from __future__ import annotations

from spq.architecture import ModelSpec
from spq.manifest import Manifest, ModulePlan

Facts = dict[str, float | int | str]


def compression_facts(spec: ModelSpec, manifest: Manifest | None) -> Facts:
    """Preset, ratio to 16-bit weights (tied matrices once, norms left out), pairs, mean kept rank and width."""
    if manifest is None:
        return {}
    original = packed = 0
    pairs = 0
    rank_share = 0.0
    before = spec.linear_shapes()
    for name, plan in manifest.modules.items():
        rows, columns = before.get(name.split(".", 3)[-1], plan.shape)
        original += 2 * rows * columns
        packed += _bytes(plan)
        if plan.rank is not None:
            pairs += 1
            rank_share += plan.rank / min(plan.shape)
    widths = manifest.mlp_widths
    return {
        "preset": manifest.options.name,
        "ratio_to_fp16": round(original / packed, 3),
        "low_rank_matrices": pairs,
        "matrices": len(manifest.modules),
        "mean_rank_kept": round(rank_share / pairs, 3) if pairs else 1.0,
        "mean_mlp_width_kept": round(sum(widths) / (len(widths) * spec.intermediate_size), 4),
    }


def _bytes(plan: ModulePlan) -> int:
    rows, columns = plan.shape
    if plan.rank is not None:
        size = 1 if plan.factors == "int8" else 2
        return plan.rank * (rows + columns) * size + (4 * (plan.rank + rows) if size == 1 else 0)
    return rows * columns + 4 * rows if plan.kind == "int8" else 2 * rows * columns
