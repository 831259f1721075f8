"""The README's table of flags is the program's own; its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from server.cli import OPTIONS
from server.config import ServerConfig

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text("utf-8")


def flag_table() -> str:
    """What the README must hold, made from the options."""
    lines = ["| flag | default | |", "|---|---|---|"]
    for group, options in OPTIONS.items():
        lines.append(f"| **{group}** | | |")
        for option in options:
            default = ServerConfig.model_fields[option.name].default
            shown = "" if default is None or default == () or option.name == "model" else f"`{default}`"
            choices = f" ({', '.join(option.choices)})" if option.choices else ""
            lines.append(f"| `--{option.flag}` | {shown} | {option.help}{choices} |")
    return "\n".join(lines)


def test_the_table_of_flags_is_current() -> None:
    assert flag_table() in README, f"put this table under Options in README.md:\n{flag_table()}"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", README)
    assert targets
    for target in targets:
        assert (REPOSITORY / target).exists(), target


def test_anchors_exist() -> None:
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor
