"""The peak of memory told before a compression is the one that comes, within a tenth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from spq.architecture import ModelSpec
from spq.checkpoint import open_model
from spq.config import SPQConfig
from spq.peak import Peak
from spq.report import read_report

ROOT = Path(__file__).resolve().parents[2]
# in a process of its own: in this one other tests have left memory that would be used again
PROGRAM = """
import json, sys, torch
from pathlib import Path
from spq.compress import compress
from spq.config import SPQConfig
torch.set_num_threads(1)
source, out, preset, options = sys.argv[1:]
text = (Path("demo") / "calibration.txt").read_text("utf-8")
options = SPQConfig.preset(preset, **json.loads(options))
compress(Path(source), Path(out), options, calibration_text=text, device=torch.device("cpu"))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that take as much memory as everything else in the process, with the tokenizer of the demo model."""
    folder, demo = tmp_path_factory.mktemp("wide"), ROOT / "demo" / "storyteller"
    config = LlamaConfig(
        hidden_size=512, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=json.loads((demo / "config.json").read_text())["vocab_size"], max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for path in demo.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("default", {"max_prune_ratio": 0.2, "calibration_windows": 8}),
        ("int8", {}),
        ("int4", {"calibration_windows": 2, "calibration_len": 256}),
    ],
)
def test_the_peak_is_what_was_said(wide: Path, tmp_path: Path, preset: str, options: dict[str, object]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", PROGRAM, str(wide), str(out), preset, json.dumps(options)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    report = read_report(out)
    assert report.expected_bytes == pytest.approx(report.peak_rss_bytes, rel=0.1)


def test_what_needs_more_is_told_to_need_more(wide: Path) -> None:
    spec: ModelSpec = open_model(wide).spec

    def told(windows: int, **options: object) -> int:
        made = SPQConfig.preset(str(options.pop("name", "default")), **options)
        return Peak(spec, made, (windows, 512) if made.uses_text else None, 2).nbytes()

    assert told(64) > told(8) > told(8, name="int8")
    assert told(8, name="int4") > told(8, name="int4", feedback=False)
    assert told(8, name="budget", ratio=0.5) > told(8, max_prune_ratio=0.0)
    assert told(1, name="int8", recover_steps=5) > told(1, name="int8")
