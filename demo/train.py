"""Train a small LLaMA on plain text: a byte-level BPE tokenizer, then next-token prediction. Made demo/storyteller.

Not a trainer to grow: one process, one device, no checkpoints; half an hour's work that is done again when it breaks.
The defaults are the hyper-parameters of demo/storyteller. That run ended by a clock and got 3,219 steps done; here the
number of steps is fixed, so that the schedule is the same on every machine. Weights will differ in the last bits and
so, after thousands of steps, in all of them; the held-out perplexity should not differ by more than a few percent.

    python demo/train.py --train train.txt --valid valid.txt --out DIR

The texts are UTF-8 with a line `<|endofbook|>` between two documents.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endofbook|>"
BOS, EOS = "<|bos|>", "<|eos|>"  # ids 0 and 1: the trainer numbers special tokens first
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}\n\n{% endfor %}"
MODEL_SEED, DATA_SEED = 0, 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyper-parameters; the defaults are those of demo/storyteller. A field's name is its flag's."""

    vocab: int = 4096
    dim: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512
    positions: int = 1024  # the model's limit; it learns only `context` of them
    context: int = 256  # tokens per training window
    batch: int = 16  # windows per step
    steps: int = 3219
    warmup: int = 100  # steps
    learning_rate: float = 3e-3
    floor: float = 0.05  # share of the learning rate left at the end
    weight_decay: float = 0.1  # of matrices; norms get none
    clip: float = 1.0  # norm of the gradient at most


def documents(path: Path) -> list[str]:
    """The documents of a text file, each closed by one newline."""
    return [part.strip() + "\n" for part in path.read_text("utf-8").split(SEPARATOR)]


def train_tokenizer(texts: Sequence[str], vocab: int, positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab` tokens (fewer where the text is too short) that puts BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=positions)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All documents as one stream of ids, int32 [n]; every document lies between BOS and EOS."""
    ids: list[int] = []
    for text in texts:
        ids += [0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    return torch.tensor(ids, dtype=torch.int32)


def windows(stream: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches of windows at random places of `stream` -> int64 [batch, context + 1]."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    while True:
        starts = torch.randint(0, len(stream) - recipe.context - 1, (recipe.batch,), generator=generator).tolist()
        yield torch.stack([stream[start : start + recipe.context + 1] for start in starts]).long()


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up times a cosine from 1 down to `floor` over all steps."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup) * (recipe.floor + (1 - recipe.floor) * cosine)


def cross_entropy(model: Callable[..., Any], ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Loss in nats of predicting targets [batch, n] from ids [batch, n]; bfloat16 matrix products."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids).logits  # [batch, n, vocab]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, stream: Tensor, context: int, *, batch: int = 16, limit: int | None = None) -> float:
    """Mean loss in nats per token over non-overlapping windows, each scored without its first token.

    `limit` is the number of windows at most (None: all). Raises ValueError where the stream has not even one.
    """
    if len(stream) < context:
        raise ValueError(f"{len(stream)} held-out tokens are fewer than one window of {context}; give more text")
    device = next(model.parameters()).device
    rows = stream[: len(stream) // context * context].view(-1, context)[:limit]
    model.eval()
    total = 0.0
    for chunk in rows.split(batch):
        ids = chunk.long().to(device)
        total += cross_entropy(model, ids[:, :-1], ids[:, 1:], reduction="sum").item()
    model.train()
    return total / (len(rows) * (context - 1))


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A LLaMA with random weights, the same ones every time, in float32 on the CPU."""
    torch.manual_seed(MODEL_SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab,
            hidden_size=recipe.dim,
            intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.positions,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def fit(model: LlamaForCausalLM, stream: Tensor, held_out: Tensor, recipe: Recipe, *, compiled: bool) -> None:
    """Train the model in place, where it lies. Raises ValueError where the text is shorter than a window."""
    if len(stream) < recipe.context + 2:
        raise ValueError(f"{len(stream)} tokens of text are fewer than one window of {recipe.context}; give more text")
    device = next(model.parameters()).device
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    net = torch.compile(model) if compiled else model
    data = windows(stream, recipe)
    model.train()
    smooth, since = 0.0, time.perf_counter()
    for step in range(recipe.steps):
        rate = learning_rate(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(data).to(device)
        loss = cross_entropy(net, ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        done = step + 1
        if done % 50 == 0:
            speed = 50 * recipe.batch * recipe.context / (time.perf_counter() - since)
            print(f"step {done}/{recipe.steps}  loss {smooth:.3f}  lr {rate:.2e}  {speed:.0f} tokens/s", flush=True)
            since = time.perf_counter()
        if done % 400 == 0:
            nats = evaluate(model, held_out, recipe.context, limit=160)
            print(f"  held out: {nats:.4f} nats, perplexity {math.exp(nats):.2f}", flush=True)
            since = time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> None:
    """Tokenizer, training, evaluation, and a Hugging Face folder in float16. The last line printed is JSON."""
    parser = argparse.ArgumentParser(
        description="Train a small LLaMA on plain text; the defaults made demo/storyteller."
    )
    parser.add_argument("--train", type=Path, required=True, help="text to learn from")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile; needs a C++ compiler")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help="(default: %(default)s)")
    given = parser.parse_args(arguments)
    recipe = Recipe(**{field.name: getattr(given, field.name) for field in fields(Recipe)})

    texts = documents(given.train)
    tokenizer = train_tokenizer(texts, recipe.vocab, recipe.positions)
    stream, held_out = encode(tokenizer, texts), encode(tokenizer, documents(given.valid))
    model = build_model(recipe).to(given.device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(stream):,} tokens to learn from, {len(held_out):,} held out", flush=True)
    fit(model, stream, held_out, recipe, compiled=given.compile)
    nats = evaluate(model, held_out, recipe.context)
    model.to(torch.float16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    seen = recipe.steps * recipe.batch * recipe.context
    print(json.dumps({"held_out_nats": nats, "perplexity": math.exp(nats), "steps": recipe.steps, "tokens": seen}))


if __name__ == "__main__":
    main()
