"""A packed folder of any mixture of kinds, written tensor by tensor: what a compressor may one day choose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels.weights import pack_int4
from spq.checkpoint import open_model, read_config
from spq.config import SPQConfig
from spq.layout import model_vectors, module_has_bias
from spq.manifest import Manifest, ModulePlan, Stored
from spq.writer import TensorWriter, copy_companions

Plan = Callable[[str, tuple[int, int]], ModulePlan]  # of module name and (out, in)


def write_packed(source: Path, out: Path, plan: Plan) -> Path:
    """`source`, a plain model folder, with every matrix stored as `plan` says, rounded to nearest. Biases that the
    architecture does not have are made up."""
    checkpoint = open_model(source)
    spec = checkpoint.spec
    out.mkdir(parents=True)
    writer = TensorWriter(out, 1 << 40)
    for name in model_vectors(spec):
        writer.add(name, checkpoint.vector(name))
    modules: dict[str, ModulePlan] = {}
    generator = torch.Generator().manual_seed(5)
    for name in (t.removesuffix(".weight") for t in checkpoint.tensors if "norm" not in t and t.endswith(".weight")):
        if name == "lm_head" and spec.tied:
            continue
        weight = checkpoint.vector(f"{name}.weight").float()
        chosen = modules[name] = plan(name, (weight.shape[0], weight.shape[1]))
        bias = module_has_bias(spec, name)
        stored = _stored(weight, chosen)
        if bias:
            stored["up.bias" if chosen.kind == "low_rank" else "bias"] = checkpoint.vector(f"{name}.bias")
        elif chosen.bias:
            made_up = torch.randn(weight.shape[0], generator=generator)
            stored["up.bias" if chosen.kind == "low_rank" else "bias"] = made_up
        assert {f"{name}.{part}" for part in stored} == set(chosen.tensors(name, bias))
        for part, tensor in stored.items():
            writer.add(f"{name}.{part}", tensor)
    writer.finish()
    writer.close()
    copy_companions(source, out)
    manifest = Manifest(
        options=SPQConfig.preset("int8"), modules=modules, mlp_widths=(spec.intermediate_size,) * spec.num_layers
    )
    config = read_config(source) | {"quantization_config": manifest.dump()}
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    return out


def _stored(weight: Tensor, plan: ModulePlan) -> dict[str, Tensor]:
    """Tensor name inside the module -> tensor, biases apart."""
    if plan.kind == "low_rank":
        return _pair(weight, plan.rank or 0, plan.factors or "dense", plan)
    found = _leaf(weight, plan.kind, plan)
    if plan.correction is not None:
        pair = _pair(weight * 0.3, plan.correction.rank, plan.correction.factors, plan)
        found |= {f"correction.{name}": tensor for name, tensor in pair.items()}
    return found


def _pair(weight: Tensor, rank: int, stored: Stored, plan: ModulePlan) -> dict[str, Tensor]:
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    down = _leaf(s[:rank, None] * v[:rank], stored, plan)
    up = _leaf(u[:, :rank], stored, plan)
    return {f"down.{k}": t for k, t in down.items()} | {f"up.{k}": t for k, t in up.items()}


def _leaf(weight: Tensor, stored: Stored, plan: ModulePlan) -> dict[str, Tensor]:
    if stored == "dense":
        return {"weight": weight.contiguous()}
    if stored == "int8":
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        return {"qweight": (weight / scale[:, None]).round().to(torch.int8), "scale": scale}
    rows, columns = weight.shape
    group = plan.group or columns
    groups = -(-columns // group)
    padded = torch.nn.functional.pad(weight, (0, groups * group - columns)).view(rows, groups, group)
    if plan.symmetric:
        scale = (padded.abs().amax(-1) / 7).clamp_min(1e-6).half()
        zero = torch.full((rows, groups), 8.0)
    else:
        low, high = padded.amin(-1).clamp_max(0), padded.amax(-1).clamp_min(0)
        scale = ((high - low) / 15).clamp_min(1e-6).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
    q = (padded / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).view(rows, -1)[:, :columns]
    found = {"qweight": pack_int4(q.to(torch.uint8)), "scale": scale}
    return found if plan.symmetric else found | {"zero": zero.to(torch.uint8)}
