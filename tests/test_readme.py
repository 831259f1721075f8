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


def test_the_comparison_is_the_report_s() -> None:
    report = (REPOSITORY / "docs" / "compare-report" / "report.md").read_text("utf-8")
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in report.splitlines()]
    by_streams: dict[str, dict[str, list[str]]] = {}
    for row in cells:
        if len(row) == 9 and row[2].isdecimal():
            by_streams.setdefault(row[0], {})[row[2]] = row
    assert len(by_streams) > 1
    for name, rows in by_streams.items():
        speeds = ", ".join(rows[streams][3].split()[0] for streams in ("1", "8", "16"))
        first, gap = rows["8"][5].split(" / ")[0], rows["16"][6].split(" / ")[1]
        wanted = f"| {name} | {rows['1'][1]} | {speeds} | {first} | {gap} | {rows['1'][7]} |"
        assert wanted in README, f"put this row under Beside others in README.md: {wanted}"
