"""Lossless coding of integer tensors: blocks of zstd, each with its checksum, found by a table of offsets.

Not where coded tensors are stored (`recode`, `checkpoint`) nor who keeps them in memory (`server.model.coded`).

Weights have no repeats, so only the order-0 entropy can be won. zstd's Huffman stage comes within 1.2 % of it (int8 of
a Gaussian of std 3 to 40); its match finder finds nothing, so it is kept as small as zstd allows. Measured over 8 MiB
in blocks of 128 KiB, bits above the entropy: level 1 +0.7 %, level 3 +8.8 % at std 3 (false matches), negative levels
+9 % to +117 % (they leave literals as they are), these parameters +0.6 %; all decode at 0.5 to 1.2 GB/s on one core of
a Zen 3. Four-bit weights are coded as they are packed, two in a byte: +0.5 % to +1.4 %, where single ones take +0.9 %
to +14 % (Huffman codes have whole bits, and a pair of symbols shares the rounding).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
import zstandard
from torch import Tensor

from spq.errors import PackedFormatError

BLOCK_BYTES = 128 << 10  # decoded bytes of a block at most: what zstd gives one Huffman table
MIN_SAVING = 0.02  # share of its bytes that coding must save, else a matrix stays as it is
_TASK_BLOCKS = 8  # blocks one thread takes at a time: 1.5 ms of decoding


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """Bytes of a tensor as zstd frames, one after the other; every block but the last decodes to `block_bytes`."""

    data: Tensor  # uint8 [coded bytes]
    offsets: Tensor  # int64 [blocks + 1]: where each block begins, and the end
    block_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes with the table."""
        return self.data.nbytes + self.offsets.nbytes


def row_blocks(shape: Sequence[int]) -> int:
    """Decoded bytes of a block of a tensor of one-byte integers: whole rows where at least one fits."""
    row = prod(shape[1:])
    return BLOCK_BYTES if len(shape) < 2 or not 0 < row <= BLOCK_BYTES else BLOCK_BYTES // row * row


def num_blocks(nbytes: int, block_bytes: int) -> int:
    """How many blocks that many bytes make."""
    return -(-nbytes // block_bytes)


def entropy_bits(tensor: Tensor) -> float:
    """Order-0 entropy of a tensor of one-byte integers, bits per byte: what no coder without a model can beat."""
    counts = torch.bincount(tensor.contiguous().view(torch.uint8).flatten(), minlength=256)
    shares = counts[counts > 0].double() / max(1, tensor.numel())
    return float(-(shares * shares.log2()).sum())


def encode(tensor: Tensor, threads: int = 1) -> CodedTensor:
    """Code a CPU tensor of one-byte integers; the same bytes for any number of threads."""
    block = row_blocks(tensor.shape)
    raw = tensor.contiguous().view(torch.uint8).flatten().numpy().data
    count = num_blocks(len(raw), block)
    frames: list[bytes] = [b""] * count

    def run(first: int, last: int) -> None:
        coder = zstandard.ZstdCompressor(compression_params=_parameters())
        for i in range(first, last):
            frames[i] = coder.compress(raw[i * block : (i + 1) * block])

    _in_parallel(run, count, threads)
    offsets = torch.zeros(count + 1, dtype=torch.int64)
    if count:
        torch.cumsum(torch.tensor([len(frame) for frame in frames]), 0, out=offsets[1:])
    return CodedTensor(torch.frombuffer(bytearray().join(frames), dtype=torch.uint8), offsets, block)


def decode(coded: CodedTensor, shape: Sequence[int], dtype: torch.dtype, name: str, threads: int = 1) -> Tensor:
    """The tensor of one-byte integers again. Raises PackedFormatError naming tensor and block."""
    offsets = check_table(coded, prod(shape), name)
    out = torch.empty(tuple(shape), dtype=dtype)
    target = out.view(torch.uint8).flatten()
    _in_parallel(
        lambda first, last: decode_blocks(coded, offsets, target, name, first, last), len(offsets) - 1, threads
    )
    return out


def check_table(coded: CodedTensor, nbytes: int, name: str) -> list[int]:
    """The offsets as integers. Raises PackedFormatError unless they cut the coded bytes into the blocks of `nbytes`."""
    offsets: list[int] = coded.offsets.tolist()
    count = num_blocks(nbytes, coded.block_bytes)
    if len(offsets) != count + 1:
        raise PackedFormatError(f"{name}: {len(offsets)} block offsets, {count + 1} are needed; compress again")
    if offsets[0] != 0 or offsets[-1] != coded.data.numel():
        raise PackedFormatError(
            f"{name}: its blocks cover bytes {offsets[0]} to {offsets[-1]} of {coded.data.numel()}; compress again"
        )
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop <= start:
            raise PackedFormatError(f"{name}: block {i} has {stop - start} bytes; compress again")
    return offsets


def decode_blocks(coded: CodedTensor, offsets: list[int], out: Tensor, name: str, first: int, last: int) -> None:
    """Decode blocks first..last into their places in `out` (uint8, flat); the interpreter's lock is free meanwhile.

    `offsets` come from `check_table`. A frame must say that it holds what belongs there and must have a checksum before
    anything is decoded, so a hostile one gets no memory. Raises PackedFormatError naming tensor and block.
    """
    source, target = coded.data.numpy().data, out.numpy().data
    decoder = zstandard.ZstdDecompressor()
    for i in range(first, last):
        frame = source[offsets[i] : offsets[i + 1]]
        start = i * coded.block_bytes
        stop = min(start + coded.block_bytes, len(target))
        try:
            told = zstandard.get_frame_parameters(frame)
            if told.content_size != stop - start or not told.has_checksum:
                raise PackedFormatError(
                    f"{name}: block {i} says {told.content_size} bytes, it should have {stop - start} and a checksum; "
                    "the file is damaged"
                )
            target[start:stop] = decoder.decompress(frame, allow_extra_data=False)
        except (zstandard.ZstdError, ValueError) as error:
            raise PackedFormatError(f"{name}: block {i} is damaged ({error}); copy or compress it again") from error


def _parameters() -> zstandard.ZstdCompressionParameters:
    """Huffman and next to no match finder: the docstring of the module has the figures."""
    return zstandard.ZstdCompressionParameters(
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        strategy=zstandard.STRATEGY_FAST,
        write_checksum=True,
        write_content_size=True,
    )


def _in_parallel(run: Callable[[int, int], None], count: int, threads: int) -> None:
    """run(first, last) over all of 0..count, by several threads where there is enough for them."""
    spans = [(i, min(i + _TASK_BLOCKS, count)) for i in range(0, count, _TASK_BLOCKS)]
    if threads == 1 or len(spans) < 2:
        for first, last in spans:
            run(first, last)
        return
    with ThreadPoolExecutor(min(threads, len(spans))) as pool:
        for done in [pool.submit(run, first, last) for first, last in spans]:
            done.result()
