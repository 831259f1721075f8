"""`python -m benchmarks.cards`: which card holds which LLaMA, by the planner, as the tables of docs/deploy.md.

Computed from shapes, nothing is measured: no weights, no GPU, no network. Weights are `spq.fit`'s byte counts, what a
step and the driver take its estimates, what is kept free the server's own (`server.engine.memory`); the rest is the KV
cache. Other models: `python -m benchmarks.cards FOLDER_OR_HUB_ID ...`, of which config.json alone is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from server.engine.memory import MARGIN_BYTES, MARGIN_SHARE, MIN_CONTEXT
from spq.architecture import ModelSpec, read_spec, spec_of
from spq.errors import SpqError
from spq.fit import DRIVER_BYTES, find_config, weight_bytes, workspace_bytes
from spq.layout import EMBEDDING, HEAD, model_linears, num_parameters
from spq.llama_config import LlamaConfig
from spq.sizes import parse_bytes

GB, GIB = 10**9, 1 << 30
CARDS_GIB = (4, 6, 8, 12, 16, 24, 40, 80)
SEQUENCES = 16  # at once, for the workspace
GROUP = 128  # inputs per scale of a GPTQ checkpoint
USEFUL_TOKENS = 4096  # of KV cache, for the smallest card; less where the model's context is shorter
# Vocabulary, hidden size, MLP width, layers, heads, KV heads, context, tied: config.json of these ids on the hub.
SHAPES = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (32000, 2048, 5632, 22, 32, 4, 2048, False),
    "meta-llama/Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, 131072, True),
    "meta-llama/Llama-3.2-3B": (128256, 3072, 8192, 28, 24, 8, 131072, True),
    "meta-llama/Llama-2-7b-hf": (32000, 4096, 11008, 32, 32, 32, 4096, False),
    "meta-llama/Meta-Llama-3-8B": (128256, 4096, 14336, 32, 32, 8, 8192, False),
    "meta-llama/Llama-2-13b-hf": (32000, 5120, 13824, 40, 40, 40, 4096, False),
    "meta-llama/Llama-2-70b-hf": (32000, 8192, 28672, 80, 64, 8, 4096, False),
    "meta-llama/Meta-Llama-3-70B": (128256, 8192, 28672, 80, 64, 8, 8192, False),
}


@dataclass(frozen=True, slots=True)
class Form:
    """A way to store weights. `kv_itemsize`: bytes of a key or value that its server keeps by default."""

    title: str
    kv_itemsize: int
    variant: str = ""  # of spq.fit; none for GPTQ
    gptq_bits: int = 0

    def nbytes(self, spec: ModelSpec) -> int:
        """Of all tensors."""
        return gptq_bytes(spec, self.gptq_bits) if self.gptq_bits else weight_bytes(spec, self.variant)


FLOAT16 = Form("float16", 2, "float16")
GPTQ8, GPTQ4 = Form("GPTQ 8-bit", 2, gptq_bits=8), Form("GPTQ 4-bit", 2, gptq_bits=4)
DEFAULT, INT4 = Form("SPQ default, at most", 1, "int8"), Form("SPQ int4", 1, "int4")
FORMS = (FLOAT16, GPTQ8, DEFAULT, GPTQ4, INT4)


def gptq_bytes(spec: ModelSpec, bits: int) -> int:
    """A GPTQ checkpoint: per matrix of a layer `bits` a weight, a float16 scale and a zero point of `bits` for each
    group of 128 inputs, an int32 for each input (g_idx); all else (embedding, head, norms) in float16."""
    total = 2 * num_parameters(spec)
    for module, shape in model_linears(spec).items():
        if module not in (EMBEDDING, HEAD):
            rows, columns = shape
            groups = -(-columns // GROUP)
            total += prod(shape) * bits // 8 + rows * groups * 2 + rows * groups * bits // 8 + 4 * columns
            total -= 2 * prod(shape)
    return total


def kv_tokens(spec: ModelSpec, weights: int, card: int, itemsize: int) -> int:
    """Tokens of keys and values, of `itemsize` bytes each, that a card of `card` bytes has room for; 0: does not fit,
    as the server needs at least MIN_CONTEXT."""
    kept_free = MARGIN_BYTES + round(MARGIN_SHARE * card)
    room = card - weights - workspace_bytes(spec, SEQUENCES) - DRIVER_BYTES - kept_free
    tokens = room // spec.kv_token_bytes(itemsize)
    return tokens if tokens >= min(MIN_CONTEXT, spec.max_positions) else 0


def smallest_card(spec: ModelSpec, form: Form, cards: Sequence[int]) -> int | None:
    """Bytes of the first card with USEFUL_TOKENS."""
    enough = min(USEFUL_TOKENS, spec.max_positions)
    weights = form.nbytes(spec)
    return next((card for card in cards if kv_tokens(spec, weights, card, form.kv_itemsize) >= enough), None)


def shown_tokens(count: int) -> str:
    """Two digits and a unit; a dash for none."""
    if count == 0:
        return "-"
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:.0f}{unit}" if value >= 10 else f"{value:.1f}{unit}"
    return str(count)


def shown_card(card: int) -> str:
    """Without a fraction where there is none."""
    return f"{card / GIB:g}"


def tables(specs: dict[str, ModelSpec], cards: Sequence[int]) -> str:
    """Everything, as Markdown."""
    parts = [
        "Bytes of weights, in GB (10^9), and of keys and values per token:",
        _table(
            ["model", "parameters", *(form.title for form in FORMS), "KV float16", "KV int8"],
            (
                [name, f"{num_parameters(spec) / GB:.2f} G", *(f"{form.nbytes(spec) / GB:.2f}" for form in FORMS)]
                + [f"{spec.kv_token_bytes(size) / 1024:.4g} KiB" for size in (2, 1)]
                for name, spec in specs.items()
            ),
        ),
    ]
    for form in (DEFAULT, INT4):
        parts.append(
            f"{form.title.partition(',')[0]}: tokens of KV cache that are left, int8 / float16, by GiB of the card:"
        )
        rows = []
        for name, spec in specs.items():
            weights = form.nbytes(spec)
            cells = [[kv_tokens(spec, weights, card, size) for size in (1, 2)] for card in cards]
            rows.append([name, *("-" if not any(c) else " / ".join(map(shown_tokens, c)) for c in cells)])
        parts.append(_table(["model", *map(shown_card, cards)], rows))
    parts.append(
        f"The smallest of these cards, in GiB, with {USEFUL_TOKENS:,} tokens of KV cache (or the model's context):"
    )
    parts.append(
        _table(
            ["model", *(f"{form.title}, {'int8' if form.kv_itemsize == 1 else 'float16'} KV" for form in FORMS)],
            (
                [name, *("-" if found is None else shown_card(found) for found in _smallest(spec, cards))]
                for name, spec in specs.items()
            ),
        )
    )
    return "\n\n".join(parts)


def _smallest(spec: ModelSpec, cards: Sequence[int]) -> list[int | None]:
    return [smallest_card(spec, form, cards) for form in FORMS]


def _table(head: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def known_specs() -> dict[str, ModelSpec]:
    """The models of SHAPES, by their names without the owner."""
    specs = {}
    for name, (vocabulary, hidden, width, layers, heads, kv_heads, context, tied) in SHAPES.items():
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"], vocab_size=vocabulary, hidden_size=hidden, intermediate_size=width,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            max_position_embeddings=context, tie_word_embeddings=tied,
        )  # fmt: skip
        specs[name.partition("/")[2]] = spec_of(config)
    return specs


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders or hub ids (default: eight known LLaMAs)")
    parser.add_argument("--cards", default=",".join(f"{n}GiB" for n in CARDS_GIB), help="sizes (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        cards = sorted(map(parse_bytes, arguments.cards.split(",")))
        specs = {name: read_spec(find_config(name, None)) for name in arguments.models} or known_specs()
    except (SpqError, ValueError) as error:
        print(f"cards: {error}", file=sys.stderr)
        return 2
    print(tables(specs, cards))
    return 0


if __name__ == "__main__":
    sys.exit(main())
