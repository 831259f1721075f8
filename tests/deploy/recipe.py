"""A Dockerfile as data: its stages, and in each the instructions in order."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # (instruction, the rest of the line)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]

    def environment(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", " ".join(self.all("ENV"))))

    def copied(self) -> list[str]:
        """Files and folders taken from the repository."""
        return [word for text in self.all("COPY") if "--from" not in text for word in text.split()[:-1]]

    def command(self, instruction: str) -> list[str]:
        """The JSON list of an exec form, such as that of ENTRYPOINT."""
        text = self.all(instruction)[-1]
        words: list[str] = json.loads(text[text.index("[") :])
        return words


def read(path: Path) -> list[Stage]:
    """Stages in order. Lines that end in a backslash are joined, comments left out."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name, base))
        elif instruction and stages:
            stages[-1].steps.append((instruction, re.sub(r"\s+", " ", rest.strip())))
    return stages


def stage(name: str) -> Stage:
    """One stage of the image's Dockerfile."""
    (found,) = [s for s in read(ROOT / "Dockerfile") if s.name == name]
    return found
