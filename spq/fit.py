"""spq-plan: what would fit on a card, before anything is computed. Only config.json is read.

Not the server's own sizing, which measures (`server.engine.memory`). Weights and keys and values are exact byte counts
of the packed format; the workspace and what the driver takes are estimates; tokens/s is what the card's bandwidth
allows, times a share that good kernels reach: a bound to compare plans by, no measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from spq.architecture import ATTENTION, ModelSpec, read_spec
from spq.errors import ModelFileError, OptionError, SpqError
from spq.layout import EMBEDDING, HEAD, model_linears, model_vectors, module_has_bias
from spq.recipe import Recipe, Storage
from spq.sizes import format_bytes, parse_bytes
from spq.tiles import round_up, tile_multiple

STEP_TOKENS = 512  # the server's default largest step
DRIVER_BYTES = 500 << 20  # context, libraries and kernels of a CUDA process with torch; varies by card and driver
REACHED = 0.75  # share of the bandwidth that fused decode kernels are assumed to reach
STORAGE = Storage(group=128, symmetric=False, float_bytes=2)
VARIANTS = ("float16", "int8", "int8, attention at half rank", "mixed 8 and 4 bits", "int4")


@dataclass(frozen=True, slots=True)
class Plan:
    """One variant on the card. Bytes; tokens/s where a bandwidth is known."""

    variant: str
    weights: int
    kv: int  # of all sequences at full context
    workspace: int
    driver: int
    fits: bool
    sequences: int  # at full context that fit, at most those asked for
    tokens_per_s_one: float | None  # one sequence, half the context filled
    tokens_per_s_all: float | None  # all that fit
    coded_layers: int | None = None  # that `--resident coded` leaves on the host for one sequence; None: cannot run
    tokens_per_s_coded: float | None = None  # one sequence then, where it is known how fast layers are fed

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.kv + self.workspace + self.driver


def weight_bytes(spec: ModelSpec, variant: str) -> int:
    """Tensor bytes of a packed folder of this variant (STORAGE: groups of 128 with zero points)."""
    return sum(2 * prod(shape) for shape in model_vectors(spec).values()) + _matrix_bytes(spec, variant, "")


def _matrix_bytes(spec: ModelSpec, variant: str, prefix: str) -> int:
    """Of the matrices whose names begin so, biases included."""
    total = 0
    for module, shape in model_linears(spec).items():
        if module.startswith(prefix):
            total += STORAGE.nbytes(_recipe(variant, module, module.rpartition(".")[2], shape), shape)
            total += 2 * shape[0] if module_has_bias(spec, module) else 0
    return total


def workspace_bytes(spec: ModelSpec, concurrency: int) -> int:
    """Activations of the largest step in 16 bits (residual, norm, q, k, v, attention, MLP), and float32 logits with
    a sorted copy for every sequence."""
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return (
        STEP_TOKENS * 2 * (2 * spec.hidden_size + heads + spec.intermediate_size) + concurrency * spec.vocab_size * 12
    )


def plan(
    spec: ModelSpec,
    variant: str,
    memory: int,
    context: int,
    concurrency: int,
    bandwidth: float | None,
    int8_kv: bool,
    feed: float | None = None,
) -> Plan:
    """One variant on a card of `memory` bytes; `bandwidth` of its memory and `feed` of decoding and copying layers in
    bytes/s. Raises OptionError for a context too long."""
    if context > spec.max_positions:
        raise OptionError(f"context {context} is beyond the model's {spec.max_positions} positions; lower it")
    weights, token = weight_bytes(spec, variant), spec.kv_token_bytes(1 if int8_kv else 2)
    workspace = workspace_bytes(spec, concurrency)
    kv = token * context * concurrency
    room = memory - weights - workspace - DRIVER_BYTES
    sequences = max(0, min(concurrency, room // (token * context)))

    def speed(count: int) -> float | None:
        if bandwidth is None or count == 0:
            return None
        return count * bandwidth * REACHED / (weights + count * token * context / 2)

    fits = kv <= room
    layer, layers = _matrix_bytes(spec, variant, f"{spec.layer_prefix(0)}."), spec.num_layers
    beside = room - token * context + layers * layer  # for layers, with one sequence
    kept = layers if layers * layer <= beside else beside // layer - 2  # an arena of two, where any is coded
    coded = None if kept < 0 or (kept < layers and variant == "float16") else layers - kept
    coded_speed = None
    if coded is not None and bandwidth is not None and feed is not None:
        read_s = (weights + token * context / 2) / (bandwidth * REACHED)
        coded_speed = 1 / (read_s + coded * max(0.0, layer / feed - layer / (bandwidth * REACHED)))
    return Plan(
        variant, weights, kv, workspace, DRIVER_BYTES, fits, sequences, speed(min(1, sequences)), speed(sequences),
        coded, coded_speed,
    )  # fmt: skip


def free_for_weights(spec: ModelSpec, memory: int, context: int, concurrency: int, int8_kv: bool) -> int:
    """Bytes left for weights once everything else has its place: what to give to --budget. Can be negative."""
    kv = spec.kv_token_bytes(1 if int8_kv else 2) * context * concurrency
    return memory - kv - workspace_bytes(spec, concurrency) - DRIVER_BYTES


def _recipe(variant: str, module: str, local: str, shape: tuple[int, int]) -> Recipe:
    if variant == "float16":
        return Recipe("dense")
    if variant == "int4" and module != EMBEDDING:
        return Recipe("int4")
    if variant == "mixed 8 and 4 bits" and local not in (*ATTENTION, "embed_tokens") and module != HEAD:
        return Recipe("int4")
    if variant == "int8, attention at half rank" and local in ATTENTION:
        rank = round_up(min(shape) // 2, tile_multiple(min(shape), None), min(shape))
        pair = Recipe("int8", rank)
        return pair if STORAGE.nbytes(pair, shape) < STORAGE.nbytes(Recipe("int8"), shape) else Recipe("int8")
    return Recipe("int8")


def find_config(name: str, revision: str | None) -> Path:
    """The folder with the model's config.json, which alone is downloaded. Raises ModelFileError."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelFileError(f"{name}: no such folder, and its config.json cannot be downloaded: {reason}") from error


