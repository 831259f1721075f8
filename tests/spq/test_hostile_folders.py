"""Folders that are damaged anywhere, or written to harm: one line that says so, or the weights that were written."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spq.checkpoint import open_model
from spq.errors import ModelFileError, SpqError
from spq.layout import EMBEDDING
from spq.manifest import CorrectionPlan, ModulePlan
from spq.recode import recode
from tests.fuzzing import examples
from tests.packed import write_packed

FILE = "model.safetensors"
Weights = dict[str, bytes]


def plan(name: str, shape: tuple[int, int]) -> ModulePlan:
    """A matrix of every kind."""
    layer = "model.layers.0."
    if name == f"{layer}self_attn.q_proj":
        return ModulePlan(kind="low_rank", shape=shape, rank=8, factors="int8")
    if name == f"{layer}mlp.up_proj":
        return ModulePlan(kind="int4", shape=shape, group=16, symmetric=False)
    if name == f"{layer}mlp.down_proj":
        return ModulePlan(kind="int8", shape=shape, correction=CorrectionPlan(rank=4))
    return ModulePlan(kind="int8", shape=shape)


@pytest.fixture
def folder(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    return write_packed(make_model("qwen3", dtype=torch.float16, **sizes), tmp_path / "packed", plan)


@pytest.fixture
def coded(folder: Path, tmp_path: Path) -> Path:
    assert recode(folder, tmp_path / "coded", "zstd").coded > 3
    return tmp_path / "coded"


def read_all(folder: Path) -> Weights:
    """Every tensor and every matrix of a folder, as bytes."""
    source = open_model(folder)
    found = {name: source.vector(name) for name in source.tensors}
    for name in () if source.manifest is None else source.manifest.modules:
        if name != EMBEDDING:
            source.linear(name)
        if f"{name}.qweight.zstd" in source.tensors:
            found[f"{name}.qweight"] = source.vector(f"{name}.qweight")
    source.embedding()
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in found.items()}


def attempt(folder: Path) -> Weights | None:
    """What is read, or None where the folder is refused as it should be: by our own error, in one line."""
    try:
        return read_all(folder)
    except SpqError as error:
        assert str(error) and str(error).isprintable(), repr(error)
        return None


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Bits flipped, or bytes cut off, left out, put in."""
    place = st.integers(0, len(data) - 1)
    kind = draw(st.sampled_from(["flip", "flip", "cut", "drop", "insert", "zero"]))
    at = draw(st.one_of(place, st.integers(0, min(4000, len(data) - 1))))  # the header is small, and the best aim
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        changed = bytearray(data)
        for position in [at, *draw(st.lists(place, max_size=2))]:
            changed[position] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    length = draw(st.integers(1, 4096))
    filling = {"drop": b"", "insert": draw(st.binary(min_size=1, max_size=9)), "zero": b"\0" * len(data[at:][:length])}
    return data[:at] + filling[kind] + data[at + (0 if kind == "insert" else length) :]


