"""Small packed folders of every kind that the format holds, with heads wide enough for vLLM."""

from __future__ import annotations

from pathlib import Path

from spq.manifest import CorrectionPlan, ModulePlan
from spq.recode import recode
from tests.packed import write_packed
from tests.server.models import random_model

SIZES = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2}  # heads of 32: vLLM's smallest
GROUP = 32


def mixed(name: str, shape: tuple[int, int]) -> ModulePlan:
    """Each kind somewhere, and its neighbours of another."""
    plans = {
        "embed_tokens": ModulePlan(kind="int4", shape=shape, group=GROUP, symmetric=False),
        "lm_head": ModulePlan(kind="int8", shape=shape, correction=CorrectionPlan(rank=3)),
        "0.self_attn.q_proj": ModulePlan(kind="low_rank", shape=shape, rank=30, factors="int4", group=GROUP),
        "0.self_attn.k_proj": ModulePlan(kind="int8", shape=shape),
        "0.self_attn.v_proj": ModulePlan(kind="low_rank", shape=shape, rank=17, factors="int8"),
        "0.self_attn.o_proj": ModulePlan(kind="low_rank", shape=shape, rank=40, factors="int8"),
        "0.mlp.gate_proj": ModulePlan(kind="int4", shape=shape, group=GROUP),
        "0.mlp.up_proj": ModulePlan(kind="int8", shape=shape),
        "0.mlp.down_proj": ModulePlan(
            kind="int4", shape=shape, group=64, symmetric=False, bias=True,
            correction=CorrectionPlan(rank=4, factors="int8"),
        ),
        "1.self_attn.q_proj": ModulePlan(
            kind="int4", shape=shape, group=GROUP, correction=CorrectionPlan(rank=5, factors="int4")
        ),
        "1.self_attn.k_proj": ModulePlan(kind="dense", shape=shape),
        "1.self_attn.v_proj": ModulePlan(kind="int4", shape=shape, group=GROUP, symmetric=False),
        "1.self_attn.o_proj": ModulePlan(kind="int4", shape=shape, group=48, bias=True),
        "1.mlp.gate_proj": ModulePlan(kind="dense", shape=shape, correction=CorrectionPlan(rank=6)),
        "1.mlp.up_proj": ModulePlan(kind="low_rank", shape=shape, rank=50, factors="dense"),
        "1.mlp.down_proj": ModulePlan(kind="low_rank", shape=shape, rank=60, factors="int4", group=GROUP),
    }  # fmt: skip
    return next(plan for end, plan in plans.items() if name.endswith(end))


def make_mix(folder: Path, family: str, coded: bool = False, **overrides: object) -> Path:
    """`folder`/packed: a random model of a family (see `tests.server.models`), mixed; with `coded` by zstd."""
    random_model(family, **(SIZES | overrides)).save_pretrained(folder / "source")
    packed = write_packed(folder / "source", folder / "packed", mixed)
    if not coded:
        return packed
    assert recode(packed, folder / "coded", "zstd").coded > 0
    return folder / "coded"
