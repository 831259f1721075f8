"""Text into windows of contiguous tokens, for calibration.

Never padded and never cut per line: every window is full of real tokens, so no mask is needed and no statistic
measures padding. Not the perplexity (`evaluate`).

The bundled text, demo/calibration.txt, is about 400 KB of English prose: passages of about 32 KB from thirteen
public-domain books, taken from plain texts made of Standard Ebooks editions (standardebooks.org; texts in the US public
domain, editions CC0 1.0). Passages follow each other with a blank line; none is from a book used for evaluation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from spq.errors import CalibrationError


def bundled_calibration() -> Path:
    """Path of demo/calibration.txt in a clone. Raises CalibrationError where it is not there."""
    path = Path(__file__).resolve().parents[1] / "demo" / "calibration.txt"
    if not path.is_file():
        raise CalibrationError(
            f"{path}: the bundled calibration text is only there in a clone of the repository; give your own text, "
            "with --calibration FILE"
        )
    return path


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises CalibrationError naming it."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not a readable UTF-8 text file ({error})") from error


def text_hash(text: str) -> str:
    """Hex SHA-256 of a text: which calibration an artefact was made with."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def tokenize(folder: Path, text: str, *, special_tokens: bool = False) -> Tensor:
    """Token ids int64 [n] of a text by the tokenizer of a model folder. Raises CalibrationError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    except Exception as error:  # whatever a tokenizer of unknown make raises
        raise CalibrationError(f"{folder}: its tokenizer cannot be used ({type(error).__name__}: {error})") from error
    return torch.tensor(ids, dtype=torch.int64)


def choose_windows(ids: Tensor, count: int, length: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """`count` of the non-overlapping windows of `length` tokens in ids [n], chosen by seed -> int64 [count, length],
    and at most as many others to measure on, None where all are taken.

    Raises CalibrationError where the text has fewer.
    """
    available = ids.numel() // length
    if available < count:
        raise CalibrationError(
            f"calibration text has {ids.numel()} tokens, but {count} windows of {length} need {count * length}; give "
            "a longer text or lower calibration_windows or calibration_len"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    windows = ids[: available * length].view(available, length)
    spare = order[count : 2 * count].sort().values
    return windows[order[:count].sort().values], windows[spare] if len(spare) else None
