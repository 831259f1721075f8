"""From a model folder to prepared weights on a device, one matrix at a time.

Not a file reader (`spq.checkpoint` is) and not a compressor: it takes packed or plain folders as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kernels.layers import Layer
from kernels.ops import Norm, Ops
from kernels.weights import LinearWeight, LowRankWeight
from server.model.balance import balance_norms, balance_projections
from server.model.llama import Llama, ModelWeights
from server.model.rope import RotaryTable
from spq.checkpoint import WeightSource


@dataclass(slots=True)
class WeightBytes:
    """Bytes resident on the device, as the back end laid the matrices out."""

    weights: int = 0
    low_rank: int = 0  # matrices stored as factor pairs


def load_model(
    source: WeightSource, ops: Ops, max_len: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Llama, WeightBytes]:
    """The model, and what it weighs. `progress(layers done, layers)` is called after each layer.

    Raises spq.errors.ModelFileError where the folder is inconsistent.
    """
    spec = source.spec
    used = WeightBytes()
    vector_dtype = ops.dtype

    def norm(name: str) -> Norm:
        tensor = source.vector(f"{name}.weight").to(ops.device, vector_dtype)
        used.weights += tensor.nbytes
        return Norm(tensor, spec.norm_eps)

    def count(prepared: Any, *weights: LinearWeight) -> Any:
        size = ops.nbytes(prepared)
        low_rank = sum(w.nbytes for w in weights if isinstance(w, LowRankWeight))
        share = round(size * low_rank / sum(w.nbytes for w in weights))
        used.low_rank += share
        used.weights += size - share
        return prepared

    table = source.embedding()
    embedding = count(ops.prepare_embedding(table, tied_head=spec.tied), table)
    del table  # as large as the packed one, and would stay to the end
    layers = []
    for i in range(spec.num_layers):
        prefix = spec.layer_prefix(i)
        q, k, v, o = (source.linear(f"{prefix}.self_attn.{name}_proj") for name in "qkvo")
        q_norm = k_norm = None
        if spec.qk_norm:
            q_norm, k_norm = balance_norms(*(norm(f"{prefix}.self_attn.{name}_norm") for name in "qk"))
        else:
            q, k = balance_projections(q, k, spec.head_dim)
        gate, up, down = (source.linear(f"{prefix}.mlp.{name}_proj") for name in ("gate", "up", "down"))
        layers.append(
            Layer(
                input_norm=norm(f"{prefix}.input_layernorm"),
                qkv=count(ops.prepare_qkv(q, k, v), q, k, v),
                q_norm=q_norm,
                k_norm=k_norm,
                o=count(ops.prepare_linear(o), o),
                post_norm=norm(f"{prefix}.post_attention_layernorm"),
                gate_up=count(ops.prepare_gate_up(gate, up), gate, up),
                down=count(ops.prepare_linear(down), down),
                window=spec.windows[i],
            )
        )
        if progress is not None:
            progress(i + 1, spec.num_layers)
    last_norm = norm("model.norm")
    if spec.tied:
        head = embedding
    else:
        weight = source.linear("lm_head")
        head = count(ops.prepare_linear(weight), weight)
    rope = RotaryTable(spec.config, max_len, ops.device)
    return Llama(spec, ops, ModelWeights(embedding, layers, last_norm, head), rope), used
