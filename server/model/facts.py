"""What compression did to a model, in numbers for metrics and `/v1/models`. Counted from files, not from the run."""

from __future__ import annotations

from spq.checkpoint import Checkpoint
from spq.layout import model_vectors

Facts = dict[str, float | int | str]


def compression_facts(source: Checkpoint) -> Facts:
    """Preset, ratio to 16-bit weights (tied matrices once, norms left out), pairs, mean kept rank and width.

    Empty for a plain checkpoint. The source must not be closed.
    """
    spec, manifest = source.spec, source.manifest
    if manifest is None:
        return {}
    vectors = model_vectors(spec)
    packed = sum(tensor.nbytes for name, tensor in source.tensors.items() if name not in vectors)
    original = pairs = 0
    rank_share = 0.0
    before = spec.linear_shapes()
    for name, plan in manifest.modules.items():
        rows, columns = before.get(name.split(".", 3)[-1], plan.shape)
        original += 2 * rows * columns
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
