"""One matrix from its stored tensors, by its plan.

Not where the tensors come from: `checkpoint` reads them from a folder, vLLM's loader brings them one by one
(`integrations/vllm`).
"""

from __future__ import annotations

from collections.abc import Callable, Container

from torch import Tensor

from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, Int8Weight, Leaf, LinearWeight, LowRankWeight
from spq.manifest import ModulePlan

Read = Callable[[str], Tensor]  # a tensor by its full name, decoded


def stored_weight(name: str, plan: ModulePlan | None, held: Container[str], read: Read) -> LinearWeight:
    """The matrix of module `name`; `held` are the names of the tensors there are, `plan` None a plain checkpoint's.

    Raises what `read` raises for a tensor that is missing.
    """
    if plan is not None and plan.kind == "low_rank":
        return _pair(name, plan, held, read)
    main = stored_leaf(name, plan, held, read)
    if plan is None or plan.correction is None:
        return main
    return CorrectedWeight(main, _pair(f"{name}.correction", plan, held, read))


def stored_leaf(name: str, plan: ModulePlan | None, held: Container[str], read: Read) -> Leaf:
    """The tensors under `name`; `plan` is that of the module they belong to. See `stored_weight`."""
    bias = read(f"{name}.bias") if f"{name}.bias" in held else None
    if f"{name}.weight" in held:
        return DenseWeight(read(f"{name}.weight"), bias)
    qweight, scale = read(f"{name}.qweight"), read(f"{name}.scale")
    if scale.dim() == 1:
        return Int8Weight(qweight, scale, bias)
    assert plan is not None and plan.group is not None
    columns = plan.shape[1]
    if name.endswith(".up"):  # its inputs are the ranks of the pair
        columns = plan.rank or (0 if plan.correction is None else plan.correction.rank)
    zero = None if plan.symmetric else read(f"{name}.zero")
    return Int4Weight(qweight, scale, zero, plan.group, columns, bias)


def _pair(name: str, plan: ModulePlan, held: Container[str], read: Read) -> LowRankWeight:
    return LowRankWeight(stored_leaf(f"{name}.down", plan, held, read), stored_leaf(f"{name}.up", plan, held, read))
