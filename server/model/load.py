"""From a model folder to prepared weights on a device, one matrix at a time.

Not a file reader (`spq.checkpoint` is) and not a compressor: it takes packed or plain folders as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kernels.layers import Layer
from kernels.ops import Norm, Ops
from kernels.weights import LinearWeight, LowRankWeight
from server.model.balance import balance_norms, balance_projections
from server.model.coded import CodedLayers
from server.model.llama import Llama, ModelWeights
from server.model.rope import RotaryTable
from spq.checkpoint import WeightSource


@dataclass(slots=True)
class WeightBytes:
    """Bytes resident on the device, as the back end laid the matrices out."""

    weights: int = 0
    low_rank: int = 0  # matrices stored as factor pairs
    coded: int = 0  # integers that stay coded: they are in neither of the above
    arena: int = 0  # what these are decoded into
    host_coded: int = 0  # in place of `coded`, where the device is not the host
    host_staging: int = 0  # pinned, through which they go to the arena
    by_layer: list[tuple[int, int]] = field(default_factory=list)  # the first two of each layer, all decoded

    @property
    def total(self) -> int:
        """All that is on the device."""
        return self.weights + self.low_rank + self.coded + self.arena

    def leave_coded(self, layers: CodedLayers) -> None:
        """Count the integers of the layers that stay coded as what they are in memory."""
        for number, layer in layers.coded.items():
            weights, low_rank = self.by_layer[number]
            share = round(layer.decoded_bytes * low_rank / (weights + low_rank))
            self.low_rank -= share
            self.weights -= layer.decoded_bytes - share
        self.arena = layers.arena_bytes
        if layers.staged:
            self.host_coded, self.host_staging = layers.coded_bytes, layers.arena_bytes
        else:
            self.coded = layers.coded_bytes


def load_model(
    source: WeightSource,
    ops: Ops,
    max_len: int,
    progress: Callable[[int, int], None] | None = None,
    coded: CodedLayers | None = None,
) -> tuple[Llama, WeightBytes]:
    """The model, and what it weighs decoded. `progress(layers done, layers)` is called after each layer.

    `coded`, where given, takes the layers; it must be new.

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
    layers: list[Layer] = []
    add = layers.append if coded is None else coded.add
    for i in range(spec.num_layers):
        prefix = spec.layer_prefix(i)
        before = used.weights, used.low_rank
        q, k, v, o = (source.linear(f"{prefix}.self_attn.{name}_proj") for name in "qkvo")
        q_norm = k_norm = None
        if spec.qk_norm:
            q_norm, k_norm = balance_norms(*(norm(f"{prefix}.self_attn.{name}_norm") for name in "qk"))
        else:
            q, k = balance_projections(q, k, spec.head_dim)
        gate, up, down = (source.linear(f"{prefix}.mlp.{name}_proj") for name in ("gate", "up", "down"))
        add(
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
        used.by_layer.append((used.weights - before[0], used.low_rank - before[1]))
        if progress is not None:
            progress(i + 1, spec.num_layers)
    last_norm = norm("model.norm")
    if spec.tied:
        head = embedding
    else:
        weight = source.linear("lm_head")
        head = count(ops.prepare_linear(weight), weight)
    rope = RotaryTable(spec.config, max_len, ops.device)
    return Llama(spec, ops, ModelWeights(embedding, layers if coded is None else coded, last_norm, head), rope), used
