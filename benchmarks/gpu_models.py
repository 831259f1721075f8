"""`python -m benchmarks.gpu_models KIND`: a model of random weights in LLaMA-2-7B's or Llama-3-8B's shape, in seconds.

Nothing is trained or compressed: int8 codes, factors and GPTQ's packed words are drawn as such, on the GPU where there
is one, at unit gain, so that activations stay finite. It tells speed and memory, and nothing about quality. Its
tokenizer knows as many words as the model and no merges: prompts must be sent as ids. Every token but two is a word of
ASCII letters, so an answer is a piece of text per token; those two have rows of the head that are never the largest.
The last line of the output is JSON: what the tensors weigh, the byte count a compression's report would give.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kernels.gpu.plan import LLAMA_2_7B, LLAMA_3_8B, ModelShape
from spq.architecture import ATTENTION, ModelSpec, spec_of
from spq.config import SPQConfig
from spq.layout import EMBEDDING, HEAD, model_linears, model_vectors
from spq.manifest import Manifest, ModulePlan
from spq.writer import TensorWriter

SMALL = ModelShape("small", 2, 256, 768, 4, 2, 64, 2000, 64, 32, 704)
SHAPES = {shape.name: shape for shape in (LLAMA_2_7B, LLAMA_3_8B, SMALL)}
KINDS = ("spq", "int8", "fp16", "gptq8", "gptq4")
GROUP = 128  # inputs that share a scale of GPTQ
POSITIONS = 4096
SPECIAL = ("<|bos|>", "<|eos|>")  # ids 0 and 1
SHARD_BYTES = 1 << 30
CODE_STD = 127 / 3**0.5  # of uniform codes in -127..127
NEVER = 1e-3  # gain of the head's rows of special tokens


def config_of(shape: ModelShape) -> LlamaConfig:
    """transformers' configuration of the shape, unpruned, float16."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        dtype="float16",
    )


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level vocabulary of exactly `vocab` entries: special tokens, ASCII characters, words of four letters."""
    pieces = [*SPECIAL, *(chr(code) for code in range(33, 127)), "Ġ", "Ċ"]
    words = ("Ġ" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    pieces += itertools.islice(words, vocab - len(pieces))
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], model_max_length=POSITIONS
    )
    fast.save_pretrained(folder)


class RandomWeights:
    """Draws tensors on a device and writes them; every matrix keeps the scale of what it multiplies."""

    def __init__(self, writer: TensorWriter, device: torch.device) -> None:
        self._writer, self._device = writer, device
        self._generator = torch.Generator(device).manual_seed(0)

    def norm(self, name: str, shape: tuple[int, ...]) -> None:
        """All ones, float16."""
        self._writer.add(name, torch.ones(shape, dtype=torch.float16))

    def dense(self, name: str, rows: int, columns: int) -> None:
        """`name`.weight, float16 [rows, columns]."""
        weight = self._normal(rows, columns) * columns**-0.5
        if name == HEAD:
            weight[: len(SPECIAL)] *= NEVER
        self._writer.add(f"{name}.weight", weight)

    def int8(self, name: str, rows: int, columns: int) -> None:
        """`name`.qweight int8 [rows, columns], `name`.scale float32 [rows]."""
        self._writer.add(f"{name}.qweight", self._integers(-127, 128, rows, columns, torch.int8))
        scale = torch.full((rows,), columns**-0.5 / CODE_STD)
        if name == HEAD:
            scale[: len(SPECIAL)] *= NEVER
        self._writer.add(f"{name}.scale", scale)

    def gptq(self, name: str, rows: int, columns: int, bits: int) -> None:
        """GPTQ's first format, symmetric: words int32 [columns * bits / 32, rows], a float16 scale for 128 inputs."""
        per_word, groups = 32 // bits, columns // GROUP
        zero = 2 ** (bits - 1) - 1  # one less than the zero point, as that format stores it
        word = sum(zero << (bits * i) for i in range(per_word))  # below 2**31: the highest bit of a code is clear
        std = 2**bits / 12**0.5
        self._writer.add(f"{name}.qweight", self._integers(-(2**31), 2**31, columns // per_word, rows, torch.int32))
        self._writer.add(f"{name}.qzeros", torch.full((groups, rows // per_word), word, dtype=torch.int32))
        self._writer.add(f"{name}.scales", torch.full((groups, rows), columns**-0.5 / std, dtype=torch.float16))
        self._writer.add(f"{name}.g_idx", torch.arange(columns, dtype=torch.int32) // GROUP)

    def _normal(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.float16, device=self._device, generator=self._generator)

    def _integers(self, low: int, high: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, (rows, columns), dtype=dtype, device=self._device, generator=self._generator)


def write_model(folder: Path, shape: ModelShape, kind: str, device: torch.device) -> int:
    """Write the folder and return the bytes of its tensors. `kind` is one of KINDS."""
    folder.mkdir(parents=True)
    config = config_of(shape)
    spec = spec_of(config)
    writer = TensorWriter(folder, SHARD_BYTES)
    weights = RandomWeights(writer, device)
    for name, size in model_vectors(spec).items():
        weights.norm(name, size)
    quantization = (
        _write_packed(weights, spec, shape, kind) if kind in ("spq", "int8") else _write_plain(weights, spec, kind)
    )
    writer.finish()
    write_tokenizer(folder, shape.vocab)
    data = config.to_dict() | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(data, indent=1), "utf-8")
    return writer.tensor_bytes


def _write_packed(weights: RandomWeights, spec: ModelSpec, shape: ModelShape, kind: str) -> dict[str, Any]:
    """All matrices in the packed format; "spq" has factor pairs in the attention and pruned MLPs."""
    low_rank = kind == "spq"
    widths = (shape.pruned_width if low_rank else shape.width,) * shape.layers
    ranks = dict(zip(ATTENTION, (shape.rank, shape.kv_rank, shape.kv_rank, shape.rank), strict=True))
    plans = {}
    for module, (rows, columns) in model_linears(spec, widths).items():
        rank = ranks.get(module.rpartition(".")[2]) if low_rank else None
        if rank is None:
            weights.int8(module, rows, columns)
            plans[module] = ModulePlan(kind="int8", shape=(rows, columns))
        else:
            weights.int8(f"{module}.down", rank, columns)
            weights.int8(f"{module}.up", rows, rank)
            plans[module] = ModulePlan(kind="low_rank", shape=(rows, columns), rank=rank, factors="int8")
    options = SPQConfig.preset("default" if low_rank else "int8")
    return Manifest(options=options, modules=plans, mlp_widths=widths).dump()


def _write_plain(weights: RandomWeights, spec: ModelSpec, kind: str) -> dict[str, Any] | None:
    """A float16 checkpoint, or one whose layers are GPTQ's; embedding and head are float16 in both."""
    bits = {"gptq8": 8, "gptq4": 4}.get(kind)
    for module, (rows, columns) in model_linears(spec).items():
        if bits is None or module in (EMBEDDING, HEAD):
            weights.dense(module, rows, columns)
        else:
            weights.gptq(module, rows, columns, bits)
    if bits is None:
        return None
    return {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32",
    }  # fmt: skip


def main() -> None:
    """Write the model and print what it is, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_models", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    began = time.monotonic()
    size = write_model(options.out, SHAPES[options.shape], options.kind, torch.device(options.device))
    print(json.dumps({"kind": options.kind, "bytes_packed": size, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
