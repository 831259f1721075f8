"""Sizes in bytes as people write and read them. Binary units; no torch, so that the command line stays quick."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """Binary units, three digits: 512 MiB, 6.74 GiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def parse_bytes(text: str) -> int:
    """'6GiB', '900MiB', '6GB' (decimal), '1073741824'. Raises ValueError."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}IB": 1024**power, f"{letter}B": 1000**power, letter: 1024**power}
    cleaned = text.strip().upper().replace(" ", "")
    digits = cleaned.rstrip("BIKMGT")
    try:
        return int(float(digits) * units[cleaned[len(digits) :]])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write for example 6GiB, 900MiB or 1073741824") from None
