from __future__ import annotations

import pytest
import torch
import zstandard

from spq.checkpoint import open_model
from spq.entropy import BLOCK_BYTES, CodedTensor, check_table, decode, encode, entropy_bits, num_blocks, row_blocks
from spq.errors import PackedFormatError
from spq.quantize import quantize
from tests.server.models import real_model


def gaussian(std: float, seed: int, shape: tuple[int, ...] = (1024, 1536)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std).round_().clamp_(-127, 127).to(torch.int8)


def coded_bits(tensor: torch.Tensor) -> float:
    return 8 * encode(tensor).nbytes / tensor.nbytes


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("std", [3, 6, 12, 20, 32, 40])
def test_within_two_percent_of_the_entropy(std: float, seed: int) -> None:
    q = gaussian(std, seed)
    assert entropy_bits(q) <= coded_bits(q) < 1.02 * entropy_bits(q)


@pytest.mark.parametrize("std", [1.5, 2.7, 3.5])
def test_four_bit_weights_as_they_are_packed(std: float) -> None:
    halves = (gaussian(std, 0, (1024, 4096)).clamp(-8, 7) + 8).to(torch.uint8)
    packed = halves[:, ::2] | (halves[:, 1::2] << 4)
    alone = entropy_bits(halves)  # bits per weight, two of which are in a byte
    assert coded_bits(packed) < 1.02 * 2 * alone
    assert coded_bits(packed) / 2 < coded_bits(halves)  # so they are not unpacked for the coder


def test_trained_weights_are_near_their_entropy() -> None:
    folder = real_model("demo")
    assert folder is not None
    source = open_model(folder)
    rows = []
    for layer in range(source.spec.num_layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = source.linear(f"{source.spec.layer_prefix(layer)}.mlp.{name}").dequantize()
            rows.append(quantize(weight, per_channel=True).qweight.flatten())
    q = torch.cat(rows)
    q = torch.cat([q] * -(-(1 << 20) // q.numel()))[: 1 << 20].view(1024, 1024)
    assert coded_bits(q) < 1.02 * entropy_bits(q)


def test_entropy_of_known_distributions() -> None:
    assert entropy_bits(torch.zeros(4096, dtype=torch.int8)) == 0
    assert entropy_bits(torch.arange(-128, 128).to(torch.int8)) == pytest.approx(8)
    assert entropy_bits(torch.tensor([-1, 1] * 50, dtype=torch.int8)) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1024, 1536), (3, 200_000), (700, 1000), (BLOCK_BYTES * 2,)])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_coded_comes_back(shape: tuple[int, ...], threads: int) -> None:
    q = gaussian(9, 0, shape)
    coded = encode(q, threads)
    assert torch.equal(coded.data, encode(q).data)  # the same for any number of threads
    assert len(coded.offsets) == num_blocks(q.nbytes, coded.block_bytes) + 1
    assert torch.equal(decode(coded, shape, torch.int8, "q", threads), q)


def test_blocks_hold_whole_rows() -> None:
    for columns in (1, 1000, 4096, BLOCK_BYTES // 2 + 1, BLOCK_BYTES):
        assert row_blocks((10, columns)) % columns == 0
        assert BLOCK_BYTES // 2 < row_blocks((10, columns)) <= BLOCK_BYTES
    assert row_blocks((10, BLOCK_BYTES + 1)) == row_blocks((10,)) == BLOCK_BYTES


SHAPE = (1024, 1024)  # 8 blocks


@pytest.fixture
def coded() -> CodedTensor:
    return encode(gaussian(9, 0, SHAPE))


def read(coded: CodedTensor, threads: int = 1) -> None:
    decode(coded, SHAPE, torch.int8, "model.x.qweight", threads)


@pytest.mark.parametrize("bit", [0, 5])
@pytest.mark.parametrize("place", [0, 4, 9, 1000, -2])  # magic number, header, tables, literals, checksum
@pytest.mark.parametrize("threads", [1, 2])
def test_a_flipped_bit_is_found_in_its_block(coded: CodedTensor, place: int, bit: int, threads: int) -> None:
    begin = int(coded.offsets[5 if place < 0 else 4])
    coded.data[begin + place] ^= 1 << bit
    with pytest.raises(PackedFormatError, match=r"model\.x\.qweight: block 4 "):
        read(coded, threads)


def test_every_bit_of_a_small_tensor_is_covered() -> None:
    q = gaussian(3, 1, (64,))
    whole = encode(q)
    harmless = 0
    for bit in range(8 * whole.data.numel()):
        data = whole.data.clone()
        data[bit // 8] ^= 1 << bit % 8
        try:
            again = decode(CodedTensor(data, whole.offsets, whole.block_bytes), (64,), torch.int8, "x")
            harmless += torch.equal(again, q)  # an unused bit of the header
            assert torch.equal(again, q), f"bit {bit} changed the weights unnoticed"
        except PackedFormatError:
            continue
    assert harmless < 8  # all others were found: spare bits of the header


def with_table(coded: CodedTensor, table: list[int]) -> CodedTensor:
    return CodedTensor(coded.data, torch.tensor(table), coded.block_bytes)


def test_a_table_that_lies_is_refused(coded: CodedTensor) -> None:
    good: list[int] = coded.offsets.tolist()
    assert check_table(coded, 1 << 20, "x") == good
    for table, message in (
        (good[:-1], "8 block offsets, 9 are needed"),
        ([*good, good[-1]], "10 block offsets"),
        ([1, *good[1:]], "cover bytes 1 to"),
        ([*good[:-1], good[-1] + 1], f"of {good[-1]}"),
        ([*good[:-1], 1 << 62], "cover bytes 0 to 4611686018427387904"),
        ([good[0], good[2], good[1], *good[3:]], "block 1 has -"),
        ([good[0], good[0], *good[2:]], "block 0 has 0 bytes"),
        ([good[0], -5, *good[2:]], "block 0 has -5 bytes"),
        ([good[0], good[1] + 7, *good[2:]], "block 0 is damaged"),
    ):
        with pytest.raises(PackedFormatError, match=f"model.x.qweight: .*{message}"):
            read(with_table(coded, table))


def test_frames_that_lie_about_their_size_get_no_memory() -> None:
    plain = zstandard.ZstdCompressionParameters(write_checksum=True, write_content_size=True)
    for frame, message in (
        (zstandard.ZstdCompressor(compression_params=plain).compress(bytes(1 << 28)), "says 268435456 bytes"),
        (zstandard.ZstdCompressor(write_content_size=True).compress(bytes(64)), "says 64 bytes, .* a checksum"),
        (zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(bytes(64)), "a checksum"),
        (b"(\xb5/\xfd", "is damaged"),
        (b"no zstd", "is damaged"),
    ):
        data = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        hostile = CodedTensor(data, torch.tensor([0, len(frame)]), BLOCK_BYTES)
        with pytest.raises(PackedFormatError, match=f"x: block 0 .*{message}|x: block 0 {message}"):
            decode(hostile, (64,), torch.int8, "x")
