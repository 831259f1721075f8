"""A packed folder of int4 and corrected matrices of every mix, written without the compressor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from models import SMALL, random_model
from safetensors.torch import save_file
from torch import Tensor

from kernels.gpu.check_data import Maker
from kernels.weights import CorrectedWeight, Int4Weight, Int8Weight, Leaf, LinearWeight, LowRankWeight
from spq.config import SPQConfig
from spq.manifest import CorrectionPlan, Manifest, ModulePlan

GROUP = 16  # of all int4: three to a row of the hidden size, a short one at the end of the MLP's
HIDDEN, WIDTH, KV_WIDTH = SMALL["hidden_size"], SMALL["intermediate_size"], 24


def leaf_kind(leaf: Leaf) -> str:
    return "int4" if isinstance(leaf, Int4Weight) else "int8" if isinstance(leaf, Int8Weight) else "dense"


def leaf_tensors(name: str, leaf: Leaf) -> dict[str, Tensor]:
    if isinstance(leaf, Int4Weight):
        found = {f"{name}.qweight": leaf.qweight, f"{name}.scale": leaf.scale}
        return found if leaf.zero is None else found | {f"{name}.zero": leaf.zero}
    if isinstance(leaf, Int8Weight):
        return {f"{name}.qweight": leaf.qweight, f"{name}.scale": leaf.scale}
    return {f"{name}.weight": leaf.weight}


def pair_tensors(name: str, pair: LowRankWeight) -> dict[str, Tensor]:
    return leaf_tensors(f"{name}.down", pair.down) | leaf_tensors(f"{name}.up", pair.up)


def plan_of(weight: LinearWeight, symmetric: bool) -> ModulePlan:
    if isinstance(weight, LowRankWeight):
        kind = leaf_kind(weight.down)
        options = {"kind": "low_rank", "rank": weight.rank, "factors": kind}
        kinds = [kind]
    elif isinstance(weight, CorrectedWeight):
        inner = leaf_kind(weight.correction.down)
        options = {"kind": leaf_kind(weight.main)}
        options["correction"] = CorrectionPlan(rank=weight.correction.rank, factors=inner)
        kinds = [leaf_kind(weight.main), inner]
    else:
        kinds = [leaf_kind(weight)]
        options = {"kind": kinds[0]}
    group = GROUP if "int4" in kinds else None
    return ModulePlan(shape=weight.shape, group=group, symmetric=symmetric, **options)


def random_weights(make: Maker) -> dict[str, tuple[LinearWeight, bool]]:
    """Every module of two layers, with whether its int4 is symmetric."""

    def int4(out: int, inner: int, symmetric: bool = True) -> Int4Weight:
        return make.int4(out, inner, GROUP, symmetric)

    def corrected(main: Leaf, rank: int, symmetric: bool = True) -> CorrectedWeight:
        out, inner = main.shape
        down, up = int4(rank, inner, symmetric), int4(out, rank, symmetric)
        up.scale = (up.scale * 0.2).half()
        return CorrectedWeight(main, LowRankWeight(down, up))

    first = {
        "self_attn.q_proj": (corrected(int4(HIDDEN, HIDDEN), 20), True),
        "self_attn.k_proj": (corrected(int4(KV_WIDTH, HIDDEN, False), 5, False), False),
        "self_attn.v_proj": (int4(KV_WIDTH, HIDDEN), True),
        "self_attn.o_proj": (LowRankWeight(int4(30, HIDDEN), int4(HIDDEN, 30)), True),
        "mlp.gate_proj": (int4(WIDTH, HIDDEN), True),
        "mlp.up_proj": (int4(WIDTH, HIDDEN, False), False),
        "mlp.down_proj": (make.corrected(make.int8(HIDDEN, WIDTH), 4), True),
    }
    second = {
        "self_attn.q_proj": (LowRankWeight(int4(20, HIDDEN, False), int4(HIDDEN, 20, False)), False),
        "self_attn.k_proj": (int4(KV_WIDTH, HIDDEN), True),
        "self_attn.v_proj": (LowRankWeight(int4(9, HIDDEN), int4(KV_WIDTH, 9)), True),
        "self_attn.o_proj": (make.corrected(int4(HIDDEN, HIDDEN, False), 3), False),
        "mlp.gate_proj": (make.corrected(int4(WIDTH, HIDDEN), 4), True),
        "mlp.up_proj": (make.corrected(int4(WIDTH, HIDDEN, False), 40), False),
        "mlp.down_proj": (int4(HIDDEN, WIDTH), True),
    }
    layers = [{f"model.layers.{i}.{name}": w for name, w in layer.items()} for i, layer in enumerate((first, second))]
    return {"model.embed_tokens": (int4(SMALL["vocab_size"], HIDDEN, False), False)} | layers[0] | layers[1]


def write_int4_folder(folder: Path) -> Path:
    """A packed folder of a tied model, without the compressor."""
    template = random_model("llama-tied", num_hidden_layers=2)
    template.save_pretrained(folder)
    weights = random_weights(Maker(torch.device("cpu")))
    tensors = {name: t.clone() for name, t in template.state_dict().items() if t.dim() == 1}
    for name, (weight, _) in weights.items():
        if isinstance(weight, CorrectedWeight):
            tensors |= leaf_tensors(name, weight.main) | pair_tensors(f"{name}.correction", weight.correction)
        elif isinstance(weight, LowRankWeight):
            tensors |= pair_tensors(name, weight)
        else:
            tensors |= leaf_tensors(name, weight)
    modules = {name: plan_of(weight, symmetric) for name, (weight, symmetric) in weights.items()}
    manifest = Manifest(options=SPQConfig(), modules=modules, mlp_widths=(WIDTH, WIDTH))
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"quantization_config": manifest.dump()}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
