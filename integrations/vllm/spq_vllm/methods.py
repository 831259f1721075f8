"""Layers of vLLM with packed matrices: which part of which matrix each rank holds, and how it is loaded and used.

Not the manifest's checks (`config`), nor the splitting itself (`shards`) or the products (`products`).

vLLM merges q, k and v into one layer, and gate and up; here each keeps its own kind, rank and width. A layer has no
parameters: a loader stands on it as `load_weights`, which vLLM's own loader calls in place of looking for parameters,
and lays the matrices out as soon as the last tensor of the layer has come, so that no second copy of the model exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from kernels.weights import DenseWeight, Int4Weight, Int8Weight, LinearWeight
from spq.errors import PackedFormatError, UnsupportedModelError
from spq.layout import EMBEDDING, HEAD
from spq.manifest import Manifest
from spq_vllm import products
from spq_vllm.arrival import Arrival
from spq_vllm.products import Product
from spq_vllm.shards import Cut, even_cut, head_cut, take_columns, take_rows, take_table, width_cut

MERGED: dict[str, dict[Any, str]] = {  # vLLM's layer -> its mark of each part -> the matrix
    "qkv_proj": {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    "gate_up_proj": {0: "gate_proj", 1: "up_proj"},
    "o_proj": {None: "o_proj"},
    "down_proj": {None: "down_proj"},
}
SILU_MULTIPLE = 16  # columns of gate and of up: vLLM's SiLU on a CPU refuses other numbers than multiples of 8


class Loading:
    """Stands on a layer as its `load_weights` until all tensors have come."""

    def __init__(self, arrivals: dict[Any, Arrival], finish: Callable[[list[LinearWeight]], None]) -> None:
        """`arrivals` by vLLM's mark of a part; `finish` gets the matrices in that order."""
        self._arrivals = arrivals
        self._finish: Callable[[list[LinearWeight]], None] | None = finish

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Take tensors by their names inside the layer, and say which were taken. Raises PackedFormatError."""
        for name, tensor in weights:
            self._arrivals[getattr(tensor, "shard_id", None)].take(name, tensor)
            if self._finish is not None and not any(arrival.missing for arrival in self._arrivals.values()):
                self._finish([arrival.weight() for arrival in self._arrivals.values()])
                self._finish = None
            yield name

    def check(self) -> None:
        """Raises PackedFormatError where tensors have not come."""
        if self._finish is not None:
            missing = [name for arrival in self._arrivals.values() for name in arrival.missing]
            raise PackedFormatError(f"tensors were not loaded: {', '.join(missing)}; compress again")


class _PackedMethod:
    """What the three methods share: loading, and products by name."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out of this rank]. Biases are in the products: `bias` is not given."""
        product: Product = layer.spq_product
        y: Tensor = products.multiply(x, product.name, product.columns)
        return y

    def process_weights_after_loading(self, layer: Any) -> None:
        """Give up what was needed to load. Raises PackedFormatError where tensors have not come."""
        loading = layer.__dict__.pop("load_weights", None)
        if loading is not None:
            loading.check()
        if "bias" in layer._parameters:
            layer.register_parameter("bias", None)  # vLLM's own: ours may be of another width