@pytest.mark.parametrize("form", ["folder", "coded"])
def test_damaged_weights_are_refused_or_were_not_touched(form: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(form)
    intact, wanted = (folder / FILE).read_bytes(), read_all(folder)
    refused = 0

    @examples(60)
    @given(damage(intact))
    def check(data: bytes) -> None:
        nonlocal refused
        (folder / FILE).write_bytes(data)
        found = attempt(folder)
        refused += found is None
        assert found is None or found == wanted, "other weights than were written"

    check()
    assert refused > 10


def test_any_bit_of_any_tensor_matters(folder: Path) -> None:
    intact = (folder / FILE).read_bytes()
    for name, info in open_model(folder).tensors.items():
        for position in (info.start, (info.start + info.end) // 2, info.end - 1):
            data = bytearray(intact)
            data[position] ^= 4
            (folder / FILE).write_bytes(data)
            source = open_model(folder)  # the header is intact
            with pytest.raises(ModelFileError, match=f"{name} is damaged: not the bytes that were written"):
                source.vector(name)


def test_folders_without_checksums_are_read_as_ever(folder: Path) -> None:
    wanted = read_all(folder)
    save_file(load_file(folder / FILE), folder / FILE, metadata={"format": "pt"})
    assert read_all(folder) == wanted


HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 10**30, -(10**30), 1.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "x", "\n", "../../etc/passwd", "\ud800", "é" * 300, [], [1], [[]], [None] * 9, {}, {"a": {"b": None}},
    [[[[[[]]]]]], "F64", "int4", "zstd",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something stands."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


@st.composite
def twisted(draw: st.DrawFn, value: Any) -> str:
    """JSON text in which one or two things are others, missing or surplus."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(places(value)))
        parent = value
        for key in path:
            parent = parent[key]
        kind = draw(st.sampled_from(["put", "put", "put", "drop", "add"]))
        if kind == "drop":
            del parent[last]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "\n", "auto_map", "rope_scaling"]))] = copy.deepcopy(
                draw(st.sampled_from(HOSTILE))
            )
        else:
            parent[last] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    return json.dumps(value)


def test_any_configuration_and_manifest_is_read_or_refused(folder: Path) -> None:
    path, wanted = folder / "config.json", read_all(folder)
    intact = json.loads(path.read_text())
    refused = 0

    @examples(150)
    @given(st.one_of(twisted(intact), twisted(intact["quantization_config"]).map(lambda text: with_manifest(text))))
    def check(text: str) -> None:
        nonlocal refused
        path.write_text(text)
        found = attempt(folder)
        refused += found is None
        assert found is None or found == wanted

    def with_manifest(text: str) -> str:
        return json.dumps({**intact, "quantization_config": json.loads(text)})

    check()
    assert refused > 20


def with_header(data: bytes, text: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data[8 + length :]


def test_any_header_is_read_or_refused(folder: Path) -> None:
    intact, wanted = (folder / FILE).read_bytes(), read_all(folder)
    header = json.loads(intact[8 : 8 + int.from_bytes(intact[:8], "little")])

    @examples(60)
    @given(twisted(header))
    def check(text: str) -> None:
        (folder / FILE).write_bytes(with_header(intact, text))
        found = attempt(folder)
        assert found is None or found == wanted

    check()


def test_any_index_is_read_or_refused(make_model: Callable[..., Path]) -> None:
    folder = make_model(shard="20KB")
    path, wanted = folder / "model.safetensors.index.json", read_all(folder)
    intact = json.loads(path.read_text())

    @examples(60)
    @given(twisted(intact))
    def check(text: str) -> None:
        path.write_text(text)
        found = attempt(folder)
        assert found is None or found == wanted

    check()


ENTRY = {"dtype": "F16", "shape": [64], "data_offsets": [0, 128]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not readable as JSON"),
        ('{"a":' * 100_000, "not readable as JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not readable as JSON"),
        ("[" + "[]," * 8_000_000 + "[]]", "bytes of JSON, which no model needs"),
        ('{"a": 1, "a": 1}', "'a' stands in it twice"),
        (json.dumps({"a\nb": ENTRY}), "is called 'a\\\\nb', which is no name"),
        (json.dumps({"a": ENTRY | {"shape": [-8, -8]}}), "entry of a is not readable"),
        (json.dumps({"a": ENTRY | {"shape": [1 << 62] * 200_000}}), "entry of a is not readable"),
        (json.dumps({"a": ENTRY | {"shape": [float("inf")]}}), "entry of a is not readable"),
        (json.dumps({"a": ENTRY | {"data_offsets": [-128, 0]}}), "entry of a is not readable"),
        (json.dumps({"a": ENTRY | {"data_offsets": [0, 1 << 62]}}), "has 4611686018427387904 bytes"),
        (json.dumps({"a": ENTRY, "b": ENTRY | {"data_offsets": [64, 192]}}), "b overlaps the tensor before it"),
        (json.dumps({"a": ENTRY, "b": ENTRY}), "b overlaps the tensor before it"),
        (json.dumps({"a": ENTRY | {"data_offsets": [8, 136]}}), "a lies behind a gap"),
        (json.dumps({"__metadata__": {"crc32": "00 00"}, "a": ENTRY}), "not those of 1 tensors"),
        (json.dumps({"__metadata__": {"crc32": 5}, "a": ENTRY}), "not those of 1 tensors"),
    ],
)
def test_hostile_headers_cost_little(folder: Path, text: str, message: str) -> None:
    raw = text.encode()
    ends = [end for end in (136, 192, 128) if f"{end}]" in text]
    (folder / FILE).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * (ends or [128])[0])
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=message) as caught:
            open_model(folder)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500 + len(str(folder))


def test_a_length_that_the_file_has_not_is_not_allocated(folder: Path) -> None:
    for length in (1 << 63, (1 << 64) - 1, 1 << 40):
        (folder / FILE).write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ModelFileError, match="shorter than its header says"):
            open_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**12}, {"num_hidden_layers": 0}, {"num_attention_heads": 0},
        {"num_key_value_heads": 0}, {"hidden_size": -64}, {"hidden_size": "64"}, {"vocab_size": None},
        {"head_dim": 1.5}, {"max_position_embeddings": 10**30},
        {"rope_parameters": {"rope_type": "linear"}}, {"rope_parameters": 5}, {"layer_types": 5}, {"eos_token_id": "x"},
        {"architectures": 5}, {"architectures": [5]}, {"model_type": 5}, {"rms_norm_eps": "x"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_numbers_that_make_no_model(make_model: Callable[..., Path], family: str, change: dict[str, Any]) -> None:
    folder = make_model(family)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert attempt(folder) is None


def test_links_pipes_and_devices(folder: Path, tmp_path: Path) -> None:
    wanted = read_all(folder)
    elsewhere = tmp_path / "blob"
    shutil.move(folder / FILE, elsewhere)
    (folder / FILE).symlink_to(elsewhere)  # as the hub's cache has it
    assert read_all(folder) == wanted
    for target in ("/dev/zero", "/etc/passwd", str(folder), str(folder / FILE), "nowhere"):
        (folder / FILE).unlink()
        (folder / FILE).symlink_to(target)
        assert attempt(folder) is None
    for name in (FILE, "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)  # opening it would wait for ever
        assert attempt(folder) is None


def test_a_frame_cannot_ask_for_memory(coded: Path) -> None:
    """A table of blocks that is too short for the shape is refused before the tensor is allocated."""
    tensors = load_file(coded / FILE)
    name = next(name for name in tensors if name.endswith(".blocks"))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, coded / FILE)
    assert attempt(coded) is None