def render(plans: Sequence[Plan], left: int, arguments: argparse.Namespace) -> str:
    """The table and what follows from it."""
    lines = [
        f"{'variant':30} {'weights':>9} {'KV':>9} {'work':>9} {'total':>9}  fits  seqs  tok/s 1   tok/s all",
    ]
    for found in plans:
        one, everyone = (f"{v:8.0f}" if v else "       -" for v in (found.tokens_per_s_one, found.tokens_per_s_all))
        lines.append(
            f"{found.variant:30} {format_bytes(found.weights):>9} {format_bytes(found.kv):>9} "
            f"{format_bytes(found.workspace):>9} {format_bytes(found.total):>9}  {'yes' if found.fits else 'no':>4}  "
            f"{found.sequences:4} {one} {everyone:>11}"
        )
    lines.append(
        f"KV is that of {arguments.concurrency} sequences of {arguments.context} tokens in {arguments.kv_dtype}; the "
        f"total counts {format_bytes(DRIVER_BYTES)} for the driver (an estimate); seqs: how many fit at full context."
    )
    if arguments.bandwidth is None:
        lines.append("No tokens/s without the card's memory bandwidth: give --bandwidth, for example 360GB.")
    else:
        lines.append(f"tokens/s: {REACHED:.0%} of the bandwidth, half the context filled; a bound, not a measurement.")
    if arguments.feed is not None:
        lines += [f"{found.variant:30} {_coded_line(found)}" for found in plans if not found.sequences]
    lines.append(
        f"For exactly this load: spq-compress MODEL --budget {left}" if left > 0 else
        "Keys and values alone do not fit: lower --context or --concurrency, or use --kv-dtype int8."
    )  # fmt: skip
    return "\n".join(lines)


def _coded_line(found: Plan) -> str:
    """What `--resident coded` makes of a variant that does not fit."""
    if found.coded_layers is None:
        return "cannot run, coded or not"
    speed = "" if found.tokens_per_s_coded is None else f", {found.tokens_per_s_coded:.2f} tokens/s for one sequence"
    return f"with --resident coded: {found.coded_layers} layers decoded on the host{speed}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="spq-plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="model folder or Hugging Face id; only config.json is read")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--gpu-memory", metavar="BYTES", required=True, help="of the card, for example 8GiB")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="of each sequence (default: 4096)")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="sequences at once (default: 16)")
    parser.add_argument("--kv-dtype", choices=("int8", "16 bit"), default="int8", help="of keys and values")
    parser.add_argument("--bandwidth", metavar="BYTES", help="of the card's memory per second, for example 360GB")
    parser.add_argument(
        "--feed",
        metavar="BYTES",
        help="per second that --resident coded decodes and copies (spq-serve logs it at start), for example 1.4GB",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        spec = read_spec(find_config(arguments.model, arguments.revision))
        try:
            memory = parse_bytes(arguments.gpu_memory)
            bandwidth, feed = (
                None if text is None else float(parse_bytes(text)) for text in (arguments.bandwidth, arguments.feed)
            )
        except ValueError as error:
            raise OptionError(str(error)) from error
        if arguments.context < 1 or arguments.concurrency < 1:
            raise OptionError(f"context {arguments.context} and concurrency {arguments.concurrency} must be at least 1")
        load = (memory, arguments.context, arguments.concurrency)
        int8_kv = arguments.kv_dtype == "int8"
        plans = [plan(spec, variant, *load, bandwidth, int8_kv, feed) for variant in VARIANTS]
        left = free_for_weights(spec, *load, int8_kv)
    except SpqError as error:
        print(f"spq-plan: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"plans": [asdict(p) | {"total": p.total} for p in plans], "budget": left}, indent=1))
    else:
        print(render(plans, left, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
