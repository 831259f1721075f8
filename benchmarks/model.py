"""`python -m benchmarks.model --out DIR`: the model that the rivals are compared on, the same one each time.

LLaMA-shaped, 109.5 M parameters (768 wide, 12 layers, 12 heads, MLP 2048, vocabulary 32,000, tied), random float32
weights from a seed. Its tokenizer is a real one: byte-level BPE trained on the text of Python's standard library, so
equal Python versions give equal files. It tells speed and memory, and nothing about quality.

Two properties keep the work of all servers equal. Tokens that are not whole ASCII text (special ones, parts of UTF-8
characters) have a zero row in the tied embedding: their logit is 0, the largest of 32,000 random ones is above it, so a
greedy answer never ends early, on a server that cannot ignore EOS, and never holds text back. And the tokenizer adds no
BOS, so a prompt of n whole words is n tokens, sent as text or as ids.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|bos|>", "<|eos|>")  # ids 0 and 1: the trainer numbers special tokens first
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; a field's name is its flag's."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 2048
    vocab: int = 32_000
    positions: int = 4096
    seed: int = 0


def library_texts() -> list[str]:
    """The source files of Python's standard library that are UTF-8, by path, without what pip installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            texts.append(path.read_bytes().decode("utf-8", errors="ignore"))
    return texts


def train_tokenizer(texts: list[str], vocab: int, positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab` tokens. Raises ValueError where the text is too short for as many."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, {vocab} are wanted; give more text")
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], model_max_length=positions
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def unprintable(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the tokens that are special or not ASCII text of their own."""
    space, newline = "Ġ", "Ċ"  # how a byte-level vocabulary writes them; other control bytes are not ASCII there
    return [
        index
        for token, index in tokenizer.get_vocab().items()
        if token in SPECIAL or not token.replace(space, "").replace(newline, "").isascii()
    ]


def build(shape: Shape, never: list[int]) -> LlamaForCausalLM:
    """The model in float32 on the CPU. The tokens `never` get a zero row in the tied embedding."""
    torch.manual_seed(shape.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.positions,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[never] = 0.0
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=0, eos_token_id=1, pad_token_id=1, do_sample=False
    )
    return model


def write(out: Path, shape: Shape) -> dict[str, str]:
    """Make the folder and return SHA-256 of the files that must be equal wherever it is made."""
    tokenizer = train_tokenizer(library_texts(), shape.vocab, shape.positions)
    tokenizer.save_pretrained(out)
    build(shape, unprintable(tokenizer)).save_pretrained(out)
    names = ("model.safetensors", "tokenizer.json")
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


def main() -> None:
    """Write the model and print what it hashes to, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for name, default in ((name, getattr(Shape(), name)) for name in Shape.__slots__):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    print(json.dumps(write(out, Shape(**arguments)), indent=1))


if __name__ == "__main__":
    main()
