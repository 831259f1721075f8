"""Layers that stay coded: the same bits as decoded ones, through the real engine; what memory they take; refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from late_bus import LateBus

from kernels.native.backend import NativeOps
from kernels.native.library import machine_choice
from kernels.ops import make_ops
from kernels.stores import MovableOps
from server.config import ServerConfig
from server.core import SamplingParams, TokenLogprobs
from server.engine import residency
from server.engine.build import build_engine, pick_room
from server.engine.engine import Engine, GenerationRequest
from server.engine.memory import DeviceMemory
from server.engine.residency import CODED_CONTEXT
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
    assert len(matrices) == len(before) and all(m.store.integers.numel() == 0 for m in matrices)
    assert sum(layer.decoded_bytes for layer in layers.coded.values()) == sum(x.nbytes for x in before)
    layers.keep_decoded(sorted(layers.coded))
    assert not layers.coded and layers.arena_bytes == layers.coded_bytes == 0
    assert all(torch.equal(m.store.integers, x) for m, x in zip(matrices, before, strict=True))


def test_one_layer_is_decoded_where_it_is_asked_for(loaded: tuple[CodedLayers, list[torch.Tensor]]) -> None:
    layers, before = loaded
    place = sum(len(layers.coded[number].matrices) for number in range(4))
    layers.lend([4])
    for m, expected in zip(layers.coded[4].matrices, before[place:], strict=False):
        assert torch.equal(m.store.integers, expected) and m.store.integers.data_ptr() % 64 == 0
    layers.take_back()
    assert all(m.store.integers.numel() == 0 for m in layers.coded[4].matrices)


def test_damaged_memory_is_noticed(loaded: tuple[CodedLayers, list[torch.Tensor]]) -> None:
    layers, _ = loaded
    data = layers.coded[3].matrices[0].coded.data
    data[data.numel() // 2] ^= 1
    with pytest.raises(PackedFormatError, match="layer 3, matrix 0 in memory: block 0 is damaged"):
        layers.lend([3])


@pytest.mark.parametrize(
    ("backend", "message"), [("cpu", "neither coded nor moved"), ("reference", "as they were loaded")]
)
def test_other_back_ends_refuse(packed: Path, backend: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"or triton on a GPU, this is {backend}: .*{message}"):
        build(packed, resident="coded", backend=backend)


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> LateBus:
    """Engines are built as on a GPU whose copies are late, with the native kernels."""
    found = LateBus()

    def pick(config: ServerConfig, ops: MovableOps, threads: int) -> CodedLayers | None:
        return None if config.resident == "decoded" else CodedLayers(ops, threads, found)

    monkeypatch.setattr("server.engine.build.pick_resident", pick)
    return found


@pytest.mark.parametrize("kept", [0, 1, 4, 6])
def test_on_a_card_as_many_layers_stay_decoded_as_have_room(
    packed: Path, bus: LateBus, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at no time does it hold more than that."""
    peaks: list[int] = []

    def settle(model: Llama, layers: CodedLayers, kv_dtype: torch.dtype, tolerance: float, *rest: object) -> None:
        half = layers.arena_bytes // 2
        assert bus.live_bytes == 2 * half  # while the workspace was measured
        bus.peak_bytes = 0
        found = residency.settle(model, layers, kv_dtype, tolerance, (2 + kept) * half)
        peaks.append(bus.peak_bytes)
        assert found.for_room == len(found.coded) == 9 - kept
        assert bus.live_bytes <= (2 + kept) * half

    monkeypatch.setattr("server.engine.build.settle", settle)
    engine = build(packed, resident="coded", resident_tolerance=0.0)
    ledger = engine.info.ledger
    assert ledger["host_coded"] > 0 and ledger["coded"] == 0
    assert ledger["host_staging"] == ledger["arena"] > 0
    assert peaks[0] <= (2 + kept) * (ledger["arena"] // 2)
    decoded = build(packed)
    assert decoded.info.ledger["host_coded"] == decoded.info.ledger["host_staging"] == 0
    assert answers(engine) == answers(decoded)


def test_on_a_card_with_room_nothing_is_coded(packed: Path, bus: LateBus) -> None:
    engine = build(packed, resident="coded", resident_tolerance=0.0)
    assert engine.info.ledger["host_coded"] == engine.info.ledger["host_staging"] == engine.info.ledger["arena"] == 0
    assert answers(engine) == answers(build(packed))


@pytest.mark.parametrize(
    ("options", "tokens"),
    [({}, CODED_CONTEXT + 16), ({"max_model_len": 9000}, 9016), ({"kv_memory": 5 * MIB}, None)],
)
def test_room_for_layers_is_what_steps_and_cache_leave(options: dict[str, int], tokens: int | None) -> None:
    config = ServerConfig(model="m", memory_budget=1000 * MIB, **options)  # type: ignore[arg-type]
    memory = DeviceMemory(total=8000 * MIB, free=7000 * MIB, process=300 * MIB)
    cache = 5 * MIB if tokens is None else 1000 * tokens
    left = (1000 - 300 - 32 - 20 - 40) * MIB - cache  # the margin: 32 MiB and 2 %
    assert pick_room(config, memory, 40 * MIB, 1000, config.max_model_len or 131072) == left


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_gpu_answers_as_with_decoded_layers(packed: Path, tolerance: float) -> None:
    """At 0 a step is recorded as without the option; at 1 none is, and nothing of the layers' integers stays there."""
    gpu = {"device": "cuda", "backend": "triton", "memory_budget": None, "kv_memory": 64 * MIB}
    engine = build(packed, resident="coded", resident_tolerance=tolerance, **gpu)
    ledger = engine.info.ledger
    assert (ledger["host_coded"] > 0) == (tolerance == 1.0) == (ledger["graphs"] == 0)
    assert min(ledger.values()) >= 0
    assert answers(engine) == answers(build(packed, **gpu, cuda_graphs=tolerance == 0.0))


def test_floats_cannot_be_coded(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="no layer of this model has integers"):
        build(tmp_path, resident="coded")
