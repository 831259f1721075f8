"""Layers that stay coded: the same bits as decoded ones, through the real engine; what memory they take; refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from kernels.native.backend import NativeOps
from kernels.native.library import machine_choice
from kernels.ops import make_ops
from server.config import ServerConfig
from server.core import SamplingParams, TokenLogprobs
from server.engine.build import build_engine, pick_resident
from server.engine.engine import Engine, GenerationRequest
from server.model.coded import CodedLayers
from server.model.llama import Llama
from server.model.load import load_model
from spq.checkpoint import open_model
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import OptionError, PackedFormatError
from tests.server.models import random_model

MIB = 1 << 20
pytestmark = pytest.mark.skipif(machine_choice().library is None, reason="the native back end was not built")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Nine layers of integers that are worth coding: cubes of Gaussians crowd near zero."""
    model = random_model(
        "llama-bias", hidden_size=64, intermediate_size=160, num_hidden_layers=9, num_key_value_heads=2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter**3 * 20)
    model.save_pretrained(tmp_path / "plain")
    options = SPQConfig.preset("default", variance_threshold=0.9, max_prune_ratio=0.0)  # some pairs, some whole
    compress(tmp_path / "plain", tmp_path / "packed", options, calibration_text="", device=torch.device("cpu"))
    return tmp_path / "packed"


def build(folder: Path, **options: object) -> Engine:
    common: dict[str, object] = {
        "device": "cpu",
        "backend": "native",
        "threads": 2,
        "memory_budget": 4000 * MIB,
        "max_num_seqs": 4,
    }
    config = ServerConfig(model=str(folder), **(common | options))  # type: ignore[arg-type]
    return build_engine(folder, config, progress=lambda phase, done: None)


def answers(engine: Engine) -> list[list[tuple[int | None, TokenLogprobs | None]]]:
    """Tokens and log-probabilities of three streams of different lengths, in one batch."""

    async def serve() -> list[list[tuple[int | None, TokenLogprobs | None]]]:
        engine.start(asyncio.get_running_loop())
        params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=5)
        prompts = [[5, 9, 200], list(range(3, 90)), [7] * 20]
        requests = [GenerationRequest(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]
        found = []
        for generation in engine.submit(requests):
            found.append([(output.token_id, output.logprobs) async for outputs in generation for output in outputs])
        await engine.drain(5.0)
        return found

    return asyncio.run(serve())


def test_coded_layers_answer_bit_for_bit_as_decoded_ones(packed: Path) -> None:
    decoded, coded = build(packed), build(packed, resident="coded", resident_tolerance=1.0)
    before, after = decoded.info.ledger, coded.info.ledger
    assert before["coded"] == before["arena"] == 0
    assert after["coded"] > 0 and after["arena"] > 0
    assert sum(after[k] for k in ("weights", "low_rank", "coded", "arena")) < before["weights"] + before["low_rank"]
    assert sum(after.values()) == pytest.approx(sum(before.values()), abs=64 * MIB)
    assert answers(decoded) == answers(coded)


@pytest.mark.parametrize("kept", [(), (0,), (3, 4), (0, 2, 4, 6, 8), (1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_any_layers_may_stay_coded(packed: Path, kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd and an even number of coded layers, neighbours or not, also two and one: other rings."""

    def keep(model: Llama, layers: CodedLayers, kv_dtype: torch.dtype, tolerance: float) -> None:
        layers.keep_decoded(kept)
        assert len(layers.coded) == 9 - len(kept)

    expected = answers(build(packed))
    monkeypatch.setattr("server.engine.build.settle", keep)
    assert answers(build(packed, resident="coded")) == expected


def test_without_tolerance_nothing_is_slower_so_nothing_is_coded(packed: Path) -> None:
    ledger = build(packed, resident="coded", resident_tolerance=0.0).info.ledger
    assert ledger["coded"] == ledger["arena"] == 0
    assert ledger["weights"] == build(packed).info.ledger["weights"]


@pytest.fixture
def loaded(packed: Path) -> tuple[CodedLayers, list[torch.Tensor]]:
    """All layers coded, and their integers as they were."""
    ops = make_ops(torch.device("cpu"), torch.float32, "native")
    assert isinstance(ops, NativeOps)
    before: list[torch.Tensor] = []

    class Watching(CodedLayers):
        def add(self, layer: object) -> None:
            before.extend(matrix.integers.clone() for matrix in ops.stores(layer))  # type: ignore[arg-type]
            super().add(layer)  # type: ignore[arg-type]

    layers = Watching(ops, 2)
    load_model(open_model(packed), ops, 256, coded=layers)
    return layers, before


def test_integers_are_there_once(loaded: tuple[CodedLayers, list[torch.Tensor]]) -> None:
    layers, before = loaded
    matrices = [m for number in sorted(layers.coded) for m in layers.coded[number].matrices]
    assert len(matrices) == len(before) and all(m.matrix.integers.numel() == 0 for m in matrices)
    assert sum(layer.decoded_bytes for layer in layers.coded.values()) == sum(x.nbytes for x in before)
    layers.keep_decoded(sorted(layers.coded))
    assert not layers.coded and layers.arena_bytes == layers.coded_bytes == 0
    assert all(torch.equal(m.matrix.integers, x) for m, x in zip(matrices, before, strict=True))


def test_one_layer_is_decoded_where_it_is_asked_for(loaded: tuple[CodedLayers, list[torch.Tensor]]) -> None:
    layers, before = loaded
    place = sum(len(layers.coded[number].matrices) for number in range(4))
    layers.lend([4])
    for m, expected in zip(layers.coded[4].matrices, before[place:], strict=False):
        assert torch.equal(m.matrix.integers, expected) and m.matrix.integers.data_ptr() % 64 == 0
    layers.take_back()
    assert all(m.matrix.integers.numel() == 0 for m in layers.coded[4].matrices)


def test_damaged_memory_is_noticed(loaded: tuple[CodedLayers, list[torch.Tensor]]) -> None:
    layers, _ = loaded
    data = layers.coded[3].matrices[0].coded.data
    data[data.numel() // 2] ^= 1
    with pytest.raises(PackedFormatError, match="layer 3, matrix 0 in memory: block 0 is damaged"):
        layers.lend([3])


def test_a_gpu_is_refused_with_the_reason() -> None:
    class TritonOps:
        name = "triton"

    config = ServerConfig(model="m", resident="coded")
    with pytest.raises(OptionError, match="this is triton: there is no entropy decoder for GPUs"):
        pick_resident(config, TritonOps(), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "message"), [("cpu", "neither coded nor moved"), ("reference", "as they were loaded")]
)
def test_other_back_ends_refuse(packed: Path, backend: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"needs the native back end on a CPU, this is {backend}: .*{message}"):
        build(packed, resident="coded", backend=backend)


def test_floats_cannot_be_coded(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="no layer of this model has integers"):
        build(tmp_path, resident="coded")
