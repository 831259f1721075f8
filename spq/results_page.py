"""docs/results.md from measured rows: tables, and verdicts that are computed, not written.

Not the measuring (`trials`) and not the comparing of two rows (`verdict`). Rows that were trained stand apart.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from spq.rows import Row
from spq.trials import AT
from spq.variants import BUDGET_BITS, DEFAULT, FLOAT16, INT8, RECOVER_STEPS, RECOVERED, Setting, budget_name
from spq.verdict import against_gptq

MIB = 1 << 20
WITHIN = 0.05  # what a prediction should keep to
NUM_PARTS = 6  # families of `variants.parts`
EQUAL = 0.01  # bytes that differ by less are called equal
RECOVERY = (
    "With LoRA recovery ({steps} steps of 2,048 tokens of the calibration text, [how](recovery.md)) beside the same "
    "rows without. GPTQ starts from the original after the same steps."
)
HEAD = ("file KiB", "bits/weight", "resident KiB")


def page(models: Sequence[tuple[str, str, Setting, Sequence[Row]]], how: Mapping[str, Any]) -> str:
    """Markdown of (name, calibration text, setting, rows) of every model; `how`: the command line's options."""
    lines = _header(how)
    for name, calibrated_on, setting, rows in models:
        lines += [f"## {name}", "", _conditions(calibrated_on, setting, rows), ""]
        plain, trained = (
            [r for r in rows if not r.name.endswith(RECOVERED)],
            {r.name for r in rows if r.name.endswith(RECOVERED)},
        )
        lines += [*table(plain), "", *verdicts(plain), ""]
        if trained:
            pairs = [r for r in rows if r.name in trained or f"{r.name}{RECOVERED}" in trained]
            lines += [RECOVERY.format(steps=RECOVER_STEPS), "", *table(pairs), ""]
            matched = {r.name: r for r in rows if r.name in trained and f"SPQ budgeted{AT}{r.name}" in trained}
            matched |= {r.name: r for r in rows if r.name in trained and not r.name.startswith("GPTQ ")}
            lines += ["**Against GPTQ, both trained (computed).** " + against_gptq(matched), ""]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    """All rows, largest files first; those without figures last, with their reason."""
    texts = list(next(row for row in rows if row.texts).texts)
    heads = [f"{what}, {text}" for text in texts for what in ("perplexity", "top-1", "KL")]
    measured = sorted((row for row in rows if row.texts), key=lambda row: -(row.file_bytes or 0))
    fast = any(row.tokens_per_s for row in rows)
    heads = ["variant", *HEAD, *heads, *(["tokens/s"] if fast else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in measured:
        cells = [row.name, f"{(row.file_bytes or 0) / 1024:.1f}", f"{row.bits_per_weight or 0:.2f}"]
        cells.append(f"{(row.resident_bytes or 0) / 1024:.1f}")
        for text in texts:
            score = row.texts[text]
            cells += [f"{score.perplexity:.3f}", f"{score.top1 or 0:.3f}", f"{score.kl or 0:.4f}"]
        if fast:
            cells.append("-" if row.tokens_per_s is None else f"{row.tokens_per_s:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    missing = [f"{row.name}: {row.options.get('why_not')}." for row in rows if not row.texts]
    return lines + (["", *missing] if missing else [])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Against GPTQ, the ensemble against its parts, and predictions: a paragraph each."""
    by_name = {row.name: row for row in rows}
    return [
        "**Against GPTQ (computed).** " + against_gptq(by_name),
        "",
        "**The ensemble and its parts (computed).** " + ensemble(by_name),
        "",
        "**Predicted and measured (computed).** " + predictions(by_name),
    ]


def ensemble(rows: Mapping[str, Row]) -> str:
    """Whether SVD, pruning and int8 together beat each part at the same bytes."""
    whole = rows.get(DEFAULT)
    if whole is None or not whole.texts:
        return "Not measured."
    text, score = next(iter(whole.texts.items()))
    said: list[str] = []
    beaten: list[str] = []
    lost: list[str] = []
    for name, row in rows.items():
        if not name.endswith(f"{AT}{DEFAULT}") or not row.texts or name.startswith("SPQ"):
            continue
        part = name.removesuffix(f"{AT}{DEFAULT}")
        found = row.texts[text].perplexity
        off = (row.file_bytes or 0) / (whole.file_bytes or 1) - 1
        if off > EQUAL:
            said.append(f"{part} cannot be made so small ({off:+.0%} at its smallest, perplexity {found:.3f})")
            beaten.append(part)
        else:
            said.append(f"{part} {found:.3f} ({off:+.1%} bytes)")
            (beaten if score.perplexity <= found else lost).append(part)
    if not said:
        return "Its parts are not measured."
    facts = (
        f"SPQ default has perplexity {score.perplexity:.3f} on {text} with {(whole.file_bytes or 0) / 1024:.1f} KiB. "
    )
    facts += "At those bytes: " + "; ".join(said) + ". "
    int8, budget = rows.get(INT8), rows.get(f"SPQ budgeted{AT}{DEFAULT}")
    if int8 is not None and int8.texts:
        more = (int8.file_bytes or 0) / (whole.file_bytes or 1) - 1
        facts += f"int8 alone, {more:+.1%} bytes: {int8.texts[text].perplexity:.3f}. "
    if budget is not None and budget.texts:
        facts += f"The allocator at those bytes: {budget.texts[text].perplexity:.3f}. "
    if len(beaten) + len(lost) < NUM_PARTS:
        return facts + "Not all parts are measured: no verdict."
    if not lost:
        return (
            facts + "The shape of the paper's ablation, the ensemble beats its parts at equal bytes, is **confirmed**."
        )
    if not beaten:
        return facts + "The shape of the paper's ablation is **refuted**: every part alone is better at equal bytes."
    return facts + (
        "The shape of the paper's ablation is **refuted in part**: the ensemble beats " + ", ".join(beaten)
        + ", but not " + ", ".join(lost) + "."
    )  # fmt: skip


def predictions(rows: Mapping[str, Row]) -> str:
    """The allocator's prediction beside what was measured: on its own spare windows and on the first text."""
    base, said, off, seen = rows[FLOAT16], [], [], []
    for bits in BUDGET_BITS:
        row = rows.get(budget_name(bits))
        if row is None or not row.texts:
            continue
        seen.append(bits)
        rise, predicted, measured = (row.options.get(key) for key in ("rise", "predicted", "measured"))
        text, score = next(iter(row.texts.items()))
        expected = base.texts[text].perplexity * math.exp(float(rise or 0))
        errors = [expected / score.perplexity - 1]
        words = f"{text} {expected:.3f} / {score.perplexity:.3f} ({errors[0]:+.1%})"
        if predicted is not None and measured is not None:
            errors.append(float(predicted) / float(measured) - 1)
            words = f"spare windows {float(predicted):.3f} / {float(measured):.3f} ({errors[1]:+.1%}), {words}"
        said.append(f"{bits} bits: {words}")
        if bits >= 4 and max(map(abs, errors)) > WITHIN:
            off.append(f"{bits} bits{', said to be weak by the tool' if row.options.get('weak') else ''}")
    if not said:
        return "No budgets are measured."
    near = f"The {sum(bits >= 4 for bits in seen)} measured of the budgets of 8 to 4 bits are within 5 %."
    verdict = near if not off else "**Off by more than 5 %** at: " + ", ".join(off) + "."
    return "Predicted / measured perplexity. " + "; ".join(said) + ". " + verdict


def _conditions(calibrated_on: str, setting: Setting, rows: Sequence[Row]) -> str:
    protocols = "; ".join(
        f"{text}: {score.protocol}" for text, score in next(row for row in rows if row.texts).texts.items()
    )
    return (
        f"Calibrated on 32 windows of {setting.window} tokens of {calibrated_on}. At 4 bits {setting.group} inputs "
        f"share a scale, for GPTQ as for ours (128 does not divide the widths). {protocols}."
    )


def _header(how: Mapping[str, Any]) -> list[str]:
    words = {
        "models": "MODELS",
        "stories": "FILE",
        "books": "FILE",
        "wikitext": "FOLDER",
        "gptq": "FOLDER",
        "rows": "FOLDER",
    }
    flags = " ".join(f"--{name} {word}" for name, word in words.items() if how.get(name) is not None)
    limit = how.get("max_tokens")
    flags += ("" if limit is None else f" --max-tokens {limit}") + (" --speed" if how.get("speed") else "")
    extent = "Whole texts are" if limit is None else f"The first {limit} tokens of each text are"
    speed = (
        " Tokens/s: our engine, one stream, float32 cache, the fastest of 80 steps (`benchmarks.step`); of models this "
        "small it is mostly the time of a step without weights. GPTQ's folders are not ours to serve."
        if how.get("speed")
        else ""
    )
    return [
        "# What compression costs at matched bytes",
        "",
        f"Made by `python -m spq.results {flags} --threads {how['threads']}` on {datetime.now(UTC):%Y-%m-%d}; "
        f"{_cpu_name()}, {how['threads']} thread(s); Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. {how.get('note', '')}",
        "",
        f"{extent} used; calibration and evaluation share no passage. Every model is first rounded to float16; that is "
        "what is compressed and what top-1 agreement and KL (nats per token) refer to. Bytes are those of the weight "
        "files, headers included (in models as small as these they count: some 10 to 20 KiB); resident bytes those of "
        "the tensors once loaded and decoded. Computed in float32. Perplexities are per token of each model's "
        f"tokenizer: compare within a table.{speed}",
        "",
        "GPTQ is GPTQModel on the same windows (`benchmarks/gptq_checkpoint.py`, symmetric, no activation order, "
        "float16). It leaves the embedding in 16 bits, a large part of models this small, so its rows are also shown "
        "with our int8 rows for the embedding: the harder rival. The ensemble's parts are brought to its bytes by "
        "search on their threshold or ratio.",
        "",
    ]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