class SpqLinearMethod(_PackedMethod, LinearMethodBase):  # type: ignore[misc]
    """One layer of projections."""

    def __init__(self, manifest: Manifest, prefix: str) -> None:
        """Raises UnsupportedModelError for a layer that holds none of the manifest's matrices."""
        path, _, self._local = prefix.rpartition(".")
        self._manifest = manifest
        self._prefix = prefix
        self._modules = {mark: f"{path}.{name}" for mark, name in MERGED.get(self._local, {}).items()}
        if not self._modules or not manifest.modules.keys() >= set(self._modules.values()):
            raise UnsupportedModelError(f"layer {prefix} of vLLM's model has no matrices in the packed folder")
        self._down = f"{path}.down_proj"

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Prepare to load; the sizes are those of the model before pruning."""
        rank: int = layer.tp_rank
        product = layer.spq_product = Product(self._prefix, params_dtype)
        device = torch.empty(0).device  # vLLM makes layers with their device as the default
        cuts = [self._cut(layer, mark) for mark in self._modules]
        by_columns = None in self._modules
        self._inputs = cuts[0][1] - cuts[0][0] if by_columns else input_size

        def finish(weights: list[LinearWeight]) -> None:
            if by_columns:
                parts = [take_columns(weights[0], cuts[0], with_bias=rank == 0)]
            else:
                parts = [take_rows(weight, cut) for weight, cut in zip(weights, cuts, strict=True)]
            multiple = SILU_MULTIPLE if self._local == "gate_up_proj" else 1
            product.fill(parts, [-(-part.shape[0] // multiple) * multiple for part in parts], device)

        plans = self._manifest.modules
        layer.load_weights = Loading(
            {mark: Arrival(name, plans[name], layer.has_bias) for mark, name in self._modules.items()}, finish
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See _PackedMethod; columns of x behind the inputs are those that fill SiLU's up."""
        return super().apply(layer, x[..., : self._inputs])

    def _cut(self, layer: Any, mark: Any) -> Cut:
        rank, ranks = layer.tp_rank, layer.tp_size
        if self._local == "o_proj":
            return even_cut(layer.input_size, rank, ranks)
        if self._local == "qkv_proj":
            heads = layer.total_num_heads if mark == "q" else layer.total_num_kv_heads
            return head_cut(heads, layer.head_size, rank, ranks)
        down = self._manifest.modules[self._down]
        return width_cut(down.shape[1], rank, ranks, down.group)


class TableMethod(_PackedMethod, QuantizeMethodBase):  # type: ignore[misc]
    """The embedding, which is the head too where they are tied."""

    def __init__(self, manifest: Manifest) -> None:
        self._plan = manifest.modules[EMBEDDING]
        self._tied = HEAD not in manifest.modules

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **extra: Any) -> None:
        """Prepare to load this rank's rows."""
        product = layer.spq_product = Product(EMBEDDING, params_dtype)
        device = torch.empty(0).device

        def finish(weights: list[LinearWeight]) -> None:
            (table,) = weights
            assert isinstance(table, DenseWeight | Int8Weight | Int4Weight)
            product.fill_table(take_table(table, *vocabulary(layer)), self._tied, device)

        layer.load_weights = Loading({None: Arrival(EMBEDDING, self._plan, False)}, finish)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., hidden]."""
        product: Product = layer.spq_product
        rows: Tensor = products.embed(ids, product.name, layer.embedding_dim, product.dtype)
        return rows


class HeadMethod(_PackedMethod, QuantizeMethodBase):  # type: ignore[misc]
    """The head: a matrix of its own, or the embedding's."""

    def __init__(self, manifest: Manifest) -> None:
        self._plan = manifest.modules.get(HEAD)

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **extra: Any) -> None:
        """Prepare to load this rank's rows; nothing where the head is tied."""
        if self._plan is None:
            return
        product = layer.spq_product = Product(HEAD, params_dtype)
        device = torch.empty(0).device
        cut, rows = vocabulary(layer)

        def finish(weights: list[LinearWeight]) -> None:
            product.fill([take_rows(weights[0], cut)], [rows], device)

        layer.load_weights = Loading({None: Arrival(HEAD, self._plan, False)}, finish)

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> Any:
        """See vLLM: from now on the layer is the embedding's head."""
        layer.spq_product = embed_tokens.spq_product
        return layer


def vocabulary(layer: Any) -> tuple[Cut, int]:
    """The rows of the vocabulary that a layer of vLLM holds, and how many rows it counts with those that fill it up."""
    indices = layer.shard_indices
    return (indices.org_vocab_start_index, indices.org_vocab_end_index), layer.num_embeddings_per_partition
