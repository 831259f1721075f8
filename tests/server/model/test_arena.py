"""The arena behind a bus: what waits for what, and that layers decoded through it give the bits of decoded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Harness
from int4_folder import write_int4_folder
from late_bus import LateBus
from models import random_model
from torch import Tensor

from kernels.ops import BackendName, Ops
from kernels.stores import MovableOps
from server.model.arena import CudaBus, HostArena, StagedArena
from server.model.coded import CodedLayers
from spq.compress import compress
from spq.config import SPQConfig

SIZE = 64
PROMPT = [5, 9, 200, 31, 7, 7, 64, 12, 3]


def fill(arena: StagedArena | HostArena, half: int, value: int) -> None:
    arena.target(half).fill_(value)


def test_a_kernel_waits_for_its_copy_alone() -> None:
    bus = LateBus()
    arena = StagedArena(SIZE, bus)
    fill(arena, 0, 1)
    fill(arena, 1, 2)
    assert (arena.memory(0) == 0x55).all()
    arena.send(0, SIZE)
    assert (arena.memory(0) == 1).all() and (arena.memory(1) == 0x55).all()
    arena.send(1, SIZE - 1)
    assert (arena.memory(1)[:-1] == 2).all() and arena.memory(1)[-1] == 0x55


def test_the_host_waits_until_staging_is_sent() -> None:
    class Forgetful(LateBus):
        """Its kernels wait for nothing, so that copies stay open."""

        def compute_after(self, event: object) -> None:
            pass

    bus = Forgetful()
    arena = StagedArena(SIZE, bus)
    fill(arena, 0, 1)
    arena.send(0, SIZE)
    assert bus.log == ["copy"]
    target = arena.target(0)
    assert bus.log == ["copy", "arrived"]
    target.fill_(2)
    assert (arena.memory(0) == 1).all()
    arena.send(0, SIZE)
    arena.drain()
    assert (arena.memory(0) == 2).all()


def test_a_copy_waits_for_the_layer_that_reads_its_half() -> None:
    bus = LateBus()
    arena = StagedArena(SIZE, bus)
    for half in (0, 1):
        arena.send(half, SIZE)
        bus.ran(arena.memory(half).data_ptr())
        arena.release(half)
    arena.send(0, SIZE)  # behind the first layer, not the second
    bus.ran(arena.memory(0).data_ptr())
    with pytest.raises(AssertionError, match="still reads"):
        arena.send(0, SIZE)  # no release in between


def test_a_host_arena_is_decoded_into_where_it_is_read() -> None:
    arena = HostArena(SIZE)
    assert all(arena.target(half).data_ptr() == arena.memory(half).data_ptr() for half in (0, 1))
    assert arena.memory(0).data_ptr() != arena.memory(1).data_ptr()


def coded_on(bus: LateBus | CudaBus | None) -> Callable[[Ops], CodedLayers]:
    """All layers coded; a `LateBus` is told of each that runs."""

    def make(ops: Ops) -> CodedLayers:
        assert isinstance(ops, MovableOps)
        if isinstance(bus, LateBus):
            run = ops.run_layers

            def run_layers(h: Tensor, layers: list, *rest: object) -> Tensor:  # type: ignore[type-arg]
                for layer in layers:
                    bus.ran(ops.stores(layer)[0].integers.data_ptr())
                return run(h, layers, *rest)  # type: ignore[arg-type]

            ops.run_layers = run_layers  # type: ignore[method-assign, assignment]
        return CodedLayers(ops, 2, bus)

    return make


def logits(harness: Harness, steps: int = 4) -> list[Tensor]:
    """Of a prompt, and of the decode steps after it."""
    found: list[Tensor] = []
    inner = harness.model.logits

    def watched(hidden: Tensor) -> Tensor:
        found.append(inner(hidden).clone())
        return found[-1]

    harness.model.logits = watched  # type: ignore[method-assign]
    harness.run([harness.sequence(PROMPT, max_tokens=steps)])
    return found


def int8_folder(folder: Path) -> Path:
    """Three layers, attention in pairs where that saves anything; with head norms."""
    random_model("qwen3").save_pretrained(folder / "plain")
    options = SPQConfig.preset("default", variance_threshold=0.7, min_saving=0.0, rank_multiple=1, max_prune_ratio=0.0)
    compress(folder / "plain", folder / "packed", options, calibration_text="", device=torch.device("cpu"))
    return folder / "packed"


FOLDERS = {"int8": int8_folder, "int4": lambda folder: write_int4_folder(folder / "packed")}


@pytest.mark.parametrize(
    ("backend", "kept", "kind"),
    [
        *(("native", kept, kind) for kept in ((), (1,)) for kind in FOLDERS),
        ("triton", (), "int8"),
        pytest.param("triton", (), "int4", marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_decoded_layers(
    backend: BackendName, kept: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    """Every layout that a back end has, through an arena whose copies are as late as they may be."""
    folder, steps = FOLDERS[kind](tmp_path), 2 if backend == "triton" else 6  # which is interpreted
    expected = logits(Harness(folder, backend=backend, num_blocks=4), steps)
    bus = LateBus()
    harness = Harness(folder, backend=backend, num_blocks=4, make_coded=coded_on(bus))
    layers = harness.coded
    assert layers is not None and layers.staged
    layers.keep_decoded(kept)
    found = logits(harness, steps)
    assert len(found) == len(expected) == steps
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    coded = harness.spec.num_layers - len(kept)
    assert bus.log.count("copy") == bus.log.count("arrived") == steps * coded


def test_a_ring_that_does_not_wait_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: by a kernel that runs before its copy, and by a copy before a layer has run."""
    folder = int8_folder(tmp_path)
    expected = logits(Harness(folder, backend="native"))
    with monkeypatch.context() as patch:
        patch.setattr(LateBus, "compute_after", lambda self, event: None)
        found = logits(Harness(folder, backend="native", make_coded=coded_on(LateBus())))
        assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))
    monkeypatch.setattr(StagedArena, "release", lambda self, half: None)
    with pytest.raises(AssertionError, match="still reads"):
        logits(Harness(folder, backend="native", make_coded=coded_on(LateBus())))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_gpu_gives_the_logits_of_decoded_layers(kind: str, tmp_path: Path) -> None:
    folder = FOLDERS[kind](tmp_path)
    options = {"backend": "triton", "device": "cuda", "dtype": torch.float16, "kv_dtype": torch.float16}
    expected = logits(Harness(folder, **options))  # type: ignore[arg-type]
    harness = Harness(folder, make_coded=coded_on(CudaBus(torch.device("cuda"))), **options)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(logits(harness), expected, strict=True))
